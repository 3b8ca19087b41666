// An engine's blocks in host memory: copies against element by element, and what is refused.
#include "client/lib/paged.h"
#include "tests/unit/suite.h"

enum { BLOCKS = 24, LAYERS = 2, HEADS = 3, DIM = 80, MOST = 128, PAGES = 3, TOKENS = PAGES * 64 };

static const struct kvd_page_shape shape = {.layers = LAYERS, .heads = HEADS, .dims = {DIM, 64}};

// Memory of one side in some order of its dimensions, innermost last, with a gap behind each block.
struct memory {
    uint16_t *layer[LAYERS];
    kvd_strides s;
    uint64_t bytes;
};

static struct memory memory_of(const char *order, uint32_t tokens, uint32_t dim)
{
    struct memory m = {.bytes = 0};
    uint64_t step = 2;
    for (int i = 3; i >= 0; i--) {
        switch (order[i]) {
        case 'b':
            m.s.block = step + 16;
            step = m.s.block * BLOCKS;
            break;
        case 'h':
            m.s.head = step;
            step *= HEADS;
            break;
        case 't':
            m.s.token = step;
            step *= tokens;
            break;
        default:
            m.s.dim = step;
            step *= dim;
        }
    }
    m.bytes = step;
    for (int i = 0; i < LAYERS; i++) {
        m.layer[i] = malloc(step);
        memset(m.layer[i], 0x55, step);
    }
    return m;
}

static uint16_t *element(const struct memory *m, int layer, uint32_t block, uint32_t head,
                         uint32_t token, uint32_t d)
{
    return m->layer[layer] +
           (block * m->s.block + head * m->s.head + token * m->s.token + d * m->s.dim) / 2;
}

static kvd_paged paged_of(const struct memory *k, const struct memory *v, uint32_t tokens,
                          const uint32_t *blocks, uint32_t first)
{
    return KVD_NEW(kvd_paged, .k = (void *const *)k->layer, .v = (void *const *)v->layer,
                   .k_bytes = k->bytes, .v_bytes = v->bytes, .k_strides = k->s, .v_strides = v->s,
                   .all_blocks = BLOCKS, .block_tokens = tokens, .blocks = blocks,
                   .n_blocks = BLOCKS, .first_token = first);
}

static void free_memory(struct memory *m)
{
    for (int i = 0; i < LAYERS; i++)
        free(m->layer[i]);
}

static void shuffled(uint64_t *r, uint32_t blocks[BLOCKS])
{
    for (uint32_t i = 0; i < BLOCKS; i++)
        blocks[i] = i;
    for (uint32_t i = BLOCKS - 1; i > 0; i--) {
        uint32_t j = (uint32_t)(kvd_rand(r) % (i + 1)), t = blocks[i];
        blocks[i] = blocks[j];
        blocks[j] = t;
    }
}

// Scatters numbers that say where they belong, looks for them, and gathers them again.
static void round_trip(uint64_t *r, const char *k_order, const char *v_order, uint32_t tokens)
{
    const uint32_t dims[2] = {DIM, 64};
    struct memory m[2] = {memory_of(k_order, tokens, DIM), memory_of(v_order, tokens, 64)};
    uint32_t blocks[BLOCKS], first = (uint32_t)(kvd_rand(r) % tokens), wrong = 0;
    uint16_t *dense[2], *back[2];
    struct kvd_error err = {0};
    shuffled(r, blocks);
    kvd_paged p = paged_of(&m[0], &m[1], tokens, blocks, first);
    if ((first + TOKENS + tokens - 1) / tokens > BLOCKS)
        p.first_token = first = 0;
    struct kvd_paged_kv kv;
    ck_assert_msg(kvd_paged_take(&p, &shape, PAGES, true, &kv, &err) == 0, "%s: %s", k_order,
                  err.text);
    for (int side = 0; side < 2; side++) {
        size_t n = (size_t)LAYERS * TOKENS * HEADS * dims[side];
        dense[side] = malloc(n * 2);
        back[side] = calloc(n, 2);
        for (size_t i = 0; i < n; i++)
            dense[side][i] = (uint16_t)kvd_rand(r);
    }
    const uint64_t page[2] = {64ull * HEADS * DIM * 2, 64ull * HEADS * 64 * 2};
    struct kvd_paged_copy one = {.layers = LAYERS, // in two parts, the second a layer at a time
                                 .pages = 1,
                                 .dense = {(uint8_t *)dense[0], (uint8_t *)dense[1]},
                                 .dense_tokens = TOKENS,
                                 .out = true};
    kvd_paged_copy(&kv, &one);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        struct kvd_paged_copy more = {.layer = layer,
                                      .layers = 1,
                                      .page = 1,
                                      .pages = PAGES - 1,
                                      .dense_tokens = TOKENS,
                                      .out = true};
        for (int side = 0; side < 2; side++)
            more.dense[side] = (uint8_t *)dense[side] + (layer * PAGES + 1) * page[side];
        kvd_paged_copy(&kv, &more);
    }
    for (int side = 0; side < 2; side++) {
        for (int layer = 0; layer < LAYERS; layer++)
            for (uint32_t t = 0; t < TOKENS; t++)
                for (uint32_t h = 0; h < HEADS; h++)
                    for (uint32_t d = 0; d < dims[side]; d++) {
                        uint32_t at = first + t;
                        uint16_t *e =
                            element(&m[side], layer, blocks[at / tokens], h, at % tokens, d);
                        wrong +=
                            *e != dense[side][((layer * TOKENS + t) * HEADS + h) * dims[side] + d];
                    }
    }
    ck_assert_uint_eq(wrong, 0);
    one = (struct kvd_paged_copy){.layers = LAYERS,
                                  .pages = PAGES,
                                  .dense = {(uint8_t *)back[0], (uint8_t *)back[1]},
                                  .dense_tokens = TOKENS};
    kvd_paged_copy(&kv, &one);
    for (int side = 0; side < 2; side++) {
        size_t n = (size_t)LAYERS * TOKENS * HEADS * dims[side];
        ck_assert_int_eq(memcmp(dense[side], back[side], n * 2), 0);
        // Nothing else was written: what is left is as it was.
        uint64_t left = 0;
        for (int layer = 0; layer < LAYERS; layer++)
            for (size_t i = 0; i < m[side].bytes / 2; i++)
                left += m[side].layer[layer][i] == 0x5555;
        ck_assert_uint_ge(left + n, LAYERS * (m[side].bytes / 2));
        free(dense[side]);
        free(back[side]);
        free_memory(&m[side]);
    }
}

