// Makes the region's derived state anew from what internal.h calls the truth, which is checked as
// far as it could lead astray.
#include "pool/internal.h"

struct rebuilding {
    struct kvd_pool *pool;
    bool *block_taken; // by block
    uint32_t *listed;  // sequences that can be evicted
    uint32_t n_listed;
};

// -- clearing -----------------------------------------------------------------------------------

static void clear_head(struct region_head *h)
{
    h->n_blocks_ever = h->blocks = h->extents_granted = h->extents_aside = h->damaged = 0;
    h->free_extent = h->free_seq = h->free_block = h->free_slab = KVD_POOL_NONE;
    h->lru_clock = h->used = h->sequences = h->tokens = 0;
    memset(h->name_bucket, 0xff, sizeof(h->name_bucket));
}

static void clear_owners(struct kvd_pool *pool)
{
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++) {
        struct region_namespace *n = &pool->ns[i];
        n->used = n->pages = n->sequences = n->tokens = n->blocks = n->idle = 0;
        n->lru_first = n->lru_last = KVD_POOL_NONE;
    }
    for (uint32_t i = 0; i < pool->head->n_layouts; i++) {
        struct region_layout *l = &pool->layout[i];
        l->sequences = l->idle = 0;
        l->used = l->kept = 0;
    }
}

static void clear_extent(struct kvd_pool *pool, uint32_t x)
{
    struct region_extent *e = &pool->extent[x];
    e->used = e->carved = 0;
    e->free_slot = e->prev = e->next = KVD_POOL_NONE;
    e->idle_since = 0;
    uint64_t first = (uint64_t)x * pool->head->slots;
    if (e->slab == KVD_POOL_NONE)
        return;
    memset(&pool->page[first], 0, sizeof(*pool->page) * pool->head->slots);
    memset(&pool->idle[first], 0, sizeof(*pool->idle) * pool->head->slots);
}

// -- slabs --------------------------------------------------------------------------------------

static uint32_t *place_of(const struct kvd_pool *pool, const struct region_slab *s)
{
    uint64_t at = (uint64_t)s->ns * pool->head->max_layouts + s->layout;
    return &pool->slab_at[(at * KVD_MAX_PLANES + s->plane) * KVD_POOL_KINDS + s->kind];
}

static int slabs(struct kvd_pool *pool, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    for (uint32_t i = 0; i < h->n_namespaces; i++) // only those rows can have entries
        memset(&pool->slab_at[(uint64_t)i * h->max_layouts * KVD_MAX_PLANES * KVD_POOL_KINDS], 0,
               sizeof(*pool->slab_at) * h->max_layouts * KVD_MAX_PLANES * KVD_POOL_KINDS);
    for (uint32_t i = 0; i < h->n_slabs; i++) {
        struct region_slab *s = &pool->slab[i];
        s->extents = s->slots = s->row_bytes = 0;
        if (s->layout == KVD_POOL_NONE)
            continue;
        if (s->ns >= h->n_namespaces || s->layout >= h->n_layouts || s->kind >= KVD_POOL_KINDS ||
            s->plane >= pool->layout[s->layout].l.n_planes || *place_of(pool, s))
            return kvd_fail(err, KVD_E_CORRUPT, "slab %u is of no namespace and plane, or twice",
                            i);
        slab_measure(pool, s, s->layout);
        *place_of(pool, s) = i + 1;
    }
    return KVD_OK;
}

static void free_slabs(struct kvd_pool *pool)
{
    for (uint32_t i = pool->head->n_slabs; i-- > 0;) {
        struct region_slab *s = &pool->slab[i];
        if (s->layout != KVD_POOL_NONE && s->extents)
            continue;
        if (s->layout != KVD_POOL_NONE)
            *place_of(pool, s) = 0;
        s->layout = KVD_POOL_NONE;
        s->partial = pool->head->free_slab;
        pool->head->free_slab = i;
    }
}

// -- sequences ----------------------------------------------------------------------------------

static int refer(struct rebuilding *r, const struct region_seq *s, uint32_t plane, uint32_t kind,
                 uint32_t page, struct kvd_error *err)
{
    struct kvd_pool *pool = r->pool;
    uint32_t slots = pool->head->slots;
    const struct region_extent *e =
        page / slots < pool->head->n_extents ? page_extent(pool, page) : NULL;
    const struct region_slab *slab =
        e && e->slab < pool->head->n_slabs ? &pool->slab[e->slab] : NULL;
    if (!slab || slab->ns != s->ns || slab->layout != s->layout || slab->plane != plane ||
        slab->kind != kind || !slab_has(slab, page % slots))
        return kvd_fail(err, KVD_E_CORRUPT, "page %u is not of its sequence's slab", page);
    pool->page[page].refs++;
    return KVD_OK;
}

