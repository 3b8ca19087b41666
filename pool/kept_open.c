// What the prefix indices of an earlier process kept of the pages. An index is a cache: one that is
// not sound is dropped, and its pages are free.
#include "pool/internal.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

static bool heads_ok(const struct kvd_plane *g)
{
    if (g->latent)
        return g->latent == 1 && g->kv_heads == 1 && g->q_heads &&
               g->q_heads <= KVD_MAX_LATENT_GROUP &&
               kvd_latent_dims_ok(g->head_dim_k, g->head_dim_v) && g->codec.k == KVD_CODEC_BF16;
    return g->kv_heads && g->kv_heads <= KVD_MAX_KV_HEADS && g->q_heads &&
           g->q_heads % g->kv_heads == 0 && g->q_heads / g->kv_heads <= KVD_MAX_GROUP &&
           kvd_head_dims_ok(g->head_dim_k, g->head_dim_v);
}

static bool plane_ok(const struct kvd_plane *g)
{
    return g->n_layers && g->n_layers <= KVD_MAX_LAYERS && heads_ok(g) &&
           g->codec.k < KVD_CODEC_COUNT && g->codec.v < KVD_CODEC_COUNT &&
           g->sink <= KVD_MAX_SINK && g->recent <= KVD_MAX_RECENT && !(g->window && g->sink);
}

bool layout_ok(const struct kvd_pool *pool, const struct region_layout *r)
{
    const struct kvd_layout *l = &r->l;
    uint32_t layers[KVD_MAX_PLANES] = {0};
    if (!l->n_planes || l->n_planes > KVD_MAX_PLANES || !l->n_layers ||
        l->n_layers > KVD_MAX_LAYERS || !memchr(l->rotation, 0, sizeof(l->rotation)) ||
        l->tp_size > KVD_MAX_TP_SIZE || l->tp_rank >= (l->tp_size ? l->tp_size : 1))
        return false;
    for (uint32_t i = 0; i < l->n_layers; i++) {
        if (l->plane_of[i] >= l->n_planes || (i && l->layers[i] <= l->layers[i - 1]))
            return false;
        layers[l->plane_of[i]]++;
    }
    for (uint32_t p = 0; p < l->n_planes; p++) {
        if (!plane_ok(&l->planes[p]) || layers[p] != l->planes[p].n_layers)
            return false;
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            if (!r->page_bytes[p][k] || r->page_bytes[p][k] % KVD_POOL_ALIGN ||
                r->page_bytes[p][k] > pool->head->extent_bytes)
                return false;
    }
    return true;
}

// -- finding ------------------------------------------------------------------------------------

static bool head_ok(const struct kvd_pool *pool, uint32_t ns, int fd, struct kept_head *h)
{
    struct stat st;
    return fstat(fd, &st) == 0 && pread(fd, h, sizeof(*h), 0) == (ssize_t)sizeof(*h) &&
           h->magic == KVD_KEPT_MAGIC && h->entries >= 1 && h->entries <= KVD_KEPT_MAX_ENTRIES &&
           h->bytes == kept_bytes(h->entries) && (uint64_t)st.st_size == h->bytes &&
           !memcmp(h->ns, pool->ns[ns].name, sizeof(h->ns));
}

// NULL: it is not sound, or there is no memory.
static struct kept *open_one(const struct kvd_pool *pool, uint32_t ns, int fd)
{
    struct kept *k = calloc(1, sizeof(*k));
    struct kvd_prefix_info info;
    struct kept_head h;
    if (!k) {
        close(fd);
        return NULL;
    }
    k->fd = fd;
    if (head_ok(pool, ns, fd, &h) && kept_map(k, h.entries, NULL) == KVD_OK) {
        uint64_t region = (uint64_t)((uint8_t *)k->layout_of - (uint8_t *)k->memory) - 4096;
        k->ix = kvd_prefix_open((uint8_t *)k->memory + 4096, region, NULL);
        if (k->ix)
            kvd_prefix_info(k->ix, &info);
        if (k->ix && info.capacity == h.entries)
            return k;
    }
    kept_unmap(&k);
    return NULL;
}

