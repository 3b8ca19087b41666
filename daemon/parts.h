// The table of the daemon's parts.
#ifndef KVD_DAEMON_PARTS_H
#define KVD_DAEMON_PARTS_H

#include "daemon/core/part.h"

extern const struct kvd_part *const kvd_parts[]; // ends with NULL

#endif
