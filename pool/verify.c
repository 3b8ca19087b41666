// The invariants, checked the slow way.
#include "pool/internal.h"

struct tally {
    uint32_t *refs, *idle; // by page number; idle: of those (idle.c)
    uint64_t used, sequences, tokens;
    uint64_t *ns_used, *ns_sequences, *ns_tokens, *ns_blocks, *ns_idle;
    uint64_t *free_bytes; // by slab: of pages that are in use in part
    uint32_t damaged;
    uint64_t blocks, *refs_of, *idle_of, *kept_of; // the last three by layout
};

static int tally_table(const struct kvd_pool *pool, const struct region_seq *s,
                       const struct region_table *table, uint32_t plane, uint32_t kind, bool idle,
                       struct tally *t, struct kvd_error *err)
{
    uint32_t last = KVD_POOL_NONE;
    uint64_t first = kind == KVD_POOL_CODEC ? s->reach[plane].first / KVD_PAGE_TOKENS : 0;
    for (struct table_walk w = table_walk(table); w.block != KVD_POOL_NONE;
         table_walk_on(pool, &w)) {
        t->blocks++;
        t->ns_blocks[s->ns]++;
        last = w.block;
        for (uint32_t i = 0; i < w.n; i++) {
            uint32_t page = pool->block[w.block].page[i];
            if (page == KVD_POOL_NONE)
                continue;
            const struct region_extent *e = page_extent(pool, page);
            if (e->slab == KVD_POOL_NONE)
                return kvd_fail(err, KVD_E_CORRUPT, "page %u lies in a free extent", page);
            const struct region_slab *slab = &pool->slab[e->slab];
            if (slab->ns != s->ns || slab->layout != s->layout || slab->plane != plane ||
                slab->kind != kind || !slab_has(slab, page % pool->head->slots))
                return kvd_fail(err, KVD_E_CORRUPT,
                                "page %u belongs to another slab than its sequence", page);
            if (w.at + i < first)
                return kvd_fail(err, KVD_E_CORRUPT, "page %u lies behind its plane's window", page);
            t->refs[page]++;
            t->idle[page] += idle;
        }
    }
    if (last != table->last)
        return kvd_fail(err, KVD_E_CORRUPT, "a table of %u entries has another end", table->count);
    return KVD_OK;
}

static int check_reach(const struct kvd_plane *g, uint32_t plane, uint64_t length,
                       const struct kvd_pool_reach *r, struct kvd_error *err)
{
    uint64_t most = KVD_MAX(length, (uint64_t)g->sink);
    if (length > KVD_MAX_LENGTH || r->hist_end < g->sink || r->hist_end > most ||
        r->first > r->hist_end || (r->first && !g->window) ||
        most - r->hist_end > kvd_plane_ring(g))
        return kvd_fail(err, KVD_E_CORRUPT,
                        "plane %u of a sequence of %llu tokens: history to %llu, freed to %llu",
                        plane, (unsigned long long)length, (unsigned long long)r->hist_end,
                        (unsigned long long)r->first);
    return KVD_OK;
}

int pool_check_state(const struct kvd_pool *pool, const struct region_seq *s, struct kvd_error *err)
{
    const struct kvd_layout *l = layout_of(pool, s);
    if (s->pending_layers >= l->n_layers || (s->pending_layers && s->pending_length <= s->length))
        return kvd_fail(err, KVD_E_CORRUPT, "an append of %llu tokens has reached %u of %u layers",
                        (unsigned long long)(s->pending_length - s->length), s->pending_layers,
                        l->n_layers);
    for (uint32_t p = 0; p < l->n_planes; p++) {
        int rc = check_reach(&l->planes[p], p, s->length, &s->reach[p], err);
        if (rc == KVD_OK && s->pending_layers)
            rc = check_reach(&l->planes[p], p, s->pending_length, &s->pending[p], err);
        if (rc)
            return rc;
    }
    return KVD_OK;
}

