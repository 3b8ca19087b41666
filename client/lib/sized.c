// Public structures that may grow: what a program of another age means by one, and what it gets.
#include <stddef.h>

#include "client/lib/client.h"

// Those that have no size, as they lie in others or are handed over by value: they never change.
_Static_assert(sizeof(kvd_failure) == 516 && offsetof(kvd_failure, text) == 4, "frozen");
_Static_assert(sizeof(kvd_layers) == 8 && offsetof(kvd_layers, count) == 4, "frozen");
_Static_assert(sizeof(kvd_tensor_ref) == 48 && offsetof(kvd_tensor_ref, dtype) == 40, "frozen");
_Static_assert(sizeof(kvd_strides) == 32 && offsetof(kvd_strides, dim) == 24, "frozen");
_Static_assert(sizeof(kvd_plane_info) == 24 && offsetof(kvd_plane_info, recent) == 20, "frozen");
_Static_assert(sizeof(kvd_plane_tokens) == 32 && offsetof(kvd_plane_tokens, recent) == 24,
               "frozen");
_Static_assert(sizeof(kvd_bytes) == 16 && offsetof(kvd_bytes, bytes) == 8, "frozen");

// More than any of them will ever have: what is not a size at all is not followed.
enum { MAX_SIZE = 4096 };

static uint32_t size_of(const void *sized)
{
    uint32_t size;
    memcpy(&size, sized, sizeof(size));
    return size;
}

static int check_size(const struct kvd_sized *type, uint32_t size, struct kvd_error *err)
{
    if (size < type->least || size > MAX_SIZE)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s.size is %u: set it to sizeof(%s), as KVD_NEW(%s) does", type->name,
                        size, type->name, type->name);
    return KVD_OK;
}

int kvd_sized_take(const struct kvd_sized *type, const void *from, void *to, struct kvd_error *err)
{
    if (!from)
        return kvd_fail(err, KVD_E_INVALID, "no %s was given", type->name);
    uint32_t size = size_of(from);
    int rc = check_size(type, size, err);
    if (rc)
        return rc;
    for (uint32_t i = type->size; i < size; i++)
        if (((const uint8_t *)from)[i])
            return kvd_fail(err, KVD_E_INVALID,
                            "this libkvd (%s) is older than the kvd.h that the program was "
                            "compiled with, and a field of %s that it does not know is set",
                            kvd_version(), type->name);
    memset(to, 0, type->size);
    memcpy(to, from, KVD_MIN(size, type->size));
    memcpy(to, &type->size, sizeof(type->size));
    return KVD_OK;
}

int kvd_sized_check(const struct kvd_sized *type, const void *out, struct kvd_error *err)
{
    return out ? check_size(type, size_of(out), err)
               : kvd_fail(err, KVD_E_INVALID, "there is no %s to write to", type->name);
}

void kvd_sized_give(const struct kvd_sized *type, const void *from, void *to)
{
    uint32_t size = size_of(to), known = KVD_MIN(size, type->size);
    memcpy((uint8_t *)to + sizeof(size), (const uint8_t *)from + sizeof(size),
           known - sizeof(size));
    memset((uint8_t *)to + known, 0, size - known);
}

int kvd_items_take(const kvd_item *items, uint32_t count, kvd_item **own, struct kvd_error *err)
{
    if (count < 1 || count > KVD_MAX_CALL_ITEMS)
        return kvd_fail(err, KVD_E_INVALID, "%u items; 1 to %d are possible", count,
                        KVD_MAX_CALL_ITEMS);
    kvd_item *list KVD_FREE = calloc(count, sizeof(*list));
    if (!list)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (!items)
        return kvd_fail(err, KVD_E_INVALID, "no items were given");
    uint32_t step = size_of(items); // also the distance from one to the next
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *at = (const uint8_t *)items + (size_t)i * step;
        int rc = size_of(at) == step // before more of it is read
                     ? kvd_sized_take(&kvd_sized_item, at, &list[i], err)
                     : kvd_fail(err, KVD_E_INVALID, "kvd_item.size is %u, that of the first is %u",
                                size_of(at), step);
        if (rc)
            return kvd_fail_in(err, "items[%u]", i);
    }
    *own = KVD_TAKE(list);
    return KVD_OK;
}

// `last` is the last field that the first release had.
#define SIZED(type, last)                                                                          \
    {                                                                                              \
#type, sizeof(type), offsetof(type, last) + sizeof(((type *)NULL)->last)                   \
    }

const struct kvd_sized kvd_sized_options = SIZED(kvd_options, no_windows);
const struct kvd_sized kvd_sized_plane_options = SIZED(kvd_plane_options, no_windows);
const struct kvd_sized kvd_sized_info = SIZED(kvd_info, layout_digest);
const struct kvd_sized kvd_sized_sequence_info = SIZED(kvd_sequence_info, holds);
const struct kvd_sized kvd_sized_item = SIZED(kvd_item, lse);
const struct kvd_sized kvd_sized_attention = SIZED(kvd_attention, window);
const struct kvd_sized kvd_sized_direct_options = SIZED(kvd_direct_options, attention);
const struct kvd_sized kvd_sized_event = SIZED(kvd_event, number);
const struct kvd_sized kvd_sized_prompt = SIZED(kvd_prompt, n_extras);
const struct kvd_sized kvd_sized_match = SIZED(kvd_match, behind);
const struct kvd_sized kvd_sized_match_options = SIZED(kvd_match_options, recompute_window);
const struct kvd_sized kvd_sized_published = SIZED(kvd_published, end);
const struct kvd_sized kvd_sized_page_keys = SIZED(kvd_page_keys, after);
const struct kvd_sized kvd_sized_found = SIZED(kvd_found, behind);
const struct kvd_sized kvd_sized_paged = SIZED(kvd_paged, stream);
const struct kvd_sized kvd_sized_ended = SIZED(kvd_ended, failure);
