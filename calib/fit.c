// Covariances of recorded activations, a layer at a time, and the set made of them.
//
// A thread takes a layer: it streams q, then k and v, in blocks of tokens, always in the same
// order.
#include "calib/fit_private.h"

#include <cblas.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <sys/stat.h>

#include "calib/marks.h"
#include "calib/parallel.h"

struct job {
    const struct kvd_dump *dump;
    const struct kvd_fit_options *o;
    struct kvd_fit *fit;
    char fingerprint[KVD_DIGEST_TEXT]; // of the dump and the options
    struct kvd_parallel parallel;
    pthread_mutex_t lock; // of what follows, progress and warnings
    uint64_t done, total; // bytes
};

// A thread's memory.
struct workspace {
    float *rows[KVD_DUMP_SIDES]; // [KVD_FIT_BLOCK][heads][dim]
    double *a, *b, *c;           // [KVD_FIT_BLOCK * group][dim]
    double *qqt;                 // [kv heads][dim_k][dim_k]
    double *sum;                 // [kv heads][dim][dim] of K's or V's products
    double *weight;              // [kv heads] sums of sst's weights
};

static const char *const objectives[] = {[KVD_FIT_QQT] = "qqt",
                                         [KVD_FIT_KTK] = "ktk",
                                         [KVD_FIT_SST] = "sst",
                                         [KVD_FIT_VTV] = "vtv",
                                         [KVD_FIT_HADAMARD] = "hadamard"};
static const char *const compositions[] = {[KVD_COMPOSE_R_H_PBR] = "r_h_pbr",
                                           [KVD_COMPOSE_R_H] = "r_h",
                                           [KVD_COMPOSE_R] = "r",
                                           [KVD_COMPOSE_TOP_H] = "top_h"};

static int index_of(const char *text, const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(text, names[i]) == 0)
            return (int)i;
    return -1;
}

int kvd_objective_parse(const char *text)
{
    return index_of(text, objectives, KVD_LEN(objectives));
}

int kvd_composition_parse(const char *text)
{
    return index_of(text, compositions, KVD_LEN(compositions));
}

// -- products ------------------------------------------------------------------------------------

static void workspace_deinit(void *workspace)
{
    struct workspace *w = workspace;
    for (int s = 0; s < KVD_DUMP_SIDES; s++)
        free(w->rows[s]);
    free(w->a);
    free(w->b);
    free(w->c);
    free(w->qqt);
    free(w->sum);
    free(w->weight);
}

static bool workspace_init(void *arg, void *workspace)
{
    const struct kvd_dump *d = ((const struct job *)arg)->dump;
    struct workspace *w = workspace;
    uint64_t group = d->heads[KVD_DUMP_Q] / d->heads[KVD_DUMP_K], kv = d->heads[KVD_DUMP_K];
    uint64_t dim = KVD_MAX(d->dim[KVD_DUMP_K], d->dim[KVD_DUMP_V]);
    bool ok = true;
    for (int s = 0; s < KVD_DUMP_SIDES; s++)
        ok &= (w->rows[s] = malloc((uint64_t)KVD_FIT_BLOCK * d->heads[s] * d->dim[s] *
                                   sizeof(float))) != NULL;
    ok &= (w->a = malloc(KVD_FIT_BLOCK * group * dim * sizeof(double))) != NULL;
    ok &= (w->b = malloc(KVD_FIT_BLOCK * group * dim * sizeof(double))) != NULL;
    ok &= (w->c = malloc(KVD_FIT_BLOCK * group * dim * sizeof(double))) != NULL;
    ok &= (w->qqt = malloc(kv * dim * dim * sizeof(double))) != NULL;
    ok &= (w->sum = malloc(kv * dim * dim * sizeof(double))) != NULL;
    ok &= (w->weight = malloc(kv * sizeof(double))) != NULL;
    return ok;
}

void kvd_fit_gather(const float *rows, uint64_t n, uint32_t heads, uint32_t head, uint32_t count,
                    uint32_t dim, double *out)
{
    for (uint64_t t = 0; t < n; t++) {
        const float *from = rows + (t * heads + head) * dim;
        for (uint32_t i = 0; i < count * dim; i++)
            out[t * count * dim + i] = (double)from[i];
    }
}

