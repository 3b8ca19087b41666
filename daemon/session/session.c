// Sessions: what a worker holds, and the end of it.
#include "daemon/session/session.h"

#include "daemon/core/lifecycle.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/release.h"
#include "daemon/session/tenants.h"

struct kvd_session *kvd_session_find(struct kvd_daemon *d, const char *secret)
{
    struct kvd_session *s = NULL;
    if (strlen(secret) != KVD_SECRET_TEXT - 1)
        return NULL;
    HASH_FIND_STR(d->sessions, secret, s);
    if (s) {
        s->used_ms = kvd_now_ms(d);
        s->calls++;
    }
    return s;
}

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

int kvd_session_new(struct kvd_daemon *d, uint32_t ns, uint32_t layout, struct kvd_connection *conn,
                    int64_t uid, struct kvd_session **out, struct kvd_error *err)
{
    struct kvd_session *s = calloc(1, sizeof(*s));
    struct kvd_user *user = s ? kvd_user_ref(d, uid) : NULL;
    int rc = user ? admit(d, ns, user, err) : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc) {
        kvd_user_unref(&user);
        free(s);
        return rc;
    }
    s->user = user;
    kvd_secret_new(s->secret);
    s->id = ++d->next_session;
    s->appender = kvd_random64();
    s->ns = ns;
    s->layout = layout;
    s->connection = conn;
    s->pid = s->uid = -1;
    s->opened_ms = s->used_ms = kvd_now_ms(d);
    if (conn) {
        s->pid = kvd_connection_peer(conn).pid;
        s->uid = kvd_connection_peer(conn).uid;
        kvd_connection_bind(conn, s, kvd_session_end);
    }
    HASH_ADD_STR(d->sessions, secret, s);
    d->n_sessions++;
    d->metrics.sessions_opened++;
    *out = s;
    return KVD_OK;
}

void kvd_session_end(struct kvd_daemon *d, struct kvd_session *s, const char *why)
{
    kvd_info("session ended id=%" PRIu64 " client=%s pid=%" PRId64
             " why=\"%s\" sequences=%u calls=%" PRIu64,
             s->id, s->client_name, s->pid, why, HASH_COUNT(s->held), s->calls);
    kvd_parts_session_ends(d, s);
    kvd_user_give(s->user, KVD_SHARE_SEQUENCES, HASH_COUNT(s->held));
    kvd_release_held(d, KVD_TAKE(s->held));
    struct kvd_buffer *b, *b_next;
    HASH_ITER(hh, s->buffers, b, b_next)
    kvd_session_drop_buffer(s, b);
    for (size_t i = 0; i < KVD_LEN(s->replays); i++)
        free(s->replays[i].data);
    free(s->extents);
    free(s->sinks);
    kvd_pool_layout_unref(d->pool, s->layout);
    kvd_namespace_close(d, s->ns);
    kvd_user_give(s->user, KVD_SHARE_SESSIONS, 1);
    kvd_user_unref(&s->user);
    struct kvd_connection *conn = s->connection;
    if (conn)
        kvd_connection_bind(conn, NULL, NULL);
    HASH_DEL(d->sessions, s);
    d->n_sessions--;
    free(s);
    d->metrics.sessions_ended++;
    if (conn)
        kvd_connection_close(conn);
    kvd_daemon_session_ended(d);
}

static void on_lease_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_session *s, *next;
    bool leased = false;
    HASH_ITER(hh, d->sessions, s, next)
    {
        if (s->connection)
            continue;
        if (kvd_now_ms(d) - s->used_ms < s->lease_ms) {
            leased = true;
            continue;
        }
        d->metrics.leases_expired++;
        kvd_session_end(d, s, "its lease ran out");
    }
    if (!leased)
        uv_timer_stop(timer);
}

void kvd_session_lease(struct kvd_daemon *d, struct kvd_session *s, uint32_t lease_ms)
{
    enum { LOOK_MS = 1000 };
    s->lease_ms = lease_ms;
    d->lease_timer.data = d;
    if (!uv_is_active((uv_handle_t *)&d->lease_timer))
        uv_timer_start(&d->lease_timer, on_lease_timer, LOOK_MS, LOOK_MS);
}

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

int kvd_session_add_held(struct kvd_session *s, uint64_t seq, bool *first, struct kvd_error *err)
{
    struct kvd_held *h = find_held(s, seq);
    if (h && h->holds == UINT32_MAX)
        return kvd_fail(err, KVD_E_LIMIT,
                        "the session holds sequence %" PRIu64 " %u times; free some", seq,
                        h->holds);
    if (!h && HASH_COUNT(s->held) >= KVD_MAX_HELD)
        return kvd_fail(err, KVD_E_LIMIT, "a session holds at most %d sequences; free some",
                        KVD_MAX_HELD);
    *first = !h;
    if (!h) {
        int rc = kvd_user_take(s->user, KVD_SHARE_SEQUENCES, 1, err);
        if (rc)
            return rc;
        h = calloc(1, sizeof(*h));
        if (!h) {
            kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        }
        h->seq = seq;
        HASH_ADD(hh, s->held, seq, sizeof(h->seq), h);
    }
    h->holds++;
    return KVD_OK;
}

bool kvd_session_drop_held(struct kvd_session *s, uint64_t seq)
{
    struct kvd_held *h = find_held(s, seq);
    if (!h || --h->holds)
        return false;
    HASH_DEL(s->held, h);
    free(h);
    kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
    return true;
}

static void stop(struct kvd_daemon *d)
{
    struct kvd_session *s, *next;
    HASH_ITER(hh, d->sessions, s, next)
    kvd_session_end(d, s, "kvd stops");
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_metrics *m = &d->metrics;
    kvd_metric(f, "kvd_sessions", "gauge", "Open sessions.", d->n_sessions);
    kvd_metric(f, "kvd_sessions_opened_total", "counter", "Sessions opened.",
               (double)m->sessions_opened);
    kvd_metric(f, "kvd_sessions_ended_total", "counter", "Sessions ended, for whatever reason.",
               (double)m->sessions_ended);
    kvd_metric(f, "kvd_leases_expired_total", "counter", "Leased sessions that ran out.",
               (double)m->leases_expired);
}

const struct kvd_part kvd_part_sessions = {.stop = stop, .metrics = metrics};
