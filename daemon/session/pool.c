#include "daemon/session/pool.h"

#include <sysexits.h>

#include "daemon/core/keep.h"
#include "daemon/session/ledger.h"
#include "daemon/session/memory.h"
#include "daemon/session/session.h"

// Their names among what is kept.
#define REGION "kvd-pool"
#define LEDGER "kvd-sessions"

enum {
    PIECE_NS = 1000000, // of a look; then others have their turn
    PAGES = 16384,      // between looks at the clock
    // How long what was seen counts: a hundred times as long as the look took, within these.
    FRESH_MS = 50,
    FRESH_MOST_MS = 1000,
};

// A look at what could be evicted: the pool then knows what stays of what nobody uses.
struct kvd_evictable {
    uv_idle_t idle; // runs while there is more to look at
    struct kvd_pool_look look;
    bool looking;
    uint64_t looked_ms; // when the latest was begun; 0: never
    uint64_t took_ns, fresh_ms;
    uint64_t by_namespace[KVD_MAX_NAMESPACES];
};

static void look_on(struct kvd_daemon *d)
{
    struct kvd_evictable *e = d->evictable;
    uint64_t begin = uv_hrtime(), now = begin;
    bool all;
    while (!(all = kvd_pool_look_step(d->pool, &e->look, PAGES)) && now - begin < PIECE_NS)
        now = uv_hrtime();
    e->took_ns += uv_hrtime() - begin;
    if (!all)
        return;
    e->fresh_ms = KVD_MAX(KVD_MIN(e->took_ns / 10000, (uint64_t)FRESH_MOST_MS), (uint64_t)FRESH_MS);
    e->looking = false;
    uv_idle_stop(&e->idle);
}

static void on_idle(uv_idle_t *idle)
{
    look_on(idle->data);
}

uint64_t kvd_evictable(struct kvd_daemon *d)
{
    struct kvd_evictable *e = d->evictable;
    uint64_t now = kvd_now_ms(d) + 1, bytes = 0;
    if (!e->looking && (!e->looked_ms || now - e->looked_ms >= e->fresh_ms)) {
        e->took_ns = 0;
        memset(e->by_namespace, 0, sizeof(e->by_namespace));
        e->look = (struct kvd_pool_look){.by_namespace = e->by_namespace};
        e->looking = true;
        e->looked_ms = now;
        uv_idle_start(&e->idle, on_idle);
        look_on(d);
    }
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        struct kvd_pool_namespace_info info;
        kvd_pool_namespace_info(d->pool, i, &info);
        bytes += info.evictable;
    }
    return bytes;
}

// -- metrics ------------------------------------------------------------------------------------

struct page {
    FILE *f;
    struct kvd_daemon *d;
};

static void pool_metrics(struct kvd_daemon *d, FILE *f)
{
    struct kvd_pool_info info;
    kvd_pool_info(d->pool, &info);
    kvd_metric_head(f, "kvd_pool_bytes", "gauge",
                    "KV memory by state: used by pages, slack in granted extents, free.");
    fprintf(f, "kvd_pool_bytes{state=\"used\"} %" PRIu64 "\n", info.used);
    fprintf(f, "kvd_pool_bytes{state=\"slack\"} %" PRIu64 "\n", info.slack);
    fprintf(f, "kvd_pool_bytes{state=\"free\"} %" PRIu64 "\n", info.bytes - info.used - info.slack);
    kvd_metric(f, "kvd_pool_evictable_bytes", "gauge",
               "Of the used ones, those that evicting what nobody uses would free.",
               (double)kvd_evictable(d));
    kvd_metric(f, "kvd_pool_memory_bytes", "gauge",
               "Device memory that the pool's extents have, idle ones included.",
               (double)info.extents_made * (double)info.extent_bytes);
    kvd_metric(f, "kvd_pool_size_bytes", "gauge", "KV memory in all.", (double)info.bytes);
    kvd_metric(f, "kvd_pool_evictions_total", "counter",
               "Published sequences evicted for room or by an operator.", (double)info.evictions);
    kvd_metric(f, "kvd_sequences", "gauge", "Sequences that exist.", (double)info.sequences);
}

