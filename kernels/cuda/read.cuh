// Pages to rows: what the codecs share.
#ifndef KVD_KERNELS_CUDA_READ_CUH
#define KVD_KERNELS_CUDA_READ_CUH

#include "kernels/cuda/rows.cuh"

namespace kvd
{

// A call, or a launch for one side of its history: `codec` is that side's.
struct read_params : kvd_cuda_read_params {
    tile_layout tile;
};

constexpr int READ_WARPS = 8;

// Codes of a chunk as A operands with tokens as rows: as they lie for K, each word transposed for V.
// The chunk's bits lie as those of chunk C.
template <int CODEC, int D, int C = 0>
__device__ inline void chunk_operands(const uint8_t *codes, uint32_t chunk, bool v,
                                      uint32_t (&a)[D / 16][4])
{
    using words = code_words<D, CODEC>;
    if constexpr (C + 1 < words::PLACES)
        if (chunk % words::PLACES != C)
            return chunk_operands<CODEC, D, C + 1>(codes, chunk, v, a);
    words w;
    w.load(codes, (int)chunk);
    static_for<D / 16>([&](auto ct) {
        uint32_t x[4];
        w.template operand<C, ct>(x);
        if (v) {
            a[ct][0] = transpose(x[0]), a[ct][1] = transpose(x[2]);
            a[ct][2] = transpose(x[1]), a[ct][3] = transpose(x[3]);
        } else {
            a[ct][0] = x[0], a[ct][1] = x[1], a[ct][2] = x[2], a[ct][3] = x[3];
        }
    });
}

// Blocks for each of `units` (layer, kv head) pairs when one takes `per_round` chunks at a time. A
// block reads its matrix once: it should have a few rounds, unless blocks are few.
inline uint32_t chunk_blocks(uint32_t chunks, uint32_t per_round, uint32_t units)
{
    uint32_t most = (chunks + per_round - 1) / per_round;
    uint32_t want = (most + 7) / 8, fill = (264 + units - 1) / units;
    return want > fill ? want : fill < most ? fill : most;
}

// read_tc.cu: a side of the history, in tc2 or tc2.5.
cudaError_t read_tc(const read_params &p, uint32_t begin, uint32_t end, bool v, cudaStream_t stream);

} // namespace kvd

#endif
