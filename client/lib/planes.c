// The layout that a client's options ask for: its planes, and the shape of each layer's tensors.
#include "client/lib/client.h"

// What a plane leaves open is as in the options.
static void set_plane(kvd_client *c, uint32_t p, const kvd_plane_options *from,
                      const kvd_options *o)
{
    Kvd__V1__Plane *to = &c->planes[p];
    to->q_heads = from->q_heads ? from->q_heads : o->q_heads;
    to->kv_heads = from->kv_heads ? from->kv_heads : o->kv_heads;
    to->head_dim_k = from->head_dim_k ? from->head_dim_k : o->head_dim_k;
    to->head_dim_v = from->head_dim_v ? from->head_dim_v : o->head_dim_v;
    to->latent = from->latent || o->latent;
    to->window = from->window;
    kvd__v1__windows__init(&c->plane_windows[p]);
    c->plane_windows[p].sink = from->sink;
    c->plane_windows[p].recent = from->recent;
    to->windows = from->sink || from->recent || from->no_windows ? &c->plane_windows[p] : NULL;
}

// Planes that the caller names. The layers of all of them come to *n_layers.
static int take_planes(kvd_client *c, const kvd_options *o, uint32_t *n_layers,
                       struct kvd_error *err)
{
    uint32_t step = o->planes->size; // also the distance from one to the next
    for (uint32_t p = 0; p < o->n_planes; p++) {
        kvd_plane_options plane = {0};
        const void *at = (const uint8_t *)o->planes + (size_t)p * step;
        int rc = ((const kvd_plane_options *)at)->size == step // before more of it is read
                     ? kvd_sized_take(&kvd_sized_plane_options, at, &plane, err)
                     : kvd_fail(err, KVD_E_INVALID, "its size is not that of the first");
        if (rc == KVD_OK &&
            (!plane.layers || plane.n_layers < 1 || plane.n_layers > KVD_MAX_LAYERS - *n_layers))
            rc = kvd_fail(err, KVD_E_INVALID,
                          "%u layers%s; at least 1 is wanted, and %d are possible in all",
                          plane.n_layers, plane.layers ? "" : " (NULL)", KVD_MAX_LAYERS);
        if (rc)
            return kvd_fail_in(err, "planes[%u]", p);
        set_plane(c, p, &plane, o);
        c->plane_codecs[p] = strdup(plane.codec ? plane.codec : ""); // the layout's, or its set's
        if (!c->plane_codecs[p])
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        c->planes[p].codec = c->plane_codecs[p];
        c->planes[p].layers = c->plane_layers + *n_layers;
        c->planes[p].n_layers = plane.n_layers;
        memcpy(c->planes[p].layers, plane.layers, plane.n_layers * sizeof(*plane.layers));
        *n_layers += plane.n_layers;
    }
    c->layout.n_planes = o->n_planes;
    return KVD_OK;
}

// A plane for each sliding window that layers have; none where all see all tokens.
static int windows_to_planes(kvd_client *c, const kvd_options *o, struct kvd_error *err)
{
    uint32_t *at = c->plane_layers, n = 0;
    bool any = false;
    for (uint32_t i = 0; i < o->n_layers && o->windows; i++) {
        uint32_t p = 0;
        any |= o->windows[i] != 0;
        while (p < n && c->planes[p].window != o->windows[i])
            p++;
        if (p == KVD_MAX_PLANES)
            return kvd_fail(err, KVD_E_INVALID, "the layers have more than %d different windows",
                            KVD_MAX_PLANES);
        if (p == n)
            c->planes[n++].window = o->windows[i];
    }
    for (uint32_t p = 0; p < n && any; p++) {
        c->planes[p].layers = at;
        for (uint32_t i = 0; i < o->n_layers; i++)
            if (o->windows[i] == c->planes[p].window)
                *at++ = o->layers[i];
        c->planes[p].n_layers = (size_t)(at - c->planes[p].layers);
    }
    c->layout.n_planes = any ? n : 0;
    return KVD_OK;
}

