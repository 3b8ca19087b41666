// A connection over TLS: its handshake, and then its bytes, to and from a socket pair, at the other
// end of which gRPC has them in the clear. So whatever is bounded, metered and made to wait by
// reading less is so for those over TLS too: a full pair has the relay read no more, and its client
// finds its own socket full.
//
// The thread of the relays' loop; `fd` and `pair` are closed by the owner, after `over`.
#ifndef KVD_DAEMON_RELAY_H
#define KVD_DAEMON_RELAY_H

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#include "daemon/rpc/peers.h"

enum { KVD_RELAY_RECORD = 16384 }; // the longest that TLS has

// One way through a relay: what has come and is not passed on yet.
struct kvd_flow {
    uint8_t bytes[KVD_RELAY_RECORD];
    size_t at, end;
    int wants; // events of the TLS side that this way waits for
};

struct kvd_relay {
    // The owner's: the client's socket, and who is told from the relays' thread when the handshake
    // is done, and when all is over: then nothing more happens.
    int fd;
    void (*ready)(struct kvd_relay *r);
    void (*over)(struct kvd_relay *r);
    // To be read in `ready`:
    int clear;                // gRPC's end of the pair: the owner's from then on
    char name[KVD_PEER_NAME]; // the common name of the client's certificate, or ""
    // To be read in `over`:
    const char *why; // the handshake failed; NULL: it did not

    SSL *ssl;
    int pair; // our end; -1 during the handshake
    uv_poll_t wire_poll, pair_poll;
    int wire_events, pair_events;
    uint32_t handles;
    bool ended;
    struct kvd_flow *in, *out;
};

// Begins the handshake; `over` is called in any case. The caller has set what is the owner's.
void kvd_relay_start(struct kvd_relay *r, uv_loop_t *loop, SSL_CTX *context);
// Ends it, with whatever it still has.
void kvd_relay_end(struct kvd_relay *r);

#endif
