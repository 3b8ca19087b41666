// The fd socket, as workers speak to it: messages of any bytes with any descriptors, hung up on at
// any time, over real sockets. What was sent is what is found, what is malformed is hung up on, and
// no descriptor is left over.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "daemon/core/closer.h"
#include "daemon/core/log.h"
#include "daemon/rpc/listen.h"
#include "daemon/rpc/users.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/reclaim.h"
#include "tests/fuzz/file.h"

enum { WORKERS = 4, KINDS = 6, DESCRIPTORS = 20, MOST_STEPS = 200 };

struct worker {
    int fd; // -1: it has hung up, or never was
    char ticket[KVD_SECRET_TEXT];
    struct kvd_session session;
    bool bound, malformed; // malformed: it is to be hung up on
};

static struct kvd_daemon d;
static struct worker workers[WORKERS];
static int kinds[KINDS]; // descriptors to send
static kvd_accepted *accepted;
static uint64_t taken[KVD_SHARE_COUNT];

// -- what the fd socket uses of the daemon ------------------------------------------------------

int kvd_listen_unix(struct kvd_daemon *daemon, enum kvd_listen_for what, const char *path, int type,
                    kvd_accepted *accept, struct kvd_error *err)
{
    (void)daemon, (void)what, (void)path, (void)type, (void)err;
    accepted = accept;
    return KVD_OK;
}

void kvd_listen_close(struct kvd_daemon *daemon, enum kvd_listen_for what)
{
    (void)daemon, (void)what;
}

// Closing is put off, as threads do, until the loop has gone round.
static struct {
    int fd;
    bool discard;
    kvd_closed *done;
    void *arg;
} closing[4096];
static uint32_t n_closing;

static void put_off(int fd, bool discard, kvd_closed *done, void *arg)
{
    if (n_closing == KVD_LEN(closing))
        abort();
    closing[n_closing].fd = fd;
    closing[n_closing].discard = discard;
    closing[n_closing].done = done;
    closing[n_closing++].arg = arg;
}

void kvd_closer_close(int64_t whose, int fd, kvd_closed *done, void *arg)
{
    (void)whose;
    put_off(fd, false, done, arg);
}

void kvd_closer_hang_up(int64_t whose, int fd, kvd_closed *done, void *arg)
{
    (void)whose;
    shutdown(fd, SHUT_RDWR);
    put_off(fd, false, done, arg);
}

void kvd_closer_discard(int64_t whose, int fd, kvd_closed *done, void *arg)
{
    (void)whose;
    put_off(fd, true, done, arg);
}

uint32_t kvd_closer_waiting(int64_t whose)
{
    (void)whose;
    return n_closing;
}

// Whoever hung up without having read all is told first, and the message comes again.
static bool discard(int fd)
{
    char byte;
    return recv(fd, &byte, 1, MSG_DONTWAIT | MSG_TRUNC) >= 0 || errno == ECONNRESET;
}

static void close_all(void)
{
    for (uint32_t i = 0; i < n_closing; i++) {
        if (closing[i].discard ? !discard(closing[i].fd) : close(closing[i].fd) != 0)
            abort();
        if (closing[i].done)
            closing[i].done(closing[i].arg);
    }
    n_closing = 0;
}

void kvd_reclaim_begin(struct kvd_daemon *daemon, struct kvd_reclaim *r)
{
    (void)daemon;
    r->let_go(r);
    r->done(r);
}

void kvd_reclaim_mapping(struct kvd_daemon *daemon, void *data, uint64_t size)
{
    (void)daemon;
    if (munmap(data, size))
        abort();
}

struct kvd_user *kvd_user_ref(struct kvd_daemon *daemon, int64_t uid)
{
    (void)uid;
    return (struct kvd_user *)daemon;
}

int64_t kvd_user_uid(const struct kvd_user *user)
{
    (void)user;
    return 0;
}

void kvd_user_unref(struct kvd_user **user)
{
    *user = NULL;
}

int kvd_user_take(struct kvd_user *user, enum kvd_share share, uint64_t n, struct kvd_error *err)
{
    (void)user;
    if (share == KVD_SHARE_DESCRIPTORS && taken[share] == DESCRIPTORS)
        return kvd_fail(err, KVD_E_LIMIT, "too many");
    taken[share] += n;
    return KVD_OK;
}

uint64_t kvd_share_total(const struct kvd_daemon *daemon, enum kvd_share share)
{
    (void)daemon, (void)share;
    return UINT64_MAX;
}

