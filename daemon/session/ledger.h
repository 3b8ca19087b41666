// What sessions hold, in memory that outlives kvd as the pool's region does, and by the same rules
// (pool/README.md, "Crash consistency"): it can be opened as it is at any instant at which kvd may
// have ended. A record for each session: who it is, the replies that a repeated call gets. A record
// for each sequence that a session holds. Loop thread.
//
// A call that makes holds is true when its reply is remembered, or kvd_ledger_commit: what was held
// before that, of a kvd that has ended, never was.
#ifndef KVD_DAEMON_LEDGER_H
#define KVD_DAEMON_LEDGER_H

#include "daemon/core/daemon.h"

struct kvd_ledger;

#define KVD_LEDGER_NONE UINT32_MAX

enum {
    KVD_LEDGER_REPLIES = 64 << 10, // bytes of replies that are remembered of a session
    KVD_LEDGER_MOST_HOLDS = UINT16_MAX,
    KVD_LEDGER_FREEING = 16, // calls that free, of a session, at once
};

// Who a session is.
struct kvd_ledger_session {
    uint64_t id;         // never used twice
    uint64_t appender;   // names it in the pool's records of appends
    uint64_t generation; // how often it was opened: one more each time that it is resumed
    uint64_t opened_by;  // the request that opened this generation
    int64_t uid;
    char secret[KVD_SECRET_TEXT];
    char ns[KVD_MAX_NAMESPACE + 1];
    char client_name[KVD_MAX_CLIENT_NAME + 1];
};

// A new ledger. NULL with *err: KVD_E_INTERNAL.
struct kvd_ledger *kvd_ledger_new(uint32_t max_sessions, uint32_t max_holds, struct kvd_error *err);
// The same in memory that ends with the process, and takes no file: kvd_ledger_fd is -1.
struct kvd_ledger *kvd_ledger_private(uint32_t max_sessions, uint32_t max_holds,
                                      struct kvd_error *err);
// Opens what another process has left, and undoes what calls had not finished. The descriptor is
// duplicated. NULL with *err: KVD_E_INVALID (no ledger), KVD_E_UNSUPPORTED (another version),
// KVD_E_PRECONDITION (other sizes), KVD_E_CORRUPT or KVD_E_INTERNAL.
struct kvd_ledger *kvd_ledger_open(int fd, uint32_t max_sessions, uint32_t max_holds,
                                   struct kvd_error *err);
// Unmaps it. *ledger may be NULL; it becomes NULL.
void kvd_ledger_close(struct kvd_ledger **ledger);
int kvd_ledger_fd(const struct kvd_ledger *l);
// How often it was opened.
uint64_t kvd_ledger_restarts(const struct kvd_ledger *l);

// -- sessions -----------------------------------------------------------------------------------

// An id for a session.
uint64_t kvd_ledger_next_id(struct kvd_ledger *l);
// A record; KVD_LEDGER_NONE: there is no room.
uint32_t kvd_ledger_add(struct kvd_ledger *l, const struct kvd_ledger_session *s);
// Forgets a session, and with it all that it holds; the records of that are to be forgotten too.
void kvd_ledger_drop(struct kvd_ledger *l, uint32_t session);
// The record of a number below kvd_ledger_sessions, or NULL.
const struct kvd_ledger_session *kvd_ledger_session(const struct kvd_ledger *l, uint32_t session);
uint32_t kvd_ledger_sessions(const struct kvd_ledger *l);
// It is one generation further.
void kvd_ledger_resumed(struct kvd_ledger *l, uint32_t session, uint64_t opened_by);

// -- holds --------------------------------------------------------------------------------------

// One hold more. `hold`: the record of that session and sequence, KVD_LEDGER_NONE if there is none
// yet. Returns it; KVD_LEDGER_NONE: there is no room, or it is held too often.
uint32_t kvd_ledger_hold(struct kvd_ledger *l, uint32_t session, uint32_t hold, uint64_t seq);
// So many holds less, by a call of that request id (0: none). With none left the record is gone.
void kvd_ledger_release(struct kvd_ledger *l, uint32_t hold, uint32_t n, uint64_t request);
// The record of a session that has been dropped.
void kvd_ledger_forget(struct kvd_ledger *l, uint32_t hold);
// Whether the latest call that released some of it had this request id, or one of the same mark
// (32 bits of it). Before a call begins whose id is not `freeing` yet, what an earlier one has left
// is to be taken off, by releasing 0 by request 0.
bool kvd_ledger_released_by(const struct kvd_ledger *l, uint32_t hold, uint64_t request);
// Holds of a record of a number below kvd_ledger_holds, 0 if it is none.
uint32_t kvd_ledger_held(const struct kvd_ledger *l, uint32_t hold, uint32_t *session,
                         uint64_t *seq);
uint32_t kvd_ledger_holds(const struct kvd_ledger *l);

// -- calls --------------------------------------------------------------------------------------

// What the session's call holds is true.
void kvd_ledger_commit(struct kvd_ledger *l, uint32_t session);
// The same, and its reply is remembered, in the place of the oldest ones if need be. `method` is a
// number that stays the same from one kvd to the next. A reply that is too large is not remembered.
void kvd_ledger_remember(struct kvd_ledger *l, uint32_t session, uint64_t request, uint64_t method,
                         const void *reply, size_t length);
// The reply to a request, on the heap, or NULL.
void *kvd_ledger_recall(const struct kvd_ledger *l, uint32_t session, uint64_t request,
                        uint64_t *method, size_t *length);
// Whether a call that frees may begin: not too many have, and none of the same mark.
bool kvd_ledger_freeing_fits(const struct kvd_ledger *l, uint32_t session, uint64_t request);
// A call that frees has begun, which may be found half done. False: it does not fit.
bool kvd_ledger_freeing_begin(struct kvd_ledger *l, uint32_t session, uint64_t request);
// Whether it has, and was not remembered yet.
bool kvd_ledger_freeing(const struct kvd_ledger *l, uint32_t session, uint64_t request);

#endif
