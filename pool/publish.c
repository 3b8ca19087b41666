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
    lru_remove(pool, s);
}

void lru_add(struct kvd_pool *pool, struct region_seq *s)
{
    struct region_namespace *n = &pool->ns[s->ns];
    uint32_t i = (uint32_t)(s - pool->seq);
    s->listed = true;
    s->lru_stamp = ++pool->head->lru_clock;
    s->lru_next = KVD_POOL_NONE;
    s->lru_prev = n->lru_last;
    if (n->lru_last == KVD_POOL_NONE)
        n->lru_first = i;
    else
        pool->seq[n->lru_last].lru_next = i;
    n->lru_last = i;
    pool->layout[s->layout].idle++;
    pool->layout[s->layout].used = s->lru_stamp;
}

void lru_remove(struct kvd_pool *pool, struct region_seq *s)
{
    struct region_namespace *n = &pool->ns[s->ns];
    if (!s->listed)
        return;
    s->listed = false;
    pool->layout[s->layout].idle--;
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
    if (old)
        kvd_pool_unpublish(pool, seq_id(pool, old));
    name_remove(pool, s);
    uint32_t *bucket = &pool->head->name_bucket[name_bucket(s->ns, name)];
    snprintf(s->name, sizeof(s->name), "%s", name);
    s->name_next = *bucket;
    *bucket = (uint32_t)(s - pool->seq);
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
    if (s->listed) {
        lru_remove(pool, s);
        lru_add(pool, s);
    }
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
    if (pool->on_evict)
        pool->on_evict(pool->on_evict_ctx, s->ns, seq_id(pool, s), s->name);
    name_remove(pool, s);
    pool->head->evictions++;
    seq_destroy(pool, s);
}

bool evict_one(struct kvd_pool *pool, uint32_t ns, uint64_t *freed)
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
    uint64_t before = pool->head->used;
    evict(pool, &pool->seq[oldest]);
    if (freed)
        *freed += before - pool->head->used;
    return true;
}

uint32_t kvd_pool_evict(struct kvd_pool *pool, uint32_t ns, uint64_t bytes, uint64_t *freed)
{
    uint32_t n = 0;
    *freed = 0;
    while ((bytes == 0 || *freed < bytes) && evict_one(pool, ns, freed))
        n++;
    return n;
}

// Takes or gives back an evictable sequence's references. Taking: the bytes of its pages that have
// none left.
static uint64_t weigh(struct kvd_pool *pool, const struct region_seq *s, int by)
{
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes && !s->pins; p++)
        for (int kind = 0; kind < KVD_POOL_KINDS; kind++)
            table_weigh(pool, &s->table[p][kind], by, by < 0 ? &bytes : NULL);
    return bytes;
}

uint64_t kvd_pool_evictable(struct kvd_pool *pool, uint64_t *by_namespace)
{
    uint64_t sum = 0;
    // Pages may be shared among them and with sequences in use: their references are taken away for
    // the moment, and those pages count that then have none.
    for (int by = -1; by <= 1; by += 2)
        for (uint32_t n = 0; n < pool->head->n_namespaces; n++)
            for (uint32_t i = pool->ns[n].lru_first; i != KVD_POOL_NONE;
                 i = pool->seq[i].lru_next) {
                uint64_t bytes = weigh(pool, &pool->seq[i], by);
                sum += bytes;
                if (by_namespace)
                    by_namespace[n] += bytes;
            }
    return sum;
}
