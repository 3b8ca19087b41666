// Page tables: chains of blocks of page numbers. A hole is KVD_POOL_NONE.
#include "pool/internal.h"

void table_init(struct region_table *t, uint32_t ns)
{
    *t = (struct region_table){.first = KVD_POOL_NONE, .last = KVD_POOL_NONE, .ns = ns};
}

uint32_t table_blocks(const struct region_table *t)
{
    return (uint32_t)kvd_div_up(t->count - t->begin, KVD_TABLE_ENTRIES);
}

static uint32_t begin_for(const struct region_table *t, uint32_t entry)
{
    return t->count ? t->begin : entry / KVD_TABLE_ENTRIES * KVD_TABLE_ENTRIES;
}

void table_start(struct region_table *t, uint32_t entry)
{
    t->begin = begin_for(t, entry);
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
    pool->block[b] = (struct region_block){.next = KVD_POOL_NONE};
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
    if ((t->count - t->begin) % KVD_TABLE_ENTRIES == 0)
        block_add(pool, t);
    struct region_block *b = &pool->block[t->last];
    b->page[b->used++] = page;
    t->count++;
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
}

uint32_t table_get(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry)
{
    return entry >= t->begin && entry < t->count ? *entry_at(pool, t, entry) : KVD_POOL_NONE;
}

void table_truncate(struct kvd_pool *pool, struct region_table *t, uint32_t count)
{
    if (count >= t->count)
        return;
    uint32_t at = t->begin, keep = KVD_POOL_NONE;
    for (uint32_t b = t->first; b != KVD_POOL_NONE;) {
        struct region_block *block = &pool->block[b];
        uint32_t next = block->next;
        uint32_t stay = count > at ? KVD_MIN(count - at, block->used) : 0;
        at += block->used;
        for (uint32_t i = stay; i < block->used; i++)
            if (block->page[i] != KVD_POOL_NONE)
                kvd_pool_page_unref(pool, block->page[i]);
        block->used = stay;
        if (stay) {
            keep = b;
            if (at >= count)
                block->next = KVD_POOL_NONE;
        } else {
            block_free(pool, t, b);
        }
        b = next;
    }
    t->count = count;
    t->last = keep;
    if (keep == KVD_POOL_NONE) {
        t->first = KVD_POOL_NONE;
        t->count = t->begin = 0;
    }
}

void table_drop_front(struct kvd_pool *pool, struct region_table *t, uint32_t entry)
{
    if (entry >= t->count)
        table_truncate(pool, t, 0);
    while (t->first != KVD_POOL_NONE && entry > t->begin) {
        uint32_t b = t->first;
        struct region_block *block = &pool->block[b];
        uint32_t n = KVD_MIN(entry - t->begin, block->used);
        for (uint32_t i = 0; i < n; i++) {
            if (block->page[i] != KVD_POOL_NONE)
                kvd_pool_page_unref(pool, block->page[i]);
            block->page[i] = KVD_POOL_NONE;
        }
        if (n < KVD_TABLE_ENTRIES)
            return;
        t->first = block->next;
        t->begin += KVD_TABLE_ENTRIES;
        block_free(pool, t, b);
    }
}

void table_share(struct kvd_pool *pool, struct region_table *to, const struct region_table *from)
{
    to->begin = to->count = from->begin;
    for (uint32_t b = from->first; b != KVD_POOL_NONE; b = pool->block[b].next) {
        for (uint32_t i = 0; i < pool->block[b].used; i++) {
            uint32_t page = pool->block[b].page[i];
            entry_push(pool, to, page);
            if (page != KVD_POOL_NONE)
                pool->page[page].refs++;
        }
    }
}

uint32_t table_pages(const struct kvd_pool *pool, const struct region_table *t)
{
    uint32_t n = 0;
    for (uint32_t b = t->first; b != KVD_POOL_NONE; b = pool->block[b].next)
        for (uint32_t i = 0; i < pool->block[b].used; i++)
            n += pool->block[b].page[i] != KVD_POOL_NONE;
    return n;
}

uint32_t table_meet(const struct kvd_pool *pool, const struct region_table *t, uint32_t *met,
                    uint64_t *bytes)
{
    uint32_t n = 0;
    for (uint32_t b = t->first; b != KVD_POOL_NONE; b = pool->block[b].next) {
        for (uint32_t i = 0; i < pool->block[b].used; i++) {
            uint32_t page = pool->block[b].page[i];
            if (page == KVD_POOL_NONE)
                continue;
            n++;
            if (++met[page] == pool->page[page].refs)
                *bytes += pool->slab[page_extent(pool, page)->slab].page_bytes;
        }
    }
    return n;
}
