// Opening, reconnecting and closing a client; calls in its session.
#include <errno.h>
#include <poll.h>
#include <sys/random.h>

#include "client/lib/client.h"
#include "client/lib/instances.h"
#include "client/lib/kept.h"

enum { CLOSE_MS = 2000 }; // that closing waits for the daemon at most

kvd_result kvd_client_result(int code)
{
    switch (code) {
    case KVD_OK:
        return KVD_SUCCESS;
    case KVD_E_INVALID:
    case KVD_E_UNSUPPORTED:
        return KVD_ERR_INVALID;
    case KVD_E_NOT_FOUND:
        return KVD_ERR_NOT_FOUND;
    case KVD_E_EXISTS:
        return KVD_ERR_EXISTS;
    case KVD_E_PRECONDITION:
        return KVD_ERR_PRECONDITION;
    case KVD_E_QUOTA:
    case KVD_E_FULL:
    case KVD_E_LIMIT:
        return KVD_ERR_EXHAUSTED;
    case KVD_E_DENIED:
        return KVD_ERR_DENIED;
    case KVD_E_UNAVAILABLE:
        return KVD_ERR_UNAVAILABLE;
    case KVD_E_TIMEOUT:
        return KVD_ERR_TIMEOUT;
    case KVD_E_CORRUPT:
        return KVD_ERR_CORRUPT;
    case KVD_E_LOST:
    case KVD_E_UNAUTH:
        return KVD_ERR_LOST;
    default:
        return KVD_ERR_INTERNAL;
    }
}

int kvd_client_failed(const kvd_failure *failure, struct kvd_error *err)
{
    static const int codes[] = {
        [KVD_ERR_INVALID] = KVD_E_INVALID,         [KVD_ERR_NOT_FOUND] = KVD_E_NOT_FOUND,
        [KVD_ERR_EXISTS] = KVD_E_EXISTS,           [KVD_ERR_PRECONDITION] = KVD_E_PRECONDITION,
        [KVD_ERR_EXHAUSTED] = KVD_E_FULL,          [KVD_ERR_DENIED] = KVD_E_DENIED,
        [KVD_ERR_UNAVAILABLE] = KVD_E_UNAVAILABLE, [KVD_ERR_TIMEOUT] = KVD_E_TIMEOUT,
        [KVD_ERR_CORRUPT] = KVD_E_CORRUPT,         [KVD_ERR_LOST] = KVD_E_LOST,
        [KVD_ERR_INTERNAL] = KVD_E_INTERNAL};
    return kvd_fail(err, codes[failure->code], "%s", failure->text);
}

kvd_result kvd_client_fail(kvd_failure *err, const struct kvd_error *e)
{
    kvd_result code = kvd_client_result(e->code);
    if (err) {
        err->code = code;
        memcpy(err->text, e->text, sizeof(err->text));
    }
    return code;
}

