// Recorded activations of a model, as a worker would have them, and exact attention over them.
#ifndef KVD_EXAMPLES_ACTIVATIONS_H
#define KVD_EXAMPLES_ACTIVATIONS_H

#include "kvd/kvd.h"

enum { DIM = 64, QUERIES = 64, MAX_LAYERS = 64 };

struct activations {
    uint32_t layers, tokens, q_heads, kv_heads;
    uint32_t ids[MAX_LAYERS];
    const uint16_t *q, *k, *v;
    char model[128], text[128];
    double *want[MAX_LAYERS]; // exact outputs, once they have been asked for
};

struct score {
    double diff, want, got, dot;
};

// Ends the program with what went wrong.
void die(const char *what, const kvd_failure *err);
double now_ms(void);
// A safetensors file with bf16 q, k and v [layers, tokens, heads, 64].
struct activations load(const char *path);
// Tokens [first, first + n) of all layers, dense.
void copy_tokens(void *to, const uint16_t *from, const struct activations *a, uint32_t heads,
                 uint32_t first, uint32_t n);
// Adds what attention of the last QUERIES positions of a layer differs from the exact one.
void compare(struct activations *a, uint32_t l, const float *o, struct score *s);

#endif
