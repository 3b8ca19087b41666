// Pages: looking up, putting and getting. Pages travel through memory that is shared with kvd, some
// tens of megabytes at a time; or kvd reads and writes them in the engine's memory, where that is
// registered.
#include "client/lib/client.h"
#include "client/lib/paged.h"
#include "client/lib/registered.h"

#define METHOD(name) "/kvd.v1.KvCache/" name

// On a GPU each call costs what it has to wait for, three or four times; so they are large.
enum { STAGING_BYTES = 32 << 20, GPU_STAGING_BYTES = 256 << 20, MAX_STAGINGS = 4 };
// Where nothing is staged, for what a timeout leaves time for, and what kvd has to have room for.
enum { REGISTERED_BYTES = 256 << 20, GPU_REGISTERED_BYTES = 1 << 30 };

// What a call is about: checked, as this library has it.
struct call {
    kvd_client *client;
    const kvd_bytes *space;
    kvd_page_keys keys;
    kvd_paged paged;
    struct kvd_paged_kv kv; // the same
    struct kvd_page_shape shape;
    uint32_t pages;      // that a call to kvd is of at most
    kvd_buffer **held;   // what the engine's memory is registered as, [2][layers]; NULL: it is not
    kvd_buffer *staging; // then
    struct kvd_dense_pages staged;
    uint64_t v_at; // of V in the staging
};

int kvd_pages_check_client(const kvd_client *c, struct kvd_error *err)
{
    return c->pages ? KVD_OK
                    : kvd_fail(err, KVD_E_PRECONDITION,
                               "the client was opened without pages; set kvd_options.pages");
}

static int check_client(const kvd_client *c, const kvd_bytes *space, struct kvd_error *err)
{
    int rc = kvd_pages_check_client(c, err);
    if (rc)
        return rc;
    if (!space->data || space->bytes < 1 || space->bytes > KVD_MAX_PROMPT_EXTRA_BYTES)
        return kvd_fail(err, KVD_E_INVALID, "a space of %llu bytes; 1 to %d are possible",
                        (unsigned long long)space->bytes, KVD_MAX_PROMPT_EXTRA_BYTES);
    return KVD_OK;
}

static int take_keys(const kvd_page_keys *from, kvd_page_keys *to, struct kvd_error *err)
{
    int rc = kvd_sized_take(&kvd_sized_page_keys, from, to, err);
    if (rc)
        return rc;
    if (to->key_bytes < KVD_MIN_BLOCK_KEY || to->key_bytes > KVD_MAX_BLOCK_KEY)
        return kvd_fail(err, KVD_E_INVALID, "key_bytes is %u; %d to %d are possible", to->key_bytes,
                        KVD_MIN_BLOCK_KEY, KVD_MAX_BLOCK_KEY);
    if (to->pages > KVD_MAX_PROMPT_BLOCKS || (to->pages && !to->keys))
        return kvd_fail(err, KVD_E_INVALID, "%u pages%s; at most %d are possible", to->pages,
                        to->keys ? "" : " and no keys", KVD_MAX_PROMPT_BLOCKS);
    return KVD_OK;
}

static ProtobufCBinaryData bytes(const void *data, uint64_t n)
{
    return (ProtobufCBinaryData){n, (uint8_t *)(uintptr_t)data};
}

static const uint8_t *key(const kvd_page_keys *k, uint32_t i)
{
    return (const uint8_t *)k->keys + (size_t)i * k->key_bytes;
}

// -- looking up ---------------------------------------------------------------------------------

// All keys of requests, one list each; *key_bytes: of all.
static int fill_requests(const kvd_page_keys *requests, uint32_t count, ProtobufCBinaryData *lists,
                         uint32_t *key_bytes, struct kvd_error *err)
{
    uint32_t step;
    memcpy(&step, requests, sizeof(step));
    for (uint32_t i = 0; i < count; i++) {
        kvd_page_keys k;
        int rc = take_keys((const void *)((const uint8_t *)requests + (size_t)i * step), &k, err);
        if (rc == KVD_OK && i && k.key_bytes != *key_bytes)
            rc = kvd_fail(err, KVD_E_INVALID, "key_bytes is %u, that of the first is %u",
                          k.key_bytes, *key_bytes);
        if (rc)
            return kvd_fail_in(err, "requests[%u]", i);
        *key_bytes = k.key_bytes;
        lists[i] = bytes(k.keys, (size_t)k.pages * k.key_bytes);
    }
    return KVD_OK;
}

