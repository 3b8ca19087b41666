// Attention of 128 rows of a kv head to values made ahead (many_values.cuh), by two warpgroups of 64 rows each. Of 64 rows or fewer
// to codes: the two warpgroups take pairs of tiles by turns (many_codes.cuh).
#ifndef KVD_KERNELS_CUDA_MANY_ROWS_CUH
#define KVD_KERNELS_CUDA_MANY_ROWS_CUH

#include "kernels/cuda/many_memory.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace kvd
{

// By so much, in log2 units, scores may exceed the maximum that sums are relative to: it is seldom raised, and what comes of
// exponentials is at most 1 all the same.
constexpr float SLACK = 3;

#if KVD_WARPGROUP

// Rotates a block's queries into shared memory: core matrices of 8 rows by 8 channels. By all threads, of which the last warps
// have nothing to multiply, and K's mean waits in the ring, which nothing else is in yet; of CODES by those that attend.
template <int D, many_source SOURCE>
__device__ inline void many_queries(const many_call &p, const row_block &b, const many_memory<D, SOURCE> &mem)
{
    constexpr bool TRANSFORM = SOURCE == HISTORY_TC;
    using few = queries<2, D, MANY_WARPS>;
    constexpr int LOOK = TRANSFORM ? TC : LEVELS2; // values are no codes: what undoes their places in a word is left out
    const shared_means<D, D, many_threads(SOURCE) / 32> mean = {mem.slot(0)};
    uint32_t lane = threadIdx.x % 32;
    float sign = sign_of(p.scale), means[2][2], unit = 1 / p.stored;
    key_terms<D, LOOK> terms;
    if constexpr (TRANSFORM) {
        const kvd_cuda_transform &t = transform_of(p.rotation, p.layer, b.kv);
        float room = __ldg(&t.levels_room);
        terms.load(t, p.codec);
        terms.factor = room * __ldg(&key_tiles(t, p.codec)[min(lane, D / 16 - 1)].step);
        unit *= terms.query_unit / room;
        mean.fetch(t, true);
    }
    typename few::run r;
    few::load(p, b.kv, 0, r);
#pragma unroll 1
    for (uint32_t i = 0; i < mem.ROWS / 16; i++) {
        row_block rows = b;
        rows.row0 = min(b.row0 + i * 16, p.rows - 1); // another's: what comes of them is not written
        raw_queries<2, D> raw;
        raw.load(p, rows);
        auto put = [&](int n, int tile, uint32_t b0, uint32_t b1) {
            uint32_t *to = (uint32_t *)(mem.at + ((i * 2 + n) * (D / 8) + tile * 2) * 128) + lane;
            to[0] = b0, to[32] = b1;
        };
        float divisor = p.q_type == KVD_DTYPE_F32 ? few::template rotate<true, LOOK>(p, b.kv, sign, terms, mean, raw, r, means, put)
                                                  : few::template rotate<false, LOOK>(p, b.kv, sign, terms, mean, raw, r, means, put);
        if (threadIdx.x == 0)
            mem.units()[i] = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E * divisor * unit;
        if (TRANSFORM && threadIdx.x < 4)
#pragma unroll
            for (int n = 0; n < 2; n++)
                *(float2 *)&mem.means()[i * 16 + n * 8 + 2 * threadIdx.x] = make_float2(means[n][0], means[n][1]);
    }
    barriers_ready(); // products may read what was written, and copies come where the mean was
    if (SOURCE == CODES) {
        arrive(mem.queries());
        barrier_wait(mem.queries(), 0);
    } else {
        __syncthreads();
    }
}

// The same of queries as they are, in bf16.
template <int D, many_source SOURCE>
__device__ inline void many_plain_queries(const many_call &p, const row_block &b, const many_memory<D, SOURCE> &mem)
{
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < mem.ROWS * D / 8; i += many_threads(SOURCE)) {
        uint32_t row = i / (D / 8), channel8 = i % (D / 8);
        uint64_t at = row_index(p, b, min(b.row0 + row, p.rows - 1)) * D + channel8 * 8;
        uint4 *to = (uint4 *)(mem.at + (row / 8 * (D / 8) + channel8) * 128 + row % 8 * 16);
        if (mem.Q_PARTS == 1) {
            *to = *(const uint4 *)((const uint16_t *)p.q + at);
            continue;
        }
        const float *x = (const float *)p.q + at;
        uint32_t high[4], low[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            high[k] = pack_bf16(x[2 * k], x[2 * k + 1]);
            low[k] = pack_bf16(x[2 * k] - low_bf16(high[k]), x[2 * k + 1] - high_bf16(high[k]));
        }
        *to = {high[0], high[1], high[2], high[3]};
        to[mem.Q_BYTES / sizeof *to] = {low[0], low[1], low[2], low[3]};
    }
    barriers_ready();
    __syncthreads();
}

