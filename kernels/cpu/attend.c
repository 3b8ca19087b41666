// Attention on the CPU, in the flash style: one pass over the tokens with a running maximum.
//
// A *unit* is up to four query rows of one (sequence, layer, kv head); a row is one (query, q
// head). With few units the tokens are split among threads and the partial results merged. History
// is scored in the space of its codes with a query taken there; its output stays there until the
// end, so that one product with V's inverse takes all of it back.
//
// A thread that walks over a unit's tokens stops after any 64 of them when its slice is over: the
// walk is kept, and the next slice begins with those that are kept.
#include "kernels/cpu/cpu.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>

struct unit {
    const struct kvd_attend_item *item;
    uint32_t layer, head; // layer counts from layer_begin
    uint32_t row0, rows;
};

// Attention of some rows over some tokens, not yet normalised. In double: rounding would grow with
// the tokens.
struct partial {
    float m[KVD_CPU_ROWS];                            // running maximum
    double l[KVD_CPU_ROWS];                           // running sum; NaN: a logit was not finite
    double o[KVD_CPU_ROWS][KVD_MAX_HEAD_DIM];         // from bf16 tokens
    double o_rotated[KVD_CPU_ROWS][KVD_MAX_HEAD_DIM]; // from compressed tokens
    double coded[KVD_CPU_ROWS];                       // the part of l that compressed tokens have
};

enum { RUNS_IN_FLOAT = 256 }; // so many are summed in float, and then added to a partial

struct attend_job {
    struct kvd_cpu *cpu;
    const struct kvd_attend_params *p;
    const uint64_t *first_unit; // per item, and the total
    uint32_t splits;
    struct partial *partials;   // [unit][split]; NULL with one split
    uint64_t walks;             // units x splits
    _Atomic uint64_t next;      // the walk to begin next
    struct kvd_cpu_walk *turns; // one a thread
};

enum { WALK_ALIGN = 64 }; // a vector of the widest kind lies in one line of the cache

// What one unit needs while it walks over tokens.
struct kvd_cpu_walk {
    bool active; // begun and not done
    const struct attend_job *job;
    uint64_t index; // among the job's walks
    struct unit unit;
    struct kvd_tc_coder tc; // of K
    uint64_t at, end;       // tokens that are left
    struct partial part;    // where `out` is with one split
    _Alignas(WALK_ALIGN) float q[KVD_CPU_ROWS][KVD_MAX_HEAD_DIM];
    _Alignas(
        WALK_ALIGN) float q_codes[KVD_CPU_ROWS * 2 *
                                  KVD_MAX_HEAD_DIM]; // rotated and prepared, row stride 2 * dim_k
    float q_sum[KVD_CPU_ROWS];                       // of the rotated query
    float q_mean[KVD_CPU_ROWS];                      // its product with the keys' mean
    float run_sum[KVD_CPU_ROWS];                     // of a run's probabilities
    // Sums of the last runs, that are not in `out` yet:
    _Alignas(WALK_ALIGN) float acc[KVD_CPU_ROWS * 8 * KVD_MAX_HEAD_DIM]; // row stride 8 * dim_v
    _Alignas(WALK_ALIGN) float o[KVD_CPU_ROWS * KVD_MAX_HEAD_DIM];       // row stride dim_v
    uint32_t runs;
    bool compressed;                 // any of them of history
    double centre_sum[KVD_CPU_ROWS]; // sum of p * centre: the same for every channel
    _Alignas(WALK_ALIGN) float s[KVD_CPU_ROWS * KVD_PAGE_TOKENS]; // logits, then probabilities
    struct partial *out;
};

// Up to 64 tokens that lie together.
struct run {
    uint64_t begin; // position of the first
    uint32_t n;
    const uint8_t *tile;  // NULL for new tokens
    const uint8_t *k, *v; // rows of bf16; NULL: the tile has codes
    uint64_t k_stride, v_stride;
};

static uint32_t group_of(const struct attend_job *job)
{
    return job->p->plane->q_heads / job->p->plane->kv_heads;
}

static uint64_t total_tokens(const struct kvd_attend_item *item)
{
    return item->length + item->new_tokens;
}

