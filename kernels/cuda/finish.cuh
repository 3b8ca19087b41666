// The end of a block's attention: its warps' results are summed, and the block that finishes a
// (sequence, kv head, row block) last merges the parts, un-rotates the history's share and writes o.
#ifndef KVD_KERNELS_CUDA_FINISH_CUH
#define KVD_KERNELS_CUDA_FINISH_CUH

#include "kernels/cuda/attend.cuh"

namespace kvd
{

template <int NT, int DK, int DV, int WARPS, int CODEC> struct block_memory {
    static constexpr int COUNT = WARPS, COMPILED_CODEC = CODEC;
    static constexpr int ROWS = 8 * NT, PITCH = DV + 4; // rows apart by an odd number of 16 bytes
    static constexpr int WARP_PITCH = ROWS * PITCH + 8; // floats between the warps' results
    static constexpr int TILE = tile<DK, DV, CODEC>::MOST_BYTES;
    // Tiles of a warp's ring. Short blocks gain by a third; long ones lose by what it takes.
    static constexpr int SLOTS = WARPS == 4 && NT == 1 && DK + DV <= 256 && !has_levels(CODEC) ? 3 : 2;
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
template <int NT, int DK, int DV, int WARPS, int CODEC> struct unrotation {
    using memory = block_memory<NT, DK, DV, WARPS, CODEC>;
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
template <int NT, int DK, int DV, int WARPS, int CODEC>
__device__ inline void finish_rows(const attend_params &p, const row_block &b, int rows,
                                   const unrotation<NT, DK, DV, WARPS, CODEC> &back, bool rotated,
                                   bool plain)
{
    using memory = block_memory<NT, DK, DV, WARPS, CODEC>;
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
    constexpr int WARPS = M::COUNT, CODEC = M::COMPILED_CODEC;
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
                    y = plain ? y : y * (has_levels(CODEC) ? 1 : TWO24 * slot_factor<CODEC>(ct)) + low;
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
template <int NT, int DK, int DV, int WARPS, int CODEC>
__device__ inline void merge_parts(const attend_params &p, const row_block &b, int rows,
                                   uint32_t of_history, uint8_t *parts, uint64_t part_bytes,
                                   const unrotation<NT, DK, DV, WARPS, CODEC> &back)
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

} // namespace kvd

#endif