void kvd_fit_add_products(const double *a, uint64_t rows, uint32_t dim, double *c)
{
    cblas_dsyrk(CblasRowMajor, CblasUpper, CblasTrans, (int)dim, (int)rows, 1, a, (int)dim, 1, c,
                (int)dim);
}

void kvd_fit_finish(double *c, uint32_t dim, double f)
{
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t j = i; j < dim; j++)
            c[i * dim + j] = c[j * dim + i] = c[i * dim + j] * f;
}

double kvd_fit_trace(const double *c, uint32_t dim)
{
    double trace = 0;
    for (uint64_t i = 0; i < dim; i++)
        trace += c[i * dim + i];
    return trace;
}

// Multiplies each row of v by the root of its weight k^T c k. Returns the sum of the weights.
static double weigh(const double *k, const double *c, uint64_t n, uint32_t dim_k, double *scratch,
                    double *v, uint32_t dim_v)
{
    double sum = 0;
    cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, (int)n, (int)dim_k, 1, c, (int)dim_k, k,
                (int)dim_k, 0, scratch, (int)dim_k);
    for (uint64_t t = 0; t < n; t++) {
        double w = cblas_ddot((int)dim_k, &scratch[t * dim_k], 1, &k[t * dim_k], 1);
        w = w > 0 ? w : 0; // rounding
        sum += w;
        cblas_dscal((int)dim_v, sqrt(w), &v[t * dim_v], 1);
    }
    return sum;
}

// -- a layer -------------------------------------------------------------------------------------

static bool needs_q(const struct kvd_fit_options *o)
{
    return o->k == KVD_FIT_QQT || o->v == KVD_FIT_SST;
}

static bool needs(const struct kvd_fit_options *o, enum kvd_dump_side side)
{
    if (side == KVD_DUMP_Q)
        return needs_q(o);
    if (side == KVD_DUMP_K)
        return o->k == KVD_FIT_KTK || o->v == KVD_FIT_SST;
    return o->v != KVD_FIT_HADAMARD;
}

static void report(struct job *j, uint64_t bytes)
{
    pthread_mutex_lock(&j->lock);
    j->done += bytes;
    if (j->o->progress)
        j->o->progress(j->o->ctx, j->done, j->total);
    pthread_mutex_unlock(&j->lock);
}

// Calls f for blocks of a layer's tokens, with the sides of `mask` in w->rows.
static int for_blocks(struct job *j, struct workspace *w, uint32_t layer, uint32_t mask,
                      void (*f)(struct job *, struct workspace *, uint64_t n),
                      struct kvd_error *err)
{
    const struct kvd_dump *d = j->dump;
    for (uint32_t i = 0; i < d->n_pieces; i++) {
        const struct kvd_dump_piece *p = &d->pieces[i];
        for (uint64_t t = 0; p->layer == layer && t < p->tokens; t += KVD_FIT_BLOCK) {
            uint64_t n = KVD_MIN((uint64_t)KVD_FIT_BLOCK, p->tokens - t), bytes = 0;
            for (int s = 0; s < KVD_DUMP_SIDES; s++) {
                if (!(mask & 1u << s))
                    continue;
                if (kvd_dump_read(d, p, (enum kvd_dump_side)s, t, n, w->rows[s], err))
                    return err->code;
                bytes += n * d->heads[s] * d->dim[s] * kvd_tensor_type_size(p->type[s]);
            }
            f(j, w, n);
            report(j, bytes);
            if (j->parallel.failed)
                return kvd_fail(err, KVD_E_INTERNAL, "given up: another layer failed");
        }
    }
    return KVD_OK;
}

static void block_of_q(struct job *j, struct workspace *w, uint64_t n)
{
    const struct kvd_dump *d = j->dump;
    uint32_t dim = d->dim[KVD_DUMP_Q], group = d->heads[KVD_DUMP_Q] / d->heads[KVD_DUMP_K];
    for (uint32_t h = 0; h < d->heads[KVD_DUMP_K]; h++) {
        kvd_fit_gather(w->rows[KVD_DUMP_Q], n, d->heads[KVD_DUMP_Q], h * group, group, dim, w->a);
        kvd_fit_add_products(w->a, n * group, dim, &w->qqt[(uint64_t)h * dim * dim]);
    }
}

