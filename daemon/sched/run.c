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

// Compares the blocks that are used for the first time. False: there is more to do.
static bool check_blocks(struct kvd_work *w)
{
    while (w->checked < w->n_checks) {
        struct kvd_work_check *c = &w->checks[w->checked++];
        c->sum = kvd_page_sum((const void *)(uintptr_t)c->block.addr, c->block.bytes);
        if (c->sum != c->block.sum) {
            w->job.rc = kvd_fail(&w->err, KVD_E_CORRUPT,
                                 "block %u of plane %u of sequence %" PRIu64
                                 " is damaged: its memory is not what was stored; free the "
                                 "sequence, and compute it anew",
                                 c->block.index, c->block.plane, c->block.seq);
            return true;
        }
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
    if (!check_blocks(w) && !given_up(w))
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
