// Opening the region of a pool that was damaged: the input is what to overwrite in a good one. It
// is refused, or all that it says it has can be used and given back.
#include "pool/internal.h"
#include "tests/fuzz/file.h"

enum { EXTENT = 2 << 20, EXTENTS = 4, SEQUENCES = 24, LAYERS = 2 };

struct patch {
    uint8_t table, bytes;
    uint16_t at;
};

static const struct kvd_pool_config config = {.bytes = (uint64_t)EXTENTS * EXTENT,
                                              .extent_bytes = EXTENT,
                                              .max_sequences = SEQUENCES,
                                              .max_namespaces = 4,
                                              .max_layouts = 4,
                                              .durable = true};
static struct {
    uint8_t *good, *spoiled; // the region as it was left, and as it is opened
    uint64_t bytes;
    int fd;
    struct {
        uint64_t at, bytes;
    } tables[9];
} all;

// -- memory, which nobody touches ---------------------------------------------------------------

static int make(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    (void)ctx;
    *addr = (1ull << 40) + index * bytes;
    return KVD_OK;
}

static void give(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    (void)ctx, (void)index, (void)addr, (void)bytes;
}

static int zero(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    (void)ctx, (void)index, (void)addr, (void)bytes;
    return KVD_OK;
}

static const struct kvd_pool_mem_ops ops = {
    .alloc = make, .free = give, .zero = zero, .attach = make};

// -- a good region ------------------------------------------------------------------------------

static void want(int rc)
{
    if (rc)
        abort();
}

static void append(struct kvd_pool *pool, uint64_t seq, uint64_t position, uint32_t tokens,
                   uint32_t layers)
{
    struct kvd_error err = {0};
    struct kvd_pool_append a;
    struct kvd_pool_append_request by = {.seq = seq,
                                         .position = position,
                                         .tokens = tokens,
                                         .layer_count = layers,
                                         .appender = 1,
                                         .request = position + 1};
    want(kvd_pool_append_begin(pool, &by, &a, &err));
    kvd_pool_append_commit(pool, &a);
}

static void fill(struct kvd_pool *pool)
{
    struct kvd_error err = {0};
    struct kvd_layout l = {.n_layers = LAYERS, .n_planes = 1, .layers = {0, 1}};
    l.planes[0] = (struct kvd_plane){.n_layers = LAYERS,
                                     .q_heads = 2,
                                     .kv_heads = 1,
                                     .head_dim_k = 64,
                                     .head_dim_v = 64,
                                     .codec = {KVD_CODEC_INT2, KVD_CODEC_INT2},
                                     .sink = 16,
                                     .recent = 32};
    uint64_t bytes[KVD_MAX_PLANES][KVD_POOL_KINDS] = {{65536, 16384}};
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t ns, layout;
        bool recycled;
        uint64_t seq, child;
        want(kvd_pool_namespace(pool, i % 2 ? "a" : "b", &ns, &err));
        want(kvd_pool_layout(pool, ns, &l, (const uint64_t(*)[KVD_POOL_KINDS])bytes, &layout,
                             &recycled, &err));
        want(kvd_pool_seq_new(pool, ns, layout, &seq, &err));
        append(pool, seq, 0, 1 + i * 90, LAYERS);
        want(kvd_pool_seq_fork(pool, seq, &child, &err));
        append(pool, child, 1 + i * 90, 200, i % 3 ? LAYERS : 1);
        if (i % 2)
            want(kvd_pool_publish(pool, seq,
                                  i == 1   ? "one"
                                  : i == 3 ? "two"
                                           : "three",
                                  true, &err));
        if (i == 5)
            kvd_pool_seq_release(pool, seq);
        if (i == 4)
            want(kvd_pool_truncate(pool, child, 100, &err));
    }
}

static void note_table(uint32_t i, const struct kvd_pool *pool, const void *at, uint64_t bytes)
{
    all.tables[i].at = (uint64_t)((const uint8_t *)at - (const uint8_t *)pool->head);
    all.tables[i].bytes = bytes;
}

