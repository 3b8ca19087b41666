// Blocks that others can use: pages of sequences under the keys of a prefix index (prefix.h).
//
// Block number i of a sequence is its tokens from 64 i on, in all planes. It is *sealed* when no
// append writes there any more: a whole page of the sink, or of history. A block that is published
// keeps its pages when its sequence goes; whoever adopts it refers to them, and gets private copies
// of what it writes.
//
// The last tokens of a sequence are in its recent window and are no block yet. An *end* keeps them:
// a sequence of its own, without a holder, that shares all pages with the one that was published,
// up to its last whole block. Whoever adopts at an end, or before it but within its window, goes on
// with the same bits in every page as if that sequence had been cut there. A cut elsewhere has a
// history up to the cut and an empty window: its last tokens are compressed ones.
//
// Layouts whose sink is no whole number of blocks are not shared this way. One thread at a time;
// the time of each call is bounded by the blocks that it names.
#ifndef KVD_POOL_BLOCKS_H
#define KVD_POOL_BLOCKS_H

#include "pool/pool.h"
#include "pool/prefix.h"

enum { KVD_BLOCKS_MAX = KVD_MAX_PROMPT_BLOCKS }; // that a call names

// Where keys mean something: `domain` is a digest over namespace, layout and whatever else
// (kvd_prefix_domain_digest).
struct kvd_blocks_space {
    uint32_t ns, layout;
    uint8_t domain[KVD_PREFIX_DOMAIN_BYTES];
};

// Where a sequence can be cut off from what is there. Valid until something changes the pool, or as
// long as it is held.
struct kvd_blocks_at {
    uint32_t ns, layout;
    uint32_t blocks;       // before the cut; 0: there are none
    uint32_t entry, depth; // of the last block that is wanted for it, and blocks up to that one
    uint64_t end;          // the end that has its window; 0: none
};

struct kvd_blocks_match {
    const struct kvd_prefix_key *keys; // of a request's blocks, from its first on
    uint32_t n;                        // up to KVD_BLOCKS_MAX
    // The answer.
    uint32_t known;  // leading blocks whose keys are known
    uint32_t window; // tokens before the cut that are in the recent windows of all planes
    bool end;        // the cut is where an end ends
    struct kvd_blocks_at at;
    // Of the first block that is not known; PRESENT: all are. DAMAGED: the place ends where it does
    // as a known one was.
    enum kvd_prefix_reason why;
    uint32_t when; // it went
};
// Looks up one request. With `use` what is found counts as used.
void kvd_blocks_match(struct kvd_pool *pool, const struct kvd_blocks_space *space, bool use,
                      struct kvd_blocks_match *match);

// What is held is not evicted until it is released as often. KVD_E_NOT_FOUND (no blocks),
// KVD_E_LIMIT.
int kvd_blocks_hold(struct kvd_pool *pool, const struct kvd_blocks_at *at, struct kvd_error *err);
void kvd_blocks_release(struct kvd_pool *pool, const struct kvd_blocks_at *at);

// A new sequence of the first `blocks` blocks of a place, with one holder. Nothing is copied.
// KVD_E_PRECONDITION: more than there are, or planes with windows lack what they would see there;
// KVD_E_LIMIT: as kvd_pool_seq_new.
int kvd_blocks_adopt(struct kvd_pool *pool, const struct kvd_blocks_at *at, uint32_t blocks,
                     uint64_t *seq, struct kvd_error *err);

struct kvd_blocks_published {
    uint32_t blocks; // of the keys, that are in the index now
    uint32_t sealed; // of those, that are sealed in the sequence
    uint32_t known;  // of those, that were there before
    bool end;        // there is an end
};
// Gives keys to the first blocks of a sequence, as far as they are sealed; with `end` up to its
// last whole block, or as far as there are keys, with an end there, if a plane with a window has
// not freed what that would see. Blocks that are there already stay as they are, and get pages that
// they lack. Older ends on the way are the first to be evicted from then on. Where the index is
// full of what is in use, *out says how far it went. KVD_E_NOT_FOUND; KVD_E_PRECONDITION (another
// namespace or layout; with `end`: an append is unfinished); KVD_E_UNSUPPORTED (the sink);
// KVD_E_INVALID (keys that are not chained); KVD_E_LIMIT (domains; with `end`: sequences), in which
// case there is no end but the blocks are there; -ENOMEM.
int kvd_blocks_publish(struct kvd_pool *pool, const struct kvd_blocks_space *space, uint64_t seq,
                       const struct kvd_prefix_key *keys, uint32_t n, bool end,
                       struct kvd_blocks_published *out, struct kvd_error *err);

