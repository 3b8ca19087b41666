#include "calib/eval.h"

#include <cblas.h>
#include <math.h>
#include <pthread.h>

#include "calib/marks.h"
#include "calib/parallel.h"
#include "calib/transforms.h"
#include "kernels/quantize.h"

static const float clip_ratios[] = {1.0f,  0.99f, 0.98f, 0.97f, 0.96f, 0.95f, 0.94f,
                                    0.93f, 0.92f, 0.91f, 0.90f, 0.88f, 0.86f, 0.84f};
// Of the levels, at the ratios chosen before. None first: of equals the first is taken.
static const float gains[] = {1.0f, 0.98f, 0.96f, 0.94f, 0.92f, 0.9f, 0.88f, 1.03f, 1.06f};
enum { RATIOS = KVD_LEN(clip_ratios), GAINS = KVD_LEN(gains) };

double kvd_eval_bits(uint32_t codec, uint32_t dim_k, uint32_t dim_v)
{
    return kvd_value_bits(kvd_codecs_both(codec), dim_k, dim_v);
}

// Sums of one layer and case, ratio or gain; per kv head while it is worked on.
struct sums {
    double difference, norm; // squared
    double logit, logits;    // squared, and how many
    double bias, asked;      // at each query's strongest key, and how many have one
    double kl, queries;
    double worst;
    double moved; // by a layer, in the sums of its first head
};

struct context {
    const struct kvd_dump_piece *piece;
    uint64_t first;
};

struct job {
    const struct kvd_dump *dump;
    const struct kvd_eval_options *o;
    const struct kvd_eval_case *cases;
    uint32_t n_cases;
    struct kvd_rotset *clips; // fit these instead,
    bool fit_gains;           // or its gains
    uint16_t layers[KVD_MAX_LAYERS];
    uint32_t n_layers;
    struct kvd_eval_figures *figures;
    pthread_mutex_t lock;             // of what follows
    struct kvd_eval_spectra *spectra; // sums so far; NULL: not wanted
    uint64_t done, total;             // heads of contexts
};

// One kv head of one context.
struct workspace {
    float *rows[KVD_DUMP_TENSORS]; // [tokens][heads][dim], of q and g the last positions
    float *q;                      // [positions * group][dim_k]
    float *k, *v, *k2, *v2;        // [tokens][dim], as recorded and as read back
    float *turned;                 // [tokens][dim]
    float *logits, *p, *p2;        // [positions * group][tokens]
    float *out, *out2, *g;         // [positions * group][dim_v]
    double *moved;                 // [cases][positions], of all kv heads so far
    uint32_t tokens, rows_q, positions, window;
};

static void workspace_deinit(void *workspace)
{
    struct workspace *w = workspace;
    for (int s = 0; s < KVD_DUMP_TENSORS; s++)
        free(w->rows[s]);
    free(w->moved);
    float *all[] = {w->q,      w->k, w->v,  w->k2,  w->v2,   w->turned,
                    w->logits, w->p, w->p2, w->out, w->out2, w->g};
    for (size_t i = 0; i < KVD_LEN(all); i++)
        free(all[i]);
}

static bool workspace_init(void *arg, void *workspace)
{
    const struct job *j = arg;
    struct workspace *w = workspace;
    const struct kvd_dump *d = j->dump;
    uint64_t t = j->o->context, group = d->heads[KVD_DUMP_Q] / d->heads[KVD_DUMP_K];
    uint64_t rows = j->o->queries * group, dk = d->dim[KVD_DUMP_K], dv = d->dim[KVD_DUMP_V];
    struct {
        float **to;
        uint64_t n;
    } all[] = {{&w->rows[KVD_DUMP_Q], j->o->queries * d->heads[KVD_DUMP_Q] * dk},
               {&w->rows[KVD_DUMP_K], t * d->heads[KVD_DUMP_K] * dk},
               {&w->rows[KVD_DUMP_V], t * d->heads[KVD_DUMP_V] * dv},
               {&w->q, rows * dk},
               {&w->k, t * dk},
               {&w->k2, t * dk},
               {&w->v, t * dv},
               {&w->v2, t * dv},
               {&w->turned, t * KVD_MAX(dk, dv)},
               {&w->logits, rows * t},
               {&w->p, rows * t},
               {&w->p2, rows * t},
               {&w->out, rows * dv},
               {&w->out2, rows * dv},
               {&w->rows[KVD_DUMP_G], d->graded ? j->o->queries * d->heads[KVD_DUMP_Q] * dv : 1},
               {&w->g, d->graded ? rows * dv : 1}};
    w->tokens = (uint32_t)t;
    w->positions = j->o->queries;
    w->rows_q = (uint32_t)rows;
    bool ok =
        (w->moved = calloc((j->n_cases + 1) * (uint64_t)j->o->queries, sizeof(double))) != NULL;
    for (size_t i = 0; i < KVD_LEN(all); i++)
        ok &= (*all[i].to = malloc(all[i].n * sizeof(float))) != NULL;
    return ok;
}

