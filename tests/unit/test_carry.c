// Blocks on their way to other places, and back.
#include "tests/unit/blocks_fixture.h"

START_TEST(new_blocks_are_carried_away_and_brought_back)
{
    struct fixture f;
    struct kvd_blocks_load load[11], none;
    struct kvd_blocks_at at;
    struct kvd_pool_evicted sum;
    struct kvd_pool_info info;
    uint8_t planes[20];
    uint32_t ns;
    setup(&f, 8);
    uint64_t seq = sequence_of(&f, 300), child;
    publish(&f, seq, 40, false);
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 0); // nobody wants to know
    ck_assert_uint_eq(ns, KVD_POOL_NONE);
    kvd_blocks_note_new(f.pool);
    ck_assert_int_eq(grow(f.pool, seq, 700, &f.err), 0);
    ck_assert_uint_eq(publish(&f, seq, 40, true).sealed, 11);
    publish(&f, seq, 40, false); // again: no news
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 5, &ns), 10);
    ck_assert_uint_eq(ns, f.ns);
    // One that goes before its turn comes is passed over, and its entry may be another's.
    uint64_t gone = sequence_of(&f, 400);
    struct kvd_prefix_key last = f.keys[39];
    struct kvd_blocks_space space = f.space;
    struct kvd_blocks_published out;
    ck_assert_int_eq(kvd_blocks_publish(f.pool, &space, gone, &last, 1, false, &out, &f.err), 0);
    kvd_pool_seq_release(f.pool, gone);
    ck_assert_uint_eq(kvd_blocks_drop(f.pool, &space, &last, 1, 0, KVD_PREFIX_DROPPED), 1);
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 11);
    for (uint32_t i = 1; i < 11; i++) {
        ck_assert(kvd_blocks_pick_up(f.pool, f.ns, &load[i]));
        ck_assert_mem_eq(&load[i].key, &f.keys[i], sizeof(f.keys[i]));
        ck_assert_mem_eq(load[i].space.domain, f.space.domain, sizeof(f.space.domain));
        ck_assert_uint_eq(load[i].plane[0].bytes, 16 << 10);
        ck_assert_uint_eq(load[i].plane[1].page, KVD_POOL_NONE);
    }
    ck_assert(!kvd_blocks_pick_up(f.pool, f.ns, &none));
    kvd_blocks_new_again(f.pool, &load[3]);
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 1);
    // Pages stay as long as they are carried, whatever is evicted.
    kvd_pool_seq_release(f.pool, seq);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.used, 10 * (16 << 10));
    kvd_blocks_new_again(f.pool, &load[4]); // gone
    for (uint32_t i = 1; i < 11; i++)
        kvd_blocks_put_down(f.pool, &load[i]);
    verify(f.pool);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.used, 0);
    ck_assert(!kvd_blocks_pick_up(f.pool, f.ns, &none));
    // Back: the first block is one of the sink, the others of history.
    ck_assert_int_eq(kvd_blocks_behind(f.pool, &f.space, f.keys, 0, &at, &f.err), 0);
    for (uint32_t i = 0; i < 6; i++) {
        ck_assert_int_eq(kvd_blocks_new_pages(f.pool, &f.space, &f.keys[i], i, 1, &load[i], &f.err),
                         0);
        ck_assert_uint_eq(load[i].plane[0].bytes, i ? 16 << 10 : 128 << 10);
        ck_assert_int_eq(kvd_blocks_bring_back(f.pool, &load[i], &at, &f.err), 0);
        verify(f.pool);
    }
    ck_assert_uint_eq(at.blocks, 6);
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 0);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    ck_assert_uint_eq(sum.blocks, 0); // the last is held
    kvd_blocks_planes(f.pool, &f.space, f.keys, 20, planes);
    for (uint32_t i = 0; i < 20; i++)
        ck_assert_uint_eq(planes[i], i < 6);
    struct kvd_blocks_match m = match(&f, 40);
    ck_assert_uint_eq(m.at.blocks, 6);
    ck_assert_int_eq(kvd_blocks_adopt(f.pool, &m.at, 6, &child, &f.err), 0);
    kvd_blocks_release(f.pool, &at);
    verify(f.pool);
    // What somebody published meanwhile keeps its own pages.
    ck_assert_int_eq(kvd_blocks_behind(f.pool, &f.space, f.keys, 3, &at, &f.err), 0);
    kvd_pool_info(f.pool, &info);
    uint64_t used = info.used;
    ck_assert_int_eq(kvd_blocks_new_pages(f.pool, &f.space, &f.keys[3], 3, 1, &load[3], &f.err), 0);
    ck_assert_int_eq(kvd_blocks_bring_back(f.pool, &load[3], &at, &f.err), 0);
    kvd_blocks_release(f.pool, &at);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.used, used);
    // Behind what is not there nothing comes.
    ck_assert_int_eq(kvd_blocks_behind(f.pool, &f.space, f.keys, 9, &at, &f.err), KVD_E_NOT_FOUND);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(blocks_come_back_to_planes_with_windows)
{
    struct fixture f;
    struct kvd_blocks_load load;
    struct kvd_blocks_at at;
    struct kvd_pool_evicted sum;
    uint64_t seq;
    setup(&f, 16);
    struct kvd_layout l = windowed_layout();
    uint32_t layout;
    uint8_t planes[8];
    ck_assert_int_eq(kvd_pool_layout(f.pool, f.ns, &l, two_planes, &layout, &recycled, &f.err), 0);
    f.space = space_of(f.ns, layout, "");
    keys_of(&f.space, (const uint8_t[8]){1, 2, 3, 4, 5, 6, 7, 8}, 8, f.keys);
    kvd_blocks_note_new(f.pool);
    ck_assert_int_eq(kvd_pool_seq_new(f.pool, f.ns, layout, &seq, &f.err), 0);
    ck_assert_int_eq(grow(f.pool, seq, 640, &f.err), 0);
    ck_assert_uint_eq(publish(&f, seq, 8, false).blocks, 8);
    uint8_t had[8] = {0};
    for (uint32_t i = 0; i < 8; i++) {
        ck_assert(kvd_blocks_pick_up(f.pool, f.ns, &load));
        for (uint32_t p = 0; p < 2; p++)
            had[i] |= (uint8_t)((load.plane[p].page != KVD_POOL_NONE) << p);
        kvd_blocks_put_down(f.pool, &load);
    }
    kvd_blocks_planes(f.pool, &f.space, f.keys, 8, planes);
    ck_assert_mem_eq(planes, had, 8);
    ck_assert_uint_eq(had[0], 1); // behind the window
    ck_assert_uint_eq(had[7], 3);
    kvd_pool_seq_release(f.pool, seq);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    // For a cut after five blocks the plane with the window wants what its last tokens see.
    uint32_t first = kvd_blocks_first_seen(&l.planes[1], 5);
    ck_assert_uint_eq(first, 3);
    ck_assert_int_eq(kvd_blocks_behind(f.pool, &f.space, f.keys, 0, &at, &f.err), 0);
    for (uint32_t i = 0; i < 5; i++) {
        uint8_t want = i < first ? 1 : 3;
        ck_assert_int_eq(kvd_blocks_new_pages(f.pool, &f.space, &f.keys[i], i, want, &load, &f.err),
                         0);
        ck_assert_int_eq(kvd_blocks_bring_back(f.pool, &load, &at, &f.err), 0);
        verify(f.pool);
        ck_assert_uint_eq(match(&f, 8).known, i + 1);
    }
    struct kvd_blocks_match m = match(&f, 8);
    ck_assert_uint_eq(m.at.blocks, 5);
    ck_assert_int_eq(kvd_blocks_adopt(f.pool, &m.at, 5, &seq, &f.err), 0);
    kvd_blocks_release(f.pool, &at);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(a_namespace_is_cleared_in_pieces)
{
    struct fixture f;
    struct kvd_prefix_cursor at = {0};
    struct kvd_blocks_match m;
    uint64_t gone = 0;
    uint32_t pieces = 0;
    setup(&f, 8);
    uint64_t seq = sequence_of(&f, 1000);
    publish(&f, seq, 40, true);
    kvd_pool_seq_release(f.pool, seq);
    m = match(&f, 3);
    ck_assert_int_eq(kvd_blocks_hold(f.pool, &m.at, &f.err), 0);
    for (bool all = false; !all; pieces++) {
        all = kvd_blocks_clear(f.pool, f.ns, &at, 2, &gone);
        verify(f.pool);
        ck_assert_uint_le(gone, 2 * (pieces + 1));
    }
    ck_assert_uint_eq(gone, 12); // what is before what is held stays
    ck_assert_uint_ge(pieces, 6);
    ck_assert_uint_eq(match(&f, 40).known, 3);
    kvd_blocks_release(f.pool, &m.at);
    at = (struct kvd_prefix_cursor){0};
    for (pieces = 0; !kvd_blocks_clear(f.pool, f.ns, &at, 2, &gone); pieces++)
        verify(f.pool);
    ck_assert_uint_eq(gone, 15);
    ck_assert_uint_eq(match(&f, 40).known, 0);
    ck_assert(kvd_blocks_clear(f.pool, f.ns, &at, 2, &gone));
    kvd_pool_free(&f.pool);
}
END_TEST

KVD_MAIN("carry", 60, a_namespace_is_cleared_in_pieces,
         new_blocks_are_carried_away_and_brought_back, blocks_come_back_to_planes_with_windows)
