// Commands that show: status, workers, sequences, pool, metrics, top, ping, version.
#include <signal.h>
#include <time.h>

#include "client/kvctl/kvctl.h"
#include "proto/kvd_limits.h"

static Kvd__V1__StatusReply *get_status(struct kvctl *k, int *code)
{
    Kvd__V1__StatusRequest req = KVD__V1__STATUS_REQUEST__INIT;
    Kvd__V1__StatusReply *r = NULL;
    *code = kvctl_call(k, "GetStatus", &req, &kvd__v1__status_reply__descriptor, &r);
    return r;
}

static void print_status(const Kvd__V1__StatusReply *r)
{
    char used[32], all[32], rss[32], up[32], evictable[32];
    printf("state      %s, up %s\n", r->state, text_time(r->uptime_ms, up, sizeof(up)));
    printf("version    %s (pid %u, instance %.8s)\n", r->version, r->pid, r->instance);
    printf("backend    %s: %s\n", r->backend, r->device);
    printf("pool       %s of %s used (%.1f %%), %s of it evictable\n",
           kvd_format_size(r->pool_used_bytes, used, sizeof(used)),
           kvd_format_size(r->pool_bytes, all, sizeof(all)),
           r->pool_bytes ? 100.0 * (double)r->pool_used_bytes / (double)r->pool_bytes : 0,
           kvd_format_size(r->evictable_bytes, evictable, sizeof(evictable)));
    printf("holds      %llu tokens in %llu sequences\n", (unsigned long long)r->tokens,
           (unsigned long long)r->sequences);
    printf("sessions   %u, %u calls queued\n", r->sessions, r->queued_calls);
    if (r->restarts_survived)
        printf(
            "survived   %llu restarts; the last: %llu sessions and %llu sequences of theirs taken "
            "over, %llu and %llu lost, %u wait to be resumed\n",
            (unsigned long long)r->restarts_survived, (unsigned long long)r->sessions_taken_over,
            (unsigned long long)r->sequences_taken_over, (unsigned long long)r->sessions_lost,
            (unsigned long long)r->sequences_lost, r->sessions_waiting);
    for (size_t i = 0; i < r->n_listen; i++)
        printf("listen     %s\n", r->listen[i]);
    printf("metrics    %s\n", *r->metrics ? r->metrics : "off");
    printf("store      %s\n", *r->store ? r->store : "none");
    printf("memory     %s resident; log level %s\n",
           kvd_format_size(r->rss_bytes, rss, sizeof(rss)), r->log_level);
}

