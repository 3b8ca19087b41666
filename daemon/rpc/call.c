// Calls: what they may take, and what all kinds of them consist of.
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <utlist.h>

#include "daemon/rpc/links.h"
#include "daemon/rpc/rpc_internal.h"

int kvd_call_charge(struct kvd_call *c, struct kvd_error *err)
{
    c->link = kvd_link_of(c->d, c->call);
    if (!c->link)
        return kvd_fail(err, KVD_E_INTERNAL, "the call came by no connection of ours");
    c->unsettled = true;
    if (kvd_link_begin_call(c->link, err))
        return err->code;
    c->counted = true;
    struct kvd_user *user = kvd_user_ref(c->d, kvd_link_uid(c->link));
    int rc = user ? kvd_user_take(user, KVD_SHARE_CALLS, 1, err)
                  : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc)
        kvd_user_unref(&user);
    c->user = user;
    return rc;
}

void kvd_call_settle(struct kvd_call *c)
{
    if (c->unsettled)
        kvd_link_settle_call(c->link);
    c->unsettled = false;
}

static void release(struct kvd_call *c)
{
    kvd_call_settle(c);
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

void kvd_calls_give_up_unread(struct kvd_daemon *d)
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
    }
}

void kvd_call_free(struct kvd_call *c)
{
    struct kvd_out *out, *next;
    DL_FOREACH_SAFE2(c->out, out, next, next)
    {
        grpc_byte_buffer_destroy(out->bytes);
        free(out);
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
    kvd_debug("call method=%s code=%s us=%" PRIu64, c->method ? c->method->path : "unknown",
              kvd_grpc_code_name(c->code), (uv_hrtime() - c->accepted_ns) / 1000);
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
    const char *name = call->link ? kvd_link_name(call->link) : "";
    bool found = false;
    for (uint32_t i = 0; *name && i < allow->n_cns; i++)
        found |= strcmp(allow->cns[i], name) == 0;
    return found;
}
