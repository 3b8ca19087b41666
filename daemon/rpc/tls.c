#include "daemon/rpc/tls.h"

#include <sys/socket.h>
#include <utlist.h>

#include "daemon/core/log.h"
#include "daemon/core/tls_context.h"
#include "daemon/rpc/relay.h"
#include "daemon/rpc/rpc.h"

enum {
    HANDSHAKES = 64,  // at a time, of which one address may have half
    YIELDS_MS = 1000, // one that takes longer makes room for another
};

// Made and freed by the loop; in between the relay is its thread's. What is told is under the lock.
struct connection {
    struct kvd_relay relay;
    struct kvd_tls *tls;
    struct kvd_peer_address *address;
    SSL_CTX *context;
    uint64_t since_ms;
    bool shaking; // it is in the list of those
    bool counted; // by the address
    bool queued, ready, over;
    struct connection *previous, *next; // the loop's: those in their handshake, oldest first
    struct connection *before, *behind; // under the lock: on the way to one of the threads
};

struct kvd_tls {
    struct kvd_daemon *d;
    kvd_tls_accepted *accepted;
    struct kvd_peers *peers;
    struct connection *shaking;
    uint32_t n_shaking;
    uint64_t warned_ms;
    uv_thread_t thread;
    uv_loop_t loop;       // the thread's
    uv_async_t to_thread; // of that loop
    uv_async_t to_loop;
    uint32_t relays; // the thread's
    uv_mutex_t lock;
    struct connection *arrived; // for the thread
    struct connection *told;    // for the loop: those of which something is new
    bool stop;
    bool shut; // the loop's: no connection more is handed over
};

// -- the thread ---------------------------------------------------------------------------------

static void tell(struct connection *c, bool *what)
{
    struct kvd_tls *t = c->tls;
    uv_mutex_lock(&t->lock);
    *what = true;
    if (!c->queued)
        DL_APPEND2(t->told, c, before, behind);
    c->queued = true;
    uv_async_send(&t->to_loop);
    uv_mutex_unlock(&t->lock);
}

static void on_ready(struct kvd_relay *r)
{
    struct connection *c = (struct connection *)r;
    tell(c, &c->ready);
}

static void on_over(struct kvd_relay *r)
{
    struct connection *c = (struct connection *)r;
    tell(c, &c->over);
}

// Ends whatever polls: with the process only relays do.
static void end_relay(uv_handle_t *handle, void *arg)
{
    (void)arg;
    if (handle->type == UV_POLL)
        kvd_relay_end(handle->data);
}

static void on_to_thread(uv_async_t *async)
{
    struct kvd_tls *t = async->data;
    struct connection *c, *next;
    uv_mutex_lock(&t->lock);
    struct connection *arrived = KVD_TAKE(t->arrived);
    bool stop = t->stop;
    uv_mutex_unlock(&t->lock);
    DL_FOREACH_SAFE2(arrived, c, next, behind)
    kvd_relay_start(&c->relay, &t->loop, c->context);
    if (!stop)
        return;
    uv_walk(&t->loop, end_relay, NULL);
    uv_close((uv_handle_t *)async, NULL);
}

static void tls_thread(void *arg)
{
    struct kvd_tls *t = arg;
    uv_run(&t->loop, UV_RUN_DEFAULT); // until the last relay has ended after a stop
}

// -- the loop -----------------------------------------------------------------------------------

// It is in its handshake no more.
static void shaken(struct connection *c)
{
    if (!c->shaking)
        return;
    c->shaking = false;
    c->tls->n_shaking--;
    DL_DELETE2(c->tls->shaking, c, previous, next);
}

// Hangs up; the thread hears of it by that. What it takes counts no more.
static void cut(struct connection *c)
{
    shaken(c);
    shutdown(c->relay.fd, SHUT_RDWR);
    if (c->counted)
        kvd_peer_give(c->address);
    c->counted = false;
}

