// KvCache.Watch, WatchNamespace.
#include "daemon/service/events.h"

#include <time.h>
#include <utlist.h>

#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/session/replay.h"
#include "kvd.pb-c.h"

enum {
    MOST_EVENTS = 4096,     // of a namespace
    MOST_BYTES = 16 << 20,  // of all
    SENT_AHEAD = 8,         // messages that a watcher has in its line
    HEADER_BYTES = 2 << 10, // an event without keys is smaller
};

struct event {
    uint64_t number;
    size_t bytes;
    struct event *prev, *next;
    uint8_t packed[];
};

struct watcher {
    struct kvd_call *call;
    struct kvd_session *session; // NULL: an operator's
    uint32_t ns;
    const struct event *at; // the next one for it; NULL: it has seen all
    uint64_t from;          // the event that it has seen last when it came
    bool opened;            // it has been told so
    uint64_t lost;          // events that left the log before they were sent
    bool unknown_lost;      // and others, nobody knows how many
    struct watcher *prev, *next;
};

// Of a namespace, by its slot, which may be another's by now.
struct log {
    char name[KVD_MAX_NAMESPACE + 1];
    bool watched; // since it began, so that it has events
    uint64_t begin, last;
    uint32_t n;
    size_t bytes;
    struct event *events;
    struct watcher *watchers;
};

struct kvd_events {
    size_t bytes;
    struct log logs[KVD_MAX_NAMESPACES];
};

// -- the log ------------------------------------------------------------------------------------

static void drop_oldest(struct kvd_events *all, struct log *l)
{
    struct event *e = l->events;
    struct watcher *w;
    DL_DELETE(l->events, e);
    DL_FOREACH(l->watchers, w)
    {
        if (w->at != e)
            continue;
        w->at = l->events;
        w->lost++;
    }
    l->n--;
    l->bytes -= e->bytes;
    all->bytes -= e->bytes;
    free(e);
}

static void clear_log(struct kvd_events *all, struct log *l)
{
    while (l->events)
        drop_oldest(all, l);
}

// Numbers of a log never come again, also after a restart of kvd: they begin with the time.
static uint64_t first_number(const struct log *l)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t us = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
    return KVD_MAX(us, l->last);
}

static struct log *log_of(struct kvd_daemon *d, uint32_t ns)
{
    struct log *l = &d->events->logs[ns];
    struct kvd_pool_namespace_info info;
    kvd_pool_namespace_info(d->pool, ns, &info);
    if (strcmp(l->name, info.name)) {
        clear_log(d->events, l);
        l->begin = l->last = first_number(l);
        l->watched = false;
        snprintf(l->name, sizeof(l->name), "%s", info.name);
    }
    return l;
}

// Makes room in the logs: of one namespace, and of all, where that goes that has most.
static void bound(struct kvd_events *all, struct log *l)
{
    if (l->n > MOST_EVENTS)
        drop_oldest(all, l);
    while (all->bytes > MOST_BYTES) {
        struct log *most = l;
        for (uint32_t i = 0; i < KVD_MAX_NAMESPACES; i++)
            if (all->logs[i].bytes > most->bytes)
                most = &all->logs[i];
        drop_oldest(all, most);
    }
}

// -- watchers -----------------------------------------------------------------------------------

static bool send_lost(struct watcher *w)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    uint8_t packed[HEADER_BYTES];
    e.kind = KVD__V1__EVENT__KIND__LOST;
    e.count = w->unknown_lost ? 0 : w->lost;
    e.number = w->at ? w->at->number - 1 : w->call->d->events->logs[w->ns].last;
    if (!kvd_call_send_packed(w->call, packed, kvd__v1__event__pack(&e, packed)))
        return false;
    w->call->d->metrics.events_lost += w->lost;
    w->lost = 0;
    w->unknown_lost = false;
    return true;
}

