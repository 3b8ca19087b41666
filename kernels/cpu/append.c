// Append on the CPU: check, demote, store.
#include "kernels/cpu/cpu.h"

struct append_job {
    struct kvd_cpu *cpu;
    const struct kvd_append_params *p;
};

static bool row_finite(const uint8_t *row, uint32_t dim, uint32_t *channel)
{
    for (uint32_t c = 0; c < dim; c++) {
        uint16_t b;
        memcpy(&b, row + 2 * c, sizeof(b));
        if ((b & 0x7f80) == 0x7f80) {
            *channel = c;
            return false;
        }
    }
    return true;
}

int kvd_check_host(const struct kvd_append_params *p, struct kvd_nonfinite *where)
{
    const struct kvd_geometry *g = p->geometry;
    for (uint32_t i = 0; i < p->n_items; i++) {
        const struct kvd_append_item *item = &p->items[i];
        for (uint32_t l = 0; l < p->layer_count; l++)
            for (uint32_t t = 0; t < item->new_length - item->length; t++)
                for (uint32_t h = 0; h < g->kv_heads; h++)
                    for (int v = 0; v < 2; v++) {
                        uint32_t channel;
                        if (row_finite(kvd_at(v ? &item->v : &item->k, l, t, h),
                                       v ? g->head_dim_v : g->head_dim_k, &channel))
                            continue;
                        *where = (struct kvd_nonfinite){i, p->layer_begin + l, t, h, channel, v};
                        return KVD_E_INVALID;
                    }
    }
    return KVD_OK;
}

int kvd_cpu_check(struct kvd_backend *b, const struct kvd_append_params *p,
                  struct kvd_nonfinite *where)
{
    (void)b;
    return kvd_check_host(p, where);
}

// The bf16 row of a token that is in the sink or the ring.
static uint8_t *window_row(const struct kvd_geometry *g, const struct kvd_pages *pages,
                           uint64_t token, uint32_t layer, uint32_t head, bool v)
{
    uint32_t entry, row;
    if (token < g->sink) {
        entry = (uint32_t)(token / KVD_PAGE_TOKENS);
        row = (uint32_t)(token % KVD_PAGE_TOKENS);
    } else {
        kvd_ring_place(g, token, &entry, &row);
    }
    uint8_t *tile =
        (uint8_t *)(uintptr_t)pages->bf16[entry] + kvd_tile_offset(g, KVD_CODEC_BF16, layer, head);
    return v ? tile + (uint64_t)KVD_PAGE_TOKENS * 2 * g->head_dim_k +
                   (uint64_t)row * 2 * g->head_dim_v
             : tile + (uint64_t)row * 2 * g->head_dim_k;
}

// The row that an append knows for `token`: among the new ones, or in the window.
static const uint8_t *source_row(const struct kvd_append_params *p,
                                 const struct kvd_append_item *item, uint64_t token, uint32_t l,
                                 uint32_t head, bool v)
{
    if (token >= item->length)
        return kvd_at(v ? &item->v : &item->k, l, token - item->length, head);
    return window_row(p->geometry, &item->pages, token, p->layer_begin + l, head, v);
}

