// Region layout, namespaces, layouts and the summary counters.
#include "pool/internal.h"

#include <errno.h>
#include <sys/mman.h>

uint32_t region_shape(void)
{
    const size_t sizes[] = {sizeof(struct region_head),       sizeof(struct region_journal),
                            sizeof(struct region_namespace),  sizeof(struct region_layout),
                            sizeof(struct region_slab),       sizeof(struct region_extent),
                            sizeof(struct region_seq),        sizeof(struct region_block),
                            sizeof(struct region_page),       offsetof(struct region_seq, table),
                            offsetof(struct region_seq, name)};
    uint32_t shape = 0;
    for (size_t i = 0; i < KVD_LEN(sizes); i++)
        shape = shape * 31 + (uint32_t)sizes[i];
    return shape;
}

uint64_t region_lay_out(struct kvd_pool *p, const struct region_head *h, uint8_t *base)
{
    uint64_t at = 0;
#define PLACE(field, count)                                                                        \
    do {                                                                                           \
        at = kvd_round_up(at, 4096);                                                               \
        p->field = base ? (void *)(base + at) : NULL;                                              \
        at += (uint64_t)(count) * sizeof(*p->field);                                               \
    } while (0)
    PLACE(head, 1);
    PLACE(journal, 1);
    PLACE(ns, h->max_namespaces);
    PLACE(layout, h->max_layouts);
    PLACE(slab, h->max_slabs);
    PLACE(slab_at, (uint64_t)h->max_namespaces * h->max_layouts * KVD_MAX_PLANES * KVD_POOL_KINDS);
    PLACE(extent, h->n_extents);
    PLACE(seq, h->max_sequences);
    PLACE(block, h->max_blocks);
    PLACE(page, (uint64_t)h->n_extents * h->slots);
    PLACE(sum, (uint64_t)h->n_extents * h->slots);
#undef PLACE
    return kvd_round_up(at, 4096);
}

int region_sizes(const struct kvd_pool_config *c, struct region_head *h, struct kvd_error *err)
{
    if (c->extent_bytes < KVD_EXTENT_MIN || c->extent_bytes % KVD_EXTENT_MIN)
        return kvd_fail(err, KVD_E_INVALID, "extent size %llu is not a multiple of 2 MiB",
                        (unsigned long long)c->extent_bytes);
    uint64_t extents = c->bytes / c->extent_bytes;
    uint64_t slots = c->extent_bytes / KVD_POOL_ALIGN;
    if (extents == 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "pool size %llu is smaller than one extent of %llu bytes",
                        (unsigned long long)c->bytes, (unsigned long long)c->extent_bytes);
    if (extents * slots >= KVD_POOL_NONE)
        return kvd_fail(
            err, KVD_E_INVALID, "pool size %llu is beyond the %llu bytes that page numbers reach",
            (unsigned long long)c->bytes, (unsigned long long)KVD_POOL_NONE * KVD_POOL_ALIGN);
    h->magic = KVD_POOL_MAGIC;
    h->version = KVD_POOL_VERSION;
    h->shape = region_shape();
    h->extent_bytes = c->extent_bytes;
    h->n_extents = (uint32_t)extents;
    h->slots = (uint32_t)slots;
    h->max_namespaces = c->max_namespaces;
    h->max_layouts = c->max_layouts;
    h->max_slabs = h->n_extents + 1; // one may be about to get its first
    h->max_sequences = c->max_sequences;
    h->first_generation = c->id_seed & ~1u;
    // Two blocks per sequence, one for every page, and as many again for what forks share.
    h->max_blocks = 2 * c->max_sequences + 2 * (h->n_extents * h->slots / KVD_TABLE_ENTRIES + 1);
    return KVD_OK;
}

// Untouched tables cost address space only.
static void *map(uint64_t bytes, bool durable, int *fd, struct kvd_error *err)
{
    int flags = durable ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    int file KVD_CLOSE = durable ? memfd_create("kvd-pool", MFD_CLOEXEC) : -1;
    void *base = MAP_FAILED;
    if (!durable || (file >= 0 && ftruncate(file, (off_t)bytes) == 0))
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, file, 0);
    if (base == MAP_FAILED) {
        kvd_fail(err, -errno, "cannot map %llu bytes of pool metadata: %s",
                 (unsigned long long)bytes, strerror(errno));
        return NULL;
    }
    *fd = KVD_TAKE_FD(file);
    return base;
}

void pool_begin(struct kvd_pool *pool, const struct kvd_pool_config *config,
                const struct kvd_pool_mem_ops *ops)
{
    pool->ops = *ops;
    pool->on_evict = config->on_evict;
    pool->on_evict_ctx = config->on_evict_ctx;
    pool->on_block_gone = config->on_block_gone;
    pool->on_superseded = config->on_superseded;
}

