// Sessions: what a worker holds, and the end of it. Loop thread.
#ifndef KVD_DAEMON_SESSION_H
#define KVD_DAEMON_SESSION_H

#include <uthash.h>

#include "daemon/core/part.h"

enum {
    KVD_REPLAY_SLOTS = 256,       // replies remembered per session
    KVD_REPLAY_BYTES = 1 << 20,   // of them, as long as all sessions' fit KVD_REPLAY_TOTAL
    KVD_REPLAY_TOTAL = 256 << 20, // of all sessions
    KVD_MAX_HELD = 65536,         // sequences held by one session
};

struct kvd_buffer;     // buffer.h
struct kvd_call;       // rpc.h
struct kvd_connection; // fdsock.h: a worker's fd-socket connection
struct kvd_user;       // users.h

struct kvd_held {
    uint64_t seq;
    uint32_t holds; // times that it was made or attached, less times that it was freed
    UT_hash_handle hh;
};

// The reply to a call with a request id, for when it is repeated.
struct kvd_replay {
    uint64_t request_id;
    const void *method;
    uint8_t *data;
    size_t len;
};

struct kvd_session {
    char secret[KVD_SECRET_TEXT];
    uint64_t id;
    uint64_t appender; // random: names the session in the pool's records, which may outlive it
    uint32_t ns, layout;
    char client_name[KVD_MAX_CLIENT_NAME + 1];
    struct kvd_connection *connection; // NULL: leased
    int64_t pid, uid;
    struct kvd_user *user; // who is charged
    uint32_t lease_ms;
    uint64_t opened_ms, used_ms;
    uint64_t calls;
    uint64_t open_request; // request_id of its OpenSession
    struct kvd_held *held;
    struct kvd_buffer *buffers;
    uint64_t buffer_bytes;
    float *sinks;      // for each layer of the layout, one for each of its q heads; NULL: none
    uint32_t *extents; // per extent: the version that was sent over the fd socket; NULL: none yet
    uint32_t rotations_sent; // planes, one bit each
    struct kvd_replay replays[KVD_REPLAY_SLOTS];
    uint32_t next_replay;
    size_t replay_bytes;
    struct kvd_call *watchers; // linked by call->next_watch
    UT_hash_handle hh;
};

// The session of a secret, marked as used; NULL if there is none.
struct kvd_session *kvd_session_find(struct kvd_daemon *d, const char *secret);
// A session of a user, who is charged. It takes over the holds on namespace and layout.
// KVD_E_LIMIT: the user or the namespace has enough of them.
int kvd_session_new(struct kvd_daemon *d, uint32_t ns, uint32_t layout, struct kvd_connection *conn,
                    int64_t uid, struct kvd_session **out, struct kvd_error *err);
// Has it end when it was not used for so long.
void kvd_session_lease(struct kvd_daemon *d, struct kvd_session *s, uint32_t lease_ms);
// Ends a session: releases its sequences and buffers, ends its event streams, forgets it.
void kvd_session_end(struct kvd_daemon *d, struct kvd_session *s, const char *why);
// How many times the session holds a sequence. In the pool it is one holder, however many.
uint32_t kvd_session_holds(const struct kvd_session *s, uint64_t seq);
// Adds a hold; *first tells that it was the first, which the pool wants to know. KVD_E_LIMIT.
int kvd_session_add_held(struct kvd_session *s, uint64_t seq, bool *first, struct kvd_error *err);
// Takes one away; true if it was the last.
bool kvd_session_drop_held(struct kvd_session *s, uint64_t seq);

extern const struct kvd_part kvd_part_sessions;

#endif
