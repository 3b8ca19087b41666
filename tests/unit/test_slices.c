// Operations in slices: the same bytes as in one go, whenever a slice ends and whatever runs
// between.
#include "tests/unit/suite.h"

#include <stdatomic.h>

#include "tests/unit/kernel_truth.h"

// A slice that is over at random: after n asks, 0 to 99.
struct cut {
    struct kvd_slice slice;
    _Atomic int64_t asks;
    uint64_t rng;
    uint32_t slices;
};

static bool over(const struct kvd_slice *s)
{
    struct cut *c = (void *)(uintptr_t)s; // it is the first member
    return atomic_fetch_sub(&c->asks, 1) <= 0;
}

static struct kvd_slice *cut_init(struct cut *c, uint64_t seed)
{
    *c = (struct cut){.slice.over = over, .rng = seed};
    return &c->slice;
}

// True while there is more to do.
static bool again(struct cut *c)
{
    bool first = c->slices++ == 0;
    ck_assert_uint_lt(c->slices, 1000000);
    atomic_store(&c->asks, (int64_t)(kvd_rand(&c->rng) % 100));
    return first || c->slice.more;
}

static struct kvd_append_item next_append(const struct kseq *s, uint32_t n)
{
    return (struct kvd_append_item){.pages = {s->at_bf16, s->at_codec},
                                    .length = s->length,
                                    .hist_end = s->hist_end,
                                    .new_length = s->length + n,
                                    .new_hist_end =
                                        kseq_hist_end(&s->g, s->hist_end, s->length + n),
                                    .k = kseq_tensor(s->k, KVD_DTYPE_BF16, s->capacity,
                                                     s->g.kv_heads, s->g.head_dim_k, s->length),
                                    .v = kseq_tensor(s->v, KVD_DTYPE_BF16, s->capacity,
                                                     s->g.kv_heads, s->g.head_dim_v, s->length)};
}

static void check_same_pages(const struct kseq *a, const struct kseq *b)
{
    for (uint32_t i = 0; i < a->n_bf16; i++)
        ck_assert_mem_eq((void *)(uintptr_t)a->bf16[i], (void *)(uintptr_t)b->bf16[i],
                         kvd_page_bytes(&a->g, kvd_window_codec()));
    for (uint32_t i = 0; i < a->n_codec; i++)
        ck_assert_mem_eq((void *)(uintptr_t)a->codec[i], (void *)(uintptr_t)b->codec[i],
                         kvd_page_bytes(&a->g, a->g.codec));
}

