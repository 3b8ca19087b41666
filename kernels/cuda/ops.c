// Attend, read and rotate behind the ops table.
//
// Tensors in device memory that lie as the kernels want them are used where they are. Others go
// through the stage: a call is cut into slices of layers whose tensors fit it, and each slice is
// packed, uploaded, run, downloaded and unpacked.
#include "kernels/cuda/slices.h"

// -- attend --------------------------------------------------------------------------------------

// Items that one launch can take.
static bool alike(const struct kvd_attend_item *a, const struct kvd_attend_item *b)
{
    return a->q_len == b->q_len && a->new_tokens == b->new_tokens && a->q.dtype == b->q.dtype &&
           a->o.dtype == b->o.dtype;
}

// Tensors of an attention; `at` offsets are for a slice's first item and layer. Every tensor is
// staged as [layer][item][token][head][dim].
enum { T_Q, T_K, T_V, T_O, T_LSE, T_COUNT };

struct group {
    const struct kvd_attend_params *p;
    const struct kvd_attend_item *items;
    uint32_t n;
    bool lse;
    uint32_t codec_stride, bf16_stride;
    uint64_t row[T_COUNT]; // bytes of one item's layer; 0: not there
    // The first item's tensor where all items' lie in device memory as they would be staged.
    const struct kvd_tensor *direct[T_COUNT];
};

static const struct kvd_tensor *tensor_of(const struct kvd_attend_item *item, uint32_t t)
{
    const struct kvd_tensor *const all[] = {&item->q, &item->k, &item->v, &item->o, &item->lse};
    return all[t];
}

// Tokens of tensor t.
static uint32_t tokens_of(const struct kvd_attend_item *item, uint32_t t)
{
    return t == T_K || t == T_V ? item->new_tokens : item->q_len;
}

// Whether a tensor of all items is [layer][item][token][head][dim] already.
static bool lies_right(const struct group *g, uint32_t t, uint32_t heads)
{
    const struct kvd_tensor *head = tensor_of(g->items, t);
    uint32_t tokens = tokens_of(g->items, t);
    bool right = g->row[t] && head->data && kvd_in_place(head);
    for (uint32_t i = 0; i < g->n && right; i++) {
        const struct kvd_tensor *x = tensor_of(&g->items[i], t);
        right = x->data == head->data + i * g->row[t] && x->layer_stride == head->layer_stride &&
                (tokens == 1 || x->token_stride * tokens == g->row[t]) &&
                (heads == 1 || x->head_stride * heads * tokens == g->row[t]);
    }
    return right;
}

// What a layer of some alike items takes: reading their pages, or the arithmetic of many queries.
static uint64_t attend_ns(const struct kvd_plane *plane, const struct kvd_attend_item *items,
                          uint32_t n)
{
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < n; i++)
        tokens += items[i].length + items[i].new_tokens;
    uint64_t ns = tokens * plane->kv_heads / 40 + tokens * plane->q_heads * items->q_len / 500;
    return ns * (plane->head_dim_k + plane->head_dim_v) / 256;
}

// Query rows over latents to take at once: a row's partial results are as long as a latent, and lie
// in scratch.
enum { LATENT_ROWS = 1 << 14 };

// Queries of an item to take at once: all, unless that were more than a launch takes, or than two
// slices. The clock has no say in it, so that slices change no result.
static uint32_t queries_at_once(const struct kvd_plane *plane, const struct kvd_attend_item *item)
{
    uint64_t most = 65535 / plane->kv_heads * 8ull * plane->kv_heads / plane->q_heads;
    if (plane->latent)
        most = LATENT_ROWS / plane->q_heads;
    uint64_t ns = attend_ns(plane, item, 1);
    if (ns > 2 * SLICE_NS)
        most = KVD_MIN(most, KVD_MAX(item->q_len * (uint64_t)SLICE_NS / ns, (uint64_t)16));
    if (item->q_len <= most)
        return item->q_len;
    uint64_t parts = kvd_div_up(item->q_len, most);
    return (uint32_t)kvd_div_up(item->q_len, parts);
}

