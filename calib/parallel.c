#include "calib/parallel.h"

#include <cblas.h>
#include <pthread.h>

enum { MAX_THREADS = 256 };

struct state {
    struct kvd_parallel *p;
    _Atomic uint32_t next;
    pthread_mutex_t lock; // of err
    struct kvd_error err; // the first
};

static void *work(void *arg)
{
    struct state *s = arg;
    struct kvd_parallel *p = s->p;
    struct kvd_error err = {0};
    void *workspace = calloc(1, p->workspace_size);
    if (!workspace || !p->begin(p->arg, workspace))
        kvd_fail(&err, KVD_E_INTERNAL, "out of memory");
    while (!err.code && !p->failed) {
        uint32_t job = atomic_fetch_add(&s->next, 1);
        if (job >= p->jobs || p->run(p->arg, workspace, job, &err))
            break;
    }
    if (workspace)
        p->end(workspace);
    free(workspace);
    pthread_mutex_lock(&s->lock);
    if (err.code && !s->err.code) {
        s->err = err;
        p->failed = true;
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int kvd_parallel_run(struct kvd_parallel *p, struct kvd_error *err)
{
    struct state s = {.p = p, .lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_t started[MAX_THREADS];
    uint32_t n = 0;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t want = p->threads ? p->threads : cores > 0 ? (uint32_t)cores : 1;
    want = KVD_MIN(KVD_MIN(want, p->jobs), (uint32_t)MAX_THREADS);
    openblas_set_num_threads(1);
    while (n + 1 < want && pthread_create(&started[n], NULL, work, &s) == 0)
        n++;
    work(&s);
    for (uint32_t i = 0; i < n; i++)
        pthread_join(started[i], NULL);
    if (s.err.code)
        *err = s.err;
    return s.err.code;
}
