#ifndef KVD_TESTS_RANDOM_H
#define KVD_TESTS_RANDOM_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

// xorshift64*: reproducible, seeded per test.
static inline uint64_t kvd_rand(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

// A seed that is printed, so that a failure can be repeated with KVD_TEST_SEED.
static inline uint64_t kvd_test_seed(const char *what)
{
    const char *env = getenv("KVD_TEST_SEED");
    uint64_t seed =
        env ? strtoull(env, NULL, 0) : (uint64_t)getpid() * 0x9e3779b97f4a7c15ull ^ 0x1234567;
    printf("%s: KVD_TEST_SEED=%llu\n", what, (unsigned long long)seed);
    fflush(stdout);
    return seed | 1;
}

// Reference arithmetic goes over arrays of the test's own, and would be most of what sanitizers
// have to look at.
#define KVD_REFERENCE __attribute__((no_sanitize("address", "thread", "undefined")))

// Sanitizers are slow: with KVD_TEST_SHARE=N all but a random Nth of the cases are left out.
static inline bool kvd_test_left_out(void)
{
    static uint64_t rng;
    const char *share = getenv("KVD_TEST_SHARE");
    uint64_t n = share ? strtoull(share, NULL, 10) : 0;
    if (n < 2)
        return false;
    if (rng == 0)
        rng = kvd_test_seed("share");
    return kvd_rand(&rng) % n != 0;
}

// And where cases are rounds of random ones, an Nth of the rounds, of which two are left.
static inline uint32_t kvd_test_rounds(uint32_t rounds)
{
    const char *share = getenv("KVD_TEST_SHARE");
    uint64_t n = share ? strtoull(share, NULL, 10) : 0;
    return n < 2 ? rounds : rounds / n > 2 ? (uint32_t)(rounds / n) : 2;
}

#endif
