// The native file: safetensors (8-byte header length, JSON header, raw little-endian data) with
// four tensors, k.rotation and v.rotation [layers, heads, dim, dim], k.clip and v.clip [layers,
// heads], all F32, and metadata.
#include "calib/rotset.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <sys/stat.h>

enum { MAX_HEADER = 1 << 20, TENSORS = 4 };

static const char *const tensor_names[TENSORS] = {"k.rotation", "v.rotation", "k.clip", "v.clip"};

static float *tensor_data(const struct kvd_rotset *s, int i)
{
    float *const data[TENSORS] = {s->k, s->v, s->clip_k, s->clip_v};
    return data[i];
}

// Shape of tensor i; returns the number of values.
static uint64_t tensor_shape(const struct kvd_rotset *s, int i, uint64_t shape[4], size_t *rank)
{
    uint32_t dim = i % 2 ? s->dim_v : s->dim_k;
    shape[0] = s->n_layers;
    shape[1] = s->heads;
    shape[2] = shape[3] = dim;
    *rank = i < 2 ? 4 : 2;
    return shape[0] * shape[1] * (i < 2 ? (uint64_t)dim * dim : 1);
}

static int corrupt(struct kvd_error *err, const char *path, const char *why)
{
    return kvd_fail(err, KVD_E_CORRUPT, "%s: %s", path, why);
}

static int read_file(const char *path, uint8_t **out, size_t *size, struct kvd_error *err)
{
    int fd KVD_CLOSE = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        return kvd_fail(err, errno == ENOENT ? KVD_E_NOT_FOUND : -errno, "%s: %s", path,
                        strerror(errno));
    if (!S_ISREG(st.st_mode))
        return kvd_fail(err, KVD_E_INVALID, "%s: not a regular file", path);
    if ((uint64_t)st.st_size > KVD_ROTSET_MAX_BYTES)
        return kvd_fail(err, KVD_E_LIMIT, "%s: %lld bytes; a rotation set has at most %llu", path,
                        (long long)st.st_size, (unsigned long long)KVD_ROTSET_MAX_BYTES);
    uint8_t *data KVD_FREE = malloc((size_t)st.st_size + 1);
    if (!data)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    size_t have = 0;
    while (have < (size_t)st.st_size) {
        ssize_t n = read(fd, data + have, (size_t)st.st_size - have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return kvd_fail(err, n < 0 ? -errno : KVD_E_CORRUPT, "%s: %s", path,
                            n < 0 ? strerror(errno) : "truncated");
        have += (size_t)n;
    }
    *size = have;
    *out = KVD_TAKE(data);
    return KVD_OK;
}

static int parse_layers(struct kvd_rotset *s, const char *text, const char *path,
                        struct kvd_error *err)
{
    for (const char *c = text; *c;) {
        char *end;
        unsigned long id = strtoul(c, &end, 10);
        if (end == c || id > KVD_MAX_MODEL_LAYER || s->n_layers == KVD_MAX_LAYERS ||
            (*end && *end != ',') || (s->n_layers && id <= s->layers[s->n_layers - 1]))
            return corrupt(err, path, "metadata: layers is not an ascending list of numbers");
        s->layers[s->n_layers++] = (uint16_t)id;
        c = *end ? end + 1 : end;
    }
    return s->n_layers ? KVD_OK : corrupt(err, path, "metadata: there are no layers");
}

static void copy_text(char *to, size_t cap, const json_t *from)
{
    snprintf(to, cap, "%s", json_is_string(from) ? json_string_value(from) : "");
}

static uint32_t dim_of(const json_t *header, const char *tensor, size_t axis)
{
    const json_t *n =
        json_array_get(json_object_get(json_object_get(header, tensor), "shape"), axis);
    json_int_t v = json_is_integer(n) ? json_integer_value(n) : 0;
    return v > 0 && v <= 65536 ? (uint32_t)v : 0;
}

static int copy_tensor(const json_t *header, struct kvd_rotset *s, int i, const uint8_t *data,
                       size_t size, const char *path, struct kvd_error *err)
{
    const json_t *t = json_object_get(header, tensor_names[i]);
    const json_t *dtype = json_object_get(t, "dtype"), *at = json_object_get(t, "data_offsets");
    uint64_t shape[4];
    size_t rank;
    uint64_t n = tensor_shape(s, i, shape, &rank);
    if (!json_is_string(dtype) || strcmp(json_string_value(dtype), "F32") != 0 ||
        json_array_size(at) != 2 || json_array_size(json_object_get(t, "shape")) != rank)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: tensor %s is missing or not F32 of rank %zu", path,
                        tensor_names[i], rank);
    for (size_t d = 0; d < rank; d++)
        if (dim_of(header, tensor_names[i], d) != shape[d])
            return kvd_fail(
                err, KVD_E_CORRUPT,
                "%s: tensor %s has another shape than the other tensors and the metadata say", path,
                tensor_names[i]);
    json_int_t begin = json_integer_value(json_array_get(at, 0)),
               end = json_integer_value(json_array_get(at, 1));
    if (begin < 0 || end < begin || (uint64_t)end > size ||
        (uint64_t)(end - begin) != n * sizeof(float))
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: tensor %s lies outside the file or has the wrong size", path,
                        tensor_names[i]);
    memcpy(tensor_data(s, i), data + begin, n * sizeof(float));
    return KVD_OK;
}

