// Attention over latents (MLA) on the CPU.
//
// Many q heads share one latent of 512 values, which is key and value, and a rope part of 64: there
// is arithmetic enough that a tile is made floats once, and then is a matrix for all rows of a
// unit. Loops have rows as their lanes, so everything of queries, scores and sums lies [channel or
// token][row].
//
// Scores of history are of codes with a query taken there by A^-T, its sums stay there until the
// end, as in heads.c. The rope part is in bf16 everywhere. Channels and tokens of unpacked codes
// have an order of their own (cpu.h): the queries, sums and rope rows that meet them have it too.
#include "kernels/cpu/walk.h"

#include <float.h>
#include <math.h>

enum {
    R = KVD_LATENT_ROWS,
    MOST_LATENT = KVD_MAX_ROW,
    MOST_ROPE = 64,
    SCORED = 8, // tokens at least, and multiples of it
    // Floats past a token's row: rows that are a power of two apart fall into the same few lines of
    // a cache.
    PAD = 16,
};

#define KVD_LATENT_DIMS(rope, latent)                                                              \
    _Static_assert((rope) <= MOST_ROPE && (latent) <= MOST_LATENT &&                               \
                       ((rope) | (latent)) % 64 == 0,                                              \
                   "products are summed over 64 channels at a time");
#include "proto/head_dims.def"

// Attention of some rows over some tokens, not yet normalised.
struct partial {
    _Alignas(KVD_WALK_ALIGN) double o[2][MOST_LATENT * R]; // of bf16 tokens, of coded ones
    double l[R];                                           // sum; NaN: a logit was not finite
    double coded[R];                                       // the part of l that coded tokens have
    float m[R]; // the maximum that all of it is relative to
};

// What one unit needs while it walks over tokens.
struct walk {
    struct kvd_cpu_walk base;
    struct partial part;
    _Alignas(KVD_WALK_ALIGN) float q[(MOST_LATENT + MOST_ROPE) * R]; // latent, then rope
    _Alignas(KVD_WALK_ALIGN) float q_codes[MOST_LATENT * R];
    _Alignas(KVD_WALK_ALIGN) float q_mean[R]; // its product with the latents' mean
    // Sums of the last runs, relative to `m`, that are not in the partial yet: as partial's.
    _Alignas(KVD_WALK_ALIGN) float o[2][MOST_LATENT * R];
    float m[R]; // running maximum
    double l[R], coded[R];
    uint32_t runs;
    bool used[2]; // which of o there are
    // A run's:
    _Alignas(KVD_WALK_ALIGN) float latent[KVD_PAGE_TOKENS * (MOST_LATENT + PAD)];
    _Alignas(KVD_WALK_ALIGN) float rope[KVD_PAGE_TOKENS * (MOST_ROPE + PAD)];
    _Alignas(KVD_WALK_ALIGN) float s[KVD_PAGE_TOKENS * R]; // logits, then probabilities
};

// A run as matrices.
struct matrices {
    struct kvd_panel latent, rope;
    uint32_t places; // of tokens: n, and what is up to a multiple of SCORED
    bool coded;
};

static uint32_t token_in(const struct matrices *x, uint32_t place)
{
    return x->coded ? kvd_latent_token(place) : place;
}

static const struct kvd_cpu_isa *isa_of(const struct walk *w)
{
    return w->base.job->cpu->isa;
}

static void load_bf16(const struct walk *w, const struct matrices *x, const uint8_t *rows,
                      uint64_t stride, uint32_t n, uint32_t dim, float *out)
{
    for (uint32_t i = 0; i < x->places; i++) {
        uint32_t t = token_in(x, i);
        if (t < n)
            isa_of(w)->bf16_row(rows + t * stride, dim, out + (uint64_t)i * (dim + PAD));
        else
            memset(out + (uint64_t)i * (dim + PAD), 0, dim * sizeof(float));
    }
}

