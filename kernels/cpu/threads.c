// A small pool of threads that share one loop at a time. Workers sleep on a condition variable
// between loops.
#include "kernels/cpu/cpu.h"

#include <pthread.h>
#include <stdatomic.h>

struct kvd_threads {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    pthread_t *workers;
    uint32_t n_workers;
    uint64_t round; // counts loops; workers wait for it to change
    uint32_t busy;  // workers still in the current loop
    bool stop;
    void (*fn)(void *ctx, uint64_t i);
    void *ctx;
    uint64_t n;
    const struct kvd_slice *slice; // NULL: all of it
    _Atomic uint64_t next;
};

static void take_turns(struct kvd_threads *t)
{
    for (;;) {
        uint64_t i = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (i >= t->n)
            return;
        t->fn(t->ctx, i);
        if (kvd_slice_over(t->slice))
            return;
    }
}

static void *worker(void *arg)
{
    struct kvd_threads *t = arg;
    uint64_t seen = 0;
    pthread_mutex_lock(&t->lock);
    for (;;) {
        while (t->round == seen && !t->stop)
            pthread_cond_wait(&t->start, &t->lock);
        if (t->stop)
            break;
        seen = t->round;
        pthread_mutex_unlock(&t->lock);
        take_turns(t);
        pthread_mutex_lock(&t->lock);
        if (--t->busy == 0)
            pthread_cond_signal(&t->done);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

struct kvd_threads *kvd_threads_new(uint32_t n)
{
    struct kvd_threads *t = calloc(1, sizeof(*t));
    if (!t)
        return NULL;
    t->workers = calloc(n, sizeof(*t->workers));
    if (!t->workers) {
        free(t);
        return NULL;
    }
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->start, NULL);
    pthread_cond_init(&t->done, NULL);
    for (; t->n_workers + 1 < n; t->n_workers++) {
        if (pthread_create(&t->workers[t->n_workers], NULL, worker, t) != 0) {
            kvd_threads_free(&t);
            return NULL;
        }
    }
    return t;
}

void kvd_threads_free(struct kvd_threads **tp)
{
    struct kvd_threads *t = KVD_TAKE(*tp);
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    t->stop = true;
    pthread_cond_broadcast(&t->start);
    pthread_mutex_unlock(&t->lock);
    for (uint32_t i = 0; i < t->n_workers; i++)
        pthread_join(t->workers[i], NULL);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->start);
    pthread_cond_destroy(&t->done);
    free(t->workers);
    free(t);
}

uint32_t kvd_threads_count(const struct kvd_threads *t)
{
    return t->n_workers + 1;
}

// Runs from index `from` on; returns where it stopped. All before that is done.
static uint64_t run_from(struct kvd_threads *t, uint64_t from, uint64_t n,
                         const struct kvd_slice *slice, void (*fn)(void *ctx, uint64_t i),
                         void *ctx)
{
    t->fn = fn;
    t->ctx = ctx;
    t->n = n;
    t->slice = slice;
    atomic_store_explicit(&t->next, from, memory_order_relaxed);
    if (n - from <= 1 || t->n_workers == 0) {
        take_turns(t);
        return KVD_MIN(atomic_load_explicit(&t->next, memory_order_relaxed), n);
    }
    pthread_mutex_lock(&t->lock);
    t->busy = t->n_workers;
    t->round++;
    pthread_cond_broadcast(&t->start);
    pthread_mutex_unlock(&t->lock);
    take_turns(t);
    pthread_mutex_lock(&t->lock);
    while (t->busy)
        pthread_cond_wait(&t->done, &t->lock);
    pthread_mutex_unlock(&t->lock);
    return KVD_MIN(atomic_load_explicit(&t->next, memory_order_relaxed), n);
}

void kvd_threads_run(struct kvd_threads *t, uint64_t n, void (*fn)(void *ctx, uint64_t i),
                     void *ctx)
{
    run_from(t, 0, n, NULL, fn, ctx);
}

void kvd_threads_run_slice(struct kvd_threads *t, struct kvd_slice *slice, uint64_t n,
                           void (*fn)(void *ctx, uint64_t i), void *ctx)
{
    if (!slice) {
        run_from(t, 0, n, NULL, fn, ctx);
        return;
    }
    slice->at = slice->at < n ? run_from(t, slice->at, n, slice, fn, ctx) : n;
    slice->more = slice->at < n;
}
