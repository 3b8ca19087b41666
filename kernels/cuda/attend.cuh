// Attention of a block of query rows over a part of a sequence: queries, tiles, bf16 tokens.
//
// A *row* is one (query, q head) of a kv head; a block takes N = 8 NT of them as columns of
// mma.m16n8k16, whose 16 rows are tokens (scores) or channels (values). History (of a codec) is attended
// in the rotated space, sink and recent window (bf16) in the original one; each part of the work
// sees only one of the two, and the merge un-rotates the history's share.
#ifndef KVD_KERNELS_CUDA_ATTEND_CUH
#define KVD_KERNELS_CUDA_ATTEND_CUH

#include "kernels/cuda/tc.cuh"

#include <type_traits>

namespace kvd
{

using attend_params = kvd_cuda_attend_params;

constexpr int MAX_SPLITS = 128; // of a history
constexpr int MAX_WINDOW_SPLITS = 32, MAX_PARTS = MAX_SPLITS + MAX_WINDOW_SPLITS;

// Which tiles are asked for before the kernel in front has finished: none, every warp's first, or the second of half of
// the warps, too.
enum early : uint32_t { EARLY_NONE, EARLY_FIRST, EARLY_SECOND };

// A call, with what would take divisions on the device.
struct attend_call : kvd_cuda_attend_params {
    uint32_t group, rows; // q heads a kv head; rows of a kv head
    uint32_t row_blocks;  // of a kv head
    float parts_a_tile;   // 1 / part_tiles
    enum early early;
};

// Which rows, of what.
struct row_block {
    uint32_t s, kv, row0; // sequence, kv head, first row of the block
    uint32_t length, hist_end, total;
};

// Of this block, of sequence s. Not kept in registers from one use to the next: these are scarce between.
template <int NT> __device__ inline row_block place_of(const attend_call &p, uint32_t s)
{
    uint32_t x = block_index_x();
    uint32_t kv = p.row_blocks == 1 ? x : x / p.row_blocks;
    return {s, kv, (x - kv * p.row_blocks) * 8 * NT};
}

template <int NT> __device__ inline row_block place_of(const attend_call &p)
{
    return place_of<NT>(p, block_index_y());
}

// Brings nearer what a block reads first. May run while the kernel in front still writes there: the L2
// cache is where that arrives, too.
__device__ inline void prefetch_place(const attend_call &p, const row_block &b)
{
    if (threadIdx.x == 0) {
        prefetch(p.pages.hist_end + b.s);
        prefetch(p.pages.codec + (uint64_t)b.s * p.pages.codec_stride);
    }
}

__device__ inline void load_lengths(const attend_call &p, row_block &b)
{
    uint32_t length = p.pages.length[b.s], hist_end = p.codec != KVD_CODEC_BF16 ? p.pages.hist_end[b.s] : 0;
    uint32_t more = p.tail.tokens ? p.tail.tokens[b.s] : p.new_tokens;
    b.length = uniform(length);
    b.hist_end = max(uniform(hist_end), p.sink);
    b.total = b.length + uniform(more);
}

// Which query of its sequence a row is.
__device__ inline uint32_t query_of(const attend_call &p, uint32_t row)
{
    return p.q_len == 1 ? 0 : row / p.group; // a division is twenty instructions
}

// Index of a row among [S][q_len][H_q].
__device__ inline uint64_t row_index(const attend_call &p, const row_block &b, uint32_t row)
{
    uint32_t query = query_of(p, row), head = row - query * p.group;
    return ((uint64_t)b.s * p.q_len + query) * p.q_heads + b.kv * p.group + head;
}

// Position of a row's query.
__device__ inline uint32_t row_position(const attend_call &p, const row_block &b, uint32_t row)
{
    return b.total - p.q_len + query_of(p, row);
}

// First position that a query sees.
__device__ inline uint32_t first_seen(const attend_call &p, uint32_t position)
{
    return p.window && position + 1 > p.window ? position + 1 - p.window : 0;
}

// A lane's two columns of each N tile are rows n * 8 + 2 t + e. Maxima are in units of 1 / `score_unit`
// log2 units, as scores come: that saves a product for each score.
template <int NT, int DV> struct state {
    float m[NT][2], l[NT][2], zero_sum[NT][2]; // of tc2 and tc2.5: the sum of probabilities times scale
    float o[NT][DV / 16][4];

    __device__ inline void clear(float none)
    {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            m[n][0] = m[n][1] = none;
            l[n][0] = l[n][1] = zero_sum[n][0] = zero_sum[n][1] = 0;
#pragma unroll
            for (int i = 0; i < DV / 4; i++)
                o[n][i / 4][i % 4] = 0;
        }
    }