// Tokens that are not in the run are zeros, whatever memory has: their probabilities are 0, and not
// to be multiplied by what may not be finite.
static struct matrices load_run(struct walk *w, const struct kvd_cpu_run *run)
{
    const struct kvd_plane *g = w->base.job->p->plane;
    uint32_t rope = g->head_dim_k, latent = g->head_dim_v;
    struct matrices x = {.latent = {w->latent, latent + PAD, 2},
                         .rope = {w->rope, rope + PAD, 2},
                         .places = (uint32_t)kvd_round_up(run->n, SCORED),
                         .coded = !run->v};
    if (x.coded) {
        struct kvd_affine param[KVD_PAGE_TOKENS] = {0};
        x.places = KVD_PAGE_TOKENS;
        x.latent = (struct kvd_panel){w->latent, 2, 2 * KVD_PAGE_TOKENS};
        kvd_cpu_params(g, run, true, param);
        isa_of(w)->latent_unpack(g->codec.v, run->tile + kvd_codes_offset(g->codec, rope, true),
                                 latent, param, w->latent);
    } else {
        load_bf16(w, &x, run->v, run->v_stride, run->n, latent, w->latent);
    }
    load_bf16(w, &x, run->k, run->k_stride, run->n, rope, w->rope);
    return x;
}

// Whether any row sees any token of a run, and whether all see all places.
static bool visible(const struct walk *w, const struct kvd_cpu_run *run, uint32_t lo[R],
                    uint32_t hi[R], bool *all)
{
    bool any = false;
    *all = run->n % (run->v ? SCORED : KVD_PAGE_TOKENS) == 0; // no place is without a token
    for (uint32_t r = 0; r < w->base.unit.rows; r++) {
        kvd_cpu_visible(&w->base, run, r, &lo[r], &hi[r]);
        any |= lo[r] < hi[r];
        *all &= lo[r] == 0 && hi[r] == run->n;
    }
    return any;
}

// Turns scores into logits of visible tokens, -inf elsewhere.
static void mask(struct walk *w, const struct matrices *x, const uint32_t lo[R],
                 const uint32_t hi[R])
{
    const struct kvd_attend_params *p = w->base.job->p;
    for (uint32_t i = 0; i < x->places; i++) {
        uint32_t t = token_in(x, i);
        for (uint32_t r = 0; r < w->base.unit.rows; r++) {
            float *s = &w->s[i * R + r];
            if (t < lo[r] || t >= hi[r]) {
                *s = -INFINITY;
                continue;
            }
            *s *= p->scale;
            if (!(fabsf(*s) <= FLT_MAX))
                w->l[r] = NAN; // and stays so, whatever is added
            if (p->softcap > 0)
                *s = p->softcap * tanhf(*s / p->softcap);
        }
    }
}

static void score(struct walk *w, const struct matrices *x)
{
    const struct kvd_plane *g = w->base.job->p->plane;
    uint32_t rows = w->base.unit.rows;
    for (uint32_t i = 0; i < x->places; i++)
        if (x->coded)
            memcpy(w->s + i * R, w->q_mean, sizeof(w->q_mean));
        else
            memset(w->s + i * R, 0, R * sizeof(float));
    isa_of(w)->panel_scores(&x->latent, g->head_dim_v, x->places, x->coded ? w->q_codes : w->q,
                            rows, w->s);
    isa_of(w)->panel_scores(&x->rope, g->head_dim_k, x->places, w->q + g->head_dim_v * R, rows,
                            w->s);
}

// Raises the running maxima to those of the new logits and turns these into probabilities.
static void soften(struct walk *w, uint32_t places, bool coded)
{
    const struct kvd_cpu_isa *isa = isa_of(w);
    uint32_t dim = w->base.job->p->plane->head_dim_v;
    float top[R], f[R], sum[R];
    bool raised = false;
    memcpy(top, w->m, sizeof(top));
    isa->panel_top(w->s, places, top);
    for (uint32_t r = 0; r < R; r++) {
        f[r] = top[r] > w->m[r] && w->m[r] != -INFINITY ? expf(w->m[r] - top[r]) : 1;
        raised |= f[r] != 1;
        w->m[r] = top[r];
        w->l[r] *= f[r];
        w->coded[r] *= f[r];
        if (top[r] == -INFINITY)
            top[r] = 0; // -inf - 0: the exponential is 0
    }
    for (int k = 0; k < 2; k++)
        if (raised && w->used[k])
            isa->panel_scale(w->o[k], dim, f);
    isa->panel_exp(w->s, places, top, sum);
    for (uint32_t r = 0; r < R; r++) {
        w->l[r] += sum[r];
        w->coded[r] += coded ? sum[r] : 0;
    }
}

