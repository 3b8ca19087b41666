// Blocks on their way to other places, and back.
#include "tests/unit/lasting_fixture.h"
#include "tests/unit/random.h"

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
    kvd_blocks_note_new(f.pool); // what is there is new too
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 1);
    ck_assert_int_eq(grow(f.pool, seq, 700, &f.err), 0);
    ck_assert_uint_eq(publish(&f, seq, 40, true).sealed, 11);
    publish(&f, seq, 40, false); // again: no news
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 5, &ns), 11);
    ck_assert_uint_eq(ns, f.ns);
    // One that goes before its turn comes is passed over, and its entry may be another's.
    uint64_t gone = sequence_of(&f, 400);
    struct kvd_prefix_key last = f.keys[39];
    struct kvd_blocks_space space = f.space;
    struct kvd_blocks_published out;
    ck_assert_int_eq(kvd_blocks_publish(f.pool, &space, gone, &last, 1, false, &out, &f.err), 0);
    kvd_pool_seq_release(f.pool, gone);
    ck_assert_uint_eq(kvd_blocks_drop(f.pool, &space, &last, 1, 0, KVD_PREFIX_DROPPED), 1);
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 12);
    for (uint32_t i = 0; i < 11; i++) {
        ck_assert(kvd_blocks_pick_up(f.pool, f.ns, &load[i]));
        ck_assert_mem_eq(&load[i].key, &f.keys[i], sizeof(f.keys[i]));
        ck_assert_mem_eq(load[i].space.domain, f.space.domain, sizeof(f.space.domain));
        ck_assert_uint_eq(load[i].plane[0].bytes, i ? 16 << 10 : 128 << 10);
        ck_assert_uint_eq(load[i].plane[1].page, KVD_POOL_NONE);
    }
    ck_assert(!kvd_blocks_pick_up(f.pool, f.ns, &none));
    kvd_blocks_new_again(f.pool, &load[3]);
    ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), 1);
    // Pages stay as long as they are carried, whatever is evicted.
    kvd_pool_seq_release(f.pool, seq);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.used, (128 << 10) + 10 * (16 << 10));
    kvd_blocks_new_again(f.pool, &load[4]); // gone
    for (uint32_t i = 0; i < 11; i++)
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

// -- blocks of an earlier process ---------------------------------------------------------------

// A pool with blocks that nobody has but the index: of one plane, and of two with a window.
static void setup_lasting(struct fixture *f, struct kvd_blocks_space spaces[2])
{
    struct kvd_pool_mem_ops ops = lasting_ops(&f->mem);
    struct kvd_layout l = test_layout(1, 64, 256), w = windowed_layout();
    uint32_t layouts[2];
    *f = (struct fixture){0};
    f->pool = kvd_pool_new(&lasting, &ops, NULL);
    ck_assert_int_eq(kvd_pool_namespace(f->pool, "n0", &f->ns, &f->err), 0);
    ck_assert_int_eq(
        kvd_pool_layout(f->pool, f->ns, &l, one_plane, &layouts[0], &recycled, &f->err), 0);
    ck_assert_int_eq(
        kvd_pool_layout(f->pool, f->ns, &w, two_planes, &layouts[1], &recycled, &f->err), 0);
    for (uint32_t i = 0; i < 2; i++) {
        f->layout = layouts[i];
        f->space = spaces[i] = space_of(f->ns, f->layout, "");
        keys_of(&f->space, (const uint8_t[40]){1, 2, 3, 4}, 40, f->keys);
        uint64_t seq = sequence_of(f, 320);
        publish(f, seq, 40, i == 0);
        for (uint32_t n = 0; n < 10; n++) { // a window never has all that it will have had
            ck_assert_int_eq(grow(f->pool, seq, 64, &f->err), 0);
            publish(f, seq, 40, false);
        }
        kvd_pool_seq_release(f->pool, seq);
    }
}

// The next process.
static void reopen(struct fixture *f)
{
    struct kvd_pool_mem_ops ops = lasting_ops(&f->mem);
    int fd = dup(kvd_pool_fd(f->pool));
    kvd_pool_leave(&f->pool);
    f->pool = kvd_pool_open(fd, &lasting, &ops, &f->err);
    ck_assert_msg(f->pool != NULL, "%s", f->err.text);
    close(fd);
    verify(f->pool);
}

