// The codecs, one row (the head_dim values of one token and kv head, rotated) at a time: row to
// codes and parameters, these into a tile, and back. The reference for both backends.
//
//   int2     threshold = sorted |x| at index floor(ratio * D), clamp to +-threshold, scale = (max -
//            min) / 3, code = floor((x - min) / scale + 0.5). Levels are then drawn together about
//            the row's centre by `gain`: scale' = gain * scale, min' = min + 1.5 (scale - scale').
//            Codes come from the unrounded fp32 scale and min; scale' and min' are stored as fp16.
//   int4     the same with 15 in the place of 3, and 7.5 in that of 1.5.
//   int2c    the same scale' and centre = min + 1.5 scale; scale' rounded to 2^(n/8), the centre to
//            eighths of that; codes by what was stored.
//   int2-lm  mean and deviation of the row, codes of the nearest levels, scale and mean by least
//            squares for these codes, twice; then the codes. fp16 scale and mean.
//   turboquant-b  scale = |x| / sqrt(D), codes of the nearest levels; fp16 scale
//            (arXiv 2504.19874, the quantizer of least mean squared error).
//
//   tc2, tc2.5  transform coding, in tc.h: no choice of scales, no ratio and no gain.
//
// That is as published. Other scales for the same pages:
//
//   least squares  int2, int2c, int4: from evenly spaced levels about the mean, as int2-lm; no
//   ratio and
//                  no gain. turboquant: scale = sum l x / sum l^2, l the levels of the codes.
//                  int2-lm: as it is.
//   unbiased       the codes of least squares (turboquant: as published), and the scale with which
//                  the row that is read back is as long along x as x itself, <y - m, x - m> =
//                  |x - m|^2, about the row's mean m, which it keeps (turboquant: m = 0):
//                  scale = sum (x - m)^2 / sum (l - l') (x - m), min = m - scale l', l' the mean of
//                  the levels; 0 where the second sum is not above 0. int2c rounds it to its byte,
//                  and draws the codes' range with it.
//
// Scales that make the error least make rows shorter, by about that error: a query's logit at a key
// that it looks for comes out low.
#ifndef KVD_KERNELS_QUANTIZE_H
#define KVD_KERNELS_QUANTIZE_H

#include "kernels/codebook.h"
#include "kernels/format.h"

struct kvd_tc_coder;

struct kvd_quantizer {
    uint32_t codec; // not bf16
    float ratio;    // of clipping, where levels are even; 1 or more: none
    float gain;     // of the levels, where they are even; 1: none
    enum kvd_scale scale;
    const struct kvd_tc_coder *tc; // of the side, in tc2 and tc2.5
};

struct kvd_row {
    uint8_t codes[KVD_MAX_ROW];
    uint32_t param; // as stored, 2 or 4 bytes
};

// value = scale * level + min.
struct kvd_affine {
    float scale, min;
};

// x: [dim]. NaN in x gives some code.
void kvd_row_quantize(const struct kvd_quantizer *q, const float *x, uint32_t dim,
                      struct kvd_row *out);

// Writes a row's codes and parameters into its side of a tile, or reads it back, still rotated.
// That side's codec is not bf16. tc: of the side, in tc2 and tc2.5.
void kvd_row_pack(struct kvd_codecs codec, uint8_t *tile, uint32_t dim_k, uint32_t dim_v, bool v,
                  const struct kvd_tc_coder *tc, uint32_t token, const struct kvd_row *row);
void kvd_row_unpack(struct kvd_codecs codec, const uint8_t *tile, uint32_t dim_k, uint32_t dim_v,
                    bool v, const struct kvd_tc_coder *tc, uint32_t token, float *x);

// The levels of a codec by code: 2^bits of them. Of tc2 and tc2.5, those of V.
const float *kvd_codec_levels(uint32_t codec);

struct kvd_affine kvd_param_decode(uint32_t codec, uint32_t param);
// One side's parameters of a tile's first n tokens, in the order of tokens.
void kvd_params_read(uint32_t codec, const uint8_t *params, uint32_t n, struct kvd_affine *out);

#endif
