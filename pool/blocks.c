// Publishing blocks: a sequence's sealed pages get keys. Read blocks.h first.
#include "pool/blocks_internal.h"

#include <errno.h>

enum { EVICT_FOR_A_DOMAIN = 1024 };

struct blocks_room *blocks_room(struct kvd_pool *pool, struct kvd_error *err)
{
    if (!pool->blocks_room)
        pool->blocks_room = malloc(sizeof(*pool->blocks_room));
    if (!pool->blocks_room)
        kvd_fail(err, -ENOMEM, "no memory to look at blocks");
    else
        memset(pool->blocks_room->none, 0xff, sizeof(pool->blocks_room->none));
    return pool->blocks_room;
}

void blocks_path(const struct kept *k, uint32_t entry, uint32_t depth, uint32_t *path)
{
    struct kvd_prefix_entry_info e;
    for (uint32_t i = depth; i-- > 0; entry = e.parent) {
        path[i] = entry;
        kvd_prefix_get(k->ix, entry, &e);
    }
}

uint64_t blocks_least_length(const struct kvd_pool *pool, const struct region_seq *s)
{
    uint64_t least = 0;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        if (layout_of(pool, s)->planes[p].window && s->reach[p].first)
            least = KVD_MAX(least, s->reach[p].first + layout_of(pool, s)->planes[p].window - 1);
    return least;
}

// Blocks of a sequence that are sealed in every plane.
static uint32_t sealed_blocks(const struct kvd_layout *l, const struct region_seq *s)
{
    uint64_t sealed = s->length;
    for (uint32_t p = 0; p < l->n_planes; p++)
        if (s->length > l->planes[p].sink)
            sealed = KVD_MIN(sealed, s->reach[p].hist_end);
    return (uint32_t)(sealed / KVD_PAGE_TOKENS);
}

// The pages of blocks [from, to) in every plane: of the sink, and of history.
static void pages_of(const struct kvd_pool *pool, const struct region_seq *s, uint32_t from,
                     uint32_t to, struct block_pages *out)
{
    const struct kvd_layout *l = layout_of(pool, s);
    for (uint32_t p = 0; p < l->n_planes; p++) {
        uint32_t sink = l->planes[p].sink / KVD_PAGE_TOKENS;
        uint32_t cut = KVD_MIN(KVD_MAX(sink, from), to);
        for (uint32_t i = from; i < cut; i++)
            out[i].page[p] = table_get(pool, &s->table[p][KVD_POOL_BF16], i);
        if (cut < to)
            table_read(pool, &s->table[p][KVD_POOL_CODEC], cut - sink, to - cut, &out[cut].page[p],
                       KVD_MAX_PLANES);
    }
}

// -- ends ---------------------------------------------------------------------------------------

static void pass_ends(struct kvd_pool *pool, uint32_t ns, const uint32_t *path, uint32_t blocks)
{
    for (uint32_t i = 0; i < blocks; i++) {
        struct region_seq *end = end_of(pool, ns, path[i], i + 1);
        if (!end || end->end_entry != path[i] + 1 || end->lru_stamp == 0)
            continue;
        lru_move(pool, end, true);
        pool->kept[ns]->ends_passed++;
    }
}

static int make_end(struct kvd_pool *pool, struct region_seq *s, const uint32_t *path,
                    uint32_t sealed, uint32_t blocks, struct kvd_error *err)
{
    struct kept *k = pool->kept[s->ns];
    uint32_t last = path[blocks - 1];
    uint64_t id;
    int rc = kvd_pool_seq_fork(pool, seq_id(pool, s), &id, err);
    if (rc)
        return rc;
    rc = kvd_pool_truncate(pool, id, (uint64_t)blocks * KVD_PAGE_TOKENS, err);
    if (rc) {
        kvd_pool_seq_release(pool, id);
        return rc;
    }
    struct region_seq *end = seq_find(pool, id);
    if (end->held_entry)
        kvd_prefix_release(k->ix, end->held_entry - 1);
    end->held_entry = 0;
    end->end_entry = last + 1;
    end->holders = 0; // without a name, so it is freed when the region is opened
    stored();
    lru_add(pool, end);
    for (uint32_t i = KVD_MIN(sealed, blocks - 1); i < blocks; i++)
        if (path[i] == last || !end_of(pool, s->ns, path[i], i + 1))
            k->end[path[i]] = (uint32_t)(end - pool->seq) + 1;
    k->ends++;
    return KVD_OK;
}

