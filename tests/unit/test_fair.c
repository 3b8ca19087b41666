// Turns among tenants, and what may wait.
#include "daemon/sched/fair.h"
#include "tests/unit/suite.h"

enum { TENANTS = 6, JOBS = 400 };

static uint64_t below(uint64_t *state, uint64_t n)
{
    return kvd_rand(state) % n;
}

struct job {
    struct kvd_fair_job base;
    uint64_t left; // cost
    uint32_t number;
};

struct world {
    struct kvd_fair f;
    uint64_t r;
    struct job jobs[JOBS];
    uint32_t n;
    uint64_t served[TENANTS]; // cost
    uint32_t waiting[TENANTS], next[TENANTS];
    uint32_t pushed[TENANTS];
};

static struct job *add(struct world *w, uint32_t tenant, uint64_t cost)
{
    struct job *j = &w->jobs[w->n++];
    *j = (struct job){.base.tenant = tenant, .left = cost, .number = w->pushed[tenant]++};
    w->waiting[tenant]++;
    kvd_fair_push(&w->f, &j->base);
    return j;
}

// One turn of at most `slice`; returns the tenant, or TENANTS.
static uint32_t turn(struct world *w, uint64_t slice)
{
    struct job *j = (struct job *)kvd_fair_next(&w->f);
    if (!j)
        return TENANTS;
    uint32_t tenant = j->base.tenant;
    ck_assert_uint_eq(j->number, w->next[tenant]); // in order
    bool others = false;
    for (uint32_t t = 0; t < TENANTS; t++)
        others |= t != tenant && w->waiting[t];
    ck_assert(kvd_fair_contended(&w->f, &j->base) == others);
    uint64_t cost = j->left < slice ? j->left : slice;
    j->left -= cost;
    w->served[tenant] += cost;
    kvd_fair_charge(&w->f, &j->base, cost);
    if (j->left == 0) {
        kvd_fair_remove(&w->f, &j->base);
        w->waiting[tenant]--;
        w->next[tenant]++;
    }
    return tenant;
}

// Whatever the jobs' sizes, tenants that have work all along get the same, but for a slice each.
START_TEST(those_who_have_work_get_the_same)
{
    uint64_t seed = kvd_test_seed("fair");
    for (uint32_t round = 0; round < 200; round++) {
        struct world w = {0};
        w.r = seed + 2 * round;
        ck_assert(kvd_fair_init(&w.f, TENANTS));
        uint64_t slice = 1 + below(&w.r, 50);
        for (uint32_t i = 0; i < JOBS; i++)
            add(&w, (uint32_t)below(&w.r, TENANTS), 1 + below(&w.r, 300));
        bool all = true;
        while (all && turn(&w, slice) < TENANTS) {
            uint64_t least = UINT64_MAX, most = 0;
            for (uint32_t t = 0; t < TENANTS; t++) {
                all &= w.waiting[t] > 0;
                least = w.served[t] < least ? w.served[t] : least;
                most = w.served[t] > most ? w.served[t] : most;
            }
            ck_assert_uint_le(most - least, slice);
        }
        while (turn(&w, slice) < TENANTS)
            ;
        for (uint32_t t = 0; t < TENANTS; t++)
            ck_assert_uint_eq(w.next[t], w.pushed[t]); // nobody starves, nothing is lost
        kvd_fair_deinit(&w.f);
    }
}
END_TEST

