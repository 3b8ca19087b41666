// The native file: safetensors, all F32, and metadata. Of rotations k.rotation and v.rotation
// [layers, heads, dim, dim], k.clip and v.clip [layers, heads] and, where a gain is not 1, k.gain
// and v.gain [layers, heads]. Format kvd-rotation-set/2 says in k.scale and v.scale which scales
// the sides have (kernels/quantize.h); sets with published ones on both are of format /1, which
// knows no other. Format /3 has transforms (calib/transforms.h) instead: k.transform, k.inverse,
// v.transform, v.inverse [layers, heads, dim, dim], k.mean, v.mean, k.sigma [layers, heads, dim]
// and k.bits [layers, heads, dim / 16], and says in codec which one they are for. Format /4 is of
// sets with marks (calib/marks.h), which their text in `marks` says; it has transforms if it has a
// codec, else scales and rotations. So whoever knows no marks refuses such a set, rather than serve
// its layers as if there were none.
#include "calib/marks.h"
#include "calib/rotset.h"
#include "calib/safetensors.h"
#include "calib/transforms.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

enum { TENSORS = 8, GAINS = 4, MAX_HEADER = 1 << 20 }; // gains: of rotations, from this tensor on

// A tensor of a set: [layers, heads], then `rank` times `dim`.
struct tensor {
    const char *name;
    float *data;
    uint32_t dim, rank;
};

// The tensors that a set has, gains among them whatever they are. Returns how many.
static uint32_t tensors_of(const struct kvd_rotset *s, struct tensor out[TENSORS])
{
    const struct kvd_transforms *t = s->transforms;
    if (!t) {
        const struct tensor rotations[] = {
            {"k.rotation", s->k, s->dim_k, 2}, {"v.rotation", s->v, s->dim_v, 2},
            {"k.clip", s->clip_k, 0, 0},       {"v.clip", s->clip_v, 0, 0},
            {"k.gain", s->gain_k, 0, 0},       {"v.gain", s->gain_v, 0, 0}};
        memcpy(out, rotations, sizeof(rotations));
        return KVD_LEN(rotations);
    }
    const struct tensor transforms[TENSORS] = {{"k.transform", t->k, s->dim_k, 2},
                                               {"k.inverse", t->k_inverse, s->dim_k, 2},
                                               {"k.mean", t->k_mean, s->dim_k, 1},
                                               {"k.sigma", t->k_sigma, s->dim_k, 1},
                                               {"k.bits", t->k_bits, s->dim_k / KVD_TC_TILE, 1},
                                               {"v.transform", t->v, s->dim_v, 2},
                                               {"v.inverse", t->v_inverse, s->dim_v, 2},
                                               {"v.mean", t->v_mean, s->dim_v, 1}};
    memcpy(out, transforms, sizeof(transforms));
    return TENSORS;
}

// Returns the rank.
static uint32_t shape_of(const struct kvd_rotset *s, const struct tensor *t, uint64_t shape[4])
{
    shape[0] = s->n_layers;
    shape[1] = s->heads;
    shape[2] = shape[3] = t->dim;
    return 2 + t->rank;
}

enum { ROTATIONS, SCALED_ROTATIONS, TRANSFORMS, MARKED, FORMATS };
static const char *const formats[FORMATS] = {"kvd-rotation-set/1", "kvd-rotation-set/2",
                                             "kvd-rotation-set/3", "kvd-rotation-set/4"};

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
    if (kvd_read_at(path, fd, data, (size_t)st.st_size, 0, err))
        return err->code;
    *size = (size_t)st.st_size;
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

// What the metadata says of scales, if the format has any.
static int parse_scales(struct kvd_rotset *s, const char *k, const char *v, bool wanted,
                        const char *path, struct kvd_error *err)
{
    if (!wanted)
        return k || v ? corrupt(err, path,
                                "metadata: scales belong to rotations of "
                                "kvd-rotation-set/2 and /4")
                      : KVD_OK;
    int scale_k = k ? kvd_scale_parse(k) : -1, scale_v = v ? kvd_scale_parse(v) : -1;
    if (scale_k < 0 || scale_v < 0)
        return corrupt(err, path, "metadata: k.scale or v.scale is not " KVD_SCALE_NAMES);
    s->scale_k = (enum kvd_scale)scale_k;
    s->scale_v = (enum kvd_scale)scale_v;
    return KVD_OK;
}

