// Tables are for everybody: one namespace uses up all that it can, and others still find room.
#include "tests/unit/suite.h"

#include <errno.h>

#include "tests/unit/pool_fixture.h"

enum { NAMESPACES = 8, LAYOUTS = 8, SEQUENCES = 64 };

static const uint64_t page_bytes[1][KVD_POOL_KINDS] = {{128 << 10, 16 << 10}};

struct fixture {
    struct test_mem mem;
    struct kvd_pool *pool;
    struct kvd_error err;
    uint32_t layout;
};

static struct fixture f;

static uint32_t space(const char *name)
{
    uint32_t ns = 0;
    ck_assert_msg(kvd_pool_namespace(f.pool, name, &ns, &f.err) == 0, "%s", f.err.text);
    return ns;
}

static void setup(uint32_t extents)
{
    struct kvd_layout g = test_layout(1, 64, 256);
    f = (struct fixture){0};
    f.pool = test_pool(&f.mem, extents, SEQUENCES);
    uint32_t ns = space("setup");
    ck_assert_int_eq(kvd_pool_layout(f.pool, ns, &g, page_bytes, &f.layout, &recycled, &f.err), 0);
    kvd_pool_namespace_release(f.pool, ns);
}

static void finish(void)
{
    ck_assert_msg(kvd_pool_verify(f.pool, &f.err) == 0, "%s", f.err.text);
    kvd_pool_free(&f.pool);
    ck_assert_uint_eq(f.mem.live, 0);
}

static int make(uint32_t ns, uint64_t *seq)
{
    return kvd_pool_seq_new(f.pool, ns, f.layout, seq, &f.err);
}

static int append(uint64_t seq, uint64_t at, uint32_t n)
{
    struct kvd_pool_append a;
    struct kvd_pool_append_request by = {.seq = seq, .position = at, .tokens = n, .layer_count = 1};
    int rc = kvd_pool_append_begin(f.pool, &by, &a, &f.err);
    if (rc == 0)
        kvd_pool_append_commit(f.pool, &a);
    return rc;
}

static void publish(uint64_t seq, uint32_t number)
{
    char name[16];
    snprintf(name, sizeof(name), "n%u", number);
    ck_assert_int_eq(kvd_pool_publish(f.pool, seq, name, false, &f.err), 0);
    kvd_pool_seq_release(f.pool, seq);
}

static struct kvd_pool_namespace_info info_of(uint32_t ns)
{
    struct kvd_pool_namespace_info info;
    kvd_pool_namespace_info(f.pool, ns, &info);
    return info;
}

START_TEST(namespaces_go_when_they_are_empty)
{
    setup(2);
    char name[16];
    for (uint32_t i = 0; i < 1000; i++) {
        snprintf(name, sizeof(name), "s%u", i);
        kvd_pool_namespace_release(f.pool, space(name));
        ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, name), KVD_POOL_NONE);
    }
    // What keeps one: a hold, a sequence, a quota, the configuration.
    uint32_t ns = space("a"), again = space("a");
    uint64_t seq;
    ck_assert_uint_eq(ns, again);
    kvd_pool_namespace_release(f.pool, ns);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), ns);
    ck_assert_int_eq(make(ns, &seq), 0);
    kvd_pool_namespace_release(f.pool, ns);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), ns);
    kvd_pool_seq_pin(f.pool, seq);
    kvd_pool_seq_release(f.pool, seq);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), ns); // a call still uses it
    kvd_pool_seq_unpin(f.pool, seq);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), KVD_POOL_NONE);
    ns = space("a");
    kvd_pool_set_quota(f.pool, ns, 1 << 20);
    kvd_pool_namespace_keep(f.pool, ns, true);
    kvd_pool_namespace_release(f.pool, ns);
    kvd_pool_set_quota(f.pool, ns, 0);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), ns);
    kvd_pool_set_quota(f.pool, ns, 1 << 20);
    kvd_pool_namespace_keep(f.pool, ns, false);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), ns);
    kvd_pool_set_quota(f.pool, ns, 0);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "a"), KVD_POOL_NONE);
    finish();
}
END_TEST

