// Attention over latents up to a part's sums: what lies in shared memory, what is staged, the steps of a block. attend_latent.cu
// says how all of it goes together.
#ifndef KVD_KERNELS_CUDA_LATENT_STEPS_CUH
#define KVD_KERNELS_CUDA_LATENT_STEPS_CUH

#include "kernels/cuda/any_steps.cuh"
#include "kernels/cuda/latent.cuh"

namespace kvd
{

constexpr uint32_t LATENT_WARPS = 8, LATENT_THREADS = 32 * LATENT_WARPS;
constexpr uint32_t CHANNEL_TILES = LATENT_TILES / LATENT_WARPS; // whose sums a warp keeps
constexpr uint32_t OPERAND_BYTES = 512;                         // four 8 x 8 matrices of 16 bits
constexpr uint32_t TILE_AREA = TILE_CHUNKS * LATENT_TILES * OPERAND_BYTES;

// Where a call's scratch has what its kernels hand on.
struct latent_scratch {
    uint2 *queries;   // turned: B operands, [sequence][eight rows][channel tile][lane]
    float *divisors;  // of turned queries, [sequence][row]
    uint8_t *parts;   // partial results, as any_parts, by (sequence, row block)
    float *sums;      // [sequence][row][channel]: of coded values, all parts of a row together
    float *others;    // the same of values in bf16
    uint32_t rows;    // of a sequence, whole blocks
    uint64_t bytes;
};

struct latent_call : any_call {
    any_side latent; // of the history
    latent_scratch memory;
    uint32_t stages[2], slot_bytes[2]; // of steps over codes, over bf16 rows
    uint32_t parts[2];                 // of queries' operands: of the latent in bf16, of the rope part
    uint32_t rope_at, p_at, tile_at, slots_at[2]; // in shared memory; slots over codes lie behind a tile of levels
};

// Shared memory; behind it the queries' operands, [part][eight rows][channel tile][lane], of the latent and of the rope part,
// probabilities, the tile of levels and what is staged.
template <int NT> struct latent_memory {
    static constexpr int N_ROWS = 8 * NT;
    float top[TILE_CHUNKS][N_ROWS], l[TILE_CHUNKS][N_ROWS], centre[TILE_CHUNKS][N_ROWS]; // by chunk of a step
    float best[2][N_ROWS];         // maxima before and after a step, by turns
    float unit[N_ROWS], sum[N_ROWS]; // what a turned query was divided by; the sum of its channels
    uint32_t last[N_ROWS], seen[N_ROWS]; // the last and the first position that a row sees
    float2 param[PAGE];            // a tile's scales and centres
    float scale_unit;              // a power of two that no scale of the tile exceeds
};

// What a block goes through: steps [at, end) of PAGE tokens of codes, or of HALF_PAGE in bf16.
constexpr uint32_t HALF_PAGE = PAGE / 2;

struct latent_walk {
    bool window; // or the history
    uint32_t at, end;
    uint32_t count; // tokens of all that there are
    bf16_tokens tokens;

