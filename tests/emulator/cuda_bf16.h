// bf16 of CUDA C++, as far as the kernels use it.
#ifndef KVD_EMULATOR_CUDA_BF16_H
#define KVD_EMULATOR_CUDA_BF16_H

#include "tests/emulator/cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float emulator_float(__nv_bfloat16 x)
{
    return emulator_bits<float>((uint32_t)x.bits << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x)
{
    uint32_t bits = emulator_bits<uint32_t>(x);
    if (x != x)
        return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b)
{
    return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float a)
{
    return __floats2bfloat162_rn(a, a);
}

inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b)
{
    return __floats2bfloat162_rn(emulator_float(a.x) * emulator_float(b.x),
                                 emulator_float(a.y) * emulator_float(b.y));
}

inline __nv_bfloat162 __habs2(__nv_bfloat162 a)
{
    return {{(uint16_t)(a.x.bits & 0x7fff)}, {(uint16_t)(a.y.bits & 0x7fff)}};
}

inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b)
{
    return __floats2bfloat162_rn(fmaxf(emulator_float(a.x), emulator_float(b.x)),
                                 fmaxf(emulator_float(a.y), emulator_float(b.y)));
}

inline float __low2float(__nv_bfloat162 a)
{
    return emulator_float(a.x);
}
inline float __high2float(__nv_bfloat162 a)
{
    return emulator_float(a.y);
}

#endif