// The tokens of a page from `row` on, which is 0 where the tile has codes: splits start at tile
// boundaries.
static void page_run(const struct kvd_cpu_walk *w, uint64_t page, struct kvd_codecs codec,
                     uint32_t row, struct run *run)
{
    const struct kvd_plane *g = w->job->p->plane;
    run->tile = (const uint8_t *)(uintptr_t)page +
                kvd_tile_offset(g, codec, w->job->p->layer_begin + w->unit.layer, w->unit.head);
    run->k_stride = 2 * g->head_dim_k;
    run->v_stride = 2 * g->head_dim_v;
    if (codec.k == KVD_CODEC_BF16)
        run->k = run->tile + row * run->k_stride;
    if (codec.v == KVD_CODEC_BF16)
        run->v = run->tile + kvd_codes_offset(codec, g->head_dim_k, true) + row * run->v_stride;
    run->n = KVD_PAGE_TOKENS - row;
}

// The run that starts at position t, cut at `end`.
static struct run run_at(const struct kvd_cpu_walk *w, uint64_t t, uint64_t end)
{
    const struct kvd_plane *g = w->job->p->plane;
    const struct kvd_attend_item *item = w->unit.item;
    struct run run = {.begin = t};
    uint64_t limit = end;
    if (t >= item->length) {
        run.k = kvd_at(&item->k, w->unit.layer, t - item->length, w->unit.head);
        run.v = kvd_at(&item->v, w->unit.layer, t - item->length, w->unit.head);
        run.k_stride = item->k.token_stride;
        run.v_stride = item->v.token_stride;
        run.n = KVD_PAGE_TOKENS;
    } else if (t >= g->sink && t < item->hist_end) {
        uint64_t page = item->pages.codec[(t - g->sink) / KVD_PAGE_TOKENS];
        uint32_t row = (uint32_t)((t - g->sink) % KVD_PAGE_TOKENS);
        limit = KVD_MIN(end, item->hist_end);
        page_run(w, page, g->codec, row, &run);
    } else {
        uint32_t entry = (uint32_t)(t / KVD_PAGE_TOKENS), row = (uint32_t)(t % KVD_PAGE_TOKENS);
        limit = KVD_MIN(end, t < g->sink ? KVD_MIN(item->length, g->sink) : item->length);
        if (t >= g->sink)
            kvd_ring_place(g, t, &entry, &row);
        page_run(w, item->pages.bf16[entry], kvd_window_codec(), row, &run);
    }
    run.n = (uint32_t)KVD_MIN((uint64_t)run.n, limit - t);
    return run;
}

// Scale and centre of the tokens of a tile, for the levels of kvd_cpu_levels.
static void read_params(const struct kvd_cpu_walk *w, const struct run *run, bool v,
                        struct kvd_affine param[KVD_PAGE_TOKENS])
{
    const struct kvd_plane *g = w->job->p->plane;
    uint32_t codec = kvd_codecs_side(g->codec, v);
    float centre = kvd_cpu_centre(codec);
    kvd_params_read(codec, run->tile + kvd_params_offset(g->codec, g->head_dim_k, g->head_dim_v, v),
                    run->n, param);
    for (uint32_t t = 0; t < run->n; t++)
        param[t].min += centre * param[t].scale;
}

static void score_tile(struct kvd_cpu_walk *w, const struct run *run)
{
    const struct kvd_plane *g = w->job->p->plane;
    struct kvd_affine param[KVD_PAGE_TOKENS];
    read_params(w, run, false, param);
    if (kvd_codec_tc(g->codec.k))
        w->job->cpu->isa->tc_scores(&w->tc, run->tile, w->q_codes, w->unit.rows, w->s);
    else
        w->job->cpu->isa->k_scores(g->codec.k, run->tile, g->head_dim_k, w->q_codes, w->unit.rows,
                                   w->s);
    for (uint32_t t = 0; t < run->n; t++)
        for (uint32_t r = 0; r < w->unit.rows; r++) {
            float *s = &w->s[r * KVD_PAGE_TOKENS + t];
            *s = param[t].scale * *s + (param[t].min * w->q_sum[r] + w->q_mean[r]);
        }
}

// The first token that a row sees; later rows see none before it.
static uint64_t first_visible(const struct attend_job *job, const struct unit *u, uint32_t row)
{
    uint64_t pos = total_tokens(u->item) - u->item->q_len + row / group_of(job);
    uint32_t window = job->p->window;
    return window && pos + 1 > window ? pos + 1 - window : 0;
}

