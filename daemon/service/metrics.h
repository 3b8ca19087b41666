// What is rendered of the metrics. Loop thread.
#ifndef KVD_DAEMON_PAGE_H
#define KVD_DAEMON_PAGE_H

#include "daemon/core/daemon.h"

// Bytes that evicting would free, in all and (unless by_namespace is NULL) of each namespace: a
// look at the pool that is at most a second old, as looking takes time.
uint64_t kvd_evictable(struct kvd_daemon *d, const uint64_t **by_namespace);

// The whole /metrics page. The caller frees it.
char *kvd_metrics_page(struct kvd_daemon *d);

#endif