static void read_all(struct kseq *s, struct kvd_backend *b, const struct kvd_rotation *rot,
                     float *k, float *v)
{
    const struct kvd_plane *g = &s->g;
    struct kvd_read_params p = {
        .plane = g,
        .rotation = rot,
        .layer_count = g->n_layers,
        .pages = {s->at_bf16, s->at_codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .tokens = (uint32_t)s->length,
        .k = kseq_tensor(k, KVD_DTYPE_F32, s->length, g->kv_heads, g->head_dim_k, 0),
        .v = kseq_tensor(v, KVD_DTYPE_F32, s->length, g->kv_heads, g->head_dim_v, 0)};
    if (s->length)
        ck_assert_int_eq(b->ops->read(b, &p, NULL), 0);
}

static void check_same_contents(struct kseq *a, struct kseq *b, struct kvd_backend *backend,
                                const struct kvd_rotation *rot)
{
    uint64_t n = a->g.n_layers * a->length * a->g.kv_heads;
    float *k[2], *v[2];
    ck_assert_uint_eq(a->length, b->length);
    for (int i = 0; i < 2; i++) {
        k[i] = malloc(n * a->g.head_dim_k * sizeof(float) + 1);
        v[i] = malloc(n * a->g.head_dim_v * sizeof(float) + 1);
        read_all(i ? b : a, backend, rot, k[i], v[i]);
    }
    ck_assert_mem_eq(k[0], k[1], n * a->g.head_dim_k * sizeof(float));
    ck_assert_mem_eq(v[0], v[1], n * a->g.head_dim_v * sizeof(float));
    for (int i = 0; i < 2; i++) {
        free(k[i]);
        free(v[i]);
    }
}

// A part of an append in slices, or the first `most` of them. Whether it is done.
static bool append_part(struct kvd_backend *b, struct kvd_append_params *p,
                        enum kvd_append_part part, uint64_t seed, uint32_t most)
{
    struct cut c;
    p->part = part;
    p->slice = cut_init(&c, seed);
    while (c.slices < most && again(&c))
        ck_assert_int_eq(b->ops->append(b, p, NULL), 0);
    return c.slices && !c.slice.more;
}

// Grows b as a was grown, but in slices, and after it has been given up once. The first part leaves
// its window, and what it has of history, as they were.
static void append_sliced(struct kseq *a, struct kseq *b, struct kvd_backend *backend,
                          const struct kvd_rotation *rot, uint32_t n)
{
    struct cut looks;
    struct kvd_append_item item = next_append(b, n);
    struct kvd_append_params p = {.plane = &b->g,
                                  .rotation = rot,
                                  .layer_count = b->g.n_layers,
                                  .items = &item,
                                  .n_items = 1,
                                  .slice = cut_init(&looks, kvd_rand(&b->rng) | 1)};
    struct kvd_nonfinite at;
    while (again(&looks))
        ck_assert_int_eq(backend->ops->check(backend, &p, &at), 0);
    uint64_t bytes = kvd_page_bytes(&b->g, kvd_window_codec());
    uint8_t *window = malloc(b->n_bf16 * bytes);
    for (uint32_t i = 0; i < b->n_bf16; i++)
        memcpy(window + i * bytes, (void *)(uintptr_t)b->bf16[i], bytes);
    append_part(backend, &p, KVD_APPEND_DEMOTE, kvd_rand(&b->rng) | 1,
                (uint32_t)(kvd_rand(&b->rng) % 8));
    for (uint32_t i = 0; i < b->n_bf16; i++)
        ck_assert_mem_eq(window + i * bytes, (void *)(uintptr_t)b->bf16[i], bytes);
    check_same_contents(a, b, backend, rot);
    ck_assert(append_part(backend, &p, KVD_APPEND_DEMOTE, kvd_rand(&b->rng) | 1, UINT32_MAX));
    for (uint32_t i = 0; i < b->n_bf16; i++)
        ck_assert_mem_eq(window + i * bytes, (void *)(uintptr_t)b->bf16[i], bytes);
    ck_assert(append_part(backend, &p, KVD_APPEND_STORE, kvd_rand(&b->rng) | 1, UINT32_MAX));
    free(window);
    b->length = item.new_length;
    b->hist_end = item.new_hist_end;
    kseq_append(a, backend, rot, n);
    check_same_pages(a, b);
}

static void attend_sliced(struct kseq *s, struct kvd_backend *b, const struct kvd_rotation *rot,
                          uint32_t q_len, bool fresh)
{
    const struct kvd_plane *g = &s->g;
    uint64_t rows = (uint64_t)g->n_layers * q_len * g->q_heads, bytes = rows * g->head_dim_v * 4;
    uint32_t dim = kvd_plane_dim_q(g);
    float *q = malloc(rows * dim * 4);
    for (uint64_t i = 0; i < rows * dim; i++)
        q[i] = (float)kseq_normal(&s->rng);
    float *o[3], *lse[3];
    struct kvd_attend_item item[3];
    struct kvd_attend_params p[3];
    struct cut c[3];
    for (int i = 0; i < 3; i++) {
        o[i] = malloc(bytes);
        lse[i] = malloc(rows * 4);
        item[i] = (struct kvd_attend_item){
            .pages = {s->at_bf16, s->at_codec},
            .length = s->length,
            .hist_end = s->hist_end,
            .q_len = q_len,
            .new_tokens = fresh ? q_len : 0,
            .q = kseq_tensor(q, KVD_DTYPE_F32, q_len, g->q_heads, dim, 0),
            .k = kseq_tensor(s->k, KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_k, 0),
            .v = kseq_tensor(s->v, KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_v, 0),
            .o = kseq_tensor(o[i], KVD_DTYPE_F32, q_len, g->q_heads, g->head_dim_v, 0),
            .lse = kseq_tensor(lse[i], KVD_DTYPE_F32, q_len, g->q_heads, 1, 0)};
        p[i] = (struct kvd_attend_params){.plane = g,
                                          .rotation = rot,
                                          .layer_count = g->n_layers,
                                          .scale = 0.1f,
                                          .items = &item[i],
                                          .n_items = 1,
                                          .slice = i ? cut_init(&c[i], s->rng + i) : NULL};
    }
    ck_assert_int_eq(b->ops->attend(b, &p[0], NULL), 0);
    bool more[3] = {false, true, true}; // two of them take turns
    while (more[1] || more[2])
        for (int i = 1; i < 3; i++)
            if (more[i] && (more[i] = again(&c[i])))
                ck_assert_int_eq(b->ops->attend(b, &p[i], NULL), 0);
    for (int i = 1; i < 3; i++) {
        ck_assert_mem_eq(o[0], o[i], bytes);
        ck_assert_mem_eq(lse[0], lse[i], rows * 4);
        free(c[i].slice.state);
    }
    for (int i = 0; i < 3; i++) {
        free(o[i]);
        free(lse[i]);
    }
    free(q);
}

START_TEST(appends_and_attention_in_slices_are_the_same)
{
    uint64_t seed = kvd_test_seed("slices");
    for (uint32_t i = 0, rounds = kvd_test_rounds(12); i < rounds; i++) {
        uint64_t r = seed + 2 * i;
        uint32_t codec = (uint32_t)(kvd_rand(&r) % KVD_CODEC_COUNT), threads = 1 + i % 4;
        struct kvd_plane g = test_plane(1 + (uint32_t)(kvd_rand(&r) % 3), 1 + i % 2,
                                        1 + (uint32_t)(kvd_rand(&r) % 5), 64, 64, codec,
                                        16 * (uint32_t)(kvd_rand(&r) % 5), 64);
        if (i + 1 == rounds)
            g = latent_plane(2, 35, KVD_CODEC_INT2, 48, 64);
        struct kvd_backend *b = kvd_cpu_backend_new(threads, NULL, NULL);
        struct kseq s[2];
        for (int j = 0; j < 2; j++) {
            kseq_init(&s[j], g, 3000, 1, 0.96f, 0.92f, seed + i);
            kseq_fill(&s[j]);
        }
        struct kvd_rotation *rot = b->ops->rotation_new(b, &s[0].rot, NULL);
        while (s[0].length < 2000)
            append_sliced(&s[0], &s[1], b, rot, 1 + (uint32_t)(kvd_rand(&r) % 700));
        attend_sliced(&s[0], b, rot, 1 + (uint32_t)(kvd_rand(&r) % 40), false);
        attend_sliced(&s[0], b, rot, 1 + (uint32_t)(kvd_rand(&r) % 40), true);
        b->ops->rotation_free(b, &rot);
        for (int j = 0; j < 2; j++)
            kseq_deinit(&s[j]);
        kvd_backend_free(&b);
    }
}
END_TEST

START_TEST(reads_and_rotations_in_slices_are_the_same)
{
    struct kvd_backend *b = kvd_cpu_backend_new(3, NULL, NULL);
    struct kseq s;
    kseq_init(&s, test_plane(2, 2, 2, 64, 64, KVD_CODEC_INT2, 64, 64), 900, 2, 0.96f, 0.92f, 77);
    kseq_fill(&s);
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s.rot, NULL);
    kseq_append(&s, b, rot, 900);
    enum { N = 2 * 900 * 2 * 64 };
    float *x[4];
    struct cut c;
    for (int i = 0; i < 4; i++)
        x[i] = malloc(N * sizeof(float));
    for (int i = 0; i < 2; i++) {
        struct kvd_read_params p = {.plane = &s.g,
                                    .rotation = rot,
                                    .layer_count = 2,
                                    .pages = {s.at_bf16, s.at_codec},
                                    .length = s.length,
                                    .hist_end = s.hist_end,
                                    .tokens = 900,
                                    .k = kseq_tensor(x[i], KVD_DTYPE_F32, 900, 2, 64, 0),
                                    .slice = cut_init(&c, 5)};
        p.slice = i ? p.slice : NULL;
        while (i ? again(&c) : c.slices++ == 0)
            ck_assert_int_eq(b->ops->read(b, &p, NULL), 0);
        struct kvd_rotate_params r = {.rotation = rot,
                                      .layer_count = 2,
                                      .rows = 900,
                                      .heads = 2,
                                      .kv_heads = 2,
                                      .x = p.k,
                                      .y = kseq_tensor(x[2 + i], KVD_DTYPE_F32, 900, 2, 64, 0),
                                      .slice = cut_init(&c, 7)};
        r.slice = i ? r.slice : NULL;
        while (i ? again(&c) : c.slices++ == 0)
            ck_assert_int_eq(b->ops->rotate(b, &r, NULL), 0);
    }
    ck_assert_uint_gt(c.slices, 2);
    ck_assert_mem_eq(x[0], x[1], N * sizeof(float));
    ck_assert_mem_eq(x[2], x[3], N * sizeof(float));
    for (int i = 0; i < 4; i++)
        free(x[i]);
    b->ops->rotation_free(b, &rot);
    kseq_deinit(&s);
    kvd_backend_free(&b);
}
END_TEST