    // Raises the maxima of all columns to those of `top` over the lanes of a column. Seldom needed
    // after the first tiles; and shuffles take their time.
    __device__ inline void raise(const float (&top)[NT][2], float score_unit)
    {
        bool higher = false;
#pragma unroll
        for (int n = 0; n < NT; n++)
            higher |= top[n][0] > m[n][0] || top[n][1] > m[n][1];
        if (!__any_sync(~0u, higher))
            return;
#pragma unroll
        for (int n = 0; n < NT; n++)
            raise_tile(n, top[n][0], top[n][1], score_unit);
    }

    __device__ inline void raise_tile(int n, float top0, float top1, float score_unit)
    {
#pragma unroll
        for (int x = 4; x < 32; x *= 2) {
            top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, x));
            top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, x));
        }
        top0 = fmaxf(top0, m[n][0]);
        top1 = fmaxf(top1, m[n][1]);
        float f0 = fast_exp2((m[n][0] - top0) * score_unit), f1 = fast_exp2((m[n][1] - top1) * score_unit);
        m[n][0] = top0, m[n][1] = top1;
        l[n][0] *= f0, l[n][1] *= f1;
        zero_sum[n][0] *= f0, zero_sum[n][1] *= f1;
#pragma unroll
        for (int ct = 0; ct < DV / 16; ct++) {
            o[n][ct][0] *= f0, o[n][ct][1] *= f1;
            o[n][ct][2] *= f0, o[n][ct][3] *= f1;
        }
    }
};

// -- queries -------------------------------------------------------------------------------------

// The queries of a block as they are: what a lane loads of them, with which it has the channels of
// B operands as forward_channel deals them.
template <int NT, int DK> struct raw_queries {
    static constexpr int P = padded(DK), GROUPS = P / 32;
    uint4 x[NT][P / 16]; // half of them for bf16

    __device__ inline void load(const attend_call &p, const row_block &b)
    {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        bool f32 = p.q_type == KVD_DTYPE_F32;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            // Rows beyond the end are another's: what comes of them is not written.
            uint64_t row = row_index(p, b, min(b.row0 + n * 8 + g, p.rows - 1));
            const uint4 *from = (const uint4 *)((const uint8_t *)p.q + (row * DK + 8 * t << (f32 ? 2 : 1)));
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                x[n][i] = in_row<DK>(i) ? from[f32 ? i * 8 : i * 4] : uint4{};
            if (f32)
#pragma unroll
                for (int i = 0; i < GROUPS; i++)
                    x[n][GROUPS + i] = in_row<DK>(i) ? from[i * 8 + 1] : uint4{};
        }
    }

    // As bf16; `low` holds what that leaves of an f32.
    template <bool F32>
    __device__ inline void operands(int n, uint32_t (&q)[P / 8], uint32_t (&low)[P / 8]) const
    {
#pragma unroll
        for (int i = 0; i < P / 8; i++) {
            if (!F32) {
                q[i] = word_of(x[n][i / 4], i % 4);
                continue;
            }
            const uint4 &four = x[n][i / 4 + (i % 4 / 2 ? GROUPS : 0)];
            float a = __uint_as_float(word_of(four, i % 2 * 2)), b = __uint_as_float(word_of(four, i % 2 * 2 + 1));
            q[i] = pack_bf16(a, b);
            low[i] = pack_bf16(a - low_bf16(q[i]), b - high_bf16(q[i]));
        }
    }
};

