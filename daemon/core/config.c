// Keys and their values. config_read.c reads files, config_check.c checks the whole.
#include <errno.h>
#include <grp.h>
#include <pwd.h>

#include "daemon/core/config_load.h"

enum key_type { TEXT, SIZE, NUMBER, YESNO, MILLIS, OCTAL, LEVEL, LISTEN, UIDS, GIDS, CNS };

struct key {
    struct kvd_config_key is; // section "namespace" is [namespace NAME]
    enum key_type type;
    size_t offset, cap;
    uint64_t min, max;
};

#define AT(field) offsetof(struct kvd_config, field), sizeof(((struct kvd_config *)0)->field)
#define NS(field)                                                                                  \
    offsetof(struct kvd_config_namespace, field), sizeof(((struct kvd_config_namespace *)0)->field)

enum { AT_START = false, RELOADED = true };

static const struct key keys[] = {
    {{"kvd", "backend", AT_START}, TEXT, AT(backend), 0, 0},
    {{"kvd", "device", AT_START}, NUMBER, AT(device), 0, 63},
    {{"kvd", "threads", AT_START}, NUMBER, AT(threads), 0, 1024},
    {{"kvd", "isa", AT_START}, TEXT, AT(isa), 0, 0},
    {{"kvd", "pool-size", AT_START}, SIZE, AT(pool_size), 2 << 20, 1ull << 43},
    {{"kvd", "extent-size", AT_START}, SIZE, AT(extent_size), 0, 1ull << 40},
    {{"kvd", "free-low", RELOADED}, SIZE, AT(free_low), 0, 1ull << 43},
    {{"kvd", "free-high", RELOADED}, SIZE, AT(free_high), 0, 1ull << 43},
    {{"kvd", "memory-floor", RELOADED}, SIZE, AT(memory_floor), 0, 1ull << 43},
    {{"kvd", "idle-memory-timeout", RELOADED}, MILLIS, AT(idle_memory_ms), 0, 86400000},
    {{"kvd", "overcommit-memory", AT_START}, YESNO, AT(overcommit_memory), 0, 0},
    {{"kvd", "keep", AT_START}, TEXT, AT(keep), 0, 0},
    {{"kvd", "scrub-rate", RELOADED}, SIZE, AT(scrub_rate), 0, 1ull << 40},
    {{"kvd", "resume-time", RELOADED}, MILLIS, AT(resume_ms), 0, 3600000},
    {{"kvd", "listen", AT_START}, LISTEN, AT(listen), 0, 0},
    {{"kvd", "socket-group", AT_START}, TEXT, AT(socket_group), 0, 0},
    {{"kvd", "socket-mode", AT_START}, OCTAL, AT(socket_mode), 0, 0777},
    {{"kvd", "metrics", AT_START}, TEXT, AT(metrics), 0, 0},
    {{"kvd", "store", RELOADED}, TEXT, AT(store), 0, 0},
    {{"kvd", "cache", AT_START}, TEXT, AT(cache), 0, 0},
    {{"kvd", "store-public-key", RELOADED}, TEXT, AT(store_public_key), 0, 0},
    {{"kvd", "store-timeout", RELOADED}, MILLIS, AT(store_timeout_ms), 100, 3600000},
    {{"kvd", "tier-host", AT_START}, SIZE, AT(tier_host), 0, 1ull << 43},
    {{"kvd", "tier-directory", AT_START}, TEXT, AT(tier_directory), 0, 0},
    {{"kvd", "tier-redis", AT_START}, TEXT, AT(tier_redis), 0, 0},
    {{"kvd", "tier-redis-auth", AT_START}, TEXT, AT(tier_redis_auth), 0, 0},
    {{"kvd", "tier-secret", AT_START}, TEXT, AT(tier_secret), 0, 0},
    {{"kvd", "tier-ttl", AT_START}, MILLIS, AT(tier_ttl_ms), 0, 2592000000},
    {{"kvd", "tier-timeout", AT_START}, MILLIS, AT(tier_timeout_ms), 10, 60000},
    {{"kvd", "tier-rate", AT_START}, SIZE, AT(tier_rate), 0, 1ull << 43},
    {{"kvd", "log-level", RELOADED}, LEVEL, AT(log_level), 0, 0},
    {{"kvd", "drain-timeout", RELOADED}, MILLIS, AT(drain_timeout_ms), 0, 3600000},
    {{"kvd", "max-sessions", RELOADED}, NUMBER, AT(max_sessions), 1, 100000},
    {{"kvd", "max-sequences", AT_START}, NUMBER, AT(max_sequences), 16, 4000000},
    {{"kvd", "only-listed-namespaces", RELOADED}, YESNO, AT(only_listed_namespaces), 0, 0},
    {{"kvd", "max-queue", RELOADED}, NUMBER, AT(max_queue), 1, 1000000},
    {{"kvd", "max-connections", AT_START}, NUMBER, AT(max_connections), 8, 100000},
    {{"kvd", "max-calls", RELOADED}, NUMBER, AT(max_calls), 64, 1000000},
    {{"kvd", "max-reply-bytes", RELOADED}, SIZE, AT(max_reply_bytes), 256 << 20, 1ull << 40},
    {{"kvd", "reply-timeout", RELOADED}, MILLIS, AT(reply_timeout_ms), 100, 3600000},
    {{"kvd", "max-buffer-bytes", RELOADED}, SIZE, AT(max_buffer_bytes), 4096, 1ull << 43},
    {{"kvd", "max-buffer-bytes-total", RELOADED}, SIZE, AT(max_buffer_bytes_total), 0, 1ull << 43},
    {{"kvd", "admin-uid", RELOADED}, UIDS, AT(admin), 0, 0},
    {{"kvd", "admin-cn", RELOADED}, CNS, AT(admin), 0, 0},
    {{"tls", "cert", AT_START}, TEXT, AT(tls_cert), 0, 0},
    {{"tls", "key", AT_START}, TEXT, AT(tls_key), 0, 0},
    {{"tls", "client-ca", AT_START}, TEXT, AT(tls_client_ca), 0, 0},
    {{"namespace", "quota", RELOADED}, SIZE, NS(quota), 0, 1ull << 50},
    {{"namespace", "borrow", RELOADED}, YESNO, NS(borrow), 0, 0},
    {{"namespace", "allow-uid", RELOADED}, UIDS, NS(allow), 0, 0},
    {{"namespace", "allow-gid", RELOADED}, GIDS, NS(allow), 0, 0},
    {{"namespace", "allow-cn", RELOADED}, CNS, NS(allow), 0, 0},
};

