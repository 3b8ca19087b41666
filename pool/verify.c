// The invariants, checked the slow way.
#include "pool/internal.h"

struct tally {
    uint32_t *refs; // by page number
    uint64_t used, sequences, tokens;
    uint64_t *ns_used, *ns_sequences, *ns_tokens, *ns_blocks;
    uint64_t blocks, *refs_of, *idle_of; // the last two by layout
};

static int tally_sequence(const struct kvd_pool *pool, const struct region_seq *s, struct tally *t,
                          struct kvd_error *err)
{
    for (int k = 0; k < KVD_POOL_KINDS; k++) {
        uint32_t entries = 0;
        for (uint32_t b = s->table[k].first; b != KVD_POOL_NONE; b = pool->block[b].next) {
            t->blocks++;
            t->ns_blocks[s->ns]++;
            for (uint32_t i = 0; i < pool->block[b].used; i++, entries++) {
                uint32_t page = pool->block[b].page[i];
                if (page == KVD_POOL_NONE)
                    continue;
                const struct region_extent *e = page_extent(pool, page);
                if (e->slab == KVD_POOL_NONE)
                    return kvd_fail(err, KVD_E_CORRUPT, "page %u lies in a free extent", page);
                const struct region_slab *slab = &pool->slab[e->slab];
                if (slab->ns != s->ns || slab->layout != s->layout || slab->kind != (uint32_t)k)
                    return kvd_fail(err, KVD_E_CORRUPT,
                                    "page %u belongs to another slab than its sequence", page);
                t->refs[page]++;
            }
        }
        if (entries != s->table[k].count)
            return kvd_fail(err, KVD_E_CORRUPT, "a table says %u entries and has %u",
                            s->table[k].count, entries);
    }
    t->refs_of[s->layout]++;
    t->idle_of[s->layout] += s->listed;
    t->sequences++;
    t->tokens += s->length;
    t->ns_sequences[s->ns]++;
    t->ns_tokens[s->ns] += s->length;
    return KVD_OK;
}

static int check_extent(const struct kvd_pool *pool, uint32_t x, struct tally *t,
                        struct kvd_error *err)
{
    const struct region_extent *e = &pool->extent[x];
    if (e->slab == KVD_POOL_NONE)
        return KVD_OK;
    const struct region_slab *slab = &pool->slab[e->slab];
    if (e->owner != slab->ns)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "extent %u is marked with another namespace than its slab", x);
    uint32_t used = 0, returned = 0;
    for (uint32_t i = 0; i < e->carved; i++) {
        uint32_t page = x * pool->head->slots + i;
        if (pool->page[page].refs != t->refs[page])
            return kvd_fail(err, KVD_E_CORRUPT, "page %u has %u references and says %u", page,
                            t->refs[page], pool->page[page].refs);
        used += pool->page[page].refs != 0;
    }
    for (uint32_t i = e->free_slot; i != KVD_POOL_NONE;
         i = pool->page[x * pool->head->slots + i].next)
        if (++returned > e->carved)
            return kvd_fail(err, KVD_E_CORRUPT, "the slot list of extent %u has a cycle", x);
    if (used != e->used || used + returned != e->carved || e->carved > slab->slots)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "extent %u: %u used, %u returned, %u carved, says %u used", x, used,
                        returned, e->carved, e->used);
    t->used += used * slab->page_bytes;
    t->ns_used[slab->ns] += used * slab->page_bytes;
    return KVD_OK;
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
            t->ns_tokens[i] != n->tokens || t->ns_blocks[i] != n->blocks)
            return kvd_fail(err, KVD_E_CORRUPT, "the counters of namespace %s are wrong", n->name);
    }
    for (uint32_t i = 0; i < h->n_layouts; i++)
        if (t->idle_of[i] != pool->layout[i].idle || t->refs_of[i] > pool->layout[i].refs)
            return kvd_fail(err, KVD_E_CORRUPT,
                            "layout %u: %llu sequences, %llu evictable, says %u and %u", i,
                            (unsigned long long)t->refs_of[i], (unsigned long long)t->idle_of[i],
                            pool->layout[i].refs, pool->layout[i].idle);
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
    uint32_t *refs KVD_FREE = calloc((size_t)h->n_extents * h->slots, sizeof(*refs));
    uint64_t *sums KVD_FREE = calloc((size_t)h->max_namespaces * 4, sizeof(*sums));
    uint64_t *layouts KVD_FREE = calloc((size_t)h->max_layouts * 2, sizeof(*layouts));
    if (!refs || !sums || !layouts)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct tally t = {.refs = refs,
                      .ns_used = sums,
                      .refs_of = layouts,
                      .idle_of = layouts + h->max_layouts,
                      .ns_sequences = sums + h->max_namespaces,
                      .ns_tokens = sums + 2 * (size_t)h->max_namespaces,
                      .ns_blocks = sums + 3 * (size_t)h->max_namespaces};
    int rc = KVD_OK;
    for (uint32_t i = 0; i < h->n_sequences_ever && !rc; i++)
        if (pool->seq[i].generation & 1)
            rc = tally_sequence(pool, &pool->seq[i], &t, err);
    for (uint32_t x = 0; x < h->n_extents && !rc; x++)
        rc = check_extent(pool, x, &t, err);
    return rc ? rc : compare(pool, &t, err);
}
