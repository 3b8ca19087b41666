// Sets of transforms: what codecs tc2 and tc2.5 take in place of rotations, and what they do to a
// row.
//
// A key is coded as y = (k - mean) A, with A invertible but not orthogonal, so that an error has
// the shape that queries weigh least (calib/fit.h); a value as (v - mean) A, A orthogonal. What is
// read back is y' A^-1 + mean. Tiles of 16 channels of K have codes of 0 to 4 bits each, V's codes
// have two. A code of b bits is of the level step_b (code - (2^b - 1) / 2), in units of the
// channel's deviation and the token's scale.
//
// A set is for K of one codec; its V serves any (kvd_rotset_select).
#ifndef KVD_CALIB_TRANSFORMS_H
#define KVD_CALIB_TRANSFORMS_H

#include "calib/rotset.h"
#include "kernels/tc.h"

enum { KVD_TC_MAX_LOSS = 512 }; // of kvd_transform_loss

struct kvd_transforms {
    uint32_t codec;                       // tc2 or tc2.5
    float *k, *k_inverse, *v, *v_inverse; // [layers][heads][dim][dim], of the set
    float *k_mean, *v_mean;               // [layers][heads][dim]
    float *k_sigma;                       // [layers][heads][dim_k], deviations of y's channels
    float *k_bits;                        // [layers][heads][dim_k / 16], whole numbers
};

// The codec of that name, if it is one that takes transforms; else KVD_CODEC_COUNT.
uint32_t kvd_tc_find(const char *name);

// Gives a set whose layers, heads and dims are filled in transforms of this codec, all zeros.
// KVD_E_INVALID: an impossible shape.
int kvd_transforms_alloc(struct kvd_rotset *set, uint32_t codec, struct kvd_error *err);
void kvd_transforms_free(struct kvd_transforms **t);
// Puts the layers of another set, of this shape and codec, in place of a set's own of the same ids.
void kvd_transforms_replace(struct kvd_rotset *set, const struct kvd_rotset *by);

// What a transform does to errors that lie evenly in all directions, on the way there and back:
// |A| |A^-1| / dim in Frobenius norms. 1 where A is orthogonal; NaN where a value is not finite.
double kvd_transform_loss(const float *a, const float *inverse, uint32_t dim);

// All values finite, each inverse one (max |A A^-1 - I| within 1e-3), no loss above
// KVD_TC_MAX_LOSS, deviations above 0, bits whole, 0 to 4, and of the codec's sum. KVD_E_CORRUPT
// says which does not hold, and where. *worst (may be NULL) gets the largest |A A^-1 - I|.
int kvd_transforms_check(const struct kvd_rotset *set, double *worst, struct kvd_error *err);

// Matrix `at` (layer * heads + head) of one side.
struct kvd_transform {
    const float *a, *inverse, *mean;
    struct kvd_tc_coder coder;
};
struct kvd_transform kvd_transform_at(const struct kvd_rotset *set, uint64_t at, bool v);

// Takes a row y, transformed, through the bytes of a tile (kernels/tc.h), and writes over it what
// is read back, still transformed: scale * sigma * level. Returns the scale.
float kvd_tc_row(const struct kvd_transform *t, float *y);

#endif