static bool send_opened(struct watcher *w)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    uint8_t packed[HEADER_BYTES];
    e.number = w->from;
    if (!kvd_call_send_packed(w->call, packed, kvd__v1__event__pack(&e, packed)))
        return false;
    w->opened = true;
    e.kind = KVD__V1__EVENT__KIND__DRAINING;
    if (w->call->d->state == KVD_DRAINING)
        kvd_call_send_packed(w->call, packed, kvd__v1__event__pack(&e, packed));
    return true;
}

// Sends what follows, as far as the watcher keeps up. What finds no room waits until something has
// been sent, or the next event comes.
static void pump(struct watcher *w)
{
    if (!w->opened && !send_opened(w))
        return;
    while (w->call->out_count < SENT_AHEAD && (w->at || w->lost || w->unknown_lost)) {
        if ((w->lost || w->unknown_lost) && !send_lost(w))
            return;
        if (!w->at)
            return;
        if (!kvd_call_send_packed(w->call, w->at->packed, w->at->bytes))
            return;
        w->at = w->at->next;
    }
}

static void on_room(struct kvd_call *call)
{
    if (call->work)
        pump(call->work);
}

static void record(struct kvd_daemon *d, uint32_t ns, Kvd__V1__Event *e)
{
    struct log *l = log_of(d, ns);
    struct watcher *w;
    e->number = ++l->last;
    size_t bytes = l->watched ? kvd__v1__event__get_packed_size(e) : 0;
    struct event *made = bytes ? malloc(sizeof(*made) + bytes) : NULL;
    if (!made) {
        DL_FOREACH(l->watchers, w)
        w->lost++;
        return;
    }
    *made = (struct event){.number = e->number, .bytes = bytes};
    kvd__v1__event__pack(e, made->packed);
    DL_APPEND(l->events, made);
    l->n++;
    l->bytes += bytes;
    d->events->bytes += bytes;
    DL_FOREACH(l->watchers, w)
    w->at = w->at ? w->at : made;
    bound(d->events, l);
    DL_FOREACH(l->watchers, w)
    pump(w);
}

static void leave(struct watcher *w)
{
    struct kvd_daemon *d = w->call->d;
    DL_DELETE(d->events->logs[w->ns].watchers, w);
    w->call->work = NULL;
    if (!w->session)
        kvd_pool_namespace_release(d->pool, w->ns);
    free(w);
}

static void on_closed(struct kvd_call *call)
{
    if (call->work)
        leave(call->work);
}

// Where one goes on that has seen the event number `after`.
static void find_place(const struct log *l, struct watcher *w, uint64_t after)
{
    const struct event *e = l->events;
    if (after < l->begin || after > l->last) {
        w->unknown_lost = true; // of another life of the namespace or of kvd
        return;
    }
    while (e && e->number <= after)
        e = e->next;
    w->at = e;
    w->lost = (e ? e->number - 1 : l->last) - after;
}