static struct group group_at(const struct kvd_attend_params *p, uint32_t first)
{
    const struct kvd_plane *g = p->plane;
    struct group out = {.p = p, .items = &p->items[first], .bf16_stride = bf16_pages(g)};
    const struct kvd_attend_item *head = out.items;
    uint64_t ns = 0;
    while (first + out.n < p->n_items && alike(head, &out.items[out.n])) {
        ns += attend_ns(g, &out.items[out.n], 1);
        if (out.n && ns > 2 * SLICE_NS)
            break;
        if (out.n && g->latent && (uint64_t)(out.n + 1) * head->q_len * g->q_heads > LATENT_ROWS)
            break;
        out.lse |= out.items[out.n].lse.data != NULL;
        uint32_t pages = codec_pages(g, out.items[out.n].hist_end);
        out.codec_stride = KVD_MAX(out.codec_stride, pages);
        out.n++;
    }
    out.row[T_Q] = tensor_bytes(&head->q, head->q_len, g->q_heads, kvd_plane_dim_q(g));
    out.row[T_O] = tensor_bytes(&head->o, head->q_len, g->q_heads, g->head_dim_v);
    out.row[T_LSE] = out.lse ? (uint64_t)head->q_len * g->q_heads * 4 : 0;
    out.row[T_K] = (uint64_t)head->new_tokens * g->kv_heads * g->head_dim_k * 2;
    out.row[T_V] = (uint64_t)head->new_tokens * g->kv_heads * g->head_dim_v * 2;
    for (uint32_t t = 0; t < T_COUNT; t++)
        if (lies_right(&out, t, t == T_K || t == T_V ? g->kv_heads : g->q_heads))
            out.direct[t] = tensor_of(head, t);
    return out;
}

// The staged block of tensor t of item i.
static struct kvd_staged staged_of(const struct group *g, const uint64_t at[T_COUNT], uint32_t t,
                                   uint32_t i, uint32_t layer, uint32_t layers)
{
    const struct kvd_attend_item *item = &g->items[i];
    const struct kvd_plane *geo = g->p->plane;
    const uint32_t heads[] = {geo->q_heads, geo->kv_heads, geo->kv_heads, geo->q_heads,
                              geo->q_heads};
    const uint32_t dims[] = {kvd_plane_dim_q(geo), geo->head_dim_k, geo->head_dim_v,
                             geo->head_dim_v, 1};
    return (struct kvd_staged){.tensor = tensor_of(item, t),
                               .layer0 = layer,
                               .layers = layers,
                               .tokens = tokens_of(item, t),
                               .heads = heads[t],
                               .dim = dims[t],
                               .at = at[t] + i * g->row[t],
                               .layer_stride = g->n * g->row[t]};
}

static bool wanted(const struct group *g, uint32_t t, uint32_t i)
{
    return g->row[t] && !g->direct[t] && (t != T_LSE || g->items[i].lse.data);
}

// Whether a tensor of some item goes through the stage, and over the bus.
static bool over_bus(const struct group *g, uint32_t t)
{
    bool any = false;
    for (uint32_t i = 0; i < g->n && !any; i++)
        any = wanted(g, t, i) && !tensor_of(&g->items[i], t)->on_device;
    return any;
}

// Page tables and lengths of the group's sequences.
static struct kvd_cuda_pages stage_pages(struct kvd_cuda *c, const struct group *g)
{
    uint64_t codec = kvd_stage_take(c, (uint64_t)g->n * g->codec_stride * 8);
    uint64_t bf16 = kvd_stage_take(c, (uint64_t)g->n * g->bf16_stride * 8);
    uint64_t length = kvd_stage_take(c, g->n * 4), end = kvd_stage_take(c, g->n * 4);
    for (uint32_t i = 0; i < g->n; i++) {
        const struct kvd_attend_item *item = &g->items[i];
        uint32_t pages = codec_pages(g->p->plane, item->hist_end);
        if (pages)
            memcpy(c->stage.host + codec + (uint64_t)i * g->codec_stride * 8, item->pages.codec,
                   pages * 8);
        memcpy(c->stage.host + bf16 + (uint64_t)i * g->bf16_stride * 8, item->pages.bf16,
               g->bf16_stride * 8);
        ((uint32_t *)(void *)(c->stage.host + length))[i] = (uint32_t)item->length;
        ((uint32_t *)(void *)(c->stage.host + end))[i] = (uint32_t)item->hist_end;
    }
    return (struct kvd_cuda_pages){.codec = (void *)(c->stage.device + codec),
                                   .bf16 = (void *)(c->stage.device + bf16),
                                   .codec_stride = g->codec_stride,
                                   .bf16_stride = g->bf16_stride,
                                   .length = (void *)(c->stage.device + length),
                                   .hist_end = (void *)(c->stage.device + end)};
}