static int check_count(uint32_t count, struct kvd_error *err)
{
    return count >= 1 && count <= KVD_MAX_CALL_PROMPTS
               ? KVD_OK
               : kvd_fail(err, KVD_E_INVALID, "%u requests; 1 to %d are possible", count,
                          KVD_MAX_CALL_PROMPTS);
}

static int check_found(const kvd_found *out, uint32_t count, struct kvd_error *err)
{
    uint32_t step;
    int rc = KVD_OK;
    memcpy(&step, out, sizeof(step));
    for (uint32_t i = 0; i < count && rc == KVD_OK; i++) {
        rc = kvd_sized_check(&kvd_sized_found, (const uint8_t *)out + (size_t)i * step, err);
        if (rc)
            kvd_fail_in(err, "requests[%u]", i);
    }
    return rc;
}

static void give_found(const Kvd__V1__LookupPagesReply *reply, const Kvd__V1__FoundPages *from,
                       kvd_found *out)
{
    kvd_found found = {.pages = from->pages, .lease = from->lease, .restored = from->restored};
    kvd_take_behind(reply->tiers, reply->n_tiers, from->behind, from->n_behind, found.behind);
    memcpy((uint8_t *)&found.kinds, (const uint8_t *)out + offsetof(kvd_found, kinds),
           sizeof(found.kinds));
    if (found.kinds && from->kinds.len)
        memcpy(found.kinds, from->kinds.data, from->kinds.len);
    kvd_sized_give(&kvd_sized_found, &found, out);
}

static kvd_result send_lookup(kvd_client *c, Kvd__V1__LookupPagesRequest *req, kvd_found *out,
                              kvd_failure *err)
{
    Kvd__V1__LookupPagesReply *reply = NULL;
    struct kvd_error e = {0};
    uint32_t step;
    memcpy(&step, out, sizeof(step));
    kvd_result rc = kvd_client_call_until(c, METHOD("LookupPages"), req, &req->session,
                                          &kvd__v1__lookup_pages_reply__descriptor, &reply,
                                          kvd_client_deadline(c) + req->restore_ms, err);
    if (rc)
        return rc;
    bool fits = reply->n_found == req->n_requests;
    for (size_t i = 0; i < reply->n_found && fits; i++)
        fits = reply->found[i]->kinds.len * req->key_bytes == req->requests[i].len &&
               reply->found[i]->pages <= reply->found[i]->kinds.len;
    for (size_t i = 0; i < reply->n_found && fits; i++)
        give_found(reply, reply->found[i], (kvd_found *)(void *)((uint8_t *)out + i * step));
    kvd__v1__lookup_pages_reply__free_unpacked(reply, NULL);
    if (fits)
        return KVD_SUCCESS;
    kvd_fail(&e, KVD_E_INTERNAL, "the answer is of other pages than those that were asked for");
    return kvd_client_fail(err, &e);
}

