// The front of a tier: lines, limits, time, and leaving alone what fails.
//
//   asked → waits (gets before puts) → runs: with the back end → finished, on any thread
//     → the loop is woken → done
//
// What takes too long is answered with TIMEOUT and goes on running, given up: it counts as running
// until the back end gives it back, so a tier that hangs holds a bounded number of blocks. After
// FAILURES_IN_A_ROW the tier is left alone for a while that doubles; then one operation is let
// through to see.
#include <time.h>
#include <utlist.h>

#include "daemon/core/log.h"
#include "daemon/tier/backend.h"

enum {
    MOST_WAITING = 4096, // operations
    LOOKED_AT = 64,      // of the line of puts, for one that may run
    MOST_WAITING_PUT_BYTES = 256 << 20,
    EAGER_PUT_BYTES = 16 << 20, // that may wait where more are looked for
    FAILURES_IN_A_ROW = 3,
    BACKOFF_MS = 500, // the first
    MOST_BACKOFF_MS = 30000,
    FULL_PAUSE_MS = 5000, // without puts, after the tier was full
    TICK_MS = 20,
    CLOSE_MS = 2000,
    FLUSH_TIMEOUT_MS = 600000,
};

// What back ends and loop share. It outlives the tier while a back end's thread hangs.
struct kvd_tier_port {
    pthread_mutex_t lock;
    struct kvd_tier_op *done; // newest first
    uv_async_t *wake;         // NULL: the tier is gone
    uint32_t users;           // operations out, and the tier
};

struct kvd_tier {
    const struct kvd_tier_ops *ops;
    void *state;
    struct kvd_tier_settings settings;
    struct kvd_tier_port *port;
    uv_async_t wake;
    uv_timer_t timer;
    uint32_t open_handles;
    bool ticking, closing;
    struct kvd_tier_op *gets, *puts; // that wait
    struct kvd_tier_op *refused;     // to be answered from the loop
    struct kvd_tier_op *running;
    uint32_t n_waiting, n_running;
    uint64_t waiting_put_bytes;
    uint32_t failures;
    uint64_t alone_until_ms, backoff_ms, full_until_ms;
    double tokens; // bytes that may be written now
    uint64_t tokens_at_ms;
    char why[128];
    struct kvd_tier_status counts;
};

const char *kvd_tier_loss_name(enum kvd_tier_loss loss)
{
    static const char *const names[] = {"room", "expired"};
    return names[loss];
}

void kvd_tier_lose(struct kvd_tier_lost *lost, enum kvd_tier_loss why, time_t used)
{
    time_t now = time(NULL);
    lost->blocks[why]++;
    if (why == KVD_TIER_LOST_ROOM)
        kvd_ages_add(&lost->ages, now > used ? (uint64_t)(now - used) : 0);
}

const char *kvd_tier_verb_name(enum kvd_tier_verb verb)
{
    static const char *const names[] = {"put", "get", "has", "drop", "flush"};
    return names[verb];
}

const char *kvd_tier_result_name(enum kvd_tier_result result)
{
    static const char *const names[] = {"ok",      "miss",    "damaged", "full",
                                        "refused", "timeout", "failed",  "closed"};
    return names[result];
}

static uint64_t now_ms(const struct kvd_tier *t)
{
    return uv_now(t->wake.loop);
}

// -- operations ---------------------------------------------------------------------------------

static void port_leave(struct kvd_tier_port *port)
{
    pthread_mutex_lock(&port->lock);
    bool last = --port->users == 0;
    pthread_mutex_unlock(&port->lock);
    if (!last)
        return;
    pthread_mutex_destroy(&port->lock);
    free(port);
}

static void op_free(struct kvd_tier_op *op)
{
    kvd_block_unref(&op->block);
    free(op->keys);
    free(op->has);
    port_leave(op->port);
    free(op);
}

static struct kvd_tier_op *op_new(struct kvd_tier *t, enum kvd_tier_verb verb,
                                  const struct kvd_tier_key *keys, uint32_t n)
{
    struct kvd_tier_op *op = calloc(1, sizeof(*op));
    if (!op)
        return NULL;
    op->keys = calloc(n ? n : 1, sizeof(*keys));
    op->has = calloc(n ? n : 1, sizeof(*op->has));
    if (!op->keys || !op->has) {
        free(op->keys);
        free(op->has);
        free(op);
        return NULL;
    }
    if (n)
        memcpy(op->keys, keys, n * sizeof(*keys));
    op->verb = verb;
    op->n = n;
    op->settings = t->settings;
    op->asked_ns = uv_hrtime();
    op->deadline_ms =
        now_ms(t) + (verb == KVD_TIER_FLUSH ? FLUSH_TIMEOUT_MS : t->settings.timeout_ms);
    op->port = t->port;
    pthread_mutex_lock(&t->port->lock);
    t->port->users++;
    pthread_mutex_unlock(&t->port->lock);
    return op;
}