START_TEST(who_takes_the_slot_gets_no_old_data)
{
    setup(1);
    uint32_t a = space("a"), page;
    ck_assert_int_eq(kvd_pool_page_alloc(f.pool, a, f.layout, 0, KVD_POOL_CODEC, &page, &f.err), 0);
    kvd_pool_page_unref(f.pool, page);
    kvd_pool_namespace_release(f.pool, a);
    uint32_t b = space("b");
    ck_assert_uint_eq(a, b);
    ck_assert_int_eq(kvd_pool_page_alloc(f.pool, b, f.layout, 0, KVD_POOL_CODEC, &page, &f.err), 0);
    ck_assert_uint_eq(f.mem.zeros, 1);
    kvd_pool_page_unref(f.pool, page);
    finish();
}
END_TEST

START_TEST(idle_namespaces_make_room_for_others)
{
    setup(2);
    char name[16];
    uint64_t seq;
    uint32_t last = 0, ns;
    for (uint32_t i = 0; i < NAMESPACES; i++) {
        snprintf(name, sizeof(name), "s%u", i);
        last = space(name);
        ck_assert_int_eq(make(last, &seq), 0);
        publish(seq, i);
        if (i)
            kvd_pool_namespace_release(f.pool, last);
    }
    kvd_pool_lookup(f.pool, kvd_pool_namespace_find(f.pool, "s1"), "n1");
    ns = space("x");
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "s2"), KVD_POOL_NONE); // the idlest
    ck_assert_uint_ne(kvd_pool_namespace_find(f.pool, "s1"), KVD_POOL_NONE);
    ck_assert_uint_ne(kvd_pool_namespace_find(f.pool, "s0"), KVD_POOL_NONE); // held
    ck_assert_str_eq(info_of(ns).name, "x");
    ck_assert_uint_eq(info_of(ns).sequences, 0);
    for (uint32_t i = 0; i < NAMESPACES - 2; i++) {
        snprintf(name, sizeof(name), "y%u", i);
        space(name);
    }
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "z", &ns, &f.err), KVD_E_LIMIT);
    finish();
}
END_TEST

START_TEST(sequences_are_shared)
{
    setup(2);
    uint32_t a = space("a"), b = space("b"), c = space("c"), n = 0;
    uint64_t seq, theirs[SEQUENCES];
    while (make(a, &theirs[n]) == 0)
        n++;
    ck_assert_uint_eq(n, SEQUENCES / 2);
    ck_assert_ptr_nonnull(strstr(f.err.text, "max-sequences"));
    for (uint32_t i = 0; i < SEQUENCES / 4; i++)
        ck_assert_msg(make(b, &seq) == 0, "%s", f.err.text);
    ck_assert_int_eq(make(c, &seq), 0);
    // What is published and unused goes for others, from whoever has most, and never from the
    // small.
    publish(seq, 0);
    for (uint32_t i = 0; i < n; i++)
        publish(theirs[i], i);
    for (uint32_t i = 0; i < 5; i++) // then both have as many
        ck_assert_msg(make(b, &seq) == 0, "%u: %s", i, f.err.text);
    ck_assert_uint_eq(info_of(c).sequences, 1);
    for (uint32_t i = 0; i < 1000; i++) { // its own go first: it gets no more by publishing
        ck_assert_msg(make(a, &seq) == 0, "%s", f.err.text);
        publish(seq, 1000 + i);
    }
    ck_assert_uint_eq(info_of(c).sequences, 1);
    ck_assert_uint_eq(info_of(b).sequences, SEQUENCES / 4 + 5);
    ck_assert_uint_ne(kvd_pool_lookup(f.pool, c, "n0"), 0);
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, a, "n0"), 0);
    finish();
}
END_TEST

