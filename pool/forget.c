// What goes of prefix indices, and in which order room is made.
#include "pool/blocks.h"
#include "pool/internal.h"

#include <time.h>

struct removal {
    struct kvd_pool *pool;
    uint32_t ns;
    uint64_t gone;
};

// An end goes with its last block.
static void removed(void *ctx, const struct kvd_prefix_removed *r)
{
    struct removal *m = ctx;
    struct kvd_pool *pool = m->pool;
    m->gone++;
    struct kept *k = pool->kept[m->ns];
    uint32_t end = k->end[r->entry];
    k->end[r->entry] = 0;
    bool told = kept_superseded(k, r->entry) && r->value == KVD_POOL_NONE; // when its page went
    kept_supersede(k, r->entry, false);
    kept_drop(pool, k, k->layout_of[r->domain], r->value);
    if (end && pool->seq[end - 1].generation & 1 && pool->seq[end - 1].ns == m->ns &&
        pool->seq[end - 1].end_entry == r->entry + 1) {
        lru_remove(pool, &pool->seq[end - 1]);
        seq_destroy(pool, &pool->seq[end - 1]);
    }
    if (pool->on_block_gone && !told)
        pool->on_block_gone(pool->on_evict_ctx, m->ns, k->layout_of[r->domain], r);
}

static struct kept *begin(struct kvd_pool *pool, uint32_t ns)
{
    struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    if (k)
        k->busy++;
    return k;
}

static void done(struct kvd_pool *pool, uint32_t ns)
{
    pool->kept[ns]->busy--;
    namespace_settle(pool, ns);
}

uint32_t blocks_evict_many(struct kvd_pool *pool, uint32_t ns, uint32_t n,
                           enum kvd_prefix_reason reason)
{
    struct kept *k = begin(pool, ns);
    struct removal m = {pool, ns, 0};
    if (!k)
        return 0;
    n = kvd_prefix_evict(k->ix, n, reason, (uint32_t)time(NULL), removed, &m);
    done(pool, ns);
    return n;
}

bool blocks_cut(struct kvd_pool *pool, uint32_t ns, const bool *cut, uint32_t n,
                struct kvd_prefix_cursor *at, uint32_t *most, enum kvd_prefix_reason reason,
                uint64_t *gone)
{
    struct kept *k = begin(pool, ns);
    struct removal m = {pool, ns, 0};
    if (!k)
        return true;
    bool all = kvd_prefix_cut(k->ix, cut, n, at, most, reason, (uint32_t)time(NULL), removed, &m);
    done(pool, ns);
    *gone += m.gone;
    return all;
}

// The namespace whose index has most bytes of pages, but less than *below, or as many and a higher
// number.
static uint32_t next_most(const struct kvd_pool *pool, uint64_t below, uint32_t after)
{
    uint32_t most = KVD_POOL_NONE;
    for (uint32_t i = 0; pool->kept && i < pool->head->n_namespaces; i++) {
        const struct kept *k = pool->kept[i];
        if (!k || k->page_bytes > below || (k->page_bytes == below && i <= after))
            continue;
        if (most == KVD_POOL_NONE || k->page_bytes > pool->kept[most]->page_bytes)
            most = i;
    }
    return most;
}

bool blocks_evict(struct kvd_pool *pool, uint32_t ns, enum kvd_prefix_reason reason)
{
    if (ns != KVD_POOL_NONE)
        return blocks_evict_many(pool, ns, 1, reason);
    uint64_t below = UINT64_MAX;
    for (uint32_t i = next_most(pool, below, 0); i != KVD_POOL_NONE;
         i = next_most(pool, below, i)) {
        below = pool->kept[i]->page_bytes;
        if (blocks_evict_many(pool, i, 1, reason))
            return true;
    }
    return false;
}

uint64_t kvd_blocks_forget(struct kvd_pool *pool, uint32_t ns, const struct kvd_prefix_key *key,
                           enum kvd_prefix_reason reason)
{
    struct kept *k = begin(pool, ns);
    struct removal m = {pool, ns, 0};
    uint32_t now = (uint32_t)time(NULL);
    if (!k)
        return 0;
    for (uint32_t i = 0; i < KVD_POOL_DOMAINS; i++) {
        uint32_t entry = kvd_prefix_entry(k->ix, i, key);
        if (entry != KVD_PREFIX_NONE)
            kvd_prefix_remove(k->ix, entry, reason, now, removed, &m);
    }
    done(pool, ns);
    return m.gone;
}

