// Pages: blocks under keys that are not chained.
#include "tests/unit/blocks_fixture.h"

enum { PAGES = 40 };

static void setup_pages(struct fixture *f, uint32_t extents)
{
    uint8_t names[PAGES][16] = {{0}};
    setup(f, extents);
    struct kvd_layout l = test_layout(1, 0, 0);
    ck_assert_int_eq(kvd_pool_layout(f->pool, f->ns, &l, one_plane, &f->layout, &recycled, &f->err),
                     0);
    f->space = space_of(f->ns, f->layout, "a space");
    for (uint32_t i = 0; i < PAGES; i++)
        names[i][0] = (uint8_t)(i + 1);
    ck_assert_int_eq(
        kvd_prefix_keys_of_pages(f->space.domain, names[0], 16, PAGES, f->keys, &f->err), 0);
}

// Puts pages [from, from + n) behind another one, or none (-1). How many were new.
static uint32_t put(struct fixture *f, uint32_t from, uint32_t n, int after)
{
    uint32_t stored;
    uint64_t seq = sequence_of(f, n * T);
    int rc = kvd_blocks_publish_pages(f->pool, &f->space, seq, 0, f->keys + from, n,
                                      after < 0 ? NULL : &f->keys[after], &stored, &f->err);
    ck_assert_msg(rc == 0, "%s", f->err.text);
    kvd_pool_seq_release(f->pool, seq);
    verify(f->pool);
    return stored;
}

static uint32_t there(struct fixture *f, uint32_t from, uint32_t n, uint32_t *entries)
{
    uint32_t found = 0;
    kvd_blocks_find_pages(f->pool, &f->space, true, f->keys + from, n, entries);
    for (uint32_t i = 0; i < n; i++)
        found += entries[i] != KVD_PREFIX_NONE;
    return found;
}

START_TEST(keys_do_not_depend_on_those_before_them)
{
    struct fixture f;
    struct kvd_prefix_key alone, chained;
    uint8_t name[16] = {3};
    setup_pages(&f, 4);
    ck_assert_int_eq(kvd_prefix_keys_of_pages(f.space.domain, name, 16, 1, &alone, &f.err), 0);
    ck_assert_int_eq(memcmp(&alone, &f.keys[2], sizeof(alone)), 0);
    // and are no prompt's.
    ck_assert_int_eq(kvd_prefix_keys_of_blocks(f.space.domain, NULL, name, 16, 1, &chained, &f.err),
                     0);
    ck_assert_int_ne(memcmp(&alone, &chained, sizeof(alone)), 0);
    ck_assert_int_eq(kvd_prefix_keys_of_pages(f.space.domain, name, 15, 1, &alone, &f.err),
                     KVD_E_INVALID);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(any_page_is_found_and_adopted_without_those_before_it)
{
    struct fixture f;
    uint32_t entries[PAGES], some[3];
    uint64_t seq, pages[8], all[16];
    struct kvd_pool_seq_info info;
    setup_pages(&f, 8);
    uint64_t first = sequence_of(&f, 8 * T);
    uint32_t stored;
    ck_assert_int_eq(
        kvd_blocks_publish_pages(f.pool, &f.space, first, 0, f.keys, 8, NULL, &stored, &f.err), 0);
    ck_assert_uint_eq(stored, 8);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, first, 0, KVD_POOL_CODEC, all, 16), 8);
    kvd_pool_seq_release(f.pool, first);
    verify(f.pool);
    ck_assert_uint_eq(there(&f, 0, PAGES, entries), 8);
    some[0] = entries[6];
    some[1] = entries[1];
    some[2] = entries[6];
    ck_assert_int_eq(kvd_blocks_adopt_pages(f.pool, &f.space, some, 3, &seq, &f.err), 0);
    verify(f.pool);
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, seq, &info), 0);
    ck_assert_uint_eq(info.length, 3 * T);
    ck_assert_uint_eq(info.reach[0].hist_end, 3 * T);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, seq, 0, KVD_POOL_BF16, pages, 8), 0);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, seq, 0, KVD_POOL_CODEC, pages, 8), 3);
    ck_assert(pages[0] == all[6] && pages[1] == all[1] && pages[2] == all[6]);
    // What is evicted stays in the sequence, and is free after it.
    struct kvd_pool_evicted sum;
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    ck_assert_uint_eq(there(&f, 0, PAGES, entries), 0);
    verify(f.pool);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, seq, 0, KVD_POOL_CODEC, pages, 8), 3);
    kvd_pool_seq_release(f.pool, seq);
    verify(f.pool);
    kvd_pool_free(&f.pool);
    ck_assert_uint_eq(f.mem.live, 0);
}
END_TEST

