// Requests of the compute calls, checked and turned into works.
#include <math.h>

#include "daemon/sched/work.h"

struct kvd_work *kvd_work_new(struct kvd_call *call, const struct kvd_session *s,
                              enum kvd_kernel_op op, size_t n)
{
    struct kvd_work *w = calloc(1, sizeof(*w));
    if (!w || !(w->items = calloc(n + 1, sizeof(*w->items)))) {
        free(w);
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    w->op = op;
    w->call = call;
    w->session = s->id;
    w->appender = s->appender;
    w->ns = s->ns;
    w->layout = s->layout;
    kvd_pool_layout_ref(call->d->pool, w->layout);
    w->n_items = (uint32_t)n;
    return w;
}

static int set_layers(struct kvd_work *w, const struct kvd_plane *g, uint32_t begin, uint32_t count,
                      struct kvd_error *err)
{
    if (begin >= g->n_layers || count > g->n_layers - begin)
        return kvd_fail(err, KVD_E_INVALID, "layers %u to %llu are not all among the layout's %u",
                        begin, (unsigned long long)begin + (count ? count - 1 : 0), g->n_layers);
    w->layer_begin = begin;
    w->layer_count = count ? count : g->n_layers - begin;
    return KVD_OK;
}

static int set_attention(struct kvd_work *w, const struct kvd_plane *g,
                         const Kvd__V1__AttentionParams *p, struct kvd_error *err)
{
    w->scale = p && p->scale != 0 ? p->scale : 1 / sqrtf((float)g->head_dim_k);
    w->softcap = p ? p->softcap : 0;
    w->window = p ? p->window : 0;
    if (!isfinite(w->scale) || !isfinite(w->softcap) || w->softcap < 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "params: scale and softcap must be finite, softcap not negative");
    return KVD_OK;
}

static int check_count(size_t n, struct kvd_error *err)
{
    if (n < 1 || n > KVD_MAX_CALL_ITEMS)
        return kvd_fail(err, KVD_E_INVALID, "%zu items; 1 to %d are possible", n,
                        KVD_MAX_CALL_ITEMS);
    return KVD_OK;
}

// Sequence and token count of an item; `sum` adds up over the call.
static int check_item(const struct kvd_session *s, uint64_t seq, uint64_t tokens, uint32_t item,
                      uint64_t *sum, struct kvd_error *err)
{
    if (tokens < 1 || tokens > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_INVALID, "items[%u]: %llu tokens; 1 to %d are possible", item,
                        (unsigned long long)tokens, KVD_MAX_CALL_TOKENS);
    *sum += tokens;
    if (*sum > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_LIMIT, "more than %d tokens in one call; split it",
                        KVD_MAX_CALL_TOKENS);
    if (!kvd_session_holds(s, seq))
        return kvd_fail(err, KVD_E_NOT_FOUND, "items[%u]: this session holds no sequence %llu",
                        item, (unsigned long long)seq);
    return KVD_OK;
}

// Sorted copies show a sequence that is named twice.
static int compare_ids(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int check_distinct(const struct kvd_work *w, struct kvd_error *err)
{
    uint64_t ids[KVD_MAX_CALL_ITEMS];
    for (uint32_t i = 0; i < w->n_items; i++)
        ids[i] = w->items[i].seq;
    qsort(ids, w->n_items, sizeof(*ids), compare_ids);
    for (uint32_t i = 1; i < w->n_items; i++)
        if (ids[i] == ids[i - 1])
            return kvd_fail(err, KVD_E_INVALID, "sequence %llu is named by two items",
                            (unsigned long long)ids[i]);
    return KVD_OK;
}

static int set_kv(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g, uint32_t i,
                  const Kvd__V1__TensorRef *k, const Kvd__V1__TensorRef *v, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    if ((k && k->dtype != KVD__V1__DTYPE__DTYPE_BF16) ||
        (v && v->dtype != KVD__V1__DTYPE__DTYPE_BF16))
        return kvd_fail(err, KVD_E_INVALID, "items[%u]: K and V are bf16", i);
    struct kvd_shape shape = {w->layer_count, item->tokens, g->kv_heads, g->head_dim_k};
    int rc = kvd_work_tensor_in(w, s, k, shape, "k", i, &item->k, err);
    shape.dim = g->head_dim_v;
    return rc ? rc : kvd_work_tensor_in(w, s, v, shape, "v", i, &item->v, err);
}

static int set_qo(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g, uint32_t i,
                  const Kvd__V1__TensorRef *q, const Kvd__V1__TensorRef *o,
                  const Kvd__V1__TensorRef *lse, bool want_lse, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    struct kvd_shape shape = {w->layer_count, item->tokens, g->q_heads, g->head_dim_k};
    int rc = kvd_work_tensor_in(w, s, q, shape, "q", i, &item->q, err);
    shape.dim = g->head_dim_v;
    if (rc == KVD_OK)
        rc = kvd_work_tensor_out(w, s, o, shape, "o", i, &item->o, &item->o_inline, &item->o_len,
                                 err);
    if (rc || !want_lse)
        return rc;
    Kvd__V1__TensorRef ref = KVD__V1__TENSOR_REF__INIT;
    if (lse)
        ref = *lse;
    ref.dtype = KVD__V1__DTYPE__DTYPE_F32;
    shape.dim = 1;
    return kvd_work_tensor_out(w, s, &ref, shape, "lse", i, &item->lse, &item->lse_inline,
                               &item->lse_len, err);
}

// Queues a work, or answers the call with what is wrong.
static void submit(struct kvd_daemon *d, struct kvd_work *w, int rc, const struct kvd_error *err)
{
    if (rc == KVD_OK) {
        kvd_work_pin(d, w);
        kvd_work_queue(d, w);
        return;
    }
    struct kvd_call *call = w->call;
    kvd_work_free(d, w);
    kvd_call_fail_error(call, err);
}

// Fills in a part of item i from the request's: first the ids and counts, which are then checked,
// then the tensors.
typedef int fill_item(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                      const void *request, uint32_t i, struct kvd_error *err);

// What Append, Attend and Step have in common.
struct batch {
    const char *session;
    uint32_t layer_begin, layer_count;
    const Kvd__V1__AttentionParams *params; // of Attend and Step
    const Kvd__V1__Fence *wait, *signal;
    size_t n_items;
    fill_item *ids, *tensors;
};

static void run_batch(struct kvd_call *call, const void *request, enum kvd_kernel_op op,
                      const struct batch *b)
{
    struct kvd_session *s = kvd_call_session(call, b->session);
    struct kvd_error err = {0};
    uint64_t sum = 0;
    if (!s)
        return;
    if (check_count(b->n_items, &err)) { // before memory is taken for them
        kvd_call_fail_error(call, &err);
        return;
    }
    struct kvd_work *w = kvd_work_new(call, s, op, b->n_items);
    if (!w)
        return;
    const struct kvd_plane *g = &kvd_pool_layout_get(call->d->pool, s->layout)->planes[0];
    int rc = set_layers(w, g, b->layer_begin, b->layer_count, &err);
    if (rc == KVD_OK)
        rc = set_attention(w, g, b->params, &err);
    if (rc == KVD_OK)
        rc = kvd_work_fence(w, s, b->wait, "wait", &w->wait, &err);
    if (rc == KVD_OK)
        rc = kvd_work_fence(w, s, b->signal, "signal", &w->signal, &err);
    for (uint32_t i = 0; rc == KVD_OK && i < w->n_items; i++) {
        rc = b->ids(w, s, g, request, i, &err);
        if (rc == KVD_OK)
            rc = check_item(s, w->items[i].seq, w->items[i].tokens, i, &sum, &err);
        if (rc == KVD_OK)
            rc = b->tensors(w, s, g, request, i, &err);
    }
    if (rc == KVD_OK && op != KVD_OP_ATTEND)
        rc = check_distinct(w, &err);
    submit(call->d, w, rc, &err);
}

static int append_ids(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                      const void *request, uint32_t i, struct kvd_error *err)
{
    const Kvd__V1__AppendItem *in = ((const Kvd__V1__AppendRequest *)request)->items[i];
    w->items[i].seq = in->sequence;
    w->items[i].position = in->position;
    w->items[i].tokens = in->tokens;
    w->items[i].request = in->request_id;
    return KVD_OK;
}

static int append_tensors(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                          const void *request, uint32_t i, struct kvd_error *err)
{
    const Kvd__V1__AppendItem *in = ((const Kvd__V1__AppendRequest *)request)->items[i];
    return set_kv(w, s, g, i, in->k, in->v, err);
}

void kvd_on_append(struct kvd_call *call, const void *request)
{
    const Kvd__V1__AppendRequest *req = request;
    run_batch(call, request, KVD_OP_APPEND,
              &(struct batch){.session = req->session,
                              .layer_begin = req->layer_begin,
                              .layer_count = req->layer_count,
                              .wait = req->wait,
                              .signal = req->signal,
                              .n_items = req->n_items,
                              .ids = append_ids,
                              .tensors = append_tensors});
}

static int attend_ids(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                      const void *request, uint32_t i, struct kvd_error *err)
{
    const Kvd__V1__AttendItem *in = ((const Kvd__V1__AttendRequest *)request)->items[i];
    w->items[i].seq = in->sequence;
    w->items[i].tokens = in->q_len;
    return KVD_OK;
}

static int attend_tensors(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                          const void *request, uint32_t i, struct kvd_error *err)
{
    const Kvd__V1__AttendRequest *req = request;
    const Kvd__V1__AttendItem *in = req->items[i];
    bool lse = req->params && req->params->return_lse;
    return set_qo(w, s, g, i, in->q, in->o, in->lse, lse, err);
}

void kvd_on_attend(struct kvd_call *call, const void *request)
{
    const Kvd__V1__AttendRequest *req = request;
    run_batch(call, request, KVD_OP_ATTEND,
              &(struct batch){.session = req->session,
                              .layer_begin = req->layer_begin,
                              .layer_count = req->layer_count,
                              .params = req->params,
                              .wait = req->wait,
                              .signal = req->signal,
                              .n_items = req->n_items,
                              .ids = attend_ids,
                              .tensors = attend_tensors});
}

static int step_ids(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                    const void *request, uint32_t i, struct kvd_error *err)
{
    const Kvd__V1__StepItem *in = ((const Kvd__V1__StepRequest *)request)->items[i];
    w->items[i].seq = in->sequence;
    w->items[i].position = in->position;
    w->items[i].tokens = in->tokens;
    w->items[i].request = in->request_id;
    return KVD_OK;
}

static int step_tensors(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                        const void *request, uint32_t i, struct kvd_error *err)
{
    const Kvd__V1__StepRequest *req = request;
    const Kvd__V1__StepItem *in = req->items[i];
    bool lse = req->params && req->params->return_lse;
    int rc = set_kv(w, s, g, i, in->k, in->v, err);
    return rc ? rc : set_qo(w, s, g, i, in->q, in->o, in->lse, lse, err);
}

void kvd_on_step(struct kvd_call *call, const void *request)
{
    const Kvd__V1__StepRequest *req = request;
    run_batch(call, request, KVD_OP_STEP,
              &(struct batch){.session = req->session,
                              .layer_begin = req->layer_begin,
                              .layer_count = req->layer_count,
                              .params = req->params,
                              .wait = req->wait,
                              .signal = req->signal,
                              .n_items = req->n_items,
                              .ids = step_ids,
                              .tensors = step_tensors});
}

static int set_rotate(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                      const Kvd__V1__RotateRequest *req, struct kvd_error *err)
{
    bool v = req->which == KVD__V1__ROTATE_REQUEST__WHICH__V;
    if (g->codec == KVD_CODEC_BF16)
        return kvd_fail(err, KVD_E_PRECONDITION, "codec bf16 has no rotations");
    if (req->rows < 1 || req->rows > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_INVALID, "%u rows; 1 to %d are possible", req->rows,
                        KVD_MAX_CALL_TOKENS);
    if (req->heads != g->kv_heads && req->heads != g->q_heads)
        return kvd_fail(err, KVD_E_INVALID, "heads is %u; it must be kv_heads (%u) or q_heads (%u)",
                        req->heads, g->kv_heads, g->q_heads);
    int rc = set_layers(w, g, req->layer_begin, req->layer_count, err);
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

void kvd_on_rotate(struct kvd_call *call, const void *request)
{
    const Kvd__V1__RotateRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    struct kvd_work *w = s ? kvd_work_new(call, s, KVD_OP_ROTATE, 0) : NULL;
    if (!w)
        return;
    int rc = set_rotate(w, s, &kvd_pool_layout_get(call->d->pool, s->layout)->planes[0], req, &err);
    submit(call->d, w, rc, &err);
}

static int set_read(struct kvd_work *w, struct kvd_session *s, const struct kvd_plane *g,
                    const Kvd__V1__ReadTokensRequest *req, struct kvd_error *err)
{
    uint64_t sum = 0;
    struct kvd_work_item *item = &w->items[0];
    item->seq = req->sequence;
    item->position = req->begin;
    item->tokens = req->tokens;
    int rc = check_item(s, req->sequence, req->tokens, 0, &sum, err);
    if (rc == KVD_OK)
        rc = set_layers(w, g, req->layer_begin, req->layer_count, err);
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

void kvd_on_read_tokens(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ReadTokensRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    struct kvd_work *w = s ? kvd_work_new(call, s, KVD_OP_READ, 1) : NULL;
    if (!w)
        return;
    int rc = set_read(w, s, &kvd_pool_layout_get(call->d->pool, s->layout)->planes[0], req, &err);
    submit(call->d, w, rc, &err);
}