static void block_of_k(struct job *j, struct workspace *w, uint64_t n)
{
    const struct kvd_dump *d = j->dump;
    uint32_t dim = d->dim[KVD_DUMP_K], heads = d->heads[KVD_DUMP_K];
    for (uint32_t h = 0; h < heads; h++) {
        kvd_fit_gather(w->rows[KVD_DUMP_K], n, heads, h, 1, dim, w->a);
        kvd_fit_add_products(w->a, n, dim, &w->sum[(uint64_t)h * dim * dim]);
    }
}

static void block_of_v(struct job *j, struct workspace *w, uint64_t n)
{
    const struct kvd_dump *d = j->dump;
    uint32_t dim_k = d->dim[KVD_DUMP_K], dim_v = d->dim[KVD_DUMP_V], heads = d->heads[KVD_DUMP_K];
    for (uint32_t h = 0; h < heads; h++) {
        kvd_fit_gather(w->rows[KVD_DUMP_V], n, heads, h, 1, dim_v, w->a);
        if (j->o->v == KVD_FIT_SST) {
            kvd_fit_gather(w->rows[KVD_DUMP_K], n, heads, h, 1, dim_k, w->b);
            w->weight[h] +=
                weigh(w->b, &w->qqt[(uint64_t)h * dim_k * dim_k], n, dim_k, w->c, w->a, dim_v);
        }
        kvd_fit_add_products(w->a, n, dim_v, &w->sum[(uint64_t)h * dim_v * dim_v]);
    }
}

// Per-head matrices into a side's covariance of set layer i.
static void store(const struct job *j, const double *from, uint32_t dim, uint32_t i,
                  struct kvd_spectrum *to)
{
    uint32_t heads = j->dump->heads[KVD_DUMP_K];
    uint64_t n = (uint64_t)dim * dim;
    double *c = to->covariance + (uint64_t)i * j->fit->set->heads * n;
    if (j->o->per_kv_head) {
        memcpy(c, from, heads * n * sizeof(*c));
        return;
    }
    memset(c, 0, n * sizeof(*c));
    for (uint32_t h = 0; h < heads; h++)
        cblas_daxpy((int)n, 1.0 / heads, from + h * n, 1, c, 1);
}

static int layer_covariances(struct job *j, struct workspace *w, uint32_t i, uint32_t layer,
                             struct kvd_error *err)
{
    const struct kvd_dump *d = j->dump;
    const struct kvd_fit_options *o = j->o;
    uint32_t heads = d->heads[KVD_DUMP_K], group = d->heads[KVD_DUMP_Q] / heads;
    uint64_t dim_k = d->dim[KVD_DUMP_K], dim_v = d->dim[KVD_DUMP_V];
    double n = (double)d->tokens[layer];
    if (needs_q(o)) {
        memset(w->qqt, 0, heads * dim_k * dim_k * sizeof(double));
        if (for_blocks(j, w, layer, 1u << KVD_DUMP_Q, block_of_q, err))
            return err->code;
        for (uint32_t h = 0; h < heads; h++)
            kvd_fit_finish(&w->qqt[h * dim_k * dim_k], (uint32_t)dim_k, 1 / (n * group));
    }
    if (o->k == KVD_FIT_QQT)
        store(j, w->qqt, (uint32_t)dim_k, i, &j->fit->k);
    if (o->k == KVD_FIT_KTK) {
        memset(w->sum, 0, heads * dim_k * dim_k * sizeof(double));
        if (for_blocks(j, w, layer, 1u << KVD_DUMP_K, block_of_k, err))
            return err->code;
        for (uint32_t h = 0; h < heads; h++)
            kvd_fit_finish(&w->sum[h * dim_k * dim_k], (uint32_t)dim_k, 1 / n);
        store(j, w->sum, (uint32_t)dim_k, i, &j->fit->k);
    }
    if (o->v == KVD_FIT_HADAMARD)
        return KVD_OK;
    uint32_t mask = 1u << KVD_DUMP_V | (o->v == KVD_FIT_SST) << KVD_DUMP_K;
    memset(w->sum, 0, heads * dim_v * dim_v * sizeof(double));
    memset(w->weight, 0, heads * sizeof(double));
    if (for_blocks(j, w, layer, mask, block_of_v, err))
        return err->code;
    for (uint32_t h = 0; h < heads; h++) {
        double by = o->v == KVD_FIT_SST ? w->weight[h] : n;
        if (by <= 0)
            return kvd_fail(err, KVD_E_INVALID,
                            "layer %u, kv head %u: q or k is all zeros: nothing weighs v",
                            d->layers[layer], h);
        kvd_fit_finish(&w->sum[h * dim_v * dim_v], (uint32_t)dim_v, 1 / by);
    }
    store(j, w->sum, (uint32_t)dim_v, i, &j->fit->v);
    return KVD_OK;
}

