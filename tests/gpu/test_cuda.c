// The CUDA backend on a GPU, against float64 over the pages it wrote and against the CPU backend.
// usage: test_cuda [latents] [quick|brief|many|fewer|shares]. Needs no library but CUDA; built by
// tests/gpu/run.sh, and for an emulated GPU by tests/emulator.
#include <cuda_runtime_api.h>
#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cuda/cuda.h"
#include "tests/gpu/gpu_fixture.h"
#include "tests/gpu/many_queries.h"
#include "tests/gpu/test_moved.h"
#include "tests/unit/kernel_long.h"
#include "tests/unit/kernel_nonfinite.h"

static struct kvd_backend *cuda, *cpu;
static int passed, failed;

static void result(bool ok, const char *name)
{
    if (getenv("KVD_TEST_SHOW"))
        printf("%s\n", name);
    ok ? passed++ : failed++;
    if (!ok)
        printf("FAILED %s\n", name);
}

// Says how a group of tests ended: of a run that is cut short, what it had done.
static void group_done(const char *name)
{
    static time_t began;
    began = began ? began : time(NULL);
    printf("%s: %d passed, %d failed so far, %ld s\n", name, passed, failed,
           (long)(time(NULL) - began));
}

// -- attention -----------------------------------------------------------------------------------

#include "tests/gpu/test_memory.h"
#include "tests/gpu/test_paged.h"
#include "tests/gpu/test_slices.h"
#include "tests/gpu/test_step.h"

static double worst_error, worst_row, worst_lse;

// Gives up the history's pages that no query of `a` sees, as a plane's window does.
static void free_behind(struct kseq *s, const struct attention *a)
{
    uint64_t first = s->length + 1 - a->q_len;
    first = a->window && first > a->window ? first - a->window : 0;
    for (uint32_t i = 0; i < s->n_codec && s->g.sink + (i + 1ull) * KVD_PAGE_TOKENS <= first; i++) {
        cudaFree((void *)(uintptr_t)s->at_codec[i]);
        s->at_codec[i] = 0;
    }
}

static struct kvd_codecs both(uint32_t codec)
{
    return kvd_codecs_both(codec);
}

// Whether the backend has kernels for codecs; else it says that it has none.
static bool served(struct kvd_codecs codec)
{
    struct kvd_plane g = test_plane(1, 1, 1, 64, 64, codec.k, 0, 0);
    struct kvd_error err = {0};
    g.codec = codec;
    return cuda->ops->plane_check(cuda, &g, &err) == KVD_OK;
}

#include "tests/gpu/test_transforms.h"

static void check_transformed(const struct shape *c, struct kvd_codecs codec, double stretch,
                              double limit, uint64_t seed)
{
    if (!served(codec))
        return;
    struct kseq s;
    struct kvd_plane g =
        test_plane_of(c->layers, c->kv_heads, c->group, c->dk, c->dv, codec, c->sink, c->recent);
    kseq_init(&s, g, c->length + 64, c->heads_rot, 0.96f, 0.92f, seed);
    kseq_fill(&s);
    skew(&s, stretch);
    to_device(&s);
    struct kvd_rotation *rot = grow(&s, cuda, c->length, seed);
    fetch_pages(&s);
    free_behind(&s, &c->a);
    struct kvd_rotation *used = kvd_codecs_rotated(codec) ? rot : NULL; // bf16 sessions have none
    struct attention_errors e = attention_error(&s, cuda, used, &c->a);
    char name[300], text[KVD_CODECS_TEXT];
    snprintf(name, sizeof(name),
             "attention %s stretch %g kv %u group %u dims %u %u sink %u recent %u rotations %u "
             "length %u q %u new %u window %u cap %g: error %.2e (worst row %.2e), lse %.2e "
             "(of what it may be: %.2f, all rows %.2f)",
             kvd_codecs_name(codec, text), stretch, c->kv_heads, c->group, c->dk, c->dv, c->sink,
             c->recent, c->heads_rot, c->length, c->a.q_len, c->a.new_tokens, c->a.window,
             (double)c->a.softcap, e.overall, e.worst, e.lse, e.lse_part, e.lse_all);
    result(e.overall < limit && e.worst < fmax(4e-3, 2 * limit) && e.lse_part < 1 &&
               e.lse_all < 1.5,
           name);
    worst_error = fmax(worst_error, e.overall);
    worst_row = fmax(worst_row, e.worst);
    worst_lse = fmax(worst_lse, e.lse);
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
}

static void check_shape(const struct shape *c, struct kvd_codecs codec, double limit, uint64_t seed)
{
    check_transformed(c, codec, 0, limit, seed);
}

