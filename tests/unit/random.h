#ifndef KVD_TESTS_RANDOM_H
#define KVD_TESTS_RANDOM_H

#include <stdint.h>

// xorshift64*: reproducible, seeded per test.
static inline uint64_t kvd_rand(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

#endif
