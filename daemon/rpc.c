#include "daemon/rpc.h"

#include <grp.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <sys/stat.h>

enum { ARMED = 4 }; // requests kept waiting per method; a burst beyond that waits inside gRPC

struct kvd_out {
    struct kvd_out *next;
    grpc_byte_buffer *bytes;
};

struct kvd_rpc {
    grpc_server *server;
    grpc_completion_queue *cq;
    void *registered[KVD_MAX_METHODS];
    uv_thread_t thread;
    bool thread_running;
    uv_mutex_t lock;
    uv_async_t async;
    struct kvd_tag *first, *last; // fired, to be handled by the loop
    bool drained;                 // the queue has shut down
    bool stopping;
    struct kvd_tag shutdown_tag;
    void (*on_shut)(struct kvd_daemon *d);
    struct kvd_call *unknown; // the armed request for methods that we do not have
    grpc_call_details unknown_details;
};

// -- the completion-queue thread and the loop's side of it --------------------------------------

// To be called before a tag goes to gRPC, after all else is written.
static void tag_arm(struct kvd_tag *tag, void (*fire)(struct kvd_tag *tag, bool ok))
{
    tag->fire = fire;
    atomic_store_explicit(&tag->armed, true, memory_order_release);
}

static void queue_thread(void *arg)
{
    struct kvd_daemon *d = arg;
    struct kvd_rpc *r = d->rpc;
    for (;;) {
        grpc_event e = grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        uv_mutex_lock(&r->lock);
        if (e.type == GRPC_OP_COMPLETE) {
            struct kvd_tag *tag = e.tag;
            atomic_load_explicit(&tag->armed, memory_order_acquire);
            tag->ok = e.success;
            tag->next = NULL;
            if (r->last)
                r->last->next = tag;
            else
                r->first = tag;
            r->last = tag;
        } else if (e.type == GRPC_QUEUE_SHUTDOWN) {
            r->drained = true;
        }
        uv_async_send(&r->async);
        uv_mutex_unlock(&r->lock);
        if (e.type == GRPC_QUEUE_SHUTDOWN)
            return;
    }
}

// Wake-ups coalesce, so the whole list is taken.
static void on_async(uv_async_t *async)
{
    struct kvd_daemon *d = async->data;
    struct kvd_rpc *r = d->rpc;
    uv_mutex_lock(&r->lock);
    struct kvd_tag *tag = r->first;
    r->first = r->last = NULL;
    bool drained = r->drained;
    uv_mutex_unlock(&r->lock);
    while (tag) {
        struct kvd_tag *next = tag->next;
        tag->fire(tag, tag->ok);
        tag = next;
    }
    if (drained && r->on_shut) {
        void (*on_shut)(struct kvd_daemon *) = r->on_shut;
        r->on_shut = NULL;
        on_shut(d);
    }
}

// -- packing ------------------------------------------------------------------------------------

// A message may not unpack to more than a small multiple of its size: many tiny items must not eat
// the memory.
struct budget {
    size_t left;
};

static void *budget_alloc(void *ctx, size_t n)
{
    struct budget *b = ctx;
    if (n > b->left)
        return NULL;
    b->left -= n;
    return malloc(n);
}

static void budget_free(void *ctx, void *p)
{
    (void)ctx;
    free(p);
}

static ProtobufCMessage *unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *payload)
{
    grpc_byte_buffer_reader reader;
    if (!payload || !grpc_byte_buffer_reader_init(&reader, payload))
        return NULL;
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    size_t len = GRPC_SLICE_LENGTH(all);
    struct budget budget = {len + KVD_MIN(len * 8, (size_t)64 << 20) + (1 << 16)};
    ProtobufCAllocator allocator = {budget_alloc, budget_free, &budget};
    ProtobufCMessage *m =
        protobuf_c_message_unpack(type, &allocator, len, GRPC_SLICE_START_PTR(all));
    grpc_slice_unref(all);
    grpc_byte_buffer_reader_destroy(&reader);
    return m;
}

static grpc_byte_buffer *buffer_of(grpc_slice slice)
{
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return b;
}

static grpc_byte_buffer *pack(const ProtobufCMessage *m)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(m));
    protobuf_c_message_pack(m, GRPC_SLICE_START_PTR(slice));
    return buffer_of(slice);
}

// -- calls --------------------------------------------------------------------------------------

