// Append: new tokens at the end of sequences.
#include "daemon/sched/op.h"

static void ids(struct kvd_work_item *item, const void *request, uint32_t i)
{
    const Kvd__V1__AppendItem *in = ((const Kvd__V1__AppendRequest *)request)->items[i];
    item->seq = in->sequence;
    item->position = in->position;
    item->tokens = in->tokens;
    item->request = in->request_id;
}

static int tensors(struct kvd_work *w, struct kvd_session *s, const void *request, uint32_t i,
                   struct kvd_error *err)
{
    const Kvd__V1__AppendItem *in = ((const Kvd__V1__AppendRequest *)request)->items[i];
    return kvd_op_set_kv(w, s, i, in->k, in->v, err);
}

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__AppendRequest *req = request;
    const struct kvd_op_batch batch = {.layer_begin = req->layer_begin,
                                       .layer_count = req->layer_count,
                                       .wait = req->wait,
                                       .signal = req->signal,
                                       .ids = ids,
                                       .tensors = tensors};
    return kvd_op_check_batch(w, s, request, &batch, err);
}

// -- pages --------------------------------------------------------------------------------------

static struct kvd_pool_append_request request_of(const struct kvd_work *w, uint32_t i)
{
    const struct kvd_work_item *item = &w->items[i];
    return (struct kvd_pool_append_request){.seq = item->seq,
                                            .position = item->position,
                                            .tokens = item->tokens,
                                            .layer_begin = w->layer_begin,
                                            .layer_count = w->layer_count,
                                            .appender = w->appender,
                                            .request = item->request};
}

// What is wrong with an item is told by `begin`.
bool kvd_op_append_room(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_pool_need need = {0};
    for (uint32_t i = 0; i < w->n_items; i++) {
        const struct kvd_pool_append_request by = request_of(w, i);
        struct kvd_pool_need of_item;
        if (kvd_pool_append_need(d->pool, &by, &of_item, NULL))
            return true;
        kvd_pool_need_add(&need, &of_item);
    }
    return kvd_room_make(d, &w->room, w->waiter.ns, w->layout, &need);
}

static int begin(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    const struct kvd_pool_append_request by = request_of(w, i);
    int rc = kvd_pool_append_begin(d->pool, &by, &item->append, err);
    if (rc)
        return kvd_fail_in(err, "items[%u]", i);
    item->begun = !item->append.replayed;
    for (uint32_t p = 0; p < w->shape->n_planes; p++) {
        item->views[p].length = item->append.length;
        item->views[p].reach = item->append.planes[p].before;
    }
    rc = kvd_op_note_pages(d, w, item, err);
    if (rc == KVD_OK && item->begun)
        rc = kvd_op_note_copies(d, w, &item->append, err);
    if (rc == KVD_OK && item->begun)
        w->append_index[w->n_append++] = i;
    return rc;
}

int kvd_op_append_prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    int rc = KVD_OK;
    w->append_items = calloc(w->n_items, sizeof(*w->append_items));
    w->append_index = calloc(w->n_items, sizeof(*w->append_index));
    if (!w->append_items || !w->append_index)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++)
        rc = begin(d, w, i, err);
    return rc;
}

void kvd_op_count_stored(struct kvd_daemon *d, const struct kvd_work *w,
                         const struct kvd_pool_append *a)
{
    for (uint32_t r = 0; r < w->n_runs; r++) {
        const struct kvd_plane *g = &w->shape->planes[w->runs[r].plane];
        const struct kvd_pool_append_plane *p = &a->planes[w->runs[r].plane];
        uint64_t vectors = (p->after.hist_end - p->demote) * w->runs[r].layer_count * g->kv_heads;
        d->metrics.bytes_in += vectors * 2 * (g->head_dim_k + g->head_dim_v);
        d->metrics.bytes_stored +=
            vectors * kvd_tile_bytes(g->codec, g->head_dim_k, g->head_dim_v) / KVD_PAGE_TOKENS;
    }
}

// Tokens that are there in all layers.
static void count_tokens(struct kvd_daemon *d, const struct kvd_work *w,
                         const struct kvd_work_item *item)
{
    uint64_t length = item->append.new_length, known = w->fitted_length;
    d->metrics.tokens_appended += item->tokens;
    if (known == 0 || length <= known)
        return;
    d->metrics.tokens_beyond_fit += KVD_MIN(length - known, item->tokens);
    kvd_session_beyond(d, w->waiter.session, item->seq, length);
}

void kvd_op_append_conclude(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_work_item *item = &w->items[i];
        if (!item->begun)
            continue;
        item->begun = false;
        if (!commit) {
            kvd_pool_append_abort(d->pool, &item->append);
            continue;
        }
        kvd_op_count_stored(d, w, &item->append);
        if (w->layer_begin + w->layer_count == w->shape->n_layers)
            count_tokens(d, w, item);
        kvd_pool_append_commit(d->pool, &item->append);
    }
}

// -- the executor's part ------------------------------------------------------------------------

// What a plane with a window would free at once is not stored.
void kvd_op_append_fill(const struct kvd_work *w, const struct kvd_work_item *item,
                        struct kvd_append_item *out)
{
    const struct kvd_run *run = kvd_op_run(w);
    const struct kvd_pool_append_plane *p = &item->append.planes[run->plane];
    *out = (struct kvd_append_item){
        .pages = kvd_op_pages(&item->views[run->plane]),
        .length = item->append.length,
        .hist_end = p->demote,
        .new_length = item->append.new_length,
        .new_hist_end = p->after.hist_end,
        .k = kvd_op_part(w, item->k),
        .v = kvd_op_part(w, item->v),
    };
}

