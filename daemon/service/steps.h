// Calls that are worked on step by step, each of some hundred microseconds, for a millisecond of
// each round of the loop. A step is of the namespace that has had the least of this time, and in it
// of the session that has had the least. Loop thread.
#ifndef KVD_DAEMON_STEPS_H
#define KVD_DAEMON_STEPS_H

#include "daemon/core/part.h"
#include "daemon/sched/fair.h"

struct kvd_steps_flow;

// One of them, inside of what is its owner's.
struct kvd_stepped {
    // Works on. One that is done takes itself out.
    void (*step)(struct kvd_daemon *d, struct kvd_stepped *s);
    // The module's own.
    uint32_t ns;
    uint64_t session;
    struct kvd_fair_job job;
    struct kvd_fair_flow alone; // where there was no memory for `flow`
    struct kvd_steps_flow *flow;
};

// Begins, and ends if that is a matter of a millisecond and no other is at it. `session` is an id.
void kvd_steps_begin(struct kvd_daemon *d, struct kvd_stepped *s, uint32_t ns, uint64_t session);
// Goes on in the loop's next round, after it has waited for something else.
void kvd_steps_add(struct kvd_daemon *d, struct kvd_stepped *s);
// Takes it out, done or not.
void kvd_steps_drop(struct kvd_daemon *d, struct kvd_stepped *s);

extern const struct kvd_part kvd_part_steps;

#endif
