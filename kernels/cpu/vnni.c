// Inner loops with VNNI: history as products of small integers (digits.h), 64 an instruction, each
// of a code that is an unsigned byte with a digit that is a signed one; four neighbours are added
// to a word. What is not here is AVX-512's, which every such processor has.
//
// Codes are doubled, and the centre of all is taken from sums: those of twice the level stay in 32
// bits, whatever was above them on the way. A row's three digits are summed in one register, the
// top one first, eight bits up before each of the others; and registers that hold codes serve all
// digits of all rows. In a word of a page the four codes at `slot` are neighbours for K: of one
// token. For V a shuffle makes them so.
#include "kernels/cpu/vnni.h"

#include "kernels/cpu/digits.h"

// Without it a compiler loads a vector anew for every use.
#define LOADED(x) __asm__("" : "+v"(x))

// Without it a compiler loads all digits before a loop, has no registers for them, and stores them
// on the stack to load them from there.
#define LOAD_AGAIN(p) __asm__ volatile("" : "+r"(p) : : "memory")

bool kvd_vnni_supported(void)
{
    return kvd_cpu_avx512.supported() && __builtin_cpu_supports("avx512vnni");
}

static bool takes_tc(void)
{
    return __builtin_cpu_supports("avx512vbmi");
}

// Twice the codes at `slot` of sixteen words.
static KVD_BY_CASE __m512i codes_of(const bool four, __m512i low, __m512i high, const int slot)
{
    const __m512i two = _mm512_set1_epi8(6), all = _mm512_set1_epi8(30);
    __m512i x = slot ? _mm512_srli_epi32(low, KVD_MAX(2 * slot - 1, 0)) : _mm512_slli_epi32(low, 1);
    if (!four)
        return _mm512_and_si512(x, two);
    __m512i y = slot < 2 ? _mm512_slli_epi32(high, KVD_MAX(3 - 2 * slot, 0))
                         : _mm512_srli_epi32(high, KVD_MAX(2 * slot - 3, 0));
    return _mm512_and_si512(_mm512_ternarylogic_epi32(two, x, y, 0xca), all);
}

// Twice the centre of all codes, in every byte.
static inline __m512i centre_of(uint32_t codec)
{
    return _mm512_set1_epi8((char)((1 << kvd_codec_bits(codec)) - 1));
}

// -- K -------------------------------------------------------------------------------------------

// The channel whose digits are byte i of a block's lines: as codes lie in words, so that tokens g
// and g + 8 have each.
static uint32_t k_channel(uint32_t i)
{
    uint32_t slot = i / LINE, t = i % LINE / 16, r = i % 16 / 4, byte = i % 4;
    return (slot + 4 * (byte & 1)) * 16 + 2 * t + 8 * (r >> 1) + (byte >> 1);
}

// A block's queries: lines as digit_lines makes them, but for the fourth.
struct k_block {
    uint8_t digit[DIGITS][SLOTS][LINE];
    int32_t centre[LINE / 4], none[2 * LINE / 4 + 15]; // what the centre takes from each lane's sum
    float from;                                        // half of what products are worth
};

