// Append of tc2 and tc2.5: kernels/tc.c on a GPU.
//
// A row comes as y = (x - mean) A by the channels' deviations and steps (V's deviations are 1), so that a level is code less half
// of the largest one, everywhere. Rounding up is the instruction's own: of levels a half apart from whole numbers the one
// nearest to z, and of two the lower, is ceil(z) - 1/2.
#include "kernels/cuda/quantize.cuh"
#include "kernels/cuda/tc.cuh"
#include "kernels/tc.h"

#include <type_traits>

namespace kvd
{

constexpr float WHOLE = 0x1.8p23f; // sums with it are whole numbers
constexpr int WHOLE_BITS = 0x4b400000;

// How a unit's rows are coded, in shared memory. K's tiles of 16 channels have codes of a number of bits each.
template <int D> struct row_terms_of {
    struct tile {
        float unit;       // of products
        float low, high;  // least and greatest ceil(z), and WHOLE
        float step_square;
    };
    struct tile_codes {
        int base, top; // code = ceil(z) and WHOLE's bits + base, from 0 to top
        uint32_t times, unused;
    };
    tile tiles[D / 16];
    tile_codes codes[D / 16];
    float offset[D], weight[D]; // of the mean; squares of deviation times step
    float coded;                // channels with codes

    __device__ inline void load(const append_params &p, const kvd_cuda_transform &t, bool v)
    {
        const kvd_cuda_key_tile *keys = key_tiles(t, p.codec);
        for (uint32_t c = threadIdx.x; c < D; c += blockDim.x) {
            uint32_t bits = v ? KVD_TC_V_BITS : keys[c / 16].bits;
            float step = v ? KVD_EVEN_STEP : keys[c / 16].step, sigma = v ? 1 : t.k_sigma[c];
            float by = bits ? 1 / step : 0;
            offset[c] = (v ? t.v_offset : t.k_offset)[c] * by;
            weight[c] = step * sigma * (step * sigma);
            if (c % 16)
                continue;
            int half = bits ? 1 << (bits - 1) : 0;
            tiles[c / 16] = {by / t.forward_scale[v], WHOLE + (float)(1 - half), WHOLE + (float)half, step * step};
            codes[c / 16] = {half - 1 - WHOLE_BITS, 2 * half - 1 > 0 ? 2 * half - 1 : 0, 1u << bits, 0};
        }
        if (threadIdx.x == 0) {
            coded = 0;
            for (int i = 0; i < D / 16; i++)
                coded += v || keys[i].bits ? 16 : 0;
        }
    }
};

// What a row's values become: `scale` gives the codes, `stored` is what reads them.
struct row_scale {
    float scale;
    uint32_t stored;
};

__device__ inline float inverse_or_zero(float scale)
{
    return scale > 0 ? 1 / scale : 0;
}

// The bits of ceil(y by) and WHOLE, or of 0, where that is less. NaN gives 0, too.
__device__ inline int whole_bits(float y, float by)
{
    return (int)__float_as_uint(fmaxf(__fmaf_ru(y, by, WHOLE), 0));
}

__device__ inline uint32_t unbiased_scale(float energy, float products)
{
    return pack_fp16(products > 0 ? fminf(energy / products, 65504.0f) : 0, 0) & 0xffff;
}

// K's rows g, in the first half of each c[j].
template <int D> __device__ inline row_scale fit_key(const float (&c)[padded(D) / 8][4], const row_terms_of<D> &x)
{
    const float2 *weights = (const float2 *)x.weight + threadIdx.x % 4;
    float whitened = 0, energy = 0;
#pragma unroll
    for (int ct = 0; ct < D / 16; ct++) {
        float sum = 0;
#pragma unroll
        for (int j = 2 * ct; j < 2 * ct + 2; j++) {
            float2 w = weights[4 * j];
            float a = c[j][0] * c[j][0], b = c[j][1] * c[j][1];
            sum += a + b;
            energy = fmaf(w.x, a, fmaf(w.y, b, energy));
        }
        whitened = fmaf(x.tiles[ct].step_square, sum, whitened);
    }
    whitened = quad_sum(whitened), energy = quad_sum(energy);
    float scale = x.coded > 0 ? sqrtf(whitened / x.coded) : 0, products;
#pragma unroll 1
    for (int k = 0;; k++) {
        float by = inverse_or_zero(scale), squares = 0;
        products = 0;
#pragma unroll
        for (int ct = 0; ct < D / 16; ct++) {
            float low = x.tiles[ct].low, high = x.tiles[ct].high;
#pragma unroll
            for (int j = 2 * ct; j < 2 * ct + 2; j++) {
                float2 w = weights[4 * j];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float up = fminf(fmaxf(__fmaf_ru(c[j][e], by, WHOLE), low), high);
                    float level = (up - WHOLE) - 0.5f, weighted = (e ? w.y : w.x) * level;
                    products = fmaf(weighted, c[j][e], products);
                    squares = fmaf(weighted, level, squares);
                }
            }
        }
        products = quad_sum(products);
        if (k == KVD_TC_K_REFITS)
            break;
        squares = quad_sum(squares);
        scale = products > 0 ? products / squares : scale;
    }
    return {scale, unbiased_scale(energy, products)};
}

