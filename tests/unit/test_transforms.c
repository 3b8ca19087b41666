// Sets of transforms: their files and checks, where they are refused, and what they do to rows.
#include "tests/unit/scratch.h"
#include "tests/unit/suite.h"

#include <math.h>
#include <sys/stat.h>

#include "calib/store.h"
#include "calib/transforms.h"
#include "kernels/format.h"

// Near normal: twelve uniform values.
static double normal(uint64_t *rng)
{
    double x = -6;
    for (int i = 0; i < 12; i++)
        x += (double)(kvd_rand(rng) >> 11) * 0x1p-53;
    return x;
}

// A matrix and its inverse: a product of shears, each of which is undone by its negative. Its axes
// are scaled from 1 to 1 / `stretch`.
static void random_transform(uint64_t *rng, uint32_t dim, double stretch, float *a, float *inverse)
{
    double *m = calloc(2ull * dim * dim, sizeof(*m)), *back = m + (uint64_t)dim * dim;
    for (uint32_t i = 0; i < dim; i++) {
        double s = pow(stretch, -(double)i / (dim - 1));
        m[i * dim + i] = s;
        back[i * dim + i] = 1 / s;
    }
    for (uint32_t n = 0; n < 2 * dim; n++) {
        uint32_t from = (uint32_t)(kvd_rand(rng) % dim), to = (uint32_t)(kvd_rand(rng) % dim);
        double x = 0.3 * normal(rng);
        for (uint32_t i = 0; i < dim && from != to; i++) { // a's columns, the inverse's rows
            m[i * dim + to] += x * m[i * dim + from];
            back[from * dim + i] -= x * back[to * dim + i];
        }
    }
    for (uint32_t i = 0; i < dim * dim; i++) {
        a[i] = (float)m[i];
        inverse[i] = (float)back[i];
    }
    free(m);
}

static struct kvd_rotset *new_set(uint32_t codec, uint32_t dim_k, uint32_t dim_v, uint64_t *rng)
{
    struct kvd_error err = {0};
    struct kvd_rotset *s = calloc(1, sizeof(*s));
    *s = (struct kvd_rotset){.model = "m",
                             .objective = "o",
                             .layers = {3, 7},
                             .n_layers = 2,
                             .heads = 2,
                             .dim_k = dim_k,
                             .dim_v = dim_v};
    ck_assert_msg(kvd_transforms_alloc(s, codec, &err) == 0, "%s", err.text);
    struct kvd_transforms *t = s->transforms;
    uint32_t tiles = dim_k / KVD_TC_TILE;
    for (uint32_t at = 0; at < 4; at++) {
        random_transform(rng, dim_k, 30, t->k + (uint64_t)at * dim_k * dim_k,
                         t->k_inverse + (uint64_t)at * dim_k * dim_k);
        random_transform(rng, dim_v, 1, t->v + (uint64_t)at * dim_v * dim_v,
                         t->v_inverse + (uint64_t)at * dim_v * dim_v);
        for (uint32_t i = 0; i < dim_k; i++) {
            t->k_mean[at * dim_k + i] = (float)normal(rng);
            t->k_sigma[at * dim_k + i] = (float)exp(-3.0 * i / dim_k);
        }
        for (uint32_t i = 0; i < dim_v; i++)
            t->v_mean[at * dim_v + i] = (float)normal(rng);
        for (uint32_t n = kvd_tc_stream_bits(codec, dim_k), i = 0; n; i = (i + 1) % tiles)
            if (t->k_bits[at * tiles + i] < KVD_TC_MAX_BITS && kvd_rand(rng) % 2) {
                t->k_bits[at * tiles + i]++;
                n--;
            }
    }
    return s;
}

