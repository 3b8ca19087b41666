// Inside of the configuration's parts: config.c (keys and values), config_read.c (files),
// config_check.c (the whole), config_load.c (all of it in its order).
#ifndef KVD_DAEMON_CONFIG_LOAD_H
#define KVD_DAEMON_CONFIG_LOAD_H

#include "daemon/core/config.h"

enum { KVD_CONFIG_KEYS = 64 }; // room for that many

// Where a value was written: a line of a file, an option of the command line (line 0), or nowhere
// (file NULL: a default).
struct kvd_place {
    const char *file;
    uint32_t line;
};

struct kvd_config_load {
    struct kvd_config *c;
    struct kvd_lines *problems;
    struct kvd_place *places; // of each problem
    struct kvd_place at;      // what is being read
    struct kvd_place keys[KVD_CONFIG_KEYS];
    struct kvd_place listen[KVD_MAX_LISTEN];
    struct kvd_place namespaces[KVD_MAX_CONFIG_NAMESPACES][KVD_CONFIG_KEYS];
    struct kvd_place namespace_section[KVD_MAX_CONFIG_NAMESPACES];
};

// Adds a problem, with the place in front. Those of a file are kept in the order of its lines.
__attribute__((format(printf, 3, 4))) void
kvd_config_problem(struct kvd_config_load *l, struct kvd_place at, const char *fmt, ...);

// Whether a text has neither control characters (but those that end lines, and tabs) nor bytes that
// are no UTF-8: it comes back in messages, logs and replies.
bool kvd_config_text_valid(const char *text, size_t n);

// Sets one key of a section ("kvd", "tls" or "namespace" with its `ns`), as written at l->at.
void kvd_config_set(struct kvd_config_load *l, const char *section, uint32_t ns, const char *name,
                    const char *value);
// Where a key of [kvd] or [tls] was set, and one of a namespace.
struct kvd_place kvd_config_place(const struct kvd_config_load *l, const char *name);
struct kvd_place kvd_config_namespace_place(const struct kvd_config_load *l, uint32_t ns,
                                            const char *name);

// Reads one file. One that is not there is a problem, unless it is `optional`.
void kvd_config_read(struct kvd_config_load *l, const char *path, bool optional);

// Fills in what depends on other keys, and checks the whole.
void kvd_config_check(struct kvd_config_load *l);
void kvd_config_check_tiers(struct kvd_config_load *l); // config_tiers.c

// A number with decimal digits only. KVD_E_INVALID.
int kvd_config_parse_number(const char *value, uint64_t *out);

// Splits HOST:PORT or [HOST]:PORT; an empty host is every address. KVD_E_INVALID.
int kvd_config_host_port(const char *text, char *host, size_t cap, uint32_t *port);

#endif