// Rotated queries of a block in shared memory, as B operands of the scores. They are the true ones by
// a divisor, a power of two. Channels are the 16 rows of products here, query rows the columns.
template <int NT, int DK, int WARPS> struct queries {
    static constexpr int STEPS = padded(DK) / 16;                            // of 16 inputs
    static constexpr int RUN = STEPS < 8 ? STEPS : STEPS % 8 == 0 ? 8 : 6; // steps at a time
    uint2 op[NT][DK / 16][32];

    // Operands of R for 16 outputs and some steps: high and low part.
    struct run {
        uint4 part[2][RUN];
    };

    // The i-th run of a warp: the runs of a tile of 16 outputs follow each other.
    static __device__ inline void load(const attend_call &p, uint32_t kv, int i, run &r)
    {
        int tile = threadIdx.x / 32 + i / (STEPS / RUN) * WARPS, step = i % (STEPS / RUN) * RUN;
        if (tile >= DK / 16)
            return;
        const uint4 *from = (const uint4 *)matrix_at<DK>(p.rotation.k.queries,
                                                         matrix_index(p.rotation, p.layer, kv), 2) +
                            (tile * STEPS + step) * 32 + threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int k = 0; k < RUN; k++)
                r.part[half][k] = __ldg(from + half * (packed<DK>::WORDS / 4) + k * 32);
    }

    // Rotates the warp's share of outputs; `r` holds its first run. The caller synchronizes before
    // anyone reads. Returns the divisor. means: of tc2 and tc2.5, the products of rows 2 t and 2 t + 1 with K's mean.
    template <bool F32, int CODEC, typename M>
    __device__ inline float rotate(const attend_call &p, uint32_t kv, float sign, const key_terms<DK, CODEC> &terms,
                                   const M &shared, const raw_queries<NT, DK> &raw, run &r, float (&means)[NT][2])
    {
        return rotate<F32, CODEC>(p, kv, sign, terms, shared, raw, r, means,
                                  [&](int n, int tile, uint32_t b0, uint32_t b1) { op[n][tile][threadIdx.x % 32] = make_uint2(b0, b1); });
    }

    // put(n, tile, b0, b1) is given a lane's words of each operand.
    template <bool F32, int CODEC, typename M, typename F>
    static __device__ inline float rotate(const attend_call &p, uint32_t kv, float sign, const key_terms<DK, CODEC> &terms,
                                          const M &shared, const raw_queries<NT, DK> &raw, run &r, float (&means)[NT][2], F &&put)
    {
        constexpr int TILES = (DK / 16 + WARPS - 1) / WARPS;
        int warp = threadIdx.x / 32;
        uint32_t q[NT][2 * STEPS], low[NT][2 * STEPS];
        float scale = __ldg(&p.rotation.k.scale[matrix_index(p.rotation, p.layer, kv)]);
        __nv_bfloat162 top = __float2bfloat162_rn(0);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            raw.template operands<F32>(n, q[n], low[n]);
#pragma unroll
            for (int i = 0; i < 2 * STEPS; i++)
                top = __hmax2(top, __habs2(*(__nv_bfloat162 *)&q[n][i]));
        }
        float mine = fmaxf(__low2float(top), __high2float(top));
        if (__float_as_uint(mine) >= 0x7f800000) // a row that is not finite must not touch others
            mine = 0;
        float divisor = magnitude(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(mine))));
        float factor = __fdividef(sign * inverse_power(divisor), scale);
        if constexpr (is_tc(CODEC)) {
            copies_arrived();
            __syncwarp();
#pragma unroll
            for (int n = 0; n < NT; n++)
                query_means<F32, DK>(shared, q[n], low[n], means[n]);
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            int tile = warp + i * WARPS;
            if (tile >= DK / 16)
                break;
            float c[NT][2][2][4] = {}; // independent chains of products
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                if (k % RUN == 0 && k + i > 0)
                    load(p, kv, (i * STEPS + k) / RUN, r);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint4 x = r.part[half][k % RUN];
                    uint32_t a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        mma_bf16(c[n][half][k % 2], a, q[n][2 * k], q[n][2 * k + 1]);
                        if (F32 && half == 0)
                            mma_bf16(c[n][1][k % 2], a, low[n][2 * k], low[n][2 * k + 1]);
                    }
                }
            }
            float f = factor;
            if constexpr (is_tc(CODEC))
                f *= __shfl_sync(~0u, terms.factor, tile);
            else
                f *= slot_factor<CODEC>(tile);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float y[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    y[e] = f * (c[n][0][0][e] + c[n][0][1][e] + (c[n][1][0][e] + c[n][1][1][e]));
                put(n, tile, transpose(pack_fp16(y[0], y[1])), transpose(pack_fp16(y[2], y[3])));
            }
        }
        return divisor;
    }
};

