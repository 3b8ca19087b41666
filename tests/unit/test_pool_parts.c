// Parts of pages: what short sequences take, who shares a page, growing, and what is refused.
#include "tests/unit/suite.h"

#include <errno.h>

#include "pool/internal.h"
#include "tests/unit/pool_fixture.h"

enum { PAGE = 128 << 10, ROW = 2 * 64, SINK = 64, RECENT = 256, LAST = 400 };

static struct test_mem memory;

struct fixture {
    struct kvd_pool *pool;
    struct kvd_error err;
    uint32_t ns, layout;
};

static struct fixture setup(uint32_t extents, struct kvd_layout shape, uint64_t bytes)
{
    struct fixture f = {0};
    const uint64_t page_bytes[1][KVD_POOL_KINDS] = {{bytes, 16 << 10}};
    memory = (struct test_mem){0};
    f.pool = test_pool(&memory, extents, 256);
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "a", &f.ns, &f.err), 0);
    ck_assert_int_eq(
        kvd_pool_layout(f.pool, f.ns, &shape, page_bytes, &f.layout, &recycled, &f.err), 0);
    return f;
}

static struct fixture usual(uint32_t extents)
{
    return setup(extents, test_layout(1, SINK, RECENT), PAGE);
}

static uint64_t new_seq(struct fixture *f)
{
    uint64_t id = 0;
    ck_assert_int_eq(kvd_pool_seq_new(f->pool, f->ns, f->layout, &id, &f->err), 0);
    return id;
}

static struct kvd_pool_seq_info info_of(struct fixture *f, uint64_t seq)
{
    struct kvd_pool_seq_info info;
    ck_assert_int_eq(kvd_pool_seq_info(f->pool, seq, &info), 0);
    return info;
}

static int begin(struct fixture *f, uint64_t seq, uint32_t n, struct kvd_pool_append *a)
{
    struct kvd_pool_append_request by = {
        .seq = seq, .position = info_of(f, seq).length, .tokens = n, .layer_count = 1};
    return kvd_pool_append_begin(f->pool, &by, a, &f->err);
}

static void append(struct fixture *f, uint64_t seq, uint32_t n)
{
    struct kvd_pool_append a;
    ck_assert_msg(begin(f, seq, n, &a) == 0, "%s", f->err.text);
    kvd_pool_append_commit(f->pool, &a);
}

static void verify(struct fixture *f)
{
    ck_assert_msg(kvd_pool_verify(f->pool, &f->err) == 0, "%s", f->err.text);
}

static uint64_t used(const struct fixture *f)
{
    struct kvd_pool_info info;
    kvd_pool_info(f->pool, &info);
    return info.used;
}

static void finish(struct fixture *f)
{
    verify(f);
    kvd_pool_free(&f->pool);
    ck_assert_uint_eq(memory.live, 0);
}

// Rows of bf16 that a sequence takes whose ring has not been full yet.
static uint32_t rows_for(uint32_t length)
{
    uint32_t end = length % 64;
    return length - end + (end == 0 ? 0 : end <= 16 ? 16 : end <= 32 ? 32 : 64);
}

