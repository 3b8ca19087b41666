// /metrics, /healthz and /readyz. Loop thread.
#ifndef KVD_DAEMON_HTTP_H
#define KVD_DAEMON_HTTP_H

#include "daemon/core/daemon.h"

int kvd_http_init(struct kvd_daemon *d, struct kvd_error *err);
// NULL is allowed.
void kvd_http_deinit(struct kvd_daemon *d);

#endif