struct kvd_pool *kvd_pool_new(const struct kvd_pool_config *config,
                              const struct kvd_pool_mem_ops *ops, struct kvd_error *err)
{
    struct region_head *h KVD_FREE = calloc(1, sizeof(*h));
    struct kvd_pool *pool KVD_FREE = calloc(1, sizeof(*pool));
    if (!h || !pool) {
        kvd_fail(err, -ENOMEM, "no memory for the pool");
        return NULL;
    }
    if (region_sizes(config, h, err) || idle_init(pool, h, err))
        return NULL;
    h->region_bytes = region_lay_out(pool, h, NULL);
    void *base = map(h->region_bytes, config->durable, &pool->fd, err);
    if (!base) {
        idle_deinit(pool);
        return NULL;
    }
    pool_begin(pool, config, ops);
    region_lay_out(pool, h, base);
    h->free_extent = 0;
    h->free_seq = h->free_block = h->free_slab = KVD_POOL_NONE;
    memset(h->name_bucket, 0xff, sizeof(h->name_bucket));
    memcpy(pool->head, h, sizeof(*h));
    for (uint32_t i = 0; i < h->n_extents; i++) {
        struct region_extent *e = &pool->extent[i];
        e->slab = e->owner = e->free_slot = e->prev = KVD_POOL_NONE;
        e->next = i + 1 < h->n_extents ? i + 1 : KVD_POOL_NONE;
    }
    return KVD_TAKE(pool);
}

void kvd_pool_leave(struct kvd_pool **poolp)
{
    struct kvd_pool *pool = KVD_TAKE(*poolp);
    if (!pool)
        return;
    vacate_drop(pool);
    for (uint32_t i = 0; pool->kept && i < pool->head->max_namespaces; i++)
        kept_leave(pool, i);
    free(pool->kept);
    free(pool->blocks_room);
    idle_deinit(pool);
    munmap(pool->head, pool->head->region_bytes);
    if (pool->fd >= 0)
        close(pool->fd);
    free(pool);
}

void kvd_pool_free(struct kvd_pool **poolp)
{
    struct kvd_pool *pool = KVD_TAKE(*poolp);
    if (!pool)
        return;
    for (uint32_t i = 0; i < pool->head->n_extents; i++)
        if (pool->extent[i].addr)
            pool->ops.free(pool->ops.ctx, i, pool->extent[i].addr, pool->head->extent_bytes);
    kvd_pool_leave(&pool);
}

int kvd_pool_fd(const struct kvd_pool *pool)
{
    return pool->fd;
}

uint32_t kvd_pool_namespace_find(const struct kvd_pool *pool, const char *name)
{
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++)
        if (strcmp(pool->ns[i].name, name) == 0)
            return i;
    return KVD_POOL_NONE;
}

int kvd_pool_namespace(struct kvd_pool *pool, const char *name, uint32_t *ns, struct kvd_error *err)
{
    if (!kvd_name_valid(name, KVD_MAX_NAMESPACE))
        return kvd_fail(err, KVD_E_INVALID,
                        "a namespace's name has 1 to %d printable ASCII characters and no spaces",
                        KVD_MAX_NAMESPACE);
    uint32_t i = kvd_pool_namespace_find(pool, name);
    if (i == KVD_POOL_NONE) {
        i = namespace_slot(pool);
        if (i == KVD_POOL_NONE)
            return kvd_fail(err, KVD_E_LIMIT,
                            "all %u namespaces are in use: by sessions, sequences that are held, "
                            "quotas or the configuration; end or free some",
                            pool->head->max_namespaces);
        journal_note(pool, &pool->ns[i], sizeof(pool->ns[i]));
        pool->ns[i] =
            (struct region_namespace){.lru_first = KVD_POOL_NONE, .lru_last = KVD_POOL_NONE};
        snprintf(pool->ns[i].name, sizeof(pool->ns[i].name), "%s", name);
        journal_end(pool);
        lent_forget(pool, i);
    }
    pool->ns[i].holders++;
    *ns = i;
    return KVD_OK;
}

void kvd_pool_namespace_release(struct kvd_pool *pool, uint32_t ns)
{
    pool->ns[ns].holders--;
    namespace_settle(pool, ns);
}

void kvd_pool_namespace_keep(struct kvd_pool *pool, uint32_t ns, bool keep)
{
    pool->ns[ns].kept = keep;
    namespace_settle(pool, ns);
}

void kvd_pool_set_quota(struct kvd_pool *pool, uint32_t ns, uint64_t bytes)
{
    pool->ns[ns].quota = bytes;
    namespace_settle(pool, ns);
}

uint32_t kvd_pool_namespace_count(const struct kvd_pool *pool)
{
    return pool->head->n_namespaces;
}

void kvd_pool_namespace_info(const struct kvd_pool *pool, uint32_t ns,
                             struct kvd_pool_namespace_info *out)
{
    const struct region_namespace *n = &pool->ns[ns];
    *out = (struct kvd_pool_namespace_info){.name = n->name,
                                            .quota = n->quota,
                                            .borrow = lent_to(pool, ns),
                                            .used = n->used,
                                            .pages = n->pages,
                                            .sequences = n->sequences,
                                            .tokens = n->tokens,
                                            .blocks = n->blocks,
                                            .evictable = evictable_bytes(pool, ns),
                                            .holders = n->holders};
}

