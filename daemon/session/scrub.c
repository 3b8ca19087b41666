#include "daemon/session/scrub.h"

#include <xxhash.h>

#include "daemon/core/lifecycle.h"

enum {
    STEPS = 4096,     // of looking for the next block, then others have their turn
    REST_MS = 1000,   // between passes
    MOST_FOUND = 256, // damages that are told of one by one
};

struct kvd_scrub {
    uv_timer_t timer;
    uv_work_t work;
    bool busy; // with `block`
    struct kvd_pool_walk walk;
    struct kvd_pool_block block;
    uint64_t sum;  // of it
    uint8_t *seen; // by page, one bit each: in this pass
    uint64_t pages;
    bool demanded;
    uint64_t demanded_passes, checked, sealed, passes;
    double owed_ms; // of pauses
    struct kvd_scrub_damage found[MOST_FOUND];
    uint32_t n_found;
};

static void go_on(struct kvd_daemon *d);

static void on_timer(uv_timer_t *timer)
{
    go_on(timer->data);
}

static void later(struct kvd_daemon *d, uint64_t ms)
{
    uv_timer_start(&d->scrub->timer, on_timer, ms, 0);
}

// -- a block ------------------------------------------------------------------------------------

uint64_t kvd_page_sum(const void *page, uint64_t bytes)
{
    uint64_t sum = XXH3_64bits(page, bytes);
    return sum <= KVD_SUM_DAMAGED ? sum + KVD_SUM_DAMAGED + 1 : sum;
}

static void read_block(uv_work_t *work)
{
    struct kvd_daemon *d = work->data;
    struct kvd_scrub *s = d->scrub;
    s->sum = kvd_page_sum((const void *)(uintptr_t)s->block.addr, s->block.bytes);
}

// Sequences that have a page, all of which are lost with it.
struct owners {
    struct kvd_daemon *d;
    const struct kvd_pool_block *block;
};

static bool report(void *ctx, const struct kvd_pool_seq_info *info)
{
    struct owners *o = ctx;
    struct kvd_scrub *s = o->d->scrub;
    struct kvd_error err = {0};
    struct kvd_pool_namespace_info ns;
    if (kvd_pool_seq_whole(o->d->pool, info->id, &err) == KVD_OK)
        return true;
    kvd_pool_namespace_info(o->d->pool, info->ns, &ns);
    kvd_error("damaged namespace=%s sequence=%" PRIu64 " name=%s: %s", ns.name, info->id,
              info->name, err.text);
    if (s->n_found == MOST_FOUND)
        return true;
    struct kvd_scrub_damage *found = &s->found[s->n_found++];
    *found = (struct kvd_scrub_damage){
        .sequence = info->id, .plane = o->block->plane, .block = o->block->index};
    snprintf(found->ns, sizeof(found->ns), "%s", ns.name);
    snprintf(found->name, sizeof(found->name), "%s", info->name);
    return true;
}

static void judge(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    const struct kvd_pool_block *b = &s->block;
    s->checked++;
    if (b->sum == KVD_SUM_NONE) {
        s->sealed++;
        kvd_pool_block_seal(d->pool, b, s->sum);
    } else if (b->sum != s->sum) {
        struct owners o = {d, b};
        kvd_pool_block_seal(d->pool, b, KVD_SUM_DAMAGED);
        kvd_pool_seq_each(d->pool, report, &o);
    }
}

static void on_read(uv_work_t *work, int status)
{
    struct kvd_daemon *d = work->data;
    struct kvd_scrub *s = d->scrub;
    if (status == 0)
        judge(d);
    s->busy = false;
    kvd_pool_block_drop(d->pool, &s->block);
    if (d->config.scrub_rate && !s->demanded)
        s->owed_ms += 1000.0 * (double)s->block.bytes / (double)d->config.scrub_rate;
    kvd_daemon_work_end(d);
    if (d->state == KVD_STARTING || d->state == KVD_READY)
        go_on(d);
}

// -- a pass -------------------------------------------------------------------------------------

static bool see(struct kvd_scrub *s, uint32_t page)
{
    uint8_t bit = (uint8_t)(1u << page % 8);
    bool new = page / 8 < s->pages && !(s->seen[page / 8] & bit);
    if (new)
        s->seen[page / 8] |= bit;
    return new;
}

