#include "daemon/sched/page_counts.h"

#include "pool/pool.h"

struct kvd_page_counts {
    struct kvd_page_count of[KVD_MAX_NAMESPACES];
};

struct kvd_page_count *kvd_page_count_of(struct kvd_daemon *d, uint32_t ns)
{
    struct kvd_page_count *c = &d->page_counts->of[ns];
    struct kvd_pool_namespace_info info;
    kvd_pool_namespace_info(d->pool, ns, &info);
    if (strcmp(c->name, info.name)) {
        *c = (struct kvd_page_count){0};
        snprintf(c->name, sizeof(c->name), "%s", info.name);
    }
    return c;
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    static const struct {
        const char *name, *help;
        size_t offset;
    } rows[] = {
#define ROW(what, field, help)                                                                     \
    {"kvd_pages_" what "_total", help, offsetof(struct kvd_page_count, field)}
        ROW("looked_up", looked_up, "Pages that were looked up, of 64 tokens each."),
        ROW("found", found, "Of those, pages that were there."),
        ROW("restored", restored, "Pages that were brought back from tiers for a lookup."),
        ROW("put", put, "Pages that were stored."),
        ROW("put_registered", put_registered,
            "Of those, pages that kvd read in an engine's own memory."),
        ROW("put_known", known, "Pages that were put and were there already."),
        ROW("put_bytes", put_bytes, "Bytes of bf16 K and V that were stored as pages."),
        ROW("got", got, "Pages that were read."),
        ROW("got_registered", got_registered,
            "Of those, pages that kvd wrote to an engine's own memory."),
        ROW("got_bytes", got_bytes, "Bytes of bf16 K and V that pages were read into."),
        ROW("encoded", encoded, "Exact pages that were encoded, as their chain had gone on."),
        ROW("encoded_freed_bytes", freed, "Bytes of these exact pages that are free since."),
    };
    for (uint32_t r = 0; r < KVD_LEN(rows); r++) {
        kvd_metric_head(f, rows[r].name, "counter", rows[r].help);
        for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
            struct kvd_pool_namespace_info ns;
            char label[2 * KVD_MAX_NAMESPACE + 4];
            uint64_t value;
            kvd_pool_namespace_info(d->pool, i, &ns);
            if (!ns.name[0])
                continue;
            kvd_metric_escape(ns.name, label, sizeof(label));
            memcpy(&value, (const uint8_t *)kvd_page_count_of(d, i) + rows[r].offset,
                   sizeof(value));
            fprintf(f, "%s{namespace=\"%s\"} %" PRIu64 "\n", rows[r].name, label, value);
        }
    }
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->page_counts = calloc(1, sizeof(*d->page_counts));
    return d->page_counts ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->page_counts));
}

const struct kvd_part kvd_part_pages = {.init = init, .deinit = deinit, .metrics = metrics};
