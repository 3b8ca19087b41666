// The fd socket: a unix SOCK_SEQPACKET socket beside the gRPC one. It passes file descriptors,
// knows the peer's credentials, and its hang-up is the worker's death notice.
//
// On connect the daemon sends a hello with a ticket; OpenSession with that ticket ties the session
// to the connection. Each message from the worker carries one memfd and the key under which
// RegisterBuffer will ask for it. To workers in direct mode the daemon sends descriptors of extents
// and rotation sets (memory.c).
//
// What workers send may be any file, and the loop must not be who lets go of it last (closer.h): it
// looks at a message before it takes it, and what it does not take is discarded beside it.
#include "daemon/session/fdsock.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <uthash.h>

#include "daemon/core/closer.h"
#include "daemon/rpc/listen.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"

enum {
    PEERPIDFD = 77, // SO_PEERPIDFD, of Linux 6.5
    MAX_PENDING_FDS = 64,
    YIELDS_MS = 1000, // a connection without a session for so long makes room when there is none
    YIELDING = 16,    // that have made room and are not closed yet
    LITTLE = 1 << 20, // bytes of memory that are freed at once
};

struct kvd_connection {
    char ticket[KVD_SECRET_TEXT];
    struct kvd_daemon *d;
    int fd;
    int pidfd; // of the process that connected; -1: the kernel has none to give
    uv_poll_t poll, death;
    uint32_t handles; // and descriptors that are being closed
    uint64_t since_ms;
    struct kvd_peer peer;
    struct kvd_user *user; // whose share it is
    bool charged;          // a connection of that
    struct kvd_session *session;
    void (*ended)(struct kvd_daemon *d, struct kvd_session *s, const char *why); // of the session
    struct {
        uint64_t key;
        int fd;
    } pending[MAX_PENDING_FDS];
    uint32_t n_pending;
    uint64_t refused_key; // the last one whose descriptor was not taken
    struct kvd_error refused;
    bool discarding; // a message is, so nothing is received
    bool closing;
    UT_hash_handle hh;
};

struct kvd_fdsock {
    uv_timer_t timer; // drops connections that say nothing; runs only while there are such
    struct kvd_connection *connections; // by ticket
};

static void let_go(struct kvd_connection *c)
{
    if (--c->handles)
        return;
    kvd_user_unref(&c->user);
    free(c);
}

static void on_handle_closed(uv_handle_t *handle)
{
    let_go(handle->data);
}

static void give_descriptor(void *connection)
{
    struct kvd_connection *c = connection;
    kvd_user_give(c->user, KVD_SHARE_DESCRIPTORS, 1);
    let_go(c);
}

static bool is_little_memory(int fd)
{
    struct stat st;
    // No file but one of memory has seals, and only of such it is known that fstat does not wait.
    return fcntl(fd, F_GET_SEALS) >= 0 && fstat(fd, &st) == 0 &&
           (uint64_t)st.st_blocks * 512 <= LITTLE;
}

void kvd_connection_close_fd(struct kvd_connection *c, int fd)
{
    c->handles++;
    if (is_little_memory(fd)) {
        close(fd);
        give_descriptor(c);
    } else {
        kvd_closer_close(c->peer.uid, fd, give_descriptor, c);
    }
}

// A connection is charged once, whoever gives that back first.
static void give_connection(struct kvd_connection *c)
{
    if (c->charged)
        kvd_user_give(c->user, KVD_SHARE_CONNECTIONS, 1);
    c->charged = false;
}

static void on_socket_closed(void *connection)
{
    give_connection(connection);
    let_go(connection);
}

static void close_socket(struct kvd_connection *c)
{
    c->handles++;
    kvd_closer_hang_up(c->peer.uid, c->fd, on_socket_closed, c);
}

void kvd_connection_close(struct kvd_connection *c)
{
    if (c->closing)
        return;
    c->closing = true;
    HASH_DEL(c->d->fdsock->connections, c);
    while (c->n_pending)
        kvd_connection_close_fd(c, c->pending[--c->n_pending].fd);
    uv_poll_stop(&c->poll);
    uv_close((uv_handle_t *)&c->poll, on_handle_closed);
    if (c->pidfd >= 0) {
        uv_poll_stop(&c->death);
        close(c->pidfd);
        uv_close((uv_handle_t *)&c->death, on_handle_closed);
    }
    shutdown(c->fd, SHUT_RDWR);
    if (!c->discarding) // else when that has come back
        close_socket(c);
}

static void hang_up(struct kvd_connection *c, const char *why)
{
    struct kvd_session *s = c->session;
    if (s)
        c->ended(c->d, s, why); // closes the connection too
    else
        kvd_connection_close(c);
}

static void on_readable(uv_poll_t *poll, int status, int events);

static void on_discarded(void *connection)
{
    struct kvd_connection *c = connection;
    c->discarding = false;
    if (c->closing)
        close_socket(c);
    else
        uv_poll_start(&c->poll, UV_READABLE | UV_DISCONNECT, on_readable);
    let_go(c);
}

// The message that comes next is not taken. RegisterBuffer says why.
static void discard(struct kvd_connection *c, uint64_t key)
{
    c->refused_key = key;
    c->discarding = true;
    c->handles++;
    uv_poll_start(&c->poll, UV_DISCONNECT, on_readable);
    kvd_closer_discard(c->peer.uid, c->fd, on_discarded, c);
}

