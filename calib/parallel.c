#include "calib/parallel.h"

#include <cblas.h>
#include <pthread.h>

void kvd_parallel(uint32_t threads, uint32_t jobs, void *(*work)(void *), void *arg)
{
    pthread_t started[256];
    uint32_t n = 0;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t want = threads ? threads : cores > 0 ? (uint32_t)cores : 1;
    want = KVD_MIN(KVD_MIN(want, jobs), (uint32_t)KVD_LEN(started));
    openblas_set_num_threads(1);
    while (n + 1 < want && pthread_create(&started[n], NULL, work, arg) == 0)
        n++;
    work(arg);
    for (uint32_t i = 0; i < n; i++)
        pthread_join(started[i], NULL);
}
