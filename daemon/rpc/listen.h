// Listening sockets, and connections as they are accepted: for gRPC, the fd socket and HTTP.
//
// A descriptor is kept in reserve: when the process or the machine has no more, who connects is
// accepted with it and hung up on at once, and the listener rests for a moment. So a listener is
// never lost and never spins. Loop thread.
#ifndef KVD_DAEMON_LISTEN_H
#define KVD_DAEMON_LISTEN_H

#include "daemon/core/daemon.h"

enum { KVD_SO_PASSRIGHTS = 83 }; // SO_PASSRIGHTS, of Linux 6.16

enum kvd_listen_for { KVD_LISTEN_GRPC, KVD_LISTEN_FD, KVD_LISTEN_HTTP };

// fd: non-blocking, close-on-exec, the callee's.
typedef void kvd_accepted(struct kvd_daemon *d, int fd);

// Listens on a path, with the access that the configuration grants; type is SOCK_STREAM or
// SOCK_SEQPACKET. The path must be free or stale: it is removed first.
int kvd_listen_unix(struct kvd_daemon *d, enum kvd_listen_for what, const char *path, int type,
                    kvd_accepted *accepted, struct kvd_error *err);
// Listens on every address that HOST:PORT stands for. *port (NULL is allowed): the port, also where
// 0 left it to the kernel.
int kvd_listen_tcp(struct kvd_daemon *d, enum kvd_listen_for what, const char *where,
                   kvd_accepted *accepted, uint16_t *port, struct kvd_error *err);
// Closes the listeners of a kind and removes their paths.
void kvd_listen_close(struct kvd_daemon *d, enum kvd_listen_for what);
// True if descriptors were short within the last two seconds.
bool kvd_listen_short(const struct kvd_daemon *d);

#endif
