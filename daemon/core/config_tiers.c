// Keys of tiers: their values, and whether all of them are possible.
#include "daemon/core/config_tiers.h"

#include <errno.h>
#include <sys/stat.h>

#include "daemon/core/config_load.h"
#include "daemon/core/host.h"
#include "daemon/core/secret.h"

static int number(const char *text, uint64_t most, uint32_t *out)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || n > most)
        return KVD_E_INVALID;
    *out = (uint32_t)n;
    return KVD_OK;
}

static int parse_host(char *host, struct kvd_redis_url *out)
{
    char *slash = strchr(host, '/');
    if (slash) {
        *slash = '\0';
        if (slash[1] && number(slash + 1, 1 << 20, &out->database))
            return KVD_E_INVALID;
    }
    char *end = *host == '[' ? strchr(host, ']') : NULL;
    char *colon = strrchr(end ? end : host, ':');
    if (*host == '[' && (!end || (end[1] && end[1] != ':')))
        return KVD_E_INVALID;
    if (!end && colon && strchr(host, ':') != colon)
        return KVD_E_INVALID; // an IPv6 address wants its brackets
    out->port = 6379;
    if (colon && (number(colon + 1, 65535, &out->port) || out->port == 0))
        return KVD_E_INVALID;
    if (colon)
        *colon = '\0';
    if (end) {
        *end = '\0';
        host++;
    }
    snprintf(out->host, sizeof(out->host), "%s", host);
    return *host ? KVD_OK : KVD_E_INVALID;
}

int kvd_redis_url_parse(const char *url, struct kvd_redis_url *out, struct kvd_error *err)
{
    char copy[256];
    *out = (struct kvd_redis_url){0};
    snprintf(copy, sizeof(copy), "%s", url);
    if (strncmp(url, "rediss://", 9) == 0)
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "TLS is not possible (rediss://); a tunnel such as stunnel or ghostunnel "
                        "does it, with redis:// to its near end");
    if (strncmp(url, "redis+cluster:", 14) == 0 || strncmp(url, "redis-cluster:", 14) == 0 ||
        strncmp(url, "redis+sentinel:", 15) == 0 || strchr(url, ','))
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "clusters and sentinels are not possible; name one server");
    if (strchr(url, '@'))
        return kvd_fail(err, KVD_E_INVALID,
                        "a password does not go into the address; put it into a file, and that "
                        "into tier-redis-auth");
    int rc = KVD_E_INVALID;
    if (strlen(url) >= sizeof(copy)) {
        rc = KVD_E_INVALID;
    } else if (strncmp(url, "redis://", 8) == 0 || strncmp(url, "valkey://", 9) == 0) {
        rc = parse_host(copy + (*url == 'r' ? 8 : 9), out);
    } else if (strncmp(url, "unix:/", 6) == 0) {
        char *database = strchr(copy, '?');
        rc = database ? number(database + 1, 1 << 20, &out->database) : KVD_OK;
        if (database)
            *database = '\0';
        snprintf(out->host, sizeof(out->host), "%s", copy + 5);
        if (strlen(out->host) > 100) // of a socket's address
            rc = KVD_E_INVALID;
    }
    if (rc)
        return kvd_fail(err, rc,
                        "'%.100s' is not possible; it wants redis://HOST[:PORT][/DATABASE] or "
                        "unix:/absolute/path[?DATABASE]",
                        url);
    return KVD_OK;
}

int kvd_tier_directory_parse(const char *text, char path[KVD_CONFIG_TEXT], uint64_t *bytes,
                             struct kvd_error *err)
{
    const char *blank = strrchr(text, ' ');
    size_t n = blank ? (size_t)(blank - text) : 0;
    while (n && text[n - 1] == ' ')
        n--;
    if (!n || *text != '/' || kvd_parse_size(blank + 1, bytes) || *bytes < KVD_TIER_MIN_BYTES)
        return kvd_fail(err, KVD_E_INVALID,
                        "'%.150s' is not possible; it wants /absolute/path SIZE, such as "
                        "/var/cache/kvd/blocks 200GiB, of at least 64MiB",
                        text);
    snprintf(path, KVD_CONFIG_TEXT, "%.*s", (int)n, text);
    return KVD_OK;
}

static void check_directory(struct kvd_config_load *l)
{
    const struct kvd_config *c = l->c;
    struct kvd_place at = kvd_config_place(l, "tier-directory");
    struct kvd_error err = {0};
    char path[KVD_CONFIG_TEXT];
    uint64_t bytes;
    struct stat st;
    if (kvd_tier_directory_parse(c->tier_directory, path, &bytes, &err)) {
        kvd_config_problem(l, at, "tier-directory: %s", err.text);
        return;
    }
    int rc = stat(path, &st);
    if (rc == 0 ? !S_ISDIR(st.st_mode) : errno == ENOTDIR)
        kvd_config_problem(l, at, "tier-directory: %s is not a folder", path);
    else if (rc == 0 && (st.st_mode & 0022) && !c->tier_secret[0])
        kvd_config_problem(l, at,
                           "tier-directory: %s has mode %04o, so others than its owner can put "
                           "blocks there; take that away, or set tier-secret",
                           path, st.st_mode & 07777);
}

static void check_redis(struct kvd_config_load *l)
{
    struct kvd_error err = {0};
    struct kvd_redis_url url;
    if (kvd_redis_url_parse(l->c->tier_redis, &url, &err))
        kvd_config_problem(l, kvd_config_place(l, "tier-redis"), "tier-redis: %s", err.text);
#ifndef KVD_REDIS
    else
        kvd_config_problem(l, kvd_config_place(l, "tier-redis"),
                           "tier-redis: this kvd was built without hiredis");
#endif
}

static void check_secret(struct kvd_config_load *l, const char *key, const char *path,
                         uint32_t least)
{
    uint8_t bytes[KVD_SECRET_FILE_MAX];
    struct kvd_error err = {0};
    size_t n;
    if (*path && kvd_secret_file_read(path, least, bytes, &n, &err))
        kvd_config_problem(l, kvd_config_place(l, key), "%s: %s", key, err.text);
    explicit_bzero(bytes, sizeof(bytes));
}

void kvd_config_check_tiers(struct kvd_config_load *l)
{
    const struct kvd_config *c = l->c;
    const char *of;
    char wanted[32], have[32];
    uint64_t memory = kvd_host_memory(&of);
    if (c->tier_host > memory)
        kvd_config_problem(l, kvd_config_place(l, "tier-host"),
                           "tier-host: %s are more than %s, %s",
                           kvd_format_size(c->tier_host, wanted, sizeof(wanted)), of,
                           kvd_format_size(memory, have, sizeof(have)));
    if (c->tier_directory[0])
        check_directory(l);
    if (c->tier_redis[0])
        check_redis(l);
    if (c->tier_redis_auth[0] && !c->tier_redis[0])
        kvd_config_problem(l, kvd_config_place(l, "tier-redis-auth"),
                           "tier-redis-auth: it goes with tier-redis, which is not set");
    check_secret(l, "tier-redis-auth", c->tier_redis_auth, 1);
    check_secret(l, "tier-secret", c->tier_secret, KVD_TIER_SECRET_MIN);
}
