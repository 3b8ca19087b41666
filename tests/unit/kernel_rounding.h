// What kernels that round queries, and values of keys, to fp16 may be off by in a row's
// log-sum-exp.
//
// A score is q . k = q . mean + sum_c q_c x_c, x being the key as its page has it, turned, and q
// turned the other way. fp16 has 11 bits: a number that is rounded to it moves by a part of up to
// u = 2^-11 of itself. As mantissas m are spread evenly by logarithm and what is rounded off is
// spread evenly over half an ulp, the standard deviation is u sqrt(E[1 / m^2] / 3) =
// u / sqrt(8 ln 2), 2.07e-4. So a score is off by a part of its products, not of itself: where they
// cancel, as those of sets whose transforms and means know nothing of the keys do, that is much of
// a score, whatever limit relative errors have.
//
// d lse = sum_t p_t d score_t, p_t being the probabilities. Rounded queries are the same for all
// tokens, so what q_c loses counts by q_c sum_t p_t x_tc. What keys lose is each token's own;
// within a token, channels whose values are alike, but for what is their channel's own (tc2's
// deviations and steps are in queries), lose the same part, so their products are summed first.
#ifndef KVD_TESTS_KERNEL_ROUNDING_H
#define KVD_TESTS_KERNEL_ROUNDING_H

#include "tests/unit/kernel_fixture.h"

// Of how many deviations an error may be: one of 5e8 that are normal is larger, and a run of
// test_cuda has some 1e5 rows.
enum { ROUNDING_DEVIATIONS = 6 };

static const double ROUNDING_FP16 = 0x1p-11 * 0.4246609; // 1 / sqrt(8 ln 2)

// q . kseq_back(x) is out . x and what means add: out = q A^-T, in double.
static inline void kseq_query(const struct kseq *s, uint32_t layer, uint32_t head, const float *q,
                              double *out)
{
    uint32_t dim = s->g.head_dim_k;
    uint64_t at = (uint64_t)layer * s->rot.heads + (s->rot.heads == 1 ? 0 : head);
    const float *m = kseq_matrix(s, false, layer, head);
    for (uint32_t j = 0; j < dim; j++) {
        out[j] = m ? 0 : q[j];
        for (uint32_t i = 0; m && i < dim; i++)
            out[j] += (double)q[i] * (s->back_k ? s->back_k[at * dim * dim + (uint64_t)j * dim + i]
                                                : m[(uint64_t)i * dim + j]);
    }
}

// The sum of squares of a token's products, those of values that lose the same part as one.
static inline double rounding_of_key(const struct kvd_tc_coder *tc, uint32_t dim, const double *q,
                                     const float *x)
{
    double size[KVD_MAX_ROW], sum[KVD_MAX_ROW], squares = 0;
    uint32_t n = 0;
    for (uint32_t c = 0; c < dim; c++) {
        double step = tc->dim ? kvd_tc_step(tc, c) : 1, y = step > 0 ? fabs(x[c]) / step : 0;
        uint32_t i = 0;
        while (i < n && fabs(size[i] - y) > 1e-5 * y)
            i++;
        if (i == n) {
            size[n] = y;
            sum[n++] = 0;
        }
        sum[i] += q[c] * x[c];
    }
    for (uint32_t i = 0; i < n; i++)
        squares += sum[i] * sum[i];
    return squares;
}

// The deviation of log-sum-exp of a query (layer, head of keys), of which `weights` are by how much
// it changes with each of `tokens` scores before the scale. keys: whether their values are rounded
// too.
KVD_REFERENCE static inline double lse_rounding(const struct kseq *s, uint32_t layer, uint32_t head,
                                                const float *q, const double *weights,
                                                uint64_t tokens, bool keys)
{
    const struct kvd_plane *g = &s->g;
    uint32_t dim = g->head_dim_k;
    double turned[KVD_MAX_ROW], mean[KVD_MAX_ROW] = {0}, squares = 0;
    struct kvd_tc_coder tc = kseq_coder(s, false, layer, head);
    if (g->latent || g->codec.k == KVD_CODEC_BF16)
        return 0;
    kseq_query(s, layer, head, q, turned);
    for (uint64_t t = g->sink; t < KVD_MIN(s->hist_end, tokens); t++) {
        float x[KVD_MAX_ROW];
        const uint8_t *tile = (const uint8_t *)(uintptr_t)s->codec[(t - g->sink) / 64] +
                              kvd_tile_offset(g, g->codec, layer, head);
        if (weights[t] < 1e-9)
            continue;
        kvd_row_unpack(g->codec, tile, dim, g->head_dim_v, false, &tc,
                       (uint32_t)((t - g->sink) % 64), x);
        for (uint32_t c = 0; c < dim; c++)
            mean[c] += weights[t] * x[c];
        if (keys)
            squares += weights[t] * weights[t] * rounding_of_key(&tc, dim, turned, x);
    }
    for (uint32_t c = 0; c < dim; c++)
        squares += turned[c] * turned[c] * mean[c] * mean[c];
    return ROUNDING_FP16 * sqrt(squares);
}

#endif
