// What answers depend on, by prompts whose recordings have gradients of the answers' loss by
// attention's outputs: fit.h has the formulas. A prompt is short enough for memory.
#include "calib/fit_private.h"

#include <cblas.h>
#include <math.h>

#include "calib/parallel.h"

enum { POSITIONS = 16 }; // whose probabilities are in memory at a time

struct kvd_fit_asked {
    const struct kvd_dump *dump;
    uint32_t heads, group, dim_k, dim_v;
    uint64_t longest;      // tokens of a recording
    float *rows;           // of one tensor, [tokens][its heads][dim]
    double *q, *g;         // [kv heads][KVD_FIT_ASKING * group][dim]
    double *keys, *values; // [kv heads][longest][dim]
    double *p, *moves;     // [POSITIONS * group][longest]
    double *moments;       // [kv heads][dim_k][dim_k]
    double *weights;       // [kv heads][longest]
};

static bool has_layer(const struct kvd_dump *d, uint16_t layer)
{
    for (uint32_t i = 0; i < d->n_layers; i++)
        if (d->layers[i] == layer)
            return true;
    return false;
}

int kvd_fit_asked_check(const struct kvd_dump *asked, const struct kvd_dump *d,
                        const struct kvd_fit_options *o, struct kvd_error *err)
{
    const uint16_t *layers = o->layers ? o->layers : d->layers;
    uint32_t n_layers = o->layers ? o->n_layers : d->n_layers;
    if (!asked->graded)
        return kvd_fail(err, KVD_E_INVALID,
                        "the prompts that ask have no gradients of the answers' loss: record them "
                        "with python3 -m kvd.record --asked");
    for (int s = 0; s < KVD_DUMP_SIDES; s++)
        if (asked->heads[s] != d->heads[s] || asked->dim[s] != d->dim[s])
            return kvd_fail(err, KVD_E_INVALID,
                            "the prompts that ask have %u heads of %u where the activations have "
                            "%u of %u: they are of another model",
                            asked->heads[s], asked->dim[s], d->heads[s], d->dim[s]);
    for (uint32_t i = 0; i < n_layers; i++)
        if (!has_layer(asked, layers[i]))
            return kvd_fail(err, KVD_E_INVALID,
                            "layer %u is not among those of the prompts that ask", layers[i]);
    for (uint32_t i = 0; i < asked->n_pieces; i++)
        if (asked->pieces[i].tokens > KVD_FIT_ASKED_TOKENS)
            return kvd_fail(err, KVD_E_INVALID,
                            "a prompt that asks has %llu tokens, and at most %u are possible",
                            (unsigned long long)asked->pieces[i].tokens, KVD_FIT_ASKED_TOKENS);
    return KVD_OK;
}

struct kvd_fit_asked *kvd_fit_asked_new(const struct kvd_dump *asked)
{
    struct kvd_fit_asked *a KVD_AUTO(kvd_fit_asked_free) = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    a->dump = asked;
    a->heads = asked->heads[KVD_DUMP_K];
    a->group = asked->heads[KVD_DUMP_Q] / a->heads;
    a->dim_k = asked->dim[KVD_DUMP_K];
    a->dim_v = asked->dim[KVD_DUMP_V];
    for (uint32_t i = 0; i < asked->n_pieces; i++)
        a->longest = KVD_MAX(a->longest, asked->pieces[i].tokens);
    uint64_t heads = a->heads, queries = KVD_FIT_ASKING * heads * a->group,
             all = heads * a->longest;
    uint64_t dim = KVD_MAX(a->dim_k, a->dim_v), some = (uint64_t)POSITIONS * a->group * a->longest;
    bool ok = (a->rows = malloc(KVD_MAX(all, queries) * dim * sizeof(float))) != NULL;
    ok &= (a->q = malloc(queries * a->dim_k * sizeof(double))) != NULL;
    ok &= (a->g = malloc(queries * a->dim_v * sizeof(double))) != NULL;
    ok &= (a->keys = malloc(all * a->dim_k * sizeof(double))) != NULL;
    ok &= (a->values = malloc(all * a->dim_v * sizeof(double))) != NULL;
    ok &= (a->p = malloc(some * sizeof(double))) != NULL;
    ok &= (a->moves = malloc(some * sizeof(double))) != NULL;
    ok &= (a->moments = malloc(heads * a->dim_k * a->dim_k * sizeof(double))) != NULL;
    ok &= (a->weights = malloc(all * sizeof(double))) != NULL;
    return ok ? KVD_TAKE(a) : NULL;
}

