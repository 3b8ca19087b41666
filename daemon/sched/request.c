// What requests of compute calls have in common: counts, layers, items, attention, tensors.
#include <math.h>

#include "daemon/sched/op.h"
#include "daemon/session/replay.h"

// Tensors of a call have one shape for all its layers.
static bool alike(const struct kvd_plane *a, const struct kvd_plane *b)
{
    return a->q_heads == b->q_heads && a->kv_heads == b->kv_heads &&
           a->head_dim_k == b->head_dim_k && a->head_dim_v == b->head_dim_v &&
           a->latent == b->latent;
}

static int set_runs(struct kvd_work *w, struct kvd_error *err)
{
    const struct kvd_layout *l = w->shape;
    uint32_t seen[KVD_MAX_PLANES] = {0}; // layers of each plane so far
    struct kvd_run *run = NULL;
    w->runs = calloc(w->layer_count, sizeof(*w->runs));
    if (!w->runs)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    w->plane = &l->planes[l->plane_of[w->layer_begin]];
    for (uint32_t i = 0; i < w->layer_begin + w->layer_count; i++) {
        uint32_t p = l->plane_of[i], own = seen[p]++;
        if (i < w->layer_begin)
            continue;
        if (!alike(w->plane, &l->planes[p]))
            return kvd_fail(err, KVD_E_INVALID,
                            "layers %u and %u of the layout differ in heads or head_dim; they want "
                            "calls of their own",
                            w->layer_begin, i);
        if (!run || run->plane != p) {
            run = &w->runs[w->n_runs++];
            *run = (struct kvd_run){.plane = p, .layer_begin = own, .at = i - w->layer_begin};
        }
        run->layer_count++;
        w->planes |= 1u << p;
    }
    return KVD_OK;
}

int kvd_op_set_layers(struct kvd_work *w, uint32_t begin, uint32_t count, struct kvd_error *err)
{
    uint32_t n = w->shape->n_layers;
    if (begin >= n || count > n - begin)
        return kvd_fail(err, KVD_E_INVALID,
                        "layers %u to %" PRIu64 " are not all among the layout's %u", begin,
                        (uint64_t)begin + (count ? count - 1 : 0), n);
    w->layer_begin = begin;
    w->layer_count = count ? count : n - begin;
    return set_runs(w, err);
}

static int set_attention(struct kvd_work *w, const Kvd__V1__AttentionParams *p,
                         struct kvd_error *err)
{
    w->scale = p && p->scale != 0 ? p->scale : 1 / sqrtf((float)w->plane->head_dim_k);
    w->softcap = p ? p->softcap : 0;
    w->window = p ? p->window : 0;
    if (w->plane->latent && w->op->id != KVD_OP_APPEND && (!p || p->scale == 0))
        return kvd_fail(err, KVD_E_INVALID,
                        "params.scale is missing: over a latent there is no default, as the "
                        "head_dim that a model scales by is none of the latent's");
    if (!isfinite(w->scale) || !isfinite(w->softcap) || w->softcap < 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "params: scale and softcap must be finite, softcap not negative");
    return KVD_OK;
}

// Layers of one call have the same number of q heads, those before them may have others.
static int copy_sinks(struct kvd_work *w, const struct kvd_session *s, struct kvd_error *err)
{
    size_t before = 0, n = (size_t)w->layer_count * w->plane->q_heads;
    if (!s->sinks)
        return KVD_OK;
    for (uint32_t i = 0; i < w->layer_begin; i++)
        before += w->shape->planes[w->shape->plane_of[i]].q_heads;
    w->sinks = malloc(n * sizeof(*w->sinks));
    if (!w->sinks)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    memcpy(w->sinks, s->sinks + before, n * sizeof(*w->sinks));
    return KVD_OK;
}

int kvd_op_check_item(const struct kvd_session *s, uint64_t seq, uint64_t tokens, uint32_t item,
                      uint64_t *sum, struct kvd_error *err)
{
    if (tokens < 1 || tokens > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_INVALID, "items[%u]: %" PRIu64 " tokens; 1 to %d are possible",
                        item, tokens, KVD_MAX_CALL_TOKENS);
    *sum += tokens;
    if (*sum > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_LIMIT, "more than %d tokens in one call; split it",
                        KVD_MAX_CALL_TOKENS);
    if (!kvd_session_holds(s, seq))
        return kvd_fail(err, KVD_E_NOT_FOUND, "items[%u]: this session holds no sequence %" PRIu64,
                        item, seq);
    return KVD_OK;
}

