// CPU attention over INT2 pages, and over latents (MLA), against fp32 K/V through OpenBLAS on the
// same threads; and codes and outputs against float64 on real activations. usage: bench_attend
// [TOKENS] [ACTIVATIONS] ; KVD_ROTATIONZOO names real rotation files.
#include <cblas.h>
#include <jansson.h>
#include <time.h>

#include "calib/rotset.h"
#include "tests/bench/cpu_limits.h"
#include "tests/unit/kernel_fixture.h"

enum { HEADS = 32, KV = 8, DIM = 128, GROUP = HEADS / KV };

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

// Of all threads.
static double now_cpu(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *t, int n)
{
    qsort(t, (size_t)n, sizeof(*t), by_value);
    return t[n / 2];
}

static void softmax(float *row, int tokens)
{
    float m = row[0], sum = 0;
    for (int t = 1; t < tokens; t++)
        m = row[t] > m ? row[t] : m;
    for (int t = 0; t < tokens; t++)
        sum += row[t] = expf(row[t] - m);
    for (int t = 0; t < tokens; t++)
        row[t] /= sum;
}

// Attention of one query token, fp32 K and V [kv head][token][dim], by two matrix products a head.
static void blas_attention(const float *q, const float *k, const float *v, int tokens, float *s,
                           float *o)
{
    for (int h = 0; h < KV; h++) {
        const float *kh = k + (size_t)h * tokens * DIM, *vh = v + (size_t)h * tokens * DIM;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, GROUP, tokens, DIM, 0.0883883f,
                    q + h * GROUP * DIM, DIM, kh, DIM, 0, s, tokens);
        for (int g = 0; g < GROUP; g++)
            softmax(s + (size_t)g * tokens, tokens);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, GROUP, DIM, tokens, 1, s, tokens, vh,
                    DIM, 0, o + h * GROUP * DIM, DIM);
    }
}

static double time_blas(int tokens, int repeats, uint64_t *rng)
{
    size_t n = (size_t)KV * tokens * DIM;
    float *k = malloc(n * 4), *v = malloc(n * 4), *s = malloc((size_t)GROUP * tokens * 4);
    float q[HEADS * DIM], o[HEADS * DIM];
    double t[64];
    for (size_t i = 0; i < n; i++) {
        k[i] = (float)kseq_uniform(rng) - 0.5f;
        v[i] = (float)kseq_uniform(rng) - 0.5f;
    }
    for (int i = 0; i < HEADS * DIM; i++)
        q[i] = (float)kseq_normal(rng);
    for (int i = 0; i < repeats; i++) {
        double began = now();
        blas_attention(q, k, v, tokens, s, o);
        t[i] = now() - began;
    }
    free(k);
    free(v);
    free(s);
    return median(t, repeats);
}

static struct kvd_plane plane_of(uint32_t sink, uint32_t recent, uint32_t kv, uint32_t heads,
                                 uint32_t dim, uint32_t codec)
{
    return (struct kvd_plane){.n_layers = 1,
                              .q_heads = heads,
                              .kv_heads = kv,
                              .head_dim_k = dim,
                              .head_dim_v = dim,
                              .codec = {codec, codec},
                              .sink = sink,
                              .recent = recent};
}

struct times {
    double median, cpu; // cpu: the least that a thread computed
};