// -- rotations -----------------------------------------------------------------------------------

static int rotate_side(struct job *j, uint32_t i, bool v, struct kvd_error *err)
{
    struct kvd_rotset *set = j->fit->set;
    struct kvd_spectrum *s = v ? &j->fit->v : &j->fit->k;
    uint32_t dim = v ? set->dim_v : set->dim_k, heads = set->heads, layer = set->layers[i];
    uint64_t n = (uint64_t)dim * dim;
    double *u KVD_FREE = malloc(n * sizeof(*u));
    if (!u)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t h = 0; s->covariance && h < heads; h++) {
        uint64_t at = (uint64_t)i * heads + h;
        int rank = kvd_eigenbasis(s->covariance + at * n, dim, s->eigenvalues + at * dim, u, err);
        if (rank < 0)
            return err->code;
        char text[256], head[32] = "";
        if (heads > 1)
            snprintf(head, sizeof(head), ", kv head %u", h);
        snprintf(text, sizeof(text), "layer %u, %s%s: the activations span %d of %u dimensions",
                 layer, v ? "V" : "K", head, rank, dim);
        if ((uint32_t)rank < dim / 2)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s: record more, and more varied, tokens (are they constant?)", text);
        if ((uint32_t)rank < dim && j->o->warn) {
            pthread_mutex_lock(&j->lock);
            j->o->warn(j->o->ctx, text);
            pthread_mutex_unlock(&j->lock);
        }
        kvd_compose(u, dim, j->o->composition, s->rotation + at * n);
        float *r = (v ? set->v : set->k) + at * n;
        for (uint64_t e = 0; e < n; e++)
            r[e] = (float)s->rotation[at * n + e];
    }
    return KVD_OK;
}

// -- finished layers on disk ---------------------------------------------------------------------

static void state_path(const struct job *j, uint32_t i, char *out, size_t cap)
{
    snprintf(out, cap, "%s/layer-%u.safetensors", j->o->state, j->fit->set->layers[i]);
}

static void state_tensors(const struct job *j, uint32_t i, struct kvd_tensor_source t[2],
                          uint32_t *n)
{
    const struct kvd_rotset *set = j->fit->set;
    *n = 0;
    for (int v = 0; v < 2; v++) {
        const struct kvd_spectrum *s = v ? &j->fit->v : &j->fit->k;
        uint64_t dim = v ? set->dim_v : set->dim_k;
        if (s->covariance)
            t[(*n)++] = (struct kvd_tensor_source){.name = v ? "v.covariance" : "k.covariance",
                                                   .type = KVD_TENSOR_F64,
                                                   .rank = 3,
                                                   .shape = {set->heads, dim, dim},
                                                   .data = s->covariance +
                                                           (uint64_t)i * set->heads * dim * dim};
    }
}

static int save_layer(const struct job *j, uint32_t i, struct kvd_error *err)
{
    struct kvd_tensor_source t[2];
    uint32_t n;
    char path[4096];
    size_t size;
    state_tensors(j, i, t, &n);
    state_path(j, i, path, sizeof(path));
    uint8_t *file KVD_FREE =
        kvd_safetensors_render(t, n, json_pack("{s:s}", "of", j->fingerprint), "payload", &size);
    if (!file)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    return kvd_write_file(path, file, size, err);
}

