// Looking up blocks, and sequences made of them. Read blocks.h first.
#include "pool/blocks_internal.h"

// -- looking up ---------------------------------------------------------------------------------

uint32_t kvd_blocks_first_seen(const struct kvd_plane *g, uint32_t blocks)
{
    return (uint32_t)(kvd_pool_visible(g->window, (uint64_t)blocks * KVD_PAGE_TOKENS) /
                      KVD_PAGE_TOKENS);
}

// How many of the leading blocks of a path have pages for all that the token behind them sees.
static uint32_t with_pages(const struct kvd_pool *pool, const struct kept *k, uint32_t layout,
                           const uint32_t *path, uint32_t known)
{
    const struct kvd_layout *l = &pool->layout[layout].l;
    uint32_t run[KVD_MAX_PLANES] = {0}, most = 0; // blocks in a row that have a page there
    for (uint32_t i = 0; i < known; i++) {
        struct kvd_prefix_entry_info e;
        bool enough = true;
        kvd_prefix_get(k->ix, path[i], &e);
        for (uint32_t p = 0; p < l->n_planes; p++) {
            run[p] = kept_page(pool, k, layout, e.value, p) == KVD_POOL_NONE ? 0 : run[p] + 1;
            enough &= run[p] >= i + 1 - kvd_blocks_first_seen(&l->planes[p], i + 1);
        }
        most = enough ? i + 1 : most;
    }
    return most;
}

// The best place among the known blocks: as far back as possible, and with a window if there is
// one.
static void choose(const struct kvd_pool *pool, const struct kvd_blocks_space *space,
                   const uint32_t *path, struct kvd_blocks_match *m)
{
    const struct kept *k = pool->kept[space->ns];
    uint32_t pages = with_pages(pool, k, space->layout, path, m->known);
    m->at = (struct kvd_blocks_at){.ns = space->ns,
                                   .layout = space->layout,
                                   .blocks = pages,
                                   .entry = pages ? path[pages - 1] : KVD_PREFIX_NONE,
                                   .depth = pages};
    for (uint32_t n = m->known; n > 0 && n >= pages; n--) {
        const struct region_seq *end = end_of(pool, space->ns, path[n - 1], n);
        uint64_t cut = (uint64_t)n * KVD_PAGE_TOKENS;
        if (!end || end->doomed || cut < blocks_least_length(pool, end))
            continue;
        const struct kvd_layout *l = layout_of(pool, end);
        uint64_t from = 0; // where the window of every plane has begun
        for (uint32_t p = 0; p < l->n_planes; p++)
            from = KVD_MAX(from, KVD_MAX(end->reach[p].hist_end, (uint64_t)l->planes[p].sink));
        m->at.blocks = n;
        m->at.end = seq_id(pool, end);
        m->at.entry = end->end_entry - 1;
        m->at.depth = (uint32_t)(end->length / KVD_PAGE_TOKENS);
        m->window = cut > from ? (uint32_t)(cut - from) : 0;
        m->end = end->length == cut;
        return;
    }
}

// Where the place ends before the known blocks do, as one behind it was damaged: says so.
static bool was_damaged(const struct kvd_pool *pool, const struct kvd_blocks_space *space,
                        const uint32_t *path, struct kvd_blocks_match *m)
{
    const struct kept *k = pool->kept[space->ns];
    struct kvd_prefix_entry_info e;
    bool whole = true;
    if (m->at.blocks == m->known)
        return false;
    kvd_prefix_get(k->ix, path[m->at.blocks], &e);
    for (uint32_t p = 0; p < pool->layout[space->layout].l.n_planes; p++)
        whole &= kept_page(pool, k, space->layout, e.value, p) != KVD_POOL_NONE;
    uint32_t when;
    if (whole || kvd_prefix_noted(k->ix, path[m->at.blocks], &when) != KVD_PREFIX_DAMAGED)
        return false;
    m->why = KVD_PREFIX_DAMAGED;
    m->when = when;
    return true;
}

