// The inner loops over vectors of V floats, written once. The including file defines V and the
// vector operations:
//   vf, vi                     vectors of V floats, V 32-bit integers
//   v_zero, v_set1, v_load, v_store, v_fma(a, b, c) = a*b+c, v_mul, v_add
//   v_max(a, b)                b where one of them is NaN
//   v_words(p)                 V words from memory
//   v_spread8(p), 4, 2, 1      V words from V / 4 * (8, 4, 2, 1) bytes: words 4i to 4i + 3 are the
//   i-th 8, 4, 2 or
//                              1 bytes, so shifted that the bits of register 0, 1, 2, 3 come to the
//                              low end of a half
//   v_table(four)              four floats, for:
//   v_pick(table, w, shift)    which of them the two bits at `shift` of each word say
//   v_select(a, b, w, bit)     b where the bit is set, a elsewhere
//   v_flip(x, w, bit)          -x where the bit is set
//   v_or(a, b), v_low(w, n)    of words; their n lowest bits
//   v_right(w, n), v_left      words shifted by n bits, the same for all
//   v_centred(bits)            for v_level: levels code - (2^bits - 1) / 2, bits 1 to 4
//   v_level(bits, table, w)    which of them the lowest bits of each word say
//   v_bf16(p)                  V bf16 from memory as floats
//   v_sum(v)                   sum of the lanes
//   v_exp(v)                   exp, relative error under 1e-6, 0 below -87
// A *group* is 16 words, the words of lanes 4g .. 4g+3 of a load: G = 16 / V vectors. Word t*4 + r
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
static KVD_BY_CASE void fold_pairs(const vf acc[G], float *even, float *odd)
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

// What loops are compiled for: codes of two, three and four bits, and of four whose levels are
// even.
enum { EVEN_4 = 5 };

// What codes mean: `low` for two bits, or for the first four magnitudes, `high` for the others.
// With EVEN_4 a level is the sum of what `low` has for the two low bits and `high` for the others.
struct levels {
    vf low, high;
};

static inline struct levels levels_of(uint32_t codec)
{
    static const float ones[] = {0, 1, 2, 3}, fours[] = {-7.5f, -3.5f, 0.5f, 4.5f};
    const float *l = kvd_cpu_levels(codec);
    if (kvd_codec_bits(codec) == 4 && !kvd_codec_signed(codec))
        return (struct levels){v_table(ones), v_table(fours)};
    return (struct levels){v_table(l), v_table(kvd_codec_bits(codec) == 4 ? l + 4 : l)};
}

// A plane's words of up to four channel tiles of a chunk, from word group g on: pieces of `lane`
// bytes a lane.
struct plane_words {
    const uint8_t *at;
    uint32_t shift; // of the first tile's bits
    uint32_t lane;
};

// What some channel tiles of a chunk have in both planes, the second one where there is one.
struct code_words {
    struct plane_words low, more;
};

// `lane` is known when this is compiled, as `kind` is.
static KVD_BY_CASE struct plane_words plane_of(const uint32_t width, const uint32_t lane,
                                               const uint8_t *plane, uint32_t dim, uint32_t chunk,
                                               uint32_t tile, uint32_t g)
{
    struct kvd_piece p = {tile / 8 * 8, lane, 0}; // dims whose pieces are all alike
    uint32_t chunks = 1, bytes = 2 * width * dim;
    if (kvd_side_by_side(dim, width)) {
        p.first = 0;
        chunks = 16 / (width * dim / 16);
        bytes = KVD_UNIT_BYTES;
    } else if (width == 1 || lane < 16) {
        p = kvd_piece_of(dim, width, tile);
    } else {
        p.at = p.first / 8 * KVD_UNIT_BYTES;
    }
    uint32_t shift = (tile - p.first) * width + chunk % chunks * (16 / chunks);
    return (struct plane_words){plane + chunk / chunks * bytes + p.at + g * 4 * lane, shift, lane};
}

static KVD_BY_CASE struct code_words words_of(const uint32_t kind, const uint32_t lane,
                                              const uint32_t more_lane, const uint8_t *codes,
                                              uint32_t dim, uint32_t chunk, uint32_t tile,
                                              uint32_t g)
{
    const uint8_t *more = codes + kvd_codes_bytes(KVD_CODEC_INT2, dim, false);
    struct code_words w = {plane_of(2, lane, codes, dim, chunk, tile, g), {0}};
    if (kind >= 4)
        w.more = plane_of(2, lane, more, dim, chunk, tile, g);
    else if (kind == 3)
        w.more = plane_of(1, more_lane, more, dim, chunk, tile, g);
    return w;
}

