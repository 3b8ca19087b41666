// What nobody uses, counted as it changes.
//
// A page's references are somebody's (a sequence's that is held or pinned, those of works), or idle
// ones, which eviction takes away: a prefix index's, and those of the tables of a sequence that is
// listed and not pinned. A page all of whose references are idle is idle itself. So what is in use
// but not idle is what workers hold, whatever has been stored and evicted since anybody looked.
//
// Not all that is idle can be evicted: the blocks before one that is held stay, though a sequence
// with a window refers to their pages no more. How much that is only a look at all finds (look.c);
// it is taken for what it was then.
#include <errno.h>

#include "pool/internal.h"

static bool is_idle(const struct kvd_pool *pool, uint32_t page)
{
    return pool->page[page].refs && pool->idle[page] == pool->page[page].refs;
}

static void count(struct kvd_pool *pool, uint32_t page, bool more)
{
    uint32_t i = page_slab(pool, page)->ns;
    struct region_namespace *n = &pool->ns[i];
    n->idle += more ? page_size(pool, page) : 0 - page_size(pool, page);
    pool->lent[i].most_idle = KVD_MAX(pool->lent[i].most_idle, n->idle);
}

void page_ref(struct kvd_pool *pool, uint32_t page)
{
    if (is_idle(pool, page))
        count(pool, page, false);
    pool->page[page].refs++;
}

void page_left(struct kvd_pool *pool, uint32_t page)
{
    if (is_idle(pool, page))
        count(pool, page, true);
}

void page_ref_idle(struct kvd_pool *pool, uint32_t page)
{
    pool->idle[page]++;
    if (pool->page[page].refs++ == 0)
        count(pool, page, true);
}

static void turn(struct kvd_pool *pool, uint32_t page, bool idle)
{
    if (is_idle(pool, page))
        count(pool, page, false);
    pool->idle[page] += idle ? 1 : UINT32_MAX;
    if (is_idle(pool, page))
        count(pool, page, true);
}

void page_unidle(struct kvd_pool *pool, uint32_t page)
{
    turn(pool, page, false);
}

void idle_sequence(struct kvd_pool *pool, const struct region_seq *s, bool idle)
{
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            for (struct table_walk w = table_walk(&s->table[p][k]); w.block != KVD_POOL_NONE;
                 table_walk_on(pool, &w))
                for (uint32_t i = 0; i < w.n; i++)
                    if (pool->block[w.block].page[i] != KVD_POOL_NONE)
                        turn(pool, pool->block[w.block].page[i], idle);
}

void seq_pin(struct kvd_pool *pool, struct region_seq *s)
{
    if (s->pins++ == 0 && s->listed)
        idle_sequence(pool, s, false);
}

void seq_unpin(struct kvd_pool *pool, struct region_seq *s)
{
    if (--s->pins == 0 && s->listed)
        idle_sequence(pool, s, true);
}

// -- what may be borrowed -----------------------------------------------------------------------

void kvd_pool_set_borrow(struct kvd_pool *pool, uint32_t ns, bool may)
{
    pool->lent[ns].may = may;
}

uint64_t evictable_bytes(const struct kvd_pool *pool, uint32_t ns)
{
    uint64_t idle = pool->ns[ns].idle, stays = pool->lent[ns].stays;
    return idle > stays ? idle - stays : 0;
}

uint64_t lent_to(const struct kvd_pool *pool, uint32_t ns)
{
    return pool->lent[ns].may ? evictable_bytes(pool, ns) : 0;
}

void lent_look(struct kvd_pool *pool)
{
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++)
        pool->lent[i].most_idle = pool->ns[i].idle;
}

void lent_looked(struct kvd_pool *pool, const uint64_t *evictable)
{
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++)
        pool->lent[i].stays =
            pool->lent[i].most_idle - KVD_MIN(pool->lent[i].most_idle, evictable[i]);
}

void lent_forget(struct kvd_pool *pool, uint32_t ns)
{
    pool->lent[ns] = (struct lent){.stays = UINT64_MAX};
}

int idle_init(struct kvd_pool *pool, const struct region_head *h, struct kvd_error *err)
{
    pool->idle = calloc((size_t)h->n_extents * h->slots, sizeof(*pool->idle));
    pool->lent = calloc(h->max_namespaces, sizeof(*pool->lent));
    if (!pool->idle || !pool->lent) {
        idle_deinit(pool);
        return kvd_fail(err, -ENOMEM, "no memory for the pool");
    }
    for (uint32_t i = 0; i < h->max_namespaces; i++)
        lent_forget(pool, i);
    return KVD_OK;
}

void idle_deinit(struct kvd_pool *pool)
{
    free(pool->idle);
    free(pool->lent);
    pool->idle = NULL;
    pool->lent = NULL;
}
