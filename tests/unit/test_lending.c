// Extents of the pool as they are lent to workers: what is sent, once, and what becomes of it.
#include "daemon/core/lifecycle.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/memory.h"
#include "tests/unit/suite.h"

#include <fcntl.h>

enum { EXTENTS = 4, SENT = 32 };
static const uint64_t BASE = 1ull << 40, BYTES = 2ull << 20;

// -- a backend that notes what is asked of it, and a worker that notes what it is sent ----------

static struct kvd_daemon d;
static struct kvd_arena arena;
static uint32_t made[EXTENTS], zeroed[EXTENTS], dropped[EXTENTS];
static struct kvd_fd_grant sent[SENT];
static uint32_t n_sent;
static bool full, short_of_memory;

static struct kvd_arena *arena_new(struct kvd_backend *b, uint32_t count, uint64_t bytes,
                                   struct kvd_error *err)
{
    (void)b;
    (void)err;
    arena = (struct kvd_arena){.base = BASE, .bytes = bytes, .count = count};
    return &arena;
}

static void arena_free(struct kvd_backend *b, struct kvd_arena **a)
{
    (void)b;
    *a = NULL;
}

static int extent_make(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                       struct kvd_error *err)
{
    (void)b;
    (void)a;
    if (short_of_memory)
        return kvd_fail(err, KVD_E_FULL, "no memory");
    made[i]++;
    return KVD_OK;
}

static void extent_drop(struct kvd_backend *b, struct kvd_arena *a, uint32_t i)
{
    (void)b;
    (void)a;
    dropped[i]++;
}

static int extent_zero(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                       struct kvd_error *err)
{
    (void)b;
    (void)a;
    (void)err;
    zeroed[i]++;
    return KVD_OK;
}

static int extent_export(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int *fd,
                         struct kvd_error *err)
{
    (void)b;
    (void)a;
    (void)i;
    (void)err;
    *fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    return KVD_OK;
}

static uint64_t memory_free(struct kvd_backend *b)
{
    (void)b;
    return UINT64_MAX;
}

static const struct kvd_backend_ops ops = {.arena_new = arena_new,
                                           .arena_free = arena_free,
                                           .extent_make = extent_make,
                                           .extent_drop = extent_drop,
                                           .extent_zero = extent_zero,
                                           .extent_export = extent_export,
                                           .memory_free = memory_free};
static struct kvd_backend backend = {&ops};

int kvd_connection_send(struct kvd_connection *c, const struct kvd_fd_grant *grant, int fd,
                        struct kvd_error *err)
{
    (void)c;
    ck_assert((fd < 0) == (grant->kind == KVD_FD_REVOKE));
    if (full)
        return kvd_fail(err, KVD_E_LIMIT, "the worker does not read its fd socket");
    ck_assert_uint_lt(n_sent, SENT);
    sent[n_sent++] = *grant;
    return KVD_OK;
}

// Nothing is made ahead of need where memory is not scarce.
void kvd_daemon_work_begin(struct kvd_daemon *daemon)
{
    (void)daemon;
    ck_abort_msg("no work beside the loop is wanted");
}

void kvd_daemon_work_end(struct kvd_daemon *daemon)
{
    (void)daemon;
}

// -- tests --------------------------------------------------------------------------------------

static struct kvd_session s, other;
static struct kvd_pool_mem_ops mem;

static uint64_t address(uint32_t extent)
{
    return BASE + extent * BYTES + 4096;
}

static void begin(void)
{
    struct kvd_error err;
    memset(&d, 0, sizeof(d));
    memset(made, 0, sizeof(made));
    memset(zeroed, 0, sizeof(zeroed));
    memset(dropped, 0, sizeof(dropped));
    n_sent = 0;
    full = short_of_memory = false;
    d.config.pool_size = EXTENTS * BYTES;
    d.config.extent_size = BYTES;
    d.backend = &backend;
    uv_loop_init(&d.loop);
    uv_timer_init(&d.loop, &d.memory_timer);
    ck_assert_int_eq(kvd_part_memory.init(&d, &err), KVD_OK);
    mem = kvd_memory_ops(&d);
    s = (struct kvd_session){.id = 1};
    other = (struct kvd_session){.id = 2};
    struct kvd_session *one = &s, *two = &other;
    HASH_ADD(hh, d.sessions, id, sizeof(one->id), one);
    HASH_ADD(hh, d.sessions, id, sizeof(two->id), two);
    uint64_t addr;
    for (uint32_t i = 0; i < EXTENTS; i++) {
        ck_assert_int_eq(mem.alloc(mem.ctx, i, BYTES, &addr), KVD_OK);
        ck_assert_uint_eq(addr, BASE + i * BYTES);
    }
}

