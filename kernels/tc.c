#include "kernels/tc.h"

#include <math.h>

#include "kernels/codebook.h"

// By bits: the distance of evenly spaced levels that loses least of a normal variable.
static const float steps[KVD_TC_MAX_BITS + 1] = {0, 1.5958f, KVD_EVEN_STEP, 0.5860f,
                                                 KVD_EVEN_STEP_4};

struct kvd_tc_coder kvd_tc_coder_of(uint32_t codec, uint32_t dim, bool v, const float *sigma,
                                    const float *bits)
{
    struct kvd_tc_coder t = {.sigma = v ? NULL : sigma,
                             .dim = dim,
                             .refits = v ? KVD_TC_V_REFITS : KVD_TC_K_REFITS,
                             .v = v};
    uint32_t tiles = dim / KVD_TC_TILE, sum = kvd_tc_stream_bits(codec, dim);
    for (uint32_t i = 0; i < tiles; i++)
        t.bits[i] = v      ? KVD_TC_V_BITS
                    : bits ? (uint8_t)bits[i]
                           : (uint8_t)(sum / tiles + (i < sum % tiles));
    return t;
}

static double sigma_of(const struct kvd_tc_coder *t, uint32_t channel)
{
    return t->sigma ? (double)t->sigma[channel] : 1;
}

// -- rows to codes -------------------------------------------------------------------------------

double kvd_tc_step(const struct kvd_tc_coder *t, uint32_t channel)
{
    return sigma_of(t, channel) * (double)steps[t->bits[channel / KVD_TC_TILE]];
}

double kvd_tc_value(const struct kvd_tc_coder *t, uint32_t channel, uint8_t code)
{
    double top = (double)((1u << t->bits[channel / KVD_TC_TILE]) - 1);
    return kvd_tc_step(t, channel) * (code - top / 2);
}

// What does not depend on the scale: distances of levels, and their inverses.
struct row {
    const float *y;
    double step[KVD_MAX_HEAD_DIM], inverse[KVD_MAX_HEAD_DIM];
};

// Codes of a tile for a scale: those of the levels nearest to y / scale, of two that are as near
// the lower one; NaN gives 0. Adds to sum c y and to sum c^2.
static void code_tile(const struct row *row, uint32_t begin, uint32_t b, double scale,
                      uint8_t *codes, double *products, double *squares)
{
    double top = (double)((1u << b) - 1), half = top / 2, per = scale > 0 ? 1 / scale : 0;
    double cy[2] = {0}, cc[2] = {0};
    for (uint32_t i = begin; i < begin + KVD_TC_TILE; i++) {
        double y = (double)row->y[i], x = y * row->inverse[i] * per + (half + 0.5);
        x = x > 1 ? x : 1; // counted from 1; NaN too
        x = x < top + 1 ? x : top + 1;
        int code = (int)x;
        code -= code == x; // rounded down, but not from a whole number
        codes[i] = (uint8_t)code;
        double c = row->step[i] * (code - half);
        cy[i % 2] += c * y;
        cc[i % 2] += c * c;
    }
    *products += cy[0] + cy[1];
    *squares += cc[0] + cc[1];
}

// Codes for a scale. Returns sum c y, and sum c^2.
static double code_row(const struct kvd_tc_coder *t, const struct row *row, double scale,
                       uint8_t *codes, double *squares)
{
    double products = 0;
    *squares = 0;
    for (uint32_t i = 0; i < t->dim / KVD_TC_TILE; i++)
        if (t->bits[i])
            code_tile(row, i * KVD_TC_TILE, t->bits[i], scale, codes, &products, squares);
        else
            memset(codes + i * KVD_TC_TILE, 0, KVD_TC_TILE);
    return products;
}

uint16_t kvd_tc_quantize(const struct kvd_tc_coder *t, const float *y,
                         uint8_t codes[KVD_MAX_HEAD_DIM])
{
    struct row row;
    row.y = y;
    double energy = 0, whitened = 0, coded = 0, squares;
    for (uint32_t i = 0; i < t->dim; i++) {
        uint32_t b = t->bits[i / KVD_TC_TILE];
        double x = (double)y[i] / sigma_of(t, i);
        if (b == 0)
            continue;
        row.step[i] = sigma_of(t, i) * (double)steps[b];
        row.inverse[i] = 1 / row.step[i];
        energy += (double)y[i] * (double)y[i];
        whitened += x * x;
        coded++;
    }
    double scale = coded > 0 ? sqrt(whitened / coded) : 0;
    double products = code_row(t, &row, scale, codes, &squares);
    for (uint32_t i = 0; i < t->refits && products > 0; i++) {
        scale = products / squares;
        products = code_row(t, &row, scale, codes, &squares);
    }
    return kvd_f32_to_fp16((float)(products > 0 ? fmin(energy / products, 65504) : 0));
}

