// The executor: one thread that runs jobs in slices, as the backend has one stream of work.
//
// Each slice goes to the namespace that has had the least time, and in it to that session (fair.h).
// A job that is alone runs on without a break; when another session waits it stops after
// KVD_SLICE_NS, or soon after one has come that has had less. The loop thread
// never waits for the executor.
#ifndef KVD_DAEMON_EXEC_H
#define KVD_DAEMON_EXEC_H

#include <stdatomic.h>

#include "daemon/core/part.h"
#include "daemon/sched/fair.h"
#include "kernels/backend.h"

struct kvd_daemon;
struct kvd_error;
struct kvd_exec;

enum {
    KVD_SLICE_NS = 2000000,
    KVD_SLICE_LEAST_NS = 500000, // when one comes that has had less
};

struct kvd_job {
    struct kvd_fair_job fair; // its tenant is the namespace, its flow the session's
    // Runs a slice, on the executor thread. True: there is more. False: done, with rc set.
    bool (*run)(struct kvd_daemon *d, struct kvd_job *job);
    void (*done)(struct kvd_daemon *d, struct kvd_job *job); // loop thread; frees the job
    int rc;
    bool abandoned; // out: the executor was stopped before it was done
    uint64_t queued_ns, started_ns, ran_ns;
    // For `run`: what it gives to operations, and whether the loop thread wants it to end.
    struct kvd_slice slice;
    _Atomic bool cancelled;
    bool must_end; // what `run` has begun is whole only at its end: it is not to be cancelled
    // The executor's own
    struct kvd_exec *exec;
    _Atomic uint64_t until_ns;
    struct kvd_job *next;
};

// All on the loop thread.
void kvd_exec_submit(struct kvd_daemon *d, struct kvd_job *job);
// Asks a job that was submitted to end soon. It is reported as done all the same.
void kvd_exec_cancel(struct kvd_job *job);

extern const struct kvd_part kvd_part_exec;

#endif
