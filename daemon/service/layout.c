#include "daemon/service/layout.h"

#include "calib/rotset.h"
#include "calib/store.h"

static int set_codec(const Kvd__V1__Geometry *from, struct kvd_layout *to, struct kvd_error *err)
{
    const char *rotation = from->rotation_set;
    uint32_t codec = to->planes[0].codec = kvd_codec_find(from->codec);
    if (codec == KVD_CODEC_COUNT)
        return kvd_fail(err, KVD_E_INVALID, "layout.codec is '%.40s'; known are %s", from->codec,
                        kvd_codec_names());
    if (codec == KVD_CODEC_BF16)
        return KVD_OK;
    if (!*rotation)
        rotation = kvd_codec_transform(codec);
    if (!kvd_rotset_built_in(rotation) && !kvd_store_ref_valid(rotation))
        return kvd_fail(err, KVD_E_INVALID,
                        "layout.rotation_set is '%.80s'; it wants model@tag, sha256:<64 hex>, "
                        "hadamard, random or identity",
                        rotation);
    if (strlen(rotation) >= sizeof(to->rotation))
        return kvd_fail(err, KVD_E_INVALID,
                        "layout.rotation_set has more than %zu characters; use its digest",
                        sizeof(to->rotation) - 1);
    strcpy(to->rotation, rotation);
    return KVD_OK;
}

int kvd_layout_from_proto(const Kvd__V1__Geometry *from, struct kvd_layout *to,
                          struct kvd_error *err)
{
    memset(to, 0, sizeof(*to)); // layouts are compared byte by byte
    if (from->n_layers > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INVALID, "layout has %zu layers; 1 to %d are possible",
                        from->n_layers, KVD_MAX_LAYERS);
    for (size_t i = 0; i < from->n_layers; i++) {
        if (from->layers[i] > KVD_MAX_MODEL_LAYER)
            return kvd_fail(err, KVD_E_INVALID, "layout.layers holds %u; ids go up to %d",
                            from->layers[i], KVD_MAX_MODEL_LAYER);
        to->layers[i] = (uint16_t)from->layers[i];
    }
    to->n_layers = (uint32_t)from->n_layers;
    to->n_planes = 1;
    struct kvd_plane *p = &to->planes[0];
    p->n_layers = to->n_layers;
    p->q_heads = from->q_heads;
    p->kv_heads = from->kv_heads;
    p->head_dim_k = from->head_dim_k;
    p->head_dim_v = from->head_dim_v;
    p->sink = from->windows ? from->windows->sink : KVD_DEFAULT_SINK;
    p->recent = from->windows ? from->windows->recent : KVD_DEFAULT_RECENT;
    int rc = set_codec(from, to, err);
    if (rc == KVD_OK && kvd_plane_check(p, err))
        rc = kvd_fail_in(err, "layout");
    for (uint32_t i = 1; i < to->n_layers && rc == KVD_OK; i++)
        if (to->layers[i] <= to->layers[i - 1])
            rc = kvd_fail(err, KVD_E_INVALID, "layout.layers is not ascending: %u after %u",
                          to->layers[i], to->layers[i - 1]);
    return rc;
}

Kvd__V1__Geometry *kvd_layout_to_proto(const struct kvd_layout *from, struct kvd_proto_layout *to)
{
    const struct kvd_plane *p = &from->planes[0];
    kvd__v1__geometry__init(&to->g);
    kvd__v1__windows__init(&to->windows);
    for (uint32_t i = 0; i < from->n_layers; i++)
        to->layers[i] = from->layers[i];
    to->g.n_layers = from->n_layers;
    to->g.layers = to->layers;
    to->g.q_heads = p->q_heads;
    to->g.kv_heads = p->kv_heads;
    to->g.head_dim_k = p->head_dim_k;
    to->g.head_dim_v = p->head_dim_v;
    to->g.codec = (char *)kvd_codec_name(p->codec);
    to->g.rotation_set = (char *)from->rotation;
    to->g.windows = &to->windows;
    to->windows.sink = p->sink;
    to->windows.recent = p->recent;
    return &to->g;
}
