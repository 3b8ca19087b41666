#include <grpc/byte_buffer.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <utlist.h>

#include "daemon/rpc/links.h"
#include "daemon/rpc/rpc_internal.h"

enum {
    SMALL_REPLY = 64 << 10,
    UNKNOWN = KVD_MAX_METHODS - 1, // stands for methods that we do not have
};

// -- what a call may take -----------------------------------------------------------------------

static int charge(struct kvd_call *c, struct kvd_error *err)
{
    c->link = kvd_link_of(c->d, c->call);
    c->unsettled = c->link != NULL;
    if (kvd_link_begin_call(c->link, err))
        return err->code;
    c->counted = true;
    struct kvd_user *user =
        kvd_user_ref(c->d, c->link ? kvd_link_uid(c->link) : (int64_t)KVD_USER_UNKNOWN);
    int rc = user ? kvd_user_take(user, KVD_SHARE_CALLS, 1, err)
                  : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc)
        kvd_user_unref(&user);
    c->user = user;
    return rc;
}

// The loop is done with a call for now.
static void settle(struct kvd_call *c)
{
    if (c->unsettled)
        kvd_link_settle_call(c->link);
    c->unsettled = false;
}

static void release(struct kvd_call *c)
{
    settle(c);
    if (c->user) {
        kvd_user_give(c->user, KVD_SHARE_REPLY_BYTES, c->reply_bytes);
        kvd_user_give(c->user, KVD_SHARE_CALLS, 1);
    }
    kvd_link_end_call(c->link, c->counted);
    kvd_link_give(c->link, c->reply_bytes);
    kvd_user_unref(&c->user);
    kvd_link_unref(&c->link);
}

int kvd_call_reserve(struct kvd_call *c, size_t n, struct kvd_error *err)
{
    int rc = c->user ? kvd_link_take(c->link, n, err) : KVD_OK;
    if (rc || !c->user)
        return rc;
    rc = kvd_user_take(c->user, KVD_SHARE_REPLY_BYTES, n, err);
    if (rc)
        kvd_link_give(c->link, n);
    else
        c->reply_bytes += n;
    return rc;
}

void kvd_call_unreserve(struct kvd_call *c, size_t n)
{
    if (!c->user)
        return;
    kvd_user_give(c->user, KVD_SHARE_REPLY_BYTES, n);
    kvd_link_give(c->link, n);
    c->reply_bytes -= n;
}

void kvd_call_sending(struct kvd_call *c)
{
    if (c->sending_ms)
        return;
    c->sending_ms = kvd_now_ms(c->d);
    DL_APPEND2(c->d->rpc->unread, c, previous_unread, next_unread);
}

void kvd_call_sent(struct kvd_call *c)
{
    if (!c->sending_ms)
        return;
    c->sending_ms = 0;
    DL_DELETE2(c->d->rpc->unread, c, previous_unread, next_unread);
}

static void give_up_unread(struct kvd_daemon *d)
{
    struct kvd_call *c, *next;
    DL_FOREACH_SAFE2(d->rpc->unread, c, next, next_unread)
    {
        if (kvd_now_ms(d) - c->sending_ms < d->config.reply_timeout_ms)
            return; // those behind it are younger
        kvd_call_sent(c);
        if (c->method && c->method->streaming)
            grpc_call_cancel_with_status(c->call, GRPC_STATUS_RESOURCE_EXHAUSTED,
                                         "the stream was not read for longer than reply-timeout",
                                         NULL);
        else if (c->link)
            kvd_link_cut(c->link, "it does not read its replies");
        else
            grpc_call_cancel(c->call, NULL);
    }
}

// Arms what could not be when memory was short.
static void arm_again(struct kvd_daemon *d)
{
    uint32_t unarmed[KVD_MAX_METHODS];
    memcpy(unarmed, d->rpc->unarmed, sizeof(unarmed));
    memset(d->rpc->unarmed, 0, sizeof(unarmed));
    for (uint32_t i = 0; i < UNKNOWN; i++)
        for (uint32_t n = 0; n < unarmed[i]; n++)
            kvd_call_arm(d, i);
    if (unarmed[UNKNOWN])
        kvd_call_arm_unknown(d);
}

void kvd_rpc_tick(struct kvd_daemon *d)
{
    if (!d->rpc->stopping)
        arm_again(d);
    give_up_unread(d);
}

// -- the life of a call -------------------------------------------------------------------------

void kvd_call_free(struct kvd_call *c)
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
    kvd_call_sent(c);
    release(c);
    grpc_slice_unref(c->message);
    grpc_metadata_array_destroy(&c->metadata);
    if (c->call)
        grpc_call_unref(c->call);
    free(c);
}

void kvd_call_account(struct kvd_call *c)
{
    struct kvd_metrics *m = &c->d->metrics;
    m->calls[c->method_index][c->code]++;
    kvd_histogram_add(&m->rpc[c->method_index], uv_hrtime() - c->accepted_ns);
    kvd_debug("call method=%s code=%s us=%llu", c->method ? c->method->path : "unknown",
              kvd_grpc_code_name(c->code),
              (unsigned long long)(uv_hrtime() - c->accepted_ns) / 1000);
}

