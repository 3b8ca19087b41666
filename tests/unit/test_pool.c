// The pool's rules, one at a time.
#include "tests/unit/suite.h"

#include <errno.h>

#include "tests/unit/pool_fixture.h"

// 16 and 128 pages an extent
static const uint64_t page_bytes[1][KVD_POOL_KINDS] = {{128 << 10, 16 << 10}};

struct fixture {
    struct test_mem mem;
    struct kvd_pool *pool;
    struct kvd_error err;
    uint32_t ns, layout;
};

static struct test_mem fixture_mem; // outlives the fixture's copies

static struct fixture setup(uint32_t extents, uint32_t layers, uint32_t sink, uint32_t recent)
{
    struct fixture f = {0};
    fixture_mem = (struct test_mem){0};
    f.pool = test_pool(&fixture_mem, extents, 256);
    struct kvd_layout g = test_layout(layers, sink, recent);
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "a", &f.ns, &f.err), 0);
    ck_assert_int_eq(kvd_pool_layout(f.pool, f.ns, &g, page_bytes, &f.layout, &recycled, &f.err),
                     0);
    return f;
}

static uint64_t new_seq(struct fixture *f)
{
    uint64_t id = 0;
    ck_assert_msg(kvd_pool_seq_new(f->pool, f->ns, f->layout, &id, &f->err) == 0, "%s",
                  f->err.text);
    return id;
}

static int begin(struct fixture *f, struct kvd_pool_append *a, uint64_t seq, uint64_t at,
                 uint32_t n, uint32_t layer, uint32_t layers, uint64_t appender, uint64_t request)
{
    struct kvd_pool_append_request by = {.seq = seq,
                                         .position = at,
                                         .tokens = n,
                                         .layer_begin = layer,
                                         .layer_count = layers,
                                         .appender = appender,
                                         .request = request};
    return kvd_pool_append_begin(f->pool, &by, a, &f->err);
}

static int append(struct fixture *f, uint64_t seq, uint64_t at, uint32_t n)
{
    struct kvd_pool_append a;
    struct kvd_pool_seq_info info;
    if (kvd_pool_seq_info(f->pool, seq, &info))
        return KVD_E_NOT_FOUND;
    uint32_t layers = kvd_pool_layout_get(f->pool, info.layout)->n_layers;
    int rc = begin(f, &a, seq, at, n, 0, layers, 0, 0);
    if (rc == 0 && !a.replayed)
        kvd_pool_append_commit(f->pool, &a);
    return rc;
}

static struct kvd_pool_seq_info info_of(struct fixture *f, uint64_t seq)
{
    struct kvd_pool_seq_info info;
    ck_assert_int_eq(kvd_pool_seq_info(f->pool, seq, &info), 0);
    return info;
}

static void verify(struct fixture *f)
{
    ck_assert_msg(kvd_pool_verify(f->pool, &f->err) == 0, "%s", f->err.text);
}

static void finish(struct fixture *f)
{
    verify(f);
    kvd_pool_free(&f->pool);
}

START_TEST(demotion_follows_in_chunks)
{
    struct fixture f = setup(8, 1, 64, 256);
    uint64_t s = new_seq(&f);
    uint64_t length = 0;
    for (int i = 0; i < 2000; i++) {
        ck_assert_int_eq(append(&f, s, length++, 1), 0);
        struct kvd_pool_seq_info in = info_of(&f, s);
        uint64_t hist = length > 320 ? 64 + (length - 320) / 16 * 16 : 64;
        ck_assert_uint_eq(in.reach[0].hist_end, hist);
        if (length > 320) {
            ck_assert_uint_ge(length - in.reach[0].hist_end, 256);
            ck_assert_uint_lt(length - in.reach[0].hist_end, 272);
        }
        ck_assert_uint_eq(in.pages[0][KVD_POOL_CODEC], (hist - 64 + 63) / 64);
    }
    ck_assert_uint_eq(info_of(&f, s).pages[0][KVD_POOL_BF16], 1 + 5);
    finish(&f);
}
END_TEST

