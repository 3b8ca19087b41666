// Attention over histories in two codecs, K in one and V in another. Codecs and head_dims are known at run
// time only, so that one kernel serves all. Kernels of one codec (decode.cuh) are faster.
//
// A block takes up to 8 NT query rows of a kv head and a part of a sequence: tiles of its history, or tokens of its windows.
// It goes in steps of up to eight chunks, which are staged in shared memory. Each of its eight warps scores a chunk (tokens are
// the 16 rows of mma.m16n8k16, query rows the columns); maxima and probabilities pass through shared memory; and each warp adds
// all chunks' values to its share of the channels. Levels are about 0 and a step's sums are added with rounding, so that errors
// do not grow with the tokens. The block of a unit that finishes last combines its parts. Rotations are sums in fp32.
#include "kernels/cuda/any_steps.cuh"
#include "kernels/cuda/launch.cuh"

#include <algorithm>

namespace kvd
{

// -- the end -------------------------------------------------------------------------------------

// Sums over the warps, of each row.
template <int NT> __device__ inline void sum_warps(const any_state<NT> &st, any_memory<NT> &m)
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float l = st.l[n][e], centre = st.centre[n][e];
#pragma unroll
            for (int k = 4; k < 32; k *= 2) {
                l += __shfl_xor_sync(~0u, l, k);
                centre += __shfl_xor_sync(~0u, centre, k);
            }
            uint32_t r = n * 8 + lane % 4 * 2 + e;
            if (lane >= 4)
                continue;
            m.l[threadIdx.x / 32][r] = l;
            m.centre[threadIdx.x / 32][r] = centre;
            m.best[r] = st.m[n][e]; // all warps' is the same
        }
    __syncthreads();
    if (threadIdx.x < 8 * NT) {
        float l = 0, centre = 0;
        for (uint32_t w = 0; w < ANY_WARPS; w++)
            l += m.l[w][threadIdx.x], centre += m.centre[w][threadIdx.x];
        m.total[threadIdx.x] = l;
        m.centre[0][threadIdx.x] = centre;
    }
    __syncthreads();
}

// Leaves the block's sums of values as rows, in shared or global memory.
template <int NT>
__device__ inline void put_values(const any_state<NT> &st, const any_memory<NT> &m, const channel_share &mine, uint32_t rows,
                                  float unit, row_floats to)
{
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (uint32_t i = 0; i < SHARE; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                uint32_t r = n * 8 + 2 * t + e % 2, channel = (mine.first + i) * 16 + g + e / 2 * 8;
                if (i < mine.n && r < rows)
                    to.row(r)[channel] = fmaf(st.o[i][n][e], unit, m.centre[0][r]); // others read it past their L1
            }
}

// Combines the terms of all parts of a unit; weights: [row][part], of each part's sums.
template <int NT>
__device__ inline void weigh_parts(const any_parts &parts, uint32_t n, uint32_t of_history, uint32_t rows, any_memory<NT> &m,
                                   float *weights)
{
    for (uint32_t r = threadIdx.x / 32; r < rows; r += ANY_WARPS) {
        float best = NONE, total = 0, coded = 0;
        for (uint32_t k = threadIdx.x % 32; k < n; k += 32)
            best = fmaxf(best, __ldcg(&parts.terms(k)[r].x));
        for (int x = 1; x < 32; x *= 2)
            best = fmaxf(best, __shfl_xor_sync(~0u, best, x));
        for (uint32_t k = threadIdx.x % 32; k < n; k += 32) {
            float weight = fast_exp2(__ldcg(&parts.terms(k)[r].x) - best), l = weight * __ldcg(&parts.terms(k)[r].y);
            weights[r * n + k] = weight;
            total += l;
            coded += k < of_history ? l : 0;
        }
        total = warp_sum(total), coded = warp_sum(coded);
        if (threadIdx.x % 32 == 0)
            m.best[r] = best, m.total[r] = total, m.coded[r] = coded;
    }
    __syncthreads();
}

__device__ inline float weighted(const any_parts &parts, uint32_t first, uint32_t end, const float *weights, uint32_t row,
                                 uint32_t channel)
{
    float x = 0;
#pragma unroll 4
    for (uint32_t k = first; k < end; k++)
        x = fmaf(weights[k], __ldcg(parts.values(k).row(row) + channel), x);
    return x;
}

