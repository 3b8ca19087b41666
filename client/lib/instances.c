#include "client/lib/instances.h"

#include <errno.h>
#include <glob.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "client/lib/kept.h"
#include "proto/fdsock.h"
#include "proto/kvd_limits.h"

enum { PATH_BYTES = 4096 };

const char *kvd_runtime_folder(void)
{
    const char *folder = getenv("KVD_RUNTIME_DIR");
    return folder && *folder ? folder : "/run/kvd";
}

// Whether somebody listens there; who may connect is another matter.
static bool listens(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int sock KVD_CLOSE = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (sock < 0 || strlen(path) >= sizeof(addr.sun_path))
        return false;
    memcpy(addr.sun_path, path, strlen(path) + 1);
    return connect(sock, (struct sockaddr *)&addr, sizeof(addr)) == 0 ||
           (errno != ECONNREFUSED && errno != ENOENT && errno != ENOTSOCK);
}

// Its mark and its socket may both be there.
static bool known(const struct kvd_instances *all, const char *path)
{
    for (unsigned i = 0; i < all->n; i++)
        if (strcmp(all->address[i] + strlen("unix:"), path) == 0)
            return true;
    return false;
}

// `kept`: those too that are being started again.
static void add(struct kvd_instances *all, const char *path, const char *name, size_t len,
                bool kept)
{
    if (all->n == KVD_MAX_INSTANCES || known(all, path) ||
        !(listens(path) || (kept && kvd_kept(path))))
        return;
    char *copy = strndup(name, len), *address;
    if (copy && asprintf(&address, "unix:%s", path) >= 0) {
        all->name[all->n] = copy;
        all->address[all->n++] = address;
    } else {
        free(copy);
    }
}

// Of one whose file is not there, as it is being started again, there is the mark.
static void find(struct kvd_instances *all, bool kept)
{
    char pattern[PATH_BYTES];
    glob_t found = {0};
    *all = (struct kvd_instances){0};
    snprintf(pattern, sizeof(pattern), "%s/kvd.sock", kvd_runtime_folder());
    add(all, pattern, "", 0, kept);
    snprintf(pattern, sizeof(pattern), "%s/*/kvd.sock%s", kvd_runtime_folder(),
             kept ? "{," KVD_KEPT_SUFFIX "}" : "");
    if (glob(pattern, kept ? GLOB_BRACE : 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++) {
            char *path = found.gl_pathv[i];
            const char *name = path + strlen(kvd_runtime_folder()) + 1;
            const size_t bare = strlen(path) - strlen(KVD_KEPT_SUFFIX);
            if (strcmp(path + bare, KVD_KEPT_SUFFIX) == 0)
                path[bare] = '\0';
            add(all, path, name, strcspn(name, "/"), kept);
        }
    globfree(&found);
}

void kvd_instances_find(struct kvd_instances *all)
{
    find(all, false);
}

void kvd_instances_free(struct kvd_instances *all)
{
    for (unsigned i = 0; i < all->n; i++) {
        free(all->name[i]);
        free(all->address[i]);
    }
    all->n = 0;
}

static char *several(const struct kvd_instances *all, struct kvd_error *err)
{
    char list[300];
    size_t at = 0;
    list[0] = '\0';
    for (unsigned i = 0; i < all->n && at < sizeof(list); i++)
        at +=
            (size_t)snprintf(list + at, sizeof(list) - at, "%s%s", i ? ", " : "", all->address[i]);
    kvd_fail(err, KVD_E_INVALID, "there are %u daemons; say which by address or $KVD_ADDRESS: %s",
             all->n, list);
    return NULL;
}

char *kvd_instances_default(struct kvd_error *err)
{
    const char *env = getenv("KVD_ADDRESS");
    char *address = NULL;
    struct kvd_instances all = {0};
    if (!env || !*env)
        find(&all, true);
    if (all.n > 1)
        address = several(&all, err);
    else if (all.n == 1)
        address = strdup(all.address[0]);
    else if (env && *env)
        address = strdup(env);
    else
        kvd_fail(err, KVD_E_UNAVAILABLE,
                 "no kvd listens under %s; is it running? address or $KVD_ADDRESS says where to "
                 "look",
                 kvd_runtime_folder());
    if (!address && !err->code)
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    kvd_instances_free(&all);
    return address;
}

int kvd_address_check(const char *address, struct kvd_error *err)
{
    const char *port = strrchr(address, ':');
    char *end = NULL;
    if (!*address)
        return kvd_fail(err, KVD_E_INVALID, "address is empty; unix:PATH or HOST:PORT is wanted");
    if (strncmp(address, "unix:", 5) == 0 && strlen(address + 5) > KVD_MAX_SOCKET_PATH)
        return kvd_fail(err, KVD_E_INVALID,
                        "unix:/absolute/path (at most %d characters) or host:port is wanted, not "
                        "%s",
                        KVD_MAX_SOCKET_PATH, address);
    if (strncmp(address, "unix:", 5) == 0 && address[5])
        return KVD_OK;
    unsigned long number =
        port && port[1] >= '0' && port[1] <= '9' ? strtoul(port + 1, &end, 10) : 0;
    if (port && port > address && end && !*end && number && number <= UINT16_MAX)
        return KVD_OK;
    return kvd_fail(err, KVD_E_INVALID, "'%s' is no address: unix:PATH or HOST:PORT is wanted%s%s",
                    address, *address == '/' ? "; perhaps unix:" : "",
                    *address == '/' ? address : "");
}
