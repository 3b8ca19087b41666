// Checksums of blocks: which are complete, and what was found of them.
#include "pool/internal.h"

#include <time.h>

// Blocks of a plane's history that are complete, and the first of those that are there.
static void complete(const struct kvd_pool *pool, const struct region_seq *s, uint32_t plane,
                     uint32_t *first, uint32_t *end)
{
    const struct kvd_pool_reach *r = &s->reach[plane];
    uint64_t sink = layout_of(pool, s)->planes[plane].sink;
    *end = (uint32_t)((r->hist_end - sink) / KVD_PAGE_TOKENS);
    *first = s->table[plane][KVD_POOL_CODEC].begin;
}

static void fill(const struct kvd_pool *pool, uint32_t plane, uint32_t page,
                 struct kvd_pool_block *out)
{
    out->plane = plane;
    out->page = page;
    out->addr = kvd_pool_page_addr(pool, page);
    out->bytes = pool->layout[out->layout].page_bytes[plane][KVD_POOL_CODEC];
    out->sum = pool->sum[page];
}

// The next block of a sequence. False: there is no more.
static bool next_of(const struct kvd_pool *pool, const struct region_seq *s,
                    struct kvd_pool_walk *w, struct kvd_pool_block *out)
{
    for (; w->plane < layout_of(pool, s)->n_planes; w->plane++, w->index = 0) {
        uint32_t first, end;
        complete(pool, s, w->plane, &first, &end);
        w->index = KVD_MAX(w->index, first);
        while (w->index < end) {
            uint32_t page = table_get(pool, &s->table[w->plane][KVD_POOL_CODEC], w->index++);
            if (page == KVD_POOL_NONE)
                continue;
            *out = (struct kvd_pool_block){
                .seq = seq_id(pool, s), .ns = s->ns, .layout = s->layout, .index = w->index - 1};
            fill(pool, w->plane, page, out);
            return true;
        }
    }
    return false;
}

static void to_next_sequence(struct kvd_pool_walk *w)
{
    w->seq++;
    w->plane = w->index = 0;
}

// The next block that the walk's entry of its namespace's index has. False: there is no more.
static bool next_kept(const struct kvd_pool *pool, struct kvd_pool_walk *w,
                      struct kvd_pool_block *out)
{
    const struct kept *k = pool->kept[w->ns];
    struct kvd_prefix_entry_info e;
    if (!kvd_prefix_get(k->ix, w->entry, &e))
        return false;
    uint32_t layout = k->layout_of[e.domain];
    while (w->plane < pool->layout[layout].l.n_planes) {
        uint32_t page = kept_page(pool, k, layout, e.value, w->plane++);
        if (page == KVD_POOL_NONE ||
            pool->slab[page_extent(pool, page)->slab].kind != KVD_POOL_CODEC)
            continue;
        *out = (struct kvd_pool_block){.ns = w->ns, .layout = layout, .index = w->entry};
        fill(pool, w->plane - 1, page, out);
        return true;
    }
    return false;
}

static uint32_t entries_of(const struct kvd_pool *pool, uint32_t ns)
{
    struct kvd_prefix_info info = {0};
    if (pool->kept && pool->kept[ns])
        kvd_prefix_info(pool->kept[ns]->ix, &info);
    return info.ever;
}

int kvd_pool_block_next(const struct kvd_pool *pool, struct kvd_pool_walk *w, uint32_t steps,
                        struct kvd_pool_block *out)
{
    for (; w->seq < pool->head->n_sequences_ever; to_next_sequence(w)) {
        const struct region_seq *s = &pool->seq[w->seq];
        if (steps-- == 0)
            return KVD_E_LIMIT;
        if (s->generation & 1 && !s->doomed && next_of(pool, s, w, out))
            return KVD_OK;
    }
    for (; w->ns < pool->head->n_namespaces; w->ns++, w->entry = 0) {
        uint32_t ever = entries_of(pool, w->ns);
        for (; w->entry < ever; w->entry++, w->plane = 0) {
            if (steps-- == 0)
                return KVD_E_LIMIT;
            if (next_kept(pool, w, out))
                return KVD_OK;
        }
    }
    return KVD_E_NOT_FOUND;
}

bool kvd_pool_seq_sealed(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_walk *at,
                         struct kvd_pool_block *out)
{
    const struct region_seq *s = seq_find_any(pool, seq);
    while (s && next_of(pool, s, at, out))
        if (out->sum > KVD_SUM_DAMAGED)
            return true;
    return false;
}

// With a second reference an append does not write it, but a copy; with the sequence there are its
// namespace and layout.
void kvd_pool_block_hold(struct kvd_pool *pool, const struct kvd_pool_block *b)
{
    if (b->seq) {
        kvd_pool_seq_pin(pool, b->seq);
    } else {
        pool->ns[b->ns].holders++;
        kvd_pool_layout_ref(pool, b->layout);
    }
    page_ref(pool, b->page);
    pool->taken_up++;
}

void kvd_pool_block_drop(struct kvd_pool *pool, const struct kvd_pool_block *b)
{
    pool->taken_up--;
    kvd_pool_page_unref(pool, b->page);
    if (b->seq) {
        kvd_pool_seq_unpin(pool, b->seq);
    } else {
        kvd_pool_layout_unref(pool, b->layout);
        kvd_pool_namespace_release(pool, b->ns);
    }
}

void kvd_pool_block_lost(struct kvd_pool *pool, const struct kvd_pool_block *b)
{
    struct kept *k = pool->kept ? pool->kept[b->ns] : NULL;
    struct kvd_prefix_entry_info e;
    if (k && kvd_prefix_get(k->ix, b->index, &e) && k->layout_of[e.domain] == b->layout &&
        kept_page(pool, k, b->layout, e.value, b->plane) == b->page) {
        kvd_prefix_note(k->ix, b->index, KVD_PREFIX_DAMAGED, (uint32_t)time(NULL));
        kept_lose(pool, k, b->layout, b->index, b->plane);
    }
}

void kvd_pool_block_seal(struct kvd_pool *pool, const struct kvd_pool_block *b, uint64_t sum)
{
    uint64_t *to = &pool->sum[b->page];
    pool->head->damaged += (sum == KVD_SUM_DAMAGED) - (*to == KVD_SUM_DAMAGED);
    *to = sum;
    stored();
}

int kvd_pool_seq_whole(const struct kvd_pool *pool, uint64_t seq, struct kvd_error *err)
{
    const struct region_seq *s = pool->head->damaged ? seq_find_any(pool, seq) : NULL;
    for (uint32_t p = 0; s && p < layout_of(pool, s)->n_planes; p++)
        for (struct table_walk w = table_walk(&s->table[p][KVD_POOL_CODEC]);
             w.block != KVD_POOL_NONE; table_walk_on(pool, &w))
            for (uint32_t i = 0; i < w.n; i++) {
                uint32_t page = pool->block[w.block].page[i];
                if (page != KVD_POOL_NONE && pool->sum[page] == KVD_SUM_DAMAGED)
                    return kvd_fail(
                        err, KVD_E_CORRUPT,
                        "block %u of plane %u of sequence %llu is damaged: its memory "
                        "is not what was stored; free the sequence, and compute it anew",
                        w.at + i, p, (unsigned long long)seq);
            }
    return KVD_OK;
}