// Turns scores into logits of visible tokens, -inf elsewhere. Returns whether any token is visible
// to any row.
static bool mask_run(struct kvd_cpu_walk *w, const struct run *run)
{
    const struct kvd_attend_params *p = w->job->p;
    const struct kvd_attend_item *item = w->unit.item;
    uint32_t group = group_of(w->job);
    bool any = false;
    for (uint32_t r = 0; r < w->unit.rows; r++) {
        float *s = w->s + r * KVD_PAGE_TOKENS;
        uint64_t pos = total_tokens(item) - item->q_len + (w->unit.row0 + r) / group;
        uint64_t first = first_visible(w->job, &w->unit, w->unit.row0 + r);
        uint32_t lo =
            first > run->begin ? (uint32_t)KVD_MIN(first - run->begin, (uint64_t)run->n) : 0;
        uint32_t hi =
            pos < run->begin ? 0 : (uint32_t)KVD_MIN(pos - run->begin + 1, (uint64_t)run->n);
        any |= lo < hi;
        for (uint32_t t = 0; t < lo; t++)
            s[t] = -INFINITY;
        bool finite = true;
        for (uint32_t t = lo; t < hi; t++) {
            s[t] *= p->scale;
            finite &= fabsf(s[t]) <= FLT_MAX;
        }
        if (!finite)
            w->out->l[r] = NAN; // and stays so, whatever is added
        for (uint32_t t = lo; t < hi && p->softcap > 0; t++)
            s[t] = p->softcap * tanhf(s[t] / p->softcap);
        for (uint32_t t = KVD_MAX(lo, hi); t < KVD_PAGE_TOKENS; t++)
            s[t] = -INFINITY;
    }
    return any;
}

static void scale_sums(double *x, uint32_t n, double f)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] *= f;
}

// Raises the running maximum to that of the new logits and turns these into probabilities.
static void soften(struct kvd_cpu_walk *w, uint32_t r)
{
    const struct kvd_plane *g = w->job->p->plane;
    const struct kvd_cpu_isa *isa = w->job->cpu->isa;
    struct partial *out = w->out;
    float *s = w->s + r * KVD_PAGE_TOKENS;
    float top = out->m[r];
    w->run_sum[r] = 0;
    for (uint32_t t = 0; t < KVD_PAGE_TOKENS; t++)
        top = s[t] > top ? s[t] : top;
    if (top == -INFINITY) {
        memset(s, 0, KVD_PAGE_TOKENS * sizeof(float));
        return;
    }
    if (top > out->m[r] && out->m[r] != -INFINITY) {
        float f = expf(out->m[r] - top);
        isa->scale(w->o + r * g->head_dim_v, g->head_dim_v, f);
        if (w->compressed)
            isa->scale(w->acc + r * 8 * g->head_dim_v, 8 * g->head_dim_v, f);
        scale_sums(out->o[r], g->head_dim_v, f);
        scale_sums(out->o_rotated[r], g->head_dim_v, f);
        w->centre_sum[r] *= f;
        out->coded[r] *= f;
        out->l[r] *= f;
    }
    out->m[r] = top;
    w->run_sum[r] = isa->exp_sum(s, top);
    out->l[r] += w->run_sum[r];
}

static void add_tile(struct kvd_cpu_walk *w, const struct run *run)
{
    const struct kvd_plane *g = w->job->p->plane;
    struct kvd_affine param[KVD_PAGE_TOKENS];
    float sum[KVD_CPU_ROWS] = {0};
    read_params(w, run, true, param);
    for (uint32_t t = 0; t < run->n; t++)
        for (uint32_t r = 0; r < w->unit.rows; r++) {
            float *s = &w->s[r * KVD_PAGE_TOKENS + t];
            sum[r] += *s * param[t].min;
            *s *= param[t].scale;
        }
    for (uint32_t r = 0; r < w->unit.rows; r++) {
        w->centre_sum[r] += sum[r];
        w->out->coded[r] += w->run_sum[r];
    }
    w->job->cpu->isa->v_accumulate(g->codec.v,
                                   run->tile + kvd_codes_offset(g->codec, g->head_dim_k, true),
                                   g->head_dim_v, w->s, w->unit.rows, w->acc);
    w->compressed = true;
}

