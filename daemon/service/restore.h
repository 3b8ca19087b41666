// Promotion: blocks of a prompt, or pages, that the pool lacks are looked for in the tiers, and
// brought back.
// Everything fails softly: what does not come, or not in time, is a miss. Loop thread.
#ifndef KVD_DAEMON_RESTORE_H
#define KVD_DAEMON_RESTORE_H

#include "daemon/core/part.h"
#include "daemon/tier/tiers.h"
#include "pool/blocks.h"

struct kvd_restore;

enum { KVD_RESTORE_PARTS = 8 }; // of one call, that count together as one restore

struct kvd_restore_ask {
    struct kvd_blocks_space space;
    const struct kvd_prefix_key *keys; // of the prompt's blocks; the caller's until kvd_restore_end
    uint32_t n;
    uint32_t from; // so many are there to make a sequence of
    // They are pages: each is wanted for itself, whatever became of those before it.
    bool pages;
    const uint8_t *skip; // of pages, true for those that are not wanted; the caller's as `keys`
    const struct kvd_prefix_key *after; // of pages, before the first; NULL: none; as `keys`
    uint32_t parts;                     // 0, or as one of so many, up to KVD_RESTORE_PARTS
    bool holds;  // what comes waits for kvd_restore_go, as `after` may not be there yet
    uint64_t ms; // for which blocks are brought back; 0: they are only looked for
};

struct kvd_restore_answer {
    uint32_t behind[KVD_TIERS_MOST]; // blocks that the pool lacked, by the farthest tier of each
    uint32_t restored;               // of those, that were brought back
    uint32_t begin, end;             // blocks that became known with that; not of pages
};

// `done` is called once, from the loop and never from within begin. Until kvd_restore_end what was
// brought back is not evicted.
typedef void kvd_restore_done(void *ctx, const struct kvd_restore_answer *answer);
// NULL with *err: KVD_E_INTERNAL (out of memory), KVD_E_UNAVAILABLE (there are no tiers).
struct kvd_restore *kvd_restore_begin(struct kvd_daemon *d, const struct kvd_restore_ask *ask,
                                      kvd_restore_done *done, void *ctx, struct kvd_error *err);
// What comes is taken in from now on; `done` may be called from within.
void kvd_restore_go(struct kvd_restore *r);
// At any time: after `done`, or to give it up, and `done` is not called any more. *r may be NULL
// and becomes NULL.
void kvd_restore_end(struct kvd_restore **r);

extern const struct kvd_part kvd_part_restores;

#endif