START_TEST(what_is_there_stays_as_it_is)
{
    struct fixture f;
    uint32_t entries[PAGES], again[PAGES];
    struct kvd_blocks_info info;
    setup_pages(&f, 8);
    ck_assert_uint_eq(put(&f, 2, 4, -1), 4);
    there(&f, 2, 4, entries);
    ck_assert_uint_eq(put(&f, 0, 8, -1), 4); // in the middle of others, under another parent
    there(&f, 2, 4, again);
    ck_assert_int_eq(memcmp(entries, again, 4 * sizeof(*again)), 0);
    kvd_blocks_info(f.pool, f.ns, &info);
    ck_assert_uint_eq(info.blocks, 8);
    ck_assert_uint_eq(info.bytes, 8 * (16 << 10)); // the other copies are free
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(a_hold_on_the_last_keeps_those_that_it_was_put_behind)
{
    struct fixture f;
    uint32_t entries[PAGES], held, n;
    struct kvd_pool_evicted sum;
    setup_pages(&f, 8);
    put(&f, 0, 4, -1);
    put(&f, 4, 4, 3);  // behind page 3
    put(&f, 8, 4, 30); // behind one that is not there: they begin a chain of their own
    put(&f, 20, 2, -1);
    ck_assert_uint_eq(there(&f, 0, 12, entries), 12);
    ck_assert_int_eq(kvd_blocks_hold_pages(f.pool, f.ns, entries, 12, 0, &held, &f.err), 0);
    ck_assert_uint_eq(held, 2);
    verify(f.pool);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    uint32_t now[PAGES];
    n = there(&f, 0, 12, now);
    ck_assert_uint_eq(n, 12);
    ck_assert_uint_eq(there(&f, 20, 2, now), 0);
    kvd_blocks_release_pages(f.pool, f.ns, entries, held);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    ck_assert_uint_eq(there(&f, 0, 12, now), 0);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

// A page that comes from elsewhere, behind another if that is there.
static int bring(struct fixture *f, uint32_t i, int after, uint32_t *entry)
{
    struct kvd_blocks_load load;
    int rc = kvd_blocks_new_pages(f->pool, &f->space, &f->keys[i], i, 1, &load, &f->err);
    ck_assert_int_eq(rc, 0);
    rc = kvd_blocks_bring_back_page(f->pool, &load, after < 0 ? NULL : &f->keys[after], entry,
                                    &f->err);
    if (rc)
        kvd_blocks_put_down(f->pool, &load);
    verify(f->pool);
    return rc;
}

// In whatever order; and none that was not named, nor what others are behind.
START_TEST(pages_that_are_named_go_and_no_others)
{
    struct fixture f;
    uint32_t entries[PAGES], some[8], n, held;
    setup_pages(&f, 8);
    put(&f, 0, 8, -1);
    put(&f, 8, 2, 3); // behind the fourth
    ck_assert_uint_eq(there(&f, 0, 10, entries), 10);
    const uint32_t named[] = {5, 7, 2, 6, 3, 4}; // not 0 and 1
    for (n = 0; n < KVD_LEN(named); n++)
        some[n] = entries[named[n]];
    uint32_t one[1] = {entries[6]};
    ck_assert_int_eq(kvd_blocks_hold_pages(f.pool, f.ns, one, 1, 0, &held, &f.err), 0);
    ck_assert_uint_eq(kvd_blocks_forget_pages(f.pool, f.ns, some, n, KVD_PREFIX_EXPIRED), 1);
    verify(f.pool);
    kvd_blocks_release_pages(f.pool, f.ns, one, held);
    for (n = 0; n < KVD_LEN(named) - 2; n++) // the eighth has gone
        some[n] = entries[(uint32_t[]){5, 2, 6, 3}[n]];
    some[n++] = entries[4];
    ck_assert_uint_eq(kvd_blocks_forget_pages(f.pool, f.ns, some, n, KVD_PREFIX_EXPIRED), 3);
    verify(f.pool);
    ck_assert_uint_eq(there(&f, 0, 10, entries), 6); // 0 to 3, and the two behind 3
    ck_assert_uint_eq(there(&f, 0, 4, entries), 4);
    some[0] = entries[0];
    ck_assert_uint_eq(kvd_blocks_forget_pages(f.pool, f.ns, some, 1, KVD_PREFIX_EXPIRED), 0);
    kvd_pool_free(&f.pool);
}
END_TEST

// As an operator says it, who knows a block's key and nothing else.
START_TEST(a_page_and_those_before_it_get_a_class_by_its_key)
{
    struct fixture f;
    setup_pages(&f, 8);
    put(&f, 0, 4, -1);
    put(&f, 4, 1, 1);
    ck_assert_int_eq(kvd_blocks_class(f.pool, f.ns, &f.keys[3]), KVD_PREFIX_NORMAL);
    ck_assert_uint_eq(kvd_blocks_classify_to(f.pool, f.ns, &f.keys[3], KVD_PREFIX_HIGH), 4);
    ck_assert_int_eq(kvd_blocks_class(f.pool, f.ns, &f.keys[0]), KVD_PREFIX_HIGH);
    ck_assert_int_eq(kvd_blocks_class(f.pool, f.ns, &f.keys[4]), KVD_PREFIX_NORMAL);
    // Two are another's too.
    ck_assert_uint_eq(kvd_blocks_classify_to(f.pool, f.ns, &f.keys[3], KVD_PREFIX_LOW), 2);
    ck_assert_int_eq(kvd_blocks_class(f.pool, f.ns, &f.keys[1]), KVD_PREFIX_HIGH);
    ck_assert_uint_eq(kvd_blocks_classify_to(f.pool, f.ns, &f.keys[9], KVD_PREFIX_LOW), 0);
    ck_assert_int_eq(kvd_blocks_class(f.pool, f.ns, &f.keys[9]), KVD_PREFIX_NORMAL);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(pages_come_back_each_for_itself)
{
    struct fixture f;
    uint32_t entry[5], now[PAGES];
    uint8_t planes[4];
    struct kvd_pool_evicted sum;
    struct kvd_blocks_info info;
    setup_pages(&f, 8);
    ck_assert_int_eq(bring(&f, 2, 1, &entry[0]), 0); // behind one that is not there
    ck_assert_int_eq(bring(&f, 3, 2, &entry[1]), 0);
    ck_assert_int_eq(bring(&f, 0, -1, &entry[2]), 0);
    ck_assert_int_eq(bring(&f, 3, 0, &entry[3]), 0); // it is there already, behind another
    ck_assert_uint_eq(entry[3], entry[1]);
    kvd_blocks_page_planes(f.pool, &f.space, f.keys, 4, planes);
    ck_assert(planes[0] == 1 && planes[1] == 0 && planes[2] == 1 && planes[3] == 1);
    kvd_blocks_info(f.pool, f.ns, &info);
    ck_assert_uint_eq(info.bytes, 3 * (16 << 10));     // the second copy is free
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum); // all are held
    ck_assert_uint_eq(there(&f, 0, 4, now), 3);
    kvd_blocks_release_pages(f.pool, f.ns, entry, 4);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    ck_assert_uint_eq(there(&f, 0, 4, now), 0);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(what_cannot_be_published_is_refused)
{
    struct fixture f;
    uint32_t stored;
    setup_pages(&f, 8);
    uint64_t seq = sequence_of(&f, 2 * T + 5);
    ck_assert_int_eq(
        kvd_blocks_publish_pages(f.pool, &f.space, seq, 0, f.keys, 3, NULL, &stored, &f.err),
        KVD_E_PRECONDITION);
    struct kvd_blocks_space other = f.space;
    other.layout ^= 1;
    ck_assert_int_eq(
        kvd_blocks_publish_pages(f.pool, &other, seq, 0, f.keys, 2, NULL, &stored, &f.err),
        KVD_E_PRECONDITION);
    kvd_pool_seq_release(f.pool, seq);
    ck_assert_int_eq(
        kvd_blocks_publish_pages(f.pool, &f.space, seq, 0, f.keys, 2, NULL, &stored, &f.err),
        KVD_E_NOT_FOUND);
    struct kvd_layout l = test_layout(1, 64, 256);
    ck_assert_int_eq(kvd_pool_layout(f.pool, f.ns, &l, one_plane, &f.layout, &recycled, &f.err), 0);
    f.space.layout = f.layout;
    seq = sequence_of(&f, 1000);
    ck_assert_int_eq(
        kvd_blocks_publish_pages(f.pool, &f.space, seq, 0, f.keys, 2, NULL, &stored, &f.err),
        KVD_E_UNSUPPORTED);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

KVD_MAIN("flat", 60, keys_do_not_depend_on_those_before_them,
         any_page_is_found_and_adopted_without_those_before_it, what_is_there_stays_as_it_is,
         a_hold_on_the_last_keeps_those_that_it_was_put_behind,
         pages_that_are_named_go_and_no_others, a_page_and_those_before_it_get_a_class_by_its_key,
         pages_come_back_each_for_itself, what_cannot_be_published_is_refused)
