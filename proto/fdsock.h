// Messages on the fd socket, a unix SOCK_SEQPACKET socket at the gRPC socket's path with ".fd"
// appended.
#ifndef KVD_PROTO_FDSOCK_H
#define KVD_PROTO_FDSOCK_H

#include <stdint.h>

#define KVD_FD_MAGIC   0x0144766bu // "kvD\1"
#define KVD_FD_VERSION 1u

// Daemon to worker, once, on connect.
struct kvd_fd_hello {
    uint32_t magic, version;
    char ticket[33]; // for OpenSession.ticket or the metadata key kvd-ticket
    char pad[7];
};

// Worker to daemon, with exactly one file descriptor: a memfd sealed with F_SEAL_SHRINK.
struct kvd_fd_message {
    uint32_t magic, version;
    uint64_t key; // the worker's choice; RegisterBuffer names it
};

#endif
