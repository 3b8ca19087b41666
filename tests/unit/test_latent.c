// Latent planes (MLA) on the CPU: what is refused, and attention, reading and turning against
// float64, on every instruction set that this CPU has.
#include "tests/unit/suite.h"

#include "tests/unit/kernel_latent.h"

static const char *const isas[] = {"scalar", "avx2", "avx512", "vnni", "amx"};

START_TEST(what_is_no_latent_plane_is_refused_by_name)
{
    struct kvd_plane good = latent_plane(2, 128, KVD_CODEC_INT2, 64, 64);
    struct {
        const char *says;
        struct kvd_plane g;
    } bad[12];
    for (size_t i = 0; i < KVD_LEN(bad); i++)
        bad[i].g = good;
    bad[0].g.kv_heads = 2, bad[0].says = "kv_heads is 2; a latent is shared by all heads";
    bad[1].g.q_heads = 129, bad[1].says = "q_heads is 129; over a latent 1 to 128";
    bad[2].g.q_heads = 0, bad[2].says = "q_heads is 0";
    bad[3].g.head_dim_v = 256, bad[3].says = "head_dim is 64 for K and 256 for V; of a latent";
    bad[4].g.head_dim_k = 512, bad[4].says = "head_dim is 512 for K";
    bad[5].g.codec.k = KVD_CODEC_INT2, bad[5].says = "the rope part of a latent plane is in bf16";
    bad[6].g.codec.v = KVD_CODEC_TC2, bad[6].says = "the codec of V is tc2";
    bad[7].g.codec.v = KVD_CODEC_TC2_5, bad[7].says = "the codec of V is tc2.5";
    bad[8].g.latent = 2, bad[8].says = "latent is 2";
    bad[9].g.latent = 0, bad[9].says = "q_heads is 128";
    bad[10].g.latent = 0, bad[10].g.q_heads = 64,
    bad[10].says = "head_dim is 64 for K and 512 for V; 64, 80";
    bad[11].g.sink = 63, bad[11].says = "sink is 63";
    for (size_t i = 0; i < KVD_LEN(bad); i++) {
        struct kvd_error err = {0};
        ck_assert_int_eq(kvd_plane_check(&bad[i].g, &err), KVD_E_INVALID);
        ck_assert_msg(strstr(err.text, bad[i].says) != NULL, "%zu: %s", i, err.text);
    }
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
        good.codec.v = codec;
        ck_assert_int_eq(kvd_plane_check(&good, NULL) == KVD_OK, latent_codec(codec));
    }
}
END_TEST

// Roundings of logits, which are sums of 576 products, are what there is of error.
static void check_shape(const char *isa, const struct latent_shape *c, uint32_t codec, bool skewed,
                        uint64_t seed)
{
    struct kvd_backend *b = kvd_test_left_out() ? NULL : kvd_cpu_backend_new(2, isa, NULL);
    if (!b)
        return;
    struct kseq s;
    struct kvd_plane g = latent_plane(c->layers, c->heads, codec, c->sink, c->recent);
    latent_init(&s, g, c->length + 64, skewed, seed);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    while (s.length < c->length) {
        uint32_t n = (uint32_t)(kvd_rand(&s.rng) % 3 ? 1 + kvd_rand(&s.rng) % 200 : 1);
        kseq_append(&s, b, rot, (uint32_t)KVD_MIN((uint64_t)n, c->length - s.length));
    }
    struct attention_errors e = attention_error(&s, b, rot, &c->a);
    if (getenv("KVD_TEST_PRINT"))
        printf("%s %s heads %u length %u: worst %.2e overall %.2e lse %.2e\n", isa,
               kvd_codec_name(codec), c->heads, c->length, e.worst, e.overall, e.lse);
    ck_assert_msg(e.worst < 5e-6 && e.overall < 2e-6 && e.lse < 5e-6,
                  "%s codec %s heads %u length %u q %u window %u: error %.2e, lse %.2e", isa,
                  kvd_codec_name(codec), c->heads, c->length, c->a.q_len, c->a.window, e.worst,
                  e.lse);
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}

