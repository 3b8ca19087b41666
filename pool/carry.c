// Blocks on their way to other places, and back. Read blocks.h first.
#include "pool/blocks_internal.h"

enum { EVICT_FOR_ENTRIES = 64 };

// -- away ---------------------------------------------------------------------------------------

// Those that an earlier process left are new: nobody knows what it had carried.
void kvd_blocks_note_new(struct kvd_pool *pool)
{
    struct kvd_prefix_info info;
    struct kvd_prefix_entry_info e;
    pool->notes_new = true;
    for (uint32_t ns = 0; pool->kept && ns < pool->head->n_namespaces; ns++) {
        if (!pool->kept[ns])
            continue;
        kvd_prefix_info(pool->kept[ns]->ix, &info);
        for (uint32_t i = 0; i < info.ever; i++)
            if (kvd_prefix_get(pool->kept[ns]->ix, i, &e) && e.value != KVD_POOL_NONE)
                kept_note_new(pool->kept[ns], i);
    }
}

uint32_t kvd_blocks_new(const struct kvd_pool *pool, uint32_t after, uint32_t *ns)
{
    uint32_t all = 0, n = pool->head->n_namespaces;
    *ns = KVD_POOL_NONE;
    for (uint32_t i = 1; pool->kept && i <= n; i++) {
        uint32_t at = (uint32_t)(((uint64_t)after + i) % n);
        const struct kept *k = pool->kept[at];
        if (!k || !k->n_new)
            continue;
        all += k->n_new;
        if (*ns == KVD_POOL_NONE)
            *ns = at;
    }
    return all;
}

static void fill(const struct kvd_pool *pool, uint32_t p, uint32_t page,
                 struct kvd_blocks_load *out)
{
    out->plane[p] = (struct kvd_blocks_page){
        .page = page,
        .addr = kvd_pool_page_addr(pool, page),
        .bytes = pool->slab[page_extent(pool, page)->slab].page_bytes,
        .extent = (uint32_t)(page_extent(pool, page) - pool->extent),
        .sum = pool->sum[page],
    };
}

static void load_init(struct kvd_blocks_load *load, const struct kvd_blocks_space *space,
                      const struct kvd_prefix_key *key)
{
    *load = (struct kvd_blocks_load){.space = *space, .key = *key};
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        load->plane[p].page = KVD_POOL_NONE;
}

bool kvd_blocks_pick_up(struct kvd_pool *pool, uint32_t ns, struct kvd_blocks_load *out)
{
    struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    while (k && k->n_new) {
        struct kvd_prefix_entry_info e;
        struct kvd_blocks_space space;
        uint32_t entry = k->new_first - 1;
        k->new_first = k->new_next[entry];
        k->new_next[entry] = 0;
        k->n_new--;
        if (!kvd_prefix_get(k->ix, entry, &e) || e.value == KVD_POOL_NONE ||
            !kvd_blocks_space_at(pool, ns, e.domain, &space))
            continue;
        load_init(out, &space, &e.key);
        for (uint32_t p = 0; p < pool->layout[space.layout].l.n_planes; p++) {
            uint32_t page = kept_page(pool, k, space.layout, e.value, p);
            if (page == KVD_POOL_NONE || pool->sum[page] == KVD_SUM_DAMAGED)
                continue;
            page_ref(pool, page);
            fill(pool, p, page, out);
        }
        kvd_pool_layout_ref(pool, space.layout);
        out->picked_up = true;
        pool->taken_up++;
        return true;
    }
    return false;
}

void kvd_blocks_new_again(struct kvd_pool *pool, const struct kvd_blocks_load *load)
{
    struct kept *k = pool->kept ? pool->kept[load->space.ns] : NULL;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, load->space.domain) : KVD_PREFIX_NONE;
    uint32_t entry =
        domain == KVD_PREFIX_NONE ? domain : kvd_prefix_entry(k->ix, domain, &load->key);
    if (entry != KVD_PREFIX_NONE)
        kept_note_new(k, entry);
}

