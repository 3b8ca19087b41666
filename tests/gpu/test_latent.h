// Part of test_cuda.c: latent planes (MLA). Pages are compared with those of the CPU backend,
// attention with float64.
#ifndef KVD_TESTS_GPU_TEST_LATENT_H
#define KVD_TESTS_GPU_TEST_LATENT_H

#include "tests/unit/kernel_latent.h"

// Whether the backend serves latents; else it says why not.
static bool latents_served(void)
{
    struct kvd_plane g = latent_plane(1, 128, KVD_CODEC_INT2, 0, 0);
    struct kvd_error err = {0};
    bool ok = cuda->ops->plane_check(cuda, &g, &err) == KVD_OK;
    if (!ok) {
        printf("%s\n", err.text);
        result(strstr(err.text, "latent planes (MLA)") != NULL, "latents are refused by name");
    }
    return ok;
}

static void refused_latent_transforms(void)
{
    static float inverse[LATENT * LATENT];
    struct kvd_rotation_data d = {
        .n_layers = 1, .heads = 1, .dim_k = ROPE, .dim_v = LATENT, .v_inverse = inverse};
    struct kvd_error err = {0};
    result(!cuda->ops->rotation_new(cuda, &d, &err) && err.code == KVD_E_UNSUPPORTED &&
               strstr(err.text, "transforms of latents"),
           "transforms of latents are refused by name");
}

static void zero_pages(const struct kseq *s, uint64_t *codec, uint64_t *bf16, bool device)
{
    for (uint32_t j = 0; j < s->n_codec + s->n_bf16; j++) {
        bool coded = j < s->n_codec;
        void *at = (void *)(uintptr_t)(coded ? codec[j] : bf16[j - s->n_codec]);
        uint64_t bytes = kvd_page_bytes(&s->g, coded ? s->g.codec : kvd_window_codec());
        if (device)
            device_fill(at, 0, bytes);
        else
            memset(at, 0, bytes);
    }
}

// The same tokens through both backends: the same bytes, but for codes within rounding of a
// boundary, and the CPU backend reads what the GPU wrote.
static void latent_pages(uint32_t codec, enum kvd_scale kind, float clip, uint32_t layers,
                         uint32_t length, uint64_t seed)
{
    struct kvd_plane g = latent_plane(layers, 16, codec, 48, 64);
    struct kseq s[2];
    float gains[4] = {0.95f, 1.1f, 1, 0.9f};
    for (int i = 0; i < 2; i++) {
        latent_init(&s[i], g, length + 64, false, seed);
        for (uint32_t l = 0; l < layers; l++)
            s[i].clip[layers + l] = clip;
        s[i].rot.gain_v = clip < 1 ? gains : NULL;
        s[i].rot.scale_v = kind;
        zero_pages(&s[i], s[i].codec, s[i].bf16, false);
    }
    to_device(&s[1]);
    zero_pages(&s[1], s[1].at_codec, s[1].at_bf16, true);
    struct kvd_rotation *a = grow(&s[0], cpu, length, seed), *b = grow(&s[1], cuda, length, seed);
    fetch_pages(&s[1]);
    uint64_t differ = 0, all = 0;
    bool windows = true;
    for (uint32_t j = 0; j < s[0].n_codec; j++)
        for (uint64_t k = 0; k < kvd_page_bytes(&g, g.codec); k++, all++)
            differ += ((uint8_t *)(uintptr_t)s[0].codec[j])[k] !=
                      ((uint8_t *)(uintptr_t)s[1].codec[j])[k];
    for (uint32_t j = 0; j < s[0].n_bf16; j++)
        windows &= memcmp((void *)(uintptr_t)s[0].bf16[j], (void *)(uintptr_t)s[1].bf16[j],
                          kvd_page_bytes(&g, kvd_window_codec())) == 0;
    bytes_compared += all;
    bytes_different += differ;
    char name[200];
    snprintf(name, sizeof(name),
             "latent pages %s scales %d clip %g layers %u: %llu of %llu bytes differ, windows %s",
             kvd_codec_name(codec), (int)kind, (double)clip, layers, (unsigned long long)differ,
             (unsigned long long)all, windows ? "equal" : "DIFFER");
    result(windows && differ <= all / 1000, name);
    struct attention at = {.q_len = 1};
    uint64_t *mine[2] = {s[1].at_codec, s[1].at_bf16};
    s[1].at_codec = s[1].codec, s[1].at_bf16 = s[1].bf16;
    result(attention_error(&s[1], cpu, a, &at).worst < 2e-4,
           "the CPU backend reads the GPU's latents");
    s[1].at_codec = mine[0], s[1].at_bf16 = mine[1];
    cpu->ops->rotation_free(cpu, &a);
    cuda->ops->rotation_free(cuda, &b);
    deinit(&s[0]);
    deinit(&s[1]);
}

