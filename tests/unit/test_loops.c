// The inner loops over codes of every instruction set that this CPU has, against the plain ones:
// every codec, dim and number of rows, at numbers that would show if an instruction set keeps them
// in fewer bits than fp32 has.
#include "tests/unit/suite.h"

#include <math.h>

#include "kernels/cpu/cpu.h"

enum { ROWS = KVD_CPU_ROWS, T = KVD_PAGE_TOKENS };

static const struct kvd_cpu_isa *const isas[] = {
#ifdef KVD_X86
    &kvd_cpu_avx2, &kvd_cpu_avx512, &kvd_cpu_vnni, &kvd_cpu_amx
#else
    &kvd_cpu_scalar
#endif
};

static const uint32_t dims[] = {
#define KVD_HEAD_DIM(dim) dim,
#include "proto/head_dims.def"
};

// What numbers of a row are like.
enum kind { EVEN, OUTLIER, WIDE, TINY, HUGE, ZERO, KINDS };

static float number(uint64_t *rng, enum kind kind, uint32_t i)
{
    float x = (float)((double)(kvd_rand(rng) >> 11) * 0x1p-53);
    switch (kind) {
    case OUTLIER:
        return i == 37 ? 3000 : x;
    case WIDE: // as probabilities are
        return expf(-20 * x);
    case TINY:
        return x * 1e-20f;
    case HUGE:
        return x * 1e30f;
    case ZERO:
        return 0;
    default:
        return x;
    }
}

struct loops {
    uint32_t codec, dim, rows;
    struct kvd_tc_coder tc;
    float bits[KVD_TC_MAX_TILES];
    uint8_t codes[KVD_TC_MOST_BYTES + 64];
    _Alignas(64) float x[ROWS * KVD_MAX_HEAD_DIM]; // queries, or probabilities [row][64]
    float most[ROWS];                              // of a row's numbers without their signs
};

static void fill_loops(struct loops *l, uint64_t *rng, uint32_t codec, uint32_t dim, bool v)
{
    uint32_t n = v ? T : dim, tiles = dim / KVD_TC_TILE;
    *l = (struct loops){.codec = codec, .dim = dim, .rows = 1 + (uint32_t)(kvd_rand(rng) % ROWS)};
    for (size_t i = 0; i < sizeof(l->codes); i++)
        l->codes[i] = (uint8_t)(kvd_rand(rng) >> 40);
    for (uint32_t left = kvd_codec_tc(codec) ? kvd_tc_stream_bits(codec, dim) : 0; left;) {
        float *b = &l->bits[kvd_rand(rng) % tiles];
        left -= *b < KVD_TC_MAX_BITS;
        *b += *b < KVD_TC_MAX_BITS;
    }
    if (kvd_codec_tc(codec))
        l->tc = kvd_tc_coder_of(codec, dim, v, NULL, kvd_rand(rng) % 4 ? l->bits : NULL);
    for (uint32_t r = 0; r < ROWS; r++) {
        enum kind kind = kvd_rand(rng) % KINDS;
        for (uint32_t i = 0; i < n; i++) {
            float sign = !v && kvd_rand(rng) % 2 ? -1 : 1;
            l->x[r * n + i] = sign * number(rng, kind, i);
            l->most[r] = fmaxf(l->most[r], fabsf(l->x[r * n + i]));
        }
    }
}

static void scores_of(const struct kvd_cpu_isa *isa, const struct loops *l, float *scores)
{
    struct kvd_cpu_ahead ahead = {0};
    _Alignas(64) float q[KVD_CPU_QUERIES];
    memset(q, 0xff, sizeof(q));
    memset(scores, 0xff, ROWS * T * sizeof(float));
    for (uint32_t r = 0; r < l->rows; r++)
        isa->q_prepare(l->codec, &l->tc, l->x + r * l->dim, l->dim, q + r * 2 * l->dim);
    if (isa->enter)
        isa->enter();
    if (kvd_codec_tc(l->codec))
        isa->tc_scores(&l->tc, l->codes, q, l->rows, scores, &ahead);
    else
        isa->k_scores(l->codec, l->codes, l->dim, q, l->rows, scores, &ahead);
    if (isa->leave)
        isa->leave();
}

static void sums_of(const struct kvd_cpu_isa *isa, const struct loops *l, float *o)
{
    struct kvd_cpu_ahead ahead = {0};
    static _Alignas(64) float acc[ROWS * 8 * KVD_MAX_HEAD_DIM];
    memset(acc, 0, sizeof(acc));
    if (isa->enter)
        isa->enter();
    isa->v_accumulate(l->codec, l->codes, l->dim, l->x, l->rows, acc, &ahead);
    if (isa->leave)
        isa->leave();
    for (uint32_t r = 0; r < l->rows; r++)
        isa->v_reduce(l->codec, acc + r * 8 * l->dim, l->dim, o + r * l->dim);
}

