// Append: rotate, clip, quantize and pack what leaves the recent window; store the rest in bf16.
//
// A warp takes chunks of 16 tokens of one (layer, kv head, side): tokens are the rows of
// mma.m16n8k16. The product's accumulator has a token's channels in four lanes, and these lanes are
// the ones whose words of a unit hold the codes, so that packing needs no exchange for K and one
// transpose of each word for V.
#include "kernels/cuda/rows.cuh"

namespace kvd
{

using append_params = kvd_cuda_append_params;
using append_item = kvd_cuda_append_item;

constexpr int QUANTIZE_WARPS = 8;

__device__ inline uint8_t *window_row(const append_params &p, const append_item &item,
                                      uint32_t token, uint32_t layer, uint32_t head, bool v)
{
    uint32_t entry, row;
    window_place(p.sink, p.ring, token, entry, row);
    return bf16_tile_row(item.bf16[entry], p.layer_begin + layer, p.kv_heads, head, p.dim_k,
                         p.dim_v, row, v);
}

// The row that an append knows for a token: among the new ones, or in the window.
__device__ inline const uint8_t *source_row(const append_params &p, const append_item &item,
                                            uint32_t token, uint32_t layer, uint32_t head, bool v)
{
    if (token >= item.length)
        return tensor_row(v ? item.v : item.k, layer, token - item.length, head);
    return window_row(p, item, token, layer, head, v);
}

// -- one row's quantizer -------------------------------------------------------------------------

// Sum and maximum over the four lanes of a row.
__device__ inline uint32_t quad_max(uint32_t x)
{
    x = max(x, __shfl_xor_sync(~0u, x, 1));
    return max(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline int quad_sum(int x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The n-th largest of |x| over a row: N values in each of its four lanes, x(i) giving one. All
// lanes take part. As bits, absolute values order like integers; a value below `cur` minus `cur`
// wraps to more than any other, so that one addition and maximum find the largest below.
template <int N, typename X> __device__ inline float nth_largest(X x, int n)
{
    auto bits = [&](int i) { return __float_as_uint(x(i)) & 0x7fffffffu; };
    uint32_t cur = 0x80000000u;
#pragma unroll 1
    for (int k = 0; k < n; k++) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < N; i++)
            best = max(best, bits(i) - cur);
        best = quad_max(best);
        cur += best;
    }
    // Right unless values are equal, or run out: then count them.
    auto count = [&](uint32_t at) {
        int c = 0;
#pragma unroll
        for (int i = 0; i < N; i++)
            c += bits(i) >= at;
        return quad_sum(c);
    };
    int have = count(cur);
    if (__any_sync(~0u, have != n)) {
        uint32_t found = 0x80000000u;
        cur = 0x80000000u;
        for (int k = 0; k < n; k++) {
            uint32_t best = 0;
#pragma unroll
            for (int i = 0; i < N; i++)
                best = max(best, bits(i) - cur);
            cur += quad_max(best);
            have = count(cur);
            if (have >= n && found == 0x80000000u)
                found = cur;
            if (__all_sync(~0u, found != 0x80000000u))
                break;
        }
        cur = found;
    }
    return __uint_as_float(cur);
}

struct quantizer {
    float limit, low, inverse, scale; // clamp, minimum, 1 / scale
};

template <int N, typename X> __device__ inline quantizer make_quantizer(X x, int clipped)
{
    quantizer q;
    q.limit = clipped > 0 ? nth_largest<N>(x, clipped) : INFINITY;
    float low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < N; i++) {
        low = fminf(low, x(i));
        high = fmaxf(high, x(i));
    }
    q.low = fminf(fmaxf(-quad_max(-low), -q.limit), q.limit);
    high = fminf(fmaxf(quad_max(high), -q.limit), q.limit);
    q.scale = (high - q.low) / 3.0f;
    q.inverse = q.scale > 0 ? 1.0f / q.scale : 0;
    return q;
}

// floor((clamped x - low) / scale + 0.5), in the lowest bits of a sum that is rounded down.
__device__ inline uint32_t code_of(const quantizer &q, float x)
{
    float c = fminf(fmaxf(x, -q.limit), q.limit) - q.low;
    return __float_as_uint(__fadd_rd(fminf(fmaf(c, q.inverse, 0.5f), 3.0f), 8388608.0f)) & 3;
}

__device__ inline uint32_t pack_param(const quantizer &q)
{
    float top = 65504.0f;
    return pack_fp16(fminf(q.scale, top), fminf(fmaxf(q.low, -top), top));
}

// -- demotion ------------------------------------------------------------------------------------

struct chunk_source {
    const append_item *item;
    uint32_t token; // first of the 16
};

// Multiplies 16 * MT rows by R, high and low part; `r` gives operands. The accumulators are the
// true values times `back`.
template <int D, int MT, typename R>
__device__ inline void rotate_rows(const uint8_t *const (&rows)[MT][2], R r,
                                   float (&c)[MT][D / 8][4], float (&back)[MT][2])
{
    int t = threadIdx.x % 4;
    uint32_t a[MT][D / 16][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 x[D / 32];
            float top = 0;
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                x[i] = *((const uint4 *)rows[m][half] + i * 4 + t);
                uint32_t w[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
                for (int k = 0; k < 4; k++)
                    top = fmaxf(top, fmaxf(fabsf(low_bf16(w[k])), fabsf(high_bf16(w[k]))));
            }
            back[m][half] = magnitude(quad_max(top));
            float inverse = 1 / back[m][half];
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                uint32_t w[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
                for (int k = 0; k < 4; k++)
                    a[m][2 * i + k / 2][k % 2 * 2 + half] =
                        pack_fp16(low_bf16(w[k]) * inverse, high_bf16(w[k]) * inverse);
            }
        }
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
#pragma unroll
        for (int m = 0; m < MT; m++)
            c[m][j][0] = c[m][j][1] = c[m][j][2] = c[m][j][3] = 0;
#pragma unroll
        for (int part = 1; part >= 0; part--) // the small part first
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                uint4 b = r(part, j, i);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma(c[m][j], a[m][2 * i], b.x, b.y);
                    mma(c[m][j], a[m][2 * i + 1], b.z, b.w);
                }
            }
    }
}

