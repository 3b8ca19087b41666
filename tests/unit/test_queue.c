// The line of waiting calls, and waiting for fences.
#include <utlist.h>

#include "daemon/core/daemon.h"
#include "daemon/sched/fences.h"
#include "daemon/sched/queue.h"
#include "tests/unit/suite.h"

enum { MANY = 64 };

// A call as the line knows it: it may have to wait for another of its name that is in flight.
struct call {
    struct kvd_waiter waiter;
    struct kvd_parked parked;
    char name;
    bool started;
};

static struct kvd_daemon d;
static struct call calls[MANY];
static char order[MANY + 1]; // of starts
static uint32_t n_order;
static bool busy[256];
static uint64_t wanted[256];

static bool ready(struct kvd_daemon *daemon, struct kvd_waiter *w, uint64_t look)
{
    uint8_t name = (uint8_t)((struct call *)w)->name;
    ck_assert_ptr_eq(daemon, &d);
    bool free = !busy[name] && wanted[name] != look;
    wanted[name] = look;
    return free;
}

static void start(struct kvd_daemon *daemon, struct kvd_waiter *w)
{
    struct call *c = (struct call *)w;
    (void)daemon;
    ck_assert(!c->started);
    c->started = true;
    busy[(uint8_t)c->name] = true;
    order[n_order++] = c->name;
    order[n_order] = '\0';
}

static void begin(uint32_t max_queue)
{
    struct kvd_error err;
    memset(calls, 0, sizeof(calls));
    memset(busy, 0, sizeof(busy));
    memset(wanted, 0, sizeof(wanted));
    n_order = 0;
    d.config.max_queue = max_queue;
    ck_assert_int_eq(kvd_queue_init(&d, ready, start, &err), KVD_OK);
}

static struct call *push(uint32_t i, uint32_t ns, char name)
{
    struct kvd_error err;
    struct call *c = &calls[i];
    *c = (struct call){.waiter = {.ns = ns, .session = ns + 1, .bytes = 100}, .name = name};
    ck_assert_int_eq(kvd_queue_admit(&d, &c->waiter, &err), KVD_OK);
    kvd_queue_push(&d, &c->waiter);
    return c;
}

// Of a session of namespace 0.
static struct call *push_of(uint32_t i, uint64_t session, char name)
{
    struct kvd_error err;
    struct call *c = &calls[i];
    *c = (struct call){.waiter = {.session = session, .bytes = 100}, .name = name};
    ck_assert_int_eq(kvd_queue_admit(&d, &c->waiter, &err), KVD_OK);
    kvd_queue_push(&d, &c->waiter);
    return c;
}

static void finish(struct call *c)
{
    busy[(uint8_t)c->name] = false;
    kvd_queue_forget(&d, &c->waiter);
    kvd_queue_kick(&d, c->waiter.ns);
}

START_TEST(a_line_starts_in_order_and_lines_do_not_wait_for_each_other)
{
    begin(100);
    struct call *a = push(0, 0, 'a');
    push(1, 0, 'a'); // has to wait, and with it all behind it
    push(2, 0, 'b');
    push(3, 1, 'c'); // of another namespace
    ck_assert_str_eq(order, "ac");
    ck_assert_uint_eq(kvd_queue_waiting(&d), 2);
    finish(a);
    ck_assert_str_eq(order, "acab");
    ck_assert_uint_eq(kvd_queue_waiting(&d), 0);
    for (uint32_t i = 1; i < 4; i++)
        finish(&calls[i]);
    kvd_queue_deinit(&d);
}
END_TEST

START_TEST(a_session_does_not_wait_for_another)
{
    begin(100);
    for (uint32_t i = 0; i < 20; i++)
        push_of(i, 1, (char)('a' + i)); // one asks for much
    push_of(20, 2, 'A');
    push_of(21, 2, 'A'); // waits for the one before it
    push_of(22, 3, 'B');
    ck_assert_str_eq(order, "abcdefghAB");
    finish(&calls[0]);
    ck_assert_str_eq(order, "abcdefghABi");
    finish(&calls[20]);
    ck_assert_str_eq(order, "abcdefghABiA");
    for (uint32_t i = 0; i < 23; i++)
        if (i != 0 && i != 20)
            finish(&calls[i]);
    ck_assert_uint_eq(n_order, 23);
    kvd_queue_deinit(&d);
}
END_TEST

