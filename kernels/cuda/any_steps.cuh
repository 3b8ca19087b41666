// Attention in any codecs up to a part's sums: queries, what is staged, the steps of a block. attend_any.cu says how all of it
// goes together.
#ifndef KVD_KERNELS_CUDA_ANY_STEPS_CUH
#define KVD_KERNELS_CUDA_ANY_STEPS_CUH

#include "kernels/cuda/any.cuh"
#include "kernels/cuda/decode.cuh"

namespace kvd
{

constexpr uint32_t ANY_WARPS = 8, ANY_THREADS = 32 * ANY_WARPS, STEP_CHUNKS = 8, TILE_CHUNKS = PAGE / 16;
constexpr uint32_t SHARE = KVD_MAX_HEAD_DIM / 16 / ANY_WARPS; // channel tiles of a warp, at most

struct any_call : attend_call {
    any_side history[2], windows[2]; // K and V
    tile_layout tile;
    uint32_t staged;                     // bytes of a tile in shared memory
    uint32_t step_tiles, stages;         // tiles of a step; steps in memory at once
    uint32_t window_chunks;              // of a step of windows
    uint32_t operands_at, area_at;       // in shared memory
};

// Shared memory; behind it the queries' operands, and an area for what is staged, before that for rows of queries, afterwards
// for weights and sums.
template <int NT> struct any_memory {
    static constexpr int N_ROWS = 8 * NT;
    uint2 p[2][STEP_CHUNKS][NT][32]; // probabilities of a step as B operands, those of bf16 values in two parts
    float top[ANY_WARPS][N_ROWS], l[ANY_WARPS][N_ROWS], centre[ANY_WARPS][N_ROWS];
    float unit[N_ROWS], sum[N_ROWS], mean[N_ROWS]; // of scores in log2 units; of the query's channels; scores of K's mean
    float best[N_ROWS], total[N_ROWS], coded[N_ROWS]; // of all warps, then of all parts: maximum, sum, the history's share of it
    side_places places[2];
};

// Rows of a block in global or shared memory: [row][channel].
struct row_floats {
    float *at;
    uint32_t dim;

    __device__ inline float *row(uint32_t r) const
    {
        return at + r * dim;
    }
};

// The partial results of a unit's parts: sums of values, then (maximum, sum) of a row.
struct any_parts {
    uint32_t most, rows, dim;
    uint8_t *at;

    __host__ __device__ inline uint64_t bytes() const
    {
        return (uint64_t)most * rows * (dim * 4 + 8);
    }

    __device__ inline row_floats values(uint32_t part) const
    {
        return {(float *)at + (uint64_t)part * rows * dim, dim};
    }

