// The pool's region: one mapping, tables at fixed offsets, references by index. Private to pool/.
//
// It can be opened as it is at any instant (README.md, "Crash consistency"): stored() stands behind
// each store to the truth that must be there before what follows, and what cannot be one store is
// noted in the journal first.
#ifndef KVD_POOL_INTERNAL_H
#define KVD_POOL_INTERNAL_H

#include "pool/pool.h"
#include "pool/prefix.h"

#define KVD_POOL_MAGIC   0x4c4f4f5044564bull // "KVDPOOL"
#define KVD_POOL_VERSION 11                  // of what this file describes

enum {
    KVD_POOL_ALIGN = KVD_PAGE_UNIT, // page sizes are rounded up to this
    KVD_TABLE_ENTRIES = 30,         // page numbers in a table block
    KVD_NAME_BUCKETS = 1 << 14,
    KVD_EXTENT_MIN = 2 << 20,
    KVD_JOURNAL_BYTES = 4096 - sizeof(uint64_t),
};

// Owner of an extent whose namespace is gone: to be zeroed for whoever gets it.
#define KVD_OWNER_GONE (KVD_POOL_NONE - 1)

// What is above a line "-- derived" follows from what is above it everywhere, and rebuild.c makes
// it anew: references, free lists, who was used when, counters. What is above is the truth, and is
// written down nowhere else.

// A namespace goes, and its slot can be another's, when nothing is left that would need it.
struct region_namespace {
    char name[KVD_MAX_NAMESPACE + 1]; // "": free
    uint8_t kept;                     // stays though it is empty
    uint32_t holders;                 // whoever asked for it
    uint64_t quota;
    // -- derived
    uint64_t used, pages, sequences, tokens, blocks;
    uint64_t idle;                // bytes of pages that nobody uses (idle.c)
    uint32_t lru_first, lru_last; // evictable sequences; first: least recently used
};

struct region_layout {
    struct kvd_layout l; // no planes: free
    uint64_t page_bytes[KVD_MAX_PLANES][KVD_POOL_KINDS];
    uint32_t holders; // whoever asked for it, sequences apart
    uint32_t ns;      // the namespace that made it
    // -- derived
    uint32_t sequences;
    uint32_t idle; // of those, evictable ones
    uint64_t used; // stamp of the latest of those
    uint64_t kept; // references of prefix indices to its pages
};

// A slab lives as long as it has extents, so there are never more than these. slab_at finds it.
struct region_slab {
    uint32_t ns, layout, plane, kind; // layout KVD_POOL_NONE: free
    // -- derived
    uint32_t partial; // first extent with a free slot; of a free slab, the next free one
    uint32_t extents;
    uint64_t page_bytes, used; // used: pages of which anything is in use
    uint32_t row_bytes;        // of pages that are given in parts too (part.c), of a row; else 0
    // Parts that are free, of 32 and of 16 rows: the first, and how many.
    uint32_t part[KVD_POOL_PARTS], parts[KVD_POOL_PARTS];
    uint32_t slots; // pages that fit an extent
};

struct region_extent {
    uint64_t addr;  // 0: not allocated yet; else known anew in each process
    uint32_t slab;  // KVD_POOL_NONE: free
    uint32_t owner; // namespace whose data it may hold; KVD_POOL_NONE: reads as zero
    uint8_t aside;  // free, and being made ahead of need
    // -- derived
    uint32_t used;
    uint32_t carved;     // slots handed out at least once
    uint32_t free_slot;  // head of the list of returned slots
    uint32_t prev, next; // in the slab's partial list; `next` also links the free list
    uint64_t idle_since; // when it was first seen free; 0: not yet
};

struct region_page { // derived
    uint32_t refs;   // 0: free
    uint32_t next;   // next returned slot of the extent
};

// Of a page table: truth as far as a table's count reaches.
struct region_block {
    uint32_t next; // of a free block, the next free one
    uint32_t page[KVD_TABLE_ENTRIES];
};

