// The metrics page, and GetMetrics. Loop thread.
#ifndef KVD_DAEMON_PAGE_H
#define KVD_DAEMON_PAGE_H

#include "daemon/core/part.h"

// The whole /metrics page. The caller frees it.
char *kvd_metrics_page(struct kvd_daemon *d);

extern const struct kvd_part kvd_part_page;

#endif
