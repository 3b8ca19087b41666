// Pages in an engine's own blocks, which are registered memory: PutPages gathers them and GetPages
// scatters them, through dense tensors of the backend's, a chunk of layers and pages at a time.
//
// Chunks are what can be given up between, and others' works run there. So nothing of a chunk is
// left in the tensors when it is over. A put's chunks write what counts for nothing before all of
// them are there, as its sequences are its own.
#include "daemon/sched/op.h"
#include "daemon/session/buffer.h"

// What a request says, resolved; and where the executor is.
struct kvd_work_paged {
    struct kvd_paged_kv kv;
    uint32_t pages, layers; // of a chunk, in the run of layers at hand
    uint32_t at;            // chunks of it that are done
    void *memory[];         // where layers of K begin, then of V; then the blocks' numbers
};

// A chunk: pages of the call and layers of the run, and the dense tensors they are in.
struct chunk {
    uint32_t page, pages, layer, layers;
    struct kvd_tensor side[2];
};

// -- what a request says -------------------------------------------------------------------------

// Where a layer of one side begins. *bytes: what all layers have behind that, at least.
static int resolve(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__PagedRef__Side *side,
                   const char *name, uint32_t layer, void **base, uint64_t *bytes,
                   struct kvd_error *err)
{
    const uint64_t id = side->buffers[side->n_buffers == 1 ? 0 : layer];
    const uint64_t offset = side->offsets[layer];
    const bool on_device = w->call->d->backend->ops->on_device;
    struct kvd_buffer *b = kvd_session_want_buffer(s, id, err);
    if (!b)
        return kvd_fail_in(err, "%s[%u]", name, layer);
    if ((b->kind != KVD_MEMORY_MEMFD) != on_device)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s[%u]: buffer %" PRIu64 " is memory of the %s, and kvd computes in that "
                        "of the %s: blocks are taken from there",
                        name, layer, id, on_device ? "host" : "GPU", on_device ? "GPU" : "host");
    if (offset >= b->size)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s[%u] begins at byte %" PRIu64 " of buffer %" PRIu64 ", which has "
                        "%" PRIu64,
                        name, layer, offset, id, b->size);
    *base = b->data + offset;
    *bytes = KVD_MIN(*bytes, b->size - offset);
    return kvd_work_hold_buffer(w, b, err);
}

static int resolve_side(struct kvd_work *w, struct kvd_session *s,
                        const Kvd__V1__PagedRef__Side *side, bool v, struct kvd_error *err)
{
    struct kvd_work_paged *g = w->pages->paged;
    const char *name = v ? "paged.v" : "paged.k";
    const uint32_t layers = w->layer_count;
    void **bases = g->memory + (v ? layers : 0);
    uint64_t bytes = UINT64_MAX;
    int rc = KVD_OK;
    if (!side)
        return kvd_fail(err, KVD_E_INVALID, "%s is missing", name);
    if (side->n_offsets != layers || (side->n_buffers != 1 && side->n_buffers != layers))
        return kvd_fail(err, KVD_E_INVALID,
                        "%s has %zu buffers and %zu offsets: the session has %u layers, of which "
                        "each has an offset, and a buffer unless all are in one",
                        name, side->n_buffers, side->n_offsets, layers);
    for (uint32_t i = 0; i < layers && rc == KVD_OK; i++)
        rc = resolve(w, s, side, name, i, &bases[i], &bytes, err);
    g->kv.side[v] = (struct kvd_paged_side){
        .name = name,
        .layers = bases,
        .bytes = bytes,
        .strides = {side->block_stride, side->head_stride, side->token_stride, side->dim_stride},
        .dim = v ? w->plane->head_dim_v : w->plane->head_dim_k};
    return rc;
}

