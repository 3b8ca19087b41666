#include "daemon/sched/work.h"

#include <utlist.h>

static bool writes(const struct kvd_work *w)
{
    return w->op == KVD_OP_APPEND || w->op == KVD_OP_STEP;
}

void kvd_work_pin(struct kvd_daemon *d, struct kvd_work *w)
{
    for (; w->pinned < w->n_items; w->pinned++)
        kvd_pool_seq_pin(d->pool, w->items[w->pinned].seq);
}

void kvd_work_free(struct kvd_daemon *d, struct kvd_work *w)
{
    for (uint32_t i = 0; i < w->pinned; i++)
        kvd_pool_seq_unpin(d->pool, w->items[i].seq);
    for (uint32_t i = 0; i < KVD_MAX(w->n_items, 1u); i++) { // Rotate keeps its output in item 0
        free(w->items[i].o_inline);
        free(w->items[i].lse_inline);
        free(w->items[i].pages);
    }
    for (uint32_t i = 0; i < w->n_buffers; i++)
        kvd_buffer_unref(w->buffers[i]);
    kvd_pool_layout_unref(d->pool, w->layout);
    free(w->buffers);
    free(w->items);
    free(w->append_items);
    free(w->append_index);
    free(w->copies);
    free(w->attend_items);
    free(w->job.slice.state);
    free(w);
}

bool kvd_work_ready(const struct kvd_daemon *d, const struct kvd_work *w)
{
    for (uint32_t i = 0; i < w->n_items; i++) {
        const struct kvd_seq_use *use = &d->use[(uint32_t)w->items[i].seq];
        if (use->writer || (writes(w) && use->readers))
            return false;
    }
    return true;
}

static void lock(struct kvd_daemon *d, struct kvd_work *w, bool on)
{
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_seq_use *use = &d->use[(uint32_t)w->items[i].seq];
        if (writes(w))
            use->writer = on;
        else
            use->readers = (uint16_t)(use->readers + (on ? 1 : -1));
    }
    w->locked = on;
}

// -- starting -----------------------------------------------------------------------------------

static int note_pages(struct kvd_daemon *d, struct kvd_work_item *item, struct kvd_error *err)
{
    uint32_t n = kvd_pool_seq_pages(d->pool, item->seq, KVD_POOL_BF16, NULL, 0);
    uint32_t m = kvd_pool_seq_pages(d->pool, item->seq, KVD_POOL_CODEC, NULL, 0);
    item->pages = calloc((size_t)n + m + 1, sizeof(*item->pages));
    if (!item->pages)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    kvd_pool_seq_pages(d->pool, item->seq, KVD_POOL_BF16, item->pages, n);
    kvd_pool_seq_pages(d->pool, item->seq, KVD_POOL_CODEC, item->pages + n, m);
    item->n_bf16 = n;
    item->n_codec = m;
    return KVD_OK;
}