// The marks, and scales, that the format has; and, of transforms, which codec they are for
// (KVD_CODEC_COUNT: they are rotations).
static int parse_format(struct kvd_rotset *s, const struct kvd_safetensors *st, const char *path,
                        uint32_t *tc, struct kvd_error *err)
{
    int format = 0;
    const char *name = kvd_safetensors_metadata(st, "format");
    const char *k = kvd_safetensors_metadata(st, "k.scale");
    const char *v = kvd_safetensors_metadata(st, "v.scale");
    const char *codec = kvd_safetensors_metadata(st, "codec");
    const char *marks = kvd_safetensors_metadata(st, "marks");
    while (format < FORMATS && name && strcmp(name, formats[format]) != 0)
        format++;
    if (!name || format == FORMATS)
        return corrupt(err, path, "metadata: format is not kvd-rotation-set/1, /2, /3 or /4");
    bool transforms = format == TRANSFORMS || (format == MARKED && codec);
    *tc = transforms && codec ? kvd_tc_find(codec) : KVD_CODEC_COUNT;
    if (transforms && *tc == KVD_CODEC_COUNT)
        return corrupt(err, path, "metadata: codec is not tc2 or tc2.5");
    if (!marks != (format != MARKED))
        return corrupt(err, path, "metadata: marks are what kvd-rotation-set/4 has, and no other");
    if (marks && kvd_marks_parse(s, marks, err)) {
        err->code = KVD_E_CORRUPT;
        return kvd_fail_in(err, "%s: metadata", path);
    }
    bool scales = format == SCALED_ROTATIONS || (format == MARKED && !transforms);
    return parse_scales(s, k, v, scales, path, err);
}

static void copy_text(char *to, size_t cap, const char *from)
{
    snprintf(to, cap, "%s", from ? from : "");
}

static int duplicate(char **to, const char *from)
{
    *to = from ? strdup(from) : NULL;
    return from && !*to ? KVD_E_INTERNAL : KVD_OK;
}

// A dimension of a tensor that may not be there; 0 then, and when it is impossible.
static uint32_t dim_of(const struct kvd_safetensors *st, const char *tensor, uint32_t axis)
{
    const struct kvd_safetensor *t = kvd_safetensors_find(st, tensor);
    uint64_t n = t && axis < t->rank ? t->shape[axis] : 0;
    return n <= 65536 ? (uint32_t)n : 0;
}

static int copy_tensor(const struct kvd_safetensors *st, const struct kvd_rotset *s,
                       const struct tensor *to, const uint8_t *file, const char *path,
                       struct kvd_error *err)
{
    const struct kvd_safetensor *t = kvd_safetensors_find(st, to->name);
    uint64_t shape[4];
    uint32_t rank = shape_of(s, to, shape);
    if (!t || t->type != KVD_TENSOR_F32 || t->rank != rank)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: tensor %s is missing or not F32 of rank %u", path,
                        to->name, rank);
    if (memcmp(t->shape, shape, rank * sizeof(*shape)) != 0)
        return kvd_fail(
            err, KVD_E_CORRUPT,
            "%s: tensor %s has another shape than the other tensors and the metadata say", path,
            to->name);
    memcpy(to->data, file + t->at, t->bytes);
    return KVD_OK;
}

