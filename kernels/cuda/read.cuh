// Pages to rows: what the codecs share.
//
// Un-rotation is a product of codes, masked in place as in attention, with R^T: scale and min act
// on its results, out = scale * (codes R^T) + min * (sums of R^T's columns).
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

template <int CODEC, int D>
cudaError_t read_side(const read_params &p, uint32_t begin, uint32_t end, bool v,
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

// read_latent.cu: the latents of a history, in any codec but bf16.
cudaError_t read_latents(const read_params &p, uint32_t begin, uint32_t end, cudaStream_t stream);

// read_tc.cu: a side of the history, in tc2 or tc2.5.
cudaError_t read_tc(const read_params &p, uint32_t begin, uint32_t end, bool v, cudaStream_t stream);

} // namespace kvd

#endif