// Entries become true, and end, by the one store to `count`. None are there if it is not beyond
// `begin`: then `first` means nothing.
struct region_table {
    uint32_t first; // block
    uint32_t begin; // entries before the first block's, which are holes
    uint32_t count; // entries, holes included
    uint32_t ns;    // whose blocks they are
    // -- derived
    uint32_t last; // block
};

// The last append that was applied to a sequence: whoever made it may send it again.
struct region_append {
    uint64_t appender, request;
    uint64_t position;
    uint64_t hist_end[KVD_MAX_PLANES]; // of the history before it
    uint32_t tokens, layer_begin, layer_count;
};

enum {
    PHASE_IDLE = 0,
    PHASE_RUNNING, // a call of an append has begun, and is neither committed nor aborted
    PHASE_UNDOING, // the append is being undone, all calls of it
};

struct region_seq {
    uint32_t generation; // odd while in use
    uint32_t ns, layout;
    uint32_t holders, pins;
    uint8_t doomed; // freed by its last holder while pinned; not bool, as a damaged region may have
                    // any byte
    uint8_t settled; // takes whole pages only
    // Where it is, up to `last`: changes as one.
    uint64_t length, pending_length;
    uint32_t pending_layers;
    uint32_t phase;
    struct kvd_pool_reach reach[KVD_MAX_PLANES], pending[KVD_MAX_PLANES];
    struct region_append last;
    struct region_table table[KVD_MAX_PLANES][KVD_POOL_KINDS];
    // At the same entries, the pages that an append has replaced, until that cannot be undone.
    struct region_table undo[KVD_MAX_PLANES][KVD_POOL_KINDS];
    char name[KVD_MAX_NAME + 1];
    // -- derived
    uint8_t listed;              // on the LRU list
    uint64_t lru_stamp;          // when it became evictable, or was last looked up since
    uint32_t lru_prev, lru_next; // lru_next also links the free list
    uint32_t name_next;
    // Entries of the namespace's prefix index, + 1; 0: none.
    uint32_t held_entry; // that the sequence keeps there, as it has those pages too
    uint32_t end_entry;  // of an end: a sequence that is there for the block's recent window only
};

enum {
    STATE_BYTES = offsetof(struct region_seq, table) - offsetof(struct region_seq, length),
};

// What the truth was before something that is being changed: to be put back, latest first, when
// the region is opened. `bytes` is set to 0 in one store when the change is done.
struct region_journal {
    uint64_t bytes;
    uint8_t data[KVD_JOURNAL_BYTES]; // notes, each followed by a struct region_note
};

struct region_note {
    uint64_t at, length; // bytes of the region; the note has them, rounded up to 8, before this
};

struct region_head {
    uint64_t magic;
    uint32_t version;
    uint32_t shape; // of the structs above, in case that the version was forgotten
    uint64_t region_bytes;
    uint64_t extent_bytes;
    uint32_t n_extents, slots;
    uint32_t max_namespaces, max_layouts, max_slabs, max_sequences, max_blocks;
    uint32_t n_namespaces, n_layouts, n_slabs, n_sequences_ever; // of the slots, used at least once
    uint32_t first_generation;                                   // of every sequence slot; even
    uint64_t evictions;
    // -- derived
    uint32_t n_blocks_ever;
    uint32_t free_extent, free_seq, free_block, free_slab;
    uint32_t blocks; // in use
    uint32_t extents_granted;
    uint32_t extents_aside;
    uint32_t damaged; // pages in use
    uint64_t lru_clock;
    uint64_t used, sequences, tokens;
    uint32_t name_bucket[KVD_NAME_BUCKETS];
};

// The pages of a block by plane, where a layout has several; of a free one, page[0] is the number
// of the next, + 1.
struct block_pages {
    uint32_t page[KVD_MAX_PLANES];
};

