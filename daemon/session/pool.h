// The pool of the daemon. Loop thread.
#ifndef KVD_DAEMON_POOL_H
#define KVD_DAEMON_POOL_H

#include "daemon/core/part.h"

// Bytes that evicting would free, in all; of each namespace kvd_pool_namespace_info tells. Counted
// as it changes, but for what stays though nobody uses it, which is looked at as often as this is
// called, at most every 50 ms and less often where a look takes long.
uint64_t kvd_evictable(struct kvd_daemon *d);

extern const struct kvd_part kvd_part_pool;

#endif
