// Exact pages that encoded ones take the place of: which may go, who keeps them, and what a process
// that ends in between leaves.
#include "tests/unit/lasting_fixture.h"

void (*kvd_pool_kill_point)(void);

enum { PAGES = 40, TAIL = KVD_EXACT_TAIL_PAGES, EXACT_BYTES = 64 << 10 };

static const uint64_t exact_plane[][KVD_POOL_KINDS] = {{128 << 10, EXACT_BYTES}};

// Keys of `labels`' pages: [0, PAGES) are a chain's, others are made by `key`.
struct chains {
    struct fixture f;
    struct kvd_blocks_space encoded, exact;
    struct kvd_prefix_key keys[2][PAGES], others[PAGES]; // encoded, exact; exact ones of another
    uint32_t gone;                                       // exact ones of whose going was told
    bool evicts;                                         // for another reason
    uint32_t over; // how often it was told that a superseded one may have ended
};

static void on_superseded(void *ctx)
{
    ((struct chains *)ctx)->over++;
}

static void on_gone(void *ctx, uint32_t ns, uint32_t layout, const struct kvd_prefix_removed *r)
{
    struct chains *c = ctx;
    ck_assert_uint_eq(ns, c->f.ns);
    ck_assert_uint_eq(layout, c->exact.layout);
    ck_assert(c->evicts || r->reason == KVD_PREFIX_SUPERSEDED);
    c->gone += !c->evicts;
}

static void name(const struct kvd_blocks_space *space, uint8_t chain, struct kvd_prefix_key *out)
{
    uint8_t names[PAGES][16] = {{0}};
    for (uint32_t i = 0; i < PAGES; i++) {
        names[i][0] = (uint8_t)i;
        names[i][1] = chain;
    }
    ck_assert_int_eq(kvd_prefix_keys_of_pages(space->domain, names[0], 16, PAGES, out, NULL), 0);
}

static void begin(struct chains *c, bool tells)
{
    struct kvd_pool_mem_ops ops = lasting_ops(&c->f.mem);
    struct kvd_layout l = test_layout(1, 0, 0), x = test_layout(2, 0, 0);
    struct kvd_pool_config config = lasting;
    *c = (struct chains){0};
    ops.ctx = &c->f.mem;
    if (tells) {
        config.on_evict_ctx = c;
        config.on_block_gone = on_gone;
        config.on_superseded = on_superseded;
    }
    c->f.pool = kvd_pool_new(&config, &ops, &c->f.err);
    struct kvd_pool *pool = c->f.pool;
    ck_assert_int_eq(kvd_pool_namespace(pool, "n0", &c->f.ns, &c->f.err), 0);
    uint32_t layouts[2];
    ck_assert_int_eq(
        kvd_pool_layout(pool, c->f.ns, &l, one_plane, &layouts[0], &recycled, &c->f.err), 0);
    ck_assert_int_eq(
        kvd_pool_layout(pool, c->f.ns, &x, exact_plane, &layouts[1], &recycled, &c->f.err), 0);
    c->encoded = space_of(c->f.ns, layouts[0], "a space");
    c->exact = space_of(c->f.ns, layouts[1], "a space");
    name(&c->encoded, 1, c->keys[0]);
    name(&c->exact, 1, c->keys[1]);
    name(&c->exact, 2, c->others);
}

static void end(struct chains *c)
{
    verify(c->f.pool);
    kvd_pool_free(&c->f.pool);
    ck_assert_uint_eq(c->f.mem.live, 0);
}

static void put(struct chains *c, const struct kvd_blocks_space *space,
                const struct kvd_prefix_key *keys, uint32_t n, const struct kvd_prefix_key *after)
{
    uint32_t stored;
    c->f.layout = space->layout;
    uint64_t seq = sequence_of(&c->f, n * T);
    int rc = kvd_blocks_publish_pages(c->f.pool, space, seq, 0, keys, n, after, &stored, &c->f.err);
    ck_assert_msg(rc == 0, "%s", c->f.err.text);
    kvd_pool_seq_release(c->f.pool, seq);
}

// Exact pages [from, to) of the chain.
static void put_exact(struct chains *c, uint32_t from, uint32_t to)
{
    put(c, &c->exact, &c->keys[1][from], to - from, from ? &c->keys[1][from - 1] : NULL);
}

static uint32_t entry_of(const struct chains *c, const struct kvd_blocks_space *space,
                         const struct kvd_prefix_key *key)
{
    uint32_t entry;
    kvd_blocks_find_pages(c->f.pool, space, false, key, 1, &entry);
    return entry;
}

