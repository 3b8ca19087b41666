#include "calib/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "calib/rotset.h"

enum { MAX_HEADER = 16 << 20, MAX_TENSORS = 65536 };

static const struct {
    const char *name;
    uint32_t size;
} types[] = {[KVD_TENSOR_F16] = {"F16", 2},
             [KVD_TENSOR_BF16] = {"BF16", 2},
             [KVD_TENSOR_F32] = {"F32", 4},
             [KVD_TENSOR_F64] = {"F64", 8},
             [KVD_TENSOR_OTHER] = {"", 1}};

uint32_t kvd_tensor_type_size(enum kvd_tensor_type type)
{
    return types[type].size;
}

static int corrupt(struct kvd_error *err, const char *path, const char *why)
{
    return kvd_fail(err, KVD_E_CORRUPT, "%s: %s", path, why);
}

static int parse_tensor(const char *path, const char *name, const json_t *t, uint64_t data_at,
                        uint64_t size, struct kvd_safetensor *out, struct kvd_error *err)
{
    const char *type = json_string_value(json_object_get(t, "dtype"));
    const json_t *shape = json_object_get(t, "shape"), *at = json_object_get(t, "data_offsets");
    json_int_t begin = json_integer_value(json_array_get(at, 0)),
               end = json_integer_value(json_array_get(at, 1));
    snprintf(out->name, sizeof(out->name), "%s", name);
    if (!type || !json_is_array(shape) || json_array_size(at) != 2)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: tensor %.80s has no dtype, shape or data_offsets",
                        path, name);
    if (begin < 0 || end < begin || (uint64_t)end > size - data_at)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: tensor %.80s lies outside the file: truncated?",
                        path, name);
    out->at = data_at + (uint64_t)begin;
    out->bytes = (uint64_t)(end - begin);
    out->type = KVD_TENSOR_OTHER;
    for (size_t i = 0; i < KVD_TENSOR_OTHER; i++)
        if (strcmp(type, types[i].name) == 0)
            out->type = (enum kvd_tensor_type)i;
    if (json_array_size(shape) > KVD_TENSOR_RANK)
        out->type = KVD_TENSOR_OTHER;
    if (out->type == KVD_TENSOR_OTHER)
        return KVD_OK;
    out->rank = (uint32_t)json_array_size(shape);
    uint64_t bytes = types[out->type].size;
    for (uint32_t i = 0; i < out->rank; i++) {
        json_int_t n = json_integer_value(json_array_get(shape, i));
        if (n < 0 || __builtin_mul_overflow(bytes, (uint64_t)n, &bytes))
            return kvd_fail(err, KVD_E_CORRUPT, "%s: tensor %.80s has an impossible shape", path,
                            name);
        out->shape[i] = (uint64_t)n;
    }
    if (bytes != out->bytes)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: tensor %.80s has %llu bytes, but its shape wants %llu", path, name,
                        (unsigned long long)out->bytes, (unsigned long long)bytes);
    return KVD_OK;
}

uint64_t kvd_safetensors_header_length(const uint8_t file[8])
{
    uint64_t n = 0;
    for (int i = 0; i < 8; i++)
        n |= (uint64_t)file[i] << (8 * i);
    return n;
}

int kvd_safetensors_parse(const char *path, const uint8_t *file, size_t have, uint64_t size,
                          struct kvd_safetensors *out, struct kvd_error *err)
{
    *out = (struct kvd_safetensors){0};
    if (have < 8)
        return corrupt(err, path, "truncated: no header");
    uint64_t n = kvd_safetensors_header_length(file);
    if (n > MAX_HEADER || n > have - 8)
        return corrupt(err, path,
                       "no safetensors file: its header is longer than the file or than 16 MiB");
    out->data_at = 8 + n;
    json_error_t je;
    // jansson bounds the nesting depth; duplicate keys are refused.
    out->header = json_loadb((const char *)file + 8, n, JSON_REJECT_DUPLICATES, &je);
    if (!json_is_object(out->header)) {
        json_decref(out->header);
        out->header = NULL;
        return kvd_fail(err, KVD_E_CORRUPT, "%s: the header is not JSON: %s (byte %d)", path,
                        je.text, je.position);
    }
    size_t entries = json_object_size(out->header);
    int rc = entries > MAX_TENSORS ? corrupt(err, path, "more than 65,536 tensors") : KVD_OK;
    out->tensors = rc ? NULL : calloc(entries + 1, sizeof(*out->tensors));
    if (rc == KVD_OK && !out->tensors)
        rc = kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    const char *name;
    json_t *t;
    if (rc == KVD_OK)
        json_object_foreach(out->header, name, t)
        {
            if (rc || strcmp(name, "__metadata__") == 0)
                continue;
            rc = parse_tensor(path, name, t, 8 + n, size, &out->tensors[out->n], err);
            out->n++;
        }
    if (rc)
        kvd_safetensors_free(out);
    return rc;
}