// Whether a table has a page in each of the entries [from, to).
static bool table_full(const struct kvd_pool *pool, const struct region_table *t, uint64_t from,
                       uint64_t to)
{
    uint64_t n = 0;
    if (from >= to)
        return true;
    for (struct table_walk w = table_walk(t); w.block != KVD_POOL_NONE; table_walk_on(pool, &w))
        for (uint32_t i = 0; i < w.n; i++)
            n += w.at + i >= from && w.at + i < to && pool->block[w.block].page[i] != KVD_POOL_NONE;
    return n == to - from;
}

// Whether a table has, in an entry, a page of that many rows.
static bool has_rows(const struct kvd_pool *pool, const struct region_table *t, uint64_t entry,
                     uint64_t rows)
{
    uint32_t page = table_get(pool, t, (uint32_t)entry);
    return page != KVD_POOL_NONE &&
           kvd_pool_page_rows(pool, page) >= KVD_MIN(rows, (uint64_t)KVD_PAGE_TOKENS);
}

// Whether there is a page, and rows of it, for each token that a plane of a sequence says it has.
static int check_pages(const struct kvd_pool *pool, const struct region_seq *s, uint32_t plane,
                       uint64_t length, const struct kvd_pool_reach *r, struct kvd_error *err)
{
    const struct kvd_plane *g = &layout_of(pool, s)->planes[plane];
    const struct region_table *bf16 = &s->table[plane][KVD_POOL_BF16];
    uint64_t sink_pages = kvd_div_up(g->sink, KVD_PAGE_TOKENS);
    uint64_t ring = kvd_plane_ring(g) / KVD_PAGE_TOKENS;
    uint64_t first = r->first < r->hist_end ? r->first / KVD_PAGE_TOKENS : UINT64_MAX;
    bool ok = table_full(pool, &s->table[plane][KVD_POOL_CODEC], first,
                         kvd_div_up(r->hist_end - g->sink, KVD_PAGE_TOKENS));
    for (uint64_t t = 0; t < KVD_MIN(length, (uint64_t)g->sink); t += KVD_PAGE_TOKENS)
        ok &= has_rows(pool, bf16, t / KVD_PAGE_TOKENS, KVD_MIN(length, (uint64_t)g->sink) - t);
    if (length > r->hist_end) {
        uint64_t from = (r->hist_end - g->sink) / KVD_PAGE_TOKENS;
        uint64_t n = (length - 1 - g->sink) / KVD_PAGE_TOKENS - from + 1;
        for (uint64_t i = 0; i < KVD_MIN(n, ring); i++) {
            uint64_t rows =
                n > ring ? KVD_PAGE_TOKENS : length - g->sink - (from + i) * KVD_PAGE_TOKENS;
            ok &= has_rows(pool, bf16, sink_pages + (from + i) % ring, rows);
        }
    }
    if (ok)
        return KVD_OK;
    return kvd_fail(err, KVD_E_CORRUPT, "plane %u of a sequence lacks pages of its %llu tokens",
                    plane, (unsigned long long)length);
}

static int tally_sequence(const struct kvd_pool *pool, const struct region_seq *s, struct tally *t,
                          struct kvd_error *err)
{
    int rc = pool_check_state(pool, s, err);
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes && rc == KVD_OK; p++) {
        rc = check_pages(pool, s, p, s->length, &s->reach[p], err);
        if (rc == KVD_OK && s->pending_layers)
            rc = check_pages(pool, s, p, s->pending_length, &s->pending[p], err);
        for (uint32_t k = 0; k < KVD_POOL_KINDS && rc == KVD_OK; k++)
            if ((rc = tally_table(pool, s, &s->table[p][k], p, k, s->listed && !s->pins, t, err)) ==
                KVD_OK)
                rc = tally_table(pool, s, &s->undo[p][k], p, k, false, t, err);
        if (rc)
            return rc;
    }
    t->refs_of[s->layout]++;
    t->idle_of[s->layout] += s->listed;
    t->sequences++;
    t->tokens += s->length;
    t->ns_sequences[s->ns]++;
    t->ns_tokens[s->ns] += s->length;
    return KVD_OK;
}

