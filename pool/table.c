// Page tables: chains of blocks of page numbers. A hole is KVD_POOL_NONE.
#include "pool/internal.h"

void table_init(struct region_table *t, uint32_t ns)
{
    *t = (struct region_table){.first = KVD_POOL_NONE, .last = KVD_POOL_NONE, .ns = ns};
}

static int block_add(struct kvd_pool *pool, struct region_table *t, struct kvd_error *err)
{
    struct region_head *h = pool->head;
    int rc = share_take(pool, t->ns, SHARE_BLOCKS, err);
    if (rc)
        return rc;
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
    return KVD_OK;
}

static int entry_push(struct kvd_pool *pool, struct region_table *t, uint32_t page,
                      struct kvd_error *err)
{
    if (t->count % KVD_TABLE_ENTRIES == 0) {
        int rc = block_add(pool, t, err);
        if (rc)
            return rc;
    }
    struct region_block *b = &pool->block[t->last];
    b->page[b->used++] = page;
    t->count++;
    return KVD_OK;
}

static uint32_t *entry_at(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry)
{
    uint32_t b = t->first;
    if (entry / KVD_TABLE_ENTRIES == (t->count - 1) / KVD_TABLE_ENTRIES) {
        b = t->last;
    } else {
        for (uint32_t i = entry / KVD_TABLE_ENTRIES; i > 0; i--)
            b = pool->block[b].next;
    }
    return &pool->block[b].page[entry % KVD_TABLE_ENTRIES];
}

int table_set(struct kvd_pool *pool, struct region_table *t, uint32_t entry, uint32_t page,
              struct kvd_error *err)
{
    while (t->count <= entry) {
        int rc = entry_push(pool, t, KVD_POOL_NONE, err);
        if (rc)
            return rc;
    }
    *entry_at(pool, t, entry) = page;
    return KVD_OK;
}

uint32_t table_get(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry)
{
    return entry < t->count ? *entry_at(pool, t, entry) : KVD_POOL_NONE;
}

void table_truncate(struct kvd_pool *pool, struct region_table *t, uint32_t count)
{
    if (count >= t->count)
        return;
    uint32_t at = 0, keep = KVD_POOL_NONE;
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
            block->next = pool->head->free_block;
            pool->head->free_block = b;
            pool->head->blocks--;
            pool->ns[t->ns].blocks--;
        }
        b = next;
    }
    t->count = count;
    t->last = keep;
    if (keep == KVD_POOL_NONE)
        t->first = KVD_POOL_NONE;
}

int table_share(struct kvd_pool *pool, struct region_table *to, const struct region_table *from,
                struct kvd_error *err)
{
    uint32_t before = to->count;
    for (uint32_t b = from->first; b != KVD_POOL_NONE; b = pool->block[b].next) {
        for (uint32_t i = 0; i < pool->block[b].used; i++) {
            uint32_t page = pool->block[b].page[i];
            int rc = entry_push(pool, to, page, err);
            if (rc) {
                table_truncate(pool, to, before);
                return rc;
            }
            if (page != KVD_POOL_NONE)
                pool->page[page].refs++;
        }
    }
    return KVD_OK;
}

uint32_t table_pages(const struct kvd_pool *pool, const struct region_table *t)
{
    uint32_t n = 0;
    for (uint32_t b = t->first; b != KVD_POOL_NONE; b = pool->block[b].next)
        for (uint32_t i = 0; i < pool->block[b].used; i++)
            n += pool->block[b].page[i] != KVD_POOL_NONE;
    return n;
}

void table_weigh(struct kvd_pool *pool, const struct region_table *t, int by, uint64_t *bytes)
{
    for (uint32_t b = t->first; b != KVD_POOL_NONE; b = pool->block[b].next) {
        for (uint32_t i = 0; i < pool->block[b].used; i++) {
            uint32_t page = pool->block[b].page[i];
            if (page == KVD_POOL_NONE)
                continue;
            pool->page[page].refs += (uint32_t)by;
            if (bytes && pool->page[page].refs == 0)
                *bytes += pool->slab[page_extent(pool, page)->slab].page_bytes;
        }
    }
}
