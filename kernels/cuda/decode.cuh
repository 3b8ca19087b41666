// The attention kernel for few query rows: one launch, from un-rotated q to un-rotated o.
//
// Block (part, kv head and row block, sequence). A history part streams its tiles: each warp takes
// every WARPS-th tile, from a ring of tiles in shared memory that it keeps filling itself. A window
// part takes sink and recent window. The block that finishes a (sequence, kv head, row block) last
// merges its parts, un-rotates the history's share and writes o.
#ifndef KVD_KERNELS_CUDA_DECODE_CUH
#define KVD_KERNELS_CUDA_DECODE_CUH

#include "kernels/cuda/attend.cuh"

namespace kvd
{

constexpr int SLOTS = 3;        // tiles of a warp's ring
constexpr int MAX_SPLITS = 128; // of a history
constexpr int MAX_WINDOW_SPLITS = 32;
constexpr int MAX_PARTS = MAX_SPLITS + MAX_WINDOW_SPLITS;

__host__ __device__ inline uint32_t n_row_blocks(const attend_params &p, uint32_t nt)
{
    uint32_t rows = p.q_len * (p.q_heads / p.kv_heads);
    return (rows + 8 * nt - 1) / (8 * nt);
}

// Scratch: a counter for each (sequence, kv head, row block), zero between calls; then the parts.
struct scratch_layout {
    uint64_t counters, parts_at, part_bytes, total;
};

__host__ __device__ inline scratch_layout scratch_of(const attend_params &p, uint32_t nt)
{
    scratch_layout l;
    uint64_t units = (uint64_t)p.sequences * p.kv_heads * n_row_blocks(p, nt);
    l.counters = units * 4;
    l.parts_at = (l.counters + 255) / 256 * 256;
    l.part_bytes = (uint64_t)nt * 8 * (p.dim_v + 4) * 4; // [rows][DV] outputs, then [rows](m, l)
    l.total = l.parts_at + units * (p.splits + p.window_splits) * l.part_bytes;
    return l;
}

template <int NT, int DK, int DV, int WARPS> struct block_memory {
    static constexpr int ROWS = 8 * NT, PITCH = DV + 4; // rows apart by an odd number of 16 bytes
    static constexpr int TILE = tile<DK, DV>::BYTES;
    static constexpr int RING = WARPS * SLOTS * TILE; // [slot][warp]
    static constexpr int GROUPS = WARPS / 2;          // of threads that share the merging of parts
    // One after another in the same bytes: ring (with the queries in its last slots until they are
    // in registers), the warps' results, the merge.
    static constexpr int RESULTS = WARPS * ROWS * (PITCH + 1) * 4 + ROWS * 8;
    static constexpr int MERGE = 2 * GROUPS * ROWS * PITCH * 4 + ROWS * MAX_PARTS * 4;
    static constexpr int LARGER = RESULTS > MERGE ? RESULTS : MERGE;
    static constexpr int QUERIES = (SLOTS - 1) * WARPS * TILE;
    static constexpr int WORK = LARGER > RING ? LARGER : RING;
    static constexpr int BYTES = WORK + WARPS * SLOTS * 8;
    static_assert(sizeof(queries<NT, DK>) <= WARPS * TILE, "queries fit the last slots");
};

// Writes o and lse of a block's rows. o_rotated and o_plain: [ROWS][PITCH] in shared memory, the
// shares of history and windows, normalised; either may be NULL.
template <int NT, int DV, int WARPS, int PITCH>
__device__ inline void finish_rows(const attend_params &p, const row_block &b,
                                   const float *o_rotated, const float *o_plain)
{
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
    uint64_t index = matrix_index(p.rotation, p.layer, b.kv);
    const uint32_t *r = nullptr;
    float scale = 0;
    if (o_rotated) {
        r = matrix_at<DV>(p.rotation.v.inverse, index);
        scale = 1 / p.rotation.v.scale[index];
    }
#pragma unroll 1
    for (int mt = 0; mt < (NT + 1) / 2; mt++) {
        uint32_t a[DV / 16][4];
        float top = 0;
        if (o_rotated) {
            float2 x[DV / 8][2];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < DV / 8; i++) {
                    int row = mt * 16 + half * 8 + g;
                    x[i][half] = make_float2(0, 0);
                    if (row < 8 * NT && b.row0 + row < b.rows)
                        x[i][half] = *(const float2 *)&o_rotated[row * PITCH + i * 8 + 2 * t];
                    top = fmaxf(top, fmaxf(fabsf(x[i][half].x), fabsf(x[i][half].y)));
                }
#pragma unroll
            for (int m = 1; m < 32; m *= 2)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
            top = magnitude(top);
            float inverse = 1 / top;
#pragma unroll
            for (int i = 0; i < DV / 8; i++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    a[i / 2][i % 2 * 2 + half] =
                        pack_fp16(x[i][half].x * inverse, x[i][half].y * inverse);
        }
#pragma unroll
        for (int i = 0; i < (DV / 8 + WARPS - 1) / WARPS; i++) {
            int j = warp + i * WARPS;
            if (j >= DV / 8)
                break;
            float c[4] = {};
            int channel = 8 * t + inverse_channel(j);
            if (o_rotated)
                rotate_tile<DV, 1>(a, r, j, c);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = mt * 16 + half * 8 + g;
                if (row >= 8 * NT || b.row0 + row >= b.rows)
                    continue;
                float x = c[2 * half] * scale * top, y = c[2 * half + 1] * scale * top;
                if (o_plain) {
                    float2 w = *(const float2 *)&o_plain[row * PITCH + channel];
                    x += w.x, y += w.y;
                }
                uint64_t at = row_index(p, b, b.row0 + row) * DV + channel;
                if (p.o_type == KVD_DTYPE_F32)
                    *(float2 *)((float *)p.o + at) = make_float2(x, y);
                else
                    *(uint32_t *)((uint16_t *)p.o + at) = pack_bf16(x, y);
            }
        }
    }
}

