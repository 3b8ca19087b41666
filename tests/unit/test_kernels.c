// The CPU backend against float64, on every instruction set that this CPU has.
#include "tests/unit/suite.h"

#include <sys/mman.h>

#include "tests/unit/kernel_long.h"
#include "tests/unit/kernel_nonfinite.h"

static const char *const isas[] = {"scalar", "avx2", "avx512", "vnni", "amx"};

static struct kvd_backend *backend(const char *isa, uint32_t threads)
{
    struct kvd_error err = {0};
    return kvd_cpu_backend_new(threads, isa, &err); // NULL: this CPU has no such instructions
}

// The tests below go over those that are here. What is not here counts as a test that was skipped.
static void skip_if_missing(const char *isa)
{
    struct kvd_backend *b = backend(isa, 1);
    if (!b)
        printf("SKIP %s: this CPU does not have it\n", isa);
    kvd_backend_free(&b);
}

START_TEST(avx2_is_among_those_tested)
{
    skip_if_missing("avx2");
}
END_TEST

START_TEST(avx512_is_among_those_tested)
{
    skip_if_missing("avx512");
}
END_TEST

START_TEST(vnni_is_among_those_tested)
{
    skip_if_missing("vnni");
}
END_TEST

START_TEST(amx_is_among_those_tested)
{
    skip_if_missing("amx");
}
END_TEST

// stretch: of transforms (kseq_skew); 0: rotations.
static void check_shape(const char *isa, const struct shape *c, struct kvd_codecs codec,
                        double stretch, uint64_t seed)
{
    if (kvd_test_left_out())
        return;
    struct kvd_backend *b = backend(isa, 2);
    if (!b)
        return;
    struct kseq s;
    char name[KVD_CODECS_TEXT];
    struct kvd_plane g =
        test_plane_of(c->layers, c->kv_heads, c->group, c->dk, c->dv, codec, c->sink, c->recent);
    kseq_init(&s, g, c->length + 64, c->heads_rot, 0.96f, 0.92f, seed);
    kseq_fill(&s);
    bool mixed = stretch <= 100;
    if (stretch > 0)
        kseq_skew(&s, stretch, mixed);
    if (stretch > 0 && kvd_codec_tc(codec.k))
        kseq_code(&s, stretch, mixed);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    while (s.length < c->length) {
        uint32_t n = (uint32_t)(kvd_rand(&s.rng) % 3 ? 1 + kvd_rand(&s.rng) % 200 : 1);
        kseq_append(&s, b, rot, (uint32_t)KVD_MIN((uint64_t)n, c->length - s.length));
    }
    struct attention_errors e = attention_error(&s, b, rot, &c->a);
    // Random values average to outputs that shrink with the root of the length; roundings do not.
    double each = mixed ? 2e-4 : 1e-3, limit = each * sqrt(KVD_MAX(1.0, c->length / 4096.0));
    ck_assert_msg(
        e.worst < limit && e.overall < limit && e.lse < each,
        "%s codec %s kv %u group %u dk %u dv %u length %u q %u window %u: error %.2e, lse %.2e",
        isa, kvd_codecs_name(codec, name), c->kv_heads, c->group, c->dk, c->dv, c->length,
        c->a.q_len, c->a.window, e.worst, e.lse);
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}

// Inverses that are no transposes, and means: of every codec at every kind of shape.
START_TEST(transforms_that_are_not_orthogonal)
{
    uint64_t seed = kvd_test_seed("transforms");
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t j = 0; j < KVD_LEN(attention_shapes); j++) {
            struct shape c = attention_shapes[j];
            struct kvd_codecs codec = {(uint32_t)(seed + i + j) % KVD_CODEC_COUNT,
                                       (uint32_t)(seed + i + 3 * j) % KVD_CODEC_COUNT};
            c.heads_rot = KVD_MAX(c.heads_rot, 1u);
            if (c.length < (i == 0 ? 350 : 1300))
                check_shape(isas[i], &c, codec, 8, seed + j);
        }
}
END_TEST

