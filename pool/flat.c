// Pages: blocks under keys that are not chained. Read blocks.h first.
#include "pool/blocks_internal.h"

#include <errno.h>

static struct kvd_prefix *index_of(const struct kvd_pool *pool, uint32_t ns)
{
    return pool->kept[ns]->ix;
}

// Whether a block has its page in every plane.
static bool is_whole(const struct kvd_pool *pool, const struct kept *k, uint32_t layout,
                     uint32_t value)
{
    bool whole = true;
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++)
        whole &= kept_page(pool, k, layout, value, p) != KVD_POOL_NONE;
    return whole;
}

void kvd_blocks_find_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space, bool use,
                           const struct kvd_prefix_key *keys, uint32_t n, uint32_t *entries)
{
    struct kept *k = pool->kept ? pool->kept[space->ns] : NULL;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    for (uint32_t i = 0; i < n; i++) {
        struct kvd_prefix_entry_info e;
        entries[i] = domain == KVD_PREFIX_NONE ? domain : kvd_prefix_entry(k->ix, domain, &keys[i]);
        if (entries[i] == KVD_PREFIX_NONE)
            continue;
        kvd_prefix_get(k->ix, entries[i], &e);
        if (!is_whole(pool, k, space->layout, e.value))
            entries[i] = KVD_PREFIX_NONE;
    }
    if (use && domain != KVD_PREFIX_NONE)
        kvd_prefix_use(k->ix, entries, n);
}

void kvd_blocks_page_planes(const struct kvd_pool *pool, const struct kvd_blocks_space *space,
                            const struct kvd_prefix_key *keys, uint32_t n, uint8_t *planes)
{
    const struct kept *k = pool->kept ? pool->kept[space->ns] : NULL;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    memset(planes, 0, n);
    for (uint32_t i = 0; i < n && domain != KVD_PREFIX_NONE; i++) {
        struct kvd_prefix_entry_info e;
        uint32_t entry = kvd_prefix_entry(k->ix, domain, &keys[i]);
        if (entry == KVD_PREFIX_NONE)
            continue;
        kvd_prefix_get(k->ix, entry, &e);
        for (uint32_t p = 0; p < pool->layout[space->layout].l.n_planes; p++)
            if (kept_page(pool, k, space->layout, e.value, p) != KVD_POOL_NONE)
                planes[i] |= (uint8_t)(1u << p);
    }
}

int kvd_blocks_hold_pages(struct kvd_pool *pool, uint32_t ns, uint32_t *entries, uint32_t n,
                          uint32_t single, uint32_t *held, struct kvd_error *err)
{
    struct kvd_prefix *ix = index_of(pool, ns);
    uint32_t at = 0;
    for (uint32_t i = 0; i < n; i++) {
        struct kvd_prefix_entry_info next = {.parent = KVD_PREFIX_NONE};
        if (i + 1 < n)
            kvd_prefix_get(ix, entries[i + 1], &next);
        if (i + single < n && next.parent == entries[i]) // which keeps this one
            continue;
        int rc = kvd_prefix_hold(ix, entries[i], err);
        if (rc) {
            kvd_blocks_release_pages(pool, ns, entries, at);
            return rc;
        }
        entries[at++] = entries[i];
    }
    *held = at;
    return KVD_OK;
}

void kvd_blocks_release_pages(struct kvd_pool *pool, uint32_t ns, const uint32_t *entries,
                              uint32_t held)
{
    const struct kept *k = pool->kept[ns];
    bool over = false;
    for (uint32_t i = 0; i < held; i++) {
        struct kvd_prefix_entry_info e;
        kvd_prefix_release(k->ix, entries[i]);
        over |= kept_superseded(k, entries[i]) && kvd_prefix_get(k->ix, entries[i], &e) && !e.holds;
    }
    if (over && pool->on_superseded)
        pool->on_superseded(pool->on_evict_ctx);
}

uint32_t kvd_blocks_classify_pages(struct kvd_pool *pool, uint32_t ns, const uint32_t *entries,
                                   uint32_t n, enum kvd_prefix_class class)
{
    return pool->kept && pool->kept[ns]
               ? kvd_prefix_classify_entries(index_of(pool, ns), entries, n, class)
               : 0;
}

