#include "kernels/backend.h"

static bool dim_ok(uint32_t dim)
{
    return dim == 64 || dim == 128 || dim == 256;
}

int kvd_geometry_check(const struct kvd_geometry *g, struct kvd_error *err)
{
    if (g->n_layers < 1 || g->n_layers > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INVALID, "geometry has %u layers; 1 to %d are possible",
                        g->n_layers, KVD_MAX_LAYERS);
    for (uint32_t i = 1; i < g->n_layers; i++)
        if (g->layers[i] <= g->layers[i - 1])
            return kvd_fail(err, KVD_E_INVALID, "geometry.layers is not ascending: %u after %u",
                            g->layers[i], g->layers[i - 1]);
    if (g->kv_heads < 1 || g->kv_heads > KVD_MAX_KV_HEADS)
        return kvd_fail(err, KVD_E_INVALID, "geometry.kv_heads is %u; 1 to %d are possible",
                        g->kv_heads, KVD_MAX_KV_HEADS);
    if (g->q_heads == 0 || g->q_heads % g->kv_heads || g->q_heads / g->kv_heads > KVD_MAX_GROUP)
        return kvd_fail(
            err, KVD_E_INVALID,
            "geometry.q_heads is %u; it must be a multiple of kv_heads (%u), at most %d times it",
            g->q_heads, g->kv_heads, KVD_MAX_GROUP);
    if (!dim_ok(g->head_dim_k) || !dim_ok(g->head_dim_v))
        return kvd_fail(err, KVD_E_INVALID,
                        "head_dim is %u for K and %u for V; 64, 128 and 256 are possible",
                        g->head_dim_k, g->head_dim_v);
    if (g->codec >= KVD_CODEC_COUNT)
        return kvd_fail(err, KVD_E_INVALID, "unknown codec %u", g->codec);
    if (g->sink % KVD_CHUNK_TOKENS || g->sink > KVD_MAX_SINK)
        return kvd_fail(err, KVD_E_INVALID,
                        "sink is %u tokens; it must be a multiple of %d, at most %d", g->sink,
                        KVD_CHUNK_TOKENS, KVD_MAX_SINK);
    if (g->recent % KVD_CHUNK_TOKENS || g->recent > KVD_MAX_RECENT)
        return kvd_fail(err, KVD_E_INVALID,
                        "recent is %u tokens; it must be a multiple of %d, at most %d", g->recent,
                        KVD_CHUNK_TOKENS, KVD_MAX_RECENT);
    return KVD_OK;
}
