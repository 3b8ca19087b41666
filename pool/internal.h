// The pool's region: one mapping, tables at fixed offsets, references by index. Private to pool/.
#ifndef KVD_POOL_INTERNAL_H
#define KVD_POOL_INTERNAL_H

#include "pool/pool.h"

#define KVD_POOL_MAGIC 0x334c4f4f5044564bull // "KVDPOOL3"

enum {
    KVD_POOL_ALIGN = KVD_PAGE_UNIT, // page sizes are rounded up to this
    KVD_TABLE_ENTRIES = 30,         // page numbers in a table block
    KVD_NAME_BUCKETS = 1 << 14,
    KVD_EXTENT_MIN = 2 << 20,
};

// Owner of an extent whose namespace is gone: to be zeroed for whoever gets it.
#define KVD_OWNER_GONE (KVD_POOL_NONE - 1)

// A namespace goes, and its slot can be another's, when nothing is left that would need it.
struct region_namespace {
    char name[KVD_MAX_NAMESPACE + 1]; // "": free
    bool kept;                        // stays though it is empty
    uint32_t holders;
    uint64_t quota, used, pages, sequences, tokens, blocks;
    uint32_t lru_first, lru_last; // evictable sequences; first: least recently used
};

struct region_layout {
    struct kvd_layout l;
    uint32_t refs; // sequences, and whoever asked for it
    uint32_t idle; // of those, evictable sequences
    uint32_t ns;   // the namespace that made it
    uint64_t used; // stamp of the latest of those
    uint64_t page_bytes[KVD_POOL_KINDS];
};

// A slab lives as long as it has extents, so there are never more than these. slab_at finds it.
struct region_slab {
    uint32_t ns, layout, kind;
    uint32_t partial; // first extent with a free slot; of a free slab, the next free one
    uint32_t extents;
    uint64_t page_bytes, used;
    uint32_t slots; // pages that fit an extent
};

struct region_extent {
    uint64_t addr;  // 0: not allocated yet
    uint32_t slab;  // KVD_POOL_NONE: free
    uint32_t owner; // namespace whose data it may hold; KVD_POOL_NONE: reads as zero
    uint32_t used;
    uint32_t carved;     // slots handed out at least once
    uint32_t free_slot;  // head of the list of returned slots
    uint32_t prev, next; // in the slab's partial list; `next` also links the free list
    uint64_t idle_since; // when it was first seen free; 0: not yet
};

struct region_page {
    uint32_t refs; // 0: free
    uint32_t next; // next returned slot of the extent
};

struct region_block {
    uint32_t next;
    uint32_t used;
    uint32_t page[KVD_TABLE_ENTRIES];
};

struct region_table {
    uint32_t first, last; // blocks
    uint32_t count;       // entries, holes included
    uint32_t ns;          // whose blocks they are
};

// The last append that was applied to a sequence: whoever made it may send it again.
struct region_append {
    uint64_t appender, request;
    uint64_t position, hist_end; // of the history before it
    uint32_t tokens, layer_begin, layer_count;
};

struct region_seq {
    uint32_t generation; // odd while in use
    uint32_t ns, layout;
    uint32_t holders, pins;
    bool doomed; // freed by its last holder while pinned
    bool listed; // on the LRU list
    uint64_t length, hist_end;
    uint64_t pending_length, pending_hist_end;
    uint32_t pending_layers;
    struct region_append last;
    struct region_table table[KVD_POOL_KINDS];
    uint64_t lru_stamp;          // when it became evictable, or was last looked up since
    uint32_t lru_prev, lru_next; // lru_next also links the free list
    uint32_t name_next;
    char name[KVD_MAX_NAME + 1];
};

struct region_head {
    uint64_t magic;
    uint64_t region_bytes;
    uint64_t extent_bytes;
    uint32_t n_extents, slots;
    uint32_t max_namespaces, max_layouts, max_slabs, max_sequences, max_blocks;
    uint32_t n_namespaces, n_layouts, n_slabs, n_sequences_ever, n_blocks_ever;
    uint32_t free_extent, free_seq, free_block, free_slab;
    uint32_t blocks; // in use
    uint32_t extents_granted;
    uint32_t extents_aside;    // being made ahead of need
    uint32_t first_generation; // of every sequence slot; even
    uint64_t lru_clock;
    uint64_t used, evictions, sequences, tokens;
    uint32_t name_bucket[KVD_NAME_BUCKETS];
};

