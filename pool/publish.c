// Names of published sequences, and the order in which unused ones are evicted.
#include "pool/internal.h"

uint32_t name_bucket(uint32_t ns, const char *name)
{
    uint64_t h = 0xcbf29ce484222325ull ^ ns; // FNV-1a
    for (const char *c = name; *c; c++)
        h = (h ^ (uint8_t)*c) * 0x100000001b3ull;
    return (uint32_t)(h ^ h >> 32) % KVD_NAME_BUCKETS;
}

static struct region_seq *name_find(const struct kvd_pool *pool, uint32_t ns, const char *name)
{
    uint32_t i = pool->head->name_bucket[name_bucket(ns, name)];
    for (; i != KVD_POOL_NONE; i = pool->seq[i].name_next)
        if (pool->seq[i].ns == ns && strcmp(pool->seq[i].name, name) == 0)
            return &pool->seq[i];
    return NULL;
}

void name_remove(struct kvd_pool *pool, struct region_seq *s)
{
    if (!s->name[0])
        return;
    uint32_t *link = &pool->head->name_bucket[name_bucket(s->ns, s->name)];
    while (&pool->seq[*link] != s)
        link = &pool->seq[*link].name_next;
    *link = s->name_next;
    s->name_next = KVD_POOL_NONE;
    s->name[0] = '\0';
    stored();
    lru_remove(pool, s);
}

static void link_last(struct kvd_pool *pool, struct region_seq *s)
{
    struct region_namespace *n = &pool->ns[s->ns];
    uint32_t i = (uint32_t)(s - pool->seq);
    s->lru_stamp = ++pool->head->lru_clock;
    s->lru_next = KVD_POOL_NONE;
    s->lru_prev = n->lru_last;
    if (n->lru_last == KVD_POOL_NONE)
        n->lru_first = i;
    else
        pool->seq[n->lru_last].lru_next = i;
    n->lru_last = i;
    pool->layout[s->layout].used = s->lru_stamp;
}

static void link_first(struct kvd_pool *pool, struct region_seq *s)
{
    struct region_namespace *n = &pool->ns[s->ns];
    uint32_t i = (uint32_t)(s - pool->seq);
    pool->layout[s->layout].used = ++pool->head->lru_clock;
    s->lru_stamp = 0;
    s->lru_prev = KVD_POOL_NONE;
    s->lru_next = n->lru_first;
    if (n->lru_first == KVD_POOL_NONE)
        n->lru_last = i;
    else
        pool->seq[n->lru_first].lru_prev = i;
    n->lru_first = i;
}

static void unlink_from_list(struct kvd_pool *pool, struct region_seq *s)
{
    struct region_namespace *n = &pool->ns[s->ns];
    if (s->lru_prev == KVD_POOL_NONE)
        n->lru_first = s->lru_next;
    else
        pool->seq[s->lru_prev].lru_next = s->lru_next;
    if (s->lru_next == KVD_POOL_NONE)
        n->lru_last = s->lru_prev;
    else
        pool->seq[s->lru_next].lru_prev = s->lru_prev;
    s->lru_prev = s->lru_next = KVD_POOL_NONE;
}

void lru_add(struct kvd_pool *pool, struct region_seq *s)
{
    link_last(pool, s);
    s->listed = true;
    pool->layout[s->layout].idle++;
    if (!s->pins)
        idle_sequence(pool, s, true);
}

void lru_remove(struct kvd_pool *pool, struct region_seq *s)
{
    if (!s->listed)
        return;
    if (!s->pins)
        idle_sequence(pool, s, false);
    unlink_from_list(pool, s);
    s->listed = false;
    pool->layout[s->layout].idle--;
}

void lru_move(struct kvd_pool *pool, struct region_seq *s, bool first)
{
    unlink_from_list(pool, s);
    if (first)
        link_first(pool, s);
    else
        link_last(pool, s);
}

int kvd_pool_publish(struct kvd_pool *pool, uint64_t seq, const char *name, bool replace,
                     struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    if (!kvd_name_valid(name, KVD_MAX_NAME))
        return kvd_fail(err, KVD_E_INVALID,
                        "a sequence's name has 1 to %d printable ASCII characters and no spaces",
                        KVD_MAX_NAME);
    if (strcmp(s->name, name) == 0)
        return KVD_OK;
    struct region_seq *old = name_find(pool, s->ns, name);
    if (old && !replace)
        return kvd_fail(err, KVD_E_EXISTS,
                        "the name %s belongs to sequence %llu; set replace to take it over", name,
                        (unsigned long long)seq_id(pool, old));
    journal_note(pool, s->name, sizeof(s->name));
    if (old) {
        journal_note(pool, old->name, sizeof(old->name));
        name_remove(pool, old);
    }
    name_remove(pool, s);
    uint32_t *bucket = &pool->head->name_bucket[name_bucket(s->ns, name)];
    snprintf(s->name, sizeof(s->name), "%s", name);
    s->name_next = *bucket;
    *bucket = (uint32_t)(s - pool->seq);
    journal_end(pool);
    if (old && old->holders == 0)
        seq_destroy(pool, old);
    return KVD_OK;
}

void kvd_pool_unpublish(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return;
    name_remove(pool, s);
    if (s->holders == 0)
        seq_destroy(pool, s);
}

uint64_t kvd_pool_lookup(struct kvd_pool *pool, uint32_t ns, const char *name)
{
    struct region_seq *s = name[0] ? name_find(pool, ns, name) : NULL;
    if (!s)
        return 0;
    if (s->listed)
        lru_move(pool, s, false);
    return seq_id(pool, s);
}

uint32_t evictable_of(const struct kvd_pool *pool, uint32_t ns)
{
    uint32_t i = pool->ns[ns].lru_first;
    while (i != KVD_POOL_NONE && pool->seq[i].pins)
        i = pool->seq[i].lru_next;
    return i;
}

void evict(struct kvd_pool *pool, struct region_seq *s)
{
    if (s->name[0]) {
        if (pool->on_evict)
            pool->on_evict(pool->on_evict_ctx, s->ns, seq_id(pool, s), s->name);
        name_remove(pool, s);
        pool->head->evictions++;
    }
    lru_remove(pool, s);
    seq_destroy(pool, s);
}

bool evict_one(struct kvd_pool *pool, uint32_t ns)
{
    uint32_t oldest = KVD_POOL_NONE;
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++) {
        uint32_t s = ns == KVD_POOL_NONE || ns == i ? evictable_of(pool, i) : KVD_POOL_NONE;
        if (s != KVD_POOL_NONE &&
            (oldest == KVD_POOL_NONE || pool->seq[s].lru_stamp < pool->seq[oldest].lru_stamp))
            oldest = s;
    }
    if (oldest == KVD_POOL_NONE)
        return false;
    evict(pool, &pool->seq[oldest]);
    return true;
}