void kvd_user_give(struct kvd_user *user, enum kvd_share share, uint64_t n)
{
    (void)user;
    if (taken[share] < n)
        abort();
    taken[share] -= n;
}

void kvd_share_possible(struct kvd_daemon *daemon, enum kvd_share share, uint64_t possible)
{
    (void)daemon, (void)share, (void)possible;
}

// -- the workers --------------------------------------------------------------------------------

static uint32_t count_descriptors(void)
{
    uint32_t n = 0;
    DIR *all = opendir("/proc/self/fd");
    while (all && readdir(all))
        n++;
    closedir(all);
    return n;
}

static int memory(off_t size, int seals)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || (size && posix_fallocate(fd, 0, size)) || fcntl(fd, F_ADD_SEALS, seals))
        abort();
    return fd;
}

static void prepare(void)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        abort();
    close(pair[1]);
    kinds[0] = memory(8192, F_SEAL_SHRINK);
    kinds[1] = memory(8192, 0);
    kinds[2] = memory(0, F_SEAL_SHRINK);
    kinds[3] = open("/dev/null", O_RDWR | O_CLOEXEC);
    kinds[4] = open("/", O_RDONLY | O_CLOEXEC);
    kinds[5] = pair[0];
    kvd_log_set_level(KVD_LOG_ERROR);
    uv_loop_t first; // libuv keeps a pipe of the first one for good
    if (uv_loop_init(&first) || uv_loop_close(&first))
        abort();
}

// Until nothing is let go of any more: what waits behind a message that is discarded comes after
// it.
static void go_round(void)
{
    for (uint32_t i = 0, closed = 0; i < 3 || closed; i++) {
        uv_run(&d.loop, UV_RUN_NOWAIT);
        closed = n_closing;
        close_all();
    }
}

static void ended(struct kvd_daemon *daemon, struct kvd_session *s, const char *why)
{
    struct worker *w = (struct worker *)((uint8_t *)s - offsetof(struct worker, session));
    struct kvd_connection *c = s->connection;
    if (daemon != &d || !why[0] || !w->bound)
        abort();
    w->bound = false;
    s->connection = NULL;
    kvd_connection_bind(c, NULL, NULL);
    kvd_connection_close(c);
}

static void connect_worker(struct worker *w)
{
    int pair[2];
    struct kvd_fd_hello hello;
    if (w->fd >= 0)
        return;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair))
        abort();
    accepted(&d, pair[0]);
    if (recv(pair[1], &hello, sizeof(hello), 0) != sizeof(hello) || hello.magic != KVD_FD_MAGIC ||
        hello.version != KVD_FD_VERSION || strlen(hello.ticket) != KVD_SECRET_TEXT - 1)
        abort();
    if (w->bound) // its predecessor is not noticed to be gone yet
        go_round();
    *w = (struct worker){.fd = pair[1]};
    memcpy(w->ticket, hello.ticket, sizeof(w->ticket));
    if (!kvd_fdsock_find(&d, w->ticket))
        abort();
}

