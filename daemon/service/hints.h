// What callers know of how prompts will be used. Loop thread.
#ifndef KVD_DAEMON_HINTS_H
#define KVD_DAEMON_HINTS_H

#include "daemon/core/part.h"

extern const struct kvd_part kvd_part_hints;

#endif
