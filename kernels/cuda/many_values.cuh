// Attention of many query rows, whose arithmetic takes longer than reading: histories of any codec are made values ahead, in fp16
// and still rotated, and 128 rows a block attend to them by products of warpgroups (`wgmma`).
//
// A history is taken in rounds, as its values would take eight times the memory of its codes, and so are sinks and windows, whose
// tokens are brought into the same order. In each round tiles or tokens become values, then rows attend to them; partial results
// lie as finish.cuh has them, for units of 16 rows; at the end a kernel combines them.
#ifndef KVD_KERNELS_CUDA_MANY_VALUES_CUH
#define KVD_KERNELS_CUDA_MANY_VALUES_CUH

#include "kernels/cuda/any.cuh"
#include "kernels/cuda/launch.cuh"

namespace kvd
{

// A call, with the first part of a round.
struct many_call : attend_call {
    uint32_t first_part;
    uint8_t *values;
    uint32_t thousand; // 1,024 twice in fp16: a constant here, as LOP3 takes one as it is and would otherwise be two
    float stored; // of a value, so that fp16 has it whatever scale and min are: a quarter, or less of four bits
    tile_layout tile;
    any_side side[2]; // K and V
};

// Values of a pair of tiles: K, core matrices of 8 tokens by 8 channels, then V, of 8 channels by 8 tokens, 128 bytes each: those of 8
// tokens (channels) one after another.
template <int D> struct tile_values {
    static constexpr int TOKENS = 2 * PAGE, SIDE = TOKENS * D * 2, BYTES = 2 * SIDE;
};

template <int D> __device__ inline uint8_t *values_of(const many_call &p, uint32_t s, uint32_t kv, uint32_t tile_of_round)
{
    return p.values + (((uint64_t)s * p.kv_heads + kv) * p.ahead_pairs + tile_of_round / 2) * tile_values<D>::BYTES;
}

// Where the partial results of 16 rows lie, of all parts.
template <int D> __device__ inline part_layout<2, D> many_parts(const many_call &p, const row_block &b, uint32_t row0)
{
    using layout = part_layout<2, D>;
    uint64_t unit = ((uint64_t)b.s * p.kv_heads + b.kv) * p.row_blocks + row0 / layout::ROWS;
    uint32_t most = p.splits + p.window_splits;
    return {most, (uint8_t *)p.scratch + p.scratch_zeroed + unit * layout::bytes(most)};
}

__device__ inline uint32_t many_tiles(const many_call &p, const row_block &b)
{
    return (b.hist_end - p.sink + PAGE - 1) / PAGE;
}

// -- codes to values -----------------------------------------------------------------------------

// A warp's chunk of a tile of a round, of one side, by a block for each tile. Codes come as operands of mma.m16n8k16, whose rows are
// tokens of K and channels of V: a lane's four registers are of its row g or g + 8 and its columns 2 t + e or 2 t + e + 8.
template <int D> struct chunk_place {
    bool v, seen, beside; // by some row; of a tile beside one that is
    uint32_t chunk;
    int left;            // tokens that there are from the chunk's first on
    const uint8_t *from; // the tile
    uint32_t *to;

    __device__ inline chunk_place(const many_call &p)
    {
        row_block b = {blockIdx.z, blockIdx.y, 0};
        load_lengths(p, b);
        history_range range = history_of<true>(p, b, p.rows);
        uint32_t tile = p.first_part * p.part_tiles + blockIdx.x, warp = threadIdx.x / 32;
        v = warp >= 4, chunk = warp % 4;
        seen = tile >= range.first && tile < range.end, beside = (tile ^ 1) >= range.first && (tile ^ 1) < range.end;
        left = (int)(b.hist_end - p.sink - tile * PAGE) - (int)chunk * 16;
        // Tiles that no row sees may have no page any more.
        if (seen)
            from = (const uint8_t *)p.pages.codec[(uint64_t)b.s * p.pages.codec_stride + tile] + p.tile.at(p.layer, p.kv_heads, b.kv);
        uint32_t token8 = tile % 2 * 8 + chunk * 2;
        to = (uint32_t *)(values_of<D>(p, b.s, b.kv, blockIdx.x) + (v ? tile_values<D>::SIDE : 0)) + threadIdx.x % 32;
        to += (v ? token8 : token8 * (D / 8)) * 32;
    }

    __device__ inline uint32_t half_of_tokens(int r) const
    {
        return v ? r / 2 : r % 2;
    }

    // Two values of register r of a channel tile.
    __device__ inline void put(int channel_tile, int r, uint32_t x) const
    {
        uint32_t token8 = half_of_tokens(r), channel8 = 2 * channel_tile + (v ? r % 2 : r / 2);
        to[(v ? channel8 * 16 + token8 : token8 * (D / 8) + channel8) * 32] = x;
    }

    // Of a tile that nobody sees: what is V beside another that is seen is multiplied by weights of 0.
    __device__ inline void put_nothing() const
    {
        for (int i = 0; i < D / 4 && v && beside; i++)
            put(i / 4, i % 4, 0);
    }

    // Scale and min of a register's two elements, by half_of_tokens: load(token, of) gives those of a token and of the eighth after
    // it. There are none of what was never written.
    template <typename F> __device__ inline void params(F load, float2 (&x)[2][2]) const
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = v ? threadIdx.x % 4 * 2 + e : threadIdx.x % 32 / 4;
            load(token, x[e]);
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (v && token + 8 * half >= left)
                    x[e][half] = make_float2(0, 0);
        }
    }
};

