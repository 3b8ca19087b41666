// What the service manager is told.
#ifndef KVD_DAEMON_NOTIFY_H
#define KVD_DAEMON_NOTIFY_H

#include "daemon/core/daemon.h"

// Says that it is ready, and keeps the watchdog content from then on.
void kvd_notify_ready(struct kvd_daemon *d);
void kvd_notify_stopping(void);

#endif
