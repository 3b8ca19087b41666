// Quotas that may be exceeded: random operations of two namespaces against a model that knows what
// each has in use. KVD_POOL_OPS sets the number of operations (default 20,000).
#include "tests/unit/blocks_fixture.h"

enum {
    EXTENTS = 24,
    QUOTA_PAGES = 6 * 128, // of 16 KiB, 128 an extent
    PAGE = 16 << 10,
    LIVE = 3,  // sequences that a namespace holds
    MOST = 40, // pages of one, or that are put
};

struct tenant {
    uint32_t ns;
    struct kvd_blocks_space space;
    uint64_t live[LIVE];
    uint32_t pages[LIVE], in_use;
};

struct model {
    struct test_mem mem;
    struct kvd_pool *pool;
    uint32_t layout;
    uint64_t rng, named;
    struct tenant t[2]; // the first may borrow
    uint32_t borrowed, refused, given_back, scattered;
};

static uint32_t below(struct model *m, uint32_t n)
{
    return (uint32_t)(kvd_rand(&m->rng) >> 33) % n;
}

static void model_new(struct model *m)
{
    struct kvd_error err = {0};
    *m = (struct model){.rng = kvd_test_seed("borrow")};
    m->pool = test_pool(&m->mem, EXTENTS, 64);
    struct kvd_layout l = test_layout(1, 0, 0);
    for (int i = 0; i < 2; i++) {
        struct tenant *t = &m->t[i];
        char name[4] = {'n', (char)('0' + i), 0};
        ck_assert_int_eq(kvd_pool_namespace(m->pool, name, &t->ns, &err), 0);
        kvd_pool_set_quota(m->pool, t->ns, (uint64_t)QUOTA_PAGES * PAGE);
        ck_assert_int_eq(
            kvd_pool_layout(m->pool, t->ns, &l, one_plane, &m->layout, &recycled, &err), 0);
        t->space = space_of(t->ns, m->layout, "");
    }
}

static struct kvd_pool_namespace_info info_of(const struct model *m, const struct tenant *t)
{
    struct kvd_pool_namespace_info info;
    kvd_pool_namespace_info(m->pool, t->ns, &info);
    return info;
}

static uint64_t blocks_of(const struct model *m, const struct tenant *t)
{
    struct kvd_blocks_info info;
    kvd_blocks_info(m->pool, t->ns, &info);
    return info.blocks;
}

static int sequence(struct model *m, struct tenant *t, uint32_t pages, uint64_t *seq)
{
    struct kvd_error err = {0};
    ck_assert_int_eq(kvd_pool_seq_new(m->pool, t->ns, m->layout, seq, &err), 0);
    int rc = grow(m->pool, *seq, pages * T, &err);
    if (rc)
        kvd_pool_seq_release(m->pool, *seq);
    return rc;
}

// Pages that a namespace can still have: those that its extents have left, and extents that nobody
// has.
struct room {
    uint32_t ns;
    uint64_t extents, left;
};

static bool add_slab(void *ctx, const struct kvd_pool_slab_info *slab)
{
    struct room *r = ctx;
    r->extents += slab->extents;
    r->left += slab->ns == r->ns && slab->kind == KVD_POOL_CODEC ? slab->free : 0;
    return true;
}

// As nothing is compacted, an extent with one page in use stays with its namespace. Then a
// namespace may be refused what its quota lets it have, but only when nobody has anything left to
// be evicted.
static bool no_room(const struct model *m, const struct tenant *t, uint32_t pages)
{
    struct room r = {.ns = t->ns};
    kvd_pool_slab_each(m->pool, add_slab, &r);
    return blocks_of(m, &m->t[0]) + blocks_of(m, &m->t[1]) == 0 &&
           r.left + (EXTENTS - r.extents) * (QUOTA_PAGES / 6) < pages;
}

// Whether something may be refused: what is in use, and what is asked for, fit the quota.
static void check_refusal(struct model *m, const struct tenant *t, uint32_t pages, int rc)
{
    bool fits = t->in_use + pages <= QUOTA_PAGES;
    bool scattered = rc == KVD_E_FULL && no_room(m, t, pages);
    m->scattered += fits && scattered;
    ck_assert_msg(!fits || rc == 0 || scattered, "%u pages in use, %u more refused (%d)", t->in_use,
                  pages, rc);
    ck_assert_msg(fits || rc == KVD_E_QUOTA, "%u pages in use got %u more (%d)", t->in_use, pages,
                  rc);
    m->refused += rc != 0;
}