    __device__ inline uint32_t position(const any_call &p, uint32_t index) const
    {
        return window ? bf16_position(tokens, index) : p.sink + index;
    }
};

// -- staging -------------------------------------------------------------------------------------

// Rows of bf16 as matrices of 8 tokens x 8 channels, those of a chunk and channel tile side by side: (token half, channel half)
// is matrix 2 * token half + channel half. row(t): where it begins, or null for zeros.
template <uint32_t TOKENS, uint32_t DIM, typename F> __device__ inline void stage_matrices(uint8_t *to, F &&row)
{
    constexpr uint32_t EIGHTS = TOKENS / 8, TURNS = LATENT_WARPS / EIGHTS, QUADS = DIM / 32 / TURNS;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, eight = warp % EIGHTS;
    const uint8_t *from = row(eight * 8 + lane % 8);
#pragma unroll
    for (uint32_t i = 0; i < QUADS; i++) {
        uint32_t group = (warp / EIGHTS * QUADS + i) * 4 + lane / 8; // of 8 channels
        uint32_t matrix = eight % 2 * 2 + group % 2;
        uint8_t *at = to + (eight / 2 * (DIM / 16) + group / 2) * OPERAND_BYTES + matrix * 128 + lane % 8 * 16;
        if (from)
            copy_async(at, from + group * 16);
        else
            *(uint4 *)at = uint4{};
    }
}

__device__ inline const uint8_t *history_tile(const any_call &p, const row_block &b, uint32_t page)
{
    const uint64_t *pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
    return (const uint8_t *)pages[page] + p.tile.at(p.layer, p.kv_heads, b.kv);
}

// A tile's codes and parameters as they are, then rows of the rope part.
__device__ inline void stage_codes(const latent_call &p, const row_block &b, const latent_walk &walk, uint32_t i, uint8_t *to)
{
    const uint8_t *tile = history_tile(p, b, i);
    uint32_t bytes = p.tile.bytes - p.tile.codes[1];
    for (uint32_t k = threadIdx.x * 16; k < bytes; k += LATENT_THREADS * 16)
        copy_async(to + k, tile + p.tile.codes[1] + k);
    stage_matrices<PAGE, ROPE>(to + bytes, [&](uint32_t t) {
        return i * PAGE + t < walk.count ? tile + t * (2 * ROPE) : nullptr;
    });
}

// Rows of the latent, then of the rope part.
__device__ inline void stage_bf16(const latent_call &p, const row_block &b, const latent_walk &walk, uint32_t i, uint8_t *to)
{
    auto row = [&](uint32_t t, bool v) -> const uint8_t * {
        uint32_t index = i * HALF_PAGE + t;
        if (index >= walk.count)
            return nullptr;
        if (walk.window)
            return window_token(p, b, walk.position(p, index), v);
        return history_tile(p, b, index / PAGE) + p.tile.codes[v] + index % PAGE * 2 * (v ? LATENT : ROPE);
    };
    stage_matrices<HALF_PAGE, LATENT>(to, [&](uint32_t t) { return row(t, true); });
    stage_matrices<HALF_PAGE, ROPE>(to + HALF_PAGE * 2 * LATENT, [&](uint32_t t) { return row(t, false); });
}

// -- levels --------------------------------------------------------------------------------------

// Codes of a tile as levels about 0 in fp16: the A operands of values, with channels as rows, as matrices.
template <int BITS, bool LEVELS> __device__ inline void unpack_codes(const uint8_t *codes, uint8_t *tile)
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t u = threadIdx.x / 32; u < TILE_CHUNKS * LATENT_TILES / 8; u += LATENT_WARPS) { // pieces of 8 channel tiles
        uint32_t chunk = u / 4, piece = u % 4;
        uint4 x = *(const uint4 *)(codes + u * 512 + lane * 16), more = {};
        if (BITS == 4)
            more = *(const uint4 *)(codes + 16 * LATENT + u * 512 + lane * 16);
        if (BITS == 3) { // of 16
            more = *(const uint4 *)(codes + 16 * LATENT + (chunk * 2 + piece / 2) * 512 + lane * 16);
            uint32_t shift = piece % 2 * 8;
            more = make_uint4(more.x >> shift, more.y >> shift, more.z >> shift, more.w >> shift);
        }
        uint8_t *to = tile + u * 8 * OPERAND_BYTES + lane * 4;
        static_for<8>([&](auto j) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                uint32_t w = word_of(x, r), y;
                if constexpr (LEVELS) {
                    y = levels_of<BITS, 2 * j, (BITS == 3 ? 1 : 2) * j>(w, word_of(more, r));
                } else {
                    uint32_t code = w >> 2 * j & 0x00030003u;
                    if (BITS == 4)
                        code |= (word_of(more, r) >> 2 * j & 0x00030003u) << 2;
                    y = levels_about_zero(code, (1 << BITS) - 1);
                }
                *(uint32_t *)(to + j * OPERAND_BYTES + r * 128) = y;
            }
        });
    }
}

// By all threads of a block: staged codes into levels, and parameters into floats; tokens that are not there have zeros.
template <int NT>
__device__ inline void unpack_tile(const latent_call &p, const uint8_t *staged, uint32_t count, uint8_t *tile, latent_memory<NT> &m)
{
    const any_side &side = p.latent;
    if (side.kind == EVEN2)
        unpack_codes<2, false>(staged, tile);
    else if (side.kind == EVEN4)
        unpack_codes<4, false>(staged, tile);
    else if (side.bits == 2)
        unpack_codes<2, true>(staged, tile);
    else if (side.bits == 3)
        unpack_codes<3, true>(staged, tile);
    else
        unpack_codes<4, true>(staged, tile);
    if (threadIdx.x >= 32)
        return;
    float most = 0;
#pragma unroll
    for (uint32_t chunk = 0; chunk < TILE_CHUNKS; chunk++) {
        float2 param[2];
        load_any_params(side, staged, chunk, param);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t t = chunk * 16 + i * 8 + threadIdx.x / 4;
            if (t >= count)
                param[i] = make_float2(0, 0);
            most = fmaxf(most, fabsf(param[i].x));
            if (threadIdx.x % 4 == 0)
                m.param[t] = param[i];
        }
    }
    uint32_t top = __reduce_max_sync(~0u, __float_as_uint(most));
    if (threadIdx.x == 0)
        m.scale_unit = magnitude(__uint_as_float(top));
}

