// The end of a block's attention. A *partial* result of some rows is, for each row, a maximum m of
// logits, and relative to it a sum l of probabilities, sums of values and their minima's. A block
// combines its warps' partials in shared memory; the block that finishes a (sequence, kv head, row
// block) last combines those of all parts, from memory, in the same way, un-rotates the history's share
// and writes o.
#ifndef KVD_KERNELS_CUDA_FINISH_CUH
#define KVD_KERNELS_CUDA_FINISH_CUH

#include "kernels/cuda/attend.cuh"

namespace kvd
{

// A partial in memory: sums of values [quad of rows][channel][4], then m, l and low [rows]. m in log2
// units, sums of a history's values in the unit of products, without `low`.
template <int NT, int DV> struct partial {
    static constexpr int ROWS = 8 * NT, QUADS = ROWS / 4;
    static constexpr int QUAD_PITCH = DV * 4 + 16; // floats; halves of a warp write to two quads
    static constexpr int TERMS = QUADS * QUAD_PITCH;
    static constexpr int BYTES = ((TERMS + 3 * ROWS) * 4 + 127) / 128 * 128;
    float *at;

    __device__ inline float4 *vector(int quad, int channel) const
    {
        return (float4 *)(at + quad * QUAD_PITCH + channel * 4);
    }

    __device__ inline float *m() const
    {
        return at + TERMS;
    }

    __device__ inline float *l() const
    {
        return at + TERMS + ROWS;
    }

    __device__ inline float *low() const
    {
        return at + TERMS + 2 * ROWS;
    }
};

template <int NT> inline uint64_t partial_bytes(uint32_t dim_v)
{
    return dim_v == 64 ? partial<NT, 64>::BYTES : dim_v == 128 ? partial<NT, 128>::BYTES : partial<NT, 256>::BYTES;
}

// What is known of a block's rows when partials have been combined.
template <int NT> struct alignas(16) row_terms {
    float m[8 * NT], l[8 * NT], low[8 * NT];
    float inverse[8 * NT]; // 1 / l
    uint32_t top[8 * NT];  // the largest absolute value of the history's results, as bits
    uint32_t parts;        // of the history
};

// Rows of the history's results as A operands, each by a power of two. With one N tile, rows 8 to 15
// are zeros.
template <int NT, int D> struct row_operands {
    uint32_t word[D / 16][32][2 * NT];

    // Channel of row 4 quad; those of the next three rows follow by `NEXT`.
    static constexpr int NEXT = 4 * 2 * NT * 2;
    __device__ inline uint16_t *put(int quad, int channel)
    {
        int lane = quad % 2 * 16 + channel % 8 / 2, pair = channel / 8 % 2;
        return (uint16_t *)&word[channel / 16][lane][pair * NT + quad / 2] + channel % 2;
    }

    __device__ inline void load(uint32_t (&a)[D / 16][4]) const
    {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            if constexpr (NT == 2) {
                *(uint4 *)a[i] = *(const uint4 *)word[i][lane];
            } else {
                uint2 x = *(const uint2 *)word[i][lane];
                a[i][0] = x.x, a[i][1] = 0, a[i][2] = x.y, a[i][3] = 0;
            }
        }
    }
};

