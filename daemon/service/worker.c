// OpenSession, CloseSession, KeepAlive, RegisterBuffer, ReleaseBuffer.
//
// Opening goes: check the request → find or fetch the rotation set (on libuv's thread pool) → load
// it into the backend, once per layout → clear what has to make room → make the session. The worker
// may hang up meanwhile, so the ticket is looked up again at the end.
#include <ctype.h>
#include <math.h>

#include "daemon/core/keep.h"
#include "daemon/core/piecework.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/sched/work.h"
#include "daemon/service/handlers.h"
#include "daemon/service/layout.h"
#include "daemon/service/rotations.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/reclaim.h"
#include "daemon/session/replay.h"
#include "daemon/session/tenants.h"
#include "kvd.pb-c.h"

enum { CLEARINGS = 16 }; // for one session

struct opening {
    struct kvd_clearing clearing; // of what makes room
    struct kvd_call *call;
    const Kvd__V1__OpenSessionRequest *req; // the call's
    struct kvd_layout g, exact;             // exact: with `pages`
    struct kvd_rotset *set;
};

static bool namespace_allowed(struct kvd_call *call, const char *name,
                              const struct kvd_connection *conn)
{
    const struct kvd_config_namespace *ns = kvd_config_namespace_find(&call->d->config, name);
    if (!ns || ns->allow.n_uids + ns->allow.n_gids + ns->allow.n_cns == 0)
        return true;
    if (!conn)
        return kvd_call_peer_named(call, &ns->allow);
    struct kvd_peer peer = kvd_connection_peer(conn);
    for (uint32_t i = 0; i < ns->allow.n_uids; i++)
        if (peer.uid == (int64_t)ns->allow.uids[i])
            return true;
    for (uint32_t i = 0; i < ns->allow.n_gids; i++)
        if (peer.gid == (int64_t)ns->allow.gids[i])
            return true;
    return false;
}

static const char *namespace_of(const Kvd__V1__OpenSessionRequest *req)
{
    return req->namespace_name[0] ? req->namespace_name : "default";
}

// The connection of the request's ticket. KVD_E_UNAUTH if there was one and it is void.
static int find_connection(struct kvd_daemon *d, const Kvd__V1__OpenSessionRequest *req,
                           struct kvd_connection **conn, struct kvd_error *err)
{
    *conn = NULL;
    if (!req->ticket[0])
        return KVD_OK;
    *conn = kvd_fdsock_find(d, req->ticket);
    if (!*conn)
        return kvd_fail(
            err, KVD_E_UNAUTH,
            "the ticket is void: connect to the fd socket again and use its new ticket");
    return KVD_OK;
}

// One for each layer and q head, in the layout's order.
static int check_sinks(const Kvd__V1__OpenSessionRequest *req, const struct kvd_layout *g,
                       struct kvd_error *err)
{
    size_t wanted = 0, at = 0;
    if (!req->n_sinks)
        return KVD_OK;
    for (uint32_t i = 0; i < g->n_layers; i++)
        wanted += g->planes[g->plane_of[i]].q_heads;
    if (wanted > KVD_MAX_SINKS)
        return kvd_fail(err, KVD_E_INVALID,
                        "sinks: the layout has %zu layers x q_heads; with sinks at most %d are "
                        "possible",
                        wanted, KVD_MAX_SINKS);
    if (req->n_sinks != wanted)
        return kvd_fail(err, KVD_E_INVALID,
                        "sinks has %zu numbers; %zu are wanted: one for each q head of each layer",
                        req->n_sinks, wanted);
    for (uint32_t i = 0; i < g->n_layers; i++)
        for (uint32_t head = 0; head < g->planes[g->plane_of[i]].q_heads; head++, at++)
            if (!isfinite(req->sinks[at]) && req->sinks[at] != -INFINITY)
                return kvd_fail(err, KVD_E_INVALID,
                                "sinks: that of layer %u, q head %u is %g; a number is wanted, or "
                                "-inf for none",
                                i, head, (double)req->sinks[at]);
    return KVD_OK;
}

// Whether the backend has kernels for all of them.
static int check_planes(const struct kvd_daemon *d, const struct kvd_layout *g,
                        struct kvd_error *err)
{
    const struct kvd_backend_ops *ops = d->backend->ops;
    for (uint32_t p = 0; p < g->n_planes && ops->plane_check; p++)
        if (ops->plane_check(d->backend, &g->planes[p], err))
            return err->code;
    return KVD_OK;
}

