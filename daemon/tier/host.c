#include "daemon/tier/host.h"

#include <time.h>
#include <uthash.h>
#include <utlist.h>

struct kept {
    struct kvd_tier_key key;
    struct kvd_block *block;
    time_t stored, used;
    UT_hash_handle hh;
    struct kept *prev, *next; // least recently used first
};

struct host {
    struct kept *by_key, *by_use;
    uint64_t bytes, limit;
    struct kvd_tier_lost lost;
};

void *kvd_tier_host_new(uint64_t limit)
{
    struct host *h = calloc(1, sizeof(*h));
    if (h)
        h->limit = limit;
    return h;
}

static void forget(struct host *h, struct kept *k)
{
    HASH_DEL(h->by_key, k);
    DL_DELETE(h->by_use, k);
    h->bytes -= k->block->bytes;
    kvd_block_unref(&k->block);
    free(k);
}

// The clock may have been set back since: what was stored later than now is young.
static bool expired(const struct kept *k, uint64_t ttl_s)
{
    time_t now = time(NULL);
    return ttl_s && now > k->stored && (uint64_t)(now - k->stored) > ttl_s;
}

// The block if it is there and young enough, the most recently used one now.
static struct kept *find(struct host *h, const struct kvd_tier_op *op, uint32_t i)
{
    struct kept *k;
    HASH_FIND(hh, h->by_key, &op->keys[i], sizeof(op->keys[i]), k);
    if (k && expired(k, op->settings.ttl_s)) {
        kvd_tier_lose(&h->lost, KVD_TIER_LOST_EXPIRED, k->used);
        forget(h, k);
        return NULL;
    }
    if (k) {
        k->used = time(NULL);
        DL_DELETE(h->by_use, k);
        DL_APPEND(h->by_use, k);
    }
    return k;
}

static void put(struct host *h, struct kvd_tier_op *op)
{
    struct kept *k = find(h, op, 0);
    if (k) {
        k->stored = time(NULL);
        kvd_tier_finish(op, KVD_TIER_OK);
        return;
    }
    if (op->bytes > h->limit) {
        kvd_tier_fail(op, KVD_TIER_FULL, "a block of %" PRIu64 " bytes is more than its size",
                      op->bytes);
        return;
    }
    k = calloc(1, sizeof(*k));
    if (!k) {
        kvd_tier_fail(op, KVD_TIER_FAILED, "out of memory");
        return;
    }
    while (h->bytes + op->bytes > h->limit) {
        kvd_tier_lose(&h->lost, KVD_TIER_LOST_ROOM, h->by_use->used);
        forget(h, h->by_use);
    }
    k->key = op->keys[0];
    k->block = kvd_block_ref(op->block);
    k->stored = k->used = time(NULL);
    h->bytes += op->bytes;
    HASH_ADD(hh, h->by_key, key, sizeof(k->key), k);
    DL_APPEND(h->by_use, k);
    kvd_tier_finish(op, KVD_TIER_OK);
}

static void get(struct host *h, struct kvd_tier_op *op)
{
    struct kept *k = find(h, op, 0);
    if (k && k->block->bytes != op->bytes) {
        forget(h, k);
        kvd_tier_fail(op, KVD_TIER_DAMAGED, "it is of another length");
        return;
    }
    if (k)
        op->block = kvd_block_ref(k->block);
    kvd_tier_finish(op, k ? KVD_TIER_OK : KVD_TIER_MISS);
}

static void flush(struct host *h)
{
    while (h->by_use)
        forget(h, h->by_use);
}

static void submit(void *state, struct kvd_tier_op *op)
{
    struct host *h = state;
    switch (op->verb) {
    case KVD_TIER_PUT:
        put(h, op);
        return;
    case KVD_TIER_GET:
        get(h, op);
        return;
    case KVD_TIER_HAS:
        for (uint32_t i = 0; i < op->n; i++)
            op->has[i] = find(h, op, i) != NULL;
        break;
    case KVD_TIER_DROP: {
        struct kept *k = find(h, op, 0);
        if (k)
            forget(h, k);
        break;
    }
    default:
        flush(h);
    }
    kvd_tier_finish(op, KVD_TIER_OK);
}

static bool host_close(void *state, const struct timespec *deadline)
{
    struct host *h = state;
    (void)deadline;
    flush(h);
    free(h);
    return true;
}

static void status(void *state, struct kvd_tier_status *out)
{
    const struct host *h = state;
    snprintf(out->where, sizeof(out->where), "memory");
    out->blocks = HASH_COUNT(h->by_key);
    out->bytes = h->bytes;
    out->limit = h->limit;
    out->lost = h->lost;
}

const struct kvd_tier_ops kvd_tier_host_ops = {
    .name = "host",
    .most_running = 64,
    .submit = submit,
    .close = host_close,
    .status = status,
};