// -- prefix indices -----------------------------------------------------------------------------

static int tally_entry(const struct kvd_pool *pool, uint32_t ns,
                       const struct kvd_prefix_entry_info *e, struct tally *t, uint64_t *bytes,
                       struct kvd_error *err)
{
    const struct kept *k = pool->kept[ns];
    uint32_t layout = k->layout_of[e->domain];
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++) {
        uint32_t page = kept_page(pool, k, layout, e->value, p);
        if (page == KVD_POOL_NONE)
            continue;
        const struct region_extent *x = page_extent(pool, page);
        const struct region_slab *slab = x->slab == KVD_POOL_NONE ? NULL : &pool->slab[x->slab];
        if (!slab || slab->ns != ns || slab->layout != layout || slab->plane != p ||
            !slab_has_whole(slab, page % pool->head->slots))
            return kvd_fail(err, KVD_E_CORRUPT, "page %u belongs to another slab than its block",
                            page);
        t->refs[page]++;
        t->idle[page]++;
        t->kept_of[layout]++;
        *bytes += slab->page_bytes;
    }
    return KVD_OK;
}

// What sequences keep of it, and ends.
static int check_entries(const struct kvd_pool *pool, uint32_t ns, uint32_t *holds,
                         struct kvd_error *err)
{
    const struct kept *k = pool->kept[ns];
    struct kvd_prefix_entry_info e;
    for (uint32_t i = 0; i < pool->head->n_sequences_ever; i++) {
        const struct region_seq *s = &pool->seq[i];
        if (!(s->generation & 1) || s->ns != ns)
            continue;
        if (s->held_entry &&
            (!kvd_prefix_get(k->ix, s->held_entry - 1, &e) || ++holds[s->held_entry - 1] > e.holds))
            return kvd_fail(err, KVD_E_CORRUPT, "sequence %u keeps a block that is not held", i);
        if (s->end_entry &&
            (s->holders || s->name[0] || !s->listed ||
             end_of(pool, ns, s->end_entry - 1, (uint32_t)(s->length / KVD_PAGE_TOKENS)) != s))
            return kvd_fail(err, KVD_E_CORRUPT, "sequence %u is an end of nothing", i);
    }
    return KVD_OK;
}

static int tally_index(const struct kvd_pool *pool, uint32_t ns, struct tally *t,
                       struct kvd_error *err)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    struct kvd_prefix_info info;
    struct kvd_prefix_entry_info e;
    uint64_t bytes = 0;
    if (!k)
        return KVD_OK;
    int rc = kvd_prefix_verify(k->ix, err);
    kvd_prefix_info(k->ix, &info);
    uint32_t *holds KVD_FREE = calloc(info.ever + 1, sizeof(*holds));
    if (!holds)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < info.ever && rc == KVD_OK; i++)
        if (kvd_prefix_get(k->ix, i, &e))
            rc = tally_entry(pool, ns, &e, t, &bytes, err);
    if (rc == KVD_OK && bytes != k->page_bytes)
        rc = kvd_fail(err, KVD_E_CORRUPT, "the index of namespace %s has %llu bytes, says %llu",
                      pool->ns[ns].name, (unsigned long long)bytes,
                      (unsigned long long)k->page_bytes);
    return rc ? rc : check_entries(pool, ns, holds, err);
}

// -- extents and counters -----------------------------------------------------------------------

