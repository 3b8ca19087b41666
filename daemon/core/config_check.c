// Checking the whole: what depends on several keys, and on what the host has.
#include <errno.h>
#include <grp.h>
#include <netdb.h>
#include <sys/stat.h>

#include "calib/sign.h"
#include "daemon/core/config_load.h"
#include "daemon/core/host.h"
#include "daemon/core/tls_context.h"
#include "kernels/backend.h"

static void check_backend(struct kvd_config_load *l)
{
    const struct kvd_config *c = l->c;
    struct kvd_error err = {0};
    struct kvd_place at = kvd_config_place(l, "backend");
    if (strcmp(c->backend, "auto") != 0 && strcmp(c->backend, "cpu") != 0 &&
        strcmp(c->backend, "cuda") != 0)
        kvd_config_problem(l, at, "backend: '%s' is not possible; it wants auto, cpu or cuda",
                           c->backend);
#ifndef KVD_CUDA
    if (strcmp(c->backend, "cuda") == 0)
        kvd_config_problem(l, at,
                           "backend: cuda is not possible: this kvd was built without CUDA "
                           "(backend cpu needs no GPU)");
#endif
    if (strcmp(c->keep, "no") != 0 && strcmp(c->keep, "yes") != 0 && strcmp(c->keep, "fresh") != 0)
        kvd_config_problem(l, kvd_config_place(l, "keep"),
                           "keep: '%s' is not possible; it wants no, yes or fresh", c->keep);
    if (c->isa[0] && kvd_cpu_isa_check(c->isa, &err))
        kvd_config_problem(l, kvd_config_place(l, "isa"), "isa: %s", err.text);
}

// Pages of the CPU backend are in the host's memory.
static bool pages_in_memory(const struct kvd_config *c)
{
#ifdef KVD_CUDA
    if (strcmp(c->backend, "auto") == 0)
        return kvd_cuda_present(NULL) != KVD_OK;
    return strcmp(c->backend, "cpu") == 0;
#else
    return true;
#endif
}

static void check_memory(struct kvd_config_load *l)
{
    const char *of;
    char wanted[32], have[32];
    uint64_t memory = kvd_host_memory(&of);
    if (pages_in_memory(l->c) && l->c->pool_size > memory && !l->c->overcommit_memory)
        kvd_config_problem(l, kvd_config_place(l, "pool-size"),
                           "pool-size: %s are more than %s, %s; with overcommit-memory = yes the "
                           "pool may be larger, and must never be full",
                           kvd_format_size(l->c->pool_size, wanted, sizeof(wanted)), of,
                           kvd_format_size(memory, have, sizeof(have)));
}

static void check_sizes(struct kvd_config_load *l)
{
    char wanted[32], have[32];
    struct kvd_config *c = l->c;
    if (c->extent_size == 0) {
        // At least 32 extents, so that several namespaces and layouts fit; at most 256 MiB each.
        c->extent_size = 256ull << 20;
        while (c->extent_size > 2 << 20 && c->pool_size / c->extent_size < 32)
            c->extent_size /= 2;
    }
    if (c->extent_size % (2 << 20) || c->extent_size > c->pool_size)
        kvd_config_problem(
            l, kvd_config_place(l, "extent-size"),
            "extent-size: %s is not possible; it must be a multiple of 2 MiB and at most pool-size",
            kvd_format_size(c->extent_size, wanted, sizeof(wanted)));
    bool alone = c->free_low && !c->free_high;
    if (alone)
        c->free_high = KVD_MIN(2 * c->free_low, c->pool_size / 2);
    if (alone && c->free_low > c->free_high)
        kvd_config_problem(l, kvd_config_place(l, "free-low"),
                           "free-low: %s is more than half of pool-size, %s",
                           kvd_format_size(c->free_low, wanted, sizeof(wanted)),
                           kvd_format_size(c->pool_size, have, sizeof(have)));
    else if (c->free_high > c->pool_size / 2 || c->free_low > c->free_high ||
             (c->free_high && !c->free_low))
        kvd_config_problem(l, kvd_config_place(l, c->free_low ? "free-low" : "free-high"),
                           "free-low and free-high: %s and %s are not possible; free-low goes with "
                           "free-high, is at "
                           "most that, and free-high is at most half of pool-size",
                           kvd_format_size(c->free_low, wanted, sizeof(wanted)),
                           kvd_format_size(c->free_high, have, sizeof(have)));
    for (uint32_t i = 0; i < c->n_namespaces; i++) {
        if (c->namespaces[i].borrow && !c->namespaces[i].quota)
            kvd_config_problem(l, kvd_config_namespace_place(l, i, "borrow"),
                               "borrow: the namespace %s has no quota that it could exceed; set "
                               "quota",
                               c->namespaces[i].name);
        if (c->namespaces[i].quota > c->pool_size)
            kvd_config_problem(l, kvd_config_namespace_place(l, i, "quota"),
                               "quota: %s for the namespace %s are more than pool-size, %s",
                               kvd_format_size(c->namespaces[i].quota, wanted, sizeof(wanted)),
                               c->namespaces[i].name,
                               kvd_format_size(c->pool_size, have, sizeof(have)));
    }
}

