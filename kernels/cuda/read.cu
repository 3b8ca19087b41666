// Pages to rows: history dequantized and un-rotated, windows copied. Also rotation of rows, copies
// between layouts, zeroing and checksums.
//
// Un-rotation is a product of codes, masked in place as in attention, with R^T: scale and min act
// on its results, out = scale * (codes R^T) + min * (sums of R^T's columns).
#include "kernels/cuda/read.cuh"

namespace kvd
{

// Block (share of the chunks, layer and kv head). One side of a sequence's history.
template <int CODEC, int D>
__global__ void __launch_bounds__(READ_WARPS * 32, D > 128 ? 1 : 2)
    read_history_kernel(const __grid_constant__ read_params p, uint32_t begin, uint32_t end, bool v)
{
    constexpr int MT = D > 128 ? 1 : 2, P = packed<D>::P, WORDS = packed<D>::WORDS;
    constexpr bool STAGED = D <= 128;
    KVD_DYNAMIC_SHARED(shared);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t layer = blockIdx.y / p.kv_heads, head = blockIdx.y % p.kv_heads;
    const kvd_cuda_matrices &side = v ? p.rotation.v : p.rotation.k;
    uint64_t index = matrix_index(p.rotation, p.layer_begin + layer, head);
    const uint32_t *r = matrix_at<D>(side.inverse, index, 1);
    if (STAGED) { // 4^-j of the input's slot goes into the matrix
        for (int i = threadIdx.x; i < WORDS / 4; i += READ_WARPS * 32) {
            uint4 w = __ldg((const uint4 *)r + i);
            int in32 = i / 32 % (P / 32);
            __half2 f0 = __float2half2_rn(slot_factor<CODEC>(2 * in32));
            __half2 f1 = __float2half2_rn(slot_factor<CODEC>(2 * in32 + 1));
            __half2 *h = (__half2 *)&w;
            h[0] = __hmul2(h[0], f0), h[1] = __hmul2(h[1], f0);
            h[2] = __hmul2(h[2], f1), h[3] = __hmul2(h[3], f1);
            ((uint4 *)shared)[i] = w;
        }
        __syncthreads();
    }
    float factor = (has_levels(CODEC) ? 1 : TWO24) / side.scale[index];
    const float *columns = side.inverse_columns + index * D;
    const kvd_cuda_tensor &out = v ? p.v : p.k;
    uint32_t codes_at = p.tile.codes[v], params_at = p.tile.params[v];
    uint64_t tile = p.tile.at(p.layer_begin + layer, p.kv_heads, head);
    uint32_t low = (begin - p.sink) / 16, chunks = (end - p.sink + 15) / 16 - low;
    uint32_t warp = blockIdx.x * READ_WARPS + threadIdx.x / 32;
#pragma unroll 1
    for (uint32_t first = warp * MT; first < chunks; first += gridDim.x * READ_WARPS * MT) {
        uint32_t a[MT][D / 16][4];
        float2 param[MT][2];
        uint8_t *rows[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            uint32_t chunk = low + min(first + m, chunks - 1), page = chunk / 4;
            const uint8_t *at = (const uint8_t *)p.codec_pages[page] + tile;
            chunk_operands<CODEC, D>(at + codes_at, chunk % 4, v, a[m]);
            load_params<CODEC>(at + params_at, p.codec, chunk % 4, param[m][0], param[m][1]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t token = p.sink + chunk * 16 + half * 8 + g;
                bool wanted = token >= begin && token < end && first + m < chunks;
                rows[m][half] = wanted ? tensor_row(out, layer, token - p.begin, head) : nullptr;
                param[m][half].x *= factor;
            }
        }
#pragma unroll 1
        for (int j4 = 0; j4 < P / 32; j4++) {
            float c[MT][4][4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int m = 0; m < MT; m++)
                    c[m][j][0] = c[m][j][1] = c[m][j][2] = c[m][j][3] = 0;
#pragma unroll
                for (int i = 0; i < P / 32; i++) {
                    uint4 b;
                    if (STAGED) {
                        b = ((const uint4 *)shared)[((j4 * 4 + j) * (P / 32) + i) * 32 + lane];
                    } else {
                        b = __ldg(packed<D>::at(r, j4 * 4 + j, i));
                        __half2 *h = (__half2 *)&b;
                        __half2 f0 = __float2half2_rn(slot_factor<CODEC>(2 * i));
                        __half2 f1 = __float2half2_rn(slot_factor<CODEC>(2 * i + 1));
                        h[0] = __hmul2(h[0], f0), h[1] = __hmul2(h[1], f0);
                        h[2] = __hmul2(h[2], f1), h[3] = __hmul2(h[3], f1);
                    }
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma(c[m][j], a[m][2 * i], b.x, b.y);
                        if (2 * i + 1 < D / 16)
                            mma(c[m][j], a[m][2 * i + 1], b.z, b.w);
                    }
                }
            }
            if (!in_row<D>(j4))
                continue;
            int channel = j4 * 32 + 8 * t; // of eight that the lane has: four tiles, two each
            float4 s0 = __ldg((const float4 *)&columns[channel]);
            float4 s1 = __ldg((const float4 *)&columns[channel] + 1);
            float sums[8] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x[8];
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        x[i] = param[m][half].x * c[m][i / 2][2 * half + i % 2] +
                               param[m][half].y * sums[i];
                    if (!rows[m][half])
                        continue;
                    if (out.dtype == KVD_DTYPE_F32) {
                        float4 *to = (float4 *)((float *)rows[m][half] + channel);
                        to[0] = make_float4(x[0], x[1], x[2], x[3]);
                        to[1] = make_float4(x[4], x[5], x[6], x[7]);
                    } else {
                        *(uint4 *)((uint16_t *)rows[m][half] + channel) =
                            make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                       pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
                    }
                }
        }
    }
}

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

