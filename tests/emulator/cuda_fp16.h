// Sixteen-bit floats of CUDA C++, as far as the kernels use them.
#ifndef KVD_EMULATOR_CUDA_FP16_H
#define KVD_EMULATOR_CUDA_FP16_H

#include "tests/emulator/cuda_runtime.h"

struct __half {
    _Float16 x;
};

struct __half2 {
    __half x, y;
};

inline __half __float2half_rn(float x)
{
    return {(_Float16)x};
}
inline float __half2float(__half x)
{
    return (float)x.x;
}
inline __half2 __floats2half2_rn(float a, float b)
{
    return {{(_Float16)a}, {(_Float16)b}};
}
inline __half2 __float2half2_rn(float a)
{
    return __floats2half2_rn(a, a);
}
inline float2 __half22float2(__half2 h)
{
    return {(float)h.x.x, (float)h.y.x};
}
inline __half __ushort_as_half(unsigned short bits)
{
    return emulator_bits<__half>(bits);
}
inline unsigned short __half_as_ushort(__half h)
{
    return emulator_bits<unsigned short>(h);
}
inline __half2 __hmul2(__half2 a, __half2 b)
{
    return {{(_Float16)(a.x.x * b.x.x)}, {(_Float16)(a.y.x * b.y.x)}};
}

#endif
