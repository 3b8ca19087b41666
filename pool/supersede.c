// Exact pages that encoded ones take the place of. Read blocks.h first.
#include "pool/blocks_internal.h"

#include <time.h>

enum {
    LINK_STEPS = 8192, // of kvd_blocks_link_pages
    FIRST_STEPS = 4096,
};

static struct kept *kept_of(const struct kvd_pool *pool, uint32_t ns)
{
    return pool->kept ? pool->kept[ns] : NULL;
}

// The entry of a page whether or not it has its pages.
static uint32_t entry_of(const struct kept *k, const struct kvd_blocks_space *space,
                         const struct kvd_prefix_key *key)
{
    uint32_t domain = kvd_prefix_domain_find(k->ix, space->domain);
    return domain == KVD_PREFIX_NONE ? domain : kvd_prefix_entry(k->ix, domain, key);
}

// Of the chain's keys that have an entry: that, and what it is. Returns how many.
struct node {
    uint32_t entry, parent, children, on_chain; // on_chain: of its children
    bool again;                                 // the chain has named it before
};

static void look_at(const struct kvd_pool *pool, const struct kvd_blocks_chain *chain,
                    struct node nodes[KVD_MAX_CALL_PAGES])
{
    const struct kept *k = kept_of(pool, chain->space->ns);
    uint32_t domain = kvd_prefix_domain_find(k->ix, chain->space->domain), n = 0;
    uint16_t there[KVD_MAX_CALL_PAGES];
    for (uint32_t i = 0; i < chain->n; i++) {
        struct kvd_prefix_entry_info e;
        nodes[i] = (struct node){.entry = KVD_PREFIX_NONE};
        if (domain != KVD_PREFIX_NONE)
            nodes[i].entry = kvd_prefix_entry(k->ix, domain, &chain->keys[i]);
        if (nodes[i].entry == KVD_PREFIX_NONE)
            continue;
        kvd_prefix_get(k->ix, nodes[i].entry, &e);
        nodes[i].parent = e.parent;
        nodes[i].children = e.children;
        there[n++] = (uint16_t)i;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct node *child = &nodes[there[i]];
        for (uint32_t j = 0; j < i && !child->again; j++)
            child->again = nodes[there[j]].entry == child->entry;
        for (uint32_t j = 0; j < n && !child->again; j++)
            nodes[there[j]].on_chain += nodes[there[j]].entry == child->parent;
    }
}

void kvd_blocks_passed(const struct kvd_pool *pool, const struct kvd_blocks_chain *chain,
                       bool passed[KVD_MAX_CALL_PAGES])
{
    struct node nodes[KVD_MAX_CALL_PAGES];
    const struct kept *k = kept_of(pool, chain->space->ns);
    memset(passed, 0, chain->n * sizeof(*passed));
    if (!k)
        return;
    look_at(pool, chain, nodes);
    for (uint32_t i = 0; i + KVD_EXACT_TAIL_PAGES < chain->n; i++) {
        struct kvd_prefix_entry_info e;
        bool alone = nodes[i].entry != KVD_PREFIX_NONE && !nodes[i].again &&
                     !kept_superseded(k, nodes[i].entry);
        for (uint32_t near = i; near < i + KVD_EXACT_TAIL_PAGES && alone; near++)
            alone = nodes[near].children == nodes[near].on_chain;
        if (!alone)
            continue;
        kvd_prefix_get(k->ix, nodes[i].entry, &e);
        passed[i] = e.value != KVD_POOL_NONE;
    }
}

// Bytes of an entry's pages, which are free as soon as nobody reads them any more.
static uint64_t bytes_of(const struct kvd_pool *pool, const struct kept *k, uint32_t layout,
                         uint32_t value)
{
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++) {
        uint32_t page = kept_page(pool, k, layout, value, p);
        if (page != KVD_POOL_NONE)
            bytes += page_size(pool, page);
    }
    return bytes;
}

// Whatever came behind it meanwhile keeps the entry, without its pages.
static void leave(struct kvd_pool *pool, const struct kvd_blocks_space *space, uint32_t entry,
                  uint64_t *freed)
{
    struct kept *k = kept_of(pool, space->ns);
    struct kvd_prefix_entry_info e;
    kvd_prefix_get(k->ix, entry, &e);
    *freed += bytes_of(pool, k, space->layout, e.value);
    if (kvd_blocks_forget_pages(pool, space->ns, &entry, 1, KVD_PREFIX_SUPERSEDED))
        return;
    const struct kvd_prefix_removed r = {.key = e.key,
                                         .domain = e.domain,
                                         .entry = entry,
                                         .value = KVD_POOL_NONE,
                                         .digest = space->domain,
                                         .reason = KVD_PREFIX_SUPERSEDED};
    kvd_prefix_set(k->ix, entry, KVD_POOL_NONE);
    stored(); // before the pages are another's
    kept_drop(pool, k, space->layout, e.value);
    kept_supersede(k, entry, true);
    if (pool->on_block_gone)
        pool->on_block_gone(pool->on_evict_ctx, space->ns, space->layout, &r);
}

