// Sessions: what a worker holds, and the end of it.
#include "daemon/session/session.h"

#include "daemon/core/keep.h"
#include "daemon/core/lifecycle.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/ledger.h"
#include "daemon/session/release.h"
#include "daemon/session/tenants.h"

// -- names --------------------------------------------------------------------------------------

void kvd_session_name(const struct kvd_session *s, char out[KVD_SESSION_TEXT])
{
    snprintf(out, KVD_SESSION_TEXT, "%" PRIu64 ".%" PRIu64 ".%s", s->id, s->generation, s->secret);
}

// The session of a name, of whatever generation, whose secret is right.
static struct kvd_session *by_name(struct kvd_daemon *d, const char *name, uint64_t *generation)
{
    struct kvd_session *s = NULL;
    char *end, *secret;
    uint64_t id = strtoull(name, &end, 10);
    if (*end != '.')
        return NULL;
    *generation = strtoull(end + 1, &secret, 10);
    if (*secret != '.')
        return NULL;
    HASH_FIND(hh, d->sessions, &id, sizeof(id), s);
    return s && kvd_secret_same(s->secret, secret + 1) ? s : NULL;
}

static int unknown(struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_UNAUTH,
                    "unknown session: it was closed, its lease ran out, or kvd was restarted; open "
                    "a new one");
}

static int fenced(const struct kvd_session *s, uint64_t generation, struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_UNAUTH,
                    "session %" PRIu64 " was resumed elsewhere: that is its generation %" PRIu64
                    ", this is %" PRIu64 ", which may not use it any more; open a new one",
                    s->id, s->generation, generation);
}

struct kvd_session *kvd_session_named(struct kvd_daemon *d, const char *name, struct kvd_error *err)
{
    uint64_t generation;
    struct kvd_session *s = by_name(d, name, &generation);
    int rc = KVD_OK;
    if (!s)
        rc = unknown(err);
    else if (s->generation != generation)
        rc = fenced(s, generation, err);
    else if (s->parked)
        rc = kvd_fail(err, KVD_E_UNAUTH,
                      "session %" PRIu64 " is of a kvd before this one; OpenSession's resume goes "
                      "on with it",
                      s->id);
    if (rc)
        return NULL;
    s->used_ms = kvd_now_ms(d);
    s->calls++;
    return s;
}

struct kvd_session *kvd_session_find(struct kvd_daemon *d, const char *name)
{
    struct kvd_error ignored = {0};
    return kvd_session_named(d, name, &ignored);
}

// -- opening ------------------------------------------------------------------------------------

// Whether a user and a namespace may have one session more; the user is charged.
static int admit(struct kvd_daemon *d, uint32_t ns, struct kvd_user *user, struct kvd_error *err)
{
    struct kvd_pool_namespace_info info;
    uint32_t in_use = d->n_sessions, most = d->config.max_sessions;
    kvd_pool_namespace_info(d->pool, ns, &info); // this session is among its holders already
    if (in_use >= most || info.holders > most - in_use)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%u of %u sessions are open, %u of them in namespace %s, which may have as "
                        "many as are left; close some or raise max-sessions",
                        in_use, most, info.holders - 1, info.name);
    return kvd_user_take(user, KVD_SHARE_SESSIONS, 1, err);
}

static void tie(struct kvd_daemon *d, struct kvd_session *s, struct kvd_connection *conn)
{
    s->connection = conn;
    s->pid = conn ? kvd_connection_peer(conn).pid : -1;
    s->used_ms = kvd_now_ms(d);
    if (conn)
        kvd_connection_bind(conn, s, kvd_session_end);
}

static void link_session(struct kvd_daemon *d, struct kvd_session *s)
{
    HASH_ADD(hh, d->sessions, id, sizeof(s->id), s);
    d->n_sessions++;
}

