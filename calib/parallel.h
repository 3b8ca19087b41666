// Work spread over threads.
#ifndef KVD_CALIB_PARALLEL_H
#define KVD_CALIB_PARALLEL_H

#include "proto/base.h"

// Calls work(arg) in `threads` threads (0: one a core), this one among them, but no more than there
// are jobs; returns when all have. `work` takes jobs from `arg` until there are none. OpenBLAS is
// told to use one thread for each, so that sums do not depend on how many there are.
void kvd_parallel(uint32_t threads, uint32_t jobs, void *(*work)(void *), void *arg);

#endif
