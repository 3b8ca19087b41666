// The pool: who owns which piece of KV memory.
//
// It hands out pages from extents, keeps the page tables of sequences, shares pages copy-on-write
// between forks, enforces namespace quotas and evicts published sequences that nobody holds, and
// blocks (blocks.h). It never touches the memory it manages: that comes from an ops table, and
// addresses are opaque numbers to it.
//
// All state lives in one contiguous region and refers to itself by index, so the region can be
// shared memory and be mapped anywhere. One thread at a time.
//
// Glossary: an *extent* is one allocation, granted to one slab at a time. A *slab* is the set of
// extents of one (namespace, layout, plane, page kind). A *page* is the memory of a block, 64
// tokens of one plane, and is named by a number that is unique in the pool.
#ifndef KVD_POOL_H
#define KVD_POOL_H

#include "pool/prefix.h"
#include "proto/base.h"
#include "proto/kvd_limits.h"

struct kvd_pool;

#define KVD_POOL_NONE UINT32_MAX

enum { KVD_POOL_DOMAINS = 4096 }; // of a namespace's prefix index (blocks.h)

enum kvd_pool_kind {
    KVD_POOL_BF16 = 0,  // sink and recent window
    KVD_POOL_CODEC = 1, // history
    KVD_POOL_KINDS,
};

// A page of windows that is not full yet may be a part of one: 32 rows of each tile, or 16.
enum { KVD_POOL_PARTS = 2 };

// Memory of extents. Addresses are whatever the backend understands (a pointer on the CPU).
struct kvd_pool_mem_ops {
    void *ctx;
    // Makes extent `index` of `bytes`, reading as zero. 0, KVD_E_FULL when the device is short of
    // memory, KVD_E_LIMIT when the process is short of descriptors, or a negative errno. Sets *addr
    // on success.
    int (*alloc)(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr);
    // Gives the memory back. Called once for each successful alloc.
    void (*free)(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes);
    // Makes the extent read as zero, for another namespace. 0, or as alloc (the extent is then not
    // granted).
    int (*zero)(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes);
    // For kvd_pool_open: finds extent `index` again, with what it holds. 0 with *addr set,
    // KVD_E_NOT_FOUND when it is gone, or a negative errno. May be NULL for who never opens one.
    int (*attach)(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr);
    // Of a durable pool: the prefix index of namespace number `ns` has its memory behind a
    // descriptor, which stays the pool's and is to outlive the process; -1: no longer. Both NULL:
    // indices end with the process.
    void (*index_kept)(void *ctx, uint32_t ns, int fd);
    // For kvd_pool_open: that descriptor, which becomes the pool's; -1: there is none.
    int (*index_find)(void *ctx, uint32_t ns);
};

// Told of each block that a namespace's prefix index no longer has (prefix.h), and of its layout.
// Must not change the pool.
struct kvd_prefix_removed;
typedef void kvd_pool_block_gone_fn(void *ctx, uint32_t ns, uint32_t layout,
                                    const struct kvd_prefix_removed *removed);

struct kvd_pool_config {
    uint64_t bytes;        // all extents together; rounded down to whole extents
    uint64_t extent_bytes; // a multiple of 2 MiB
    uint32_t max_sequences;
    uint32_t max_namespaces;
    uint32_t max_layouts;
    // Any random number: ids of sequences start from it, so that those of another instance mean
    // nothing.
    uint32_t id_seed;
    // The pool is to outlive the process: its region is a memfd (kvd_pool_fd), and an append can be
    // undone until it is true in every layer, for which it may take more pages.
    bool durable;
    // Told before a published sequence is evicted. May be NULL.
    void (*on_evict)(void *ctx, uint32_t ns, uint64_t seq, const char *name);
    kvd_pool_block_gone_fn *on_block_gone; // may be NULL
    // Told when a superseded page (kvd_blocks_supersede) has lost its last holder, or is superseded
    // no longer. Must not change the pool. May be NULL.
    void (*on_superseded)(void *ctx);
    void *on_evict_ctx; // of all
};

// Returns a new pool, or NULL with *err set. `ops` is copied; ops->ctx must outlive the pool.
struct kvd_pool *kvd_pool_new(const struct kvd_pool_config *config,
                              const struct kvd_pool_mem_ops *ops, struct kvd_error *err);