kvd_result kvd_pages_lookup(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *requests,
                            uint32_t count, const kvd_match_options *options, kvd_found *out,
                            kvd_failure *err)
{
    KVD_WANT(err, "client", c, "space", space, "requests", requests, "out", out);
    Kvd__V1__LookupPagesRequest req = KVD__V1__LOOKUP_PAGES_REQUEST__INIT;
    struct kvd_error e = {0};
    kvd_match_options o = KVD_NEW(kvd_match_options);
    if (options && kvd_sized_take(&kvd_sized_match_options, options, &o, &e))
        return kvd_client_fail(err, &e);
    if (o.wait_ms || o.recompute_window) {
        kvd_fail(&e, KVD_E_INVALID,
                 "wait_ms and recompute_window are for prompts: of pages nobody waits for others, "
                 "and none has a window");
        return kvd_client_fail(err, &e);
    }
    if (check_count(count, &e))
        return kvd_client_fail(err, &e);
    ProtobufCBinaryData *lists KVD_FREE = calloc(count, sizeof(*lists));
    if (!lists)
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
    req.requests = lists;
    req.n_requests = count;
    req.lease_ms = o.lease_ms;
    req.restore_ms = o.restore_ms;
    req.tiers = o.tiers;
    req.quiet = o.quiet;
    if (e.code || check_client(c, space, &e) ||
        fill_requests(requests, count, lists, &req.key_bytes, &e) || check_found(out, count, &e))
        return kvd_client_fail(err, &e);
    req.space = bytes(space->data, space->bytes);
    return send_lookup(c, &req, out, err);
}

kvd_result kvd_pages_hint(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *requests,
                          uint32_t count, kvd_hint hint, uint32_t ms, bool expire, uint32_t *pages,
                          kvd_failure *err)
{
    KVD_WANT(err, "client", c, "space", space, "requests", requests);
    Kvd__V1__HintPagesRequest req = KVD__V1__HINT_PAGES_REQUEST__INIT;
    Kvd__V1__HintPagesReply *reply = NULL;
    struct kvd_error e = {0};
    if (check_client(c, space, &e) || check_count(count, &e))
        return kvd_client_fail(err, &e);
    ProtobufCBinaryData *lists KVD_FREE = calloc(count, sizeof(*lists));
    if (!lists)
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
    if (e.code || fill_requests(requests, count, lists, &req.key_bytes, &e))
        return kvd_client_fail(err, &e);
    req.space = bytes(space->data, space->bytes);
    req.n_requests = count;
    req.requests = lists;
    req.hint = (Kvd__V1__HintPrefixRequest__Hint)hint;
    req.ms = ms;
    req.expire = expire;
    kvd_result rc = kvd_client_call(c, METHOD("HintPages"), &req, &req.session,
                                    &kvd__v1__hint_pages_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->n_pages != count) {
        kvd_fail(&e, KVD_E_INTERNAL, "told of %u requests, heard of %zu", count, reply->n_pages);
        rc = kvd_client_fail(err, &e);
    } else if (pages) {
        memcpy(pages, reply->pages, count * sizeof(*pages));
    }
    kvd__v1__hint_pages_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_pages_encode(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *keys,
                            uint8_t *kinds, uint32_t *encoded, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "space", space, "keys", keys);
    Kvd__V1__EncodePagesRequest req = KVD__V1__ENCODE_PAGES_REQUEST__INIT;
    Kvd__V1__EncodePagesReply *reply = NULL;
    kvd_page_keys k;
    struct kvd_error e = {0};
    int bad = check_client(c, space, &e) ? e.code : take_keys(keys, &k, &e);
    if (!bad && (k.pages < 1 || k.pages > KVD_MAX_CALL_PAGES))
        bad = kvd_fail(&e, KVD_E_INVALID, "%u pages; 1 to %d are possible", k.pages,
                       KVD_MAX_CALL_PAGES);
    if (bad)
        return kvd_client_fail(err, &e);
    req.space = bytes(space->data, space->bytes);
    req.key_bytes = k.key_bytes;
    req.keys = bytes(k.keys, (size_t)k.pages * k.key_bytes);
    kvd_result rc = kvd_client_call(c, METHOD("EncodePages"), &req, &req.session,
                                    &kvd__v1__encode_pages_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->kinds.len != k.pages) {
        kvd_fail(&e, KVD_E_INTERNAL, "told of %u pages, heard of %zu", k.pages, reply->kinds.len);
        rc = kvd_client_fail(err, &e);
    } else if (kinds) {
        memcpy(kinds, reply->kinds.data, k.pages);
    }
    if (encoded)
        *encoded = reply->encoded;
    kvd__v1__encode_pages_reply__free_unpacked(reply, NULL);
    return rc;
}