// All that is written, for when the call's tensors are compared.
static int note_spans(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__PagedRef *ref,
                      struct kvd_error *err)
{
    int rc = KVD_OK;
    for (int v = 0; v < 2; v++) {
        const Kvd__V1__PagedRef__Side *side = v ? ref->v : ref->k;
        for (uint32_t i = 0; i < w->layer_count && rc == KVD_OK; i++) {
            const struct kvd_overlap span = kvd_paged_span(&w->pages->paged->kv, v, i);
            const uint64_t id = side->buffers[side->n_buffers == 1 ? 0 : i];
            rc = kvd_work_note_span(w, kvd_session_buffer(s, id), side->offsets[i], &span, err);
        }
    }
    return rc;
}

int kvd_op_paged_check(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__PagedRef *ref,
                       bool written, struct kvd_error *err)
{
    const size_t bases = 2 * (size_t)w->layer_count * sizeof(void *);
    // A block has one token at least, and only the first of them can be one that is not used.
    const uint32_t n = (uint32_t)KVD_MIN(ref->n_blocks, (size_t)w->pages->n * KVD_PAGE_TOKENS + 1);
    struct kvd_work_paged *g = calloc(1, sizeof(*g) + bases + n * sizeof(*ref->blocks));
    w->pages->paged = g;
    if (!g)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uint32_t *blocks = (uint32_t *)(g->memory + 2 * (size_t)w->layer_count);
    if (n)
        memcpy(blocks, ref->blocks, n * sizeof(*blocks));
    g->kv = (struct kvd_paged_kv){.layers = w->layer_count,
                                  .heads = w->plane->kv_heads,
                                  .all_blocks = ref->all_blocks,
                                  .block_tokens = ref->block_tokens,
                                  .blocks = blocks,
                                  .n_blocks = n,
                                  .first_token = ref->first_token};
    int rc = resolve_side(w, s, ref->k, false, err);
    if (rc == KVD_OK)
        rc = resolve_side(w, s, ref->v, true, err);
    if (rc == KVD_OK)
        rc = kvd_paged_check(&g->kv, w->pages->n, written, err);
    return rc || !written ? rc : note_spans(w, s, ref, err);
}

// -- chunks --------------------------------------------------------------------------------------

// Bytes of one layer of a page, K or V.
static uint64_t row_bytes(const struct kvd_work *w, bool v)
{
    const struct kvd_paged_kv *kv = &w->pages->paged->kv;
    return (uint64_t)KVD_PAGE_TOKENS * kv->heads * kv->side[v].dim * 2;
}

static uint64_t bytes_of(const struct kvd_work *w, uint32_t pages, uint32_t layers)
{
    return (row_bytes(w, false) + row_bytes(w, true)) * pages * layers;
}

// As many pages as the tensors have room for, of all layers of the run; or one of some.
static int plan(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_work_paged *g = w->pages->paged;
    const struct kvd_backend_ops *ops = d->backend->ops;
    const uint32_t all = kvd_op_run(w)->layer_count, n = w->pages->n;
    const uint64_t least = bytes_of(w, 1, 1), most = KVD_MAX(ops->dense_most, least);
    struct kvd_dense dense;
    int rc = ops->dense(d->backend, least, KVD_MIN(bytes_of(w, n, all), most), &dense, &w->err);
    if (rc)
        return rc;
    const uint64_t room = KVD_MIN(dense.bytes, most);
    g->pages = (uint32_t)KVD_MAX(KVD_MIN(room / bytes_of(w, 1, all), (uint64_t)n), (uint64_t)1);
    g->layers = (uint32_t)KVD_MIN(room / bytes_of(w, g->pages, 1), (uint64_t)all);
    g->layers = KVD_MIN(g->layers, KVD_PAGED_MOST_HEADS / g->kv.heads);
    return KVD_OK;
}