// Of the page of an extent's slot: whether it says what references it has, and its bytes in use.
static int check_slot(const struct kvd_pool *pool, const struct region_slab *s, uint32_t first,
                      struct tally *t, uint64_t *bytes, struct kvd_error *err)
{
    *bytes = 0;
    for (uint32_t page = first; page < first + slab_stride(s); page++) {
        if (pool->page[page].refs != t->refs[page])
            return kvd_fail(err, KVD_E_CORRUPT, "page %u has %u references and says %u", page,
                            t->refs[page], pool->page[page].refs);
        if (pool->idle[page] != t->idle[page])
            return kvd_fail(err, KVD_E_CORRUPT, "page %u has %u idle references and says %u", page,
                            t->idle[page], pool->idle[page]);
        bool idle = t->refs[page] && t->idle[page] == t->refs[page];
        t->ns_idle[s->ns] += idle ? page_size(pool, page) : 0;
        *bytes += pool->page[page].refs ? page_size(pool, page) : 0;
        t->damaged += pool->page[page].refs && pool->sum[page] == KVD_SUM_DAMAGED;
    }
    if (s->row_bytes && parts_used(pool, first) == UINT32_MAX)
        return kvd_fail(err, KVD_E_CORRUPT, "a part of page %u is in use twice", first);
    return KVD_OK;
}

static int check_extent(const struct kvd_pool *pool, uint32_t x, struct tally *t,
                        struct kvd_error *err)
{
    const struct region_extent *e = &pool->extent[x];
    if (e->slab == KVD_POOL_NONE)
        return KVD_OK;
    const struct region_slab *slab = &pool->slab[e->slab];
    uint32_t first = x * pool->head->slots, stride = slab_stride(slab);
    if (e->owner != slab->ns)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "extent %u is marked with another namespace than its slab", x);
    uint32_t used = 0, returned = 0;
    for (uint32_t i = 0; i < e->carved; i++) {
        uint64_t bytes;
        int rc = check_slot(pool, slab, first + i * stride, t, &bytes, err);
        if (rc)
            return rc;
        used += bytes != 0;
        t->used += bytes;
        t->ns_used[slab->ns] += bytes;
        t->free_bytes[e->slab] += bytes ? slab->page_bytes - bytes : 0;
    }
    for (uint32_t i = e->free_slot; i != KVD_POOL_NONE; i = pool->page[first + i * stride].next)
        if (++returned > e->carved)
            return kvd_fail(err, KVD_E_CORRUPT, "the slot list of extent %u has a cycle", x);
    if (used != e->used || used + returned != e->carved || e->carved > slab->slots)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "extent %u: %u used, %u returned, %u carved, says %u used", x, used,
                        returned, e->carved, e->used);
    return KVD_OK;
}

// The lists of free parts have all that is free of pages that are in use in part, and nothing else.
static int check_parts(const struct kvd_pool *pool, uint32_t x, const struct tally *t,
                       struct kvd_error *err)
{
    const struct region_slab *s = &pool->slab[x];
    uint64_t bytes = 0;
    bool ok = true;
    for (uint32_t i = 0; i < KVD_POOL_PARTS && s->layout != KVD_POOL_NONE; i++) {
        uint32_t n = 0, previous = KVD_POOL_NONE;
        for (uint32_t page = s->part[i]; ok && page != KVD_POOL_NONE;
             page = pool->page[page].next) {
            ok = page_extent(pool, page)->slab == x && page_order(pool, page) == i + 1 &&
                 !pool->page[page].refs && pool->page[page ^ 1].next == previous &&
                 ++n <= s->parts[i];
            bytes += s->page_bytes >> (i + 1);
            previous = page;
        }
        ok &= n == s->parts[i];
    }
    if (ok && (s->layout == KVD_POOL_NONE || bytes == t->free_bytes[x]))
        return KVD_OK;
    return kvd_fail(err, KVD_E_CORRUPT, "the free parts of slab %u are not those in its lists", x);
}

