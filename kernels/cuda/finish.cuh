// The end of a block's attention. A *partial* result of some rows is, for each row, a maximum m of
// logits, and relative to it a sum l of probabilities, sums of values, and `zero_sum`, that of their minima (zero points). A block
// combines its warps' partials from shared memory; the block that finishes a (sequence, kv head, row
// block) last combines those of all parts from memory, in the same way, un-rotates the history's share
// and writes o.
#ifndef KVD_KERNELS_CUDA_FINISH_CUH
#define KVD_KERNELS_CUDA_FINISH_CUH

#include "kernels/cuda/attend.cuh"

namespace kvd
{

// A partial's sums of values in memory: [quad of rows][channel][4], a history's in the unit of products. Channels are
// padded(DV), of which a history leaves the last ones as they are, windows zero.
template <int NT, int DV> struct value_sums {
    static constexpr int ROWS = 8 * NT, QUADS = ROWS / 4;
    static constexpr int QUAD_PITCH = padded(DV) * 4 + 16; // floats; halves of a warp write to two quads
    float *at;

    __device__ inline float4 *vector(int quad, int channel) const
    {
        return (float4 *)(at + quad * QUAD_PITCH + channel * 4);
    }
};

enum term { TERM_M, TERM_L, TERM_ZERO_SUM, N_TERMS };

// The partials of a unit's parts in memory: each one's sums of values, then [term][row][part], m in log2 units.
template <int NT, int DV> struct part_layout {
    using sums = value_sums<NT, DV>;
    static constexpr int ROWS = sums::ROWS, SUMS_BYTES = sums::QUADS * sums::QUAD_PITCH * 4;
    uint32_t most; // parts that there is memory for
    uint8_t *at;

    __host__ __device__ static inline uint64_t bytes(uint32_t most)
    {
        return (uint64_t)most * SUMS_BYTES + (uint64_t)pitch(most) * (N_TERMS * ROWS * 4);
    }

    __host__ __device__ static inline uint32_t pitch(uint32_t most) // whole vectors
    {
        return (most + 3) / 4 * 4;
    }

    __device__ inline sums values(uint32_t part) const
    {
        return {(float *)(at + part * SUMS_BYTES)};
    }

    __device__ inline float *terms(uint32_t term, uint32_t row) const // [most]
    {
        return (float *)(at + (uint64_t)most * SUMS_BYTES) + (term * ROWS + row) * pitch(most);
    }
};

// Memory of a unit with so many parts.
template <int NT> inline uint64_t unit_bytes(uint32_t dim_v, uint32_t most)
{
    switch (dim_v) {
#define KVD_HEAD_DIM(dim) \
    case dim:             \
        return part_layout<NT, dim>::bytes(most);
#include "proto/head_dims.def"
    default:
        return 0;
    }
}

// Shared memory. A warp's own bytes are its ring of tiles; after its last tile its sums of values, a
// table of weights and its share of R^T. When sums have been read: in the first warp's bytes the results
// of windows, in the second's those of the history, [rows][PITCH].
template <int NT, int DK, int DV, int WARPS, int CODEC> struct block_memory {
    using sums = value_sums<NT, DV>;
    static constexpr int COUNT = WARPS, COMPILED_CODEC = CODEC;
    static constexpr int ROWS = 8 * NT, PITCH = padded(DV) + 8; // operands are read without bank conflicts
    static constexpr int TILE = tile<DK, DV, CODEC>::MOST_BYTES;
    // Tiles of a warp's ring. Short blocks gain by a third; long ones lose by what it takes.
    static constexpr int SLOTS =
        WARPS == 4 && NT == 1 && (DK + DV <= 256 || DK == 192) && !has_levels(CODEC) && !has_int4(CODEC) && CODEC != TC2_5 ? 3 : 2;
    static constexpr bool STAGED = KVD_BULK && DV <= 128; // is R^T
    // Units of R^T, of 8 outputs x 32 inputs, and a warp's share of them. The last warps may have less, or none.
    static constexpr int UNITS = DV <= 128 ? packed<DV>::WORDS / 128 : 0, WARP_UNITS = (UNITS + WARPS - 1) / WARPS;
    static constexpr int SHARE = WARP_UNITS * 512;
    static constexpr int WEIGHTS = ROWS * PITCH * 4, STAGE = WEIGHTS + 512;
    static constexpr int RING = SLOTS * TILE, AFTER = STAGE + SHARE;
    static constexpr int OWN = ((RING > AFTER ? RING : AFTER) + 127) / 128 * 128;
    // With three slots nothing is left for the queries: the last slot holds them at first.
    static constexpr bool QUERIES_IN_RING = SLOTS == 3;
    static constexpr int QUERIES = QUERIES_IN_RING ? WARPS * OWN - OWN + (SLOTS - 1) * TILE : WARPS * OWN;
    static constexpr int TERMS = QUERIES_IN_RING ? WARPS * OWN : QUERIES + (int)sizeof(queries<NT, DK, WARPS>);
    static constexpr int PARTS = TERMS + N_TERMS * ROWS * WARPS * 4, BARRIERS = PARTS + 8;
    static constexpr int MEANS = (BARRIERS + (WARPS * SLOTS + 1) * 8 + 15) / 16 * 16; // the last one is R^T's
    static constexpr int BYTES = is_tc(CODEC) ? MEANS + shared_means<DK, DV, WARPS>::BYTES
                                              : BARRIERS + (WARPS * SLOTS + 1) * 8;
    static_assert(sizeof(queries<NT, DK, WARPS>) <= TILE || !QUERIES_IN_RING, "queries fit a slot");
    static_assert(sums::QUADS * sums::QUAD_PITCH * 4 <= WEIGHTS, "results take the place of sums");

    uint8_t *at;

    __device__ inline uint8_t *own(int warp) const
    {
        return at + warp * OWN;
    }

    __device__ inline sums values(int warp) const
    {
        return {(float *)own(warp)};
    }

    __device__ inline float *weights() const // of this warp
    {
        return (float *)(own(threadIdx.x / 32) + WEIGHTS);
    }

    __device__ inline float *terms(uint32_t term, uint32_t row) const // [WARPS]
    {
        return (float *)(at + TERMS) + (term * ROWS + row) * WARPS;
    }

    __device__ inline queries<NT, DK, WARPS> &rotated() const
    {
        return *(queries<NT, DK, WARPS> *)(at + QUERIES);
    }

    __device__ inline shared_means<DK, DV, WARPS> means() const // of tc2 and tc2.5
    {
        return {at + MEANS};
    }

    __device__ inline float *windows() const
    {
        return (float *)own(0);
    }

    __device__ inline float *history() const
    {
        return (float *)own(1);
    }

    __device__ inline uint32_t &parts() const // of the history
    {
        return *(uint32_t *)(at + PARTS);
    }

    __device__ inline uint64_t *barriers(int warp) const // [SLOTS]; of warp WARPS: R^T's
    {
        return (uint64_t *)(at + BARRIERS) + warp * SLOTS;
    }

    // By all threads, before the first barrier of the block.
    __device__ inline void init() const
    {
#if KVD_BULK
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < SLOTS; i++)
                barrier_init(&barriers(threadIdx.x / 32)[i], 1);
            if (threadIdx.x == 0)
                barrier_init(barriers(WARPS), WARPS);
            barriers_ready();
        }
        __syncwarp(); // any lane may ask for a tile
#endif
    }
};

