// Demotion, written through: a block goes to the tiers soon after it became known, and not when it
// is evicted. So eviction gives memory at once, who is killed has lost little, and others who share
// a tier find it while it is still in use here. What it costs is that blocks are written which are
// never evicted, at tier-rate at most.
//
// What is dropped because somebody asked for it, or as its time is over, is dropped on the tiers
// too. What was in the pool before kvd started may be there already, so they are asked first.
//
// One batch after the other: the loop picks up blocks of one namespace, which keeps their pages,
// the executor copies them in that namespace's turn, and the copies are put. Blocks wait in the
// pool's line, which takes no memory, while no tier takes more.
#include "daemon/service/demote.h"

#include "daemon/core/lifecycle.h"
#include "daemon/sched/exec.h"
#include "daemon/service/events.h"
#include "daemon/service/layout.h"
#include "daemon/session/room.h"
#include "daemon/session/scrub.h"
#include "daemon/tier/pinned.h"
#include "daemon/tier/tiers.h"
#include "kvd.pb-c.h"
#include "pool/blocks.h"

enum {
    BATCH = 64, // blocks
    BATCH_BYTES = 8 << 20,
    STEP_BYTES = 2 << 20, // that are copied between looks at the clock
    STEPS = 2,            // under way: one is looked at while the next one is copied
    TOLD = 256,           // blocks in an event
    DROPS = 1 << 20,      // that wait at most
    DROPPING = 64,        // at once
    AGAIN_MS = 50,        // looks whether a tier takes more
    KEPT_PINNED = 64 << 20,
};

struct item {
    struct kvd_blocks_load load;
    uint8_t layout[32]; // digest
    struct kvd_block *copy[KVD_MAX_PLANES];
    bool damaged; // in memory: not what it was sealed as
    bool no_room; // in memory for its copy
    bool dropped; // from the pool meanwhile
};

struct batch {
    struct kvd_job job; // first
    struct kvd_daemon *d;
    uint32_t n, at, begun; // `at`: that the executor has copied
    uint32_t ends[STEPS];  // of what is under way: `at` after it
    uint32_t waits;        // of the executor
    struct item items[BATCH];
};

struct kvd_demotion {
    struct kvd_pinned *memory; // of the copies; NULL: any
    uv_check_t check;          // each round of the loop: are there new ones?
    uv_timer_t timer;          // runs while there are some and no tier takes them
    struct batch *batch;
    uint32_t ns; // that had the last batch
    struct kvd_fair_flow flows[KVD_MAX_NAMESPACES];
    uint64_t blocks, bytes, again, damaged, waits;
    // Blocks that tiers have now, and that has not been told of.
    struct kvd_prefix_key moved[TOLD];
    uint32_t n_moved, moved_tiers;
    char moved_ns[KVD_MAX_NAMESPACE + 1];
    uint32_t old; // blocks of before the start that have not been picked up, at most
    // Keys that tiers are to drop, from `next_drop` on.
    struct kvd_tier_key *drops;
    uint32_t n_drops, drops_room, next_drop, dropping;
    uint64_t dropped, known;
};

// -- telling ------------------------------------------------------------------------------------
// A namespace may go while its blocks are on their way, and another one have its slot: it is known
// by its name meanwhile, as holding it would keep the slot for as long as a tier is slow.

static void tell_moved(struct kvd_daemon *d)
{
    struct kvd_demotion *m = d->demotion;
    uint32_t ns = m->n_moved ? kvd_pool_namespace_find(d->pool, m->moved_ns) : KVD_POOL_NONE;
    for (uint32_t i = 0; ns != KVD_POOL_NONE && i < kvd_tiers_count(d); i++) {
        const struct kvd_event_of_blocks e = {.kind = KVD__V1__EVENT__KIND__BLOCKS_MOVED,
                                              .keys = m->moved,
                                              .n = m->n_moved,
                                              .tier = kvd_tier_name(kvd_tiers_get_tier(d, i))};
        if (m->moved_tiers & 1u << i)
            kvd_event_blocks(d, ns, &e);
    }
    m->n_moved = 0;
}

static void note_moved(struct kvd_daemon *d, const char *ns, const struct kvd_prefix_key *key,
                       uint32_t tiers)
{
    struct kvd_demotion *m = d->demotion;
    if (m->n_moved == TOLD || strcmp(m->moved_ns, ns) || m->moved_tiers != tiers)
        tell_moved(d);
    snprintf(m->moved_ns, sizeof(m->moved_ns), "%s", ns);
    m->moved_tiers = tiers;
    m->moved[m->n_moved++] = *key;
}

// -- a batch ------------------------------------------------------------------------------------

static bool has_page(const struct item *it, uint32_t plane)
{
    return it->load.plane[plane].page != KVD_POOL_NONE;
}