static void latent_reading(uint32_t codec, enum kvd_dtype dtype, uint64_t seed)
{
    enum { LENGTH = 421 };
    struct kvd_plane g = latent_plane(2, 16, codec, 16, 64);
    struct kseq s;
    latent_init(&s, g, LENGTH + 64, false, seed);
    to_device(&s);
    struct kvd_rotation *rot = grow(&s, cuda, LENGTH, seed);
    fetch_pages(&s);
    const uint32_t ranges[][2] = {{0, LENGTH}, {70, 130}, {20, 16}};
    uint64_t size = dtype == KVD_DTYPE_F32 ? 4 : 2;
    double worst = 0;
    bool ok = true;
    for (size_t i = 0; i < KVD_LEN(ranges); i++) {
        uint32_t n = ranges[i][1];
        uint8_t *k = malloc(2 * n * ROPE * size), *v = malloc(2 * n * LATENT * size);
        memset(k, 0xff, 2 * n * ROPE * size);
        memset(v, 0xff, 2 * n * LATENT * size);
        struct kvd_read_params p = {.plane = &g,
                                    .rotation = rot,
                                    .layer_count = 2,
                                    .pages = {s.at_bf16, s.at_codec},
                                    .length = s.length,
                                    .hist_end = s.hist_end,
                                    .begin = ranges[i][0],
                                    .tokens = n,
                                    .k = kseq_tensor(k, dtype, n, 1, ROPE, 0),
                                    .v = kseq_tensor(v, dtype, n, 1, LATENT, 0)};
        ok &= cuda->ops->read(cuda, &p, NULL) == KVD_OK;
        for (uint32_t row = 0; row < 2 * n * 2; row++) {
            bool side = row % 2;
            uint32_t at = row / 2, dim = side ? LATENT : ROPE;
            double want[KVD_MAX_ROW];
            float got[KVD_MAX_ROW];
            kseq_truth(&s, ranges[i][0] + at % n, at / n, 0, side, want);
            const uint8_t *from = (side ? v : k) + at * dim * size;
            for (uint32_t c = 0; c < dim; c++)
                got[c] = dtype == KVD_DTYPE_F32
                             ? ((const float *)(const void *)from)[c]
                             : kvd_bf16_to_f32(((const uint16_t *)(const void *)from)[c]);
            double e = kseq_rel(want, got, dim);
            worst = e <= worst ? worst : e;
        }
        free(k);
        free(v);
    }
    char name[100];
    snprintf(name, sizeof(name), "latents read %s %s: error %.2e", kvd_codec_name(codec),
             dtype == KVD_DTYPE_F32 ? "f32" : "bf16", worst);
    result(ok && worst < (dtype == KVD_DTYPE_F32 ? 1e-3 : 4e-3), name);
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
}

// A session in bf16 has no set.
static struct kvd_rotation *set_of(uint32_t codec, struct kvd_rotation *rot)
{
    return codec == KVD_CODEC_BF16 ? NULL : rot;
}

static void check_latent_shape(const struct latent_shape *c, uint32_t codec, uint64_t seed)
{
    struct kseq s;
    struct kvd_plane g = latent_plane(c->layers, c->heads, codec, c->sink, c->recent);
    latent_init(&s, g, c->length + KVD_MAX(c->a.new_tokens, 64u), false, seed);
    to_device(&s);
    struct kvd_rotation *rot = grow(&s, cuda, c->length, seed);
    fetch_pages(&s);
    free_behind(&s, &c->a);
    struct attention_errors e = attention_error(&s, cuda, set_of(codec, rot), &c->a);
    char name[240];
    snprintf(name, sizeof(name),
             "latents %s heads %u sink %u recent %u length %u q %u new %u window %u cap %g: error "
             "%.2e (worst row %.2e), lse %.2e",
             kvd_codec_name(codec), c->heads, c->sink, c->recent, c->length, c->a.q_len,
             c->a.new_tokens, c->a.window, (double)c->a.softcap, e.overall, e.worst, e.lse);
    result(e.overall < 1e-3 && e.worst < 4e-3 && e.lse < 5e-3, name);
    worst_error = fmax(worst_error, e.overall);
    worst_row = fmax(worst_row, e.worst);
    worst_lse = fmax(worst_lse, e.lse);
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
}

