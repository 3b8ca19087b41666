// Calls that are worked on step by step, each of some hundred microseconds: they take turns, for a
// millisecond of each round of the loop. Loop thread.
#ifndef KVD_DAEMON_STEPS_H
#define KVD_DAEMON_STEPS_H

#include "daemon/core/part.h"

// One of them, inside of what is its owner's.
struct kvd_stepped {
    // Works on. One that is done takes itself out.
    void (*step)(struct kvd_daemon *d, struct kvd_stepped *s);
    struct kvd_stepped *prev, *next; // the module's own
};

// Begins, and ends if that is a matter of a millisecond and no other is at it.
void kvd_steps_begin(struct kvd_daemon *d, struct kvd_stepped *s);
// Begins in the loop's next round: for whoever is told of something, and must not act at once.
void kvd_steps_add(struct kvd_daemon *d, struct kvd_stepped *s);
// Takes it out, done or not.
void kvd_steps_drop(struct kvd_daemon *d, struct kvd_stepped *s);

extern const struct kvd_part kvd_part_steps;

#endif