static int walk_table(struct rebuilding *r, const struct region_seq *s, uint32_t plane,
                      uint32_t kind, struct region_table *t, struct kvd_error *err)
{
    struct kvd_pool *pool = r->pool;
    struct region_head *h = pool->head;
    t->last = KVD_POOL_NONE;
    if (table_empty(t))
        table_init(t, s->ns);
    if (t->ns != s->ns)
        return kvd_fail(err, KVD_E_CORRUPT, "a page table is of another namespace");
    for (struct table_walk w = table_walk(t); w.left; table_walk_on(pool, &w)) {
        uint32_t b = w.block;
        if (b >= h->max_blocks || r->block_taken[b])
            return kvd_fail(err, KVD_E_CORRUPT, "a page table's block %u cannot be its", b);
        r->block_taken[b] = true;
        h->n_blocks_ever = KVD_MAX(h->n_blocks_ever, b + 1);
        h->blocks++;
        pool->ns[s->ns].blocks++;
        t->last = b;
        for (uint32_t i = 0; i < w.n; i++) {
            uint32_t page = pool->block[b].page[i];
            if (page != KVD_POOL_NONE && refer(r, s, plane, kind, page, err))
                return KVD_E_CORRUPT;
        }
    }
    return KVD_OK;
}

static int sequence(struct rebuilding *r, uint32_t i, struct kvd_error *err)
{
    struct kvd_pool *pool = r->pool;
    struct region_seq *s = &pool->seq[i];
    s->listed = false;
    s->lru_prev = s->lru_next = s->name_next = KVD_POOL_NONE;
    s->held_entry = s->end_entry = 0;
    if (!(s->generation & 1)) {
        s->lru_next = pool->head->free_seq;
        pool->head->free_seq = i;
        return KVD_OK;
    }
    if (s->ns >= pool->head->n_namespaces || s->layout >= pool->head->n_layouts ||
        s->pending_layers >= layout_of(pool, s)->n_layers)
        return kvd_fail(err, KVD_E_CORRUPT, "sequence %u is of no namespace and layout", i);
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (uint32_t k = 0; k < KVD_POOL_KINDS; k++)
            if (walk_table(r, s, p, k, &s->table[p][k], err) ||
                walk_table(r, s, p, k, &s->undo[p][k], err))
                return KVD_E_CORRUPT;
    pool->layout[s->layout].sequences++;
    pool->ns[s->ns].sequences++;
    pool->ns[s->ns].tokens += s->length;
    pool->head->sequences++;
    pool->head->tokens += s->length;
    if (s->name[0]) {
        uint32_t *bucket = &pool->head->name_bucket[name_bucket(s->ns, s->name)];
        s->name_next = *bucket;
        *bucket = i;
        if (s->holders == 0)
            r->listed[r->n_listed++] = i;
    }
    return KVD_OK;
}

static int by_stamp(const void *a, const void *b, void *ctx)
{
    const struct kvd_pool *pool = ctx;
    uint64_t x = pool->seq[*(const uint32_t *)a].lru_stamp;
    uint64_t y = pool->seq[*(const uint32_t *)b].lru_stamp;
    return (x > y) - (x < y);
}

// In the order of their stamps, as far as those are still right: they get new ones.
static void relist(struct rebuilding *r)
{
    qsort_r(r->listed, r->n_listed, sizeof(*r->listed), by_stamp, r->pool);
    for (uint32_t i = 0; i < r->n_listed; i++)
        lru_add(r->pool, &r->pool->seq[r->listed[i]]);
}

// -- extents ------------------------------------------------------------------------------------

static void free_extent(struct kvd_pool *pool, uint32_t x)
{
    struct region_extent *e = &pool->extent[x];
    e->slab = KVD_POOL_NONE;
    if (e->aside) {
        pool->head->extents_aside++;
        return;
    }
    e->next = pool->head->free_extent;
    pool->head->free_extent = x;
}

