// The fd socket: a unix SOCK_SEQPACKET socket beside the gRPC one. It passes file descriptors,
// knows the peer's credentials, and its hang-up is the worker's death notice.
//
// On connect the daemon sends a hello with a ticket; OpenSession with that ticket ties the session
// to the connection. Each message from the worker carries one memfd and the key under which
// RegisterBuffer will ask for it. To workers in direct mode the daemon sends descriptors of extents
// and rotation sets (memory.c).
#include "daemon/session/fdsock.h"

#include <errno.h>
#include <sys/socket.h>
#include <uthash.h>

#include "daemon/rpc/listen.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/session/reclaim.h"

enum {
    PEERPIDFD = 77, // SO_PEERPIDFD, of Linux 6.5
    MAX_PENDING_FDS = 64,
    YIELDS_MS = 1000, // a connection without a session for so long makes room when there is none
};

struct kvd_connection {
    char ticket[KVD_SECRET_TEXT];
    struct kvd_daemon *d;
    int fd;
    int pidfd; // of the process that connected; -1: the kernel has none to give
    uv_poll_t poll, death;
    uint32_t handles;
    uint64_t since_ms;
    struct kvd_peer peer;
    struct kvd_user *user; // whose share it is
    struct kvd_session *session;
    void (*ended)(struct kvd_daemon *d, struct kvd_session *s, const char *why); // of the session
    struct {
        uint64_t key;
        int fd;
    } pending[MAX_PENDING_FDS];
    uint32_t n_pending;
    uint64_t refused_key; // the last one whose descriptor was not taken
    struct kvd_error refused;
    bool closing;
    UT_hash_handle hh;
};

struct kvd_fdsock {
    uv_timer_t timer; // drops connections that say nothing; runs only while there are such
    struct kvd_connection *connections; // by ticket
};

static void on_handle_closed(uv_handle_t *handle)
{
    struct kvd_connection *c = handle->data;
    if (--c->handles == 0)
        free(c);
}

static void drop_pending(struct kvd_connection *c, uint32_t i)
{
    c->pending[i] = c->pending[--c->n_pending];
    kvd_user_give(c->user, KVD_SHARE_DESCRIPTORS, 1);
}

void kvd_connection_close(struct kvd_connection *c)
{
    if (c->closing)
        return;
    c->closing = true;
    HASH_DEL(c->d->fdsock->connections, c);
    while (c->n_pending) {
        kvd_reclaim_fd(c->d, c->pending[0].fd);
        drop_pending(c, 0);
    }
    kvd_user_give(c->user, KVD_SHARE_CONNECTIONS, 1);
    kvd_user_unref(&c->user);
    uv_poll_stop(&c->poll);
    close(c->fd);
    uv_close((uv_handle_t *)&c->poll, on_handle_closed);
    if (c->pidfd < 0)
        return;
    uv_poll_stop(&c->death);
    close(c->pidfd);
    uv_close((uv_handle_t *)&c->death, on_handle_closed);
}

static void hang_up(struct kvd_connection *c, const char *why)
{
    struct kvd_session *s = c->session;
    if (s)
        c->ended(c->d, s, why); // closes the connection too
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
              !(msg.msg_flags & MSG_TRUNC) && c->n_pending < MAX_PENDING_FDS;
    if (ok && n_fds == 0 && msg.msg_flags & MSG_CTRUNC) {
        kvd_fail(&c->refused, KVD_E_LIMIT,
                 "kvd has no file descriptor free: try again, or raise the limit of open files "
                 "(LimitNOFILE=, ulimit -n)");
        c->refused_key = m.key; // RegisterBuffer says so
        return 1;
    }
    ok &= n_fds == 1 && !(msg.msg_flags & MSG_CTRUNC);
    if (ok && kvd_user_take(c->user, KVD_SHARE_DESCRIPTORS, 1, &c->refused)) {
        kvd_reclaim_fd(c->d, fds[0]);
        c->refused_key = m.key;
        return 1;
    }
    if (ok) {
        c->pending[c->n_pending].key = m.key;
        c->pending[c->n_pending++].fd = fds[0];
        return 1;
    }
    for (int i = 0; i < n_fds; i++)
        kvd_reclaim_fd(c->d, fds[i]);
    if (n != 0)
        kvd_warning("malformed message on the fd socket, or too many descriptors pid=%" PRId64
                    " uid=%" PRId64,
                    c->peer.pid, c->peer.uid);
    return -1;
}

// Receives what waits, and no more than a worker may have sent and not asked for: one that sends as
// fast as it is refused would have the loop to itself.
static int receive_some(struct kvd_connection *c)
{
    int rc = 1;
    for (uint32_t i = 0; i < MAX_PENDING_FDS && rc > 0; i++)
        rc = receive(c);
    return rc;
}

// The descriptor that was sent under a key, or -1.
static int take_pending(struct kvd_connection *c, uint64_t key)
{
    for (uint32_t i = 0; i < c->n_pending; i++) {
        if (c->pending[i].key != key)
            continue;
        int fd = c->pending[i].fd;
        drop_pending(c, i);
        return fd;
    }
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
    if (receive_some(c) < 0)
        hang_up(c, "the worker hung up");
}

// The process that connected is gone, whoever else may have got its socket from it.
static void on_death(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    hang_up(poll->data, "the worker died");
}

