// Queries that are not finite: theirs is NaN, and nothing else changes. For tests of a backend.
#ifndef KVD_TESTS_KERNEL_NONFINITE_H
#define KVD_TESTS_KERNEL_NONFINITE_H

#include "tests/unit/kernel_truth.h"

struct nonfinite_case {
    struct kvd_codecs codec;
    uint32_t length, q_len;
    enum kvd_dtype q_type;
    float softcap;
};

static const struct nonfinite_case nonfinite_cases[] = {
    {{KVD_CODEC_INT2, KVD_CODEC_INT2}, 700, 1, KVD_DTYPE_F32, 0},
    {{KVD_CODEC_INT2, KVD_CODEC_INT2}, 700, 3, KVD_DTYPE_BF16, 0},
    {{KVD_CODEC_INT2, KVD_CODEC_INT2}, 3000, 1, KVD_DTYPE_BF16, 20},
    {{KVD_CODEC_INT2, KVD_CODEC_INT2}, 1, 1, KVD_DTYPE_BF16, 0}, // windows alone
    {{KVD_CODEC_INT2, KVD_CODEC_INT2}, 1, 1, KVD_DTYPE_F32, 10},
    {{KVD_CODEC_INT2C, KVD_CODEC_INT2C}, 90, 2, KVD_DTYPE_F32, 0},
    {{KVD_CODEC_INT2_LM, KVD_CODEC_INT2_LM}, 700, 2, KVD_DTYPE_F32, 10},
    {{KVD_CODEC_TURBOQUANT_4, KVD_CODEC_TURBOQUANT_4}, 700, 1, KVD_DTYPE_BF16, 0},
    {{KVD_CODEC_TC2_5, KVD_CODEC_TC2_5}, 700, 2, KVD_DTYPE_F32, 0},
    {{KVD_CODEC_BF16, KVD_CODEC_BF16}, 1, 1, KVD_DTYPE_BF16, 0},
    {{KVD_CODEC_BF16, KVD_CODEC_BF16}, 700, 4, KVD_DTYPE_F32, 0},
    {{KVD_CODEC_BF16, KVD_CODEC_BF16}, 700, 1, KVD_DTYPE_BF16, 5},
    {{KVD_CODEC_INT4, KVD_CODEC_INT4}, 700, 2, KVD_DTYPE_F32, 0},
    {{KVD_CODEC_BF16, KVD_CODEC_INT2}, 700, 1, KVD_DTYPE_F32, 10},
    {{KVD_CODEC_TC2, KVD_CODEC_BF16}, 400, 3, KVD_DTYPE_BF16, 0},
    {{KVD_CODEC_INT4, KVD_CODEC_TURBOQUANT_3}, 1, 1, KVD_DTYPE_F32, 0},
};

enum { NONFINITE_GROUP = 4, NONFINITE_KV = 2, NONFINITE_DIM = 64 };

static inline struct kvd_plane nonfinite_plane(const struct nonfinite_case *c)
{
    return test_plane_of(1, NONFINITE_KV, NONFINITE_GROUP, NONFINITE_DIM, NONFINITE_DIM, c->codec,
                         16, 32);
}

static inline void nonfinite_attend(struct kseq *s, const struct nonfinite_case *c,
                                    struct kvd_backend *b, const struct kvd_rotation *rot,
                                    const float *q, float *o, float *lse)
{
    enum { DIM = NONFINITE_DIM };
    uint32_t heads = s->g.q_heads, rows = c->q_len * heads;
    uint16_t *half = malloc((uint64_t)rows * DIM * 2);
    for (uint32_t i = 0; i < rows * DIM; i++)
        half[i] = kvd_f32_to_bf16(q[i]);
    memset(o, 0, sizeof(*o) * rows * DIM);
    memset(lse, 0, sizeof(*lse) * rows);
    struct kvd_attend_item item = {
        .pages = {s->at_bf16, s->at_codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .q_len = c->q_len,
        .q = kseq_tensor(c->q_type == KVD_DTYPE_F32 ? (void *)(uintptr_t)q : half, c->q_type,
                         c->q_len, heads, DIM, 0),
        .o = kseq_tensor(o, KVD_DTYPE_F32, c->q_len, heads, DIM, 0),
        .lse = kseq_tensor(lse, KVD_DTYPE_F32, c->q_len, heads, 1, 0)};
    struct kvd_attend_params p = {.plane = &s->g,
                                  .rotation = rot,
                                  .layer_count = 1,
                                  .scale = 0.125f,
                                  .softcap = c->softcap,
                                  .items = &item,
                                  .n_items = 1};
    struct kvd_error err = {0};
    if (b->ops->attend(b, &p, &err)) {
        fprintf(stderr, "attend: %s\n", err.text);
        abort();
    }
    free(half);
}

// Whether all of a row and its lse are NaN, or nothing is and it is as it was.
static inline bool nonfinite_row_ok(bool bad, const float *want, const float *o, float want_lse,
                                    float lse)
{
    double d = 0, n = 0;
    for (int i = 0; i < NONFINITE_DIM && !bad; i++) {
        d += ((double)want[i] - o[i]) * ((double)want[i] - o[i]);
        n += (double)want[i] * want[i];
    }
    if (!bad) // a GPU divides the queries of a block by one power of two: not bit by bit
        return sqrt(d / n) < 2e-3 && fabsf(want_lse - lse) < 1e-3f;
    for (int i = 0; i < NONFINITE_DIM; i++)
        if (!isnan(o[i]))
            return false;
    return isnan(lse);
}

// The first row that is wrong, or -1. The sequence has c->length tokens.
static inline int nonfinite_check(struct kseq *s, const struct nonfinite_case *c,
                                  struct kvd_backend *b, const struct kvd_rotation *rot)
{
    enum { DIM = NONFINITE_DIM, MOST = 8 * NONFINITE_GROUP * NONFINITE_KV };
    static float q[MOST * DIM], o[MOST * DIM], want[MOST * DIM], lse[MOST], want_lse[MOST];
    const float values[] = {NAN, INFINITY, -INFINITY};
    uint32_t rows = c->q_len * s->g.q_heads;
    for (uint32_t i = 0; i < rows * DIM; i++)
        q[i] = (float)kseq_normal(&s->rng);
    nonfinite_attend(s, c, b, rot, q, want, want_lse);
    for (uint32_t i = 0; i < 3 * KVD_LEN(values); i++) {
        uint32_t row = (uint32_t)(kvd_rand(&s->rng) % rows);
        uint32_t at = row * DIM + (uint32_t)(kvd_rand(&s->rng) % DIM);
        float kept = q[at];
        q[at] = values[i % KVD_LEN(values)];
        nonfinite_attend(s, c, b, rot, q, o, lse);
        q[at] = kept;
        for (uint32_t r = 0; r < rows; r++)
            if (!nonfinite_row_ok(r == row, want + r * DIM, o + r * DIM, want_lse[r], lse[r]))
                return (int)r;
    }
    return -1;
}

#endif
