// Emptying an extent, so that another namespace, layout or plane can have it.
//
// Blocks go one by one, those least worth keeping first, and they lie anywhere: until a whole
// extent happens to be empty, nearly all of a cache has gone (of 8,192 blocks in 64 extents 7,895,
// for one extent). So the extent is chosen of which least hangs: a block goes with all that is
// behind it, as runs have no holes. A look at all entries of an index finds it, once an extent.
//
// That takes 130 to 300 ms for a million blocks, so it is done in steps, and the index and the pool
// go on changing in between. What was counted is then only nearly true. So nothing relies on it:
// the extent that was chosen gives out no pages any more (extent_shut), what it has is counted
// again, and what goes is what may be evicted at that moment: nothing that is held or leased by
// then. If the extent has pages that are not blocks', it is opened again, and the next best one is
// tried. All of this is the process's own: an index or a region that is opened amid it knows
// nothing of it.
#include "pool/blocks.h"
#include "pool/internal.h"

#include <time.h>

enum {
    TRIES = 8,  // extents that are counted again
    ROUNDS = 3, // of going through what an extent has, as blocks may have come behind others
    CLIMB = 4,  // a removal takes as long as looking at so many
};

// By entry: itself and what is behind it.
struct behind {
    uint32_t blocks, ends;
    uint32_t left : 31; // of those right behind it, that have not been added
    uint32_t stays : 1; // one of them is held or leased
};

enum { UNKNOWN, STAYS, GOES }; // of entries

struct vacate {
    bool (*phase)(struct kvd_pool *pool, struct vacate *v); // what is done next; false: nothing
    uint32_t next;    // entry, in those phases that go through all
    uint32_t left;    // that the step may look at
    uint32_t n;       // entries that are looked at have numbers below it
    uint64_t changes; // of the index, when it began
    struct behind *behind;
    uint64_t *cost; // by extent: blocks that go with it
    // By extent: those of its pages that the index has, and nothing else; KVD_POOL_NONE: it can't
    // be emptied.
    uint32_t *pages;
    // Of the extent that was chosen:
    uint32_t extent;
    uint32_t met; // its pages that are blocks'
    bool kept;    // one of its blocks is held or leased
    uint32_t tries, rounds;
    uint8_t *is; // by entry
    bool *cut;   // by entry: it goes
    uint32_t n_cut;
    struct kvd_prefix_cursor at;
    uint64_t gone; // blocks, in all
    uint64_t gone_before;
    enum kvd_prefix_reason reason;
    uint32_t now;
};

static const struct kept *index_of(const struct kvd_pool *pool)
{
    return pool->kept[pool->vacated_of];
}

static bool has_end(const struct kvd_pool *pool, uint32_t entry)
{
    uint32_t end = index_of(pool)->end[entry];
    const struct region_seq *s = end ? &pool->seq[end - 1] : NULL;
    return s && s->generation & 1 && s->ns == pool->vacated_of && s->end_entry == entry + 1;
}

static uint32_t extent_of(const struct kvd_pool *pool, const struct kvd_prefix_entry_info *e,
                          uint32_t plane, uint32_t *page)
{
    const struct kept *k = index_of(pool);
    *page = kept_page(pool, k, k->layout_of[e->domain], e->value, plane);
    return *page == KVD_POOL_NONE ? KVD_POOL_NONE : *page / pool->head->slots;
}

static uint32_t planes_of(const struct kvd_pool *pool, const struct kvd_prefix_entry_info *e)
{
    return pool->layout[index_of(pool)->layout_of[e->domain]].l.n_planes;
}

static uint64_t changes_of(const struct kept *k)
{
    struct kvd_prefix_info info;
    kvd_prefix_info(k->ix, &info);
    uint64_t n = info.inserted;
    for (int i = 0; i < KVD_PREFIX_REASONS; i++)
        n += info.removed[i];
    return n;
}

// The next entry of a phase that goes through n of them. False: there is none, or the step is over.
static bool next_entry(struct vacate *v, uint32_t n, uint32_t *i)
{
    if (v->next >= n || !v->left)
        return false;
    v->left--;
    *i = v->next++;
    return true;
}

// The phase has gone through all.
static bool then(struct vacate *v, bool (*phase)(struct kvd_pool *pool, struct vacate *v))
{
    v->phase = phase;
    v->next = 0;
    return true;
}

// -- looking for the extent ---------------------------------------------------------------------

static bool choose(struct kvd_pool *pool, struct vacate *v);
static bool mark(struct kvd_pool *pool, struct vacate *v);