START_TEST(one_big_append_equals_many_small)
{
    struct fixture f = setup(16, 1, 64, 256);
    uint64_t a = new_seq(&f), b = new_seq(&f);
    ck_assert_int_eq(append(&f, a, 0, 1777), 0);
    for (uint64_t t = 0; t < 1777; t++)
        ck_assert_int_eq(append(&f, b, t, 1), 0);
    struct kvd_pool_seq_info x = info_of(&f, a), y = info_of(&f, b);
    ck_assert_uint_eq(x.reach[0].hist_end, y.reach[0].hist_end);
    ck_assert_uint_eq(x.pages[0][0], y.pages[0][0]);
    ck_assert_uint_eq(x.pages[0][1], y.pages[0][1]);
    finish(&f);
}
END_TEST

// Commits what has begun; whether it was a repeat.
static bool apply(struct fixture *f, struct kvd_pool_append *a)
{
    if (!a->replayed)
        kvd_pool_append_commit(f->pool, a);
    return a->replayed;
}

START_TEST(a_repeat_belongs_to_its_sender)
{
    enum { A = 7, B = 8 };
    struct fixture f = setup(8, 1, 64, 256);
    uint64_t s = new_seq(&f), child;
    struct kvd_pool_append a;
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, A, 1), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, A, 1), 0);
    ck_assert(apply(&f, &a));
    ck_assert_uint_eq(a.new_length, 10);
    // Another sender, another request, none, other tokens under the same one, a fork:
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, B, 1), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, A, 2), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, A, 0), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 10, 10, 0, 1, A, 1), KVD_E_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(f.err.text, "another request id"));
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, s, &child, &f.err), 0);
    ck_assert_int_eq(begin(&f, &a, child, 0, 10, 0, 1, A, 1), KVD_E_PRECONDITION);
    // Cut off since: neither a repeat nor to be stored once more.
    ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 0, &f.err), 0);
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, A, 1), KVD_E_PRECONDITION);
    ck_assert_ptr_nonnull(strstr(f.err.text, "truncated"));
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, B, 1), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, A, 1), KVD_E_PRECONDITION);
    // After another append it comes too late.
    ck_assert_int_eq(begin(&f, &a, s, 10, 5, 0, 1, B, 2), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 10, 0, 1, B, 1), KVD_E_PRECONDITION);
    // What was aborted has not been applied.
    ck_assert_int_eq(begin(&f, &a, s, 15, 5, 0, 1, B, 3), 0);
    kvd_pool_append_abort(f.pool, &a);
    ck_assert_int_eq(begin(&f, &a, s, 15, 5, 0, 1, B, 3), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 15, 5, 0, 1, B, 3), 0);
    ck_assert(apply(&f, &a));
    ck_assert_uint_eq(info_of(&f, s).length, 20);
    ck_assert_uint_eq(info_of(&f, child).length, 10);
    ck_assert_int_eq(append(&f, s, 11, 1), KVD_E_PRECONDITION);
    ck_assert_int_eq(append(&f, s, 20, KVD_MAX_LENGTH), KVD_E_LIMIT);
    finish(&f);
}
END_TEST

START_TEST(a_repeat_of_a_layer)
{
    struct fixture f = setup(8, 3, 64, 256);
    uint64_t s = new_seq(&f);
    struct kvd_pool_append a;
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 1, 1), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 1, 1), 0);
    ck_assert(apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 1, 2), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 2, 1), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 1, 1, 1, 1), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 1, 2, 1, 2), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 1, 2, 1, 2), 0);
    ck_assert(apply(&f, &a));
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 1, 1), KVD_E_PRECONDITION);
    // Dropped by a truncation before it was whole.
    ck_assert_int_eq(begin(&f, &a, s, 7, 2, 0, 1, 1, 3), 0);
    ck_assert(!apply(&f, &a));
    ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 7, &f.err), 0);
    ck_assert_int_eq(begin(&f, &a, s, 7, 2, 0, 1, 1, 3), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 7, 2, 0, 1, 1, 4), 0);
    ck_assert(!apply(&f, &a));
    finish(&f);
}
END_TEST

