// Rows of tensors and of bf16 pages.
#ifndef KVD_KERNELS_CUDA_ROWS_CUH
#define KVD_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/device.cuh"
#include "kernels/format.h"

namespace kvd
{

// Index of the item that a running number falls into: the last whose `first` is not beyond it.
template <typename F> __device__ inline uint32_t find_item(uint32_t n, uint32_t at, F first)
{
    uint32_t low = 0, high = n;
    while (high - low > 1) {
        uint32_t mid = (low + high) / 2;
        if (first(mid) <= at)
            low = mid;
        else
            high = mid;
    }
    return low;
}

__device__ inline uint8_t *tensor_row(const kvd_cuda_tensor &x, uint32_t layer, uint32_t token,
                                      uint32_t head)
{
    return x.data + layer * x.layer_stride + token * x.token_stride + head * x.head_stride;
}

// Page table entry and row of a token of sink or ring.
__device__ inline void window_place(uint32_t sink, uint32_t ring, uint32_t token, uint32_t &entry,
                                    uint32_t &row)
{
    entry = token / PAGE;
    row = token % PAGE;
    if (token >= sink) {
        uint32_t at = (token - sink) % ring;
        entry = (sink + PAGE - 1) / PAGE + at / PAGE;
        row = at % PAGE;
    }
}

// Where a tile's sides lie in it, each in its codec.
struct tile_layout {
    uint32_t bytes, codes[2], params[2]; // of K, of V

    tile_layout() = default;

    tile_layout(struct kvd_codecs codec, uint32_t dim_k, uint32_t dim_v)
        : bytes((uint32_t)kvd_tile_bytes(codec, dim_k, dim_v))
    {
        for (int v = 0; v < 2; v++) {
            codes[v] = kvd_codes_offset(codec, dim_k, v);
            params[v] = kvd_params_offset(codec, dim_k, dim_v, v);
        }
    }

    // From the start of a page.
    __device__ inline uint64_t at(uint32_t layer, uint32_t kv_heads, uint32_t head) const
    {
        return ((uint64_t)layer * kv_heads + head) * bytes;
    }
};

// Of a tile in a page of windows, which kv heads have one behind the other.
__device__ inline uint32_t bf16_tile_bytes(uint32_t dim_k, uint32_t dim_v)
{
    return PAGE * 2 * (dim_k + dim_v);
}

// The bf16 row `row` of a tile in a page of windows.
__device__ inline uint8_t *bf16_tile_row(uint64_t page, uint32_t layer, uint32_t kv_heads,
                                         uint32_t head, uint32_t dim_k, uint32_t dim_v,
                                         uint32_t row, bool v)
{
    uint64_t tile = ((uint64_t)layer * kv_heads + head) * bf16_tile_bytes(dim_k, dim_v);
    return (uint8_t *)page + tile + (v ? PAGE * 2 * dim_k + row * 2 * dim_v : row * 2 * dim_k);
}

// One side of a token in one layer and kv head, by the warp's number in a grid that takes all.
struct row_of_warp {
    uint64_t token;
    uint32_t layer, head;
    bool v;
};

__device__ inline row_of_warp warp_row(uint32_t layers, uint32_t kv_heads)
{
    uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32, rest = i / 2 / kv_heads;
    return {rest / layers, (uint32_t)(rest % layers), (uint32_t)(i / 2 % kv_heads), i % 2 == 1};
}

constexpr int ROW_THREADS = 256;

// Blocks of ROW_THREADS for all rows of `tokens` tokens.
inline uint32_t row_blocks(uint64_t tokens, uint32_t layers, uint32_t kv_heads)
{
    return (uint32_t)((tokens * layers * kv_heads * 2 * 32 + ROW_THREADS - 1) / ROW_THREADS);
}

} // namespace kvd

#endif