// Of the layers [layer, layer + layers) of the call.
static const float *stage_sinks(struct kvd_cuda *c, const struct kvd_attend_params *p,
                                uint32_t layer, uint32_t layers)
{
    uint64_t row = p->plane->q_heads * sizeof(float), at = kvd_stage_take(c, layers * row);
    memcpy(c->stage.host + at, (const uint8_t *)p->sinks + layer * row, layers * row);
    return (const void *)(c->stage.device + at);
}

int kvd_cuda_scratch(struct kvd_cuda *c, uint64_t bytes, struct kvd_error *err)
{
    if (bytes <= c->scratch_size)
        return KVD_OK;
    cudaFree(c->scratch);
    c->scratch = NULL;
    c->scratch_size = 0;
    bytes = kvd_round_up(bytes + bytes / 4, 1 << 20);
    void *p = NULL;
    int rc = cudaMalloc(&p, bytes);
    if (rc == 0)
        rc = cudaMemset(p, 0, bytes);
    if (rc == 0)
        rc = cudaDeviceSynchronize();
    c->scratch = p;
    c->scratch_size = rc ? 0 : bytes;
    return kvd_cuda_status(rc, "making room for attention", err);
}

// Parameters common to all layers of a group, and the plan.
static int plan_group(struct kvd_cuda *c, const struct group *g, struct kvd_cuda_attend_params *out,
                      struct kvd_error *err)
{
    const struct kvd_plane *geo = g->p->plane;
    const struct kvd_attend_item *head = g->items;
    *out = (struct kvd_cuda_attend_params){.sequences = g->n,
                                           .q_heads = geo->q_heads,
                                           .kv_heads = geo->kv_heads,
                                           .dim_k = geo->head_dim_k,
                                           .dim_v = geo->head_dim_v,
                                           .codec = geo->codec.k,
                                           .codec_v = geo->codec.v,
                                           .q_len = head->q_len,
                                           .new_tokens = head->new_tokens,
                                           .sink = geo->sink,
                                           .ring = kvd_plane_ring(geo),
                                           .scale = g->p->scale,
                                           .softcap = g->p->softcap,
                                           .window = g->p->window,
                                           .q_type = head->q.dtype,
                                           .o_type = head->o.dtype};
    out->settled = true; // the upload of the tables follows all appends
    if (g->p->rotation)
        out->rotation = g->p->rotation->device;
    uint64_t sum = 0, longest = 0, window = 0;
    for (uint32_t i = 0; i < g->n; i++) {
        const struct kvd_attend_item *item = &g->items[i];
        uint64_t history = item->hist_end > geo->sink ? item->hist_end - geo->sink : 0;
        sum += history;
        longest = KVD_MAX(longest, history);
        window = KVD_MAX(window, item->length - history + item->new_tokens);
    }
    out->packed = c->packed;
    kvd_cuda_attend_plan(out, sum, (uint32_t)longest, (uint32_t)window, c->multiprocessors);
    uint64_t old = c->scratch_zeroed;
    int rc = kvd_cuda_scratch(c, kvd_cuda_attend_scratch(out), err);
    if (rc != KVD_OK && out->block_rows) { // there is a slower way, which wants less
        c->packed = out->packed = true;
        kvd_cuda_attend_plan(out, sum, (uint32_t)longest, (uint32_t)window, c->multiprocessors);
        rc = kvd_cuda_scratch(c, kvd_cuda_attend_scratch(out), err);
    }
    // Parts of an earlier call may lie where this one's counters are.
    if (rc == KVD_OK && out->scratch_zeroed > old)
        rc = kvd_cuda_status(cudaMemsetAsync(c->scratch, 0, out->scratch_zeroed, c->stream),
                             "clearing counters", err);
    c->scratch_zeroed = out->scratch_zeroed;
    out->scratch = c->scratch;
    return rc;
}

