// Tiers: blocks as they are stored, the front and its limits, host memory.
#include <time.h>

#include "daemon/tier/backend.h"
#include "daemon/tier/host.h"
#include "tests/unit/tier_fake.h"
#include "tests/unit/tier_fixture.h"

enum { BYTES = 20000 };

static time_t clock_set_by; // seconds

// Instead of the library's, as the tests set the clock.
time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec += clock_set_by;
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

static const struct kvd_tier_settings plain = {.timeout_ms = 5000};

// -- blocks -------------------------------------------------------------------------------------

static int verify(struct kvd_block *b, const struct kvd_tier_secret *secret,
                  const struct kvd_tier_key *key)
{
    return kvd_block_verify(b, secret, key, tier_layout, 1000, 0, NULL);
}

START_TEST(whatever_bit_is_flipped_is_noticed)
{
    struct kvd_tier_secret *secrets[] = {NULL, tier_secret_of("0123456789abcdef0123456789abcdef!")};
    for (size_t s = 0; s < 2; s++) {
        struct kvd_tier_key key = tier_key(1, secrets[s]);
        struct kvd_block *b = tier_block(1, BYTES);
        size_t n;
        ck_assert_int_eq(kvd_block_seal(b, secrets[s], &key, tier_layout, 1000, NULL), KVD_OK);
        uint8_t *value = kvd_block_value(b, &n);
        ck_assert_uint_eq(n, BYTES + KVD_BLOCK_HEADER);
        ck_assert_int_eq(verify(b, secrets[s], &key), KVD_OK);
        for (size_t bit = 0; bit < n * 8; bit += bit < KVD_BLOCK_HEADER * 8 ? 1 : 991) {
            // The time is guarded by the checksum, and what is behind it by the MAC if there is
            // one.
            bool mac = bit / 8 >= KVD_BLOCK_HEADER - 32 && bit / 8 < KVD_BLOCK_HEADER;
            value[bit / 8] ^= (uint8_t)(1 << bit % 8);
            if (!mac || secrets[s])
                ck_assert_int_eq(verify(b, secrets[s], &key), KVD_E_CORRUPT);
            value[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        ck_assert_int_eq(verify(b, secrets[s], &key), KVD_OK);
        kvd_block_unref(&b);
    }
    kvd_tier_secret_free(&secrets[1]);
}
END_TEST

START_TEST(a_block_is_what_was_asked_for_or_is_refused)
{
    struct kvd_tier_secret *ours = tier_secret_of("0123456789abcdef0123456789abcdef");
    struct kvd_tier_secret *theirs = tier_secret_of("0123456789abcdef0123456789abcdeX");
    struct kvd_tier_key key = tier_key(1, ours), other = tier_key(2, ours);
    static const uint8_t other_layout[32] = "another";
    struct kvd_block *b = tier_block(1, BYTES), *longer = tier_block(1, BYTES + 1);
    struct kvd_error err = {0};
    size_t n;
    ck_assert_int_eq(kvd_block_seal(b, ours, &key, tier_layout, 1000, NULL), KVD_OK);
    ck_assert_int_eq(kvd_block_seal(b, ours, &key, tier_layout, 2000, NULL), KVD_OK); // as it is
    ck_assert_int_eq(kvd_block_seal(b, ours, &other, tier_layout, 1000, NULL), KVD_E_INVALID);
    ck_assert_int_eq(verify(b, ours, &key), KVD_OK);
    ck_assert_int_eq(verify(b, ours, &other), KVD_E_CORRUPT);
    ck_assert_int_eq(verify(b, theirs, &key), KVD_E_CORRUPT);
    ck_assert_int_eq(verify(b, NULL, &key), KVD_E_CORRUPT);
    ck_assert_int_eq(kvd_block_verify(b, ours, &key, other_layout, 1000, 0, &err), KVD_E_CORRUPT);
    ck_assert_int_eq(kvd_block_verify(b, ours, &key, tier_layout, 1010, 10, &err), KVD_OK);
    ck_assert_int_eq(kvd_block_verify(b, ours, &key, tier_layout, 1011, 10, &err), KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_block_verify(b, ours, &key, tier_layout, 900, 10, &err), KVD_OK);
    uint8_t *from = kvd_block_value(b, &n);
    memcpy(kvd_block_value(longer, &(size_t){0}), from, n);
    ck_assert_int_eq(verify(longer, ours, &key), KVD_E_CORRUPT);
    // Whoever has no key can make a checksum, and no MAC.
    struct kvd_block *forged = tier_block(7, BYTES);
    ck_assert_int_eq(kvd_block_seal(forged, NULL, &key, tier_layout, 1000, NULL), KVD_OK);
    ck_assert_int_eq(verify(forged, NULL, &key), KVD_OK);
    ck_assert_int_eq(verify(forged, ours, &key), KVD_E_CORRUPT);
    kvd_block_unref(&forged);
    kvd_block_unref(&longer);
    kvd_block_unref(&b);
    kvd_tier_secret_free(&ours);
    kvd_tier_secret_free(&theirs);
    ck_assert_ptr_null(kvd_block_new(0));
    ck_assert_ptr_null(kvd_block_new((uint64_t)KVD_BLOCK_MAX + 1));
}
END_TEST

START_TEST(keys_differ_by_all_that_a_block_is)
{
    struct kvd_tier_secret *secret = tier_secret_of("0123456789abcdef0123456789abcdef");
    // SHA-256 and HMAC-SHA-256 by Python's hashlib and hmac.
    static const char *const expected[] = {
        "01538d15f55427cc88209950c6389fa7c79ec85583486fadfc57949acd16e9e5",
        "e49201d9b6ca5025aa782f6ae69facfb3b54f499e0f2f2e1e9dc19937e066bc3"};
    struct kvd_block_name name = {.plane = 1}, others[4];
    struct kvd_tier_key key, other;
    char hex[KVD_TIER_KEY_TEXT];
    for (size_t i = 0; i < 4; i++)
        others[i] = name;
    others[0].domain[31]++;
    others[1].layout[0]++;
    others[2].key[23]++;
    others[3].plane++;
    struct kvd_tier_namer *unkeyed = kvd_tier_namer_new(NULL, NULL);
    struct kvd_tier_namer *keyed = kvd_tier_namer_new(secret, NULL);
    kvd_tier_secret_free(&secret);
    for (int twice = 0; twice < 2; twice++) { // as what is stored already has to be found
        ck_assert_int_eq(kvd_tier_key_of(unkeyed, &name, &key, NULL), KVD_OK);
        kvd_hex(key.bytes, sizeof(key.bytes), hex);
        ck_assert_str_eq(hex, expected[0]);
        ck_assert_int_eq(kvd_tier_key_of(keyed, &name, &other, NULL), KVD_OK);
        kvd_hex(other.bytes, sizeof(other.bytes), hex);
        ck_assert_str_eq(hex, expected[1]);
    }
    for (size_t i = 0; i < 4; i++) {
        ck_assert_int_eq(kvd_tier_key_of(unkeyed, &others[i], &other, NULL), KVD_OK);
        ck_assert_mem_ne(&key, &other, sizeof(key));
    }
    kvd_tier_namer_free(&unkeyed);
    kvd_tier_namer_free(&keyed);
}
END_TEST

// -- the front, before a back end that does as it is told ---------------------------------------

START_TEST(a_tier_that_hangs_holds_little_and_is_left_alone)
{
    uv_loop_t loop;
    struct fake f = {.hold = true};
    struct answer a = {0};
    struct kvd_tier_status s;
    struct kvd_tier_key key = tier_key(1, NULL);
    uv_loop_init(&loop);
    struct kvd_tier *t =
        tier_open(&loop, &fake_ops, &f, &(struct kvd_tier_settings){.timeout_ms = 60});
    for (uint32_t i = 0; i < 20; i++)
        kvd_tier_get(t, &key, tier_layout, BYTES, tier_answered, &a);
    ck_assert_uint_eq(f.submitted, 4);
    tier_until(&loop, &a.n, 20);
    kvd_tier_status(t, &s);
    ck_assert_uint_eq(s.count[KVD_TIER_GET][KVD_TIER_TIMEOUT], 20);
    ck_assert_uint_eq(s.running, 4); // given up, and held still
    // It goes on hanging: failure after failure, without anything else being sent.
    for (uint32_t i = 0; i < 3; i++) {
        a.n = 0;
        kvd_tier_get(t, &key, tier_layout, BYTES, tier_answered, &a);
        tier_until(&loop, &a.n, 1);
    }
    ck_assert_uint_eq(f.submitted, 4);
    // What comes late harms nobody, and then it is asked again.
    f.result = KVD_TIER_MISS;
    fake_release(&f);
    f.hold = false;
    enum kvd_tier_result rc = KVD_TIER_TIMEOUT;
    for (uint32_t i = 0; i < 100 && rc != KVD_TIER_MISS;
         i++) { // 60 ms may be short for this thread
        tier_sleep(&loop, 30);
        rc = tier_get(&loop, t, 1, BYTES, NULL);
    }
    ck_assert_int_eq(rc, KVD_TIER_MISS);
    kvd_tier_status(t, &s);
    ck_assert_str_eq(s.state, "ok");
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}
END_TEST

// False: the machine was slower than the pauses, half a second and a second, and nothing is told.
static bool left_alone_and_tried_again(void)
{
    uv_loop_t loop;
    struct fake f = {.result = KVD_TIER_FAILED};
    struct kvd_tier_status s;
    uv_loop_init(&loop);
    struct kvd_tier *t = tier_open(&loop, &fake_ops, &f, &plain);
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_FAILED);
    uint64_t failed = uv_hrtime();
    uint32_t refused = 0;
    for (uint32_t i = 0; i < 10; i++) {
        refused += tier_get(&loop, t, 1, BYTES, NULL) == KVD_TIER_REFUSED;
        refused += tier_put(&loop, t, 1, BYTES, NULL) == KVD_TIER_REFUSED;
    }
    bool in_time = tier_ms_since(failed) < 400;
    ck_assert(!in_time || (refused == 20 && f.submitted == 3));
    kvd_tier_status(t, &s);
    ck_assert_str_eq(s.state, "failing");
    ck_assert_str_eq(s.why, "as told");
    tier_sleep(&loop, 600);
    failed = uv_hrtime();
    enum kvd_tier_result first = tier_get(&loop, t, 1, BYTES, NULL); // one goes through
    enum kvd_tier_result second = tier_get(&loop, t, 1, BYTES, NULL);
    in_time = in_time && tier_ms_since(failed) < 900;
    ck_assert(!in_time || (first == KVD_TIER_FAILED && second == KVD_TIER_REFUSED));
    tier_sleep(&loop, in_time ? 0 : 5000); // what has failed meanwhile has made the pause longer
    f.result = KVD_TIER_OK;
    tier_sleep(&loop, 1100); // twice as long
    ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_MISS);
    ck_assert_int_eq(tier_put(&loop, t, 1, BYTES, NULL), KVD_TIER_OK);
    kvd_tier_status(t, &s);
    ck_assert_str_eq(s.state, "ok");
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
    return in_time;
}