static struct times time_pages(uint32_t codec, const char *isa, uint32_t threads, uint32_t tokens,
                               int repeats, uint64_t seed)
{
    struct kvd_error err = {0};
    struct kvd_backend *b = kvd_cpu_backend_new(threads, isa, &err);
    if (!b)
        return (struct times){0};
    struct kseq s;
    kseq_init(&s, plane_of(64, 256, KV, HEADS, DIM, codec), tokens, 1, 0.96f, 0.92f, seed);
    // Random pages: what they hold does not change the time, and quantizing would take long.
    for (uint32_t i = 0; i < s.n_codec; i++)
        for (uint64_t j = 0; j < kvd_page_bytes(&s.g, s.g.codec); j++)
            ((uint8_t *)(uintptr_t)s.codec[i])[j] = // of bf16 none is a denormal
                (uint8_t)((kvd_rand(&s.rng) >> 56 & 0x3b) | (codec == KVD_CODEC_BF16 ? 0x30 : 0));
    for (uint32_t i = 0; i < s.n_bf16; i++)
        memset((void *)(uintptr_t)s.bf16[i], 0x3c, kvd_page_bytes(&s.g, kvd_window_codec()));
    s.length = tokens;
    s.hist_end = kseq_hist_end(&s.g, 64, tokens);
    float bits[KV * DIM / 16];
    for (int i = 0; i < KV * DIM / 16; i++) // as fits have them
        bits[i] = (codec == KVD_CODEC_TC2 ? (const float[]){4, 2, 1, 1}
                                          : (const float[]){4, 3, 2, 1})[i % (DIM / 16) / 2];
    s.rot.k_bits = kvd_codec_tc(codec) ? bits : NULL;
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    float q[HEADS * DIM], o[HEADS * DIM];
    for (int i = 0; i < HEADS * DIM; i++)
        q[i] = (float)kseq_normal(&s.rng);
    struct kvd_attend_item item = {.pages = {s.bf16, s.codec},
                                   .length = s.length,
                                   .hist_end = s.hist_end,
                                   .q_len = 1,
                                   .q = kseq_tensor(q, KVD_DTYPE_F32, 1, HEADS, DIM, 0),
                                   .o = kseq_tensor(o, KVD_DTYPE_F32, 1, HEADS, DIM, 0)};
    struct kvd_attend_params p = {.plane = &s.g,
                                  .rotation = rot,
                                  .layer_count = 1,
                                  .scale = 0.0883883f,
                                  .items = &item,
                                  .n_items = 1};
    double t[64], cpu[64];
    for (int i = 0; i < repeats; i++) {
        double began = now(), began_cpu = now_cpu();
        b->ops->attend(b, &p, NULL);
        t[i] = now() - began;
        cpu[i] = (now_cpu() - began_cpu) / threads;
    }
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
    median(cpu, repeats); // which sorts them
    return (struct times){median(t, repeats), cpu[0]};
}

static void bench_isa(const char *isa, int lanes, uint32_t tokens, int repeats, double blas,
                      uint64_t seed)
{
    static const uint32_t codecs[] = {KVD_CODEC_INT2, KVD_CODEC_TC2,     KVD_CODEC_TC2_5,
                                      KVD_CODEC_INT4, KVD_CODEC_INT2_LM, KVD_CODEC_TURBOQUANT_4,
                                      KVD_CODEC_BF16};
    double fmas = 2.0 * HEADS * DIM * tokens, arithmetic = lanes ? limit_of_fmas(fmas, lanes) : 0;
    if (arithmetic > 0)
        printf("%s: %.0f M multiply-adds of floats take %.2f ms\n", isa, fmas / 1e6,
               arithmetic * 1e3);
    for (size_t c = 0; c < KVD_LEN(codecs); c++) {
        struct times t = time_pages(codecs[c], isa, 2, tokens, repeats, seed);
        double bits = kvd_value_bits(kvd_codecs_both(codecs[c]), DIM, DIM);
        double bytes = 2.0 * KV * tokens * DIM * bits / 8, memory = limit_of_reads(bytes);
        if (t.median <= 0)
            continue;
        printf("%-12s pages, kvd %-6s %8.2f ms  %6.1f MB, read in %5.2f  %.2fx as fast",
               kvd_codec_name(codecs[c]), isa, t.median * 1e3, bytes / 1e6, memory * 1e3,
               blas / t.median);
        if (arithmetic > 0)
            printf("  at best %.2f ms computing, %.0f %% of the limit", t.cpu * 1e3,
                   100 * KVD_MAX(arithmetic, memory) / t.cpu);
        printf("\n");
    }
}

static void bench_speed(uint32_t tokens, uint64_t seed)
{
    int repeats = tokens > 8192 ? 15 : 5;
    printf(
        "\n# attention, 1 x %u tokens, %d q / %d kv heads, head_dim %d, 2 threads, median of %d; "
        "the limit is the larger of what multiply-adds and reads take, best of %d; what else "
        "runs is in the medians, and not in the limit and in what is computed at best\n",
        tokens, HEADS, KV, DIM, repeats, LIMIT_RUNS);
    openblas_set_num_threads(2);
    double blas = time_blas((int)tokens, repeats, &seed);
    printf("fp32 K/V, OpenBLAS (%s)   %8.2f ms   %6.1f MB of K/V\n", openblas_get_config(),
           blas * 1e3, 2.0 * KV * tokens * DIM * 4 / 1e6);
    bench_isa("amx", 16, tokens, repeats, blas, seed);
    bench_isa("vnni", 16, tokens, repeats, blas, seed);
    bench_isa("avx512", 16, tokens, repeats, blas, seed);
    bench_isa("avx2", 8, tokens, repeats, blas, seed);
    if (tokens <= 8192)
        bench_isa("scalar", 0, tokens, repeats, blas, seed);
}

