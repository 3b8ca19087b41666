// What the prefix indices of namespaces keep: one reference to each page of their blocks.
//
// A namespace has an index of its own: what it publishes pushes out nothing that others have, but
// for room that is wanted, and how it uses its blocks again is learned from itself alone.
#include "pool/internal.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

enum {
    ENTRIES_MIN = 1 << 10,
    BYTES_PER_ENTRY = 16 << 10, // of the pool
};

// What is not touched costs address space only.
static void *map(uint64_t bytes, int fd)
{
    int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, fd, 0);
}

// Bytes of the memory that may outlive the process, and where its parts are.
static uint64_t lay_out(uint32_t entries, uint64_t *layouts, uint64_t *pages)
{
    struct kvd_prefix_config config = {.entries = entries, .domains = KVD_POOL_DOMAINS};
    *layouts = 4096 + kvd_round_up(kvd_prefix_region_bytes(&config), 4096);
    *pages = *layouts + kvd_round_up(KVD_POOL_DOMAINS * sizeof(uint32_t), 4096);
    return *pages + kvd_round_up((uint64_t)entries * sizeof(struct block_pages), 4096);
}

uint64_t kept_bytes(uint32_t entries)
{
    uint64_t layouts, pages;
    return lay_out(entries, &layouts, &pages);
}

int kept_map(struct kept *k, uint32_t entries, struct kvd_error *err)
{
    uint64_t ends = kvd_round_up((uint64_t)entries * sizeof(*k->end), 4096), layouts, pages;
    k->entries = entries;
    k->bytes = lay_out(entries, &layouts, &pages);
    uint64_t lines = kvd_round_up((uint64_t)entries * sizeof(*k->new_next), 4096);
    k->hint_bytes = ends + lines + kvd_div_up(entries, 8);
    k->memory = map(k->bytes, k->fd);
    k->hints = k->memory == MAP_FAILED ? MAP_FAILED : map(k->hint_bytes, -1);
    if (k->hints == MAP_FAILED) {
        kvd_fail(err, -ENOMEM, "no memory for a prefix index of %u entries", entries);
        if (k->memory != MAP_FAILED)
            munmap(k->memory, k->bytes);
        k->memory = NULL;
        return -ENOMEM;
    }
    k->layout_of = (void *)((uint8_t *)k->memory + layouts);
    k->pages = (void *)((uint8_t *)k->memory + pages);
    k->end = k->hints;
    k->new_next = (void *)((uint8_t *)k->hints + ends);
    k->superseded = (uint8_t *)k->hints + ends + lines;
    return KVD_OK;
}

void kept_unmap(struct kept **kept)
{
    struct kept *k = KVD_TAKE(*kept);
    if (!k)
        return;
    kvd_prefix_free(&k->ix);
    if (k->memory) {
        munmap(k->memory, k->bytes);
        munmap(k->hints, k->hint_bytes);
    }
    if (k->fd >= 0)
        close(k->fd);
    free(k);
}

// Memory behind a descriptor, if it is to outlive the process.
static int make_file(const struct kvd_pool *pool, struct kept *k, uint32_t entries,
                     struct kvd_error *err)
{
    if (pool->fd < 0 || !pool->ops.index_kept)
        return KVD_OK;
    k->fd = memfd_create("kvd-index", MFD_CLOEXEC);
    if (k->fd < 0 || ftruncate(k->fd, (off_t)kept_bytes(entries)))
        return kvd_fail(err, KVD_E_INTERNAL, "no memory for a prefix index of %u entries: %s",
                        entries, strerror(errno));
    return KVD_OK;
}

static struct kept *kept_new(struct kvd_pool *pool, uint32_t ns, uint32_t entries,
                             struct kvd_error *err)
{
    struct kvd_prefix_config config = {.entries = entries, .domains = KVD_POOL_DOMAINS};
    struct kept *k = calloc(1, sizeof(*k));
    if (!k) {
        kvd_fail(err, -ENOMEM, "no memory for a prefix index");
        return NULL;
    }
    k->fd = -1;
    if (getrandom(config.seed, sizeof(config.seed), 0) != (ssize_t)sizeof(config.seed))
        kvd_fail(err, -errno, "no random numbers for a prefix index: %s", strerror(errno));
    else if (make_file(pool, k, entries, err) == KVD_OK && kept_map(k, entries, err) == KVD_OK)
        k->ix = kvd_prefix_new(&config, (uint8_t *)k->memory + 4096, err);
    if (!k->ix) {
        kept_unmap(&k);
        return NULL;
    }
    struct kept_head *head = k->memory;
    head->bytes = k->bytes;
    head->entries = entries;
    memcpy(head->ns, pool->ns[ns].name, sizeof(head->ns));
    stored();
    head->magic = KVD_KEPT_MAGIC;
    if (k->fd >= 0)
        pool->ops.index_kept(pool->ops.ctx, ns, k->fd);
    return k;
}

int kept_open(struct kvd_pool *pool, uint32_t ns, struct kept **out, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    uint64_t entries = h->n_extents * h->extent_bytes / BYTES_PER_ENTRY;
    if (!pool->kept)
        pool->kept = calloc(h->max_namespaces, sizeof(*pool->kept));
    if (!pool->kept)
        return kvd_fail(err, -ENOMEM, "no memory for prefix indices");
    if (!pool->kept[ns])
        pool->kept[ns] = kept_new(pool, ns,
                                  (uint32_t)KVD_MIN(KVD_MAX(entries, (uint64_t)ENTRIES_MIN),
                                                    (uint64_t)KVD_KEPT_MAX_ENTRIES),
                                  err);
    if (!pool->kept[ns])
        return err ? err->code : -ENOMEM;
    *out = pool->kept[ns];
    return KVD_OK;
}