// The halves of two vectors added.
static inline __m512 fold_halves(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

static inline __m512 fold_quarters(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// x: halves of eight groups. The sums of their lanes with even r, then of those with odd.
static inline __m512 fold(const __m512 x[4])
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    __m512 a = fold_quarters(x[0], x[1]), b = fold_quarters(x[2], x[3]);
    a = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    return _mm512_permutexvar_ps(order, a);
}

enum { GROUPS = 4, PAIR = 2 }; // groups whose codes are in registers, rows that are summed at once

// Sums of some rows over a block, of some groups' lanes. A row's lines lie one behind the other,
// digit by digit; stride: bytes from row to row.
static KVD_BY_CASE void k_sums(const uint32_t slots, const uint32_t rows,
                               const __m512i x[GROUPS][SLOTS], const uint8_t *lines,
                               uint32_t stride, __m512i sum[GROUPS][PAIR])
{
    for (uint32_t d = DIGITS; d-- > 0;) {
        for (uint32_t n = 0; n < GROUPS; n++)
            for (uint32_t r = 0; r < rows; r++)
                sum[n][r] =
                    d == DIGITS - 1 ? _mm512_setzero_si512() : _mm512_slli_epi32(sum[n][r], 8);
        for (uint32_t i = 0; i < slots; i++)
            for (uint32_t r = 0; r < rows; r++) {
                __m512i y = _mm512_load_si512(lines + r * stride + (d * slots + i) * LINE);
                LOADED(y);
                for (uint32_t n = 0; n < GROUPS; n++)
                    sum[n][r] = _mm512_dpbusd_epi32(sum[n][r], x[n][i], y);
            }
    }
}

// A row's sums less the centre's, added in pairs of groups.
static KVD_BY_CASE void k_halves(const __m512i sum[GROUPS][PAIR], const uint32_t row,
                                 __m512i centre, __m512 halves[GROUPS / 2])
{
    for (uint32_t n = 0; n < GROUPS; n += 2)
        halves[n / 2] = fold_halves(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[n][row], centre)),
                                    _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[n + 1][row], centre)));
}

// A row's scores of a chunk: its halves times what they are worth, and what it had before.
static KVD_BY_CASE void k_store(const __m512 low[GROUPS / 2], const __m512 high[GROUPS / 2],
                                float from, bool more, float *to)
{
    __m512 all[4] = {low[0], low[1], high[0], high[1]};
    __m512 before = more ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
    _mm512_storeu_ps(to, _mm512_fmadd_ps(fold(all), _mm512_set1_ps(from), before));
}

// Adds a block's products to a chunk's scores, or begins with them. stride: of blocks, from row to
// row.
static KVD_BY_CASE void k_chunk(const bool four, const uint32_t rows, const uint8_t *codes,
                                uint32_t plane, const struct k_block *q, uint32_t stride, bool more,
                                float *scores, struct kvd_cpu_ahead *ahead)
{
    __m512 halves[8 / GROUPS][KVD_CPU_ROWS][GROUPS / 2];
    for (uint32_t half = 0; half < 8 / GROUPS; half++) {
        kvd_cpu_ask(ahead, 1);
        __m512i x[GROUPS][SLOTS];
        for (uint32_t n = 0; n < GROUPS; n++) {
            const uint8_t *at = codes + (half * GROUPS + n) * LINE;
            __m512i low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + plane);
            for (int i = 0; i < SLOTS; i++)
                x[n][i] = codes_of(four, low, high, i);
        }
        for (uint32_t r = 0; r < rows; r += PAIR) {
            const uint32_t some = KVD_MIN(rows - r, PAIR);
            __m512i sum[GROUPS][PAIR];
            LOAD_AGAIN(q);
            k_sums(SLOTS, some, x, q[r * stride].digit[0][0], stride * sizeof(*q), sum);
            for (uint32_t i = 0; i < some; i++)
                k_halves(sum, i, _mm512_load_si512(q[(r + i) * stride].centre),
                         halves[half][r + i]);
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        k_store(halves[0][r], halves[1][r], q[r * stride].from, more, scores + r * KVD_PAGE_TOKENS);
}

static KVD_BY_CASE void k_rows(const bool four, const uint32_t rows, const uint8_t *codes,
                               uint32_t dim, const struct k_block *q, float *scores,
                               struct kvd_cpu_ahead *ahead)
{
    uint32_t blocks = dim / BLOCK;
    for (uint32_t i = 0; i < 4 * blocks; i++) {
        uint32_t chunk = i / blocks, block = i % blocks;
        k_chunk(four, rows, codes + chunk * 4 * dim + block * BLOCK_BYTES, four ? 16 * dim : 0,
                q + block, blocks, block > 0, scores + chunk * 16, ahead);
    }
}

static KVD_BY_CASE void k_kind(const bool four, const uint8_t *codes, uint32_t dim,
                               const struct k_block *q, uint32_t rows, float *scores,
                               struct kvd_cpu_ahead *ahead)
{
    if (rows == 4)
        k_rows(four, 4, codes, dim, q, scores, ahead);
    else if (rows == 3)
        k_rows(four, 3, codes, dim, q, scores, ahead);
    else if (rows == 2)
        k_rows(four, 2, codes, dim, q, scores, ahead);
    else
        k_rows(four, 1, codes, dim, q, scores, ahead);
}

void kvd_vnni_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                       uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    if (!digits_take(codec, dim, false)) {
        kvd_cpu_avx512.k_scores(codec, codes, dim, q, rows, scores, ahead);
        return;
    }
    if (kvd_codec_bits(codec) == 4)
        k_kind(true, codes, dim, (const void *)q, rows, scores, ahead);
    else
        k_kind(false, codes, dim, (const void *)q, rows, scores, ahead);
}