// Every shape in each codec, or in one of them.
static void latent_attention(uint64_t seed, uint32_t longest, bool all)
{
    worst_error = worst_row = worst_lse = 0;
    for (uint32_t j = 0; j < KVD_LEN(latent_shapes); j++)
        for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
            if (latent_codec(codec) && latent_shapes[j].length <= longest &&
                (all || codec == (seed + j) % 8))
                check_latent_shape(&latent_shapes[j], codec, seed + j);
    printf("latents: worst relative L2 %.2e (of a row %.2e), worst log-sum-exp %.2e\n", worst_error,
           worst_row, worst_lse);
}

static void latent_groups(uint64_t seed)
{
    static const uint32_t heads[] = {1, 8, 16, 17, 32, 64, 128};
    for (uint32_t i = 0; i < KVD_LEN(heads); i++)
        for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
            struct latent_shape c = {1, heads[i], 64, 256, 1200 + 77 * i, {.q_len = 1}};
            if (latent_codec(codec))
                check_latent_shape(&c, codec, seed + i);
        }
}

// A batch of sequences of many lengths gives what calls for each give; and queries and outputs in
// bf16 what the same queries in f32 give, but for the rounding of outputs.
static void latent_batch(uint32_t codec, uint32_t heads, uint32_t queries, uint32_t longest,
                         uint64_t seed)
{
    enum { N = 6 };
    const uint32_t lengths[N] = {queries, 64, 337, longest, 65, 400};
    struct kseq s[N];
    struct kvd_rotation *rot = NULL;
    struct kvd_attend_item items[N];
    struct kvd_plane g = latent_plane(1, heads, codec, 64, 64);
    uint32_t dim = kvd_plane_dim_q(&g);
    uint64_t row_q = (uint64_t)queries * heads * dim, row_o = (uint64_t)queries * heads * LATENT;
    float *q = malloc(N * row_q * 4), *o = malloc(N * row_o * 4), *single = malloc(row_o * 4);
    uint16_t *half_q = malloc(row_q * 2), *half_o = malloc(row_o * 2);
    for (uint32_t i = 0; i < N; i++) {
        latent_init(&s[i], g, lengths[i] + 64, false, seed); // one set
        to_device(&s[i]);
        if (rot)
            cuda->ops->rotation_free(cuda, &rot);
        rot = grow(&s[i], cuda, lengths[i], seed + i);
        for (uint64_t j = 0; j < row_q; j++)
            q[i * row_q + j] = kvd_bf16_to_f32(kvd_f32_to_bf16((float)kseq_normal(&s[i].rng)));
        items[i] = (struct kvd_attend_item){
            .pages = {s[i].at_bf16, s[i].at_codec},
            .length = s[i].length,
            .hist_end = s[i].hist_end,
            .q_len = queries,
            .q = kseq_tensor(q + i * row_q, KVD_DTYPE_F32, queries, heads, dim, 0),
            .o = kseq_tensor(o + i * row_o, KVD_DTYPE_F32, queries, heads, LATENT, 0)};
    }
    struct kvd_attend_params p = {.plane = &g,
                                  .rotation = set_of(codec, rot),
                                  .layer_count = 1,
                                  .scale = test_scale(&g),
                                  .items = items,
                                  .n_items = N};
    memset(o, 0xff, N * row_o * 4);
    bool ok = cuda->ops->attend(cuda, &p, NULL) == KVD_OK;
    double worst = 0, worst_half = 0;
    for (uint32_t i = 0; i < N; i++) {
        struct kvd_attend_item one = items[i];
        p.items = &one;
        p.n_items = 1;
        for (int k = 0; k < 2; k++) { // f32, bf16
            memset(single, 0xff, row_o * 4);
            memset(half_o, 0xff, row_o * 2);
            for (uint64_t j = 0; j < row_q; j++)
                half_q[j] = kvd_f32_to_bf16(q[i * row_q + j]);
            one.o = k ? kseq_tensor(half_o, KVD_DTYPE_BF16, queries, heads, LATENT, 0)
                      : kseq_tensor(single, KVD_DTYPE_F32, queries, heads, LATENT, 0);
            if (k)
                one.q = kseq_tensor(half_q, KVD_DTYPE_BF16, queries, heads, dim, 0);
            ok &= cuda->ops->attend(cuda, &p, NULL) == KVD_OK;
            double d = 0, n = 0;
            for (uint64_t j = 0; j < row_o; j++) {
                double a = o[i * row_o + j], b = k ? kvd_bf16_to_f32(half_o[j]) : single[j];
                d += (a - b) * (a - b);
                n += a * a;
            }
            double *to = k ? &worst_half : &worst, e = sqrt(d / n);
            *to = e <= *to ? *to : e;
        }
    }
    char name[160];
    snprintf(name, sizeof(name),
             "latent batch %s heads %u q %u: differs from single calls by %.2e, from bf16 by %.2e",
             kvd_codec_name(codec), heads, queries, worst, worst_half);
    result(ok && worst < 1e-3 && worst_half < 4e-3, name);
    cuda->ops->rotation_free(cuda, &rot);
    for (uint32_t i = 0; i < N; i++)
        deinit(&s[i]);
    free(q);
    free(o);
    free(single);
    free(half_q);
    free(half_o);
}