    __device__ inline float2 *terms(uint32_t part) const
    {
        return (float2 *)((float *)at + (uint64_t)most * rows * dim) + part * rows;
    }
};

// -- queries -------------------------------------------------------------------------------------

__device__ inline float warp_sum(float x)
{
#pragma unroll
    for (int k = 1; k < 32; k *= 2)
        x += __shfl_xor_sync(~0u, x, k);
    return x;
}

// Calls f(n, c) for the thread's share of all (eight rows, channel).
template <int NT, typename F> __device__ inline void each_channel(uint32_t dim, F &&f)
{
    for (uint32_t i = threadIdx.x; i < NT * dim; i += ANY_THREADS)
        f(i / dim, i % dim);
}

template <int NT> __device__ inline void load_any_queries(const any_call &p, const row_block &b, row_floats raw)
{
    bool f32 = p.q_type == KVD_DTYPE_F32;
    for (uint32_t r = threadIdx.x / 32; r < 8 * NT; r += ANY_WARPS) {
        // Rows beyond the end are another's: what comes of them is not written.
        uint64_t from = row_index(p, b, min(b.row0 + r, p.rows - 1)) * p.dim_k;
        for (uint32_t c = threadIdx.x % 32; c < p.dim_k; c += 32)
            raw.row(r)[c] = load_value((const uint8_t *)p.q + (from + c) * (f32 ? 4 : 2), f32);
    }
}

// As coded keys meet them: q A^-T, in tc2 and tc2.5 times what a level of a channel is worth.
template <int NT>
__device__ inline void rotate_any_queries(const any_call &p, const row_block &b, row_floats raw, row_floats turned)
{
    uint64_t index = matrix_index(p.rotation, p.layer, b.kv);
    const float *inverse = p.rotation.k.inverse_f32;
    bool streams = p.history[0].kind == STREAMS;
    each_channel<NT>(p.dim_k, [&](uint32_t n, uint32_t c) {
        float x[8];
        const float *column = inverse + index * p.dim_k * p.dim_k + c * p.dim_k;
#pragma unroll
        for (int r = 0; r < 8; r++)
            x[r] = inverse ? 0 : raw.row(8 * n + r)[c];
        for (uint32_t i = 0; inverse && i < p.dim_k; i += 4) {
            float4 a = __ldg((const float4 *)(column + i));
#pragma unroll
            for (int r = 0; r < 8; r++)
                x[r] += dot(a, *(const float4 *)(raw.row(8 * n + r) + i));
        }
        float worth = 1;
        if (streams) {
            const kvd_cuda_transform &t = p.rotation.transforms[index];
            worth = t.k_sigma[c] * key_tiles(t, p.codec)[c / 16].step;
        }
#pragma unroll
        for (int r = 0; r < 8; r++)
            turned.row(8 * n + r)[c] = x[r] * worth;
    });
}

// A row's terms, and itself by a power of two that leaves 1 at most, where it meets codes.
template <int NT>
__device__ inline void measure_queries(const any_call &p, const row_block &b, bool coded, row_floats raw, row_floats turned,
                                       any_memory<NT> &m)
{
    const float *k_mean = nullptr;
    if (coded && p.history[0].kind == STREAMS)
        k_mean = transform_of(p.rotation, p.layer, b.kv).k_mean;
    for (uint32_t r = threadIdx.x / 32; r < 8 * NT; r += ANY_WARPS) {
        float *row = turned.row(r), sum = 0, mean = 0;
        uint32_t top = 0;
        for (uint32_t c = threadIdx.x % 32; c < p.dim_k; c += 32) {
            top = max(top, __float_as_uint(fabsf(row[c])));
            if (k_mean)
                mean = fmaf(raw.row(r)[c], k_mean[c], mean);
        }
        float divisor = coded ? magnitude(__uint_as_float(__reduce_max_sync(~0u, top))) : 1;
        for (uint32_t c = threadIdx.x % 32; c < p.dim_k; c += 32) {
            row[c] *= inverse_power(divisor);
            sum += row[c];
        }
        sum = warp_sum(sum), mean = warp_sum(mean);
        if (threadIdx.x % 32)
            continue;
        m.unit[r] = p.scale * LOG2E * divisor;
        m.sum[r] = sum;
        m.mean[r] = p.scale * LOG2E * mean;
    }
}

// Two words of a pair of values: rounded, and what that leaves.
__device__ inline uint2 in_two_parts(float x, float y, bool fp16)
{
    uint32_t high = fp16 ? pack_fp16(x, y) : pack_bf16(x, y);
    float2 h = fp16 ? unpack_fp16(high) : make_float2(low_bf16(high), high_bf16(high));
    return make_uint2(high, fp16 ? pack_fp16(x - h.x, y - h.y) : pack_bf16(x - h.x, y - h.y));
}

// B operands of the scores, [part][n][channel tile][lane]: in fp16 where keys are codes, else in bf16.
template <int NT> struct any_operands {
    uint2 *at;
    uint32_t tiles;

    __device__ inline uint2 *of(uint32_t part, uint32_t n, uint32_t ct) const
    {
        return at + ((part * NT + n) * tiles + ct) * 32 + threadIdx.x % 32;
    }

    __device__ inline void make(row_floats turned, bool coded) const
    {
        uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (uint32_t i = threadIdx.x / 32; i < NT * tiles; i += ANY_WARPS) {
            uint32_t n = i / tiles, ct = i % tiles;
            const float *x = turned.row(8 * n + g) + 16 * ct + 2 * t;
            uint2 first = in_two_parts(x[0], x[1], coded), second = in_two_parts(x[8], x[9], coded);
            *of(0, n, ct) = make_uint2(first.x, second.x);
            *of(1, n, ct) = make_uint2(first.y, second.y);
        }
    }
};

template <int NT>
__device__ inline void prepare_queries(const any_call &p, const row_block &b, bool coded, any_memory<NT> &m,
                                       const any_operands<NT> &q, float *area)
{
    row_floats raw = {area, p.dim_k}, turned = {area + 8 * NT * p.dim_k, p.dim_k};
    load_any_queries<NT>(p, b, raw);
    __syncthreads();
    if (coded)
        rotate_any_queries<NT>(p, b, raw, turned);
    else
        turned = raw;
    __syncthreads();
    measure_queries<NT>(p, b, coded, raw, turned, m);
    __syncthreads();
    q.make(turned, coded);
    __syncthreads(); // the area is free
}

// -- staging -------------------------------------------------------------------------------------

// By all threads of a block.
__device__ inline void stage_run(uint8_t *to, const uint8_t *from, uint32_t bytes)
{
    for (uint32_t i = threadIdx.x * 16; i < bytes; i += ANY_THREADS * 16)
        copy_async(to + i, from + i);
}

// By a warp: a row of bf16, or zeros, for what was never written may be anything.
__device__ inline void stage_row(uint8_t *to, const uint8_t *from, uint32_t bytes)
{
    for (uint32_t i = threadIdx.x % 32 * 16; i < bytes; i += 512)
        if (from)
            copy_async(to + i, from + i);
        else
            *(uint4 *)(to + i) = uint4{};
}

// Asks for the tiles of a history from the i-th on.
__device__ inline void stage_tiles(const any_call &p, const row_block &b, uint32_t i, uint32_t end, uint8_t *to)
{
    const uint64_t *pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
    for (uint32_t last = min(end, i + p.step_tiles); i < last; i++, to += p.staged) {
        const uint8_t *tile = (const uint8_t *)pages[i] + p.tile.at(p.layer, p.kv_heads, b.kv);
        uint32_t count = b.hist_end - p.sink - i * PAGE;
        const uint32_t bytes[2] = {p.tile.codes[1], p.tile.params[0] - p.tile.codes[1]};
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const any_side &side = p.history[v];
            const uint8_t *from = tile + p.tile.codes[v];
            if (side.kind != ROWS)
                stage_run(to + side.codes, from, bytes[v]);
            else
                for (uint32_t r = threadIdx.x / 32; r < PAGE; r += ANY_WARPS)
                    stage_row(to + side.codes + r * side.pitch, r < count ? from + r * 2 * side.dim : nullptr, 2 * side.dim);
        }
        stage_run(to + p.history[0].params, tile + p.tile.params[0], p.tile.bytes - p.tile.params[0]);
    }
}

