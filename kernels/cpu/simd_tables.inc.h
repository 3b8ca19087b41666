// Scores of keys in codes of two bits by tables of bytes: four bits of a page are codes of two
// channels, and what these add to a score is one of sixteen numbers, made once for a query. A
// shuffle of bytes looks that up for 4 V tokens, where a multiply-add is one channel of V tokens.
//
// Numbers are whole ones of 24 bits, 2^23 added, none below 0, as four *digits* of base 64. Four of
// a digit's bytes add up to 252 at most; then they go to words of 16 bits, those of bytes with even
// and odd numbers apart: 64 * 63 at most, and a score below 64 * 2^24. So nothing is lost but what
// rounding to whole numbers does: half of a 2^20th of the row's largest, for two channels.

#include "kernels/cpu/fixed.h"

enum {
    T_DIM = 128,        // whose words lie in pieces of 16 bytes a lane
    T_NUMBER_BITS = 21, // of a query's, and a sign
    T_DIGITS = 4,       // of a sum of two of their products
    T_BITS = 6,         // of a digit
    T_AT_ONCE = 4,      // bytes of a digit that are added as bytes
    T_BYTES = 4 * V,
    T_TABLES = 1024 / T_BYTES, // of a digit, for two channels in each of V / 4 lanes
    T_CHUNKS = V / 4,          // whose sums a vector has
    T_PAIRS = T_DIM / 2,
};
_Static_assert((int)T_DIGITS < (int)KVD_CPU_PARTS, "and one more part, for what numbers are worth");

static bool tables_take(uint32_t codec, uint32_t dim)
{
    return dim == T_DIM && kvd_codec_bits(codec) == 2 && !kvd_codec_tc(codec);
}

// Of a row's digits; `out` as q_prepare has it.
static inline float *tables_part(float *out, uint32_t part)
{
    return out + (size_t)part * KVD_CPU_ROWS * 2 * T_DIM;
}

static inline const float *tables_part_of(const float *q, uint32_t row, uint32_t part)
{
    return q + (size_t)(part * KVD_CPU_ROWS + row) * 2 * T_DIM;
}

// The first of the two channels of lane `lane` of the n-th table; the other is 16 further on. As
// tables_index makes indices: of vector by vector of a group, register pair, byte, half of it.
static inline uint32_t tables_channel(uint32_t n, uint32_t lane)
{
    uint32_t half = n % 2, byte = n / 2 % 4, pair = n / 8 % 2, t = n / 16 * (V / 4) + lane;
    return (4 * (byte & 1) + 2 * half) * 16 + 2 * t + 8 * pair + (byte >> 1);
}

static void tables_prepare(uint32_t codec, const float *q, float *out)
{
    const float *level = kvd_cpu_levels(codec);
    uint32_t largest = 0, bits;
    float first[16], second[16];
    for (uint32_t c = 0; c < T_DIM; c++) {
        memcpy(&bits, q + c, sizeof(bits));
        largest = KVD_MAX(largest, bits & 0x7fffffff);
    }
    // Levels are below 2: what two numbers below 2^21 add is below 2^23.
    struct digit_scale s = digit_scale_of(largest, T_NUMBER_BITS);
    *tables_part(out, T_DIGITS) = 2 * s.from;
    for (uint32_t i = 0; i < 16; i++) {
        first[i] = level[i & 3];
        second[i] = level[i >> 2];
    }
    for (uint32_t i = 0; i < T_TABLES * (V / 4); i++) {
        uint32_t c = tables_channel(i / (V / 4), i % (V / 4));
        float a = s.to > 0 ? q[c] * s.to : 0, b = s.to > 0 ? q[c + 16] * s.to : 0;
        uint32_t x[16];
        for (uint32_t j = 0; j < 16; j++)
            x[j] = (uint32_t)(int32_t)rintf(a * first[j] + b * second[j]) + (1u << 23);
        for (uint32_t d = 0; d < T_DIGITS; d++) {
            uint8_t *table = (uint8_t *)tables_part(out, d) + i * 16;
            for (uint32_t j = 0; j < 16; j++)
                table[j] = x[j] >> (T_BITS * d) & ((1 << T_BITS) - 1);
        }
    }
}

// Of a tile: of each table the four chunks' indices, a byte for each of 16 tokens, with 4
// bits each.
struct tables_index {
    _Alignas(64) uint8_t x[T_TABLES][4][T_BYTES];
};