int kvd_session_new(struct kvd_daemon *d, const struct kvd_session_options *o,
                    struct kvd_session **out, struct kvd_error *err)
{
    struct kvd_session *s = calloc(1, sizeof(*s));
    struct kvd_user *user = s ? kvd_user_ref(d, o->uid) : NULL;
    int rc = user ? admit(d, o->ns, user, err) : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc) {
        kvd_user_unref(&user);
        free(s);
        return rc;
    }
    struct kvd_ledger_session is = {.id = kvd_ledger_next_id(d->ledger),
                                    .appender = kvd_random64(),
                                    .generation = 1,
                                    .opened_by = o->request,
                                    .uid = o->uid};
    kvd_secret_new(is.secret);
    snprintf(is.ns, sizeof(is.ns), "%s", o->ns_name);
    snprintf(is.client_name, sizeof(is.client_name), "%s", o->client_name);
    *s = (struct kvd_session){.id = is.id,
                              .generation = is.generation,
                              .appender = is.appender,
                              .ns = o->ns,
                              .layout = o->layout,
                              .exact = KVD_POOL_NONE,
                              .ledger = d->ledger,
                              .record = kvd_ledger_add(d->ledger, &is), // max-sessions fit
                              .uid = o->connection ? o->uid : -1,
                              .user = user,
                              .opened_ms = kvd_now_ms(d),
                              .open_request = o->request};
    memcpy(s->secret, is.secret, sizeof(s->secret));
    memcpy(s->client_name, is.client_name, sizeof(s->client_name));
    tie(d, s, o->connection);
    link_session(d, s);
    d->metrics.sessions_opened++;
    *out = s;
    return KVD_OK;
}

// -- resuming -----------------------------------------------------------------------------------

int kvd_session_resumable(struct kvd_daemon *d, const char *name,
                          const struct kvd_session_options *o, struct kvd_session **out,
                          bool *again, struct kvd_error *err)
{
    uint64_t generation;
    struct kvd_session *s = by_name(d, name, &generation);
    if (!s || kvd_user_uid(s->user) != o->uid)
        return kvd_fail(err, KVD_E_UNAUTH,
                        "there is no such session to resume: it was closed, or nobody resumed it "
                        "within resume-time; open a new one");
    *again = generation + 1 == s->generation && o->request && o->request == s->open_request;
    if (generation != s->generation && !*again)
        return fenced(s, generation, err);
    struct kvd_pool_namespace_info ns;
    kvd_pool_namespace_info(d->pool, s->ns, &ns);
    if (strcmp(ns.name, o->ns_name) != 0)
        return kvd_fail(err, KVD_E_PRECONDITION, "session %" PRIu64 " is of namespace %s, not %s",
                        s->id, ns.name, o->ns_name);
    *out = s;
    return KVD_OK;
}

// Gives up what belongs to a session's connection.
static void untie(struct kvd_daemon *d, struct kvd_session *s)
{
    struct kvd_connection *conn = KVD_TAKE(s->connection);
    struct kvd_buffer *b, *next;
    kvd_parts_session_ends(d, s);
    HASH_ITER(hh, s->buffers, b, next)
    kvd_session_drop_buffer(s, b);
    free(KVD_TAKE(s->extents));
    free(KVD_TAKE(s->sinks));
    s->rotations_sent = 0;
    if (!conn)
        return;
    kvd_connection_bind(conn, NULL, NULL);
    kvd_connection_close(conn);
}

int kvd_session_resume(struct kvd_daemon *d, struct kvd_session *s,
                       const struct kvd_session_options *o, bool again, struct kvd_error *err)
{
    if (s->layout != KVD_POOL_NONE && s->layout != o->layout)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "session %" PRIu64 " has another layout (codec, rotation set, windows or "
                        "shape)",
                        s->id);
    untie(d, s);
    if (!again) {
        kvd_ledger_resumed(s->ledger, s->record, o->request);
        s->generation++;
        s->open_request = o->request;
    }
    // It has its own hold on the namespace, and on the layout if it knew one.
    kvd_namespace_close(d, o->ns);
    if (s->layout != KVD_POOL_NONE)
        kvd_pool_layout_unref(d->pool, o->layout);
    s->layout = o->layout;
    s->parked = false;
    s->uid = o->connection ? o->uid : -1;
    tie(d, s, o->connection);
    d->metrics.sessions_resumed++;
    return KVD_OK;
}

// -- the end ------------------------------------------------------------------------------------

// The next kvd is to find it as it is.
static bool stays(const struct kvd_daemon *d)
{
    return d->state == KVD_STOPPING && kvd_keep_on(d) && d->config.resume_ms;
}

static void free_held(struct kvd_session *s)
{
    struct kvd_held *h, *next;
    HASH_ITER(hh, s->held, h, next)
    {
        HASH_DEL(s->held, h);
        free(h);
    }
}