static int check_request(struct kvd_call *call, const Kvd__V1__OpenSessionRequest *req,
                         struct kvd_layout *g, struct kvd_error *err)
{
    struct kvd_connection *conn;
    if (!req->layout)
        return kvd_fail(err, KVD_E_INVALID, "layout is missing");
    if (strlen(req->client_name) > KVD_MAX_CLIENT_NAME)
        return kvd_fail(err, KVD_E_INVALID, "client_name has more than %d characters",
                        KVD_MAX_CLIENT_NAME);
    for (const char *c = req->client_name; *c; c++)
        if (!isprint((unsigned char)*c))
            return kvd_fail(err, KVD_E_INVALID,
                            "client_name has characters that cannot be printed");
    if (req->lease_ms && (req->lease_ms < 1000 || req->lease_ms > 3600000))
        return kvd_fail(err, KVD_E_INVALID, "lease_ms is %u; 1,000 to 3,600,000 are possible",
                        req->lease_ms);
    if (!kvd_name_valid(namespace_of(req), KVD_MAX_NAMESPACE))
        return kvd_fail(err, KVD_E_INVALID,
                        "a namespace's name has 1 to %d printable ASCII characters and no spaces",
                        KVD_MAX_NAMESPACE);
    int rc = find_connection(call->d, req, &conn, err);
    if (rc)
        return rc;
    if (!namespace_allowed(call, namespace_of(req), conn))
        return kvd_fail(err, KVD_E_DENIED,
                        "namespace %s is not open to you; see allow-uid, allow-gid and allow-cn in "
                        "kvd's configuration",
                        namespace_of(req));
    rc = kvd_namespace_listed(call->d, namespace_of(req), err);
    if (rc)
        return rc;
    if (!req->resume[0] && call->d->n_sessions >= call->d->config.max_sessions)
        return kvd_fail(err, KVD_E_LIMIT,
                        "all %u sessions are in use; close some or raise max-sessions",
                        call->d->config.max_sessions);
    rc = kvd_layout_from_proto(req->layout, g, err);
    if (rc == KVD_OK)
        rc = check_planes(call->d, g, err);
    return rc ? rc : check_sinks(req, g, err);
}

static void reply(struct kvd_call *call, const struct kvd_session *s)
{
    struct kvd_daemon *d = call->d;
    const struct kvd_layout *g = kvd_pool_layout_get(d->pool, s->layout);
    struct kvd_proto_layout pg;
    Kvd__V1__OpenSessionReply r = KVD__V1__OPEN_SESSION_REPLY__INIT;
    char name[KVD_SESSION_TEXT];
    kvd_session_name(s, name);
    r.session = name;
    r.resumed = s->generation > 1;
    r.resume_ms = kvd_keep_on(d) ? d->config.resume_ms : 0;
    r.layout = kvd_layout_to_proto(g, &pg);
    char digest[KVD_DIGEST_TEXT], exact[KVD_DIGEST_TEXT];
    kvd_layout_digest(g, digest);
    r.layout_digest = digest;
    if (s->exact != KVD_POOL_NONE) {
        kvd_layout_digest(kvd_pool_layout_get(d->pool, s->exact), exact);
        r.exact_layout_digest = exact;
    }
    for (uint32_t p = 0; p < g->n_planes; p++) {
        pg.planes[p].bf16_page_bytes = kvd_pool_page_bytes(d->pool, s->layout, p, KVD_POOL_BF16);
        pg.planes[p].codec_page_bytes = kvd_pool_page_bytes(d->pool, s->layout, p, KVD_POOL_CODEC);
    }
    r.instance = d->instance;
    r.version = (char *)kvd_build_version();
    r.backend = (char *)d->backend->ops->name;
    if (d->backend->ops->uuid)
        r.device_uuid = (char *)d->backend->ops->uuid(d->backend);
    r.lease_ms = s->lease_ms;
    r.sinks = s->n_sinks;
    r.paged = true;
    r.segments = KVD_MAX_CALL_SEGMENTS;
    kvd_call_reply(call, &r);
}

