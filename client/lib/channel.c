#include "client/lib/channel.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <pthread.h>

struct connection {
    grpc_channel *channel;
    uint32_t users; // calls, streams, and the channel whose latest it is
    bool stale;     // broken, and gRPC would take its time to try again
};

struct kvd_channel {
    grpc_channel_credentials *creds;
    char *address, *server_name;
    pthread_mutex_t lock;
    struct connection *now;
    grpc_completion_queue *idle[16]; // queues between calls
    uint32_t n_idle;
    char ticket[33];
};

struct kvd_stream {
    struct kvd_channel *owner;
    struct connection *connection;
    grpc_call *call;
    grpc_completion_queue *cq;
    grpc_metadata_array meta, trailing;
    grpc_byte_buffer *request, *message;
    grpc_status_code code;
    grpc_slice details;
    bool started, receiving, ended;
};

static char tag_start, tag_status, tag_message;

enum { MAX_PEM = 4 << 20 };

static int from_grpc(grpc_status_code code)
{
    switch (code) {
    case GRPC_STATUS_OK:
        return KVD_OK;
    case GRPC_STATUS_INVALID_ARGUMENT:
    case GRPC_STATUS_OUT_OF_RANGE:
        return KVD_E_INVALID;
    case GRPC_STATUS_NOT_FOUND:
        return KVD_E_NOT_FOUND;
    case GRPC_STATUS_ALREADY_EXISTS:
        return KVD_E_EXISTS;
    case GRPC_STATUS_FAILED_PRECONDITION:
        return KVD_E_PRECONDITION;
    case GRPC_STATUS_RESOURCE_EXHAUSTED:
        return KVD_E_LIMIT;
    case GRPC_STATUS_PERMISSION_DENIED:
        return KVD_E_DENIED;
    case GRPC_STATUS_UNAUTHENTICATED:
        return KVD_E_UNAUTH;
    case GRPC_STATUS_UNAVAILABLE:
    case GRPC_STATUS_CANCELLED:
        return KVD_E_UNAVAILABLE;
    case GRPC_STATUS_DEADLINE_EXCEEDED:
        return KVD_E_TIMEOUT;
    case GRPC_STATUS_DATA_LOSS:
        return KVD_E_CORRUPT;
    case GRPC_STATUS_UNIMPLEMENTED:
        return KVD_E_UNSUPPORTED;
    case GRPC_STATUS_ABORTED:
        return KVD_E_LOST;
    default:
        return KVD_E_INTERNAL;
    }
}

int kvd_channel_check(const struct kvd_channel_options *o, struct kvd_error *err)
{
    if (!o->tls_cert != !o->tls_key)
        return kvd_fail(err, KVD_E_INVALID,
                        "tls_cert and tls_key are given together or not at all");
    if (!o->tls_ca && (o->tls_cert || o->tls_server_name))
        return kvd_fail(err, KVD_E_INVALID,
                        "TLS wants tls_ca: who may have signed the daemon's certificate");
    if (o->tls_ca && strncmp(o->address, "unix:", 5) == 0)
        return kvd_fail(err, KVD_E_INVALID, "TLS is for host:port, not for %s", o->address);
    return KVD_OK;
}

static int read_pem(const char *path, char **out, struct kvd_error *err)
{
    FILE *f KVD_FCLOSE = fopen(path, "re");
    char *text = f ? calloc(1, MAX_PEM + 1) : NULL;
    size_t n = text ? fread(text, 1, MAX_PEM, f) : 0;
    if (n == 0 || n == MAX_PEM) {
        free(text);
        return kvd_fail(err, KVD_E_INVALID,
                        n ? "%s has more than 4 MiB" : "cannot read %s, or it is empty", path);
    }
    *out = text;
    return KVD_OK;
}

static grpc_channel_credentials *credentials(const struct kvd_channel_options *o,
                                             struct kvd_error *err)
{
    char *ca KVD_FREE = NULL, *cert KVD_FREE = NULL, *key KVD_FREE = NULL;
    if (!o->tls_ca)
        return grpc_insecure_credentials_create();
    if (read_pem(o->tls_ca, &ca, err) || (o->tls_cert && read_pem(o->tls_cert, &cert, err)) ||
        (o->tls_key && read_pem(o->tls_key, &key, err)))
        return NULL;
    grpc_ssl_pem_key_cert_pair pair = {key, cert};
    return grpc_ssl_credentials_create_ex(ca, cert ? &pair : NULL, NULL, NULL);
}