// Quantizes the 16 rows in `c` and writes them as chunk `chunk` of a tile's side.
template <int D>
__device__ inline void write_chunk(float (&c)[D / 8][4], const float (&back)[2], float scale,
                                   int clipped, bool v, uint8_t *codes, uint8_t *params,
                                   uint32_t chunk)
{
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t w[D / 128 + 1][4] = {};
    uint32_t pair[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float f = back[half] * scale;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            c[j][2 * half] *= f;
            c[j][2 * half + 1] *= f;
        }
        auto x = [&](int i) { return c[i / 2][2 * half + i % 2]; };
        quantizer q = make_quantizer<D / 4>(x, clipped);
        pair[half] = pack_param(q);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            uint32_t codes2 = code_of(q, x(2 * j)) | code_of(q, x(2 * j + 1)) << 16;
            w[j / 16][j % 2 * 2 + half] |= codes2 << (2 * (j / 2 % 8));
        }
    }
    if (t == 0)
        *(uint2 *)(params + chunk * 64 + g * 8) = make_uint2(pair[0], pair[1]);
#pragma unroll
    for (int u = 0; u < (D == 256 ? 2 : 1); u++) {
        uint4 out = make_uint4(w[u][0], w[u][1], w[u][2], w[u][3]);
        if (v) // rows are channels: words 1 and 2 change places
            out = make_uint4(transpose(w[u][0]), transpose(w[u][2]), transpose(w[u][1]),
                             transpose(w[u][3]));
        if (D == 64) { // two chunks share a unit: bytes 0 and 2 are the first's, 1 and 3 the second's
            uint8_t *to = codes + chunk / 2 * 512 + lane * 16 + chunk % 2;
            uint32_t words4[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
            for (int r = 0; r < 4; r++) {
                to[4 * r] = (uint8_t)words4[r];
                to[4 * r + 2] = (uint8_t)(words4[r] >> 16);
            }
        } else {
            *(uint4 *)(codes + (chunk * (D / 128) + u) * 512 + lane * 16) = out;
        }
    }
}

