// Rotation sets in host memory, their checks, and the files they come from.
//
// A set is immutable and named by the SHA-256 of its native file. Two file kinds are read: the
// native one (safetensors with metadata, see calib/README.md) and RotationZoo's .pt files, one for
// K and one for V. Reading executes nothing and trusts no length in the file. A native file may
// hold transforms instead of rotations (calib/transforms.h).
#ifndef KVD_CALIB_ROTSET_H
#define KVD_CALIB_ROTSET_H

#include "kernels/backend.h"

enum {
    KVD_DIGEST_TEXT = 72, // "sha256:" + 64 hex digits + NUL
};
#define KVD_ROTSET_MAX_BYTES (2ull << 30) // of a native file

// A layer that is to have a codec of its own (calib/marks.h).
struct kvd_mark {
    uint16_t layer; // its model layer id
    struct kvd_codecs codec;
};

struct kvd_rotset {
    char model[KVD_MAX_NAME + 1];
    char objective[96]; // "hadamard", "K qqt_r_h_pbr, V sst_r_h_pbr", ...
    char provenance[256];
    // Which recordings the rotations, and the clip ratios and gains, were fitted to, as
    // kvd_dump_digests has them; NULL: not known, or to none. The set's own.
    char *fitted_to, *clips_fitted_to;
    uint64_t fitted_length; // what their positions are below: what lies further is not known to the
                            // set; 0: it does not say
    char digest[KVD_DIGEST_TEXT];    // of the native file; "" until written
    uint16_t layers[KVD_MAX_LAYERS]; // model layer ids, ascending
    uint32_t n_layers;
    uint32_t heads; // rotations per layer: 1 or kv_heads
    uint32_t dim_k, dim_v;
    float *k, *v;           // [n_layers][heads][dim][dim]
    float *clip_k, *clip_v; // [n_layers][heads]
    float *gain_k,
        *gain_v; // [n_layers][heads], of the levels (kernels/quantize.h); 1 unless fitted
    enum kvd_scale scale_k, scale_v; // as published unless fitted or asked for
    // In place of k, v, clips and gains, which are NULL then. NULL: a set of rotations.
    struct kvd_transforms *transforms;
    struct kvd_mark *marks; // of sensitive layers, ascending; the set's own
    uint32_t n_marks;
};

void kvd_rotset_free(struct kvd_rotset **set);

// Whether layers, heads and dims may be a set's: KVD_OK or KVD_E_INVALID.
int kvd_rotset_check_shape(const struct kvd_rotset *set, struct kvd_error *err);
// Sizes the arrays of a set of rotations whose layers, heads and dims are filled in. KVD_E_INVALID
// when the shape is impossible.
int kvd_rotset_alloc(struct kvd_rotset *set, struct kvd_error *err);

// A copy, with the same digest. NULL when out of memory, and of a set of transforms.
struct kvd_rotset *kvd_rotset_clone(const struct kvd_rotset *set);

// The data-free sets, the same matrix for every layer, clips 0.96 and 0.92, by name:
//   "hadamard"  the Hadamard matrix (kvd_hadamard_entry) / sqrt(dim)
//   "random"    uniformly distributed orthogonal matrices, the same on every machine: Gram-Schmidt
//               of normal rows from a fixed seed; what TurboQuant rotates by
//   "identity"  no rotation: what "naive int2" means
// Hadamard's scales are unbiased for K and least squares for V; the others', what they stand for
// being published so, published.
bool kvd_rotset_built_in(const char *name);
struct kvd_rotset *kvd_rotset_new(const char *name, const uint16_t *layers, uint32_t n_layers,
                                  uint32_t dim_k, uint32_t dim_v, struct kvd_error *err);

// An entry, 1 or -1, of the Hadamard matrix of a head_dim: Sylvester's for powers of two; for the
// others the Kronecker product of Sylvester's and Paley's of order 12, 20 or 28 (hadamard.c). 0
// where there is none for this dim.
int kvd_hadamard_entry(uint32_t dim, uint32_t i, uint32_t j);

// All values finite, clip ratios in (0, 1], gains in [0.5, 1.5], every matrix orthogonal within
// 1e-3 (max |R R^T - I|; fp32 files measure below 1e-5). KVD_E_CORRUPT names the layer and the
// deviation. *worst (may be NULL) gets the largest deviation. Of transforms: kvd_transforms_check.
// Of marks: kvd_marks_check.
int kvd_rotset_check(const struct kvd_rotset *set, double *worst, struct kvd_error *err);

// Takes a matrix [dim][dim] that was orthogonal before its values were rounded to 16 bits to the
// nearest orthogonal one, in place. KVD_E_CORRUPT when it is further from that than rounding
// explains (max |R R^T - I| above 0.05).
int kvd_rotation_straighten(float *r, uint32_t dim, struct kvd_error *err);

// Whether the set serves a plane of a layout, the heads of its tensor-parallel rank if it names one
// (of all matrices of a layer, as kvd.proto's Layout says); if so *out describes the plane's
// layers. out->k etc. point to new memory that the caller frees with kvd_rotation_data_deinit.
// KVD_E_PRECONDITION says what does not match; a set of transforms serves planes whose K is in its
// codec, and V in any, and layers that it marks in the codecs of their marks alone.
int kvd_rotset_select(const struct kvd_rotset *set, const struct kvd_layout *layout, uint32_t plane,
                      struct kvd_rotation_data *out, struct kvd_error *err);
void kvd_rotation_data_deinit(struct kvd_rotation_data *data);

// "published", "least-squares" or "unbiased" (kernels/quantize.h), and back; -1 for other text.
#define KVD_SCALE_NAMES "published, least-squares or unbiased"
const char *kvd_scale_name(enum kvd_scale scale);
int kvd_scale_parse(const char *text);
// "K,V", such as "unbiased,least-squares". False, and nothing set, for other text.
bool kvd_scales_parse(const char *text, enum kvd_scale *k, enum kvd_scale *v);

// -- native files -------------------------------------------------------------------------------

// Reads a native file, of rotations or transforms. KVD_E_CORRUPT (malformed), KVD_E_LIMIT (too
// large), or a negative errno.
struct kvd_rotset *kvd_rotset_read(const char *path, struct kvd_error *err);
// Writes a native file at `path` (through a temporary beside it, renamed when complete) and sets
// set->digest.
int kvd_rotset_write(struct kvd_rotset *set, const char *path, struct kvd_error *err);
// Copies a native file as it is, in the same way. KVD_E_CORRUPT when it has not this digest.
int kvd_rotset_copy(const char *from, const char *digest, const char *path, struct kvd_error *err);

// -- RotationZoo --------------------------------------------------------------------------------

// Reads a K and a V file (.pt, format v1 or v2) into one set. Published clip ratios 0.96 and 0.92
// are set.
struct kvd_rotset *kvd_rotset_import(const char *path_k, const char *path_v, const char *model,
                                     struct kvd_error *err);

// Reads any file that holds a set: native, or a single .pt (then only K or V, both pointing to the
// same values).
struct kvd_rotset *kvd_rotset_open(const char *path, struct kvd_error *err);

// Model layer ids from text such as "0-35" or "3,7,11": ascending, at most KVD_MAX_LAYERS. Returns
// how many; 0 when malformed.
uint32_t kvd_layers_parse(const char *text, uint16_t *out);

// "sha256:<hex>" of a buffer.
void kvd_digest(const void *data, size_t len, char out[KVD_DIGEST_TEXT]);
// True for "sha256:" and 64 lower-case hex digits.
bool kvd_digest_valid(const char *text);

#endif
