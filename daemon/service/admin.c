// kvd.v1.Admin.
#include <uv.h>

#include "admin.pb-c.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/piecework.h"
#include "daemon/core/reload.h"
#include "daemon/rpc/rpc.h"
#include "daemon/sched/work.h"
#include "daemon/service/handlers.h"
#include "daemon/session/buffer.h"
#include "daemon/session/pool.h"
#include "daemon/session/ledger.h"
#include "daemon/session/session.h"
#include "daemon/session/tenants.h"

enum { CLEARINGS = 16 }; // for one namespace

void kvd_on_ping(struct kvd_call *call, const void *request)
{
    const Kvd__V1__PingRequest *req = request;
    Kvd__V1__PingReply r = KVD__V1__PING_REPLY__INIT;
    if (req->payload.len > 65536) {
        kvd_call_fail(call, KVD_E_INVALID, "payload has %zu bytes; at most 65536 are sent back",
                      req->payload.len);
        return;
    }
    r.payload = req->payload;
    kvd_call_reply(call, &r);
}

void kvd_on_get_status(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_daemon *d = call->d;
    struct kvd_pool_info pool;
    char *listen[KVD_MAX_LISTEN];
    size_t rss = 0;
    kvd_pool_info(d->pool, &pool);
    uv_resident_set_memory(&rss);
    for (uint32_t i = 0; i < d->config.n_listen; i++)
        listen[i] = d->config.listen[i];
    Kvd__V1__StatusReply r = KVD__V1__STATUS_REPLY__INIT;
    r.version = (char *)kvd_build_version();
    r.instance = d->instance;
    r.backend = (char *)d->backend->ops->name;
    r.device = (char *)d->backend->ops->device(d->backend);
    r.state = d->state == KVD_READY ? "ready" : "draining";
    r.uptime_ms = kvd_now_ms(d) - d->started_ms;
    r.pid = (uint32_t)getpid();
    r.pool_bytes = pool.bytes;
    r.pool_used_bytes = pool.used;
    r.sessions = d->n_sessions;
    r.sequences = pool.sequences;
    r.tokens = pool.tokens;
    r.queued_calls = kvd_compute_queued(d);
    r.store = d->config.store;
    r.n_listen = d->config.n_listen;
    r.listen = listen;
    r.metrics = d->config.metrics;
    r.log_level = (char *)kvd_log_level_name(kvd_log_get_level());
    r.rss_bytes = rss;
    r.evictable_bytes = kvd_evictable(d);
    r.calls = kvd_metrics_calls(&d->metrics);
    r.appended_tokens = d->metrics.tokens_appended;
    r.attended_queries = d->metrics.queries_attended;
    r.evictions = pool.evictions;
    for (int i = 0; i < KVD_REFUSED_COUNT; i++)
        r.refused_calls += d->metrics.refused[i];
    r.restarts_survived = kvd_ledger_restarts(d->ledger);
    r.sessions_taken_over = d->metrics.sessions_kept;
    r.sequences_taken_over = d->metrics.sequences_kept;
    r.sessions_lost = d->metrics.sessions_lost;
    r.sequences_lost = d->metrics.sequences_lost;
    r.sessions_waiting = kvd_sessions_waiting(d);
    r.no_gpu = d->no_gpu.text;
    kvd_call_reply(call, &r);
}

// A namespace is made for its quota.
struct making {
    struct kvd_clearing clearing; // of another, where the table is full
    struct kvd_call *call;
};

