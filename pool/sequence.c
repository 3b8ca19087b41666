// Sequences: making, forking, holding and freeing them.
#include "pool/internal.h"

struct region_seq *seq_find(const struct kvd_pool *pool, uint64_t id)
{
    uint32_t generation = (uint32_t)(id >> 32);
    uint32_t index = (uint32_t)id;
    if (index >= pool->head->n_sequences_ever || !(generation & 1))
        return NULL;
    struct region_seq *s = &pool->seq[index];
    return s->generation == generation && !s->doomed ? s : NULL;
}

uint64_t seq_id(const struct kvd_pool *pool, const struct region_seq *s)
{
    return (uint64_t)s->generation << 32 | (uint32_t)(s - pool->seq);
}

// As seq_find, but finds a doomed one too: whoever pinned it may still speak of it.
static struct region_seq *seq_find_any(const struct kvd_pool *pool, uint64_t id)
{
    struct region_seq *s = &pool->seq[(uint32_t)id];
    return (uint32_t)id < pool->head->n_sequences_ever && s->generation == (uint32_t)(id >> 32)
               ? s
               : NULL;
}

void seq_set_length(struct kvd_pool *pool, struct region_seq *s, uint64_t length)
{
    pool->ns[s->ns].tokens += length - s->length;
    pool->head->tokens += length - s->length;
    s->length = length;
}

uint64_t seq_bytes(const struct kvd_pool *pool, const struct region_seq *s)
{
    uint64_t bytes = 0;
    for (int k = 0; k < KVD_POOL_KINDS; k++)
        bytes += table_pages(pool, &s->table[k]) * pool->layout[s->layout].page_bytes[k];
    return bytes;
}

int kvd_pool_seq_new(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint64_t *seq,
                     struct kvd_error *err)
{
    struct region_head *h = pool->head;
    int rc = share_take(pool, ns, SHARE_SEQUENCES, err);
    if (rc)
        return rc;
    uint32_t i = h->free_seq;
    if (i != KVD_POOL_NONE)
        h->free_seq = pool->seq[i].lru_next;
    else
        pool->seq[i = h->n_sequences_ever++].generation = h->first_generation;
    struct region_seq *s = &pool->seq[i];
    uint32_t sink = pool->layout[layout].l.planes[0].sink;
    *s = (struct region_seq){.generation = s->generation + 1,
                             .ns = ns,
                             .layout = layout,
                             .holders = 1,
                             .hist_end = sink,
                             .pending_hist_end = sink,
                             .lru_prev = KVD_POOL_NONE,
                             .lru_next = KVD_POOL_NONE,
                             .name_next = KVD_POOL_NONE};
    for (int k = 0; k < KVD_POOL_KINDS; k++)
        table_init(&s->table[k], ns);
    h->sequences++;
    pool->layout[layout].refs++;
    pool->ns[ns].sequences++;
    *seq = seq_id(pool, s);
    return KVD_OK;
}

void seq_destroy(struct kvd_pool *pool, struct region_seq *s)
{
    if (s->pins) {
        s->doomed = true;
        return;
    }
    for (int k = 0; k < KVD_POOL_KINDS; k++)
        table_truncate(pool, &s->table[k], 0);
    seq_set_length(pool, s, 0);
    pool->ns[s->ns].sequences--;
    pool->head->sequences--;
    pool->layout[s->layout].refs--;
    s->generation++;
    s->doomed = false;
    s->lru_next = pool->head->free_seq;
    pool->head->free_seq = (uint32_t)(s - pool->seq);
    namespace_settle(pool, s->ns);
}

int kvd_pool_seq_fork(struct kvd_pool *pool, uint64_t parent, uint64_t *child,
                      struct kvd_error *err)
{
    struct region_seq *p = seq_find(pool, parent);
    if (!p)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu",
                        (unsigned long long)parent);
    if (p->pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %llu has an append that reached %u layers; finish it or truncate "
                        "to %llu before a fork",
                        (unsigned long long)parent, p->pending_layers,
                        (unsigned long long)p->length);
    uint64_t id;
    p->pins++; // room is made by eviction, and not of this one
    int rc = kvd_pool_seq_new(pool, p->ns, p->layout, &id, err);
    struct region_seq *c = rc ? NULL : seq_find(pool, id);
    for (int k = 0; k < KVD_POOL_KINDS && !rc; k++)
        rc = table_share(pool, &c->table[k], &p->table[k], err);
    p->pins--;
    if (rc) {
        if (c)
            seq_destroy(pool, c);
        return rc;
    }
    seq_set_length(pool, c, p->length);
    c->hist_end = p->hist_end;
    c->pending_length = p->length;
    c->pending_hist_end = p->hist_end;
    *child = id;
    return KVD_OK;
}

int kvd_pool_seq_hold(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return KVD_E_NOT_FOUND;
    s->holders++;
    lru_remove(pool, s);
    return KVD_OK;
}

void kvd_pool_seq_release(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s || s->holders == 0 || --s->holders)
        return;
    if (s->name[0])
        lru_add(pool, s);
    else
        seq_destroy(pool, s);
}

void kvd_pool_seq_pin(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (s)
        s->pins++;
}

void kvd_pool_seq_unpin(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find_any(pool, seq);
    if (s && s->pins && --s->pins == 0 && s->doomed)
        seq_destroy(pool, s);
}

static void fill_info(const struct kvd_pool *pool, const struct region_seq *s,
                      struct kvd_pool_seq_info *out)
{
    *out = (struct kvd_pool_seq_info){
        .id = seq_id(pool, s),
        .ns = s->ns,
        .layout = s->layout,
        .length = s->length,
        .hist_end = s->hist_end,
        .pending_length = s->pending_layers ? s->pending_length : s->length,
        .pending_hist_end = s->pending_layers ? s->pending_hist_end : s->hist_end,
        .pending_layers = s->pending_layers,
        .bytes = seq_bytes(pool, s),
        .holders = s->holders,
        .pins = s->pins,
        .name = s->name,
    };
    for (int k = 0; k < KVD_POOL_KINDS; k++)
        out->pages[k] = table_pages(pool, &s->table[k]);
}

int kvd_pool_seq_info(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_seq_info *out)
{
    const struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return KVD_E_NOT_FOUND;
    fill_info(pool, s, out);
    return KVD_OK;
}

void kvd_pool_seq_each(const struct kvd_pool *pool,
                       bool (*fn)(void *ctx, const struct kvd_pool_seq_info *info), void *ctx)
{
    for (uint32_t i = 0; i < pool->head->n_sequences_ever; i++) {
        const struct region_seq *s = &pool->seq[i];
        if (!(s->generation & 1) || s->doomed)
            continue;
        struct kvd_pool_seq_info info;
        fill_info(pool, s, &info);
        if (!fn(ctx, &info))
            return;
    }
}

uint32_t kvd_pool_seq_pages(const struct kvd_pool *pool, uint64_t seq, enum kvd_pool_kind kind,
                            uint64_t *out, uint32_t cap)
{
    const struct region_seq *s = seq_find_any(pool, seq);
    if (!s)
        return 0;
    uint32_t n = 0;
    for (uint32_t b = s->table[kind].first; b != KVD_POOL_NONE; b = pool->block[b].next) {
        for (uint32_t i = 0; i < pool->block[b].used; i++, n++) {
            uint32_t page = pool->block[b].page[i];
            if (n < cap)
                out[n] = page == KVD_POOL_NONE ? 0 : kvd_pool_page_addr(pool, page);
        }
    }
    return n;
}