static struct chunk chunk_at(const struct kvd_work *w, uint32_t at, const struct kvd_dense *dense)
{
    const struct kvd_work_paged *g = w->pages->paged;
    const uint32_t all = kvd_op_run(w)->layer_count;
    const uint32_t parts = (uint32_t)kvd_div_up(all, g->layers);
    struct chunk c = {.page = at / parts * g->pages, .layer = at % parts * g->layers};
    c.pages = KVD_MIN(g->pages, w->pages->n - c.page);
    c.layers = KVD_MIN(g->layers, all - c.layer);
    for (int v = 0; v < 2; v++) {
        const uint64_t head = (uint64_t)g->kv.side[v].dim * 2, token = head * g->kv.heads;
        c.side[v] = (struct kvd_tensor){.data = dense->data +
                                                (v ? row_bytes(w, false) * c.pages * c.layers : 0),
                                        .layer_stride = token * KVD_PAGE_TOKENS * c.pages,
                                        .token_stride = token,
                                        .head_stride = head,
                                        .dtype = KVD_DTYPE_BF16,
                                        .on_device = dense->on_device};
    }
    return c;
}

static int move(struct kvd_daemon *d, struct kvd_work *w, const struct chunk *c, bool out)
{
    const struct kvd_paged_copy copy = {.layer = kvd_op_run(w)->at + c->layer,
                                        .layers = c->layers,
                                        .page = c->page,
                                        .pages = c->pages,
                                        .dense = {c->side[0].data, c->side[1].data},
                                        .dense_tokens = c->pages * KVD_PAGE_TOKENS,
                                        .out = out};
    return d->backend->ops->paged(d->backend, &w->pages->paged->kv, &copy, &w->err);
}

static int each_chunk(struct kvd_daemon *d, struct kvd_work *w,
                      int (*act)(struct kvd_daemon *d, struct kvd_work *w, const struct chunk *c))
{
    struct kvd_work_paged *g = w->pages->paged;
    struct kvd_slice *slice = &w->job.slice;
    if (!g || !w->n_items)
        return KVD_OK;
    int rc = g->at ? KVD_OK : plan(d, w);
    if (rc)
        return rc;
    const uint64_t bytes = bytes_of(w, g->pages, g->layers);
    const uint32_t n = (uint32_t)(kvd_div_up(w->pages->n, g->pages) *
                                  kvd_div_up(kvd_op_run(w)->layer_count, g->layers));
    while (g->at < n) {
        struct kvd_dense dense; // others may have moved it
        rc = d->backend->ops->dense(d->backend, bytes, bytes, &dense, &w->err);
        if (rc)
            return rc;
        const struct chunk c = chunk_at(w, g->at, &dense);
        rc = act(d, w, &c);
        if (rc)
            return rc;
        g->at++;
        slice->more = g->at < n;
        if (slice->more && kvd_slice_over(slice))
            return KVD_OK;
    }
    g->at = 0; // of the next run of layers
    return KVD_OK;
}

// Which pages of an item are in a chunk: [*from, *to) of the item's. False: none.
static bool meet(const struct kvd_work *w, const struct chunk *c, uint32_t item, uint32_t *from,
                 uint32_t *to)
{
    const uint32_t first = w->pages->first[item];
    const uint32_t end = first + w->items[item].tokens / KVD_PAGE_TOKENS;
    if (end <= c->page || first >= c->page + c->pages)
        return false;
    *from = KVD_MAX(first, c->page) - first;
    *to = KVD_MIN(end, c->page + c->pages) - first;
    return true;
}

// The tensors from a page of the call on.
static struct kvd_tensor from_page(const struct chunk *c, bool v, uint32_t page)
{
    struct kvd_tensor t = c->side[v];
    t.data += (uint64_t)(page - c->page) * KVD_PAGE_TOKENS * t.token_stride;
    return t;
}

// -- put -----------------------------------------------------------------------------------------

