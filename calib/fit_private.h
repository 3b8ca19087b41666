// What the fits of rotations and of transforms share.
#ifndef KVD_CALIB_FIT_PRIVATE_H
#define KVD_CALIB_FIT_PRIVATE_H

#include "calib/fit.h"

enum { KVD_FIT_BLOCK = 256 }; // tokens at once

// Heads [head, head + count) of n tokens as [n * count][dim] doubles.
void kvd_fit_gather(const float *rows, uint64_t n, uint32_t heads, uint32_t head, uint32_t count,
                    uint32_t dim, double *out);
// c += a^T a, upper triangle.
void kvd_fit_add_products(const double *a, uint64_t rows, uint32_t dim, double *c);
// c times f, and its lower triangle from the upper one.
void kvd_fit_finish(double *c, uint32_t dim, double f);

// KVD_E_INVALID: a layer that is asked for is not in the dump, or has fewer tokens than channels.
// Warns of few.
int kvd_fit_check_dump(const struct kvd_dump *d, const struct kvd_fit_options *o,
                       struct kvd_error *err);
// Layer i of the fit as an index into the dump's layers.
uint32_t kvd_fit_dump_layer(const struct kvd_dump *d, uint32_t model_layer);
// "kvd VERSION fit of N tokens in M files".
void kvd_fit_provenance(const struct kvd_dump *d, char *out, size_t cap);

#endif
