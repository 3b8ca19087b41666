// Tiers: blocks as they are stored, the front and its limits, host memory, a directory.
#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "daemon/tier/backend.h"
#include "daemon/tier/directory.h"
#include "daemon/tier/host.h"
#include "daemon/tier/pinned.h"
#include "tests/unit/scratch.h"
#include "tests/unit/tier_fake.h"
#include "tests/unit/tier_fixture.h"

enum { BYTES = 20000 };

static const struct kvd_tier_settings plain = {.timeout_ms = 5000};

// -- blocks -------------------------------------------------------------------------------------

static struct kvd_tier_secret *secret_of(const char *text)
{
    char path[] = "/tmp/kvd-test-secret.XXXXXX";
    struct kvd_error err = {0};
    int fd = mkstemp(path); // mode 0600
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    struct kvd_tier_secret *s = kvd_tier_secret_load(path, &err);
    ck_assert_msg(s != NULL, "%s", err.text);
    ck_assert_int_eq(fchmod(fd, 0644), 0);
    ck_assert_ptr_null(kvd_tier_secret_load(path, &err)); // others can read it
    ck_assert_int_eq(err.code, KVD_E_DENIED);
    ck_assert_int_eq(fchmod(fd, 0600), 0);
    ck_assert_int_eq(ftruncate(fd, 31), 0);
    ck_assert_ptr_null(kvd_tier_secret_load(path, &err)); // too short
    ck_assert_int_eq(err.code, KVD_E_INVALID);
    close(fd);
    unlink(path);
    return s;
}

static int verify(struct kvd_block *b, const struct kvd_tier_secret *secret,
                  const struct kvd_tier_key *key)
{
    return kvd_block_verify(b, secret, key, tier_layout, 1000, 0, NULL);
}

START_TEST(whatever_bit_is_flipped_is_noticed)
{
    struct kvd_tier_secret *secrets[] = {NULL, secret_of("0123456789abcdef0123456789abcdef!")};
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
    struct kvd_tier_secret *ours = secret_of("0123456789abcdef0123456789abcdef");
    struct kvd_tier_secret *theirs = secret_of("0123456789abcdef0123456789abcdeX");
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
    struct kvd_tier_secret *secret = secret_of("0123456789abcdef0123456789abcdef");
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

// -- a directory --------------------------------------------------------------------------------

struct place {
    uv_loop_t loop;
    char folder[64], path[80];
    struct kvd_tier *t;
    struct kvd_tier_settings settings;
    uint64_t limit;
};

static void place_open(struct place *p)
{
    struct kvd_error err = {0};
    void *state = kvd_tier_directory_new(p->path, p->limit, p->settings.ttl_s, &err);
    ck_assert_msg(state != NULL, "%s", err.text);
    p->t = tier_open(&p->loop, &kvd_tier_directory_ops, state, &p->settings);
}

static void place_begin(struct place *p)
{
    *p = (struct place){
        .folder = "/tmp/kvd-test-tier.XXXXXX", .settings = {.timeout_ms = 5000}, .limit = 1 << 20};
    p->settings.memory = tier_memory = kvd_pinned_new(NULL, 1 << 20);
    ck_assert_ptr_nonnull(mkdtemp(p->folder));
    snprintf(p->path, sizeof(p->path), "%s/blocks", p->folder);
    uv_loop_init(&p->loop);
    place_open(p);
}

static void place_end(struct place *p)
{
    tier_end(&p->loop, &p->t);
    ck_assert_int_eq(uv_loop_close(&p->loop), 0);
    kvd_pinned_free(&p->settings.memory);
    kvd_remove_folder(p->folder);
}

static void file_of(const struct place *p, uint64_t number, char out[256])
{
    struct kvd_tier_key key = tier_key(number, p->settings.secret);
    char hex[KVD_TIER_KEY_TEXT];
    kvd_hex(key.bytes, sizeof(key.bytes), hex);
    snprintf(out, 256, "%s/%.2s/%s", p->path, hex, hex + 2);
}

static uint64_t file_count(const struct place *p)
{
    char command[256];
    unsigned n = 0;
    snprintf(command, sizeof(command), "find %s -type f | wc -l", p->path);
    FILE *f = popen(command, "r");
    ck_assert_int_eq(fscanf(f, "%u", &n), 1);
    pclose(f);
    return n;
}

static uint64_t known(const struct place *p)
{
    struct kvd_tier_status s;
    kvd_tier_status(p->t, &s);
    return s.blocks;
}

static void wait_known(struct place *p, uint64_t n)
{
    for (uint32_t i = 0; i < 1000 && known(p) != n; i++)
        tier_sleep(&p->loop, 5);
    ck_assert_uint_eq(known(p), n);
}

START_TEST(a_directory_outlives_the_one_that_filled_it)
{
    struct place p;
    struct stat st;
    char file[256];
    place_begin(&p);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_MISS);
    for (uint64_t i = 0; i < 20; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK); // again
    ck_assert_uint_eq(file_count(&p), 20);
    ck_assert_uint_eq(known(&p), 20);
    file_of(&p, 3, file);
    ck_assert_int_eq(stat(file, &st), 0);
    ck_assert_int_eq(st.st_mode & 07777, 0600);
    tier_end(&p.loop, &p.t);
    place_open(&p);
    wait_known(&p, 20);
    for (uint64_t i = 0; i < 20; i++)
        ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    ck_assert(tier_has(&p.loop, p.t, 7) && !tier_has(&p.loop, p.t, 77));
    struct answer a = {0};
    struct kvd_tier_key key = tier_key(7, NULL);
    kvd_tier_drop(p.t, &key, tier_answered, &a);
    tier_until(&p.loop, &a.n, 1);
    ck_assert(!tier_has(&p.loop, p.t, 7));
    kvd_tier_flush(p.t, tier_answered, &a);
    tier_until(&p.loop, &a.n, 2);
    ck_assert_uint_eq(file_count(&p), 0);
    ck_assert_uint_eq(known(&p), 0);
    place_end(&p);
}
END_TEST