// The worst condition that a fit was seen to have, and the one that is the last to be taken
// (KVD_TC_MAX_LOSS).
START_TEST(ill_conditioned_transforms)
{
    uint64_t seed = kvd_test_seed("condition");
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (uint32_t j = 0; j < 8; j++) {
            uint32_t dim = j % 2 ? 128 : 64, codec = j % 4 < 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5;
            struct shape c = {1, 2, 3, dim, dim, 64, 64, 2, 320 + j, {.q_len = 1}};
            check_shape(isas[i], &c, (struct kvd_codecs){codec, KVD_CODEC_INT2}, j < 4 ? 412 : 9000,
                        seed + j);
        }
}
END_TEST

START_TEST(attention_matches_float64)
{
    uint64_t seed = kvd_test_seed("attention");
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t j = 0; j < KVD_LEN(attention_shapes); j++) {
            // Plain loops take their time.
            bool all = attention_shapes[j].length < (i == 0 ? 350 : 600);
            uint32_t codecs = all ? KVD_CODEC_COUNT : KVD_CODEC_INT2 + 1;
            for (uint32_t codec = 0; codec < codecs; codec++)
                check_shape(isas[i], &attention_shapes[j], kvd_codecs_both(codec), 0, seed + j);
        }
}
END_TEST

// Every pair of codecs, each at some shape on some instruction set.
START_TEST(attention_with_a_codec_for_each_side)
{
    uint64_t seed = kvd_test_seed("sides");
    for (uint32_t i = 0; i < KVD_CODEC_COUNT * KVD_CODEC_COUNT; i++) {
        struct kvd_codecs codec = {i / KVD_CODEC_COUNT, i % KVD_CODEC_COUNT};
        size_t j = (i + seed) % KVD_LEN(attention_shapes), isa = (i / 2 + seed) % KVD_LEN(isas);
        while (attention_shapes[j].length < 150 || attention_shapes[j].length > 600)
            j = (j + 1) % KVD_LEN(attention_shapes);
        if (codec.k != codec.v)
            check_shape(isas[isa], &attention_shapes[j], codec, 0, seed + i);
    }
}
END_TEST

// What rounding does to a sum must not grow with its tokens.
static void check_long(uint32_t codec, uint32_t group, uint64_t tokens, struct attention a,
                       bool scalar, uint64_t seed)
{
    struct long_seq s;
    long_init(&s, kvd_codecs_both(codec), group, 64, tokens, seed);
    struct long_truth *x = long_truth(&s, a);
    for (size_t i = scalar ? 0 : 1; i < KVD_LEN(isas); i++) {
        struct kvd_backend *b = backend(isas[i], 2);
        if (!b)
            continue;
        struct kvd_rotation_data none = {.n_layers = 1, .heads = 1, .dim_k = 64, .dim_v = 64};
        struct kvd_rotation *rot = b->ops->rotation_new(b, &none, NULL);
        struct attention_errors e = long_error(&s, x, b, rot, 1);
        ck_assert_msg(e.worst <= 1e-5 && e.lse <= 2e-6,
                      "%s codec %u, %llu tokens, q %u window %u softcap %g: error %.2e, lse %.2e",
                      isas[i], codec, (unsigned long long)tokens, a.q_len, a.window,
                      (double)a.softcap, e.worst, e.lse);
        b->ops->rotation_free(b, &rot);
        kvd_backend_free(&b);
    }
    free(x);
    long_deinit(&s);
}

// KVD_LONG_TESTS=1: two million tokens everywhere.
START_TEST(precision_does_not_fall_with_length)
{
    uint64_t seed = kvd_test_seed("length");
    bool all = getenv("KVD_LONG_TESTS") != NULL;
    uint64_t most = all ? 2000000 : 40000;
    check_long(KVD_CODEC_INT2, all ? 6 : 1, 1200000, (struct attention){.q_len = 1}, all, seed);
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        if (!kvd_test_left_out())
            check_long(codec, 2, most, (struct attention){.q_len = 3}, true, seed + codec);
    check_long(KVD_CODEC_INT2, 2, most,
               (struct attention){.q_len = 2, .window = 30001, .softcap = 3}, true, seed);
    check_long(KVD_CODEC_INT2C, 2, most, (struct attention){.q_len = 1, .softcap = 30}, true, seed);
}
END_TEST