START_TEST(a_repeat_knows_what_the_first_saw)
{
    struct fixture f = setup(8, 1, 64, 256);
    struct kvd_pool_append first, again;
    for (uint32_t n = 1; n < 120; n++) {
        uint64_t s = new_seq(&f);
        ck_assert_int_eq(append(&f, s, 0, 335), 0); // a window of 271: as long as it gets
        ck_assert_int_eq(begin(&f, &first, s, 335, n, 0, 1, 1, n), 0);
        apply(&f, &first);
        ck_assert_int_eq(begin(&f, &again, s, 335, n, 0, 1, 1, n), 0);
        ck_assert(again.replayed);
        ck_assert_uint_eq(again.planes[0].before.hist_end, first.planes[0].before.hist_end);
        ck_assert_uint_eq(again.planes[0].after.hist_end, first.planes[0].after.hist_end);
        ck_assert(again.planes[0].window_kept == (n <= 49));
        kvd_pool_seq_release(f.pool, s);
    }
    finish(&f);
}
END_TEST

START_TEST(layers_fill_in_order)
{
    struct fixture f = setup(8, 3, 64, 256);
    uint64_t s = new_seq(&f);
    struct kvd_pool_append a;
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 1, 1, 0, 0), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 0, 0), 0);
    kvd_pool_append_commit(f.pool, &a);
    ck_assert_uint_eq(info_of(&f, s).length, 0);
    ck_assert_uint_eq(info_of(&f, s).pending_length, 7);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 2, 1, 0, 0), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 8, 1, 1, 0, 0), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 0, 1, 0, 0), KVD_E_PRECONDITION);
    uint64_t child;
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, s, &child, &f.err), KVD_E_PRECONDITION);
    ck_assert_int_eq(begin(&f, &a, s, 0, 7, 1, 2, 0, 0), 0);
    kvd_pool_append_commit(f.pool, &a);
    ck_assert_uint_eq(info_of(&f, s).length, 7);
    finish(&f);
}
END_TEST

START_TEST(abort_changes_nothing)
{
    struct fixture f = setup(8, 1, 64, 256);
    uint64_t s = new_seq(&f), child;
    ck_assert_int_eq(append(&f, s, 0, 500), 0);
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, s, &child, &f.err), 0);
    struct kvd_pool_seq_info before = info_of(&f, child);
    uint64_t pages[64], after[64];
    uint32_t n = kvd_pool_seq_pages(f.pool, child, 0, KVD_POOL_BF16, pages, 64);
    struct kvd_pool_info pool_before, pool_after;
    kvd_pool_info(f.pool, &pool_before);
    struct kvd_pool_append a;
    ck_assert_int_eq(begin(&f, &a, child, 500, 300, 0, 1, 0, 0), 0);
    ck_assert_uint_gt(a.n_changes, 4);
    kvd_pool_append_abort(f.pool, &a);
    kvd_pool_info(f.pool, &pool_after);
    ck_assert_uint_eq(pool_before.used, pool_after.used);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, child, 0, KVD_POOL_BF16, after, 64), n);
    ck_assert_mem_eq(pages, after, n * sizeof(*pages));
    ck_assert_uint_eq(info_of(&f, child).pages[0][1], before.pages[0][1]);
    finish(&f);
}
END_TEST

START_TEST(forks_share_until_written)
{
    struct fixture f = setup(8, 1, 64, 256);
    uint64_t s = new_seq(&f), child;
    ck_assert_int_eq(append(&f, s, 0, 1000), 0);
    struct kvd_pool_info one, two, three;
    kvd_pool_info(f.pool, &one);
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, s, &child, &f.err), 0);
    kvd_pool_info(f.pool, &two);
    ck_assert_uint_eq(one.used, two.used);
    // One token more: a private copy of one ring page, and nothing else.
    ck_assert_int_eq(append(&f, child, 1000, 1), 0);
    kvd_pool_info(f.pool, &three);
    ck_assert_uint_eq(three.used - two.used, page_bytes[0][KVD_POOL_BF16]);
    kvd_pool_seq_release(f.pool, s);
    verify(&f);
    ck_assert_uint_eq(info_of(&f, child).length, 1001);
    kvd_pool_seq_release(f.pool, child);
    kvd_pool_info(f.pool, &three);
    ck_assert_uint_eq(three.used, 0);
    ck_assert_uint_eq(three.extents_granted, 0);
    finish(&f);
}
END_TEST

