// Inner loops in plain C, straight from the format's definition: the reference for the others, and
// the way on CPUs without AVX2.
#include "kernels/cpu/cpu.h"

#include <math.h>

static bool supported(void)
{
    return true;
}

static void q_prepare(uint32_t codec, const struct kvd_tc_coder *tc, const float *q, uint32_t dim,
                      float *out)
{
    (void)codec;
    (void)tc;
    memset(out, 0, 2 * dim * sizeof(float));
    memcpy(out, q, dim * sizeof(float));
}

static float level_at(uint32_t codec, const uint8_t *codes, uint32_t dim, bool v, uint32_t token,
                      uint32_t channel)
{
    uint32_t more = kvd_codec_bits(codec) - 2;
    struct kvd_code_place p = kvd_place_of(v, dim, 2, token, channel);
    uint32_t code = codes[p.byte] >> p.bit & 3;
    if (more) {
        p = kvd_place_of(v, dim, more, token, channel);
        codes += kvd_codes_bytes(KVD_CODEC_INT2, dim, v);
        code |= (codes[p.byte] >> p.bit & ((1u << more) - 1)) << 2;
    }
    return kvd_cpu_levels(codec)[code];
}

// Summed in double: 64 to 256 products of codes that are not about zero cancel with the minimum's
// term, and in fp32 the reference would be what rounds most.
static void k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                     uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    (void)ahead;
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
        float level[KVD_MAX_HEAD_DIM];
        for (uint32_t c = 0; c < dim; c++)
            level[c] = level_at(codec, codes, dim, false, t, c);
        for (uint32_t r = 0; r < rows; r++) {
            double sum = 0;
            for (uint32_t c = 0; c < dim; c++)
                sum += (double)level[c] * (double)q[r * 2 * dim + c];
            scores[r * KVD_PAGE_TOKENS + t] = (float)sum;
        }
    }
}

static void tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                      uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    (void)ahead;
    for (uint32_t token = 0; token < KVD_PAGE_TOKENS; token++) {
        uint8_t row[KVD_MAX_HEAD_DIM];
        kvd_tc_unpack(t, codes, token, row);
        for (uint32_t r = 0; r < rows; r++) {
            double sum = 0;
            for (uint32_t c = 0; c < t->dim; c++) {
                float top = (float)((1u << t->bits[c / KVD_TC_TILE]) - 1);
                sum += (double)((float)row[c] - top / 2) * (double)q[r * 2 * t->dim + c];
            }
            scores[r * KVD_PAGE_TOKENS + token] = (float)sum;
        }
    }
}

static void v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                         uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead)
{
    (void)ahead;
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++)
        for (uint32_t c = 0; c < dim; c++) {
            float level = level_at(codec, codes, dim, true, t, c);
            for (uint32_t r = 0; r < rows; r++)
                acc[r * 8 * dim + c] += level * p[r * KVD_PAGE_TOKENS + t];
        }
}

static void v_reduce(uint32_t codec, const float *acc, uint32_t dim, float *o)
{
    (void)codec;
    memcpy(o, acc, dim * sizeof(float));
}

static float bf16_at(const uint8_t *row, uint32_t c)
{
    uint16_t b;
    memcpy(&b, row + 2 * c, sizeof(b));
    return kvd_bf16_to_f32(b);
}

static void bf16_scores(const uint8_t *k, const uint8_t *ahead, uint64_t stride, uint32_t n,
                        uint32_t dim, const float *q, uint32_t rows, float *scores)
{
    (void)ahead;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t t = 0; t < n; t++) {
            float sum = 0;
            for (uint32_t c = 0; c < dim; c++)
                sum += bf16_at(k + t * stride, c) * q[r * dim + c];
            scores[r * KVD_PAGE_TOKENS + t] = sum;
        }
}

static void bf16_accumulate(const uint8_t *v, const uint8_t *ahead, uint64_t stride, uint32_t n,
                            uint32_t dim, const float *p, uint32_t rows, float *o)
{
    (void)ahead;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t t = 0; t < n; t++)
            for (uint32_t c = 0; c < dim; c++)
                o[r * dim + c] += p[r * KVD_PAGE_TOKENS + t] * bf16_at(v + t * stride, c);
}

static void params(uint32_t codec, const uint8_t *from, struct kvd_cpu_params *out)
{
    struct kvd_affine param[KVD_PAGE_TOKENS];
    kvd_params_read(codec, from, KVD_PAGE_TOKENS, param);
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
        out->scale[t] = param[t].scale;
        out->centre[t] = param[t].min + kvd_cpu_centre(codec) * param[t].scale;
    }
}

static void affine(float *s, const struct kvd_cpu_params *p, float q_sum, float q_mean)
{
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++)
        s[t] = p->scale[t] * s[t] + (p->centre[t] * q_sum + q_mean);
}

static float logits(float *s, float by)
{
    float nan = 0;
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
        s[t] *= by;
        nan += 0 * s[t];
    }
    return nan;
}

static float top_of(const float *s, float top)
{
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++)
        top = s[t] > top ? s[t] : top;
    return top;
}

