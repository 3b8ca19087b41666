#include "daemon/session/pool.h"

#include "daemon/session/memory.h"

uint64_t kvd_evictable(struct kvd_daemon *d, const uint64_t **by_namespace)
{
    enum { FRESH_MS = 1000 };
    uint64_t now = kvd_now_ms(d) + 1; // 0: never
    if (!d->evictable_at_ms || now - d->evictable_at_ms >= FRESH_MS) {
        memset(d->evictable_by_ns, 0, sizeof(d->evictable_by_ns));
        d->evictable = kvd_pool_evictable(d->pool, d->evictable_by_ns);
        d->evictable_at_ms = now;
    }
    if (by_namespace)
        *by_namespace = d->evictable_by_ns;
    return d->evictable;
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
               "Of the used ones, those that evicting published, unused sequences would free.",
               (double)kvd_evictable(d, NULL));
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
    const char *kind =
        info->kind == KVD_POOL_BF16
            ? "window"
            : kvd_codec_name(kvd_pool_layout_get(p->d->pool, info->layout)->planes[0].codec);
    fprintf(p->f, "kvd_pages{namespace=\"%s\",kind=\"%s\",geometry=\"%u\"} %" PRIu64 "\n", name,
            kind, info->layout, info->used);
    return true;
}

static void namespace_metrics(struct kvd_daemon *d, FILE *f)
{
    struct page p = {f, d};
    kvd_metric_head(f, "kvd_pages", "gauge",
                    "Pages in use by namespace, kind (window or codec) and layout.");
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
         "Bytes that evicting published, unused sequences would free, by namespace."},
    };
    const uint64_t *evictable;
    kvd_evictable(d, &evictable);
    for (size_t g = 0; g < KVD_LEN(gauges); g++) {
        kvd_metric_head(f, gauges[g].name, "gauge", gauges[g].help);
        for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
            struct kvd_pool_namespace_info ns;
            char name[2 * KVD_MAX_NAMESPACE + 4];
            kvd_pool_namespace_info(d->pool, i, &ns);
            if (!ns.name[0])
                continue;
            const uint64_t values[] = {ns.used, ns.quota, ns.tokens, ns.sequences, evictable[i]};
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

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    struct kvd_pool_mem_ops mem = kvd_memory_ops(d);
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
                                   .on_evict = on_evict,
                                   .on_evict_ctx = d};
    d->pool = kvd_pool_new(&pool, &mem, err);
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

static void deinit(struct kvd_daemon *d)
{
    kvd_pool_free(&d->pool);
    free(d->use);
}

const struct kvd_part kvd_part_pool = {.init = init, .deinit = deinit, .metrics = metrics};
