#include "daemon/links.h"

#include <errno.h>
#include <fcntl.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <utlist.h>

#include "daemon/listen.h"
#include "daemon/rpc_internal.h"

enum {
    TICK_MS = 1000,
    SILENT_MS = 30000,         // a link on which no call has come by then is closed
    YIELDS_MS = 1000,          // one that is silent for so long makes room when there is none
    QUICK_US = 20000,          // a call given up within that was not worth sending
    QUICK_MAX = 64,            // of them on one link in a second
    BANNED_MS = 10000,         // for a process that was cut off
    BANNED = 32,               // of them that are remembered
    GUESTS = 16,               // connections beyond a limit, whose calls are told of it
    GUEST_MS = 1000,           // how long they may stay
    OWN_DESCRIPTORS = 96,      // of kvd itself, besides extents: files, listeners, HTTP, stores
    CONNECTION_DESCRIPTORS = 3 // gRPC's and ours of a link; a worker's fd socket and one on its way
};

struct kvd_link {
    struct kvd_daemon *d;
    struct kvd_user *user;
    int number;  // of gRPC's descriptor, which names the link in calls
    int control; // ours, for the same socket
    int64_t pid, uid;
    uint64_t since_ms, window_ms;
    uint64_t calls, reply_bytes;
    uint32_t quick; // calls given up in this second
    uint32_t refs;  // one is the table's, one the poll handle's
    bool closed;
    struct kvd_error *refusal; // of a guest: what its calls are told
    uv_poll_t poll;
    struct kvd_link *previous, *next;
};

struct kvd_links {
    grpc_server_credentials *plain;
    struct kvd_link *
        *by_number; // the latest link of each descriptor number, also when it is closed
    uint32_t cap, count, guests;
    struct kvd_link *oldest; // open ones, by age
    struct {
        int64_t pid;
        uint64_t until_ms;
    } banned[BANNED];
    uint32_t next_banned;
    uv_timer_t timer;
};

void kvd_link_unref(struct kvd_link **link)
{
    struct kvd_link *l = KVD_TAKE(*link);
    if (!l || --l->refs)
        return;
    kvd_user_unref(&l->user);
    free(l->refusal);
    free(l);
}

static void on_poll_closed(uv_handle_t *handle)
{
    struct kvd_link *l = handle->data;
    kvd_link_unref(&l);
}

// The connection is over, or is to be: gRPC lets go of it by itself then.
static void forget(struct kvd_link *l)
{
    if (l->closed)
        return;
    l->closed = true;
    l->d->links->count--;
    DL_DELETE2(l->d->links->oldest, l, previous, next);
    if (l->refusal)
        l->d->links->guests--;
    else
        kvd_user_give(l->user, KVD_SHARE_CONNECTIONS, 1);
    uv_poll_stop(&l->poll);
    close(l->control);
    uv_close((uv_handle_t *)&l->poll, on_poll_closed);
}

void kvd_link_cut(struct kvd_link *l, const char *why)
{
    char waste[4096];
    if (l->closed)
        return;
    if (why)
        kvd_warning("connection cut off: %s pid=%lld uid=%lld calls=%llu", why, (long long)l->pid,
                    (long long)l->uid, (unsigned long long)l->calls);
    shutdown(l->control, SHUT_RDWR);
    while (recv(l->control, waste, sizeof(waste), MSG_DONTWAIT | MSG_TRUNC) > 0)
        continue;
    forget(l);
}

static void on_hung_up(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    forget(poll->data);
}

// -- who is taken in ----------------------------------------------------------------------------

static bool is_banned(const struct kvd_daemon *d, int64_t pid)
{
    for (uint32_t i = 0; i < BANNED; i++)
        if (pid > 0 && d->links->banned[i].pid == pid &&
            d->links->banned[i].until_ms > kvd_now_ms(d))
            return true;
    return false;
}

// Makes room among the user's links on which no call has ever come.
static bool make_room(struct kvd_daemon *d, const struct kvd_user *user)
{
    for (struct kvd_link *l = d->links->oldest; l; l = l->next) {
        if (kvd_now_ms(d) - l->since_ms < YIELDS_MS)
            return false; // and those behind it are younger
        if (l->user == user && l->calls == 0 && !l->refusal) {
            kvd_link_cut(l, NULL);
            return true;
        }
    }
    return false;
}

static bool grow(struct kvd_links *all, int number)
{
    if ((uint32_t)number < all->cap)
        return true;
    uint32_t cap = KVD_MAX(2 * all->cap, (uint32_t)number + 64);
    struct kvd_link **grown = realloc(all->by_number, cap * sizeof(*grown));
    if (!grown)
        return false;
    memset(grown + all->cap, 0, (cap - all->cap) * sizeof(*grown));
    all->by_number = grown;
    all->cap = cap;
    return true;
}

