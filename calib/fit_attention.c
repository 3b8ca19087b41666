// How much the recorded queries look at each recorded key: softmax over all that a query sees, in
// two passes over the keys, so that memory does not grow with a recording's length. Only some
// queries of a recording are asked, evenly spread.
#include "calib/fit_private.h"

#include <cblas.h>
#include <math.h>

enum { QUERIES = 128 }; // of a recording, at most
// What a key weighs that nobody looks at: recordings that are too short for a history weigh all
// keys alike.
#define LEAST 1e-9

struct kvd_fit_attention {
    const struct kvd_dump *dump;
    const struct kvd_dump_piece *piece;
    uint32_t heads, group, dim, n; // queries of the recording that are asked
    uint64_t at[QUERIES];          // their positions
    double *q;         // [heads][n * group][dim], a position's q heads one after another
    double *top, *sum; // [heads][n * group]: the largest logit, and the sum of exp(logit - top)
    double *logits;    // [n * group][KVD_FIT_BLOCK]
    double *keys;      // [KVD_FIT_BLOCK][dim]
    float *rows;       // [KVD_FIT_BLOCK][heads][dim], or [q heads][dim]
};

struct kvd_fit_attention *kvd_fit_attention_new(const struct kvd_dump *d)
{
    struct kvd_fit_attention *a KVD_AUTO(kvd_fit_attention_free) = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    a->dump = d;
    a->heads = d->heads[KVD_DUMP_K];
    a->group = d->heads[KVD_DUMP_Q] / a->heads;
    a->dim = d->dim[KVD_DUMP_K];
    uint64_t asked = (uint64_t)QUERIES * a->group;
    uint64_t rows = KVD_MAX((uint64_t)KVD_FIT_BLOCK * a->heads, (uint64_t)d->heads[KVD_DUMP_Q]);
    bool ok = (a->q = malloc(a->heads * asked * a->dim * sizeof(double))) != NULL;
    ok &= (a->top = malloc(a->heads * asked * sizeof(double))) != NULL;
    ok &= (a->sum = malloc(a->heads * asked * sizeof(double))) != NULL;
    ok &= (a->logits = malloc(asked * KVD_FIT_BLOCK * sizeof(double))) != NULL;
    ok &= (a->keys = malloc((uint64_t)KVD_FIT_BLOCK * a->dim * sizeof(double))) != NULL;
    ok &= (a->rows = malloc(rows * a->dim * sizeof(float))) != NULL;
    return ok ? KVD_TAKE(a) : NULL;
}

void kvd_fit_attention_free(struct kvd_fit_attention **attention)
{
    struct kvd_fit_attention *a = *attention;
    if (!a)
        return;
    free(a->q);
    free(a->top);
    free(a->sum);
    free(a->logits);
    free(a->keys);
    free(a->rows);
    free(a);
    *attention = NULL;
}

// Tokens [*begin, *end) of those that the i-th query sees.
static void seen(const struct kvd_fit_attention *a, uint32_t i, uint64_t *begin, uint64_t *end)
{
    *end = a->at[i] + 1;
    *begin = a->piece->window && *end > a->piece->window ? *end - a->piece->window : 0;
}

// Logits of a kv head's queries at n keys.
static void logits_at(struct kvd_fit_attention *a, uint32_t h, const float *rows, uint64_t n)
{
    uint64_t asked = (uint64_t)a->n * a->group;
    kvd_fit_gather(rows, n, a->heads, h, 1, a->dim, a->keys);
    cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)asked, (int)n, (int)a->dim,
                1 / sqrt(a->dim), a->q + h * asked * a->dim, (int)a->dim, a->keys, (int)a->dim, 0,
                a->logits, KVD_FIT_BLOCK);
}

