// The fd socket: a unix SOCK_SEQPACKET socket beside the gRPC one. It passes file descriptors,
// knows the peer's credentials, and its hang-up is the worker's death notice.
//
// On connect the daemon sends a hello with a ticket; OpenSession with that ticket ties the session
// to the connection. Each message from the worker carries one memfd and the key under which
// RegisterBuffer will ask for it. To workers in direct mode the daemon sends descriptors of extents
// and rotation sets (memory.c).
#include <errno.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "daemon/kvd.h"

enum { MAX_PENDING_FDS = 64 };

struct kvd_connection {
    char ticket[KVD_SECRET_TEXT];
    struct kvd_daemon *d;
    int fd;
    uv_poll_t poll;
    uint64_t since_ms;
    struct kvd_peer peer;
    struct kvd_session *session;
    struct {
        uint64_t key;
        int fd;
    } pending[MAX_PENDING_FDS];
    uint32_t n_pending;
    bool closing;
    UT_hash_handle hh;
};

struct kvd_fdsock {
    int fd;
    char path[128];
    uv_poll_t poll;
    uv_timer_t timer; // drops connections that say nothing; runs only while there are such
    struct kvd_connection *connections; // by ticket
};

static void free_connection(uv_handle_t *handle)
{
    free(handle->data);
}

void kvd_connection_close(struct kvd_connection *c)
{
    if (c->closing)
        return;
    c->closing = true;
    HASH_DEL(c->d->fdsock->connections, c);
    for (uint32_t i = 0; i < c->n_pending; i++)
        close(c->pending[i].fd);
    uv_poll_stop(&c->poll);
    close(c->fd);
    uv_close((uv_handle_t *)&c->poll, free_connection);
}

static void hang_up(struct kvd_connection *c, const char *why)
{
    struct kvd_session *s = c->session;
    if (s)
        kvd_session_end(c->d, s, why); // closes the connection too
    else
        kvd_connection_close(c);
}

// Receives one message. 1: a message was handled; 0: none waits; negative: hang up.
static int receive(struct kvd_connection *c)
{
    struct kvd_fd_message m;
    union {
        struct cmsghdr head;
        uint8_t space[CMSG_SPACE(8 * sizeof(int))];
    } control;
    struct iovec iov = {&m, sizeof(m)};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof(control)};
    ssize_t n = recvmsg(c->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    int fds[8], n_fds = 0;
    for (struct cmsghdr *h = CMSG_FIRSTHDR(&msg); h; h = CMSG_NXTHDR(&msg, h)) {
        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
            continue;
        n_fds = (int)((h->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(h), (size_t)n_fds * sizeof(int));
    }
    bool ok = n == sizeof(m) && m.magic == KVD_FD_MAGIC && m.version == KVD_FD_VERSION &&
              n_fds == 1 && !(msg.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) &&
              c->n_pending < MAX_PENDING_FDS;
    if (ok) {
        c->pending[c->n_pending].key = m.key;
        c->pending[c->n_pending++].fd = fds[0];
        return 1;
    }
    for (int i = 0; i < n_fds; i++)
        close(fds[i]);
    if (n != 0)
        kvd_warning("malformed message on the fd socket pid=%lld uid=%lld", (long long)c->peer.pid,
                    (long long)c->peer.uid);
    return -1;
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    struct kvd_connection *c = poll->data;
    (void)events;
    if (status < 0) {
        hang_up(c, "the fd socket failed");
        return;
    }
    int rc;
    while ((rc = receive(c)) > 0)
        continue;
    if (rc < 0)
        hang_up(c, "the worker hung up");
}

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_connection *c, *next;
    bool waiting = false;
    HASH_ITER(hh, d->fdsock->connections, c, next)
    {
        if (c->session)
            continue;
        if (kvd_now_ms(d) - c->since_ms >= KVD_HELLO_TIMEOUT_MS)
            kvd_connection_close(c);
        else
            waiting = true;
    }
    if (!waiting)
        uv_timer_stop(timer);
}

static bool send_hello(struct kvd_connection *c)
{
    struct kvd_fd_hello hello = {.magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION};
    memcpy(hello.ticket, c->ticket, sizeof(hello.ticket));
    return send(c->fd, &hello, sizeof(hello), MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(hello);
}

static void accept_one(struct kvd_daemon *d, int fd)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);
    struct kvd_connection *c = calloc(1, sizeof(*c));
    if (!c || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) ||
        HASH_COUNT(d->fdsock->connections) >= KVD_MAX_CONNECTIONS) {
        free(c);
        close(fd);
        return;
    }
    c->d = d;
    c->fd = fd;
    c->since_ms = kvd_now_ms(d);
    c->peer = (struct kvd_peer){.pid = cred.pid, .uid = cred.uid, .gid = cred.gid};
    kvd_secret_new(c->ticket);
    uv_poll_init(&d->loop, &c->poll, fd);
    c->poll.data = c;
    HASH_ADD_STR(d->fdsock->connections, ticket, c);
    uv_poll_start(&c->poll, UV_READABLE | UV_DISCONNECT, on_readable);
    if (!send_hello(c)) {
        kvd_connection_close(c);
        return;
    }
    if (!uv_is_active((uv_handle_t *)&d->fdsock->timer))
        uv_timer_start(&d->fdsock->timer, on_timer, 1000, 1000);
}

