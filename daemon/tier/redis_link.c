#include "daemon/tier/redis_link.h"

#include <errno.h>
#include <sys/socket.h>
#include <utlist.h>

enum { AT_ONCE = 4 }; // values, before others have their turn

// A command that waits for a value before it, or whose value is on its way.
struct said {
    redisCallbackFn *fn;
    void *ctx;
    char *text; // hiredis's; NULL: it is `head`
    char head[256];
    size_t n;             // of that; a value follows it
    const uint8_t *value; // what is left of it; NULL: there is none
    size_t left;
    char tail[64]; // behind the value
    struct said *prev, *next;
};

struct link {
    uv_poll_t poll;
    redisAsyncContext *c; // NULL: it is gone
    int wanted;           // events, of hiredis
    struct said *line;
    struct said *sending; // hiredis has its beginning, and nothing behind that
};

static struct link *link_of(const redisAsyncContext *c)
{
    return c->ev.data;
}

static void said_free(struct said **sp)
{
    struct said *s = KVD_TAKE(*sp);
    if (s && s->text)
        redisFreeCommand(s->text);
    free(s);
}

// Gives hiredis what may go now. What it does not take, as it is closing, stays.
static void pass_on(struct link *l)
{
    while (l->line && !l->sending) {
        struct said *s = l->line;
        if (redisAsyncFormattedCommand(l->c, s->fn, s->ctx, s->text ? s->text : s->head, s->n))
            return;
        DL_DELETE(l->line, s);
        if (s->value)
            l->sending = s;
        else
            said_free(&s);
    }
}

// -- events -------------------------------------------------------------------------------------

static void on_poll(uv_poll_t *poll, int status, int events);

static void poll_again(struct link *l)
{
    int events = l->wanted | (l->sending ? UV_WRITABLE : 0);
    if (events)
        uv_poll_start(&l->poll, events, on_poll);
    else
        uv_poll_stop(&l->poll);
}

static void want(struct link *l, int events)
{
    if (l->wanted == events)
        return;
    l->wanted = events;
    poll_again(l);
}

static void add_read(void *link)
{
    struct link *l = link;
    want(l, l->wanted | UV_READABLE);
}

static void del_read(void *link)
{
    struct link *l = link;
    want(l, l->wanted & ~UV_READABLE);
}

static void add_write(void *link)
{
    struct link *l = link;
    want(l, l->wanted | UV_WRITABLE);
}

static void del_write(void *link)
{
    struct link *l = link;
    want(l, l->wanted & ~UV_WRITABLE);
}

// Some of a value. False: the socket takes no more, or is broken, which hiredis will read.
static bool write_value(struct link *l)
{
    struct said *s = l->sending;
    ssize_t n = send(l->c->c.fd, s->value, s->left, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        shutdown(l->c->c.fd, SHUT_RDWR);
    if (n < 0)
        return errno == EINTR;
    s->value += n;
    s->left -= (size_t)n;
    return true;
}

// hiredis writes its own first, and wants to write no more when that is out.
static void on_writable(struct link *l)
{
    for (int i = 0; i < AT_ONCE && l->c; i++) {
        redisAsyncHandleWrite(l->c);
        if (!l->c || !l->sending || l->wanted & UV_WRITABLE)
            return;
        while (l->sending->left)
            if (!write_value(l))
                return;
        redisAppendFormattedCommand(&l->c->c, l->sending->tail, strlen(l->sending->tail));
        said_free(&l->sending);
        l->wanted |= UV_WRITABLE;
        pass_on(l);
        poll_again(l);
    }
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct link *l = poll->data;
    // What is wrong with the connection, it finds itself.
    if (l->c && (status || events & UV_READABLE))
        redisAsyncHandleRead(l->c);
    if (l->c && events & UV_WRITABLE)
        on_writable(l);
}

// -- its life -----------------------------------------------------------------------------------

static void on_closed(uv_handle_t *poll)
{
    free(poll->data);
}

// All that hiredis had has been answered by then.
static void cleanup(void *link)
{
    struct link *l = link;
    struct said *s, *tmp;
    redisAsyncContext *c = KVD_TAKE(l->c);
    said_free(&l->sending);
    DL_FOREACH_SAFE(l->line, s, tmp)
    {
        DL_DELETE(l->line, s);
        s->fn(c, NULL, s->ctx);
        said_free(&s);
    }
    uv_close((uv_handle_t *)&l->poll, on_closed);
}

int kvd_redis_link_attach(redisAsyncContext *c, uv_loop_t *loop)
{
    struct link *l = calloc(1, sizeof(*l));
    if (!l || uv_poll_init(loop, &l->poll, c->c.fd)) {
        free(l);
        return -1;
    }
    l->poll.data = l;
    l->c = c;
    c->ev.data = l;
    c->ev.addRead = add_read;
    c->ev.delRead = del_read;
    c->ev.addWrite = add_write;
    c->ev.delWrite = del_write;
    c->ev.cleanup = cleanup;
    return 0;
}

// -- commands -----------------------------------------------------------------------------------

static int say(redisAsyncContext *c, struct said *s)
{
    struct link *l = link_of(c);
    DL_APPEND(l->line, s);
    pass_on(l);
    return 0;
}

static struct said *said_new(redisCallbackFn *fn, void *ctx)
{
    struct said *s = calloc(1, sizeof(*s));
    if (s)
        *s = (struct said){.fn = fn, .ctx = ctx};
    return s;
}

static struct said *said_format(redisCallbackFn *fn, void *ctx, const char *fmt, va_list ap)
{
    struct said *s = said_new(fn, ctx);
    int n = s ? redisvFormatCommand(&s->text, fmt, ap) : -1;
    if (n < 0) {
        free(s);
        return NULL;
    }
    s->n = (size_t)n;
    return s;
}

int kvd_redis_link_say(redisAsyncContext *c, redisCallbackFn *fn, void *ctx, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    struct said *s = said_format(fn, ctx, fmt, ap);
    va_end(ap);
    return s ? say(c, s) : -1;
}

int kvd_redis_link_set(redisAsyncContext *c, redisCallbackFn *fn, void *ctx, const char *key,
                       const uint8_t *value, size_t n, uint64_t ttl_s)
{
    char ttl[24];
    struct said *s = said_new(fn, ctx);
    if (!s)
        return -1;
    // The key is short: KVD_TIER_REDIS_PREFIX and 64 digits.
    s->n =
        (size_t)snprintf(s->head, sizeof(s->head), "*%d\r\n$3\r\nSET\r\n$%zu\r\n%.128s\r\n$%zu\r\n",
                         ttl_s ? 5 : 3, strlen(key), key, n);
    s->value = value;
    s->left = n;
    int digits = snprintf(ttl, sizeof(ttl), "%" PRIu64, ttl_s);
    if (ttl_s)
        snprintf(s->tail, sizeof(s->tail), "\r\n$2\r\nEX\r\n$%d\r\n%s\r\n", digits, ttl);
    else
        snprintf(s->tail, sizeof(s->tail), "\r\n");
    return say(c, s);
}

bool kvd_redis_link_sends(const redisAsyncContext *c, const void *ctx)
{
    const struct link *l = link_of(c);
    return l && l->sending && l->sending->ctx == ctx;
}

void kvd_redis_link_cut(redisAsyncContext *c)
{
    struct link *l = link_of(c);
    if (!l || !l->sending)
        return;
    l->sending->value = NULL;
    l->sending->left = 0;
    shutdown(c->c.fd, SHUT_RDWR);
}
