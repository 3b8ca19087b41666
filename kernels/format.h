// The bytes of a page. Both backends read and write exactly this; kernels/README.md specifies it
// with a picture.
//
// page  = [layer][kv head] tiles, dense.
// tile  = 64 tokens of one layer and kv head.
//   bf16: K [64][DK] bf16, then V [64][DV] bf16, not rotated.
//   int2: K codes (16*DK bytes), V codes (16*DV), K parameters (256), V parameters (256); rotated.
// value = scale * code + min, code in 0..3, scale and min fp16, one pair per token and head for K
// and one for V.
//
// Codes lie in the order in which mma.sync.m16n8k16 takes its A operand: a matrix of 16 rows x 16
// columns is spread over 32 lanes as four registers of two elements. For K, rows are tokens and
// columns channels; for V, rows are channels and columns tokens. A *unit* is 512 bytes: 32 lanes x
// 16 bytes, each lane's four words being its four A registers. A word holds eight *slots* of two
// codes: slot s has its first code at bit 2s and its second at 16 + 2s, so
// `(w >> 2s) & 0x00030003` is the register of the matrix in slot s. Slots are channel tiles of 16
// channels:
//   dim 128: unit = chunk of 16 tokens, slot = channel tile 0..7
//   dim 256: two units a chunk, channel tiles 0..7 and 8..15
//   dim  64: one unit for two chunks, slots 0..3 the first chunk's channel tiles, 4..7 the second's
#ifndef KVD_KERNELS_FORMAT_H
#define KVD_KERNELS_FORMAT_H

#include "proto/kvd_limits.h"

#include <string.h>

enum {
    KVD_UNIT_BYTES = 512,
    KVD_PARAM_BYTES = 256, // one side's (scale, min) pairs in an int2 tile
};

static inline uint32_t kvd_int2_codes_bytes(uint32_t dim)
{
    return KVD_PAGE_TOKENS * dim / 4;
}

static inline uint64_t kvd_tile_bytes(uint32_t codec, uint32_t dim_k, uint32_t dim_v)
{
    if (codec == KVD_CODEC_BF16)
        return (uint64_t)KVD_PAGE_TOKENS * 2 * (dim_k + dim_v);
    return kvd_int2_codes_bytes(dim_k) + kvd_int2_codes_bytes(dim_v) + 2 * KVD_PARAM_BYTES;
}

// Bytes of a page in `codec`, without padding.
static inline uint64_t kvd_page_bytes(const struct kvd_geometry *g, uint32_t codec)
{
    return (uint64_t)g->n_layers * g->kv_heads *
           kvd_tile_bytes(codec, g->head_dim_k, g->head_dim_v);
}

// Byte offset of a tile within its page.
static inline uint64_t kvd_tile_offset(const struct kvd_geometry *g, uint32_t codec, uint32_t layer,
                                       uint32_t head)
{
    return ((uint64_t)layer * g->kv_heads + head) *
           kvd_tile_bytes(codec, g->head_dim_k, g->head_dim_v);
}

struct kvd_code_place {
    uint32_t byte; // from the start of K's or V's codes
    uint32_t bit;  // within that byte: 0, 2, 4 or 6
};

// Where a code lies. `row` and `col` are token and channel for K, channel and token for V: see
// kvd_place_k/_v.
static inline struct kvd_code_place kvd_place(uint32_t unit, uint32_t slot, uint32_t row,
                                              uint32_t col)
{
    uint32_t lane = row % 8 * 4 + col % 8 / 2;
    uint32_t reg = row / 8 + col / 8 * 2;
    uint32_t bit = 2 * slot + 16 * (col % 2);
    return (struct kvd_code_place){unit * KVD_UNIT_BYTES + lane * 16 + reg * 4 + bit / 8, bit % 8};
}

static inline uint32_t kvd_unit_of(uint32_t dim, uint32_t chunk, uint32_t channel_tile)
{
    return dim == 64 ? chunk / 2 : chunk * (dim / 128) + channel_tile / 8;
}

static inline uint32_t kvd_slot_of(uint32_t dim, uint32_t chunk, uint32_t channel_tile)
{
    return dim == 64 ? chunk % 2 * 4 + channel_tile : channel_tile % 8;
}

static inline struct kvd_code_place kvd_place_k(uint32_t dim, uint32_t token, uint32_t channel)
{
    uint32_t chunk = token / 16, tile = channel / 16;
    return kvd_place(kvd_unit_of(dim, chunk, tile), kvd_slot_of(dim, chunk, tile), token % 16,
                     channel % 16);
}

static inline struct kvd_code_place kvd_place_v(uint32_t dim, uint32_t token, uint32_t channel)
{
    uint32_t chunk = token / 16, tile = channel / 16;
    return kvd_place(kvd_unit_of(dim, chunk, tile), kvd_slot_of(dim, chunk, tile), channel % 16,
                     token % 16);
}

// Index of a token's (scale, min) pair: tokens g and g + 8 of a chunk are neighbours, as one lane
// needs both.
static inline uint32_t kvd_param_index(uint32_t token)
{
    return token / 16 * 16 + token % 8 * 2 + token % 16 / 8;
}

struct kvd_param {
    uint16_t scale, min; // fp16
};

static inline float kvd_bf16_to_f32(uint16_t b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t kvd_f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    if ((u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float kvd_fp16_to_f32(uint16_t h)
{
    // The exponents differ by 112; a product with 2^112 also makes subnormals right.
    uint32_t u = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &u, sizeof(f));
    f *= 0x1p112f;
    memcpy(&u, &f, sizeof(u));
    if (f >= 65536.0f) // Inf and NaN
        u |= 0x7f800000;
    u |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &u, sizeof(f));
    return f;
}

// Round to nearest even, saturating at +-65504.
uint16_t kvd_f32_to_fp16(float f);

#endif