// Which of a call's pages are there; with lease_ms they stay.
static kvd_result look(const struct call *call, uint32_t lease_ms, kvd_found *out, kvd_failure *err)
{
    Kvd__V1__LookupPagesRequest req = KVD__V1__LOOKUP_PAGES_REQUEST__INIT;
    ProtobufCBinaryData list =
        bytes(call->keys.keys, (size_t)call->keys.pages * call->keys.key_bytes);
    req.space = bytes(call->space->data, call->space->bytes);
    req.key_bytes = call->keys.key_bytes;
    req.n_requests = 1;
    req.requests = &list;
    req.lease_ms = lease_ms;
    req.quiet = true;
    return send_lookup(call->client, &req, out, err);
}

// -- memory to stage pages in -------------------------------------------------------------------

static uint64_t page_bytes(const struct kvd_page_shape *s, int side)
{
    return (uint64_t)s->layers * s->heads * s->dims[side] * 2 * KVD_PAGE_TOKENS;
}

// One of that memory that no call uses.
static kvd_buffer *idle_buffer(kvd_client *c, bool gpu)
{
    pthread_mutex_lock(&c->buffers_lock);
    kvd_buffer *b = c->buffers;
    while (b && !(b->idle && b->owned == gpu))
        b = b->next;
    if (b)
        b->idle = false;
    pthread_mutex_unlock(&c->buffers_lock);
    return b;
}

// That so many pages take in it; grows evenly.
static uint64_t staging_bytes(const struct call *call, uint32_t pages)
{
    const uint64_t page = page_bytes(&call->shape, 0) + page_bytes(&call->shape, 1);
    return pages * page + (call->paged.on_gpu ? kvd_paged_tables(&call->shape, pages) : 0);
}

// Where the GPU has no room for so many pages it is less, as calls that do little do more than
// those that fail.
static kvd_result new_gpu_staging(struct call *call, uint32_t pages, kvd_failure *err)
{
    kvd_failure why;
    kvd_result rc;
    do {
        rc = kvd_gpu_staging_new(call->client, staging_bytes(call, pages), &call->staging, &why);
        pages /= 2;
    } while (rc == KVD_ERR_EXHAUSTED && pages);
    if (rc && err)
        *err = why;
    return rc;
}

static int moved(const struct call *call, struct kvd_error *err)
{
    return call->paged.on_gpu ? kvd_paged_gpu_wait(&call->paged, err) : KVD_OK;
}

