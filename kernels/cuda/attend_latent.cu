// Attention over latents (MLA): up to 128 q heads share one latent of 512 values, which is key and value, and a rope part of 64
// in bf16. With so many rows arithmetic takes longer than reading, so that a tile of codes is made levels once, in shared
// memory, for both products of all rows of a block.
//
// A call is up to four kernels, one behind the other. The first turns queries by the latent's matrix, to operands in scratch.
// The second attends: a block takes up to 8 NT query rows and a part of a sequence, tiles of its history or tokens of its
// windows, in steps of 64 or, in bf16, 32 tokens. Tokens are the 16 rows of mma.m16n8k16, query rows the columns; a warp scores a
// chunk of a step for a share of the rows, maxima and probabilities pass through shared memory, and each warp adds all chunks'
// values to its 64 channels, of which it keeps the sums. The third combines the parts of each row; the last turns the
// history's share back. What is in bf16, the codec itself too, needs the second and third alone.
#include "kernels/cuda/latent_steps.cuh"
#include "kernels/cuda/launch.cuh"

#include <algorithm>

namespace kvd
{

constexpr int TURNED_TILES = 2; // of 16 rows, of a block that turns rows
constexpr uint32_t TURNED_ROWS = 16 * TURNED_TILES, TURN_WARPS = 4, TURN_SLICES = LATENT / 32 / TURN_WARPS; // a warp: 32 outputs

// -- queries -------------------------------------------------------------------------------------

__device__ inline uint64_t query_row(const latent_call &p, uint32_t s, uint32_t row)
{
    row_block b = {s, 0, 0};
    return row_index(p, b, min(row, p.rows - 1)) * LATENT_ROW; // of rows beyond the end nothing is written
}

// Eight values of a query's latent part as bf16, or what that leaves of them.
__device__ inline uint4 load_eight(const latent_call &p, uint64_t at, bool rest)
{
    if (p.q_type != KVD_DTYPE_F32)
        return *(const uint4 *)((const uint16_t *)p.q + at);
    const float4 *from = (const float4 *)((const float *)p.q + at);
    float4 x = from[0], y = from[1];
    uint2 w[4] = {in_two_parts(x.x, x.y, false), in_two_parts(x.z, x.w, false), in_two_parts(y.x, y.y, false), in_two_parts(y.z, y.w, false)};
    return rest ? make_uint4(w[0].y, w[1].y, w[2].y, w[3].y) : make_uint4(w[0].x, w[1].x, w[2].x, w[3].x);
}

// Block (32 rows, 128 outputs, sequence). Rows are divided by a power of two, so that fp16 has them.
__global__ void __launch_bounds__(TURN_WARPS * 32) turn_latent_queries_kernel(const __grid_constant__ latent_call p)
{
    __shared__ float divisors[TURNED_ROWS];
    const uint32_t s = blockIdx.z, row0 = blockIdx.x * TURNED_ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t out8 = (blockIdx.y * TURN_WARPS + warp) * 4;
    const uint64_t index = matrix_index(p.rotation, p.layer, 0);
    const bool f32 = p.q_type == KVD_DTYPE_F32;
    for (uint32_t r = warp; r < TURNED_ROWS; r += TURN_WARPS) {
        uint64_t from = query_row(p, s, row0 + r);
        uint32_t top = 0;
        for (uint32_t c = lane; c < LATENT; c += 32)
            top = max(top, __float_as_uint(fabsf(load_value((const uint8_t *)p.q + (from + c) * (f32 ? 4 : 2), f32))));
        top = __reduce_max_sync(~0u, top);
        if (lane == 0)
            divisors[r] = magnitude(__uint_as_float(top));
    }
    __syncthreads();
    float c[TURNED_TILES][4][4];
    clear_products(c);
    auto multiply = [&](uint32_t part, bool rest) {
        multiply_latents<TURNED_TILES, 4>(
            c, matrix_at<LATENT>(p.rotation.v.forward, index, 2) + part * packed<LATENT>::WORDS, out8,
            [&](uint32_t i, uint32_t(&a)[TURNED_TILES][2][4]) {
#pragma unroll
                for (int m = 0; m < TURNED_TILES; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        put_group(a[m], half, load_eight(p, query_row(p, s, row0 + m * 16 + half * 8 + g) + i * 32 + 8 * t, rest));
            },
            mma_bf16);
    };
    multiply(1, false);
    if (f32)
        multiply(0, true);
    multiply(0, false);
    const float scale = __ldg(&p.rotation.v.scale[index]);
    const uint32_t eights = p.memory.rows / 8;
#pragma unroll
    for (int m = 0; m < TURNED_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t r = m * 16 + half * 8, eight = (row0 + r) / 8;
            if (eight >= eights)
                break;
            float f = __fdividef(inverse_power(divisors[r + g]), scale);
            uint2 *to = p.memory.queries + (((uint64_t)s * eights + eight) * LATENT_TILES + out8 / 2) * 32 + lane;
#pragma unroll
            for (int k = 0; k < 2; k++) // channel tiles
                to[k * 32] = make_uint2(pack_fp16(c[m][2 * k][2 * half] * f, c[m][2 * k][2 * half + 1] * f),
                                        pack_fp16(c[m][2 * k + 1][2 * half] * f, c[m][2 * k + 1][2 * half + 1] * f));
        }
    if (blockIdx.y == 0 && threadIdx.x < TURNED_ROWS && row0 + threadIdx.x < p.memory.rows)
        p.memory.divisors[(uint64_t)s * p.memory.rows + row0 + threadIdx.x] = divisors[threadIdx.x];
}

// Queries as they are, as B operands of bf16, in one part or two: so many channel tiles of each row, from channel `first` on.
template <int NT>
__device__ inline void put_plain_queries(const latent_call &p, const row_block &b, uint32_t first, uint32_t tiles, uint32_t parts, uint8_t *to)
{
    const bool f32 = p.q_type == KVD_DTYPE_F32;
    const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (uint32_t i = threadIdx.x / 32; i < NT * tiles; i += LATENT_WARPS) {
        uint32_t n = i / tiles, ct = i % tiles;
        uint64_t at = query_row(p, b.s, b.row0 + n * 8 + g) + first + ct * 16 + 2 * t;
        uint2 x[2]; // channels 2 t and 2 t + 8, with their neighbours, in two parts
#pragma unroll
        for (int k = 0; k < 2; k++)
            if (f32) {
                float2 y = *(const float2 *)((const float *)p.q + at + 8 * k);
                x[k] = in_two_parts(y.x, y.y, false);
            } else {
                x[k] = make_uint2(*(const uint32_t *)((const uint16_t *)p.q + at + 8 * k), 0);
            }
        uint2 *at_part = (uint2 *)to + i * 32 + threadIdx.x % 32;
        at_part[0] = make_uint2(x[0].x, x[1].x);
        if (parts == 2)
            at_part[NT * tiles * 32] = make_uint2(x[0].y, x[1].y);
    }
}

// All that scores want of a block's rows. The caller synchronizes before anyone reads.
template <int NT>
__device__ inline void load_latent_queries(const latent_call &p, const row_block &b, bool coded, uint8_t *shared, latent_memory<NT> &m)
{
    for (uint32_t r = threadIdx.x; r < 8 * NT; r += LATENT_THREADS) {
        m.last[r] = row_position(p, b, min(b.row0 + r, p.rows - 1));
        m.seen[r] = first_seen(p, m.last[r]);
        m.best[0][r] = NONE;
        m.unit[r] = coded ? p.memory.divisors[(uint64_t)b.s * p.memory.rows + b.row0 + r] : 1;
    }
    put_plain_queries<NT>(p, b, LATENT, ROPE_TILES, p.parts[1], shared + p.rope_at);
    if (!coded) {
        put_plain_queries<NT>(p, b, 0, LATENT_TILES, p.parts[0], shared + p.operands_at);
        return;
    }
    const uint8_t *from = (const uint8_t *)(p.memory.queries + ((uint64_t)b.s * p.memory.rows + b.row0) / 8 * LATENT_TILES * 32);
    for (uint32_t i = threadIdx.x * 16; i < NT * LATENT_TILES * 256; i += LATENT_THREADS * 16)
        copy_async(shared + p.operands_at + i, from + i);
    copies_arrived();
    __syncthreads();
    // Sums of the channels as products see them: products with ones.
    for (uint32_t n = threadIdx.x / 32; n < NT; n += LATENT_WARPS) {
        const uint32_t ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
        float c[4] = {};
#pragma unroll 4
        for (uint32_t ct = 0; ct < LATENT_TILES; ct++) {
            uint2 q = query_operands(shared + p.operands_at, 0, NT, n, LATENT_TILES)[ct * 32];
            mma(c, ones, q.x, q.y);
        }
        if (threadIdx.x % 32 < 4)
            m.sum[n * 8 + threadIdx.x % 4 * 2] = c[0], m.sum[n * 8 + threadIdx.x % 4 * 2 + 1] = c[1];
    }
}

// -- attention -----------------------------------------------------------------------------------

// Leaves the sums over a part's tokens in scratch, those of a block's rows.
template <int NT, bool CODED>
__device__ inline void put_latent_part(const any_parts &parts, uint32_t part, uint32_t rows, uint32_t turn, latent_state<NT, CODED> &st,
                                       latent_memory<NT> &m)
{
    constexpr uint32_t CHUNKS = scored_rows<NT, CODED>::CHUNKS;
    const scored_rows<NT, CODED> mine;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (mine.any())
#pragma unroll
        for (int n = 0; n < scored_rows<NT, CODED>::SN; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float l = st.l[n][e], centre = st.centre[n][e];
#pragma unroll
                for (int k = 4; k < 32; k *= 2) {
                    l += __shfl_xor_sync(~0u, l, k);
                    centre += __shfl_xor_sync(~0u, centre, k);
                }
                if (lane < 4)
                    m.l[mine.chunk][mine.row(n, e)] = l, m.centre[mine.chunk][mine.row(n, e)] = centre;
            }
    __syncthreads();
    if (threadIdx.x < rows) {
        float l = 0;
        for (uint32_t k = 0; k < CHUNKS; k++)
            l += m.l[k][threadIdx.x];
        parts.terms(part)[threadIdx.x] = make_float2(m.best[turn][threadIdx.x], l);
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t r = n * 8 + 2 * t + e;
            float centre = 0;
            if (CODED)
                for (uint32_t k = 0; k < CHUNKS; k++)
                    centre += m.centre[k][r];
            if (r >= rows)
                continue;
            float *to = parts.values(part).row(r) + threadIdx.x / 32 * (CHANNEL_TILES * 16) + g;
#pragma unroll
            for (uint32_t i = 0; i < CHANNEL_TILES; i++) {
                to[i * 16] = fmaf(st.o[i][n][e], st.scale_unit, centre);
                to[i * 16 + 8] = fmaf(st.o[i][n][2 + e], st.scale_unit, centre);
            }
        }
}

template <int NT> __device__ inline any_parts parts_of(const latent_call &p, uint32_t s, uint32_t row0)
{
    any_parts parts = {p.splits + p.window_splits, 8 * NT, LATENT, nullptr};
    parts.at = p.memory.parts + ((uint64_t)s * p.row_blocks + row0 / (8 * NT)) * parts.bytes();
    return parts;
}

template <int NT, bool CODED>
__device__ inline void attend_latent_part(const latent_call &p, const row_block &b, const latent_walk &walk, uint32_t part, uint8_t *shared)
{
    latent_memory<NT> &m = *(latent_memory<NT> *)shared;
    latent_state<NT, CODED> st;
    load_latent_queries<NT>(p, b, CODED, shared, m);
    uint32_t turn = attend_latent_steps<NT, CODED>(p, b, walk, shared, m, st);
    __syncthreads();
    put_latent_part<NT, CODED>(parts_of<NT>(p, b.s, b.row0), part, min(8 * NT, p.rows - b.row0), turn, st, m);
}

template <int NT> __global__ void __launch_bounds__(LATENT_THREADS, 1) attend_latent_kernel(const __grid_constant__ latent_call p)
{
    KVD_DYNAMIC_SHARED(shared);
    row_block b = place_of<NT>(p);
    load_lengths(p, b);
    const uint32_t part = part_of(p);
    const bool window = part >= p.splits, coded = !window && p.latent.kind != ROWS;
    history_range range = history_of<true>(p, b, 8 * NT);
    if (!window && part >= range.parts)
        return;
    latent_walk walk = {window, 0, 0, b.hist_end - p.sink, {}};
    if (window) {
        walk.tokens = bf16_tokens_of<true>(p, b);
        walk.count = walk.tokens.count;
        uint64_t steps = (walk.count + HALF_PAGE - 1) / HALF_PAGE, i = part - p.splits;
        walk.at = (uint32_t)(steps * i / p.window_splits);
        walk.end = (uint32_t)(steps * (i + 1) / p.window_splits);
    } else {
        const uint32_t steps = coded ? 1 : PAGE / HALF_PAGE; // of a tile
        walk.at = part_begin(range, part) * steps;
        walk.end = part_begin(range, part + 1) * steps;
    }
    const uint32_t place = window ? range.parts + part - p.splits : part;
    if (coded)
        attend_latent_part<NT, true>(p, b, walk, place, shared);
    else
        attend_latent_part<NT, false>(p, b, walk, place, shared);
}

// -- the end -------------------------------------------------------------------------------------

constexpr uint32_t COMBINE_THREADS = LATENT / 4;

// A row's weights of its parts, by the first warp; what its sums are to be multiplied by, in `factor`.
template <int NT>
__device__ inline void weigh_latent_parts(const latent_call &p, const row_block &b, const any_parts &parts, uint32_t n, uint32_t row,
                                          float *weights, float &factor)
{
    const uint32_t r = row - b.row0;
    float best = NONE, l = 0, kept = 1;
    for (uint32_t k = threadIdx.x; k < n; k += 32)
        best = fmaxf(best, parts.terms(k)[r].x);
    for (int x = 1; x < 32; x *= 2)
        best = fmaxf(best, __shfl_xor_sync(~0u, best, x));
    for (uint32_t k = threadIdx.x; k < n; k += 32) {
        float2 term = parts.terms(k)[r];
        weights[k] = fast_exp2(term.x - best);
        l = fmaf(weights[k], term.y, l);
    }
    l = warp_sum(l);
    if (threadIdx.x != 0)
        return;
    if (p.sinks)
        kept = add_sink(p, b, row, best, l);
    if (p.lse)
        p.lse[row_index(p, b, row)] = (best + log2f(l)) / LOG2E;
    factor = l == 0 ? 0 : kept / l;
}

__device__ inline float4 times(const float4 &x, float f)
{
    return make_float4(x.x * f, x.y * f, x.z * f, x.w * f);
}

__device__ inline float4 weighted_sum(const any_parts &parts, uint32_t first, uint32_t end, const float *weights, uint32_t r)
{
    float4 sum = {};
#pragma unroll 4
    for (uint32_t k = first; k < end; k++)
        add(sum, ((const float4 *)parts.values(k).row(r))[threadIdx.x], weights[k], weights[k], weights[k], weights[k]);
    return sum;
}

__device__ inline void store_four(const latent_call &p, uint64_t at, const float4 &x)
{
    if (p.o_type != KVD_DTYPE_F32) {
        *(uint2 *)((uint16_t *)p.o + at) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
        return;
    }
    float2 *to = (float2 *)((float *)p.o + at); // may be 8-byte aligned only
    to[0] = make_float2(x.x, x.y), to[1] = make_float2(x.z, x.w);
}

// Block (row, sequence): four channels a thread. Parts of codes are left for the next kernel, which turns them back.
template <int NT> __global__ void __launch_bounds__(COMBINE_THREADS) combine_latents_kernel(const __grid_constant__ latent_call p)
{
    __shared__ float weights[MAX_PARTS], factor;
    const uint32_t row = blockIdx.x;
    row_block b = {blockIdx.y, 0, row / (8 * NT) * (8 * NT)};
    load_lengths(p, b);
    const history_range range = history_of<true>(p, b, 8 * NT);
    const any_parts parts = parts_of<NT>(p, b.s, b.row0);
    const uint32_t n = range.parts + p.window_splits, coded = p.latent.kind == ROWS ? 0 : range.parts;
    if (threadIdx.x < 32)
        weigh_latent_parts<NT>(p, b, parts, n, row, weights, factor);
    __syncthreads();
    const float4 others = times(weighted_sum(parts, coded, n, weights, row - b.row0), factor);
    if (p.latent.kind == ROWS)
        return store_four(p, row_index(p, b, row) * LATENT + threadIdx.x * 4, others);
    const uint64_t at = ((uint64_t)b.s * p.memory.rows + row) * LATENT / 4 + threadIdx.x;
    ((float4 *)p.memory.sums)[at] = times(weighted_sum(parts, 0, coded, weights, row - b.row0), factor);
    ((float4 *)p.memory.others)[at] = others;
}

// Block (32 rows, 128 channels, sequence): sums of codes times the inverse, in two fp16 parts each, and the others.
__global__ void __launch_bounds__(TURN_WARPS * 32) turn_latents_back_kernel(const __grid_constant__ latent_call p)
{
    __shared__ float divisors[TURNED_ROWS];
    const uint32_t s = blockIdx.z, row0 = blockIdx.x * TURNED_ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t out8 = (blockIdx.y * TURN_WARPS + warp) * 4;
    const uint64_t index = matrix_index(p.rotation, p.layer, 0);
    auto row_at = [&](uint32_t r) { return ((uint64_t)s * p.memory.rows + min(row0 + r, p.rows - 1)) * LATENT; };
    for (uint32_t r = warp; r < TURNED_ROWS; r += TURN_WARPS) {
        uint32_t top = 0;
        for (uint32_t c = lane; c < LATENT; c += 32)
            top = max(top, __float_as_uint(fabsf(p.memory.sums[row_at(r) + c])));
        top = __reduce_max_sync(~0u, top);
        if (lane == 0)
            divisors[r] = magnitude(__uint_as_float(top));
    }
    __syncthreads();
    float c[TURNED_TILES][4][4];
    clear_products(c);
    auto multiply = [&](bool rest) {
        multiply_latents<TURNED_TILES, 4>(
            c, matrix_at<LATENT>(p.rotation.v.inverse, index, 1), out8,
            [&](uint32_t i, uint32_t(&a)[TURNED_TILES][2][4]) {
#pragma unroll
                for (int m = 0; m < TURNED_TILES; m++)
#pragma unroll
                    for (int k = 0; k < 8; k++) { // register k % 4 of step k / 4
                        uint32_t r = m * 16 + k % 2 * 8 + g;
                        float2 x = *(const float2 *)(p.memory.sums + row_at(r) + i * 32 + k / 4 * 16 + k % 4 / 2 * 8 + 2 * t);
                        float f = inverse_power(divisors[r]);
                        uint2 both = in_two_parts(x.x * f, x.y * f, true);
                        a[m][k / 4][k % 4] = rest ? both.y : both.x;
                    }
            },
            mma);
    };
    multiply(true);
    multiply(false);
    const float scale = __ldg(&p.rotation.v.scale[index]);
    row_block b = {s, 0, 0};
#pragma unroll
    for (int m = 0; m < TURNED_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t r = m * 16 + half * 8 + g, channel = out8 * 8 + 8 * t; // the first of eight, which four tiles have
            if (row0 + r >= p.rows)
                continue;
            float f = __fdividef(divisors[r], scale);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float4 y = *(const float4 *)(p.memory.others + row_at(r) + channel + 4 * k);
                add(y, make_float4(c[m][2 * k][2 * half], c[m][2 * k][2 * half + 1], c[m][2 * k + 1][2 * half], c[m][2 * k + 1][2 * half + 1]), f, f, f, f);
                store_four(p, row_index(p, b, row0 + r) * LATENT + channel + 4 * k, y);
            }
        }
}

// -- the plan and the launch ---------------------------------------------------------------------

constexpr uint32_t LARGE_BLOCK = 212 << 10; // bytes of shared memory of a block of 64 rows

static uint32_t shared_limit()
{
    int device = 0, limit = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
        return 0;
    return (uint32_t)limit;
}

// Tiles of eight rows of a block.
static uint32_t latent_n_tiles(const attend_params &p)
{
    uint32_t rows = rows_of_head(p);
    return rows <= 16 ? 2 : rows <= 32 || shared_limit() < LARGE_BLOCK ? 4 : 8;
}

static bool is_coded(const attend_params &p)
{
    return p.codec_v != KVD_CODEC_BF16;
}

static latent_scratch latent_scratch_of(const attend_params &p)
{
    const uint32_t block = 8 * latent_n_tiles(p);
    latent_scratch x = {};
    uint8_t *at = (uint8_t *)p.scratch;
    auto take = [&](uint64_t bytes) {
        uint8_t *from = at + x.bytes;
        x.bytes += (bytes + 255) / 256 * 256;
        return from;
    };
    x.rows = (rows_of_head(p) + block - 1) / block * block;
    const uint64_t rows = (uint64_t)p.sequences * x.rows, coded = is_coded(p) ? rows : 0;
    const any_parts parts = {p.splits + p.window_splits, block, LATENT, nullptr};
    x.queries = (uint2 *)take(coded * LATENT * 2);
    x.divisors = (float *)take(coded * 4);
    x.parts = take(rows / block * parts.bytes());
    x.sums = (float *)take(coded * LATENT * 4);
    x.others = (float *)take(coded * LATENT * 4);
    return x;
}

uint64_t latent_scratch_bytes(const attend_params &p)
{
    return latent_scratch_of(p).bytes;
}

// Tiles that a part may have: sums are cut off at their end, not rounded (attend.cu).
constexpr uint64_t MOST_LATENT_TILES = 1024;

// One block a multiprocessor. Equal histories are cut so that the waves of blocks are shortest, a block costing its tiles and
// some more; ragged ones into parts of a fraction of an even share.
void plan_latent(attend_params &p, uint64_t history_sum, uint32_t history_max, uint32_t window_max, uint32_t multiprocessors)
{
    const uint64_t overhead = 6, least = 4, units = (uint64_t)p.sequences * n_row_blocks(p, latent_n_tiles(p));
    const uint64_t longest = ((uint64_t)history_max + PAGE - 1) / PAGE;
    const uint64_t tiles = (history_sum + PAGE - 1) / PAGE * (units / p.sequences);
    const bool ragged = (uint64_t)history_max * p.sequences > history_sum + history_sum / 4;
    uint64_t part = std::max<uint64_t>(longest, 1), best = UINT64_MAX;
    if (ragged)
        part = std::max(tiles / multiprocessors / 3 + 1, 2 * least);
    else
        for (uint64_t parts = 1; parts <= std::min<uint64_t>(MAX_SPLITS, std::max<uint64_t>(longest / least, 1)); parts++) {
            uint64_t waves = (units * parts + multiprocessors - 1) / multiprocessors, each = (longest + parts - 1) / parts;
            uint64_t cost = waves * (each + overhead) + parts / 8;
            if (cost < best)
                best = cost, part = each;
        }
    part = std::clamp<uint64_t>(part, 1, MOST_LATENT_TILES);
    part = std::max<uint64_t>(part, (longest + MAX_SPLITS - 1) / MAX_SPLITS);
    p.part_tiles = (uint32_t)part;
    p.splits = longest ? (uint32_t)std::clamp<uint64_t>((longest + part - 1) / part, 1, MAX_SPLITS) : 0;
    uint64_t steps = ((uint64_t)window_max + HALF_PAGE - 1) / HALF_PAGE, more = std::max<uint64_t>(multiprocessors / units, 1);
    p.window_splits = (uint32_t)std::min<uint64_t>({(steps + 3) / 4, more, MAX_WINDOW_SPLITS});
    if (p.splits + p.window_splits == 0)
        p.window_splits = 1;
    p.warps = LATENT_WARPS;
    p.scratch_zeroed = 0;
}

// Lays out shared memory, with two steps at once where there is room. Returns its bytes; 0: there is no room at all.
template <int NT> static uint32_t lay_out_latents(latent_call &call, uint32_t limit)
{
    const bool f32 = call.q_type == KVD_DTYPE_F32, coded = call.latent.kind != ROWS;
    const uint32_t latent_part = NT * LATENT_TILES * 256, rope_part = NT * ROPE_TILES * 256;
    call.parts[0] = call.parts[1] = f32 ? 2 : 1;
    call.rope_at = (sizeof(latent_memory<NT>) + 127) / 128 * 128;
    call.p_at = call.rope_at + call.parts[1] * rope_part;
    call.slot_bytes[0] = call.tile.bytes - call.tile.codes[1] + PAGE * 2 * ROPE;
    call.slot_bytes[1] = HALF_PAGE * 2 * LATENT_ROW;
    uint32_t bytes = 0;
    const uint32_t rest = call.p_at + TILE_CHUNKS * NT * 256; // where blocks over codes and others begin to differ
    call.operands_at = rest;
    for (int rows = 0; rows < 2; rows++) {
        if (!rows && !coded)
            continue;
        uint32_t at = rest + (rows ? call.parts[0] : 1) * latent_part;
        if (!rows)
            call.tile_at = at;
        call.slots_at[rows] = at + (rows ? 0 : TILE_AREA);
        call.stages[rows] = call.slots_at[rows] + 2 * call.slot_bytes[rows] <= limit ? 2 : 1;
        bytes = std::max(bytes, call.slots_at[rows] + call.stages[rows] * call.slot_bytes[rows]);
    }
    return bytes <= limit ? bytes : 0;
}

template <int NT> static cudaError_t launch_latent_rows(latent_call &call, cudaStream_t stream)
{
    const uint32_t bytes = lay_out_latents<NT>(call, shared_limit()), s = call.sequences;
    const bool coded = call.latent.kind != ROWS;
    const dim3 turned((call.memory.rows + TURNED_ROWS - 1) / TURNED_ROWS, TURN_SLICES, s);
    if (bytes == 0)
        return cudaErrorInvalidValue;
    cudaError_t rc = cudaFuncSetAttribute(attend_latent_kernel<NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (rc == cudaSuccess && coded)
        rc = launch(turn_latent_queries_kernel, turned, TURN_WARPS * 32, 0, stream, call);
    if (rc == cudaSuccess)
        rc = launch(attend_latent_kernel<NT>, dim3(call.row_blocks, s, call.splits + call.window_splits), LATENT_THREADS, bytes, stream, call);
    if (rc == cudaSuccess)
        rc = launch(combine_latents_kernel<NT>, dim3(call.rows, s), COMBINE_THREADS, 0, stream, call);
    if (rc == cudaSuccess && coded)
        rc = launch(turn_latents_back_kernel, turned, TURN_WARPS * 32, 0, stream, call);
    return rc;
}

cudaError_t launch_latent(const attend_params &p, cudaStream_t stream)
{
    latent_call call;
    (attend_params &)call = p;
    const uint32_t nt = latent_n_tiles(p);
    call.group = p.q_heads;
    call.rows = rows_of_head(p);
    call.row_blocks = n_row_blocks(p, nt);
    call.parts_a_tile = 1.0f / (float)p.part_tiles;
    call.tile = tile_layout({p.codec, p.codec_v}, p.dim_k, p.dim_v);
    call.latent = any_side(p.codec_v, LATENT, true);
    call.latent.params = call.tile.params[1] - call.tile.codes[1];
    call.memory = latent_scratch_of(p);
    // A history in bf16 lies among pages of history all the same: what is shared with decode.cuh asks no more.
    call.codec = INT4;
    return nt == 2 ? launch_latent_rows<2>(call, stream) : nt == 4 ? launch_latent_rows<4>(call, stream) : launch_latent_rows<8>(call, stream);
}

} // namespace kvd
