// Starting, draining and stopping.
//
// Order of stopping (each step fires the next):
//   drain: no new sessions, workers are told → the last session ends, or time is up
//   → sessions end, waiting calls fail, those that run are cancelled, store fetches are given up
//   → the executor has ended its slice, fetches are answered
//   → gRPC server shut down → its queue drained → handles closed → the loop returns
#include "daemon/core/lifecycle.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sysexits.h>
#include <time.h>

#include "calib/store.h"
#include "daemon/core/notify.h"
#include "daemon/core/reload.h"
#include "daemon/rpc/users.h"
#include "daemon/sched/work.h"
#include "daemon/service/events.h"
#include "daemon/service/http.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/memory.h"
#include "daemon/session/tenants.h"
#include "kvd.pb-c.h"

static void on_evict(void *ctx, uint32_t ns, uint64_t seq, const char *name)
{
    struct kvd_daemon *d = ctx;
    kvd_info("evicted sequence=%llu name=%s", (unsigned long long)seq, name);
    kvd_event_send(d, ns, KVD__V1__EVENT__KIND__EVICTED, seq, name);
}

// The backend that is asked for; "auto": the GPU where it is usable, else the CPU.
static int init_backend(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    if (strcmp(c->backend, "cpu") != 0) {
#ifdef KVD_CUDA
        // The runtime's own words for a host without a GPU are about versions.
        if (access("/dev/nvidiactl", F_OK) && access("/dev/dxg", F_OK))
            kvd_fail(
                err, KVD_E_UNAVAILABLE,
                "no NVIDIA GPU was found: there is no /dev/nvidiactl (is the driver loaded, has "
                "the container been given the device?)");
        else
            d->backend = kvd_cuda_backend_new(c->device, err);
        if (d->backend)
            return KVD_OK;
#else
        kvd_fail(err, KVD_E_UNSUPPORTED, "this kvd was built without CUDA");
#endif
        if (strcmp(c->backend, "cuda") == 0)
            return kvd_fail_in(err, "backend cuda (backend cpu needs no GPU)");
        kvd_info("no GPU: %s; running on the CPU", err->text);
        *err = (struct kvd_error){0};
    }
    d->backend = kvd_cpu_backend_new(c->threads, c->isa[0] ? c->isa : NULL, err);
    return d->backend ? KVD_OK : err->code;
}

static int init_pool(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    struct kvd_pool_mem_ops mem = kvd_memory_ops(d);
    // The instance is random already; its first eight digits seed the ids.
    char seed[9];
    snprintf(seed, sizeof(seed), "%.8s", d->instance);
    d->next_buffer = strtoul(seed, NULL, 16);
    struct kvd_pool_config pool = {.bytes = c->pool_size,
                                   .id_seed = (uint32_t)strtoul(seed, NULL, 16),
                                   .extent_bytes = c->extent_size,
                                   .max_sequences = c->max_sequences,
                                   .max_namespaces = KVD_MAX_NAMESPACES,
                                   .max_layouts = KVD_MAX_LAYOUTS,
                                   .on_evict = on_evict,
                                   .on_evict_ctx = d};
    d->pool = kvd_pool_new(&pool, &mem, err);
    d->use = d->pool ? calloc(c->max_sequences, sizeof(*d->use)) : NULL;
    if (!d->use)
        return d->pool ? kvd_fail(err, KVD_E_INTERNAL, "out of memory") : err->code;
    for (uint32_t i = 0; i < c->n_namespaces; i++) {
        uint32_t ns;
        int rc = kvd_pool_namespace(d->pool, c->namespaces[i].name, &ns, err);
        if (rc)
            return rc;
        kvd_pool_set_quota(d->pool, ns, c->namespaces[i].quota);
        kvd_pool_namespace_keep(d->pool, ns, true);
        kvd_pool_namespace_release(d->pool, ns);
    }
    return KVD_OK;
}

// Takes the lock beside a unix socket; with it, a socket that is still there is stale.
static int lock_socket(struct kvd_daemon *d, const char *path, struct kvd_error *err)
{
    char lock[KVD_CONFIG_TEXT + 8];
    snprintf(lock, sizeof(lock), "%s.lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return kvd_fail(err, -errno, "cannot open %s: %s%s", lock, strerror(errno),
                        errno == ENOENT
                            ? "; make the folder, or choose another path with --listen unix:PATH"
                            : "");
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        int e = errno;
        close(fd);
        if (e == EWOULDBLOCK)
            return kvd_fail(err, KVD_E_EXISTS,
                            "another kvd serves %s; stop it or choose another --listen", path);
        return kvd_fail(err, -e, "cannot lock %s: %s", lock, strerror(e));
    }
    d->lock_fds[d->n_locks++] = fd;
    struct stat st;
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return kvd_fail(err, KVD_E_EXISTS, "%s exists and is not a socket; move it away", path);
        kvd_notice("removing stale socket path=%s", path);
        unlink(path);
    }
    return KVD_OK;
}

