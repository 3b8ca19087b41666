// Reads the pickles that torch.save writes for plain dictionaries of tensors, numbers and texts, in
// protocols 2 to 5, and nothing else.
//
// It is a stack machine over some thirty opcodes that builds a tree of values. It imports nothing
// and calls nothing: the few globals that such files name are recognised by spelling, REDUCE knows
// the two of them that are functions, and every other opcode or global is an error.
#ifndef KVD_CALIB_PICKLE_H
#define KVD_CALIB_PICKLE_H

#include "proto/base.h"

enum kvd_pickle_kind {
    KVD_PICKLE_NONE,
    KVD_PICKLE_BOOL,
    KVD_PICKLE_INT,
    KVD_PICKLE_FLOAT,
    KVD_PICKLE_STR,
    KVD_PICKLE_TUPLE, // lists too
    KVD_PICKLE_DICT,
    KVD_PICKLE_GLOBAL,
    KVD_PICKLE_STORAGE,
    KVD_PICKLE_TENSOR,
};

// What a storage's elements are.
enum kvd_pickle_element {
    KVD_PICKLE_F32,
    KVD_PICKLE_F16,
    KVD_PICKLE_BF16,
    KVD_PICKLE_F64,
};

enum { KVD_PICKLE_MAX_RANK = 4 };

struct kvd_pickle_value {
    enum kvd_pickle_kind kind;
    int64_t number;                  // INT, BOOL; STORAGE: how many elements
    double real;                     // FLOAT
    enum kvd_pickle_element element; // STORAGE
    const char *text; // STR (NUL-terminated), GLOBAL ("module name"), STORAGE (its key)
    // TUPLE: the items; DICT: key, value, key, value, ... A later key wins.
    const struct kvd_pickle_value **items;
    uint32_t n_items, cap_items;
    // TENSOR
    const struct kvd_pickle_value *storage;
    int64_t offset; // elements
    uint32_t rank;
    int64_t shape[KVD_PICKLE_MAX_RANK], stride[KVD_PICKLE_MAX_RANK];
};

struct kvd_pickle;

// Parses `len` bytes. The tree lives until kvd_pickle_free. NULL with *err: KVD_E_CORRUPT says the
// offset and why.
struct kvd_pickle *kvd_pickle_parse(const uint8_t *data, size_t len, struct kvd_error *err);
void kvd_pickle_free(struct kvd_pickle **p);
const struct kvd_pickle_value *kvd_pickle_root(const struct kvd_pickle *p);

// The value of a string key of a dictionary, or NULL (also when `dict` is no dictionary).
const struct kvd_pickle_value *kvd_pickle_get(const struct kvd_pickle_value *dict, const char *key);

#endif
