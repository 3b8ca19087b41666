// Checksums of blocks: which are complete, and what was found of them.
#include "pool/internal.h"

// Blocks of a plane's history that are complete, and the first of those that are there.
static void complete(const struct kvd_pool *pool, const struct region_seq *s, uint32_t plane,
                     uint32_t *first, uint32_t *end)
{
    const struct kvd_pool_reach *r = &s->reach[plane];
    uint64_t sink = layout_of(pool, s)->planes[plane].sink;
    *end = (uint32_t)((r->hist_end - sink) / KVD_PAGE_TOKENS);
    *first = s->table[plane][KVD_POOL_CODEC].begin;
}

static void fill(const struct kvd_pool *pool, const struct region_seq *s, uint32_t plane,
                 uint32_t index, uint32_t page, struct kvd_pool_block *out)
{
    *out =
        (struct kvd_pool_block){.seq = seq_id(pool, s),
                                .plane = plane,
                                .index = index,
                                .page = page,
                                .addr = kvd_pool_page_addr(pool, page),
                                .bytes = pool->layout[s->layout].page_bytes[plane][KVD_POOL_CODEC],
                                .sum = pool->sum[page]};
}

static void to_next_sequence(struct kvd_pool_walk *w)
{
    w->seq++;
    w->plane = w->index = 0;
}

int kvd_pool_block_next(const struct kvd_pool *pool, struct kvd_pool_walk *w, uint32_t steps,
                        struct kvd_pool_block *out)
{
    for (; w->seq < pool->head->n_sequences_ever; steps--) {
        const struct region_seq *s = &pool->seq[w->seq];
        if (steps == 0)
            return KVD_E_LIMIT;
        if (!(s->generation & 1) || s->doomed || w->plane >= layout_of(pool, s)->n_planes) {
            to_next_sequence(w);
            continue;
        }
        uint32_t first, end;
        complete(pool, s, w->plane, &first, &end);
        w->index = KVD_MAX(w->index, first);
        if (w->index >= end) {
            w->plane++;
            w->index = 0;
            continue;
        }
        uint32_t page = table_get(pool, &s->table[w->plane][KVD_POOL_CODEC], w->index++);
        if (page == KVD_POOL_NONE)
            continue;
        fill(pool, s, w->plane, w->index - 1, page, out);
        return KVD_OK;
    }
    return KVD_E_NOT_FOUND;
}

// With a second reference an append does not write it, but a copy; with the sequence there are its
// namespace and layout.
void kvd_pool_block_hold(struct kvd_pool *pool, const struct kvd_pool_block *b)
{
    kvd_pool_seq_pin(pool, b->seq);
    pool->page[b->page].refs++;
}

void kvd_pool_block_drop(struct kvd_pool *pool, const struct kvd_pool_block *b)
{
    kvd_pool_page_unref(pool, b->page);
    kvd_pool_seq_unpin(pool, b->seq);
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
