// The int2 codec, one row (the head_dim values of one token and kv head) at a time: clip, min-max,
// pack. DESIGN: threshold = sorted |x| at index floor(ratio * D), clamp to +-threshold, scale =
// (max - min) / 3, code = floor((x - min) / scale + 0.5). Codes come from the unrounded fp32 scale
// and min; both are stored as fp16.
#ifndef KVD_KERNELS_QUANTIZE_H
#define KVD_KERNELS_QUANTIZE_H

#include "kernels/format.h"

#include <stdbool.h>

// x: [dim], rotated. ratio >= 1 turns clipping off. codes: [dim], each 0..3. NaN in x gives code 0.
void kvd_int2_quantize(const float *x, uint32_t dim, float ratio, uint8_t *codes,
                       struct kvd_param *param);

// Writes a row's codes and parameters into an int2 tile.
void kvd_int2_pack_k(uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                     const uint8_t *codes, struct kvd_param param);
void kvd_int2_pack_v(uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                     const uint8_t *codes, struct kvd_param param);

// Reads a row back: x = scale * code + min, still rotated.
void kvd_int2_unpack_k(const uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                       float *x);
void kvd_int2_unpack_v(const uint8_t *tile, uint32_t dim_k, uint32_t dim_v, uint32_t token,
                       float *x);

// The parameters of one side of a tile: 64 of them, in kvd_param_index order.
static inline const struct kvd_param *kvd_int2_params(const uint8_t *tile, uint32_t dim_k,
                                                      uint32_t dim_v, bool v)
{
    return (const struct kvd_param *)(const void *)(tile + 16 * (dim_k + dim_v) +
                                                    (v ? KVD_PARAM_BYTES : 0));
}

#endif