static int see_to_end(struct kvd_pool *pool, struct region_seq *s, const uint32_t *path,
                      uint32_t sealed, uint32_t blocks, struct kvd_error *err)
{
    struct region_seq *end = end_of(pool, s->ns, path[blocks - 1], blocks);
    int rc = KVD_OK;
    if (end && end->end_entry == path[blocks - 1] + 1) {
        lru_move(pool, end, false);
    } else {
        rc = make_end(pool, s, path, sealed, blocks, err);
    }
    if (rc == KVD_OK)
        pass_ends(pool, s->ns, path, blocks - 1);
    return rc;
}

// -- publishing ---------------------------------------------------------------------------------

int blocks_seq(const struct kvd_pool *pool, const struct kvd_blocks_space *space, uint64_t seq,
               const struct region_seq **out, struct kvd_error *err)
{
    const struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    if (s->ns != space->ns || s->layout != space->layout)
        return kvd_fail(err, KVD_E_PRECONDITION, "sequence %llu is of another namespace or layout",
                        (unsigned long long)seq);
    *out = s;
    return KVD_OK;
}

static int check(const struct kvd_pool *pool, const struct kvd_blocks_space *space, uint64_t seq,
                 bool end, struct kvd_error *err)
{
    const struct region_seq *s = NULL;
    int rc = blocks_seq(pool, space, seq, &s, err);
    if (rc)
        return rc;
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        if (layout_of(pool, s)->planes[p].sink % KVD_PAGE_TOKENS)
            return kvd_fail(err, KVD_E_UNSUPPORTED,
                            "a sink of %u tokens: blocks can be shared where the sink is a "
                            "multiple of %d",
                            layout_of(pool, s)->planes[p].sink, KVD_PAGE_TOKENS);
    if (end && s->pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %llu has an append that reached %u layers; finish it before its "
                        "end is published",
                        (unsigned long long)seq, s->pending_layers);
    return KVD_OK;
}

int blocks_domain(struct kvd_pool *pool, struct kept *k, const struct kvd_blocks_space *space,
                  uint32_t *domain, struct kvd_error *err)
{
    int rc = kvd_prefix_domain(k->ix, space->domain, domain, err);
    if (rc == KVD_E_LIMIT &&
        blocks_evict_many(pool, space->ns, EVICT_FOR_A_DOMAIN, KVD_PREFIX_EVICTED_INDEX))
        rc = kvd_prefix_domain(k->ix, space->domain, domain, err);
    if (rc == KVD_OK)
        k->layout_of[*domain] = space->layout;
    stored(); // before a block says that it is of the domain
    return rc;
}

// Puts the entries of the first n keys into `path`, adding those that are not there: *n becomes how
// many are, if the index is full. *known gets how many were there before.
static int add_entries(struct kvd_pool *pool, uint32_t ns, uint32_t domain,
                       const struct kvd_prefix_key *keys, uint32_t *n, uint32_t *known,
                       struct kvd_error *err)
{
    struct kept *k = pool->kept[ns];
    struct blocks_room *room = pool->blocks_room;
    struct kvd_prefix_query q = {.domain = domain, .n = *n, .keys = keys};
    struct kvd_prefix_info info;
    uint32_t done = 0;
    kvd_prefix_peek(k->ix, &q, 1);
    *known = q.found;
    blocks_path(k, q.entry, q.found, room->path);
    if (q.found == *n)
        return KVD_OK;
    bool held = q.found && kvd_prefix_hold(k->ix, q.entry, err) == KVD_OK;
    kvd_prefix_info(k->ix, &info);
    uint32_t want = *n - q.found, free = info.capacity - info.entries;
    if (want > free)
        blocks_evict_many(pool, ns, want - free, KVD_PREFIX_EVICTED_INDEX);
    int rc = kvd_prefix_insert(k->ix, domain, q.entry, keys + q.found, room->none, want,
                               room->path + q.found, &done, err);
    if (held)
        kvd_prefix_release(k->ix, q.entry);
    *n = q.found + done;
    return rc == KVD_E_FULL ? KVD_OK : rc;
}

