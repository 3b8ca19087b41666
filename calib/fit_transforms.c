// Transforms fitted to recorded activations: a thread takes a layer, and streams its q, k and v.
#include "calib/fit_private.h"

#include <cblas.h>
#include <math.h>
#include <pthread.h>

#include "calib/marks.h"
#include "calib/parallel.h"

enum { GAINS = 13 }; // of a deviation that are tried: GAIN_LEAST, and 0.1 more each
#define GAIN_LEAST 0.8

struct job {
    const struct kvd_dump *dump;
    const struct kvd_fit_options *o;
    struct kvd_rotset *set;
    bool greedy;
    double *units; // of the pieces of prompts that ask
    struct kvd_parallel parallel;
    pthread_mutex_t lock; // of what follows, progress and warnings
    uint64_t done, total; // bytes
};

// A thread's memory. Sums over tokens, and what becomes of them, are per kv head.
struct workspace {
    float *rows;                    // [BLOCK][heads][dim]
    double *block;                  // [BLOCK * group][dim]
    double *sums[KVD_DUMP_SIDES];   // [kv heads][dim][dim] of products
    double *means[KVD_DUMP_SIDES];  // [kv heads][dim]
    double *u, *root, *back, *work; // [dim][dim]
    double *coded;                  // [BLOCK][dim]
    double *costs;                  // [kv heads][GAINS][dim]
    double *weights;                // [kv heads][BLOCK] of keys
    double *weighed;                // [kv heads] sums of weights
    struct kvd_fit_attention *attention;
    // NULL where no prompts ask.
    struct kvd_fit_asked *asked;
    double *asked_moments; // [kv heads][dim_k][dim_k]
    double *asked_costs;   // as costs
};

static void workspace_deinit(void *workspace)
{
    struct workspace *w = workspace;
    for (int s = 0; s < KVD_DUMP_SIDES; s++) {
        free(w->sums[s]);
        free(w->means[s]);
    }
    free(w->rows);
    free(w->block);
    free(w->coded);
    free(w->costs);
    free(w->weights);
    free(w->weighed);
    kvd_fit_attention_free(&w->attention);
    kvd_fit_asked_free(&w->asked);
    free(w->asked_moments);
    free(w->asked_costs);
    free(w->u);
    free(w->root);
    free(w->back);
    free(w->work);
}

static bool workspace_init(void *arg, void *workspace)
{
    const struct kvd_dump *d = ((const struct job *)arg)->dump;
    const struct kvd_dump *asked = ((const struct job *)arg)->o->asked;
    struct workspace *w = workspace;
    uint64_t dim = KVD_MAX(d->dim[KVD_DUMP_K], d->dim[KVD_DUMP_V]), kv = d->heads[KVD_DUMP_K];
    uint64_t most = KVD_FIT_BLOCK * KVD_MAX(d->heads[KVD_DUMP_Q], d->heads[KVD_DUMP_K]) * dim;
    bool ok = (w->rows = malloc(most * sizeof(float))) != NULL;
    ok &= (w->block = malloc(most * sizeof(double))) != NULL;
    ok &= (w->coded = malloc(KVD_FIT_BLOCK * dim * sizeof(double))) != NULL;
    ok &= (w->costs = malloc(kv * GAINS * dim * sizeof(double))) != NULL;
    ok &= (w->weights = malloc(kv * KVD_FIT_BLOCK * sizeof(double))) != NULL;
    ok &= (w->weighed = malloc(kv * sizeof(double))) != NULL;
    ok &= (w->attention = kvd_fit_attention_new(d)) != NULL;
    ok &= !asked || (w->asked = kvd_fit_asked_new(asked)) != NULL;
    ok &= !asked || (w->asked_moments = malloc(kv * dim * dim * sizeof(double))) != NULL;
    ok &= !asked || (w->asked_costs = malloc(kv * GAINS * dim * sizeof(double))) != NULL;
    for (int s = 0; s < KVD_DUMP_SIDES; s++) {
        ok &= (w->sums[s] = malloc(kv * dim * dim * sizeof(double))) != NULL;
        ok &= (w->means[s] = malloc(kv * dim * sizeof(double))) != NULL;
    }
    double **squares[] = {&w->u, &w->root, &w->back, &w->work};
    for (size_t i = 0; i < KVD_LEN(squares); i++)
        ok &= (*squares[i] = malloc(dim * dim * sizeof(double))) != NULL;
    return ok;
}

