// The pool of the daemon. Loop thread.
#ifndef KVD_DAEMON_POOL_H
#define KVD_DAEMON_POOL_H

#include "daemon/core/part.h"

// Bytes that evicting would free, in all and (unless by_namespace is NULL) of each namespace: a
// look at the pool that is at most a second old, as looking takes time.
uint64_t kvd_evictable(struct kvd_daemon *d, const uint64_t **by_namespace);

extern const struct kvd_part kvd_part_pool;

#endif