static int by_id(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static struct kvd_layer_shape shape_of(uint32_t q_heads, uint32_t kv_heads, uint32_t dim_k,
                                       uint32_t dim_v, bool latent)
{
    return (struct kvd_layer_shape){q_heads, kv_heads, dim_k, dim_v,
                                    latent ? dim_k + dim_v : dim_k};
}

// The layers of all planes in order, and what each looks like.
static void merge_planes(kvd_client *c, uint32_t n_layers)
{
    memcpy(c->layers, c->plane_layers, n_layers * sizeof(*c->layers));
    qsort(c->layers, n_layers, sizeof(*c->layers), by_id);
    for (size_t p = 0; p < c->layout.n_planes; p++) {
        const Kvd__V1__Plane *plane = &c->planes[p];
        for (size_t i = 0; i < plane->n_layers; i++) {
            const uint32_t *at =
                bsearch(&plane->layers[i], c->layers, n_layers, sizeof(*c->layers), by_id);
            c->shapes[at - c->layers] = shape_of(plane->q_heads, plane->kv_heads, plane->head_dim_k,
                                                 plane->head_dim_v, plane->latent);
        }
    }
}

static int check(const kvd_options *o, struct kvd_error *err)
{
    if (!o->planes != !o->n_planes || o->n_planes > KVD_MAX_PLANES)
        return kvd_fail(err, KVD_E_INVALID,
                        "planes is %s and n_planes %u; 1 to %d are possible, or NULL and 0",
                        o->planes ? "given" : "NULL", o->n_planes, KVD_MAX_PLANES);
    if (o->planes && (o->layers || o->n_layers || o->windows))
        return kvd_fail(err, KVD_E_INVALID,
                        "planes have their own layers and windows: the options' must be NULL and "
                        "0");
    if (!o->planes && (!o->layers || o->n_layers < 1 || o->n_layers > KVD_MAX_LAYERS))
        return kvd_fail(err, KVD_E_INVALID, "%u layers%s; 1 to %d are possible", o->n_layers,
                        o->layers ? "" : " (NULL)", KVD_MAX_LAYERS);
    return KVD_OK;
}

int kvd_client_set_layout(kvd_client *c, const kvd_options *o, struct kvd_error *err)
{
    Kvd__V1__Layout *to = &c->layout;
    uint32_t n_layers = o->n_layers;
    int rc = check(o, err);
    if (rc)
        return rc;
    kvd__v1__layout__init(to);
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        kvd__v1__plane__init(&c->planes[p]);
        c->plane_refs[p] = &c->planes[p];
    }
    to->planes = c->plane_refs;
    to->q_heads = o->q_heads;
    to->kv_heads = o->kv_heads;
    to->head_dim_k = o->head_dim_k;
    to->head_dim_v = o->head_dim_v;
    to->codec = c->codec;
    to->latent = o->latent;
    to->rotation_set = c->rotation_set;
    to->tp_rank = o->tp_rank;
    to->tp_size = o->tp_size;
    kvd__v1__windows__init(&c->windows);
    c->windows.sink = o->sink;
    c->windows.recent = o->recent;
    to->windows = o->sink || o->recent || o->no_windows ? &c->windows : NULL;
    if (o->planes) {
        rc = take_planes(c, o, &n_layers, err);
        if (rc)
            return rc;
        merge_planes(c, n_layers);
    } else {
        memcpy(c->layers, o->layers, n_layers * sizeof(*c->layers));
        for (uint32_t i = 0; i < n_layers; i++)
            c->shapes[i] =
                shape_of(o->q_heads, o->kv_heads, o->head_dim_k, o->head_dim_v, o->latent);
        rc = windows_to_planes(c, o, err);
    }
    to->n_layers = n_layers;
    to->layers = c->layers;
    return rc;
}
