// An engine's memory that kvd has mapped: kvd reads and writes pages there itself.
//
// It is what buffers of the client hold. A call counts as a use of each while it lasts, so that
// none goes under it: a buffer that is to be freed takes no more of them.
#include "client/lib/registered.h"

#include "client/lib/client.h"

static bool holds(const kvd_buffer *b, const void *at, uint64_t bytes)
{
    const uintptr_t from = (uintptr_t)at, begin = (uintptr_t)b->data;
    if (b->n_segments && !b->client->takes_segments) // of a kvd before this one, which is older
        return false;
    return b->data && !b->closing && !b->local && from >= begin && bytes <= b->size &&
           from - begin <= b->size - bytes;
}

// Under the lock. NULL: in none.
static kvd_buffer *holder(const kvd_client *c, const void *at, uint64_t bytes, bool on_gpu)
{
    kvd_buffer *b = c->buffers;
    while (b && !((b->fd < 0) == on_gpu && holds(b, at, bytes)))
        b = b->next;
    return b;
}

kvd_buffer **kvd_registered_hold(kvd_client *c, const struct kvd_paged_kv *kv, bool on_gpu)
{
    const uint32_t layers = kv->layers;
    if (!c->takes_paged || on_gpu == c->on_cpu)
        return NULL;
    kvd_buffer **held = calloc(2 * (size_t)layers, sizeof(kvd_buffer *));
    if (!held)
        return NULL;
    pthread_mutex_lock(&c->buffers_lock);
    bool all = true;
    for (uint32_t v = 0; v < 2; v++)
        for (uint32_t i = 0; i < layers && all; i++) {
            const struct kvd_paged_side *side = &kv->side[v];
            held[v * layers + i] = holder(c, side->layers[i], side->bytes, on_gpu);
            all = held[v * layers + i];
        }
    for (uint32_t i = 0; i < 2 * layers && all; i++)
        held[i]->uses++;
    pthread_mutex_unlock(&c->buffers_lock);
    if (!all)
        free(KVD_TAKE(held));
    return held;
}

void kvd_registered_release(kvd_client *c, kvd_buffer ***held, uint32_t layers)
{
    kvd_buffer **all = KVD_TAKE(*held);
    if (!all)
        return;
    pthread_mutex_lock(&c->buffers_lock);
    for (uint32_t i = 0; i < 2 * layers; i++)
        all[i]->uses--;
    pthread_cond_broadcast(&c->buffers_idle);
    pthread_mutex_unlock(&c->buffers_lock);
    free(all);
}

void kvd_registered_end(kvd_buffer *b)
{
    kvd_client *c = b->client;
    if (c->forked)
        return;
    pthread_mutex_lock(&c->buffers_lock);
    b->closing = true;
    while (b->uses)
        pthread_cond_wait(&c->buffers_idle, &c->buffers_lock);
    pthread_mutex_unlock(&c->buffers_lock);
}

// -- registering --------------------------------------------------------------------------------

// Memory to be registered as one: a part of an allocation of cudaMalloc, or whole segments of
// cuMemCreate, which tensors that lie side by side share.
struct part {
    uintptr_t allocation; // 0: of segments
    uintptr_t begin, end;
};

static int add(struct part *parts, uint32_t *n, uintptr_t begin, uint64_t bytes,
               struct kvd_error *err)
{
    struct kvd_gpu_extent in;
    int rc = kvd_gpu_extent((const void *)begin, bytes, &in, err);
    if (rc)
        return rc;
    parts[(*n)++] = in.n_segments ? (struct part){0, in.begin, in.begin + in.bytes}
                                  : (struct part){in.begin, begin, begin + bytes};
    return KVD_OK;
}

static int by_address(const void *a, const void *b)
{
    const struct part *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

// Makes as few of them as can be. What is not mapped between two segments would be no buffer.
static void join(struct part *parts, uint32_t *n)
{
    uint32_t last = 0;
    if (!*n)
        return;
    qsort(parts, *n, sizeof(*parts), by_address);
    for (uint32_t i = 1; i < *n; i++) {
        struct part *p = &parts[last];
        if (parts[i].allocation == p->allocation && (p->allocation || parts[i].begin <= p->end))
            p->end = KVD_MAX(p->end, parts[i].end);
        else
            parts[++last] = parts[i];
    }
    *n = last + 1;
}

static int check(kvd_client *c, const kvd_paged *p, struct kvd_error *err)
{
    int rc = kvd_pages_check_client(c, err);
    if (rc)
        return rc;
    if (!p->k || !p->v)
        return kvd_fail(err, KVD_E_INVALID, "%s is NULL", p->k ? "v" : "k");
    if (!c->takes_paged)
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "this kvd is older than libkvd and takes no references to blocks");
    if (p->on_gpu == c->on_cpu)
        return kvd_fail(err, KVD_E_INVALID,
                        "the blocks are in memory of the %s, and kvd runs on %s",
                        p->on_gpu ? "GPU" : "host", p->on_gpu ? "the CPU" : "a GPU");
    return KVD_OK;
}

