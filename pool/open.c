// Opens a region that another process has left, at whatever instant it ended. Nothing of it is
// believed before it is checked: what cannot be is refused.
#include "pool/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

// -- the head -----------------------------------------------------------------------------------

static int check_sizes(const struct region_head *h, const struct region_head *want,
                       struct kvd_error *err)
{
    if (h->extent_bytes != want->extent_bytes || h->n_extents != want->n_extents)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "the region is of a pool of %u extents of %llu bytes, and the "
                        "configuration wants %u of %llu",
                        h->n_extents, (unsigned long long)h->extent_bytes, want->n_extents,
                        (unsigned long long)want->extent_bytes);
    if (h->max_sequences != want->max_sequences || h->max_namespaces != want->max_namespaces ||
        h->max_layouts != want->max_layouts)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "the region has room for %u sequences, %u namespaces and %u layouts, and "
                        "the configuration wants %u, %u and %u",
                        h->max_sequences, h->max_namespaces, h->max_layouts, want->max_sequences,
                        want->max_namespaces, want->max_layouts);
    if (h->slots != want->slots || h->max_slabs != want->max_slabs ||
        h->max_blocks != want->max_blocks || h->first_generation & 1)
        return kvd_fail(err, KVD_E_CORRUPT, "the region's head contradicts itself");
    return KVD_OK;
}

static int check_head(int fd, const struct kvd_pool_config *config, struct region_head *want,
                      struct kvd_error *err)
{
    struct region_head *h KVD_FREE = malloc(sizeof(*h));
    struct kvd_pool unused;
    struct stat st;
    int rc = region_sizes(config, want, err);
    if (rc)
        return rc;
    if (!h)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (fstat(fd, &st) || pread(fd, h, sizeof(*h), 0) != (ssize_t)sizeof(*h) ||
        h->magic != KVD_POOL_MAGIC)
        return kvd_fail(err, KVD_E_INVALID, "this is no region of a pool");
    if (h->version != KVD_POOL_VERSION || h->shape != region_shape())
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "the region has version %u (%08x), and this kvd reads version %u (%08x)",
                        h->version, h->shape, KVD_POOL_VERSION, region_shape());
    rc = check_sizes(h, want, err);
    if (rc)
        return rc;
    want->region_bytes = region_lay_out(&unused, want, NULL);
    if (h->region_bytes != want->region_bytes || (uint64_t)st.st_size != want->region_bytes)
        return kvd_fail(err, KVD_E_CORRUPT, "the region has %lld bytes and says %llu, not %llu",
                        (long long)st.st_size, (unsigned long long)h->region_bytes,
                        (unsigned long long)want->region_bytes);
    if (h->n_sequences_ever > h->max_sequences || h->n_slabs > h->max_slabs ||
        h->n_layouts > h->max_layouts || h->n_namespaces > h->max_namespaces)
        return kvd_fail(err, KVD_E_CORRUPT, "the region's head contradicts itself");
    return KVD_OK;
}

// -- records ------------------------------------------------------------------------------------

static bool ends(const char *text, size_t size)
{
    return memchr(text, 0, size) != NULL;
}

static int check_sequence(const struct kvd_pool *pool, uint32_t i, struct kvd_error *err)
{
    const struct region_seq *s = &pool->seq[i];
    const struct region_head *h = pool->head;
    if (s->ns >= h->n_namespaces || !pool->ns[s->ns].name[0] || s->layout >= h->n_layouts ||
        !layout_ok(pool, &pool->layout[s->layout]))
        return kvd_fail(err, KVD_E_CORRUPT, "sequence %u is of no namespace and layout", i);
    if (!ends(s->name, sizeof(s->name)) || (s->name[0] && !kvd_name_valid(s->name, KVD_MAX_NAME)) ||
        s->phase > PHASE_UNDOING)
        return kvd_fail(err, KVD_E_CORRUPT, "sequence %u has no valid name or phase", i);
    return pool_check_state(pool, s, err);
}

// The records as far as rebuilding goes by them; and those of processes are forgotten.
static int check_records(struct kvd_pool *pool, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    for (uint32_t i = 0; i < h->n_namespaces; i++) {
        struct region_namespace *n = &pool->ns[i];
        if (!ends(n->name, sizeof(n->name)) ||
            (n->name[0] && (!kvd_name_valid(n->name, KVD_MAX_NAMESPACE) ||
                            kvd_pool_namespace_find(pool, n->name) != i)))
            return kvd_fail(err, KVD_E_CORRUPT, "namespace %u has no valid name of its own", i);
        n->holders = 0;
        n->kept = false;
    }
    for (uint32_t i = 0; i < h->n_layouts; i++)
        pool->layout[i].holders = 0;
    for (uint32_t i = 0; i < h->n_sequences_ever; i++) {
        struct region_seq *s = &pool->seq[i];
        int rc = s->generation & 1 ? check_sequence(pool, i, err) : KVD_OK;
        if (rc)
            return rc;
        s->pins = 0;
    }
    for (uint32_t x = 0; x < h->n_extents; x++)
        pool->extent[x].aside = false;
    return KVD_OK;
}