// Frees all extents and the pool. *pool may be NULL; it becomes NULL.
void kvd_pool_free(struct kvd_pool **pool);

// The descriptor of a durable pool's region, which is the pool's; -1: it is not durable.
int kvd_pool_fd(const struct kvd_pool *pool);
// Opens a region as another process left it, at whatever instant that ended: undoes what it had not
// finished, makes everything anew that follows from the rest, finds the extents (ops->attach) and
// verifies all. What only that process can have known is gone: pins, holders of namespaces and of
// layouts, whether a namespace is kept. Holders of sequences stay. Every token of every append that
// was committed in all layers is there; an append that was committed in some layers stays
// unfinished, or is undone if the process ended in a later call of it that overwrote something.
// The descriptor is duplicated. NULL with *err: KVD_E_INVALID (no region), KVD_E_UNSUPPORTED
// (another version), KVD_E_PRECONDITION (other sizes than the configuration's), KVD_E_CORRUPT,
// KVD_E_NOT_FOUND (an extent in use is gone) or KVD_E_INTERNAL; the region may have changed then.
struct kvd_pool *kvd_pool_open(int fd, const struct kvd_pool_config *config,
                               const struct kvd_pool_mem_ops *ops, struct kvd_error *err);
// Says anew who holds what: each sequence gets as many holders as `ids` has its id, [n]; ids of
// none are passed over. Those that then have neither holder nor name are freed. KVD_E_INTERNAL.
int kvd_pool_set_holders(struct kvd_pool *pool, const uint64_t *ids, size_t n,
                         struct kvd_error *err);
// Leaves a durable pool to whoever opens its region next: unmaps it, frees no extent. *pool may be
// NULL; it becomes NULL.
void kvd_pool_leave(struct kvd_pool **pool);

// Memory made ahead of need: the index of an extent that wants some, if fewer than `want` free
// extents have it, else KVD_POOL_NONE. The extent is set aside until kvd_pool_spare_made says what
// came of it: its address, or 0.
uint32_t kvd_pool_spare_wanted(struct kvd_pool *pool, uint32_t want);
void kvd_pool_spare_made(struct kvd_pool *pool, uint32_t index, uint64_t addr);
// Gives back the memory of up to `most` free extents. Returns of how many.
uint32_t kvd_pool_trim(struct kvd_pool *pool, uint32_t most);
// Gives back the memory of the extent that has been free for longest, if that is `idle` or more
// since a call of this saw it, in the clock that `now` (not 0) tells. False: there is none.
bool kvd_pool_trim_idle(struct kvd_pool *pool, uint64_t now, uint64_t idle);

// -- namespaces ---------------------------------------------------------------------------------

// Finds or makes the namespace, and holds it: it stays until it is released as often, has no
// sequences and no quota, and is not kept. Where the table is full, one goes that has nothing but
// evictable sequences. KVD_E_INVALID (name), KVD_E_LIMIT (table full).
int kvd_pool_namespace(struct kvd_pool *pool, const char *name, uint32_t *ns,
                       struct kvd_error *err);
// Whether it would go if its evictable sequences went. *used orders namespaces by their latest use.
bool kvd_pool_namespace_idle(const struct kvd_pool *pool, uint32_t ns, uint64_t *used);
void kvd_pool_namespace_release(struct kvd_pool *pool, uint32_t ns);
// Whether it stays when it is empty.
void kvd_pool_namespace_keep(struct kvd_pool *pool, uint32_t ns, bool keep);
// Index of an existing namespace, or KVD_POOL_NONE.
uint32_t kvd_pool_namespace_find(const struct kvd_pool *pool, const char *name);
// Sets the quota in bytes of pages; 0 takes it away. Evicts nothing.
void kvd_pool_set_quota(struct kvd_pool *pool, uint32_t ns, uint64_t bytes);
// Whether a namespace may have more than its quota, where there is room in the pool: by as much as
// can be evicted of it, so that it can be given back and no more than the quota is held. That is
// counted as it changes, but for what stays though nobody uses it (idle.c): take a look with
// by_namespace (below) now and then; nothing is borrowed before the first. What is borrowed is the
// first to go when others want room, and whoever borrows evicts nobody's but its own.
void kvd_pool_set_borrow(struct kvd_pool *pool, uint32_t ns, bool may);