// A repeated OpenSession on the same connection gets the session that the first made.
static bool reopened(struct kvd_call *call, const Kvd__V1__OpenSessionRequest *req)
{
    struct kvd_connection *conn = req->ticket[0] ? kvd_fdsock_find(call->d, req->ticket) : NULL;
    struct kvd_session *s = conn ? kvd_connection_session(conn) : NULL;
    if (!s)
        return false;
    if (req->request_id && s->open_request == req->request_id)
        reply(call, s);
    else
        kvd_call_fail(call, KVD_E_PRECONDITION,
                      "this connection has a session already; connect once more for another");
    return true;
}

// Who is charged for a session: whose connection it is tied to, or who calls.
static int64_t uid_of(const struct kvd_call *call, const struct kvd_connection *conn)
{
    if (conn)
        return kvd_connection_peer(conn).uid;
    return call->user ? kvd_user_uid(call->user) : KVD_USER_UNKNOWN;
}

// Goes on with an earlier session. Its last calls are given up first: what they do must not come
// after what the worker does next.
static int resume(struct kvd_daemon *d, const char *name, const struct kvd_session_options *o,
                  struct kvd_session **out, struct kvd_error *err)
{
    struct kvd_session *s;
    bool again;
    int rc = kvd_session_resumable(d, name, o, &s, &again, err);
    if (rc)
        return rc;
    if (!s->parked)
        kvd_parts_session_ends(d, s);
    if (kvd_work_left(d, s->id))
        return kvd_fail(err, KVD_E_UNAVAILABLE,
                        "the last calls of session %" PRIu64 " are ending; try again", s->id);
    rc = kvd_session_resume(d, s, o, again, err);
    *out = s;
    return rc;
}

// The session's second layout, for pages that are kept exact. A resumed one had its own.
static void set_exact(struct kvd_daemon *d, struct kvd_session *s, uint32_t exact)
{
    if (s->exact != KVD_POOL_NONE)
        kvd_pool_layout_unref(d->pool, s->exact);
    s->exact = exact;
    if (exact == KVD_POOL_NONE)
        return;
    kvd_layout_digest_bytes(kvd_pool_layout_get(d->pool, s->layout), s->digests[0]);
    kvd_layout_digest_bytes(kvd_pool_layout_get(d->pool, s->exact), s->digests[1]);
}

static int make_session(struct opening *o, struct kvd_rotset *set, struct kvd_session **out,
                        struct kvd_error *err)
{
    struct kvd_daemon *d = o->call->d;
    struct kvd_connection *conn;
    struct kvd_session *s = NULL;
    int rc = find_connection(d, o->req, &conn, err); // again: it may have hung up meanwhile
    if (rc)
        return rc;
    struct kvd_session_options options = {.connection = conn,
                                          .uid = uid_of(o->call, conn),
                                          .ns_name = namespace_of(o->req),
                                          .client_name = o->req->client_name,
                                          .request = o->req->request_id};
    size_t sink_bytes = o->req->n_sinks * sizeof(*o->req->sinks);
    float *sinks KVD_FREE = sink_bytes ? malloc(sink_bytes) : NULL;
    if (sink_bytes && !sinks)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    rc = kvd_namespace_open(d, options.uid, options.ns_name, &options.ns, err);
    if (rc)
        return rc;
    uint32_t exact = KVD_POOL_NONE;
    options.layout = KVD_POOL_NONE;
    rc = kvd_rotations_bind(d, &o->g, set, options.uid, options.ns, &options.layout, err);
    if (rc == KVD_OK && o->req->pages)
        rc = kvd_rotations_bind(d, &o->exact, NULL, options.uid, options.ns, &exact, err);
    if (rc == KVD_OK)
        rc = o->req->resume[0] ? resume(d, o->req->resume, &options, &s, err)
                               : kvd_session_new(d, &options, &s, err);
    if (rc) {
        if (exact != KVD_POOL_NONE)
            kvd_pool_layout_unref(d->pool, exact);
        if (options.layout != KVD_POOL_NONE)
            kvd_pool_layout_unref(d->pool, options.layout);
        kvd_namespace_close(d, options.ns);
        return rc;
    }
    set_exact(d, s, exact);
    if (sinks)
        memcpy(sinks, o->req->sinks, sink_bytes);
    s->sinks = KVD_TAKE(sinks);
    s->n_sinks = (uint32_t)o->req->n_sinks;
    s->fitted_length = set ? set->fitted_length : 0;
    s->lease_ms = 0;
    if (!conn)
        kvd_session_lease(d, s, o->req->lease_ms ? o->req->lease_ms : 60000);
    *out = s;
    return KVD_OK;
}

