// Sequences of latents (MLA), shapes of attention over them, and very long ones: for the tests of
// both backends.
#ifndef KVD_TESTS_KERNEL_LATENT_H
#define KVD_TESTS_KERNEL_LATENT_H

#include "tests/unit/kernel_truth.h"

enum { ROPE = 64, LATENT = 512 };

// The codecs that a latent can have.
static inline bool latent_codec(uint32_t codec)
{
    return !kvd_codec_tc(codec);
}

// Making one takes half a second.
static inline const float *latent_rotation(uint64_t seed)
{
    static float *m;
    if (!m) {
        uint64_t rng = seed;
        m = malloc(sizeof(float) * LATENT * LATENT);
        kseq_orthogonal(&rng, LATENT, m);
    }
    return m;
}

// A sequence whose set is a rotation of the latent by layers, or, with `skewed`, A = R D and its
// inverse, and means.
KVD_REFERENCE static inline void latent_init(struct kseq *s, struct kvd_plane g, uint64_t capacity,
                                             bool skewed, uint64_t seed)
{
    const float *r = latent_rotation(seed);
    kseq_init(s, g, capacity, 0, 0.96f, 0.92f, seed);
    s->r_v = malloc(sizeof(float) * g.n_layers * LATENT * LATENT);
    s->back_v = skewed ? malloc(sizeof(float) * g.n_layers * LATENT * LATENT) : NULL;
    s->mean_v = skewed ? malloc(sizeof(float) * g.n_layers * LATENT) : NULL;
    for (uint32_t l = 0; l < g.n_layers; l++)
        for (uint32_t i = 0; i < LATENT; i++) {
            if (skewed)
                s->mean_v[l * LATENT + i] = (float)(2 * kseq_normal(&s->rng));
            for (uint32_t j = 0; j < LATENT; j++) {
                uint64_t at = ((uint64_t)l * LATENT + i) * LATENT + j;
                // Layers have their columns in different orders.
                uint32_t from = (j + 7 * l) % LATENT, back = (i + 7 * l) % LATENT;
                double d = skewed ? pow(8, -(double)j / (LATENT - 1)) : 1;
                s->r_v[at] = (float)(r[i * LATENT + from] * d);
                if (skewed)
                    s->back_v[at] =
                        (float)(r[j * LATENT + back] / pow(8, -(double)i / (LATENT - 1)));
            }
        }
    s->rot.v = s->r_v;
    s->rot.v_inverse = s->back_v;
    s->rot.v_mean = s->mean_v;
    kseq_fill(s);
}

struct latent_shape {
    uint32_t layers, heads, sink, recent, length;
    struct attention a;
};

static const struct latent_shape latent_shapes[] = {
    {1, 1, 64, 64, 300, {.q_len = 1}},
    {1, 16, 64, 64, 401, {.q_len = 1}},
    {2, 128, 64, 64, 333, {.q_len = 1}},
    {1, 64, 0, 0, 190, {.q_len = 1}},
    {1, 20, 16, 32, 277, {.q_len = 3}},
    {1, 128, 64, 128, 60, {.q_len = 1}},
    {1, 16, 64, 64, 1, {.q_len = 1}},
    {1, 3, 64, 64, 350, {.q_len = 37, .new_tokens = 37}},
    {1, 16, 0, 64, 0, {.q_len = 50, .new_tokens = 50}},
    {1, 33, 64, 64, 700, {.q_len = 5, .window = 200, .softcap = 20}},
    {1, 16, 0, 0, 500, {.q_len = 4, .window = 70}},
    {1, 128, 48, 16, 301, {.q_len = 2, .sinks = true}},
    {1, 17, 64, 64, 2600, {.q_len = 1}},
    {1, 5, 64, 64, 200, {.q_len = 200}},
};

// Pages drawn at random, over and over again up to `tokens`, and attention over them in float64.
struct longer {
    struct kvd_plane g;
    uint32_t pages;  // that differ
    uint64_t tokens; // a multiple of theirs
    uint8_t *bytes;
    uint64_t *table;
    float *q;
    double *o, *lse;
    uint64_t rng;
};