// The largest level, and for products the number of those that are added.
static void compare(const struct loops *l, const struct kvd_cpu_isa *isa, bool v, const float *got,
                    const float *want, uint32_t n, uint32_t stride)
{
    double level = kvd_codec_bits(l->codec) == 4 || (kvd_codec_tc(l->codec) && !v) ? 7.5 : 2.2;
    for (uint32_t i = 0; i < l->rows * n; i++) {
        uint32_t at = i / n * stride + i % n;
        double limit = 0x1p-22 * level * l->most[i / n] * (v ? T : l->dim) + 1e-38;
        ck_assert_msg(fabs((double)got[at] - (double)want[at]) <= limit,
                      "%s %s of %s dim %u rows %u: row %u place %u: %.9g for %.9g, limit %.2g",
                      isa->name, v ? "sums" : "scores", kvd_codec_name(l->codec), l->dim, l->rows,
                      i / n, i % n, (double)got[at], (double)want[at], limit);
    }
}

static void compare_all(struct loops *l, const struct kvd_cpu_isa *isa, bool v)
{
    static float want[ROWS * KVD_MAX_HEAD_DIM], got[ROWS * KVD_MAX_HEAD_DIM];
    if (v) {
        sums_of(&kvd_cpu_scalar, l, want);
        sums_of(isa, l, got);
    } else {
        scores_of(&kvd_cpu_scalar, l, want);
        scores_of(isa, l, got);
    }
    compare(l, isa, v, got, want, v ? l->dim : T, v ? l->dim : T);
}

START_TEST(all_are_as_exact_as_floats)
{
    uint64_t rng = kvd_test_seed("loops");
    static struct loops l;
    for (uint32_t round = 0; round < 12; round++)
        for (uint32_t codec = KVD_CODEC_BF16 + 1; codec < KVD_CODEC_COUNT; codec++)
            for (size_t d = 0; d < KVD_LEN(dims); d++)
                for (size_t i = 0; i < KVD_LEN(isas); i++) {
                    if (!isas[i]->supported())
                        continue;
                    for (int v = 0; v < 2; v++) {
                        fill_loops(&l, &rng, codec, dims[d], v);
                        compare_all(&l, isas[i], v);
                    }
                }
}
END_TEST

// Loops that add in bytes, or in words of 16 bits, have room for what all the largest codes and
// numbers add up to, and all the smallest.
START_TEST(the_largest_sums_fit)
{
    uint64_t rng = kvd_test_seed("largest");
    static struct loops l;
    const uint8_t codes[] = {0, 0xff, 0x55, 0xaa};
    for (uint32_t codec = KVD_CODEC_BF16 + 1; codec < KVD_CODEC_COUNT; codec++)
        for (size_t d = 0; d < KVD_LEN(dims); d++)
            for (size_t i = 0; i < KVD_LEN(isas); i++)
                for (uint32_t c = 0; c < KVD_LEN(codes) * 4 && isas[i]->supported(); c++) {
                    const bool v = c & 1, negative = c & 2 && !v;
                    fill_loops(&l, &rng, codec, dims[d], v);
                    memset(l.codes, codes[c / 4], sizeof(l.codes));
                    for (uint32_t r = 0; r < ROWS; r++)
                        l.most[r] = 4; // twice the numbers: sums of equals are rounded alike
                    for (uint32_t j = 0; j < ROWS * (v ? T : l.dim); j++)
                        l.x[j] = negative ? -0x1.fffffep0f : 0x1.fffffep0f;
                    compare_all(&l, isas[i], v);
                }
}
END_TEST

// A number that is not finite is seen in every result of its row, and in no other's.
START_TEST(what_is_not_finite_is_not_lost)
{
    uint64_t rng = kvd_test_seed("not finite");
    static struct loops l;
    static float got[ROWS * KVD_MAX_HEAD_DIM];
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (uint32_t codec = KVD_CODEC_BF16 + 1; codec < KVD_CODEC_COUNT; codec++)
        for (size_t i = 0; i < KVD_LEN(isas); i++)
            for (int v = 0; v < 2 && isas[i]->supported(); v++) {
                uint32_t n = v ? T : 128, of = v ? 128 : T;
                fill_loops(&l, &rng, codec, 128, v);
                uint32_t row = (uint32_t)kvd_rand(&rng) % l.rows, at = (uint32_t)kvd_rand(&rng) % n;
                if (!v && kvd_codec_tc(codec)) // channels that have no codes count for nothing
                    l.tc = kvd_tc_coder_of(codec, 128, false, NULL, NULL);
                l.x[row * n + at] = bad[kvd_rand(&rng) % 3];
                if (v)
                    sums_of(isas[i], &l, got);
                else
                    scores_of(isas[i], &l, got);
                for (uint32_t j = 0; j < l.rows * of; j++)
                    ck_assert_msg((isfinite(got[j]) == 0) == (j / of == row),
                                  "%s %s %s: row %u of %u, in row %u place %u: %g", isas[i]->name,
                                  v ? "sums" : "scores", kvd_codec_name(codec), row, l.rows, j / of,
                                  j % of, (double)got[j]);
            }
}
END_TEST

KVD_MAIN("loops", 300, all_are_as_exact_as_floats, the_largest_sums_fit,
         what_is_not_finite_is_not_lost)
