// ListPrefixes, ExplainPrefix, PinPrefix, ClassifyPrefix, DropPrefix.
#include "admin.pb-c.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/evict.h"
#include "daemon/service/handlers.h"
#include "daemon/service/layout.h"
#include "daemon/service/prompts.h"
#include "daemon/service/steps.h"
#include "daemon/session/leases.h"

enum {
    LIST_MAX = 256,
    LOOKED_AT = 8192, // entries in a call
    LISTED = 4,       // rows in a step
    PIN_MAX_S = 1000000,
};

static int find_namespace(const struct kvd_daemon *d, const char *name, uint32_t *ns,
                          struct kvd_error *err)
{
    *ns = name[0] ? kvd_pool_namespace_find(d->pool, name) : KVD_POOL_NONE;
    return *ns != KVD_POOL_NONE
               ? KVD_OK
               : kvd_fail(err, KVD_E_NOT_FOUND, "there is no namespace '%.64s'", name);
}

static int take_key(const ProtobufCBinaryData *from, struct kvd_prefix_key *key,
                    struct kvd_error *err)
{
    if (from->len != sizeof(*key))
        return kvd_fail(err, KVD_E_INVALID, "a block's key of %zu bytes: kvd's have %zu", from->len,
                        sizeof(*key));
    memcpy(key, from->data, sizeof(*key));
    return KVD_OK;
}

// -- what is there ------------------------------------------------------------------------------

static const char *const classes[] = {[KVD_PREFIX_DEMOTED] = "demoted",
                                      [KVD_PREFIX_LOW] = "low",
                                      [KVD_PREFIX_NORMAL] = "normal",
                                      [KVD_PREFIX_HIGH] = "high"};

// A prompt as it is listed, with what the message points to.
struct row {
    Kvd__V1__PrefixInfo info;
    struct kvd_prefix_key key;
    struct kvd_blocks_space space;
    char digest[KVD_DIGEST_TEXT];
};

static void fill_row(struct kvd_daemon *d, struct row *r, const struct kvd_blocks_match *m,
                     uint32_t holds)
{
    Kvd__V1__PrefixInfo *i = &r->info;
    kvd__v1__prefix_info__init(i);
    kvd_layout_digest(kvd_pool_layout_get(d->pool, r->space.layout), r->digest);
    i->key = (ProtobufCBinaryData){sizeof(r->key), (uint8_t *)&r->key};
    i->blocks = m->known;
    i->adoptable = m->at.blocks;
    i->window_tokens = m->window;
    i->end = m->end;
    i->holds = holds;
    i->pinned = kvd_lease_on(d, r->space.ns, KVD_LEASE_PINNED, &r->key) != NULL;
    i->priority = (char *)(uintptr_t)classes[kvd_blocks_class(d->pool, r->space.ns, &r->key)];
    i->layout_digest = r->digest;
    i->domain = (ProtobufCBinaryData){sizeof(r->space.domain), r->space.domain};
}

// What a call lists.
struct rows {
    struct row rows[LIST_MAX];
    Kvd__V1__PrefixInfo *refs[LIST_MAX];
    uint32_t holds[LIST_MAX], n, limit;
};

// A call on its way: finding a row goes through all blocks before it, so it is a few at a time.
struct listing {
    struct kvd_stepped stepped; // first
    struct kvd_call *call;
    uint32_t ns;
    struct rows *rows;    // NULL: it has had no turn yet, and takes no memory
    uint32_t at, n, next; // row, those that are there still, where the next call goes on
};

static bool take_leaf(void *ctx, const struct kvd_prefix_entry_info *e, uint32_t layout,
                      uint32_t entry, bool end)
{
    struct rows *l = ctx;
    (void)layout;
    (void)entry;
    if (e->children && !end)
        return true;
    l->rows[l->n].key = e->key;
    l->holds[l->n] = e->holds;
    return ++l->n < l->limit;
}

