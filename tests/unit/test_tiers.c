// Several tiers as one: put to all, got from the nearest, looked for in all, ended amid all that.
#include "daemon/tier/tiers.h"
#include "tests/unit/scratch.h"
#include "tests/unit/tier_fixture.h"

enum { BYTES = 20000 };

struct world {
    struct kvd_daemon d;
    char folder[64];
    uint32_t n, tier, puts, stored;
    struct kvd_block *block;
    uint8_t where[8];
};

static void on_got(void *ctx, struct kvd_block *block, uint32_t tier)
{
    struct world *w = ctx;
    w->n++;
    w->tier = tier;
    kvd_block_unref(&w->block);
    w->block = block;
}

static void on_stored(void *ctx, uint32_t tiers)
{
    struct world *w = ctx;
    w->puts++;
    w->stored += tiers;
}

static void on_found(void *ctx, const uint8_t *where)
{
    struct world *w = ctx;
    w->n++;
    memcpy(w->where, where, sizeof(w->where));
}

static void begin(struct world *w)
{
    struct kvd_error err = {0};
    *w = (struct world){.folder = "/tmp/kvd-test-tiers.XXXXXX"};
    ck_assert_ptr_nonnull(mkdtemp(w->folder));
    w->d.config.tier_host = 1 << 20;
    w->d.config.tier_timeout_ms = 5000;
    snprintf(w->d.config.tier_directory, sizeof(w->d.config.tier_directory), "%s/b 64MiB",
             w->folder);
    uv_loop_init(&w->d.loop);
    ck_assert_msg(kvd_part_tiers.init(&w->d, &err) == KVD_OK, "%s", err.text);
    ck_assert_uint_eq(kvd_tiers_count(&w->d), 2);
}

static void end(struct world *w)
{
    kvd_part_tiers.stop(&w->d);
    ck_assert_uint_eq(kvd_tiers_count(&w->d), 0);
    kvd_part_tiers.end(&w->d);
    uv_run(&w->d.loop, UV_RUN_DEFAULT);
    ck_assert_int_eq(uv_loop_close(&w->d.loop), 0);
    kvd_part_tiers.deinit(&w->d);
    kvd_block_unref(&w->block);
    kvd_remove_folder(w->folder);
}

static struct kvd_block *get(struct world *w, uint64_t number)
{
    struct kvd_tier_key key = tier_key(number, NULL);
    uint32_t before = w->n;
    ck_assert_int_eq(kvd_tiers_get(&w->d, &key, tier_layout, BYTES, on_got, w, NULL), KVD_OK);
    tier_until(&w->d.loop, &w->n, before + 1);
    return w->block;
}

START_TEST(the_nearest_that_has_it_gives_it_and_nearer_ones_get_it)
{
    struct world w;
    struct kvd_tier_key keys[8];
    begin(&w);
    struct kvd_tier *host = kvd_tiers_find(&w.d, "host"), *far = kvd_tiers_find(&w.d, "directory");
    ck_assert(host && far && !kvd_tiers_find(&w.d, "redis"));
    for (uint64_t i = 0; i < 8; i++)
        keys[i] = tier_key(i, NULL);
    struct kvd_block *b = tier_block(1, BYTES);
    kvd_tiers_put(&w.d, &keys[1], tier_layout, b, on_stored, &w);
    tier_until(&w.d.loop, &w.puts, 1);
    ck_assert_uint_eq(w.stored, 3); // both
    ck_assert_int_eq(tier_get(&w.d.loop, far, 1, BYTES, NULL), KVD_TIER_OK);
    ck_assert_ptr_eq(get(&w, 1), b); // nothing is copied
    ck_assert_uint_eq(w.tier, 0);
    ck_assert_int_eq(tier_put(&w.d.loop, far, 2, BYTES, NULL), KVD_TIER_OK);
    uint32_t before = w.n;
    ck_assert_int_eq(kvd_tiers_has(&w.d, keys, 8, on_found, &w, NULL), KVD_OK);
    tier_until(&w.d.loop, &w.n, before + 1);
    ck_assert_mem_eq(w.where, ((uint8_t[]){0, 1, 2, 0, 0, 0, 0, 0}), 8);
    ck_assert_ptr_nonnull(get(&w, 2));
    ck_assert_uint_eq(w.tier, 1);
    ck_assert_ptr_nonnull(get(&w, 2));
    ck_assert_uint_eq(w.tier, 0);
    ck_assert_ptr_null(get(&w, 3));
    kvd_block_unref(&b);
    end(&w);
}
END_TEST

