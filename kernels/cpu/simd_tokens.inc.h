// What is done to a row's 64 values of a tile, one a token, for simd.inc.h.
#include <cpuid.h>

// Whether the processor converts fp16: clang's __builtin_cpu_supports has no name for that.
static bool converts_halves(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

// The fp16 in the low halves of eight words. Here AVX2 itself is used; all instruction sets that
// include this file have it and F16C.
static inline void low_halves(__m256i words, float *out)
{
    __m256i x = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    x = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(x)));
}

#ifdef V_HALVES
// The same with vectors of 16: what is stored in halves would be waited for when it is loaded
// whole.
static inline void params_chunk(const uint8_t *from, float *scale, float *min)
{
    v_halves(from, scale, min);
}
#else
// Parameters of fp16: of 16 tokens, g and g + 8 side by side. `min` is NULL where there is none.
static inline void params_chunk(const uint8_t *from, float *scale, float *min)
{
    const __m256i *at = (const __m256i *)(const void *)from;
    __m256i a = _mm256_loadu_si256(at);
    if (!min) {
        low_halves(a, scale);
        low_halves(_mm256_srli_epi32(a, 16), scale + 8);
        return;
    }
    __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(_mm256_loadu_si256(at + 1));
    __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0x88)),
            odd = _mm256_castps_si256(_mm256_shuffle_ps(x, y, 0xdd));
    even = _mm256_permute4x64_epi64(even, 0xd8);
    odd = _mm256_permute4x64_epi64(odd, 0xd8);
    low_halves(even, scale);
    low_halves(odd, scale + 8);
    low_halves(_mm256_srli_epi32(even, 16), min);
    low_halves(_mm256_srli_epi32(odd, 16), min + 8);
}
#endif

static void simd_params(uint32_t codec, const uint8_t *params, struct kvd_cpu_params *out)
{
    vf by = v_set1(kvd_cpu_centre(codec));
    struct kvd_affine each[KVD_PAGE_TOKENS];
#ifdef V_HALVES
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS && codec == KVD_CODEC_INT2C; t += 16)
        v_bytes(params + 2 * t, out->scale + t, out->centre + t);
    if (codec == KVD_CODEC_INT2C)
        return;
#endif
    if (codec == KVD_CODEC_INT2C) { // whose parameters are bytes
        kvd_params_read(codec, params, KVD_PAGE_TOKENS, each);
        for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
            out->scale[t] = each[t].scale;
            out->centre[t] = each[t].min;
        }
    } else {
        bool both = kvd_codec_param_bytes(codec) == 4;
        for (uint32_t t = 0; t < KVD_PAGE_TOKENS && !both; t += V)
            v_store(out->centre + t, v_zero());
        for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += 16)
            params_chunk(params + t * (both ? 4 : 2), out->scale + t,
                         both ? out->centre + t : NULL);
    }
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += V)
        v_store(out->centre + t, v_fma(by, v_load(out->scale + t), v_load(out->centre + t)));
}

static void simd_affine(float *s, const struct kvd_cpu_params *p, float q_sum, float q_mean)
{
    vf sum = v_set1(q_sum), mean = v_set1(q_mean);
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += V) {
        vf add = v_fma(v_load(p->centre + t), sum, mean);
        v_store(s + t, v_fma(v_load(p->scale + t), v_load(s + t), add));
    }
}

static float simd_logits(float *s, float by)
{
    vf nan = v_zero();
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += V) {
        vf x = v_mul(v_load(s + t), v_set1(by));
        v_store(s + t, x);
        nan = v_fma(x, v_zero(), nan);
    }
    return v_sum(nan);
}

static float simd_top(const float *s, float top)
{
    vf most = v_set1(top);
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += V)
        most = v_max(v_load(s + t), most);
    return v_top(most);
}

static float simd_whole(float *s, const struct kvd_cpu_params *p, float q_sum, float q_mean,
                        float by, float *top)
{
    vf sum = v_set1(q_sum), mean = v_set1(q_mean), nan = v_zero(), most = v_set1(*top);
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += V) {
        vf add = v_fma(v_load(p->centre + t), sum, mean);
        vf x = v_mul(v_fma(v_load(p->scale + t), v_load(s + t), add), v_set1(by));
        v_store(s + t, x);
        nan = v_fma(x, v_zero(), nan);
        most = v_max(x, most);
    }
    *top = v_top(most);
    return v_sum(nan);
}

static float simd_weigh(float *s, const struct kvd_cpu_params *p)
{
    vf sum = v_zero();
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t += V) {
        vf x = v_load(s + t);
        sum = v_fma(x, v_load(p->centre + t), sum);
        v_store(s + t, v_mul(x, v_load(p->scale + t)));
    }
    return v_sum(sum);
}

static float simd_exp_sum(float *s, float m)
{
    vf sum = v_zero(), minus = v_set1(-m);
    for (uint32_t i = 0; i < KVD_PAGE_TOKENS; i += V) {
        vf x = v_exp(v_add(v_load(s + i), minus));
        v_store(s + i, x);
        sum = v_add(sum, x);
    }
    return v_sum(sum);
}

static void simd_scale(float *x, uint32_t n, float f)
{
    for (uint32_t i = 0; i < n; i += V)
        v_store(x + i, v_mul(v_load(x + i), v_set1(f)));
}
