// Making room: what something needs is provided first, all of it, and then taken, which cannot
// fail. Only here are extents granted, and blocks and sequences evicted for it.
#include "pool/internal.h"

// Whether pages of a plane and kind are needed.
static bool wants(const struct kvd_pool_need *need, uint32_t plane, uint32_t kind)
{
    return need->pages[plane][kind] ||
           (kind == KVD_POOL_BF16 && (need->parts[plane][0] || need->parts[plane][1]));
}

static int provide(struct kvd_pool *pool, uint32_t ns, uint32_t layout,
                   const struct kvd_pool_need *need)
{
    static const uint32_t none[KVD_POOL_PARTS];
    int rc = KVD_OK;
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        for (uint32_t k = 0; k < KVD_POOL_KINDS && rc == KVD_OK; k++)
            if (wants(need, p, k))
                rc = slab_provide(pool, ns, layout, p, k, need->pages[p][k],
                                  k == KVD_POOL_BF16 ? need->parts[p] : none);
    return rc;
}

static int refuse(const struct kvd_pool *pool, int rc, struct kvd_error *err)
{
    const struct region_head *h = pool->head;
    if (rc == KVD_E_LIMIT)
        return kvd_fail(err, rc,
                        "kvd is short of descriptors, of which an extent of %llu bytes takes one: "
                        "free sequences, raise extent-size or the limit of open files "
                        "(LimitNOFILE=, ulimit -n)",
                        (unsigned long long)h->extent_bytes);
    if (rc != KVD_E_FULL)
        return kvd_fail(err, rc, "cannot make an extent of %llu bytes: %s",
                        (unsigned long long)h->extent_bytes, kvd_status_name(rc));
    if (h->extents_granted < h->n_extents)
        return kvd_fail(err, KVD_E_FULL,
                        "the device is short of memory: %u of the pool's %u extents of %llu bytes "
                        "are in use, another cannot be made, and nothing can be evicted; free "
                        "sequences or memory of other processes",
                        h->extents_granted, h->n_extents, (unsigned long long)h->extent_bytes);
    return kvd_fail(
        err, KVD_E_FULL,
        "the pool's %u extents of %llu bytes are all in use and nothing can be evicted; "
        "free sequences or start kvd with a larger pool-size",
        h->n_extents, (unsigned long long)h->extent_bytes);
}

static int refuse_quota(const struct region_namespace *n, struct kvd_error *err)
{
    return kvd_fail(
        err, KVD_E_QUOTA,
        "namespace %s uses %llu of its quota of %llu bytes; free sequences or raise the quota",
        n->name, (unsigned long long)n->used, (unsigned long long)n->quota);
}

uint32_t need_pages(const struct kvd_pool_need *need)
{
    uint32_t n = 0;
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        for (uint32_t k = 0; k < KVD_POOL_KINDS; k++)
            n += need->pages[p][k];
        for (uint32_t i = 0; i < KVD_POOL_PARTS; i++)
            n += need->parts[p][i];
    }
    return n;
}

enum {
    FEW = 32,
    STEP = 128, // evictions of a step
};

// What goes first is of use where it leaves a page of the very kind that is wanted. If that is not
// so after some, an extent is wanted.
static bool make_some(struct kvd_pool *pool, uint32_t ns, const struct kvd_pool_need *need,
                      struct kvd_pool_room *e)
{
    if (e->evicted >= e->most) {
        if (vacate_for_room(pool, ns, need->bytes))
            return true;
        e->most = 2 * e->evicted + FEW; // it looked at everything for nothing
    }
    e->evicted++;
    return evict_for_room(pool, ns, need->bytes);
}

// Whether it would be more than the quota and what may be borrowed.
static bool is_over(const struct kvd_pool *pool, uint32_t ns, const struct kvd_pool_need *need)
{
    const struct region_namespace *n = &pool->ns[ns];
    return n->quota && n->used + need->bytes > n->quota + lent_to(pool, ns);
}

// Whether what is held leaves a borrower no room, whatever is evicted: then nothing is, so that it
// does not lose for nothing what it has borrowed.
static bool is_in_vain(const struct kvd_pool *pool, uint32_t ns, const struct kvd_pool_need *need)
{
    const struct region_namespace *n = &pool->ns[ns];
    return pool->lent[ns].may && n->used - n->idle + need->bytes > n->quota;
}

