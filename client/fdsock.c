// The worker's end of the fd socket.
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "client/channel.h"
#include "proto/fdsock.h"

enum { HELLO_TIMEOUT_MS = 5000 };

int kvd_fdsock_connect(const char *address, char *ticket, struct kvd_error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    struct kvd_fd_hello hello;
    if (strncmp(address, "unix:", 5) != 0 ||
        (size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s.fd", address + 5) >=
            sizeof(addr.sun_path))
        return -kvd_fail(err, KVD_E_UNSUPPORTED, "%s has no fd socket: it wants unix:/path",
                         address);
    int sock KVD_CLOSE = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&addr, sizeof(addr)))
        return -kvd_fail(err, errno == EACCES ? KVD_E_DENIED : KVD_E_UNAVAILABLE,
                         "cannot connect to %s: %s; is kvd running there?", addr.sun_path,
                         strerror(errno));
    struct pollfd p = {.fd = sock, .events = POLLIN};
    if (poll(&p, 1, HELLO_TIMEOUT_MS) != 1 ||
        recv(sock, &hello, sizeof(hello), MSG_DONTWAIT) != sizeof(hello) ||
        hello.magic != KVD_FD_MAGIC)
        return -kvd_fail(err, KVD_E_UNAVAILABLE, "%s does not speak as kvd does", addr.sun_path);
    if (hello.version != KVD_FD_VERSION)
        return -kvd_fail(err, KVD_E_UNSUPPORTED, "kvd speaks version %u on %s, this library %u",
                         hello.version, addr.sun_path, KVD_FD_VERSION);
    memcpy(ticket, hello.ticket, 32);
    ticket[32] = '\0';
    return KVD_TAKE_FD(sock);
}

int kvd_fdsock_send(int sock, uint64_t key, int fd, struct kvd_error *err)
{
    struct kvd_fd_message m = {.magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION, .key = key};
    union {
        struct cmsghdr head;
        uint8_t space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec iov = {&m, sizeof(m)};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof(control)};
    struct cmsghdr *h = CMSG_FIRSTHDR(&msg);
    h->cmsg_level = SOL_SOCKET;
    h->cmsg_type = SCM_RIGHTS;
    h->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(h), &fd, sizeof(fd));
    if (sendmsg(sock, &msg, MSG_NOSIGNAL) != sizeof(m))
        return kvd_fail(err, KVD_E_UNAVAILABLE, "the fd socket is closed: %s", strerror(errno));
    return KVD_OK;
}