static int init_sockets(struct kvd_daemon *d, struct kvd_error *err)
{
    const char *first_unix = NULL;
    int rc = KVD_OK;
    for (uint32_t i = 0; i < d->config.n_listen && rc == KVD_OK; i++) {
        if (strncmp(d->config.listen[i], "unix:", 5) != 0)
            continue;
        first_unix = first_unix ? first_unix : d->config.listen[i] + 5;
        rc = lock_socket(d, d->config.listen[i] + 5, err);
    }
    if (rc == KVD_OK)
        rc = kvd_rpc_init(d, err);
    if (rc || !first_unix)
        return rc;
    char path[KVD_CONFIG_TEXT + 8];
    snprintf(path, sizeof(path), "%s.fd", first_unix);
    return kvd_fdsock_init(d, path, err);
}

static void on_stop_signal(uv_signal_t *signal, int number)
{
    struct kvd_daemon *d = signal->data;
    kvd_notice("stopping signal=%s", number == SIGTERM ? "SIGTERM" : "SIGINT");
    kvd_daemon_drain(d, d->config.drain_timeout_ms);
}

static void on_hup(uv_signal_t *signal, int number)
{
    (void)number;
    kvd_daemon_reload(signal->data, NULL, NULL, NULL);
}

static void start_signal(struct kvd_daemon *d, uv_signal_t *s, uv_signal_cb cb, int number)
{
    uv_signal_init(&d->loop, s);
    s->data = d;
    uv_signal_start(s, cb, number);
}

int kvd_daemon_init(struct kvd_daemon *d, struct kvd_error *err)
{
    uv_loop_init(&d->loop);
    d->loop.data = d;
    uv_timer_init(&d->loop, &d->watchdog);
    uv_timer_init(&d->loop, &d->lease_timer);
    uv_timer_init(&d->loop, &d->drain_timer);
    uv_timer_init(&d->loop, &d->memory_timer);
    d->drain_timer.data = d;
    start_signal(d, &d->sig_term, on_stop_signal, SIGTERM);
    start_signal(d, &d->sig_int, on_stop_signal, SIGINT);
    start_signal(d, &d->sig_hup, on_hup, SIGHUP);
    d->started_ms = kvd_now_ms(d);
    d->reloaded_at = (double)time(NULL);
    kvd_secret_new(d->instance);
    int rc = init_backend(d, err);
    if (rc == KVD_OK)
        rc = kvd_memory_init(d, err);
    kvd_buffers_measure_host(d);
    if (rc == KVD_OK)
        rc = init_pool(d, err);
    if (rc == KVD_OK)
        rc = kvd_queue_init(d, err);
    if (rc == KVD_OK)
        rc = kvd_fences_init(d, err);
    if (rc == KVD_OK)
        rc = kvd_exec_init(d, err);
    if (rc == KVD_OK)
        rc = init_sockets(d, err);
    if (rc == KVD_OK)
        rc = kvd_http_init(d, err);
    if (rc == KVD_OK)
        rc = kvd_rpc_start(d, err); // calls wait until the loop runs
    return rc;
}

void kvd_daemon_run(struct kvd_daemon *d)
{
    char size[32];
    d->state = KVD_READY;
    kvd_format_size(d->config.pool_size, size, sizeof(size));
    kvd_notice("ready version=%s backend=%s device=\"%s\" pool=\"%s\" listen=%s metrics=%s ms=%llu",
               kvd_build_version(), d->backend->ops->name, d->backend->ops->device(d->backend),
               size, d->config.listen[0], d->config.metrics[0] ? d->config.metrics : "off",
               (unsigned long long)(uv_hrtime() / 1000000 - d->started_ms));
    kvd_memory_ahead(d);
    kvd_notify_ready(d);
    uv_run(&d->loop, UV_RUN_DEFAULT);
}