// Of sessions that want the same, the one that came first gets it first.
START_TEST(none_is_overtaken_by_who_wants_the_same)
{
    begin(100);
    push_of(0, 1, 'a');
    push_of(1, 2, 'a'); // waits
    push_of(2, 3, 'b');
    push_of(3, 4, 'a');
    push_of(4, 3, 'a');
    ck_assert_str_eq(order, "ab");
    busy['a'] = false; // even if nobody knows yet that it is free
    push_of(5, 5, 'a');
    ck_assert_str_eq(order, "aba");
    ck_assert(calls[1].started && !calls[5].started);
    finish(&calls[1]);
    ck_assert(calls[3].started && !calls[4].started);
    finish(&calls[3]);
    ck_assert(calls[4].started && !calls[5].started);
    finish(&calls[4]);
    finish(&calls[5]);
    finish(&calls[2]);
    finish(&calls[0]);
    kvd_queue_deinit(&d);
}
END_TEST

// However many sessions have something in flight, those with least are served.
START_TEST(who_has_least_in_flight_is_next)
{
    begin(1000);
    uint32_t n = 0;
    for (uint64_t s = 1; s <= 8; s++)
        for (uint32_t i = 0; i < 7; i++, n++)
            push_of(n, s, (char)(1 + n)); // 56 in flight
    struct call more[40];
    for (uint32_t i = 0; i < 40; i++) { // of old sessions first
        struct kvd_error err;
        more[i] =
            (struct call){.waiter = {.session = 1 + i % 20, .bytes = 1}, .name = (char)(100 + i)};
        ck_assert_int_eq(kvd_queue_admit(&d, &more[i].waiter, &err), KVD_OK);
        kvd_queue_push(&d, &more[i].waiter);
    }
    ck_assert_uint_eq(n_order, 64); // as many as a namespace may have
    n_order = 0;                    // room for the text
    finish(&calls[0]);
    ck_assert_int_eq(order[0], 108); // the ninth session's, which has none, before an eighth
    for (uint32_t i = 1; i < n; i++) {
        n_order = 0;
        finish(&calls[i]);
    }
    for (uint32_t i = 0; i < 40; i++) {
        n_order = 0;
        finish(&more[i]);
    }
    ck_assert_uint_eq(kvd_queue_waiting(&d), 0);
    kvd_queue_deinit(&d);
}
END_TEST

START_TEST(a_line_goes_with_its_session)
{
    begin(100);
    struct call *a = push_of(0, 1, 'a');
    push_of(1, 1, 'a');
    kvd_queue_session_ends(&d, 7); // that never called
    kvd_queue_session_ends(&d, 1);
    kvd_queue_forget(&d, &calls[1].waiter);
    ck_assert_ptr_nonnull(kvd_queue_flow(&a->waiter)); // until the last one is gone
    finish(a);
    ck_assert_str_eq(order, "a");
    push_of(2, 2, 'b');
    finish(&calls[2]);
    kvd_queue_deinit(&d);
}
END_TEST

START_TEST(one_that_gives_up_makes_way)
{
    begin(100);
    push(0, 0, 'a');
    struct call *stuck = push(1, 0, 'a');
    push(2, 0, 'b');
    kvd_queue_forget(&d, &stuck->waiter);
    kvd_queue_forget(&d, &stuck->waiter); // twice is once
    kvd_queue_kick(&d, 0);
    ck_assert_str_eq(order, "ab");
    ck_assert(!stuck->started);
    finish(&calls[0]);
    finish(&calls[2]);
    kvd_queue_deinit(&d);
}
END_TEST

START_TEST(some_of_a_line_are_in_flight_at_once)
{
    begin(100);
    for (uint32_t i = 0; i < 12; i++)
        push(i, 0, (char)('a' + i));
    ck_assert_str_eq(order, "abcdefgh");
    finish(&calls[3]);
    ck_assert_str_eq(order, "abcdefghi");
    for (uint32_t i = 0; i < 12; i++)
        if (i != 3)
            finish(&calls[i]);
    ck_assert_str_eq(order, "abcdefghijkl");
    kvd_queue_deinit(&d);
}
END_TEST

START_TEST(who_asks_for_too_much_is_refused_by_name_and_others_have_room)
{
    struct kvd_error err = {0};
    begin(16);
    push(0, 5, 'x');
    uint32_t n = 1;
    for (; n < MANY; n++) {
        struct call *c = &calls[n];
        *c = (struct call){.waiter = {.ns = 5, .session = 9, .bytes = 10}, .name = 'x'};
        if (kvd_queue_admit(&d, &c->waiter, &err))
            break;
        kvd_queue_push(&d, &c->waiter);
    }
    ck_assert_int_eq(err.code, KVD_E_LIMIT);
    ck_assert_ptr_nonnull(strstr(err.text, "max-queue"));
    ck_assert(!calls[n].waiter.waits);
    ck_assert_uint_lt(n, 16);
    push(n, 6, 'y'); // another namespace has room
    ck_assert_str_eq(order, "xy");
    for (uint32_t i = 1; i < n; i++) // and so has this one again
        kvd_queue_forget(&d, &calls[i].waiter);
    ck_assert_uint_eq(kvd_queue_waiting(&d), 0);
    finish(&calls[0]);
    finish(&calls[n]);
    kvd_queue_deinit(&d);
}
END_TEST