// In front of the memory of a namespace's prefix index that outlives the process: the index's own
// region, `layout_of` and `pages` follow. With the values of the index's entries they are the truth
// about which pages it refers to.
struct kept_head {
    uint64_t magic; // written last
    uint64_t bytes;
    uint32_t entries;
    char ns[KVD_MAX_NAMESPACE + 1];
};
enum { KVD_KEPT_MAX_ENTRIES = 1 << 20 };
#define KVD_KEPT_MAGIC 0x3154504b4b5656ull

// What a namespace's prefix index keeps of the pool's pages. Without memory that outlives the
// process it ends with it: pages to which nothing else refers are free when the region is opened.
struct kept {
    struct kvd_prefix *ix;
    int fd;       // of the first of the memories; -1: it is private
    void *memory; // struct kept_head, and what follows it
    uint64_t bytes;
    void *hints; // `end`, `new_next` and `superseded`, which are the process's own
    uint64_t hint_bytes;
    uint32_t entries;
    // By entry: the number, + 1, of an end that has the block in its window. Only a hint: end_of()
    // tells whether that is so.
    uint32_t *end;
    struct block_pages *pages; // by value
    uint32_t pages_ever, pages_free;
    uint32_t *layout_of; // by domain
    // New blocks, in a line: by entry, the next one's number + 1; 0: not in it, NEW_LAST: there is
    // no next one. What is in it may be gone, or another block by now.
    uint32_t *new_next;
    uint32_t new_first, new_last, n_new; // the first two + 1
    uint8_t *superseded;                 // by entry, one bit: see kvd_blocks_supersede
    uint64_t page_bytes;                 // of the pages it refers to
    uint32_t busy;                       // blocks of it are being removed
    uint64_t ends;                       // made
    uint64_t ends_passed; // that gave way to a later one of the same sequence of blocks
};

#define NEW_LAST UINT32_MAX

// What a namespace may have beyond its quota (idle.c). The process's own.
struct lent {
    bool may;
    uint64_t stays;     // of what is idle, what cannot be evicted, by the latest look; before: all
    uint64_t most_idle; // since that began
};

struct kvd_pool {
    int fd; // of the region; -1: it is private, and ends with the process
    struct kvd_pool_mem_ops ops;
    void (*on_evict)(void *ctx, uint32_t ns, uint64_t seq, const char *name);
    void *on_evict_ctx;
    kvd_pool_block_gone_fn *on_block_gone;
    void (*on_superseded)(void *ctx);
    struct kept **kept;              // by namespace; NULL: it has no index
    struct blocks_room *blocks_room; // what blocks.c works in; NULL: not wanted yet
    bool notes_new;                  // blocks that get pages are noted
    bool opening;                    // indices hold nothing yet
    uint32_t taken_up;               // blocks that kvd itself has for a while
    struct vacate *vacate;           // the emptying of an extent that is under way, or NULL
    uint32_t vacated_of;             // whose blocks; KVD_POOL_NONE: its index has gone meanwhile
    uint32_t shut;                   // the extent of which no pages are given out, + 1; 0: none
    uint64_t vacates;                // that have begun
    bool vacated;                    // with the latest that has ended, blocks have gone
    struct region_head *head;
    struct region_journal *journal;
    struct region_namespace *ns;
    struct region_layout *layout;
    struct region_slab *slab;
    uint32_t *slab_at; // by namespace, layout, plane and kind: the slab's number + 1, or 0: derived
    struct region_extent *extent;
    struct region_page *page;
    uint32_t *idle;    // by page: how many of its references are idle; the process's own
    struct lent *lent; // by namespace
    uint64_t *sum; // by page: of a block that is complete, or KVD_SUM_NONE, KVD_SUM_DAMAGED: truth
    struct region_block *block;
    struct region_seq *seq;
};

static inline const struct kvd_layout *layout_of(const struct kvd_pool *pool,
                                                 const struct region_seq *s)
{
    return &pool->layout[s->layout].l;
}