// The space of a domain of a namespace's index, by number below KVD_POOL_DOMAINS. False: that one
// has no blocks.
bool kvd_blocks_space_at(const struct kvd_pool *pool, uint32_t ns, uint32_t number,
                         struct kvd_blocks_space *out);
// Finds a block by its key alone, in whatever domain: the place behind it, *space and how deep it
// is. KVD_E_NOT_FOUND: it is not there; *why and *when tell what became of it.
int kvd_blocks_find(struct kvd_pool *pool, uint32_t ns, const struct kvd_prefix_key *key,
                    struct kvd_blocks_space *space, struct kvd_blocks_match *out);

// The entry of a block by its key alone, in whatever domain; KVD_PREFIX_NONE: it is not there.
uint32_t kvd_blocks_entry(const struct kvd_pool *pool, uint32_t ns,
                          const struct kvd_prefix_key *key);

// Removes blocks from the last of the keys on, down to the first `keep`, and stops at one that is
// held or has others behind it. Returns how many went.
uint32_t kvd_blocks_drop(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                         const struct kvd_prefix_key *keys, uint32_t n, uint32_t keep,
                         enum kvd_prefix_reason reason);

// Removes a block, wherever it is, and those before it that have no others behind them. What is
// held stays. Returns how many went.
uint64_t kvd_blocks_forget(struct kvd_pool *pool, uint32_t ns, const struct kvd_prefix_key *key,
                           enum kvd_prefix_reason reason);
// Says of which class a block is, wherever it is, and those before it: as kvd_prefix_classify.
// Returns how many are of it now; 0 also where it is not there.
uint32_t kvd_blocks_classify_to(struct kvd_pool *pool, uint32_t ns,
                                const struct kvd_prefix_key *key, enum kvd_prefix_class class);
// Of which class it is; NORMAL also where it is not there.
enum kvd_prefix_class kvd_blocks_class(const struct kvd_pool *pool, uint32_t ns,
                                       const struct kvd_prefix_key *key);
// Says of which class a prompt's blocks are, of those that go of its namespace's index: as
// kvd_prefix_classify.
uint32_t kvd_blocks_classify(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                             const struct kvd_prefix_key *keys, uint32_t n,
                             enum kvd_prefix_class class);
// Goes on removing all blocks of a namespace that nobody holds; zeros begin. Looks at most at
// `most` entries, and adds to *gone how many went. True: it has looked at all.
bool kvd_blocks_clear(struct kvd_pool *pool, uint32_t ns, struct kvd_prefix_cursor *at,
                      uint32_t most, uint64_t *gone);

// -- blocks on their way to other places, and back (carry.c) ------------------------------------
// Whoever carries them reads and writes their pages, as the pool touches no memory.

// A block with its pages, a reference to each: they are neither freed nor written by others, and
// its layout stays, until kvd_blocks_put_down.
struct kvd_blocks_load {
    struct kvd_blocks_space space;
    struct kvd_prefix_key key;
    bool picked_up;
    struct kvd_blocks_page {
        uint32_t page; // KVD_POOL_NONE: none in this plane
        uint64_t addr, bytes;
        uint32_t extent; // its number: whose pages lie in one piece of memory
        uint64_t sum;    // KVD_SUM_NONE, or its checksum (pool.h)
    } plane[KVD_MAX_PLANES];
};

// From now on blocks that get pages are noted as new ones; those that there are are new too.
void kvd_blocks_note_new(struct kvd_pool *pool);
// How many are noted, some of which may be gone since, and the number of a namespace that has some,
// the next one behind `after`; KVD_POOL_NONE: none has.
uint32_t kvd_blocks_new(const struct kvd_pool *pool, uint32_t after, uint32_t *ns);
// Picks up the block of a namespace that has been new for longest, which is new no more. Pages that
// are damaged are left out. Until it is put down, who could be refused for its room waits
// (kvd_pool_room_make). False: there is none.
bool kvd_blocks_pick_up(struct kvd_pool *pool, uint32_t ns, struct kvd_blocks_load *out);
// Notes it as a new one again, if it is there still.
void kvd_blocks_new_again(struct kvd_pool *pool, const struct kvd_blocks_load *load);
void kvd_blocks_put_down(struct kvd_pool *pool, struct kvd_blocks_load *load);

