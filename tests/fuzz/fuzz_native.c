// Native rotation sets: as they are if the first byte is even, else the rest is the header of a
// safetensors file with the tensors of a set behind it; @ in the header is the digest of these.
#include "calib/rotset.h"
#include "calib/safetensors.h"
#include "tests/fuzz/file.h"

enum { FLOATS = 2 * 64 * 64 + 2 }; // K and V of a layer, and their clip ratios

static float tensors[FLOATS];
static char digest[KVD_DIGEST_TEXT];

static void make_tensors(void)
{
    fuzz_fill_orthogonal(tensors, FLOATS);
    tensors[FLOATS - 2] = 0.96f;
    tensors[FLOATS - 1] = 0.92f;
    kvd_digest(tensors, sizeof(tensors), digest);
}

static void save(struct fuzz_file *f, const uint8_t *header, size_t size)
{
    uint64_t length = 0;
    for (size_t i = 0; i < size; i++)
        length += header[i] == '@' ? strlen(digest) : 1;
    fuzz_write(f, &length, sizeof(length));
    for (size_t i = 0, begin = 0; i <= size; i++) {
        if (i < size && header[i] != '@')
            continue;
        fuzz_write(f, header + begin, i - begin);
        if (i < size)
            fuzz_write(f, digest, strlen(digest));
        begin = i + 1;
    }
    fuzz_write(f, tensors, sizeof(tensors));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct fuzz_file f;
    struct kvd_error err = {0};
    if (size < 1)
        return 0;
    if (!digest[0])
        make_tensors();
    fuzz_rewind(&f);
    if (data[0] % 2)
        save(&f, data + 1, size - 1);
    else
        fuzz_write(&f, data + 1, size - 1);
    struct kvd_rotset *set = kvd_rotset_read(f.path, &err);
    if (!set && !err.text[0])
        abort(); // refused without a reason
    if (set && kvd_rotset_check(set, NULL, &err))
        abort(); // read, and not a set
    kvd_rotset_free(&set);
    return 0;
}