static void op_put(struct model *m, struct tenant *t)
{
    struct kvd_prefix_key keys[MOST];
    uint8_t names[MOST][16] = {{0}};
    uint32_t n = 1 + below(m, MOST), stored;
    uint64_t seq;
    struct kvd_error err = {0};
    for (uint32_t i = 0; i < n; i++) {
        uint64_t name = ++m->named;
        memcpy(names[i], &name, sizeof(name));
    }
    ck_assert_int_eq(kvd_prefix_keys_of_pages(t->space.domain, names[0], 16, n, keys, &err), 0);
    int rc = sequence(m, t, n, &seq);
    check_refusal(m, t, n, rc);
    if (rc)
        return;
    ck_assert_int_eq(
        kvd_blocks_publish_pages(m->pool, &t->space, seq, 0, keys, n, NULL, &stored, &err), 0);
    kvd_pool_seq_release(m->pool, seq);
}

static void op_live(struct model *m, struct tenant *t)
{
    uint32_t i = below(m, LIVE), n = below(m, 8) ? 1 + below(m, MOST) : 200 + below(m, 400);
    if (t->live[i]) {
        kvd_pool_seq_release(m->pool, t->live[i]);
        t->in_use -= t->pages[i];
        t->live[i] = 0;
        return;
    }
    int rc = sequence(m, t, n, &t->live[i]);
    check_refusal(m, t, n, rc);
    if (rc) {
        t->live[i] = 0;
        return;
    }
    t->pages[i] = n;
    t->in_use += n;
}

static void look(struct model *m, uint64_t by_namespace[8])
{
    struct kvd_pool_look look = {.by_namespace = by_namespace};
    memset(by_namespace, 0, 8 * sizeof(*by_namespace));
    while (!kvd_pool_look_step(m->pool, &look, 1000))
        ;
}

// Nobody has a lease, and no sequence a window: what is counted is what a look finds.
static void op_look(struct model *m)
{
    uint64_t before[2], found[8];
    for (int i = 0; i < 2; i++)
        before[i] = info_of(m, &m->t[i]).evictable;
    look(m, found);
    for (int i = 0; i < 2; i++) {
        ck_assert_uint_eq(before[i], found[m->t[i].ns]);
        ck_assert_uint_eq(info_of(m, &m->t[i]).evictable, before[i]);
    }
}

static void borrow(struct model *m)
{
    uint64_t found[8];
    look(m, found);
    kvd_pool_set_borrow(m->pool, m->t[0].ns, true);
}

static void check(struct model *m)
{
    const struct kvd_pool_namespace_info a = info_of(m, &m->t[0]), b = info_of(m, &m->t[1]);
    const uint64_t quota = (uint64_t)QUOTA_PAGES * PAGE;
    for (int i = 0; i < 2; i++)
        ck_assert_uint_le(m->t[i].in_use, QUOTA_PAGES);
    ck_assert_uint_le(b.used, quota); // it may not
    ck_assert_uint_le(a.used, quota + a.evictable);
    ck_assert_uint_le(a.used, quota + a.borrow);
    m->borrowed += a.used > quota;
}

START_TEST(what_is_borrowed_is_given_back)
{
    const char *env = getenv("KVD_POOL_OPS");
    uint64_t ops = env ? strtoull(env, NULL, 0) : 20000;
    static struct model m;
    model_new(&m);
    borrow(&m);
    for (uint64_t i = 0; i < ops; i++) {
        struct tenant *t = &m.t[below(&m, 3) == 0], *other = &m.t[t == m.t];
        uint64_t before = blocks_of(&m, other), had = info_of(&m, other).used;
        if (below(&m, 3) == 0)
            op_live(&m, t);
        else
            op_put(&m, t);
        // Nobody borrows what another has stored; who wants what is its own gets it back.
        if (t == m.t)
            ck_assert_uint_eq(blocks_of(&m, other), before);
        m.given_back += info_of(&m, other).used < had;
        if (below(&m, 4) == 0)
            op_look(&m);
        check(&m);
        if (i % 64 == 0)
            verify(m.pool);
    }
    printf("borrowed after %u of %" PRIu64
           " operations, given back in %u, %u refused, %u of them as "
           "extents have pages of others\n",
           m.borrowed, ops, m.given_back, m.refused, m.scattered);
    ck_assert(m.borrowed && m.given_back && m.refused);
    kvd_pool_free(&m.pool);
}
END_TEST