struct kvd_pool {
    struct kvd_pool_mem_ops ops;
    void (*on_evict)(void *ctx, uint32_t ns, uint64_t seq, const char *name);
    void *on_evict_ctx;
    struct region_head *head;
    struct region_namespace *ns;
    struct region_layout *layout;
    struct region_slab *slab;
    uint32_t *slab_at; // by namespace, layout and kind: the slab's number + 1, or 0
    struct region_extent *extent;
    struct region_page *page;
    struct region_block *block;
    struct region_seq *seq;
};

// -- table.c: page tables -----------------------------------------------------------------------
void table_init(struct region_table *t, uint32_t ns);
// Makes room for one more block if `entry` would need it, by eviction too. KVD_E_LIMIT.
int table_set(struct kvd_pool *pool, struct region_table *t, uint32_t entry, uint32_t page,
              struct kvd_error *err);
uint32_t table_get(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry);
// Drops the entries from `count` on; their pages lose a reference.
void table_truncate(struct kvd_pool *pool, struct region_table *t, uint32_t count);
// Appends all entries of `from`, taking a reference on each page. On failure `to` is unchanged.
int table_share(struct kvd_pool *pool, struct region_table *to, const struct region_table *from,
                struct kvd_error *err);
// Number of entries that hold a page.
uint32_t table_pages(const struct kvd_pool *pool, const struct region_table *t);

// Takes (-1) or gives back (1) a reference of each page, without freeing any. Adds the bytes of
// those that have none left to *bytes (NULL: not wanted).
void table_weigh(struct kvd_pool *pool, const struct region_table *t, int by, uint64_t *bytes);

// -- extent.c -----------------------------------------------------------------------------------
// The slab, made if there is none; slab_drop_empty takes it away again if it got no extent.
uint32_t slab_find(struct kvd_pool *pool, uint32_t ns, uint32_t layout, enum kvd_pool_kind kind);
void slab_drop_empty(struct kvd_pool *pool, uint32_t slab);
static inline struct region_extent *page_extent(const struct kvd_pool *pool, uint32_t page)
{
    return &pool->extent[page / pool->head->slots];
}

// -- sequence.c ---------------------------------------------------------------------------------
// The record of an id in use, or NULL.
struct region_seq *seq_find(const struct kvd_pool *pool, uint64_t id);
uint64_t seq_id(const struct kvd_pool *pool, const struct region_seq *s);
// Adjusts the token counters when a sequence's length changes.
void seq_set_length(struct kvd_pool *pool, struct region_seq *s, uint64_t length);
void seq_destroy(struct kvd_pool *pool, struct region_seq *s);
uint64_t seq_bytes(const struct kvd_pool *pool, const struct region_seq *s);

// -- shares.c -----------------------------------------------------------------------------------
enum share { SHARE_SEQUENCES, SHARE_BLOCKS };
// Sees to it that `ns` may have one more: evicts what is evictable, of whoever has most.
// KVD_E_LIMIT.
int share_take(struct kvd_pool *pool, uint32_t ns, enum share share, struct kvd_error *err);
// A slot for another namespace; KVD_POOL_NONE when there is none.
uint32_t namespace_slot(struct kvd_pool *pool);
// Sees to it that `ns` may have one more layout in use; then there is a slot for a new one.
bool layout_room(struct kvd_pool *pool, uint32_t ns);
uint32_t layout_slot(struct kvd_pool *pool, bool *recycled);
// To be called when something of a namespace has gone: forgets it if that was the last.
void namespace_settle(struct kvd_pool *pool, uint32_t ns);

// -- publish.c ----------------------------------------------------------------------------------
void lru_add(struct kvd_pool *pool, struct region_seq *s);
void lru_remove(struct kvd_pool *pool, struct region_seq *s);
void name_remove(struct kvd_pool *pool, struct region_seq *s);
// Evicts the least recently used candidate of `ns` (KVD_POOL_NONE: of any). False when there is
// none.
bool evict_one(struct kvd_pool *pool, uint32_t ns, uint64_t *freed);
// The least recently used sequence of a namespace that can be evicted, or KVD_POOL_NONE.
uint32_t evictable_of(const struct kvd_pool *pool, uint32_t ns);
void evict(struct kvd_pool *pool, struct region_seq *s);

#endif
