#include <argp.h>
#include <stdarg.h>

#include "client/kvctl/kvctl.h"
#include "proto/kvd_limits.h"

static const struct command commands[] = {
    {"status", "", "State of the daemon", cmd_status},
    {"workers", "", "Open sessions and what they hold", cmd_workers},
    {"sequences", "[NAMESPACE]", "Sequences, with lengths and sizes", cmd_sequences},
    {"pool", "", "KV memory by namespace and kind", cmd_pool},
    {"metrics", "", "All metrics, in Prometheus text format", cmd_metrics},
    {"top", "[SECONDS [COUNT]]", "Live view, until interrupted", cmd_top},
    {"ping", "[COUNT]", "Round-trip time of a call", cmd_ping},
    {"quota", "ls | set NS SIZE|none", "Quotas of namespaces", cmd_quota},
    {"evict", "[OPTION...]", "Evict published, unused sequences", cmd_evict},
    {"drain", "[SECONDS]", "Let sessions end, then stop the daemon", cmd_drain},
    {"log-level", "LEVEL", "error, warning, notice, info or debug", cmd_log_level},
    {"calib", "VERB ...", "Rotation sets; see below", cmd_calib},
    {"doctor", "", "What this host gives kvd and workers, and what is missing", cmd_doctor},
    {"version", "", "Versions of kvctl and the daemon", cmd_version},
};

enum {
    OPT_TLS_CA = 1000,
    OPT_TLS_CERT,
    OPT_TLS_KEY,
    OPT_STORE,
    OPT_CACHE,
    OPT_SIGN,
    OPT_PUBLIC_KEY
};

static const struct argp_option options[] = {
    {"address", 'a', "ADDRESS", 0,
     "unix:PATH or HOST:PORT (default: $KVD_ADDRESS or unix:/run/kvd/kvd.sock)", 0},
    {"json", 'j', 0, 0, "Print JSON, for scripts", 0},
    {"timeout", 't', "SECONDS", 0, "Give up after this long (default: 10)", 0},
    {"tls-ca", OPT_TLS_CA, "FILE", 0, "Certificate authority of the server: use TLS", 1},
    {"tls-cert", OPT_TLS_CERT, "FILE", 0, "Client certificate, for mTLS", 1},
    {"tls-key", OPT_TLS_KEY, "FILE", 0, "Its key", 1},
    {"store", OPT_STORE, "URL", 0, "calib: use this store, without a daemon", 2},
    {"cache", OPT_CACHE, "DIR", 0, "calib: use this cache, without a daemon", 2},
    {"sign", OPT_SIGN, "FILE", 0, "calib: sign what is published with this Ed25519 private key", 2},
    {"public-key", OPT_PUBLIC_KEY, "FILE", 0, "calib: take only sets signed with this key", 2},
    {0},
};