// Row of K or V of a token of the windows, or of a new one.
__device__ inline const uint8_t *window_token(const any_call &p, const row_block &b, uint32_t token, bool v)
{
    uint32_t dim = v ? p.dim_v : p.dim_k, entry, row;
    if (token >= b.length) {
        bool tail = p.tail.tokens;
        const uint16_t *x = tail ? v ? p.tail.v : p.tail.k : v ? p.v : p.k;
        uint64_t at = tail ? (uint64_t)b.s * p.tail.ring + token % p.tail.ring
                           : (uint64_t)b.s * p.new_tokens + (token - b.length);
        return (const uint8_t *)(x + (at * p.kv_heads + b.kv) * dim);
    }
    window_place(p.sink, p.ring, token, entry, row);
    return bf16_tile_row(p.pages.bf16[(uint64_t)b.s * p.pages.bf16_stride + entry], p.layer, p.kv_heads, b.kv, p.dim_k,
                         p.dim_v, row, v);
}

// Asks for chunks of the windows from the i-th on.
__device__ inline void stage_windows(const any_call &p, const row_block &b, const bf16_tokens &w, uint32_t i, uint8_t *to)
{
    for (uint32_t r = threadIdx.x / 32; r < p.window_chunks * 16; r += ANY_WARPS) {
        uint32_t index = i * 16 + r;
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const any_side &side = p.windows[v];
            const uint8_t *from = index < w.count ? window_token(p, b, bf16_position(w, index), v) : nullptr;
            stage_row(to + side.codes + r * side.pitch, from, 2 * side.dim);
        }
    }
}

// -- a step --------------------------------------------------------------------------------------

// What a block goes through: tiles of the history, or chunks of the windows, [at, end).
struct any_walk {
    bool window;
    uint32_t at, end, step;
    bf16_tokens tokens; // of the windows

    __device__ inline void stage(const any_call &p, const row_block &b, uint32_t i, uint8_t *to) const
    {
        if (i >= end)
            return;
        if (window)
            stage_windows(p, b, tokens, i, to);
        else
            stage_tiles(p, b, i, end, to);
    }

    // Of the step at `at`.
    __device__ inline uint32_t chunks() const
    {
        return min(step, end - at) * (window ? 1 : TILE_CHUNKS);
    }

    __device__ inline const uint8_t *tile(const any_call &p, const uint8_t *staged, uint32_t chunk) const
    {
        return window ? staged : staged + chunk / TILE_CHUNKS * p.staged;
    }

    __device__ inline uint32_t chunk_of_tile(uint32_t chunk) const
    {
        return window ? chunk : chunk % TILE_CHUNKS;
    }
};

