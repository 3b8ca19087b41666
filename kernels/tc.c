#include "kernels/tc.h"

#include <math.h>

#include "kernels/quantize.h"

// By bits: the distance of evenly spaced levels that loses least of a normal variable.
static const float steps[KVD_TC_MAX_BITS + 1] = {0, 1.5958f, 0.9957f, 0.5860f, 0.3352f};

static uint32_t tile_bits(const struct kvd_tc_coder *t, uint32_t tile)
{
    return t->bits ? (uint32_t)t->bits[tile] : KVD_TC_V_BITS;
}

static double sigma_of(const struct kvd_tc_coder *t, uint32_t channel)
{
    return t->sigma ? (double)t->sigma[channel] : 1;
}

// -- rows to codes -------------------------------------------------------------------------------

double kvd_tc_value(const struct kvd_tc_coder *t, uint32_t channel, uint8_t code)
{
    uint32_t b = tile_bits(t, channel / KVD_TC_TILE);
    double top = (double)((1u << b) - 1);
    return sigma_of(t, channel) * (double)steps[b] * (code - top / 2);
}

// Of the level nearest to x deviations; of two that are as near the lower one. NaN gives 0.
static uint8_t nearest(double x, uint32_t b)
{
    double top = (double)((1u << b) - 1), code = ceil(x / (double)steps[b] + top / 2 - 0.5);
    return code > 0 ? (uint8_t)fmin(code, top) : 0;
}

// Codes for a scale. Returns sum c y, and sum c^2.
static double code_row(const struct kvd_tc_coder *t, const float *y, double scale, uint8_t *codes,
                       double *squares)
{
    double products = 0;
    *squares = 0;
    for (uint32_t i = 0; i < t->dim; i++) {
        uint32_t b = tile_bits(t, i / KVD_TC_TILE);
        double x = scale > 0 ? (double)y[i] / (sigma_of(t, i) * scale) : 0;
        codes[i] = b ? nearest(x, b) : 0;
        double c = kvd_tc_value(t, i, codes[i]);
        products += c * (double)y[i];
        *squares += c * c;
    }
    return products;
}

uint16_t kvd_tc_quantize(const struct kvd_tc_coder *t, const float *y,
                         uint8_t codes[KVD_MAX_HEAD_DIM])
{
    double energy = 0, whitened = 0, coded = 0, squares;
    for (uint32_t i = 0; i < t->dim; i++) {
        double x = (double)y[i] / sigma_of(t, i);
        if (!tile_bits(t, i / KVD_TC_TILE))
            continue;
        energy += (double)y[i] * (double)y[i];
        whitened += x * x;
        coded++;
    }
    double scale = coded > 0 ? sqrt(whitened / coded) : 0;
    double products = code_row(t, y, scale, codes, &squares);
    for (uint32_t i = 0; i < t->refits && products > 0; i++) {
        scale = products / squares;
        products = code_row(t, y, scale, codes, &squares);
    }
    return kvd_f32_to_fp16((float)(products > 0 ? fmin(energy / products, 65504) : 0));
}

// -- rows in tiles -------------------------------------------------------------------------------

// Bits of K's codes of a token, in all.
static uint32_t stream_bits(const struct kvd_tc_coder *t)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < t->dim / KVD_TC_TILE; i++)
        sum += tile_bits(t, i);
    return sum;
}

uint32_t kvd_tc_codes_bytes(const struct kvd_tc_coder *t)
{
    return KVD_PAGE_TOKENS * KVD_TC_TILE / 8 * stream_bits(t);
}

// Where bit `at` of the `all` that a register has of each of its two elements lies, for a channel
// of K within its tile.
static struct kvd_code_place place_in_stream(uint32_t all, uint32_t at, uint32_t token,
                                             uint32_t channel)
{
    uint32_t row = token % 16, lane = row % 8 * 4 + channel % 8 / 2;
    uint32_t reg = row / 8 + channel / 8 * 2, lane_bytes = 16, before = 0;
    for (;;) { // pieces of 16 bits, then of 8, 4, 2 and 1
        if (before + lane_bytes > all) {
            lane_bytes /= 2;
        } else if (at >= before + lane_bytes) {
            before += lane_bytes;
        } else {
            break;
        }
    }
    uint32_t half = lane_bytes < 4 ? 4 * lane_bytes : 16, bits = reg * lane_bytes + at - before;
    uint32_t bit = bits % half + half * (channel % 2);
    return (struct kvd_code_place){token / 16 * KVD_LANES * all + KVD_LANES * before +
                                       lane * lane_bytes + bits / half * 4 + bit / 8,
                                   bit % 8};
}

// Moves bit `bit` of a code to or from its place.
static void move_bit(uint8_t *side, struct kvd_code_place p, uint8_t *code, uint32_t bit,
                     bool write)
{
    if (write)
        side[p.byte] =
            (uint8_t)((side[p.byte] & ~(1u << p.bit)) | (uint32_t)(*code >> bit & 1) << p.bit);
    else
        *code |= (uint8_t)((side[p.byte] >> p.bit & 1) << bit);
}

static void move_codes(const struct kvd_tc_coder *t, uint8_t *side, uint32_t token, uint8_t *codes,
                       bool write)
{
    uint32_t all = stream_bits(t), before = 0;
    for (uint32_t c = 0; c < t->dim; c++) {
        uint32_t b = tile_bits(t, c / KVD_TC_TILE);
        for (uint32_t i = 0; i < b; i++) {
            struct kvd_code_place p;
            if (t->v) {
                p = kvd_place_of(true, t->dim, KVD_TC_V_BITS, token, c);
                p.bit += i;
            } else {
                p = place_in_stream(all, before + i, token, c % KVD_TC_TILE);
            }
            move_bit(side, p, &codes[c], i, write);
        }
        before += (c + 1) % KVD_TC_TILE ? 0 : b;
    }
}

void kvd_tc_pack(const struct kvd_tc_coder *t, uint8_t *side, uint32_t token, const uint8_t *codes)
{
    move_codes(t, side, token, (uint8_t *)codes, true);
}

void kvd_tc_unpack(const struct kvd_tc_coder *t, const uint8_t *side, uint32_t token,
                   uint8_t codes[KVD_MAX_HEAD_DIM])
{
    memset(codes, 0, t->dim);
    move_codes(t, (uint8_t *)side, token, codes, false);
}
