// Work in pieces, and what a session held, given up in that way.
#include "daemon/core/daemon.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/piecework.h"
#include "daemon/session/ledger.h"
#include "daemon/session/release.h"
#include "daemon/session/session.h"
#include "tests/unit/suite.h"

enum { MANY = 1000, EACH_NS = 100000 };

struct many {
    struct kvd_piecework work;
    uint32_t left, times; // in how many pieces
    char name;
};

static struct kvd_daemon d;
static char order[8];
static uint32_t n_order;

void kvd_daemon_go_on(struct kvd_daemon *daemon)
{
    ck_assert_ptr_eq(daemon, &d);
}

void kvd_ledger_forget(struct kvd_ledger *l, uint32_t hold)
{
    ck_assert_ptr_null(l);
    ck_assert_uint_eq(hold, 100 + n_order);
}

void kvd_pool_seq_release(struct kvd_pool *pool, uint64_t seq)
{
    (void)pool;
    ck_assert_uint_ge(seq, 100);
    n_order++;
}

static bool next(struct kvd_daemon *daemon, struct kvd_piecework *r)
{
    struct many *m = (struct many *)r;
    ck_assert_ptr_eq(daemon, &d);
    if (!m->left)
        return false;
    m->left--;
    for (uint64_t until = uv_hrtime() + EACH_NS; uv_hrtime() < until;)
        continue;
    return true;
}

static void done(struct kvd_daemon *daemon, struct kvd_piecework *r)
{
    (void)daemon;
    order[n_order++] = ((struct many *)r)->name;
    order[n_order] = '\0';
}

static struct many of(char name, uint32_t n)
{
    return (struct many){.work = {.next = next, .done = done}, .left = n, .name = name};
}

static void begin(void)
{
    struct kvd_error err;
    memset(&d, 0, sizeof(d));
    n_order = 0;
    uv_loop_init(&d.loop);
    ck_assert_int_eq(kvd_part_piecework.init(&d, &err), KVD_OK);
}

static void end(void)
{
    kvd_part_piecework.end(&d);
    uv_run(&d.loop, UV_RUN_DEFAULT);
    ck_assert_ptr_null(d.pieceworks);
    ck_assert_int_eq(uv_loop_close(&d.loop), 0);
}

START_TEST(many_are_given_up_in_pieces_in_their_order)
{
    begin();
    struct many a = of('a', MANY), b = of('b', 1), c = of('c', 40);
    kvd_piecework_begin(&d, &a.work);
    ck_assert_uint_eq(a.left, MANY - 32); // some 3 ms: its piece is over
    kvd_piecework_begin(&d, &b.work);     // behind it, however small
    kvd_piecework_begin(&d, &c.work);
    ck_assert_uint_eq(n_order, 0);
    ck_assert(kvd_part_piecework.busy(&d));
    uint32_t turns = 0;
    while (kvd_part_piecework.busy(&d)) {
        uint32_t before = a.left;
        uv_run(&d.loop, UV_RUN_NOWAIT);
        ck_assert_uint_le(before - a.left, 32); // the loop has its turn in between
        turns++;
    }
    ck_assert_str_eq(order, "abc");
    ck_assert_uint_ge(turns, MANY / 32);
    end();
}
END_TEST

START_TEST(few_are_given_up_at_once)
{
    begin();
    struct many a = of('a', 5);
    kvd_piecework_begin(&d, &a.work);
    ck_assert_str_eq(order, "a");
    ck_assert(!kvd_part_piecework.busy(&d));
    end();
}
END_TEST

START_TEST(what_is_urgent_is_finished_with_those_before_it)
{
    begin();
    struct many a = of('a', 100), b = of('b', 100), c = of('c', 100), dropped = of('d', 100);
    kvd_piecework_begin(&d, &a.work);
    kvd_piecework_begin(&d, &dropped.work);
    kvd_piecework_begin(&d, &b.work);
    kvd_piecework_begin(&d, &c.work);
    kvd_piecework_drop(&d, &dropped.work);
    kvd_piecework_finish(&d, &b.work);
    ck_assert_str_eq(order, "ab");
    ck_assert_uint_eq(dropped.left, 100);
    end(); // ends the rest
    ck_assert_str_eq(order, "abc");
}
END_TEST

START_TEST(what_a_session_held_is_all_given_up)
{
    begin();
    struct kvd_held *held = NULL;
    for (uint64_t i = 0; i < MANY; i++) {
        struct kvd_held *h = calloc(1, sizeof(*h));
        h->seq = 100 + i;
        h->record = (uint32_t)h->seq;
        HASH_ADD(hh, held, seq, sizeof(h->seq), h);
    }
    kvd_release_held(&d, held);
    kvd_release_held(&d, NULL);
    while (kvd_part_piecework.busy(&d))
        uv_run(&d.loop, UV_RUN_NOWAIT);
    ck_assert_uint_eq(n_order, MANY);
    end();
}
END_TEST

KVD_MAIN("piecework", 60, many_are_given_up_in_pieces_in_their_order, few_are_given_up_at_once,
         what_is_urgent_is_finished_with_those_before_it, what_a_session_held_is_all_given_up)