static void set_quota(struct kvd_call *call)
{
    const Kvd__V1__SetQuotaRequest *req = (const void *)call->request;
    struct kvd_error err = {0};
    struct kvd_pool_namespace_info info;
    struct kvd_pool *pool = call->d->pool;
    uint32_t ns;
    if (kvd_pool_namespace(pool, req->namespace_name, &ns, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    kvd_pool_set_quota(pool, ns, req->quota_bytes);
    kvd_pool_namespace_info(pool, ns, &info);
    kvd_notice("quota set namespace=%s bytes=%" PRIu64, info.name, req->quota_bytes);
    kvd_pool_namespace_release(pool, ns);
    Kvd__V1__SetQuotaReply r = KVD__V1__SET_QUOTA_REPLY__INIT;
    r.used_bytes = info.used;
    kvd_call_reply(call, &r);
}

static void make_room(struct kvd_daemon *d, struct kvd_piecework *w)
{
    struct making *m = (struct making *)w;
    const Kvd__V1__SetQuotaRequest *req = (const void *)m->call->request;
    bool full = kvd_pool_namespace_find(d->pool, req->namespace_name) == KVD_POOL_NONE &&
                kvd_pool_namespace_clears(d->pool, 1, &m->clearing.at);
    if (full && m->clearing.times < CLEARINGS) {
        kvd_clearing_begin(d, &m->clearing, make_room);
        return;
    }
    if (full)
        kvd_call_fail(m->call, KVD_E_UNAVAILABLE,
                      "others take each namespace that is cleared; try again");
    else
        set_quota(m->call);
    free(m);
}

void kvd_on_set_quota(struct kvd_call *call, const void *request)
{
    const Kvd__V1__SetQuotaRequest *req = request;
    struct kvd_error err = {0};
    struct making *m;
    if (kvd_pool_namespace_find(call->d->pool, req->namespace_name) == KVD_POOL_NONE &&
        !req->create) {
        kvd_call_fail(call, KVD_E_NOT_FOUND,
                      "there is no namespace '%.64s'; set create (kvctl: --create) to make it with "
                      "this quota",
                      req->namespace_name);
        return;
    }
    if (req->quota_bytes && req->quota_bytes < KVD_CONFIG_LEAST_SIZE) { // as in the configuration
        kvd_call_fail(call, KVD_E_INVALID,
                      "quota: '%" PRIu64 "' is not possible; it wants a size such as 512MiB or "
                      "62GiB, 0 or from 4.00 KiB; 0 (kvctl: none) sets no limit",
                      req->quota_bytes);
        return;
    }
    if (req->quota_bytes > call->d->config.pool_size) { // there too
        char wanted[32], have[32];
        kvd_call_fail(call, KVD_E_INVALID,
                      "quota: %s for the namespace %.64s are more than pool-size, %s; 0 (kvctl: "
                      "none) sets no limit",
                      kvd_format_size(req->quota_bytes, wanted, sizeof(wanted)),
                      req->namespace_name,
                      kvd_format_size(call->d->config.pool_size, have, sizeof(have)));
        return;
    }
    if (kvd_namespace_listed(call->d, req->namespace_name, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    m = calloc(1, sizeof(*m));
    if (!m) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    m->call = call;
    make_room(call->d, &m->clearing.work);
}

void kvd_on_drain(struct kvd_call *call, const void *request)
{
    const Kvd__V1__DrainRequest *req = request;
    struct kvd_daemon *d = call->d;
    Kvd__V1__DrainReply r = KVD__V1__DRAIN_REPLY__INIT;
    r.sessions = d->n_sessions;
    kvd_call_reply(call, &r);
    kvd_daemon_drain(d, req->timeout_ms ? req->timeout_ms : d->config.drain_timeout_ms);
}

void kvd_on_set_log_level(struct kvd_call *call, const void *request)
{
    const Kvd__V1__SetLogLevelRequest *req = request;
    int level = kvd_log_level_parse(req->level);
    if (level < 0) {
        kvd_call_fail(call, KVD_E_INVALID,
                      "level is '%.20s'; error, warning, notice, info and debug are possible",
                      req->level);
        return;
    }
    Kvd__V1__SetLogLevelReply r = KVD__V1__SET_LOG_LEVEL_REPLY__INIT;
    r.previous = (char *)kvd_log_level_name(kvd_log_get_level());
    kvd_notice("log level changed level=%s", req->level);
    kvd_log_set_level((enum kvd_log_level)level);
    kvd_call_reply(call, &r);
}

static void on_reloaded(struct kvd_daemon *d, const struct kvd_reload *report, void *ctx)
{
    Kvd__V1__ReloadReply r = KVD__V1__RELOAD_REPLY__INIT;
    r.files = (char **)d->source->files;
    r.n_files = d->source->n_files;
    r.applied = report->errors.n == 0;
    r.errors = report->errors.line;
    r.n_errors = report->errors.n;
    r.changed = report->changed.line;
    r.n_changed = report->changed.n;
    r.restart = report->restart.line;
    r.n_restart = report->restart.n;
    r.kept = report->kept.line;
    r.n_kept = report->kept.n;
    kvd_call_reply(ctx, &r);
}

void kvd_on_reload(struct kvd_call *call, const void *request)
{
    struct kvd_error err = {0};
    (void)request;
    if (kvd_daemon_reload(call->d, on_reloaded, call, &err))
        kvd_call_fail_error(call, &err);
}
