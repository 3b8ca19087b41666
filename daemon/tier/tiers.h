// The tiers of the configuration, nearest first: the host's memory, a directory, a server. What is
// put goes to all of them, beside what else goes on; what is wanted is asked of the nearest first.
// Everything fails softly: the worst that a tier can do is to miss. Loop thread.
#ifndef KVD_DAEMON_TIER_TIERS_H
#define KVD_DAEMON_TIER_TIERS_H

#include "daemon/core/part.h"
#include "daemon/tier/tier.h"

enum { KVD_TIERS_MOST = 3 };

// How many there are, and one of them.
uint32_t kvd_tiers_count(const struct kvd_daemon *d);
struct kvd_tier *kvd_tiers_get_tier(const struct kvd_daemon *d, uint32_t i);
// The tier of that name ("host", "directory", "redis"), or NULL.
struct kvd_tier *kvd_tiers_find(const struct kvd_daemon *d, const char *name);

// The key under which tiers have a block's pages in a plane, by the domain and the key of the
// prefix index, and the layout's digest; there are tiers. KVD_E_INTERNAL.
int kvd_tiers_key(const struct kvd_daemon *d, const uint8_t domain[32], const uint8_t layout[32],
                  const void *key, uint32_t plane, struct kvd_tier_key *out, struct kvd_error *err);

// Which tiers have it: bit i for number i.
typedef void kvd_tiers_stored(void *ctx, uint32_t tiers);
// Sends the block to all tiers. Takes references of its own. `done` is called once, when the last
// has answered; at once if there are none.
void kvd_tiers_put(struct kvd_daemon *d, const struct kvd_tier_key *key, const uint8_t layout[32],
                   struct kvd_block *block, kvd_tiers_stored *done, void *ctx);
// Has all tiers drop it, and not put into nearer ones what comes from a far one meanwhile. `done`
// is called for each tier.
void kvd_tiers_drop(struct kvd_daemon *d, const struct kvd_tier_key *key, kvd_tier_done *done,
                    void *ctx);
// Whether one of them would take a put now, and not have it wait behind too much.
bool kvd_tiers_take(const struct kvd_daemon *d);

// `block` is the callee's reference, or NULL: no tier has it. `tier` is which one had.
typedef void kvd_tiers_got(void *ctx, struct kvd_block *block, uint32_t tier);
// Asks one tier after the other. What a far one has is put into the nearer ones. `done` is called
// once. KVD_E_UNAVAILABLE: there is none; `done` is not called.
int kvd_tiers_get(struct kvd_daemon *d, const struct kvd_tier_key *key, const uint8_t layout[32],
                  uint64_t bytes, kvd_tiers_got *done, void *ctx, struct kvd_error *err);

// `where`[i]: 1 + the nearest tier that has key i, 0 for none; valid during the call.
typedef void kvd_tiers_found(void *ctx, const uint8_t *where);
// Asks all tiers at once, for at most KVD_TIER_MOST_KEYS keys. `done` is called once, when the last
// has answered. KVD_E_UNAVAILABLE: there is none, or more keys; `done` is not
// called.
int kvd_tiers_has(struct kvd_daemon *d, const struct kvd_tier_key *keys, uint32_t n,
                  kvd_tiers_found *done, void *ctx, struct kvd_error *err);

extern const struct kvd_part kvd_part_tiers;

#endif
