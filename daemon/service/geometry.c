#include "daemon/service/geometry.h"

#include "calib/rotset.h"
#include "calib/store.h"

static int set_codec(const Kvd__V1__Geometry *from, struct kvd_geometry *to, struct kvd_error *err)
{
    const char *rotation = from->rotation_set;
    to->codec = kvd_codec_find(from->codec);
    if (to->codec == KVD_CODEC_COUNT)
        return kvd_fail(err, KVD_E_INVALID, "geometry.codec is '%.40s'; known are " KVD_CODEC_NAMES,
                        from->codec);
    if (to->codec == KVD_CODEC_BF16)
        return KVD_OK;
    if (!*rotation)
        rotation = to->codec >= KVD_CODEC_TURBOQUANT_2 ? "random" : "hadamard";
    if (!kvd_rotset_built_in(rotation) && !kvd_store_ref_valid(rotation))
        return kvd_fail(err, KVD_E_INVALID,
                        "geometry.rotation_set is '%.80s'; it wants model@tag, sha256:<64 hex>, "
                        "hadamard, random or identity",
                        rotation);
    if (strlen(rotation) >= sizeof(to->rotation))
        return kvd_fail(err, KVD_E_INVALID,
                        "geometry.rotation_set has more than %zu characters; use its digest",
                        sizeof(to->rotation) - 1);
    strcpy(to->rotation, rotation);
    return KVD_OK;
}

int kvd_geometry_from_proto(const Kvd__V1__Geometry *from, struct kvd_geometry *to,
                            struct kvd_error *err)
{
    memset(to, 0, sizeof(*to)); // geometries are compared byte by byte
    if (from->n_layers > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INVALID, "geometry has %zu layers; 1 to %d are possible",
                        from->n_layers, KVD_MAX_LAYERS);
    for (size_t i = 0; i < from->n_layers; i++) {
        if (from->layers[i] > KVD_MAX_MODEL_LAYER)
            return kvd_fail(err, KVD_E_INVALID, "geometry.layers holds %u; ids go up to %d",
                            from->layers[i], KVD_MAX_MODEL_LAYER);
        to->layers[i] = (uint16_t)from->layers[i];
    }
    to->n_layers = (uint32_t)from->n_layers;
    to->q_heads = from->q_heads;
    to->kv_heads = from->kv_heads;
    to->head_dim_k = from->head_dim_k;
    to->head_dim_v = from->head_dim_v;
    to->sink = from->windows ? from->windows->sink : KVD_DEFAULT_SINK;
    to->recent = from->windows ? from->windows->recent : KVD_DEFAULT_RECENT;
    int rc = set_codec(from, to, err);
    return rc ? rc : kvd_geometry_check(to, err);
}

Kvd__V1__Geometry *kvd_geometry_to_proto(const struct kvd_geometry *from,
                                         struct kvd_proto_geometry *to)
{
    kvd__v1__geometry__init(&to->g);
    kvd__v1__windows__init(&to->windows);
    for (uint32_t i = 0; i < from->n_layers; i++)
        to->layers[i] = from->layers[i];
    to->g.n_layers = from->n_layers;
    to->g.layers = to->layers;
    to->g.q_heads = from->q_heads;
    to->g.kv_heads = from->kv_heads;
    to->g.head_dim_k = from->head_dim_k;
    to->g.head_dim_v = from->head_dim_v;
    to->g.codec = (char *)kvd_codec_name(from->codec);
    to->g.rotation_set = (char *)from->rotation;
    to->g.windows = &to->windows;
    to->windows.sink = from->sink;
    to->windows.recent = from->recent;
    return &to->g;
}