void kvd_blocks_match(struct kvd_pool *pool, const struct kvd_blocks_space *space, bool use,
                      struct kvd_blocks_match *m)
{
    struct kept *k = pool->kept ? pool->kept[space->ns] : NULL;
    struct blocks_room *room = k ? blocks_room(pool, NULL) : NULL;
    m->known = m->window = m->when = 0;
    m->end = false;
    m->why = KVD_PREFIX_UNKNOWN;
    m->at = (struct kvd_blocks_at){.ns = space->ns, .layout = space->layout};
    uint32_t domain = room ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    uint32_t n = KVD_MIN(m->n, (uint32_t)KVD_BLOCKS_MAX);
    if (domain == KVD_PREFIX_NONE)
        return;
    struct kvd_prefix_query q = {.domain = domain, .n = n, .keys = m->keys};
    if (use)
        kvd_prefix_match(k->ix, &q, 1, 0);
    else
        kvd_prefix_peek(k->ix, &q, 1);
    m->known = q.found;
    blocks_path(k, q.entry, q.found, room->path);
    choose(pool, space, room->path, m);
    if (was_damaged(pool, space, room->path, m))
        return;
    m->why = q.found < n ? kvd_prefix_why(k->ix, domain, &m->keys[q.found], &m->when)
                         : KVD_PREFIX_PRESENT;
}

bool kvd_blocks_space_at(const struct kvd_pool *pool, uint32_t ns, uint32_t number,
                         struct kvd_blocks_space *out)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    const uint8_t *digest = k ? kvd_prefix_domain_at(k->ix, number) : NULL;
    if (!digest)
        return false;
    *out = (struct kvd_blocks_space){.ns = ns, .layout = k->layout_of[number]};
    memcpy(out->domain, digest, sizeof(out->domain));
    return true;
}

int kvd_blocks_find(struct kvd_pool *pool, uint32_t ns, const struct kvd_prefix_key *key,
                    struct kvd_blocks_space *space, struct kvd_blocks_match *m)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    struct blocks_room *room = k ? blocks_room(pool, NULL) : NULL;
    *m = (struct kvd_blocks_match){0};
    for (uint32_t i = 0; room && i < KVD_POOL_DOMAINS; i++) {
        uint32_t when, entry = kvd_prefix_entry(k->ix, i, key);
        enum kvd_prefix_reason why = kvd_prefix_why(k->ix, i, key, &when);
        if (why != KVD_PREFIX_UNKNOWN) {
            m->why = why;
            m->when = when;
        }
        if (entry == KVD_PREFIX_NONE || !kvd_blocks_space_at(pool, ns, i, space))
            continue;
        struct kvd_prefix_entry_info e = {.parent = entry};
        while (e.parent != KVD_PREFIX_NONE && m->known < KVD_BLOCKS_MAX &&
               kvd_prefix_get(k->ix, e.parent, &e))
            m->known++;
        blocks_path(k, entry, m->known, room->path);
        choose(pool, space, room->path, m);
        was_damaged(pool, space, room->path, m);
        return KVD_OK;
    }
    return KVD_E_NOT_FOUND;
}

uint32_t kvd_blocks_entry(const struct kvd_pool *pool, uint32_t ns,
                          const struct kvd_prefix_key *key)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    uint32_t entry = KVD_PREFIX_NONE;
    for (uint32_t i = 0; k && i < KVD_POOL_DOMAINS && entry == KVD_PREFIX_NONE; i++)
        entry = kvd_prefix_entry(k->ix, i, key);
    return entry;
}

// -- holding ------------------------------------------------------------------------------------

int kvd_blocks_hold(struct kvd_pool *pool, const struct kvd_blocks_at *at, struct kvd_error *err)
{
    if (!at->blocks)
        return kvd_fail(err, KVD_E_NOT_FOUND, "no blocks are there");
    int rc = kvd_prefix_hold(pool->kept[at->ns]->ix, at->entry, err);
    if (rc == KVD_OK && at->end)
        kvd_pool_seq_pin(pool, at->end);
    return rc;
}

void kvd_blocks_release(struct kvd_pool *pool, const struct kvd_blocks_at *at)
{
    kvd_prefix_release(pool->kept[at->ns]->ix, at->entry);
    if (at->end)
        kvd_pool_seq_unpin(pool, at->end);
}

// -- adopting -----------------------------------------------------------------------------------

static int adopt_end(struct kvd_pool *pool, const struct kvd_blocks_at *at, uint32_t blocks,
                     uint64_t *seq, struct kvd_error *err)
{
    struct region_seq *end = seq_find(pool, at->end);
    int rc = kvd_pool_seq_fork(pool, at->end, seq, err);
    if (rc)
        return rc;
    if (end->lru_stamp) // one that was passed stays so
        lru_move(pool, end, false);
    rc = kvd_pool_truncate(pool, *seq, (uint64_t)blocks * KVD_PAGE_TOKENS, err);
    if (rc)
        kvd_pool_seq_release(pool, *seq);
    return rc;
}

