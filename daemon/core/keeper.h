// What kvd and kvd-keeper tell each other over a SOCK_SEQPACKET pair, whose descriptor kvd finds in
// the environment. Plain C, no dependencies.
#ifndef KVD_DAEMON_KEEPER_H
#define KVD_DAEMON_KEEPER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define KVD_KEEPER_ENV   "KVD_KEEPER" // kvd: the number of its end
#define KVD_KEEPER_MAGIC 0x50454b4bu

enum kvd_keeper_op {
    KVD_KEEPER_HELD,   // keeper, at the start, with a descriptor: it holds this
    KVD_KEEPER_END,    // keeper: that was all
    KVD_KEEPER_PUT,    // kvd, with a descriptor: hold this, in the place of one of that name
    KVD_KEEPER_DROP,   // kvd: close that
    KVD_KEEPER_READY,  // kvd: it serves
    KVD_KEEPER_UNKNOWN // what came is of neither
};

struct kvd_keeper_message {
    uint32_t magic;
    uint32_t op;
    char name[32]; // ends with a NUL
};

// Waits while the other side's queue is full. False: not sent, errno says why.
bool kvd_keeper_send(int to, enum kvd_keeper_op op, const char *name, int fd);
// *fd: what came along, the caller's to close, or -1. `flags` are recvmsg's. Returns what recvmsg
// does: another length than the message's is no message.
ssize_t kvd_keeper_receive(int from, int flags, struct kvd_keeper_message *m, int *fd);

#endif
