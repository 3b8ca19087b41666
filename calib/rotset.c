#include "calib/rotset.h"

#include <ctype.h>
#include <math.h>
#include <ctype.h>
#include <openssl/evp.h>

void kvd_rotset_free(struct kvd_rotset **sp)
{
    struct kvd_rotset *s = KVD_TAKE(*sp);
    if (!s)
        return;
    free(s->k);
    free(s->v);
    free(s->clip_k);
    free(s->clip_v);
    free(s);
}

static bool dim_ok(uint32_t dim)
{
    return dim == 64 || dim == 128 || dim == 256;
}

int kvd_rotset_alloc(struct kvd_rotset *s, struct kvd_error *err)
{
    if (s->n_layers < 1 || s->n_layers > KVD_MAX_LAYERS || s->heads < 1 ||
        s->heads > KVD_MAX_KV_HEADS)
        return kvd_fail(err, KVD_E_INVALID,
                        "a rotation set of %u layers and %u rotations a layer is out of range",
                        s->n_layers, s->heads);
    if (!dim_ok(s->dim_k) || !dim_ok(s->dim_v))
        return kvd_fail(err, KVD_E_INVALID,
                        "head_dim is %u for K and %u for V; 64, 128 and 256 are possible", s->dim_k,
                        s->dim_v);
    uint64_t n = (uint64_t)s->n_layers * s->heads;
    s->k = calloc(n * s->dim_k * s->dim_k, sizeof(float));
    s->v = calloc(n * s->dim_v * s->dim_v, sizeof(float));
    s->clip_k = calloc(n, sizeof(float));
    s->clip_v = calloc(n, sizeof(float));
    if (!s->k || !s->v || !s->clip_k || !s->clip_v)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
    for (uint64_t i = 0; i < n; i++) {
        s->clip_k[i] = 0.96f;
        s->clip_v[i] = 0.92f;
    }
    return KVD_OK;
}

static void fill_hadamard(float *m, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t j = 0; j < dim; j++)
            m[(uint64_t)i * dim + j] =
                (__builtin_popcount(i & j) & 1 ? -1.0f : 1.0f) / sqrtf((float)dim);
}

static void fill_identity(float *m, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++)
        m[(uint64_t)i * dim + i] = 1;
}

static struct kvd_rotset *built_in(const struct kvd_geometry *g, const char *name,
                                   void (*fill)(float *, uint32_t), struct kvd_error *err)
{
    struct kvd_rotset *s KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*s));
    if (!s) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
        return NULL;
    }
    snprintf(s->model, sizeof(s->model), "%s", name);
    snprintf(s->objective, sizeof(s->objective), "%s", name);
    snprintf(s->provenance, sizeof(s->provenance), "built in");
    memcpy(s->layers, g->layers, sizeof(s->layers));
    s->n_layers = g->n_layers;
    s->heads = 1;
    s->dim_k = g->head_dim_k;
    s->dim_v = g->head_dim_v;
    if (kvd_rotset_alloc(s, err))
        return NULL;
    for (uint64_t l = 0; l < s->n_layers; l++) {
        fill(s->k + l * s->dim_k * s->dim_k, s->dim_k);
        fill(s->v + l * s->dim_v * s->dim_v, s->dim_v);
    }
    return KVD_TAKE(s);
}

struct kvd_rotset *kvd_rotset_hadamard(const struct kvd_geometry *g, struct kvd_error *err)
{
    return built_in(g, "hadamard", fill_hadamard, err);
}

struct kvd_rotset *kvd_rotset_identity(const struct kvd_geometry *g, struct kvd_error *err)
{
    return built_in(g, "identity", fill_identity, err);
}

// Largest |(R R^T)_ij - delta_ij|; NaN if any value is not finite.
static double deviation(const float *m, uint32_t dim)
{
    double worst = 0;
    for (uint32_t i = 0; i < dim; i++) {
        const float *a = m + (uint64_t)i * dim;
        for (uint32_t j = 0; j <= i; j++) {
            const float *b = m + (uint64_t)j * dim;
            double dot = 0;
            for (uint32_t c = 0; c < dim; c++)
                dot += (double)a[c] * b[c];
            double d = fabs(dot - (i == j));
            if (!(d <= worst))
                worst = d;
            if (isnan(d))
                return NAN;
        }
    }
    return worst;
}

static int check_side(const struct kvd_rotset *s, const char *side, const float *m,
                      const float *clip, uint32_t dim, double *worst, struct kvd_error *err)
{
    for (uint32_t l = 0; l < s->n_layers; l++)
        for (uint32_t h = 0; h < s->heads; h++) {
            uint64_t i = (uint64_t)l * s->heads + h;
            double d = deviation(m + i * dim * dim, dim);
            if (!isfinite(d))
                return kvd_fail(err, KVD_E_CORRUPT,
                                "R_%s of layer %u, head %u holds values that are not finite", side,
                                s->layers[l], h);
            if (d > 1e-3)
                return kvd_fail(err, KVD_E_CORRUPT,
                                "R_%s of layer %u, head %u is not orthogonal: R R^T is %.3g away "
                                "from the identity",
                                side, s->layers[l], h, d);
            if (!(clip[i] > 0 && clip[i] <= 1))
                return kvd_fail(
                    err, KVD_E_CORRUPT,
                    "the clip ratio of %s, layer %u, head %u is %g; it must be in (0, 1]", side,
                    s->layers[l], h, (double)clip[i]);
            *worst = fmax(*worst, d);
        }
    return KVD_OK;
}

