// Messages on the fd socket, a unix SOCK_SEQPACKET socket at the gRPC socket's path with ".fd"
// appended. All carry one file descriptor, but for the hello, the refusal and KVD_FD_REVOKE.
#ifndef KVD_PROTO_FDSOCK_H
#define KVD_PROTO_FDSOCK_H

#include <stdint.h>

#define KVD_FD_MAGIC   0x0144766bu // "kvD\1"
#define KVD_FD_VERSION 1u

// Beside the gRPC socket: locked (an OFD lock) while somebody is there who starts kvd again.
#define KVD_KEPT_SUFFIX ".kept"

// Daemon to worker, once, on connect.
struct kvd_fd_hello {
    uint32_t magic, version;
    char ticket[33]; // for OpenSession.ticket or the metadata key kvd-ticket
    char pad[7];
};

// Daemon to worker in place of the hello, which is shorter: the connection cannot stay. It is
// closed then.
struct kvd_fd_refusal {
    uint32_t magic, version;
    int32_t code;   // what a call would have got
    char text[512]; // ends with a NUL
};

// Worker to daemon: a memfd sealed with F_SEAL_SHRINK and not of huge pages, or GPU memory. A
// message with no descriptor, or with two, ends the connection.
struct kvd_fd_message {
    uint32_t magic, version;
    uint64_t key; // the worker's choice; RegisterBuffer names it
};

enum kvd_fd_kind {
    KVD_FD_EXTENT = 1,    // memory of an extent: a memfd, or the GPU's
    KVD_FD_REVOKE = 2,    // the extent is to be unmapped: it passed to another namespace
    KVD_FD_ROTATIONS = 3, // of a plane, a sealed memfd: struct kvd_fd_rotations, then matrices
};

// Daemon to worker, after MapSequences.
struct kvd_fd_grant {
    uint32_t magic, version;
    uint32_t kind;   // enum kvd_fd_kind
    uint32_t extent; // KVD_FD_ROTATIONS: the plane
    uint64_t bytes;  // of the memory
    uint64_t memory; // KVD_FD_EXTENT: which memory it is, of all that an extent ever had. Who has
                     // it mapped already, from a kvd before this one, has nothing to do
};

// The head of the memfd of a plane's set. fp32 arrays [n_layers][heads][...] follow, as many as
// bits are set in `terms`, in their order: K's and V's matrices [dim][dim], rows multiplied from
// the left (without: identity), their inverses (transposes), means [dim] (0), and of codecs tc2 and
// tc2.5 K's deviations [dim_k] (1) and bits of codes [dim_k / 16].
struct kvd_fd_rotations {
    uint32_t magic, version;
    uint32_t n_layers, heads; // 1: the same for all
    uint32_t dim_k, dim_v;
    uint32_t terms, pad;
};

#endif
