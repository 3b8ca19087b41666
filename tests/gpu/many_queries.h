// Attention of so many queries that one launch does not take them.
#ifndef KVD_TESTS_GPU_MANY_QUERIES_H
#define KVD_TESTS_GPU_MANY_QUERIES_H

#include "tests/gpu/gpu_fixture.h"
#include "tests/unit/kernel_truth.h"

enum { MANY_QUERIES = 8200 };

// Rows here and there are as the CPU backend has them, from the pages that the GPU wrote. With
// `step` their K and V are not in the pages yet. Returns the largest error of a row; 1: something
// failed.
static inline double many_queries(struct kvd_backend *cuda, struct kvd_backend *cpu, uint32_t codec,
                                  bool step, uint64_t seed)
{
    enum { QUERIES = MANY_QUERIES, SAMPLES = 40 };
    struct kvd_plane g = test_plane(1, 1, 64, 64, 64, codec, 16, 64);
    uint32_t length = step ? 8000 : 16000;
    struct kseq s;
    kseq_init(&s, g, length + QUERIES, 1, 0.96f, 0.92f, seed);
    kseq_fill(&s);
    to_device(&s);
    struct kvd_rotation *rot = grow(&s, cuda, length, seed);
    struct kvd_rotation *host = cpu->ops->rotation_new(cpu, &s.rot, NULL);
    fetch_pages(&s);
    uint64_t row = (uint64_t)g.q_heads * 64;
    float *q = malloc(QUERIES * row * 4), *o = malloc((QUERIES + 1) * row * 4),
          *lse = malloc((QUERIES + 1) * (uint64_t)g.q_heads * 4);
    for (uint64_t i = 0; i < QUERIES * row; i++)
        q[i] = (float)kseq_normal(&s.rng);
    memset(o, 0xff, QUERIES * row * 4);
    struct kvd_attend_item item = {
        .pages = {s.at_bf16, s.at_codec},
        .length = s.length,
        .hist_end = s.hist_end,
        .q_len = QUERIES,
        .new_tokens = step ? QUERIES : 0,
        .q = kseq_tensor(q, KVD_DTYPE_F32, QUERIES, g.q_heads, 64, 0),
        .o = kseq_tensor(o, KVD_DTYPE_F32, QUERIES, g.q_heads, 64, 0),
        .lse = kseq_tensor(lse, KVD_DTYPE_F32, QUERIES, g.q_heads, 1, 0),
        .k = kseq_tensor(s.k, KVD_DTYPE_BF16, s.capacity, 1, 64, s.length),
        .v = kseq_tensor(s.v, KVD_DTYPE_BF16, s.capacity, 1, 64, s.length)};
    struct kvd_attend_params p = {.plane = &g,
                                  .rotation = rot,
                                  .layer_count = 1,
                                  .scale = 0.125f,
                                  .items = &item,
                                  .n_items = 1};
    struct kvd_error err = {0};
    bool ok = cuda->ops->attend(cuda, &p, &err) == KVD_OK;
    double worst = ok ? 0 : 1;
    for (int i = 0; i < SAMPLES && ok; i++) {
        uint32_t n = i < 2 ? (uint32_t)i * (QUERIES - 1) : (uint32_t)(kvd_rand(&seed) % QUERIES);
        uint64_t behind = QUERIES - 1 - n;
        struct kvd_attend_item one = item;
        one.pages = (struct kvd_pages){s.bf16, s.codec};
        one.q_len = 1;
        one.q.data += n * row * 4;
        one.o.data = (uint8_t *)(o + QUERIES * row);
        one.lse.data = (uint8_t *)(lse + (uint64_t)QUERIES * g.q_heads);
        one.new_tokens -= step ? (uint32_t)behind : 0;
        one.length -= step ? 0 : behind;
        one.hist_end = KVD_MIN(one.hist_end, KVD_MAX(one.length, (uint64_t)g.sink));
        struct kvd_attend_params c = p;
        c.rotation = host;
        c.items = &one;
        ok = cpu->ops->attend(cpu, &c, &err) == KVD_OK;
        double d = 0, norm = 0;
        for (uint64_t j = 0; j < row; j++) {
            double a = o[n * row + j], b = o[QUERIES * row + j];
            d += (a - b) * (a - b);
            norm += b * b;
        }
        for (uint32_t h = 0; h < g.q_heads; h++)
            ok &= fabs((double)lse[(uint64_t)n * g.q_heads + h] -
                       (double)lse[(uint64_t)QUERIES * g.q_heads + h]) < 5e-3;
        double e = sqrt(d / norm);
        worst = e <= worst ? worst : e;
    }
    cuda->ops->rotation_free(cuda, &rot);
    cpu->ops->rotation_free(cpu, &host);
    deinit(&s);
    free(q);
    free(o);
    free(lse);
    return ok ? worst : 1;
}

#endif