// True if the layer was there, whole and of the same dump and options.
static bool load_layer(const struct job *j, uint32_t i)
{
    struct kvd_tensor_source t[2];
    struct kvd_safetensors st;
    uint32_t n, found = 0;
    char path[4096], digest[KVD_DIGEST_TEXT];
    struct stat info;
    state_tensors(j, i, t, &n);
    state_path(j, i, path, sizeof(path));
    int fd KVD_CLOSE = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t want = 1 << 20;
    for (uint32_t k = 0; k < n; k++)
        want += t[k].shape[0] * t[k].shape[1] * t[k].shape[2] * sizeof(double);
    if (fd < 0 || fstat(fd, &info) || (uint64_t)info.st_size > want)
        return false;
    size_t size = (size_t)info.st_size;
    uint8_t *file KVD_FREE = malloc(size + 1);
    if (!file || read(fd, file, size) != (ssize_t)size ||
        kvd_safetensors_parse(path, file, size, size, &st, NULL))
        return false;
    const char *of = kvd_safetensors_metadata(&st, "of"),
               *payload = kvd_safetensors_metadata(&st, "payload");
    kvd_digest(file + st.data_at, size - st.data_at, digest);
    bool same = of && payload && strcmp(of, j->fingerprint) == 0 && strcmp(payload, digest) == 0;
    for (uint32_t k = 0; same && k < n; k++) {
        const struct kvd_safetensor *x = kvd_safetensors_find(&st, t[k].name);
        if (!x || x->type != KVD_TENSOR_F64 || x->rank != 3 ||
            memcmp(x->shape, t[k].shape, 3 * sizeof(*x->shape)) != 0)
            continue;
        memcpy((void *)t[k].data, file + x->at, x->bytes);
        found++;
    }
    kvd_safetensors_free(&st);
    return same && found == n;
}

// Of all that finished layers depend on.
static int fingerprint(struct job *j, struct kvd_error *err)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    fprintf(f, "%d %d %d\n", (int)j->o->k, (int)j->o->v, j->o->per_kv_head);
    for (uint32_t i = 0; i < j->dump->n_files; i++) {
        const struct kvd_dump_file *x = &j->dump->files[i];
        fprintf(f, "%s %llu %lld\n", x->path, (unsigned long long)x->size,
                (long long)x->changed_ns);
    }
    fclose(f);
    kvd_digest(text, size, j->fingerprint);
    free(text);
    if (mkdir(j->o->state, 0777) && errno != EEXIST)
        return kvd_fail(err, -errno, "%s: %s", j->o->state, strerror(errno));
    return KVD_OK;
}

// -- the whole -----------------------------------------------------------------------------------

static uint64_t layer_bytes(const struct job *j, uint32_t layer)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < j->dump->n_pieces; i++) {
        const struct kvd_dump_piece *p = &j->dump->pieces[i];
        for (int s = 0; p->layer == layer && s < KVD_DUMP_SIDES; s++)
            if (needs(j->o, (enum kvd_dump_side)s))
                bytes += p->tokens * j->dump->heads[s] * j->dump->dim[s] *
                         kvd_tensor_type_size(p->type[s]);
    }
    return bytes;
}

uint32_t kvd_fit_dump_layer(const struct kvd_dump *d, uint32_t model_layer)
{
    uint32_t at = 0;
    while (d->layers[at] != model_layer)
        at++;
    return at;
}

static uint32_t dump_layer(const struct job *j, uint32_t i)
{
    return kvd_fit_dump_layer(j->dump, j->fit->set->layers[i]);
}

static int fit_layer(void *arg, void *workspace, uint32_t i, struct kvd_error *err)
{
    struct job *j = arg;
    struct workspace *w = workspace;
    uint32_t layer = dump_layer(j, i);
    if (j->o->state && load_layer(j, i))
        report(j, layer_bytes(j, layer));
    else if (layer_covariances(j, w, i, layer, err) || (j->o->state && save_layer(j, i, err)))
        return err->code;
    return rotate_side(j, i, false, err) || rotate_side(j, i, true, err) ? err->code : KVD_OK;
}

int kvd_fit_check_dump(const struct kvd_dump *d, const struct kvd_fit_options *o,
                       struct kvd_error *err)
{
    for (uint32_t i = 0, at = 0; o->layers && i < o->n_layers; i++) {
        while (at < d->n_layers && d->layers[at] < o->layers[i])
            at++;
        if (at == d->n_layers || d->layers[at] != o->layers[i])
            return kvd_fail(err, KVD_E_INVALID, "layer %u is not in the dump", o->layers[i]);
    }
    uint32_t dim = KVD_MAX(d->dim[KVD_DUMP_K], d->dim[KVD_DUMP_V]);
    for (uint32_t i = 0; i < d->n_layers; i++) {
        if (d->tokens[i] < dim)
            return kvd_fail(err, KVD_E_INVALID,
                            "layer %u has %llu tokens, fewer than head_dim %u: record at least %u",
                            d->layers[i], (unsigned long long)d->tokens[i], dim, 16 * dim);
        if (d->tokens[i] < 16 * dim && o->warn) {
            char text[128];
            snprintf(text, sizeof(text), "layer %u has only %llu tokens; %u and more are better",
                     d->layers[i], (unsigned long long)d->tokens[i], 16 * dim);
            o->warn(o->ctx, text);
        }
    }
    return KVD_OK;
}