// -- un-rotation ---------------------------------------------------------------------------------

// R^T of a kv head. With bf16 pages there may be none.
template <typename M, int DV> struct unrotation {
    M m;
    const uint32_t *r;
    float scale; // what products must be divided by

    __device__ inline unrotation(const attend_call &p, const row_block &b, M memory) : m(memory)
    {
        uint64_t index = matrix_index(p.rotation, p.layer, b.kv);
        r = matrix_at<DV>(p.rotation.v.inverse, index, 1);
        if constexpr (is_tc(M::COMPILED_CODEC))
            scale = __ldg(&p.rotation.transforms[index].inverse_scale);
        else
            scale = p.codec != KVD_CODEC_BF16 ? __ldg(&p.rotation.v.scale[index]) : 1;
    }

    // Each warp asks for its share, once, after its last tile.
    __device__ inline void start() const
    {
#if KVD_BULK
        if constexpr (M::STAGED) {
            int warp = threadIdx.x / 32, bytes = M::SHARE;
            if (M::UNITS % M::COUNT)
                bytes = max(0, min(M::WARP_UNITS, M::UNITS - warp * M::WARP_UNITS)) * 512;
            if (threadIdx.x % 32 == 0 && bytes > 0)
                fetch(m.own(warp) + M::STAGE, r + warp * (M::SHARE / 4), bytes, m.barriers(M::COUNT),
                      cache_policy(false));
            else if (threadIdx.x % 32 == 0)
                arrive(m.barriers(M::COUNT));
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
            int unit = out8 * (padded(DV) / 32) + in32;
            return *((const uint4 *)(m.own(unit / M::WARP_UNITS) + M::STAGE) + unit % M::WARP_UNITS * 32 +
                     threadIdx.x % 32);
        }
        return __ldg(packed<DV>::at(r, out8, in32));
    }
};

