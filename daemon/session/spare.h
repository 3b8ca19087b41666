// What is kept free of the pool before it is wanted, and what may be borrowed. Loop thread.
#ifndef KVD_DAEMON_SPARE_H
#define KVD_DAEMON_SPARE_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_spare;

#endif