// Probabilities of 16 rows and 128 tokens as operands. Of bf16, which has eight bits, there are two: what one leaves is in the other.
template <bool BF16> struct many_weights {
    uint32_t x[8][4], low[BF16 ? 8 : 1][4];

    __device__ inline void pack(const float (&s)[16][4])
    {
#pragma unroll
        for (int j = 0; j < 16; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float y = s[j][2 * h], z = s[j][2 * h + 1];
                uint32_t &to = x[j / 2][j % 2 * 2 + h];
                to = BF16 ? pack_bf16(y, z) : pack_fp16(y, z);
                if (BF16)
                    low[j / 2][j % 2 * 2 + h] = pack_bf16(y - low_bf16(to), z - high_bf16(to));
            }
    }
};

// What a warp has of its 16 rows, of which a lane's are g and g + 8: columns 8 j + 2 t + e of the sums are channels. The maximum is
// in log2 units.
template <int D, many_source SOURCE> struct many_rows {
    static constexpr bool BF16 = SOURCE == WINDOWS || SOURCE == WINDOWS_F32;
    static constexpr uint32_t GROUPS = many_groups(SOURCE);
    using memory = many_memory<D, SOURCE>;
    using part_pairs = many_pairs<BF16, memory::ROWS, GROUPS>;
    float o[D / 8][4], m[2], l[2], unit;
    uint32_t seen[2], last[2];
    ring_place k, v;

    // Which warpgroup this is of those for the same rows.
    static __device__ inline uint32_t group()
    {
        return GROUPS == 1 ? 0 : threadIdx.x / 128;
    }

    // The warp's first row of the block's.
    static __device__ inline uint32_t first_row()
    {
        return threadIdx.x / 32 * 16 % memory::ROWS;
    }

    __device__ inline void begin(const many_call &p, const row_block &b, const memory &mem)
    {
        unit = BF16 ? p.scale * LOG2E : mem.units()[first_row() / 16];
        k = {2 * group(), 0}, v = {2 * group() + 1, 0};
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            last[h] = row_position(p, b, min(b.row0 + first_row() + threadIdx.x % 32 / 4 + h * 8, p.rows - 1));
            seen[h] = first_seen(p, last[h]);
            m[h] = NONE, l[h] = 0;
        }
    }

    __device__ inline bool has_maximum(int h) const
    {
        return m[h] > NONE * 0.99f;
    }

    // What is added to a score before it is a power: no row of none yet is relative to NONE, which would leave nothing of scores.
    __device__ inline float shift(int h) const
    {
        return has_maximum(h) ? -m[h] - SLACK : 0;
    }

    // Raises maxima to those of the scores s, which are relative to the old ones and become so to the new ones. `factor` is what
    // sums are to be multiplied by.
    __device__ inline void raise(float (&s)[16][4], const float (&most)[2], float (&factor)[2])
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float old = shift(h), top = fmaxf(m[h], quad_max(most[h]) - old);
            factor[h] = fast_exp2(m[h] - top);
            m[h] = top;
            l[h] *= factor[h];
            float more = shift(h) - old;