START_TEST(every_group_and_dim)
{
    uint64_t seed = kvd_test_seed("groups");
    for (uint32_t group = 1; group <= 16; group++)
        for (size_t i = 0; i < KVD_LEN(head_dims); i++) {
            struct shape c = {1,  2,  group, head_dims[i][0], head_dims[i][1],
                              16, 16, 1,     170 + group,     {.q_len = 1}};
            uint32_t codec = (group + (uint32_t)i) % KVD_CODEC_COUNT;
            bool odd = (group + i) % 2;
            check_shape(odd ? "avx512" : "avx2", &c, kvd_codecs_both(KVD_CODEC_INT2), 0,
                        seed + group * 16 + i);
            check_shape(odd ? "avx2" : "avx512", &c, kvd_codecs_both(codec), 0,
                        seed + group * 16 + i);
            check_shape("vnni", &c, kvd_codecs_both(odd ? KVD_CODEC_INT4 : codec), 0,
                        seed + group * 16 + i);
            check_shape("amx", &c, kvd_codecs_both(odd ? KVD_CODEC_INT2 : codec), 0,
                        seed + group * 16 + i);
        }
}
END_TEST

// DESIGN §5 once more, in double, from the text alone.
static void derive(const double *x, uint32_t dim, double ratio, uint8_t *codes, double *scale,
                   double *min)
{
    double sorted[KVD_MAX_HEAD_DIM], limit = INFINITY;
    for (uint32_t i = 0; i < dim; i++)
        sorted[i] = fabs(x[i]);
    for (uint32_t i = 1; i < dim; i++)
        for (uint32_t j = i; j > 0 && sorted[j - 1] > sorted[j]; j--) {
            double t = sorted[j];
            sorted[j] = sorted[j - 1];
            sorted[j - 1] = t;
        }
    if (ratio < 1)
        limit = sorted[(uint32_t)floor(ratio * dim)];
    double lo = INFINITY, hi = -INFINITY;
    for (uint32_t i = 0; i < dim; i++) {
        double c = fmin(fmax(x[i], -limit), limit);
        lo = fmin(lo, c);
        hi = fmax(hi, c);
    }
    *scale = (hi - lo) / 3;
    *min = lo;
    for (uint32_t i = 0; i < dim; i++)
        codes[i] = (uint8_t)fmin(3, floor((fmin(fmax(x[i], -limit), limit) - lo) / *scale + 0.5));
}

START_TEST(codes_match_a_float64_derivation)
{
    struct kvd_backend *b = backend("scalar", 1);
    struct kseq s;
    kseq_init(&s, test_plane(1, 2, 1, 128, 128, KVD_CODEC_INT2, 0, 0), 512, 1, 0.96f, 0.92f,
              kvd_test_seed("codes"));
    kseq_fill(&s);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    kseq_append(&s, b, rot, 512);
    uint64_t differ = 0, all = 0;
    for (uint32_t t = 0; t < 512; t++)
        for (uint32_t h = 0; h < 2; h++)
            for (int v = 0; v < 2; v++) {
                const uint16_t *row = (v ? s.v : s.k) + (t * 2 + h) * 128;
                const float *m = kseq_matrix(&s, v, 0, h);
                double y[128], scale, min;
                uint8_t codes[128];
                for (uint32_t j = 0; j < 128; j++) {
                    y[j] = 0;
                    for (uint32_t i = 0; i < 128; i++)
                        y[j] += (double)kvd_bf16_to_f32(row[i]) * m[i * 128 + j];
                }
                derive(y, 128, v ? 0.92 : 0.96, codes, &scale, &min);
                const uint8_t *tile = (const uint8_t *)(uintptr_t)s.codec[t / 64] +
                                      kvd_tile_offset(&s.g, s.g.codec, 0, h);
                struct kvd_affine p[64];
                kvd_params_read(1, tile + kvd_params_offset(s.g.codec, 128, 128, v), 64, p);
                ck_assert_double_eq_tol(p[t % 64].scale, scale, scale * 1e-3);
                ck_assert_double_eq_tol(p[t % 64].min, min, fabs(min) * 1e-3);
                for (uint32_t c = 0; c < 128; c++, all++) {
                    struct kvd_code_place at = kvd_place_of(v, 128, 2, t % 64, c);
                    uint8_t got = tile[(v ? 2048 : 0) + at.byte] >> at.bit & 3;
                    differ += got != codes[c];
                }
            }
    printf("%llu of %llu codes differ from float64\n", (unsigned long long)differ,
           (unsigned long long)all);
    ck_assert_uint_lt(differ, all / 10000); // only values within fp32 rounding of a code boundary
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}
END_TEST

