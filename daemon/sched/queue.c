#include "daemon/sched/queue.h"

#include <uthash.h>
#include <utlist.h>

// Handed to the executor at once; and lines that are looked at for the next, so that a look takes
// no longer however many there are.
enum { SESSION_IN_FLIGHT = 8, NAMESPACE_IN_FLIGHT = 64, LOOKS = 64 };

// A session's. It is there from its first call until its end.
struct kvd_line {
    uint64_t session;
    struct kvd_waiter *first;
    struct kvd_waiting waiting;
    uint32_t in_flight, users; // users: waiters that are not forgotten
    bool ended;                // its session
    struct kvd_fair_flow flow;
    struct kvd_line *prev, *next; // among those of its namespace in which somebody waits
    UT_hash_handle hh;
};

struct space {
    struct kvd_line *lines; // by the age of their first
    uint32_t in_flight;
    struct kvd_waiting waiting;
};

struct kvd_queue {
    struct space spaces[KVD_MAX_NAMESPACES];
    struct kvd_line *lines; // by session
    struct kvd_waiting waiting;
    uint64_t order, look;
    kvd_queue_ready *ready;
    kvd_queue_start *start;
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

static struct kvd_line *find_line(struct kvd_queue *q, uint64_t session)
{
    struct kvd_line *line;
    HASH_FIND(hh, q->lines, &session, sizeof(session), line);
    return line;
}

static void drop_line(struct kvd_queue *q, struct kvd_line *line)
{
    if (!line->ended || line->users)
        return;
    HASH_DEL(q->lines, line);
    free(line);
}

int kvd_queue_admit(struct kvd_daemon *d, struct kvd_waiter *w, struct kvd_error *err)
{
    struct kvd_queue *q = d->queue;
    struct space *space = &q->spaces[w->ns];
    struct kvd_waiting most = {d->config.max_queue, KVD_MAX_WAITING_BYTES}, none = {0};
    // A namespace ends up with at most three quarters of all, and shares those among its sessions.
    struct kvd_waiting part = {KVD_MAX(most.calls / 4 * 3, 1u), most.bytes / 4 * 3};
    struct kvd_line *line = find_line(q, w->session);
    const char *why;
    struct kvd_waiting own = line ? line->waiting : none;
    if (!kvd_waiting_fits(space->waiting, q->waiting, most, w->bytes, &why))
        return refuse("namespace", w->ns, space->waiting, q->waiting, why, err);
    if (!kvd_waiting_fits(own, space->waiting, part, w->bytes, &why))
        return refuse("session", w->session, own, space->waiting, why, err);
    if (!line) {
        line = calloc(1, sizeof(*line));
        if (!line)
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        line->session = w->session;
        HASH_ADD(hh, q->lines, session, sizeof(line->session), line);
    }
    w->line = line;
    w->waits = true;
    line->users++;
    count(&q->waiting, true, w->bytes);
    count(&space->waiting, true, w->bytes);
    count(&line->waiting, true, w->bytes);
    return KVD_OK;
}

// Puts a line where it belongs among its namespace's: by the age of its first.
static void place(struct space *space, struct kvd_line *line)
{
    struct kvd_line *at = space->lines;
    if (!line->first)
        return;
    while (at && at->first->order < line->first->order)
        at = at->next;
    if (at)
        DL_PREPEND_ELEM(space->lines, at, line);
    else
        DL_APPEND(space->lines, line);
}

static void leave_line(struct space *space, struct kvd_waiter *w)
{
    struct kvd_line *line = w->line;
    bool was_first = line->first == w;
    if (was_first)
        DL_DELETE(space->lines, line);
    DL_DELETE(line->first, w);
    w->in_line = false;
    if (was_first)
        place(space, line);
}

// It waits no longer.
static void wait_no_more(struct kvd_queue *q, struct kvd_waiter *w)
{
    struct space *space = &q->spaces[w->ns];
    if (!w->waits)
        return;
    w->waits = false;
    if (w->in_line)
        leave_line(space, w);
    count(&q->waiting, false, w->bytes);
    count(&space->waiting, false, w->bytes);
    count(&w->line->waiting, false, w->bytes);
}

void kvd_queue_forget(struct kvd_daemon *d, struct kvd_waiter *w)
{
    struct kvd_queue *q = d->queue;
    if (!w->line)
        return;
    wait_no_more(q, w);
    if (w->in_flight) {
        q->spaces[w->ns].in_flight--;
        w->line->in_flight--;
    }
    w->in_flight = false;
    w->line->users--;
    drop_line(q, KVD_TAKE(w->line));
}

// The line whose first starts next; NULL: none can.
static struct kvd_line *choose(struct kvd_daemon *d, const struct space *space)
{
    struct kvd_queue *q = d->queue;
    struct kvd_line *best = NULL, *line;
    uint32_t looks = 0;
    q->look++;
    DL_FOREACH(space->lines, line)
    {
        if (looks++ == LOOKS || (best && !best->in_flight))
            break;
        if (line->in_flight < SESSION_IN_FLIGHT && q->ready(d, line->first, q->look) &&
            (!best || line->in_flight < best->in_flight))
            best = line;
    }
    return best;
}

void kvd_queue_kick(struct kvd_daemon *d, uint32_t ns)
{
    struct space *space = &d->queue->spaces[ns];
    struct kvd_line *line;
    while (space->in_flight < NAMESPACE_IN_FLIGHT && (line = choose(d, space))) {
        struct kvd_waiter *w = line->first;
        wait_no_more(d->queue, w);
        w->in_flight = true;
        line->in_flight++;
        space->in_flight++;
        d->queue->start(d, w);
    }
}

void kvd_queue_push(struct kvd_daemon *d, struct kvd_waiter *w)
{
    struct space *space = &d->queue->spaces[w->ns];
    bool empty = !w->line->first;
    w->order = ++d->queue->order;
    DL_APPEND(w->line->first, w);
    w->in_line = true;
    if (empty)
        DL_APPEND(space->lines, w->line);
    kvd_queue_kick(d, w->ns);
}

struct kvd_fair_flow *kvd_queue_flow(const struct kvd_waiter *w)
{
    return &w->line->flow;
}

void kvd_queue_session_ends(struct kvd_daemon *d, uint64_t session)
{
    struct kvd_line *line = find_line(d->queue, session);
    if (!line)
        return;
    line->ended = true;
    drop_line(d->queue, line);
}

int kvd_queue_init(struct kvd_daemon *d, kvd_queue_ready *ready, kvd_queue_start *start,
                   struct kvd_error *err)
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
    struct kvd_line *line, *next;
    if (!d->queue)
        return;
    HASH_ITER(hh, d->queue->lines, line, next)
    {
        HASH_DEL(d->queue->lines, line);
        free(line);
    }
    free(KVD_TAKE(d->queue));
}
