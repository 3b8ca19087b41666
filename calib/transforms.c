#include "calib/transforms.h"

#include <math.h>

#include "calib/marks.h"
#include "kernels/format.h"

uint32_t kvd_tc_find(const char *name)
{
    uint32_t codec = kvd_codec_find(name);
    return kvd_codec_tc(codec) ? codec : KVD_CODEC_COUNT;
}

void kvd_transforms_free(struct kvd_transforms **tp)
{
    struct kvd_transforms *t = KVD_TAKE(*tp);
    if (!t)
        return;
    float *all[] = {t->k,      t->k_inverse, t->v,       t->v_inverse,
                    t->k_mean, t->v_mean,    t->k_sigma, t->k_bits};
    for (size_t i = 0; i < KVD_LEN(all); i++)
        free(all[i]);
    free(t);
}

enum { PARTS = 8 };

struct part {
    float **at;
    uint64_t layer; // floats of a layer
};

static void parts_of(const struct kvd_rotset *s, struct kvd_transforms *t, struct part parts[PARTS])
{
    uint64_t n = s->heads, dk = s->dim_k, dv = s->dim_v;
    const struct part all[PARTS] = {{&t->k, n * dk * dk},  {&t->k_inverse, n * dk * dk},
                                    {&t->v, n * dv * dv},  {&t->v_inverse, n * dv * dv},
                                    {&t->k_mean, n * dk},  {&t->v_mean, n * dv},
                                    {&t->k_sigma, n * dk}, {&t->k_bits, n * (dk / KVD_TC_TILE)}};
    memcpy(parts, all, sizeof(all));
}

int kvd_transforms_alloc(struct kvd_rotset *s, uint32_t codec, struct kvd_error *err)
{
    if (kvd_rotset_check_shape(s, err))
        return err->code;
    if (!kvd_head_dims_ok(s->dim_k, s->dim_v))
        return kvd_fail(err, KVD_E_INVALID,
                        "head_dim is %u for K and %u for V, as of a latent and its rope part: "
                        "transforms are for tc2 and tc2.5, which those cannot have",
                        s->dim_k, s->dim_v);
    struct kvd_transforms *t KVD_AUTO(kvd_transforms_free) = calloc(1, sizeof(*t));
    if (!t)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a set of transforms");
    struct part parts[PARTS];
    parts_of(s, t, parts);
    for (int i = 0; i < PARTS; i++)
        if (!(*parts[i].at = calloc(s->n_layers * parts[i].layer, sizeof(float))))
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a set of transforms");
    t->codec = codec;
    s->scale_k = s->scale_v = KVD_SCALE_UNBIASED;
    s->transforms = KVD_TAKE(t);
    return KVD_OK;
}

void kvd_transforms_replace(struct kvd_rotset *s, const struct kvd_rotset *by)
{
    struct part to[PARTS], from[PARTS];
    parts_of(s, s->transforms, to);
    parts_of(by, by->transforms, from);
    for (uint32_t i = 0; i < s->n_layers; i++)
        for (uint32_t b = 0; b < by->n_layers; b++)
            for (int p = 0; p < PARTS && s->layers[i] == by->layers[b]; p++)
                memcpy(*to[p].at + i * to[p].layer, *from[p].at + b * to[p].layer,
                       to[p].layer * sizeof(float));
}

struct kvd_transform kvd_transform_at(const struct kvd_rotset *s, uint64_t at, bool v)
{
    const struct kvd_transforms *t = s->transforms;
    uint64_t dk = s->dim_k, dv = s->dim_v;
    if (v)
        return (struct kvd_transform){.a = t->v + at * dv * dv,
                                      .inverse = t->v_inverse + at * dv * dv,
                                      .mean = t->v_mean + at * dv,
                                      .coder =
                                          kvd_tc_coder_of(t->codec, s->dim_v, true, NULL, NULL)};
    return (struct kvd_transform){.a = t->k + at * dk * dk,
                                  .inverse = t->k_inverse + at * dk * dk,
                                  .mean = t->k_mean + at * dk,
                                  .coder = kvd_tc_coder_of(kvd_layer_codec(s, at / s->heads),
                                                           s->dim_k, false, t->k_sigma + at * dk,
                                                           t->k_bits + at * (dk / KVD_TC_TILE))};
}

// -- checks --------------------------------------------------------------------------------------

double kvd_transform_loss(const float *a, const float *inverse, uint32_t dim)
{
    double there = 0, back = 0;
    for (uint64_t i = 0; i < (uint64_t)dim * dim; i++) {
        there += (double)a[i] * (double)a[i];
        back += (double)inverse[i] * (double)inverse[i];
    }
    double loss = sqrt(there) * sqrt(back) / dim;
    return isfinite(loss) ? loss : NAN;
}

