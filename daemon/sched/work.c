#include <utlist.h>

#include "daemon/core/lifecycle.h"
#include "daemon/sched/op.h"
#include "daemon/session/buffer.h"
#include "daemon/session/memory.h"
#include "daemon/session/scrub.h"

struct kvd_work *kvd_work_new(struct kvd_call *call, const struct kvd_session *s,
                              const struct kvd_op *op, size_t n, struct kvd_error *err)
{
    struct kvd_daemon *d = call->d;
    struct kvd_work *w = calloc(1, sizeof(*w));
    const struct kvd_layout *shape = kvd_pool_layout_get(d->pool, s->layout);
    if (!w || !(w->items = calloc(n + 1, sizeof(*w->items))) ||
        !(w->views = calloc(n * shape->n_planes + 1, sizeof(*w->views)))) {
        if (w)
            free(w->items);
        free(w);
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    w->op = op;
    w->writes = op->writes;
    w->call = call;
    w->appender = s->appender;
    w->fitted_length = s->fitted_length;
    w->waiter.ns = s->ns;
    w->waiter.session = s->id;
    w->waiter.bytes = call->request_bytes;
    w->layout = s->layout;
    kvd_pool_layout_ref(d->pool, w->layout);
    w->shape = shape;
    w->plane = &w->shape->planes[0];
    w->rotations = d->rotations[w->layout];
    w->n_items = (uint32_t)n;
    for (uint32_t i = 0; i < w->n_items; i++)
        w->items[i].views = w->views + (size_t)i * shape->n_planes;
    return w;
}

static void pin(struct kvd_daemon *d, struct kvd_work *w)
{
    for (; w->pinned < w->n_items; w->pinned++)
        kvd_pool_seq_pin(d->pool, w->items[w->pinned].seq);
}

void kvd_work_free(struct kvd_daemon *d, struct kvd_work *w)
{
    for (uint32_t i = 0; i < w->pinned; i++)
        kvd_pool_seq_unpin(d->pool, w->items[i].seq);
    for (uint32_t i = 0; i < KVD_MAX(w->n_items, 1u); i++) { // Rotate keeps its output in item 0
        free(w->items[i].o_inline);
        free(w->items[i].lse_inline);
    }
    for (uint32_t i = 0; i < w->n_buffers; i++)
        kvd_buffer_unref(w->buffers[i]);
    for (uint32_t i = 0; i < w->n_items * w->shape->n_planes; i++)
        free(w->views[i].pages);
    kvd_pool_layout_unref(d->pool, w->layout);
    kvd_op_pages_free(d, &w->pages);
    free(w->views);
    free(w->buffers);
    free(w->spans);
    free(w->runs);
    free(w->items);
    free(w->append_items);
    free(w->append_index);
    free(w->copies);
    free(w->attend_items);
    free(w->sinks);
    free(w->checks);
    free(w->job.slice.state);
    free(w);
}

static struct kvd_work *of_waiter(struct kvd_waiter *waiter)
{
    return (struct kvd_work *)((uint8_t *)waiter - offsetof(struct kvd_work, waiter));
}

// Whether no work in flight uses what it writes, or writes what it uses, and no older one that
// waits uses any of it: each that was looked at before has noted its sequences under the number of
// the look.
static bool ready(struct kvd_daemon *d, struct kvd_waiter *waiter, uint64_t look)
{
    const struct kvd_work *w = of_waiter(waiter);
    bool free = true;
    for (uint32_t i = 0; i < w->n_items && free; i++) {
        const struct kvd_seq_use *use = &d->use[(uint32_t)w->items[i].seq];
        free = use->wanted != look && !use->writer && !(w->writes && use->readers);
    }
    for (uint32_t i = 0; i < w->n_items; i++)
        d->use[(uint32_t)w->items[i].seq].wanted = look;
    return free;
}

static void lock(struct kvd_daemon *d, struct kvd_work *w, bool on)
{
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_seq_use *use = &d->use[(uint32_t)w->items[i].seq];
        if (w->writes)
            use->writer = on;
        else
            use->readers += on ? 1 : -1u;
    }
    w->locked = on;
}

static void conclude(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    if (w->op->conclude)
        w->op->conclude(d, w, commit);
}

// It is no longer among those that wait or run.
static void leave(struct kvd_daemon *d, struct kvd_work *w)
{
    kvd_fences_forget(d, &w->parked);
    kvd_queue_forget(d, &w->waiter);
    kvd_room_forget(d, &w->room);
    if (w->listed)
        DL_DELETE2(d->works, w, previous, next);
    w->listed = false;
    w->call->on_cancelled = NULL;
    if (w->locked)
        lock(d, w, false);
}