// What is in use of the page of an extent's slot: its bytes. UINT64_MAX: a part of it lies in
// another.
static uint64_t slot_used(struct kvd_pool *pool, const struct region_slab *s, uint32_t first)
{
    uint64_t bytes = 0;
    for (uint32_t page = first; page < first + slab_stride(s); page++) {
        if (!pool->page[page].refs)
            continue;
        bytes += page_size(pool, page);
        pool->head->damaged += pool->sum[page] == KVD_SUM_DAMAGED;
        pool->ns[s->ns].pages++;
    }
    return s->row_bytes && parts_used(pool, first) == UINT32_MAX ? UINT64_MAX : bytes;
}

static bool slot_in_use(const struct kvd_pool *pool, const struct region_slab *s, uint32_t first)
{
    for (uint32_t page = first; page < first + slab_stride(s); page++)
        if (pool->page[page].refs)
            return true;
    return false;
}

static int extent(struct kvd_pool *pool, uint32_t x, struct kvd_error *err)
{
    struct region_extent *e = &pool->extent[x];
    struct region_slab *s = e->slab < pool->head->n_slabs ? &pool->slab[e->slab] : NULL;
    uint32_t first = x * pool->head->slots, stride = s ? slab_stride(s) : 1;
    for (uint32_t i = 0; s && i < s->slots; i++) {
        uint64_t bytes = slot_used(pool, s, first + i * stride);
        if (bytes == UINT64_MAX)
            return kvd_fail(err, KVD_E_CORRUPT, "a part of page %u is in use twice",
                            first + i * stride);
        if (!bytes)
            continue;
        if (s->row_bytes)
            parts_relist(pool, s, first + i * stride);
        e->used++;
        e->carved = i + 1;
        pool->head->used += bytes;
        pool->ns[s->ns].used += bytes;
    }
    if (e->used == 0) {
        free_extent(pool, x);
        return KVD_OK;
    }
    for (uint32_t i = e->carved; i-- > 0;) {
        if (slot_in_use(pool, s, first + i * stride))
            continue;
        pool->page[first + i * stride].next = e->free_slot;
        e->free_slot = i;
    }
    s->extents++;
    s->used += e->used;
    if (e->used < s->slots)
        partial_add(pool, s, x);
    pool->head->extents_granted++;
    return KVD_OK;
}

static void free_blocks(struct rebuilding *r)
{
    struct region_head *h = r->pool->head;
    for (uint32_t b = h->n_blocks_ever; b-- > 0;) {
        if (r->block_taken[b])
            continue;
        r->pool->block[b].next = h->free_block;
        h->free_block = b;
    }
}

static int rebuild(struct rebuilding *r, struct kvd_error *err)
{
    struct kvd_pool *pool = r->pool;
    struct region_head *h = pool->head;
    clear_head(h);
    clear_owners(pool);
    for (uint32_t x = 0; x < h->n_extents; x++)
        clear_extent(pool, x);
    int rc = slabs(pool, err);
    for (uint32_t i = h->n_sequences_ever; i-- > 0 && rc == KVD_OK;)
        rc = sequence(r, i, err);
    if (rc)
        return rc;
    relist(r);
    for (uint32_t i = 0; i < h->n_namespaces; i++)
        kept_recover(pool, i);
    for (uint32_t x = h->n_extents; x-- > 0 && rc == KVD_OK;)
        rc = extent(pool, x, err);
    if (rc)
        return rc;
    free_slabs(pool);
    free_blocks(r);
    return KVD_OK;
}

int kvd_pool_rebuild(struct kvd_pool *pool, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    bool *taken KVD_FREE = calloc(h->max_blocks, sizeof(*taken));
    uint32_t *listed KVD_FREE = calloc(h->max_sequences, sizeof(*listed));
    for (uint32_t i = 0; pool->kept && i < h->max_namespaces; i++)
        if (pool->kept[i] && !pool->opening)
            return kvd_fail(err, KVD_E_PRECONDITION, "namespace %u has a prefix index", i);
    struct rebuilding r = {.pool = pool, .block_taken = taken, .listed = listed};
    if (!taken || !listed)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (h->magic != KVD_POOL_MAGIC || h->n_sequences_ever > h->max_sequences ||
        h->n_slabs > h->max_slabs || h->n_layouts > h->max_layouts ||
        h->n_namespaces > h->max_namespaces)
        return kvd_fail(err, KVD_E_CORRUPT, "the region's head contradicts itself");
    return rebuild(&r, err);
}