static void listing_free(struct kvd_daemon *d, struct listing *l)
{
    kvd_steps_drop(d, &l->stepped);
    free(l->rows);
    free(l);
}

static void on_cancelled(struct kvd_call *call)
{
    listing_free(call->d, call->work);
    kvd_call_fail(call, KVD_E_UNAVAILABLE, "the call was cancelled");
}

static int collect(struct kvd_daemon *d, struct listing *l, struct kvd_error *err)
{
    const Kvd__V1__ListPrefixesRequest *req = (const void *)l->call->request;
    l->rows = calloc(1, sizeof(*l->rows));
    if (!l->rows)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    l->rows->limit = req->limit ? KVD_MIN(req->limit, (uint32_t)LIST_MAX) : LIST_MAX;
    l->next = kvd_blocks_each(d->pool, l->ns, req->from, LOOKED_AT, take_leaf, l->rows);
    return KVD_OK;
}

static void fill_next(struct kvd_daemon *d, struct listing *l)
{
    for (uint32_t i = 0; i < LISTED && l->at < l->rows->n; i++, l->at++) {
        struct row *r = &l->rows->rows[l->at];
        struct kvd_blocks_match m;
        if (kvd_blocks_find(d->pool, l->ns, &r->key, &r->space, &m))
            continue; // it has gone meanwhile
        fill_row(d, r, &m, l->rows->holds[l->at]);
        l->rows->refs[l->n++] = &r->info;
    }
}

static void list_step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct listing *l = (struct listing *)stepped;
    struct kvd_call *call = l->call;
    const Kvd__V1__ListPrefixesRequest *req = (const void *)call->request;
    struct kvd_blocks_info info;
    struct kvd_error err = {0};
    uint32_t ns = KVD_POOL_NONE;
    if (find_namespace(d, req->namespace_name, &ns, &err) == KVD_OK && ns != l->ns)
        kvd_fail(&err, KVD_E_NOT_FOUND, "the namespace has gone meanwhile");
    if (!err.code && !l->rows)
        collect(d, l, &err);
    else if (!err.code)
        fill_next(d, l);
    if (!err.code && l->at < l->rows->n)
        return;
    call->on_cancelled = NULL;
    if (err.code) {
        listing_free(d, l);
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__ListPrefixesReply reply = KVD__V1__LIST_PREFIXES_REPLY__INIT;
    kvd_blocks_info(d->pool, ns, &info);
    reply.prefixes = l->rows->refs;
    reply.n_prefixes = l->n;
    reply.next = l->next == KVD_POOL_NONE ? 0 : l->next;
    reply.blocks = info.blocks;
    reply.capacity = info.capacity;
    reply.bytes = info.bytes;
    kvd_call_reply(call, &reply);
    listing_free(d, l);
}

