// The planes that a set's marks make of a session's.
#include "calib/marks.h"
#include "daemon/service/layout.h"
#include "kernels/format.h"

// Whether whoever asked named a codec for a plane, and not for the layout as a whole.
static bool names_codec(const Kvd__V1__Layout *asked, uint32_t plane)
{
    return asked->n_planes > plane && asked->planes[plane]->codec[0];
}

// The mark that a layer goes by; NULL: it stays as it is.
static const struct kvd_mark *mark_of(const struct kvd_layout *l, const Kvd__V1__Layout *asked,
                                      const struct kvd_rotset *set, uint32_t i)
{
    const struct kvd_plane *p = &l->planes[l->plane_of[i]];
    const struct kvd_mark *m = kvd_mark_of(set, l->layers[i]);
    bool goes = m && !names_codec(asked, l->plane_of[i]) && kvd_codecs_rotated(p->codec) &&
                kvd_mark_widens(m, p->codec, p->head_dim_k, p->head_dim_v);
    return goes ? m : NULL;
}

// The plane of `to` that a layer which has left plane `from` belongs to, KVD_MAX_PLANES if there is
// none yet; planes before `first` have stayed. whose: from which plane each has come.
static uint32_t find(const struct kvd_layout *to, const uint8_t *whose, uint32_t first,
                     uint32_t from, struct kvd_codecs codec)
{
    for (uint32_t p = first; p < to->n_planes; p++)
        if (whose[p] == from && to->planes[p].codec.k == codec.k &&
            to->planes[p].codec.v == codec.v)
            return p;
    return KVD_MAX_PLANES;
}

int kvd_layout_mark(struct kvd_layout *l, const Kvd__V1__Layout *asked,
                    const struct kvd_rotset *set, struct kvd_error *err)
{
    struct kvd_layout to = *l;
    uint8_t whose[KVD_MAX_PLANES] = {0}, stays[KVD_MAX_PLANES] = {0};
    uint32_t kept[KVD_MAX_PLANES] = {0};
    if (!set->n_marks)
        return KVD_OK;
    for (uint32_t i = 0; i < l->n_layers; i++)
        stays[l->plane_of[i]] |= !mark_of(l, asked, set, i);
    memset(to.planes, 0, sizeof(to.planes)); // layouts are compared byte by byte
    to.n_planes = 0;
    for (uint32_t p = 0; p < l->n_planes; p++)
        if (stays[p]) {
            kept[p] = to.n_planes;
            to.planes[to.n_planes] = l->planes[p];
            to.planes[to.n_planes++].n_layers = 0;
        }
    uint32_t first = to.n_planes;
    for (uint32_t i = 0; i < l->n_layers; i++) {
        const struct kvd_mark *m = mark_of(l, asked, set, i);
        uint32_t from = l->plane_of[i], p = kept[from];
        if (m)
            p = find(&to, whose, first, from, m->codec);
        if (p == KVD_MAX_PLANES && to.n_planes == KVD_MAX_PLANES)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "set %s marks layers for codecs of their own, which makes more than %d "
                            "planes of the layout: name each plane's codec, or a set without marks",
                            set->model, KVD_MAX_PLANES);
        if (p == KVD_MAX_PLANES) {
            p = to.n_planes++;
            whose[p] = (uint8_t)from;
            to.planes[p] = l->planes[from];
            to.planes[p].codec = m->codec;
            to.planes[p].n_layers = 0;
        }
        to.plane_of[i] = (uint8_t)p;
        to.planes[p].n_layers++;
    }
    for (uint32_t p = first; p < to.n_planes; p++)
        if (kvd_plane_check(&to.planes[p], err))
            return kvd_fail_in(err, "a plane of layers that set %s marks", set->model);
    *l = to;
    return KVD_OK;
}