static bool is_exact(const struct chains *c, uint32_t page)
{
    return entry_of(c, &c->exact, &c->keys[1][page]) != KVD_PREFIX_NONE;
}

static struct kvd_blocks_chain chain_of(const struct chains *c, uint32_t from, uint32_t to)
{
    return (struct kvd_blocks_chain){.space = &c->exact, .keys = &c->keys[1][from], .n = to - from};
}

// The first of the pages that have been passed, and how many, which follow each other.
static uint32_t passed(const struct chains *c, uint32_t from, uint32_t to, uint32_t *first)
{
    const struct kvd_blocks_chain chain = chain_of(c, from, to);
    bool are[KVD_MAX_CALL_PAGES];
    uint32_t n = 0;
    kvd_blocks_passed(c->f.pool, &chain, are);
    for (uint32_t i = 0; i < to - from; i++)
        if (are[i]) {
            *first = n ? *first : from + i;
            ck_assert_uint_eq(from + i, *first + n);
            n++;
        }
    return n;
}

static bool supersede(struct chains *c, uint32_t from, uint32_t to, uint32_t page, uint64_t *freed)
{
    const struct kvd_blocks_chain chain = chain_of(c, from, to);
    bool held = kvd_blocks_supersede(c->f.pool, &chain, page - from, freed);
    verify(c->f.pool);
    return held;
}

START_TEST(what_has_four_behind_it_and_no_other_chain_is_passed)
{
    struct chains c;
    uint32_t first = 0;
    begin(&c, false);
    ck_assert_uint_eq(passed(&c, 0, 20, &first), 0);
    put_exact(&c, 0, 12);
    ck_assert_uint_eq(passed(&c, 1, 12, &first), 7);
    ck_assert_uint_eq(first, 1);
    ck_assert_uint_eq(passed(&c, 1, 5, &first), 0);
    // Another chain goes on from page 5: it may end within 4 pages of pages 2 to 5.
    put(&c, &c.exact, c.others, 1, &c.keys[1][5]);
    const struct kvd_blocks_chain chain = chain_of(&c, 0, 12);
    bool are[KVD_MAX_CALL_PAGES];
    kvd_blocks_passed(c.f.pool, &chain, are);
    ck_assert(are[0] && are[1] && !are[2] && !are[3] && !are[4] && !are[5] && are[6] && are[7]);
    end(&c);
}
END_TEST

START_TEST(what_goes_leaves_those_behind_it_behind_the_one_before)
{
    struct chains c;
    struct kvd_pool_evicted sum;
    struct kvd_prefix_key first;
    uint64_t freed;
    begin(&c, true);
    put_exact(&c, 0, 1);
    put(&c, &c.exact, &c.keys[1][4], 8, &c.keys[1][0]);
    put(&c, &c.exact, &c.keys[1][20], 4, &c.keys[1][11]);
    for (uint32_t i = 8; i-- > 4;) {
        ck_assert(!supersede(&c, 1, 12, i, &freed));
        ck_assert_uint_eq(freed, EXACT_BYTES);
        ck_assert(!is_exact(&c, i));
    }
    ck_assert_uint_eq(c.gone, 4);
    ck_assert(kvd_blocks_first_page(c.f.pool, &c.exact, &c.keys[1][23], &first));
    ck_assert_int_eq(memcmp(&first, &c.keys[1][0], sizeof(first)), 0);
    // Page by page from the end of the chain, of which all is there to the last.
    c.evicts = true;
    for (uint32_t left = 9; left; left--) {
        static const uint8_t order[] = {0, 8, 9, 10, 11, 20, 21, 22, 23};
        for (uint32_t i = 0; i < KVD_LEN(order); i++)
            ck_assert_int_eq(is_exact(&c, order[i]), i < left);
        ck_assert_uint_eq(kvd_pool_evict(c.f.pool, c.f.ns, 1, 1, &sum), 1);
    }
    end(&c);
}
END_TEST