// -- addresses ----------------------------------------------------------------------------------

static void check_host(struct kvd_config_load *l, struct kvd_place at, const char *key,
                       const char *host)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found = NULL;
    int rc = *host ? getaddrinfo(host, NULL, &hints, &found) : 0;
    if (rc == EAI_NONAME || rc == EAI_FAMILY)
        kvd_config_problem(l, at, "%s: '%s' is no host of this network: %s", key, host,
                           gai_strerror(rc));
    if (found)
        freeaddrinfo(found);
}

static void check_socket_path(struct kvd_config_load *l, struct kvd_place at, const char *path)
{
    struct stat st;
    int rc = lstat(path, &st);
    if (rc == 0 && !S_ISSOCK(st.st_mode))
        kvd_config_problem(l, at, "listen: %s exists and is not a socket; move it away", path);
    else if (rc && errno == ENOTDIR)
        kvd_config_problem(l, at, "listen: %s: a part of the path is not a folder", path);
}

static bool loopback(const char *listen)
{
    return strncmp(listen, "127.", 4) == 0 || strncmp(listen, "localhost:", 10) == 0 ||
           strncmp(listen, "[::1]:", 6) == 0;
}

static void check_listen(struct kvd_config_load *l)
{
    struct kvd_config *c = l->c;
    if (c->n_listen == 0) {
        c->n_listen = 1;
        if (!c->listen[0][0])
            snprintf(c->listen[0], sizeof(c->listen[0]), "unix:/run/kvd/kvd.sock");
    }
    for (uint32_t i = 0; i < c->n_listen; i++) {
        const char *address = c->listen[i];
        struct kvd_place at = l->listen[i];
        char host[KVD_CONFIG_TEXT];
        uint32_t port;
        for (uint32_t j = 0; j < i; j++)
            if (strcmp(c->listen[j], address) == 0)
                kvd_config_problem(l, at, "listen: %s is listed twice", address);
        if (strncmp(address, "unix:", 5) == 0) {
            check_socket_path(l, at, address + 5);
            continue;
        }
        kvd_config_host_port(address, host, sizeof(host), &port);
        check_host(l, at, "listen", host);
        if (!loopback(address) && !c->tls_client_ca[0])
            kvd_config_problem(
                l, at,
                "listen: %s is reachable from other hosts; it wants [tls] cert, key and client-ca",
                address);
    }
    if (c->socket_group[0] && !getgrnam(c->socket_group))
        kvd_config_problem(l, kvd_config_place(l, "socket-group"),
                           "socket-group: there is no group '%s'", c->socket_group);
}