int kvd_read_at(const char *path, int fd, void *to, size_t bytes, uint64_t at,
                struct kvd_error *err)
{
    for (size_t have = 0; have < bytes;) {
        ssize_t n = pread(fd, (char *)to + have, bytes - have, (off_t)(at + have));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return kvd_fail(err, n < 0 ? -errno : KVD_E_CORRUPT, "%s: %s", path,
                            n < 0 ? strerror(errno) : "truncated");
        have += (size_t)n;
    }
    return KVD_OK;
}

int kvd_safetensors_read(const char *path, int fd, uint64_t size, struct kvd_safetensors *out,
                         struct kvd_error *err)
{
    uint8_t length[8];
    *out = (struct kvd_safetensors){0};
    if (size < 8)
        return corrupt(err, path, "truncated: no header");
    if (kvd_read_at(path, fd, length, 8, 0, err))
        return err->code;
    uint64_t n = kvd_safetensors_header_length(length);
    if (n > MAX_HEADER || n > size - 8)
        return corrupt(err, path,
                       "no safetensors file: its header is longer than the file or than 16 MiB");
    uint8_t *file KVD_FREE = malloc(n + 8);
    if (!file)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (kvd_read_at(path, fd, file, n + 8, 0, err))
        return err->code;
    return kvd_safetensors_parse(path, file, n + 8, size, out, err);
}

void kvd_safetensors_free(struct kvd_safetensors *s)
{
    free(s->tensors);
    json_decref(s->header);
    *s = (struct kvd_safetensors){0};
}

const struct kvd_safetensor *kvd_safetensors_find(const struct kvd_safetensors *s, const char *name)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (strcmp(s->tensors[i].name, name) == 0)
            return &s->tensors[i];
    return NULL;
}

const char *kvd_safetensors_metadata(const struct kvd_safetensors *s, const char *key)
{
    return json_string_value(json_object_get(json_object_get(s->header, "__metadata__"), key));
}

// -- writing -------------------------------------------------------------------------------------

static uint64_t source_bytes(const struct kvd_tensor_source *t)
{
    uint64_t bytes = types[t->type].size;
    for (uint32_t i = 0; i < t->rank; i++)
        bytes *= t->shape[i];
    return bytes;
}

static char *make_header(const struct kvd_tensor_source *tensors, uint32_t n, json_t *metadata)
{
    json_t *root = json_object();
    uint64_t at = 0;
    json_object_set_new(root, "__metadata__", metadata);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t bytes = source_bytes(&tensors[i]);
        json_t *t = json_object(), *dims = json_array();
        for (uint32_t d = 0; d < tensors[i].rank; d++)
            json_array_append_new(dims, json_integer((json_int_t)tensors[i].shape[d]));
        json_object_set_new(t, "dtype", json_string(types[tensors[i].type].name));
        json_object_set_new(t, "shape", dims);
        json_int_t begin = (json_int_t)at, end = begin + (json_int_t)bytes;
        json_object_set_new(t, "data_offsets", json_pack("[I,I]", begin, end));
        json_object_set_new(root, tensors[i].name, t);
        at += bytes;
    }
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return text;
}

uint8_t *kvd_safetensors_render(const struct kvd_tensor_source *tensors, uint32_t n,
                                json_t *metadata, const char *payload, size_t *size)
{
    uint64_t total = 0, at = 0;
    for (uint32_t i = 0; i < n; i++)
        total += source_bytes(&tensors[i]);
    uint8_t *data KVD_FREE = malloc(total + 1);
    if (!data) {
        json_decref(metadata);
        return NULL;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint64_t bytes = source_bytes(&tensors[i]);
        memcpy(data + at, tensors[i].data, bytes);
        at += bytes;
    }
    if (payload) {
        char digest[KVD_DIGEST_TEXT];
        kvd_digest(data, total, digest);
        json_object_set_new(metadata, payload, json_string(digest));
    }
    char *header KVD_FREE = make_header(tensors, n, metadata);
    size_t length = header ? strlen(header) : 0, padded = kvd_round_up(length, 8);
    uint8_t *file = header ? malloc(8 + padded + total) : NULL;
    if (!file)
        return NULL;
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    memset(file + 8, ' ', padded);
    memcpy(file + 8, header, length);
    memcpy(file + 8 + padded, data, total);
    *size = 8 + padded + total;
    return file;
}

int kvd_write_file(const char *path, const void *data, size_t size, struct kvd_error *err)
{
    char tmp[4096];
    if ((size_t)snprintf(tmp, sizeof(tmp), "%s.XXXXXX", path) >= sizeof(tmp))
        return kvd_fail(err, KVD_E_INVALID, "%s: the path is too long", path);
    int fd KVD_CLOSE = mkostemp(tmp, O_CLOEXEC);
    if (fd < 0)
        return kvd_fail(err, -errno, "%s: %s", tmp, strerror(errno));
    bool ok = fchmod(fd, 0644) == 0;
    for (size_t done = 0; ok && done < size;) {
        ssize_t n = write(fd, (const char *)data + done, size - done);
        ok = n > 0 || (n < 0 && errno == EINTR);
        done += n > 0 ? (size_t)n : 0;
    }
    if (!ok || fsync(fd) || rename(tmp, path)) {
        int e = errno;
        unlink(tmp);
        return kvd_fail(err, -e, "%s: %s", path, strerror(e));
    }
    return KVD_OK;
}
