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

// -- what unpacking would lose ------------------------------------------------------------------
//
// A string of a message ends at its first NUL once it is unpacked: another name than was sent. A
// field that this kvd does not know is skipped, a number of an enumeration that it does not know is
// taken for another, and one beyond 32 bits is cut: a newer client would get what it has not asked
// for. So the bytes as they came are looked at, of every field of every message, here and nowhere
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

// A field as it came: its number, and the bytes of its number or what has a length.
struct field {
    uint64_t number;
    uint32_t wire;
    struct bytes inside;
};

// False: not a field.
static bool take_field(struct bytes *b, struct field *f)
{
    uint64_t tag, n = 0;
    if (!take_varint(b, &tag))
        return false;
    f->number = tag >> 3;
    f->wire = tag & 7;
    f->inside.at = b->at;
    switch (f->wire) {
    case PROTOBUF_C_WIRE_TYPE_VARINT:
        if (!take_varint(b, &n))
            return false;
        f->inside.end = b->at;
        return true;
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
    f->inside = (struct bytes){b->at, b->at + n};
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

// A number, or numbers that lie side by side.
static int check_numbers(const ProtobufCFieldDescriptor *type, struct bytes b,
                         struct kvd_error *err)
{
    uint64_t n;
    bool is_enum = type->type == PROTOBUF_C_TYPE_ENUM;
    if (!is_enum && type->type != PROTOBUF_C_TYPE_UINT32)
        return KVD_OK;
    while (take_varint(&b, &n)) {
        if (n > UINT32_MAX)
            return kvd_fail(err, KVD_E_INVALID, "%s is %" PRIu64 "; at most 32 bits are possible",
                            type->name, n);
        if (is_enum && !protobuf_c_enum_descriptor_get_value(type->descriptor, (int)n))
            return kvd_fail(err, KVD_E_INVALID, "%s is %" PRIu64 ", which this kvd does not know",
                            type->name, n);
    }
    return KVD_OK;
}

static int check_fields(const ProtobufCMessageDescriptor *type, struct bytes b, uint32_t depth,
                        struct kvd_error *err)
{
    struct field got;
    int rc = KVD_OK;
    while (b.at < b.end && rc == KVD_OK) {
        if (depth == MAX_DEPTH || !take_field(&b, &got))
            return kvd_fail(err, KVD_E_INVALID, "the request is not a %s", type->name);
        const ProtobufCFieldDescriptor *f =
            got.number > UINT32_MAX
                ? NULL
                : protobuf_c_message_descriptor_get_field(type, (unsigned)got.number);
        bool has_length = got.wire == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
        if (!f)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s has a field %" PRIu64 " that this kvd does not know: its client is "
                            "newer; leave the field out, or upgrade kvd",
                            type->name, got.number);
        if (f->type == PROTOBUF_C_TYPE_STRING && has_length && !is_text(got.inside))
            return kvd_fail(err, KVD_E_INVALID,
                            "%s holds a NUL or another control character, or is not UTF-8",
                            f->name);
        if (f->type == PROTOBUF_C_TYPE_MESSAGE && has_length)
            rc = check_fields(f->descriptor, got.inside, depth + 1, err);
        else if (f->type != PROTOBUF_C_TYPE_STRING)
            rc = check_numbers(f, got.inside, err);
    }
    return rc;
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
    ProtobufCMessage *m = check_fields(type, (struct bytes){data, data + len}, 0, err)
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
