// Commands that change something: quota, evict, tier flush, verify, drain, reload, log-level.
#include "client/kvctl/kvctl.h"

#include <time.h>

int cmd_quota_ls(struct kvctl *k)
{
    Kvd__V1__ListNamespacesRequest req = KVD__V1__LIST_NAMESPACES_REQUEST__INIT;
    Kvd__V1__ListNamespacesReply *r = NULL;
    int code =
        kvctl_call(k, "ListNamespaces", &req, &kvd__v1__list_namespaces_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    struct table *t = table_new("NAMESPACE|>USED|>QUOTA|>PAGES|>SEQUENCES|>SESSIONS");
    for (size_t i = 0; i < r->n_namespaces; i++) {
        const Kvd__V1__NamespaceInfo *n = r->namespaces[i];
        table_cell(t, "%s", n->name);
        table_size(t, n->used_bytes);
        if (n->quota_bytes)
            table_size(t, n->quota_bytes);
        else
            table_cell(t, "none");
        table_cell(t, "%llu", (unsigned long long)n->pages);
        table_cell(t, "%llu", (unsigned long long)n->sequences);
        table_cell(t, "%u", n->sessions);
    }
    table_print(t, "no namespaces yet");
    kvd__v1__list_namespaces_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_quota_set(struct kvctl *k)
{
    Kvd__V1__SetQuotaRequest req = KVD__V1__SET_QUOTA_REQUEST__INIT;
    Kvd__V1__SetQuotaReply *r = NULL;
    const char *quota = k->arguments[1];
    req.namespace_name = (char *)k->arguments[0];
    if (strcmp(quota, "none") != 0 && kvd_parse_size(quota, &req.quota_bytes))
        return kvctl_usage("'%s' is no size", quota);
    req.create = kvctl_option(k, "create") != NULL;
    int code = kvctl_operator_call(k, "SetQuota", &req, &kvd__v1__set_quota_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    if (req.quota_bytes && r->used_bytes > req.quota_bytes)
        printf("set; the namespace uses more than that already and cannot grow until it shrinks\n");
    else
        printf("set\n");
    kvd__v1__set_quota_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_evict(struct kvctl *k)
{
    Kvd__V1__EvictRequest req = KVD__V1__EVICT_REQUEST__INIT;
    Kvd__V1__EvictReply *r = NULL;
    char size[32];
    const char *ns = kvctl_option(k, "namespace"), *name = kvctl_option(k, "name");
    const char *bytes = kvctl_option(k, "bytes");
    if (!ns == !k->all)
        return kvctl_usage("evict wants either --namespace NAMESPACE or --all");
    if (name && (!ns || bytes))
        return kvctl_usage("--name goes with --namespace alone: one sequence of it is evicted");
    if (bytes && kvd_parse_size(bytes, &req.bytes))
        return kvctl_usage("'%s' is no size", bytes);
    int answer =
        ns ? EXIT_OK
           : kvctl_confirm(k, "Evict %s%s that is published and not in use, of all namespaces?",
                           bytes ? bytes : "everything", bytes ? " of what there is" : "");
    if (answer)
        return answer;
    if (ns)
        req.namespace_name = (char *)ns;
    if (name)
        req.name = (char *)name;
    int code = kvctl_operator_call(k, "Evict", &req, &kvd__v1__evict_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf("evicted %u sequences, %llu blocks of prefixes, %s\n", r->sequences,
           (unsigned long long)r->blocks, kvd_format_size(r->bytes, size, sizeof(size)));
    kvd__v1__evict_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_tier_flush(struct kvctl *k)
{
    Kvd__V1__FlushTierRequest req = KVD__V1__FLUSH_TIER_REQUEST__INIT;
    Kvd__V1__FlushTierReply *r = NULL;
    req.name = (char *)k->arguments[0];
    int code =
        kvctl_operator_call(k, "FlushTier", &req, &kvd__v1__flush_tier_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf("flushed\n");
    kvd__v1__flush_tier_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

static void print_damage(const Kvd__V1__VerifyReply *r)
{
    struct table *t = table_new("NAMESPACE|>SEQUENCE|NAME|>PLANE|>BLOCK");
    for (size_t i = 0; i < r->n_found; i++) {
        table_cell(t, "%s", r->found[i]->namespace_name);
        table_cell(t, "%llu", (unsigned long long)r->found[i]->sequence);
        table_cell(t, "%s", *r->found[i]->name ? r->found[i]->name : "-");
        table_cell(t, "%u", r->found[i]->plane);
        table_cell(t, "%u", r->found[i]->block);
    }
    table_print(t, "");
}

// A pass begins, and is asked for until it has ended.
int cmd_verify(struct kvctl *k)
{
    Kvd__V1__VerifyRequest req = KVD__V1__VERIFY_REQUEST__INIT;
    Kvd__V1__VerifyReply *r = NULL;
    req.begin = true;
    int code = kvctl_operator_call(k, "Verify", &req, &kvd__v1__verify_reply__descriptor, &r);
    req.begin = false;
    while (code == EXIT_OK && r->running) {
        progress("verifying", r->checked, KVD_MAX(r->blocks, r->checked));
        kvd__v1__verify_reply__free_unpacked(r, NULL);
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
        code = kvctl_operator_call(k, "Verify", &req, &kvd__v1__verify_reply__descriptor, &r);
    }
    progress_end();
    if (code)
        return code;
    bool damaged = r->damaged != 0;
    if (k->json) {
        code = kvctl_print_json(k, &r->base);
        return damaged ? EXIT_FAILED : code;
    }
    if (damaged)
        print_damage(r);
    printf("verified; %llu damaged pages are in use\n", (unsigned long long)r->damaged);
    kvd__v1__verify_reply__free_unpacked(r, NULL);
    return damaged ? EXIT_FAILED : EXIT_OK;
}

int cmd_drain(struct kvctl *k)
{
    Kvd__V1__DrainRequest req = KVD__V1__DRAIN_REQUEST__INIT;
    Kvd__V1__DrainReply *r = NULL;
    if (k->n_arguments) // 0 stands for the configured time, so the least is a millisecond
        req.timeout_ms = KVD_MAX((uint32_t)(atof(k->arguments[0]) * 1000), 1u);
    int code = kvctl_operator_call(k, "Drain", &req, &kvd__v1__drain_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf("draining; %u sessions are open\n", r->sessions);
    kvd__v1__drain_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

static void print_lines(FILE *f, const char *what, size_t n, char **lines)
{
    for (size_t i = 0; i < n; i++)
        fprintf(f, "%s%s\n", what, lines[i]);
}

int cmd_reload(struct kvctl *k)
{
    Kvd__V1__ReloadRequest req = KVD__V1__RELOAD_REQUEST__INIT;
    Kvd__V1__ReloadReply *r = NULL;
    int code = kvctl_operator_call(k, "Reload", &req, &kvd__v1__reload_reply__descriptor, &r);
    if (code)
        return code;
    code = r->applied ? EXIT_OK : EXIT_FAILED;
    if (k->json) {
        kvctl_print_json(k, &r->base);
        return code;
    }
    print_lines(stderr, "kvctl: ", r->n_errors, r->errors);
    if (!r->applied)
        fprintf(stderr, "kvctl: the old configuration stays\n");
    print_lines(stdout, "changed: ", r->n_changed, r->changed);
    print_lines(stdout, "wants a restart: ", r->n_restart, r->restart);
    print_lines(stdout, "kept: ", r->n_kept, r->kept);
    if (r->applied && !r->n_changed && !r->n_restart && !r->n_kept)
        printf("nothing has changed%s\n",
               r->n_files ? "" : ": kvd was started without --config, and has no file to read");
    kvd__v1__reload_reply__free_unpacked(r, NULL);
    return code;
}

int cmd_log_level(struct kvctl *k)
{
    Kvd__V1__SetLogLevelRequest req = KVD__V1__SET_LOG_LEVEL_REQUEST__INIT;
    Kvd__V1__SetLogLevelReply *r = NULL;
    req.level = (char *)k->arguments[0];
    int code =
        kvctl_operator_call(k, "SetLogLevel", &req, &kvd__v1__set_log_level_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf("%s (was %s)\n", req.level, r->previous);
    kvd__v1__set_log_level_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}