static float whole(float *s, const struct kvd_cpu_params *p, float q_sum, float q_mean, float by,
                   float *top)
{
    affine(s, p, q_sum, q_mean);
    float nan = logits(s, by);
    *top = top_of(s, *top);
    return nan;
}

static float weigh(float *s, const struct kvd_cpu_params *p)
{
    float sum = 0;
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
        sum += s[t] * p->centre[t];
        s[t] *= p->scale[t];
    }
    return sum;
}

static float exp_sum(float *s, float m)
{
    float sum = 0;
    for (uint32_t i = 0; i < KVD_PAGE_TOKENS; i++)
        sum += s[i] = expf(s[i] - m);
    return sum;
}

static void scale(float *x, uint32_t n, float f)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] *= f;
}

static void rotate(const float *x, uint32_t rows, uint32_t dim, const float *m, float *y)
{
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t j = 0; j < dim; j++) {
            float sum = 0;
            for (uint32_t i = 0; i < dim; i++)
                sum += x[r * dim + i] * m[i * dim + j];
            y[r * dim + j] = sum;
        }
}

// -- latents -------------------------------------------------------------------------------------

enum { R = KVD_LATENT_ROWS };

static void bf16_row(const uint8_t *row, uint32_t dim, float *x)
{
    for (uint32_t c = 0; c < dim; c++)
        x[c] = bf16_at(row, c);
}

static void latent_unpack(uint32_t codec, const uint8_t *codes, uint32_t dim,
                          const struct kvd_affine *param, float *x)
{
    for (uint32_t c = 0; c < dim; c++)
        for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++) {
            uint32_t token = kvd_latent_token(t);
            float level = level_at(codec, codes, dim, true, token, kvd_latent_channel(c));
            x[c / 2 * 2 * KVD_PAGE_TOKENS + 2 * t + c % 2] =
                param[token].scale * level + param[token].min;
        }
}

static const float *panel_at(const struct kvd_panel *x, uint32_t token, uint32_t channel)
{
    return x->x + token * x->token + channel / 2 * x->pair + channel % 2;
}

static void panel_scores(const struct kvd_panel *x, uint32_t channels, uint32_t tokens,
                         const float *q, uint32_t rows, float *s)
{
    for (uint32_t t = 0; t < tokens; t++) {
        double sum[R] = {0};
        for (uint32_t c = 0; c < channels; c++)
            for (uint32_t r = 0; r < rows; r++)
                sum[r] += (double)*panel_at(x, t, c) * (double)q[c * R + r];
        for (uint32_t r = 0; r < rows; r++)
            s[t * R + r] += (float)sum[r];
    }
}

static void panel_sums(const struct kvd_panel *x, uint32_t channels, uint32_t tokens,
                       const float *p, uint32_t rows, float *o)
{
    for (uint32_t c = 0; c < channels; c++) {
        float sum[R] = {0};
        for (uint32_t t = 0; t < tokens; t++)
            for (uint32_t r = 0; r < rows; r++)
                sum[r] += *panel_at(x, t, c) * p[t * R + r];
        for (uint32_t r = 0; r < rows; r++)
            o[c * R + r] += sum[r];
    }
}

static void panel_logits(float *s, uint32_t tokens, float by, float *nan)
{
    memset(nan, 0, R * sizeof(float));
    for (uint32_t i = 0; i < tokens * R; i++) {
        s[i] *= by;
        nan[i % R] += 0 * s[i];
    }
}

static void panel_top(const float *s, uint32_t tokens, float *top)
{
    for (uint32_t i = 0; i < tokens * R; i++)
        top[i % R] = s[i] > top[i % R] ? s[i] : top[i % R];
}

static void panel_exp(float *s, uint32_t tokens, const float *top, float *sum)
{
    memset(sum, 0, R * sizeof(float));
    for (uint32_t i = 0; i < tokens * R; i++)
        sum[i % R] += s[i] = expf(s[i] - top[i % R]);
}

static void panel_scale(float *x, uint32_t n, const float *f)
{
    for (uint32_t i = 0; i < n * R; i++)
        x[i] *= f[i % R];
}

const struct kvd_cpu_isa kvd_cpu_scalar = {
    .name = "scalar",
    .supported = supported,
    .q_prepare = q_prepare,
    .k_scores = k_scores,
    .tc_scores = tc_scores,
    .v_accumulate = v_accumulate,
    .v_reduce = v_reduce,
    .bf16_scores = bf16_scores,
    .bf16_accumulate = bf16_accumulate,
    .params = params,
    .affine = affine,
    .logits = logits,
    .top = top_of,
    .whole = whole,
    .exp_sum = exp_sum,
    .weigh = weigh,
    .scale = scale,
    .rotate = rotate,
    .bf16_row = bf16_row,
    .latent_unpack = latent_unpack,
    .panel_scores = panel_scores,
    .panel_sums = panel_sums,
    .panel_logits = panel_logits,
    .panel_top = panel_top,
    .panel_exp = panel_exp,
    .panel_scale = panel_scale,
};