#pragma unroll
            for (int j = 0; j < 16; j++)
                s[j][2 * h] += more, s[j][2 * h + 1] += more;
        }
    }

    // Scores to probabilities, and their sums. True: `factor` is what sums of values are to be multiplied by.
    template <bool MASKED> __device__ inline bool powers(float (&s)[16][4], const pair_tokens &tokens, float (&factor)[2])
    {
        float of[2] = {shift(0), shift(1)};
        uint32_t below = ~0u; // its sign: whether all scores are below the maximum so far, which takes one LOP3 for two of them
#pragma unroll
        for (int j = 0; j < 16; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (BF16)
                    s[j][i] = fmaf(s[j][i], 0, s[j][i]); // an infinite one is not a number
                s[j][i] = fmaf(s[j][i], unit, of[i / 2]);
                int token = 8 * j + (int)threadIdx.x % 4 * 2 + i % 2;
                uint32_t position = tokens.template position_of<BF16>(token);
                if (MASKED && (token >= tokens.count || position < seen[i / 2] || position > last[i / 2]))
                    s[j][i] = NONE;
                below &= __float_as_uint(s[j][i]);
            }
        bool raised = __any_sync(~0u, (int)below >= 0 || !has_maximum(0) || !has_maximum(1));
        if (raised) {
            float most[2] = {NONE, NONE};
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    most[i / 2] = fmaxf(most[i / 2], s[j][i]);
            raise(s, most, factor);
        }
#pragma unroll
        for (int j = 0; j < 16; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[j][i] = fast_exp2(s[j][i]);
            l[0] += s[j][0] + s[j][1];
            l[1] += s[j][2] + s[j][3];
        }
        return raised;
    }

    // Asks for products of scores: K's values are next in the ring.
    __device__ inline void ask_scores(const memory &mem, float (&s)[16][4])
    {
        const uint8_t *rows = mem.at + first_row() / 64 * (64 * D * 2);
        barrier_wait(mem.full(k.slot), k.phase);
        // Not before the wait, which would leave them to registers of lanes.
        uint64_t q = operand_descriptor<D>(rows), x = operand_descriptor<D>(mem.slot(k.slot));
        warpgroup_begin();
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            if (BF16)
                warpgroup_mma_bf16(s, q + i * (256 >> 4), x + i * (256 >> 4), i > 0);
            else
                warpgroup_mma_fp16(s, q + i * (256 >> 4), x + i * (256 >> 4), i > 0);
        if (SOURCE == WINDOWS_F32)
#pragma unroll
            for (int i = 0; i < D / 16; i++)
                warpgroup_mma_bf16(s, q + (mem.Q_BYTES >> 4) + i * (256 >> 4), x + i * (256 >> 4), 1);
        warpgroup_commit();
    }

    // Asks for sums of V's values, next in the ring.
    __device__ inline void ask_sums(const memory &mem, const many_weights<BF16> &weights)
    {
        barrier_wait(mem.full(v.slot), v.phase);
        uint64_t x = operand_descriptor<tile_values<D>::TOKENS>(mem.slot(v.slot));
        warpgroup_begin();
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (BF16) {
                warpgroup_add_bf16(o, weights.x[i], x + i * (256 >> 4));
                warpgroup_add_bf16(o, weights.low[i], x + i * (256 >> 4));
            } else {
                warpgroup_add_fp16(o, weights.x[i], x + i * (256 >> 4));
            }
        warpgroup_commit();
    }

    // The warp's own products have used a slot's values; the slot is free when all warps have said so. The warpgroup's next ones of
    // their side are two slots further, or four.
    __device__ inline void used(const memory &mem, ring_place &at)
    {
        if (threadIdx.x % 32 == 0)
            arrive(mem.empty(at.slot));
        at.template next<memory::SLOTS>(2 * GROUPS);
    }

    // The same of a pair, masked if some row does not see all of it.
    __device__ inline bool powers_of(float (&s)[16][4], const many_call &p, const row_block &b, const part_pairs &pairs, uint32_t pair, float (&factor)[2])
    {
        pair_tokens tokens = pairs.tokens(p, b, pair);
        return pairs.masked(tokens) ? powers<true>(s, tokens, factor) : powers<false>(s, tokens, factor);
    }

    // To maxima that have been raised.
    __device__ inline void scale(const float (&factor)[2])
    {
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            o[j][0] *= factor[0], o[j][1] *= factor[0], o[j][2] *= factor[1], o[j][3] *= factor[1];
    }

    // All pairs. While sums of one pair's values are formed, scores of the next become probabilities. That the two warpgroups take
    // turns besides gains nothing.
    __device__ inline void attend(const many_call &p, const row_block &b, const memory &mem, const part_pairs &pairs)
    {
        static_assert(GROUPS == 1, "a warpgroup has all pairs of its rows");
        if (pairs.first >= pairs.end)
            return;
        float s[16][4], factor[2];
        many_weights<BF16> weights;
        ask_scores(mem, s);
        warpgroup_wait();
        warpgroup_came(s);
        used(mem, k);
        powers<true>(s, pairs.tokens(p, b, pairs.first), factor);
        weights.pack(s);
#pragma unroll 1
        for (uint32_t pair = pairs.first + 1; pair < pairs.end; pair++) {
            ask_scores(mem, s);
            ask_sums(mem, weights);
            warpgroup_wait<1>();
            warpgroup_came(s);
            used(mem, k);
            bool raised = powers_of(s, p, b, pairs, pair, factor);
            warpgroup_wait();
            warpgroup_came(o);
            used(mem, v);
            if (raised)
                scale(factor);
            weights.pack(s);
        }
        ask_sums(mem, weights);
        warpgroup_wait();
        warpgroup_came(o);
    }

    // Each GROUPS-th pair, one step after the other: other warpgroups have the time in between, and registers that two steps at a
    // time would take are with those that make values.
    __device__ inline void attend_by_turns(const many_call &p, const row_block &b, const memory &mem, const part_pairs &pairs)
    {
        float s[16][4], factor[2];
        many_weights<BF16> weights;
#pragma unroll 1
        for (uint32_t pair = pairs.first + group(); pair < pairs.end; pair += GROUPS) {
            ask_scores(mem, s);
            warpgroup_wait();
            warpgroup_came(s);
            used(mem, k);
            if (powers_of(s, p, b, pairs, pair, factor))
                scale(factor);
            weights.pack(s);
            ask_sums(mem, weights);
            warpgroup_wait();
            warpgroup_came(o);
            used(mem, v);
        }
    }

    // Writes them as part `part` of n. A history's sums are left in the unit of finish.cuh, and maxima get what K's mean adds to all
    // of a row's scores.
    __device__ inline void write(const many_call &p, const row_block &b, const memory &mem, uint32_t part, uint32_t n) const
    {
        using layout = part_layout<2, D>;
        uint32_t row0 = b.row0 + first_row(), g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (row0 >= p.rows)
            return;
        layout parts = many_parts<D>(p, b, row0);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t row = h * 8 + g, end = part + 1 == n ? layout::pitch(n) : part + 1;
            float mean = SOURCE == HISTORY_TC ? mem.means()[first_row() + row] * p.scale * LOG2E : 0;
            float sum = quad_sum(l[h]), top = has_maximum(h) ? m[h] + SLACK + mean : NONE;
            for (uint32_t i = part + t; i < end; i += 4) {
                __stcg(parts.terms(TERM_M, row) + i, i == part ? top : NONE);
                __stcg(parts.terms(TERM_L, row) + i, i == part ? sum : 0);
                __stcg(parts.terms(TERM_ZERO_SUM, row) + i, 0.0f);
            }
#pragma unroll
            for (int j = 0; j < D / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float back = BF16 ? 1 : 1 / (p.stored * TWO24 * slot_factor<INT2>(j / 2));
                    float *to = (float *)parts.values(part).vector((int)row / 4, 8 * j + 2 * (int)t + e);
                    __stcg(to + row % 4, o[j][2 * h + e] * back);
                }
        }
    }
};
#endif

} // namespace kvd

#endif