START_TEST(a_tier_that_fails_is_left_alone_and_tried_again)
{
    bool in_time = false;
    for (uint32_t tries = 0; !in_time && tries < 5; tries++)
        in_time = left_alone_and_tried_again();
    ck_assert(in_time);
}
END_TEST

START_TEST(a_full_tier_takes_no_puts_for_a_while_and_is_read)
{
    uv_loop_t loop;
    struct fake f = {.result = KVD_TIER_FULL};
    struct kvd_tier_status s;
    uv_loop_init(&loop);
    struct kvd_tier *t = tier_open(&loop, &fake_ops, &f, &plain);
    ck_assert_int_eq(tier_put(&loop, t, 1, BYTES, NULL), KVD_TIER_FULL);
    f.result = KVD_TIER_OK;
    ck_assert_int_eq(tier_put(&loop, t, 1, BYTES, NULL), KVD_TIER_FULL);
    ck_assert_uint_eq(f.submitted, 1);
    ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_MISS);
    kvd_tier_status(t, &s);
    ck_assert_str_eq(s.state, "full");
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}
END_TEST

// Of a put and a drop of one key the later one is done later, whatever the back end does first.
START_TEST(a_drop_and_a_put_of_one_key_keep_their_order)
{
    uv_loop_t loop;
    struct fake f = {.hold = true, .result = KVD_TIER_OK};
    struct answer a = {0};
    const struct kvd_tier_key one = tier_key(1, NULL), two = tier_key(2, NULL);
    struct kvd_block *block = kvd_block_new(BYTES);
    uv_loop_init(&loop);
    struct kvd_tier *t = tier_open(&loop, &fake_ops, &f, &plain);
    kvd_tier_put(t, &one, tier_layout, block, tier_answered, &a);
    kvd_tier_drop(t, &one, tier_answered, &a);
    kvd_tier_put(t, &one, tier_layout, block, tier_answered, &a);
    kvd_tier_drop(t, &two, tier_answered, &a); // which has to do with neither
    kvd_tier_drop(t, &two, tier_answered, &a); // nor do drops with each other
    ck_assert_uint_eq(f.n, 3);
    ck_assert_int_eq(f.ops[0]->verb, KVD_TIER_PUT);
    ck_assert_mem_eq(f.ops[1]->keys, &two, sizeof(two));
    ck_assert_mem_eq(f.ops[2]->keys, &two, sizeof(two));
    const enum kvd_tier_verb next[] = {KVD_TIER_DROP, KVD_TIER_PUT};
    for (size_t i = 0; i < KVD_LEN(next); i++) {
        fake_release(&f);
        tier_until(&loop, &a.n, 3 + (uint32_t)i);
        ck_assert_uint_eq(f.n, 1);
        ck_assert_int_eq(f.ops[0]->verb, next[i]);
        ck_assert_mem_eq(f.ops[0]->keys, &one, sizeof(one));
    }
    fake_release(&f);
    tier_until(&loop, &a.n, 5);
    kvd_block_unref(&block);
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}
END_TEST

