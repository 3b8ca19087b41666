// kvd's command line.
#include <argp.h>
#include <sysexits.h>

#include "daemon/core/daemon.h"
#include "daemon/core/keep.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/process.h"
#include "daemon/parts.h"
#include "daemon/service/methods.h"

enum { OPT_CHECK = 1000, OPT_PRINT, OPT_INSTANCE, OPT_FIRST };

// Options that are configuration keys; the rest of the configuration is for the file.
static const char *const overrides[] = {
    "backend", "device",    "pool-size", "extent-size", "listen",       "metrics",       "store",
    "cache",   "log-level", "threads",   "isa",         "socket-group", "drain-timeout", "keep"};

static const struct argp_option options[] = {
    {"config", 'c', "FILE", 0,
     "Read this file (default: built-in settings); may be repeated, later ones win", 0},
    {"instance", OPT_INSTANCE, "NAME", 0,
     "One daemon of several: read FILE-NAME.conf over FILE.conf, and by default take the device, "
     "socket and metrics port of that number",
     0},
    {"check-config", OPT_CHECK, 0, 0, "Check the configuration, say all that is wrong, and exit",
     0},
    {"print-config", OPT_PRINT, 0, 0,
     "Print all keys with their values, as files and command line have them, and exit", 0},
    {"backend", OPT_FIRST + 0, "auto|cpu|cuda", 0,
     "Where pages live and kernels run (default: auto)", 1},
    {"device", OPT_FIRST + 1, "N", 0, "CUDA device (default: 0)", 1},
    {"pool-size", OPT_FIRST + 2, "SIZE", 0, "KV memory, such as 1GiB (the default) or 62GiB", 1},
    {"extent-size", OPT_FIRST + 3, "SIZE", 0, "Unit in which memory moves between namespaces", 1},
    {"listen", OPT_FIRST + 4, "ADDRESS", 0,
     "unix:PATH or HOST:PORT; may be repeated (default: unix:/run/kvd/kvd.sock). TCP beyond "
     "loopback wants [tls]",
     1},
    {"metrics", OPT_FIRST + 5, "HOST:PORT", 0,
     "Where to serve /metrics (default: 127.0.0.1:9464; '' for nowhere)", 1},
    {"store", OPT_FIRST + 6, "URL", 0, "Calibration store: a directory, file:// or http(s)://", 1},
    {"cache", OPT_FIRST + 7, "DIR", 0, "Cache of rotation sets", 1},
    {"log-level", OPT_FIRST + 8, "LEVEL", 0,
     "error, warning, notice, info or debug (default: info)", 1},
    {"threads", OPT_FIRST + 9, "N", 0, "Threads of the CPU backend (default: one per CPU)", 1},
    {"isa", OPT_FIRST + 10, "NAME", 0,
     "scalar, avx2, avx512, vnni or amx (default: the best there is)", 1},
    {"socket-group", OPT_FIRST + 11, "GROUP", 0, "Group that may use the socket (mode 0660)", 1},
    {"drain-timeout", OPT_FIRST + 12, "TIME", 0,
     "How long SIGTERM waits for workers (default: 10s)", 1},
    {"keep", OPT_FIRST + 13, "yes|fresh|no", OPTION_ARG_OPTIONAL,
     "What is published outlives kvd: systemd holds it, or kvd-keeper. fresh drops what is held "
     "(default: no; without a value: yes)",
     1},
    {0},
};

