// K's codes in tc2 and tc2.5 as operands. kernels/README.md says how they lie: each of a lane's four registers has a stream of
// bits of its first elements and one of its second elements, with the codes of the channel tiles one after the other.
//
// Codes are masked in place, as int2's: a code of b bits at bit n of an fp16's mantissa is the subnormal code * 2^(n - 24). What
// is looked at where is the set's (kvd_cuda_key_tile), the same for a whole block.
#ifndef KVD_KERNELS_CUDA_TC_CUH
#define KVD_KERNELS_CUDA_TC_CUH

#include "kernels/cuda/device.cuh"

namespace kvd
{

__device__ inline const kvd_cuda_transform &transform_of(const kvd_cuda_rotation &r, uint32_t layer, uint32_t head)
{
    return r.transforms[matrix_index(r, layer, head)];
}

__device__ inline const kvd_cuda_key_tile *key_tiles(const kvd_cuda_transform &t, uint32_t codec)
{
    return t.tiles[codec == TC2_5];
}

// What a warp wants of a transform, a tile a lane: loaded long before it is used. Nothing, for other codecs.
template <int DK, int CODEC> struct key_terms {
    uint32_t view, mask;
    float factor, query_unit;

    __device__ inline void load(const kvd_cuda_transform &t, uint32_t codec)
    {
        const kvd_cuda_key_tile *tile = key_tiles(t, codec) + min(threadIdx.x % 32, DK / 16 - 1);
        view = __ldg(&tile->view), mask = __ldg(&tile->mask), factor = __ldg(&tile->factor);
        query_unit = __ldg(&t.query_unit);
    }
};

// How a block looks at K's codes; nothing, for other codecs.
template <int DK, int CODEC> struct key_views {
    static constexpr int TILES = is_tc(CODEC) ? DK / 16 : 1;
    uint32_t mask[TILES], view[TILES];

    __device__ inline void take(const key_terms<DK, CODEC> &t)
    {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            mask[i] = uniform(threadIdx.x % 32 == i ? t.mask : 0);
            view[i] = uniform(threadIdx.x % 32 == i ? t.view : 0);
        }
    }
};

// Means in shared memory: of K, two bf16 parts for each warp, and of V. Of head_dims filled up to groups of 32.
template <int DK, int DV, int WARPS> struct shared_means {
    static constexpr int K_BYTES = 2 * padded(DK) * 2, BYTES = WARPS * K_BYTES + padded(DV) * 4;
    uint8_t *at;

    __device__ inline const uint16_t *k_part(int part) const
    {
        return (const uint16_t *)(at + threadIdx.x / 32 * K_BYTES) + part * padded(DK);
    }

    __device__ inline const float *v() const
    {
        return (const float *)(at + WARPS * K_BYTES);
    }

    // Asks for V's, and for those of K that the warp uses. These are there after copies_arrived and __syncwarp.
    __device__ inline void fetch(const kvd_cuda_transform &t, bool keys) const
    {
        constexpr uint32_t PART = padded(DK) / 8; // pieces of 16 bytes
        for (uint32_t i = threadIdx.x % 32; i < 2 * PART && keys; i += 32)
            copy_async(at + threadIdx.x / 32 * K_BYTES + i * 16, &t.k_mean_parts[i / PART][i % PART * 8]);
        for (uint32_t i = threadIdx.x; i < padded(DV) / 4; i += WARPS * 32)
            copy_async(at + WARPS * K_BYTES + i * 16, &t.v_mean[i * 4]);
    }
};