START_TEST(what_is_held_stays_until_it_is_not)
{
    struct chains c;
    uint32_t entries[3], held, first = 0;
    uint64_t freed;
    begin(&c, false);
    put_exact(&c, 0, 12);
    put(&c, &c.encoded, &c.keys[0][5], 1, NULL);
    for (uint32_t i = 0; i < 3; i++)
        entries[i] = entry_of(&c, &c.exact, &c.keys[1][4 + i]);
    ck_assert_int_eq(kvd_blocks_hold_pages(c.f.pool, c.f.ns, entries, 3, 3, &held, &c.f.err), 0);
    ck_assert_uint_eq(held, 3); // each for itself
    ck_assert(!kvd_blocks_superseded(c.f.pool, c.f.ns, entries[1]));
    ck_assert(supersede(&c, 1, 12, 5, &freed));
    ck_assert(is_exact(&c, 5) && kvd_blocks_superseded(c.f.pool, c.f.ns, entries[1]));
    ck_assert_uint_eq(freed, 0);
    ck_assert_uint_eq(passed(&c, 5, 12, &first), 2); // 6 and 7
    ck_assert_uint_eq(first, 6);
    ck_assert(!kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], true, &freed));
    kvd_blocks_release_pages(c.f.pool, c.f.ns, entries, held);
    // With none in its place it stays, and is what it was.
    ck_assert(kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], false, &freed));
    ck_assert(is_exact(&c, 5) && !kvd_blocks_superseded(c.f.pool, c.f.ns, entries[1]));
    ck_assert(kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], true, &freed));
    ck_assert(is_exact(&c, 5)); // nobody said anything of it
    ck_assert_int_eq(kvd_blocks_hold_pages(c.f.pool, c.f.ns, &entries[1], 1, 1, &held, &c.f.err),
                     0);
    ck_assert(supersede(&c, 1, 12, 5, &freed));
    kvd_blocks_revive(c.f.pool, c.f.ns, entries[1]);
    ck_assert(!kvd_blocks_superseded(c.f.pool, c.f.ns, entries[1]));
    ck_assert(supersede(&c, 1, 12, 5, &freed));
    kvd_blocks_release_pages(c.f.pool, c.f.ns, &entries[1], held);
    ck_assert(kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], true, &freed));
    ck_assert(!is_exact(&c, 5));
    ck_assert_uint_eq(freed, EXACT_BYTES);
    end(&c);
}
END_TEST

START_TEST(the_end_of_the_last_holder_is_told)
{
    struct chains c;
    uint32_t entries[2], held;
    uint64_t freed;
    begin(&c, true);
    put_exact(&c, 0, 12);
    for (uint32_t i = 0; i < 2; i++)
        entries[i] = entry_of(&c, &c.exact, &c.keys[1][4 + i]);
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(kvd_blocks_hold_pages(c.f.pool, c.f.ns, entries, 2, 2, &held, &c.f.err),
                         0);
    ck_assert(supersede(&c, 1, 12, 5, &freed));
    kvd_blocks_release_pages(c.f.pool, c.f.ns, entries, 2);
    ck_assert_uint_eq(c.over, 0); // one is left
    kvd_blocks_release_pages(c.f.pool, c.f.ns, &entries[0], 1);
    ck_assert_uint_eq(c.over, 0); // of a page that is not superseded
    kvd_blocks_release_pages(c.f.pool, c.f.ns, &entries[1], 1);
    ck_assert_uint_eq(c.over, 1);
    kvd_blocks_revive(c.f.pool, c.f.ns, entries[1]);
    ck_assert_uint_eq(c.over, 2);
    kvd_blocks_revive(c.f.pool, c.f.ns, entries[1]); // it is not
    ck_assert_uint_eq(c.over, 2);
    end(&c);
}
END_TEST

START_TEST(others_that_came_behind_it_meanwhile_keep_its_place)
{
    struct chains c;
    uint32_t entry, held;
    uint64_t freed;
    begin(&c, true);
    put_exact(&c, 0, 12);
    entry = entry_of(&c, &c.exact, &c.keys[1][5]);
    ck_assert_int_eq(kvd_blocks_hold_pages(c.f.pool, c.f.ns, &entry, 1, 1, &held, &c.f.err), 0);
    ck_assert(supersede(&c, 1, 12, 5, &freed));
    put(&c, &c.exact, c.others, 2, &c.keys[1][5]);
    kvd_blocks_release_pages(c.f.pool, c.f.ns, &entry, held);
    ck_assert(kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], true, &freed));
    ck_assert_uint_eq(freed, EXACT_BYTES);
    ck_assert_uint_eq(c.gone, 1);
    ck_assert(!is_exact(&c, 5));
    verify(c.f.pool);
    // It may be put again, and is told of once more when it goes.
    put_exact(&c, 5, 6);
    ck_assert(is_exact(&c, 5));
    ck_assert(!kvd_blocks_superseded(c.f.pool, c.f.ns, entry));
    ck_assert_int_eq(kvd_blocks_hold_pages(c.f.pool, c.f.ns, &entry, 1, 1, &held, &c.f.err), 0);
    ck_assert(supersede(&c, 1, 12, 5, &freed));
    kvd_blocks_release_pages(c.f.pool, c.f.ns, &entry, held);
    ck_assert(kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], true, &freed));
    ck_assert_uint_eq(c.gone, 2);
    // The empty place goes with what is behind it, and nobody is told.
    uint32_t both[2] = {entry_of(&c, &c.exact, &c.others[0]), entry_of(&c, &c.exact, &c.others[1])};
    c.evicts = true;
    ck_assert_uint_eq(kvd_blocks_forget_pages(c.f.pool, c.f.ns, both, 2, KVD_PREFIX_SUPERSEDED), 2);
    c.evicts = false;
    ck_assert_uint_eq(kvd_blocks_forget_pages(c.f.pool, c.f.ns, &entry, 1, KVD_PREFIX_SUPERSEDED),
                      1);
    ck_assert_uint_eq(c.gone, 2);
    end(&c);
}
END_TEST

