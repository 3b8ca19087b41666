// One sequence in plain memory, grown through a backend, with its float64 truth beside it. For
// kernel tests and benches.
#ifndef KVD_TESTS_KERNEL_FIXTURE_H
#define KVD_TESTS_KERNEL_FIXTURE_H

#include <math.h>

#include "kernels/backend.h"
#include "kernels/quantize.h"
#include "kernels/tc.h"
#include "tests/unit/random.h"

struct kseq {
    struct kvd_plane g;
    struct kvd_rotation_data rot;
    float *r_k, *r_v, *clip;
    float *back_k, *back_v, *mean_k, *mean_v; // of transforms (kseq_skew); else NULL
    float *sigma, *bits;                      // of tc2 and tc2.5 (kseq_code); else NULL
    uint64_t length, hist_end;
    uint32_t n_bf16, n_codec;     // pages
    uint64_t *bf16, *codec;       // in host memory
    uint64_t *at_bf16, *at_codec; // where the backend has them: the same, or a GPU's
    uint16_t *k, *v;              // originals: [layer][capacity][kv head][dim]
    uint64_t capacity;
    uint64_t rng;
};

static inline double kseq_uniform(uint64_t *rng)
{
    return (double)(kvd_rand(rng) >> 11) * 0x1p-53;
}

static inline double kseq_normal(uint64_t *rng)
{
    double u = kseq_uniform(rng) + 1e-300, v = kseq_uniform(rng);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

// A random orthogonal matrix: Gram-Schmidt on normal rows, in double.
KVD_REFERENCE static inline void kseq_orthogonal(uint64_t *rng, uint32_t dim, float *out)
{
    double *m = malloc(sizeof(double) * dim * dim);
    for (uint32_t i = 0; i < dim; i++) {
        double *row = m + (uint64_t)i * dim;
        for (uint32_t c = 0; c < dim; c++)
            row[c] = kseq_normal(rng);
        for (int pass = 0; pass < 2; pass++)
            for (uint32_t j = 0; j < i; j++) {
                double dot = 0;
                for (uint32_t c = 0; c < dim; c++)
                    dot += row[c] * m[(uint64_t)j * dim + c];
                for (uint32_t c = 0; c < dim; c++)
                    row[c] -= dot * m[(uint64_t)j * dim + c];
            }
        double norm = 0;
        for (uint32_t c = 0; c < dim; c++)
            norm += row[c] * row[c];
        for (uint32_t c = 0; c < dim; c++)
            row[c] /= sqrt(norm);
    }
    for (uint64_t i = 0; i < (uint64_t)dim * dim; i++)
        out[i] = (float)m[i];
    free(m);
}

static inline uint64_t *kseq_pages(uint32_t n, uint64_t bytes)
{
    uint64_t *pages = calloc(n ? n : 1, sizeof(*pages));
    for (uint32_t i = 0; i < n; i++) {
        void *p = aligned_alloc(4096, kvd_round_up(bytes, 4096));
        memset(p, 0xff, bytes); // poison: fp16 and bf16 NaN
        pages[i] = (uint64_t)(uintptr_t)p;
    }
    return pages;
}

// heads_rot: 0 identity, 1 one rotation per layer, else one per kv head.
static inline void kseq_init(struct kseq *s, struct kvd_plane g, uint64_t capacity,
                             uint32_t heads_rot, float clip_k, float clip_v, uint64_t seed)
{
    *s = (struct kseq){.g = g, .capacity = capacity, .rng = seed, .hist_end = g.sink};
    uint32_t heads = heads_rot ? heads_rot : 1;
    uint64_t matrices = (uint64_t)g.n_layers * heads;
    s->rot = (struct kvd_rotation_data){
        .n_layers = g.n_layers, .heads = heads, .dim_k = g.head_dim_k, .dim_v = g.head_dim_v};
    if (heads_rot) {
        s->r_k = malloc(sizeof(float) * matrices * g.head_dim_k * g.head_dim_k);
        s->r_v = malloc(sizeof(float) * matrices * g.head_dim_v * g.head_dim_v);
        for (uint64_t m = 0; m < matrices; m++) {
            kseq_orthogonal(&s->rng, g.head_dim_k, s->r_k + m * g.head_dim_k * g.head_dim_k);
            kseq_orthogonal(&s->rng, g.head_dim_v, s->r_v + m * g.head_dim_v * g.head_dim_v);
        }
        s->rot.k = s->r_k;
        s->rot.v = s->r_v;
    }
    s->clip = malloc(sizeof(float) * matrices * 2);
    for (uint64_t m = 0; m < matrices; m++) {
        s->clip[m] = clip_k;
        s->clip[matrices + m] = clip_v;
    }
    s->rot.clip_k = s->clip;
    s->rot.clip_v = s->clip + matrices;
    s->n_bf16 = (g.sink + 63) / 64 + kvd_plane_ring(&g) / 64;
    s->n_codec = (uint32_t)(capacity / 64 + 1);
    s->bf16 = kseq_pages(s->n_bf16, kvd_page_bytes(&g, kvd_window_codec()));
    s->codec = kseq_pages(s->n_codec, kvd_page_bytes(&g, g.codec));
    s->at_bf16 = s->bf16;
    s->at_codec = s->codec;
    uint64_t rows = g.n_layers * capacity * g.kv_heads;
    s->k = malloc(rows * g.head_dim_k * 2);
    s->v = malloc(rows * g.head_dim_v * 2);
}

// A = P D Q and its inverse, P and Q random rotations, D falling from 1 to 1 / stretch. Not mixed:
// Q is the identity, as fits have it, where channels have deviations far apart.
static inline void kseq_transform(uint64_t *rng, uint32_t dim, double stretch, bool mixed, float *a,
                                  float *back)
{
    float *p = malloc(sizeof(float) * dim * dim), *q = calloc(dim * dim, sizeof(float));
    kseq_orthogonal(rng, dim, p);
    for (uint32_t i = 0; i < dim && !mixed; i++)
        q[i * dim + i] = 1;
    if (mixed)
        kseq_orthogonal(rng, dim, q);
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t j = 0; j < dim; j++) {
            double there = 0, here = 0;
            for (uint32_t c = 0; c < dim; c++) {
                double d = pow(stretch, -(double)c / (dim - 1));
                there += (double)p[i * dim + c] * d * q[c * dim + j];
                here += (double)q[c * dim + i] / d * p[j * dim + c];
            }
            a[i * dim + j] = (float)there;
            back[i * dim + j] = (float)here;
        }
    free(p);
    free(q);
}

