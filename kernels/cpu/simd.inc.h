// The inner loops over vectors of V floats, written once. The including file defines V and the
// vector operations:
//   vf, vi                     vectors of V floats, V 32-bit integers
//   v_zero, v_set1, v_load, v_store, v_fma(a, b, c) = a*b+c, v_mul, v_add
//   v_max(a, b)                b where one of them is NaN
//   v_words(p), v_words_store  V words from and to memory
//   v_down(w, n)               words shifted by n bits, n known when this is compiled
//   v_spread8(p), 4, 2, 1      V words from V / 4 * (8, 4, 2, 1) bytes: words 4i to 4i + 3 are the
//   i-th 8, 4, 2 or
//                              1 bytes, so shifted that the bits of register 0, 1, 2, 3 come to the
//                              low end of a half
//   v_table(four)              four floats, for:
//   v_pick(table, w, shift, odd)  which of them two bits of each word say, those at `shift`; odd:
//   two bits higher v_select(a, b, w, bit)     b where the bit is set, a elsewhere v_flip(x, w,
//   bit)          -x where the bit is set v_or(a, b), v_low(w, n)    of words; their n lowest bits
//   v_right(w, n), v_left      words shifted by n bits, the same for all
//   v_centred(bits)            for v_level: levels code - (2^bits - 1) / 2, bits 1 to 4
//   v_level(bits, table, w)    which of them the lowest bits of each word say
//   v_bf16(p)                  V bf16 from memory as floats
//   v_even(w), v_odd(w)        of 2 V bf16 in words, those with even and odd numbers as floats
//   v_apart(x, even, odd)      the same of 2 V floats in memory
//   v_together(even, odd, x)   and back
//   v_sum(v), v_top(v)         sum of the lanes, the largest where none is NaN
//   v_sums(x)                  of V vectors the sum of each's lanes
//   v_halves_added(a, b)       the halves of each added, those of a in the low half
//   v_fold(x, out)             x: of 8 vectors of lanes whose number is t * 4 + r the halves,
//   added, of two each; out[g]
//                              the sum of vector g's lanes of even r, out[8 + g] that of odd r
//   v_words0(), v_set1_32(x), v_bytes1(x)  zeros; V times x; as bytes
//   v_everywhere(lane)         16 bytes from memory, in each lane of 128 bits
//   v_pick8(w, from)           in each lane of 128 bits the bytes that the low four bits of from's
//                              say, whose others are 0
//   v_both(a, b)               bits
//   v_add8, v_add16, v_sub16, v_add32, v_sub32, v_down16, v_up16, v_up32  of bytes, or words of so
//                              many bits
//   v_low16(a, b), 32, 64      units of so many bits of the low halves of each lane of 128 bits, of
//   v_high16(a, b), 32, 64     a and b in turn; of the high halves
//   v_products16(w, x, y)      of pairs of signed words x times the first and y times the second
//   v_lanes16(x)               x: of V / 4 vectors the sums of each's lanes of 128 bits, by words
//   v_float(w)                 words as floats
//   v_store_lanes(p, n, v)     lanes of four floats, n from one to the next
//   v_exp(v)                   exp, relative error under 1e-6, 0 below -87
// A *group* is 16 words, the words of lanes 4g .. 4g+3 of a load: G = 16 / V vectors. Word t*4 + r
// of group g holds, for K, token g + 8(r & 1) and channels 2t + 8(r >> 1) + e of a channel tile;
// for V, channel g + 8(r & 1) and tokens 2t + 8(r >> 1) + e of a chunk, with e in {0, 1} for the
// low and high half of the word.

enum { G = 16 / V };

// Without it a compiler loads a vector anew for every use.
#define LOADED(x) __asm__("" : "+v"(x))

#include "kernels/cpu/simd_tables.inc.h"

// The order in which the 16 channels of a tile (or tokens of a chunk) meet the words of a group.
static void spread16(const float *x, float *out)
{
    for (int e = 0; e < 2; e++)
        for (int i = 0; i < 16; i++)
            out[e * 16 + i] = x[2 * (i / 4) + 8 * (i % 4 / 2) + e];
}

static void simd_q_prepare(uint32_t codec, const struct kvd_tc_coder *tc, const float *q,
                           uint32_t dim, float *out)
{
    (void)tc;
    if (tables_take(codec, dim)) {
        tables_prepare(codec, q, out);
        return;
    }
    for (uint32_t tile = 0; tile < dim / 16; tile++)
        spread16(q + tile * 16, out + tile * 32);
}