// Inverses that are no transposes, means, deviations and bits: at every kind of shape, where
// products cancel as no fit's do; the worst condition that a fit was seen to have, and the last
// that is taken (KVD_TC_MAX_LOSS).
static void transformed(uint64_t seed, uint32_t longest)
{
    worst_error = worst_row = worst_lse = 0;
    for (size_t j = 0; j < KVD_LEN(attention_shapes); j++) {
        struct shape c = attention_shapes[j];
        c.heads_rot = KVD_MAX(c.heads_rot, 1u);
        if (c.length <= longest && kvd_head_dims_ok(c.dk, c.dv))
            check_transformed(&c, both((seed + j) % 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5), 8, 4e-3,
                              seed + j);
    }
    for (uint32_t j = 0; j < 8; j++) {
        uint32_t dim = j % 2 && kvd_head_dims_ok(128, 128) ? 128 : 64;
        struct shape c = {1, 2, 3, dim, dim, 64, 64, 2, 320 + j, {.q_len = 1}};
        check_transformed(&c, both(j % 4 < 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5), j < 4 ? 412 : 9000,
                          1e-3, seed + j);
    }
    printf("transforms: worst relative L2 %.2e (of a row %.2e), worst log-sum-exp %.2e\n",
           worst_error, worst_row, worst_lse);
}

static void shapes(uint64_t seed, bool quick)
{
    for (size_t j = 0; j < KVD_LEN(attention_shapes); j++) {
        bool all = !quick || attention_shapes[j].length < 600;
        for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
            bool bf16 = codec == KVD_CODEC_BF16, main_one = bf16 || codec == KVD_CODEC_INT2;
            if (main_one || (all && (!quick || codec % 3 == j % 3)))
                check_shape(&attention_shapes[j], both(codec), bf16 ? 5e-4 : 2e-3, seed + j);
        }
    }
}

static void groups_and_dims(uint64_t seed)
{
    for (uint32_t group = 1; group <= 16; group++)
        for (size_t i = 0; i < KVD_LEN(head_dims); i++) {
            struct shape c = {1,  2,  group, head_dims[i][0], head_dims[i][1],
                              16, 16, 1,     170 + group,     {.q_len = 1}};
            check_shape(&c, both(KVD_CODEC_INT2), 2e-3, seed + group * 16 + i);
            check_shape(&c, both((group + (uint32_t)i) % KVD_CODEC_COUNT), 2e-3,
                        seed + group * 16 + i);
        }
}

// Decode as in serving: 100 random problems.
static void accuracy(uint64_t seed)
{
    worst_error = worst_row = worst_lse = 0;
    for (uint32_t i = 0; i < 100; i++) {
        struct shape c = {1,           8,   (const uint32_t[]){1, 2, 4, 5, 6, 8, 12, 16}[i % 8],
                          128,         128, 64,
                          256,         1,   330 + (uint32_t)(kvd_rand(&seed) % 3000),
                          {.q_len = 1}};
        check_shape(&c, both(KVD_CODEC_INT2), 2e-3, kvd_rand(&seed));
    }
    printf("100 decode problems, f32 q and o: worst relative L2 %.2e (of a row %.2e), worst "
           "log-sum-exp %.2e\n",
           worst_error, worst_row, worst_lse);
}

static void *copy_of(const void *from, uint64_t bytes)
{
    void *to;
    need(cudaMalloc(&to, bytes), "memory");
    if (from)
        upload(to, from, bytes);
    return to;
}

// A long sequence, alone and, with `many`, 272 times in one call. Returns the larger error.
static double check_long(struct kvd_codecs codec, uint32_t dim, uint64_t tokens, struct attention a,
                         bool many, uint64_t seed)
{
    struct long_seq s;
    long_init(&s, codec, 6, dim, tokens, seed);
    struct long_truth *x = long_truth(&s, a);
    uint8_t *pages = copy_of(s.pages, s.bytes);
    for (uint64_t i = 0; i < s.n_pages; i++)
        s.table[i] = (uint64_t)(uintptr_t)pages + i * kvd_page_bytes(&s.g, s.g.codec);
    struct kvd_rotation_data none = {.n_layers = 1, .heads = 1, .dim_k = dim, .dim_v = dim};
    struct kvd_rotation *rot = cuda->ops->rotation_new(cuda, &none, NULL);
    double worst = 0;
    for (uint32_t copies = 1; copies <= (many ? 272 : 1); copies += 271) {
        struct attention_errors e =
            long_error(&s, x, cuda, kvd_codecs_rotated(codec) ? rot : NULL, copies);
        char name[200], text[KVD_CODECS_TEXT];
        snprintf(name, sizeof(name),
                 "long: %s dim %u, %u x %llu tokens, q %u window %u cap %g: error %.2e (worst "
                 "row %.2e), lse %.2e",
                 kvd_codecs_name(codec, text), dim, copies, (unsigned long long)tokens, a.q_len,
                 a.window, (double)a.softcap, e.overall, e.worst, e.lse);
        printf("%s\n", name);
        result(e.overall < 1e-3 && e.lse < 1e-3, name);
        worst = fmax(worst, e.overall);
    }
    cuda->ops->rotation_free(cuda, &rot);
    cudaFree(pages);
    free(x);
    long_deinit(&s);
    return worst;
}

