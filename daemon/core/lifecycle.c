// Starting, draining and stopping.
//
// Order of stopping (each step fires the next):
//   drain: no new sessions, workers are told → the last session ends, or time is up
//   → sessions end, waiting calls fail, those that run are cancelled, store fetches are given up
//   → the executor has ended its slice, fetches are answered: nothing is busy
//   → gRPC server shut down, its queue drained → the loop stops
#include "daemon/core/lifecycle.h"

#include <sysexits.h>
#include <unistd.h>

#include "daemon/core/keep.h"
#include "daemon/core/notify.h"

enum { FAREWELL_MS = 20 }; // lets the last replies get out

// In the order of the table, and against it.
#define EACH(d, p)      for (const struct kvd_part *const *p = (d)->parts; *p; p++)
#define EACH_BACK(d, p) for (const struct kvd_part *const *p = last_part(d); p >= (d)->parts; p--)

static const struct kvd_part *const *last_part(const struct kvd_daemon *d)
{
    const struct kvd_part *const *p = d->parts;
    while (p[1])
        p++;
    return p;
}

int kvd_daemon_init(struct kvd_daemon *d, struct kvd_error *err)
{
    int rc = KVD_OK;
    uv_loop_init(&d->loop);
    d->loop.data = d;
    uv_timer_t *timers[] = {&d->watchdog, &d->lease_timer, &d->drain_timer, &d->memory_timer,
                            &d->device_timer};
    for (size_t i = 0; i < KVD_LEN(timers); i++) {
        uv_timer_init(&d->loop, timers[i]);
        timers[i]->data = d;
    }
    d->started_ms = kvd_now_ms(d);
    kvd_secret_new(d->instance);
    EACH(d, p)
    if (rc == KVD_OK && (*p)->init)
        rc = (*p)->init(d, err);
    EACH(d, p)
    if (rc == KVD_OK && (*p)->start)
        rc = (*p)->start(d, err);
    return rc;
}

void kvd_daemon_run(struct kvd_daemon *d)
{
    char size[32];
    d->state = KVD_READY;
    kvd_format_size(d->config.pool_size, size, sizeof(size));
    // Whoever starts it knows first: who has read the line may count on being served again.
    kvd_notify_ready(d);
    kvd_keep_ready(d);
    kvd_notice("ready version=%s backend=%s device=\"%s\" pool=\"%s\" listen=%s metrics=%s "
               "ms=%" PRIu64,
               kvd_build_version(), d->backend->ops->name, d->backend->ops->device(d->backend),
               size, d->config.listen[0], d->config.metrics[0] ? d->config.metrics : "off",
               uv_hrtime() / 1000000 - d->started_ms);
    uv_run(&d->loop, UV_RUN_DEFAULT);
}

void kvd_daemon_go_on(struct kvd_daemon *d)
{
    if (d->state != KVD_STOPPING || d->pool_works)
        return;
    EACH(d, p)
    if ((*p)->busy && (*p)->busy(d))
        return;
    if (d->shut) {
        uv_stop(&d->loop);
        return;
    }
    d->shut = true;
    EACH(d, p)
    if ((*p)->shut)
        (*p)->shut(d);
    kvd_daemon_go_on(d);
}

static void on_drained(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    if (d->state == KVD_STOPPING)
        return;
    d->state = KVD_STOPPING;
    uv_timer_stop(&d->drain_timer);
    EACH(d, p)
    if ((*p)->stop)
        (*p)->stop(d);
    kvd_daemon_go_on(d);
}

void kvd_daemon_drain(struct kvd_daemon *d, uint64_t timeout_ms)
{
    bool again = d->state == KVD_DRAINING;
    if (d->state == KVD_STOPPING)
        return;
    d->state = KVD_DRAINING;
    if (!again) {
        kvd_notify_stopping();
        kvd_notice("draining sessions=%u timeout_ms=%" PRIu64, d->n_sessions, timeout_ms);
        EACH(d, p)
        if ((*p)->draining)
            (*p)->draining(d);
    }
    // A second request can only shorten the wait.
    uint64_t wait = d->n_sessions ? timeout_ms : FAREWELL_MS;
    uint64_t deadline = kvd_now_ms(d) + wait;
    if (!again || deadline < d->drain_deadline_ms) {
        d->drain_deadline_ms = deadline;
        uv_timer_start(&d->drain_timer, on_drained, wait, 0);
    }
}

// A kvd whose pool is kept ends as if it were killed: whatever it would still answer is a failure
// of the device, and what is not answered is asked again of the next one, which finds all that was
// true.
void kvd_daemon_check_device(struct kvd_daemon *d)
{
    const struct kvd_backend_ops *ops = d->backend->ops;
    if (d->exit_code || !ops->lost || !ops->lost(d->backend))
        return;
    kvd_error("the GPU is lost to this process after a fault, of its own or of another MPS client; "
              "stopping, so that %s starts a new one",
              d->keep ? "who keeps the pool" : "the service manager");
    if (d->keep)
        _exit(EX_SOFTWARE);
    d->exit_code = EX_SOFTWARE;
    kvd_daemon_drain(d, 0);
}

void kvd_daemon_session_ended(struct kvd_daemon *d)
{
    if (d->state == KVD_DRAINING && d->n_sessions == 0)
        uv_timer_start(&d->drain_timer, on_drained, FAREWELL_MS, 0);
}

void kvd_daemon_work_begin(struct kvd_daemon *d)
{
    d->pool_works++;
}

void kvd_daemon_work_end(struct kvd_daemon *d)
{
    if (--d->pool_works == 0)
        kvd_daemon_go_on(d);
}

static void close_rest(uv_handle_t *handle, void *arg)
{
    (void)arg;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

void kvd_daemon_deinit(struct kvd_daemon *d)
{
    EACH_BACK(d, p)
    if ((*p)->end)
        (*p)->end(d);
    uv_walk(&d->loop, close_rest, NULL);
    while (uv_run(&d->loop, UV_RUN_DEFAULT)) // what ended it may have done so once more
        continue;
    if (uv_loop_close(&d->loop))
        kvd_error("the loop still has handles: a leak");
    EACH_BACK(d, p)
    if ((*p)->deinit)
        (*p)->deinit(d);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_draining", "gauge", "1 while kvd takes no new sessions, as it is to stop.",
               d->state != KVD_READY);
    kvd_metric(f, "kvd_uptime_seconds", "gauge", "Time since the start.",
               (double)(kvd_now_ms(d) - d->started_ms) / 1000);
}

const struct kvd_part kvd_part_lifecycle = {.metrics = metrics};
