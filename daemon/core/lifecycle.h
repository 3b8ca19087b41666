// Start, drain and stop. Loop thread.
#ifndef KVD_DAEMON_LIFECYCLE_H
#define KVD_DAEMON_LIFECYCLE_H

#include "daemon/core/part.h"

// Starts all parts. After a failure kvd_daemon_deinit takes back what there is.
int kvd_daemon_init(struct kvd_daemon *d, struct kvd_error *err);
void kvd_daemon_run(struct kvd_daemon *d);
void kvd_daemon_deinit(struct kvd_daemon *d);
// Takes no new sessions, tells the workers, and stops when the last session ends or the time is
// over.
void kvd_daemon_drain(struct kvd_daemon *d, uint64_t timeout_ms);
// To be called when the backend failed, before anybody is told: without a device the daemon stops,
// for a new one to start. Where the pool is kept it does not return then.
void kvd_daemon_check_device(struct kvd_daemon *d);
// To be called when a session ended: a draining daemon may be done.
void kvd_daemon_session_ended(struct kvd_daemon *d);
// Brackets work on libuv's thread pool that needs the daemon when it ends: stopping waits for it.
void kvd_daemon_work_begin(struct kvd_daemon *d);
void kvd_daemon_work_end(struct kvd_daemon *d);
// To be called when a part is no longer busy: stopping goes on when none is.
void kvd_daemon_go_on(struct kvd_daemon *d);

extern const struct kvd_part kvd_part_lifecycle;

#endif
