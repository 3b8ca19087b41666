// How many items a request may have, field by field. What has no row may have none: a new repeated
// field is refused until somebody has thought of its limit.
#include "daemon/rpc/rpc_internal.h"
#include "kvd.pb-c.h"

static const struct {
    const ProtobufCMessageDescriptor *message;
    const char *field;
    size_t most;
} limits[] = {
    {&kvd__v1__layout__descriptor, "layers", KVD_MAX_LAYERS},
    {&kvd__v1__layout__descriptor, "planes", KVD_MAX_PLANES},
    {&kvd__v1__plane__descriptor, "layers", KVD_MAX_LAYERS},
    {&kvd__v1__open_session_request__descriptor, "sinks", KVD_MAX_SINKS},
    {&kvd__v1__register_buffer_request__descriptor, "segments", KVD_MAX_CALL_SEGMENTS},
    {&kvd__v1__free_sequences_request__descriptor, "sequences", KVD_MAX_CALL_SEQUENCES},
    {&kvd__v1__describe_sequences_request__descriptor, "sequences", KVD_MAX_CALL_SEQUENCES},
    {&kvd__v1__append_request__descriptor, "items", KVD_MAX_CALL_ITEMS},
    {&kvd__v1__attend_request__descriptor, "items", KVD_MAX_CALL_ITEMS},
    {&kvd__v1__step_request__descriptor, "items", KVD_MAX_CALL_ITEMS},
    {&kvd__v1__map_sequences_request__descriptor, "items", KVD_MAX_CALL_ITEMS},
    {&kvd__v1__match_prefix_request__descriptor, "requests", KVD_MAX_CALL_PROMPTS},
    {&kvd__v1__prefix_keys__descriptor, "extra", KVD_MAX_PROMPT_EXTRAS},
    {&kvd__v1__adopt_prefix_request__descriptor, "items", KVD_MAX_CALL_ADOPTIONS},
    {&kvd__v1__publish_blocks_request__descriptor, "items", KVD_MAX_CALL_PROMPTS},
    {&kvd__v1__hint_prefix_request__descriptor, "requests", KVD_MAX_CALL_PROMPTS},
    {&kvd__v1__release_prefix_request__descriptor, "leases", KVD_MAX_CALL_SEQUENCES},
    {&kvd__v1__lookup_pages_request__descriptor, "requests", KVD_MAX_CALL_PROMPTS},
    {&kvd__v1__hint_pages_request__descriptor, "requests", KVD_MAX_CALL_PROMPTS},
    {&kvd__v1__paged_ref__side__descriptor, "buffers", KVD_MAX_LAYERS},
    {&kvd__v1__paged_ref__side__descriptor, "offsets", KVD_MAX_LAYERS},
    {&kvd__v1__paged_ref__descriptor, "blocks", KVD_MAX_CALL_PAGES *KVD_PAGE_TOKENS + 1},
    {&kvd__v1__map_item__descriptor, "other_codec_from", KVD_MAX_PLANES - 1},
};

static size_t most_of(const ProtobufCMessageDescriptor *message, const char *field)
{
    for (size_t i = 0; i < KVD_LEN(limits); i++)
        if (limits[i].message == message && strcmp(limits[i].field, field) == 0)
            return limits[i].most;
    return 0;
}

int kvd_request_check(const ProtobufCMessage *m, struct kvd_error *err)
{
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        const void *at = (const uint8_t *)m + f->offset;
        bool repeated = f->label == PROTOBUF_C_LABEL_REPEATED;
        size_t n = 0;
        if (repeated)
            n = *(const size_t *)(const void *)((const uint8_t *)m + f->quantifier_offset);
        if (n > most_of(m->descriptor, f->name))
            return kvd_fail(err, KVD_E_INVALID, "%s has %zu items; at most %zu are possible",
                            f->name, n, most_of(m->descriptor, f->name));
        if (f->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        const ProtobufCMessage *const *one = at;
        const ProtobufCMessage *const *const *list = at;
        for (size_t j = 0; j < (repeated ? n : *one != NULL); j++) {
            int rc = kvd_request_check(repeated ? (*list)[j] : *one, err);
            if (rc)
                return rc;
        }
    }
    return KVD_OK;
}
