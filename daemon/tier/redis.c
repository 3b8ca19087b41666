// One thread; state belongs to it, but for the line by which operations come.
#include "daemon/tier/redis.h"

#include <errno.h>
#include <time.h>
#include <utlist.h>

#include "daemon/core/config_tiers.h"
#include "daemon/core/log.h"
#include "daemon/tier/redis_link.h"

enum {
    MOST_RUNNING = 16,
    TICK_MS = 50,
    // Where nothing waits for it: that a server has to answer, and until it is tried again.
    IDLE_MS = 5000,
    FLUSH_BATCH = 500,
    // Of puts, so that not all that is asked meanwhile waits behind them.
    MOST_OUT_BYTES = 4 << 20,
    // What hiredis reads into is kept up to here, instead of growing anew for each block.
    KEPT_IN_BYTES = 8 << 20,
    KEY_TEXT = sizeof(KVD_TIER_REDIS_PREFIX) + KVD_TIER_KEY_TEXT,
};

struct redis {
    struct kvd_redis_url url;
    char user[128], password[512];
    pthread_t thread;
    pthread_mutex_t lock; // of the three that follow
    struct kvd_tier_op *line;
    bool ending;
    char down[128]; // why the last connection was not to be had; "": it was, or none has been tried
    uv_async_t wake;
    // The thread's
    uv_loop_t loop;
    uv_timer_t timer;
    redisAsyncContext *server; // NULL: not connected
    bool ready;                // connected, and logged in
    struct kvd_tier_op *waiting, *sent;
    uint64_t out_bytes; // of puts that are sent
    uint64_t began_ms;  // the connection
    char why[128];      // it was lost
    bool tried, warned; // a first one; that it was not to be had
};

static void where(const struct redis *r, char out[256])
{
    if (r->url.port)
        snprintf(out, 256, "%.200s:%u/%u", r->url.host, r->url.port, r->url.database);
    else
        snprintf(out, 256, "unix:%.200s", r->url.host);
}

// -- operations that are sent -------------------------------------------------------------------

static void unsent(struct redis *r, struct kvd_tier_op *op)
{
    DL_DELETE(r->sent, op);
    r->out_bytes -= op->verb == KVD_TIER_PUT ? op->bytes : 0;
}

static void finish(struct redis *r, struct kvd_tier_op *op, enum kvd_tier_result result)
{
    unsent(r, op);
    kvd_tier_finish(op, result);
}

static void fail(struct redis *r, struct kvd_tier_op *op, enum kvd_tier_result result,
                 const char *why)
{
    unsent(r, op);
    kvd_tier_fail(op, result, "%s:%u: %.90s", r->url.host, r->url.port, why);
}

// Whether the reply can be gone on with; otherwise the operation is failed.
static bool good(struct redis *r, struct kvd_tier_op *op, const redisReply *reply)
{
    if (!reply) {
        fail(r, op, KVD_TIER_FAILED, *r->why ? r->why : "the connection was lost");
        return false;
    }
    if (reply->type != REDIS_REPLY_ERROR)
        return true;
    if (strncmp(reply->str, "OOM", 3) == 0)
        fail(r, op, KVD_TIER_FULL, reply->str);
    else if (strncmp(reply->str, "MOVED", 5) == 0 || strncmp(reply->str, "CLUSTERDOWN", 11) == 0)
        fail(r, op, KVD_TIER_FAILED, "it is a cluster; only single servers are possible");
    else
        fail(r, op, KVD_TIER_FAILED, reply->str);
    return false;
}

static void key_text(const struct kvd_tier_key *key, char out[KEY_TEXT])
{
    char hex[KVD_TIER_KEY_TEXT];
    kvd_hex(key->bytes, sizeof(key->bytes), hex);
    snprintf(out, KEY_TEXT, "%s%s", KVD_TIER_REDIS_PREFIX, hex);
}

static void send_more(struct redis *r);

static void on_done(redisAsyncContext *c, void *reply, void *ctx)
{
    struct kvd_tier_op *op = ctx;
    struct redis *r = c->data;
    if (good(r, op, reply))
        finish(r, op, KVD_TIER_OK);
    if (reply)
        send_more(r);
}

static void hang_up(struct redis *r, const char *why);

// What is said of a value before all of it was sent is a refusal, and what follows would be taken
// for something else.
static void on_set(redisAsyncContext *c, void *reply, void *ctx)
{
    bool early = reply && kvd_redis_link_sends(c, ctx);
    on_done(c, reply, ctx);
    if (early)
        hang_up(c->data, "it said no amid a block");
}