static inline void kseq_skew_side(struct kseq *s, bool v, double stretch, bool mixed, float *a,
                                  float **back, float **mean)
{
    uint32_t dim = v ? s->g.head_dim_v : s->g.head_dim_k;
    uint64_t n = (uint64_t)s->rot.n_layers * s->rot.heads, square = (uint64_t)dim * dim;
    *back = malloc(sizeof(float) * n * square);
    *mean = malloc(sizeof(float) * n * dim);
    for (uint64_t m = 0; m < n; m++)
        kseq_transform(&s->rng, dim, stretch, mixed, a + m * square, *back + m * square);
    for (uint64_t i = 0; i < n * dim; i++)
        (*mean)[i] = (float)(2 * kseq_normal(&s->rng));
}

// Puts transforms that are not orthogonal, and means, in the place of the rotations.
static inline void kseq_skew(struct kseq *s, double stretch, bool mixed)
{
    kseq_skew_side(s, false, stretch, mixed, s->r_k, &s->back_k, &s->mean_k);
    kseq_skew_side(s, true, stretch, mixed, s->r_v, &s->back_v, &s->mean_v);
    s->rot.k_inverse = s->back_k;
    s->rot.v_inverse = s->back_v;
    s->rot.k_mean = s->mean_k;
    s->rot.v_mean = s->mean_v;
}

