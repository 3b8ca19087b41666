// Keys of tiers whose values have parts.
#ifndef KVD_DAEMON_CONFIG_TIERS_H
#define KVD_DAEMON_CONFIG_TIERS_H

#include "daemon/core/config.h"

enum {
    KVD_TIER_SECRET_MIN = 32,      // bytes
    KVD_TIER_MIN_BYTES = 64 << 20, // of a directory
};

struct kvd_redis_url {
    char host[KVD_CONFIG_TEXT]; // or a socket's path, with port 0
    uint32_t port, database;
};
// redis://HOST[:PORT][/DATABASE] or unix:/path[?DATABASE]. KVD_E_INVALID, or KVD_E_UNSUPPORTED for
// TLS and clusters, which this kvd does not do.
int kvd_redis_url_parse(const char *url, struct kvd_redis_url *out, struct kvd_error *err);

// /absolute/path SIZE. KVD_E_INVALID.
int kvd_tier_directory_parse(const char *text, char path[KVD_CONFIG_TEXT], uint64_t *bytes,
                             struct kvd_error *err);

#endif