// 2^-24 times the sums over channels of the queries as products see them: what rounding takes from a
// query it takes from both. A product with ones, or with codes of 1, in `sum`'s order of rows. Of tc2 and tc2.5, half of the
// products with the largest codes: what codes about 0 leave of products.
template <int DK, int CODEC>
__device__ inline void sum_queries(const uint2 (&q)[DK / 16], const key_views<DK, CODEC> &views, float (&sum)[2])
{
    float c[4] = {};
    if constexpr (is_tc(CODEC)) {
#pragma unroll
        for (int ct = 0; ct < DK / 16; ct++) {
            const uint32_t a[4] = {views.mask[ct], views.mask[ct], views.mask[ct], views.mask[ct]};
            mma(c, a, q[ct].x, q[ct].y);
        }
        sum[0] = 0.5f * c[0], sum[1] = 0.5f * c[1];
    } else {
#pragma unroll
        for (int ct = 0; ct < DK / 16; ct++) {
            uint32_t one = has_levels(CODEC) ? 0x3c003c00 : 0x00010001u << (2 * (ct % 4));
            const uint32_t a[4] = {one, one, one, one};
            mma(c, a, q[ct].x, q[ct].y);
        }
        sum[0] = has_levels(CODEC) ? c[0] / TWO24 : c[0];
        sum[1] = has_levels(CODEC) ? c[1] / TWO24 : c[1];
    }
}

// -- history -------------------------------------------------------------------------------------

struct tile_place {
    int count;         // tokens of the tile that count: 1 to 64
    uint32_t position; // of the tile's first token
};

// What logits want beside the scores. Scores are in units of 1 / `score_unit` log2 units.
template <int NT> struct logit_terms {
    float score_unit;
    float sign;           // of the scale, or 0: scores are taken times it
    float none;           // less than any score, and not so much less that products overflow
    float softcap;        // in log2 units; 0: none
    float sum[NT][2];     // of the rotated queries, by 2^-24
    float mean[NT][2];    // of tc2 and tc2.5: scores of K's mean
    uint32_t seen[NT][2]; // first and last position that a column sees
    uint32_t last[NT][2];
};

template <bool GENERAL, bool MASKED, int NT>
__device__ inline void mask_scores(const logit_terms<NT> &x, const tile_place &at, int c, int n,
                                   float (&s)[4])
{
    int left = at.count - (int)threadIdx.x % 32 / 4;
    if (GENERAL && x.softcap > 0)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[i] = x.softcap / x.score_unit * tanhf(s[i] * x.score_unit / x.softcap);
    if (MASKED)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = c * 16 + i / 2 * 8; // from the lane's first on
            uint32_t pos = at.position + at.count - left + token;
            if (token >= left ||
                (GENERAL && (pos < x.seen[n][i % 2] || pos > x.last[n][i % 2])))
                s[i] = x.none;
        }
}

// Whether a chunk's values are summed upside down, as max - scale * (largest - code) instead of min + scale * code.
// Codes are not negative: their sums, and those of minima, would grow with the tokens until what is left when they
// cancel is rounding. Those of two chunks of a tile have one sign, of the other two the other. Levels about zero are symmetric.
__host__ __device__ constexpr bool upside_down(int codec, int chunk)
{
    return (!has_levels(codec) || raised(codec)) && (chunk == 1 || chunk == 2);
}

