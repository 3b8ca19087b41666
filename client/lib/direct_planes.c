// Direct mode's planes: what the session's layout says of them, and the page tables of each.
#include "client/lib/direct.h"

static int take_plane(struct kvd_direct *d, const Kvd__V1__Plane *from, struct direct_plane *to,
                      struct kvd_error *err)
{
    const kvd_attention *a = &d->attention;
    to->shape = (struct kvd_plane){.n_layers = (uint32_t)from->n_layers,
                                   .q_heads = from->q_heads,
                                   .kv_heads = from->kv_heads,
                                   .head_dim_k = from->head_dim_k,
                                   .head_dim_v = from->head_dim_v,
                                   .latent = from->latent,
                                   .sink = from->windows->sink,
                                   .recent = from->windows->recent,
                                   .window = from->window};
    const struct kvd_plane *g = &to->shape, *first = direct_shape(d);
    if (!kvd_codecs_find(from->codec, &to->shape.codec))
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "kvd stores in codec %.40s, which this libkvd does not know", from->codec);
    if (g->q_heads != first->q_heads || g->kv_heads != first->kv_heads ||
        g->head_dim_k != first->head_dim_k || g->head_dim_v != first->head_dim_v ||
        g->latent != first->latent)
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "the layout's planes differ in heads or head_dim, and direct mode's slots "
                        "have one shape: use kvd_attend and kvd_step");
    if (g->latent && a->scale == 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "attention: scale is 0; over a latent there is no default, as the head_dim "
                        "that a model scales by is none of the latent's");
    to->window = a->window && g->window ? KVD_MIN(a->window, g->window) : a->window + g->window;
    to->bf16_stride =
        (uint32_t)kvd_div_up(g->sink, KVD_PAGE_TOKENS) + kvd_plane_ring(g) / KVD_PAGE_TOKENS;
    to->codec_stride = (uint32_t)kvd_div_up(d->options.max_tokens, KVD_PAGE_TOKENS) + 1;
    return KVD_OK;
}

// Where the layout's layer i is. A plane's layers have the layout's order.
static int find_layer(const struct kvd_direct *d, const Kvd__V1__Layout *g, uint32_t i,
                      struct direct_layer *out, struct kvd_error *err)
{
    for (uint32_t p = 0; p < d->n_planes; p++)
        for (uint32_t at = 0; at < g->planes[p]->n_layers; at++)
            if (g->planes[p]->layers[at] == g->layers[i]) {
                *out = (struct direct_layer){p, at};
                return KVD_OK;
            }
    return kvd_fail(err, KVD_E_INTERNAL, "kvd told no plane of layer %u", g->layers[i]);
}

int kvd_direct_take_layout(struct kvd_direct *d, struct kvd_error *err)
{
    const Kvd__V1__Layout *g = d->client->opened->layout;
    if (!g || g->n_planes == 0 || g->n_planes > KVD_MAX_PLANES || g->n_layers > KVD_MAX_LAYERS)
        return kvd_fail(err, KVD_E_INTERNAL, "kvd told no layout");
    d->n_layers = (uint32_t)g->n_layers;
    int rc = KVD_OK;
    for (uint32_t p = 0; p < g->n_planes && rc == KVD_OK; p++) {
        if (!g->planes[p]->windows)
            return kvd_fail(err, KVD_E_INTERNAL, "kvd told no windows of plane %u", p);
        rc = take_plane(d, g->planes[p], &d->planes[p], err);
        d->n_planes = p + 1;
    }
    for (uint32_t i = 0; i < d->n_layers && rc == KVD_OK; i++)
        rc = find_layer(d, g, i, &d->layers[i], err);
    return rc;
}

struct direct_slot kvd_direct_empty(const struct kvd_direct *d)
{
    struct direct_slot s = {.dirty = true};
    for (uint32_t p = 0; p < d->n_planes; p++)
        s.now.planes[p].hist_end = s.next.planes[p].hist_end = d->planes[p].shape.sink;
    return s;
}

uint64_t kvd_direct_numbers(const struct kvd_direct *d)
{
    return (2 + (uint64_t)d->n_planes) * d->options.slots;
}

static bool make_numbers(struct kvd_direct *d, uint64_t slots)
{
    d->length = calloc(kvd_direct_numbers(d), sizeof(*d->length));
    if (!d->length)
        return false;
    d->tail_tokens = d->length + slots;
    for (uint32_t p = 0; p < d->n_planes; p++)
        d->planes[p].hist_end = d->length + (2 + p) * slots;
    for (uint32_t i = 0; i < slots; i++) {
        d->tail_tokens[i] = d->options.step_tokens;
        for (uint32_t p = 0; p < d->n_planes; p++)
            d->planes[p].hist_end[i] = d->planes[p].shape.sink;
    }
    return true;
}

static bool make_pages(struct kvd_direct *d, uint64_t slots)
{
    uint64_t n = 0;
    for (uint32_t p = 0; p < d->n_planes; p++)
        n += 2 * slots * (d->planes[p].codec_stride + d->planes[p].bf16_stride);
    uint64_t *at = d->tables = calloc(n, sizeof(*d->tables));
    if (!at)
        return false;
    for (uint32_t p = 0; p < d->n_planes; p++) {
        struct direct_plane *plane = &d->planes[p];
        uint64_t codec = slots * plane->codec_stride, bf16 = slots * plane->bf16_stride;
        plane->codec = at;
        plane->bf16 = plane->codec + codec;
        plane->next_codec = plane->bf16 + bf16;
        plane->next_bf16 = plane->next_codec + codec;
        at = plane->next_bf16 + bf16;
    }
    return true;
}

int kvd_direct_make_tables(struct kvd_direct *d, struct kvd_error *err)
{
    uint64_t slots = d->options.slots;
    uint64_t *targets = calloc(KVD_DIRECT_JOBS * slots, sizeof(*targets));
    d->jobs[0].targets = targets;
    d->slots = calloc(slots, sizeof(*d->slots));
    d->list = calloc(slots, sizeof(*d->list));
    d->items = calloc(slots, sizeof(*d->items));
    if (!make_numbers(d, slots) || !make_pages(d, slots) || !d->list || !d->items || !d->slots ||
        !targets)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < KVD_DIRECT_JOBS; i++)
        d->jobs[i].targets = targets + i * slots;
    for (uint32_t i = 0; i < slots; i++)
        d->slots[i] = kvd_direct_empty(d);
    d->tail_v = direct_layer_at(d, d->n_layers, false);
    return KVD_OK;
}

void kvd_direct_adopt_slot(struct kvd_direct *d, uint32_t slot)
{
    struct direct_slot *s = &d->slots[slot];
    for (uint32_t i = 0; i < d->n_planes; i++) {
        struct direct_plane *p = &d->planes[i];
        uint64_t codec = (uint64_t)slot * p->codec_stride, bf16 = (uint64_t)slot * p->bf16_stride;
        memcpy(p->codec + codec, p->next_codec + codec,
               s->next.planes[i].n_codec * sizeof(*p->codec));
        memcpy(p->bf16 + bf16, p->next_bf16 + bf16, p->bf16_stride * sizeof(*p->bf16));
    }
    s->now = s->next;
    s->fresh = false;
    s->dirty = true;
}
