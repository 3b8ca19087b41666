// Floats as fixed-point numbers, relative to the largest of some.
#ifndef KVD_KERNELS_CPU_FIXED_H
#define KVD_KERNELS_CPU_FIXED_H

#include "kernels/cpu/cpu.h"

#include <math.h>

// The powers of two by which numbers are multiplied to have so many bits and a sign, and half of
// what takes products back. NaN where a number is not finite.
struct digit_scale {
    float to, from;
};

// largest: of the numbers' bits without their signs.
static inline struct digit_scale digit_scale_of(uint32_t largest, uint32_t bits)
{
    uint32_t exponent = KVD_MAX(largest >> 23, 40u), to = (253 + bits - exponent) << 23,
             from = (exponent - bits) << 23;
    struct digit_scale s = {0, NAN};
    if (exponent == 255)
        return s;
    memcpy(&s.to, &to, sizeof(to));
    memcpy(&s.from, &from, sizeof(from));
    return s;
}

#endif
