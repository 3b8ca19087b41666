// An engine's blocks, from what a program says of them. Read paged.h first.
#include "client/lib/paged.h"

static struct kvd_paged_side side_of(const kvd_paged *p, const struct kvd_page_shape *shape, bool v)
{
    const kvd_strides *s = v ? &p->v_strides : &p->k_strides;
    return (struct kvd_paged_side){.name = v ? "v" : "k",
                                   .layers = v ? p->v : p->k,
                                   .bytes = v ? p->v_bytes : p->k_bytes,
                                   .strides = {s->block, s->head, s->token, s->dim},
                                   .dim = shape->dims[v]};
}

int kvd_paged_take(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t pages,
                   bool written, struct kvd_paged_kv *out, struct kvd_error *err)
{
    if (!p->k || !p->v || !p->blocks)
        return kvd_fail(err, KVD_E_INVALID, "%s is NULL", !p->k ? "k" : !p->v ? "v" : "blocks");
    *out = (struct kvd_paged_kv){.side = {side_of(p, shape, false), side_of(p, shape, true)},
                                 .layers = shape->layers,
                                 .heads = shape->heads,
                                 .all_blocks = p->all_blocks,
                                 .block_tokens = p->block_tokens,
                                 .blocks = p->blocks,
                                 .n_blocks = p->n_blocks,
                                 .first_token = p->first_token};
    int rc = kvd_paged_check(out, pages, written, err);
    return rc || !written ? rc : kvd_paged_apart(out, err);
}
