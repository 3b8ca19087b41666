// The header of a safetensors file in memory.
#include "calib/safetensors.h"
#include "tests/fuzz/file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct kvd_error err = {0};
    struct kvd_safetensors s;
    // The file may be longer than what is there, and the rest is not looked at.
    uint64_t whole = size + (size ? (uint64_t)data[size - 1] * 1000 : 0);
    if (kvd_safetensors_parse("fuzz", data, size, whole, &s, &err)) {
        if (!err.text[0])
            abort(); // refused without a reason
        return 0;
    }
    for (uint32_t i = 0; i < s.n; i++) {
        const struct kvd_safetensor *t = &s.tensors[i];
        if (t->at > whole || t->bytes > whole - t->at || t->rank > 1u << 20)
            abort(); // beyond the file
        if (t->type != KVD_TENSOR_OTHER) {
            uint64_t bytes = kvd_tensor_type_size(t->type);
            for (uint32_t j = 0; j < t->rank; j++)
                bytes *= t->shape[j];
            if (t->rank > KVD_TENSOR_RANK || bytes != t->bytes)
                abort(); // other bytes than its shape has
        }
        kvd_safetensors_find(&s, t->name);
    }
    kvd_safetensors_metadata(&s, "format");
    kvd_safetensors_free(&s);
    return 0;
}
