// The executor's part of compute calls: what they have the backend do, a slice at a time.
//
// Until an append overwrites the first token of a window nothing that counts has changed, and the
// work can be given up: new pages go back as they came. From then on it is done to the end.
#include "daemon/sched/work.h"

static struct kvd_append_params append_params(struct kvd_daemon *d, struct kvd_work *w)
{
    return (struct kvd_append_params){.plane = &kvd_pool_layout_get(d->pool, w->layout)->planes[0],
                                      .rotation = d->rotations[w->layout],
                                      .layer_begin = w->layer_begin,
                                      .layer_count = w->layer_count,
                                      .items = w->append_items,
                                      .n_items = w->n_append,
                                      .slice = &w->job.slice};
}

static int explain_nonfinite(struct kvd_work *w)
{
    const struct kvd_nonfinite *n = &w->nonfinite;
    return kvd_fail(&w->err, KVD_E_INVALID,
                    "items[%u].%s holds NaN or Inf at layer %u, token %u, head %u, channel %u; "
                    "nothing was stored",
                    w->append_index[n->item], n->in_v ? "v" : "k", n->layer, n->token, n->head,
                    n->channel);
}

static int look_for_nonfinite(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_append_params p = append_params(d, w);
    int rc = w->n_append ? d->backend->ops->check(d->backend, &p, &w->nonfinite) : KVD_OK;
    if (rc == KVD_E_INVALID)
        return explain_nonfinite(w);
    if (rc)
        return kvd_fail(&w->err, rc, "the new tokens could not be checked; nothing was stored");
    return KVD_OK;
}

static int copy_pages(struct kvd_daemon *d, struct kvd_work *w)
{
    int rc = KVD_OK;
    while (w->copied < w->n_copies && rc == KVD_OK) {
        const struct kvd_page_copy *c = &w->copies[w->copied++];
        rc = d->backend->ops->copy(d->backend, c->to, c->from, c->bytes, &w->err);
        w->job.slice.more = w->copied < w->n_copies;
        if (kvd_slice_over(&w->job.slice))
            break;
    }
    return rc;
}

static int attend(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_attend_params p = {.plane = &kvd_pool_layout_get(d->pool, w->layout)->planes[0],
                                  .rotation = d->rotations[w->layout],
                                  .layer_begin = w->layer_begin,
                                  .layer_count = w->layer_count,
                                  .scale = w->scale,
                                  .softcap = w->softcap,
                                  .window = w->window,
                                  .items = w->attend_items,
                                  .n_items = w->n_items,
                                  .slice = &w->job.slice};
    return w->attend_items ? d->backend->ops->attend(d->backend, &p, &w->err) : KVD_OK;
}

static int append(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_append_params p = append_params(d, w);
    return w->n_append ? d->backend->ops->append(d->backend, &p, &w->err) : KVD_OK;
}

static int other(struct kvd_daemon *d, struct kvd_work *w)
{
    w->rotate.slice = w->read.slice = &w->job.slice;
    if (w->op == KVD_OP_ROTATE)
        return d->backend->ops->rotate(d->backend, &w->rotate, &w->err);
    return w->op == KVD_OP_READ ? d->backend->ops->read(d->backend, &w->read, &w->err) : KVD_OK;
}

// In this order; what a call has not is done at once.
static int (*const phases[])(struct kvd_daemon *d, struct kvd_work *w) = {
    look_for_nonfinite, copy_pages, attend, append, other,
};

static bool given_up(const struct kvd_job *job)
{
    return atomic_load(&job->cancelled) && !job->slice.overwriting;
}

bool kvd_work_run(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_work *w = (struct kvd_work *)job;
    struct kvd_slice *slice = &job->slice;
    while (w->phase < KVD_LEN(phases) && !given_up(job)) {
        slice->more = false;
        job->rc = phases[w->phase](d, w);
        if (job->rc)
            return false;
        if (slice->more && !given_up(job))
            return true;
        if (slice->more)
            break;
        free(KVD_TAKE(slice->state));
        slice->at = 0;
        slice->overwriting = false;
        w->phase++;
    }
    if (w->phase == KVD_LEN(phases))
        kvd_fence_signal(&w->signal); // the worker's stream goes on before the reply is there
    else
        job->rc = KVD_E_TIMEOUT;
    return false;
}
