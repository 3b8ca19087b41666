// What comes in over a link, counted frame by frame before gRPC sees it.
//
// gRPC reads from a connection for as long as there is something, makes a call of every HEADERS
// frame, and bounds neither calls that are reset nor those of a client that ignores its settings.
// So each of its reads passes by here (meter.c stands in for libc's recvmsg), and a connection that
// does what no gRPC client does is at its end there and then. What others may do takes turns
// (turns.h). Any thread: one at a time reads from a connection.
#ifndef KVD_DAEMON_METER_H
#define KVD_DAEMON_METER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/rpc/turns.h"

enum {
    KVD_LINK_CALLS = 128,  // calls and streams in flight on one connection; HTTP/2 tells clients
    KVD_LINK_RESETS = 256, // and frames that carry nothing, in a second
};

struct kvd_meter {
    uint8_t head[9]; // of the frame that is being read
    uint8_t have;
    uint8_t greeted;           // bytes of HTTP/2's greeting that have come
    bool foreign;              // it was another: gRPC closes the connection
    uint32_t skip;             // bytes to the next head
    uint32_t continued;        // frames of one block of headers
    uint64_t window_ns;        // in which these are counted:
    uint32_t idle;             // frames that carry nothing
    _Atomic int64_t in_flight; // calls that were neither reset nor ended
    bool rights;               // descriptors could come too: the kernel cannot keep them out
    struct kvd_turn turn;
    _Atomic(const char *) verdict; // why the connection was ended; NULL: it was not
};

// Begins to count what is read from a descriptor; the meter must outlive it, and says already
// whether rights can come. `most`: calls in
// flight of all connections together beyond which those with many are ended.
void kvd_meter_start(struct kvd_meter *m, int fd, uint64_t most);
// Forgets the meter of a number: to be called when the kernel has handed it out for something else.
void kvd_meter_forget(int fd);
// To be called when the daemon is done with a call.
void kvd_meter_end_call(struct kvd_meter *m);
int64_t kvd_meter_calls(const struct kvd_meter *m);
// Tells how many calls all connections together have in flight: to be called now and then, as a
// call that is reset and ended is counted down twice in between.
void kvd_meter_total(int64_t calls);

#endif