START_TEST(files_that_are_not_what_was_written_are_dropped)
{
    struct place p;
    char file[256], other[256];
    struct kvd_tier_status s;
    place_begin(&p);
    for (uint64_t i = 0; i < 6; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    file_of(&p, 0, file); // torn
    ck_assert_int_eq(truncate(file, 8192), 0);
    file_of(&p, 1, file); // as a crash leaves it: the length, and nothing in it
    struct stat st;
    stat(file, &st);
    ck_assert_int_eq(truncate(file, 0) + truncate(file, st.st_size), 0);
    file_of(&p, 2, file); // a bit
    int fd = open(file, O_RDWR);
    uint8_t byte;
    ck_assert_int_eq(pread(fd, &byte, 1, 9000), 1);
    byte ^= 0x10;
    ck_assert_int_eq(pwrite(fd, &byte, 1, 9000), 1);
    close(fd);
    file_of(&p, 3, file); // another's
    file_of(&p, 4, other);
    ck_assert_int_eq(rename(other, file), 0);
    for (uint64_t i = 0; i < 4; i++) {
        ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_DAMAGED);
        ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_MISS);
    }
    ck_assert_int_eq(tier_get(&p.loop, p.t, 5, BYTES, NULL), KVD_TIER_OK);
    kvd_tier_status(p.t, &s);
    ck_assert_uint_eq(s.count[KVD_TIER_GET][KVD_TIER_DAMAGED], 4);
    ck_assert_str_eq(s.state, "ok"); // no reason to leave it alone
    place_end(&p);
}
END_TEST

// Also without anybody who gets it and finds it damaged.
START_TEST(a_file_of_another_length_is_written_anew)
{
    struct place p;
    char file[256];
    place_begin(&p);
    for (p.settings.ttl_s = 0; p.settings.ttl_s < 200; p.settings.ttl_s += 100) {
        tier_end(&p.loop, &p.t);
        place_open(&p);
        for (uint64_t i = 0; i < 2; i++) {
            ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
            file_of(&p, i, file);
            ck_assert_int_eq(truncate(file, i ? 4096 : 1 << 16), 0);
            ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
            ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
        }
    }
    place_end(&p);
}
END_TEST

START_TEST(a_file_forged_without_the_secret_is_dropped)
{
    struct place p;
    struct kvd_tier_secret *secret = secret_of("0123456789abcdef0123456789abcdef");
    char file[256];
    size_t n;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    p.settings.secret = secret;
    place_open(&p);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_OK);
    struct kvd_tier_key key = tier_key(1, secret);
    struct kvd_block *forged = tier_block(2, BYTES);
    ck_assert_int_eq(kvd_block_seal(forged, NULL, &key, tier_layout, (uint64_t)time(NULL), NULL),
                     KVD_OK);
    uint8_t *data = kvd_block_padded(forged, &n);
    file_of(&p, 1, file);
    int fd = open(file, O_WRONLY | O_TRUNC);
    ck_assert_int_eq(write(fd, data, n), (ssize_t)n);
    close(fd);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_DAMAGED);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_MISS);
    kvd_block_unref(&forged);
    place_end(&p);
    kvd_tier_secret_free(&secret);
}
END_TEST

