// Slabs, extents, and the pages carved out of them.
//
// A slab keeps the extents that have a free slot in a list; an extent hands out returned slots
// first, then carves new ones. An extent that becomes empty goes back to the pool at once, so
// memory moves between namespaces and layouts without a compactor. It is zeroed when it is next
// granted to another namespace, not when it is returned: most extents go back to where they came
// from.
#include "pool/internal.h"

static uint32_t *slab_place(const struct kvd_pool *pool, uint32_t ns, uint32_t layout,
                            uint32_t plane, uint32_t kind)
{
    uint64_t at = (uint64_t)ns * pool->head->max_layouts + layout;
    return &pool->slab_at[(at * KVD_MAX_PLANES + plane) * KVD_POOL_KINDS + kind];
}

uint32_t slab_find(const struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane,
                   uint32_t kind)
{
    return *slab_place(pool, ns, layout, plane, kind) - 1;
}

void slab_measure(const struct kvd_pool *pool, struct region_slab *s, uint32_t layout)
{
    s->partial = KVD_POOL_NONE;
    s->extents = 0;
    s->page_bytes = pool->layout[layout].page_bytes[s->plane][s->kind];
    s->slots = (uint32_t)(pool->head->extent_bytes / s->page_bytes);
    s->used = 0;
    s->row_bytes = part_row_bytes(pool, layout, s->plane, s->kind);
    for (int i = 0; i < KVD_POOL_PARTS; i++) {
        s->part[i] = KVD_POOL_NONE;
        s->parts[i] = 0;
    }
}

static uint32_t slab_make(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane,
                          uint32_t kind)
{
    struct region_head *h = pool->head;
    uint32_t *place = slab_place(pool, ns, layout, plane, kind), x = h->free_slab;
    if (*place)
        return *place - 1;
    bool another = x != KVD_POOL_NONE;
    if (another)
        h->free_slab = pool->slab[x].partial;
    else
        x = h->n_slabs;
    pool->slab[x] =
        (struct region_slab){.ns = ns, .layout = KVD_POOL_NONE, .plane = plane, .kind = kind};
    slab_measure(pool, &pool->slab[x], layout);
    stored();
    pool->slab[x].layout = layout; // with this it is there
    stored();
    h->n_slabs += !another;
    stored();
    *place = x + 1;
    return x;
}

static void slab_drop_empty(struct kvd_pool *pool, uint32_t x)
{
    struct region_slab *s = &pool->slab[x];
    if (s->extents)
        return;
    *slab_place(pool, s->ns, s->layout, s->plane, s->kind) = 0;
    s->layout = KVD_POOL_NONE;
    stored();
    s->partial = pool->head->free_slab;
    pool->head->free_slab = x;
}

static void partial_remove(struct kvd_pool *pool, struct region_slab *s, uint32_t x)
{
    struct region_extent *e = &pool->extent[x];
    if (e->prev != KVD_POOL_NONE)
        pool->extent[e->prev].next = e->next;
    else
        s->partial = e->next;
    if (e->next != KVD_POOL_NONE)
        pool->extent[e->next].prev = e->prev;
    e->prev = e->next = KVD_POOL_NONE;
}

void partial_add(struct kvd_pool *pool, struct region_slab *s, uint32_t x)
{
    struct region_extent *e = &pool->extent[x];
    e->prev = KVD_POOL_NONE;
    e->next = s->partial;
    if (s->partial != KVD_POOL_NONE)
        pool->extent[s->partial].prev = x;
    s->partial = x;
}

// Takes the free extent that suits `ns` best out of the free list: one that holds its own data or
// none, else any; `made`: only among those that have memory.
static uint32_t free_extent_take(struct kvd_pool *pool, uint32_t ns, bool made)
{
    uint32_t *best = NULL;
    for (uint32_t *link = &pool->head->free_extent; *link != KVD_POOL_NONE;
         link = &pool->extent[*link].next) {
        uint32_t owner = pool->extent[*link].owner;
        if (made && !pool->extent[*link].addr)
            continue;
        if (!best || owner == ns || (owner == KVD_POOL_NONE && pool->extent[*link].addr))
            best = link;
        if (owner == ns)
            break;
    }
    if (!best)
        return KVD_POOL_NONE;
    uint32_t x = *best;
    *best = pool->extent[x].next;
    return x;
}

static int extent_grant(struct kvd_pool *pool, uint32_t slab, bool made)
{
    struct region_slab *s = &pool->slab[slab];
    uint32_t x = free_extent_take(pool, s->ns, made);
    if (x == KVD_POOL_NONE)
        return KVD_E_FULL;
    struct region_extent *e = &pool->extent[x];
    int rc = 0;
    if (!e->addr)
        rc = pool->ops.alloc(pool->ops.ctx, x, pool->head->extent_bytes, &e->addr);
    else if (e->owner != KVD_POOL_NONE && e->owner != s->ns)
        rc = pool->ops.zero(pool->ops.ctx, x, e->addr, pool->head->extent_bytes);
    if (rc) {
        e->next = pool->head->free_extent;
        pool->head->free_extent = x;
        return rc;
    }
    stored();
    e->owner = s->ns;
    stored();
    e->slab = slab;
    stored();
    e->used = e->carved = 0;
    e->free_slot = KVD_POOL_NONE;
    if (s->row_bytes) // whether a part is free is seen by its neighbours
        memset(&pool->page[(uint64_t)x * pool->head->slots], 0,
               (size_t)s->slots * PART_NUMBERS * sizeof(*pool->page));
    partial_add(pool, s, x);
    s->extents++;
    pool->head->extents_granted++;
    return KVD_OK;
}

