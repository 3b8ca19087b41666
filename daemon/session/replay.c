// What several handlers need: the session of a request, and replies that are remembered for
// retries.
#include "daemon/session/replay.h"

#include "daemon/rpc/rpc.h"

struct kvd_session *kvd_call_session(struct kvd_call *call, const char *secret)
{
    struct kvd_session *s = kvd_session_find(call->d, secret);
    if (!s)
        kvd_call_fail(call, KVD_E_UNAUTH,
                      "unknown session: it was closed, its lease ran out, or kvd was restarted; "
                      "open a new one");
    return s;
}

bool kvd_call_replayed(struct kvd_call *call, struct kvd_session *s, uint64_t request_id)
{
    if (request_id == 0)
        return false;
    for (size_t i = 0; i < KVD_LEN(s->replays); i++) {
        const struct kvd_replay *r = &s->replays[i];
        if (r->request_id != request_id)
            continue;
        if (r->method == call->method)
            kvd_call_reply_packed(call, r->data, r->len);
        else
            kvd_call_fail(call, KVD_E_INVALID,
                          "request_id %" PRIu64 " was used for another method; count up",
                          request_id);
        return true;
    }
    return false;
}

static void forget(struct kvd_session *s, struct kvd_replay *r)
{
    s->replay_bytes -= r->len;
    free(r->data);
    *r = (struct kvd_replay){0};
}

// Takes the oldest slot; drops more of the oldest while they are too large together.
static void remember(struct kvd_session *s, const struct kvd_method *method, uint64_t request_id,
                     const void *reply, size_t most)
{
    size_t len = protobuf_c_message_get_packed_size(reply);
    struct kvd_replay *r = &s->replays[s->next_replay];
    s->next_replay = (s->next_replay + 1) % KVD_REPLAY_SLOTS;
    forget(s, r);
    for (uint32_t i = 0; i < KVD_REPLAY_SLOTS && s->replay_bytes + len > most; i++)
        forget(s, &s->replays[(s->next_replay + i) % KVD_REPLAY_SLOTS]);
    uint8_t *data = malloc(len ? len : 1);
    if (!data)
        return;
    protobuf_c_message_pack(reply, data);
    *r = (struct kvd_replay){.request_id = request_id, .method = method, .data = data, .len = len};
    s->replay_bytes += len;
}

void kvd_call_reply_remember(struct kvd_call *call, struct kvd_session *s, uint64_t request_id,
                             const void *reply)
{
    if (request_id)
        remember(s, call->method, request_id, reply,
                 KVD_MIN(KVD_REPLAY_BYTES, KVD_REPLAY_TOTAL / (1 + call->d->n_sessions)));
    kvd_call_reply(call, reply);
}