__device__ inline void write_lse(const attend_params &p, const row_block &b, uint32_t row, float m,
                                 float l)
{
    if (p.lse)
        p.lse[row_index(p, b, b.row0 + row)] = (m + log2f(l)) / LOG2E;
}

// Combines the warps' states: rows' outputs (not normalised) at `o`, their (m, l) at `ml`, maxima in
// log2 units.
template <int NT, int DV, int WARPS, int PITCH>
__device__ inline void combine_warps(float *o, float *ml, const logit_terms<NT> &x,
                                     state<NT, DV> &st, bool plain, int rows)
{
    constexpr int ROWS = 8 * NT, THREADS = WARPS * 32;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sums[NT][2], lows[NT][2];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float sum = st.l[n][e], low = st.min_sum[n][e];
#pragma unroll
            for (int k = 4; k < 32; k *= 2) {
                sum += __shfl_xor_sync(~0u, sum, k);
                low += __shfl_xor_sync(~0u, low, k);
            }
            sums[n][e] = sum, lows[n][e] = low;
            st.m[n][e] = st.m[n][e] > x.none * 0.99f ? st.m[n][e] * x.unit : NONE;
            if (g == 0)
                ml[(n * 8 + 2 * t + e) * WARPS + warp] = st.m[n][e];
        }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int row = n * 8 + 2 * t + e;
            float m = NONE;