uint32_t kvd_pool_spare_wanted(struct kvd_pool *pool, uint32_t want)
{
    uint32_t *fresh = NULL, have = 0;
    for (uint32_t *link = &pool->head->free_extent; *link != KVD_POOL_NONE;
         link = &pool->extent[*link].next) {
        if (!pool->extent[*link].addr)
            fresh = fresh ? fresh : link;
        else if (++have == want)
            return KVD_POOL_NONE;
    }
    if (!fresh || have >= want)
        return KVD_POOL_NONE;
    uint32_t x = *fresh;
    *fresh = pool->extent[x].next;
    pool->extent[x].aside = true;
    pool->head->extents_aside++;
    return x;
}

void kvd_pool_spare_made(struct kvd_pool *pool, uint32_t index, uint64_t addr)
{
    struct region_extent *e = &pool->extent[index];
    e->addr = addr;
    stored();
    e->aside = false;
    e->idle_since = 0;
    e->next = pool->head->free_extent;
    pool->head->free_extent = index;
    pool->head->extents_aside--;
}

static void drop_memory(struct kvd_pool *pool, uint32_t x)
{
    struct region_extent *e = &pool->extent[x];
    uint64_t addr = e->addr;
    e->addr = e->idle_since = 0;
    stored();
    e->owner = KVD_POOL_NONE;
    stored();
    pool->ops.free(pool->ops.ctx, x, addr, pool->head->extent_bytes);
}

uint32_t kvd_pool_trim(struct kvd_pool *pool, uint32_t most)
{
    uint32_t n = 0;
    for (uint32_t x = pool->head->free_extent; x != KVD_POOL_NONE && n < most;
         x = pool->extent[x].next) {
        if (!pool->extent[x].addr)
            continue;
        drop_memory(pool, x);
        n++;
    }
    return n;
}

bool kvd_pool_trim_idle(struct kvd_pool *pool, uint64_t now, uint64_t idle)
{
    uint32_t oldest = KVD_POOL_NONE;
    for (uint32_t x = pool->head->free_extent; x != KVD_POOL_NONE; x = pool->extent[x].next) {
        struct region_extent *e = &pool->extent[x];
        if (!e->addr)
            continue;
        if (!e->idle_since)
            e->idle_since = now;
        if (now - e->idle_since >= idle &&
            (oldest == KVD_POOL_NONE || e->idle_since < pool->extent[oldest].idle_since))
            oldest = x;
    }
    if (oldest == KVD_POOL_NONE)
        return false;
    drop_memory(pool, oldest);
    return true;
}

static void extent_return(struct kvd_pool *pool, uint32_t x)
{
    struct region_extent *e = &pool->extent[x];
    struct region_slab *s = &pool->slab[e->slab];
    if (x + 1 == pool->shut)
        pool->shut = 0;
    else
        partial_remove(pool, s, x);
    uint32_t slab = e->slab;
    s->extents--;
    pool->head->extents_granted--;
    e->slab = KVD_POOL_NONE;
    stored();
    slab_drop_empty(pool, slab);
    e->idle_since = 0;
    e->next = pool->head->free_extent;
    pool->head->free_extent = x;
}

void extent_shut(struct kvd_pool *pool, uint32_t x)
{
    struct region_slab *s = &pool->slab[pool->extent[x].slab];
    if (pool->extent[x].used < s->slots)
        partial_remove(pool, s, x);
    pool->shut = x + 1;
}

void extent_open(struct kvd_pool *pool)
{
    if (!pool->shut)
        return;
    uint32_t x = pool->shut - 1;
    struct region_slab *s = &pool->slab[pool->extent[x].slab];
    pool->shut = 0;
    if (pool->extent[x].used < s->slots)
        partial_add(pool, s, x);
}

// Pages that a slab can give.
static uint64_t slab_free(const struct kvd_pool *pool, uint32_t slab)
{
    const struct region_slab *s = &pool->slab[slab];
    const struct region_extent *shut = pool->shut ? &pool->extent[pool->shut - 1] : NULL;
    return (uint64_t)s->extents * s->slots - s->used -
           (shut && shut->slab == slab ? s->slots - shut->used : 0);
}

