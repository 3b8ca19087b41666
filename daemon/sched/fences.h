// Works that wait for their workers' GPU streams. Loop thread.
#ifndef KVD_DAEMON_FENCES_H
#define KVD_DAEMON_FENCES_H

#include <stdatomic.h>

#include "daemon/core/daemon.h"

struct kvd_work;

// A word in a worker's memfd, and the value that it is to reach.
struct kvd_fence {
    _Atomic uint32_t *word; // NULL: none
    uint32_t value;
};

bool kvd_fence_passed(const struct kvd_fence *f);
// Any thread. A fence that is none is none's to signal.
void kvd_fence_signal(const struct kvd_fence *f);
int kvd_fences_init(struct kvd_daemon *d, struct kvd_error *err);
// NULL is allowed. Nothing is parked any more.
void kvd_fences_deinit(struct kvd_daemon *d);
void kvd_fences_park(struct kvd_daemon *d, struct kvd_work *w);
// Takes out a work that is parked.
void kvd_fences_forget(struct kvd_daemon *d, struct kvd_work *w);

#endif