// Layers of a group that are taken at once, and where what they want is staged.
struct slice {
    uint32_t layer, layers;
    struct kvd_cuda_attend_params p;
    uint64_t at[T_COUNT];
    uint64_t begin, up; // what goes to the device
    uint64_t from, to;  // what comes back
};

// Packs a slice's tables and inputs behind what the stage has. The device has no part in it.
static void stage_slice(struct kvd_cuda *c, const struct group *g, struct slice *s)
{
    s->begin = c->stage.used;
    s->p.pages = stage_pages(c, g);
    if (g->p->sinks)
        s->p.sinks = stage_sinks(c, g->p, s->layer, s->layers);
    s->up = c->stage.used;
    for (uint32_t t = 0; t < T_COUNT; t++) {
        s->at[t] = g->direct[t] ? c->stage.used : kvd_stage_take(c, s->layers * g->n * g->row[t]);
        if (t < T_O && over_bus(g, t))
            s->up = c->stage.used;
    }
    s->from = over_bus(g, T_O) ? s->at[T_O] : s->at[T_LSE];
    s->to = over_bus(g, T_LSE) ? c->stage.used : s->at[T_LSE];
    for (uint32_t t = T_Q; t <= T_V; t++)
        for (uint32_t i = 0; i < g->n; i++)
            if (wanted(g, t, i)) {
                struct kvd_staged x = staged_of(g, s->at, t, i, s->layer, s->layers);
                kvd_stage_pack(c, &x);
            }
}

// Queues a slice: brings q (and k, v) over, runs its layers, brings o and lse where they belong in
// device memory.
static int queue_slice(struct kvd_cuda *c, const struct group *g, struct slice *s,
                       struct kvd_error *err)
{
    int rc = kvd_stage_upload(c, s->begin, s->up, err);
    for (uint32_t t = T_Q; t <= T_V && rc == KVD_OK; t++)
        for (uint32_t i = 0; i < g->n && rc == KVD_OK; i++)
            if (wanted(g, t, i)) {
                struct kvd_staged x = staged_of(g, s->at, t, i, s->layer, s->layers);
                rc = kvd_stage_gather(c, &x, err);
            }
    for (uint32_t l = 0; l < s->layers && rc == KVD_OK; l++) {
        uint8_t *place[T_COUNT];
        for (uint32_t t = 0; t < T_COUNT; t++)
            place[t] = g->direct[t]
                           ? g->direct[t]->data + (s->layer + l) * g->direct[t]->layer_stride
                           : c->stage.device + s->at[t] + l * g->n * g->row[t];
        s->p.layer = g->p->layer_begin + s->layer + l;
        s->p.q = place[T_Q];
        s->p.k = (void *)place[T_K];
        s->p.v = (void *)place[T_V];
        s->p.o = place[T_O];
        s->p.lse = g->lse ? (void *)place[T_LSE] : NULL;
        rc = kvd_cuda_status(kvd_cuda_attend(&s->p, c->stream), "attention", err);
        s->p.sinks += s->p.sinks ? g->p->plane->q_heads : 0;
    }
    for (uint32_t t = T_O; t < T_COUNT && rc == KVD_OK; t++)
        for (uint32_t i = 0; i < g->n && rc == KVD_OK; i++)
            if (wanted(g, t, i)) {
                struct kvd_staged x = staged_of(g, s->at, t, i, s->layer, s->layers);
                rc = kvd_stage_scatter(c, &x, err);
            }
    return rc;
}