// -- what pages do to rows -----------------------------------------------------------------------

// The history of a context: [begin, end).
static void history(const struct job *j, uint32_t *begin, uint32_t *end)
{
    uint32_t window = KVD_MAX(j->o->recent, j->o->queries); // queries see their own tokens in bf16
    uint32_t chunks = (j->o->context - j->o->sink - window) / KVD_CHUNK_TOKENS;
    *begin = j->o->sink;
    *end = j->o->sink + chunks * KVD_CHUNK_TOKENS;
}

static int falling(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Adds the shares of the channels of n rows to `to`, largest first.
static void add_spectrum(struct job *j, const float *x, uint32_t n, uint32_t dim, double *to)
{
    double energy[KVD_MAX_HEAD_DIM] = {0}, all = 0;
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t i = 0; i < dim; i++)
            energy[i] += (double)x[(uint64_t)t * dim + i] * (double)x[(uint64_t)t * dim + i];
    for (uint32_t i = 0; i < dim; i++)
        all += energy[i];
    qsort(energy, dim, sizeof(*energy), falling);
    pthread_mutex_lock(&j->lock);
    for (uint32_t i = 0; all > 0 && i < dim; i++)
        to[i] += energy[i] / all;
    pthread_mutex_unlock(&j->lock);
}

// out: x with its history turned by r, quantized, and turned back. `spectrum`, if not NULL, gets
// what the turned channels share.
static void through_pages(struct job *j, struct workspace *w, const float *x, uint32_t dim,
                          const float *r, const struct kvd_quantizer *q, double *spectrum,
                          float *out)
{
    uint32_t begin, end;
    struct kvd_row quantized;
    history(j, &begin, &end);
    int n = (int)(end - begin), d = (int)dim;
    memcpy(out, x, (uint64_t)w->tokens * dim * sizeof(*out));
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, d, d, 1, x + (uint64_t)begin * dim, d,
                r, d, 0, w->turned, d);
    if (spectrum)
        add_spectrum(j, w->turned, (uint32_t)n, dim, spectrum);
    if (q->codec == KVD_CODEC_BF16) // rounded when it was recorded
        return;
    const float *levels = kvd_codec_levels(q->codec);
    for (int t = 0; t < n; t++) {
        float *row = w->turned + (uint64_t)t * dim;
        kvd_row_quantize(q, row, dim, &quantized);
        struct kvd_affine a = kvd_param_decode(q->codec, quantized.param);
        for (uint32_t i = 0; i < dim; i++)
            row[i] = a.scale * levels[quantized.codes[i]] + a.min;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, d, d, 1, w->turned, d, r, d, 0,
                out + (uint64_t)begin * dim, d);
}

// The same with a transform: mean off, transformed, coded, and back.
static void through_transform(struct job *j, struct workspace *w, const float *x,
                              const struct kvd_transform *t, double *spectrum, float *out)
{
    uint32_t begin, end, dim = t->coder.dim;
    history(j, &begin, &end);
    int n = (int)(end - begin), d = (int)dim;
    float *to = out + (uint64_t)begin * dim;
    memcpy(out, x, (uint64_t)w->tokens * dim * sizeof(*out));
    for (int i = 0; i < n; i++)
        cblas_saxpy(d, -1, t->mean, 1, to + (uint64_t)i * dim, 1);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, d, d, 1, to, d, t->a, d, 0, w->turned,
                d);
    if (spectrum)
        add_spectrum(j, w->turned, (uint32_t)n, dim, spectrum);
    for (int i = 0; i < n; i++)
        kvd_tc_row(t, w->turned + (uint64_t)i * dim);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, d, d, 1, w->turned, d, t->inverse, d,
                0, to, d);
    for (int i = 0; i < n; i++)
        cblas_saxpy(d, 1, t->mean, 1, to + (uint64_t)i * dim, 1);
}

