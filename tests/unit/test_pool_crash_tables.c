// Namespaces and layouts that come and go while the process may end at any instant: behind each
// durable store the region opens, and each sequence is in its namespace and has its layout.
// KVD_CRASH_OPS sets the number of operations.
#include "tests/unit/suite.h"

#include <sys/mman.h>
#include <unistd.h>

#include "pool/internal.h"
#include "tests/unit/pool_fixture.h"

enum { SPACES = 6, LAYOUTS = 6, NAMES = 12, SHAPES = 10, EXTENTS = 8, PUBLISHED = 4 };

void (*kvd_pool_kill_point)(void);

static struct kvd_pool *pool;
static struct test_mem mem;
static uint64_t rng, points, looks, cleared, recycled_ones;
static int copy = -1;
static uint32_t doing; // the name whose namespace an operation is at; NAMES: none
static uint64_t quota[NAMES];

static const char *name_of(uint32_t i)
{
    static char text[NAMES][16];
    snprintf(text[i], sizeof(text[i]), "space%u", i);
    return text[i];
}

static struct kvd_layout shape_of(uint32_t i)
{
    return test_layout(1 + i % 3, 64, 128 + 64 * i);
}

static uint64_t bytes_of(uint32_t shape, int kind)
{
    return ((kind == KVD_POOL_BF16 ? 128 : 16) + 4 * shape) << 10;
}

static void bytes_all(uint32_t shape, uint64_t out[1][KVD_POOL_KINDS])
{
    for (int k = 0; k < KVD_POOL_KINDS; k++)
        out[0][k] = bytes_of(shape, k);
}

static struct kvd_pool_config config_of(void)
{
    return (struct kvd_pool_config){.bytes = (uint64_t)EXTENTS << 21,
                                    .extent_bytes = 2 << 20,
                                    .max_sequences = 48,
                                    .max_namespaces = SPACES,
                                    .max_layouts = LAYOUTS,
                                    .durable = true};
}

static int attach(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    (void)ctx;
    (void)bytes;
    *addr = (uint64_t)(index + 1) << 40;
    return 0;
}

// A sequence is published under the number of its layout, so that it says what must be true.
static bool check_sequence(void *ctx, const struct kvd_pool_seq_info *info)
{
    struct kvd_pool *opened = ctx;
    uint32_t shape = (uint32_t)strtoul(info->name, NULL, 10);
    struct kvd_layout want = shape_of(shape);
    struct kvd_pool_namespace_info ns;
    kvd_pool_namespace_info(opened, info->ns, &ns);
    ck_assert(ns.name[0]);
    if (!info->name[0])
        return true; // not published yet
    ck_assert_mem_eq(kvd_pool_layout_get(opened, info->layout), &want, sizeof(want));
    for (int k = 0; k < KVD_POOL_KINDS; k++)
        ck_assert_uint_eq(kvd_pool_page_bytes(opened, info->layout, 0, k), bytes_of(shape, k));
    uint32_t there = kvd_pool_namespace_find(pool, ns.name);
    ck_assert_uint_ne(there, KVD_POOL_NONE);
    ck_assert_uint_eq(kvd_pool_lookup(opened, info->ns, info->name), info->id);
    return true;
}

static void check_opened(struct kvd_pool *opened)
{
    struct kvd_error err = {0};
    kvd_pool_seq_each(opened, check_sequence, opened);
    for (uint32_t i = 0; i < NAMES; i++) {
        uint32_t at = kvd_pool_namespace_find(opened, name_of(i));
        struct kvd_pool_namespace_info ns = {0};
        if (at != KVD_POOL_NONE)
            kvd_pool_namespace_info(opened, at, &ns);
        ck_assert(ns.quota == quota[i] || i == doing);
    }
    // Whatever was left of a layout, one that is made there has its own pages.
    for (uint32_t i = 0; i < SHAPES; i++) {
        struct kvd_layout l = shape_of(i);
        uint64_t bytes[1][KVD_POOL_KINDS];
        uint32_t layout;
        recycled = false;
        bytes_all(i, bytes);
        if (kvd_pool_layout(opened, KVD_POOL_NONE, &l, bytes, &layout, &recycled, &err))
            continue;
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            ck_assert_uint_eq(kvd_pool_page_bytes(opened, layout, 0, k), bytes_of(i, k));
        kvd_pool_layout_unref(opened, layout);
    }
    ck_assert_msg(kvd_pool_verify(opened, &err) == 0, "%s", err.text);
}