// Adds the last runs' sums to the partial.
static void flush_sums(struct kvd_cpu_walk *w)
{
    uint32_t dim = w->job->p->plane->head_dim_v;
    for (uint32_t r = 0; r < w->unit.rows; r++) {
        for (uint32_t c = 0; c < dim; c++)
            w->out->o[r][c] += w->o[r * dim + c];
        if (!w->compressed)
            continue;
        float o[KVD_MAX_HEAD_DIM];
        w->job->cpu->isa->v_reduce(w->acc + r * 8 * dim, dim, o);
        for (uint32_t c = 0; c < dim; c++)
            w->out->o_rotated[r][c] += o[c] + w->centre_sum[r];
        w->centre_sum[r] = 0;
    }
    memset(w->o, 0, w->unit.rows * dim * sizeof(float));
    if (w->compressed)
        memset(w->acc, 0, w->unit.rows * 8 * dim * sizeof(float));
    w->compressed = false;
    w->runs = 0;
}

static void walk_run(struct kvd_cpu_walk *w, const struct run *run)
{
    const struct kvd_plane *g = w->job->p->plane;
    const struct kvd_cpu_isa *isa = w->job->cpu->isa;
    if (!run->k)
        score_tile(w, run);
    else
        isa->bf16_scores(run->k, run->k_stride, run->n, g->head_dim_k, w->q[0], w->unit.rows, w->s);
    if (!mask_run(w, run))
        return;
    for (uint32_t r = 0; r < w->unit.rows; r++)
        soften(w, r);
    if (!run->v)
        add_tile(w, run);
    else
        isa->bf16_accumulate(run->v, run->v_stride, run->n, g->head_dim_v, w->s, w->unit.rows,
                             w->o);
    if (++w->runs == RUNS_IN_FLOAT)
        flush_sums(w);
}

static void load_queries(struct kvd_cpu_walk *w)
{
    const struct kvd_attend_params *p = w->job->p;
    const struct kvd_plane *g = p->plane;
    const struct kvd_rotation *rot = p->rotation;
    uint32_t group = group_of(w->job), dim = g->head_dim_k;
    float *unrotated = w->q[0]; // rows lie dim apart: the inner loops want them dense
    for (uint32_t r = 0; r < w->unit.rows; r++) {
        uint32_t row = w->unit.row0 + r;
        kvd_load_row(&w->unit.item->q, w->unit.layer, row / group,
                     w->unit.head * group + row % group, dim, unrotated + r * dim);
    }
    if (g->codec.k == KVD_CODEC_BF16)
        return;
    float rotated[KVD_CPU_ROWS * KVD_MAX_HEAD_DIM];
    uint32_t layer = p->layer_begin + w->unit.layer;
    const float *m = kvd_rotation_of(rot, rot->q, dim, layer, w->unit.head);
    const float *mean = kvd_mean_of(rot, false, layer, w->unit.head);
    kvd_apply(w->job->cpu->isa, unrotated, w->unit.rows, dim, m, rotated);
    w->tc = kvd_tc_coder_at(rot, g->codec.k, false, layer, w->unit.head);
    for (uint32_t c = 0; kvd_codec_tc(g->codec.k) && c < dim; c++)
        for (uint32_t r = 0; r < w->unit.rows; r++)
            rotated[r * dim + c] *= (float)kvd_tc_step(&w->tc, c);
    for (uint32_t r = 0; r < w->unit.rows; r++) {
        double along = 0;
        for (uint32_t c = 0; mean && c < dim; c++)
            along += (double)unrotated[r * dim + c] * (double)mean[c];
        w->q_mean[r] = (float)along;
        w->q_sum[r] = 0;
        for (uint32_t c = 0; c < dim; c++)
            w->q_sum[r] += rotated[r * dim + c];
        w->job->cpu->isa->q_prepare(rotated + r * dim, dim, w->q_codes + r * 2 * dim);
    }
}

