#include "daemon/session/scrub.h"

#include <xxhash.h>

#include "daemon/core/lifecycle.h"
#include "daemon/session/ledger.h"
#include "daemon/session/room.h"

enum {
    STEPS = 4096,     // of looking for the next blocks, then others have their turn
    REST_MS = 1000,   // between passes
    MOST_FOUND = 256, // damages that are told of one by one
    // A GPU's memory is so many times as fast as the host's, for which scrub-rate is meant.
    GPU_TIMES = 64,
    PACED_BYTES = 4 << 20, // of a batch where there are pauses
    WANTED_MS = 1,         // while somebody waits for the room of what was looked at
};

struct kvd_scrub {
    uv_timer_t timer;
    uv_work_t work;
    bool busy; // with `blocks`
    struct kvd_pool_walk walk;
    struct kvd_pool_block blocks[KVD_SUMS_AT_ONCE];
    uint64_t sums[KVD_SUMS_AT_ONCE];
    uint32_t n;
    struct kvd_error err; // of reading them
    // By page, one bit each: those of this pass, and those whose checksum this kvd has made or
    // compared. While `taken_over` the others of an earlier kvd are not to be trusted.
    uint8_t *seen, *known;
    uint64_t pages; // bytes of each
    bool taken_over;
    bool eager; // the pass under way makes no pauses
    bool demanded;
    uint64_t began_ns, pass_bytes;
    uint64_t demanded_passes, checked, sealed, passes, first_uses, blocks_lost;
    double owed_ms; // of pauses
    struct kvd_scrub_damage found[MOST_FOUND];
    uint32_t n_found;
};

static void begin_pass(struct kvd_daemon *d);
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

static uint64_t kept(uint64_t sum)
{
    return sum <= KVD_SUM_DAMAGED ? sum + KVD_SUM_DAMAGED + 1 : sum;
}

uint64_t kvd_page_copy_sum(const struct kvd_daemon *d, const void *copy, uint64_t bytes)
{
    return kept(d->backend->ops->sums ? kvd_words_sum(copy, bytes) : XXH3_64bits(copy, bytes));
}

uint32_t kvd_page_sums_at_once(const struct kvd_daemon *d)
{
    return d->backend->ops->sums ? KVD_SUMS_AT_ONCE : 1;
}

int kvd_page_sums(struct kvd_daemon *d, const struct kvd_span *pages, uint32_t n, uint64_t *sums,
                  struct kvd_error *err)
{
    const struct kvd_backend_ops *ops = d->backend->ops;
    int rc = ops->sums ? ops->sums(d->backend, pages, n, sums, err) : KVD_OK;
    for (uint32_t i = 0; i < n && rc == KVD_OK; i++)
        sums[i] = ops->sums ? kept(sums[i])
                            : kvd_page_copy_sum(d, (const void *)(uintptr_t)pages[i].addr,
                                                pages[i].bytes);
    return rc;
}

static void read_blocks(uv_work_t *work)
{
    struct kvd_daemon *d = work->data;
    struct kvd_scrub *s = d->scrub;
    struct kvd_span pages[KVD_SUMS_AT_ONCE];
    for (uint32_t i = 0; i < s->n; i++)
        pages[i] = (struct kvd_span){s->blocks[i].addr, s->blocks[i].bytes};
    s->err = (struct kvd_error){0};
    kvd_page_sums(d, pages, s->n, s->sums, &s->err);
}

static bool has(const uint8_t *bits, uint32_t page)
{
    return bits[page / 8] >> page % 8 & 1;
}

