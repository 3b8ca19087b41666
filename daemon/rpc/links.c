#include "daemon/rpc/links.h"

#include <errno.h>
#include <fcntl.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <utlist.h>

#include "daemon/core/closer.h"
#include "daemon/rpc/listen.h"
#include "daemon/rpc/meter.h"
#include "daemon/rpc/rpc_internal.h"

enum {
    TICK_MS = 1000,
    SILENT_MS = 30000,          // a link on which no call has come by then is closed
    YIELDS_MS = 1000,           // one that is silent for so long makes room when there is none
    WASTE_MAX = 100,            // connections without a call by one process in a second
    CUT_EACH_MS = 10,           // of the links of such a process
    BANNED_MS = 10000,          // for a process that was cut off
    CULPRITS = 64,              // processes of which something is noted
    GUESTS = 16,                // connections beyond a limit, whose calls are told of it
    GUEST_MS = 1000,            // how long they may stay
    OWN_DESCRIPTORS = 96,       // of kvd itself, besides extents: files, listeners, HTTP, stores
    CONNECTION_DESCRIPTORS = 3, // gRPC's and ours of a link; a worker's fd socket or one on its way
    TLS_DESCRIPTORS = 4,        // gRPC's and ours, the client's socket and the pair's other end
};

struct kvd_link {
    struct kvd_daemon *d;
    struct kvd_user *user;
    int number;  // of gRPC's descriptor, which names the link in calls
    int control; // ours, for the same socket
    int64_t pid, uid;
    struct kvd_peer_address *address; // NULL: it did not come over TLS
    char name[KVD_PEER_NAME];         // of its certificate
    uint64_t since_ms;
    uint64_t calls, reply_bytes;
    uint32_t in_flight;        // calls that the daemon has
    struct kvd_meter meter;    // read by gRPC's threads
    uint32_t refs;             // one is the table's, one the poll handle's
    bool closed, doomed;       // doomed: it is cut soon
    struct kvd_error *refusal; // of a guest: what its calls are told
    uv_poll_t poll;
    struct kvd_link *previous, *next;
};

struct culprit {
    int64_t pid;
    uint64_t window_ms; // in which these are counted:
    uint32_t wasted;    // connections without a call
    uint64_t until_ms;  // its connections are refused
};

struct kvd_links {
    grpc_server_credentials *insecure;
    struct kvd_link *
        *by_number; // the latest link of each descriptor number, also when it is closed
    uint32_t cap, count, guests;
    struct kvd_link *oldest; // open ones, by age
    struct culprit culprits[CULPRITS];
    uv_timer_t timer, turn_timer, cut_timer;
    uv_async_t parked;
    uint32_t handles;
};

void kvd_link_unref(struct kvd_link **link)
{
    struct kvd_link *l = KVD_TAKE(*link);
    if (!l || --l->refs)
        return;
    kvd_turn_release(&l->meter.turn);
    kvd_user_unref(&l->user);
    kvd_peer_unref(&l->address);
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
    if (l->meter.rights) // there may be some in what gRPC has not read
        kvd_closer_hang_up(l->uid, l->control, NULL, NULL);
    else
        close(l->control);
    uv_close((uv_handle_t *)&l->poll, on_poll_closed);
}

static void warn(const struct kvd_link *l, const char *why)
{
    kvd_warning("connection cut off: %s pid=%" PRId64 " uid=%" PRId64 " calls=%" PRIu64
                " address=%s",
                why, l->pid, l->uid, l->calls, l->address ? kvd_peer_text(l->address) : "-");
}

void kvd_link_cut(struct kvd_link *l, const char *why)
{
    char waste[4096];
    if (l->closed)
        return;
    if (why)
        warn(l, why);
    kvd_turn_release(&l->meter.turn);
    shutdown(l->control, SHUT_RDWR);
    while (!l->meter.rights && recv(l->control, waste, sizeof(waste), MSG_DONTWAIT | MSG_TRUNC) > 0)
        continue;
    forget(l);
}

// -- who wastes our time ------------------------------------------------------------------------

// What is noted of a process. NULL: nothing is, and `make` is false. The place of whoever was noted
// longest ago is taken; those who are banned come last.
static struct culprit *culprit_of(struct kvd_daemon *d, int64_t pid, bool make)
{
    struct culprit *oldest = &d->links->culprits[0];
    for (uint32_t i = 0; i < CULPRITS; i++) {
        struct culprit *c = &d->links->culprits[i];
        if (c->pid == pid)
            return c;
        if (KVD_MAX(c->window_ms, c->until_ms) < KVD_MAX(oldest->window_ms, oldest->until_ms))
            oldest = c;
    }
    if (make)
        *oldest = (struct culprit){.pid = pid};
    return make ? oldest : NULL;
}

static bool is_banned(struct kvd_daemon *d, int64_t pid)
{
    const struct culprit *c = pid > 0 ? culprit_of(d, pid, false) : NULL;
    return c && c->until_ms > kvd_now_ms(d);
}