static bool slab_line(void *ctx, const struct kvd_pool_slab_info *info)
{
    struct page *p = ctx;
    struct kvd_pool_namespace_info ns;
    char name[2 * KVD_MAX_NAMESPACE + 4];
    if (info->extents == 0)
        return true;
    kvd_pool_namespace_info(p->d->pool, info->ns, &ns);
    kvd_metric_escape(ns.name, name, sizeof(name));
    const struct kvd_layout *l = kvd_pool_layout_get(p->d->pool, info->layout);
    char codec[KVD_CODECS_TEXT];
    const char *kind = info->kind == KVD_POOL_BF16
                           ? "window"
                           : kvd_codecs_name(l->planes[info->plane].codec, codec);
    fprintf(p->f,
            "kvd_pages{namespace=\"%s\",kind=\"%s\",layout=\"%u\",plane=\"%u\"} %" PRIu64 "\n",
            name, kind, info->layout, info->plane, info->used);
    return true;
}

static void namespace_metrics(struct kvd_daemon *d, FILE *f)
{
    struct page p = {f, d};
    kvd_metric_head(f, "kvd_pages", "gauge",
                    "Pages in use by namespace, kind (window or codec), layout and plane.");
    kvd_pool_slab_each(d->pool, slab_line, &p);
    static const struct {
        const char *name, *help;
    } gauges[] = {
        {"kvd_namespace_used_bytes", "Bytes of pages in use by namespace."},
        {"kvd_namespace_quota_bytes", "Quota by namespace; 0 means none."},
        {"kvd_namespace_tokens",
         "Tokens stored by namespace, shared ones counted for each sequence."},
        {"kvd_namespace_sequences", "Sequences by namespace."},
        {"kvd_namespace_evictable_bytes",
         "Bytes that evicting what nobody uses would free, by namespace."},
    };
    kvd_evictable(d);
    for (size_t g = 0; g < KVD_LEN(gauges); g++) {
        kvd_metric_head(f, gauges[g].name, "gauge", gauges[g].help);
        for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
            struct kvd_pool_namespace_info ns;
            char name[2 * KVD_MAX_NAMESPACE + 4];
            kvd_pool_namespace_info(d->pool, i, &ns);
            if (!ns.name[0])
                continue;
            const uint64_t values[] = {ns.used, ns.quota, ns.tokens, ns.sequences, ns.evictable};
            kvd_metric_escape(ns.name, name, sizeof(name));
            fprintf(f, "%s{namespace=\"%s\"} %" PRIu64 "\n", gauges[g].name, name, values[g]);
        }
    }
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    pool_metrics(d, f);
    namespace_metrics(d, f);
}

// -- start and end ------------------------------------------------------------------------------

static void on_evict(void *ctx, uint32_t ns, uint64_t seq, const char *name)
{
    kvd_info("evicted sequence=%" PRIu64 " name=%s", seq, name);
    kvd_parts_evicted(ctx, ns, seq, name);
}

// Who holds what of the pool, as the ledger says.
static int set_holders(struct kvd_daemon *d, struct kvd_pool *pool, struct kvd_error *err)
{
    uint32_t n = kvd_ledger_holds(d->ledger), session;
    uint64_t *ids KVD_FREE = calloc((size_t)n + 1, sizeof(*ids));
    size_t found = 0;
    if (!ids)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < n; i++)
        if (kvd_ledger_held(d->ledger, i, &session, &ids[found]))
            found++;
    return kvd_pool_set_holders(pool, ids, found, err);
}

// The ledger of the pool's sessions: with a pool that is taken over its own, unless sessions are to
// end with their kvd.
static int open_ledger(struct kvd_daemon *d, bool taken_over, struct kvd_error *err)
{
    uint32_t holds = d->config.max_sequences;
    int fd KVD_CLOSE = kvd_keep_take(d, LEDGER);
    if (fd >= 0 && taken_over && d->config.resume_ms) {
        d->ledger = kvd_ledger_open(fd, KVD_SESSION_RECORDS, holds, err);
        return d->ledger ? KVD_OK : err->code;
    }
    d->ledger = kvd_keep_on(d) ? kvd_ledger_new(KVD_SESSION_RECORDS, holds, err)
                               : kvd_ledger_private(KVD_SESSION_RECORDS, holds, err);
    if (d->ledger && kvd_keep_on(d))
        kvd_keep_put(d, LEDGER, kvd_ledger_fd(d->ledger));
    return d->ledger ? KVD_OK : err->code;
}

static void on_block_gone(void *ctx, uint32_t ns, uint32_t layout,
                          const struct kvd_prefix_removed *removed)
{
    kvd_parts_block_gone(ctx, ns, layout, removed);
}

static void on_superseded(void *ctx)
{
    kvd_parts_superseded_over(ctx);
}

