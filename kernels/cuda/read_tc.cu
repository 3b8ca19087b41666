// Pages of tc2 and tc2.5 to rows: levels about 0, which bf16 has exactly, times A^-1 with its rows by the channels' deviations
// and steps, as two bf16 parts; the token's scale and the mean act on what comes out.
#include "kernels/cuda/read.cuh"
#include "kernels/cuda/tc.cuh"

namespace kvd
{

// Levels of a chunk as A operands, tokens as rows, in units of a step.
template <int D, bool V>
__device__ inline void chunk_levels(const uint8_t *side, uint32_t codec, uint32_t chunk, const key_views<D, TC> &views,
                                    const kvd_cuda_key_tile *tiles, uint32_t (&a)[D / 16][4])
{
    if constexpr (V)
        chunk_operands<TC, D>(side, chunk, true, a);
    key_words<D, TC> words;
    if constexpr (!V)
        words.load(side, codec, (int)chunk);
    static_for<D / 16>([&](auto ct) {
        // By what a code is more in its place, and the middle of the codes.
        float place = slot_factor<INT2>(ct), half = 1.5f;
        if constexpr (!V) {
            words.template operand<ct>(views, a[ct]);
            place = __fdividef(1, (float)(views.mask[ct] & (0u - views.mask[ct])));
            half = (float)((1u << tiles[ct].bits) - 1) * 0.5f;
            if (views.mask[ct] == 0)
                place = half = 0;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float x = (float)(a[ct][r] & 0xffff), y = (float)(a[ct][r] >> 16);
            a[ct][r] = pack_bf16(fmaf(x, place, -half), fmaf(y, place, -half));
        }
    });
}

// Operands of A^-1 for 32 outputs: tiles of 8, groups of 32 inputs.
template <int D> struct staged_inverse {
    static constexpr int GROUPS = padded(D) / 32;
    uint4 part[2][4][GROUPS][32];

    // By all threads of a block. `factor` is by inputs.
    template <typename F> __device__ inline void load(const float *inverse, uint32_t out32, F factor)
    {
        for (uint32_t i = threadIdx.x; i < 4 * GROUPS * 32; i += blockDim.x) {
            uint32_t lane = i % 32, group = i / 32 % GROUPS, tile = i / 32 / GROUPS, word[2][4];
            uint32_t out = out32 * 32 + 8 * (lane / 8) + inverse_channel((int)tile) + lane / 4 % 2;
            auto value = [&](uint32_t in) {
                if (in >= D || out >= D)
                    return 0.0f;
                return (inverse ? inverse[in * D + out] : in == out ? 1.0f : 0.0f) * factor(in);
            };
#pragma unroll
            for (int r = 0; r < 4; r++) {
                uint32_t in = 32 * group + r / 2 * 16 + r % 2 * 8 + 2 * (lane % 4);
                float x = value(in), y = value(in + 1);
                word[0][r] = pack_bf16(x, y);
                word[1][r] = pack_bf16(x - low_bf16(word[0][r]), y - high_bf16(word[0][r]));
            }
#pragma unroll
            for (int k = 0; k < 2; k++)
                part[k][tile][group][lane] = make_uint4(word[k][0], word[k][1], word[k][2], word[k][3]);
        }
    }
};

// Groups of 32 outputs that a block takes: levels are made once for all of them.
__host__ __device__ constexpr int outputs_of_block(int dim)
{
    return dim <= 128 ? padded(dim) / 32 : 1;
}

// Block (share of the chunks, layer and kv head, outputs). One side of a sequence's history.
template <int D, bool V>
__global__ void __launch_bounds__(READ_WARPS * 32)
    read_tc_kernel(const __grid_constant__ read_params p, uint32_t begin, uint32_t end)
{
    constexpr int OUTPUTS = outputs_of_block(D);
    KVD_DYNAMIC_SHARED(shared);
    staged_inverse<D> *staged = (staged_inverse<D> *)shared;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t layer = blockIdx.y / p.kv_heads, head = blockIdx.y % p.kv_heads;
    uint64_t index = matrix_index(p.rotation, p.layer_begin + layer, head);
    const kvd_cuda_transform &tf = p.rotation.transforms[index];
    const kvd_cuda_key_tile *tiles = key_tiles(tf, p.codec);
    const float *inverse = V ? p.rotation.v.inverse_f32 : p.rotation.k.inverse_f32;
    for (int i = 0; i < OUTPUTS; i++)
        staged[i].load(inverse ? inverse + index * D * D : nullptr, blockIdx.z * OUTPUTS + i,
                       [&](uint32_t in) { return V ? KVD_EVEN_STEP : tf.k_sigma[in] * tiles[in / 16].step; });
    __syncthreads();
    key_views<D, TC> views;
    key_terms<D, TC> terms;
    terms.load(tf, p.codec);
    views.take(terms);
    const float *means = V ? tf.v_mean : tf.k_mean;
    const kvd_cuda_tensor &out = V ? p.v : p.k;
    uint64_t tile = p.tile.at(p.layer_begin + layer, p.kv_heads, head);
    uint32_t low = (begin - p.sink) / 16, chunks = (end - p.sink + 15) / 16 - low;
#pragma unroll 1
    for (uint32_t i = blockIdx.x * READ_WARPS + threadIdx.x / 32; i < chunks; i += gridDim.x * READ_WARPS) {
        uint32_t chunk = low + i, a[D / 16][4];
        const uint8_t *at = (const uint8_t *)p.codec_pages[chunk / 4] + tile;
        float2 param[2];
        chunk_levels<D, V>(at + p.tile.codes[V], p.codec, chunk % 4, views, tiles, a);
        load_params<TC>(at + p.tile.params[V], p.codec, (int)chunk % 4, param[0], param[1]);
#pragma unroll 1
        for (int o = 0; o < OUTPUTS; o++) {
            uint32_t out32 = blockIdx.z * OUTPUTS + o;
            float c[4][4] = {};
#pragma unroll
            for (int part = 1; part >= 0; part--)
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int k = 0; k < staged_inverse<D>::GROUPS; k++) {
                        uint4 b = staged[o].part[part][j][k][lane];
                        mma_bf16(c[j], a[2 * k], b.x, b.y);
                        if (2 * k + 1 < D / 16)
                            mma_bf16(c[j], a[2 * k + 1], b.z, b.w);
                    }
            if (!in_row<D>((int)out32))
                continue;
            uint32_t channel = out32 * 32 + 8 * t; // of eight that the lane has: four tiles, two each
            float4 m0 = __ldg((const float4 *)&means[channel]), m1 = __ldg((const float4 *)&means[channel] + 1);
            float mean[8] = {m0.x, m0.y, m0.z, m0.w, m1.x, m1.y, m1.z, m1.w};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t token = p.sink + chunk * 16 + half * 8 + g;
                if (token < begin || token >= end)
                    continue;
                float x[8];
#pragma unroll
                for (int k = 0; k < 8; k++)
                    x[k] = fmaf(param[half].x, c[k / 2][2 * half + k % 2], mean[k]);
                uint8_t *row = tensor_row(out, layer, token - p.begin, head);
                if (out.dtype == KVD_DTYPE_F32) {
                    float4 *to = (float4 *)((float *)row + channel);
                    to[0] = make_float4(x[0], x[1], x[2], x[3]);
                    to[1] = make_float4(x[4], x[5], x[6], x[7]);
                } else {
                    *(uint4 *)((uint16_t *)row + channel) = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                                                       pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
                }
            }
        }
    }
}

