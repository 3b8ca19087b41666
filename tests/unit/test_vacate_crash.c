// A process that ends while an extent is being emptied, between any two steps and behind each
// durable store of one: the next one has every block that had not gone, with its page, and what is
// held; and the extent's room is not lost either.
#include "tests/unit/lasting_fixture.h"

enum {
    PROMPTS = 160,
    LONG = 16,
    AT_ONCE = 8,
    ROUNDS = 60,
    STEP = 37,
    LOOKS_AT_ONE_OF = 5,
    HELD = 4 * T
};
enum { USES_ONE_OF = 16 }; // of looks

void (*kvd_pool_kill_point)(void);

static struct fixture f;
static struct kvd_prefix_key keys[PROMPTS][LONG];
static uint64_t rng, held, others_id;
static uint32_t others, others_layout;
static uint64_t points, looks, uses, most_gone;

// What the index had before.
static struct kvd_prefix_entry_info had[PROMPTS * LONG];
static uint32_t n_had;
static uint64_t gone_before;

static void name_prompts(void)
{
    for (uint32_t p = 0; p < PROMPTS; p++) {
        uint8_t names[LONG][16] = {{0}};
        for (uint32_t i = 0; i < LONG; i++) {
            memcpy(names[i], &p, sizeof(p));
            names[i][8] = (uint8_t)i;
        }
        ck_assert(
            !kvd_prefix_keys_of_blocks(f.space.domain, NULL, names[0], 16, LONG, keys[p], NULL));
    }
}

// Eight prompts at once, so that the pages of each lie anywhere.
static void crowd(void)
{
    uint64_t seq[AT_ONCE];
    uint32_t prompt[AT_ONCE];
    struct kvd_blocks_published out;
    for (uint32_t w = 0; w < AT_ONCE; w++) {
        prompt[w] = (uint32_t)(kvd_rand(&rng) >> 33) % PROMPTS;
        ck_assert(!kvd_pool_seq_new(f.pool, f.ns, f.layout, &seq[w], &f.err));
    }
    for (uint32_t i = 0; i < LONG * AT_ONCE; i++)
        ck_assert_msg(!grow(f.pool, seq[i % AT_ONCE], T, &f.err), "%s", f.err.text);
    for (uint32_t w = 0; w < AT_ONCE; w++) {
        ck_assert(!kvd_blocks_publish(f.pool, &f.space, seq[w], keys[prompt[w]], LONG, w % 2, &out,
                                      &f.err));
        kvd_pool_seq_release(f.pool, seq[w]);
    }
}

static void begin(void)
{
    static const uint64_t larger[][KVD_POOL_KINDS] = {{128 << 10, 32 << 10}};
    struct kvd_pool_mem_ops ops = lasting_ops(&f.mem);
    struct kvd_layout plain = test_layout(1, 0, 0), two = test_layout(2, 0, 0);
    f.pool = kvd_pool_new(&lasting, &ops, &f.err);
    ck_assert_msg(f.pool != NULL, "%s", f.err.text);
    ck_assert(!kvd_pool_namespace(f.pool, "n0", &f.ns, &f.err));
    ck_assert(!kvd_pool_layout(f.pool, f.ns, &plain, one_plane, &f.layout, &recycled, &f.err));
    f.space = space_of(f.ns, f.layout, "");
    name_prompts();
    for (uint32_t round = 0; round < ROUNDS; round++)
        crowd();
    // Its pages are in at most so many extents as it has blocks, which can't be emptied.
    held = sequence_of(&f, HELD);
    ck_assert(!kvd_pool_publish(f.pool, held, "held", false, &f.err));
    ck_assert(!kvd_pool_namespace(f.pool, "n1", &others, &f.err));
    ck_assert(!kvd_pool_layout(f.pool, others, &two, larger, &others_layout, &recycled, &f.err));
    ck_assert(!kvd_pool_seq_new(f.pool, others, others_layout, &others_id, &f.err));
    ck_assert(!kvd_pool_publish(f.pool, others_id, "others", false, &f.err));
}