static int compare(const struct kvd_pool *pool, const struct tally *t, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    if (t->used != h->used || t->sequences != h->sequences || t->tokens != h->tokens)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "used %llu/%llu sequences %llu/%llu tokens %llu/%llu (counted/said)",
                        (unsigned long long)t->used, (unsigned long long)h->used,
                        (unsigned long long)t->sequences, (unsigned long long)h->sequences,
                        (unsigned long long)t->tokens, (unsigned long long)h->tokens);
    for (uint32_t i = 0; i < h->n_namespaces; i++) {
        const struct region_namespace *n = &pool->ns[i];
        if (t->ns_used[i] != n->used || t->ns_sequences[i] != n->sequences ||
            t->ns_tokens[i] != n->tokens || t->ns_blocks[i] != n->blocks ||
            t->ns_idle[i] != n->idle)
            return kvd_fail(err, KVD_E_CORRUPT, "the counters of namespace %s are wrong", n->name);
    }
    for (uint32_t i = 0; i < h->n_layouts; i++)
        if (t->idle_of[i] != pool->layout[i].idle || t->refs_of[i] != pool->layout[i].sequences ||
            t->kept_of[i] != pool->layout[i].kept)
            return kvd_fail(err, KVD_E_CORRUPT,
                            "layout %u: %llu sequences, %llu evictable, %llu pages of blocks, says "
                            "%u, %u and %llu",
                            i, (unsigned long long)t->refs_of[i], (unsigned long long)t->idle_of[i],
                            (unsigned long long)t->kept_of[i], pool->layout[i].sequences,
                            pool->layout[i].idle, (unsigned long long)pool->layout[i].kept);
    if (t->damaged != h->damaged)
        return kvd_fail(err, KVD_E_CORRUPT, "%u pages are damaged, says %u", t->damaged,
                        h->damaged);
    if (t->blocks != h->blocks)
        return kvd_fail(err, KVD_E_CORRUPT, "%llu blocks in use, says %u",
                        (unsigned long long)t->blocks, h->blocks);
    uint32_t free = 0;
    for (uint32_t x = h->free_extent; x != KVD_POOL_NONE && free <= h->n_extents;
         x = pool->extent[x].next)
        free++;
    if (free + h->extents_granted + h->extents_aside != h->n_extents)
        return kvd_fail(err, KVD_E_CORRUPT, "%u extents free, %u granted, %u in all", free,
                        h->extents_granted, h->n_extents);
    return KVD_OK;
}

int kvd_pool_verify(const struct kvd_pool *pool, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    size_t pages = (size_t)h->n_extents * h->slots;
    uint32_t *refs KVD_FREE = calloc(2 * pages, sizeof(*refs));
    uint64_t *sums KVD_FREE = calloc((size_t)h->max_namespaces * 5, sizeof(*sums));
    uint64_t *layouts KVD_FREE = calloc((size_t)h->max_layouts * 3, sizeof(*layouts));
    uint64_t *parts KVD_FREE = calloc(h->max_slabs, sizeof(*parts));
    if (!refs || !sums || !layouts || !parts)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct tally t = {.refs = refs,
                      .idle = refs + pages,
                      .ns_idle = sums + 4 * (size_t)h->max_namespaces,
                      .free_bytes = parts,
                      .ns_used = sums,
                      .refs_of = layouts,
                      .idle_of = layouts + h->max_layouts,
                      .kept_of = layouts + 2 * (size_t)h->max_layouts,
                      .ns_sequences = sums + h->max_namespaces,
                      .ns_tokens = sums + 2 * (size_t)h->max_namespaces,
                      .ns_blocks = sums + 3 * (size_t)h->max_namespaces};
    int rc = KVD_OK;
    for (uint32_t i = 0; i < h->n_sequences_ever && !rc; i++)
        if (pool->seq[i].generation & 1)
            rc = tally_sequence(pool, &pool->seq[i], &t, err);
    for (uint32_t i = 0; i < h->n_namespaces && !rc; i++)
        rc = tally_index(pool, i, &t, err);
    for (uint32_t x = 0; x < h->n_extents && !rc; x++)
        rc = check_extent(pool, x, &t, err);
    for (uint32_t x = 0; x < h->n_slabs && !rc; x++)
        rc = check_parts(pool, x, &t, err);
    return rc ? rc : compare(pool, &t, err);
}