// -- executor: some pages are copied while those before them are looked at

// Makes room for a block's copies, and notes them.
static uint64_t note_copies(struct kvd_daemon *d, struct item *it, struct kvd_copy *copies,
                            uint32_t *n)
{
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        const struct kvd_blocks_page *from = &it->load.plane[p];
        if (!has_page(it, p))
            continue;
        it->copy[p] = kvd_block_new_in(d->demotion->memory, from->bytes); // may take a while
        it->no_room |= !it->copy[p];
        if (!it->copy[p])
            continue;
        copies[(*n)++] = (struct kvd_copy){
            .to = (uintptr_t)it->copy[p]->payload, .from = from->addr, .bytes = from->bytes};
        bytes += from->bytes;
    }
    return bytes;
}

static void begin_step(struct batch *b, uint32_t which)
{
    struct kvd_copy copies[BATCH * KVD_MAX_PLANES];
    struct kvd_error err = {0};
    uint64_t bytes = 0;
    uint32_t n = 0;
    while (b->begun < b->n && bytes < STEP_BYTES)
        bytes += note_copies(b->d, &b->items[b->begun++], copies, &n);
    b->ends[which] = b->begun;
    b->job.rc = b->d->backend->ops->copy_begin(b->d->backend, copies, n, which, &err);
}

// A page that is no longer what it was sealed as must not get a new checksum.
static void look_at(struct kvd_daemon *d, struct item *it)
{
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        const struct kvd_blocks_page *from = &it->load.plane[p];
        if (it->copy[p] && from->sum > KVD_SUM_DAMAGED)
            it->damaged |= kvd_page_copy_sum(d, it->copy[p]->payload, from->bytes) != from->sum;
    }
}

static void end_step(struct batch *b, uint32_t which)
{
    struct kvd_error err = {0};
    int rc = b->d->backend->ops->copy_end(b->d->backend, which, &err);
    b->waits++;
    b->job.rc = b->job.rc ? b->job.rc : rc;
    while (!b->job.rc && b->at < b->ends[which])
        look_at(b->d, &b->items[b->at++]);
}

static bool copy_batch(struct kvd_daemon *d, struct kvd_job *job)
{
    struct batch *b = (struct batch *)job;
    uint32_t first = 0, n = 0; // that are under way
    (void)d;
    for (;;) {
        bool stops = job->rc || b->begun == b->n || kvd_slice_over(&job->slice);
        if (!stops && n < STEPS) {
            begin_step(b, (first + n++) % STEPS);
        } else if (n) {
            end_step(b, first);
            first = (first + 1) % STEPS;
            n--;
        } else {
            break;
        }
    }
    return !job->rc && b->at < b->n && !atomic_load(&job->cancelled);
}

// A block on its way to all tiers.
struct sending {
    struct kvd_daemon *d;
    struct kvd_blocks_load block; // without pages, nor the number of its namespace
    char ns[KVD_MAX_NAMESPACE + 1];
    uint32_t left;  // planes that are not there yet
    uint32_t tiers; // that have all of them until now
};

// It waits again, where it is there still.
static void send_again(struct sending *s)
{
    s->block.space.ns = kvd_pool_namespace_find(s->d->pool, s->ns);
    s->d->demotion->again++;
    if (s->block.space.ns != KVD_POOL_NONE)
        kvd_blocks_new_again(s->d->pool, &s->block);
}

static void on_stored(void *ctx, uint32_t tiers)
{
    struct sending *s = ctx;
    s->tiers &= tiers;
    if (--s->left)
        return;
    if (s->tiers)
        note_moved(s->d, s->ns, &s->block.key, s->tiers);
    else if (kvd_tiers_count(s->d)) // none: kvd stops
        send_again(s);
    free(s);
}

static void send_block(struct kvd_daemon *d, const struct item *it)
{
    struct sending *s = malloc(sizeof(*s));
    struct kvd_pool_namespace_info info;
    struct kvd_tier_key key;
    if (!s)
        return;
    *s = (struct sending){.d = d, .block = it->load, .left = 1, .tiers = UINT32_MAX};
    kvd_pool_namespace_info(d->pool, it->load.space.ns, &info);
    snprintf(s->ns, sizeof(s->ns), "%s", info.name);
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        if (!it->copy[p] ||
            kvd_tiers_key(d, it->load.space.domain, it->layout, it->load.key.w, p, &key, NULL))
            continue;
        d->demotion->bytes += it->copy[p]->bytes;
        s->left++;
        kvd_tiers_put(d, &key, it->layout, it->copy[p], on_stored, s);
    }
    if (s->left == 1)
        free(s); // all its pages are damaged
    else
        on_stored(s, UINT32_MAX);
}