void kept_close(struct kvd_pool *pool, uint32_t ns)
{
    bool durable = pool->kept && pool->kept[ns] && pool->kept[ns]->fd >= 0;
    if (pool->vacated_of == ns)
        pool->vacated_of = KVD_POOL_NONE;
    if (pool->kept)
        kept_unmap(&pool->kept[ns]);
    if (durable)
        pool->ops.index_kept(pool->ops.ctx, ns, -1);
}

void kept_leave(struct kvd_pool *pool, uint32_t ns)
{
    if (pool->kept)
        kept_unmap(&pool->kept[ns]);
}

static bool has_planes(const struct kvd_pool *pool, uint32_t layout)
{
    return pool->layout[layout].l.n_planes > 1;
}

uint32_t kept_page(const struct kvd_pool *pool, const struct kept *k, uint32_t layout,
                   uint32_t value, uint32_t plane)
{
    if (value == KVD_POOL_NONE || !has_planes(pool, layout))
        return value;
    return k->pages[value].page[plane];
}

static uint32_t pages_new(struct kept *k)
{
    uint32_t at = k->pages_free ? k->pages_free - 1 : k->pages_ever++;
    if (k->pages_free)
        k->pages_free = k->pages[at].page[0];
    memset(&k->pages[at], 0xff, sizeof(k->pages[at]));
    stored(); // before an entry has it
    return at;
}

void kept_count(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t page, int by)
{
    uint64_t bytes = pool->slab[page_extent(pool, page)->slab].page_bytes;
    k->page_bytes += by > 0 ? bytes : -bytes;
    pool->layout[layout].kept += (uint64_t)by;
}

bool kept_refer(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t entry,
                const uint32_t page[KVD_MAX_PLANES])
{
    struct kvd_prefix_entry_info e;
    uint32_t value, *mine = &value;
    bool any = false;
    kvd_prefix_get(k->ix, entry, &e);
    value = e.value;
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++) {
        if (page[p] == KVD_POOL_NONE || kept_page(pool, k, layout, value, p) != KVD_POOL_NONE)
            continue;
        if (has_planes(pool, layout)) {
            value = value == KVD_POOL_NONE ? pages_new(k) : value;
            mine = &k->pages[value].page[p];
        }
        *mine = page[p];
        stored();
        page_ref_idle(pool, page[p]);
        kept_count(pool, k, layout, page[p], 1);
        any = true;
    }
    if (value != e.value)
        kvd_prefix_set(k->ix, entry, value);
    stored();
    if (any)
        kept_supersede(k, entry, false);
    return any;
}

bool kept_superseded(const struct kept *k, uint32_t entry)
{
    return k->superseded[entry / 8] >> entry % 8 & 1;
}

void kept_supersede(struct kept *k, uint32_t entry, bool on)
{
    uint8_t bit = (uint8_t)(1u << entry % 8);
    if (kept_superseded(k, entry) != on) // what is never set takes no memory
        k->superseded[entry / 8] ^= bit;
}

void kept_note_new(struct kept *k, uint32_t entry)
{
    if (k->new_next[entry])
        return;
    k->new_next[entry] = NEW_LAST;
    if (k->n_new++)
        k->new_next[k->new_last - 1] = entry + 1;
    else
        k->new_first = entry + 1;
    k->new_last = entry + 1;
}

void kept_add(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t entry,
              const uint32_t page[KVD_MAX_PLANES])
{
    if (kept_refer(pool, k, layout, entry, page) && pool->notes_new)
        kept_note_new(k, entry);
}

void kept_drop(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t value)
{
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++) {
        uint32_t page = kept_page(pool, k, layout, value, p);
        if (page == KVD_POOL_NONE)
            continue;
        kept_count(pool, k, layout, page, -1);
        page_unidle(pool, page);
        kvd_pool_page_unref(pool, page);
    }
    if (value == KVD_POOL_NONE || !has_planes(pool, layout))
        return;
    k->pages[value].page[0] = k->pages_free;
    k->pages_free = value + 1;
}

void kept_lose(struct kvd_pool *pool, struct kept *k, uint32_t layout, uint32_t entry,
               uint32_t plane)
{
    struct kvd_prefix_entry_info e;
    kvd_prefix_get(k->ix, entry, &e);
    uint32_t page = kept_page(pool, k, layout, e.value, plane);
    if (has_planes(pool, layout))
        k->pages[e.value].page[plane] = KVD_POOL_NONE;
    else
        kvd_prefix_set(k->ix, entry, KVD_POOL_NONE);
    stored(); // before the page is another's
    kept_count(pool, k, layout, page, -1);
    page_unidle(pool, page);
    kvd_pool_page_unref(pool, page);
}

struct region_seq *end_of(const struct kvd_pool *pool, uint32_t ns, uint32_t entry, uint32_t depth)
{
    const struct kept *k = pool->kept[ns];
    struct region_seq *s = k->end[entry] ? &pool->seq[k->end[entry] - 1] : NULL;
    if (!s || !(s->generation & 1) || !s->end_entry || s->ns != ns)
        return NULL;
    uint32_t at = s->end_entry - 1;
    uint64_t blocks = s->length / KVD_PAGE_TOKENS;
    struct kvd_prefix_entry_info e;
    for (; blocks > depth && at != KVD_PREFIX_NONE; blocks--)
        at = kvd_prefix_get(k->ix, at, &e) ? e.parent : KVD_PREFIX_NONE;
    return at == entry && blocks == depth ? s : NULL;
}
