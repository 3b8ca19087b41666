// The fd socket: descriptors, credentials and death notices of workers. Loop thread.
#ifndef KVD_DAEMON_FDSOCK_H
#define KVD_DAEMON_FDSOCK_H

#include "daemon/core/part.h"
#include "proto/fdsock.h"

struct kvd_connection;
struct kvd_session;

// The connection that a ticket was given to, or NULL.
struct kvd_connection *kvd_fdsock_find(struct kvd_daemon *d, const char *ticket);
struct kvd_peer {
    int64_t pid, uid, gid;
};
struct kvd_peer kvd_connection_peer(const struct kvd_connection *c);
struct kvd_session *kvd_connection_session(const struct kvd_connection *c);
// Ties a session to a connection, or unties it with NULL. `ended` is called when the worker hangs
// up or dies; it is to close the connection.
void kvd_connection_bind(struct kvd_connection *c, struct kvd_session *s,
                         void (*ended)(struct kvd_daemon *d, struct kvd_session *s,
                                       const char *why));
// Sends a message, with fd unless it is -1 (it stays the caller's). KVD_E_LIMIT when the worker
// does not read; KVD_E_UNAVAILABLE when it has hung up.
int kvd_connection_send(struct kvd_connection *c, const struct kvd_fd_grant *grant, int fd,
                        struct kvd_error *err);
// Takes the fd sent under a key out of a connection; -1 if there is none, for which err has the
// reason. It counts as its user's until it is closed, which is done with the second one and takes
// as long as it likes beside the loop.
int kvd_connection_take_fd(struct kvd_connection *c, uint64_t key, struct kvd_error *err);
void kvd_connection_close_fd(struct kvd_connection *c, int fd);
// Hangs up: after its session was ended by the worker itself or by an operator.
void kvd_connection_close(struct kvd_connection *c);

extern const struct kvd_part kvd_part_fdsock;

#endif
