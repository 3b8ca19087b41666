// Fitting rotation sets to recorded activations (OSCAR: offline spectral covariance-aware
// rotation).
//
// Per kv head h with q heads G(h), over n tokens, in double precision:
//   qqt   C = sum over tokens and G(h) of q q^T / (n |G(h)|)
//   ktk   C = sum k k^T / n
//   sst   C = sum w_t v_t v_t^T / n, where w_t = k_t^T qqt(h) k_t, scaled to mean 1
//   vtv   C = sum v v^T / n
// A layer's covariance is the mean over its kv heads, or, per kv head, each its own.
//
// With C = U diag(lambda) U^T, eigenvalues ascending, H the Hadamard matrix (kvd_hadamard_entry) /
// sqrt(D) and P = I[:, perm], perm[bitrev(i)] = index of the i-th largest eigenvalue: where D is a
// power of two (r_h_pbr is refused for others):
//   r_h_pbr   R = U H P      r_h   R = U H      r   R = U      hadamard   R = H (no data)
//   top_h     R = U' H, the columns of U' those of U with the largest eigenvalue first
// H's first row is all ones: in top_h the direction that holds most of a row's energy becomes an
// equal share of all channels, which a row's min takes up without any code. Made for ktk and vtv.
// P permutes channels within a row that is quantized as a whole: it changes no error.
// Signs and bases are made the same everywhere: the largest component of an eigenvector is positive
// (the first of equals), and eigenvectors of one eigenvalue are those that a Gram-Schmidt process
// over the unit vectors gives.
//
// Results do not depend on the number of threads.
#ifndef KVD_CALIB_FIT_H
#define KVD_CALIB_FIT_H

#include "calib/dump.h"
#include "calib/transforms.h"

enum { KVD_FIT_ASKING = 64 }; // positions at the end of a prompt that asks

enum kvd_objective { KVD_FIT_QQT, KVD_FIT_KTK, KVD_FIT_SST, KVD_FIT_VTV, KVD_FIT_HADAMARD };
enum kvd_composition { KVD_COMPOSE_R_H_PBR, KVD_COMPOSE_R_H, KVD_COMPOSE_R, KVD_COMPOSE_TOP_H };

struct kvd_fit_options {
    enum kvd_objective k, v; // k: qqt, ktk or hadamard; v: sst, vtv or hadamard
    enum kvd_composition composition;
    bool per_kv_head;
    float clip_k, clip_v;   // ratios that the set gets
    uint32_t threads;       // 0: as many as there are
    const uint16_t *layers; // model layer ids, ascending; NULL: all of the dump
    uint32_t n_layers;
    const char *marks;            // of sensitive layers (calib/marks.h); NULL: none
    const struct kvd_dump *asked; // prompts with gradients, which transforms go by too; NULL: none
    const char *state; // directory that keeps finished layers, so that a fit that was cut
                       // short goes on; NULL: none
    void (*progress)(void *ctx, uint64_t done, uint64_t total); // bytes of the dump; one thread
    void (*warn)(void *ctx, const char *text);                  // each at a time
    void *ctx;
};

// What a side's fit found, in double precision.
struct kvd_spectrum {
    double *covariance;  // [layers][heads][dim][dim]
    double *eigenvalues; // [layers][heads][dim] ascending
    double *rotation;    // [layers][heads][dim][dim] before it is rounded
};

struct kvd_fit {
    struct kvd_rotset *set;
    struct kvd_spectrum k, v; // covariance NULL for hadamard
};

// "qqt", "sst", "hadamard"...; -1 for anything else.
int kvd_objective_parse(const char *text);
int kvd_composition_parse(const char *text);

// KVD_E_INVALID: objectives that do not fit their side, layers that the dump lacks, fewer tokens
// than channels, activations that span less than half of the channels. KVD_E_CORRUPT: NaN, or files
// that changed meanwhile.
struct kvd_fit *kvd_fit_run(const struct kvd_dump *d, const struct kvd_fit_options *o,
                            struct kvd_error *err);