// A page that a sequence has too, other than the ends that go with its block, stays.
static bool count_pages(struct kvd_pool *pool, struct vacate *v)
{
    struct kvd_prefix_entry_info e;
    uint32_t i, page;
    while (next_entry(v, v->n, &i)) {
        if (!kvd_prefix_get(index_of(pool)->ix, i, &e))
            continue;
        const struct behind *b = &v->behind[i];
        for (uint32_t p = 0; p < planes_of(pool, &e); p++) {
            uint32_t x = extent_of(pool, &e, p, &page);
            if (x == KVD_POOL_NONE || v->pages[x] == KVD_POOL_NONE)
                continue;
            bool goes = !b->stays && pool->page[page].refs == 1 + b->ends;
            v->pages[x] = goes ? v->pages[x] + 1 : KVD_POOL_NONE;
            v->cost[x] += b->blocks;
        }
    }
    return v->next < v->n || then(v, choose);
}

// From the last blocks on: one is added to what is before it when all behind it has been. What has
// come or gone since they were counted is added to whatever has its number.
static bool add_up(struct kvd_pool *pool, struct vacate *v)
{
    const struct kvd_prefix *ix = index_of(pool)->ix;
    struct kvd_prefix_entry_info e;
    uint32_t i;
    while (next_entry(v, v->n, &i)) {
        if (!kvd_prefix_get(ix, i, &e) || e.children)
            continue;
        for (uint32_t at = i; e.parent < v->n;) {
            struct behind *up = &v->behind[e.parent];
            if (!up->left)
                break;
            up->blocks += v->behind[at].blocks;
            up->ends += v->behind[at].ends;
            up->stays |= v->behind[at].stays;
            at = e.parent;
            v->left -= v->left > 0;
            if (--up->left || !kvd_prefix_get(ix, at, &e))
                break;
        }
    }
    return v->next < v->n || then(v, count_pages);
}

static bool count_behind(struct kvd_pool *pool, struct vacate *v)
{
    struct kvd_prefix_entry_info e;
    uint32_t i;
    while (next_entry(v, v->n, &i))
        if (kvd_prefix_get(index_of(pool)->ix, i, &e))
            v->behind[i] = (struct behind){.blocks = 1,
                                           .ends = has_end(pool, i),
                                           .left = e.children & INT32_MAX,
                                           .stays = e.holds || e.lease > v->now};
    return v->next < v->n || then(v, add_up);
}

// As many pages more than were counted may have become an index's since.
static uint32_t cheapest(const struct kvd_pool *pool, const struct vacate *v)
{
    uint32_t best = KVD_POOL_NONE;
    uint64_t since = changes_of(index_of(pool)) - v->changes;
    for (uint32_t x = 0; x < pool->head->n_extents; x++) {
        const struct region_extent *e = &pool->extent[x];
        if (e->slab != KVD_POOL_NONE && pool->slab[e->slab].ns == pool->vacated_of && v->pages[x] &&
            v->pages[x] != KVD_POOL_NONE && v->pages[x] + since >= e->used &&
            (best == KVD_POOL_NONE || v->cost[x] < v->cost[best]))
            best = x;
    }
    return best;
}

static bool begin_marks(struct kvd_pool *pool, struct vacate *v)
{
    struct kvd_prefix_info info;
    kvd_prefix_info(index_of(pool)->ix, &info);
    free(v->is);
    free(v->cut);
    v->n_cut = info.ever;
    v->is = calloc(v->n_cut + 1, sizeof(*v->is));
    v->cut = calloc(v->n_cut + 1, sizeof(*v->cut));
    v->met = 0;
    v->kept = false;
    return v->is && v->cut && then(v, mark);
}

static bool choose(struct kvd_pool *pool, struct vacate *v)
{
    v->extent = v->tries++ < TRIES ? cheapest(pool, v) : KVD_POOL_NONE;
    if (v->extent == KVD_POOL_NONE)
        return false;
    extent_shut(pool, v->extent);
    v->rounds = 0;
    return begin_marks(pool, v);
}

// -- emptying it --------------------------------------------------------------------------------

// It can't be emptied. If something of it has gone, whoever needs room looks at what there is now.
static bool give_up(struct kvd_pool *pool, struct vacate *v)
{
    extent_open(pool);
    v->pages[v->extent] = KVD_POOL_NONE;
    return !v->gone && then(v, choose);
}

static bool cut(struct kvd_pool *pool, struct vacate *v)
{
    uint32_t ns = pool->vacated_of, looks = KVD_MAX(v->left / CLIMB, 1u);
    bool all = blocks_cut(pool, ns, v->cut, v->n_cut, &v->at, &looks, v->reason, &v->gone);
    v->left = 0;
    if (!pool->shut || pool->vacated_of == KVD_POOL_NONE)
        return false; // it is empty
    if (!all)
        return true;
    // Blocks may have come behind those that go.
    bool again = v->gone > v->gone_before && ++v->rounds < ROUNDS;
    return again ? begin_marks(pool, v) : give_up(pool, v);
}