// Length and history end that the call's layers see.
static int note_lengths(struct kvd_daemon *d, const struct kvd_work *w, struct kvd_work_item *item,
                        struct kvd_error *err)
{
    struct kvd_pool_seq_info info;
    if (kvd_pool_seq_info(d->pool, item->seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "sequence %llu was freed",
                        (unsigned long long)item->seq);
    bool ahead = w->layer_begin + w->layer_count <= info.pending_layers;
    if (!ahead && w->layer_begin < info.pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %llu: an append in progress has filled layers 0 to %u; ask for "
                        "layers on one side of that",
                        (unsigned long long)item->seq, info.pending_layers - 1);
    item->length = ahead ? info.pending_length : info.length;
    item->hist_end = ahead ? info.pending_hist_end : info.hist_end;
    return KVD_OK;
}

// The executor cannot ask the pool, which the loop goes on changing: what it needs is noted here.
static int note_copies(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_pool_append *a,
                       struct kvd_error *err)
{
    if (a->n_changes == 0)
        return KVD_OK;
    struct kvd_page_copy *grown = realloc(w->copies, (w->n_copies + a->n_changes) * sizeof(*grown));
    if (!grown)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    w->copies = grown;
    for (uint32_t i = 0; i < a->n_changes; i++) {
        const struct kvd_pool_change *c = &a->changes[i];
        if (c->old_page == KVD_POOL_NONE)
            continue;
        w->copies[w->n_copies++] = (struct kvd_page_copy){
            .to = kvd_pool_page_addr(d->pool, c->new_page),
            .from = kvd_pool_page_addr(d->pool, c->old_page),
            .bytes = kvd_pool_page_bytes(d->pool, w->layout, (enum kvd_pool_kind)c->kind)};
    }
    return KVD_OK;
}

static int begin_append(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    struct kvd_pool_append_request by = {.seq = item->seq,
                                         .position = item->position,
                                         .tokens = item->tokens,
                                         .layer_begin = w->layer_begin,
                                         .layer_count = w->layer_count,
                                         .appender = w->appender,
                                         .request = item->request};
    int rc = kvd_pool_append_begin(d->pool, &by, &item->append, err);
    if (rc)
        return kvd_fail_in(err, "items[%u]", i);
    item->begun = !item->append.replayed;
    rc = note_pages(d, item, err);
    if (rc == KVD_OK && item->begun)
        rc = note_copies(d, w, &item->append, err);
    if (rc || !item->begun)
        return rc;
    w->append_index[w->n_append] = i;
    w->append_items[w->n_append++] = (struct kvd_append_item){
        .pages = {item->pages, item->pages + item->n_bf16},
        .length = item->append.length,
        .hist_end = item->append.hist_end,
        .new_length = item->append.new_length,
        .new_hist_end = item->append.new_hist_end,
        .k = item->k,
        .v = item->v,
    };
    return KVD_OK;
}

// A Step that had been applied before attends to what it did then: the history as it was, the
// window, which still has the tokens that became history since, and the new tokens from the
// worker's memory, as some may have become history without ever having been in the window. Where a
// long step has overwritten part of the window, only bf16 history still has its values.
static int note_repeated(struct kvd_daemon *d, const struct kvd_work *w, struct kvd_work_item *item,
                         uint32_t *new_tokens, struct kvd_error *err)
{
    const struct kvd_pool_append *a = &item->append;
    bool exact = kvd_pool_layout_get(d->pool, w->layout)->planes[0].codec == KVD_CODEC_BF16;
    if (!a->window_kept && !exact)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "the %u tokens had been appended before, but their attention cannot be "
                        "computed again: the step has compressed part of the window that it saw; "
                        "Attend sees what is stored now",
                        item->tokens);
    *new_tokens = a->window_kept ? item->tokens : 0;
    item->length = a->window_kept ? a->length : a->new_length;
    item->hist_end = a->window_kept ? a->hist_end : a->new_hist_end;
    return KVD_OK;
}

static int begin_attend(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    uint32_t new_tokens = item->begun ? item->tokens : 0;
    int rc = item->pages ? KVD_OK : note_pages(d, item, err);
    if (rc == KVD_OK && item->begun) {
        // Step: the stored tokens as they were, and the new ones from the worker's memory.
        item->length = item->append.length;
        item->hist_end = item->append.hist_end;
    } else if (rc == KVD_OK) {
        rc = item->append.replayed ? note_repeated(d, w, item, &new_tokens, err)
                                   : note_lengths(d, w, item, err);
    }
    if (rc)
        return kvd_fail_in(err, "items[%u]", i);
    if (new_tokens == 0 && item->tokens > item->length)
        return kvd_fail(err, KVD_E_INVALID,
                        "items[%u]: q_len is %u, but the sequence has %llu tokens", i, item->tokens,
                        (unsigned long long)item->length);
    w->attend_items[i] = (struct kvd_attend_item){
        .pages = {item->pages, item->pages + item->n_bf16},
        .length = item->length,
        .hist_end = item->hist_end,
        .q_len = item->tokens,
        .new_tokens = new_tokens,
        .q = item->q,
        .k = item->k,
        .v = item->v,
        .o = item->o,
        .lse = item->lse,
    };
    return KVD_OK;
}