START_TEST(what_waits_is_bounded_and_reads_go_first)
{
    uv_loop_t loop;
    struct fake f = {.hold = true, .result = KVD_TIER_MISS};
    struct answer a = {0}, b = {0};
    struct kvd_tier_status s;
    struct kvd_tier_key key = tier_key(1, NULL);
    struct kvd_block *block = kvd_block_new(16 << 20);
    uv_loop_init(&loop);
    struct kvd_tier *t = tier_open(&loop, &fake_ops, &f, &plain);
    for (uint32_t i = 0; i < 30; i++)
        kvd_tier_put(t, &key, tier_layout, block, tier_answered, &a);
    // 3 run, as one place is for reads, and 16 wait: 256 MiB.
    tier_until(&loop, &a.n, 11);
    ck_assert_int_eq(a.result, KVD_TIER_REFUSED);
    ck_assert_uint_eq(f.submitted, 3);
    kvd_tier_get(t, &key, tier_layout, BYTES, tier_answered, &b);
    ck_assert_uint_eq(f.submitted, 4);
    kvd_tier_status(t, &s);
    ck_assert_uint_eq(s.running, 4);
    ck_assert_uint_eq(s.waiting, 16);
    // It ends with all of that waiting and running: all are told, and what runs holds on to what it
    // has.
    ck_assert(!kvd_tier_close(&t));
    ck_assert_uint_eq(a.n, 30);
    ck_assert_uint_eq(b.n, 1);
    ck_assert_int_eq(a.result, KVD_TIER_CLOSED);
    uv_run(&loop, UV_RUN_DEFAULT);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
    fake_release(&f); // the thread comes back when all else is gone
    ck_assert_uint_eq(atomic_load(&block->refs), 1);
    kvd_block_unref(&block);
}
END_TEST