START_TEST(quota_and_pool_limits)
{
    struct fixture f = setup(4, 1, 64, 256); // 2 extents of bf16 pages = 32, the rest for codes
    uint64_t s = new_seq(&f);
    kvd_pool_set_quota(f.pool, f.ns, page_bytes[0][0] * 2);
    ck_assert_int_eq(append(&f, s, 0, 128), 0);
    ck_assert_int_eq(append(&f, s, 128, 64), KVD_E_QUOTA);
    ck_assert_uint_eq(info_of(&f, s).length, 128);
    kvd_pool_set_quota(f.pool, f.ns, 0);
    ck_assert_int_eq(append(&f, s, 128, 64), 0);
    int rc = 0, made = 0;
    while (rc == 0 && made < 100) {
        uint64_t x = new_seq(&f);
        rc = append(&f, x, 0, 384);
        made += rc == 0;
        if (rc)
            ck_assert_uint_eq(info_of(&f, x).bytes, 0);
    }
    ck_assert_int_eq(rc, KVD_E_FULL);
    ck_assert_ptr_nonnull(strstr(f.err.text, "pool-size"));
    finish(&f);
}
END_TEST

// Fills the namespace with sequences that are held, until it or the pool is full: the code of that.
static int fill(struct fixture *f)
{
    int rc = 0;
    for (int i = 0; i < 200 && rc == 0; i++)
        rc = append(f, new_seq(f), 0, 64);
    return rc;
}

START_TEST(memory_is_shared_by_quotas_alone)
{
    struct fixture f = setup(4, 1, 64, 256);
    uint32_t first = f.ns, second;
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "b", &second, &f.err), 0);
    // Without one, a namespace may fill the pool, and what it holds keeps others out.
    ck_assert_int_eq(fill(&f), KVD_E_FULL);
    f.ns = second;
    ck_assert_int_eq(append(&f, new_seq(&f), 0, 64), KVD_E_FULL);
    finish(&f);
    // Quotas that are together no more than the pool are there for each, whatever others do.
    f = setup(4, 1, 64, 256);
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "b", &second, &f.err), 0);
    struct kvd_pool_info info;
    kvd_pool_info(f.pool, &info);
    kvd_pool_set_quota(f.pool, first, info.bytes / 2);
    kvd_pool_set_quota(f.pool, second, info.bytes / 2);
    ck_assert_int_eq(fill(&f), KVD_E_QUOTA);
    f.ns = second;
    ck_assert_int_eq(fill(&f), KVD_E_QUOTA);
    finish(&f);
}
END_TEST

START_TEST(published_unused_are_evicted_in_order_and_live_never)
{
    struct fixture f = setup(2, 1, 64, 256); // 32 bf16 pages
    uint64_t live = new_seq(&f), old = new_seq(&f), young = new_seq(&f);
    struct kvd_pool_evicted freed;
    ck_assert_int_eq(append(&f, live, 0, 64), 0);
    ck_assert_int_eq(append(&f, old, 0, 256), 0);
    ck_assert_int_eq(append(&f, young, 0, 256), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, live, "live", false, &f.err), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, old, "old", false, &f.err), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, young, "young", false, &f.err), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, live, "old", false, &f.err), KVD_E_EXISTS);
    kvd_pool_seq_release(f.pool, young);
    kvd_pool_seq_release(f.pool, old);
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, f.ns, "young"), young); // now the most recently used
    for (uint64_t i = 0; i < 26; i++) {
        uint64_t s = new_seq(&f);
        ck_assert_msg(append(&f, s, 0, 64) == 0, "%s", f.err.text);
    }
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, f.ns, "old"), 0);
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, f.ns, "live"), live);
    verify(&f);
    kvd_pool_evict(f.pool, KVD_POOL_NONE, 0, UINT32_MAX, &freed);
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, f.ns, "live"), live);
    ck_assert_uint_eq(kvd_pool_lookup(f.pool, f.ns, "young"), 0);
    finish(&f);
}
END_TEST