static void done(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_work *w = (struct kvd_work *)job;
    uint32_t ns = w->waiter.ns;
    if (job->rc == KVD_E_INTERNAL) // before a counter tells anybody to go on
        kvd_daemon_check_device(d);
    if (w->op->run && !w->op->copies_only)
        kvd_histogram_add(&d->metrics.kernel[w->op->id], job->ran_ns);
    if (job->abandoned)
        job->rc = kvd_fail(&w->err, KVD_E_UNAVAILABLE, "kvd is shutting down");
    else if (job->rc == KVD_E_TIMEOUT)
        w->err = w->why;
    conclude(d, w, job->rc == KVD_OK);
    for (uint32_t i = 0; i < w->checked; i++)
        kvd_scrub_seen(d, &w->checks[i].block, w->checks[i].sum);
    leave(d, w);
    if (job->rc) {
        kvd_fence_signal(&w->signal);
        d->metrics.nonfinite += job->rc == KVD_E_INVALID;
    }
    if (job->rc || w->op->reply(d, w, &w->err))
        kvd_call_fail_error(w->call, &w->err);
    kvd_work_free(d, w);
    kvd_queue_kick(d, ns);
}

// Ends a work that is not with the executor. The line may go on then.
static void fail(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_error *err)
{
    struct kvd_call *call = w->call;
    if (err->code == KVD_E_INTERNAL)
        kvd_daemon_check_device(d);
    conclude(d, w, false);
    kvd_fence_signal(&w->signal);
    leave(d, w);
    kvd_work_free(d, w);
    kvd_call_fail_error(call, err);
}

// Whether nothing is wanted of the executor.
static bool is_answered(const struct kvd_work *w)
{
    return (!w->op->run || (w->op->copies_only && !w->n_copies)) && !w->n_checks;
}

// Takes its pages and hands it to the executor. Where room has to be made first, it waits for that,
// and those behind it that use its sequences wait for it.
static void start(struct kvd_daemon *d, struct kvd_waiter *waiter)
{
    struct kvd_work *w = of_waiter(waiter);
    struct kvd_error err = {0};
    if (kvd_call_expired(w->call)) {
        kvd_fail(&err, KVD_E_TIMEOUT,
                 "the deadline passed while the call was waiting, as %u others do",
                 kvd_queue_waiting(d));
        fail(d, w, &err);
        return;
    }
    if (w->op->room && !w->op->room(d, w)) {
        lock(d, w, true);
        return;
    }
    int rc = w->op->prepare ? w->op->prepare(d, w, &err) : KVD_OK;
    if (rc == KVD_OK)
        lock(d, w, true); // now that it has all its sequences
    if (rc || (is_answered(w) && w->op->reply(d, w, &err))) {
        fail(d, w, &err);
        return;
    }
    if (is_answered(w)) {
        leave(d, w);
        kvd_work_free(d, w);
        return;
    }
    if (w->writes)
        kvd_memory_ahead(d);
    w->job.run = kvd_work_run;
    w->job.done = done;
    w->job.fair.tenant = w->waiter.ns;
    w->job.fair.flow = kvd_queue_flow(&w->waiter);
    kvd_exec_submit(d, &w->job);
}

static void on_room(struct kvd_daemon *d, struct kvd_room *room)
{
    struct kvd_work *w = (struct kvd_work *)((uint8_t *)room - offsetof(struct kvd_work, room));
    uint32_t ns = w->waiter.ns;
    lock(d, w, false);
    start(d, &w->waiter);
    kvd_queue_kick(d, ns); // it may have failed, or have been answered
}

// Whether the executor has it.
static bool runs(const struct kvd_work *w)
{
    return w->waiter.in_flight && !w->room.waits;
}

static void cancel(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_error *why)
{
    if (!runs(w)) {
        uint32_t ns = w->waiter.ns;
        fail(d, w, why);
        kvd_queue_kick(d, ns); // it may have been the first in line
        return;
    }
    if (w->why.code)
        return;
    w->why = *why;
    kvd_exec_cancel(&w->job);
}

static void on_cancelled(struct kvd_call *call)
{
    struct kvd_error why = {.code = KVD_E_TIMEOUT,
                            .text = "the caller has gone, or its deadline has passed"};
    cancel(call->d, call->work, &why);
}

static void on_passed(struct kvd_daemon *d, struct kvd_parked *parked)
{
    struct kvd_work *w = (struct kvd_work *)((uint8_t *)parked - offsetof(struct kvd_work, parked));
    kvd_queue_push(d, &w->waiter);
}