START_TEST(what_is_written_has_a_rate)
{
    uv_loop_t loop;
    struct fake f = {.result = KVD_TIER_OK};
    struct answer a = {0};
    struct kvd_tier_key key = tier_key(1, NULL);
    struct kvd_block *block = kvd_block_new(1 << 20);
    uv_loop_init(&loop);
    struct kvd_tier *t = tier_open(
        &loop, &fake_ops, &f, &(struct kvd_tier_settings){.timeout_ms = 5000, .rate = 20 << 20});
    uint64_t began = uv_hrtime();
    for (uint32_t i = 0; i < 10; i++)
        kvd_tier_put(t, &key, tier_layout, block, tier_answered, &a);
    tier_until(&loop, &a.n, 10);
    ck_assert_uint_ge((uv_hrtime() - began) / 1000000,
                      300); // 10 MiB at 20 MiB/s, less what was saved up
    kvd_block_unref(&block);
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}
END_TEST

// -- host memory --------------------------------------------------------------------------------

START_TEST(host_memory_is_bounded_and_keeps_what_is_used)
{
    uv_loop_t loop;
    struct kvd_tier_status s;
    uv_loop_init(&loop);
    struct kvd_tier *t =
        tier_open(&loop, &kvd_tier_host_ops, kvd_tier_host_new(10 * BYTES), &plain);
    for (uint64_t i = 0; i < 10; i++)
        ck_assert_int_eq(tier_put(&loop, t, i, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&loop, t, 0, BYTES, NULL), KVD_TIER_OK);
    for (uint64_t i = 10; i < 15; i++)
        ck_assert_int_eq(tier_put(&loop, t, i, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&loop, t, 0, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_MISS);
    ck_assert(tier_has(&loop, t, 14) && !tier_has(&loop, t, 2));
    ck_assert_int_eq(tier_put(&loop, t, 99, 10 * BYTES + 1, NULL), KVD_TIER_FULL);
    ck_assert_int_eq(tier_get(&loop, t, 14, BYTES - 1, NULL), KVD_TIER_DAMAGED);
    kvd_tier_status(t, &s);
    ck_assert_uint_eq(s.blocks, 9);
    ck_assert_uint_eq(s.bytes, 9 * BYTES);
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_ROOM], 5); // and 14 was damaged
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_EXPIRED], 0);
    ck_assert_uint_eq(s.lost.ages.count, 5);
    ck_assert_uint_eq(s.lost.ages.bucket[0] + s.lost.ages.bucket[1], 5); // of seconds
    struct answer a = {0};
    kvd_tier_flush(t, tier_answered, &a);
    tier_until(&loop, &a.n, 1);
    kvd_tier_status(t, &s);
    ck_assert_uint_eq(s.blocks, 0);
    ck_assert_uint_eq(s.bytes, 0);
    tier_put(&loop, t, 1, BYTES, NULL);
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}
END_TEST

