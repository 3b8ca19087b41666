// A kvd with `keep` leaves a file beside its socket that is locked as long as somebody is there who
// starts it again: kvd-keeper, or systemd (daemon/core/comeback.c).
#include "client/lib/kept.h"

#include <fcntl.h>

#include "proto/base.h"
#include "proto/fdsock.h"

bool kvd_kept(const char *path)
{
    char *file KVD_FREE = NULL;
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (asprintf(&file, "%s" KVD_KEPT_SUFFIX, path) < 0)
        return false;
    int fd KVD_CLOSE = open(file, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    return fd >= 0 && fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}
