// Calls that wait for their workers' GPU streams.
//
// A worker sends a call before its stream has got so far; the stream then writes a counter that
// both share (Fence in kvd.proto). Nothing tells the loop of that write, so while calls wait it
// looks: all the time at first, once a millisecond when nothing has passed for a while. A waiting
// call holds nobody up: it is not in the queue yet. GPU streams of kvd never wait for a worker.
#include "daemon/sched/fences.h"

#include <stdatomic.h>
#include <utlist.h>

enum {
    EAGER_MS = 3, // of looking all the time, after the latest arrival or passage
    LAZY_MS = 1,  // between looks after that
};

struct kvd_fences {
    struct kvd_parked *first;
    uv_idle_t eager;
    uv_timer_t lazy;
    uint32_t handles;
    uint64_t latest_ms; // of an arrival or a passage
};

bool kvd_fence_passed(const struct kvd_fence *f)
{
    return (int32_t)(atomic_load_explicit(f->word, memory_order_acquire) - f->value) >= 0;
}

void kvd_fence_signal(const struct kvd_fence *f)
{
    if (f->word)
        atomic_store_explicit(f->word, f->value, memory_order_release);
}

void kvd_fences_forget(struct kvd_daemon *d, struct kvd_parked *p)
{
    if (p->parked)
        DL_DELETE(d->fences->first, p);
    p->parked = false;
}

// Lets those go on whose fences have been passed. Deadlines need no look: gRPC cancels such calls.
static void look(struct kvd_daemon *d)
{
    struct kvd_parked *p, *next, *ready = NULL;
    DL_FOREACH_SAFE(d->fences->first, p, next)
    {
        if (!kvd_fence_passed(&p->fence))
            continue;
        kvd_fences_forget(d, p);
        DL_APPEND(ready, p);
        d->fences->latest_ms = kvd_now_ms(d);
    }
    while (ready) {
        p = ready;
        DL_DELETE(ready, p);
        p->passed(d, p);
    }
}

static void on_lazy(uv_timer_t *timer);

// Looks as often as is due from now on.
static void pace(struct kvd_daemon *d)
{
    struct kvd_fences *f = d->fences;
    bool eager = f->first && kvd_now_ms(d) - f->latest_ms < EAGER_MS;
    if (!eager)
        uv_idle_stop(&f->eager);
    if (!f->first)
        uv_timer_stop(&f->lazy);
    else if (!eager && !uv_is_active((uv_handle_t *)&f->lazy))
        uv_timer_start(&f->lazy, on_lazy, LAZY_MS, LAZY_MS);
}

static void on_eager(uv_idle_t *idle)
{
    look(idle->data);
    pace(idle->data);
}

static void on_lazy(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    uint64_t before = d->fences->latest_ms;
    look(d);
    if (d->fences->first && d->fences->latest_ms != before) {
        uv_timer_stop(timer);
        uv_idle_start(&d->fences->eager, on_eager);
    }
    pace(d);
}

void kvd_fences_park(struct kvd_daemon *d, struct kvd_parked *p)
{
    struct kvd_fences *f = d->fences;
    DL_APPEND(f->first, p);
    p->parked = true;
    f->latest_ms = kvd_now_ms(d);
    uv_timer_stop(&f->lazy);
    uv_idle_start(&f->eager, on_eager);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_fences *f = calloc(1, sizeof(*f));
    if (!f)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &f->eager);
    uv_timer_init(&d->loop, &f->lazy);
    f->eager.data = f->lazy.data = d;
    f->handles = 2;
    d->fences = f;
    return KVD_OK;
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    if (--d->fences->handles == 0)
        free(KVD_TAKE(d->fences));
}

// Nothing is parked any more.
static void end(struct kvd_daemon *d)
{
    struct kvd_fences *f = d->fences;
    if (!f)
        return;
    uv_close((uv_handle_t *)&f->eager, on_handle_closed);
    uv_close((uv_handle_t *)&f->lazy, on_handle_closed);
}

const struct kvd_part kvd_part_fences = {.init = init, .end = end};
