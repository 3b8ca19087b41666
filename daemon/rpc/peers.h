// Who comes over TLS. gRPC accepts those connections and reads them, so neither links nor the meter
// know of them: they are counted here by address (by network, with IPv6), of which one may have
// half of what all of them may. Any thread.
#ifndef KVD_DAEMON_PEERS_H
#define KVD_DAEMON_PEERS_H

#include <stdbool.h>

#include "proto/base.h"

struct kvd_peer_address;

// How many connections, and calls in flight, all of them may have.
void kvd_peers_limit(uint64_t connections, uint64_t calls);
// Counts a connection that was accepted, until its descriptor is closed. False: there are too many,
// and it is to be closed.
bool kvd_peers_add(int fd);
// Counts a call of a peer, named as gRPC does ("ipv4:10.0.0.1:1234"). KVD_E_LIMIT. *out is for
// kvd_peers_end_call, or NULL where gRPC has no address for it.
int kvd_peers_begin_call(const char *peer, struct kvd_peer_address **out, struct kvd_error *err);
// Sets *address to NULL; NULL is allowed.
void kvd_peers_end_call(struct kvd_peer_address **address);

#endif
