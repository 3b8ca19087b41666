// What the kernels of codecs tc2 and tc2.5 want of a set, as kernels/cuda/api.h has it.
#include "kernels/backend.h"
#include "kernels/codebook.h"
#include "kernels/cuda/pack.h"
#include "kernels/tc.h"

#include <math.h>
#include <stddef.h>

// Rotated queries may become so large, of fp16's 65504; what is smaller by 2^28 begins to lose
// bits.
static const double LARGEST_QUERY = 16384;

_Static_assert(offsetof(struct kvd_cuda_transform, k_mean_parts) % 16 == 0,
               "copied 16 bytes at a time");
_Static_assert(offsetof(struct kvd_cuda_transform, v_mean) % 16 == 0, "copied 16 bytes at a time");
_Static_assert(sizeof(struct kvd_cuda_transform) % 16 == 0, "so are all of an array");

static const uint32_t codecs[2] = {KVD_CODEC_TC2, KVD_CODEC_TC2_5};

// One side of a matrix.
struct side {
    const float *a, *inverse, *mean, *sigma; // NULL: identity, transpose, 0, 1
    uint32_t dim;
};

static double element(const struct side *s, uint32_t i, uint32_t j)
{
    return s->a ? (double)s->a[(uint64_t)i * s->dim + j] : i == j;
}

static double inverse_element(const struct side *s, uint32_t i, uint32_t j)
{
    return s->inverse ? (double)s->inverse[(uint64_t)i * s->dim + j] : element(s, j, i);
}

static double sigma_of(const struct side *s, uint32_t channel)
{
    return s->sigma ? (double)s->sigma[channel] : 1;
}

static struct side side_of(const struct kvd_rotation_data *d, uint64_t at, bool v)
{
    uint64_t dim = v ? d->dim_v : d->dim_k, square = dim * dim;
    const float *a = v ? d->v : d->k, *inverse = v ? d->v_inverse : d->k_inverse;
    const float *mean = v ? d->v_mean : d->k_mean, *sigma = v ? NULL : d->k_sigma;
    return (struct side){.a = a ? a + at * square : NULL,
                         .inverse = inverse ? inverse + at * square : NULL,
                         .mean = mean ? mean + at * dim : NULL,
                         .sigma = sigma ? sigma + at * dim : NULL,
                         .dim = (uint32_t)dim};
}

bool kvd_cuda_is_transform(const struct kvd_rotation_data *d)
{
    return d->k_inverse || d->v_inverse || d->k_mean || d->v_mean || d->k_sigma || d->k_bits;
}

// A code is looked at where most kernels find it with the fewest instructions: a mask leaves a
// number of fp16 of the ten bits that a mantissa has. Most streams have 16 bits, or 20. tc.cuh's
// kernels for these count on it: what can be seen from bit 0 is, and of 17 to 20 bits what can be
// seen from bit 10 on.
static struct kvd_cuda_key_tile key_tile(uint32_t at, uint32_t bits, uint32_t stream, float step)
{
    uint32_t end = at + bits;
    bool from_ten = stream > 16 && stream <= 20 && at >= 10;
    uint32_t view = end <= 10 ? 0 : from_ten ? 10 : end <= 16 ? 6 : at;
    uint32_t place = at - view;
    if (bits == 0)
        return (struct kvd_cuda_key_tile){0};
    return (struct kvd_cuda_key_tile){.view = view,
                                      .mask = ((1u << bits) - 1) * 0x00010001u << place,
                                      .bits = bits,
                                      .step = step,
                                      .factor = ldexpf(step, -(int)place)};
}

// The tiles of K in a codec; none where the set's bits are another codec's.
static void key_tiles(const struct kvd_rotation_data *d, uint64_t index, uint32_t codec,
                      struct kvd_cuda_key_tile *out)
{
    uint32_t n = d->dim_k / KVD_TC_TILE, sum = 0, at = 0,
             stream = kvd_tc_stream_bits(codec, d->dim_k);
    struct kvd_tc_coder coder =
        kvd_tc_coder_of(codec, d->dim_k, false, NULL, d->k_bits ? d->k_bits + index * n : NULL);
    for (uint32_t i = 0; i < n; i++)
        sum += coder.bits[i];
    for (uint32_t i = 0; i < n && sum == stream; at += coder.bits[i++])
        out[i] = key_tile(at, coder.bits[i], stream, (float)kvd_tc_step(&coder, i * KVD_TC_TILE));
}

