// The pickle reader alone, and every value that it has built.
#include "calib/pickle.h"
#include "tests/fuzz/file.h"

enum { MOST_VALUES = 10000 }; // shared values may be reached in very many ways

static uint64_t walk(const struct kvd_pickle_value *v, uint32_t *left)
{
    uint64_t sum = (uint64_t)v->kind;
    if (*left == 0)
        return sum;
    --*left;
    if (v->text)
        sum += strlen(v->text);
    if (v->kind == KVD_PICKLE_TENSOR) {
        if (v->rank > KVD_PICKLE_MAX_RANK || v->storage->kind != KVD_PICKLE_STORAGE)
            abort();
        for (uint32_t i = 0; i < v->rank; i++)
            sum += (uint64_t)v->shape[i] + (uint64_t)v->stride[i];
    }
    for (uint32_t i = 0; i < v->n_items; i++)
        sum += walk(v->items[i], left);
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct kvd_error err = {0};
    struct kvd_pickle *p = kvd_pickle_parse(data, size, &err);
    if (!p) {
        if (!err.code || !err.text[0])
            abort(); // refused without a reason
        return 0;
    }
    uint32_t left = MOST_VALUES;
    volatile uint64_t sum = walk(kvd_pickle_root(p), &left);
    (void)sum;
    kvd_pickle_get(kvd_pickle_root(p), "layers");
    kvd_pickle_free(&p);
    return 0;
}