// -- durable stores -----------------------------------------------------------------------------
// What stands before it is in the region before what stands behind it. Memory is coherent and
// outlives the process, so only the compiler has to be kept from moving stores.
#ifdef KVD_POOL_KILL_POINTS
extern void (*kvd_pool_kill_point)(void); // a test looks at the region as it is there
#endif
static inline void stored(void)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#ifdef KVD_POOL_KILL_POINTS
    if (kvd_pool_kill_point)
        kvd_pool_kill_point();
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#endif
}

// -- pool.c -------------------------------------------------------------------------------------
// Gives each table its place in the region. With base NULL only the size is computed.
uint64_t region_lay_out(struct kvd_pool *pool, const struct region_head *h, uint8_t *base);
// What a new pool and one that is opened have alike, outside of the region.
void pool_begin(struct kvd_pool *pool, const struct kvd_pool_config *config,
                const struct kvd_pool_mem_ops *ops);
uint32_t region_shape(void);
// The sizes of tables that a configuration asks for. KVD_E_INVALID.
int region_sizes(const struct kvd_pool_config *c, struct region_head *h, struct kvd_error *err);

// -- journal.c ----------------------------------------------------------------------------------
// Notes what is there, of the region, before it is changed. What one change notes fits the journal.
void journal_note(struct kvd_pool *pool, const void *at, size_t length);
// The change is done.
void journal_end(struct kvd_pool *pool);
// Puts back what an unfinished change had noted. KVD_E_CORRUPT.
int journal_undo(struct kvd_pool *pool, struct kvd_error *err);

static inline struct region_extent *page_extent(const struct kvd_pool *pool, uint32_t page)
{
    return &pool->extent[page / pool->head->slots];
}
static inline const struct region_slab *page_slab(const struct kvd_pool *pool, uint32_t page)
{
    return &pool->slab[page_extent(pool, page)->slab];
}

// -- part.c: parts of pages ---------------------------------------------------------------------
enum { PART_NUMBERS = 8 }; // that a page has in a slab that gives parts of pages

// Numbers that a page of the slab has, and which of them means all of it.
static inline uint32_t slab_stride(const struct region_slab *s)
{
    return s->row_bytes ? PART_NUMBERS : 1;
}
// Whether the number, counted from the extent's first, is one of the slab's; and of a whole page.
static inline bool slab_has(const struct region_slab *s, uint32_t number)
{
    return number / slab_stride(s) < s->slots && (!s->row_bytes || number % PART_NUMBERS);
}
static inline bool slab_has_whole(const struct region_slab *s, uint32_t number)
{
    return slab_has(s, number) && (!s->row_bytes || number % PART_NUMBERS == 1);
}
// 0: it is a whole page; 1: a half, 2: a quarter.
static inline uint32_t page_order(const struct kvd_pool *pool, uint32_t page)
{
    uint32_t node = page_slab(pool, page)->row_bytes ? page % PART_NUMBERS : 1;
    return node >= 4 ? 2 : node >= 2;
}
static inline uint64_t page_size(const struct kvd_pool *pool, uint32_t page)
{
    return page_slab(pool, page)->page_bytes >> page_order(pool, page);
}
// Whether a layout's pages can be given in parts: the bytes of a row, or 0.
uint32_t part_row_bytes(const struct kvd_pool *pool, uint32_t layout, uint32_t plane,
                        uint32_t kind);
// The row of its page with which a part begins.
uint32_t part_row(uint32_t page);
// The addresses of pages, 0 where there is none.
void page_addresses(const struct kvd_pool *pool, const uint32_t *pages, uint32_t n, uint64_t *out);
// Pages that have to be free for that many parts, besides the parts that are.
uint32_t parts_lack(const struct region_slab *s, const uint32_t parts[KVD_POOL_PARTS]);
// A free part, or KVD_POOL_NONE when a page has to be cut up: one that is free as a whole, which
// `first` is the first number of. What is left of it is free.
uint32_t part_take(struct kvd_pool *pool, struct region_slab *s, uint32_t order);
uint32_t part_cut(struct kvd_pool *pool, struct region_slab *s, uint32_t first, uint32_t order);
// Gives a part back. True: the page is free as a whole, and none of it is listed.
bool part_give(struct kvd_pool *pool, struct region_slab *s, uint32_t page);
// Of the page whose first number it is: how many rows are in use. UINT32_MAX: one lies in another.
uint32_t parts_used(const struct kvd_pool *pool, uint32_t first);
// For one that is in use: lists what is free of it.
void parts_relist(struct kvd_pool *pool, struct region_slab *s, uint32_t first);

