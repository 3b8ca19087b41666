// Latents (MLA) on a GPU: their sizes, and products of rows with their matrices of 512 x 512, which fit no block's registers or
// shared memory and are read where they lie, in the L2 cache.
#ifndef KVD_KERNELS_CUDA_LATENT_CUH
#define KVD_KERNELS_CUDA_LATENT_CUH

#include "kernels/cuda/rows.cuh"

namespace kvd
{

constexpr uint32_t LATENT = 512, ROPE = 64, LATENT_TILES = LATENT / 16, ROPE_TILES = ROPE / 16;
constexpr uint32_t LATENT_ROW = LATENT + ROPE; // of q

#define KVD_LATENT_DIMS(rope, latent) \
    static_assert((rope) == ROPE && (latent) == LATENT, "kernels over latents have these sizes compiled in");
#include "proto/head_dims.def"

// c += A B for 16 MT rows and N tiles of 8 outputs from `out8` on; B is a packed matrix, or a part of one. operand(i, a) gives
// the rows' inputs of group i of 32, multiply(c, a, x, y) is an mma.
template <int MT, int N, typename A, typename M>
__device__ inline void multiply_latents(float (&c)[MT][N][4], const uint32_t *matrix, uint32_t out8, A &&operand, M &&multiply)
{
#pragma unroll 1
    for (uint32_t i = 0; i < LATENT / 32; i++) {
        uint32_t a[MT][2][4];
        operand(i, a);
#pragma unroll
        for (int j = 0; j < N; j++) {
            uint4 b = __ldg(packed<LATENT>::at(matrix, (int)out8 + j, (int)i));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply(c[m][j], a[m][0], b.x, b.y);
                multiply(c[m][j], a[m][1], b.z, b.w);
            }
        }
    }
}

template <int MT, int N> __device__ inline void clear_products(float (&c)[MT][N][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
            c[m][j][0] = c[m][j][1] = c[m][j][2] = c[m][j][3] = 0;
}

// 16 bytes of row g (half 0) or g + 8 of a tile of 16 rows, the lane's channels of a group of 32, as A operands of bf16.
__device__ inline void put_group(uint32_t (&a)[2][4], int half, const uint4 &x)
{
#pragma unroll
    for (int k = 0; k < 4; k++)
        a[k / 2][k % 2 * 2 + half] = word_of(x, k);
}

} // namespace kvd

#endif
