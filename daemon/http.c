// /metrics, /healthz and /readyz, by libmicrohttpd driven from the loop: its epoll fd is polled, so
// no thread and no lock is wanted.
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>

#include "daemon/kvd.h"

struct kvd_http {
    struct MHD_Daemon *mhd;
    uv_poll_t poll;
    uv_timer_t timer;
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

static enum MHD_Result on_request(void *ctx, struct MHD_Connection *c, const char *url,
                                  const char *method, const char *version, const char *upload,
                                  size_t *upload_size, void **state)
{
    struct kvd_daemon *d = ctx;
    (void)version;
    (void)upload;
    (void)state;
    *upload_size = 0;
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
    if (strcmp(url, "/readyz") == 0 && d->state == KVD_READY)
        return send_text(c, MHD_HTTP_OK, "ready\n", false, "text/plain");
    if (strcmp(url, "/readyz") == 0)
        return send_text(c, MHD_HTTP_SERVICE_UNAVAILABLE, "draining\n", false, "text/plain");
    return send_text(c, MHD_HTTP_NOT_FOUND, "there are /metrics, /healthz and /readyz\n", false,
                     "text/plain");
}

static void work(struct kvd_daemon *d);

static void on_timer(uv_timer_t *timer)
{
    work(timer->data);
}

// Lets libmicrohttpd do what it can; comes back in time for its next timeout, if it has one.
static void work(struct kvd_daemon *d)
{
    MHD_UNSIGNED_LONG_LONG ms;
    MHD_run(d->http->mhd);
    if (MHD_get_timeout(d->http->mhd, &ms) == MHD_YES)
        uv_timer_start(&d->http->timer, on_timer, ms, 0);
    else
        uv_timer_stop(&d->http->timer);
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

static int resolve(const char *where, struct addrinfo **out, struct kvd_error *err)
{
    char host[KVD_CONFIG_TEXT];
    snprintf(host, sizeof(host), "%s", where);
    char *colon = strrchr(host, ':');
    if (!colon)
        return kvd_fail(err, KVD_E_INVALID, "metrics: '%s' is not possible; it wants HOST:PORT",
                        where);
    *colon = '\0';
    char *name = host;
    if (name[0] == '[' && colon > name && colon[-1] == ']') {
        colon[-1] = '\0';
        name++;
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    int rc = getaddrinfo(*name ? name : NULL, colon + 1, &hints, out);
    return rc ? kvd_fail(err, KVD_E_INVALID, "metrics: '%s': %s", where, gai_strerror(rc)) : KVD_OK;
}

int kvd_http_init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct addrinfo *ai;
    if (!d->config.metrics[0])
        return KVD_OK;
    int rc = resolve(d->config.metrics, &ai, err);
    if (rc)
        return rc;
    struct kvd_http *h = calloc(1, sizeof(*h));
    unsigned flags =
        MHD_USE_EPOLL | MHD_USE_ERROR_LOG | (ai->ai_family == AF_INET6 ? MHD_USE_IPv6 : 0);
    if (h)
        h->mhd =
            MHD_start_daemon(flags, 0, NULL, NULL, on_request, d, MHD_OPTION_EXTERNAL_LOGGER,
                             on_mhd_log, NULL, MHD_OPTION_SOCK_ADDR, ai->ai_addr,
                             MHD_OPTION_CONNECTION_LIMIT, 64u, MHD_OPTION_CONNECTION_TIMEOUT, 10u,
                             MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)16384, MHD_OPTION_END);
    freeaddrinfo(ai);
    if (!h || !h->mhd) {
        free(h);
        return kvd_fail(err, KVD_E_UNAVAILABLE,
                        "cannot serve metrics on %s: %s; choose another with --metrics HOST:PORT",
                        d->config.metrics, strerror(errno));
    }
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->mhd, MHD_DAEMON_INFO_EPOLL_FD);
    const union MHD_DaemonInfo *port = MHD_get_daemon_info(h->mhd, MHD_DAEMON_INFO_BIND_PORT);
    if (port && strlen(d->config.metrics) > 2 && strcmp(strrchr(d->config.metrics, ':'), ":0") == 0)
        snprintf(strrchr(d->config.metrics, ':'), 8, ":%u", port->port); // the one the kernel chose
    d->http = h;
    uv_poll_init(&d->loop, &h->poll, info->epoll_fd);
    h->poll.data = d;
    uv_poll_start(&h->poll, UV_READABLE, on_poll);
    uv_timer_init(&d->loop, &h->timer);
    h->timer.data = d;
    return KVD_OK;
}

static void free_http(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(d->http);
    d->http = NULL;
}

void kvd_http_deinit(struct kvd_daemon *d)
{
    struct kvd_http *h = d->http;
    if (!h)
        return;
    uv_poll_stop(&h->poll);
    MHD_stop_daemon(h->mhd);
    uv_close((uv_handle_t *)&h->timer, NULL);
    uv_close((uv_handle_t *)&h->poll, free_http);
}
