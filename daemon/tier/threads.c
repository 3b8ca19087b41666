#include "daemon/tier/threads.h"

#include <time.h>
#include <utlist.h>

enum { MOST = 8 };

struct kvd_tier_threads {
    struct kvd_tier_work work;
    void *ctx;
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct kvd_tier_op *line;
    bool ending, tidying;
    time_t tidy_at;
    pthread_t thread[MOST];
    uint32_t n;
    uint32_t users; // threads, and the owner
};

static void leave(struct kvd_tier_threads *t)
{
    pthread_mutex_lock(&t->lock);
    bool last = --t->users == 0;
    pthread_mutex_unlock(&t->lock);
    if (!last)
        return;
    if (t->ctx)
        t->work.free(t->ctx);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->more);
    free(t);
}

static time_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec;
}

// Waits for an operation, or for the time to tidy up (NULL, and t->tidying). Holds the lock.
static struct kvd_tier_op *next(struct kvd_tier_threads *t)
{
    for (;;) {
        struct kvd_tier_op *op = t->line;
        if (t->ending)
            return NULL;
        if (op) {
            DL_DELETE(t->line, op);
            return op;
        }
        if (!t->work.now_and_then || t->tidying) {
            pthread_cond_wait(&t->more, &t->lock);
        } else if (now() >= t->tidy_at) {
            t->tidying = true;
            return NULL;
        } else {
            struct timespec until = {.tv_sec = t->tidy_at};
            pthread_cond_timedwait(&t->more, &t->lock, &until);
        }
    }
}

static void *thread_main(void *arg)
{
    struct kvd_tier_threads *t = arg;
    pthread_mutex_lock(&t->lock);
    while (!t->ending) {
        struct kvd_tier_op *op = next(t);
        if (t->ending && !op)
            break;
        pthread_mutex_unlock(&t->lock);
        if (op)
            t->work.run(t->ctx, op);
        else
            t->work.now_and_then(t->ctx);
        pthread_mutex_lock(&t->lock);
        if (!op) {
            t->tidying = false;
            t->tidy_at = now() + t->work.every_s;
        }
    }
    pthread_mutex_unlock(&t->lock);
    leave(t);
    return NULL;
}

struct kvd_tier_threads *kvd_tier_threads_new(uint32_t n, const struct kvd_tier_work *work,
                                              void *ctx, struct kvd_error *err)
{
    struct kvd_tier_threads *t = calloc(1, sizeof(*t));
    pthread_condattr_t attr;
    if (!t) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    t->work = *work;
    t->ctx = ctx;
    t->users = 1;
    t->tidy_at = now();
    pthread_mutex_init(&t->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&t->more, &attr);
    pthread_condattr_destroy(&attr);
    for (; t->n < KVD_MIN(n, (uint32_t)MOST); t->n++) {
        pthread_mutex_lock(&t->lock);
        int rc = pthread_create(&t->thread[t->n], NULL, thread_main, t);
        t->users += rc == 0;
        pthread_mutex_unlock(&t->lock);
        if (rc && t->n == 0) {
            kvd_fail(err, KVD_E_INTERNAL, "a thread for a tier: %s", strerror(rc));
            t->ctx = NULL; // the caller's
            leave(t);
            return NULL;
        }
        if (rc)
            break; // fewer do as well
    }
    return t;
}

void kvd_tier_threads_add(struct kvd_tier_threads *t, struct kvd_tier_op *op)
{
    pthread_mutex_lock(&t->lock);
    DL_APPEND(t->line, op);
    pthread_cond_signal(&t->more);
    pthread_mutex_unlock(&t->lock);
}

bool kvd_tier_threads_close(struct kvd_tier_threads **threads, const struct timespec *deadline)
{
    struct kvd_tier_threads *t = KVD_TAKE(*threads);
    struct kvd_tier_op *op, *tmp;
    bool all = true;
    pthread_mutex_lock(&t->lock);
    t->ending = true;
    struct kvd_tier_op *line = KVD_TAKE(t->line);
    pthread_cond_broadcast(&t->more);
    pthread_mutex_unlock(&t->lock);
    DL_FOREACH_SAFE(line, op, tmp)
    kvd_tier_finish(op, KVD_TIER_CLOSED);
    for (uint32_t i = 0; i < t->n; i++)
        if (pthread_timedjoin_np(t->thread[i], NULL, deadline)) {
            pthread_detach(t->thread[i]);
            all = false;
        }
    leave(t);
    return all;
}