uint32_t kvd_blocks_forget_pages(struct kvd_pool *pool, uint32_t ns, uint32_t *entries, uint32_t n,
                                 enum kvd_prefix_reason reason)
{
    struct kept *k = begin(pool, ns);
    struct removal m = {pool, ns, 0};
    if (!k)
        return 0;
    n = kvd_prefix_remove_entries(k->ix, entries, n, reason, (uint32_t)time(NULL), removed, &m);
    done(pool, ns);
    return n;
}

bool kvd_blocks_clear(struct kvd_pool *pool, uint32_t ns, struct kvd_prefix_cursor *at,
                      uint32_t most, uint64_t *gone)
{
    struct kept *k = begin(pool, ns);
    struct removal m = {pool, ns, 0};
    if (!k)
        return true;
    bool all = kvd_prefix_clear(k->ix, KVD_PREFIX_NONE, at, &most, KVD_PREFIX_DROPPED,
                                (uint32_t)time(NULL), removed, &m);
    done(pool, ns);
    *gone += m.gone;
    return all;
}

bool blocks_clear(struct kvd_pool *pool, struct kvd_pool_clearing *c, uint32_t *n)
{
    struct kept *k = begin(pool, c->ns);
    struct removal m = {pool, c->ns, 0};
    uint32_t now = (uint32_t)time(NULL);
    bool all = true;
    if (!k)
        return true;
    if (!c->layout)
        all = kvd_prefix_clear(k->ix, KVD_PREFIX_NONE, &c->blocks, n, KVD_PREFIX_EVICTED_ROOM, now,
                               removed, &m);
    while (c->layout && all && c->domain < KVD_POOL_DOMAINS) {
        if (kvd_prefix_domain_at(k->ix, c->domain) && k->layout_of[c->domain] == c->index)
            all = kvd_prefix_clear(k->ix, c->domain, &c->blocks, n, KVD_PREFIX_EVICTED_ROOM, now,
                                   removed, &m);
        if (all) {
            c->domain++;
            c->blocks = (struct kvd_prefix_cursor){0};
        }
    }
    done(pool, c->ns);
    return all;
}

uint32_t kvd_blocks_classify(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                             const struct kvd_prefix_key *keys, uint32_t n,
                             enum kvd_prefix_class class)
{
    const struct kept *k = pool->kept ? pool->kept[space->ns] : NULL;
    uint32_t domain = k ? kvd_prefix_domain_find(k->ix, space->domain) : KVD_PREFIX_NONE;
    return domain == KVD_PREFIX_NONE ? 0 : kvd_prefix_classify(k->ix, domain, keys, n, class);
}

uint32_t kvd_blocks_classify_to(struct kvd_pool *pool, uint32_t ns,
                                const struct kvd_prefix_key *key, enum kvd_prefix_class class)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    uint32_t n = 0;
    for (uint32_t i = 0; k && i < KVD_POOL_DOMAINS; i++) {
        uint32_t entry = kvd_prefix_entry(k->ix, i, key);
        if (entry != KVD_PREFIX_NONE)
            n += kvd_prefix_classify_to(k->ix, entry, class);
    }
    return n;
}

enum kvd_prefix_class kvd_blocks_class(const struct kvd_pool *pool, uint32_t ns,
                                       const struct kvd_prefix_key *key)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    struct kvd_prefix_entry_info e;
    for (uint32_t i = 0; k && i < KVD_POOL_DOMAINS; i++) {
        uint32_t entry = kvd_prefix_entry(k->ix, i, key);
        if (entry != KVD_PREFIX_NONE && kvd_prefix_get(k->ix, entry, &e))
            return e.class;
    }
    return KVD_PREFIX_NORMAL;
}

uint32_t kvd_blocks_drop(struct kvd_pool *pool, const struct kvd_blocks_space *space,
                         const struct kvd_prefix_key *keys, uint32_t n, uint32_t keep,
                         enum kvd_prefix_reason reason)
{
    struct kept *k = begin(pool, space->ns);
    struct removal m = {pool, space->ns, 0};
    uint32_t gone = 0;
    if (!k)
        return 0;
    uint32_t domain = kvd_prefix_domain_find(k->ix, space->domain);
    if (domain != KVD_PREFIX_NONE)
        gone = kvd_prefix_drop(k->ix, domain, keys, n, keep, reason, (uint32_t)time(NULL), removed,
                               &m);
    done(pool, space->ns);
    return gone;
}