// Shared memory. A warp's own bytes are its ring of tiles; after its last tile its partial, behind which
// its share of R^T arrives. When partials have been read: in the first warp's bytes the results of
// windows [rows][PITCH], in the second's those of the history as operands.
template <int NT, int DK, int DV, int WARPS, int CODEC> struct block_memory {
    using result = partial<NT, DV>;
    static constexpr int COUNT = WARPS, COMPILED_CODEC = CODEC;
    static constexpr int ROWS = 8 * NT, PITCH = DV + 4;
    static constexpr int TILE = tile<DK, DV, CODEC>::MOST_BYTES;
    // Tiles of a warp's ring. Short blocks gain by a third; long ones lose by what it takes.
    static constexpr int SLOTS = WARPS == 4 && NT == 1 && DK + DV <= 256 && !has_levels(CODEC) ? 3 : 2;
    static constexpr bool STAGED = KVD_BULK && DV <= 128; // is R^T
    static constexpr int SHARE = DV <= 128 ? packed<DV>::WORDS * 4 / WARPS : 0;
    static constexpr int AFTER = result::BYTES + SHARE, RING = SLOTS * TILE;
    static constexpr int OWN = ((RING > AFTER ? RING : AFTER) + 127) / 128 * 128;
    // With three slots nothing is left for the queries: the last slot holds them at first.
    static constexpr bool QUERIES_IN_RING = SLOTS == 3;
    static constexpr int QUERIES = QUERIES_IN_RING ? WARPS * OWN - OWN + (SLOTS - 1) * TILE : WARPS * OWN;
    static constexpr int TERMS = QUERIES_IN_RING ? WARPS * OWN : QUERIES + (int)sizeof(queries<NT, DK, WARPS>);
    static constexpr int BARRIERS = TERMS + (int)sizeof(row_terms<NT>);
    static constexpr int BYTES = BARRIERS + (WARPS * SLOTS + 1) * 8; // the last one is R^T's
    static_assert(sizeof(queries<NT, DK, WARPS>) <= TILE || !QUERIES_IN_RING, "queries fit a slot");
    static_assert(ROWS * PITCH * 4 <= result::BYTES && sizeof(row_operands<NT, DV>) <= result::BYTES &&
                      (MAX_PARTS + WARPS - 1) / WARPS * ROWS * 4 <= result::BYTES,
                  "what comes after the partials takes their place");

    uint8_t *at;

    __device__ inline uint8_t *own(int warp) const
    {
        return at + warp * OWN;
    }

    __device__ inline result results(int warp) const
    {
        return {(float *)own(warp)};
    }

    __device__ inline queries<NT, DK, WARPS> &rotated() const
    {
        return *(queries<NT, DK, WARPS> *)(at + QUERIES);
    }

    __device__ inline row_terms<NT> &terms() const
    {
        return *(row_terms<NT> *)(at + TERMS);
    }

    __device__ inline float *windows() const // [ROWS][PITCH]
    {
        return (float *)own(0);
    }

    __device__ inline row_operands<NT, DV> &operands() const
    {
        return *(row_operands<NT, DV> *)own(1);
    }

    __device__ inline uint64_t *barriers(int warp) const // [SLOTS]; of warp WARPS: R^T's
    {
        return (uint64_t *)(at + BARRIERS) + warp * SLOTS;
    }

    // By all threads, before the first barrier of the block.
    __device__ inline void init() const
    {
        if (threadIdx.x < ROWS)
            terms().top[threadIdx.x] = 0;
#if KVD_BULK
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < SLOTS; i++)
                barrier_init(&barriers(threadIdx.x / 32)[i], 1);
            if (threadIdx.x == 0)
                barrier_init(barriers(WARPS), WARPS);
            barriers_ready();
        }
#endif
    }
};

// -- un-rotation ---------------------------------------------------------------------------------

// R^T of a kv head, by its high part.
template <typename M, int DV> struct unrotation {
    M m;
    const uint32_t *r;
    const float *scale;

    __device__ inline unrotation(const attend_call &p, const row_block &b, M memory) : m(memory)
    {
        uint64_t index = matrix_index(p.rotation, p.layer, b.kv);
        r = matrix_at<DV>(p.rotation.v.inverse, index);
        scale = &p.rotation.v.scale[index];
    }

    // Each warp asks for its share, once, after its last tile.
    __device__ inline void start() const
    {
#if KVD_BULK
        if constexpr (M::STAGED) {
            int warp = threadIdx.x / 32;
            if (threadIdx.x % 32 == 0)
                fetch(m.own(warp) + M::result::BYTES, r + warp * (M::SHARE / 4), M::SHARE,
                      m.barriers(M::COUNT), cache_policy(false));
        }
#endif
    }

    __device__ inline void wait() const
    {
#if KVD_BULK
        if constexpr (M::STAGED)
            barrier_wait(m.barriers(M::COUNT), 0);
#endif
    }

    __device__ inline uint4 load(int out8, int in32) const
    {
        if constexpr (M::STAGED) {
            constexpr int UNITS = M::SHARE / 512; // of 8 outputs x 32 inputs
            int unit = out8 * (DV / 32) + in32;
            return *((const uint4 *)(m.own(unit / UNITS) + M::result::BYTES) + unit % UNITS * 32 +
                     threadIdx.x % 32);
        }
        return __ldg(packed<DV>::at(r, out8, in32));
    }
};

// -- combining partials --------------------------------------------------------------------------