static void demote(const struct append_job *job, const struct kvd_append_item *item, uint32_t l,
                   uint32_t head)
{
    const struct kvd_append_params *p = job->p;
    const struct kvd_geometry *g = p->geometry;
    const struct kvd_rotation *r = p->rotation;
    uint32_t layer = p->layer_begin + l, dk = g->head_dim_k, dv = g->head_dim_v;
    uint64_t at = kvd_rotation_index(r, layer, head);
    float x[KVD_CHUNK_TOKENS][KVD_MAX_HEAD_DIM], y[KVD_CHUNK_TOKENS * KVD_MAX_HEAD_DIM];
    for (uint64_t t = item->hist_end; t < item->new_hist_end;) {
        uint32_t n = (uint32_t)KVD_MIN((uint64_t)KVD_CHUNK_TOKENS, item->new_hist_end - t);
        for (int v = 0; v < 2; v++) {
            uint32_t dim = v ? dv : dk;
            float *rows = &x[0][0];
            for (uint32_t i = 0; i < n; i++) {
                struct kvd_tensor src = {
                    .data = (uint8_t *)(uintptr_t)source_row(p, item, t + i, l, head, v)};
                kvd_load_row(&src, 0, 0, 0, dim, rows + i * dim);
            }
            kvd_apply(job->cpu->isa, rows, n, dim,
                      kvd_rotation_of(r, v ? r->v : r->k, dim, layer, head), y);
            const float *clip = v ? r->clip_v : r->clip_k, *gain = v ? r->gain_v : r->gain_k;
            struct kvd_quantizer quantizer = {g->codec, clip ? clip[at] : 1, gain ? gain[at] : 1};
            for (uint32_t i = 0; i < n; i++) {
                struct kvd_row row;
                uint64_t h = t + i - g->sink;
                uint8_t *tile = (uint8_t *)(uintptr_t)item->pages.codec[h / KVD_PAGE_TOKENS] +
                                kvd_tile_offset(g, g->codec, layer, head);
                kvd_row_quantize(&quantizer, y + i * dim, dim, &row);
                kvd_row_pack(g->codec, tile, dk, dv, v, (uint32_t)(h % KVD_PAGE_TOKENS), &row);
            }
        }
        t += n;
    }
}

static void demote_bf16(const struct append_job *job, const struct kvd_append_item *item,
                        uint32_t l, uint32_t head)
{
    const struct kvd_append_params *p = job->p;
    const struct kvd_geometry *g = p->geometry;
    uint32_t layer = p->layer_begin + l;
    for (uint64_t t = item->hist_end; t < item->new_hist_end; t++) {
        uint64_t h = t - g->sink;
        uint32_t row = (uint32_t)(h % KVD_PAGE_TOKENS);
        uint8_t *tile = (uint8_t *)(uintptr_t)item->pages.codec[h / KVD_PAGE_TOKENS] +
                        kvd_tile_offset(g, KVD_CODEC_BF16, layer, head);
        memcpy(tile + (uint64_t)row * 2 * g->head_dim_k, source_row(p, item, t, l, head, false),
               2 * g->head_dim_k);
        memcpy(tile + (uint64_t)KVD_PAGE_TOKENS * 2 * g->head_dim_k +
                   (uint64_t)row * 2 * g->head_dim_v,
               source_row(p, item, t, l, head, true), 2 * g->head_dim_v);
    }
}

// One (item, layer, kv head).
static void append_one(void *ctx, uint64_t i)
{
    const struct append_job *job = ctx;
    const struct kvd_append_params *p = job->p;
    const struct kvd_geometry *g = p->geometry;
    uint32_t head = (uint32_t)(i % g->kv_heads);
    uint32_t l = (uint32_t)(i / g->kv_heads % p->layer_count);
    const struct kvd_append_item *item = &p->items[i / g->kv_heads / p->layer_count];
    // Demotion first: new tokens may take the ring slots of demoted ones.
    if (g->codec == KVD_CODEC_BF16)
        demote_bf16(job, item, l, head);
    else
        demote(job, item, l, head);
    for (uint64_t t = item->length; t < item->new_length; t++) {
        if (t >= g->sink && t < item->new_hist_end)
            continue;
        for (int v = 0; v < 2; v++)
            memcpy(window_row(g, &item->pages, t, p->layer_begin + l, head, v),
                   source_row(p, item, t, l, head, v), 2 * (v ? g->head_dim_v : g->head_dim_k));
    }
}

int kvd_cpu_append(struct kvd_backend *b, const struct kvd_append_params *p, struct kvd_error *err)
{
    (void)err;
    struct append_job job = {(struct kvd_cpu *)b, p};
    kvd_threads_run(job.cpu->threads, (uint64_t)p->n_items * p->layer_count * p->geometry->kv_heads,
                    append_one, &job);
    return KVD_OK;
}
