// What brings the values that a block of many rows attends to. Those that were made ahead are only fetched; for CODES two warpgroups
// make them of int2's codes, in the order in which many_values.cuh has them.
#ifndef KVD_KERNELS_CUDA_MANY_CODES_CUH
#define KVD_KERNELS_CUDA_MANY_CODES_CUH

#include "kernels/cuda/many_memory.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace kvd
{

#if KVD_WARPGROUP

// By one thread.
template <int D, typename M, typename P> __device__ inline void fetch_values(const many_call &p, const row_block &b, const M &mem, const P &pairs)
{
    const uint8_t *from = values_of<D>(p, b.s, b.kv, 0);
    uint64_t policy = cache_policy(false);
    ring_place at = {0, 0};
    for (uint32_t i = 2 * (pairs.first - pairs.round); i < 2 * (pairs.end - pairs.round); i++) {
        barrier_wait(mem.empty(at.slot), at.phase ^ 1);
        fetch(mem.slot(at.slot), from + (uint64_t)i * mem.SIDE, mem.SIDE, mem.full(at.slot), policy);
        at.template next<mem.SLOTS>(1);
    }
}

// Two elements' scales and mins, for tokens g and g + 8 of a chunk where rows are tokens, or for tokens 2 t + e and 2 t + e + 8.
struct half_params {
    uint32_t scale[2], min[2];

    // As stored, by a quarter. There are none of what was never written.
    template <bool V> __device__ inline void load(const uint8_t *params, uint32_t chunk, int left)
    {
        const uint32_t QUARTER = 0x34003400, NOTHING = 0x80008000; // -0, which changes no product
        uint32_t raw[2][2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int token = V ? threadIdx.x % 4 * 2 + e : threadIdx.x % 32 / 4;
            uint2 x = *(const uint2 *)(params + chunk * 64 + token * 8);
            raw[e][0] = !V || token < left ? x.x : 0;
            raw[e][1] = !V || token + 8 < left ? x.y : 0;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            scale[h] = fma_fp16(__byte_perm(raw[0][h], raw[1][h], 0x5410), QUARTER, NOTHING);
            min[h] = fma_fp16(__byte_perm(raw[0][h], raw[1][h], 0x7632), QUARTER, NOTHING);
        }
    }
};

// Values of a chunk of one side: its codes, masked where they are, become numbers above 1,024, then codes, then values. Register r
// is a core matrix of its own, whose rows `to` has the addresses of, of channel tile 0.
template <int D, bool V> __device__ inline void make_chunk(uint32_t thousand, const uint4 &words, uint32_t first_bit, const half_params &params, uint8_t *to)
{
    // 4^-j and -1024 4^-j, twice each: what takes a code at bit 2 j back.
    const uint32_t unit[4] = {0x3c003c00, 0x34003400, 0x2c002c00, 0x24002400};
    const uint32_t back[4] = {0xe400e400, 0xdc00dc00, 0xd400d400, 0xcc00cc00};
#pragma unroll
    for (int ct = 0; ct < D / 16; ct++) {
        uint32_t x[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t half = V ? r / 2 : r % 2, w = word_of(words, r) >> (ct < 4 ? first_bit : 8);
            uint32_t code = fma_fp16((w & 0x00030003u << 2 * (ct % 4)) | thousand, unit[ct % 4], back[ct % 4]);
            x[r] = fma_fp16(code, params.scale[half], params.min[half]);
        }
        store_matrices(to + ct * (V ? 2 * tile_values<D>::TOKENS / 8 : 2) * 128, x);
    }
}

// What a warp makes values of: two chunks of each pair, of one side. They are copied two pairs ahead to where no other warp looks,
// so that the warp waits for nobody but memory, and its place is free again as soon as it has read them.
template <int D, bool V, typename M, typename P> class coded_chunks
{
    const many_call &p;
    const M &mem;
    const P &pairs;
    const uint64_t *pages;
    const uint32_t maker = threadIdx.x / 32 - MANY_WARPS, lane = threadIdx.x % 32, chunk = maker % 2 * 2; // of the tile
    uint64_t offset, page; // of the tile to be asked for next, 0 of one that no row sees
    uint32_t tile;
    int tokens;

    __device__ inline void look()
    {
        page = tile >= pairs.first_tile && tile < pairs.end_tile ? pages[tile] : 0;
    }

public:
    uint4 words[2];
    half_params params[2];

    __device__ inline coded_chunks(const many_call &p, const row_block &b, const M &mem, const P &pairs)
        : p(p), mem(mem), pairs(pairs), pages(p.pages.codec + (uint64_t)b.s * p.pages.codec_stride),
          offset(p.tile.at(p.layer, p.kv_heads, b.kv) + lane * 16), tile(2 * pairs.first + maker % 4 / 2),
          tokens((int)(b.hist_end - p.sink))
    {
        look();
    }

    // Asks for those of the next pair, if there is one.
    __device__ inline void ask(uint32_t stage)
    {
        if (page) {
            const uint8_t *from = (const uint8_t *)page + offset;
            uint8_t *to = mem.coded(maker, stage) + lane * 16;
            copy_async(to, from + p.tile.codes[V] + (D == 64 ? chunk / 2 : chunk) * 512);
            if (D != 64)
                copy_async(to + 512, from + p.tile.codes[V] + (chunk + 1) * 512);
            if (lane < 8)
                copy_async(to + 1024, from + p.tile.params[V] + chunk * 64);
        }
        copies_grouped();
        tile += 2;
        look();
    }

    // Reads those of a pair, which was asked for before all others that are under way. Of one behind the last nothing is used.
    __device__ inline void read(uint32_t stage, uint32_t pair)
    {
        groups_arrived<M::STAGES - 1>();
        __syncwarp();
        uint32_t of = 2 * pair + maker % 4 / 2;
        int left = of >= pairs.first_tile && of < pairs.end_tile ? tokens - (int)(of * PAGE + chunk * 16) : 0;
        const uint8_t *from = mem.coded(maker, stage);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            words[i] = *(const uint4 *)(from + (D == 64 ? 0 : i) * 512 + lane * 16);
            params[i].template load<V>(from + 1024, i, left - i * 16);
        }
        __syncwarp();
    }
};

