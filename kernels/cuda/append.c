// Append behind the ops table, and the look at what is to be appended.
#include "kernels/cuda/slices.h"

static uint32_t new_tokens(const struct kvd_append_item *item)
{
    return (uint32_t)(item->new_length - item->length);
}

// Bytes of the tensors of a layer, and of the tables that every slice carries.
static uint64_t append_bytes(const struct kvd_append_params *p, uint64_t *tables)
{
    const struct kvd_plane *g = p->plane;
    uint64_t bytes = 0;
    *tables = kvd_stage_bytes(p->n_items * sizeof(struct kvd_cuda_append_item)) + 256;
    for (uint32_t i = 0; i < p->n_items; i++) {
        uint64_t rows = (uint64_t)new_tokens(&p->items[i]) * g->kv_heads * 2;
        bytes += kvd_in_place(&p->items[i].k) ? 0 : rows * g->head_dim_k;
        bytes += kvd_in_place(&p->items[i].v) ? 0 : rows * g->head_dim_v;
        uint64_t pages = codec_pages(g, p->items[i].new_hist_end) + bf16_pages(g);
        *tables += kvd_stage_bytes(pages * sizeof(uint64_t)) + 2 * 256;
    }
    return bytes;
}

// Items and page tables, with tensors of the slice [layer, layer + layers) staged at `staged`.
static struct kvd_cuda_append_params append_tables(struct kvd_cuda *c,
                                                   const struct kvd_append_params *p,
                                                   uint32_t layer, uint32_t layers,
                                                   struct kvd_staged *staged)
{
    const struct kvd_plane *g = p->plane;
    struct kvd_cuda_append_params out = {.kv_heads = g->kv_heads,
                                         .dim_k = g->head_dim_k,
                                         .dim_v = g->head_dim_v,
                                         .codec = g->codec.k,
                                         .codec_v = g->codec.v,
                                         .sink = g->sink,
                                         .ring = kvd_plane_ring(g),
                                         .layer_begin = p->layer_begin + layer,
                                         .layer_count = layers,
                                         .n_items = p->n_items,
                                         .whole_chunks = true};
    if (p->rotation)
        out.rotation = p->rotation->device;
    uint64_t at = kvd_stage_take(c, p->n_items * sizeof(struct kvd_cuda_append_item));
    struct kvd_cuda_append_item *items = (void *)(c->stage.host + at);
    out.items = (void *)(c->stage.device + at);
    for (uint32_t i = 0; i < p->n_items; i++) {
        const struct kvd_append_item *item = &p->items[i];
        uint32_t codec = codec_pages(g, item->new_hist_end), bf16 = bf16_pages(g);
        uint64_t table = kvd_stage_take(c, (codec + bf16) * sizeof(uint64_t));
        if (codec)
            memcpy(c->stage.host + table, item->pages.codec, codec * sizeof(uint64_t));
        memcpy(c->stage.host + table + codec * sizeof(uint64_t), item->pages.bf16,
               bf16 * sizeof(uint64_t));
        staged[2 * i] = take(c, &item->k, layer, layers, new_tokens(item), g->kv_heads,
                             g->head_dim_k, kvd_in_place(&item->k));
        staged[2 * i + 1] = take(c, &item->v, layer, layers, new_tokens(item), g->kv_heads,
                                 g->head_dim_v, kvd_in_place(&item->v));
        items[i] = (struct kvd_cuda_append_item){
            .codec = (void *)(c->stage.device + table),
            .bf16 = (uint64_t *)(void *)(c->stage.device + table) + codec,
            .length = (uint32_t)item->length,
            .hist_end = (uint32_t)item->hist_end,
            .new_length = (uint32_t)item->new_length,
            .new_hist_end = (uint32_t)item->new_hist_end,
            .first_chunk = out.chunks,
            .first_token = out.tokens,
            .first_kept = out.kept,
            .k = kvd_device_tensor(c, &staged[2 * i]),
            .v = kvd_device_tensor(c, &staged[2 * i + 1])};
        out.chunks += kvd_cuda_chunks(&items[i], g->sink);
        if (kvd_cuda_chunks(&items[i], g->sink))
            out.whole_chunks &= (items[i].hist_end - g->sink) % KVD_CHUNK_TOKENS == 0;
        out.tokens += new_tokens(item);
        if (p->part != KVD_APPEND_DEMOTE)
            out.kept += kvd_cuda_kept_tokens(&items[i], g->sink);
    }
    return out;
}

// Brings a slice to the device and describes it.
static int append_slice(struct kvd_cuda *c, const struct kvd_append_params *p, uint32_t layer,
                        uint32_t layers, struct kvd_staged *staged,
                        struct kvd_cuda_append_params *out, struct kvd_error *err)
{
    c->stage.used = 0;
    *out = append_tables(c, p, layer, layers, staged);
    for (uint32_t i = 0; i < 2 * p->n_items; i++)
        kvd_stage_pack(c, &staged[i]);
    int rc = kvd_stage_upload(c, 0, c->stage.used, err);
    for (uint32_t i = 0; i < 2 * p->n_items && rc == KVD_OK; i++)
        rc = kvd_stage_gather(c, &staged[i], err);
    return rc;
}