// Plane by plane.
static const char *codecs_of(const struct kvd_layout *l, char text[])
{
    char codec[KVD_CODECS_TEXT];
    size_t at = 0;
    for (uint32_t p = 0; p < l->n_planes; p++)
        at += (size_t)sprintf(text + at, "%s%s", p ? "+" : "",
                              kvd_codecs_name(l->planes[p].codec, codec));
    return text;
}

// Says of which planes attention has no kernels of its own.
static void warn_of_slow(const struct kvd_daemon *d, const struct kvd_session *s,
                         const struct kvd_layout *g)
{
    char codec[KVD_CODECS_TEXT];
    const struct kvd_backend_ops *ops = d->backend->ops;
    for (uint32_t i = 0; i < g->n_planes && ops->plane_tuned; i++) {
        const struct kvd_plane *p = &g->planes[i];
        if (!ops->plane_tuned(p))
            kvd_info("session id=%" PRIu64 " plane=%u codec=%s head_dims=%u,%u: no kernels of its "
                     "own were compiled; that for any codecs may take ten times as long",
                     s->id, i, kvd_codecs_name(p->codec, codec), p->head_dim_k, p->head_dim_v);
    }
}

// Opens the session, and answers.
static void open_now(struct opening *o)
{
    struct kvd_error err = {0};
    struct kvd_session *s = NULL;
    if (make_session(o, o->set, &s, &err)) {
        kvd_call_fail_error(o->call, &err);
        return;
    }
    char codecs[KVD_MAX_PLANES * KVD_CODECS_TEXT];
    kvd_info("session %s id=%" PRIu64 " generation=%" PRIu64 " namespace=%s client=%s pid=%" PRId64
             " codec=%s rotation=%s",
             s->generation > 1 ? "resumed" : "opened", s->id, s->generation, namespace_of(o->req),
             s->client_name, s->pid, codecs_of(&o->g, codecs), o->g.rotation);
    warn_of_slow(o->call->d, s, &o->g);
    reply(o->call, s);
}

static void cleared(struct kvd_daemon *d, struct kvd_piecework *r);

static bool has_to_clear(struct opening *o, const struct kvd_connection *conn)
{
    struct kvd_daemon *d = o->call->d;
    int64_t uid = uid_of(o->call, conn);
    const char *ns = namespace_of(o->req);
    return kvd_tenants_clear(d, uid, ns, &o->g, &o->clearing.at) ||
           (o->req->pages && kvd_tenants_clear(d, uid, ns, &o->exact, &o->clearing.at));
}

// What has to be cleared to have room goes piece by piece. Others may have taken the room by then,
// again and again.
static void open_session(struct opening *o)
{
    struct kvd_daemon *d = o->call->d;
    struct kvd_connection *conn = o->req->ticket[0] ? kvd_fdsock_find(d, o->req->ticket) : NULL;
    if (d->state != KVD_READY) {
        kvd_call_fail(o->call, KVD_E_UNAVAILABLE, "kvd is shutting down");
    } else if (!reopened(o->call, o->req)) {
        if (!has_to_clear(o, conn)) {
            open_now(o);
        } else if (o->clearing.times < CLEARINGS) {
            kvd_clearing_begin(d, &o->clearing, cleared);
            return;
        } else {
            kvd_call_fail(o->call, KVD_E_UNAVAILABLE,
                          "others take each namespace or layout that is cleared; try again");
        }
    }
    kvd_rotset_free(&o->set);
    free(o);
}

static void cleared(struct kvd_daemon *d, struct kvd_piecework *r)
{
    (void)d;
    open_session((struct opening *)r);
}

// Gives the layers that the set marks planes of their own.
static int mark(struct opening *o, const struct kvd_rotset *set, struct kvd_error *err)
{
    int rc = kvd_layout_mark(&o->g, o->req->layout, set, err);
    if (rc == KVD_OK)
        rc = check_planes(o->call->d, &o->g, err);
    if (rc == KVD_OK && o->req->pages)
        rc = kvd_layout_exact(&o->g, &o->exact, err);
    return rc;
}

static void on_rotation(void *ctx, struct kvd_rotset *set, const struct kvd_error *failure)
{
    struct opening *o = ctx;
    struct kvd_error err = {0};
    if (!failure && set && mark(o, set, &err))
        failure = &err;
    if (failure) {
        kvd_call_fail_error(o->call, failure);
        kvd_rotset_free(&set);
        free(o);
        return;
    }
    o->set = set;
    open_session(o);
}