// The pool that an earlier kvd has left. What is not published and no session holds goes.
static struct kvd_pool *take_over(struct kvd_daemon *d, int region,
                                  const struct kvd_pool_config *config, struct kvd_error *err)
{
    struct kvd_pool_mem_ops mem = kvd_memory_ops(d);
    uint64_t begin = uv_hrtime();
    struct kvd_pool *pool = kvd_pool_open(region, config, &mem, err);
    if (pool && (open_ledger(d, true, err) || set_holders(d, pool, err)))
        kvd_pool_leave(&pool);
    if (!pool) {
        kvd_fail_in(err, "what an earlier kvd left cannot be taken over (keep = fresh drops it)");
        return NULL;
    }
    struct kvd_pool_info info;
    kvd_pool_info(pool, &info);
    kvd_notice("took over sequences=%" PRIu64 " tokens=%" PRIu64 " extents=%u ms=%.1f",
               info.sequences, info.tokens, info.extents_made, (double)(uv_hrtime() - begin) / 1e6);
    return pool;
}

static struct kvd_pool *new_pool(struct kvd_daemon *d, const struct kvd_pool_config *config,
                                 struct kvd_error *err)
{
    int region KVD_CLOSE = kvd_keep_take(d, REGION);
    struct kvd_pool_mem_ops mem = kvd_memory_ops(d);
    struct kvd_pool *pool = NULL;
    if (region >= 0)
        pool = take_over(d, region, config, err);
    else if (open_ledger(d, false, err) == KVD_OK)
        pool = kvd_pool_new(config, &mem, err);
    if (!pool)
        return NULL;
    kvd_keep_drop_rest(d); // extents of which the region does not know
    if (region < 0 && kvd_keep_on(d))
        kvd_keep_put(d, REGION, kvd_pool_fd(pool));
    return pool;
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    d->evictable = calloc(1, sizeof(*d->evictable));
    if (!d->evictable)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->evictable->idle);
    d->evictable->idle.data = d;
    // The instance is random already; its first eight digits seed the ids.
    char seed[9];
    snprintf(seed, sizeof(seed), "%.8s", d->instance);
    d->next_buffer = strtoul(seed, NULL, 16);
    struct kvd_pool_config pool = {.bytes = c->pool_size,
                                   .id_seed = (uint32_t)strtoul(seed, NULL, 16),
                                   .extent_bytes = c->extent_size,
                                   .max_sequences = c->max_sequences,
                                   .max_namespaces = KVD_MAX_NAMESPACES,
                                   .max_layouts = KVD_MAX_LAYOUTS,
                                   .durable = kvd_keep_on(d),
                                   .on_evict = on_evict,
                                   .on_block_gone = on_block_gone,
                                   .on_superseded = on_superseded,
                                   .on_evict_ctx = d};
    d->pool = new_pool(d, &pool, err);
    d->use = d->pool ? calloc(c->max_sequences, sizeof(*d->use)) : NULL;
    if (!d->use)
        return d->pool ? kvd_fail(err, KVD_E_INTERNAL, "out of memory") : err->code;
    for (uint32_t i = 0; i < c->n_namespaces; i++) {
        uint32_t ns;
        int rc = kvd_pool_namespace(d->pool, c->namespaces[i].name, &ns, err);
        if (rc)
            return rc;
        kvd_pool_set_quota(d->pool, ns, c->namespaces[i].quota);
        kvd_pool_namespace_keep(d->pool, ns, true);
        kvd_pool_namespace_release(d->pool, ns);
    }
    return KVD_OK;
}

// With KVD_VERIFY_POOL in the environment, for tests: kvd walks its pool when it drains, with what
// workers hold, and at its end, and fails if something is lost or owned twice.
static void verify(struct kvd_daemon *d, const char *when)
{
    struct kvd_error err = {0};
    if (!d->pool || !getenv("KVD_VERIFY_POOL") || kvd_pool_verify(d->pool, &err) == KVD_OK)
        return;
    kvd_error("the pool is not as it should be %s: %s", when, err.text);
    d->exit_code = EX_SOFTWARE;
}

static void draining(struct kvd_daemon *d)
{
    if (!d->works && !d->pool_works) // they have pages that belong to no sequence yet
        verify(d, "when kvd drains");
}

static void end(struct kvd_daemon *d)
{
    if (d->evictable)
        uv_close((uv_handle_t *)&d->evictable->idle, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    verify(d, "at the end");
    if (d->evictable)
        kvd_pool_look_drop(&d->evictable->look);
    free(KVD_TAKE(d->evictable));
    if (kvd_keep_on(d))
        kvd_pool_leave(&d->pool); // to the next kvd
    else
        kvd_pool_free(&d->pool);
    kvd_ledger_close(&d->ledger);
    free(d->use);
}

const struct kvd_part kvd_part_pool = {
    .init = init, .end = end, .deinit = deinit, .draining = draining, .metrics = metrics};