static int check_options(const struct kvd_dump *d, const struct kvd_fit_options *o,
                         struct kvd_error *err)
{
    if ((o->k != KVD_FIT_QQT && o->k != KVD_FIT_KTK && o->k != KVD_FIT_HADAMARD) ||
        (o->v != KVD_FIT_SST && o->v != KVD_FIT_VTV && o->v != KVD_FIT_HADAMARD))
        return kvd_fail(err, KVD_E_INVALID,
                        "objectives are qqt, ktk or hadamard for K, sst, vtv or hadamard for V");
    for (int side = 0; side < 2; side++) {
        uint32_t dim = d->dim[side ? KVD_DUMP_V : KVD_DUMP_K];
        bool fitted = (side ? o->v : o->k) != KVD_FIT_HADAMARD;
        if (fitted && o->composition == KVD_COMPOSE_R_H_PBR && (dim & (dim - 1)))
            return kvd_fail(err, KVD_E_INVALID,
                            "composition r_h_pbr is defined for head_dims that are powers of two, "
                            "and %c has %u: "
                            "take r_h, r or top_h",
                            side ? 'V' : 'K', dim);
    }
    if (!(o->clip_k > 0 && o->clip_k <= 1 && o->clip_v > 0 && o->clip_v <= 1))
        return kvd_fail(err, KVD_E_INVALID, "clip ratios are above 0 and at most 1");
    return kvd_fit_check_dump(d, o, err);
}

static int alloc_spectrum(struct kvd_spectrum *s, uint64_t matrices, uint64_t dim,
                          struct kvd_error *err)
{
    s->covariance = calloc(matrices * dim * dim, sizeof(double));
    s->rotation = calloc(matrices * dim * dim, sizeof(double));
    s->eigenvalues = calloc(matrices * dim, sizeof(double));
    return s->covariance && s->rotation && s->eigenvalues
               ? KVD_OK
               : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

void kvd_fit_provenance(const struct kvd_dump *d, char *out, size_t cap)
{
    uint64_t least = UINT64_MAX;
    for (uint32_t i = 0; i < d->n_layers; i++)
        least = KVD_MIN(least, d->tokens[i]);
    snprintf(out, cap, "kvd " KVD_VERSION " fit of %llu tokens in %u files",
             (unsigned long long)least, d->n_files);
}

// The set with Hadamard matrices everywhere, which fitted sides then replace.
static struct kvd_rotset *new_set(const struct kvd_dump *d, const struct kvd_fit_options *o,
                                  struct kvd_error *err)
{
    uint32_t n_layers = o->layers ? o->n_layers : d->n_layers;
    struct kvd_rotset *base KVD_AUTO(kvd_rotset_free) =
        kvd_rotset_new("hadamard", o->layers ? o->layers : d->layers, n_layers, d->dim[KVD_DUMP_K],
                       d->dim[KVD_DUMP_V], err);
    struct kvd_rotset *set KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*set));
    if (!base || !set)
        return NULL;
    set->n_layers = n_layers;
    memcpy(set->layers, base->layers, sizeof(set->layers));
    set->heads = o->per_kv_head ? d->heads[KVD_DUMP_K] : 1;
    set->dim_k = base->dim_k;
    set->dim_v = base->dim_v;
    if (kvd_rotset_alloc(set, err) ||
        (o->marks && (kvd_marks_parse(set, o->marks, err) || kvd_marks_check_layers(set, err))))
        return NULL;
    for (uint64_t i = 0; i < (uint64_t)set->n_layers * set->heads; i++) {
        memcpy(set->k + i * set->dim_k * set->dim_k, base->k,
               sizeof(float) * set->dim_k * set->dim_k);
        memcpy(set->v + i * set->dim_v * set->dim_v, base->v,
               sizeof(float) * set->dim_v * set->dim_v);
        set->clip_k[i] = o->clip_k;
        set->clip_v[i] = o->clip_v;
    }
    snprintf(set->model, sizeof(set->model), "%s", d->model);
    snprintf(set->objective, sizeof(set->objective), "K %s%s%s, V %s%s%s%s", objectives[o->k],
             o->k == KVD_FIT_HADAMARD ? "" : "_",
             o->k == KVD_FIT_HADAMARD ? "" : compositions[o->composition], objectives[o->v],
             o->v == KVD_FIT_HADAMARD ? "" : "_",
             o->v == KVD_FIT_HADAMARD ? "" : compositions[o->composition],
             o->per_kv_head ? ", per kv head" : "");
    kvd_fit_provenance(d, set->provenance, sizeof(set->provenance));
    return KVD_TAKE(set);
}