// Gives K's channels the deviations that they have after kseq_skew, about, and tiles bits of tc2's
// or tc2.5's sum in a random order.
static inline void kseq_code(struct kseq *s, double stretch, bool mixed)
{
    uint32_t dim = s->g.head_dim_k, tiles = dim / KVD_TC_TILE;
    uint64_t n = (uint64_t)s->rot.n_layers * s->rot.heads;
    s->sigma = malloc(sizeof(float) * n * dim);
    s->bits = calloc(n * tiles, sizeof(float));
    for (uint64_t i = 0; i < n * dim; i++)
        s->sigma[i] =
            (float)pow(stretch, mixed ? -kseq_uniform(&s->rng) : -(double)(i % dim) / (dim - 1));
    for (uint64_t m = 0; m < n; m++)
        for (uint32_t left = kvd_tc_stream_bits(s->g.codec.k, dim); left;) {
            float *b = s->bits + m * tiles + kvd_rand(&s->rng) % tiles;
            left -= *b < KVD_TC_MAX_BITS;
            *b += *b < KVD_TC_MAX_BITS;
        }
    s->rot.k_sigma = s->sigma;
    s->rot.k_bits = s->bits;
}

// How a side is coded in tc2 and tc2.5.
static inline struct kvd_tc_coder kseq_coder(const struct kseq *s, bool v, uint32_t layer,
                                             uint32_t head)
{
    uint32_t codec = kvd_codecs_side(s->g.codec, v), dim = s->g.head_dim_k;
    uint64_t at = (uint64_t)layer * s->rot.heads + (s->rot.heads == 1 ? 0 : head);
    if (!kvd_codec_tc(codec))
        return (struct kvd_tc_coder){0};
    return kvd_tc_coder_of(codec, v ? s->g.head_dim_v : dim, v,
                           s->sigma ? s->sigma + at * dim : NULL,
                           s->bits ? s->bits + at * (dim / KVD_TC_TILE) : NULL);
}

static inline void kseq_deinit(struct kseq *s)
{
    free(s->sigma);
    free(s->bits);
    free(s->back_k);
    free(s->back_v);
    free(s->mean_k);
    free(s->mean_v);
    for (uint32_t i = 0; i < s->n_bf16; i++)
        free((void *)(uintptr_t)s->bf16[i]);
    for (uint32_t i = 0; i < s->n_codec; i++)
        free((void *)(uintptr_t)s->codec[i]);
    free(s->bf16);
    free(s->codec);
    free(s->k);
    free(s->v);
    free(s->r_k);
    free(s->r_v);
    free(s->clip);
}

// Normal values, with a channel of large outliers as real keys have them.
KVD_REFERENCE static inline void kseq_fill(struct kseq *s)
{
    const struct kvd_plane *g = &s->g;
    uint64_t rows = g->n_layers * s->capacity * g->kv_heads;
    for (uint64_t i = 0; i < rows * g->head_dim_k; i++)
        s->k[i] = kvd_f32_to_bf16((float)(kseq_normal(&s->rng) * (i % g->head_dim_k == 5 ? 8 : 1)));
    for (uint64_t i = 0; i < rows * g->head_dim_v; i++)
        s->v[i] = kvd_f32_to_bf16((float)(kseq_normal(&s->rng) * (i % g->head_dim_v == 9 ? 5 : 1)));
}

// A tensor over [layers][capacity][heads][dim] that starts at a token.
static inline struct kvd_tensor kseq_tensor(void *data, enum kvd_dtype dtype, uint64_t tokens,
                                            uint32_t heads, uint32_t dim, uint64_t first)
{
    uint64_t size = dtype == KVD_DTYPE_F32 ? 4 : 2;
    struct kvd_tensor t = {.dtype = dtype,
                           .head_stride = dim * size,
                           .token_stride = heads * dim * size,
                           .layer_stride = tokens * heads * dim * size};
    t.data = (uint8_t *)data + first * t.token_stride;
    return t;
}

static inline uint64_t kseq_hist_end(const struct kvd_plane *g, uint64_t old, uint64_t length)
{
    uint64_t keep = (uint64_t)g->sink + g->recent;
    return length <= keep ? old : KVD_MAX(old, g->sink + (length - keep) / 16 * 16);
}

