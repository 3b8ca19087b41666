// The prefix index: which blocks are there, by key.
//
// A key names 64 tokens and everything before them, of one domain: a namespace, a layout, and what
// else the caller says. So blocks form trees, and a request finds what it shares with earlier ones
// as a run of keys from its first block on. Eviction takes leaves only, so that there are no holes
// in runs, and it is asked for: nothing is evicted within an insertion.
//
// The index knows no memory: a block's value is a number of its owner's. All state lives in one
// contiguous region that refers to itself by index, and may be shared memory. One thread at a time;
// each call's time is bounded by the blocks that it names, so that others wait for no more than
// that. Times are seconds of a clock that outlives the process (Unix time).
#ifndef KVD_POOL_PREFIX_H
#define KVD_POOL_PREFIX_H

#include "proto/base.h"
#include "proto/kvd_limits.h"

#define KVD_PREFIX_NONE UINT32_MAX

enum {
    KVD_PREFIX_DOMAIN_BYTES = 32,
    KVD_PREFIX_MAX_ENTRIES = 1 << 30,
    KVD_PREFIX_MAX_DOMAINS = 65535,
};

// -- keys (prefix_key.c) ------------------------------------------------------------------------

// 192 bits of SHA-256 over the domain, the key of the block before, and the block. Compared in
// full. The hash is a cryptographic one because tenants choose what is hashed: finding two inputs
// with one key takes some 2^96 hashes, and hitting another's key 2^192.
struct kvd_prefix_key {
    uint64_t w[KVD_BLOCK_KEY / 8];
};

// What separates domains: no two of (namespace, layout, extra) give the same input to the hash.
// `extra` (salt, adapters, digests of media) may be NULL. KVD_E_INTERNAL: the library failed.
int kvd_prefix_domain_digest(const char *ns, const uint8_t layout_digest[32], const void *extra,
                             size_t extra_bytes, uint8_t out[KVD_PREFIX_DOMAIN_BYTES],
                             struct kvd_error *err);
// Keys of n blocks that the caller names by its own keys of `key_bytes` each, one after the other.
// They are chained here, so the caller's need not be. `before`: the key of the block before the
// first, or NULL. KVD_E_INVALID (key_bytes), KVD_E_INTERNAL.
int kvd_prefix_keys_of_blocks(const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                              const struct kvd_prefix_key *before, const uint8_t *block_keys,
                              uint32_t key_bytes, uint32_t n, struct kvd_prefix_key *out,
                              struct kvd_error *err);
// Keys that are not chained: each of its own caller's key alone. Never equal to the others'. The
// same errors.
int kvd_prefix_keys_of_pages(const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                             const uint8_t *page_keys, uint32_t key_bytes, uint32_t n,
                             struct kvd_prefix_key *out, struct kvd_error *err);
// Chained ones of n * KVD_PAGE_TOKENS tokens. Never equal to one of kvd_prefix_keys_of_blocks.
int kvd_prefix_keys_of_tokens(const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                              const struct kvd_prefix_key *before, const uint32_t *tokens,
                              uint32_t n, struct kvd_prefix_key *out, struct kvd_error *err);

// -- the index ----------------------------------------------------------------------------------

struct kvd_prefix;

struct kvd_prefix_config {
    uint32_t entries; // blocks at most; 1 to KVD_PREFIX_MAX_ENTRIES
    uint32_t domains; // at most; 1 to KVD_PREFIX_MAX_DOMAINS
    uint64_t seed[2]; // random, so that nobody can aim keys at one bucket
};

// Bytes of the region for a configuration, 0 if that is out of range.
uint64_t kvd_prefix_region_bytes(const struct kvd_prefix_config *config);
// Returns a new index in `region`, which is page-aligned, zeroed and outlives it; NULL: in memory
// of its own. NULL with *err set: KVD_E_INVALID, -ENOMEM.
struct kvd_prefix *kvd_prefix_new(const struct kvd_prefix_config *config, void *region,
                                  struct kvd_error *err);
// Takes over a region that an index was left in, of `bytes`: checks what is written there, and
// makes anew what follows from it. Blocks, domains that have some, and leases are as they were;
// nobody holds anything. NULL with *err set: KVD_E_CORRUPT (what contradicts what; the region is
// not to be used), -ENOMEM.
struct kvd_prefix *kvd_prefix_open(void *region, uint64_t bytes, struct kvd_error *err);
// Frees the index, and its memory if that is its own. *ix may be NULL; it becomes NULL.
void kvd_prefix_free(struct kvd_prefix **ix);

// Finds or makes the domain and holds it: it stays until it is released as often and has no blocks.
// Looks at all domains. KVD_E_LIMIT: there are as many as can be.
int kvd_prefix_domain(struct kvd_prefix *ix, const uint8_t digest[KVD_PREFIX_DOMAIN_BYTES],
                      uint32_t *domain, struct kvd_error *err);