static int attend_slice(struct kvd_cuda *c, const struct group *g, uint32_t layer, uint32_t layers,
                        const struct kvd_cuda_attend_params *p, struct kvd_error *err)
{
    struct slice s = {.layer = layer, .layers = layers, .p = *p};
    c->stage.used = 0;
    stage_slice(c, g, &s);
    int rc = queue_slice(c, g, &s, err);
    if (rc == KVD_OK)
        rc = kvd_stage_download(c, s.from, s.to, err);
    if (rc == KVD_OK)
        rc = kvd_stage_wait(c, err);
    for (uint32_t t = T_O; t < T_COUNT && rc == KVD_OK; t++)
        for (uint32_t i = 0; i < g->n; i++)
            if (wanted(g, t, i)) {
                struct kvd_staged x = staged_of(g, s.at, t, i, layer, layers);
                kvd_stage_unpack(c, &x);
            }
    return rc;
}

// Queries [begin, end) of an item as an item of their own. The tokens behind them are left out.
static struct kvd_attend_item queries_of(const struct kvd_plane *plane,
                                         const struct kvd_attend_item *item, uint32_t begin,
                                         uint32_t end)
{
    struct kvd_attend_item out = *item;
    uint32_t behind = item->q_len - end;
    out.q_len = end - begin;
    out.q.data += begin * out.q.token_stride;
    out.o.data += begin * out.o.token_stride;
    if (out.lse.data)
        out.lse.data += begin * out.lse.token_stride;
    if (item->new_tokens) {
        out.new_tokens -= behind;
    } else {
        out.length -= behind;
        out.hist_end = KVD_MIN(out.hist_end, KVD_MAX(out.length, (uint64_t)plane->sink));
    }
    return out;
}

// What of a layer's tensors goes through the stage, and what the tables take there.
static uint64_t layer_bytes(const struct group *g)
{
    uint64_t bytes = 0;
    for (uint32_t t = 0; t < T_COUNT; t++)
        bytes += g->direct[t] ? 0 : g->n * g->row[t];
    return bytes;
}
static uint64_t tables_bytes(const struct group *g)
{
    uint64_t bytes =
        (uint64_t)g->n * (g->codec_stride + g->bf16_stride + 1) * 8 + (5 + T_COUNT) * 256;
    if (g->p->sinks)
        bytes += (uint64_t)g->p->layer_count * g->p->plane->q_heads * sizeof(float);
    return bytes;
}

// Layers of a group, of which the first is `at` in the operation's count. *paused: the slice is
// over, and there is more.
static int attend_group(struct kvd_cuda *c, const struct group *g, uint64_t at, bool *paused,
                        struct kvd_error *err)
{
    const struct kvd_attend_params *p = g->p;
    uint64_t done = p->slice ? p->slice->at : 0;
    if (done >= at + p->layer_count)
        return KVD_OK;
    *paused = pause_at(p->slice, KVD_MAX(at, done));
    if (*paused)
        return KVD_OK;
    uint64_t bytes = layer_bytes(g);
    uint32_t step = fair_layers(p->slice, attend_ns(p->plane, g->items, g->n),
                                slice_layers(bytes, p->layer_count));
    struct kvd_cuda_attend_params params;
    int rc = kvd_stage_begin(c, tables_bytes(g) + step * bytes, err);
    if (rc == KVD_OK)
        rc = plan_group(c, g, &params, err);
    for (uint32_t l = done > at ? (uint32_t)(done - at) : 0; l < p->layer_count && rc == KVD_OK;
         l += step) {
        *paused = pause_at(p->slice, at + l);
        if (*paused)
            return KVD_OK;
        rc = attend_slice(c, g, l, KVD_MIN(step, p->layer_count - l), &params, err);
    }
    return rc;
}