// Of registered memory nothing is staged. kvd orders what it does by no stream of the engine's:
// what is on that is waited for.
static kvd_result begin_registered(struct call *call, kvd_failure *err)
{
    const uint64_t page = page_bytes(&call->shape, 0) + page_bytes(&call->shape, 1);
    const uint64_t fit = (call->paged.on_gpu ? GPU_REGISTERED_BYTES : REGISTERED_BYTES) / page;
    struct kvd_error e = {0};
    call->pages = (uint32_t)KVD_MIN(KVD_MAX(fit, (uint64_t)1), (uint64_t)KVD_MAX_CALL_PAGES);
    return moved(call, &e) ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

static kvd_result take_staging(struct call *call, kvd_failure *err)
{
    kvd_client *c = call->client;
    const uint64_t none = staging_bytes(call, 0), page = staging_bytes(call, 1) - none;
    const bool gpu = call->paged.on_gpu;
    const uint64_t fit = (gpu ? GPU_STAGING_BYTES : STAGING_BYTES) / page;
    const uint32_t most =
        (uint32_t)KVD_MIN(KVD_MAX(fit, (uint64_t)1), (uint64_t)KVD_MAX_CALL_PAGES);
    kvd_result rc = KVD_SUCCESS;
    if (call->held)
        return begin_registered(call, err);
    call->staging = idle_buffer(c, gpu);
    if (!call->staging)
        rc = gpu ? new_gpu_staging(call, most, err)
                 : kvd_buffer_new(c, staging_bytes(call, most), &call->staging, err);
    if (rc)
        return rc;
    call->pages = (uint32_t)((kvd_buffer_size(call->staging) - none) / page);
    uint8_t *data = kvd_buffer_data(call->staging);
    call->v_at = call->pages * page_bytes(&call->shape, 0);
    call->staged = (struct kvd_dense_pages){.side = {data, data + call->v_at},
                                            .tokens = call->pages * KVD_PAGE_TOKENS,
                                            .tables = data + call->v_at +
                                                      call->pages * page_bytes(&call->shape, 1)};
    return KVD_SUCCESS;
}

// For the next call, unless enough are kept for them.
static void give_staging(struct call *call)
{
    kvd_client *c = call->client;
    uint32_t idle = 0;
    kvd_registered_release(c, &call->held, call->shape.layers);
    if (!call->staging)
        return;
    pthread_mutex_lock(&c->buffers_lock);
    for (const kvd_buffer *b = c->buffers; b; b = b->next)
        idle += b->idle;
    bool keep = idle < MAX_STAGINGS;
    call->staging->idle = keep;
    pthread_mutex_unlock(&c->buffers_lock);
    if (!keep)
        kvd_buffer_free(&call->staging);
    call->staging = NULL;
}

// Where K and V of a call's pages are staged.
static void refer(const struct call *call, Kvd__V1__TensorRef refs[2])
{
    for (int v = 0; v < 2; v++) {
        kvd__v1__tensor_ref__init(&refs[v]);
        refs[v].buffer = call->staging->id;
        refs[v].offset = v ? call->v_at : 0;
        refs[v].layer_stride =
            (uint64_t)call->staged.tokens * call->shape.heads * call->shape.dims[v] * 2;
    }
}

// A reference to pages in registered memory, and what it refers to.
struct reference {
    Kvd__V1__PagedRef ref;
    Kvd__V1__PagedRef__Side side[2];
    uint64_t numbers[2][2][KVD_MAX_LAYERS]; // of K and V: buffers, offsets
    uint32_t *blocks;                       // of pages that do not follow each other; to be freed
};

static void refer_side(const struct call *call, struct reference *r, int v)
{
    const uint32_t layers = call->shape.layers;
    const struct kvd_paged_side *from = &call->kv.side[v];
    Kvd__V1__PagedRef__Side *side = &r->side[v];
    kvd__v1__paged_ref__side__init(side);
    for (uint32_t i = 0; i < layers; i++) {
        const kvd_buffer *b = call->held[(uint32_t)v * layers + i];
        r->numbers[v][0][i] = b->id;
        r->numbers[v][1][i] = b->at + ((uintptr_t)from->layers[i] - (uintptr_t)b->data);
    }
    side->buffers = r->numbers[v][0];
    side->offsets = r->numbers[v][1];
    side->n_buffers = side->n_offsets = layers;
    side->block_stride = from->strides.block;
    side->head_stride = from->strides.head;
    side->token_stride = from->strides.token;
    side->dim_stride = from->strides.dim;
}

// Whether pages are whole blocks, so that they may be named in any order.
static bool whole_blocks(const struct call *call)
{
    return call->kv.first_token == 0 && KVD_PAGE_TOKENS % call->kv.block_tokens == 0;
}

// Of n pages from `page` on or, of whole blocks, of those that are listed.
static int refer_paged(const struct call *call, uint32_t page, const uint32_t *listed, uint32_t n,
                       struct reference *r, struct kvd_error *err)
{
    const struct kvd_paged_kv *kv = &call->kv;
    const uint64_t first = kv->first_token + (uint64_t)page * KVD_PAGE_TOKENS;
    kvd__v1__paged_ref__init(&r->ref);
    for (int v = 0; v < 2; v++)
        refer_side(call, r, v);
    r->blocks = NULL;
    r->ref.k = &r->side[0];
    r->ref.v = &r->side[1];
    r->ref.all_blocks = kv->all_blocks;
    r->ref.block_tokens = kv->block_tokens;
    r->ref.first_token = (uint32_t)(first % kv->block_tokens);
    r->ref.blocks = (uint32_t *)(uintptr_t)(kv->blocks + first / kv->block_tokens);
    r->ref.n_blocks =
        kvd_div_up(r->ref.first_token + (uint64_t)n * KVD_PAGE_TOKENS, kv->block_tokens);
    if (!listed || listed[n - 1] - page == n - 1)
        return KVD_OK;
    const uint32_t each = KVD_PAGE_TOKENS / kv->block_tokens;
    r->ref.blocks = r->blocks = malloc((size_t)n * each * sizeof(*r->blocks));
    if (!r->blocks)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < n; i++)
        memcpy(r->blocks + (size_t)i * each, kv->blocks + (size_t)listed[i] * each,
               each * sizeof(*r->blocks));
    return KVD_OK;
}