// -- combining partials --------------------------------------------------------------------------

// Which sums of values a thread takes: four rows of a channel. The first warps take them all, where there are more
// threads than that: what others would do costs more instructions than it saves time.
template <int NT, int DV, int WARPS> struct share {
    static constexpr int THREADS = WARPS * 32, QUADS = 2 * NT, P = padded(DV);
    static constexpr int MOST = (QUADS * P + THREADS - 1) / THREADS; // vectors a thread, at most
    uint32_t vectors, first; // the warp's first

    __device__ inline explicit share(uint32_t rows)
        : vectors((rows + 3) / 4 * P), first(uniform(threadIdx.x / 32) * 32)
    {
    }

    __device__ inline bool any() const
    {
        return first < vectors;
    }

    // Calls f(i, quad, channel) for the thread's vectors.
    template <typename F> __device__ inline void each(F &&f) const
    {
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            uint32_t vector = first + i * THREADS;
            if (vector < vectors)
                f(i, (int)(vector / P), (int)(vector % P + threadIdx.x % 32));
        }
    }
};

// The warps' partials, in shared memory.
template <typename M> struct warp_partials {
    static constexpr bool MIXED = false;
    static constexpr uint32_t n = M::COUNT, of_history = n; // all are of one kind
    M mem;

    // A term of partials k to k + 3, `none` of those that there are not.
    __device__ inline float4 terms(uint32_t term, uint32_t row, uint32_t k, float none) const
    {
        return k < n ? *(const float4 *)(mem.terms(term, row) + k) : make_float4(none, none, none, none);
    }

    __device__ inline float4 values(uint32_t k, int quad, int channel) const
    {
        return *mem.values((int)k).vector(quad, channel);
    }
};

// Those of the parts of a unit, in memory, the history's first.
template <typename L> struct part_partials {
    static constexpr bool MIXED = true;
    L parts;
    uint32_t n, of_history;

    __device__ inline float4 terms(uint32_t term, uint32_t row, uint32_t k, float none) const
    {
        return k < n ? __ldcg((const float4 *)(parts.terms(term, row) + k)) : make_float4(none, none, none, none);
    }

    __device__ inline float4 values(uint32_t k, int quad, int channel) const
    {
        return __ldcg(parts.values(k).vector(quad, channel));
    }
};

// Terms of a row, of all partials. A lane has those of row lane % ROWS.
struct row_terms {
    float m, l, zero_sum;
    float coded; // what of l is the history's
};

__device__ inline void add(float4 &to, const float4 &x, float a, float b, float c, float d)
{
    to.x = fmaf(x.x, a, to.x), to.y = fmaf(x.y, b, to.y), to.z = fmaf(x.z, c, to.z), to.w = fmaf(x.w, d, to.w);
}

__device__ inline float largest(const float4 &x)
{
    return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
}

__device__ inline float dot(const float4 &x, const float4 &y)
{
    return x.x * y.x + x.y * y.y + (x.z * y.z + x.w * y.w);
}