// What a row's sums of values are to be multiplied by, in `total`; and its share of V's mean.
template <int NT>
__device__ inline void divide_rows(const any_call &p, const row_block &b, uint32_t rows, any_memory<NT> &m)
{
    if (threadIdx.x < rows) {
        float best = m.best[threadIdx.x], l = m.total[threadIdx.x], kept = 1;
        if (p.sinks)
            kept = add_sink(p, b, b.row0 + threadIdx.x, best, l);
        if (p.lse)
            p.lse[row_index(p, b, b.row0 + threadIdx.x)] = (best + log2f(l)) / LOG2E;
        float factor = l == 0 ? 0 : kept / l;
        m.total[threadIdx.x] = factor;
        m.coded[threadIdx.x] *= factor;
    }
    __syncthreads();
}

// Writes o. `turned`: rows that are to be un-rotated, or as they are; plain(n, c, x) adds the others' sums.
template <int NT, typename F>
__device__ inline void write_rows(const any_call &p, const row_block &b, uint32_t rows, row_floats from, bool turned,
                                  const any_memory<NT> &m, F &&plain)
{
    uint64_t index = matrix_index(p.rotation, p.layer, b.kv);
    const float *inverse = turned && p.rotation.v.inverse_f32 ? p.rotation.v.inverse_f32 + index * p.dim_v * p.dim_v : nullptr;
    const bool means = turned && is_tc((int)p.codec_v);
    each_channel<NT>(p.dim_v, [&](uint32_t n, uint32_t c) {
        float x[8];
#pragma unroll
        for (int r = 0; r < 8; r++)
            x[r] = inverse ? 0 : from.row(8 * n + r)[c];
        for (uint32_t j = 0; inverse && j < p.dim_v; j++) {
            float a = __ldg(inverse + j * p.dim_v + c);
#pragma unroll
            for (int r = 0; r < 8; r++)
                x[r] = fmaf(from.row(8 * n + r)[j], a, x[r]);
        }
        float mean = means ? p.rotation.transforms[index].v_mean[c] : 0;
#pragma unroll
        for (int r = 0; r < 8; r++) {
            uint32_t row = 8 * n + r;
            if (row >= rows)
                break;
            float y = (x[r] + plain(row, c)) * m.total[row];
            if (means)
                y = fmaf(m.coded[row], mean, y);
            uint64_t at = row_index(p, b, b.row0 + row) * p.dim_v + c;
            store_value((uint8_t *)p.o + at * (p.o_type == KVD_DTYPE_F32 ? 4 : 2), p.o_type == KVD_DTYPE_F32, y);
        }
    });
}

// -- the kernel ----------------------------------------------------------------------------------