void kvd_blocks_put_down(struct kvd_pool *pool, struct kvd_blocks_load *load)
{
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        if (load->plane[p].page != KVD_POOL_NONE)
            kvd_pool_page_unref(pool, load->plane[p].page);
    pool->taken_up -= load->picked_up;
    kvd_pool_layout_unref(pool, load->space.layout);
    namespace_settle(pool, load->space.ns);
}

// -- back ---------------------------------------------------------------------------------------

uint32_t kvd_blocks_planes(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const struct kvd_prefix_key *keys, uint32_t n, uint8_t *planes)
{
    const struct kept *k = pool->kept ? pool->kept[space->ns] : NULL;
    struct blocks_room *room = k ? blocks_room(pool, NULL) : NULL;
    uint32_t domain = room ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    struct kvd_prefix_query q = {.domain = domain, .n = n, .keys = keys};
    memset(planes, 0, n);
    if (domain == KVD_PREFIX_NONE)
        return 0;
    kvd_prefix_peek(k->ix, &q, 1);
    blocks_path(k, q.entry, q.found, room->path);
    for (uint32_t i = 0; i < q.found; i++) {
        struct kvd_prefix_entry_info e;
        kvd_prefix_get(k->ix, room->path[i], &e);
        for (uint32_t p = 0; p < pool->layout[space->layout].l.n_planes; p++)
            if (kept_page(pool, k, space->layout, e.value, p) != KVD_POOL_NONE)
                planes[i] |= (uint8_t)(1u << p);
    }
    return q.found;
}

enum kvd_pool_kind kvd_blocks_kind(const struct kvd_layout *l, uint32_t plane, uint32_t block)
{
    return block < l->planes[plane].sink / KVD_PAGE_TOKENS ? KVD_POOL_BF16 : KVD_POOL_CODEC;
}

int kvd_blocks_new_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                         const struct kvd_prefix_key *key, uint32_t block, uint8_t planes,
                         struct kvd_blocks_load *out, struct kvd_error *err)
{
    const struct kvd_layout *l = &pool->layout[space->layout].l;
    int rc = KVD_OK;
    load_init(out, space, key);
    kvd_pool_layout_ref(pool, space->layout);
    for (uint32_t p = 0; p < l->n_planes && rc == KVD_OK; p++) {
        uint32_t page;
        if (!(planes & 1u << p))
            continue;
        rc = kvd_pool_page_alloc(pool, space->ns, space->layout, p, kvd_blocks_kind(l, p, block),
                                 &page, err);
        if (rc == KVD_OK)
            fill(pool, p, page, out);
    }
    if (rc)
        kvd_blocks_put_down(pool, out);
    return rc;
}

int kvd_blocks_behind(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                      const struct kvd_prefix_key *keys, uint32_t n, struct kvd_blocks_at *at,
                      struct kvd_error *err)
{
    const struct kept *k = pool->kept ? pool->kept[space->ns] : NULL;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    struct kvd_prefix_query q = {.domain = domain, .n = n, .keys = keys};
    *at = (struct kvd_blocks_at){.ns = space->ns, .layout = space->layout};
    if (!n)
        return KVD_OK;
    if (domain != KVD_PREFIX_NONE)
        kvd_prefix_peek(k->ix, &q, 1);
    if (q.found < n)
        return kvd_fail(err, KVD_E_NOT_FOUND, "%u blocks of %u are there", q.found, n);
    at->blocks = at->depth = n;
    at->entry = q.entry;
    return kvd_blocks_hold(pool, at, err);
}