static int begin_read(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[0];
    int rc = note_pages(d, item, err);
    if (rc == KVD_OK)
        rc = note_lengths(d, w, item, err);
    if (rc)
        return rc;
    if (item->position > item->length || item->tokens > item->length - item->position)
        return kvd_fail(err, KVD_E_INVALID, "tokens %llu to %llu, but sequence %llu has %llu",
                        (unsigned long long)item->position,
                        (unsigned long long)item->position + item->tokens - 1,
                        (unsigned long long)item->seq, (unsigned long long)item->length);
    w->read.plane = &kvd_pool_layout_get(d->pool, w->layout)->planes[0];
    w->read.rotation = d->rotations[w->layout];
    w->read.layer_begin = w->layer_begin;
    w->read.layer_count = w->layer_count;
    w->read.pages = (struct kvd_pages){item->pages, item->pages + item->n_bf16};
    w->read.length = item->length;
    w->read.hist_end = item->hist_end;
    w->read.begin = item->position;
    w->read.tokens = item->tokens;
    return KVD_OK;
}

static int begin_map(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    struct kvd_pool_seq_info info;
    if (kvd_pool_seq_info(d->pool, item->seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "items[%u]: sequence %llu was freed", i,
                        (unsigned long long)item->seq);
    if (info.pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "items[%u]: an append has filled %u layers of sequence %llu; finish it or "
                        "truncate to %llu first",
                        i, info.pending_layers, (unsigned long long)item->seq,
                        (unsigned long long)info.length);
    item->length = info.length;
    item->hist_end = info.hist_end;
    return note_pages(d, item, err);
}

static int start(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    int rc = KVD_OK;
    if (writes(w)) {
        w->append_items = calloc(w->n_items, sizeof(*w->append_items));
        w->append_index = calloc(w->n_items, sizeof(*w->append_index));
    }
    if (w->op == KVD_OP_ATTEND || w->op == KVD_OP_STEP)
        w->attend_items = calloc(w->n_items, sizeof(*w->attend_items));
    if ((writes(w) && (!w->append_items || !w->append_index)) ||
        ((w->op == KVD_OP_ATTEND || w->op == KVD_OP_STEP) && !w->attend_items))
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK && writes(w); i++)
        rc = begin_append(d, w, i, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK && w->attend_items; i++)
        rc = begin_attend(d, w, i, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK && w->op == KVD_OP_MAP; i++)
        rc = begin_map(d, w, i, err);
    if (w->op == KVD_OP_READ)
        rc = begin_read(d, w, err);
    w->rotate.rotation = d->rotations[w->layout];
    return rc;
}

// -- finishing ----------------------------------------------------------------------------------

static void settle(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    const struct kvd_plane *g = &kvd_pool_layout_get(d->pool, w->layout)->planes[0];
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_work_item *item = &w->items[i];
        if (!item->begun)
            continue;
        item->begun = false;
        if (!commit) {
            kvd_pool_append_abort(d->pool, &item->append);
            continue;
        }
        uint64_t vectors =
            (item->append.new_hist_end - item->append.hist_end) * w->layer_count * g->kv_heads;
        d->metrics.bytes_in += vectors * 2 * (g->head_dim_k + g->head_dim_v);
        d->metrics.bytes_stored +=
            vectors * kvd_tile_bytes(g->codec, g->head_dim_k, g->head_dim_v) / KVD_PAGE_TOKENS;
        if (w->layer_begin + w->layer_count == g->n_layers)
            d->metrics.tokens_appended += item->tokens;
        kvd_pool_append_commit(d->pool, &item->append);
    }
}

