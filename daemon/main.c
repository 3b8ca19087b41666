// kvd's command line.
#include <argp.h>
#include <sysexits.h>

#include "daemon/kvd.h"

enum { OPT_CHECK = 1000, OPT_FIRST };

// Options that are configuration keys; the rest of the configuration is for the file.
static const char *const overrides[] = {
    "backend", "device",    "pool-size", "extent-size", "listen",       "metrics",      "store",
    "cache",   "log-level", "threads",   "isa",         "socket-group", "drain-timeout"};

static const struct argp_option options[] = {
    {"config", 'c', "FILE", 0, "Read this file (default: built-in settings)", 0},
    {"check-config", OPT_CHECK, 0, 0, "Check the configuration, say what is wrong, and exit", 0},
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
    {"isa", OPT_FIRST + 10, "NAME", 0, "scalar, avx2 or avx512 (default: the best there is)", 1},
    {"socket-group", OPT_FIRST + 11, "GROUP", 0, "Group that may use the socket (mode 0660)", 1},
    {"drain-timeout", OPT_FIRST + 12, "TIME", 0,
     "How long SIGTERM waits for workers (default: 10s)", 1},
    {0},
};

struct arguments {
    struct kvd_config *config;
    bool check;
    // Overrides wait until the file has been read.
    const char *keys[64], *values[64];
    uint32_t n;
    const char *file;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct arguments *a = state->input;
    if (key == 'c') {
        a->file = arg;
    } else if (key == OPT_CHECK) {
        a->check = true;
    } else if (key >= OPT_FIRST && key < OPT_FIRST + (int)KVD_LEN(overrides)) {
        if (a->n == KVD_LEN(a->keys))
            argp_error(state, "too many options");
        a->keys[a->n] = overrides[key - OPT_FIRST];
        a->values[a->n++] = arg;
    } else if (key == ARGP_KEY_ARG) {
        argp_error(state, "'%s' is not an option; see --help", arg);
    } else {
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static int load(struct arguments *a, struct kvd_error *err)
{
    struct kvd_config *c = a->config;
    kvd_config_defaults(c);
    int rc = a->file ? kvd_config_read(c, a->file, err) : KVD_OK;
    bool listens = false;
    for (uint32_t i = 0; i < a->n && rc == KVD_OK; i++) {
        if (strcmp(a->keys[i], "listen") == 0 && !listens) {
            listens = true;
            c->n_listen = 0; // the command line replaces the file's
        }
        rc = kvd_config_set(c, a->keys[i], a->values[i], err);
    }
    if (rc == KVD_OK) {
        rc = kvd_config_finish(c, err);
        if (rc && a->file)
            kvd_fail_in(err, "%s", a->file);
    }
    return rc;
}

int main(int argc, char **argv)
{
    static struct kvd_daemon daemon;
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "The shared KV-cache memory daemon for LLM inference.\v"
                                            "SIGTERM drains and stops, SIGHUP reloads the "
                                            "configuration file. See kvd(8) and kvd.conf(5)."};
    argp_program_version = "kvd " KVD_VERSION;
    struct arguments a = {.config = &daemon.config};
    struct kvd_error err = {0};
    if (argp_parse(&argp, argc, argv, 0, NULL, &a))
        return EX_USAGE;
    if (load(&a, &err)) {
        fprintf(stderr, "kvd: %s\n", err.text);
        return EX_CONFIG;
    }
    if (a.check) {
        printf("%s: the configuration is good\n", a.file ? a.file : "built-in settings");
        return EX_OK;
    }
    kvd_log_set_level(daemon.config.log_level);
    if (kvd_daemon_init(&daemon, &err)) {
        kvd_error("cannot start: %s", err.text);
        kvd_daemon_deinit(&daemon);
        return EX_UNAVAILABLE;
    }
    kvd_daemon_run(&daemon);
    kvd_daemon_deinit(&daemon);
    kvd_notice("stopped");
    return daemon.exit_code;
}