struct kvd_pool_namespace_info {
    const char *name;       // "": no namespace has this index now
    uint64_t quota, borrow; // borrow: bytes that it may have beyond the quota now
    uint64_t used;          // bytes of pages in use
    uint64_t pages;
    uint64_t sequences;
    uint64_t tokens;
    uint64_t blocks;    // of page tables
    uint64_t evictable; // bytes that evicting would free, as far as looks have been taken
    uint32_t holders;
};
// Indices go up to here; some may mean nothing.
uint32_t kvd_pool_namespace_count(const struct kvd_pool *pool);
void kvd_pool_namespace_info(const struct kvd_pool *pool, uint32_t ns,
                             struct kvd_pool_namespace_info *out);

// -- layouts ---------------------------------------------------------------------------------

// Finds or makes a layout, for a namespace, and takes a reference on it; sequences hold one each.
// Page sizes are the backend's, by plane; all must fit an extent. A layout without references, or
// with none but from evictable sequences, stays until its slot is wanted for another: *recycled
// then tells the caller that the index meant another layout before. KVD_E_INVALID, KVD_E_LIMIT.
int kvd_pool_layout(struct kvd_pool *pool, uint32_t ns, const struct kvd_layout *l,
                    const uint64_t (*page_bytes)[KVD_POOL_KINDS], uint32_t *layout, bool *recycled,
                    struct kvd_error *err);
// One more reference, for whoever goes on using the index when the session that opened it may end.
void kvd_pool_layout_ref(struct kvd_pool *pool, uint32_t layout);
void kvd_pool_layout_unref(struct kvd_pool *pool, uint32_t layout);
// Who refers to it: sequences, and whoever asked for it.
uint32_t kvd_pool_layout_refs(const struct kvd_pool *pool, uint32_t layout);
// As for namespaces.
bool kvd_pool_layout_idle(const struct kvd_pool *pool, uint32_t layout, uint64_t *used);

// What is idle, and cleared to have room for others: its sequences and blocks, one by one. Zeros
// and the first two begin.
struct kvd_pool_clearing {
    bool layout;    // of a layout; otherwise of a namespace
    uint32_t index; // of that
    uint32_t at;    // the entry of the table of sequences that is looked at next
    uint32_t ns;    // whose blocks are looked at after those,
    uint32_t domain;
    struct kvd_prefix_cursor blocks;
};
// What kvd_pool_namespace, or kvd_pool_layout, would clear first to make n more, or one more, which
// nobody refers to yet. False: nothing. `ns` may be KVD_POOL_NONE: one that is to be made.
bool kvd_pool_namespace_clears(const struct kvd_pool *pool, uint32_t n,
                               struct kvd_pool_clearing *c);
bool kvd_pool_layout_clears(const struct kvd_pool *pool, uint32_t ns, struct kvd_pool_clearing *c);
// Goes on with at most n entries of the tables. True: it is done, or idle no more.
bool kvd_pool_clear(struct kvd_pool *pool, struct kvd_pool_clearing *c, uint32_t n);
// Index of a layout that is known, or KVD_POOL_NONE. Takes no reference.
uint32_t kvd_pool_layout_find(const struct kvd_pool *pool, const struct kvd_layout *l);
const struct kvd_layout *kvd_pool_layout_get(const struct kvd_pool *pool, uint32_t layout);
// Bytes of a page of that plane and kind, padding to 4096 included.
uint64_t kvd_pool_page_bytes(const struct kvd_pool *pool, uint32_t layout, uint32_t plane,
                             enum kvd_pool_kind kind);

// -- sequences ----------------------------------------------------------------------------------

// A new, empty sequence with one holder. Ids are never used twice. KVD_E_LIMIT when the namespace
// has its share of the table: as many as are left free by all, after eviction.
int kvd_pool_seq_new(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint64_t *seq,
                     struct kvd_error *err);
// A copy-on-write child with one holder. KVD_E_NOT_FOUND; KVD_E_PRECONDITION while an append is
// unfinished.
int kvd_pool_seq_fork(struct kvd_pool *pool, uint64_t parent, uint64_t *child,
                      struct kvd_error *err);
