// Pages to rows: history dequantized and un-rotated, windows copied. Also rotation of rows, copies
// between layouts, zeroing and checksums.
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/read.cuh"

namespace kvd
{

__device__ inline void convert_row(uint8_t *to, bool to_f32, const uint8_t *from, bool from_f32,
                                   uint32_t dim)
{
    for (uint32_t c = threadIdx.x % 32; c < dim; c += 32)
        store_value(to + c * (to_f32 ? 4 : 2), to_f32, load_value(from + c * (from_f32 ? 4 : 2), from_f32));
}

// A warp for each (token, layer, kv head, side) that lies in bf16.
__global__ void read_bf16_kernel(const __grid_constant__ read_params p)
{
    auto [n, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    const kvd_cuda_tensor &out = v ? p.v : p.k;
    if (n >= p.tokens || !out.data)
        return;
    uint32_t token = p.begin + (uint32_t)n, dim = v ? p.dim_v : p.dim_k, h = token - p.sink, entry, row;
    const uint8_t *from;
    if (token >= p.sink && token < p.hist_end) {
        if ((v ? p.codec_v : p.codec) != KVD_CODEC_BF16)
            return;
        from = (const uint8_t *)p.codec_pages[h / PAGE] + p.tile.at(p.layer_begin + layer, p.kv_heads, head) +
               p.tile.codes[v] + h % PAGE * 2 * dim;
    } else {
        window_place(p.sink, p.ring, token, entry, row);
        from = bf16_tile_row(p.bf16_pages[entry], p.layer_begin + layer, p.kv_heads, head, p.dim_k, p.dim_v, row, v);
    }
    convert_row(tensor_row(out, layer, (uint32_t)n, head), out.dtype == KVD_DTYPE_F32, from, false, dim);
}

template <int CODEC>
static cudaError_t read_dim(const read_params &p, uint32_t begin, uint32_t end, bool v, cudaStream_t stream)
{
    switch (v ? p.dim_v : p.dim_k) {
#define KVD_HEAD_DIM(d) \
    case d:             \
        return read_side<CODEC, d>(p, begin, end, v, stream);
#include "proto/head_dims.def"
    default:
        return cudaErrorInvalidValue;
    }
}

// A side of the history; in bf16, another kernel reads it.
static cudaError_t read_history(read_params p, uint32_t begin, uint32_t end, bool v, cudaStream_t stream)
{
    p.codec = v ? p.codec_v : p.codec;
    if (!(v ? p.v.data : p.k.data) || p.codec == KVD_CODEC_BF16)
        return cudaSuccess;
    if (v && p.dim_v == LATENT)
        return read_latents(p, begin, end, stream);
    switch (family_of(p.codec)) {
    case INT2:
        return read_dim<INT2>(p, begin, end, v, stream);
    case INT2C:
        return read_dim<INT2C>(p, begin, end, v, stream);
    case LEVELS2:
        return read_dim<LEVELS2>(p, begin, end, v, stream);
    case LEVELS3:
        return read_dim<LEVELS3>(p, begin, end, v, stream);
    case LEVELS4:
        return read_dim<LEVELS4>(p, begin, end, v, stream);
    case INT4:
        return read_dim<INT4>(p, begin, end, v, stream);
    case TC:
        return p.rotation.transforms ? read_tc(p, begin, end, v, stream) : cudaErrorInvalidValue;
    default:
        return cudaErrorInvalidValue;
    }
}

// -- rotation of rows ----------------------------------------------------------------------------

// Block (row, layer): all heads of a row, a thread for each channel. Plain fp32.
__global__ void rotate_kernel(const __grid_constant__ kvd_cuda_rotate_params p)
{
    __shared__ float x[KVD_MAX_ROW];
    uint32_t layer = blockIdx.y, c = threadIdx.x;
    bool from_f32 = p.x.dtype == KVD_DTYPE_F32, to_f32 = p.y.dtype == KVD_DTYPE_F32;
    for (uint32_t head = 0; head < p.heads; head++) {
        uint32_t kv = head / (p.heads / p.kv_heads);
        uint64_t index = (uint64_t)(p.n_layers == 1 ? 0 : p.layer_begin + layer) * p.rotation_heads +
                         (p.rotation_heads == 1 ? 0 : kv);
        const uint8_t *from = tensor_row(p.x, layer, blockIdx.x, head);
        uint8_t *to = tensor_row(p.y, layer, blockIdx.x, head);
        const float *mean = nullptr;
        if (p.less_mean || p.plus_mean)
            mean = p.values ? p.transforms[index].v_mean : p.transforms[index].k_mean;
        x[c] = load_value(from + c * (from_f32 ? 4 : 2), from_f32) - (p.less_mean ? mean[c] : 0);
        __syncthreads();
        float sum = x[c];
        if (p.matrices) {
            const float *m = p.matrices + index * p.dim * p.dim;
            uint32_t from_input = p.transposed ? 1 : p.dim, from_output = p.transposed ? p.dim : 1;
            sum = 0;
            for (uint32_t i = 0; i < p.dim; i++)
                sum = fmaf(x[i], m[i * from_input + c * from_output], sum);
        }
        if (p.plus_mean)
            sum += mean[c];
        store_value(to + c * (to_f32 ? 4 : 2), to_f32, sum);
        __syncthreads();
    }
}

// -- memory --------------------------------------------------------------------------------------

__global__ void copy_kernel(kvd_cuda_tensor x, kvd_cuda_tensor y, uint32_t tokens, uint32_t heads,
                            uint32_t dim, uint64_t rows)
{
    uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (i >= rows)
        return;
    uint32_t head = i % heads, token = i / heads % tokens, layer = (uint32_t)(i / heads / tokens);
    convert_row(tensor_row(y, layer, token, head), y.dtype == KVD_DTYPE_F32,
                tensor_row(x, layer, token, head), x.dtype == KVD_DTYPE_F32, dim);
}

enum { SUM_BLOCKS = 8, SUM_THREADS = 256 };

// kvd_words_sum of backend.h, of page blockIdx.y by the blocks of its row.
__global__ void sums_kernel(const kvd_cuda_span *pages, unsigned long long *sums)
{
    const uint4 *at = (const uint4 *)pages[blockIdx.y].addr;
    uint32_t n = (uint32_t)(pages[blockIdx.y].bytes / 16), step = gridDim.x * blockDim.x;
    unsigned long long s = 0;
#pragma unroll 4
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        uint4 v = __ldcs(&at[i]);
        uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; k++)
            s += (unsigned long long)w[k] * (2 * (4 * i + k) + 1);
    }
#pragma unroll
    for (int x = 1; x < 32; x *= 2)
        s += __shfl_xor_sync(~0u, s, x);
    if (threadIdx.x % 32 == 0)
        atomicAdd(&sums[blockIdx.y], s);
}

} // namespace kvd