START_TEST(attention_matches_float64)
{
    uint64_t seed = kvd_test_seed("latent");
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t j = 0; j < KVD_LEN(latent_shapes); j++)
            for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
                if (latent_codec(codec) && (j == 1 || (codec + j + i) % (i ? 4 : 8) == 0))
                    check_shape(isas[i], &latent_shapes[j], codec, false, seed + j);
}
END_TEST

START_TEST(transforms_that_are_not_orthogonal)
{
    uint64_t seed = kvd_test_seed("transforms");
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t j = 0; j < 5; j++)
            check_shape(isas[i], &latent_shapes[j], j % 2 ? KVD_CODEC_INT4 : KVD_CODEC_TURBOQUANT_3,
                        true, seed + j);
}
END_TEST

// -- long sequences ------------------------------------------------------------------------------

static void check_longer(const struct longer *x, const char *isa)
{
    struct kvd_backend *b = kvd_cpu_backend_new(2, isa, NULL);
    if (!b)
        return;
    struct attention_errors e = longer_error(x, b, x->table);
    if (getenv("KVD_TEST_PRINT"))
        printf("%s %s heads %u, %llu tokens: %.2e lse %.2e\n", isa, kvd_codec_name(x->g.codec.v),
               x->g.q_heads, (unsigned long long)x->tokens, e.worst, e.lse);
    ck_assert_msg(e.worst <= 1e-5 && e.lse <= 4e-6, "%s %s, %llu tokens: error %.2e, lse %.2e", isa,
                  kvd_codec_name(x->g.codec.v), (unsigned long long)x->tokens, e.worst, e.lse);
    kvd_backend_free(&b);
}

// A million tokens. KVD_LONG_TESTS=1: all of them different.
START_TEST(precision_does_not_fall_with_length)
{
    bool all = getenv("KVD_LONG_TESTS") != NULL;
    static const uint32_t codecs[] = {KVD_CODEC_BF16, KVD_CODEC_INT2, KVD_CODEC_INT4,
                                      KVD_CODEC_TURBOQUANT_3};
    uint64_t seed = kvd_test_seed("length");
    for (size_t i = 0; i < KVD_LEN(codecs); i++) {
        struct longer x;
        if (kvd_test_left_out())
            continue;
        longer_init(&x, codecs[i], 2, all ? 16384 : 160, all ? 1 : i == 1 ? 100 : 4, seed + i);
        for (size_t j = all || i == 3 ? 0 : 1; j < KVD_LEN(isas); j++)
            check_longer(&x, isas[j]);
        longer_deinit(&x);
    }
}
END_TEST

// -- the rest ------------------------------------------------------------------------------------

