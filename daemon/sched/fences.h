// Waiting for workers' GPU streams. Loop thread.
#ifndef KVD_DAEMON_FENCES_H
#define KVD_DAEMON_FENCES_H

#include <stdatomic.h>

#include "daemon/core/part.h"

// A word in a worker's memfd, and the value that it is to reach.
struct kvd_fence {
    _Atomic uint32_t *word; // NULL: none
    uint32_t value;
};

bool kvd_fence_passed(const struct kvd_fence *f);
// Any thread. A fence that is none is none's to signal.
void kvd_fence_signal(const struct kvd_fence *f);

// One that waits for a fence, inside of what is its owner's.
struct kvd_parked {
    struct kvd_fence fence;
    void (*passed)(struct kvd_daemon *d, struct kvd_parked *p); // it waits no longer
    // The module's own
    bool parked;
    struct kvd_parked *prev, *next;
};
void kvd_fences_park(struct kvd_daemon *d, struct kvd_parked *p);
// Takes one out that is parked; others are left alone.
void kvd_fences_forget(struct kvd_daemon *d, struct kvd_parked *p);

extern const struct kvd_part kvd_part_fences;

#endif
