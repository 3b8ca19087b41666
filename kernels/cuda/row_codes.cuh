// One row's codes and parameters: kernels/quantize.c on a GPU, eight rows at a time, a row in four lanes.
#ifndef KVD_KERNELS_CUDA_ROW_CODES_CUH
#define KVD_KERNELS_CUDA_ROW_CODES_CUH

#include "kernels/cuda/clip.cuh"

#include <climits>

namespace kvd
{

// Codes and parameters of a row: `param` as stored, 2 or 4 bytes. Even levels, N of them: `inverse` is
// 1 / (N scale), `offset` -min / (N scale) + half a code. Others: `offset` is the levels' centre, `inverse`
// 1 / scale.
struct quantizer {
    float offset, inverse;
    uint32_t param;
};

// Of codecs with even levels, from 0 to TOP. HALF_CODE is more than half an Nth by more than sums here are off by, so that ties
// go up, as on the CPU (code_range in kernels/quantize.c); ALL is a little less than N, so that 1 does not.
template <int CODEC> struct even_levels {
    static constexpr int TOP = CODEC == INT4 ? 15 : 3;
    static constexpr float N = TOP + 1, MIDDLE = TOP * 0.5f, STEP = CODEC == INT4 ? KVD_EVEN_STEP_4 : KVD_EVEN_STEP;
    static constexpr float HALF_CODE = 0.5f / N + 0x1p-22f, ALL = N - N * 0x1p-23f;
};

__device__ inline float bounded(float x, float top)
{
    return fminf(fmaxf(x, -top), top);
}

__device__ inline uint32_t pack_param(float scale, float min)
{
    return pack_fp16(fminf(scale, 65504.0f), bounded(min, 65504.0f));
}

// int2c's bytes (kernels/quantize.c), and its codes by what they say. Values are `unit` times x.
__device__ inline quantizer quantize_bytes(float drawn, float centre, float gain, float unit)
{
    quantizer q = {0, 0, 0};
    drawn = fmaxf(drawn, fabsf(centre) * 8 / 127);
    if (!(drawn > 0))
        return q;
    int n = 128 + (int)fminf(fmaxf(rintf(8 * log2f(drawn)), -127.0f), 127.0f);
    float stored = exp2f((float)(n - 128) * 0.125f);
    int eighths = (int)bounded(rintf(centre * 8 / stored), 127.0f);
    float scale = stored / gain, min = stored * ((float)eighths * 0.125f) - 1.5f * scale;
    q.inverse = 0.25f / scale;
    q.offset = fmaf(-min, q.inverse, even_levels<INT2C>::HALF_CODE);
    q.inverse *= unit;
    q.param = (uint32_t)n | ((uint32_t)eighths & 255) << 8;
    return q;
}

// Least and greatest of a row, by the bits of floats. As signed integers the greatest is the greatest float, unless
// all are negative; as unsigned ones it is the least float, if any is negative.
template <int N, typename X> __device__ inline float2 range_of(X x)
{
    int high[2] = {INT_MIN, INT_MIN};
    uint32_t low[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        uint32_t a = __float_as_uint(x(i)), b = __float_as_uint(x(i + 1));
        high[i / 2 % 2] = __vimax3_s32((int)a, (int)b, high[i / 2 % 2]);
        low[i / 2 % 2] = __vimax3_u32(a, b, low[i / 2 % 2]);
    }
    int top = quad_max(max(high[0], high[1]));
    uint32_t bottom = quad_max(max(low[0], low[1]));
    bool one_sign = top < 0 || (int)bottom >= 0;
    if (__any_sync(~0u, one_sign)) {
        uint32_t least = clip_search<4 * N>::nearest(x, 0, true);
        if (top < 0)
            top = (int)(least | 0x80000000);
        else if (one_sign)
            bottom = least;
    }
    return make_float2(__uint_as_float(bottom), __int_as_float(top));
}

// x / N, N small, correctly rounded, without a division's branch.
template <int N> __device__ inline float divided(float x)
{
    constexpr float y = 1 / (float)N;
    return fmaf(fmaf(-N, x * y, x), y, x * y);
}

template <int CODEC, int N, typename X>
__device__ inline quantizer quantize_evenly(X x, const clip_search<4 * N> &clip, float gain, float unit)
{
    using even = even_levels<CODEC>;
    auto [low, high] = range_of<N>(x);
    if (__any_sync(~0u, clip.n > 0)) { // uniform, and known to be
        float limit = clip(x);
        low = bounded(low, limit);
        high = bounded(high, limit);
    }
    float scale = divided<even::TOP>(high - low), drawn = scale * gain;
    if (CODEC == INT2C)
        return quantize_bytes(unit * drawn, unit * (low + 1.5f * scale), gain, unit);
    float inverse = scale > 0 ? __fdividef(1 / even::N, scale) : 0;
    return {fmaf(-low, inverse, even::HALF_CODE), inverse,
            pack_param(unit * drawn, unit * (low + even::MIDDLE * (scale - drawn)))};
}

// The code of the level nearest to x: a sign and how many thresholds lie below |x|.
template <int BITS> __device__ inline uint32_t nearest_level(const quantizer &q, float x)
{
    float d = x - q.offset, a = fabsf(d) * q.inverse;
    uint32_t code = d < 0 ? 1u << (BITS - 1) : 0;
    constexpr float t2[] = {KVD_THRESHOLDS_2}, t3[] = {KVD_THRESHOLDS_3}, t4[] = {KVD_THRESHOLDS_4};
#pragma unroll
    for (int i = 0; i < (1 << (BITS - 1)) - 1; i++)
        code += a > (BITS == 2 ? t2[i] : BITS == 3 ? t3[i] : t4[i]);
    return code;
}

// The level nearest to x, in the unit of levels.
template <int BITS> __device__ inline float level_at(const quantizer &q, float x)
{
    constexpr float t2[] = {KVD_THRESHOLDS_2}, t3[] = {KVD_THRESHOLDS_3}, t4[] = {KVD_THRESHOLDS_4};
    constexpr float m2[] = {KVD_MAGNITUDES_2}, m3[] = {KVD_MAGNITUDES_3}, m4[] = {KVD_MAGNITUDES_4};
    auto threshold = [&](int i) { return BITS == 2 ? t2[i] : BITS == 3 ? t3[i] : t4[i]; };
    auto magnitude = [&](int i) { return BITS == 2 ? m2[i] : BITS == 3 ? m3[i] : m4[i]; };
    float d = x - q.offset, a = fabsf(d) * q.inverse, level = magnitude(0);
#pragma unroll
    for (int i = 0; i < (1 << (BITS - 1)) - 1; i++)
        level = a > threshold(i) ? magnitude(i + 1) : level;
    return d < 0 ? -level : level;
}

// An even code of x in the low bits: floor((x - min) / scale + 0.5) from 0 to TOP. An Nth of it, saturated, comes
// times N as the low bits of a sum that is rounded down.
template <int CODEC> __device__ inline uint32_t even_code(const quantizer &q, float x)
{
    return __float_as_uint(__fmaf_rd(__saturatef(fmaf(x, q.inverse, q.offset)), even_levels<CODEC>::ALL, 0x1p23f));
}

// About 0 (turboquant).
template <int BITS, int N, typename X> __device__ inline quantizer quantize_about_zero(X x, uint32_t kind)
{
    float squares = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        squares = fmaf(x(i), x(i), squares);
    squares = quad_sum(squares);
    float scale = sqrtf(squares / (4 * N));
    quantizer q = {0, scale > 0 ? 1 / scale : 0, 0};
    if (kind != KVD_SCALE_PUBLISHED) {
        float level_squares = 0, products = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            float l = level_at<BITS>(q, x(i));
            level_squares = fmaf(l, l, level_squares);
            products = fmaf(l, x(i), products);
        }
        level_squares = quad_sum(level_squares), products = quad_sum(products);
        scale = products > 0 ? kind == KVD_SCALE_UNBIASED ? squares / products : products / level_squares : 0;
    }
    q.param = pack_param(scale, 0) & 0xffff;
    return q;
}

