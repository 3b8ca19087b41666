// Inner loops for AVX-512 (F, BW, DQ, VL): 16 floats a vector.
#include "kernels/cpu/amx.h"
#include "kernels/cpu/vnni.h"

#include <immintrin.h>

#define V 16
typedef __m512 vf;
typedef __m512i vi;
static inline vf v_zero(void)
{
    return _mm512_setzero_ps();
}
static inline vf v_set1(float x)
{
    return _mm512_set1_ps(x);
}
static inline vf v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
static inline void v_store(float *p, vf v)
{
    _mm512_storeu_ps(p, v);
}
static inline vf v_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
static inline vf v_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
static inline vf v_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
static inline vf v_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
static inline vi v_words(const uint8_t *p)
{
    return _mm512_loadu_si512(p);
}
static inline void v_words_store(uint8_t *p, vi w)
{
    _mm512_storeu_si512(p, w);
}
static inline vi v_down(vi w, unsigned n)
{
    return _mm512_srli_epi32(w, n);
}
// Of bytes, words of 16 bits and of 32, within lanes of 128 bits where they change places.
static inline vi v_words0(void)
{
    return _mm512_setzero_si512();
}
static inline vi v_set1_32(int x)
{
    return _mm512_set1_epi32(x);
}
static inline vi v_bytes1(char x)
{
    return _mm512_set1_epi8(x);
}
static inline vi v_everywhere(const uint8_t *lane)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)lane));
}
static inline vi v_pick8(vi w, vi from)
{
    return _mm512_shuffle_epi8(w, from);
}
static inline vi v_both(vi a, vi b)
{
    return _mm512_and_si512(a, b);
}
static inline vi v_add8(vi a, vi b)
{
    return _mm512_add_epi8(a, b);
}
static inline vi v_add16(vi a, vi b)
{
    return _mm512_add_epi16(a, b);
}
static inline vi v_sub16(vi a, vi b)
{
    return _mm512_sub_epi16(a, b);
}
static inline vi v_down16(vi w, unsigned n)
{
    return _mm512_srli_epi16(w, n);
}
static inline vi v_up16(vi w, unsigned n)
{
    return _mm512_slli_epi16(w, n);
}
static inline vi v_add32(vi a, vi b)
{
    return _mm512_add_epi32(a, b);
}
static inline vi v_sub32(vi a, vi b)
{
    return _mm512_sub_epi32(a, b);
}
static inline vi v_up32(vi w, unsigned n)
{
    return _mm512_slli_epi32(w, n);
}
static inline vi v_low16(vi a, vi b)
{
    return _mm512_unpacklo_epi16(a, b);
}
static inline vi v_high16(vi a, vi b)
{
    return _mm512_unpackhi_epi16(a, b);
}
static inline vi v_low32(vi a, vi b)
{
    return _mm512_unpacklo_epi32(a, b);
}
static inline vi v_high32(vi a, vi b)
{
    return _mm512_unpackhi_epi32(a, b);
}
static inline vi v_low64(vi a, vi b)
{
    return _mm512_unpacklo_epi64(a, b);
}
static inline vi v_high64(vi a, vi b)
{
    return _mm512_unpackhi_epi64(a, b);
}
static inline vi v_products16(vi w, int even, int odd)
{
    return _mm512_madd_epi16(w, _mm512_set1_epi32(odd << 16 | even));
}
static inline vi v_lanes16(const vi *x)
{
    vi a = _mm512_add_epi16(_mm512_shuffle_i64x2(x[0], x[1], 0x44),
                            _mm512_shuffle_i64x2(x[0], x[1], 0xee));
    vi b = _mm512_add_epi16(_mm512_shuffle_i64x2(x[2], x[3], 0x44),
                            _mm512_shuffle_i64x2(x[2], x[3], 0xee));
    return _mm512_add_epi16(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
}
static inline vf v_float(vi w)
{
    return _mm512_cvtepi32_ps(w);
}
static inline void v_store_lanes(float *p, uint32_t stride, vf v)
{
    _mm_storeu_ps(p, _mm512_castps512_ps128(v));
    _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(v, 1));
    _mm_storeu_ps(p + (uint64_t)2 * stride, _mm512_extractf32x4_ps(v, 2));
    _mm_storeu_ps(p + (uint64_t)3 * stride, _mm512_extractf32x4_ps(v, 3));
}
static inline vi v_spread8(const uint8_t *p)
{
    __m512i w = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)p));
    const __m512i from = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(from, w), _mm512_set1_epi64(8ll << 32));
}
// From four words, one for each four.
static inline vi v_spread_four(__m128i four, int step)
{
    const __m512i from = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m128i steps = _mm_setr_epi32(0, step, 2 * step, 3 * step);
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(from, _mm512_castsi128_si512(four)),
                             _mm512_broadcast_i32x4(steps));
}
static inline vi v_spread4(const uint8_t *p)
{
    return v_spread_four(_mm_loadu_si128((const __m128i *)(const void *)p), 4);
}
static inline vi v_spread2(const uint8_t *p)
{
    return v_spread_four(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)), 2);
}
static inline vi v_spread1(const uint8_t *p)
{
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    return v_spread_four(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)four)), 1);
}
// vpermilps picks among four floats by the low two bits of each word: no mask, no conversion.
static inline vf v_table(const float *four)
{
    return _mm512_broadcast_f32x4(_mm_loadu_ps(four));
}
// And vpermps by the low four, of which the upper two may count as well: a shift serves two codes.
static inline vf v_pick(vf table, vi w, uint32_t shift, const uint32_t odd)
{
    const __m512i upper = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    vi x = shift ? _mm512_srli_epi32(w, shift) : w;
    return odd ? _mm512_permutexvar_ps(x, _mm512_permutexvar_ps(upper, table))
               : _mm512_permutevar_ps(table, x);
}
static inline vf v_select(vf a, vf b, vi w, uint32_t bit)
{
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(w, _mm512_set1_epi32((int)(1u << bit))), a,
                                b);
}
static inline vf v_flip(vf x, vi w, uint32_t bit)
{
    vf sign = _mm512_castsi512_ps(_mm512_slli_epi32(w, 31 - bit));
    return _mm512_xor_ps(x, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
static inline vi v_or(vi a, vi b)
{
    return _mm512_or_si512(a, b);
}
static inline vi v_low(vi w, uint32_t n)
{
    return _mm512_and_si512(w, _mm512_set1_epi32((int)((1u << n) - 1)));
}
static inline vi v_right(vi w, uint32_t n)
{
    return _mm512_srlv_epi32(w, _mm512_set1_epi32((int)n));
}
static inline vi v_left(vi w, uint32_t n)
{
    return _mm512_sllv_epi32(w, _mm512_set1_epi32((int)n));
}
// vpermps picks among sixteen floats by the low four bits of each word. Tables of fewer bits
// repeat, so that the bits above do not matter.
static inline vf v_centred(uint32_t bits)
{
    const vf count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i below = _mm512_set1_epi32((int)((1u << bits) - 1));
    vf code = _mm512_cvtepi32_ps(_mm512_and_epi32(_mm512_cvtps_epi32(count), below));
    return _mm512_sub_ps(code, _mm512_set1_ps((float)((1u << bits) - 1) / 2));
}
static inline vf v_level(uint32_t bits, vf table, vi w)
{
    (void)bits;
    return _mm512_permutexvar_ps(w, table);
}
static inline vf v_bf16(const uint8_t *p)
{
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline vf v_even(vi w)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
static inline vf v_odd(vi w)
{
    return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)));
}
static inline void v_apart(const float *x, vf *even, vf *odd)
{
    const __m512i from =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    vf a = v_load(x), b = v_load(x + V);
    *even = _mm512_permutex2var_ps(a, from, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(from, _mm512_set1_epi32(1)), b);
}
static inline void v_together(vf even, vf odd, float *x)
{
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v_store(x, _mm512_permutex2var_ps(even, from, odd));
    v_store(x + V, _mm512_permutex2var_ps(even, _mm512_add_epi32(from, _mm512_set1_epi32(8)), odd));
}
static inline float v_sum(vf v)
{
    return _mm512_reduce_add_ps(v);
}
static inline float v_top(vf v)
{
    return _mm512_reduce_max_ps(v);
}
// The halves of two vectors added, their quarters, and what of their words is next to each other.
static inline vf v_halves_added(vf a, vf b)
{
    return v_add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
static inline vf v_quarters_added(vf a, vf b)
{
    return v_add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
static inline vf v_pairs_added(vf a, vf b)
{
    return v_add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
static inline vf v_sums(const vf *x)
{
    vf s[4];
    for (int i = 0; i < 4; i++)
        s[i] =
            v_quarters_added(v_halves_added(x[i], x[i + 4]), v_halves_added(x[i + 8], x[i + 12]));
    vf a = v_pairs_added(s[0], s[1]), b = v_pairs_added(s[2], s[3]);
    return v_add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
static inline void v_fold(const float *x, float *out)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    vf a = v_pairs_added(v_quarters_added(v_load(x), v_load(x + V)),
                         v_quarters_added(v_load(x + 2 * V), v_load(x + 3 * V)));
    v_store(out, _mm512_permutexvar_ps(order, a));
}
// Parameters of fp16 of 16 tokens, of which g and g + 8 lie side by side. `min` is NULL where there
// is none.
#define V_HALVES
static inline void v_halves(const uint8_t *from, float *scale, float *min)
{
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    if (!min) {
        __m256i all = _mm256_loadu_si256((const __m256i *)(const void *)from);
        v_store(scale, _mm512_permutexvar_ps(order, _mm512_cvtph_ps(all)));
        return;
    }
    __m512i both = _mm512_loadu_si512(from);
    __m256i low = _mm512_cvtepi32_epi16(both),
            high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16));
    v_store(scale, _mm512_permutexvar_ps(order, _mm512_cvtph_ps(low)));
    v_store(min, _mm512_permutexvar_ps(order, _mm512_cvtph_ps(high)));
}
// Those of int2c, bytes n and c: the scale is 2^((n - 128) / 8), 0 for n = 0, the centre c eighths
// of it.
static inline void v_bytes(const uint8_t *from, float *scale, float *centre)
{
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    static const float eighths[16] = {KVD_EIGHTHS, KVD_EIGHTHS};
    __m512i w = _mm512_permutexvar_epi32(
        order, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)from)));
    __m512i n = _mm512_and_si512(w, _mm512_set1_epi32(255));
    __m512i power =
        _mm512_slli_epi32(_mm512_sub_epi32(_mm512_srli_epi32(n, 3), _mm512_set1_epi32(16)), 23);
    __m512i bits = _mm512_castps_si512(_mm512_permutexvar_ps(n, _mm512_loadu_ps(eighths)));
    bits = _mm512_maskz_add_epi32(_mm512_test_epi32_mask(n, n), bits, power);
    __m512 c = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 16), 24));
    v_store(scale, _mm512_castsi512_ps(bits));
    v_store(centre,
            _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_mul_ps(c, _mm512_set1_ps(0.125f))));
}
// 2^(x log2 e) with the fraction in [-0.5, 0.5] by a polynomial of degree 6.
static inline vf v_exp(vf x)
{
    vf y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    vf n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    vf p = _mm512_set1_ps(1.0f / 720);
    const float c[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 6; i++)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
    return _mm512_maskz_scalef_ps(alive, p, n);
}

#include "kernels/cpu/simd.inc.h"

static bool supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           converts_halves();
}

const struct kvd_cpu_isa kvd_cpu_avx512 = KVD_SIMD_TABLE("avx512", supported);

const struct kvd_cpu_isa kvd_cpu_amx = {.name = "amx",
                                        .supported = kvd_amx_supported,
                                        .enter = kvd_amx_enter,
                                        .leave = kvd_amx_leave,
                                        .q_prepare = kvd_amx_q_prepare,
                                        .k_scores = kvd_amx_k_scores,
                                        .tc_scores = kvd_amx_tc_scores,
                                        .v_accumulate = kvd_amx_v_accumulate,
                                        .v_reduce = kvd_amx_v_reduce,
                                        KVD_SIMD_COMMON};

const struct kvd_cpu_isa kvd_cpu_vnni = {.name = "vnni",
                                         .supported = kvd_vnni_supported,
                                         .q_prepare = kvd_vnni_q_prepare,
                                         .k_scores = kvd_vnni_k_scores,
                                         .tc_scores = kvd_vnni_tc_scores,
                                         .v_accumulate = kvd_vnni_v_accumulate,
                                         .v_reduce = kvd_vnni_v_reduce,
                                         KVD_SIMD_COMMON};
