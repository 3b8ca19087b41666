#include "daemon/service/layout.h"

#include "calib/rotset.h"
#include "calib/store.h"

enum { NO_PLANE = 0xff };

// Over a latent one name is the latent's, as the rope part is in bf16 anyway.
static int set_codec(const char *name, struct kvd_plane *p, struct kvd_error *err)
{
    if (!kvd_codecs_find(name, &p->codec))
        return kvd_fail(err, KVD_E_INVALID,
                        "codec is '%.60s'; known are %s, and \"k=NAME,v=NAME\" of two of them",
                        name, kvd_codec_names());
    if (p->latent && !strchr(name, '='))
        p->codec.k = KVD_CODEC_BF16;
    return KVD_OK;
}

// The set's name: one for all planes that are rotated.
static int set_rotation(const char *rotation, struct kvd_layout *to, struct kvd_error *err)
{
    uint32_t one = KVD_CODEC_BF16; // that is rotated
    for (uint32_t side = 0; side < 2 * to->n_planes; side++) {
        uint32_t codec = kvd_codecs_side(to->planes[side / 2].codec, side % 2);
        if (codec == KVD_CODEC_BF16)
            continue;
        if (one != KVD_CODEC_BF16 && !*rotation &&
            strcmp(kvd_codec_transform(one), kvd_codec_transform(codec)) != 0)
            return kvd_fail(err, KVD_E_INVALID,
                            "layout.rotation_set is empty, and codecs %s and %s, of its planes or "
                            "of K and V, have different ones then; name one",
                            kvd_codec_name(one), kvd_codec_name(codec));
        one = codec;
    }
    if (one == KVD_CODEC_BF16)
        return KVD_OK;
    if (!*rotation)
        rotation = kvd_codec_transform(one);
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

static int check_layers(const uint32_t *layers, size_t n, struct kvd_error *err)
{
    if (n < 1 || n > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INVALID, "%zu layers; 1 to %d are possible", n, KVD_MAX_LAYERS);
    for (size_t i = 0; i < n; i++) {
        if (layers[i] > KVD_MAX_MODEL_LAYER)
            return kvd_fail(err, KVD_E_INVALID, "layers holds %u; ids go up to %d", layers[i],
                            KVD_MAX_MODEL_LAYER);
        if (i && layers[i] <= layers[i - 1])
            return kvd_fail(err, KVD_E_INVALID, "layers is not ascending: %u after %u", layers[i],
                            layers[i - 1]);
    }
    return KVD_OK;
}

// One plane, what it leaves open being as in the layout.
static int set_plane(const Kvd__V1__Layout *all, const Kvd__V1__Plane *own, struct kvd_plane *to,
                     struct kvd_error *err)
{
    const Kvd__V1__Windows *w = own->windows ? own->windows : all->windows;
    to->n_layers = (uint32_t)own->n_layers;
    to->q_heads = own->q_heads ? own->q_heads : all->q_heads;
    to->kv_heads = own->kv_heads ? own->kv_heads : all->kv_heads;
    to->head_dim_k = own->head_dim_k ? own->head_dim_k : all->head_dim_k;
    to->head_dim_v = own->head_dim_v ? own->head_dim_v : all->head_dim_v;
    to->latent = own->latent || all->latent;
    to->window = own->window;
    to->sink = w ? w->sink : KVD_DEFAULT_SINK;
    to->recent = w ? w->recent : KVD_DEFAULT_RECENT;
    if (to->window && !own->windows) // the layout's sink is for planes that can have one
        to->sink = 0;
    int rc = check_layers(own->layers, own->n_layers, err);
    if (rc == KVD_OK)
        rc = set_codec(own->codec[0] ? own->codec : all->codec, to, err);
    return rc ? rc : kvd_plane_check(to, err);
}

// The layers of all planes in order, and whose they are.
static int merge_layers(const Kvd__V1__Layout *from, Kvd__V1__Plane *const *planes,
                        struct kvd_layout *to, struct kvd_error *err)
{
    uint8_t *plane KVD_FREE = malloc(KVD_MAX_MODEL_LAYER + 1); // by model layer id
    if (!plane)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    memset(plane, NO_PLANE, KVD_MAX_MODEL_LAYER + 1);
    for (uint32_t p = 0; p < to->n_planes; p++)
        for (size_t i = 0; i < planes[p]->n_layers; i++) {
            uint32_t id = planes[p]->layers[i];
            if (plane[id] != NO_PLANE)
                return kvd_fail(err, KVD_E_INVALID, "layout: layer %u is in planes %u and %u", id,
                                plane[id], p);
            plane[id] = (uint8_t)p;
        }
    for (uint32_t id = 0; id <= KVD_MAX_MODEL_LAYER; id++) {
        if (plane[id] == NO_PLANE)
            continue;
        if (to->n_layers == KVD_MAX_LAYERS)
            return kvd_fail(err, KVD_E_INVALID,
                            "layout: more than %d layers in its planes together", KVD_MAX_LAYERS);
        to->layers[to->n_layers] = (uint16_t)id;
        to->plane_of[to->n_layers++] = plane[id];
    }
    bool same = from->n_layers == to->n_layers;
    for (uint32_t i = 0; i < to->n_layers && same; i++)
        same = from->layers[i] == to->layers[i];
    if (from->n_layers && !same)
        return kvd_fail(err, KVD_E_INVALID,
                        "layout.layers are not those of its planes together; leave them out");
    return KVD_OK;
}

// A size of 1 is as none, so that a model that is not split has one layout.
static int set_rank(const Kvd__V1__Layout *from, struct kvd_layout *to, struct kvd_error *err)
{
    if (from->tp_size > KVD_MAX_TP_SIZE)
        return kvd_fail(err, KVD_E_INVALID, "layout.tp_size is %u; at most %d are possible",
                        from->tp_size, KVD_MAX_TP_SIZE);
    if (from->tp_rank >= KVD_MAX(from->tp_size, 1u))
        return kvd_fail(err, KVD_E_INVALID,
                        "layout.tp_rank is %u and tp_size %u; ranks go from 0 to tp_size - 1",
                        from->tp_rank, from->tp_size);
    to->tp_rank = from->tp_rank;
    to->tp_size = from->tp_size > 1 ? from->tp_size : 0;
    return KVD_OK;
}

int kvd_layout_from_proto(const Kvd__V1__Layout *from, struct kvd_layout *to, struct kvd_error *err)
{
    Kvd__V1__Plane single = KVD__V1__PLANE__INIT, *one = &single;
    Kvd__V1__Plane *const *planes = from->n_planes ? from->planes : &one;
    int rc = KVD_OK;
    memset(to, 0, sizeof(*to)); // layouts are compared byte by byte
    single.n_layers = from->n_layers;
    single.layers = from->layers;
    single.window = from->window;
    single.windows = from->windows;
    if (from->n_planes > KVD_MAX_PLANES)
        return kvd_fail(err, KVD_E_INVALID, "layout has %zu planes; at most %d are possible",
                        from->n_planes, KVD_MAX_PLANES);
    if (from->n_planes && from->window)
        return kvd_fail(err, KVD_E_INVALID,
                        "layout.window is for layouts without planes; each plane has its own");
    to->n_planes = from->n_planes ? (uint32_t)from->n_planes : 1;
    for (uint32_t p = 0; p < to->n_planes && rc == KVD_OK; p++) {
        rc = set_plane(from, planes[p], &to->planes[p], err);
        if (rc && from->n_planes)
            return kvd_fail_in(err, "layout.planes[%u]", p);
        if (rc)
            return kvd_fail_in(err, "layout");
    }
    rc = merge_layers(from, planes, to, err);
    if (rc == KVD_OK)
        rc = set_rank(from, to, err);
    return rc ? rc : set_rotation(from->rotation_set, to, err);
}

// One plane's fields, and its layers at *at.
static void tell_plane(const struct kvd_layout *from, uint32_t plane, uint32_t **at,
                       struct kvd_proto_layout *room)
{
    Kvd__V1__Windows *windows = &room->windows[plane];
    Kvd__V1__Plane *to = &room->planes[plane];
    const struct kvd_plane *p = &from->planes[plane];
    kvd__v1__plane__init(to);
    kvd__v1__windows__init(windows);
    to->layers = *at;
    for (uint32_t i = 0; i < from->n_layers; i++)
        if (from->plane_of[i] == plane)
            to->layers[to->n_layers++] = from->layers[i];
    *at += to->n_layers;
    to->q_heads = p->q_heads;
    to->kv_heads = p->kv_heads;
    to->head_dim_k = p->head_dim_k;
    to->head_dim_v = p->head_dim_v;
    to->codec = (char *)kvd_codecs_name(p->codec, room->codecs[plane]);
    to->latent = p->latent;
    to->window = p->window;
    to->windows = windows;
    windows->sink = p->sink;
    windows->recent = p->recent;
}

Kvd__V1__Layout *kvd_layout_to_proto(const struct kvd_layout *from, struct kvd_proto_layout *to)
{
    uint32_t *at = to->plane_layers;
    kvd__v1__layout__init(&to->g);
    for (uint32_t i = 0; i < from->n_layers; i++)
        to->layers[i] = from->layers[i];
    for (uint32_t p = 0; p < from->n_planes; p++) {
        tell_plane(from, p, &at, to);
        to->refs[p] = &to->planes[p];
    }
    to->g.n_layers = from->n_layers;
    to->g.layers = to->layers;
    to->g.rotation_set = (char *)from->rotation;
    to->g.tp_rank = from->tp_rank;
    to->g.tp_size = from->tp_size;
    to->g.n_planes = from->n_planes;
    to->g.planes = to->refs;
    const Kvd__V1__Plane *only = &to->planes[0];
    if (from->n_planes > 1)
        return &to->g;
    to->g.q_heads = only->q_heads;
    to->g.kv_heads = only->kv_heads;
    to->g.head_dim_k = only->head_dim_k;
    to->g.head_dim_v = only->head_dim_v;
    to->g.codec = only->codec;
    to->g.latent = only->latent;
    to->g.window = only->window;
    to->g.windows = only->windows;
    return &to->g;
}

// -- the digest ---------------------------------------------------------------------------------

struct encoding {
    uint8_t bytes[8 * KVD_MAX_LAYERS + (48 + KVD_CODECS_TEXT) * KVD_MAX_PLANES + 256];
    size_t n;
};

static void put(struct encoding *e, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        e->bytes[e->n++] = (uint8_t)(value >> 8 * i);
}

static void put_text(struct encoding *e, const char *text)
{
    size_t n = strlen(text);
    put(e, (uint32_t)n);
    memcpy(e->bytes + e->n, text, n);
    e->n += n;
}

void kvd_layout_digest(const struct kvd_layout *l, char out[KVD_DIGEST_TEXT])
{
    struct encoding e = {.n = 0};
    char codec[KVD_CODECS_TEXT];
    put_text(&e, "kvd layout 2");
    put(&e, l->n_layers);
    put(&e, l->n_planes);
    for (uint32_t i = 0; i < l->n_layers; i++) {
        put(&e, l->layers[i]);
        put(&e, l->plane_of[i]);
    }
    for (uint32_t p = 0; p < l->n_planes; p++) {
        const struct kvd_plane *g = &l->planes[p];
        put(&e, g->q_heads);
        put(&e, g->kv_heads);
        put(&e, g->head_dim_k);
        put(&e, g->head_dim_v);
        put_text(&e, kvd_codecs_name(g->codec, codec));
        put(&e, g->sink);
        put(&e, g->recent);
        put(&e, g->window);
        if (g->latent) // as its head_dims have said already, which no other plane has
            put(&e, g->latent);
    }
    put_text(&e, l->rotation);
    put(&e, l->tp_rank);
    put(&e, l->tp_size);
    kvd_digest(e.bytes, e.n, out);
}

void kvd_layout_digest_bytes(const struct kvd_layout *l, uint8_t out[32])
{
    char text[KVD_DIGEST_TEXT];
    kvd_layout_digest(l, text);
    const char *hex = strchr(text, ':') + 1;
    for (int i = 0; i < 32; i++) {
        char byte[3] = {hex[2 * i], hex[2 * i + 1], 0};
        out[i] = (uint8_t)strtoul(byte, NULL, 16);
    }
}

int kvd_layout_exact(const struct kvd_layout *of, struct kvd_layout *out, struct kvd_error *err)
{
    *out = *of;
    memset(out->rotation, 0, sizeof(out->rotation));
    for (uint32_t p = 0; p < out->n_planes; p++) {
        struct kvd_plane *g = &out->planes[p];
        if (g->sink || g->recent || g->window)
            return kvd_fail(err, KVD_E_INVALID,
                            "pages: a layout with a sink of %u, a recent window of %u and a "
                            "sliding one of %u; all three must be 0",
                            g->sink, g->recent, g->window);
        g->codec = kvd_codecs_both(KVD_CODEC_BF16);
    }
    return KVD_OK;
}