void kvd_on_open_session(struct kvd_call *call, const void *request)
{
    struct kvd_error err = {0};
    struct opening *o = calloc(1, sizeof(*o));
    if (!o) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    o->call = call;
    o->req = request;
    int rc = check_request(call, request, &o->g, &err);
    if (rc == KVD_OK && o->req->pages)
        rc = kvd_layout_exact(&o->g, &o->exact, &err);
    if (rc) {
        kvd_call_fail_error(call, &err);
        free(o);
        return;
    }
    if (reopened(call, request)) {
        free(o);
        return;
    }
    kvd_rotations_get(call, &o->g, on_rotation, o);
}

// A CloseSession is answered when all that the session held is given up.
struct closing {
    struct kvd_piecework release;
    struct kvd_call *call;
};

static bool nothing_more(struct kvd_daemon *d, struct kvd_piecework *r)
{
    (void)d;
    (void)r;
    return false;
}

static void closed(struct kvd_daemon *d, struct kvd_piecework *r)
{
    struct closing *c = (struct closing *)r;
    struct kvd_call *call = c->call;
    Kvd__V1__CloseSessionReply reply = KVD__V1__CLOSE_SESSION_REPLY__INIT;
    (void)d;
    free(c);
    call->on_cancelled = NULL;
    kvd_call_reply(call, &reply);
}

static void on_cancelled(struct kvd_call *call)
{
    struct closing *c = call->work;
    kvd_piecework_drop(call->d, &c->release);
    closed(call->d, &c->release);
}

void kvd_on_close_session(struct kvd_call *call, const void *request)
{
    const Kvd__V1__CloseSessionRequest *req = request;
    struct kvd_session *s = kvd_session_find(call->d, req->session);
    if (s)
        kvd_session_end(call->d, s, "closed by the worker");
    struct closing *c = malloc(sizeof(*c));
    if (!c) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory; the session is closed");
        return;
    }
    *c = (struct closing){.release = {.next = nothing_more, .done = closed}, .call = call};
    call->work = c;
    call->on_cancelled = on_cancelled;
    kvd_piecework_begin(call->d, &c->release); // closing twice is fine
}

void kvd_on_keep_alive(struct kvd_call *call, const void *request)
{
    const Kvd__V1__KeepAliveRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    if (!s)
        return;
    Kvd__V1__KeepAliveReply r = KVD__V1__KEEP_ALIVE_REPLY__INIT;
    r.lease_ms = s->lease_ms;
    kvd_call_reply(call, &r);
}

static int leased(struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_PRECONDITION,
                    "a leased session has no buffers; connect to the fd socket and open the "
                    "session with its ticket");
}

// What a request says of its memory. The fd, if any, is the caller's to close.
static int foreign_of(struct kvd_session *s, const Kvd__V1__RegisterBufferRequest *req,
                      struct kvd_foreign *out, struct kvd_error *err)
{
    *out = (struct kvd_foreign){.kind = (enum kvd_memory)req->memory, .fd = -1, .size = req->size};
    if (!s->connection)
        return leased(err);
    if (out->kind > KVD_MEMORY_CUDA_FD || (int)out->kind < 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "memory is %d; MEMFD, CUDA_IPC, CUDA_FD and CUDA_SEGMENTS are known",
                        (int)req->memory);
    if (req->n_segments || req->mapped)
        return kvd_fail(err, KVD_E_INVALID, "segments and mapped are of CUDA_SEGMENTS alone");
    if (out->kind == KVD_MEMORY_CUDA_IPC) {
        if (req->cuda_ipc_handle.len != sizeof(out->ipc))
            return kvd_fail(err, KVD_E_INVALID, "cuda_ipc_handle has %zu bytes, not %zu",
                            req->cuda_ipc_handle.len, sizeof(out->ipc));
        memcpy(out->ipc, req->cuda_ipc_handle.data, sizeof(out->ipc));
        return KVD_OK;
    }
    out->fd = kvd_connection_take_fd(s->connection, req->key, err);
    return out->fd < 0 ? err->code : KVD_OK;
}

