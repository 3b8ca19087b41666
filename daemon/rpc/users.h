// Shares: what the daemon has little of is counted by user and in all, so that who takes too much
// is refused and not its neighbours. Loop thread.
#ifndef KVD_DAEMON_USERS_H
#define KVD_DAEMON_USERS_H

#include <stdint.h>

#include "daemon/core/part.h"
#include "proto/base.h"

enum kvd_share {
    KVD_SHARE_CONNECTIONS,   // of both sockets
    KVD_SHARE_CALLS,         // that are not answered yet, and streams
    KVD_SHARE_REPLY_BYTES,   // of replies that are being made or have not been read
    KVD_SHARE_MAPPINGS,      // buffers of workers, each of which is one, and their segments
    KVD_SHARE_BUFFER_BYTES,  // in those that are host memory
    KVD_SHARE_SEGMENT_BYTES, // in those that are segments of a GPU's memory: addresses of kvd's
    KVD_SHARE_DESCRIPTORS,   // that were sent, until they are closed
    KVD_SHARE_SESSIONS,
    KVD_SHARE_SEQUENCES,  // that a session holds
    KVD_SHARE_NAMESPACES, // that it made, as long as they last
    KVD_SHARE_LAYOUTS,    // the same
    KVD_SHARE_LEASES,     // of prefixes and pages, by weight
    KVD_SHARE_COUNT,
};

#define KVD_USER_UNKNOWN ((int64_t)UINT32_MAX) // who comes over TCP; the kernel has no such user

struct kvd_daemon;
struct kvd_user;

// What the host makes possible, where that is less than what is configured.
void kvd_share_possible(struct kvd_daemon *d, enum kvd_share share, uint64_t possible);
// What there is of a share in all. One user may have three quarters of it.
uint64_t kvd_share_total(const struct kvd_daemon *d, enum kvd_share share);
uint64_t kvd_share_used(const struct kvd_daemon *d, enum kvd_share share);

// A reference to a user, NULL when memory is short; to be given back with kvd_user_unref.
struct kvd_user *kvd_user_ref(struct kvd_daemon *d, int64_t uid);
int64_t kvd_user_uid(const struct kvd_user *user);
// Takes *user back and leaves NULL; what was taken of shares must have been given back. NULL is
// allowed.
void kvd_user_unref(struct kvd_user **user);
// Takes n of a share for the user. KVD_E_LIMIT: the user, or all together, would have too much.
int kvd_user_take(struct kvd_user *user, enum kvd_share share, uint64_t n, struct kvd_error *err);
void kvd_user_give(struct kvd_user *user, enum kvd_share share, uint64_t n);

extern const struct kvd_part kvd_part_users;

#endif
