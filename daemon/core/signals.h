// SIGTERM and SIGINT drain, SIGHUP reloads.
#ifndef KVD_DAEMON_SIGNALS_H
#define KVD_DAEMON_SIGNALS_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_signals;

#endif