void kvd_session_end(struct kvd_daemon *d, struct kvd_session *s, const char *why)
{
    kvd_info("session ended id=%" PRIu64 " client=%s pid=%" PRId64
             " why=\"%s\" sequences=%u calls=%" PRIu64,
             s->id, s->client_name, s->pid, why, HASH_COUNT(s->held), s->calls);
    kvd_user_give(s->user, KVD_SHARE_SEQUENCES, HASH_COUNT(s->held));
    untie(d, s);
    if (stays(d)) {
        free_held(s);
    } else {
        kvd_ledger_drop(s->ledger, s->record);
        kvd_release_held(d, KVD_TAKE(s->held));
    }
    if (s->layout != KVD_POOL_NONE)
        kvd_pool_layout_unref(d->pool, s->layout);
    if (s->exact != KVD_POOL_NONE)
        kvd_pool_layout_unref(d->pool, s->exact);
    kvd_namespace_close(d, s->ns);
    kvd_user_give(s->user, KVD_SHARE_SESSIONS, 1);
    kvd_user_unref(&s->user);
    HASH_DEL(d->sessions, s);
    d->n_sessions--;
    free(s);
    d->metrics.sessions_ended++;
    kvd_daemon_session_ended(d);
}

void kvd_session_beyond(struct kvd_daemon *d, uint64_t id, uint64_t seq, uint64_t length)
{
    struct kvd_session *s = NULL;
    HASH_FIND(hh, d->sessions, &id, sizeof(id), s);
    if (!s || s->beyond)
        return;
    s->beyond = true;
    kvd_warning("beyond the fit session=%" PRIu64 " sequence=%" PRIu64 " length=%" PRIu64
                ": its rotation set was fitted to positions below %" PRIu64
                ", and keys behind may be lost: fit one to longer contexts (kvd.record --reach)",
                id, seq, length, s->fitted_length);
}

// What a kvd before this one had of it is given up.
static void lost(struct kvd_daemon *d, uint64_t id, uint32_t sequences, const char *why)
{
    d->metrics.sessions_lost++;
    d->metrics.sequences_lost += sequences;
    kvd_warning("session lost id=%" PRIu64 " sequences=%u why=\"%s\"", id, sequences, why);
}

enum { LEASE_LOOK_MS = 1000 };

// Whether kvd itself had no turn for so long, as on a machine that was stopped: the calls that
// renew leases lie in sockets then, and are read before the next look.
static bool was_away(struct kvd_daemon *d)
{
    uint64_t due = d->lease_look_ms, now = kvd_now_ms(d);
    d->lease_look_ms = now + LEASE_LOOK_MS;
    return now > due + LEASE_LOOK_MS;
}

static void on_lease_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_session *s, *next;
    bool leased = false;
    if (was_away(d))
        return;
    HASH_ITER(hh, d->sessions, s, next)
    {
        if (s->connection)
            continue;
        if (kvd_now_ms(d) - s->used_ms < s->lease_ms) {
            leased = true;
            continue;
        }
        if (s->parked)
            lost(d, s->id, HASH_COUNT(s->held), "not resumed within resume-time");
        else
            d->metrics.leases_expired++;
        kvd_session_end(d, s, s->parked ? "nobody resumed it" : "its lease ran out");
    }
    if (!leased)
        uv_timer_stop(timer);
}

void kvd_session_lease(struct kvd_daemon *d, struct kvd_session *s, uint32_t lease_ms)
{
    s->lease_ms = lease_ms;
    d->lease_timer.data = d;
    if (uv_is_active((uv_handle_t *)&d->lease_timer))
        return;
    d->lease_look_ms = kvd_now_ms(d) + LEASE_LOOK_MS;
    uv_timer_start(&d->lease_timer, on_lease_timer, LEASE_LOOK_MS, LEASE_LOOK_MS);
}

// -- what it holds ------------------------------------------------------------------------------

static struct kvd_held *find_held(const struct kvd_session *s, uint64_t seq)
{
    struct kvd_held *h;
    HASH_FIND(hh, s->held, &seq, sizeof(seq), h);
    return h;
}

uint32_t kvd_session_holds(const struct kvd_session *s, uint64_t seq)
{
    const struct kvd_held *h = find_held(s, seq);
    return h ? h->holds : 0;
}