// A call lives as long as gRPC has a tag of it, or its handler has not returned.
static void maybe_free(struct kvd_call *c)
{
    if (c->done && (!c->watched || c->closed) && !c->handling)
        kvd_call_free(c);
}

static void on_done(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, done_tag));
    (void)ok;
    c->done = true;
    maybe_free(c);
}

static void on_closed(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, close_tag));
    (void)ok;
    c->closed = true;
    if (!c->answered && c->on_cancelled) {
        void (*hook)(struct kvd_call *) = c->on_cancelled;
        c->on_cancelled = NULL;
        hook(c);
    }
    maybe_free(c);
}

// A call that is not answered at once is told when its client goes away.
static void watch(struct kvd_call *c)
{
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    close.data.recv_close_on_server.cancelled = &c->cancelled;
    c->watched = true;
    kvd_tag_arm(&c->close_tag, on_closed);
    if (grpc_call_start_batch(c->call, &close, 1, &c->close_tag, NULL) != GRPC_CALL_OK) {
        kvd_error("grpc refused to watch a call method=%s", c->method->path);
        c->watched = false;
    }
}

grpc_op *kvd_call_status_op(struct kvd_call *c, grpc_op *op)
{
    *op = (grpc_op){.op = GRPC_OP_SEND_STATUS_FROM_SERVER};
    op->data.send_status_from_server.status = c->code;
    op->data.send_status_from_server.status_details = &c->message;
    return op + 1;
}

void kvd_call_set_message(struct kvd_call *c, int code, const char *text)
{
    c->code = kvd_status_to_grpc(code);
    grpc_slice_unref(c->message);
    c->message = grpc_slice_from_copied_string(text);
}

// A reply of some size must have been reserved, or find room now. Small ones always go out: as many
// as there are calls, and some tell of what cannot be undone.
static void bound_reply(struct kvd_call *c)
{
    struct kvd_error err = {0};
    size_t n = grpc_byte_buffer_length(c->reply);
    if (n <= SMALL_REPLY || n <= c->reply_bytes ||
        kvd_call_reserve(c, n - c->reply_bytes, &err) == KVD_OK)
        return;
    grpc_byte_buffer_destroy(c->reply);
    c->reply = NULL;
    kvd_call_set_message(c, err.code, err.text);
}

// Starts the one batch that answers a unary call.
static void answer(struct kvd_call *c)
{
    grpc_op ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA}};
    grpc_op *op = ops + 1;
    c->answered = true;
    if (c->reply)
        bound_reply(c);
    if (c->closed) { // nobody will read it
        c->code = kvd_call_expired(c) ? GRPC_STATUS_DEADLINE_EXCEEDED : GRPC_STATUS_CANCELLED;
        if (c->reply)
            grpc_byte_buffer_destroy(c->reply);
        c->reply = NULL;
    }
    kvd_call_account(c);
    if (c->reply) {
        *op = (grpc_op){.op = GRPC_OP_SEND_MESSAGE};
        op->data.send_message.send_message = c->reply;
        op++;
    }
    op = kvd_call_status_op(c, op);
    if (!c->watched) {
        *op = (grpc_op){.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
        op->data.recv_close_on_server.cancelled = &c->cancelled;
        op++;
    }
    kvd_call_sending(c);
    kvd_tag_arm(&c->done_tag, on_done);
    if (grpc_call_start_batch(c->call, ops, (size_t)(op - ops), &c->done_tag, NULL) !=
        GRPC_CALL_OK) {
        kvd_error("grpc refused a batch method=%s", c->method ? c->method->path : "unknown");
        grpc_call_cancel(c->call, NULL);
        c->done = true;
        maybe_free(c);
    }
}

void kvd_call_reply(struct kvd_call *call, const void *reply)
{
    call->reply = kvd_message_pack(reply);
    answer(call);
}

