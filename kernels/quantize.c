#include "kernels/quantize.h"

#include <math.h>

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

// The n-th largest of |x|, n >= 1. Insertion into a short sorted list: n is about 5 % of dim.
static float nth_largest_abs(const float *x, uint32_t dim, uint32_t n)
{
    float top[KVD_MAX_HEAD_DIM];
    uint32_t have = 0;
    for (uint32_t i = 0; i < dim; i++) {
        float a = fabsf(x[i]);
        if (have == n && !(a > top[n - 1]))
            continue;
        uint32_t j = have < n ? have++ : n - 1;
        for (; j > 0 && top[j - 1] < a; j--)
            top[j] = top[j - 1];
        top[j] = a;
    }
    return top[n - 1];
}

void kvd_int2_quantize(const float *x, uint32_t dim, float ratio, uint8_t *codes,
                       struct kvd_param *param)
{
    float limit = INFINITY;
    uint32_t index = (uint32_t)((double)ratio * dim);
    if (ratio < 1.0f && index < dim)
        limit = nth_largest_abs(x, dim, dim - index);
    float lo = INFINITY, hi = -INFINITY;
    for (uint32_t i = 0; i < dim; i++) {
        float c = fminf(fmaxf(x[i], -limit), limit);
        lo = fminf(lo, c);
        hi = fmaxf(hi, c);
    }
    float scale = (hi - lo) / 3.0f;
    for (uint32_t i = 0; i < dim; i++) {
        float c = fminf(fmaxf(x[i], -limit), limit);
        float q = scale > 0 ? floorf((c - lo) / scale + 0.5f) : 0;
        codes[i] = q >= 3 ? 3 : q >= 1 ? (uint8_t)q : 0;
    }
    *param = (struct kvd_param){kvd_f32_to_fp16(scale), kvd_f32_to_fp16(lo)};
}

typedef struct kvd_code_place place_fn(uint32_t dim, uint32_t token, uint32_t channel);

static void pack(uint8_t *base, place_fn *place, uint32_t dim, uint32_t token, const uint8_t *codes)
{
    for (uint32_t c = 0; c < dim; c++) {
        struct kvd_code_place p = place(dim, token, c);
        base[p.byte] = (uint8_t)((base[p.byte] & ~(3u << p.bit)) | (unsigned)codes[c] << p.bit);
    }
}

static void unpack(const uint8_t *base, place_fn *place, uint32_t dim, uint32_t token,
                   struct kvd_param param, float *x)
{
    float scale = kvd_fp16_to_f32(param.scale), min = kvd_fp16_to_f32(param.min);
    for (uint32_t c = 0; c < dim; c++) {
        struct kvd_code_place p = place(dim, token, c);
        x[c] = scale * (float)(base[p.byte] >> p.bit & 3) + min;
    }
}

static void set_param(uint8_t *tile, uint32_t dim_k, uint32_t dim_v, bool v, uint32_t token,
                      struct kvd_param param)
{
    uint8_t *at = tile + 16 * (dim_k + dim_v) + (v ? KVD_PARAM_BYTES : 0);
    memcpy(at + kvd_param_index(token) * sizeof(param), &param, sizeof(param));
}

void kvd_int2_pack_k(uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                     const uint8_t *codes, struct kvd_param param)
{
    pack(tile, kvd_place_k, dim_k, token, codes);
    set_param(tile, dim_k, dim_v, false, token, param);
}

void kvd_int2_pack_v(uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                     const uint8_t *codes, struct kvd_param param)
{
    pack(tile + kvd_int2_codes_bytes(dim_k), kvd_place_v, dim_v, token, codes);
    set_param(tile, dim_k, dim_v, true, token, param);
}

void kvd_int2_unpack_k(const uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                       float *x)
{
    unpack(tile, kvd_place_k, dim_k, token,
           kvd_int2_params(tile, dim_k, dim_v, false)[kvd_param_index(token)], x);
}

void kvd_int2_unpack_v(const uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                       float *x)
{
    unpack(tile + kvd_int2_codes_bytes(dim_k), kvd_place_v, dim_v, token,
           kvd_int2_params(tile, dim_k, dim_v, true)[kvd_param_index(token)], x);
}