// V's. Levels are 1/2 and 3/2 on both sides: sums want no more than which values are nearer to 3/2.
template <int D> __device__ inline row_scale fit_value(const float (&c)[padded(D) / 8][4])
{
    float energy = 0, sum = 0, products = 0;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            energy = fmaf(c[j][e], c[j][e], energy);
            sum += fabsf(c[j][e]);
        }
    energy = quad_sum(energy), sum = quad_sum(sum);
    float scale = KVD_EVEN_STEP * sqrtf(energy / D);
#pragma unroll 1
    for (int k = 0;; k++) {
        float outer = 0, count = 0;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bool far = fabsf(c[j][e]) > scale;
                outer += far ? fabsf(c[j][e]) : 0;
                count += far ? 1 : 0;
            }
        products = fmaf(0.5f, sum, quad_sum(outer));
        if (k == KVD_TC_V_REFITS)
            break;
        float squares = fmaf(2, quad_sum(count), 0.25f * D);
        scale = products > 0 ? products / squares : scale;
    }
    return {scale, unbiased_scale(energy, products)};
}

// The codes of 16 rows: K's streams (kernels/README.md) of each register's two elements; V's words.
template <int D, bool V> struct tc_rows;

template <int D> struct tc_rows<D, false> {
    using stream = std::conditional_t<D == 256, uint64_t, uint32_t>; // of up to 40 bits, or 30
    static constexpr int WORDS = (stream_bits<TC2_5>(0, D) + 15) / 16;
    stream streams[4][2];
    uint32_t param[2];

    // Rows in the first half of each c[j]. To be called twice, for rows g and g + 8.
    __device__ inline void quantize(const float (&c)[padded(D) / 8][4], const row_terms_of<D> &x)
    {
        row_scale s = fit_key<D>(c, x);
        float by = inverse_or_zero(s.scale);
        param[0] = param[1], param[1] = s.stored;
#pragma unroll
        for (int r = 0; r < 4; r += 2)
#pragma unroll
            for (int e = 0; e < 2; e++)
                streams[r][e] = streams[r + 1][e], streams[r + 1][e] = 0;
#pragma unroll
        for (int j = D / 8 - 1; j >= 0; j--) { // the last tile's are the highest bits
            auto tile = x.codes[j / 2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int up = whole_bits(c[j][e], by);
                stream &to = streams[j % 2 * 2 + 1][e];
                to = to * tile.times + (uint32_t)__viaddmin_s32_relu(up, tile.base, tile.top);
            }
        }
    }

    template <int L>
    static __device__ inline void store_rest(uint8_t *chunk, int bits, const uint4 (&words)[WORDS], uint32_t keep)
    {
        if (!(bits & L))
            return;
        int whole = bits / 16, before = bits % 16 & ~(2 * L - 1);
        uint8_t *to = chunk + 32 * (16 * whole + before) + threadIdx.x % 32 * L;
        uint4 x = words[0];
#pragma unroll
        for (int i = 1; i < WORDS; i++)
            if (whole == i)
                x = words[i];
        if (keep)
            put_back(x, kvd::load_piece<L>(to, before), keep, false);
        store_piece<L>(to, x, before);
    }

    __device__ inline void store(uint32_t codec, uint8_t *side, uint32_t chunk, uint32_t keep) const
    {
        const int bits = stream_bits<TC>(codec, D);
        uint8_t *at = side + chunk * 32 * bits;
        uint4 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            uint32_t w[4];
#pragma unroll
            for (int r = 0; r < 4; r++)
                w[r] = __byte_perm((uint32_t)(streams[r][0] >> 16 * i), (uint32_t)(streams[r][1] >> 16 * i), 0x5410);
            words[i] = make_uint4(w[0], w[1], w[2], w[3]);
            if (16 * i + 16 > bits)
                continue;
            uint8_t *to = at + 512 * i + threadIdx.x % 32 * 16;
            uint4 x = words[i];
            if (keep)
                put_back(x, kvd::load_piece<16>(to, 0), keep, false);
            store_piece<16>(to, x, 0);
        }
        store_rest<8>(at, bits, words, keep);
        store_rest<4>(at, bits, words, keep);
        store_rest<2>(at, bits, words, keep);
        store_rest<1>(at, bits, words, keep);
    }
};