// Adds the last runs' sums to the partial.
static void flush(struct kvd_cpu_walk *base)
{
    struct walk *w = (struct walk *)base;
    struct partial *out = base->out;
    uint32_t n = base->job->p->plane->head_dim_v * R;
    double f[R];
    for (uint32_t r = 0; r < R; r++)
        f[r] = out->m[r] == w->m[r] ? 1 : exp((double)out->m[r] - w->m[r]);
    for (int k = 0; k < 2; k++) {
        for (uint32_t i = 0; i < n; i++)
            out->o[k][i] = out->o[k][i] * f[i % R] + w->o[k][i];
        memset(w->o[k], 0, n * sizeof(float));
        w->used[k] = false;
    }
    memcpy(out->m, w->m, sizeof(out->m));
    memcpy(out->l, w->l, sizeof(out->l));
    memcpy(out->coded, w->coded, sizeof(out->coded));
    w->runs = 0;
}

static void walk_run(struct kvd_cpu_walk *base, const struct kvd_cpu_run *run)
{
    struct walk *w = (struct walk *)base;
    const struct kvd_attend_params *p = base->job->p;
    uint32_t lo[R], hi[R];
    bool all;
    if (!visible(w, run, lo, hi, &all))
        return;
    struct matrices x = load_run(w, run);
    score(w, &x);
    if (all && !(p->softcap > 0)) {
        float nan[R];
        isa_of(w)->panel_logits(w->s, x.places, p->scale, nan);
        for (uint32_t r = 0; r < R; r++)
            w->l[r] += nan[r];
    } else {
        mask(w, &x, lo, hi);
    }
    soften(w, x.places, x.coded);
    isa_of(w)->panel_sums(&x.latent, p->plane->head_dim_v, x.places, w->s, base->unit.rows,
                          w->o[x.coded]);
    w->used[x.coded] = true;
    if (++w->runs == KVD_RUNS_IN_FLOAT)
        flush(base);
}

// y = x M, [dim][R] as x; y is zeros before. A copy where M is the identity.
static void turn(const struct kvd_cpu_isa *isa, const float *m, uint32_t dim, const float *x,
                 float *y)
{
    if (!m)
        memcpy(y, x, (uint64_t)dim * R * sizeof(float));
    for (uint32_t c = 0; m && c < dim; c += KVD_PAGE_TOKENS) {
        struct kvd_panel rows = {m + (uint64_t)c * dim, dim, 2};
        isa->panel_sums(&rows, dim, KVD_PAGE_TOKENS, x + (uint64_t)c * R, R, y);
    }
}

static void take_queries_to_codes(struct walk *w)
{
    const struct kvd_attend_params *p = w->base.job->p;
    const struct kvd_rotation *rot = p->rotation;
    const struct kvd_cpu_unit *u = &w->base.unit;
    uint32_t layer = p->layer_begin + u->layer, dim = p->plane->head_dim_v;
    const float *mean = kvd_mean_of(rot, true, layer, u->head);
    double along[R] = {0};
    for (uint32_t c = 0; mean && c < dim; c++)
        for (uint32_t r = 0; r < R; r++)
            along[r] += (double)w->q[c * R + r] * (double)mean[c];
    for (uint32_t r = 0; r < R; r++)
        w->q_mean[r] = (float)along[r];
    float *turned = w->o[0]; // nothing is summed yet; zeros
    turn(isa_of(w), kvd_rotation_of(rot, rot->q_v, dim, layer, u->head), dim, w->q, turned);
    for (uint32_t c = 0; c < dim; c++)
        memcpy(w->q_codes + c * R, turned + kvd_latent_channel(c) * R, R * sizeof(float));
    memset(turned, 0, dim * R * sizeof(float));
}

static void load_queries(struct walk *w)
{
    const struct kvd_plane *g = w->base.job->p->plane;
    const struct kvd_cpu_unit *u = &w->base.unit;
    uint32_t group = kvd_job_group(w->base.job), dim = kvd_plane_dim_q(g);
    float row[MOST_LATENT + MOST_ROPE];
    memset(w->q, 0, dim * R * sizeof(float));
    for (uint32_t r = 0; r < u->rows; r++) {
        uint32_t at = u->row0 + r;
        kvd_load_row(&u->item->q, u->layer, at / group, u->head * group + at % group, dim, row);
        for (uint32_t c = 0; c < dim; c++)
            w->q[c * R + r] = row[c];
    }
    if (g->codec.v != KVD_CODEC_BF16)
        take_queries_to_codes(w);
}