_Static_assert(KVD_LEN(keys) <= KVD_CONFIG_KEYS, "places are kept for so many keys");

int kvd_config_parse_number(const char *value, uint64_t *out)
{
    char *end;
    errno = 0;
    uint64_t n = strtoull(value, &end, 10);
    if (errno || end == value || *end || value[0] == '-')
        return KVD_E_INVALID;
    *out = n;
    return KVD_OK;
}

// "10s", "500ms", "2m" or plain milliseconds.
static int parse_millis(const char *value, uint64_t *out)
{
    char *end;
    uint64_t n = strtoull(value, &end, 10);
    if (end == value || value[0] == '-' || n > 1000000000)
        return KVD_E_INVALID;
    uint64_t factor = strcmp(end, "ms") == 0 || !*end ? 1
                      : strcmp(end, "s") == 0         ? 1000
                      : strcmp(end, "m") == 0         ? 60000
                                                      : 0;
    *out = n * factor;
    return factor ? KVD_OK : KVD_E_INVALID;
}

// KVD_E_NOT_FOUND: there is no such user or group, which has been said.
static int parse_ids(struct kvd_config_load *l, const struct key *k, uint32_t *ids, uint32_t *n,
                     const char *value)
{
    bool groups = k->type == GIDS;
    char copy[512], *save = NULL;
    *n = 0; // a later file replaces the list
    if (strlen(value) >= sizeof(copy))
        return KVD_E_INVALID;
    strcpy(copy, value);
    for (char *word = strtok_r(copy, ", ", &save); word; word = strtok_r(NULL, ", ", &save)) {
        uint64_t id;
        if (*n == KVD_MAX_ALLOW)
            return KVD_E_INVALID;
        if (kvd_config_parse_number(word, &id)) {
            const struct passwd *pw = groups ? NULL : getpwnam(word);
            const struct group *gr = groups ? getgrnam(word) : NULL;
            if (!pw && !gr) {
                kvd_config_problem(l, l->at, "%s: there is no %s '%.80s'", k->is.name,
                                   groups ? "group" : "user", word);
                return KVD_E_NOT_FOUND;
            }
            id = pw ? pw->pw_uid : gr->gr_gid;
        }
        if (id >= UINT32_MAX) // the last one stands for "nobody" in system calls
            return KVD_E_INVALID;
        ids[(*n)++] = (uint32_t)id;
    }
    return *n ? KVD_OK : KVD_E_INVALID; // an empty list would let everybody in
}