static void set(uint8_t *bits, uint32_t page)
{
    bits[page / 8] |= (uint8_t)(1u << page % 8);
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
    for (uint32_t i = 0; i < s->n_found; i++)
        if (s->found[i].sequence == info->id)
            return true; // for another block
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

// Of a block that only an index has: it has it no longer.
static void lose(struct kvd_daemon *d, const struct kvd_pool_block *b)
{
    struct kvd_pool_namespace_info ns;
    kvd_pool_namespace_info(d->pool, b->ns, &ns);
    kvd_error("damaged namespace=%s plane=%u: a block of a prompt is not what was stored, and is "
              "to be published anew",
              ns.name, b->plane);
    d->scrub->blocks_lost++;
    kvd_pool_block_lost(d->pool, b);
}

static void judge(struct kvd_daemon *d, const struct kvd_pool_block *b, uint64_t sum)
{
    set(d->scrub->known, b->page);
    if (b->sum == sum)
        return;
    struct owners o = {d, b};
    kvd_pool_block_seal(d->pool, b, KVD_SUM_DAMAGED);
    kvd_pool_seq_each(d->pool, report, &o);
    if (!b->seq)
        lose(d, b);
}

static void seal_or_judge(struct kvd_daemon *d, struct kvd_pool_block *b, uint64_t sum)
{
    struct kvd_scrub *s = d->scrub;
    s->checked++;
    if (b->sum == KVD_SUM_NONE) {
        s->sealed++;
        b->sum = sum;
        kvd_pool_block_seal(d->pool, b, sum);
    }
    judge(d, b, sum);
}

static bool paced(const struct kvd_scrub *s)
{
    return !s->demanded && !s->eager;
}

static uint64_t rate(const struct kvd_daemon *d)
{
    return d->config.scrub_rate * (d->backend->ops->sums ? GPU_TIMES : 1);
}

static void on_read(uv_work_t *work, int status)
{
    struct kvd_daemon *d = work->data;
    struct kvd_scrub *s = d->scrub;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < s->n; i++) {
        bytes += s->blocks[i].bytes;
        if (status == 0 && s->err.code == KVD_OK)
            seal_or_judge(d, &s->blocks[i], s->sums[i]);
        kvd_pool_block_drop(d->pool, &s->blocks[i]);
    }
    s->busy = false;
    s->pass_bytes += bytes;
    if (rate(d) && paced(s))
        s->owed_ms += 1000.0 * (double)bytes / (double)rate(d);
    bool failed = status == 0 && s->err.code;
    if (failed) { // a pass that has not looked at all blocks must not count as one
        kvd_error("the scrubber cannot read blocks, and begins anew: %s", s->err.text);
        kvd_daemon_check_device(d);
        begin_pass(d);
    }
    kvd_daemon_work_end(d);
    if (d->state != KVD_STARTING && d->state != KVD_READY)
        return;
    if (failed)
        later(d, REST_MS);
    else
        go_on(d);
}

// -- a pass -------------------------------------------------------------------------------------

static bool see(struct kvd_scrub *s, uint32_t page)
{
    bool new = page / 8 < s->pages && !has(s->seen, page);
    if (new)
        set(s->seen, page);
    return new;
}

static void begin_pass(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    s->walk = (struct kvd_pool_walk){0};
    s->checked = s->pass_bytes = 0;
    s->began_ns = uv_hrtime();
    memset(s->seen, 0, s->pages);
}

static void end_pass(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    if (s->taken_over) {
        char size[32];
        kvd_info("%" PRIu64 " blocks (%s) that an earlier kvd has left were looked at in %.1f ms",
                 s->checked, kvd_format_size(s->pass_bytes, size, sizeof(size)),
                 (double)(uv_hrtime() - s->began_ns) / 1e6);
    }
    s->passes++;
    s->taken_over = false; // nothing of an earlier kvd is left that was not looked at
    s->demanded_passes += s->demanded;
    s->demanded = s->eager = false;
    begin_pass(d);
    later(d, REST_MS);
}

// Takes up the next blocks that are wanted. KVD_E_NOT_FOUND: there are no more; KVD_E_LIMIT: go on
// later.
static int take_up(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    uint32_t most = kvd_page_sums_at_once(d);
    uint64_t bytes = 0;
    int rc = KVD_OK;
    s->n = 0;
    while (s->n < most && !(paced(s) && bytes >= PACED_BYTES)) {
        struct kvd_pool_block *block = &s->blocks[s->n];
        rc = kvd_pool_block_next(d->pool, &s->walk, STEPS, block);
        if (rc)
            break;
        if (block->sum == KVD_SUM_DAMAGED && !block->seq) {
            lose(d, block); // found with a sequence that has it too
        } else if (see(s, block->page) && block->sum != KVD_SUM_DAMAGED) {
            kvd_pool_block_hold(d->pool, block);
            bytes += block->bytes;
            s->n++;
        }
    }
    return s->n ? KVD_OK : rc;
}