// Eight vectors of units of 16 bits: out[u] has the u-th of each lane of each.
static inline void tables_transpose(const vi x[8], vi out[8])
{
    vi a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = v_low16(x[i], x[i + 1]);
        a[i + 1] = v_high16(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = v_low32(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = v_high32(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        out[2 * i] = v_low64(b[i], b[i + 4]);
        out[2 * i + 1] = v_high64(b[i], b[i + 4]);
    }
}

// Bytes of groups' words by tokens: byte 2g is token g, 2g + 1 is g + 8.
static inline void tables_index_of(const uint8_t *codes, uint32_t chunk, struct tables_index *to)
{
    static const uint8_t pairs[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    const vi order = v_everywhere(pairs), nibble = v_bytes1(15);
    for (uint32_t i = 0; i < G; i++) {
        vi x[8], y[8];
        for (uint32_t g = 0; g < 8; g++)
            x[g] = v_pick8(v_words(codes + chunk * 4 * T_DIM + g * 64 + i * T_BYTES), order);
        tables_transpose(x, y);
        for (uint32_t u = 0; u < 8; u++) {
            uint32_t n = (i * 8 + u) * 2;
            v_words_store(to->x[n][chunk], v_both(y[u], nibble));
            v_words_store(to->x[n + 1][chunk], v_both(v_down(y[u], 4), nibble));
        }
    }
}

// Of a digit: each chunk's sums, of tokens with numbers below 8 and of the others.
static inline void tables_sums(const uint8_t *table, const struct tables_index *index, vi below[4],
                               vi others[4])
{
    for (int c = 0; c < 4; c++)
        below[c] = others[c] = v_words0();
    for (uint32_t n = 0; n < T_TABLES; n += T_AT_ONCE) {
        vi sum[4];
        for (uint32_t i = 0; i < T_AT_ONCE; i++) {
            vi t = v_words(table + (n + i) * T_BYTES);
            LOADED(t);
            for (int c = 0; c < 4; c++) {
                vi x = v_pick8(t, v_words(index->x[n + i][c]));
                sum[c] = i ? v_add8(sum[c], x) : x;
                LOADED(sum[c]); // in this order: pairs would not fit sixteen registers
            }
        }
        for (int c = 0; c < 4; c++) {
            below[c] = v_add16(below[c], sum[c]); // and 256 times the others', modulo 2^16
            others[c] = v_add16(others[c], v_down16(sum[c], 8));
        }
    }
    for (int c = 0; c < 4; c++)
        below[c] = v_sub16(below[c], v_up16(others[c], 8));
}

// Scores of four tokens of each of some chunks, from pairs of digits side by side.
static inline vf tables_scores_of(const vi half[2], vf from)
{
    vi low = v_products16(half[0], 1, 1 << T_BITS), high = v_products16(half[1], 1, 1 << T_BITS);
    vi sum = v_add32(low, v_up32(high, 2 * T_BITS));
    return v_mul(v_float(v_sub32(sum, v_set1_32(T_PAIRS << 23))), from);
}

// sums: of each digit, of eight tokens of all chunks, of which the c-th T_CHUNKS are stored.
static inline void tables_store(const vi sums[T_DIGITS][4 / T_CHUNKS], uint32_t c, vf from,
                                float *scores)
{
    vi low[2], high[2];
    for (int i = 0; i < 2; i++) {
        low[i] = v_low16(sums[2 * i][c], sums[2 * i + 1][c]);
        high[i] = v_high16(sums[2 * i][c], sums[2 * i + 1][c]);
    }
    v_store_lanes(scores, 16, tables_scores_of(low, from));
    v_store_lanes(scores + 4, 16, tables_scores_of(high, from));
}

static void tables_scores(const uint8_t *codes, const float *q, uint32_t rows, float *scores,
                          struct kvd_cpu_ahead *ahead)
{
    struct tables_index index;
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        kvd_cpu_ask(ahead, 1);
        tables_index_of(codes, chunk, &index);
    }
    // Digit by digit, as the tables lie.
    vi below[KVD_CPU_ROWS][T_DIGITS][4 / T_CHUNKS], others[KVD_CPU_ROWS][T_DIGITS][4 / T_CHUNKS];
    for (uint32_t d = 0; d < T_DIGITS; d++) {
        kvd_cpu_ask(ahead, 1);
        for (uint32_t r = 0; r < rows; r++) {
            vi sum[2][4];
            tables_sums((const void *)tables_part_of(q, r, d), &index, sum[0], sum[1]);
            for (uint32_t c = 0; c < 4; c += T_CHUNKS) {
                below[r][d][c / T_CHUNKS] = v_lanes16(sum[0] + c);
                others[r][d][c / T_CHUNKS] = v_lanes16(sum[1] + c);
            }
        }
    }
    for (uint32_t r = 0; r < rows; r++) {
        const vf from = v_set1(*tables_part_of(q, r, T_DIGITS));
        for (uint32_t c = 0; c < 4 / T_CHUNKS; c++) {
            float *to = scores + r * KVD_PAGE_TOKENS + c * T_CHUNKS * 16;
            tables_store(below[r], c, from, to);
            tables_store(others[r], c, from, to + 8);
        }
    }
}
