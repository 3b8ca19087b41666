// Reading the configuration again: SIGHUP and Admin.Reload.
//
// What is set at run time (quotas, the log level) stays until the configuration says something else
// than it did when it was read last: a reload for another reason undoes nothing, and an edit of
// that very value wins.
#include "daemon/core/reload.h"

#include <time.h>

#include "daemon/core/daemon.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/piecework.h"
#include "daemon/core/tls_context.h"

enum { VALUE_TEXT = 2400 }; // the longest: eight addresses

static const char *or_none(const char *value)
{
    return *value ? value : "(none)";
}

static void quota_text(uint64_t quota, char *out, size_t cap)
{
    if (quota)
        kvd_format_size(quota, out, cap);
    else
        snprintf(out, cap, "none");
}

// Keys of [kvd] and [tls]. Those that want a restart are compared with what kvd was started with.
static void apply_keys(struct kvd_daemon *d, const struct kvd_config *fresh,
                       struct kvd_reload *report)
{
    const struct kvd_config_key *k;
    char old[VALUE_TEXT], new[VALUE_TEXT];
    for (uint32_t i = 0; (k = kvd_config_key(i)); i++) {
        if (strcmp(k->section, "namespace") == 0)
            continue;
        kvd_config_value(&d->configured, NULL, i, old, sizeof(old));
        kvd_config_value(fresh, NULL, i, new, sizeof(new));
        if (strcmp(old, new) == 0)
            continue;
        kvd_lines_add(k->reloaded ? &report->changed : &report->restart, "%s: %s, now %s", k->name,
                      or_none(old), or_none(new));
        if (k->reloaded) {
            kvd_config_copy(&d->config, fresh, i);
            kvd_config_copy(&d->configured, fresh, i);
        }
    }
}

static void apply_log_level(struct kvd_daemon *d, enum kvd_log_level before,
                            struct kvd_reload *report)
{
    enum kvd_log_level now = kvd_log_get_level();
    if (d->config.log_level != before)
        kvd_log_set_level(d->config.log_level);
    else if (now != d->config.log_level)
        kvd_lines_add(&report->kept,
                      "log-level: %s was set at run time and stays; configured is %s",
                      kvd_log_level_name(now), kvd_log_level_name(d->config.log_level));
}

static void apply_quota(struct kvd_daemon *d, const char *name, uint64_t before, uint64_t after,
                        struct kvd_reload *report)
{
    uint32_t ns = kvd_pool_namespace_find(d->pool, name);
    struct kvd_pool_namespace_info info;
    char old[32], new[32];
    if (ns == KVD_POOL_NONE)
        return;
    kvd_pool_namespace_info(d->pool, ns, &info);
    quota_text(info.quota, old, sizeof(old));
    quota_text(after, new, sizeof(new));
    if (before != after && info.quota != after) {
        kvd_pool_set_quota(d->pool, ns, after);
        kvd_lines_add(&report->changed, "namespace %s: quota: %s, now %s", name, old, new);
    } else if (info.quota != after) {
        kvd_lines_add(&report->kept,
                      "namespace %s: a quota of %s was set at run time and stays; configured is %s",
                      name, old, new);
    }
}

// Who may use a namespace, and whatever else its section says.
static void report_namespace(const struct kvd_config *was, const struct kvd_config *is,
                             const struct kvd_config_namespace *old,
                             const struct kvd_config_namespace *new, struct kvd_reload *report)
{
    const struct kvd_config_key *k;
    char a[VALUE_TEXT], b[VALUE_TEXT];
    for (uint32_t i = 0; (k = kvd_config_key(i)); i++) {
        if (strcmp(k->section, "namespace") != 0 || strcmp(k->name, "quota") == 0)
            continue;
        kvd_config_value(was, old, i, a, sizeof(a));
        kvd_config_value(is, new, i, b, sizeof(b));
        if (strcmp(a, b) != 0)
            kvd_lines_add(&report->changed, "namespace %s: %s: %s, now %s", new->name, k->name,
                          or_none(a), or_none(b));
    }
}

