// Threads of a tier that does blocking work: a line of operations, and what is done now and then.
// They are the tier's own, as a disk that hangs would hold all of libuv's.
#ifndef KVD_DAEMON_TIER_THREADS_H
#define KVD_DAEMON_TIER_THREADS_H

#include "daemon/tier/backend.h"

struct kvd_tier_threads;

struct kvd_tier_work {
    // Does the operation and finishes it. Several threads at once.
    void (*run)(void *ctx, struct kvd_tier_op *op);
    // At the start and then every `every_s` seconds, by one thread at a time. May be NULL.
    void (*now_and_then)(void *ctx);
    uint32_t every_s;
    // Frees ctx, when the last thread has ended.
    void (*free)(void *ctx);
};

// NULL with *err set: ctx stays the caller's.
struct kvd_tier_threads *kvd_tier_threads_new(uint32_t n, const struct kvd_tier_work *work,
                                              void *ctx, struct kvd_error *err);
void kvd_tier_threads_add(struct kvd_tier_threads *t, struct kvd_tier_op *op);
// What waits is finished with KVD_TIER_CLOSED. False: a thread hangs; it, and ctx, go when it comes
// back.
bool kvd_tier_threads_close(struct kvd_tier_threads **t, const struct timespec *deadline);

#endif