void kvd_tier_finish(struct kvd_tier_op *op, enum kvd_tier_result result)
{
    struct kvd_tier_port *port = op->port;
    op->result = result;
    pthread_mutex_lock(&port->lock);
    bool open = port->wake != NULL;
    if (open) {
        op->next = port->done;
        port->done = op;
        uv_async_send(port->wake);
    }
    pthread_mutex_unlock(&port->lock);
    if (!open)
        op_free(op);
}

void kvd_tier_fail(struct kvd_tier_op *op, enum kvd_tier_result result, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(op->why, sizeof(op->why), fmt, ap);
    va_end(ap);
    kvd_tier_finish(op, result);
}

// Tells the caller, once, and counts.
static void answer(struct kvd_tier *t, struct kvd_tier_op *op, enum kvd_tier_result result)
{
    struct kvd_tier_reply reply = {.result = result};
    if (op->given_up)
        return;
    op->given_up = true;
    t->counts.count[op->verb][result]++;
    if (result == KVD_TIER_OK || result == KVD_TIER_MISS)
        kvd_histogram_add(&t->counts.latency[op->verb], uv_hrtime() - op->asked_ns);
    if (result == KVD_TIER_OK && op->verb == KVD_TIER_PUT)
        t->counts.bytes_in += op->bytes;
    if (result == KVD_TIER_OK && op->verb == KVD_TIER_GET) {
        t->counts.bytes_out += op->bytes;
        reply.block = op->done ? KVD_TAKE(op->block) : NULL;
    }
    if (result == KVD_TIER_OK && op->verb == KVD_TIER_HAS)
        reply.has = op->has;
    if (op->done)
        op->done(op->ctx, &reply);
}

// -- leaving a tier alone -----------------------------------------------------------------------

static void failed(struct kvd_tier *t, const char *why)
{
    snprintf(t->why, sizeof(t->why), "%s", why);
    if (++t->failures < FAILURES_IN_A_ROW || now_ms(t) < t->alone_until_ms)
        return; // all that was under way fails together, and counts once
    t->backoff_ms = t->backoff_ms ? KVD_MIN(2 * t->backoff_ms, MOST_BACKOFF_MS) : BACKOFF_MS;
    t->alone_until_ms = now_ms(t) + t->backoff_ms;
    if (t->backoff_ms == BACKOFF_MS)
        kvd_warning("tier is left alone tier=%s reason=\"%s\" ms=%" PRIu64, t->ops->name, why,
                    t->backoff_ms);
}

static void worked(struct kvd_tier *t)
{
    if (t->failures >= FAILURES_IN_A_ROW)
        kvd_notice("tier works again tier=%s", t->ops->name);
    t->failures = 0;
    t->backoff_ms = t->alone_until_ms = 0;
}

// Whether nothing may be asked of it now. Of one that failed, one operation at a time goes through.
static bool left_alone(const struct kvd_tier *t)
{
    return t->failures >= FAILURES_IN_A_ROW &&
           (now_ms(t) < t->alone_until_ms || t->n_running + t->n_waiting > 0);
}

static void judge(struct kvd_tier *t, const struct kvd_tier_op *op)
{
    switch (op->result) {
    case KVD_TIER_FULL:
        if (now_ms(t) >= t->full_until_ms)
            kvd_warning("tier is full tier=%s reason=\"%s\"", t->ops->name, op->why);
        snprintf(t->why, sizeof(t->why), "%s", op->why);
        t->full_until_ms = now_ms(t) + FULL_PAUSE_MS;
        break;
    case KVD_TIER_FAILED:
        failed(t, op->why);
        break;
    case KVD_TIER_DAMAGED:
        kvd_warning("tier has a damaged block tier=%s reason=\"%s\"", t->ops->name, op->why);
        snprintf(t->why, sizeof(t->why), "%s", op->why);
        worked(t);
        break;
    case KVD_TIER_CLOSED:
        break;
    default:
        if (!op->given_up) // what came too late proves nothing
            worked(t);
    }
}

