// The region of the prefix index. Private to pool/prefix*.c.
#ifndef KVD_POOL_PREFIX_INTERNAL_H
#define KVD_POOL_PREFIX_INTERNAL_H

#include "pool/prefix.h"

#define KVD_PREFIX_MAGIC 0x3558495046564b44ull

enum {
    REUSE_CLASSES = 6, // by number of uses: 1, 2, 3-4, 5-8, 9-16, more
    REUSE_AGES = 64,   // since the last use: 32 of a tick, 16 of 8 ticks, 16 of 64 and beyond
    REUSE_SHELVES = REUSE_CLASSES * REUSE_AGES,
    REUSE_MAX_USES = 31,
    REUSE_LOW = 32, // of prefix_entry's `uses`: the class, KVD_PREFIX_NORMAL without either
    REUSE_HIGH = 64,
    REUSE_DEMOTED = 128,
    REUSE_ORDERS = 3, // low, normal, high: shelves of their own

    GHOST_WAYS = 16,
    GHOSTS_PER_ENTRY = 6,
    REUSE_TIMES = 2048, // the latest ticks of which it is known when they began
    REMOVED_WAYS = 4,
    ENTRIES_PER_REMOVED = 16,

    // Before them: REUSE_SHELVES for each of REUSE_ORDERS.
    LIST_LEASED = REUSE_ORDERS * REUSE_SHELVES, // leaves that eviction came upon and a lease kept
    LIST_DEMOTED,                               // those that go before all others
    LISTS,
};

// As in internal.h, what is below "-- derived" follows from what is above it, or may be lost.
struct prefix_entry {
    struct kvd_prefix_key key;
    uint32_t parent; // entry, or KVD_PREFIX_NONE
    uint32_t value;
    uint32_t lease;
    uint16_t domain;
    bool used;
    // -- derived
    uint8_t uses;   // up to REUSE_MAX_USES, and the class
    uint32_t chain; // the next entry of its bucket, or the next free one; as those in `bucket`
    uint32_t children;
    uint32_t prev, next; // in a list of leaves; KVD_PREFIX_NONE: in none
    uint32_t tick;       // of its last use
    uint32_t holds;
};
_Static_assert(sizeof(struct prefix_entry) == 64, "an entry is a line of the cache");

// A domain is in use while it has blocks or holders.
struct prefix_domain {
    uint8_t digest[KVD_PREFIX_DOMAIN_BYTES];
    // -- derived
    uint32_t entries, holders;
};

// A block that is gone: sets of REMOVED_WAYS, the latest first.
struct prefix_gone {
    struct kvd_prefix_key key;
    uint32_t when;
    uint16_t domain;
    uint8_t reason; // KVD_PREFIX_UNKNOWN: empty
};

struct prefix_list {
    uint32_t first, last;
};

// What is known of how blocks are used again: prefix_reuse.c. A *life* begins with a use, has that
// use's class, and ends with the next use.
struct prefix_reuse {
    uint32_t tick;
    uint64_t uses;                           // since the last tick
    double lives[REUSE_CLASSES][REUSE_AGES]; // that go on, by their bucket
    double seen[REUSE_CLASSES][REUSE_AGES];  // lives that reached the age, faded
    double ended[REUSE_CLASSES][REUSE_AGES]; // of those, ended at it, faded
    uint32_t lease_ends;                     // no lease of a leaf that was put aside ends before
    uint16_t shelf_at[REUSE_SHELVES];        // by rank, what is least worth keeping first
    uint16_t rank_of[REUSE_SHELVES];
    // By rank: shelves that may have entries.
    uint64_t filled[REUSE_ORDERS][(REUSE_SHELVES + 63) / 64];
};

struct prefix_head {
    uint64_t magic;
    uint64_t region_bytes;
    struct kvd_prefix_config config;
    uint64_t inserted, removed[KVD_PREFIX_REASONS];
    // -- derived
    uint32_t entries;
    uint32_t ever;                           // entries from here on were never used
    uint32_t free;                           // as those in `bucket`
    uint32_t buckets, ghost_sets, gone_sets; // of config
    struct prefix_list list[LISTS];
    struct prefix_reuse reuse;
};