// Block (share of the chunks, layer and kv head). One side of the sequences' chunks.
template <int D>
__global__ void __launch_bounds__(QUANTIZE_WARPS * 32, 1)
    quantize_kernel(const __grid_constant__ append_params p, bool v)
{
    constexpr int MT = D == 256 ? 1 : 2, WORDS = packed<D>::WORDS;
    constexpr bool STAGED = D <= 128; // the matrix fits shared memory
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t layer = blockIdx.y / p.kv_heads, head = blockIdx.y % p.kv_heads;
    const kvd_cuda_matrices &side = v ? p.rotation.v : p.rotation.k;
    uint64_t index = matrix_index(p.rotation, p.layer_begin + layer, head);
    const uint32_t *r = matrix_at<D>(side.forward, index);
    if (STAGED) {
        for (int i = threadIdx.x; i < 2 * WORDS / 4; i += QUANTIZE_WARPS * 32)
            ((uint4 *)shared)[i] = __ldg((const uint4 *)r + i);
        __syncthreads();
        r = (const uint32_t *)shared;
    }
    auto operands = [&](int part, int j, int i) {
        const uint4 *at = (const uint4 *)(r + part * WORDS) + (j * (D / 32) + i) * 32;
        return STAGED ? at[threadIdx.x % 32] : __ldg(at + threadIdx.x % 32);
    };
    float scale = 1 / side.scale[index];
    uint32_t kept = side.clip ? (uint32_t)((double)side.clip[index] * D) : D;
    int clipped = kept < D ? (int)(D - kept) : 0, g = threadIdx.x % 32 / 4;
    uint64_t tile = ((uint64_t)(p.layer_begin + layer) * p.kv_heads + head) *
                    (16 * (p.dim_k + p.dim_v) + 512);
    uint32_t warp = blockIdx.x * QUANTIZE_WARPS + threadIdx.x / 32;
#pragma unroll 1
    for (uint32_t first = warp * MT; first < p.chunks; first += gridDim.x * QUANTIZE_WARPS * MT) {
        const uint8_t *rows[MT][2];
        chunk_source from[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            uint32_t i = min(first + m, p.chunks - 1);
            uint32_t at = find_item(p.n_items, i, [&](uint32_t k) { return p.items[k].first_chunk; });
            const append_item *item = &p.items[at];
            from[m] = {item, item->hist_end + (i - item->first_chunk) * 16};
#pragma unroll
            for (int half = 0; half < 2; half++)
                rows[m][half] = source_row(p, *item, from[m].token + half * 8 + g, layer, head, v);
        }
        float c[MT][D / 8][4], back[MT][2];
        rotate_rows<D, MT>(rows, operands, c, back);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (first + m >= p.chunks)
                continue;
            uint32_t h = from[m].token - p.sink;
            uint8_t *at = (uint8_t *)from[m].item->codec[h / PAGE] + tile;
            write_chunk<D>(c[m], back[m], scale, clipped, v, at + (v ? 16 * p.dim_k : 0),
                           at + 16 * (p.dim_k + p.dim_v) + (v ? 256 : 0), h % PAGE / 16);
        }
    }
}

// -- bf16 rows -----------------------------------------------------------------------------------

