// Claims: who looks up a prompt and is told that blocks are not there is expected to compute and
// publish them; others that want them can wait for that. Loop thread.
#ifndef KVD_DAEMON_CLAIMS_H
#define KVD_DAEMON_CLAIMS_H

#include "daemon/core/part.h"
#include "pool/blocks.h"

// One that may wait, inside of what is its owner's.
struct kvd_claim_waiter {
    uint64_t session; // whose
    struct kvd_blocks_space space;
    uint64_t until_ms;                         // 0: it has not waited yet
    void (*go_on)(struct kvd_claim_waiter *w); // it no longer waits: look again
    // -- claims.c's
    bool waits;
    uint64_t owner; // the session that it waits for
    struct kvd_claim_waiter *prev, *next;
};

// Of a prompt's n blocks, `known` are there. True: another session has claimed the next one, and
// `w` waits, until go_on is called, from the loop; for at most `ms` in all. False: it does not, and
// has claimed them itself, for `ms`. A session that others wait for does not wait, so that there
// are no circles.
bool kvd_claim_wait(struct kvd_daemon *d, struct kvd_claim_waiter *w,
                    const struct kvd_prefix_key *keys, uint32_t n, uint32_t known, uint64_t ms);
// It is no more.
void kvd_claim_forget(struct kvd_daemon *d, struct kvd_claim_waiter *w);
// Blocks of a space are known now, published by a session whose sequence has n blocks of a prompt:
// what it had claimed of that prompt is over when all of it is among them.
void kvd_claim_published(struct kvd_daemon *d, uint64_t session,
                         const struct kvd_blocks_space *space, const struct kvd_prefix_key *keys,
                         uint32_t n);

extern const struct kvd_part kvd_part_claims;

#endif