// The entry of a block behind `parent`, made if it is not there.
static int take_entry(struct kvd_pool *pool, const struct kvd_blocks_load *load, uint32_t domain,
                      uint32_t parent, uint32_t *entry, struct kvd_error *err)
{
    const uint32_t none = KVD_POOL_NONE;
    struct kept *k = pool->kept[load->space.ns];
    uint32_t done;
    int rc = kvd_prefix_insert(k->ix, domain, parent, &load->key, &none, 1, entry, &done, err);
    if (rc == KVD_E_FULL &&
        blocks_evict_many(pool, load->space.ns, EVICT_FOR_ENTRIES, KVD_PREFIX_EVICTED_INDEX))
        rc = kvd_prefix_insert(k->ix, domain, parent, &load->key, &none, 1, entry, &done, err);
    if (rc == KVD_E_FULL)
        rc = kvd_fail(err, KVD_E_LIMIT, "the prefix index is full of blocks in use");
    return rc;
}

// Makes the entry of a block behind `parent`, which is held, and holds it; its domain too stays.
static int hold_entry(struct kvd_pool *pool, const struct kvd_blocks_load *load, uint32_t domain,
                      uint32_t parent, uint32_t *entry, struct kvd_error *err)
{
    int rc = take_entry(pool, load, domain, parent, entry, err);
    return rc ? rc : kvd_prefix_hold(pool->kept[load->space.ns]->ix, *entry, err);
}

// The block has its pages, and is put down.
static void give_pages(struct kvd_pool *pool, struct kvd_blocks_load *load, uint32_t entry)
{
    uint32_t page[KVD_MAX_PLANES];
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        page[p] = load->plane[p].page;
    kept_refer(pool, pool->kept[load->space.ns], load->space.layout, entry, page);
    kvd_blocks_put_down(pool, load);
}

int kvd_blocks_bring_back_page(struct kvd_pool *pool, struct kvd_blocks_load *load,
                               const struct kvd_prefix_key *after, uint32_t *entry,
                               struct kvd_error *err)
{
    uint32_t domain, parent = KVD_PREFIX_NONE;
    struct kept *k;
    int rc = kept_open(pool, load->space.ns, &k, err);
    if (rc == KVD_OK)
        rc = blocks_domain(pool, k, &load->space, &domain, err);
    if (rc)
        return rc;
    *entry = kvd_prefix_entry(k->ix, domain, &load->key);
    if (*entry != KVD_PREFIX_NONE) { // wherever it is
        rc = kvd_prefix_hold(k->ix, *entry, err);
    } else {
        if (after)
            parent = kvd_prefix_entry(k->ix, domain, after);
        if (parent != KVD_PREFIX_NONE && kvd_prefix_hold(k->ix, parent, NULL))
            parent = KVD_PREFIX_NONE;
        rc = hold_entry(pool, load, domain, parent, entry, err);
        if (parent != KVD_PREFIX_NONE)
            kvd_prefix_release(k->ix, parent);
    }
    kvd_prefix_domain_release(k->ix, domain);
    if (rc == KVD_OK)
        give_pages(pool, load, *entry);
    return rc;
}

int kvd_blocks_bring_back(struct kvd_pool *pool, struct kvd_blocks_load *load,
                          struct kvd_blocks_at *at, struct kvd_error *err)
{
    const struct kvd_blocks_space *space = &load->space;
    uint32_t domain, entry;
    struct kept *k;
    int rc = kept_open(pool, space->ns, &k, err);
    if (rc == KVD_OK)
        rc = blocks_domain(pool, k, space, &domain, err);
    if (rc)
        return rc;
    rc = hold_entry(pool, load, domain, at->blocks ? at->entry : KVD_PREFIX_NONE, &entry, err);
    kvd_prefix_domain_release(k->ix, domain);
    if (rc)
        return rc;
    if (at->blocks)
        kvd_blocks_release(pool, at);
    *at = (struct kvd_blocks_at){.ns = space->ns,
                                 .layout = space->layout,
                                 .blocks = at->blocks + 1,
                                 .entry = entry,
                                 .depth = at->blocks + 1};
    give_pages(pool, load, entry);
    return KVD_OK;
}