static void report(struct job *j, uint64_t bytes)
{
    pthread_mutex_lock(&j->lock);
    j->done += bytes;
    if (j->o->progress)
        j->o->progress(j->o->ctx, j->done, j->total);
    pthread_mutex_unlock(&j->lock);
}

// -- sums ----------------------------------------------------------------------------------------

static void add_block(const struct kvd_dump *d, struct workspace *w, int side, uint64_t n)
{
    uint32_t kv = d->heads[KVD_DUMP_K], group = d->heads[side] / kv;
    uint64_t dim = d->dim[side];
    for (uint32_t h = 0; h < kv; h++) {
        double *mean = w->means[side] + h * dim;
        kvd_fit_gather(w->rows, n, d->heads[side], h * group, group, (uint32_t)dim, w->block);
        kvd_fit_add_products(w->block, n * group, (uint32_t)dim, w->sums[side] + h * dim * dim);
        for (uint64_t t = 0; t < n * group; t++)
            cblas_daxpy((int)dim, 1, w->block + t * dim, 1, mean, 1);
    }
}

// Second moments and means of a layer's q, k and v; K's about its mean.
static int moments(struct job *j, struct workspace *w, uint32_t layer, struct kvd_error *err)
{
    const struct kvd_dump *d = j->dump;
    uint32_t kv = d->heads[KVD_DUMP_K];
    for (int s = 0; s < KVD_DUMP_SIDES; s++) {
        uint64_t dim = d->dim[s], n = d->tokens[layer] * (d->heads[s] / kv);
        memset(w->sums[s], 0, kv * dim * dim * sizeof(double));
        memset(w->means[s], 0, kv * dim * sizeof(double));
        for (uint32_t i = 0; i < d->n_pieces; i++) {
            const struct kvd_dump_piece *p = &d->pieces[i];
            for (uint64_t t = 0; p->layer == layer && t < p->tokens; t += KVD_FIT_BLOCK) {
                uint64_t tokens = KVD_MIN((uint64_t)KVD_FIT_BLOCK, p->tokens - t);
                if (kvd_dump_read(d, p, (enum kvd_dump_side)s, t, tokens, w->rows, err))
                    return err->code;
                if (j->parallel.failed)
                    return kvd_fail(err, KVD_E_INTERNAL, "given up: another layer failed");
                add_block(d, w, s, tokens);
                report(j, tokens * d->heads[s] * dim * kvd_tensor_type_size(p->type[s]));
            }
        }
        cblas_dscal((int)(kv * dim), 1 / (double)n, w->means[s], 1);
        for (uint32_t h = 0; h < kv; h++) {
            double *c = w->sums[s] + h * dim * dim, *mean = w->means[s] + h * dim;
            if (s == KVD_DUMP_K)
                cblas_dsyr(CblasRowMajor, CblasUpper, (int)dim, -(double)n, mean, 1, c, (int)dim);
            kvd_fit_finish(c, (uint32_t)dim, 1 / (double)n);
        }
    }
    return KVD_OK;
}

// The same of queries of prompts that ask, by how much answers depend on them.
static int moments_of_asked(struct job *j, struct workspace *w, uint32_t layer,
                            struct kvd_error *err)
{
    const struct kvd_dump *asked = j->o->asked;
    uint64_t n = (uint64_t)j->set->dim_k * j->set->dim_k;
    memset(w->asked_moments, 0, j->set->heads * n * sizeof(double));
    for (uint32_t i = 0; i < asked->n_pieces; i++) {
        if (asked->pieces[i].layer != layer)
            continue;
        if (kvd_fit_asked_read(w->asked, &asked->pieces[i], j->units[i], err))
            return err->code;
        for (uint32_t h = 0; h < j->set->heads; h++)
            cblas_daxpy((int)n, 1, kvd_fit_asked_moments(w->asked, h), 1, w->asked_moments + h * n,
                        1);
    }
    return KVD_OK;
}