static int parse_tensors(const char *path, const uint8_t *file, size_t size,
                         const struct kvd_safetensors *st, uint32_t tc, struct kvd_rotset *s,
                         struct kvd_error *err)
{
    bool transforms = tc != KVD_CODEC_COUNT;
    const char *k = transforms ? "k.transform" : "k.rotation";
    const char *v = transforms ? "v.transform" : "v.rotation";
    uint64_t copies = transforms ? 2 : 1; // the inverses
    s->heads = dim_of(st, k, 1);
    s->dim_k = dim_of(st, k, 3);
    s->dim_v = dim_of(st, v, 3);
    // Memory is taken only for what the file can hold.
    if (copies * s->n_layers * s->heads *
            ((uint64_t)s->dim_k * s->dim_k + (uint64_t)s->dim_v * s->dim_v) * 4 >
        size)
        return corrupt(err, path, "the file is too short for its shapes");
    if (transforms ? kvd_transforms_alloc(s, tc, err) : kvd_rotset_alloc(s, err))
        return kvd_fail_in(err, "%s", path);
    struct tensor all[TENSORS];
    uint32_t n = tensors_of(s, all);
    if (!transforms && !kvd_safetensors_find(st, all[GAINS].name) &&
        !kvd_safetensors_find(st, all[GAINS + 1].name))
        n = GAINS;
    for (uint32_t i = 0; i < n; i++)
        if (copy_tensor(st, s, &all[i], file, path, err))
            return err->code;
    return KVD_OK;
}

static int parse(const char *path, const uint8_t *file, size_t size,
                 const struct kvd_safetensors *st, struct kvd_rotset *s, struct kvd_error *err)
{
    const char *layers = kvd_safetensors_metadata(st, "layers");
    const char *payload = kvd_safetensors_metadata(st, "payload");
    char digest[KVD_DIGEST_TEXT];
    uint32_t tc = KVD_CODEC_COUNT;
    kvd_digest(file + st->data_at, size - st->data_at, digest);
    if (parse_format(s, st, path, &tc, err))
        return err->code;
    if (!layers)
        return corrupt(err, path, "metadata: layers is missing");
    if (!payload || strcmp(payload, digest) != 0)
        return corrupt(err, path, "the tensors do not have the digest that the metadata says");
    copy_text(s->model, sizeof(s->model), kvd_safetensors_metadata(st, "model"));
    copy_text(s->objective, sizeof(s->objective), kvd_safetensors_metadata(st, "objective"));
    copy_text(s->provenance, sizeof(s->provenance), kvd_safetensors_metadata(st, "provenance"));
    if (duplicate(&s->fitted_to, kvd_safetensors_metadata(st, "fitted_to")) ||
        duplicate(&s->clips_fitted_to, kvd_safetensors_metadata(st, "clips_fitted_to")))
        return kvd_fail(err, KVD_E_INTERNAL, "%s: out of memory", path);
    const char *length = kvd_safetensors_metadata(st, "fitted_length");
    int read = 0;
    if (length &&
        (strspn(length, "0123456789") != strlen(length) ||
         sscanf(length, "%19" SCNu64 "%n", &s->fitted_length, &read) != 1 || length[read]))
        return corrupt(err, path, "metadata: fitted_length is no number of tokens");
    if (parse_layers(s, layers, path, err))
        return err->code;
    return parse_tensors(path, file, size, st, tc, s, err);
}

struct kvd_rotset *kvd_rotset_read(const char *path, struct kvd_error *err)
{
    uint8_t *file KVD_FREE = NULL;
    struct kvd_rotset *s KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*s));
    size_t size = 0;
    struct kvd_safetensors st;
    if (!s || read_file(path, &file, &size, err))
        return NULL;
    // It may come from anywhere: less than a safetensors file may have is enough for a set.
    if (size >= 8 && kvd_safetensors_header_length(file) > MAX_HEADER) {
        corrupt(err, path, "the header is longer than the file or than 1 MiB");
        return NULL;
    }
    if (kvd_safetensors_parse(path, file, size, size, &st, err))
        return NULL;
    int rc = parse(path, file, size, &st, s, err);
    kvd_safetensors_free(&st);
    if (rc)
        return NULL;
    kvd_digest(file, size, s->digest);
    if (kvd_rotset_check(s, NULL, err)) {
        kvd_fail_in(err, "%s", path);
        return NULL;
    }
    return KVD_TAKE(s);
}

static bool has_gains(const struct kvd_rotset *s)
{
    for (uint64_t i = 0; i < (uint64_t)s->n_layers * s->heads; i++)
        if (s->gain_k[i] != 1 || s->gain_v[i] != 1)
            return true;
    return false;
}