static grpc_channel *make_channel(const struct kvd_channel *c)
{
    grpc_arg args[] = {
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, .value.integer = -1},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, .value.integer = -1},
        // Despite its name, how long one attempt to connect may take.
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
         .value.integer = 10000},
        // For streams; calls do not wait for these, see kvd_channel_call.
        {.type = GRPC_ARG_INTEGER,
         .key = GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS,
         .value.integer = 100},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, .value.integer = 100},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_ENABLE_HTTP_PROXY, .value.integer = 0},
        {.type = GRPC_ARG_INTEGER, .key = GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, .value.integer = 1},
        // The last one is only there with a name.
        {.type = GRPC_ARG_STRING,
         .key = GRPC_SSL_TARGET_NAME_OVERRIDE_ARG,
         .value.string = c->server_name},
    };
    grpc_channel_args channel_args = {KVD_LEN(args) - (c->server_name ? 0 : 1), args};
    return grpc_channel_create(c->address, c->creds, &channel_args);
}

static void names_free(struct kvd_channel *c)
{
    free(c->address);
    free(c->server_name);
}

struct kvd_channel *kvd_channel_new(const struct kvd_channel_options *o, struct kvd_error *err)
{
    struct kvd_channel *c = calloc(1, sizeof(*c));
    if (c) {
        c->address = strdup(o->address);
        c->server_name = o->tls_server_name ? strdup(o->tls_server_name) : NULL;
    }
    if (!c || !c->address || !c->server_name != !o->tls_server_name) {
        if (c)
            names_free(c);
        free(c);
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    grpc_init();
    c->creds = credentials(o, err);
    if (!c->creds) {
        grpc_shutdown();
        names_free(c);
        free(c);
        return NULL;
    }
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

static void give_connection(struct kvd_channel *c, struct connection *k)
{
    if (!k)
        return;
    pthread_mutex_lock(&c->lock);
    bool last = --k->users == 0;
    pthread_mutex_unlock(&c->lock);
    if (last) {
        grpc_channel_destroy(k->channel);
        free(k);
    }
}

void kvd_channel_free(struct kvd_channel **cp)
{
    struct kvd_channel *c = KVD_TAKE(*cp);
    if (!c)
        return;
    for (uint32_t i = 0; i < c->n_idle; i++) {
        grpc_completion_queue_shutdown(c->idle[i]);
        grpc_completion_queue_destroy(c->idle[i]);
    }
    give_connection(c, c->now);
    grpc_channel_credentials_release(c->creds);
    pthread_mutex_destroy(&c->lock);
    names_free(c);
    free(c);
    grpc_shutdown_blocking(); // whoever forks now finds none of its threads at work
}

void kvd_channel_set_ticket(struct kvd_channel *c, const char *ticket)
{
    snprintf(c->ticket, sizeof(c->ticket), "%s", ticket ? ticket : "");
}

static grpc_completion_queue *take_queue(struct kvd_channel *c)
{
    pthread_mutex_lock(&c->lock);
    grpc_completion_queue *cq = c->n_idle ? c->idle[--c->n_idle] : NULL;
    pthread_mutex_unlock(&c->lock);
    return cq ? cq : grpc_completion_queue_create_for_pluck(NULL);
}

static void give_queue(struct kvd_channel *c, grpc_completion_queue *cq)
{
    pthread_mutex_lock(&c->lock);
    bool keep = c->n_idle < KVD_LEN(c->idle);
    if (keep)
        c->idle[c->n_idle++] = cq;
    pthread_mutex_unlock(&c->lock);
    if (!keep) {
        grpc_completion_queue_shutdown(cq);
        grpc_completion_queue_destroy(cq);
    }
}

static gpr_timespec deadline_in(uint32_t ms)
{
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(ms, GPR_TIMESPAN));
}

static grpc_byte_buffer *pack(const ProtobufCMessage *m)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(m));
    protobuf_c_message_pack(m, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return b;
}

static ProtobufCMessage *unpack(const ProtobufCMessageDescriptor *type, grpc_byte_buffer *b)
{
    grpc_byte_buffer_reader reader;
    if (!b || !grpc_byte_buffer_reader_init(&reader, b))
        return NULL;
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    ProtobufCMessage *m =
        protobuf_c_message_unpack(type, NULL, GRPC_SLICE_LENGTH(all), GRPC_SLICE_START_PTR(all));
    grpc_slice_unref(all);
    grpc_byte_buffer_reader_destroy(&reader);
    return m;
}