static void call_free(struct kvd_call *c)
{
    while (c->out_first) {
        struct kvd_out *next = c->out_first->next;
        grpc_byte_buffer_destroy(c->out_first->bytes);
        free(c->out_first);
        c->out_first = next;
    }
    protobuf_c_message_free_unpacked(c->request, NULL);
    if (c->payload)
        grpc_byte_buffer_destroy(c->payload);
    if (c->reply)
        grpc_byte_buffer_destroy(c->reply);
    grpc_slice_unref(c->message);
    grpc_metadata_array_destroy(&c->metadata);
    if (c->call)
        grpc_call_unref(c->call);
    free(c);
}

static void account(struct kvd_call *c)
{
    struct kvd_metrics *m = &c->d->metrics;
    m->calls[c->method_index][c->code]++;
    kvd_histogram_add(&m->rpc[c->method_index], uv_hrtime() - c->accepted_ns);
    kvd_debug("call method=%s code=%s us=%llu", c->method ? c->method->path : "unknown",
              kvd_grpc_code_name(c->code),
              (unsigned long long)(uv_hrtime() - c->accepted_ns) / 1000);
}

static void on_done(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, done_tag));
    (void)ok;
    call_free(c);
}

static grpc_op *status_op(struct kvd_call *c, grpc_op *op)
{
    *op = (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    op->data.send_status_from_server.status = c->code;
    op->data.send_status_from_server.status_details = &c->message;
    return op + 1;
}

// Starts the one batch that answers a unary call.
static void answer(struct kvd_call *c)
{
    grpc_op ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA}};
    grpc_op *op = ops + 1;
    account(c);
    if (c->reply) {
        *op = (grpc_op){.op = GRPC_OP_SEND_MESSAGE};
        op->data.send_message.send_message = c->reply;
        op++;
    }
    op = status_op(c, op);
    *op = (grpc_op){.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    op->data.recv_close_on_server.cancelled = &c->cancelled;
    op++;
    tag_arm(&c->done_tag, on_done);
    if (grpc_call_start_batch(c->call, ops, (size_t)(op - ops), &c->done_tag, NULL) !=
        GRPC_CALL_OK) {
        kvd_error("grpc refused a batch method=%s", c->method ? c->method->path : "unknown");
        call_free(c);
    }
}

static void set_message(struct kvd_call *c, int code, const char *text)
{
    c->code = kvd_status_to_grpc(code);
    grpc_slice_unref(c->message);
    c->message = grpc_slice_from_copied_string(text);
}

void kvd_call_reply(struct kvd_call *call, const void *reply)
{
    call->reply = pack(reply);
    answer(call);
}

void kvd_call_reply_packed(struct kvd_call *call, const uint8_t *data, size_t len)
{
    call->reply = buffer_of(grpc_slice_from_copied_buffer((const char *)data, len));
    answer(call);
}

void kvd_call_fail(struct kvd_call *call, int code, const char *fmt, ...)
{
    struct kvd_error err;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err.text, sizeof(err.text), fmt, ap);
    va_end(ap);
    err.code = code;
    kvd_call_fail_error(call, &err);
}

void kvd_call_fail_error(struct kvd_call *call, const struct kvd_error *err)
{
    if (call->method && call->method->streaming) {
        kvd_call_finish(call, err->code, err->text);
        return;
    }
    if (err->code < 0 || err->code == KVD_E_INTERNAL)
        kvd_error("call failed method=%s error=%s", call->method ? call->method->path : "unknown",
                  err->text);
    set_message(call, err->code, err->text);
    answer(call);
}

bool kvd_call_expired(const struct kvd_call *call)
{
    gpr_timespec now = gpr_now(call->deadline.clock_type);
    return gpr_time_cmp(call->deadline, now) < 0;
}

void kvd_call_metadata(const struct kvd_call *call, const char *key, char *out, size_t cap)
{
    out[0] = '\0';
    for (size_t i = 0; i < call->metadata.count; i++) {
        const grpc_metadata *m = &call->metadata.metadata[i];
        if (grpc_slice_str_cmp(m->key, key) != 0)
            continue;
        size_t n = KVD_MIN(GRPC_SLICE_LENGTH(m->value), cap - 1);
        memcpy(out, GRPC_SLICE_START_PTR(m->value), n);
        out[n] = '\0';
    }
}

bool kvd_call_peer_named(const struct kvd_call *call, const struct kvd_allow *allow)
{
    bool found = false;
    grpc_auth_context *auth = grpc_call_auth_context(call->call);
    grpc_auth_property_iterator it =
        grpc_auth_context_find_properties_by_name(auth, GRPC_X509_CN_PROPERTY_NAME);
    const grpc_auth_property *p;
    while (grpc_auth_context_peer_is_authenticated(auth) &&
           (p = grpc_auth_property_iterator_next(&it)))
        for (uint32_t i = 0; i < allow->n_cns; i++)
            found |= strlen(allow->cns[i]) == p->value_length &&
                     memcmp(allow->cns[i], p->value, p->value_length) == 0;
    grpc_auth_context_release(auth);
    return found;
}

