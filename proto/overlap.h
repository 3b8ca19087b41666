// Whether what a call writes shares memory with what else it writes or reads.
//
// Memory is told apart by a number that the caller chooses, and addresses count within it, so that
// the same memory under two names is seen as one. A pure function; any thread.
#ifndef KVD_PROTO_OVERLAP_H
#define KVD_PROTO_OVERLAP_H

#include "proto/base.h"

struct kvd_overlap_dim {
    uint64_t count, stride; // stride in bytes
};

#define KVD_OVERLAP_NO_ITEM UINT32_MAX

// A tensor: rows of `row` bytes at `begin` and the sums of its strides.
struct kvd_overlap {
    uint64_t memory, begin, row;
    struct kvd_overlap_dim dims[3]; // in any order
    bool written;
    const char *name; // for messages, as `item` is; KVD_OVERLAP_NO_ITEM: of the whole call
    uint32_t item;
};

// KVD_E_INVALID names two of the n tensors that share bytes, at least one of which is written, or
// one that is written and whose own rows do. So it does with two that are interleaved in more than
// KVD_OVERLAP_ROWS pieces without a stride in common: that they are apart would take too long to
// find out. KVD_E_INTERNAL: out of memory. Reorders `all`; takes n log n steps where bounds do not
// overlap, or strides are alike.
enum { KVD_OVERLAP_ROWS = 16384 };
int kvd_overlap_check(const struct kvd_overlap *all, size_t n, struct kvd_error *err);

#endif
