// A pool with a namespace, a layout and keys of one prompt, for tests of blocks.
#ifndef KVD_TESTS_BLOCKS_FIXTURE_H
#define KVD_TESTS_BLOCKS_FIXTURE_H

#include "pool/blocks.h"
#include "tests/unit/pool_fixture.h"
#include "tests/unit/suite.h"

enum { T = KVD_PAGE_TOKENS };

static const uint64_t one_plane[][KVD_POOL_KINDS] = {{128 << 10, 16 << 10}};
static const uint64_t two_planes[][KVD_POOL_KINDS] = {{128 << 10, 16 << 10}, {64 << 10, 8 << 10}};

// A plane as test_layout's, and one with a window of 128.
static inline struct kvd_layout windowed_layout(void)
{
    struct kvd_layout l = test_layout(2, 64, 128);
    l.n_planes = 2;
    l.planes[1] = l.planes[0];
    l.planes[0].n_layers = l.planes[1].n_layers = 1;
    l.planes[1].sink = 0;
    l.planes[1].recent = 64;
    l.planes[1].window = 128;
    l.plane_of[1] = 1;
    return l;
}

static inline void keys_of(const struct kvd_blocks_space *space, const uint8_t *labels, uint32_t n,
                           struct kvd_prefix_key *out)
{
    uint8_t block_keys[64][16] = {0};
    for (uint32_t i = 0; i < n; i++)
        block_keys[i][0] = labels[i];
    ck_assert_int_eq(
        kvd_prefix_keys_of_blocks(space->domain, NULL, block_keys[0], 16, n, out, NULL), 0);
}

static inline struct kvd_blocks_space space_of(uint32_t ns, uint32_t layout, const char *extra)
{
    struct kvd_blocks_space s = {.ns = ns, .layout = layout};
    uint8_t digest[32] = {(uint8_t)layout};
    char name[4] = {'n', (char)('0' + ns), 0};
    ck_assert_int_eq(kvd_prefix_domain_digest(name, digest, extra, strlen(extra), s.domain, NULL),
                     0);
    return s;
}

static inline int grow(struct kvd_pool *pool, uint64_t seq, uint32_t n, struct kvd_error *err)
{
    struct kvd_pool_seq_info info;
    struct kvd_pool_append a;
    ck_assert_int_eq(kvd_pool_seq_info(pool, seq, &info), 0);
    struct kvd_pool_append_request by = {.seq = seq,
                                         .position = info.length,
                                         .tokens = n,
                                         .layer_count =
                                             kvd_pool_layout_get(pool, info.layout)->n_layers};
    int rc = kvd_pool_append_begin(pool, &by, &a, err);
    if (rc == 0)
        kvd_pool_append_commit(pool, &a);
    return rc;
}

static inline void verify(struct kvd_pool *pool)
{
    struct kvd_error err = {0};
    ck_assert_msg(kvd_pool_verify(pool, &err) == 0, "%s", err.text);
}

struct fixture {
    struct test_mem mem;
    struct kvd_pool *pool;
    struct kvd_error err;
    uint32_t ns, layout;
    struct kvd_blocks_space space;
    struct kvd_prefix_key keys[40];
};

static inline void setup(struct fixture *f, uint32_t extents)
{
    static const uint8_t labels[40] = {1, 2, 3, 4, 5, 6, 7, 8};
    *f = (struct fixture){0};
    f->pool = test_pool(&f->mem, extents, 64);
    struct kvd_layout l = test_layout(1, 64, 256);
    ck_assert_int_eq(kvd_pool_namespace(f->pool, "n0", &f->ns, &f->err), 0);
    ck_assert_int_eq(kvd_pool_layout(f->pool, f->ns, &l, one_plane, &f->layout, &recycled, &f->err),
                     0);
    f->space = space_of(f->ns, f->layout, "");
    keys_of(&f->space, labels, 40, f->keys);
}

static inline uint64_t sequence_of(struct fixture *f, uint32_t tokens)
{
    uint64_t seq;
    ck_assert_int_eq(kvd_pool_seq_new(f->pool, f->ns, f->layout, &seq, &f->err), 0);
    ck_assert_msg(grow(f->pool, seq, tokens, &f->err) == 0, "%s", f->err.text);
    return seq;
}

static inline struct kvd_blocks_match match(struct fixture *f, uint32_t n)
{
    struct kvd_blocks_match m = {.keys = f->keys, .n = n};
    kvd_blocks_match(f->pool, &f->space, true, &m);
    return m;
}

static inline struct kvd_blocks_published publish(struct fixture *f, uint64_t seq, uint32_t n,
                                                  bool end)
{
    struct kvd_blocks_published out;
    ck_assert_msg(!kvd_blocks_publish(f->pool, &f->space, seq, f->keys, n, end, &out, &f->err),
                  "%s", f->err.text);
    return out;
}

#endif