// -- extent.c: slabs, extents, pages ------------------------------------------------------------
// No pages of an extent are given out any more, until it is opened again or has none in use and is
// returned. One at a time.
void extent_shut(struct kvd_pool *pool, uint32_t x);
void extent_open(struct kvd_pool *pool);
// The slab of a place, or KVD_POOL_NONE.
uint32_t slab_find(const struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane,
                   uint32_t kind);
// What of a slab follows from its layout, plane and kind; nothing of it is in use.
void slab_measure(const struct kvd_pool *pool, struct region_slab *s, uint32_t layout);
// Grants extents to the slab, made if there is none, until it has so many free pages and parts. As
// the ops table's alloc, KVD_E_FULL too when there is no extent; what was granted stays.
int slab_provide(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane, uint32_t kind,
                 uint32_t pages, const uint32_t parts[KVD_POOL_PARTS]);
// Takes away extents without pages in use, and the slab if it has no other.
void slab_settle(struct kvd_pool *pool, uint32_t slab);
// A page of a slab that has a free one: a whole one, or a part of that order.
uint32_t page_take(struct kvd_pool *pool, uint32_t slab, uint32_t order);
// Puts an extent into its slab's list of those with a free page.
void partial_add(struct kvd_pool *pool, struct region_slab *s, uint32_t x);

// -- idle.c: what nobody uses -------------------------------------------------------------------
// Another reference to a page: somebody's, which kvd_pool_page_unref takes away; or an idle one,
// which first becomes somebody's.
void page_ref(struct kvd_pool *pool, uint32_t page);
void page_ref_idle(struct kvd_pool *pool, uint32_t page);
void page_unidle(struct kvd_pool *pool, uint32_t page);
// One that was somebody's is gone, and others are left.
void page_left(struct kvd_pool *pool, uint32_t page);
// The references of a sequence's tables have become idle, or somebody's: where it is listed and not
// pinned, and nowhere else, they are idle. So whatever changes its tables pins it.
void idle_sequence(struct kvd_pool *pool, const struct region_seq *s, bool idle);
void seq_pin(struct kvd_pool *pool, struct region_seq *s);
void seq_unpin(struct kvd_pool *pool, struct region_seq *s);
// Bytes that could be evicted of a namespace now, and that it may have beyond its quota.
uint64_t evictable_bytes(const struct kvd_pool *pool, uint32_t ns);
uint64_t lent_to(const struct kvd_pool *pool, uint32_t ns);
// A look begins, and has found what can be evicted, by namespace.
void lent_look(struct kvd_pool *pool);
void lent_looked(struct kvd_pool *pool, const uint64_t *evictable);
// Of a new namespace nothing is known.
void lent_forget(struct kvd_pool *pool, uint32_t ns);
// For a pool of that shape. -ENOMEM.
int idle_init(struct kvd_pool *pool, const struct region_head *h, struct kvd_error *err);
void idle_deinit(struct kvd_pool *pool);