uint32_t kvd_pool_layout_find(const struct kvd_pool *pool, const struct kvd_layout *l)
{
    for (uint32_t i = 0; i < pool->head->n_layouts; i++)
        if (memcmp(&pool->layout[i].l, l, sizeof(*l)) == 0)
            return i;
    return KVD_POOL_NONE;
}

static int check_pages(const struct kvd_pool *pool, const struct kvd_layout *l,
                       const uint64_t (*page_bytes)[KVD_POOL_KINDS], struct kvd_error *err)
{
    for (uint32_t p = 0; p < l->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            if (page_bytes[p][k] == 0 || page_bytes[p][k] > pool->head->extent_bytes)
                return kvd_fail(err, KVD_E_INVALID,
                                "a page of this layout%s has %llu bytes and does not fit an extent "
                                "of %llu; raise extent-size",
                                l->n_planes > 1 ? "'s planes" : "",
                                (unsigned long long)page_bytes[p][k],
                                (unsigned long long)pool->head->extent_bytes);
    return KVD_OK;
}

int kvd_pool_layout(struct kvd_pool *pool, uint32_t ns, const struct kvd_layout *l,
                    const uint64_t (*page_bytes)[KVD_POOL_KINDS], uint32_t *layout, bool *recycled,
                    struct kvd_error *err)
{
    uint32_t i = kvd_pool_layout_find(pool, l);
    *recycled = false;
    if (i == KVD_POOL_NONE && check_pages(pool, l, page_bytes, err))
        return KVD_E_INVALID;
    bool in_use = i != KVD_POOL_NONE && kvd_pool_layout_refs(pool, i);
    if (!in_use && !layout_room(pool, ns))
        return kvd_fail(err, KVD_E_LIMIT,
                        "namespace %s uses its share of the %u layouts, as many as are left "
                        "free; close sessions or free sequences of others",
                        pool->ns[ns].name, pool->head->max_layouts);
    if (i == KVD_POOL_NONE) {
        i = layout_slot(pool, recycled);
        // Opening forgets it until a sequence has it.
        pool->layout[i] = (struct region_layout){.l = *l};
        stored();
        for (uint32_t p = 0; p < l->n_planes; p++)
            for (int k = 0; k < KVD_POOL_KINDS; k++)
                pool->layout[i].page_bytes[p][k] = kvd_round_up(page_bytes[p][k], KVD_POOL_ALIGN);
        stored();
    }
    if (!in_use)
        pool->layout[i].ns = ns;
    pool->layout[i].holders++;
    *layout = i;
    return KVD_OK;
}

void kvd_pool_layout_ref(struct kvd_pool *pool, uint32_t layout)
{
    pool->layout[layout].holders++;
}

void kvd_pool_layout_unref(struct kvd_pool *pool, uint32_t layout)
{
    pool->layout[layout].holders--;
}

const struct kvd_layout *kvd_pool_layout_get(const struct kvd_pool *pool, uint32_t layout)
{
    return &pool->layout[layout].l;
}

uint64_t kvd_pool_page_bytes(const struct kvd_pool *pool, uint32_t layout, uint32_t plane,
                             enum kvd_pool_kind kind)
{
    return pool->layout[layout].page_bytes[plane][kind];
}

void kvd_pool_info(const struct kvd_pool *pool, struct kvd_pool_info *out)
{
    const struct region_head *h = pool->head;
    *out = (struct kvd_pool_info){
        .bytes = (uint64_t)h->n_extents * h->extent_bytes,
        .extent_bytes = h->extent_bytes,
        .extents = h->n_extents,
        .extents_granted = h->extents_granted,
        .used = h->used,
        .slack = (uint64_t)h->extents_granted * h->extent_bytes - h->used,
        .evictions = h->evictions,
        .metadata = h->region_bytes,
        .sequences = h->sequences,
        .tokens = h->tokens,
        .damaged = h->damaged,
    };
    for (uint32_t i = 0; i < h->n_extents; i++)
        out->extents_made += pool->extent[i].addr != 0;
}

void kvd_pool_slab_each(const struct kvd_pool *pool,
                        bool (*fn)(void *ctx, const struct kvd_pool_slab_info *), void *ctx)
{
    for (uint32_t i = 0; i < pool->head->n_slabs; i++) {
        const struct region_slab *s = &pool->slab[i];
        if (s->layout == KVD_POOL_NONE)
            continue;
        struct kvd_pool_slab_info info = {.ns = s->ns,
                                          .layout = s->layout,
                                          .plane = s->plane,
                                          .kind = s->kind,
                                          .extents = s->extents,
                                          .page_bytes = s->page_bytes,
                                          .used = s->used,
                                          .free = (uint64_t)s->extents * s->slots - s->used};
        if (!fn(ctx, &info))
            return;
    }
}
