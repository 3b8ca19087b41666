// Which daemon: systemd's units listen on /run/kvd/INSTANCE/kvd.sock, a kvd without a configuration
// on /run/kvd/kvd.sock. $KVD_RUNTIME_DIR stands for /run/kvd.
#include <errno.h>
#include <glob.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "client/kvctl/kvctl.h"

enum { MAX_INSTANCES = 256, PATH_BYTES = 4096 };

struct instances {
    char *name[MAX_INSTANCES];    // "" for /run/kvd/kvd.sock
    char *address[MAX_INSTANCES]; // "unix:..."
    unsigned n;
};

static const char *runtime_folder(void)
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

static void add(struct instances *all, const char *path, const char *name, size_t len)
{
    if (all->n == MAX_INSTANCES || !listens(path))
        return;
    all->name[all->n] = strndup(name, len);
    if (asprintf(&all->address[all->n], "unix:%s", path) >= 0 && all->name[all->n])
        all->n++;
}

static void find_all(struct instances *all)
{
    char pattern[PATH_BYTES];
    glob_t found = {0};
    snprintf(pattern, sizeof(pattern), "%s/kvd.sock", runtime_folder());
    add(all, pattern, "", 0);
    snprintf(pattern, sizeof(pattern), "%s/*/kvd.sock", runtime_folder());
    if (glob(pattern, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++) {
            const char *name = found.gl_pathv[i] + strlen(runtime_folder()) + 1;
            add(all, found.gl_pathv[i], name, strcspn(name, "/"));
        }
    globfree(&found);
}

static void free_all(struct instances *all)
{
    for (unsigned i = 0; i < all->n; i++) {
        free(all->name[i]);
        free(all->address[i]);
    }
}

static int several(const struct instances *all, struct kvd_error *err)
{
    char list[400];
    size_t at = 0;
    for (unsigned i = 0; i < all->n && at + 1 < sizeof(list); i++)
        at += (size_t)snprintf(list + at, sizeof(list) - at, "\n  %s%s%s", all->address[i],
                               *all->name[i] ? "   --instance " : "", all->name[i]);
    kvd_fail(err, KVD_E_INVALID,
             "there are %u daemons; say which with --instance or --address (or --all, to look at "
             "each):%s",
             all->n, list);
    return EXIT_USED_WRONG;
}

int kvctl_find(struct kvctl *k, struct kvd_error *err)
{
    static char address[PATH_BYTES];
    struct instances all = {0};
    const char *env = getenv("KVD_ADDRESS");
    if (k->address && !k->instance)
        return EXIT_OK;
    if (k->address) {
        kvd_fail(err, KVD_E_INVALID, "--address and --instance do not go together");
        return EXIT_USED_WRONG;
    }
    if (k->instance) {
        snprintf(address, sizeof(address), "unix:%s/%s/kvd.sock", runtime_folder(), k->instance);
        k->instance = NULL;
    } else if (env && *env) {
        snprintf(address, sizeof(address), "%s", env);
    } else {
        find_all(&all);
        if (all.n > 1) {
            int code = several(&all, err);
            free_all(&all);
            return code;
        }
        if (all.n == 0) {
            kvd_fail(err, KVD_E_UNAVAILABLE,
                     "no kvd listens under %s; is it running? --address says where to look",
                     runtime_folder());
            return EXIT_UNREACHABLE;
        }
        snprintf(address, sizeof(address), "%s", all.address[0]);
        free_all(&all);
    }
    k->address = address;
    return EXIT_OK;
}

int kvctl_everywhere(struct kvctl *k)
{
    struct instances all = {0};
    int worst = EXIT_OK;
    if (k->address || k->instance)
        return kvctl_usage("--all does not go with --address or --instance");
    find_all(&all);
    if (all.n == 0) {
        fprintf(stderr, "kvctl: no kvd listens under %s\n", runtime_folder());
        return EXIT_UNREACHABLE;
    }
    json_t *collected = k->json ? json_object() : NULL;
    for (unsigned i = 0; i < all.n; i++) {
        const char *name = *all.name[i] ? all.name[i] : "default";
        k->address = all.address[i];
        k->collected = NULL;
        if (!k->json)
            printf("%s== %s: %s\n", i ? "\n" : "", name, k->address);
        k->collected = k->json ? json_object() : NULL;
        int code = k->command->run(k);
        worst = KVD_MAX(worst, code);
        if (k->json) {
            json_t *reply = json_object_get(k->collected, "reply");
            json_object_set_new(collected, name, reply ? json_incref(reply) : json_null());
            json_decref(k->collected);
            k->collected = NULL;
        }
        kvctl_hang_up(k);
    }
    if (k->json)
        kvctl_print(k, collected);
    free_all(&all);
    return worst;
}