static void keep_entry(struct kvd_pool *pool, struct region_seq *s, uint32_t entry)
{
    struct kvd_prefix *ix = pool->kept[s->ns]->ix;
    if (s->held_entry == entry + 1 || kvd_prefix_hold(ix, entry, NULL))
        return;
    if (s->held_entry)
        kvd_prefix_release(ix, s->held_entry - 1);
    s->held_entry = entry + 1;
}

int kvd_blocks_publish(struct kvd_pool *pool, const struct kvd_blocks_space *space, uint64_t seq,
                       const struct kvd_prefix_key *keys, uint32_t n, bool end,
                       struct kvd_blocks_published *out, struct kvd_error *err)
{
    struct kept *k;
    uint32_t domain, known;
    *out = (struct kvd_blocks_published){0};
    int rc = check(pool, space, seq, end, err);
    if (rc == KVD_OK)
        rc = kept_open(pool, space->ns, &k, err);
    if (rc)
        return rc;
    struct region_seq *s = seq_find(pool, seq);
    struct blocks_room *room = blocks_room(pool, err);
    uint32_t whole = (uint32_t)KVD_MIN((uint64_t)KVD_MIN(n, (uint32_t)KVD_BLOCKS_MAX),
                                       s->length / KVD_PAGE_TOKENS);
    uint32_t sealed = KVD_MIN(sealed_blocks(layout_of(pool, s), s), whole);
    end = end && (uint64_t)whole * KVD_PAGE_TOKENS >= blocks_least_length(pool, s);
    uint32_t blocks = end ? whole : sealed;
    if (!room)
        return -ENOMEM;
    if (!blocks)
        return KVD_OK;
    rc = blocks_domain(pool, k, space, &domain, err);
    if (rc)
        return rc;
    uint32_t there = blocks;
    rc = add_entries(pool, space->ns, domain, keys, &there, &known, err);
    kvd_prefix_domain_release(k->ix, domain);
    *out = (struct kvd_blocks_published){
        .blocks = there, .sealed = KVD_MIN(sealed, there), .known = known};
    pages_of(pool, s, 0, out->sealed, room->pages);
    for (uint32_t i = 0; i < out->sealed; i++)
        kept_add(pool, k, space->layout, room->path[i], room->pages[i].page);
    if (there)
        keep_entry(pool, s, room->path[there - 1]);
    if (rc == KVD_OK && end && there == blocks) {
        rc = see_to_end(pool, s, room->path, sealed, blocks, err);
        out->end = rc == KVD_OK;
    }
    return rc;
}

// -- what there is ------------------------------------------------------------------------------

void kvd_blocks_info(const struct kvd_pool *pool, uint32_t ns, struct kvd_blocks_info *out)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    struct kvd_prefix_info info;
    *out = (struct kvd_blocks_info){0};
    if (!k)
        return;
    kvd_prefix_info(k->ix, &info);
    *out = (struct kvd_blocks_info){.blocks = info.entries,
                                    .capacity = info.capacity,
                                    .domains = info.domains,
                                    .bytes = k->page_bytes,
                                    .metadata = k->bytes + k->hint_bytes,
                                    .inserted = info.inserted,
                                    .ends = k->ends};
    memcpy(out->removed, info.removed, sizeof(out->removed));
}

uint32_t kvd_blocks_each(const struct kvd_pool *pool, uint32_t ns, uint32_t from, uint32_t most,
                         kvd_blocks_fn *fn, void *ctx)
{
    const struct kept *k = pool->kept ? pool->kept[ns] : NULL;
    struct kvd_prefix_info info;
    struct kvd_prefix_entry_info e;
    if (!k)
        return KVD_POOL_NONE;
    kvd_prefix_info(k->ix, &info);
    for (uint32_t i = from, seen = 0; i < info.ever; i++) {
        if (seen++ == most)
            return i;
        if (!kvd_prefix_get(k->ix, i, &e))
            continue;
        const struct region_seq *end = k->end[i] ? &pool->seq[k->end[i] - 1] : NULL;
        bool ends = end && end->generation & 1 && end->ns == ns && end->end_entry == i + 1;
        if (!fn(ctx, &e, k->layout_of[e.domain], i, ends))
            return i + 1;
    }
    return KVD_POOL_NONE;
}