// A lane's columns are rows n * 8 + 2 t + e; maxima in log2 units. `o` has the warp's share of channels.
template <int NT> struct any_state {
    float m[NT][2], l[NT][2], centre[NT][2], o[SHARE][NT][4];

    __device__ inline void clear()
    {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            m[n][0] = m[n][1] = NONE;
            l[n][0] = l[n][1] = centre[n][0] = centre[n][1] = 0;
#pragma unroll
            for (int i = 0; i < (int)SHARE * 4; i++)
                o[i / 4][n][i % 4] = 0;
        }
    }
};

// Which tokens a lane's columns see, and where its tokens of a chunk are: g and g + 8.
struct any_tokens {
    uint32_t position[2];
    bool there[2];

    __device__ inline any_tokens(const any_call &p, const row_block &b, const any_walk &walk, uint32_t chunk)
    {
        uint32_t first = (walk.at * (walk.window ? 1 : TILE_CHUNKS) + chunk) * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t index = first + 8 * i, count = walk.window ? walk.tokens.count : b.hist_end - p.sink;
            there[i] = index < count;
            position[i] = walk.window ? bf16_position(walk.tokens, index) : p.sink + index;
        }
    }
};

// Scores of the warp's chunk in log2 units: NONE where a row does not see a token.
template <int NT>
__device__ inline void score_chunk(const any_call &p, const row_block &b, const any_side &side, const uint8_t *tile,
                                   uint32_t chunk, const any_tokens &tokens, const any_operands<NT> &q,
                                   side_reader<false> &keys, const any_memory<NT> &m, float (&s)[NT][4])
{
    const bool two_parts = side.kind != ROWS || p.q_type == KVD_DTYPE_F32;
#pragma unroll
    for (int n = 0; n < NT; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    keys.begin();
    for (uint32_t ct = 0; ct < side.dim / 16; ct++) {
        uint32_t a[4];
        keys.operand(tile, chunk, ct, a);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint2 high = *q.of(0, n, ct), low = two_parts ? *q.of(1, n, ct) : make_uint2(0, 0);
            if (side.kind != ROWS) {
                mma(s[n], a, high.x, high.y);
                mma(s[n], a, low.x, low.y);
            } else {
                mma_bf16(s[n], a, high.x, high.y);
                if (two_parts)
                    mma_bf16(s[n], a, low.x, low.y);
            }
        }
    }
    float2 param[2];
    load_any_params(side, tile, chunk, param);
    const float cap = p.softcap * LOG2E;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t r = n * 8 + threadIdx.x % 4 * 2 + e % 2;
            uint32_t last = row_position(p, b, min(b.row0 + r, p.rows - 1)), seen = first_seen(p, last);
            float x = fmaf(param[e / 2].x, s[n][e], param[e / 2].y * m.sum[r]) * m.unit[r] + m.mean[r];
            x = fmaf(x, 0, x); // an infinite one is not a number
            if (cap > 0)
                x = cap * tanhf(x / cap);
            uint32_t at = tokens.position[e / 2];
            s[n][e] = tokens.there[e / 2] && at >= seen && at <= last ? x : NONE;
        }
}

// Leaves the maxima of the warp's chunk in shared memory.
template <int NT> __device__ inline void share_maxima(const float (&s)[NT][4], any_memory<NT> &m)
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float top = fmaxf(s[n][e], s[n][2 + e]);
#pragma unroll
            for (int k = 4; k < 32; k *= 2)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
            if (lane < 4)
                m.top[threadIdx.x / 32][n * 8 + lane * 2 + e] = top;
        }
}

// Raises the maxima of rows to those of a step; what sums so far are worth then, in `f`.
template <int NT> __device__ inline void raise_maxima(const any_memory<NT> &m, any_state<NT> &st, float (&f)[NT][2])
{
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float top = st.m[n][e];
#pragma unroll
            for (uint32_t w = 0; w < ANY_WARPS; w++)
                top = fmaxf(top, m.top[w][n * 8 + threadIdx.x % 4 * 2 + e]);
            f[n][e] = fast_exp2(st.m[n][e] - top);
            st.m[n][e] = top;
            st.l[n][e] *= f[n][e];
            st.centre[n][e] *= f[n][e];
        }
}

// What sums of values are to be multiplied by.
__device__ inline float value_unit(const any_side &side)
{
    return side.kind == ROWS ? 1 : side.unit;
}

