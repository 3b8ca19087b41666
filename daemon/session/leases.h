// Leases of prefixes: blocks that a session has looked up stay until their time is over, it gives
// them back, or it ends. Loop thread.
#ifndef KVD_DAEMON_LEASES_H
#define KVD_DAEMON_LEASES_H

#include <uthash.h>

#include "daemon/core/part.h"
#include "pool/blocks.h"

enum {
    KVD_MAX_LEASES = 32768,        // in all; a namespace may have as many as are left
    KVD_MAX_SESSION_LEASES = 8192, // of one session
    KVD_LEASE_HOLDS = 64,          // of single pages, that count as one lease
};

struct kvd_session;

struct kvd_lease {
    uint64_t id;
    struct kvd_session *owner; // NULL: an operator, who has pinned it
    uint64_t until_ms;
    struct kvd_blocks_at at;   // of a prefix
    struct kvd_prefix_key key; // of a pin
    uint32_t *pages, n_pages;  // entries that are held; NULL: it is of a prefix
    uint32_t weight;           // leases that it counts as
    UT_hash_handle hh;
};

// Holds a place for `ms`. KVD_E_LIMIT: the session or the namespace has enough leases; the others
// as kvd_blocks_hold.
int kvd_lease_new(struct kvd_daemon *d, struct kvd_session *owner, const struct kvd_blocks_at *at,
                  uint64_t ms, struct kvd_lease **out, struct kvd_error *err);
// Holds pages for `ms`: n entries, of which those that keep the others are held. The same errors,
// and -ENOMEM.
int kvd_lease_new_pages(struct kvd_daemon *d, struct kvd_session *owner, const uint32_t *entries,
                        uint32_t n, uint64_t ms, struct kvd_lease **out, struct kvd_error *err);
// A session's lease, NULL if it has none of that id.
struct kvd_lease *kvd_lease_find(struct kvd_daemon *d, const struct kvd_session *owner,
                                 uint64_t id);
// The pin of a block, NULL if there is none.
struct kvd_lease *kvd_lease_pin(struct kvd_daemon *d, uint32_t ns,
                                const struct kvd_prefix_key *key);
void kvd_lease_end(struct kvd_daemon *d, struct kvd_lease *lease);

extern const struct kvd_part kvd_part_leases;

#endif