static void means(const struct side *s, float *mean, float *offset)
{
    for (uint32_t c = 0; c < s->dim && s->mean; c++) {
        double sum = 0;
        for (uint32_t i = 0; i < s->dim; i++)
            sum += (double)s->mean[i] * element(s, i, c);
        mean[c] = s->mean[c];
        offset[c] = (float)(sum / sigma_of(s, c));
    }
}

// By how much queries may be multiplied so that none exceeds LARGEST_QUERY: those of a block are
// divided by what makes their elements 1 at most. A power of two. Of codes in their places, or of
// levels that are one apart.
static double room_of(const struct side *k, const struct kvd_cuda_transform *t, bool levels)
{
    double top = 0;
    for (uint32_t c = 0; c < k->dim; c++) {
        double square = 0;
        for (uint32_t i = 0; i < k->dim; i++)
            square += pow(inverse_element(k, c, i) * sigma_of(k, c), 2);
        for (int codec = 0; codec < 2; codec++) {
            const struct kvd_cuda_key_tile *tile = &t->tiles[codec][c / KVD_TC_TILE];
            top = fmax(top, sqrt(square) * (double)(levels ? tile->step : tile->factor));
        }
    }
    return top > 0 ? exp2(floor(log2(LARGEST_QUERY / (sqrt(k->dim) * top)))) : 1;
}

enum operand { QUERIES, FORWARD, BACK };

// The matrix that operands are of, in `m`.
static void operand_matrix(const struct side *s, enum operand which, float *m)
{
    for (uint32_t i = 0; i < s->dim; i++)
        for (uint32_t c = 0; c < s->dim; c++)
            m[(uint64_t)i * s->dim + c] =
                (float)(which == QUERIES   ? inverse_element(s, c, i) * sigma_of(s, c)
                        : which == FORWARD ? element(s, i, c) / sigma_of(s, c)
                                           : inverse_element(s, i, c));
}

void kvd_cuda_transform_pack(const struct kvd_rotation_data *d, uint64_t index,
                             const struct kvd_cuda_transform_operands *operands,
                             struct kvd_cuda_transform *out)
{
    static _Thread_local float m[KVD_MAX_HEAD_DIM * KVD_MAX_HEAD_DIM];
    struct side k = side_of(d, index, false), v = side_of(d, index, true);
    *out = (struct kvd_cuda_transform){0};
    for (int i = 0; i < 2; i++)
        key_tiles(d, index, codecs[i], out->tiles[i]);
    means(&k, out->k_mean, out->k_offset);
    means(&v, out->v_mean, out->v_offset);
    for (uint32_t c = 0; c < k.dim; c++) {
        out->k_sigma[c] = (float)sigma_of(&k, c);
        out->k_mean_parts[0][c] = kvd_f32_to_bf16(out->k_mean[c]);
        out->k_mean_parts[1][c] =
            kvd_f32_to_bf16(out->k_mean[c] - kvd_bf16_to_f32(out->k_mean_parts[0][c]));
    }
    float *scale_k = &operands->scale_k[index], *scale_v = &operands->scale_v[index];
    double room = 1, of_levels = 1;
    out->forward_scale[0] = *scale_k;
    out->forward_scale[1] = out->inverse_scale = *scale_v;
    if (kvd_cuda_is_transform(d)) {
        room = room_of(&k, out, false), of_levels = room_of(&k, out, true);
        operand_matrix(&k, QUERIES, m);
        *scale_k =
            (float)(kvd_cuda_operands_pack(KVD_CUDA_QUERIES, m, k.dim, operands->queries, index) /
                    room);
        operand_matrix(&k, FORWARD, m);
        out->forward_scale[0] =
            kvd_cuda_operands_pack(KVD_CUDA_FORWARD, m, k.dim, operands->forward_k, index);
        operand_matrix(&v, FORWARD, m);
        out->forward_scale[1] =
            kvd_cuda_operands_pack(KVD_CUDA_FORWARD, m, v.dim, operands->forward_v, index);
        operand_matrix(&v, BACK, m);
        out->inverse_scale =
            kvd_cuda_operands_pack(KVD_CUDA_BACK, m, v.dim, operands->inverse_v, index);
        *scale_v = out->inverse_scale;
    }
    out->inverse_scale /= KVD_EVEN_STEP;
    out->query_unit = (float)(1 / room);
    out->levels_room = (float)(of_levels / room);
}
