// Lookups that wait for a tier or for another session keep their requests meanwhile, for minutes if
// that was asked for. What all of them may take is bounded, and shared by namespaces and sessions
// as the memory of compute calls is: who does not fit does not wait. Loop thread.
#ifndef KVD_DAEMON_WAITS_H
#define KVD_DAEMON_WAITS_H

#include "daemon/core/part.h"

// One of them, inside of what is its owner's; zeros at first.
struct kvd_wait {
    uint64_t bytes;
    struct kvd_wait_session *of; // NULL: it does not wait
};

// It waits, with so many bytes; true also if it did. False: there is no room for that.
bool kvd_wait_begin(struct kvd_daemon *d, struct kvd_wait *w, uint32_t ns, uint64_t session,
                    uint64_t bytes);
// It waits no more, if it did.
void kvd_wait_end(struct kvd_daemon *d, struct kvd_wait *w);

extern const struct kvd_part kvd_part_waits;

#endif