static void check_metrics(struct kvd_config_load *l)
{
    const struct kvd_config *c = l->c;
    struct kvd_place at = kvd_config_place(l, "metrics");
    char host[KVD_CONFIG_TEXT];
    uint32_t port;
    if (!c->metrics[0])
        return;
    if (kvd_config_host_port(c->metrics, host, sizeof(host), &port)) {
        kvd_config_problem(l, at,
                           "metrics: '%s' is not possible; it wants HOST:PORT with a port from 0 "
                           "to 65535, or nothing",
                           c->metrics);
        return;
    }
    if (!host[0]) {
        kvd_config_problem(l, at,
                           "metrics: '%s' has no host; say 127.0.0.1:%u, or 0.0.0.0:%u for all "
                           "addresses of this host",
                           c->metrics, port, port);
        return;
    }
    check_host(l, at, "metrics", host);
    for (uint32_t i = 0; port && i < c->n_listen; i++)
        if (strcmp(c->listen[i], c->metrics) == 0)
            kvd_config_problem(l, at, "metrics: %s is an address of listen already", c->metrics);
}

// -- files --------------------------------------------------------------------------------------

static void check_tls_file(struct kvd_config_load *l, const char *key,
                           const struct kvd_error *problem)
{
    if (problem->code)
        kvd_config_problem(l, kvd_config_place(l, key), "%s: %s", key, problem->text);
}

static void check_tls(struct kvd_config_load *l)
{
    const struct kvd_config *c = l->c;
    struct kvd_tls_problems problems;
    bool tls = c->tls_cert[0] || c->tls_key[0];
    if (c->tls_client_ca[0] && !tls)
        kvd_config_problem(l, kvd_config_place(l, "client-ca"),
                           "tls: client-ca wants cert and key too");
    if (tls && !c->tls_key[0])
        kvd_config_problem(l, kvd_config_place(l, "cert"), "tls: cert and key go together");
    if (tls && !c->tls_cert[0])
        kvd_config_problem(l, kvd_config_place(l, "key"), "tls: cert and key go together");
    if (!tls && !c->tls_client_ca[0])
        return;
    SSL_CTX_free(kvd_tls_context(c, &problems));
    check_tls_file(l, "client-ca", &problems.client_ca);
    check_tls_file(l, "cert", &problems.cert);
    check_tls_file(l, "key", &problems.key);
}

static void check_folder(struct kvd_config_load *l, const char *key, const char *path)
{
    struct stat st;
    if (stat(path, &st) == 0 ? !S_ISDIR(st.st_mode) : errno == ENOTDIR)
        kvd_config_problem(l, kvd_config_place(l, key), "%s: %s is not a folder", key, path);
}

static void check_store(struct kvd_config_load *l)
{
    struct kvd_config *c = l->c;
    struct kvd_error err = {0};
    bool http = strncmp(c->store, "http://", 7) == 0 || strncmp(c->store, "https://", 8) == 0;
    bool file = strncmp(c->store, "file://", 7) == 0;
    const char *scheme = strstr(c->store, "://");
    const char *folder = file ? c->store + 7 : c->store;
    if ((scheme && (!(http || file) || !scheme[3])) || (c->store[0] && !http && folder[0] != '/'))
        kvd_config_problem(l, kvd_config_place(l, "store"),
                           "store: '%s' is not possible; it wants /folder, file:///folder, "
                           "http://... or https://...",
                           c->store);
    else if (c->store[0] && !http)
        check_folder(l, "store", folder);
    if (c->store_public_key[0] && kvd_sign_check_key(c->store_public_key, &err))
        kvd_config_problem(l, kvd_config_place(l, "store-public-key"), "store-public-key: %s",
                           err.text);
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
    check_folder(l, "cache", c->cache);
}

void kvd_config_check(struct kvd_config_load *l)
{
    check_backend(l);
    check_memory(l);
    check_sizes(l);
    check_listen(l);
    check_metrics(l);
    check_tls(l);
    check_store(l);
    kvd_config_check_tiers(l);
}
