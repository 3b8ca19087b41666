// Random values and bf16, for workers that know no header but libkvd's.
#ifndef KVD_TESTS_E2E_RANDOM_H
#define KVD_TESTS_E2E_RANDOM_H

#include <math.h>
#include <stdint.h>
#include <string.h>

// Reference arithmetic goes over arrays of the test's own, and would be most of what sanitizers
// have to look at.
#define REFERENCE __attribute__((no_sanitize("address", "thread", "undefined")))

static uint64_t rng = 88172645463325252ull;
static inline double uniform(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (double)(rng >> 11) * 0x1p-53;
}
static inline float normal(void)
{
    return (float)(sqrt(-2 * log(uniform() + 1e-300)) * cos(6.283185307179586 * uniform()));
}
static inline uint16_t bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
REFERENCE static inline float widen(uint16_t b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

#endif