int kvd_cuda_op_attend(struct kvd_backend *b, const struct kvd_attend_params *p,
                       struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    uint64_t at = 0; // layers of groups, and of parts of their queries, one after the other
    bool paused = false;
    int rc = kvd_cuda_rotation_check(p->rotation, p->plane->codec, err);
    for (uint32_t first = 0; first < p->n_items && rc == KVD_OK && !paused;) {
        const struct kvd_attend_item *item = &p->items[first];
        uint32_t queries = queries_at_once(p->plane, item);
        if (queries == item->q_len) {
            struct group g = group_at(p, first);
            rc = attend_group(c, &g, at, &paused, err);
            at += p->layer_count;
            first += g.n;
            continue;
        }
        for (uint32_t q = 0; q < item->q_len && rc == KVD_OK && !paused; q += queries) {
            struct kvd_attend_item part =
                queries_of(p->plane, item, q, KVD_MIN(q + queries, item->q_len));
            struct kvd_attend_params one = *p;
            one.items = &part;
            one.n_items = 1;
            struct group g = group_at(&one, 0);
            rc = attend_group(c, &g, at, &paused, err);
            at += p->layer_count;
        }
        first++;
    }
    return rc;
}

// -- step ----------------------------------------------------------------------------------------

// Whether all of it is one short launch, with no tensor in host memory.
static bool is_short(const struct kvd_attend_params *p, const struct group *g)
{
    uint64_t layers = p->layer_count;
    bool is = g->n == p->n_items && slice_layers(layer_bytes(g), p->layer_count) == layers &&
              attend_ns(p->plane, g->items, g->n) * layers <= SLICE_NS;
    for (uint32_t t = 0; t < T_COUNT && is; t++)
        is = !over_bus(g, t);
    for (uint32_t i = 0; i < g->n && is; i++)
        is = queries_at_once(p->plane, &g->items[i]) == g->items[i].q_len;
    return is;
}

// The look for NaN and Inf is over, and found nothing: the tokens are stored. After a failure what
// is queued is waited for, too, as the stage is used again.
static int store_queued(struct kvd_cuda *c, const struct kvd_cuda_append_params *tokens, int rc,
                        struct kvd_error *err)
{
    struct kvd_error ignored;
    if (rc == KVD_OK)
        rc = kvd_cuda_status(kvd_cuda_append(tokens, c->stream), "storing tokens", err);
    int waited = kvd_stage_wait(c, rc ? &ignored : err);
    return rc ? rc : waited;
}

static int append_alone(struct kvd_cuda *c, const struct kvd_append_params *append, uint64_t bytes,
                        struct kvd_nonfinite *where, struct kvd_error *err)
{
    struct kvd_cuda_append_params tokens;
    int rc = kvd_cuda_rotation_check(append->rotation, append->plane->codec, err);
    if (rc == KVD_OK)
        rc = kvd_stage_begin(c, bytes, err);
    if (rc)
        return rc;
    rc = kvd_cuda_short_append_begin(c, append, &tokens, err);
    if (rc == KVD_OK)
        rc = kvd_cuda_short_append_check(c, append, &tokens, where, err);
    return store_queued(c, &tokens, rc, err);
}

// The tokens are looked at first, as a call that is refused writes no output. While that runs, the
// tables of the attention are made; then all the rest is behind each other on the stream.
static int append_attended(struct kvd_cuda *c, const struct kvd_append_params *append,
                           uint64_t bytes, const struct group *g, struct kvd_nonfinite *where,
                           struct kvd_error *err)
{
    struct slice s = {.layers = g->p->layer_count};
    struct kvd_cuda_append_params tokens;
    int rc = kvd_cuda_rotation_check(g->p->rotation, g->p->plane->codec, err);
    if (rc == KVD_OK)
        rc = kvd_stage_begin(c, bytes + tables_bytes(g) + s.layers * layer_bytes(g), err);
    if (rc == KVD_OK)
        rc = plan_group(c, g, &s.p, err);
    if (rc)
        return rc;
    rc = kvd_cuda_short_append_begin(c, append, &tokens, err);
    if (rc == KVD_OK)
        stage_slice(c, g, &s);
    if (rc == KVD_OK)
        rc = kvd_cuda_short_append_check(c, append, &tokens, where, err);
    if (rc == KVD_OK)
        rc = queue_slice(c, g, &s, err);
    return store_queued(c, &tokens, rc, err);
}