// -- matrices ------------------------------------------------------------------------------------

// out = u diag(values^power) u^T.
static void power_of(const double *u, const double *values, double power, uint32_t dim,
                     double *scratch, double *out)
{
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t c = 0; c < dim; c++)
            scratch[i * dim + c] = u[i * dim + c] * pow(values[c], power);
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)dim, (int)dim, (int)dim, 1, scratch,
                (int)dim, u, (int)dim, 0, out, (int)dim);
}

static void product(const double *a, enum CBLAS_TRANSPOSE of_a, const double *b, uint32_t dim,
                    double *out)
{
    cblas_dgemm(CblasRowMajor, of_a, CblasNoTrans, (int)dim, (int)dim, (int)dim, 1, a, (int)dim, b,
                (int)dim, 0, out, (int)dim);
}

static void raise(double *values, uint32_t dim, double part)
{
    double largest = 0;
    for (uint32_t i = 0; i < dim; i++)
        largest = fmax(largest, values[i]);
    for (uint32_t i = 0; i < dim; i++)
        values[i] = fmax(values[i], part * largest);
}

// Eigenvectors of c, with an error where the activations say too little.
static int basis(struct job *j, const double *c, uint32_t dim, const char *where, double *values,
                 double *u, struct kvd_error *err)
{
    char text[160];
    int rank = kvd_eigenbasis(c, dim, values, u, err);
    if (rank < 0)
        return err->code;
    snprintf(text, sizeof(text), "%s: the activations span %d of %u dimensions", where, rank, dim);
    if ((uint32_t)rank < dim / 2)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: record more, and more varied, tokens (are they constant?)", text);
    if ((uint32_t)rank < dim && j->o->warn) {
        pthread_mutex_lock(&j->lock);
        j->o->warn(j->o->ctx, text);
        pthread_mutex_unlock(&j->lock);
    }
    return KVD_OK;
}

static void round_to(const double *from, uint64_t n, float *to)
{
    for (uint64_t i = 0; i < n; i++)
        to[i] = (float)from[i];
}

static void quarters(uint32_t codec, uint32_t tiles, float *bits)
{
    static const float of[2][4] = {{4, 2, 1, 1}, {4, 3, 2, 1}};
    for (uint32_t i = 0; i < tiles; i++)
        bits[i] = of[codec == KVD_CODEC_TC2_5][i * 4 / tiles];
}

static void greedy_bits(uint32_t codec, uint32_t dim, const double *lambda, float *bits)
{
    static const double distortion[KVD_TC_MAX_BITS + 1] = {1, .363, .1175, .0345, .0095};
    uint32_t tiles = dim / KVD_TC_TILE, given[KVD_MAX_HEAD_DIM / KVD_TC_TILE] = {0};
    for (uint32_t n = kvd_tc_stream_bits(codec, dim); n; n--) {
        uint32_t best = tiles;
        double most = -1;
        for (uint32_t i = 0; i < tiles; i++) {
            double variance = 0;
            for (uint32_t c = 0; c < KVD_TC_TILE; c++)
                variance += lambda[i * KVD_TC_TILE + c];
            double drop = given[i] == KVD_TC_MAX_BITS
                              ? -1
                              : variance * (distortion[given[i]] - distortion[given[i] + 1]);
            if (drop > most) {
                most = drop;
                best = i;
            }
        }
        given[best]++;
    }
    for (uint32_t i = 0; i < tiles; i++)
        bits[i] = (float)given[i];
}