START_TEST(what_short_sequences_take)
{
    static const uint32_t known[][2] = {{1, 16},    {16, 16},   {17, 32},  {25, 32},  {33, 64},
                                        {64, 64},   {65, 80},   {81, 96},  {97, 128}, {100, 128},
                                        {129, 144}, {200, 208}, {320, 320}};
    struct fixture f = usual(16);
    uint64_t grown = new_seq(&f);
    for (uint32_t i = 0; i < KVD_LEN(known); i++)
        ck_assert_uint_eq(rows_for(known[i][0]), known[i][1]);
    for (uint32_t n = 1; n <= SINK + RECENT; n++) {
        uint64_t whole = new_seq(&f);
        append(&f, grown, 1);
        append(&f, whole, n);
        ck_assert_uint_eq(info_of(&f, whole).bytes, (uint64_t)rows_for(n) * (PAGE / 64));
        ck_assert_uint_eq(info_of(&f, grown).bytes, info_of(&f, whole).bytes);
        ck_assert_uint_eq(used(&f), 2 * info_of(&f, whole).bytes);
        verify(&f);
        kvd_pool_seq_release(f.pool, whole);
    }
    for (uint32_t n = SINK + RECENT; n < LAST; n++) // its ring goes round, in whole pages
        append(&f, grown, 1);
    struct kvd_pool_seq_info info = info_of(&f, grown);
    ck_assert_uint_eq(info.pages[0][KVD_POOL_BF16], 6);
    ck_assert_uint_eq(info.bytes, 6 * PAGE + info.pages[0][KVD_POOL_CODEC] * (16 << 10));
    verify(&f);
    kvd_pool_seq_release(f.pool, grown);
    ck_assert_uint_eq(used(&f), 0);
    finish(&f);
}
END_TEST

static uint64_t only_page(struct fixture *f, uint64_t seq)
{
    uint64_t at;
    ck_assert_uint_eq(kvd_pool_seq_pages(f->pool, seq, 0, KVD_POOL_BF16, &at, 1), 1);
    return at;
}

START_TEST(four_share_a_page)
{
    struct fixture f = usual(2);
    uint64_t seq[6], first = UINT64_MAX, rows = 0;
    for (int i = 0; i < 4; i++) {
        seq[i] = new_seq(&f);
        append(&f, seq[i], 10 + (uint32_t)i);
        first = KVD_MIN(first, only_page(&f, seq[i]));
    }
    for (int i = 0; i < 4; i++)
        rows |= 1ull << (only_page(&f, seq[i]) - first) / ROW;
    ck_assert_uint_eq(rows, 1ull << 0 | 1ull << 16 | 1ull << 32 | 1ull << 48);
    ck_assert_uint_eq(used(&f), PAGE);
    // Two of them grow to a half each, of another page, and leave two quarters for whoever comes.
    append(&f, seq[0], 15);
    append(&f, seq[1], 15);
    ck_assert_uint_eq(only_page(&f, seq[1]) ^ only_page(&f, seq[0]), 32 * ROW);
    ck_assert_uint_eq(used(&f), 3 * PAGE / 2);
    verify(&f);
    for (int i = 4; i < 6; i++) {
        seq[i] = new_seq(&f);
        append(&f, seq[i], 3);
        ck_assert_uint_lt(only_page(&f, seq[i]) - first, PAGE);
    }
    ck_assert_uint_eq(used(&f), 2 * PAGE);
    for (int i = 0; i < 6; i++) {
        kvd_pool_seq_release(f.pool, seq[i]);
        verify(&f);
    }
    struct kvd_pool_info info;
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.extents_granted, 0); // what was cut up is whole again
    finish(&f);
}
END_TEST

START_TEST(parts_are_taken_and_given_at_random)
{
    struct fixture f = usual(4);
    uint64_t rng = kvd_test_seed("parts"), seq[64] = {0};
    uint32_t full = 0;
    for (int i = 0; i < 20000; i++) {
        uint64_t *s = &seq[kvd_rand(&rng) % KVD_LEN(seq)];
        struct kvd_pool_append a;
        if (*s && kvd_rand(&rng) % 3 == 0) {
            kvd_pool_seq_release(f.pool, *s);
            *s = 0;
        } else {
            *s = *s ? *s : new_seq(&f);
            if (info_of(&f, *s).length > SINK + RECENT)
                continue;
            int rc = begin(&f, *s, 1 + (uint32_t)(kvd_rand(&rng) % 40), &a);
            ck_assert(rc == 0 || rc == KVD_E_FULL);
            full += rc != 0;
            if (rc == 0 && kvd_rand(&rng) % 8 == 0)
                kvd_pool_append_abort(f.pool, &a);
            else if (rc == 0)
                kvd_pool_append_commit(f.pool, &a);
        }
        if (i % 7 == 0)
            verify(&f);
        if (i % 1000 == 0)
            ck_assert_int_eq(kvd_pool_rebuild(f.pool, &f.err), 0);
    }
    ck_assert_uint_gt(full, 0);
    for (uint32_t i = 0; i < KVD_LEN(seq); i++)
        if (seq[i])
            kvd_pool_seq_release(f.pool, seq[i]);
    ck_assert_uint_eq(used(&f), 0);
    finish(&f);
}
END_TEST

