// Tells workers that a kvd which does not answer is being started again. Loop thread.
#ifndef KVD_DAEMON_COMEBACK_H
#define KVD_DAEMON_COMEBACK_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_comeback;

#endif