static void on_nothing(redisAsyncContext *c, void *reply, void *ctx)
{
    (void)c;
    (void)reply;
    (void)ctx;
}

static void drop_damaged(struct redis *r, struct kvd_tier_op *op)
{
    char key[KEY_TEXT];
    key_text(&op->keys[0], key);
    kvd_redis_link_say(r->server, on_nothing, NULL, "UNLINK %s", key);
}

static void on_got(redisAsyncContext *c, void *answer, void *ctx)
{
    struct kvd_tier_op *op = ctx;
    struct redis *r = c->data;
    const redisReply *reply = answer;
    struct kvd_error err = {0};
    // Somebody has put a list or the like there: not the server's fault.
    bool wrong =
        reply && reply->type == REDIS_REPLY_ERROR && strncmp(reply->str, "WRONGTYPE", 9) == 0;
    if (wrong) {
        drop_damaged(r, op);
        fail(r, op, KVD_TIER_DAMAGED, reply->str);
        return;
    }
    if (!good(r, op, reply))
        return;
    if (reply->type == REDIS_REPLY_STRING && reply->len == 0) {
        finish(r, op, KVD_TIER_MISS);
        return;
    }
    size_t n;
    op->block = kvd_block_new_in(op->settings.memory, op->bytes);
    if (!op->block) {
        fail(r, op, KVD_TIER_FAILED, "out of memory");
        return;
    }
    uint8_t *value = kvd_block_value(op->block, &n);
    int rc;
    if (reply->type != REDIS_REPLY_STRING || reply->len != n) {
        rc = kvd_fail(&err, KVD_E_CORRUPT, "the value is of another length");
    } else {
        memcpy(value, reply->str, n);
        rc = kvd_block_verify(op->block, op->settings.secret, &op->keys[0], op->layout,
                              (uint64_t)time(NULL), op->settings.ttl_s, &err);
    }
    if (rc) {
        kvd_block_unref(&op->block);
        drop_damaged(r, op);
        fail(r, op, rc == KVD_E_CORRUPT ? KVD_TIER_DAMAGED : KVD_TIER_MISS, err.text);
        return;
    }
    finish(r, op, KVD_TIER_OK);
}

// One of a HAS's replies, which come in order: left counts down.
static void on_has(redisAsyncContext *c, void *answer, void *ctx)
{
    struct kvd_tier_op *op = ctx;
    struct redis *r = c->data;
    const redisReply *reply = answer;
    bool bad = !reply || reply->type != REDIS_REPLY_INTEGER;
    op->has[op->n - op->left] = !bad && reply->integer == 1;
    if (bad && !op->why[0])
        snprintf(op->why, sizeof(op->why), "%.100s", reply && reply->str ? reply->str : r->why);
    if (--op->left)
        return;
    if (op->why[0])
        finish(r, op, KVD_TIER_FAILED);
    else
        finish(r, op, KVD_TIER_OK);
}

static void on_scanned(redisAsyncContext *c, void *reply, void *ctx);

static int scan(struct redis *r, struct kvd_tier_op *op)
{
    return kvd_redis_link_say(r->server, on_scanned, op, "SCAN %s MATCH %s* COUNT %d",
                              op->cursor[0] ? op->cursor : "0", KVD_TIER_REDIS_PREFIX, FLUSH_BATCH);
}

static void on_scanned(redisAsyncContext *c, void *answer, void *ctx)
{
    struct kvd_tier_op *op = ctx;
    struct redis *r = c->data;
    const redisReply *reply = answer;
    if (!good(r, op, reply))
        return;
    if (reply->type != REDIS_REPLY_ARRAY || reply->elements != 2 ||
        reply->element[0]->type != REDIS_REPLY_STRING ||
        reply->element[1]->type != REDIS_REPLY_ARRAY) {
        fail(r, op, KVD_TIER_FAILED, "SCAN has another reply than it should");
        return;
    }
    const redisReply *keys = reply->element[1];
    for (size_t i = 0; i < keys->elements; i++)
        if (keys->element[i]->type == REDIS_REPLY_STRING)
            kvd_redis_link_say(r->server, on_nothing, NULL, "UNLINK %b", keys->element[i]->str,
                               keys->element[i]->len);
    snprintf(op->cursor, sizeof(op->cursor), "%s", reply->element[0]->str);
    op->began_ms = uv_now(&r->loop);
    if (strcmp(op->cursor, "0") == 0)
        finish(r, op, KVD_TIER_OK);
    else if (scan(r, op))
        fail(r, op, KVD_TIER_FAILED, "the connection was lost");
}