// -- latents -------------------------------------------------------------------------------------

enum { LATENT_HEADS = 128, ROPE = 64, LATENT = 512, QUERY = ROPE + LATENT };

static struct kvd_plane latent_of(uint32_t codec)
{
    return (struct kvd_plane){.n_layers = 1,
                              .q_heads = LATENT_HEADS,
                              .kv_heads = 1,
                              .head_dim_k = ROPE,
                              .head_dim_v = LATENT,
                              .latent = 1,
                              .codec = {KVD_CODEC_BF16, codec},
                              .sink = 64,
                              .recent = 256};
}

static double time_latent(uint32_t codec, const char *isa, uint32_t tokens, int repeats,
                          uint64_t seed)
{
    struct kvd_backend *b = kvd_cpu_backend_new(2, isa, NULL);
    if (!b)
        return 0;
    struct kseq s;
    kseq_init(&s, latent_of(codec), tokens, 0, 0.96f, 0.92f, seed);
    for (uint32_t i = 0; i < s.n_codec; i++)
        for (uint64_t j = 0; j < kvd_page_bytes(&s.g, s.g.codec); j++)
            ((uint8_t *)(uintptr_t)s.codec[i])[j] = // of bf16 none is a denormal
                (uint8_t)((kvd_rand(&s.rng) >> 56 & 0x3b) | (codec == KVD_CODEC_BF16 ? 0x30 : 0));
    for (uint32_t i = 0; i < s.n_bf16; i++)
        memset((void *)(uintptr_t)s.bf16[i], 0x3c, kvd_page_bytes(&s.g, kvd_window_codec()));
    s.length = tokens;
    s.hist_end = kseq_hist_end(&s.g, 64, tokens);
    s.r_v = malloc(sizeof(float) * LATENT * LATENT);
    for (uint32_t i = 0; i < LATENT * LATENT; i++)
        s.r_v[i] = (float)kvd_hadamard_entry(LATENT, i / LATENT, i % LATENT) / sqrtf(LATENT);
    s.rot.v = s.r_v;
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    float *q = malloc(sizeof(float) * LATENT_HEADS * (QUERY + LATENT)),
          *o = q + LATENT_HEADS * QUERY;
    for (int i = 0; i < LATENT_HEADS * QUERY; i++)
        q[i] = (float)kseq_normal(&s.rng);
    struct kvd_attend_item item = {.pages = {s.bf16, s.codec},
                                   .length = s.length,
                                   .hist_end = s.hist_end,
                                   .q_len = 1,
                                   .q = kseq_tensor(q, KVD_DTYPE_F32, 1, LATENT_HEADS, QUERY, 0),
                                   .o = kseq_tensor(o, KVD_DTYPE_F32, 1, LATENT_HEADS, LATENT, 0)};
    struct kvd_attend_params p = {.plane = &s.g,
                                  .rotation = rot,
                                  .layer_count = 1,
                                  .scale = 0.0721688f,
                                  .items = &item,
                                  .n_items = 1};
    double took[64];
    for (int i = 0; i < repeats; i++) {
        double began = now();
        b->ops->attend(b, &p, NULL);
        took[i] = now() - began;
    }
    free(q);
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
    return median(took, repeats);
}

// Two matrix products for all heads, over fp32 [token][latent, rope].
static double time_latent_blas(int tokens, int repeats, uint64_t *rng)
{
    float *x = malloc(sizeof(float) * (size_t)tokens * QUERY),
          *s = malloc(sizeof(float) * (size_t)tokens * LATENT_HEADS), q[LATENT_HEADS * QUERY];
    float *o = malloc(sizeof(float) * LATENT_HEADS * LATENT);
    double took[64];
    for (size_t i = 0; i < (size_t)tokens * QUERY; i++)
        x[i] = (float)kseq_uniform(rng) - 0.5f;
    for (int i = 0; i < LATENT_HEADS * QUERY; i++)
        q[i] = (float)kseq_uniform(rng) - 0.5f;
    for (int i = 0; i < repeats; i++) {
        double began = now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, LATENT_HEADS, tokens, QUERY,
                    0.0721688f, q, QUERY, x, QUERY, 0, s, tokens);
        for (int h = 0; h < LATENT_HEADS; h++)
            softmax(s + (size_t)h * tokens, tokens);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, LATENT_HEADS, LATENT, tokens, 1, s,
                    tokens, x, QUERY, 0, o, LATENT);
        took[i] = now() - began;
    }
    free(x);
    free(s);
    free(o);
    return median(took, repeats);
}

