#include "daemon/config.h"

#include "calib/sign.h"

#include <errno.h>
#include <grp.h>
#include <ini.h>
#include <pwd.h>

enum key_type { TEXT, SIZE, NUMBER, MILLIS, OCTAL, LEVEL, LISTEN, UIDS, GIDS, CNS };

struct key {
    const char *section, *name; // section "namespace" is [namespace NAME]
    enum key_type type;
    size_t offset, cap;
    uint64_t min, max;
};

#define AT(field) offsetof(struct kvd_config, field), sizeof(((struct kvd_config *)0)->field)
#define NS(field)                                                                                  \
    offsetof(struct kvd_config_namespace, field), sizeof(((struct kvd_config_namespace *)0)->field)

static const struct key keys[] = {
    {"kvd", "backend", TEXT, AT(backend), 0, 0},
    {"kvd", "device", NUMBER, AT(device), 0, 63},
    {"kvd", "threads", NUMBER, AT(threads), 0, 1024},
    {"kvd", "isa", TEXT, AT(isa), 0, 0},
    {"kvd", "pool-size", SIZE, AT(pool_size), 2 << 20, 1ull << 43},
    {"kvd", "extent-size", SIZE, AT(extent_size), 0, 1ull << 40},
    {"kvd", "memory-floor", SIZE, AT(memory_floor), 0, 1ull << 43},
    {"kvd", "listen", LISTEN, AT(listen), 0, 0},
    {"kvd", "socket-group", TEXT, AT(socket_group), 0, 0},
    {"kvd", "socket-mode", OCTAL, AT(socket_mode), 0, 0777},
    {"kvd", "metrics", TEXT, AT(metrics), 0, 0},
    {"kvd", "store", TEXT, AT(store), 0, 0},
    {"kvd", "cache", TEXT, AT(cache), 0, 0},
    {"kvd", "store-public-key", TEXT, AT(store_public_key), 0, 0},
    {"kvd", "store-timeout", MILLIS, AT(store_timeout_ms), 100, 3600000},
    {"kvd", "log-level", LEVEL, AT(log_level), 0, 0},
    {"kvd", "drain-timeout", MILLIS, AT(drain_timeout_ms), 0, 3600000},
    {"kvd", "max-sessions", NUMBER, AT(max_sessions), 1, 100000},
    {"kvd", "max-sequences", NUMBER, AT(max_sequences), 16, 4000000},
    {"kvd", "max-queue", NUMBER, AT(max_queue), 1, 1000000},
    {"kvd", "max-buffer-bytes", SIZE, AT(max_buffer_bytes), 4096, 1ull << 43},
    {"kvd", "admin-uid", UIDS, AT(admin), 0, 0},
    {"kvd", "admin-cn", CNS, AT(admin), 0, 0},
    {"tls", "cert", TEXT, AT(tls_cert), 0, 0},
    {"tls", "key", TEXT, AT(tls_key), 0, 0},
    {"tls", "client-ca", TEXT, AT(tls_client_ca), 0, 0},
    {"namespace", "quota", SIZE, NS(quota), 0, 1ull << 50},
    {"namespace", "allow-uid", UIDS, NS(allow), 0, 0},
    {"namespace", "allow-gid", GIDS, NS(allow), 0, 0},
    {"namespace", "allow-cn", CNS, NS(allow), 0, 0},
};

void kvd_config_defaults(struct kvd_config *c)
{
    *c = (struct kvd_config){
        .backend = "auto",
        .pool_size = 1ull << 30,
        .memory_floor = 512ull << 20,
        .socket_mode = 0660,
        .metrics = "127.0.0.1:9464",
        .store_timeout_ms = 60000,
        .log_level = KVD_LOG_INFO,
        .drain_timeout_ms = 10000,
        .max_sessions = 4096,
        .max_sequences = 65536,
        .max_queue = 4096,
        .max_buffer_bytes = 16ull << 30,
    };
}

static int parse_number(const char *value, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(value, &end, 10);
    if (errno || end == value || *end || value[0] == '-')
        return KVD_E_INVALID;
    *out = n;
    return KVD_OK;
}