// The i-th vector of a group.
static KVD_BY_CASE vi load_words(const struct plane_words *w, int i)
{
    const uint8_t *p = w->at + (uint32_t)i * (V / 4) * w->lane;
    return w->lane == 16  ? v_words(p)
           : w->lane == 8 ? v_spread8(p)
           : w->lane == 4 ? v_spread4(p)
           : w->lane == 2 ? v_spread2(p)
                          : v_spread1(p);
}

// Where second elements lie, from first ones on.
static KVD_BY_CASE uint32_t half_of(const struct plane_words *w)
{
    return w->lane < 4 ? 4 * w->lane : 16;
}

// The levels of the codes of channel tile `slot` after the first, low or high half of the words.
static KVD_BY_CASE vf level_of(const uint32_t kind, const struct levels *l,
                               const struct code_words *w, vi words, vi more, uint32_t slot,
                               uint32_t high)
{
    uint32_t shift = w->low.shift + 2 * slot + high * half_of(&w->low);
    vf x = v_pick(l->low, words, shift);
    if (kind == EVEN_4) {
        x = v_add(x, v_pick(l->high, more, w->more.shift + 2 * slot + high * half_of(&w->more)));
    } else if (kind == 4) {
        uint32_t bit = w->more.shift + 2 * slot + high * half_of(&w->more);
        x = v_flip(v_select(x, v_pick(l->high, words, shift), more, bit), more, bit + 1);
    } else if (kind == 3) {
        x = v_flip(x, more, w->more.shift + slot + high * half_of(&w->more));
    }
    return x;
}

// Calls f(lane, more_lane, tiles, tile, ...) for all channel tiles, four at a time as far as they
// go. In words of 16 bytes a lane lie all tiles of some dims; the others' last ones in smaller
// pieces.
#define EACH_TILES(f, dim, ...)                                                                    \
    do {                                                                                           \
        uint32_t tile_ = 0, tiles_ = (dim) / 16;                                                   \
        if (tiles_ % 8 == 0 || tiles_ == 4) {                                                      \
            for (; tile_ < tiles_; tile_ += 4)                                                     \
                f(16, 16, 4, tile_, __VA_ARGS__);                                                  \
            break;                                                                                 \
        }                                                                                          \
        for (; tile_ + 8 <= tiles_; tile_ += 8) {                                                  \
            f(16, 8, 4, tile_, __VA_ARGS__);                                                       \
            f(16, 8, 4, tile_ + 4, __VA_ARGS__);                                                   \
        }                                                                                          \
        if (tile_ + 4 <= tiles_) {                                                                 \
            f(8, 4, 4, tile_, __VA_ARGS__);                                                        \
            tile_ += 4;                                                                            \
        }                                                                                          \
        if (tile_ + 2 <= tiles_) {                                                                 \
            f(4, 2, 2, tile_, __VA_ARGS__);                                                        \
            tile_ += 2;                                                                            \
        }                                                                                          \
        if (tile_ < tiles_)                                                                        \
            f(2, 1, 1, tile_, __VA_ARGS__);                                                        \
    } while (0)

// Adds the products of some channel tiles to the scores of a group's tokens.
static KVD_BY_CASE void k_scores_tiles(const uint32_t lane, const uint32_t more_lane,
                                       const uint32_t tiles, uint32_t tile, const uint32_t kind,
                                       const struct levels *l, const uint8_t *codes, uint32_t dim,
                                       uint32_t chunk, uint32_t g, const float *q,
                                       const uint32_t rows, vf acc[KVD_CPU_ROWS][G])
{
    struct code_words at = words_of(kind, lane, more_lane, codes, dim, chunk, tile, g);
    for (int i = 0; i < G; i++) {
        vi w = load_words(&at.low, i), more = kind > 2 ? load_words(&at.more, i) : w;
        for (uint32_t slot = 0; slot < tiles; slot++) {
            vf lo = level_of(kind, l, &at, w, more, slot, 0);
            vf hi = level_of(kind, l, &at, w, more, slot, 1);
            for (uint32_t r = 0; r < rows; r++) {
                const float *qr = q + r * 2 * dim + (tile + slot) * 32 + (uint32_t)(i * V);
                acc[r][i] = v_fma(lo, v_load(qr), acc[r][i]);
                acc[r][i] = v_fma(hi, v_load(qr + 16), acc[r][i]);
            }
        }
    }
}

