#include "daemon/service/evict.h"

#include <utlist.h>
#include <uv.h>

#include "admin.pb-c.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/events.h"
#include "daemon/service/handlers.h"
#include "daemon/session/leases.h"
#include "kvd.pb-c.h"
#include "pool/blocks.h"

enum {
    PIECE_NS = 1000000, // then others have their turn
    SEQUENCES = 32,     // between looks at the clock,
    ENTRIES = 1024,     // of an index
    LEASES = 16,        // of prefixes
};

// An operator's call that is not answered yet.
struct eviction {
    struct kvd_call *call;
    struct kvd_pool_evicted sum;
    bool drops;                  // prefixes
    uint32_t ns;                 // of this namespace, which it holds,
    struct kvd_prefix_cursor at; // and has come to here
    bool one, looks;             // or of it this block; looks: at leases, and has begun to
    struct kvd_prefix_key key;
    struct eviction *prev, *next;
};

struct kvd_evict {
    uv_idle_t idle; // runs while there are some
    struct eviction *evictions;
};

// One published sequence by name. KVD_E_PRECONDITION when it is in use.
static int evict_named(struct kvd_daemon *d, uint32_t ns, const char *name, uint64_t *freed,
                       struct kvd_error *err)
{
    struct kvd_pool_seq_info info;
    struct kvd_pool_info before, after;
    uint64_t seq = kvd_pool_lookup(d->pool, ns, name);
    if (!seq || kvd_pool_seq_info(d->pool, seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "nothing is published as '%.128s' there", name);
    if (info.holders || info.pins)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "'%s' is held by %u sessions; live sequences are never evicted", name,
                        info.holders);
    kvd_pool_info(d->pool, &before);
    kvd_pool_unpublish(d->pool, seq);
    kvd_pool_info(d->pool, &after);
    *freed = before.used - after.used;
    return KVD_OK;
}

static void answer_drop(const struct eviction *v)
{
    struct kvd_daemon *d = v->call->d;
    struct kvd_pool_namespace_info info;
    Kvd__V1__DropPrefixReply r = KVD__V1__DROP_PREFIX_REPLY__INIT;
    r.blocks = v->sum.blocks;
    if (!v->one)
        kvd_event_send(d, v->ns, KVD__V1__EVENT__KIND__BLOCKS_CLEARED, 0, "");
    kvd_pool_namespace_info(d->pool, v->ns, &info);
    kvd_notice("prefixes dropped by operator namespace=%s blocks=%" PRIu64, info.name, r.blocks);
    kvd_pool_namespace_release(d->pool, v->ns);
    kvd_call_reply(v->call, &r);
}

static void answer_evict(const struct eviction *v)
{
    Kvd__V1__EvictReply r = KVD__V1__EVICT_REPLY__INIT;
    r.sequences = (uint32_t)v->sum.sequences;
    r.blocks = v->sum.blocks;
    r.bytes = v->sum.bytes;
    kvd_notice("evicted by operator sequences=%u blocks=%" PRIu64 " bytes=%" PRIu64, r.sequences,
               r.blocks, r.bytes);
    kvd_call_reply(v->call, &r);
}

static void finish(struct eviction *v)
{
    v->call->on_cancelled = NULL;
    DL_DELETE(v->call->d->evict->evictions, v);
    if (v->drops)
        answer_drop(v);
    else
        answer_evict(v);
    free(v);
}

// What was evicted by then stays so.
static void on_cancelled(struct kvd_call *call)
{
    finish(call->work);
}

// True: there is nothing more to evict.
static bool evict_on(struct kvd_daemon *d, struct eviction *v)
{
    const Kvd__V1__EvictRequest *req = (const Kvd__V1__EvictRequest *)v->call->request;
    struct kvd_pool_evicted some;
    uint64_t begin = uv_hrtime();
    uint32_t ns = KVD_POOL_NONE, n;
    if (req->namespace_name[0] &&
        (ns = kvd_pool_namespace_find(d->pool, req->namespace_name)) == KVD_POOL_NONE)
        return true; // it was empty, and has gone meanwhile
    do {
        n = kvd_pool_evict(d->pool, ns, req->bytes ? req->bytes - v->sum.bytes : 0, SEQUENCES,
                           &some);
        v->sum.sequences += some.sequences;
        v->sum.blocks += some.blocks;
        v->sum.bytes += some.bytes;
        if (n < SEQUENCES || (req->bytes && v->sum.bytes >= req->bytes))
            return true;
    } while (uv_hrtime() - begin < PIECE_NS);
    return false;
}