// -- attention -----------------------------------------------------------------------------------

static void logits_of(const struct job *j, struct workspace *w, const float *k, float *out)
{
    int dim = (int)j->dump->dim[KVD_DUMP_K], n = (int)w->tokens;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)w->rows_q, n, dim,
                1 / sqrtf((float)dim), w->q, dim, k, dim, 0, out, n);
}

// What row i of the queries, which is of position tokens - positions + i / group, sees: tokens
// [*begin, *end).
static void seen(const struct workspace *w, uint32_t i, uint32_t *begin, uint32_t *end)
{
    uint32_t group = w->rows_q / w->positions;
    *end = w->tokens - w->positions + i / group + 1;
    *begin = w->window && *end > w->window ? *end - w->window : 0;
}

static void softmax(const struct workspace *w, float *p)
{
    for (uint32_t i = 0; i < w->rows_q; i++) {
        uint32_t begin, end;
        seen(w, i, &begin, &end);
        float *row = p + (uint64_t)i * w->tokens, top = row[begin];
        double sum = 0;
        for (uint32_t t = begin + 1; t < end; t++)
            top = fmaxf(top, row[t]);
        for (uint32_t t = begin; t < end; t++)
            sum += (double)(row[t] = expf(row[t] - top));
        for (uint32_t t = begin; t < end; t++)
            row[t] = (float)(row[t] / sum);
        memset(row, 0, begin * sizeof(*row));
        memset(row + end, 0, (w->tokens - end) * sizeof(*row));
    }
}

static void outputs_of(const struct job *j, struct workspace *w, const float *p, const float *v,
                       float *out)
{
    int dim = (int)j->dump->dim[KVD_DUMP_V], n = (int)w->tokens;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)w->rows_q, dim, n, 1, p, n, v, dim,
                0, out, dim);
}

static void add_output_error(const struct job *j, const struct workspace *w, struct sums *s)
{
    uint64_t n = (uint64_t)w->rows_q * j->dump->dim[KVD_DUMP_V];
    for (uint64_t i = 0; i < n; i++) {
        double x = (double)w->out[i], e = (double)w->out2[i] - x;
        s->difference += e * e;
        s->norm += x * x;
    }
}

// What this kv head adds at each position to what becomes of the loss.
static void add_moved(const struct job *j, const struct workspace *w, double *moved)
{
    uint32_t group = w->rows_q / w->positions, dim = j->dump->dim[KVD_DUMP_V];
    for (uint32_t i = 0; i < w->rows_q; i++)
        for (uint64_t c = (uint64_t)i * dim; c < (uint64_t)(i + 1) * dim; c++)
            moved[i / group] += (double)w->g[c] * ((double)w->out2[c] - (double)w->out[c]);
}

// p2 holds the quantized logits, logits the recorded ones; p2 becomes probabilities.
static void add_weight_error(const struct job *j, struct workspace *w, struct sums *s)
{
    uint32_t first, begin, end, last;
    history(j, &first, &end);
    for (uint32_t i = 0; i < w->rows_q; i++) {
        seen(w, i, &begin, &last);
        begin = KVD_MAX(begin, first);
        if (begin >= end)
            continue;
        const float *logits = w->logits + (uint64_t)i * w->tokens;
        const float *quantized = w->p2 + (uint64_t)i * w->tokens;
        uint32_t strongest = begin;
        for (uint32_t t = begin; t < end; t++) {
            double e = (double)quantized[t] - (double)logits[t];
            s->logit += e * e;
            strongest = logits[t] > logits[strongest] ? t : strongest;
        }
        s->bias += (double)quantized[strongest] - (double)logits[strongest];
        s->asked++;
        s->logits += end - begin;
    }
    softmax(w, w->p2);
    for (uint64_t at = 0; at < (uint64_t)w->rows_q * w->tokens; at++)
        if (w->p[at] > 0)
            s->kl += (double)w->p[at] * log((double)w->p[at] / fmax((double)w->p2[at], 1e-30));
    s->queries += w->rows_q;
}

// -- a kv head of a context ----------------------------------------------------------------------

static void gather(const float *rows, uint32_t tokens, uint32_t heads, uint32_t head,
                   uint32_t count, uint32_t dim, float *out)
{
    for (uint32_t t = 0; t < tokens; t++)
        memcpy(out + (uint64_t)t * count * dim, rows + ((uint64_t)t * heads + head) * dim,
               (uint64_t)count * dim * sizeof(*out));
}