static void look(void)
{
    struct kvd_pool_mem_ops ops = {.ctx = &mem,
                                   .alloc = test_mem_alloc,
                                   .free = test_mem_free,
                                   .zero = test_mem_zero,
                                   .attach = attach};
    struct kvd_pool_config config = config_of();
    struct kvd_error err = {0};
    struct test_mem before = mem;
    points++;
    if (kvd_rand(&rng) % 3)
        return;
    void (*self)(void) = kvd_pool_kill_point;
    kvd_pool_kill_point = NULL; // not at what opening stores
    uint64_t bytes = pool->head->region_bytes;
    ck_assert_int_eq(ftruncate(copy, (off_t)bytes), 0);
    ck_assert_int_eq(pwrite(copy, pool->head, bytes, 0), (ssize_t)bytes);
    struct kvd_pool *opened = kvd_pool_open(copy, &config, &ops, &err);
    ck_assert_msg(opened != NULL, "does not open: %s", err.text);
    check_opened(opened);
    kvd_pool_leave(&opened);
    mem = before;
    looks++;
    kvd_pool_kill_point = self;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(kvd_rand(&rng) % n);
}

// A namespace and a layout are opened, get some published sequences with pages, and are left.
static void visit(uint32_t name, uint32_t shape)
{
    struct kvd_layout l = shape_of(shape);
    struct kvd_error err = {0};
    uint64_t bytes[1][KVD_POOL_KINDS], seq;
    uint32_t ns, layout;
    recycled = false;
    bytes_all(shape, bytes);
    if (kvd_pool_namespace(pool, name_of(name), &ns, &err))
        return;
    if (kvd_pool_layout(pool, ns, &l, bytes, &layout, &recycled, &err)) {
        kvd_pool_namespace_release(pool, ns);
        return;
    }
    recycled_ones += recycled;
    for (uint32_t i = below(PUBLISHED); i > 0; i--) {
        struct kvd_pool_append_request by = {.tokens = 1 + below(300), .layer_count = l.n_layers};
        struct kvd_pool_append a;
        char text[16];
        snprintf(text, sizeof(text), "%u.%u", shape, below(PUBLISHED));
        if (kvd_pool_seq_new(pool, ns, layout, &seq, &err))
            continue;
        by.seq = seq;
        if (kvd_pool_publish(pool, seq, text, true, &err) == 0 &&
            kvd_pool_append_begin(pool, &by, &a, &err) == 0)
            kvd_pool_append_commit(pool, &a);
        kvd_pool_seq_release(pool, seq);
    }
    kvd_pool_layout_unref(pool, layout);
    kvd_pool_namespace_release(pool, ns);
}

static void set_quota(uint32_t name)
{
    struct kvd_error err = {0};
    uint32_t ns;
    uint64_t bytes = below(3) ? 0 : (uint64_t)(1 + below(8)) << 21;
    if (kvd_pool_namespace(pool, name_of(name), &ns, &err))
        return;
    kvd_pool_set_quota(pool, ns, bytes);
    kvd_pool_namespace_release(pool, ns);
    quota[name] = bytes;
}

static void clear(void)
{
    struct kvd_pool_clearing c;
    bool any = below(2) ? kvd_pool_namespace_clears(pool, 1 + below(3), &c)
                        : kvd_pool_layout_clears(pool, KVD_POOL_NONE, &c);
    cleared += any;
    for (uint32_t pieces = below(6); any && pieces > 0; pieces--)
        any = !kvd_pool_clear(pool, &c, 1 + below(8));
}

START_TEST(namespaces_and_layouts)
{
    struct kvd_pool_mem_ops ops = {
        .ctx = &mem, .alloc = test_mem_alloc, .free = test_mem_free, .zero = test_mem_zero};
    struct kvd_pool_config config = config_of();
    struct kvd_error err = {0};
    const char *env = getenv("KVD_CRASH_OPS");
    uint64_t n = env ? strtoull(env, NULL, 0) : 600;
    rng = kvd_test_seed("namespaces_and_layouts");
    doing = NAMES;
    copy = memfd_create("copy", MFD_CLOEXEC);
    pool = kvd_pool_new(&config, &ops, &err);
    ck_assert_msg(pool != NULL, "%s", err.text);
    kvd_pool_kill_point = look;
    for (uint64_t i = 0; i < n; i++) {
        struct kvd_pool_evicted gone;
        doing = below(NAMES);
        switch (below(6)) {
        case 0:
            set_quota(doing);
            break;
        case 1:
            clear();
            break;
        case 2:
            kvd_pool_evict(pool, KVD_POOL_NONE, 0, 1 + below(3), &gone);
            break;
        default:
            visit(doing, below(SHAPES));
        }
        doing = NAMES;
        if (i % 50 == 0)
            ck_assert_msg(kvd_pool_verify(pool, &err) == 0, "%s", err.text);
    }
    kvd_pool_kill_point = NULL;
    printf("%llu kill points of namespaces and layouts, %llu opened; %llu cleared, %llu layouts in "
           "place of others\n",
           (unsigned long long)points, (unsigned long long)looks, (unsigned long long)cleared,
           (unsigned long long)recycled_ones);
    ck_assert(looks > 100 && cleared && recycled_ones);
    kvd_pool_free(&pool);
    close(copy);
}
END_TEST

KVD_MAIN("pool_crash_tables", 300, namespaces_and_layouts)