#include "kernels/cpu/vnni_tc.inc.h"

void kvd_vnni_q_prepare(uint32_t codec, const struct kvd_tc_coder *tc, const float *q, uint32_t dim,
                        float *out)
{
    if (kvd_codec_tc(codec) && takes_tc()) {
        tc_prepare(tc, q, out);
        return;
    }
    if (!digits_take(codec, dim, false)) {
        kvd_cpu_avx512.q_prepare(codec, tc, q, dim, out);
        return;
    }
    for (uint32_t at = 0; at < dim; at += BLOCK) {
        struct k_block *b = (void *)(out + 2 * at);
        float x[2 * BLOCK];
        for (uint32_t i = 0; i < 2 * BLOCK; i++)
            x[i] = q[at + k_channel(i)];
        float from = digit_lines(q + at, BLOCK, x, 2 * BLOCK, out + 2 * at);
        __m512i sum = _mm512_setzero_si512();
        for (uint32_t d = DIGITS; d-- > 0;) {
            sum = _mm512_slli_epi32(sum, 8);
            for (uint32_t i = 0; i < SLOTS; i++)
                sum =
                    _mm512_dpbusd_epi32(sum, centre_of(codec), _mm512_loadu_si512(b->digit[d][i]));
        }
        _mm512_storeu_si512(b->centre, sum);
        b->from = from;
    }
}

// -- V -------------------------------------------------------------------------------------------

// A tile's probabilities: each row's lines of digit_tokens; what the centre takes from each lane's
// sum; and what products are worth.
struct v_digits {
    __m512i line[KVD_CPU_ROWS][DIGITS], centre[KVD_CPU_ROWS];
    float worth[KVD_CPU_ROWS];
};

static inline void v_digits_of(uint32_t codec, const float *p, uint32_t rows, struct v_digits *to)
{
    const __m512i centre = centre_of(codec);
    for (uint32_t r = 0; r < rows; r++) {
        __m512i sum = _mm512_setzero_si512();
        to->worth[r] = digit_step(codec) * digit_tokens(p + r * KVD_PAGE_TOKENS, to->line[r]);
        for (uint32_t d = DIGITS; d-- > 0;)
            sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), centre, to->line[r][d]);
        // Of four chunks, which lie side by side; lanes of one pair of tokens have the same.
        sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, 0xb1));
        to->centre[r] = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, 0x4e));
    }
}

// A chunk's digits for lanes as digit_words has them. Shuffled as they are loaded: stored for all
// chunks they took longer.
static KVD_BY_CASE __m512i v_chunk(const __m512i *line, const uint32_t chunk)
{
    switch (chunk) {
    case 0:
        return _mm512_shuffle_epi32(*line, 0x00);
    case 1:
        return _mm512_shuffle_epi32(*line, 0x55);
    case 2:
        return _mm512_shuffle_epi32(*line, 0xaa);
    default:
        return _mm512_shuffle_epi32(*line, 0xff);
    }
}

