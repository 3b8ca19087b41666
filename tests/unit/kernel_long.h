// A very long sequence of one kv head, whose pages are drawn at random instead of quantized, and
// attention over it in float64 as a stream. For kernel tests: errors that grow with the tokens.
#ifndef KVD_TESTS_KERNEL_LONG_H
#define KVD_TESTS_KERNEL_LONG_H

#include "tests/unit/kernel_truth.h"

enum { LONG_ROWS = 64 }; // query rows, at most

struct long_seq {
    struct kvd_plane g;
    uint64_t tokens; // all of them in history
    uint64_t n_pages, bytes;
    uint8_t *pages;
    uint64_t *table; // addresses of pages where the backend has them
    uint64_t rng;
};

static inline uint16_t long_fp16(uint64_t *rng, double mean, double spread)
{
    return kvd_f32_to_fp16((float)(mean + spread * (kseq_uniform(rng) - 0.5)));
}

// Parameters of a token, so that values are about normal: of mean near 0, deviation near 1.
static inline uint32_t long_param(uint32_t codec, uint64_t *rng)
{
    if (codec == KVD_CODEC_INT2C)
        return (uint32_t)(127 + kvd_rand(rng) % 3) | (uint32_t)((kvd_rand(rng) % 3 - 1) & 255) << 8;
    // Levels that are codes spread with their number; those of a table are of deviation 1.
    double top = (1 << kvd_codec_bits(codec)) - 1, spread = kvd_codec_signed(codec) ? 1 : 3 / top;
    uint32_t scale = long_fp16(rng, 0.9 * spread, 0.4 * spread);
    if (kvd_codec_param_bytes(codec) == 2)
        return scale;
    double middle = kvd_codec_signed(codec) ? 0 : top / 2;
    double centre = -middle * kvd_fp16_to_f32((uint16_t)scale);
    return scale | (uint32_t)long_fp16(rng, centre, 0.2) << 16;
}

// A tile's side in bf16.
static inline void long_rows(struct long_seq *s, uint8_t *rows, uint32_t dim)
{
    for (uint64_t i = 0; i < (uint64_t)KVD_PAGE_TOKENS * dim * 2; i += 2) {
        uint64_t x = kvd_rand(&s->rng);
        double sum = 0;
        for (int k = 0; k < 4; k++)
            sum += (double)(x >> 16 * k & 0xffff) / 65536 - 0.5;
        uint16_t b = kvd_f32_to_bf16((float)(sum * 1.7));
        memcpy(rows + i, &b, 2);
    }
}

static inline void long_tile(struct long_seq *s, uint8_t *tile)
{
    const struct kvd_plane *g = &s->g;
    uint64_t bytes = kvd_tile_bytes(g->codec, g->head_dim_k, g->head_dim_v);
    for (uint64_t i = 0; i < bytes; i += 8) {
        uint64_t x = kvd_rand(&s->rng);
        memcpy(tile + i, &x, 8);
    }
    for (uint32_t i = 0; i < 2 * KVD_PAGE_TOKENS; i++) {
        bool v = i >= KVD_PAGE_TOKENS;
        uint32_t codec = kvd_codecs_side(g->codec, v), size = kvd_codec_param_bytes(codec);
        if (codec == KVD_CODEC_BF16)
            continue;
        uint32_t param = long_param(codec, &s->rng);
        memcpy(tile + kvd_params_offset(g->codec, g->head_dim_k, g->head_dim_v, v) +
                   (uint64_t)kvd_param_index(i % KVD_PAGE_TOKENS) * size,
               &param, size);
    }
    for (int v = 0; v < 2; v++)
        if (kvd_codecs_side(g->codec, v) == KVD_CODEC_BF16)
            long_rows(s, tile + kvd_codes_offset(g->codec, g->head_dim_k, v),
                      v ? g->head_dim_v : g->head_dim_k);
}

static inline void long_init(struct long_seq *s, struct kvd_codecs codec, uint32_t group,
                             uint32_t dim, uint64_t tokens, uint64_t seed)
{
    *s = (struct long_seq){
        .g = test_plane_of(1, 1, group, dim, dim, codec, 0, 0), .tokens = tokens, .rng = seed};
    s->n_pages = kvd_div_up(tokens, KVD_PAGE_TOKENS);
    s->bytes = s->n_pages * kvd_page_bytes(&s->g, s->g.codec);
    s->pages = malloc(s->bytes);
    s->table = malloc(s->n_pages * sizeof(*s->table));
    for (uint64_t i = 0; i < s->n_pages; i++) {
        uint8_t *tile = s->pages + i * kvd_page_bytes(&s->g, s->g.codec);
        s->table[i] = (uint64_t)(uintptr_t)tile;
        long_tile(s, tile);
    }
}

static inline void long_deinit(struct long_seq *s)
{
    free(s->pages);
    free(s->table);
}

static inline void long_row(const struct long_seq *s, uint64_t t, bool v, float *x)
{
    const struct kvd_plane *g = &s->g;
    uint32_t dim = v ? g->head_dim_v : g->head_dim_k, row = (uint32_t)(t % KVD_PAGE_TOKENS);
    const uint8_t *tile = s->pages + t / KVD_PAGE_TOKENS * kvd_page_bytes(g, g->codec);
    uint32_t codec = kvd_codecs_side(g->codec, v);
    if (codec != KVD_CODEC_BF16) {
        struct kvd_tc_coder tc = {0};
        if (kvd_codec_tc(codec))
            tc = kvd_tc_coder_of(codec, dim, v, NULL, NULL);
        kvd_row_unpack(g->codec, tile, g->head_dim_k, g->head_dim_v, v, &tc, row, x);
        return;
    }
    tile += kvd_codes_offset(g->codec, g->head_dim_k, v);
    for (uint32_t c = 0; c < dim; c++) {
        uint16_t b;
        memcpy(&b, tile + ((uint64_t)row * dim + c) * 2, 2);
        x[c] = kvd_bf16_to_f32(b);
    }
}