static void apply_namespaces(struct kvd_daemon *d, const struct kvd_config *fresh,
                             struct kvd_reload *report)
{
    static const struct kvd_config_namespace nothing;
    struct kvd_config *was = &d->configured;
    for (uint32_t i = 0; i < was->n_namespaces; i++) {
        const struct kvd_config_namespace *old = &was->namespaces[i];
        if (kvd_config_namespace_find(fresh, old->name))
            continue;
        kvd_lines_add(
            &report->changed,
            "namespace %s: no longer configured: no quota, and open to whoever can connect",
            old->name);
        apply_quota(d, old->name, old->quota, 0, report);
        uint32_t ns = kvd_pool_namespace_find(d->pool, old->name);
        if (ns != KVD_POOL_NONE)
            kvd_pool_namespace_keep(d->pool, ns, false);
    }
    for (uint32_t i = 0; i < fresh->n_namespaces; i++) {
        const struct kvd_config_namespace *new = &fresh->namespaces[i];
        const struct kvd_config_namespace *old = kvd_config_namespace_find(was, new->name);
        if (!old)
            kvd_lines_add(&report->changed, "namespace %s: is configured now", new->name);
        report_namespace(was, fresh, old ? old : &nothing, new, report);
        apply_quota(d, new->name, old ? old->quota : UINT64_MAX, new->quota, report);
    }
    memcpy(d->config.namespaces, fresh->namespaces, sizeof(fresh->namespaces));
    d->config.n_namespaces = fresh->n_namespaces;
    memcpy(d->configured.namespaces, fresh->namespaces, sizeof(fresh->namespaces));
    d->configured.n_namespaces = fresh->n_namespaces;
}

// -- reading and checking, on libuv's thread pool: names of hosts and users may take their time
// -----

struct reload {
    uv_work_t work;
    struct kvd_daemon *d;
    struct kvd_config fresh;
    SSL_CTX *tls; // as the files of [tls] are now; NULL: there are none
    struct kvd_reload report;
    kvd_reload_fn *done;
    void *ctx;
    struct kvd_clearing clearing; // of what makes room for configured namespaces
};

enum { CLEARINGS = 2 * KVD_MAX_CONFIG_NAMESPACES };

static void on_work(uv_work_t *work)
{
    struct reload *r = work->data;
    struct kvd_tls_problems problems;
    if (kvd_config_load(r->d->source, &r->fresh, &r->report.errors) || !r->fresh.tls_cert[0])
        return;
    r->tls = kvd_tls_context(&r->fresh, &problems);
    if (!r->tls) // they were good a moment ago
        kvd_lines_add(&r->report.errors,
                      "[tls]: cert, key and client-ca were changed meanwhile; reload again");
}

// Sees to it that there is every configured namespace, and keeps them; or none of them is new. The
// last thing that can fail before anything changes.
static void make_namespaces(struct kvd_daemon *d, const struct kvd_config *fresh,
                            struct kvd_lines *errors)
{
    struct kvd_error err = {0};
    uint32_t held[KVD_MAX_CONFIG_NAMESPACES], n = 0;
    while (n < fresh->n_namespaces &&
           kvd_pool_namespace(d->pool, fresh->namespaces[n].name, &held[n], &err) == KVD_OK)
        n++;
    bool all = n == fresh->n_namespaces;
    if (!all)
        kvd_lines_add(errors, "namespace %s: %s", fresh->namespaces[n].name, err.text);
    for (uint32_t i = 0; i < n; i++) {
        if (all)
            kvd_pool_namespace_keep(d->pool, held[i], true);
        kvd_pool_namespace_release(d->pool, held[i]);
    }
}

