// What a call writes, and what else it touches: compared with a map of all bytes.
#include <time.h>

#include "proto/overlap.h"
#include "tests/unit/suite.h"

enum { BYTES = 8192, MOST = 6, ITEMS = 4096 };

static uint64_t below(uint64_t *state, uint64_t n)
{
    return kvd_rand(state) % n;
}

static struct kvd_overlap random_span(uint64_t *r, uint32_t item)
{
    static const uint64_t strides[] = {4, 8, 12, 16, 32, 48, 64, 96, 128, 256, 384, 512};
    struct kvd_overlap o = {.memory = below(r, 2), .row = 4 * (1 + below(r, 3)), .item = item};
    o.written = below(r, 2);
    o.name = o.written ? "o" : "q";
    o.begin = 4 * below(r, 100);
    for (int i = 0; i < 3; i++)
        o.dims[i] = (struct kvd_overlap_dim){1 + below(r, 3), strides[below(r, KVD_LEN(strides))]};
    return o;
}

// 0: apart; 1: two share a byte of which one writes; 2: one's own rows do.
static int by_bytes(const struct kvd_overlap *all, uint32_t n)
{
    static uint8_t map[2][BYTES]; // 1: read, 2: written
    memset(map, 0, sizeof(map));
    int found = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t own[BYTES] = {0};
        const struct kvd_overlap *o = &all[i];
        for (uint64_t a = 0; a < o->dims[0].count; a++)
            for (uint64_t b = 0; b < o->dims[1].count; b++)
                for (uint64_t c = 0; c < o->dims[2].count; c++)
                    for (uint64_t x = 0; x < o->row; x++) {
                        uint64_t at = o->begin + a * o->dims[0].stride + b * o->dims[1].stride +
                                      c * o->dims[2].stride + x;
                        if (o->written && own[at])
                            found = 2;
                        own[at] = 1;
                    }
        for (uint32_t at = 0; at < BYTES; at++) {
            uint8_t *m = &map[o->memory][at];
            if (own[at] && (*m & 2 || (o->written && *m)))
                found = found ? found : 1;
            if (own[at])
                *m |= o->written ? 2 : 1;
        }
    }
    return found;
}

START_TEST(what_shares_bytes_is_refused_and_little_else)
{
    uint64_t r = kvd_test_seed("overlap");
    uint32_t apart = 0, refused = 0, rounds = kvd_test_rounds(100000);
    for (uint32_t round = 0; round < rounds; round++) {
        struct kvd_overlap all[MOST];
        struct kvd_error err = {0};
        uint32_t n = 1 + (uint32_t)below(&r, MOST);
        for (uint32_t i = 0; i < n; i++)
            all[i] = random_span(&r, i);
        int rc = kvd_overlap_check(all, n, &err), want = by_bytes(all, n);
        if (want)
            ck_assert_int_eq(rc, KVD_E_INVALID);
        apart += !want;
        refused += !want && rc;
    }
    // Strides that are no array's, and gaps of what is read so: refused without need.
    ck_assert_uint_gt(apart, rounds / 100);
    ck_assert_uint_lt(refused, apart / 4);
}
END_TEST