// Sorted copies show a sequence that is named twice.
static int compare_ids(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int check_distinct(const struct kvd_work *w, struct kvd_error *err)
{
    uint64_t ids[KVD_MAX_CALL_ITEMS];
    for (uint32_t i = 0; i < w->n_items; i++)
        ids[i] = w->items[i].seq;
    qsort(ids, w->n_items, sizeof(*ids), compare_ids);
    for (uint32_t i = 1; i < w->n_items; i++)
        if (ids[i] == ids[i - 1])
            return kvd_fail(err, KVD_E_INVALID, "sequence %" PRIu64 " is named by two items",
                            ids[i]);
    return KVD_OK;
}

int kvd_op_set_kv(struct kvd_work *w, struct kvd_session *s, uint32_t i,
                  const Kvd__V1__TensorRef *k, const Kvd__V1__TensorRef *v, struct kvd_error *err)
{
    const struct kvd_plane *g = w->plane;
    struct kvd_work_item *item = &w->items[i];
    if ((k && k->dtype != KVD__V1__DTYPE__DTYPE_BF16) ||
        (v && v->dtype != KVD__V1__DTYPE__DTYPE_BF16))
        return kvd_fail(err, KVD_E_INVALID, "items[%u]: K and V are bf16", i);
    struct kvd_shape shape = {w->layer_count, item->tokens, g->kv_heads, g->head_dim_k};
    int rc = kvd_work_tensor_in(w, s, k, shape, "k", i, &item->k, err);
    shape.dim = g->head_dim_v;
    return rc ? rc : kvd_work_tensor_in(w, s, v, shape, "v", i, &item->v, err);
}

int kvd_op_set_qo(struct kvd_work *w, struct kvd_session *s, uint32_t i,
                  const Kvd__V1__TensorRef *q, const Kvd__V1__TensorRef *o,
                  const Kvd__V1__TensorRef *lse, const Kvd__V1__AttentionParams *params,
                  struct kvd_error *err)
{
    const struct kvd_plane *g = w->plane;
    struct kvd_work_item *item = &w->items[i];
    struct kvd_shape shape = {w->layer_count, item->tokens, g->q_heads, kvd_plane_dim_q(g)};
    int rc = kvd_work_tensor_in(w, s, q, shape, "q", i, &item->q, err);
    shape.dim = g->head_dim_v;
    if (rc == KVD_OK)
        rc = kvd_work_tensor_out(w, s, o, shape, "o", i, &item->o, &item->o_inline, &item->o_len,
                                 err);
    if (rc || !params || !params->return_lse)
        return rc;
    Kvd__V1__TensorRef ref = KVD__V1__TENSOR_REF__INIT;
    if (lse)
        ref = *lse;
    ref.dtype = KVD__V1__DTYPE__DTYPE_F32;
    shape.dim = 1;
    return kvd_work_tensor_out(w, s, &ref, shape, "lse", i, &item->lse, &item->lse_inline,
                               &item->lse_len, err);
}

int kvd_op_check_batch(struct kvd_work *w, struct kvd_session *s, const void *request,
                       const struct kvd_op_batch *b, struct kvd_error *err)
{
    uint64_t sum = 0;
    int rc = kvd_op_set_layers(w, b->layer_begin, b->layer_count, err);
    if (rc == KVD_OK)
        rc = set_attention(w, b->params, err);
    if (rc == KVD_OK && w->op->id != KVD_OP_APPEND)
        rc = copy_sinks(w, s, err);
    if (rc == KVD_OK)
        rc = kvd_work_fence(w, s, b->wait, false, &w->parked.fence, err);
    if (rc == KVD_OK)
        rc = kvd_work_fence(w, s, b->signal, true, &w->signal, err);
    for (uint32_t i = 0; rc == KVD_OK && i < w->n_items; i++) {
        b->ids(&w->items[i], request, i);
        rc = kvd_op_check_item(s, w->items[i].seq, w->items[i].tokens, i, &sum, err);
        if (rc == KVD_OK)
            rc = b->tensors(w, s, request, i, err);
    }
    return rc || !w->op->writes ? rc : check_distinct(w, err);
}

int kvd_op_check_pages(struct kvd_work *w, struct kvd_session *s,
                       const struct kvd_page_names *named, struct kvd_error *err)
{
    struct kvd_daemon *d = w->call->d;
    struct kvd_blocks_space spaces[2];
    uint32_t n = 0;
    int rc = kvd_page_spaces(d, s, named->space, spaces, err);
    if (rc == KVD_OK)
        rc = kvd_page_count(named->key_bytes, named->keys, KVD_MAX_CALL_PAGES, &n, err);
    if (rc == KVD_OK && !n)
        rc = kvd_fail(err, KVD_E_INVALID, "no keys; 1 to %d are possible", KVD_MAX_CALL_PAGES);
    if (rc == KVD_OK)
        rc = kvd_op_set_layers(w, 0, 0, err);
    if (rc)
        return rc;
    struct kvd_work_pages *p = calloc(1, sizeof(*p));
    if (!p)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    w->pages = p;
    p->n = n;
    p->kinds = calloc(n, 1);
    memcpy(p->spaces, spaces, sizeof(spaces));
    kvd_pool_layout_ref(d->pool, spaces[1].layout); // of exact pages: the work has the other one
    for (int i = 0; i < 2 && rc == KVD_OK; i++) {
        p->shapes[i] = kvd_pool_layout_get(d->pool, spaces[i].layout);
        p->rotations[i] = d->rotations[spaces[i].layout];
        p->keys[i] = calloc(n, sizeof(*p->keys[i]));
        rc = p->keys[i] && p->kinds ? kvd_prefix_keys_of_pages(spaces[i].domain, named->keys->data,
                                                               named->key_bytes, n, p->keys[i], err)
                                    : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    return rc;
}

void kvd_op_handle(struct kvd_call *call, const struct kvd_op *op, const char *session, size_t n,
                   const void *request)
{
    struct kvd_session *s = kvd_call_session(call, session);
    struct kvd_error err = {0};
    if (!s)
        return;
    if (n < op->least_items || n > op->most_items) // before memory is taken for them
        kvd_fail(&err, KVD_E_INVALID, "%zu items; %u to %u are possible", n, op->least_items,
                 op->most_items);
    struct kvd_work *w = err.code ? NULL : kvd_work_new(call, s, op, op->own_items ? 0 : n, &err);
    if (w && op->check(w, s, request, &err) == KVD_OK &&
        kvd_overlap_check(w->spans, w->n_spans, &err) == KVD_OK) {
        free(KVD_TAKE(w->spans));
        kvd_work_queue(call->d, w);
        return;
    }
    if (w)
        kvd_work_free(call->d, w);
    kvd_call_fail_error(call, &err);
}
