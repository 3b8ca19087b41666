// Streaming calls: messages wait in a list of their own and go out one at a time.
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <utlist.h>

#include "daemon/rpc/rpc_internal.h"

static void stream_pump(struct kvd_call *c);

static void stream_maybe_free(struct kvd_call *c)
{
    if (c->closed && !c->sending)
        kvd_call_free(c);
}

static void on_sent(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c = (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, send_tag));
    c->sending = false;
    kvd_call_sent(c);
    if (ok && !c->closed)
        stream_pump(c);
    if (ok && !c->closed && !c->finishing && c->on_room)
        c->on_room(c);
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
    kvd_call_account(c);
    stream_maybe_free(c);
}

// Sends the next message, or the status once all are sent.
static void stream_pump(struct kvd_call *c)
{
    grpc_op op = {0};
    if (c->sending || c->closed || c->finished)
        return;
    if (c->out) {
        struct kvd_out *out = c->out;
        DL_DELETE2(c->out, out, previous, next);
        c->out_count--;
        kvd_call_unreserve(c, grpc_byte_buffer_length(out->bytes));
        if (c->reply)
            grpc_byte_buffer_destroy(c->reply);
        c->reply = out->bytes;
        free(out);
        op.op = GRPC_OP_SEND_MESSAGE;
        op.data.send_message.send_message = c->reply;
    } else if (c->finishing) {
        kvd_call_status_op(c, &op);
        c->finished = true;
    } else {
        return;
    }
    c->sending = true;
    kvd_call_sending(c);
    kvd_tag_arm(&c->send_tag, on_sent);
    grpc_call_start_batch(c->call, &op, 1, &c->send_tag, NULL);
}

// Room in the line for a message of n bytes. NULL: there is none.
static struct kvd_out *take_place(struct kvd_call *call, size_t n)
{
    struct kvd_out *out = call->out_count < KVD_STREAM_SLOTS ? calloc(1, sizeof(*out)) : NULL;
    if (!out || kvd_call_reserve(call, n, NULL)) {
        free(out);
        return NULL;
    }
    DL_APPEND2(call->out, out, previous, next);
    call->out_count++;
    return out;
}

bool kvd_call_send(struct kvd_call *call, const void *message)
{
    if (call->closed || call->finishing)
        return true;
    struct kvd_out *out = take_place(call, protobuf_c_message_get_packed_size(message));
    if (!out)
        return false;
    out->bytes = kvd_message_pack(message);
    stream_pump(call);
    return true;
}

bool kvd_call_send_packed(struct kvd_call *call, const uint8_t *data, size_t len)
{
    if (call->closed || call->finishing)
        return true;
    struct kvd_out *out = take_place(call, len);
    if (!out)
        return false;
    out->bytes = kvd_message_wrap(grpc_slice_from_copied_buffer((const char *)data, len));
    stream_pump(call);
    return true;
}

void kvd_call_finish(struct kvd_call *call, int code, const char *text)
{
    if (call->closed || call->finishing)
        return;
    kvd_call_set_message(call, code, text);
    call->finishing = true;
    stream_pump(call);
}

void kvd_stream_begin(struct kvd_call *c)
{
    grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
    close.data.recv_close_on_server.cancelled = &c->cancelled;
    kvd_tag_arm(&c->close_tag, on_closed);
    grpc_call_start_batch(c->call, &close, 1, &c->close_tag, NULL);
    grpc_op meta = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    c->sending = true;
    kvd_tag_arm(&c->send_tag, on_sent);
    grpc_call_start_batch(c->call, &meta, 1, &c->send_tag, NULL);
}