void kvd_on_list_prefixes(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ListPrefixesRequest *req = request;
    struct kvd_error err = {0};
    uint32_t ns;
    if (find_namespace(call->d, req->namespace_name, &ns, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    struct listing *l = calloc(1, sizeof(*l));
    if (!l) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    l->stepped.step = list_step;
    l->call = call;
    l->ns = ns;
    call->work = l;
    call->on_cancelled = on_cancelled;
    // As in listings.c: who asks has no session, and a user's calls take turns with others'.
    kvd_steps_begin(call->d, &l->stepped, 0, (uint64_t)(uintptr_t)call->user);
}

void kvd_on_explain_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ExplainPrefixRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    struct kvd_blocks_match m;
    struct row r;
    uint32_t ns;
    if (find_namespace(d, req->namespace_name, &ns, &err) || take_key(&req->key, &r.key, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__ExplainPrefixReply reply = KVD__V1__EXPLAIN_PREFIX_REPLY__INIT;
    reply.there = kvd_blocks_find(d->pool, ns, &r.key, &r.space, &m) == KVD_OK;
    bool whole = reply.there && m.why != KVD_PREFIX_DAMAGED;
    reply.reason = (char *)kvd_prefix_reason_name(whole ? KVD_PREFIX_PRESENT : m.why);
    reply.time = whole ? 0 : m.when;
    if (reply.there) {
        fill_row(d, &r, &m, 0);
        reply.prefix = &r.info;
    }
    kvd_call_reply(call, &reply);
}

// -- pins and drops -----------------------------------------------------------------------------

void kvd_on_pin_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__PinPrefixRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    struct kvd_blocks_space space;
    struct kvd_blocks_match m;
    struct kvd_prefix_key key;
    uint32_t ns;
    int rc = find_namespace(d, req->namespace_name, &ns, &err);
    if (rc == KVD_OK)
        rc = take_key(&req->key, &key, &err);
    if (rc == KVD_OK && req->seconds > PIN_MAX_S)
        rc = kvd_fail(&err, KVD_E_INVALID, "%u seconds; at most %d are possible", req->seconds,
                      PIN_MAX_S);
    if (rc == KVD_OK && !req->seconds && !kvd_lease_on(d, ns, KVD_LEASE_PINNED, &key))
        rc = kvd_fail(&err, KVD_E_NOT_FOUND, "that block is not pinned");
    else if (rc == KVD_OK && kvd_blocks_find(d->pool, ns, &key, &space, &m))
        rc = kvd_fail(&err, KVD_E_NOT_FOUND, "no such block is there: %s",
                      kvd_prefix_reason_name(m.why));
    else if (rc == KVD_OK)
        rc = kvd_lease_put(d, KVD_LEASE_PINNED, &m.at, &key, req->seconds * 1000ull, false,
                           KVD_LEASE_OPERATORS, &err);
    if (rc) {
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__PinPrefixReply reply = KVD__V1__PIN_PREFIX_REPLY__INIT;
    kvd_call_reply(call, &reply);
}

static int take_class(const char *name, enum kvd_prefix_class *class, struct kvd_error *err)
{
    for (size_t i = 0; i < KVD_LEN(classes); i++)
        if (strcmp(name, classes[i]) == 0) {
            *class = (enum kvd_prefix_class)i;
            return KVD_OK;
        }
    return kvd_fail(err, KVD_E_INVALID,
                    "priority '%.64s' is not known; demoted, low, normal and high are", name);
}

void kvd_on_classify_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ClassifyPrefixRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    struct kvd_blocks_space space;
    struct kvd_blocks_match m;
    struct kvd_prefix_key key;
    enum kvd_prefix_class class = KVD_PREFIX_NORMAL;
    uint32_t ns = 0;
    int rc = take_class(req->priority, &class, &err);
    if (rc == KVD_OK)
        rc = find_namespace(d, req->namespace_name, &ns, &err);
    if (rc == KVD_OK)
        rc = take_key(&req->key, &key, &err);
    if (rc == KVD_OK && kvd_blocks_find(d->pool, ns, &key, &space, &m))
        rc = kvd_fail(&err, KVD_E_NOT_FOUND, "no such block is there: %s",
                      kvd_prefix_reason_name(m.why));
    if (rc) {
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__ClassifyPrefixReply reply = KVD__V1__CLASSIFY_PREFIX_REPLY__INIT;
    reply.blocks = kvd_blocks_classify_to(d->pool, ns, &key, class);
    kvd_notice("prefix classified by operator namespace=%s priority=%s blocks=%u",
               req->namespace_name, req->priority, reply.blocks);
    kvd_call_reply(call, &reply);
}

void kvd_on_drop_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__DropPrefixRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    struct kvd_prefix_key key;
    uint32_t ns;
    if (find_namespace(d, req->namespace_name, &ns, &err) ||
        (req->key.len && take_key(&req->key, &key, &err)))
        kvd_call_fail_error(call, &err);
    else if (req->key.len)
        kvd_evict_prefix(call, req->namespace_name, &key);
    else
        kvd_evict_prefixes(call, req->namespace_name);
}