static void send_message(struct worker *w, const void *data, size_t size, uint32_t n, uint8_t kind)
{
    union {
        struct cmsghdr head;
        uint8_t space[CMSG_SPACE(16 * sizeof(int))];
    } control = {0};
    struct iovec iov = {(void *)data, size};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    int fds[16];
    for (uint32_t i = 0; i < n; i++)
        fds[i] = kinds[(kind + i) % KINDS];
    if (n) {
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(n * sizeof(int));
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(&control.head), fds, n * sizeof(int));
    }
    if (w->fd < 0 || sendmsg(w->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        return;
    struct kvd_fd_message m = {0}; // data may lie anywhere
    memcpy(&m, data, KVD_MIN(size, sizeof(m)));
    // That there are several descriptors is not seen where their user has no share left.
    w->malformed |=
        size != sizeof(m) || n == 0 || m.magic != KVD_FD_MAGIC || m.version != KVD_FD_VERSION;
}

// RegisterBuffer: a descriptor by its key, mapped as a buffer if it is memory that can be.
static void register_buffer(struct worker *w, uint64_t key, uint64_t size)
{
    struct kvd_connection *c = w->ticket[0] ? kvd_fdsock_find(&d, w->ticket) : NULL;
    struct kvd_session *s = &w->session;
    struct kvd_buffer *b;
    struct kvd_error err = {0};
    struct stat st;
    if (!c)
        return;
    int fd = kvd_connection_take_fd(c, key, &(struct kvd_error){0});
    if (fd < 0)
        return;
    if (fstat(fd, &st) || !(fcntl(fd, F_GETFD) & FD_CLOEXEC))
        abort();
    struct kvd_foreign m = {.kind = KVD_MEMORY_MEMFD, .fd = fd, .size = size};
    int rc = kvd_session_add_buffer(&d, s, key, key % 3, &m, &b, &err);
    bool good = size > 0 && size <= (uint64_t)st.st_size && fcntl(fd, F_GET_SEALS) == F_SEAL_SHRINK;
    if ((rc == KVD_OK) != good || (rc && !err.text[0]))
        abort();
    kvd_connection_close_fd(c, fd);
    if (rc)
        return;
    b->data[size - 1]++; // it can be written
    kvd_session_drop_buffer(s, b);
}

static void bind_session(struct worker *w)
{
    struct kvd_connection *c = w->ticket[0] ? kvd_fdsock_find(&d, w->ticket) : NULL;
    if (!c || w->bound)
        return;
    w->bound = true;
    w->session.connection = c;
    kvd_connection_bind(c, &w->session, ended);
}

static void grant(struct worker *w, uint8_t kind)
{
    struct kvd_connection *c = w->ticket[0] ? kvd_fdsock_find(&d, w->ticket) : NULL;
    struct kvd_fd_grant g = {.magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION, .kind = 1};
    struct kvd_error err = {0};
    for (int i = 0; c && i < 20; i++) // it is not read: more than there is room for
        kvd_connection_send(c, &g, kind % 2 ? kinds[kind % KINDS] : -1, &err);
}

static void hang_up(struct worker *w)
{
    if (w->fd >= 0)
        close(w->fd);
    w->fd = -1;
}

static void step(const uint8_t **at, const uint8_t *end)
{
    uint8_t in[4] = {0};
    size_t n = KVD_MIN((size_t)(end - *at), sizeof(in));
    memcpy(in, *at, n);
    *at += n;
    struct worker *w = &workers[in[0] >> 3 & 3];
    struct kvd_fd_message m = {.magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION, .key = in[1] & 7};
    size_t rest = (size_t)(end - *at);
    switch (in[0] & 7) {
    case 0:
        connect_worker(w);
        break;
    case 1:
        send_message(w, &m, sizeof(m), 1, in[2]);
        break;
    case 2:
        rest = KVD_MIN(rest, (size_t)in[1]);
        send_message(w, *at, rest, in[2] & 15, in[3]);
        *at += rest;
        break;
    case 3:
        hang_up(w);
        break;
    case 4:
        register_buffer(w, in[1] & 7, in[2] | (uint64_t)in[3] << 8);
        break;
    case 5:
        bind_session(w);
        break;
    case 6:
        grant(w, in[1]);
        break;
    default:
        go_round();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct kvd_error err = {0};
    const uint8_t *at = data, *end = data + size;
    if (!kinds[0])
        prepare();
    uint32_t before = count_descriptors();
    memset(&d, 0, sizeof(d));
    d.config.n_listen = 1;
    d.config.max_buffer_bytes = UINT64_MAX;
    snprintf(d.config.listen[0], sizeof(d.config.listen[0]), "unix:/nowhere");
    uv_loop_init(&d.loop);
    if (kvd_part_fdsock.init(&d, &err))
        abort();
    for (int i = 0; i < WORKERS; i++)
        workers[i] = (struct worker){.fd = -1};
    for (int i = 0; i < MOST_STEPS && at < end; i++)
        step(&at, end);
    go_round();
    for (int i = 0; i < WORKERS; i++) {
        struct worker *w = &workers[i];
        bool there = w->ticket[0] && kvd_fdsock_find(&d, w->ticket);
        if (there && (w->malformed || w->fd < 0))
            abort(); // it should have been hung up on
        if (w->bound && !there)
            abort(); // its session should have ended
    }
    kvd_part_fdsock.end(&d);
    for (int i = 0; i < WORKERS; i++) {
        if (workers[i].bound)
            abort();
        hang_up(&workers[i]);
    }
    close_all();
    uv_run(&d.loop, UV_RUN_DEFAULT);
    if (uv_loop_close(&d.loop) || d.fdsock || count_descriptors() != before)
        abort();
    for (int i = 0; i < KVD_SHARE_COUNT; i++)
        if (taken[i])
            abort();
    return 0;
}
