// Operands of a side in any codec, known at run time only: of K with tokens as rows, of V with channels as rows. Codes come as
// levels about 0 in fp16, exactly; rows of bf16 as they are. What decides is the same for a whole block.
#ifndef KVD_KERNELS_CUDA_ANY_CUH
#define KVD_KERNELS_CUDA_ANY_CUH

#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tc.cuh"

namespace kvd
{

enum side_kind : uint32_t {
    ROWS,    // of bf16
    EVEN2,   // int2, int2c, and V in tc2 and tc2.5
    EVEN4,   // int4
    LEVELS,  // of a codebook
    STREAMS, // K in tc2 and tc2.5
};

enum param_kind : uint32_t {
    PAIRS,  // scale and min in fp16
    SCALES, // scale alone
    BYTES,  // int2c's
};

// Even levels come as code less the middle, by 64.
constexpr float EVEN_UNIT = 64;

// One side as it lies in shared memory: codes as in pages, bf16 rows farther apart, so that those of neighbouring tokens lie
// in different banks.
struct any_side {
    uint32_t codec, dim;
    side_kind kind;
    uint32_t bits;          // of a code, or of a stream
    uint32_t codes, params; // where they begin in a staged tile
    uint32_t pitch;         // of bf16 rows
    param_kind params_are;
    float unit, middle; // what a level is worth, of a scale; where 0 is among the codec's own levels

    any_side() = default;

    any_side(uint32_t codec, uint32_t dim, bool v)
        : codec(codec), dim(dim), bits(kvd_codec_bits(codec)), codes(0), params(0), pitch(2 * dim + 16)
    {
        bool stream = kvd_codec_tc(codec) && !v;
        kind = codec == KVD_CODEC_BF16   ? ROWS
               : stream                  ? STREAMS
               : kvd_codec_signed(codec) ? LEVELS
               : bits == 4               ? EVEN4
                                         : EVEN2;
        if (stream)
            bits = kvd_tc_stream_bits(codec, dim);
        params_are = codec == KVD_CODEC_INT2C ? BYTES : kvd_codec_param_bytes(codec) == 4 ? PAIRS : SCALES;
        unit = kind == LEVELS ? 1 : EVEN_UNIT * (kvd_codec_tc(codec) && v ? KVD_EVEN_STEP : 1);
        middle = kind == LEVELS || kvd_codec_tc(codec) ? 0 : (float)((1 << bits) - 1) / 2;
    }

    // Bytes of codes, or of rows.
    uint32_t codes_bytes(bool v) const
    {
        return kind == ROWS ? PAGE * pitch : kvd_codes_bytes(codec, dim, v);
    }
};

// Where a channel tile's codes lie in a chunk of a plane (kernels/format.h); of a stream, from which bit on, and how many.
struct code_place {
    uint16_t at, tiles; // of the piece: bytes before it, channel tiles in it
    uint8_t lane, bit;  // bytes a lane of the piece; the tile's first bit in a register
    uint16_t top;       // of a stream: the largest code
};

// Of the planes of a side, of two bits and of those above, by channel tile.
struct side_places {
    code_place low[KVD_MAX_HEAD_DIM / 16], more[KVD_MAX_HEAD_DIM / 16];

    // By all threads of a block, which synchronizes before the places are used. `keys`: of a side of streams.
    __device__ inline void find(const any_side &side, const kvd_cuda_key_tile *keys)
    {
        for (uint32_t ct = threadIdx.x; ct < side.dim / 16; ct += blockDim.x) {
            if (side.kind == STREAMS) {
                uint32_t from = 0;
                for (uint32_t i = 0; i < ct; i++)
                    from += keys[i].bits;
                low[ct] = {0, 0, 0, (uint8_t)from, (uint16_t)((1u << keys[ct].bits) - 1)};
                continue;
            }
            auto place = [&](int width) -> code_place {
                piece p = piece_of((int)side.dim, width, (int)ct);
                return {(uint16_t)p.at, 0, (uint8_t)p.lane, (uint8_t)(width * (ct - (uint32_t)p.first)), 0};
            };
            low[ct] = place(2);
            more[ct] = place(side.bits == 3 ? 1 : 2);
        }
    }
};

// A lane's codes of a piece of a plane: register r's from bit 0 of both halves of a word on, above what follows them. Loaded
// when another piece, or another chunk, is wanted.
struct plane_piece {
    uint32_t x[4];
    const uint8_t *from = nullptr;
    uint32_t bit; // of the wanted channel tile

    __device__ inline void want(const uint8_t *plane, uint32_t dim, uint32_t width, uint32_t chunk, const code_place &place)
    {
        uint32_t lane = threadIdx.x % 32, bytes = place.lane;
        const uint8_t *at = plane + chunk * (2 * width * dim) + place.at + lane * bytes;
        bit = place.bit;
        if (side_by_side((int)dim, (int)width)) { // with a load's other chunks
            uint32_t chunks = 16 / bytes;
            at = plane + chunk / chunks * 512 + lane * 16;
            bit += chunk % chunks * bytes;
            bytes = 16;
        }
        if (at == from)
            return;
        from = at;
        if (bytes == 16) {
            uint4 y = *(const uint4 *)at;
            x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
            return;
        }
        uint2 y;
        if (bytes == 8)
            y = *(const uint2 *)at;
        else if (bytes == 4)
            y.x = y.y = *(const uint32_t *)at;
        else if (bytes == 2)
            y.x = y.y = __byte_perm(*(const uint16_t *)at, 0, 0x4140);
        else
            y.x = y.y = (*at & 15u) | (*at & 0xf0u) << 12;
        uint32_t third = bytes == 8 ? 0 : 2 * bytes;
        x[0] = y.x, x[1] = y.x >> bytes, x[2] = y.y >> third, x[3] = y.y >> (third + bytes);
    }

