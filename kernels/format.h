// The bytes of a page. Both backends read and write exactly this; kernels/README.md specifies it
// with a picture.
//
// page  = [layer][kv head] tiles, dense.
// tile  = 64 tokens of one layer and kv head.
//   K codes, V codes, K parameters, V parameters, each side in its own codec; rotated.
//   A side in codec bf16 has [64][dim] bf16 in the place of codes, not rotated, and no parameters.
// value = scale * level[code] + min, one (scale, min) per token and head for K and one for V.
// proto/codecs.def has the codecs.
//
// Codes, but for K's in tc2 and tc2.5 (tc.h), lie in planes: one of their two low bits (16 * dim
// bytes), then, for codes of 4 bits, a second one of bits 2 and 3, or, for 3 bits, one of a bit (8
// * dim bytes).
//
// Codes lie in the order in which mma.sync.m16n8k16 takes its A operand: a matrix of 16 rows x 16
// columns is spread over 32 lanes as four registers of two elements. For K, rows are tokens and
// columns channels; for V, rows are channels and columns tokens. A plane is chunks of 16 tokens,
// one after the other; a chunk its channel tiles of 16 channels, in *pieces* of as many as make 16
// bytes a lane, then 8, 4, 2 and 1, as far as tiles are left: with two bits a code, 8 channel
// tiles, then 4, 2, 1; with one, 16, then 8, 4, 2, 1. A piece is 32 lanes, each with its L bytes,
// of which register r has L bits for first elements and as many for second ones, a code for each of
// the piece's channel tiles: see kvd_place_of.
//
// Where dim is 64, and in planes of a bit also where it is 128, a chunk has but one piece, of less
// than 16 bytes a lane: 16 / L chunks lie side by side in one *load* of 16 bytes a lane. That keeps
// the bytes of pages that were written before there were other dims.
#ifndef KVD_KERNELS_FORMAT_H
#define KVD_KERNELS_FORMAT_H

#include "proto/kvd_limits.h"

#include <string.h>

enum { KVD_LANES = 32, KVD_UNIT_BYTES = KVD_LANES * 16 };

enum kvd_levels { KVD_LEVELS_EVEN, KVD_LEVELS_SIGNED, KVD_LEVELS_CENTRED };

static inline uint32_t kvd_codec_bits(uint32_t codec)
{
    switch (codec) {
#define KVD_CODEC(id, number, name, bits, ...)                                                     \
    case KVD_CODEC_##id:                                                                           \
        return bits;
#include "proto/codecs.def"
    default:
        return 0;
    }
}

// Bytes of a token's parameters on one side.
static inline uint32_t kvd_codec_param_bytes(uint32_t codec)
{
    switch (codec) {
#define KVD_CODEC(id, number, name, bits, param_bytes, ...)                                        \
    case KVD_CODEC_##id:                                                                           \
        return param_bytes;
#include "proto/codecs.def"
    default:
        return 0;
    }
}

static inline enum kvd_levels kvd_codec_level_kind(uint32_t codec)
{
    switch (codec) {
#define KVD_CODEC(id, number, name, bits, param_bytes, levels, ...)                                \
    case KVD_CODEC_##id:                                                                           \
        return KVD_LEVELS_##levels;
#include "proto/codecs.def"
    default:
        return KVD_LEVELS_EVEN;
    }
}

// Whether codes are a sign and an index of a magnitude.
static inline bool kvd_codec_signed(uint32_t codec)
{
    return kvd_codec_level_kind(codec) == KVD_LEVELS_SIGNED;
}

// Whether it is a codec of transform coding, tc2 or tc2.5: kernels/tc.h.
static inline bool kvd_codec_tc(uint32_t codec)
{
    return kvd_codec_level_kind(codec) == KVD_LEVELS_CENTRED;
}

// Of such a codec, the sum of bits over the 16-channel tiles of a key: 2 or 2.5 a tile, rounded
// down.
static inline uint32_t kvd_tc_stream_bits(uint32_t codec, uint32_t dim)
{
    return dim / 16 * (codec == KVD_CODEC_TC2_5 ? 5 : 4) / 2;
}

// One side's codes in a tile, or its bf16 values.
static inline uint32_t kvd_codes_bytes(uint32_t codec, uint32_t dim, bool v)
{
    if (kvd_codec_tc(codec) && !v)
        return KVD_PAGE_TOKENS * 16 / 8 * kvd_tc_stream_bits(codec, dim);
    return KVD_PAGE_TOKENS * dim / 8 * (codec == KVD_CODEC_BF16 ? 16 : kvd_codec_bits(codec));
}