kvd_result kvd_client_want(const void *const *wanted, size_t n, kvd_failure *err)
{
    struct kvd_error e = {0};
    for (size_t i = 0; i < n && !e.code; i += 2)
        if (!wanted[i + 1])
            kvd_fail(&e, KVD_E_INVALID, "%s is NULL", (const char *)wanted[i]);
    return e.code ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

const char *kvd_version(void)
{
    return kvd_build_version();
}

// What gRPC holds may still be the connection to the kvd before this one, which is noticed by its
// use: then it connects anew. Asked twice, a kvd answers with one session.
static int ask_to_open(kvd_client *c, const Kvd__V1__OpenSessionRequest *req,
                       Kvd__V1__OpenSessionReply **reply, uint64_t deadline, struct kvd_error *err)
{
    int rc = KVD_OK;
    for (int i = 0; i < 2; i++) {
        rc = kvd_channel_call(c->channel, "/kvd.v1.KvCache/OpenSession", req,
                              &kvd__v1__open_session_reply__descriptor, kvd_left_ms(deadline),
                              reply, err);
        if (rc != KVD_E_UNAVAILABLE || c->remote || kvd_channel_connected(c->channel) ||
            kvd_client_hung_up(c, 0))
            break;
    }
    return rc;
}

// One attempt to open a session, or to go on with one.
static int make_session(kvd_client *c, bool resume, uint64_t deadline, struct kvd_error *err)
{
    char ticket[33] = "";
    int old = KVD_TAKE_FD(c->sock); // a fork in between must not find a number that is taken anew
    if (old >= 0)
        close(old);
    if (!c->remote) {
        int sock = kvd_fdsock_connect(c->address, kvd_left_ms(deadline), ticket, err);
        if (sock < 0)
            return -sock;
        c->sock = sock;
    }
    Kvd__V1__OpenSessionRequest req = KVD__V1__OPEN_SESSION_REQUEST__INIT;
    Kvd__V1__OpenSessionReply *reply;
    if (resume && !c->resuming)
        c->resuming = ++c->next_request;
    req.request_id = resume ? c->resuming : ++c->next_request;
    req.namespace_name = c->namespace_name;
    req.ticket = ticket;
    req.client_name = c->client_name;
    req.layout = &c->layout;
    req.lease_ms = c->lease_ms;
    req.n_sinks = c->n_sinks;
    req.sinks = c->sinks;
    req.pages = c->pages;
    if (resume)
        req.resume = c->session;
    int rc = ask_to_open(c, &req, &reply, deadline, err);
    if (rc)
        return rc;
    if (reply->sinks != c->n_sinks) {
        // Its attention would be another one, silently.
        kvd_fail(err, KVD_E_UNSUPPORTED,
                 "the session has %u attention sinks, and kvd %.60s took %u of them", c->n_sinks,
                 reply->version, reply->sinks);
        kvd__v1__open_session_reply__free_unpacked(reply, NULL);
        return err->code;
    }
    if (c->opened)
        kvd__v1__open_session_reply__free_unpacked(c->opened, NULL);
    c->opened = reply;
    c->on_cpu = strcmp(reply->backend, "cpu") == 0;
    c->takes_paged = reply->paged;
    c->takes_segments = reply->segments;
    snprintf(c->session, sizeof(c->session), "%s", reply->session);
    c->resuming = 0;
    return KVD_OK;
}

// Whether the daemon has hung up the fd socket: then the session has no connection, whatever a call
// says. A daemon that dies may have closed its other sockets a moment before this one; on a busy
// host that is a long moment, so whoever knows that another is closed waits longer.
enum { MOMENT_MS = 100, LONG_MOMENT_MS = 2000 };
bool kvd_client_hung_up(const kvd_client *c, int ms)
{
    struct pollfd p = {.fd = c->sock, .events = 0};
    return c->sock >= 0 && poll(&p, 1, ms) == 1 && p.revents & (POLLHUP | POLLERR);
}

// Goes on with the session, or opens one if there is none to go on with.
static int resume_or_open(kvd_client *c, uint64_t deadline, struct kvd_error *err)
{
    int rc = KVD_OK;
    if (c->session[0]) {
        rc = make_session(c, true, deadline, err);
        if ((rc != KVD_E_UNAUTH && rc != KVD_E_PRECONDITION) || kvd_client_hung_up(c, MOMENT_MS))
            return rc;
        snprintf(c->why, sizeof(c->why), "%.199s", err->text);
    }
    c->resuming = 0;
    rc = make_session(c, false, deadline, err);
    c->sessions += rc == KVD_OK;
    return rc;
}

// Connects the fd socket, opens a session and registers the buffers: all of it, or the next call
// goes on where this has failed. The caller is inside the gate for writing.
static int open_session(kvd_client *c, uint64_t deadline, struct kvd_error *err)
{
    c->lost = true;
    int rc = KVD_OK;
    if (!c->half || kvd_client_hung_up(c, 0)) // to hang up would end the session that is there
        rc = resume_or_open(c, deadline, err);
    c->half = rc == KVD_OK;
    pthread_mutex_lock(&c->buffers_lock);
    for (kvd_buffer *b = c->buffers; b && rc == KVD_OK; b = b->next)
        rc = kvd_buffer_register(c, b, deadline, err);
    pthread_mutex_unlock(&c->buffers_lock);
    // Between two calls of this there may have come another kvd, which knows nothing of the first.
    if (rc && rc != KVD_E_UNAVAILABLE && kvd_client_hung_up(c, MOMENT_MS))
        rc = err->code = KVD_E_UNAVAILABLE;
    if (rc)
        return rc;
    c->lost = c->half = false;
    c->epoch++;
    return KVD_OK;
}

enum { FIRST_MS = 5, MOST_MS = 50 }; // between looks for a kvd that is started again

static void pause_ms(uint32_t ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000},
              NULL);
}