// -- fences -------------------------------------------------------------------------------------

static void passed(struct kvd_daemon *daemon, struct kvd_parked *p)
{
    const struct call *c = (const void *)((const uint8_t *)p - offsetof(struct call, parked));
    ck_assert_ptr_eq(daemon, &d);
    ck_assert(!p->parked);
    order[n_order++] = c->name;
    order[n_order] = '\0';
}

static void park(uint32_t i, char name, _Atomic uint32_t *word, uint32_t value)
{
    calls[i] = (struct call){.name = name, .parked = {.fence = {word, value}, .passed = passed}};
    kvd_fences_park(&d, &calls[i].parked);
}

// Lets the loop go round for so long.
static void go_round(uint64_t ms)
{
    for (uint64_t until = uv_hrtime() + ms * 1000000; uv_hrtime() < until;)
        uv_run(&d.loop, UV_RUN_NOWAIT);
}

// Lets it go round until so many were let go.
static void go_until(uint32_t n)
{
    for (uint64_t until = uv_hrtime() + 10000000000; n_order < n && uv_hrtime() < until;)
        uv_run(&d.loop, UV_RUN_NOWAIT);
}

static void begin_fences(void)
{
    struct kvd_error err;
    memset(&d, 0, sizeof(d));
    n_order = 0;
    order[0] = '\0';
    uv_loop_init(&d.loop);
    ck_assert_int_eq(kvd_part_fences.init(&d, &err), KVD_OK);
}

static void end_fences(void)
{
    kvd_part_fences.end(&d);
    uv_run(&d.loop, UV_RUN_DEFAULT);
    ck_assert_ptr_null(d.fences);
    ck_assert_int_eq(uv_loop_close(&d.loop), 0);
}

START_TEST(a_fence_is_passed_when_its_word_gets_there)
{
    _Atomic uint32_t word = 7, none = 0;
    struct kvd_fence at = {&word, 7}, beyond = {&word, 8}, round = {&word, 0xfffffff0};
    ck_assert(kvd_fence_passed(&at) && !kvd_fence_passed(&beyond));
    ck_assert(kvd_fence_passed(&round)); // counters go round
    kvd_fence_signal(&beyond);
    ck_assert_uint_eq(atomic_load(&word), 8);
    kvd_fence_signal(&(struct kvd_fence){NULL, 5});
    ck_assert_uint_eq(atomic_load(&none), 0);
}
END_TEST

START_TEST(parked_ones_go_on_in_order_and_the_forgotten_do_not)
{
    _Atomic uint32_t word = 0, never = 0;
    begin_fences();
    park(0, 'a', &word, 2);
    park(1, 'b', &never, 1);
    park(2, 'c', &word, 1);
    park(3, 'd', &word, 1);
    go_round(1);
    ck_assert_str_eq(order, "");
    kvd_fences_forget(&d, &calls[3].parked);
    kvd_fences_forget(&d, &calls[3].parked);
    atomic_store(&word, 1);
    go_until(1);
    ck_assert_str_eq(order, "c");
    go_round(20); // it looks less often by now
    atomic_store(&word, 2);
    go_until(2);
    go_round(2);
    ck_assert_str_eq(order, "ca");
    kvd_fences_forget(&d, &calls[1].parked);
    uv_run(&d.loop, UV_RUN_DEFAULT); // nobody waits: nothing turns, and it comes back
    end_fences();
}
END_TEST

KVD_MAIN("queue", 60, a_line_starts_in_order_and_lines_do_not_wait_for_each_other,
         a_session_does_not_wait_for_another, none_is_overtaken_by_who_wants_the_same,
         who_has_least_in_flight_is_next, a_line_goes_with_its_session, one_that_gives_up_makes_way,
         some_of_a_line_are_in_flight_at_once,
         who_asks_for_too_much_is_refused_by_name_and_others_have_room,
         a_fence_is_passed_when_its_word_gets_there,
         parked_ones_go_on_in_order_and_the_forgotten_do_not)