static void on_tick(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_link *l, *next;
    DL_FOREACH_SAFE2(d->links->oldest, l, next, next)
    {
        uint64_t age = kvd_now_ms(d) - l->since_ms;
        if ((l->calls == 0 && age >= SILENT_MS) || (l->refusal && age >= GUEST_MS))
            kvd_link_cut(l, NULL);
    }
    kvd_rpc_tick(d);
}

// Makes the record; the descriptors stay the caller's on failure.
static struct kvd_link *link_new(struct kvd_daemon *d, int fd, const struct ucred *peer,
                                 struct kvd_user *user)
{
    struct kvd_links *all = d->links;
    struct kvd_link *l = calloc(1, sizeof(*l));
    int control = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (!l || control < 0 || !grow(all, fd) || uv_poll_init(&d->loop, &l->poll, control)) {
        if (control >= 0)
            close(control);
        free(l);
        return NULL;
    }
    *l = (struct kvd_link){.d = d,
                           .user = user,
                           .number = fd,
                           .control = control,
                           .pid = peer->pid,
                           .uid = peer->uid,
                           .since_ms = kvd_now_ms(d),
                           .refs = 2,
                           .poll = l->poll};
    l->poll.data = l;
    uv_poll_start(&l->poll, UV_DISCONNECT, on_hung_up);
    kvd_link_unref(&all->by_number[fd]);
    all->by_number[fd] = l;
    DL_APPEND2(all->oldest, l, previous, next);
    all->count++;
    return l;
}

// A connection that cannot stay. Hanging up at once would tell its client nothing, so a few may
// stay for a moment, in which calls are answered with the reason.
static struct kvd_link *receive_guest(struct kvd_daemon *d, int fd, const struct ucred *peer,
                                      struct kvd_user *user, const struct kvd_error *why)
{
    kvd_debug("connection refused: %s", why->text);
    struct kvd_error *refusal = d->links->guests < GUESTS ? malloc(sizeof(*refusal)) : NULL;
    struct kvd_link *l = refusal ? link_new(d, fd, peer, user) : NULL;
    if (!l) {
        free(refusal);
        return NULL;
    }
    *refusal = *why;
    l->refusal = refusal;
    d->links->guests++;
    return l;
}

static struct kvd_link *receive(struct kvd_daemon *d, int fd, const struct ucred *peer)
{
    struct kvd_error err = {0};
    struct kvd_user *user = kvd_user_ref(d, (int64_t)peer->uid);
    if (!user)
        return NULL;
    int rc = kvd_user_take(user, KVD_SHARE_CONNECTIONS, 1, &err);
    if (rc && make_room(d, user))
        rc = kvd_user_take(user, KVD_SHARE_CONNECTIONS, 1, &err);
    struct kvd_link *l = rc ? receive_guest(d, fd, peer, user, &err) : link_new(d, fd, peer, user);
    if (!l) {
        if (rc == KVD_OK)
            kvd_user_give(user, KVD_SHARE_CONNECTIONS, 1);
        kvd_user_unref(&user);
    }
    return l;
}

void kvd_links_accept(struct kvd_daemon *d, int fd)
{
    struct ucred peer = {.pid = 0, .uid = (uid_t)KVD_USER_UNKNOWN};
    int domain = 0;
    socklen_t len = sizeof(domain), peer_len = sizeof(peer);
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len);
    bool known =
        domain != AF_UNIX || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_len) == 0;
    if (known && !is_banned(d, peer.pid) && receive(d, fd, &peer))
        grpc_server_add_channel_from_fd(d->rpc->server, fd, d->links->plain);
    else
        close(fd);
}

// -- calls --------------------------------------------------------------------------------------

struct kvd_link *kvd_link_of(struct kvd_daemon *d, grpc_call *call)
{
    char *peer = grpc_call_get_peer(call); // "fd:23", as gRPC names what it was given
    struct kvd_link *l = NULL;
    if (peer && strncmp(peer, "fd:", 3) == 0) {
        unsigned long number = strtoul(peer + 3, NULL, 10);
        l = number < d->links->cap ? d->links->by_number[number] : NULL;
    }
    gpr_free(peer);
    if (l) {
        l->refs++;
        l->calls++;
    }
    return l;
}

const struct kvd_error *kvd_link_refusal(const struct kvd_link *l)
{
    return l ? l->refusal : NULL;
}

int64_t kvd_link_uid(const struct kvd_link *l)
{
    return l->uid;
}

