// The Prometheus text format. Names follow its conventions: base units, _total for counters, kvd_
// in front.
#include "daemon/service/metrics.h"

#include <dirent.h>
#include <sys/resource.h>

#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/sched/work.h"
#include "daemon/service/layout.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/session.h"

// Upper bounds in nanoseconds: 25 us to about 10 s.
static const uint64_t bounds[KVD_BUCKETS] = {
    25000,   50000,    100000,   200000,    400000,    800000,     1600000,    3200000,
    6400000, 12800000, 25600000, 100000000, 400000000, 1600000000, 4000000000, 10000000000,
};

void kvd_histogram_add(struct kvd_histogram *h, uint64_t ns)
{
    int i = 0;
    while (i < KVD_BUCKETS && ns > bounds[i])
        i++;
    h->bucket[i]++;
    h->count++;
    h->sum_ns += ns;
}

uint64_t kvd_metrics_calls(const struct kvd_metrics *m)
{
    uint64_t sum = 0;
    for (int i = 0; i < KVD_MAX_METHODS; i++)
        for (int c = 0; c < KVD_GRPC_CODES; c++)
            sum += m->calls[i][c];
    return sum;
}

struct page {
    FILE *f;
    struct kvd_daemon *d;
};

static void head(FILE *f, const char *name, const char *type, const char *help)
{
    fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void single(FILE *f, const char *name, const char *type, const char *help, double value)
{
    head(f, name, type, help);
    fprintf(f, "%s %.17g\n", name, value);
}

static void histogram(FILE *f, const char *name, const char *labels, const struct kvd_histogram *h)
{
    uint64_t sum = 0;
    const char *comma = *labels ? "," : "";
    for (int i = 0; i < KVD_BUCKETS; i++) {
        sum += h->bucket[i];
        fprintf(f, "%s_bucket{%s%sle=\"%g\"} %llu\n", name, labels, comma, (double)bounds[i] / 1e9,
                (unsigned long long)sum);
    }
    fprintf(f, "%s_bucket{%s%sle=\"+Inf\"} %llu\n", name, labels, comma,
            (unsigned long long)h->count);
    const char *open = *labels ? "{" : "", *close = *labels ? "}" : "";
    fprintf(f, "%s_sum%s%s%s %.9f\n", name, open, labels, close, (double)h->sum_ns / 1e9);
    fprintf(f, "%s_count%s%s%s %llu\n", name, open, labels, close, (unsigned long long)h->count);
}

// A label's value: backslash, quote and newline escaped.
static void escape(const char *in, char *out, size_t cap)
{
    size_t n = 0;
    for (; *in && n + 3 < cap; in++) {
        if (*in == '\\' || *in == '"')
            out[n++] = '\\';
        out[n++] = *in;
    }
    out[n] = '\0';
}

uint64_t kvd_evictable(struct kvd_daemon *d, const uint64_t **by_namespace)
{
    enum { FRESH_MS = 1000 };
    uint64_t now = kvd_now_ms(d) + 1; // 0: never
    if (!d->evictable_at_ms || now - d->evictable_at_ms >= FRESH_MS) {
        memset(d->evictable_by_ns, 0, sizeof(d->evictable_by_ns));
        d->evictable = kvd_pool_evictable(d->pool, d->evictable_by_ns);
        d->evictable_at_ms = now;
    }
    if (by_namespace)
        *by_namespace = d->evictable_by_ns;
    return d->evictable;
}

static void pool_metrics(struct page *p)
{
    struct kvd_pool_info info;
    kvd_pool_info(p->d->pool, &info);
    head(p->f, "kvd_pool_bytes", "gauge",
         "KV memory by state: used by pages, slack in granted extents, free.");
    fprintf(p->f, "kvd_pool_bytes{state=\"used\"} %llu\n", (unsigned long long)info.used);
    fprintf(p->f, "kvd_pool_bytes{state=\"slack\"} %llu\n", (unsigned long long)info.slack);
    fprintf(p->f, "kvd_pool_bytes{state=\"free\"} %llu\n",
            (unsigned long long)(info.bytes - info.used - info.slack));
    single(p->f, "kvd_pool_evictable_bytes", "gauge",
           "Of the used ones, those that evicting published, unused sequences would free.",
           (double)kvd_evictable(p->d, NULL));
    single(p->f, "kvd_pool_memory_bytes", "gauge",
           "Device memory that the pool's extents have, idle ones included.",
           (double)info.extents_made * (double)info.extent_bytes);
    single(p->f, "kvd_pool_size_bytes", "gauge", "KV memory in all.", (double)info.bytes);
    single(p->f, "kvd_pool_evictions_total", "counter",
           "Published sequences evicted for room or by an operator.", (double)info.evictions);
    single(p->f, "kvd_sequences", "gauge", "Sequences that exist.", (double)info.sequences);
}

static bool slab_line(void *ctx, const struct kvd_pool_slab_info *info)
{
    struct page *p = ctx;
    struct kvd_pool_namespace_info ns;
    char name[2 * KVD_MAX_NAMESPACE + 4];
    if (info->extents == 0)
        return true;
    kvd_pool_namespace_info(p->d->pool, info->ns, &ns);
    escape(ns.name, name, sizeof(name));
    const char *kind =
        info->kind == KVD_POOL_BF16
            ? "window"
            : kvd_codec_name(kvd_pool_layout_get(p->d->pool, info->layout)->planes[0].codec);
    fprintf(p->f, "kvd_pages{namespace=\"%s\",kind=\"%s\",geometry=\"%u\"} %llu\n", name, kind,
            info->layout, (unsigned long long)info->used);
    return true;
}

static void namespace_metrics(struct page *p)
{
    head(p->f, "kvd_pages", "gauge",
         "Pages in use by namespace, kind (window or codec) and layout.");
    kvd_pool_slab_each(p->d->pool, slab_line, p);
    static const struct {
        const char *name, *help;
    } gauges[] = {
        {"kvd_namespace_used_bytes", "Bytes of pages in use by namespace."},
        {"kvd_namespace_quota_bytes", "Quota by namespace; 0 means none."},
        {"kvd_namespace_tokens",
         "Tokens stored by namespace, shared ones counted for each sequence."},
        {"kvd_namespace_sequences", "Sequences by namespace."},
        {"kvd_namespace_evictable_bytes",
         "Bytes that evicting published, unused sequences would free, by namespace."},
    };
    const uint64_t *evictable;
    kvd_evictable(p->d, &evictable);
    for (size_t g = 0; g < KVD_LEN(gauges); g++) {
        head(p->f, gauges[g].name, "gauge", gauges[g].help);
        for (uint32_t i = 0; i < kvd_pool_namespace_count(p->d->pool); i++) {
            struct kvd_pool_namespace_info ns;
            char name[2 * KVD_MAX_NAMESPACE + 4];
            kvd_pool_namespace_info(p->d->pool, i, &ns);
            if (!ns.name[0])
                continue;
            const uint64_t values[] = {ns.used, ns.quota, ns.tokens, ns.sequences, evictable[i]};
            escape(ns.name, name, sizeof(name));
            fprintf(p->f, "%s{namespace=\"%s\"} %llu\n", gauges[g].name, name,
                    (unsigned long long)values[g]);
        }
    }
}

static const char *method_name(uint32_t i)
{
    return i < kvd_n_methods ? kvd_methods[i].path + 1 : "unknown";
}

static void rpc_metrics(struct page *p)
{
    const struct kvd_metrics *m = &p->d->metrics;
    head(p->f, "kvd_rpc_requests_total", "counter", "Calls answered, by method and gRPC code.");
    for (uint32_t i = 0; i < KVD_MAX_METHODS; i++)
        for (int c = 0; c < KVD_GRPC_CODES; c++)
            if (m->calls[i][c])
                fprintf(p->f, "kvd_rpc_requests_total{method=\"%s\",code=\"%s\"} %llu\n",
                        method_name(i), kvd_grpc_code_name(c), (unsigned long long)m->calls[i][c]);
    head(p->f, "kvd_rpc_duration_seconds", "histogram", "From a call's arrival to its answer.");
    for (uint32_t i = 0; i < kvd_n_methods; i++) {
        char labels[128];
        if (!m->rpc[i].count)
            continue;
        snprintf(labels, sizeof(labels), "method=\"%s\"", method_name(i));
        histogram(p->f, "kvd_rpc_duration_seconds", labels, &m->rpc[i]);
    }
    static const char *const reasons[KVD_REFUSED_COUNT] = {"pool", "quota", "limit"};
    head(p->f, "kvd_refused_calls_total", "counter",
         "Calls refused for want of room: in the pool, in the namespace's quota, within a limit.");
    for (int i = 0; i < KVD_REFUSED_COUNT; i++)
        fprintf(p->f, "kvd_refused_calls_total{reason=\"%s\"} %llu\n", reasons[i],
                (unsigned long long)m->refused[i]);
    head(p->f, "kvd_queue_wait_seconds", "histogram",
         "Time a compute call waited for the executor.");
    histogram(p->f, "kvd_queue_wait_seconds", "", &m->queue_wait);
    static const char *const ops[KVD_OP_COUNT] = {"append", "attend", "step", "rotate", "read"};
    head(p->f, "kvd_kernel_duration_seconds", "histogram", "Time in the backend, by operation.");
    for (int i = 0; i < KVD_OP_COUNT; i++) {
        char labels[32];
        snprintf(labels, sizeof(labels), "op=\"%s\"", ops[i]);
        histogram(p->f, "kvd_kernel_duration_seconds", labels, &m->kernel[i]);
    }
}

static void share_metrics(struct page *p)
{
    static const char *const names[] = {"connections",  "calls",       "reply_bytes", "mappings",
                                        "buffer_bytes", "descriptors", "sessions",    "sequences",
                                        "namespaces",   "layouts"};
    _Static_assert(KVD_LEN(names) == KVD_SHARE_COUNT, "each share has a name");
    head(p->f, "kvd_share_limit", "gauge",
         "What clients may have of it in all; one user may have three quarters.");
    for (int i = 0; i < KVD_SHARE_COUNT; i++)
        fprintf(p->f, "kvd_share_limit{share=\"%s\"} %llu\n", names[i],
                (unsigned long long)kvd_share_total(p->d, (enum kvd_share)i));
    head(p->f, "kvd_share_used", "gauge", "What they have.");
    for (int i = 0; i < KVD_SHARE_COUNT; i++)
        fprintf(p->f, "kvd_share_used{share=\"%s\"} %llu\n", names[i],
                (unsigned long long)kvd_share_used(p->d, (enum kvd_share)i));
}

static void other_metrics(struct page *p)
{
    struct kvd_daemon *d = p->d;
    const struct kvd_metrics *m = &d->metrics;
    FILE *f = p->f;
    single(f, "kvd_sessions", "gauge", "Open sessions.", d->n_sessions);
    single(f, "kvd_connections", "gauge", "Open connections on the fd socket.",
           kvd_fdsock_count(d));
    single(f, "kvd_sessions_opened_total", "counter", "Sessions opened.",
           (double)m->sessions_opened);
    single(f, "kvd_sessions_ended_total", "counter", "Sessions ended, for whatever reason.",
           (double)m->sessions_ended);
    single(f, "kvd_leases_expired_total", "counter", "Leased sessions that ran out.",
           (double)m->leases_expired);
    single(f, "kvd_queued_calls", "gauge", "Compute calls waiting or running.",
           kvd_compute_queued(d));
    single(f, "kvd_appended_tokens_total", "counter", "Tokens appended (complete in every layer).",
           (double)m->tokens_appended);
    single(f, "kvd_attended_queries_total", "counter", "Query tokens answered by Attend and Step.",
           (double)m->queries_attended);
    single(f, "kvd_compressed_input_bytes_total", "counter",
           "Bytes of bf16 K and V that left the recent window.", (double)m->bytes_in);
    single(f, "kvd_compressed_output_bytes_total", "counter", "Bytes that they became.",
           (double)m->bytes_stored);
    single(f, "kvd_compression_ratio", "gauge",
           "Input over output of all compression so far; 0 before the first.",
           m->bytes_stored ? (double)m->bytes_in / (double)m->bytes_stored : 0);
    single(f, "kvd_nonfinite_rejected_total", "counter", "Appends refused for NaN or Inf.",
           (double)m->nonfinite);
    single(f, "kvd_events_lost_total", "counter", "Events dropped as their reader was slow.",
           (double)m->events_lost);
    share_metrics(p);
    head(f, "kvd_rotation_set_requests_total", "counter",
         "Rotation sets asked for, by where they came from.");
    fprintf(f, "kvd_rotation_set_requests_total{source=\"cache\"} %llu\n",
            (unsigned long long)m->rotations_cached);
    fprintf(f, "kvd_rotation_set_requests_total{source=\"store\"} %llu\n",
            (unsigned long long)m->rotations_fetched);
    fprintf(f, "kvd_rotation_set_requests_total{source=\"failed\"} %llu\n",
            (unsigned long long)m->rotations_failed);
    single(f, "kvd_rotation_sets_loaded", "gauge",
           "Rotation sets in the backend's memory, one per layout.", (double)m->rotations_loaded);
    single(f, "kvd_config_last_reload_successful", "gauge",
           "1 if the configuration that was read last is in force, 0 if it had errors.",
           !d->reload_failed);
    single(f, "kvd_config_last_reload_success_timestamp_seconds", "gauge",
           "When a configuration was last put in force, at start or by a reload: Unix time.",
           d->reloaded_at);
    single(f, "kvd_uptime_seconds", "gauge", "Time since the start.",
           (double)(kvd_now_ms(d) - d->started_ms) / 1000);
}

static void identity_metrics(const struct page *p)
{
    const struct kvd_daemon *d = p->d;
    char device[2 * KVD_CONFIG_TEXT];
    FILE *f = p->f;
    escape(d->backend->ops->device(d->backend), device, sizeof(device));
    head(f, "kvd_build_info", "gauge", "Always 1; the labels tell version and backend.");
    fprintf(f, "kvd_build_info{version=\"%s\",backend=\"%s\"} 1\n", kvd_build_version(),
            d->backend->ops->name);
    head(f, "kvd_device_info", "gauge",
         "Always 1; the labels tell what the backend runs on, and the instance of this start.");
    fprintf(f, "kvd_device_info{backend=\"%s\",index=\"%u\",device=\"%s\",start=\"%s\"} 1\n",
            d->backend->ops->name, d->config.device, device, d->instance);
    single(f, "kvd_draining", "gauge", "1 while kvd takes no new sessions, as it is to stop.",
           d->state != KVD_READY);
}

// A number of /proc/self/FILE after "KEY", or 0.
static double proc_number(const char *path, const char *key)
{
    char line[512];
    double value = 0;
    FILE *f KVD_FCLOSE = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, key, strlen(key)) == 0)
            value = strtod(line + strlen(key), NULL);
    return value;
}

