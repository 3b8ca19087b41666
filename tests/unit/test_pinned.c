// Memory of blocks: kept, pinned by the chunk, given out so that blocks lie side by side.
#include "daemon/tier/pinned.h"
#include "tests/unit/tier_fixture.h"

enum { BYTES = 20000 };

static uint32_t pins, unpins;
static bool pin_fails;

static int pin(struct kvd_backend *b, void *at, uint64_t bytes, struct kvd_error *err)
{
    (void)b;
    memset(at, 0xff, bytes);
    pins++;
    return pin_fails ? kvd_fail(err, KVD_E_LIMIT, "no memory is pinned") : KVD_OK;
}

static void unpin(void *at)
{
    ((uint8_t *)at)[0] = 0;
    unpins++;
}

enum { BIG_PADDED = 3 << 20, BIG = BIG_PADDED - KVD_BLOCK_FRONT }; // two of a chunk

START_TEST(pinned_memory_is_kept_for_the_next_block)
{
    const struct kvd_backend_ops ops = {.host_pin = pin, .host_unpin = unpin};
    struct kvd_backend backend = {.ops = &ops};
    struct kvd_pinned *p = kvd_pinned_new(&backend, 2 * BIG_PADDED);
    struct kvd_tier_key key = tier_key(1, NULL);
    struct kvd_block *b[4];
    pins = unpins = 0;
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 4; i++) {
            b[i] = kvd_block_new_in(p, BIG);
            ck_assert_uint_eq((uintptr_t)b[i]->payload % KVD_BLOCK_FRONT, 0);
            memset(b[i]->payload, i, BIG);
            ck_assert_int_eq(kvd_block_seal(b[i], NULL, &key, tier_layout, 1000, NULL), KVD_OK);
        }
        ck_assert_uint_eq(pins, round ? 3 : 2); // one chunk had been kept
        for (int i = 0; i < 4; i++) {
            ck_assert_int_eq(kvd_block_verify(b[i], NULL, &key, tier_layout, 1000, 0, NULL),
                             KVD_OK);
            kvd_block_unref(&b[i]);
        }
        ck_assert_uint_eq(unpins, round ? 2 : 1);
    }
    b[0] = kvd_block_new_in(p, BYTES); // another size
    ck_assert_uint_eq(pins, 4);
    b[1] = kvd_block_new_in(p, BIG);
    ck_assert_uint_eq(pins, 4);
    kvd_pinned_free(&p); // and what is taken stays
    ck_assert_uint_eq(unpins, 2);
    memset(b[1]->payload, 1, BIG);
    kvd_block_unref(&b[0]);
    kvd_block_unref(&b[1]);
    ck_assert_uint_eq(unpins, pins);
    kvd_pinned_free(&p);
}
END_TEST

START_TEST(pinned_blocks_lie_side_by_side)
{
    const struct kvd_backend_ops ops = {.host_pin = pin, .host_unpin = unpin};
    struct kvd_backend backend = {.ops = &ops};
    struct kvd_pinned *p = kvd_pinned_new(&backend, 0);
    struct kvd_block *b[130], *other = kvd_block_new_in(p, BIG);
    const uint64_t padded = KVD_BLOCK_FRONT + kvd_round_up(BYTES, KVD_BLOCK_FRONT);
    pins = unpins = 0;
    for (int i = 0; i < 130; i++)
        b[i] = kvd_block_new_in(p, BYTES);
    ck_assert_uint_eq(pins, 3); // 64 of a chunk at most
    for (int i = 1; i < 130; i++) {
        bool same = kvd_block_place(b[i]) == kvd_block_place(b[i - 1]);
        ck_assert_int_eq(same, i % 64 != 0);
        ck_assert(!same || b[i]->payload == b[i - 1]->payload + padded);
    }
    ck_assert_uint_ne(kvd_block_place(b[0]), 0);
    ck_assert_uint_ne(kvd_block_place(b[0]), kvd_block_place(other));
    // Where the first ones go first, those that come lie side by side again.
    const uint8_t *was[3] = {b[0]->payload, b[1]->payload, b[2]->payload};
    kvd_block_unref(&b[129]);
    kvd_block_unref(&b[128]); // with it goes their chunk
    ck_assert_uint_eq(unpins, 1);
    for (int i = 0; i < 3; i++)
        kvd_block_unref(&b[2 - i]);
    for (int i = 0; i < 3; i++) {
        b[i] = kvd_block_new_in(p, BYTES);
        ck_assert_ptr_eq(b[i]->payload, was[i]);
    }
    ck_assert_uint_eq(pins, 3);
    for (int i = 0; i < 128; i++)
        kvd_block_unref(&b[i]);
    ck_assert_uint_eq(unpins, 3);
    kvd_block_unref(&other);
    kvd_pinned_free(&p);
}
END_TEST

START_TEST(memory_that_is_not_pinned_is_kept_too)
{
    const struct kvd_backend_ops ops = {.host_pin = pin, .host_unpin = unpin};
    struct kvd_backend backend = {.ops = &ops};
    const uint64_t padded = KVD_BLOCK_FRONT + kvd_round_up(BYTES, KVD_BLOCK_FRONT);
    struct kvd_pinned *p = kvd_pinned_new(NULL, 2 * padded); // which pins nothing
    struct kvd_block *b[2];
    pins = unpins = 0;
    b[0] = kvd_block_new_in(p, BYTES);
    b[1] = kvd_block_new_in(p, 2 * BYTES);
    const uint8_t *second = b[1]->payload;
    kvd_block_unref(&b[0]);
    kvd_block_unref(&b[1]); // more than there is room for beside the other, which goes
    b[1] = kvd_block_new_in(p, 2 * BYTES);
    ck_assert_ptr_eq(b[1]->payload, second);
    ck_assert_uint_eq(kvd_block_place(b[1]), 0);
    kvd_block_unref(&b[1]);
    ck_assert_uint_eq(pins, 0);
    kvd_pinned_free(&p);
    pin_fails = true;
    p = kvd_pinned_new(&backend, 0);
    for (int i = 0; i < 2; i++)
        b[i] = kvd_block_new_in(p, BYTES);
    ck_assert_uint_eq(pins, 1); // it is not tried again
    ck_assert_uint_eq(kvd_block_place(b[0]), 0);
    memset(b[1]->payload, 1, BYTES);
    for (int i = 0; i < 2; i++)
        kvd_block_unref(&b[i]);
    ck_assert_uint_eq(unpins, 0);
    kvd_pinned_free(&p);
    pin_fails = false;
}
END_TEST

KVD_MAIN("pinned", 60, pinned_memory_is_kept_for_the_next_block, pinned_blocks_lie_side_by_side,
         memory_that_is_not_pinned_is_kept_too)