void kvd_fit_asked_free(struct kvd_fit_asked **asked)
{
    struct kvd_fit_asked *a = *asked;
    if (!a)
        return;
    double *all[] = {a->q, a->g, a->keys, a->values, a->p, a->moves, a->moments, a->weights};
    for (size_t i = 0; i < KVD_LEN(all); i++)
        free(all[i]);
    free(a->rows);
    free(a);
    *asked = NULL;
}

// Tokens [first, first + n) of one tensor, as [kv heads][n * heads of it per kv head][dim].
static int read_side(struct kvd_fit_asked *a, const struct kvd_dump_piece *p, int side,
                     uint64_t first, uint64_t n, double *out, struct kvd_error *err)
{
    const struct kvd_dump *d = a->dump;
    uint32_t heads = d->heads[side], dim = d->dim[side], count = heads / a->heads;
    if (kvd_dump_read(d, p, (enum kvd_dump_side)side, first, n, a->rows, err))
        return err->code;
    for (uint32_t h = 0; h < a->heads; h++)
        kvd_fit_gather(a->rows, n, heads, h * count, count, dim, out + h * n * count * dim);
    return KVD_OK;
}

// Of logits of tokens [begin, end) and what their values add to the loss, the squares of what
// each logit does, added to weights[begin, recent) as far as tokens are compressed. Their sum.
static double add_moves(double *p, const double *moves, uint64_t begin, uint64_t end,
                        double *weights)
{
    uint64_t from = KVD_MAX(begin, (uint64_t)KVD_FIT_SINK);
    uint64_t to = end > KVD_FIT_RECENT ? end - KVD_FIT_RECENT : 0;
    double top = -INFINITY, sum = 0, mean = 0, squares = 0;
    for (uint64_t t = begin; t < end; t++)
        top = fmax(top, p[t]);
    for (uint64_t t = begin; t < end; t++)
        sum += p[t] = exp(p[t] - top);
    for (uint64_t t = begin; t < end; t++)
        mean += (p[t] /= sum) * moves[t];
    for (uint64_t t = from; t < to; t++) {
        double x = p[t] * (moves[t] - mean);
        weights[t] += x * x;
        squares += x * x;
    }
    return squares;
}

// A kv head's positions [at, at + n) of those that ask, the first of which is the piece's `first`.
static void add_positions(struct kvd_fit_asked *a, const struct kvd_dump_piece *piece, uint32_t h,
                          uint64_t first, uint64_t asking, uint64_t at, uint64_t n)
{
    uint64_t tokens = piece->tokens, rows = n * a->group, of = (h * asking + at) * a->group;
    const double *q = a->q + of * a->dim_k, *g = a->g + of * a->dim_v;
    double *moments = a->moments + (uint64_t)h * a->dim_k * a->dim_k;
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)tokens, (int)a->dim_k,
                1 / sqrt(a->dim_k), q, (int)a->dim_k, a->keys + h * tokens * a->dim_k,
                (int)a->dim_k, 0, a->p, (int)tokens);
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)tokens, (int)a->dim_v, 1,
                g, (int)a->dim_v, a->values + h * tokens * a->dim_v, (int)a->dim_v, 0, a->moves,
                (int)tokens);
    for (uint64_t r = 0; r < rows; r++) {
        uint64_t end = first + at + r / a->group + 1, window = piece->window;
        uint64_t begin = window && end > window ? end - window : 0;
        double squares = add_moves(a->p + r * tokens, a->moves + r * tokens, begin, end,
                                   a->weights + h * tokens);
        cblas_dsyr(CblasRowMajor, CblasUpper, (int)a->dim_k, squares, q + r * a->dim_k, 1, moments,
                   (int)a->dim_k);
    }
}