START_TEST(bits_of_codecs)
{
    static const struct {
        uint32_t dim, tc2, tc2_5;
    } sums[] = {{64, 8, 10},   {80, 10, 12},  {96, 12, 15},
                {112, 14, 17}, {128, 16, 20}, {256, 32, 40}};
    for (size_t i = 0; i < KVD_LEN(sums); i++) {
        ck_assert_uint_eq(kvd_tc_stream_bits(KVD_CODEC_TC2, sums[i].dim), sums[i].tc2);
        ck_assert_uint_eq(kvd_tc_stream_bits(KVD_CODEC_TC2_5, sums[i].dim), sums[i].tc2_5);
    }
    ck_assert_double_eq(kvd_value_bits(kvd_codecs_both(KVD_CODEC_TC2), 64, 64), 2.25);
    ck_assert_double_eq(kvd_value_bits(kvd_codecs_both(KVD_CODEC_TC2), 128, 128), 2.125);
    ck_assert_double_eq(kvd_value_bits(kvd_codecs_both(KVD_CODEC_TC2_5), 64, 64), 2.5);
    ck_assert_double_eq(kvd_value_bits(kvd_codecs_both(KVD_CODEC_TC2_5), 256, 256), 2.3125);
    ck_assert_int_eq(kvd_tc_find("tc2.5"), KVD_CODEC_TC2_5);
    ck_assert_int_eq(kvd_tc_find("int2"), KVD_CODEC_COUNT);
}
END_TEST

START_TEST(files_round_trip)
{
    struct kvd_error err = {0};
    uint64_t rng = kvd_test_seed("files");
    static const uint32_t dims[][2] = {{64, 64}, {80, 80}, {192, 128}, {64, 256}};
    for (size_t d = 0; d < KVD_LEN(dims); d++) {
        uint64_t dk = dims[d][0], dv = dims[d][1];
        double worst = 0;
        struct kvd_rotset *a =
            new_set(d % 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5, dims[d][0], dims[d][1], &rng);
        ck_assert_msg(kvd_rotset_check(a, &worst, &err) == 0, "%s", err.text);
        ck_assert(worst < 1e-4);
        ck_assert_msg(kvd_rotset_write(a, kvd_scratch("set"), &err) == 0, "%s", err.text);
        struct kvd_rotset *b = kvd_rotset_read(kvd_scratch("set"), &err);
        ck_assert_msg(b && b->transforms, "%s", err.text);
        const struct kvd_transforms *x = a->transforms, *y = b->transforms;
        ck_assert_str_eq(a->digest, b->digest);
        ck_assert_int_eq(x->codec, y->codec);
        ck_assert_mem_eq(x->k, y->k, 4 * dk * dk * 4);
        ck_assert_mem_eq(x->k_inverse, y->k_inverse, 4 * dk * dk * 4);
        ck_assert_mem_eq(x->v, y->v, 4 * dv * dv * 4);
        ck_assert_mem_eq(x->v_inverse, y->v_inverse, 4 * dv * dv * 4);
        ck_assert_mem_eq(x->k_mean, y->k_mean, 4 * dk * 4);
        ck_assert_mem_eq(x->v_mean, y->v_mean, 4 * dv * 4);
        ck_assert_mem_eq(x->k_sigma, y->k_sigma, 4 * dk * 4);
        ck_assert_mem_eq(x->k_bits, y->k_bits, 4 * dk / KVD_TC_TILE * 4);
        ck_assert(!b->k && !b->v && !b->clip_k && !kvd_rotset_clone(b));
        kvd_rotset_free(&a);
        kvd_rotset_free(&b);
    }
}
END_TEST

