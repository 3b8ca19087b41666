// Who may have how much of the pool's tables.
//
// A namespace may have as many sequences, page-table blocks and layouts as are left free by all:
// alone it gets half of a table, and whoever comes next always finds room. Above that something has
// to go first, if it is evictable, of the namespace that has most: so nobody with less loses
// anything to one with more.
#include "pool/internal.h"

static uint64_t share_of(const struct kvd_pool *pool, uint32_t ns, enum share share)
{
    return share == SHARE_SEQUENCES ? pool->ns[ns].sequences : pool->ns[ns].blocks;
}

static uint64_t left_of(const struct kvd_pool *pool, enum share share)
{
    const struct region_head *h = pool->head;
    return share == SHARE_SEQUENCES ? h->max_sequences - h->sequences : h->max_blocks - h->blocks;
}

// Evicts one sequence of the namespace with the most, if that is `ns` or has more than it.
static bool evict_from_most(struct kvd_pool *pool, uint32_t ns, enum share share)
{
    uint32_t most = KVD_POOL_NONE;
    uint64_t n = share_of(pool, ns, share);
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++) {
        uint64_t has = share_of(pool, i, share);
        if (has < n || (has == n && i != ns) || evictable_of(pool, i) == KVD_POOL_NONE)
            continue;
        most = i;
        n = has;
    }
    if (most == KVD_POOL_NONE)
        return false;
    evict(pool, &pool->seq[evictable_of(pool, most)]);
    return true;
}

int share_take(struct kvd_pool *pool, uint32_t ns, enum share share, uint32_t n,
               struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    while (share_of(pool, ns, share) + 2 * (uint64_t)(n - 1) >= left_of(pool, share)) {
        if (evict_from_most(pool, ns, share))
            continue;
        if (share == SHARE_BLOCKS)
            return kvd_fail(err, KVD_E_LIMIT,
                            "namespace %s has %llu blocks of page tables, and %llu of %u are left: "
                            "one may have as many as are left; free sequences",
                            pool->ns[ns].name, (unsigned long long)pool->ns[ns].blocks,
                            (unsigned long long)left_of(pool, share), h->max_blocks);
        return kvd_fail(err, KVD_E_LIMIT,
                        "namespace %s has %llu sequences, and %llu of %u are left: one may have as "
                        "many as are left; free some or raise max-sequences",
                        pool->ns[ns].name, (unsigned long long)pool->ns[ns].sequences,
                        (unsigned long long)left_of(pool, share), h->max_sequences);
    }
    return KVD_OK;
}

// -- namespaces ---------------------------------------------------------------------------------

bool kvd_pool_namespace_idle(const struct kvd_pool *pool, uint32_t ns, uint64_t *used)
{
    const struct region_namespace *n = &pool->ns[ns];
    uint64_t evictable = 0;
    *used = 0;
    if (!n->name[0] || n->holders || n->kept || n->quota)
        return false;
    for (uint32_t i = n->lru_first; i != KVD_POOL_NONE; i = pool->seq[i].lru_next) {
        evictable += pool->seq[i].pins == 0;
        *used = pool->seq[i].lru_stamp;
    }
    return evictable == n->sequences;
}

// The one that is longest out of use; KVD_POOL_NONE: none is idle.
static uint32_t idlest_namespace(const struct kvd_pool *pool)
{
    uint32_t idlest = KVD_POOL_NONE;
    uint64_t oldest = UINT64_MAX, used = 0;
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++) {
        if (!kvd_pool_namespace_idle(pool, i, &used) || used >= oldest)
            continue;
        idlest = i;
        oldest = used;
    }
    return idlest;
}

// An entry of the table that is nobody's, used before or not. KVD_POOL_NONE: there is none.
static uint32_t free_namespace(const struct kvd_pool *pool)
{
    const struct region_head *h = pool->head;
    for (uint32_t i = 0; i < h->n_namespaces; i++)
        if (!pool->ns[i].name[0])
            return i;
    return h->n_namespaces < h->max_namespaces ? h->n_namespaces : KVD_POOL_NONE;
}

uint32_t namespace_slot(struct kvd_pool *pool)
{
    struct region_head *h = pool->head;
    struct kvd_pool_clearing c = {.index = free_namespace(pool)};
    if (c.index == KVD_POOL_NONE) {
        c.index = idlest_namespace(pool);
        if (c.index != KVD_POOL_NONE)
            kvd_pool_clear(pool, &c, UINT32_MAX);
    } else if (c.index == h->n_namespaces) {
        h->n_namespaces++;
    }
    return c.index;
}

bool kvd_pool_namespace_clears(const struct kvd_pool *pool, uint32_t n, struct kvd_pool_clearing *c)
{
    const struct region_head *h = pool->head;
    uint32_t room = h->max_namespaces - h->n_namespaces;
    for (uint32_t i = 0; i < h->n_namespaces; i++)
        room += !pool->ns[i].name[0];
    if (room >= n)
        return false;
    *c = (struct kvd_pool_clearing){.index = idlest_namespace(pool)};
    return c->index != KVD_POOL_NONE;
}

