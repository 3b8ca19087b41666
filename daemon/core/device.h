// The backend: where pages live and kernels run.
#ifndef KVD_DAEMON_DEVICE_H
#define KVD_DAEMON_DEVICE_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_device;

#endif
