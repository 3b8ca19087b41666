// Host memory for blocks that a GPU copies to and from at its bus's speed. To pin memory takes
// about as long as to copy it thrice, so what a block leaves is kept for the next one of its size.
// Any thread.
#ifndef KVD_DAEMON_TIER_PINNED_H
#define KVD_DAEMON_TIER_PINNED_H

#include "kernels/backend.h"

struct kvd_pinned;

// `keep`: bytes that are kept for later blocks, at most. NULL: out of memory. The backend must
// outlive its last take.
struct kvd_pinned *kvd_pinned_new(struct kvd_backend *backend, uint64_t keep);
// Gives it up: it goes with the last memory that was taken of it. *p may be NULL and becomes NULL.
void kvd_pinned_free(struct kvd_pinned **p);

// Memory that begins at a page and is not zeroed; `bytes` is a multiple of 4096. Where it cannot be
// pinned it is as any other. NULL: out of memory.
uint8_t *kvd_pinned_take(struct kvd_pinned *p, uint64_t bytes);
void kvd_pinned_give(struct kvd_pinned *p, uint8_t *at, uint64_t bytes);

#endif