// Bits of K's tiles, which lambda, descending, says the channels' variances of.
static void choose_bits(const struct job *j, uint32_t codec, const double *lambda, float *bits)
{
    uint32_t tiles = j->set->dim_k / KVD_TC_TILE;
    if (j->greedy || tiles % 4)
        greedy_bits(codec, j->set->dim_k, lambda, bits);
    else
        quarters(codec, tiles, bits);
}

static int transform_keys(struct job *j, struct workspace *w, uint32_t head, uint64_t at,
                          const char *where, struct kvd_error *err)
{
    struct kvd_transforms *t = j->set->transforms;
    uint32_t dim = j->set->dim_k;
    uint64_t n = (uint64_t)dim * dim;
    double *weight = w->sums[KVD_DUMP_Q] + head * n, *keys = w->sums[KVD_DUMP_K] + head * n;
    double values[KVD_MAX_HEAD_DIM], lambda[KVD_MAX_HEAD_DIM], trace = kvd_fit_trace(weight, dim);
    const double *asked = w->asked ? w->asked_moments + head * n : NULL;
    char text[96];
    if (!(trace > 0))
        return kvd_fail(err, KVD_E_INVALID, "%s: q is all zeros: nothing weighs k", where);
    cblas_dscal((int)n, dim / trace, weight, 1);
    if (asked && kvd_fit_trace(asked, dim) > 0) {
        cblas_dscal((int)n, 0.5, weight, 1);
        cblas_daxpy((int)n, 0.5 * dim / kvd_fit_trace(asked, dim), asked, 1, weight, 1);
    }
    snprintf(text, sizeof(text), "%s, q", where);
    if (basis(j, weight, dim, text, values, w->u, err))
        return err->code;
    raise(values, dim, 1e-6);
    power_of(w->u, values, 0.5, dim, w->work, w->root);
    power_of(w->u, values, -0.5, dim, w->work, w->back);
    product(w->root, CblasNoTrans, keys, dim, w->work);
    product(w->work, CblasNoTrans, w->root, dim, keys);
    kvd_fit_finish(keys, dim, 1); // symmetric, but for rounding
    snprintf(text, sizeof(text), "%s, K", where);
    if (basis(j, keys, dim, text, values, w->u, err))
        return err->code;
    raise(values, dim, 1e-8);
    for (uint32_t c = 0; c < dim; c++) { // descending
        lambda[c] = values[dim - 1 - c];
        t->k_sigma[at * dim + c] = (float)sqrt(lambda[c]);
        for (uint32_t i = 0; i < dim; i++)
            w->work[i * dim + c] = w->u[i * dim + dim - 1 - c];
    }
    product(w->root, CblasNoTrans, w->work, dim, w->u);
    round_to(w->u, n, t->k + at * n);
    product(w->work, CblasTrans, w->back, dim, w->u);
    round_to(w->u, n, t->k_inverse + at * n);
    round_to(w->means[KVD_DUMP_K] + head * dim, dim, t->k_mean + at * dim);
    choose_bits(j, kvd_layer_codec(j->set, at / j->set->heads), lambda,
                t->k_bits + at * (dim / KVD_TC_TILE));
    return KVD_OK;
}

// An orthogonal matrix, and its inverse.
static void turn_to(const double *from, uint32_t dim, float *to, float *inverse)
{
    round_to(from, (uint64_t)dim * dim, to);
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t c = 0; c < dim; c++)
            inverse[(uint64_t)i * dim + c] = to[(uint64_t)c * dim + i];
}

static int transform_values(struct job *j, struct workspace *w, uint32_t head, uint64_t at,
                            const char *where, struct kvd_error *err)
{
    struct kvd_transforms *t = j->set->transforms;
    uint32_t dim = j->set->dim_v;
    uint64_t n = (uint64_t)dim * dim;
    double values[KVD_MAX_HEAD_DIM];
    char text[96];
    snprintf(text, sizeof(text), "%s, V", where);
    if (basis(j, w->sums[KVD_DUMP_V] + head * n, dim, text, values, w->u, err))
        return err->code;
    kvd_compose(w->u, dim, KVD_COMPOSE_TOP_H, w->work);
    turn_to(w->work, dim, t->v + at * n, t->v_inverse + at * n);
    if (!kvd_layer_rotated(j->set, at / j->set->heads))
        round_to(w->means[KVD_DUMP_V] + head * dim, dim, t->v_mean + at * dim);
    return KVD_OK;
}

