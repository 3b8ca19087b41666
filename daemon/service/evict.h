// Eviction by operators. It takes time in proportion to what there is, and so is done in pieces,
// between which the loop does other things. Loop thread.
#ifndef KVD_DAEMON_EVICT_H
#define KVD_DAEMON_EVICT_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_evict;

#endif
