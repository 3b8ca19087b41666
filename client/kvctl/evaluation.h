// What calib eval found, and the report of it.
#ifndef KVD_CLIENT_KVCTL_EVALUATION_H
#define KVD_CLIENT_KVCTL_EVALUATION_H

#include "calib/eval.h"

enum {
    EVALUATION_FILES = 16,
    EVALUATION_SETS = 3 + 2 * EVALUATION_FILES, // and copies at the published clip ratios
    EVALUATION_SCALES = 4,                      // that --scales compares
    EVALUATION_CASES = (6 + 4 * EVALUATION_FILES) * EVALUATION_SCALES,
};

// What is under evaluation: sets with codecs.
struct evaluation {
    struct kvd_rotset *sets[EVALUATION_SETS];
    uint32_t n_sets;
    struct kvd_eval_case cases[EVALUATION_CASES];
    char names[EVALUATION_CASES][96];
    double bits[EVALUATION_CASES]; // a value of K or V
    char *dump; // kvd_dump_digests of the activations; NULL where no set says what it was fitted to
    uint32_t n, n_layers;
    uint16_t layers[KVD_MAX_LAYERS];
    struct kvd_eval_figures *figures; // [with windows, without][n][n_layers]
    struct kvd_eval_spectra spectra;
};

// The name of a case's codec.
const char *evaluation_codec(const struct kvd_eval_case *c);

// [n_layers]; mode 0: with windows, 1: without.
const struct kvd_eval_figures *evaluation_figures(const struct evaluation *e, int mode, uint32_t i);
// Over layers: the root mean square of output errors, the means of the others, the worst head.
struct kvd_eval_figures evaluation_of_layers(const struct evaluation *e, int mode, uint32_t i,
                                             uint32_t *worst_layer);

// What a set's figures are worth: "held-out", "fitted" (on activations that it was fitted to),
// "clips-fitted" (that its clip ratios and gains were fitted to), "unknown" (the set does not say),
// or "none" (it was fitted to nothing).
const char *evaluation_activations(const struct evaluation *e, const struct kvd_rotset *set);
// A sentence of such a word.
const char *evaluation_warning(const char *activations);

// A page that needs no other file.
int evaluation_write_html(const struct evaluation *e, const struct kvd_dump *d,
                          const struct kvd_eval_options *o, const char *path,
                          struct kvd_error *err);

#endif