// -- rows in tiles -------------------------------------------------------------------------------

// Bits of K's codes that a register has of each of its two elements.
static uint32_t stream_bits(const struct kvd_tc_coder *t)
{
    uint32_t sum = 0;
    for (uint32_t i = 0; i < t->dim / KVD_TC_TILE; i++)
        sum += t->bits[i];
    return sum;
}

uint32_t kvd_tc_codes_bytes(const struct kvd_tc_coder *t)
{
    return KVD_PAGE_TOKENS * KVD_TC_TILE / 8 * stream_bits(t);
}

static uint64_t low_bits(uint32_t n)
{
    return (1ull << n) - 1;
}

// Moves the stream of one of a token's elements, that of channel c of each tile, to or from a side
// of K: pieces of 16 bits, then of 8, 4, 2 and 1, each within two bytes.
static void move_stream(uint8_t *side, uint32_t all, uint32_t token, uint32_t c, uint64_t *stream,
                        bool write)
{
    uint32_t row = token % 16, lane = row % 8 * 4 + c % 8 / 2, reg = row / 8 + c / 8 * 2;
    uint32_t size = 16; // bits of a piece, and bytes that a lane has of it
    uint8_t *chunk = side + (uint64_t)token / 16 * KVD_LANES * all;
    for (uint32_t before = 0; before < all; before += size) {
        while (before + size > all)
            size /= 2;
        uint32_t half = size < 4 ? 4 * size : 16, bits = reg * size;
        uint32_t bit = bits % half + half * (c % 2);
        uint8_t *at = chunk + KVD_LANES * before + lane * size + bits / half * 4 + bit / 8;
        uint32_t bytes = size == 16 ? 2 : 1, shift = bit % 8, old = 0;
        memcpy(&old, at, bytes); // little-endian, as everything here
        if (write) {
            uint32_t mask = (uint32_t)low_bits(size) << shift;
            old = (old & ~mask) | ((uint32_t)(*stream >> before) << shift & mask);
            memcpy(at, &old, bytes);
        } else {
            *stream |= (uint64_t)(old >> shift & low_bits(size)) << before;
        }
    }
}

static void move_keys(const struct kvd_tc_coder *t, uint8_t *side, uint32_t token, uint8_t *codes,
                      bool write)
{
    uint32_t all = stream_bits(t), tiles = t->dim / KVD_TC_TILE;
    for (uint32_t c = 0; c < KVD_TC_TILE; c++) {
        uint64_t stream = 0;
        uint32_t at = 0;
        for (uint32_t i = 0; write && i < tiles; at += t->bits[i++])
            stream |= (codes[i * KVD_TC_TILE + c] & low_bits(t->bits[i])) << at;
        move_stream(side, all, token, c, &stream, write);
        for (uint32_t i = 0; !write && i < tiles; at += t->bits[i++])
            codes[i * KVD_TC_TILE + c] = (uint8_t)(stream >> at & low_bits(t->bits[i]));
    }
}

static void move_values(uint8_t *side, uint32_t dim, uint32_t token, uint8_t *codes, bool write)
{
    for (uint32_t c = 0; c < dim; c++) {
        struct kvd_code_place p = kvd_place_of(true, dim, KVD_TC_V_BITS, token, c);
        uint8_t *at = &side[p.byte];
        if (write)
            *at = (uint8_t)((*at & ~(3u << p.bit)) | (codes[c] & 3u) << p.bit);
        else
            codes[c] = *at >> p.bit & 3;
    }
}

void kvd_tc_pack(const struct kvd_tc_coder *t, uint8_t *side, uint32_t token, const uint8_t *codes)
{
    if (t->v)
        move_values(side, t->dim, token, (uint8_t *)codes, true);
    else
        move_keys(t, side, token, (uint8_t *)codes, true);
}

void kvd_tc_unpack(const struct kvd_tc_coder *t, const uint8_t *side, uint32_t token,
                   uint8_t codes[KVD_MAX_HEAD_DIM])
{
    if (t->v)
        move_values((uint8_t *)side, t->dim, token, codes, false);
    else
        move_keys(t, (uint8_t *)side, token, codes, false);
}