// -- streams ------------------------------------------------------------------------------------

static void stream_pump(struct kvd_call *c);

static void stream_maybe_free(struct kvd_call *c)
{
    if (c->closed && !c->sending)
        call_free(c);
}

static void on_sent(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, send_tag));
    c->sending = false;
    if (ok && !c->closed)
        stream_pump(c);
    stream_maybe_free(c);
}

static void on_closed(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, close_tag));
    (void)ok;
    c->closed = true;
    if (c->on_closed)
        c->on_closed(c);
    if (!c->finished)
        c->code = GRPC_STATUS_CANCELLED;
    account(c);
    stream_maybe_free(c);
}

// Sends the next message, or the status once all are sent.
static void stream_pump(struct kvd_call *c)
{
    grpc_op op = {0};
    if (c->sending || c->closed || c->finished)
        return;
    if (c->out_first) {
        struct kvd_out *out = c->out_first;
        c->out_first = out->next;
        if (!c->out_first)
            c->out_last = NULL;
        c->out_count--;
        if (c->reply)
            grpc_byte_buffer_destroy(c->reply);
        c->reply = out->bytes;
        free(out);
        op.op = GRPC_OP_SEND_MESSAGE;
        op.data.send_message.send_message = c->reply;
    } else if (c->finishing) {
        status_op(c, &op);
        c->finished = true;
    } else {
        return;
    }
    c->sending = true;
    tag_arm(&c->send_tag, on_sent);
    grpc_call_start_batch(c->call, &op, 1, &c->send_tag, NULL);
}

void kvd_call_send(struct kvd_call *call, const void *message)
{
    if (call->closed || call->finishing)
        return;
    struct kvd_out *out = call->out_count < KVD_EVENT_SLOTS ? calloc(1, sizeof(*out)) : NULL;
    if (!out) {
        call->lost++;
        call->d->metrics.events_lost++;
        return;
    }
    out->bytes = pack(message);
    if (call->out_last)
        call->out_last->next = out;
    else
        call->out_first = out;
    call->out_last = out;
    call->out_count++;
    stream_pump(call);
}

void kvd_call_finish(struct kvd_call *call, int code, const char *text)
{
    if (call->closed || call->finishing)
        return;
    set_message(call, code, text);
    call->finishing = true;
    stream_pump(call);
}

static void stream_begin(struct kvd_call *c)
{
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    close.data.recv_close_on_server.cancelled = &c->cancelled;
    tag_arm(&c->close_tag, on_closed);
    grpc_call_start_batch(c->call, &close, 1, &c->close_tag, NULL);
    grpc_op meta = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    c->sending = true;
    tag_arm(&c->send_tag, on_sent);
    grpc_call_start_batch(c->call, &meta, 1, &c->send_tag, NULL);
}

// -- accepting ----------------------------------------------------------------------------------

static void arm(struct kvd_daemon *d, uint32_t index);
static void arm_unknown(struct kvd_daemon *d);

static bool is_operator(struct kvd_call *c)
{
    char ticket[KVD_SECRET_TEXT];
    const struct kvd_allow *admin = &c->d->config.admin;
    kvd_call_metadata(c, "kvd-ticket", ticket, sizeof(ticket));
    struct kvd_connection *conn = ticket[0] ? kvd_fdsock_find(c->d, ticket) : NULL;
    if (!conn)
        return kvd_call_peer_named(c, admin);
    int64_t uid = kvd_connection_peer(conn).uid;
    bool ok = uid == 0 || uid == (int64_t)getuid();
    for (uint32_t i = 0; i < admin->n_uids; i++)
        ok |= uid == (int64_t)admin->uids[i];
    return ok;
}

static void handle(struct kvd_call *c)
{
    const struct kvd_method *m = c->method;
    if (m->streaming)
        stream_begin(c);
    c->request_bytes = c->payload ? grpc_byte_buffer_length(c->payload) : 0;
    c->request = unpack(m->request, c->payload);
    if (c->payload)
        grpc_byte_buffer_destroy(c->payload);
    c->payload = NULL;
    bool refuse =
        c->d->state == KVD_STOPPING || (c->d->state == KVD_DRAINING && !m->while_draining);
    if (refuse)
        kvd_call_fail(c, KVD_E_UNAVAILABLE, "kvd is shutting down; try again when it is back");
    else if (!c->request)
        kvd_call_fail(c, KVD_E_INVALID, "the request is not a %s, or has more items than kvd takes",
                      m->request->name);
    else if (m->operator_only && !is_operator(c))
        kvd_call_fail(c, KVD_E_DENIED,
                      "%s is for operators: root, the daemon's user, admin-uid or admin-cn in "
                      "kvd's configuration",
                      m->path);
    else
        m->handle(c, c->request);
}