static void reply_append(struct kvd_daemon *d, struct kvd_work *w)
{
    uint64_t *lengths KVD_FREE = calloc(w->n_items, sizeof(*lengths));
    protobuf_c_boolean *replayed KVD_FREE = calloc(w->n_items, sizeof(*replayed));
    Kvd__V1__AppendReply r = KVD__V1__APPEND_REPLY__INIT;
    struct kvd_pool_seq_info info;
    for (uint32_t i = 0; lengths && replayed && i < w->n_items; i++) {
        lengths[i] = kvd_pool_seq_info(d->pool, w->items[i].seq, &info) ? 0 : info.length;
        replayed[i] = w->items[i].append.replayed;
    }
    r.n_lengths = r.n_replayed = lengths && replayed ? w->n_items : 0;
    r.lengths = lengths;
    r.replayed = replayed;
    kvd_call_reply(w->call, &r);
}

static void reply_attend(struct kvd_work *w)
{
    Kvd__V1__AttendResult *results KVD_FREE = calloc(w->n_items, sizeof(*results));
    Kvd__V1__AttendResult **list KVD_FREE = calloc(w->n_items, sizeof(*list));
    Kvd__V1__AttendReply r = KVD__V1__ATTEND_REPLY__INIT;
    for (uint32_t i = 0; results && list && i < w->n_items; i++) {
        struct kvd_work_item *item = &w->items[i];
        kvd__v1__attend_result__init(&results[i]);
        results[i].length = w->attend_items[i].length + w->attend_items[i].new_tokens;
        results[i].o = (ProtobufCBinaryData){item->o_len, item->o_inline};
        results[i].lse = (ProtobufCBinaryData){item->lse_len, item->lse_inline};
        results[i].replayed = item->append.replayed;
        list[i] = &results[i];
    }
    r.n_results = w->n_items;
    r.results = list;
    kvd_call_reply(w->call, &r);
}

static void reply(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_work_item *item = &w->items[0];
    if (w->op == KVD_OP_APPEND) {
        reply_append(d, w);
    } else if (w->op == KVD_OP_ROTATE) {
        Kvd__V1__RotateReply r = KVD__V1__ROTATE_REPLY__INIT;
        r.y = (ProtobufCBinaryData){item->o_len, item->o_inline};
        kvd_call_reply(w->call, &r);
    } else if (w->op == KVD_OP_READ) {
        Kvd__V1__ReadTokensReply r = KVD__V1__READ_TOKENS_REPLY__INIT;
        r.k = (ProtobufCBinaryData){item->o_len, item->o_inline};
        r.v = (ProtobufCBinaryData){item->lse_len, item->lse_inline};
        kvd_call_reply(w->call, &r);
    } else {
        for (uint32_t i = 0; i < w->n_items; i++)
            d->metrics.queries_attended += w->items[i].tokens;
        reply_attend(w);
    }
}

// It is no longer among those that wait or run.
static void leave(struct kvd_daemon *d, struct kvd_work *w)
{
    if (w->parked)
        kvd_fences_forget(d, w);
    kvd_queue_forget(d, w);
    if (w->listed)
        DL_DELETE2(d->works, w, previous_work, next_work);
    w->listed = false;
    w->call->on_cancelled = NULL;
    if (w->locked)
        lock(d, w, false);
}

static void done(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_work *w = (struct kvd_work *)job;
    uint32_t ns = w->ns;
    kvd_histogram_add(&d->metrics.kernel[w->op], job->ran_ns);
    if (job->abandoned)
        job->rc = kvd_fail(&w->err, KVD_E_UNAVAILABLE, "kvd is shutting down");
    else if (job->rc == KVD_E_TIMEOUT)
        w->err = w->why;
    settle(d, w, job->rc == KVD_OK);
    leave(d, w);
    if (job->rc == KVD_OK) {
        reply(d, w);
    } else {
        kvd_fence_signal(&w->signal);
        d->metrics.nonfinite += job->rc == KVD_E_INVALID;
        kvd_call_fail_error(w->call, &w->err);
        if (job->rc == KVD_E_INTERNAL)
            kvd_daemon_check_device(d);
    }
    kvd_work_free(d, w);
    kvd_queue_kick(d, ns);
}