static void recorded(const struct job *j, struct workspace *w, uint32_t head)
{
    const struct kvd_dump *d = j->dump;
    uint32_t heads = d->heads[KVD_DUMP_K], group = d->heads[KVD_DUMP_Q] / heads;
    gather(w->rows[KVD_DUMP_Q], w->positions, d->heads[KVD_DUMP_Q], head * group, group,
           d->dim[KVD_DUMP_Q], w->q);
    gather(w->rows[KVD_DUMP_K], w->tokens, heads, head, 1, d->dim[KVD_DUMP_K], w->k);
    gather(w->rows[KVD_DUMP_V], w->tokens, heads, head, 1, d->dim[KVD_DUMP_V], w->v);
    if (d->graded)
        gather(w->rows[KVD_DUMP_G], w->positions, d->heads[KVD_DUMP_Q], head * group, group,
               d->dim[KVD_DUMP_V], w->g);
    logits_of(j, w, w->k, w->logits);
    memcpy(w->p, w->logits, (uint64_t)w->rows_q * w->tokens * sizeof(*w->p));
    softmax(w, w->p);
    outputs_of(j, w, w->p, w->v, w->out);
}

// Index of the matrix that a set has for a layer and kv head.
static uint64_t matrix(const struct kvd_rotset *s, uint32_t layer, uint32_t head)
{
    uint32_t i = 0;
    while (s->layers[i] != layer)
        i++;
    return (uint64_t)i * s->heads + (s->heads == 1 ? 0 : head);
}

// One side of a layer of a set of transforms in a codec: in tc2 and tc2.5 as the transform says, in
// any other, of a layer that is marked, as a rotation.
static void read_back_side(struct job *j, struct workspace *w, const float *x,
                           const struct kvd_transform *t, uint32_t codec, enum kvd_scale scale,
                           double *spectrum, float *out)
{
    struct kvd_quantizer q = {codec, 1, 1, scale, NULL};
    if (kvd_codec_tc(codec))
        through_transform(j, w, x, t, spectrum, out);
    else
        through_pages(j, w, x, t->coder.dim, t->a, &q, spectrum, out);
}

static void read_back_transformed(struct job *j, struct workspace *w, const struct kvd_rotset *s,
                                  struct kvd_codecs codec, uint64_t at, double *spectrum_k,
                                  double *spectrum_v)
{
    struct kvd_transform k = kvd_transform_at(s, at, false), v = kvd_transform_at(s, at, true);
    read_back_side(j, w, w->k, &k, codec.k, KVD_SCALE_UNBIASED, spectrum_k, w->k2);
    read_back_side(j, w, w->v, &v, codec.v, KVD_SCALE_LEAST_SQUARES, spectrum_v, w->v2);
}

// K and V of a kv head as case c reads them back, into k2 and v2; spectra may be NULL.
static void read_back(struct job *j, struct workspace *w, const struct kvd_eval_case *c,
                      uint64_t at, double *spectrum_k, double *spectrum_v)
{
    const struct kvd_rotset *s = c->set;
    uint32_t dim_k = s->dim_k, dim_v = s->dim_v;
    struct kvd_codecs codec = kvd_codecs_both(s->transforms ? s->transforms->codec : c->codec);
    const struct kvd_mark *m = kvd_mark_of(s, s->layers[at / s->heads]);
    if (m && kvd_mark_widens(m, codec, dim_k, dim_v) && kvd_codecs_rotated(codec))
        codec = m->codec;
    if (s->transforms) {
        read_back_transformed(j, w, s, codec, at, spectrum_k, spectrum_v);
        return;
    }
    struct kvd_quantizer qk = {codec.k, s->clip_k[at], s->gain_k[at], c->scale_k, NULL};
    struct kvd_quantizer qv = {codec.v, s->clip_v[at], s->gain_v[at], c->scale_v, NULL};
    through_pages(j, w, w->k, dim_k, s->k + at * dim_k * dim_k, &qk, spectrum_k, w->k2);
    through_pages(j, w, w->v, dim_v, s->v + at * dim_v * dim_v, &qv, spectrum_v, w->v2);
}

