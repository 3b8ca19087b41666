// The pool of the daemon. Loop thread.
#ifndef KVD_DAEMON_POOL_H
#define KVD_DAEMON_POOL_H

#include "daemon/core/part.h"

// Bytes that evicting would free, in all and (unless by_namespace is NULL) of each namespace, as
// they were when they were last looked at, less what has gone since: a second ago, or a little more
// while kvd is looking again.
uint64_t kvd_evictable(struct kvd_daemon *d, const uint64_t **by_namespace);

extern const struct kvd_part kvd_part_pool;

#endif
