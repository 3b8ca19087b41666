// Tensors that travel with their call, where memory cannot be shared: inputs are sent as dense
// copies, outputs come with the reply.
#include "client/lib/client.h"

// Strides as they are meant: 0 is dense.
static kvd_tensor_ref strides_of(const kvd_tensor_ref *t, struct kvd_dims d)
{
    kvd_tensor_ref s = *t;
    s.head_stride = t->head_stride ? t->head_stride : (uint64_t)d.dim * d.size;
    s.token_stride = t->token_stride ? t->token_stride : s.head_stride * d.heads;
    s.layer_stride = t->layer_stride ? t->layer_stride : s.token_stride * d.tokens;
    return s;
}

// Copies row by row between a tensor, which has been checked, and a dense copy of it.
static void copy(const kvd_tensor_ref *t, struct kvd_dims d, uint8_t *dense, bool to_tensor)
{
    kvd_tensor_ref s = strides_of(t, d);
    size_t row = (size_t)d.dim * d.size;
    uint8_t *base = (uint8_t *)t->buffer->data + t->offset;
    for (uint64_t l = 0; l < d.layers; l++)
        for (uint64_t i = 0; i < d.tokens; i++)
            for (uint64_t h = 0; h < d.heads; h++, dense += row) {
                uint8_t *at = base + l * s.layer_stride + i * s.token_stride + h * s.head_stride;
                memcpy(to_tensor ? at : dense, to_tensor ? dense : at, row);
            }
}

static uint64_t bytes_of(struct kvd_dims d)
{
    return (uint64_t)d.layers * d.tokens * d.heads * d.dim * d.size;
}

int kvd_inline_send(const kvd_tensor_ref *t, struct kvd_dims d, Kvd__V1__TensorRef *ref,
                    struct kvd_error *err)
{
    uint64_t bytes = bytes_of(d);
    if (bytes > KVD_MAX_MESSAGE)
        return kvd_fail(err, KVD_E_LIMIT,
                        "over TCP tensors travel with their call, and %llu bytes are more than %d: "
                        "split it",
                        (unsigned long long)bytes, KVD_MAX_MESSAGE);
    ref->inline_data.data = malloc(bytes);
    if (!ref->inline_data.data)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    ref->inline_data.len = bytes;
    copy(t, d, ref->inline_data.data, false);
    return KVD_OK;
}

int kvd_inline_receive(const kvd_tensor_ref *t, struct kvd_dims d, const ProtobufCBinaryData *from,
                       struct kvd_error *err)
{
    if (from->len != bytes_of(d))
        return kvd_fail(err, KVD_E_INTERNAL, "the reply has %zu bytes of a tensor of %llu",
                        from->len, (unsigned long long)bytes_of(d));
    copy(t, d, from->data, true);
    return KVD_OK;
}
