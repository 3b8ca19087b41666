#include "kernels/format.h"

uint16_t kvd_f32_to_fp16(float f)
{
    uint32_t u;
    f = f > 65504.0f ? 65504.0f : f < -65504.0f ? -65504.0f : f;
    memcpy(&u, &f, sizeof(u));
    uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u < 0x38800000) { // below 2^-14: adding 0.5 rounds to multiples of 2^-24
        f = (f < 0 ? -f : f) + 0.5f;
        memcpy(&u, &f, sizeof(u));
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    u += 0xc8000fff + (u >> 13 & 1); // rebias by -112 and round to even
    return (uint16_t)(sign | u >> 13);
}