template <int NT>
__global__ void __launch_bounds__(ANY_THREADS, NT == 4 ? 1 : 2) attend_any_kernel(const __grid_constant__ any_call p)
{
    KVD_DYNAMIC_SHARED(shared);
    any_memory<NT> &m = *(any_memory<NT> *)shared;
    uint8_t *area = shared + p.area_at;
    row_block b = place_of<NT>(p);
    load_lengths(p, b);
    const uint32_t part = part_of(p), rows = min(8 * NT, p.rows - b.row0);
    const bool window = part >= p.splits;
    history_range range = history_of<true>(p, b, 8 * NT);
    if (!window && part >= range.parts)
        return;
    const any_side k = window ? p.windows[0] : p.history[0], v = window ? p.windows[1] : p.history[1];
    any_walk walk = {window, 0, 0, window ? p.window_chunks : p.step_tiles, {}};
    if (window) {
        walk.tokens = bf16_tokens_of<true>(p, b);
        uint64_t chunks = (walk.tokens.count + 15) / 16, i = part - p.splits;
        walk.at = (uint32_t)(chunks * i / p.window_splits);
        walk.end = (uint32_t)(chunks * (i + 1) / p.window_splits);
    } else {
        walk.at = part_begin(range, part);
        walk.end = part_begin(range, part + 1);
    }
    const kvd_cuda_key_tile *tiles = nullptr;
    if (k.kind == STREAMS)
        tiles = key_tiles(transform_of(p.rotation, p.layer, b.kv), k.codec);
    m.places[0].find(k, tiles);
    m.places[1].find(v, nullptr);
    any_operands<NT> q = {(uint2 *)(shared + p.operands_at), p.dim_k / 16};
    prepare_queries<NT>(p, b, k.kind != ROWS, m, q, (float *)area);
    any_state<NT> st;
    st.clear();
    const channel_share mine(p.dim_v);
    attend_steps<NT>(p, b, walk, k, v, q, m, area, mine, st);
    __syncthreads(); // the area is free
    sum_warps<NT>(st, m);
    const uint32_t n = range.parts + p.window_splits, most = p.splits + p.window_splits;
    if (n == 1) {
        row_floats sums = {(float *)area, p.dim_v};
        put_values<NT>(st, m, mine, 8 * NT, value_unit(v), sums);
        if (threadIdx.x < 8 * NT)
            m.coded[threadIdx.x] = m.total[threadIdx.x];
        __syncthreads();
        divide_rows<NT>(p, b, rows, m);
        write_rows<NT>(p, b, rows, sums, v.kind != ROWS, m, [](uint32_t, uint32_t) { return 0.0f; });
        return;
    }
    any_parts parts = {most, 8 * NT, p.dim_v, nullptr};
    uint64_t unit = ((uint64_t)b.s * p.kv_heads + b.kv) * p.row_blocks + b.row0 / (8 * NT);
    parts.at = (uint8_t *)p.scratch + p.scratch_zeroed + unit * parts.bytes();
    const uint32_t mine_at = window ? range.parts + part - p.splits : part;
    put_values<NT>(st, m, mine, rows, value_unit(v), parts.values(mine_at));
    if (threadIdx.x < rows)
        __stcg(&parts.terms(mine_at)[threadIdx.x], make_float2(m.best[threadIdx.x], m.total[threadIdx.x]));
    if (!arrive_last((uint32_t *)p.scratch + unit, n))
        return;
    // Sums of coded values are un-rotated; all others are added as they are.
    const uint32_t turned = p.history[1].kind == ROWS ? 0 : range.parts;
    float *weights = (float *)area + 8 * NT * p.dim_v;
    weigh_parts<NT>(parts, n, turned, rows, m, weights);
    row_floats sums = {(float *)area, p.dim_v};
    each_channel<NT>(p.dim_v, [&](uint32_t eight, uint32_t c) {
        for (uint32_t r = 8 * eight; r < 8 * eight + 8; r++)
            sums.row(r)[c] = r < rows ? weighted(parts, 0, turned, weights + r * n, r, c) : 0;
    });
    __syncthreads();
    divide_rows<NT>(p, b, rows, m);
    write_rows<NT>(p, b, rows, sums, turned > 0, m,
                   [&](uint32_t r, uint32_t c) { return weighted(parts, turned, n, weights + r * n, r, c); });
}

// -- the plan and the launch ---------------------------------------------------------------------

static uint32_t any_n_tiles(const attend_params &p)
{
    uint32_t rows = rows_of_head(p);
    return rows <= 8 ? 1 : rows <= 16 ? 2 : 4;
}

static any_parts parts_of_unit(const attend_params &p)
{
    return {p.splits + p.window_splits, 8 * any_n_tiles(p), p.dim_v, nullptr};
}

static uint64_t units_of(const attend_params &p)
{
    return (uint64_t)p.sequences * p.kv_heads * n_row_blocks(p, any_n_tiles(p));
}

static uint64_t counters_bytes(const attend_params &p)
{
    return (units_of(p) * 4 + 255) / 256 * 256;
}

uint64_t any_scratch(const attend_params &p)
{
    return counters_bytes(p) + units_of(p) * parts_of_unit(p).bytes();
}

// Parts that fill the GPU about once, of four steps at least; more and shorter ones where lengths differ.
void plan_any(attend_params &p, uint64_t history_sum, uint32_t history_max, uint32_t window_max, uint32_t multiprocessors)
{
    const uint64_t least = 8, units = units_of(p), slots = 2ull * multiprocessors;
    const uint64_t tiles = (history_sum + PAGE - 1) / PAGE * (units / p.sequences), longest = (history_max + PAGE - 1) / PAGE;
    const bool ragged = (uint64_t)history_max * p.sequences > history_sum + history_sum / 4;
    uint64_t part = (tiles + slots - 1) / slots;
    part = std::max(ragged ? part / 2 : part, least);
    if (!ragged && units >= slots) // they fill it by themselves
        part = std::max(longest, least);
    p.part_tiles = (uint32_t)part;
    p.splits = longest ? (uint32_t)std::clamp<uint64_t>((longest + part - 1) / part, 1, MAX_SPLITS) : 0;
    uint64_t chunks = (window_max + 15) / 16, more = std::max<uint64_t>(2 * slots / units, 1);
    p.window_splits = (uint32_t)std::min<uint64_t>({(chunks + STEP_CHUNKS - 1) / STEP_CHUNKS, more, MAX_WINDOW_SPLITS});
    if (p.splits + p.window_splits == 0)
        p.window_splits = 1;
    p.warps = ANY_WARPS;
    p.scratch_zeroed = counters_bytes(p);
}