#pragma unroll
            for (int w = 0; w < WARPS; w += 4) {
                float4 x = *(const float4 *)&ml[row * WARPS + w];
                m = fmaxf(m, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
            }
            float f = fast_exp2(st.m[n][e] - m);
            st.m[n][e] = m;
            sums[n][e] *= f;
#pragma unroll
            for (int ct = 0; ct < DV / 16; ct++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float y = st.o[n][ct][2 * half + e];
                    int channel = plain ? bf16_channel(ct, half) : ct * 16 + half * 8 + g;
                    y = plain ? y : y * TWO24 * slot_factor(ct) + lows[n][e];
                    if (row < rows)
                        o[(warp * ROWS + row) * PITCH + channel] = y * f;
                }
        }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (g == 0) // maxima have been read
                ml[(n * 8 + 2 * t + e) * WARPS + warp] = sums[n][e];
    // A thread sums a vector of four channels over its group's share of the warps.
    int vectors = rows * (DV / 4), groups = WARPS > 4 && THREADS >= 4 * vectors ? 4 : 1;
    for (int i = threadIdx.x; i < vectors * groups; i += THREADS) {
        int group = i / vectors, row = i % vectors / (DV / 4), c = i % (DV / 4) * 4;
        float4 sum = {};
        int first = group * (WARPS / groups);
        for (int w = first; w < first + WARPS / groups; w++) {
            float4 y = *(const float4 *)&o[(w * ROWS + row) * PITCH + c];
            sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
        }
        *(float4 *)&o[(first * ROWS + row) * PITCH + c] = sum;
    }
    __syncthreads();
    if (groups > 1)
        for (int i = threadIdx.x; i < vectors; i += THREADS) {
            int row = i / (DV / 4), c = i % (DV / 4) * 4;
            float4 sum = *(const float4 *)&o[row * PITCH + c];
            for (int k = 1; k < groups; k++) {
                float4 y = *(const float4 *)&o[(k * (WARPS / groups) * ROWS + row) * PITCH + c];
                sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
            }
            *(float4 *)&o[row * PITCH + c] = sum;
        }
    float sum = 0;
    if (threadIdx.x < ROWS)
        for (int w = 0; w < WARPS; w++)
            sum += ml[threadIdx.x * WARPS + w];
    __syncthreads();
    if (threadIdx.x < ROWS)
        ml[threadIdx.x * 2 + 1] = sum;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (threadIdx.x < 4)
                ml[(n * 8 + 2 * t + e) * 2] = st.m[n][e];
    __syncthreads();
}

// The last block of a unit: weighs all parts and finishes.
template <int NT, int DV, int WARPS, int GROUPS, int PITCH>
__device__ inline void merge_parts(const attend_params &p, const row_block &b, uint32_t of_history,
                                   const uint8_t *parts, uint64_t part_bytes, uint8_t *memory)
{
    constexpr int ROWS = 8 * NT, THREADS = WARPS * 32;
    float *buffer = (float *)memory; // [history, windows][GROUPS][ROWS][PITCH]
    float *weight = buffer + 2 * GROUPS * ROWS * PITCH;
    uint32_t n = of_history + p.window_splits, lane = threadIdx.x % 32;
    int rows = min((uint32_t)ROWS, b.rows - b.row0);
    for (int row = threadIdx.x / 32; row < rows; row += WARPS) {
        float m = NONE, sum = 0;
        for (uint32_t i = lane; i < n; i += 32)
            m = fmaxf(m, __ldcg((const float *)(parts + i * part_bytes) + ROWS * DV + row * 2));
#pragma unroll
        for (int x = 1; x < 32; x *= 2)
            m = fmaxf(m, __shfl_xor_sync(~0u, m, x));
        for (uint32_t i = lane; i < n; i += 32) {
            float2 ml = __ldcg((const float2 *)((const float *)(parts + i * part_bytes) + ROWS * DV) + row);
            float f = fast_exp2(ml.x - m);
            sum += f * ml.y;
            weight[row * MAX_PARTS + i] = f;
        }
#pragma unroll
        for (int x = 1; x < 32; x *= 2)
            sum += __shfl_xor_sync(~0u, sum, x);
        for (uint32_t i = lane; i < n; i += 32)
            weight[row * MAX_PARTS + i] *= sum > 0 ? 1 / sum : 0;
        if (lane == 0)
            write_lse(p, b, row, m, sum);
    }
    __syncthreads();
    int vectors = rows * (DV / 4), groups = min(GROUPS, max(1, THREADS / vectors));
    for (int i = threadIdx.x; i < vectors * groups; i += THREADS) {
        int row = i % vectors / (DV / 4), c = i % (DV / 4) * 4, group = i / vectors;
        float4 history = {}, plain = {};
#pragma unroll 8
        for (uint32_t k = group; k < n; k += groups) {
            float4 x = __ldcg((const float4 *)((const float *)(parts + k * part_bytes) + row * DV + c));
            float w = weight[row * MAX_PARTS + k], h = k < of_history ? w : 0, r = w - h;
            history.x += h * x.x, history.y += h * x.y, history.z += h * x.z, history.w += h * x.w;
            plain.x += r * x.x, plain.y += r * x.y, plain.z += r * x.z, plain.w += r * x.w;
        }
        *(float4 *)&buffer[(group * ROWS + row) * PITCH + c] = history;
        *(float4 *)&buffer[((GROUPS + group) * ROWS + row) * PITCH + c] = plain;
    }
    __syncthreads();
    if (groups > 1) {
        for (int i = threadIdx.x; i < rows * DV; i += THREADS) {
            int at = i / DV * PITCH + i % DV;
            for (int k = 1; k < groups; k++) {
                buffer[at] += buffer[k * ROWS * PITCH + at];
                buffer[GROUPS * ROWS * PITCH + at] += buffer[(GROUPS + k) * ROWS * PITCH + at];
            }
        }
        __syncthreads();
    }
    finish_rows<NT, DV, WARPS, PITCH>(p, b, of_history ? buffer : nullptr,
                                      p.window_splits ? buffer + GROUPS * ROWS * PITCH : nullptr);
}