static int add_record(struct kvd_session *s, uint64_t seq, uint32_t holds, struct kvd_held **out,
                      struct kvd_error *err)
{
    int rc = kvd_user_take(s->user, KVD_SHARE_SEQUENCES, 1, err);
    if (rc)
        return rc;
    struct kvd_held *h = calloc(1, sizeof(*h));
    if (!h) {
        kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    *h = (struct kvd_held){.seq = seq, .holds = holds, .record = KVD_LEDGER_NONE};
    HASH_ADD(hh, s->held, seq, sizeof(h->seq), h);
    *out = h;
    return KVD_OK;
}

static void drop_record(struct kvd_session *s, struct kvd_held *h)
{
    HASH_DEL(s->held, h);
    free(h);
    kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
}

int kvd_session_add_held(struct kvd_session *s, uint64_t seq, bool *first, struct kvd_error *err)
{
    struct kvd_held *h = find_held(s, seq);
    if (!h && HASH_COUNT(s->held) >= KVD_MAX_HELD)
        return kvd_fail(err, KVD_E_LIMIT, "a session holds at most %d sequences; free some",
                        KVD_MAX_HELD);
    *first = !h;
    int rc = h ? KVD_OK : add_record(s, seq, 0, &h, err);
    if (rc)
        return rc;
    uint32_t record = kvd_ledger_hold(s->ledger, s->record, h->record, seq);
    if (record == KVD_LEDGER_NONE) {
        uint32_t holds = h->holds;
        if (*first)
            drop_record(s, h);
        return kvd_fail(err, KVD_E_LIMIT,
                        "the session holds sequence %" PRIu64 " %u times, or all sessions hold as "
                        "many sequences as there may be; free some",
                        seq, holds);
    }
    h->record = record;
    h->holds++;
    return KVD_OK;
}

bool kvd_session_drop_holds(struct kvd_session *s, uint64_t seq, uint32_t n, uint64_t request)
{
    struct kvd_held *h = find_held(s, seq);
    if (!h || kvd_ledger_released_by(s->ledger, h->record, request))
        return false;
    n = KVD_MIN(n, h->holds);
    kvd_ledger_release(s->ledger, h->record, n, request);
    h->holds -= n;
    if (h->holds)
        return false;
    drop_record(s, h);
    return true;
}

void kvd_session_drops_anew(struct kvd_session *s, uint64_t seq, uint64_t request)
{
    const struct kvd_held *h = find_held(s, seq);
    if (h && kvd_ledger_released_by(s->ledger, h->record, request))
        kvd_ledger_release(s->ledger, h->record, 0, 0);
}

bool kvd_session_drop_held(struct kvd_session *s, uint64_t seq)
{
    return kvd_session_drop_holds(s, seq, 1, 0);
}

// -- after a restart ----------------------------------------------------------------------------

// A session as its kvd has left it, but for what it holds. NULL: it cannot be.
static struct kvd_session *restore_one(struct kvd_daemon *d, uint32_t record,
                                       const struct kvd_ledger_session *is)
{
    struct kvd_error err = {0};
    struct kvd_session *s = calloc(1, sizeof(*s));
    struct kvd_user *user = s ? kvd_user_ref(d, is->uid) : NULL;
    uint32_t ns;
    int rc = user ? kvd_user_take(user, KVD_SHARE_SESSIONS, 1, &err)
                  : kvd_fail(&err, KVD_E_INTERNAL, "out of memory");
    if (rc == KVD_OK) {
        rc = kvd_namespace_open(d, is->uid, is->ns, &ns, &err);
        if (rc)
            kvd_user_give(user, KVD_SHARE_SESSIONS, 1);
    }
    if (rc) {
        lost(d, is->id, 0, err.text);
        kvd_ledger_drop(d->ledger, record);
        kvd_user_unref(&user);
        free(s);
        return NULL;
    }
    *s = (struct kvd_session){.id = is->id,
                              .generation = is->generation,
                              .appender = is->appender,
                              .ns = ns,
                              .layout = KVD_POOL_NONE,
                              .exact = KVD_POOL_NONE,
                              .ledger = d->ledger,
                              .record = record,
                              .parked = true,
                              .pid = -1,
                              .uid = -1,
                              .user = user,
                              .lease_ms = d->config.resume_ms,
                              .opened_ms = kvd_now_ms(d),
                              .used_ms = kvd_now_ms(d),
                              .open_request = is->opened_by};
    memcpy(s->secret, is->secret, sizeof(s->secret));
    memcpy(s->client_name, is->client_name, sizeof(s->client_name));
    link_session(d, s);
    return s;
}

// One hold of a session that is back; without one nobody has it.
static void restore_hold(struct kvd_daemon *d, struct kvd_session *s, uint32_t record)
{
    uint32_t of;
    uint64_t seq;
    uint32_t holds = kvd_ledger_held(d->ledger, record, &of, &seq);
    struct kvd_error err = {0};
    struct kvd_pool_seq_info info;
    struct kvd_held *h;
    bool there = kvd_pool_seq_info(d->pool, seq, &info) == KVD_OK;
    if (there && s && add_record(s, seq, holds, &h, &err) == KVD_OK) {
        h->record = record;
        if (s->layout == KVD_POOL_NONE) {
            s->layout = info.layout;
            kvd_pool_layout_ref(d->pool, s->layout);
        }
        return;
    }
    d->metrics.sequences_lost++;
    kvd_warning("sequence lost sequence=%" PRIu64 " session=%" PRIu64 " why=\"%s\"", seq,
                s ? s->id : 0,
                !there ? "the pool has it no more"
                : s    ? err.text
                       : "its session");
    kvd_ledger_forget(d->ledger, record);
    if (there)
        kvd_pool_seq_release(d->pool, seq);
}

static int restore(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_ledger *l = d->ledger;
    uint32_t n = kvd_ledger_sessions(l);
    struct kvd_session **by_record KVD_FREE = calloc((size_t)n + 1, sizeof(struct kvd_session *));
    if (!by_record)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < n; i++) {
        const struct kvd_ledger_session *is = kvd_ledger_session(l, i);
        by_record[i] = is ? restore_one(d, i, is) : NULL;
    }
    for (uint32_t i = 0; i < kvd_ledger_holds(l); i++) {
        uint32_t record;
        uint64_t seq;
        if (kvd_ledger_held(l, i, &record, &seq))
            restore_hold(d, by_record[record], i);
    }
    for (struct kvd_session *s = d->sessions; s; s = s->hh.next) {
        d->metrics.sequences_kept += HASH_COUNT(s->held);
        d->metrics.sessions_kept++;
        kvd_session_lease(d, s, d->config.resume_ms);
    }
    if (d->n_sessions)
        kvd_notice("sessions wait to be resumed sessions=%u sequences=%" PRIu64
                   " resume_time_ms=%u",
                   d->n_sessions, d->metrics.sequences_kept, d->config.resume_ms);
    return KVD_OK;
}

