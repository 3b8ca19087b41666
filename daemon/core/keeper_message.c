// The messages between kvd and kvd-keeper, for both.
#include "daemon/core/keeper.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

union control {
    struct cmsghdr head;
    char bytes[CMSG_SPACE(sizeof(int))];
};

bool kvd_keeper_send(int to, enum kvd_keeper_op op, const char *name, int fd)
{
    struct kvd_keeper_message m = {.magic = KVD_KEEPER_MAGIC, .op = op};
    struct iovec part = {&m, sizeof(m)};
    union control control = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)),
                                      .cmsg_level = SOL_SOCKET,
                                      .cmsg_type = SCM_RIGHTS}};
    struct msghdr h = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t n;
    snprintf(m.name, sizeof(m.name), "%s", name);
    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
        h.msg_control = &control;
        h.msg_controllen = sizeof(control.bytes);
    }
    while ((n = sendmsg(to, &h, MSG_NOSIGNAL)) < 0 && errno == EINTR)
        ;
    return n == (ssize_t)sizeof(m);
}

ssize_t kvd_keeper_receive(int from, int flags, struct kvd_keeper_message *m, int *fd)
{
    struct iovec part = {m, sizeof(*m)};
    union control control;
    struct msghdr h = {.msg_iov = &part,
                       .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof(control)};
    ssize_t n;
    *fd = -1;
    while ((n = recvmsg(from, &h, MSG_CMSG_CLOEXEC | flags)) < 0 && errno == EINTR)
        ;
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&h) : NULL;
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(c), sizeof(*fd));
    if (n == (ssize_t)sizeof(*m) && m->magic != KVD_KEEPER_MAGIC)
        m->op = KVD_KEEPER_UNKNOWN;
    m->name[sizeof(m->name) - 1] = '\0';
    return n;
}