// Adds a holder.
int kvd_pool_seq_hold(struct kvd_pool *pool, uint64_t seq);
// Takes one holder away. With none left, a published sequence becomes evictable and any other is
// freed.
void kvd_pool_seq_release(struct kvd_pool *pool, uint64_t seq);
// A pinned sequence is neither freed nor evicted: its pages stay where they are until the last
// unpin.
void kvd_pool_seq_pin(struct kvd_pool *pool, uint64_t seq);
void kvd_pool_seq_unpin(struct kvd_pool *pool, uint64_t seq);

// Names a sequence. KVD_E_EXISTS unless `replace`; KVD_E_INVALID (name); KVD_E_NOT_FOUND.
int kvd_pool_publish(struct kvd_pool *pool, uint64_t seq, const char *name, bool replace,
                     struct kvd_error *err);
// Takes the name away; frees the sequence if nobody holds it.
void kvd_pool_unpublish(struct kvd_pool *pool, uint64_t seq);
// The sequence of that name, or 0. Counts as a use for eviction's order.
uint64_t kvd_pool_lookup(struct kvd_pool *pool, uint32_t ns, const char *name);
struct kvd_pool_evicted {
    uint64_t sequences; // published ones
    uint64_t blocks;    // of prefix indices
    uint64_t bytes;     // of pages
};

// Evicts what nobody uses, of `ns` (KVD_POOL_NONE: of all): blocks of the prefix index, and then
// published sequences, oldest use first; until `bytes` of pages are free (0: all of them), and no
// more than `most` of both. Returns how many; *sum gets what went.
uint32_t kvd_pool_evict(struct kvd_pool *pool, uint32_t ns, uint64_t bytes, uint32_t most,
                        struct kvd_pool_evicted *sum);
// Evicts for room in the pool, before it is wanted: up to `most` times, what is borrowed first.
// Returns how often; fewer: there is nothing more. *sum gets what.
uint32_t kvd_pool_relieve(struct kvd_pool *pool, uint32_t most, struct kvd_pool_evicted *sum);

// A look at what evicting everything would free, which takes time in proportion to the pages of
// what is evictable, and so may be taken in steps. What changes in between is counted as it was or
// as it is. To begin: all zero but by_namespace.
struct kvd_pool_look {
    uint64_t bytes;         // of pages that nothing else has, so far
    uint64_t *by_namespace; // each namespace's are added to by_namespace[ns]; NULL: not wanted
    uint32_t *met;          // by page: how many of its references are evictable; NULL: not begun
    uint32_t next;          // sequence; then, for each namespace's prefix index,
    uint32_t ns, entry, entries;
    bool counting; // what is held is known
    uint8_t *held; // by entry
};

// Goes on by about `pages`. Returns false when there is more to look at. What was begun is to be
// taken to its end, or kvd_pool_look_drop.
bool kvd_pool_look_step(struct kvd_pool *pool, struct kvd_pool_look *look, uint32_t pages);
void kvd_pool_look_drop(struct kvd_pool_look *look);

// One plane of a sequence.
struct kvd_pool_reach {
    uint64_t hist_end; // history ends here; equals the sink when it is empty
    uint64_t first;    // of a windowed plane: tokens before it are gone; never beyond hist_end
};

struct kvd_pool_seq_info {
    uint64_t id;
    uint32_t ns;
    uint32_t layout;
    uint64_t length;         // tokens complete in every layer
    uint64_t pending_length; // of the append in progress, or length
    uint32_t pending_layers; // layers that it has filled
    uint32_t n_planes;
    struct kvd_pool_reach reach[KVD_MAX_PLANES]; // of layers that it has not filled
    struct kvd_pool_reach pending[KVD_MAX_PLANES];
    uint32_t pages[KVD_MAX_PLANES][KVD_POOL_KINDS];
    uint64_t bytes;
    uint32_t holders;
    uint32_t pins;
    const char *name; // "" if not published
    bool end;         // of a prefix: it keeps a recent window for whoever adopts it (blocks.h)
};

// The first token that a query at `position` sees through a window; 0: it sees all.
static inline uint64_t kvd_pool_visible(uint32_t window, uint64_t position)
{
    return window && position >= window ? position - window + 1 : 0;
}