// -- a step --------------------------------------------------------------------------------------

// Where a lane's row of a matrix lies in an operand: as registers have it, or with rows as columns (registers 1 and 2 change
// places, and matrices are turned).
__device__ inline uint32_t values_row()
{
    return threadIdx.x % 32 * 16;
}

__device__ inline uint32_t keys_row()
{
    uint32_t i = threadIdx.x % 32 / 8;
    return (i % 2 * 2 + i / 2) * 128 + threadIdx.x % 8 * 16;
}

// Which warp scores which chunk of a step and which of its query rows: SN tiles of eight from `first` on.
template <int NT, bool CODED> struct scored_rows {
    static constexpr uint32_t CHUNKS = CODED ? TILE_CHUNKS : TILE_CHUNKS / 2, SHARES = LATENT_WARPS / CHUNKS;
    static constexpr int SN = NT < (int)SHARES ? 1 : NT / (int)SHARES;
    uint32_t chunk, first;

    __device__ inline scored_rows()
        : chunk(threadIdx.x / 32 % CHUNKS), first(threadIdx.x / 32 / CHUNKS * SN)
    {
    }

    __device__ inline bool any() const
    {
        return first < NT;
    }

    // Row of element e of the n-th tile.
    __device__ inline uint32_t row(int n, int e) const
    {
        return (first + (uint32_t)n) * 8 + threadIdx.x % 4 * 2 + (uint32_t)e % 2;
    }
};

// A row's sums over the warp's chunks, by the lane's columns; and sums of values, of the warp's channels and all rows.
template <int NT, bool CODED> struct latent_state {
    using mine = scored_rows<NT, CODED>;
    float l[mine::SN][2], centre[mine::SN][2], o[CHANNEL_TILES][NT][4];
    float scale_unit; // of o

    __device__ inline void clear()
    {
        scale_unit = 1;
#pragma unroll
        for (int n = 0; n < mine::SN; n++)
            l[n][0] = l[n][1] = centre[n][0] = centre[n][1] = 0;
        clear_products(o);
    }
};

// Operands of queries in shared memory: part and tile of eight rows.
__device__ inline const uint2 *query_operands(const uint8_t *at, uint32_t part, uint32_t nt, uint32_t n, uint32_t tiles)
{
    return (const uint2 *)at + ((part * nt + n) * tiles) * 32 + threadIdx.x % 32;
}

// c += keys of bf16 times queries, in as many parts as these have.
template <int NT, int SN, uint32_t TILES>
__device__ inline void add_bf16_scores(const uint8_t *keys, const uint8_t *queries, uint32_t parts, uint32_t first, float (&s)[SN][4])
{
#pragma unroll 2
    for (uint32_t ct = 0; ct < TILES; ct++) {
        uint32_t a[4];
        load_matrices<false>(a, keys + ct * OPERAND_BYTES + keys_row());
#pragma unroll
        for (int n = 0; n < SN; n++)
            for (uint32_t part = 0; part < parts; part++) {
                uint2 q = query_operands(queries, part, NT, first + n, TILES)[ct * 32];
                mma_bf16(s[n], a, q.x, q.y);
            }
    }
}