// The tiles [low, end) of a history that some row of a block sees, and into how many parts they are
// cut.
struct history_range {
    uint32_t low, end, parts;
};

template <bool GENERAL>
__device__ inline history_range history_of(const attend_params &p, const row_block &b,
                                           uint32_t block_rows)
{
    history_range r = {0, (b.hist_end - p.sink + PAGE - 1) / PAGE, 0};
    if (GENERAL) {
        uint32_t first = first_seen(p, row_position(p, b, b.row0));
        uint32_t last = row_position(p, b, min(b.row0 + block_rows, b.rows) - 1);
        r.low = min(r.end, first > p.sink ? (first - p.sink) / PAGE : 0);
        r.end = last < p.sink ? r.low : max(r.low, min(r.end, (last - p.sink) / PAGE + 1));
    }
    uint32_t tiles = r.end - r.low;
    r.parts = min(p.splits, max(1, (tiles + p.part_tiles / 2) / p.part_tiles));
    if (p.splits == 0 || (tiles == 0 && p.window_splits))
        r.parts = 0;
    return r;
}

// Streams a part of the history through the warps' rings.
template <bool GENERAL, int NT, int DK, int DV, int WARPS>
__device__ inline void history_part(const attend_params &p, const row_block &b,
                                    const history_range &range, uint32_t part, uint8_t *shared,
                                    uint64_t *bars, logit_terms<NT> &x, state<NT, DV> &st)
{
    using mem = block_memory<NT, DK, DV, WARPS>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    uint32_t tokens = b.hist_end - p.sink, tiles = range.end - range.low;
    uint32_t pos_first = row_position(p, b, b.row0);
    uint32_t pos_last = row_position(p, b, min(b.row0 + 8 * NT, b.rows) - 1);
    uint32_t first = range.low + (uint32_t)((uint64_t)tiles * part / range.parts) + (uint32_t)warp;
    uint32_t end = range.low + (uint32_t)((uint64_t)tiles * (part + 1) / range.parts);
    const uint64_t *pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
    uint64_t offset = ((uint64_t)p.layer * p.kv_heads + b.kv) * mem::TILE;
    auto address = [&](uint32_t i) { return (const uint8_t *)pages[i] + offset; };
#if KVD_BULK
    auto slot_at = [&](uint32_t i) { return shared + (i * WARPS + warp) * mem::TILE; };
    if (lane == 0) {
        for (int i = 0; i < SLOTS; i++)
            barrier_init(&bars[i]);
        barriers_ready();
        for (uint32_t i = 0; i < SLOTS - 1 && first + i * WARPS < end; i++)
            fetch(slot_at(i), address(first + i * WARPS), mem::TILE, &bars[i]);
    }
    __syncwarp();
#endif
    queries<NT, DK> &qs = *(queries<NT, DK> *)(shared + mem::QUERIES);
    float divisor = qs.template rotate<WARPS>(p, b, warp, x.sign);
    __syncthreads();
    uint2 q[NT][DK / 16];
    x.unit = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E * divisor * TWO24;
    x.softcap = p.softcap * LOG2E;
    x.none = -1e10f; // scores are below 10
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int ct = 0; ct < DK / 16; ct++)
            q[n][ct] = make_uint2(qs.op[n][ct][0][lane], qs.op[n][ct][1][lane]);
