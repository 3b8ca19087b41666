// The codecs, row by row: places of codes, levels, what quantizing costs, extreme rows, golden
// tiles.
#include "tests/unit/suite.h"

#include "kernels/codebook.h"
#include "kernels/tc.h"
#include "tests/unit/kernel_fixture.h"

static const uint32_t dims[] = {
#define KVD_HEAD_DIM(d) (d),
#include "proto/head_dims.def"
};
static const uint32_t rows[] = {
// of codes that there are: a head_dim or a latent
#define KVD_HEAD_DIM(d)               (d),
#define KVD_LATENT_DIMS(rope, latent) (latent),
#include "proto/head_dims.def"
};

START_TEST(every_bit_of_a_code_has_its_own_place)
{
    for (size_t d = 0; d < KVD_LEN(rows); d++)
        for (uint32_t width = 1; width <= 2; width++)
            for (int v = 0; v < 2; v++) {
                uint32_t dim = rows[d];
                uint8_t seen[64 * KVD_MAX_ROW] = {0}, chunk_of[64 * KVD_MAX_ROW] = {0};
                for (uint32_t t = 0; t < 64; t++)
                    for (uint32_t c = 0; c < dim; c++) {
                        struct kvd_code_place p = kvd_place_of(v, dim, width, t, c);
                        ck_assert_uint_lt(p.byte, 8 * dim * width);
                        ck_assert_uint_eq(p.bit % width, 0);
                        ck_assert_uint_eq(seen[(p.byte * 8 + p.bit) / width]++, 0);
                        // Chunks of 16 tokens share no byte, so that demotion can write bytes;
                        // but for one plane.
                        uint32_t before = chunk_of[p.byte];
                        chunk_of[p.byte] = 1 + t / 16;
                        ck_assert(before == 0 || before == 1 + t / 16 || (width == 1 && dim == 64));
                    }
            }
}
END_TEST

START_TEST(tiles_have_no_gaps_and_state_their_bits)
{
    const double bits[KVD_CODEC_COUNT] = {16,    2.25,  2.125, 2.25,  2.125,
                                          3.125, 4.125, 4.25,  2.125, 2.375};
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
        ck_assert_uint_eq(kvd_codec_find(kvd_codec_name(codec)), codec);
        ck_assert(strstr(kvd_codec_names(), kvd_codec_name(codec)) != NULL);
        double got = 8.0 * (double)kvd_tile_bytes(kvd_codecs_both(codec), 128, 128) / 64 / 256;
        ck_assert_double_eq(got, bits[codec]);
#define KVD_HEAD_DIMS(k, v) ck_assert_uint_eq(kvd_tile_bytes(kvd_codecs_both(codec), k, v) % 16, 0);
#include "proto/head_dims.def"
    }
    ck_assert_uint_eq(kvd_codec_find("int3"), KVD_CODEC_COUNT);
}
END_TEST

// The levels are the centroids of their cells under the normal density, by numeric integration.
START_TEST(levels_are_those_of_lloyd_and_max)
{
    const uint32_t codecs[] = {KVD_CODEC_TURBOQUANT_2, KVD_CODEC_TURBOQUANT_3,
                               KVD_CODEC_TURBOQUANT_4};
    const float t2[] = {KVD_THRESHOLDS_2}, t3[] = {KVD_THRESHOLDS_3}, t4[] = {KVD_THRESHOLDS_4};
    const float *const thresholds[] = {t2, t3, t4};
    for (size_t i = 0; i < 3; i++) {
        const float *level = kvd_codec_levels(codecs[i]);
        uint32_t n = 2u << i;
        for (uint32_t m = 0; m < n; m++) {
            double lo = m ? thresholds[i][m - 1] : 0, hi = m + 1 < n ? thresholds[i][m] : 12;
            double mass = 0, moment = 0;
            for (int k = 0; k < 100000; k++) {
                double x = lo + (hi - lo) * (k + 0.5) / 100000, p = exp(-x * x / 2);
                mass += p;
                moment += p * x;
            }
            ck_assert_double_eq_tol(level[m], moment / mass, 6e-4 * level[m]); // fp16
            ck_assert_float_eq(level[m + n], -level[m]);
            if (m)
                ck_assert_double_eq_tol((level[m] + level[m - 1]) / 2, thresholds[i][m - 1], 1e-3);
        }
    }
}
END_TEST