// Without a rate only a demand goes on.
static void go_on(struct kvd_daemon *d)
{
    struct kvd_scrub *s = d->scrub;
    if (s->busy || d->state == KVD_DRAINING || d->state == KVD_STOPPING)
        return;
    if (kvd_room_wanted_back(d)) {
        later(d, WANTED_MS);
        return;
    }
    if (paced(s) && (rate(d) == 0 || s->owed_ms >= 1)) {
        uint64_t wait = rate(d) ? (uint64_t)s->owed_ms : REST_MS;
        s->owed_ms = 0;
        later(d, wait);
        return;
    }
    int rc = take_up(d);
    if (rc == KVD_E_NOT_FOUND) {
        end_pass(d);
        return;
    }
    if (rc) {
        later(d, 0);
        return;
    }
    s->busy = true;
    kvd_daemon_work_begin(d);
    s->work.data = d;
    uv_queue_work(&d->loop, &s->work, read_blocks, on_read);
}

// -- for others ---------------------------------------------------------------------------------

bool kvd_scrub_unseen(struct kvd_daemon *d, uint64_t seq, struct kvd_pool_walk *at,
                      struct kvd_pool_block *out)
{
    const struct kvd_scrub *s = d->scrub;
    while (s && s->taken_over && kvd_pool_seq_sealed(d->pool, seq, at, out))
        if (!has(s->known, out->page))
            return true;
    return false;
}

void kvd_scrub_seen(struct kvd_daemon *d, const struct kvd_pool_block *block, uint64_t sum)
{
    if (has(d->scrub->known, block->page))
        return; // two calls at once, or the pass
    d->scrub->first_uses++;
    judge(d, block, sum);
}

static bool count(void *ctx, const struct kvd_pool_slab_info *info)
{
    uint64_t *total = ctx;
    *total += info->kind == KVD_POOL_CODEC ? info->used : 0;
    return true;
}

struct kvd_scrub_state kvd_scrub_look(struct kvd_daemon *d)
{
    const struct kvd_scrub *s = d->scrub;
    struct kvd_scrub_state out = {0};
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
    kvd_metric(
        f, "kvd_first_use_checks_total", "counter",
        "Blocks left by an earlier kvd that were compared as a call was the first to use them.",
        (double)s->first_uses);
    kvd_metric(f, "kvd_damaged_prompt_blocks_total", "counter",
               "Blocks of prompts that were found damaged, and are to be published anew.",
               (double)s->blocks_lost);
    kvd_metric(f, "kvd_blocks_sealed_total", "counter", "Blocks that got a checksum.",
               (double)s->sealed);
    kvd_metric(f, "kvd_damaged_pages", "gauge",
               "Pages in use whose memory is not what was stored; their sequences are refused.",
               info.damaged);
}

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_pool_info info;
    kvd_pool_info(d->pool, &info);
    d->scrub = calloc(1, sizeof(*d->scrub));
    if (!d->scrub)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->scrub->timer);
    d->scrub->timer.data = d;
    d->scrub->pages = kvd_div_up(info.bytes / KVD_PAGE_UNIT, 8);
    d->scrub->seen = calloc(1, d->scrub->pages);
    d->scrub->known = calloc(1, d->scrub->pages);
    d->scrub->taken_over = kvd_ledger_restarts(d->ledger) > 0;
    d->scrub->began_ns = uv_hrtime();
    d->scrub->eager = d->scrub->taken_over && d->backend->ops->sums;
    if (!d->scrub->seen || !d->scrub->known)
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
    free(s->known);
    free(s);
}

const struct kvd_part kvd_part_scrub = {
    .start = start, .end = end, .deinit = deinit, .metrics = metrics};
