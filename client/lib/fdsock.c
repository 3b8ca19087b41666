// The worker's end of the fd socket.
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "client/lib/channel.h"
#include "client/lib/gate.h"
#include "proto/fdsock.h"

// Also how long connecting waits where the daemon accepts nobody.
static void limit_sends(int sock, uint32_t timeout_ms)
{
    uint32_t ms = KVD_MAX(timeout_ms, 1u); // 0 would be for ever
    struct timeval t = {.tv_sec = ms / 1000, .tv_usec = (long)(ms % 1000) * 1000};
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t));
}

int kvd_fdsock_connect(const char *address, uint32_t timeout_ms, char *ticket,
                       struct kvd_error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    union {
        struct kvd_fd_hello hello;
        struct kvd_fd_refusal refusal;
    } m;
    uint64_t deadline = kvd_now_ms() + timeout_ms;
    if (strncmp(address, "unix:", 5) != 0 ||
        (size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s.fd", address + 5) >=
            sizeof(addr.sun_path))
        return -kvd_fail(err, KVD_E_UNSUPPORTED, "%s has no fd socket: it wants unix:/path",
                         address);
    int sock KVD_CLOSE = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return -kvd_fail(err, KVD_E_INTERNAL, "cannot make a socket: %s", strerror(errno));
    limit_sends(sock, timeout_ms);
    if (connect(sock, (struct sockaddr *)&addr, sizeof(addr))) {
        if (errno == EAGAIN)
            return -kvd_fail(err, KVD_E_TIMEOUT, "%s accepts no connections: kvd hangs there",
                             addr.sun_path);
        if (errno == EACCES)
            return -kvd_fail(err, KVD_E_DENIED, KVD_SOCKET_DENIED, addr.sun_path);
        return -kvd_fail(err, KVD_E_UNAVAILABLE, "cannot connect to %s: %s; is kvd running there?",
                         addr.sun_path, strerror(errno));
    }
    struct pollfd p = {.fd = sock, .events = POLLIN};
    int ready;
    do {
        ready = poll(&p, 1, (int)KVD_MIN(kvd_left_ms(deadline), (uint32_t)INT32_MAX));
    } while (ready < 0 && errno == EINTR);
    if (ready == 0)
        return -kvd_fail(err, KVD_E_TIMEOUT, "%s says nothing: kvd hangs there, or it is another",
                         addr.sun_path);
    ssize_t n = recv(sock, &m, sizeof(m), MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno == ECONNRESET))
        return -kvd_fail(err, KVD_E_UNAVAILABLE, "%s hung up; is kvd stopping, or full?",
                         addr.sun_path);
    if (n == sizeof(m.refusal) && m.refusal.magic == KVD_FD_MAGIC)
        return -kvd_fail(err, m.refusal.code == KVD_E_LIMIT ? KVD_E_LIMIT : KVD_E_UNAVAILABLE,
                         "%s: %.*s", addr.sun_path, (int)sizeof(m.refusal.text) - 1,
                         m.refusal.text);
    if (n != sizeof(m.hello) || m.hello.magic != KVD_FD_MAGIC)
        return -kvd_fail(err, KVD_E_UNAVAILABLE, "%s does not speak as kvd does", addr.sun_path);
    if (m.hello.version != KVD_FD_VERSION)
        return -kvd_fail(err, KVD_E_UNSUPPORTED, "kvd speaks version %u on %s, this library %u",
                         m.hello.version, addr.sun_path, KVD_FD_VERSION);
    memcpy(ticket, m.hello.ticket, 32);
    ticket[32] = '\0';
    return KVD_TAKE_FD(sock);
}

int kvd_fdsock_send(int sock, uint64_t key, int fd, uint32_t timeout_ms, struct kvd_error *err)
{
    limit_sends(sock, timeout_ms);
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
    if (sendmsg(sock, &msg, MSG_NOSIGNAL) == sizeof(m))
        return KVD_OK;
    return errno == EAGAIN
               ? kvd_fail(err, KVD_E_TIMEOUT, "the fd socket takes nothing more: kvd hangs")
               : kvd_fail(err, KVD_E_UNAVAILABLE, "the fd socket is closed: %s", strerror(errno));
}