// A plane whose K is in a set's codec gets its terms, and one in another is refused; stores hold
// such sets as any.
START_TEST(served_in_their_own_codec)
{
    struct kvd_error err = {0};
    uint64_t rng = kvd_test_seed("served");
    struct kvd_rotset *s = new_set(KVD_CODEC_TC2, 64, 64, &rng), *out = NULL;
    const struct kvd_transforms *t = s->transforms;
    ck_assert_int_eq(kvd_rotset_write(s, kvd_scratch("set"), &err), 0); // which gives it its digest
    struct kvd_layout l = {.n_layers = 1,
                           .n_planes = 1,
                           .planes = {{.n_layers = 1,
                                       .q_heads = 2,
                                       .kv_heads = 2,
                                       .head_dim_k = 64,
                                       .head_dim_v = 64,
                                       .codec = {KVD_CODEC_INT2, KVD_CODEC_INT2}}},
                           .layers = {7}};
    struct kvd_rotation_data data = {0};
    for (int codec = KVD_CODEC_BF16; codec < KVD_CODEC_COUNT; codec++) {
        l.planes[0].codec.k = (uint32_t)codec;
        if (codec == KVD_CODEC_TC2)
            continue;
        ck_assert_int_eq(kvd_rotset_select(s, &l, 0, &data, &err), KVD_E_PRECONDITION);
        ck_assert_ptr_nonnull(strstr(err.text, "transforms for codec tc2"));
        ck_assert_ptr_nonnull(strstr(err.text, kvd_codec_name((uint32_t)codec)));
        ck_assert_ptr_null(data.k);
    }
    l.planes[0].codec.k = KVD_CODEC_TC2;
    ck_assert_msg(kvd_rotset_select(s, &l, 0, &data, &err) == 0, "%s", err.text);
    // Layer 7 is the set's second, of two heads.
    ck_assert_mem_eq(data.k, t->k + 2 * 4096, 2 * 4096 * sizeof(float));
    ck_assert_mem_eq(data.k_inverse, t->k_inverse + 2 * 4096, 2 * 4096 * sizeof(float));
    ck_assert_mem_eq(data.v, t->v + 2 * 4096, 2 * 4096 * sizeof(float));
    ck_assert_mem_eq(data.v_inverse, t->v_inverse + 2 * 4096, 2 * 4096 * sizeof(float));
    ck_assert_mem_eq(data.k_mean, t->k_mean + 128, 128 * sizeof(float));
    ck_assert_mem_eq(data.v_mean, t->v_mean + 128, 128 * sizeof(float));
    ck_assert_mem_eq(data.k_sigma, t->k_sigma + 128, 128 * sizeof(float));
    ck_assert_mem_eq(data.k_bits, t->k_bits + 8, 8 * sizeof(float));
    ck_assert(!data.clip_k && !data.gain_v && data.scale_v == KVD_SCALE_UNBIASED);
    kvd_rotation_data_deinit(&data);
    char store[256], cache[256], object[512];
    snprintf(store, sizeof(store), "%s", kvd_scratch("store"));
    mkdir(store, 0777);
    mkdir(kvd_scratch("store/objects"), 0777);
    mkdir(kvd_scratch("store/objects/sha256"), 0777);
    snprintf(cache, sizeof(cache), "%s", kvd_scratch("cache"));
    snprintf(object, sizeof(object), "%s/objects/sha256/%s.safetensors", store, s->digest + 7);
    ck_assert_int_eq(kvd_rotset_write(s, object, &err), 0);
    struct kvd_store_config c = {.url = store, .cache = cache};
    err = (struct kvd_error){0};
    ck_assert_msg(kvd_store_fetch(&c, s->digest, NULL, NULL, &out, NULL, &err) == 0, "%s",
                  err.text);
    ck_assert(out->transforms && strcmp(out->digest, s->digest) == 0);
    kvd_rotset_free(&out);
    kvd_rotset_free(&s);
}
END_TEST

static void fails(const struct kvd_rotset *s, const char *why)
{
    struct kvd_error err = {0};
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), KVD_E_CORRUPT);
    ck_assert_msg(strstr(err.text, why) != NULL, "'%s' is not in '%s'", why, err.text);
}

// Sets one value of a good set, which then is refused, and takes it back.
static void fails_with(const struct kvd_rotset *s, float *at, float value, const char *why)
{
    float before = *at;
    *at = value;
    fails(s, why);
    *at = before;
}

