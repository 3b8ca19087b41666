// RotationZoo files, and others of OSCAR's kind: a zip written by torch.save (stored, not
// compressed), holding one pickle and raw tensors in floats of 16, 32 or 64 bits, or bf16.
#include "calib/rotset.h"
#include "calib/torch_file.h"

// One file's contents: K or V.
struct side {
    uint16_t layers[KVD_MAX_LAYERS];
    const struct kvd_pickle_value *rotation[KVD_MAX_LAYERS];
    uint32_t n_layers, heads, dim;
    char objective[40];
    bool rounded; // some tensor is stored in 16 bits
};

static bool layer_id(const struct kvd_pickle_value *key, uint16_t *out)
{
    int64_t id = -1;
    if (key->kind == KVD_PICKLE_INT) {
        id = key->number;
    } else if (key->kind == KVD_PICKLE_STR && key->text[0] &&
               strspn(key->text, "0123456789") == strlen(key->text) && strlen(key->text) < 6) {
        id = atoi(key->text);
    }
    *out = (uint16_t)id;
    return id >= 0 && id <= KVD_MAX_MODEL_LAYER;
}

static int add_layer(const struct kvd_torch *z, struct side *s, uint16_t id,
                     const struct kvd_pickle_value *layer, struct kvd_error *err)
{
    const struct kvd_pickle_value *r = kvd_pickle_get(layer, "rotation");
    if (!r || r->kind != KVD_PICKLE_TENSOR)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: layer %u has no tensor named rotation", z->path,
                        id);
    // v1 has [D, D], v2 [H_kv, D, D]; the rank tells them apart.
    if (r->rank != 2 && r->rank != 3)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: layer %u: a rotation of rank %u; 2 or 3 is expected", z->path, id,
                        r->rank);
    int64_t heads = r->rank == 3 ? r->shape[0] : 1, rows = r->shape[r->rank - 2],
            dim = r->shape[r->rank - 1];
    if (rows != dim || heads < 1 || heads > KVD_MAX_KV_HEADS || dim < 1 || dim > KVD_MAX_HEAD_DIM)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: layer %u: a rotation of shape %lld x %lld x %lld",
                        z->path, id, (long long)heads, (long long)rows, (long long)dim);
    if (s->n_layers && (s->heads != (uint32_t)heads || s->dim != (uint32_t)dim))
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: layer %u has another shape than the layers before it", z->path, id);
    if (s->n_layers == KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_LIMIT, "%s: more than %d layers", z->path, KVD_MAX_LAYERS);
    s->heads = (uint32_t)heads;
    s->dim = (uint32_t)dim;
    uint32_t at = s->n_layers++;
    for (; at > 0 && s->layers[at - 1] > id; at--) {
        s->layers[at] = s->layers[at - 1];
        s->rotation[at] = s->rotation[at - 1];
    }
    if (at > 0 && s->layers[at - 1] == id)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: layer %u appears twice", z->path, id);
    s->layers[at] = id;
    s->rotation[at] = r;
    s->rounded |= kvd_torch_element_bytes(r->storage->element) == 2;
    return KVD_OK;
}

static int read_side(const struct kvd_torch *z, struct side *s, struct kvd_error *err)
{
    const struct kvd_pickle_value *root = kvd_pickle_root(z->pickle);
    const struct kvd_pickle_value *version = kvd_pickle_get(root, "format_version");
    const struct kvd_pickle_value *objective = kvd_pickle_get(root, "objective");
    const struct kvd_pickle_value *layers = kvd_pickle_get(root, "layers");
    // Files from before there were versions have none, and the shape of version 1 or 2.
    if (version && (version->kind != KVD_PICKLE_INT || version->number < 1 || version->number > 2))
        return kvd_fail(err, KVD_E_CORRUPT, "%s: format_version is neither 1 nor 2", z->path);
    if (!layers || layers->kind != KVD_PICKLE_DICT || layers->n_items == 0)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: there are no layers", z->path);
    if (objective && objective->kind == KVD_PICKLE_STR)
        snprintf(s->objective, sizeof(s->objective), "%s", objective->text);
    for (uint32_t i = 0; i + 1 < layers->n_items; i += 2) {
        uint16_t id;
        if (!layer_id(layers->items[i], &id))
            return kvd_fail(err, KVD_E_CORRUPT, "%s: a layer id that is no number from 0 to %d",
                            z->path, KVD_MAX_MODEL_LAYER);
        int rc = add_layer(z, s, id, layers->items[i + 1], err);
        if (rc)
            return rc;
    }
    return KVD_OK;
}

static float element(const uint8_t *at, enum kvd_pickle_element kind)
{
    uint16_t half;
    float single;
    double real;
    switch (kind) {
    case KVD_PICKLE_F16:
        memcpy(&half, at, sizeof(half));
        return kvd_fp16_to_f32(half);
    case KVD_PICKLE_BF16:
        memcpy(&half, at, sizeof(half));
        return kvd_bf16_to_f32(half);
    case KVD_PICKLE_F64:
        memcpy(&real, at, sizeof(real));
        return (float)real;
    case KVD_PICKLE_F32:
        break;
    }
    memcpy(&single, at, sizeof(single));
    return single;
}