// K's and V's scales are what the set says of each, and nothing else of a page's rows depends on
// it.
START_TEST(scales_are_chosen_by_side)
{
    uint64_t seed = kvd_test_seed("scales");
    for (uint32_t codec = KVD_CODEC_INT2; codec < KVD_CODEC_COUNT; codec++)
        for (uint32_t kinds = 0; kinds < 9; kinds++) {
            struct kvd_backend *b = backend(NULL, 1);
            struct kseq s;
            float gain = 0.9f;
            enum kvd_scale kind[2] = {(enum kvd_scale)(kinds / 3), (enum kvd_scale)(kinds % 3)};
            kseq_init(&s, test_plane(1, 1, 1, 64, 64, codec, 0, 0), 64, 0, 0.96f, 0.92f, seed);
            s.rot.scale_k = kind[0];
            s.rot.scale_v = kind[1];
            s.rot.gain_k = s.rot.gain_v = &gain;
            kseq_fill(&s);
            struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
            kseq_append(&s, b, rot, 64);
            for (int v = 0; v < 2; v++)
                for (uint32_t t = 0; t < 64; t++) {
                    struct kvd_tc_coder tc = kseq_coder(&s, v, 0, 0);
                    struct kvd_quantizer q = {codec, v ? 0.92f : 0.96f, gain, kind[v], &tc};
                    static uint8_t tile[64 * 512];
                    struct kvd_row row;
                    float x[64], want[64], got[64];
                    for (uint32_t c = 0; c < 64; c++)
                        x[c] = kvd_bf16_to_f32((v ? s.v : s.k)[t * 64 + c]);
                    kvd_row_quantize(&q, x, 64, &row);
                    kvd_row_pack(s.g.codec, tile, 64, 64, v, &tc, t, &row);
                    kvd_row_unpack(s.g.codec, tile, 64, 64, v, &tc, t, want);
                    kvd_row_unpack(s.g.codec, (const uint8_t *)(uintptr_t)s.codec[0], 64, 64, v,
                                   &tc, t, got);
                    ck_assert_mem_eq(got, want, sizeof(got));
                }
            b->ops->rotation_free(b, &rot);
            kseq_deinit(&s);
            kvd_backend_free(&b);
        }
}
END_TEST