static void stop(struct kvd_daemon *d)
{
    struct kvd_session *s, *next;
    HASH_ITER(hh, d->sessions, s, next)
    kvd_session_end(d, s, "kvd stops");
}

uint32_t kvd_sessions_waiting(const struct kvd_daemon *d)
{
    uint32_t n = 0;
    for (const struct kvd_session *s = d->sessions; s; s = s->hh.next)
        n += s->parked;
    return n;
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_metrics *m = &d->metrics;
    kvd_metric(f, "kvd_sessions", "gauge", "Open sessions.", d->n_sessions);
    kvd_metric(f, "kvd_sessions_opened_total", "counter", "Sessions opened.",
               (double)m->sessions_opened);
    kvd_metric(f, "kvd_sessions_ended_total", "counter", "Sessions ended, for whatever reason.",
               (double)m->sessions_ended);
    kvd_metric(f, "kvd_sessions_waiting", "gauge",
               "Sessions of a kvd before this one that wait to be resumed.",
               kvd_sessions_waiting(d));
    kvd_metric(f, "kvd_sessions_resumed_total", "counter",
               "Sessions that went on: on another connection, or after a restart.",
               (double)m->sessions_resumed);
    kvd_metric(f, "kvd_restarts_survived_total", "counter",
               "Ends of kvd that the sessions have outlived.",
               (double)kvd_ledger_restarts(d->ledger));
    kvd_metric_head(f, "kvd_taken_over", "gauge",
                    "What this kvd has taken over of the one before: sessions, and sequences that "
                    "they hold.");
    fprintf(f, "kvd_taken_over{what=\"sessions\"} %" PRIu64 "\n", m->sessions_kept);
    fprintf(f, "kvd_taken_over{what=\"sequences\"} %" PRIu64 "\n", m->sequences_kept);
    kvd_metric_head(f, "kvd_lost_total", "counter",
                    "What of an earlier kvd could not be taken over or was not asked for in time: "
                    "sessions, and sequences that they held. The log says why.");
    fprintf(f, "kvd_lost_total{what=\"sessions\"} %" PRIu64 "\n", m->sessions_lost);
    fprintf(f, "kvd_lost_total{what=\"sequences\"} %" PRIu64 "\n", m->sequences_lost);
    kvd_metric(f, "kvd_leases_expired_total", "counter", "Leased sessions that ran out.",
               (double)m->leases_expired);
}

const struct kvd_part kvd_part_sessions = {.init = restore, .stop = stop, .metrics = metrics};
