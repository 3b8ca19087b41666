// Whose turn it is: sharing one executor by measured time, start-time fair queueing in two levels.
//
// A tenant is a namespace, a flow a session of it. Jobs of a flow run in their order; of tenants
// with jobs the one comes next that has used the least time, and of its flows again that one.
// Whoever was away comes back at the time of the one that is being served: neither is what it did
// not use saved up, nor is what it used too much forgotten. Knows nothing of time or threads: the
// owner locks, and says what a turn took. And what one of many may have waiting.
#ifndef KVD_DAEMON_FAIR_H
#define KVD_DAEMON_FAIR_H

#include <stdbool.h>
#include <stdint.h>

// One that takes turns with others of its level.
struct kvd_fair_share {
    uint64_t used; // virtual time
    struct kvd_fair_share *prev, *next;
};

struct kvd_fair_level {
    struct kvd_fair_share *active; // those with jobs, longest served ago first
    uint64_t now;                  // of the one that was served last
    uint64_t latest;               // that any has reached
};

// The owner's, zero at first, and to stay where it is while it has jobs. It may go when it has
// none, and loses its debt with that.
struct kvd_fair_flow {
    struct kvd_fair_share share; // first
    struct kvd_fair_job *jobs;
};

struct kvd_fair_job {
    uint32_t tenant;            // set by the owner, below the number of tenants
    struct kvd_fair_flow *flow; // set by the owner; always the same tenant's
    struct kvd_fair_job *prev, *next;
};

struct kvd_fair_tenant {
    struct kvd_fair_share share; // first
    struct kvd_fair_level flows;
};

struct kvd_fair {
    struct kvd_fair_tenant *tenants;
    struct kvd_fair_level level;
};

// False when out of memory.
bool kvd_fair_init(struct kvd_fair *f, uint32_t tenants);
void kvd_fair_deinit(struct kvd_fair *f);
// Adds a job behind its flow's others; it stays the caller's.
void kvd_fair_push(struct kvd_fair *f, struct kvd_fair_job *job);
// The job whose turn it is, which stays where it is; NULL: there is none.
struct kvd_fair_job *kvd_fair_next(struct kvd_fair *f);
// Says that the job, which is queued, has just had `cost`.
void kvd_fair_charge(struct kvd_fair *f, const struct kvd_fair_job *job, uint64_t cost);
// The same in the middle of its turn: while it is alone, who comes starts from there, so that a
// long turn that kept nobody waiting is no debt.
void kvd_fair_advance(struct kvd_fair *f, const struct kvd_fair_job *job, uint64_t cost);
// Whether job a, of two that are queued, is of one that has used less than b's.
bool kvd_fair_precedes(const struct kvd_fair *f, const struct kvd_fair_job *a,
                       const struct kvd_fair_job *b);
// Takes out a job that is queued.
void kvd_fair_remove(struct kvd_fair *f, struct kvd_fair_job *job);
// Whether a flow other than the job's has jobs.
bool kvd_fair_contended(const struct kvd_fair *f, const struct kvd_fair_job *job);

// What those that wait have taken.
struct kvd_waiting {
    uint32_t calls;
    uint64_t bytes;
};

// Whether somebody who has `own` of what `all` have may have n more bytes in one more call. A pure
// function: *why says "calls" or "bytes" when not.
bool kvd_waiting_fits(struct kvd_waiting own, struct kvd_waiting all, struct kvd_waiting most,
                      uint64_t n, const char **why);

#endif
