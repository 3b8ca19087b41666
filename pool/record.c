// The records of sequences and namespaces: finding, counting and forgetting them.
#include "pool/internal.h"

struct region_seq *seq_find(const struct kvd_pool *pool, uint64_t id)
{
    struct region_seq *s = seq_find_any(pool, id);
    return s && (s->generation & 1) && !s->doomed ? s : NULL;
}

struct region_seq *seq_find_any(const struct kvd_pool *pool, uint64_t id)
{
    struct region_seq *s = &pool->seq[(uint32_t)id];
    return (uint32_t)id < pool->head->n_sequences_ever && s->generation == (uint32_t)(id >> 32)
               ? s
               : NULL;
}

uint64_t seq_id(const struct kvd_pool *pool, const struct region_seq *s)
{
    return (uint64_t)s->generation << 32 | (uint32_t)(s - pool->seq);
}

void seq_set_length(struct kvd_pool *pool, struct region_seq *s, uint64_t length)
{
    pool->ns[s->ns].tokens += length - s->length;
    pool->head->tokens += length - s->length;
    s->length = length;
}

uint64_t seq_bytes(const struct kvd_pool *pool, const struct region_seq *s)
{
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            for (struct table_walk w = table_walk(&s->table[p][k]); w.block != KVD_POOL_NONE;
                 table_walk_on(pool, &w))
                for (uint32_t i = 0; i < w.n; i++) {
                    uint32_t page = pool->block[w.block].page[i];
                    bytes += page == KVD_POOL_NONE ? 0 : page_size(pool, page);
                }
    return bytes;
}

void seq_destroy(struct kvd_pool *pool, struct region_seq *s)
{
    if (s->pins) {
        s->doomed = true;
        stored();
        return;
    }
    s->generation++; // with this it is gone
    stored();
    if (s->held_entry)
        kvd_prefix_release(pool->kept[s->ns]->ix, s->held_entry - 1);
    s->held_entry = s->end_entry = 0;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            table_truncate(pool, &s->table[p][k], 0);
            table_truncate(pool, &s->undo[p][k], 0);
        }
    seq_set_length(pool, s, 0);
    pool->ns[s->ns].sequences--;
    pool->head->sequences--;
    pool->layout[s->layout].sequences--;
    s->doomed = false;
    s->lru_next = pool->head->free_seq;
    pool->head->free_seq = (uint32_t)(s - pool->seq);
    namespace_settle(pool, s->ns);
}

void namespace_settle(struct kvd_pool *pool, uint32_t ns)
{
    struct region_namespace *n = &pool->ns[ns];
    const struct kept *index = pool->kept ? pool->kept[ns] : NULL;
    if (n->holders || n->kept || n->quota || n->sequences || n->used || (index && index->busy))
        return;
    kept_close(pool, ns); // it may have blocks left, of which nobody has the pages
    for (uint32_t x = 0; x < pool->head->n_extents; x++)
        if (pool->extent[x].owner == ns)
            pool->extent[x].owner = KVD_OWNER_GONE;
    for (uint32_t i = 0; i < pool->head->n_layouts; i++)
        if (pool->layout[i].ns == ns)
            pool->layout[i].ns = KVD_POOL_NONE;
    stored(); // before its slot is another's, nothing says that it holds that one's data
    n->name[0] = '\0';
    stored();
}
