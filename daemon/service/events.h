// Events, to watchers of sessions. Loop thread.
#ifndef KVD_DAEMON_EVENTS_H
#define KVD_DAEMON_EVENTS_H

#include "daemon/core/part.h"
#include "pool/prefix.h"

// To every watcher of a namespace (KVD_POOL_NONE: of all).
void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name);

// Blocks of a namespace's prefix index, each behind the one before it or (`parent` NULL) anywhere.
void kvd_event_blocks(struct kvd_daemon *d, uint32_t ns, int kind,
                      const struct kvd_prefix_key *keys, uint32_t n,
                      const struct kvd_prefix_key *parent, int miss);

extern const struct kvd_part kvd_part_events;

#endif