START_TEST(instruction_sets_write_the_same_pages)
{
    uint64_t seed = kvd_test_seed("pages"), differ = 0, all = 0;
    struct kseq s[2];
    for (int i = 0; i < 2; i++) {
        struct kvd_backend *b = backend(i ? NULL : "scalar", 1); // NULL: the best there is
        kseq_init(&s[i], test_plane(2, 2, 1, 128, 128, KVD_CODEC_INT2, 64, 64), 1000, 1, 0.96f,
                  0.92f, seed);
        kseq_fill(&s[i]);
        struct kvd_rotation *rot = b->ops->rotation_new(b, &s[i].rot, NULL);
        for (int j = 0; j < 10; j++)
            kseq_append(&s[i], b, rot, 100);
        b->ops->rotation_free(b, &rot);
        kvd_backend_free(&b);
    }
    for (uint64_t t = 64; t < s[0].hist_end; t++)
        for (uint32_t h = 0; h < 2; h++) {
            double x[128], y[128];
            kseq_truth(&s[0], t, 1, h, false, x);
            kseq_truth(&s[1], t, 1, h, false, y);
            for (int c = 0; c < 128; c++, all++)
                differ += fabs(x[c] - y[c]) > 0.05;
        }
    ck_assert_uint_lt(differ, all / 500 + 1);
    for (int i = 0; i < 2; i++)
        kseq_deinit(&s[i]);
}
END_TEST

static void check_read(const char *isa, uint32_t dk, uint32_t dv, struct kvd_codecs codec)
{
    if (kvd_test_left_out())
        return;
    enum { TOKENS = 300 };
    struct kvd_backend *b = backend(isa, 2);
    if (!b)
        return;
    struct kseq s;
    struct kvd_plane g = test_plane(2, 2, 2, dk, dv, codec.k, 64, 64);
    g.codec = codec;
    kseq_init(&s, g, TOKENS, 2, 0.96f, 0.92f, 77);
    kseq_fill(&s);
    if (dk != dv)
        kseq_skew(&s, 8, true);
    if (dk != dv && kvd_codec_tc(codec.k))
        kseq_code(&s, 8, true);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    kseq_append(&s, b, rot, TOKENS);
    float *k = malloc(4 * 2 * TOKENS * 2 * dk), *v = malloc(4 * 2 * TOKENS * 2 * dv);
    struct kvd_read_params p = {.plane = &s.g,
                                .rotation = rot,
                                .layer_count = 2,
                                .pages = {s.at_bf16, s.at_codec},
                                .length = s.length,
                                .hist_end = s.hist_end,
                                .tokens = TOKENS,
                                .k = kseq_tensor(k, KVD_DTYPE_F32, TOKENS, 2, dk, 0),
                                .v = kseq_tensor(v, KVD_DTYPE_F32, TOKENS, 2, dv, 0)};
    ck_assert_int_eq(b->ops->read(b, &p, NULL), 0);
    for (uint32_t l = 0; l < 2; l++)
        for (uint64_t t = 0; t < TOKENS; t++)
            for (uint32_t h = 0; h < 2; h++)
                for (int side = 0; side < 2; side++) {
                    double want[KVD_MAX_HEAD_DIM];
                    uint32_t dim = side ? dv : dk;
                    const float *got = (side ? v : k) + ((l * TOKENS + t) * 2 + h) * dim;
                    kseq_truth(&s, t, l, h, side, want);
                    ck_assert_double_lt(kseq_rel(want, got, dim), 1e-5);
                }
    free(k);
    free(v);
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}

START_TEST(read_returns_what_pages_hold)
{
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t d = 0; d < KVD_LEN(head_dims); d++)
            if (i > 0 || d % 3 == 0) // plain loops take their time
                check_read(isas[i], head_dims[d][0], head_dims[d][1],
                           (struct kvd_codecs){(uint32_t)(i + d) % KVD_CODEC_COUNT,
                                               (uint32_t)(i + 2 * d) % KVD_CODEC_COUNT});
}
END_TEST

// What rotate is to give, in double: x A^-T of queries; of others (x - mean) A.
static void turned(const struct kseq *s, enum kvd_rotate which, uint32_t layer, uint32_t head,
                   const float *x, double *out)
{
    bool v = which == KVD_ROTATE_VALUES;
    uint32_t dim = v ? s->g.head_dim_v : s->g.head_dim_k;
    uint64_t at = (uint64_t)layer * s->rot.heads + head;
    const float *m = kseq_matrix(s, v, layer, head), *mean = v ? s->mean_v : s->mean_k;
    for (uint32_t j = 0; j < dim; j++) {
        out[j] = 0;
        for (uint32_t i = 0; i < dim; i++)
            if (which == KVD_ROTATE_QUERIES)
                out[j] += (double)x[i] * s->back_k[at * dim * dim + (uint64_t)j * dim + i];
            else
                out[j] += ((double)x[i] - mean[at * dim + i]) * m[(uint64_t)i * dim + j];
    }
}

