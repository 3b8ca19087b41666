// Sequences: making, forking, holding and freeing them.
#include "pool/internal.h"

int seq_prepare(struct kvd_pool *pool, uint32_t ns, uint32_t layout, struct region_seq **seq,
                struct kvd_error *err)
{
    struct region_head *h = pool->head;
    int rc = share_take(pool, ns, SHARE_SEQUENCES, 1, err);
    if (rc)
        return rc;
    uint32_t i = h->free_seq;
    if (i != KVD_POOL_NONE) {
        h->free_seq = pool->seq[i].lru_next;
    } else {
        i = h->n_sequences_ever;
        pool->seq[i].generation = h->first_generation;
        stored();
        h->n_sequences_ever++;
        stored();
    }
    struct region_seq *s = &pool->seq[i];
    *s = (struct region_seq){.generation = s->generation,
                             .ns = ns,
                             .layout = layout,
                             .holders = 1,
                             .lru_prev = KVD_POOL_NONE,
                             .lru_next = KVD_POOL_NONE,
                             .name_next = KVD_POOL_NONE};
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        s->reach[p].hist_end = layout_of(pool, s)->planes[p].sink;
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            table_init(&s->table[p][k], ns);
            table_init(&s->undo[p][k], ns);
        }
    }
    *seq = s;
    return KVD_OK;
}

void seq_appear(struct kvd_pool *pool, struct region_seq *s)
{
    stored();
    s->generation++;
    stored();
    pool->head->sequences++;
    pool->layout[s->layout].sequences++;
    pool->ns[s->ns].sequences++;
}

int kvd_pool_seq_new(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint64_t *seq,
                     struct kvd_error *err)
{
    struct region_seq *s;
    int rc = seq_prepare(pool, ns, layout, &s, err);
    if (rc)
        return rc;
    seq_appear(pool, s);
    *seq = seq_id(pool, s);
    return KVD_OK;
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
    struct region_seq *c;
    uint32_t blocks = 0, planes = layout_of(pool, p)->n_planes;
    for (uint32_t i = 0; i < planes; i++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            blocks += table_blocks(&p->table[i][k]);
    seq_pin(pool, p); // room is made by eviction, and not of this one
    int rc = blocks ? share_take(pool, p->ns, SHARE_BLOCKS, blocks, err) : KVD_OK;
    if (rc == KVD_OK)
        rc = seq_prepare(pool, p->ns, p->layout, &c, err);
    seq_unpin(pool, p);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < planes; i++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            table_share(pool, &c->table[i][k], &p->table[i][k]);
    seq_set_length(pool, c, p->length);
    memcpy(c->reach, p->reach, sizeof(c->reach));
    if (p->held_entry && kvd_prefix_hold(pool->kept[p->ns]->ix, p->held_entry - 1, err) == KVD_OK)
        c->held_entry = p->held_entry;
    seq_appear(pool, c);
    *child = seq_id(pool, c);
    return KVD_OK;
}

int kvd_pool_seq_hold(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return KVD_E_NOT_FOUND;
    s->holders++;
    stored();
    lru_remove(pool, s);
    return KVD_OK;
}

void kvd_pool_seq_release(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s || s->holders == 0)
        return;
    s->holders--;
    stored();
    if (s->holders)
        return;
    if (s->name[0])
        lru_add(pool, s);
    else
        seq_destroy(pool, s);
}

// Whoever has none, and no name, goes; who has some, or has none any more, leaves or joins those
// that can be evicted.
static void set_holders(struct kvd_pool *pool, struct region_seq *s, uint32_t holders)
{
    s->holders = holders;
    stored();
    if (holders)
        lru_remove(pool, s);
    else if (!s->name[0])
        seq_destroy(pool, s);
    else if (!s->listed)
        lru_add(pool, s);
}