// Where a sequence's tokens are in a plane, in the order of their positions: together, its length.
struct kvd_pool_tokens {
    uint64_t sink, freed, history, recent;
};
static inline struct kvd_pool_tokens kvd_pool_tokens(const struct kvd_plane *plane, uint64_t length,
                                                     const struct kvd_pool_reach *reach)
{
    uint64_t sink = plane->sink, first = KVD_MAX(sink, reach->first);
    return (struct kvd_pool_tokens){
        .sink = KVD_MIN(length, sink),
        .freed = first - sink,
        .history = reach->hist_end - first,
        .recent = length > reach->hist_end ? length - reach->hist_end : 0,
    };
}

// What a call wants of a sequence, however long it is: of kvd_pool_seq_info, which counts pages,
// the part that is told without.
struct kvd_pool_seq_lengths {
    uint64_t length, pending_length;
    uint32_t pending_layers;
    struct kvd_pool_reach reach[KVD_MAX_PLANES], pending[KVD_MAX_PLANES]; // of the layout's planes
};

// Both: KVD_E_NOT_FOUND if the id is unknown or freed.
int kvd_pool_seq_lengths(const struct kvd_pool *pool, uint64_t seq,
                         struct kvd_pool_seq_lengths *out);
int kvd_pool_seq_info(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_seq_info *out);
// Sequences by their places, for who goes through them in steps: how many places there are by now,
// and whether there is one at a place.
uint32_t kvd_pool_seq_places(const struct kvd_pool *pool);
bool kvd_pool_seq_at(const struct kvd_pool *pool, uint32_t place, struct kvd_pool_seq_info *out);
// Calls fn for every sequence until it returns false.
void kvd_pool_seq_each(const struct kvd_pool *pool,
                       bool (*fn)(void *ctx, const struct kvd_pool_seq_info *info), void *ctx);

// Copies the addresses of a plane's pages of a sequence into `out`: for KVD_POOL_BF16 the sink's
// pages, then the ring's (0 where none is needed yet); for KVD_POOL_CODEC the history's in order, 0
// where they are freed. Returns how many there are; writes at most `cap`.
uint32_t kvd_pool_seq_pages(const struct kvd_pool *pool, uint64_t seq, uint32_t plane,
                            enum kvd_pool_kind kind, uint64_t *out, uint32_t cap);

// -- append and truncate ------------------------------------------------------------------------

// A page that got a private copy, or a new page (old_page KVD_POOL_NONE). A part is copied when it
// becomes too small: to what has at least as many rows.
struct kvd_pool_change {
    uint32_t plane, kind;
    uint32_t entry; // in the sequence's table of that kind
    uint32_t old_page;
    uint32_t new_page;
};

// An append as it is asked for. `appender` and `request` name it, for when it is sent again: the
// last append of a sequence is remembered with it. request 0: it is never taken for a repeat.
struct kvd_pool_append_request {
    uint64_t seq, position;
    uint32_t tokens, layer_begin, layer_count;
    uint64_t appender, request;
};

// Pages and blocks of page tables that something takes.
struct kvd_pool_need {
    uint32_t pages[KVD_MAX_PLANES][KVD_POOL_KINDS];
    uint32_t parts[KVD_MAX_PLANES][KVD_POOL_PARTS]; // of pages of windows: of 32 rows, of 16
    uint32_t blocks;
    uint64_t bytes; // of the pages
};

// What an append does to one plane.
struct kvd_pool_append_plane {
    struct kvd_pool_reach before, after; // for the layers concerned
    // Tokens [demote, after.hist_end) go into history. Those between before.hist_end and it would
    // be freed at once, and are dropped.
    uint64_t demote;
    bool window_kept; // replayed: tokens [before.hist_end, length) are all still in the ring
};

// An append that has its pages but is not yet true. Between begin and commit or abort the sequence
// must stay pinned.
struct kvd_pool_append {
    struct kvd_pool_append_request by;
    uint64_t length, new_length; // before and after, for the layers concerned
    struct kvd_pool_append_plane planes[KVD_MAX_PLANES];
    bool replayed; // had been applied before: nothing to do, no commit or abort wanted
    struct kvd_pool_change *changes;
    uint32_t n_changes;
};

static inline void kvd_pool_need_add(struct kvd_pool_need *sum, const struct kvd_pool_need *n)
{
    for (int p = 0; p < KVD_MAX_PLANES; p++) {
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            sum->pages[p][k] += n->pages[p][k];
        for (int i = 0; i < KVD_POOL_PARTS; i++)
            sum->parts[p][i] += n->parts[p][i];
    }
    sum->blocks += n->blocks;
    sum->bytes += n->bytes;
}

