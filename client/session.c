// Opening, reconnecting and closing a client; buffers.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "client/client.h"

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

const char *kvd_version(void)
{
    return KVD_VERSION;
}

#define MEMORY_KIND(name) KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__##name

static bool on_unix(const kvd_client *c)
{
    return strncmp(c->address, "unix:", 5) == 0;
}

static int register_buffer(kvd_client *c, kvd_buffer *b, struct kvd_error *err)
{
    Kvd__V1__RegisterBufferRequest req = KVD__V1__REGISTER_BUFFER_REQUEST__INIT;
    Kvd__V1__RegisterBufferReply *reply;
    int rc = b->fd >= 0 ? kvd_fdsock_send(c->sock, b->key, b->fd, err) : KVD_OK;
    if (rc)
        return rc;
    req.session = c->session;
    req.key = b->key;
    req.size = b->at + b->size;
    req.memory = b->kind;
    if (b->kind == MEMORY_KIND(CUDA_IPC))
        req.cuda_ipc_handle = (ProtobufCBinaryData){sizeof(b->ipc), b->ipc};
    rc = kvd_channel_call(c->channel, "/kvd.v1.KvCache/RegisterBuffer", &req,
                          &kvd__v1__register_buffer_reply__descriptor, c->timeout_ms, &reply, err);
    if (rc)
        return rc;
    b->id = reply->buffer;
    kvd__v1__register_buffer_reply__free_unpacked(reply, NULL);
    return KVD_OK;
}

// Connects the fd socket, opens a session and registers the buffers. The caller holds the lock for
// writing.
static int open_session(kvd_client *c, struct kvd_error *err)
{
    char ticket[33] = "";
    if (c->sock >= 0)
        close(c->sock);
    c->sock = -1;
    if (on_unix(c)) {
        c->sock = kvd_fdsock_connect(c->address, ticket, err);
        if (c->sock < 0)
            return -c->sock;
    }
    Kvd__V1__OpenSessionRequest req = KVD__V1__OPEN_SESSION_REQUEST__INIT;
    Kvd__V1__OpenSessionReply *reply;
    req.request_id = ++c->next_request;
    req.namespace_name = c->namespace_name;
    req.ticket = ticket;
    req.client_name = c->client_name;
    req.geometry = &c->geometry;
    int rc = kvd_channel_call(c->channel, "/kvd.v1.KvCache/OpenSession", &req,
                              &kvd__v1__open_session_reply__descriptor, c->timeout_ms, &reply, err);
    if (rc)
        return rc;
    if (c->opened)
        kvd__v1__open_session_reply__free_unpacked(c->opened, NULL);
    c->opened = reply;
    snprintf(c->session, sizeof(c->session), "%s", reply->session);
    c->epoch++;
    for (kvd_buffer *b = c->buffers; b && rc == KVD_OK; b = b->next)
        rc = register_buffer(c, b, err);
    return rc;
}

// The session of `epoch` is gone: opens a new one, unless another thread has done so.
static kvd_result reconnect(kvd_client *c, uint64_t epoch, const struct kvd_error *why,
                            kvd_failure *err)
{
    struct kvd_error e = {0};
    pthread_rwlock_wrlock(&c->lock);
    int rc = c->epoch == epoch ? open_session(c, &e) : KVD_OK;
    pthread_rwlock_unlock(&c->lock);
    if (rc) {
        kvd_fail_in(&e, "the session was lost (%.120s) and no new one could be opened", why->text);
        return kvd_client_fail(err, &e);
    }
    kvd_fail(&e, KVD_E_LOST,
             "the session was lost (%.200s); a new one is open and buffers are registered again, "
             "but sequences made "
             "before are gone unless they were published and the daemon is the same",
             why->text);
    return kvd_client_fail(err, &e);
}

// Whether the daemon has hung up the fd socket: then the session is gone, whatever a call says. A
// daemon that dies may have closed its other sockets a moment before this one.
static bool hung_up(const kvd_client *c)
{
    struct pollfd p = {.fd = c->sock, .events = 0};
    return c->sock >= 0 && poll(&p, 1, 100) == 1 && p.revents & (POLLHUP | POLLERR);
}

