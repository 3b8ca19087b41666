// KvCache.Watch: a stream of events to each watcher of a session.
#include "daemon/service/events.h"

#include <utlist.h>

#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/session/replay.h"
#include "kvd.pb-c.h"

static void send_message(struct kvd_call *c, const Kvd__V1__Event *event)
{
    Kvd__V1__Event lost = KVD__V1__EVENT__INIT;
    if (c->lost && c->out_count < KVD_EVENT_SLOTS / 2) {
        lost.kind = KVD__V1__EVENT__KIND__LOST;
        lost.count = c->lost;
        c->lost = 0;
        kvd_call_send(c, &lost);
    }
    kvd_call_send(c, event);
}

static void send_event(struct kvd_call *c, int kind, uint64_t seq, const char *name)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    e.kind = (Kvd__V1__Event__Kind)kind;
    e.sequence = seq;
    e.name = (char *)name;
    send_message(c, &e);
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

static void send_to_all(struct kvd_daemon *d, uint32_t ns, const Kvd__V1__Event *e)
{
    struct kvd_session *s, *next;
    HASH_ITER(hh, d->sessions, s, next)
    {
        if (ns != KVD_POOL_NONE && s->ns != ns)
            continue;
        for (struct kvd_call *c = s->watchers; c; c = c->next_watch)
            send_message(c, e);
    }
}

void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    e.kind = (Kvd__V1__Event__Kind)kind;
    e.sequence = seq;
    e.name = (char *)name;
    send_to_all(d, ns, &e);
}

void kvd_event_blocks(struct kvd_daemon *d, uint32_t ns, int kind,
                      const struct kvd_prefix_key *keys, uint32_t n,
                      const struct kvd_prefix_key *parent, int miss)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    e.kind = (Kvd__V1__Event__Kind)kind;
    e.keys = (ProtobufCBinaryData){n * sizeof(*keys), (uint8_t *)keys};
    if (parent)
        e.parent = (ProtobufCBinaryData){sizeof(*parent), (uint8_t *)parent};
    e.tokens = KVD_PAGE_TOKENS;
    e.miss = (Kvd__V1__MissReason)miss;
    send_to_all(d, ns, &e);
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
