// The inner loops over vectors of V floats, written once. The including file defines V and the
// vector operations:
//   vf, vi                     vectors of V floats, V 32-bit integers
//   v_zero, v_set1, v_load, v_store, v_fma(a, b, c) = a*b+c, v_mul, v_add, v_max
//   v_words(p)                 V words from memory
//   v_table(four)              four floats, for:
//   v_pick(table, w, shift)    which of them the two bits at `shift` of each word say
//   v_select(a, b, w, bit)     b where the bit is set, a elsewhere
//   v_flip(x, w, bit)          -x where the bit is set
//   v_bf16(p)                  V bf16 from memory as floats
//   v_sum(v)                   sum of the lanes
//   v_exp(v)                   exp, relative error under 1e-6, 0 below -87
// A *group* is 16 words, the words of lanes 4g .. 4g+3 of a unit: G = 16 / V vectors. Word t*4 + r
// of group g holds, for K, token g + 8(r & 1) and channels 2t + 8(r >> 1) + e of a channel tile;
// for V, channel g + 8(r & 1) and tokens 2t + 8(r >> 1) + e of a chunk, with e in {0, 1} for the
// low and high half of the word.

enum { G = 16 / V };

// The order in which the 16 channels of a tile (or tokens of a chunk) meet the words of a group.
static void spread16(const float *x, float *out)
{
    for (int e = 0; e < 2; e++)
        for (int i = 0; i < 16; i++)
            out[e * 16 + i] = x[2 * (i / 4) + 8 * (i % 4 / 2) + e];
}

static void simd_q_prepare(const float *q, uint32_t dim, float *out)
{
    for (uint32_t tile = 0; tile < dim / 16; tile++)
        spread16(q + tile * 16, out + tile * 32);
}

// Sums the 16 lanes of acc whose register index is even (first token) and odd (second).
static inline __attribute__((always_inline)) void fold_pairs(const vf acc[G], float *even,
                                                             float *odd)
{
    float lane[16] __attribute__((aligned(64)));
    for (int i = 0; i < G; i++)
        v_store(lane + i * V, acc[i]);
    float s[4];
    for (int r = 0; r < 4; r++)
        s[r] = (lane[r] + lane[4 + r]) + (lane[8 + r] + lane[12 + r]);
    *even = s[0] + s[2];
    *odd = s[1] + s[3];
}

// What codes of `bits` bits mean: `low` for two bits, or for the first four magnitudes, `high` for
// the others.
struct levels {
    vf low, high;
};

static inline struct levels levels_of(uint32_t codec)
{
    const float *l = kvd_cpu_levels(codec);
    return (struct levels){v_table(l), v_table(kvd_codec_bits(codec) == 4 ? l + 4 : l)};
}

// Where the words of some channel tiles of a chunk lie, for G vectors from word group g on, and the
// first tile's bits in them.
struct code_words {
    const uint8_t *at, *more; // of the second plane
    uint32_t shift, more_shift;
};

static inline __attribute__((always_inline)) struct code_words
words_of(const uint32_t bits, const uint8_t *codes, uint32_t dim, uint32_t chunk, uint32_t tile,
         uint32_t g)
{
    uint32_t at = kvd_unit_of(dim, chunk, tile) * KVD_UNIT_BYTES + g * 64;
    struct code_words w = {codes + at, codes + at, 2 * kvd_slot_of(dim, chunk, tile), 0};
    if (bits == 4) {
        w.more += kvd_codes_bytes(KVD_CODEC_INT2, dim);
        w.more_shift = w.shift;
    } else if (bits == 3) {
        w.more = codes + kvd_codes_bytes(KVD_CODEC_INT2, dim) +
                 kvd_bit_unit_of(dim, chunk) * KVD_UNIT_BYTES + g * 64;
        w.more_shift = kvd_bit_slot_of(dim, chunk, tile);
    }
    return w;
}