// Probabilities of a chunk, and their product with its values.
template <bool MASKED, int NT, int DK, int DV, int CODEC, int C>
__device__ inline void add_values(const uint8_t *tile_at, uint32_t codec, const tile_place &at, float score_unit,
                                  const float (&s)[NT][4], state<NT, DV> &st)
{
    code_words<DV, value_codec(CODEC)> w;
    w.load(tile_at + tile<DK, DV, CODEC>::v_codes(codec), C);
    float2 p0, p1;
    load_params<CODEC>(tile_at + tile<DK, DV, CODEC>::v_params(codec), codec, C, p0, p1);
    constexpr bool FLIPPED = upside_down(CODEC, C);
    if constexpr (raised(CODEC)) { // products are in RAISED_UNIT, what is added to them is not
        p0 = make_float2(FLIPPED ? -p0.x : p0.x, fmaf((FLIPPED ? 0.5f : -0.5f) * RAISED_UNIT, p0.x, p0.y));
        p1 = make_float2(FLIPPED ? -p1.x : p1.x, fmaf((FLIPPED ? 0.5f : -0.5f) * RAISED_UNIT, p1.x, p1.y));
    } else if (FLIPPED) {
        // Of tc2 and tc2.5, whose levels are about 0, the sums of scales alone say what of minima.
        constexpr float LARGEST = (1 << code_bits(value_codec(CODEC))) - 1; // code
        p0 = make_float2(-p0.x, fmaf(LARGEST, p0.x, p0.y));
        p1 = make_float2(-p1.x, fmaf(LARGEST, p1.x, p1.y));
    }
    if (MASKED) { // what was never written may be anything
        int left = at.count - (int)threadIdx.x % 32 / 4;
        if (C * 16 >= left)
            p0 = make_float2(0, 0);
        if (C * 16 + 8 >= left)
            p1 = make_float2(0, 0);
    }
    uint32_t b[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float m0 = -st.m[n][0] * score_unit, m1 = -st.m[n][1] * score_unit;
        auto power = [&](int i) {
            // Where all scores so far are masked, a fused product would not cancel.
            return MASKED ? fast_exp2((s[n][i] - st.m[n][i % 2]) * score_unit)
                          : fast_exp2(fmaf(s[n][i], score_unit, i % 2 ? m1 : m0));
        };
        float e0 = power(0), e1 = power(1), e2 = power(2), e3 = power(3);
        st.l[n][0] += e0 + e2;
        st.l[n][1] += e1 + e3;
        if constexpr (is_tc(CODEC)) {
            st.zero_sum[n][0] += e0 * p0.x + e2 * p1.x;
            st.zero_sum[n][1] += e1 * p0.x + e3 * p1.x;
        } else if constexpr (!has_levels(CODEC) || raised(CODEC)) { // others have no minima
            st.zero_sum[n][0] += e0 * p0.y + e2 * p1.y;
            st.zero_sum[n][1] += e1 * p0.y + e3 * p1.y;
        }
        b[n][0] = transpose(pack_fp16(e0 * p0.x, e1 * p0.x));
        b[n][1] = transpose(pack_fp16(e2 * p1.x, e3 * p1.x));
    }
    static_for<DV / 16>([&](auto ct) {
        uint32_t a[4];
        w.template summand<C, ct, FLIPPED>(a);
#pragma unroll
        for (int n = 0; n < NT; n++)
            mma(st.o[n][ct], a, b[n][0], b[n][1]);
    });
}

// How many chunks' scores are formed side by side: all four of a tile, so that products wait less for each other, or two, which takes
// fewer registers. Other codecs and head_dims gain nothing by four, or lose by it, nor do sixteen warps, whose tiles are few (LOG.md).
__host__ __device__ constexpr int side_by_side(int codec, int dim, int warps)
{
    bool four = codec == INT2 || codec == INT2C || codec == LEVELS2 || codec == LEVELS3;
    return four && (dim == 64 || dim == 128) && warps <= 8 ? 4 : 2;
}