// Which sums of values a thread takes: four rows of a channel, over every groups-th partial from
// `group` on. A warp's lanes have channels of one quad; those of a group lie side by side.
template <int NT, int DV, int WARPS> struct share {
    static constexpr int THREADS = WARPS * 32, QUADS = 2 * NT;
    static constexpr int MOST = (QUADS * DV + THREADS - 1) / THREADS; // vectors a thread, at most
    int vectors, groups, group, first;

    __device__ inline explicit share(int rows)
    {
        vectors = (rows + 3) / 4 * DV;
        groups = THREADS >= 4 * vectors ? 4 : THREADS >= 2 * vectors ? 2 : 1;
        int lanes = 32 / groups, lane = threadIdx.x % 32;
        group = lane / lanes;
        first = (int)threadIdx.x / 32 * lanes + lane % lanes;
    }

    // Calls f(i, quad, channel) for the thread's vectors.
    template <typename F> __device__ inline void each(F &&f) const
    {
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            int vector = first + i * (THREADS / groups);
            if (vector < vectors)
                f(i, vector / DV, vector % DV);
        }
    }

    __device__ inline void sum_groups(float4 &x) const
    {
#pragma unroll 1
        for (int k = 32 / groups; k < 32; k *= 2) {
            x.x += __shfl_xor_sync(~0u, x.x, k), x.y += __shfl_xor_sync(~0u, x.y, k);
            x.z += __shfl_xor_sync(~0u, x.z, k), x.w += __shfl_xor_sync(~0u, x.w, k);
        }
    }
};

// The larger of floats over a warp; NaN counts as very large or very small.
__device__ inline float warp_max(float x)
{
    auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
    return __int_as_float(ordered(__reduce_max_sync(~0u, ordered(__float_as_int(x)))));
}

// First step: terms of all rows over n partials, of which at(k) gives the k-th, and the partials'
// weights, one for a row, at weights(k), which may be where their maxima were.
template <bool GLOBAL, typename M, typename A, typename W>
__device__ inline void combine_terms(const M &mem, uint32_t n, int rows, A at, W weights)
{
    auto &t = mem.terms();
    uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = (int)threadIdx.x / 32; row < rows; row += M::COUNT) {
        auto read = [&](const float *x) { return GLOBAL ? __ldcg(x + row) : x[row]; };
        auto of = [&](uint32_t k, const float *x, float none) { return k < n ? read(x) : none; };
        float first = of(lane, at(lane).m(), NONE), m = first;
        float first_l = of(lane, at(lane).l(), 0), first_low = of(lane, at(lane).low(), 0);
#pragma unroll 1
        for (uint32_t k = lane + 32; k < n; k += 32)
            m = fmaxf(m, read(at(k).m()));
        m = warp_max(m);
        float f = fast_exp2(first - m), l = f * first_l, low = f * first_low;
        if (lane < n)
            weights(lane)[row] = f;
#pragma unroll 1
        for (uint32_t k = lane + 32; k < n; k += 32) {
            f = fast_exp2(read(at(k).m()) - m);
            l += f * read(at(k).l());
            low += f * read(at(k).low());
            weights(k)[row] = f;
        }
#pragma unroll
        for (int k = 1; k < 32; k *= 2) {
            l += __shfl_xor_sync(~0u, l, k);
            low += __shfl_xor_sync(~0u, low, k);
        }
        if (lane == 0) {
            t.m[row] = m, t.l[row] = l, t.low[row] = low;
            t.inverse[row] = l > 0 ? __fdividef(1, l) : 0;
        }
    }
}

__device__ inline void add(float4 &to, float4 x, float4 w)
{
    to.x = fmaf(x.x, w.x, to.x), to.y = fmaf(x.y, w.y, to.y);
    to.z = fmaf(x.z, w.z, to.z), to.w = fmaf(x.w, w.w, to.w);
}

// The warps' partials, which all have written: terms, and the thread's sums of values.
template <typename M, typename S>
__device__ inline void combine_warps(const M &mem, int rows, const S &mine, float4 (&sums)[S::MOST])
{
    constexpr uint32_t WARPS = M::COUNT;
    auto at = [&](uint32_t w) { return mem.results(min(w, WARPS - 1)); };
    combine_terms<false>(mem, WARPS, rows, at, [&](uint32_t w) { return at(w).m(); });
    __syncthreads();
    mine.each([&](int i, int quad, int channel) {
        sums[i] = {};
#pragma unroll 4
        for (uint32_t w = mine.group; w < WARPS; w += mine.groups)
            add(sums[i], *at(w).vector(quad, channel), *(const float4 *)&at(w).m()[quad * 4]);
        mine.sum_groups(sums[i]);
    });
}

