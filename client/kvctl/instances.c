// Which daemon a command is for: one that is named, or the only one.
#include "client/lib/instances.h"
#include "client/kvctl/kvctl.h"

enum { PATH_BYTES = 4096 };

static int several(const struct kvd_instances *all, struct kvd_error *err)
{
    char list[400];
    size_t at = 0;
    for (unsigned i = 0; i < all->n && at + 1 < sizeof(list); i++)
        at += (size_t)snprintf(list + at, sizeof(list) - at, "%s%s%s%s%s", i ? ", " : " ",
                               all->address[i], *all->name[i] ? " (--instance " : "", all->name[i],
                               *all->name[i] ? ")" : "");
    kvd_fail(err, KVD_E_INVALID,
             "there are %u daemons; say which with --instance or --address (or --all, for "
             "each):%s",
             all->n, list);
    return EXIT_USED_WRONG;
}

// The address, not yet checked.
static int find(struct kvctl *k, struct kvd_error *err)
{
    static char address[PATH_BYTES];
    struct kvd_instances all = {0};
    const char *env = getenv("KVD_ADDRESS");
    if (k->address && !k->instance)
        return EXIT_OK;
    if (k->address) {
        kvd_fail(err, KVD_E_INVALID, "--address and --instance do not go together");
        return EXIT_USED_WRONG;
    }
    if (k->instance) {
        snprintf(address, sizeof(address), "unix:%s/%s/kvd.sock", kvd_runtime_folder(),
                 k->instance);
        k->instance = NULL;
    } else if (env && *env) {
        snprintf(address, sizeof(address), "%s", env);
    } else {
        kvd_instances_find(&all);
        if (all.n > 1) {
            int code = several(&all, err);
            kvd_instances_free(&all);
            return code;
        }
        if (all.n == 0) {
            kvd_fail(err, KVD_E_UNAVAILABLE,
                     "no kvd listens under %s; is it running? --address says where to look",
                     kvd_runtime_folder());
            return EXIT_UNREACHABLE;
        }
        snprintf(address, sizeof(address), "%s", all.address[0]);
        kvd_instances_free(&all);
    }
    k->address = address;
    return EXIT_OK;
}

int kvctl_find(struct kvctl *k, struct kvd_error *err)
{
    int code = find(k, err);
    if (code)
        return code;
    const struct kvd_channel_options o = kvctl_channel_options(k);
    bool good = kvd_address_check(o.address, err) == KVD_OK && kvd_channel_check(&o, err) == KVD_OK;
    return good ? EXIT_OK : EXIT_USED_WRONG;
}

int kvctl_everywhere(struct kvctl *k)
{
    struct kvd_instances all = {0};
    int worst = EXIT_OK;
    if (k->address || k->instance)
        return kvctl_usage("--all does not go with --address or --instance");
    kvd_instances_find(&all);
    if (all.n == 0) {
        fprintf(stderr, "kvctl: no kvd listens under %s\n", kvd_runtime_folder());
        return EXIT_UNREACHABLE;
    }
    int answer = k->command->all_asks ? kvctl_confirm(k, "%s", k->command->all_asks) : EXIT_OK;
    if (answer) {
        kvd_instances_free(&all);
        return answer;
    }
    json_t *collected = k->json ? json_array() : NULL;
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
            json_array_append_new(collected, json_pack("{s:s, s:s, s:O?}", "instance", all.name[i],
                                                       "address", k->address, "reply", reply));
            json_decref(k->collected);
            k->collected = NULL;
        }
        kvctl_hang_up(k);
    }
    if (k->json)
        kvctl_print(k, collected);
    kvd_instances_free(&all);
    return worst;
}
