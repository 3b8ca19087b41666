// /metrics, /healthz and /readyz, by libmicrohttpd driven from the loop: its epoll fd is polled, so
// no thread and no lock is wanted.
//
// Connections are accepted here: one that comes is always taken, and the one that has waited
// longest for its client goes when there are too many. So neither idle nor dripping clients keep a
// health check out.
#include "daemon/service/http.h"

#include <errno.h>
#include <microhttpd.h>
#include <sys/socket.h>
#include <utlist.h>

#include "daemon/core/daemon.h"
#include "daemon/rpc/links.h"
#include "daemon/rpc/listen.h"
#include "daemon/service/page.h"

enum {
    MAX_PEERS = 64,
    PATIENCE_MS = 10000, // from a connection's start, or its latest request, to its next whole one
};

struct peer {
    int fd; // libmicrohttpd's
    uint64_t since_ms;
    struct peer *prev, *next;
};

struct kvd_http {
    struct MHD_Daemon *mhd;
    uv_poll_t poll;
    uv_timer_t timer;
    struct peer *peers; // the one with the oldest request first
    uint32_t n_peers;
    uint32_t handles;
};

static enum MHD_Result send_text(struct MHD_Connection *c, unsigned status, char *text,
                                 bool free_it, const char *type)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(
        strlen(text), text, free_it ? MHD_RESPMEM_MUST_FREE : MHD_RESPMEM_PERSISTENT);
    if (!r)
        return MHD_NO;
    MHD_add_response_header(r, "Content-Type", type);
    enum MHD_Result rc = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return rc;
}

// Ready is who takes new workers.
static enum MHD_Result send_ready(const struct kvd_daemon *d, struct MHD_Connection *c)
{
    char *text = d->state != KVD_READY ? "draining\n"
                 : kvd_listen_short(d) ? "short of descriptors: new connections are hung up on\n"
                 : !kvd_links_open(d)  ? "full: max-connections are open\n"
                                       : "ready\n";
    bool ready = strcmp(text, "ready\n") == 0;
    return send_text(c, ready ? MHD_HTTP_OK : MHD_HTTP_SERVICE_UNAVAILABLE, text, false,
                     "text/plain");
}

static void note_request(struct kvd_daemon *d, struct MHD_Connection *c)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct peer *p = info ? info->socket_context : NULL;
    if (!p)
        return;
    p->since_ms = kvd_now_ms(d);
    DL_DELETE(d->http->peers, p);
    DL_APPEND(d->http->peers, p);
}

static enum MHD_Result on_request(void *ctx, struct MHD_Connection *c, const char *url,
                                  const char *method, const char *version, const char *upload,
                                  size_t *upload_size, void **state)
{
    struct kvd_daemon *d = ctx;
    (void)version;
    (void)upload;
    (void)state;
    *upload_size = 0;
    note_request(d, c);
    if (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0)
        return send_text(c, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET\n", false, "text/plain");
    if (strcmp(url, "/metrics") == 0) {
        char *page = kvd_metrics_page(d);
        if (page)
            return send_text(c, MHD_HTTP_OK, page, true,
                             "text/plain; version=0.0.4; charset=utf-8");
        return send_text(c, MHD_HTTP_INTERNAL_SERVER_ERROR, "out of memory\n", false, "text/plain");
    }
    if (strcmp(url, "/healthz") == 0)
        return send_text(c, MHD_HTTP_OK, "ok\n", false, "text/plain");
    if (strcmp(url, "/readyz") == 0)
        return send_ready(d, c);
    return send_text(c, MHD_HTTP_NOT_FOUND, "there are /metrics, /healthz and /readyz\n", false,
                     "text/plain");
}

static void work(struct kvd_daemon *d);

static void on_timer(uv_timer_t *timer)
{
    work(timer->data);
}

// Hangs up; libmicrohttpd finds that out and forgets the connection.
static void hang_up(struct kvd_http *h, struct peer *p)
{
    shutdown(p->fd, SHUT_RDWR);
    p->since_ms = UINT64_MAX; // once is enough
    DL_DELETE(h->peers, p);
    DL_APPEND(h->peers, p);
}

static bool is_late(const struct kvd_daemon *d, const struct peer *p)
{
    return p->since_ms != UINT64_MAX && kvd_now_ms(d) - p->since_ms >= PATIENCE_MS;
}

// Lets libmicrohttpd do what it can; comes back in time for its next timeout or ours.
static void work(struct kvd_daemon *d)
{
    struct kvd_http *h = d->http;
    MHD_UNSIGNED_LONG_LONG ms;
    while (h->peers && is_late(d, h->peers))
        hang_up(h, h->peers);
    MHD_run(h->mhd);
    if (MHD_get_timeout(h->mhd, &ms) != MHD_YES)
        ms = PATIENCE_MS;
    if (h->peers)
        uv_timer_start(&h->timer, on_timer, KVD_MIN(ms, (MHD_UNSIGNED_LONG_LONG)1000), 0);
    else
        uv_timer_stop(&h->timer);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    work(poll->data);
}

static void on_mhd_log(void *ctx, const char *fmt, va_list ap)
{
    char text[256];
    (void)ctx;
    vsnprintf(text, sizeof(text), fmt, ap);
    kvd_debug("http %s", text);
}

static void on_connection(void *ctx, struct MHD_Connection *c, void **state,
                          enum MHD_ConnectionNotificationCode what)
{
    struct kvd_daemon *d = ctx;
    struct peer *p = *state;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        p = calloc(1, sizeof(*p));
        if (!p)
            return; // libmicrohttpd's own timeout is left for it
        p->fd = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
        p->since_ms = kvd_now_ms(d);
        DL_APPEND(d->http->peers, p);
        d->http->n_peers++;
        *state = p;
    } else if (p) {
        DL_DELETE(d->http->peers, p);
        d->http->n_peers--;
        free(p);
        *state = NULL;
    }
}

