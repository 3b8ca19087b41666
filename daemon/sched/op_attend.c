// Attend: attention of queries to what is stored.
#include "daemon/sched/op.h"

static void ids(struct kvd_work_item *item, const void *request, uint32_t i)
{
    const Kvd__V1__AttendItem *in = ((const Kvd__V1__AttendRequest *)request)->items[i];
    item->seq = in->sequence;
    item->tokens = in->q_len;
}

static int tensors(struct kvd_work *w, struct kvd_session *s, const void *request, uint32_t i,
                   struct kvd_error *err)
{
    const Kvd__V1__AttendRequest *req = request;
    const Kvd__V1__AttendItem *in = req->items[i];
    return kvd_op_set_qo(w, s, i, in->q, in->o, in->lse, req->params, err);
}

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__AttendRequest *req = request;
    const struct kvd_op_batch batch = {.layer_begin = req->layer_begin,
                                       .layer_count = req->layer_count,
                                       .params = req->params,
                                       .wait = req->wait,
                                       .signal = req->signal,
                                       .ids = ids,
                                       .tensors = tensors};
    return kvd_op_check_batch(w, s, request, &batch, err);
}

int kvd_op_attend_alloc(struct kvd_work *w, struct kvd_error *err)
{
    w->attend_items = calloc(w->n_items, sizeof(*w->attend_items));
    return w->attend_items ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

int kvd_op_attend_check(const struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    const struct kvd_work_item *item = &w->items[i];
    const struct kvd_view *v = &item->views[w->runs[0].plane];
    uint64_t end = v->length + v->new_tokens;
    if (item->tokens > end)
        return kvd_fail(err, KVD_E_INVALID,
                        "items[%u]: q_len is %u, but the sequence has %" PRIu64 " tokens", i,
                        item->tokens, end);
    if (kvd_op_check_reach(w, item, end - item->tokens, true, err))
        return kvd_fail_in(err, "items[%u]", i);
    return KVD_OK;
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    int rc = kvd_op_attend_alloc(w, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++) {
        rc = kvd_op_note_pages(d, w, &w->items[i], err);
        if (rc == KVD_OK)
            rc = kvd_op_note_lengths(d, w, &w->items[i], err);
        if (rc)
            return kvd_fail_in(err, "items[%u]", i);
        rc = kvd_op_attend_check(w, i, err);
    }
    return rc;
}

struct kvd_attend_params kvd_op_attend_params(struct kvd_work *w)
{
    const struct kvd_run *run = kvd_op_run(w);
    for (uint32_t i = 0; i < w->n_items && !w->filled; i++) {
        const struct kvd_work_item *item = &w->items[i];
        const struct kvd_view *v = &item->views[run->plane];
        w->attend_items[i] = (struct kvd_attend_item){
            .pages = kvd_op_pages(v),
            .length = v->length,
            .hist_end = v->reach.hist_end,
            .q_len = item->tokens,
            .new_tokens = v->new_tokens,
            .q = kvd_op_part(w, item->q),
            .k = kvd_op_part(w, item->k),
            .v = kvd_op_part(w, item->v),
            .o = kvd_op_part(w, item->o),
            .lse = kvd_op_part(w, item->lse),
        };
    }
    w->filled = true;
    return (struct kvd_attend_params){.plane = &w->shape->planes[run->plane],
                                      .rotation = w->rotations[run->plane],
                                      .layer_begin = run->layer_begin,
                                      .layer_count = run->layer_count,
                                      .scale = w->scale,
                                      .softcap = w->softcap,
                                      .window = kvd_op_window(w, run->plane),
                                      .sinks = kvd_op_sinks(w),
                                      .items = w->attend_items,
                                      .n_items = w->n_items,
                                      .slice = &w->job.slice};
}

int kvd_op_attend_run(struct kvd_daemon *d, struct kvd_work *w)
{
    const struct kvd_attend_params p = kvd_op_attend_params(w);
    return d->backend->ops->attend(d->backend, &p, &w->err);
}

int kvd_op_attend_reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    Kvd__V1__AttendResult *results KVD_FREE = calloc(w->n_items, sizeof(*results));
    Kvd__V1__AttendResult **list KVD_FREE = calloc(w->n_items, sizeof(*list));
    Kvd__V1__AttendReply r = KVD__V1__ATTEND_REPLY__INIT;
    for (uint32_t i = 0; i < w->n_items; i++)
        d->metrics.queries_attended += w->items[i].tokens;
    if (!results || !list)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory%s",
                        w->append_items ? "; the tokens are appended" : "");
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_work_item *item = &w->items[i];
        kvd__v1__attend_result__init(&results[i]);
        const struct kvd_view *v = &item->views[w->runs[0].plane];
        results[i].length = v->length + v->new_tokens;
        results[i].o = (ProtobufCBinaryData){item->o_len, item->o_inline};
        results[i].lse = (ProtobufCBinaryData){item->lse_len, item->lse_inline};
        results[i].replayed = item->append.replayed;
        list[i] = &results[i];
    }
    r.n_results = w->n_items;
    r.results = list;
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static kvd_op_phase *const run[] = {kvd_op_attend_run, NULL};

const struct kvd_op kvd_op_attend = {.id = KVD_OP_ATTEND,
                                     .least_items = 1,
                                     .most_items = KVD_MAX_CALL_ITEMS,
                                     .check = check,
                                     .prepare = prepare,
                                     .run = run,
                                     .reply = kvd_op_attend_reply};

void kvd_on_attend(struct kvd_call *call, const void *request)
{
    const Kvd__V1__AttendRequest *req = request;
    kvd_op_handle(call, &kvd_op_attend, req->session, req->n_items, request);
}
