// Calls as they come in: requests that gRPC keeps armed, and what is looked at before a handler.
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>

#include "daemon/rpc/rpc_internal.h"

enum { UNKNOWN = KVD_MAX_METHODS - 1 }; // stands for methods that we do not have

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
    if (kvd_call_charge(c, &err))
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
        kvd_call_settle(c);
        return;
    }
    c->handling = true;
    dispatch(c);
    c->handling = false;
    if (!c->answered) {
        kvd_call_settle(c);
        kvd_call_watch(c);
    }
    kvd_call_maybe_free(c);
}

// A call without a message, which its client has mostly given up before it was read: nothing is
// prepared for an answer.
static void drop(struct kvd_tag *tag, bool ok)
{
    struct kvd_call *c =
        (struct kvd_call *)((uint8_t *)tag - offsetof(struct kvd_call, request_tag));
    (void)ok;
    struct kvd_error err = {0};
    c->code = kvd_call_charge(c, &err) ? GRPC_STATUS_RESOURCE_EXHAUSTED : GRPC_STATUS_CANCELLED;
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
        kvd_tag_later(c->d, &c->request_tag, drop);
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
    if (kvd_call_charge(c, &err) == KVD_OK)
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

void kvd_calls_arm_again(struct kvd_daemon *d)
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
