// Attention over heads of K and V on the CPU.
//
// A unit is up to four rows. History is scored in the space of its codes with a query taken there;
// its output stays there until the end, so that one product with V's inverse takes all of it back.
#include "kernels/cpu/walk.h"

#include <float.h>
#include <math.h>

// Attention of some rows over some tokens, not yet normalised. In double: rounding would grow with
// the tokens.
struct partial {
    _Alignas(KVD_WALK_ALIGN) float m[KVD_CPU_ROWS];   // running maximum
    double l[KVD_CPU_ROWS];                           // running sum; NaN: a logit was not finite
    double o[KVD_CPU_ROWS][KVD_MAX_HEAD_DIM];         // from bf16 tokens
    double o_rotated[KVD_CPU_ROWS][KVD_MAX_HEAD_DIM]; // from compressed tokens
    double coded[KVD_CPU_ROWS];                       // the part of l that compressed tokens have
};

// What one unit needs while it walks over tokens.
struct walk {
    struct kvd_cpu_walk base;
    struct kvd_tc_coder tc; // of K
    _Alignas(KVD_WALK_ALIGN) struct partial part;
    _Alignas(KVD_WALK_ALIGN) float q[KVD_CPU_ROWS][KVD_MAX_HEAD_DIM];
    _Alignas(KVD_WALK_ALIGN) float q_codes[KVD_CPU_QUERIES]; // rotated and prepared
    float q_sum[KVD_CPU_ROWS];                               // of the rotated query
    float q_mean[KVD_CPU_ROWS];                              // its product with the keys' mean
    float top[KVD_CPU_ROWS];                                 // of all logits, the run's too
    float run_sum[KVD_CPU_ROWS];                             // of a run's probabilities
    // Sums of the last runs, that are not in `out` yet:
    _Alignas(KVD_WALK_ALIGN) float acc[KVD_CPU_ROWS * 8 * KVD_MAX_HEAD_DIM]; // row stride 8 * dim_v
    _Alignas(KVD_WALK_ALIGN) float o[KVD_CPU_ROWS * KVD_MAX_HEAD_DIM];       // row stride dim_v
    uint32_t runs;
    bool compressed;                 // any of them of history
    uint64_t seen_by_all;            // without a window: every row sees the tokens before it
    double centre_sum[KVD_CPU_ROWS]; // sum of p * centre: the same for every channel
    _Alignas(KVD_WALK_ALIGN) float s[KVD_CPU_ROWS * KVD_PAGE_TOKENS]; // logits, then probabilities
};

// Scale and centre of the tokens of a tile's side; of those past the run's, which are not there
// yet, both 0.
static void params_of(const struct walk *w, const struct kvd_cpu_run *run, bool v,
                      struct kvd_cpu_params *out)
{
    const struct kvd_plane *g = w->base.job->p->plane;
    uint64_t at = kvd_params_offset(g->codec, g->head_dim_k, g->head_dim_v, v);
    w->base.job->cpu->isa->params(kvd_codecs_side(g->codec, v), run->tile + at, out);
    for (uint32_t t = run->n; t < KVD_PAGE_TOKENS; t++)
        out->scale[t] = out->centre[t] = 0;
}

// Whether every row sees all of a run.
static bool seen_by_all(const struct walk *w, const struct kvd_cpu_run *run)
{
    return !w->base.job->p->window && run->begin + run->n <= w->seen_by_all;
}

// Makes logits of a tile's scores at once where there is nothing to mask, and returns whether.
static bool score_tile(struct walk *w, const struct kvd_cpu_run *run)
{
    const struct kvd_attend_params *p = w->base.job->p;
    const struct kvd_plane *g = p->plane;
    const struct kvd_cpu_isa *isa = w->base.job->cpu->isa;
    struct partial *out = w->base.out;
    struct kvd_cpu_params params;
    bool whole = run->n == KVD_PAGE_TOKENS && p->softcap <= 0 && seen_by_all(w, run);
    params_of(w, run, false, &params);
    if (kvd_codec_tc(g->codec.k))
        isa->tc_scores(&w->tc, run->tile, w->q_codes, w->base.unit.rows, w->s, &w->base.ahead);
    else
        isa->k_scores(g->codec.k, run->tile, g->head_dim_k, w->q_codes, w->base.unit.rows, w->s,
                      &w->base.ahead);
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        float *s = w->s + r * KVD_PAGE_TOKENS;
        w->top[r] = out->m[r];
        if (whole)
            out->l[r] +=
                (double)isa->whole(s, &params, w->q_sum[r], w->q_mean[r], p->scale, &w->top[r]);
        else
            isa->affine(s, &params, w->q_sum[r], w->q_mean[r]);
    }
    return whole;
}