static int parse(const char *path, const uint8_t *file, size_t size, struct kvd_rotset *s,
                 struct kvd_error *err)
{
    uint64_t n = 0;
    if (size < 8)
        return corrupt(err, path, "truncated: no header");
    for (int i = 0; i < 8; i++)
        n |= (uint64_t)file[i] << (8 * i);
    if (n > MAX_HEADER || n > size - 8)
        return corrupt(err, path, "the header is longer than the file or than 1 MiB");
    json_error_t je;
    // jansson bounds the nesting depth; duplicate keys are refused.
    json_t *header = json_loadb((const char *)file + 8, n, JSON_REJECT_DUPLICATES, &je);
    if (!header)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: the header is not JSON: %s (byte %d)", path,
                        je.text, je.position);
    const json_t *meta = json_object_get(header, "__metadata__");
    const char *format = json_string_value(json_object_get(meta, "format"));
    const char *layers = json_string_value(json_object_get(meta, "layers"));
    const char *payload = json_string_value(json_object_get(meta, "payload"));
    const uint8_t *data = file + 8 + n;
    size_t data_size = size - 8 - n;
    char digest[KVD_DIGEST_TEXT];
    int rc = KVD_OK;
    kvd_digest(data, data_size, digest);
    if (!format || strcmp(format, "kvd-rotation-set/1") != 0 || !layers)
        rc = corrupt(err, path, "metadata: format is not kvd-rotation-set/1, or layers is missing");
    else if (!payload || strcmp(payload, digest) != 0)
        rc = corrupt(err, path, "the tensors do not have the digest that the metadata says");
    copy_text(s->model, sizeof(s->model), json_object_get(meta, "model"));
    copy_text(s->objective, sizeof(s->objective), json_object_get(meta, "objective"));
    copy_text(s->provenance, sizeof(s->provenance), json_object_get(meta, "provenance"));
    if (rc == KVD_OK)
        rc = parse_layers(s, layers, path, err);
    s->heads = dim_of(header, "k.rotation", 1);
    s->dim_k = dim_of(header, "k.rotation", 3);
    s->dim_v = dim_of(header, "v.rotation", 3);
    // Memory is taken only for what the file can hold.
    if (rc == KVD_OK && (uint64_t)s->n_layers * s->heads *
                                ((uint64_t)s->dim_k * s->dim_k + s->dim_v * s->dim_v) * 4 >
                            data_size)
        rc = corrupt(err, path, "the file is too short for its shapes");
    if (rc == KVD_OK && kvd_rotset_alloc(s, err))
        rc = kvd_fail_in(err, "%s", path);
    for (int i = 0; i < TENSORS && rc == KVD_OK; i++)
        rc = copy_tensor(header, s, i, data, data_size, path, err);
    json_decref(header);
    return rc;
}

struct kvd_rotset *kvd_rotset_read(const char *path, struct kvd_error *err)
{
    uint8_t *file KVD_FREE = NULL;
    struct kvd_rotset *s KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*s));
    size_t size = 0;
    if (!s || read_file(path, &file, &size, err) || parse(path, file, size, s, err))
        return NULL;
    kvd_digest(file, size, s->digest);
    if (kvd_rotset_check(s, NULL, err)) {
        kvd_fail_in(err, "%s", path);
        return NULL;
    }
    return KVD_TAKE(s);
}