START_TEST(relieving_takes_what_is_borrowed_first)
{
    static struct model m;
    struct kvd_pool_evicted sum;
    model_new(&m);
    borrow(&m);
    for (int i = 0; i < 30; i++)
        op_put(&m, &m.t[0]);
    op_put(&m, &m.t[1]);
    uint64_t other = blocks_of(&m, &m.t[1]), used = info_of(&m, &m.t[0]).used;
    uint64_t over = used > (uint64_t)QUOTA_PAGES * PAGE ? used - (uint64_t)QUOTA_PAGES * PAGE : 0;
    while (over >= PAGE) {
        ck_assert_uint_eq(kvd_pool_relieve(m.pool, 1, &sum), 1);
        ck_assert_uint_eq(blocks_of(&m, &m.t[1]), other);
        over -= KVD_MIN(over, sum.bytes);
    }
    while (kvd_pool_relieve(m.pool, 8, &sum) == 8)
        ;
    ck_assert_uint_eq(blocks_of(&m, &m.t[0]) + blocks_of(&m, &m.t[1]), 0);
    verify(m.pool);
    kvd_pool_free(&m.pool);
}
END_TEST

// Whoever stores faster than anybody looks keeps what it has borrowed, though all of it is evicted
// and stored anew many times; and what is held, or asked for in vain, takes none of it away.
START_TEST(who_stores_fast_keeps_what_is_borrowed)
{
    static struct model m;
    struct kvd_error err = {0};
    struct tenant *t = &m.t[0];
    uint64_t full = (uint64_t)EXTENTS * (QUOTA_PAGES / 6) * PAGE, seq;
    model_new(&m);
    borrow(&m);
    while (info_of(&m, t).used + MOST * PAGE <= full)
        op_put(&m, t);
    for (int i = 0; i < 2000; i++) {
        op_put(&m, t);
        ck_assert_uint_gt(info_of(&m, t).used + 2 * MOST * PAGE, full);
    }
    ck_assert_int_eq(sequence(&m, t, QUOTA_PAGES - 8, &seq), 0);
    ck_assert_int_eq(sequence(&m, t, 8, &t->live[0]), 0);
    for (int i = 0; i < 100; i++)
        ck_assert_int_eq(sequence(&m, t, 1, &t->live[1]), KVD_E_QUOTA);
    ck_assert_uint_gt(info_of(&m, t).used + 2 * MOST * PAGE, full);
    // Adopted, it is held, and counts at once.
    kvd_pool_seq_release(m.pool, seq);
    op_look(&m);
    ck_assert_int_eq(sequence(&m, t, MOST, &t->live[1]), 0);
    ck_assert_int_eq(kvd_pool_publish(m.pool, t->live[1], "p", false, &err), 0);
    uint64_t could = info_of(&m, t).evictable;
    kvd_pool_seq_release(m.pool, t->live[1]);
    ck_assert_uint_eq(info_of(&m, t).evictable, could + MOST * PAGE);
    ck_assert_int_eq(kvd_pool_seq_hold(m.pool, t->live[1]), 0);
    ck_assert_uint_eq(info_of(&m, t).evictable, could);
    verify(m.pool);
    kvd_pool_free(&m.pool);
}
END_TEST

// Of a sequence that is published, and of one that works have though nobody holds it any more.
START_TEST(works_hold_what_they_have)
{
    static struct model m;
    struct kvd_error err = {0};
    struct tenant *t = &m.t[0];
    struct kvd_pool_append a;
    uint64_t seq, both;
    model_new(&m);
    borrow(&m);
    ck_assert_int_eq(sequence(&m, t, 10, &seq), 0);
    ck_assert_int_eq(kvd_pool_publish(m.pool, seq, "p", false, &err), 0);
    kvd_pool_seq_pin(m.pool, seq);
    const struct kvd_pool_append_request by = {
        .seq = seq, .position = 10 * T, .tokens = 5 * T, .layer_count = 1};
    ck_assert_int_eq(kvd_pool_append_begin(m.pool, &by, &a, &err), 0);
    kvd_pool_seq_release(m.pool, seq);
    ck_assert_uint_eq(info_of(&m, t).evictable, 0);
    kvd_pool_append_commit(m.pool, &a);
    verify(m.pool);
    kvd_pool_seq_unpin(m.pool, seq);
    ck_assert_uint_eq(info_of(&m, t).evictable, 15 * PAGE);
    ck_assert_int_eq(kvd_pool_seq_fork(m.pool, seq, &both, &err), 0);
    ck_assert_uint_eq(info_of(&m, t).evictable, 0);
    kvd_pool_seq_release(m.pool, both);
    kvd_pool_seq_pin(m.pool, seq);
    ck_assert_uint_eq(info_of(&m, t).evictable, 0);
    kvd_pool_seq_unpin(m.pool, seq);
    op_look(&m);
    ck_assert_uint_eq(info_of(&m, t).evictable, 15 * PAGE);
    verify(m.pool);
    kvd_pool_free(&m.pool);
}
END_TEST

