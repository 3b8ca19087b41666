// The bytes of a page. Both backends read and write exactly this; kernels/README.md specifies it
// with a picture.
//
// page  = [layer][kv head] tiles, dense.
// tile  = 64 tokens of one layer and kv head.
//   bf16:   K [64][DK] bf16, then V [64][DV] bf16, not rotated.
//   others: K codes, V codes, K parameters, V parameters; rotated.
// value = scale * level[code] + min, one (scale, min) per token and head for K and one for V.
//
//   codec          bits  levels                          parameters of a token and side
//   int2           2     0, 1, 2, 3                      scale, min: fp16
//   int2c          2     0, 1, 2, 3                      2 bytes, see kvd_param_decode
//   int2-lm        2     +-magnitude (codebook.h)        scale, mean: fp16
//   turboquant-b   b     +-magnitude                     scale: fp16; min is 0
//
// Codes of b bits lie in planes: one of two bits (8 * 2 * dim bytes), then, for 4 bits, a second
// one with bits 2 and 3, or, for 3 bits, one of a bit. A code of a codec with magnitudes has its
// sign in the top bit.
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
// The plane of a bit has sixteen slots to a word, slot s at bits s and 16 + s: two chunks to a unit
// for dim 128, one for 256, and all four for 64, where chunks share bytes.
#ifndef KVD_KERNELS_FORMAT_H
#define KVD_KERNELS_FORMAT_H

#include "proto/kvd_limits.h"

#include <string.h>

enum { KVD_UNIT_BYTES = 512 };

static inline uint32_t kvd_codec_bits(uint32_t codec)
{
    return codec == KVD_CODEC_TURBOQUANT_4 ? 4 : codec == KVD_CODEC_TURBOQUANT_3 ? 3 : 2;
}

// Bytes of a token's parameters on one side.
static inline uint32_t kvd_codec_param_bytes(uint32_t codec)
{
    return codec == KVD_CODEC_INT2 || codec == KVD_CODEC_INT2_LM ? 4 : 2;
}

// Whether codes are a sign and an index of a magnitude.
static inline bool kvd_codec_signed(uint32_t codec)
{
    return codec >= KVD_CODEC_INT2_LM;
}

// One side's codes in a tile.
static inline uint32_t kvd_codes_bytes(uint32_t codec, uint32_t dim)
{
    return KVD_PAGE_TOKENS * dim / 8 * kvd_codec_bits(codec);
}

// Where K's (V's) codes and parameters begin in a tile of a codec other than bf16.
static inline uint32_t kvd_codes_offset(uint32_t codec, uint32_t dim_k, bool v)
{
    return v ? kvd_codes_bytes(codec, dim_k) : 0;
}
static inline uint32_t kvd_params_offset(uint32_t codec, uint32_t dim_k, uint32_t dim_v, bool v)
{
    return kvd_codes_bytes(codec, dim_k + dim_v) +
           (v ? KVD_PAGE_TOKENS * kvd_codec_param_bytes(codec) : 0);
}

static inline uint64_t kvd_tile_bytes(uint32_t codec, uint32_t dim_k, uint32_t dim_v)
{
    if (codec == KVD_CODEC_BF16)
        return (uint64_t)KVD_PAGE_TOKENS * 2 * (dim_k + dim_v);
    return kvd_params_offset(codec, dim_k, dim_v, true) +
           (uint64_t)KVD_PAGE_TOKENS * kvd_codec_param_bytes(codec);
}

// Bytes of a page in `codec`, without padding.
static inline uint64_t kvd_page_bytes(const struct kvd_plane *g, uint32_t codec)
{
    return (uint64_t)g->n_layers * g->kv_heads *
           kvd_tile_bytes(codec, g->head_dim_k, g->head_dim_v);
}

// Byte offset of a tile within its page.
static inline uint64_t kvd_tile_offset(const struct kvd_plane *g, uint32_t codec, uint32_t layer,
                                       uint32_t head)
{
    return ((uint64_t)layer * g->kv_heads + head) *
           kvd_tile_bytes(codec, g->head_dim_k, g->head_dim_v);
}

struct kvd_code_place {
    uint32_t byte; // from the start of a plane
    uint32_t bit;  // within that byte
};

// Where bits of a code lie in a plane of `width` bits (1 or 2) a code. `row` and `col` are token
// and channel for K, channel and token for V.
static inline struct kvd_code_place kvd_place(uint32_t unit, uint32_t slot, uint32_t width,
                                              uint32_t row, uint32_t col)
{
    uint32_t lane = row % 8 * 4 + col % 8 / 2;
    uint32_t reg = row / 8 + col / 8 * 2;
    uint32_t bit = width * slot + 16 * (col % 2);
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

// The same in a plane of single bits.
static inline uint32_t kvd_bit_unit_of(uint32_t dim, uint32_t chunk)
{
    return chunk * dim / 256;
}

static inline uint32_t kvd_bit_slot_of(uint32_t dim, uint32_t chunk, uint32_t channel_tile)
{
    return chunk * (dim / 16) % 16 + channel_tile;
}

static inline struct kvd_code_place kvd_place_of(bool v, uint32_t dim, uint32_t width,
                                                 uint32_t token, uint32_t channel)
{
    uint32_t chunk = token / 16, tile = channel / 16, t = token % 16, c = channel % 16;
    uint32_t unit = width == 1 ? kvd_bit_unit_of(dim, chunk) : kvd_unit_of(dim, chunk, tile);
    uint32_t slot = width == 1 ? kvd_bit_slot_of(dim, chunk, tile) : kvd_slot_of(dim, chunk, tile);
    return v ? kvd_place(unit, slot, width, c, t) : kvd_place(unit, slot, width, t, c);
}

// Index of a token's parameters among a side's: tokens g and g + 8 of a chunk are neighbours, as
// one lane needs both.
static inline uint32_t kvd_param_index(uint32_t token)
{
    return token / 16 * 16 + token % 8 * 2 + token % 16 / 8;
}

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