enum { PAIR = 2 }; // groups that share what is loaded of q

// Of a chunk, what the lanes of its eight groups add up: of each row [group][V], and of each pair
// of groups where they come in pairs.
struct lanes {
    _Alignas(64) float x[KVD_CPU_ROWS][8 * V];
};

static KVD_BY_CASE void lanes_put(struct lanes *l, const uint32_t groups, const uint32_t rows,
                                  uint32_t g, vf sum[PAIR][KVD_CPU_ROWS])
{
    for (uint32_t r = 0; r < rows; r++)
        v_store(l->x[r] + g / groups * V,
                groups == PAIR ? v_halves_added(sum[0][r], sum[1][r]) : sum[0][r]);
}

// The scores of the chunk's tokens, in order.
static KVD_BY_CASE void lanes_fold(struct lanes *l, const uint32_t groups, const uint32_t rows,
                                   float *scores)
{
    for (uint32_t r = 0; r < rows; r++) {
        float *x = l->x[r];
        for (uint32_t i = 0; i < 4 && groups < PAIR; i++)
            v_store(x + i * V, v_halves_added(v_load(x + 2 * i * V), v_load(x + (2 * i + 1) * V)));
        v_fold(x, scores + r * KVD_PAGE_TOKENS);
    }
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

// Without it a compiler loads all of q before a loop, has no registers for it, and stores it on the
// stack to load it from there.
#define LOAD_AGAIN() __asm__ volatile("" ::: "memory")

// A tile's codes on one side, and planes of two bits as four copies of its words, shifted by 0, 2,
// 4 and 6 bits: a byte's distance more needs no shift but an address. So three shifts serve all of
// a word's sixteen codes.
struct codes {
    const uint8_t *more; // the second plane as it is
    const uint8_t *copies;
    uint32_t stride, plane; // bytes from copy to copy, 0: there is one; to the second plane in each
};

static KVD_BY_CASE struct codes codes_plain(const uint8_t *codes, uint32_t dim)
{
    return (struct codes){codes + 16 * dim, codes, 0, 16 * dim};
}

enum { COPY_BYTES = 2 * 16 * KVD_MAX_HEAD_DIM + 64 };

struct copies {
    _Alignas(64) uint8_t x[4 * COPY_BYTES];
};

// `planes` is 1 or 2. Reads from a copy go up to three bytes past it, for bits that count nowhere.
static KVD_BY_CASE struct codes codes_of(const uint32_t planes, const uint8_t *codes, uint32_t dim,
                                         struct copies *to)
{
    uint32_t plane = 16 * dim, stride = planes * plane + 64;
    for (uint32_t at = 0; at < planes * plane; at += 4 * V) {
        vi w = v_words(codes + at);
        LOADED(w); // or the first copy is made by itself, by a string instruction that is slower
        v_words_store(to->x + at, w);
        v_words_store(to->x + stride + at, v_down(w, 2));
        v_words_store(to->x + 2 * stride + at, v_down(w, 4));
        v_words_store(to->x + 3 * stride + at, v_down(w, 6));
    }
    return (struct codes){codes + plane, to->x, stride, plane};
}

// What some channel tiles of a chunk have in both planes, the second one where there is one.
struct code_words {
    struct plane_words low, more;
    uint32_t stride;
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
    const uint8_t *at = plane + chunk / chunks * bytes + p.at + g * 4 * lane;
    if (width == 2 && lane == 16) // whole bytes then; a page has more behind its last words
        return (struct plane_words){at + shift / 8, 0, lane};
    return (struct plane_words){at, shift, lane};
}

static KVD_BY_CASE struct code_words words_of(const uint32_t kind, const uint32_t lane,
                                              const uint32_t more_lane, const struct codes *codes,
                                              uint32_t dim, uint32_t chunk, uint32_t tile,
                                              uint32_t g)
{
    struct code_words w = {
        plane_of(2, lane, codes->copies, dim, chunk, tile, g), {0}, codes->stride};
    if (kind == EVEN_4)
        w.more = plane_of(2, lane, codes->copies + codes->plane, dim, chunk, tile, g);
    else if (kind == 4)
        w.more = plane_of(2, lane, codes->more, dim, chunk, tile, g);
    else if (kind == 3)
        w.more = plane_of(1, more_lane, codes->more, dim, chunk, tile, g);
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

// The words of a vector, where they are not taken from copies.
struct tile_words {
    vi low, more;
    int i;
};

static KVD_BY_CASE struct tile_words load_tile(const uint32_t kind, const struct code_words *at,
                                               int i)
{
    struct tile_words w = {load_words(&at->low, i), load_words(&at->low, i), i};
    if (kind > 2)
        w.more = load_words(&at->more, i);
    return w;
}

// What two bits of a plane that has copies say: those of channel tile `slot` after the first, low
// or high half of the words.
static KVD_BY_CASE vf pick_of(vf table, const struct plane_words *p, uint32_t stride, vi words,
                              int i, uint32_t slot, uint32_t high)
{
    uint32_t bit = p->shift + 2 * slot + high * half_of(p);
    if (p->lane < 16 || !stride)
        return v_pick(table, words, bit - 2 * (slot & 1), slot & 1);
    return v_pick(table,
                  v_words(p->at + bit % 8 / 2 * stride + bit / 8 + (uint32_t)i * (V / 4) * p->lane),
                  0, 0);
}

// The levels of these codes.
static KVD_BY_CASE vf level_of(const uint32_t kind, const struct levels *l,
                               const struct code_words *at, const struct tile_words *w,
                               uint32_t slot, uint32_t high)
{
    vf x = pick_of(l->low, &at->low, at->stride, w->low, w->i, slot, high);
    if (kind == EVEN_4) {
        x = v_add(x, pick_of(l->high, &at->more, at->stride, w->more, w->i, slot, high));
    } else if (kind == 4) {
        uint32_t bit = at->more.shift + 2 * slot + high * half_of(&at->more);
        vf y = pick_of(l->high, &at->low, at->stride, w->low, w->i, slot, high);
        x = v_flip(v_select(x, y, w->more, bit), w->more, bit + 1);
    } else if (kind == 3) {
        x = v_flip(x, w->more, at->more.shift + slot + high * half_of(&at->more));
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

// Adds the products of a channel tile's codes in low or high halves of words. `slot` is even, `odd`
// known when this is compiled.
static KVD_BY_CASE void k_scores_slot(const uint32_t odd, uint32_t slot, const uint32_t high,
                                      const uint32_t kind, const struct levels *l,
                                      const struct code_words at[PAIR],
                                      const struct tile_words w[PAIR], uint32_t dim,
                                      const uint32_t groups, const float *q, const uint32_t rows,
                                      vf acc[PAIR][KVD_CPU_ROWS])
{
    vf x[PAIR];
    for (uint32_t n = 0; n < groups; n++)
        x[n] = level_of(kind, l, &at[n], &w[n], slot + odd, high);
    for (uint32_t r = 0; r < rows; r++) {
        vf y = v_load(q + r * 2 * dim);
        LOADED(y);
        for (uint32_t n = 0; n < groups; n++)
            acc[n][r] = v_fma(x[n], y, acc[n][r]);
    }
}

// Adds the products of some channel tiles to the scores of one group's tokens, or of two.
static KVD_BY_CASE void k_scores_tiles(const uint32_t lane, const uint32_t more_lane,
                                       const uint32_t tiles, uint32_t tile, const uint32_t kind,
                                       const struct levels *l, const struct codes *codes,
                                       uint32_t dim, uint32_t chunk, uint32_t g,
                                       const uint32_t groups, const float *q, const uint32_t rows,
                                       vf acc[PAIR][KVD_CPU_ROWS])
{
    struct code_words at[PAIR];
    for (uint32_t n = 0; n < groups; n++)
        at[n] = words_of(kind, lane, more_lane, codes, dim, chunk, tile, g + n);
    for (int i = 0; i < G; i++) {
        struct tile_words w[PAIR];
        for (uint32_t n = 0; n < groups; n++)
            w[n] = load_tile(kind, &at[n], i);
        for (uint32_t slot = 0; slot < tiles; slot += 2)
            for (uint32_t high = 0; high < 2; high++) {
                const float *y = q + (tile + slot) * 32 + high * 16 + (uint32_t)(i * V);
                k_scores_slot(0, slot, high, kind, l, at, w, dim, groups, y, rows, acc);
                if (tiles > 1)
                    k_scores_slot(1, slot, high, kind, l, at, w, dim, groups, y + 32, rows, acc);
            }
    }
}

static KVD_BY_CASE void k_scores_rows(const uint32_t kind, struct levels l,
                                      const struct codes *codes, uint32_t dim,
                                      const uint32_t groups, const float *q, const uint32_t rows,
                                      float *scores, struct kvd_cpu_ahead *ahead)
{
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        struct lanes lanes;
        for (uint32_t g = 0; g < 8; g += groups) {
            if (g % 4 == 0)
                kvd_cpu_ask(ahead, 1);
            vf acc[PAIR][KVD_CPU_ROWS];
            for (uint32_t n = 0; n < groups; n++)
                for (uint32_t r = 0; r < rows; r++)
                    acc[n][r] = v_zero();
            EACH_TILES(k_scores_tiles, dim, kind, &l, codes, dim, chunk, g, groups, q, rows, acc);
            lanes_put(&lanes, groups, rows, g, acc);
            LOAD_AGAIN();
        }
        lanes_fold(&lanes, groups, rows, scores + chunk * 16);
    }
}

// Pairs of groups, and copies, pay for the shape that is most used; each more that had them would
// take seconds to compile. With sixteen lanes a shift serves two codes, and copies are worth less
// than they take. Codes of two bits have tables there.
static KVD_BY_CASE void k_scores_kind(const uint32_t kind, struct levels l, const uint8_t *codes,
                                      uint32_t dim, const float *q, uint32_t rows, float *scores,
                                      struct kvd_cpu_ahead *ahead)
{
    struct codes c = codes_plain(codes, dim);
    struct copies copies;
    if (rows == 4 && dim == 128 && kind != 2) {
        if (V == 8)
            c = codes_of(kind == EVEN_4 ? 2 : 1, codes, 128, &copies);
        k_scores_rows(kind, l, &c, 128, PAIR, q, 4, scores, ahead);
    } else if (rows == 4) {
        k_scores_rows(kind, l, &c, dim, 1, q, 4, scores, ahead);
    } else if (rows == 3) {
        k_scores_rows(kind, l, &c, dim, 1, q, 3, scores, ahead);
    } else if (rows == 2) {
        k_scores_rows(kind, l, &c, dim, 1, q, 2, scores, ahead);
    } else {
        k_scores_rows(kind, l, &c, dim, 1, q, 1, scores, ahead);
    }
}

static void simd_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                          uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    uint32_t bits = kvd_codec_bits(codec);
    if (tables_take(codec, dim))
        tables_scores(codes, q, rows, scores, ahead);
    else if (bits == 4 && !kvd_codec_signed(codec))
        k_scores_kind(EVEN_4, levels_of(codec), codes, dim, q, rows, scores, ahead);
    else if (bits == 2)
        k_scores_kind(2, levels_of(codec), codes, dim, q, rows, scores, ahead);
    else if (bits == 3)
        k_scores_kind(3, levels_of(codec), codes, dim, q, rows, scores, ahead);
    else
        k_scores_kind(4, levels_of(codec), codes, dim, q, rows, scores, ahead);
}

#include "kernels/cpu/simd_tc.inc.h"

enum { SLOTS = V == 16 ? 4 : 2 }; // channel tiles whose accumulators fit the registers

// Up to SLOTS channel tiles of a group, from the `first` of some on. acc of one row: [g 8][channel
// tile][16 lanes].
static KVD_BY_CASE void v_accumulate_slots(const uint32_t lane, const uint32_t more_lane,
                                           const uint32_t first, const uint32_t tiles,
                                           uint32_t tile, const uint32_t kind,
                                           const struct levels *l, const struct codes *codes,
                                           uint32_t dim, uint32_t g, const float *spread,
                                           const uint32_t rows, float *acc)
{
    for (int i = 0; i < G; i++) {
        float *at = acc + (g * (dim / 16) + tile + first) * 16 + (uint32_t)(i * V);
        vf a[KVD_CPU_ROWS][SLOTS];
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t s = 0; s < tiles; s++)
                a[r][s] = v_load(at + r * 8 * dim + s * 16);
        for (uint32_t chunk = 0; chunk < 4; chunk++) {
            struct code_words where = words_of(kind, lane, more_lane, codes, dim, chunk, tile, g);
            struct tile_words w = load_tile(kind, &where, i);
            for (uint32_t high = 0; high < 2; high++) {
                vf x[SLOTS];
                for (uint32_t s = 0; s < tiles; s++)
                    x[s] = level_of(kind, l, &where, &w, first + s, high);
                for (uint32_t r = 0; r < rows; r++) {
                    vf p = v_load(spread + (r * 4 + chunk) * 32 + high * 16 + i * V);
                    LOADED(p);
                    for (uint32_t s = 0; s < tiles; s++)
                        a[r][s] = v_fma(x[s], p, a[r][s]);
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
                                           const struct levels *l, const struct codes *codes,
                                           uint32_t dim, uint32_t g, const float *spread,
                                           const uint32_t rows, float *acc)
{
    const uint32_t some = KVD_MIN(tiles, SLOTS);
    v_accumulate_slots(lane, more_lane, 0, some, tile, kind, l, codes, dim, g, spread, rows, acc);
    if (tiles > SLOTS)
        v_accumulate_slots(lane, more_lane, SLOTS, SLOTS, tile, kind, l, codes, dim, g, spread,
                           rows, acc);
}

static KVD_BY_CASE void v_accumulate_rows(const uint32_t kind, struct levels l,
                                          const struct codes *codes, uint32_t dim,
                                          const float *spread, const uint32_t rows, float *acc,
                                          struct kvd_cpu_ahead *ahead)
{
    for (uint32_t g = 0; g < 8; g++) {
        kvd_cpu_ask(ahead, 1);
        EACH_TILES(v_accumulate_tiles, dim, kind, &l, codes, dim, g, spread, rows, acc);
    }
}

static KVD_BY_CASE void v_accumulate_kind(const uint32_t kind, struct levels l,
                                          const uint8_t *codes, uint32_t dim, const float *spread,
                                          uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead)
{
    struct codes c = codes_plain(codes, dim);
    if (rows == 4 && dim == 128) {
        v_accumulate_rows(kind, l, &c, 128, spread, 4, acc, ahead);
    } else if (rows == 4) {
        v_accumulate_rows(kind, l, &c, dim, spread, 4, acc, ahead);
    } else if (rows == 3) {
        v_accumulate_rows(kind, l, &c, dim, spread, 3, acc, ahead);
    } else if (rows == 2) {
        v_accumulate_rows(kind, l, &c, dim, spread, 2, acc, ahead);
    } else {
        v_accumulate_rows(kind, l, &c, dim, spread, 1, acc, ahead);
    }
}

static void simd_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                              uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead)
{
    uint32_t bits = kvd_codec_bits(codec);
    float spread[KVD_CPU_ROWS * 4 * 32] __attribute__((aligned(64)));
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t chunk = 0; chunk < 4; chunk++)
            spread16(p + r * KVD_PAGE_TOKENS + chunk * 16, spread + (r * 4 + chunk) * 32);
    if (bits == 4 && !kvd_codec_signed(codec))
        v_accumulate_kind(EVEN_4, levels_of(codec), codes, dim, spread, rows, acc, ahead);
    else if (bits == 2)
        v_accumulate_kind(2, levels_of(codec), codes, dim, spread, rows, acc, ahead);
    else if (bits == 3)
        v_accumulate_kind(3, levels_of(codec), codes, dim, spread, rows, acc, ahead);
    else
        v_accumulate_kind(4, levels_of(codec), codes, dim, spread, rows, acc, ahead);
}

static void simd_v_reduce(uint32_t codec, const float *acc, uint32_t dim, float *o)
{
    (void)codec;
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

#include "kernels/cpu/simd_bf16.inc.h"
#include "kernels/cpu/simd_tokens.inc.h"

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

// What a table has that AMX has no other way for.
#define KVD_SIMD_COMMON                                                                            \
    .bf16_scores = simd_bf16_scores, .bf16_accumulate = simd_bf16_accumulate,                      \
    .params = simd_params, .affine = simd_affine, .logits = simd_logits, .top = simd_top,          \
    .whole = simd_whole, .exp_sum = simd_exp_sum, .weigh = simd_weigh, .scale = simd_scale,        \
    .rotate = simd_rotate, .bf16_row = simd_bf16_row, .latent_unpack = simd_latent_unpack,         \
    .panel_scores = simd_panel_scores, .panel_sums = simd_panel_sums,                              \
    .panel_logits = simd_panel_logits, .panel_top = simd_panel_top, .panel_exp = simd_panel_exp,   \
    .panel_scale = simd_panel_scale

#define KVD_SIMD_TABLE(isa_name, isa_supported)                                                    \
    {                                                                                              \
        .name = isa_name, .supported = isa_supported, .q_prepare = simd_q_prepare,                 \
        .k_scores = simd_k_scores, .tc_scores = simd_tc_scores, .v_accumulate = simd_v_accumulate, \
        .v_reduce = simd_v_reduce, KVD_SIMD_COMMON                                                 \
    }