// -- putting and getting ------------------------------------------------------------------------

// Copies pages into the staging, or, `out`, from there into the engine's blocks.
static int move_pages(const struct call *call, uint32_t page, uint32_t n, uint32_t at, bool out,
                      struct kvd_error *err)
{
    if (call->paged.on_gpu)
        return kvd_paged_gpu_copy(&call->paged, &call->shape, page, n, &call->staged, at, out, err);
    struct kvd_paged_copy copy = {.layers = call->shape.layers,
                                  .page = page,
                                  .pages = n,
                                  .dense_tokens = call->staged.tokens,
                                  .out = out};
    for (int v = 0; v < 2; v++)
        copy.dense[v] =
            call->staged.side[v] + at * (page_bytes(&call->shape, v) / call->shape.layers);
    kvd_paged_copy(&call->kv, &copy);
    return KVD_OK;
}

// Copies pages of these numbers into the staging, those that follow each other at once.
static int stage(const struct call *call, const uint32_t *pages, uint32_t n, struct kvd_error *err)
{
    int rc = KVD_OK;
    for (uint32_t i = 0, run; i < n && rc == KVD_OK; i += run) {
        for (run = 1; i + run < n && pages[i + run] == pages[i] + run;)
            run++;
        rc = move_pages(call, pages[i], run, i, false, err);
    }
    return rc ? rc : moved(call, err);
}

static int begin(struct call *call, kvd_client *c, const kvd_bytes *space,
                 const kvd_page_keys *keys, const kvd_paged *paged, bool written,
                 struct kvd_error *err)
{
    const struct kvd_layer_shape *first = c->shapes;
    *call = (struct call){.client = c, .space = space};
    int rc = check_client(c, space, err);
    if (rc == KVD_OK)
        rc = take_keys(keys, &call->keys, err);
    if (rc == KVD_OK)
        rc = kvd_sized_take(&kvd_sized_paged, paged, &call->paged, err);
    for (uint32_t i = 0; rc == KVD_OK && call->keys.had && i < call->keys.pages; i++)
        if (call->keys.had[i] > KVD_STORED_EXACT)
            rc = kvd_fail(err, KVD_E_INVALID, "had[%u] is %u, and no kvd_stored", i,
                          call->keys.had[i]);
    if (rc == KVD_OK && !call->keys.pages)
        rc = kvd_fail(err, KVD_E_INVALID, "no pages; 1 to %d are possible", KVD_MAX_PROMPT_BLOCKS);
    for (size_t i = 1; i < c->layout.n_layers && rc == KVD_OK; i++)
        if (memcmp(&c->shapes[i], first, sizeof(*first)))
            rc = kvd_fail(err, KVD_E_INVALID,
                          "layers 0 and %zu differ in heads or head_dim: pages want a client for "
                          "each such set of layers",
                          i);
    call->shape = (struct kvd_page_shape){.layers = (uint32_t)c->layout.n_layers,
                                          .heads = first->kv_heads,
                                          .dims = {first->dim_k, first->dim_v}};
    if (rc == KVD_OK)
        rc = kvd_paged_take(&call->paged, &call->shape, call->keys.pages, written, &call->kv, err);
    return rc || !call->paged.on_gpu ? rc : kvd_paged_gpu_check(c, &call->paged, &call->shape, err);
}