// Of a layer whose mark wants rotations: ktk's top_h, as `fit` gives a set of rotations.
static int rotate_keys(struct job *j, struct workspace *w, uint32_t head, uint64_t at,
                       const char *where, struct kvd_error *err)
{
    struct kvd_transforms *t = j->set->transforms;
    uint32_t dim = j->set->dim_k, tiles = dim / KVD_TC_TILE;
    uint64_t n = (uint64_t)dim * dim;
    double *keys = w->sums[KVD_DUMP_K] + head * n, *mean = w->means[KVD_DUMP_K] + head * dim;
    double values[KVD_MAX_HEAD_DIM];
    char text[96];
    cblas_dger(CblasRowMajor, (int)dim, (int)dim, 1, mean, 1, mean, 1, keys, (int)dim);
    snprintf(text, sizeof(text), "%s, K", where);
    if (basis(j, keys, dim, text, values, w->u, err))
        return err->code;
    kvd_compose(w->u, dim, KVD_COMPOSE_TOP_H, w->work);
    turn_to(w->work, dim, t->k + at * n, t->k_inverse + at * n);
    struct kvd_tc_coder even = kvd_tc_coder_of(t->codec, dim, false, NULL, NULL);
    for (uint32_t i = 0; i < dim; i++)
        t->k_sigma[at * dim + i] = 1;
    for (uint32_t i = 0; i < tiles; i++)
        t->k_bits[at * tiles + i] = even.bits[i];
    return KVD_OK;
}

// -- deviations ----------------------------------------------------------------------------------

static double gain_of(int g)
{
    return GAIN_LEAST + 0.1 * g;
}

// Keys as the codec has them, (k - mean) A / sigma, each divided by its scale, the root mean square
// of its coded channels; weights are multiplied by the squares of these.
static void code_rows(const struct kvd_transform *t, double *rows, uint64_t n, struct workspace *w,
                      double *weights)
{
    uint32_t dim = t->coder.dim, coded = 0;
    for (uint64_t i = 0; i < (uint64_t)dim * dim; i++)
        w->u[i] = (double)t->a[i];
    for (uint64_t r = 0; r < n; r++)
        for (uint32_t c = 0; c < dim; c++)
            rows[r * dim + c] -= (double)t->mean[c];
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)n, (int)dim, (int)dim, 1, rows,
                (int)dim, w->u, (int)dim, 0, w->coded, (int)dim);
    for (uint32_t c = 0; c < dim; c++)
        coded += t->coder.bits[c / KVD_TC_TILE] > 0;
    for (uint64_t r = 0; r < n; r++) {
        double *y = w->coded + r * dim, squares = 0;
        for (uint32_t c = 0; c < dim; c++) {
            y[c] /= (double)t->coder.sigma[c];
            squares += t->coder.bits[c / KVD_TC_TILE] > 0 ? y[c] * y[c] : 0;
        }
        weights[r] *= squares / coded;
        if (squares > 0)
            cblas_dscal((int)dim, 1 / sqrt(squares / coded), y, 1);
    }
}

