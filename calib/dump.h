// Recorded activations of a model: q, k and v after RoPE, in safetensors files, or as OSCAR's
// server dumps them.
//
// A dump is one file or a directory of them (*.safetensors, in the order of their names). Each
// holds some tokens of some layers, as
//   q, k, v              [layers, tokens, heads, head_dim], with metadata layers "0,9,19,29"
// or
//   layers.<id>.q, .k, .v   [tokens, heads, head_dim]
// in F16, BF16 or F32. The tokens of a layer are those of all files, one after another. Metadata
// windows, "512,512,0", has the sliding window of each of a file's layers, by ascending id, 0 for a
// layer that sees all tokens; without it all do. Metadata first, "6144", is the position of a
// file's first token, by which its keys and queries were turned; without it that is 0.
// Of the second kind, files may have gradients beside them,
//   layers.<id>.g           [tokens, heads of q, head_dim of v]
// by how much a loss, such as that of the answers which prompts ask for, grows with each of
// attention's outputs. All layers of all files have them, or none.
//
// OSCAR's is a directory of layer_<id>/q/<n>.pt, layer_<id>/k/<n>.pt and layer_<id>/v/<n>.pt, each
// of which holds one tensor [tokens, heads, head_dim], written by torch.save. As OSCAR's own
// fitting does, number 0 is passed over where there are others: it is what the server warms up
// with.
#ifndef KVD_CALIB_DUMP_H
#define KVD_CALIB_DUMP_H

#include "calib/safetensors.h"
#include "calib/torch_file.h"
#include "proto/kvd_limits.h"

enum kvd_dump_side {
    KVD_DUMP_Q,
    KVD_DUMP_K,
    KVD_DUMP_V,
    KVD_DUMP_SIDES, // of these every dump has all
    KVD_DUMP_G = KVD_DUMP_SIDES,
    KVD_DUMP_TENSORS
};

// Tokens of one layer: in one file, or in three.
struct kvd_dump_piece {
    uint32_t layer; // index into kvd_dump.layers
    uint32_t file[KVD_DUMP_TENSORS];
    uint32_t window; // how many tokens a query sees, its own among them; 0: all before it
    uint64_t first;  // position of the first token
    uint64_t tokens;
    uint64_t at[KVD_DUMP_TENSORS]; // in the file, or in its entry
    enum kvd_tensor_type type[KVD_DUMP_TENSORS];
};

struct kvd_dump_file {
    char *path;
    uint64_t size, inode, device;
    int64_t changed_ns;          // must stay as they were when the dump was opened
    uint32_t group;              // those of one group are told of by one digest
    char entry[KVD_TORCH_ENTRY]; // of a .pt file: what has the tensor's bytes; "": it is none
};

struct kvd_dump {
    struct kvd_dump_file *files;
    struct kvd_dump_piece *pieces; // by layer, then by file
    uint32_t n_files, n_groups, n_pieces, n_layers;
    uint16_t layers[KVD_MAX_LAYERS]; // model layer ids, ascending
    uint64_t tokens[KVD_MAX_LAYERS];
    uint32_t heads[KVD_DUMP_TENSORS], dim[KVD_DUMP_TENSORS];
    bool graded;                  // all pieces have gradients; else none has
    char model[KVD_MAX_NAME + 1]; // of the files' metadata; "" if they do not say
};

// KVD_E_NOT_FOUND (no such file, nothing that is a dump in it), KVD_E_CORRUPT (malformed),
// KVD_E_INVALID (shapes that do not fit together), or a negative errno.
struct kvd_dump *kvd_dump_open(const char *path, struct kvd_error *err);
void kvd_dump_free(struct kvd_dump **d);

// What the dump's files hold: the first 16 hex digits of the SHA-256 of each, or of OSCAR's files
// of each number together, separated by commas.
// Reads all of them. The caller's to free; NULL with KVD_E_CORRUPT when a file has changed, or a
// negative errno.
char *kvd_dump_digests(const struct kvd_dump *d, struct kvd_error *err);
// Whether two such texts have a file in common. NULL has none.
bool kvd_dump_digests_meet(const char *a, const char *b);

// Reads tokens [first, first + n) of a piece as [n][heads][dim] fp32. KVD_E_CORRUPT when the file
// was changed, cut or removed since it was opened, or holds NaN or Inf (says where). Any thread.
int kvd_dump_read(const struct kvd_dump *d, const struct kvd_dump_piece *p, enum kvd_dump_side side,
                  uint64_t first, uint64_t n, float *out, struct kvd_error *err);

#endif
