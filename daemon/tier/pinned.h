// Host memory for blocks, which come and go by the thousand. What one leaves is kept for the next
// of its size: malloc gives pieces so large back to the kernel each time, and then touching the
// next one's pages costs more than its checksum. With a backend that can, it is memory that a GPU
// copies to and from at its bus's speed; to pin it takes about as long as to copy it thrice.
//
// Pinned memory is made by the chunk, some 8 MiB, and given out from its beginning on: blocks that
// come one after the other lie at equal distances, and a GPU copies them back at once. A chunk goes
// when nothing of it is taken any more. Any thread.
#ifndef KVD_DAEMON_TIER_PINNED_H
#define KVD_DAEMON_TIER_PINNED_H

#include "kernels/backend.h"

struct kvd_pinned;
struct kvd_pinned_chunk;

// `keep`: bytes of chunks that are kept for later blocks while nothing of them is taken, at most:
// those that became so last. `backend` must outlive the last take; NULL: nothing is pinned. NULL:
// out of memory.
struct kvd_pinned *kvd_pinned_new(struct kvd_backend *backend, uint64_t keep);
// Gives it up: it goes with the last memory that was taken of it. *p may be NULL and becomes NULL.
void kvd_pinned_free(struct kvd_pinned **p);

// Nothing more is pinned from now on.
void kvd_pinned_stop(struct kvd_pinned *p);

// Memory that begins at a page and is not zeroed; `bytes` is a multiple of 4096. Where it cannot be
// pinned it is as any other. *chunk: what it is of. NULL: out of memory.
uint8_t *kvd_pinned_take(struct kvd_pinned *p, uint64_t bytes, struct kvd_pinned_chunk **chunk);
void kvd_pinned_give(struct kvd_pinned *p, struct kvd_pinned_chunk *chunk, uint8_t *at);
// Where the chunk begins, if it is pinned: the same for all that lies in it. 0: it is not.
uint64_t kvd_pinned_place(const struct kvd_pinned_chunk *chunk);

#endif
