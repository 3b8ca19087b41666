// Pages and expected outputs for decode.cu, by the CPU backend (its scalar reference).
#include "tests/unit/kernel_fixture.h"

struct cpu_case {
    uint32_t q_heads, kv_heads, sequences, sink, recent, rotations;
    const uint32_t *lengths;
    uint64_t seed;
};

struct cpu_result {
    uint32_t layer, codec_stride, bf16_stride, ring;
    uint64_t codec_page_bytes, bf16_page_bytes;
    uint64_t *codec, *bf16;
    uint32_t *hist_end;
    float *r_k, *r_vt;
    uint16_t *q;
    float *o, *lse;
    void *hidden;
};

void cpu_make(const struct cpu_case *c, struct cpu_result *r);
void cpu_free(struct cpu_result *r);

struct hidden {
    struct kseq *s;
    uint32_t n;
};

enum { LAYERS = 2, LAYER = 1, DIM = 128 };

static void attend(struct kvd_backend *b, const struct kvd_rotation *rot, struct kseq *s,
                   const struct cpu_case *c, struct cpu_result *r, uint32_t i)
{
    uint64_t row = (uint64_t)i * c->q_heads;
    for (uint64_t j = 0; j < (uint64_t)c->q_heads * DIM; j++)
        r->q[row * DIM + j] = kvd_f32_to_bf16((float)kseq_normal(&s->rng));
    struct kvd_attend_item item = {
        .pages = {s->bf16, s->codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .q_len = 1,
        .q = kseq_tensor(r->q + row * DIM, KVD_DTYPE_BF16, 1, c->q_heads, DIM, 0),
        .o = kseq_tensor(r->o + row * DIM, KVD_DTYPE_F32, 1, c->q_heads, DIM, 0),
        .lse = kseq_tensor(r->lse + row, KVD_DTYPE_F32, 1, c->q_heads, 1, 0),
    };
    struct kvd_attend_params p = {.geometry = &s->g,
                                  .rotation = rot,
                                  .layer_begin = LAYER,
                                  .layer_count = 1,
                                  .scale = 1 / sqrtf(DIM),
                                  .items = &item,
                                  .n_items = 1};
    b->ops->attend(b, &p, NULL);
}

static void copy_matrices(const struct kseq *s, uint32_t heads, struct cpu_result *r)
{
    uint64_t n = (uint64_t)heads * DIM * DIM;
    r->r_k = malloc(n * sizeof(float));
    r->r_vt = malloc(n * sizeof(float));
    memcpy(r->r_k, s->r_k + LAYER * n, n * sizeof(float));
    for (uint64_t h = 0; h < heads; h++)
        for (uint32_t i = 0; i < DIM; i++)
            for (uint32_t j = 0; j < DIM; j++)
                r->r_vt[(h * DIM + j) * DIM + i] = s->r_v[LAYER * n + (h * DIM + i) * DIM + j];
}

void cpu_make(const struct cpu_case *c, struct cpu_result *r)
{
    struct kvd_error err = {0};
    struct kvd_backend *b = kvd_cpu_backend_new(0, NULL, &err);
    struct kvd_geometry g = {.n_layers = LAYERS,
                             .layers = {0, 1},
                             .q_heads = c->q_heads,
                             .kv_heads = c->kv_heads,
                             .head_dim_k = DIM,
                             .head_dim_v = DIM,
                             .codec = KVD_CODEC_INT2,
                             .sink = c->sink,
                             .recent = c->recent};
    uint32_t longest = 1;
    for (uint32_t i = 0; i < c->sequences; i++)
        longest = KVD_MAX(longest, c->lengths[i]);
    struct hidden *h = calloc(1, sizeof(*h));
    h->s = calloc(c->sequences, sizeof(*h->s));
    h->n = c->sequences;
    uint64_t rows = (uint64_t)c->sequences * c->q_heads;
    *r = (struct cpu_result){.layer = LAYER,
                             .codec_stride = longest / 64 + 1,
                             .bf16_stride = (c->sink + 63) / 64 + kvd_geometry_ring(&g) / 64,
                             .ring = kvd_geometry_ring(&g),
                             .codec_page_bytes = kvd_page_bytes(&g, KVD_CODEC_INT2),
                             .bf16_page_bytes = kvd_page_bytes(&g, KVD_CODEC_BF16),
                             .hidden = h};
    r->codec = calloc((uint64_t)c->sequences * r->codec_stride, sizeof(uint64_t));
    r->bf16 = calloc((uint64_t)c->sequences * r->bf16_stride, sizeof(uint64_t));
    r->hist_end = calloc(c->sequences, sizeof(uint32_t));
    r->q = malloc(rows * DIM * 2);
    r->o = malloc(rows * DIM * sizeof(float));
    r->lse = malloc(rows * sizeof(float));
    for (uint32_t i = 0; i < c->sequences; i++) {
        struct kseq *s = &h->s[i];
        kseq_init(s, g, c->lengths[i], c->rotations, 0.96f, 0.92f,
                  c->seed | 1); // one seed: one set of rotations
        s->rng += i;
        kseq_fill(s);
        struct kvd_rotation *rot = b->ops->rotation_new(b, &s->rot, &err);
        while (s->length < c->lengths[i])
            kseq_append(s, b, rot, (uint32_t)KVD_MIN(c->lengths[i] - s->length, (uint64_t)333));
        attend(b, rot, s, c, r, i);
        b->ops->rotation_free(b, &rot);
        memcpy(r->codec + (uint64_t)i * r->codec_stride, s->codec,
               KVD_MIN(s->n_codec, r->codec_stride) * sizeof(uint64_t));
        memcpy(r->bf16 + (uint64_t)i * r->bf16_stride, s->bf16, s->n_bf16 * sizeof(uint64_t));
        r->hist_end[i] = (uint32_t)s->hist_end;
    }
    if (c->rotations)
        copy_matrices(&h->s[0], c->rotations, r);
    kvd_backend_free(&b);
}

void cpu_free(struct cpu_result *r)
{
    struct hidden *h = r->hidden;
    for (uint32_t i = 0; i < h->n; i++)
        kseq_deinit(&h->s[i]);
    free(h->s);
    free(h);
    free(r->codec);
    free(r->bf16);
    free(r->hist_end);
    free(r->r_k);
    free(r->r_vt);
    free(r->q);
    free(r->o);
    free(r->lse);
}