// Adds what coding these keys costs with each gain of each channel's deviation: weighted squares
// of errors.
static void add_costs(const struct kvd_transform *t, uint64_t n, const struct workspace *w,
                      const double *weights, double *costs)
{
    uint32_t dim = t->coder.dim;
    double steps[KVD_MAX_HEAD_DIM], middles[KVD_MAX_HEAD_DIM]; // of the codes
    for (int g = 0; g < GAINS; g++) {
        double *to = costs + (uint64_t)g * dim;
        for (uint32_t c = 0; c < dim; c++) {
            uint32_t bits = t->coder.bits[c / KVD_TC_TILE];
            middles[c] = ((1u << bits) - 1) / 2.0;
            steps[c] =
                bits ? gain_of(g) * kvd_tc_step(&t->coder, c) / (double)t->coder.sigma[c] : 1;
        }
        for (uint64_t r = 0; r < n; r++)
            for (uint32_t c = 0; c < dim; c++) {
                double y = w->coded[r * dim + c], code = ceil(y / steps[c] + middles[c] - 0.5);
                code = fmin(fmax(code, 0), 2 * middles[c]);
                double e = y - steps[c] * (code - middles[c]);
                to[c] += e * e * weights[r];
            }
    }
}

// What a recording's keys past its sink cost, added to w->costs.
static int add_recording(struct job *j, struct workspace *w, uint32_t i,
                         const struct kvd_dump_piece *p, struct kvd_error *err)
{
    uint32_t heads = j->set->heads, dim = j->set->dim_k;
    if (kvd_fit_attention_begin(w->attention, p, err))
        return err->code;
    for (uint64_t t = KVD_FIT_SINK; t < p->tokens; t += KVD_FIT_BLOCK) {
        uint64_t n = KVD_MIN((uint64_t)KVD_FIT_BLOCK, p->tokens - t);
        if (kvd_dump_read(j->dump, p, KVD_DUMP_K, t, n, w->rows, err))
            return err->code;
        if (j->parallel.failed)
            return kvd_fail(err, KVD_E_INTERNAL, "given up: another layer failed");
        kvd_fit_attention_weigh(w->attention, w->rows, t, n, w->weights);
        for (uint32_t h = 0; h < heads; h++) {
            struct kvd_transform of = kvd_transform_at(j->set, (uint64_t)i * heads + h, false);
            double *weights = w->weights + (uint64_t)h * KVD_FIT_BLOCK;
            kvd_fit_gather(w->rows, n, heads, h, 1, dim, w->block);
            w->weighed[h] += cblas_dasum((int)n, weights, 1);
            code_rows(&of, w->block, n, w, weights);
            add_costs(&of, n, w, weights, w->costs + (uint64_t)h * GAINS * dim);
        }
    }
    return KVD_OK;
}

// The same of a prompt that asks, added to w->asked_costs.
static int add_prompt(struct job *j, struct workspace *w, uint32_t i, uint32_t piece,
                      struct kvd_error *err)
{
    const struct kvd_dump_piece *p = &j->o->asked->pieces[piece];
    uint32_t heads = j->set->heads, dim = j->set->dim_k;
    if (kvd_fit_asked_read(w->asked, p, j->units[piece], err))
        return err->code;
    for (uint32_t h = 0; h < heads; h++) {
        struct kvd_transform of = kvd_transform_at(j->set, (uint64_t)i * heads + h, false);
        const double *by, *keys = kvd_fit_asked_keys(w->asked, p, h, &by);
        for (uint64_t t = KVD_FIT_SINK; t < p->tokens; t += KVD_FIT_BLOCK) {
            uint64_t n = KVD_MIN((uint64_t)KVD_FIT_BLOCK, p->tokens - t);
            memcpy(w->block, keys + t * dim, n * dim * sizeof(double));
            memcpy(w->weights, by + t, n * sizeof(double));
            w->weighed[h] += cblas_dasum((int)n, by + t, 1);
            code_rows(&of, w->block, n, w, w->weights);
            add_costs(&of, n, w, w->weights, w->asked_costs + (uint64_t)h * GAINS * dim);
        }
    }
    return KVD_OK;
}