// One tile. q(n, ct) gives the B operands of the scores. CHUNKS of the tile's four are scored before
// the maxima are raised, SIDE of them side by side.
template <bool GENERAL, bool MASKED, int NT, int DK, int DV, int CODEC, int CHUNKS, int SIDE, typename Q>
__device__ inline void attend_tile(const uint8_t *tile_at, uint32_t codec, const tile_place &at, Q q,
                                   const key_views<DK, CODEC> &views, const logit_terms<NT> &x, state<NT, DV> &st)
{
    static_for<4 / CHUNKS>([&](auto half) {
        float s[CHUNKS][NT][4];
        static_for<CHUNKS / SIDE>([&](auto group) {
            constexpr int first = SIDE * group, c = half * CHUNKS + first;
            std::conditional_t<is_tc(CODEC), key_words<DK, CODEC>, code_words<DK, key_codec(CODEC)>> w[SIDE];
            static_for<SIDE>([&](auto i) {
                if constexpr (is_tc(CODEC))
                    w[i].load(tile_at, codec, c + i);
                else
                    w[i].load(tile_at, c + i);
            });
            if (SIDE == 4) // loads stay in front of it, or ptxas would take one chunk after the other
                __syncwarp();
#pragma unroll
            for (int n = 0; n < SIDE * NT; n++) // raised levels come to be about zero here
#pragma unroll
                for (int k = 0; k < 4; k++)
                    s[first + n % SIDE][n / SIDE][k] = raised(CODEC) ? -0.5f * TWO24 * x.sum[n / SIDE][k % 2] : 0;
            static_for<DK / 16>([&](auto ct) {
                uint32_t a[SIDE][4];
                static_for<SIDE>([&](auto i) {
                    if constexpr (is_tc(CODEC))
                        w[i].template operand<ct>(views, a[i]);
                    else
                        w[i].template summand<c + i, ct, false>(a[i]);
                });
#pragma unroll
                for (int n = 0; n < SIDE * NT; n++) {
                    uint2 b = q(n / SIDE, ct);
                    mma(s[first + n % SIDE][n / SIDE], a[n % SIDE], b.x, b.y);
                }
            });
        });
        static_for<CHUNKS>([&](auto i) {
            constexpr int c = half * CHUNKS + i;
            float2 p0, p1;
            load_params<CODEC>(tile_at + tile<DK, DV, CODEC>::k_params(codec), codec, c, p0, p1);
            if (has_levels(CODEC)) { // scores are in the unit of int2's
                constexpr float UNIT = (raised(CODEC) ? RAISED_UNIT : 1) / TWO24;
                p0.x *= UNIT, p1.x *= UNIT;
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if constexpr (is_tc(CODEC)) {
                        s[i][n][e] = fmaf(p0.x, s[i][n][e] - x.sum[n][e], x.mean[n][e]);
                        s[i][n][2 + e] = fmaf(p1.x, s[i][n][2 + e] - x.sum[n][e], x.mean[n][e]);
                    } else {
                        s[i][n][e] = fmaf(p0.x, s[i][n][e], p0.y * x.sum[n][e]);
                        s[i][n][2 + e] = fmaf(p1.x, s[i][n][2 + e], p1.y * x.sum[n][e]);
                    }
                }
                if (GENERAL || MASKED)
                    mask_scores<GENERAL, MASKED, NT>(x, at, c, n, s[i][n]);
            }
        });
        float top[NT][2];
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                top[n][e] = fmaxf(s[0][n][e], s[0][n][2 + e]);
#pragma unroll
                for (int i = 1; i < CHUNKS; i++)
                    top[n][e] = fmaxf(top[n][e], fmaxf(s[i][n][e], s[i][n][2 + e]));
            }
        st.raise(top, x.score_unit);
        static_for<CHUNKS>([&](auto i) {
            add_values<MASKED, NT, DK, DV, CODEC, half * CHUNKS + i>(tile_at, codec, at, x.score_unit, s[i], st);
        });
    });
}

// -- bf16 tokens ---------------------------------------------------------------------------------

