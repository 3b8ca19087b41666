// Sessions: what a worker holds, and the end of it. Loop thread.
#ifndef KVD_DAEMON_SESSION_H
#define KVD_DAEMON_SESSION_H

#include <uthash.h>

#include "daemon/core/part.h"

enum {
    KVD_MAX_HELD = 65536,         // sequences held by one session
    KVD_SESSION_TEXT = 96,        // a session's name in calls: id, generation, secret
    KVD_SESSION_RECORDS = 100000, // as many as max-sessions may be
};

struct kvd_buffer;     // buffer.h
struct kvd_call;       // rpc.h
struct kvd_connection; // fdsock.h: a worker's fd-socket connection
struct kvd_user;       // users.h

struct kvd_held {
    uint64_t seq;
    uint32_t holds;  // times that it was made or attached, less times that it was freed
    uint32_t record; // in the ledger
    UT_hash_handle hh;
};

struct kvd_session {
    uint64_t id;
    uint64_t generation; // how often it was opened: calls carry it, and those of an earlier one are
                         // refused
    char secret[KVD_SECRET_TEXT];
    uint64_t appender; // random: names the session in the pool's records, which may outlive it
    uint32_t ns;
    uint32_t layout; // KVD_POOL_NONE: it waits to be resumed, and holds nothing
    uint32_t exact; // the same in bf16, for pages that are kept exact; KVD_POOL_NONE: no page calls
    uint8_t digests[2][32]; // of these two layouts, where there are page calls
    struct kvd_ledger *ledger;
    uint32_t record; // in the ledger
    bool parked;     // it waits to be resumed: its kvd has ended
    char client_name[KVD_MAX_CLIENT_NAME + 1];
    struct kvd_connection *connection; // NULL: leased
    int64_t pid, uid;
    struct kvd_user *user; // who is charged
    uint32_t lease_ms;
    uint64_t opened_ms, used_ms;
    uint64_t calls;
    uint64_t open_request; // request_id of the OpenSession that made this generation
    struct kvd_held *held;
    uint32_t leases; // of prefixes
    struct kvd_buffer *buffers;
    uint64_t buffer_bytes, counted_bytes; // of these, against max-buffer-bytes
    float *sinks;      // for each layer of the layout, one for each of its q heads; NULL: none
    uint32_t n_sinks;  // how many they are
    uint32_t *extents; // per extent: the version that was sent over the fd socket; NULL: none yet
    uint32_t rotations_sent; // planes, one bit each
    uint64_t fitted_length;  // positions that its rotation set knows are below; 0: all, or not said
    bool beyond;             // some of its tokens lie further, and the log has been told
    UT_hash_handle hh;
};

// What a session is to be.
struct kvd_session_options {
    uint32_t ns, layout;
    struct kvd_connection *connection; // NULL: leased
    int64_t uid;
    const char *ns_name, *client_name;
    uint64_t request; // that opens it
};

// The session that a call names, marked as used. KVD_E_UNAUTH says why there is none.
struct kvd_session *kvd_session_named(struct kvd_daemon *d, const char *name,
                                      struct kvd_error *err);
// The same for who need not know why.
struct kvd_session *kvd_session_find(struct kvd_daemon *d, const char *name);
// Its name in calls.
void kvd_session_name(const struct kvd_session *s, char out[KVD_SESSION_TEXT]);
// A session of a user, who is charged. It takes over the holds on namespace and layout.
// KVD_E_LIMIT: the user or the namespace has enough of them.
int kvd_session_new(struct kvd_daemon *d, const struct kvd_session_options *o,
                    struct kvd_session **out, struct kvd_error *err);
// The session of a name that a worker wants to go on with, whatever has become of its connection.
// *again: it has been resumed by this very request. KVD_E_UNAUTH says why there is none, or why it
// is not the caller's any more; KVD_E_PRECONDITION: it is of another namespace.
int kvd_session_resumable(struct kvd_daemon *d, const char *name,
                          const struct kvd_session_options *o, struct kvd_session **out,
                          bool *again, struct kvd_error *err);
// Goes on with it on another connection: what the one before had registered is gone, and its calls
// are refused from now on, unless it is resumed `again` by the same request. Takes over the holds
// on namespace and layout. KVD_E_PRECONDITION: another layout.
int kvd_session_resume(struct kvd_daemon *d, struct kvd_session *s,
                       const struct kvd_session_options *o, bool again, struct kvd_error *err);
// How many wait to be resumed.
uint32_t kvd_sessions_waiting(const struct kvd_daemon *d);
// Has it end when it was not used for so long.
void kvd_session_lease(struct kvd_daemon *d, struct kvd_session *s, uint32_t lease_ms);
// Ends a session: releases its sequences and buffers, ends its event streams, forgets it.
void kvd_session_end(struct kvd_daemon *d, struct kvd_session *s, const char *why);
// A sequence has grown beyond the session's fitted_length: the log is told the first time.
void kvd_session_beyond(struct kvd_daemon *d, uint64_t id, uint64_t seq, uint64_t length);
// How many times the session holds a sequence. In the pool it is one holder, however many.
uint32_t kvd_session_holds(const struct kvd_session *s, uint64_t seq);
// Adds a hold; *first tells that it was the first, which the pool wants to know. KVD_E_LIMIT.
int kvd_session_add_held(struct kvd_session *s, uint64_t seq, bool *first, struct kvd_error *err);
// Takes one away; true if it was the last.
bool kvd_session_drop_held(struct kvd_session *s, uint64_t seq);
// The same for n of them, by a call of that request id. One that has done so before, and whose kvd
// has ended, changes nothing.
bool kvd_session_drop_holds(struct kvd_session *s, uint64_t seq, uint32_t n, uint64_t request);
// A call of that request id has not taken any away yet, whatever one before it with a like id did.
void kvd_session_drops_anew(struct kvd_session *s, uint64_t seq, uint64_t request);

extern const struct kvd_part kvd_part_sessions;

#endif