// Lays out shared memory: as many tiles and steps at once as leave room for two blocks, or, where that cannot be, for one.
// Returns its bytes, or 0 where there is no room at all.
template <int NT> static uint32_t lay_out(any_call &call, uint32_t limit)
{
    static const uint32_t cuts[][2] = {{2, 2}, {1, 2}, {2, 1}, {1, 1}}; // tiles, stages
    const uint32_t rows = 8 * NT, most_parts = call.splits + call.window_splits;
    call.operands_at = (sizeof(any_memory<NT>) + 127) / 128 * 128;
    call.area_at = call.operands_at + 2 * NT * call.dim_k / 16 * 32 * (uint32_t)sizeof(uint2);
    uint32_t window_row = call.windows[0].pitch + call.windows[1].pitch;
    call.window_chunks = window_row * PAGE <= 36 << 10 ? 4 : 2;
    uint32_t least = std::max({2 * rows * call.dim_k * 4, rows * (call.dim_v + most_parts) * 4, call.window_chunks * 16 * window_row});
    for (uint32_t blocks = 2; blocks > 0; blocks--)
        for (auto &cut : cuts) {
            uint32_t bytes = call.area_at + std::max(least, cut[0] * cut[1] * call.staged);
            call.step_tiles = cut[0], call.stages = cut[1];
            if (bytes <= limit / blocks - 1024) // what a block has besides
                return bytes;
        }
    return 0;
}

template <int NT> static cudaError_t launch_rows(any_call &call, uint32_t limit, cudaStream_t stream)
{
    uint32_t bytes = lay_out<NT>(call, limit);
    call.windows[1].codes = call.window_chunks * 16 * call.windows[0].pitch;
    if (bytes == 0)
        return cudaErrorInvalidValue;
    cudaError_t rc = cudaFuncSetAttribute(attend_any_kernel<NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (rc != cudaSuccess)
        return rc;
    dim3 grid(call.kv_heads * call.row_blocks, call.sequences, call.splits + call.window_splits);
    return launch(attend_any_kernel<NT>, grid, ANY_THREADS, bytes, stream, call);
}

cudaError_t launch_any(const attend_params &p, cudaStream_t stream)
{
    any_call call;
    (attend_params &)call = p;
    call.group = p.q_heads / p.kv_heads;
    call.rows = rows_of_head(p);
    call.row_blocks = n_row_blocks(p, any_n_tiles(p));
    call.parts_a_tile = 1.0f / (float)p.part_tiles;
    call.tile = tile_layout({p.codec, p.codec_v}, p.dim_k, p.dim_v);
    for (int v = 0; v < 2; v++) {
        call.history[v] = any_side(v ? p.codec_v : p.codec, v ? p.dim_v : p.dim_k, v);
        call.windows[v] = any_side(KVD_CODEC_BF16, v ? p.dim_v : p.dim_k, v);
    }
    call.history[1].codes = call.history[0].codes_bytes(false);
    call.history[0].params = call.history[1].codes + call.history[1].codes_bytes(true);
    call.history[1].params = call.history[0].params + call.tile.params[1] - call.tile.params[0];
    call.staged = call.history[0].params + call.tile.bytes - call.tile.params[0];
    // Where K's history is in bf16, it lies among pages of history all the same: what is shared with decode.cuh asks no more.
    call.codec = p.codec == KVD_CODEC_BF16 ? (uint32_t)INT4 : p.codec;
    int device = 0, limit = 0;
    cudaError_t rc = cudaGetDevice(&device);
    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (rc != cudaSuccess)
        return rc;
    switch (any_n_tiles(p)) {
    case 1:
        return launch_rows<1>(call, (uint32_t)limit, stream);
    case 2:
        return launch_rows<2>(call, (uint32_t)limit, stream);
    default:
        return launch_rows<4>(call, (uint32_t)limit, stream);
    }
}

} // namespace kvd