static void normal_row(uint64_t *rng, uint32_t dim, double mean, double deviation, float *x)
{
    for (uint32_t c = 0; c < dim; c++)
        x[c] = (float)(mean + deviation * kseq_normal(rng));
}

// Of tc2 and tc2.5 without a set's terms.
static struct kvd_tc_coder coder_of(uint32_t codec, uint32_t dim, bool v)
{
    return kvd_codec_tc(codec) ? kvd_tc_coder_of(codec, dim, v, NULL, NULL)
                               : (struct kvd_tc_coder){0};
}

// A row through a tile and back.
static double row_error(const struct kvd_quantizer *q, const float *x, uint32_t dim, uint64_t *rng,
                        float *y)
{
    static uint8_t tile[64 * 2 * 512];
    struct kvd_row row;
    uint32_t token = (uint32_t)(kvd_rand(rng) % 64);
    bool v = kvd_rand(rng) % 2;
    struct kvd_tc_coder tc = coder_of(q->codec, dim, v);
    struct kvd_quantizer with = *q;
    with.tc = &tc;
    kvd_row_quantize(&with, x, dim, &row);
    kvd_row_pack(kvd_codecs_both(q->codec), tile, dim, dim, v, &tc, token, &row);
    kvd_row_unpack(kvd_codecs_both(q->codec), tile, dim, dim, v, &tc, token, y);
    double e = 0;
    for (uint32_t c = 0; c < dim; c++)
        e += ((double)y[c] - x[c]) * ((double)y[c] - x[c]);
    return e / dim;
}