// The levels of the codes in slot `slot` after the first, low or high half of the words.
static inline __attribute__((always_inline)) vf level_of(const uint32_t bits,
                                                         const struct levels *l,
                                                         const struct code_words *w, vi words,
                                                         vi more, uint32_t slot, uint32_t half)
{
    uint32_t shift = w->shift + 2 * slot + half;
    vf x = v_pick(l->low, words, shift);
    if (bits == 4) {
        uint32_t bit = w->more_shift + 2 * slot + half;
        x = v_flip(v_select(x, v_pick(l->high, words, shift), more, bit), more, bit + 1);
    } else if (bits == 3) {
        x = v_flip(x, more, w->more_shift + slot + half);
    }
    return x;
}

static inline __attribute__((always_inline)) void
k_scores_rows(const uint32_t bits, struct levels l, const uint8_t *codes, uint32_t dim,
              const float *q, const uint32_t rows, float *scores)
{
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        for (uint32_t g = 0; g < 8; g++) {
            vf acc[KVD_CPU_ROWS][G];
            for (uint32_t r = 0; r < rows; r++)
                for (int i = 0; i < G; i++)
                    acc[r][i] = v_zero();
            for (uint32_t block = 0; block < dim / 64; block++) {
                struct code_words at = words_of(bits, codes, dim, chunk, block * 4, g);
                const float *qb = q + block * 128;
                for (int i = 0; i < G; i++) {
                    vi w = v_words(at.at + i * V * 4), more = v_words(at.more + i * V * 4);
                    for (uint32_t slot = 0; slot < 4; slot++) {
                        vf lo = level_of(bits, &l, &at, w, more, slot, 0);
                        vf hi = level_of(bits, &l, &at, w, more, slot, 16);
                        for (uint32_t r = 0; r < rows; r++) {
                            const float *qr = qb + r * 2 * dim + slot * 32 + i * V;
                            acc[r][i] = v_fma(lo, v_load(qr), acc[r][i]);
                            acc[r][i] = v_fma(hi, v_load(qr + 16), acc[r][i]);
                        }
                    }
                }
            }
            for (uint32_t r = 0; r < rows; r++) {
                float *s = scores + r * KVD_PAGE_TOKENS + chunk * 16 + g;
                fold_pairs(acc[r], s, s + 8);
            }
        }
    }
}

static inline __attribute__((always_inline)) void
k_scores_bits(const uint32_t bits, struct levels l, const uint8_t *codes, uint32_t dim,
              const float *q, uint32_t rows, float *scores)
{
    if (rows == 4 && dim == 128)
        k_scores_rows(bits, l, codes, 128, q, 4, scores);
    else if (rows == 4)
        k_scores_rows(bits, l, codes, dim, q, 4, scores);
    else if (rows == 3)
        k_scores_rows(bits, l, codes, dim, q, 3, scores);
    else if (rows == 2)
        k_scores_rows(bits, l, codes, dim, q, 2, scores);
    else
        k_scores_rows(bits, l, codes, dim, q, 1, scores);
}

static void simd_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                          uint32_t rows, float *scores)
{
    uint32_t bits = kvd_codec_bits(codec);
    if (bits == 2)
        k_scores_bits(2, levels_of(codec), codes, dim, q, rows, scores);
    else if (bits == 3)
        k_scores_bits(3, levels_of(codec), codes, dim, q, rows, scores);
    else
        k_scores_bits(4, levels_of(codec), codes, dim, q, rows, scores);
}

// acc of one row: [g 8][channel tile][16 lanes].
static inline __attribute__((always_inline)) void
v_accumulate_rows(const uint32_t bits, struct levels l, const uint8_t *codes, uint32_t dim,
                  const float *spread, const uint32_t rows, float *acc)
{
    enum { SLOTS = V == 16 ? 4 : 2 }; // accumulators that fit the registers
    for (uint32_t g = 0; g < 8; g++) {
        for (uint32_t tile = 0; tile < dim / 16; tile += SLOTS) {
            for (int i = 0; i < G; i++) {
                float *at = acc + (g * (dim / 16) + tile) * 16 + i * V;
                vf a[KVD_CPU_ROWS][SLOTS];
                for (uint32_t r = 0; r < rows; r++)
                    for (int s = 0; s < SLOTS; s++)
                        a[r][s] = v_load(at + r * 8 * dim + s * 16);
                for (uint32_t chunk = 0; chunk < 4; chunk++) {
                    struct code_words where = words_of(bits, codes, dim, chunk, tile, g);
                    vi w = v_words(where.at + i * V * 4), more = v_words(where.more + i * V * 4);
                    for (int s = 0; s < SLOTS; s++) {
                        vf lo = level_of(bits, &l, &where, w, more, (uint32_t)s, 0);
                        vf hi = level_of(bits, &l, &where, w, more, (uint32_t)s, 16);
                        for (uint32_t r = 0; r < rows; r++) {
                            const float *p = spread + (r * 4 + chunk) * 32 + i * V;
                            a[r][s] = v_fma(lo, v_load(p), a[r][s]);
                            a[r][s] = v_fma(hi, v_load(p + 16), a[r][s]);
                        }
                    }
                }
                for (uint32_t r = 0; r < rows; r++)
                    for (int s = 0; s < SLOTS; s++)
                        v_store(at + r * 8 * dim + s * 16, a[r][s]);
            }
        }
    }
}

