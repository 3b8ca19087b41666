// Page tables: chains of blocks of page numbers. A hole is KVD_POOL_NONE.
#include "pool/internal.h"

void table_init(struct region_table *t, uint32_t ns)
{
    *t = (struct region_table){.first = KVD_POOL_NONE, .last = KVD_POOL_NONE, .ns = ns};
}

uint32_t table_blocks(const struct region_table *t)
{
    return table_empty(t) ? 0 : (uint32_t)kvd_div_up(t->count - t->begin, KVD_TABLE_ENTRIES);
}

static uint32_t begin_for(const struct region_table *t, uint32_t entry)
{
    return t->count ? t->begin : entry / KVD_TABLE_ENTRIES * KVD_TABLE_ENTRIES;
}

void table_start(struct region_table *t, uint32_t entry)
{
    t->begin = begin_for(t, entry);
    stored();
    t->count = KVD_MAX(t->count, t->begin);
}

uint32_t table_lacks(const struct region_table *t, uint32_t entry, uint32_t count)
{
    uint32_t begin = begin_for(t, entry);
    if (count <= t->count)
        return 0;
    return (uint32_t)kvd_div_up(count - begin, KVD_TABLE_ENTRIES) - table_blocks(t);
}

static void block_add(struct kvd_pool *pool, struct region_table *t)
{
    struct region_head *h = pool->head;
    uint32_t b = h->free_block;
    if (b != KVD_POOL_NONE)
        h->free_block = pool->block[b].next;
    else
        b = h->n_blocks_ever++;
    h->blocks++;
    pool->ns[t->ns].blocks++;
    if (t->last == KVD_POOL_NONE)
        t->first = b;
    else
        pool->block[t->last].next = b;
    t->last = b;
}

static void block_free(struct kvd_pool *pool, const struct region_table *t, uint32_t b)
{
    pool->block[b].next = pool->head->free_block;
    pool->head->free_block = b;
    pool->head->blocks--;
    pool->ns[t->ns].blocks--;
}

static void entry_push(struct kvd_pool *pool, struct region_table *t, uint32_t page)
{
    uint32_t at = (t->count - t->begin) % KVD_TABLE_ENTRIES;
    if (at == 0)
        block_add(pool, t);
    pool->block[t->last].page[at] = page;
    stored();
    t->count++;
    stored();
}

static uint32_t *entry_at(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry)
{
    uint32_t b = t->first, at = entry - t->begin;
    if (at / KVD_TABLE_ENTRIES == (t->count - t->begin - 1) / KVD_TABLE_ENTRIES) {
        b = t->last;
    } else {
        for (uint32_t i = at / KVD_TABLE_ENTRIES; i > 0; i--)
            b = pool->block[b].next;
    }
    return &pool->block[b].page[at % KVD_TABLE_ENTRIES];
}

void table_set(struct kvd_pool *pool, struct region_table *t, uint32_t entry, uint32_t page)
{
    while (t->count <= entry)
        entry_push(pool, t, KVD_POOL_NONE);
    *entry_at(pool, t, entry) = page;
    stored();
}

uint32_t table_get(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry)
{
    return entry >= t->begin && entry < t->count ? *entry_at(pool, t, entry) : KVD_POOL_NONE;
}

void table_truncate(struct kvd_pool *pool, struct region_table *t, uint32_t count)
{
    struct region_table old = *t;
    uint32_t keep = KVD_POOL_NONE;
    if (count >= t->count)
        return;
    t->count = count > t->begin ? count : 0;
    stored();
    for (struct table_walk w = table_walk(&old); w.block != KVD_POOL_NONE;) {
        uint32_t b = w.block, at = w.at, n = w.n;
        uint32_t stay = count > at ? KVD_MIN(count - at, n) : 0;
        table_walk_on(pool, &w);
        for (uint32_t i = stay; i < n; i++)
            if (pool->block[b].page[i] != KVD_POOL_NONE)
                kvd_pool_page_unref(pool, pool->block[b].page[i]);
        if (stay)
            keep = b;
        else
            block_free(pool, t, b);
    }
    t->last = keep;
    if (t->count == 0) {
        t->begin = 0;
        t->first = KVD_POOL_NONE;
    }
}

void table_drop_front(struct kvd_pool *pool, struct region_table *t, uint32_t entry)
{
    if (entry >= t->count)
        table_truncate(pool, t, 0);
    while (!table_empty(t) && entry > t->begin) {
        uint32_t b = t->first;
        struct region_block *block = &pool->block[b];
        uint32_t n = KVD_MIN(entry - t->begin, (uint32_t)KVD_TABLE_ENTRIES);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t page = block->page[i];
            block->page[i] = KVD_POOL_NONE;
            stored();
            if (page != KVD_POOL_NONE)
                kvd_pool_page_unref(pool, page);
        }
        if (n < KVD_TABLE_ENTRIES)
            return;
        journal_note(pool, t, offsetof(struct region_table, count));
        t->first = block->next;
        t->begin += KVD_TABLE_ENTRIES;
        journal_end(pool);
        block_free(pool, t, b);
    }
}

void table_share(struct kvd_pool *pool, struct region_table *to, const struct region_table *from)
{
    to->begin = to->count = from->begin;
    for (struct table_walk w = table_walk(from); w.block != KVD_POOL_NONE;
         table_walk_on(pool, &w)) {
        for (uint32_t i = 0; i < w.n; i++) {
            uint32_t page = pool->block[w.block].page[i];
            entry_push(pool, to, page);
            if (page != KVD_POOL_NONE)
                page_ref(pool, page);
        }
    }
}

void table_read(const struct kvd_pool *pool, const struct region_table *t, uint32_t first,
                uint32_t n, uint32_t *out, uint32_t stride)
{
    for (uint32_t i = 0; i < n; i++)
        out[(size_t)i * stride] = KVD_POOL_NONE;
    for (struct table_walk w = table_walk(t); w.block != KVD_POOL_NONE && w.at < first + n;
         table_walk_on(pool, &w))
        for (uint32_t i = 0; i < w.n; i++)
            if (w.at + i >= first && w.at + i < first + n)
                out[(size_t)(w.at + i - first) * stride] = pool->block[w.block].page[i];
}

uint32_t table_pages(const struct kvd_pool *pool, const struct region_table *t)
{
    uint32_t n = 0;
    for (struct table_walk w = table_walk(t); w.block != KVD_POOL_NONE; table_walk_on(pool, &w))
        for (uint32_t i = 0; i < w.n; i++)
            n += pool->block[w.block].page[i] != KVD_POOL_NONE;
    return n;
}
