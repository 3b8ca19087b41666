// Unary calls: their one answer, and their end.
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>

#include "daemon/core/lifecycle.h"
#include "daemon/rpc/rpc_internal.h"

enum { SMALL_REPLY = 64 << 10 };

void kvd_call_maybe_free(struct kvd_call *c)
{
    if (c->done && (!c->watched || c->closed) && !c->handling)
        kvd_call_free(c);
}

static void on_done(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, done_tag));
    (void)ok;
    c->done = true;
    kvd_call_maybe_free(c);
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
    kvd_call_maybe_free(c);
}

void kvd_call_watch(struct kvd_call *c)
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
        kvd_call_maybe_free(c);
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
    if (err->code == KVD_E_INTERNAL)
        kvd_daemon_check_device(call->d);
    if (err->code < 0 || err->code == KVD_E_INTERNAL)
        kvd_error("call failed method=%s error=%s", call->method ? call->method->path : "unknown",
                  err->text);
    kvd_call_set_message(call, err->code, err->text);
    answer(call);
}
