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

#include "daemon/core/part.h"
#include "daemon/sched/fair.h"
#include "proto/base.h"

struct kvd_daemon;
struct kvd_work;

// Of all requests that wait: their inline data stays in memory meanwhile.
#define KVD_MAX_WAITING_BYTES (1ull << 30)

// Counts a work as one that waits. KVD_E_LIMIT: its namespace, its session or all have too many.
int kvd_queue_admit(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err);
// Puts a work that was admitted into its namespace's line, and starts what can start.
void kvd_queue_push(struct kvd_daemon *d, struct kvd_work *w);
// It was started by the line, or is no more: it waits no longer.
void kvd_queue_forget(struct kvd_daemon *d, struct kvd_work *w);
// A work of the namespace has ended: starts those that waited for it.
void kvd_queue_kick(struct kvd_daemon *d, uint32_t ns);
uint32_t kvd_queue_waiting(const struct kvd_daemon *d);

extern const struct kvd_part kvd_part_queue;

#endif