template <int D> struct tc_rows<D, true> {
    static constexpr int LOADS = (D + 127) / 128;
    uint32_t pairs[LOADS][4], param[2];

    __device__ inline void quantize(const float (&c)[padded(D) / 8][4], const row_terms_of<D> &)
    {
        row_scale s = fit_value<D>(c);
        float by = inverse_or_zero(s.scale);
        param[0] = param[1], param[1] = s.stored;
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            pairs[u][0] = pairs[u][1], pairs[u][2] = pairs[u][3];
            pairs[u][1] = pairs[u][3] = 0;
        }
        auto code = [&](float y) { // ceil(z) + 1, from 0 to 3
            int up = whole_bits(y, by);
            return (uint32_t)__viaddmin_s32_relu(up, 1 - WHOLE_BITS, 3);
        };
#pragma unroll
        for (int j = D / 8 - 1; j >= 0; j--) {
            uint32_t &to = pairs[j / 16][j % 2 * 2 + 1];
            to = to * 4 + __byte_perm(code(c[j][0]), code(c[j][1]), 0x5410);
        }
    }

    __device__ inline void store(uint32_t, uint8_t *side, uint32_t chunk, uint32_t keep) const
    {
        store_plane<D, 2>(side, chunk, pairs, keep, true);
    }
};

__device__ inline void store_scales(uint8_t *params, uint32_t chunk, const uint32_t (&param)[2], uint32_t keep)
{
    uint32_t g = threadIdx.x % 32 / 4;
    if (threadIdx.x % 4)
        return;
    uint32_t *to = (uint32_t *)(params + chunk * 32 + g * 4), old = keep ? *to : 0;
    *to = (g < keep ? old & 0xffff : param[0]) | (g + 8 < keep ? old & 0xffff0000 : param[1] << 16);
}

template <int D> constexpr int quantize_tc_bytes()
{
    return quantize_bytes(D) + (int)sizeof(row_terms_of<D>);
}

