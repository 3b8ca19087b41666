// Links: gRPC's connections, which kvd accepts itself, and whose TLS it ends where there is one.
// What gRPC does not bound is bounded here: how many a user has, how long one may stay silent, how
// many calls it may give up at once, how long it may leave replies unread. Loop thread.
#ifndef KVD_DAEMON_LINKS_H
#define KVD_DAEMON_LINKS_H

#include <grpc/grpc.h>

#include "daemon/core/daemon.h"
#include "daemon/rpc/meter.h"
#include "daemon/rpc/peers.h"
#include "daemon/rpc/users.h"

struct kvd_link;

int kvd_links_init(struct kvd_daemon *d, struct kvd_error *err);
// Takes a connection in: hands it to gRPC, or refuses it.
void kvd_links_accept(struct kvd_daemon *d, int fd);
// The same with one that came over TLS; fd is what is in the clear, name its client's or "".
void kvd_links_accept_tls(struct kvd_daemon *d, int fd, struct kvd_peer_address *address,
                          const char *name);
// Hangs up on all. What is held of links by calls stays good.
void kvd_links_cut(struct kvd_daemon *d);
// The same, and takes no more.
void kvd_links_deinit(struct kvd_daemon *d);
uint32_t kvd_links_count(const struct kvd_daemon *d);
// False while no connection more would be taken from anybody.
bool kvd_links_open(const struct kvd_daemon *d);

// The link that a call came by, with a reference. NULL: it is none of ours.
struct kvd_link *kvd_link_of(struct kvd_daemon *d, grpc_call *call);
// Counts a call that begins. KVD_E_LIMIT: it is to be refused, as the link or its address has too
// many, or cannot stay; then it does not count.
int kvd_link_begin_call(struct kvd_link *l, struct kvd_error *err);
// To be called when the loop is done with a call for now: answered, or put somewhere to wait.
void kvd_link_settle_call(struct kvd_link *l);
// NULL is allowed.
void kvd_link_end_call(struct kvd_link *l, bool counted);
// Who is at the other end, or KVD_USER_UNKNOWN.
int64_t kvd_link_uid(const struct kvd_link *l);
// The common name of its TLS certificate, which has been verified, or "".
const char *kvd_link_name(const struct kvd_link *l);
// Takes n bytes of replies for the link, of which one may have a quarter. KVD_E_LIMIT.
int kvd_link_take(struct kvd_link *l, uint64_t n, struct kvd_error *err);
// NULL is allowed.
void kvd_link_give(struct kvd_link *l, uint64_t n);
// Hangs up now; what lies in the socket is thrown away.
void kvd_link_cut(struct kvd_link *l, const char *why);
void kvd_link_unref(struct kvd_link **l);
// To be called when calls have come: others may be let in now.
void kvd_links_turn(struct kvd_daemon *d);

#endif