static void begin(struct kvd_cpu_walk *base)
{
    struct walk *w = (struct walk *)base;
    struct partial *out = base->out;
    memset(out->o, 0, sizeof(out->o));
    memset(w->o, 0, sizeof(w->o));
    memset(w->s, 0, sizeof(w->s));
    w->runs = 0;
    w->used[0] = w->used[1] = false;
    for (uint32_t r = 0; r < R; r++) {
        out->m[r] = w->m[r] = -INFINITY;
        out->l[r] = out->coded[r] = w->l[r] = w->coded[r] = 0;
    }
    load_queries(w);
}

static void merge(void *into, const void *other, uint32_t rows, uint32_t dim)
{
    struct partial *to = into;
    const struct partial *from = other;
    double a[R] = {0}, b[R] = {0};
    for (uint32_t r = 0; r < rows; r++) {
        float m = fmaxf(to->m[r], from->m[r]);
        a[r] = to->m[r] == m ? 1 : exp((double)to->m[r] - m);
        b[r] = from->m[r] == m ? 1 : exp((double)from->m[r] - m);
        to->l[r] = a[r] * to->l[r] + b[r] * from->l[r];
        to->coded[r] = a[r] * to->coded[r] + b[r] * from->coded[r];
        to->m[r] = m;
    }
    for (int k = 0; k < 2; k++)
        for (uint32_t i = 0; i < dim * R; i++)
            to->o[k][i] = a[i % R] * to->o[k][i] + b[i % R] * from->o[k][i];
}

// What coded tokens give, as it was before the transform: [channel][row].
static void take_back(const struct kvd_attend_job *job, const struct kvd_cpu_unit *u,
                      const struct partial *part, const double inverse[R], float *o)
{
    const struct kvd_attend_params *p = job->p;
    const struct kvd_rotation *rot = p->rotation;
    uint32_t layer = p->layer_begin + u->layer, dim = p->plane->head_dim_v;
    const float *mean = kvd_mean_of(rot, true, layer, u->head);
    float coded[MOST_LATENT * R];
    for (uint32_t c = 0; c < dim; c++)
        for (uint32_t r = 0; r < R; r++)
            coded[kvd_latent_channel(c) * R + r] = (float)(part->o[1][c * R + r] * inverse[r]);
    turn(job->cpu->isa, kvd_rotation_of(rot, rot->v_back, dim, layer, u->head), dim, coded, o);
    for (uint32_t c = 0; mean && c < dim; c++)
        for (uint32_t r = 0; r < R; r++)
            o[c * R + r] += mean[c] * (float)(part->coded[r] * inverse[r]);
}

static void finish(const struct kvd_attend_job *job, const struct kvd_cpu_unit *u,
                   const void *partial)
{
    const struct partial *part = partial;
    const struct kvd_attend_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    uint32_t group = kvd_job_group(job), dim = g->head_dim_v;
    float o[MOST_LATENT * R] = {0};
    double inverse[R] = {0}, m[R], l[R];
    for (uint32_t r = 0; r < u->rows; r++) {
        double kept = 1; // of the sums
        uint32_t head = u->head * group + (u->row0 + r) % group;
        m[r] = part->m[r];
        l[r] = part->l[r];
        if (p->sinks)
            kept = kvd_cpu_add_sink(p->sinks[(uint64_t)u->layer * g->q_heads + head], &m[r], &l[r]);
        inverse[r] = l[r] == 0 ? 0 : kept / l[r]; // NaN stays NaN
    }
    if (g->codec.v != KVD_CODEC_BF16)
        take_back(job, u, part, inverse, o);
    for (uint32_t r = 0; r < u->rows; r++) {
        uint32_t at = u->row0 + r, head = u->head * group + at % group;
        float row[MOST_LATENT];
        for (uint32_t c = 0; c < dim; c++)
            row[c] = o[c * R + r] + (float)(part->o[0][c * R + r] * inverse[r]);
        kvd_store_row(&u->item->o, u->layer, at / group, head, dim, row);
        if (u->item->lse.data) {
            float lse = (float)(m[r] + log(l[r]));
            memcpy(kvd_at(&u->item->lse, u->layer, at / group, head), &lse, sizeof(lse));
        }
    }
}

const struct kvd_cpu_kernel kvd_cpu_latent = {
    .rows = R,
    .walks_a_thread = 2, // partials are large
    .walk_bytes = sizeof(struct walk),
    .partial_bytes = sizeof(struct partial),
    .partial_at = offsetof(struct walk, part),
    .begin = begin,
    .run = walk_run,
    .flush = flush,
    .merge = merge,
    .finish = finish,
};