// One side, as quantize_kernel has it.
template <int D, bool V, bool USUAL>
__global__ void __launch_bounds__(quantize_warps(D) * 32, 1)
    quantize_tc_kernel(const __grid_constant__ append_params p, uint32_t all, uint32_t share)
{
    KVD_DYNAMIC_SHARED(shared);
    constexpr uint32_t WARPS = quantize_warps(D);
    uint32_t warp = threadIdx.x / 32, rounds = (p.chunks + WARPS - 1) / WARPS;
    uint32_t at = blockIdx.x * share, end = min(all - at, share) + at;
    uint32_t u = at / rounds, round = at % rounds;
    staged_rows<D> staged = {shared + matrix_bytes(D) + warp * (32 * padded(D)) + threadIdx.x % 32 * 16};
    row_terms_of<D> &terms = *(row_terms_of<D> *)(shared + quantize_bytes(D));
    const uint32_t codes_at = p.tile.codes[V], params_at = p.tile.params[V];
    chunk_walk<D, USUAL> walk;
    auto fetch = [&] { // warps without a chunk in the last round take the last one
        walk.fetch(p, V, u, min(round * WARPS + warp, p.chunks - 1), round > 0, staged);
    };
    const uint32_t *matrix = nullptr;
    uint64_t tile = 0;
    fetch();
    for (bool load = true; at < end; at++) {
        if (load) {
            append_unit unit(p, V, u);
            uint32_t layer = p.layer_begin + unit.layer;
            matrix = matrix_at<D>(V ? p.rotation.v.forward : p.rotation.k.forward,
                                  matrix_index(p.rotation, layer, unit.head), 2);
            tile = p.tile.at(layer, p.kv_heads, unit.head);
            __syncthreads();
            terms.load(p, transform_of(p.rotation, layer, unit.head), V);
            shared_matrix<D>{matrix, shared}.load();
            __syncthreads();
        }
        shared_matrix<D> r = {matrix, shared};
        const append_item &item = p.items[walk.of];
        bool mine = round * WARPS + warp < p.chunks;
        uint32_t token = chunk_token(p, item, walk.chunk, USUAL), h = token - p.sink;
        uint32_t keep = USUAL ? 0 : max(token, item.hist_end) - token;
        uint8_t *to = (uint8_t *)item.codec[h / PAGE] + tile;
        uint32_t a[padded(D) / 16][4];
        float c[padded(D) / 8][4];
        staged.load(a);
        r.multiply(a, c);
        load = ++round == rounds;
        if (load)
            u++, round = 0;
        if (at + 1 < end)
            fetch();
        r.finish();
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float unit = terms.tiles[j / 2].unit;
            float2 offset = ((const float2 *)terms.offset)[4 * j + threadIdx.x % 4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                c[j][e] = fmaf(c[j][e], unit, e % 2 ? -offset.y : -offset.x);
        }
        tc_rows<D, V> coded = {};
        // Row g, then row g + 8 in its place: the code is long, and the cache of instructions small.
#pragma unroll 1
        for (int half = 0;; half++) {
            coded.quantize(c, terms);
            if (half == 1)
                break;
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                c[j][0] = c[j][2], c[j][1] = c[j][3];
        }
        if (!mine)
            continue;
        coded.store(p.codec, to + codes_at, h % PAGE / 16, keep);
        store_scales(to + params_at, h % PAGE / 16, coded.param, keep);
    }
}

template <int D, bool V, bool USUAL> static cudaError_t quantize_tc_side(const append_params &p, cudaStream_t stream)
{
    constexpr int BYTES = quantize_tc_bytes<D>(), WARPS = quantize_warps(D);
    uint32_t units = p.layer_count * p.kv_heads, rounds = (p.chunks + WARPS - 1) / WARPS;
    int device = 0, processors = 0;
    cudaError_t rc = cudaGetDevice(&device);
    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (rc == cudaSuccess)
        rc = cudaFuncSetAttribute(quantize_tc_kernel<D, V, USUAL>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (rc != cudaSuccess)
        return rc;
    uint64_t all = (uint64_t)units * rounds, share = (all + processors - 1) / processors;
    if (all > UINT32_MAX)
        return cudaErrorInvalidValue;
    return launch(quantize_tc_kernel<D, V, USUAL>, (uint32_t)((all + share - 1) / share), WARPS * 32, BYTES, stream, p,
        (uint32_t)all, (uint32_t)share);
}

template <bool V> static cudaError_t quantize_tc_dim(const append_params &p, cudaStream_t stream)
{
    switch (V ? p.dim_v : p.dim_k) {
#define KVD_HEAD_DIM(d)     case d:                     return p.whole_chunks ? quantize_tc_side<d, V, true>(p, stream) : quantize_tc_side<d, V, false>(p, stream);
#include "proto/head_dims.def"
    default:
        return cudaErrorInvalidValue;
    }
}

cudaError_t quantize_tc(const append_params &p, which_sides which, cudaStream_t stream)
{
    cudaError_t rc = cudaSuccess;
    for (uint32_t v = which.first; v < which.end && rc == cudaSuccess; v++)
        rc = v ? quantize_tc_dim<true>(p, stream) : quantize_tc_dim<false>(p, stream);
    return rc;
}

} // namespace kvd
