// The executor: one thread that runs jobs in order, as the backend has one stream of work.
#include "daemon/kvd.h"

struct kvd_exec {
    uv_thread_t thread;
    uv_mutex_t lock;
    uv_cond_t wake;
    uv_async_t async;
    struct kvd_job *queue, *queue_last; // to run
    struct kvd_job *done, *done_last;   // to report
    bool stop;
};

static void push(struct kvd_job **first, struct kvd_job **last, struct kvd_job *job)
{
    job->next = NULL;
    if (*last)
        (*last)->next = job;
    else
        *first = job;
    *last = job;
}

static void executor(void *arg)
{
    struct kvd_daemon *d = arg;
    struct kvd_exec *x = d->exec;
    uv_mutex_lock(&x->lock);
    for (;;) {
        while (!x->queue && !x->stop)
            uv_cond_wait(&x->wake, &x->lock);
        struct kvd_job *job = x->queue;
        if (!job)
            break;
        x->queue = job->next;
        if (!x->queue)
            x->queue_last = NULL;
        uv_mutex_unlock(&x->lock);
        job->started_ns = uv_hrtime();
        job->rc = job->run(d, job);
        job->finished_ns = uv_hrtime();
        uv_mutex_lock(&x->lock);
        push(&x->done, &x->done_last, job);
        uv_async_send(&x->async);
    }
    uv_mutex_unlock(&x->lock);
}

static void report(struct kvd_daemon *d)
{
    struct kvd_exec *x = d->exec;
    uv_mutex_lock(&x->lock);
    struct kvd_job *job = x->done;
    x->done = x->done_last = NULL;
    uv_mutex_unlock(&x->lock);
    while (job) {
        struct kvd_job *next = job->next;
        kvd_histogram_add(&d->metrics.queue_wait, job->started_ns - job->queued_ns);
        job->done(d, job);
        job = next;
    }
}

static void on_async(uv_async_t *async)
{
    report(async->data);
}

int kvd_exec_init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_exec *x = calloc(1, sizeof(*x));
    if (!x)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->exec = x;
    uv_mutex_init(&x->lock);
    uv_cond_init(&x->wake);
    uv_async_init(&d->loop, &x->async, on_async);
    x->async.data = d;
    if (uv_thread_create(&x->thread, executor, d))
        return kvd_fail(err, KVD_E_INTERNAL, "cannot start the executor thread");
    return KVD_OK;
}

void kvd_exec_submit(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_exec *x = d->exec;
    job->queued_ns = uv_hrtime();
    uv_mutex_lock(&x->lock);
    push(&x->queue, &x->queue_last, job);
    uv_cond_signal(&x->wake);
    uv_mutex_unlock(&x->lock);
}

static void free_exec(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(d->exec);
    d->exec = NULL;
}

void kvd_exec_deinit(struct kvd_daemon *d)
{
    struct kvd_exec *x = d->exec;
    if (!x)
        return;
    uv_mutex_lock(&x->lock);
    x->stop = true;
    uv_cond_signal(&x->wake);
    uv_mutex_unlock(&x->lock);
    uv_thread_join(&x->thread);
    report(d);
    uv_mutex_destroy(&x->lock);
    uv_cond_destroy(&x->wake);
    uv_close((uv_handle_t *)&x->async, free_exec);
}