// A connection that failed is made anew by the next call, at once: gRPC would back off, or go on
// waiting for one that accepts and says nothing, when the daemon has long been back. Calls under
// way keep the one that they use.
static struct connection *take_connection(struct kvd_channel *c)
{
    struct connection *old = NULL, *now;
    pthread_mutex_lock(&c->lock);
    if (!c->now || c->now->stale) {
        struct connection *made = calloc(1, sizeof(*made));
        if (made) {
            *made = (struct connection){.channel = make_channel(c), .users = 1};
            old = c->now;
            c->now = made;
        }
    }
    now = c->now;
    if (now)
        now->users++;
    pthread_mutex_unlock(&c->lock);
    give_connection(c, old);
    return now;
}

static grpc_call *start_call(struct connection *k, grpc_completion_queue *cq, const char *method,
                             gpr_timespec deadline)
{
    return grpc_channel_create_call(k->channel, NULL, GRPC_PROPAGATE_DEFAULTS, cq,
                                    grpc_slice_from_static_string(method), NULL, deadline, NULL);
}

static void note_failure(struct kvd_channel *c, struct connection *k, grpc_status_code code)
{
    if (code != GRPC_STATUS_UNAVAILABLE && code != GRPC_STATUS_DEADLINE_EXCEEDED)
        return;
    // A daemon that answers so by itself keeps its connection.
    bool stale = grpc_channel_check_connectivity_state(k->channel, 0) != GRPC_CHANNEL_READY;
    pthread_mutex_lock(&c->lock);
    k->stale |= stale;
    pthread_mutex_unlock(&c->lock);
}

bool kvd_channel_connected(struct kvd_channel *c)
{
    pthread_mutex_lock(&c->lock);
    bool there = c->now && !c->now->stale &&
                 grpc_channel_check_connectivity_state(c->now->channel, 0) == GRPC_CHANNEL_READY;
    pthread_mutex_unlock(&c->lock);
    return there;
}

static size_t ticket_metadata(const struct kvd_channel *c, grpc_metadata *m)
{
    *m = (grpc_metadata){.key = grpc_slice_from_static_string("kvd-ticket"),
                         .value = grpc_slice_from_static_buffer(c->ticket, strlen(c->ticket))};
    return c->ticket[0] ? 1 : 0;
}

static int explain(grpc_status_code code, grpc_slice details, struct kvd_error *err)
{
    int len = (int)GRPC_SLICE_LENGTH(details);
    return kvd_fail(err, from_grpc(code), "%.*s", len, (const char *)GRPC_SLICE_START_PTR(details));
}

