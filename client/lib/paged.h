// An engine's blocks in host memory: whether they are what they are said to be, and copying between
// them and dense tensors. Any thread.
#ifndef KVD_CLIENT_PAGED_H
#define KVD_CLIENT_PAGED_H

#include "kvd/kvd.h"
#include "proto/base.h"

// What the pages of a client are.
struct kvd_page_shape {
    uint32_t layers, heads, dims[2]; // of K and V
};

// Whether `pages` pages lie inside of the memory that `p` says there is and, where they are
// `written`, no two elements are one. KVD_E_INVALID says what is wrong.
int kvd_paged_check(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t pages,
                    bool written, struct kvd_error *err);

// A dense tensor [layers][tokens][heads][dim] that pages are copied into, or out of.
struct kvd_staged {
    uint8_t *side[2]; // K and V
    uint32_t tokens;  // that it has room for: its layers are so far apart
};
// Copies `n` pages from number `page` of the blocks on, to or from `at` pages into the tensors. `p`
// was checked.
void kvd_paged_gather(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t page,
                      uint32_t n, const struct kvd_staged *to, uint32_t at);
void kvd_paged_scatter(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t page,
                       uint32_t n, const struct kvd_staged *from, uint32_t at);

#endif