kvd_result kvd_client_call(kvd_client *c, const char *method, void *request, char **set_session,
                           const ProtobufCMessageDescriptor *reply_type, void *reply,
                           kvd_failure *err)
{
    struct kvd_error e = {0};
    pthread_rwlock_rdlock(&c->lock);
    uint64_t epoch = c->epoch;
    *set_session = c->session;
    int rc = kvd_channel_call(c->channel, method, request, reply_type, c->timeout_ms, reply, &e);
    bool lost = rc == KVD_E_UNAUTH || ((rc == KVD_E_UNAVAILABLE || rc == KVD_E_LOST) && hung_up(c));
    pthread_rwlock_unlock(&c->lock);
    if (lost)
        return reconnect(c, epoch, &e, err);
    return rc ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

static void client_free(kvd_client *c)
{
    while (c->buffers) {
        kvd_buffer *b = c->buffers;
        c->buffers = b->next;
        if (b->kind == MEMORY_KIND(MEMFD))
            munmap(b->data, b->size);
        if (b->fd >= 0)
            close(b->fd);
        free(b);
    }
    kvd_stream_free(&c->events);
    if (c->opened)
        kvd__v1__open_session_reply__free_unpacked(c->opened, NULL);
    kvd_channel_free(&c->channel);
    if (c->sock >= 0)
        close(c->sock);
    pthread_rwlock_destroy(&c->lock);
    pthread_mutex_destroy(&c->enqueuer_lock);
    free(c->address);
    free(c->namespace_name);
    free(c->client_name);
    free(c->codec);
    free(c->rotation_set);
    free(c->layers);
    free(c);
}

static char *copy_or(const char *text, const char *otherwise)
{
    return strdup(text ? text : otherwise);
}

static kvd_client *client_new(const kvd_options *o)
{
    kvd_client *c = calloc(1, sizeof(*c));
    const char *address = o->address ? o->address : getenv("KVD_ADDRESS");
    if (!c)
        return NULL;
    c->sock = -1;
    pthread_rwlock_init(&c->lock, NULL);
    pthread_mutex_init(&c->enqueuer_lock, NULL);
    c->address = copy_or(address, "unix:/run/kvd/kvd.sock");
    c->namespace_name = copy_or(o->namespace_name, "default");
    c->client_name = copy_or(o->client_name, program_invocation_short_name);
    c->codec = copy_or(o->codec, "int2");
    c->rotation_set = copy_or(o->rotation_set, "");
    c->layers = calloc(o->n_layers + 1, sizeof(*c->layers));
    c->timeout_ms = o->timeout_ms ? o->timeout_ms : 30000;
    if (!c->address || !c->namespace_name || !c->client_name || !c->codec || !c->rotation_set ||
        !c->layers) {
        client_free(c);
        return NULL;
    }
    if (strlen(c->client_name) > KVD_MAX_CLIENT_NAME)
        c->client_name[KVD_MAX_CLIENT_NAME] = '\0';
    memcpy(c->layers, o->layers, o->n_layers * sizeof(*c->layers));
    kvd__v1__windows__init(&c->windows);
    c->windows.sink = o->sink;
    c->windows.recent = o->recent;
    kvd__v1__geometry__init(&c->geometry);
    c->geometry.n_layers = o->n_layers;
    c->geometry.layers = c->layers;
    c->geometry.q_heads = o->q_heads;
    c->geometry.kv_heads = o->kv_heads;
    c->geometry.head_dim_k = o->head_dim_k;
    c->geometry.head_dim_v = o->head_dim_v;
    c->geometry.codec = c->codec;
    c->geometry.rotation_set = c->rotation_set;
    c->geometry.windows = o->sink || o->recent || o->no_windows ? &c->windows : NULL;
    return c;
}

kvd_result kvd_open(const kvd_options *options, kvd_client **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    kvd_options o;
    if (kvd_sized_take(&kvd_sized_options, options, &o, &e))
        return kvd_client_fail(err, &e);
    kvd_client *c = client_new(&o);
    if (!c) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    c->channel = kvd_channel_new(&(struct kvd_channel_options){.address = c->address}, &e);
    int rc = c->channel ? open_session(c, &e) : e.code;
    if (rc) {
        client_free(c);
        return kvd_client_fail(err, &e);
    }
    *out = c;
    return KVD_SUCCESS;
}

void kvd_close(kvd_client **cp)
{
    kvd_client *c = KVD_TAKE(*cp);
    if (!c)
        return;
    kvd_enqueuer_free(&c->enqueuer);
    kvd_stream_free(&c->events);
    Kvd__V1__CloseSessionRequest req = KVD__V1__CLOSE_SESSION_REQUEST__INIT;
    Kvd__V1__CloseSessionReply *reply;
    req.session = c->session;
    // Best effort: hanging up ends the session too.
    if (kvd_channel_call(c->channel, "/kvd.v1.KvCache/CloseSession", &req,
                         &kvd__v1__close_session_reply__descriptor, KVD_MIN(c->timeout_ms, 2000u),
                         &reply, NULL) == KVD_OK)
        kvd__v1__close_session_reply__free_unpacked(reply, NULL);
    client_free(c);
}

bool kvd_client_on_cpu(kvd_client *c)
{
    pthread_rwlock_rdlock(&c->lock);
    bool cpu = strcmp(c->opened->backend, "cpu") == 0;
    pthread_rwlock_unlock(&c->lock);
    return cpu;
}

kvd_result kvd_get_info(kvd_client *c, kvd_info *out, kvd_failure *err)
{
    struct kvd_error e = {0};
    if (kvd_sized_check(&kvd_sized_info, out, &e))
        return kvd_client_fail(err, &e);
    const Kvd__V1__OpenSessionReply *r = c->opened;
    kvd_info info = {.version = r->version,
                     .backend = r->backend,
                     .instance = r->instance,
                     .rotation_set = r->geometry ? r->geometry->rotation_set : "",
                     .bf16_page_bytes = r->bf16_page_bytes,
                     .codec_page_bytes = r->codec_page_bytes};
    if (r->geometry && r->geometry->windows) {
        info.sink = r->geometry->windows->sink;
        info.recent = r->geometry->windows->recent;
    }
    kvd_sized_give(&kvd_sized_info, &info, out);
    return KVD_SUCCESS;
}

// -- buffers ------------------------------------------------------------------------------------

static int make_memory(kvd_buffer *b, struct kvd_error *err)
{
    b->fd = memfd_create("kvd-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (b->fd < 0 || ftruncate(b->fd, (off_t)b->size) ||
        fcntl(b->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))
        return kvd_fail(err, -errno, "cannot make %llu bytes of shared memory: %s",
                        (unsigned long long)b->size, strerror(errno));
    b->data = mmap(NULL, b->size, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
    if (b->data == MAP_FAILED)
        return kvd_fail(err, -errno, "cannot map %llu bytes: %s", (unsigned long long)b->size,
                        strerror(errno));
    return KVD_OK;
}

kvd_result kvd_client_add_buffer(kvd_client *c, kvd_buffer *b, kvd_failure *err)
{
    struct kvd_error e = {0};
    b->client = c;
    b->key = ++c->next_key;
    if (!on_unix(c)) {
        kvd_fail(&e, KVD_E_INVALID, "shared buffers want a unix: address");
        return kvd_client_fail(err, &e);
    }
    pthread_rwlock_wrlock(&c->lock);
    uint64_t epoch = c->epoch;
    int rc = register_buffer(c, b, &e);
    if (rc == KVD_OK) {
        b->next = c->buffers;
        c->buffers = b;
    }
    bool lost = rc == KVD_E_UNAUTH || (rc == KVD_E_UNAVAILABLE && hung_up(c));
    pthread_rwlock_unlock(&c->lock);
    if (rc == KVD_OK)
        return KVD_SUCCESS;
    return lost ? reconnect(c, epoch, &e, err) : kvd_client_fail(err, &e);
}

kvd_result kvd_buffer_new(kvd_client *c, uint64_t bytes, kvd_buffer **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    kvd_buffer *b = calloc(1, sizeof(*b));
    if (!b || bytes == 0) {
        free(b);
        kvd_fail(&e, KVD_E_INVALID, bytes ? "out of memory" : "a buffer of 0 bytes");
        return kvd_client_fail(err, &e);
    }
    *b = (kvd_buffer){.size = bytes, .fd = -1, .data = MAP_FAILED};
    kvd_result rc =
        make_memory(b, &e) ? kvd_client_fail(err, &e) : kvd_client_add_buffer(c, b, err);
    if (rc == KVD_SUCCESS) {
        *out = b;
        return rc;
    }
    if (b->data != MAP_FAILED)
        munmap(b->data, b->size);
    if (b->fd >= 0)
        close(b->fd);
    free(b);
    return rc;
}

void *kvd_buffer_detach(kvd_buffer **bp)
{
    kvd_buffer *b = KVD_TAKE(*bp);
    if (!b)
        return NULL;
    kvd_client *c = b->client;
    void *data = b->data;
    pthread_rwlock_wrlock(&c->lock);
    kvd_buffer **link = &c->buffers;
    while (*link != b)
        link = &(*link)->next;
    *link = b->next;
    Kvd__V1__ReleaseBufferRequest req = KVD__V1__RELEASE_BUFFER_REQUEST__INIT;
    Kvd__V1__ReleaseBufferReply *reply;
    req.session = c->session;
    req.buffer = b->id;
    if (kvd_channel_call(c->channel, "/kvd.v1.KvCache/ReleaseBuffer", &req,
                         &kvd__v1__release_buffer_reply__descriptor, c->timeout_ms, &reply,
                         NULL) == KVD_OK)
        kvd__v1__release_buffer_reply__free_unpacked(reply, NULL);
    pthread_rwlock_unlock(&c->lock);
    if (b->fd >= 0)
        close(b->fd);
    free(b);
    return data;
}

void kvd_buffer_free(kvd_buffer **bp)
{
    bool ours = *bp && (*bp)->kind == MEMORY_KIND(MEMFD);
    uint64_t size = *bp ? (*bp)->size : 0;
    void *data = kvd_buffer_detach(bp);
    if (ours)
        munmap(data, size);
}

void *kvd_buffer_data(kvd_buffer *b)
{
    return b->data;
}

uint64_t kvd_buffer_size(const kvd_buffer *b)
{
    return b->size;
}