// -- table.c: page tables -----------------------------------------------------------------------
void table_init(struct region_table *t, uint32_t ns);
// Lets a table that is empty begin shortly before an entry, which is then to be set.
void table_start(struct region_table *t, uint32_t entry);
// Blocks that the table has to get before it can have `count` entries, if it starts at `entry`.
uint32_t table_lacks(const struct region_table *t, uint32_t entry, uint32_t count);
// Sets an entry, not before t->begin; room for the blocks that the table lacks has been made.
void table_set(struct kvd_pool *pool, struct region_table *t, uint32_t entry, uint32_t page);
// The page of an entry, KVD_POOL_NONE for a hole.
uint32_t table_get(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry);
// Drops the entries from `count` on; their pages lose a reference.
void table_truncate(struct kvd_pool *pool, struct region_table *t, uint32_t count);
// Makes holes of the entries before `entry`; their pages lose a reference.
void table_drop_front(struct kvd_pool *pool, struct region_table *t, uint32_t entry);
// Takes over all entries of `from` into a new table, taking a reference on each page. Room for as
// many blocks as `from` has must have been made.
void table_share(struct kvd_pool *pool, struct region_table *to, const struct region_table *from);
uint32_t table_blocks(const struct region_table *t);
static inline bool table_empty(const struct region_table *t)
{
    return t->count <= t->begin;
}

// Goes through a table's blocks.
struct table_walk {
    uint32_t block; // KVD_POOL_NONE: no more
    uint32_t at;    // entry of its first page
    uint32_t n;     // entries in it
    uint32_t left;  // with those of later ones
};
static inline struct table_walk table_walk(const struct region_table *t)
{
    uint32_t left = table_empty(t) ? 0 : t->count - t->begin;
    return (struct table_walk){.block = left ? t->first : KVD_POOL_NONE,
                               .at = t->begin,
                               .n = KVD_MIN(left, (uint32_t)KVD_TABLE_ENTRIES),
                               .left = left};
}
static inline void table_walk_on(const struct kvd_pool *pool, struct table_walk *w)
{
    w->left -= w->n;
    w->at += w->n;
    w->n = KVD_MIN(w->left, (uint32_t)KVD_TABLE_ENTRIES);
    w->block = w->left ? pool->block[w->block].next : KVD_POOL_NONE;
}
// Reads n entries, KVD_POOL_NONE for holes and those that are not there, into every stride-th of
// out.
void table_read(const struct kvd_pool *pool, const struct region_table *t, uint32_t first,
                uint32_t n, uint32_t *out, uint32_t stride);
// Number of entries that hold a page.
uint32_t table_pages(const struct kvd_pool *pool, const struct region_table *t);

// -- kept.c: what prefix indices keep -----------------------------------------------------------
// Finds or makes a namespace's index. -ENOMEM, KVD_E_INTERNAL.
int kept_open(struct kvd_pool *pool, uint32_t ns, struct kept **out, struct kvd_error *err);
// Forgets a namespace's index, which refers to no pages.
void kept_close(struct kvd_pool *pool, uint32_t ns);
// Leaves it to whoever opens the region next, if its memory outlives the process.
void kept_leave(struct kvd_pool *pool, uint32_t ns);
// Maps the memory of an index of so many entries, that of k->fd if there is one. -ENOMEM.
int kept_map(struct kept *k, uint32_t entries, struct kvd_error *err);
void kept_unmap(struct kept **k);
uint64_t kept_bytes(uint32_t entries);
// Accounts for a page that an index refers to, or no longer does (by -1).
void kept_count(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t page, int by);

// -- kept_open.c: what an earlier process's indices kept ----------------------------------------
bool layout_ok(const struct kvd_pool *pool, const struct region_layout *r);
// Takes over the indices of all namespaces that have one, as far as they are sound in themselves.
// Those that are not are dropped. -ENOMEM.
int kept_find(struct kvd_pool *pool, struct kvd_error *err);
// Refers to the pages of a namespace's index, once slabs are known. One whose entries name pages
// that cannot be theirs is dropped as a whole.
void kept_recover(struct kvd_pool *pool, uint32_t ns);
// The page of a block in a plane, KVD_POOL_NONE if it has none there.
uint32_t kept_page(const struct kvd_pool *pool, const struct kept *k, uint32_t layout,
                   uint32_t value, uint32_t plane);