START_TEST(copies_agree_with_element_by_element)
{
    static const char *const orders[] = {"bthd", "bhtd", "bhdt", "hbtd", "tbhd", "bdht"};
    static const uint32_t tokens[] = {16, 40, 64, 128};
    uint64_t r = kvd_test_seed("paged");
    for (uint32_t t = 0; t < KVD_LEN(tokens); t++)
        for (uint32_t i = 0; i < KVD_LEN(orders); i++)
            round_trip(&r, orders[i], orders[(i + t) % KVD_LEN(orders)], tokens[t]);
}
END_TEST

START_TEST(what_reaches_beyond_its_memory_or_meets_itself_is_refused)
{
    struct memory k = memory_of("bthd", 16, DIM), v = memory_of("bthd", 16, 64);
    uint32_t blocks[BLOCKS];
    uint64_t r = 1;
    shuffled(&r, blocks);
    const kvd_paged good = paged_of(&k, &v, 16, blocks, 0);
    struct kvd_paged_kv kv;
    struct kvd_error err = {0};
#define REFUSED(says, ...)                                                                         \
    do {                                                                                           \
        kvd_paged p = good;                                                                        \
        __VA_ARGS__;                                                                               \
        ck_assert_int_eq(kvd_paged_take(&p, &shape, PAGES, true, &kv, &err), KVD_E_INVALID);       \
        ck_assert_msg(strstr(err.text, says) != NULL, "%s", err.text);                             \
    } while (0)
    ck_assert_int_eq(kvd_paged_take(&good, &shape, PAGES, true, &kv, &err), 0);
    REFUSED("NULL", p.k = NULL);
    REFUSED("NULL", p.blocks = NULL);
    REFUSED("block_tokens", p.block_tokens = 0);
    REFUSED("block_tokens", p.block_tokens = 1025);
    REFUSED("all_blocks", p.all_blocks = 0);
    REFUSED("want 12 blocks", p.n_blocks = 11);
    REFUSED("want", p.first_token = 16);
    REFUSED("and there are", p.all_blocks = 3);
    REFUSED("far", p.k_bytes -= k.s.block);
    REFUSED("far", p.v_bytes = 0);
    REFUSED("beyond 2^64", p.k_strides.block = UINT64_MAX - 1);
    REFUSED("beyond 2^64", p.k_strides.head = UINT64_MAX / 2 + 1);
    REFUSED("multiples", p.k_strides.head = 161);
    REFUSED("side by side", p.k_strides.dim = 4);
    REFUSED("share memory", p.k_strides.head = 2);
    REFUSED("share memory", p.k_strides.token = 0);
    REFUSED("share memory", p.v_strides.block = 64);
    REFUSED("no address", p.k = (void *const[]){NULL, k.layer[1]});
    REFUSED("no address", p.k = (void *const[]){(uint8_t *)k.layer[0] + 1, k.layer[1]});
    REFUSED("k", p.k = (void *const[]){k.layer[0], k.layer[0]});
    uint32_t twice[BLOCKS];
    memcpy(twice, blocks, sizeof(twice));
    twice[7] = twice[2];
    REFUSED("written twice", p.blocks = twice);
    // A source may name a block twice: nothing is written there.
    kvd_paged p = good;
    p.blocks = twice;
    ck_assert_int_eq(kvd_paged_take(&p, &shape, PAGES, false, &kv, &err), 0);
    free_memory(&k);
    free_memory(&v);
}
END_TEST

KVD_MAIN("paged", 60, copies_agree_with_element_by_element,
         what_reaches_beyond_its_memory_or_meets_itself_is_refused)
