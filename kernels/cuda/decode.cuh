// The attention kernel for few query rows: one launch, from un-rotated q to un-rotated o.
//
// Block (sequence, kv head and row block, part): parts of one unit start far apart, so that shares
// of the device that lag behind do not meet in one of them. A history part streams its tiles: each warp takes
// every WARPS-th tile, from a ring of tiles in shared memory that it keeps filling itself. A window
// part takes sink and recent window. The block that finishes a (sequence, kv head, row block) last
// merges its parts, un-rotates the history's share and writes o.
#ifndef KVD_KERNELS_CUDA_DECODE_CUH
#define KVD_KERNELS_CUDA_DECODE_CUH

#include "kernels/cuda/attend.cuh"

namespace kvd
{

constexpr int SLOTS = 2;        // tiles of a warp's ring
constexpr int MAX_SPLITS = 128; // of a history
constexpr int MAX_WINDOW_SPLITS = 32;

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
    static constexpr int COUNT = WARPS;
    static constexpr int ROWS = 8 * NT, PITCH = DV + 4; // rows apart by an odd number of 16 bytes
    static constexpr int WARP_PITCH = ROWS * PITCH + 8; // floats between the warps' results
    static constexpr int TILE = tile<DK, DV>::BYTES;
    static constexpr int RING = WARPS * SLOTS * TILE; // [slot][warp]
    // One after another in the same bytes: the ring, with the queries in its last slots until they
    // are in registers; then the warps' results and maxima, the finished rows of history and
    // windows, those of the history as operands, and R^T.
    static constexpr int MAXIMA = WARPS * WARP_PITCH * 4, SUMS = MAXIMA + ROWS * WARPS * 4;
    static constexpr int FINISHED = SUMS + ROWS * WARPS * 4;
    static constexpr int OPERANDS = (FINISHED + 2 * ROWS * PITCH * 4 + 15) / 16 * 16;
    static constexpr int TOPS = OPERANDS + (int)sizeof(row_operands<NT, DV>);
    static constexpr int MATRIX = (TOPS + ROWS * 4 + 127) / 128 * 128;
    static constexpr bool STAGED = DV <= 128; // is R^T
    static constexpr int RESULTS = MATRIX + (STAGED ? packed<DV>::WORDS * 4 : 0);
    static constexpr int QUERIES = (SLOTS - 1) * WARPS * TILE;
    static constexpr int WORK = RESULTS > RING ? RESULTS : RING;
    static constexpr int BARRIERS = WARPS * SLOTS + 1; // the last one is R^T's
    static constexpr int BYTES = WORK + BARRIERS * 8;
    static_assert(sizeof(queries<NT, DK, WARPS>) <= WARPS * TILE, "queries fit the last slots");
    static_assert(WORK % 8 == 0, "barriers are aligned");

    uint8_t *at;

    __device__ inline float *results(int warp) const
    {
        return (float *)at + warp * WARP_PITCH;
    }

    __device__ inline float *maxima() const // [ROWS][WARPS]
    {
        return (float *)(at + MAXIMA);
    }

    __device__ inline float *sums() const // [ROWS][WARPS]
    {
        return (float *)(at + SUMS);
    }

    __device__ inline float *finished(bool plain) const // [ROWS][PITCH], of windows or of history
    {
        return (float *)(at + FINISHED) + plain * (ROWS * PITCH);
    }

    __device__ inline row_operands<NT, DV> &operands() const
    {
        return *(row_operands<NT, DV> *)(at + OPERANDS);
    }

    // The largest absolute values of the history's finished rows, as bits; clear before finish().
    __device__ inline uint32_t *tops() const
    {
        return (uint32_t *)(at + TOPS);
    }

    __device__ inline void finish(int row, int channel, float4 x, bool plain) const
    {
        *(float4 *)&finished(plain)[row * PITCH + channel] = x;
        if (!plain) {
            float top = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
            uint32_t same = __match_any_sync(__activemask(), row);
            uint32_t bits = __reduce_max_sync(same, __float_as_uint(top));
            if (threadIdx.x % 32 == __ffs(same) - 1)
                atomicMax(&tops()[row], bits);
        }
    }