// When the process began, in Unix time: field 22 of stat, in clock ticks after the machine's start.
static double process_start(void)
{
    static double began;
    char text[1024];
    if (began > 0)
        return began;
    FILE *f KVD_FCLOSE = fopen("/proc/self/stat", "re");
    size_t n = f ? fread(text, 1, sizeof(text) - 1, f) : 0;
    text[n] = '\0';
    char *at = strrchr(text, ')'); // after the name, which may have spaces, comes field 3
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    began = proc_number("/proc/stat", "btime ") +
            (at ? strtod(at, NULL) / (double)sysconf(_SC_CLK_TCK) : 0);
    return began;
}

static uint32_t open_descriptors(void)
{
    uint32_t n = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder))
        n++;
    if (folder)
        closedir(folder);
    return n > 3 ? n - 3 : 0; // ".", "..", and the folder's own
}

// Under the names that Prometheus' own clients have.
static void process_metrics(FILE *f)
{
    struct rlimit limit = {0};
    size_t rss = 0;
    uv_rusage_t ru;
    uv_resident_set_memory(&rss);
    uv_getrusage(&ru);
    getrlimit(RLIMIT_NOFILE, &limit);
    single(f, "process_cpu_seconds_total", "counter",
           "Total user and system CPU time spent in seconds.",
           (double)(ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) +
               (double)(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) / 1e6);
    single(f, "process_resident_memory_bytes", "gauge", "Resident memory size in bytes.",
           (double)rss);
    single(f, "process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.",
           proc_number("/proc/self/status", "VmSize:") * 1024);
    single(f, "process_open_fds", "gauge", "Number of open file descriptors.", open_descriptors());
    single(f, "process_max_fds", "gauge", "Maximum number of open file descriptors.",
           (double)limit.rlim_cur);
    single(f, "process_threads", "gauge", "Number of OS threads in the process.",
           proc_number("/proc/self/status", "Threads:"));
    single(f, "process_start_time_seconds", "gauge",
           "Start time of the process since unix epoch in seconds.", process_start());
}

char *kvd_metrics_page(struct kvd_daemon *d)
{
    char *text = NULL;
    size_t size;
    struct page p = {.f = open_memstream(&text, &size), .d = d};
    if (!p.f)
        return NULL;
    pool_metrics(&p);
    namespace_metrics(&p);
    rpc_metrics(&p);
    other_metrics(&p);
    identity_metrics(&p);
    process_metrics(p.f);
    if (fclose(p.f)) {
        free(text);
        return NULL;
    }
    return text;
}