int kept_find(struct kvd_pool *pool, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    if (!pool->ops.index_find)
        return KVD_OK;
    pool->kept = calloc(h->max_namespaces, sizeof(*pool->kept));
    if (!pool->kept)
        return kvd_fail(err, -ENOMEM, "no memory for prefix indices");
    for (uint32_t ns = 0; ns < h->max_namespaces; ns++) {
        int fd = pool->ops.index_find(pool->ops.ctx, ns);
        if (fd < 0)
            continue;
        if (ns < h->n_namespaces && pool->ns[ns].name[0])
            pool->kept[ns] = open_one(pool, ns, fd);
        else
            close(fd);
        if (!pool->kept[ns])
            pool->ops.index_kept(pool->ops.ctx, ns, -1);
    }
    return KVD_OK;
}

// -- referring to pages -------------------------------------------------------------------------

static bool page_ok(const struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane,
                    uint32_t page)
{
    const struct region_head *h = pool->head;
    if (page == KVD_POOL_NONE)
        return true;
    if (page / h->slots >= h->n_extents || page_extent(pool, page)->slab >= h->n_slabs)
        return false;
    const struct region_slab *s = &pool->slab[page_extent(pool, page)->slab];
    return s->ns == ns && s->layout == layout && s->plane == plane &&
           slab_has_whole(s, page % h->slots);
}

// Each value has its own place in k->pages.
static bool entry_ok(const struct kvd_pool *pool, uint32_t ns,
                     const struct kvd_prefix_entry_info *e, uint8_t *taken)
{
    const struct kept *k = pool->kept[ns];
    uint32_t layout = k->layout_of[e->domain];
    if (layout >= pool->head->n_layouts || !layout_ok(pool, &pool->layout[layout]))
        return false;
    if (pool->layout[layout].l.n_planes > 1 && e->value != KVD_POOL_NONE)
        if (e->value >= k->entries || taken[e->value]++)
            return false;
    for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++)
        if (!page_ok(pool, ns, layout, p, kept_page(pool, k, layout, e->value, p)))
            return false;
    return true;
}

static bool all_ok(const struct kvd_pool *pool, uint32_t ns, uint8_t *taken)
{
    const struct kept *k = pool->kept[ns];
    struct kvd_prefix_info info;
    struct kvd_prefix_entry_info e;
    kvd_prefix_info(k->ix, &info);
    for (uint32_t i = 0; i < info.ever; i++)
        if (kvd_prefix_get(k->ix, i, &e) && !entry_ok(pool, ns, &e, taken))
            return false;
    return true;
}

static void refer_to_all(struct kvd_pool *pool, uint32_t ns, const uint8_t *taken)
{
    struct kept *k = pool->kept[ns];
    struct kvd_prefix_info info;
    struct kvd_prefix_entry_info e;
    kvd_prefix_info(k->ix, &info);
    for (uint32_t i = 0; i < info.ever; i++) {
        if (!kvd_prefix_get(k->ix, i, &e))
            continue;
        uint32_t layout = k->layout_of[e.domain];
        for (uint32_t p = 0; p < pool->layout[layout].l.n_planes; p++) {
            uint32_t page = kept_page(pool, k, layout, e.value, p);
            if (page == KVD_POOL_NONE)
                continue;
            page_ref_idle(pool, page);
            kept_count(pool, k, layout, page, 1);
        }
    }
    for (uint32_t v = k->entries; v-- > 0;) {
        if (taken[v] && !k->pages_ever)
            k->pages_ever = v + 1;
        if (taken[v] || !k->pages_ever)
            continue;
        k->pages[v].page[0] = k->pages_free;
        k->pages_free = v + 1;
    }
}

void kept_recover(struct kvd_pool *pool, uint32_t ns)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    uint8_t *taken KVD_FREE = k ? calloc(k->entries, 1) : NULL;
    if (!k)
        return;
    if (taken && all_ok(pool, ns, taken))
        refer_to_all(pool, ns, taken);
    else
        kept_close(pool, ns);
}