template <int D, bool V>
static cudaError_t read_tc_side(const read_params &p, uint32_t begin, uint32_t end, cudaStream_t stream)
{
    uint32_t units = p.layer_count * p.kv_heads, chunks = (end - p.sink + 15) / 16 - (begin - p.sink) / 16;
    constexpr int OUTPUTS = outputs_of_block(D), BYTES = OUTPUTS * (int)sizeof(staged_inverse<D>);
    dim3 grid(0, units, padded(D) / 32 / OUTPUTS);
    grid.x = chunk_blocks(chunks, READ_WARPS, units * grid.z);
    cudaError_t rc = cudaFuncSetAttribute(read_tc_kernel<D, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (rc != cudaSuccess)
        return rc;
    return launch(read_tc_kernel<D, V>, grid, READ_WARPS * 32, BYTES, stream, p, begin, end);
}

template <bool V> static cudaError_t read_tc_dim(const read_params &p, uint32_t begin, uint32_t end, cudaStream_t stream)
{
    switch (V ? p.dim_v : p.dim_k) {
#define KVD_HEAD_DIM(d)     case d:                     return read_tc_side<d, V>(p, begin, end, stream);
#include "proto/head_dims.def"
    default:
        return cudaErrorInvalidValue;
    }
}

cudaError_t read_tc(const read_params &p, uint32_t begin, uint32_t end, bool v, cudaStream_t stream)
{
    return v ? read_tc_dim<true>(p, begin, end, stream) : read_tc_dim<false>(p, begin, end, stream);
}

} // namespace kvd