int kvd_pool_set_holders(struct kvd_pool *pool, const uint64_t *ids, size_t n,
                         struct kvd_error *err)
{
    uint32_t n_sequences = pool->head->n_sequences_ever;
    uint32_t *holders KVD_FREE = calloc((size_t)n_sequences + 1, sizeof(*holders));
    if (!holders)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < n; i++)
        if (seq_find(pool, ids[i]))
            holders[(uint32_t)ids[i]]++;
    for (uint32_t i = 0; i < n_sequences; i++)
        if ((pool->seq[i].generation & 1) && !pool->seq[i].doomed)
            set_holders(pool, &pool->seq[i], holders[i]);
    return KVD_OK;
}

void kvd_pool_seq_pin(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (s)
        seq_pin(pool, s);
}

void kvd_pool_seq_unpin(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find_any(pool, seq);
    if (!s || !s->pins)
        return;
    seq_unpin(pool, s);
    if (s->pins == 0 && s->doomed)
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
        .pending_length = s->pending_layers ? s->pending_length : s->length,
        .pending_layers = s->pending_layers,
        .n_planes = layout_of(pool, s)->n_planes,
        .bytes = seq_bytes(pool, s),
        .holders = s->holders,
        .pins = s->pins,
        .name = s->name,
        .end = s->end_entry != 0,
    };
    for (uint32_t p = 0; p < out->n_planes; p++) {
        const struct kvd_pool_reach *pending = s->pending_layers ? s->pending : s->reach;
        out->reach[p] = s->reach[p];
        out->pending[p] = pending[p];
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            out->pages[p][k] = table_pages(pool, &s->table[p][k]);
    }
}

int kvd_pool_seq_info(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_seq_info *out)
{
    const struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return KVD_E_NOT_FOUND;
    fill_info(pool, s, out);
    return KVD_OK;
}

int kvd_pool_seq_lengths(const struct kvd_pool *pool, uint64_t seq,
                         struct kvd_pool_seq_lengths *out)
{
    const struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return KVD_E_NOT_FOUND;
    const struct kvd_pool_reach *pending = s->pending_layers ? s->pending : s->reach;
    out->length = s->length;
    out->pending_length = s->pending_layers ? s->pending_length : s->length;
    out->pending_layers = s->pending_layers;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        out->reach[p] = s->reach[p];
        out->pending[p] = pending[p];
    }
    return KVD_OK;
}

uint32_t kvd_pool_seq_places(const struct kvd_pool *pool)
{
    return pool->head->n_sequences_ever;
}

bool kvd_pool_seq_at(const struct kvd_pool *pool, uint32_t place, struct kvd_pool_seq_info *out)
{
    if (place >= pool->head->n_sequences_ever)
        return false;
    const struct region_seq *s = &pool->seq[place];
    if (!(s->generation & 1) || s->doomed)
        return false;
    fill_info(pool, s, out);
    return true;
}

void kvd_pool_seq_each(const struct kvd_pool *pool,
                       bool (*fn)(void *ctx, const struct kvd_pool_seq_info *info), void *ctx)
{
    struct kvd_pool_seq_info info;
    for (uint32_t i = 0; i < kvd_pool_seq_places(pool); i++)
        if (kvd_pool_seq_at(pool, i, &info) && !fn(ctx, &info))
            return;
}

uint32_t kvd_pool_seq_pages(const struct kvd_pool *pool, uint64_t seq, uint32_t plane,
                            enum kvd_pool_kind kind, uint64_t *out, uint32_t cap)
{
    const struct region_seq *s = seq_find_any(pool, seq);
    if (!s)
        return 0;
    const struct region_table *t = &s->table[plane][kind];
    const uint32_t n = table_empty(t) ? t->begin : t->count;
    for (uint32_t i = 0; i < KVD_MIN(t->begin, cap); i++)
        out[i] = 0;
    for (struct table_walk w = table_walk(t); w.block != KVD_POOL_NONE && w.at < cap;
         table_walk_on(pool, &w))
        page_addresses(pool, pool->block[w.block].page, KVD_MIN(w.n, cap - w.at), out + w.at);
    return n;
}