// NaN or Inf in a query of one head, in the latent's part or in rope's: its own results are NaN,
// and nobody else's change.
static void latent_nonfinite(uint32_t codec, float poison, bool rope, uint64_t seed)
{
    enum { HEADS = 40, DIM = ROPE + LATENT, LENGTH = 300, BAD = 21 };
    struct kseq s;
    latent_init(&s, latent_plane(1, HEADS, codec, 0, 16), LENGTH + 64, false, seed);
    to_device(&s);
    struct kvd_rotation *rot = grow(&s, cuda, LENGTH, seed);
    float *q = malloc(HEADS * DIM * 4), *o = malloc(2 * HEADS * LATENT * 4), lse[2][HEADS];
    bool ok = true;
    for (uint32_t i = 0; i < HEADS * DIM; i++)
        q[i] = (float)kseq_normal(&s.rng);
    for (int k = 0; k < 2; k++) {
        if (k)
            q[BAD * DIM + (rope ? LATENT + 3 : 77)] = poison;
        struct kvd_attend_item item = {
            .pages = {s.at_bf16, s.at_codec},
            .length = s.length,
            .hist_end = s.hist_end,
            .q_len = 1,
            .q = kseq_tensor(q, KVD_DTYPE_F32, 1, HEADS, DIM, 0),
            .o = kseq_tensor(o + k * HEADS * LATENT, KVD_DTYPE_F32, 1, HEADS, LATENT, 0),
            .lse = kseq_tensor(lse[k], KVD_DTYPE_F32, 1, HEADS, 1, 0)};
        struct kvd_attend_params p = {.plane = &s.g,
                                      .rotation = set_of(codec, rot),
                                      .layer_count = 1,
                                      .scale = 10,
                                      .items = &item,
                                      .n_items = 1};
        ok &= cuda->ops->attend(cuda, &p, NULL) == KVD_OK;
    }
    for (uint32_t h = 0; h < HEADS; h++)
        for (uint32_t c = 0; c < LATENT; c++) {
            float a = o[h * LATENT + c], b = o[(HEADS + h) * LATENT + c];
            ok &= h == BAD ? isnan(b) && isnan(lse[1][h]) : a == b && lse[0][h] == lse[1][h];
        }
    char name[100];
    snprintf(name, sizeof(name), "latents %s: a query has %g in its %s", kvd_codec_name(codec),
             (double)poison, rope ? "rope part" : "latent part");
    result(ok, name);
    free(q);
    free(o);
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
}