// In steps, as short as they can be.
static uint64_t evictable(struct fixture *f, uint64_t *by_namespace)
{
    struct kvd_pool_look steps = {0}, whole = {.by_namespace = by_namespace};
    uint32_t n = 1;
    while (!kvd_pool_look_step(f->pool, &steps, 1))
        n++;
    ck_assert(kvd_pool_look_step(f->pool, &whole, UINT32_MAX));
    ck_assert_uint_eq(steps.bytes, whole.bytes);
    ck_assert_uint_gt(n, 1);
    return whole.bytes;
}

START_TEST(evictable_is_what_eviction_frees)
{
    struct fixture f = setup(16, 1, 64, 64);
    uint64_t alone = new_seq(&f), parent = new_seq(&f), child, by[8] = {0};
    ck_assert_int_eq(append(&f, alone, 0, 1000), 0);
    ck_assert_int_eq(append(&f, parent, 0, 2000), 0);
    ck_assert_uint_eq(evictable(&f, NULL), 0);
    ck_assert_int_eq(kvd_pool_seq_fork(f.pool, parent, &child, &f.err), 0);
    ck_assert_int_eq(append(&f, child, 2000, 100), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, alone, "alone", false, &f.err), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, parent, "parent", false, &f.err), 0);
    ck_assert_int_eq(kvd_pool_publish(f.pool, child, "child", false, &f.err), 0);
    kvd_pool_seq_release(f.pool, alone);
    ck_assert_uint_eq(evictable(&f, by), info_of(&f, alone).bytes);
    ck_assert_uint_eq(by[f.ns], info_of(&f, alone).bytes);
    // What a living child shares with its parent is not to be had.
    kvd_pool_seq_release(f.pool, parent);
    uint64_t some = evictable(&f, NULL);
    ck_assert_uint_lt(some, info_of(&f, alone).bytes + info_of(&f, parent).bytes);
    // With the child unused too, all is, each page once.
    kvd_pool_seq_release(f.pool, child);
    uint64_t all = evictable(&f, NULL);
    struct kvd_pool_info info;
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(all, info.used);
    verify(&f);
    struct kvd_pool_evicted first, freed;
    ck_assert_uint_eq(kvd_pool_evict(f.pool, f.ns, 0, 1, &first), 1);
    ck_assert_uint_lt(first.bytes, all);
    ck_assert_uint_eq(kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &freed), 2);
    ck_assert_uint_eq(first.bytes + freed.bytes, all);
    finish(&f);
}
END_TEST

START_TEST(memory_is_zeroed_between_namespaces_only)
{
    struct fixture f = setup(1, 1, 64, 256);
    struct kvd_pool_info info;
    uint32_t other;
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "b", &other, &f.err), 0);
    struct test_mem mem = {0};
    kvd_pool_free(&f.pool);
    f.pool = test_pool(&mem, 1, 16);
    struct kvd_layout g = test_layout(1, 64, 256);
    kvd_pool_namespace(f.pool, "a", &f.ns, &f.err);
    kvd_pool_namespace(f.pool, "b", &other, &f.err);
    kvd_pool_layout(f.pool, f.ns, &g, page_bytes, &f.layout, &recycled, &f.err);
    uint32_t page;
    ck_assert_int_eq(kvd_pool_page_alloc(f.pool, f.ns, f.layout, 0, KVD_POOL_BF16, &page, &f.err),
                     0);
    kvd_pool_page_unref(f.pool, page);
    ck_assert_int_eq(kvd_pool_page_alloc(f.pool, f.ns, f.layout, 0, KVD_POOL_CODEC, &page, &f.err),
                     0);
    kvd_pool_page_unref(f.pool, page);
    ck_assert_uint_eq(mem.zeros, 0);
    mem.fail_next = true; // a failing zero must not grant the extent
    ck_assert_int_eq(kvd_pool_page_alloc(f.pool, other, f.layout, 0, KVD_POOL_CODEC, &page, &f.err),
                     -EIO);
    mem.fail_next = false;
    ck_assert_int_eq(kvd_pool_page_alloc(f.pool, other, f.layout, 0, KVD_POOL_CODEC, &page, &f.err),
                     0);
    ck_assert_uint_eq(mem.zeros, 1);
    kvd_pool_page_unref(f.pool, page);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.used, 0);
    finish(&f);
    ck_assert_uint_eq(mem.live, 0);
}
END_TEST