void kvd_work_queue(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_error err = {0};
    pin(d, w);
    if (kvd_queue_admit(d, &w->waiter, &err)) {
        fail(d, w, &err);
        return;
    }
    w->call->work = w;
    w->call->on_cancelled = on_cancelled;
    DL_APPEND2(d->works, w, previous, next);
    w->listed = true;
    w->parked.passed = on_passed;
    w->room.again = on_room;
    if (w->parked.fence.word && !kvd_fence_passed(&w->parked.fence))
        kvd_fences_park(d, &w->parked);
    else
        kvd_queue_push(d, &w->waiter);
}

uint32_t kvd_compute_queued(const struct kvd_daemon *d)
{
    uint32_t n;
    const struct kvd_work *w;
    DL_COUNT2(d->works, w, n, next);
    return n;
}

// Fails what waits and cancels what runs; of a session, or (NULL) of all.
static void cancel_all(struct kvd_daemon *d, const struct kvd_session *s)
{
    struct kvd_error err = {.code = s ? KVD_E_UNAUTH : KVD_E_UNAVAILABLE};
    snprintf(err.text, sizeof(err.text), "%s",
             s ? "the session ended before the call was done" : "kvd is shutting down");
    // Not while the list is walked: a work that goes makes way for others, which start, or fail.
    struct kvd_work *w, *next, *gone = NULL;
    DL_FOREACH_SAFE2(d->works, w, next, next)
    {
        if (s && w->waiter.session != s->id)
            continue;
        if (runs(w)) {
            cancel(d, w, &err);
            continue;
        }
        kvd_fences_forget(d, &w->parked);
        kvd_queue_forget(d, &w->waiter);
        kvd_room_forget(d, &w->room);
        DL_DELETE2(d->works, w, previous, next);
        w->listed = false;
        LL_PREPEND(gone, w);
    }
    while (gone) {
        w = gone;
        uint32_t ns = w->waiter.ns;
        gone = w->next;
        fail(d, w, &err);
        kvd_queue_kick(d, ns);
    }
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    return kvd_queue_init(d, ready, start, err);
}

bool kvd_work_left(const struct kvd_daemon *d, uint64_t session)
{
    const struct kvd_work *w = d->works;
    while (w && w->waiter.session != session)
        w = w->next;
    return w != NULL;
}

static void session_ends(struct kvd_daemon *d, struct kvd_session *s)
{
    cancel_all(d, s);
    kvd_queue_session_ends(d, s->id);
}

static void stop(struct kvd_daemon *d)
{
    cancel_all(d, NULL);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    static const char *const ops[KVD_OP_COUNT] = {"append", "attend", "step", "rotate",
                                                  "read",   "put",    "get",  "encode"};
    const struct kvd_metrics *m = &d->metrics;
    kvd_metric_head(f, "kvd_kernel_duration_seconds", "histogram",
                    "Time in the backend, by operation.");
    for (int i = 0; i < KVD_OP_COUNT; i++) {
        char labels[32];
        snprintf(labels, sizeof(labels), "op=\"%s\"", ops[i]);
        kvd_metric_histogram(f, "kvd_kernel_duration_seconds", labels, &m->kernel[i]);
    }
    kvd_metric(f, "kvd_queued_calls", "gauge", "Compute calls waiting or running.",
               kvd_compute_queued(d));
    kvd_metric(f, "kvd_appended_tokens_total", "counter",
               "Tokens appended (complete in every layer).", (double)m->tokens_appended);
    kvd_metric(f, "kvd_beyond_fit_tokens_total", "counter",
               "Tokens appended at positions that their rotation set was not fitted to.",
               (double)m->tokens_beyond_fit);
    kvd_metric(f, "kvd_attended_queries_total", "counter",
               "Query tokens answered by Attend and Step.", (double)m->queries_attended);
    kvd_metric(f, "kvd_compressed_input_bytes_total", "counter",
               "Bytes of bf16 K and V that left the recent window.", (double)m->bytes_in);
    kvd_metric(f, "kvd_compressed_output_bytes_total", "counter", "Bytes that they became.",
               (double)m->bytes_stored);
    kvd_metric(f, "kvd_compression_ratio", "gauge",
               "Input over output of all compression so far; 0 before the first.",
               m->bytes_stored ? (double)m->bytes_in / (double)m->bytes_stored : 0);
    kvd_metric(f, "kvd_nonfinite_rejected_total", "counter", "Appends refused for NaN or Inf.",
               (double)m->nonfinite);
}

const struct kvd_part kvd_part_works = {
    .init = init,
    .stop = stop,
    .deinit = kvd_queue_deinit,
    .session_ends = session_ends,
    .metrics = metrics,
};