// A worker's call in a graph, with its newest token in a tail: what the same token gives among a
// call's new ones, also when the graph is replayed with other lengths.
static void latent_graph(uint32_t codec, uint32_t heads, uint32_t length, uint64_t seed)
{
    enum { N = 2, RING = 4 };
    struct kseq s;
    struct kvd_plane g = latent_plane(1, heads, codec, 64, 64);
    latent_init(&s, g, length + 64, false, seed);
    to_device(&s);
    zero_pages(&s, s.at_codec, s.at_bf16,
               true); // other lengths want rows that were not in the window
    struct kvd_rotation *rot = grow(&s, cuda, length, seed);
    uint64_t tables[N * 2][64], row_q = (uint64_t)heads * (LATENT + ROPE),
                                n_o = (uint64_t)N * heads * LATENT;
    uint32_t lengths[3 * N], stride = 64;
    for (uint32_t i = 0; i < N; i++) {
        memcpy(tables[i], s.at_codec, KVD_MIN(s.n_codec, stride) * 8);
        memcpy(tables[N + i], s.at_bf16, s.n_bf16 * 8);
        lengths[i] = (uint32_t)s.length - 16 * i;
        lengths[N + i] = (uint32_t)s.hist_end - 16 * i;
        lengths[2 * N + i] = 1;
    }
    uint16_t *k = malloc(N * ROPE * 2), *v = malloc(N * LATENT * 2);
    uint16_t *q = malloc(N * row_q * 2);
    for (uint32_t i = 0; i < N * row_q; i++)
        q[i] = kvd_f32_to_bf16((float)kseq_normal(&s.rng));
    for (uint32_t i = 0; i < N * ROPE; i++)
        k[i] = kvd_f32_to_bf16((float)kseq_normal(&s.rng));
    for (uint32_t i = 0; i < N * LATENT; i++)
        v[i] = kvd_f32_to_bf16((float)kseq_normal(&s.rng));
    uint64_t *at = copy_of(tables, sizeof(tables));
    uint32_t *on_device = copy_of(lengths, sizeof(lengths));
    void *tail_k = copy_of(NULL, N * RING * ROPE * 2),
         *tail_v = copy_of(NULL, N * RING * LATENT * 2);
    struct kvd_cuda_attend_params p = {.sequences = N,
                                       .q_heads = heads,
                                       .kv_heads = 1,
                                       .dim_k = ROPE,
                                       .dim_v = LATENT,
                                       .codec = KVD_CODEC_BF16,
                                       .codec_v = codec,
                                       .q_len = 1,
                                       .new_tokens = 1,
                                       .sink = g.sink,
                                       .ring = kvd_plane_ring(&g),
                                       .scale = 0.05f,
                                       .q_type = KVD_DTYPE_BF16,
                                       .o_type = KVD_DTYPE_F32,
                                       .q = copy_of(q, N * row_q * 2),
                                       .o = copy_of(NULL, n_o * 4),
                                       .k = copy_of(k, N * ROPE * 2),
                                       .v = copy_of(v, N * LATENT * 2),
                                       .pages = {.codec = at,
                                                 .bf16 = at + N * stride,
                                                 .codec_stride = stride,
                                                 .bf16_stride = stride,
                                                 .length = on_device,
                                                 .hist_end = on_device + N},
                                       .rotation = rot->device};
    uint32_t history = (uint32_t)s.hist_end - g.sink;
    kvd_cuda_attend_plan(&p, N * history, history, length - history + 1,
                         ((struct kvd_cuda *)cuda)->multiprocessors);
    p.scratch = copy_of(NULL, kvd_cuda_attend_scratch(&p));
    device_fill(p.scratch, 0xff, kvd_cuda_attend_scratch(&p));
    struct kvd_cuda_attend_params tailed = p;
    tailed.new_tokens = 0;
    tailed.tail = (struct kvd_cuda_tail){tail_k, tail_v, on_device + 2 * N, RING};
    struct kvd_cuda_store_params store = {.sequences = N,
                                          .kv_heads = 1,
                                          .dim_k = ROPE,
                                          .dim_v = LATENT,
                                          .q_len = 1,
                                          .k = p.k,
                                          .v = p.v,
                                          .length = on_device,
                                          .tail = tailed.tail};
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    need(cudaStreamCreate(&stream), "stream");
    need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    need(kvd_cuda_store(&store, stream), "storing");
    need(kvd_cuda_attend(&tailed, stream), "attention");
    need(cudaStreamEndCapture(stream, &graph), "capture");
    need(cudaGraphInstantiate(&exec, graph, 0), "graph");
    float *want = malloc(n_o * 4), *got = malloc(n_o * 4);
    bool ok = true;
    for (int round = 0; round < 2; round++) {
        need(kvd_cuda_attend(&p, stream), "attention");
        need(cudaStreamSynchronize(stream), "attention");
        need(cudaMemcpy(want, p.o, n_o * 4, cudaMemcpyDeviceToHost), "fetch");
        device_fill(p.o, 0xff, n_o * 4);
        need(cudaGraphLaunch(exec, stream), "replay");
        need(cudaStreamSynchronize(stream), "replay");
        need(cudaMemcpy(got, p.o, n_o * 4, cudaMemcpyDeviceToHost), "fetch");
        ok &= memcmp(want, got, n_o * 4) == 0;
        for (uint64_t i = 0; i < n_o; i++)
            ok &= isfinite(want[i]) != 0;
        for (uint32_t i = 0; i < 2 * N; i++) // the graph stays good when lengths change
            lengths[i] -= 32;
        upload(on_device, lengths, sizeof(lengths));
    }
    result(ok, "latents: a worker's step in a graph");
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    void *const all[] = {at,
                         on_device,
                         tail_k,
                         tail_v,
                         (void *)(uintptr_t)p.q,
                         p.o,
                         (void *)(uintptr_t)p.k,
                         (void *)(uintptr_t)p.v,
                         p.scratch};
    for (size_t i = 0; i < KVD_LEN(all); i++)
        cudaFree(all[i]);
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
    free(k);
    free(v);
    free(q);
    free(want);
    free(got);
}