// Ends a work that is not with the executor. The line may go on then.
static void fail(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_error *err)
{
    struct kvd_call *call = w->call;
    settle(d, w, false);
    kvd_fence_signal(&w->signal);
    leave(d, w);
    kvd_work_free(d, w);
    kvd_call_fail_error(call, err);
    if (err->code == KVD_E_INTERNAL)
        kvd_daemon_check_device(d);
}

void kvd_work_start(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_error err = {0};
    if (kvd_call_expired(w->call)) {
        kvd_fail(&err, KVD_E_TIMEOUT,
                 "the deadline passed while the call was waiting, as %u others do",
                 kvd_queue_waiting(d));
        fail(d, w, &err);
        return;
    }
    lock(d, w, true);
    if (start(d, w, &err) || (w->op == KVD_OP_MAP && kvd_mapping_reply(d, w, &err))) {
        fail(d, w, &err);
        return;
    }
    if (writes(w))
        kvd_memory_ahead(d);
    if (w->op == KVD_OP_MAP) {
        leave(d, w);
        kvd_work_free(d, w);
        return;
    }
    w->job.run = kvd_work_run;
    w->job.done = done;
    w->job.fair.tenant = w->ns;
    kvd_exec_submit(d, &w->job);
}

static void cancel(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_error *why)
{
    if (!w->in_flight) {
        uint32_t ns = w->ns;
        fail(d, w, why);
        kvd_queue_kick(d, ns); // it may have been the first in line
        return;
    }
    if (w->why.code)
        return;
    w->why = *why;
    kvd_exec_cancel(&w->job);
}

static void on_cancelled(struct kvd_call *call)
{
    struct kvd_error why = {.code = KVD_E_TIMEOUT,
                            .text = "the caller has gone, or its deadline has passed"};
    cancel(call->d, call->work, &why);
}

void kvd_work_queue(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_error err = {0};
    if (kvd_queue_admit(d, w, &err)) {
        fail(d, w, &err);
        return;
    }
    w->call->work = w;
    w->call->on_cancelled = on_cancelled;
    DL_APPEND2(d->works, w, previous_work, next_work);
    w->listed = true;
    if (w->wait.word && !kvd_fence_passed(&w->wait))
        kvd_fences_park(d, w);
    else
        kvd_queue_push(d, w);
}

uint32_t kvd_compute_queued(const struct kvd_daemon *d)
{
    uint32_t n;
    const struct kvd_work *w;
    DL_COUNT2(d->works, w, n, next_work);
    return n;
}

void kvd_compute_cancel(struct kvd_daemon *d, const struct kvd_session *s)
{
    struct kvd_error err = {.code = s ? KVD_E_UNAUTH : KVD_E_UNAVAILABLE};
    snprintf(err.text, sizeof(err.text), "%s",
             s ? "the session ended before the call was done" : "kvd is shutting down");
    // Not while the list is walked: a work that goes makes way for others, which start, or fail.
    struct kvd_work *w, *next, *gone = NULL;
    DL_FOREACH_SAFE2(d->works, w, next, next_work)
    {
        if (s && w->session != s->id)
            continue;
        if (w->in_flight) {
            cancel(d, w, &err);
            continue;
        }
        if (w->parked)
            kvd_fences_forget(d, w);
        kvd_queue_forget(d, w);
        DL_DELETE2(d->works, w, previous_work, next_work);
        w->listed = false;
        LL_PREPEND(gone, w);
    }
    while (gone) {
        w = gone;
        uint32_t ns = w->ns;
        gone = w->next;
        fail(d, w, &err);
        kvd_queue_kick(d, ns);
    }
}