static void end(void)
{
    HASH_CLEAR(hh, d.sessions);
    free(s.extents);
    free(other.extents);
    uv_close((uv_handle_t *)&d.memory_timer, NULL);
    uv_run(&d.loop, UV_RUN_DEFAULT);
    uv_loop_close(&d.loop);
    kvd_part_memory.deinit(&d);
}

static void lend(struct kvd_session *to, uint32_t extent)
{
    struct kvd_error err;
    ck_assert_int_eq(kvd_memory_lend(&d, to, address(extent), &err), KVD_OK);
}

START_TEST(an_extent_is_sent_once_to_each)
{
    begin();
    lend(&s, 2);
    lend(&s, 2);
    ck_assert_uint_eq(n_sent, 1);
    ck_assert_uint_eq(sent[0].kind, KVD_FD_EXTENT);
    ck_assert_uint_eq(sent[0].extent, 2);
    ck_assert_uint_eq(sent[0].bytes, BYTES);
    lend(&other, 2);
    ck_assert_uint_eq(n_sent, 2);
    kvd_memory_forget(&d, &s); // it asked for all anew
    lend(&s, 2);
    ck_assert_uint_eq(n_sent, 3);
    ck_assert_uint_eq(kvd_memory_page_number(&d, BASE + BYTES), BYTES / KVD_PAGE_UNIT);
    ck_assert_uint_eq(kvd_memory_page_number(&d, 0), UINT32_MAX);
    end();
}
END_TEST

START_TEST(what_did_not_arrive_is_sent_again)
{
    struct kvd_error err;
    begin();
    full = true;
    ck_assert_int_eq(kvd_memory_lend(&d, &s, address(0), &err), KVD_E_LIMIT);
    full = false;
    lend(&s, 0);
    ck_assert_uint_eq(n_sent, 1);
    end();
}
END_TEST

START_TEST(what_was_lent_is_never_wiped_for_another)
{
    begin();
    lend(&s, 1);
    ck_assert_int_eq(mem.zero(mem.ctx, 0, BASE, BYTES), KVD_OK);
    ck_assert_uint_eq(zeroed[0], 1); // was lent to nobody
    ck_assert_int_eq(mem.zero(mem.ctx, 1, BASE + BYTES, BYTES), KVD_OK);
    ck_assert_uint_eq(zeroed[1], 0);
    ck_assert_uint_eq(made[1], 2);
    ck_assert_uint_eq(n_sent, 2); // to `s` only
    ck_assert_uint_eq(sent[1].kind, KVD_FD_REVOKE);
    ck_assert_uint_eq(sent[1].extent, 1);
    lend(&s, 1); // the new memory
    ck_assert_uint_eq(n_sent, 3);
    end();
}
END_TEST

START_TEST(without_new_memory_it_stays_as_it_was)
{
    begin();
    lend(&s, 1);
    short_of_memory = true;
    ck_assert_int_eq(mem.zero(mem.ctx, 1, BASE + BYTES, BYTES), KVD_E_FULL);
    ck_assert_uint_eq(n_sent, 1); // nobody is told to unmap it
    lend(&s, 1);
    ck_assert_uint_eq(n_sent, 1);
    end();
}
END_TEST

START_TEST(who_has_what_was_lent_is_told_when_it_goes)
{
    begin();
    lend(&s, 3);
    full = true; // one that does not read keeps its own old data
    mem.free(mem.ctx, 3, BASE + 3 * BYTES, BYTES);
    full = false;
    ck_assert_uint_eq(dropped[3], 1);
    lend(&s, 3);
    ck_assert_uint_eq(n_sent, 2);
    end();
}
END_TEST

KVD_MAIN("lending", 30, an_extent_is_sent_once_to_each, what_did_not_arrive_is_sent_again,
         what_was_lent_is_never_wiped_for_another, without_new_memory_it_stays_as_it_was,
         who_has_what_was_lent_is_told_when_it_goes)