// A warp for each (history token, layer, kv head, side): codec bf16's demotion.
__global__ void demote_bf16_kernel(const __grid_constant__ append_params p)
{
    auto [token, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    if (token >= (uint64_t)p.chunks * 16)
        return;
    uint32_t chunk = (uint32_t)(token / 16);
    const append_item &item =
        p.items[find_item(p.n_items, chunk, [&](uint32_t k) { return p.items[k].first_chunk; })];
    uint32_t t = item.hist_end + (uint32_t)token - item.first_chunk * 16, h = t - p.sink;
    uint8_t *to = bf16_tile_row(item.codec[h / PAGE], p.layer_begin + layer, p.kv_heads, head,
                                p.dim_k, p.dim_v, h % PAGE, v);
    copy_row(to, source_row(p, item, t, layer, head, v), 2 * (v ? p.dim_v : p.dim_k));
}

// A warp for each (new token, layer, kv head, side) that stays in bf16.
__global__ void store_window_kernel(const __grid_constant__ append_params p)
{
    auto [token, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    if (token >= p.tokens)
        return;
    uint32_t at = find_item(p.n_items, (uint32_t)token,
                            [&](uint32_t k) { return p.items[k].first_token; });
    const append_item &item = p.items[at];
    uint32_t n = (uint32_t)token - item.first_token, t = item.length + n;
    if (t >= p.sink && t < item.new_hist_end)
        return;
    copy_row(window_row(p, item, t, layer, head, v),
             tensor_row(v ? item.v : item.k, layer, n, head), 2 * (v ? p.dim_v : p.dim_k));
}

// A warp for each (new token, layer, kv head, side).
__global__ void check_kernel(const __grid_constant__ append_params p, unsigned long long *found)
{
    auto [token, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    if (token >= p.tokens)
        return;
    uint32_t at = find_item(p.n_items, (uint32_t)token,
                            [&](uint32_t k) { return p.items[k].first_token; });
    uint32_t n = (uint32_t)token - p.items[at].first_token;
    const uint8_t *row = tensor_row(v ? p.items[at].v : p.items[at].k, layer, n, head);
    bool bad = false;
    for (uint32_t c = threadIdx.x % 32; c < (v ? p.dim_v : p.dim_k); c += 32)
        bad |= (((const uint16_t *)row)[c] & 0x7f80) == 0x7f80;
    if (__any_sync(~0u, bad) && threadIdx.x % 32 == 0)
        atomicMin(found, ((((uint64_t)at * p.layer_count + layer << 17) + n) * p.kv_heads + head) * 2 + v);
}

template <int D>
static cudaError_t quantize_side(const append_params &p, bool v, cudaStream_t stream)
{
    constexpr int MT = D == 256 ? 1 : 2, BYTES = D <= 128 ? packed<D>::WORDS * 8 : 0;
    uint32_t units = p.layer_count * p.kv_heads;
    uint32_t blocks = chunk_blocks(p.chunks, QUANTIZE_WARPS * MT, units);
    cudaError_t rc = cudaFuncSetAttribute(quantize_kernel<D>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (rc != cudaSuccess)
        return rc;
    quantize_kernel<D><<<dim3(blocks, units), QUANTIZE_WARPS * 32, BYTES, stream>>>(p, v);
    return cudaGetLastError();
}

static cudaError_t quantize_any(const append_params &p, bool v, cudaStream_t stream)
{
    switch (v ? p.dim_v : p.dim_k) {
    case 64:
        return quantize_side<64>(p, v, stream);
    case 128:
        return quantize_side<128>(p, v, stream);
    case 256:
        return quantize_side<256>(p, v, stream);
    default:
        return cudaErrorInvalidValue;
    }
}

} // namespace kvd

using namespace kvd;

extern "C" int kvd_cuda_append(const struct kvd_cuda_append_params *p, struct CUstream_st *stream)
{
    cudaError_t rc = cudaSuccess;
    if (p->chunks && p->codec == KVD_CODEC_INT2) {
        rc = quantize_any(*p, false, stream);
        if (rc == cudaSuccess)
            rc = quantize_any(*p, true, stream);
    } else if (p->chunks) {
        demote_bf16_kernel<<<row_blocks(p->chunks * 16ull, p->layer_count, p->kv_heads), ROW_THREADS, 0, stream>>>(*p);
        rc = cudaGetLastError();
    }
    if (rc == cudaSuccess && p->tokens) {
        store_window_kernel<<<row_blocks(p->tokens, p->layer_count, p->kv_heads), ROW_THREADS, 0, stream>>>(*p);
        rc = cudaGetLastError();
    }
    return rc;
}

extern "C" int kvd_cuda_check(const struct kvd_cuda_append_params *p, unsigned long long *found,
                              struct CUstream_st *stream)
{
    if (p->tokens == 0)
        return cudaSuccess;
    check_kernel<<<row_blocks(p->tokens, p->layer_count, p->kv_heads), ROW_THREADS, 0, stream>>>(*p, found);
    return cudaGetLastError();
}