// The tokens that lie in bf16: the sink, then those from `base` on.
struct bf16_tokens {
    uint32_t sink, base, count;
};

template <bool GENERAL> __device__ inline bf16_tokens bf16_tokens_of(const attend_call &p, const row_block &b)
{
    uint32_t sink = min(p.sink, b.length), base = p.codec != KVD_CODEC_BF16 ? b.hist_end : p.sink;
    // Tokens before the sink is full are stored in the sink; the new ones follow what is stored.
    base = max(sink, min(base, b.length));
    // What no row sees may have no page any more: a plane's window frees blocks behind it.
    if (GENERAL)
        base = max(base, first_seen(p, row_position(p, b, b.row0)));
    return {sink, base, sink + (b.total - base)};
}

__device__ inline uint32_t bf16_position(const bf16_tokens &w, uint32_t i)
{
    return i < w.sink ? i : w.base + (i - w.sink);
}

// Row of K or V of a token that lies in bf16.
template <int DK, int DV>
__device__ inline const uint16_t *bf16_row(const attend_call &p, const row_block &b,
                                           uint32_t token, bool v)
{
    constexpr uint32_t TILE = PAGE * 2 * (DK + DV);
    uint32_t dim = v ? DV : DK;
    if (token >= b.length) {
        bool tail = p.tail.tokens;
        const uint16_t *x = tail ? v ? p.tail.v : p.tail.k : v ? p.v : p.k;
        uint64_t row = tail ? (uint64_t)b.s * p.tail.ring + token % p.tail.ring
                            : (uint64_t)b.s * p.new_tokens + (token - b.length);
        return x + (row * p.kv_heads + b.kv) * dim;
    }
    uint32_t entry = token / PAGE, row = token % PAGE;
    const uint64_t *pages = p.pages.bf16 + (uint64_t)b.s * p.pages.bf16_stride;
    if (token >= p.sink && p.codec == KVD_CODEC_BF16 && token < p.pages.hist_end[b.s]) {
        pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
        entry = (token - p.sink) / PAGE;
        row = (token - p.sink) % PAGE;
    } else if (token >= p.sink) {
        uint32_t at = (token - p.sink) % p.ring;
        entry = (p.sink + PAGE - 1) / PAGE + at / PAGE;
        row = at % PAGE;
    }
    const uint8_t *page = (const uint8_t *)pages[entry];
    uint64_t offset = ((uint64_t)p.layer * p.kv_heads + b.kv) * TILE + (v ? PAGE * 2 * DK : 0);
    return (const uint16_t *)(page + offset + row * 2 * dim);
}

// Channels are dealt to operands so that a lane's 16-byte loads are operands at once (forward_channel).
// The same loads of V, transposed, give the i-th row of the output products this channel.
__device__ inline int window_channel(int i)
{
    return i / 32 * 32 + i % 8 / 2 * 8 + i / 16 % 2 * 4 + i / 8 % 2 * 2 + i % 2;
}