static void on_request(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c =
        (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, request_tag));
    if (!ok || !c->call) {
        call_free(c);
        return;
    }
    if (!c->d->rpc->stopping)
        arm(c->d, c->method_index);
    c->accepted_ns = uv_hrtime();
    handle(c);
}

static struct kvd_call *call_new(struct kvd_daemon *d, void (*fire)(struct kvd_tag *, bool))
{
    struct kvd_call *c = calloc(1, sizeof(*c));
    if (!c)
        abort(); // nothing can be answered without it
    c->d = d;
    c->message = grpc_empty_slice();
    grpc_metadata_array_init(&c->metadata);
    tag_arm(&c->request_tag, fire);
    return c;
}

static void arm(struct kvd_daemon *d, uint32_t index)
{
    struct kvd_call *c = call_new(d, on_request);
    c->method = &kvd_methods[index];
    c->method_index = index;
    if (grpc_server_request_registered_call(d->rpc->server, d->rpc->registered[index], &c->call,
                                            &c->deadline, &c->metadata, &c->payload, d->rpc->cq,
                                            d->rpc->cq, &c->request_tag) != GRPC_CALL_OK)
        call_free(c);
}

static void on_unknown(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c =
        (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, request_tag));
    struct kvd_rpc *r = c->d->rpc;
    if (!ok || !c->call) {
        grpc_call_details_destroy(&r->unknown_details);
        call_free(c);
        return;
    }
    char *path = grpc_slice_to_c_string(r->unknown_details.method);
    grpc_call_details_destroy(&r->unknown_details);
    if (!r->stopping)
        arm_unknown(c->d);
    c->accepted_ns = uv_hrtime();
    kvd_call_fail(c, KVD_E_UNSUPPORTED, "kvd %s has no method %.200s", KVD_VERSION, path);
    gpr_free(path);
}

static void arm_unknown(struct kvd_daemon *d)
{
    struct kvd_rpc *r = d->rpc;
    struct kvd_call *c = call_new(d, on_unknown);
    c->method_index = KVD_MAX_METHODS - 1;
    grpc_call_details_init(&r->unknown_details);
    if (grpc_server_request_call(r->server, &c->call, &r->unknown_details, &c->metadata, r->cq,
                                 r->cq, &c->request_tag) != GRPC_CALL_OK)
        call_free(c);
}

// -- server -------------------------------------------------------------------------------------

static int read_text(const char *path, char **out, struct kvd_error *err)
{
    FILE *f KVD_FCLOSE = fopen(path, "re");
    char *text = calloc(1, 65536);
    if (!f || !text || fread(text, 1, 65535, f) == 0) {
        free(text);
        return kvd_fail(err, KVD_E_INVALID, "cannot read %s: %s", path,
                        f ? "empty" : strerror(errno));
    }
    *out = text;
    return KVD_OK;
}

static grpc_server_credentials *tls_credentials(const struct kvd_config *c, struct kvd_error *err)
{
    char *cert KVD_FREE = NULL, *key KVD_FREE = NULL, *ca KVD_FREE = NULL;
    if (read_text(c->tls_cert, &cert, err) || read_text(c->tls_key, &key, err) ||
        (c->tls_client_ca[0] && read_text(c->tls_client_ca, &ca, err)))
        return NULL;
    grpc_ssl_pem_key_cert_pair pair = {key, cert};
    grpc_ssl_client_certificate_request_type mode =
        ca ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
           : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE;
    grpc_server_credentials *creds =
        grpc_ssl_server_credentials_create_ex(ca, &pair, 1, mode, NULL);
    if (!creds)
        kvd_fail(err, KVD_E_INVALID, "the certificate %s, key %s or client-ca %s is not usable",
                 c->tls_cert, c->tls_key, c->tls_client_ca);
    return creds;
}

// Access to a unix socket: mode and group as configured.
static int own_socket(const struct kvd_config *c, const char *path, struct kvd_error *err)
{
    if (chmod(path, (mode_t)c->socket_mode))
        return kvd_fail(err, -errno, "cannot set the mode of %s: %s", path, strerror(errno));
    if (!c->socket_group[0])
        return KVD_OK;
    const struct group *gr = getgrnam(c->socket_group);
    if (!gr || chown(path, (uid_t)-1, gr->gr_gid))
        return kvd_fail(err, KVD_E_INVALID, "cannot give %s to the group %s: %s", path,
                        c->socket_group, gr ? strerror(errno) : "there is no such group");
    return KVD_OK;
}