int kvd_cuda_op_step(struct kvd_backend *b, const struct kvd_attend_params *attend,
                     const struct kvd_append_params *append, struct kvd_nonfinite *where,
                     bool *done, struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    uint64_t bytes = kvd_cuda_short_append(append);
    struct group g;
    *done = bytes != 0;
    if (*done && attend) {
        g = group_at(attend, 0);
        *done = is_short(attend, &g);
    }
    if (!*done)
        return KVD_OK;
    return attend ? append_attended(c, append, bytes, &g, where, err)
                  : append_alone(c, append, bytes, where, err);
}

// -- read and rotate -----------------------------------------------------------------------------

// What writing a layer of a tensor takes: over the bus and by the CPU, or in the GPU's memory.
static uint64_t writing_ns(const struct kvd_tensor *t, uint64_t bytes)
{
    return bytes / (t->on_device ? 500 : 10);
}

// Queues the download of a host tensor's block; others are where they belong.
static int fetch(struct kvd_cuda *c, const struct kvd_staged *s, struct kvd_error *err)
{
    if (s->in_place || s->tensor->on_device)
        return KVD_OK;
    return kvd_stage_download(c, s->at, s->at + s->layers * s->layer_stride, err);
}

int kvd_cuda_op_read(struct kvd_backend *b, const struct kvd_read_params *p, struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    const struct kvd_plane *g = p->plane;
    uint32_t codec = codec_pages(g, p->hist_end), bf16 = bf16_pages(g);
    uint64_t k = p->k.data ? tensor_bytes(&p->k, p->tokens, g->kv_heads, g->head_dim_k) : 0;
    uint64_t v = p->v.data ? tensor_bytes(&p->v, p->tokens, g->kv_heads, g->head_dim_v) : 0;
    uint64_t ns = writing_ns(&p->k, k) + writing_ns(&p->v, v);
    k = kvd_in_place(&p->k) ? 0 : k;
    v = kvd_in_place(&p->v) ? 0 : v;
    uint32_t step = fair_layers(p->slice, ns, slice_layers(k + v, p->layer_count));
    int rc = kvd_cuda_rotation_check(p->rotation, g->codec, err);
    if (rc == KVD_OK)
        rc = kvd_stage_begin(c, (codec + bf16) * 8ull + step * (k + v) + 3 * 256, err);
    uint32_t first = p->slice ? (uint32_t)p->slice->at : 0;
    for (uint32_t l = first; l < p->layer_count && rc == KVD_OK; l += step) {
        uint32_t layers = KVD_MIN(step, p->layer_count - l);
        if (pause_at(p->slice, l))
            return KVD_OK;
        c->stage.used = 0;
        uint64_t table = kvd_stage_take(c, (codec + bf16) * 8ull), out = c->stage.used;
        if (codec)
            memcpy(c->stage.host + table, p->pages.codec, codec * 8ull);
        memcpy(c->stage.host + table + codec * 8ull, p->pages.bf16, bf16 * 8ull);
        struct kvd_staged sides[2] = {take(c, &p->k, l, layers, p->k.data ? p->tokens : 0,
                                           g->kv_heads, g->head_dim_k, kvd_in_place(&p->k)),
                                      take(c, &p->v, l, layers, p->v.data ? p->tokens : 0,
                                           g->kv_heads, g->head_dim_v, kvd_in_place(&p->v))};
        struct kvd_cuda_read_params params = {
            .kv_heads = g->kv_heads,
            .dim_k = g->head_dim_k,
            .dim_v = g->head_dim_v,
            .codec = g->codec.k,
            .codec_v = g->codec.v,
            .sink = g->sink,
            .ring = kvd_plane_ring(g),
            .layer_begin = p->layer_begin + l,
            .layer_count = layers,
            .codec_pages = (void *)(c->stage.device + table),
            .bf16_pages = (uint64_t *)(void *)(c->stage.device + table) + codec,
            .hist_end = (uint32_t)p->hist_end,
            .begin = (uint32_t)p->begin,
            .tokens = p->tokens};
        if (p->rotation)
            params.rotation = p->rotation->device;
        if (p->k.data)
            params.k = kvd_device_tensor(c, &sides[0]);
        if (p->v.data)
            params.v = kvd_device_tensor(c, &sides[1]);
        rc = kvd_stage_upload(c, 0, out, err);
        if (rc == KVD_OK)
            rc = kvd_cuda_status(kvd_cuda_read(&params, c->stream), "reading tokens", err);
        for (int i = 0; i < 2 && rc == KVD_OK; i++)
            if (sides[i].tensor->data)
                rc = kvd_stage_scatter(c, &sides[i], err);
        for (int i = 0; i < 2 && rc == KVD_OK; i++)
            rc = fetch(c, &sides[i], err);
        if (rc == KVD_OK)
            rc = kvd_stage_wait(c, err);
        for (int i = 0; i < 2 && rc == KVD_OK; i++)
            if (sides[i].tensor->data)
                kvd_stage_unpack(c, &sides[i]);
    }
    return rc;
}

