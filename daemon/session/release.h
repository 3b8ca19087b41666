// Giving up many sequences: in pieces of a millisecond, so that nobody waits for it. Loop thread.
#ifndef KVD_DAEMON_RELEASE_H
#define KVD_DAEMON_RELEASE_H

#include "daemon/core/part.h"

struct kvd_held;

// Sequences that are being given up, inside of what is its owner's.
struct kvd_release {
    // Gives up the next one. False: there is none.
    bool (*next)(struct kvd_daemon *d, struct kvd_release *r);
    void (*done)(struct kvd_daemon *d, struct kvd_release *r); // frees it
    struct kvd_release *before, *after;                        // the module's own
};

// Begins, and ends if that is a matter of a millisecond. One after the other.
void kvd_release_begin(struct kvd_daemon *d, struct kvd_release *r);
// Ends it now, with those before it.
void kvd_release_finish(struct kvd_daemon *d, struct kvd_release *r);
// Takes it out, as it is: it is not done.
void kvd_release_drop(struct kvd_daemon *d, struct kvd_release *r);
// Gives up all of these, which become the module's; in the pool each counts as one holder.
void kvd_release_held(struct kvd_daemon *d, struct kvd_held *held);

extern const struct kvd_part kvd_part_release;

#endif