// Sums over partials: the terms of the lane's row, and the thread's values, those of windows apart. A
// lane weighs four partials for its row at a time; a table in shared memory brings the weights to the
// lanes that want them. By warps that have a share.
template <int NT, typename M, typename P, typename S>
__device__ inline row_terms combine(const M &mem, const P &from, uint32_t rows, const S &mine,
                                    float4 (&history)[S::MOST], float4 (&windows)[S::MOST])
{
    constexpr int ROWS = 8 * NT, FOURS = 32 / ROWS, BATCH = 4 * FOURS; // partials at a time
    constexpr int AHEAD = S::MOST == 1 ? FOURS : 1; // fours on their way at a time
    uint32_t lane = threadIdx.x % 32, row = min(lane % ROWS, rows - 1), four = lane / ROWS;
    float *table = mem.weights(); // [four][row][4]
    float4 values[S::MOST][4 * AHEAD];
    auto load = [&](uint32_t from_k) {
        mine.each([&](int i, int quad, int channel) {
#pragma unroll
            for (int k = 0; k < 4 * AHEAD; k++)
                if (from_k + k < from.n)
                    values[i][k] = from.values(from_k + k, quad, channel);
        });
    };
    load(0);
    float4 m = from.terms(TERM_M, row, 4 * four, NONE), l = from.terms(TERM_L, row, 4 * four, 0);
    float4 zero_sum = from.terms(TERM_ZERO_SUM, row, 4 * four, 0);
    row_terms t = {largest(m), 0, 0, 0};
#pragma unroll
    for (int i = 0; i < S::MOST; i++)
        history[i] = windows[i] = {};
#pragma unroll 1
    for (uint32_t base = BATCH; base < from.n; base += BATCH)
        t.m = fmaxf(t.m, largest(from.terms(TERM_M, row, base + 4 * four, NONE)));
#pragma unroll
    for (int k = ROWS; k < 32; k *= 2)
        t.m = fmaxf(t.m, __shfl_xor_sync(~0u, t.m, k));
#pragma unroll 1
    for (uint32_t base = 0; base < from.n; base += BATCH) {
        if (base > 0) {
            m = from.terms(TERM_M, row, base + 4 * four, NONE), l = from.terms(TERM_L, row, base + 4 * four, 0);
            zero_sum = from.terms(TERM_ZERO_SUM, row, base + 4 * four, 0);
            __syncwarp();
        }
        float4 f = make_float4(fast_exp2(m.x - t.m), fast_exp2(m.y - t.m), fast_exp2(m.z - t.m),
                               fast_exp2(m.w - t.m));
        *(float4 *)&table[(four * ROWS + lane % ROWS) * 4] = f;
        t.l += dot(f, l);
        if constexpr (P::MIXED && is_tc(M::COMPILED_CODEC)) {
            uint32_t k = base + 4 * four;
            t.coded += (k < from.of_history ? f.x * l.x : 0) + (k + 1 < from.of_history ? f.y * l.y : 0) +
                       (k + 2 < from.of_history ? f.z * l.z : 0) + (k + 3 < from.of_history ? f.w * l.w : 0);
        }
        t.zero_sum += dot(f, zero_sum);
        __syncwarp();
#pragma unroll 1
        for (int q = 0; q < FOURS && base + 4 * q < from.n; q += AHEAD) {
            if (base + q > 0)
                load(base + 4 * q);
            mine.each([&](int i, int quad, int) {
#pragma unroll
                for (int j = 0; j < AHEAD; j++) {
                    uint32_t k = base + 4 * (q + j);
                    if (k >= from.n)
                        break;
                    const float4 *w = (const float4 *)&table[((q + j) * ROWS + quad * 4) * 4];
                    float4 a = w[0], b = w[1], c = w[2], d = w[3];
                    auto to = [&](int e, float w0, float w1, float w2, float w3) {
                        if (k + e >= from.n)
                            return;
                        if (!P::MIXED || k + e < from.of_history)
                            add(history[i], values[i][4 * j + e], w0, w1, w2, w3);
                        else
                            add(windows[i], values[i][4 * j + e], w0, w1, w2, w3);
                    };
                    to(0, a.x, b.x, c.x, d.x), to(1, a.y, b.y, c.y, d.y);
                    to(2, a.z, b.z, c.z, d.z), to(3, a.w, b.w, c.w, d.w);
                }
            });
        }
    }
#pragma unroll
    for (int k = ROWS; k < 32; k *= 2) {
        t.l += __shfl_xor_sync(~0u, t.l, k);
        t.zero_sum += __shfl_xor_sync(~0u, t.zero_sum, k);
        if constexpr (P::MIXED && is_tc(M::COMPILED_CODEC))
            t.coded += __shfl_xor_sync(~0u, t.coded, k);
    }
    return t;
}