// What rounding does to a sum must not grow with its tokens, neither where a sequence is cut into
// parts nor where there are so many that it is not.
static void long_sequences(uint64_t seed)
{
    const struct attention one = {.q_len = 1};
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
        if (!served(both(codec)))
            continue;
        bool levels = codec == KVD_CODEC_BF16 || kvd_codec_signed(codec);
        double small = check_long(both(codec), 64, 32768, one, true, seed);
        double large = check_long(both(codec), 64, levels ? 300000 : 2000000, one, true, seed);
        result(large < fmax(1.25 * small, 6e-4), "errors do not grow with the length");
    }
    check_long(both(KVD_CODEC_INT2_LM), 64, 2000000, one, true, seed);
    check_long(both(KVD_CODEC_TURBOQUANT_2), 64, 2000000, one, true, seed);
    check_long(both(KVD_CODEC_INT2), 64, 1200000, (struct attention){.q_len = 3}, false, seed);
    check_long(both(KVD_CODEC_INT2C), 128, 1200000, one, false, seed);
    check_long(both(KVD_CODEC_INT2), 256, 1200000, one, false, seed);
    check_long(both(KVD_CODEC_INT2), 80, 1200000, one, true, seed);
    check_long(both(KVD_CODEC_INT2C), 112, 600000, one, false, seed);
    check_long(both(KVD_CODEC_INT2), 192, 600000, one, false, seed);
    check_long(both(KVD_CODEC_INT2), 64, 1200000,
               (struct attention){.q_len = 2, .window = 1000001, .softcap = 30}, false, seed);
}

// Queries that are not finite, in cases from the `first` on.
static void nonfinite(size_t first, uint64_t seed)
{
    for (size_t i = first; i < KVD_LEN(nonfinite_cases); i++) {
        const struct nonfinite_case *c = &nonfinite_cases[i];
        struct kseq s;
        kseq_init(&s, nonfinite_plane(c), c->length + 64, 1, 0.96f, 0.92f, seed + i);
        kseq_fill(&s);
        to_device(&s);
        struct kvd_rotation *rot = grow(&s, cuda, c->length, seed);
        int row = nonfinite_check(&s, c, cuda, kvd_codecs_rotated(c->codec) ? rot : NULL);
        char name[100];
        snprintf(name, sizeof(name), "queries that are not finite, case %zu: row %d", i, row);
        result(row < 0, name);
        cuda->ops->rotation_free(cuda, &rot);
        deinit(&s);
    }
}

// A ragged batch in one call gives what single calls give.
static void ragged_of(uint64_t seed, struct kvd_codecs codec, uint32_t group, uint32_t dim,
                      uint32_t q_len)
{
    enum { N = 10 };
    const uint32_t lengths[N] = {1, 63, 64, 65, 320, 337, 400, 1000, 3000, 5555};
    struct kseq s[N];
    struct kvd_rotation *rot = NULL;
    struct kvd_attend_item items[N];
    struct kvd_plane g = test_plane_of(2, 2, group, dim, dim, codec, 64, 256);
    uint64_t row = (uint64_t)2 * q_len * g.q_heads * dim;
    float *q = malloc(N * row * 4), *o = malloc(2 * N * row * 4);
    for (uint32_t i = 0; i < N; i++) {
        kseq_init(&s[i], g, lengths[i] + q_len + 63, 1, 0.96f, 0.92f, seed); // one set of rotations
        s[i].rng += i;
        kseq_fill(&s[i]);
        to_device(&s[i]);
        if (rot)
            cuda->ops->rotation_free(cuda, &rot);
        rot = grow(&s[i], cuda, lengths[i] + q_len - 1, seed + i);
        for (uint64_t j = 0; j < row; j++)
            q[i * row + j] = (float)kseq_normal(&s[i].rng);
        items[i] = (struct kvd_attend_item){
            .pages = {s[i].at_bf16, s[i].at_codec},
            .length = s[i].length,
            .hist_end = s[i].hist_end,
            .q_len = q_len,
            .q = kseq_tensor(q + i * row, KVD_DTYPE_F32, q_len, g.q_heads, dim, 0),
            .o = kseq_tensor(o + i * row, KVD_DTYPE_F32, q_len, g.q_heads, dim, 0)};
    }
    struct kvd_attend_params p = {.plane = &g,
                                  .rotation = rot,
                                  .layer_count = 2,
                                  .scale = 0.1f,
                                  .items = items,
                                  .n_items = N};
    memset(o, 0xff, 2 * N * row * 4);
    bool ok = cuda->ops->attend(cuda, &p, NULL) == KVD_OK;
    double worst = 0;
    for (uint32_t i = 0; i < N; i++) {
        struct kvd_attend_item one = items[i];
        one.o.data = (uint8_t *)(o + (N + i) * row);
        p.items = &one;
        p.n_items = 1;
        ok &= cuda->ops->attend(cuda, &p, NULL) == KVD_OK;
        double d = 0, n = 0;
        for (uint64_t j = 0; j < row; j++) {
            double a = o[i * row + j], b = o[(N + i) * row + j];
            d += (a - b) * (a - b);
            n += b * b;
        }
        double e = sqrt(d / n);
        worst = e <= worst ? worst : e;
    }
    char name[120], text[KVD_CODECS_TEXT];
    snprintf(name, sizeof(name),
             "ragged %s group %u dim %u q %u: batch differs from single by %.2e",
             kvd_codecs_name(codec, text), group, dim, q_len, worst);
    result(ok && worst < (q_len > 1 ? 2e-3 : 1e-3), name); // other kernels may take short ones
    cuda->ops->rotation_free(cuda, &rot);
    for (uint32_t i = 0; i < N; i++)
        deinit(&s[i]);
    free(q);
    free(o);
}