START_TEST(rows_are_turned_as_what_they_are_and_back)
{
    enum { ROWS = 5, HEADS = 6, DK = 64, DV = 128, N = 2 * ROWS * HEADS * DV };
    uint64_t seed = kvd_test_seed("rows");
    struct kvd_backend *b = backend(NULL, 2);
    struct kseq s;
    kseq_init(&s, test_plane(2, 2, 3, DK, DV, KVD_CODEC_INT2, 64, 64), 64, 2, 1, 1, seed);
    kseq_skew(&s, 20, true);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    static float x[N], y[N], z[N];
    for (int which = 0; which < KVD_ROTATE_COUNT; which++) {
        uint32_t dim = which == KVD_ROTATE_VALUES ? DV : DK;
        for (size_t i = 0; i < N; i++)
            x[i] = (float)kseq_normal(&s.rng);
        struct kvd_rotate_params p = {.rotation = rot,
                                      .which = (enum kvd_rotate)which,
                                      .layer_count = 2,
                                      .rows = ROWS,
                                      .heads = HEADS,
                                      .kv_heads = 2,
                                      .x = kseq_tensor(x, KVD_DTYPE_F32, ROWS, HEADS, dim, 0),
                                      .y = kseq_tensor(y, KVD_DTYPE_F32, ROWS, HEADS, dim, 0)};
        b->ops->rotate(b, &p, NULL);
        for (uint32_t i = 0; i < 2 * ROWS * HEADS; i++) {
            double want[DV];
            turned(&s, p.which, i / HEADS / ROWS, i % HEADS / 3, x + i * dim, want);
            ck_assert_double_lt(kseq_rel(want, y + i * dim, dim), 1e-5);
        }
        p.x = p.y;
        p.y = kseq_tensor(z, KVD_DTYPE_F32, ROWS, HEADS, dim, 0);
        p.inverse = true;
        b->ops->rotate(b, &p, NULL);
        for (size_t i = 0; i < 2 * ROWS * HEADS * dim; i++)
            ck_assert_double_eq_tol(x[i], z[i], 1e-4);
    }
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}
END_TEST

START_TEST(rotation_is_undone_by_its_inverse)
{
    struct kvd_backend *b = backend("scalar", 2);
    struct kseq s;
    kseq_init(&s, test_plane(2, 2, 3, 64, 64, KVD_CODEC_INT2, 64, 64), 64, 2, 1, 1, 5);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    float x[2 * 5 * 6 * 64], y[2 * 5 * 6 * 64], z[2 * 5 * 6 * 64];
    for (size_t i = 0; i < KVD_LEN(x); i++)
        x[i] = (float)kseq_normal(&s.rng);
    struct kvd_rotate_params p = {.rotation = rot,
                                  .layer_count = 2,
                                  .rows = 5,
                                  .heads = 6,
                                  .kv_heads = 2,
                                  .x = kseq_tensor(x, KVD_DTYPE_F32, 5, 6, 64, 0),
                                  .y = kseq_tensor(y, KVD_DTYPE_F32, 5, 6, 64, 0)};
    b->ops->rotate(b, &p, NULL);
    // Layer 1, row 2, q head 4 belongs to kv head 1.
    const float *m = kseq_matrix(&s, false, 1, 1), *row = x + ((5 + 2) * 6 + 4) * 64;
    double sum = 0;
    for (int i = 0; i < 64; i++)
        sum += (double)row[i] * m[i * 64 + 7];
    ck_assert_double_eq_tol(sum, y[((5 + 2) * 6 + 4) * 64 + 7], 1e-5);
    p.x = p.y;
    p.y = kseq_tensor(z, KVD_DTYPE_F32, 5, 6, 64, 0);
    p.inverse = true;
    b->ops->rotate(b, &p, NULL);
    for (size_t i = 0; i < KVD_LEN(x); i++)
        ck_assert_double_eq_tol(x[i], z[i], 1e-5);
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}
END_TEST