#pragma unroll
        for (int e = 0; e < 2; e++)
            x.sum[n][e] = qs.sum(n * 8 + 2 * t + e) / TWO24;
    }
    __syncthreads(); // the last slots are free
#if KVD_BULK
    if (lane == 0 && first + (SLOTS - 1) * WARPS < end) {
        barriers_ready(); // what was written there is in order before the copy
        fetch(slot_at(SLOTS - 1), address(first + (SLOTS - 1) * WARPS), mem::TILE,
              &bars[SLOTS - 1]);
    }
#endif
    st.clear(x.none);
#if KVD_BULK
    uint32_t slot = 0, phase = 0;
#endif
    for (uint32_t i = first; i < end; i += WARPS) {
        const uint8_t *at = address(i);
#if KVD_BULK
        at = slot_at(slot);
        barrier_wait(&bars[slot], phase);
#endif
        uint32_t left = tokens - i * PAGE;
        tile_place place = {left < PAGE ? (int)left : PAGE, p.sink + i * PAGE};
        bool masked = place.count < PAGE;
        if (GENERAL)
            masked |= place.position + PAGE - 1 > pos_first || place.position < first_seen(p, pos_last);
        auto operands = [&](int n, int ct) { return q[n][ct]; };
        constexpr int CHUNKS = NT == 1 && DK <= 128 ? 4 : 2;
        if (masked)
            attend_tile<GENERAL, true, NT, DK, DV, CHUNKS>(at, place, operands, x, st);
        else
            attend_tile<GENERAL, false, NT, DK, DV, CHUNKS>(at, place, operands, x, st);
#if KVD_BULK
        __syncwarp();
        uint32_t next = i + SLOTS * WARPS;
        if (lane == 0 && next < end)
            fetch(slot_at(slot), address(next), mem::TILE, &bars[slot]);
        if (++slot == SLOTS) {
            slot = 0;
            phase ^= 1;
        }
#endif
    }
}

template <bool F32, int NT, int DK, int DV, int WARPS>
__device__ inline void window_part(const attend_params &p, const row_block &b, uint32_t part,
                                   logit_terms<NT> &x, state<NT, DV> &st)
{
    uint32_t q[NT][DK / 8], q_low[NT][DK / 8];
    x.unit = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E;
    x.softcap = p.softcap * LOG2E;
    x.none = NONE;
#pragma unroll
    for (int n = 0; n < NT; n++)
        load_bf16_queries<F32, DK>(p, b, n, q[n], q_low[n]);
    st.clear(x.none);
    bf16_tokens w = bf16_tokens_of(p, b);
    uint32_t chunks = (w.count + 15) / 16;
    uint32_t first = (uint32_t)((uint64_t)chunks * part / p.window_splits) + threadIdx.x / 32;
    uint32_t end = (uint32_t)((uint64_t)chunks * (part + 1) / p.window_splits);
#pragma unroll 1
    for (uint32_t i = first; i < end; i += WARPS)
        attend_bf16_chunk<F32, NT, DK, DV>(p, b, w, i * 16, q, q_low, x, st);
}