// The partials of all parts of a unit, the history's first.
template <typename M, typename S>
__device__ inline void combine_parts(const M &mem, const uint8_t *parts, uint32_t of_history, uint32_t n,
                                     int rows, const S &mine, float4 (&history)[S::MOST],
                                     float4 (&windows)[S::MOST])
{
    constexpr int AHEAD = 4;
    using result = typename M::result;
    auto at = [&](uint32_t k) { return result{(float *)(parts + min(k, n - 1) * result::BYTES)}; };
    auto weights = [&](uint32_t k) { // where partials of the warps were
        return (float *)mem.own(k % M::COUNT) + k / M::COUNT * M::ROWS;
    };
    float4 x[S::MOST][AHEAD];
    auto load = [&](int i, int quad, int channel, uint32_t first) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            x[i][k] = __ldcg(at(first + k * mine.groups).vector(quad, channel));
    };
    mine.each([&](int i, int quad, int channel) { load(i, quad, channel, mine.group); });
    combine_terms<true>(mem, n, rows, at, weights);
    __syncthreads();
    mine.each([&](int i, int quad, int channel) {
        history[i] = windows[i] = {};
#pragma unroll 1
        for (uint32_t first = mine.group; first < n; first += AHEAD * mine.groups) {
            if (first != mine.group)
                load(i, quad, channel, first);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                uint32_t part = first + k * mine.groups;
                if (part >= n)
                    break;
                float4 w = *(const float4 *)&weights(part)[quad * 4];
                if (part < of_history)
                    add(history[i], x[i][k], w);
                else
                    add(windows[i], x[i][k], w);
            }
        }
        mine.sum_groups(history[i]);
        if (n > of_history)
            mine.sum_groups(windows[i]);
    });
}

// -- the warps of a block ------------------------------------------------------------------------

// Leaves a warp's partial in its own bytes.
template <int NT, int DV, typename M>
__device__ inline void share_results(const M &mem, const logit_terms<NT> &x, const state<NT, DV> &st,
                                     uint32_t rows)
{
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto to = mem.results(threadIdx.x / 32);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float l[2], low[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            l[e] = st.l[n][e], low[e] = st.min_sum[n][e];
#pragma unroll
            for (int k = 4; k < 32; k *= 2) {
                l[e] += __shfl_xor_sync(~0u, l[e], k);
                low[e] += __shfl_xor_sync(~0u, low[e], k);
            }
        }
        uint32_t row = n * 8 + 2 * t;
        if (row >= rows)
            continue;
        float2 *vector = (float2 *)to.vector(row / 4, g) + row % 4 / 2;
#pragma unroll
        for (int i = 0; i < DV / 8; i++)
            vector[i * 16] = make_float2(st.o[n][i / 2][i % 2 * 2], st.o[n][i / 2][i % 2 * 2 + 1]);
        if (g > 0)
            continue;
        auto maximum = [&](int e) { return st.m[n][e] > x.none * 0.99f ? st.m[n][e] * x.unit : NONE; };
        *(float2 *)&to.m()[row] = make_float2(maximum(0), maximum(1));
        *(float2 *)&to.l()[row] = make_float2(l[0], l[1]);
        *(float2 *)&to.low()[row] = make_float2(low[0], low[1]);
    }
}

// Writes a block's partial for the one that will combine the parts.
template <typename M, typename S>
__device__ inline void write_part(const M &mem, uint8_t *part, int rows, const S &mine,
                                  const float4 (&sums)[S::MOST])
{
    typename M::result to = {(float *)part};
    if (mine.group == 0)
        mine.each([&](int i, int quad, int channel) { __stcg(to.vector(quad, channel), sums[i]); });
    const auto &t = mem.terms();
    if ((int)threadIdx.x < rows) {
        __stcg(to.m() + threadIdx.x, t.m[threadIdx.x]);
        __stcg(to.l() + threadIdx.x, t.l[threadIdx.x]);
        __stcg(to.low() + threadIdx.x, t.low[threadIdx.x]);
    }
}

// Counts the blocks of a unit. True in the last one: what the others wrote is seen then.
__device__ inline bool arrive_last(uint32_t *counter, uint32_t n)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t before;
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        last = before == n - 1;
        if (last)
            *counter = 0;
    }
    __syncthreads();
    return last;
}

// -- writing o -----------------------------------------------------------------------------------

