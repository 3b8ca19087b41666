// Letting go of files that others have made. What a worker sends may be anything: a TCP socket that
// lingers, a file of FUSE or of a server that is gone. Whoever closes such a descriptor, or drops a
// message with one in it that nobody has read, waits for as long as somebody else likes. So that is
// done on threads of its own, which may hang.
//
// A user has some of them at most, so that one whose closes hang holds up its own alone. When all
// of them hang, what is to be closed waits, keeps its descriptor and counts as its user's. When the
// process ends nobody waits for them. A thread that has been at something for a second gets a
// signal, by which sockets do not linger any more. What no signal ends is closing a file of FUSE,
// and the process then ends when who serves that does.
#ifndef KVD_DAEMON_CLOSER_H
#define KVD_DAEMON_CLOSER_H

#include "daemon/core/part.h"

enum {
    KVD_CLOSER_THREADS = 64,
    KVD_CLOSER_EACH = 8, // for one user
    // What is nobody's share and waits, above which no new connections are taken.
    KVD_CLOSER_MOST = 256,
};

typedef void kvd_closed(void *arg);

// Loop thread. Closes a descriptor of user `whose`. `done` is called when that has come back, or
// when kvd ends; NULL: it is nobody's share.
void kvd_closer_close(int64_t whose, int fd, kvd_closed *done, void *arg);
// The same, but takes one message from a socket and drops it with all that came along. The socket
// is to stay open until that has come back.
void kvd_closer_discard(int64_t whose, int fd, kvd_closed *done, void *arg);
// The same for a socket: shuts it down at once, and drops what nobody has read before it is closed,
// so that nothing is left to who else has it open. If there is nothing of that it is closed, and
// `done` called, here and now.
void kvd_closer_hang_up(int64_t whose, int fd, kvd_closed *done, void *arg);

// How many of a user's wait, and how many wait that are nobody's share.
uint32_t kvd_closer_waiting(int64_t whose);
uint32_t kvd_closer_uncharged(void);

extern const struct kvd_part kvd_part_closer;

#endif