// The connection of `epoch` is gone: makes a new one, unless another thread has done so. A kvd that
// is started again is waited for, as long as it goes on with the session.
static int connect_again(kvd_client *c, uint64_t epoch, uint64_t deadline, struct kvd_error *err)
{
    bool waits = kvd_client_resumes(c);
    uint64_t until = kvd_now_ms() + (waits ? c->opened->resume_ms : 0);
    for (uint32_t pause = FIRST_MS;; pause = KVD_MIN(2 * pause, (uint32_t)MOST_MS)) {
        int rc = kvd_gate_write(&c->gate, deadline, err);
        if (rc == KVD_OK) {
            rc = c->epoch == epoch ? open_session(c, deadline, err) : KVD_OK;
            kvd_gate_leave(&c->gate);
        }
        uint32_t left = kvd_left_ms(KVD_MIN(deadline, until));
        if (rc != KVD_E_UNAVAILABLE || !waits || left == 0)
            return rc;
        if (kvd_gpu_lost(c, err)) // then kvd may be waiting for this process to end
            return err->code;
        pause_ms(KVD_MIN(pause, left));
    }
}

// Whether nobody was there, or one of the two connections was another kvd's than the other, and
// somebody is there who starts it again.
static bool comes_back(const kvd_client *c)
{
    return !c->remote &&
           (c->sock < 0 || !kvd_channel_connected(c->channel) ||
            kvd_client_hung_up(c, MOMENT_MS)) &&
           kvd_kept(c->address + strlen("unix:"));
}

// The same for a client that has no session yet: it has nothing to lose, and waits for a kvd that
// is started again as long as it would wait for an answer.
static int open_first(kvd_client *c, uint64_t deadline, struct kvd_error *err)
{
    for (uint32_t pause = FIRST_MS;; pause = KVD_MIN(2 * pause, (uint32_t)MOST_MS)) {
        int rc = open_session(c, deadline, err);
        if (rc != KVD_E_UNAVAILABLE || !comes_back(c))
            return rc;
        uint32_t left = kvd_left_ms(deadline);
        if (left == 0)
            return kvd_fail_in(err, "kvd is being started again, and %u ms were not enough",
                               c->timeout_ms);
        pause_ms(KVD_MIN(pause, left));
    }
}

static kvd_result reconnect(kvd_client *c, uint64_t epoch, uint64_t sessions,
                            const struct kvd_error *why, uint64_t deadline, bool *again,
                            kvd_failure *err)
{
    struct kvd_error e = {0};
    int rc = connect_again(c, epoch, deadline, &e);
    if (rc) {
        kvd_fail_in(&e, "the session was lost (%.120s) and no new one could be opened", why->text);
        return kvd_client_fail(err, &e);
    }
    if (kvd_gate_read(&c->gate, deadline, &e))
        return kvd_client_fail(err, &e);
    *again = c->sessions == sessions;
    if (!*again)
        kvd_fail(&e, KVD_E_LOST,
                 "the session was lost (%.180s); a new one is open and buffers are registered "
                 "again, but sequences made before are gone unless they were published and the "
                 "pool is the same",
                 c->why[0] ? c->why : why->text);
    kvd_gate_leave(&c->gate);
    return *again ? KVD_SUCCESS : kvd_client_fail(err, &e);
}

// Whether a call's failure means that there is no connection, or no session.
static bool is_lost(kvd_client *c, int rc)
{
    if (rc == KVD_E_UNAUTH)
        return true;
    if (rc != KVD_E_UNAVAILABLE && rc != KVD_E_LOST && rc != KVD_E_INTERNAL)
        return false;
    if (c->remote)
        return kvd_client_resumes(c) && !kvd_channel_connected(c->channel);
    bool closed = rc == KVD_E_UNAVAILABLE && !kvd_channel_connected(c->channel);
    return kvd_client_hung_up(c, closed ? LONG_MOMENT_MS : MOMENT_MS);
}

int kvd_client_enter(kvd_client *c, uint64_t deadline, struct kvd_error *err)
{
    int rc = kvd_fork_check(c, err);
    return rc ? rc : kvd_gate_read(&c->gate, deadline, err);
}

kvd_result kvd_client_leave(kvd_client *c, int rc, const struct kvd_error *e, uint64_t deadline,
                            bool *again, kvd_failure *err)
{
    uint64_t epoch = c->epoch, sessions = c->sessions;
    bool lost = is_lost(c, rc);
    kvd_gate_leave(&c->gate);
    *again = false;
    if (lost)
        return reconnect(c, epoch, sessions, e, deadline, again, err);
    return rc ? kvd_client_fail(err, e) : KVD_SUCCESS;
}