static void ragged(uint64_t seed, struct kvd_codecs codec, uint32_t group, uint32_t dim)
{
    ragged_of(seed, codec, group, dim, 1);
}

#include "tests/gpu/test_chain.h"
#include "tests/gpu/test_shares.h"

// -- pages ---------------------------------------------------------------------------------------

static uint64_t bytes_compared, bytes_different;

// The same tokens through both backends, with K's scales of a kind and V's of the next: the pages
// must be the same bytes, but for codes within rounding of a boundary.
static void pages_of_heads(uint32_t kv_heads, enum kvd_scale kind, uint32_t dk, uint32_t dv,
                           uint32_t heads_rot, struct kvd_codecs codec, float clip, bool ties,
                           double stretch, uint64_t seed)
{
    struct kvd_plane g = test_plane_of(2, kv_heads, 1, dk, dv, codec, 64, 64);
    struct kseq s[2];
    float gains[4] = {0.95f, 1, 1.1f, 0.9f}; // one a matrix; sets have as many
    for (int i = 0; i < 2; i++) {
        kseq_init(&s[i], g, 1000, heads_rot, clip, clip < 1 ? clip - 0.04f : 1, seed);
        if (clip < 1)
            s[i].rot.gain_k = s[i].rot.gain_v = gains;
        s[i].rot.scale_k = kind;
        s[i].rot.scale_v = (enum kvd_scale)((kind + 1) % KVD_SCALE_COUNT);
        kseq_fill(&s[i]);
        skew(&s[i], stretch);
        for (uint64_t j = 0; ties && j < 2 * 1000 * kv_heads * dk; j++) // few values, constant rows
            s[i].k[j] = kvd_f32_to_bf16((float)(j / dk % 5 == 0 ? 3 : (int)(j * 7 % 5) - 2));
        for (uint32_t j = 0; j < s[i].n_codec; j++)
            memset((void *)(uintptr_t)s[i].codec[j], 0, kvd_page_bytes(&g, g.codec));
        for (uint32_t j = 0; j < s[i].n_bf16; j++)
            memset((void *)(uintptr_t)s[i].bf16[j], 0, kvd_page_bytes(&g, kvd_window_codec()));
    }
    to_device(&s[1]);
    for (uint32_t j = 0; j < s[1].n_codec; j++)
        device_fill((void *)(uintptr_t)s[1].at_codec[j], 0, kvd_page_bytes(&g, g.codec));
    for (uint32_t j = 0; j < s[1].n_bf16; j++)
        device_fill((void *)(uintptr_t)s[1].at_bf16[j], 0, kvd_page_bytes(&g, kvd_window_codec()));
    struct kvd_rotation *a = grow(&s[0], cpu, 1000, seed), *b = grow(&s[1], cuda, 1000, seed);
    fetch_pages(&s[1]);
    uint64_t differ = 0, all = 0;
    for (uint32_t j = 0; j < s[0].n_codec; j++)
        for (uint64_t k = 0; k < kvd_page_bytes(&g, g.codec); k++, all++)
            differ += ((uint8_t *)(uintptr_t)s[0].codec[j])[k] !=
                      ((uint8_t *)(uintptr_t)s[1].codec[j])[k];
    bool windows = true;
    for (uint32_t j = 0; j < s[0].n_bf16; j++)
        windows &= memcmp((void *)(uintptr_t)s[0].bf16[j], (void *)(uintptr_t)s[1].bf16[j],
                          kvd_page_bytes(&g, kvd_window_codec())) == 0;
    bytes_compared += all;
    bytes_different += differ;
    char name[240], text[KVD_CODECS_TEXT];
    snprintf(name, sizeof(name),
             "pages of %u heads, dims %u %u rotations %u %s stretch %g scales %d clip %g%s: %llu "
             "of %llu bytes differ, windows %s",
             kv_heads, dk, dv, heads_rot, kvd_codecs_name(codec, text), stretch, (int)kind,
             (double)clip, ties ? " ties" : "", (unsigned long long)differ, (unsigned long long)all,
             windows ? "equal" : "DIFFER");
    // Codes within fp32 rounding of a boundary may differ, and with the rotation's sums scales may
    // round to another fp16. What a rotation makes of a row of equal values is 0 but for rounding,
    // so that any code of either sign is right.
    uint64_t most = all / (heads_rot == 0 ? 5000 : ties ? 250 : 1000);
    result(windows && differ <= most, name);
    // What one wrote the other reads: the GPU's pages by the CPU.
    if (kvd_codecs_rotated(codec)) {
        struct attention at = {.q_len = 1};
        uint64_t *mine = s[1].at_codec, *windows_at = s[1].at_bf16;
        s[1].at_codec = s[1].codec;
        s[1].at_bf16 = s[1].bf16;
        result(attention_error(&s[1], cpu, a, &at).worst < 2e-4,
               "the CPU backend reads the GPU's pages");
        s[1].at_codec = mine;
        s[1].at_bf16 = windows_at;
    }
    cpu->ops->rotation_free(cpu, &a);
    cuda->ops->rotation_free(cuda, &b);
    deinit(&s[0]);
    deinit(&s[1]);
}