static char *make_header(const struct kvd_rotset *s, const char *payload)
{
    json_t *root = json_object(), *meta = json_object();
    char *layers KVD_FREE = calloc(KVD_MAX_LAYERS, 7);
    for (uint32_t i = 0, at = 0; i < s->n_layers; i++)
        at += (uint32_t)sprintf(layers + at, "%s%u", i ? "," : "", s->layers[i]);
    json_object_set_new(meta, "format", json_string("kvd-rotation-set/1"));
    json_object_set_new(meta, "model", json_string(s->model));
    json_object_set_new(meta, "objective", json_string(s->objective));
    json_object_set_new(meta, "provenance", json_string(s->provenance));
    json_object_set_new(meta, "layers", json_string(layers));
    json_object_set_new(meta, "payload", json_string(payload));
    json_object_set_new(root, "__metadata__", meta);
    uint64_t at = 0;
    for (int i = 0; i < TENSORS; i++) {
        uint64_t shape[4];
        size_t rank;
        uint64_t bytes = tensor_shape(s, i, shape, &rank) * sizeof(float);
        json_t *t = json_object(), *dims = json_array();
        for (size_t d = 0; d < rank; d++)
            json_array_append_new(dims, json_integer((json_int_t)shape[d]));
        json_object_set_new(t, "dtype", json_string("F32"));
        json_object_set_new(t, "shape", dims);
        json_object_set_new(t, "data_offsets",
                            json_pack("[I,I]", (json_int_t)at, (json_int_t)at + (json_int_t)bytes));
        json_object_set_new(root, tensor_names[i], t);
        at += bytes;
    }
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return text;
}

// The whole file in memory: sets are a few megabytes.
static uint8_t *render(const struct kvd_rotset *s, size_t *size)
{
    uint64_t total = 0, shape[4];
    size_t rank;
    for (int i = 0; i < TENSORS; i++)
        total += tensor_shape(s, i, shape, &rank) * sizeof(float);
    uint8_t *data KVD_FREE = malloc(total);
    if (!data)
        return NULL;
    uint64_t at = 0;
    for (int i = 0; i < TENSORS; i++) {
        uint64_t bytes = tensor_shape(s, i, shape, &rank) * sizeof(float);
        memcpy(data + at, tensor_data(s, i), bytes);
        at += bytes;
    }
    char payload[KVD_DIGEST_TEXT];
    kvd_digest(data, total, payload);
    char *header KVD_FREE = make_header(s, payload);
    size_t n = header ? strlen(header) : 0, padded = kvd_round_up(n, 8);
    uint8_t *file = header ? malloc(8 + padded + total) : NULL;
    if (!file)
        return NULL;
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    memset(file + 8, ' ', padded);
    memcpy(file + 8, header, n);
    memcpy(file + 8 + padded, data, total);
    *size = 8 + padded + total;
    return file;
}

int kvd_rotset_write(struct kvd_rotset *s, const char *path, struct kvd_error *err)
{
    size_t size = 0;
    uint8_t *file KVD_FREE = render(s, &size);
    char tmp[4096];
    if (!file || (size_t)snprintf(tmp, sizeof(tmp), "%s.XXXXXX", path) >= sizeof(tmp))
        return kvd_fail(err, KVD_E_INTERNAL, "%s: out of memory, or the path is too long", path);
    int fd KVD_CLOSE = mkostemp(tmp, O_CLOEXEC);
    if (fd < 0)
        return kvd_fail(err, -errno, "%s: %s", tmp, strerror(errno));
    bool ok = fchmod(fd, 0644) == 0;
    for (size_t done = 0; ok && done < size;) {
        ssize_t n = write(fd, file + done, size - done);
        ok = n > 0 || (n < 0 && errno == EINTR);
        done += n > 0 ? (size_t)n : 0;
    }
    if (!ok || fsync(fd) || rename(tmp, path)) {
        int e = errno;
        unlink(tmp);
        return kvd_fail(err, -e, "%s: %s", path, strerror(e));
    }
    kvd_digest(file, size, s->digest);
    return KVD_OK;
}

struct kvd_rotset *kvd_rotset_open(const char *path, struct kvd_error *err)
{
    size_t n = strlen(path);
    if (n > 3 && strcmp(path + n - 3, ".pt") == 0)
        return kvd_rotset_import(path, path, "file", err);
    return kvd_rotset_read(path, err);
}
