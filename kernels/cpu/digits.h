// Floats as whole numbers of few bits, for instruction sets that multiply bytes (amx.c, vnni.c).
//
// Numbers of a row are made fixed-point numbers of 22 bits and a sign, of the row's largest, and
// these three *digits* of base 256 each, -128 to 127. Products of digits with codes are exact; what
// is lost is a 2^22nd of the largest of a row, as in fp32's own sums of such products. The sums are
// of twice a level about the centre of all, which is a whole number.
#ifndef KVD_KERNELS_CPU_DIGITS_H
#define KVD_KERNELS_CPU_DIGITS_H

#include "kernels/cpu/fixed.h"

#include <immintrin.h>

enum {
    BLOCK = 128,                  // channels whose codes are 16 bytes a lane
    BLOCK_BYTES = KVD_UNIT_BYTES, // of a chunk, in a plane of two bits
    DIGITS = 3,                   // of a number
    DIGIT_BITS = 22,              // that three have, and a sign
    LINE = 64,                    // bytes
    SLOTS = 4,                    // codes of a byte
};

// Whether a side's codes are multiplied as bytes.
static inline bool digits_take(uint32_t codec, uint32_t dim, bool v)
{
    bool even = kvd_codec_level_kind(codec) == KVD_LEVELS_EVEN && kvd_codec_bits(codec) > 0;
    return dim % BLOCK == 0 && (even || (v && kvd_codec_tc(codec)));
}

// Each number's digits in a word's three low bytes. With 128 added to each of them they are those
// of an unsigned number.
static inline __m512i digits_of(__m512 x, __m512 to)
{
    const __m512i half = _mm512_set1_epi32(0x808080);
    return _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, to)), half), half);
}

// What makes a row's numbers digits.
static inline struct digit_scale digit_scale_of_row(const float *q, uint32_t dim)
{
    uint32_t largest = 0;
    for (uint32_t c = 0; c < dim; c += 16)
        largest = KVD_MAX(largest, _mm512_reduce_max_epu32(_mm512_and_si512(
                                       _mm512_loadu_si512(q + c), _mm512_set1_epi32(0x7fffffff))));
    return digit_scale_of(largest, DIGIT_BITS);
}

// Three lines of `bytes`, a digit each, of the row's numbers that are in x; `stride` bytes from
// line to line.
static inline void digit_lines_of(const float *x, uint32_t bytes, float to, uint32_t stride,
                                  uint8_t *line)
{
    for (uint32_t i = 0; i < bytes; i += 16) {
        uint32_t word[16];
        _mm512_storeu_si512(word, digits_of(_mm512_loadu_ps(x + i), _mm512_set1_ps(to)));
        for (uint32_t j = 0; j < 16 * DIGITS; j++)
            line[j / 16 * stride + i + j % 16] = (uint8_t)(word[j % 16] >> (8 * (j / 16)));
    }
}

// The same, of 2 * dim bytes each; what is past `bytes` of out [2 * dim], and a line more, becomes
// 0. Returns half of what products are worth.
static inline float digit_lines(const float *q, uint32_t dim, const float *x, uint32_t bytes,
                                float *out)
{
    struct digit_scale s = digit_scale_of_row(q, dim);
    memset(out, 0, 2 * dim * sizeof(float));
    digit_lines_of(x, bytes, s.to, 2 * dim, (uint8_t *)out);
    return s.from;
}

// A row's probabilities as three lines of digits: byte 16 t + 4 chunk + i is token 2t + {0, 1, 8,
// 9}[i] of the chunk. Returns half of what products are worth.
static inline float digit_tokens(const float *p, __m512i lines[DIGITS])
{
    const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i apart =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i most = _mm512_setzero_si512(), x[4];
    for (int i = 0; i < 4; i++)
        most = _mm512_max_epu32(
            most, _mm512_and_si512(_mm512_loadu_si512(p + 16 * i), _mm512_set1_epi32(0x7fffffff)));
    struct digit_scale s = digit_scale_of(_mm512_reduce_max_epu32(most), DIGIT_BITS);
    for (int i = 0; i < 4; i++) {
        __m512 in_order = _mm512_permutexvar_ps(order, _mm512_loadu_ps(p + 16 * i));
        x[i] = _mm512_shuffle_epi8(digits_of(in_order, _mm512_set1_ps(s.to)), apart);
    }
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    lines[0] = _mm512_unpacklo_epi64(a, b);
    lines[1] = _mm512_unpackhi_epi64(a, b);
    lines[2] = _mm512_unpacklo_epi64(c, d);
    return s.from;
}

// Sixteen of V's words, which have codes of two tokens each, so that words have those of four of
// one channel: word 4t + 2h + e has tokens 2t + {0, 1, 8, 9}, of the words' channel and 8 more for
// h, of channel tiles: slot + 4e.
static inline __m512i digit_words(const uint8_t *codes)
{
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15));
    return _mm512_shuffle_epi8(_mm512_loadu_si512(codes), order);
}

// What a level about the centre is, for each whole number that twice it is.
static inline float digit_step(uint32_t codec)
{
    return 2 * kvd_cpu_levels(codec)[1 << (kvd_codec_bits(codec) - 1)];
}

#endif