static inline __attribute__((always_inline)) void
v_accumulate_bits(const uint32_t bits, struct levels l, const uint8_t *codes, uint32_t dim,
                  const float *spread, uint32_t rows, float *acc)
{
    if (rows == 4 && dim == 128)
        v_accumulate_rows(bits, l, codes, 128, spread, 4, acc);
    else if (rows == 4)
        v_accumulate_rows(bits, l, codes, dim, spread, 4, acc);
    else if (rows == 3)
        v_accumulate_rows(bits, l, codes, dim, spread, 3, acc);
    else if (rows == 2)
        v_accumulate_rows(bits, l, codes, dim, spread, 2, acc);
    else
        v_accumulate_rows(bits, l, codes, dim, spread, 1, acc);
}

static void simd_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                              uint32_t rows, float *acc)
{
    uint32_t bits = kvd_codec_bits(codec);
    float spread[KVD_CPU_ROWS * 4 * 32] __attribute__((aligned(64)));
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t chunk = 0; chunk < 4; chunk++)
            spread16(p + r * KVD_PAGE_TOKENS + chunk * 16, spread + (r * 4 + chunk) * 32);
    if (bits == 2)
        v_accumulate_bits(2, levels_of(codec), codes, dim, spread, rows, acc);
    else if (bits == 3)
        v_accumulate_bits(3, levels_of(codec), codes, dim, spread, rows, acc);
    else
        v_accumulate_bits(4, levels_of(codec), codes, dim, spread, rows, acc);
}

static void simd_v_reduce(const float *acc, uint32_t dim, float *o)
{
    for (uint32_t g = 0; g < 8; g++)
        for (uint32_t tile = 0; tile < dim / 16; tile++) {
            const float *lane = acc + (g * (dim / 16) + tile) * 16;
            for (uint32_t half = 0; half < 2; half++) {
                float sum = 0;
                for (int i = 0; i < 16; i += 2)
                    sum += lane[i + (int)half];
                o[tile * 16 + g + 8 * half] = sum;
            }
        }
}

static inline __attribute__((always_inline)) void
bf16_scores_rows(const uint8_t *k, uint64_t stride, uint32_t n, uint32_t dim, const float *q,
                 const uint32_t rows, float *scores)
{
    for (uint32_t t = 0; t < n; t++) {
        const uint8_t *row = k + t * stride;
        vf acc[KVD_CPU_ROWS];
        for (uint32_t r = 0; r < rows; r++)
            acc[r] = v_zero();
        for (uint32_t c = 0; c < dim; c += V) {
            vf x = v_bf16(row + c * 2);
            for (uint32_t r = 0; r < rows; r++)
                acc[r] = v_fma(x, v_load(q + r * dim + c), acc[r]);
        }
        for (uint32_t r = 0; r < rows; r++)
            scores[r * KVD_PAGE_TOKENS + t] = v_sum(acc[r]);
    }
}

static void simd_bf16_scores(const uint8_t *k, uint64_t stride, uint32_t n, uint32_t dim,
                             const float *q, uint32_t rows, float *scores)
{
    if (rows == 4)
        bf16_scores_rows(k, stride, n, dim, q, 4, scores);
    else
        for (uint32_t r = 0; r < rows; r++)
            bf16_scores_rows(k, stride, n, dim, q + r * dim, 1, scores + r * KVD_PAGE_TOKENS);
}

