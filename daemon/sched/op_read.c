// ReadTokens: K and V of stored tokens, dequantized and rotated back.
#include "daemon/sched/op.h"

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__ReadTokensRequest *req = request;
    uint64_t sum = 0;
    struct kvd_work_item *item = &w->items[0];
    item->seq = req->sequence;
    item->position = req->begin;
    item->tokens = req->tokens;
    int rc = kvd_op_check_item(s, req->sequence, req->tokens, 0, &sum, err);
    if (rc == KVD_OK)
        rc = kvd_op_set_layers(w, req->layer_begin, req->layer_count, err);
    const struct kvd_plane *g = w->plane;
    struct kvd_shape shape = {w->layer_count, req->tokens, g->kv_heads, g->head_dim_k};
    if (rc == KVD_OK)
        rc = kvd_work_tensor_out(w, s, req->k, shape, "k", 0, &w->read.k, &item->o_inline,
                                 &item->o_len, err);
    shape.dim = g->head_dim_v;
    if (rc == KVD_OK)
        rc = kvd_work_tensor_out(w, s, req->v, shape, "v", 0, &w->read.v, &item->lse_inline,
                                 &item->lse_len, err);
    return rc;
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[0];
    int rc = kvd_op_note_pages(d, w, item, err);
    if (rc == KVD_OK)
        rc = kvd_op_note_lengths(d, w, item, err);
    if (rc)
        return rc;
    uint64_t length = item->views[w->runs[0].plane].length;
    if (item->position > length || item->tokens > length - item->position)
        return kvd_fail(err, KVD_E_INVALID,
                        "tokens %" PRIu64 " to %" PRIu64 ", but sequence %" PRIu64 " has %" PRIu64,
                        item->position, item->position + item->tokens - 1, item->seq, length);
    return kvd_op_check_reach(w, item, item->position, false, err);
}

static int read_tokens(struct kvd_daemon *d, struct kvd_work *w)
{
    const struct kvd_run *run = kvd_op_run(w);
    const struct kvd_work_item *item = &w->items[0];
    const struct kvd_view *v = &item->views[run->plane];
    struct kvd_read_params p = {.plane = &w->shape->planes[run->plane],
                                .rotation = w->rotations[run->plane],
                                .layer_begin = run->layer_begin,
                                .layer_count = run->layer_count,
                                .pages = kvd_op_pages(v),
                                .length = v->length,
                                .hist_end = v->reach.hist_end,
                                .begin = item->position,
                                .tokens = item->tokens,
                                .k = kvd_op_part(w, w->read.k),
                                .v = kvd_op_part(w, w->read.v),
                                .slice = &w->job.slice};
    return d->backend->ops->read(d->backend, &p, &w->err);
}

static int reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    const struct kvd_work_item *item = &w->items[0];
    Kvd__V1__ReadTokensReply r = KVD__V1__READ_TOKENS_REPLY__INIT;
    (void)d;
    (void)err;
    r.k = (ProtobufCBinaryData){item->o_len, item->o_inline};
    r.v = (ProtobufCBinaryData){item->lse_len, item->lse_inline};
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static kvd_op_phase *const run[] = {read_tokens, NULL};

const struct kvd_op kvd_op_read = {.id = KVD_OP_READ,
                                   .least_items = 1,
                                   .most_items = 1,
                                   .check = check,
                                   .prepare = prepare,
                                   .run = run,
                                   .reply = reply};

void kvd_on_read_tokens(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ReadTokensRequest *req = request;
    kvd_op_handle(call, &kvd_op_read, req->session, 1, request);
}
