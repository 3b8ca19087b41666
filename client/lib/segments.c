// Registering GPU memory that many segments of cuMemCreate are mapped side by side in.
//
// There may be thousands, and neither end wants as many descriptors open: they are made when they
// are sent, some at a time, and kvd closes them as soon as it has mapped what they name.
#include "client/lib/client.h"

// Sends the descriptors of n segments, and says in *out what they are. All of them are made before:
// what was sent and is not asked for would stay with kvd.
static int send_part(kvd_client *c, const kvd_buffer *b, uint32_t from, uint32_t n,
                     Kvd__V1__RegisterBufferRequest__Segment *out, uint64_t deadline,
                     struct kvd_error *err)
{
    int fds[KVD_MAX_CALL_SEGMENTS], rc = KVD_OK;
    uint32_t made = 0;
    for (; made < n && rc == KVD_OK; made += rc == KVD_OK) {
        const struct kvd_gpu_segment *s = &b->segments[from + made];
        kvd__v1__register_buffer_request__segment__init(&out[made]);
        out[made].key = ++c->next_key;
        out[made].bytes = s->bytes;
        rc = kvd_gpu_export(s, b->device, &fds[made], err);
    }
    for (uint32_t i = 0; i < n && rc == KVD_OK; i++)
        rc = kvd_fdsock_send(c->sock, out[i].key, fds[i], kvd_left_ms(deadline), err);
    for (uint32_t i = 0; i < made; i++)
        close(fds[i]);
    return rc;
}

// What has come of it so far is no buffer that anybody could use. Best effort: the session's end
// gives it back too.
static void give_up(kvd_client *c, uint64_t id, uint64_t deadline)
{
    Kvd__V1__ReleaseBufferRequest req = KVD__V1__RELEASE_BUFFER_REQUEST__INIT;
    Kvd__V1__ReleaseBufferReply *reply;
    req.session = c->session;
    req.buffer = id;
    if (id && kvd_channel_call(c->channel, "/kvd.v1.KvCache/ReleaseBuffer", &req,
                               &kvd__v1__release_buffer_reply__descriptor, kvd_left_ms(deadline),
                               &reply, NULL) == KVD_OK)
        kvd__v1__release_buffer_reply__free_unpacked(reply, NULL);
}

int kvd_segments_register(kvd_client *c, kvd_buffer *b, uint64_t deadline, struct kvd_error *err)
{
    Kvd__V1__RegisterBufferRequest__Segment part[KVD_MAX_CALL_SEGMENTS];
    Kvd__V1__RegisterBufferRequest__Segment *parts[KVD_MAX_CALL_SEGMENTS];
    Kvd__V1__RegisterBufferRequest req = KVD__V1__REGISTER_BUFFER_REQUEST__INIT;
    Kvd__V1__RegisterBufferReply *reply;
    const uint32_t most = KVD_MIN(c->takes_segments, (uint32_t)KVD_MAX_CALL_SEGMENTS);
    uint64_t id = 0;
    int rc = KVD_OK;
    // Where an older kvd has taken another's place this is no buffer, and libkvd copies.
    if (!most)
        return KVD_OK;
    req.session = c->session;
    req.key = b->key;
    req.buffer = b->id;
    req.memory = b->kind;
    req.segments = parts;
    for (uint32_t i = 0; i < b->n_segments; i++)
        req.size += b->segments[i].bytes;
    for (uint32_t i = 0; i < KVD_MAX_CALL_SEGMENTS; i++)
        parts[i] = &part[i];
    for (uint32_t i = 0; i < b->n_segments && rc == KVD_OK; i += (uint32_t)req.n_segments) {
        req.n_segments = KVD_MIN(b->n_segments - i, most);
        rc = send_part(c, b, i, (uint32_t)req.n_segments, part, deadline, err);
        if (rc == KVD_OK)
            rc = kvd_channel_call(c->channel, "/kvd.v1.KvCache/RegisterBuffer", &req,
                                  &kvd__v1__register_buffer_reply__descriptor,
                                  kvd_left_ms(deadline), &reply, err);
        if (rc)
            break;
        id = reply->buffer;
        kvd__v1__register_buffer_reply__free_unpacked(reply, NULL);
        for (uint32_t k = 0; k < req.n_segments; k++)
            req.mapped += part[k].bytes;
    }
    if (rc)
        give_up(c, id, deadline);
    else
        b->id = id;
    return rc;
}