static void watch_process(struct kvd_connection *c)
{
    socklen_t len = sizeof(c->pidfd);
    if (getsockopt(c->fd, SOL_SOCKET, PEERPIDFD, &c->pidfd, &len))
        c->pidfd = -1;
    if (c->pidfd >= 0 && uv_poll_init(&c->d->loop, &c->death, c->pidfd)) {
        close(c->pidfd);
        c->pidfd = -1;
    }
    if (c->pidfd < 0)
        return;
    c->handles++;
    c->death.data = c;
    uv_poll_start(&c->death, UV_READABLE, on_death);
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

// Room is made among the user's connections that have no session.
static bool make_room(struct kvd_daemon *d, const struct kvd_user *user)
{
    struct kvd_connection *c, *next; // by age: a hash keeps the order in which it was filled
    HASH_ITER(hh, d->fdsock->connections, c, next)
    {
        if (kvd_now_ms(d) - c->since_ms >= YIELDS_MS && !c->session && c->user == user) {
            kvd_connection_close(c);
            return true;
        }
    }
    return false;
}

// A connection that is charged to its user; NULL: it is not to be, and *err says why.
static struct kvd_connection *connection_new(struct kvd_daemon *d, int64_t uid,
                                             struct kvd_error *err)
{
    kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct kvd_connection *c = calloc(1, sizeof(*c));
    if (c)
        c->user = kvd_user_ref(d, uid);
    if (c && c->user &&
        (kvd_user_take(c->user, KVD_SHARE_CONNECTIONS, 1, err) == KVD_OK ||
         (make_room(d, c->user) &&
          kvd_user_take(c->user, KVD_SHARE_CONNECTIONS, 1, err) == KVD_OK)))
        return c;
    kvd_debug("connection to the fd socket refused: %s", err->text);
    if (c)
        kvd_user_unref(&c->user);
    free(c);
    return NULL;
}

// Tells who is hung up on why.
static void refuse(int fd, const struct kvd_error *why)
{
    struct kvd_fd_refusal m = {
        .magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION, .code = (int32_t)why->code};
    snprintf(m.text, sizeof(m.text), "%s", why->text);
    send(fd, &m, sizeof(m), MSG_NOSIGNAL | MSG_DONTWAIT);
    close(fd);
}

static void accept_one(struct kvd_daemon *d, int fd)
{
    struct kvd_error err = {0};
    struct ucred cred;
    socklen_t len = sizeof(cred);
    struct kvd_connection *c = NULL;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len))
        kvd_fail(&err, KVD_E_INTERNAL, "who connects is not known: %s", strerror(errno));
    else
        c = connection_new(d, cred.uid, &err);
    if (!c) {
        refuse(fd, &err);
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
    c->handles = 1;
    uv_poll_start(&c->poll, UV_READABLE | UV_DISCONNECT, on_readable);
    watch_process(c);
    if (!send_hello(c)) {
        kvd_connection_close(c);
        return;
    }
    if (!uv_is_active((uv_handle_t *)&d->fdsock->timer))
        uv_timer_start(&d->fdsock->timer, on_timer, 1000, 1000);
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

void kvd_connection_bind(struct kvd_connection *c, struct kvd_session *s,
                         void (*ended)(struct kvd_daemon *d, struct kvd_session *s,
                                       const char *why))
{
    c->ended = ended;
    c->session = s;
    c->since_ms = kvd_now_ms(c->d);
}

int kvd_connection_take_fd(struct kvd_connection *c, uint64_t key, struct kvd_error *err)
{
    // RegisterBuffer may arrive before the loop has polled the fd socket.
    int fd = take_pending(c, key);
    if (fd < 0) {
        if (receive_some(c) < 0) // hung up on when the loop polls it: the caller has the session
            shutdown(c->fd, SHUT_RDWR);
        fd = take_pending(c, key);
    }
    if (fd >= 0)
        return fd;
    if (c->refused.code && c->refused_key == key)
        *err = c->refused;
    else
        kvd_fail(err, KVD_E_NOT_FOUND,
                 "no descriptor was sent over the fd socket under key %" PRIu64, key);
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

// -- start and end ------------------------------------------------------------------------------

// Beside each unix socket; without one there is none.
static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    int rc = KVD_OK;
    d->fdsock = calloc(1, sizeof(*d->fdsock));
    if (!d->fdsock)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->fdsock->timer);
    d->fdsock->timer.data = d;
    for (uint32_t i = 0; i < d->config.n_listen && rc == KVD_OK; i++) {
        char path[KVD_CONFIG_TEXT + 8];
        if (strncmp(d->config.listen[i], "unix:", 5) != 0)
            continue;
        snprintf(path, sizeof(path), "%s.fd", d->config.listen[i] + 5);
        rc = kvd_listen_unix(d, KVD_LISTEN_FD, path, SOCK_SEQPACKET, accept_one, err);
    }
    return rc;
}

static void free_fdsock(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(d->fdsock);
    d->fdsock = NULL;
}

// Closes all; their sessions end.
static void stop(struct kvd_daemon *d)
{
    struct kvd_fdsock *s = d->fdsock;
    struct kvd_connection *c, *next;
    if (!s || uv_is_closing((uv_handle_t *)&s->timer))
        return;
    kvd_listen_close(d, KVD_LISTEN_FD);
    HASH_ITER(hh, s->connections, c, next)
    hang_up(c, "kvd stops");
    uv_close((uv_handle_t *)&s->timer, free_fdsock);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_connections", "gauge", "Open connections on the fd socket.",
               d->fdsock ? HASH_COUNT(d->fdsock->connections) : 0);
}

const struct kvd_part kvd_part_fdsock = {
    .init = init, .stop = stop, .end = stop, .metrics = metrics};