static void compare_cases(struct job *j, struct workspace *w, uint32_t layer, uint32_t head,
                          struct sums *out)
{
    uint32_t begin, end, dim_k = j->dump->dim[KVD_DUMP_K], dim_v = j->dump->dim[KVD_DUMP_V];
    double *k = j->spectra ? j->spectra->k : NULL, *v = j->spectra ? j->spectra->v : NULL;
    history(j, &begin, &end);
    if (k) {
        add_spectrum(j, w->k + (uint64_t)begin * dim_k, end - begin, dim_k, k);
        add_spectrum(j, w->v + (uint64_t)begin * dim_v, end - begin, dim_v, v);
    }
    for (uint32_t i = 0; i < j->n_cases; i++) {
        const struct kvd_eval_case *c = &j->cases[i];
        read_back(j, w, c, matrix(c->set, layer, head), k ? k + (1 + i) * dim_k : NULL,
                  v ? v + (1 + i) * dim_v : NULL);
        logits_of(j, w, w->k2, w->p2);
        add_weight_error(j, w, &out[i]);
        outputs_of(j, w, w->p2, w->v2, w->out2);
        add_output_error(j, w, &out[i]);
        if (j->dump->graded)
            add_moved(j, w, w->moved + (uint64_t)i * w->positions);
    }
}

// What a context adds to each case, all its heads being done; and none for the next one.
static void take_moved(const struct job *j, struct workspace *w, struct sums *s)
{
    for (uint32_t k = 0; k < j->n_cases; k++) {
        double *x = w->moved + (uint64_t)k * w->positions, squares = 0;
        for (uint32_t i = 0; i < w->positions; i++)
            squares += x[i] * x[i];
        s[k].moved += sqrt(squares);
        memset(x, 0, w->positions * sizeof(*x));
    }
}

// How many ratios, or gains, are compared.
static uint32_t n_terms(const struct job *j)
{
    return j->fit_gains ? GAINS : RATIOS;
}

// out: [K's ratios or gains, V's].
static void compare_terms(struct job *j, struct workspace *w, uint32_t layer, uint32_t head,
                          struct sums *out)
{
    const struct kvd_rotset *s = j->clips;
    uint64_t at = matrix(s, layer, head);
    uint32_t n = n_terms(j);
    for (uint32_t i = 0; i < n; i++) {
        struct kvd_quantizer qk = {KVD_CODEC_INT2, s->clip_k[at], 1, KVD_SCALE_PUBLISHED, NULL};
        struct kvd_quantizer qv = {KVD_CODEC_INT2, s->clip_v[at], 1, KVD_SCALE_PUBLISHED, NULL};
        if (j->fit_gains)
            qk.gain = qv.gain = gains[i];
        else
            qk.ratio = qv.ratio = clip_ratios[i];
        through_pages(j, w, w->k, s->dim_k, s->k + at * s->dim_k * s->dim_k, &qk, NULL, w->k2);
        logits_of(j, w, w->k2, w->p2);
        softmax(w, w->p2);
        outputs_of(j, w, w->p2, w->v, w->out2);
        add_output_error(j, w, &out[i]);
        through_pages(j, w, w->v, s->dim_v, s->v + at * s->dim_v * s->dim_v, &qv, NULL, w->v2);
        outputs_of(j, w, w->p, w->v2, w->out2);
        add_output_error(j, w, &out[n + i]);
    }
}

// -- layers --------------------------------------------------------------------------------------

static uint32_t contexts_of(const struct job *j, uint32_t layer, struct context *out, uint32_t cap)
{
    const struct kvd_dump *d = j->dump;
    uint32_t n = 0, most = j->o->max_contexts ? j->o->max_contexts : UINT32_MAX;
    for (uint32_t i = 0; i < d->n_pieces; i++) {
        const struct kvd_dump_piece *p = &d->pieces[i];
        if (d->layers[p->layer] != layer)
            continue;
        for (uint64_t t = 0; t + j->o->context <= p->tokens && n < most; t += j->o->context, n++)
            if (n < cap)
                out[n] = (struct context){p, t};
    }
    return n;
}

static int read_context(const struct job *j, struct workspace *w, const struct context *c,
                        struct kvd_error *err)
{
    uint64_t t = c->first, last = t + w->tokens - w->positions;
    if (kvd_dump_read(j->dump, c->piece, KVD_DUMP_Q, last, w->positions, w->rows[KVD_DUMP_Q],
                      err) ||
        kvd_dump_read(j->dump, c->piece, KVD_DUMP_K, t, w->tokens, w->rows[KVD_DUMP_K], err) ||
        kvd_dump_read(j->dump, c->piece, KVD_DUMP_V, t, w->tokens, w->rows[KVD_DUMP_V], err) ||
        (j->dump->graded && kvd_dump_read(j->dump, c->piece, KVD_DUMP_G, last, w->positions,
                                          w->rows[KVD_DUMP_G], err)))
        return err->code;
    return KVD_OK;
}