// Where making room in steps is; zeros begin it.
struct kvd_pool_room {
    uint32_t evicted, most; // one by one, before an extent is emptied
    uint64_t vacate;        // that it waits for; 0: none
    bool taken_up;          // it waits for nothing but blocks that kvd itself has
};

// Makes room ahead of what takes it, by eviction too, for a matter of some hundred microseconds.
// True: what is needed can be taken, or nothing more can be done for it; whoever takes it (
// kvd_pool_append_begin and others, which make room themselves, all at once) will see. False: it is
// to be called again, when kvd_pool_vacate_step has no more to do, or when blocks that kvd itself
// has for a while (kvd_pool_block_hold, kvd_blocks_pick_up), and that may be all that is in the
// way, have been given back.
bool kvd_pool_room_make(struct kvd_pool *pool, uint32_t ns, uint32_t layout,
                        const struct kvd_pool_need *need, struct kvd_pool_room *at);
// Goes on emptying an extent for those who wait for room: looks at about so many blocks of an
// index, which changes meanwhile as it may. False: there is no more to do.
bool kvd_pool_vacate_step(struct kvd_pool *pool, uint32_t blocks);

// What kvd_pool_append_begin would take, without taking or evicting anything. The same errors but
// for those of room.
int kvd_pool_append_need(const struct kvd_pool *pool, const struct kvd_pool_append_request *by,
                         struct kvd_pool_need *need, struct kvd_error *err);
// Checks position and layers, makes room for all that the append needs, and takes it. On failure
// nothing has changed but for what was evicted. The sequence's last append, from the same appender
// with the same request, is recognized
// (`replayed`) as long as nothing has changed the sequence since. KVD_E_NOT_FOUND,
// KVD_E_PRECONDITION (position, layer order, or a repeat that came too late), KVD_E_QUOTA,
// KVD_E_FULL, KVD_E_LIMIT (length).
int kvd_pool_append_begin(struct kvd_pool *pool, const struct kvd_pool_append_request *by,
                          struct kvd_pool_append *out, struct kvd_error *err);
void kvd_pool_append_commit(struct kvd_pool *pool, struct kvd_pool_append *append);
void kvd_pool_append_abort(struct kvd_pool *pool, struct kvd_pool_append *append);

// Keeps the first `length` tokens and drops an unfinished append. KVD_E_INVALID if longer than the
// sequence; KVD_E_PRECONDITION if an unfinished append has overwritten part of the recent window
// that would be kept, or if the next token would see what a windowed plane has freed. To 0 always
// works.
int kvd_pool_truncate(struct kvd_pool *pool, uint64_t seq, uint64_t length, struct kvd_error *err);

// -- pages that stay where they are -------------------------------------------------------------

// From now on a sequence takes whole pages of windows, so that what it has stays where it is, as
// whoever maps its pages must be able to rely on. Returns whether it has, and will have, no part of
// a page. False: make it so with the next ones.
bool kvd_pool_seq_settle(struct kvd_pool *pool, uint64_t seq);
// What the next would take, as kvd_pool_append_need; nothing where that fails.
void kvd_pool_settle_need(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_need *need);
// Puts whole pages in the place of parts. As an append: copies are to be made, then commit, or
// kvd_pool_append_abort. KVD_E_NOT_FOUND; KVD_E_PRECONDITION while an append is unfinished;
// KVD_E_QUOTA, KVD_E_FULL, KVD_E_LIMIT.
int kvd_pool_settle_begin(struct kvd_pool *pool, uint64_t seq, struct kvd_pool_append *out,
                          struct kvd_error *err);
void kvd_pool_settle_commit(struct kvd_pool *pool, struct kvd_pool_append *append);

// -- checksums of blocks ------------------------------------------------------------------------

// A block of history that is complete does not change any more, so it can have a checksum, which is
// kept in the region. The pool never touches memory: whoever does computes it. Blocks are those of
// sequences, and those that only prefix indices have.
enum {
    KVD_SUM_NONE = 0,    // not yet; or the block is being written
    KVD_SUM_DAMAGED = 1, // the block was found to be another than it was
};