    __device__ inline uint32_t word(int r) const
    {
        return x[r] >> bit;
    }
};

// Codes from 0 to `top` in both halves of a word, as levels about 0: (code - top / 2) / EVEN_UNIT, exact in fp16.
__device__ inline uint32_t levels_about_zero(uint32_t codes, uint32_t top)
{
    return sum_fp16((codes << 1) + 0x48004800u, 0xc800c800u + top * 0x00010001u);
}

// Reads a side of staged tiles, channel tile by channel tile of a chunk, as A operands.
template <bool V> class side_reader
{
    const any_side &side;
    const side_places &places;
    plane_piece low, more;
    key_words<KVD_MAX_HEAD_DIM, TC> streams;
    const uint8_t *streams_of = nullptr;

    __device__ inline void rows(const uint8_t *tile, uint32_t chunk, uint32_t ct, uint32_t (&a)[4]) const
    {
        uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const uint8_t *at = tile + side.codes + (chunk * 16 + g) * side.pitch + ct * 32 + t * 4;
        a[0] = *(const uint32_t *)at, a[1] = *(const uint32_t *)(at + 8 * side.pitch);
        a[2] = *(const uint32_t *)(at + 16), a[3] = *(const uint32_t *)(at + 8 * side.pitch + 16);
        if (V) { // turned over, 8 x 8 elements at a time
            uint32_t first = transpose(a[2]);
            a[0] = transpose(a[0]), a[2] = transpose(a[1]), a[3] = transpose(a[3]);
            a[1] = first;
        }
    }

    __device__ inline void from_streams(const uint8_t *tile, uint32_t chunk, uint32_t ct, uint32_t (&a)[4])
    {
        const uint8_t *at = tile + side.codes + chunk * 32 * side.bits;
        if (at != streams_of)
            streams.load_streams(at, (int)side.bits);
        streams_of = at;
        code_place place = places.low[ct];
#pragma unroll
        for (int r = 0; r < 4; r++)
            a[r] = levels_about_zero(streams.bits_from(place.bit, r) & (place.top * 0x00010001u), place.top);
    }

public:
    __device__ inline side_reader(const any_side &side, const side_places &places)
        : side(side), places(places)
    {
    }

    // Of what is staged at `tile` now: it is another tile than before.
    __device__ inline void begin()
    {
        low.from = more.from = streams_of = nullptr;
    }

    __device__ inline void operand(const uint8_t *tile, uint32_t chunk, uint32_t ct, uint32_t (&a)[4])
    {
        if (side.kind == ROWS)
            return rows(tile, chunk, ct, a);
        if (!V && side.kind == STREAMS)
            return from_streams(tile, chunk, ct, a);
        const uint8_t *codes = tile + side.codes;
        low.want(codes, side.dim, 2, chunk, places.low[ct]);
        if (side.bits > 2)
            more.want(codes + 16 * side.dim, side.dim, side.bits - 2, chunk, places.more[ct]);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t w = low.word(r), above = side.bits > 2 ? more.word(r) : 0;
            if (side.kind == EVEN2)
                a[r] = levels_about_zero(w & 0x00030003u, 3);
            else if (side.kind == EVEN4)
                a[r] = levels_about_zero((w & 0x00030003u) | (above & 0x00030003u) << 2, 15);
            else
                a[r] = side.bits == 2 ? levels_of<2, 0, 0>(w, w) : side.bits == 3 ? levels_of<3, 0, 0>(w, above)
                                                                                   : levels_of<4, 0, 0>(w, above);
        }
    }
};

// Scale and centre of tokens g and g + 8 of a chunk: what levels are to be multiplied by, and what the sum of what they meet.
__device__ inline void load_any_params(const any_side &side, const uint8_t *tile, uint32_t chunk, float2 (&of)[2],
                                       int g = threadIdx.x % 32 / 4)
{
    const uint8_t *params = tile + side.params;
    if (side.kind == ROWS) {
        of[0] = of[1] = make_float2(1, 0);
        return;
    }
    if (side.params_are == BYTES)
        load_params<INT2C>(params, side.codec, (int)chunk, of[0], of[1], g);
    else if (side.params_are == PAIRS)
        load_params<INT4>(params, side.codec, (int)chunk, of[0], of[1], g);
    else
        load_params<LEVELS4>(params, side.codec, (int)chunk, of[0], of[1], g);
#pragma unroll
    for (int i = 0; i < 2; i++)
        of[i] = make_float2(of[i].x * side.unit, fmaf(side.middle, of[i].x, of[i].y));
}

} // namespace kvd

#endif
