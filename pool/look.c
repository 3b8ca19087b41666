// What evicting everything would free.
#include "pool/internal.h"

static bool met(const struct kvd_pool *pool, struct kvd_pool_look *look, uint32_t page,
                uint64_t *bytes)
{
    if (page == KVD_POOL_NONE)
        return false;
    if (++look->met[page] == pool->page[page].refs)
        *bytes += page_size(pool, page);
    return true;
}

static void add(struct kvd_pool_look *look, uint32_t ns, uint64_t bytes)
{
    look->bytes += bytes;
    if (look->by_namespace)
        look->by_namespace[ns] += bytes;
}

// -- sequences ----------------------------------------------------------------------------------

static uint32_t meet_sequence(const struct kvd_pool *pool, struct kvd_pool_look *look,
                              const struct region_seq *s)
{
    uint32_t seen = 0;
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int kind = 0; kind < KVD_POOL_KINDS; kind++) {
            const struct region_table *t = &s->table[p][kind];
            for (struct table_walk w = table_walk(t); w.block != KVD_POOL_NONE;
                 table_walk_on(pool, &w))
                for (uint32_t i = 0; i < w.n; i++)
                    seen += met(pool, look, pool->block[w.block].page[i], &bytes);
        }
    add(look, s->ns, bytes);
    return seen;
}

// -- blocks of prefix indices -------------------------------------------------------------------

// Marks what a held block keeps: itself, and all before it.
static uint32_t mark(const struct kept *k, struct kvd_pool_look *look, uint32_t entry)
{
    struct kvd_prefix_entry_info e;
    uint32_t n = 0;
    for (; entry < look->entries && !look->held[entry] && kvd_prefix_get(k->ix, entry, &e); n++) {
        look->held[entry] = 1;
        entry = e.parent;
    }
    return n;
}

static uint32_t meet_block(const struct kvd_pool *pool, struct kvd_pool_look *look,
                           const struct kvd_prefix_entry_info *e)
{
    const struct kept *k = pool->kept[look->ns];
    uint32_t layout = k->layout_of[e->domain], seen = 0;
    uint64_t bytes = 0;
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++)
        seen += met(pool, look, kept_page(pool, k, layout, e->value, p), &bytes);
    add(look, look->ns, bytes);
    return seen;
}

// Goes on with a namespace's index: first through what is held, then through the rest. False: it is
// done.
static bool index_on(const struct kvd_pool *pool, struct kvd_pool_look *look, uint32_t *seen,
                     uint32_t pages)
{
    const struct kept *k = pool->kept ? pool->kept[look->ns] : NULL;
    struct kvd_prefix_info info;
    struct kvd_prefix_entry_info e;
    if (!k)
        return false;
    if (!look->held) {
        kvd_prefix_info(k->ix, &info);
        look->entries = info.ever;
        look->entry = 0;
        look->counting = false;
        look->held = calloc(info.ever + 1, 1);
        if (!look->held)
            return false; // memory is short: they are not counted
    }
    for (; look->entry < look->entries && *seen < pages; look->entry++, ++*seen) {
        if (!kvd_prefix_get(k->ix, look->entry, &e))
            continue;
        if (!look->counting && e.holds)
            *seen += mark(k, look, look->entry);
        else if (look->counting && !look->held[look->entry])
            *seen += meet_block(pool, look, &e);
    }
    if (look->entry < look->entries)
        return true;
    if (look->counting)
        return false;
    look->counting = true;
    look->entry = 0;
    return true;
}

bool kvd_pool_look_step(struct kvd_pool *pool, struct kvd_pool_look *look, uint32_t pages)
{
    const struct region_head *h = pool->head;
    uint32_t seen = 0;
    if (!look->met) {
        lent_look(pool);
        look->met = calloc((size_t)h->n_extents * h->slots, sizeof(*look->met));
    }
    if (!look->met)
        return true; // memory is short, and nothing is known then
    for (; look->next < h->n_sequences_ever && seen < pages; look->next++) {
        const struct region_seq *s = &pool->seq[look->next];
        seen++;
        if (s->generation & 1 && s->listed && !s->pins)
            seen += meet_sequence(pool, look, s);
    }
    while (look->next == h->n_sequences_ever && look->ns < h->n_namespaces && seen < pages) {
        if (index_on(pool, look, &seen, pages))
            continue;
        free(KVD_TAKE(look->held));
        look->ns++;
        seen++;
    }
    if (look->next < h->n_sequences_ever || look->ns < h->n_namespaces)
        return false;
    if (look->by_namespace)
        lent_looked(pool, look->by_namespace);
    kvd_pool_look_drop(look);
    return true;
}

void kvd_pool_look_drop(struct kvd_pool_look *look)
{
    free(KVD_TAKE(look->met));
    free(KVD_TAKE(look->held));
}