static void refer(struct kvd_pool *pool, struct region_table *t, uint32_t entry, uint32_t page)
{
    page_ref(pool, page);
    table_set(pool, t, entry, page);
}

// Puts the pages of a plane's blocks where a sequence of that length has them.
static void put_pages(struct kvd_pool *pool, struct region_seq *s, uint32_t p, uint32_t blocks)
{
    const struct kvd_plane *g = &layout_of(pool, s)->planes[p];
    const struct block_pages *pages = pool->blocks_room->pages;
    uint32_t sink = g->sink / KVD_PAGE_TOKENS,
             first = KVD_MAX(sink, kvd_blocks_first_seen(g, blocks));
    for (uint32_t i = 0; i < KVD_MIN(sink, blocks); i++)
        refer(pool, &s->table[p][KVD_POOL_BF16], i, pages[i].page[p]);
    if (first < blocks)
        table_start(&s->table[p][KVD_POOL_CODEC], first - sink);
    for (uint32_t i = first; i < blocks; i++)
        refer(pool, &s->table[p][KVD_POOL_CODEC], i - sink, pages[i].page[p]);
    s->reach[p].hist_end = KVD_MAX((uint64_t)blocks * KVD_PAGE_TOKENS, (uint64_t)g->sink);
    s->reach[p].first = g->window ? (uint64_t)first * KVD_PAGE_TOKENS : 0;
}

static uint32_t table_blocks_wanted(const struct kvd_layout *l, uint32_t blocks)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < l->n_planes; p++) {
        uint32_t sink = l->planes[p].sink / KVD_PAGE_TOKENS;
        n += (uint32_t)kvd_div_up(KVD_MIN(sink, blocks), KVD_TABLE_ENTRIES);
        n += (uint32_t)kvd_div_up(blocks, KVD_TABLE_ENTRIES) + 1;
    }
    return n;
}

static int adopt_pages(struct kvd_pool *pool, const struct kvd_blocks_at *at, uint32_t blocks,
                       uint64_t *seq, struct kvd_error *err)
{
    const struct kept *k = pool->kept[at->ns];
    struct blocks_room *room = blocks_room(pool, err);
    const struct kvd_layout *l = &pool->layout[at->layout].l;
    struct region_seq *s;
    if (!room)
        return err ? err->code : KVD_E_INTERNAL;
    blocks_path(k, at->entry, at->depth, room->path);
    if (with_pages(pool, k, at->layout, room->path, blocks) < blocks)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "planes with windows lack what they would see after %u blocks", blocks);
    int rc = share_take(pool, at->ns, SHARE_BLOCKS, table_blocks_wanted(l, blocks), err);
    if (rc == KVD_OK)
        rc = seq_prepare(pool, at->ns, at->layout, &s, err);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < blocks; i++) {
        struct kvd_prefix_entry_info e;
        kvd_prefix_get(k->ix, room->path[i], &e);
        for (uint32_t p = 0; p < l->n_planes; p++)
            room->pages[i].page[p] = kept_page(pool, k, at->layout, e.value, p);
    }
    for (uint32_t p = 0; p < l->n_planes; p++)
        put_pages(pool, s, p, blocks);
    seq_set_length(pool, s, (uint64_t)blocks * KVD_PAGE_TOKENS);
    seq_appear(pool, s);
    *seq = seq_id(pool, s);
    return KVD_OK;
}

int kvd_blocks_adopt(struct kvd_pool *pool, const struct kvd_blocks_at *at, uint32_t blocks,
                     uint64_t *seq, struct kvd_error *err)
{
    if (blocks < 1 || blocks > at->blocks)
        return kvd_fail(err, KVD_E_PRECONDITION, "%u blocks of %u", blocks, at->blocks);
    int rc = kvd_blocks_hold(pool, at, err); // room is made by eviction, and not of this
    if (rc)
        return rc;
    rc = at->end ? adopt_end(pool, at, blocks, seq, err) : adopt_pages(pool, at, blocks, seq, err);
    struct region_seq *s = rc ? NULL : seq_find(pool, *seq);
    struct kvd_prefix *ix = pool->kept[at->ns]->ix;
    struct kvd_prefix_entry_info e;
    uint32_t entry = at->entry;
    for (uint32_t i = at->depth; i > blocks; i--, entry = e.parent)
        kvd_prefix_get(ix, entry, &e);
    if (s && kvd_prefix_hold(ix, entry, NULL) == KVD_OK)
        s->held_entry = entry + 1;
    kvd_blocks_release(pool, at);
    return rc;
}