// Once a second, as many may come.
static void warn(struct kvd_tls *t, const char *address, const char *why)
{
    if (t->warned_ms && kvd_now_ms(t->d) - t->warned_ms < 1000)
        return;
    t->warned_ms = kvd_now_ms(t->d);
    kvd_warning("a connection over TLS was hung up on: %s address=%s", why, address);
}

static void connection_free(struct connection *c)
{
    shaken(c);
    if (c->relay.why)
        warn(c->tls, kvd_peer_text(c->address), c->relay.why);
    if (c->counted)
        kvd_peer_give(c->address);
    kvd_peer_unref(&c->address);
    if (c->relay.pair >= 0)
        close(c->relay.pair);
    close(c->relay.fd);
    SSL_CTX_free(c->context);
    free(c);
}

static void on_to_loop(uv_async_t *async)
{
    struct kvd_tls *t = async->data;
    for (;;) {
        uv_mutex_lock(&t->lock);
        struct connection *c = t->told;
        bool ready = c && c->ready, over = c && c->over;
        if (c) {
            DL_DELETE2(t->told, c, before, behind);
            c->queued = c->ready = false;
        }
        uv_mutex_unlock(&t->lock);
        if (!c)
            return;
        if (ready) {
            shaken(c);
            if (t->shut)
                close(c->relay.clear);
            else
                t->accepted(t->d, c->relay.clear, c->address, c->relay.name);
        }
        if (over)
            connection_free(c);
    }
}

// The oldest of those in their handshake (of an address, or of all) that may make room; NULL: none.
static struct connection *slow(const struct kvd_tls *t, const struct kvd_peer_address *of)
{
    struct connection *c;
    DL_FOREACH2(t->shaking, c, next)
    {
        if (kvd_now_ms(t->d) - c->since_ms < YIELDS_MS)
            return NULL; // and those behind it are younger
        if (!of || c->address == of)
            return c;
    }
    return NULL;
}

// One more handshake. False: there are too many.
static bool may_shake(struct kvd_tls *t, const struct kvd_peer_address *a)
{
    uint32_t own = 0;
    struct connection *c;
    DL_FOREACH2(t->shaking, c, next)
    own += c->address == a;
    bool crowded = own >= HANDSHAKES / 2;
    if (!crowded && t->n_shaking < HANDSHAKES)
        return true;
    c = slow(t, crowded ? a : NULL);
    if (c)
        cut(c);
    return c;
}

// Takes the connection's part of what its address, and all of them, may have.
static int take(struct kvd_tls *t, struct kvd_peer_address *a, struct kvd_error *err)
{
    if (!may_shake(t, a))
        return kvd_fail(err, KVD_E_LIMIT,
                        "%u connections are in their TLS handshake; %d are possible, half of them "
                        "of one address",
                        t->n_shaking, HANDSHAKES);
    int rc = kvd_peer_take(a, err);
    struct connection *c = rc ? slow(t, a) : NULL;
    if (!c)
        return rc;
    cut(c);
    return kvd_peer_take(a, err);
}

static void begin(struct kvd_tls *t, int fd, struct kvd_peer_address *a)
{
    struct connection *c = calloc(1, sizeof(*c));
    if (!c) {
        kvd_peer_give(a);
        kvd_peer_unref(&a);
        close(fd);
        return;
    }
    *c = (struct connection){
        .relay = {.fd = fd, .ready = on_ready, .over = on_over, .pair = -1},
        .tls = t,
        .address = a,
        .context = t->d->tls_context,
        .since_ms = kvd_now_ms(t->d),
        .shaking = true,
        .counted = true,
    };
    SSL_CTX_up_ref(c->context);
    DL_APPEND2(t->shaking, c, previous, next);
    t->n_shaking++;
    uv_mutex_lock(&t->lock);
    DL_APPEND2(t->arrived, c, before, behind);
    uv_async_send(&t->to_thread);
    uv_mutex_unlock(&t->lock);
}

