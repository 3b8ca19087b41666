// What a kind of tier has to do. tier.c is above it and sees to all limits.
//
// To add one: a file with a kvd_tier_..._new that returns its state, and a kvd_tier_ops; a key in
// core/config.c; a line in tiers.c.
#ifndef KVD_DAEMON_TIER_BACKEND_H
#define KVD_DAEMON_TIER_BACKEND_H

#include "daemon/tier/tier.h"

// An operation. The back end has it from `submit` to kvd_tier_finish.
struct kvd_tier_op {
    // What is asked
    enum kvd_tier_verb verb;
    struct kvd_tier_settings settings;
    struct kvd_tier_key *keys; // n; one but for HAS, none for FLUSH
    uint32_t n;
    uint8_t layout[32];
    uint64_t bytes;          // of the payload
    struct kvd_block *block; // PUT: to be stored. GET: the back end's answer
    bool *has;               // HAS: the answer, by key
    // The back end's, while it has the op
    struct kvd_tier_op *prev, *next;
    uint32_t left;
    uint64_t began_ms;
    char cursor[24];
    char why[128]; // of a failure
    // tier.c's
    struct kvd_tier_port *port;
    enum kvd_tier_result result;
    bool given_up; // its caller was answered
    uint64_t deadline_ms, asked_ns;
    struct kvd_tier_op *sibling_prev, *sibling_next; // those that run
    kvd_tier_done *done;
    void *ctx;
};

struct kvd_tier_ops {
    const char *name;
    uint32_t most_running; // operations that it is given at once
    // Begins the operation. Loop thread; must not wait for anything.
    void (*submit)(void *state, struct kvd_tier_op *op);
    // Ends all threads, finishes what it has (KVD_TIER_CLOSED) and frees the state. Waits until
    // `deadline` (CLOCK_REALTIME) for threads that hang, then leaves them and their state behind
    // and returns false.
    bool (*close)(void *state, const struct timespec *deadline);
    // Blocks and bytes that it has and its limit, for people; where it is.
    void (*status)(void *state, struct kvd_tier_status *out);
};

// Counts a block that went; `used`: when it was last used (Unix time).
void kvd_tier_lose(struct kvd_tier_lost *lost, enum kvd_tier_loss why, time_t used);

// For `status`: it does not work, and no operation needs to find that out.
__attribute__((format(printf, 2, 3))) void kvd_tier_down(struct kvd_tier_status *out,
                                                         const char *fmt, ...);

// Gives the operation back. Any thread, once.
void kvd_tier_finish(struct kvd_tier_op *op, enum kvd_tier_result result);
__attribute__((format(printf, 3, 4))) void
kvd_tier_fail(struct kvd_tier_op *op, enum kvd_tier_result result, const char *fmt, ...);

#endif