int room_make(struct kvd_pool *pool, uint32_t ns, uint32_t layout, const struct kvd_pool_need *need,
              struct kvd_error *err)
{
    const struct region_namespace *n = &pool->ns[ns];
    struct kvd_pool_room e = {.most = FEW + 2 * need_pages(need)};
    int rc = need->blocks ? share_take(pool, ns, SHARE_BLOCKS, need->blocks, err) : KVD_OK;
    if (rc)
        return rc;
    while (is_over(pool, ns, need)) {
        if (is_in_vain(pool, ns, need) ||
            !evict_something(pool, ns, KVD_PREFIX_EVICTED_QUOTA, NULL))
            return refuse_quota(n, err);
    }
    // Eviction may take extents away from the very slabs that were provided for: from the start.
    while (((rc = provide(pool, ns, layout, need)) == KVD_E_FULL || rc == KVD_E_LIMIT) &&
           make_some(pool, ns, need, &e))
        ;
    if (rc == KVD_OK)
        return rc;
    bool borrows = n->quota && n->used + need->bytes > n->quota;
    rc = rc == KVD_E_FULL && borrows ? refuse_quota(n, err) : refuse(pool, rc, err);
    room_settle(pool, ns, layout, need);
    return rc;
}

// The same as make_some, in steps: VACATE_RUNS says that one is under way that may give room.
static enum vacated make_some_later(struct kvd_pool *pool, uint32_t ns,
                                    const struct kvd_pool_need *need, struct kvd_pool_room *e)
{
    if (e->evicted >= e->most) {
        if (!e->vacate)
            e->vacate = vacate_begin(pool, ns, need->bytes);
        enum vacated result = e->vacate ? vacate_result(pool, e->vacate) : VACATE_NOTHING;
        if (result == VACATE_RUNS)
            return result;
        e->vacate = 0;
        if (result == VACATE_SOME)
            return result;
        e->most = 2 * e->evicted + FEW;
    }
    e->evicted++;
    return evict_for_room(pool, ns, need->bytes) ? VACATE_SOME : VACATE_NOTHING;
}

// Nothing more can be done, or not yet: nobody is refused for what kvd itself has.
static bool give_up(const struct kvd_pool *pool, struct kvd_pool_room *at)
{
    at->taken_up = pool->taken_up;
    return !at->taken_up;
}

bool kvd_pool_room_make(struct kvd_pool *pool, uint32_t ns, uint32_t layout,
                        const struct kvd_pool_need *need, struct kvd_pool_room *at)
{
    uint32_t left = STEP;
    int rc = KVD_OK;
    at->taken_up = false;
    if (!at->most)
        at->most = FEW + 2 * need_pages(need);
    while (is_over(pool, ns, need)) {
        if (!left--)
            return false;
        if (is_in_vain(pool, ns, need) ||
            !evict_something(pool, ns, KVD_PREFIX_EVICTED_QUOTA, NULL))
            return give_up(pool, at);
    }
    enum vacated result = VACATE_SOME;
    while (result == VACATE_SOME &&
           ((rc = provide(pool, ns, layout, need)) == KVD_E_FULL || rc == KVD_E_LIMIT))
        result = left-- ? make_some_later(pool, ns, need, at) : VACATE_RUNS;
    room_settle(pool, ns, layout, need);
    return result == VACATE_NOTHING ? give_up(pool, at) : result == VACATE_SOME;
}

void room_settle(struct kvd_pool *pool, uint32_t ns, uint32_t layout,
                 const struct kvd_pool_need *need)
{
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        for (uint32_t k = 0; k < KVD_POOL_KINDS; k++) {
            uint32_t slab = wants(need, p, k) ? slab_find(pool, ns, layout, p, k) : KVD_POOL_NONE;
            if (slab != KVD_POOL_NONE)
                slab_settle(pool, slab);
        }
}

int kvd_pool_page_alloc(struct kvd_pool *pool, uint32_t ns, uint32_t layout, uint32_t plane,
                        enum kvd_pool_kind kind, uint32_t *page, struct kvd_error *err)
{
    struct kvd_pool_need need = {.bytes = pool->layout[layout].page_bytes[plane][kind]};
    need.pages[plane][kind] = 1;
    int rc = room_make(pool, ns, layout, &need, err);
    if (rc == KVD_OK)
        *page = page_take(pool, slab_find(pool, ns, layout, plane, kind), 0);
    return rc;
}