kvd_result kvd_client_call_until(kvd_client *c, const char *method, void *request,
                                 char **set_session, const ProtobufCMessageDescriptor *reply_type,
                                 void *reply, uint64_t deadline, kvd_failure *err)
{
    bool again = true;
    kvd_result result = KVD_SUCCESS;
    // What was not answered is sent again as it is, in the session that goes on: its request id
    // tells whether it was done.
    while (again) {
        struct kvd_error e = {0};
        int rc = kvd_client_enter(c, deadline, &e);
        if (rc)
            return kvd_client_fail(err, &e);
        *set_session = c->session;
        rc = c->lost ? kvd_fail(&e, KVD_E_UNAUTH, "the daemon was gone")
                     : kvd_channel_call(c->channel, method, request, reply_type,
                                        kvd_left_ms(deadline), reply, &e);
        result = kvd_client_leave(c, rc, &e, deadline, &again, err);
    }
    return result;
}

kvd_result kvd_client_call(kvd_client *c, const char *method, void *request, char **set_session,
                           const ProtobufCMessageDescriptor *reply_type, void *reply,
                           kvd_failure *err)
{
    return kvd_client_call_until(c, method, request, set_session, reply_type, reply,
                                 kvd_client_deadline(c), err);
}

static void client_free(kvd_client *c)
{
    kvd_fork_forget(c);
    kvd_buffers_drop(c);
    kvd_stream_free(&c->events);
    kvd__v1__event__free_unpacked(c->last_event, NULL);
    if (c->opened)
        kvd__v1__open_session_reply__free_unpacked(c->opened, NULL);
    kvd_channel_free(&c->channel);
    if (c->sock >= 0)
        close(c->sock);
    kvd_gate_deinit(&c->gate);
    pthread_mutex_destroy(&c->buffers_lock);
    pthread_cond_destroy(&c->buffers_idle);
    pthread_mutex_destroy(&c->enqueuer_lock);
    free(c->address);
    free(c->namespace_name);
    free(c->client_name);
    free(c->codec);
    free(c->rotation_set);
    free(c->layers);
    free(c->plane_layers);
    free(c->shapes);
    for (size_t i = 0; i < KVD_LEN(c->plane_codecs); i++)
        free(c->plane_codecs[i]);
    free(c->sinks);
    free(c);
}

static char *copy_or(const char *text, const char *otherwise)
{
    return strdup(text ? text : otherwise);
}

// What could not even be copied; the rest is the daemon's to judge.
static int check_options(const kvd_options *o, struct kvd_error *err)
{
    if (o->pages && strncmp(o->address, "unix:", 5) != 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "pages are shared memory: kvd's unix: address is wanted for them, not %s",
                        o->address);
    if (!o->sinks != !o->n_sinks || o->n_sinks > KVD_MAX_SINKS)
        return kvd_fail(err, KVD_E_INVALID,
                        "sinks is %s and n_sinks %u; one for each q head of each layer is wanted, "
                        "at most %d, or NULL and 0",
                        o->sinks ? "given" : "NULL", o->n_sinks, KVD_MAX_SINKS);
    if (kvd_address_check(o->address, err))
        return err->code;
    return kvd_channel_check(&(struct kvd_channel_options){.address = o->address,
                                                           .tls_ca = o->tls_ca,
                                                           .tls_cert = o->tls_cert,
                                                           .tls_key = o->tls_key,
                                                           .tls_server_name = o->tls_server_name},
                             err);
}

static kvd_client *client_new(const kvd_options *o)
{
    kvd_client *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->sock = -1;
    // Request ids go on where no other worker's of the same session are.
    uint64_t first = 0;
    if (getrandom(&first, sizeof(first), 0) != sizeof(first))
        first = kvd_now_ms() << 20;
    c->next_request = first >> 1;
    kvd_gate_init(&c->gate);
    pthread_mutex_init(&c->buffers_lock, NULL);
    kvd_cond_init(&c->buffers_idle);
    pthread_mutex_init(&c->enqueuer_lock, NULL);
    c->address = strdup(o->address);
    c->namespace_name = copy_or(o->namespace_name, "default");
    c->client_name = copy_or(o->client_name, program_invocation_short_name);
    c->codec = copy_or(o->codec, "int2");
    c->rotation_set = copy_or(o->rotation_set, "");
    c->layers = calloc(KVD_MAX_LAYERS, sizeof(*c->layers));
    c->plane_layers = calloc(KVD_MAX_LAYERS, sizeof(*c->plane_layers));
    c->shapes = calloc(KVD_MAX_LAYERS, sizeof(*c->shapes));
    c->sinks = calloc(o->n_sinks + 1, sizeof(*c->sinks));
    c->n_sinks = o->n_sinks;
    c->timeout_ms = o->timeout_ms ? o->timeout_ms : 30000;
    c->lease_ms = o->lease_ms;
    c->remote = strncmp(o->address, "unix:", 5) != 0;
    c->pages = o->pages;
    if (!c->address || !c->namespace_name || !c->client_name || !c->codec || !c->rotation_set ||
        !c->layers || !c->plane_layers || !c->shapes || !c->sinks) {
        client_free(c);
        return NULL;
    }
    if (strlen(c->client_name) > KVD_MAX_CLIENT_NAME)
        c->client_name[KVD_MAX_CLIENT_NAME] = '\0';
    if (o->n_sinks)
        memcpy(c->sinks, o->sinks, o->n_sinks * sizeof(*c->sinks));
    return c;
}