static int parse_cns(struct kvd_allow *allow, const char *value)
{
    char copy[1024], *save = NULL;
    allow->n_cns = 0;
    if (strlen(value) >= sizeof(copy))
        return KVD_E_INVALID;
    strcpy(copy, value);
    for (char *word = strtok_r(copy, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
        word += strspn(word, " ");
        if (allow->n_cns == KVD_MAX_ALLOW || strlen(word) >= sizeof(allow->cns[0]))
            return KVD_E_INVALID;
        strcpy(allow->cns[allow->n_cns++], word);
    }
    return allow->n_cns ? KVD_OK : KVD_E_INVALID;
}

int kvd_config_host_port(const char *text, char *host, size_t cap, uint32_t *port)
{
    const char *colon = strrchr(text, ':');
    uint64_t n;
    if (!colon || kvd_config_parse_number(colon + 1, &n) || n > 65535 ||
        (size_t)(colon - text) >= cap)
        return KVD_E_INVALID;
    bool bracket = text[0] == '[';
    if (bracket != (colon > text && colon[-1] == ']') ||
        (!bracket && memchr(text, ':', (size_t)(colon - text))))
        return KVD_E_INVALID; // an IPv6 address wants its brackets
    snprintf(host, cap, "%.*s", (int)(colon - text) - 2 * bracket, text + bracket);
    *port = (uint32_t)n;
    return KVD_OK;
}

static int add_listen(struct kvd_config_load *l, const char *value)
{
    struct kvd_config *c = l->c;
    char host[KVD_CONFIG_TEXT];
    uint32_t port;
    bool unix_path = strncmp(value, "unix:/", 6) == 0;
    // Those of one file, or of the command line, replace what was there before.
    if (c->n_listen && l->listen[0].file != l->at.file)
        c->n_listen = 0;
    if (unix_path ? strlen(value + 5) > KVD_MAX_SOCKET_PATH
                  : kvd_config_host_port(value, host, sizeof(host), &port) || !host[0])
        return KVD_E_INVALID;
    if (c->n_listen == KVD_MAX_LISTEN || strlen(value) >= KVD_CONFIG_TEXT)
        return KVD_E_INVALID;
    l->listen[c->n_listen] = l->at;
    strcpy(c->listen[c->n_listen++], value);
    return KVD_OK;
}

static void bad_value(struct kvd_config_load *l, const struct key *k, const char *value)
{
    static const char *const wanted[] = {
        [TEXT] = "a shorter text",
        [SIZE] = "a size such as 512MiB or 62GiB",
        [NUMBER] = "a number",
        [YESNO] = "yes or no",
        [MILLIS] = "a time such as 500ms, 10s or 2m",
        [OCTAL] = "an octal mode such as 0660",
        [LEVEL] = "error, warning, notice, info or debug",
        [LISTEN] =
            "unix:/absolute/path (at most 95 characters) or host:port (0 to 65535), at most 8",
        [UIDS] = "user names or ids, separated by commas, at most 16",
        [GIDS] = "group names or ids, separated by commas, at most 16",
        [CNS] = "certificate names, separated by commas, at most 16",
    };
    char range[80] = "", low[32], high[32];
    if (k->max && k->type == SIZE)
        snprintf(range, sizeof(range), "%s from %s to %s", k->min ? "" : ", 0 or",
                 kvd_format_size(KVD_MAX(k->min, KVD_CONFIG_LEAST_SIZE), low, sizeof(low)),
                 kvd_format_size(k->max, high, sizeof(high)));
    else if (k->max)
        snprintf(range, sizeof(range), " from %" PRIu64 " to %" PRIu64 "%s", k->min, k->max,
                 k->type == MILLIS ? " ms" : "");
    kvd_config_problem(l, l->at, "%s: '%.100s' is not possible; it wants %s%s", k->is.name, value,
                       wanted[k->type], k->type == OCTAL ? "" : range);
}

static int store_number(const struct key *k, void *at, uint64_t n)
{
    if (n < k->min || n > k->max || (k->type == SIZE && n && n < KVD_CONFIG_LEAST_SIZE))
        return KVD_E_INVALID;
    if (k->cap == sizeof(uint64_t))
        *(uint64_t *)at = n;
    else
        *(uint32_t *)at = (uint32_t)n;
    return KVD_OK;
}

static int set_value(struct kvd_config_load *l, const struct key *k, void *at, const char *value)
{
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
        return kvd_config_parse_number(value, &n) ? KVD_E_INVALID : store_number(k, at, n);
    case YESNO:
        *(bool *)at = strcmp(value, "yes") == 0;
        return *(bool *)at || strcmp(value, "no") == 0 ? KVD_OK : KVD_E_INVALID;
    case MILLIS:
        return parse_millis(value, &n) ? KVD_E_INVALID : store_number(k, at, n);
    case OCTAL:
        n = strtoull(value, &end, 8);
        return *end || end == value ? KVD_E_INVALID : store_number(k, at, n);
    case LEVEL:
        level = kvd_log_level_parse(value);
        if (level < 0)
            return KVD_E_INVALID;
        *(enum kvd_log_level *)at = (enum kvd_log_level)level;
        return KVD_OK;
    case LISTEN:
        return add_listen(l, value);
    case UIDS:
        return parse_ids(l, k, allow->uids, &allow->n_uids, value);
    case GIDS:
        return parse_ids(l, k, allow->gids, &allow->n_gids, value);
    case CNS:
        return parse_cns(allow, value);
    }
    return KVD_E_INVALID;
}

