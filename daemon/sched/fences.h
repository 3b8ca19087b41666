// Works that wait for their workers' GPU streams. Loop thread.
#ifndef KVD_DAEMON_FENCES_H
#define KVD_DAEMON_FENCES_H

#include <stdatomic.h>

#include "daemon/core/part.h"

struct kvd_work;

// A word in a worker's memfd, and the value that it is to reach.
struct kvd_fence {
    _Atomic uint32_t *word; // NULL: none
    uint32_t value;
};

bool kvd_fence_passed(const struct kvd_fence *f);
// Any thread. A fence that is none is none's to signal.
void kvd_fence_signal(const struct kvd_fence *f);
void kvd_fences_park(struct kvd_daemon *d, struct kvd_work *w);
// Takes out a work that is parked.
void kvd_fences_forget(struct kvd_daemon *d, struct kvd_work *w);

extern const struct kvd_part kvd_part_fences;

#endif