// One side, by the four warps of a warpgroup: what one waits for, the fence above all, takes as long as what it computes, so that the
// sides have one each.
template <int D, bool V, typename M, typename P> __device__ inline void make_values(const many_call &p, const row_block &b, const M &mem, const P &pairs)
{
    coded_chunks<D, V, M, P> codes(p, b, mem, pairs);
    for (uint32_t i = 0; i < M::STAGES; i++)
        codes.ask(i);
    if (pairs.first < pairs.end)
        codes.read(0, pairs.first);
    ring_place at = {V, 0};
    uint32_t stage = 0;
#pragma unroll 1
    for (uint32_t pair = pairs.first; pair < pairs.end; pair++) {
        codes.ask(stage);
        barrier_wait(mem.empty(at.slot), at.phase ^ 1);
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            // Matrices of 8 tokens by 8 channels: register r's is of tokens from 8 (r % 2) on and channels from 8 (r / 2) on, or the reverse.
            uint32_t r = threadIdx.x % 32 / 8, chunk = threadIdx.x / 32 % 4 * 2 + i;
            uint32_t token8 = 2 * chunk + (V ? r / 2 : r % 2), channel8 = V ? r % 2 : r / 2;
            uint32_t matrix = V ? channel8 * (tile_values<D>::TOKENS / 8) + token8 : token8 * (D / 8) + channel8;
            uint8_t *to = mem.slot(at.slot) + matrix * 128 + threadIdx.x % 8 * 16;
            make_chunk<D, V>(p.thousand, codes.words[i], D == 64 ? i * 8 : 0, codes.params[i], to);
        }
        stage ^= 1;
        codes.read(stage, pair + 1); // while stores are under way
        barriers_ready();            // products may read them
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            arrive(mem.full(at.slot));
        at.template next<M::SLOTS>(2);
    }
    copies_arrived();
}
#endif

} // namespace kvd

#endif