// Turns the chunk's scores into probabilities, and leaves these, times scale, as operands of the product with its values: without
// what a level is worth (value_unit), for a scale may be as large as fp16 has numbers.
template <int NT>
__device__ inline void share_probabilities(const any_side &side, const uint8_t *tile, uint32_t chunk, uint32_t place,
                                           const any_tokens &tokens, const float (&s)[NT][4], any_state<NT> &st,
                                           any_memory<NT> &m)
{
    float2 param[2];
    load_any_params(side, tile, chunk, param);
    const float unit = value_unit(side);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (!tokens.there[i]) // what was never written may be anything
            param[i] = make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        uint2 words[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float score = s[n][2 * half + e];
                float power = score == NONE ? 0 : fast_exp2(score - st.m[n][e]);
                st.l[n][e] += power;
                st.centre[n][e] = fmaf(power, param[half].y, st.centre[n][e]);
                x[e] = power * (param[half].x / unit);
            }
            words[half] = in_two_parts(x[0], x[1], side.kind != ROWS);
        }
        m.p[0][place][n][threadIdx.x % 32] = make_uint2(transpose(words[0].x), transpose(words[1].x));
        if (side.kind == ROWS)
            m.p[1][place][n][threadIdx.x % 32] = make_uint2(transpose(words[0].y), transpose(words[1].y));
    }
}

// Channel tiles of V that the warp takes.
struct channel_share {
    uint32_t first, n;

    __device__ inline explicit channel_share(uint32_t dim)
    {
        uint32_t tiles = dim / 16, most = (tiles + ANY_WARPS - 1) / ANY_WARPS;
        first = min(threadIdx.x / 32 * most, tiles);
        n = min(most, tiles - first);
    }
};

template <int NT>
__device__ inline void add_any_values(const any_call &p, const any_walk &walk, const any_side &side, const uint8_t *staged,
                                      const channel_share &mine, const float (&f)[NT][2], side_reader<true> &values,
                                      const any_memory<NT> &m, any_state<NT> &st)
{
    float c[SHARE][NT][4] = {};
    values.begin();
    for (uint32_t chunk = 0; chunk < walk.chunks(); chunk++) {
        const uint8_t *tile = walk.tile(p, staged, chunk);
#pragma unroll
        for (uint32_t i = 0; i < SHARE; i++) {
            if (i >= mine.n)
                break;
            uint32_t a[4];
            values.operand(tile, walk.chunk_of_tile(chunk), mine.first + i, a);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint2 high = m.p[0][chunk][n][threadIdx.x % 32];
                if (side.kind != ROWS) {
                    mma(c[i][n], a, high.x, high.y);
                } else {
                    uint2 low = m.p[1][chunk][n][threadIdx.x % 32];
                    mma_bf16(c[i][n], a, high.x, high.y);
                    mma_bf16(c[i][n], a, low.x, low.y);
                }
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < SHARE; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                st.o[i][n][e] = fmaf(st.o[i][n][e], f[n][e % 2], c[i][n][e]);
}

template <int NT>
__device__ inline void attend_steps(const any_call &p, const row_block &b, any_walk walk, const any_side &k,
                                    const any_side &v, const any_operands<NT> &q, any_memory<NT> &m, uint8_t *area,
                                    const channel_share &mine, any_state<NT> &st)
{
    uint32_t warp = threadIdx.x / 32, slot = 0, slots = walk.window ? 1 : p.stages, slot_bytes = p.staged * p.step_tiles;
    side_reader<false> keys(k, m.places[0]);
    side_reader<true> values(v, m.places[1]);
    walk.stage(p, b, walk.at, area);
    for (; walk.at < walk.end; walk.at += walk.step) {
        const uint8_t *staged = area + slot * slot_bytes;
        copies_arrived();
        __syncthreads(); // and the other slot, the last step's, is free
        slot = slots == 2 ? slot ^ 1 : 0;
        if (slots == 2)
            walk.stage(p, b, walk.at + walk.step, area + slot * slot_bytes);
        bool scores = warp < walk.chunks();
        const uint8_t *tile = walk.tile(p, staged, warp);
        uint32_t chunk = walk.chunk_of_tile(warp);
        any_tokens tokens(p, b, walk, warp);
        float s[NT][4], f[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++)
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = NONE;
        if (scores)
            score_chunk<NT>(p, b, k, tile, chunk, tokens, q, keys, m, s);
        share_maxima<NT>(s, m);
        __syncthreads();
        raise_maxima<NT>(m, st, f);
        if (scores)
            share_probabilities<NT>(v, tile, chunk, warp, tokens, s, st, m);
        __syncthreads();
        add_any_values<NT>(p, walk, v, staged, mine, f, values, m, st);
        if (slots == 1) {
            __syncthreads();
            walk.stage(p, b, walk.at + walk.step, area);
        }
    }
}

} // namespace kvd

#endif