// Where K's (V's) codes and parameters begin in a tile.
static inline uint32_t kvd_codes_offset(struct kvd_codecs codec, uint32_t dim_k, bool v)
{
    return v ? kvd_codes_bytes(codec.k, dim_k, false) : 0;
}
static inline uint32_t kvd_params_offset(struct kvd_codecs codec, uint32_t dim_k, uint32_t dim_v,
                                         bool v)
{
    return kvd_codes_bytes(codec.k, dim_k, false) + kvd_codes_bytes(codec.v, dim_v, true) +
           (v ? KVD_PAGE_TOKENS * kvd_codec_param_bytes(codec.k) : 0);
}

static inline uint64_t kvd_tile_bytes(struct kvd_codecs codec, uint32_t dim_k, uint32_t dim_v)
{
    return kvd_params_offset(codec, dim_k, dim_v, true) +
           (uint64_t)KVD_PAGE_TOKENS * kvd_codec_param_bytes(codec.v);
}

// Bits that a value of K and V takes on average, with its share of parameters.
static inline double kvd_value_bits(struct kvd_codecs codec, uint32_t dim_k, uint32_t dim_v)
{
    return 8.0 * (double)kvd_tile_bytes(codec, dim_k, dim_v) / KVD_PAGE_TOKENS / (dim_k + dim_v);
}

// Of the tiles of sink and recent window.
static inline struct kvd_codecs kvd_window_codec(void)
{
    return kvd_codecs_both(KVD_CODEC_BF16);
}

// Bytes of a page in `codec`, without padding.
static inline uint64_t kvd_page_bytes(const struct kvd_plane *g, struct kvd_codecs codec)
{
    return (uint64_t)g->n_layers * g->kv_heads *
           kvd_tile_bytes(codec, g->head_dim_k, g->head_dim_v);
}

// Byte offset of a tile within its page.
static inline uint64_t kvd_tile_offset(const struct kvd_plane *g, struct kvd_codecs codec,
                                       uint32_t layer, uint32_t head)
{
    return ((uint64_t)layer * g->kv_heads + head) *
           kvd_tile_bytes(codec, g->head_dim_k, g->head_dim_v);
}

// Channel tiles of a chunk that lie together in a plane.
struct kvd_piece {
    uint32_t first;      // channel tile
    uint32_t lane_bytes; // of each of the 32 lanes: 16, 8, 4, 2 or 1
    uint32_t at;         // bytes of the chunk before it
};

// That of a channel tile, in a plane of `width` bits (1 or 2) a code.
static inline struct kvd_piece kvd_piece_of(uint32_t dim, uint32_t width, uint32_t channel_tile)
{
    struct kvd_piece p = {0, 16, 0};
    for (;;) {
        uint32_t tiles = p.lane_bytes / width;
        if (p.first + tiles > dim / 16) {
            p.lane_bytes /= 2;
        } else if (channel_tile < p.first + tiles) {
            return p;
        } else {
            p.first += tiles;
            p.at += KVD_LANES * p.lane_bytes;
        }
    }
}

// Whether chunks lie side by side in loads, in a plane of `width` bits.
static inline bool kvd_side_by_side(uint32_t dim, uint32_t width)
{
    return dim == 64 || (dim == 128 && width == 1);
}

struct kvd_code_place {
    uint32_t byte; // from the start of a plane
    uint32_t bit;  // within that byte
};

// Where bits of a code lie in a plane of `width` bits (1 or 2) a code.
static inline struct kvd_code_place kvd_place_of(bool v, uint32_t dim, uint32_t width,
                                                 uint32_t token, uint32_t channel)
{
    uint32_t chunk = token / 16, tile = channel / 16, t = token % 16, c = channel % 16;
    uint32_t row = v ? c : t, col = v ? t : c;
    uint32_t lane = row % 8 * 4 + col % 8 / 2, reg = row / 8 + col / 8 * 2;
    struct kvd_piece p = kvd_piece_of(dim, width, tile);
    uint32_t code = (tile - p.first) * width; // its bits among a register's
    if (kvd_side_by_side(dim, width)) {       // in word `reg` of a load's lane
        uint32_t chunks = 16 / p.lane_bytes;
        uint32_t bit = chunk % chunks * p.lane_bytes + code + 16 * (col % 2);
        return (struct kvd_code_place){
            chunk / chunks * KVD_UNIT_BYTES + lane * 16 + reg * 4 + bit / 8, bit % 8};
    }
    // A lane's words, of 32 bits or of all that it has, are first elements in their low halves and
    // second ones in their high halves.
    uint32_t half = p.lane_bytes < 4 ? 4 * p.lane_bytes : 16, at = reg * p.lane_bytes + code;
    uint32_t bit = at % half + half * (col % 2);
    return (struct kvd_code_place){
        chunk * 2 * width * dim + p.at + lane * p.lane_bytes + at / half * 4 + bit / 8, bit % 8};
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
