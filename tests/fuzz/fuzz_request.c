// Requests from the wire, as the daemon unpacks them: the first byte chooses the message.
#include <grpc/grpc.h>

#include "daemon/rpc/rpc_internal.h"
#include "kvd.pb-c.h"
#include "admin.pb-c.h"
#include "health.pb-c.h"
#include "tests/fuzz/file.h"

// Of the sanitizer, if there is one.
size_t __sanitizer_get_current_allocated_bytes(void) __attribute__((weak));

static size_t allocated(void)
{
    return __sanitizer_get_current_allocated_bytes ? __sanitizer_get_current_allocated_bytes() : 0;
}

// All methods, in the order of the services and of their files.
static const ProtobufCServiceDescriptor *const services[] = {&kvd__v1__kv_cache__descriptor,
                                                             &kvd__v1__admin__descriptor,
                                                             &grpc__health__v1__health__descriptor};

static const ProtobufCMessageDescriptor *type_of(unsigned choice)
{
    unsigned n = 0;
    for (size_t i = 0; i < KVD_LEN(services); i++)
        n += services[i]->n_methods;
    choice %= n;
    size_t s = 0;
    for (; choice >= services[s]->n_methods; s++)
        choice -= services[s]->n_methods;
    return services[s]->methods[choice].input;
}

static ProtobufCMessage *unpack(const ProtobufCMessageDescriptor *type, const uint8_t *data,
                                size_t size)
{
    struct kvd_error err = {0};
    grpc_slice slice = grpc_slice_from_copied_buffer((const char *)data, size);
    grpc_byte_buffer *b = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    ProtobufCMessage *m = kvd_message_unpack(type, b, &err);
    grpc_byte_buffer_destroy(b);
    if (!m && !err.text[0])
        abort(); // refused without a reason
    return m;
}

static void check_text(const char *text)
{
    for (const char *c = text; c && *c; c++)
        if ((uint8_t)*c < ' ' || *c == 0x7f)
            abort(); // a control character in a name
}

// Every string of a message, and of those in it; and none of them has lost a field.
static void check_texts(const ProtobufCMessage *m)
{
    if (m->n_unknown_fields)
        abort();
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        const uint8_t *at = (const uint8_t *)m + f->offset;
        bool many = f->label == PROTOBUF_C_LABEL_REPEATED;
        size_t n = many ? *(const size_t *)((const uint8_t *)m + f->quantifier_offset) : 1;
        const void *const *list = many ? *(const void *const *const *)at : (const void *const *)at;
        for (size_t j = 0; j < n && f->type == PROTOBUF_C_TYPE_STRING; j++)
            check_text(list[j]);
        for (size_t j = 0; j < n && f->type == PROTOBUF_C_TYPE_MESSAGE; j++)
            if (list[j])
                check_texts(list[j]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool ready;
    if (!ready)
        grpc_init();
    ready = true;
    if (size < 1)
        return 0;
    const ProtobufCMessageDescriptor *type = type_of(data[0]);
    // gRPC's threads take and give back memory meanwhile: what is too much once is looked at again.
    ProtobufCMessage *m = NULL;
    for (int tries = 0; !m; tries++) {
        size_t before = allocated();
        m = unpack(type, data + 1, size - 1);
        if (!m)
            return 0;
        if ((int64_t)(allocated() - before) <= (int64_t)(9 * size + (256 << 10)))
            break;
        if (tries == 4)
            abort(); // much more memory than the message has bytes
        protobuf_c_message_free_unpacked(m, NULL);
        m = NULL;
    }
    check_texts(m);
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *packed = malloc(n + 1);
    if (packed && protobuf_c_message_pack(m, packed) != n)
        abort();
    protobuf_c_message_free_unpacked(m, NULL);
    m = packed ? unpack(type, packed, n) : NULL; // what it says can be said
    if (m)
        protobuf_c_message_free_unpacked(m, NULL);
    free(packed);
    return 0;
}
