// The metrics page. Loop thread.
#ifndef KVD_DAEMON_PAGE_H
#define KVD_DAEMON_PAGE_H

#include "daemon/core/daemon.h"

// The whole /metrics page. The caller frees it.
char *kvd_metrics_page(struct kvd_daemon *d);

#endif
