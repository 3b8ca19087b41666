// Gives the CUDA backend tensors in the GPU's memory in the place of the tests' own, now and then:
// as kernels can take them where they are, and between other bytes, so that they are staged. Mixed
// with those of the host in one call.
#ifndef KVD_TESTS_GPU_MOVED_H
#define KVD_TESTS_GPU_MOVED_H

#include "tests/gpu/gpu_fixture.h"

enum { MOVED_MOST = 64 << 20 };

static const struct kvd_backend_ops *moved_ops;
static uint64_t moved_rng;
static uint32_t moved_count[2]; // of inputs, of outputs

struct moved_tensor {
    struct kvd_tensor host, gpu;
    uint32_t layers, tokens, heads;
    uint64_t row, bytes;
    uint8_t *memory;
};

static inline struct moved_tensor moved(struct kvd_tensor *t, uint32_t layers, uint32_t tokens,
                                        uint32_t heads, uint32_t dim)
{
    struct moved_tensor m = {.host = *t, .layers = layers, .tokens = tokens, .heads = heads};
    m.row = (uint64_t)dim * (t->dtype == KVD_DTYPE_F32 ? 4 : 2);
    if (!t->data || t->on_device || !layers || !tokens || kvd_rand(&moved_rng) % 3 == 0)
        return m;
    uint64_t shift = kvd_rand(&moved_rng) % 2 * 8;
    m.bytes = (layers - 1) * t->layer_stride + (tokens - 1) * t->token_stride +
              (heads - 1) * t->head_stride + m.row;
    if (m.bytes > MOVED_MOST) {
        m.bytes = 0;
        return m;
    }
    need(cudaMalloc((void **)&m.memory, m.bytes + shift), "a tensor's memory");
    upload(m.memory + shift, t->data, m.bytes);
    t->data = m.memory + shift;
    t->on_device = true;
    m.gpu = *t;
    return m;
}

// The rows of an output alone, for others' may lie between them.
static inline void moved_back(struct moved_tensor *m, bool output)
{
    if (!m->bytes)
        return;
    moved_count[output]++;
    uint8_t *copy = malloc(m->bytes);
    need(cudaMemcpy(copy, m->gpu.data, m->bytes, cudaMemcpyDeviceToHost), "a tensor");
    for (uint64_t i = 0; output && i < (uint64_t)m->layers * m->tokens * m->heads; i++) {
        uint64_t at = i / m->heads / m->tokens * m->host.layer_stride +
                      i / m->heads % m->tokens * m->host.token_stride +
                      i % m->heads * m->host.head_stride;
        memcpy(m->host.data + at, copy + at, m->row);
    }
    free(copy);
    need(cudaFree(m->memory), "a tensor");
}

static inline int moved_attend(struct kvd_backend *b, const struct kvd_attend_params *p,
                               struct kvd_error *err)
{
    const struct kvd_plane *g = p->plane;
    if (p->slice)
        return moved_ops->attend(b, p, err);
    struct kvd_attend_params with = *p;
    struct kvd_attend_item *items = calloc(p->n_items, sizeof(*items));
    struct moved_tensor(*m)[5] = calloc(p->n_items, sizeof(*m));
    for (uint32_t i = 0; i < p->n_items; i++) {
        struct kvd_attend_item *x = &items[i];
        *x = p->items[i];
        uint32_t n = p->layer_count, q = x->q_len, k = x->new_tokens;
        m[i][0] = moved(&x->q, n, q, g->q_heads, kvd_plane_dim_q(g));
        m[i][1] = moved(&x->k, n, k, g->kv_heads, g->head_dim_k);
        m[i][2] = moved(&x->v, n, k, g->kv_heads, g->head_dim_v);
        m[i][3] = moved(&x->o, n, q, g->q_heads, g->head_dim_v);
        m[i][4] = moved(&x->lse, n, q, g->q_heads, 1);
    }
    with.items = items;
    int rc = moved_ops->attend(b, &with, err);
    for (uint32_t i = 0; i < 5 * p->n_items; i++)
        moved_back(&m[i / 5][i % 5], i % 5 >= 3);
    free(items);
    free(m);
    return rc;
}

static inline int moved_read(struct kvd_backend *b, const struct kvd_read_params *p,
                             struct kvd_error *err)
{
    const struct kvd_plane *g = p->plane;
    if (p->slice)
        return moved_ops->read(b, p, err);
    struct kvd_read_params with = *p;
    struct moved_tensor m[2];
    m[0] = moved(&with.k, p->layer_count, p->tokens, g->kv_heads, g->head_dim_k);
    m[1] = moved(&with.v, p->layer_count, p->tokens, g->kv_heads, g->head_dim_v);
    int rc = moved_ops->read(b, &with, err);
    moved_back(&m[0], true);
    moved_back(&m[1], true);
    return rc;
}

static inline int moved_rotate(struct kvd_backend *b, const struct kvd_rotate_params *p,
                               struct kvd_error *err)
{
    bool v = p->which == KVD_ROTATE_VALUES;
    uint32_t dim = v ? p->rotation->dim_v : p->rotation->dim_k;
    if (p->slice)
        return moved_ops->rotate(b, p, err);
    struct kvd_rotate_params with = *p;
    struct moved_tensor m[2];
    m[0] = moved(&with.x, p->layer_count, p->rows, p->heads, dim);
    m[1] = moved(&with.y, p->layer_count, p->rows, p->heads, dim);
    int rc = moved_ops->rotate(b, &with, err);
    moved_back(&m[0], false);
    moved_back(&m[1], true);
    return rc;
}

// From now on, in all of a backend's calls.
static inline void moved_begin(struct kvd_backend *b, uint64_t seed)
{
    static struct kvd_backend_ops ops;
    moved_ops = b->ops;
    moved_rng = seed;
    ops = *b->ops;
    ops.attend = moved_attend;
    ops.read = moved_read;
    ops.rotate = moved_rotate;
    b->ops = &ops;
}

#endif