static void end_item(struct kvd_daemon *d, struct item *it, bool copied)
{
    struct kvd_demotion *m = d->demotion;
    m->damaged += copied && it->damaged;
    copied = copied && !it->damaged && !it->no_room && !it->dropped;
    m->blocks += copied;
    if (copied)
        send_block(d, it);
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        kvd_block_unref(&it->copy[p]);
    kvd_blocks_put_down(d->pool, &it->load);
}

static void go_on(struct kvd_daemon *d);

static void batch_done(struct kvd_daemon *d, struct kvd_job *job)
{
    struct batch *b = (struct batch *)job;
    bool all = b->at == b->n && !job->rc && !job->abandoned;
    d->demotion->waits += b->waits;
    for (uint32_t i = 0; i < b->n; i++)
        end_item(d, &b->items[i], all);
    if (job->rc)
        kvd_daemon_check_device(d);
    free(KVD_TAKE(d->demotion->batch));
    kvd_daemon_work_end(d);
    go_on(d);
}

// Picks up the next block of a namespace; *bytes grows. False: there is none.
static bool pick_up(struct kvd_daemon *d, struct batch *b, uint32_t ns, uint64_t *bytes)
{
    struct item *it = &b->items[b->n];
    if (!kvd_blocks_pick_up(d->pool, ns, &it->load))
        return false;
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        *bytes += it->load.plane[p].bytes;
    }
    if (b->n && it[-1].load.space.layout == it->load.space.layout)
        memcpy(it->layout, it[-1].layout, sizeof(it->layout));
    else
        kvd_layout_digest_bytes(kvd_pool_layout_get(d->pool, it->load.space.layout), it->layout);
    b->n++;
    return true;
}

static void on_timer(uv_timer_t *timer)
{
    go_on(timer->data);
}

static void submit(struct batch *b)
{
    kvd_daemon_work_begin(b->d);
    kvd_exec_submit(b->d, &b->job);
}

// Those of a batch that a tier has go no further.
static void on_known(void *ctx, const uint8_t *where)
{
    struct batch *b = ctx;
    struct kvd_daemon *d = b->d;
    struct kvd_demotion *m = d->demotion;
    uint32_t left = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        bool known = true;
        for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
            known &= !has_page(&b->items[i], p) || *where++;
        m->known += known;
        if (known || d->state == KVD_STOPPING)
            end_item(d, &b->items[i], false);
        else
            b->items[left++] = b->items[i];
    }
    b->n = left;
    if (left) {
        submit(b);
        return;
    }
    free(KVD_TAKE(m->batch));
    go_on(d);
}

// Asks the tiers which blocks of a batch they have. False: nobody can be asked.
static bool ask_for_known(struct batch *b)
{
    struct kvd_tier_key keys[BATCH * KVD_MAX_PLANES];
    uint32_t n = 0;
    for (uint32_t i = 0; i < b->n; i++)
        for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
            if (has_page(&b->items[i], p) &&
                kvd_tiers_key(b->d, b->items[i].load.space.domain, b->items[i].layout,
                              b->items[i].load.key.w, p, &keys[n++], NULL))
                return false;
    return kvd_tiers_has(b->d, keys, n, on_known, b, NULL) == KVD_OK;
}

static void go_on(struct kvd_daemon *d)
{
    struct kvd_demotion *m = d->demotion;
    uint64_t bytes = 0;
    uint32_t ns;
    // What was dropped and is there again is put behind its drop, not before. Somebody may wait
    // for nothing but the room of the last batch.
    if (m->batch || m->n_drops || d->state == KVD_STOPPING || kvd_room_wanted_back(d) ||
        !kvd_blocks_new(d->pool, m->ns, &ns))
        return;
    if (!kvd_tiers_take(d)) {
        if (!uv_is_active((uv_handle_t *)&m->timer))
            uv_timer_start(&m->timer, on_timer, AGAIN_MS, 0);
        return;
    }
    struct batch *b = calloc(1, sizeof(*b));
    if (!b)
        return;
    m->ns = ns;
    while (b->n < BATCH && bytes < BATCH_BYTES && pick_up(d, b, ns, &bytes))
        ;
    if (!b->n) {
        free(b);
        return;
    }
    m->batch = b;
    b->d = d;
    b->job.run = copy_batch;
    b->job.done = batch_done;
    b->job.fair.tenant = ns;
    b->job.fair.flow = &m->flows[ns];
    bool old = m->old;
    m->old -= KVD_MIN(m->old, b->n);
    if (!old || !ask_for_known(b))
        submit(b);
}

// -- what is dropped ----------------------------------------------------------------------------

static void on_dropped(void *ctx, const struct kvd_tier_reply *reply)
{
    struct kvd_demotion *m = ctx;
    (void)reply; // what a tier does not drop expires there
    m->dropping--;
}