static bool of_namespace(const struct key *k)
{
    return strcmp(k->is.section, "namespace") == 0;
}

static void *field_of(struct kvd_config *c, struct kvd_config_namespace *ns, const struct key *k)
{
    return (uint8_t *)(of_namespace(k) ? (void *)ns : (void *)c) + k->offset;
}

// Index of a key; KVD_LEN(keys) if there is none of that name.
static size_t find_key(const char *section, const char *name)
{
    size_t i = 0;
    while (i < KVD_LEN(keys) &&
           (strcmp(keys[i].is.section, section) != 0 || strcmp(keys[i].is.name, name) != 0))
        i++;
    return i;
}

void kvd_config_set(struct kvd_config_load *l, const char *section, uint32_t ns, const char *name,
                    const char *value)
{
    size_t i = find_key(section, name);
    char known[900] = "";
    if (i == KVD_LEN(keys)) {
        for (i = 0; i < KVD_LEN(keys); i++) {
            size_t n = strlen(known);
            if (strcmp(keys[i].is.section, section) == 0)
                snprintf(known + n, sizeof(known) - n, "%s%s", n ? ", " : "", keys[i].is.name);
        }
        kvd_config_problem(l, l->at, "unknown key '%.60s' in [%.60s]; known: %s", name, section,
                           known);
        return;
    }
    const struct key *k = &keys[i];
    struct kvd_place *place = of_namespace(k) ? &l->namespaces[ns][i] : &l->keys[i];
    if (k->type != LISTEN && place->file == l->at.file && place->line && l->at.line) {
        kvd_config_problem(l, l->at, "%s is set twice, on line %u too; remove one", name,
                           place->line);
        return;
    }
    *place = l->at;
    void *field = field_of(l->c, of_namespace(k) ? &l->c->namespaces[ns] : NULL, k);
    if (set_value(l, k, field, value) == KVD_E_INVALID)
        bad_value(l, k, value);
}

struct kvd_place kvd_config_place(const struct kvd_config_load *l, const char *name)
{
    size_t i = find_key("kvd", name);
    return l->keys[i < KVD_LEN(keys) ? i : find_key("tls", name)];
}

struct kvd_place kvd_config_namespace_place(const struct kvd_config_load *l, uint32_t ns,
                                            const char *name)
{
    return l->namespaces[ns][find_key("namespace", name)];
}

void kvd_lines_add(struct kvd_lines *l, const char *fmt, ...)
{
    char **grown = realloc(l->line, (l->n + 1) * sizeof(*grown));
    va_list ap;
    if (!grown)
        return;
    l->line = grown;
    va_start(ap, fmt);
    l->n += vasprintf(&grown[l->n], fmt, ap) >= 0;
    va_end(ap);
}

void kvd_lines_free(struct kvd_lines *l)
{
    for (uint32_t i = 0; i < l->n; i++)
        free(l->line[i]);
    free(l->line);
    *l = (struct kvd_lines){0};
}

void kvd_config_problem(struct kvd_config_load *l, struct kvd_place at, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    struct kvd_lines *all = l->problems;
    struct kvd_place *places = realloc(l->places, (all->n + 1) * sizeof(*places));
    uint32_t i = all->n;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (!places)
        return;
    l->places = places;
    if (!at.file)
        kvd_lines_add(all, "%s", text);
    else if (at.line)
        kvd_lines_add(all, "%s:%u: %s", at.file, at.line, text);
    else
        kvd_lines_add(all, "%s: %s", at.file, text);
    if (all->n == i)
        return;
    for (; i && places[i - 1].file == at.file && places[i - 1].line > at.line; i--) {
        char *later = all->line[i - 1];
        all->line[i - 1] = all->line[i];
        all->line[i] = later;
        places[i] = places[i - 1];
    }
    places[i] = at;
}

