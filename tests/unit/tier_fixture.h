// A loop's user of tiers, for their tests: asks, runs the loop until the answer is there, looks.
#ifndef KVD_TESTS_TIER_FIXTURE_H
#define KVD_TESTS_TIER_FIXTURE_H

#include <fcntl.h>
#include <sys/stat.h>

#include "daemon/tier/tier.h"
#include "tests/unit/suite.h"

static const uint8_t tier_layout[32] = "a layout's digest";

struct answer {
    uint32_t n; // answers
    enum kvd_tier_result result;
    struct kvd_block *block;
    bool has[8];
};

static inline void tier_answered(void *ctx, const struct kvd_tier_reply *reply)
{
    struct answer *a = ctx;
    a->n++;
    a->result = reply->result;
    kvd_block_unref(&a->block);
    a->block = reply->block;
    if (reply->has)
        memcpy(a->has, reply->has, sizeof(a->has));
}

static inline void tier_no_op(uv_timer_t *timer)
{
    (void)timer;
}

// Runs the loop until `*n` is `want`, or fails after forty seconds.
static inline void tier_until(uv_loop_t *loop, const uint32_t *n, uint32_t want)
{
    uv_timer_t timer;
    uv_timer_init(loop, &timer);
    uv_timer_start(&timer, tier_no_op, 5, 5);
    uint64_t end = uv_hrtime() + 40000000000ull;
    while (*n != want && uv_hrtime() < end)
        uv_run(loop, UV_RUN_ONCE);
    uv_close((uv_handle_t *)&timer, NULL);
    uv_run(loop, UV_RUN_NOWAIT);
    ck_assert_uint_eq(*n, want);
}

static inline void tier_sleep(uv_loop_t *loop, uint64_t ms)
{
    uv_timer_t timer;
    uint64_t end = uv_hrtime() + ms * 1000000;
    uv_timer_init(loop, &timer);
    uv_timer_start(&timer, tier_no_op, 5, 5);
    while (uv_hrtime() < end)
        uv_run(loop, UV_RUN_ONCE);
    uv_close((uv_handle_t *)&timer, NULL);
    uv_run(loop, UV_RUN_NOWAIT);
}

static inline uint64_t tier_ms_since(uint64_t began)
{
    return (uv_hrtime() - began) / 1000000;
}

static inline struct kvd_tier_secret *tier_secret_of(const char *text)
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

static inline struct kvd_tier_key tier_key(uint64_t number, const struct kvd_tier_secret *secret)
{
    struct kvd_block_name name = {.plane = 0};
    struct kvd_tier_key key;
    memcpy(name.key, &number, sizeof(number));
    memcpy(name.layout, tier_layout, sizeof(name.layout));
    struct kvd_tier_namer *namer = kvd_tier_namer_new(secret, NULL);
    ck_assert_ptr_nonnull(namer);
    ck_assert_int_eq(kvd_tier_key_of(namer, &name, &key, NULL), KVD_OK);
    kvd_tier_namer_free(&namer);
    return key;
}

// A block whose bytes follow from its number.
static inline struct kvd_block *tier_block(uint64_t number, uint64_t bytes)
{
    struct kvd_block *b = kvd_block_new(bytes);
    ck_assert_ptr_nonnull(b);
    for (uint64_t i = 0; i < bytes; i++)
        b->payload[i] = (uint8_t)(number * 31 + i * 7 + (i >> 8));
    return b;
}

static inline enum kvd_tier_result tier_put(uv_loop_t *loop, struct kvd_tier *t, uint64_t number,
                                            uint64_t bytes, const struct kvd_tier_secret *secret)
{
    struct answer a = {0};
    struct kvd_tier_key key = tier_key(number, secret);
    struct kvd_block *b = tier_block(number, bytes);
    kvd_tier_put(t, &key, tier_layout, b, tier_answered, &a);
    kvd_block_unref(&b);
    tier_until(loop, &a.n, 1);
    return a.result;
}

// That a back end is given for the blocks that it gives; NULL: that is not looked at.
static struct kvd_pinned *tier_memory;

// Gets it; what comes must be the right bytes.
static inline enum kvd_tier_result tier_get(uv_loop_t *loop, struct kvd_tier *t, uint64_t number,
                                            uint64_t bytes, const struct kvd_tier_secret *secret)
{
    struct answer a = {0};
    struct kvd_tier_key key = tier_key(number, secret);
    struct kvd_block *b = tier_block(number, bytes);
    kvd_tier_get(t, &key, tier_layout, bytes, tier_answered, &a);
    ck_assert_uint_eq(a.n, 0); // never from within the call
    tier_until(loop, &a.n, 1);
    ck_assert((a.result == KVD_TIER_OK) == (a.block != NULL));
    if (a.block) {
        ck_assert_mem_eq(a.block->payload, b->payload, bytes);
        if (tier_memory)
            ck_assert_ptr_eq(a.block->memory, tier_memory);
    }
    kvd_block_unref(&a.block);
    kvd_block_unref(&b);
    return a.result;
}

static inline bool tier_has(uv_loop_t *loop, struct kvd_tier *t, uint64_t number)
{
    struct answer a = {0};
    struct kvd_tier_key keys[8];
    for (uint32_t i = 0; i < 8; i++)
        keys[i] = tier_key(i == 5 ? number : 1000000 + i, NULL);
    kvd_tier_has(t, keys, 8, tier_answered, &a);
    tier_until(loop, &a.n, 1);
    for (uint32_t i = 0; i < 8; i++)
        ck_assert(i == 5 || !a.has[i]);
    return a.result == KVD_TIER_OK && a.has[5];
}

static inline struct kvd_tier *tier_open(uv_loop_t *loop, const struct kvd_tier_ops *ops,
                                         void *state, const struct kvd_tier_settings *settings)
{
    struct kvd_error err = {0};
    ck_assert_ptr_nonnull(state);
    struct kvd_tier *t = kvd_tier_new(loop, ops, state, settings, &err);
    ck_assert_msg(t != NULL, "%s", err.text);
    return t;
}

static inline void tier_end(uv_loop_t *loop, struct kvd_tier **t)
{
    ck_assert(kvd_tier_close(t));
    uv_run(loop, UV_RUN_DEFAULT);
}

#endif