static void bench_latent(uint32_t tokens, uint64_t seed)
{
    static const uint32_t codecs[] = {KVD_CODEC_BF16, KVD_CODEC_INT2, KVD_CODEC_INT4};
    static const char *const isas[] = {"avx512", "avx2"};
    int repeats = 7;
    double work = 2.0 * tokens * LATENT_HEADS * (QUERY + LATENT) * 1e-9;
    printf("\n# latent attention, 1 x %u tokens, %d q heads, latent %d and rope %d, 2 threads, "
           "median of %d\n",
           tokens, LATENT_HEADS, LATENT, ROPE, repeats);
    double blas = time_latent_blas((int)tokens, repeats, &seed);
    printf("fp32, OpenBLAS            %8.2f ms   %5.1f GFLOP/s\n", blas * 1e3, work / blas);
    for (size_t i = 0; i < KVD_LEN(isas); i++)
        for (size_t c = 0; c < KVD_LEN(codecs); c++) {
            struct kvd_plane g = latent_of(codecs[c]);
            double t = time_latent(codecs[c], isas[i], tokens, repeats, seed);
            if (t > 0)
                printf("%-5s latent, kvd %-7s %8.2f ms   %5.1f GFLOP/s  %6.1f bytes a token  "
                       "%.2fx as fast\n",
                       kvd_codec_name(codecs[c]), isas[i], t * 1e3, work / t,
                       (double)kvd_page_bytes(&g, g.codec) / KVD_PAGE_TOKENS, blas / t);
        }
}

// -- accuracy on real activations ---------------------------------------------------------------

struct recorded {
    uint32_t layers, tokens, heads; // kv heads, of dim 64
    const uint16_t *k, *v;
    uint8_t *file;
};

static bool load(const char *path, struct recorded *r)
{
    FILE *f = path ? fopen(path, "rb") : NULL;
    if (!f)
        return false;
    fseek(f, 0, SEEK_END);
    size_t size = (size_t)ftell(f);
    rewind(f);
    r->file = malloc(size);
    bool ok = fread(r->file, 1, size, f) == size;
    fclose(f);
    uint64_t n = 0;
    memcpy(&n, r->file, 8);
    json_t *h = ok ? json_loadb((char *)r->file + 8, n, 0, NULL) : NULL;
    const uint16_t **out[2] = {&r->k, &r->v};
    for (int i = 0; h && i < 2; i++) {
        const json_t *t = json_object_get(h, i ? "v" : "k"), *shape = json_object_get(t, "shape");
        r->layers = (uint32_t)json_integer_value(json_array_get(shape, 0));
        r->tokens = (uint32_t)json_integer_value(json_array_get(shape, 1));
        r->heads = (uint32_t)json_integer_value(json_array_get(shape, 2));
        *out[i] = (const uint16_t *)(const void *)(r->file + 8 + n +
                                                   json_integer_value(json_array_get(
                                                       json_object_get(t, "data_offsets"), 0)));
    }
    json_decref(h);
    return ok && h;
}

// DESIGN §5 in double: codes, scale and min of one row.
static void derive(const double *x, uint32_t dim, double ratio, int *codes, double *scale,
                   double *min)
{
    double sorted[KVD_MAX_HEAD_DIM], lo = 1e300, hi = -1e300;
    for (uint32_t i = 0; i < dim; i++)
        sorted[i] = fabs(x[i]);
    qsort(sorted, dim, sizeof(double), by_value);
    double limit = sorted[(uint32_t)floor(ratio * dim)];
    for (uint32_t i = 0; i < dim; i++) {
        double c = fmin(fmax(x[i], -limit), limit);
        lo = fmin(lo, c);
        hi = fmax(hi, c);
    }
    *scale = (hi - lo) / 3;
    *min = lo;
    for (uint32_t i = 0; i < dim; i++)
        codes[i] = (int)floor((fmin(fmax(x[i], -limit), limit) - lo) / *scale + 0.5);
}