// Refers to pages of a block, in those planes in which it has none. KVD_POOL_NONE: none there.
// Returns whether it has got some.
bool kept_refer(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t entry,
                const uint32_t page[KVD_MAX_PLANES]);
// The same for a block that is new then.
void kept_add(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t entry,
              const uint32_t page[KVD_MAX_PLANES]);
// Puts an entry behind the new ones, if it is not among them.
void kept_note_new(struct kept *k, uint32_t entry);
// Whether another block stands in an entry's place: see kvd_blocks_supersede.
bool kept_superseded(const struct kept *k, uint32_t entry);
void kept_supersede(struct kept *k, uint32_t entry, bool on);
// Gives back a block's pages.
void kept_drop(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t value);
// Gives back the page that an entry has in a plane.
void kept_lose(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t entry,
               uint32_t plane);
// The end that has the block of an entry in its window, and `depth` blocks up to it. NULL: none.
struct region_seq *end_of(const struct kvd_pool *pool, uint32_t ns, uint32_t entry, uint32_t depth);

// -- record.c: the records of sequences and namespaces ------------------------------------------
// The record of an id in use, or NULL.
struct region_seq *seq_find(const struct kvd_pool *pool, uint64_t id);
// The same for one that its holders freed, and that is pinned.
struct region_seq *seq_find_any(const struct kvd_pool *pool, uint64_t id);
uint64_t seq_id(const struct kvd_pool *pool, const struct region_seq *s);
// Adjusts the token counters when a sequence's length changes.
void seq_set_length(struct kvd_pool *pool, struct region_seq *s, uint64_t length);
// A record for a sequence that is not there yet, and that seq_appear makes be there. KVD_E_LIMIT.
int seq_prepare(struct kvd_pool *pool, uint32_t ns, uint32_t layout, struct region_seq **seq,
                struct kvd_error *err);
void seq_appear(struct kvd_pool *pool, struct region_seq *s);
void seq_destroy(struct kvd_pool *pool, struct region_seq *s);
uint64_t seq_bytes(const struct kvd_pool *pool, const struct region_seq *s);
// To be called when something of a namespace has gone: forgets it if that was the last.
void namespace_settle(struct kvd_pool *pool, uint32_t ns);

// -- append.c -----------------------------------------------------------------------------------
// Ends what a process left of an append, and drops pages beyond what the sequence says it has.
void append_recover(struct kvd_pool *pool, struct region_seq *s);

// -- publish.c ----------------------------------------------------------------------------------
uint32_t name_bucket(uint32_t ns, const char *name);
void lru_add(struct kvd_pool *pool, struct region_seq *s);
// The same, as the first that is to go.
void lru_add_first(struct kvd_pool *pool, struct region_seq *s);
void lru_remove(struct kvd_pool *pool, struct region_seq *s);
// Of one that is listed: it becomes the last of them to go, or the first, as lru_add_first has it.
void lru_move(struct kvd_pool *pool, struct region_seq *s, bool first);
void name_remove(struct kvd_pool *pool, struct region_seq *s);
// Evicts the least recently used candidate of `ns` (KVD_POOL_NONE: of any). False when there is
// none.
bool evict_one(struct kvd_pool *pool, uint32_t ns);
// The least recently used sequence of a namespace that can be evicted, or KVD_POOL_NONE.
uint32_t evictable_of(const struct kvd_pool *pool, uint32_t ns);
void evict(struct kvd_pool *pool, struct region_seq *s);

// -- forget.c: what goes of prefix indices ------------------------------------------------------
// Removes one block that nothing keeps, of namespace `ns`; KVD_POOL_NONE: of that whose index has
// the most bytes of pages and such a block. False: there is none.
bool blocks_evict(struct kvd_pool *pool, uint32_t ns, enum kvd_prefix_reason reason);
// Removes up to n. Returns how many went.
uint32_t blocks_evict_many(struct kvd_pool *pool, uint32_t ns, uint32_t n,
                           enum kvd_prefix_reason reason);
