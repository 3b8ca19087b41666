// Rotate: vectors of the worker turned as a set turns them, for tests and for kernels of the
// worker's own.
#include "daemon/sched/op.h"

// A tensor may be rotated where it lies, element for element.
static void allow_in_place(struct kvd_work *w)
{
    struct kvd_overlap *x = &w->spans[0], *y = &w->spans[1];
    if (w->n_spans == 2 && x->memory == y->memory && x->begin == y->begin && x->row == y->row &&
        memcmp(x->dims, y->dims, sizeof(x->dims)) == 0)
        w->spans[0] = w->spans[--w->n_spans]; // its rows are still to be apart
}

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__RotateRequest *req = request;
    bool v = req->which == KVD__V1__ROTATE_REQUEST__WHICH__VALUES;
    if ((int)req->which < 0 || (int)req->which >= KVD_ROTATE_COUNT)
        return kvd_fail(err, KVD_E_INVALID, "which is %d; KEYS, QUERIES and VALUES are known",
                        (int)req->which);
    if (req->rows < 1 || req->rows > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_INVALID, "%u rows; 1 to %d are possible", req->rows,
                        KVD_MAX_CALL_TOKENS);
    int rc = kvd_op_set_layers(w, req->layer_begin, req->layer_count, err);
    if (rc)
        return rc;
    const struct kvd_plane *g = w->plane;
    for (uint32_t r = 0; r < w->n_runs; r++)
        if (kvd_codecs_side(w->shape->planes[w->runs[r].plane].codec, v) == KVD_CODEC_BF16)
            return kvd_fail(err, KVD_E_PRECONDITION, "codec bf16%s has no rotations",
                            kvd_codecs_rotated(w->shape->planes[w->runs[r].plane].codec)
                                ? v ? " of V" : " of K"
                                : "");
    if (req->heads != g->kv_heads && req->heads != g->q_heads)
        return kvd_fail(err, KVD_E_INVALID, "heads is %u; it must be kv_heads (%u) or q_heads (%u)",
                        req->heads, g->kv_heads, g->q_heads);
    struct kvd_shape shape = {w->layer_count, req->rows, req->heads,
                              v ? g->head_dim_v : g->head_dim_k};
    struct kvd_work_item *item = &w->items[0];
    w->rotate = (struct kvd_rotate_params){.which = (enum kvd_rotate)req->which,
                                           .inverse = req->inverse,
                                           .rows = req->rows,
                                           .heads = req->heads,
                                           .kv_heads = g->kv_heads};
    rc = kvd_work_tensor_in(w, s, req->x, shape, "x", 0, &w->rotate.x, err);
    if (rc == KVD_OK)
        rc = kvd_work_tensor_out(w, s, req->y, shape, "y", 0, &w->rotate.y, &item->o_inline,
                                 &item->o_len, err);
    if (rc == KVD_OK)
        allow_in_place(w);
    return rc;
}

static int rotate(struct kvd_daemon *d, struct kvd_work *w)
{
    const struct kvd_run *run = kvd_op_run(w);
    struct kvd_rotate_params p = w->rotate;
    p.rotation = w->rotations[run->plane];
    p.layer_begin = run->layer_begin;
    p.layer_count = run->layer_count;
    p.x = kvd_op_part(w, p.x);
    p.y = kvd_op_part(w, p.y);
    p.slice = &w->job.slice;
    return d->backend->ops->rotate(d->backend, &p, &w->err);
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
    .id = KVD_OP_ROTATE, .check = check, .run = run, .reply = reply};

void kvd_on_rotate(struct kvd_call *call, const void *request)
{
    const Kvd__V1__RotateRequest *req = request;
    kvd_op_handle(call, &kvd_op_rotate, req->session, 0, request);
}