// Queries, [q_len][q_heads][dim], and what attention gives for them.
struct long_truth {
    struct attention a;
    uint32_t rows;
    float q[LONG_ROWS * KVD_MAX_HEAD_DIM];
    double o[LONG_ROWS * KVD_MAX_HEAD_DIM], lse[LONG_ROWS];
};

KVD_REFERENCE static inline double long_logit(const struct long_truth *x, uint32_t r,
                                              const float *k, uint32_t dim)
{
    double sum[4] = {0}; // side by side: half of the time is spent here
    for (uint32_t c = 0; c < dim; c++)
        sum[c % 4] += (double)k[c] * x->q[r * dim + c];
    double dot = (sum[0] + sum[1] + sum[2] + sum[3]) / sqrt(dim);
    return x->a.softcap > 0 ? x->a.softcap * tanh(dot / x->a.softcap) : dot;
}

// Logits of such pages are small: no maximum is needed.
KVD_REFERENCE static inline struct long_truth *long_truth(struct long_seq *s, struct attention a)
{
    uint32_t dim = s->g.head_dim_k, group = s->g.q_heads;
    struct long_truth *x = calloc(1, sizeof(*x));
    double l[LONG_ROWS] = {0};
    float k[KVD_MAX_HEAD_DIM], v[KVD_MAX_HEAD_DIM];
    x->a = a;
    x->rows = a.q_len * group;
    for (uint32_t i = 0; i < x->rows * dim; i++)
        x->q[i] = (float)kseq_normal(&s->rng);
    for (uint64_t t = 0; t < s->tokens; t++) {
        long_row(s, t, false, k);
        long_row(s, t, true, v);
        for (uint32_t r = 0; r < x->rows; r++) {
            uint64_t pos = s->tokens - a.q_len + r / group;
            if (t > pos || (a.window && t + a.window <= pos))
                continue;
            double p = exp(long_logit(x, r, k, dim));
            l[r] += p;
            for (uint32_t c = 0; c < dim; c++)
                x->o[r * dim + c] += p * v[c];
        }
    }
    for (uint32_t i = 0; i < x->rows * dim; i++)
        x->o[i] /= l[i / dim];
    for (uint32_t r = 0; r < x->rows; r++)
        x->lse[r] = log(l[r]);
    return x;
}

// Infinite where an output is not a number.
static inline double long_rel(const double *want, const float *got, uint64_t n)
{
    double e = kseq_rel(want, got, n);
    return isnan(e) ? INFINITY : e;
}

// `copies` sequences of the same pages and queries in one call; the worst of them.
static inline struct attention_errors long_error(const struct long_seq *s,
                                                 const struct long_truth *x, struct kvd_backend *b,
                                                 const struct kvd_rotation *rot, uint32_t copies)
{
    const struct kvd_plane *g = &s->g;
    uint32_t dim = g->head_dim_k;
    uint64_t no_window[4] = {0}, size = (uint64_t)x->rows * dim;
    float *o = malloc(copies * size * sizeof(*o)), *lse = malloc(copies * x->rows * sizeof(*lse));
    struct kvd_attend_item *items = calloc(copies, sizeof(*items));
    memset(o, 0xff, copies * size * sizeof(*o));
    memset(lse, 0xff, copies * x->rows * sizeof(*lse));
    for (uint32_t i = 0; i < copies; i++)
        items[i] = (struct kvd_attend_item){
            .pages = {no_window, s->table},
            .length = s->tokens,
            .hist_end = s->tokens,
            .q_len = x->a.q_len,
            .q =
                kseq_tensor((void *)(uintptr_t)x->q, KVD_DTYPE_F32, x->a.q_len, g->q_heads, dim, 0),
            .o = kseq_tensor(o + i * size, KVD_DTYPE_F32, x->a.q_len, g->q_heads, dim, 0),
            .lse = kseq_tensor(lse + (uint64_t)i * x->rows, KVD_DTYPE_F32, x->a.q_len, g->q_heads,
                               1, 0)};
    struct kvd_attend_params p = {.plane = g,
                                  .rotation = rot,
                                  .layer_count = 1,
                                  .scale = 1 / sqrtf((float)dim),
                                  .softcap = x->a.softcap,
                                  .window = x->a.window,
                                  .items = items,
                                  .n_items = copies};
    struct kvd_error err = {0};
    struct attention_errors e = {0};
    if (b->ops->attend(b, &p, &err)) {
        fprintf(stderr, "attend: %s\n", err.text);
        abort();
    }
    for (uint32_t i = 0; i < copies; i++) {
        e.overall = fmax(e.overall, long_rel(x->o, o + i * size, size));
        for (uint32_t r = 0; r < x->rows; r++) {
            uint64_t row = i * x->rows + r;
            e.worst = fmax(e.worst, long_rel(x->o + r * dim, o + row * dim, dim));
            e.lse = fmax(e.lse, isnan(lse[row]) ? INFINITY : fabs(x->lse[r] - lse[row]));
        }
    }
    free(items);
    free(o);
    free(lse);
    return e;
}

#endif
