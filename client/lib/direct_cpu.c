// Direct mode on the CPU: everything is done when a call returns.
#include "client/lib/direct.h"

struct cpu_side {
    uint8_t *run; // K, then V, of a tail in order: [slots][ring][row]
};

static int cpu_init(struct kvd_direct *d, struct kvd_error *err)
{
    struct cpu_side *side = calloc(1, sizeof(*side));
    uint64_t row = direct_row_bytes(d, false) + direct_row_bytes(d, true);
    kvd_failure failure;
    d->side = side;
    if (side)
        side->run = malloc(d->options.slots * row * d->ring);
    if (!side || !side->run)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uint64_t bytes = direct_layer_at(d, d->n_layers, true);
    if (kvd_buffer_new(d->client, bytes, &d->tail, &failure))
        return kvd_client_failed(&failure, err);
    return KVD_OK;
}

static void cpu_deinit(struct kvd_direct *d)
{
    struct cpu_side *side = KVD_TAKE(d->side);
    free(side->run);
    free(side);
}

static void cpu_forget(struct kvd_direct *d)
{
    cpu_deinit(d);
    d->backend->ops->arena_free(d->backend, &d->arena);
}

static int cpu_update(struct kvd_direct *d, void *stream, struct kvd_error *err)
{
    (void)stream;
    (void)err;
    for (uint32_t i = 0; i < d->options.slots; i++)
        d->slots[i].dirty = false;
    return KVD_OK;
}

static uint8_t *tail_row(struct kvd_direct *d, uint32_t layer, uint32_t slot, uint64_t token,
                         bool v)
{
    uint64_t at = (uint64_t)slot * d->ring + token % d->ring;
    return (uint8_t *)kvd_buffer_data(d->tail) + direct_layer_at(d, layer, v) +
           at * direct_row_bytes(d, v);
}

static int cpu_store(struct kvd_direct *d, void *stream, uint32_t layer, const void *k,
                     const void *v, struct kvd_error *err)
{
    uint32_t n = d->options.step_tokens;
    (void)stream;
    (void)err;
    for (uint32_t s = 0; s < d->options.slots; s++)
        for (uint32_t i = 0; i < n; i++)
            for (int side = 0; side < 2; side++) {
                uint64_t row = direct_row_bytes(d, side);
                uint64_t token = (uint64_t)d->length[s] + d->tail_tokens[s] - n + i;
                memcpy(tail_row(d, layer, s, token, side),
                       (const uint8_t *)(side ? v : k) + ((uint64_t)s * n + i) * row, row);
            }
    return KVD_OK;
}

// A slot's tail in order, as a tensor of one layer.
static struct kvd_tensor tail_tensor(struct kvd_direct *d, uint32_t layer, uint32_t slot, bool v)
{
    struct cpu_side *side = d->side;
    uint64_t row = direct_row_bytes(d, v), all = row + direct_row_bytes(d, !v);
    uint8_t *to = side->run + slot * all * d->ring + (v ? direct_row_bytes(d, false) * d->ring : 0);
    for (uint32_t i = 0; i < d->tail_tokens[slot]; i++)
        memcpy(to + i * row, tail_row(d, layer, slot, (uint64_t)d->length[slot] + i, v), row);
    return (struct kvd_tensor){
        .data = to, .token_stride = row, .head_stride = row / direct_shape(d)->kv_heads};
}

static int cpu_attend(struct kvd_direct *d, void *stream, uint32_t layer, const void *q, void *o,
                      float *lse, struct kvd_error *err)
{
    const struct direct_plane *plane = &d->planes[d->layers[layer].plane];
    const struct kvd_plane *g = &plane->shape;
    uint32_t n = d->options.step_tokens, count = 0;
    uint64_t size = d->options.dtype == KVD_F32 ? 4 : 2;
    enum kvd_dtype type = size == 4 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16;
    uint64_t q_row = g->q_heads * kvd_plane_dim_q(g) * size,
             o_row = g->q_heads * g->head_dim_v * size;
    struct kvd_attend_item *items KVD_FREE = calloc(d->options.slots, sizeof(*items));
    (void)stream;
    if (!items)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t s = 0; s < d->options.slots; s++) {
        if (!d->slots[s].sequence)
            continue;
        items[count++] = (struct kvd_attend_item){
            .pages = {plane->bf16 + (uint64_t)s * plane->bf16_stride,
                      plane->codec + (uint64_t)s * plane->codec_stride},
            .length = d->length[s],
            .hist_end = plane->hist_end[s],
            .q_len = n,
            .new_tokens = d->tail_tokens[s],
            .q = {(uint8_t *)q + s * n * q_row, 0, q_row, q_row / g->q_heads, type},
            .k = tail_tensor(d, layer, s, false),
            .v = tail_tensor(d, layer, s, true),
            .o = {(uint8_t *)o + s * n * o_row, 0, o_row, o_row / g->q_heads, type},
            .lse = {lse ? (uint8_t *)(lse + s * n * g->q_heads) : NULL, 0, g->q_heads * 4, 4,
                    KVD_DTYPE_F32}};
    }
    struct kvd_attend_params p = {.plane = g,
                                  .rotation = plane->rotation,
                                  .layer_begin = d->layers[layer].at,
                                  .layer_count = 1,
                                  .scale = direct_scale(d),
                                  .softcap = d->attention.softcap,
                                  .window = plane->window,
                                  .sinks = direct_sinks(d, layer),
                                  .items = items,
                                  .n_items = count};
    return count ? d->backend->ops->attend(d->backend, &p, err) : KVD_OK;
}

static int cpu_mark(struct kvd_direct *d, void *stream, uint32_t mark, struct kvd_error *err)
{
    (void)d;
    (void)stream;
    (void)mark;
    (void)err;
    return KVD_OK;
}

static bool cpu_passed(struct kvd_direct *d, uint32_t mark)
{
    (void)d;
    (void)mark;
    return true;
}

static int cpu_wait(struct kvd_direct *d, uint32_t mark, struct kvd_error *err)
{
    (void)d;
    (void)mark;
    (void)err;
    return KVD_OK;
}

const struct direct_ops kvd_direct_cpu = {.init = cpu_init,
                                          .deinit = cpu_deinit,
                                          .forget = cpu_forget,
                                          .update = cpu_update,
                                          .store = cpu_store,
                                          .attend = cpu_attend,
                                          .mark = cpu_mark,
                                          .passed = cpu_passed,
                                          .wait = cpu_wait};