static void same_pages(enum kvd_scale kind, uint32_t dk, uint32_t dv, uint32_t heads_rot,
                       struct kvd_codecs codec, float clip, bool ties, double stretch,
                       uint64_t seed)
{
    pages_of_heads(2, kind, dk, dv, heads_rot, codec, clip, ties, stretch, seed);
}

// Reading gives the truth; to bf16 and f32, whole and in part.
static void reading(uint32_t dk, uint32_t dv, uint32_t heads_rot, struct kvd_codecs codec,
                    enum kvd_dtype dtype, double stretch, uint64_t seed)
{
    struct kvd_plane g = test_plane_of(2, 2, 1, dk, dv, codec, 64, 64);
    struct kseq s;
    kseq_init(&s, g, 800, heads_rot, 0.96f, 0.92f, seed);
    kseq_fill(&s);
    skew(&s, stretch);
    to_device(&s);
    struct kvd_rotation *rot = grow(&s, cuda, 777, seed);
    fetch_pages(&s);
    const uint32_t ranges[][2] = {{0, 777}, {3, 64}, {70, 300}, {699, 78}, {80, 16}};
    double worst = 0;
    bool ok = true;
    for (size_t i = 0; i < KVD_LEN(ranges); i++) {
        uint32_t n = ranges[i][1];
        uint8_t *k = malloc(2ull * n * 2 * dk * 4), *v = malloc(2ull * n * 2 * dv * 4);
        memset(k, 0xff, 2ull * n * 2 * dk * 4);
        memset(v, 0xff, 2ull * n * 2 * dv * 4);
        struct kvd_read_params p = {.plane = &g,
                                    .rotation = rot,
                                    .layer_count = 2,
                                    .pages = {s.at_bf16, s.at_codec},
                                    .length = s.length,
                                    .hist_end = s.hist_end,
                                    .begin = ranges[i][0],
                                    .tokens = n,
                                    .k = kseq_tensor(k, dtype, n, 2, dk, 0),
                                    .v = kseq_tensor(v, dtype, n, 2, dv, 0)};
        ok &= cuda->ops->read(cuda, &p, NULL) == KVD_OK;
        for (uint64_t row = 0; row < 2ull * n * 2 * 2; row++) {
            bool side = row % 2;
            uint32_t head = row / 2 % 2, t = row / 4 % n, layer = (uint32_t)(row / 4 / n);
            uint32_t dim = side ? dv : dk;
            double want[KVD_MAX_HEAD_DIM];
            float got[KVD_MAX_HEAD_DIM];
            kseq_truth(&s, ranges[i][0] + t, layer, head, side, want);
            const uint8_t *at = (side ? v : k) + ((uint64_t)(layer * n + t) * 2 + head) * dim *
                                                     (dtype == KVD_DTYPE_F32 ? 4 : 2);
            for (uint32_t c = 0; c < dim; c++)
                got[c] = dtype == KVD_DTYPE_F32
                             ? ((const float *)(const void *)at)[c]
                             : kvd_bf16_to_f32(((const uint16_t *)(const void *)at)[c]);
            double e = kseq_rel(want, got, dim);
            worst = e <= worst ? worst : e;
        }
        free(k);
        free(v);
    }
    char name[150], text[KVD_CODECS_TEXT];
    snprintf(name, sizeof(name), "read dims %u %u rotations %u %s stretch %g %s: error %.2e", dk,
             dv, heads_rot, kvd_codecs_name(codec, text), stretch,
             dtype == KVD_DTYPE_F32 ? "f32" : "bf16", worst);
    result(ok && worst < (dtype == KVD_DTYPE_F32 ? 1e-3 : 4e-3), name);
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
}