// Errors do not grow with the length: `pages` that differ, over and over again.
static void latent_long(uint32_t codec, uint32_t heads, uint32_t pages, uint64_t repeats,
                        uint64_t seed)
{
    struct longer x;
    longer_init(&x, codec, heads, pages, repeats, seed);
    uint64_t size = kvd_page_bytes(&x.g, x.g.codec), n = x.tokens / KVD_PAGE_TOKENS;
    uint8_t *on_device = copy_of(x.bytes, pages * size);
    uint64_t *table = malloc(n * sizeof(*table));
    for (uint64_t i = 0; i < n; i++)
        table[i] = (uint64_t)(uintptr_t)on_device + i % pages * size;
    struct attention_errors e = longer_error(&x, cuda, table);
    char name[160];
    snprintf(name, sizeof(name), "long: latents %s heads %u, %llu tokens: worst row %.2e, lse %.2e",
             kvd_codec_name(codec), heads, (unsigned long long)x.tokens, e.worst, e.lse);
    printf("%s\n", name);
    result(e.worst < 1e-3 && e.lse < 1e-3, name);
    cudaFree(on_device);
    free(table);
    longer_deinit(&x);
}

static void latents_brief(uint64_t seed)
{
    refused_latent_transforms();
    if (!latents_served())
        return;
    uint32_t codec = 1 + (uint32_t)(seed % 7); // one of those with codes
    latent_pages(codec, seed % KVD_SCALE_COUNT, 0.96f, 1, 300, seed);
    latent_reading(1 + codec % 7, KVD_DTYPE_F32, seed);
    latent_attention(seed, 333, false);
    latent_batch(1 + (codec + 1) % 7, 40, 1, 500, seed);
    latent_nonfinite(codec, NAN, seed % 2, seed);
    latent_graph(codec, 33, 350, seed);
}

static void latents_in_all(uint64_t seed, bool quick)
{
    static const float poison[] = {NAN, INFINITY, -INFINITY, 3e38f};
    refused_latent_transforms();
    if (!latents_served())
        return;
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++) {
        if (!latent_codec(codec))
            continue;
        for (int kind = 0; kind < KVD_SCALE_COUNT && codec != KVD_CODEC_BF16; kind++)
            if (!quick || kind == (int)((codec + seed) % KVD_SCALE_COUNT))
                latent_pages(codec, kind, kind % 2 ? 1 : 0.96f, 2, quick ? 500 : 1500,
                             seed + codec);
        latent_reading(codec, codec % 2 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16, seed + codec);
        latent_batch(codec, codec % 2 ? 128 : 20, codec % 3 ? 1 : 3, quick ? 900 : 5000,
                     seed + codec);
        latent_graph(codec, codec % 2 ? 128 : 16, 900, seed + codec);
        for (size_t i = 0; i < KVD_LEN(poison); i++)
            latent_nonfinite(codec, poison[i], (codec + i) % 2, seed + i);
    }
    latent_attention(seed, quick ? 700 : 20000, !quick);
    const struct latent_shape many = {1, 128, 0, 64, 200, {.q_len = 130}};
    check_latent_shape(&many, KVD_CODEC_INT2, seed); // more rows than are taken at once
    if (quick)
        return;
    latent_groups(seed);
    const struct latent_shape prefill = {1, 128, 64, 64, 300, {.q_len = 200, .new_tokens = 200}};
    check_latent_shape(&prefill, KVD_CODEC_INT4, seed);
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        if (latent_codec(codec))
            latent_long(codec, codec % 2 ? 128 : 5, 160, 100, seed + codec);
    latent_long(KVD_CODEC_INT2, 16, 16384, 1, seed);
}

#endif