// Takes n keys from `first` into what softmax divides by.
static void add_block(struct kvd_fit_attention *a, const float *rows, uint64_t first, uint64_t n)
{
    uint64_t begin, end, asked = (uint64_t)a->n * a->group;
    for (uint32_t h = 0; h < a->heads; h++) {
        logits_at(a, h, rows, n);
        for (uint64_t r = 0; r < asked; r++) {
            const double *of = a->logits + r * KVD_FIT_BLOCK;
            double *top = &a->top[h * asked + r], *sum = &a->sum[h * asked + r], most = *top;
            seen(a, (uint32_t)(r / a->group), &begin, &end);
            begin = KVD_MAX(begin, first) - first;
            end = KVD_MIN(end, first + n) > first ? KVD_MIN(end, first + n) - first : 0;
            for (uint64_t t = begin; t < end; t++)
                most = fmax(most, of[t]);
            if (begin < end)
                *sum *= exp(*top - most);
            for (uint64_t t = begin; t < end; t++)
                *sum += exp(of[t] - most);
            *top = most;
        }
    }
}

static int read_queries(struct kvd_fit_attention *a, struct kvd_error *err)
{
    uint64_t first = KVD_FIT_SINK + KVD_FIT_RECENT, asked;
    uint64_t tokens = a->piece->tokens > first ? a->piece->tokens - first : 0;
    a->n = (uint32_t)KVD_MIN((uint64_t)QUERIES, tokens);
    asked = (uint64_t)a->n * a->group;
    for (uint32_t i = 0; i < a->n; i++) {
        a->at[i] = first + (i + 1) * tokens / a->n - 1;
        if (kvd_dump_read(a->dump, a->piece, KVD_DUMP_Q, a->at[i], 1, a->rows, err))
            return err->code;
        for (uint32_t h = 0; h < a->heads; h++)
            kvd_fit_gather(a->rows, 1, a->heads * a->group, h * a->group, a->group, a->dim,
                           a->q + (h * asked + (uint64_t)i * a->group) * a->dim);
    }
    for (uint64_t i = 0; i < a->heads * asked; i++) {
        a->top[i] = -INFINITY;
        a->sum[i] = 0;
    }
    return KVD_OK;
}

int kvd_fit_attention_begin(struct kvd_fit_attention *a, const struct kvd_dump_piece *piece,
                            struct kvd_error *err)
{
    a->piece = piece;
    if (read_queries(a, err))
        return err->code;
    for (uint64_t t = 0; a->n && t < piece->tokens; t += KVD_FIT_BLOCK) {
        uint64_t n = KVD_MIN((uint64_t)KVD_FIT_BLOCK, piece->tokens - t);
        if (kvd_dump_read(a->dump, piece, KVD_DUMP_K, t, n, a->rows, err))
            return err->code;
        add_block(a, a->rows, t, n);
    }
    return KVD_OK;
}

void kvd_fit_attention_weigh(struct kvd_fit_attention *a, const float *rows, uint64_t first,
                             uint64_t n, double *weights)
{
    uint64_t begin, end, asked = (uint64_t)a->n * a->group;
    for (uint32_t h = 0; h < a->heads; h++) {
        double *to = weights + (uint64_t)h * KVD_FIT_BLOCK;
        for (uint64_t t = 0; t < n; t++)
            to[t] = LEAST;
        if (a->n)
            logits_at(a, h, rows, n);
        for (uint64_t r = 0; r < asked; r++) {
            const double *of = a->logits + r * KVD_FIT_BLOCK;
            double top = a->top[h * asked + r], sum = a->sum[h * asked + r];
            seen(a, (uint32_t)(r / a->group), &begin, &end);
            end = KVD_MIN(end - KVD_FIT_RECENT, first + n);
            begin = KVD_MAX(KVD_MAX(begin, (uint64_t)KVD_FIT_SINK), first);
            for (uint64_t t = begin; t < end; t++) {
                double p = exp(of[t - first] - top) / sum;
                to[t - first] += p * p;
            }
        }
    }
}