static void drop_more(struct kvd_daemon *d)
{
    struct kvd_demotion *m = d->demotion;
    while (m->next_drop < m->n_drops && m->dropping < DROPPING) {
        const struct kvd_tier_key *key = &m->drops[m->next_drop++];
        m->dropped++;
        m->dropping += kvd_tiers_count(d);
        kvd_tiers_drop(d, key, on_dropped, m);
    }
    if (m->next_drop == m->n_drops)
        m->next_drop = m->n_drops = 0;
}

static void note_drop(struct kvd_demotion *m, const struct kvd_tier_key *key)
{
    if (m->n_drops == m->drops_room && m->n_drops < DROPS) {
        uint32_t room = KVD_MAX(2 * m->drops_room, 64u);
        struct kvd_tier_key *more = realloc(m->drops, room * sizeof(*more));
        if (!more)
            return; // it expires there
        m->drops = more;
        m->drops_room = room;
    }
    if (m->n_drops < m->drops_room)
        m->drops[m->n_drops++] = *key;
}

static void block_gone(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                       const struct kvd_prefix_removed *r)
{
    struct kvd_demotion *m = d->demotion;
    uint8_t digest[32];
    struct kvd_tier_key key;
    if (!m || !kvd_tiers_count(d) ||
        (r->reason != KVD_PREFIX_DROPPED && r->reason != KVD_PREFIX_EXPIRED))
        return;
    for (uint32_t i = 0; m->batch && i < m->batch->n; i++) {
        const struct kvd_blocks_load *load = &m->batch->items[i].load;
        m->batch->items[i].dropped |=
            load->space.ns == ns && !memcmp(&load->key, &r->key, sizeof(r->key)) &&
            !memcmp(load->space.domain, r->digest, sizeof(load->space.domain));
    }
    const struct kvd_layout *l = kvd_pool_layout_get(d->pool, layout);
    kvd_layout_digest_bytes(l, digest);
    for (uint32_t p = 0; p < l->n_planes; p++)
        if (kvd_tiers_key(d, r->digest, digest, r->key.w, p, &key, NULL) == KVD_OK)
            note_drop(m, &key);
}

static void on_check(uv_check_t *check)
{
    tell_moved(check->data);
    drop_more(check->data);
    go_on(check->data);
}

// -- the part -----------------------------------------------------------------------------------

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    if (!kvd_tiers_count(d))
        return KVD_OK;
    d->demotion = calloc(1, sizeof(*d->demotion));
    if (!d->demotion)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (d->backend->ops->host_pin)
        d->demotion->memory = kvd_pinned_new(d->backend, KEPT_PINNED);
    uv_check_init(&d->loop, &d->demotion->check);
    uv_timer_init(&d->loop, &d->demotion->timer);
    d->demotion->check.data = d->demotion->timer.data = d;
    uv_check_start(&d->demotion->check, on_check);
    kvd_blocks_note_new(d->pool);
    uint32_t ns;
    d->demotion->old = kvd_blocks_new(d->pool, 0, &ns);
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    if (!d->demotion)
        return;
    uv_close((uv_handle_t *)&d->demotion->check, NULL);
    uv_close((uv_handle_t *)&d->demotion->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    if (!d->demotion)
        return;
    kvd_pinned_free(&d->demotion->memory);
    free(d->demotion->drops);
    free(KVD_TAKE(d->demotion));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_demotion *m = d->demotion;
    uint32_t ns;
    if (!m)
        return;
    kvd_metric(f, "kvd_demoted_blocks_total", "counter", "Blocks that were sent to the tiers.",
               (double)m->blocks);
    kvd_metric(f, "kvd_demoted_bytes_total", "counter", "Bytes of them.", (double)m->bytes);
    kvd_metric(f, "kvd_demotion_waiting_blocks", "gauge",
               "Blocks that became known and were not sent to the tiers yet.",
               kvd_blocks_new(d->pool, 0, &ns));
    kvd_metric(
        f, "kvd_demotion_waits_total", "counter",
        "Times that kvd waited for copies of them, of several blocks each if they are small.",
        (double)m->waits);
    kvd_metric(f, "kvd_demotion_again_total", "counter",
               "Times that no tier had taken a block, which waits again then.", (double)m->again);
    kvd_metric(f, "kvd_demotion_known_blocks_total", "counter",
               "Blocks of before the start that a tier had already.", (double)m->known);
    kvd_metric(f, "kvd_demotion_dropped_total", "counter",
               "Pages of blocks that tiers were told to drop, as the pool was.",
               (double)m->dropped);
    kvd_metric(f, "kvd_demotion_damaged_blocks_total", "counter",
               "Blocks that were not sent, as their memory was not what was stored.",
               (double)m->damaged);
}

const struct kvd_part kvd_part_demotion = {
    .start = start, .end = end, .deinit = deinit, .block_gone = block_gone, .metrics = metrics};
