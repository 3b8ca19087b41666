// Configuration: built-in defaults, then the files in their order, then the command line; later
// ones win. See kvd.conf(5) for every key with its meaning. Start, --check-config and reload all go
// through kvd_config_load, so that one refuses exactly what the others refuse.
#ifndef KVD_DAEMON_CONFIG_H
#define KVD_DAEMON_CONFIG_H

#include <sys/types.h>

#include "daemon/core/log.h"
#include "proto/base.h"
#include "proto/kvd_limits.h"

enum {
    KVD_MAX_LISTEN = 8,
    KVD_MAX_ALLOW = 16,
    KVD_MAX_CONFIG_NAMESPACES = 64,
    KVD_CONFIG_TEXT = 256,
    KVD_MAX_CONFIG_FILES = 8,
    KVD_MAX_CONFIG_OPTIONS = 64,
    KVD_MAX_INSTANCE = 32, // bytes of an instance's name
};

// No size of less is of use: whoever writes 12 has left out the unit.
#define KVD_CONFIG_LEAST_SIZE ((uint64_t)4096)

// Who may do something. An empty list of everything means: anybody who can connect.
struct kvd_allow {
    uint32_t uids[KVD_MAX_ALLOW], gids[KVD_MAX_ALLOW];
    uint32_t n_uids, n_gids, n_cns;
    char cns[KVD_MAX_ALLOW][64]; // common names of TLS client certificates
};

struct kvd_config_namespace {
    char name[KVD_MAX_NAMESPACE + 1];
    uint64_t quota;
    bool borrow; // of what others have no use for
    struct kvd_allow allow;
};

struct kvd_config {
    char backend[16]; // "auto", "cpu", "cuda"
    uint32_t device;
    uint32_t threads;                // 0: one per CPU
    char isa[16];                    // "": the best
    uint64_t pool_size, extent_size; // extent_size 0: chosen from pool_size
    uint64_t free_low, free_high;    // of the pool, between which eviction keeps it; 0: off
    uint64_t memory_floor;           // GPU memory that is left to others
    uint32_t idle_memory_ms;         // how long host memory of idle extents is kept; 0: for good
    bool overcommit_memory;          // a pool may be larger than the host's memory
    bool only_listed_namespaces;     // no others than those of the configuration
    char keep[8];                    // what outlives a kvd: "no", "yes", "fresh"
    uint64_t scrub_rate;             // bytes a second; 0: only when asked
    uint32_t resume_ms;              // how long sessions of a kvd before wait; 0: they end with it
    char listen[KVD_MAX_LISTEN][KVD_CONFIG_TEXT];
    uint32_t n_listen;
    char socket_group[64];
    uint32_t socket_mode;
    char metrics[KVD_CONFIG_TEXT]; // "HOST:PORT", "" turns it off
    char store[KVD_CONFIG_TEXT], cache[KVD_CONFIG_TEXT];
    char store_public_key[KVD_CONFIG_TEXT]; // PEM; "": sets need no signature
    uint32_t store_timeout_ms;
    // Tiers behind the pool; 0 and "" are off.
    uint64_t tier_host;                   // bytes
    char tier_directory[KVD_CONFIG_TEXT]; // PATH SIZE: see config_tiers.h
    char tier_redis[KVD_CONFIG_TEXT];     // an address
    char tier_redis_auth[KVD_CONFIG_TEXT], tier_secret[KVD_CONFIG_TEXT]; // files
    uint32_t tier_ttl_ms, tier_timeout_ms;
    uint64_t tier_rate; // bytes a second that each tier is sent; 0: no limit
    enum kvd_log_level log_level;
    uint32_t drain_timeout_ms;
    uint32_t max_sessions, max_sequences, max_queue, max_connections, max_calls;
    uint64_t max_reply_bytes; // being made or unread, in all
    uint32_t reply_timeout_ms;
    uint64_t max_buffer_bytes;       // registered per session
    uint64_t max_buffer_bytes_total; // in all; 0: as much as there is memory
    char tls_cert[KVD_CONFIG_TEXT], tls_key[KVD_CONFIG_TEXT], tls_client_ca[KVD_CONFIG_TEXT];
    struct kvd_allow admin; // besides root and the daemon's own user
    struct kvd_config_namespace namespaces[KVD_MAX_CONFIG_NAMESPACES];
    uint32_t n_namespaces;
};

// What a configuration is made from. Texts are the caller's and must outlive every load: a reload
// reads the same again.
struct kvd_config_source {
    const char *files[KVD_MAX_CONFIG_FILES];
    uint32_t n_files;
    // NULL: none. With an instance "1", the defaults are those of the second daemon of a host
    // (device 1, its own socket and metrics port), and beside each file X.conf, X-1.conf is read
    // over it if it is there.
    const char *instance;
    struct {
        const char *key, *value; // of section [kvd]
    } options[KVD_MAX_CONFIG_OPTIONS];
    uint32_t n_options;
};

// Lines of text, each on the heap.
struct kvd_lines {
    char **line;
    uint32_t n;
};
// Leaves the line out when memory is short.
__attribute__((format(printf, 2, 3))) void kvd_lines_add(struct kvd_lines *l, const char *fmt, ...);
void kvd_lines_free(struct kvd_lines *l);

// Fills *out with the checked configuration. KVD_E_INVALID with all that is wrong in *problems, one
// line each: "file:line: what is wrong and what is possible". *out is then of no use.
int kvd_config_load(const struct kvd_config_source *source, struct kvd_config *out,
                    struct kvd_lines *problems);

// The table of keys, for reloading and for documentation. Number `i` of section "kvd", "tls" or
// "namespace" (for all of them), or NULL after the last.
struct kvd_config_key {
    const char *section, *name;
    bool reloaded; // takes effect without a restart
};
const struct kvd_config_key *kvd_config_key(uint32_t i);
// The value of a key as text, as a file could have it. `ns` is for keys of section "namespace".
// False for an empty list, which a file says by leaving the key out.
bool kvd_config_value(const struct kvd_config *c, const struct kvd_config_namespace *ns, uint32_t i,
                      char *out, size_t cap);
// Copies the value of a key of section "kvd" or "tls".
void kvd_config_copy(struct kvd_config *to, const struct kvd_config *from, uint32_t i);

// The settings of a namespace, or NULL.
const struct kvd_config_namespace *kvd_config_namespace_find(const struct kvd_config *c,
                                                             const char *name);

#endif