int kvd_channel_call(struct kvd_channel *c, const char *method, const void *request,
                     const ProtobufCMessageDescriptor *reply_type, uint32_t timeout_ms, void *reply,
                     struct kvd_error *err)
{
    struct connection *k = take_connection(c);
    if (!k)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    grpc_completion_queue *cq = take_queue(c);
    grpc_call *call = start_call(k, cq, method, deadline_in(timeout_ms));
    grpc_metadata_array initial, trailing;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    grpc_byte_buffer *out = pack(request), *in = NULL;
    grpc_status_code code;
    grpc_slice details;
    grpc_metadata ticket;
    grpc_op ops[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},  {.op = GRPC_OP_SEND_MESSAGE},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, {.op = GRPC_OP_RECV_INITIAL_METADATA},
        {.op = GRPC_OP_RECV_MESSAGE},           {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};
    ops[0].data.send_initial_metadata.count = ticket_metadata(c, &ticket);
    ops[0].data.send_initial_metadata.metadata = &ticket;
    ops[1].data.send_message.send_message = out;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &initial;
    ops[4].data.recv_message.recv_message = &in;
    ops[5].data.recv_status_on_client.trailing_metadata = &trailing;
    ops[5].data.recv_status_on_client.status = &code;
    ops[5].data.recv_status_on_client.status_details = &details;
    int rc = KVD_OK;
    if (grpc_call_start_batch(call, ops, 6, &tag_start, NULL) != GRPC_CALL_OK) {
        rc = kvd_fail(err, KVD_E_INTERNAL, "gRPC refused the call %s", method);
    } else {
        grpc_completion_queue_pluck(cq, &tag_start, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        ProtobufCMessage *m = code == GRPC_STATUS_OK ? unpack(reply_type, in) : NULL;
        note_failure(c, k, code);
        if (code != GRPC_STATUS_OK)
            rc = explain(code, details, err);
        else if (!m)
            rc = kvd_fail(err, KVD_E_INTERNAL, "the reply to %s is malformed", method);
        else
            *(ProtobufCMessage **)reply = m;
        grpc_slice_unref(details);
    }
    grpc_byte_buffer_destroy(out);
    if (in)
        grpc_byte_buffer_destroy(in);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_call_unref(call);
    give_queue(c, cq);
    give_connection(c, k);
    return rc;
}

struct kvd_stream *kvd_stream_open(struct kvd_channel *c, const char *method, const void *request,
                                   struct kvd_error *err)
{
    struct kvd_stream *s = calloc(1, sizeof(*s));
    struct connection *k = s ? take_connection(c) : NULL;
    if (!k) {
        free(s);
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    s->owner = c;
    s->connection = k;
    s->cq = grpc_completion_queue_create_for_pluck(NULL);
    s->call = start_call(k, s->cq, method, gpr_inf_future(GPR_CLOCK_MONOTONIC));
    s->details = grpc_empty_slice();
    grpc_metadata_array_init(&s->meta);
    grpc_metadata_array_init(&s->trailing);
    s->request = pack(request);
    grpc_metadata ticket;
    grpc_op ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                      {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
                      {.op = GRPC_OP_RECV_INITIAL_METADATA}};
    ops[0].data.send_initial_metadata.count = ticket_metadata(c, &ticket);
    ops[0].data.send_initial_metadata.metadata = &ticket;
    ops[1].data.send_message.send_message = s->request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &s->meta;
    grpc_op status = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT};
    status.data.recv_status_on_client.trailing_metadata = &s->trailing;
    status.data.recv_status_on_client.status = &s->code;
    status.data.recv_status_on_client.status_details = &s->details;
    grpc_call_start_batch(s->call, &status, 1, &tag_status, NULL);
    s->started = grpc_call_start_batch(s->call, ops, 4, &tag_start, NULL) == GRPC_CALL_OK;
    return s;
}

int kvd_stream_next(struct kvd_stream *s, const ProtobufCMessageDescriptor *type,
                    uint32_t timeout_ms, void *out, struct kvd_error *err)
{
    if (!s->receiving) {
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE};
        op.data.recv_message.recv_message = &s->message;
        grpc_call_start_batch(s->call, &op, 1, &tag_message, NULL);
        s->receiving = true;
    }
    grpc_event e = grpc_completion_queue_pluck(s->cq, &tag_message, deadline_in(timeout_ms), NULL);
    if (e.type == GRPC_QUEUE_TIMEOUT)
        return kvd_fail(err, KVD_E_TIMEOUT, "nothing came within %u ms", timeout_ms);
    s->receiving = false;
    if (!s->message) {
        if (!s->ended)
            grpc_completion_queue_pluck(s->cq, &tag_status, gpr_inf_future(GPR_CLOCK_REALTIME),
                                        NULL);
        s->ended = true;
        note_failure(s->owner, s->connection, s->code);
        explain(s->code, s->details, err);
        return KVD_E_LOST;
    }
    ProtobufCMessage *m = unpack(type, s->message);
    grpc_byte_buffer_destroy(s->message);
    s->message = NULL;
    if (!m)
        return kvd_fail(err, KVD_E_INTERNAL, "a message of the stream is malformed");
    *(ProtobufCMessage **)out = m;
    return KVD_OK;
}

void kvd_stream_free(struct kvd_stream **sp)
{
    struct kvd_stream *s = KVD_TAKE(*sp);
    if (!s)
        return;
    grpc_call_cancel(s->call, NULL);
    if (!s->ended)
        grpc_completion_queue_pluck(s->cq, &tag_status, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    if (s->receiving)
        grpc_completion_queue_pluck(s->cq, &tag_message, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    if (s->started)
        grpc_completion_queue_pluck(s->cq, &tag_start, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    grpc_byte_buffer_destroy(s->request);
    if (s->message)
        grpc_byte_buffer_destroy(s->message);
    grpc_slice_unref(s->details);
    grpc_metadata_array_destroy(&s->meta);
    grpc_metadata_array_destroy(&s->trailing);
    grpc_call_unref(s->call);
    grpc_completion_queue_shutdown(s->cq);
    grpc_completion_queue_destroy(s->cq);
    give_connection(s->owner, s->connection);
    free(s);
}
