// Work that takes long, done on the loop in pieces of a millisecond, so that nobody waits for it.
// Loop thread.
#ifndef KVD_DAEMON_PIECEWORK_H
#define KVD_DAEMON_PIECEWORK_H

#include "daemon/core/part.h"
#include "pool/pool.h"

// Inside of what is its owner's.
struct kvd_piecework {
    // Does the next step, of some microseconds. False: there is none.
    bool (*next)(struct kvd_daemon *d, struct kvd_piecework *w);
    void (*done)(struct kvd_daemon *d, struct kvd_piecework *w); // frees it
    struct kvd_piecework *before, *after;                        // the module's own
};

// Begins, and ends if that is a matter of a millisecond. One after the other.
void kvd_piecework_begin(struct kvd_daemon *d, struct kvd_piecework *w);
// Ends it now, with those before it.
void kvd_piecework_finish(struct kvd_daemon *d, struct kvd_piecework *w);
// Takes it out, as it is: it is not done.
void kvd_piecework_drop(struct kvd_daemon *d, struct kvd_piecework *w);

// Clears what is idle in the pool, to have room for others.
struct kvd_clearing {
    struct kvd_piecework work;
    struct kvd_pool_clearing at; // what, and how far it is
    uint32_t times;              // that it was begun; to be set to 0 first
};
// Begins with what `at` says. `done` gets its work, with which it begins.
void kvd_clearing_begin(struct kvd_daemon *d, struct kvd_clearing *c,
                        void (*done)(struct kvd_daemon *d, struct kvd_piecework *w));

extern const struct kvd_part kvd_part_piecework;

#endif
