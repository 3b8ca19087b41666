// The prefix index, one thread, in CPU time: looking up a long prompt among many, adding, evicting,
// hashing, and bytes a block. usage: bench_prefix [MILLIONS]
#include <errno.h>
#include <time.h>

#include "pool/prefix.h"
#include "proto/kvd_limits.h"
#include "tests/unit/random.h"

enum { PROMPT = 2048, ROUNDS = 200 }; // blocks of a prompt of 128K tokens

// Of this thread: what else runs on the machine is left out.
static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static int by_time(const void *a, const void *b)
{
    const double *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

static void report(const char *what, double *seconds, int n)
{
    qsort(seconds, (size_t)n, sizeof(*seconds), by_time);
    printf("%-58s %7.3f ms median, %.3f ms p99\n", what, seconds[n / 2] * 1e3,
           seconds[n * 99 / 100] * 1e3);
}

static void bench_hashing(const uint8_t domain[32])
{
    static uint32_t tokens[PROMPT * KVD_PAGE_TOKENS];
    static struct kvd_prefix_key keys[PROMPT];
    double seconds[2][ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        double t = now();
        kvd_prefix_keys_of_tokens(domain, NULL, tokens, PROMPT, keys, NULL);
        seconds[0][i] = now() - t;
        t = now();
        kvd_prefix_keys_of_blocks(domain, NULL, (const uint8_t *)tokens, 32, PROMPT, keys, NULL);
        seconds[1][i] = now() - t;
    }
    report("hashing the tokens of 2048 blocks, which adds", seconds[0], ROUNDS);
    report("hashing 2048 block keys of 32 bytes, which adds", seconds[1], ROUNDS);
}

int main(int argc, char **argv)
{
    uint32_t prompts = (uint32_t)((argc > 1 ? atof(argv[1]) : 1) * 1e6 / PROMPT) + 1;
    uint32_t blocks = prompts * PROMPT, done;
    struct kvd_prefix_config config = {blocks, 16, {0x9e3779b97f4a7c15, 0xd1b54a32d192ed03}};
    struct kvd_error err = {0};
    struct kvd_prefix *ix = kvd_prefix_new(&config, NULL, &err);
    struct kvd_prefix_key *keys = malloc((size_t)blocks * sizeof(*keys));
    uint32_t *values = calloc(blocks, sizeof(*values)), domain;
    uint8_t digest[32], layout[32] = {0};
    if (!ix || !keys || !values ||
        kvd_prefix_domain_digest("bench", layout, NULL, 0, digest, &err) ||
        kvd_prefix_domain(ix, digest, &domain, &err)) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    uint64_t rng = 88172645463325252ull;
    for (uint32_t i = 0; i < blocks; i++)
        for (int w = 0; w < 3; w++)
            keys[i].w[w] = kvd_rand(&rng);
    printf("\n# prefix index, one thread, CPU time, %u blocks\n", blocks);

    // As many workers would fill it: a part of each prompt in turn.
    enum { PART = 32 };
    uint32_t *last = malloc(prompts * sizeof(*last)), at[PART];
    double t = now();
    for (uint32_t from = 0; from < PROMPT; from += PART)
        for (uint32_t p = 0; p < prompts; p++) {
            const struct kvd_prefix_key *k = keys + (size_t)p * PROMPT + from;
            kvd_prefix_insert(ix, domain, from ? last[p] : KVD_PREFIX_NONE, k, values, PART, at,
                              &done, NULL);
            last[p] = at[PART - 1];
        }
    printf("%-58s %7.2f M blocks/s\n", "adding, empty to full", blocks / (now() - t) / 1e6);

    double seconds[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        uint32_t p = (uint32_t)(kvd_rand(&rng) >> 33) % prompts;
        struct kvd_prefix_query q = {
            .domain = domain, .n = PROMPT, .keys = keys + (size_t)p * PROMPT};
        t = now();
        kvd_prefix_match(ix, &q, 1, 0);
        seconds[i] = now() - t;
        if (q.found != PROMPT)
            return 1;
    }
    report("a match of 2048 blocks of 2048", seconds, ROUNDS);
    bench_hashing(digest);

    // A full index. Whoever looks up while others add waits for what came before: here room for
    // 1024 blocks, and those.
    enum { BATCH = 1024 };
    uint32_t rounds = KVD_MIN(blocks / BATCH, (uint32_t)ROUNDS), more = rounds * BATCH;
    double evict = 0, insert = 0;
    for (uint32_t r = 0; r < rounds; r++) {
        struct kvd_prefix_key *fresh = keys + (size_t)r * BATCH;
        uint32_t p = (uint32_t)(kvd_rand(&rng) >> 33) % prompts;
        struct kvd_prefix_query q = {
            .domain = domain, .n = PROMPT, .keys = keys + (size_t)p * PROMPT};
        for (uint32_t i = 0; i < BATCH; i++)
            fresh[i] = (struct kvd_prefix_key){{kvd_rand(&rng), kvd_rand(&rng), kvd_rand(&rng)}};
        double began = now();
        kvd_prefix_evict(ix, BATCH, KVD_PREFIX_EVICTED_INDEX, 1, NULL, NULL);
        t = now();
        kvd_prefix_insert(ix, domain, KVD_PREFIX_NONE, fresh, values, BATCH, NULL, &done, NULL);
        evict += t - began;
        insert += now() - t;
        kvd_prefix_match(ix, &q, 1, 0);
        seconds[r] = now() - began;
    }
    report("evicting 1024, adding 1024 and a match of 2048", seconds, (int)rounds);
    printf("%-58s %7.2f M blocks/s\n", "evicting from a full index", more / evict / 1e6);
    printf("%-58s %7.2f M blocks/s\n", "adding to a full index, after evicting as many",
           more / insert / 1e6);
    printf("%-58s %7.1f bytes a block\n", "the index, all of it",
           (double)kvd_prefix_region_bytes(&config) / blocks);
    kvd_prefix_free(&ix);
    free(keys);
    free(values);
    free(last);
    return 0;
}
