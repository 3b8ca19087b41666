// With `keep` each unix socket has a file beside it that is locked as long as whoever starts kvd
// again is there: the lock is a descriptor's, and they hold that. So it is there while kvd is not,
// and goes when kvd is stopped for good. Workers ask for it and need not take it (OFD locks), so
// that they are in nobody's way.
#include "daemon/core/comeback.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/core/keep.h"
#include "proto/fdsock.h"

static bool same_file(int fd, const char *path)
{
    struct stat a, b;
    return fstat(fd, &a) == 0 && stat(path, &b) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

// Whether it is a file that could only be this: in a folder that all may write to, it may be
// another name of what is nobody else's to read.
static bool is_mark(int fd)
{
    struct stat st;
    return fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size == 0 && st.st_nlink == 1 &&
           st.st_uid == geteuid();
}

// That of the kvd before, or a new one.
static int mark(struct kvd_daemon *d, uint32_t i)
{
    char path[KVD_CONFIG_TEXT + 8], name[sizeof(KVD_KEEP_MARK) + 10];
    snprintf(path, sizeof(path), "%s" KVD_KEPT_SUFFIX, d->config.listen[i] + 5);
    snprintf(name, sizeof(name), KVD_KEEP_MARK "%u", i);
    int held KVD_CLOSE = kvd_keep_take(d, name);
    if (held >= 0 && same_file(held, path))
        return KVD_OK;
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd KVD_CLOSE = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd >= 0 && !is_mark(fd))
        return EEXIST;
    if (fd < 0 || fchmod(fd, 0644) || fcntl(fd, F_OFD_SETLK, &lock))
        return errno;
    kvd_keep_put(d, name, fd);
    return KVD_OK;
}

// Without it all goes on: whoever opens a session just then is told that kvd is not there.
static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    for (uint32_t i = 0; kvd_keep_on(d) && i < d->config.n_listen; i++) {
        const bool is_unix = strncmp(d->config.listen[i], "unix:", 5) == 0;
        int rc = is_unix ? mark(d, i) : KVD_OK;
        if (rc)
            kvd_warning("workers that start while kvd is started again will not wait for it: "
                        "%s" KVD_KEPT_SUFFIX ": %s",
                        d->config.listen[i] + 5, strerror(rc));
    }
    return KVD_OK;
}

const struct kvd_part kvd_part_comeback = {.init = init};
