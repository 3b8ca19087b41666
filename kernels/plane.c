#include "kernels/backend.h"

int kvd_plane_check(const struct kvd_plane *p, struct kvd_error *err)
{
    if (p->n_layers < 1 || p->n_layers > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INVALID, "%u layers; 1 to %d are possible", p->n_layers,
                        KVD_MAX_LAYERS);
    if (p->kv_heads < 1 || p->kv_heads > KVD_MAX_KV_HEADS)
        return kvd_fail(err, KVD_E_INVALID, "kv_heads is %u; 1 to %d are possible", p->kv_heads,
                        KVD_MAX_KV_HEADS);
    if (p->q_heads == 0 || p->q_heads % p->kv_heads || p->q_heads / p->kv_heads > KVD_MAX_GROUP)
        return kvd_fail(
            err, KVD_E_INVALID,
            "q_heads is %u; it must be a multiple of kv_heads (%u), at most %d times it",
            p->q_heads, p->kv_heads, KVD_MAX_GROUP);
    if (!kvd_head_dims_ok(p->head_dim_k, p->head_dim_v))
        return kvd_fail(err, KVD_E_INVALID,
                        "head_dim is %u for K and %u for V; " KVD_HEAD_DIMS_NAMES, p->head_dim_k,
                        p->head_dim_v);
    if (p->codec.k >= KVD_CODEC_COUNT || p->codec.v >= KVD_CODEC_COUNT)
        return kvd_fail(err, KVD_E_INVALID, "unknown codec %u of K or %u of V", p->codec.k,
                        p->codec.v);
    if (p->sink % KVD_CHUNK_TOKENS || p->sink > KVD_MAX_SINK)
        return kvd_fail(err, KVD_E_INVALID,
                        "sink is %u tokens; it must be a multiple of %d, at most %d", p->sink,
                        KVD_CHUNK_TOKENS, KVD_MAX_SINK);
    if (p->window > KVD_MAX_LENGTH || (p->window && p->sink))
        return kvd_fail(
            err, KVD_E_INVALID,
            "window is %u and sink %u tokens; a window has at most %d, and wants sink 0", p->window,
            p->sink, KVD_MAX_LENGTH);
    if (p->recent % KVD_CHUNK_TOKENS || p->recent > KVD_MAX_RECENT)
        return kvd_fail(err, KVD_E_INVALID,
                        "recent is %u tokens; it must be a multiple of %d, at most %d", p->recent,
                        KVD_CHUNK_TOKENS, KVD_MAX_RECENT);
    return KVD_OK;
}
