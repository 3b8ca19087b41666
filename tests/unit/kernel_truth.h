// Attention in float64 over what the pages say, and a backend's distance from it.
#ifndef KVD_TESTS_KERNEL_TRUTH_H
#define KVD_TESTS_KERNEL_TRUTH_H

#include "tests/unit/kernel_rounding.h"

static inline struct kvd_plane test_plane(uint32_t layers, uint32_t kv_heads, uint32_t group,
                                          uint32_t dk, uint32_t dv, uint32_t codec, uint32_t sink,
                                          uint32_t recent)
{
    struct kvd_plane g = {.n_layers = layers,
                          .q_heads = kv_heads * group,
                          .kv_heads = kv_heads,
                          .head_dim_k = dk,
                          .head_dim_v = dv,
                          .codec = kvd_codecs_both(codec),
                          .sink = sink,
                          .recent = recent};
    struct kvd_error err = {0};
    if (kvd_plane_check(&g, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return g;
}

// A latent plane, whose rope part is in bf16.
static inline struct kvd_plane latent_plane(uint32_t layers, uint32_t q_heads, uint32_t codec,
                                            uint32_t sink, uint32_t recent)
{
    struct kvd_plane g = test_plane(layers, 1, 1, 64, 64, KVD_CODEC_BF16, sink, recent);
    struct kvd_error err = {0};
    g.latent = 1;
    g.q_heads = q_heads;
    g.head_dim_v = 512;
    g.codec.v = codec;
    if (kvd_plane_check(&g, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return g;
}

// What logits are scaled by; of latents, as models do that have keys of 192 values.
static inline float test_scale(const struct kvd_plane *g)
{
    return 1 / sqrtf(g->latent ? 192.0f : (float)g->head_dim_k);
}

// The same with K and V in codecs of their own.
static inline struct kvd_plane test_plane_of(uint32_t layers, uint32_t kv_heads, uint32_t group,
                                             uint32_t dk, uint32_t dv, struct kvd_codecs codec,
                                             uint32_t sink, uint32_t recent)
{
    struct kvd_plane g = test_plane(layers, kv_heads, group, dk, dv, codec.k, sink, recent);
    g.codec = codec;
    return g;
}

struct attention {
    uint32_t q_len, window;
    float softcap;
    uint32_t new_tokens; // 0 or q_len
    bool bf16_queries, sinks;
};

// All of a sequence's K and V in float64: [layer][kv head][token][dim].
static inline double *all_rows(const struct kseq *s, uint64_t total, bool v)
{
    const struct kvd_plane *g = &s->g;
    uint32_t dim = v ? g->head_dim_v : g->head_dim_k;
    double *rows = malloc(sizeof(double) * g->n_layers * g->kv_heads * (total + 1) * dim);
    for (uint64_t i = 0; i < g->n_layers * g->kv_heads * total; i++)
        kseq_truth(s, i % total, (uint32_t)(i / total / g->kv_heads),
                   (uint32_t)(i / total % g->kv_heads), v, rows + i * dim);
    return rows;
}

// Attention in float64 for one (layer, query, q head). weights: [tokens], or NULL: how lse changes
// with each score.
KVD_REFERENCE static inline void truth(const struct kseq *s, const struct attention *a,
                                       const double *keys, const double *values, const float *q,
                                       float sink, uint32_t layer, uint32_t qi, uint32_t q_head,
                                       double *o, double *lse, double *weights)
{
    const struct kvd_plane *g = &s->g;
    uint32_t head = q_head / (g->q_heads / g->kv_heads);
    uint64_t total = s->length + a->new_tokens, pos = total - a->q_len + qi;
    keys += ((uint64_t)layer * g->kv_heads + head) * total * g->head_dim_k;
    values += ((uint64_t)layer * g->kv_heads + head) * total * g->head_dim_v;
    double m = sink, l, *logits = malloc(sizeof(double) * total);
    for (uint64_t t = 0; t < total; t++) {
        double dot = 0;
        const double *k = keys + t * g->head_dim_k, *latent = values + t * g->head_dim_v;
        uint32_t from = g->latent ? g->head_dim_v : 0; // the query's part for K
        logits[t] = -INFINITY;
        if (t > pos || (a->window && t + a->window <= pos))
            continue;
        for (uint32_t c = 0; c < g->head_dim_k; c++)
            dot += k[c] * q[from + c];
        for (uint32_t c = 0; c < from; c++)
            dot += latent[c] * q[c];
        dot *= test_scale(g);
        logits[t] = a->softcap > 0 ? a->softcap * tanh(dot / a->softcap) : dot;
        m = fmax(m, logits[t]);
    }
    memset(o, 0, sizeof(double) * g->head_dim_v);
    l = exp(sink - m);
    for (uint64_t t = 0; t < total; t++) {
        const double *v = values + t * g->head_dim_v;
        double p = exp(logits[t] - m);
        if (p == 0)
            continue;
        l += p;
        for (uint32_t c = 0; c < g->head_dim_v; c++)
            o[c] += p * v[c];
    }
    for (uint32_t c = 0; c < g->head_dim_v; c++)
        o[c] /= l;
    *lse = m + log(l);
    for (uint64_t t = 0; weights && t < total; t++) {
        double capped = a->softcap > 0 ? logits[t] / a->softcap : 0;
        weights[t] = exp(logits[t] - *lse);
        weights[t] *= weights[t] > 0 ? test_scale(g) * (1 - capped * capped) : 0;
    }
    free(logits);
}

struct attention_errors {
    double worst;   // relative L2 of a (layer, query, head)
    double overall; // relative L2 of all of the output
    double lse;     // absolute
    // Of what rounding to fp16 may make of it: of the worst row, as a part of ROUNDING_DEVIATIONS
    // or of LSE_LEAST, whichever is more; of LSE_SAMPLE rows and some more of sets with transforms,
    // if there are so many, the root mean square, in deviations or LSE_SMALL. The former is how far
    // chance can go with one row; whatever is wrong with all of them shows in the latter.
    double lse_part, lse_all;
    uint64_t lse_rows; // of which the latter is
};

static const double LSE_LEAST = 5e-3, LSE_SMALL = 1e-3;
enum { LSE_SAMPLE = 100 };

// By what a row's log-sum-exp is off, and what is to be expected of rounding. From so many rows of
// a kv head on values of keys are rounded too (kernels/cuda/many.cuh).
static inline void lse_judge(const struct kseq *s, const struct attention *a, uint32_t layer,
                             uint32_t q_head, const float *q, const double *weights, double off,
                             bool sample, struct attention_errors *out)
{
    const struct kvd_plane *g = &s->g;
    uint32_t group = g->q_heads / g->kv_heads;
    double deviation = 0;
    off = isnan(off) ? INFINITY : fabs(off);
    if (sample || off > LSE_LEAST)
        deviation = lse_rounding(s, layer, q_head / group, q, weights, s->length + a->new_tokens,
                                 a->q_len * group > 32);
    out->lse = fmax(out->lse, off);
    out->lse_part = fmax(out->lse_part, off / fmax(LSE_LEAST, ROUNDING_DEVIATIONS * deviation));
    out->lse_all += sample ? pow(off / fmax(LSE_SMALL, deviation), 2) : 0;
    out->lse_rows += sample;
}

// Runs attention on all layers. NaN where an output was not written.
static inline struct attention_errors attention_error(struct kseq *s, struct kvd_backend *b,
                                                      const struct kvd_rotation *rot,
                                                      const struct attention *a)
{
    const struct kvd_plane *g = &s->g;
    uint64_t rows = (uint64_t)g->n_layers * a->q_len * g->q_heads, dim = kvd_plane_dim_q(g);
    float *q = malloc(sizeof(float) * rows * dim);
    float *o = malloc(sizeof(float) * rows * g->head_dim_v), *lse = malloc(sizeof(float) * rows);
    float *sinks = malloc(sizeof(float) * g->n_layers * g->q_heads);
    for (uint32_t i = 0; i < g->n_layers * g->q_heads; i++) // from next to nothing to all there is
        sinks[i] = !a->sinks || i % 5 == 1 ? -INFINITY : (float)(6 * kseq_normal(&s->rng));
    for (uint64_t i = 0; i < rows * dim; i++)
        q[i] = (float)kseq_normal(&s->rng);
    uint16_t *short_q = calloc(rows * dim, 2);
    for (uint64_t i = 0; i < rows * dim && a->bf16_queries; i++) {
        short_q[i] = kvd_f32_to_bf16(q[i]);
        q[i] = kvd_bf16_to_f32(short_q[i]);
    }
    memset(o, 0xff, sizeof(float) * rows * g->head_dim_v); // NaN: every element must be written
    memset(lse, 0xff, sizeof(float) * rows);
    struct kvd_attend_item item = {
        .pages = {s->at_bf16, s->at_codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .q_len = a->q_len,
        .new_tokens = a->new_tokens,
        .q = a->bf16_queries
                 ? kseq_tensor(short_q, KVD_DTYPE_BF16, a->q_len, g->q_heads, (uint32_t)dim, 0)
                 : kseq_tensor(q, KVD_DTYPE_F32, a->q_len, g->q_heads, (uint32_t)dim, 0),
        .o = kseq_tensor(o, KVD_DTYPE_F32, a->q_len, g->q_heads, g->head_dim_v, 0),
        .lse = kseq_tensor(lse, KVD_DTYPE_F32, a->q_len, g->q_heads, 1, 0),
        .k = kseq_tensor(s->k, KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_k, s->length),
        .v = kseq_tensor(s->v, KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_v, s->length),
    };
    struct kvd_attend_params p = {.plane = g,
                                  .rotation = rot,
                                  .layer_count = g->n_layers,
                                  .scale = test_scale(g),
                                  .softcap = a->softcap,
                                  .window = a->window,
                                  .sinks = a->sinks ? sinks : NULL,
                                  .items = &item,
                                  .n_items = 1};
    struct kvd_error err = {0};
    if (s->length + a->new_tokens > s->capacity) {
        fprintf(stderr, "%u new tokens after %llu, and room for %llu\n", a->new_tokens,
                (unsigned long long)s->length, (unsigned long long)s->capacity);
        abort();
    }
    if (b->ops->attend(b, &p, &err)) {
        fprintf(stderr, "attend: %s\n", err.text);
        abort();
    }
    double *keys = all_rows(s, s->length + a->new_tokens, false),
           *values = all_rows(s, s->length + a->new_tokens, true);
    struct attention_errors err_of = {0};
    double diff = 0, norm = 0, *weights = malloc(sizeof(double) * (s->length + a->new_tokens + 1));
    for (uint64_t i = 0; i < rows; i++) {
        double want[KVD_MAX_ROW], want_lse;
        uint32_t layer = (uint32_t)(i / (a->q_len * g->q_heads)),
                 qi = (uint32_t)(i / g->q_heads % a->q_len);
        uint32_t head = (uint32_t)(i % g->q_heads);
        truth(s, a, keys, values, q + i * dim, sinks[layer * g->q_heads + head], layer, qi, head,
              want, &want_lse, weights);
        for (uint32_t c = 0; c < g->head_dim_v; c++) {
            double d = want[c] - o[i * g->head_dim_v + c];
            diff += d * d;
            norm += want[c] * want[c];
        }
        const double off = kseq_rel(want, o + i * g->head_dim_v, g->head_dim_v);
        err_of.worst = fmax(err_of.worst, isnan(off) ? INFINITY : off);
        lse_judge(s, a, layer, head, q + i * dim, weights, want_lse - lse[i],
                  s->back_k && rows >= LSE_SAMPLE && i % (rows / LSE_SAMPLE) == 0, &err_of);
    }
    err_of.overall = sqrt(diff / norm); // NaN if any output is
    err_of.lse_all = sqrt(err_of.lse_all / (double)KVD_MAX(err_of.lse_rows, 1u));
    free(keys);
    free(values);
    free(weights);
    free(q);
    free(short_q);
    free(o);
    free(lse);
    free(sinks);
    return err_of;
}

struct shape {
    uint32_t layers, kv_heads, group, dk, dv, sink, recent, heads_rot, length;
    struct attention a;
};

static const uint32_t head_dims[][2] = {
#define KVD_HEAD_DIMS(k, v) {k, v},
#include "proto/head_dims.def"
};

// Every head_dim, small and large groups, cut chunks and tiles, windows that are off or not full.
static const struct shape attention_shapes[] = {
    {1, 2, 1, 64, 64, 64, 256, 1, 700, {.q_len = 1}},
    {2, 2, 2, 128, 128, 64, 256, 1, 700, {.q_len = 1}},
    {1, 2, 3, 256, 256, 64, 256, 1, 500, {.q_len = 1}},
    {1, 1, 4, 128, 64, 64, 0, 1, 333, {.q_len = 1}},
    {1, 2, 6, 64, 128, 16, 32, 2, 555, {.q_len = 3}},
    {1, 1, 12, 128, 128, 0, 0, 1, 400, {.q_len = 1}},
    {1, 1, 12, 128, 128, 0, 0, 1, 403, {.q_len = 7}},
    {1, 1, 16, 256, 64, 48, 16, 1, 401, {.q_len = 2}},
    {1, 2, 8, 64, 256, 64, 64, 0, 402, {.q_len = 1}},
    {1, 3, 2, 128, 128, 64, 64, 3, 1200, {.q_len = 4, .window = 100}},
    {1, 1, 4, 128, 128, 64, 64, 1, 1203, {.q_len = 5, .window = 700, .softcap = 20}},
    {1, 1, 4, 128, 128, 64, 64, 1, 1203, {.q_len = 16, .softcap = 30}},
    {1, 1, 4, 128, 128, 64, 64, 1, 640, {.q_len = 37, .new_tokens = 37}},
    {1, 1, 4, 128, 128, 64, 64, 1, 2640, {.q_len = 64, .new_tokens = 64, .window = 1000}},
    {1, 2, 7, 64, 64, 64, 64, 1, 3000, {.q_len = 1, .softcap = 5}},
    {1, 1, 2, 128, 128, 64, 256, 1, 1, {.q_len = 1}},
    {1, 1, 2, 128, 128, 64, 256, 1, 40, {.q_len = 40}},
    {1, 1, 2, 64, 64, 64, 256, 1, 330, {.q_len = 330}},
    {1, 2, 4, 128, 128, 0, 0, 1, 600, {.q_len = 600}},
    {1, 2, 4, 64, 64, 64, 256, 1, 700, {.q_len = 300, .window = 200}},
    {1, 1, 2, 64, 64, 64, 256, 1, 0, {.q_len = 50, .new_tokens = 50}},
    {1, 2, 4, 128, 128, 64, 256, 1, 20000, {.q_len = 1}},
    {1, 2, 40, 128, 128, 64, 64, 1, 500, {.q_len = 1}},
    {1, 2, 1, 80, 80, 64, 64, 1, 501, {.q_len = 1}},
    {2, 2, 4, 96, 96, 64, 64, 2, 499, {.q_len = 1}},
    {1, 2, 7, 112, 112, 16, 32, 1, 555, {.q_len = 1}},
    {1, 2, 3, 192, 192, 64, 64, 1, 300, {.q_len = 1}},
    {1, 1, 16, 192, 128, 48, 16, 1, 333, {.q_len = 1}},
    {1, 2, 12, 80, 80, 0, 0, 0, 402, {.q_len = 3}},
    {1, 1, 5, 96, 96, 64, 64, 1, 640, {.q_len = 37, .new_tokens = 37}},
    {1, 3, 2, 112, 112, 64, 64, 3, 1200, {.q_len = 4, .window = 100}},
    {1, 1, 4, 80, 80, 64, 64, 1, 1203, {.q_len = 5, .window = 700, .softcap = 20}},
    {1, 1, 4, 192, 128, 64, 64, 1, 1203, {.q_len = 5, .window = 700, .softcap = 20}},
    {1, 1, 2, 192, 128, 64, 256, 1, 40, {.q_len = 40}},
    {1, 2, 4, 80, 80, 64, 256, 1, 20000, {.q_len = 1}},
    {2, 2, 4, 64, 64, 64, 64, 1, 540, {.q_len = 1, .sinks = true}},
    {1, 2, 8, 64, 64, 0, 128, 1, 1700, {.q_len = 3, .window = 128, .sinks = true}},
    {2, 2, 3, 128, 128, 64, 256, 1, 5000, {.q_len = 1, .sinks = true}},
    {1, 1, 12, 128, 128, 64, 64, 1, 130, {.q_len = 40, .new_tokens = 40, .sinks = true}},
    {1, 2, 5, 256, 256, 64, 64, 1, 1, {.q_len = 1, .softcap = 30, .sinks = true}},
    {1, 2, 9, 112, 112, 64, 256, 1, 5000, {.q_len = 2}},
};

#endif