// An end that a later one has passed, as the first of those that can be evicted.
static bool evict_passed(struct kvd_pool *pool, uint32_t ns)
{
    for (uint32_t n = 0; pool->kept && n < pool->head->n_namespaces; n++) {
        if (!pool->kept[n] || (ns != KVD_POOL_NONE && ns != n))
            continue;
        uint32_t i = evictable_of(pool, n);
        if (i == KVD_POOL_NONE || !pool->seq[i].end_entry || pool->seq[i].lru_stamp)
            continue;
        evict(pool, &pool->seq[i]);
        return true;
    }
    return false;
}

bool evict_something(struct kvd_pool *pool, uint32_t ns, enum kvd_prefix_reason reason,
                     struct kvd_pool_evicted *sum)
{
    uint64_t before = pool->head->used, sequences = pool->head->evictions;
    bool block = false;
    bool any =
        evict_passed(pool, ns) || (block = blocks_evict(pool, ns, reason)) || evict_one(pool, ns);
    if (sum) {
        sum->bytes += before - pool->head->used;
        sum->sequences += pool->head->evictions - sequences;
        sum->blocks += block;
    }
    return any;
}

// What a namespace has beyond its quota.
static uint64_t borrowed(const struct kvd_pool *pool, uint32_t ns)
{
    const struct region_namespace *n = &pool->ns[ns];
    return n->quota && n->used > n->quota ? n->used - n->quota : 0;
}

// Evicts of whoever has borrowed most, among those of whom there is something to evict.
static bool evict_borrowed(struct kvd_pool *pool, struct kvd_pool_evicted *sum)
{
    uint64_t below = UINT64_MAX;
    for (;;) {
        uint32_t most = KVD_POOL_NONE;
        for (uint32_t i = 0; i < pool->head->n_namespaces; i++)
            if (borrowed(pool, i) && borrowed(pool, i) < below &&
                (most == KVD_POOL_NONE || borrowed(pool, i) > borrowed(pool, most)))
                most = i;
        if (most == KVD_POOL_NONE)
            return false;
        below = borrowed(pool, most);
        if (evict_something(pool, most, KVD_PREFIX_EVICTED_ROOM, sum))
            return true;
    }
}

bool evict_for_room(struct kvd_pool *pool, uint32_t ns, uint64_t bytes)
{
    const struct region_namespace *n = &pool->ns[ns];
    if (n->quota && n->used + bytes > n->quota)
        return evict_something(pool, ns, KVD_PREFIX_EVICTED_QUOTA, NULL);
    return evict_borrowed(pool, NULL) ||
           evict_something(pool, KVD_POOL_NONE, KVD_PREFIX_EVICTED_ROOM, NULL);
}

uint32_t giver_of_room(const struct kvd_pool *pool, uint32_t ns, uint64_t bytes)
{
    const struct region_namespace *n = &pool->ns[ns];
    uint32_t most = KVD_POOL_NONE;
    if (n->quota && n->used + bytes > n->quota)
        return ns;
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++)
        if (borrowed(pool, i) &&
            (most == KVD_POOL_NONE || borrowed(pool, i) > borrowed(pool, most)))
            most = i;
    return most == KVD_POOL_NONE ? next_most(pool, UINT64_MAX, 0) : most;
}

uint32_t kvd_pool_relieve(struct kvd_pool *pool, uint32_t most, struct kvd_pool_evicted *sum)
{
    uint32_t n = 0;
    *sum = (struct kvd_pool_evicted){0};
    while (n < most && (evict_borrowed(pool, sum) ||
                        evict_something(pool, KVD_POOL_NONE, KVD_PREFIX_EVICTED_ROOM, sum)))
        n++;
    return n;
}

uint32_t kvd_pool_evict(struct kvd_pool *pool, uint32_t ns, uint64_t bytes, uint32_t most,
                        struct kvd_pool_evicted *sum)
{
    uint32_t n = 0;
    *sum = (struct kvd_pool_evicted){0};
    while (n < most && (bytes == 0 || sum->bytes < bytes) &&
           evict_something(pool, ns, KVD_PREFIX_EVICTED_ASKED, sum))
        n++;
    return n;
}