struct arguments {
    struct kvctl k;
    int first; // of the command
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct arguments *a = state->input;
    char *end;
    switch (key) {
    case 'a':
        a->k.address = arg;
        break;
    case 'j':
        a->k.json = true;
        break;
    case 't': {
        double s = strtod(arg, &end);
        if (*end || !(s > 0 && s < 1e6))
            argp_error(state, "--timeout %s: it wants seconds", arg);
        a->k.timeout_ms = (uint32_t)(s * 1000);
        break;
    }
    case OPT_TLS_CA:
        a->k.tls_ca = arg;
        break;
    case OPT_TLS_CERT:
        a->k.tls_cert = arg;
        break;
    case OPT_TLS_KEY:
        a->k.tls_key = arg;
        break;
    case OPT_STORE:
        a->k.store = arg;
        break;
    case OPT_CACHE:
        a->k.cache = arg;
        break;
    case OPT_SIGN:
        a->k.sign = arg;
        break;
    case OPT_PUBLIC_KEY:
        a->k.public_key = arg;
        break;
    case ARGP_KEY_ARG:
        a->first = state->next - 1;
        state->next = state->argc; // the rest is the command's
        break;
    case ARGP_KEY_NO_ARGS:
        argp_state_help(state, stderr, ARGP_HELP_STD_USAGE | ARGP_HELP_DOC);
        exit(EXIT_USED_WRONG);
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

// The list of commands goes into --help.
static char *help_text(int key, const char *text, void *input)
{
    (void)input;
    if (key != ARGP_KEY_HELP_POST_DOC)
        return (char *)text;
    char *out = NULL;
    size_t size;
    FILE *f = open_memstream(&out, &size);
    fprintf(f, "Commands:\n");
    for (size_t i = 0; i < KVD_LEN(commands); i++) {
        char head[128];
        snprintf(head, sizeof(head), "%s %s", commands[i].name, commands[i].arguments);
        fprintf(f, "  %-31s%s\n", head, commands[i].help);
    }
    fprintf(f, "\ncalib ls | show SET|FILE | verify SET|FILE | fetch SET\n"
               "calib import K.pt V.pt MODEL@TAG | hadamard MODEL@TAG LAYERS DIM\n"
               "calib fit DUMP OUT | eval DUMP SET... (see calib fit --help)\n"
               "calib publish FILE MODEL@TAG [REPORT.json] | pin SET | unpin SET | gc [--dry-run]\n"
               "evict --namespace NS --name NAME --bytes SIZE\n");
    fprintf(f, "\nExit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no daemon there,\n4 "
               "not allowed. See kvctl(1).");
    fclose(f);
    return out;
}

int kvctl_fail(const struct kvd_error *err)
{
    fprintf(stderr, "kvctl: %s\n", err->text);
    return err->code == KVD_E_UNAVAILABLE ? EXIT_UNREACHABLE
           : err->code == KVD_E_DENIED    ? EXIT_DENIED
                                          : EXIT_FAILED;
}

int kvctl_usage(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "kvctl: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "; see kvctl --help\n");
    va_end(ap);
    return EXIT_USED_WRONG;
}

struct kvd_channel *kvctl_channel(struct kvctl *k, struct kvd_error *err)
{
    if (!k->channel)
        k->channel = kvd_channel_new(
            &(struct kvd_channel_options){k->address, k->tls_ca, k->tls_cert, k->tls_key}, err);
    return k->channel;
}

int kvctl_call(struct kvctl *k, const char *method, const void *request,
               const ProtobufCMessageDescriptor *reply_type, void *reply)
{
    struct kvd_error err = {0};
    char path[128];
    snprintf(path, sizeof(path), "/kvd.v1.Admin/%s", method);
    struct kvd_channel *c = kvctl_channel(k, &err);
    if (!c || kvd_channel_call(c, path, request, reply_type, k->timeout_ms, reply, &err)) {
        if (err.code == KVD_E_UNAVAILABLE)
            kvd_fail_in(&err,
                        "no answer from %s (is kvd running there? --address says where to look)",
                        k->address);
        return kvctl_fail(&err);
    }
    return EXIT_OK;
}

int kvctl_operator_call(struct kvctl *k, const char *method, const void *request,
                        const ProtobufCMessageDescriptor *reply_type, void *reply)
{
    struct kvd_error err = {0};
    char ticket[33];
    if (k->sock < 0 && strncmp(k->address, "unix:", 5) == 0) {
        k->sock = kvd_fdsock_connect(k->address, ticket, &err);
        if (k->sock < 0)
            return kvctl_fail(&err);
        if (!kvctl_channel(k, &err))
            return kvctl_fail(&err);
        kvd_channel_set_ticket(k->channel, ticket);
    }
    return kvctl_call(k, method, request, reply_type, reply);
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc = "COMMAND [ARGUMENT...]",
        .doc = "Shows and steers kvd, the shared KV-cache memory daemon.\v ",
        .help_filter = help_text};
    const char *address = getenv("KVD_ADDRESS");
    argp_err_exit_status = EXIT_USED_WRONG;
    argp_program_version = "kvctl " KVD_VERSION;
    struct arguments a = {.k = {.address = address ? address : "unix:/run/kvd/kvd.sock",
                                .timeout_ms = 10000,
                                .sock = -1}};
    argp_parse(&argp, argc, argv, ARGP_IN_ORDER, NULL, &a);
    for (size_t i = 0; i < KVD_LEN(commands); i++) {
        if (strcmp(commands[i].name, argv[a.first]) != 0)
            continue;
        int code = commands[i].run(&a.k, argc - a.first, argv + a.first);
        kvd_channel_free(&a.k.channel);
        if (a.k.sock >= 0)
            close(a.k.sock);
        return code;
    }
    return kvctl_usage("unknown command '%s'", argv[a.first]);
}