START_TEST(sets_that_do_not_hold_up)
{
    struct kvd_error err = {0};
    uint64_t rng = kvd_test_seed("checks");
    struct kvd_rotset *s = new_set(KVD_CODEC_TC2, 64, 64, &rng);
    struct kvd_transforms *t = s->transforms;
    fails_with(s, &t->k[2 * 64 * 64 + 5], NAN,
               "K, layer 7, head 0 holds values that are not finite");
    fails_with(s, &t->v_inverse[64 * 64], INFINITY, "V, layer 3, head 1 holds values");
    fails_with(s, &t->k_mean[70], NAN, "K, layer 3, head 1 holds values");
    fails_with(s, &t->v_mean[0], -INFINITY, "V, layer 3, head 0 holds values");
    fails_with(s, &t->k_inverse[9], t->k_inverse[9] + 1, "the inverse is none");
    fails_with(s, &t->v[9], t->v[9] + 1, "the inverse is none");
    fails_with(s, &t->k_sigma[1], 0, "deviation of channel 1 is 0");
    fails_with(s, &t->k_sigma[1], -1, "deviation of channel 1 is -1");
    fails_with(s, &t->k_sigma[1], NAN, "deviation of channel 1");
    fails_with(s, &t->k_bits[1], t->k_bits[1] + 0.5f, "they have 0 to 4");
    fails_with(s, &t->k_bits[1], 5, "they have 0 to 4");
    fails_with(s, &t->k_bits[1], -1, "they have 0 to 4");
    fails_with(s, &t->k_bits[1], NAN, "they have 0 to 4");
    fails_with(s, &t->k_bits[1], t->k_bits[1] == 4 ? 3 : t->k_bits[1] + 1,
               "the bits of the tiles sum");
    t->codec = KVD_CODEC_TC2_5;
    fails(s, "codec tc2.5 has 10 at head_dim 64");
    t->codec = KVD_CODEC_TC2;
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), 0);
    // A transform whose inverse is one, and which cannot be had in 16 bits.
    memset(t->k, 0, 64 * 64 * sizeof(float));
    memset(t->k_inverse, 0, 64 * 64 * sizeof(float));
    for (int i = 0; i < 64; i++) {
        float x = i < 32 ? 1 : 0x1p-12f;
        t->k[i * 65] = x;
        t->k_inverse[i * 65] = 1 / x;
    }
    fails(s, "K, layer 3, head 0 is ill-conditioned");
    struct kvd_rotset latent = {.n_layers = 1, .heads = 1, .dim_k = 64, .dim_v = 512};
    ck_assert_int_eq(kvd_transforms_alloc(&latent, KVD_CODEC_TC2, &err), KVD_E_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "of a latent"));
    // What a file says, a reader finds too.
    ck_assert_int_eq(kvd_rotset_write(s, kvd_scratch("bad"), &err), 0);
    ck_assert_ptr_null(kvd_rotset_read(kvd_scratch("bad"), &err));
    ck_assert_ptr_nonnull(strstr(err.text, "ill-conditioned"));
    kvd_rotset_free(&s);
}
END_TEST

// Flipped bytes of a good file: never a crash, and what is read holds up.
START_TEST(damaged_files)
{
    struct kvd_error err = {0};
    uint64_t rng = kvd_test_seed("damage");
    struct kvd_rotset *s = new_set(KVD_CODEC_TC2, 64, 64, &rng);
    ck_assert_int_eq(kvd_rotset_write(s, kvd_scratch("damaged"), &err), 0);
    kvd_rotset_free(&s);
    for (int i = 0; i < 500; i++) {
        FILE *f = fopen(kvd_scratch("damaged"), "r+");
        long at = (long)(kvd_rand(&rng) % 1500);
        fseek(f, at, SEEK_SET);
        int old = fgetc(f);
        fseek(f, at, SEEK_SET);
        fputc(old ^ (1 << (i % 8)), f);
        fclose(f);
        s = kvd_rotset_read(kvd_scratch("damaged"), &err);
        ck_assert(!s || kvd_rotset_check(s, NULL, &err) == 0);
        kvd_rotset_free(&s);
        f = fopen(kvd_scratch("damaged"), "r+");
        fseek(f, at, SEEK_SET);
        fputc(old, f);
        fclose(f);
    }
}
END_TEST

