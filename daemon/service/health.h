// grpc.health.v1.Health. Loop thread.
#ifndef KVD_DAEMON_HEALTH_H
#define KVD_DAEMON_HEALTH_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_health;

#endif