static void rotating(uint32_t dim, uint32_t heads_rot, bool inverse, enum kvd_rotate which,
                     double stretch, uint64_t seed)
{
    struct kvd_plane g = test_plane(3, 2, 2, dim, dim, KVD_CODEC_INT2, 64, 64);
    struct kseq s;
    kseq_init(&s, g, 64, heads_rot, 1, 1, seed);
    skew(&s, stretch);
    struct kvd_rotation *a = cpu->ops->rotation_new(cpu, &s.rot, NULL);
    struct kvd_rotation *b = cuda->ops->rotation_new(cuda, &s.rot, NULL);
    uint64_t n = 2ull * 33 * 4 * dim;
    float *x = malloc(n * 4), *y = malloc(n * 4), *z = malloc(n * 4);
    for (uint64_t i = 0; i < n; i++)
        x[i] = (float)kseq_normal(&s.rng);
    struct kvd_rotate_params p = {.rotation = a,
                                  .which = which,
                                  .inverse = inverse,
                                  .layer_begin = 1,
                                  .layer_count = 2,
                                  .rows = 33,
                                  .heads = 4,
                                  .kv_heads = 2,
                                  .x = kseq_tensor(x, KVD_DTYPE_F32, 33, 4, dim, 0),
                                  .y = kseq_tensor(y, KVD_DTYPE_F32, 33, 4, dim, 0)};
    bool ok = cpu->ops->rotate(cpu, &p, NULL) == KVD_OK;
    p.rotation = b;
    p.y.data = (uint8_t *)z;
    ok &= cuda->ops->rotate(cuda, &p, NULL) == KVD_OK;
    double d = 0, w = 0;
    for (uint64_t i = 0; i < n; i++) {
        d += ((double)y[i] - z[i]) * ((double)y[i] - z[i]);
        w += (double)y[i] * y[i];
    }
    char name[80];
    snprintf(name, sizeof(name), "rotate %d dim %u rotations %u stretch %g: %.2e", (int)which, dim,
             heads_rot, stretch, sqrt(d / w));
    result(ok && sqrt(d / w) < 1e-6, name);
    cpu->ops->rotation_free(cpu, &a);
    cuda->ops->rotation_free(cuda, &b);
    kseq_deinit(&s);
    free(x);
    free(y);
    free(z);
}

// Pages, reading and rotations at all codecs and head_dims; each codec at a third of these where it
// is to be quick.
static void pages(uint64_t seed, bool quick)
{
    for (uint32_t codec = 0, i = 0; codec < KVD_CODEC_COUNT; codec++)
        for (size_t d = 0; d < KVD_LEN(head_dims) && codec != KVD_CODEC_BF16; d++, i++) {
            if (!served(both(codec)) || (quick && d % 3 != codec % 3))
                continue;
            uint32_t dk = head_dims[d][0], dv = head_dims[d][1];
            for (int kind = 0; kind < KVD_SCALE_COUNT; kind++)
                if (kind == (int)(i % KVD_SCALE_COUNT) || (dk == dv && !quick))
                    same_pages(kind, dk, dv, i % 3, both(codec), 0.96f, false, 0, seed + i);
            reading(dk, dv, i % 3, both(codec), KVD_DTYPE_F32, 0, seed + i);
            reading(dk, dv, 2 - i % 3, both(codec), KVD_DTYPE_BF16, 0, seed + i);
        }
    for (int i = 0; i < 2; i++) {
        uint32_t dim = i ? 128 : 80;
        same_pages(0, dim, dim, 1, both(KVD_CODEC_INT2), 1, false, 0, seed);
        same_pages(0, dim, dim, 1, both(KVD_CODEC_INT2), 0.6f, false, 0, seed);
        for (int kind = 0; kind < KVD_SCALE_COUNT; kind++)
            same_pages(kind, dim, i ? 64 : 80, 0, both(KVD_CODEC_INT2), 0.96f, true, 0, seed);
    }
    same_pages(0, 112, 112, 1, both(KVD_CODEC_BF16), 1, false, 0, seed);
    same_pages(0, 128, 64, 1, both(KVD_CODEC_BF16), 1, false, 0, seed);
    reading(80, 80, 0, both(KVD_CODEC_BF16), KVD_DTYPE_BF16, 0, seed);
    reading(128, 64, 0, both(KVD_CODEC_BF16), KVD_DTYPE_BF16, 0, seed);
    for (uint32_t i = 0; i < 2 * KVD_LEN(head_dims); i++)
        rotating(head_dims[i / 2][0], i % 3, i % 2, i % 2 ? KVD_ROTATE_VALUES : KVD_ROTATE_QUERIES,
                 0, seed + i);
}

