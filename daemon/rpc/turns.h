// Turns of connections: of what comes in over links, gRPC sees a bounded number of calls at a time.
//
// gRPC makes calls of all that it can read, one connection after the other, and hands them out in
// the order in which they came: who sends hundreds at once makes all others wait for them. So in a
// turn each link may begin some calls, and as many as of those are settled; all together may begin
// some more. The next turn begins when all are settled. A link for which nothing is left is parked:
// what it sends waits in its socket, which its sender finds full after a while, and it goes on in
// the order in which links were parked.
#ifndef KVD_DAEMON_TURNS_H
#define KVD_DAEMON_TURNS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {                 // what frames count
    KVD_TURN_CALL = 4, // those that begin or end a call
    KVD_TURN_FRAME = 1,
};

enum {
    KVD_TURN_RUNS,
    KVD_TURN_PARKED,
    KVD_TURN_HELD, // nothing is read any more
    KVD_TURN_FREE, // it does not wait any more
};

// A link's part, in its meter. What reads from the connection has all but `state` for itself.
struct kvd_turn {
    int fd;
    uint32_t number;     // of the turn
    _Atomic int32_t own; // what it has left of its own in it
    _Atomic int state;
    struct kvd_turn *previous, *next; // parked ones
};

// -- any thread ---------------------------------------------------------------------------------
void kvd_turn_start(struct kvd_turn *t, int fd);
// Whether more may be read from the connection now. If not, it is parked, and its descriptor
// becomes readable for gRPC once more when its turn has come.
bool kvd_turn_may_read(struct kvd_turn *t);
// How many bytes may be read at once, besides those of a frame that has begun.
size_t kvd_turn_bytes(const struct kvd_turn *t);
void kvd_turn_begin_call(struct kvd_turn *t);
void kvd_turn_spend(struct kvd_turn *t, int n);
// Has nothing read from the connection any more, until it is released.
void kvd_turn_hold(struct kvd_turn *t);
// Has it wait no more: to be called before the connection is shut down, or gRPC would not hear of
// that.
void kvd_turn_release(struct kvd_turn *t);

// -- loop thread --------------------------------------------------------------------------------
// `wake` is called from any thread when a link was parked. NULL: nobody is told any more.
void kvd_turns_init(void (*wake)(void *ctx), void *ctx);
// To be called when the loop is done with a call of the link, or has put it somewhere to wait.
void kvd_turn_settle_call(struct kvd_turn *t);
// Begins the next turn if somebody waits for it and the calls of this one are settled, or it has
// lasted so long that they will not be. Returns in how many milliseconds it wants to be called
// at the latest; 0: nobody waits.
uint32_t kvd_turns_next(uint64_t now_ns);

#endif