    __device__ inline uint64_t *barriers(int warp) const // [SLOTS]; those of warp WARPS: R^T's
    {
        return (uint64_t *)(at + WORK) + warp * SLOTS;
    }
};

// -- finishing -----------------------------------------------------------------------------------

// R^T of a kv head, by its high part, on its way into shared memory.
template <int NT, int DK, int DV, int WARPS> struct unrotation {
    using memory = block_memory<NT, DK, DV, WARPS>;
    static constexpr bool STAGED = KVD_BULK && memory::STAGED;
    memory m;
    const uint32_t *r;
    const float *scale;

    __device__ inline unrotation(const attend_params &p, const row_block &b, memory memory)
        : m(memory)
    {
        uint64_t index = matrix_index(p.rotation, p.layer, b.kv);
        r = matrix_at<DV>(p.rotation.v.inverse, index);
        scale = &p.rotation.v.scale[index];
    }

    // One thread, once, when nobody reads or writes there; wait() only after a block-wide barrier.
    __device__ inline void start() const
    {
#if KVD_BULK
        if constexpr (STAGED) {
            uint64_t *bar = m.barriers(WARPS);
            barrier_init(bar);
            barriers_ready();
            fetch(m.at + memory::MATRIX, r, packed<DV>::WORDS * 4, bar, cache_policy(false));
        }
#endif
    }

    __device__ inline void wait() const
    {
#if KVD_BULK
        if constexpr (STAGED)
            barrier_wait(m.barriers(WARPS), 0);
#endif
    }

    __device__ inline uint4 load(int out8, int in32) const
    {
        if constexpr (STAGED)
            return *packed<DV>::at((const uint32_t *)(m.at + memory::MATRIX), out8, in32);
        else
            return __ldg(packed<DV>::at(r, out8, in32));
    }
};

// Writes o of a block's rows from what memory.finish() was given by for_shares: un-rotates the
// history's share where there is one.
template <int NT, int DK, int DV, int WARPS>
__device__ inline void finish_rows(const attend_params &p, const row_block &b, int rows,
                                   const unrotation<NT, DK, DV, WARPS> &back, bool rotated,
                                   bool plain)
{
    using memory = block_memory<NT, DK, DV, WARPS>;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    row_operands<NT, DV> &operands = back.m.operands();
    uint32_t a[DV / 16][4];
    __syncthreads();
    if (rotated) {
        for (int i = threadIdx.x; i < memory::ROWS * (DV / 4); i += WARPS * 32) {
            int row = i / (DV / 4), c = i % (DV / 4) * 4;
            float divisor = magnitude(__uint_as_float(back.m.tops()[row])), f = 1 / divisor;
            float4 x = *(const float4 *)&back.m.finished(false)[row * memory::PITCH + c];
            if (row >= rows)
                x = {};
            operands.put(row, c / 8, c % 8 / 2, x.x * f, x.y * f);
            operands.put(row, c / 8, c % 8 / 2 + 1, x.z * f, x.w * f);
            if (c == 0)
                operands.divisor[row] = divisor / __ldg(back.scale);
        }
        __syncthreads();
        operands.load(a);
        back.wait();
    }
#pragma unroll
    for (int i = 0; i < (DV / 8 + WARPS - 1) / WARPS; i++) {
        int j = warp + i * WARPS;
        if (j >= DV / 8)
            break;
        float c[4] = {};
        if (rotated)
            rotate_tile<DV>(a, [&](int in32) { return back.load(j, in32); }, c);
#pragma unroll
        for (int half = 0; half < NT; half++) {
            int row = half * 8 + g, channel = 8 * t + inverse_channel(j);
            if (row >= rows)
                continue;
            float2 x = make_float2(0, 0);
            if (rotated)
                x = make_float2(c[2 * half] * operands.divisor[row], c[2 * half + 1] * operands.divisor[row]);
            if (plain) {
                float2 w = *(const float2 *)&back.m.finished(true)[row * memory::PITCH + channel];
                x.x += w.x, x.y += w.y;
            }
            uint64_t at = row_index(p, b, b.row0 + row) * DV + channel;
            if (p.o_type == KVD_DTYPE_F32)
                *(float2 *)((float *)p.o + at) = x;
            else
                *(uint32_t *)((uint16_t *)p.o + at) = pack_bf16(x.x, x.y);
        }
    }
}