// Copies a tensor, dense, into out. Offsets and strides are checked against the storage's real
// size.
static int copy_tensor(struct kvd_torch *z, const struct kvd_pickle_value *t, float *out,
                       struct kvd_error *err)
{
    char name[KVD_TORCH_ENTRY];
    uint64_t size;
    int rc = kvd_torch_storage(z, t, name, err);
    uint8_t *data KVD_FREE = rc ? NULL : kvd_torch_entry(z, name, 256 << 20, &size, err);
    if (!data)
        return KVD_E_CORRUPT;
    enum kvd_pickle_element kind = t->storage->element;
    int64_t bytes = kvd_torch_element_bytes(kind), last = t->offset, n = (int64_t)size / bytes;
    for (uint32_t i = 0; i < t->rank; i++)
        last += (t->shape[i] - 1) * t->stride[i]; // each product is below 2^62
    if (t->offset < 0 || last < 0 || last >= n || t->offset > n)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "%s: a tensor reaches beyond its storage of %lld values", z->path,
                        (long long)n);
    uint32_t r = t->rank;
    int64_t heads = r == 3 ? t->shape[0] : 1, head_stride = r == 3 ? t->stride[0] : 0,
            dim = t->shape[r - 1];
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < dim; i++)
            for (int64_t j = 0; j < dim; j++)
                *out++ = element(data + bytes * (t->offset + h * head_stride +
                                                 i * t->stride[r - 2] + j * t->stride[r - 1]),
                                 kind);
    return KVD_OK;
}

static int copy_side(struct kvd_torch *z, const struct side *s, float *out, struct kvd_error *err)
{
    uint64_t matrix = (uint64_t)s->dim * s->dim;
    for (uint32_t l = 0; l < s->n_layers; l++) {
        float *layer = out + l * s->heads * matrix;
        int rc = copy_tensor(z, s->rotation[l], layer, err);
        for (uint32_t h = 0; h < s->heads && rc == KVD_OK && s->rounded; h++)
            rc = kvd_rotation_straighten(layer + h * matrix, s->dim, err);
        if (rc)
            return kvd_fail_in(err, "layer %u", s->layers[l]);
    }
    return KVD_OK;
}

// Objectives say which side they are of, where they say it: a swapped pair would serve, badly.
static bool is_of(const char *objective, const char *const names[2])
{
    return strncmp(objective, names[0], strlen(names[0])) == 0 ||
           strncmp(objective, names[1], strlen(names[1])) == 0;
}

static int check_sides(const struct kvd_torch z[2], const struct side s[2], struct kvd_error *err)
{
    static const char *const of_k[] = {"qqt", "ktk"}, *const of_v[] = {"sst", "vtv"};
    if (strcmp(z[0].path, z[1].path) == 0)
        return KVD_OK; // one file, looked at by itself
    for (int i = 0; i < 2; i++)
        if (is_of(s[i].objective, i ? of_k : of_v))
            return kvd_fail(err, KVD_E_INVALID,
                            "%s has the objective %s, which is one of %s, and is given as %s: name "
                            "K's file first, then V's",
                            z[i].path, s[i].objective, i ? "K" : "V", i ? "V" : "K");
    return KVD_OK;
}

static int combine(struct kvd_torch z[2], const struct side s[2], struct kvd_rotset *set,
                   struct kvd_error *err)
{
    int rc = check_sides(z, s, err);
    if (rc)
        return rc;
    if (s[0].n_layers != s[1].n_layers || s[0].heads != s[1].heads ||
        memcmp(s[0].layers, s[1].layers, sizeof(s[0].layers)) != 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s and %s have different layers or heads: they are not one set", z[0].path,
                        z[1].path);
    memcpy(set->layers, s[0].layers, sizeof(set->layers));
    set->n_layers = s[0].n_layers;
    set->heads = s[0].heads;
    set->dim_k = s[0].dim;
    set->dim_v = s[1].dim;
    snprintf(set->objective, sizeof(set->objective), "K %s, V %s", s[0].objective, s[1].objective);
    snprintf(set->provenance, sizeof(set->provenance), "imported from RotationZoo files");
    rc = kvd_rotset_alloc(set, err);
    if (rc == KVD_OK)
        rc = copy_side(&z[0], &s[0], set->k, err);
    if (rc == KVD_OK)
        rc = copy_side(&z[1], &s[1], set->v, err);
    return rc ? rc : kvd_rotset_check(set, NULL, err);
}

struct kvd_rotset *kvd_rotset_import(const char *path_k, const char *path_v, const char *model,
                                     struct kvd_error *err)
{
    struct kvd_torch z[2] = {{0}};
    struct side *s KVD_FREE = calloc(2, sizeof(*s));
    struct kvd_rotset *set KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*set));
    if (!s || !set) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    int rc = kvd_torch_open(&z[0], path_k, err);
    if (rc == KVD_OK)
        rc = kvd_torch_open(&z[1], path_v, err);
    for (int i = 0; i < 2 && rc == KVD_OK; i++)
        rc = read_side(&z[i], &s[i], err);
    snprintf(set->model, sizeof(set->model), "%s", model);
    if (rc == KVD_OK)
        rc = combine(z, s, set, err);
    kvd_torch_close(&z[0]);
    kvd_torch_close(&z[1]);
    return rc ? NULL : KVD_TAKE(set);
}