struct kvd_pool_block {
    uint64_t seq; // 0: it is an index's
    uint32_t ns, layout;
    uint32_t plane, index; // the block's number in the plane's history; an index's: its entry
    uint32_t page;
    uint64_t addr, bytes;
    uint64_t sum; // KVD_SUM_NONE, KVD_SUM_DAMAGED, or what it was sealed with
};

// Where a walk over all complete blocks of all sequences, and then of all indices, is; all zero: at
// its beginning.
struct kvd_pool_walk {
    uint32_t seq, plane, index;
    uint32_t ns, entry;
};
// The next block. A page that several have comes once for each. KVD_E_NOT_FOUND: there is no more.
// KVD_E_LIMIT: none among so many steps; go on later.
int kvd_pool_block_next(const struct kvd_pool *pool, struct kvd_pool_walk *walk, uint32_t steps,
                        struct kvd_pool_block *out);
// Until kvd_pool_block_drop its page is neither freed nor written.
void kvd_pool_block_hold(struct kvd_pool *pool, const struct kvd_pool_block *block);
void kvd_pool_block_drop(struct kvd_pool *pool, const struct kvd_pool_block *block);
// Its checksum; KVD_SUM_DAMAGED: nobody is to be served it.
void kvd_pool_block_seal(struct kvd_pool *pool, const struct kvd_pool_block *block, uint64_t sum);
// An index's block has no page any more: prompts are known up to it until somebody publishes it
// again.
void kvd_pool_block_lost(struct kvd_pool *pool, const struct kvd_pool_block *block);
// The complete blocks of a sequence that have a checksum, from number *at on, which goes on. False:
// there is no more.
bool kvd_pool_seq_sealed(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_walk *at,
                         struct kvd_pool_block *out);
// KVD_E_CORRUPT: a block of the sequence is damaged.
int kvd_pool_seq_whole(const struct kvd_pool *pool, uint64_t seq, struct kvd_error *err);

// -- pages, for tests and tools -----------------------------------------------------------------

// One page of a slab. KVD_E_QUOTA, KVD_E_FULL, KVD_E_LIMIT.
int kvd_pool_page_alloc(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane,
                        enum kvd_pool_kind kind, uint32_t *page, struct kvd_error *err);
void kvd_pool_page_unref(struct kvd_pool *pool, uint32_t page);
// Of a part: of its first row, less what its page has before the rows.
uint64_t kvd_pool_page_addr(const struct kvd_pool *pool, uint32_t page);
// Rows that it has of each tile: 64, or of a part 32 or 16.
uint32_t kvd_pool_page_rows(const struct kvd_pool *pool, uint32_t page);

struct kvd_pool_info {
    uint64_t bytes, extent_bytes;
    uint32_t extents, extents_granted;
    uint32_t extents_made; // that have memory, idle ones included
    uint64_t used;         // bytes of pages in use
    uint64_t slack;        // bytes of granted extents that are not
    uint64_t evictions;
    uint64_t metadata; // bytes of the region that can be in use at all
    uint64_t sequences;
    uint64_t tokens;
    uint32_t damaged; // pages in use that are
};
void kvd_pool_info(const struct kvd_pool *pool, struct kvd_pool_info *out);

struct kvd_pool_slab_info {
    uint32_t ns, layout, plane;
    enum kvd_pool_kind kind;
    uint32_t extents;
    uint64_t page_bytes;
    uint64_t used, free; // pages; used: of which anything is in use
};
void kvd_pool_slab_each(const struct kvd_pool *pool,
                        bool (*fn)(void *ctx, const struct kvd_pool_slab_info *), void *ctx);

// Walks everything and compares it with the counters: no page owned twice, none lost, sums exact.
// For tests. KVD_E_CORRUPT with a description, or KVD_OK.
int kvd_pool_verify(const struct kvd_pool *pool, struct kvd_error *err);

// Makes everything anew that follows from the rest: references, free lists, who was used when,
// counters (internal.h tells which). KVD_E_CORRUPT says what contradicts itself; the pool is then
// not to be used. KVD_E_INTERNAL: out of memory. KVD_E_PRECONDITION: there are prefix indices,
// which nothing else tells of.
int kvd_pool_rebuild(struct kvd_pool *pool, struct kvd_error *err);

#endif