static inline void longer_init(struct longer *x, uint32_t codec, uint32_t heads, uint32_t pages,
                               uint64_t repeats, uint64_t seed)
{
    *x = (struct longer){.g = latent_plane(1, heads, codec, 0, 0),
                         .pages = pages,
                         .tokens = pages * repeats * KVD_PAGE_TOKENS,
                         .rng = seed};
    uint64_t size = kvd_page_bytes(&x->g, x->g.codec), n = x->tokens / KVD_PAGE_TOKENS;
    uint32_t dim = kvd_plane_dim_q(&x->g), own = pages * KVD_PAGE_TOKENS;
    double *l = calloc(heads, sizeof(*l));
    struct kvd_quantizer q = {.codec = codec, .ratio = 1, .gain = 1};
    x->bytes = malloc(pages * size);
    x->table = malloc(n * sizeof(*x->table));
    x->q = malloc(sizeof(float) * heads * dim);
    x->o = calloc((uint64_t)heads * LATENT, sizeof(*x->o));
    x->lse = malloc(heads * sizeof(*x->lse));
    for (uint64_t i = 0; i < n; i++)
        x->table[i] = (uint64_t)(uintptr_t)x->bytes + i % pages * size;
    for (uint32_t i = 0; i < heads * dim; i++)
        x->q[i] = (float)kseq_normal(&x->rng);
    for (uint32_t t = 0; t < own; t++) {
        uint8_t *tile = x->bytes + t / KVD_PAGE_TOKENS * size;
        uint32_t at = t % KVD_PAGE_TOKENS;
        float latent[LATENT];
        uint16_t rope[ROPE], half[LATENT];
        for (uint32_t c = 0; c < ROPE; c++)
            rope[c] = kvd_f32_to_bf16((float)kseq_normal(&x->rng));
        for (uint32_t c = 0; c < LATENT; c++) {
            half[c] = kvd_f32_to_bf16((float)kseq_normal(&x->rng));
            latent[c] = kvd_bf16_to_f32(half[c]);
        }
        memcpy(tile + at * sizeof(rope), rope, sizeof(rope));
        if (codec == KVD_CODEC_BF16) {
            memcpy(tile + kvd_codes_offset(x->g.codec, ROPE, true) + at * sizeof(half), half,
                   sizeof(half));
        } else {
            struct kvd_row row;
            kvd_row_quantize(&q, latent, LATENT, &row);
            kvd_row_pack(x->g.codec, tile, ROPE, LATENT, true, NULL, at, &row);
            kvd_row_unpack(x->g.codec, tile, ROPE, LATENT, true, NULL, at, latent);
        }
        for (uint32_t h = 0; h < heads; h++) {
            double dot[4] = {0};
            for (uint32_t c = 0; c < LATENT; c++)
                dot[c % 4] += (double)latent[c] * x->q[h * dim + c];
            for (uint32_t c = 0; c < ROPE; c++)
                dot[c % 4] += (double)kvd_bf16_to_f32(rope[c]) * x->q[h * dim + LATENT + c];
            double p = exp((dot[0] + dot[1] + dot[2] + dot[3]) * test_scale(&x->g));
            l[h] += p;
            for (uint32_t c = 0; c < LATENT; c++)
                x->o[h * LATENT + c] += p * latent[c];
        }
    }
    for (uint32_t i = 0; i < heads * LATENT; i++)
        x->o[i] /= l[i / LATENT];
    for (uint32_t h = 0; h < heads; h++)
        x->lse[h] = log(l[h] * (double)repeats);
    free(l);
}

static inline void longer_deinit(struct longer *x)
{
    free(x->bytes);
    free(x->table);
    free(x->q);
    free(x->o);
    free(x->lse);
}

// The distance from float64 of a backend that has the pages at `table`.
static inline struct attention_errors longer_error(const struct longer *x, struct kvd_backend *b,
                                                   const uint64_t *table)
{
    uint32_t heads = x->g.q_heads, dim = kvd_plane_dim_q(&x->g);
    uint64_t none[4] = {0};
    struct attention_errors e = {0};
    struct kvd_error err = {0};
    struct kvd_rotation_data identity = {.n_layers = 1, .heads = 1, .dim_k = ROPE, .dim_v = LATENT};
    struct kvd_rotation *rot = b->ops->rotation_new(b, &identity, NULL);
    float *o = malloc(sizeof(float) * heads * LATENT), *lse = malloc(sizeof(float) * heads);
    memset(o, 0xff, sizeof(float) * heads * LATENT);
    memset(lse, 0xff, sizeof(float) * heads);
    struct kvd_attend_item item = {.pages = {none, table},
                                   .length = x->tokens,
                                   .hist_end = x->tokens,
                                   .q_len = 1,
                                   .q = kseq_tensor(x->q, KVD_DTYPE_F32, 1, heads, dim, 0),
                                   .o = kseq_tensor(o, KVD_DTYPE_F32, 1, heads, LATENT, 0),
                                   .lse = kseq_tensor(lse, KVD_DTYPE_F32, 1, heads, 1, 0)};
    struct kvd_attend_params p = {.plane = &x->g,
                                  .rotation = rot,
                                  .layer_count = 1,
                                  .scale = test_scale(&x->g),
                                  .items = &item,
                                  .n_items = 1};
    if (b->ops->attend(b, &p, &err)) {
        fprintf(stderr, "attend: %s\n", err.text);
        abort();
    }
    for (uint32_t h = 0; h < heads; h++) {
        double off = kseq_rel(x->o + h * LATENT, o + h * LATENT, LATENT);
        e.worst = fmax(e.worst, isnan(off) ? INFINITY : off);
        e.lse = fmax(e.lse, isnan(lse[h]) ? INFINITY : fabs(x->lse[h] - lse[h]));
    }
    free(o);
    free(lse);
    b->ops->rotation_free(b, &rot);
    return e;
}

#endif