static int check_names(const struct kvd_pool *pool, struct kvd_error *err)
{
    for (uint32_t b = 0; b < KVD_NAME_BUCKETS; b++)
        for (uint32_t i = pool->head->name_bucket[b]; i != KVD_POOL_NONE;
             i = pool->seq[i].name_next)
            for (uint32_t j = pool->seq[i].name_next; j != KVD_POOL_NONE;
                 j = pool->seq[j].name_next)
                if (pool->seq[i].ns == pool->seq[j].ns &&
                    strcmp(pool->seq[i].name, pool->seq[j].name) == 0)
                    return kvd_fail(err, KVD_E_CORRUPT, "sequences %u and %u have one name", i, j);
    return KVD_OK;
}

// -- what was not finished ----------------------------------------------------------------------

static void finish(struct kvd_pool *pool)
{
    for (uint32_t i = 0; i < pool->head->n_sequences_ever; i++) {
        struct region_seq *s = &pool->seq[i];
        if (!(s->generation & 1))
            continue;
        seq_pin(pool, s);
        append_recover(pool, s);
        seq_unpin(pool, s);
        if (s->doomed || (s->holders == 0 && !s->name[0])) {
            lru_remove(pool, s);
            name_remove(pool, s);
            seq_destroy(pool, s);
        }
    }
    for (uint32_t i = 0; i < pool->head->n_layouts; i++)
        if (pool->layout[i].sequences == 0 && pool->layout[i].kept == 0)
            memset(&pool->layout[i].l, 0, sizeof(pool->layout[i].l));
    for (uint32_t i = 0; i < pool->head->n_namespaces; i++)
        if (pool->ns[i].name[0])
            namespace_settle(pool, i);
}

// Extents are granted and free as rebuilding has found them.
static int attach(struct kvd_pool *pool, struct kvd_error *err)
{
    for (uint32_t x = 0; x < pool->head->n_extents; x++) {
        struct region_extent *e = &pool->extent[x];
        int rc = KVD_E_NOT_FOUND;
        if (e->addr)
            rc = pool->ops.attach(pool->ops.ctx, x, pool->head->extent_bytes, &e->addr);
        if (rc == KVD_E_NOT_FOUND && e->slab == KVD_POOL_NONE) {
            e->addr = 0;
            stored();
            e->owner = KVD_POOL_NONE;
        } else if (rc) {
            return kvd_fail(err, rc, "extent %u, which has pages in use, is not there", x);
        }
    }
    return KVD_OK;
}

static int recover(struct kvd_pool *pool, struct kvd_error *err)
{
    int rc = journal_undo(pool, err);
    if (rc == KVD_OK)
        rc = check_records(pool, err);
    if (rc == KVD_OK)
        rc = kept_find(pool, err);
    pool->opening = true;
    if (rc == KVD_OK)
        rc = kvd_pool_rebuild(pool, err);
    pool->opening = false;
    if (rc == KVD_OK)
        rc = check_names(pool, err);
    if (rc)
        return rc;
    finish(pool);
    rc = attach(pool, err);
    return rc ? rc : kvd_pool_verify(pool, err);
}

static void *map(int fd, const struct kvd_pool_config *config, struct region_head *want,
                 struct kvd_error *err)
{
    if (check_head(fd, config, want, err))
        return NULL;
    void *base =
        mmap(NULL, want->region_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base != MAP_FAILED)
        return base;
    kvd_fail(err, KVD_E_INTERNAL, "cannot map the pool's region: %s", strerror(errno));
    return NULL;
}

struct kvd_pool *kvd_pool_open(int fd, const struct kvd_pool_config *config,
                               const struct kvd_pool_mem_ops *ops, struct kvd_error *err)
{
    struct region_head *want KVD_FREE = calloc(1, sizeof(*want));
    struct kvd_pool *pool = calloc(1, sizeof(*pool));
    int copy KVD_CLOSE = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    void *base = NULL;
    if (!want || !pool || copy < 0)
        kvd_fail(err, KVD_E_INTERNAL, "cannot open the pool's region: %s", strerror(errno));
    else
        base = map(copy, config, want, err);
    if (base && idle_init(pool, want, err)) {
        munmap(base, want->region_bytes);
        base = NULL;
    }
    if (!base) {
        free(pool);
        return NULL;
    }
    region_lay_out(pool, want, base);
    pool->fd = KVD_TAKE_FD(copy);
    pool_begin(pool, config, ops);
    if (recover(pool, err))
        kvd_pool_leave(&pool);
    return pool;
}
