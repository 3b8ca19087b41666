// .pt files: as they are if the first byte is even, else the rest is a pickle that is put into a
// zip as torch.save would do, with tensors that are orthogonal. Otherwise checksums would keep
// nearly everything away from the code behind them.
#include <zip.h>

#include "calib/rotset.h"
#include "tests/fuzz/file.h"

enum { STORAGES = 3, MATRIX_FLOATS = 2 * 64 * 64 };

static float matrices[MATRIX_FLOATS];

static void put(zip_t *zip, const char *name, const void *data, size_t size)
{
    zip_source_t *source = zip_source_buffer(zip, data, size, 0);
    zip_int64_t i = source ? zip_file_add(zip, name, source, ZIP_FL_OVERWRITE) : -1;
    if (i < 0 || zip_set_file_compression(zip, (zip_uint64_t)i, ZIP_CM_STORE, 0))
        abort();
}

static void save(struct fuzz_file *f, const uint8_t *pickle, size_t size)
{
    zip_error_t error;
    zip_source_t *buffer = zip_source_buffer_create(NULL, 0, 0, &error);
    zip_t *zip = buffer ? zip_open_from_source(buffer, ZIP_TRUNCATE, &error) : NULL;
    char name[64];
    if (!zip)
        abort();
    zip_source_keep(buffer);
    put(zip, "archive/data.pkl", pickle, size);
    for (int i = 0; i < STORAGES; i++) {
        snprintf(name, sizeof(name), "archive/data/%d", i);
        put(zip, name, matrices, sizeof(matrices));
    }
    zip_stat_t st;
    if (zip_close(zip) || zip_source_stat(buffer, &st) || zip_source_open(buffer))
        abort();
    uint8_t *all = malloc(st.size);
    if (!all || zip_source_read(buffer, all, st.size) != (zip_int64_t)st.size)
        abort();
    fuzz_write(f, all, st.size);
    free(all);
    zip_source_close(buffer);
    zip_source_free(buffer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct fuzz_file f;
    struct kvd_error err = {0};
    if (size < 1)
        return 0;
    if (matrices[0] == 0)
        fuzz_fill_orthogonal(matrices, MATRIX_FLOATS);
    fuzz_rewind(&f);
    if (data[0] % 2)
        save(&f, data + 1, size - 1);
    else
        fuzz_write(&f, data + 1, size - 1);
    struct kvd_rotset *set = kvd_rotset_import(f.path, f.path, "fuzz", &err);
    if (!set && !err.text[0])
        abort(); // refused without a reason
    if (set && kvd_rotset_check(set, NULL, &err))
        abort(); // imported, and not a set
    kvd_rotset_free(&set);
    return 0;
}