struct kvd_prefix {
    void *own; // the region, if it is the index's to free
    struct prefix_head *head;
    struct prefix_domain *domain;
    uint32_t *bucket; // entry + 1; 0: none, so that what was never used costs no memory
    struct prefix_entry *entry;
    uint32_t *ghost;
    struct prefix_gone *gone;
    // When ticks began, by number modulo its length: of this process, as ticks are.
    uint32_t tick_began[REUSE_TIMES];
};

// 64 bits of the key, by the region's seed.
static inline uint64_t prefix_hash(const struct kvd_prefix *ix, uint32_t domain,
                                   const struct kvd_prefix_key *key)
{
    const uint64_t *seed = ix->head->config.seed;
    unsigned __int128 m = (unsigned __int128)(key->w[0] ^ seed[0]) * (key->w[1] ^ seed[1] ^ domain);
    return (uint64_t)m ^ (uint64_t)(m >> 64);
}
// One of n, evenly.
static inline uint32_t prefix_place(uint64_t hash, uint32_t n)
{
    return (uint32_t)(((unsigned __int128)hash * n) >> 64);
}
static inline bool prefix_key_equal(const struct kvd_prefix_key *a, const struct kvd_prefix_key *b)
{
    return !((a->w[0] ^ b->w[0]) | (a->w[1] ^ b->w[1]) | (a->w[2] ^ b->w[2]));
}

// -- prefix_reuse.c: what is worth keeping ------------------------------------------------------
// Makes everything of it anew, as if nothing had been used yet. No leaves are on shelves.
void reuse_clear(struct kvd_prefix *ix);
// Lets time go on by the uses that there were, if that is more than `most` ticks. What one request
// uses, first blocks and last, is to have one time.
void reuse_advance(struct kvd_prefix *ix, uint32_t most);
// The entry is new.
void reuse_new(struct kvd_prefix *ix, struct prefix_entry *e, uint64_t hash);
// The entry is used again.
void reuse_again(struct kvd_prefix *ix, struct prefix_entry *e);
// The entry goes; if it is not `wanted` back, it is as if it had never been.
void reuse_gone(struct kvd_prefix *ix, const struct prefix_entry *e, uint64_t hash, bool wanted);
// Seconds since the entry's last use, at most.
uint32_t reuse_age(const struct kvd_prefix *ix, const struct prefix_entry *e, uint32_t now);
// A block was used that has no entry and gets none.
void reuse_passed(struct kvd_prefix *ix, uint64_t hash);
// Puts a leaf on its shelf, or takes it off whatever list it is on.
void leaf_file(struct kvd_prefix *ix, uint32_t entry);
void leaf_unfile(struct kvd_prefix *ix, uint32_t entry);
// The leaf least worth keeping whose lease is over, or KVD_PREFIX_NONE.
uint32_t leaf_choose(struct kvd_prefix *ix, uint32_t now);

static inline enum kvd_prefix_class prefix_class(const struct prefix_entry *e)
{
    return e->uses & REUSE_DEMOTED ? KVD_PREFIX_DEMOTED
           : e->uses & REUSE_LOW   ? KVD_PREFIX_LOW
           : e->uses & REUSE_HIGH  ? KVD_PREFIX_HIGH
                                   : KVD_PREFIX_NORMAL;
}

// -- prefix.c -----------------------------------------------------------------------------------
// Gives each table its place in the region. With base NULL only the size is computed.
uint64_t prefix_lay_out(struct kvd_prefix *ix, const struct kvd_prefix_config *config,
                        uint8_t *base);
// Makes anew what is derived, for an index without entries. `zeroed`: the region is.
void prefix_start(struct kvd_prefix *ix, bool zeroed);

#endif