START_TEST(a_clock_that_is_set_back_takes_nothing)
{
    uv_loop_t loop;
    const struct kvd_tier_settings expires = {.timeout_ms = 5000, .ttl_s = 1000};
    uv_loop_init(&loop);
    struct kvd_tier *t =
        tier_open(&loop, &kvd_tier_host_ops, kvd_tier_host_new(10 * BYTES), &expires);
    ck_assert_int_eq(tier_put(&loop, t, 1, BYTES, NULL), KVD_TIER_OK);
    clock_set_by = -5000;
    ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_OK);
    ck_assert(tier_has(&loop, t, 1));
    clock_set_by = 900;
    ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_OK);
    clock_set_by = 1002;
    ck_assert_int_eq(tier_get(&loop, t, 1, BYTES, NULL), KVD_TIER_MISS);
    clock_set_by = 0;
    tier_end(&loop, &t);
    ck_assert_int_eq(uv_loop_close(&loop), 0);
}
END_TEST

KVD_MAIN("tier", 60, whatever_bit_is_flipped_is_noticed,
         a_block_is_what_was_asked_for_or_is_refused, keys_differ_by_all_that_a_block_is,
         a_tier_that_hangs_holds_little_and_is_left_alone,
         a_tier_that_fails_is_left_alone_and_tried_again,
         a_full_tier_takes_no_puts_for_a_while_and_is_read,
         a_drop_and_a_put_of_one_key_keep_their_order, what_waits_is_bounded_and_reads_go_first,
         what_is_written_has_a_rate, host_memory_is_bounded_and_keeps_what_is_used,
         a_clock_that_is_set_back_takes_nothing)