bool kvd_config_text_valid(const char *text, size_t n)
{
    static const uint32_t least[] = {0, 0x80, 0x800,
                                     0x10000}; // of a character with that many more bytes
    for (size_t i = 0; i < n;) {
        uint8_t c = (uint8_t)text[i++];
        uint32_t more = c < 0x80 ? 0 : c >> 5 == 6 ? 1 : c >> 4 == 14 ? 2 : c >> 3 == 30 ? 3 : 4;
        uint32_t character = c & (0x7fu >> (more ? more + 1 : 0));
        if (more == 4 || (c < ' ' && c != '\t' && c != '\r' && c != '\n') || c == 0x7f)
            return false;
        for (uint32_t k = more; k; k--) {
            if (i == n || ((uint8_t)text[i] & 0xc0) != 0x80)
                return false;
            character = character << 6 | ((uint8_t)text[i++] & 0x3f);
        }
        if (character < least[more] || character > 0x10ffff || (character >> 11) == 0x1b)
            return false;
    }
    return true;
}

// -- the table of keys --------------------------------------------------------------------------

const struct kvd_config_key *kvd_config_key(uint32_t i)
{
    return i < KVD_LEN(keys) ? &keys[i].is : NULL;
}

static void put_ids(FILE *f, const uint32_t *ids, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        fprintf(f, "%s%u", i ? ", " : "", ids[i]);
}

bool kvd_config_value(const struct kvd_config *c, const struct kvd_config_namespace *ns, uint32_t i,
                      char *out, size_t cap)
{
    const struct key *k = &keys[i];
    const void *at =
        (const uint8_t *)(of_namespace(k) ? (const void *)ns : (const void *)c) + k->offset;
    const struct kvd_allow *allow = at;
    uint64_t n = 0;
    if (k->type == SIZE || k->type == NUMBER || k->type == MILLIS || k->type == OCTAL)
        n = k->cap == sizeof(uint64_t) ? *(const uint64_t *)at : *(const uint32_t *)at;
    FILE *f KVD_FCLOSE = fmemopen(out, cap, "w");
    out[0] = '\0';
    if (!f)
        return false;
    switch (k->type) {
    case TEXT:
        fprintf(f, "%s", (const char *)at);
        break;
    case SIZE:
        if (n && n % (1 << 30) == 0)
            fprintf(f, "%" PRIu64 "GiB", n >> 30);
        else if (n && n % (1 << 20) == 0)
            fprintf(f, "%" PRIu64 "MiB", n >> 20);
        else
            fprintf(f, "%" PRIu64, n);
        break;
    case NUMBER:
        fprintf(f, "%" PRIu64, n);
        break;
    case YESNO:
        fprintf(f, "%s", *(const bool *)at ? "yes" : "no");
        break;
    case MILLIS:
        fprintf(f, n % 1000 ? "%" PRIu64 "ms" : "%" PRIu64 "s", n % 1000 ? n : n / 1000);
        break;
    case OCTAL:
        fprintf(f, "%04" PRIo64, n);
        break;
    case LEVEL:
        fprintf(f, "%s", kvd_log_level_name(*(const enum kvd_log_level *)at));
        break;
    case LISTEN:
        for (uint32_t j = 0; j < c->n_listen; j++)
            fprintf(f, "%s%s", j ? ", " : "", c->listen[j]);
        break;
    case UIDS:
        put_ids(f, allow->uids, allow->n_uids);
        break;
    case GIDS:
        put_ids(f, allow->gids, allow->n_gids);
        break;
    case CNS:
        for (uint32_t j = 0; j < allow->n_cns; j++)
            fprintf(f, "%s%s", j ? ", " : "", allow->cns[j]);
        break;
    }
    return k->type == UIDS   ? allow->n_uids > 0
           : k->type == GIDS ? allow->n_gids > 0
           : k->type == CNS  ? allow->n_cns > 0
                             : true;
}

void kvd_config_copy(struct kvd_config *to, const struct kvd_config *from, uint32_t i)
{
    const struct key *k = &keys[i];
    if (of_namespace(k))
        return;
    memcpy((uint8_t *)to + k->offset, (const uint8_t *)from + k->offset, k->cap);
    if (k->type == LISTEN)
        to->n_listen = from->n_listen;
}

const struct kvd_config_namespace *kvd_config_namespace_find(const struct kvd_config *c,
                                                             const char *name)
{
    for (uint32_t i = 0; i < c->n_namespaces; i++)
        if (strcmp(c->namespaces[i].name, name) == 0)
            return &c->namespaces[i];
    return NULL;
}
