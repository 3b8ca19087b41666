// Compute calls that wait: in line, or for a worker's fence. Loop thread.
//
// Every namespace has a line of its own, whose works start strictly in order: none overtakes, so
// none starves, and as sequences belong to one namespace no line waits for another. What waits is
// counted in all, by namespace and by session, and each may have three times what it leaves to the
// others: however many ask for too much, there is room for who asks for little.
#ifndef KVD_DAEMON_QUEUE_H
#define KVD_DAEMON_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "daemon/core/daemon.h"
#include "daemon/sched/fair.h"
#include "proto/base.h"

// One that waits for its turn, inside of what is its owner's.
struct kvd_waiter {
    uint32_t ns;      // whose line it waits in
    uint64_t session; // who is charged for its place, with the namespace
    uint64_t bytes;   // that stay in memory meanwhile
    // The queue's own
    bool waits, in_line, in_flight;
    struct kvd_waiter *prev, *next;
};

// Of all requests that wait: their inline data stays in memory meanwhile.
#define KVD_MAX_WAITING_BYTES (1ull << 30)

// `ready` tells whether nothing in flight is in the way of the first of a line, `start` begins with
// it; it is in flight from then on, until it is forgotten.
int kvd_queue_init(struct kvd_daemon *d, bool (*ready)(struct kvd_daemon *d, struct kvd_waiter *w),
                   void (*start)(struct kvd_daemon *d, struct kvd_waiter *w),
                   struct kvd_error *err);
// NULL is allowed. Nothing waits any more.
void kvd_queue_deinit(struct kvd_daemon *d);
// Counts one that is to wait. KVD_E_LIMIT: its namespace, its session or all have too many.
int kvd_queue_admit(struct kvd_daemon *d, struct kvd_waiter *w, struct kvd_error *err);
// Puts one that was admitted into its namespace's line, and starts what can start.
void kvd_queue_push(struct kvd_daemon *d, struct kvd_waiter *w);
// It was started by the line, or is no more: it waits no longer.
void kvd_queue_forget(struct kvd_daemon *d, struct kvd_waiter *w);
// One of the namespace has ended: starts those that waited for it.
void kvd_queue_kick(struct kvd_daemon *d, uint32_t ns);
uint32_t kvd_queue_waiting(const struct kvd_daemon *d);

#endif
