#include "kernels/quantize.h"

#include <math.h>

#include "kernels/tc.h"

// The n-th largest of |x|, n >= 1. Insertion into a short sorted list: n is about 5 % of dim.
static float nth_largest_abs(const float *x, uint32_t dim, uint32_t n)
{
    float top[KVD_MAX_ROW];
    uint32_t have = 0;
    for (uint32_t i = 0; i < dim; i++) {
        float a = fabsf(x[i]);
        if (have == n && !(a > top[n - 1]))
            continue;
        uint32_t j = have < n ? have++ : n - 1;
        for (; j > 0 && top[j - 1] < a; j--)
            top[j] = top[j - 1];
        top[j] = a;
    }
    return top[n - 1];
}

static const float levels_even[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const float levels_centred[] = {-1.5f * KVD_EVEN_STEP, -0.5f * KVD_EVEN_STEP,
                                       0.5f * KVD_EVEN_STEP, 1.5f * KVD_EVEN_STEP};
static const float levels_2[] = {KVD_MAGNITUDES_2, KVD_NEGATIVES_2};
static const float levels_3[] = {KVD_MAGNITUDES_3, KVD_NEGATIVES_3};
static const float levels_4[] = {KVD_MAGNITUDES_4, KVD_NEGATIVES_4};
static const float thresholds_2[] = {KVD_THRESHOLDS_2};
static const float thresholds_3[] = {KVD_THRESHOLDS_3};
static const float thresholds_4[] = {KVD_THRESHOLDS_4};

const float *kvd_codec_levels(uint32_t codec)
{
    uint32_t bits = kvd_codec_bits(codec);
    if (kvd_codec_tc(codec))
        return levels_centred;
    if (!kvd_codec_signed(codec))
        return levels_even;
    return bits == 4 ? levels_4 : bits == 3 ? levels_3 : levels_2;
}

// -- parameters ----------------------------------------------------------------------------------

// int2c: the low byte is n, scale 2^((n - 128) / 8), or 0 for n = 0; the high byte is the row's
// centre, min + 1.5 scale, in eighths of the scale, as a signed number.
enum { SCALE_ONE = 128, CENTRE_MOST = 127 };

// 2^((n - 128) / 8).
static float scale_of(uint32_t n)
{
    static const float eighths[8] = {KVD_EIGHTHS};
    uint32_t bits;
    memcpy(&bits, &eighths[n % 8], sizeof(bits));
    bits += (n / 8 - SCALE_ONE / 8) << 23; // wraps as it should below 1
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return n ? scale : 0;
}

static inline struct kvd_affine decode(uint32_t codec, uint32_t param)
{
    if (codec == KVD_CODEC_INT2C) {
        int centre = (int)(param >> 8 & 255);
        centre -= centre > CENTRE_MOST ? 256 : 0;
        float scale = scale_of(param & 255);
        return (struct kvd_affine){scale, scale * ((float)centre / 8 - 1.5f)};
    }
    float first = kvd_fp16_to_f32((uint16_t)param);
    if (kvd_codec_param_bytes(codec) == 2)
        return (struct kvd_affine){first, 0};
    return (struct kvd_affine){first, kvd_fp16_to_f32((uint16_t)(param >> 16))};
}

struct kvd_affine kvd_param_decode(uint32_t codec, uint32_t param)
{
    return decode(codec, param);
}

static uint32_t pack_fp16(float scale, float min)
{
    return kvd_f32_to_fp16(scale) | (uint32_t)kvd_f32_to_fp16(min) << 16;
}

// The high byte: a centre in eighths of the stored scale; 0 where that is 0.
static uint32_t pack_centre(float centre, float stored)
{
    if (!(stored > 0))
        return 0;
    int eighths = (int)fminf(fmaxf(rintf(centre * 8 / stored), -CENTRE_MOST), CENTRE_MOST);
    return ((uint32_t)eighths & 255) << 8;
}

static uint32_t pack_bytes(float scale, float centre)
{
    // A centre beyond what its byte reaches makes the scale coarser.
    scale = fmaxf(scale, fabsf(centre) * 8 / CENTRE_MOST);
    if (!(scale > 0))
        return 0;
    int n = SCALE_ONE + (int)fminf(fmaxf(rintf(8 * log2f(scale)), 1 - SCALE_ONE), SCALE_ONE - 1);
    return (uint32_t)n | pack_centre(centre, scale_of((uint32_t)n));
}

// One loop a size: attention comes here for every tile.
void kvd_params_read(uint32_t codec, const uint8_t *params, uint32_t n, struct kvd_affine *out)
{
    for (uint32_t t = 0; t < n && kvd_codec_param_bytes(codec) == 4; t++) {
        uint32_t param;
        memcpy(&param, params + kvd_param_index(t) * 4, 4);
        out[t] = decode(KVD_CODEC_INT2, param);
    }
    for (uint32_t t = 0; t < n && kvd_codec_param_bytes(codec) == 2; t++) {
        uint16_t param;
        memcpy(&param, params + kvd_param_index(t) * 2, 2);
        out[t] = decode(codec, param);
    }
}

// -- rows to codes -------------------------------------------------------------------------------

// The scale and min with which the row that is read back is as long, along x and about x's mean, as
// x itself: quantize.h. With `about_zero` the mean and min are 0.
static struct kvd_affine unbiased(const float *levels, const float *x, uint32_t dim,
                                  const uint8_t *codes, bool about_zero)
{
    float n = (float)dim, sum = 0, level_sum = 0, squares = 0, products = 0;
    for (uint32_t i = 0; i < dim && !about_zero; i++) {
        sum += x[i];
        level_sum += levels[codes[i]];
    }
    float mean = sum / n, centre = level_sum / n;
    for (uint32_t i = 0; i < dim; i++) {
        float d = x[i] - mean;
        squares += d * d;
        products += (levels[codes[i]] - centre) * d;
    }
    float scale = products > 0 ? squares / products : 0;
    return (struct kvd_affine){scale, mean - scale * centre};
}

// What an even quantizer's codes, 0 to `top`, come from: values within `limit` of 0, and the first
// level's place.
struct range {
    float top, limit, low, scale;
};

// Values of few digits lie half way between two levels often. They go up, also where `scale` was
// rounded up: a little more than a half is added, as on a GPU (even_levels in
// kernels/cuda/row_codes.cuh), so that both make the same codes.
static void code_range(const float *x, uint32_t dim, const struct range *r, uint8_t *codes)
{
    float half = 0.5f + (r->top + 1) * 0x1p-23f;
    for (uint32_t i = 0; i < dim; i++) {
        float c = fminf(fmaxf(x[i], -r->limit), r->limit);
        float q = r->scale > 0 ? floorf((c - r->low) / r->scale + half) : 0;
        codes[i] = (uint8_t)(q >= r->top ? r->top : q >= 1 ? q : 0);
    }
}

// The range of a row within its clip.
static struct range clipped_range(const float *x, uint32_t dim, float top, float ratio)
{
    struct range r = {.top = top, .limit = INFINITY};
    uint32_t index = (uint32_t)((double)ratio * dim);
    if (ratio < 1.0f && index < dim)
        r.limit = nth_largest_abs(x, dim, dim - index);
    float lo = INFINITY, hi = -INFINITY;
    for (uint32_t i = 0; i < dim; i++) {
        float c = fminf(fmaxf(x[i], -r.limit), r.limit);
        lo = fminf(lo, c);
        hi = fmaxf(hi, c);
    }
    r.low = lo;
    r.scale = (hi - lo) / top;
    return r;
}

// The range of least squared error that two refits find, and its codes.
static struct range fitted_range(const float *x, uint32_t dim, float top, uint8_t *codes)
{
    enum { REFITS = 2 };
    float n = (float)dim, sum = 0, squares = 0;
    for (uint32_t i = 0; i < dim; i++)
        sum += x[i];
    float average = sum / n;
    for (uint32_t i = 0; i < dim; i++)
        squares += (x[i] - average) * (x[i] - average);
    float step = top > 3 ? KVD_EVEN_STEP_4 : KVD_EVEN_STEP;
    struct range r = {.top = top, .limit = INFINITY, .scale = step * sqrtf(squares / n)};
    r.low = average - top / 2 * r.scale;
    code_range(x, dim, &r, codes);
    for (int k = 0; k < REFITS && r.scale > 0; k++) {
        float levels = 0, level_squares = 0, products = 0;
        for (uint32_t i = 0; i < dim; i++) {
            float l = codes[i];
            levels += l;
            level_squares += l * l;
            products += l * (x[i] - average);
        }
        float spread = level_squares - levels * levels / n;
        if (!(spread > 0))
            break;
        r.scale = products / spread;
        r.low = average - r.scale * levels / n;
        code_range(x, dim, &r, codes);
    }
    return r;
}

// int2c: scale and centre rounded to their bytes, and codes by what was stored, drawn apart by
// `gain` again. With a row's own gain, that of its unbiased scale, these are codes of which the
// stored scale is about unbiased; the centre then is what the row's mean asks for.
static uint32_t quantize_bytes(const float *x, uint32_t dim, struct range *r, float gain,
                               float centre, bool keep_mean, uint8_t *codes)
{
    uint32_t param = pack_bytes(r->scale * gain, centre);
    struct kvd_affine stored = decode(KVD_CODEC_INT2C, param);
    r->scale = stored.scale / gain;
    r->low = stored.min + 1.5f * (stored.scale - r->scale);
    code_range(x, dim, r, codes);
    if (!keep_mean)
        return param;
    float sum = 0;
    for (uint32_t i = 0; i < dim; i++)
        sum += x[i] - stored.scale * ((float)codes[i] - 1.5f);
    return (param & 255) | pack_centre(sum / (float)dim, stored.scale);
}

static void quantize_evenly(const struct kvd_quantizer *q, const float *x, uint32_t dim,
                            struct kvd_row *out)
{
    bool published = q->scale == KVD_SCALE_PUBLISHED;
    float top = (float)((1u << kvd_codec_bits(q->codec)) - 1), middle = top / 2;
    struct range r =
        published ? clipped_range(x, dim, top, q->ratio) : fitted_range(x, dim, top, out->codes);
    float gain = published ? q->gain : 1, drawn = r.scale * gain;
    struct kvd_affine a = {drawn, r.low + middle * (r.scale - drawn)};
    float centre = r.low + middle * r.scale;
    if (q->scale == KVD_SCALE_UNBIASED) {
        a = unbiased(levels_even, x, dim, out->codes, false);
        gain = a.scale > 0 ? a.scale / r.scale : 1;
        centre = a.min + middle * a.scale;
    }
    if (q->codec == KVD_CODEC_INT2C) {
        out->param = quantize_bytes(x, dim, &r, gain, centre, !published, out->codes);
        return;
    }
    out->param = pack_fp16(a.scale, a.min);
    if (published)
        code_range(x, dim, &r, out->codes);
}

// Codes of the levels nearest to (x - mean) / deviation.
static void code_nearest(uint32_t bits, const float *x, uint32_t dim, float mean, float deviation,
                         uint8_t *codes)
{
    const float *above = bits == 4 ? thresholds_4 : bits == 3 ? thresholds_3 : thresholds_2;
    uint32_t magnitudes = 1u << (bits - 1);
    for (uint32_t i = 0; i < dim; i++) {
        float d = x[i] - mean, a = fabsf(d);
        uint32_t index = 0;
        for (uint32_t j = 0; j + 1 < magnitudes; j++)
            index += a > above[j] * deviation;
        codes[i] = (uint8_t)(index | (d < 0 ? magnitudes : 0));
    }
}

static void quantize_about_mean(const float *x, uint32_t dim, enum kvd_scale scale,
                                struct kvd_row *out)
{
    enum { REFITS = 2 };
    float n = (float)dim, sum = 0, squares = 0;
    for (uint32_t i = 0; i < dim; i++)
        sum += x[i];
    float average = sum / n, mean = average;
    for (uint32_t i = 0; i < dim; i++)
        squares += (x[i] - average) * (x[i] - average);
    float deviation = sqrtf(squares / n);
    code_nearest(2, x, dim, mean, deviation, out->codes);
    for (int k = 0; k < REFITS && deviation > 0; k++) {
        float levels = 0, level_squares = 0, products = 0;
        for (uint32_t i = 0; i < dim; i++) {
            float l = levels_2[out->codes[i]];
            levels += l;
            level_squares += l * l;
            products += l * (x[i] - average);
        }
        float spread = level_squares - levels * levels / n;
        if (!(spread > 0))
            break;
        deviation = products / spread;
        mean = average - deviation * levels / n;
        code_nearest(2, x, dim, mean, deviation, out->codes);
    }
    struct kvd_affine a = {deviation, mean};
    if (scale == KVD_SCALE_UNBIASED)
        a = unbiased(levels_2, x, dim, out->codes, false);
    out->param = pack_fp16(a.scale, a.min);
}

static void quantize_about_zero(const struct kvd_quantizer *q, const float *x, uint32_t dim,
                                struct kvd_row *out)
{
    const float *levels = kvd_codec_levels(q->codec);
    float squares = 0;
    for (uint32_t i = 0; i < dim; i++)
        squares += x[i] * x[i];
    float scale = sqrtf(squares / (float)dim);
    code_nearest(kvd_codec_bits(q->codec), x, dim, 0, scale, out->codes);
    if (q->scale == KVD_SCALE_UNBIASED) {
        scale = unbiased(levels, x, dim, out->codes, true).scale;
    } else if (q->scale == KVD_SCALE_LEAST_SQUARES) {
        float level_squares = 0, products = 0;
        for (uint32_t i = 0; i < dim; i++) {
            float l = levels[out->codes[i]];
            level_squares += l * l;
            products += l * x[i];
        }
        scale = products > 0 ? products / level_squares : 0;
    }
    out->param = kvd_f32_to_fp16(scale);
}

void kvd_row_quantize(const struct kvd_quantizer *q, const float *x, uint32_t dim,
                      struct kvd_row *out)
{
    if (kvd_codec_tc(q->codec)) {
        out->param = kvd_tc_quantize(q->tc, x, out->codes);
        return;
    }
    float bounded[KVD_MAX_ROW]; // squares stay finite; fp16 parameters end far below
    for (uint32_t i = 0; i < dim; i++)
        bounded[i] = fminf(fmaxf(x[i], -0x1p40f), 0x1p40f);
    if (!kvd_codec_signed(q->codec)) {
        quantize_evenly(q, q->scale == KVD_SCALE_PUBLISHED ? x : bounded, dim, out);
        return;
    }
    if (q->codec == KVD_CODEC_INT2_LM)
        quantize_about_mean(bounded, dim, q->scale, out);
    else
        quantize_about_zero(q, bounded, dim, out);
}

// -- rows in tiles -------------------------------------------------------------------------------

// Reads, or writes if `write`, bits [shift, shift + width) of a row's codes from a plane.
static void move_plane(uint8_t *plane, uint32_t dim, bool v, uint32_t token, uint32_t width,
                       uint32_t shift, uint8_t *codes, bool write)
{
    uint32_t mask = (1u << width) - 1;
    for (uint32_t c = 0; c < dim; c++) {
        struct kvd_code_place p = kvd_place_of(v, dim, width, token, c);
        uint8_t *at = &plane[p.byte];
        if (write)
            *at = (uint8_t)((*at & ~(mask << p.bit)) | (codes[c] >> shift & mask) << p.bit);
        else
            codes[c] |= (uint8_t)((*at >> p.bit & mask) << shift);
    }
}

static void move_codes(uint32_t codec, uint8_t *at, uint32_t dim, bool v,
                       const struct kvd_tc_coder *tc, uint32_t token, uint8_t *codes, bool write)
{
    if (kvd_codec_tc(codec)) {
        if (write)
            kvd_tc_pack(tc, at, token, codes);
        else
            kvd_tc_unpack(tc, at, token, codes);
        return;
    }
    uint32_t bits = kvd_codec_bits(codec);
    move_plane(at, dim, v, token, 2, 0, codes, write);
    if (bits > 2)
        move_plane(at + kvd_codes_bytes(KVD_CODEC_INT2, dim, v), dim, v, token, bits - 2, 2, codes,
                   write);
}

void kvd_row_pack(struct kvd_codecs codec, uint8_t *tile, uint32_t dim_k, uint32_t dim_v, bool v,
                  const struct kvd_tc_coder *tc, uint32_t token, const struct kvd_row *row)
{
    struct kvd_row r = *row;
    uint32_t own = kvd_codecs_side(codec, v), bytes = kvd_codec_param_bytes(own);
    move_codes(own, tile + kvd_codes_offset(codec, dim_k, v), v ? dim_v : dim_k, v, tc, token,
               r.codes, true);
    memcpy(tile + kvd_params_offset(codec, dim_k, dim_v, v) + kvd_param_index(token) * bytes,
           &r.param, bytes); // little-endian, as everything here
}

void kvd_row_unpack(struct kvd_codecs codec, const uint8_t *tile, uint32_t dim_k, uint32_t dim_v,
                    bool v, const struct kvd_tc_coder *tc, uint32_t token, float *x)
{
    uint8_t codes[KVD_MAX_ROW] = {0};
    uint32_t dim = v ? dim_v : dim_k, own = kvd_codecs_side(codec, v), param = 0;
    uint32_t bytes = kvd_codec_param_bytes(own);
    move_codes(own, (uint8_t *)tile + kvd_codes_offset(codec, dim_k, v), dim, v, tc, token, codes,
               false);
    memcpy(&param,
           tile + kvd_params_offset(codec, dim_k, dim_v, v) + kvd_param_index(token) * bytes,
           bytes);
    struct kvd_affine a = kvd_param_decode(own, param);
    const float *levels = kvd_codec_levels(own);
    bool weighted = kvd_codec_tc(own) && !v; // a channel's levels are its own
    for (uint32_t c = 0; c < dim; c++)
        x[c] = weighted ? (float)((double)a.scale * kvd_tc_value(tc, c, codes[c]))
                        : a.scale * levels[codes[c]] + a.min;
}