void kvd_prefix_domain_release(struct kvd_prefix *ix, uint32_t domain);
// The domain of a digest, or KVD_PREFIX_NONE; it may have no blocks any more. Looks at all domains.
uint32_t kvd_prefix_domain_find(const struct kvd_prefix *ix,
                                const uint8_t digest[KVD_PREFIX_DOMAIN_BYTES]);
// The digest of a domain below the configuration's number, NULL if it has neither blocks nor
// holders.
const uint8_t *kvd_prefix_domain_at(const struct kvd_prefix *ix, uint32_t domain);

struct kvd_prefix_query {
    uint32_t domain;
    uint32_t n;
    const struct kvd_prefix_key *keys; // of a request's blocks from its first on
    uint32_t *values;                  // room for n, or NULL
    // The answer: how many of the first blocks are there, and the last of them as an entry, or
    // KVD_PREFIX_NONE.
    uint32_t found;
    uint32_t entry;
};
// Answers many requests. What is found counts as used, and is not evicted before `lease_until` (0:
// it may be at once); an earlier lease is made longer, never shorter.
void kvd_prefix_match(struct kvd_prefix *ix, struct kvd_prefix_query *queries, uint32_t count,
                      uint32_t lease_until);
// The same without a trace: nothing counts as used, nothing is leased.
void kvd_prefix_peek(const struct kvd_prefix *ix, struct kvd_prefix_query *queries, uint32_t count);

// Adds n blocks, each under the one before it and the first under the entry `parent`
// (KVD_PREFIX_NONE: it begins a prompt). What is there already stays as it is, value included.
// *done gets how many of the blocks are there now; `at`, if not NULL, their entries. Those whose
// value is another than the given one were there before: the caller's copy is one too many.
// KVD_E_FULL: no entries were left after *done. KVD_E_INVALID: a key is there under another parent,
// which chained keys never are.
int kvd_prefix_insert(struct kvd_prefix *ix, uint32_t domain, uint32_t parent,
                      const struct kvd_prefix_key *keys, const uint32_t *values, uint32_t n,
                      uint32_t *at, uint32_t *done, struct kvd_error *err);

// Counts entries as used; KVD_PREFIX_NONE among them are passed over.
void kvd_prefix_use(struct kvd_prefix *ix, const uint32_t *entries, uint32_t n);

// In which order blocks go, where nobody keeps them: all of a class before any of the next. None of
// them is kept in memory that outlives the process.
enum kvd_prefix_class {
    KVD_PREFIX_DEMOTED, // until it is used again, and then what it was before
    KVD_PREFIX_LOW,
    KVD_PREFIX_NORMAL, // of every block, until something else is said
    KVD_PREFIX_HIGH,
};

// Says of which class the blocks of a path are that are there. A block gets a lower class than it
// has only if nothing else is behind it than those of the path that do: whoever shares a beginning
// keeps it. Returns how many are of that class now.
uint32_t kvd_prefix_classify(struct kvd_prefix *ix, uint32_t domain,
                             const struct kvd_prefix_key *keys, uint32_t n,
                             enum kvd_prefix_class class);
// The same of an entry and those before it.
uint32_t kvd_prefix_classify_to(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_class class);
// The same of entries in the order in which they are behind each other, where they are;
// KVD_PREFIX_NONE among them are passed over.
uint32_t kvd_prefix_classify_entries(struct kvd_prefix *ix, const uint32_t *entries, uint32_t n,
                                     enum kvd_prefix_class class);

// Puts a block that is there behind another one, KVD_PREFIX_NONE: behind none. The caller sees to
// it that the other one is not behind it itself.
void kvd_prefix_move(struct kvd_prefix *ix, uint32_t entry, uint32_t parent);
// Gives a block another value.
void kvd_prefix_set(struct kvd_prefix *ix, uint32_t entry, uint32_t value);

// An entry that is held, and all before it, is not evicted until it is released as often.
// KVD_E_LIMIT: held too often.
int kvd_prefix_hold(struct kvd_prefix *ix, uint32_t entry, struct kvd_error *err);
void kvd_prefix_release(struct kvd_prefix *ix, uint32_t entry);
// Sets the time until which the entry, and all before it, is not evicted; 0 ends it.
void kvd_prefix_lease(struct kvd_prefix *ix, uint32_t entry, uint32_t until);

enum kvd_prefix_reason {
    KVD_PREFIX_UNKNOWN,       // never there, or gone for too long to be remembered
    KVD_PREFIX_PRESENT,       // it is there
    KVD_PREFIX_EVICTED_ROOM,  // memory was wanted
    KVD_PREFIX_EVICTED_QUOTA, // the namespace's quota was reached
    KVD_PREFIX_EVICTED_INDEX, // the index was full
    KVD_PREFIX_DROPPED,       // somebody asked for it
    KVD_PREFIX_DAMAGED,       // it did not verify
    KVD_PREFIX_EVICTED_ASKED, // an operator wanted memory back
    KVD_PREFIX_EXPIRED,       // the time that it was stored for was over
    KVD_PREFIX_SUPERSEDED,    // another block stands in its place
    KVD_PREFIX_REASONS,
};
const char *kvd_prefix_reason_name(enum kvd_prefix_reason reason);