static void fill(float *s, uint32_t from, uint32_t to, float x)
{
    for (uint32_t t = from; t < to; t++)
        s[t] = x;
}

// Turns scores into logits of visible tokens, -inf elsewhere. Returns whether any token is visible
// to any row.
static bool mask_run(struct walk *w, const struct kvd_cpu_run *run)
{
    const struct kvd_attend_params *p = w->base.job->p;
    const struct kvd_cpu_isa *isa = w->base.job->cpu->isa;
    struct partial *out = w->base.out;
    bool any = false, all = seen_by_all(w, run);
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        float *s = w->s + r * KVD_PAGE_TOKENS;
        uint32_t lo, hi;
        if (all)
            lo = 0, hi = run->n;
        else
            kvd_cpu_visible(&w->base, run, r, &lo, &hi);
        any |= lo < hi;
        hi = KVD_MAX(lo, hi);
        fill(s, 0, lo, 0); // whatever was there is no reason for a NaN
        fill(s, hi, KVD_PAGE_TOKENS, 0);
        // Once NaN it stays so, whatever is added.
        out->l[r] += (double)isa->logits(s, p->scale);
        for (uint32_t t = lo; t < hi && p->softcap > 0; t++)
            s[t] = p->softcap * tanhf(s[t] / p->softcap);
        fill(s, 0, lo, -INFINITY);
        fill(s, hi, KVD_PAGE_TOKENS, -INFINITY);
        w->top[r] = isa->top(s, out->m[r]);
    }
    return any;
}

static void scale_sums(double *x, uint32_t n, double f)
{
    for (uint32_t i = 0; i < n; i++)
        x[i] *= f;
}

// Raises the running maximum to w->top and turns the new logits into probabilities.
static void soften(struct walk *w, uint32_t r)
{
    const struct kvd_plane *g = w->base.job->p->plane;
    const struct kvd_cpu_isa *isa = w->base.job->cpu->isa;
    struct partial *out = w->base.out;
    float *s = w->s + r * KVD_PAGE_TOKENS;
    const float top = w->top[r];
    w->run_sum[r] = 0;
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

static void add_tile(struct walk *w, const struct kvd_cpu_run *run)
{
    const struct kvd_plane *g = w->base.job->p->plane;
    const struct kvd_cpu_isa *isa = w->base.job->cpu->isa;
    struct kvd_cpu_params params;
    struct partial *out = w->base.out;
    params_of(w, run, true, &params);
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        w->centre_sum[r] += (double)isa->weigh(w->s + r * KVD_PAGE_TOKENS, &params);
        out->coded[r] += w->run_sum[r];
    }
    isa->v_accumulate(g->codec.v, run->tile + kvd_codes_offset(g->codec, g->head_dim_k, true),
                      g->head_dim_v, w->s, w->base.unit.rows, w->acc, &w->base.ahead);
    w->compressed = true;
}

// Adds the last runs' sums to the partial.
static void flush_sums(struct kvd_cpu_walk *base)
{
    struct walk *w = (struct walk *)base;
    struct partial *out = base->out;
    uint32_t dim = w->base.job->p->plane->head_dim_v;
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        for (uint32_t c = 0; c < dim; c++)
            out->o[r][c] += w->o[r * dim + c];
        if (!w->compressed)
            continue;
        float o[KVD_MAX_HEAD_DIM];
        w->base.job->cpu->isa->v_reduce(w->base.job->p->plane->codec.v, w->acc + r * 8 * dim, dim,
                                        o);
        for (uint32_t c = 0; c < dim; c++)
            out->o_rotated[r][c] += o[c] + w->centre_sum[r];
        w->centre_sum[r] = 0;
    }
    memset(w->o, 0, w->base.unit.rows * dim * sizeof(float));
    if (w->compressed)
        memset(w->acc, 0, w->base.unit.rows * 8 * dim * sizeof(float));
    w->compressed = false;
    w->runs = 0;
}

static void walk_run(struct kvd_cpu_walk *base, const struct kvd_cpu_run *run)
{
    struct walk *w = (struct walk *)base;
    const struct kvd_plane *g = w->base.job->p->plane;
    const struct kvd_cpu_isa *isa = w->base.job->cpu->isa;
    const uint8_t *ahead = run->v ? run->v : base->ahead_rows;
    bool whole = false;
    if (!run->k)
        whole = score_tile(w, run);
    else
        isa->bf16_scores(run->k, ahead ? ahead : run->k, run->k_stride, run->n, g->head_dim_k,
                         w->q[0], w->base.unit.rows, w->s);
    if (!whole && !mask_run(w, run))
        return;
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        kvd_cpu_ask(&base->ahead, 1);
        soften(w, r);
    }
    if (!run->v)
        add_tile(w, run);
    else
        isa->bf16_accumulate(run->v, base->ahead_rows ? base->ahead_rows : run->v, run->v_stride,
                             run->n, g->head_dim_v, w->s, w->base.unit.rows, w->o);
    if (++w->runs == KVD_RUNS_IN_FLOAT)
        flush_sums(base);
}

