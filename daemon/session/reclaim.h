// Unmaps, or closes, what may be the last reference to much memory, on libuv's thread pool.
#ifndef KVD_DAEMON_RECLAIM_H
#define KVD_DAEMON_RECLAIM_H

#include "daemon/core/daemon.h"

void kvd_reclaim_mapping(struct kvd_daemon *d, void *data, uint64_t size);
void kvd_reclaim_fd(struct kvd_daemon *d, int fd);

#endif