// A lane's streams of a chunk, 16 bits a word: halves are those of first and of second elements.
template <int DK, int CODEC> struct key_words {
    static constexpr int TILES = DK / 16, MOST = stream_bits<CODEC>(TC2_5, DK), WORDS = (MOST + 15) / 16;
    uint32_t w[WORDS][4];

    // The L bytes a lane of a piece, L bits of each register's streams.
    template <int L> static __device__ inline void load_piece(const uint8_t *from, uint32_t (&x)[4])
    {
        if constexpr (L == 16) {
            uint4 y = *(const uint4 *)from;
            x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
        } else if constexpr (L == 8) {
            uint2 y = *(const uint2 *)from;
            x[0] = y.x, x[1] = y.x >> 8, x[2] = y.y, x[3] = y.y >> 8;
        } else {
            uint32_t y = L == 4   ? *(const uint32_t *)from
                         : L == 2 ? __byte_perm(*(const uint16_t *)from, 0, 0x4140)
                                  : (*from & 15u) | (*from & 0xf0u) << 12;
            x[0] = y, x[1] = y >> L, x[2] = y >> 2 * L, x[3] = y >> 3 * L;
        }
    }

    // Puts the piece of L bits, if a stream of so many bits has one, into the last word, behind larger ones.
    template <int L> __device__ inline void add_rest(const uint8_t *chunk, int bits, uint32_t (&last)[4])
    {
        if (!(bits & L))
            return;
        int whole = bits / 16 * 16, before = bits % 16 & ~(2 * L - 1);
        uint32_t x[4], field = ((1u << L) - 1) * 0x00010001u;
        load_piece<L>(chunk + 32 * (whole + before) + threadIdx.x % 32 * L, x);
#pragma unroll
        for (int r = 0; r < 4; r++)
            last[r] |= (x[r] & field) << before;
    }

    __device__ inline void load(const uint8_t *tile_at, uint32_t codec, int c)
    {
        const int bits = stream_bits<CODEC>(codec, DK);
        load_streams(tile_at + c * 32 * bits, bits);
    }

    // Of a chunk whose streams have so many bits.
    __device__ inline void load_streams(const uint8_t *chunk, int bits)
    {
        uint32_t rest[4] = {};
        add_rest<8>(chunk, bits, rest);
        add_rest<4>(chunk, bits, rest);
        add_rest<2>(chunk, bits, rest);
        add_rest<1>(chunk, bits, rest);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            if (16 * i + 16 <= bits) {
                load_piece<16>(chunk + 512 * i + threadIdx.x % 32 * 16, w[i]);
                continue;
            }
#pragma unroll
            for (int r = 0; r < 4; r++)
                w[i][r] = 16 * i < bits ? rest[r] : 0;
        }
    }

    // 16 bits of register r's streams from any of their bits on.
    __device__ inline uint32_t bits_from(uint32_t view, int r) const
    {
        uint32_t in = view % 16, mine = (0xffffu >> in) * 0x00010001u;
        uint32_t x0 = w[0][r], x1 = w[1][r], x2 = WORDS > 2 ? w[WORDS - 1][r] : 0;
        uint32_t low = view < 16 ? x0 : view < 32 ? x1 : x2, high = view < 16 ? x1 : x2;
        return (low >> in & mine) | (high << (16 - in) & ~mine);
    }

    // Where a tile's codes can begin and end, whatever the set says, is looked at no further.
    template <int CT> __device__ inline void operand(const key_views<DK, CODEC> &views, uint32_t (&a)[4]) const
    {
        constexpr int BITS = CODEC == TC ? 0 : MOST;
        constexpr bool first = 4 * (CT + 1) <= 10 || (BITS > 0 && BITS <= 10);
        constexpr int least_end = BITS - 4 * (TILES - 1 - CT); // of a tile that has codes
        uint32_t mask = views.mask[CT], view = views.view[CT];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if constexpr (first) {
                a[r] = w[0][r] & mask;
            } else if constexpr (BITS > 10 && BITS <= 16) {
                a[r] = (least_end > 10 ? w[0][r] >> 6 : w[0][r] >> view) & mask;
            } else if constexpr (BITS > 16 && BITS <= 20) {
                uint32_t last = (w[0][r] >> 10 & 0x003f003fu) | (w[WORDS - 1][r] << 6 & ~0x003f003fu);
                if (least_end >= 14)
                    a[r] = last & mask;
                else
                    a[r] = (view == 10 ? last : w[0][r] >> (view & 7)) & mask;
            } else if constexpr (WORDS == 1) {
                a[r] = (w[0][r] >> view) & mask;
            } else {
                a[r] = bits_from(view, r) & mask;
            }
        }
    }
};

// The products of a lane's query rows with the keys' mean: of rows 2 t and 2 t + 1. `q` as operands in the order of
// forward_channel, `low` what they leave of an f32.
template <bool F32, int DK, typename M>
__device__ inline void query_means(const M &means, const uint32_t (&q)[padded(DK) / 8],
                                   const uint32_t (&low)[padded(DK) / 8], float (&out)[2])
{
    float c[2][4] = {};
#pragma unroll
    for (int part = 0; part < 2; part++)
#pragma unroll
        for (int i = 0; i < padded(DK) / 32; i++) {
            uint4 x = *(const uint4 *)(means.k_part(part) + 32 * i + threadIdx.x % 4 * 8);
            const uint32_t a0[4] = {x.x, x.x, x.y, x.y}, a1[4] = {x.z, x.z, x.w, x.w};
            mma_bf16(c[0], a0, q[4 * i], q[4 * i + 1]);
            mma_bf16(c[1], a1, q[4 * i + 2], q[4 * i + 3]);
            if (F32 && part == 0) {
                mma_bf16(c[0], a0, low[4 * i], low[4 * i + 1]);
                mma_bf16(c[1], a1, low[4 * i + 2], low[4 * i + 3]);
            }
        }
    out[0] = c[0][0] + c[1][0];
    out[1] = c[0][1] + c[1][1];
}

} // namespace kvd

#endif
