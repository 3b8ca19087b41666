// A tier: a place behind the pool where blocks are kept by key. One front for all kinds, so that
// none can do more harm than to miss: it bounds what waits and what is with the tier, gives up what
// takes too long, leaves a tier alone that keeps failing, limits the rate of what is written, and
// counts. Behind it is an ops table for each kind (backend.h).
//
// Everything here belongs to the loop thread and returns at once. An operation's `done` is called
// once, from the loop and never from within the call that asked for it.
#ifndef KVD_DAEMON_TIER_TIER_H
#define KVD_DAEMON_TIER_TIER_H

#include <uv.h>

#include "daemon/core/metrics.h"
#include "daemon/tier/block.h"

enum kvd_tier_verb {
    KVD_TIER_PUT,
    KVD_TIER_GET,
    KVD_TIER_HAS,
    KVD_TIER_DROP,
    KVD_TIER_FLUSH, // drops all blocks
    KVD_TIER_VERBS,
};

enum kvd_tier_result {
    KVD_TIER_OK,
    KVD_TIER_MISS,    // it is not there
    KVD_TIER_DAMAGED, // it was there and did not verify: dropped
    KVD_TIER_FULL,    // there is no room for it
    KVD_TIER_REFUSED, // too much waits, or the tier is left alone for a while
    KVD_TIER_TIMEOUT,
    KVD_TIER_FAILED, // the tier said no, or is gone
    KVD_TIER_CLOSED, // kvd stops
    KVD_TIER_RESULTS,
};
const char *kvd_tier_verb_name(enum kvd_tier_verb verb);
const char *kvd_tier_result_name(enum kvd_tier_result result);

struct kvd_tier_settings {
    uint64_t timeout_ms; // of an operation, all its waiting included; a put's from when it is sent
    uint64_t ttl_s;      // 0: none
    uint64_t rate;       // bytes a second that are written; 0: no limit
    const struct kvd_tier_secret *secret; // must outlive the tier; NULL: none
    struct kvd_pinned *memory; // for blocks that are got; must outlive the tier; NULL: malloc's
};

struct kvd_tier;
struct kvd_tier_ops;

// Takes the back end over: `ops` and `state` as its own file made them; it is closed with the tier,
// and after a failure here at once. NULL with *err set: out of memory, or what uv says.
struct kvd_tier *kvd_tier_new(uv_loop_t *loop, const struct kvd_tier_ops *ops, void *state,
                              const struct kvd_tier_settings *settings, struct kvd_error *err);
// Ends it: what waits or runs is done with KVD_TIER_CLOSED, nothing may be asked any more. The back
// end has two seconds to end its threads; false if one hangs and is left behind, with the secret
// and the memory that it uses. Frees the tier when the loop has closed its handles. *t may be NULL
// and becomes NULL.
bool kvd_tier_close(struct kvd_tier **t);

struct kvd_tier_reply {
    enum kvd_tier_result result;
    struct kvd_block *block; // of a get that is OK: the callee's reference, else NULL
    const bool *has;         // of a HAS that is OK, by key; valid during the call
};
typedef void kvd_tier_done(void *ctx, const struct kvd_tier_reply *reply);

// `done` may be NULL. Takes a reference to the block of its own. What is there already counts as
// put. Of a put and a drop of one key that which is asked for later is done later.
void kvd_tier_put(struct kvd_tier *t, const struct kvd_tier_key *key, const uint8_t layout[32],
                  struct kvd_block *block, kvd_tier_done *done, void *ctx);
// Whether a put would be taken now, and not wait behind too much.
bool kvd_tier_takes(const struct kvd_tier *t);
// `bytes` is the payload that the layout says.
void kvd_tier_get(struct kvd_tier *t, const struct kvd_tier_key *key, const uint8_t layout[32],
                  uint64_t bytes, kvd_tier_done *done, void *ctx);
// At most KVD_TIER_MOST_KEYS keys; copied.
enum { KVD_TIER_MOST_KEYS = 4096 };
void kvd_tier_has(struct kvd_tier *t, const struct kvd_tier_key *keys, uint32_t n,
                  kvd_tier_done *done, void *ctx);
void kvd_tier_drop(struct kvd_tier *t, const struct kvd_tier_key *key, kvd_tier_done *done,
                   void *ctx);
void kvd_tier_flush(struct kvd_tier *t, kvd_tier_done *done, void *ctx);

// Why a block went that nobody asked to go.
enum kvd_tier_loss {
    KVD_TIER_LOST_ROOM,    // the tier's size was reached: the least recently used go
    KVD_TIER_LOST_EXPIRED, // its time was over, and somebody came upon it
    KVD_TIER_LOSSES,
};
const char *kvd_tier_loss_name(enum kvd_tier_loss loss);
struct kvd_tier_lost {
    uint64_t blocks[KVD_TIER_LOSSES];
    struct kvd_ages ages; // of what went for room: seconds since it was used
};

struct kvd_tier_status {
    const char *name;              // of its kind
    char where[256];               // for people
    const char *state;             // "ok", "failing" (left alone, or known not to work), "full"
    char why[256];                 // the last failure's reason; "" if there was none
    uint64_t blocks, bytes, limit; // 0: not known, or no limit
    uint32_t waiting, running;
    uint64_t count[KVD_TIER_VERBS][KVD_TIER_RESULTS];
    uint64_t bytes_in, bytes_out; // that were put and got
    // Of tiers whose room is kvd's to make; others evict by themselves.
    struct kvd_tier_lost lost;
    struct kvd_histogram latency[KVD_TIER_VERBS];
};
const char *kvd_tier_name(const struct kvd_tier *t);
void kvd_tier_status(const struct kvd_tier *t, struct kvd_tier_status *out);

#endif