static int send_put(struct redis *r, struct kvd_tier_op *op, const char *key)
{
    size_t n;
    const uint8_t *value = kvd_block_value(op->block, &n);
    return kvd_redis_link_set(r->server, on_set, op, key, value, n, op->settings.ttl_s);
}

static int send_has(struct redis *r, struct kvd_tier_op *op)
{
    char key[KEY_TEXT];
    op->left = op->n;
    op->why[0] = '\0';
    for (uint32_t i = 0; i < op->n; i++) {
        key_text(&op->keys[i], key);
        if (kvd_redis_link_say(r->server, on_has, op, "EXISTS %s", key))
            return i == 0 ? -1 : 0; // those that were sent come back without a reply
    }
    return 0;
}

// Sealing is for the thread, as it takes long.
static void send_op(struct redis *r, struct kvd_tier_op *op)
{
    struct kvd_error err = {0};
    char key[KEY_TEXT];
    int rc;
    DL_APPEND(r->sent, op);
    r->out_bytes += op->verb == KVD_TIER_PUT ? op->bytes : 0;
    op->began_ms = uv_now(&r->loop);
    if (op->n)
        key_text(&op->keys[0], key);
    if (op->verb == KVD_TIER_PUT && kvd_block_seal(op->block, op->settings.secret, &op->keys[0],
                                                   op->layout, (uint64_t)time(NULL), &err)) {
        fail(r, op, KVD_TIER_FAILED, err.text);
        return;
    }
    switch (op->verb) {
    case KVD_TIER_PUT:
        rc = send_put(r, op, key);
        break;
    case KVD_TIER_GET:
        // No more than a block has, whatever somebody has put there.
        rc = kvd_redis_link_say(r->server, on_got, op, "GETRANGE %s 0 %d", key,
                                (int)(KVD_BLOCK_HEADER + op->bytes));
        break;
    case KVD_TIER_HAS:
        rc = send_has(r, op);
        break;
    case KVD_TIER_DROP:
        rc = kvd_redis_link_say(r->server, on_done, op, "UNLINK %s", key);
        break;
    default:
        rc = scan(r, op);
    }
    if (rc)
        fail(r, op, KVD_TIER_FAILED, "the connection was lost");
}

// Sends what waits, puts as far as there is room for them.
static void send_more(struct redis *r)
{
    struct kvd_tier_op *op, *tmp;
    DL_FOREACH_SAFE(r->waiting, op, tmp)
    if (op->verb != KVD_TIER_PUT || !r->out_bytes || r->out_bytes + op->bytes <= MOST_OUT_BYTES) {
        DL_DELETE(r->waiting, op);
        send_op(r, op);
    }
}

// -- the connection -----------------------------------------------------------------------------

static void fail_waiting(struct redis *r)
{
    struct kvd_tier_op *op, *tmp;
    DL_FOREACH_SAFE(r->waiting, op, tmp)
    {
        DL_DELETE(r->waiting, op);
        kvd_tier_fail(op, KVD_TIER_FAILED, "%s:%u: %.90s", r->url.host, r->url.port, r->why);
    }
}

// Notes that the server is there, or why it is not (NULL). Without operations nobody else would
// tell of that, so the first time it is logged.
static void note_server(struct redis *r, const char *down)
{
    char text[256];
    pthread_mutex_lock(&r->lock);
    snprintf(r->down, sizeof(r->down), "%s", down ? down : "");
    pthread_mutex_unlock(&r->lock);
    where(r, text);
    if (down && !r->tried)
        kvd_warning("tier redis: %s: %s: it misses until that is mended", text, down);
    if (!down && r->warned)
        kvd_notice("tier redis: %s answers", text);
    r->warned = down && (!r->tried || r->warned);
    r->tried = true;
}

static void hang_up(struct redis *r, const char *why)
{
    redisAsyncContext *c = KVD_TAKE(r->server);
    snprintf(r->why, sizeof(r->why), "%s", why);
    r->ready = false;
    if (c) {
        kvd_redis_link_cut(c);
        redisAsyncFree(c); // all that was sent comes back without a reply
    }
    fail_waiting(r);
}