// Of a prompt's blocks, in which planes they have pages, as bits; 0 for those that are not there.
// Returns how many leading ones are known.
uint32_t kvd_blocks_planes(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const struct kvd_prefix_key *keys, uint32_t n, uint8_t *planes);
// The kind of the pages that a layout's blocks number `block` have in a plane.
enum kvd_pool_kind kvd_blocks_kind(const struct kvd_layout *l, uint32_t plane, uint32_t block);
// The first block that the token after `blocks` blocks sees in a plane.
uint32_t kvd_blocks_first_seen(const struct kvd_plane *plane, uint32_t blocks);
// New pages for block number `block` in those planes, to be written by the caller. The same errors
// as kvd_pool_page_alloc; nothing is taken then.
int kvd_blocks_new_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                         const struct kvd_prefix_key *key, uint32_t block, uint8_t planes,
                         struct kvd_blocks_load *out, struct kvd_error *err);
// Where the first n blocks of a prompt end, whether they have pages or not, held; n may be 0: its
// beginning, which nobody holds. KVD_E_NOT_FOUND: they are not there.
int kvd_blocks_behind(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                      const struct kvd_prefix_key *keys, uint32_t n, struct kvd_blocks_at *at,
                      struct kvd_error *err);
// Gives a block its pages, in those planes in which it has none, and puts it down. It comes behind
// `at`, which is held, or begins a prompt (at->blocks 0); *at becomes the block, held in its place.
// It is no new one. KVD_E_PRECONDITION (what it comes behind is gone), KVD_E_LIMIT (domains, or the
// index is full of what is in use), -ENOMEM; *at is as before then.
int kvd_blocks_bring_back(struct kvd_pool *pool, struct kvd_blocks_load *load,
                          struct kvd_blocks_at *at, struct kvd_error *err);

// The same for a page (flat.c), behind the page `after` if that is there (NULL: none). *entry is
// its entry, held.
int kvd_blocks_bring_back_page(struct kvd_pool *pool, struct kvd_blocks_load *load,
                               const struct kvd_prefix_key *after, uint32_t *entry,
                               struct kvd_error *err);

// -- pages (flat.c): blocks under keys that are not chained ---------------------------------------
//
// An engine that keeps KV of its own puts single blocks under keys of its own, and gets them back:
// any of them, without those before it. Which block was put behind which only tells eviction what
// is a leaf. Layouts have neither sinks nor windows, so that each block is sealed at once.

// The entries of n <= KVD_BLOCKS_MAX keys, KVD_PREFIX_NONE where there is none; with `use` those
// that are there count as used.
void kvd_blocks_find_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space, bool use,
                           const struct kvd_prefix_key *keys, uint32_t n, uint32_t *entries);
// Of n <= KVD_BLOCKS_MAX keys, in which planes they have pages, as bits; 0 for those that are not
// there.
void kvd_blocks_page_planes(const struct kvd_pool *pool, const struct kvd_blocks_space *space,
                            const struct kvd_prefix_key *keys, uint32_t n, uint8_t *planes);
// Removes pages by their entries, as kvd_prefix_remove_entries.
uint32_t kvd_blocks_forget_pages(struct kvd_pool *pool, uint32_t ns, uint32_t *entries, uint32_t n,
                                 enum kvd_prefix_reason reason);
// Says of which class pages are: as kvd_prefix_classify_entries.
uint32_t kvd_blocks_classify_pages(struct kvd_pool *pool, uint32_t ns, const uint32_t *entries,
                                   uint32_t n, enum kvd_prefix_class class);
// Holds entries until they are released, and leaves in the list those that were held, as they keep
// the others; *held: how many. The last `single` of them are held each for itself: pages that
// kvd_blocks_supersede may be asked about. All or none. KVD_E_LIMIT.
int kvd_blocks_hold_pages(struct kvd_pool *pool, uint32_t ns, uint32_t *entries, uint32_t n,
                          uint32_t single, uint32_t *held, struct kvd_error *err);
void kvd_blocks_release_pages(struct kvd_pool *pool, uint32_t ns, const uint32_t *entries,
                              uint32_t held);
// A new sequence of the pages of n entries in that order, with one holder. Nothing is copied.
// KVD_E_LIMIT: as kvd_pool_seq_new; -ENOMEM.
int kvd_blocks_adopt_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const uint32_t *entries, uint32_t n, uint64_t *seq,
                           struct kvd_error *err);