using namespace kvd;

extern "C" int kvd_cuda_read(const struct kvd_cuda_read_params *p, struct CUstream_st *stream)
{
    uint32_t begin = p->begin > p->sink ? p->begin : p->sink;
    uint32_t end = p->begin + p->tokens < p->hist_end ? p->begin + p->tokens : p->hist_end;
    bool coded = p->codec != KVD_CODEC_BF16 && p->codec_v != KVD_CODEC_BF16;
    read_params call;
    (kvd_cuda_read_params &)call = *p;
    call.tile = tile_layout({p->codec, p->codec_v}, p->dim_k, p->dim_v);
    cudaError_t rc = cudaSuccess;
    for (int v = 0; v < 2 && rc == cudaSuccess && begin < end; v++)
        rc = read_history(call, begin, end, v, stream);
    if (rc == cudaSuccess && !(coded && begin == p->begin && end == p->begin + p->tokens))
        rc = launch(read_bf16_kernel, row_blocks(p->tokens, p->layer_count, p->kv_heads), ROW_THREADS, 0, stream, call);
    return rc;
}

extern "C" int kvd_cuda_rotate(const struct kvd_cuda_rotate_params *p, struct CUstream_st *stream)
{
    return launch(rotate_kernel, dim3(p->rows, p->layer_count), p->dim, 0, stream, *p);
}

extern "C" int kvd_cuda_copy(const struct kvd_cuda_tensor *x, const struct kvd_cuda_tensor *y,
                             uint32_t layers, uint32_t tokens, uint32_t heads, uint32_t dim,
                             struct CUstream_st *stream)
{
    uint64_t rows = (uint64_t)layers * tokens * heads;
    if (rows == 0)
        return cudaSuccess;
    return launch(copy_kernel, (uint32_t)((rows + 7) / 8), 256, 0, stream, *x, *y, tokens, heads, dim, rows);
}

extern "C" int kvd_cuda_zero(void *at, uint64_t bytes, struct CUstream_st *stream)
{
    return cudaMemsetAsync(at, 0, bytes, stream);
}

extern "C" int kvd_cuda_sums(const struct kvd_cuda_span *pages, uint32_t n, unsigned long long *sums,
                             struct CUstream_st *stream)
{
    cudaError_t rc = cudaMemsetAsync(sums, 0, n * sizeof(*sums), stream);
    if (rc == cudaSuccess && n)
        rc = launch(sums_kernel, dim3(SUM_BLOCKS, n), SUM_THREADS, 0, stream, pages, sums);
    return rc;
}