static void on_disconnect(const redisAsyncContext *c, int status)
{
    struct redis *r = c->data;
    if (r->server != c)
        return;
    (void)status;
    if (!*r->why)
        snprintf(r->why, sizeof(r->why), "the connection was lost");
    if (!r->ready)
        note_server(r, r->why);
    r->server = NULL; // hiredis frees it
    r->ready = false;
    fail_waiting(r);
}

static void on_connect(const redisAsyncContext *c, int status)
{
    struct redis *r = c->data;
    if (r->server != c || status == REDIS_OK)
        return;
    snprintf(r->why, sizeof(r->why), "%.100s", c->errstr ? c->errstr : "no connection");
    note_server(r, r->why);
    r->server = NULL; // hiredis frees it
    r->ready = false;
    fail_waiting(r);
}

// To PING, the last of what is said at the beginning: the server is there, and lets us in.
static void on_ready(redisAsyncContext *c, void *answer, void *ctx)
{
    struct redis *r = c->data;
    const redisReply *reply = answer;
    (void)ctx;
    if (!reply || r->server != c)
        return;
    if (reply->type == REDIS_REPLY_ERROR) {
        snprintf(r->why, sizeof(r->why), "%.120s", reply->str);
        note_server(r, r->why);
        fail_waiting(r);
        r->server = NULL;
        redisAsyncFree(c);
        return;
    }
    r->ready = true;
    note_server(r, NULL);
    send_more(r);
}

// To AUTH and SELECT: an error is the reason, and what follows will not be asked.
static void on_greeting(redisAsyncContext *c, void *answer, void *ctx)
{
    const redisReply *reply = answer;
    if (reply && reply->type == REDIS_REPLY_ERROR)
        on_ready(c, answer, ctx);
}

static void connect_server(struct redis *r)
{
    redisAsyncContext *c = r->url.port ? redisAsyncConnect(r->url.host, (int)r->url.port)
                                       : redisAsyncConnectUnix(r->url.host);
    r->why[0] = '\0';
    r->began_ms = uv_now(&r->loop);
    if (c && c->err) {
        snprintf(r->why, sizeof(r->why), "%.100s", c->errstr);
        redisAsyncFree(c);
        c = NULL;
    } else if (!c || kvd_redis_link_attach(c, &r->loop)) {
        snprintf(r->why, sizeof(r->why), "out of memory");
        if (c)
            redisAsyncFree(c);
        c = NULL;
    }
    if (!c) {
        note_server(r, r->why);
        fail_waiting(r);
        return;
    }
    c->data = r;
    c->c.reader->maxbuf = KEPT_IN_BYTES;
    r->server = c;
    redisAsyncSetConnectCallback(c, on_connect);
    redisAsyncSetDisconnectCallback(c, on_disconnect);
    if (r->user[0])
        kvd_redis_link_say(c, on_greeting, NULL, "AUTH %s %s", r->user, r->password);
    else if (r->password[0])
        kvd_redis_link_say(c, on_greeting, NULL, "AUTH %s", r->password);
    if (r->url.database)
        kvd_redis_link_say(c, on_greeting, NULL, "SELECT %u", r->url.database);
    kvd_redis_link_say(c, on_ready, NULL, "PING");
}

// -- the thread ---------------------------------------------------------------------------------

static void tick(uv_timer_t *timer);

// Nothing waits. One that was not to be had is tried again, so that what is told of it is true.
static void rest(struct redis *r)
{
    if (!r->down[0]) {
        uv_timer_stop(&r->timer);
    } else if (uv_timer_get_repeat(&r->timer) == TICK_MS) {
        uv_timer_start(&r->timer, tick, IDLE_MS, IDLE_MS);
    } else {
        connect_server(r);
        uv_timer_start(&r->timer, tick, TICK_MS, TICK_MS);
    }
}

// A server that says nothing for twice the time that operations have is hung up on, as their blocks
// are held until it answers.
static void tick(uv_timer_t *timer)
{
    struct redis *r = timer->data;
    const struct kvd_tier_op *oldest = r->ready ? r->sent : r->waiting;
    uint64_t since = r->ready && oldest ? oldest->began_ms : r->began_ms;
    uint64_t most = oldest ? 2 * oldest->settings.timeout_ms : IDLE_MS;
    bool connecting = r->server && !r->ready;
    if (!r->sent && !r->waiting && !connecting)
        rest(r);
    if (!r->server || (!oldest && !connecting) || uv_now(&r->loop) - since <= most)
        return;
    if (connecting)
        note_server(r, "it does not answer");
    hang_up(r, "it does not answer");
}