static uint32_t known(struct fixture *f, const struct kvd_blocks_space *space)
{
    keys_of(space, (const uint8_t[40]){1, 2, 3, 4}, 40, f->keys);
    f->space = *space;
    struct kvd_blocks_match m = match(f, 40);
    uint64_t child;
    if (m.at.blocks) {
        ck_assert_int_eq(kvd_blocks_adopt(f->pool, &m.at, m.at.blocks, &child, &f->err), 0);
        ck_assert_int_eq(grow(f->pool, child, 100, &f->err), 0);
        verify(f->pool);
        kvd_pool_seq_release(f->pool, child);
    }
    return m.at.blocks;
}

START_TEST(blocks_outlive_the_process)
{
    struct fixture f;
    struct kvd_blocks_space spaces[2];
    struct kvd_blocks_info before, after;
    struct kvd_pool_evicted sum;
    struct kvd_pool_info info;
    uint32_t ns;
    setup_lasting(&f, spaces);
    kvd_blocks_info(f.pool, f.ns, &before);
    uint32_t want[2] = {known(&f, &spaces[0]), known(&f, &spaces[1])};
    ck_assert_uint_eq(before.blocks, want[0] + want[1]);
    ck_assert_uint_gt(KVD_MIN(want[0], want[1]), 9);
    for (uint32_t times = 0; times < 2; times++) {
        reopen(&f);
        kvd_blocks_info(f.pool, f.ns, &after);
        ck_assert_uint_eq(after.blocks, before.blocks);
        ck_assert_uint_eq(after.bytes, before.bytes);
        ck_assert_uint_eq(after.ends, 0); // they go with the process
        ck_assert_uint_eq(known(&f, &spaces[0]), want[0]);
        ck_assert_uint_eq(known(&f, &spaces[1]), want[1]);
        kvd_blocks_note_new(f.pool); // all of them: nobody knows which tiers have
        ck_assert_uint_eq(kvd_blocks_new(f.pool, 0, &ns), before.blocks);
    }
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    verify(f.pool);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.used, 0);
    ck_assert_int_eq(index_fd[f.ns], -1); // the namespace went with it
    kvd_pool_free(&f.pool);
}
END_TEST

// Writes a byte of an index as a damaged memory would have it.
static void spoil(int fd, uint64_t at, uint8_t with)
{
    uint8_t byte;
    ck_assert_int_eq(pread(fd, &byte, 1, (off_t)at), 1);
    byte ^= with;
    ck_assert_int_eq(pwrite(fd, &byte, 1, (off_t)at), 1);
}

START_TEST(a_damaged_index_is_dropped_or_harmless)
{
    struct fixture f;
    struct kvd_blocks_space spaces[2];
    struct kvd_pool_info info;
    uint64_t rng = 7;
    uint32_t dropped = 0;
    for (uint32_t times = 0; times < 300; times++) {
        setup_lasting(&f, spaces);
        struct stat st;
        ck_assert_int_eq(fstat(index_fd[f.ns], &st), 0);
        for (uint32_t i = 0; i < 1 + times % 3; i++) {
            uint64_t at = kvd_rand(&rng) % (uint64_t)st.st_size;
            if (times % 4) // where there is something
                at = times % 4 == 1 ? 4096 + kvd_rand(&rng) % 8192 : kvd_rand(&rng) % 200;
            if (times % 4 == 3)
                at = (uint64_t)lseek(index_fd[f.ns], 4096 + 8192 + (off_t)(kvd_rand(&rng) % 65536),
                                     SEEK_DATA);
            spoil(index_fd[f.ns], at, (uint8_t)(1u << kvd_rand(&rng) % 8));
        }
        reopen(&f); // and verifies
        kvd_pool_info(f.pool, &info);
        dropped += info.used == 0;
        if (info.used) {
            known(&f, &spaces[0]);
            known(&f, &spaces[1]);
        }
        kvd_pool_free(&f.pool);
        if (index_fd[f.ns] >= 0)
            index_kept(NULL, f.ns, -1);
    }
    printf("%u of 300 dropped\n", dropped);
    ck_assert_uint_gt(dropped, 30);
    ck_assert_uint_lt(dropped, 300);
}
END_TEST

// -- killed anywhere ----------------------------------------------------------------------------

void (*kvd_pool_kill_point)(void);

enum { PROMPTS = 6, LOOKS_AT_ONE_OF = 7, MOST_EVICTED = 4 };

