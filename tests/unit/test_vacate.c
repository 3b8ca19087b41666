// Emptying an extent for another namespace, all at once and in steps (pool/vacate.c).
#include "tests/unit/suite.h"

#include <errno.h>

#include "tests/unit/blocks_fixture.h"

enum { EXTENTS = 24, PROMPTS = 600, LONG = 16, AT_ONCE = 8, ROUNDS = 300 };

// Prompts whose pages lie anywhere, as eight sequences grew at once and others went in between; and
// another namespace with larger pages.
struct crowd {
    struct fixture f;
    struct kvd_prefix_key keys[PROMPTS][LONG];
    uint64_t rng;
    uint32_t held; // the prompt that a sequence still has
    uint32_t ns, layout;
    uint64_t others; // a sequence of the other namespace
};

static void name_prompts(struct crowd *c)
{
    for (uint32_t p = 0; p < PROMPTS; p++) {
        uint8_t names[LONG][16] = {{0}};
        for (uint32_t i = 0; i < LONG; i++) {
            memcpy(names[i], &p, sizeof(p));
            names[i][8] = (uint8_t)i;
        }
        ck_assert(!kvd_prefix_keys_of_blocks(c->f.space.domain, NULL, names[0], 16, LONG,
                                             c->keys[p], NULL));
    }
}

// Eight more prompts at once, of which the first one's sequence stays if `keep`.
static void crowd_round(struct crowd *c, uint32_t at_once, bool keep)
{
    struct fixture *f = &c->f;
    uint64_t seq[AT_ONCE];
    uint32_t prompt[AT_ONCE], has[AT_ONCE];
    for (uint32_t w = 0; w < at_once; w++) {
        prompt[w] = (uint32_t)(kvd_rand(&c->rng) >> 33) % PROMPTS;
        struct kvd_blocks_match m = {.keys = c->keys[prompt[w]], .n = LONG};
        kvd_blocks_match(f->pool, &f->space, true, &m);
        has[w] = m.at.blocks;
        ck_assert(!(has[w] ? kvd_blocks_adopt(f->pool, &m.at, has[w], &seq[w], &f->err)
                           : kvd_pool_seq_new(f->pool, f->ns, f->layout, &seq[w], &f->err)));
    }
    for (uint32_t i = 0; i < LONG * at_once; i++)
        if (has[i % at_once] < LONG) {
            ck_assert_msg(!grow(f->pool, seq[i % at_once], T, &f->err), "%s", f->err.text);
            has[i % at_once]++;
        }
    for (uint32_t w = 0; w < at_once; w++) {
        struct kvd_blocks_published out;
        ck_assert(!kvd_blocks_publish(f->pool, &f->space, seq[w], c->keys[prompt[w]], LONG, w % 2,
                                      &out, &f->err));
        if (w || !keep)
            kvd_pool_seq_release(f->pool, seq[w]);
    }
    c->held = keep ? prompt[0] : c->held;
}

static void crowd_setup(struct crowd *c)
{
    static const uint64_t larger[][KVD_POOL_KINDS] = {{128 << 10, 32 << 10}};
    struct fixture *f = &c->f;
    c->rng = kvd_test_seed("extent");
    setup(f, EXTENTS);
    struct kvd_layout plain = test_layout(1, 0, 0), two = test_layout(2, 0, 0);
    ck_assert(!kvd_pool_layout(f->pool, f->ns, &plain, one_plane, &f->layout, &recycled, &f->err));
    f->space = space_of(f->ns, f->layout, "");
    name_prompts(c);
    for (uint32_t round = 0; round < ROUNDS; round++)
        crowd_round(c, AT_ONCE, round == ROUNDS - 1);
    ck_assert(!kvd_pool_namespace(f->pool, "n1", &c->ns, &f->err));
    ck_assert(!kvd_pool_layout(f->pool, c->ns, &two, larger, &c->layout, &recycled, &f->err));
    ck_assert(!kvd_pool_seq_new(f->pool, c->ns, c->layout, &c->others, &f->err));
}

static uint64_t crowd_blocks(const struct crowd *c)
{
    struct kvd_blocks_info info;
    kvd_blocks_info(c->f.pool, c->f.ns, &info);
    return info.blocks;
}

static uint64_t crowd_gone(const struct crowd *c)
{
    struct kvd_blocks_info info;
    kvd_blocks_info(c->f.pool, c->f.ns, &info);
    return info.removed[KVD_PREFIX_EVICTED_ROOM];
}

static void what_is_held_is_there(struct crowd *c)
{
    struct kvd_blocks_match m = {.keys = c->keys[c->held], .n = LONG};
    kvd_blocks_match(c->f.pool, &c->f.space, false, &m);
    ck_assert_uint_eq(m.at.blocks, LONG);
}

