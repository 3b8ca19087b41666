// Pool: page allocate/free pairs a second, metadata of a million live pages, what a call notes of a
// long sequence, and what it takes to empty an extent among a million blocks of prompts, all at
// once and in steps. usage: bench_pool [MILLIONS]
#include <errno.h>
#include <time.h>

#include "pool/blocks.h"
#include "tests/unit/pool_fixture.h"
#include "tests/unit/random.h"

// Of this thread: what else runs on the machine is left out.
static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static long resident(void)
{
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%*d %ld", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    return pages * 4096;
}

// -- emptying an extent -------------------------------------------------------------------------

enum { PROMPT = 32, AT_ONCE = 8 };

struct crowd {
    struct kvd_pool *pool;
    struct kvd_blocks_space space;
    uint32_t ns, layout; // of others
    uint64_t rng;
};

static void must(int rc, const struct kvd_error *err)
{
    if (!rc)
        return;
    fprintf(stderr, "%s\n", err->text);
    exit(1);
}

// Eight prompts at once, so that blocks of each lie among those of the others.
static void more_prompts(struct crowd *c)
{
    struct kvd_error err = {0};
    struct kvd_prefix_key keys[PROMPT];
    uint64_t seq[AT_ONCE];
    for (int w = 0; w < AT_ONCE; w++)
        must(kvd_pool_seq_new(c->pool, c->space.ns, c->space.layout, &seq[w], &err), &err);
    for (int i = 0; i < AT_ONCE * PROMPT; i++) {
        struct kvd_pool_append a;
        struct kvd_pool_append_request by = {.seq = seq[i % AT_ONCE],
                                             .position = (uint64_t)(i / AT_ONCE) * KVD_PAGE_TOKENS,
                                             .tokens = KVD_PAGE_TOKENS,
                                             .layer_count = 1};
        must(kvd_pool_append_begin(c->pool, &by, &a, &err), &err);
        kvd_pool_append_commit(c->pool, &a);
    }
    for (int w = 0; w < AT_ONCE; w++) {
        struct kvd_blocks_published out;
        for (int i = 0; i < PROMPT; i++)
            keys[i] =
                (struct kvd_prefix_key){{kvd_rand(&c->rng), kvd_rand(&c->rng), kvd_rand(&c->rng)}};
        must(kvd_blocks_publish(c->pool, &c->space, seq[w], keys, PROMPT, false, &out, &err), &err);
        kvd_pool_seq_release(c->pool, seq[w]);
    }
}

static void crowd_new(struct crowd *c, const struct kvd_pool_mem_ops *ops, uint32_t blocks)
{
    const uint64_t small[][KVD_POOL_KINDS] = {{16384, 16384}},
                   large[][KVD_POOL_KINDS] = {{32768, 32768}};
    struct kvd_error err = {0};
    struct kvd_pool_config config = {.bytes = kvd_round_up((uint64_t)blocks << 14, 16 << 20),
                                     .extent_bytes = 16 << 20,
                                     .max_sequences = 1024,
                                     .max_namespaces = 4,
                                     .max_layouts = 4};
    struct kvd_layout plain = test_layout(1, 0, 0), two = test_layout(2, 0, 0);
    *c = (struct crowd){.pool = kvd_pool_new(&config, ops, &err), .rng = 88172645463325252ull};
    must(!c->pool, &err);
    must(kvd_pool_namespace(c->pool, "bench", &c->space.ns, &err), &err);
    must(kvd_pool_namespace(c->pool, "others", &c->ns, &err), &err);
    must(kvd_pool_layout(c->pool, c->space.ns, &plain, small, &c->space.layout, &recycled, &err),
         &err);
    must(kvd_pool_layout(c->pool, c->ns, &two, large, &c->layout, &recycled, &err), &err);
    must(kvd_prefix_domain_digest("bench", (const uint8_t[32]){0}, NULL, 0, c->space.domain, &err),
         &err);
    for (uint32_t n = 0; n < blocks + blocks / 8; n += AT_ONCE * PROMPT)
        more_prompts(c);
}

static void bench_vacate(const struct kvd_pool_mem_ops *ops, uint32_t blocks)
{
    enum { LOOKS = 1024 }; // as the daemon's, between looks at the clock
    struct crowd c;
    struct kvd_error err = {0};
    uint32_t page, steps = 0;
    crowd_new(&c, ops, blocks);
    double t = now();
    must(kvd_pool_page_alloc(c.pool, c.ns, c.layout, 0, KVD_POOL_CODEC, &page, &err), &err);
    printf("an extent emptied among %u blocks, all at once      %7.2f ms\n", blocks,
           (now() - t) * 1e3);
    kvd_pool_free(&c.pool);
    // In steps, while prompts go on: one for each ten steps.
    crowd_new(&c, ops, blocks);
    const struct kvd_pool_need need = {.pages = {{0, 1}}, .bytes = 32768};
    struct kvd_pool_room room = {0};
    double longest = 0, all = 0, asking = 0;
    bool there, more = true;
    do {
        t = now();
        there = kvd_pool_room_make(c.pool, c.ns, c.layout, &need, &room);
        asking = KVD_MAX(asking, now() - t);
        for (more = !there; more; steps++) {
            t = now();
            more = kvd_pool_vacate_step(c.pool, LOOKS);
            double took = now() - t;
            longest = KVD_MAX(longest, took);
            all += took;
            if (steps % 10 == 0)
                more_prompts(&c);
        }
    } while (!there);
    printf("the same in %u steps, others go on: all of them       %7.2f ms\n", steps, all * 1e3);
    printf("the longest step, the longest time of asking for room     %7.3f ms, %.3f ms\n",
           longest * 1e3, asking * 1e3);
    must(kvd_pool_page_alloc(c.pool, c.ns, c.layout, 0, KVD_POOL_CODEC, &page, &err), &err);
    kvd_pool_free(&c.pool);
}

