// Watermarks: where less than free-low of the pool is free, what nobody uses is evicted, a
// millisecond in each round of the loop, until free-high is. So appends seldom have to evict.
//
// Borrowing: a namespace that may have more than its quota may have as much more as could be
// evicted of it, while there is room in the pool. The pool counts that as it changes, and gives it
// back first; here it is looked at now and then, for what stays though nobody uses it (idle.c).
#include "daemon/session/spare.h"

#include "daemon/session/pool.h"

enum {
    PIECE_NS = 1000000, // then others have their turn
    EVICTIONS = 8,      // between looks at the clock
    AGAIN_MS = 1000,    // after there was nothing to evict
    BORROW_MS = 50,     // between looks, and until a change of the configuration is seen
    NOBODY_MS = 1000,   // the same where nobody may borrow
};

struct kvd_spare {
    uv_check_t check; // each round of the loop: is there enough?
    uv_idle_t idle;   // runs while there is not
    uv_timer_t timer;
    uint64_t next_ms; // no sooner is there something to evict
    uint64_t blocks, sequences, bytes;
};

// -- watermarks ---------------------------------------------------------------------------------

// Free for any layout, or in extents of one.
static uint64_t free_bytes(const struct kvd_daemon *d)
{
    struct kvd_pool_info info;
    kvd_pool_info(d->pool, &info);
    return info.bytes - info.used;
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    struct kvd_spare *s = d->spare;
    uint64_t begin = uv_hrtime();
    bool enough = false;
    do {
        struct kvd_pool_evicted sum;
        uint32_t n = kvd_pool_relieve(d->pool, EVICTIONS, &sum);
        s->blocks += sum.blocks;
        s->sequences += sum.sequences;
        s->bytes += sum.bytes;
        if (n < EVICTIONS)
            s->next_ms = kvd_now_ms(d) + AGAIN_MS;
        enough = n < EVICTIONS || free_bytes(d) >= d->config.free_high;
    } while (!enough && uv_hrtime() - begin < PIECE_NS);
    if (enough)
        uv_idle_stop(idle);
}

static void on_check(uv_check_t *check)
{
    struct kvd_daemon *d = check->data;
    struct kvd_spare *s = d->spare;
    if (!d->config.free_low || d->state == KVD_STOPPING || kvd_now_ms(d) < s->next_ms ||
        uv_is_active((uv_handle_t *)&s->idle) || free_bytes(d) >= d->config.free_low)
        return;
    uv_idle_start(&s->idle, on_idle);
}

// -- borrowing ----------------------------------------------------------------------------------

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    bool any = false;
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        struct kvd_pool_namespace_info info;
        kvd_pool_namespace_info(d->pool, i, &info);
        const struct kvd_config_namespace *c =
            info.name[0] ? kvd_config_namespace_find(&d->config, info.name) : NULL;
        bool borrows = c && c->borrow && info.quota;
        kvd_pool_set_borrow(d->pool, i, borrows);
        any |= borrows;
    }
    if (any)
        kvd_evictable(d);
    uv_timer_start(timer, on_timer, any ? BORROW_MS : NOBODY_MS, 0);
}

// -- the part -----------------------------------------------------------------------------------

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_spare *s = d->spare = calloc(1, sizeof(*s));
    if (!s)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_check_init(&d->loop, &s->check);
    uv_idle_init(&d->loop, &s->idle);
    uv_timer_init(&d->loop, &s->timer);
    s->check.data = s->idle.data = s->timer.data = d;
    uv_check_start(&s->check, on_check);
    uv_timer_start(&s->timer, on_timer, BORROW_MS, 0);
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    if (!d->spare)
        return;
    uv_close((uv_handle_t *)&d->spare->check, NULL);
    uv_close((uv_handle_t *)&d->spare->idle, NULL);
    uv_close((uv_handle_t *)&d->spare->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->spare));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_spare *s = d->spare;
    kvd_metric(
        f, "kvd_pool_free_low_bytes", "gauge",
        "Below so much that is free, what nobody uses is evicted; 0: only when it is wanted.",
        (double)d->config.free_low);
    kvd_metric(f, "kvd_pool_relieved_bytes_total", "counter",
               "Bytes that were evicted so that enough is free.", (double)s->bytes);
    kvd_metric(f, "kvd_pool_relieved_blocks_total", "counter", "Blocks of prefixes among that.",
               (double)s->blocks);
    kvd_metric(f, "kvd_pool_relieved_sequences_total", "counter", "Published sequences among that.",
               (double)s->sequences);
    kvd_metric_head(f, "kvd_namespace_borrowed_bytes", "gauge",
                    "Bytes that a namespace has beyond its quota.");
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        struct kvd_pool_namespace_info info;
        char name[2 * KVD_MAX_NAMESPACE + 4];
        kvd_pool_namespace_info(d->pool, i, &info);
        if (!info.name[0])
            continue;
        kvd_metric_escape(info.name, name, sizeof(name));
        fprintf(f, "kvd_namespace_borrowed_bytes{namespace=\"%s\"} %" PRIu64 "\n", name,
                info.quota && info.used > info.quota ? info.used - info.quota : 0);
    }
}

const struct kvd_part kvd_part_spare = {
    .start = start, .end = end, .deinit = deinit, .metrics = metrics};