// Gives keys to n <= KVD_BLOCKS_MAX blocks of a sequence from number `from` on, each behind the one
// before it and the first behind the page `after` (NULL: none), if that is there. What is there
// already stays as it is. *stored: those that were not, where the index is not full of what is in
// use. KVD_E_NOT_FOUND; KVD_E_PRECONDITION (another namespace or layout, or fewer blocks);
// KVD_E_UNSUPPORTED (a sink or a window); KVD_E_LIMIT (domains); -ENOMEM.
int kvd_blocks_publish_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                             uint64_t seq, uint32_t from, const struct kvd_prefix_key *keys,
                             uint32_t n, const struct kvd_prefix_key *after, uint32_t *stored,
                             struct kvd_error *err);

// -- pages that are there both ways (supersede.c) ------------------------------------------------
//
// A chain's last pages are exact. When it has gone on they are encoded: the encoded page gets its
// key in its own space first, and then the exact one is superseded. It goes at once, or is kept by
// who holds it, and lookups are to prefer the other one meanwhile. Where a chain ends is not
// written down: it is where exact pages have no others behind them, so a restart changes nothing.

// Pages of one chain that follow each other, in the space of exact ones.
struct kvd_blocks_chain {
    const struct kvd_blocks_space *space;
    const struct kvd_prefix_key *keys;
    uint32_t n; // <= KVD_MAX_CALL_PAGES
};
// Which of the keys name a page that is there, is not superseded, has KVD_EXACT_TAIL_PAGES of them
// behind it, and from which none but this chain's pages go on within
// as many: no other chain is known to end there.
void kvd_blocks_passed(const struct kvd_pool *pool, const struct kvd_blocks_chain *chain,
                       bool passed[KVD_MAX_CALL_PAGES]);
// The page that a page is behind, directly or by others, and that is behind none: where exact pages
// come that are not right behind those before them, so that they are not taken for an end of
// theirs. False: the page is not there.
bool kvd_blocks_first_page(const struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const struct kvd_prefix_key *key, struct kvd_prefix_key *first);
// Supersedes page i of the chain, which has been passed: what of the chain is behind it comes
// behind the one before it, or the first if that is far, and it goes. True: somebody holds it, so
// it stays, superseded, for kvd_blocks_end_superseded. *freed: bytes of its pages, if it goes.
bool kvd_blocks_supersede(struct kvd_pool *pool, const struct kvd_blocks_chain *chain, uint32_t i,
                          uint64_t *freed);
// Of a page that is there: whether it is superseded; and takes that back.
bool kvd_blocks_superseded(const struct kvd_pool *pool, uint32_t ns, uint32_t entry);
void kvd_blocks_revive(struct kvd_pool *pool, uint32_t ns, uint32_t entry);
// Lets a superseded page go if nobody holds it any more, if there is another in its place;
// otherwise it is no longer superseded. False: somebody holds it still.
bool kvd_blocks_end_superseded(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                               const struct kvd_prefix_key *key, bool instead, uint64_t *freed);
// Puts those pages of a chain behind the one before them that are behind none. No more than a few
// thousand pages are looked at; what would come behind itself stays where it is.
void kvd_blocks_link_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const struct kvd_prefix_key *keys, uint32_t n);

struct kvd_blocks_info {
    uint64_t blocks, capacity, domains;
    uint64_t bytes;    // of pages, those that sequences have too included
    uint64_t metadata; // bytes of the index, most of which is touched only when it is used
    uint64_t inserted, removed[KVD_PREFIX_REASONS];
    uint64_t ends; // made
};
// All zero where the namespace has no index.
void kvd_blocks_info(const struct kvd_pool *pool, uint32_t ns, struct kvd_blocks_info *out);
// Looks at the entries of a namespace's index from number `from` on, at most `most` of them, and
// calls fn for those in use until it returns false. Returns the number to go on from,
// KVD_POOL_NONE: there are no others.
typedef bool kvd_blocks_fn(void *ctx, const struct kvd_prefix_entry_info *e, uint32_t layout,
                           uint32_t entry, bool end);
uint32_t kvd_blocks_each(const struct kvd_pool *pool, uint32_t ns, uint32_t from, uint32_t most,
                         kvd_blocks_fn *fn, void *ctx);

#endif