// Adds a group's sums of some rows from `row` on. acc of one row: [block][group][slot][16 lanes].
static KVD_BY_CASE void v_group(const uint32_t rows, const __m512i x[SLOTS][4], uint32_t row,
                                const struct v_digits *p, uint32_t dim, float *acc)
{
    __m512i sum[SLOTS][PAIR];
    for (uint32_t d = DIGITS; d-- > 0;) {
        for (uint32_t s = 0; s < SLOTS; s++)
            for (uint32_t r = 0; r < rows; r++)
                sum[s][r] =
                    d == DIGITS - 1 ? _mm512_setzero_si512() : _mm512_slli_epi32(sum[s][r], 8);
        for (uint32_t chunk = 0; chunk < 4; chunk++)
            for (uint32_t r = 0; r < rows; r++) {
                __m512i y = v_chunk(&p->line[row + r][d], chunk);
                LOADED(y);
                for (uint32_t s = 0; s < SLOTS; s++)
                    sum[s][r] = _mm512_dpbusd_epi32(sum[s][r], x[s][chunk], y);
            }
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t s = 0; s < SLOTS; s++) {
            float *to = acc + (row + r) * 8 * dim + s * 16;
            __m512 all = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[s][r], p->centre[row + r]));
            _mm512_storeu_ps(
                to, _mm512_fmadd_ps(all, _mm512_set1_ps(p->worth[row + r]), _mm512_loadu_ps(to)));
        }
}

static KVD_BY_CASE void v_rows(const bool four, const uint32_t rows, const uint8_t *codes,
                               uint32_t dim, const struct v_digits *p, float *acc,
                               struct kvd_cpu_ahead *ahead)
{
    for (uint32_t group = 0; group < dim / BLOCK * 8; group++) {
        const uint8_t *at = codes + group / 8 * BLOCK_BYTES + group % 8 * LINE;
        __m512i x[SLOTS][4];
        kvd_cpu_ask(ahead, 1);
        for (uint32_t chunk = 0; chunk < 4; chunk++) {
            __m512i low = digit_words(at + chunk * 4 * dim),
                    high = digit_words(at + chunk * 4 * dim + (four ? 16 * dim : 0));
            for (int s = 0; s < SLOTS; s++)
                x[s][chunk] = codes_of(four, low, high, s);
        }
        for (uint32_t r = 0; r < rows; r += PAIR) {
            LOAD_AGAIN(p);
            v_group(KVD_MIN(rows - r, PAIR), x, r, p, dim, acc + group * SLOTS * 16);
        }
    }
}

static KVD_BY_CASE void v_kind(const bool four, const uint8_t *codes, uint32_t dim,
                               const struct v_digits *p, uint32_t rows, float *acc,
                               struct kvd_cpu_ahead *ahead)
{
    if (rows == 4)
        v_rows(four, 4, codes, dim, p, acc, ahead);
    else if (rows == 3)
        v_rows(four, 3, codes, dim, p, acc, ahead);
    else if (rows == 2)
        v_rows(four, 2, codes, dim, p, acc, ahead);
    else
        v_rows(four, 1, codes, dim, p, acc, ahead);
}

void kvd_vnni_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                           uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead)
{
    if (!digits_take(codec, dim, true)) {
        kvd_cpu_avx512.v_accumulate(codec, codes, dim, p, rows, acc, ahead);
        return;
    }
    struct v_digits digits;
    v_digits_of(codec, p, rows, &digits);
    if (kvd_codec_bits(codec) == 4)
        v_kind(true, codes, dim, &digits, rows, acc, ahead);
    else
        v_kind(false, codes, dim, &digits, rows, acc, ahead);
}

void kvd_vnni_v_reduce(uint32_t codec, const float *acc, uint32_t dim, float *o)
{
    if (!digits_take(codec, dim, true)) {
        kvd_cpu_avx512.v_reduce(codec, acc, dim, o);
        return;
    }
    for (uint32_t c = 0; c < dim; c++) {
        uint32_t tile = c % BLOCK / 16, group = c % 8, h = c % 16 / 8;
        const float *lane =
            acc + (c / BLOCK * 8 + group) * SLOTS * 16 + tile % 4 * 16 + 2 * h + tile / 4;
        o[c] = lane[0] + lane[4] + lane[8] + lane[12];
    }
}