// Hundreds of calls may end with a link, which is work for gRPC while others wait: so one at a
// time.
static void on_cut(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_link *l;
    DL_SEARCH_SCALAR2(d->links->oldest, l, doomed, true, next);
    if (l)
        kvd_link_cut(l, NULL);
    else
        uv_timer_stop(timer);
}

// The whole process goes: its other connections do the same in a moment, if they do not already.
static void ban(struct kvd_link *culprit, const char *why)
{
    struct kvd_daemon *d = culprit->d;
    struct kvd_link *l;
    warn(culprit, why);
    if (culprit->pid <= 0)
        return;
    culprit_of(d, culprit->pid, true)->until_ms = kvd_now_ms(d) + BANNED_MS;
    DL_FOREACH2(d->links->oldest, l, next)
    {
        if (l->pid != culprit->pid)
            continue;
        l->doomed = true;
        kvd_turn_hold(&l->meter.turn);
    }
    uv_timer_start(&d->links->cut_timer, on_cut, CUT_EACH_MS, CUT_EACH_MS);
}

// Notes a connection that was given up before its first call.
static void note_waste(struct kvd_link *l)
{
    struct culprit *c = l->pid > 0 ? culprit_of(l->d, l->pid, true) : NULL;
    uint64_t now = kvd_now_ms(l->d);
    if (!c || c->until_ms > now)
        return;
    if (now - c->window_ms > 1000) {
        c->window_ms = now;
        c->wasted = 0;
    }
    if (++c->wasted > WASTE_MAX)
        ban(l, "its process connects for nothing, again and again");
}

static void on_hung_up(uv_poll_t *poll, int status, int events)
{
    struct kvd_link *l = poll->data; // the poll handle has a reference for a while yet
    const char *verdict = atomic_load(&l->meter.verdict);
    bool wasted = l->calls == 0 && kvd_now_ms(l->d) - l->since_ms < YIELDS_MS;
    (void)status;
    (void)events;
    forget(l);
    if (verdict)
        ban(l, verdict);
    else if (wasted)
        note_waste(l);
}

// -- who is taken in ----------------------------------------------------------------------------

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
    int64_t total = 0;
    DL_FOREACH_SAFE2(d->links->oldest, l, next, next)
    {
        uint64_t age = kvd_now_ms(d) - l->since_ms;
        total += kvd_meter_calls(&l->meter);
        if ((l->calls == 0 && age >= SILENT_MS) || (l->refusal && age >= GUEST_MS))
            kvd_link_cut(l, NULL);
    }
    kvd_meter_total(total);
}

// Makes the record; the descriptors stay the caller's on failure.
static struct kvd_link *link_new(struct kvd_daemon *d, int fd, const struct ucred *peer,
                                 struct kvd_user *user)
{
    int may = 0; // on a kernel that does not know the option all may send descriptors
    socklen_t len = sizeof(may);
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
    l->meter.rights = l->uid != KVD_USER_UNKNOWN &&
                      (getsockopt(fd, SOL_SOCKET, KVD_SO_PASSRIGHTS, &may, &len) || may);
    l->poll.data = l;
    uv_poll_start(&l->poll, UV_DISCONNECT, on_hung_up);
    kvd_link_unref(&all->by_number[fd]);
    all->by_number[fd] = l;
    kvd_meter_start(&l->meter, fd, d->config.max_calls);
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
        grpc_server_add_channel_from_fd(d->rpc->server, fd, d->links->insecure);
    else if (domain == AF_UNIX)
        kvd_closer_hang_up(peer.uid, fd, NULL, NULL);
    else
        close(fd);
}

