// Calls that wait for their workers' GPU streams.
//
// A worker sends a call before its stream has got so far; the stream then writes a counter that
// both share (Fence in kvd.proto). Nothing tells the loop of that write, so while calls wait it
// looks: all the time at first, once a millisecond when nothing has passed for a while. A waiting
// call holds nobody up: it is not in the queue yet. GPU streams of kvd never wait for a worker.
#include <stdatomic.h>

#include "daemon/compute.h"

enum {
    EAGER_MS = 3, // of looking all the time, after the latest arrival or passage
    LAZY_MS = 1,  // between looks after that
};

static struct {
    struct kvd_work *first; // linked by next
    uint32_t count;
    uint64_t bytes; // of their requests
    bool made;
    uv_idle_t eager;
    uv_timer_t lazy;
    uint64_t latest_ms;
} parked; // one daemon a process

uint32_t kvd_fences_parked(void)
{
    return parked.count;
}

bool kvd_fence_passed(const struct kvd_fence *f)
{
    return (int32_t)(atomic_load_explicit(f->word, memory_order_acquire) - f->value) >= 0;
}

void kvd_fence_signal(const struct kvd_fence *f)
{
    if (f->word)
        atomic_store_explicit(f->word, f->value, memory_order_release);
}

static struct kvd_work *take(struct kvd_work **link)
{
    struct kvd_work *w = *link;
    *link = w->next;
    w->next = NULL;
    parked.count--;
    parked.bytes -= w->call->request_bytes;
    return w;
}

// Lets those go on whose fences have been passed.
static void look(struct kvd_daemon *d)
{
    struct kvd_work **link = &parked.first, *ready = NULL;
    while (*link) {
        struct kvd_work *w = *link;
        if (!kvd_fence_passed(&w->wait) && !kvd_call_expired(w->call)) {
            link = &w->next;
            continue;
        }
        take(link);
        w->next = ready;
        ready = w;
    }
    while (ready) {
        struct kvd_work *w = ready;
        struct kvd_error err = {0};
        ready = w->next;
        parked.latest_ms = kvd_now_ms(d);
        if (kvd_fence_passed(&w->wait)) {
            kvd_work_enqueue(d, w);
            continue;
        }
        kvd_fail(&err, KVD_E_TIMEOUT, "the worker's fence has not reached %u in time, it is at %u",
                 w->wait.value, atomic_load(w->wait.word));
        kvd_work_fail(d, w, &err);
    }
}

static void on_lazy(uv_timer_t *timer);

// Looks as often as is due from now on.
static void pace(struct kvd_daemon *d)
{
    bool eager = parked.first && kvd_now_ms(d) - parked.latest_ms < EAGER_MS;
    if (!eager)
        uv_idle_stop(&parked.eager);
    if (!parked.first)
        uv_timer_stop(&parked.lazy);
    else if (!eager && !uv_is_active((uv_handle_t *)&parked.lazy))
        uv_timer_start(&parked.lazy, on_lazy, LAZY_MS, LAZY_MS);
}

static void on_eager(uv_idle_t *idle)
{
    look(idle->data);
    pace(idle->data);
}

static void on_lazy(uv_timer_t *timer)
{
    uint64_t before = parked.latest_ms;
    look(timer->data);
    if (parked.first && parked.latest_ms != before) {
        uv_timer_stop(&parked.lazy);
        uv_idle_start(&parked.eager, on_eager);
    }
    pace(timer->data);
}

void kvd_fences_park(struct kvd_daemon *d, struct kvd_work *w)
{
    if (parked.count >= d->config.max_queue ||
        parked.bytes + w->call->request_bytes > KVD_MAX_WAITING_BYTES) {
        struct kvd_error err = {0};
        kvd_fail(&err, KVD_E_LIMIT,
                 "%u calls wait for fences already, or 1 GiB of requests; send fewer at a time or "
                 "raise max-queue",
                 parked.count);
        kvd_work_fail(d, w, &err);
        return;
    }
    if (!parked.made) {
        uv_idle_init(&d->loop, &parked.eager);
        uv_timer_init(&d->loop, &parked.lazy);
        parked.eager.data = parked.lazy.data = d;
        parked.made = true;
    }
    w->next = parked.first;
    parked.first = w;
    parked.count++;
    parked.bytes += w->call->request_bytes;
    parked.latest_ms = kvd_now_ms(d);
    uv_timer_stop(&parked.lazy);
    uv_idle_start(&parked.eager, on_eager);
}

void kvd_fences_cancel(struct kvd_daemon *d, uint64_t session, const struct kvd_error *err)
{
    struct kvd_work **link = &parked.first, *gone = NULL;
    while (*link) {
        if (session && (*link)->session != session) {
            link = &(*link)->next;
            continue;
        }
        struct kvd_work *w = take(link);
        w->next = gone;
        gone = w;
    }
    while (gone) {
        struct kvd_work *next = gone->next;
        kvd_work_fail(d, gone, err);
        gone = next;
    }
    if (parked.made)
        pace(d);
}
