// What the process needs before anything else.
#ifndef KVD_DAEMON_PROCESS_H
#define KVD_DAEMON_PROCESS_H

#include "daemon/core/part.h"
#include "proto/base.h"

// Sets signals, raises limits, and tries whether those that are left are enough. KVD_E_LIMIT: one
// is too low.
int kvd_process_prepare(struct kvd_error *err);

extern const struct kvd_part kvd_part_process;

#endif