START_TEST(an_outgrown_part_is_copied)
{
    struct fixture f = usual(2);
    struct kvd_pool_append a;
    uint64_t s = new_seq(&f);
    append(&f, s, 16);
    uint64_t before = only_page(&f, s);
    ck_assert_int_eq(begin(&f, s, 1, &a), 0);
    ck_assert_uint_eq(a.n_changes, 1);
    ck_assert_uint_eq(kvd_pool_page_rows(f.pool, a.changes[0].old_page), 16);
    ck_assert_uint_eq(kvd_pool_page_rows(f.pool, a.changes[0].new_page), 32);
    kvd_pool_append_abort(f.pool, &a);
    ck_assert_uint_eq(only_page(&f, s), before);
    ck_assert_uint_eq(used(&f), PAGE / 4);
    verify(&f);
    // What a fork writes into a part that is shared is a copy of that size.
    uint64_t child;
    ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 12, &f.err), 0);
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, s, &child, &f.err), 0);
    ck_assert_uint_eq(used(&f), PAGE / 4);
    ck_assert_int_eq(begin(&f, child, 4, &a), 0);
    ck_assert_uint_eq(kvd_pool_page_rows(f.pool, a.changes[0].new_page), 16);
    kvd_pool_append_commit(f.pool, &a);
    ck_assert_uint_eq(used(&f), PAGE / 2);
    ck_assert_uint_eq(only_page(&f, s), before);
    verify(&f);
    // What has rows of a page that is no longer short keeps it, however short it is made.
    append(&f, child, 30);
    ck_assert_int_eq(kvd_pool_truncate(f.pool, child, 3, &f.err), 0);
    append(&f, child, 1);
    ck_assert_uint_eq(info_of(&f, child).bytes, PAGE);
    finish(&f);
}
END_TEST

START_TEST(a_quota_counts_parts)
{
    struct fixture f = usual(2);
    struct kvd_pool_append a;
    kvd_pool_set_quota(f.pool, f.ns, PAGE);
    for (int i = 0; i < 4; i++)
        append(&f, new_seq(&f), 16);
    ck_assert_int_eq(begin(&f, new_seq(&f), 1, &a), KVD_E_QUOTA);
    kvd_pool_set_quota(f.pool, f.ns, PAGE + PAGE / 4);
    append(&f, new_seq(&f), 16);
    finish(&f);
}
END_TEST

START_TEST(whoever_is_mapped_has_whole_pages)
{
    struct fixture f = usual(2);
    struct kvd_pool_append a;
    uint64_t s = new_seq(&f), child;
    append(&f, s, 70); // a page of the sink, and a part of one of the ring
    ck_assert_int_eq(kvd_pool_settle_begin(f.pool, 77, &a, &f.err), KVD_E_NOT_FOUND);
    ck_assert(kvd_pool_seq_settle(f.pool, 77)); // there is none, and so no part
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, s, &child, &f.err), 0);
    ck_assert(!kvd_pool_seq_settle(f.pool, s));
    ck_assert_int_eq(kvd_pool_settle_begin(f.pool, s, &a, &f.err), 0);
    ck_assert_uint_eq(a.n_changes, 1);
    ck_assert(!kvd_pool_seq_settle(f.pool, s)); // an abort would bring it back
    kvd_pool_settle_commit(f.pool, &a);
    ck_assert(kvd_pool_seq_settle(f.pool, s));
    ck_assert_uint_eq(info_of(&f, s).bytes, 2 * PAGE);
    ck_assert_uint_eq(info_of(&f, child).bytes, PAGE + PAGE / 4); // and goes its own way
    ck_assert(!kvd_pool_seq_settle(f.pool, child));
    verify(&f);
    append(&f, s, 60);
    ck_assert_uint_eq(info_of(&f, s).bytes, 3 * PAGE);
    kvd_pool_set_quota(f.pool, f.ns, used(&f));
    ck_assert_int_eq(kvd_pool_settle_begin(f.pool, child, &a, &f.err), KVD_E_QUOTA);
    verify(&f);
    finish(&f);
}
END_TEST