void kvd_links_accept_tls(struct kvd_daemon *d, int fd, struct kvd_peer_address *address,
                          const char *name)
{
    struct ucred peer = {.pid = 0, .uid = (uid_t)KVD_USER_UNKNOWN};
    struct kvd_link *l = receive(d, fd, &peer);
    if (!l) {
        close(fd);
        return;
    }
    l->address = kvd_peer_ref(address);
    snprintf(l->name, sizeof(l->name), "%s", name);
    grpc_server_add_channel_from_fd(d->rpc->server, fd, d->links->insecure);
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

int64_t kvd_link_uid(const struct kvd_link *l)
{
    return l->uid;
}

const char *kvd_link_name(const struct kvd_link *l)
{
    return l->name;
}

int kvd_link_take(struct kvd_link *l, uint64_t n, struct kvd_error *err)
{
    uint64_t most = kvd_share_total(l->d, KVD_SHARE_REPLY_BYTES) / 4, wanted = l->reply_bytes + n;
    if (n > most || l->reply_bytes > most - n)
        return kvd_fail(err, KVD_E_LIMIT,
                        "this connection has %" PRIu64
                        " bytes of replies that are made or unread, %" PRIu64 " are "
                        "possible; read them, or raise max-reply-bytes",
                        wanted, most);
    l->reply_bytes += n;
    return KVD_OK;
}

void kvd_link_give(struct kvd_link *l, uint64_t n)
{
    if (l)
        l->reply_bytes -= n;
}

int kvd_link_begin_call(struct kvd_link *l, struct kvd_error *err)
{
    if (l->refusal) {
        *err = *l->refusal;
        return err->code;
    }
    if (l->in_flight >= 2 * KVD_LINK_CALLS)
        kvd_link_cut(l, "it has more calls in flight than HTTP/2 allows it");
    if (l->in_flight >= KVD_LINK_CALLS)
        return kvd_fail(err, KVD_E_LIMIT, "this connection has %u calls in flight, %d are possible",
                        l->in_flight, KVD_LINK_CALLS);
    int rc = kvd_peer_begin_call(l->address, err);
    l->in_flight += rc == KVD_OK;
    return rc;
}

void kvd_link_settle_call(struct kvd_link *l)
{
    kvd_turn_settle_call(&l->meter.turn);
}

void kvd_link_end_call(struct kvd_link *l, bool counted)
{
    if (!l)
        return;
    l->in_flight -= counted;
    if (counted)
        kvd_peer_end_call(l->address);
    kvd_meter_end_call(&l->meter);
}

// -- turns --------------------------------------------------------------------------------------

static void on_late(uv_timer_t *timer);

void kvd_links_turn(struct kvd_daemon *d)
{
    uint32_t ms = kvd_turns_next(uv_hrtime());
    if (ms)
        uv_timer_start(&d->links->turn_timer, on_late, ms, 0);
    else
        uv_timer_stop(&d->links->turn_timer);
}

static void on_late(uv_timer_t *timer)
{
    kvd_links_turn(timer->data);
}

static void on_parked(uv_async_t *async)
{
    kvd_links_turn(async->data);
}

static void wake(void *async)
{
    uv_async_send(async);
}

// -- start and end ------------------------------------------------------------------------------

// So many connections that descriptors are never short because of them.
static uint64_t connections_possible(const struct kvd_daemon *d)
{
    struct rlimit r = {0};
    uint64_t own = OWN_DESCRIPTORS + d->config.pool_size / d->config.extent_size;
    uint64_t each = d->config.tls_cert[0] ? TLS_DESCRIPTORS : CONNECTION_DESCRIPTORS;
    if (getrlimit(RLIMIT_NOFILE, &r) || r.rlim_cur == RLIM_INFINITY)
        return d->config.max_connections;
    uint64_t possible = r.rlim_cur > own ? (r.rlim_cur - own) / each : 0;
    possible = KVD_MAX(possible, (uint64_t)8); // the reserve sees to it that this is no disaster
    if (possible < d->config.max_connections)
        kvd_warning("at most %" PRIu64 " connections, as the limit of open files is %" PRIu64
                    "; max-connections is %u, which wants %" PRIu64,
                    possible, r.rlim_cur, d->config.max_connections,
                    (uint64_t)d->config.max_connections * each + own);
    return KVD_MIN(possible, (uint64_t)d->config.max_connections);
}

int kvd_links_init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->links = calloc(1, sizeof(*d->links));
    if (!d->links)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->links->insecure = grpc_insecure_server_credentials_create();
    kvd_share_possible(d, KVD_SHARE_CONNECTIONS, connections_possible(d));
    kvd_share_possible(d, KVD_SHARE_DESCRIPTORS, kvd_share_total(d, KVD_SHARE_CONNECTIONS));
    uv_timer_init(&d->loop, &d->links->timer);
    uv_timer_init(&d->loop, &d->links->turn_timer);
    uv_timer_init(&d->loop, &d->links->cut_timer);
    d->links->cut_timer.data = d;
    uv_async_init(&d->loop, &d->links->parked, on_parked);
    d->links->timer.data = d->links->turn_timer.data = d->links->parked.data = d;
    d->links->handles = 4;
    kvd_turns_init(wake, &d->links->parked);
    uv_timer_start(&d->links->timer, on_tick, TICK_MS, TICK_MS);
    return KVD_OK;
}

static void free_links(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    if (--d->links->handles)
        return;
    free(d->links->by_number);
    free(d->links);
    d->links = NULL;
}

void kvd_links_cut(struct kvd_daemon *d)
{
    while (d->links->oldest)
        kvd_link_cut(d->links->oldest, NULL);
}

void kvd_links_deinit(struct kvd_daemon *d)
{
    struct kvd_links *all = d->links;
    if (!all)
        return;
    kvd_turns_init(NULL, NULL);
    kvd_links_cut(d);
    for (uint32_t i = 0; i < all->cap; i++)
        kvd_meter_forget((int)i);
    for (uint32_t i = 0; i < all->cap; i++)
        kvd_link_unref(&all->by_number[i]);
    grpc_server_credentials_release(all->insecure);
    uv_close((uv_handle_t *)&all->timer, free_links);
    uv_close((uv_handle_t *)&all->turn_timer, free_links);
    uv_close((uv_handle_t *)&all->cut_timer, free_links);
    uv_close((uv_handle_t *)&all->parked, free_links);
}

uint32_t kvd_links_count(const struct kvd_daemon *d)
{
    return d->links ? d->links->count : 0;
}

bool kvd_links_open(const struct kvd_daemon *d)
{
    return kvd_share_used(d, KVD_SHARE_CONNECTIONS) < kvd_share_total(d, KVD_SHARE_CONNECTIONS);
}