kvd_result kvd_open(const kvd_options *options, kvd_client **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    kvd_options o;
    char *found KVD_FREE = NULL;
    KVD_WANT(err, "out", out);
    if (kvd_sized_take(&kvd_sized_options, options, &o, &e))
        return kvd_client_fail(err, &e);
    if (!o.address) {
        found = kvd_instances_default(&e);
        o.address = found;
    }
    if (!o.address || check_options(&o, &e))
        return kvd_client_fail(err, &e);
    kvd_client *c = client_new(&o);
    if (!c) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    int rc = kvd_client_set_layout(c, &o, &e);
    if (rc == KVD_OK)
        rc = kvd_fork_watch(c, &e);
    if (rc == KVD_OK) {
        c->channel =
            kvd_channel_new(&(struct kvd_channel_options){.address = c->address,
                                                          .tls_ca = o.tls_ca,
                                                          .tls_cert = o.tls_cert,
                                                          .tls_key = o.tls_key,
                                                          .tls_server_name = o.tls_server_name},
                            &e);
        rc = c->channel ? open_first(c, kvd_client_deadline(c), &e) : e.code;
    }
    if (rc == KVD_OK && c->remote)
        rc = kvd_lease_start(c, &e);
    if (rc) {
        client_free(c);
        return kvd_client_fail(err, &e);
    }
    *out = c;
    return KVD_SUCCESS;
}

void kvd_close(kvd_client **cp)
{
    kvd_client *c = cp ? KVD_TAKE(*cp) : NULL;
    if (!c)
        return;
    kvd_queues_drop(c);
    if (c->forked) { // the rest is gRPC's, and stays
        kvd_buffers_drop(c);
        return;
    }
    uint64_t deadline = kvd_now_ms() + KVD_MIN(c->timeout_ms, (uint32_t)CLOSE_MS);
    kvd_enqueuer_free(&c->enqueuer, deadline);
    kvd_lease_stop(c);
    kvd_stream_free(&c->events);
    Kvd__V1__CloseSessionRequest req = KVD__V1__CLOSE_SESSION_REQUEST__INIT;
    Kvd__V1__CloseSessionReply *reply;
    req.session = c->session;
    // Best effort: hanging up ends the session too.
    if (!c->lost && kvd_channel_call(c->channel, "/kvd.v1.KvCache/CloseSession", &req,
                                     &kvd__v1__close_session_reply__descriptor,
                                     kvd_left_ms(deadline), &reply, NULL) == KVD_OK)
        kvd__v1__close_session_reply__free_unpacked(reply, NULL);
    client_free(c);
}

kvd_result kvd_get_info(kvd_client *c, kvd_info *out, kvd_failure *err)
{
    struct kvd_error e = {0};
    KVD_WANT(err, "client", c);
    if (kvd_sized_check(&kvd_sized_info, out, &e) ||
        kvd_client_enter(c, kvd_client_deadline(c), &e))
        return kvd_client_fail(err, &e);
    const Kvd__V1__OpenSessionReply *r = c->opened;
    kvd_info info = {.version = r->version,
                     .backend = r->backend,
                     .instance = r->instance,
                     .rotation_set = r->layout ? r->layout->rotation_set : "",
                     .layout_digest = r->layout_digest,
                     .device_uuid = r->device_uuid};
    for (size_t p = 0; r->layout && p < KVD_MIN(r->layout->n_planes, KVD_LEN(info.planes)); p++) {
        const Kvd__V1__Plane *from = r->layout->planes[p];
        info.planes[info.n_planes++] =
            (kvd_plane_info){.bf16_page_bytes = from->bf16_page_bytes,
                             .codec_page_bytes = from->codec_page_bytes,
                             .sink = from->windows ? from->windows->sink : 0,
                             .recent = from->windows ? from->windows->recent : 0};
    }
    kvd_sized_give(&kvd_sized_info, &info, out);
    kvd_gate_leave(&c->gate);
    return KVD_SUCCESS;
}