int slab_provide(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane, uint32_t kind,
                 uint32_t pages, const uint32_t parts[KVD_POOL_PARTS])
{
    uint32_t x = slab_make(pool, ns, layout, plane, kind);
    const struct region_slab *s = &pool->slab[x];
    uint32_t n = pages + parts_lack(s, parts);
    while (slab_free(pool, x) < n) {
        int rc = extent_grant(pool, x, false);
        // The device has no more, or no descriptor is left for it, but the pool may hold some idle.
        if ((rc == KVD_E_FULL || rc == KVD_E_LIMIT) && extent_grant(pool, x, true) == KVD_OK)
            rc = KVD_OK;
        if (rc) {
            slab_drop_empty(pool, x);
            return rc;
        }
    }
    return KVD_OK;
}

void slab_settle(struct kvd_pool *pool, uint32_t slab)
{
    for (uint32_t x = pool->slab[slab].partial, next; x != KVD_POOL_NONE; x = next) {
        next = pool->extent[x].next;
        if (pool->extent[x].used == 0)
            extent_return(pool, x);
    }
}

// Takes a page that is free as a whole. Returns its first number.
static uint32_t slot_take(struct kvd_pool *pool, struct region_slab *s)
{
    uint32_t x = s->partial, stride = slab_stride(s);
    struct region_extent *e = &pool->extent[x];
    uint32_t slot = e->free_slot;
    uint32_t first = x * pool->head->slots;
    if (slot != KVD_POOL_NONE)
        e->free_slot = pool->page[first + slot * stride].next;
    else
        slot = e->carved++;
    if (++e->used == s->slots)
        partial_remove(pool, s, x);
    s->used++;
    return first + slot * stride;
}

static void slot_give(struct kvd_pool *pool, struct region_slab *s, uint32_t page)
{
    uint32_t x = page / pool->head->slots, stride = slab_stride(s);
    struct region_extent *e = &pool->extent[x];
    uint32_t slot = page % pool->head->slots / stride;
    if (e->used-- == s->slots && x + 1 != pool->shut)
        partial_add(pool, s, x);
    pool->page[x * pool->head->slots + slot * stride].next = e->free_slot;
    e->free_slot = slot;
    s->used--;
    if (e->used == 0)
        extent_return(pool, x);
}

uint32_t page_take(struct kvd_pool *pool, uint32_t slab, uint32_t order)
{
    struct region_slab *s = &pool->slab[slab];
    uint32_t page = order ? part_take(pool, s, order) : KVD_POOL_NONE;
    if (page == KVD_POOL_NONE) {
        page = slot_take(pool, s);
        page = order ? part_cut(pool, s, page, order) : page + (s->row_bytes != 0);
    }
    pool->page[page].refs = 1;
    pool->sum[page] = KVD_SUM_NONE; // of what was there before
    stored();
    uint64_t bytes = s->page_bytes >> order;
    pool->head->used += bytes;
    pool->ns[s->ns].used += bytes;
    pool->ns[s->ns].pages++;
    return page;
}

void kvd_pool_page_unref(struct kvd_pool *pool, uint32_t page)
{
    if (--pool->page[page].refs) {
        page_left(pool, page);
        return;
    }
    struct region_slab *s = &pool->slab[page_extent(pool, page)->slab];
    uint64_t bytes = page_size(pool, page);
    pool->head->damaged -= pool->sum[page] == KVD_SUM_DAMAGED;
    pool->head->used -= bytes;
    pool->ns[s->ns].used -= bytes;
    pool->ns[s->ns].pages--;
    if (!s->row_bytes || part_give(pool, s, page))
        slot_give(pool, s, page);
}

uint64_t kvd_pool_page_addr(const struct kvd_pool *pool, uint32_t page)
{
    const struct region_extent *e = page_extent(pool, page);
    const struct region_slab *s = &pool->slab[e->slab];
    uint64_t at = page % pool->head->slots / slab_stride(s) * s->page_bytes;
    return e->addr + at + (s->row_bytes ? (uint64_t)part_row(page) * s->row_bytes : 0);
}

// An extent is looked up where pages of another one begin: those of a sequence follow each other.
void page_addresses(const struct kvd_pool *pool, const uint32_t *pages, uint32_t n, uint64_t *out)
{
    const uint32_t slots = pool->head->slots;
    for (uint32_t i = 0; i < n;) {
        if (pages[i] == KVD_POOL_NONE) {
            out[i++] = 0;
            continue;
        }
        const struct region_extent *e = page_extent(pool, pages[i]);
        const struct region_slab *s = &pool->slab[e->slab];
        if (s->row_bytes) { // parts of pages, which are few
            out[i] = kvd_pool_page_addr(pool, pages[i]);
            i++;
            continue;
        }
        const uint32_t first = pages[i] / slots * slots;
        const uint64_t addr = e->addr, bytes = s->page_bytes;
        for (; i < n && pages[i] - first < slots; i++)
            out[i] = addr + (pages[i] - first) * bytes;
    }
}

uint32_t kvd_pool_page_rows(const struct kvd_pool *pool, uint32_t page)
{
    return KVD_PAGE_TOKENS >> page_order(pool, page);
}
