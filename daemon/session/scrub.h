// The scrubber: gives blocks of history that are complete their checksums, and looks again and
// again, slowly, whether each is what it was. What is not is quarantined: its sequences are refused
// from then on, and reported. A block that an earlier kvd has left is looked at when it is used for
// the first time, if its turn has not come by then; on a GPU, which reads all it has in less than a
// tenth of a second, the first pass after a restart makes no pauses. Loop thread; blocks are read
// on libuv's thread pool.
#ifndef KVD_DAEMON_SCRUB_H
#define KVD_DAEMON_SCRUB_H

#include "daemon/core/part.h"
#include "kernels/backend.h"
#include "pool/pool.h"

struct kvd_scrub_damage {
    uint64_t sequence;
    uint32_t plane, block;
    char ns[KVD_MAX_NAMESPACE + 1], name[KVD_MAX_NAME + 1];
};

struct kvd_scrub_state {
    bool demanded;                        // a pass that somebody asked for is under way
    uint64_t demanded_passes;             // that have ended
    uint64_t checked, total;              // blocks of this pass; about how many there are
    uint64_t damaged;                     // pages in use
    const struct kvd_scrub_damage *found; // the first of them since the start
    uint32_t n_found;
};

enum { KVD_SUMS_AT_ONCE = 256 };

// How many pages it is worth while to sum at once: one on the CPU, which reads them itself.
uint32_t kvd_page_sums_at_once(const struct kvd_daemon *d);
// Checksums of pages, as the pool keeps them. Any thread. KVD_E_INTERNAL: the GPU failed.
int kvd_page_sums(struct kvd_daemon *d, const struct kvd_span *pages, uint32_t n, uint64_t *sums,
                  struct kvd_error *err);
// The same of a page's copy in host memory.
uint64_t kvd_page_copy_sum(const struct kvd_daemon *d, const void *copy, uint64_t bytes);

struct kvd_scrub_state kvd_scrub_look(struct kvd_daemon *d);
// The next block of a sequence that an earlier kvd has sealed and that this one has not looked at
// since. False: there is no more.
bool kvd_scrub_unseen(struct kvd_daemon *d, uint64_t seq, struct kvd_pool_walk *at,
                      struct kvd_pool_block *out);
// What came of looking at it. The block has been held, or its sequence not changed, since
// kvd_scrub_unseen.
void kvd_scrub_seen(struct kvd_daemon *d, const struct kvd_pool_block *block, uint64_t sum);
// Begins a pass over all blocks without pauses, if none that was asked for is under way.
void kvd_scrub_demand(struct kvd_daemon *d);

extern const struct kvd_part kvd_part_scrub;

#endif