static int add_port(struct kvd_daemon *d, const char *address, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    bool is_unix = strncmp(address, "unix:", 5) == 0;
    grpc_server_credentials *creds = is_unix || !c->tls_cert[0]
                                         ? grpc_insecure_server_credentials_create()
                                         : tls_credentials(c, err);
    if (!creds)
        return KVD_E_INVALID;
    // Nobody but us may connect before the mode is set.
    mode_t mask = umask(0177);
    int port = grpc_server_add_http2_port(d->rpc->server, address, creds);
    umask(mask);
    grpc_server_credentials_release(creds);
    if (!port)
        return kvd_fail(err, KVD_E_UNAVAILABLE,
                        "cannot listen on %s: in use, or the folder is missing or not writable",
                        address);
    return is_unix ? own_socket(c, address + 5, err) : KVD_OK;
}

int kvd_rpc_init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_rpc *r = calloc(1, sizeof(*r));
    if (!r)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->rpc = r;
    grpc_init();
    uv_mutex_init(&r->lock);
    uv_async_init(&d->loop, &r->async, on_async);
    r->async.data = d;
    // Messages that are being received, all together.
    grpc_resource_quota *quota = grpc_resource_quota_create("kvd");
    grpc_resource_quota_resize(quota, (size_t)1 << 30);
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
         .value.integer = KVD_MAX_MESSAGE},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, .value.integer = -1},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ALLOW_REUSEPORT, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_CONCURRENT_STREAMS, .value.integer = 256},
        // Compressed messages could be bombs, and K/V does not compress: identity only.
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET,
         .value.integer = 1},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION,
         .value.integer = 0},
        {.type = GRPC_ARG_POINTER,
         .key = GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {quota, grpc_resource_quota_arg_vtable()}},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ENABLE_CHANNELZ, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
         .value.integer = KVD_HELLO_TIMEOUT_MS},
    };
    grpc_channel_args channel_args = {KVD_LEN(args), args};
    r->server = grpc_server_create(&channel_args, NULL);
    grpc_resource_quota_unref(quota);
    r->cq = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(r->server, r->cq, NULL);
    for (uint32_t i = 0; i < kvd_n_methods; i++)
        r->registered[i] = grpc_server_register_method(
            r->server, kvd_methods[i].path, NULL, GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
    for (uint32_t i = 0; i < d->config.n_listen; i++) {
        int rc = add_port(d, d->config.listen[i], err);
        if (rc)
            return rc;
    }
    return KVD_OK;
}

void kvd_rpc_start(struct kvd_daemon *d)
{
    grpc_server_start(d->rpc->server);
    uv_thread_create(&d->rpc->thread, queue_thread, d);
    d->rpc->thread_running = true;
    for (uint32_t i = 0; i < kvd_n_methods; i++)
        for (int j = 0; j < ARMED; j++)
            arm(d, i);
    arm_unknown(d);
}

static void on_server_down(struct kvd_tag *tag, bool ok)
{
    struct kvd_rpc *r = (struct kvd_rpc *)((uint8_t *)tag - offsetof(struct kvd_rpc, shutdown_tag));
    (void)ok;
    grpc_completion_queue_shutdown(r->cq);
}

void kvd_rpc_shutdown(struct kvd_daemon *d, void (*on_shut)(struct kvd_daemon *d))
{
    struct kvd_rpc *r = d->rpc;
    r->stopping = true;
    r->on_shut = on_shut;
    tag_arm(&r->shutdown_tag, on_server_down);
    grpc_server_shutdown_and_notify(r->server, r->cq, &r->shutdown_tag);
    grpc_server_cancel_all_calls(r->server);
}

static void free_rpc(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(d->rpc);
    d->rpc = NULL;
}

void kvd_rpc_deinit(struct kvd_daemon *d)
{
    struct kvd_rpc *r = d->rpc;
    if (!r)
        return;
    if (r->thread_running) {
        uv_thread_join(&r->thread);
    } else {
        // Never started: shut down here, by hand.
        grpc_server_shutdown_and_notify(r->server, r->cq, &r->shutdown_tag);
        grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        grpc_completion_queue_shutdown(r->cq);
        while (grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL).type !=
               GRPC_QUEUE_SHUTDOWN)
            continue;
    }
    grpc_server_destroy(r->server);
    grpc_completion_queue_destroy(r->cq);
    grpc_shutdown();
    uv_mutex_destroy(&r->lock);
    uv_close((uv_handle_t *)&r->async, free_rpc);
}