// Takes the descriptors of a call's segments, whatever comes of it: what is in `out` is the
// caller's to close.
static int take_segments(struct kvd_session *s, const Kvd__V1__RegisterBufferRequest *req,
                         struct kvd_segment *out, struct kvd_error *err)
{
    int rc = KVD_OK;
    for (uint32_t i = 0; i < req->n_segments; i++) {
        const Kvd__V1__RegisterBufferRequest__Segment *from = req->segments[i];
        struct kvd_error e = {0};
        out[i] =
            (struct kvd_segment){kvd_connection_take_fd(s->connection, from->key, &e), from->bytes};
        // Of what was refused when it came, the connection knows the last one's reason.
        if (out[i].fd < 0 && (rc == KVD_OK || e.code == KVD_E_LIMIT))
            rc = kvd_fail(err, e.code, "segments[%u]: %s", i, e.text);
    }
    return rc;
}

// A part of a buffer's segments. The descriptors are closed either way: what is mapped needs none.
static int add_segments(struct kvd_call *call, struct kvd_session *s,
                        const Kvd__V1__RegisterBufferRequest *req, struct kvd_buffer **out,
                        struct kvd_error *err)
{
    struct kvd_segment segments[KVD_MAX_CALL_SEGMENTS]; // limits.c has seen to it that they fit
    const struct kvd_segments m = {req->size, req->mapped, segments, (uint32_t)req->n_segments};
    if (!s->connection)
        return leased(err);
    int rc = take_segments(s, req, segments, err);
    if (m.n == 0)
        rc = kvd_fail(err, KVD_E_INVALID, "there are no segments");
    else if (req->cuda_ipc_handle.len)
        rc = kvd_fail(err, KVD_E_INVALID, "cuda_ipc_handle is of CUDA_IPC alone");
    if (rc == KVD_OK)
        rc = kvd_session_add_segments(call->d, s, req->key, req->buffer, &m, out, err);
    for (uint32_t i = 0; i < m.n; i++)
        if (segments[i].fd >= 0)
            kvd_connection_close_fd(s->connection, segments[i].fd);
    return rc;
}

static void reply_registered(struct kvd_call *call, const struct kvd_buffer *b)
{
    Kvd__V1__RegisterBufferReply r = KVD__V1__REGISTER_BUFFER_REPLY__INIT;
    r.buffer = b->id;
    if (b->kind == KVD_MEMORY_CUDA_SEGMENTS)
        r.mapped = b->mapped;
    kvd_call_reply(call, &r);
}

void kvd_on_register_buffer(struct kvd_call *call, const void *request)
{
    const Kvd__V1__RegisterBufferRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    struct kvd_foreign memory;
    struct kvd_buffer *b, *next;
    if (!s)
        return;
    if (req->memory == KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_SEGMENTS) {
        if (add_segments(call, s, req, &b, &err))
            kvd_call_fail_error(call, &err);
        else
            reply_registered(call, b);
        return;
    }
    HASH_ITER(hh, s->buffers, b, next)
    {
        if (b->key == req->key && b->size == req->size && b->kind != KVD_MEMORY_CUDA_SEGMENTS) {
            reply_registered(call, b);
            return;
        }
    }
    int rc = foreign_of(s, req, &memory, &err);
    if (rc == KVD_OK)
        rc = kvd_session_add_buffer(call->d, s, req->key, req->buffer, &memory, &b, &err);
    if (memory.fd >= 0)
        kvd_connection_close_fd(s->connection, memory.fd);
    if (rc)
        kvd_call_fail_error(call, &err);
    else
        reply_registered(call, b);
}

static void buffer_gone(struct kvd_buffer *b)
{
    Kvd__V1__ReleaseBufferReply r = KVD__V1__RELEASE_BUFFER_REPLY__INIT;
    struct kvd_call *call = b->waits;
    call->on_cancelled = NULL;
    kvd_call_reply(call, &r);
}

static void on_release_cancelled(struct kvd_call *call)
{
    struct kvd_buffer *b = call->work;
    b->gone = NULL;
    kvd_call_fail(call, KVD_E_TIMEOUT, "calls still use the buffer; it is unmapped after them");
}

// Answered when no work uses the memory any more: then its owner may free it.
void kvd_on_release_buffer(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ReleaseBufferRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    if (!s)
        return;
    struct kvd_buffer *b = kvd_session_any_buffer(s, req->buffer);
    if (!b) {
        kvd_call_fail(call, KVD_E_NOT_FOUND, "there is no buffer %" PRIu64, req->buffer);
        return;
    }
    b->gone = buffer_gone;
    b->waits = call;
    call->work = b;
    call->on_cancelled = on_release_cancelled;
    kvd_session_drop_buffer(s, b);
}