// Logits of the warp's chunk and rows in log2 units: NONE where a row does not see a token.
template <int NT, bool CODED>
__device__ inline void score_latents(const latent_call &p, const latent_walk &walk, const uint8_t *shared, const uint8_t *tile,
                                     const uint8_t *rope, const scored_rows<NT, CODED> &mine, const latent_memory<NT> &m,
                                     float (&s)[scored_rows<NT, CODED>::SN][4])
{
    constexpr int SN = scored_rows<NT, CODED>::SN;
    const uint8_t *keys = tile + mine.chunk * (LATENT_TILES * OPERAND_BYTES), *queries = shared + p.operands_at;
    uint32_t t0 = mine.chunk * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < SN; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    if constexpr (CODED) {
#pragma unroll 4
        for (uint32_t ct = 0; ct < LATENT_TILES; ct++) {
            uint32_t a[4];
            load_matrices<true>(a, keys + ct * OPERAND_BYTES + keys_row());
#pragma unroll
            for (int n = 0; n < SN; n++) {
                uint2 q = query_operands(queries, 0, NT, mine.first + n, LATENT_TILES)[ct * 32];
                mma(s[n], a, q.x, q.y);
            }
        }
#pragma unroll
        for (int n = 0; n < SN; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 param = m.param[t0 + e / 2 * 8];
                uint32_t r = mine.row(n, e);
                s[n][e] = fmaf(param.x, s[n][e], param.y * m.sum[r]) * m.unit[r];
            }
    } else {
        add_bf16_scores<NT, SN, LATENT_TILES>(keys, queries, p.parts[0], mine.first, s);
    }
    add_bf16_scores<NT, SN, ROPE_TILES>(rope + mine.chunk * (ROPE_TILES * OPERAND_BYTES), shared + p.rope_at, p.parts[1], mine.first, s);
    const float scale = p.scale * LOG2E, cap = p.softcap * LOG2E;
    uint32_t index[2], position[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        index[i] = walk.at * (CODED ? PAGE : HALF_PAGE) + t0 + i * 8;
        position[i] = walk.position(p, index[i]);
    }
#pragma unroll
    for (int n = 0; n < SN; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t r = mine.row(n, e), at = position[e / 2];
            float x = s[n][e] * scale;
            x = fmaf(x, 0, x); // an infinite one is not a number
            if (cap > 0)
                x = cap * tanhf(x / cap);
            s[n][e] = index[e / 2] < walk.count && at >= m.seen[r] && at <= m.last[r] ? x : NONE;
        }
}

// Leaves the maxima of the warp's chunk in shared memory.
template <int NT, bool CODED>
__device__ inline void share_latent_maxima(const float (&s)[scored_rows<NT, CODED>::SN][4], const scored_rows<NT, CODED> &mine,
                                           latent_memory<NT> &m)
{
#pragma unroll
    for (int n = 0; n < scored_rows<NT, CODED>::SN; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float top = fmaxf(s[n][e], s[n][2 + e]);
#pragma unroll
            for (int k = 4; k < 32; k *= 2)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
            if (threadIdx.x % 32 < 4)
                m.top[mine.chunk][mine.row(n, e)] = top;
        }
}

// A row's maximum after a step.
template <int NT, bool CODED> __device__ inline float raised(const latent_memory<NT> &m, uint32_t turn, uint32_t row)
{
    float top = m.best[turn][row];
#pragma unroll
    for (uint32_t k = 0; k < scored_rows<NT, CODED>::CHUNKS; k++)
        top = fmaxf(top, m.top[k][row]);
    return top;
}

// Makes the sums so far relative to the new maxima, and to the unit of the tile's scales.
template <int NT, bool CODED>
__device__ inline void rescale_sums(latent_memory<NT> &m, uint32_t turn, latent_state<NT, CODED> &st)
{
    float f[NT][2], unit = CODED ? m.scale_unit : 1, ratio = st.scale_unit * inverse_power(unit);
    bool any = false;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t r = n * 8 + threadIdx.x % 4 * 2 + e;
            f[n][e] = fast_exp2(m.best[turn][r] - raised<NT, CODED>(m, turn, r)) * ratio;
            any |= f[n][e] != 1;
        }
    st.scale_unit = unit;
    if (!__any_sync(~0u, any))
        return;
#pragma unroll
    for (uint32_t i = 0; i < CHANNEL_TILES; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                st.o[i][n][e] *= f[n][e % 2];
}

// Turns the chunk's logits into probabilities, and leaves these as operands of the product with its values.
template <int NT, bool CODED>
__device__ inline void share_latent_probabilities(const float (&s)[scored_rows<NT, CODED>::SN][4],
                                                  const scored_rows<NT, CODED> &mine, latent_memory<NT> &m, uint32_t turn, uint2 *p,
                                                  latent_state<NT, CODED> &st)
{
    float2 param[2] = {make_float2(1, 0), make_float2(1, 0)};
    if (CODED)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            param[i] = m.param[mine.chunk * 16 + threadIdx.x % 32 / 4 + i * 8];
            param[i].x *= inverse_power(m.scale_unit);
        }