struct kvd_prefix_removed {
    struct kvd_prefix_key key;
    uint32_t domain, entry, value; // nothing is known by that entry any more
    uint32_t age;                  // seconds since its last use, at most: see prefix_reuse.c
    const uint8_t *digest;         // of the domain; valid during the call
    enum kvd_prefix_reason reason;
};
// Told of each block that goes; the value is its owner's again. Must not call the index.
typedef void kvd_prefix_removed_fn(void *ctx, const struct kvd_prefix_removed *removed);

// Evicts up to `most` blocks that nobody holds and no lease keeps, leaves first, those first that
// are of the lowest class and in it least worth keeping (prefix_reuse.c). `reason` is one of
// KVD_PREFIX_EVICTED. Returns how many; fewer than `most`: there are no others.
uint32_t kvd_prefix_evict(struct kvd_prefix *ix, uint32_t most, enum kvd_prefix_reason reason,
                          uint32_t now, kvd_prefix_removed_fn *fn, void *ctx);
// Removes blocks of a path from its end on, down to the first `keep`, and stops at one that is held
// or has other blocks behind it; leases do not count. Returns how many went.
uint32_t kvd_prefix_drop(struct kvd_prefix *ix, uint32_t domain, const struct kvd_prefix_key *keys,
                         uint32_t n, uint32_t keep, enum kvd_prefix_reason reason, uint32_t now,
                         kvd_prefix_removed_fn *fn, void *ctx);

// Removes entries, which are there, but those that are held or have others behind them that stay.
// Sorts the list. Returns how many went.
uint32_t kvd_prefix_remove_entries(struct kvd_prefix *ix, uint32_t *entries, uint32_t n,
                                   enum kvd_prefix_reason reason, uint32_t now,
                                   kvd_prefix_removed_fn *fn, void *ctx);
// Removes an entry and those before it, up to the first that is held or has others behind it.
// Returns how many went.
uint32_t kvd_prefix_remove(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_reason reason,
                           uint32_t now, kvd_prefix_removed_fn *fn, void *ctx);
// Where a clearing or a cut is; zeros begin one.
struct kvd_prefix_cursor {
    uint32_t next; // the entry that is looked at next,
    uint32_t path; // after this one and those before it on its path: + 1, 0: none
};
// Goes on removing the entries below n for which `cut` is true; whatever is behind one of them is
// to be among them. What is held or leased stays, and what is before it. Looks at most at *most
// entries, which it counts down. True: it has looked at all.
bool kvd_prefix_cut(struct kvd_prefix *ix, const bool *cut, uint32_t n,
                    struct kvd_prefix_cursor *at, uint32_t *most, enum kvd_prefix_reason reason,
                    uint32_t now, kvd_prefix_removed_fn *fn, void *ctx);
// Goes on removing all blocks of a domain (KVD_PREFIX_NONE: of all) that nobody holds; leases do
// not count. Looks at most at *most entries, which it counts down. True: it has looked at all.
bool kvd_prefix_clear(struct kvd_prefix *ix, uint32_t domain, struct kvd_prefix_cursor *at,
                      uint32_t *most, enum kvd_prefix_reason reason, uint32_t now,
                      kvd_prefix_removed_fn *fn, void *ctx);

// The entry of a block wherever it is in a prompt, or KVD_PREFIX_NONE.
uint32_t kvd_prefix_entry(const struct kvd_prefix *ix, uint32_t domain,
                          const struct kvd_prefix_key *key);
// Why a block is not there, as far as that is remembered; *when gets the time at which it went.
enum kvd_prefix_reason kvd_prefix_why(const struct kvd_prefix *ix, uint32_t domain,
                                      const struct kvd_prefix_key *key, uint32_t *when);

// Notes why part of a block is gone that is itself there still, and tells: kvd_prefix_why says only
// that it is there. UNKNOWN: nothing is noted, or remembered.
void kvd_prefix_note(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_reason reason,
                     uint32_t now);
enum kvd_prefix_reason kvd_prefix_noted(const struct kvd_prefix *ix, uint32_t entry,
                                        uint32_t *when);

struct kvd_prefix_entry_info {
    struct kvd_prefix_key key;
    uint32_t domain, parent, value, lease, holds, children;
    enum kvd_prefix_class class;
};
// False: there is no such entry.
bool kvd_prefix_get(const struct kvd_prefix *ix, uint32_t entry, struct kvd_prefix_entry_info *out);

struct kvd_prefix_info {
    uint32_t capacity, entries, domains;
    uint32_t ever; // numbers of entries are below it
    uint64_t inserted, removed[KVD_PREFIX_REASONS];
    uint64_t region_bytes;
};
void kvd_prefix_info(const struct kvd_prefix *ix, struct kvd_prefix_info *out);

// Compares everything with everything. For tests. KVD_E_CORRUPT with a description, or KVD_OK.
int kvd_prefix_verify(const struct kvd_prefix *ix, struct kvd_error *err);

#endif