// -- rows ----------------------------------------------------------------------------------------

// All levels tried, from the lowest.
static double nearest(double x, int bits)
{
    static const float steps[] = {0, 1.5958f, 0.9957f, 0.5860f, 0.3352f};
    double best = 0, least = INFINITY;
    for (int code = 0; code < 1 << bits; code++) {
        double level = (double)steps[bits] * (code - ((1 << bits) - 1) / 2.0);
        if (fabs(x - level) < least) {
            least = fabs(x - level);
            best = level;
        }
    }
    return best;
}

static void reference(const float *y, uint32_t dim, const double *sigma, const int *bits,
                      int refits, double *out)
{
    double scale = 0, n = 0;
    for (uint32_t i = 0; i < dim; i++)
        if (bits[i]) {
            scale += pow((double)y[i] / sigma[i], 2);
            n++;
        }
    scale = n > 0 ? sqrt(scale / n) : 0;
    for (int round = 0;; round++) {
        double cy = 0, cc = 0, yy = 0;
        for (uint32_t i = 0; i < dim; i++) {
            double x = scale > 0 ? (double)y[i] / sigma[i] / scale : 0;
            out[i] = bits[i] ? sigma[i] * nearest(x, bits[i]) : 0;
            cy += out[i] * (double)y[i];
            cc += out[i] * out[i];
            yy += bits[i] ? (double)y[i] * (double)y[i] : 0;
        }
        if (round == refits || cy <= 0) {
            scale = cy > 0 ? fmin(yy / cy, 65504) : 0;
            break;
        }
        scale = cy / cc;
    }
    float stored = kvd_fp16_to_f32(kvd_f32_to_fp16((float)scale));
    for (uint32_t i = 0; i < dim; i++)
        out[i] *= (double)stored;
}

static void check_row(const struct kvd_transform *t, const float *y, uint32_t *differ)
{
    float got[KVD_MAX_HEAD_DIM];
    double want[KVD_MAX_HEAD_DIM], sigma[KVD_MAX_HEAD_DIM], size = 0;
    int bits[KVD_MAX_HEAD_DIM];
    for (uint32_t i = 0; i < t->coder.dim; i++) {
        sigma[i] = t->coder.sigma ? (double)t->coder.sigma[i] : 1;
        bits[i] = t->coder.bits[i / KVD_TC_TILE];
        got[i] = y[i];
    }
    kvd_tc_row(t, got);
    reference(y, t->coder.dim, sigma, bits, (int)t->coder.refits, want);
    for (uint32_t i = 0; i < t->coder.dim; i++)
        size = fmax(size, fabs(want[i]));
    for (uint32_t i = 0; i < t->coder.dim; i++)
        *differ += !(fabs((double)got[i] - want[i]) <= 1e-6 * size);
}

START_TEST(rows_against_all_levels_tried)
{
    uint64_t rng = kvd_test_seed("rows");
    static const uint32_t dims[] = {64, 80, 128, 256};
    uint32_t differ = 0, all = 0;
    for (size_t d = 0; d < KVD_LEN(dims); d++) {
        struct kvd_rotset *s =
            new_set(d % 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5, dims[d], dims[d], &rng);
        for (int i = 0; i < 400; i++, all += dims[d]) {
            struct kvd_transform t = kvd_transform_at(s, (uint64_t)i % 4, i / 4 % 2);
            float y[KVD_MAX_HEAD_DIM];
            double size = exp(3 * normal(&rng));
            for (uint32_t c = 0; c < t.coder.dim; c++)
                y[c] =
                    (float)(size * normal(&rng) * (t.coder.sigma ? (double)t.coder.sigma[c] : 1));
            if (i % 5 == 0) // an outlier
                y[kvd_rand(&rng) % t.coder.dim] *= 100;
            check_row(&t, y, &differ);
        }
        kvd_rotset_free(&s);
    }
    // Rounding may decide between two codes that are as near.
    ck_assert_msg(differ <= all / 10000, "%u of %u values differ", differ, all);
}
END_TEST

