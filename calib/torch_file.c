#include "calib/torch_file.h"

#include <unistd.h>

uint32_t kvd_torch_element_bytes(enum kvd_pickle_element element)
{
    static const uint8_t bytes[] = {
        [KVD_PICKLE_F32] = 4, [KVD_PICKLE_F16] = 2, [KVD_PICKLE_BF16] = 2, [KVD_PICKLE_F64] = 8};
    return bytes[element];
}

void kvd_torch_close(struct kvd_torch *t)
{
    kvd_pickle_free(&t->pickle);
    if (t->zip)
        zip_discard(t->zip);
    t->zip = NULL;
}

static void full_name(const struct kvd_torch *t, const char *name, char full[512])
{
    snprintf(full, 512, "%s%s", t->prefix, name);
}

// No entry that is stored, and not compressed, can be larger than the file.
int kvd_torch_entry_size(const struct kvd_torch *t, const char *name, uint64_t *size,
                         struct kvd_error *err)
{
    char full[512];
    zip_stat_t st;
    full_name(t, name, full);
    if (zip_stat(t->zip, full, 0, &st) != 0 || !(st.valid & ZIP_STAT_SIZE) ||
        !(st.valid & ZIP_STAT_COMP_METHOD))
        return kvd_fail(err, KVD_E_CORRUPT, "%s: there is no entry %s", t->path, name);
    if (st.comp_method != ZIP_CM_STORE)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: entry %s is compressed; torch.save stores entries as they are",
                        t->path, name);
    *size = st.size;
    return KVD_OK;
}

uint8_t *kvd_torch_entry(const struct kvd_torch *t, const char *name, uint64_t max, uint64_t *size,
                         struct kvd_error *err)
{
    char full[512];
    if (kvd_torch_entry_size(t, name, size, err))
        return NULL;
    if (*size > max) {
        kvd_fail(err, KVD_E_LIMIT, "%s: entry %s has %llu bytes, at most %llu are expected",
                 t->path, name, (unsigned long long)*size, (unsigned long long)max);
        return NULL;
    }
    full_name(t, name, full);
    uint8_t *data KVD_FREE = malloc(*size + 1);
    zip_file_t *f = data ? zip_fopen(t->zip, full, 0) : NULL;
    zip_int64_t got = f ? zip_fread(f, data, *size) : -1;
    // Reading to the end makes libzip compare the CRC.
    bool whole = got == (zip_int64_t)*size && zip_fread(f, data + *size, 1) == 0;
    if (f && zip_fclose(f) != 0)
        whole = false;
    if (whole)
        return KVD_TAKE(data);
    kvd_fail(err, KVD_E_CORRUPT, "%s: entry %s is truncated or damaged", t->path, name);
    return NULL;
}

static int not_readable(const char *path, int code, struct kvd_error *err)
{
    zip_error_t e;
    zip_error_init_with_code(&e, code);
    code = kvd_fail(err, code == ZIP_ER_NOENT ? KVD_E_NOT_FOUND : KVD_E_CORRUPT,
                    "%s: not a readable .pt file (%s)", path, zip_error_strerror(&e));
    zip_error_fini(&e);
    return code;
}

static int find_prefix(struct kvd_torch *t, struct kvd_error *err)
{
    zip_int64_t entries = zip_get_num_entries(t->zip, 0);
    for (zip_int64_t i = 0; i < entries; i++) {
        const char *name = zip_get_name(t->zip, (zip_uint64_t)i, 0);
        size_t n = name ? strlen(name) : 0;
        if (n < 9 || n >= sizeof(t->prefix) || strcmp(name + n - 9, "/data.pkl") != 0)
            continue;
        memcpy(t->prefix, name, n - 8);
        t->prefix[n - 8] = '\0';
        return KVD_OK;
    }
    return kvd_fail(err, KVD_E_CORRUPT, "%s: there is no data.pkl inside", t->path);
}

int kvd_torch_open(struct kvd_torch *t, const char *path, struct kvd_error *err)
{
    *t = (struct kvd_torch){.path = path};
    int code;
    t->zip = zip_open(path, ZIP_RDONLY, &code);
    if (!t->zip)
        return not_readable(path, code, err);
    int rc = find_prefix(t, err);
    if (rc)
        return rc;
    uint64_t size;
    uint8_t *data KVD_FREE = kvd_torch_entry(t, "data.pkl", 4 << 20, &size, err);
    if (!data)
        return err ? err->code : KVD_E_CORRUPT;
    t->pickle = kvd_pickle_parse(data, size, err);
    return t->pickle ? KVD_OK : kvd_fail_in(err, "%s", path);
}

int kvd_torch_storage(const struct kvd_torch *t, const struct kvd_pickle_value *tensor,
                      char name[KVD_TORCH_ENTRY], struct kvd_error *err)
{
    const char *key = tensor->storage->text;
    if (key[0] == '\0' || strspn(key, "0123456789") != strlen(key) || strlen(key) > 20)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: a storage whose key is no number", t->path);
    snprintf(name, KVD_TORCH_ENTRY, "data/%s", key);
    return KVD_OK;
}

int kvd_torch_read_at(const char *path, int fd, const char *name, void *to, uint64_t bytes,
                      uint64_t at, struct kvd_error *err)
{
    struct kvd_torch t = {.path = path};
    char full[512];
    int code;
    t.zip = zip_fdopen(fd, 0, &code);
    if (!t.zip) {
        close(fd);
        return not_readable(path, code, err);
    }
    int rc = find_prefix(&t, err);
    full_name(&t, name, full);
    zip_file_t *f = rc ? NULL : zip_fopen(t.zip, full, 0);
    if (rc == KVD_OK && (!f || zip_fseek(f, (zip_int64_t)at, SEEK_SET) != 0 ||
                         zip_fread(f, to, bytes) != (zip_int64_t)bytes))
        rc = kvd_fail(err, KVD_E_CORRUPT, "%s: entry %s is truncated or damaged", path, name);
    if (f)
        zip_fclose(f);
    kvd_torch_close(&t);
    return rc;
}