static void make_good(void)
{
    struct kvd_error err = {0};
    struct kvd_pool *pool = kvd_pool_new(&config, &ops, &err);
    if (!pool)
        abort();
    fill(pool);
    const struct region_head *h = pool->head;
    note_table(0, pool, h, 128);
    note_table(1, pool, pool->journal, sizeof(*pool->journal));
    note_table(2, pool, pool->ns, sizeof(*pool->ns) * h->n_namespaces);
    note_table(3, pool, pool->layout, sizeof(*pool->layout) * h->n_layouts);
    note_table(4, pool, pool->slab, sizeof(*pool->slab) * h->n_slabs);
    note_table(5, pool, pool->extent, sizeof(*pool->extent) * EXTENTS);
    note_table(6, pool, pool->seq, sizeof(*pool->seq) * h->n_sequences_ever);
    note_table(7, pool, pool->block, sizeof(*pool->block) * h->n_blocks_ever);
    note_table(8, pool, h, h->region_bytes);
    all.bytes = h->region_bytes;
    all.good = malloc(all.bytes);
    if (!all.good)
        abort();
    memcpy(all.good, h, all.bytes);
    kvd_pool_leave(&pool);
    all.fd = memfd_create("region", MFD_CLOEXEC);
    if (all.fd < 0 || ftruncate(all.fd, (off_t)all.bytes))
        abort();
    all.spoiled = mmap(NULL, all.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, all.fd, 0);
    if (all.spoiled == MAP_FAILED)
        abort();
}

// -- a damaged one ------------------------------------------------------------------------------

static void spoil(const uint8_t *data, size_t size)
{
    struct patch p;
    memcpy(all.spoiled, all.good, all.bytes);
    while (size >= sizeof(p)) {
        memcpy(&p, data, sizeof(p));
        data += sizeof(p);
        size -= sizeof(p);
        size_t n = KVD_MIN(size, (size_t)p.bytes % 16 + 1), t = p.table % KVD_LEN(all.tables);
        if (all.tables[t].bytes <= n)
            continue;
        memcpy(all.spoiled + all.tables[t].at + p.at % (all.tables[t].bytes - n), data, n);
        data += n;
        size -= n;
    }
}

struct ids {
    uint64_t id[SEQUENCES];
    uint32_t n;
};

static bool note(void *ctx, const struct kvd_pool_seq_info *info)
{
    struct ids *ids = ctx;
    ids->id[ids->n++] = info->id;
    return ids->n < SEQUENCES;
}

static void use(struct kvd_pool *pool)
{
    struct ids ids = {.n = 0};
    struct kvd_error err = {0};
    struct kvd_pool_seq_info info;
    kvd_pool_seq_each(pool, note, &ids);
    for (uint32_t i = 0; i < ids.n; i++) {
        if (kvd_pool_seq_info(pool, ids.id[i], &info))
            continue; // evicted
        struct kvd_pool_append a;
        struct kvd_pool_append_request by = {
            .seq = ids.id[i], .position = info.length, .tokens = 100, .layer_count = 1};
        if (kvd_pool_append_begin(pool, &by, &a, &err) == KVD_OK)
            kvd_pool_append_abort(pool, &a);
        kvd_pool_truncate(pool, ids.id[i], info.length / 2, &err);
    }
    want(kvd_pool_set_holders(pool, ids.id, ids.n / 2, &err));
    want(kvd_pool_verify(pool, &err));
    want(kvd_pool_set_holders(pool, NULL, 0, &err));
    struct kvd_pool_evicted freed;
    while (kvd_pool_evict(pool, KVD_POOL_NONE, 0, 64, &freed))
        continue;
    want(kvd_pool_verify(pool, &err));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct kvd_error err = {0};
    if (!all.good)
        make_good();
    spoil(data, size);
    struct kvd_pool *pool = kvd_pool_open(all.fd, &config, &ops, &err);
    if (pool)
        use(pool);
    else if (!err.text[0])
        abort();
    kvd_pool_leave(&pool);
    return 0;
}