// The tokens [begin, end) that may be visible to the unit's rows and belong to a split.
static void split_range(const struct attend_job *job, const struct unit *u, uint32_t split,
                        uint64_t *begin, uint64_t *end)
{
    uint32_t group = group_of(job), sink = job->p->plane->sink;
    uint64_t total = total_tokens(u->item);
    uint64_t last = total - u->item->q_len + (u->row0 + u->rows - 1) / group;
    uint64_t hi = last + 1;
    uint64_t lo = first_visible(job, u, u->row0);
    // Boundaries at sink + a multiple of a page, as history tiles cannot be entered in the middle.
    // A history of which no row sees anything is not gone back to: its last page may be gone.
    uint64_t seen = lo;
    if (lo > 0)
        lo = lo <= sink ? 0 : sink + (lo - sink) / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS;
    if (seen >= u->item->hist_end)
        lo = KVD_MAX(lo, u->item->hist_end);
    uint64_t pages = kvd_div_up(hi - KVD_MIN(lo, hi), KVD_PAGE_TOKENS);
    uint64_t from = pages * split / job->splits * KVD_PAGE_TOKENS;
    uint64_t to = pages * (split + 1) / job->splits * KVD_PAGE_TOKENS;
    uint64_t base = lo > 0 ? lo : sink % KVD_PAGE_TOKENS; // keeps lo + k * 64 on the grid
    *begin = split == 0 ? lo : KVD_MIN(base + from, hi);
    *end = split + 1 == job->splits ? hi : KVD_MIN(base + to, hi);
}

// What a walk refers to outside of itself, which differs from slice to slice.
static void attach(struct kvd_cpu_walk *w, const struct attend_job *job)
{
    w->job = job;
    w->out = job->partials ? &job->partials[w->index] : &w->part;
}

static struct unit unit_at(const struct attend_job *job, uint64_t i);

static void begin_walk(struct kvd_cpu_walk *w, const struct attend_job *job, uint64_t index)
{
    const struct kvd_plane *g = job->p->plane;
    w->index = index;
    w->unit = unit_at(job, index / job->splits);
    w->compressed = false;
    w->runs = 0;
    attach(w, job);
    memset(w->acc, 0, w->unit.rows * 8 * g->head_dim_v * sizeof(float));
    memset(w->o, 0, w->unit.rows * g->head_dim_v * sizeof(float));
    for (uint32_t r = 0; r < KVD_CPU_ROWS; r++) {
        w->out->m[r] = -INFINITY;
        w->out->l[r] = w->out->coded[r] = w->centre_sum[r] = 0;
        memset(w->out->o[r], 0, g->head_dim_v * sizeof(double));
        memset(w->out->o_rotated[r], 0, g->head_dim_v * sizeof(double));
    }
    load_queries(w);
    split_range(job, &w->unit, (uint32_t)(index % job->splits), &w->at, &w->end);
    w->active = true;
}

// False: the slice was over first.
static bool walk_on(struct kvd_cpu_walk *w)
{
    const struct kvd_slice *slice = w->job->p->slice;
    while (w->at < w->end) {
        struct run run = run_at(w, w->at, w->end);
        walk_run(w, &run);
        w->at += run.n;
        if (w->at < w->end && kvd_slice_over(slice))
            return false;
    }
    flush_sums(w);
    w->active = false;
    return true;
}

static void merge(struct partial *to, const struct partial *from, uint32_t rows, uint32_t dim)
{
    for (uint32_t r = 0; r < rows; r++) {
        float m = fmaxf(to->m[r], from->m[r]);
        double a = to->m[r] == m ? 1 : exp(to->m[r] - m),
               b = from->m[r] == m ? 1 : exp(from->m[r] - m);
        for (uint32_t c = 0; c < dim; c++) {
            to->o[r][c] = a * to->o[r][c] + b * from->o[r][c];
            to->o_rotated[r][c] = a * to->o_rotated[r][c] + b * from->o_rotated[r][c];
        }
        to->coded[r] = a * to->coded[r] + b * from->coded[r];
        to->l[r] = a * to->l[r] + b * from->l[r];
        to->m[r] = m;
    }
}

// Adds a sink to a row's maximum and sum. Returns what the sums of values are worth then.
static double add_sink(float sink, double *m, double *l)
{
    if (sink == -INFINITY)
        return 1;
    double top = fmax(*m, (double)sink), kept = exp(*m - top);
    *l = *l * kept + exp(sink - top);
    *m = top;
    return kept;
}

