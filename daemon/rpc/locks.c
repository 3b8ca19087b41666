#include "daemon/rpc/locks.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

static int lock_socket(struct kvd_daemon *d, const char *path, struct kvd_error *err)
{
    char lock[KVD_CONFIG_TEXT + 8];
    snprintf(lock, sizeof(lock), "%s.lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return kvd_fail(err, -errno, "cannot open %s: %s%s", lock, strerror(errno),
                        errno == ENOENT
                            ? "; make the folder, or choose another path with --listen unix:PATH"
                        : errno == EACCES || errno == EROFS
                            ? "; choose a folder that this user may write in, with --listen "
                              "unix:PATH"
                            : "");
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        int e = errno;
        close(fd);
        if (e == EWOULDBLOCK)
            return kvd_fail(err, KVD_E_EXISTS,
                            "another kvd serves %s; stop it or choose another --listen", path);
        return kvd_fail(err, -e, "cannot lock %s: %s", lock, strerror(e));
    }
    d->lock_fds[d->n_locks++] = fd;
    struct stat st;
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return kvd_fail(err, KVD_E_EXISTS, "%s exists and is not a socket; move it away", path);
        kvd_notice("removing stale socket path=%s", path);
        unlink(path);
    }
    return KVD_OK;
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    int rc = KVD_OK;
    for (uint32_t i = 0; i < d->config.n_listen && rc == KVD_OK; i++)
        if (strncmp(d->config.listen[i], "unix:", 5) == 0)
            rc = lock_socket(d, d->config.listen[i] + 5, err);
    return rc;
}

static void deinit(struct kvd_daemon *d)
{
    for (uint32_t i = 0; i < d->n_locks; i++)
        close(d->lock_fds[i]);
}

const struct kvd_part kvd_part_locks = {.init = init, .deinit = deinit};
