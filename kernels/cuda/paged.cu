// Copies between an inference engine's blocks and dense tensors.
#include "kernels/cuda/rows.cuh"

#include <climits>

namespace kvd
{

using paged_params = kvd_cuda_paged_params;

__device__ inline uint8_t *in_block(const paged_params &p, uint32_t layer, uint32_t head, uint32_t token)
{
    uint64_t at = (uint64_t)p.first_token + token;
    return p.layers[layer] + p.blocks[at / p.block_tokens] * p.block_stride + head * p.head_stride +
           at % p.block_tokens * p.token_stride;
}

template <typename T> __device__ inline void copy_one(uint8_t *block, uint8_t *dense, bool out)
{
    *(T *)(out ? block : dense) = *(const T *)(out ? dense : block);
}

// A thread for each T of the rows, layers in blockIdx.y. Channels of a row lie side by side in the blocks too.
template <typename T> __global__ void paged_rows_kernel(const __grid_constant__ paged_params p)
{
    uint32_t parts = p.dim * 2 / sizeof(T), layer = blockIdx.y;
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / parts;
    if (row >= (uint64_t)p.tokens * p.heads)
        return;
    uint32_t token = (uint32_t)(row / p.heads), head = (uint32_t)(row % p.heads), at = (uint32_t)(i % parts) * sizeof(T);
    copy_one<T>(in_block(p, layer, head, token) + at, p.dense + layer * p.dense_layer_stride + row * p.dim * 2 + at, p.out);
}

// Tokens lie side by side in the blocks: 32 of them by 32 channels of a head go through shared memory.
// Block (32 tokens, 32 channels, layer and head).
__global__ void paged_columns_kernel(const __grid_constant__ paged_params p)
{
    __shared__ uint16_t tile[32][33];
    uint32_t layer = blockIdx.z / p.heads, head = blockIdx.z % p.heads, x = threadIdx.x % 32;
    auto dense = [&](uint32_t token, uint32_t channel) {
        return (uint16_t *)(p.dense + layer * p.dense_layer_stride) + ((uint64_t)token * p.heads + head) * p.dim + channel;
    };
    auto block = [&](uint32_t token, uint32_t channel) {
        return (uint16_t *)(in_block(p, layer, head, token) + channel * p.dim_stride);
    };
    auto each = [&](bool blocks, auto act) { // neighbours in a warp are neighbours in that memory
        for (uint32_t y = threadIdx.x / 32; y < 32; y += blockDim.x / 32) {
            uint32_t token = blockIdx.x * 32 + (blocks ? x : y), channel = blockIdx.y * 32 + (blocks ? y : x);
            if (token < p.tokens && channel < p.dim)
                act(tile[token % 32][channel % 32], token, channel);
        }
    };
    if (p.out) {
        each(false, [&](uint16_t &t, uint32_t token, uint32_t channel) { t = *dense(token, channel); });
        __syncthreads();
        each(true, [&](uint16_t &t, uint32_t token, uint32_t channel) { *block(token, channel) = t; });
    } else {
        each(true, [&](uint16_t &t, uint32_t token, uint32_t channel) { t = *block(token, channel); });
        __syncthreads();
        each(false, [&](uint16_t &t, uint32_t token, uint32_t channel) { *dense(token, channel) = t; });
    }
}

template <typename T> static cudaError_t copy_rows(const paged_params &p, cudaStream_t stream)
{
    constexpr int THREADS = 256;
    uint64_t n = (uint64_t)p.tokens * p.heads * (p.dim * 2 / sizeof(T)), blocks = (n + THREADS - 1) / THREADS;
    if (blocks > INT_MAX)
        return cudaErrorInvalidValue;
    return launch(paged_rows_kernel<T>, dim3((uint32_t)blocks, p.n_layers), THREADS, 0, stream, p);
}

} // namespace kvd

using namespace kvd;

extern "C" int kvd_cuda_code_check(void)
{
    cudaFuncAttributes code;
    return cudaFuncGetAttributes(&code, paged_columns_kernel);
}

extern "C" int kvd_cuda_paged(const struct kvd_cuda_paged_params *p, struct CUstream_st *stream)
{
    if (p->tokens == 0 || p->n_layers == 0)
        return cudaSuccess;
    if (p->n_layers > 65535 || (uint64_t)p->n_layers * p->heads > 65535)
        return cudaErrorInvalidValue;
    if (p->dim_stride != 2)
        return launch(paged_columns_kernel, dim3((p->tokens + 31) / 32, (p->dim + 31) / 32, p->n_layers * p->heads), 256, 0,
                      stream, *p);
    uint64_t all = p->aligned | p->block_stride | p->head_stride | p->token_stride | p->dim * 2 | (uintptr_t)p->dense |
                   p->dense_layer_stride;
    return all % 16 == 0 ? copy_rows<uint4>(*p, stream) : copy_rows<uint16_t>(*p, stream);
}
