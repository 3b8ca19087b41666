// Pool: page allocate/free pairs a second, and metadata of a million live pages. usage: bench_pool
// [MILLIONS]
#include <errno.h>
#include <time.h>

#include "tests/unit/pool_fixture.h"

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
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
    return 0;
}