static bool drop_on(struct kvd_daemon *d, struct eviction *v)
{
    uint64_t begin = uv_hrtime();
    while (!kvd_lease_end_retained(d, v->ns, LEASES))
        if (uv_hrtime() - begin >= PIECE_NS)
            return false;
    while (!kvd_blocks_clear(d->pool, v->ns, &v->at, ENTRIES, &v->sum.blocks))
        if (uv_hrtime() - begin >= PIECE_NS)
            return false;
    return true;
}

static bool drop_one_on(struct kvd_daemon *d, struct eviction *v)
{
    uint64_t begin = uv_hrtime();
    struct kvd_lease *named = kvd_lease_on(d, v->ns, KVD_LEASE_RETAINED, &v->key);
    if (named)
        kvd_lease_end(d, named);
    for (bool all = false; !all;) {
        if (v->looks && uv_hrtime() - begin >= PIECE_NS)
            return false;
        // Looked up each time: it may have gone meanwhile, and its entry be another's.
        uint32_t entry = kvd_blocks_entry(d->pool, v->ns, &v->key);
        all = entry == KVD_PREFIX_NONE ||
              kvd_lease_end_retained_on(d, v->ns, entry, !v->looks, LEASES);
        v->looks = true;
    }
    v->sum.blocks = kvd_blocks_forget(d->pool, v->ns, &v->key, KVD_PREFIX_DROPPED);
    return true;
}

static bool go_on(struct kvd_daemon *d, struct eviction *v)
{
    if (v->one)
        return drop_one_on(d, v);
    return v->drops ? drop_on(d, v) : evict_on(d, v);
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    struct eviction *v = d->evict->evictions; // one after the other
    if (v && go_on(d, v))
        finish(v);
    if (!d->evict->evictions)
        uv_idle_stop(idle);
}

static void begin(struct kvd_call *call, const struct eviction *from)
{
    struct kvd_evict *e = call->d->evict;
    struct eviction *v = malloc(sizeof(*v));
    if (!v) {
        if (from->drops)
            kvd_pool_namespace_release(call->d->pool, from->ns);
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    *v = *from;
    v->call = call;
    call->work = v;
    call->on_cancelled = on_cancelled;
    DL_APPEND(e->evictions, v);
    if (v == e->evictions && go_on(call->d, v))
        finish(v);
    else
        uv_idle_start(&e->idle, on_idle);
}

static void begin_drop(struct kvd_call *call, const char *ns, struct eviction *v)
{
    struct kvd_error err = {0};
    if (kvd_pool_namespace(call->d->pool, ns, &v->ns, &err))
        kvd_call_fail_error(call, &err);
    else
        begin(call, v);
}

void kvd_evict_prefixes(struct kvd_call *call, const char *ns)
{
    begin_drop(call, ns, &(struct eviction){.drops = true});
}

void kvd_evict_prefix(struct kvd_call *call, const char *ns, const struct kvd_prefix_key *key)
{
    begin_drop(call, ns, &(struct eviction){.drops = true, .one = true, .key = *key});
}

void kvd_on_evict(struct kvd_call *call, const void *request)
{
    const Kvd__V1__EvictRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    uint32_t ns = KVD_POOL_NONE;
    Kvd__V1__EvictReply r = KVD__V1__EVICT_REPLY__INIT;
    if (req->namespace_name[0] &&
        (ns = kvd_pool_namespace_find(d->pool, req->namespace_name)) == KVD_POOL_NONE) {
        kvd_call_fail(call, KVD_E_NOT_FOUND, "there is no namespace %.64s", req->namespace_name);
    } else if (req->name[0] && ns == KVD_POOL_NONE) {
        kvd_call_fail(call, KVD_E_INVALID, "a name wants its namespace");
    } else if (!req->name[0]) {
        begin(call, &(struct eviction){0});
    } else if (evict_named(d, ns, req->name, &r.bytes, &err)) {
        kvd_call_fail_error(call, &err);
    } else {
        r.sequences = 1;
        kvd_notice("evicted by operator sequences=1 bytes=%" PRIu64, r.bytes);
        kvd_call_reply(call, &r);
    }
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->evict = calloc(1, sizeof(*d->evict));
    if (!d->evict)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->evict->idle);
    d->evict->idle.data = d;
    return KVD_OK;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(KVD_TAKE(d->evict));
}

// No call is left by then.
static void end(struct kvd_daemon *d)
{
    if (d->evict)
        uv_close((uv_handle_t *)&d->evict->idle, on_closed);
}

const struct kvd_part kvd_part_evict = {.init = init, .end = end};