START_TEST(nonfinite_values_are_found)
{
    struct kvd_backend *b = backend("scalar", 1);
    struct kseq s;
    kseq_init(&s, test_plane(2, 2, 1, 64, 64, KVD_CODEC_INT2, 64, 64), 10, 1, 1, 1, 5);
    kseq_fill(&s);
    struct kvd_append_item item = {.new_length = 10,
                                   .k = kseq_tensor(s.k, KVD_DTYPE_BF16, 10, 2, 64, 0),
                                   .v = kseq_tensor(s.v, KVD_DTYPE_BF16, 10, 2, 64, 0)};
    struct kvd_append_params p = {.plane = &s.g, .layer_count = 2, .items = &item, .n_items = 1};
    struct kvd_nonfinite at;
    ck_assert_int_eq(b->ops->check(b, &p, &at), 0);
    s.v[((1 * 10 + 4) * 2 + 1) * 64 + 33] = 0xff80; // -inf
    ck_assert_int_eq(b->ops->check(b, &p, &at), KVD_E_INVALID);
    ck_assert(at.in_v && at.layer == 1 && at.token == 4 && at.head == 1 && at.channel == 33);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}
END_TEST

START_TEST(queries_that_are_not_finite_give_nan_alone)
{
    uint64_t seed = kvd_test_seed("nonfinite");
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t j = 0; j < KVD_LEN(nonfinite_cases); j++) {
            const struct nonfinite_case *c = &nonfinite_cases[j];
            struct kvd_backend *b = backend(isas[i], 1 + j % 2);
            if (!b)
                continue;
            struct kseq s;
            kseq_init(&s, nonfinite_plane(c), c->length, 1, 0.96f, 0.92f, seed + j);
            kseq_fill(&s);
            struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
            kseq_append(&s, b, rot, c->length);
            int row = nonfinite_check(&s, c, b, rot);
            ck_assert_msg(row < 0, "%s case %zu: row %d", isas[i], j, row);
            b->ops->rotation_free(b, &rot);
            kseq_deinit(&s);
            kvd_backend_free(&b);
        }
}
END_TEST

// Logits beyond fp32, of finite queries and keys: NaN too, never a result that looks like one.
START_TEST(logits_that_overflow_give_nan)
{
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (int negative = 0; negative < 2; negative++) {
            struct nonfinite_case c = {
                {KVD_CODEC_BF16, KVD_CODEC_BF16}, 3, 1, KVD_DTYPE_F32, negative ? 0 : 5};
            struct kvd_backend *b = backend(isas[i], 1);
            if (!b)
                continue;
            struct kseq s;
            kseq_init(&s, nonfinite_plane(&c), c.length, 0, 1, 1, 3);
            kseq_fill(&s);
            for (uint32_t t = 0; t < c.length; t++) // of kv head 0, channel 0
                s.k[(uint64_t)t * NONFINITE_KV * NONFINITE_DIM] = negative ? 0xff00 : 0x7f00;
            struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
            kseq_append(&s, b, rot, c.length);
            float q[8 * NONFINITE_DIM] = {0}, o[8 * NONFINITE_DIM], lse[8];
            q[NONFINITE_DIM] = 1e10f; // of q head 1
            nonfinite_attend(&s, &c, b, rot, q, o, lse);
            for (uint32_t h = 0; h < 8; h++)
                ck_assert_msg((isnan(lse[h]) != 0) == (h == 1) &&
                                  (isnan(o[h * NONFINITE_DIM + 7]) != 0) == (h == 1),
                              "%s head %u: lse %g", isas[i], h, (double)lse[h]);
            b->ops->rotation_free(b, &rot);
            kseq_deinit(&s);
            kvd_backend_free(&b);
        }
}
END_TEST