static void on_accept(uv_poll_t *poll, int status, int events)
{
    struct kvd_daemon *d = poll->data;
    (void)events;
    for (int fd; status == 0 &&
                 (fd = accept4(d->fdsock->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0;)
        accept_one(d, fd);
}

int kvd_fdsock_init(struct kvd_daemon *d, const char *path, struct kvd_error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    struct kvd_fdsock *s = calloc(1, sizeof(*s));
    if (!s || (size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path) >=
                  sizeof(addr.sun_path)) {
        free(s);
        return kvd_fail(err, KVD_E_INVALID, "%s: a socket's path is too long", path);
    }
    snprintf(s->path, sizeof(s->path), "%s", path);
    s->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink(path); // stale: the lock beside the gRPC socket is ours
    mode_t mask = umask(0177);
    bool ok = s->fd >= 0 && bind(s->fd, (struct sockaddr *)&addr, sizeof(addr)) == 0;
    umask(mask);
    struct stat st;
    // Who may use the gRPC socket may use this one.
    char grpc_path[128];
    snprintf(grpc_path, sizeof(grpc_path), "%.*s", (int)strlen(path) - 3, path);
    ok = ok && stat(grpc_path, &st) == 0 && chown(path, (uid_t)-1, st.st_gid) == 0 &&
         chmod(path, st.st_mode & 0777) == 0;
    if (!ok || listen(s->fd, 512)) {
        int e = errno;
        if (s->fd >= 0)
            close(s->fd);
        free(s);
        return kvd_fail(err, -e, "cannot listen on %s: %s", path, strerror(e));
    }
    d->fdsock = s;
    uv_poll_init(&d->loop, &s->poll, s->fd);
    s->poll.data = d;
    uv_poll_start(&s->poll, UV_READABLE, on_accept);
    uv_timer_init(&d->loop, &s->timer);
    s->timer.data = d;
    return KVD_OK;
}

static void free_fdsock(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(d->fdsock);
    d->fdsock = NULL;
}

void kvd_fdsock_deinit(struct kvd_daemon *d)
{
    struct kvd_fdsock *s = d->fdsock;
    struct kvd_connection *c, *next;
    if (!s)
        return;
    HASH_ITER(hh, s->connections, c, next)
    hang_up(c, "kvd stops");
    uv_poll_stop(&s->poll);
    close(s->fd);
    unlink(s->path);
    uv_close((uv_handle_t *)&s->timer, NULL);
    uv_close((uv_handle_t *)&s->poll, free_fdsock);
}

struct kvd_connection *kvd_fdsock_find(struct kvd_daemon *d, const char *ticket)
{
    struct kvd_connection *c = NULL;
    if (d->fdsock && strlen(ticket) == KVD_SECRET_TEXT - 1)
        HASH_FIND_STR(d->fdsock->connections, ticket, c);
    return c;
}

struct kvd_peer kvd_connection_peer(const struct kvd_connection *c)
{
    return c->peer;
}

struct kvd_session *kvd_connection_session(const struct kvd_connection *c)
{
    return c->session;
}

void kvd_connection_bind(struct kvd_connection *c, struct kvd_session *s)
{
    c->session = s;
    c->since_ms = kvd_now_ms(c->d);
}

int kvd_connection_take_fd(struct kvd_connection *c, uint64_t key)
{
    // RegisterBuffer may arrive before the loop has polled the fd socket.
    while (receive(c) > 0)
        continue;
    for (uint32_t i = 0; i < c->n_pending; i++) {
        if (c->pending[i].key != key)
            continue;
        int fd = c->pending[i].fd;
        c->pending[i] = c->pending[--c->n_pending];
        return fd;
    }
    return -1;
}

int kvd_connection_send(struct kvd_connection *c, const struct kvd_fd_grant *grant, int fd,
                        struct kvd_error *err)
{
    union {
        struct cmsghdr head;
        uint8_t space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec iov = {(void *)grant, sizeof(*grant)};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
    }
    if (sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(*grant))
        return KVD_OK;
    if (errno == EAGAIN || errno == ETOOMANYREFS || errno == ENOBUFS)
        return kvd_fail(err, KVD_E_LIMIT, "the worker does not read its fd socket");
    return kvd_fail(err, KVD_E_UNAVAILABLE, "the fd socket failed: %s", strerror(errno));
}

uint32_t kvd_fdsock_count(const struct kvd_daemon *d)
{
    return d->fdsock ? HASH_COUNT(d->fdsock->connections) : 0;
}