static void finish(const struct attend_job *job, const struct unit *u, const struct partial *part)
{
    const struct kvd_attend_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    uint32_t group = group_of(job), dim = g->head_dim_v;
    for (uint32_t r = 0; r < u->rows; r++) {
        float o[KVD_MAX_HEAD_DIM] = {0}, rotated[KVD_MAX_HEAD_DIM];
        uint32_t row = u->row0 + r, head = u->head * group + row % group;
        double m = part->m[r], l = part->l[r], kept = 1; // of the sums
        if (p->sinks)
            kept = add_sink(p->sinks[(uint64_t)u->layer * g->q_heads + head], &m, &l);
        double inverse = l == 0 ? 0 : kept / l; // NaN stays NaN
        if (g->codec.v != KVD_CODEC_BF16) {
            uint32_t layer = p->layer_begin + u->layer;
            const float *back =
                kvd_rotation_of(p->rotation, p->rotation->v_back, dim, layer, u->head);
            for (uint32_t c = 0; c < dim; c++)
                rotated[c] = (float)(part->o_rotated[r][c] * inverse);
            kvd_apply(job->cpu->isa, rotated, 1, dim, back, o);
            kvd_add_mean(kvd_mean_of(p->rotation, true, layer, u->head),
                         (float)(part->coded[r] * inverse), 1, dim, o);
        }
        for (uint32_t c = 0; c < dim; c++)
            o[c] += (float)(part->o[r][c] * inverse);
        kvd_store_row(&u->item->o, u->layer, row / group, head, dim, o);
        if (u->item->lse.data) {
            float lse = (float)(m + log(l));
            memcpy(kvd_at(&u->item->lse, u->layer, row / group, head), &lse, sizeof(lse));
        }
    }
}

static struct unit unit_at(const struct attend_job *job, uint64_t i)
{
    const struct kvd_plane *g = job->p->plane;
    uint32_t lo = 0, hi = job->p->n_items;
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if (job->first_unit[mid] <= i)
            lo = mid;
        else
            hi = mid;
    }
    const struct kvd_attend_item *item = &job->p->items[lo];
    uint32_t rows = item->q_len * group_of(job);
    uint32_t blocks = (rows + KVD_CPU_ROWS - 1) / KVD_CPU_ROWS;
    i -= job->first_unit[lo];
    struct unit u = {.item = item, .row0 = (uint32_t)(i % blocks) * KVD_CPU_ROWS};
    u.rows = KVD_MIN((uint32_t)KVD_CPU_ROWS, rows - u.row0);
    i /= blocks;
    u.head = (uint32_t)(i % g->kv_heads);
    u.layer = (uint32_t)(i / g->kv_heads);
    return u;
}

// The part of one thread in a slice: its walk that was kept, and new ones.
static void take_turn(void *ctx, uint64_t turn)
{
    struct attend_job *job = ctx;
    struct kvd_cpu_walk *w = &job->turns[turn];
    for (;;) {
        if (!w->active) {
            uint64_t index = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
            if (index >= job->walks)
                return;
            begin_walk(w, job, index);
        }
        if (!walk_on(w))
            return;
        if (job->splits == 1)
            finish(job, &w->unit, w->out);
        if (kvd_slice_over(job->p->slice))
            return;
    }
}

static void finish_one(void *ctx, uint64_t i)
{
    const struct attend_job *job = ctx;
    struct unit u = unit_at(job, i);
    struct partial *part = &job->partials[i * job->splits];
    for (uint32_t s = 1; s < job->splits; s++)
        merge(part, part + s, u.rows, job->p->plane->head_dim_v);
    finish(job, &u, part);
}

struct kvd_cpu_walk *kvd_cpu_walks_new(uint32_t n)
{
    struct kvd_cpu_walk *walks = aligned_alloc(WALK_ALIGN, n * sizeof(*walks));
    for (uint32_t i = 0; walks && i < n; i++)
        walks[i].active = false;
    return walks;
}

// What is kept between slices. In one piece of memory: walks, then partials, if there are any.
struct kept {
    uint64_t next;
    bool walks_kept;
    struct kvd_cpu_walk walks[];
};

static struct partial *kept_partials(const struct attend_job *job, struct kept *kept)
{
    return (void *)(kept->walks + kvd_threads_count(job->cpu->threads));
}

