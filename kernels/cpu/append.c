// Append on the CPU: check, demote, store.
#include "kernels/cpu/cpu.h"

#include <stdatomic.h>

enum { SMALL_CHECK = 1 << 20 }; // bytes that are looked at faster than threads wake

struct append_job {
    struct kvd_cpu *cpu;
    const struct kvd_append_params *p;
};

// Counts in blocks of 64 new tokens of an item, that one thread looks at.
struct check_job {
    const struct kvd_append_params *p;
    struct kvd_slice *slice;
    _Atomic uint64_t found; // the first block that is not finite; UINT64_MAX: none
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

static uint32_t token_blocks(const struct kvd_append_item *item)
{
    return (uint32_t)kvd_div_up(item->new_length - item->length, KVD_PAGE_TOKENS);
}

static bool block_finite(const struct kvd_append_params *p, uint64_t at,
                         struct kvd_nonfinite *where)
{
    const struct kvd_plane *g = p->plane;
    uint32_t i = 0;
    for (; at >= (uint64_t)token_blocks(&p->items[i]) * p->layer_count; i++)
        at -= (uint64_t)token_blocks(&p->items[i]) * p->layer_count;
    const struct kvd_append_item *item = &p->items[i];
    uint32_t blocks = token_blocks(item), l = (uint32_t)(at / blocks);
    uint32_t begin = (uint32_t)(at % blocks) * KVD_PAGE_TOKENS;
    uint32_t end = KVD_MIN(begin + KVD_PAGE_TOKENS, (uint32_t)(item->new_length - item->length));
    for (uint32_t t = begin; t < end; t++)
        for (uint32_t h = 0; h < g->kv_heads; h++)
            for (int v = 0; v < 2; v++) {
                uint32_t channel;
                if (row_finite(kvd_at(v ? &item->v : &item->k, l, t, h),
                               v ? g->head_dim_v : g->head_dim_k, &channel))
                    continue;
                *where = (struct kvd_nonfinite){i, p->layer_begin + l, t, h, channel, v};
                return false;
            }
    return true;
}

static void check_one(void *ctx, uint64_t i)
{
    struct check_job *job = ctx;
    struct kvd_nonfinite where;
    if (block_finite(job->p, i, &where))
        return;
    uint64_t first = atomic_load(&job->found);
    while (i < first && !atomic_compare_exchange_weak(&job->found, &first, i))
        ;
}

static uint64_t check_blocks(const struct kvd_append_params *p, uint64_t *bytes)
{
    uint64_t blocks = 0, tokens = 0;
    for (uint32_t i = 0; i < p->n_items; i++) {
        blocks += (uint64_t)token_blocks(&p->items[i]) * p->layer_count;
        tokens += p->items[i].new_length - p->items[i].length;
    }
    *bytes = tokens * p->layer_count * p->plane->kv_heads * 2 *
             (p->plane->head_dim_k + p->plane->head_dim_v);
    return blocks;
}

static int found(const struct check_job *job, struct kvd_nonfinite *where)
{
    uint64_t at = atomic_load(&job->found);
    if (at == UINT64_MAX)
        return KVD_OK;
    if (job->slice)
        job->slice->more = false;
    return block_finite(job->p, at, where) ? KVD_OK : KVD_E_INVALID; // its owner may mend it
}

int kvd_check_host(const struct kvd_append_params *p, struct kvd_nonfinite *where)
{
    struct check_job job = {.p = p, .slice = p->slice, .found = UINT64_MAX};
    uint64_t bytes, n = check_blocks(p, &bytes), i = p->slice ? p->slice->at : 0;
    for (bool over = false; i < n && !over && job.found == UINT64_MAX; i++) {
        check_one(&job, i);
        over = kvd_slice_over(p->slice);
    }
    if (p->slice) {
        p->slice->at = i;
        p->slice->more = i < n;
    }
    return found(&job, where);
}

int kvd_cpu_check(struct kvd_backend *b, const struct kvd_append_params *p,
                  struct kvd_nonfinite *where)
{
    struct check_job job = {.p = p, .slice = p->slice, .found = UINT64_MAX};
    uint64_t bytes, n = check_blocks(p, &bytes);
    if (bytes <= SMALL_CHECK)
        return kvd_check_host(p, where);
    kvd_threads_run_slice(((struct kvd_cpu *)b)->threads, p->slice, n, check_one, &job);
    return found(&job, where);
}

// The bf16 row of a token that is in the sink or the ring.
static uint8_t *window_row(const struct kvd_plane *g, const struct kvd_pages *pages, uint64_t token,
                           uint32_t layer, uint32_t head, bool v)
{
    uint32_t entry, row;
    if (token < g->sink) {
        entry = (uint32_t)(token / KVD_PAGE_TOKENS);
        row = (uint32_t)(token % KVD_PAGE_TOKENS);
    } else {
        kvd_ring_place(g, token, &entry, &row);
    }
    uint8_t *tile = (uint8_t *)(uintptr_t)pages->bf16[entry] +
                    kvd_tile_offset(g, kvd_window_codec(), layer, head);
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
    return window_row(p->plane, &item->pages, token, p->layer_begin + l, head, v);
}

// Tokens that one thread demotes: those of one page, as neighbours share its bytes.
struct span {
    uint64_t begin, end;
};

static uint64_t demoted_pages(const struct kvd_append_params *p, const struct kvd_append_item *item)
{
    uint64_t sink = p->plane->sink;
    if (item->hist_end >= item->new_hist_end)
        return 0;
    return kvd_div_up(item->new_hist_end - sink, KVD_PAGE_TOKENS) -
           (item->hist_end - sink) / KVD_PAGE_TOKENS;
}

static struct span page_span(const struct kvd_append_params *p, const struct kvd_append_item *item,
                             uint64_t page)
{
    uint64_t sink = p->plane->sink;
    uint64_t begin = sink + ((item->hist_end - sink) / KVD_PAGE_TOKENS + page) * KVD_PAGE_TOKENS;
    return (struct span){KVD_MAX(begin, item->hist_end),
                         KVD_MIN(begin + KVD_PAGE_TOKENS, item->new_hist_end)};
}

// The history tile of token t.
static uint8_t *history_tile(const struct kvd_plane *g, const struct kvd_append_item *item,
                             uint64_t t, uint32_t layer, uint32_t head)
{
    return (uint8_t *)(uintptr_t)item->pages.codec[(t - g->sink) / KVD_PAGE_TOKENS] +
           kvd_tile_offset(g, g->codec, layer, head);
}

// One side, which is not bf16.
static void demote_coded(const struct append_job *job, const struct kvd_append_item *item,
                         uint32_t l, uint32_t head, struct span span, bool v)
{
    const struct kvd_append_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    const struct kvd_rotation *r = p->rotation;
    uint32_t layer = p->layer_begin + l, dk = g->head_dim_k, dv = g->head_dim_v, dim = v ? dv : dk;
    uint64_t at = kvd_rotation_index(r, layer, head);
    const float *clip = v ? r->clip_v : r->clip_k, *gain = v ? r->gain_v : r->gain_k;
    uint32_t codec = kvd_codecs_side(g->codec, v);
    struct kvd_tc_coder tc = kvd_tc_coder_at(r, codec, v, layer, head);
    struct kvd_quantizer quantizer = {.codec = codec,
                                      .ratio = clip ? clip[at] : 1,
                                      .gain = gain ? gain[at] : 1,
                                      .scale = v ? r->scale_v : r->scale_k,
                                      .tc = &tc};
    float x[KVD_CHUNK_TOKENS][KVD_MAX_ROW], y[KVD_CHUNK_TOKENS * KVD_MAX_ROW];
    for (uint64_t t = span.begin; t < span.end;) {
        uint32_t n = (uint32_t)KVD_MIN((uint64_t)KVD_CHUNK_TOKENS, span.end - t);
        float *rows = &x[0][0];
        for (uint32_t i = 0; i < n; i++) {
            struct kvd_tensor src = {
                .data = (uint8_t *)(uintptr_t)source_row(p, item, t + i, l, head, v)};
            kvd_load_row(&src, 0, 0, 0, dim, rows + i * dim);
        }
        kvd_add_mean(kvd_mean_of(r, v, layer, head), -1, n, dim, rows);
        kvd_apply(job->cpu->isa, rows, n, dim,
                  kvd_rotation_of(r, v ? r->v : r->k, dim, layer, head), y);
        for (uint32_t i = 0; i < n; i++) {
            struct kvd_row row;
            kvd_row_quantize(&quantizer, y + i * dim, dim, &row);
            kvd_row_pack(g->codec, history_tile(g, item, t + i, layer, head), dk, dv, v, &tc,
                         (uint32_t)((t + i - g->sink) % KVD_PAGE_TOKENS), &row);
        }
        t += n;
    }
}

static void demote_bf16(const struct append_job *job, const struct kvd_append_item *item,
                        uint32_t l, uint32_t head, struct span span, bool v)
{
    const struct kvd_append_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    uint32_t layer = p->layer_begin + l, bytes = 2 * (v ? g->head_dim_v : g->head_dim_k);
    for (uint64_t t = span.begin; t < span.end; t++)
        memcpy(history_tile(g, item, t, layer, head) +
                   kvd_codes_offset(g->codec, g->head_dim_k, v) +
                   (t - g->sink) % KVD_PAGE_TOKENS * bytes,
               source_row(p, item, t, l, head, v), bytes);
}

// One (item, layer, kv head, history page).
static void demote_one(void *ctx, uint64_t i)
{
    const struct append_job *job = ctx;
    const struct kvd_append_params *p = job->p;
    const struct kvd_append_item *item = p->items;
    uint32_t heads = p->plane->kv_heads;
    uint64_t pages = demoted_pages(p, item);
    for (; i >= pages * heads * p->layer_count; pages = demoted_pages(p, item)) {
        i -= pages * heads * p->layer_count;
        item++;
    }
    struct span span = page_span(p, item, i % pages);
    i /= pages;
    uint32_t l = (uint32_t)(i / heads), head = (uint32_t)(i % heads);
    for (int v = 0; v < 2; v++)
        if (kvd_codecs_side(p->plane->codec, v) == KVD_CODEC_BF16)
            demote_bf16(job, item, l, head, span, v);
        else
            demote_coded(job, item, l, head, span, v);
}

// One (item, layer, kv head): its new tokens that stay in bf16.
static void store_one(void *ctx, uint64_t i)
{
    const struct append_job *job = ctx;
    const struct kvd_append_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    uint32_t head = (uint32_t)(i % g->kv_heads);
    uint32_t l = (uint32_t)(i / g->kv_heads % p->layer_count);
    const struct kvd_append_item *item = &p->items[i / g->kv_heads / p->layer_count];
    for (uint64_t t = item->length; t < item->new_length; t++) {
        if (t >= g->sink && t < item->new_hist_end)
            continue;
        for (int v = 0; v < 2; v++)
            memcpy(window_row(g, &item->pages, t, p->layer_begin + l, head, v),
                   source_row(p, item, t, l, head, v), 2 * (v ? g->head_dim_v : g->head_dim_k));
    }
}

// Demotion first, and all of it: new tokens take the ring slots of demoted ones.
int kvd_cpu_append(struct kvd_backend *b, const struct kvd_append_params *p, struct kvd_error *err)
{
    (void)err;
    struct append_job job = {(struct kvd_cpu *)b, p};
    struct kvd_threads *threads = job.cpu->threads;
    uint64_t each = (uint64_t)p->layer_count * p->plane->kv_heads, demotions = 0;
    for (uint32_t i = 0; i < p->n_items; i++)
        demotions += demoted_pages(p, &p->items[i]) * each;
    if (p->part != KVD_APPEND_STORE)
        kvd_threads_run_slice(threads, p->slice, demotions, demote_one, &job);
    if (p->part != KVD_APPEND_DEMOTE)
        kvd_threads_run_slice(threads, p->slice, p->n_items * each, store_one, &job);
    return KVD_OK;
}
