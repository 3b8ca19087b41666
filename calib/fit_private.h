// What the fits of rotations and of transforms share.
#ifndef KVD_CALIB_FIT_PRIVATE_H
#define KVD_CALIB_FIT_PRIVATE_H

#include "calib/fit.h"

enum {
    KVD_FIT_BLOCK = 256,          // tokens at once
    KVD_FIT_SINK = 64,            // tokens of each recording that are taken never to be compressed,
    KVD_FIT_RECENT = 256,         // and how many before a query, its own among them
    KVD_FIT_ASKED_TOKENS = 16384, // of a prompt that asks, at most: all of a layer's are in memory
};

// Heads [head, head + count) of n tokens as [n * count][dim] doubles.
void kvd_fit_gather(const float *rows, uint64_t n, uint32_t heads, uint32_t head, uint32_t count,
                    uint32_t dim, double *out);
// c += a^T a, upper triangle.
void kvd_fit_add_products(const double *a, uint64_t rows, uint32_t dim, double *c);
// c times f, and its lower triangle from the upper one.
void kvd_fit_finish(double *c, uint32_t dim, double f);
double kvd_fit_trace(const double *c, uint32_t dim);

// KVD_E_INVALID: a layer that is asked for is not in the dump, or has fewer tokens than channels.
// Warns of few.
int kvd_fit_check_dump(const struct kvd_dump *d, const struct kvd_fit_options *o,
                       struct kvd_error *err);
// Layer i of the fit as an index into the dump's layers.
uint32_t kvd_fit_dump_layer(const struct kvd_dump *d, uint32_t model_layer);
// "kvd VERSION fit of N tokens in M files".
void kvd_fit_provenance(const struct kvd_dump *d, char *out, size_t cap);

// Weights of a recording's keys by the attention that they get from its queries, one layer at a
// time: with p what a query gives a key, causally and within the recording's window, a key's weight
// is the sum of p^2 over the q heads of its kv head and over at most 128 of the recording's
// positions, the last of each of so many equal parts, as far as a sink of 64 tokens and the recent
// 256 leave the key compressed. NULL: out of memory.
struct kvd_fit_attention *kvd_fit_attention_new(const struct kvd_dump *d);
void kvd_fit_attention_free(struct kvd_fit_attention **a);
// Goes through a recording once. KVD_E_CORRUPT as kvd_dump_read.
int kvd_fit_attention_begin(struct kvd_fit_attention *a, const struct kvd_dump_piece *piece,
                            struct kvd_error *err);
// Weights [kv heads][KVD_FIT_BLOCK] of its keys [first, first + n), n at most KVD_FIT_BLOCK, whose
// rows are [n][kv heads][dim]: above 0, and all the same where nobody looks.
void kvd_fit_attention_weigh(struct kvd_fit_attention *a, const float *rows, uint64_t first,
                             uint64_t n, double *weights);

// What answers depend on: a layer of one prompt at a time. NULL: out of memory.
struct kvd_fit_asked;
struct kvd_fit_asked *kvd_fit_asked_new(const struct kvd_dump *asked);
void kvd_fit_asked_free(struct kvd_fit_asked **a);
// KVD_E_INVALID: no gradients, heads or dims that are not the dump's, layers of the fit that are
// not there, prompts that are too long.
int kvd_fit_asked_check(const struct kvd_dump *asked, const struct kvd_dump *d,
                        const struct kvd_fit_options *o, struct kvd_error *err);
// What makes all prompts alike, so that those whose answers are unsure, and all gradients large, do
// not outweigh the others: units [pieces], 1 / the sum of the traces of all layers' moments.
int kvd_fit_asked_units(const struct kvd_dump *asked, uint32_t threads, double *units,
                        struct kvd_error *err);
// KVD_E_CORRUPT as kvd_dump_read. What follows is of the piece that was read last, times `unit`: 0
// where nothing depends on keys that are compressed.
int kvd_fit_asked_read(struct kvd_fit_asked *a, const struct kvd_dump_piece *p, double unit,
                       struct kvd_error *err);
const double *kvd_fit_asked_moments(const struct kvd_fit_asked *a, uint32_t head); // [dim_k][dim_k]
// Keys [tokens][dim_k] and their weights [tokens].
const double *kvd_fit_asked_keys(const struct kvd_fit_asked *a, const struct kvd_dump_piece *p,
                                 uint32_t head, const double **weights);

#endif