START_TEST(pages_are_linked_but_never_in_a_circle)
{
    struct chains c;
    struct kvd_prefix_key first;
    begin(&c, false);
    put(&c, &c.encoded, &c.keys[0][0], 4, NULL);
    put(&c, &c.encoded, &c.keys[0][8], 4, NULL);
    put(&c, &c.encoded, &c.keys[0][4], 4, NULL);
    kvd_blocks_link_pages(c.f.pool, &c.encoded, c.keys[0], 20);
    verify(c.f.pool);
    ck_assert(kvd_blocks_first_page(c.f.pool, &c.encoded, &c.keys[0][11], &first));
    ck_assert_int_eq(memcmp(&first, &c.keys[0][0], sizeof(first)), 0);
    struct kvd_prefix_key back[2] = {c.keys[0][11], c.keys[0][0]};
    kvd_blocks_link_pages(c.f.pool, &c.encoded, back, 2);
    verify(c.f.pool);
    end(&c);
}
END_TEST

// -- killed anywhere ----------------------------------------------------------------------------

static struct {
    struct chains *c;
    uint32_t looks;
} at;

// Each page is there one way at least.
static void check_opened(struct kvd_pool *opened)
{
    uint32_t entries[2][12];
    kvd_blocks_find_pages(opened, &at.c->encoded, false, at.c->keys[0], 12, entries[0]);
    kvd_blocks_find_pages(opened, &at.c->exact, false, at.c->keys[1], 12, entries[1]);
    for (uint32_t i = 0; i < 12; i++)
        ck_assert(entries[0][i] != KVD_PREFIX_NONE || entries[1][i] != KVD_PREFIX_NONE);
}

static void look(void)
{
    look_at_copy(at.c->f.pool, check_opened);
    at.looks++;
}

START_TEST(killed_anywhere_a_page_is_there_one_way)
{
    struct chains c;
    uint64_t freed;
    uint32_t entry, held;
    begin(&c, false);
    at.c = &c;
    put_exact(&c, 0, 12);
    entry = entry_of(&c, &c.exact, &c.keys[1][5]);
    ck_assert_int_eq(kvd_blocks_hold_pages(c.f.pool, c.f.ns, &entry, 1, 1, &held, &c.f.err), 0);
    kvd_pool_kill_point = look;
    put(&c, &c.encoded, &c.keys[0][1], 7, NULL);
    kvd_blocks_link_pages(c.f.pool, &c.encoded, c.keys[0], 12);
    for (uint32_t i = 8; i-- > 1;)
        supersede(&c, 1, 12, i, &freed);
    put(&c, &c.exact, c.others, 1, &c.keys[1][5]);
    kvd_blocks_release_pages(c.f.pool, c.f.ns, &entry, held);
    ck_assert(kvd_blocks_end_superseded(c.f.pool, &c.exact, &c.keys[1][5], true, &freed));
    kvd_pool_kill_point = NULL;
    for (uint32_t i = 0; i < 12; i++)
        ck_assert_int_eq(is_exact(&c, i), i == 0 || i > 7);
    printf("%u points\n", at.looks);
    ck_assert_uint_gt(at.looks, 30);
    end(&c);
    if (index_fd[0] >= 0)
        index_kept(NULL, 0, -1);
}
END_TEST

KVD_MAIN("supersede", 60, what_has_four_behind_it_and_no_other_chain_is_passed,
         what_goes_leaves_those_behind_it_behind_the_one_before, what_is_held_stays_until_it_is_not,
         the_end_of_the_last_holder_is_told, others_that_came_behind_it_meanwhile_keep_its_place,
         pages_are_linked_but_never_in_a_circle, killed_anywhere_a_page_is_there_one_way)