template <int CODEC, int D>
static cudaError_t read_side(const read_params &p, uint32_t begin, uint32_t end, bool v,
                             cudaStream_t stream)
{
    constexpr int MT = D > 128 ? 1 : 2, BYTES = D <= 128 ? packed<D>::WORDS * 4 : 0;
    uint32_t units = p.layer_count * p.kv_heads, chunks = (end - p.sink + 15) / 16 - (begin - p.sink) / 16;
    uint32_t blocks = chunk_blocks(chunks, READ_WARPS * MT, units);
    cudaError_t rc = cudaFuncSetAttribute(read_history_kernel<CODEC, D>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (rc != cudaSuccess)
        return rc;
    return launch(read_history_kernel<CODEC, D>, dim3(blocks, units), READ_WARPS * 32, BYTES, stream, p, begin, end, v);
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
    __shared__ float x[KVD_MAX_HEAD_DIM];
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

// Sum over words of word * (2 * index + 1), mod 2^64: words that change places change it.
__global__ void checksum_kernel(const uint4 *at, uint64_t n, unsigned long long *sum)
{
    unsigned long long s = 0;
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += step) {
        uint4 v = __ldcs(&at[i]);
        uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; k++)
            s += w[k] * (2 * (4 * i + k) + 1);
    }
#pragma unroll
    for (int x = 1; x < 32; x *= 2)
        s += __shfl_xor_sync(~0u, s, x);
    if (threadIdx.x % 32 == 0)
        atomicAdd(sum, s);
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

extern "C" int kvd_cuda_checksum(const void *at, uint64_t bytes, unsigned long long *sum,
                                 struct CUstream_st *stream)
{
    cudaError_t rc = cudaMemsetAsync(sum, 0, sizeof(*sum), stream);
    if (rc == cudaSuccess && bytes >= 16)
        rc = launch(checksum_kernel, 1056, 256, 0, stream, (const uint4 *)at, bytes / 16, sum);
    return rc;
}
