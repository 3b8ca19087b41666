// KvCache.Watch: a stream of events to each watcher of a session.
#include "daemon/service/events.h"

#include <utlist.h>

#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/session/replay.h"
#include "kvd.pb-c.h"

static void send_event(struct kvd_call *c, int kind, uint64_t seq, const char *name)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    if (c->lost && c->out_count < KVD_EVENT_SLOTS / 2) {
        e.kind = KVD__V1__EVENT__KIND__LOST;
        e.count = c->lost;
        c->lost = 0;
        kvd_call_send(c, &e);
        kvd__v1__event__init(&e);
    }
    e.kind = (Kvd__V1__Event__Kind)kind;
    e.sequence = seq;
    e.name = (char *)name;
    kvd_call_send(c, &e);
}

static void unlink_watcher(struct kvd_call *c)
{
    if (!c->session)
        return;
    LL_DELETE2(c->session->watchers, c, next_watch);
    c->session = NULL;
}

void kvd_on_watch(struct kvd_call *call, const void *request)
{
    const Kvd__V1__WatchRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    if (!s)
        return;
    call->session = s;
    LL_PREPEND2(s->watchers, call, next_watch);
    call->on_closed = unlink_watcher;
    send_event(call, KVD__V1__EVENT__KIND__OPENED, 0, "");
    if (call->d->state == KVD_DRAINING)
        send_event(call, KVD__V1__EVENT__KIND__DRAINING, 0, "");
}

void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name)
{
    struct kvd_session *s, *next;
    HASH_ITER(hh, d->sessions, s, next)
    {
        if (ns != KVD_POOL_NONE && s->ns != ns)
            continue;
        for (struct kvd_call *c = s->watchers; c; c = c->next_watch)
            send_event(c, kind, seq, name);
    }
}

static void draining(struct kvd_daemon *d)
{
    kvd_event_send(d, KVD_POOL_NONE, KVD__V1__EVENT__KIND__DRAINING, 0, "");
}

static void evicted(struct kvd_daemon *d, uint32_t ns, uint64_t seq, const char *name)
{
    kvd_event_send(d, ns, KVD__V1__EVENT__KIND__EVICTED, seq, name);
}

static void session_ends(struct kvd_daemon *d, struct kvd_session *s)
{
    (void)d;
    while (s->watchers) {
        struct kvd_call *c = s->watchers;
        LL_DELETE2(s->watchers, c, next_watch);
        c->session = NULL;
        kvd_call_finish(c, KVD_OK, "the session ended");
    }
}

const struct kvd_part kvd_part_events = {
    .draining = draining, .evicted = evicted, .session_ends = session_ends};