// int2c with scale and min of the codes of q: kernels/quantize.c. `gain`: by how much the scale is more than that of
// the codes.
template <int N, typename X> __device__ inline quantizer quantize_bytes_fitted(X x, float scale, float min, float gain)
{
    quantizer q = quantize_bytes(scale, min + 1.5f * scale, gain, 1);
    uint32_t n = q.param & 255;
    if (n == 0)
        return q;
    float stored = exp2f((float)((int)n - 128) * 0.125f), sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += x(i) - stored * ((float)(even_code<INT2C>(q, x(i)) & 3) - 1.5f);
    int eighths = (int)bounded(rintf(quad_sum(sum) / (4 * N) * 8 / stored), 127.0f);
    q.param = n | ((uint32_t)eighths & 255) << 8;
    return q;
}

// About the mean, refitted twice: int2-lm, and the even codecs where their scale is not the published one.
template <int CODEC, int N, typename X> __device__ inline quantizer quantize_about_mean(X x, uint32_t kind)
{
    constexpr bool EVEN = !has_levels(CODEC);
    using even = even_levels<CODEC>;
    constexpr float n = 4 * N;
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        sum += x(i);
    float average = quad_sum(sum) / n;
#pragma unroll
    for (int i = 0; i < N; i++)
        squares = fmaf(x(i) - average, x(i) - average, squares);
    squares = quad_sum(squares);
    float scale = sqrtf(squares / n) * (EVEN ? even::STEP : 1);
    float min = EVEN ? average - even::MIDDLE * scale : average;
    float gain = 1;
    quantizer q = {0, 0, 0};
#pragma unroll 1
    for (int k = 0;; k++) {
        if (k < 3) {
            q.inverse = scale > 0 ? (EVEN ? 1 / even::N : 1) / scale : 0;
            q.offset = EVEN ? fmaf(-min, q.inverse, even::HALF_CODE) : min;
        }
        if (k == (kind == KVD_SCALE_UNBIASED ? 3 : 2))
            break;
        float levels = 0, level_squares = 0, products = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            float l = EVEN ? (float)(even_code<CODEC>(q, x(i)) & even::TOP) : level_at<2>(q, x(i));
            levels += l;
            level_squares = fmaf(l, l, level_squares);
            products = fmaf(l, x(i) - average, products);
        }
        levels = quad_sum(levels), level_squares = quad_sum(level_squares), products = quad_sum(products);
        float spread = level_squares - levels * levels / n;
        if (k == 2) { // the codes stay
            float fitted = products > 0 ? squares / products : 0;
            gain = fitted > 0 ? fitted / scale : 1;
            scale = fitted;
            min = average - scale * levels / n;
        } else if (spread > 0 && scale > 0) {
            scale = products / spread;
            min = average - scale * levels / n;
        }
    }
    if constexpr (CODEC == INT2C)
        return quantize_bytes_fitted<N>(x, scale, min, gain);
    q.param = pack_param(scale, min);
    return q;
}

// Of codecs with levels. Squares stay finite; fp16 parameters end far below.
template <int CODEC, int N, typename X> __device__ inline quantizer fit_levels(X x, uint32_t kind)
{
    auto y = [&](int i) { return bounded(x(i), 0x1p40f); };
    if constexpr (CODEC == KVD_CODEC_INT2_LM || !has_levels(CODEC))
        return quantize_about_mean<CODEC, N>(y, kind);
    else
        return quantize_about_zero<code_bits(CODEC), N>(y, kind);
}

// Codes of two values, each in the low bits of a half of a word.
template <int CODEC> __device__ inline uint32_t codes_of(const quantizer &q, float x, float y)
{
    auto code = [&](float z) {
        if constexpr (has_levels(CODEC))
            return nearest_level<code_bits(CODEC)>(q, bounded(z, 0x1p40f));
        return even_code<CODEC>(q, z);
    };
    return __byte_perm(code(x), code(y), 0x5410);
}

} // namespace kvd

#endif