// What a layer of an append takes: tensors come over the bus, others are read where they are.
static uint64_t append_ns(const struct kvd_append_params *p, uint64_t staged)
{
    const struct kvd_plane *g = p->plane;
    uint64_t rows = 0;
    for (uint32_t i = 0; i < p->n_items; i++)
        rows += (uint64_t)new_tokens(&p->items[i]) * g->kv_heads;
    return staged / 10 + rows * 2 * (g->head_dim_k + g->head_dim_v) / 200;
}

// Makes room in the stage for so many layers at once, `step`, as are to be taken.
static int append_room(struct kvd_cuda *c, const struct kvd_append_params *p, uint32_t *step,
                       struct kvd_error *err)
{
    uint64_t tables, bytes = append_bytes(p, &tables);
    *step = fair_layers(p->slice, append_ns(p, bytes), slice_layers(bytes, p->layer_count));
    return kvd_stage_begin(c, tables + *step * bytes + 256 * 2 * (uint64_t)p->n_items, err);
}

// Calls `run` on layers of an append, so many at once as are taken. In the slices' count the first
// layer is `base`.
static int each_slice(struct kvd_cuda *c, const struct kvd_append_params *p, uint64_t base,
                      int (*run)(struct kvd_cuda *c, const struct kvd_cuda_append_params *p,
                                 uint32_t layer, void *ctx, struct kvd_error *err),
                      void *ctx, struct kvd_error *err)
{
    struct kvd_staged *staged KVD_FREE = calloc(2 * (size_t)p->n_items, sizeof(*staged));
    if (!staged)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uint32_t step, first = p->slice && p->slice->at > base ? (uint32_t)(p->slice->at - base) : 0;
    int rc = append_room(c, p, &step, err);
    for (uint32_t l = first; l < p->layer_count && rc == KVD_OK; l += step) {
        struct kvd_cuda_append_params slice;
        if (pause_at(p->slice, base + l))
            return KVD_OK;
        rc = append_slice(c, p, l, KVD_MIN(step, p->layer_count - l), staged, &slice, err);
        if (rc == KVD_OK)
            rc = run(c, &slice, l, ctx, err);
    }
    return rc;
}

static int run_append(struct kvd_cuda *c, const struct kvd_cuda_append_params *p, uint32_t layer,
                      void *ctx, struct kvd_error *err)
{
    (void)layer;
    (void)ctx;
    int rc = kvd_cuda_append(p, c->stream);
    if (rc == 0)
        rc = cudaStreamSynchronize(c->stream); // the stage is used again
    return kvd_cuda_status(rc, "storing tokens", err);
}

// Tokens of a layer that are taken at once.
static uint64_t piece_tokens(const struct kvd_cuda *c, const struct kvd_append_params *p)
{
    uint64_t tables, tokens = 0, ns = append_ns(p, append_bytes(p, &tables));
    for (uint32_t i = 0; i < p->n_items; i++)
        tokens += new_tokens(&p->items[i]);
    tokens = tokens * c->piece_ns / KVD_MAX(ns, (uint64_t)1);
    return KVD_MAX(tokens / KVD_PAGE_TOKENS, (uint64_t)1) * KVD_PAGE_TOKENS;
}

// Goes through a part of an append batch by batch, or only makes room for each.
static int append_part(struct kvd_cuda *c, const struct kvd_append_params *p, bool only_room,
                       struct kvd_error *err)
{
    struct kvd_append_item *pieces KVD_FREE = NULL;
    struct kvd_append_params batch = *p;
    uint64_t most = p->slice ? piece_tokens(c, p) : UINT32_MAX, base = 0;
    uint32_t n, step;
    int rc = kvd_cuda_pieces(p, most, &pieces, &n, err);
    for (uint32_t i = 0; rc == KVD_OK && i < n && !(p->slice && p->slice->more);
         i += batch.n_items) {
        batch.items = pieces + i;
        batch.n_items = kvd_cuda_batch(batch.items, n - i, most);
        rc = only_room ? append_room(c, &batch, &step, err)
                       : each_slice(c, &batch, base, run_append, NULL, err);
        base += p->layer_count;
    }
    return rc;
}

// Room for the second part is made before the first: what has begun to overwrite must not fail.
int kvd_cuda_op_append(struct kvd_backend *b, const struct kvd_append_params *p,
                       struct kvd_error *err)
{
    struct kvd_append_params store = *p;
    store.part = KVD_APPEND_STORE;
    if (p->slice)
        p->slice->more = false;
    int checked = kvd_cuda_rotation_check(p->rotation, p->plane->codec, err);
    if (checked)
        return checked;
    if (p->part == KVD_APPEND_WHOLE)
        return each_slice(cuda_of(b), p, 0, run_append, NULL, err);
    if (p->part == KVD_APPEND_DEMOTE && !(p->slice && p->slice->at)) {
        int rc = append_part(cuda_of(b), &store, true, err);
        if (rc)
            return rc;
    }
    return append_part(cuda_of(b), p, false, err);
}

