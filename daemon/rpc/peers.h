// Who comes over TLS, by address (by network, with IPv6), of which one may have half of what all of
// them may: three quarters, as one user. Loop thread.
#ifndef KVD_DAEMON_PEERS_H
#define KVD_DAEMON_PEERS_H

#include "daemon/core/daemon.h"

enum { KVD_PEER_NAME = 128 }; // bytes of the name in a certificate, with its NUL

struct kvd_peer_address;

struct kvd_peers;

// NULL when memory is short.
struct kvd_peers *kvd_peers_new(struct kvd_daemon *d);
// Leaves NULL. Addresses that are still referred to stay good.
void kvd_peers_drop(struct kvd_peers **all);
// Who is at the other end of a TCP socket, with a reference. NULL: memory is short, or nobody is.
struct kvd_peer_address *kvd_peer_ref_of(struct kvd_peers *all, int fd);
struct kvd_peer_address *kvd_peer_ref(struct kvd_peer_address *a);
// Sets *a to NULL; NULL is allowed.
void kvd_peer_unref(struct kvd_peer_address **a);
const char *kvd_peer_text(const struct kvd_peer_address *a);
// Counts a connection, until it is given back. KVD_E_LIMIT.
int kvd_peer_take(struct kvd_peer_address *a, struct kvd_error *err);
void kvd_peer_give(struct kvd_peer_address *a);
// Counts a call. KVD_E_LIMIT. NULL is allowed, in both.
int kvd_peer_begin_call(struct kvd_peer_address *a, struct kvd_error *err);
void kvd_peer_end_call(struct kvd_peer_address *a);

#endif
