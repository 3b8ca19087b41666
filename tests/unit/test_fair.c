// Turns among tenants, and what may wait.
#include "daemon/sched/fair.h"
#include "proto/base.h"
#include "tests/unit/suite.h"

enum { TENANTS = 6, JOBS = 400, FLOWS = 5 };

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
    struct kvd_fair_flow flows[TENANTS][FLOWS];
    uint32_t n;
    uint64_t served[TENANTS]; // cost
    uint32_t waiting[TENANTS], next[TENANTS];
    uint32_t pushed[TENANTS];
};

static struct job *add(struct world *w, uint32_t tenant, uint64_t cost)
{
    struct job *j = &w->jobs[w->n++];
    *j = (struct job){.base = {.tenant = tenant, .flow = &w->flows[tenant][0]},
                      .left = cost,
                      .number = w->pushed[tenant]++};
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

// In a tenant its flows get the same too, and many of them no more than one of another tenant.
START_TEST(flows_share_what_their_tenant_gets)
{
    uint64_t seed = kvd_test_seed("flows");
    for (uint32_t round = 0, rounds = kvd_test_rounds(200); round < rounds; round++) {
        struct kvd_fair f;
        struct kvd_fair_flow flows[FLOWS + 1] = {0}; // the last one is all of tenant 1
        struct job jobs[FLOWS + 1][20];
        uint64_t r = seed + 2 * round, served[FLOWS + 1] = {0}, slice = 1 + below(&r, 50);
        uint32_t next[FLOWS + 1] = {0};
        ck_assert(kvd_fair_init(&f, 2));
        for (uint32_t i = 0; i < 20; i++)
            for (uint32_t n = 0; n <= FLOWS; n++) {
                struct job *j = &jobs[n][i];
                *j = (struct job){.base = {.tenant = n == FLOWS, .flow = &flows[n]},
                                  .left =
                                      n == 0 ? 1 << 20 : 1 + below(&r, 100), // one has large ones
                                  .number = i};
                kvd_fair_push(&f, &j->base);
            }
        for (;;) {
            struct job *j = (struct job *)kvd_fair_next(&f);
            uint32_t n = (uint32_t)(j->base.flow - flows);
            ck_assert_uint_eq(j->number, next[n]); // in order
            ck_assert(kvd_fair_contended(&f, &j->base));
            uint64_t cost = KVD_MIN(j->left, slice);
            j->left -= cost;
            served[n] += cost;
            kvd_fair_charge(&f, &j->base, cost);
            if (j->left == 0) {
                kvd_fair_remove(&f, &j->base);
                if (++next[n] == 20)
                    break; // one has nothing left: from here on others get more
            }
            uint64_t most = 0, least = UINT64_MAX, all = 0;
            for (uint32_t i = 0; i < FLOWS; i++) {
                most = KVD_MAX(most, served[i]);
                least = KVD_MIN(least, served[i]);
                all += served[i];
            }
            ck_assert_uint_le(most - least, slice);
            ck_assert_uint_le(KVD_MAX(all, served[FLOWS]) - KVD_MIN(all, served[FLOWS]), slice);
        }
        kvd_fair_deinit(&f);
    }
}
END_TEST

// A flow that is alone in its tenant is waited for by nobody.
START_TEST(one_flow_alone_is_not_contended)
{
    struct kvd_fair f;
    struct kvd_fair_flow flows[2] = {0};
    struct kvd_fair_job a = {.flow = &flows[0]}, b = a, c = {.flow = &flows[1]};
    ck_assert(kvd_fair_init(&f, 1));
    kvd_fair_push(&f, &a);
    kvd_fair_push(&f, &b); // behind it, in its own flow
    ck_assert(!kvd_fair_contended(&f, &a));
    kvd_fair_push(&f, &c);
    ck_assert(kvd_fair_contended(&f, &a));
    ck_assert(!kvd_fair_precedes(&f, &c, &a)); // they have had the same
    kvd_fair_charge(&f, &a, 10);
    ck_assert(kvd_fair_precedes(&f, &c, &a) && !kvd_fair_precedes(&f, &a, &c));
    ck_assert(!kvd_fair_precedes(&f, &b, &a)); // in the same flow
    ck_assert_ptr_eq(kvd_fair_next(&f), &c);
    kvd_fair_remove(&f, &c);
    ck_assert_ptr_eq(kvd_fair_next(&f), &a);
    ck_assert(!kvd_fair_contended(&f, &a));
    kvd_fair_remove(&f, &a);
    kvd_fair_remove(&f, &b);
    ck_assert_ptr_null(kvd_fair_next(&f));
    kvd_fair_deinit(&f);
}
END_TEST

// Whatever the jobs' sizes, tenants that have work all along get the same, but for a slice each.
START_TEST(those_who_have_work_get_the_same)
{
    uint64_t seed = kvd_test_seed("fair");
    for (uint32_t round = 0, rounds = kvd_test_rounds(200); round < rounds; round++) {
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
    for (uint32_t round = 0, rounds = kvd_test_rounds(200); round < rounds; round++) {
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
    for (uint32_t round = 0, rounds = kvd_test_rounds(200); round < rounds; round++) {
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
         going_away_is_no_way_out, time_alone_is_free, flows_share_what_their_tenant_gets,
         one_flow_alone_is_not_contended, what_waits_leaves_room)