// What is not in buffers yet: [2 * layers]. KVD_E_INVALID.
static int missing(kvd_client *c, const kvd_paged *p, struct part *parts, uint32_t *n,
                   struct kvd_error *err)
{
    int rc = KVD_OK;
    for (int v = 0; v < 2; v++)
        for (uint32_t i = 0; i < c->layout.n_layers && rc == KVD_OK; i++) {
            const void *at = (v ? p->v : p->k)[i];
            const uint64_t bytes = v ? p->v_bytes : p->k_bytes;
            pthread_mutex_lock(&c->buffers_lock);
            const bool there = holder(c, at, bytes, p->on_gpu);
            pthread_mutex_unlock(&c->buffers_lock);
            if (there)
                continue;
            rc = p->on_gpu ? add(parts, n, (uintptr_t)at, bytes, err)
                           : kvd_fail(err, KVD_E_INVALID,
                                      "%s[%u] is not memory of kvd_buffer_new: other memory of the "
                                      "host cannot be shared with kvd",
                                      v ? "v" : "k", i);
        }
    join(parts, n);
    return rc;
}

static kvd_result register_parts(kvd_client *c, const struct part *parts, uint32_t n,
                                 kvd_buffer **made, kvd_failure *err)
{
    kvd_result rc = KVD_SUCCESS;
    uint32_t i = 0;
    for (; i < n && rc == KVD_SUCCESS; i++)
        rc = kvd_buffer_cuda(c, (void *)parts[i].begin, parts[i].end - parts[i].begin, &made[i],
                             err);
    pthread_mutex_lock(&c->buffers_lock);
    for (uint32_t k = 0; k < n && rc == KVD_SUCCESS; k++)
        made[k]->engine = true;
    pthread_mutex_unlock(&c->buffers_lock);
    for (uint32_t k = 0; k < n && rc != KVD_SUCCESS; k++)
        kvd_buffer_free(&made[k]); // NULL: was not made
    return rc;
}

kvd_result kvd_pages_register(kvd_client *c, const kvd_paged *memory, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "memory", memory);
    struct kvd_error e = {0};
    kvd_paged p;
    if (kvd_fork_check(c, &e) || kvd_sized_take(&kvd_sized_paged, memory, &p, &e) ||
        check(c, &p, &e))
        return kvd_client_fail(err, &e);
    struct part *parts KVD_FREE = calloc(2 * c->layout.n_layers, sizeof(*parts));
    kvd_buffer **made KVD_FREE = calloc(2 * c->layout.n_layers, sizeof(kvd_buffer *));
    uint32_t n = 0;
    if (!parts || !made)
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
    if (e.code || missing(c, &p, parts, &n, &e))
        return kvd_client_fail(err, &e);
    return register_parts(c, parts, n, made, err);
}

// Under the lock: the first of the engine's buffers, and how many calls use any of them.
static kvd_buffer *engines(const kvd_client *c, uint64_t *uses)
{
    kvd_buffer *first = NULL;
    *uses = 0;
    for (kvd_buffer *b = c->buffers; b; b = b->next) {
        if (!b->engine)
            continue;
        *uses += b->uses;
        first = first ? first : b;
    }
    return first;
}

static void close_engines(const kvd_client *c, bool closing)
{
    for (kvd_buffer *b = c->buffers; b; b = b->next)
        if (b->engine)
            b->closing = closing;
}

kvd_result kvd_pages_unregister(kvd_client *c, uint32_t ms, kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    const uint64_t until = kvd_now_ms() + ms;
    struct kvd_error e = {0};
    uint64_t uses;
    kvd_buffer *b;
    if (kvd_fork_check(c, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&c->buffers_lock);
    close_engines(c, true);
    for (bool more = true; (b = engines(c, &uses)) && uses && more;)
        more = kvd_cond_wait(&c->buffers_idle, &c->buffers_lock, until);
    if (b && uses) {
        kvd_fail(&e, KVD_E_TIMEOUT,
                 "puts and gets still use the engine's KV after %u ms; it stays registered", ms);
        close_engines(c, false);
    }
    const uint64_t deadline = kvd_client_deadline(c); // of all, for a kvd that does not answer
    while (!e.code && (b = engines(c, &uses))) {
        b->engine = false; // it is this thread's
        pthread_mutex_unlock(&c->buffers_lock);
        kvd_buffer_take(&b, deadline, false);
        pthread_mutex_lock(&c->buffers_lock);
    }
    pthread_mutex_unlock(&c->buffers_lock);
    return e.code ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}