// The parts of items [begin, end) that are in a chunk, as appends; and the first page of each.
static uint32_t parts_of(const struct kvd_work *w, const struct chunk *c, uint32_t begin,
                         uint32_t end, struct kvd_append_item *out, uint32_t *pages)
{
    uint32_t n = 0, from, to;
    for (uint32_t i = begin; i < end; i++) {
        if (!meet(w, c, i, &from, &to))
            continue;
        const uint32_t page = w->pages->first[i] + from;
        struct kvd_append_item *item = &out[n];
        kvd_op_append_fill(w, &w->items[i], item);
        item->length = item->hist_end = (uint64_t)from * KVD_PAGE_TOKENS; // pages have no window
        item->new_length = item->new_hist_end = (uint64_t)to * KVD_PAGE_TOKENS;
        item->k = from_page(c, false, page);
        item->v = from_page(c, true, page);
        pages[n++] = page;
    }
    return n;
}

static int put_chunk(struct kvd_daemon *d, struct kvd_work *w, const struct chunk *c)
{
    const struct kvd_run *run = kvd_op_run(w);
    const struct kvd_work_pages *p = w->pages;
    const struct kvd_backend_ops *ops = d->backend->ops;
    uint32_t pages[KVD_MAX_CALL_PAGES];
    const uint32_t encoded = parts_of(w, c, 0, p->n_encoded, w->append_items, pages);
    const uint32_t exact =
        parts_of(w, c, p->n_encoded, w->n_items, w->append_items + encoded, pages + encoded);
    struct kvd_append_params params = {.plane = &p->shapes[0]->planes[run->plane],
                                       .rotation = p->rotations[0][run->plane],
                                       .layer_begin = run->layer_begin + c->layer,
                                       .layer_count = c->layers,
                                       .part = KVD_APPEND_DEMOTE,
                                       .items = w->append_items,
                                       .n_items = encoded + exact};
    if (!params.n_items)
        return KVD_OK; // all of its pages are there
    int rc = move(d, w, c, false);
    if (rc)
        return rc;
    rc = ops->check(d->backend, &params, &w->nonfinite);
    if (rc)
        return kvd_op_explain_pages(w, rc, pages);
    params.n_items = encoded;
    rc = encoded ? ops->append(d->backend, &params, &w->err) : KVD_OK;
    if (rc || !exact)
        return rc;
    params.plane = &p->shapes[1]->planes[run->plane];
    params.rotation = p->rotations[1][run->plane];
    params.items += encoded;
    params.n_items = exact;
    return ops->append(d->backend, &params, &w->err);
}

int kvd_op_paged_put(struct kvd_daemon *d, struct kvd_work *w)
{
    return each_chunk(d, w, put_chunk);
}

// -- get -----------------------------------------------------------------------------------------

static int get_chunk(struct kvd_daemon *d, struct kvd_work *w, const struct chunk *c)
{
    const struct kvd_run *run = kvd_op_run(w);
    const struct kvd_work_pages *p = w->pages;
    uint32_t from, to;
    int rc = KVD_OK;
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++) {
        const struct kvd_work_item *item = &w->items[i];
        const int space = i >= p->n_encoded;
        if (!meet(w, c, i, &from, &to))
            continue;
        const struct kvd_read_params params = {.plane = &p->shapes[space]->planes[run->plane],
                                               .rotation = p->rotations[space][run->plane],
                                               .layer_begin = run->layer_begin + c->layer,
                                               .layer_count = c->layers,
                                               .pages = kvd_op_pages(&item->views[run->plane]),
                                               .length = item->tokens,
                                               .hist_end = item->tokens,
                                               .begin = (uint64_t)from * KVD_PAGE_TOKENS,
                                               .tokens = (to - from) * KVD_PAGE_TOKENS,
                                               .k = from_page(c, false, p->first[i] + from),
                                               .v = from_page(c, true, p->first[i] + from)};
        rc = d->backend->ops->read(d->backend, &params, &w->err);
    }
    return rc ? rc : move(d, w, c, true);
}

int kvd_op_paged_get(struct kvd_daemon *d, struct kvd_work *w)
{
    return each_chunk(d, w, get_chunk);
}