static void on_dropped(void *ctx, const struct kvd_tier_reply *reply)
{
    (void)reply;
    ++*(uint32_t *)ctx;
}

// What was read before it was dropped is not put elsewhere after that. False: it was dropped before
// it was read, as the thread that reads had no turn.
static bool dropped_while_it_is_got(void)
{
    struct world w;
    struct kvd_tier_status s = {0};
    const struct kvd_tier_key key = tier_key(2, NULL);
    uint32_t drops = 0;
    begin(&w);
    struct kvd_tier *host = kvd_tiers_find(&w.d, "host"), *far = kvd_tiers_find(&w.d, "directory");
    ck_assert_int_eq(tier_put(&w.d.loop, far, 2, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(kvd_tiers_get(&w.d, &key, tier_layout, BYTES, on_got, &w, NULL), KVD_OK);
    while (s.count[KVD_TIER_GET][KVD_TIER_MISS] == 0) { // until the far one is asked
        uv_run(&w.d.loop, UV_RUN_NOWAIT);
        kvd_tier_status(host, &s);
    }
    usleep(200000); // it has read it, and the loop has not heard of it
    kvd_tiers_drop(&w.d, &key, on_dropped, &drops);
    tier_until(&w.d.loop, &w.n, 1);
    tier_until(&w.d.loop, &drops, 2);
    bool was_read = w.block != NULL;
    ck_assert_int_eq(tier_get(&w.d.loop, host, 2, BYTES, NULL), KVD_TIER_MISS);
    ck_assert_int_eq(tier_get(&w.d.loop, far, 2, BYTES, NULL), KVD_TIER_MISS);
    end(&w);
    return was_read;
}

START_TEST(what_is_dropped_while_it_is_got_goes_to_no_nearer_tier)
{
    bool was_read = false;
    for (uint32_t tries = 0; !was_read && tries < 5; tries++)
        was_read = dropped_while_it_is_got();
    ck_assert(was_read);
}
END_TEST

START_TEST(they_end_with_everything_under_way)
{
    struct world w;
    struct kvd_error err = {0};
    struct kvd_tier_key keys[8];
    begin(&w);
    struct kvd_block *b = tier_block(1, BYTES);
    for (uint64_t i = 0; i < 8; i++)
        keys[i] = tier_key(i, NULL);
    for (uint32_t i = 0; i < 8; i++) {
        kvd_tiers_put(&w.d, &keys[i], tier_layout, b, on_stored, &w);
        ck_assert_int_eq(kvd_tiers_get(&w.d, &keys[i], tier_layout, BYTES, on_got, &w, NULL), 0);
    }
    ck_assert_int_eq(kvd_tiers_has(&w.d, keys, 8, on_found, &w, NULL), KVD_OK);
    kvd_block_unref(&b);
    kvd_part_tiers.stop(&w.d);
    ck_assert_uint_eq(w.n, 9); // all were told
    ck_assert_uint_eq(w.puts, 8);
    ck_assert_int_eq(kvd_tiers_get(&w.d, &keys[0], tier_layout, BYTES, on_got, &w, &err),
                     KVD_E_UNAVAILABLE);
    end(&w);
}
END_TEST

KVD_MAIN("tiers", 60, the_nearest_that_has_it_gives_it_and_nearer_ones_get_it,
         what_is_dropped_while_it_is_got_goes_to_no_nearer_tier, they_end_with_everything_under_way)