void kvd_fit_free(struct kvd_fit **fit);

// Writes covariances, eigenvalues and rotations as F64 tensors k.covariance, k.eigenvalues,
// k.rotation and the same of v, with metadata layers.
int kvd_fit_write_spectrum(const struct kvd_fit *fit, const char *path, struct kvd_error *err);

// -- transforms ----------------------------------------------------------------------------------

// Fits transforms (calib/transforms.h), each kv head its own. With m the mean of k, S the
// covariance of k - m, Q = qqt, both as above, and W = Q D / trace(Q), its eigenvalues raised to
// 1e-6 of the largest: W^1/2 S W^1/2 = U diag(lambda) U^T, eigenvalues descending, raised to 1e-8
// of the largest; A = W^1/2 U, sigma = sqrt(lambda). The joint coding of what queries weigh and
// what keys do: an error that is even after A costs as little as an error of its size can. V's mean
// is taken off, and A is vtv's top_h.
//
// Bits of K's tiles: quarters of the channels at 4, 2, 1, 1 (tc2) or 4, 3, 2, 1 (tc2.5). Where
// tiles do not part into quarters, or if `greedy`: each next bit to the tile where sum lambda *
// D(b) falls most, D = 1, .363, .1175, .0345, .0095 for b = 0 to 4.
//
// Then each channel's sigma is multiplied by 0.8, 0.9, ... or 2, whichever makes sum w_t e^2 least,
// e the errors of its codes over the recorded keys past the first 64 of each file, with the scale
// rms(y / sigma) of before. Levels are those of normal channels, and keys are not: those of
// delimiters, which every query sees, lie close together and far out. w_t is what the recorded
// queries make of key t. With p = softmax(q k / sqrt(D)) and o = sum p_t v_t, do / dl_t = p_t (v_t
// - o) of a logit l_t, so that errors of keys that know nothing of each other move an output by sum
// p_t^2 (dl_t)^2 |v_t - o|^2; a channel's part of (dl_t)^2 is that of e^2, as A weighs by what
// queries are on average, and |v_t - o| is taken for the same everywhere. So w_t = sum p_t^2 over q
// heads and positions, 128 of a file at most, the last of each of so many equal parts: causally,
// within the layer's window, and only where key t is neither among the first 64 tokens nor among
// the position's last 256, which pages leave in bf16. A file is one context. Where no file is
// longer than that, all keys weigh alike.
//
// With prompts that ask (`asked`), half of what decides is what their answers depend on. With g the
// gradient of the answers' loss by an output o of theirs, a logit l_t moves the loss by dL / dl_t =
// p_t g (v_t - o). With m_t its square, summed over q heads and over the last KVD_FIT_ASKING
// positions of each prompt, keys compressed as above: Q is half qqt of the recordings, half sum
// (sum_t m_t) q q^T over these queries, each scaled to the same trace, and sums of costs are half
// those of the recordings' keys by w_t, half those of the prompts' by m_t, each divided by the sum
// of its weights. A prompt's m_t are
// scaled so that the sum of (sum m_t) |q|^2 over all layers and heads is 1. Where no answer depends
// on a head, the recordings decide alone.
//
// Of the options layers, n_layers, asked, threads, progress, warn and ctx are looked at. Errors are
// those of kvd_fit_run.
struct kvd_rotset *kvd_fit_transforms(const struct kvd_dump *d, uint32_t codec, bool greedy,
                                      const struct kvd_fit_options *o, struct kvd_error *err);

// -- linear algebra ------------------------------------------------------------------------------

// Eigenvectors of a symmetric matrix [dim][dim], ascending, as columns of u, in the canonical basis
// described above. Returns the rank (eigenvalues above 1e-10 of the largest), or -1 with *err.
int kvd_eigenbasis(const double *c, uint32_t dim, double *values, double *u, struct kvd_error *err);
// r = the composition of u.
void kvd_compose(const double *u, uint32_t dim, enum kvd_composition composition, double *r);

#endif