// "10s", "500ms", "2m" or plain milliseconds.
static int parse_millis(const char *value, uint64_t *out)
{
    char *end;
    unsigned long long n = strtoull(value, &end, 10);
    if (end == value || value[0] == '-' || n > 1000000000)
        return KVD_E_INVALID;
    uint64_t factor = strcmp(end, "ms") == 0 || !*end ? 1
                      : strcmp(end, "s") == 0         ? 1000
                      : strcmp(end, "m") == 0         ? 60000
                                                      : 0;
    *out = n * factor;
    return factor ? KVD_OK : KVD_E_INVALID;
}

static int parse_ids(uint32_t *ids, uint32_t *n, const char *value, bool groups)
{
    char copy[512], *save = NULL;
    if (strlen(value) >= sizeof(copy))
        return KVD_E_INVALID;
    strcpy(copy, value);
    for (char *word = strtok_r(copy, ", ", &save); word; word = strtok_r(NULL, ", ", &save)) {
        uint64_t id;
        if (*n == KVD_MAX_ALLOW)
            return KVD_E_INVALID;
        if (parse_number(word, &id)) {
            const struct passwd *pw = groups ? NULL : getpwnam(word);
            const struct group *gr = groups ? getgrnam(word) : NULL;
            if (!pw && !gr)
                return KVD_E_INVALID;
            id = pw ? pw->pw_uid : gr->gr_gid;
        }
        ids[(*n)++] = (uint32_t)id;
    }
    return KVD_OK;
}