START_TEST(truncate_everywhere)
{
    struct fixture f = setup(8, 1, 64, 256);
    for (uint64_t keep = 0; keep <= 1000; keep += 37) {
        uint64_t s = new_seq(&f);
        ck_assert_int_eq(append(&f, s, 0, 1000), 0);
        ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 1001, &f.err), KVD_E_INVALID);
        ck_assert_int_eq(kvd_pool_truncate(f.pool, s, keep, &f.err), 0);
        struct kvd_pool_seq_info in = info_of(&f, s);
        ck_assert_uint_eq(in.length, keep);
        ck_assert_uint_le(in.reach[0].hist_end, KVD_MAX(keep, 64));
        verify(&f);
        ck_assert_int_eq(append(&f, s, keep, 600), 0);
        ck_assert_uint_eq((info_of(&f, s).reach[0].hist_end - 64) % 16, 0);
        kvd_pool_seq_release(f.pool, s);
    }
    finish(&f);
}
END_TEST

START_TEST(truncate_refuses_to_keep_an_overwritten_window)
{
    struct fixture f = setup(8, 2, 64, 256);
    uint64_t s = new_seq(&f);
    struct kvd_pool_append a;
    ck_assert_int_eq(append(&f, s, 0, 400), 0);
    ck_assert_int_eq(begin(&f, &a, s, 400, 40, 0, 1, 0, 0), 0);
    kvd_pool_append_commit(f.pool, &a);
    ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 400, &f.err),
                     0); // fits the slack: nothing was overwritten
    ck_assert_int_eq(begin(&f, &a, s, 400, 300, 0, 1, 0, 0), 0);
    kvd_pool_append_commit(f.pool, &a);
    ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 400, &f.err), KVD_E_PRECONDITION);
    ck_assert_int_eq(kvd_pool_truncate(f.pool, s, 144, &f.err), 0);
    ck_assert_uint_eq(info_of(&f, s).length, 144);
    finish(&f);
}
END_TEST

START_TEST(ids_are_never_reused)
{
    struct fixture f = setup(2, 1, 64, 256);
    struct kvd_pool_seq_info info;
    uint64_t first = new_seq(&f);
    kvd_pool_seq_pin(f.pool, first);
    kvd_pool_seq_release(f.pool, first); // doomed, as it is pinned
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, first, &info), KVD_E_NOT_FOUND);
    kvd_pool_seq_unpin(f.pool, first);
    uint64_t second = new_seq(&f);
    ck_assert_uint_ne(first, second);
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, first, &info), KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, 0, &info), KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, ~0ull, &info), KVD_E_NOT_FOUND);
    ck_assert_int_eq(append(&f, first, 0, 1), KVD_E_NOT_FOUND);
    finish(&f);
}
END_TEST

