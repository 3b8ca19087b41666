// Step: attention of new tokens to what is stored and to themselves, and their append.
#include "daemon/sched/op.h"

static void ids(struct kvd_work_item *item, const void *request, uint32_t i)
{
    const Kvd__V1__StepItem *in = ((const Kvd__V1__StepRequest *)request)->items[i];
    item->seq = in->sequence;
    item->position = in->position;
    item->tokens = in->tokens;
    item->request = in->request_id;
}

static int tensors(struct kvd_work *w, struct kvd_session *s, const void *request, uint32_t i,
                   struct kvd_error *err)
{
    const Kvd__V1__StepRequest *req = request;
    const Kvd__V1__StepItem *in = req->items[i];
    int rc = kvd_op_set_kv(w, s, i, in->k, in->v, err);
    return rc ? rc : kvd_op_set_qo(w, s, i, in->q, in->o, in->lse, req->params, err);
}

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__StepRequest *req = request;
    const struct kvd_op_batch batch = {.layer_begin = req->layer_begin,
                                       .layer_count = req->layer_count,
                                       .params = req->params,
                                       .wait = req->wait,
                                       .signal = req->signal,
                                       .ids = ids,
                                       .tensors = tensors};
    return kvd_op_check_batch(w, s, request, &batch, err);
}

// A Step that had been applied before attends to what it did then: the history as it was, the
// window, which still has the tokens that became history since, and the new tokens from the
// worker's memory, as some may have become history without ever having been in the window. Where a
// long step has overwritten part of the window, only bf16 history still has its values.
static int note_repeated(const struct kvd_work *w, struct kvd_work_item *item,
                         struct kvd_error *err)
{
    const struct kvd_pool_append *a = &item->append;
    for (uint32_t p = 0; p < w->shape->n_planes; p++) {
        const struct kvd_pool_append_plane *plane = &a->planes[p];
        struct kvd_view *v = &item->views[p];
        if (!(w->planes >> p & 1))
            continue;
        if (!plane->window_kept && kvd_codecs_rotated(w->shape->planes[p].codec))
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "the %u tokens had been appended before, but their attention cannot be "
                            "computed again: the step has compressed part of the window that it "
                            "saw; Attend sees what is stored now",
                            item->tokens);
        v->new_tokens = plane->window_kept ? item->tokens : 0;
        v->length = plane->window_kept ? a->length : a->new_length;
        v->reach.hist_end = plane->window_kept ? plane->before.hist_end : plane->after.hist_end;
    }
    return KVD_OK;
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    int rc = kvd_op_attend_alloc(w, err);
    if (rc == KVD_OK)
        rc = kvd_op_append_prepare(d, w, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++) {
        struct kvd_work_item *item = &w->items[i];
        // The stored tokens as they were, and the new ones from the worker's memory.
        for (uint32_t p = 0; p < w->shape->n_planes; p++)
            item->views[p].new_tokens = item->tokens;
        if (!item->begun && note_repeated(w, item, err))
            return kvd_fail_in(err, "items[%u]", i);
        rc = kvd_op_attend_check(w, i, err);
    }
    return rc;
}

// All phases in one, where the backend has such a way: on a GPU each costs the host a wait, which
// takes longer than a short step does. What is begun so is done to the end; it is short.
static int run_at_once(struct kvd_daemon *d, struct kvd_work *w);

// The attention is first: an append overwrites the oldest tokens of the window.
static kvd_op_phase *const run[] = {run_at_once,
                                    kvd_op_look_for_nonfinite,
                                    kvd_op_copy_pages,
                                    kvd_op_attend_run,
                                    kvd_op_append_demote,
                                    kvd_op_append_store,
                                    NULL};

static int run_at_once(struct kvd_daemon *d, struct kvd_work *w)
{
    bool done = false;
    if (!d->backend->ops->step || w->n_runs > 1 || w->n_copies || w->n_append < w->n_items)
        return KVD_OK;
    struct kvd_append_params append = kvd_op_append_params(w, KVD_APPEND_WHOLE);
    w->filled = false; // each has items of its own
    struct kvd_attend_params attend = kvd_op_attend_params(w);
    int rc = d->backend->ops->step(d->backend, &attend, &append, &w->nonfinite, &done, &w->err);
    if (rc == KVD_E_INVALID)
        return kvd_op_explain_nonfinite(w);
    if (done)
        w->phase = KVD_LEN(run) - 2; // the last one is behind it
    return rc;
}

const struct kvd_op kvd_op_step = {.id = KVD_OP_STEP,
                                   .writes = true,
                                   .least_items = 1,
                                   .most_items = KVD_MAX_CALL_ITEMS,
                                   .check = check,
                                   .room = kvd_op_append_room,
                                   .prepare = prepare,
                                   .run = run,
                                   .conclude = kvd_op_append_conclude,
                                   .reply = kvd_op_attend_reply};

void kvd_on_step(struct kvd_call *call, const void *request)
{
    const Kvd__V1__StepRequest *req = request;
    kvd_op_handle(call, &kvd_op_step, req->session, req->n_items, request);
}
