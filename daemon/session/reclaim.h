// Unmaps what may be the last reference to much memory, on libuv's thread pool. What a worker has
// sent, and may be any file, is closed elsewhere (core/closer.h).
#ifndef KVD_DAEMON_RECLAIM_H
#define KVD_DAEMON_RECLAIM_H

#include "daemon/core/daemon.h"

void kvd_reclaim_mapping(struct kvd_daemon *d, void *data, uint64_t size);

// The same for memory of a GPU. Inside of what is its owner's.
struct kvd_reclaim {
    uv_work_t work;
    struct kvd_daemon *d;
    void (*let_go)(struct kvd_reclaim *r); // on a thread of the pool
    void (*done)(struct kvd_reclaim *r);   // on the loop; frees it
};
// When kvd stops it is done at once.
void kvd_reclaim_begin(struct kvd_daemon *d, struct kvd_reclaim *r);

#endif