static void report(struct job *j)
{
    pthread_mutex_lock(&j->lock);
    j->done++;
    if (j->o->progress)
        j->o->progress(j->o->ctx, j->done, j->total);
    pthread_mutex_unlock(&j->lock);
}

static void take_figures(struct job *j, uint32_t i, const struct sums *s, uint32_t heads,
                         uint32_t contexts)
{
    for (uint32_t k = 0; k < j->n_cases; k++) {
        struct sums all = {0};
        for (uint32_t h = 0; h < heads; h++) {
            const struct sums *x = &s[h * j->n_cases + k];
            all.difference += x->difference, all.norm += x->norm;
            all.logit += x->logit, all.logits += x->logits;
            all.kl += x->kl, all.queries += x->queries;
            all.bias += x->bias, all.asked += x->asked;
            all.worst = fmax(all.worst, x->norm > 0 ? sqrt(x->difference / x->norm) : 0);
        }
        j->figures[(uint64_t)k * j->n_layers + i] = (struct kvd_eval_figures){
            .output_error = all.norm > 0 ? sqrt(all.difference / all.norm) : 0,
            .worst_head = all.worst,
            .logit_error = all.logits > 0 ? sqrt(all.logit / all.logits) : 0,
            .bias = all.asked > 0 ? all.bias / all.asked : 0,
            .kl = all.queries > 0 ? fmax(0, all.kl / all.queries) : 0, // but for rounding
            .moved = s[k].moved / contexts};
    }
}

// The ratio or gain of least error for each matrix of a layer; of equals, the first.
static void take_terms(struct job *j, uint32_t i, const struct sums *s, uint32_t heads)
{
    struct kvd_rotset *set = j->clips;
    for (uint32_t m = 0; m < set->heads; m++)
        for (uint32_t side = 0; side < 2; side++) {
            double least = INFINITY;
            uint32_t best = 0;
            for (uint32_t r = 0; r < n_terms(j); r++) {
                double difference = 0;
                for (uint32_t h = 0; h < heads; h++)
                    if (set->heads == 1 || h == m)
                        difference += s[(h * 2 + side) * n_terms(j) + r].difference;
                if (difference < least) {
                    least = difference;
                    best = r;
                }
            }
            uint64_t at = matrix(set, j->layers[i], m);
            if (j->fit_gains)
                (side ? set->gain_v : set->gain_k)[at] = gains[best];
            else
                (side ? set->clip_v : set->clip_k)[at] = clip_ratios[best];
        }
}

static int eval_layer(void *arg, void *workspace, uint32_t i, struct kvd_error *err)
{
    struct job *j = arg;
    struct workspace *w = workspace;
    uint32_t heads = j->dump->heads[KVD_DUMP_K], layer = j->layers[i];
    uint32_t n = contexts_of(j, layer, NULL, 0), each = j->clips ? 2 * n_terms(j) : j->n_cases;
    struct context *c KVD_FREE = calloc(n, sizeof(*c));
    struct sums *s KVD_FREE = calloc((uint64_t)heads * each, sizeof(*s));
    if (!c || !s)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    contexts_of(j, layer, c, n);
    for (uint32_t k = 0; k < n; k++) {
        if (read_context(j, w, &c[k], err))
            return err->code;
        w->window = c[k].piece->window;
        for (uint32_t h = 0; h < heads; h++) {
            recorded(j, w, h);
            if (j->clips)
                compare_terms(j, w, layer, h, &s[h * each]);
            else
                compare_cases(j, w, layer, h, &s[h * each]);
            report(j);
        }
        if (!j->clips)
            take_moved(j, w, s);
    }
    if (j->clips)
        take_terms(j, i, s, heads);
    else
        take_figures(j, i, s, heads, n);
    return KVD_OK;
}

static bool has_layer(const struct kvd_rotset *s, uint32_t layer)
{
    for (uint32_t i = 0; i < s->n_layers; i++)
        if (s->layers[i] == layer)
            return true;
    return false;
}