START_TEST(table_blocks_are_shared)
{
    setup(8);
    uint32_t a = space("a"), b = space("b");
    uint64_t parent, child, seq, kids[SEQUENCES];
    uint32_t n = 0;
    ck_assert_int_eq(make(a, &parent), 0);
    ck_assert_int_eq(append(parent, 0, 12000), 0); // 7 blocks of history
    while (kvd_pool_seq_fork(f.pool, parent, &child, &f.err) == 0)
        kids[n++] = child;
    ck_assert_ptr_nonnull(strstr(f.err.text, "blocks of page tables"));
    uint64_t used = info_of(a).blocks;
    ck_assert_msg(kvd_pool_verify(f.pool, &f.err) == 0, "%s", f.err.text);
    ck_assert_int_eq(make(b, &seq), 0);
    ck_assert_msg(append(seq, 0, 4000) == 0, "%s", f.err.text);
    ck_assert_uint_eq(info_of(a).blocks, used);
    // Its own copies, once they are evictable, go before it is refused; the parent never.
    for (uint32_t i = 0; i < n; i++)
        publish(kids[i], i);
    ck_assert_msg(kvd_pool_seq_fork(f.pool, parent, &child, &f.err) == 0, "%s", f.err.text);
    ck_assert_uint_le(info_of(a).blocks, used);
    kvd_pool_seq_release(f.pool, child);
    publish(parent, n);
    for (uint32_t i = 0; i < 100; i++) { // nor where it is evictable itself
        ck_assert_int_eq(kvd_pool_seq_fork(f.pool, parent, &child, &f.err), 0);
        publish(child, n + 1 + i);
    }
    finish();
}
END_TEST

START_TEST(layouts_are_shared)
{
    setup(2);
    uint32_t a = space("a"), b = space("b"), layout[LAYOUTS], n = 0, x;
    uint64_t seq;
    struct kvd_layout g = test_layout(1, 64, 512);
    kvd_pool_layout_unref(f.pool, f.layout);
    for (;; n++, g.planes[0].sink += 16)
        if (kvd_pool_layout(f.pool, a, &g, page_bytes, &layout[n], &recycled, &f.err))
            break;
    ck_assert_uint_eq(n, LAYOUTS / 2);
    g.planes[0].recent = 1024;
    ck_assert_int_eq(kvd_pool_layout(f.pool, b, &g, page_bytes, &x, &recycled, &f.err), 0);
    // Nor does it get more by coming back to those that it made before.
    for (uint32_t i = 0; i < n; i++)
        kvd_pool_layout_unref(f.pool, layout[i]);
    g.planes[0].recent = 512;
    for (uint32_t i = 0; i < 3; i++) {
        g.planes[0].sink -= 16;
        ck_assert_int_eq(kvd_pool_layout(f.pool, b, &g, page_bytes, &layout[i], &recycled, &f.err),
                         0);
    }
    g.planes[0].sink -= 16;
    ck_assert_int_eq(kvd_pool_layout(f.pool, b, &g, page_bytes, &layout[3], &recycled, &f.err),
                     KVD_E_LIMIT);
    for (uint32_t i = 0; i < 3; i++)
        kvd_pool_layout_unref(f.pool, layout[i]);
    g.planes[0].sink = 64;
    for (n = 0; kvd_pool_layout(f.pool, a, &g, page_bytes, &layout[n], &recycled, &f.err) == 0; n++)
        g.planes[0].sink += 16;
    ck_assert_uint_eq(n, LAYOUTS / 2);
    // With nothing but evictable sequences they go: the session's own first.
    for (uint32_t i = 0; i < n; i++) {
        ck_assert_int_eq(kvd_pool_seq_new(f.pool, a, layout[i], &seq, &f.err), 0);
        publish(seq, i);
        kvd_pool_layout_unref(f.pool, layout[i]);
    }
    for (uint32_t i = 0; i < 20; i++) {
        g.planes[0].sink += 16;
        ck_assert_int_eq(kvd_pool_layout(f.pool, a, &g, page_bytes, &layout[0], &recycled, &f.err),
                         0);
        ck_assert_int_eq(kvd_pool_seq_new(f.pool, a, layout[0], &seq, &f.err), 0);
        publish(seq, 100 + i);
        kvd_pool_layout_unref(f.pool, layout[0]);
    }
    ck_assert_uint_eq(kvd_pool_layout_refs(f.pool, x), 1);
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, a, "n0"), 0);
    finish();
}
END_TEST