// The first one in the order of items, layers and tokens, as without slices.
START_TEST(a_check_in_slices_finds_the_same)
{
    uint64_t seed = kvd_test_seed("check");
    for (uint32_t threads = 1; threads <= 4; threads++) {
        struct kvd_backend *b = kvd_cpu_backend_new(threads, NULL, NULL);
        struct kseq s;
        kseq_init(&s, test_plane(3, 2, 1, 64, 64, KVD_CODEC_INT2, 64, 64), 3000, 1, 1, 1, seed);
        kseq_fill(&s);
        struct kvd_append_item item = next_append(&s, 3000);
        for (uint32_t i = 0; i < 20; i++) {
            uint64_t r = seed + 2 * i;
            uint16_t *bad[2] = {&s.v[kvd_rand(&r) % (3 * 3000 * 2 * 64)],
                                &s.k[kvd_rand(&r) % (3 * 3000 * 2 * 64)]};
            uint16_t was[2] = {*bad[0], *bad[1]};
            *bad[0] = *bad[1] = 0x7fc0;
            struct kvd_nonfinite at[2] = {0};
            struct cut c;
            struct kvd_append_params p = {
                .plane = &s.g, .layer_count = 3, .items = &item, .n_items = 1};
            ck_assert_int_eq(kvd_check_host(&p, &at[0]), KVD_E_INVALID);
            p.slice = cut_init(&c, r);
            int rc = KVD_OK;
            while (rc == KVD_OK && again(&c))
                rc = b->ops->check(b, &p, &at[1]);
            ck_assert_int_eq(rc, KVD_E_INVALID);
            ck_assert(at[0].layer == at[1].layer && at[0].token == at[1].token &&
                      at[0].head == at[1].head && at[0].in_v == at[1].in_v &&
                      at[0].channel == at[1].channel);
            *bad[0] = was[0];
            *bad[1] = was[1];
        }
        kseq_deinit(&s);
        kvd_backend_free(&b);
    }
}
END_TEST

KVD_MAIN("slices", 300, appends_and_attention_in_slices_are_the_same,
         reads_and_rotations_in_slices_are_the_same, a_check_in_slices_finds_the_same)