static KVD_BY_CASE void k_scores_rows(const uint32_t kind, struct levels l, const uint8_t *codes,
                                      uint32_t dim, const float *q, const uint32_t rows,
                                      float *scores)
{
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        for (uint32_t g = 0; g < 8; g++) {
            vf acc[KVD_CPU_ROWS][G];
            for (uint32_t r = 0; r < rows; r++)
                for (int i = 0; i < G; i++)
                    acc[r][i] = v_zero();
            EACH_TILES(k_scores_tiles, dim, kind, &l, codes, dim, chunk, g, q, rows, acc);
            for (uint32_t r = 0; r < rows; r++) {
                float *s = scores + r * KVD_PAGE_TOKENS + chunk * 16 + g;
                fold_pairs(acc[r], s, s + 8);
            }
        }
    }
}

static KVD_BY_CASE void k_scores_kind(const uint32_t kind, struct levels l, const uint8_t *codes,
                                      uint32_t dim, const float *q, uint32_t rows, float *scores)
{
    if (rows == 4 && dim == 128)
        k_scores_rows(kind, l, codes, 128, q, 4, scores);
    else if (rows == 4)
        k_scores_rows(kind, l, codes, dim, q, 4, scores);
    else if (rows == 3)
        k_scores_rows(kind, l, codes, dim, q, 3, scores);
    else if (rows == 2)
        k_scores_rows(kind, l, codes, dim, q, 2, scores);
    else
        k_scores_rows(kind, l, codes, dim, q, 1, scores);
}

static void simd_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                          uint32_t rows, float *scores)
{
    uint32_t bits = kvd_codec_bits(codec);
    if (bits == 4 && !kvd_codec_signed(codec))
        k_scores_kind(EVEN_4, levels_of(codec), codes, dim, q, rows, scores);
    else if (bits == 2)
        k_scores_kind(2, levels_of(codec), codes, dim, q, rows, scores);
    else if (bits == 3)
        k_scores_kind(3, levels_of(codec), codes, dim, q, rows, scores);
    else
        k_scores_kind(4, levels_of(codec), codes, dim, q, rows, scores);
}

// -- transform coding ----------------------------------------------------------------------------

// The pieces of K's stream in a chunk (tc.h), and its channel tiles in runs of one width.
struct tc_plan {
    uint32_t dim, pieces, runs;
    struct {
        uint32_t lane, before; // bytes a lane, bits of the stream before it
    } piece[8];
    struct {
        uint32_t bits, tile, tiles, at; // at: of the first tile's bits in the stream
    } run[KVD_TC_MAX_TILES];
};

static struct tc_plan tc_plan_of(const struct kvd_tc_coder *t)
{
    struct tc_plan p = {.dim = t->dim};
    uint32_t all = 0;
    for (uint32_t i = 0; i < t->dim / 16; all += t->bits[i++]) {
        if (t->bits[i] == 0)
            continue;
        if (p.runs && p.run[p.runs - 1].bits == t->bits[i] && t->bits[i] == t->bits[i - 1])
            p.run[p.runs - 1].tiles++;
        else
            p.run[p.runs++] = (__typeof__(p.run[0])){t->bits[i], i, 1, all};
    }
    for (uint32_t lane = 16, before = 0; before < all; before += lane) {
        while (before + lane > all)
            lane /= 2;
        p.piece[p.pieces++] = (__typeof__(p.piece[0])){lane, before};
    }
    return p;
}

// The bits of first and of second elements of a vector of lanes: of the whole stream, joined. Where
// it is a piece, with what else its words have above.
struct tc_words {
    vi first[2], second[2];
};

