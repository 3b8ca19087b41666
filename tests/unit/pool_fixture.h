// A pool over plain memory, for tests.
#ifndef KVD_TESTS_POOL_FIXTURE_H
#define KVD_TESTS_POOL_FIXTURE_H

#include <errno.h>

#include "pool/pool.h"

static bool recycled; // what kvd_pool_layout said last

struct test_mem {
    uint32_t live, allocs, zeros;
    bool fail_next, short_of_memory;
};

static int test_mem_alloc(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    struct test_mem *m = ctx;
    (void)index;
    (void)bytes;
    if (m->fail_next)
        return -ENOMEM;
    if (m->short_of_memory)
        return KVD_E_FULL;
    m->live++;
    *addr = ((uint64_t)++m->allocs) << 40; // never touched by the pool
    return 0;
}
static void test_mem_free(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    struct test_mem *m = ctx;
    (void)index;
    (void)addr;
    (void)bytes;
    m->live--;
}
static int test_mem_zero(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    struct test_mem *m = ctx;
    (void)index;
    (void)addr;
    (void)bytes;
    if (m->fail_next)
        return -EIO;
    m->zeros++;
    return 0;
}

static inline struct kvd_pool *test_pool(struct test_mem *mem, uint32_t extents, uint32_t sequences)
{
    struct kvd_pool_mem_ops ops = {
        .ctx = mem, .alloc = test_mem_alloc, .free = test_mem_free, .zero = test_mem_zero};
    struct kvd_pool_config config = {.bytes = (uint64_t)extents << 21,
                                     .extent_bytes = 2 << 20,
                                     .max_sequences = sequences,
                                     .max_namespaces = 8,
                                     .max_layouts = 8};
    return kvd_pool_new(&config, &ops, NULL);
}

static inline struct kvd_layout test_layout(uint32_t layers, uint32_t sink, uint32_t recent)
{
    struct kvd_layout l = {.n_layers = layers,
                           .n_planes = 1,
                           .planes = {{.n_layers = layers,
                                       .q_heads = 4,
                                       .kv_heads = 2,
                                       .head_dim_k = 64,
                                       .head_dim_v = 64,
                                       .codec = {KVD_CODEC_INT2, KVD_CODEC_INT2},
                                       .sink = sink,
                                       .recent = recent}}};
    for (uint32_t i = 0; i < layers; i++)
        l.layers[i] = (uint16_t)i;
    return l;
}

#endif