void kvd_call_reply_packed(struct kvd_call *call, const uint8_t *data, size_t len)
{
    call->reply = kvd_message_wrap(grpc_slice_from_copied_buffer((const char *)data, len));
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
    struct kvd_metrics *m = &call->d->metrics;
    m->refused[KVD_REFUSED_POOL] += err->code == KVD_E_FULL;
    m->refused[KVD_REFUSED_QUOTA] += err->code == KVD_E_QUOTA;
    m->refused[KVD_REFUSED_LIMIT] += err->code == KVD_E_LIMIT;
    if (call->method && call->method->streaming) {
        kvd_call_finish(call, err->code, err->text);
        return;
    }
    if (err->code < 0 || err->code == KVD_E_INTERNAL)
        kvd_error("call failed method=%s error=%s", call->method ? call->method->path : "unknown",
                  err->text);
    kvd_call_set_message(call, err->code, err->text);
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
    if (!auth) // a connection that kvd accepted: no TLS, no names
        return false;
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

// -- accepting ----------------------------------------------------------------------------------

static void dispatch(struct kvd_call *c)
{
    const struct kvd_method *m = c->method;
    c->request_bytes = c->payload ? grpc_byte_buffer_length(c->payload) : 0;
    struct kvd_error malformed = {0};
    c->request = kvd_message_unpack(m->request, c->payload, &malformed);
    if (c->payload)
        grpc_byte_buffer_destroy(c->payload);
    c->payload = NULL;
    bool refuse =
        c->d->state == KVD_STOPPING || (c->d->state == KVD_DRAINING && !m->while_draining);
    struct kvd_error err = {0};
    if (charge(c, &err))
        kvd_call_fail_error(c, &err);
    else if (refuse)
        kvd_call_fail(c, KVD_E_UNAVAILABLE, "kvd is shutting down; try again when it is back");
    else if (!c->request)
        kvd_call_fail_error(c, &malformed);
    else if (m->only && !m->only(c))
        kvd_call_fail(c, KVD_E_DENIED,
                      "%s is for operators: root, the daemon's user, admin-uid or admin-cn in "
                      "kvd's configuration",
                      m->path);
    else if (kvd_request_check(c->request, &err))
        kvd_call_fail_error(c, &err);
    else
        m->handle(c, c->request);
}

static void handle(struct kvd_call *c)
{
    if (c->method->streaming) {
        kvd_stream_begin(c);
        dispatch(c);
        settle(c);
        return;
    }
    c->handling = true;
    dispatch(c);
    c->handling = false;
    if (!c->answered) {
        settle(c);
        watch(c);
    }
    maybe_free(c);
}

// A call without a message, which its client has mostly given up before it was read: nothing is
// prepared for an answer.
static void drop(struct kvd_call *c)
{
    struct kvd_error err = {0};
    c->code = charge(c, &err) ? GRPC_STATUS_RESOURCE_EXHAUSTED : GRPC_STATUS_CANCELLED;
    grpc_call_cancel_with_status(c->call, c->code, err.code ? err.text : "no message came", NULL);
    kvd_call_account(c);
    kvd_call_free(c);
}

static void on_request(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c =
        (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, request_tag));
    if (!ok || !c->call) {
        kvd_call_free(c);
        return;
    }
    if (!c->d->rpc->stopping)
        kvd_call_arm(c->d, c->method_index);
    c->accepted_ns = uv_hrtime();
    if (c->payload)
        handle(c);
    else
        drop(c);
}

// NULL when memory is short: what was not armed is tried again once a second, and until then calls
// wait inside gRPC.
static struct kvd_call *call_new(struct kvd_daemon *d, uint32_t index,
                                 void (*fire)(struct kvd_tag *, bool))
{
    struct kvd_call *c = calloc(1, sizeof(*c));
    if (!c) {
        d->rpc->unarmed[index]++;
        return NULL;
    }
    c->d = d;
    c->message = grpc_empty_slice();
    c->method_index = index;
    grpc_metadata_array_init(&c->metadata);
    kvd_tag_arm(&c->request_tag, fire);
    return c;
}

void kvd_call_arm(struct kvd_daemon *d, uint32_t index)
{
    struct kvd_call *c = call_new(d, index, on_request);
    if (!c)
        return;
    c->method = &d->methods[index];
    if (grpc_server_request_registered_call(d->rpc->server, d->rpc->registered[index], &c->call,
                                            &c->deadline, &c->metadata, &c->payload, d->rpc->cq,
                                            d->rpc->cq, &c->request_tag) != GRPC_CALL_OK)
        kvd_call_free(c);
}

static void on_unknown(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c =
        (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, request_tag));
    struct kvd_rpc *r = c->d->rpc;
    if (!ok || !c->call) {
        grpc_call_details_destroy(&r->unknown_details);
        kvd_call_free(c);
        return;
    }
    char *path = grpc_slice_to_c_string(r->unknown_details.method);
    grpc_call_details_destroy(&r->unknown_details);
    if (!r->stopping)
        kvd_call_arm_unknown(c->d);
    c->accepted_ns = uv_hrtime();
    struct kvd_error err = {0};
    if (charge(c, &err) == KVD_OK)
        kvd_fail(&err, KVD_E_UNSUPPORTED, "kvd %s has no method %.200s", kvd_build_version(), path);
    kvd_call_fail_error(c, &err);
    gpr_free(path);
}

void kvd_call_arm_unknown(struct kvd_daemon *d)
{
    struct kvd_rpc *r = d->rpc;
    struct kvd_call *c = call_new(d, UNKNOWN, on_unknown);
    if (!c)
        return;
    grpc_call_details_init(&r->unknown_details);
    if (grpc_server_request_call(r->server, &c->call, &r->unknown_details, &c->metadata, r->cq,
                                 r->cq, &c->request_tag) != GRPC_CALL_OK)
        kvd_call_free(c);
}