static KVD_BY_CASE struct tc_words tc_load(const struct tc_plan *p, const bool one, const bool wide,
                                           const uint8_t *chunk, uint32_t g, int i)
{
    struct tc_words all = {0};
    for (uint32_t n = 0; n < (one ? 1 : p->pieces); n++) {
        uint32_t lane = p->piece[n].lane, before = p->piece[n].before;
        struct plane_words w = {chunk + KVD_LANES * before + g * 4 * lane, 0, lane};
        vi x = load_words(&w, i), y = v_right(x, half_of(&w));
        uint32_t word = wide && before >= 32;
        if (one) {
            all.first[0] = x;
            all.second[0] = y;
            break;
        }
        all.first[word] = v_or(all.first[word], v_left(v_low(x, lane), before % 32));
        all.second[word] = v_or(all.second[word], v_left(v_low(y, lane), before % 32));
    }
    return all;
}

// The bits from `at` on, as the low ones.
static KVD_BY_CASE vi tc_bits(const bool wide, const vi words[2], uint32_t at)
{
    if (!wide || at == 0)
        return v_right(words[0], at);
    return at < 32 ? v_or(v_right(words[0], at), v_left(words[1], 32 - at))
                   : v_right(words[1], at - 32);
}

// Adds the products of a run's channel tiles.
static KVD_BY_CASE void tc_run(const uint32_t bits, const bool wide, const struct tc_words *w,
                               uint32_t tile, uint32_t tiles, uint32_t at, const float *q,
                               uint32_t dim, const uint32_t rows, vf acc[KVD_CPU_ROWS])
{
    vf table = v_centred(bits);
    q += tile * 32;
    for (uint32_t n = 0; n < tiles; n++, at += bits, q += 32) {
        vf lo = v_level(bits, table, tc_bits(wide, w->first, at));
        vf hi = v_level(bits, table, tc_bits(wide, w->second, at));
        for (uint32_t r = 0; r < rows; r++) {
            acc[r] = v_fma(lo, v_load(q + r * 2 * dim), acc[r]);
            acc[r] = v_fma(hi, v_load(q + r * 2 * dim + 16), acc[r]);
        }
    }
}

static KVD_BY_CASE void tc_scores_rows(const struct tc_plan *p, const bool one, const bool wide,
                                       const uint8_t *codes, uint32_t chunk_bytes, const float *q,
                                       const uint32_t rows, float *scores)
{
    for (uint32_t group = 0; group < 32; group++) {
        uint32_t chunk = group / 8, g = group % 8;
        vf acc[G][KVD_CPU_ROWS], turned[KVD_CPU_ROWS][G];
        for (int i = 0; i < G; i++) {
            struct tc_words w = tc_load(p, one, wide, codes + chunk * chunk_bytes, g, i);
            for (uint32_t r = 0; r < rows; r++)
                acc[i][r] = v_zero();
            for (uint32_t n = 0; n < p->runs; n++) {
                uint32_t tile = p->run[n].tile, tiles = p->run[n].tiles, at = p->run[n].at;
                const float *qi = q + i * V;
                if (p->run[n].bits == 1)
                    tc_run(1, wide, &w, tile, tiles, at, qi, p->dim, rows, acc[i]);
                else if (p->run[n].bits == 2)
                    tc_run(2, wide, &w, tile, tiles, at, qi, p->dim, rows, acc[i]);
                else if (p->run[n].bits == 3)
                    tc_run(3, wide, &w, tile, tiles, at, qi, p->dim, rows, acc[i]);
                else
                    tc_run(4, wide, &w, tile, tiles, at, qi, p->dim, rows, acc[i]);
            }
        }
        for (uint32_t r = 0; r < rows; r++) {
            float *s = scores + r * KVD_PAGE_TOKENS + chunk * 16 + g;
            for (int i = 0; i < G; i++)
                turned[r][i] = acc[i][r];
            fold_pairs(turned[r], s, s + 8);
        }
    }
}

static KVD_BY_CASE void tc_scores_kind(const struct tc_plan *p, const bool one, const bool wide,
                                       const uint8_t *codes, uint32_t bytes, const float *q,
                                       uint32_t rows, float *scores)
{
    if (rows == 4)
        tc_scores_rows(p, one, wide, codes, bytes, q, 4, scores);
    else if (rows == 3)
        tc_scores_rows(p, one, wide, codes, bytes, q, 3, scores);
    else if (rows == 2)
        tc_scores_rows(p, one, wide, codes, bytes, q, 2, scores);
    else
        tc_scores_rows(p, one, wide, codes, bytes, q, 1, scores);
}