START_TEST(rows_are_read_and_turned_back)
{
    uint64_t seed = kvd_test_seed("read");
    for (size_t i = 0; i < KVD_LEN(isas); i++) {
        struct kvd_backend *b = kvd_cpu_backend_new(2, isas[i], NULL);
        struct kseq s;
        enum { N = 230 };
        if (!b)
            continue;
        latent_init(&s, latent_plane(1, 16, i ? KVD_CODEC_INT2 : KVD_CODEC_TURBOQUANT_4, 16, 32), N,
                    i == 1, seed);
        struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
        kseq_append(&s, b, rot, N);
        float *k = malloc(sizeof(float) * N * ROPE), *v = malloc(sizeof(float) * N * LATENT),
              *y = malloc(sizeof(float) * N * LATENT), *back = malloc(sizeof(float) * N * LATENT);
        struct kvd_read_params p = {.plane = &s.g,
                                    .rotation = rot,
                                    .layer_count = 1,
                                    .pages = {s.at_bf16, s.at_codec},
                                    .length = N,
                                    .hist_end = s.hist_end,
                                    .tokens = N,
                                    .k = kseq_tensor(k, KVD_DTYPE_F32, N, 1, ROPE, 0),
                                    .v = kseq_tensor(v, KVD_DTYPE_F32, N, 1, LATENT, 0)};
        ck_assert_int_eq(b->ops->read(b, &p, NULL), 0);
        struct kvd_rotate_params r = {.rotation = rot,
                                      .which = KVD_ROTATE_VALUES,
                                      .layer_count = 1,
                                      .rows = N,
                                      .heads = 1,
                                      .kv_heads = 1,
                                      .x = p.v,
                                      .y = kseq_tensor(y, KVD_DTYPE_F32, N, 1, LATENT, 0)};
        ck_assert_int_eq(b->ops->rotate(b, &r, NULL), 0);
        r.x = r.y;
        r.y = kseq_tensor(back, KVD_DTYPE_F32, N, 1, LATENT, 0);
        r.inverse = true;
        ck_assert_int_eq(b->ops->rotate(b, &r, NULL), 0);
        for (uint32_t t = 0; t < N; t++) {
            double want[LATENT];
            kseq_truth(&s, t, 0, 0, false, want);
            for (uint32_t c = 0; c < ROPE; c++)
                ck_assert(want[c] == k[t * ROPE + c]); // bf16, wherever it is
            kseq_truth(&s, t, 0, 0, true, want);
            double e = kseq_rel(want, v + t * LATENT, LATENT);
            ck_assert_msg(e < 3e-6, "%s token %u: %.2e", isas[i], t, e);
            for (uint32_t c = 0; c < LATENT; c++)
                want[c] = v[t * LATENT + c];
            e = kseq_rel(want, back + t * LATENT, LATENT);
            ck_assert_msg(e < 1e-5, "%s token %u turned and back: %.2e", isas[i], t, e);
        }
        free(k);
        free(v);
        free(y);
        free(back);
        b->ops->rotation_free(b, &rot);
        kseq_deinit(&s);
        kvd_backend_free(&b);
    }
}
END_TEST

// NaN or Inf in a query, or logits beyond fp32, of one row: its own results are NaN, and nobody
// else's change.
START_TEST(queries_that_are_not_finite_give_nan_alone)
{
    enum { HEADS = 40, DIM = ROPE + LATENT };
    const float poison[] = {NAN, INFINITY, -INFINITY, 3e38f};
    uint64_t seed = kvd_test_seed("nonfinite");
    for (size_t i = 0; i < KVD_LEN(isas) * KVD_LEN(poison); i++) {
        const char *isa = isas[i / KVD_LEN(poison)];
        struct kvd_backend *b = kvd_cpu_backend_new(1, isa, NULL);
        struct kseq s;
        float q[HEADS * DIM], o[2][HEADS * LATENT], lse[2][HEADS];
        if (!b)
            continue;
        uint32_t bad = (uint32_t)(seed % HEADS), length = i % 2 ? 300 : 30;
        latent_init(&s, latent_plane(1, HEADS, i % 3 ? KVD_CODEC_INT2 : KVD_CODEC_BF16, 0, 16),
                    length, false, seed);
        struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
        kseq_append(&s, b, rot, length);
        for (uint32_t k = 0; k < HEADS * DIM; k++)
            q[k] = (float)kseq_normal(&s.rng);
        for (int k = 0; k < 2; k++) {
            if (k == 1) // in the latent's part, or in rope's
                q[bad * DIM + (i % 2 ? 77 : LATENT + 3)] = poison[i % KVD_LEN(poison)];
            struct kvd_attend_item item = {
                .pages = {s.at_bf16, s.at_codec},
                .length = length,
                .hist_end = s.hist_end,
                .q_len = 1,
                .q = kseq_tensor(q, KVD_DTYPE_F32, 1, HEADS, DIM, 0),
                .o = kseq_tensor(o[k], KVD_DTYPE_F32, 1, HEADS, LATENT, 0),
                .lse = kseq_tensor(lse[k], KVD_DTYPE_F32, 1, HEADS, 1, 0)};
            struct kvd_attend_params p = {.plane = &s.g,
                                          .rotation = rot,
                                          .layer_count = 1,
                                          .scale = 10,
                                          .items = &item,
                                          .n_items = 1};
            ck_assert_int_eq(b->ops->attend(b, &p, NULL), 0);
        }
        for (uint32_t h = 0; h < HEADS; h++)
            for (uint32_t c = 0; c < LATENT; c++)
                ck_assert_msg(h == bad ? isnan(o[1][h * LATENT + c]) && isnan(lse[1][h])
                                       : o[0][h * LATENT + c] == o[1][h * LATENT + c] &&
                                             lse[0][h] == lse[1][h],
                              "%s, %g in head %u: head %u channel %u: %g", isa,
                              (double)poison[i % KVD_LEN(poison)], bad, h, c,
                              (double)o[1][h * LATENT + c]);
        b->ops->rotation_free(b, &rot);
        kseq_deinit(&s);
        kvd_backend_free(&b);
    }
}
END_TEST