__device__ inline void write_lse(const attend_params &p, const row_block &b, uint32_t row, float m,
                                 float l)
{
    if (p.lse)
        p.lse[row_index(p, b, b.row0 + row)] = (m + log2f(l)) / LOG2E;
}

// -- the warps of a block ------------------------------------------------------------------------

// First step of combining: the maxima of the warps' columns, in log2 units, become known. After it
// nobody reads the ring.
template <int NT, int DV, typename M>
__device__ inline void share_maxima(const M &mem, const logit_terms<NT> &x, state<NT, DV> &st)
{
    constexpr int WARPS = M::COUNT;
    int warp = threadIdx.x / 32, t = threadIdx.x % 4;
    __syncthreads();
    if (threadIdx.x < M::ROWS)
        mem.tops()[threadIdx.x] = 0;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            st.m[n][e] = st.m[n][e] > x.none * 0.99f ? st.m[n][e] * x.unit : NONE;
            if (threadIdx.x % 32 < 4)
                mem.maxima()[(n * 8 + 2 * t + e) * WARPS + warp] = st.m[n][e];
        }
    __syncthreads();
}

// Second step: writes this warp's outputs and sums, relative to the maxima of all warps, which
// st.m becomes.
template <int NT, int DV, typename M>
__device__ inline void share_results(const M &mem, state<NT, DV> &st, bool plain, int rows)
{
    constexpr int WARPS = M::COUNT;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int row = n * 8 + 2 * t + e;
            float sum = st.l[n][e], low = st.min_sum[n][e], m = NONE;
#pragma unroll
            for (int k = 4; k < 32; k *= 2) {
                sum += __shfl_xor_sync(~0u, sum, k);
                low += __shfl_xor_sync(~0u, low, k);
            }
#pragma unroll
            for (int w = 0; w < WARPS; w += 4) {
                float4 x = *(const float4 *)&mem.maxima()[row * WARPS + w];
                m = fmaxf(m, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
            }
            float f = fast_exp2(st.m[n][e] - m);
            st.m[n][e] = m;
            if (g == 0)
                mem.sums()[row * WARPS + warp] = sum * f;
            float *to = mem.results(warp) + row * M::PITCH;
#pragma unroll
            for (int ct = 0; ct < DV / 16; ct++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float y = st.o[n][ct][2 * half + e];
                    int channel = plain ? bf16_channel(ct, half) : ct * 16 + half * 8 + g;
                    y = plain ? y : y * TWO24 * slot_factor(ct) + low;
                    if (row < rows)
                        to[channel] = y * f;
                }
        }
    __syncthreads();
}

// What a thread sums up: four channels of a row, over every groups-th of some parts, from `group`.
// The groups of a vector are lanes side by side.
struct share {
    int row, channel, group, groups;
};

// Calls f(share) for all of a block's rows; all threads of a warp make the same calls.
template <int DV, int WARPS, typename F> __device__ inline void for_shares(int rows, F &&f)
{
    constexpr int THREADS = WARPS * 32;
    int vectors = rows * (DV / 4), groups = WARPS > 4 && THREADS >= 4 * vectors ? 4 : 1;
    for (int i = threadIdx.x; i < vectors * groups; i += THREADS) {
        int vector = i / groups;
        f(share{vector / (DV / 4), vector % (DV / 4) * 4, i % groups, groups});
    }
}

