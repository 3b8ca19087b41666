// Layouts of several planes: random operations against the model; the pool is wrecked and rebuilt
// on the way. KVD_POOL_OPS sets the number of operations.
#include "tests/unit/pool_planes.h"

// Fills everything with noise that internal.h calls derived.
static void wreck(struct model *m)
{
    struct kvd_pool *p = m->pool;
    struct region_head *h = p->head;
#define NOISE(first, last)                                                                         \
    for (uint8_t *b = (uint8_t *)&(first); b < (uint8_t *)(&(last) + 1); b++)                      \
    *b = (uint8_t)kvd_rand(&m->rng)
    bool *taken = calloc(h->max_blocks, sizeof(*taken));
    for (uint32_t i = 0; i < h->n_sequences_ever; i++) {
        struct region_seq *s = &p->seq[i];
        for (uint32_t t = 0; t < KVD_MAX_PLANES * KVD_POOL_KINDS && s->generation & 1; t++) {
            struct region_table *table = &s->table[t / KVD_POOL_KINDS][t % KVD_POOL_KINDS];
            struct region_table *undo = &s->undo[t / KVD_POOL_KINDS][t % KVD_POOL_KINDS];
            if (t / KVD_POOL_KINDS >= layout_of(p, s)->n_planes)
                continue;
            for (struct table_walk w = table_walk(table); w.left; table_walk_on(p, &w))
                taken[w.block] = true;
            for (struct table_walk w = table_walk(undo); w.left; table_walk_on(p, &w))
                taken[w.block] = true;
            NOISE(table->last, table->last);
            NOISE(undo->last, undo->last);
        }
        NOISE(s->lru_stamp, s->end_entry);
        s->listed = below(m, 2);
    }
    for (uint32_t i = 0; i < h->n_blocks_ever; i++)
        if (!taken[i])
            NOISE(p->block[i], p->block[i]);
    free(taken);
    for (uint32_t i = 0; i < h->n_extents; i++) {
        NOISE(p->extent[i].used, p->extent[i].idle_since);
        for (uint32_t j = 0; j < h->slots; j++)
            NOISE(p->page[i * h->slots + j], p->page[i * h->slots + j]);
    }
    for (uint32_t i = 0; i < h->n_slabs; i++)
        NOISE(p->slab[i].partial, p->slab[i].slots);
    for (uint32_t i = 0; i < h->n_namespaces; i++)
        NOISE(p->ns[i].used, p->ns[i].lru_last);
    for (uint32_t i = 0; i < h->n_layouts; i++)
        NOISE(p->layout[i].sequences, p->layout[i].used);
    NOISE(p->slab_at[0], p->slab_at[h->n_namespaces * h->max_layouts * KVD_MAX_PLANES - 1]);
    NOISE(h->n_blocks_ever, h->name_bucket[KVD_NAME_BUCKETS - 1]);
#undef NOISE
}

static void op_rebuild(struct model *m)
{
    struct kvd_error err = {0};
    if (below(m, 200))
        return;
    wreck(m);
    ck_assert_msg(kvd_pool_rebuild(m->pool, &err) == 0, "%s", err.text);
    m->wrecked++;
    check_all(m);
}

START_TEST(random_planes)
{
    static struct model m;
    m.rng = kvd_test_seed("random_planes");
    const char *env = getenv("KVD_POOL_OPS");
    uint64_t n = env ? strtoull(env, NULL, 0) : 120000;
    for (uint64_t round = 0; round < 6; round++) { // other layouts each time
        setup(&m);
        for (uint64_t i = 0; i < n / 6; i++) {
            if (below(&m, 16) == 0)
                op_rebuild(&m);
            else
                model_step(&m);
            if (i % 211 == 0)
                check_all(&m);
        }
        check_all(&m);
        kvd_pool_free(&m.pool);
        for (int i = 0; i < LIVE; i++)
            m.seq[i].used = false;
    }
    printf("%llu appends, %llu refused for room, %llu evictions, %llu truncations behind a window, "
           "%llu times rebuilt, %llu parts of pages, %llu outgrown, %llu sequences settled\n",
           (unsigned long long)m.appended, (unsigned long long)m.refused,
           (unsigned long long)m.evicted, (unsigned long long)m.behind,
           (unsigned long long)m.wrecked, (unsigned long long)m.parts, (unsigned long long)m.grown,
           (unsigned long long)m.settled);
    // Of a few thousand operations what is rare may be missing.
    ck_assert(n < 60000 || (m.appended && m.refused && m.evicted && m.behind && m.wrecked &&
                            m.parts && m.grown && m.settled));
}
END_TEST

KVD_MAIN("pool_planes", 600, random_planes)
