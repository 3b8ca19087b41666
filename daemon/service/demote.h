// Demotion: blocks that become known are copied to the tiers, in the background. Loop thread.
#ifndef KVD_DAEMON_DEMOTE_H
#define KVD_DAEMON_DEMOTE_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_demotion;

#endif
