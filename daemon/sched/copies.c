// Copies of pages, which the executor makes before an append writes: of one that others have too,
// or of a part that has become too small.
#include "daemon/sched/op.h"

// K and V of a tile are of one length where pages are given in parts, and all tiles lie side by
// side, so that the rows of a part are as many pieces as there are sides of tiles.
static struct kvd_copy copy_of(struct kvd_daemon *d, const struct kvd_work *w,
                               const struct kvd_pool_change *c)
{
    const struct kvd_plane *g = &w->shape->planes[c->plane];
    uint32_t rows = kvd_pool_page_rows(d->pool, c->old_page);
    struct kvd_copy copy = {
        .to = kvd_pool_page_addr(d->pool, c->new_page),
        .from = kvd_pool_page_addr(d->pool, c->old_page),
        .bytes = kvd_pool_page_bytes(d->pool, w->layout, c->plane, (enum kvd_pool_kind)c->kind)};
    if (rows == KVD_PAGE_TOKENS)
        return copy;
    copy.pieces = 2 * g->n_layers * g->kv_heads;
    copy.to_stride = copy.from_stride = kvd_codes_bytes(kvd_window_codec().k, g->head_dim_k, false);
    copy.bytes = copy.to_stride / KVD_PAGE_TOKENS * rows;
    return copy;
}

int kvd_op_note_copies(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_pool_append *a,
                       struct kvd_error *err)
{
    if (a->n_changes == 0)
        return KVD_OK;
    struct kvd_copy *grown = realloc(w->copies, (w->n_copies + a->n_changes) * sizeof(*grown));
    if (!grown)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    w->copies = grown;
    for (uint32_t i = 0; i < a->n_changes; i++)
        if (a->changes[i].old_page != KVD_POOL_NONE)
            w->copies[w->n_copies++] = copy_of(d, w, &a->changes[i]);
    return KVD_OK;
}

int kvd_op_copy_pages(struct kvd_daemon *d, struct kvd_work *w)
{
    int rc = KVD_OK;
    while (w->copied < w->n_copies && rc == KVD_OK) {
        rc = d->backend->ops->copy(d->backend, &w->copies[w->copied++], 1, &w->err);
        w->job.slice.more = w->copied < w->n_copies;
        if (kvd_slice_over(&w->job.slice))
            break;
    }
    return rc;
}
