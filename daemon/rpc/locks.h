// Locks beside the unix sockets: with one, a socket that is still there is stale.
#ifndef KVD_DAEMON_LOCKS_H
#define KVD_DAEMON_LOCKS_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_locks;

#endif