// -- what waits and runs ------------------------------------------------------------------------

static void refill(struct kvd_tier *t)
{
    uint64_t now = now_ms(t);
    t->tokens += (double)t->settings.rate * (double)(now - t->tokens_at_ms) / 1000;
    t->tokens = KVD_MIN(t->tokens, (double)t->settings.rate / 10);
    t->tokens_at_ms = now;
}

static void run(struct kvd_tier *t, struct kvd_tier_op *op)
{
    t->n_waiting--;
    if (op->verb == KVD_TIER_PUT || op->verb == KVD_TIER_DROP) {
        t->waiting_put_bytes -= op->bytes;
        t->tokens -= (double)op->bytes;
        op->deadline_ms = now_ms(t) + t->settings.timeout_ms;
    }
    t->n_running++;
    DL_APPEND2(t->running, op, sibling_prev, sibling_next);
    t->ops->submit(t->state, op);
}

// A put and a drop of one key.
static bool collide(const struct kvd_tier_op *a, const struct kvd_tier_op *b)
{
    return ((a->verb == KVD_TIER_PUT && b->verb == KVD_TIER_DROP) ||
            (a->verb == KVD_TIER_DROP && b->verb == KVD_TIER_PUT)) &&
           !memcmp(a->keys, b->keys, sizeof(*a->keys));
}

// Whether a put has to wait for a drop of the same key that was asked for before it, or a drop for
// a put: back ends do what they have in any order, and what they have may also be something whose
// caller was told that it took too long.
static bool would_overtake(const struct kvd_tier *t, const struct kvd_tier_op *op)
{
    const struct kvd_tier_op *other;
    DL_FOREACH2(t->running, other, sibling_next)
    if (collide(other, op))
        return true;
    for (other = t->puts; other != op; other = other->next)
        if (collide(other, op))
            return true;
    return false;
}

static struct kvd_tier_op *next_op(struct kvd_tier *t)
{
    struct kvd_tier_op *op = t->gets;
    if (op) {
        DL_DELETE(t->gets, op);
        return op;
    }
    // One place stays free for a get.
    if (t->n_running + 1 >= t->ops->most_running || (t->settings.rate && t->tokens <= 0))
        return NULL;
    op = t->puts;
    for (uint32_t i = 0; op && i < LOOKED_AT; i++, op = op->next)
        if (!would_overtake(t, op)) {
            DL_DELETE(t->puts, op);
            return op;
        }
    return NULL;
}

// Answers from the loop, as `done` is never called from within the caller's call.
static void refuse(struct kvd_tier *t, struct kvd_tier_op *op, enum kvd_tier_result result)
{
    op->result = result;
    DL_APPEND(t->refused, op);
    uv_async_send(&t->wake);
}

// Of a tier that is left alone, nothing waits.
static void refuse_waiting(struct kvd_tier *t)
{
    struct kvd_tier_op *lines[] = {KVD_TAKE(t->gets), KVD_TAKE(t->puts)}, *op, *tmp;
    for (size_t i = 0; i < KVD_LEN(lines); i++)
        DL_FOREACH_SAFE(lines[i], op, tmp)
    refuse(t, op, KVD_TIER_REFUSED);
    t->n_waiting = 0;
    t->waiting_put_bytes = 0;
}

static void tick(uv_timer_t *timer);

static void go_on(struct kvd_tier *t)
{
    refill(t);
    if (t->failures >= FAILURES_IN_A_ROW && now_ms(t) < t->alone_until_ms)
        refuse_waiting(t);
    while (t->n_running < t->ops->most_running) {
        struct kvd_tier_op *op = next_op(t);
        if (!op)
            break;
        run(t, op);
    }
    bool busy = t->n_waiting || t->running;
    if (busy && !t->ticking)
        uv_timer_start(&t->timer, tick, TICK_MS, TICK_MS);
    else if (!busy && t->ticking)
        uv_timer_stop(&t->timer);
    t->ticking = busy;
}