// Views of arrays, as batches have them, are told apart exactly.
START_TEST(views_of_one_array_are_apart)
{
    uint64_t r = kvd_test_seed("views");
    for (uint32_t round = 0, rounds = kvd_test_rounds(20000); round < rounds; round++) {
        // [layers][tokens][kinds][heads][dim]: items are ranges of tokens, tensors kinds.
        uint64_t layers = 1 + below(&r, 4), kinds = 1 + below(&r, 3), heads = 1 + below(&r, 3);
        uint64_t dim = 4 * (1 + below(&r, 2)), tokens = 0, counts[4];
        uint32_t items = 1 + (uint32_t)below(&r, 4), n = 0;
        for (uint32_t i = 0; i < items; i++)
            tokens += counts[i] = 1 + below(&r, 4);
        struct kvd_overlap all[16];
        struct kvd_error err = {0};
        for (uint64_t i = 0, at = 0; i < items; at += counts[i++])
            for (uint64_t k = 0; k < kinds; k++)
                all[n++] = (struct kvd_overlap){.begin = (at * kinds + k) * heads * dim,
                                                .row = dim,
                                                .dims = {{layers, tokens * kinds * heads * dim},
                                                         {counts[i], kinds * heads * dim},
                                                         {heads, dim}},
                                                .written = below(&r, 2),
                                                .name = "o",
                                                .item = (uint32_t)i};
        ck_assert_msg(kvd_overlap_check(all, n, &err) == KVD_OK, "%s", err.text);
        struct kvd_overlap *o = &all[below(&r, n)];
        o->written = true;
        o->row += 4; // into the next row, perhaps beyond the end
        ck_assert_int_eq(kvd_overlap_check(all, n, &err) != KVD_OK, by_bytes(all, n) != 0);
    }
}
END_TEST

START_TEST(messages_name_both)
{
    struct kvd_error err = {0};
    struct kvd_overlap all[] = {
        {.begin = 0, .row = 16, .name = "q", .item = 1},
        {.begin = 32, .row = 16, .name = "o", .item = 2, .written = true},
        {.begin = 40, .row = 4, .name = "signal", .item = KVD_OVERLAP_NO_ITEM}};
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t d = 0; d < 3; d++)
            all[i].dims[d].count = 1;
    ck_assert_int_eq(kvd_overlap_check(all, 3, &err), KVD_E_INVALID);
    ck_assert_str_eq(err.text, "items[2].o, which is written, shares memory with signal");
    all[2].memory = 1; // the same address elsewhere
    ck_assert_int_eq(kvd_overlap_check(all, 3, &err), KVD_OK);
    all[1].dims[0] = (struct kvd_overlap_dim){2, 8};
    ck_assert_int_eq(kvd_overlap_check(all, 3, &err), KVD_E_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "items[2].o, which is written: its strides"));
}
END_TEST

// Two that are interleaved without a stride in common are looked at row by row, up to a number.
START_TEST(what_is_too_intricate_is_refused)
{
    struct kvd_error err = {0};
    struct kvd_overlap all[] = {
        {.row = 4, .dims = {{8000, 64}, {1, 0}, {1, 0}}, .name = "o", .written = true},
        {.row = 4, .dims = {{8000, 96}, {1, 0}, {1, 0}}, .begin = 16, .name = "q"}};
    ck_assert_int_eq(kvd_overlap_check(all, 2, &err), KVD_OK);
    all[0].dims[0].count = 3000000000;
    ck_assert_int_eq(kvd_overlap_check(all, 2, &err), KVD_E_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "too many pieces"));
}
END_TEST

// The largest batch takes little of the loop's time.
START_TEST(a_large_batch_is_quick)
{
    static struct kvd_overlap all[5 * ITEMS];
    struct kvd_error err = {0};
    for (uint32_t i = 0; i < ITEMS; i++)
        for (uint32_t k = 0; k < 5; k++)
            all[5 * i + k] =
                (struct kvd_overlap){.memory = k,
                                     .begin = i * 4096,
                                     .row = 256,
                                     .dims = {{36, 4096 * ITEMS}, {1, 4096}, {16, 256}},
                                     .written = k > 2,
                                     .name = "o",
                                     .item = i};
    clock_t begin = clock();
    ck_assert_int_eq(kvd_overlap_check(all, KVD_LEN(all), &err), KVD_OK);
    double ms = 1e3 * (double)(clock() - begin) / CLOCKS_PER_SEC;
    printf("%d items of 5 tensors: %.1f ms\n", ITEMS, ms);
    ck_assert(ms < 200);
}
END_TEST

KVD_MAIN("overlap", 60, what_shares_bytes_is_refused_and_little_else, views_of_one_array_are_apart,
         messages_name_both, what_is_too_intricate_is_refused, a_large_batch_is_quick)
