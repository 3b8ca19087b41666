#include "daemon/sched/exec.h"

#include <utlist.h>

#include "daemon/core/lifecycle.h"

struct kvd_exec {
    uv_thread_t thread;
    uv_mutex_t lock;
    uv_cond_t wake;
    uv_async_t async;
    struct kvd_fair fair;    // jobs that are to run
    struct kvd_job *running; // in `fair` too
    uint64_t begun_ns;       // when its slice began
    uint64_t charged_ns;     // until when it has been charged
    struct kvd_job *done;    // to report
    _Atomic bool contended;  // another session waits for the one that runs
    _Atomic bool stop;       // set under the lock
    bool ended;
};

static bool slice_over(const struct kvd_slice *slice)
{
    const struct kvd_job *job =
        (const void *)((const uint8_t *)slice - offsetof(struct kvd_job, slice));
    const struct kvd_exec *x = job->exec;
    if (atomic_load_explicit(&x->stop, memory_order_relaxed) ||
        (!job->must_end && atomic_load_explicit(&job->cancelled, memory_order_relaxed)))
        return true;
    return atomic_load_explicit(&x->contended, memory_order_relaxed) &&
           uv_hrtime() >= atomic_load_explicit(&job->until_ns, memory_order_relaxed);
}

static void note_contention(struct kvd_exec *x)
{
    bool others = x->running && kvd_fair_contended(&x->fair, &x->running->fair);
    atomic_store_explicit(&x->contended, others, memory_order_relaxed);
}

static void report_later(struct kvd_exec *x, struct kvd_job *job)
{
    kvd_fair_remove(&x->fair, &job->fair);
    LL_APPEND(x->done, job);
    uv_async_send(&x->async);
}

// One slice of the job whose turn it is. Called with the lock, which it gives back meanwhile.
static void run_slice(struct kvd_daemon *d, struct kvd_exec *x, struct kvd_job *job)
{
    x->running = job;
    note_contention(x);
    uint64_t begin = x->begun_ns = x->charged_ns = uv_hrtime();
    atomic_store(&job->until_ns,
                 begin + KVD_SLICE_NS); // under the lock: whoever comes may shorten it
    uv_mutex_unlock(&x->lock);
    if (!job->started_ns)
        job->started_ns = begin;
    bool more = job->run(d, job);
    uint64_t end = uv_hrtime();
    job->ran_ns += end - begin;
    uv_mutex_lock(&x->lock);
    x->running = NULL;
    kvd_fair_charge(&x->fair, &job->fair, KVD_MAX(end, x->charged_ns) - x->charged_ns);
    if (!more)
        report_later(x, job);
}

static void executor(void *arg)
{
    struct kvd_daemon *d = arg;
    struct kvd_exec *x = d->exec;
    struct kvd_fair_job *next;
    uv_mutex_lock(&x->lock);
    while (!x->stop) {
        next = kvd_fair_next(&x->fair);
        if (next)
            run_slice(d, x, (struct kvd_job *)next);
        else
            uv_cond_wait(&x->wake, &x->lock);
    }
    while ((next = kvd_fair_next(&x->fair))) {
        ((struct kvd_job *)next)->abandoned = true;
        report_later(x, (struct kvd_job *)next);
    }
    x->ended = true;
    uv_async_send(&x->async);
    uv_mutex_unlock(&x->lock);
}

static void free_exec(uv_handle_t *handle)
{
    struct kvd_exec *x = (struct kvd_exec *)((uint8_t *)handle - offsetof(struct kvd_exec, async));
    free(x);
}

static void release(struct kvd_daemon *d)
{
    struct kvd_exec *x = d->exec;
    uv_thread_join(&x->thread); // it has ended, is about to, or has not even begun to look at d
    d->exec = NULL;
    uv_mutex_destroy(&x->lock);
    uv_cond_destroy(&x->wake);
    kvd_fair_deinit(&x->fair);
    uv_close((uv_handle_t *)&x->async, free_exec);
}

static void on_async(uv_async_t *async)
{
    struct kvd_daemon *d = async->data;
    struct kvd_exec *x = d->exec;
    if (!x)
        return;
    uv_mutex_lock(&x->lock);
    struct kvd_job *job = KVD_TAKE(x->done);
    bool ended = x->ended;
    uv_mutex_unlock(&x->lock);
    while (job) {
        struct kvd_job *next = job->next;
        if (job->started_ns)
            kvd_histogram_add(&d->metrics.queue_wait, job->started_ns - job->queued_ns);
        job->done(d, job);
        job = next;
    }
    if (!ended)
        return;
    release(d);
    kvd_daemon_go_on(d);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_exec *x = calloc(1, sizeof(*x));
    if (!x || !kvd_fair_init(&x->fair, KVD_MAX_NAMESPACES)) {
        free(x);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    d->exec = x;
    uv_mutex_init(&x->lock);
    uv_cond_init(&x->wake);
    uv_async_init(&d->loop, &x->async, on_async);
    x->async.data = d;
    if (uv_thread_create(&x->thread, executor, d) == 0)
        return KVD_OK;
    d->exec = NULL;
    kvd_fair_deinit(&x->fair);
    uv_close((uv_handle_t *)&x->async, free_exec);
    return kvd_fail(err, KVD_E_INTERNAL, "cannot start the executor thread");
}

void kvd_exec_submit(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_exec *x = d->exec;
    job->exec = x;
    job->slice.over = slice_over;
    uv_mutex_lock(&x->lock);
    job->queued_ns = uv_hrtime();
    if (x->running) {
        kvd_fair_advance(&x->fair, &x->running->fair, job->queued_ns - x->charged_ns);
        x->charged_ns = job->queued_ns;
    }
    kvd_fair_push(&x->fair, &job->fair);
    if (x->running && kvd_fair_precedes(&x->fair, &job->fair, &x->running->fair))
        atomic_store(&x->running->until_ns,
                     KVD_MIN(atomic_load(&x->running->until_ns), x->begun_ns + KVD_SLICE_LEAST_NS));
    note_contention(x);
    uv_cond_signal(&x->wake);
    uv_mutex_unlock(&x->lock);
}

void kvd_exec_cancel(struct kvd_job *job)
{
    atomic_store(&job->cancelled, true);
}

// Ends after the slice that runs; what is not done is abandoned and reported. Then the executor is
// gone.
static void stop(struct kvd_daemon *d)
{
    struct kvd_exec *x = d->exec;
    uv_mutex_lock(&x->lock);
    atomic_store(&x->stop, true);
    uv_cond_signal(&x->wake);
    uv_mutex_unlock(&x->lock);
}

static bool busy(const struct kvd_daemon *d)
{
    return d->exec;
}

// For when there was no stop: the executor has no jobs.
static void end(struct kvd_daemon *d)
{
    if (!d->exec)
        return;
    stop(d);
    release(d);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric_head(f, "kvd_queue_wait_seconds", "histogram",
                    "Time a compute call waited for the executor.");
    kvd_metric_histogram(f, "kvd_queue_wait_seconds", "", &d->metrics.queue_wait);
}

const struct kvd_part kvd_part_exec = {
    .init = init, .stop = stop, .busy = busy, .end = end, .metrics = metrics};
