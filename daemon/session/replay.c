// What several handlers need: the session of a request, and replies that are remembered for
// retries.
#include "daemon/session/replay.h"

#include "daemon/rpc/rpc.h"
#include "daemon/session/ledger.h"

struct kvd_session *kvd_call_session(struct kvd_call *call, const char *name)
{
    struct kvd_error err = {0};
    struct kvd_session *s = kvd_session_named(call->d, name, &err);
    if (!s)
        kvd_call_fail_error(call, &err);
    return s;
}

// A method as a number that is the same in every kvd: FNV-1a of its path.
static uint64_t number_of(const struct kvd_method *m)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const char *c = m->path; *c; c++)
        hash = (hash ^ (uint8_t)*c) * 0x100000001b3ull;
    return hash;
}

bool kvd_call_replayed(struct kvd_call *call, struct kvd_session *s, uint64_t request_id)
{
    uint64_t method;
    size_t length;
    uint8_t *data KVD_FREE =
        request_id ? kvd_ledger_recall(s->ledger, s->record, request_id, &method, &length) : NULL;
    if (!data)
        return false;
    if (method == number_of(call->method))
        kvd_call_reply_packed(call, data, length);
    else
        kvd_call_fail(call, KVD_E_INVALID,
                      "request_id %" PRIu64 " was used for another method; count up", request_id);
    return true;
}

bool kvd_call_answered(const struct kvd_session *s, uint64_t request_id)
{
    uint64_t method;
    size_t length;
    uint8_t *data KVD_FREE =
        request_id ? kvd_ledger_recall(s->ledger, s->record, request_id, &method, &length) : NULL;
    return data;
}

void kvd_call_reply_remember(struct kvd_call *call, struct kvd_session *s, uint64_t request_id,
                             const void *reply)
{
    size_t length = protobuf_c_message_get_packed_size(reply);
    uint8_t *data KVD_FREE = request_id ? malloc(length + 1) : NULL;
    if (data) {
        protobuf_c_message_pack(reply, data);
        kvd_ledger_remember(s->ledger, s->record, request_id, number_of(call->method), data,
                            length);
    } else {
        kvd_ledger_commit(s->ledger, s->record);
    }
    kvd_call_reply(call, reply);
}
