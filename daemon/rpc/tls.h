// Connections over TLS: a thread of their own ends it (relay.h), and hands over what is in the
// clear. Those in their handshake are few: one that takes longer than a second makes room for the
// next, and none may take longer than KVD_HELLO_TIMEOUT_MS. Loop thread.
#ifndef KVD_DAEMON_TLS_H
#define KVD_DAEMON_TLS_H

#include "daemon/core/daemon.h"
#include "daemon/rpc/peers.h"

// A connection whose handshake is done. fd: what gRPC reads and writes, the callee's; name: of the
// client's certificate, which has been verified, or "".
typedef void kvd_tls_accepted(struct kvd_daemon *d, int fd, struct kvd_peer_address *address,
                              const char *name);

// Reads certificate, key and authority, and starts the thread. KVD_E_INVALID, KVD_E_INTERNAL,
// KVD_E_LOST.
int kvd_tls_init(struct kvd_daemon *d, kvd_tls_accepted *accepted, struct kvd_error *err);
// A kvd_accepted: begins the handshake.
void kvd_tls_accept(struct kvd_daemon *d, int fd);
// To be called once a second.
void kvd_tls_tick(struct kvd_daemon *d);
// Hangs up on those in their handshake: there are to be no more.
void kvd_tls_shut(struct kvd_daemon *d);
// Hangs up on all. Does nothing where kvd_tls_init was not called, or failed.
void kvd_tls_deinit(struct kvd_daemon *d);

#endif
