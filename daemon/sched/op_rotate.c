// Rotate: vectors of the worker times a rotation, for tests and for kernels of the worker's own.
#include "daemon/sched/op.h"

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__RotateRequest *req = request;
    const struct kvd_plane *g = w->plane;
    bool v = req->which == KVD__V1__ROTATE_REQUEST__WHICH__V;
    if (g->codec == KVD_CODEC_BF16)
        return kvd_fail(err, KVD_E_PRECONDITION, "codec bf16 has no rotations");
    if (req->rows < 1 || req->rows > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_INVALID, "%u rows; 1 to %d are possible", req->rows,
                        KVD_MAX_CALL_TOKENS);
    if (req->heads != g->kv_heads && req->heads != g->q_heads)
        return kvd_fail(err, KVD_E_INVALID, "heads is %u; it must be kv_heads (%u) or q_heads (%u)",
                        req->heads, g->kv_heads, g->q_heads);
    int rc = kvd_op_set_layers(w, req->layer_begin, req->layer_count, err);
    if (rc)
        return rc;
    struct kvd_shape shape = {w->layer_count, req->rows, req->heads,
                              v ? g->head_dim_v : g->head_dim_k};
    struct kvd_work_item *item = &w->items[0];
    w->rotate = (struct kvd_rotate_params){.v = v,
                                           .inverse = req->inverse,
                                           .layer_begin = w->layer_begin,
                                           .layer_count = w->layer_count,
                                           .rows = req->rows,
                                           .heads = req->heads,
                                           .kv_heads = g->kv_heads};
    rc = kvd_work_tensor_in(w, s, req->x, shape, "x", 0, &w->rotate.x, err);
    return rc ? rc
              : kvd_work_tensor_out(w, s, req->y, shape, "y", 0, &w->rotate.y, &item->o_inline,
                                    &item->o_len, err);
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    (void)err;
    w->rotate.rotation = w->rotation;
    return KVD_OK;
}

static int rotate(struct kvd_daemon *d, struct kvd_work *w)
{
    w->rotate.slice = &w->job.slice;
    return d->backend->ops->rotate(d->backend, &w->rotate, &w->err);
}

static int reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    Kvd__V1__RotateReply r = KVD__V1__ROTATE_REPLY__INIT;
    (void)d;
    (void)err;
    r.y = (ProtobufCBinaryData){w->items[0].o_len, w->items[0].o_inline};
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static kvd_op_phase *const run[] = {rotate, NULL};

const struct kvd_op kvd_op_rotate = {
    .id = KVD_OP_ROTATE, .check = check, .prepare = prepare, .run = run, .reply = reply};

void kvd_on_rotate(struct kvd_call *call, const void *request)
{
    const Kvd__V1__RotateRequest *req = request;
    kvd_op_handle(call, &kvd_op_rotate, req->session, 0, request);
}
