// An engine's blocks: whether they are what they are said to be, and copying between them and dense
// tensors, in host memory. libkvd does it for engines whose memory kvd does not have, and kvd for
// those whose memory was registered. Any thread.
#ifndef KVD_KERNELS_PAGED_H
#define KVD_KERNELS_PAGED_H

#include "proto/base.h"
#include "proto/overlap.h"

// Distances in bytes.
struct kvd_paged_strides {
    uint64_t block, head, token, dim;
};

// K or V of an engine's KV, in bf16.
struct kvd_paged_side {
    const char *name;    // for messages
    void *const *layers; // where each layer begins
    uint64_t bytes;      // of memory from each of these on
    struct kvd_paged_strides strides;
    uint32_t dim; // elements of a head
};

// An engine's KV, and the blocks of it that pages lie in: tokens first_token, first_token + 1, ...
// of the listed blocks, one after the other.
struct kvd_paged_kv {
    struct kvd_paged_side side[2]; // K and V
    uint32_t layers, heads;
    uint32_t all_blocks, block_tokens; // that the memory has, and tokens of each
    const uint32_t *blocks;
    uint32_t n_blocks, first_token;
};

// Whether `pages` pages lie inside of the memory that `p` says there is and, where they are
// `written`, no block is another. KVD_E_INVALID says what is wrong.
int kvd_paged_check(const struct kvd_paged_kv *p, uint32_t pages, bool written,
                    struct kvd_error *err);
// All blocks of a layer's K or V, for kvd_overlap_check; `begin` is the address. `p` was checked.
struct kvd_overlap kvd_paged_span(const struct kvd_paged_kv *p, bool v, uint32_t layer);
// Whether K and V of all layers are apart. KVD_E_INVALID, KVD_E_INTERNAL.
int kvd_paged_apart(const struct kvd_paged_kv *p, struct kvd_error *err);

// A GPU copies so many heads of so many layers at once, at most.
enum { KVD_PAGED_MOST_HEADS = 65535 };
// Tokens between the blocks and dense tensors [layers][tokens][heads][dim].
struct kvd_paged_copy {
    uint32_t layer, layers; // of the engine's
    uint32_t page, pages;   // of those that the blocks hold
    uint8_t *dense[2];      // K and V of the first of these layers and pages
    uint32_t dense_tokens;  // that the tensors have room for: their layers are so far apart
    bool out;               // of the tensors, into the blocks
};
void kvd_paged_copy(const struct kvd_paged_kv *p, const struct kvd_paged_copy *c);

#endif