static void begin(struct kvd_call *call, struct kvd_session *s, uint32_t ns, uint64_t after)
{
    struct kvd_daemon *d = call->d;
    struct log *l = log_of(d, ns);
    struct watcher *w = calloc(1, sizeof(*w));
    if (!w) {
        if (!s)
            kvd_pool_namespace_release(d->pool, ns);
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    *w = (struct watcher){.call = call, .session = s, .ns = ns};
    l->watched = true;
    DL_APPEND(l->watchers, w);
    call->work = w;
    call->on_closed = on_closed;
    call->on_room = on_room;
    if (after)
        find_place(l, w, after);
    w->from = after && !w->unknown_lost ? after : l->last;
    pump(w);
}

void kvd_on_watch(struct kvd_call *call, const void *request)
{
    const Kvd__V1__WatchRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    if (s)
        begin(call, s, s->ns, req->after);
}

void kvd_on_watch_namespace(struct kvd_call *call, const void *request)
{
    const Kvd__V1__WatchNamespaceRequest *req = request;
    struct kvd_pool *pool = call->d->pool;
    struct kvd_error err = {0};
    uint32_t ns;
    if (!req->namespace_name[0] ||
        kvd_pool_namespace_find(pool, req->namespace_name) == KVD_POOL_NONE)
        kvd_call_fail(call, KVD_E_NOT_FOUND, "there is no namespace '%.64s'", req->namespace_name);
    else if (kvd_pool_namespace(pool, req->namespace_name, &ns, &err))
        kvd_call_fail_error(call, &err);
    else
        begin(call, NULL, ns, req->after);
}

// -- what happens -------------------------------------------------------------------------------

void kvd_event_send(struct kvd_daemon *d, uint32_t ns, int kind, uint64_t seq, const char *name)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    if (!d->events)
        return; // kvd stops
    e.kind = (Kvd__V1__Event__Kind)kind;
    e.sequence = seq;
    e.name = (char *)name;
    if (ns != KVD_POOL_NONE)
        record(d, ns, &e);
    for (uint32_t i = 0; ns == KVD_POOL_NONE && i < KVD_MAX_NAMESPACES; i++)
        if (d->events->logs[i].watchers)
            record(d, i, &e);
}

void kvd_event_blocks(struct kvd_daemon *d, uint32_t ns, const struct kvd_event_of_blocks *from)
{
    Kvd__V1__Event e = KVD__V1__EVENT__INIT;
    if (!d->events)
        return;
    e.kind = (Kvd__V1__Event__Kind)from->kind;
    e.keys = (ProtobufCBinaryData){from->n * sizeof(*from->keys), (uint8_t *)from->keys};
    if (from->parent)
        e.parent = (ProtobufCBinaryData){sizeof(*from->parent), (uint8_t *)from->parent};
    e.tokens = from->n ? KVD_PAGE_TOKENS : 0;
    e.miss = (Kvd__V1__MissReason)from->miss;
    if (from->tier)
        e.tier = (char *)from->tier;
    if (ns != KVD_POOL_NONE)
        record(d, ns, &e);
    for (uint32_t i = 0; ns == KVD_POOL_NONE && i < KVD_MAX_NAMESPACES; i++)
        if (d->events->logs[i].watchers)
            record(d, i, &e);
}

static void blocks_stored(struct kvd_daemon *d, uint32_t ns, const struct kvd_prefix_key *keys,
                          uint32_t n, const struct kvd_prefix_key *parent)
{
    const struct kvd_event_of_blocks e = {
        .kind = KVD__V1__EVENT__KIND__BLOCKS_STORED, .keys = keys, .n = n, .parent = parent};
    kvd_event_blocks(d, ns, &e);
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
    struct watcher *w, *tmp;
    DL_FOREACH_SAFE(d->events->logs[s->ns].watchers, w, tmp)
    {
        struct kvd_call *c = w->call;
        if (w->session != s)
            continue;
        leave(w);
        kvd_call_finish(c, KVD_OK, "the session ended");
    }
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->events = calloc(1, sizeof(*d->events));
    return d->events ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

// Sessions have ended, and their watchers with them.
static void stop(struct kvd_daemon *d)
{
    for (uint32_t i = 0; i < KVD_MAX_NAMESPACES; i++)
        while (d->events->logs[i].watchers) {
            struct kvd_call *c = d->events->logs[i].watchers->call;
            leave(c->work);
            kvd_call_finish(c, KVD_E_UNAVAILABLE, "kvd stops");
        }
}

static void deinit(struct kvd_daemon *d)
{
    for (uint32_t i = 0; d->events && i < KVD_MAX_NAMESPACES; i++)
        clear_log(d->events, &d->events->logs[i]);
    free(KVD_TAKE(d->events));
}

const struct kvd_part kvd_part_events = {.init = init,
                                         .stop = stop,
                                         .deinit = deinit,
                                         .draining = draining,
                                         .evicted = evicted,
                                         .blocks_stored = blocks_stored,
                                         .session_ends = session_ends};
