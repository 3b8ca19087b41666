// Messages from and to the wire.
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>

#include "daemon/rpc_internal.h"

// A message may not unpack to more than a small multiple of its size: many tiny items must not eat
// the memory.
struct budget {
    size_t left;
};

static void *budget_alloc(void *ctx, size_t n)
{
    struct budget *b = ctx;
    if (n > b->left)
        return NULL;
    b->left -= n;
    return malloc(n);
}

static void budget_free(void *ctx, void *p)
{
    (void)ctx;
    free(p);
}

ProtobufCMessage *kvd_message_unpack(const ProtobufCMessageDescriptor *type,
                                     grpc_byte_buffer *payload)
{
    grpc_byte_buffer_reader reader;
    if (!payload || !grpc_byte_buffer_reader_init(&reader, payload))
        return NULL;
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    size_t len = GRPC_SLICE_LENGTH(all);
    struct budget budget = {len + KVD_MIN(len * 8, (size_t)64 << 20) + (1 << 16)};
    ProtobufCAllocator allocator = {budget_alloc, budget_free, &budget};
    ProtobufCMessage *m =
        protobuf_c_message_unpack(type, &allocator, len, GRPC_SLICE_START_PTR(all));
    grpc_slice_unref(all);
    grpc_byte_buffer_reader_destroy(&reader);
    return m;
}

grpc_byte_buffer *kvd_message_wrap(grpc_slice slice)
{
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return b;
}

grpc_byte_buffer *kvd_message_pack(const ProtobufCMessage *m)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(m));
    protobuf_c_message_pack(m, GRPC_SLICE_START_PTR(slice));
    return kvd_message_wrap(slice);
}