// Streams of one piece, of more that a word holds, and of more than that.
static void simd_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                           uint32_t rows, float *scores)
{
    struct tc_plan p = tc_plan_of(t);
    uint32_t bytes = kvd_tc_codes_bytes(t) / 4;
    if (p.pieces == 1)
        tc_scores_kind(&p, true, false, codes, bytes, q, rows, scores);
    else if (bytes <= 32 * KVD_LANES)
        tc_scores_kind(&p, false, false, codes, bytes, q, rows, scores);
    else
        tc_scores_kind(&p, false, true, codes, bytes, q, rows, scores);
}

enum { SLOTS = V == 16 ? 4 : 2 }; // channel tiles whose accumulators fit the registers

// Up to SLOTS channel tiles of a group. acc of one row: [g 8][channel tile][16 lanes].
static KVD_BY_CASE void v_accumulate_slots(const uint32_t lane, const uint32_t more_lane,
                                           const uint32_t tiles, uint32_t tile, const uint32_t kind,
                                           const struct levels *l, const uint8_t *codes,
                                           uint32_t dim, uint32_t g, const float *spread,
                                           const uint32_t rows, float *acc)
{
    for (int i = 0; i < G; i++) {
        float *at = acc + (g * (dim / 16) + tile) * 16 + (uint32_t)(i * V);
        vf a[KVD_CPU_ROWS][SLOTS];
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t s = 0; s < tiles; s++)
                a[r][s] = v_load(at + r * 8 * dim + s * 16);
        for (uint32_t chunk = 0; chunk < 4; chunk++) {
            struct code_words where = words_of(kind, lane, more_lane, codes, dim, chunk, tile, g);
            vi w = load_words(&where.low, i), more = kind > 2 ? load_words(&where.more, i) : w;
            for (uint32_t s = 0; s < tiles; s++) {
                vf lo = level_of(kind, l, &where, w, more, s, 0);
                vf hi = level_of(kind, l, &where, w, more, s, 1);
                for (uint32_t r = 0; r < rows; r++) {
                    const float *p = spread + (r * 4 + chunk) * 32 + i * V;
                    a[r][s] = v_fma(lo, v_load(p), a[r][s]);
                    a[r][s] = v_fma(hi, v_load(p + 16), a[r][s]);
                }
            }
        }
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t s = 0; s < tiles; s++)
                v_store(at + r * 8 * dim + s * 16, a[r][s]);
    }
}

static KVD_BY_CASE void v_accumulate_tiles(const uint32_t lane, const uint32_t more_lane,
                                           const uint32_t tiles, uint32_t tile, const uint32_t kind,
                                           const struct levels *l, const uint8_t *codes,
                                           uint32_t dim, uint32_t g, const float *spread,
                                           const uint32_t rows, float *acc)
{
    if (tiles <= SLOTS) {
        v_accumulate_slots(lane, more_lane, tiles, tile, kind, l, codes, dim, g, spread, rows, acc);
        return;
    }
    for (uint32_t t = tile; t < tile + tiles; t += SLOTS)
        v_accumulate_slots(lane, more_lane, SLOTS, t, kind, l, codes, dim, g, spread, rows, acc);
}

static KVD_BY_CASE void v_accumulate_rows(const uint32_t kind, struct levels l,
                                          const uint8_t *codes, uint32_t dim, const float *spread,
                                          const uint32_t rows, float *acc)
{
    for (uint32_t g = 0; g < 8; g++)
        EACH_TILES(v_accumulate_tiles, dim, kind, &l, codes, dim, g, spread, rows, acc);
}

static KVD_BY_CASE void v_accumulate_kind(const uint32_t kind, struct levels l,
                                          const uint8_t *codes, uint32_t dim, const float *spread,
                                          uint32_t rows, float *acc)
{
    if (rows == 4 && dim == 128)
        v_accumulate_rows(kind, l, codes, 128, spread, 4, acc);
    else if (rows == 4)
        v_accumulate_rows(kind, l, codes, dim, spread, 4, acc);
    else if (rows == 3)
        v_accumulate_rows(kind, l, codes, dim, spread, 3, acc);
    else if (rows == 2)
        v_accumulate_rows(kind, l, codes, dim, spread, 2, acc);
    else
        v_accumulate_rows(kind, l, codes, dim, spread, 1, acc);
}