#pragma unroll
    for (int n = 0; n < scored_rows<NT, CODED>::SN; n++) {
        float top[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t r = mine.row(n, e);
            top[e] = raised<NT, CODED>(m, turn, r);
            float f = fast_exp2(m.best[turn][r] - top[e]);
            st.l[n][e] *= f, st.centre[n][e] *= f;
        }
        uint2 words[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float score = s[n][2 * half + e], power = score == NONE ? 0 : fast_exp2(score - top[e]);
                st.l[n][e] += power;
                st.centre[n][e] = fmaf(power, param[half].y, st.centre[n][e]);
                x[e] = power * param[half].x;
            }
            words[half] = in_two_parts(x[0], x[1], CODED);
        }
        uint2 *to = p + (mine.chunk * NT + mine.first + n) * 32 + threadIdx.x % 32;
        to[0] = make_uint2(transpose(words[0].x), transpose(words[1].x));
        if (!CODED)
            to[scored_rows<NT, CODED>::CHUNKS * NT * 32] = make_uint2(transpose(words[0].y), transpose(words[1].y));
    }
}

// Adds values times probabilities to the sums of the warp's channels.
template <int NT, bool CODED>
__device__ inline void add_latents(const uint8_t *tile, const uint2 *p, latent_state<NT, CODED> &st)
{
    constexpr uint32_t CHUNKS = scored_rows<NT, CODED>::CHUNKS;
#pragma unroll 1
    for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
        uint32_t a[CHANNEL_TILES][4];
#pragma unroll
        for (uint32_t i = 0; i < CHANNEL_TILES; i++)
            load_matrices<!CODED>(a[i], tile + (chunk * LATENT_TILES + threadIdx.x / 32 * CHANNEL_TILES + i) * OPERAND_BYTES + values_row());
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const uint2 *from = p + (chunk * NT + n) * 32 + threadIdx.x % 32;
            uint2 high = from[0], low = CODED ? uint2{} : from[CHUNKS * NT * 32];
#pragma unroll
            for (uint32_t i = 0; i < CHANNEL_TILES; i++)
                if (CODED) {
                    mma(st.o[i][n], a[i], high.x, high.y);
                } else {
                    mma_bf16(st.o[i][n], a[i], high.x, high.y);
                    mma_bf16(st.o[i][n], a[i], low.x, low.y);
                }
        }
    }
}

// Goes through a part. Returns which of m.best has the maxima.
template <int NT, bool CODED>
__device__ inline uint32_t attend_latent_steps(const latent_call &p, const row_block &b, latent_walk walk, uint8_t *shared,
                                               latent_memory<NT> &m, latent_state<NT, CODED> &st)
{
    const uint32_t slots = p.stages[!CODED], slot_bytes = p.slot_bytes[!CODED];
    const scored_rows<NT, CODED> mine;
    uint8_t *area = shared + p.slots_at[!CODED];
    uint2 *probabilities = (uint2 *)(shared + p.p_at);
    uint32_t slot = 0, turn = 0;
    auto stage = [&](uint32_t i, uint8_t *to) {
        if (i >= walk.end)
            return;
        if (CODED)
            stage_codes(p, b, walk, i, to);
        else
            stage_bf16(p, b, walk, i, to);
    };
    st.clear();
    stage(walk.at, area);
#pragma unroll 1
    for (; walk.at < walk.end; walk.at++, turn ^= 1) {
        const uint8_t *staged = area + slot * slot_bytes, *tile = staged, *rope = staged + HALF_PAGE * 2 * LATENT;
        copies_arrived();
        __syncthreads(); // and the other slot, the last step's, is free
        slot = slots == 2 ? slot ^ 1 : 0;
        if (slots == 2)
            stage(walk.at + 1, area + slot * slot_bytes);
        if (CODED) {
            unpack_tile<NT>(p, staged, walk.count - walk.at * PAGE, shared + p.tile_at, m);
            tile = shared + p.tile_at;
            rope = staged + p.tile.bytes - p.tile.codes[1];
            __syncthreads();
        }
        float s[scored_rows<NT, CODED>::SN][4];
        if (mine.any()) {
            score_latents<NT, CODED>(p, walk, shared, tile, rope, mine, m, s);
            share_latent_maxima<NT, CODED>(s, mine, m);
        }
        __syncthreads();
        if (mine.any())
            share_latent_probabilities<NT, CODED>(s, mine, m, turn, probabilities, st);
        rescale_sums<NT, CODED>(m, turn, st);
        if (threadIdx.x < 8 * NT)
            m.best[turn ^ 1][threadIdx.x] = raised<NT, CODED>(m, turn, threadIdx.x);
        __syncthreads();
        add_latents<NT, CODED>(tile, probabilities, st);
        if (slots == 1) {
            __syncthreads();
            stage(walk.at + 1, area);
        }
    }
    return turn;
}

} // namespace kvd

#endif