static void on_wake(uv_async_t *wake)
{
    struct redis *r = wake->data;
    struct kvd_tier_op *op, *tmp;
    pthread_mutex_lock(&r->lock);
    struct kvd_tier_op *line = KVD_TAKE(r->line);
    bool ending = r->ending;
    pthread_mutex_unlock(&r->lock);
    DL_FOREACH_SAFE(line, op, tmp)
    DL_APPEND(r->waiting, op);
    if (r->ready && !ending)
        send_more(r);
    bool ticks =
        uv_is_active((uv_handle_t *)&r->timer) && uv_timer_get_repeat(&r->timer) == TICK_MS;
    if (line && !ticks)
        uv_timer_start(&r->timer, tick, TICK_MS, TICK_MS);
    if (ending) {
        hang_up(r, "kvd stops");
        uv_close((uv_handle_t *)&r->wake, NULL);
        uv_close((uv_handle_t *)&r->timer, NULL);
    } else if (r->waiting && !r->server) {
        connect_server(r);
    }
}

// The first connection is made at once: whether a server is there is known before it is wanted.
static void *thread_main(void *arg)
{
    struct redis *r = arg;
    connect_server(r);
    uv_timer_start(&r->timer, tick, TICK_MS, TICK_MS);
    uv_run(&r->loop, UV_RUN_DEFAULT); // until on_wake has closed all
    uv_loop_close(&r->loop);
    return NULL;
}

static void redis_free(struct redis *r)
{
    pthread_mutex_destroy(&r->lock);
    explicit_bzero(r->password, sizeof(r->password));
    free(r);
}

void *kvd_tier_redis_new(const char *url, const char *auth, struct kvd_error *err)
{
    struct redis *r = calloc(1, sizeof(*r));
    const char *colon = strchr(auth, ':');
    if (!r) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    pthread_mutex_init(&r->lock, NULL);
    snprintf(r->user, sizeof(r->user), "%.*s", colon ? (int)(colon - auth) : 0, auth);
    snprintf(r->password, sizeof(r->password), "%s", colon ? colon + 1 : auth);
    if (kvd_redis_url_parse(url, &r->url, err)) {
        redis_free(r);
        return NULL;
    }
    uv_loop_init(&r->loop);
    uv_async_init(&r->loop, &r->wake, on_wake);
    uv_timer_init(&r->loop, &r->timer);
    r->wake.data = r->timer.data = r;
    int rc = pthread_create(&r->thread, NULL, thread_main, r);
    if (rc) {
        kvd_fail(err, KVD_E_INTERNAL, "a thread for a tier: %s", strerror(rc));
        uv_close((uv_handle_t *)&r->wake, NULL);
        uv_close((uv_handle_t *)&r->timer, NULL);
        uv_run(&r->loop, UV_RUN_DEFAULT);
        uv_loop_close(&r->loop);
        redis_free(r);
        return NULL;
    }
    return r;
}

static void submit(void *state, struct kvd_tier_op *op)
{
    struct redis *r = state;
    pthread_mutex_lock(&r->lock);
    DL_APPEND(r->line, op);
    pthread_mutex_unlock(&r->lock);
    uv_async_send(&r->wake);
}

static bool redis_close(void *state, const struct timespec *deadline)
{
    struct redis *r = state;
    pthread_mutex_lock(&r->lock);
    r->ending = true;
    pthread_mutex_unlock(&r->lock);
    uv_async_send(&r->wake);
    if (pthread_timedjoin_np(r->thread, NULL, deadline)) {
        pthread_detach(r->thread); // it resolves a name; its state stays
        return false;
    }
    redis_free(r);
    return true;
}

static void status(void *state, struct kvd_tier_status *out)
{
    struct redis *r = state;
    where(r, out->where);
    pthread_mutex_lock(&r->lock);
    if (r->down[0])
        kvd_tier_down(out, "%s", r->down);
    pthread_mutex_unlock(&r->lock);
}

const struct kvd_tier_ops kvd_tier_redis_ops = {
    .name = "redis",
    .most_running = MOST_RUNNING,
    .submit = submit,
    .close = redis_close,
    .status = status,
};
