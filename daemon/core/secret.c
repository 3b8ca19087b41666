#include "daemon/core/secret.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>

static void fill(void *out, size_t n)
{
    uint8_t *bytes = out;
    for (size_t have = 0; have < n;) {
        ssize_t got = getrandom(bytes + have, n - have, 0);
        have += got > 0 ? (size_t)got : 0;
    }
}

void kvd_secret_new(char out[KVD_SECRET_TEXT])
{
    uint8_t bytes[16];
    fill(bytes, sizeof(bytes));
    kvd_hex(bytes, sizeof(bytes), out);
}

uint64_t kvd_random64(void)
{
    uint64_t value;
    fill(&value, sizeof(value));
    return value;
}

bool kvd_secret_same(const char secret[KVD_SECRET_TEXT], const char *text)
{
    uint8_t differs = 0;
    if (strlen(text) != KVD_SECRET_TEXT - 1)
        return false;
    for (size_t i = 0; i < KVD_SECRET_TEXT - 1; i++)
        differs |= (uint8_t)(secret[i] ^ text[i]);
    return differs == 0;
}

int kvd_secret_file_read(const char *path, size_t least, uint8_t out[KVD_SECRET_FILE_MAX],
                         size_t *n, struct kvd_error *err)
{
    struct stat st;
    uint8_t more;
    int fd KVD_CLOSE = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st))
        return kvd_fail(err, -errno, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return kvd_fail(err, KVD_E_INVALID, "%s is not a file", path);
    if ((st.st_mode & 0027) || (st.st_uid != 0 && st.st_uid != geteuid()))
        return kvd_fail(err, KVD_E_DENIED,
                        "%s has mode %04o and owner %u: others must neither read nor write it, its "
                        "group must not write it, and root or kvd's user must own it (chmod 0600)",
                        path, st.st_mode & 07777, st.st_uid);
    ssize_t got = read(fd, out, KVD_SECRET_FILE_MAX);
    if (got < 0)
        return kvd_fail(err, -errno, "%s: %s", path, strerror(errno));
    if ((size_t)got < least || read(fd, &more, 1) != 0)
        return kvd_fail(err, KVD_E_INVALID, "%s has %lld bytes; it wants %zu to %d", path,
                        (long long)st.st_size, least, KVD_SECRET_FILE_MAX);
    *n = (size_t)got;
    return KVD_OK;
}