// The largest |(A A^-1)_ij - delta_ij| of finite matrices.
static double deviation(const float *a, const float *inverse, uint32_t dim)
{
    double worst = 0;
    for (uint32_t i = 0; i < dim; i++) {
        double row[KVD_MAX_HEAD_DIM] = {0};
        row[i] = -1;
        for (uint32_t c = 0; c < dim; c++)
            for (uint32_t j = 0; j < dim; j++)
                row[j] += (double)a[(uint64_t)i * dim + c] * (double)inverse[(uint64_t)c * dim + j];
        for (uint32_t j = 0; j < dim; j++)
            worst = fmax(worst, fabs(row[j]));
    }
    return worst;
}

static int check_codes(const float *sigma, const float *bits, uint32_t dim, uint32_t codec,
                       const char *where, struct kvd_error *err)
{
    uint32_t sum = 0, want = kvd_tc_stream_bits(codec, dim);
    for (uint32_t i = 0; i < dim; i++)
        if (!(isfinite(sigma[i]) && sigma[i] > 0))
            return kvd_fail(err, KVD_E_CORRUPT, "%s: the deviation of channel %u is %g", where, i,
                            (double)sigma[i]);
    for (uint32_t i = 0; i < dim / KVD_TC_TILE; i++) {
        float b = bits[i];
        if (!(b >= 0 && b <= KVD_TC_MAX_BITS && b == floorf(b)))
            return kvd_fail(err, KVD_E_CORRUPT,
                            "%s: tile %u has codes of %g bits; they have 0 to %d", where, i,
                            (double)b, KVD_TC_MAX_BITS);
        sum += (uint32_t)b;
    }
    if (sum != want)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: the bits of the tiles sum to %u; codec %s has %u at head_dim %u",
                        where, sum, kvd_codec_name(codec), want, dim);
    return KVD_OK;
}

static int check_transform(const struct kvd_transform *t, const char *where, double *worst,
                           struct kvd_error *err)
{
    double loss = kvd_transform_loss(t->a, t->inverse, t->coder.dim);
    bool finite = !isnan(loss);
    for (uint32_t i = 0; i < t->coder.dim; i++)
        finite &= isfinite(t->mean[i]) != 0;
    if (!finite)
        return kvd_fail(err, KVD_E_CORRUPT, "%s holds values that are not finite", where);
    double d = deviation(t->a, t->inverse, t->coder.dim);
    if (d > 1e-3)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: the inverse is none: A A^-1 is %.3g away from the identity", where, d);
    if (loss > KVD_TC_MAX_LOSS)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s is ill-conditioned: |A| |A^-1| / dim is %.3g, and at most %d is taken",
                        where, loss, KVD_TC_MAX_LOSS);
    *worst = fmax(*worst, d);
    return KVD_OK;
}

int kvd_transforms_check(const struct kvd_rotset *s, double *worst, struct kvd_error *err)
{
    double w = 0;
    const struct kvd_transforms *all = s->transforms;
    for (uint64_t at = 0; at < (uint64_t)s->n_layers * s->heads; at++) {
        uint32_t codec = kvd_layer_codec(s, at / s->heads);
        for (int v = 0; v < 2; v++) {
            struct kvd_transform t = kvd_transform_at(s, at, v);
            char where[96];
            snprintf(where, sizeof(where), "the transform of %s, layer %u, head %u", v ? "V" : "K",
                     s->layers[at / s->heads], (unsigned)(at % s->heads));
            if (check_transform(&t, where, &w, err))
                return err->code;
            if (!v && check_codes(all->k_sigma + at * s->dim_k,
                                  all->k_bits + at * (s->dim_k / KVD_TC_TILE), s->dim_k, codec,
                                  where, err))
                return err->code;
        }
    }
    if (worst)
        *worst = w;
    return KVD_OK;
}

// -- rows ----------------------------------------------------------------------------------------

float kvd_tc_row(const struct kvd_transform *t, float *y)
{
    uint8_t side[KVD_TC_MOST_BYTES] = {0}, codes[KVD_MAX_HEAD_DIM];
    float scale = kvd_fp16_to_f32(kvd_tc_quantize(&t->coder, y, codes));
    kvd_tc_pack(&t->coder, side, 0, codes);
    kvd_tc_unpack(&t->coder, side, 0, codes);
    for (uint32_t i = 0; i < t->coder.dim; i++)
        y[i] = (float)((double)scale * kvd_tc_value(&t->coder, i, codes[i]));
    return scale;
}
