// Events, to watchers of sessions. Loop thread.
#ifndef KVD_DAEMON_EVENTS_H
#define KVD_DAEMON_EVENTS_H

#include "daemon/core/part.h"

// To every watcher of a namespace (KVD_POOL_NONE: of all).
void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name);

extern const struct kvd_part kvd_part_events;

#endif