static int begin_call(struct call *call, kvd_client *c, const kvd_bytes *space,
                      const kvd_page_keys *keys, const kvd_paged *paged, bool written,
                      struct kvd_error *err)
{
    int rc = begin(call, c, space, keys, paged, written, err);
    if (rc == KVD_OK)
        call->held = kvd_registered_hold(c, &call->kv, call->paged.on_gpu);
    return rc;
}

int kvd_pages_take(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *keys,
                   const kvd_paged *paged, bool written, kvd_page_keys *own_keys,
                   kvd_paged *own_paged, struct kvd_error *err)
{
    struct call call;
    int rc = begin(&call, c, space, keys, paged, written, err);
    *own_keys = call.keys;
    *own_paged = call.paged;
    return rc;
}

// Puts the pages of these numbers, which the staging has room for.
static kvd_result put_some(struct call *call, const bool *exact, const uint32_t *pages, uint32_t n,
                           uint8_t *kinds, kvd_failure *err)
{
    const kvd_page_keys *k = &call->keys;
    Kvd__V1__PutPagesRequest req = KVD__V1__PUT_PAGES_REQUEST__INIT;
    Kvd__V1__PutPagesReply *reply = NULL;
    Kvd__V1__TensorRef refs[2];
    struct reference paged = {.blocks = NULL};
    uint8_t keys[KVD_MAX_CALL_PAGES * KVD_MAX_BLOCK_KEY], flags[KVD_MAX_CALL_PAGES];
    struct kvd_error e = {0};
    for (uint32_t i = 0; i < n; i++) {
        memcpy(keys + (size_t)i * k->key_bytes, key(k, pages[i]), k->key_bytes);
        flags[i] = exact && exact[pages[i]];
    }
    if (call->held ? refer_paged(call, pages[0], pages, n, &paged, &e) : stage(call, pages, n, &e))
        return kvd_client_fail(err, &e);
    if (!call->held)
        refer(call, refs);
    req.space = bytes(call->space->data, call->space->bytes);
    req.key_bytes = k->key_bytes;
    req.keys = bytes(keys, (size_t)n * k->key_bytes);
    const void *after = pages[0] ? key(k, pages[0] - 1) : k->after;
    req.after = bytes(after, after ? k->key_bytes : 0);
    req.exact = bytes(flags, n);
    req.k = call->held ? NULL : &refs[0];
    req.v = call->held ? NULL : &refs[1];
    req.paged = call->held ? &paged.ref : NULL;
    kvd_result rc = kvd_client_call(call->client, METHOD("PutPages"), &req, &req.session,
                                    &kvd__v1__put_pages_reply__descriptor, &reply, err);
    free(paged.blocks);
    if (rc)
        return rc;
    if (reply->kinds.len != n) {
        kvd_fail(&e, KVD_E_INTERNAL, "put %u pages, heard of %zu", n, reply->kinds.len);
        rc = kvd_client_fail(err, &e);
    }
    for (uint32_t i = 0; i < n && rc == KVD_SUCCESS; i++)
        kinds[pages[i]] = reply->kinds.data[i];
    kvd__v1__put_pages_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_pages_put(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *keys,
                         const bool *exact, const kvd_paged *source, uint8_t *kinds,
                         kvd_failure *err)
{
    KVD_WANT(err, "client", c, "space", space, "keys", keys, "source", source);
    uint8_t there[KVD_MAX_PROMPT_BLOCKS];
    uint32_t pages[KVD_MAX_CALL_PAGES], n = 0;
    kvd_found found = KVD_NEW(kvd_found, .kinds = there);
    struct kvd_error e = {0};
    struct call call;
    if (begin_call(&call, c, space, keys, source, false, &e))
        return kvd_client_fail(err, &e);
    kvd_result rc = KVD_SUCCESS;
    if (call.keys.had)
        memcpy(there, call.keys.had, call.keys.pages);
    else
        rc = look(&call, 0, &found, err);
    if (rc == KVD_SUCCESS)
        rc = take_staging(&call, err);
    for (uint32_t i = 0; i < call.keys.pages && rc == KVD_SUCCESS; i++) {
        if (there[i] < (exact && exact[i] ? KVD_STORED_EXACT : KVD_STORED_ENCODED))
            pages[n++] = i;
        // Pages of parts of blocks are named together where they follow each other.
        const bool apart = call.held && n && pages[n - 1] != i && !whole_blocks(&call);
        if (n && (n == call.pages || i + 1 == call.keys.pages || apart)) {
            rc = put_some(&call, exact, pages, n, there, err);
            n = 0;
        }
    }
    give_staging(&call);
    if (rc == KVD_SUCCESS && kinds)
        memcpy(kinds, there, call.keys.pages);
    return rc;
}

static kvd_result get_some(struct call *call, uint32_t page, uint32_t n, uint8_t *kinds,
                           kvd_failure *err)
{
    const kvd_page_keys *k = &call->keys;
    Kvd__V1__GetPagesRequest req = KVD__V1__GET_PAGES_REQUEST__INIT;
    Kvd__V1__GetPagesReply *reply = NULL;
    Kvd__V1__TensorRef refs[2];
    struct reference paged;
    struct kvd_error e = {0};
    if (!call->held)
        refer(call, refs);
    else if (refer_paged(call, page, NULL, n, &paged, &e))
        return kvd_client_fail(err, &e);
    req.space = bytes(call->space->data, call->space->bytes);
    req.key_bytes = k->key_bytes;
    req.keys = bytes(key(k, page), (size_t)n * k->key_bytes);
    req.k = call->held ? NULL : &refs[0];
    req.v = call->held ? NULL : &refs[1];
    req.paged = call->held ? &paged.ref : NULL;
    kvd_result rc = kvd_client_call(call->client, METHOD("GetPages"), &req, &req.session,
                                    &kvd__v1__get_pages_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->kinds.len != n)
        kvd_fail(&e, KVD_E_INTERNAL, "asked for %u pages, heard of %zu", n, reply->kinds.len);
    else if (call->held ||
             (move_pages(call, page, n, 0, true, &e) == KVD_OK && moved(call, &e) == KVD_OK))
        memcpy(kinds + page, reply->kinds.data, n);
    if (e.code)
        rc = kvd_client_fail(err, &e);
    kvd__v1__get_pages_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_pages_get(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *keys,
                         const kvd_paged *target, uint8_t *kinds, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "space", space, "keys", keys, "target", target);
    uint8_t there[KVD_MAX_PROMPT_BLOCKS];
    kvd_found found = KVD_NEW(kvd_found, .kinds = there);
    struct kvd_error e = {0};
    struct call call;
    if (begin_call(&call, c, space, keys, target, true, &e))
        return kvd_client_fail(err, &e);
    kvd_result rc = take_staging(&call, err);
    const bool parts = rc == KVD_SUCCESS && call.keys.pages > call.pages;
    if (parts) // all stay until the last part is read
        rc = look(&call, KVD_MIN(c->timeout_ms, (uint32_t)KVD_MAX_LEASE_MS), &found, err);
    if (parts && rc == KVD_SUCCESS && found.pages < call.keys.pages) {
        kvd_fail(&e, KVD_E_NOT_FOUND, "page %u of %u is not there; nothing was read", found.pages,
                 call.keys.pages);
        rc = kvd_client_fail(err, &e);
    }
    for (uint32_t i = 0; i < call.keys.pages && rc == KVD_SUCCESS; i += call.pages)
        rc = get_some(&call, i, KVD_MIN(call.pages, call.keys.pages - i), there, err);
    give_staging(&call);
    if (found.lease)
        kvd_leases_release(c, &found.lease, 1, NULL); // it ends by itself too
    if (rc == KVD_SUCCESS && kinds)
        memcpy(kinds, there, call.keys.pages);
    return rc;
}