// Who comes waits for one turn at most for each of those who have had no more than it, and what it
// did not use before is no credit.
START_TEST(who_comes_back_is_next_and_has_no_credit)
{
    uint64_t seed = kvd_test_seed("back");
    for (uint32_t round = 0; round < 200; round++) {
        struct world w = {0};
        w.r = seed + 2 * round;
        ck_assert(kvd_fair_init(&w.f, TENANTS));
        add(&w, 0, 1 << 20);
        add(&w, 1, 1 << 20);
        uint64_t slice = 10;
        for (uint32_t i = 0, n = (uint32_t)below(&w.r, 500); i < n; i++)
            turn(&w, slice);
        add(&w, 2, 3); // small, after a long time away
        uint32_t turns = 0;
        while (w.waiting[2])
            turn(&w, slice), turns++;
        ck_assert_uint_le(turns, 3);
        uint64_t before[] = {w.served[0], w.served[1]};
        add(&w, 2, 1 << 20);
        for (uint32_t i = 0; i < 300; i++)
            turn(&w, slice);
        ck_assert_uint_ge(w.served[0] - before[0], 980); // a third each
        ck_assert_uint_ge(w.served[1] - before[1], 980);
        kvd_fair_deinit(&w.f);
    }
}
END_TEST

// A tenant that goes away for a moment after a long turn does not get rid of it.
START_TEST(going_away_is_no_way_out)
{
    struct world w = {0};
    ck_assert(kvd_fair_init(&w.f, TENANTS));
    add(&w, 0, 1 << 20);
    for (uint32_t i = 0; i < 3000 && w.n < JOBS; i++) {
        if (!w.waiting[1])
            add(&w, 1, 90); // the whole of it is one turn
        turn(&w, kvd_fair_next(&w.f)->tenant == 1 ? 90 : 10);
    }
    ck_assert_uint_le(w.served[1], w.served[0] + 90);
    ck_assert_uint_le(w.served[0], w.served[1] + 90);
    kvd_fair_deinit(&w.f);
}
END_TEST

// A turn during which nobody else was there is no debt.
START_TEST(time_alone_is_free)
{
    struct world w = {0};
    ck_assert(kvd_fair_init(&w.f, TENANTS));
    struct job *j = add(&w, 0, 1 << 20);
    ck_assert_ptr_eq(kvd_fair_next(&w.f), &j->base);
    kvd_fair_advance(&w.f, &j->base, 1000000);
    add(&w, 1, 1 << 20);
    kvd_fair_charge(&w.f, &j->base, 10);
    for (uint32_t i = 0; i < 40; i++)
        turn(&w, 10);
    ck_assert_uint_ge(w.served[0], 190);
    ck_assert_uint_ge(w.served[1], 190);
    kvd_fair_deinit(&w.f);
}
END_TEST

// However many ask for too much, there is room for one who asks for a little.
START_TEST(what_waits_leaves_room)
{
    uint64_t seed = kvd_test_seed("waiting");
    uint64_t r = seed;
    for (uint32_t round = 0; round < 200; round++) {
        struct kvd_waiting most = {8 + (uint32_t)below(&r, 5000), 1 << 30}, all = {0};
        struct kvd_waiting own[40] = {0};
        uint32_t greedy = 1 + (uint32_t)below(&r, 40);
        const char *why;
        for (uint32_t i = 0; i < 20000; i++) {
            uint32_t who = i < greedy ? i : (uint32_t)below(&r, greedy);
            uint64_t bytes = below(&r, 1 << 20);
            if (!kvd_waiting_fits(own[who], all, most, bytes, &why))
                continue;
            own[who].calls++, all.calls++;
            own[who].bytes += bytes, all.bytes += bytes;
        }
        ck_assert_uint_le(all.calls, most.calls);
        ck_assert_uint_le(all.bytes, most.bytes);
        if (most.calls > 4 * greedy)
            ck_assert(kvd_waiting_fits((struct kvd_waiting){0}, all, most, 1000, &why));
        for (uint32_t i = 0; i < greedy; i++)
            ck_assert_uint_le(own[i].calls, most.calls / 4 * 3 + 3);
    }
}
END_TEST

KVD_MAIN("fair", 60, those_who_have_work_get_the_same, who_comes_back_is_next_and_has_no_credit,
         going_away_is_no_way_out, time_alone_is_free, what_waits_leaves_room)