// Of int2, the fastest: its codes are at known places.
template <int D> __global__ void __launch_bounds__(256) many_values_kernel(const __grid_constant__ many_call p)
{
    wait_for_previous();
    let_next_start();
    const chunk_place<D> at(p);
    if (!at.seen)
        return at.put_nothing();
    const uint8_t *codes = at.from + p.tile.codes[at.v];
    const uint4 words = *(const uint4 *)(codes + (D == 64 ? at.chunk / 2 : at.chunk) * 512 + threadIdx.x % 32 * 16);
    int first_bit = D == 64 ? at.chunk % 2 * 8 : 0;
    float2 param[2][2];
    at.params([&](int token, float2(&of)[2]) { load_params<INT2>(at.from + p.tile.params[at.v], p.codec, (int)at.chunk, of[0], of[1], token); },
              param);
#pragma unroll
    for (int ct = 0; ct < D / 16; ct++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t half = at.half_of_tokens(r), code = word_of(words, r) >> (first_bit + 2 * ct);
            float2 p0 = param[0][half], p1 = param[1][half];
            float x = fmaf(p0.x, (float)(code & 3), p0.y), y = fmaf(p1.x, (float)(code >> 16 & 3), p1.y);
            at.put(ct, r, pack_fp16(x * p.stored, y * p.stored));
        }
}

template <int D, bool V> __device__ inline void put_any_values(const many_call &p, const chunk_place<D> &at, const side_places &places)
{
    const any_side &side = p.side[V];
    side_reader<V> reader(side, places);
    float2 param[2][2];
    at.params([&](int token, float2(&of)[2]) { load_any_params(side, at.from, at.chunk, of, token); }, param);
#pragma unroll 1
    for (int ct = 0; ct < D / 16; ct++) {
        uint32_t a[4];
        reader.operand(at.from, at.chunk, (uint32_t)ct, a);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t half = at.half_of_tokens(r);
            float2 level = unpack_fp16(a[r]), p0 = param[0][half], p1 = param[1][half];
            at.put(ct, r, pack_fp16(fmaf(p0.x, level.x, p0.y) * p.stored, fmaf(p1.x, level.y, p1.y) * p.stored));
        }
    }
}

// Of any two codecs.
template <int D> __global__ void __launch_bounds__(256) many_any_values_kernel(const __grid_constant__ many_call p)
{
    __shared__ side_places places[2];
    wait_for_previous();
    let_next_start();
    const chunk_place<D> at(p);
    const kvd_cuda_key_tile *keys = p.side[0].kind == STREAMS ? key_tiles(transform_of(p.rotation, p.layer, blockIdx.y), p.codec) : nullptr;
    places[0].find(p.side[0], keys);
    places[1].find(p.side[1], nullptr);
    __syncthreads();
    if (!at.seen)
        at.put_nothing();
    else if (at.v)
        put_any_values<D, true>(p, at, places[1]);
    else
        put_any_values<D, false>(p, at, places[0]);
}

// -- tokens of windows ---------------------------------------------------------------------------

// Sinks and windows of a sequence, for all rows.
__device__ inline bf16_tokens many_tokens(const many_call &p, const row_block &b)
{
    return bf16_tokens_of<true>(p, {b.s, b.kv, 0, b.length, b.hist_end, b.total});
}

__device__ inline uint32_t many_token_pairs(const bf16_tokens &w)
{
    return (w.count + 2 * PAGE - 1) / (2 * PAGE);
}

// A pair of a round, 16 tokens a warp, as they are: bf16. V's channels are in the order of window_channel, as finish.cuh has them.
template <int D> __global__ void __launch_bounds__(256) many_tokens_kernel(const __grid_constant__ many_call p)
{
    row_block b = {blockIdx.z, blockIdx.y, 0};
    wait_for_previous();
    let_next_start();
    load_lengths(p, b);
    bf16_tokens w = many_tokens(p, b);
    uint32_t pair = p.first_part * p.window_pairs + blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (pair >= many_token_pairs(w))
        return;
    uint8_t *to = values_of<D>(p, b.s, b.kv, 2 * blockIdx.x);
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t token8 = warp * 2 + half, i = pair * 2 * PAGE + token8 * 8;
        auto row = [&](uint32_t token, bool v, uint32_t channel) { // eight of its channels
            if (i + token >= w.count)
                return uint4{};
            return *(const uint4 *)(bf16_row<D, D>(p, b, bf16_position(w, i + token), v) + channel);
        };
#pragma unroll
        for (uint32_t j = 0; j < D / 32; j++) {
            uint32_t channel8 = 4 * j + lane / 8;
            *(uint4 *)(to + (token8 * (D / 8) + channel8) * 128 + lane % 8 * 16) = row(lane % 8, false, 8 * channel8);
        }
#pragma unroll
        for (uint32_t j = 0; j < D / 32; j++) {
            uint4 x = row(lane / 4, true, 32 * j + lane % 4 * 8);
#pragma unroll
            for (uint32_t r = 0; r < 4; r++)
                *(uint32_t *)(to + tile_values<D>::SIDE + ((4 * j + r) * 16 + token8) * 128 + lane * 4) = transpose(word_of(x, r));
        }
    }
}

} // namespace kvd

#endif
