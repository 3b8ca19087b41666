// What the parts of the test program `client` share: a small layout, one client, one sequence.
#ifndef KVD_TESTS_CLIENT_H
#define KVD_TESTS_CLIENT_H

#include "kvd/kvd.h"

enum { LAYERS = 2, KV = 2, HEADS = 6, DIM_K = 128, DIM_V = 64, MOST = 64 };
// The buffer: K, V, Q (bf16), O (f32) of up to MOST tokens.
enum {
    V_AT = LAYERS * MOST * KV * DIM_K * 2,
    Q_AT = V_AT + LAYERS * MOST * KV * DIM_V * 2,
    O_AT = Q_AT + LAYERS * MOST * HEADS * DIM_K * 2,
    BYTES = O_AT + LAYERS * MOST * HEADS * DIM_V * 4,
    SLOTS_BYTES = HEADS * DIM_K * 4 // of direct mode's q of one slot, the largest
};

extern kvd_client *client;
extern kvd_buffer *buffer;
extern uint64_t id;
extern kvd_failure failure;
extern const kvd_layers ALL;
#define ERR (&failure)

// Ends the program with the latest failure's text if it is not so.
void need(int line, bool ok);
#define NEED(what) need(__LINE__, what)

kvd_options options_of(const char *address);
void open_client(const char *address);
// An item of the sequence at position 0, with all tensors of a step but for lse.
kvd_item item_of(uint32_t tokens);

int shapes(const char *address);                 // client_shapes.c
int forks(const char *address, const char *how); // client_fork.c
int deadlines(const char *address);              // client_deadlines.c
int reconnects(const char *address);
int queues(const char *address); // client_queue.c
int queues_killed(const char *address);
int queues_gpu(const char *address);
int remotes(const char *address, const char *here); // client_remote.c

#endif