static inline void kseq_append(struct kseq *s, struct kvd_backend *b,
                               const struct kvd_rotation *rot, uint32_t n)
{
    const struct kvd_plane *g = &s->g;
    struct kvd_append_item item = {
        .pages = {s->at_bf16, s->at_codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .new_length = s->length + n,
        .new_hist_end = kseq_hist_end(g, s->hist_end, s->length + n),
        .k = kseq_tensor(s->k, KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_k, s->length),
        .v = kseq_tensor(s->v, KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_v, s->length),
    };
    struct kvd_append_params p = {
        .plane = g, .rotation = rot, .layer_count = g->n_layers, .items = &item, .n_items = 1};
    struct kvd_error err = {0};
    if (b->ops->append(b, &p, &err)) {
        fprintf(stderr, "append: %s\n", err.text);
        abort();
    }
    s->length = item.new_length;
    s->hist_end = item.new_hist_end;
}

static inline void kseq_truncate(struct kseq *s, uint64_t length)
{
    s->length = length;
    if (length < s->hist_end)
        s->hist_end = KVD_MAX(length, (uint64_t)s->g.sink);
}

static inline const float *kseq_matrix(const struct kseq *s, bool v, uint32_t layer, uint32_t head)
{
    const float *m = v ? s->r_v : s->r_k;
    uint32_t dim = v ? s->g.head_dim_v : s->g.head_dim_k;
    return m ? m + ((uint64_t)layer * s->rot.heads + (s->rot.heads == 1 ? 0 : head)) * dim * dim
             : NULL;
}

// x, turned, as it was before: out = x A^-1 + mean, in double.
static inline void kseq_back(const struct kseq *s, uint32_t layer, uint32_t head, bool v,
                             const float *x, double *out)
{
    uint32_t dim = v ? s->g.head_dim_v : s->g.head_dim_k;
    uint64_t at = (uint64_t)layer * s->rot.heads + (s->rot.heads == 1 ? 0 : head);
    const float *m = kseq_matrix(s, v, layer, head), *back = v ? s->back_v : s->back_k;
    const float *mean = v ? s->mean_v : s->mean_k;
    for (uint32_t i = 0; i < dim; i++) {
        double sum = m ? 0 : x[i];
        for (uint32_t j = 0; m && j < dim; j++)
            sum += (double)x[j] *
                   (back ? back[at * dim * dim + (uint64_t)j * dim + i] : m[(uint64_t)i * dim + j]);
        out[i] = sum + (mean ? mean[at * dim + i] : 0);
    }
}

// What the pages say of one token: original bf16 in the windows, dequantized and un-rotated (in
// double) in history.
KVD_REFERENCE static inline void kseq_truth(const struct kseq *s, uint64_t t, uint32_t layer,
                                            uint32_t head, bool v, double *out)
{
    const struct kvd_plane *g = &s->g;
    uint32_t dim = v ? g->head_dim_v : g->head_dim_k;
    bool history = t >= g->sink && t < s->hist_end;
    if (!history || kvd_codecs_side(g->codec, v) == KVD_CODEC_BF16) {
        const uint16_t *row =
            (v ? s->v : s->k) + (((uint64_t)layer * s->capacity + t) * g->kv_heads + head) * dim;
        for (uint32_t c = 0; c < dim; c++)
            out[c] = kvd_bf16_to_f32(row[c]);
        return;
    }
    const uint8_t *tile = (const uint8_t *)(uintptr_t)s->codec[(t - g->sink) / 64] +
                          kvd_tile_offset(g, g->codec, layer, head);
    float x[KVD_MAX_ROW];
    uint32_t row = (uint32_t)((t - g->sink) % 64);
    struct kvd_tc_coder tc = kseq_coder(s, v, layer, head);
    kvd_row_unpack(g->codec, tile, g->head_dim_k, g->head_dim_v, v, &tc, row, x);
    kseq_back(s, layer, head, v, x, out);
}

static inline double kseq_rel(const double *want, const float *got, uint64_t n)
{
    double d = 0, w = 0;
    for (uint64_t i = 0; i < n; i++) {
        d += (want[i] - got[i]) * (want[i] - got[i]);
        w += want[i] * want[i];
    }
    return sqrt(d / (w + 1e-300));
}

#endif