static void time_out(struct kvd_tier *t)
{
    struct kvd_tier_op *op, *tmp, *late = NULL;
    DL_FOREACH_SAFE(t->gets, op, tmp)
    if (now_ms(t) >= op->deadline_ms) {
        DL_DELETE(t->gets, op);
        DL_APPEND(late, op);
        t->n_waiting--;
    }
    bool hangs = false;
    DL_FOREACH2(t->running, op, sibling_next)
    hangs |= !op->given_up && now_ms(t) >= op->deadline_ms;
    if (hangs)
        failed(t, "it does not answer in time");
    // Whoever is answered may ask again, so what runs may grow here.
    DL_FOREACH_SAFE2(t->running, op, tmp, sibling_next)
    if (now_ms(t) >= op->deadline_ms)
        answer(t, op, KVD_TIER_TIMEOUT);
    DL_FOREACH_SAFE(late, op, tmp)
    {
        answer(t, op, KVD_TIER_TIMEOUT);
        op_free(op);
    }
}

static void tick(uv_timer_t *timer)
{
    struct kvd_tier *t = timer->data;
    time_out(t);
    go_on(t);
}

static void on_wake(uv_async_t *wake)
{
    struct kvd_tier *t = wake->data;
    pthread_mutex_lock(&t->port->lock);
    struct kvd_tier_op *done = t->port->done, *op = NULL, *tmp;
    t->port->done = NULL;
    pthread_mutex_unlock(&t->port->lock);
    while (done) { // the oldest first
        struct kvd_tier_op *rest = done->next;
        done->next = op;
        op = done;
        done = rest;
    }
    for (; op; op = tmp) {
        tmp = op->next;
        DL_DELETE2(t->running, op, sibling_prev, sibling_next);
        t->n_running--;
        judge(t, op);
        answer(t, op, op->result);
        op_free(op);
    }
    done = KVD_TAKE(t->refused);
    DL_FOREACH_SAFE(done, op, tmp)
    {
        answer(t, op, op->result);
        op_free(op);
    }
    if (!t->closing)
        go_on(t);
}

static void ask(struct kvd_tier *t, struct kvd_tier_op *op, kvd_tier_done *done, void *ctx)
{
    op->done = done;
    op->ctx = ctx;
    bool put = op->verb == KVD_TIER_PUT;
    if (left_alone(t) || t->n_waiting >= MOST_WAITING ||
        (put && t->waiting_put_bytes + op->bytes > MOST_WAITING_PUT_BYTES)) {
        refuse(t, op, KVD_TIER_REFUSED);
        return;
    }
    if (put && now_ms(t) < t->full_until_ms) {
        refuse(t, op, KVD_TIER_FULL);
        return;
    }
    t->n_waiting++;
    if (put || op->verb == KVD_TIER_DROP) { // which is not to overtake a put of the same
        t->waiting_put_bytes += op->bytes;
        DL_APPEND(t->puts, op);
    } else {
        DL_APPEND(t->gets, op);
    }
    go_on(t);
}

// Out of memory: the only answer that is given from within the call.
static void no_memory(kvd_tier_done *done, void *ctx)
{
    if (done)
        done(ctx, &(struct kvd_tier_reply){.result = KVD_TIER_REFUSED});
}

void kvd_tier_put(struct kvd_tier *t, const struct kvd_tier_key *key, const uint8_t layout[32],
                  struct kvd_block *block, kvd_tier_done *done, void *ctx)
{
    struct kvd_tier_op *op = op_new(t, KVD_TIER_PUT, key, 1);
    if (!op) {
        no_memory(done, ctx);
        return;
    }
    memcpy(op->layout, layout, sizeof(op->layout));
    op->block = kvd_block_ref(block);
    op->bytes = block->bytes;
    ask(t, op, done, ctx);
}

bool kvd_tier_takes(const struct kvd_tier *t)
{
    return !left_alone(t) && now_ms(t) >= t->full_until_ms && t->n_waiting < MOST_WAITING / 2 &&
           t->waiting_put_bytes < EAGER_PUT_BYTES;
}

void kvd_tier_get(struct kvd_tier *t, const struct kvd_tier_key *key, const uint8_t layout[32],
                  uint64_t bytes, kvd_tier_done *done, void *ctx)
{
    struct kvd_tier_op *op = op_new(t, KVD_TIER_GET, key, 1);
    if (!op) {
        no_memory(done, ctx);
        return;
    }
    memcpy(op->layout, layout, sizeof(op->layout));
    op->bytes = bytes;
    ask(t, op, done, ctx);
}

static void ask_keys(struct kvd_tier *t, enum kvd_tier_verb verb, const struct kvd_tier_key *keys,
                     uint32_t n, kvd_tier_done *done, void *ctx)
{
    struct kvd_tier_op *op = n <= KVD_TIER_MOST_KEYS ? op_new(t, verb, keys, n) : NULL;
    if (op)
        ask(t, op, done, ctx);
    else
        no_memory(done, ctx);
}

