// K of tc2 and tc2.5, whose channel tiles have codes of any width (tc.h), as bytes: for amx.c.
//
// A *part* is what one piece of the stream has of a channel tile's codes: all their bits, but for
// codes that lie across pieces. Two parts of one piece are a *pair*: 32 bytes of a query's lines.
// Codes are taken out of words by bytes that begin at any bit, so that each comes to its place at
// once, doubled, and what is beside it is masked.
#ifndef KVD_KERNELS_CPU_DIGITS_TC_H
#define KVD_KERNELS_CPU_DIGITS_TC_H

#include "kernels/cpu/digits.h"

enum {
    PAIR_BYTES = 32, // of a line
    MOST_PIECES = 5, // of 16, 8, 4, 2 and 1 bytes a lane; or two of 16 and one more
    MOST_PAIRS = 12, // of parts: sixteen channel tiles, and two more in each piece but the first
    NO_TILE = 0xff,
};

// What tc_scores has to know of K's codes. It lies in the fourth line of the first row's queries,
// as far as there are pairs.
struct tc_plan {
    uint8_t n_pairs, n_pieces;
    struct {
        uint8_t lane, before, pairs; // bytes a lane; bits of the stream before it
    } piece[MOST_PIECES];
    struct {
        uint64_t from[2]; // where bytes of two words begin, of rows with even numbers and with odd
        uint32_t mask;    // of a word's bytes
    } pair[MOST_PAIRS];
};

// At the end of every row's fourth line.
struct tc_tail {
    int32_t start[DIGITS];
    float from;
};

// Of each pair.
struct tc_parts {
    uint8_t tile[MOST_PAIRS][2], bit[MOST_PAIRS][2], mask[MOST_PAIRS][2];
};

static void tc_add_part(struct tc_plan *p, struct tc_parts *parts, uint32_t tile, uint32_t bit,
                        uint32_t mask)
{
    uint8_t *pairs = &p->piece[p->n_pieces - 1].pairs;
    bool second = *pairs > 0 && parts->tile[p->n_pairs - 1][1] == NO_TILE;
    if (!second) {
        parts->tile[p->n_pairs][1] = NO_TILE;
        parts->bit[p->n_pairs][1] = parts->mask[p->n_pairs][1] = 0;
        p->n_pairs++;
        ++*pairs;
    }
    parts->tile[p->n_pairs - 1][second] = (uint8_t)tile;
    parts->bit[p->n_pairs - 1][second] = (uint8_t)bit;
    parts->mask[p->n_pairs - 1][second] = (uint8_t)mask;
}

// Where the bytes of two neighbouring words begin: [word][element][part].
static uint64_t tc_from(uint32_t lane, uint32_t half, const uint8_t bit[2])
{
    uint64_t all = 0;
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t word = i / 4, element = i / 2 % 2 * (lane < 4 ? 4 * lane : 16);
        uint32_t reg = lane == 16 ? 0 : lane == 8 ? word : word + 2 * half;
        all |= (uint64_t)((32 * word + element + reg * lane + bit[i % 2]) & 63) << (8 * i);
    }
    return all;
}

static void tc_plan_of(const struct kvd_tc_coder *t, struct tc_plan *p, struct tc_parts *parts)
{
    uint32_t all = 0, tiles = t->dim / KVD_TC_TILE;
    memset(p, 0, sizeof(*p));
    for (uint32_t i = 0; i < tiles; i++)
        all += t->bits[i];
    for (uint32_t lane = 16, before = 0; before < all; before += lane) {
        while (before + lane > all)
            lane /= 2;
        p->piece[p->n_pieces].lane = (uint8_t)lane;
        p->piece[p->n_pieces++].before = (uint8_t)before;
        for (uint32_t i = 0, at = 0; i < tiles; at += t->bits[i++]) {
            uint32_t lo = KVD_MAX(at, before), hi = KVD_MIN(at + t->bits[i], before + lane);
            if (lo < hi) // doubled, the code begins a bit earlier, in another piece perhaps
                tc_add_part(p, parts, i, at - before - 1, ((1u << (hi - lo)) - 1) << (lo - at + 1));
        }
    }
    for (uint32_t i = 0, pair = 0; i < p->n_pieces; i++)
        for (uint32_t j = 0; j < p->piece[i].pairs; j++, pair++) {
            for (uint32_t half = 0; half < 2; half++)
                p->pair[pair].from[half] = tc_from(p->piece[i].lane, half, parts->bit[pair]);
            p->pair[pair].mask = (parts->mask[pair][0] | parts->mask[pair][1] << 8) * 0x10001u;
        }
}

static struct tc_tail *tc_tail_of(float *q, uint32_t dim)
{
    return (struct tc_tail *)(void *)(q + 2 * dim) - 1;
}

static void tc_prepare(const struct kvd_tc_coder *t, const float *q, float *out)
{
    struct tc_plan plan;
    struct tc_parts parts = {0};
    float x[MOST_PAIRS * PAIR_BYTES] = {0};
    int8_t centre[MOST_PAIRS * PAIR_BYTES];
    struct tc_tail *tail = tc_tail_of(out, t->dim);
    tc_plan_of(t, &plan, &parts);
    uint32_t bytes = plan.n_pairs * PAIR_BYTES;
    for (uint32_t i = 0; i < bytes; i++) {
        uint32_t pair = i / PAIR_BYTES, row = i % PAIR_BYTES / 4, tile = parts.tile[pair][i & 1];
        centre[i] = (int8_t)(parts.mask[pair][i & 1] / 2);
        if (tile != NO_TILE)
            x[i] = q[tile * KVD_TC_TILE + row / 2 * 2 + 8 * (row & 1) + (i % 4 >> 1)];
    }
    tail->from = digit_lines(q, t->dim, x, bytes, out);
    uint8_t *line = (uint8_t *)out;
    memcpy(line + DIGITS * 2 * t->dim, &plan,
           offsetof(struct tc_plan, pair) + plan.n_pairs * sizeof(plan.pair[0]));
    for (uint32_t d = 0; d < DIGITS; d++)
        for (uint32_t i = 0; i < bytes; i++)
            tail->start[d] -= centre[i] * (int8_t)line[d * 2 * t->dim + i];
}

#endif