static void on_grpc_down(struct kvd_daemon *d)
{
    kvd_rpc_deinit(d);
    kvd_http_deinit(d);
    uv_handle_t *rest[] = {(uv_handle_t *)&d->sig_term,    (uv_handle_t *)&d->sig_int,
                           (uv_handle_t *)&d->sig_hup,     (uv_handle_t *)&d->watchdog,
                           (uv_handle_t *)&d->lease_timer, (uv_handle_t *)&d->drain_timer,
                           (uv_handle_t *)&d->memory_timer};
    for (size_t i = 0; i < KVD_LEN(rest); i++)
        if (!uv_is_closing(rest[i]))
            uv_close(rest[i], NULL);
}

// Once nothing runs elsewhere that answers calls.
static void go_on_stopping(struct kvd_daemon *d)
{
    if (d->exec || d->pool_works)
        return;
    kvd_fences_deinit(d);
    kvd_rpc_shutdown(d, on_grpc_down);
}

static void stop(struct kvd_daemon *d)
{
    if (d->state == KVD_STOPPING)
        return;
    d->state = KVD_STOPPING;
    uv_timer_stop(&d->drain_timer);
    struct kvd_session *s, *next;
    HASH_ITER(hh, d->sessions, s, next)
    kvd_session_end(d, s, "kvd stops");
    kvd_compute_cancel(d, NULL);
    kvd_fdsock_deinit(d);
    kvd_store_abort();
    kvd_exec_stop(d, go_on_stopping);
}

static void on_drained(uv_timer_t *timer)
{
    stop(timer->data);
}

void kvd_daemon_drain(struct kvd_daemon *d, uint64_t timeout_ms)
{
    bool again = d->state == KVD_DRAINING;
    if (d->state == KVD_STOPPING)
        return;
    d->state = KVD_DRAINING;
    if (!again) {
        kvd_notify_stopping();
        kvd_notice("draining sessions=%u timeout_ms=%llu", d->n_sessions,
                   (unsigned long long)timeout_ms);
        kvd_event_send(d, KVD_POOL_NONE, KVD__V1__EVENT__KIND__DRAINING, 0, "");
        kvd_health_changed(d);
    }
    // A second request can only shorten the wait. With nobody there, a moment lets replies get out.
    uint64_t wait = d->n_sessions ? timeout_ms : 20;
    uint64_t deadline = kvd_now_ms(d) + wait;
    if (!again || deadline < d->drain_deadline_ms) {
        d->drain_deadline_ms = deadline;
        uv_timer_start(&d->drain_timer, on_drained, wait, 0);
    }
}

void kvd_daemon_check_device(struct kvd_daemon *d)
{
    if (d->exit_code || !d->backend->ops->lost(d->backend))
        return;
    kvd_error("the GPU is lost to this process after a fault, of its own or of another MPS client; "
              "stopping, so that the service manager starts a new one");
    d->exit_code = EX_SOFTWARE;
    kvd_daemon_drain(d, 0);
}

void kvd_daemon_session_ended(struct kvd_daemon *d)
{
    if (d->state == KVD_DRAINING && d->n_sessions == 0)
        uv_timer_start(&d->drain_timer, on_drained, 20, 0);
}

void kvd_daemon_work_begin(struct kvd_daemon *d)
{
    d->pool_works++;
}

void kvd_daemon_work_end(struct kvd_daemon *d)
{
    if (--d->pool_works == 0 && d->state == KVD_STOPPING)
        go_on_stopping(d);
}

static void close_rest(uv_handle_t *handle, void *arg)
{
    (void)arg;
    if (!uv_is_closing(handle))
        uv_close(handle, NULL);
}

void kvd_daemon_deinit(struct kvd_daemon *d)
{
    // After a run everything below is gone already; after a failed init this takes back what there
    // is.
    kvd_exec_deinit(d);
    kvd_fences_deinit(d);
    kvd_fdsock_deinit(d);
    kvd_rpc_deinit(d);
    kvd_http_deinit(d);
    uv_walk(&d->loop, close_rest, NULL);
    uv_run(&d->loop, UV_RUN_DEFAULT);
    if (uv_loop_close(&d->loop))
        kvd_error("the loop still has handles: a leak");
    for (uint32_t i = 0; i < KVD_MAX_LAYOUTS; i++)
        if (d->rotations[i])
            d->backend->ops->rotation_free(d->backend, &d->rotations[i]);
    kvd_queue_deinit(d);
    kvd_pool_free(&d->pool);
    kvd_memory_deinit(d);
    kvd_backend_free(&d->backend);
    free(d->use);
    kvd_tenants_deinit(d);
    kvd_users_deinit(d);
    for (uint32_t i = 0; i < d->n_locks; i++)
        close(d->lock_fds[i]);
}