static void begin_pass(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    s->walk = (struct kvd_pool_walk){0};
    s->checked = 0;
    memset(s->seen, 0, s->pages);
}

static void end_pass(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    s->passes++;
    s->demanded_passes += s->demanded;
    s->demanded = false;
    begin_pass(d);
    later(d, REST_MS);
}

// Takes up the next block that is wanted. Without a rate only a demand goes on.
static void go_on(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    if (s->busy || d->state == KVD_DRAINING || d->state == KVD_STOPPING)
        return;
    if (!s->demanded && (d->config.scrub_rate == 0 || s->owed_ms >= 1)) {
        uint64_t wait = d->config.scrub_rate ? (uint64_t)s->owed_ms : REST_MS;
        s->owed_ms = 0;
        later(d, wait);
        return;
    }
    int rc;
    while ((rc = kvd_pool_block_next(d->pool, &s->walk, STEPS, &s->block)) == KVD_OK)
        if (see(s, s->block.page) && s->block.sum != KVD_SUM_DAMAGED)
            break;
    if (rc == KVD_E_NOT_FOUND) {
        end_pass(d);
        return;
    }
    if (rc) {
        later(d, 0);
        return;
    }
    s->busy = true;
    kvd_pool_block_hold(d->pool, &s->block);
    kvd_daemon_work_begin(d);
    s->work.data = d;
    uv_queue_work(&d->loop, &s->work, read_block, on_read);
}

// -- for others ---------------------------------------------------------------------------------

static bool count(void *ctx, const struct kvd_pool_slab_info *info)
{
    uint64_t *total = ctx;
    *total += info->kind == KVD_POOL_CODEC ? info->used : 0;
    return true;
}

struct kvd_scrub_state kvd_scrub_look(struct kvd_daemon *d)
{
    const struct kvd_scrub *s = d->scrub;
    struct kvd_scrub_state out = {.possible = s != NULL};
    struct kvd_pool_info info;
    kvd_pool_info(d->pool, &info);
    kvd_pool_slab_each(d->pool, count, &out.total);
    out.damaged = info.damaged;
    if (!s)
        return out;
    out.demanded = s->demanded;
    out.demanded_passes = s->demanded_passes;
    out.checked = s->checked;
    out.found = s->found;
    out.n_found = s->n_found;
    return out;
}

void kvd_scrub_demand(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    if (!s || s->demanded)
        return;
    s->demanded = true;
    begin_pass(d);
    go_on(d);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_scrub *s = d->scrub;
    struct kvd_pool_info info;
    if (!s)
        return;
    kvd_pool_info(d->pool, &info);
    kvd_metric(f, "kvd_scrub_passes_total", "counter",
               "Times that all blocks of history were compared with their checksums.",
               (double)s->passes);
    kvd_metric(f, "kvd_blocks_sealed_total", "counter", "Blocks that got a checksum.",
               (double)s->sealed);
    kvd_metric(f, "kvd_damaged_pages", "gauge",
               "Pages in use whose memory is not what was stored; their sequences are refused.",
               info.damaged);
}

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_pool_info info;
    if (strcmp(d->backend->ops->name, "cpu") != 0)
        return KVD_OK;
    kvd_pool_info(d->pool, &info);
    d->scrub = calloc(1, sizeof(*d->scrub));
    if (!d->scrub)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->scrub->timer);
    d->scrub->timer.data = d;
    d->scrub->pages = kvd_div_up(info.bytes / KVD_PAGE_UNIT, 8);
    d->scrub->seen = calloc(1, d->scrub->pages);
    if (!d->scrub->seen)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    later(d, 0); // what a kvd before this one has left is looked at first of all
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    if (d->scrub && !uv_is_closing((uv_handle_t *)&d->scrub->timer))
        uv_close((uv_handle_t *)&d->scrub->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    struct kvd_scrub *s = KVD_TAKE(d->scrub);
    if (!s)
        return;
    free(s->seen);
    free(s);
}

const struct kvd_part kvd_part_scrub = {
    .start = start, .end = end, .deinit = deinit, .metrics = metrics};