static bool take_had(void *ctx, const struct kvd_prefix_entry_info *e, uint32_t layout,
                     uint32_t entry, bool end)
{
    (void)ctx;
    (void)layout;
    (void)entry;
    (void)end;
    ck_assert_uint_lt(n_had, KVD_LEN(had));
    had[n_had++] = *e;
    return true;
}

static bool check_block(void *ctx, const struct kvd_prefix_entry_info *e, uint32_t layout,
                        uint32_t entry, bool end)
{
    uint32_t *n = ctx;
    (void)layout;
    (void)entry;
    (void)end;
    for (uint32_t i = 0; i < n_had; i++)
        if (!memcmp(&had[i].key, &e->key, sizeof(e->key))) {
            ck_assert_uint_eq(e->value, had[i].value);
            ++*n;
            return true;
        }
    ck_abort_msg("a block that was not there");
}

static uint64_t gone(struct kvd_pool *pool)
{
    struct kvd_blocks_info info;
    kvd_blocks_info(pool, f.ns, &info);
    return info.removed[KVD_PREFIX_EVICTED_ROOM];
}

static void check_held(struct kvd_pool *opened)
{
    struct kvd_pool_seq_info info;
    ck_assert_int_eq(kvd_pool_seq_info(opened, held, &info), 0);
    ck_assert_uint_eq(info.length, HELD);
    verify(opened);
}

static void check_opened(struct kvd_pool *opened)
{
    struct kvd_error err = {0};
    uint32_t n = 0;
    uint64_t went = gone(f.pool) - gone_before;
    kvd_blocks_each(opened, f.ns, 0, UINT32_MAX, check_block, &n);
    // All but those that have gone, and the one that is about to.
    ck_assert_uint_ge(n + went + 1, n_had);
    ck_assert_uint_le(n, n_had);
    check_held(opened);
    if (looks % USES_ONE_OF)
        return;
    // Whoever waited has its room of the next process, more than an extent of it.
    for (uint32_t i = 0; i < 65; i++)
        ck_assert_msg(!grow(opened, others_id, T, &err), "%s", err.text);
    check_held(opened);
    uses++;
}

static void look(void)
{
    if (points++ % LOOKS_AT_ONE_OF)
        return;
    look_at_copy(f.pool, check_opened);
    looks++;
}

START_TEST(killed_while_an_extent_is_emptied)
{
    const struct kvd_pool_need need = {.pages = {{0, 1}}, .bytes = 32 << 10};
    uint64_t steps = 0;
    rng = kvd_test_seed("killed_while_an_extent_is_emptied");
    begin();
    for (uint32_t extents = 0; extents < 2; extents++) {
        struct kvd_pool_room room = {0};
        bool there = false;
        n_had = 0;
        kvd_blocks_each(f.pool, f.ns, 0, UINT32_MAX, take_had, NULL);
        gone_before = gone(f.pool);
        while (!there) {
            kvd_pool_kill_point = look;
            there = kvd_pool_room_make(f.pool, others, others_layout, &need, &room);
            for (bool more = !there; more; steps++) {
                look(); // between steps
                more = kvd_pool_vacate_step(f.pool, STEP);
            }
            kvd_pool_kill_point = NULL;
        }
        most_gone = KVD_MAX(most_gone, gone(f.pool) - gone_before);
        verify(f.pool);
        for (uint32_t i = 0; i < 64; i++) // all of it
            ck_assert_msg(!grow(f.pool, others_id, T, &f.err), "%s", f.err.text);
    }
    printf("%llu steps, %llu points, %llu of them opened, %llu of these used; %llu blocks for an "
           "extent\n",
           (unsigned long long)steps, (unsigned long long)points, (unsigned long long)looks,
           (unsigned long long)uses, (unsigned long long)most_gone);
    ck_assert(steps > 100 && looks > 200 && uses > 10 && most_gone > 64);
    kvd_pool_free(&f.pool);
}
END_TEST

KVD_MAIN("vacate_crash", 120, killed_while_an_extent_is_emptied)
