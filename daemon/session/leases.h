// Leases of prefixes: blocks that a session has looked up stay until their time is over, it gives
// them back, or it ends. Loop thread.
#ifndef KVD_DAEMON_LEASES_H
#define KVD_DAEMON_LEASES_H

#include <uthash.h>

#include "daemon/core/part.h"
#include "pool/blocks.h"

enum {
    KVD_MAX_SESSION_LEASES = 8192, // of one session
    KVD_LEASE_HOLDS = 64,          // of single pages, that count as one lease
};

struct kvd_session;
struct kvd_user;

enum kvd_lease_kind {
    KVD_LEASE_SESSION,  // a session's, which it ends with
    KVD_LEASE_PINNED,   // by an operator
    KVD_LEASE_RETAINED, // by a session, beyond its end
};

// The last block of a prefix that is kept for nobody.
struct kvd_lease_place {
    uint32_t ns, kind;
    struct kvd_prefix_key key;
};

#define KVD_LEASE_OPERATORS (-1) // instead of a user, who is charged

struct kvd_lease {
    uint64_t id;
    enum kvd_lease_kind kind;
    struct kvd_session *owner; // NULL: nobody's
    struct kvd_user *user;     // who is charged; NULL: an operator's
    uint64_t until_ms;
    bool expires;                 // when its time is over, what it kept is dropped:
    uint32_t *gone, n_gone;       // of pages these entries, all of which it keeps
    struct kvd_blocks_at at;      // of a prefix
    struct kvd_lease_place place; // of one that is nobody's
    uint32_t *pages, n_pages;     // entries that are held; NULL: it is of a prefix
    uint32_t weight;              // leases that it counts as
    UT_hash_handle hh, hh_place;
};

// Holds a place for `ms`. KVD_E_LIMIT: the session, its user or the namespace has enough leases;
// the others as kvd_blocks_hold.
int kvd_lease_new(struct kvd_daemon *d, struct kvd_session *owner, const struct kvd_blocks_at *at,
                  uint64_t ms, struct kvd_lease **out, struct kvd_error *err);
// Holds pages for `ms`: n entries, of which those that keep the others are held, and the last
// `single` each for itself, as kvd_blocks_hold_pages says. The same errors, and -ENOMEM.
int kvd_lease_new_pages(struct kvd_daemon *d, struct kvd_session *owner, const uint32_t *entries,
                        uint32_t n, uint32_t single, uint64_t ms, struct kvd_lease **out,
                        struct kvd_error *err);
// A session's lease, NULL if it has none of that id.
struct kvd_lease *kvd_lease_find(struct kvd_daemon *d, const struct kvd_session *owner,
                                 uint64_t id);
// What of a kind that is nobody's is on a block, NULL if there is none.
struct kvd_lease *kvd_lease_on(struct kvd_daemon *d, uint32_t ns, enum kvd_lease_kind kind,
                               const struct kvd_prefix_key *key);
// Puts one on the block `key`, which is the last of a place, for `ms`, in the stead of what is
// there; 0 ms: ends that. uid: the user who is charged, or KVD_LEASE_OPERATORS. The errors of
// kvd_lease_new.
int kvd_lease_put(struct kvd_daemon *d, enum kvd_lease_kind kind, const struct kvd_blocks_at *at,
                  const struct kvd_prefix_key *key, uint64_t ms, bool expires, int64_t uid,
                  struct kvd_error *err);
// The same of pages, n entries in the order of the keys, of which `key` is the last: as
// kvd_lease_new_pages.
int kvd_lease_put_pages(struct kvd_daemon *d, enum kvd_lease_kind kind, uint32_t ns,
                        const uint32_t *entries, uint32_t n, uint32_t single,
                        const struct kvd_prefix_key *key, uint64_t ms, bool expires, int64_t uid,
                        struct kvd_error *err);
void kvd_lease_end(struct kvd_daemon *d, struct kvd_lease *lease);
// Ends what sessions retain in a namespace, `most` of it. False: there may be more.
bool kvd_lease_end_retained(struct kvd_daemon *d, uint32_t ns, uint32_t most);
// Goes on ending what sessions retain and that holds an entry of a namespace's index, and looks at
// `most` leases; with `begin` it begins anew, for one who does so at a time. True: it has looked at
// all.
bool kvd_lease_end_retained_on(struct kvd_daemon *d, uint32_t ns, uint32_t entry, bool begin,
                               uint32_t most);

extern const struct kvd_part kvd_part_leases;

#endif