__device__ inline float4 add(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ inline float4 times(float4 a, float f)
{
    return make_float4(a.x * f, a.y * f, a.z * f, a.w * f);
}

// Over the groups of a share.
__device__ inline float4 sum_groups(float4 x, int groups)
{
    for (int k = 1; k < groups; k *= 2)
        x = add(x, make_float4(__shfl_xor_sync(~0u, x.x, k), __shfl_xor_sync(~0u, x.y, k),
                               __shfl_xor_sync(~0u, x.z, k), __shfl_xor_sync(~0u, x.w, k)));
    return x;
}

// Of all warps, after share_maxima.
template <typename M> __device__ inline float row_maximum(const M &mem, int row)
{
    constexpr int WARPS = M::COUNT;
    float m = NONE;
    for (int w = 0; w < WARPS; w++)
        m = fmaxf(m, mem.maxima()[row * WARPS + w]);
    return m;
}

// Third step: the sum over the warps. f(row, channel, sum of outputs, sum of probabilities) gets
// each vector once.
template <int DV, typename M, typename F>
__device__ inline void sum_warps(const M &mem, int rows, F &&f)
{
    constexpr int WARPS = M::COUNT;
    for_shares<DV, WARPS>(rows, [&](share s) {
        float4 sum = {};
        for (int w = s.group; w < WARPS; w += s.groups)
            sum = add(sum, *(const float4 *)&mem.results(w)[s.row * M::PITCH + s.channel]);
        sum = sum_groups(sum, s.groups);
        float l = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w += 4) {
            float4 x = *(const float4 *)&mem.sums()[s.row * WARPS + w];
            l += x.x + x.y + (x.z + x.w);
        }
        if (s.group == 0)
            f(s.row, s.channel, sum, l);
    });
}

// -- the parts of a unit -------------------------------------------------------------------------

// A part in memory: outputs [rows][DV], then (m, l) [rows].
template <int DV, int ROWS> struct part_view {
    float *at;

    __device__ inline float4 *vector(int row, int channel) const
    {
        return (float4 *)(at + row * DV + channel);
    }

    __device__ inline float2 *terms(int row) const
    {
        return (float2 *)(at + ROWS * DV) + row;
    }
};

// Counts the blocks of a unit; in the last one, calls f in one thread and returns true: what the
// others wrote is seen then.
template <typename F> __device__ inline bool arrive_last(uint32_t *counter, uint32_t n, F &&f)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1) == n - 1;
        if (last) {
            *counter = 0;
            __threadfence();
            f();
        }
    }
    __syncthreads();
    return last;
}