// All blocks of a sequence of MOST.
static void publish_all(struct model *m, struct tenant *t, uint64_t seq)
{
    struct kvd_prefix_key keys[MOST];
    uint8_t names[MOST][16] = {{0}};
    struct kvd_error err = {0};
    uint32_t stored;
    for (uint32_t i = 0; i < MOST; i++)
        names[i][0] = (uint8_t)i + 1;
    ck_assert_int_eq(kvd_prefix_keys_of_pages(t->space.domain, names[0], 16, MOST, keys, &err), 0);
    ck_assert_int_eq(
        kvd_blocks_publish_pages(m->pool, &t->space, seq, 0, keys, MOST, NULL, &stored, &err), 0);
}

// Nobody has a sequence any more, but kvd looks at one of its blocks still, or copies it: who wants
// the room waits, whether a quota (one that may be exceeded too) or the pool is too small for both,
// and is refused at once where that is not why.
START_TEST(what_kvd_itself_has_is_waited_for)
{
    enum { ALL = EXTENTS * (QUOTA_PAGES / 6), QUOTA = 0, BORROWED = 1, POOL = 2 };
    static struct model m;
    struct tenant *t = &m.t[0];
    for (int way = QUOTA; way <= POOL; way++)
        for (int copies = 0; copies < 2; copies++) {
            struct kvd_pool_need need = {.bytes = MOST * PAGE};
            struct kvd_pool_room room = {0};
            struct kvd_pool_walk walk = {0};
            struct kvd_pool_block block;
            struct kvd_blocks_load load;
            uint64_t seq, rest;
            need.pages[0][KVD_POOL_CODEC] = MOST;
            model_new(&m);
            kvd_blocks_note_new(m.pool);
            if (way == BORROWED)
                borrow(&m);
            kvd_pool_set_quota(m.pool, t->ns, way == POOL ? 0 : MOST * PAGE);
            if (way == POOL)
                ck_assert_int_eq(sequence(&m, t, ALL - MOST, &rest), 0);
            ck_assert_int_eq(sequence(&m, t, MOST, &seq), 0);
            if (way != BORROWED) // nothing can be done
                ck_assert(kvd_pool_room_make(m.pool, t->ns, m.layout, &need, &room));
            if (copies) {
                publish_all(&m, t, seq);
                ck_assert(kvd_blocks_pick_up(m.pool, t->ns, &load));
            } else {
                walk.seq = (uint32_t)seq;
                ck_assert_int_eq(kvd_pool_block_next(m.pool, &walk, 1, &block), 0);
                kvd_pool_block_hold(m.pool, &block);
            }
            kvd_pool_seq_release(m.pool, seq);
            room = (struct kvd_pool_room){0};
            for (int i = 0; i < 2; i++)
                ck_assert(!kvd_pool_room_make(m.pool, t->ns, m.layout, &need, &room));
            ck_assert(room.taken_up);
            if (copies)
                kvd_blocks_put_down(m.pool, &load);
            else
                kvd_pool_block_drop(m.pool, &block);
            ck_assert(kvd_pool_room_make(m.pool, t->ns, m.layout, &need, &room));
            ck_assert_int_eq(sequence(&m, t, MOST, &seq), 0);
            verify(m.pool);
            kvd_pool_free(&m.pool);
        }
}
END_TEST

KVD_MAIN("borrow", 120, what_is_borrowed_is_given_back, relieving_takes_what_is_borrowed_first,
         who_stores_fast_keeps_what_is_borrowed, works_hold_what_they_have,
         what_kvd_itself_has_is_waited_for)