static int parse_cns(struct kvd_allow *allow, const char *value)
{
    char copy[1024], *save = NULL;
    if (strlen(value) >= sizeof(copy))
        return KVD_E_INVALID;
    strcpy(copy, value);
    for (char *word = strtok_r(copy, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
        word += strspn(word, " ");
        if (allow->n_cns == KVD_MAX_ALLOW || strlen(word) >= sizeof(allow->cns[0]))
            return KVD_E_INVALID;
        strcpy(allow->cns[allow->n_cns++], word);
    }
    return KVD_OK;
}

static int add_listen(struct kvd_config *c, const char *value)
{
    const char *colon = strrchr(value, ':');
    uint64_t port;
    bool unix_path = strncmp(value, "unix:/", 6) == 0;
    // A socket address has 108 bytes for a path; the fd socket adds ".fd".
    if (unix_path ? strlen(value) > 100
                  : !colon || colon == value || parse_number(colon + 1, &port) || port > 65535)
        return KVD_E_INVALID;
    if (c->n_listen == KVD_MAX_LISTEN || strlen(value) >= KVD_CONFIG_TEXT)
        return KVD_E_INVALID;
    strcpy(c->listen[c->n_listen++], value);
    return KVD_OK;
}

static int bad_value(const struct key *k, const char *value, struct kvd_error *err)
{
    static const char *const wanted[] = {
        [TEXT] = "a shorter text",
        [SIZE] = "a size such as 512MiB or 62GiB",
        [NUMBER] = "a number",
        [MILLIS] = "a time such as 500ms, 10s or 2m",
        [OCTAL] = "an octal mode such as 0660",
        [LEVEL] = "error, warning, notice, info or debug",
        [LISTEN] = "unix:/absolute/path (at most 95 characters) or host:port, at most 8 of them",
        [UIDS] = "user names or ids, separated by commas, at most 16",
        [GIDS] = "group names or ids, separated by commas, at most 16",
        [CNS] = "certificate names, separated by commas, at most 16",
    };
    char range[80] = "";
    if (k->max)
        snprintf(range, sizeof(range), " from %llu to %llu", (unsigned long long)k->min,
                 (unsigned long long)k->max);
    return kvd_fail(err, KVD_E_INVALID, "%s: '%.100s' is not possible; it wants %s%s", k->name,
                    value, wanted[k->type], k->type == OCTAL ? "" : range);
}

static int store_number(const struct key *k, void *at, uint64_t n)
{
    if (n < k->min || n > k->max)
        return KVD_E_INVALID;
    if (k->cap == sizeof(uint64_t))
        *(uint64_t *)at = n;
    else
        *(uint32_t *)at = (uint32_t)n;
    return KVD_OK;
}

static int set_key(struct kvd_config *c, struct kvd_config_namespace *ns, const struct key *k,
                   const char *value)
{
    void *at =
        (uint8_t *)(strcmp(k->section, "namespace") == 0 ? (void *)ns : (void *)c) + k->offset;
    struct kvd_allow *allow = at;
    uint64_t n;
    char *end;
    int level;
    switch (k->type) {
    case TEXT:
        if (strlen(value) >= k->cap)
            return KVD_E_INVALID;
        strcpy(at, value);
        return KVD_OK;
    case SIZE:
        return kvd_parse_size(value, &n) ? KVD_E_INVALID : store_number(k, at, n);
    case NUMBER:
        return parse_number(value, &n) ? KVD_E_INVALID : store_number(k, at, n);
    case MILLIS:
        return parse_millis(value, &n) ? KVD_E_INVALID : store_number(k, at, n);
    case OCTAL:
        n = strtoull(value, &end, 8);
        return *end || end == value ? KVD_E_INVALID : store_number(k, at, n);
    case LEVEL:
        level = kvd_log_level_parse(value);
        if (level < 0)
            return KVD_E_INVALID;
        c->log_level = (enum kvd_log_level)level;
        return KVD_OK;
    case LISTEN:
        return add_listen(c, value);
    case UIDS:
        return parse_ids(allow->uids, &allow->n_uids, value, false);
    case GIDS:
        return parse_ids(allow->gids, &allow->n_gids, value, true);
    case CNS:
        return parse_cns(allow, value);
    }
    return KVD_E_INVALID;
}

static int set(struct kvd_config *c, const char *section, struct kvd_config_namespace *ns,
               const char *name, const char *value, struct kvd_error *err)
{
    bool section_known = false;
    char known[512] = "";
    for (size_t i = 0; i < KVD_LEN(keys); i++) {
        if (strcmp(keys[i].section, section) != 0)
            continue;
        section_known = true;
        if (strcmp(keys[i].name, name) == 0)
            return set_key(c, ns, &keys[i], value) ? bad_value(&keys[i], value, err) : KVD_OK;
        size_t n = strlen(known);
        snprintf(known + n, sizeof(known) - n, "%s%s", n ? ", " : "", keys[i].name);
    }
    if (!section_known)
        return kvd_fail(err, KVD_E_INVALID,
                        "unknown section [%.60s]; there are [kvd], [tls] and [namespace NAME]",
                        section);
    return kvd_fail(err, KVD_E_INVALID, "unknown key '%.60s' in [%.60s]; known: %s", name, section,
                    known);
}

struct reader {
    struct kvd_config *c;
    const char *path;
    struct kvd_error *err;
    FILE *file;
    int line;     // of the text that the parser has just been given
    bool listens; // this file has named a listener
};

// inih tells its handler no line numbers, so the lines are counted as they are handed over.
static char *read_line(char *text, int cap, void *ctx)
{
    struct reader *r = ctx;
    r->line++;
    return fgets(text, cap, r->file);
}

static struct kvd_config_namespace *namespace_of(struct kvd_config *c, const char *name,
                                                 struct kvd_error *err)
{
    for (uint32_t i = 0; i < c->n_namespaces; i++)
        if (strcmp(c->namespaces[i].name, name) == 0)
            return &c->namespaces[i];
    if (!kvd_name_valid(name, KVD_MAX_NAMESPACE) || c->n_namespaces == KVD_MAX_CONFIG_NAMESPACES) {
        kvd_fail(err, KVD_E_INVALID, "'%.80s' is no namespace name, or there are more than %d",
                 name, KVD_MAX_CONFIG_NAMESPACES);
        return NULL;
    }
    struct kvd_config_namespace *ns = &c->namespaces[c->n_namespaces++];
    *ns = (struct kvd_config_namespace){0};
    snprintf(ns->name, sizeof(ns->name), "%s", name);
    return ns;
}

static int on_key(void *ctx, const char *section, const char *name, const char *value)
{
    struct reader *r = ctx;
    struct kvd_error err = {0};
    struct kvd_config_namespace *ns = NULL;
    int rc = KVD_OK;
    if (strncmp(section, "namespace ", 10) == 0) {
        ns = namespace_of(r->c, section + 10, &err);
        section = "namespace";
        rc = ns ? KVD_OK : err.code;
    } else if (strcmp(section, "namespace") == 0) {
        rc = kvd_fail(&err, KVD_E_INVALID, "a namespace section wants a name: [namespace NAME]");
    }
    if (strcmp(name, "listen") == 0 && !r->listens) {
        r->listens = true;
        r->c->n_listen = 0;
    }
    if (rc == KVD_OK)
        rc = set(r->c, section, ns, name, value, &err);
    if (rc && r->err->code == 0)
        kvd_fail(r->err, KVD_E_INVALID, "%s:%d: %s", r->path, r->line, err.text);
    return rc == KVD_OK;
}

int kvd_config_read(struct kvd_config *c, const char *path, struct kvd_error *err)
{
    struct kvd_error first = {0};
    struct reader r = {.c = c, .path = path, .err = &first};
    FILE *f KVD_FCLOSE = fopen(path, "re");
    if (!f)
        return kvd_fail(err, errno == ENOENT ? KVD_E_NOT_FOUND : -errno, "%s: %s", path,
                        strerror(errno));
    r.file = f;
    int line = ini_parse_stream(read_line, &r, on_key, &r);
    if (first.code)
        return kvd_fail(err, first.code, "%s", first.text);
    if (line)
        return kvd_fail(err, KVD_E_INVALID, "%s:%d: neither a [section] nor key = value", path,
                        line);
    snprintf(c->file, sizeof(c->file), "%s", path);
    return KVD_OK;
}

int kvd_config_set(struct kvd_config *c, const char *key, const char *value, struct kvd_error *err)
{
    return set(c, "kvd", NULL, key, value, err);
}

static bool loopback(const char *listen)
{
    return strncmp(listen, "127.", 4) == 0 || strncmp(listen, "localhost:", 10) == 0 ||
           strncmp(listen, "[::1]:", 6) == 0;
}

int kvd_config_finish(struct kvd_config *c, struct kvd_error *err)
{
    if (strcmp(c->backend, "auto") != 0 && strcmp(c->backend, "cpu") != 0 &&
        strcmp(c->backend, "cuda") != 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "backend: '%s' is not possible; it wants auto, cpu or cuda", c->backend);
    if (c->extent_size == 0) {
        // At least 32 extents, so that several namespaces and geometries fit; at most 256 MiB each.
        c->extent_size = 256ull << 20;
        while (c->extent_size > 2 << 20 && c->pool_size / c->extent_size < 32)
            c->extent_size /= 2;
    }
    if (c->extent_size % (2 << 20) || c->extent_size > c->pool_size)
        return kvd_fail(err, KVD_E_INVALID,
                        "extent-size: %llu bytes is not possible; it must be a multiple of 2 MiB "
                        "and at most pool-size",
                        (unsigned long long)c->extent_size);
    if (c->n_listen == 0)
        add_listen(c, "unix:/run/kvd/kvd.sock");
    if (!c->cache[0]) {
        const char *home = getenv("CACHE_DIRECTORY"); // systemd's
        const char *xdg = getenv("XDG_CACHE_HOME"), *user = getenv("HOME");
        if (home)
            snprintf(c->cache, sizeof(c->cache), "%s", home);
        else if (xdg)
            snprintf(c->cache, sizeof(c->cache), "%s/kvd", xdg);
        else
            snprintf(c->cache, sizeof(c->cache), "%s/.cache/kvd", user ? user : "/var/tmp");
    }
    if (c->store_public_key[0] && kvd_sign_check_key(c->store_public_key, err))
        return kvd_fail_in(err, "store-public-key");
    bool tls = c->tls_cert[0] || c->tls_key[0];
    if (tls && (!c->tls_cert[0] || !c->tls_key[0]))
        return kvd_fail(err, KVD_E_INVALID, "tls: cert and key go together");
    if (c->tls_client_ca[0] && !tls)
        return kvd_fail(err, KVD_E_INVALID, "tls: client-ca wants cert and key too");
    for (uint32_t i = 0; i < c->n_listen; i++)
        if (strncmp(c->listen[i], "unix:", 5) != 0 && !loopback(c->listen[i]) &&
            !c->tls_client_ca[0])
            return kvd_fail(
                err, KVD_E_INVALID,
                "listen: %s is reachable from other hosts; it wants [tls] cert, key and client-ca",
                c->listen[i]);
    return KVD_OK;
}

const struct kvd_config_namespace *kvd_config_namespace_find(const struct kvd_config *c,
                                                             const char *name)
{
    for (uint32_t i = 0; i < c->n_namespaces; i++)
        if (strcmp(c->namespaces[i].name, name) == 0)
            return &c->namespaces[i];
    return NULL;
}
