// What a rotation set and a codec cost: attention over quantized keys and values against attention
// over the recorded ones.
//
// A dump's tokens are cut into contexts. The queries of a context's last positions attend,
// causally, to all of it, once as recorded and once with the history [sink, end - recent) as pages
// of the codec hold it: rotated, quantized (kernels/quantize.h), un-rotated. A set of transforms is
// its own codec's (calib/transforms.h), and no pages are made.
// Layers with sliding windows see what these let them, as the dump has them. Per layer and case:
//   output error   sqrt(sum |o' - o|^2 / sum |o|^2), o the outputs of all queries and q heads
//   worst head     the largest such error of a kv head's queries
//   logit error    root mean square of scale * q (k' - k) over the quantized tokens that are seen
//   bias           mean over queries of scale * q (k' - k) at the quantized token whose recorded
//                  logit is largest: below 0, what a query looks for is seen less than what it does
//                  not, though every other error be small
//   KL             mean over queries of sum p log(p / p'), in nats
//   moved          what becomes, to first order, of the loss whose gradients g the dump has: mean
//   over
//                  contexts of the root of the sum over positions of (sum g (o' - o))^2, the inner
//                  sum over all q heads. Errors that no answer depends on are none here. 0 where
//                  the dump has no gradients
#ifndef KVD_CALIB_EVAL_H
#define KVD_CALIB_EVAL_H

#include "calib/dump.h"
#include "calib/rotset.h"

struct kvd_eval_options {
    uint32_t context;      // tokens; shorter ends of a file are left out
    uint32_t queries;      // positions at the end of each context
    uint32_t sink, recent; // as in a namespace's layout; 0 and 0: everything is quantized but the
                           // queries' own tokens
    uint32_t max_contexts; // of a layer; 0: all
    uint32_t threads;      // 0: as many as there are
    void (*progress)(void *ctx, uint64_t done, uint64_t total); // one thread at a time
    void *ctx;
};

// How channels share the energy of K or V, largest first, all together 1: means over layers, kv
// heads and contexts of the history. Row 0 is as recorded, row 1 + i after case i's rotation.
struct kvd_eval_spectra {
    double *k, *v; // [1 + n][dim], of the caller
};

struct kvd_eval_case {
    const struct kvd_rotset *set; // with the clip ratios and gains to use
    uint32_t codec; // bf16: nothing is quantized. Of no account for a set of transforms
    enum kvd_scale scale_k, scale_v; // instead of the set's
};

struct kvd_eval_figures {
    double output_error, worst_head, logit_error, bias, kl, moved;
};

// Evaluates n cases on the layers that the dump and all sets have: layers[0 .. *n_layers), of the
// caller, as many as the dump has at most. figures: [n][*n_layers].
// KVD_E_INVALID: nothing in common, other head_dims, no context long enough. KVD_E_CORRUPT as
// kvd_dump_read. spectra may be NULL.
int kvd_eval_run(const struct kvd_dump *d, const struct kvd_eval_case *cases, uint32_t n,
                 const struct kvd_eval_options *o, struct kvd_eval_figures *figures,
                 uint16_t *layers, uint32_t *n_layers, struct kvd_eval_spectra *spectra,
                 struct kvd_error *err);

// Sets the clip ratios of each layer of `set`, then the gains, to those of a fixed list that give
// the least output error in codec int2 with published scales (others know neither), for K with V as
// recorded and for V with K as recorded.
int kvd_eval_fit_clips(const struct kvd_dump *d, struct kvd_rotset *set,
                       const struct kvd_eval_options *o, struct kvd_error *err);

// Bits that a value of K and V takes in pages of a codec, parameters included.
double kvd_eval_bits(uint32_t codec, uint32_t dim_k, uint32_t dim_v);

#endif