// What another namespace's first page costs is an extent and what hangs on it, and not nearly all
// of the cache; what is held stays.
START_TEST(an_extent_for_others_costs_few_blocks)
{
    static struct crowd c;
    struct fixture *f = &c.f;
    crowd_setup(&c);
    uint64_t before = crowd_blocks(&c);
    ck_assert_uint_gt(before, EXTENTS * 128 / 2);
    ck_assert_msg(!grow(f->pool, c.others, T, &f->err), "%s", f->err.text);
    verify(f->pool);
    uint64_t gone = before - crowd_blocks(&c);
    printf("an extent: %llu of %llu blocks have gone\n", (unsigned long long)gone,
           (unsigned long long)before);
    ck_assert_uint_lt(gone, before / 2);
    what_is_held_is_there(&c);
    // As many as there are can be had, one after the other, until what is held is left.
    uint32_t pages = 1;
    while (grow(f->pool, c.others, T, &f->err) == 0)
        pages++;
    verify(f->pool);
    ck_assert_uint_ge(pages, (EXTENTS - LONG) * 64);
    what_is_held_is_there(&c);
    kvd_pool_free(&f->pool);
}
END_TEST

// The same in steps, of which each looks at few blocks, while prompts go on being computed: every
// page that they need is taken from the same slab as the extent that is to be empty.
START_TEST(an_extent_is_emptied_in_steps)
{
    enum { LOOKS = 61, EVERY = 5 }; // blocks of a step; steps between prompts
    static struct crowd c;
    struct fixture *f = &c.f;
    const struct kvd_pool_need need = {.pages = {{0, 1}}, .bytes = 32 << 10};
    crowd_setup(&c);
    for (uint32_t had = 0; had < 4; had++) {
        struct kvd_pool_room room = {0};
        uint64_t blocks = crowd_blocks(&c), before = crowd_gone(&c), steps = 0, prompts = 0;
        while (!kvd_pool_room_make(f->pool, c.ns, c.layout, &need, &room))
            for (bool more = true; more; steps++) {
                more = kvd_pool_vacate_step(f->pool, LOOKS);
                if (steps % EVERY)
                    continue;
                crowd_round(&c, 1, false);
                prompts++;
                verify(f->pool);
            }
        what_is_held_is_there(&c);
        uint64_t gone = crowd_gone(&c) - before;
        ck_assert_uint_gt(steps, blocks / LOOKS); // it goes through all more than once
        ck_assert_uint_ge(gone, 64);
        ck_assert_uint_lt(gone, blocks / 2 + prompts * LONG); // each prompt took some out too
        printf("an extent in %llu steps and %llu prompts: %llu of %llu blocks have gone\n",
               (unsigned long long)steps, (unsigned long long)prompts, (unsigned long long)gone,
               (unsigned long long)blocks);
        // It is there, and nothing goes for it any more.
        before = crowd_gone(&c);
        for (uint32_t i = 0; i < 64; i++)
            ck_assert_msg(!grow(f->pool, c.others, T, &f->err), "%s", f->err.text);
        ck_assert_uint_eq(crowd_gone(&c), before);
        verify(f->pool);
    }
    // One that is under way ends with the pool.
    struct kvd_pool_room room = {0};
    ck_assert(!kvd_pool_room_make(f->pool, c.ns, c.layout, &need, &room));
    ck_assert(kvd_pool_vacate_step(f->pool, LOOKS));
    kvd_pool_free(&f->pool);
}
END_TEST

// What is leased or held while the extent is looked for and emptied stays, whenever that begins;
// who needs the room all at once has it from the one that is under way; and an index that goes ends
// it.
START_TEST(what_is_taken_up_meanwhile_stays)
{
    static struct crowd c;
    struct fixture *f = &c.f;
    const struct kvd_pool_need need = {.pages = {{0, 1}}, .bytes = 32 << 10};
    for (uint32_t after = 1; after < 400; after += 57) {
        struct kvd_pool_room room = {0};
        struct kvd_blocks_at at[PROMPTS];
        uint32_t n = 0;
        crowd_setup(&c);
        ck_assert(!kvd_pool_room_make(f->pool, c.ns, c.layout, &need, &room));
        for (uint32_t i = 0; i < after && kvd_pool_vacate_step(f->pool, 64); i++)
            continue;
        for (uint32_t p = 0; p < PROMPTS; p++) {
            struct kvd_blocks_match m = {.keys = c.keys[p], .n = LONG};
            kvd_blocks_match(f->pool, &f->space, true, &m);
            if (m.at.blocks && !kvd_blocks_hold(f->pool, &m.at, &f->err))
                at[n++] = m.at;
        }
        uint64_t before = crowd_blocks(&c);
        ck_assert_uint_gt(n, 0);
        while (kvd_pool_vacate_step(f->pool, 64))
            continue;
        ck_assert_uint_eq(crowd_blocks(&c), before);
        verify(f->pool);
        for (uint32_t i = 0; i < n; i++)
            kvd_blocks_release(f->pool, &at[i]);
        ck_assert_msg(!grow(f->pool, c.others, T, &f->err), "%s", f->err.text);
        verify(f->pool);
        kvd_pool_free(&f->pool);
    }
    crowd_setup(&c);
    struct kvd_pool_room room = {0};
    ck_assert(!kvd_pool_room_make(f->pool, c.ns, c.layout, &need, &room));
    ck_assert(kvd_pool_vacate_step(f->pool, 64));
    while (grow(f->pool, c.others, 64 * T, &f->err) == 0) // takes the next ones all at once
        verify(f->pool);
    ck_assert(!kvd_pool_vacate_step(f->pool, 64));
    kvd_pool_free(&f->pool);
}
END_TEST

KVD_MAIN("vacate", 120, an_extent_for_others_costs_few_blocks, an_extent_is_emptied_in_steps,
         what_is_taken_up_meanwhile_stays)
