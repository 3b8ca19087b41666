// The tier on a Redis or Valkey server, through which several hosts share blocks.
//
// hiredis has a thread and a loop of its own: names are resolved, and megabytes copied and parsed,
// beside the daemon's loop. Commands are pipelined on one connection, made at the start;
// one that is lost fails what was sent on it, and the next operation makes another. Values are
// whole blocks under kvd:block:1:KEY, with the server's own expiry; how much it keeps, and what it
// evicts, is its maxmemory and maxmemory-policy. A cluster is refused by name.
#ifndef KVD_DAEMON_TIER_REDIS_H
#define KVD_DAEMON_TIER_REDIS_H

#include "daemon/tier/backend.h"

#define KVD_TIER_REDIS_PREFIX "kvd:block:1:"

extern const struct kvd_tier_ops kvd_tier_redis_ops;
// `auth`: "", PASSWORD, or USER:PASSWORD. NULL with *err set.
void *kvd_tier_redis_new(const char *url, const char *auth, struct kvd_error *err);

#endif