int kvd_rotset_check(const struct kvd_rotset *s, double *worst, struct kvd_error *err)
{
    double w = 0;
    int rc = check_side(s, "K", s->k, s->clip_k, s->dim_k, &w, err);
    if (rc == KVD_OK)
        rc = check_side(s, "V", s->v, s->clip_v, s->dim_v, &w, err);
    if (worst)
        *worst = w;
    return rc;
}

void kvd_rotation_data_deinit(struct kvd_rotation_data *d)
{
    free((void *)d->k);
    free((void *)d->v);
    free((void *)d->clip_k);
    free((void *)d->clip_v);
    *d = (struct kvd_rotation_data){0};
}

int kvd_rotset_select(const struct kvd_rotset *s, const struct kvd_geometry *g,
                      struct kvd_rotation_data *out, struct kvd_error *err)
{
    if (s->dim_k != g->head_dim_k || s->dim_v != g->head_dim_v)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "rotation set %s is for head_dim %u/%u, the geometry has %u/%u", s->model,
                        s->dim_k, s->dim_v, g->head_dim_k, g->head_dim_v);
    if (s->heads != 1 && s->heads != g->kv_heads)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "rotation set %s is for %u kv heads, the geometry has %u", s->model,
                        s->heads, g->kv_heads);
    uint64_t per_k = (uint64_t)s->heads * s->dim_k * s->dim_k,
             per_v = (uint64_t)s->heads * s->dim_v * s->dim_v;
    float *k KVD_FREE = malloc(g->n_layers * per_k * sizeof(float));
    float *v KVD_FREE = malloc(g->n_layers * per_v * sizeof(float));
    float *ck KVD_FREE = malloc((uint64_t)g->n_layers * s->heads * sizeof(float));
    float *cv KVD_FREE = malloc((uint64_t)g->n_layers * s->heads * sizeof(float));
    if (!k || !v || !ck || !cv)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
    for (uint32_t l = 0; l < g->n_layers; l++) {
        uint32_t at = 0;
        while (at < s->n_layers && s->layers[at] != g->layers[l])
            at++;
        if (at == s->n_layers)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "rotation set %s has no layer %u; it has %u layers from %u to %u",
                            s->model, g->layers[l], s->n_layers, s->layers[0],
                            s->layers[s->n_layers - 1]);
        memcpy(k + l * per_k, s->k + at * per_k, per_k * sizeof(float));
        memcpy(v + l * per_v, s->v + at * per_v, per_v * sizeof(float));
        memcpy(ck + (uint64_t)l * s->heads, s->clip_k + (uint64_t)at * s->heads,
               s->heads * sizeof(float));
        memcpy(cv + (uint64_t)l * s->heads, s->clip_v + (uint64_t)at * s->heads,
               s->heads * sizeof(float));
    }
    *out = (struct kvd_rotation_data){.n_layers = g->n_layers,
                                      .heads = s->heads,
                                      .dim_k = s->dim_k,
                                      .dim_v = s->dim_v,
                                      .k = KVD_TAKE(k),
                                      .v = KVD_TAKE(v),
                                      .clip_k = KVD_TAKE(ck),
                                      .clip_v = KVD_TAKE(cv)};
    return KVD_OK;
}

void kvd_digest(const void *data, size_t len, char out[KVD_DIGEST_TEXT])
{
    uint8_t sum[32];
    EVP_Digest(data, len, sum, NULL, EVP_sha256(), NULL);
    memcpy(out, "sha256:", 7);
    kvd_hex(sum, sizeof(sum), out + 7);
}

bool kvd_digest_valid(const char *text)
{
    if (strncmp(text, "sha256:", 7) != 0 || strlen(text) != 71)
        return false;
    for (const char *c = text + 7; *c; c++)
        if (!isdigit((unsigned char)*c) && !(*c >= 'a' && *c <= 'f'))
            return false;
    return true;
}

uint32_t kvd_layers_parse(const char *text, uint16_t *out)
{
    uint32_t n = 0;
    while (*text) {
        char *end;
        unsigned long from = strtoul(text, &end, 10), to = from;
        if (isdigit((unsigned char)*text) && *end == '-') {
            text = end + 1;
            to = strtoul(text, &end, 10);
        }
        if (!isdigit((unsigned char)*text) || (*end && *end != ',') || to < from ||
            to > KVD_MAX_MODEL_LAYER)
            return 0;
        for (; from <= to; from++) {
            if (n == KVD_MAX_LAYERS || (n && from <= out[n - 1]))
                return 0;
            out[n++] = (uint16_t)from;
        }
        text = *end ? end + 1 : end;
    }
    return n;
}