// The same of transforms.
static void transformed_pages(uint64_t seed, bool quick)
{
    for (uint32_t i = 0; i < 2 * KVD_LEN(head_dims); i++) {
        if (quick && i / 2 % 2 != i % 2)
            continue;
        uint32_t codec = i % 2 ? KVD_CODEC_TC2 : KVD_CODEC_TC2_5;
        uint32_t dk = head_dims[i / 2][0], dv = head_dims[i / 2][1];
        same_pages(0, dk, dv, 1 + i % 2, both(codec), 1, false, 8, seed + i);
        reading(dk, dv, 1 + i % 2, both(codec), KVD_DTYPE_F32, 8, seed + i);
        reading(dk, dv, 1 + i % 2, both(codec), KVD_DTYPE_BF16, 412, seed + i);
        rotating(dk, 1, i % 2, (enum kvd_rotate)(i / 2 % KVD_ROTATE_COUNT), 8, seed + i);
    }
    for (uint32_t i = 0; i < 2 * KVD_ROTATE_COUNT; i++)
        rotating(64, 2, i % 2, (enum kvd_rotate)(i / 2), 20, seed + i);
    same_pages(0, 64, 128, 0, both(KVD_CODEC_TC2), 1, true, 0, seed);
    same_pages(0, 64, 64, 1, both(KVD_CODEC_TC2_5), 1, false, 412, seed);
}

#include "tests/gpu/test_any.h"
#include "tests/gpu/test_append.h"
#include "tests/gpu/test_latent.h"
#include "tests/gpu/test_many.h"

// Of everything a little: where a GPU is emulated.
static void brief(uint64_t seed)
{
    uint32_t codecs[] = {KVD_CODEC_INT2,        KVD_CODEC_INT2C,        KVD_CODEC_INT4,
                         KVD_CODEC_INT2_LM,     KVD_CODEC_TURBOQUANT_3, KVD_CODEC_TURBOQUANT_2,
                         KVD_CODEC_TURBOQUANT_4};
    for (uint32_t i = 0; i < 8; i++) {
        const uint32_t *dims = head_dims[(seed + i) % KVD_LEN(head_dims)];
        same_pages(i % KVD_SCALE_COUNT, dims[0], dims[1], i % 2, both(codecs[i % KVD_LEN(codecs)]),
                   0.96f, false, 0, seed + i);
        if (i % 2 == 0)
            reading(dims[0], dims[1], i % 3, both(codecs[i / 2]),
                    i & 1 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16, 0, seed + i);
    }
    for (uint32_t j = 0; j < KVD_LEN(attention_shapes); j++)
        if (attention_shapes[j].length < 600 &&
            kvd_head_dims_ok(attention_shapes[j].dk, attention_shapes[j].dv))
            check_shape(&attention_shapes[j],
                        both(j % 6 ? codecs[(seed + j) % KVD_LEN(codecs)] : KVD_CODEC_BF16), 2e-3,
                        seed + j);
    for (int i = 0; i < 3; i++) {
        struct shape c = {1, 1, 4, 64, 64, 0, 64, 1, 900, {.q_len = 3, .window = 200}};
        uint32_t windowed[] = {KVD_CODEC_BF16, KVD_CODEC_INT2, KVD_CODEC_INT4};
        check_shape(&c, both(windowed[i]), 2e-3, seed);
    }
    struct shape one = {1, 2, 3, 64, 64, 16, 16, 1, 330, {.q_len = 1}};
    check_shape(&one, both(KVD_CODEC_INT4), 2e-3, seed);
    rotating(80, 1, false, KVD_ROTATE_QUERIES, 0, seed);
    rotating(64, 2, true, KVD_ROTATE_VALUES, 0, seed);
    latents_brief(seed);
    many_rows(seed);
    refused_transforms(seed);
    views_of_keys(seed);
    for (uint32_t codec = KVD_CODEC_TC2; codec <= KVD_CODEC_TC2_5; codec++) {
        same_pages(0, 64, 64, 1, both(codec), 1, false, 0, seed);
        reading(80, 80, 2, both(codec), KVD_DTYPE_F32, 0, seed);
    }
    transformed_pages(seed, true);
    transformed(seed, 700);
    any_pages(seed, 4);
    any_shapes(seed, 410, 1);
    any_transforms(seed);
    values_of_size(2048, seed);
    chain(1, 1500, both(KVD_CODEC_INT4), seed);
    shares(seed, both(KVD_CODEC_INT2), 1);
    shares_of(5, 700, both(KVD_CODEC_TC2), seed);
    if (kvd_head_dims_ok(128, 128)) {
        nonfinite(0, seed);
        chain(1, 3000, both(KVD_CODEC_INT2), seed);
        ragged(seed, any_codecs(seed), 12, 64);
    } else {
        nonfinite(KVD_LEN(nonfinite_cases) - 4, seed);
    }
}