static void load_queries(struct walk *w)
{
    const struct kvd_attend_params *p = w->base.job->p;
    const struct kvd_plane *g = p->plane;
    const struct kvd_rotation *rot = p->rotation;
    uint32_t group = kvd_job_group(w->base.job), dim = g->head_dim_k;
    float *unrotated = w->q[0]; // rows lie dim apart: the inner loops want them dense
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        uint32_t row = w->base.unit.row0 + r;
        kvd_load_row(&w->base.unit.item->q, w->base.unit.layer, row / group,
                     w->base.unit.head * group + row % group, dim, unrotated + r * dim);
    }
    if (g->codec.k == KVD_CODEC_BF16)
        return;
    float rotated[KVD_CPU_ROWS * KVD_MAX_HEAD_DIM];
    uint32_t layer = p->layer_begin + w->base.unit.layer;
    const float *m = kvd_rotation_of(rot, rot->q, dim, layer, w->base.unit.head);
    const float *mean = kvd_mean_of(rot, false, layer, w->base.unit.head);
    kvd_apply(w->base.job->cpu->isa, unrotated, w->base.unit.rows, dim, m, rotated);
    w->tc = kvd_tc_coder_at(rot, g->codec.k, false, layer, w->base.unit.head);
    for (uint32_t c = 0; kvd_codec_tc(g->codec.k) && c < dim; c++)
        for (uint32_t r = 0; r < w->base.unit.rows; r++)
            rotated[r * dim + c] *= (float)kvd_tc_step(&w->tc, c);
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        double along = 0;
        for (uint32_t c = 0; mean && c < dim; c++)
            along += (double)unrotated[r * dim + c] * (double)mean[c];
        w->q_mean[r] = (float)along;
        w->q_sum[r] = 0;
        for (uint32_t c = 0; c < dim; c++)
            w->q_sum[r] += rotated[r * dim + c];
        w->base.job->cpu->isa->q_prepare(g->codec.k, &w->tc, rotated + r * dim, dim,
                                         w->q_codes + r * 2 * dim);
    }
}

static void begin(struct kvd_cpu_walk *base)
{
    struct walk *w = (struct walk *)base;
    struct partial *out = base->out;
    const struct kvd_plane *g = base->job->p->plane;
    w->compressed = false;
    w->runs = 0;
    w->seen_by_all = base->unit.item->length + base->unit.item->new_tokens -
                     base->unit.item->q_len + base->unit.row0 / kvd_job_group(base->job) + 1;
    memset(w->acc, 0, base->unit.rows * 8 * g->head_dim_v * sizeof(float));
    memset(w->o, 0, base->unit.rows * g->head_dim_v * sizeof(float));
    for (uint32_t r = 0; r < KVD_CPU_ROWS; r++) {
        out->m[r] = -INFINITY;
        out->l[r] = out->coded[r] = w->centre_sum[r] = 0;
        memset(out->o[r], 0, g->head_dim_v * sizeof(double));
        memset(out->o_rotated[r], 0, g->head_dim_v * sizeof(double));
    }
    load_queries(w);
}

static void merge(void *into, const void *other, uint32_t rows, uint32_t dim)
{
    struct partial *to = into;
    const struct partial *from = other;
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

static void finish(const struct kvd_attend_job *job, const struct kvd_cpu_unit *u,
                   const void *partial)
{
    const struct partial *part = partial;
    const struct kvd_attend_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    uint32_t group = kvd_job_group(job), dim = g->head_dim_v;
    for (uint32_t r = 0; r < u->rows; r++) {
        float o[KVD_MAX_HEAD_DIM] = {0}, rotated[KVD_MAX_HEAD_DIM];
        uint32_t row = u->row0 + r, head = u->head * group + row % group;
        double m = part->m[r], l = part->l[r], kept = 1; // of the sums
        if (p->sinks)
            kept = kvd_cpu_add_sink(p->sinks[(uint64_t)u->layer * g->q_heads + head], &m, &l);
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

const struct kvd_cpu_kernel kvd_cpu_heads = {
    .rows = KVD_CPU_ROWS,
    .walks_a_thread = 4,
    .walk_bytes = sizeof(struct walk),
    .partial_bytes = sizeof(struct partial),
    .partial_at = offsetof(struct walk, part),
    .begin = begin,
    .run = walk_run,
    .flush = flush_sums,
    .merge = merge,
    .finish = finish,
};