struct kvd_append_params kvd_op_append_params(struct kvd_work *w, enum kvd_append_part part)
{
    const struct kvd_run *run = kvd_op_run(w);
    for (uint32_t i = 0; i < w->n_append && !w->filled; i++)
        kvd_op_append_fill(w, &w->items[w->append_index[i]], &w->append_items[i]);
    w->filled = true;
    return (struct kvd_append_params){.plane = &w->shape->planes[run->plane],
                                      .rotation = w->rotations[run->plane],
                                      .layer_begin = run->layer_begin,
                                      .layer_count = run->layer_count,
                                      .part = part,
                                      .items = w->append_items,
                                      .n_items = w->n_append,
                                      .slice = &w->job.slice};
}

int kvd_op_explain_nonfinite(struct kvd_work *w)
{
    const struct kvd_nonfinite *n = &w->nonfinite;
    const struct kvd_run *run = kvd_op_run(w);
    uint32_t layer = w->layer_begin + run->at + n->layer - run->layer_begin;
    return kvd_fail(&w->err, KVD_E_INVALID,
                    "items[%u].%s holds NaN or Inf at layer %u, token %u, head %u, channel %u; "
                    "nothing was stored",
                    w->append_index[n->item], n->in_v ? "v" : "k", layer, n->token, n->head,
                    n->channel);
}

int kvd_op_look_for_nonfinite(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_append_params p = kvd_op_append_params(w, KVD_APPEND_WHOLE);
    int rc = w->n_append ? d->backend->ops->check(d->backend, &p, &w->nonfinite) : KVD_OK;
    if (rc == KVD_E_INVALID)
        return kvd_op_explain_nonfinite(w);
    if (rc)
        return kvd_fail(&w->err, rc, "the new tokens could not be checked; nothing was stored");
    return KVD_OK;
}

static int append_part(struct kvd_daemon *d, struct kvd_work *w, enum kvd_append_part part)
{
    struct kvd_append_params p = kvd_op_append_params(w, part);
    return w->n_append ? d->backend->ops->append(d->backend, &p, &w->err) : KVD_OK;
}

int kvd_op_append_demote(struct kvd_daemon *d, struct kvd_work *w)
{
    return append_part(d, w, KVD_APPEND_DEMOTE);
}

int kvd_op_append_store(struct kvd_daemon *d, struct kvd_work *w)
{
    w->job.must_end = w->n_append > 0;
    return append_part(d, w, KVD_APPEND_STORE);
}

// -- the reply ----------------------------------------------------------------------------------

static int reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    uint64_t *lengths KVD_FREE = calloc(w->n_items, sizeof(*lengths));
    protobuf_c_boolean *replayed KVD_FREE = calloc(w->n_items, sizeof(*replayed));
    Kvd__V1__AppendReply r = KVD__V1__APPEND_REPLY__INIT;
    struct kvd_pool_seq_lengths info;
    if (!lengths || !replayed)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory; the tokens are appended");
    for (uint32_t i = 0; i < w->n_items; i++) {
        lengths[i] = kvd_pool_seq_lengths(d->pool, w->items[i].seq, &info) ? 0 : info.length;
        replayed[i] = w->items[i].append.replayed;
    }
    r.n_lengths = r.n_replayed = w->n_items;
    r.lengths = lengths;
    r.replayed = replayed;
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static int run_at_once(struct kvd_daemon *d, struct kvd_work *w);

static kvd_op_phase *const run[] = {run_at_once,         kvd_op_look_for_nonfinite,
                                    kvd_op_copy_pages,   kvd_op_append_demote,
                                    kvd_op_append_store, NULL};

// All phases in one, as a Step's are (op_step.c). A worker in direct mode has its GPU back sooner:
// processes that have no MPS between them take turns, and each wait here gives the turn away.
static int run_at_once(struct kvd_daemon *d, struct kvd_work *w)
{
    bool done = false;
    if (!d->backend->ops->step || w->n_runs > 1 || w->n_copies || w->n_append == 0)
        return KVD_OK;
    struct kvd_append_params append = kvd_op_append_params(w, KVD_APPEND_WHOLE);
    int rc = d->backend->ops->step(d->backend, NULL, &append, &w->nonfinite, &done, &w->err);
    if (rc == KVD_E_INVALID)
        return kvd_op_explain_nonfinite(w);
    if (done)
        w->phase = KVD_LEN(run) - 2; // the last one is behind it
    return rc;
}

const struct kvd_op kvd_op_append = {.id = KVD_OP_APPEND,
                                     .writes = true,
                                     .least_items = 1,
                                     .most_items = KVD_MAX_CALL_ITEMS,
                                     .check = check,
                                     .room = kvd_op_append_room,
                                     .prepare = kvd_op_append_prepare,
                                     .run = run,
                                     .conclude = kvd_op_append_conclude,
                                     .reply = reply};

void kvd_on_append(struct kvd_call *call, const void *request)
{
    const Kvd__V1__AppendRequest *req = request;
    kvd_op_handle(call, &kvd_op_append, req->session, req->n_items, request);
}