struct check {
    const struct kvd_append_params *p;
    struct kvd_nonfinite *where;
};

// Which channel of a row is not finite: the kernel tells only the row.
static uint32_t bad_channel(const struct kvd_cuda_tensor *t, uint32_t layer, uint32_t token,
                            uint32_t head, uint32_t dim)
{
    uint16_t row[KVD_MAX_ROW];
    const uint8_t *at =
        t->data + layer * t->layer_stride + token * t->token_stride + head * t->head_stride;
    if (cudaMemcpy(row, at, dim * 2, cudaMemcpyDeviceToHost) != cudaSuccess)
        return 0;
    for (uint32_t i = 0; i < dim; i++)
        if ((row[i] & 0x7f80) == 0x7f80)
            return i;
    return 0;
}

// Says where the check of a slice of layers, which has run, found something.
static int found(struct kvd_cuda *c, const struct kvd_append_params *call,
                 const struct kvd_cuda_append_params *p, uint32_t layer, struct kvd_nonfinite *w,
                 struct kvd_error *err)
{
    const struct kvd_plane *g = call->plane;
    unsigned long long at = *c->found;
    if (at == ~0ull)
        return KVD_OK;
    w->in_v = at % 2;
    w->head = (uint32_t)(at / 2 % g->kv_heads);
    w->token = (uint32_t)(at / 2 / g->kv_heads % (1 << 17));
    uint64_t rest = at / 2 / g->kv_heads >> 17;
    const uint32_t layers = KVD_MAX(p->layer_count, 1u); // it is 1 at least
    uint32_t slice_layer = (uint32_t)(rest % layers);
    w->item = (uint32_t)(rest / layers);
    w->layer = call->layer_begin + layer + slice_layer;
    struct kvd_cuda_append_item staged;
    int rc = cudaMemcpy(&staged, p->items + w->item, sizeof(staged), cudaMemcpyDeviceToHost);
    if (rc)
        return kvd_cuda_status(rc, "checking tokens", err);
    w->channel = bad_channel(w->in_v ? &staged.v : &staged.k, slice_layer, w->token, w->head,
                             w->in_v ? g->head_dim_v : g->head_dim_k);
    return KVD_E_INVALID;
}

static int queue_check(struct kvd_cuda *c, const struct kvd_cuda_append_params *p,
                       struct kvd_error *err)
{
    *c->found = ~0ull;
    return kvd_cuda_status(kvd_cuda_check(p, c->found, c->stream), "checking tokens", err);
}

static int run_check(struct kvd_cuda *c, const struct kvd_cuda_append_params *p, uint32_t layer,
                     void *ctx, struct kvd_error *err)
{
    struct check *check = ctx;
    int rc = queue_check(c, p, err);
    if (rc == KVD_OK)
        rc = kvd_cuda_status(cudaStreamSynchronize(c->stream), "checking tokens", err);
    return rc ? rc : found(c, check->p, p, layer, check->where, err);
}

int kvd_cuda_op_check(struct kvd_backend *b, const struct kvd_append_params *p,
                      struct kvd_nonfinite *where)
{
    struct kvd_cuda *c = cuda_of(b);
    struct check check = {p, where};
    bool host = true;
    for (uint32_t i = 0; i < p->n_items && host; i++)
        host = !p->items[i].k.on_device && !p->items[i].v.on_device;
    if (host) // no need to bring them over twice
        return kvd_check_host(p, where);
    return each_slice(c, p, 0, run_check, &check, NULL);
}

// -- of a step, with its attention (ops.c) --------------------------------------------------------

uint64_t kvd_cuda_short_append(const struct kvd_append_params *p)
{
    uint64_t tables, staged = append_bytes(p, &tables);
    return staged == 0 && append_ns(p, 0) * p->layer_count <= SLICE_NS ? tables : 0;
}

int kvd_cuda_short_append_begin(struct kvd_cuda *c, const struct kvd_append_params *p,
                                struct kvd_cuda_append_params *out, struct kvd_error *err)
{
    struct kvd_staged *staged KVD_FREE = calloc(2 * (size_t)p->n_items, sizeof(*staged));
    if (!staged)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    int rc = append_slice(c, p, 0, p->layer_count, staged, out, err);
    return rc ? rc : queue_check(c, out, err);
}

int kvd_cuda_short_append_check(struct kvd_cuda *c, const struct kvd_append_params *p,
                                const struct kvd_cuda_append_params *queued,
                                struct kvd_nonfinite *where, struct kvd_error *err)
{
    int rc = kvd_stage_wait(c, err);
    return rc ? rc : found(c, p, queued, 0, where, err);
}
