// The gRPC server: its sockets, the completion-queue thread, start and stop.
#include <grpc/byte_buffer.h>
#include <grpc/grpc_security.h>
#include <grpc/support/log.h>
#include <sys/socket.h>
#include <utlist.h>

#include "daemon/core/lifecycle.h"
#include "daemon/rpc/links.h"
#include "daemon/rpc/listen.h"
#include "daemon/rpc/rpc_internal.h"
#include "daemon/rpc/tls.h"

enum {
    ARMED = 16, // requests kept waiting per method; a burst beyond that waits inside gRPC
    TICK_MS = 1000,
    PARTING_MS = 500,      // for what was answered to be read
    GRPC_LINES = 10,       // that gRPC may log in a second
    READ_BYTES = 16 << 10, // that gRPC reads from a connection before it looks at others
};

static void queue_thread(void *arg)
{
    struct kvd_daemon *d = arg;
    struct kvd_rpc *r = d->rpc;
    for (;;) {
        grpc_event e = grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        uv_mutex_lock(&r->lock);
        if (e.type == GRPC_OP_COMPLETE) {
            struct kvd_tag *tag = e.tag;
            atomic_load_explicit(&tag->armed, memory_order_acquire);
            tag->ok = e.success;
            DL_APPEND2(r->fired, tag, previous, next);
        } else if (e.type == GRPC_QUEUE_SHUTDOWN) {
            r->drained = true;
        }
        uv_async_send(&r->async);
        uv_mutex_unlock(&r->lock);
        if (e.type == GRPC_QUEUE_SHUTDOWN)
            return;
    }
}

// Wake-ups coalesce, so the whole list is taken.
static void on_async(uv_async_t *async)
{
    struct kvd_daemon *d = async->data;
    struct kvd_rpc *r = d->rpc;
    uv_mutex_lock(&r->lock);
    struct kvd_tag *fired = KVD_TAKE(r->fired), *tag, *next;
    bool drained = r->drained;
    uv_mutex_unlock(&r->lock);
    DL_FOREACH_SAFE2(fired, tag, next, next)
    tag->fire(tag, tag->ok); // which may free or arm it
    if (d->links)
        kvd_links_turn(d);
    if (!drained || r->shut)
        return;
    kvd_later_all(d);
    r->shut = true;
    kvd_daemon_go_on(d);
}

static void on_tick(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    if (d->rpc->stopping) {
        kvd_links_cut(d); // gRPC would wait for whoever reads nothing
        return;
    }
    kvd_calls_arm_again(d);
    kvd_calls_give_up_unread(d);
    kvd_tls_tick(d);
}

static int add_port(struct kvd_daemon *d, const char *address, struct kvd_error *err)
{
    if (strncmp(address, "unix:", 5) == 0)
        return kvd_listen_unix(d, KVD_LISTEN_GRPC, address + 5, SOCK_STREAM, kvd_links_accept, err);
    int rc = kvd_listen_tcp(d, KVD_LISTEN_GRPC, address, d->tls ? kvd_tls_accept : kvd_links_accept,
                            NULL, err);
    return rc ? kvd_fail_in(err, "listen (choose another address with --listen)") : KVD_OK;
}

// What gRPC says goes into our log; errors of its own are mostly the doing of clients, who must not
// fill it.
static void on_grpc_log(gpr_log_func_args *args)
{
    static _Atomic uint64_t window_ns;
    static _Atomic int lines;
    uint64_t now = uv_hrtime();
    if (now - atomic_load(&window_ns) > 1000000000) {
        atomic_store(&window_ns, now);
        atomic_store(&lines, 0);
    }
    if (atomic_fetch_add(&lines, 1) < GRPC_LINES)
        kvd_log(args->severity == GPR_LOG_SEVERITY_ERROR ? KVD_LOG_WARNING : KVD_LOG_DEBUG,
                "grpc: %s", args->message);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_rpc *r = calloc(1, sizeof(*r));
    if (!r)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->rpc = r;
    gpr_set_log_function(on_grpc_log);
    grpc_init();
    uv_mutex_init(&r->lock);
    uv_async_init(&d->loop, &r->async, on_async);
    uv_timer_init(&d->loop, &r->timer);
    kvd_later_init(d);
    r->async.data = r->timer.data = d;
    r->handles = 3;
    uv_timer_start(&r->timer, on_tick, TICK_MS, TICK_MS);
    // Messages that are being received, all together.
    grpc_resource_quota *quota = grpc_resource_quota_create("kvd");
    grpc_resource_quota_resize(quota, (size_t)1 << 30);
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
         .value.integer = KVD_MAX_MESSAGE},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, .value.integer = -1},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ALLOW_REUSEPORT, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_MAX_CONCURRENT_STREAMS,
         .value.integer = KVD_LINK_CALLS},
        // Compressed messages could be bombs, and K/V does not compress: identity only.
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET,
         .value.integer = 1},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION,
         .value.integer = 0},
        {.type = GRPC_ARG_POINTER,
         .key = GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {quota, grpc_resource_quota_arg_vtable()}},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ENABLE_CHANNELZ, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_TCP_MAX_READ_CHUNK_SIZE,
         .value.integer = READ_BYTES},
    };
    grpc_channel_args channel_args = {KVD_LEN(args), args};
    r->server = grpc_server_create(&channel_args, NULL);
    grpc_resource_quota_unref(quota);
    r->cq = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(r->server, r->cq, NULL);
    for (uint32_t i = 0; i < d->n_methods; i++)
        r->registered[i] = grpc_server_register_method(
            r->server, d->methods[i].path, NULL, GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
    int rc = kvd_links_init(d, err);
    if (rc == KVD_OK && d->config.tls_cert[0])
        rc = kvd_tls_init(d, kvd_links_accept_tls, err);
    for (uint32_t i = 0; i < d->config.n_listen && rc == KVD_OK; i++)
        rc = add_port(d, d->config.listen[i], err);
    return rc;
}

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    int rc = uv_thread_create(&d->rpc->thread, queue_thread, d);
    if (rc)
        return kvd_fail(err, KVD_E_LOST, "cannot start a thread: %s", uv_strerror(rc));
    d->rpc->thread_running = true;
    grpc_server_start(d->rpc->server);
    for (uint32_t i = 0; i < d->n_methods; i++)
        for (int j = 0; j < ARMED; j++)
            kvd_call_arm(d, i);
    kvd_call_arm_unknown(d);
    return KVD_OK;
}

