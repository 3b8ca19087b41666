// What several handlers need: the session of a request, and replies that are remembered for
// retries. Loop thread.
#ifndef KVD_DAEMON_REPLAY_H
#define KVD_DAEMON_REPLAY_H

#include "daemon/rpc/rpc.h"
#include "daemon/session/session.h"

// Finds the session of a request; answers the call and returns NULL if there is none.
struct kvd_session *kvd_call_session(struct kvd_call *call, const char *name);
// Answers a repeated request id from memory. False: go on.
bool kvd_call_replayed(struct kvd_call *call, struct kvd_session *s, uint64_t request_id);
// Whether a call of that id has been answered, as another may be while this one goes on.
bool kvd_call_answered(const struct kvd_session *s, uint64_t request_id);
// Replies, and remembers the reply under the request id (0: does not remember), for a kvd after
// this one too. What the call has made the session hold is true with this.
void kvd_call_reply_remember(struct kvd_call *call, struct kvd_session *s, uint64_t request_id,
                             const void *reply);

#endif