// A sequence whose history, in every plane, is the pages of the entries.
static int make_sequence(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                         const uint32_t *entries, uint32_t n, uint64_t *seq, struct kvd_error *err)
{
    const struct kept *k = pool->kept[space->ns];
    const struct kvd_layout *l = &pool->layout[space->layout].l;
    struct region_seq *s;
    uint32_t tables = l->n_planes * ((uint32_t)kvd_div_up(n, KVD_TABLE_ENTRIES) + 1);
    int rc = share_take(pool, space->ns, SHARE_BLOCKS, tables, err);
    if (rc == KVD_OK)
        rc = seq_prepare(pool, space->ns, space->layout, &s, err);
    if (rc)
        return rc;
    for (uint32_t p = 0; p < l->n_planes; p++) {
        struct region_table *t = &s->table[p][KVD_POOL_CODEC];
        table_start(t, 0);
        for (uint32_t i = 0; i < n; i++) {
            struct kvd_prefix_entry_info e;
            kvd_prefix_get(k->ix, entries[i], &e);
            uint32_t page = kept_page(pool, k, space->layout, e.value, p);
            page_ref(pool, page);
            table_set(pool, t, i, page);
        }
        s->reach[p].hist_end = (uint64_t)n * KVD_PAGE_TOKENS;
    }
    seq_set_length(pool, s, (uint64_t)n * KVD_PAGE_TOKENS);
    seq_appear(pool, s);
    *seq = seq_id(pool, s);
    return KVD_OK;
}

int kvd_blocks_adopt_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                           const uint32_t *entries, uint32_t n, uint64_t *seq,
                           struct kvd_error *err)
{
    struct kvd_prefix *ix = index_of(pool, space->ns);
    uint32_t held = 0;
    int rc = KVD_OK;
    while (held < n && rc == KVD_OK) // room is made by eviction, and not of these
        if ((rc = kvd_prefix_hold(ix, entries[held], err)) == KVD_OK)
            held++;
    if (rc == KVD_OK)
        rc = make_sequence(pool, space, entries, n, seq, err);
    kvd_blocks_release_pages(pool, space->ns, entries, held);
    return rc;
}

// -- publishing ---------------------------------------------------------------------------------

static int check(const struct kvd_pool *pool, const struct kvd_blocks_space *space, uint64_t seq,
                 uint32_t n, struct kvd_error *err)
{
    const struct region_seq *s = NULL;
    int rc = blocks_seq(pool, space, seq, &s, err);
    if (rc)
        return rc;
    const struct kvd_layout *l = layout_of(pool, s);
    for (uint32_t p = 0; p < l->n_planes; p++) {
        if (l->planes[p].sink || l->planes[p].window)
            return kvd_fail(err, KVD_E_UNSUPPORTED,
                            "a sink of %u tokens and a window of %u: pages want layouts that have "
                            "neither",
                            l->planes[p].sink, l->planes[p].window);
        if (s->reach[p].hist_end / KVD_PAGE_TOKENS < n)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "%u pages of a sequence with a history of %llu tokens", n,
                            (unsigned long long)s->reach[p].hist_end);
    }
    return KVD_OK;
}

// Adds page i of the sequence behind `parent` if it is not there; an entry that is there without
// its pages gets them. Returns its entry, and KVD_PREFIX_NONE where the index is full.
static uint32_t add(struct kvd_pool *pool, struct kept *k, const struct region_seq *s,
                    uint32_t domain, uint32_t parent, const struct kvd_prefix_key *key, uint32_t i,
                    uint32_t *stored)
{
    uint32_t entry = kvd_prefix_entry(k->ix, domain, key), none = KVD_POOL_NONE, done;
    uint32_t page[KVD_MAX_PLANES];
    if (entry == KVD_PREFIX_NONE) {
        if (kvd_prefix_insert(k->ix, domain, parent, key, &none, 1, &entry, &done, NULL))
            return KVD_PREFIX_NONE;
        ++*stored;
    }
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        page[p] = table_get(pool, &s->table[p][KVD_POOL_CODEC], i);
    kept_add(pool, k, s->layout, entry, page);
    return entry;
}

int kvd_blocks_publish_pages(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                             uint64_t seq, uint32_t from, const struct kvd_prefix_key *keys,
                             uint32_t n, const struct kvd_prefix_key *after, uint32_t *stored,
                             struct kvd_error *err)
{
    struct kept *k;
    struct kvd_prefix_info info;
    uint32_t domain, parent = KVD_PREFIX_NONE;
    *stored = 0;
    int rc = check(pool, space, seq, from + n, err);
    if (rc == KVD_OK)
        rc = kept_open(pool, space->ns, &k, err);
    if (rc == KVD_OK)
        rc = blocks_domain(pool, k, space, &domain, err);
    if (rc)
        return rc;
    // All that has to go goes now: an entry that is known below stays.
    kvd_prefix_info(k->ix, &info);
    if (n > info.capacity - info.entries)
        blocks_evict_many(pool, space->ns, n - (info.capacity - info.entries),
                          KVD_PREFIX_EVICTED_INDEX);
    if (after)
        parent = kvd_prefix_entry(k->ix, domain, after);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t entry =
            add(pool, k, seq_find(pool, seq), domain, parent, &keys[i], from + i, stored);
        if (entry == KVD_PREFIX_NONE)
            break;
        parent = entry;
    }
    kvd_prefix_domain_release(k->ix, domain);
    return KVD_OK;
}