static double unix_time(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// Certificates are renewed under the names that they had. Other names want a restart, as what is
// listened to does.
static void apply_tls(struct kvd_daemon *d, struct reload *r)
{
    if (!r->tls || !d->tls_context || strcmp(d->config.tls_cert, r->fresh.tls_cert) != 0 ||
        strcmp(d->config.tls_key, r->fresh.tls_key) != 0 ||
        strcmp(d->config.tls_client_ca, r->fresh.tls_client_ca) != 0 ||
        kvd_tls_context_same(d->tls_context, r->tls))
        return;
    SSL_CTX_free(d->tls_context);
    d->tls_context = r->tls;
    r->tls = NULL;
    kvd_lines_add(&r->report.changed, "[tls]: certificates are read anew, for new connections");
}

static void apply(struct kvd_daemon *d, struct reload *r)
{
    enum kvd_log_level level = d->config.log_level;
    apply_keys(d, &r->fresh, &r->report);
    apply_log_level(d, level, &r->report);
    apply_namespaces(d, &r->fresh, &r->report);
    apply_tls(d, r);
    d->reloaded_at = unix_time();
}

static void tell(const struct kvd_reload *report)
{
    for (uint32_t i = 0; i < report->errors.n; i++)
        kvd_error("configuration error: %s", report->errors.line[i]);
    for (uint32_t i = 0; i < report->changed.n; i++)
        kvd_notice("configuration changed: %s", report->changed.line[i]);
    for (uint32_t i = 0; i < report->restart.n; i++)
        kvd_warning("configuration change wants a restart: %s", report->restart.line[i]);
    for (uint32_t i = 0; i < report->kept.n; i++)
        kvd_notice("configuration: %s", report->kept.line[i]);
    if (report->errors.n)
        kvd_error("reload failed, the old configuration stays errors=%u", report->errors.n);
    else
        kvd_notice("configuration reloaded changed=%u restart=%u kept=%u", report->changed.n,
                   report->restart.n, report->kept.n);
}

static void free_report(struct kvd_reload *report)
{
    kvd_lines_free(&report->errors);
    kvd_lines_free(&report->changed);
    kvd_lines_free(&report->restart);
    kvd_lines_free(&report->kept);
}

static void finish(struct reload *r)
{
    struct kvd_daemon *d = r->d;
    bool again = d->reload_again;
    if (r->report.errors.n == 0)
        make_namespaces(d, &r->fresh, &r->report.errors);
    d->reload_failed = r->report.errors.n > 0;
    if (!d->reload_failed)
        apply(d, r);
    tell(&r->report);
    if (r->done)
        r->done(d, &r->report, r->ctx);
    free_report(&r->report);
    SSL_CTX_free(r->tls);
    free(r);
    d->reloading = d->reload_again = false;
    if (again && d->state != KVD_STOPPING)
        kvd_daemon_reload(d, NULL, NULL, NULL);
    kvd_daemon_work_end(d);
}

// Whether there is no room for all configured namespaces that are to be made, before something is
// cleared.
static bool room_wanted(const struct kvd_daemon *d, const struct kvd_config *fresh,
                        struct kvd_pool_clearing *at)
{
    uint32_t missing = 0;
    for (uint32_t i = 0; i < fresh->n_namespaces; i++)
        missing += kvd_pool_namespace_find(d->pool, fresh->namespaces[i].name) == KVD_POOL_NONE;
    return missing && kvd_pool_namespace_clears(d->pool, missing, at);
}

static void make_room(struct kvd_daemon *d, struct kvd_piecework *w)
{
    struct reload *r = (struct reload *)((uint8_t *)w - offsetof(struct reload, clearing.work));
    bool wanted = !r->report.errors.n && room_wanted(d, &r->fresh, &r->clearing.at);
    if (wanted && r->clearing.times < CLEARINGS) {
        kvd_clearing_begin(d, &r->clearing, make_room);
        return;
    }
    if (wanted)
        kvd_lines_add(&r->report.errors, "others take each namespace that is cleared; try again");
    finish(r);
}

static void on_worked(uv_work_t *work, int status)
{
    struct reload *r = work->data;
    if (status < 0)
        kvd_lines_add(&r->report.errors, "kvd is stopping");
    make_room(r->d, &r->clearing.work);
}

int kvd_daemon_reload(struct kvd_daemon *d, kvd_reload_fn *done, void *ctx, struct kvd_error *err)
{
    if (d->reloading) {
        d->reload_again |= !done;
        return kvd_fail(err, KVD_E_UNAVAILABLE, "another reload is under way; try again");
    }
    struct reload *r = calloc(1, sizeof(*r));
    if (!r)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    r->d = d;
    r->done = done;
    r->ctx = ctx;
    r->work.data = r;
    d->reloading = true;
    kvd_daemon_work_begin(d);
    uv_queue_work(&d->loop, &r->work, on_work, on_worked);
    return KVD_OK;
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    d->reloaded_at = unix_time();
    return KVD_OK;
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_config_last_reload_successful", "gauge",
               "1 if the configuration that was read last is in force, 0 if it had errors.",
               !d->reload_failed);
    kvd_metric(f, "kvd_config_last_reload_success_timestamp_seconds", "gauge",
               "When a configuration was last put in force, at start or by a reload: Unix time.",
               d->reloaded_at);
    kvd_metric_head(f, "kvd_tls_certificate_not_after_timestamp_seconds", "gauge",
                    "When the certificate that connections over TLS are shown ends: Unix time. "
                    "Not there without TLS.");
    if (d->tls_context)
        fprintf(f, "kvd_tls_certificate_not_after_timestamp_seconds %.0f\n",
                kvd_tls_context_until(d->tls_context));
}

const struct kvd_part kvd_part_reload = {.init = init, .metrics = metrics};