template <bool GENERAL, int NT, int DK, int DV, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, WARPS == 16 ? 1 : NT == 2 || DK + DV > 256 ? 2 : GENERAL ? 3 : 4)
    attend_kernel(const __grid_constant__ attend_params p)
{
    using mem = block_memory<NT, DK, DV, WARPS>;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ bool last;
    wait_for_previous();
    uint32_t blocks = n_row_blocks(p, NT), part = blockIdx.x;
    uint32_t kv = blockIdx.y / blocks, block = blockIdx.y % blocks;
    row_block b = rows_of(p, blockIdx.z, kv, block * 8 * NT);
    history_range range = history_of<GENERAL>(p, b, 8 * NT);
    bool plain = part >= p.splits;
    if (!plain && part >= range.parts)
        return;
    logit_terms<NT> x;
    state<NT, DV> st;
    x.sign = p.scale < 0 ? -1.0f : p.scale > 0;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t row = min(b.row0 + n * 8 + threadIdx.x % 4 * 2 + e, b.rows - 1);
            x.last[n][e] = row_position(p, b, row);
            x.seen[n][e] = first_seen(p, x.last[n][e]);
        }
    uint64_t *bars = (uint64_t *)(shared + mem::WORK) + threadIdx.x / 32 * SLOTS;
    if (plain && p.q_type == KVD_DTYPE_F32)
        window_part<true, NT, DK, DV, WARPS>(p, b, part - p.splits, x, st);
    else if (plain)
        window_part<false, NT, DK, DV, WARPS>(p, b, part - p.splits, x, st);
    else
        history_part<GENERAL, NT, DK, DV, WARPS>(p, b, range, part, shared, bars, x, st);
    let_next_start();
    float *o = (float *)shared, *ml = o + WARPS * mem::ROWS * mem::PITCH;
    combine_warps<NT, DV, WARPS, mem::PITCH>(o, ml, x, st, plain,
                                             (int)min((uint32_t)mem::ROWS, b.rows - b.row0));
    uint32_t n = range.parts + p.window_splits;
    if (n == 1) {
        for (int i = threadIdx.x; i < mem::ROWS * DV; i += WARPS * 32) {
            float l = ml[i / DV * 2 + 1];
            o[i / DV * mem::PITCH + i % DV] *= l > 0 ? 1 / l : 0;
        }
        if (threadIdx.x < mem::ROWS && b.row0 + threadIdx.x < b.rows)
            write_lse(p, b, threadIdx.x, ml[threadIdx.x * 2], ml[threadIdx.x * 2 + 1]);
        __syncthreads();
        finish_rows<NT, DV, WARPS, mem::PITCH>(p, b, plain ? nullptr : o, plain ? o : nullptr);
        return;
    }
    scratch_layout l = scratch_of(p, NT);
    uint64_t unit = ((uint64_t)b.s * p.kv_heads + kv) * blocks + block;
    uint8_t *parts = (uint8_t *)p.scratch + l.parts_at +
                     unit * (p.splits + p.window_splits) * l.part_bytes;
    uint32_t slot = plain ? range.parts + part - p.splits : part;
    float *to = (float *)(parts + slot * l.part_bytes);
    for (int i = threadIdx.x; i < mem::ROWS * (DV / 4); i += WARPS * 32)
        __stcg((float4 *)to + i, *(float4 *)&o[i / (DV / 4) * mem::PITCH + i % (DV / 4) * 4]);
    if (threadIdx.x < mem::ROWS * 2)
        __stcg(to + mem::ROWS * DV + threadIdx.x, ml[threadIdx.x]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t *counter = (uint32_t *)p.scratch + unit;
        last = atomicAdd(counter, 1) == n - 1;
        if (last)
            *counter = 0;
    }
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    merge_parts<NT, DV, WARPS, mem::GROUPS, mem::PITCH>(p, b, range.parts, parts, l.part_bytes,
                                                        shared);
}

// Launches behind what is on the stream already, and in place before that has finished.
template <bool GENERAL, int NT, int DK, int DV, int WARPS>
cudaError_t launch_attend(const attend_params &p, cudaStream_t stream)
{
    auto kernel = attend_kernel<GENERAL, NT, DK, DV, WARPS>;
    constexpr int bytes = block_memory<NT, DK, DV, WARPS>::BYTES;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(p.splits + p.window_splits, p.kv_heads * n_row_blocks(p, NT), p.sequences);
    config.blockDim = dim3(WARPS * 32);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return rc == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, p) : rc;
}

} // namespace kvd

#endif