// -- the warps of a block ------------------------------------------------------------------------

// Leaves a warp's partial in shared memory.
template <int NT, int CHANNELS, typename M>
__device__ inline void share_results(const M &mem, const logit_terms<NT> &x, const state<NT, CHANNELS> &st,
                                     uint32_t rows)
{
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto to = mem.values(warp);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float l[2], zero_sum[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            l[e] = st.l[n][e], zero_sum[e] = st.zero_sum[n][e];
            if constexpr (is_tc(M::COMPILED_CODEC)) // levels are about 0
                zero_sum[e] *= -1.5f;
#pragma unroll
            for (int k = 4; k < 32; k *= 2) {
                l[e] += __shfl_xor_sync(~0u, l[e], k);
                zero_sum[e] += __shfl_xor_sync(~0u, zero_sum[e], k);
            }
        }
        uint32_t row = n * 8 + 2 * t;
        if (row >= rows)
            continue;
        float2 *vector = (float2 *)to.vector(row / 4, g) + row % 4 / 2;
#pragma unroll
        for (int i = 0; i < CHANNELS / 8; i++)
            vector[i * 16] = make_float2(st.o[n][i / 2][i % 2 * 2], st.o[n][i / 2][i % 2 * 2 + 1]);
        if (g > 0)
            continue;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            mem.terms(TERM_M, row + e)[warp] = st.m[n][e] > x.none * 0.99f ? st.m[n][e] * x.score_unit : NONE;
            mem.terms(TERM_L, row + e)[warp] = l[e];
            mem.terms(TERM_ZERO_SUM, row + e)[warp] = zero_sum[e];
        }
    }
}

// Writes a block's partial, of part `part` of n, for the block that will combine them. Terms are read as whole
// vectors: the last part fills up its vector.
template <typename L, typename S>
__device__ inline void write_part(const L &parts, uint32_t part, uint32_t n, uint32_t rows, const S &mine,
                                  const row_terms &t, const float4 (&values)[S::MOST])
{
    mine.each([&](int i, int quad, int channel) {
        __stcg(parts.values(part).vector(quad, channel), values[i]);
    });
    if (threadIdx.x >= rows)
        return;
    uint32_t end = part + 1 == n ? L::pitch(n) : part + 1;
    for (uint32_t k = part; k < end; k++) {
        __stcg(parts.terms(TERM_M, threadIdx.x) + k, k == part ? t.m : NONE);
        __stcg(parts.terms(TERM_L, threadIdx.x) + k, k == part ? t.l : 0);
        __stcg(parts.terms(TERM_ZERO_SUM, threadIdx.x) + k, k == part ? t.zero_sum : 0);
    }
}

// Counts the blocks of a unit. True in the last one: what the others wrote is seen then.
__device__ inline bool arrive_last(uint32_t *counter, uint32_t n)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        last = count_acq_rel(counter) == n - 1;
        if (last)
            *counter = 0;
    }
    __syncthreads();
    return uniform(last);
}

// -- writing o -----------------------------------------------------------------------------------

// Un-rotates 8 channels of a block's rows, in tf32: rows are 32-bit floats in shared memory, rounded
// when they were put there. With one N tile, rows 8 to 15 of the product are zeros.
template <int NT, int DV, typename M>
__device__ inline void unrotate(const M &mem, const unrotation<M, DV> &back, int out8, float (&c)[4])
{
    const float *row = mem.history() + threadIdx.x % 32 / 4 * M::PITCH + threadIdx.x % 4 * 2;
    float sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < padded(DV) / 32; i++) {
        uint4 r = back.load(out8, i);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (i * 32 + k * 8 >= DV) // what lies there is no one's
                break;
            float2 b = unpack_fp16(word_of(r, k)), a = *(const float2 *)(row + i * 32 + k * 8), a8 = {};
            if (NT == 2)
                a8 = *(const float2 *)(row + 8 * M::PITCH + i * 32 + k * 8);
            mma_tf32(sums[k % 2], a, a8, b);
        }
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        c[e] = sums[0][e] + sums[1][e];
}