// Shares the results of the history as operands, and those of windows as they are.
template <int NT, int DV, typename M, typename S>
__device__ inline void share_finished(const M &mem, const S &mine, bool rotated, bool plain,
                                      float4 (&history)[S::MOST], const float4 (&windows)[S::MOST])
{
    auto &t = mem.terms();
    if (rotated)
        mine.each([&](int i, int quad, int channel) {
            float unit = has_levels(M::COMPILED_CODEC)
                             ? 1 : TWO24 * slot_factor<M::COMPILED_CODEC>(channel / 16);
            float4 low = *(const float4 *)&t.low[quad * 4], f = *(const float4 *)&t.inverse[quad * 4];
            float4 x = history[i];
            x.x = fmaf(x.x, unit, low.x) * f.x, x.y = fmaf(x.y, unit, low.y) * f.y;
            x.z = fmaf(x.z, unit, low.z) * f.z, x.w = fmaf(x.w, unit, low.w) * f.w;
            history[i] = x;
            auto top = [&](float y, int row) {
                uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(fabsf(y)));
                if (threadIdx.x % 32 == 0)
                    atomicMax(&t.top[quad * 4 + row], bits);
            };
            top(x.x, 0), top(x.y, 1), top(x.z, 2), top(x.w, 3);
        });
    __syncthreads();
    if (mine.group > 0)
        return;
    mine.each([&](int i, int quad, int channel) {
        if (rotated) {
            uint16_t *to = mem.operands().put(quad, channel);
            auto put = [&](float y, int row) {
                float f = inverse_power(magnitude(__uint_as_float(t.top[quad * 4 + row])));
                to[row * mem.operands().NEXT] = __half_as_ushort(__float2half_rn(y * f));
            };
            put(history[i].x, 0), put(history[i].y, 1), put(history[i].z, 2), put(history[i].w, 3);
        }
        if (plain) { // these channels come in the order of bf16 operands
            int in = channel % 8;
            int c = channel / 32 * 32 + in / 2 * 8 + channel / 16 % 2 * 4 + channel / 8 % 2 * 2 + in % 2;
            float4 x = windows[i], f = *(const float4 *)&t.inverse[quad * 4];
            float *to = mem.windows() + quad * 4 * M::PITCH + c;
            to[0] = x.x * f.x, to[M::PITCH] = x.y * f.y;
            to[2 * M::PITCH] = x.z * f.z, to[3 * M::PITCH] = x.w * f.w;
        }
    });
}

// Writes o and lse of a block's rows: un-rotates the history's share where there is one.
template <int NT, int DV, typename M, typename S>
__device__ inline void finish_rows(const attend_call &p, const row_block &b, const M &mem, int rows,
                                   const S &mine, bool rotated, bool plain,
                                   float4 (&history)[S::MOST], const float4 (&windows)[S::MOST])
{
    constexpr int WARPS = M::COUNT;
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    unrotation<M, DV> back(p, b, mem);
    const auto &terms = mem.terms();
    float scale = rotated ? __fdividef(1, __ldg(back.scale)) : 0;
    if (p.lse && (int)threadIdx.x < rows)
        p.lse[row_index(p, b, b.row0 + threadIdx.x)] =
            (terms.m[threadIdx.x] + log2f(terms.l[threadIdx.x])) / LOG2E;
    share_finished<NT, DV>(mem, mine, rotated, plain, history, windows);
    __syncthreads();
    uint32_t a[DV / 16][4];
    if (rotated) {
        mem.operands().load(a);
        back.wait();
    }
    float factor[NT];
    uint64_t at[NT];
#pragma unroll
    for (int half = 0; half < NT; half++) {
        int row = half * 8 + g;
        factor[half] = magnitude(__uint_as_float(terms.top[row])) * scale;
        at[half] = row_index(p, b, b.row0 + row) * DV + 8 * t;
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
            int row = half * 8 + g, channel = inverse_channel(j);
            if (row >= rows)
                continue;
            float2 x = make_float2(c[2 * half] * factor[half], c[2 * half + 1] * factor[half]);
            if (plain) {
                float2 w = *(const float2 *)&mem.windows()[row * M::PITCH + 8 * t + channel];
                x.x += w.x, x.y += w.y;
            }
            if (p.o_type == KVD_DTYPE_F32)
                *(float2 *)((float *)p.o + at[half] + channel) = x;
            else
                *(uint32_t *)((uint16_t *)p.o + at[half] + channel) = pack_bf16(x.x, x.y);
        }
    }
}

} // namespace kvd

#endif