START_TEST(rows_that_are_read_back_are_as_long)
{
    uint64_t rng = kvd_test_seed("length");
    struct kvd_rotset *s = new_set(KVD_CODEC_TC2, 128, 128, &rng);
    for (int i = 0; i < 200; i++) {
        struct kvd_transform t = kvd_transform_at(s, (uint64_t)i % 4, i / 4 % 2);
        float y[128], z[128];
        double yy = 0, zy = 0;
        for (uint32_t c = 0; c < 128; c++)
            z[c] = y[c] = (float)(normal(&rng) * (t.coder.sigma ? (double)t.coder.sigma[c] : 1));
        kvd_tc_row(&t, z);
        for (uint32_t c = 0; c < 128; c++)
            if (t.coder.bits[c / KVD_TC_TILE] > 0) {
                yy += (double)y[c] * (double)y[c];
                zy += (double)z[c] * (double)y[c];
            }
        ck_assert_double_eq_tol(zy / yy, 1, 1e-3); // fp16
    }
    kvd_rotset_free(&s);
}
END_TEST

START_TEST(rows_at_the_edges)
{
    uint64_t rng = kvd_test_seed("edges");
    struct kvd_rotset *s = new_set(KVD_CODEC_TC2, 64, 64, &rng);
    struct kvd_transform v = kvd_transform_at(s, 0, true), k = kvd_transform_at(s, 0, false);
    float y[64] = {0};
    ck_assert_float_eq(kvd_tc_row(&v, y), 0);
    ck_assert_float_eq(kvd_tc_row(&k, y), 0);
    for (int i = 0; i < 64; i++)
        ck_assert_float_eq(y[i], 0);
    for (int i = 0; i < 64; i++)
        y[i] = i % 2 ? 1e20f : -1e20f;
    ck_assert_float_eq(kvd_tc_row(&v, y), 65504); // saturated, and finite
    for (int i = 0; i < 64; i++)
        ck_assert(isfinite(y[i]) && (y[i] > 0) == (i % 2 == 1));
    // A value halfway between two levels has the lower one: of 0 the level below it.
    for (int i = 0; i < 64; i++)
        y[i] = i % 4 == 0 ? 0 : i % 4 == 1 ? 1 : -1;
    kvd_tc_row(&v, y);
    for (int i = 0; i < 64; i += 4)
        ck_assert(y[i] < 0 && y[i] > y[i + 2]);
    kvd_rotset_free(&s);
}
END_TEST

// Bits of tiles in any order that sums to a codec's; not all are multiples of a piece's.
static void draw_bits(uint64_t *rng, uint32_t codec, uint32_t dim, float *bits)
{
    memset(bits, 0, dim / KVD_TC_TILE * sizeof(*bits));
    for (uint32_t n = kvd_tc_stream_bits(codec, dim); n;) {
        uint32_t i = (uint32_t)(kvd_rand(rng) % (dim / KVD_TC_TILE));
        if (bits[i] < KVD_TC_MAX_BITS) {
            bits[i]++;
            n--;
        }
    }
}