// -- layouts ---------------------------------------------------------------------------------

uint32_t kvd_pool_layout_refs(const struct kvd_pool *pool, uint32_t layout)
{
    const struct region_layout *l = &pool->layout[layout];
    return l->holders + l->sequences + (l->kept != 0);
}

static uint32_t layouts_of(const struct kvd_pool *pool, uint32_t ns)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < pool->head->n_layouts; i++)
        n += kvd_pool_layout_refs(pool, i) && pool->layout[i].ns == ns;
    return n;
}

// Only evictable sequences and blocks refer to it.
static bool is_idle(const struct kvd_pool *pool, uint32_t layout)
{
    const struct region_layout *l = &pool->layout[layout];
    return !l->holders && (l->sequences || l->kept) && l->sequences == l->idle;
}

bool kvd_pool_layout_idle(const struct kvd_pool *pool, uint32_t layout, uint64_t *used)
{
    *used = pool->layout[layout].used;
    return is_idle(pool, layout);
}

// A layout to which only evictable sequences refer, of the namespace with most, if that is `ns`
// or has more; the least recently used of them.
static uint32_t idle_layout(const struct kvd_pool *pool, uint32_t ns)
{
    uint32_t best = KVD_POOL_NONE, mine = ns == KVD_POOL_NONE ? 0 : layouts_of(pool, ns), n = mine;
    for (uint32_t i = 0; i < pool->head->n_layouts; i++) {
        const struct region_layout *g = &pool->layout[i];
        uint32_t has = g->ns == KVD_POOL_NONE ? UINT32_MAX : layouts_of(pool, g->ns);
        if (!is_idle(pool, i) || has < n || (has == mine && g->ns != ns))
            continue;
        if (best != KVD_POOL_NONE && has == n && g->used > pool->layout[best].used)
            continue;
        best = i;
        n = has;
    }
    return best;
}

// Whether the namespace may have one more, as there are.
static bool layout_fits(const struct kvd_pool *pool, uint32_t ns)
{
    const struct region_head *h = pool->head;
    uint32_t in_use = 0;
    for (uint32_t i = 0; i < h->n_layouts; i++)
        in_use += kvd_pool_layout_refs(pool, i) != 0;
    return (ns == KVD_POOL_NONE ? 0 : layouts_of(pool, ns)) < h->max_layouts - in_use;
}

bool layout_room(struct kvd_pool *pool, uint32_t ns)
{
    while (!layout_fits(pool, ns)) {
        struct kvd_pool_clearing c = {.layout = true, .index = idle_layout(pool, ns)};
        if (c.index == KVD_POOL_NONE)
            return false;
        kvd_pool_clear(pool, &c, UINT32_MAX);
        if (kvd_pool_layout_refs(pool, c.index))
            return false; // a call is using one of them
    }
    return true;
}

bool kvd_pool_layout_clears(const struct kvd_pool *pool, uint32_t ns, struct kvd_pool_clearing *c)
{
    if (layout_fits(pool, ns))
        return false;
    *c = (struct kvd_pool_clearing){.layout = true, .index = idle_layout(pool, ns)};
    return c->index != KVD_POOL_NONE;
}

uint32_t layout_slot(struct kvd_pool *pool, bool *recycled)
{
    struct region_head *h = pool->head;
    uint32_t slot = 0;
    *recycled = h->n_layouts == h->max_layouts;
    if (!*recycled)
        return h->n_layouts++;
    while (kvd_pool_layout_refs(pool, slot))
        slot++;
    return slot;
}

// -- clearing -----------------------------------------------------------------------------------

// Whether it is still nobody's: a session may have opened it since.
static bool clears(const struct kvd_pool *pool, const struct kvd_pool_clearing *c)
{
    const struct region_namespace *n = &pool->ns[c->index];
    return c->layout ? is_idle(pool, c->index) : n->name[0] && !n->holders && !n->kept && !n->quota;
}

// Its sequences first, and then its blocks, which other namespaces' indices may have too.
bool kvd_pool_clear(struct kvd_pool *pool, struct kvd_pool_clearing *c, uint32_t n)
{
    const struct region_head *h = pool->head;
    for (; clears(pool, c) && c->at < h->n_sequences_ever; c->at++) {
        struct region_seq *s = &pool->seq[c->at];
        if (n-- == 0)
            return false;
        if (s->generation & 1 && s->listed && !s->pins &&
            (c->layout ? s->layout : s->ns) == c->index)
            evict(pool, s);
    }
    for (; clears(pool, c) && c->ns < h->n_namespaces; c->ns++) {
        if (!c->layout && c->ns != c->index)
            continue;
        if (!blocks_clear(pool, c, &n))
            return false;
        c->domain = 0;
        c->blocks = (struct kvd_prefix_cursor){0};
    }
    return true;
}
