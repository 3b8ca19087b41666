// Loading: defaults, files, the command line, and the check of the whole.
#include "daemon/core/config_load.h"

static void set_defaults(struct kvd_config *c)
{
    *c = (struct kvd_config){
        .backend = "auto",
        .pool_size = 1ull << 30,
        .memory_floor = 512ull << 20,
        .idle_memory_ms = 30000,
        .keep = "no",
        .resume_ms = 30000,
        .scrub_rate = 64ull << 20,
        .socket_mode = 0660,
        .metrics = "127.0.0.1:9464",
        .store_timeout_ms = 60000,
        .tier_ttl_ms = 86400000,
        .tier_timeout_ms = 1000,
        .tier_rate = 1ull << 30,
        .log_level = KVD_LOG_INFO,
        .drain_timeout_ms = 10000,
        .max_sessions = 4096,
        .max_sequences = 65536,
        .max_queue = 4096,
        .max_connections = 4096,
        .max_calls = 8192,
        .max_reply_bytes = 1ull << 30,
        .reply_timeout_ms = 30000,
        .max_buffer_bytes = 16ull << 30,
    };
}

static bool instance_valid(const char *name)
{
    size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-");
    return n && n <= KVD_MAX_INSTANCE && !name[n] && name[0] != '.' && name[0] != '-';
}

static void instance_defaults(struct kvd_config_load *l, const char *instance)
{
    uint64_t number;
    if (!instance_valid(instance)) {
        kvd_config_problem(l, (struct kvd_place){"--instance", 0},
                           "'%.64s' is not possible; it wants at most %d letters, digits, '_', '-' "
                           "and '.'",
                           instance, KVD_MAX_INSTANCE);
        return;
    }
    snprintf(l->c->listen[0], sizeof(l->c->listen[0]), "unix:/run/kvd/%s/kvd.sock", instance);
    if (kvd_config_parse_number(instance, &number) || number > 63)
        return;
    l->c->device = (uint32_t)number;
    snprintf(l->c->metrics, sizeof(l->c->metrics), "127.0.0.1:%u", 9464 + l->c->device);
}

// What the instance has over a file: "DIR/NAME-INSTANCE.conf" beside "DIR/NAME.conf".
static char *instance_file(const char *file, const char *instance)
{
    size_t n = strlen(file);
    char *path = NULL;
    if (n > 5 && strcmp(file + n - 5, ".conf") == 0)
        n -= 5;
    return asprintf(&path, "%.*s-%s%s", (int)n, file, instance, file + n) < 0 ? NULL : path;
}

int kvd_config_load(const struct kvd_config_source *source, struct kvd_config *out,
                    struct kvd_lines *problems)
{
    struct kvd_config_load *l KVD_FREE = calloc(1, sizeof(*l));
    char *beside[KVD_MAX_CONFIG_FILES] = {0};
    if (!l) {
        kvd_lines_add(problems, "out of memory");
        return KVD_E_INVALID;
    }
    l->c = out;
    l->problems = problems;
    set_defaults(out);
    if (source->instance)
        instance_defaults(l, source->instance);
    for (uint32_t i = 0; i < source->n_files; i++) {
        kvd_config_read(l, source->files[i], false);
        if (source->instance && instance_valid(source->instance))
            beside[i] = instance_file(source->files[i], source->instance);
        if (beside[i])
            kvd_config_read(l, beside[i], true);
    }
    l->at = (struct kvd_place){"command line", 0};
    for (uint32_t i = 0; i < source->n_options; i++) {
        const char *value = source->options[i].value;
        if (!kvd_config_text_valid(value, strlen(value)))
            kvd_config_problem(l, l->at,
                               "%s: control characters are not possible, nor what is no UTF-8",
                               source->options[i].key);
        else
            kvd_config_set(l, "kvd", 0, source->options[i].key, value);
    }
    kvd_config_check(l);
    for (uint32_t i = 0; i < KVD_LEN(beside); i++)
        free(beside[i]);
    free(l->places);
    return problems->n ? KVD_E_INVALID : KVD_OK;
}