// Looks at the message that comes next, and leaves it where it is. The files that came along stay
// in it, so none is let go of here, whatever goes wrong. *fd: the first of them, the caller's to
// close; -1: there is none, or it was not asked for.
static ssize_t look(struct kvd_connection *c, struct kvd_fd_message *m, int *flags, int *fd)
{
    union {
        struct cmsghdr head;
        uint8_t space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {m, sizeof(*m)};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd) {
        *fd = -1;
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_LEN(sizeof(int)); // no room for a second one
    }
    ssize_t n = recvmsg(c->fd, &msg, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *h = fd && n >= 0 ? CMSG_FIRSTHDR(&msg) : NULL;
    if (h && h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS &&
        h->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(fd, CMSG_DATA(h), sizeof(*fd));
    *flags = msg.msg_flags;
    return n;
}

// Takes the one descriptor of the message that comes next, which is charged. Returns what
// `receive` does.
static int take(struct kvd_connection *c)
{
    struct kvd_fd_message m;
    int flags, fd;
    ssize_t n = look(c, &m, &flags, &fd);
    if (fd >= 0 && n == sizeof(m) && !(flags & MSG_CTRUNC) &&
        recv(c->fd, &m, sizeof(m), MSG_DONTWAIT) == sizeof(m)) {
        c->pending[c->n_pending].key = m.key;
        c->pending[c->n_pending++].fd = fd;
        return 1;
    }
    if (fd >= 0) {
        kvd_connection_close_fd(c, fd);
        return -1; // there are others
    }
    kvd_user_give(c->user, KVD_SHARE_DESCRIPTORS, 1);
    if (n != sizeof(m))
        return -1;
    kvd_fail(&c->refused, KVD_E_LIMIT,
             "kvd has no file descriptor free: try again, or raise the limit of open files "
             "(LimitNOFILE=, ulimit -n)");
    discard(c, m.key);
    return 0;
}

// Receives one message. 1: a message was handled; 0: none waits, or it is being discarded;
// negative: hang up.
static int receive(struct kvd_connection *c)
{
    struct kvd_fd_message m;
    int flags;
    if (c->discarding)
        return 0;
    ssize_t n = look(c, &m, &flags, NULL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    // Without room for descriptors MSG_CTRUNC says that there are some.
    bool ok = n == sizeof(m) && m.magic == KVD_FD_MAGIC && m.version == KVD_FD_VERSION &&
              !(flags & MSG_TRUNC) && flags & MSG_CTRUNC && c->n_pending < MAX_PENDING_FDS;
    if (ok && kvd_user_take(c->user, KVD_SHARE_DESCRIPTORS, 1, &c->refused)) {
        discard(c, m.key);
        return 0;
    }
    int rc = ok ? take(c) : -1;
    if (rc < 0 && n != 0)
        kvd_warning("malformed message on the fd socket, or too many descriptors pid=%" PRId64
                    " uid=%" PRId64,
                    c->peer.pid, c->peer.uid);
    return rc;
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
        c->pending[i] = c->pending[--c->n_pending];
        return fd;
    }
    return -1;
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    struct kvd_connection *c = poll->data;
    if (status < 0) {
        hang_up(c, "the fd socket failed");
        return;
    }
    if ((c->discarding && events & UV_DISCONNECT) || receive_some(c) < 0)
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

// Room is made among the user's connections that have no session. It is there before the socket is
// closed, and so not while closing hangs.
static bool make_room(struct kvd_daemon *d, const struct kvd_user *user)
{
    struct kvd_connection *c, *next; // by age: a hash keeps the order in which it was filled
    if (kvd_closer_waiting(kvd_user_uid(user)) > YIELDING)
        return false;
    HASH_ITER(hh, d->fdsock->connections, c, next)
    {
        if (kvd_now_ms(d) - c->since_ms >= YIELDS_MS && !c->session && c->user == user) {
            give_connection(c);
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
          kvd_user_take(c->user, KVD_SHARE_CONNECTIONS, 1, err) == KVD_OK))) {
        c->charged = true;
        return c;
    }
    kvd_debug("connection to the fd socket refused: %s", err->text);
    if (c)
        kvd_user_unref(&c->user);
    free(c);
    return NULL;
}

// Tells who is hung up on why. It may have sent something already.
static void refuse(int64_t uid, int fd, const struct kvd_error *why)
{
    struct kvd_fd_refusal m = {
        .magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION, .code = (int32_t)why->code};
    snprintf(m.text, sizeof(m.text), "%s", why->text);
    send(fd, &m, sizeof(m), MSG_NOSIGNAL | MSG_DONTWAIT);
    kvd_closer_hang_up(uid, fd, NULL, NULL);
}

static void accept_one(struct kvd_daemon *d, int fd)
{
    struct kvd_error err = {0};
    struct ucred cred = {.uid = (uid_t)KVD_USER_UNKNOWN};
    socklen_t len = sizeof(cred);
    struct kvd_connection *c = NULL;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len))
        kvd_fail(&err, KVD_E_INTERNAL, "who connects is not known: %s", strerror(errno));
    else
        c = connection_new(d, cred.uid, &err);
    if (!c) {
        refuse(cred.uid, fd, &err);
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
    // While a message is discarded those behind it have not been read.
    if (c->refused.code && (c->refused_key == key || c->discarding))
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
