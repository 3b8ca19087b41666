// Events of namespaces: a log of the latest of each, and those who read it. Loop thread.
//
// A log is bounded, and each event has a number. Whoever watches has a place in the log and is sent
// what follows as fast as it reads; whoever comes back with the number of the last event that it
// has seen goes on from there. What has left the log by then is lost, and it is told so.
#ifndef KVD_DAEMON_EVENTS_H
#define KVD_DAEMON_EVENTS_H

#include "daemon/core/part.h"
#include "pool/prefix.h"

// To every watcher of a namespace (KVD_POOL_NONE: of all).
void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name);

// What is told of blocks.
struct kvd_event_of_blocks {
    int kind;
    const struct kvd_prefix_key *keys; // each behind the one before it, or anywhere
    uint32_t n;
    const struct kvd_prefix_key *parent; // behind which the first comes; NULL: none, or not known
    int miss;                            // why they are gone
    const char *tier;                    // NULL: none
};
void kvd_event_blocks(struct kvd_daemon *d, uint32_t ns, const struct kvd_event_of_blocks *e);

extern const struct kvd_part kvd_part_events;

#endif
