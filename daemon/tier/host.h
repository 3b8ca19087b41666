// The tier in kvd's own memory: a bounded store of blocks, least recently used out first. Nobody
// else can write to it, so nothing is sealed or verified; a block that is put or got is the same
// one, never a copy.
#ifndef KVD_DAEMON_TIER_HOST_H
#define KVD_DAEMON_TIER_HOST_H

#include "daemon/tier/backend.h"

extern const struct kvd_tier_ops kvd_tier_host_ops;
// `limit`: bytes of payload at most. NULL: out of memory.
void *kvd_tier_host_new(uint64_t limit);

#endif