START_TEST(a_directory_keeps_its_limit_and_what_is_used)
{
    struct place p;
    struct kvd_tier_status s;
    char file[256];
    place_begin(&p); // 1 MiB: 42 files of 24 KiB
    for (uint64_t i = 0; i < 60; i++) {
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
        ck_assert_int_eq(tier_get(&p.loop, p.t, 0, BYTES, NULL), KVD_TIER_OK);
    }
    kvd_tier_status(p.t, &s);
    ck_assert_uint_le(s.bytes, p.limit);
    ck_assert_uint_eq(s.blocks, file_count(&p));
    ck_assert_uint_eq(s.blocks, 42);
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_ROOM], 60 - 42);
    ck_assert_uint_eq(s.lost.ages.count, 60 - 42);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 99, 1 << 20, NULL), KVD_TIER_FULL);
    tier_end(&p.loop, &p.t);
    // A smaller limit holds for what is there; files that never got their name go when they are
    // old.
    file_of(&p, 0, file);
    strcat(file, ".1-1.new");
    close(open(file, O_CREAT | O_WRONLY, 0600));
    struct timespec old[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    ck_assert_int_eq(utimensat(AT_FDCWD, file, old, 0), 0);
    p.limit = 10 * 28672;
    place_open(&p);
    wait_known(&p, 11);
    ck_assert_uint_eq(file_count(&p), 11);
    place_end(&p);
}
END_TEST

START_TEST(two_share_a_directory)
{
    struct place p;
    place_begin(&p);
    struct kvd_tier *first = p.t;
    place_open(&p);
    ck_assert_int_eq(tier_put(&p.loop, first, 1, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 2, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, first, 2, BYTES, NULL), KVD_TIER_OK);
    ck_assert(kvd_tier_close(&first));
    place_end(&p);
}
END_TEST

// Puts two, and gets one again before its time is over: if the machine is too slow, they have more.
static void put_in_time(struct place *p)
{
    for (p->settings.ttl_s = 1;; p->settings.ttl_s *= 4) {
        place_open(p);
        uint64_t began = uv_hrtime();
        ck_assert_int_eq(tier_put(&p->loop, p->t, 1, BYTES, NULL), KVD_TIER_OK);
        ck_assert_int_eq(tier_put(&p->loop, p->t, 2, BYTES, NULL), KVD_TIER_OK);
        enum kvd_tier_result rc = tier_get(&p->loop, p->t, 1, BYTES, NULL);
        if (rc == KVD_TIER_OK)
            return;
        ck_assert_uint_ge(tier_ms_since(began), p->settings.ttl_s * 1000);
        tier_end(&p->loop, &p->t);
    }
}

START_TEST(blocks_expire)
{
    struct place p;
    struct kvd_tier_status s;
    char file[256];
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    put_in_time(&p);
    tier_sleep(&p.loop, p.settings.ttl_s * 1000 + 1100);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_MISS);
    file_of(&p, 1, file);
    ck_assert_int_ne(access(file, F_OK), 0);
    ck_assert(!tier_has(&p.loop, p.t, 2));
    kvd_tier_status(p.t, &s);
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_EXPIRED], 1); // the other is there still
    tier_end(&p.loop, &p.t);
    place_open(&p); // and go when nobody asks for them
    file_of(&p, 2, file);
    for (uint32_t i = 0; i < 1000 && access(file, F_OK) == 0; i++)
        tier_sleep(&p.loop, 5);
    ck_assert_int_ne(access(file, F_OK), 0);
    kvd_tier_status(p.t, &s);
    for (uint32_t i = 0; i < 1000 && !s.lost.blocks[KVD_TIER_LOST_EXPIRED]; i++) {
        tier_sleep(&p.loop, 5);
        kvd_tier_status(p.t, &s);
    }
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_EXPIRED], 1);
    ck_assert_uint_eq(s.lost.ages.count, 0); // that is no age at which room was wanted
    place_end(&p);
}
END_TEST