// What has to make room can be cleared in pieces, each of which looks at so many entries.
START_TEST(idle_ones_are_cleared_in_pieces)
{
    setup(2);
    struct kvd_pool_clearing c;
    struct kvd_layout g = test_layout(1, 64, 512);
    uint32_t old = space("old"), ns, pieces = 0;
    uint64_t seq;
    for (uint32_t i = 0; i < 20; i++) {
        ck_assert_int_eq(make(old, &seq), 0);
        publish(seq, i);
    }
    ck_assert(!kvd_pool_namespace_clears(f.pool, NAMESPACES - 1, &c)); // there is room
    kvd_pool_namespace_release(f.pool, old);
    char name[16];
    for (uint32_t i = 0; i < NAMESPACES - 1; i++) {
        snprintf(name, sizeof(name), "s%u", i);
        space(name);
    }
    ck_assert(kvd_pool_namespace_clears(f.pool, 1, &c));
    ck_assert_uint_eq(c.index, old);
    ck_assert(!kvd_pool_clear(f.pool, &c, 8));
    ck_assert_uint_eq(info_of(old).sequences, 12);
    // Somebody opens it: it is left alone.
    ck_assert_uint_eq(space("old"), old);
    ck_assert(kvd_pool_clear(f.pool, &c, 8));
    ck_assert_uint_eq(info_of(old).sequences, 12);
    kvd_pool_namespace_release(f.pool, old);
    for (; !kvd_pool_clear(f.pool, &c, 4); pieces++)
        ck_assert_uint_eq(info_of(old).sequences, 8 - 4 * pieces);
    ck_assert_uint_eq(pieces, 2);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "old"), KVD_POOL_NONE);
    ck_assert(!kvd_pool_namespace_clears(f.pool, 1, &c)); // now there is room
    // Layouts of a namespace that has its share of them, each with an evictable sequence or two.
    ns = space("x");
    for (uint32_t i = 0; !kvd_pool_layout_clears(f.pool, ns, &c); i++) {
        uint32_t layout;
        ck_assert_uint_lt(i, LAYOUTS);
        ck_assert_int_eq(kvd_pool_layout(f.pool, ns, &g, page_bytes, &layout, &recycled, &f.err),
                         0);
        for (uint32_t j = 0; j < 2; j++) {
            ck_assert_int_eq(kvd_pool_seq_new(f.pool, ns, layout, &seq, &f.err), 0);
            publish(seq, 100 + 2 * i + j);
        }
        kvd_pool_layout_unref(f.pool, layout);
        g.planes[0].sink += 16;
    }
    ck_assert(c.layout);
    ck_assert_uint_eq(kvd_pool_layout_refs(f.pool, c.index), 2);
    uint64_t before = info_of(ns).sequences;
    for (uint64_t had = before, has; !kvd_pool_clear(f.pool, &c, 1); had = has) {
        has = info_of(ns).sequences;
        ck_assert_uint_le(had - has, 1);
    }
    ck_assert_uint_eq(info_of(ns).sequences, before - 2);
    ck_assert_uint_eq(kvd_pool_layout_refs(f.pool, c.index), 0);
    ck_assert(!kvd_pool_layout_clears(f.pool, ns, &c));
    finish();
}
END_TEST

START_TEST(slabs_are_as_many_as_extents)
{
    setup(2);
    struct kvd_layout g = test_layout(1, 64, 512);
    uint32_t a = space("a"), page, layout;
    for (uint32_t i = 0; i < 1000; i++, g.planes[0].sink = (g.planes[0].sink + 16) % 4096) {
        ck_assert_int_eq(kvd_pool_layout(f.pool, a, &g, page_bytes, &layout, &recycled, &f.err), 0);
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            ck_assert_int_eq(kvd_pool_page_alloc(f.pool, a, layout, 0, k, &page, &f.err), 0);
            kvd_pool_page_unref(f.pool, page);
        }
        kvd_pool_layout_unref(f.pool, layout);
    }
    finish();
}
END_TEST

KVD_MAIN("pool_shares", 60, namespaces_go_when_they_are_empty, who_takes_the_slot_gets_no_old_data,
         idle_namespaces_make_room_for_others, sequences_are_shared, table_blocks_are_shared,
         layouts_are_shared, idle_ones_are_cleared_in_pieces, slabs_are_as_many_as_extents)