START_TEST(half_precision)
{
    for (uint32_t h = 0; h < 65536; h++) {
        if ((h & 0x7c00) == 0x7c00)
            continue; // Inf and NaN are never stored
        float f = kvd_fp16_to_f32((uint16_t)h);
        int e = (int)(h >> 10 & 31);
        double want = ldexp((h & 1023) + (e ? 1024 : 0), (e ? e : 1) - 25) * (h & 0x8000 ? -1 : 1);
        ck_assert_double_eq(f, want);
        ck_assert_uint_eq(kvd_f32_to_fp16(f), h);
        // Half way to the next: to even.
        if ((h & 0x7fff) < 0x7bff) {
            float next = kvd_fp16_to_f32((uint16_t)(h + 1));
            ck_assert_uint_eq(kvd_f32_to_fp16((f + next) / 2), h % 2 ? h + 1 : h);
        }
    }
    ck_assert_uint_eq(kvd_f32_to_fp16(1e9f), 0x7bff);
    ck_assert_uint_eq(kvd_f32_to_fp16(-INFINITY), 0xfbff);
    ck_assert(isnan(kvd_fp16_to_f32(0x7e01)) && isinf(kvd_fp16_to_f32(0x7c00)));
}
END_TEST

// What was lent is sealed, so who takes it over gets a copy; else the memory itself.
START_TEST(extents_are_taken_over)
{
    enum { BYTES = 2 << 20, AT = 1234567 };
    struct kvd_error err = {0};
    struct kvd_backend *b = kvd_cpu_backend_new(1, NULL, &err);
    bool shared = true;
    struct kvd_arena *old = b->ops->arena_new(b, 2, BYTES, &err);
    struct kvd_arena *new = b->ops->arena_new(b, 2, BYTES, &err);
    uint8_t *from = (uint8_t *)(uintptr_t)old->base, *to = (uint8_t *)(uintptr_t) new->base;
    for (uint32_t i = 0, lent; i < 2; i++) {
        ck_assert_int_eq(b->ops->extent_make(b, old, i, &err), 0);
        memset(from + i * BYTES + AT, 7, 5000);
        if (i == 1) {
            int fd = -1;
            ck_assert_int_eq(b->ops->extent_export(b, old, i, &fd, &err), 0);
            close(fd);
        }
        int held = b->ops->extent_descriptor(b, old, i);
        ck_assert_int_eq(b->ops->extent_adopt(b, new, i, held, &shared, &err), 0);
        ck_assert(!shared);
        ck_assert_mem_eq(to + i * BYTES, from + i * BYTES, BYTES);
        to[i * BYTES] = 9;
        lent = from[i * BYTES] != 9;
        ck_assert_uint_eq(lent, i);
    }
    int small = memfd_create("small", MFD_CLOEXEC);
    ck_assert_int_eq(b->ops->extent_adopt(b, new, 0, small, &shared, &err), KVD_E_INVALID);
    ck_assert_int_eq(to[0], 9);
    close(small);
    b->ops->arena_free(b, &old);
    b->ops->arena_free(b, &new);
    kvd_backend_free(&b);
}
END_TEST

KVD_MAIN("kernels", 900, avx2_is_among_those_tested, avx512_is_among_those_tested,
         vnni_is_among_those_tested, amx_is_among_those_tested, codes_match_a_float64_derivation,
         scales_are_chosen_by_side, attention_matches_float64, attention_with_a_codec_for_each_side,
         precision_does_not_fall_with_length, every_group_and_dim,
         instruction_sets_write_the_same_pages, read_returns_what_pages_hold,
         rotation_is_undone_by_its_inverse, rows_are_turned_as_what_they_are_and_back,
         transforms_that_are_not_orthogonal, ill_conditioned_transforms, nonfinite_values_are_found,
         queries_that_are_not_finite_give_nan_alone, logits_that_overflow_give_nan, half_precision,
         extents_are_taken_over)