static inline __attribute__((always_inline)) void
bf16_accumulate_rows(const uint8_t *v, uint64_t stride, uint32_t n, uint32_t dim, const float *p,
                     const uint32_t rows, float *o)
{
    for (uint32_t c = 0; c < dim; c += V) {
        vf acc[KVD_CPU_ROWS];
        for (uint32_t r = 0; r < rows; r++)
            acc[r] = v_load(o + r * dim + c);
        for (uint32_t t = 0; t < n; t++) {
            vf x = v_bf16(v + t * stride + c * 2);
            for (uint32_t r = 0; r < rows; r++)
                acc[r] = v_fma(x, v_set1(p[r * KVD_PAGE_TOKENS + t]), acc[r]);
        }
        for (uint32_t r = 0; r < rows; r++)
            v_store(o + r * dim + c, acc[r]);
    }
}

static void simd_bf16_accumulate(const uint8_t *v, uint64_t stride, uint32_t n, uint32_t dim,
                                 const float *p, uint32_t rows, float *o)
{
    if (rows == 4)
        bf16_accumulate_rows(v, stride, n, dim, p, 4, o);
    else
        for (uint32_t r = 0; r < rows; r++)
            bf16_accumulate_rows(v, stride, n, dim, p + r * KVD_PAGE_TOKENS, 1, o + r * dim);
}

static float simd_exp_sum(float *s, float m)
{
    vf sum = v_zero(), minus = v_set1(-m);
    for (uint32_t i = 0; i < KVD_PAGE_TOKENS; i += V) {
        vf x = v_exp(v_add(v_load(s + i), minus));
        v_store(s + i, x);
        sum = v_add(sum, x);
    }
    return v_sum(sum);
}

static void simd_scale(float *x, uint32_t n, float f)
{
    for (uint32_t i = 0; i < n; i += V)
        v_store(x + i, v_mul(v_load(x + i), v_set1(f)));
}

// Four rows by four vectors of outputs at a time: 16 accumulators (8 for V = 8).
static inline __attribute__((always_inline)) void
rotate_rows(const float *x, const uint32_t rows, uint32_t dim, const float *m, float *y)
{
    enum { COLS = V == 16 ? 4 : 2 };
    for (uint32_t c = 0; c < dim; c += COLS * V) {
        vf acc[KVD_CPU_ROWS][COLS];
        for (uint32_t r = 0; r < rows; r++)
            for (int j = 0; j < COLS; j++)
                acc[r][j] = v_zero();
        for (uint32_t i = 0; i < dim; i++) {
            for (int j = 0; j < COLS; j++) {
                vf w = v_load(m + (uint64_t)i * dim + c + (uint32_t)j * V);
                for (uint32_t r = 0; r < rows; r++)
                    acc[r][j] = v_fma(v_set1(x[r * dim + i]), w, acc[r][j]);
            }
        }
        for (uint32_t r = 0; r < rows; r++)
            for (int j = 0; j < COLS; j++)
                v_store(y + r * dim + c + (uint32_t)j * V, acc[r][j]);
    }
}

static void simd_rotate(const float *x, uint32_t rows, uint32_t dim, const float *m, float *y)
{
    for (; rows >= 4; rows -= 4, x += 4 * dim, y += 4 * dim)
        rotate_rows(x, 4, dim, m, y);
    for (; rows > 0; rows--, x += dim, y += dim)
        rotate_rows(x, 1, dim, m, y);
}

#define KVD_SIMD_TABLE(isa_name, isa_supported)                                                    \
    {                                                                                              \
        .name = isa_name, .supported = isa_supported, .q_prepare = simd_q_prepare,                 \
        .k_scores = simd_k_scores, .v_accumulate = simd_v_accumulate, .v_reduce = simd_v_reduce,   \
        .bf16_scores = simd_bf16_scores, .bf16_accumulate = simd_bf16_accumulate,                  \
        .exp_sum = simd_exp_sum, .scale = simd_scale, .rotate = simd_rotate,                       \
    }