int kvd_link_take(struct kvd_link *l, uint64_t n, struct kvd_error *err)
{
    uint64_t most = l ? kvd_share_total(l->d, KVD_SHARE_REPLY_BYTES) / 4 : 0;
    unsigned long long wanted = l ? l->reply_bytes + n : 0;
    if (!l)
        return KVD_OK;
    if (n > most || l->reply_bytes > most - n)
        return kvd_fail(
            err, KVD_E_LIMIT,
            "this connection has %llu bytes of replies that are made or unread, %llu are "
            "possible; read them, or raise max-reply-bytes",
            wanted, (unsigned long long)most);
    l->reply_bytes += n;
    return KVD_OK;
}

void kvd_link_give(struct kvd_link *l, uint64_t n)
{
    if (l)
        l->reply_bytes -= n;
}

// The whole process goes: its other connections do the same in a moment, if they do not already.
static void ban(struct kvd_link *l)
{
    struct kvd_daemon *d = l->d;
    struct kvd_links *all = d->links;
    struct kvd_link *other, *next;
    int64_t pid = l->pid;
    if (pid <= 0) {
        kvd_link_cut(l, "it gives up calls as fast as it sends them");
        return;
    }
    all->banned[all->next_banned].pid = pid;
    all->banned[all->next_banned].until_ms = kvd_now_ms(d) + BANNED_MS;
    all->next_banned = (all->next_banned + 1) % BANNED;
    kvd_link_cut(l, "its process gives up calls as fast as it sends them");
    DL_FOREACH_SAFE2(all->oldest, other, next, next)
    {
        if (other->pid == pid)
            kvd_link_cut(other, NULL);
    }
}

void kvd_link_cancelled(struct kvd_link *l, uint64_t us)
{
    if (!l || l->closed || us > QUICK_US)
        return;
    if (kvd_now_ms(l->d) - l->window_ms > 1000) {
        l->window_ms = kvd_now_ms(l->d);
        l->quick = 0;
    }
    if (++l->quick > QUICK_MAX)
        ban(l);
}

// -- start and end ------------------------------------------------------------------------------

// So many connections that descriptors are never short because of them.
static uint64_t connections_possible(const struct kvd_daemon *d)
{
    struct rlimit r = {0};
    uint64_t own = OWN_DESCRIPTORS + d->config.pool_size / d->config.extent_size;
    if (getrlimit(RLIMIT_NOFILE, &r) || r.rlim_cur == RLIM_INFINITY)
        return d->config.max_connections;
    uint64_t possible = r.rlim_cur > own ? (r.rlim_cur - own) / CONNECTION_DESCRIPTORS : 0;
    possible = KVD_MAX(possible, (uint64_t)8); // the reserve sees to it that this is no disaster
    if (possible < d->config.max_connections)
        kvd_warning("at most %llu connections, as the limit of open files is %llu; max-connections "
                    "is %u, which wants %llu",
                    (unsigned long long)possible, (unsigned long long)r.rlim_cur,
                    d->config.max_connections,
                    (unsigned long long)d->config.max_connections * CONNECTION_DESCRIPTORS + own);
    return KVD_MIN(possible, (uint64_t)d->config.max_connections);
}

int kvd_links_init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->links = calloc(1, sizeof(*d->links));
    if (!d->links)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->links->plain = grpc_insecure_server_credentials_create();
    kvd_share_possible(d, KVD_SHARE_CONNECTIONS, connections_possible(d));
    kvd_share_possible(d, KVD_SHARE_DESCRIPTORS, kvd_share_total(d, KVD_SHARE_CONNECTIONS));
    uv_timer_init(&d->loop, &d->links->timer);
    d->links->timer.data = d;
    uv_timer_start(&d->links->timer, on_tick, TICK_MS, TICK_MS);
    return KVD_OK;
}

static void free_links(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(d->links->by_number);
    free(d->links);
    d->links = NULL;
}

void kvd_links_deinit(struct kvd_daemon *d)
{
    struct kvd_links *all = d->links;
    if (!all)
        return;
    while (all->oldest)
        kvd_link_cut(all->oldest, NULL);
    for (uint32_t i = 0; i < all->cap; i++)
        kvd_link_unref(&all->by_number[i]);
    grpc_server_credentials_release(all->plain);
    uv_close((uv_handle_t *)&all->timer, free_links);
}

uint32_t kvd_links_count(const struct kvd_daemon *d)
{
    return d->links ? d->links->count : 0;
}

bool kvd_links_open(const struct kvd_daemon *d)
{
    return kvd_share_used(d, KVD_SHARE_CONNECTIONS) < kvd_share_total(d, KVD_SHARE_CONNECTIONS);
}