// What the index had before the operation that is under way.
struct had {
    struct kvd_prefix_key key;
    uint32_t value;
};
static struct {
    struct fixture *f;
    struct had had[512];
    uint32_t n, points, looks;
    bool publishes; // so that there may be others
} at;

static bool take_had(void *ctx, const struct kvd_prefix_entry_info *e, uint32_t layout,
                     uint32_t entry, bool end)
{
    (void)ctx;
    (void)layout;
    (void)entry;
    (void)end;
    ck_assert_uint_lt(at.n, KVD_LEN(at.had));
    at.had[at.n++] = (struct had){e->key, e->value};
    return true;
}

// Each block is one that was there, with the same page or none any more, or is being published.
static bool check_had(void *ctx, const struct kvd_prefix_entry_info *e, uint32_t layout,
                      uint32_t entry, bool end)
{
    (void)ctx;
    (void)layout;
    (void)entry;
    ck_assert(!end);
    for (uint32_t i = 0; i < at.n; i++)
        if (!memcmp(&at.had[i].key, &e->key, sizeof(e->key)) &&
            (e->value == at.had[i].value || e->value == KVD_POOL_NONE))
            return true;
    ck_assert(at.publishes);
    return true;
}

// It was not dropped.
static void check_opened(struct kvd_pool *opened)
{
    struct kvd_blocks_info info;
    kvd_blocks_each(opened, 0, 0, UINT32_MAX, check_had, NULL);
    kvd_blocks_info(opened, 0, &info);
    ck_assert_uint_ge(info.blocks + MOST_EVICTED, at.n);
}

static void look(void)
{
    if (at.points++ % LOOKS_AT_ONE_OF)
        return;
    look_at_copy(at.f->pool, check_opened);
    at.looks++;
}

static void operate(struct fixture *f, uint64_t *rng)
{
    struct kvd_pool_evicted sum;
    struct kvd_blocks_match m;
    uint64_t seq;
    uint8_t labels[40] = {(uint8_t)(kvd_rand(rng) >> 40) % PROMPTS + 1, 2, 3, 4};
    keys_of(&f->space, labels, 40, f->keys);
    m = match(f, 40);
    at.publishes = kvd_rand(rng) >> 63;
    if (at.publishes) {
        seq = sequence_of(f, 400);
        publish(f, seq, 40, kvd_rand(rng) >> 63);
        ck_assert_int_eq(grow(f->pool, seq, 100 + (uint32_t)(kvd_rand(rng) >> 56), &f->err), 0);
        publish(f, seq, 40, false);
        kvd_pool_seq_release(f->pool, seq);
    } else if (m.at.blocks && kvd_rand(rng) >> 63) {
        ck_assert_int_eq(kvd_blocks_adopt(f->pool, &m.at, m.at.blocks, &seq, &f->err), 0);
        ck_assert_int_eq(grow(f->pool, seq, 200, &f->err), 0);
        kvd_pool_seq_release(f->pool, seq);
    } else {
        kvd_pool_evict(f->pool, f->ns, 0, 1 + (uint32_t)(kvd_rand(rng) >> 62) % MOST_EVICTED, &sum);
    }
}

START_TEST(killed_anywhere_an_index_names_only_its_pages)
{
    struct fixture f;
    struct kvd_blocks_space spaces[2];
    uint64_t rng = kvd_test_seed("killed_anywhere");
    setup_lasting(&f, spaces);
    f.space = spaces[0];
    f.layout = spaces[0].layout;
    at.f = &f;
    for (uint32_t i = 0; i < 60; i++) {
        at.n = 0;
        kvd_blocks_each(f.pool, f.ns, 0, UINT32_MAX, take_had, NULL);
        kvd_pool_kill_point = look;
        operate(&f, &rng);
        kvd_pool_kill_point = NULL;
        verify(f.pool);
    }
    printf("%u points, %u of them opened\n", at.points, at.looks);
    ck_assert_uint_gt(at.looks, 100);
    kvd_pool_free(&f.pool);
}
END_TEST

KVD_MAIN("carry", 60, killed_anywhere_an_index_names_only_its_pages, blocks_outlive_the_process,
         a_damaged_index_is_dropped_or_harmless, a_namespace_is_cleared_in_pieces,
         new_blocks_are_carried_away_and_brought_back, blocks_come_back_to_planes_with_windows)
