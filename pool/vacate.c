// Emptying an extent, so that another namespace, layout or plane can have it.
//
// Blocks go one by one, those least worth keeping first, and they lie anywhere: until a whole
// extent happens to be empty, nearly all of a cache has gone (of 8,192 blocks in 64 extents 7,895,
// for one extent). So the extent is chosen of which least hangs: a block goes with all that is
// behind it, as runs have no holes. One look at all entries of an index finds it, once an extent.
// That takes some 20 ms for 128,000 blocks and 300 ms for a million, in one piece.
#include "pool/blocks.h"
#include "pool/internal.h"

#include <time.h>

// By entry: itself and what is behind it.
struct behind {
    uint32_t blocks, ends;
    uint32_t left; // of those right behind it, that have not been added
    uint8_t stays; // one of them is held or leased
};

struct look {
    struct kvd_pool *pool;
    const struct kept *k;
    uint32_t ns, n; // entries have numbers below n
    struct behind *behind;
    uint64_t *cost; // by extent: blocks that go with it
    uint32_t
        *pages;   // of it that the index has, and nothing else; KVD_POOL_NONE: it can't be emptied
    uint8_t *cut; // by entry: whether it goes
};

static void look_free(struct look *l)
{
    free(l->behind);
    free(l->cost);
    free(l->pages);
    free(l->cut);
}

static bool has_end(const struct look *l, uint32_t entry)
{
    const struct kvd_pool *pool = l->pool;
    uint32_t end = l->k->end[entry];
    const struct region_seq *s = end ? &pool->seq[end - 1] : NULL;
    return s && s->generation & 1 && s->ns == l->ns && s->end_entry == entry + 1;
}

static void count_behind(const struct look *l, uint32_t now)
{
    struct kvd_prefix_entry_info e;
    for (uint32_t i = 0; i < l->n; i++)
        if (kvd_prefix_get(l->k->ix, i, &e))
            l->behind[i] = (struct behind){1, has_end(l, i), e.children, e.holds || e.lease > now};
    // From the last blocks on: one is added to what is before it when all behind it has been.
    for (uint32_t i = 0; i < l->n; i++) {
        if (!kvd_prefix_get(l->k->ix, i, &e) || e.children)
            continue;
        for (uint32_t at = i; e.parent != KVD_PREFIX_NONE;) {
            struct behind *up = &l->behind[e.parent];
            up->blocks += l->behind[at].blocks;
            up->ends += l->behind[at].ends;
            up->stays |= l->behind[at].stays;
            at = e.parent;
            if (--up->left || !kvd_prefix_get(l->k->ix, at, &e))
                break;
        }
    }
}

static uint32_t extent_of(const struct look *l, const struct kvd_prefix_entry_info *e,
                          uint32_t plane, uint32_t *page)
{
    *page = kept_page(l->pool, l->k, l->k->layout_of[e->domain], e->value, plane);
    return *page == KVD_POOL_NONE ? KVD_POOL_NONE : *page / l->pool->head->slots;
}

static uint32_t planes_of(const struct look *l, const struct kvd_prefix_entry_info *e)
{
    return l->pool->layout[l->k->layout_of[e->domain]].l.n_planes;
}

// A page that a sequence has too, other than the ends that go with its block, stays.
static void count_pages(const struct look *l)
{
    struct kvd_prefix_entry_info e;
    uint32_t page;
    for (uint32_t i = 0; i < l->n; i++) {
        if (!kvd_prefix_get(l->k->ix, i, &e))
            continue;
        const struct behind *b = &l->behind[i];
        for (uint32_t p = 0; p < planes_of(l, &e); p++) {
            uint32_t x = extent_of(l, &e, p, &page);
            if (x == KVD_POOL_NONE || l->pages[x] == KVD_POOL_NONE)
                continue;
            bool goes = !b->stays && l->pool->page[page].refs == 1 + b->ends;
            l->pages[x] = goes ? l->pages[x] + 1 : KVD_POOL_NONE;
            l->cost[x] += b->blocks;
        }
    }
}

static uint32_t cheapest(const struct look *l)
{
    uint32_t best = KVD_POOL_NONE;
    for (uint32_t x = 0; x < l->pool->head->n_extents; x++)
        if (l->pages[x] && l->pages[x] != KVD_POOL_NONE && l->pages[x] == l->pool->extent[x].used &&
            (best == KVD_POOL_NONE || l->cost[x] < l->cost[best]))
            best = x;
    return best;
}

enum { UNKNOWN, STAYS, GOES };

// Marks what has a page in the extent, and all behind it.
static void mark(const struct look *l, uint32_t extent)
{
    struct kvd_prefix_entry_info e;
    uint32_t page;
    for (uint32_t i = 0; i < l->n; i++)
        if (kvd_prefix_get(l->k->ix, i, &e))
            for (uint32_t p = 0; p < planes_of(l, &e); p++)
                if (extent_of(l, &e, p, &page) == extent)
                    l->cut[i] = GOES;
    for (uint32_t i = 0; i < l->n; i++) {
        uint32_t at = i;
        while (at != KVD_PREFIX_NONE && l->cut[at] == UNKNOWN)
            at = kvd_prefix_get(l->k->ix, at, &e) ? e.parent : KVD_PREFIX_NONE;
        uint8_t is = at == KVD_PREFIX_NONE ? STAYS : l->cut[at];
        for (at = i; at != KVD_PREFIX_NONE && l->cut[at] == UNKNOWN;) {
            l->cut[at] = is;
            at = kvd_prefix_get(l->k->ix, at, &e) ? e.parent : KVD_PREFIX_NONE;
        }
    }
    for (uint32_t i = 0; i < l->n; i++)
        l->cut[i] = l->cut[i] == GOES;
}

bool vacate_for_room(struct kvd_pool *pool, uint32_t ns, uint64_t bytes)
{
    uint32_t from = giver_of_room(pool, ns, bytes);
    struct kept *k = pool->kept && from != KVD_POOL_NONE ? pool->kept[from] : NULL;
    struct kvd_prefix_info info;
    uint32_t extents = pool->head->n_extents;
    if (!k)
        return false;
    kvd_prefix_info(k->ix, &info);
    struct look l KVD_AUTO(look_free) = {.pool = pool, .k = k, .ns = from, .n = info.ever};
    l.behind = calloc(l.n + 1, sizeof(*l.behind));
    l.cost = calloc(extents, sizeof(*l.cost));
    l.pages = calloc(extents, sizeof(*l.pages));
    l.cut = calloc(l.n + 1, 1);
    if (!l.behind || !l.cost || !l.pages || !l.cut)
        return false; // evicting one by one needs no memory
    count_behind(&l, (uint32_t)time(NULL));
    count_pages(&l);
    uint32_t x = cheapest(&l);
    if (x == KVD_POOL_NONE)
        return false;
    mark(&l, x);
    enum kvd_prefix_reason reason =
        from == ns && pool->ns[ns].quota && pool->ns[ns].used + bytes > pool->ns[ns].quota
            ? KVD_PREFIX_EVICTED_QUOTA
            : KVD_PREFIX_EVICTED_ROOM;
    uint64_t before = pool->head->used;
    bool any = blocks_cut(pool, from, l.cut, reason) > 0;
    struct region_namespace *giver = &pool->ns[from];
    giver->borrow -= KVD_MIN(giver->borrow, before - pool->head->used); // as evict_something
    return any;
}
