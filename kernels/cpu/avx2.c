// Inner loops for AVX2 with FMA and F16C: 8 floats a vector.
#include "kernels/cpu/cpu.h"

#include <immintrin.h>

#define V 8
typedef __m256 vf;
typedef __m256i vi;
static inline vf v_zero(void)
{
    return _mm256_setzero_ps();
}
static inline vf v_set1(float x)
{
    return _mm256_set1_ps(x);
}
static inline vf v_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
static inline void v_store(float *p, vf v)
{
    _mm256_storeu_ps(p, v);
}
static inline vf v_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf v_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
static inline vf v_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
static inline vf v_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
static inline vi v_words(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}
static inline void v_words_store(uint8_t *p, vi w)
{
    _mm256_storeu_si256((__m256i *)(void *)p, w);
}
static inline vi v_down(vi w, int n)
{
    return _mm256_srli_epi32(w, n);
}
// Of bytes, words of 16 bits and of 32, within lanes of 128 bits where they change places.
static inline vi v_words0(void)
{
    return _mm256_setzero_si256();
}
static inline vi v_set1_32(int x)
{
    return _mm256_set1_epi32(x);
}
static inline vi v_bytes1(char x)
{
    return _mm256_set1_epi8(x);
}
static inline vi v_everywhere(const uint8_t *lane)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)lane));
}
static inline vi v_pick8(vi w, vi from)
{
    return _mm256_shuffle_epi8(w, from);
}
static inline vi v_both(vi a, vi b)
{
    return _mm256_and_si256(a, b);
}
static inline vi v_add8(vi a, vi b)
{
    return _mm256_add_epi8(a, b);
}
static inline vi v_add16(vi a, vi b)
{
    return _mm256_add_epi16(a, b);
}
static inline vi v_sub16(vi a, vi b)
{
    return _mm256_sub_epi16(a, b);
}
static inline vi v_down16(vi w, int n)
{
    return _mm256_srli_epi16(w, n);
}
static inline vi v_up16(vi w, int n)
{
    return _mm256_slli_epi16(w, n);
}
static inline vi v_add32(vi a, vi b)
{
    return _mm256_add_epi32(a, b);
}
static inline vi v_sub32(vi a, vi b)
{
    return _mm256_sub_epi32(a, b);
}
static inline vi v_up32(vi w, int n)
{
    return _mm256_slli_epi32(w, n);
}
static inline vi v_low16(vi a, vi b)
{
    return _mm256_unpacklo_epi16(a, b);
}
static inline vi v_high16(vi a, vi b)
{
    return _mm256_unpackhi_epi16(a, b);
}
static inline vi v_low32(vi a, vi b)
{
    return _mm256_unpacklo_epi32(a, b);
}
static inline vi v_high32(vi a, vi b)
{
    return _mm256_unpackhi_epi32(a, b);
}
static inline vi v_low64(vi a, vi b)
{
    return _mm256_unpacklo_epi64(a, b);
}
static inline vi v_high64(vi a, vi b)
{
    return _mm256_unpackhi_epi64(a, b);
}
static inline vi v_products16(vi w, int even, int odd)
{
    return _mm256_madd_epi16(w, _mm256_set1_epi32(odd << 16 | even));
}
static inline vi v_lanes16(const vi *x)
{
    return _mm256_add_epi16(_mm256_permute2x128_si256(x[0], x[1], 0x20),
                            _mm256_permute2x128_si256(x[0], x[1], 0x31));
}
static inline vf v_float(vi w)
{
    return _mm256_cvtepi32_ps(w);
}
static inline void v_store_lanes(float *p, uint32_t stride, vf v)
{
    _mm_storeu_ps(p, _mm256_castps256_ps128(v));
    _mm_storeu_ps(p + stride, _mm256_extractf128_ps(v, 1));
}
static inline vi v_spread8(const uint8_t *p)
{
    __m256i w = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    w = _mm256_permutevar8x32_epi32(w, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    return _mm256_srlv_epi32(w, _mm256_setr_epi32(0, 8, 0, 8, 0, 8, 0, 8));
}
// From the words a and b, one for each four.
static inline vi v_spread_two(uint32_t a, uint32_t b, int step)
{
    int x = (int)a, y = (int)b;
    return _mm256_srlv_epi32(
        _mm256_setr_epi32(x, x, x, x, y, y, y, y),
        _mm256_setr_epi32(0, step, 2 * step, 3 * step, 0, step, 2 * step, 3 * step));
}
static inline vi v_spread4(const uint8_t *p)
{
    uint32_t w[2];
    memcpy(w, p, sizeof(w));
    return v_spread_two(w[0], w[1], 4);
}
static inline vi v_spread2(const uint8_t *p)
{
    uint16_t w[2];
    memcpy(w, p, sizeof(w));
    return v_spread_two(w[0], w[1], 2);
}
static inline vi v_spread1(const uint8_t *p)
{
    return v_spread_two(p[0], p[1], 1);
}
static inline vf v_table(const float *four)
{
    return _mm256_broadcast_ps((const __m128 *)(const void *)four);
}
static inline vf v_pick(vf table, vi w, uint32_t shift, const uint32_t odd)
{
    return _mm256_permutevar_ps(table, _mm256_srli_epi32(w, (int)(shift + 2 * odd)));
}
static inline vf v_select(vf a, vf b, vi w, uint32_t bit)
{
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(w, 31 - (int)bit)));
}
static inline vf v_flip(vf x, vi w, uint32_t bit)
{
    vf sign = _mm256_castsi256_ps(_mm256_slli_epi32(w, 31 - (int)bit));
    return _mm256_xor_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
static inline vi v_or(vi a, vi b)
{
    return _mm256_or_si256(a, b);
}
static inline vi v_low(vi w, uint32_t n)
{
    return _mm256_and_si256(w, _mm256_set1_epi32((int)((1u << n) - 1)));
}
static inline vi v_right(vi w, uint32_t n)
{
    return _mm256_srlv_epi32(w, _mm256_set1_epi32((int)n));
}
static inline vi v_left(vi w, uint32_t n)
{
    return _mm256_sllv_epi32(w, _mm256_set1_epi32((int)n));
}
// Two bits pick within lanes, three across them; the fourth adds 8. One bit's table has it twice,
// so that the bit above it does not matter.
static inline vf v_centred(uint32_t bits)
{
    const float lowest = bits == 4 ? -7.5f : bits == 3 ? -3.5f : -1.5f;
    const vf count = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7),
             four = _mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3);
    if (bits == 1)
        return _mm256_setr_ps(-0.5f, 0.5f, -0.5f, 0.5f, -0.5f, 0.5f, -0.5f, 0.5f);
    return _mm256_add_ps(bits > 2 ? count : four, _mm256_set1_ps(lowest));
}
static inline vf v_level(uint32_t bits, vf table, vi w)
{
    if (bits <= 2)
        return _mm256_permutevar_ps(table, w);
    vf x = _mm256_permutevar8x32_ps(table, w);
    if (bits == 3)
        return x;
    const vf eights = _mm256_setr_ps(0, 8, 0, 8, 0, 8, 0, 8);
    return _mm256_add_ps(x, _mm256_permutevar_ps(eights, _mm256_srli_epi32(w, 3)));
}
static inline vf v_bf16(const uint8_t *p)
{
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline vf v_even(vi w)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
static inline vf v_odd(vi w)
{
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)));
}
static inline vf v_in_order(vf halves) // of two vectors' lanes
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8));
}
static inline void v_apart(const float *x, vf *even, vf *odd)
{
    vf a = v_load(x), b = v_load(x + V);
    *even = v_in_order(_mm256_shuffle_ps(a, b, 0x88));
    *odd = v_in_order(_mm256_shuffle_ps(a, b, 0xdd));
}
static inline void v_together(vf even, vf odd, float *x)
{
    vf a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    v_store(x, _mm256_permute2f128_ps(a, b, 0x20));
    v_store(x + V, _mm256_permute2f128_ps(a, b, 0x31));
}
static inline float v_sum(vf v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float v_top(vf v)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// The halves of two vectors added, and what of their words is next to each other.
static inline vf v_halves_added(vf a, vf b)
{
    return v_add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
static inline vf v_pairs_added(vf a, vf b)
{
    return v_add(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}
static inline vf v_sums(const vf *x)
{
    vf a = v_pairs_added(v_halves_added(x[0], x[4]), v_halves_added(x[1], x[5]));
    vf b = v_pairs_added(v_halves_added(x[2], x[6]), v_halves_added(x[3], x[7]));
    return v_add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
static inline void v_fold(const float *x, float *out)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    vf a = v_pairs_added(v_load(x), v_load(x + V)),
       b = v_pairs_added(v_load(x + 2 * V), v_load(x + 3 * V));
    v_store(out, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(a, b, 0x88), order));
    v_store(out + 8, _mm256_permutevar8x32_ps(_mm256_shuffle_ps(a, b, 0xdd), order));
}
static inline vf v_exp(vf x)
{
    vf y = _mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f));
    vf n = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    f = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), f);
    vf p = _mm256_set1_ps(1.0f / 720);
    const float c[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 6; i++)
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
    vf alive = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GT_OQ);
    __m256i e =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(alive, _mm256_mul_ps(p, _mm256_castsi256_ps(e)));
}

#include "kernels/cpu/simd.inc.h"

static bool supported(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
}

const struct kvd_cpu_isa kvd_cpu_avx2 = KVD_SIMD_TABLE("avx2", supported);