// Removes those of the namespace's entries for which `cut` is true: as kvd_prefix_cut. *gone grows.
bool blocks_cut(struct kvd_pool *pool, uint32_t ns, const bool *cut, uint32_t n,
                struct kvd_prefix_cursor *at, uint32_t *most, enum kvd_prefix_reason reason,
                uint64_t *gone);
// Goes on removing the blocks of namespace c->ns that nobody holds, those of a layout or all; looks
// at most at *n entries, which it counts down. True: it has looked at all.
bool blocks_clear(struct kvd_pool *pool, struct kvd_pool_clearing *c, uint32_t *n);
// Evicts what is least worth keeping, of blocks and published sequences, of `ns` or, if that is
// KVD_POOL_NONE, of all: ends that a later one has passed, blocks, published sequences. False:
// there is nothing.
bool evict_something(struct kvd_pool *pool, uint32_t ns, enum kvd_prefix_reason reason,
                     struct kvd_pool_evicted *sum);
// The same for room in the pool, which `ns` wants to grow by so many bytes: what is borrowed goes
// before all else, and who borrows takes it from itself alone.
bool evict_for_room(struct kvd_pool *pool, uint32_t ns, uint64_t bytes);
// Of which namespace evict_for_room takes first; KVD_POOL_NONE: of none.
uint32_t giver_of_room(const struct kvd_pool *pool, uint32_t ns, uint64_t bytes);

// -- vacate.c: emptying an extent ---------------------------------------------------------------
// For what a namespace needs: begins to evict the blocks of an extent that has nothing else, of the
// one with which fewest blocks go, and of no other namespace than evict_for_room would take from
// first: who has little does not give because who has much has no such extent. Returns its number,
// or that of the one that is under way; 0: there is nobody to give one.
uint64_t vacate_begin(struct kvd_pool *pool, uint32_t ns, uint64_t bytes);
enum vacated { VACATE_RUNS, VACATE_SOME, VACATE_NOTHING };
// What became of one: whether blocks have gone.
enum vacated vacate_result(const struct kvd_pool *pool, uint64_t number);
// All of it at once. False: nothing has gone.
bool vacate_for_room(struct kvd_pool *pool, uint32_t ns, uint64_t bytes);
// Gives up one that is under way.
void vacate_drop(struct kvd_pool *pool);

// -- shares.c -----------------------------------------------------------------------------------
enum share { SHARE_SEQUENCES, SHARE_BLOCKS };
// Sees to it that `ns` may have n more: evicts what is evictable, of whoever has most. KVD_E_LIMIT.
int share_take(struct kvd_pool *pool, uint32_t ns, enum share share, uint32_t n,
               struct kvd_error *err);
// A slot for another namespace; KVD_POOL_NONE when there is none.
uint32_t namespace_slot(struct kvd_pool *pool);
// Sees to it that `ns` may have one more layout in use; then there is a slot for a new one.
bool layout_room(struct kvd_pool *pool, uint32_t ns);
uint32_t layout_slot(struct kvd_pool *pool, bool *recycled);

// -- verify.c -----------------------------------------------------------------------------------
// Whether where a sequence says it is can be.
int pool_check_state(const struct kvd_pool *pool, const struct region_seq *s,
                     struct kvd_error *err);

// -- room.c -------------------------------------------------------------------------------------
// Pages that are needed, parts included.
uint32_t need_pages(const struct kvd_pool_need *need);
// Makes room for what is needed, by eviction too: until room_settle, taking it cannot fail, as long
// as nothing else is taken. On failure there is no need for room_settle.
int room_make(struct kvd_pool *pool, uint32_t ns, uint32_t layout, const struct kvd_pool_need *need,
              struct kvd_error *err);
// Gives back what was provided and not taken.
void room_settle(struct kvd_pool *pool, uint32_t ns, uint32_t layout,
                 const struct kvd_pool_need *need);

#endif