// Adds its head's sink to a row's maximum and sum. Returns what the sums of values are worth then.
__device__ inline float add_sink(const attend_call &p, const row_block &b, uint32_t row, float &m, float &l)
{
    float sink = p.sinks[b.kv * p.group + row - query_of(p, row) * p.group] * LOG2E;
    float top = fmaxf(m, sink), kept = fast_exp2(m - top);
    if (sink == -INFINITY) // none
        return 1;
    l = l * kept + fast_exp2(sink - top);
    m = top;
    return kept;
}

// Writes o and lse of a block's rows: un-rotates the history's share where there is one.
template <int NT, int DV, typename M, typename S>
__device__ inline void finish_rows(const attend_call &p, const row_block &b, const unrotation<M, DV> &back,
                                   uint32_t rows, const S &mine, const row_terms &t, bool rotated, bool bf16,
                                   const float4 (&history)[S::MOST], const float4 (&windows)[S::MOST])
{
    constexpr int WARPS = M::COUNT, TILES = padded(DV) / 8;
    const M &mem = back.m;
    int warp = threadIdx.x / 32;
    float m = t.m, l = t.l, kept = 1; // of the sums
    if (p.sinks)
        kept = add_sink(p, b, b.row0 + min(threadIdx.x % 32 % (8 * NT), rows - 1), m, l);
    float inverse = l == 0 ? 0 : __fdividef(kept, l), scaled = __fdividef(inverse, back.scale);
    if (p.lse && threadIdx.x < rows)
        p.lse[row_index(p, b, b.row0 + threadIdx.x)] = (m + log2f(l)) / LOG2E;
    __syncthreads(); // sums of values have been read
    mine.each([&](int i, int quad, int channel) {
        float unit = raised(M::COMPILED_CODEC)       ? RAISED_UNIT
                     : has_levels(M::COMPILED_CODEC) ? 1
                                                     : TWO24 * slot_factor<M::COMPILED_CODEC>(channel / 16);
        auto put = [&](int k, float x, float y) {
            int row = quad * 4 + k;
            float zero_sum = __shfl_sync(~0u, t.zero_sum, row), f = __shfl_sync(~0u, scaled, row);
            float g = __shfl_sync(~0u, inverse, row);
            if constexpr (is_tc(M::COMPILED_CODEC)) { // behind the row, for V's mean
                float coded = __shfl_sync(~0u, t.coded * inverse, row);
                if (rotated && channel == 0)
                    mem.history()[row * M::PITCH + padded(DV)] = coded;
            }
            if (rotated)
                mem.history()[row * M::PITCH + channel] = round_tf32(fmaf(x, unit, zero_sum) * f);
            if (bf16)
                mem.windows()[row * M::PITCH + window_channel(channel)] = y * g;
        };
        put(0, history[i].x, windows[i].x), put(1, history[i].y, windows[i].y);
        put(2, history[i].z, windows[i].z), put(3, history[i].w, windows[i].w);
    });
    __syncthreads();
    if (rotated)
        back.wait();
#pragma unroll
    for (int i = 0; i < (TILES + WARPS - 1) / WARPS; i++) {
        int j = warp + i * WARPS;
        if (j >= TILES)
            break;
        float c[4] = {};
        if (rotated)
            unrotate<NT>(mem, back, j, c);
#pragma unroll
        for (int half = 0; half < NT; half++) {
            uint32_t row = half * 8 + threadIdx.x % 32 / 4, channel = threadIdx.x % 4 * 8 + inverse_channel(j);
            if (row >= rows || (DV % 32 && channel >= DV))
                continue;
            float2 x = make_float2(c[2 * half], c[2 * half + 1]);
            if (bf16) {
                float2 w = *(const float2 *)&mem.windows()[row * M::PITCH + channel];
                x.x += w.x, x.y += w.y;
            }
            if (is_tc(M::COMPILED_CODEC) && rotated) {
                float coded = mem.history()[row * M::PITCH + padded(DV)];
                float2 mean = *(const float2 *)&mem.means().v()[channel];
                x.x = fmaf(coded, mean.x, x.x), x.y = fmaf(coded, mean.y, x.y);
            }
            uint64_t at = row_index(p, b, b.row0 + row) * DV + channel;
            if (p.o_type == KVD_DTYPE_F32)
                *(float2 *)((float *)p.o + at) = x;
            else
                *(uint32_t *)((uint16_t *)p.o + at) = pack_bf16(x.x, x.y);
        }
    }
}

} // namespace kvd

#endif