// 16 bf16 tokens, the i-th to i+15-th.
template <bool F32, int NT, int DK, int DV>
__device__ inline void attend_bf16_chunk(const attend_call &p, const row_block &b,
                                         const bf16_tokens &w, uint32_t i,
                                         const uint32_t (&q)[NT][padded(DK) / 8],
                                         const uint32_t (&q_low)[NT][padded(DK) / 8],
                                         const logit_terms<NT> &x, state<NT, padded(DV)> &st)
{
    constexpr int K_GROUPS = padded(DK) / 32, V_GROUPS = padded(DV) / 32;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t i0 = i + g, i1 = i + g + 8;
    uint32_t pos0 = bf16_position(w, min(i0, w.count - 1));
    uint32_t pos1 = bf16_position(w, min(i1, w.count - 1));
    const uint4 *k0 = (const uint4 *)bf16_row<DK, DV>(p, b, pos0, false) + t;
    const uint4 *k1 = (const uint4 *)bf16_row<DK, DV>(p, b, pos1, false) + t;
    const uint4 *v0 = (const uint4 *)bf16_row<DK, DV>(p, b, pos0, true) + t;
    const uint4 *v1 = (const uint4 *)bf16_row<DK, DV>(p, b, pos1, true) + t;
    constexpr int AHEAD = NT == 1 && DV <= 128 ? V_GROUPS : 0; // of V's loads before the scores
    uint4 rows_v[2][AHEAD + 1];
    float s[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    uint4 rows_k[2][K_GROUPS];
#pragma unroll
    for (int j = 0; j < K_GROUPS; j++) {
        rows_k[0][j] = in_row<DK>(j) ? k0[j * 4] : uint4{};
        rows_k[1][j] = in_row<DK>(j) ? k1[j * 4] : uint4{};
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
        rows_v[0][j] = in_row<DV>(j) ? v0[j * 4] : uint4{};
        rows_v[1][j] = in_row<DV>(j) ? v1[j * 4] : uint4{};
    }
#pragma unroll
    for (int j = 0; j < K_GROUPS; j++) {
        uint4 r0 = rows_k[0][j], r1 = rows_k[1][j];
        uint32_t a0[4] = {r0.x, r1.x, r0.y, r1.y}, a1[4] = {r0.z, r1.z, r0.w, r1.w};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            mma_bf16(s[n], a0, q[n][4 * j], q[n][4 * j + 1]);
            mma_bf16(s[n], a1, q[n][4 * j + 2], q[n][4 * j + 3]);
            if (F32) {
                mma_bf16(s[n], a0, q_low[n][4 * j], q_low[n][4 * j + 1]);
                mma_bf16(s[n], a1, q_low[n][4 * j + 2], q_low[n][4 * j + 3]);
            }
        }
    }
    uint32_t high[NT][2], low[NT][2];
    float top[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            uint32_t pos = e < 2 ? pos0 : pos1, index = e < 2 ? i0 : i1;
            s[n][e] = fmaf(s[n][e], 0, s[n][e] * x.sign); // an infinite one is not a number
            if (x.softcap > 0)
                s[n][e] = x.softcap / x.score_unit * tanhf(s[n][e] * x.score_unit / x.softcap);
            if (index >= w.count || pos < x.seen[n][e % 2] || pos > x.last[n][e % 2])
                s[n][e] = x.none;
        }
        top[n][0] = fmaxf(s[n][0], s[n][2]), top[n][1] = fmaxf(s[n][1], s[n][3]);
    }
    st.raise(top, x.score_unit);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float e0 = fast_exp2((s[n][2 * half] - st.m[n][0]) * x.score_unit);
            float e1 = fast_exp2((s[n][2 * half + 1] - st.m[n][1]) * x.score_unit);
            st.l[n][0] += e0;
            st.l[n][1] += e1;
            uint32_t h = pack_bf16(e0, e1); // two bf16 hold 16 bits of a probability
            low[n][half] = transpose(pack_bf16(e0 - low_bf16(h), e1 - high_bf16(h)));
            high[n][half] = transpose(h);
        }
#pragma unroll
    for (int j = 0; j < V_GROUPS; j++) {
        uint4 r0 = j < AHEAD ? rows_v[0][j] : in_row<DV>(j) ? v0[j * 4] : uint4{};
        uint4 r1 = j < AHEAD ? rows_v[1][j] : in_row<DV>(j) ? v1[j * 4] : uint4{};
        uint32_t a0[4] = {transpose(r0.x), transpose(r0.y), transpose(r1.x), transpose(r1.y)};
        uint32_t a1[4] = {transpose(r0.z), transpose(r0.w), transpose(r1.z), transpose(r1.w)};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            mma_bf16(st.o[n][2 * j], a0, high[n][0], high[n][1]);
            mma_bf16(st.o[n][2 * j], a0, low[n][0], low[n][1]);
            mma_bf16(st.o[n][2 * j + 1], a1, high[n][0], high[n][1]);
            mma_bf16(st.o[n][2 * j + 1], a1, low[n][0], low[n][1]);
        }
    }
}

} // namespace kvd

#endif