int cmd_status(struct kvctl *k)
{
    int code;
    Kvd__V1__StatusReply *r = get_status(k, &code);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    print_status(r);
    kvd__v1__status_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

// The first digits of a layout's digest: enough to tell one from another.
static void layout_cell(struct table *t, const char *digest)
{
    const char *hex = strchr(digest, ':');
    table_cell(t, "%.12s", hex ? hex + 1 : "-");
}

// One cell of what each plane has: "int2", or "int2 bf16" where they differ; "latent
// k=bf16,v=int2".
static void codecs_cell(struct table *t, Kvd__V1__PlaneInfo **planes, size_t n)
{
    char text[256] = "";
    for (size_t i = 0, at = 0; i < n && at < sizeof(text); i++)
        if (i == 0 || strcmp(planes[i]->codec, planes[i - 1]->codec) != 0)
            at += (size_t)snprintf(text + at, sizeof(text) - at, "%s%s%s", i ? " " : "",
                                   planes[i]->latent ? "latent " : "", planes[i]->codec);
    table_cell(t, "%s", n ? text : "-");
}

static void layers_cell(struct table *t, Kvd__V1__PlaneInfo **planes, size_t n)
{
    char text[128] = "-";
    for (size_t i = 0, at = 0; i < n && at < sizeof(text); i++)
        at +=
            (size_t)snprintf(text + at, sizeof(text) - at, "%s%u", i ? "+" : "", planes[i]->layers);
    table_cell(t, "%s", text);
}

static int show_workers(struct kvctl *k)
{
    Kvd__V1__ListSessionsRequest req = KVD__V1__LIST_SESSIONS_REQUEST__INIT;
    Kvd__V1__ListSessionsReply *r = NULL;
    int code = kvctl_call(k, "ListSessions", &req, &kvd__v1__list_sessions_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    struct table *t = table_new(">ID|NAMESPACE|CLIENT|>PID|>UID|>AGE|>IDLE|>SEQS|>PAGES|>BUFFERS|"
                                ">CALLS|>LAYERS|CODEC|ROTATION|RANK|LAYOUT");
    for (size_t i = 0; i < r->n_sessions; i++) {
        const Kvd__V1__SessionInfo *s = r->sessions[i];
        table_cell(t, "%llu", (unsigned long long)s->id);
        table_cell(t, "%s", s->namespace_name);
        table_cell(t, "%s", *s->client_name ? s->client_name : "-");
        table_cell(t, s->waiting ? "waits" : s->pid < 0 ? "lease" : "%lld", (long long)s->pid);
        table_cell(t, s->uid < 0 ? "-" : "%lld", (long long)s->uid);
        table_time(t, s->age_ms);
        table_time(t, s->idle_ms);
        table_cell(t, "%u", s->sequences);
        table_size(t, s->page_bytes);
        table_size(t, s->buffer_bytes);
        table_cell(t, "%llu", (unsigned long long)s->calls);
        layers_cell(t, s->planes, s->n_planes);
        codecs_cell(t, s->planes, s->n_planes);
        table_cell(t, "%.20s", *s->rotation_set ? s->rotation_set : "-");
        table_cell(t, s->tp_size > 1 ? "%u of %u" : "-", s->tp_rank, s->tp_size);
        layout_cell(t, s->layout_digest);
    }
    table_print(t, "no sessions");
    kvd__v1__list_sessions_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_workers(struct kvctl *k)
{
    return show_workers(k);
}

// What is compressed, and in which codec, plane by plane.
static void planes_cells(struct table *t, const Kvd__V1__AdminSequence *s)
{
    char tokens[256] = "-", codecs[256] = "-";
    for (size_t i = 0, at = 0; i < s->n_planes && at < sizeof(tokens); i++)
        at += (size_t)snprintf(tokens + at, sizeof(tokens) - at, "%s%llu", i ? " " : "",
                               (unsigned long long)s->planes[i]->history_tokens);
    for (size_t i = 0, at = 0; i < s->n_planes && at < sizeof(codecs); i++)
        at += (size_t)snprintf(codecs + at, sizeof(codecs) - at, "%s%s", i ? " " : "",
                               s->planes[i]->codec);
    table_cell(t, "%s", tokens);
    table_cell(t, "%s", codecs);
}

int cmd_sequences(struct kvctl *k)
{
    Kvd__V1__ListSequencesRequest req = KVD__V1__LIST_SEQUENCES_REQUEST__INIT;
    Kvd__V1__ListSequencesReply *r = NULL;
    if (k->n_arguments)
        req.namespace_name = (char *)k->arguments[0];
    int code = kvctl_call(k, "ListSequences", &req, &kvd__v1__list_sequences_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    struct table *t =
        table_new(">ID|NAMESPACE|NAME|>TOKENS|>COMPRESSED|CODEC|>BYTES|>HOLDERS|LAYOUT");
    for (size_t i = 0; i < r->n_sequences; i++) {
        const Kvd__V1__AdminSequence *s = r->sequences[i];
        table_cell(t, "%llu", (unsigned long long)s->sequence);
        table_cell(t, "%s", s->namespace_name);
        table_cell(t, "%s", *s->name ? s->name : "-");
        table_cell(t, "%llu", (unsigned long long)s->length);
        planes_cells(t, s);
        table_size(t, s->bytes);
        table_cell(t, "%u", s->holders);
        layout_cell(t, s->layout_digest);
    }
    table_print(t, "no sequences");
    if (r->more)
        printf("... and more\n");
    kvd__v1__list_sequences_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_tier_status(struct kvctl *k)
{
    Kvd__V1__ListTiersRequest req = KVD__V1__LIST_TIERS_REQUEST__INIT;
    Kvd__V1__ListTiersReply *r = NULL;
    char text[KVCTL_TEXT];
    int code = kvctl_call(k, "ListTiers", &req, &kvd__v1__list_tiers_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    struct table *t = table_new("TIER|STATE|>BLOCKS|>SIZE|>LIMIT|>PUT|>HITS|>MISSES|>DAMAGED|"
                                ">FAILED|>REFUSED|WHERE");
    for (size_t i = 0; i < r->n_tiers; i++) {
        const Kvd__V1__TierInfo *s = r->tiers[i];
        const uint64_t numbers[] = {s->put, s->hits, s->misses, s->damaged, s->failed, s->refused};
        table_cell(t, "%s", s->name);
        table_cell(t, "%s", s->state);
        table_cell(t, "%llu", (unsigned long long)s->blocks);
        table_size(t, s->bytes);
        table_size(t, s->limit_bytes);
        for (size_t j = 0; j < KVD_LEN(numbers); j++)
            table_cell(t, "%llu", (unsigned long long)numbers[j]);
        table_cell(t, "%s", kvctl_text(s->where, text));
    }
    table_print(t, "no tiers: tier-host, tier-directory and tier-redis are not set");
    for (size_t i = 0; i < r->n_tiers; i++)
        if (r->tiers[i]->reason[0])
            printf("%s: last failure: %s\n", r->tiers[i]->name,
                   kvctl_text(r->tiers[i]->reason, text));
    kvd__v1__list_tiers_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

static int show_pool(struct kvctl *k)
{
    Kvd__V1__GetPoolRequest req = KVD__V1__GET_POOL_REQUEST__INIT;
    Kvd__V1__GetPoolReply *r = NULL;
    char a[32], b[32], c[32], d[32];
    int code = kvctl_call(k, "GetPool", &req, &kvd__v1__get_pool_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf(
        "%s: %s in pages, %s slack, %s free; %u of %u extents granted, %u have memory; %llu "
        "evictions\n\n",
        kvd_format_size(r->pool_bytes, a, sizeof(a)), kvd_format_size(r->used_bytes, b, sizeof(b)),
        kvd_format_size(r->slack_bytes, c, sizeof(c)), kvd_format_size(r->free_bytes, d, sizeof(d)),
        r->extents_granted, r->extents_total, r->extents_made, (unsigned long long)r->evictions);
    struct table *t =
        table_new("NAMESPACE|LAYOUT|>PLANE|KIND|>PAGE|>USED PAGES|>FREE PAGES|>EXTENTS");
    for (size_t i = 0; i < r->n_groups; i++) {
        const Kvd__V1__ExtentGroup *g = r->groups[i];
        table_cell(t, "%s", g->namespace_name);
        layout_cell(t, g->layout_digest);
        table_cell(t, "%u", g->plane);
        table_cell(t, "%s", g->kind);
        table_size(t, g->page_bytes);
        table_cell(t, "%llu", (unsigned long long)g->pages_used);
        table_cell(t, "%llu", (unsigned long long)g->pages_free);
        table_cell(t, "%u", g->extents);
    }
    table_print(t, "no pages in use");
    kvd__v1__get_pool_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_pool(struct kvctl *k)
{
    return show_pool(k);
}

int cmd_metrics(struct kvctl *k)
{
    Kvd__V1__GetMetricsRequest req = KVD__V1__GET_METRICS_REQUEST__INIT;
    Kvd__V1__GetMetricsReply *r = NULL;
    int code = kvctl_call(k, "GetMetrics", &req, &kvd__v1__get_metrics_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    fputs(r->text, stdout);
    kvd__v1__get_metrics_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

static double now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

// What is counted, and when.
struct counters {
    double ms;
    uint64_t calls, tokens, queries, evictions, refused;
};

// Per second since the last look. The first look has none.
static void print_rates(const Kvd__V1__StatusReply *r, struct counters *last)
{
    struct counters now = {now_ms(),     r->calls,        r->appended_tokens, r->attended_queries,
                           r->evictions, r->refused_calls};
    double s = (now.ms - last->ms) / 1000;
    if (last->ms > 0 && now.calls >= last->calls) // else kvd was started anew
        printf(
            "rates      %.1f calls, %.1f tokens appended, %.1f queries attended, %.1f evictions, "
            "%.1f refusals a second\n",
            (double)(now.calls - last->calls) / s, (double)(now.tokens - last->tokens) / s,
            (double)(now.queries - last->queries) / s,
            (double)(now.evictions - last->evictions) / s,
            (double)(now.refused - last->refused) / s);
    else
        printf("rates      (from the second look on)\n");
    *last = now;
}

int cmd_top(struct kvctl *k)
{
    double seconds = k->n_arguments ? atof(k->arguments[0]) : 1;
    long count = k->n_arguments > 1 ? atol(k->arguments[1]) : -1;
    struct counters last = {0};
    signal(SIGINT, on_interrupt);
    for (int code; count != 0 && !interrupted; count -= count > 0) {
        Kvd__V1__StatusReply *r = get_status(k, &code);
        if (code)
            return code;
        if (k->json) {
            kvctl_print_json(k, &r->base);
        } else {
            if (isatty(STDOUT_FILENO))
                printf("\033[H\033[2J");
            print_status(r);
            print_rates(r, &last);
            kvd__v1__status_reply__free_unpacked(r, NULL);
            putchar('\n');
            if ((code = show_workers(k)))
                return code;
            putchar('\n');
            if ((code = show_pool(k)))
                return code;
        }
        fflush(stdout);
        struct timespec ts = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
        if (count != 1)
            nanosleep(&ts, NULL);
    }
    return EXIT_OK;
}

int cmd_ping(struct kvctl *k)
{
    Kvd__V1__PingRequest req = KVD__V1__PING_REQUEST__INIT;
    long n = k->n_arguments ? atol(k->arguments[0]) : 4;
    double sum = 0, least = 1e9, most = 0;
    for (long i = 0; i < n; i++) {
        Kvd__V1__PingReply *r = NULL;
        double t = now_ms();
        int code = kvctl_call(k, "Ping", &req, &kvd__v1__ping_reply__descriptor, &r);
        if (code)
            return code;
        kvd__v1__ping_reply__free_unpacked(r, NULL);
        t = now_ms() - t;
        sum += t;
        least = KVD_MIN(least, t);
        most = KVD_MAX(most, t);
        if (!k->json && n <= 10)
            printf("%s: %.3f ms\n", k->address, t);
    }
    if (k->json)
        return kvctl_print(k, json_pack("{s:i, s:f, s:f, s:f}", "count", (int)n, "min_ms", least,
                                        "avg_ms", sum / (double)n, "max_ms", most));
    printf("%ld calls: min %.3f ms, avg %.3f ms, max %.3f ms\n", n, least, sum / (double)n, most);
    return EXIT_OK;
}

int cmd_version(struct kvctl *k)
{
    struct kvd_error err = {0};
    Kvd__V1__StatusRequest req = KVD__V1__STATUS_REQUEST__INIT;
    Kvd__V1__StatusReply *r = NULL;
    int code = kvctl_find(k, &err);
    if (code == EXIT_USED_WRONG) {
        kvctl_fail(&err);
        return code;
    }
    struct kvd_channel *c = code ? NULL : kvctl_channel(k, &err);
    if (!c ||
        kvd_channel_call(c, "/kvd.v1.Admin/GetStatus", &req, &kvd__v1__status_reply__descriptor,
                         KVD_MIN(k->timeout_ms, 2000u), &r, &err))
        r = NULL;
    if (k->json)
        kvctl_print(k, json_pack("{s:s, s:s?}", "kvctl", kvd_build_version(), "kvd",
                                 r ? r->version : NULL));
    else
        printf("kvctl %s\nkvd   %s\n", kvd_build_version(), r ? r->version : "not reachable");
    if (r)
        kvd__v1__status_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}