START_TEST(extents_are_made_ahead_and_given_back)
{
    struct fixture f = setup(4, 1, 64, 256);
    struct test_mem *mem = &fixture_mem;
    struct kvd_pool_info info;
    uint32_t a = kvd_pool_spare_wanted(f.pool, 2), b = kvd_pool_spare_wanted(f.pool, 2);
    ck_assert_uint_ne(a, KVD_POOL_NONE);
    ck_assert_uint_ne(b, KVD_POOL_NONE);
    ck_assert_uint_ne(a, b);
    verify(&f); // those set aside are counted
    mem->live += 2;
    kvd_pool_spare_made(f.pool, a, 7ull << 40);
    kvd_pool_spare_made(f.pool, b, 8ull << 40);
    ck_assert_uint_eq(kvd_pool_spare_wanted(f.pool, 2), KVD_POOL_NONE);
    // They are used before others are made.
    mem->short_of_memory = true;
    uint64_t s = new_seq(&f), other = new_seq(&f);
    ck_assert_int_eq(append(&f, s, 0, 400), 0); // both kinds of pages: two extents
    ck_assert_uint_eq(mem->allocs, 0);
    kvd_pool_info(f.pool, &info);
    ck_assert_uint_eq(info.extents_made, 2);
    // The device has no more: what is idle is used, and without any the text says why.
    uint32_t c = kvd_pool_spare_wanted(f.pool, 1);
    kvd_pool_spare_made(f.pool, c, 0); // it could not be made
    ck_assert_int_eq(append(&f, other, 0, 2048 * 8), KVD_E_FULL);
    ck_assert_ptr_nonnull(strstr(f.err.text, "the device is short of memory"));
    verify(&f);
    kvd_pool_seq_release(f.pool, s);
    ck_assert_int_eq(append(&f, other, 0, 400), 0);
    kvd_pool_seq_release(f.pool, other);
    // Those of another namespace too, even if one without memory comes first.
    uint32_t ns;
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "b", &ns, &f.err), 0);
    ck_assert_int_eq(kvd_pool_seq_new(f.pool, ns, f.layout, &other, &f.err), 0);
    kvd_pool_spare_made(f.pool, kvd_pool_spare_wanted(f.pool, 3), 0);
    ck_assert_int_eq(append(&f, other, 0, 400), 0);
    ck_assert_uint_eq(mem->zeros, 2);
    kvd_pool_seq_release(f.pool, other);
    ck_assert_uint_eq(kvd_pool_trim(f.pool, 1), 1);
    ck_assert_uint_eq(kvd_pool_trim(f.pool, 9), 1);
    ck_assert_uint_eq(mem->live, 0);
    mem->short_of_memory = false;
    finish(&f);
}
END_TEST

START_TEST(idle_extents_are_given_back)
{
    struct fixture f = setup(4, 1, 64, 256);
    struct test_mem *mem = &fixture_mem;
    uint64_t s = new_seq(&f), other = new_seq(&f);
    ck_assert_int_eq(append(&f, s, 0, 400), 0);
    ck_assert_uint_eq(mem->live, 2);
    ck_assert(!kvd_pool_trim_idle(f.pool, 1000, 0)); // all in use
    kvd_pool_seq_release(f.pool, s);
    ck_assert(!kvd_pool_trim_idle(f.pool, 1000, 500)); // seen free for the first time
    ck_assert(!kvd_pool_trim_idle(f.pool, 1499, 500));
    ck_assert_int_eq(append(&f, other, 0, 64), 0); // one is used again, and free again
    kvd_pool_seq_release(f.pool, other);
    ck_assert(kvd_pool_trim_idle(f.pool, 1500, 500));
    ck_assert(!kvd_pool_trim_idle(f.pool, 1500, 500));
    ck_assert_uint_eq(mem->live, 1);
    ck_assert(!kvd_pool_trim_idle(f.pool, 1999, 500));
    ck_assert(kvd_pool_trim_idle(f.pool, 2000, 500));
    ck_assert_uint_eq(mem->live, 0);
    s = new_seq(&f);
    ck_assert_int_eq(append(&f, s, 0, 400), 0);
    kvd_pool_seq_release(f.pool, s);
    finish(&f);
}
END_TEST

KVD_MAIN("pool", 60, idle_extents_are_given_back, demotion_follows_in_chunks,
         one_big_append_equals_many_small, a_repeat_belongs_to_its_sender, a_repeat_of_a_layer,
         a_repeat_knows_what_the_first_saw, layers_fill_in_order, abort_changes_nothing,
         forks_share_until_written, quota_and_pool_limits, memory_is_shared_by_quotas_alone,
         published_unused_are_evicted_in_order_and_live_never, evictable_is_what_eviction_frees,
         memory_is_zeroed_between_namespaces_only, truncate_everywhere,
         truncate_refuses_to_keep_an_overwritten_window, ids_are_never_reused,
         extents_are_made_ahead_and_given_back)