// Half of the costs are those of prompts that ask, and half those of recordings, by the sums of
// their weights. Heads that no answer depends on are left to recordings.
static int add_asked(struct job *j, struct workspace *w, uint32_t i, uint32_t layer,
                     struct kvd_error *err)
{
    const struct kvd_dump *asked = j->o->asked;
    uint32_t heads = j->set->heads;
    int n = (int)(GAINS * j->set->dim_k);
    for (uint32_t h = 0; h < heads; h++) {
        if (w->weighed[h] > 0)
            cblas_dscal(n, 1 / w->weighed[h], w->costs + (uint64_t)h * (uint64_t)n, 1);
        w->weighed[h] = 0;
    }
    memset(w->asked_costs, 0, (uint64_t)heads * (uint64_t)n * sizeof(double));
    for (uint32_t p = 0; p < asked->n_pieces; p++)
        if (asked->pieces[p].layer == layer && add_prompt(j, w, i, p, err))
            return err->code;
    for (uint32_t h = 0; h < heads; h++)
        if (w->weighed[h] > 0)
            cblas_daxpy(n, 1 / w->weighed[h], w->asked_costs + (uint64_t)h * (uint64_t)n, 1,
                        w->costs + (uint64_t)h * (uint64_t)n, 1);
    return KVD_OK;
}

// Levels are even, and made for channels that are normal. Keys are not: those of delimiters, which
// every query sees, lie close together and far out, beyond the last level. A channel's sigma is the
// multiple of its deviation that costs least on the keys that the recorded queries look at.
static int fit_deviations(struct job *j, struct workspace *w, uint32_t i, uint32_t layer,
                          struct kvd_error *err)
{
    const struct kvd_dump *d = j->dump;
    uint32_t heads = j->set->heads, dim = j->set->dim_k;
    memset(w->costs, 0, (uint64_t)heads * GAINS * dim * sizeof(double));
    memset(w->weighed, 0, heads * sizeof(double));
    for (uint32_t p = 0; p < d->n_pieces; p++)
        if (d->pieces[p].layer == layer && add_recording(j, w, i, &d->pieces[p], err))
            return err->code;
    if (w->asked && add_asked(j, w, i, kvd_fit_dump_layer(j->o->asked, j->set->layers[i]), err))
        return err->code;
    for (uint32_t h = 0; h < heads; h++)
        for (uint32_t c = 0; c < dim; c++) {
            const double *of = w->costs + (uint64_t)h * GAINS * dim + c;
            int best = 2; // a gain of 1
            for (int g = 0; g < GAINS; g++)
                best = of[(uint64_t)g * dim] < of[(uint64_t)best * dim] ? g : best;
            float *sigma = j->set->transforms->k_sigma + ((uint64_t)i * heads + h) * dim + c;
            *sigma = (float)((double)*sigma * gain_of(best));
        }
    return KVD_OK;
}

static int fit_layer(void *arg, void *workspace, uint32_t i, struct kvd_error *err)
{
    struct job *j = arg;
    struct workspace *w = workspace;
    uint32_t layer = j->set->layers[i];
    uint32_t of_dump = kvd_fit_dump_layer(j->dump, layer);
    bool rotated = kvd_layer_rotated(j->set, i);
    if (moments(j, w, of_dump, err) ||
        (w->asked && moments_of_asked(j, w, kvd_fit_dump_layer(j->o->asked, layer), err)))
        return err->code;
    for (uint32_t h = 0; h < j->set->heads; h++) {
        uint64_t at = (uint64_t)i * j->set->heads + h;
        char where[64];
        snprintf(where, sizeof(where), "layer %u, kv head %u", layer, h);
        if ((rotated ? rotate_keys : transform_keys)(j, w, h, at, where, err) ||
            transform_values(j, w, h, at, where, err))
            return err->code;
    }
    return rotated ? KVD_OK : fit_deviations(j, w, i, of_dump, err);
}

// -- the set -------------------------------------------------------------------------------------