void kvd_fit_free(struct kvd_fit **fit)
{
    if (!*fit)
        return;
    for (int v = 0; v < 2; v++) {
        struct kvd_spectrum *s = v ? &(*fit)->v : &(*fit)->k;
        free(s->covariance);
        free(s->eigenvalues);
        free(s->rotation);
    }
    kvd_rotset_free(&(*fit)->set);
    free(*fit);
    *fit = NULL;
}

struct kvd_fit *kvd_fit_run(const struct kvd_dump *d, const struct kvd_fit_options *o,
                            struct kvd_error *err)
{
    if (check_options(d, o, err))
        return NULL;
    struct kvd_fit *fit KVD_AUTO(kvd_fit_free) = calloc(1, sizeof(*fit));
    if (!fit || !(fit->set = new_set(d, o, err)))
        return NULL;
    uint64_t matrices = (uint64_t)fit->set->n_layers * fit->set->heads;
    if ((o->k != KVD_FIT_HADAMARD && alloc_spectrum(&fit->k, matrices, fit->set->dim_k, err)) ||
        (o->v != KVD_FIT_HADAMARD && alloc_spectrum(&fit->v, matrices, fit->set->dim_v, err)))
        return NULL;
    struct job j = {.dump = d, .o = o, .fit = fit, .lock = PTHREAD_MUTEX_INITIALIZER};
    for (uint32_t i = 0; i < fit->set->n_layers; i++)
        j.total += layer_bytes(&j, dump_layer(&j, i));
    if ((o->state && fingerprint(&j, err)))
        return NULL;
    j.parallel = (struct kvd_parallel){.threads = o->threads,
                                       .jobs = fit->set->n_layers,
                                       .workspace_size = sizeof(struct workspace),
                                       .begin = workspace_init,
                                       .run = fit_layer,
                                       .end = workspace_deinit,
                                       .arg = &j};
    if (kvd_parallel_run(&j.parallel, err))
        return NULL;
    if (kvd_rotset_check(fit->set, NULL, err))
        return NULL;
    return KVD_TAKE(fit);
}

int kvd_fit_write_spectrum(const struct kvd_fit *fit, const char *path, struct kvd_error *err)
{
    static const char *const names[2][3] = {{"k.covariance", "k.eigenvalues", "k.rotation"},
                                            {"v.covariance", "v.eigenvalues", "v.rotation"}};
    const struct kvd_rotset *set = fit->set;
    struct kvd_tensor_source t[6];
    uint32_t n = 0;
    size_t size;
    char layers[KVD_MAX_LAYERS * 7] = "";
    for (uint32_t i = 0, at = 0; i < set->n_layers; i++)
        at += (uint32_t)sprintf(layers + at, "%s%u", i ? "," : "", set->layers[i]);
    for (int v = 0; v < 2; v++) {
        const struct kvd_spectrum *s = v ? &fit->v : &fit->k;
        uint64_t dim = v ? set->dim_v : set->dim_k;
        const double *data[3] = {s->covariance, s->eigenvalues, s->rotation};
        for (int i = 0; i < 3 && s->covariance; i++)
            t[n++] = (struct kvd_tensor_source){.name = names[v][i],
                                                .type = KVD_TENSOR_F64,
                                                .rank = i == 1 ? 3 : 4,
                                                .shape = {set->n_layers, set->heads, dim, dim},
                                                .data = data[i]};
    }
    uint8_t *file KVD_FREE =
        kvd_safetensors_render(t, n, json_pack("{s:s}", "layers", layers), NULL, &size);
    if (!file)
        return kvd_fail(err, KVD_E_INTERNAL, "%s: out of memory", path);
    return kvd_write_file(path, file, size, err);
}
