// A lock for many readers or one writer whose waits end: calls pass it to use what a reconnect
// replaces. Writers go first, so that a reconnect is not put off by calls that fail and come again.
#ifndef KVD_CLIENT_GATE_H
#define KVD_CLIENT_GATE_H

#include <pthread.h>

#include "proto/base.h"

struct kvd_gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t readers, waiting; // waiting: writers
    bool writer;
};

void kvd_gate_init(struct kvd_gate *g);
void kvd_gate_deinit(struct kvd_gate *g);
// KVD_E_TIMEOUT when others were inside until `deadline` (kvd_now_ms).
int kvd_gate_read(struct kvd_gate *g, uint64_t deadline, struct kvd_error *err);
int kvd_gate_write(struct kvd_gate *g, uint64_t deadline, struct kvd_error *err);
void kvd_gate_leave(struct kvd_gate *g);

// Milliseconds of the monotonic clock; what is left until a deadline, 0 when it is over; and a
// condition's wait until then, on a clock set to CLOCK_MONOTONIC. False: it is over.
uint64_t kvd_now_ms(void);
uint32_t kvd_left_ms(uint64_t deadline);
void kvd_cond_init(pthread_cond_t *cond);
bool kvd_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline);

#endif