int kvd_cuda_op_rotate(struct kvd_backend *b, const struct kvd_rotate_params *p,
                       struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    const struct kvd_rotation *r = p->rotation;
    bool v = p->which == KVD_ROTATE_VALUES, means = r->transform && p->which != KVD_ROTATE_QUERIES;
    // Queries are turned by A^-T, which of rotations is A, and back by its inverse.
    bool transposed = r->transform && p->which == KVD_ROTATE_QUERIES;
    const struct kvd_cuda_matrices *side = v ? &r->device.v : &r->device.k;
    uint32_t dim = v ? r->dim_v : r->dim_k;
    uint64_t x = tensor_bytes(&p->x, p->rows, p->heads, dim);
    uint64_t y = tensor_bytes(&p->y, p->rows, p->heads, dim);
    uint64_t ns = writing_ns(&p->x, x) + writing_ns(&p->y, y);
    uint32_t step = fair_layers(p->slice, ns, slice_layers(x + y, p->layer_count));
    int rc = kvd_stage_begin(c, step * (x + y) + 2 * 256, err);
    uint32_t first = p->slice ? (uint32_t)p->slice->at : 0;
    for (uint32_t l = first; l < p->layer_count && rc == KVD_OK; l += step) {
        uint32_t layers = KVD_MIN(step, p->layer_count - l);
        if (pause_at(p->slice, l))
            return KVD_OK;
        c->stage.used = 0;
        struct kvd_staged in = take(c, &p->x, l, layers, p->rows, p->heads, dim, false);
        // Rows are taken away first, so that y may be where x is.
        struct kvd_staged out =
            take(c, &p->y, l, layers, p->rows, p->heads, dim, kvd_in_place(&p->y));
        struct kvd_cuda_rotate_params params = {
            .matrices = p->inverse != transposed ? side->inverse_f32 : side->forward_f32,
            .transposed = transposed,
            .less_mean = means && !p->inverse,
            .plus_mean = means && p->inverse,
            .values = v,
            .transforms = r->device.transforms,
            .n_layers = r->device.n_layers,
            .rotation_heads = r->device.heads,
            .dim = dim,
            .layer_begin = p->layer_begin + l,
            .layer_count = layers,
            .rows = p->rows,
            .heads = p->heads,
            .kv_heads = p->kv_heads,
            .x = kvd_device_tensor(c, &in),
            .y = kvd_device_tensor(c, &out)};
        kvd_stage_pack(c, &in);
        rc = p->x.on_device ? KVD_OK
                            : kvd_stage_upload(c, in.at, in.at + layers * in.layer_stride, err);
        if (rc == KVD_OK)
            rc = kvd_stage_gather(c, &in, err);
        if (rc == KVD_OK)
            rc = kvd_cuda_status(kvd_cuda_rotate(&params, c->stream), "rotation", err);
        if (rc == KVD_OK)
            rc = kvd_stage_scatter(c, &out, err);
        if (rc == KVD_OK)
            rc = fetch(c, &out, err);
        if (rc == KVD_OK)
            rc = kvd_stage_wait(c, err);
        if (rc == KVD_OK)
            kvd_stage_unpack(c, &out);
    }
    return rc;
}
