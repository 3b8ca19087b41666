// What the host gives to a process.
#ifndef KVD_DAEMON_HOST_H
#define KVD_DAEMON_HOST_H

#include "proto/base.h"

// Bytes of memory that kvd can have at most: the machine's, or the least limit of its cgroups.
// `*of` tells which, for messages.
uint64_t kvd_host_memory(const char **of);

#endif
