// Latents that leave the recent window. Their rows are too long for registers: a block multiplies four chunks by R, which is read
// from the L2 cache, and leaves them in shared memory, where a warp takes each chunk's rows up, as often as its codec looks at
// them. One kernel a codec, for all calls.
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/quantize.cuh"

namespace kvd
{

constexpr uint32_t LATENT_CHUNKS = 4, QUANTIZE_WARPS = 8, LATENT_PITCH = LATENT + 8; // floats: rows g to g + 3 in different banks
constexpr uint32_t QUANTIZE_BYTES = LATENT_CHUNKS * 16 * LATENT_PITCH * 4;

// A chunk of all: its item, first token, and how many of its tokens are there already.
struct latent_chunk {
    const append_item &item;
    uint32_t token, keep;

    __device__ inline latent_chunk(const append_params &p, uint32_t i)
        : item(p.items[find_item(p.n_items, i, [&](uint32_t k) { return p.items[k].first_chunk; })]),
          token(chunk_token(p, item, i, false)), keep(max(token, item.hist_end) - token)
    {
    }

    // Of rows that are to be kept nothing else is known; another's stands in for them.
    __device__ inline const uint8_t *row(const append_params &p, uint32_t layer, uint32_t i) const
    {
        return source_row(p, item, token + max(i, keep), layer, 0, true);
    }
};

// Turned rows of the block's chunks, in shared memory, times what they are to be divided by.
__device__ inline void turn_latents(const append_params &p, uint32_t layer, uint32_t first, const uint32_t *matrix, float *turned)
{
    constexpr int N = LATENT / 8 / QUANTIZE_WARPS;
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint8_t *rows[LATENT_CHUNKS][2];
    float c[LATENT_CHUNKS][N][4];
#pragma unroll
    for (uint32_t m = 0; m < LATENT_CHUNKS; m++) {
        latent_chunk chunk(p, min(first + m, p.chunks - 1));
#pragma unroll
        for (uint32_t half = 0; half < 2; half++)
            rows[m][half] = chunk.row(p, layer, half * 8 + g) + t * 16;
    }
    clear_products(c);
#pragma unroll 1
    for (int part = 1; part >= 0; part--) // the small part first
        multiply_latents<LATENT_CHUNKS, N>(
            c, matrix + part * packed<LATENT>::WORDS, warp * N,
            [&](uint32_t i, uint32_t(&a)[LATENT_CHUNKS][2][4]) {
#pragma unroll
                for (uint32_t m = 0; m < LATENT_CHUNKS; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        put_group(a[m], half, *(const uint4 *)(rows[m][half] + i * 64));
            },
            mma_bf16);
#pragma unroll
    for (uint32_t m = 0; m < LATENT_CHUNKS; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++)
                *(float2 *)(turned + (m * 16 + half * 8 + g) * LATENT_PITCH + (warp * N + j) * 8 + 2 * t) =
                    make_float2(c[m][j][2 * half], c[m][j][2 * half + 1]);
}

// The codes of 16 rows, as coded_rows has them, but rows are not in registers.
template <int CODEC> struct latent_codes {
    static constexpr int BITS = code_bits(CODEC), MORE_BITS = BITS - 2, LOADS = LATENT_TILES / 8;
    static constexpr int MORE_LOADS = BITS == 4 ? LOADS : BITS == 3 ? LOADS / 2 : 1, MORE_TILES = LATENT_TILES / MORE_LOADS;
    uint32_t pairs[LOADS][4], more[MORE_LOADS][4], param[2];

    // Of rows g; the second time, of rows g + 8.
    __device__ inline void quantize(const float *row, float unit, const clip_search<LATENT> &clip, float gain, uint32_t kind, uint32_t codec)
    {
        constexpr int N = LATENT / 4;
        const bool published = kind == KVD_SCALE_PUBLISHED, scaled = has_levels(CODEC) || !published;
        const float factor = scaled ? unit : 1;
        auto x = [&](int i) { return row[i / 2 * 8 + i % 2] * factor; };
        quantizer q;
        if constexpr (!has_levels(CODEC))
            q = published ? quantize_evenly<CODEC, N>(x, clip, gain, unit) : fit_levels<CODEC, N>(x, kind);
        else if (CODEC == LEVELS2 && codec == KVD_CODEC_TURBOQUANT_2)
            q = fit_levels<KVD_CODEC_TURBOQUANT_2, N>(x, kind);
        else
            q = fit_levels<CODEC, N>(x, kind);
        param[0] = param[1];
        param[1] = q.param;
        auto next_row = [](uint32_t(&words)[4]) {
            words[0] = words[1], words[2] = words[3];
            words[1] = words[3] = 0;
        };
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            next_row(pairs[u]);
#pragma unroll
        for (int u = 0; u < MORE_LOADS; u++)
            next_row(more[u]);
#pragma unroll
        for (int j = LATENT / 8 - 1; j >= 0; j--) { // slots from the last to the first
            uint32_t both = codes_of<CODEC>(q, x(2 * j), x(2 * j + 1));
            uint32_t &to = pairs[j / 16][j % 2 * 2 + 1];
            to = to * 4 + (both & 0x00030003);
            if constexpr (MORE_BITS > 0) {
                uint32_t &above = more[j / 2 / MORE_TILES][j % 2 * 2 + 1];
                above = (above << MORE_BITS) + (both >> 2 & (MORE_BITS == 2 ? 0x00030003 : 0x00010001));
            }
        }
    }

    // As chunk `chunk` of a tile, but for its first `keep` tokens, which stay as they are.
    __device__ inline void store(uint32_t codec, uint8_t *codes, uint8_t *params, uint32_t chunk, uint32_t keep) const
    {
        uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (t == 0 && params_bytes<CODEC>(codec) == 256) {
            uint2 *to = (uint2 *)(params + chunk * 64 + g * 8), old = keep ? *to : make_uint2(0, 0);
            *to = make_uint2(g < keep ? old.x : param[0], g + 8 < keep ? old.y : param[1]);
        } else if (t == 0) {
            uint32_t *to = (uint32_t *)(params + chunk * 32 + g * 4), old = keep ? *to : 0;
            *to = (g < keep ? old & 0xffff : param[0]) | (g + 8 < keep ? old & 0xffff0000 : param[1] << 16);
        }
        store_plane<LATENT, 2>(codes, chunk, pairs, keep, true);
        if constexpr (BITS > 2)
            store_plane<LATENT, MORE_BITS>(codes + 16 * LATENT, chunk, more, keep, true);
    }
};

// Block (four chunks, layer).
template <int CODEC>
__global__ void __launch_bounds__(QUANTIZE_WARPS * 32, 1) quantize_latents_kernel(const __grid_constant__ append_params p)
{
    KVD_DYNAMIC_SHARED(shared);
    float *turned = (float *)shared;
    const uint32_t layer = blockIdx.y, first = blockIdx.x * LATENT_CHUNKS, warp = threadIdx.x / 32;
    const kvd_cuda_matrices &side = p.rotation.v;
    const uint64_t index = matrix_index(p.rotation, p.layer_begin + layer, 0);
    turn_latents(p, layer, first, matrix_at<LATENT>(side.forward, index, 2), turned);
    __syncthreads();
    if (warp >= LATENT_CHUNKS || first + warp >= p.chunks)
        return;
    const latent_chunk chunk(p, first + warp);
    const uint32_t h = chunk.token - p.sink, kept = side.clip ? (uint32_t)((double)side.clip[index] * LATENT) : LATENT;
    const clip_search<LATENT> clip(kept < LATENT ? (int)(LATENT - kept) : 0);
    const float *row = turned + (warp * 16 + threadIdx.x % 32 / 4) * LATENT_PITCH + threadIdx.x % 4 * 2;
    uint8_t *tile = (uint8_t *)chunk.item.codec[h / PAGE] + p.tile.at(p.layer_begin + layer, p.kv_heads, 0);
    latent_codes<CODEC> coded = {};
#pragma unroll 1
    for (int half = 0; half < 2; half++)
        coded.quantize(row + half * 8 * LATENT_PITCH, 1 / side.scale[index], clip, side.gain ? side.gain[index] : 1, side.scale_kind, p.codec);
    coded.store(p.codec, tile + p.tile.codes[1], tile + p.tile.params[1], h % PAGE / 16, chunk.keep);
}

template <int CODEC> static cudaError_t quantize_family(const append_params &p, cudaStream_t stream)
{
    cudaError_t rc = cudaFuncSetAttribute(quantize_latents_kernel<CODEC>, cudaFuncAttributeMaxDynamicSharedMemorySize, QUANTIZE_BYTES);
    if (rc != cudaSuccess)
        return rc;
    return launch(quantize_latents_kernel<CODEC>, dim3((p.chunks + LATENT_CHUNKS - 1) / LATENT_CHUNKS, p.layer_count), QUANTIZE_WARPS * 32,
                  QUANTIZE_BYTES, stream, p);
}

} // namespace kvd

cudaError_t kvd::quantize_latents(const append_params &p, cudaStream_t stream)
{
    switch (family_of(p.codec)) {
    case INT2:
        return quantize_family<INT2>(p, stream);
    case INT2C:
        return quantize_family<INT2C>(p, stream);
    case LEVELS2:
        return quantize_family<LEVELS2>(p, stream);
    case LEVELS3:
        return quantize_family<LEVELS3>(p, stream);
    case LEVELS4:
        return quantize_family<LEVELS4>(p, stream);
    case INT4:
        return quantize_family<INT4>(p, stream);
    default:
        return cudaErrorInvalidValue;
    }
}