// Twice the same is put, four fifths of its time apart, and got as late again. False: the machine
// was slower than its time, and nothing is told.
static bool renewed(uint64_t ttl_s)
{
    struct place p;
    bool in_time = true;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    p.settings.ttl_s = ttl_s;
    place_open(&p);
    struct kvd_tier *host =
        tier_open(&p.loop, &kvd_tier_host_ops, kvd_tier_host_new(1 << 20), &p.settings);
    uint64_t last = uv_hrtime();
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
        ck_assert_int_eq(tier_put(&p.loop, host, 1, BYTES, NULL), KVD_TIER_OK);
        in_time = in_time && tier_ms_since(last) < ttl_s * 1000;
        last = i ? last : uv_hrtime();
        tier_sleep(&p.loop, ttl_s * 800);
    }
    enum kvd_tier_result kept = tier_get(&p.loop, p.t, 1, BYTES, NULL);
    tier_memory = NULL; // it gives what was put
    enum kvd_tier_result held = tier_get(&p.loop, host, 1, BYTES, NULL);
    in_time = in_time && tier_ms_since(last) < ttl_s * 1800;
    ck_assert(!in_time || (kept == KVD_TIER_OK && held == KVD_TIER_OK && file_count(&p) == 1));
    ck_assert(kvd_tier_close(&host));
    place_end(&p);
    return in_time;
}

// A directory's and the host's memory's; a server's is renewed by the server.
START_TEST(a_put_of_what_is_there_renews_its_time)
{
    ck_assert(renewed(2) || renewed(8));
}
END_TEST

// A disk that others have filled: puts are refused, what is there is served, nothing is left over.
START_TEST(a_full_disk_is_noticed)
{
    struct place p;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    mkdir(p.path, 0700);
    if (mount("kvd-test", p.path, "tmpfs", 0, "size=256k,mode=0700")) {
        printf("SKIP a full disk: mount: %s\n", strerror(errno));
        place_open(&p);
        place_end(&p);
        return;
    }
    place_open(&p);
    enum kvd_tier_result rc = KVD_TIER_OK;
    uint64_t stored = 0;
    while (rc == KVD_TIER_OK && stored < 60)
        rc = tier_put(&p.loop, p.t, stored++, BYTES, NULL);
    stored--;
    uint64_t files = file_count(&p);
    struct kvd_tier_status s;
    kvd_tier_status(p.t, &s);
    for (uint64_t i = 0; i < stored && rc == KVD_TIER_FULL; i++)
        if (tier_get(&p.loop, p.t, i, BYTES, NULL) != KVD_TIER_OK)
            rc = KVD_TIER_FAILED;
    tier_end(&p.loop, &p.t);
    umount2(p.path, MNT_DETACH);
    ck_assert_int_eq(rc, KVD_TIER_FULL);
    ck_assert_uint_ge(stored, 5);
    ck_assert_uint_eq(files, stored);
    ck_assert_str_eq(s.state, "full");
    ck_assert_ptr_nonnull(strstr(s.why, "No space"));
    place_open(&p);
    place_end(&p);
}
END_TEST

START_TEST(a_directory_that_cannot_be_used_fails_softly)
{
    struct place p;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    char good[80];
    strcpy(good, p.path);
    snprintf(p.path, sizeof(p.path), "%s/not/there", p.folder);
    place_open(&p);
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_FAILED);
    uint64_t failed = uv_hrtime();
    enum kvd_tier_result rc = tier_get(&p.loop, p.t, 1, BYTES, NULL);
    ck_assert(rc == KVD_TIER_REFUSED || tier_ms_since(failed) > 400);
    char parent[80];
    snprintf(parent, sizeof(parent), "%s/not", p.folder);
    ck_assert_int_eq(mkdir(parent, 0700), 0); // the disk comes
    for (uint32_t i = 0; i < 10 && rc != KVD_TIER_OK; i++) {
        tier_sleep(&p.loop, 600);
        rc = tier_put(&p.loop, p.t, 1, BYTES, NULL);
    }
    ck_assert_int_eq(rc, KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
    place_end(&p);
}
END_TEST

KVD_MAIN("tier", 60, whatever_bit_is_flipped_is_noticed,
         a_block_is_what_was_asked_for_or_is_refused, keys_differ_by_all_that_a_block_is,
         a_tier_that_hangs_holds_little_and_is_left_alone,
         a_tier_that_fails_is_left_alone_and_tried_again,
         a_full_tier_takes_no_puts_for_a_while_and_is_read,
         a_drop_and_a_put_of_one_key_keep_their_order, what_waits_is_bounded_and_reads_go_first,
         what_is_written_has_a_rate, host_memory_is_bounded_and_keeps_what_is_used,
         a_directory_outlives_the_one_that_filled_it,
         files_that_are_not_what_was_written_are_dropped, a_file_of_another_length_is_written_anew,
         a_file_forged_without_the_secret_is_dropped, a_directory_keeps_its_limit_and_what_is_used,
         two_share_a_directory, blocks_expire, a_put_of_what_is_there_renews_its_time,
         a_full_disk_is_noticed, a_directory_that_cannot_be_used_fails_softly)
