// Configuration: an INI file, then command-line overrides. See deploy/kvd.conf for every key with
// its meaning.
#ifndef KVD_DAEMON_CONFIG_H
#define KVD_DAEMON_CONFIG_H

#include <sys/types.h>

#include "daemon/log.h"
#include "proto/base.h"
#include "proto/kvd_limits.h"

enum {
    KVD_MAX_LISTEN = 8,
    KVD_MAX_ALLOW = 16,
    KVD_MAX_CONFIG_NAMESPACES = 64,
    KVD_CONFIG_TEXT = 256
};

// Who may do something. An empty list of everything means: anybody who can connect.
struct kvd_allow {
    uint32_t uids[KVD_MAX_ALLOW], gids[KVD_MAX_ALLOW];
    uint32_t n_uids, n_gids, n_cns;
    char cns[KVD_MAX_ALLOW][64]; // common names of TLS client certificates
};

struct kvd_config_namespace {
    char name[KVD_MAX_NAMESPACE + 1];
    uint64_t quota;
    struct kvd_allow allow;
};

struct kvd_config {
    char file[KVD_CONFIG_TEXT]; // "" if there is none
    char backend[16];           // "auto", "cpu", "cuda"
    uint32_t device;
    uint32_t threads;                // 0: one per CPU
    char isa[16];                    // "": the best
    uint64_t pool_size, extent_size; // extent_size 0: chosen from pool_size
    uint64_t memory_floor;           // GPU memory that is left to others
    char listen[KVD_MAX_LISTEN][KVD_CONFIG_TEXT];
    uint32_t n_listen;
    char socket_group[64];
    uint32_t socket_mode;
    char metrics[KVD_CONFIG_TEXT]; // "HOST:PORT", "" turns it off
    char store[KVD_CONFIG_TEXT], cache[KVD_CONFIG_TEXT];
    char store_public_key[KVD_CONFIG_TEXT]; // PEM; "": sets need no signature
    uint32_t store_timeout_ms;
    enum kvd_log_level log_level;
    uint32_t drain_timeout_ms;
    uint32_t max_sessions, max_sequences, max_queue;
    uint64_t max_buffer_bytes; // registered per session
    char tls_cert[KVD_CONFIG_TEXT], tls_key[KVD_CONFIG_TEXT], tls_client_ca[KVD_CONFIG_TEXT];
    struct kvd_allow admin; // besides root and the daemon's own user
    struct kvd_config_namespace namespaces[KVD_MAX_CONFIG_NAMESPACES];
    uint32_t n_namespaces;
};

void kvd_config_defaults(struct kvd_config *c);
// Reads a file over *c. KVD_E_INVALID with "file:line: what is wrong and what is possible", or
// KVD_E_NOT_FOUND.
int kvd_config_read(struct kvd_config *c, const char *path, struct kvd_error *err);
// Sets one key of section [kvd], as from the command line.
int kvd_config_set(struct kvd_config *c, const char *key, const char *value, struct kvd_error *err);
// Fills in what depends on other keys and checks the whole.
int kvd_config_finish(struct kvd_config *c, struct kvd_error *err);
// The settings of a namespace, or NULL.
const struct kvd_config_namespace *kvd_config_namespace_find(const struct kvd_config *c,
                                                             const char *name);

#endif