// Codes of all rows of one real rotation. Rows of head_dim 128 are two neighbouring heads of 64
// side by side, of 256 four.
static void compare_codes(const struct recorded *r, const struct kvd_rotset *set, const char *name)
{
    uint32_t dim = set->dim_k, per = dim / 64;
    uint64_t codes = 0, differ = 0, rows = 0, boundary = 0;
    double worst_scale = 0;
    for (uint32_t l = 0; l < r->layers; l++)
        for (uint32_t t = 0; t < r->tokens; t += 7)
            for (int side = 0; side < 2; side++) {
                const float *m =
                    (side ? set->v : set->k) + (size_t)(l % set->n_layers) * set->heads * dim * dim;
                const uint16_t *row =
                    (side ? r->v : r->k) + ((size_t)l * r->tokens + t) * r->heads * 64;
                float x[KVD_MAX_HEAD_DIM], y[KVD_MAX_HEAD_DIM];
                double z[KVD_MAX_HEAD_DIM], scale, min;
                int want[KVD_MAX_HEAD_DIM];
                struct kvd_row got;
                struct kvd_quantizer q = {KVD_CODEC_INT2, side ? 0.92f : 0.96f, 1,
                                          KVD_SCALE_PUBLISHED, NULL};
                for (uint32_t c = 0; c < dim; c++)
                    x[c] = kvd_bf16_to_f32(row[c % (KVD_MIN(per, r->heads) * 64)]);
                for (uint32_t j = 0; j < dim; j++) {
                    z[j] = 0;
                    y[j] = 0;
                    for (uint32_t i = 0; i < dim; i++) {
                        z[j] += (double)x[i] * m[(size_t)i * dim + j];
                        y[j] += x[i] * m[(size_t)i * dim + j];
                    }
                }
                kvd_row_quantize(&q, y, dim, &got);
                derive(z, dim, side ? 0.92 : 0.96, want, &scale, &min);
                worst_scale =
                    fmax(worst_scale,
                         fabs(kvd_param_decode(KVD_CODEC_INT2, got.param).scale / scale - 1));
                for (uint32_t c = 0; c < dim; c++, codes++) {
                    if (got.codes[c] == want[c])
                        continue;
                    double at = (z[c] - min) / scale + 0.5;
                    differ++;
                    boundary += fabs(at - round(at)) < 1e-4;
                }
                rows++;
            }
    printf("%-34s head_dim %3u  %7llu rows  %9llu codes  %llu differ (%.1e), %llu of them within "
           "1e-4 of a code "
           "boundary; scale off by at most %.1e (fp16)\n",
           name, dim, (unsigned long long)rows, (unsigned long long)codes,
           (unsigned long long)differ, (double)differ / (double)codes, (unsigned long long)boundary,
           worst_scale);
}

static void bench_codes(const char *activations)
{
    struct recorded r = {0};
    printf("\n# int2 codes against an independent float64 derivation, real activations\n");
    if (!load(activations, &r)) {
        printf("skipped: no activations at %s\n", activations ? activations : "(none given)");
        return;
    }
    struct kvd_error err = {0};
    uint16_t layer = 0;
    struct kvd_rotset *h = kvd_rotset_new("hadamard", &layer, 1, 64, 64, &err);
    compare_codes(&r, h, "Hadamard");
    kvd_rotset_free(&h);
    const char *zoo = getenv("KVD_ROTATIONZOO");
    const char *files[][2] = {
        {"qwen3-8b/k_rotation_qqt_r_h_pbr.pt", "qwen3-8b/v_rotation_sst_r_h_pbr.pt"},
        {"qwen3.5-4b/calibrated/k_rotation.pt", "qwen3.5-4b/calibrated/v_rotation.pt"}};
    for (size_t i = 0; zoo && *zoo && i < 2; i++) {
        char k[512], v[512];
        snprintf(k, sizeof(k), "%s/%s", zoo, files[i][0]);
        snprintf(v, sizeof(v), "%s/%s", zoo, files[i][1]);
        struct kvd_rotset *s = kvd_rotset_import(k, v, "m", &err);
        if (s)
            compare_codes(&r, s, files[i][0]);
        kvd_rotset_free(&s);
    }
    free(r.file);
}

int main(int argc, char **argv)
{
    uint32_t tokens = argc > 1 ? (uint32_t)atoi(argv[1]) : 32768;
    bench_codes(argc > 2 ? argv[2] : NULL);
    bench_speed(tokens, 12345);
    bench_latent(tokens, 12346);
    return 0;
}