static struct kvd_rotset *new_set(const struct kvd_dump *d, uint32_t codec, bool greedy,
                                  const struct kvd_fit_options *o, struct kvd_error *err)
{
    const char *by_quarters = codec == KVD_CODEC_TC2_5 ? "4-3-2-1" : "4-2-1-1";
    struct kvd_rotset *set KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*set));
    if (!set) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory for a set of transforms");
        return NULL;
    }
    set->n_layers = o->layers ? o->n_layers : d->n_layers;
    memcpy(set->layers, o->layers ? o->layers : d->layers, set->n_layers * sizeof(*set->layers));
    set->heads = d->heads[KVD_DUMP_K];
    set->dim_k = d->dim[KVD_DUMP_K];
    set->dim_v = d->dim[KVD_DUMP_V];
    if (kvd_transforms_alloc(set, codec, err) ||
        (o->marks && (kvd_marks_parse(set, o->marks, err) || kvd_marks_check_layers(set, err))))
        return NULL;
    bool quartered = !greedy && set->dim_k / KVD_TC_TILE % 4 == 0;
    snprintf(set->model, sizeof(set->model), "%s", d->model);
    snprintf(set->objective, sizeof(set->objective), "%s: K qqt%s and ktk, bits %s, V vtv_top_h",
             kvd_codec_name(codec), o->asked ? ", asked" : "", quartered ? by_quarters : "greedy");
    kvd_fit_provenance(d, set->provenance, sizeof(set->provenance));
    return KVD_TAKE(set);
}

static uint64_t layer_bytes(const struct kvd_dump *d, uint32_t layer)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < d->n_pieces; i++) {
        const struct kvd_dump_piece *p = &d->pieces[i];
        for (int s = 0; p->layer == layer && s < KVD_DUMP_SIDES; s++)
            bytes += p->tokens * d->heads[s] * d->dim[s] * kvd_tensor_type_size(p->type[s]);
    }
    return bytes;
}

// A user who records short texts should know what they cannot tell.
static void warn_of_short(const struct kvd_dump *d, const struct kvd_fit_options *o)
{
    char text[160];
    uint64_t longest = 0, least = KVD_FIT_SINK + KVD_FIT_RECENT;
    for (uint32_t i = 0; i < d->n_pieces; i++)
        longest = KVD_MAX(longest, d->pieces[i].tokens);
    snprintf(text, sizeof(text),
             "no file has more than %llu tokens, so what queries look at is not known: record "
             "contexts of more than %llu",
             (unsigned long long)longest, (unsigned long long)least);
    if (longest <= least && o->warn)
        o->warn(o->ctx, text);
}

struct kvd_rotset *kvd_fit_transforms(const struct kvd_dump *d, uint32_t codec, bool greedy,
                                      const struct kvd_fit_options *o, struct kvd_error *err)
{
    if (kvd_fit_check_dump(d, o, err))
        return NULL;
    if (o->asked && kvd_fit_asked_check(o->asked, d, o, err))
        return NULL;
    warn_of_short(d, o);
    struct kvd_rotset *set KVD_AUTO(kvd_rotset_free) = new_set(d, codec, greedy, o, err);
    if (!set)
        return NULL;
    struct job j = {
        .dump = d, .o = o, .set = set, .greedy = greedy, .lock = PTHREAD_MUTEX_INITIALIZER};
    double *units KVD_FREE = o->asked ? calloc(o->asked->n_pieces, sizeof(*units)) : NULL;
    j.units = units;
    if (o->asked && !units) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    if (o->asked && kvd_fit_asked_units(o->asked, o->threads, units, err))
        return NULL;
    for (uint32_t i = 0; i < set->n_layers; i++)
        j.total += layer_bytes(d, kvd_fit_dump_layer(d, set->layers[i]));
    j.parallel = (struct kvd_parallel){.threads = o->threads,
                                       .jobs = set->n_layers,
                                       .workspace_size = sizeof(struct workspace),
                                       .begin = workspace_init,
                                       .run = fit_layer,
                                       .end = workspace_deinit,
                                       .arg = &j};
    if (kvd_parallel_run(&j.parallel, err) || kvd_rotset_check(set, NULL, err))
        return NULL;
    return KVD_TAKE(set);
}