START_TEST(pages_that_are_never_cut)
{
    struct kvd_layout other = test_layout(1, SINK, RECENT);
    other.planes[0].head_dim_k = 128; // rows of K and V are not of one length
    struct fixture f = setup(2, other, PAGE);
    uint64_t s = new_seq(&f);
    append(&f, s, 1);
    ck_assert_uint_eq(info_of(&f, s).bytes, PAGE);
    ck_assert(kvd_pool_seq_settle(f.pool, s));
    finish(&f);
    f = setup(2, test_layout(1, SINK, RECENT), 28 << 10); // page numbers are too few
    append(&f, new_seq(&f), 1);
    ck_assert_uint_eq(used(&f), 28 << 10);
    finish(&f);
}
END_TEST

// What a damaged region says of two sequences that would have the same rows.
START_TEST(no_row_is_anothers)
{
    static const struct {
        uint32_t tokens, page; // of the second one: of the page of which the first has a quarter
    } wrong[] = {{10, 1}, {10, 2}, {60, 1}, {10, 0}};
    for (uint32_t i = 0; i < KVD_LEN(wrong); i++) {
        struct fixture f = usual(2);
        uint64_t first = new_seq(&f), second = new_seq(&f);
        append(&f, first, 10);
        append(&f, second, wrong[i].tokens);
        uint32_t *has[2];
        for (int k = 0; k < 2; k++) {
            const struct region_seq *s = seq_find(f.pool, k ? second : first);
            has[k] = &f.pool->block[s->table[0][KVD_POOL_BF16].first].page[0];
        }
        ck_assert_uint_eq(*has[0] % PART_NUMBERS, 4);
        *has[1] = *has[0] - 4 + wrong[i].page;
        ck_assert_int_eq(kvd_pool_verify(f.pool, &f.err), KVD_E_CORRUPT);
        ck_assert_int_eq(kvd_pool_rebuild(f.pool, &f.err), KVD_E_CORRUPT);
        ck_assert_msg(strstr(f.err.text, "in use twice") || strstr(f.err.text, "slab"), "%s",
                      f.err.text);
        kvd_pool_free(&f.pool);
    }
    // A part with fewer rows than its sequence has tokens.
    struct fixture f = usual(2);
    uint64_t s = new_seq(&f);
    append(&f, s, 40);
    append(&f, new_seq(&f), 10);
    uint32_t *page = &f.pool->block[seq_find(f.pool, s)->table[0][KVD_POOL_BF16].first].page[0];
    *page += 4;
    ck_assert_int_eq(kvd_pool_rebuild(f.pool, &f.err), 0);
    ck_assert_int_eq(kvd_pool_verify(f.pool, &f.err), KVD_E_CORRUPT);
    ck_assert_msg(strstr(f.err.text, "lacks pages"), "%s", f.err.text);
    kvd_pool_free(&f.pool);
}
END_TEST

KVD_MAIN("pool_parts", 60, what_short_sequences_take, four_share_a_page,
         parts_are_taken_and_given_at_random, an_outgrown_part_is_copied, a_quota_counts_parts,
         whoever_is_mapped_has_whole_pages, pages_that_are_never_cut, no_row_is_anothers)