int kvd_fit_asked_read(struct kvd_fit_asked *a, const struct kvd_dump_piece *p, double unit,
                       struct kvd_error *err)
{
    uint64_t asking = KVD_MIN((uint64_t)KVD_FIT_ASKING, p->tokens), first = p->tokens - asking;
    if (read_side(a, p, KVD_DUMP_Q, first, asking, a->q, err) ||
        read_side(a, p, KVD_DUMP_G, first, asking, a->g, err) ||
        read_side(a, p, KVD_DUMP_K, 0, p->tokens, a->keys, err) ||
        read_side(a, p, KVD_DUMP_V, 0, p->tokens, a->values, err))
        return err->code;
    memset(a->moments, 0, (uint64_t)a->heads * a->dim_k * a->dim_k * sizeof(double));
    memset(a->weights, 0, a->heads * p->tokens * sizeof(double));
    for (uint32_t h = 0; h < a->heads; h++)
        for (uint64_t at = 0; at < asking; at += POSITIONS)
            add_positions(a, p, h, first, asking, at, KVD_MIN((uint64_t)POSITIONS, asking - at));
    for (uint32_t h = 0; h < a->heads; h++)
        kvd_fit_finish(a->moments + (uint64_t)h * a->dim_k * a->dim_k, a->dim_k, unit);
    cblas_dscal((int)(a->heads * p->tokens), unit, a->weights, 1);
    return KVD_OK;
}

const double *kvd_fit_asked_moments(const struct kvd_fit_asked *a, uint32_t head)
{
    return a->moments + (uint64_t)head * a->dim_k * a->dim_k;
}

const double *kvd_fit_asked_keys(const struct kvd_fit_asked *a, const struct kvd_dump_piece *p,
                                 uint32_t head, const double **weights)
{
    *weights = a->weights + head * p->tokens;
    return a->keys + head * p->tokens * a->dim_k;
}

// -- of all prompts alike ------------------------------------------------------------------------

struct traces {
    const struct kvd_dump *dump;
    double *of; // [pieces]
};

static bool begin_traces(void *arg, void *workspace)
{
    struct kvd_fit_asked **a = workspace;
    return (*a = kvd_fit_asked_new(((struct traces *)arg)->dump)) != NULL;
}

static void end_traces(void *workspace)
{
    kvd_fit_asked_free(workspace);
}

static int layer_traces(void *arg, void *workspace, uint32_t layer, struct kvd_error *err)
{
    struct traces *t = arg;
    struct kvd_fit_asked **a = workspace;
    for (uint32_t i = 0; i < t->dump->n_pieces; i++) {
        const struct kvd_dump_piece *p = &t->dump->pieces[i];
        if (p->layer != layer)
            continue;
        if (kvd_fit_asked_read(*a, p, 1, err))
            return err->code;
        for (uint32_t h = 0; h < (*a)->heads; h++)
            t->of[i] += kvd_fit_trace(kvd_fit_asked_moments(*a, h), (*a)->dim_k);
    }
    return KVD_OK;
}

int kvd_fit_asked_units(const struct kvd_dump *asked, uint32_t threads, double *units,
                        struct kvd_error *err)
{
    double *traces KVD_FREE = calloc(asked->n_pieces, sizeof(*traces));
    if (!traces)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct traces t = {asked, traces};
    struct kvd_parallel parallel = {.threads = threads,
                                    .jobs = asked->n_layers,
                                    .workspace_size = sizeof(struct kvd_fit_asked *),
                                    .begin = begin_traces,
                                    .run = layer_traces,
                                    .end = end_traces,
                                    .arg = &t};
    if (kvd_parallel_run(&parallel, err))
        return err->code;
    for (uint32_t i = 0; i < asked->n_pieces; i++) {
        uint32_t prompt = asked->files[asked->pieces[i].file[KVD_DUMP_Q]].group;
        double sum = 0;
        for (uint32_t k = 0; k < asked->n_pieces; k++)
            if (asked->files[asked->pieces[k].file[KVD_DUMP_Q]].group == prompt)
                sum += traces[k];
        units[i] = sum > 0 ? 1 / sum : 0;
    }
    return KVD_OK;
}