// What is behind an entry that goes, goes.
static bool spread(struct kvd_pool *pool, struct vacate *v)
{
    const struct kvd_prefix *ix = index_of(pool)->ix;
    struct kvd_prefix_entry_info e;
    uint32_t i;
    while (next_entry(v, v->n_cut, &i)) {
        uint32_t at = i;
        for (; at < v->n_cut && v->is[at] == UNKNOWN; v->left -= v->left > 0)
            at = kvd_prefix_get(ix, at, &e) ? e.parent : KVD_PREFIX_NONE;
        uint8_t is = at < v->n_cut ? v->is[at] : STAYS;
        for (at = i; at < v->n_cut && v->is[at] == UNKNOWN;) {
            v->is[at] = is;
            at = kvd_prefix_get(ix, at, &e) ? e.parent : KVD_PREFIX_NONE;
        }
        v->cut[i] = v->is[i] == GOES;
        v->kept |= v->cut[i] && kvd_prefix_get(ix, i, &e) && (e.holds || e.lease > v->now);
    }
    if (v->next < v->n_cut)
        return true;
    v->at = (struct kvd_prefix_cursor){0};
    v->gone_before = v->gone;
    return v->kept ? give_up(pool, v) : then(v, cut);
}

static bool mark(struct kvd_pool *pool, struct vacate *v)
{
    struct kvd_prefix_entry_info e;
    uint32_t i, page;
    while (next_entry(v, v->n_cut, &i))
        for (uint32_t p = 0; kvd_prefix_get(index_of(pool)->ix, i, &e) && p < planes_of(pool, &e);
             p++)
            if (extent_of(pool, &e, p, &page) == v->extent) {
                v->is[i] = GOES;
                v->met++;
            }
    if (v->next < v->n_cut)
        return true;
    return v->met < pool->extent[v->extent].used ? give_up(pool, v) : then(v, spread);
}

// -- from its beginning to its end --------------------------------------------------------------

static void vacate_free(struct vacate **vp)
{
    struct vacate *v = KVD_TAKE(*vp);
    if (!v)
        return;
    free(v->behind);
    free(v->cost);
    free(v->pages);
    free(v->is);
    free(v->cut);
    free(v);
}

uint64_t vacate_begin(struct kvd_pool *pool, uint32_t ns, uint64_t bytes)
{
    if (pool->vacate)
        return pool->vacates;
    uint32_t from = giver_of_room(pool, ns, bytes), extents = pool->head->n_extents;
    const struct kept *k = pool->kept && from != KVD_POOL_NONE ? pool->kept[from] : NULL;
    struct vacate *v KVD_AUTO(vacate_free) = k ? calloc(1, sizeof(*v)) : NULL;
    struct kvd_prefix_info info;
    if (!v)
        return 0;
    kvd_prefix_info(k->ix, &info);
    v->phase = count_behind;
    v->n = info.ever;
    v->changes = changes_of(k);
    v->now = (uint32_t)time(NULL);
    bool quota = from == ns && pool->ns[ns].quota && pool->ns[ns].used + bytes > pool->ns[ns].quota;
    v->reason = quota ? KVD_PREFIX_EVICTED_QUOTA : KVD_PREFIX_EVICTED_ROOM;
    v->behind = calloc(v->n + 1, sizeof(*v->behind));
    v->cost = calloc(extents, sizeof(*v->cost));
    v->pages = calloc(extents, sizeof(*v->pages));
    if (!v->behind || !v->cost || !v->pages)
        return 0; // evicting one by one needs no memory
    pool->vacated_of = from;
    pool->vacate = KVD_TAKE(v);
    return ++pool->vacates;
}

bool kvd_pool_vacate_step(struct kvd_pool *pool, uint32_t blocks)
{
    struct vacate *v = pool->vacate;
    if (!v)
        return false;
    bool more = pool->vacated_of != KVD_POOL_NONE;
    // An extent that was shut may have been emptied by others.
    if (more && (v->phase == mark || v->phase == spread || v->phase == cut) && !pool->shut) {
        v->gone++;
        more = false;
    }
    for (v->left = KVD_MAX(blocks, 1u); more && v->left && pool->vacated_of != KVD_POOL_NONE;)
        more = v->phase(pool, v);
    if (more && pool->vacated_of != KVD_POOL_NONE)
        return true;
    vacate_drop(pool);
    return false;
}

void vacate_drop(struct kvd_pool *pool)
{
    if (!pool->vacate)
        return;
    extent_open(pool);
    pool->vacated = pool->vacate->gone > 0;
    vacate_free(&pool->vacate);
    pool->vacated_of = KVD_POOL_NONE;
}

enum vacated vacate_result(const struct kvd_pool *pool, uint64_t number)
{
    if (pool->vacate && number == pool->vacates)
        return VACATE_RUNS;
    return number < pool->vacates || pool->vacated ? VACATE_SOME : VACATE_NOTHING;
}

bool vacate_for_room(struct kvd_pool *pool, uint32_t ns, uint64_t bytes)
{
    uint64_t number = vacate_begin(pool, ns, bytes);
    while (kvd_pool_vacate_step(pool, UINT32_MAX))
        continue;
    return number && vacate_result(pool, number) == VACATE_SOME;
}