void kvd_tls_accept(struct kvd_daemon *d, int fd)
{
    struct kvd_tls *t = d->tls;
    struct kvd_error err = {0};
    struct kvd_peer_address *a = kvd_peer_ref_of(t->peers, fd);
    if (a && take(t, a, &err) == KVD_OK) {
        begin(t, fd, a);
        return;
    }
    if (a)
        warn(t, kvd_peer_text(a), err.text);
    kvd_peer_unref(&a);
    close(fd);
}

void kvd_tls_tick(struct kvd_daemon *d)
{
    struct kvd_tls *t = d->tls;
    while (t && t->shaking && kvd_now_ms(d) - t->shaking->since_ms >= KVD_HELLO_TIMEOUT_MS) {
        warn(t, kvd_peer_text(t->shaking->address), "its handshake took too long");
        cut(t->shaking);
    }
}

void kvd_tls_shut(struct kvd_daemon *d)
{
    if (d->tls)
        d->tls->shut = true;
    while (d->tls && d->tls->shaking)
        cut(d->tls->shaking);
}

// -- start and end ------------------------------------------------------------------------------

static void on_closed(uv_handle_t *handle)
{
    free(handle->data);
}

static int start(struct kvd_tls *t, struct kvd_error *err)
{
    int rc = uv_loop_init(&t->loop);
    if (rc)
        return kvd_fail(err, KVD_E_INTERNAL, "cannot make a loop for TLS: %s", uv_strerror(rc));
    uv_async_init(&t->loop, &t->to_thread, on_to_thread);
    t->to_thread.data = t;
    rc = uv_thread_create(&t->thread, tls_thread, t);
    if (rc == 0)
        return KVD_OK;
    uv_close((uv_handle_t *)&t->to_thread, NULL);
    uv_run(&t->loop, UV_RUN_DEFAULT);
    uv_loop_close(&t->loop);
    return kvd_fail(err, KVD_E_LOST, "cannot start a thread: %s", uv_strerror(rc));
}

int kvd_tls_init(struct kvd_daemon *d, kvd_tls_accepted *accepted, struct kvd_error *err)
{
    struct kvd_tls_problems problems;
    struct kvd_tls *t = calloc(1, sizeof(*t));
    if (!t)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    t->d = d;
    t->accepted = accepted;
    d->tls_context = kvd_tls_context(&d->config, &problems);
    if (!d->tls_context)
        *err = problems.cert.code  ? problems.cert
               : problems.key.code ? problems.key
                                   : problems.client_ca;
    t->peers = d->tls_context ? kvd_peers_new(d) : NULL;
    uv_mutex_init(&t->lock);
    if (!t->peers || start(t, err)) {
        SSL_CTX_free(d->tls_context);
        d->tls_context = NULL;
        kvd_peers_drop(&t->peers);
        uv_mutex_destroy(&t->lock);
        free(t);
        return err->code ? err->code : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    uv_async_init(&d->loop, &t->to_loop, on_to_loop);
    t->to_loop.data = t;
    d->tls = t;
    return KVD_OK;
}

void kvd_tls_deinit(struct kvd_daemon *d)
{
    struct kvd_tls *t = d->tls;
    if (!t)
        return;
    kvd_tls_shut(d);
    d->tls = NULL;
    uv_mutex_lock(&t->lock);
    t->stop = true;
    uv_async_send(&t->to_thread);
    uv_mutex_unlock(&t->lock);
    uv_thread_join(&t->thread);
    on_to_loop(&t->to_loop);
    uv_loop_close(&t->loop);
    SSL_CTX_free(d->tls_context);
    d->tls_context = NULL;
    kvd_peers_drop(&t->peers);
    uv_mutex_destroy(&t->lock);
    uv_close((uv_handle_t *)&t->to_loop, on_closed);
}
