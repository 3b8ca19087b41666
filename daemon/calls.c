// What several handlers need: the session of a request, and replies that are remembered for
// retries.
#include "daemon/rpc.h"

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
                          "request_id %llu was used for another method; count up",
                          (unsigned long long)request_id);
        return true;
    }
    return false;
}

void kvd_call_reply_remember(struct kvd_call *call, struct kvd_session *s, uint64_t request_id,
                             const void *reply)
{
    if (request_id) {
        struct kvd_replay *r = &s->replays[s->next_replay];
        s->next_replay = (s->next_replay + 1) % KVD_REPLAY_SLOTS;
        free(r->data);
        *r = (struct kvd_replay){.request_id = request_id, .method = call->method};
        r->len = protobuf_c_message_get_packed_size(reply);
        r->data = malloc(r->len ? r->len : 1);
        if (r->data)
            protobuf_c_message_pack(reply, r->data);
        else
            r->request_id = 0;
    }
    kvd_call_reply(call, reply);
}