static struct kept *kept_new(const struct attend_job *job)
{
    uint64_t walks = kvd_threads_count(job->cpu->threads) * sizeof(struct kvd_cpu_walk);
    uint64_t partials = (job->splits > 1 ? job->walks : 0) * sizeof(struct partial);
    uint64_t bytes = kvd_round_up(sizeof(struct kept) + walks + partials, WALK_ALIGN);
    struct kept *kept = aligned_alloc(WALK_ALIGN, bytes);
    if (kept) {
        kept->next = 0;
        kept->walks_kept = false;
    }
    return kept;
}

// Takes up the walks that the last slice left.
static void resume(struct attend_job *job, struct kept *kept)
{
    bool walks = kept && kept->walks_kept;
    job->turns = walks ? kept->walks : job->cpu->walks;
    atomic_init(&job->next, kept ? kept->next : 0);
    for (uint32_t i = 0; i < kvd_threads_count(job->cpu->threads); i++) {
        job->turns[i].active &= walks;
        if (job->turns[i].active)
            attach(&job->turns[i], job);
    }
}

static bool unfinished(const struct attend_job *job)
{
    bool any = atomic_load(&job->next) < job->walks;
    for (uint32_t i = 0; i < kvd_threads_count(job->cpu->threads); i++)
        any |= job->turns[i].active;
    return any;
}

// Keeps what is not done for the next slice. False: all is done, or there is no memory to keep it.
static bool keep(struct attend_job *job, struct kvd_slice *slice)
{
    uint32_t n = kvd_threads_count(job->cpu->threads);
    if (!unfinished(job))
        return false;
    struct kept *kept = slice->state ? slice->state : kept_new(job);
    if (!kept)
        return false;
    if (!kept->walks_kept)
        memcpy(kept->walks, job->turns, n * sizeof(struct kvd_cpu_walk));
    kept->walks_kept = true;
    kept->next = KVD_MIN(atomic_load(&job->next), job->walks);
    slice->state = kept;
    return true;
}

// Units of each item, added up, and how many splits they want.
static uint64_t *plan(const struct kvd_attend_params *p, struct attend_job *job)
{
    const struct kvd_plane *g = p->plane;
    uint64_t *first = calloc(p->n_items + 1, sizeof(*first)), longest = 0;
    if (!first)
        return NULL;
    for (uint32_t i = 0; i < p->n_items; i++) {
        uint64_t rows = (uint64_t)p->items[i].q_len * (g->q_heads / g->kv_heads);
        first[i + 1] = first[i] + kvd_div_up(rows, KVD_CPU_ROWS) * g->kv_heads * p->layer_count;
        longest = KVD_MAX(longest, total_tokens(&p->items[i]));
    }
    uint64_t units = first[p->n_items];
    uint64_t want = 4 * (uint64_t)kvd_threads_count(job->cpu->threads);
    if (units < want && kvd_threads_count(job->cpu->threads) > 1)
        job->splits = (uint32_t)KVD_MIN(kvd_div_up(want, units), longest / 512 + 1);
    job->walks = units * job->splits;
    job->first_unit = first;
    return first;
}

int kvd_cpu_attend(struct kvd_backend *b, const struct kvd_attend_params *p, struct kvd_error *err)
{
    struct attend_job job = {.cpu = (struct kvd_cpu *)b, .p = p, .splits = 1};
    struct kvd_slice *slice = p->slice;
    uint64_t *first KVD_FREE = plan(p, &job);
    if (!first)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct kept *kept = slice ? slice->state : NULL;
    if (job.splits > 1) {
        if (!kept && !(kept = kept_new(&job)))
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        job.partials = kept_partials(&job, kept);
        if (slice)
            slice->state = kept;
    }
    resume(&job, kept);
    kvd_threads_run(job.cpu->threads, kvd_threads_count(job.cpu->threads), take_turn, &job);
    if (slice && (slice->more = keep(&job, slice)))
        return KVD_OK;
    if (slice && unfinished(&job)) { // and there was no memory to keep it
        struct kvd_attend_params whole = *p;
        whole.slice = NULL;
        job.p = &whole;
        kvd_threads_run(job.cpu->threads, kvd_threads_count(job.cpu->threads), take_turn, &job);
        job.p = p;
    }
    if (job.splits > 1)
        kvd_threads_run(job.cpu->threads, first[p->n_items], finish_one, &job);
    if (!slice)
        free(kept);
    return KVD_OK;
}
