// Parts of pages, for sequences that are short.
//
// A page of windows has, of each tile, 64 rows of K and 64 of V. Where both are of one length,
// whoever is told an address a few rows further on finds his rows 0 to 15 in the page's 16 to 31,
// of every tile alike. So a page can serve two sequences of up to 32 rows, or four of 16, and who
// reads and writes rows need not know.
//
// Such a page has eight numbers. The first means none of it, and links it while it is free; 1 is
// all of it, 2 and 3 are its halves, 4 to 7 its quarters: those of part n are 2 n and 2 n + 1. So a
// number tells where a part lies and how large it is, and a page table's entry is all the truth
// there is, as for other pages. What is free of a page follows: halves that are both free are one.
//
// Free parts are in a list by size. The link back is in the number of the other half, which is in
// use, or cut up itself: were it free, both would be one.
#include "pool/internal.h"

uint32_t part_row_bytes(const struct kvd_pool *pool, uint32_t layout, uint32_t plane, uint32_t kind)
{
    const struct kvd_plane *g = &pool->layout[layout].l.planes[plane];
    uint64_t bytes = pool->layout[layout].page_bytes[plane][kind];
    uint32_t row = 2 * g->head_dim_k; // bf16
    bool fits = bytes >= PART_NUMBERS * KVD_POOL_ALIGN && bytes >= 2 * KVD_PAGE_TOKENS * row;
    return kind == KVD_POOL_BF16 && g->head_dim_k == g->head_dim_v && fits ? row : 0;
}

static uint32_t order_of(uint32_t page)
{
    uint32_t node = page % PART_NUMBERS;
    return node >= 4 ? 2 : node >= 2;
}

uint32_t part_row(uint32_t page)
{
    uint32_t order = order_of(page);
    return (page % PART_NUMBERS - (1u << order)) * (KVD_PAGE_TOKENS >> order);
}

uint32_t parts_lack(const struct region_slab *s, const uint32_t parts[KVD_POOL_PARTS])
{
    uint32_t quarters = parts[1] - KVD_MIN(parts[1], s->parts[1]);
    uint32_t halves = parts[0] + (quarters + 1) / 2;
    return (halves - KVD_MIN(halves, s->parts[0]) + 1) / 2;
}

// -- lists --------------------------------------------------------------------------------------

static void list(struct kvd_pool *pool, struct region_slab *s, uint32_t page)
{
    uint32_t *head = &s->part[order_of(page) - 1];
    pool->page[page].next = *head;
    pool->page[page ^ 1].next = KVD_POOL_NONE;
    if (*head != KVD_POOL_NONE)
        pool->page[*head ^ 1].next = page;
    *head = page;
    s->parts[order_of(page) - 1]++;
}

static void unlist(struct kvd_pool *pool, struct region_slab *s, uint32_t page)
{
    uint32_t next = pool->page[page].next, previous = pool->page[page ^ 1].next;
    if (previous == KVD_POOL_NONE)
        s->part[order_of(page) - 1] = next;
    else
        pool->page[previous].next = next;
    if (next != KVD_POOL_NONE)
        pool->page[next ^ 1].next = previous;
    s->parts[order_of(page) - 1]--;
}

// -- taking and giving --------------------------------------------------------------------------

// Of a half that is not listed: a quarter. The other one is free.
static uint32_t halve(struct kvd_pool *pool, struct region_slab *s, uint32_t half)
{
    uint32_t first = half - half % PART_NUMBERS + 2 * (half % PART_NUMBERS);
    list(pool, s, first + 1);
    return first;
}

uint32_t part_take(struct kvd_pool *pool, struct region_slab *s, uint32_t order)
{
    uint32_t page = s->part[order - 1];
    if (page != KVD_POOL_NONE) {
        unlist(pool, s, page);
        return page;
    }
    page = order == 2 ? part_take(pool, s, 1) : KVD_POOL_NONE;
    return page == KVD_POOL_NONE ? page : halve(pool, s, page);
}

uint32_t part_cut(struct kvd_pool *pool, struct region_slab *s, uint32_t first, uint32_t order)
{
    list(pool, s, first + 3);
    return order == 2 ? halve(pool, s, first + 2) : first + 2;
}

// Whether nothing of a part is in use; `first` is its page's.
static bool is_free(const struct kvd_pool *pool, uint32_t first, uint32_t node)
{
    const struct region_page *p = &pool->page[first];
    return !p[node].refs && (node >= 4 || (!p[2 * node].refs && !p[2 * node + 1].refs));
}

bool part_give(struct kvd_pool *pool, struct region_slab *s, uint32_t page)
{
    uint32_t node = page % PART_NUMBERS, first = page - node;
    while (node > 1 && is_free(pool, first, node ^ 1)) {
        unlist(pool, s, first + (node ^ 1));
        node /= 2;
    }
    if (node > 1)
        list(pool, s, first + node);
    return node == 1;
}

// -- rebuilding ---------------------------------------------------------------------------------

uint32_t parts_used(const struct kvd_pool *pool, uint32_t first)
{
    const struct region_page *p = &pool->page[first];
    uint32_t rows = 0;
    bool within = p[0].refs != 0;
    for (uint32_t node = 1; node < PART_NUMBERS; node++) {
        rows += p[node].refs ? KVD_PAGE_TOKENS >> order_of(node) : 0;
        within |= p[node].refs && node > 1 && (p[1].refs || (node >= 4 && p[node / 2].refs));
    }
    return within ? UINT32_MAX : rows;
}

void parts_relist(struct kvd_pool *pool, struct region_slab *s, uint32_t first)
{
    for (uint32_t half = 2; half <= 3 && !pool->page[first + 1].refs; half++) {
        if (is_free(pool, first, half))
            list(pool, s, first + half);
        else if (!pool->page[first + half].refs)
            for (uint32_t node = 2 * half; node <= 2 * half + 1; node++)
                if (is_free(pool, first, node))
                    list(pool, s, first + node);
    }
}
