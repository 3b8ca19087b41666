// Rows of bf16 by tokens: a warp takes those of a token's side in one layer, of all kv heads. What
// a warp has to find out first, an item and where it lies, takes longer than a row does.
#ifndef KVD_KERNELS_CUDA_TOKEN_ROWS_CUH
#define KVD_KERNELS_CUDA_TOKEN_ROWS_CUH

#include "kernels/cuda/rows.cuh"

namespace kvd
{

constexpr uint32_t TOKENS_OF_BLOCK = ROW_THREADS / 64;

// By the warp's number in a grid of token_blocks.
struct side_of_warp {
    uint32_t token, layer;
    bool v;

    __device__ inline side_of_warp()
    {
        token = blockIdx.x * TOKENS_OF_BLOCK + threadIdx.x / 64;
        layer = blockIdx.y;
        v = threadIdx.x / 32 % 2 == 1;
    }
};

// Blocks of ROW_THREADS for both sides of all tokens.
inline dim3 token_blocks(uint32_t tokens, uint32_t layers)
{
    return dim3((tokens + TOKENS_OF_BLOCK - 1) / TOKENS_OF_BLOCK, layers);
}

// Rows of as many bytes, one a kv head; 16-byte aligned.
struct head_rows {
    uint8_t *at;
    uint64_t stride;

    // Piece i, of 16 bytes, of all rows one behind the other. A row has `of_row`.
    __device__ inline uint8_t *piece(uint32_t i, uint32_t of_row) const
    {
        return at + i / of_row * stride + i % of_row * 16;
    }
};

__device__ inline head_rows rows_of(const kvd_cuda_tensor &x, uint32_t layer, uint32_t token)
{
    return {tensor_row(x, layer, token, 0), x.head_stride};
}

constexpr int PIECES = 4; // that a lane has under way

// Of all rows, a lane's piece k of those that the warp takes from piece `first` on.
__device__ inline uint32_t piece_of_lane(uint32_t first, int k)
{
    return first + threadIdx.x % 32 + 32 * k;
}

// A lane's next pieces; zeros beyond `all`.
__device__ inline void load_pieces(uint4 (&x)[PIECES], const head_rows &from, uint32_t first,
                                   uint32_t of_row, uint32_t all)
{
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        uint32_t i = piece_of_lane(first, k);
        x[k] = i < all ? *(const uint4 *)from.piece(i, of_row) : uint4{};
    }
}

// A warp copies rows of `bytes` bytes.
__device__ inline void copy_rows(const head_rows &to, const head_rows &from, uint32_t heads,
                                 uint32_t bytes)
{
    uint32_t of_row = bytes / 16, all = heads * of_row;
    for (uint32_t first = 0; first < all; first += 32 * PIECES) {
        uint4 x[PIECES];
        load_pieces(x, from, first, of_row, all);
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            uint32_t i = piece_of_lane(first, k);
            if (i < all)
                *(uint4 *)to.piece(i, of_row) = x[k];
        }
    }
}

// Whether one of a piece's eight values is NaN or Inf.
__device__ inline bool is_bad(const uint4 &x)
{
    bool bad = false;
#pragma unroll
    for (int r = 0; r < 4; r++)
        bad |= (word_of(x, r) & 0x7f80) == 0x7f80 || (word_of(x, r) & 0x7f800000) == 0x7f800000;
    return bad;
}

// The first row in which a lane has found NaN or Inf; `heads`: it has found none.
__device__ inline uint32_t first_bad(const head_rows &from, uint32_t heads, uint32_t bytes)
{
    uint32_t of_row = bytes / 16, all = heads * of_row, least = all;
    for (uint32_t first = 0; first < all; first += 32 * PIECES) {
        uint4 x[PIECES];
        load_pieces(x, from, first, of_row, all);
#pragma unroll
        for (int k = 0; k < PIECES; k++)
            if (is_bad(x[k]))
                least = min(least, piece_of_lane(first, k));
    }
    return least / of_row;
}

} // namespace kvd

#endif