static int format_of(const struct kvd_rotset *s)
{
    if (s->n_marks)
        return MARKED;
    if (s->transforms)
        return TRANSFORMS;
    bool scales = s->scale_k != KVD_SCALE_PUBLISHED || s->scale_v != KVD_SCALE_PUBLISHED;
    return scales ? SCALED_ROTATIONS : ROTATIONS;
}

static json_t *metadata_of(const struct kvd_rotset *s, const char *layers)
{
    int format = format_of(s);
    char marks[KVD_MARKS_TEXT];
    json_t *metadata =
        json_pack("{s:s, s:s, s:s, s:s, s:s}", "format", formats[format], "model", s->model,
                  "objective", s->objective, "provenance", s->provenance, "layers", layers);
    if (format == MARKED)
        json_object_set_new(metadata, "marks", json_string(kvd_marks_text(s, marks)));
    if (format == SCALED_ROTATIONS || (format == MARKED && !s->transforms)) {
        json_object_set_new(metadata, "k.scale", json_string(kvd_scale_name(s->scale_k)));
        json_object_set_new(metadata, "v.scale", json_string(kvd_scale_name(s->scale_v)));
    }
    if (s->transforms)
        json_object_set_new(metadata, "codec", json_string(kvd_codec_name(s->transforms->codec)));
    if (s->fitted_to)
        json_object_set_new(metadata, "fitted_to", json_string(s->fitted_to));
    if (s->clips_fitted_to)
        json_object_set_new(metadata, "clips_fitted_to", json_string(s->clips_fitted_to));
    if (s->fitted_length) {
        char length[24];
        snprintf(length, sizeof(length), "%" PRIu64, s->fitted_length);
        json_object_set_new(metadata, "fitted_length", json_string(length));
    }
    return metadata;
}

int kvd_rotset_write(struct kvd_rotset *s, const char *path, struct kvd_error *err)
{
    struct tensor all[TENSORS];
    struct kvd_tensor_source tensors[TENSORS];
    uint32_t n = tensors_of(s, all);
    if (!s->transforms && !has_gains(s))
        n = GAINS;
    char *layers KVD_FREE = calloc(KVD_MAX_LAYERS, 7);
    size_t size = 0;
    if (!layers)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0, at = 0; i < s->n_layers; i++)
        at += (uint32_t)sprintf(layers + at, "%s%u", i ? "," : "", s->layers[i]);
    for (uint32_t i = 0; i < n; i++) {
        tensors[i] = (struct kvd_tensor_source){
            .name = all[i].name, .type = KVD_TENSOR_F32, .data = all[i].data};
        tensors[i].rank = shape_of(s, &all[i], tensors[i].shape);
    }
    json_t *metadata = metadata_of(s, layers);
    // Sets are a few megabytes: the whole file is made in memory.
    uint8_t *file KVD_FREE = kvd_safetensors_render(tensors, n, metadata, "payload", &size);
    if (!file)
        return kvd_fail(err, KVD_E_INTERNAL, "%s: out of memory", path);
    if (kvd_write_file(path, file, size, err))
        return err->code;
    kvd_digest(file, size, s->digest);
    return KVD_OK;
}

int kvd_rotset_copy(const char *from, const char *digest, const char *path, struct kvd_error *err)
{
    uint8_t *file KVD_FREE = NULL;
    char found[KVD_DIGEST_TEXT];
    size_t size = 0;
    if (read_file(from, &file, &size, err))
        return err->code;
    kvd_digest(file, size, found);
    if (strcmp(found, digest) != 0)
        return kvd_fail(err, KVD_E_CORRUPT, "%s changed while it was read", from);
    return kvd_write_file(path, file, size, err);
}

static bool is_pt(const char *path)
{
    size_t n = strlen(path);
    return n > 3 && strcmp(path + n - 3, ".pt") == 0;
}

struct kvd_rotset *kvd_rotset_open(const char *path, struct kvd_error *err)
{
    return is_pt(path) ? kvd_rotset_import(path, path, "file", err) : kvd_rotset_read(path, err);
}
