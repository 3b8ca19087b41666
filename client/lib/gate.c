#include "client/lib/gate.h"

#include <errno.h>
#include <time.h>

uint64_t kvd_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint32_t kvd_left_ms(uint64_t deadline)
{
    uint64_t now = kvd_now_ms();
    return now < deadline ? (uint32_t)KVD_MIN(deadline - now, (uint64_t)UINT32_MAX) : 0;
}

void kvd_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}

bool kvd_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline)
{
    struct timespec t = {.tv_sec = (time_t)(deadline / 1000),
                         .tv_nsec = (long)(deadline % 1000) * 1000000};
    return pthread_cond_timedwait(cond, lock, &t) != ETIMEDOUT;
}

void kvd_gate_init(struct kvd_gate *g)
{
    *g = (struct kvd_gate){0};
    pthread_mutex_init(&g->lock, NULL);
    kvd_cond_init(&g->changed);
}

void kvd_gate_deinit(struct kvd_gate *g)
{
    pthread_mutex_destroy(&g->lock);
    pthread_cond_destroy(&g->changed);
}

static int over(struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_TIMEOUT,
                    "other calls of this client kept the session until the "
                    "time for this one was over");
}

int kvd_gate_read(struct kvd_gate *g, uint64_t deadline, struct kvd_error *err)
{
    bool in_time = true;
    pthread_mutex_lock(&g->lock);
    while ((g->writer || g->waiting) && in_time)
        in_time = kvd_cond_wait(&g->changed, &g->lock, deadline);
    bool free = !g->writer && !g->waiting;
    g->readers += free;
    pthread_mutex_unlock(&g->lock);
    return free ? KVD_OK : over(err);
}

int kvd_gate_write(struct kvd_gate *g, uint64_t deadline, struct kvd_error *err)
{
    bool in_time = true;
    pthread_mutex_lock(&g->lock);
    g->waiting++;
    while ((g->writer || g->readers) && in_time)
        in_time = kvd_cond_wait(&g->changed, &g->lock, deadline);
    g->waiting--;
    bool free = !g->writer && !g->readers;
    g->writer |= free;
    if (!free)
        pthread_cond_broadcast(&g->changed); // readers that waited behind this writer
    pthread_mutex_unlock(&g->lock);
    return free ? KVD_OK : over(err);
}

void kvd_gate_leave(struct kvd_gate *g)
{
    pthread_mutex_lock(&g->lock);
    if (g->writer)
        g->writer = false;
    else
        g->readers--;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}
