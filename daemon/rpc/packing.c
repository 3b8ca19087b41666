// Messages from and to the wire.
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>

#include "daemon/rpc/rpc_internal.h"

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

// -- strings ------------------------------------------------------------------------------------
//
// A string of a message ends at its first NUL once it is unpacked: another name than was sent. So
// the bytes as they came are looked at, of every string field of every message, here and nowhere
// else.

enum { MAX_DEPTH = 8 }; // of messages in messages

struct bytes {
    const uint8_t *at, *end;
};

static bool take_varint(struct bytes *b, uint64_t *value)
{
    *value = 0;
    for (uint32_t shift = 0; shift < 64 && b->at < b->end; shift += 7) {
        uint8_t byte = *b->at++;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return false;
}

// The next field: its number, and for one with a length its bytes. False: not a field.
static bool take_field(struct bytes *b, uint32_t *number, bool *has_length, struct bytes *inside)
{
    uint64_t tag, n = 0;
    if (!take_varint(b, &tag))
        return false;
    *number = (uint32_t)(tag >> 3);
    *has_length = (tag & 7) == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
    switch (tag & 7) {
    case PROTOBUF_C_WIRE_TYPE_VARINT:
        return take_varint(b, &n);
    case PROTOBUF_C_WIRE_TYPE_64BIT:
        n = 8;
        break;
    case PROTOBUF_C_WIRE_TYPE_32BIT:
        n = 4;
        break;
    case PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED:
        if (!take_varint(b, &n))
            return false;
        break;
    default:
        return false;
    }
    if (n > (uint64_t)(b->end - b->at))
        return false;
    *inside = (struct bytes){b->at, b->at + n};
    b->at += n;
    return true;
}

// UTF-8 in its shortest form, without surrogates and control characters.
static bool is_text(struct bytes b)
{
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    while (b.at < b.end) {
        uint8_t first = *b.at++;
        uint32_t more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        uint32_t c = more ? first & (0x3f >> more) : first;
        if ((first >= 0x80 && first < 0xc2) || first > 0xf4 || more > (size_t)(b.end - b.at))
            return false;
        for (uint32_t i = 0; i < more; i++, b.at++) {
            if ((*b.at & 0xc0) != 0x80)
                return false;
            c = c << 6 | (*b.at & 0x3f);
        }
        if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000) || c < ' ' ||
            (c >= 0x7f && c < 0xa0))
            return false;
    }
    return true;
}

static int check_strings(const ProtobufCMessageDescriptor *type, struct bytes b, uint32_t depth,
                         struct kvd_error *err)
{
    while (b.at < b.end) {
        uint32_t number;
        bool has_length;
        struct bytes inside;
        if (depth == MAX_DEPTH || !take_field(&b, &number, &has_length, &inside))
            return kvd_fail(err, KVD_E_INVALID, "the request is not a %s", type->name);
        const ProtobufCFieldDescriptor *f = protobuf_c_message_descriptor_get_field(type, number);
        if (!f || !has_length)
            continue;
        if (f->type == PROTOBUF_C_TYPE_STRING && !is_text(inside))
            return kvd_fail(err, KVD_E_INVALID,
                            "%s holds a NUL or another control character, or is not UTF-8",
                            f->name);
        if (f->type == PROTOBUF_C_TYPE_MESSAGE) {
            int rc = check_strings(f->descriptor, inside, depth + 1, err);
            if (rc)
                return rc;
        }
    }
    return KVD_OK;
}

ProtobufCMessage *kvd_message_unpack(const ProtobufCMessageDescriptor *type,
                                     grpc_byte_buffer *payload, struct kvd_error *err)
{
    grpc_byte_buffer_reader reader;
    kvd_fail(err, KVD_E_INVALID, "the request is not a %s, or has more items than kvd takes",
             type->name);
    if (!payload || !grpc_byte_buffer_reader_init(&reader, payload))
        return NULL;
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    size_t len = GRPC_SLICE_LENGTH(all);
    struct budget budget = {len + KVD_MIN(len * 8, (size_t)64 << 20) + (1 << 16)};
    ProtobufCAllocator allocator = {budget_alloc, budget_free, &budget};
    const uint8_t *data = GRPC_SLICE_START_PTR(all);
    ProtobufCMessage *m = check_strings(type, (struct bytes){data, data + len}, 0, err)
                              ? NULL
                              : protobuf_c_message_unpack(type, &allocator, len, data);
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