void kvd_tier_has(struct kvd_tier *t, const struct kvd_tier_key *keys, uint32_t n,
                  kvd_tier_done *done, void *ctx)
{
    ask_keys(t, KVD_TIER_HAS, keys, n, done, ctx);
}

void kvd_tier_drop(struct kvd_tier *t, const struct kvd_tier_key *key, kvd_tier_done *done,
                   void *ctx)
{
    ask_keys(t, KVD_TIER_DROP, key, 1, done, ctx);
}

void kvd_tier_flush(struct kvd_tier *t, kvd_tier_done *done, void *ctx)
{
    ask_keys(t, KVD_TIER_FLUSH, NULL, 0, done, ctx);
}

// -- its life -----------------------------------------------------------------------------------

static bool close_backend(const struct kvd_tier_ops *ops, void *state)
{
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += CLOSE_MS / 1000;
    return ops->close(state, &deadline);
}

struct kvd_tier *kvd_tier_new(uv_loop_t *loop, const struct kvd_tier_ops *ops, void *state,
                              const struct kvd_tier_settings *settings, struct kvd_error *err)
{
    struct kvd_tier *t = calloc(1, sizeof(*t));
    struct kvd_tier_port *port = t ? calloc(1, sizeof(*port)) : NULL;
    int rc = port ? uv_async_init(loop, &t->wake, on_wake) : UV_ENOMEM;
    if (rc) {
        kvd_fail(err, KVD_E_INTERNAL, "tier %s: %s", ops->name, uv_strerror(rc));
        close_backend(ops, state);
        free(port);
        free(t);
        return NULL;
    }
    uv_timer_init(loop, &t->timer);
    t->wake.data = t->timer.data = t;
    t->open_handles = 2;
    pthread_mutex_init(&port->lock, NULL);
    port->wake = &t->wake;
    port->users = 1;
    t->port = port;
    t->ops = ops;
    t->state = state;
    t->settings = *settings;
    t->tokens_at_ms = uv_now(loop);
    return t;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_tier *t = handle->data;
    if (--t->open_handles == 0)
        free(t);
}

static void close_line(struct kvd_tier *t, struct kvd_tier_op *line)
{
    struct kvd_tier_op *op, *tmp;
    DL_FOREACH_SAFE(line, op, tmp)
    {
        answer(t, op, KVD_TIER_CLOSED);
        op_free(op);
    }
}

bool kvd_tier_close(struct kvd_tier **tier)
{
    struct kvd_tier *t = KVD_TAKE(*tier);
    struct kvd_tier_op *op, *tmp;
    if (!t)
        return true;
    t->closing = true;
    on_wake(&t->wake);
    close_line(t, KVD_TAKE(t->gets));
    close_line(t, KVD_TAKE(t->puts));
    DL_FOREACH_SAFE2(t->running, op, tmp, sibling_next)
    answer(t, op, KVD_TIER_CLOSED);
    bool all = close_backend(t->ops, t->state);
    on_wake(&t->wake); // frees what came back
    pthread_mutex_lock(&t->port->lock);
    t->port->wake = NULL;
    pthread_mutex_unlock(&t->port->lock);
    port_leave(t->port);
    uv_close((uv_handle_t *)&t->wake, on_closed);
    uv_close((uv_handle_t *)&t->timer, on_closed);
    return all;
}

const char *kvd_tier_name(const struct kvd_tier *t)
{
    return t->ops->name;
}

void kvd_tier_down(struct kvd_tier_status *out, const char *fmt, ...)
{
    va_list ap;
    if (strcmp(out->state, "ok") != 0) // what operations have found out tells more
        return;
    out->state = "failing";
    va_start(ap, fmt);
    vsnprintf(out->why, sizeof(out->why), fmt, ap);
    va_end(ap);
}

void kvd_tier_status(const struct kvd_tier *t, struct kvd_tier_status *out)
{
    *out = t->counts;
    out->name = t->ops->name;
    out->state = t->failures >= FAILURES_IN_A_ROW ? "failing"
                 : now_ms(t) < t->full_until_ms   ? "full"
                                                  : "ok";
    snprintf(out->why, sizeof(out->why), "%s", t->why);
    out->waiting = t->n_waiting;
    out->running = t->n_running;
    t->ops->status(t->state, out);
}
