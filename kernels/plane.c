#include "kernels/backend.h"

static int check_latent(const struct kvd_plane *p, struct kvd_error *err)
{
    if (p->kv_heads != 1)
        return kvd_fail(err, KVD_E_INVALID,
                        "kv_heads is %u; a latent is shared by all heads: it must be 1",
                        p->kv_heads);
    if (p->q_heads < 1 || p->q_heads > KVD_MAX_LATENT_GROUP)
        return kvd_fail(err, KVD_E_INVALID, "q_heads is %u; over a latent 1 to %d are possible",
                        p->q_heads, KVD_MAX_LATENT_GROUP);
    if (!kvd_latent_dims_ok(p->head_dim_k, p->head_dim_v))
        return kvd_fail(err, KVD_E_INVALID,
                        "head_dim is %u for K and %u for V; of a latent plane K, the rope part, "
                        "has 64, and V, the latent, 512",
                        p->head_dim_k, p->head_dim_v);
    if (p->codec.k != KVD_CODEC_BF16)
        return kvd_fail(err, KVD_E_INVALID,
                        "the codec of K is %s; the rope part of a latent plane is in bf16: "
                        "\"k=bf16,v=NAME\"",
                        kvd_codec_name(p->codec.k));
    if (kvd_codec_tc(p->codec.v))
        return kvd_fail(err, KVD_E_INVALID,
                        "the codec of V is %s, which a latent cannot have: its bits are a key's",
                        kvd_codec_name(p->codec.v));
    return KVD_OK;
}

static int check_heads(const struct kvd_plane *p, struct kvd_error *err)
{
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
    return KVD_OK;
}

int kvd_plane_check(const struct kvd_plane *p, struct kvd_error *err)
{
    if (p->n_layers < 1 || p->n_layers > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INVALID, "%u layers; 1 to %d are possible", p->n_layers,
                        KVD_MAX_LAYERS);
    if (p->codec.k >= KVD_CODEC_COUNT || p->codec.v >= KVD_CODEC_COUNT)
        return kvd_fail(err, KVD_E_INVALID, "unknown codec %u of K or %u of V", p->codec.k,
                        p->codec.v);
    if (p->latent > 1)
        return kvd_fail(err, KVD_E_INVALID, "latent is %u; 0 or 1 is possible", p->latent);
    int rc = p->latent ? check_latent(p, err) : check_heads(p, err);
    if (rc)
        return rc;
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