static void accepted(struct kvd_daemon *d, int fd)
{
    struct sockaddr_storage addr = {0};
    socklen_t len = sizeof(addr);
    struct kvd_http *h = d->http;
    getpeername(fd, (struct sockaddr *)&addr, &len);
    if (h->n_peers >= MAX_PEERS && h->peers)
        hang_up(h, h->peers);
    MHD_add_connection(h->mhd, fd, (struct sockaddr *)&addr, len); // closes it if it fails
    work(d);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    uint16_t port;
    if (!d->config.metrics[0])
        return KVD_OK;
    struct kvd_http *h = calloc(1, sizeof(*h));
    unsigned flags = MHD_USE_EPOLL | MHD_USE_ERROR_LOG | MHD_USE_NO_LISTEN_SOCKET;
    if (h)
        h->mhd = MHD_start_daemon(
            flags, 0, NULL, NULL, on_request, d, MHD_OPTION_EXTERNAL_LOGGER, on_mhd_log, NULL,
            MHD_OPTION_NOTIFY_CONNECTION, on_connection, d, MHD_OPTION_CONNECTION_LIMIT,
            2u * MAX_PEERS, MHD_OPTION_CONNECTION_TIMEOUT, PATIENCE_MS / 1000u,
            MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)16384, MHD_OPTION_END);
    if (!h || !h->mhd) {
        free(h);
        return kvd_fail(err, KVD_E_UNAVAILABLE, "cannot serve metrics: %s", strerror(errno));
    }
    d->http = h;
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->mhd, MHD_DAEMON_INFO_EPOLL_FD);
    uv_poll_init(&d->loop, &h->poll, info->epoll_fd);
    h->poll.data = d;
    uv_poll_start(&h->poll, UV_READABLE, on_poll);
    uv_timer_init(&d->loop, &h->timer);
    h->timer.data = d;
    h->handles = 2;
    if (kvd_listen_tcp(d, KVD_LISTEN_HTTP, d->config.metrics, accepted, &port, err))
        return kvd_fail_in(err, "metrics (choose another address with --metrics HOST:PORT)");
    if (strcmp(strrchr(d->config.metrics, ':'), ":0") == 0)
        snprintf(strrchr(d->config.metrics, ':'), 8, ":%u", port); // the one the kernel chose
    return KVD_OK;
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    if (--d->http->handles == 0)
        free(KVD_TAKE(d->http));
}

static void end(struct kvd_daemon *d)
{
    struct kvd_http *h = d->http;
    if (!h)
        return;
    kvd_listen_close(d, KVD_LISTEN_HTTP);
    uv_poll_stop(&h->poll);
    MHD_stop_daemon(h->mhd);
    uv_close((uv_handle_t *)&h->timer, on_handle_closed);
    uv_close((uv_handle_t *)&h->poll, on_handle_closed);
}

const struct kvd_part kvd_part_http = {.init = init, .end = end};