// The last block of a unit: weighs all parts and finishes.
template <int NT, int DK, int DV, int WARPS>
__device__ inline void merge_parts(const attend_params &p, const row_block &b, int rows,
                                   uint32_t of_history, uint8_t *parts, uint64_t part_bytes,
                                   const unrotation<NT, DK, DV, WARPS> &back)
{
    constexpr int ROWS = 8 * NT, AHEAD = 4;
    uint32_t n = of_history + p.window_splits;
    for_shares<DV, WARPS>(rows, [&](share s) {
        float4 history = {}, plain = {};
        float m = NONE, l = 0;
        for (uint32_t first = s.group; first < n; first += AHEAD * s.groups) {
            float4 x[AHEAD];
            float2 terms[AHEAD];
            float top = m;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                uint32_t k = first + i * s.groups;
                part_view<DV, ROWS> part = {(float *)(parts + min(k, n - 1) * part_bytes)};
                x[i] = __ldcg(part.vector(s.row, s.channel));
                terms[i] = __ldcg(part.terms(s.row));
                if (k >= n)
                    terms[i] = make_float2(NONE, 0);
                top = fmaxf(top, terms[i].x);
            }
            float f = fast_exp2(m - top);
            m = top;
            l *= f, history = times(history, f), plain = times(plain, f);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                uint32_t k = first + i * s.groups;
                float w = k < n ? fast_exp2(terms[i].x - m) : 0;
                l += w * terms[i].y;
                history = add(history, times(x[i], k < of_history ? w : 0));
                plain = add(plain, times(x[i], k < of_history ? 0 : w));
            }
        }
        float top = m;
        for (int k = 1; k < s.groups; k *= 2)
            top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
        float f = fast_exp2(m - top);
        l *= f;
        for (int k = 1; k < s.groups; k *= 2)
            l += __shfl_xor_sync(~0u, l, k);
        f *= l > 0 ? 1 / l : 0;
        history = sum_groups(times(history, f), s.groups);
        if (p.window_splits)
            plain = sum_groups(times(plain, f), s.groups);
        if (s.group)
            return;
        back.m.finish(s.row, s.channel, history, false);
        if (p.window_splits)
            back.m.finish(s.row, s.channel, plain, true);
        if (s.channel == 0)
            write_lse(p, b, s.row, top, l);
    });
    finish_rows(p, b, rows, back, of_history > 0, p.window_splits > 0);
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
                                    const history_range &range, uint32_t part,
                                    const block_memory<NT, DK, DV, WARPS> &memory,
                                    logit_terms<NT> &x, state<NT, DV> &st)
{
    using mem = block_memory<NT, DK, DV, WARPS>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    uint32_t tokens = b.hist_end - p.sink, tiles = range.end - range.low;
    uint32_t pos_first = row_position(p, b, b.row0);
    uint32_t pos_last = row_position(p, b, min(b.row0 + 8 * NT, b.rows) - 1);
    uint32_t first = range.low + tiles * part / range.parts + (uint32_t)warp;
    uint32_t end = range.low + tiles * (part + 1) / range.parts;
    const uint64_t *pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
    uint64_t offset = ((uint64_t)p.layer * p.kv_heads + b.kv) * mem::TILE;
#if !KVD_BULK
    auto loads = queries<NT, DK, WARPS>::load(p, b, warp);
#else
    // Lane k fetches the warp's tiles k, k + 32, ...: it has read their addresses ahead of need.
    uint64_t *bars = memory.barriers(warp);
    auto slot_at = [&](uint32_t i) { return memory.at + (i * WARPS + warp) * mem::TILE; };
    auto page_of = [&](uint32_t k) {
        uint32_t i = first + k * WARPS;
        return (const uint8_t *)(i < end ? pages[i] + offset : 0);
    };
    const uint8_t *mine = page_of(lane);
    auto loads = queries<NT, DK, WARPS>::load(p, b, warp);
    uint64_t policy = cache_policy(b.rows <= 8 * NT);
    if (lane == 0) {
        for (int i = 0; i < SLOTS; i++)
            barrier_init(&bars[i]);
        barriers_ready();
    }
    __syncwarp();
    if (lane < SLOTS - 1 && mine)
        fetch(slot_at(lane), mine, mem::TILE, &bars[lane], policy);
    __syncwarp();
#endif
    auto &qs = *(queries<NT, DK, WARPS> *)(memory.at + mem::QUERIES);
    float divisor = qs.rotate(p, b, warp, x.sign, loads);
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
    if (lane == SLOTS - 1 && mine) {
        barriers_ready(); // what was written there is in order before the copy
        fetch(slot_at(lane), mine, mem::TILE, &bars[lane], policy);
    }
#endif
    st.clear(x.none);
#if KVD_BULK
    uint32_t slot = 0, phase = 0, ahead = SLOTS;
#endif
    for (uint32_t i = first; i < end; i += WARPS) {
#if KVD_BULK
        const uint8_t *at = slot_at(slot);
        barrier_wait(&bars[slot], phase);
#else
        const uint8_t *at = (const uint8_t *)pages[i] + offset;
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
        if (ahead % 32 == 0)
            mine = page_of(ahead + lane);
        if (lane == ahead % 32 && mine)
            fetch(slot_at(slot), mine, mem::TILE, &bars[slot], policy);
        ahead++;
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

// As many as registers allow.
__host__ __device__ constexpr int blocks_per_multiprocessor(bool general, int nt, int dk, int dv,
                                                            int warps)
{
    int warps_in_all = nt == 2 || dk + dv > 256 ? 8 : general ? 12 : 16;
    return warps_in_all / warps;
}

template <bool GENERAL, int NT, int DK, int DV, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, blocks_per_multiprocessor(GENERAL, NT, DK, DV, WARPS))
    attend_kernel(const __grid_constant__ attend_params p)
{
    using mem = block_memory<NT, DK, DV, WARPS>;
    extern __shared__ __align__(128) uint8_t shared[];
    wait_for_previous();
    uint32_t blocks = n_row_blocks(p, NT), part = blockIdx.z;
    uint32_t kv = blockIdx.y / blocks, block = blockIdx.y % blocks;
    row_block b = rows_of(p, blockIdx.x, kv, block * 8 * NT);
    history_range range = history_of<GENERAL>(p, b, 8 * NT);
    bool plain = part >= p.splits;
    if (!plain && part >= range.parts)
        return;
    logit_terms<NT> x;
    state<NT, DV> st;
    x.sign = p.scale < 0 ? -1.0f : p.scale > 0;
    if (GENERAL || plain)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                uint32_t row = min(b.row0 + n * 8 + threadIdx.x % 4 * 2 + e, b.rows - 1);
                x.last[n][e] = row_position(p, b, row);
                x.seen[n][e] = first_seen(p, x.last[n][e]);
            }
    mem memory = {shared};
    if (plain && p.q_type == KVD_DTYPE_F32)
        window_part<true, NT, DK, DV, WARPS>(p, b, part - p.splits, x, st);
    else if (plain)
        window_part<false, NT, DK, DV, WARPS>(p, b, part - p.splits, x, st);
    else
        history_part<GENERAL, NT, DK, DV, WARPS>(p, b, range, part, memory, x, st);
    let_next_start();
    uint32_t n = range.parts + p.window_splits;
    int rows = (int)min((uint32_t)mem::ROWS, b.rows - b.row0);
    unrotation<NT, DK, DV, WARPS> back(p, b, memory);
    share_maxima(memory, x, st);
    if (n == 1 && !plain && threadIdx.x == 0)
        back.start();
    share_results(memory, st, plain, rows);
    if (n == 1) {
        sum_warps<DV>(memory, rows, [&](int row, int channel, float4 sum, float l) {
            memory.finish(row, channel, times(sum, l > 0 ? 1 / l : 0), plain);
            if (channel == 0)
                write_lse(p, b, row, row_maximum(memory, row), l);
        });
        finish_rows(p, b, rows, back, !plain, plain);
        return;
    }
    scratch_layout l = scratch_of(p, NT);
    uint64_t unit = ((uint64_t)b.s * p.kv_heads + kv) * blocks + block;
    uint8_t *parts = (uint8_t *)p.scratch + l.parts_at +
                     unit * (p.splits + p.window_splits) * l.part_bytes;
    uint32_t slot = plain ? range.parts + part - p.splits : part;
    part_view<DV, mem::ROWS> to = {(float *)(parts + slot * l.part_bytes)};
    sum_warps<DV>(memory, rows, [&](int row, int channel, float4 sum, float l) {
        __stcg(to.vector(row, channel), sum);
        if (channel == 0)
            __stcg(to.terms(row), make_float2(row_maximum(memory, row), l));
    });
    if (!arrive_last((uint32_t *)p.scratch + unit, n, [&] { back.start(); }))
        return;
    merge_parts(p, b, rows, range.parts, parts, l.part_bytes, back);
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
    config.gridDim = dim3(p.sequences, p.kv_heads * n_row_blocks(p, NT), p.splits + p.window_splits);
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
