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
    _Atomic uint64_t next;
};

static void take_turns(struct kvd_threads *t)
{
    for (;;) {
        uint64_t i = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (i >= t->n)
            return;
        t->fn(t->ctx, i);
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

void kvd_threads_run(struct kvd_threads *t, uint64_t n, void (*fn)(void *ctx, uint64_t i),
                     void *ctx)
{
    if (n <= 1 || t->n_workers == 0) {
        for (uint64_t i = 0; i < n; i++)
            fn(ctx, i);
        return;
    }
    pthread_mutex_lock(&t->lock);
    t->fn = fn;
    t->ctx = ctx;
    t->n = n;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    t->busy = t->n_workers;
    t->round++;
    pthread_cond_broadcast(&t->start);
    pthread_mutex_unlock(&t->lock);
    take_turns(t);
    pthread_mutex_lock(&t->lock);
    while (t->busy)
        pthread_cond_wait(&t->done, &t->lock);
    pthread_mutex_unlock(&t->lock);
}
