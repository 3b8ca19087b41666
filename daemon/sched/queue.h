// Compute calls that wait: in line, or for a worker's fence. Loop thread.
//
// Every session has a line of its own, whose works start strictly in order. Lines of a namespace
// take turns: of the first of each, that one starts whose session has the fewest in flight. None
// overtakes an older one that waits for a sequence that it uses too, so none starves. As sequences
// belong to one namespace, no namespace waits for another. What waits is counted in all, by
// namespace and by session, and each may have three times what it leaves to the others: however
// many ask for too much, there is room for who asks for little.
#ifndef KVD_DAEMON_QUEUE_H
#define KVD_DAEMON_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/core/daemon.h"
#include "daemon/sched/fair.h"
#include "proto/base.h"

// One that waits for its turn, inside of what is its owner's.
struct kvd_waiter {
    uint32_t ns;
    uint64_t session; // whose line it waits in, and who is charged for its place
    uint64_t bytes;   // that stay in memory meanwhile
    // The queue's own
    bool waits, in_line, in_flight;
    uint64_t order;        // of arrival
    struct kvd_line *line; // from being admitted until it is forgotten
    struct kvd_waiter *prev, *next;
};

// Of all requests that wait: their inline data stays in memory meanwhile.
#define KVD_MAX_WAITING_BYTES (1ull << 30)

// `ready` tells whether nothing in flight is in the way of one that is first of its line, and no
// older one that was looked at; it notes what this one uses under the number of the look, for when
// it is asked about younger ones. `start` begins with one; it is in flight from then on, until it
// is forgotten.
typedef bool kvd_queue_ready(struct kvd_daemon *d, struct kvd_waiter *w, uint64_t look);
typedef void kvd_queue_start(struct kvd_daemon *d, struct kvd_waiter *w);
int kvd_queue_init(struct kvd_daemon *d, kvd_queue_ready *ready, kvd_queue_start *start,
                   struct kvd_error *err);
// NULL is allowed. Nothing waits any more.
void kvd_queue_deinit(struct kvd_daemon *d);
// Counts one that is to wait. KVD_E_LIMIT: its namespace, its session or all have too many.
int kvd_queue_admit(struct kvd_daemon *d, struct kvd_waiter *w, struct kvd_error *err);
// Puts one that was admitted into its session's line, and starts what can start.
void kvd_queue_push(struct kvd_daemon *d, struct kvd_waiter *w);
// It was started by the line, or is no more: it waits no longer.
void kvd_queue_forget(struct kvd_daemon *d, struct kvd_waiter *w);
// One of the namespace has ended: starts those that waited for it.
void kvd_queue_kick(struct kvd_daemon *d, uint32_t ns);
// The share of the executor that one in flight has.
struct kvd_fair_flow *kvd_queue_flow(const struct kvd_waiter *w);
// A session ends: nothing more comes of it, and what there is will be forgotten.
void kvd_queue_session_ends(struct kvd_daemon *d, uint64_t session);
uint32_t kvd_queue_waiting(const struct kvd_daemon *d);

#endif
