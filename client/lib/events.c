// Events of a session: a stream that is opened with the first call, and anew with a new session.
#include "client/lib/client.h"

enum { RECONNECT_MS = 100 }; // what a call whose time is over may take for a new session

// A stream that ended: when its session has too, there is a new one afterwards, or it goes on
// (*again), if the daemon is there for it.
static kvd_result stream_ended(kvd_client *c, int rc, struct kvd_error *e, uint64_t deadline,
                               bool *again, kvd_failure *err)
{
    uint64_t moment = kvd_now_ms() + RECONNECT_MS;
    deadline = KVD_MAX(deadline, moment);
    bool unknown = e->code == KVD_E_UNAUTH;
    e->code = rc;
    kvd_stream_free(&c->events);
    if (kvd_gate_read(&c->gate, deadline, NULL))
        return kvd_client_fail(err, e);
    return kvd_client_leave(c, unknown ? KVD_E_UNAUTH : rc, e, deadline, again, err);
}

static int open_stream(kvd_client *c, uint64_t deadline, struct kvd_error *err)
{
    Kvd__V1__WatchRequest req = KVD__V1__WATCH_REQUEST__INIT;
    int rc = kvd_gate_read(&c->gate, deadline, err);
    if (rc)
        return rc; // a reconnect takes all the time
    if (c->events && c->events_epoch != c->epoch)
        kvd_stream_free(&c->events);
    if (!c->events) {
        req.session = c->session;
        req.after = c->last_number;
        c->events_epoch = c->epoch;
        c->events = kvd_stream_open(c->channel, "/kvd.v1.KvCache/Watch", &req, err);
    }
    kvd_gate_leave(&c->gate);
    return c->events ? KVD_OK : err->code;
}

kvd_result kvd_next_event(kvd_client *c, uint32_t timeout_ms, kvd_event *out, kvd_failure *err)
{
    struct kvd_error e = {0};
    Kvd__V1__Event *event = NULL;
    kvd_event found = {.kind = KVD_EVENT_NONE};
    uint64_t deadline = kvd_now_ms() + timeout_ms;
    KVD_WANT(err, "client", c);
    if (kvd_sized_check(&kvd_sized_event, out, &e) || kvd_fork_check(c, &e))
        return kvd_client_fail(err, &e);
    int rc = KVD_OK;
    for (bool again = true; again;) {
        rc = open_stream(c, deadline, &e);
        if (rc == KVD_OK)
            rc = kvd_stream_next(c->events, &kvd__v1__event__descriptor, kvd_left_ms(deadline),
                                 &event, &e);
        again = false;
        kvd_result ended = rc && rc != KVD_E_TIMEOUT
                               ? stream_ended(c, rc, &e, deadline, &again, err)
                               : KVD_SUCCESS;
        if (ended)
            return ended;
    }
    if (rc == KVD_OK) {
        found.kind = (kvd_event_kind)event->kind;
        found.sequence = event->sequence;
        found.count = event->count;
        snprintf(found.name, sizeof(found.name), "%s", event->name);
        found.keys = event->keys.data;
        found.n_keys = (uint32_t)(event->keys.len / KVD_BLOCK_KEY);
        found.parent = event->parent.len == KVD_BLOCK_KEY ? event->parent.data : NULL;
        found.tokens = event->tokens;
        found.miss = (kvd_miss)event->miss;
        found.number = event->number;
        snprintf(found.tier, sizeof(found.tier), "%s", event->tier);
        c->last_number = event->number;
        kvd__v1__event__free_unpacked(c->last_event, NULL);
        c->last_event = event;
    }
    kvd_sized_give(&kvd_sized_event, &found, out);
    return KVD_SUCCESS;
}
