// Giving up what a session held. Loop thread.
#ifndef KVD_DAEMON_RELEASE_H
#define KVD_DAEMON_RELEASE_H

#include "daemon/core/daemon.h"

struct kvd_held;

// Gives up all of these, which become the module's, in pieces; in the pool each counts as one
// holder.
void kvd_release_held(struct kvd_daemon *d, struct kvd_held *held);

#endif
