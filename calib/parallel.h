// Work spread over threads, each with memory of its own.
#ifndef KVD_CALIB_PARALLEL_H
#define KVD_CALIB_PARALLEL_H

#include <stdatomic.h>

#include "proto/base.h"

struct kvd_parallel {
    uint32_t threads;                          // 0: one a core; never more than there are jobs
    uint32_t jobs;                             // numbered from 0
    size_t workspace_size;                     // bytes of a thread's workspace, zeroed before begin
    bool (*begin)(void *arg, void *workspace); // false: out of memory
    int (*run)(void *arg, void *workspace, uint32_t job, struct kvd_error *err);
    void (*end)(void *workspace); // also after a begin that failed
    void *arg;
    _Atomic bool failed; // a job has: long ones should give up. Zero before.
};

// Runs all jobs, in this thread and others; after a failure no more are begun. Returns the first
// failure. OpenBLAS is told to use one thread for each, so that sums do not depend on how many
// there are.
int kvd_parallel_run(struct kvd_parallel *p, struct kvd_error *err);

#endif