static int check_set(const struct job *j, const struct kvd_rotset *s, struct kvd_error *err)
{
    const struct kvd_dump *d = j->dump;
    if (s->dim_k != d->dim[KVD_DUMP_K] || s->dim_v != d->dim[KVD_DUMP_V])
        return kvd_fail(err, KVD_E_INVALID,
                        "the set's head_dim is %u for K and %u for V, the dump's %u and %u",
                        s->dim_k, s->dim_v, d->dim[KVD_DUMP_K], d->dim[KVD_DUMP_V]);
    if (s->heads != 1 && s->heads != d->heads[KVD_DUMP_K])
        return kvd_fail(err, KVD_E_INVALID,
                        "the set has %u rotations a layer, the dump %u kv heads", s->heads,
                        d->heads[KVD_DUMP_K]);
    return KVD_OK;
}

static bool all_have_layer(const struct job *j, uint32_t layer)
{
    bool all = !j->clips || has_layer(j->clips, layer);
    for (uint32_t i = 0; i < j->n_cases; i++)
        all &= has_layer(j->cases[i].set, layer);
    return all;
}

static int run(struct job *j, struct kvd_error *err)
{
    const struct kvd_eval_options *o = j->o;
    uint32_t window = KVD_MAX(o->recent, o->queries);
    if (o->queries == 0 || o->context > 1u << 20 ||
        (uint64_t)o->sink + window + KVD_CHUNK_TOKENS > o->context)
        return kvd_fail(
            err, KVD_E_INVALID,
            "a context of %u tokens leaves no history beside %u of sink and %u at its end",
            o->context, o->sink, window);
    for (uint32_t i = 0; i < j->dump->n_layers; i++) {
        uint32_t layer = j->dump->layers[i], contexts = contexts_of(j, layer, NULL, 0);
        if (contexts == 0 || !all_have_layer(j, layer))
            continue;
        j->layers[j->n_layers++] = (uint16_t)layer;
        j->total += (uint64_t)contexts * j->dump->heads[KVD_DUMP_K];
    }
    if (j->n_layers == 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "no layer of the set has %u tokens in one file of the dump: ask for a "
                        "shorter context (-c)",
                        o->context);
    for (uint32_t i = 0; i < j->n_cases; i++)
        if (check_set(j, j->cases[i].set, err))
            return err->code;
    if (j->clips && j->clips->transforms)
        return kvd_fail(err, KVD_E_INVALID, "a set of transforms has no clip ratios");
    if (j->clips && check_set(j, j->clips, err))
        return err->code;
    struct kvd_parallel p = {.threads = o->threads,
                             .jobs = j->n_layers,
                             .workspace_size = sizeof(struct workspace),
                             .begin = workspace_init,
                             .run = eval_layer,
                             .end = workspace_deinit,
                             .arg = j};
    return kvd_parallel_run(&p, err);
}

int kvd_eval_run(const struct kvd_dump *d, const struct kvd_eval_case *cases, uint32_t n,
                 const struct kvd_eval_options *o, struct kvd_eval_figures *figures,
                 uint16_t *layers, uint32_t *n_layers, struct kvd_eval_spectra *spectra,
                 struct kvd_error *err)
{
    struct job j = {.dump = d,
                    .spectra = spectra,
                    .o = o,
                    .cases = cases,
                    .n_cases = n,
                    .figures = figures,
                    .lock = PTHREAD_MUTEX_INITIALIZER};
    int rc = run(&j, err);
    memcpy(layers, j.layers, j.n_layers * sizeof(*layers));
    *n_layers = j.n_layers;
    for (uint32_t i = 0; spectra && rc == KVD_OK && i < (1 + n) * d->dim[KVD_DUMP_K]; i++)
        spectra->k[i] /= (double)j.total;
    for (uint32_t i = 0; spectra && rc == KVD_OK && i < (1 + n) * d->dim[KVD_DUMP_V]; i++)
        spectra->v[i] /= (double)j.total;
    return rc;
}

int kvd_eval_fit_clips(const struct kvd_dump *d, struct kvd_rotset *set,
                       const struct kvd_eval_options *o, struct kvd_error *err)
{
    for (int gain = 0; gain < 2; gain++) {
        struct job j = {
            .dump = d, .o = o, .clips = set, .fit_gains = gain, .lock = PTHREAD_MUTEX_INITIALIZER};
        if (run(&j, err))
            return err->code;
    }
    return KVD_OK;
}