struct arguments {
    struct kvd_config_source source;
    bool check, print;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct arguments *a = state->input;
    struct kvd_config_source *s = &a->source;
    if (key == 'c') {
        if (s->n_files == KVD_LEN(s->files))
            argp_error(state, "at most %zu files", KVD_LEN(s->files));
        s->files[s->n_files++] = arg;
    } else if (key == OPT_INSTANCE) {
        s->instance = arg;
    } else if (key == OPT_CHECK) {
        a->check = true;
    } else if (key == OPT_PRINT) {
        a->print = true;
    } else if (key >= OPT_FIRST && key < OPT_FIRST + (int)KVD_LEN(overrides)) {
        if (s->n_options == KVD_LEN(s->options))
            argp_error(state, "too many options");
        s->options[s->n_options].key = overrides[key - OPT_FIRST];
        s->options[s->n_options++].value = arg ? arg : "yes";
    } else if (key == ARGP_KEY_ARG) {
        argp_error(state, "'%s' is not an option; see --help", arg);
    } else {
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static int load(const struct kvd_config_source *source, struct kvd_config *config)
{
    struct kvd_lines problems = {0};
    int rc = kvd_config_load(source, config, &problems);
    for (uint32_t i = 0; i < problems.n; i++)
        fprintf(stderr, "kvd: %s\n", problems.line[i]);
    kvd_lines_free(&problems);
    return rc;
}

static void print_section(const struct kvd_config *c, const char *section,
                          const struct kvd_config_namespace *ns)
{
    const struct kvd_config_key *k;
    char value[2400];
    printf("%s[%s%s%s]\n", strcmp(section, "kvd") == 0 ? "" : "\n", section, ns ? " " : "",
           ns ? ns->name : "");
    for (uint32_t i = 0; (k = kvd_config_key(i)); i++) {
        if (strcmp(k->section, section) != 0)
            continue;
        bool there = kvd_config_value(c, ns, i, value, sizeof(value));
        if (strcmp(k->name, "listen") == 0)
            for (uint32_t j = 0; j < c->n_listen; j++)
                printf("listen = %s\n", c->listen[j]);
        else
            printf("%s%s =%s%s\n", there ? "" : "# ", k->name, *value ? " " : "", value);
    }
}

// A file that says the same.
static void print_config(const struct kvd_config *c)
{
    print_section(c, "kvd", NULL);
    if (c->tls_cert[0])
        print_section(c, "tls", NULL);
    for (uint32_t i = 0; i < c->n_namespaces; i++)
        print_section(c, "namespace", &c->namespaces[i]);
}

int main(int argc, char **argv)
{
    static struct kvd_daemon daemon;
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "The shared KV-cache memory daemon for LLM inference.\v"
                                            "SIGTERM drains and stops, SIGHUP reloads the "
                                            "configuration. See kvd(8) and kvd.conf(5)."};
    static char version[96];
    snprintf(version, sizeof(version), "kvd %s", kvd_build_version());
    argp_program_version = version;
    struct arguments a = {.check = false};
    struct kvd_error err = {0};
    if (argp_parse(&argp, argc, argv, 0, NULL, &a))
        return EX_USAGE;
    if (load(&a.source, &daemon.configured))
        return EX_CONFIG;
    if (a.print) {
        print_config(&daemon.configured);
        return EX_OK;
    }
    if (a.check) {
        printf("%s: the configuration is good\n",
               a.source.n_files ? a.source.files[a.source.n_files - 1] : "built-in settings");
        return EX_OK;
    }
    daemon.parts = kvd_parts;
    daemon.methods = kvd_methods;
    daemon.n_methods = kvd_n_methods;
    daemon.source = &a.source;
    daemon.config = daemon.configured;
    kvd_log_set_level(daemon.config.log_level);
    if (strcmp(daemon.config.keep, "no") != 0 && !kvd_keep_possible()) {
        kvd_keep_exec(argv);
        return EX_OSERR;
    }
    if (kvd_process_prepare(&err)) {
        kvd_error("cannot start: %s", err.text);
        return EX_OSERR;
    }
    if (kvd_daemon_init(&daemon, &err)) {
        kvd_error("cannot start: %s", err.text);
        if (err.code == KVD_E_LOST) // gRPC does not come to an end without its threads
            _exit(EX_OSERR);
        kvd_daemon_deinit(&daemon);
        return EX_UNAVAILABLE;
    }
    kvd_daemon_run(&daemon);
    kvd_daemon_deinit(&daemon);
    kvd_notice("stopped");
    return daemon.exit_code;
}
