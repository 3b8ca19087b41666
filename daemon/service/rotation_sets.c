// ListRotationSets, FetchRotationSet.
#include <utlist.h>

#include "admin.pb-c.h"
#include "daemon/core/lifecycle.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/downloads.h"
#include "daemon/service/handlers.h"
#include "daemon/service/rotations.h"
#include "daemon/session/session.h"

// How many layouts have a digest in the backend's memory.
static uint32_t loaded_users(struct kvd_daemon *d, const char *digest)
{
    uint32_t users = 0;
    for (struct kvd_session *s = d->sessions; s; s = s->hh.next)
        users += s->layout != KVD_POOL_NONE &&
                 strcmp(kvd_pool_layout_get(d->pool, s->layout)->rotation, digest) == 0;
    return users;
}

static bool is_loaded(struct kvd_daemon *d, const char *digest)
{
    for (uint32_t i = 0; i < KVD_MAX_LAYOUTS; i++)
        if (d->rotations[i][0] && strcmp(kvd_pool_layout_get(d->pool, i)->rotation, digest) == 0)
            return true;
    return false;
}

// -- what the store has -------------------------------------------------------------------------
//
// Anybody may ask, so the store is asked once for all who wait, and no longer than somebody does.

struct waiter {
    struct kvd_call *call;
    struct kvd_listing *of;
    struct waiter *prev, *next;
};

struct kvd_listing {
    struct kvd_download download; // first
    struct waiter *waiters;
    struct kvd_rotations_store store;
    struct kvd_store_entry *entries;
    uint32_t n;
    struct kvd_error err;
};

static void list_run(struct kvd_download *w)
{
    struct kvd_listing *l = (struct kvd_listing *)w;
    kvd_store_list(&l->store.config, &l->entries, &l->n, &l->err);
}

static void listing_free(struct kvd_listing *l)
{
    free(l->entries);
    free(l);
}

// The reply for all of them, packed. NULL: there is no memory.
static uint8_t *pack_listing(struct kvd_daemon *d, const struct kvd_listing *l, size_t *length)
{
    Kvd__V1__RotationSetInfo *infos KVD_FREE = calloc(l->n + 1, sizeof(*infos));
    Kvd__V1__RotationSetInfo **list KVD_FREE = calloc(l->n + 1, sizeof(*list));
    Kvd__V1__ListRotationSetsReply r = KVD__V1__LIST_ROTATION_SETS_REPLY__INIT;
    if (!infos || !list)
        return NULL;
    for (uint32_t i = 0; i < l->n; i++) {
        const struct kvd_store_entry *e = &l->entries[i];
        kvd__v1__rotation_set_info__init(&infos[i]);
        infos[i].model = (char *)e->model;
        infos[i].tag = (char *)e->tag;
        infos[i].digest = (char *)e->digest;
        infos[i].bytes = e->bytes;
        infos[i].error = e->error;
        infos[i].error_no_windows = e->error_no_windows;
        infos[i].users = loaded_users(d, e->digest);
        infos[i].state = is_loaded(d, e->digest) ? "loaded" : e->cached ? "cached" : "store";
        list[r.n_sets++] = &infos[i];
    }
    r.sets = list;
    *length = kvd__v1__list_rotation_sets_reply__get_packed_size(&r);
    uint8_t *packed = malloc(*length + 1);
    if (packed)
        kvd__v1__list_rotation_sets_reply__pack(&r, packed);
    return packed;
}

static void list_done(struct kvd_download *w, int status)
{
    struct kvd_listing *l = (struct kvd_listing *)w;
    struct kvd_daemon *d = w->d;
    struct waiter *each, *tmp;
    size_t length = 0;
    uint8_t *packed KVD_FREE = NULL;
    if (d->listing == l)
        d->listing = NULL;
    if (status < 0)
        kvd_fail(&l->err, KVD_E_UNAVAILABLE, "kvd is shutting down");
    else if (l->waiters && !l->err.code && !(packed = pack_listing(d, l, &length)))
        kvd_fail(&l->err, KVD_E_INTERNAL, "out of memory");
    DL_FOREACH_SAFE(l->waiters, each, tmp)
    {
        each->call->on_cancelled = NULL;
        if (packed)
            kvd_call_reply_packed(each->call, packed, length);
        else
            kvd_call_fail_error(each->call, &l->err);
        free(each);
    }
    listing_free(l);
}

// One that waits has gone. With the last of them the listing ends.
static void on_given_up(struct kvd_call *call)
{
    struct kvd_daemon *d = call->d;
    struct waiter *w = call->work;
    struct kvd_listing *l = w->of;
    DL_DELETE(l->waiters, w);
    free(w);
    kvd_call_fail(call, KVD_E_UNAVAILABLE, "the caller has gone");
    if (l->waiters)
        return;
    atomic_store(&l->store.given_up, true);
    if (d->listing == l)
        d->listing = NULL;
    if (kvd_download_drop(&l->download))
        listing_free(l);
}

static struct kvd_listing *listing_new(struct kvd_daemon *d)
{
    struct kvd_listing *l = calloc(1, sizeof(*l));
    if (!l)
        return NULL;
    l->download = (struct kvd_download){.run = list_run, .done = list_done};
    kvd_rotations_store(d, &l->store);
    l->store.config.retries = 1;
    return l;
}

void kvd_on_list_rotation_sets(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_daemon *d = call->d;
    struct kvd_listing *l = d->listing;
    struct waiter *w = malloc(sizeof(*w));
    // After a reload another store may be meant.
    bool new =
        !l || strcmp(l->store.url, d->config.store) || strcmp(l->store.cache, d->config.cache);
    if (w && new)
        l = listing_new(d);
    if (!w || !l) {
        free(w);
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    *w = (struct waiter){.call = call, .of = l};
    DL_APPEND(l->waiters, w);
    call->work = w;
    call->on_cancelled = on_given_up;
    if (!new)
        return;
    d->listing = l;
    kvd_download_begin(d, &l->download);
}

// -- bringing one here --------------------------------------------------------------------------

static void on_fetched(void *ctx, struct kvd_rotset *set, const struct kvd_error *failure)
{
    struct kvd_call *call = ctx;
    Kvd__V1__FetchRotationSetReply r = KVD__V1__FETCH_ROTATION_SET_REPLY__INIT;
    Kvd__V1__RotationSetInfo info = KVD__V1__ROTATION_SET_INFO__INIT;
    if (!set) {
        kvd_call_fail_error(call, failure);
        return;
    }
    info.model = set->model;
    info.digest = set->digest;
    info.state = is_loaded(call->d, set->digest) ? "loaded" : "cached";
    info.layers = set->n_layers;
    info.kv_heads = set->heads == 1 ? 0 : set->heads;
    info.head_dim_k = set->dim_k;
    info.head_dim_v = set->dim_v;
    info.users = loaded_users(call->d, set->digest);
    r.set = &info;
    kvd_call_reply(call, &r);
    kvd_rotset_free(&set);
}

void kvd_on_fetch_rotation_set(struct kvd_call *call, const void *request)
{
    const Kvd__V1__FetchRotationSetRequest *req = request;
    if (!kvd_store_ref_valid(req->name))
        kvd_call_fail(call, KVD_E_INVALID,
                      "'%.100s' is no rotation set: say model@tag or sha256:<64 hex>", req->name);
    else
        kvd_rotations_fetch(call, req->name, on_fetched, call);
}
