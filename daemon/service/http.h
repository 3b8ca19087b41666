// /metrics, /healthz and /readyz. Loop thread.
#ifndef KVD_DAEMON_HTTP_H
#define KVD_DAEMON_HTTP_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_http;

#endif
