// Events, to watchers of sessions and of health. Loop thread.
#ifndef KVD_DAEMON_EVENTS_H
#define KVD_DAEMON_EVENTS_H

#include "daemon/core/daemon.h"

// To every watcher of a namespace (KVD_POOL_NONE: of all).
void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name);
// Sends NOT_SERVING or SERVING to the health watchers.
void kvd_health_changed(struct kvd_daemon *d);

#endif
