// Tiers: blocks of 64 tokens put and got, in GB/s and the 99th percentile of one operation, beside
// a plain copy of files of that size. usage: bench_tier [-n BLOCKS] [-b BYTES] DIRECTORY
// [REDIS-URL]
#include <fcntl.h>

#include "daemon/tier/directory.h"
#include "daemon/tier/host.h"
#include "daemon/tier/pinned.h"
#ifdef KVD_REDIS
#include "daemon/tier/redis.h"
#endif

enum { DEPTH = 8, MOST = 100000 };

static const uint8_t layout[32] = "a layout";
static uint64_t block_bytes = 36ull * 8 * 4608; // Qwen3-8B: 36 layers, 8 kv heads, int2
static uint32_t blocks = 400;
static struct kvd_tier_namer *namer;

struct round {
    uv_loop_t *loop;
    struct kvd_tier *tier;
    struct kvd_block *block; // what is put; NULL: blocks are got
    uint32_t asked, answered, failed;
    uint64_t *took; // ns
};

struct one {
    struct round *round;
    uint32_t number;
    uint64_t began;
};

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void report(const char *what, uint64_t ns, uint64_t *took, uint32_t failed)
{
    qsort(took, blocks, sizeof(*took), by_size);
    printf("%-34s %7.2f GB/s   p50 %8.3f ms   p99 %8.3f ms%s\n", what,
           (double)blocks * (double)block_bytes / (double)ns, (double)took[blocks / 2] / 1e6,
           (double)took[(uint64_t)blocks * 99 / 100] / 1e6, failed ? "   SOME FAILED" : "");
}

static void ask(struct round *r);

static void on_done(void *ctx, const struct kvd_tier_reply *reply)
{
    struct one *one = ctx;
    struct round *r = one->round;
    struct kvd_block *got = reply->block;
    r->took[one->number] = uv_hrtime() - one->began;
    r->failed += reply->result != KVD_TIER_OK;
    r->answered++;
    kvd_block_unref(&got);
    free(one);
    ask(r);
}

static void ask(struct round *r)
{
    if (r->asked == blocks)
        return;
    struct one *one = malloc(sizeof(*one));
    struct kvd_block_name name = {.plane = r->asked};
    struct kvd_tier_key key;
    if (!one || kvd_tier_key_of(namer, &name, &key, NULL))
        abort();
    *one = (struct one){r, r->asked++, uv_hrtime()};
    if (r->block) {
        struct kvd_block *b = kvd_block_new(block_bytes); // each is sealed on its own
        if (!b)
            abort();
        memcpy(b->payload, r->block->payload, block_bytes);
        one->began = uv_hrtime();
        kvd_tier_put(r->tier, &key, layout, b, on_done, one);
        kvd_block_unref(&b);
    } else {
        kvd_tier_get(r->tier, &key, layout, block_bytes, on_done, one);
    }
}

static void run_round(uv_loop_t *loop, struct kvd_tier *t, struct kvd_block *block,
                      const char *what)
{
    struct round r = {.loop = loop, .tier = t, .block = block};
    r.took = calloc(blocks, sizeof(*r.took));
    uint64_t began = uv_hrtime();
    for (uint32_t i = 0; i < DEPTH; i++)
        ask(&r);
    while (r.answered < blocks)
        uv_run(loop, UV_RUN_ONCE);
    report(what, uv_hrtime() - began, r.took, r.failed);
    free(r.took);
}

static void bench(const struct kvd_tier_ops *ops, void *state, struct kvd_block *block)
{
    struct kvd_tier_settings settings = {.timeout_ms = 60000,
                                         .memory = kvd_pinned_new(NULL, 32 << 20)};
    uv_loop_t loop;
    struct kvd_error err = {0};
    char what[64];
    uv_loop_init(&loop);
    struct kvd_tier *t = state ? kvd_tier_new(&loop, ops, state, &settings, &err) : NULL;
    if (!t) {
        fprintf(stderr, "%s: %s\n", ops->name, err.text);
        exit(1);
    }
    snprintf(what, sizeof(what), "%s, put", ops->name);
    run_round(&loop, t, block, what);
#ifdef KVD_REDIS
    if (ops == &kvd_tier_redis_ops) // into memory that the server has
        run_round(&loop, t, block, "redis, put again");
#endif
    snprintf(what, sizeof(what), "%s, get%s", ops->name,
             ops == &kvd_tier_host_ops ? " (nothing is copied)" : "");
    run_round(&loop, t, NULL, what);
    kvd_tier_close(&t);
    uv_run(&loop, UV_RUN_DEFAULT);
    uv_loop_close(&loop);
    kvd_pinned_free(&settings.memory);
}

// One file after the other through the page cache, as cp does it: neither checks nor renames.
static void plain_files(const char *directory, struct kvd_block *block, bool writing)
{
    uint64_t *took = calloc(blocks, sizeof(*took));
    uint32_t failed = 0;
    uint64_t began = uv_hrtime();
    for (uint32_t i = 0; took && i < blocks; i++) {
        char path[512];
        uint64_t start = uv_hrtime();
        snprintf(path, sizeof(path), "%s/plain-%u", directory, i);
        int fd = writing ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : open(path, O_RDONLY);
        ssize_t n = writing ? write(fd, block->payload, block_bytes)
                            : read(fd, block->payload, block_bytes);
        failed += n != (ssize_t)block_bytes;
        close(fd);
        took[i] = uv_hrtime() - start;
    }
    report(writing ? "plain files, write" : "plain files, read (page cache)", uv_hrtime() - began,
           took, failed);
    free(took);
}

int main(int argc, char **argv)
{
    int option;
    struct kvd_error err = {0};
    while ((option = getopt(argc, argv, "n:b:")) != -1) {
        if (option == 'n')
            blocks = (uint32_t)atoi(optarg);
        else if (option != 'b' || kvd_parse_size(optarg, &block_bytes))
            return 2;
    }
    struct kvd_block *block = kvd_block_new(block_bytes);
    namer = kvd_tier_namer_new(NULL, &err);
    if (optind == argc || blocks < DEPTH || blocks > MOST || !block || !namer) {
        fprintf(stderr, "usage: bench_tier [-n BLOCKS] [-b BYTES] DIRECTORY [REDIS-URL]\n");
        return 2;
    }
    for (uint64_t i = 0; i + 8 <= block_bytes; i += 8) { // nothing that a disk could compress
        uint64_t word = (i + 1) * 0x9e3779b97f4a7c15ull;
        word = (word ^ word >> 29) * 0xbf58476d1ce4e5b9ull;
        memcpy(block->payload + i, &word, 8);
    }
    printf("# tiers: %u blocks of %" PRIu64 " bytes, %d at once\n", blocks, block_bytes, DEPTH);
    bench(&kvd_tier_host_ops, kvd_tier_host_new((uint64_t)blocks * block_bytes), block);
    bench(&kvd_tier_directory_ops, kvd_tier_directory_new(argv[optind], 1ull << 40, 0, &err),
          block);
    plain_files(argv[optind], block, true);
    plain_files(argv[optind], block, false);
#ifdef KVD_REDIS
    if (optind + 1 < argc)
        bench(&kvd_tier_redis_ops, kvd_tier_redis_new(argv[optind + 1], "", &err), block);
#endif
    kvd_block_unref(&block);
    kvd_tier_namer_free(&namer);
    return 0;
}