// Means over many normal rows: near what is known for infinitely long ones (DESIGN section 5).
START_TEST(mean_squared_errors_are_those_of_the_literature)
{
    const struct {
        struct kvd_quantizer q;
        double mean, low, high;
    } cases[] = {{{KVD_CODEC_INT2, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.22, 0.27},
                 {{KVD_CODEC_INT2, 0.92f, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.118, 0.132},
                 {{KVD_CODEC_INT2C, 0.92f, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.118, 0.132},
                 {{KVD_CODEC_INT2C, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 3, 0.22, 0.28},
                 {{KVD_CODEC_INT2, 1, 0.9f, KVD_SCALE_LEAST_SQUARES, NULL}, 3, 0.108, 0.1198},
                 {{KVD_CODEC_INT2C, 1, 0.9f, KVD_SCALE_LEAST_SQUARES, NULL}, 3, 0.108, 0.1205},
                 {{KVD_CODEC_INT4, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 3, 0.0085, 0.0125},
                 {{KVD_CODEC_INT4, 1, 0.9f, KVD_SCALE_LEAST_SQUARES, NULL}, 3, 0.0095, 0.0117},
                 {{KVD_CODEC_TURBOQUANT_2, 1, 1, KVD_SCALE_LEAST_SQUARES, NULL}, 0, 0.112, 0.120},
                 {{KVD_CODEC_TC2, 1, 1, KVD_SCALE_UNBIASED, NULL}, 0, 0.120, 0.136},
                 {{KVD_CODEC_INT2_LM, 1, 1, KVD_SCALE_UNBIASED, NULL}, 5, 0.120, 0.134},
                 {{KVD_CODEC_INT2_LM, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.108, 0.1185},
                 {{KVD_CODEC_INT2_LM, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 5, 0.108, 0.1185},
                 {{KVD_CODEC_TURBOQUANT_2, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.114, 0.121},
                 {{KVD_CODEC_TURBOQUANT_3, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.0333, 0.0358},
                 {{KVD_CODEC_TURBOQUANT_4, 1, 1, KVD_SCALE_PUBLISHED, NULL}, 0, 0.0091, 0.0099}};
    uint64_t rng = kvd_test_seed("errors");
    for (size_t i = 0; i < KVD_LEN(cases); i++) {
        double sum = 0;
        for (int k = 0; k < 2000; k++) {
            float x[128], y[128];
            normal_row(&rng, 128, cases[i].mean, 1, x);
            sum += row_error(&cases[i].q, x, 128, &rng, y) / 2000;
        }
        ck_assert_msg(sum > cases[i].low && sum < cases[i].high, "%s about %g: %.4f",
                      kvd_codec_name(cases[i].q.codec), cases[i].mean, sum);
    }
}
END_TEST

// Every value goes to the level nearest to it, of those that the row's parameters offer.
START_TEST(codes_are_those_of_the_nearest_levels)
{
    uint64_t rng = kvd_test_seed("nearest");
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        // int2's and int4's codes come from a scale and min without the gain; test_transforms has
        // tc2's and tc2.5's.
        for (int k = 0; k < 300 && codec != KVD_CODEC_BF16 && codec != KVD_CODEC_INT2 &&
                        codec != KVD_CODEC_INT4 && !kvd_codec_tc(codec);
             k++) {
            uint32_t dim = dims[k % KVD_LEN(dims)];
            float x[256];
            struct kvd_row row;
            struct kvd_quantizer q = {codec, 1, 1, KVD_SCALE_PUBLISHED, NULL};
            normal_row(&rng, dim, kseq_normal(&rng), exp(kseq_normal(&rng)), x);
            kvd_row_quantize(&q, x, dim, &row);
            struct kvd_affine a = kvd_param_decode(codec, row.param);
            const float *level = kvd_codec_levels(codec);
            for (uint32_t c = 0; c < dim; c++) {
                double least = INFINITY, got = fabs(a.scale * level[row.codes[c]] + a.min - x[c]);
                for (uint32_t i = 0; i < 1u << kvd_codec_bits(codec); i++)
                    least = fmin(least, fabs(a.scale * level[i] + a.min - x[c]));
                // But for fp16 parameters and levels.
                ck_assert_double_le(got, least + 4e-3 * a.scale + 1e-3 * fabs(a.min));
            }
        }
}
END_TEST

START_TEST(gain_draws_levels_together_about_the_centre)
{
    uint64_t rng = kvd_test_seed("gain");
    for (int k = 0; k < 100; k++) {
        float x[64];
        struct kvd_row plain, drawn;
        normal_row(&rng, 64, 2, 1, x);
        kvd_row_quantize(
            &(struct kvd_quantizer){KVD_CODEC_INT2, 0.9f, 1, KVD_SCALE_PUBLISHED, NULL}, x, 64,
            &plain);
        kvd_row_quantize(
            &(struct kvd_quantizer){KVD_CODEC_INT2, 0.9f, 0.9f, KVD_SCALE_PUBLISHED, NULL}, x, 64,
            &drawn);
        struct kvd_affine a = kvd_param_decode(KVD_CODEC_INT2, plain.param),
                          b = kvd_param_decode(KVD_CODEC_INT2, drawn.param);
        ck_assert_int_eq(memcmp(plain.codes, drawn.codes, 64), 0);
        ck_assert_double_eq_tol(b.scale, 0.9 * a.scale, 2e-3 * a.scale);
        ck_assert_double_eq_tol(b.min + 1.5 * b.scale, a.min + 1.5 * a.scale, 8e-3 * a.scale);
        kvd_row_quantize(
            &(struct kvd_quantizer){KVD_CODEC_INT2C, 0.9f, 0.9f, KVD_SCALE_PUBLISHED, NULL}, x, 64,
            &drawn);
        struct kvd_affine c = kvd_param_decode(KVD_CODEC_INT2C, drawn.param);
        ck_assert_double_eq_tol(c.scale, b.scale, 0.0450 * b.scale); // 2^(1/16) - 1, and fp16
        ck_assert_double_eq_tol(c.min + 1.5 * c.scale, b.min + 1.5 * b.scale, 0.07 * b.scale);
    }
}
END_TEST

// How long a row is that comes back, along the row that went in and about its mean: 1 is unbiased.
// *off: how far its mean is away, in deviations of the row.
static double along(const float *x, const float *y, uint32_t dim, bool about_zero, double *off)
{
    double mx = 0, my = 0, xx = 0, xy = 0;
    for (uint32_t c = 0; c < dim && !about_zero; c++)
        mx += (double)x[c] / dim, my += (double)y[c] / dim;
    for (uint32_t c = 0; c < dim; c++)
        xx += (x[c] - mx) * (x[c] - mx), xy += (x[c] - mx) * (y[c] - my);
    *off = fabs(my - mx) / sqrt(xx / dim);
    return xy / xx;
}

// Rows come back shorter than they went in, by about the mean squared error, or, with unbiased
// scales, neither longer nor shorter: each of them, but for int2c's coarse scales, which are right
// on average.
START_TEST(unbiased_rows_keep_their_length_and_mean)
{
    uint64_t rng = kvd_test_seed("unbiased");
    const double slack[] = {[KVD_CODEC_INT2C] = 0.2};
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
        double mean[2] = {0};
        for (int k = 0; k < 2 * 1000 && codec != KVD_CODEC_BF16; k++) {
            uint32_t dim = dims[k / 2 % KVD_LEN(dims)];
            float x[256], y[256], z[256];
            bool about_zero =
                strcmp(kvd_codec_transform(codec), "random") == 0 || kvd_codec_tc(codec);
            double off, d = exp(kseq_normal(&rng)),
                        may = 1e-3 + (codec < KVD_LEN(slack) ? slack[codec] : 0);
            struct kvd_quantizer q = {codec, 0.92f, 0.9f,
                                      k % 2 ? KVD_SCALE_UNBIASED : KVD_SCALE_PUBLISHED, NULL};
            normal_row(&rng, dim, about_zero ? 0 : 2 * d * kseq_normal(&rng), d, x);
            uint64_t again = rng; // the same side and token
            row_error(&q, x, dim, &rng, y);
            double got = along(x, y, dim, about_zero, &off);
            mean[k % 2] += got / 1000;
            if (k % 2 == 0)
                continue;
            ck_assert_double_lt(off, codec == KVD_CODEC_INT2C ? 0.1 : 5e-3); // eighths of a scale
            ck_assert_msg(fabs(got - 1) < may, "%s, head_dim %u: %.4f", kvd_codec_name(codec), dim,
                          got);
            q.gain = 1.1f; // has no say
            row_error(&q, x, dim, &again, z);
            ck_assert_int_eq(memcmp(y, z, dim * sizeof(*y)), 0);
        }
        if (codec == KVD_CODEC_BF16)
            continue;
        // int2c's scales are off by 2.5 % (one deviation), so the mean of 1,000 by 0.08 %.
        ck_assert_msg(fabs(mean[1] - 1) < (codec == KVD_CODEC_INT2C ? 5e-3 : 2e-3), "%s: %.4f",
                      kvd_codec_name(codec), mean[1]);
        ck_assert_msg(mean[0] < 0.995 || kvd_codec_tc(codec), "%s, biased: %.4f",
                      kvd_codec_name(codec), mean[0]);
    }
}
END_TEST

static double variance(const float *x, uint32_t dim)
{
    double mean = 0, sum = 0;
    for (uint32_t c = 0; c < dim; c++)
        mean += (double)x[c] / dim;
    for (uint32_t c = 0; c < dim; c++)
        sum += (x[c] - mean) * (x[c] - mean);
    return sum / dim;
}

// int2c's bytes reach from tiny to large rows and centres; beyond, the error grows with what they
// miss, not at once.
START_TEST(int2c_reaches_far)
{
    uint64_t rng = kvd_test_seed("int2c");
    const struct kvd_quantizer c = {KVD_CODEC_INT2C, 0.92f, 1, KVD_SCALE_PUBLISHED, NULL};
    for (int e = -12; e <= 12; e++) {
        float x[128], y[128];
        double unit = ldexp(1, e);
        normal_row(&rng, 128, 0, unit, x);
        // Of a row's own variance: 0.129 on average, 0.231 in the worst of two million rows.
        ck_assert_double_lt(row_error(&c, x, 128, &rng, y), 0.25 * variance(x, 128));
        normal_row(&rng, 128, 100 * unit, unit, x); // a centre of some 100 scales
        ck_assert_double_lt(sqrt(row_error(&c, x, 128, &rng, y)), 100 * unit / 15);
    }
    float constant[64], y[64];
    for (int i = 0; i < 64; i++)
        constant[i] = -7;
    ck_assert_double_lt(row_error(&c, constant, 64, &rng, y), 0.05 * 0.05 * 49);
    const struct kvd_quantizer unbiased = {KVD_CODEC_INT2C, 0.92f, 1, KVD_SCALE_UNBIASED, NULL};
    ck_assert_double_lt(row_error(&unbiased, constant, 64, &rng, y), 0.05 * 0.05 * 49);
}
END_TEST

START_TEST(extreme_rows_stay_finite)
{
    const float quads[][4] = {{0, 0, 0, 0},
                              {3e38f, -3e38f, 1, 0},
                              {1e-40f, 0, 0, 0},
                              {NAN, 1, 2, 3},
                              {7, 7, 7, 7},
                              {3e38f, 3e38f, 3e38f, 3e38f},
                              {INFINITY, -INFINITY, 0, 0},
                              {NAN, NAN, NAN, NAN},
                              {-1e-30f, 2e-30f, 0, 1e-30f}};
    uint64_t rng = 1;
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        for (size_t i = 0; i < KVD_LEN(quads) && codec != KVD_CODEC_BF16; i++)
            for (int k = 0; k < 9; k++) {
                float x[64], y[64], gain = 0.5f + 0.5f * (float)(k % 3);
                struct kvd_row row;
                struct kvd_tc_coder tc = coder_of(codec, 64, k % 2);
                struct kvd_quantizer q = {codec, 0.96f, gain, (enum kvd_scale)(k / 3), &tc};
                bool coded = kvd_codec_tc(codec);
                for (int c = 0; c < 64; c++)
                    x[c] = quads[i][c % 4];
                kvd_row_quantize(&q, x, 64, &row);
                struct kvd_affine a = kvd_param_decode(codec, row.param);
                ck_assert_msg(isfinite(a.scale) && isfinite(a.min), "%s row %zu",
                              kvd_codec_name(codec), i);
                for (int c = 0; c < 64; c++)
                    ck_assert_uint_lt(row.codes[c],
                                      1u << (coded ? tc.bits[c / 16] : kvd_codec_bits(codec)));
                row_error(&q, x, 64, &rng, y);
                for (int c = 0; i == 0 && c < 64; c++)
                    ck_assert_double_eq(y[c], 0);
            }
}
END_TEST

// The next tile of a codec, which has a set's terms before it or is made without.
static void golden_tc(FILE *f, uint32_t codec, bool terms, const float *x, const uint32_t d[2])
{
    float sigma[KVD_MAX_HEAD_DIM], bits[KVD_TC_MAX_TILES];
    if (terms) {
        ck_assert_uint_eq(fread(sigma, sizeof(float), d[0], f), d[0]);
        ck_assert_uint_eq(fread(bits, sizeof(float), d[0] / 16, f), d[0] / 16);
    }
    uint64_t bytes = kvd_tile_bytes(kvd_codecs_both(codec), d[0], d[1]), differ = 0;
    uint8_t *want = malloc(bytes), *got = malloc(bytes);
    ck_assert_uint_eq(fread(want, 1, bytes, f), bytes);
    memset(got, 0xff, bytes);
    for (uint32_t t = 0; t < 128; t++) {
        bool v = t >= 64;
        struct kvd_row row;
        struct kvd_tc_coder tc =
            kvd_tc_coder_of(codec, d[v], v, terms ? sigma : NULL, terms ? bits : NULL);
        struct kvd_quantizer q = {.codec = codec, .tc = &tc};
        kvd_row_quantize(&q, x + (v ? 64 * d[0] + (t - 64) * d[1] : t * d[0]), d[v], &row);
        kvd_row_pack(kvd_codecs_both(codec), got, d[0], d[1], v, &tc, t % 64, &row);
    }
    for (uint64_t b = 0; b < bytes; b++)
        differ += got[b] != want[b];
    ck_assert_msg(differ <= 1, "%s, terms %d: %llu of %llu bytes differ at head_dim %u/%u",
                  kvd_codec_name(codec), terms, (unsigned long long)differ,
                  (unsigned long long)bytes, d[0], d[1]);
    free(want);
    free(got);
}

// Tiles that tests/data/make_golden.py wrote from the specification, in another language: per case
// head_dims and rows, then tiles of each codec but bf16, one for each kind of scale.
START_TEST(golden_tiles)
{
    const char *data = getenv("KVD_TEST_DATA");
    char path[512];
    snprintf(path, sizeof(path), "%s/golden_codecs.bin", data ? data : "tests/data");
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "%s is missing", path);
    uint32_t d[2], cases = 0;
    while (fread(d, sizeof(d), 1, f) == 1) {
        float *x = malloc(sizeof(float) * 64 * (d[0] + d[1]));
        ck_assert_uint_eq(fread(x, sizeof(float) * 64, d[0] + d[1], f), d[0] + d[1]);
        for (uint32_t i = 0; i < KVD_SCALE_COUNT * KVD_CODEC_COUNT; i++) {
            uint32_t codec = i / KVD_SCALE_COUNT;
            if (codec == KVD_CODEC_BF16 || kvd_codec_tc(codec))
                continue;
            uint64_t bytes = kvd_tile_bytes(kvd_codecs_both(codec), d[0], d[1]), differ = 0;
            uint8_t *want = malloc(bytes), *got = malloc(bytes);
            ck_assert_uint_eq(fread(want, 1, bytes, f), bytes);
            memset(got, 0xff, bytes);
            for (uint32_t t = 0; t < 128; t++) {
                struct kvd_row row;
                bool v = t >= 64;
                struct kvd_quantizer q = {codec, v ? 0.92f : 0.96f, v ? 0.95f : 1.0f,
                                          (enum kvd_scale)(i % KVD_SCALE_COUNT), NULL};
                kvd_row_quantize(&q, x + (v ? 64 * d[0] + (t - 64) * d[1] : t * d[0]), d[v], &row);
                kvd_row_pack(kvd_codecs_both(codec), got, d[0], d[1], v, NULL, t % 64, &row);
            }
            for (uint64_t b = 0; b < bytes; b++)
                differ += got[b] != want[b];
            // fp32 and fp64 may round a parameter, or a value at a boundary, apart once in a while.
            ck_assert_msg(differ <= 2, "%s, scales %u: %llu of %llu bytes differ at head_dim %u/%u",
                          kvd_codec_name(codec), i % KVD_SCALE_COUNT, (unsigned long long)differ,
                          (unsigned long long)bytes, d[0], d[1]);
            free(want);
            free(got);
        }
        for (uint32_t i = 0; i < 4; i++)
            golden_tc(f, i < 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5, i % 2, x, d);
        free(x);
        cases++;
    }
    fclose(f);
    ck_assert_uint_eq(cases, 10);
}
END_TEST

KVD_MAIN("codecs", 120, every_bit_of_a_code_has_its_own_place,
         tiles_have_no_gaps_and_state_their_bits, levels_are_those_of_lloyd_and_max,
         mean_squared_errors_are_those_of_the_literature, codes_are_those_of_the_nearest_levels,
         gain_draws_levels_together_about_the_centre, unbiased_rows_keep_their_length_and_mean,
         int2c_reaches_far, extreme_rows_stay_finite, golden_tiles)