static void long_and_many(uint64_t seed)
{
    // Blocks of 16, 8 and 4 warps; no tiles, first ones, or second ones, too, are asked for
    // early.
    chain(1, 20000, both(KVD_CODEC_INT2), seed);
    chain(1, 60000, both(KVD_CODEC_INT2C), seed);
    chain(3, 30000, both(KVD_CODEC_INT2), seed);
    chain(32, 4000, both(KVD_CODEC_INT2), seed);
    chain(32, 20000, both(KVD_CODEC_INT2), seed);
    chain(17, 20000, both(KVD_CODEC_INT2), seed);
    chain(25, 9000, both(KVD_CODEC_TC2), seed);
    chain(150, 2500, both(KVD_CODEC_INT2), seed);
    ragged(seed, both(KVD_CODEC_INT2), 12, 128);
    ragged(seed, both(KVD_CODEC_INT2), 7, 64);
    ragged(seed, both(KVD_CODEC_INT2), 3, 256);
    ragged(seed, both(KVD_CODEC_INT2), 4, 80);
    ragged(seed, both(KVD_CODEC_INT2C), 12, 96);
    ragged(seed, both(KVD_CODEC_INT2), 3, 112);
    ragged(seed, both(KVD_CODEC_INT2), 4, 192);
    ragged(seed, both(KVD_CODEC_INT4), 12, 128);
    chain(3, 30000, both(KVD_CODEC_INT4), seed);
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        if (kvd_codec_signed(codec))
            ragged(seed, both(codec), 5, 128);
    for (int i = 0; i < 4; i++) {
        uint32_t codec = i & 1 ? KVD_CODEC_INT2 : KVD_CODEC_BF16;
        double e = many_queries(cuda, cpu, codec, i & 2, seed);
        char name[100];
        snprintf(name, sizeof(name), "%d queries%s, codec %u: error of a row %.2e", MANY_QUERIES,
                 i & 2 ? " of a step" : "", codec, e);
        printf("%s\n", name);
        result(e < 2e-3, name);
    }
    groups_and_dims(seed);
    accuracy(seed);
    long_sequences(seed);
    any_long(seed);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0); // what was reached shows even if a kernel hangs
    bool latents = argc > 1 && strcmp(argv[1], "latents") == 0; // these alone
    const char *how = argc > 1 + latents ? argv[1 + latents] : "";
    bool quick = strcmp(how, "quick") == 0; // under a sanitizer
    struct kvd_error err = {0};
    cuda = kvd_cuda_backend_new(0, &err);
    if (!cuda) {
        printf("skipped: %s\n", err.text);
        return 77;
    }
    cpu = kvd_cpu_backend_new(0, NULL, &err);
    printf("%s; %s\n", cuda->ops->device(cuda), cpu->ops->device(cpu));
    uint64_t seed = kvd_test_seed("cuda");
    if (!latents) {
        memory();
        paged(seed);
        slices(seed);
        steps_in_one_go(seed);
    }
    moved_begin(cuda, seed);
    many_heads(seed);
    if (latents && strcmp(how, "brief") == 0) {
        latents_brief(seed);
    } else if (latents) {
        latents_in_all(seed, quick);
    } else if (strcmp(how, "many") == 0) {
        many_rows(seed);
    } else if (strcmp(how, "fewer") == 0) {
        fewer_rows(seed);
    } else if (strcmp(how, "shares") == 0) {
        all_shares(seed, 2);
    } else if (strcmp(how, "brief") == 0) {
        brief(seed);
    } else {
        refused_transforms(seed);
        views_of_keys(seed);
        group_done("memory, blocks, slices and refusals");
        transformed_pages(seed, quick);
        group_done("pages of transforms");
        transformed(seed, quick ? 600 : 20000);
        group_done("attention with transforms");
        pages(seed, quick);
        group_done("pages");
        shapes(seed, quick);
        group_done("attention");
        many_rows(seed);
        nonfinite(0, seed);
        ragged(seed, both(KVD_CODEC_INT2), 4, 128);
        ragged(seed, both(KVD_CODEC_INT2C), 12, 128);
        ragged(seed, both(KVD_CODEC_TC2), 4, 128);
        chain(1, 3000, both(KVD_CODEC_INT2), seed);
        chain(5, 2000, both(KVD_CODEC_INT2_LM), seed);
        chain(5, 2000, both(KVD_CODEC_TC2), seed);
        chain(1, 9000, both(KVD_CODEC_TC2_5), seed);
        all_shares(seed, quick ? 2 : 20);
        group_done("batches, graphs, queries that are not finite");
        any_codecs_in_all(seed, quick);
        group_done("int4 and pairs of codecs");
        latents_in_all(seed, quick);
        group_done("latents");
        if (!quick)
            long_and_many(seed);
    }
    printf("pages of both backends: %llu of %llu bytes differ\n",
           (unsigned long long)bytes_different, (unsigned long long)bytes_compared);
    printf("tensors in the GPU's memory: %u inputs, %u outputs\n", moved_count[0], moved_count[1]);
    kvd_backend_free(&cuda);
    kvd_backend_free(&cpu);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