// Tiles that tests/data/make_golden.py wrote from the specification, in another language: rope rows
// as bf16, latents as fp16, then a tile of each codec, with one kind of scales.
START_TEST(golden_tiles)
{
    static uint16_t rope[KVD_PAGE_TOKENS][ROPE], half[KVD_PAGE_TOKENS][LATENT];
    const char *data = getenv("KVD_TEST_DATA");
    char path[512];
    snprintf(path, sizeof(path), "%s/golden_latent.bin", data ? data : "tests/data");
    FILE *f = fopen(path, "rb");
    ck_assert_msg(f != NULL, "%s is missing", path);
    ck_assert_uint_eq(fread(rope, sizeof(rope), 1, f), 1);
    ck_assert_uint_eq(fread(half, sizeof(half), 1, f), 1);
    for (uint32_t codec = 1; codec < KVD_CODEC_COUNT; codec++) {
        struct kvd_codecs codecs = {KVD_CODEC_BF16, codec};
        if (!latent_codec(codec))
            continue;
        uint64_t bytes = kvd_tile_bytes(codecs, ROPE, LATENT), differ = 0;
        uint8_t *want = malloc(bytes), *got = malloc(bytes);
        ck_assert_uint_eq(fread(want, 1, bytes, f), bytes);
        memset(got, 0xff, bytes);
        memcpy(got, rope, sizeof(rope));
        for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
            struct kvd_row row;
            float x[LATENT];
            struct kvd_quantizer q = {codec, 0.92f, 0.95f, (enum kvd_scale)(codec % 3), NULL};
            for (uint32_t c = 0; c < LATENT; c++)
                x[c] = kvd_fp16_to_f32(half[t][c]);
            kvd_row_quantize(&q, x, LATENT, &row);
            kvd_row_pack(codecs, got, ROPE, LATENT, true, NULL, t, &row);
        }
        for (uint64_t i = 0; i < bytes; i++)
            differ += got[i] != want[i];
        // fp32 and fp64 may round a parameter, or a value at a boundary, apart once in a while.
        ck_assert_msg(differ <= 2, "%s: %llu of %llu bytes differ", kvd_codec_name(codec),
                      (unsigned long long)differ, (unsigned long long)bytes);
        free(want);
        free(got);
    }
    ck_assert_int_eq(fgetc(f), EOF);
    fclose(f);
}
END_TEST

KVD_MAIN("latent", 600, what_is_no_latent_plane_is_refused_by_name, attention_matches_float64,
         transforms_that_are_not_orthogonal, precision_does_not_fall_with_length,
         rows_are_read_and_turned_back, queries_that_are_not_finite_give_nan_alone, golden_tiles)