// What is written comes back, all of a side's bits are used, and a chunk of 16 tokens shares no
// byte with another.
START_TEST(codes_have_places_of_their_own)
{
    static const uint32_t dims[] = {64, 80, 96, 112, 128, 192, 256};
    uint64_t rng = kvd_test_seed("places");
    for (uint32_t i = 0; i < KVD_LEN(dims) * 3 * 2; i++) {
        static uint8_t side[KVD_TC_MOST_BYTES], owner[KVD_TC_MOST_BYTES],
            written[KVD_PAGE_TOKENS][KVD_MAX_HEAD_DIM];
        uint8_t codes[KVD_MAX_HEAD_DIM];
        uint32_t dim = dims[i / 6], kind = i / 2 % 3; // tc2, tc2.5, V
        float bits[KVD_MAX_HEAD_DIM / KVD_TC_TILE];
        draw_bits(&rng, kind == 1 ? KVD_CODEC_TC2_5 : KVD_CODEC_TC2, dim, bits);
        struct kvd_tc_coder t = kvd_tc_coder_of(kind == 1 ? KVD_CODEC_TC2_5 : KVD_CODEC_TC2, dim,
                                                kind == 2, NULL, bits);
        uint32_t bytes = kvd_tc_codes_bytes(&t);
        ck_assert_uint_eq(
            bytes, kind < 2 ? 128 * kvd_tc_stream_bits(kind ? KVD_CODEC_TC2_5 : KVD_CODEC_TC2, dim)
                            : kvd_codes_bytes(KVD_CODEC_INT2, dim, true));
        memset(owner, 0, sizeof(owner));
        memset(side, 0x5a, sizeof(side));
        for (uint32_t token = 0; token < KVD_PAGE_TOKENS; token++) {
            for (uint32_t c = 0; c < dim; c++) {
                uint32_t b = t.bits[c / KVD_TC_TILE];
                written[token][c] = (uint8_t)(kvd_rand(&rng) & ((1u << b) - 1));
            }
            static uint8_t zeros[KVD_TC_MOST_BYTES], ones[KVD_TC_MOST_BYTES];
            memset(zeros, 0, sizeof(zeros));
            memset(ones, 0xff, sizeof(ones));
            memset(codes, 0xff, sizeof(codes));
            kvd_tc_pack(&t, zeros, token, codes); // sets the bits that are this token's,
            memset(codes, 0, sizeof(codes));
            kvd_tc_pack(&t, ones, token, codes); // and clears them
            bool good = true;
            for (uint32_t j = 0; j < sizeof(zeros); j++) {
                good &= zeros[j] == (0xff & ~ones[j]);
                good &= zeros[j] == 0 || j < bytes;
                good &= zeros[j] == 0 || owner[j] == 0 || owner[j] == 1 + token / 16;
                owner[j] = zeros[j] ? (uint8_t)(1 + token / 16) : owner[j];
            }
            ck_assert_msg(good, "head_dim %u, kind %u, token %u", dim, kind, token);
            kvd_tc_pack(&t, side, token, written[token]);
        }
        for (uint32_t token = 0; token < KVD_PAGE_TOKENS; token++) {
            kvd_tc_unpack(&t, side, token, codes);
            ck_assert_mem_eq(codes, written[token], dim);
        }
        bool full = true;
        for (uint32_t j = 0; j < KVD_TC_MOST_BYTES; j++)
            full &= (owner[j] != 0) == (j < bytes);
        ck_assert_msg(full, "head_dim %u, kind %u has gaps", dim, kind);
    }
}
END_TEST

// Two bits everywhere are int2's bytes, but where those of chunks lie side by side.
START_TEST(two_bits_lie_as_int2)
{
    static const uint32_t dims[] = {80, 96, 112, 128, 192, 256};
    for (size_t d = 0; d < KVD_LEN(dims); d++)
        for (uint32_t token = 0; token < KVD_PAGE_TOKENS; token++)
            for (uint32_t c = 0; c < dims[d]; c++) {
                static uint8_t side[KVD_TC_MOST_BYTES];
                uint8_t codes[KVD_MAX_HEAD_DIM] = {0};
                struct kvd_tc_coder t = kvd_tc_coder_of(KVD_CODEC_TC2, dims[d], false, NULL, NULL);
                struct kvd_code_place p = kvd_place_of(false, dims[d], 2, token, c);
                memset(side, 0, kvd_tc_codes_bytes(&t));
                codes[c] = 3;
                kvd_tc_pack(&t, side, token, codes);
                ck_assert_uint_eq(side[p.byte], 3u << p.bit);
            }
}
END_TEST

KVD_MAIN("transforms", 120, codes_have_places_of_their_own, two_bits_lie_as_int2, bits_of_codecs,
         files_round_trip, served_in_their_own_codec, sets_that_do_not_hold_up, damaged_files,
         rows_against_all_levels_tried, rows_that_are_read_back_are_as_long, rows_at_the_edges)