static void simd_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                              uint32_t rows, float *acc)
{
    uint32_t bits = kvd_codec_bits(codec);
    float spread[KVD_CPU_ROWS * 4 * 32] __attribute__((aligned(64)));
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t chunk = 0; chunk < 4; chunk++)
            spread16(p + r * KVD_PAGE_TOKENS + chunk * 16, spread + (r * 4 + chunk) * 32);
    if (bits == 4 && !kvd_codec_signed(codec))
        v_accumulate_kind(EVEN_4, levels_of(codec), codes, dim, spread, rows, acc);
    else if (bits == 2)
        v_accumulate_kind(2, levels_of(codec), codes, dim, spread, rows, acc);
    else if (bits == 3)
        v_accumulate_kind(3, levels_of(codec), codes, dim, spread, rows, acc);
    else
        v_accumulate_kind(4, levels_of(codec), codes, dim, spread, rows, acc);
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

static KVD_BY_CASE void bf16_scores_rows(const uint8_t *k, uint64_t stride, uint32_t n,
                                         uint32_t dim, const float *q, const uint32_t rows,
                                         float *scores)
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

static KVD_BY_CASE void bf16_accumulate_rows(const uint8_t *v, uint64_t stride, uint32_t n,
                                             uint32_t dim, const float *p, const uint32_t rows,
                                             float *o)
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

// Some rows by some vectors of outputs at a time, from output c on.
static KVD_BY_CASE void rotate_columns(const float *x, const uint32_t rows, const uint32_t vectors,
                                       uint32_t dim, const float *m, uint32_t c, float *y)
{
    vf acc[KVD_CPU_ROWS][4];
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t j = 0; j < vectors; j++)
            acc[r][j] = v_zero();
    for (uint32_t i = 0; i < dim; i++) {
        for (uint32_t j = 0; j < vectors; j++) {
            vf w = v_load(m + (uint64_t)i * dim + c + j * V);
            for (uint32_t r = 0; r < rows; r++)
                acc[r][j] = v_fma(v_set1(x[r * dim + i]), w, acc[r][j]);
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t j = 0; j < vectors; j++)
            v_store(y + r * dim + c + j * V, acc[r][j]);
}

// Four rows by four vectors are 16 accumulators (8 for V = 8). dim is a multiple of 16.
static KVD_BY_CASE void rotate_rows(const float *x, const uint32_t rows, uint32_t dim,
                                    const float *m, float *y)
{
    enum { COLS = V == 16 ? 4 : 2 };
    uint32_t c = 0;
    for (; c + COLS * V <= dim; c += COLS * V)
        rotate_columns(x, rows, COLS, dim, m, c, y);
    for (; c < dim; c += V)
        rotate_columns(x, rows, 1, dim, m, c, y);
}

static void simd_rotate(const float *x, uint32_t rows, uint32_t dim, const float *m, float *y)
{
    for (; rows >= 4; rows -= 4, x += 4 * dim, y += 4 * dim)
        rotate_rows(x, 4, dim, m, y);
    for (; rows > 0; rows--, x += dim, y += dim)
        rotate_rows(x, 1, dim, m, y);
}

#include "kernels/cpu/simd_latent.inc.h"

#define KVD_SIMD_TABLE(isa_name, isa_supported)                                                    \
    {                                                                                              \
        .name = isa_name, .supported = isa_supported, .q_prepare = simd_q_prepare,                 \
        .k_scores = simd_k_scores, .tc_scores = simd_tc_scores, .v_accumulate = simd_v_accumulate, \
        .v_reduce = simd_v_reduce, .bf16_scores = simd_bf16_scores,                                \
        .bf16_accumulate = simd_bf16_accumulate, .exp_sum = simd_exp_sum, .scale = simd_scale,     \
        .rotate = simd_rotate, .bf16_row = simd_bf16_row, .latent_unpack = simd_latent_unpack,     \
        .panel_scores = simd_panel_scores, .panel_sums = simd_panel_sums,                          \
        .panel_logits = simd_panel_logits, .panel_top = simd_panel_top,                            \
        .panel_exp = simd_panel_exp, .panel_scale = simd_panel_scale,                              \
    }
