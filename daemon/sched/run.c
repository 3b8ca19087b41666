// The executor's part of compute calls: the phases of an operation, each for one run of layers
// after the other, a slice at a time.
//
// An append's last phase, which overwrites tokens of windows, comes when all layers have gone
// through the others. Until then nothing that counts has changed, and the work can be given up: new
// pages go back as they came. From then on it is done to the end.
#include "daemon/sched/op.h"
#include "daemon/session/scrub.h"

static bool given_up(const struct kvd_work *w)
{
    return atomic_load(&w->job.cancelled) && !w->job.must_end;
}

static bool is_damaged(struct kvd_work *w, const struct kvd_work_check *c)
{
    if (c->sum == c->block.sum)
        return false;
    w->job.rc =
        kvd_fail(&w->err, KVD_E_CORRUPT,
                 "block %u of plane %u of sequence %" PRIu64
                 " is damaged: its memory is not what was stored; free the sequence, and compute "
                 "it anew",
                 c->block.index, c->block.plane, c->block.seq);
    return true;
}

// Compares the next blocks that are used for the first time. False: one is damaged, or the GPU
// failed.
static bool check_some(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_span pages[KVD_SUMS_AT_ONCE];
    uint64_t sums[KVD_SUMS_AT_ONCE];
    uint32_t n = KVD_MIN(w->n_checks - w->checked, kvd_page_sums_at_once(d));
    struct kvd_work_check *c = &w->checks[w->checked];
    for (uint32_t i = 0; i < n; i++)
        pages[i] = (struct kvd_span){c[i].block.addr, c[i].block.bytes};
    w->job.rc = kvd_page_sums(d, pages, n, sums, &w->err);
    for (uint32_t i = 0; i < n && w->job.rc == KVD_OK; i++) {
        c[i].sum = sums[i];
        w->checked++;
        if (is_damaged(w, &c[i]))
            return false;
    }
    return w->job.rc == KVD_OK;
}

// False: there is more to do.
static bool check_blocks(struct kvd_daemon *d, struct kvd_work *w)
{
    while (w->checked < w->n_checks) {
        if (!check_some(d, w))
            return true;
        if (kvd_slice_over(&w->job.slice))
            break;
    }
    return w->checked == w->n_checks;
}

// To the next run of layers, or phase.
static void next(struct kvd_work *w)
{
    struct kvd_slice *slice = &w->job.slice;
    free(KVD_TAKE(slice->state));
    slice->at = 0;
    w->filled = false;
    if (++w->run < w->n_runs)
        return;
    w->run = 0;
    w->phase++;
}

bool kvd_work_run(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_work *w = (struct kvd_work *)job;
    static kvd_op_phase *const none[] = {NULL};
    kvd_op_phase *const *phases = w->op->run ? w->op->run : none;
    struct kvd_slice *slice = &job->slice;
    if (!check_blocks(d, w) && !given_up(w))
        return true;
    if (job->rc)
        return false;
    while (phases[w->phase] && !given_up(w)) {
        slice->more = false;
        job->rc = phases[w->phase](d, w);
        if (job->rc)
            return false;
        if (slice->more && !given_up(w))
            return true;
        if (slice->more)
            break;
        next(w);
    }
    if (!phases[w->phase])
        kvd_fence_signal(&w->signal); // the worker's stream goes on before the reply is there
    else
        job->rc = KVD_E_TIMEOUT;
    return false;
}