// -- what a call notes of a sequence --------------------------------------------------------------

enum { TOKENS = 131072, PIECE = 4096 };

static void bench_notes(const struct kvd_pool_mem_ops *ops)
{
    static uint64_t pages[KVD_POOL_KINDS][TOKENS / KVD_PAGE_TOKENS + 64];
    const uint64_t bytes[][KVD_POOL_KINDS] = {{16384, 16384}};
    struct kvd_error err = {0};
    struct kvd_pool_config config = {.bytes = 1 << 28,
                                     .extent_bytes = 16 << 20,
                                     .max_sequences = 16,
                                     .max_namespaces = 2,
                                     .max_layouts = 2};
    struct kvd_layout g = test_layout(1, 64, 256);
    struct kvd_pool *pool = kvd_pool_new(&config, ops, &err);
    uint32_t ns, layout, n[KVD_POOL_KINDS], calls = 2000;
    uint64_t seq;
    must(!pool, &err);
    must(kvd_pool_namespace(pool, "bench", &ns, &err), &err);
    must(kvd_pool_layout(pool, ns, &g, bytes, &layout, &recycled, &err), &err);
    must(kvd_pool_seq_new(pool, ns, layout, &seq, &err), &err);
    for (uint64_t at = 0; at < TOKENS; at += PIECE) {
        struct kvd_pool_append a;
        struct kvd_pool_append_request by = {
            .seq = seq, .position = at, .tokens = PIECE, .layer_count = 1};
        must(kvd_pool_append_begin(pool, &by, &a, &err), &err);
        kvd_pool_append_commit(pool, &a);
    }
    double t = now();
    for (uint32_t i = 0; i < calls; i++) {
        struct kvd_pool_seq_lengths lengths;
        must(kvd_pool_seq_lengths(pool, seq, &lengths), &err);
    }
    double took = now() - t;
    t = now();
    for (uint32_t i = 0; i < calls; i++)
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            n[k] = kvd_pool_seq_pages(pool, seq, 0, k, NULL, 0);
            must(kvd_pool_seq_pages(pool, seq, 0, k, pages[k], n[k]) != n[k], &err);
        }
    double addresses = now() - t;
    printf("a call notes, of a sequence of %d tokens: lengths    %7.2f us\n", TOKENS,
           took * 1e6 / calls);
    printf("and %u addresses                                    %7.2f us\n", n[0] + n[1],
           addresses * 1e6 / calls);
    kvd_pool_free(&pool);
}

int main(int argc, char **argv)
{
    struct test_mem mem = {0};
    uint32_t live = argc > 1 ? (uint32_t)(atof(argv[1]) * 1e6) : 1000000;
    struct kvd_pool_mem_ops ops = {
        .ctx = &mem, .alloc = test_mem_alloc, .free = test_mem_free, .zero = test_mem_zero};
    // Pages of 4 KiB in extents of 256 MiB.
    struct kvd_pool_config config = {.bytes = (uint64_t)(live / 65536 + 2) << 28,
                                     .extent_bytes = 256 << 20,
                                     .max_sequences = 65536,
                                     .max_namespaces = 4,
                                     .max_layouts = 4};
    struct kvd_pool *pool = kvd_pool_new(&config, &ops, NULL);
    struct kvd_layout g = test_layout(1, 64, 256);
    const uint64_t bytes[][KVD_POOL_KINDS] = {{4096, 4096}};
    uint32_t ns, layout, *pages = malloc(live * sizeof(*pages));
    memset(pages, 0, live * sizeof(*pages));
    kvd_pool_namespace(pool, "bench", &ns, NULL);
    kvd_pool_layout(pool, ns, &g, bytes, &layout, &recycled, NULL);
    long base = resident();
    double t = now();
    for (uint32_t i = 0; i < live; i++)
        kvd_pool_page_alloc(pool, ns, layout, 0, KVD_POOL_CODEC, &pages[i], NULL);
    double fill = now() - t;
    long full = resident();
    t = now();
    uint64_t rng = 88172645463325252ull, pairs = 0;
    while (pairs < 20ull * live) {
        for (int i = 0; i < 1000; i++, pairs++) {
            rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
            uint32_t at = (uint32_t)(rng >> 33) % live;
            kvd_pool_page_unref(pool, pages[at]);
            kvd_pool_page_alloc(pool, ns, layout, 0, KVD_POOL_CODEC, &pages[at], NULL);
        }
    }
    double random = now() - t;
    t = now();
    for (uint64_t i = 0; i < 20ull * live; i++) {
        uint32_t page;
        kvd_pool_page_alloc(pool, ns, layout, 0, KVD_POOL_BF16, &page, NULL);
        kvd_pool_page_unref(pool, page);
    }
    double tight = now() - t;
    printf("\n# pool, one thread\n");
    printf("page allocate/free pairs, same page again and again   %6.1f M/s\n",
           20e-6 * live / tight);
    printf("page free/allocate pairs, random among %u live     %6.1f M/s\n", live,
           (double)pairs / random / 1e6);
    printf("first allocation of %u pages                        %6.1f M/s\n", live,
           live / fill / 1e6);
    printf("resident metadata of %u live pages                  %6.1f bytes a page\n", live,
           (double)(full - base) / live);
    printf("page table of a sequence                                 4.3 bytes a page\n");
    kvd_pool_free(&pool);
    free(pages);
    bench_notes(&ops);
    bench_vacate(&ops, live & ~1023u);
    return 0;
}
