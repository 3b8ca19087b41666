#include "daemon/sched/queue.h"

#include <uthash.h>
#include <utlist.h>

enum { MAX_IN_FLIGHT = 8 }; // of a namespace, handed to the executor at once

struct line {
    struct kvd_waiter *first;
    uint32_t in_flight;
    struct kvd_waiting waiting;
};

// What a session has waiting, while it has anything.
struct charged {
    uint64_t session;
    struct kvd_waiting waiting;
    UT_hash_handle hh;
};

struct kvd_queue {
    struct line lines[KVD_MAX_NAMESPACES];
    struct charged *sessions;
    struct kvd_waiting waiting;
    bool (*ready)(struct kvd_daemon *d, struct kvd_waiter *w);
    void (*start)(struct kvd_daemon *d, struct kvd_waiter *w);
};

uint32_t kvd_queue_waiting(const struct kvd_daemon *d)
{
    return d->queue->waiting.calls;
}

static void count(struct kvd_waiting *w, bool on, uint64_t bytes)
{
    w->calls += on ? 1 : -1u;
    w->bytes += on ? bytes : -bytes;
}

static int refuse(const char *who, uint64_t id, struct kvd_waiting own, struct kvd_waiting all,
                  const char *why, struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_LIMIT,
                    "%s %" PRIu64 " has %u calls of %" PRIu64
                    " bytes waiting, of %u calls and %" PRIu64 " bytes there, "
                    "and would have too many %s for others to have room; send fewer at a time or "
                    "raise max-queue",
                    who, id, own.calls, own.bytes, all.calls, all.bytes, why);
}

int kvd_queue_admit(struct kvd_daemon *d, struct kvd_waiter *w, struct kvd_error *err)
{
    struct kvd_queue *q = d->queue;
    struct line *line = &q->lines[w->ns];
    struct kvd_waiting most = {d->config.max_queue, KVD_MAX_WAITING_BYTES}, none = {0};
    // A namespace ends up with at most three quarters of all, and shares those among its sessions.
    struct kvd_waiting part = {KVD_MAX(most.calls / 4 * 3, 1u), most.bytes / 4 * 3};
    struct charged *s;
    const char *why;
    HASH_FIND(hh, q->sessions, &w->session, sizeof(w->session), s);
    struct kvd_waiting own = s ? s->waiting : none;
    if (!kvd_waiting_fits(line->waiting, q->waiting, most, w->bytes, &why))
        return refuse("namespace", w->ns, line->waiting, q->waiting, why, err);
    if (!kvd_waiting_fits(own, line->waiting, part, w->bytes, &why))
        return refuse("session", w->session, own, line->waiting, why, err);
    if (!s) {
        s = calloc(1, sizeof(*s));
        if (!s)
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        s->session = w->session;
        HASH_ADD(hh, q->sessions, session, sizeof(s->session), s);
    }
    w->waits = true;
    count(&q->waiting, true, w->bytes);
    count(&line->waiting, true, w->bytes);
    count(&s->waiting, true, w->bytes);
    return KVD_OK;
}

void kvd_queue_forget(struct kvd_daemon *d, struct kvd_waiter *w)
{
    struct kvd_queue *q = d->queue;
    struct line *line = &q->lines[w->ns];
    struct charged *s;
    if (w->in_flight)
        line->in_flight--;
    w->in_flight = false;
    if (!w->waits)
        return;
    w->waits = false;
    if (w->in_line)
        DL_DELETE(line->first, w);
    w->in_line = false;
    HASH_FIND(hh, q->sessions, &w->session, sizeof(w->session), s);
    count(&q->waiting, false, w->bytes);
    count(&line->waiting, false, w->bytes);
    count(&s->waiting, false, w->bytes);
    if (s->waiting.calls)
        return;
    HASH_DEL(q->sessions, s);
    free(s);
}

void kvd_queue_kick(struct kvd_daemon *d, uint32_t ns)
{
    struct line *line = &d->queue->lines[ns];
    while (line->first && line->in_flight < MAX_IN_FLIGHT && d->queue->ready(d, line->first)) {
        struct kvd_waiter *w = line->first;
        kvd_queue_forget(d, w);
        w->in_flight = true;
        line->in_flight++;
        d->queue->start(d, w);
    }
}

void kvd_queue_push(struct kvd_daemon *d, struct kvd_waiter *w)
{
    struct line *line = &d->queue->lines[w->ns];
    DL_APPEND(line->first, w);
    w->in_line = true;
    kvd_queue_kick(d, w->ns);
}

int kvd_queue_init(struct kvd_daemon *d, bool (*ready)(struct kvd_daemon *d, struct kvd_waiter *w),
                   void (*start)(struct kvd_daemon *d, struct kvd_waiter *w), struct kvd_error *err)
{
    d->queue = calloc(1, sizeof(*d->queue));
    if (!d->queue)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->queue->ready = ready;
    d->queue->start = start;
    return KVD_OK;
}

void kvd_queue_deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->queue));
}
