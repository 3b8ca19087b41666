// Commands that change something: quota, evict, drain, log-level.
#include <getopt.h>

#include "client/kvctl/kvctl.h"

static int quota_list(struct kvctl *k)
{
    Kvd__V1__ListNamespacesRequest req = KVD__V1__LIST_NAMESPACES_REQUEST__INIT;
    Kvd__V1__ListNamespacesReply *r = NULL;
    int code =
        kvctl_call(k, "ListNamespaces", &req, &kvd__v1__list_namespaces_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(&r->base);
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

int cmd_quota(struct kvctl *k, int argc, char **argv)
{
    if (argc == 1 || (argc == 2 && strcmp(argv[1], "ls") == 0))
        return quota_list(k);
    if (argc != 4 || strcmp(argv[1], "set") != 0)
        return kvctl_usage("it is: quota ls, or quota set NAMESPACE SIZE|none");
    Kvd__V1__SetQuotaRequest req = KVD__V1__SET_QUOTA_REQUEST__INIT;
    Kvd__V1__SetQuotaReply *r = NULL;
    req.namespace_name = argv[2];
    if (strcmp(argv[3], "none") != 0 &&
        (kvd_parse_size(argv[3], &req.quota_bytes) || req.quota_bytes == 0))
        return kvctl_usage("'%s' is no size; say 512MiB, 8GiB or none", argv[3]);
    int code = kvctl_operator_call(k, "SetQuota", &req, &kvd__v1__set_quota_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(&r->base);
    if (req.quota_bytes && r->used_bytes > req.quota_bytes)
        printf("set; the namespace uses more than that already and cannot grow until it shrinks\n");
    else
        printf("set\n");
    kvd__v1__set_quota_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_evict(struct kvctl *k, int argc, char **argv)
{
    static const struct option options[] = {{"namespace", required_argument, 0, 'n'},
                                            {"name", required_argument, 0, 'm'},
                                            {"bytes", required_argument, 0, 'b'},
                                            {0}};
    Kvd__V1__EvictRequest req = KVD__V1__EVICT_REQUEST__INIT;
    Kvd__V1__EvictReply *r = NULL;
    char size[32];
    optind = 0;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == 'n')
            req.namespace_name = optarg;
        else if (c == 'm')
            req.name = optarg;
        else if (c != 'b' || kvd_parse_size(optarg, &req.bytes))
            return kvctl_usage("evict takes --namespace NS, --name NAME and --bytes SIZE");
    }
    if (optind != argc)
        return kvctl_usage("evict takes --namespace NS, --name NAME and --bytes SIZE");
    int code = kvctl_operator_call(k, "Evict", &req, &kvd__v1__evict_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(&r->base);
    printf("evicted %u sequences, %s\n", r->sequences,
           kvd_format_size(r->bytes, size, sizeof(size)));
    kvd__v1__evict_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_drain(struct kvctl *k, int argc, char **argv)
{
    Kvd__V1__DrainRequest req = KVD__V1__DRAIN_REQUEST__INIT;
    Kvd__V1__DrainReply *r = NULL;
    double seconds = argc > 1 ? atof(argv[1]) : 0;
    if (argc > 2 || seconds < 0 || seconds > 3600)
        return kvctl_usage("drain takes a number of seconds up to 3600");
    req.timeout_ms = (uint32_t)(seconds * 1000);
    int code = kvctl_operator_call(k, "Drain", &req, &kvd__v1__drain_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(&r->base);
    printf("draining; %u sessions are open\n", r->sessions);
    kvd__v1__drain_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_log_level(struct kvctl *k, int argc, char **argv)
{
    Kvd__V1__SetLogLevelRequest req = KVD__V1__SET_LOG_LEVEL_REQUEST__INIT;
    Kvd__V1__SetLogLevelReply *r = NULL;
    if (argc != 2)
        return kvctl_usage("log-level takes one of error, warning, notice, info, debug");
    req.level = argv[1];
    int code =
        kvctl_operator_call(k, "SetLogLevel", &req, &kvd__v1__set_log_level_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(&r->base);
    printf("%s (was %s)\n", argv[1], r->previous);
    kvd__v1__set_log_level_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}