// What an entry is behind, and nothing before that. Where that is too far away, the entry itself.
static uint32_t first_of(const struct kept *k, uint32_t entry)
{
    struct kvd_prefix_entry_info e;
    uint32_t at = entry;
    for (uint32_t steps = 0; steps < FIRST_STEPS && kvd_prefix_get(k->ix, at, &e); steps++) {
        if (e.parent == KVD_PREFIX_NONE)
            return at;
        at = e.parent;
    }
    return entry;
}

bool kvd_blocks_first_page(const struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const struct kvd_prefix_key *key, struct kvd_prefix_key *first)
{
    const struct kept *k = kept_of(pool, space->ns);
    uint32_t entry = k ? entry_of(k, space, key) : KVD_PREFIX_NONE;
    struct kvd_prefix_entry_info e;
    if (entry == KVD_PREFIX_NONE)
        return false;
    kvd_prefix_get(k->ix, first_of(k, entry), &e);
    *first = e.key;
    return true;
}

bool kvd_blocks_supersede(struct kvd_pool *pool, const struct kvd_blocks_chain *chain, uint32_t i,
                          uint64_t *freed)
{
    struct kept *k = kept_of(pool, chain->space->ns);
    struct kvd_prefix_entry_info e, other;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, chain->space->domain) : KVD_PREFIX_NONE;
    uint32_t entry =
        domain == KVD_PREFIX_NONE ? domain : kvd_prefix_entry(k->ix, domain, &chain->keys[i]);
    *freed = 0;
    if (entry == KVD_PREFIX_NONE || !kvd_prefix_get(k->ix, entry, &e) || e.value == KVD_POOL_NONE)
        return false;
    for (uint32_t j = i + 1; j < i + chain->n && e.children; j++) { // the next is the likeliest
        uint32_t at = kvd_prefix_entry(k->ix, domain, &chain->keys[j % chain->n]);
        bool near = j < chain->n && j - i < KVD_EXACT_TAIL_PAGES;
        if (at == KVD_PREFIX_NONE || !kvd_prefix_get(k->ix, at, &other) || other.parent != entry)
            continue;
        kvd_prefix_move(k->ix, at, near ? e.parent : first_of(k, e.parent));
        e.children--;
    }
    if (e.holds) {
        kept_supersede(k, entry, true);
        return true;
    }
    leave(pool, chain->space, entry, freed);
    return false;
}

bool kvd_blocks_superseded(const struct kvd_pool *pool, uint32_t ns, uint32_t entry)
{
    return kept_superseded(kept_of(pool, ns), entry);
}

void kvd_blocks_revive(struct kvd_pool *pool, uint32_t ns, uint32_t entry)
{
    struct kept *k = kept_of(pool, ns);
    bool was = kept_superseded(k, entry);
    kept_supersede(k, entry, false);
    if (was && pool->on_superseded)
        pool->on_superseded(pool->on_evict_ctx);
}

bool kvd_blocks_end_superseded(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                               const struct kvd_prefix_key *key, bool instead, uint64_t *freed)
{
    struct kept *k = kept_of(pool, space->ns);
    struct kvd_prefix_entry_info e;
    uint32_t entry = k ? entry_of(k, space, key) : KVD_PREFIX_NONE;
    *freed = 0;
    if (entry == KVD_PREFIX_NONE || !kept_superseded(k, entry) ||
        !kvd_prefix_get(k->ix, entry, &e) || e.value == KVD_POOL_NONE)
        return true;
    if (!instead)
        kept_supersede(k, entry, false);
    else if (e.holds)
        return false;
    else
        leave(pool, space, entry, freed);
    return true;
}

// Whether what is before an entry, and before that, begins with another one. *steps is counted
// down.
static bool is_before(const struct kept *k, uint32_t other, uint32_t entry, uint32_t *steps)
{
    struct kvd_prefix_entry_info e;
    while (entry != KVD_PREFIX_NONE && entry != other && *steps &&
           kvd_prefix_get(k->ix, entry, &e)) {
        entry = e.parent;
        --*steps;
    }
    return entry != KVD_PREFIX_NONE;
}

void kvd_blocks_link_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const struct kvd_prefix_key *keys, uint32_t n)
{
    struct kept *k = kept_of(pool, space->ns);
    uint32_t before = KVD_PREFIX_NONE, steps = LINK_STEPS;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    for (uint32_t i = 0; i < n && domain != KVD_PREFIX_NONE; i++) {
        struct kvd_prefix_entry_info e;
        uint32_t entry = kvd_prefix_entry(k->ix, domain, &keys[i]);
        if (entry == KVD_PREFIX_NONE || !kvd_prefix_get(k->ix, entry, &e))
            continue;
        if (e.parent == KVD_PREFIX_NONE && before != KVD_PREFIX_NONE &&
            !is_before(k, entry, before, &steps))
            kvd_prefix_move(k->ix, entry, before);
        before = entry;
    }
}