static void on_server_down(struct kvd_tag *tag, bool ok)
{
    struct kvd_rpc *r = (struct kvd_rpc *)((uint8_t *)tag - offsetof(struct kvd_rpc, shutdown_tag));
    (void)ok;
    grpc_completion_queue_shutdown(r->cq);
}

// Cancels what is left, until gRPC has let go of everything. It waits for what it has begun to
// write, which a worker that is stopped never reads: whoever is there yet in a while is cut off.
static void shut(struct kvd_daemon *d)
{
    struct kvd_rpc *r = d->rpc;
    kvd_listen_close(d, KVD_LISTEN_GRPC);
    kvd_tls_shut(d);
    r->stopping = true;
    kvd_tag_arm(&r->shutdown_tag, on_server_down);
    grpc_server_shutdown_and_notify(r->server, r->cq, &r->shutdown_tag);
    grpc_server_cancel_all_calls(r->server);
    uv_timer_start(&r->timer, on_tick, PARTING_MS, TICK_MS);
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    if (--d->rpc->handles)
        return;
    free(d->rpc);
    d->rpc = NULL;
}

static void end(struct kvd_daemon *d)
{
    struct kvd_rpc *r = d->rpc;
    if (!r || uv_is_closing((uv_handle_t *)&r->async))
        return;
    kvd_listen_close(d, KVD_LISTEN_GRPC);
    if (r->thread_running) {
        uv_thread_join(&r->thread);
    } else {
        // Never started: shut down here, by hand.
        grpc_server_shutdown_and_notify(r->server, r->cq, &r->shutdown_tag);
        grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        grpc_completion_queue_shutdown(r->cq);
        while (grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
               GRPC_QUEUE_SHUTDOWN)
            continue;
    }
    grpc_server_destroy(r->server);
    grpc_completion_queue_destroy(r->cq);
    grpc_shutdown();
    kvd_links_deinit(d);
    kvd_tls_deinit(d);
    uv_mutex_destroy(&r->lock);
    uv_close((uv_handle_t *)&r->async, on_handle_closed);
    uv_close((uv_handle_t *)&r->timer, on_handle_closed);
    uv_close((uv_handle_t *)&r->idle, on_handle_closed);
}

static bool busy(const struct kvd_daemon *d)
{
    return d->rpc->stopping && !d->rpc->shut;
}

static const char *method_name(const struct kvd_daemon *d, uint32_t i)
{
    return i < d->n_methods ? d->methods[i].path + 1 : "unknown";
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    static const char *const reasons[KVD_REFUSED_COUNT] = {"pool", "quota", "limit"};
    const struct kvd_metrics *m = &d->metrics;
    kvd_metric_head(f, "kvd_rpc_requests_total", "counter",
                    "Calls answered, by method and gRPC code.");
    for (uint32_t i = 0; i < KVD_MAX_METHODS; i++)
        for (int c = 0; c < KVD_GRPC_CODES; c++)
            if (m->calls[i][c])
                fprintf(f, "kvd_rpc_requests_total{method=\"%s\",code=\"%s\"} %" PRIu64 "\n",
                        method_name(d, i), kvd_grpc_code_name(c), m->calls[i][c]);
    kvd_metric_head(f, "kvd_rpc_duration_seconds", "histogram",
                    "From a call's arrival to its answer.");
    for (uint32_t i = 0; i < d->n_methods; i++) {
        char labels[128];
        if (!m->rpc[i].count)
            continue;
        snprintf(labels, sizeof(labels), "method=\"%s\"", method_name(d, i));
        kvd_metric_histogram(f, "kvd_rpc_duration_seconds", labels, &m->rpc[i]);
    }
    kvd_metric_head(f, "kvd_refused_calls_total", "counter",
                    "Calls refused for want of room: in the pool, in the namespace's quota, within "
                    "a limit.");
    for (int i = 0; i < KVD_REFUSED_COUNT; i++)
        fprintf(f, "kvd_refused_calls_total{reason=\"%s\"} %" PRIu64 "\n", reasons[i],
                m->refused[i]);
    kvd_metric(f, "kvd_events_lost_total", "counter", "Events dropped as their reader was slow.",
               (double)m->events_lost);
}

const struct kvd_part kvd_part_rpc = {
    .init = init, .start = start, .shut = shut, .busy = busy, .end = end, .metrics = metrics};
