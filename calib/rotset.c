#include "calib/rotset.h"

#include <ctype.h>
#include <math.h>
#include <openssl/evp.h>
#include <pthread.h>

#include "calib/marks.h"
#include "calib/transforms.h"

void kvd_rotset_free(struct kvd_rotset **sp)
{
    struct kvd_rotset *s = KVD_TAKE(*sp);
    if (!s)
        return;
    free(s->k);
    free(s->v);
    free(s->clip_k);
    free(s->clip_v);
    free(s->gain_k);
    free(s->gain_v);
    free(s->fitted_to);
    free(s->clips_fitted_to);
    free(s->marks);
    kvd_transforms_free(&s->transforms);
    free(s);
}

int kvd_rotset_check_shape(const struct kvd_rotset *s, struct kvd_error *err)
{
    if (s->n_layers < 1 || s->n_layers > KVD_MAX_LAYERS || s->heads < 1 ||
        s->heads > KVD_MAX_KV_HEADS)
        return kvd_fail(err, KVD_E_INVALID,
                        "a rotation set of %u layers and %u rotations a layer is out of range",
                        s->n_layers, s->heads);
    if (!kvd_head_dims_ok(s->dim_k, s->dim_v) && !kvd_latent_dims_ok(s->dim_k, s->dim_v))
        return kvd_fail(err, KVD_E_INVALID,
                        "head_dim is %u for K and %u for V; " KVD_HEAD_DIMS_NAMES
                        "; 64 for the rope part with 512 for a latent",
                        s->dim_k, s->dim_v);
    return KVD_OK;
}

int kvd_rotset_alloc(struct kvd_rotset *s, struct kvd_error *err)
{
    if (kvd_rotset_check_shape(s, err))
        return err->code;
    uint64_t n = (uint64_t)s->n_layers * s->heads;
    s->k = calloc(n * s->dim_k * s->dim_k, sizeof(float));
    s->v = calloc(n * s->dim_v * s->dim_v, sizeof(float));
    s->clip_k = calloc(n, sizeof(float));
    s->clip_v = calloc(n, sizeof(float));
    s->gain_k = calloc(n, sizeof(float));
    s->gain_v = calloc(n, sizeof(float));
    if (!s->k || !s->v || !s->clip_k || !s->clip_v || !s->gain_k || !s->gain_v)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
    for (uint64_t i = 0; i < n; i++) {
        s->clip_k[i] = 0.96f;
        s->clip_v[i] = 0.92f;
        s->gain_k[i] = s->gain_v[i] = 1;
    }
    return KVD_OK;
}

struct kvd_rotset *kvd_rotset_clone(const struct kvd_rotset *from)
{
    struct kvd_rotset *s = from->transforms ? NULL : malloc(sizeof(*s));
    struct kvd_error ignored;
    if (!s)
        return NULL;
    *s = *from;
    s->k = s->v = s->clip_k = s->clip_v = s->gain_k = s->gain_v = NULL;
    s->fitted_to = from->fitted_to ? strdup(from->fitted_to) : NULL;
    s->clips_fitted_to = from->clips_fitted_to ? strdup(from->clips_fitted_to) : NULL;
    s->marks = from->marks ? malloc(s->n_marks * sizeof(*s->marks)) : NULL;
    if (s->marks)
        memcpy(s->marks, from->marks, s->n_marks * sizeof(*s->marks));
    if (!s->fitted_to != !from->fitted_to || !s->clips_fitted_to != !from->clips_fitted_to ||
        !s->marks != !from->marks || kvd_rotset_alloc(s, &ignored)) {
        kvd_rotset_free(&s);
        return NULL;
    }
    uint64_t n = (uint64_t)s->n_layers * s->heads * sizeof(float);
    memcpy(s->k, from->k, n * s->dim_k * s->dim_k);
    memcpy(s->v, from->v, n * s->dim_v * s->dim_v);
    memcpy(s->clip_k, from->clip_k, n);
    memcpy(s->clip_v, from->clip_v, n);
    memcpy(s->gain_k, from->gain_k, n);
    memcpy(s->gain_v, from->gain_v, n);
    return s;
}

// -- built-in sets -------------------------------------------------------------------------------

static void fill_hadamard(float *m, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t j = 0; j < dim; j++)
            m[(uint64_t)i * dim + j] = (float)kvd_hadamard_entry(dim, i, j) / sqrtf((float)dim);
}

static void fill_identity(float *m, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++)
        m[(uint64_t)i * dim + i] = 1;
}

// splitmix64: uniform in (0, 1).
static double uniform(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return ((double)((z ^ z >> 31) >> 11) + 0.5) * 0x1p-53;
}

// Takes from a row what lies along the rows before it, twice for rounding's sake, and normalizes
// it.
static void orthogonalize(double *m, uint32_t row, uint32_t dim)
{
    double *x = m + (uint64_t)row * dim, norm = 0;
    for (uint32_t k = 0; k < 2 * row; k++) {
        const double *y = m + (uint64_t)(k % row) * dim;
        double dot = 0;
        for (uint32_t c = 0; c < dim; c++)
            dot += x[c] * y[c];
        for (uint32_t c = 0; c < dim; c++)
            x[c] -= dot * y[c];
    }
    for (uint32_t c = 0; c < dim; c++)
        norm += x[c] * x[c];
    for (uint32_t c = 0; c < dim; c++)
        x[c] /= sqrt(norm);
}

// Normal rows made orthonormal are uniformly distributed over the orthogonal matrices.
static void make_random(float *out, uint32_t dim)
{
    static double m[KVD_MAX_ROW * KVD_MAX_ROW];
    uint64_t state = dim;
    for (uint32_t i = 0; i < dim; i++) {
        for (uint32_t c = 0; c < dim; c++)
            m[i * dim + c] = sqrt(-2 * log(uniform(&state))) * cos(2 * M_PI * uniform(&state));
        orthogonalize(m, i, dim);
    }
    for (uint32_t i = 0; i < dim * dim; i++)
        out[i] = (float)m[i];
}

// Making one takes tens of milliseconds, and every session of a layout asks again: they are kept,
// by their dim. Without memory for that one is made anew.
static void fill_random(float *out, uint32_t dim)
{
    static float *kept[KVD_MAX_ROW + 1];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    uint64_t bytes = sizeof(*out) * dim * dim;
    pthread_mutex_lock(&lock);
    if (kept[dim]) {
        memcpy(out, kept[dim], bytes);
    } else {
        make_random(out, dim);
        kept[dim] = malloc(bytes);
        if (kept[dim])
            memcpy(kept[dim], out, bytes);
    }
    pthread_mutex_unlock(&lock);
}

typedef void fill_fn(float *, uint32_t);

static fill_fn *fill_of(const char *name)
{
    return strcmp(name, "hadamard") == 0   ? fill_hadamard
           : strcmp(name, "random") == 0   ? fill_random
           : strcmp(name, "identity") == 0 ? fill_identity
                                           : NULL;
}

bool kvd_rotset_built_in(const char *name)
{
    return fill_of(name) != NULL;
}

struct kvd_rotset *kvd_rotset_new(const char *name, const uint16_t *layers, uint32_t n_layers,
                                  uint32_t dim_k, uint32_t dim_v, struct kvd_error *err)
{
    fill_fn *fill = fill_of(name);
    struct kvd_rotset *s KVD_AUTO(kvd_rotset_free) = calloc(1, sizeof(*s));
    if (!fill || !s) {
        kvd_fail(err, fill ? KVD_E_INTERNAL : KVD_E_INVALID,
                 fill ? "out of memory for the set %s" : "no set %s is built in", name);
        return NULL;
    }
    snprintf(s->model, sizeof(s->model), "%s", name);
    snprintf(s->objective, sizeof(s->objective), "%s", name);
    snprintf(s->provenance, sizeof(s->provenance), "built in");
    if (strcmp(name, "hadamard") == 0) {
        s->scale_k = KVD_SCALE_UNBIASED;
        s->scale_v = KVD_SCALE_LEAST_SQUARES;
    }
    memcpy(s->layers, layers, KVD_MIN(n_layers, (uint32_t)KVD_MAX_LAYERS) * sizeof(*layers));
    s->n_layers = n_layers;
    s->heads = 1;
    s->dim_k = dim_k;
    s->dim_v = dim_v;
    if (kvd_rotset_alloc(s, err))
        return NULL;
    for (int v = 0; v < 2; v++) {
        uint32_t dim = v ? s->dim_v : s->dim_k;
        float *m = v ? s->v : s->k;
        fill(m, dim);
        for (uint64_t l = 1; l < s->n_layers; l++)
            memcpy(m + l * dim * dim, m, sizeof(*m) * dim * dim);
    }
    return KVD_TAKE(s);
}

static const char *const scales[KVD_SCALE_COUNT] = {"published", "least-squares", "unbiased"};

const char *kvd_scale_name(enum kvd_scale scale)
{
    return scales[scale];
}

int kvd_scale_parse(const char *text)
{
    for (int i = 0; i < KVD_SCALE_COUNT; i++)
        if (strcmp(text, scales[i]) == 0)
            return i;
    return -1;
}

bool kvd_scales_parse(const char *text, enum kvd_scale *k, enum kvd_scale *v)
{
    char side[32];
    size_t n = strcspn(text, ",");
    if (!text[n] || n >= sizeof(side))
        return false;
    snprintf(side, sizeof(side), "%.*s", (int)n, text);
    int of_k = kvd_scale_parse(side), of_v = kvd_scale_parse(text + n + 1);
    if (of_k < 0 || of_v < 0)
        return false;
    *k = (enum kvd_scale)of_k;
    *v = (enum kvd_scale)of_v;
    return true;
}

// -- checks --------------------------------------------------------------------------------------

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

// out = x (3 I - x^T x) / 2: one step of Newton's iteration towards the nearest orthogonal matrix,
// which squares the distance from it. `gram` is room for x^T x.
static void newton_step(const double *x, double *gram, double *out, uint32_t dim)
{
    memset(gram, 0, sizeof(*gram) * dim * dim);
    for (uint32_t r = 0; r < dim; r++)
        for (uint32_t i = 0; i < dim; i++)
            for (uint32_t j = 0; j < dim; j++)
                gram[i * dim + j] += x[r * dim + i] * x[r * dim + j];
    for (uint32_t r = 0; r < dim; r++) {
        double *to = out + (uint64_t)r * dim;
        for (uint32_t j = 0; j < dim; j++)
            to[j] = 1.5 * x[r * dim + j];
        for (uint32_t i = 0; i < dim; i++)
            for (uint32_t j = 0; j < dim; j++)
                to[j] -= 0.5 * x[r * dim + i] * gram[i * dim + j];
    }
}

int kvd_rotation_straighten(float *r, uint32_t dim, struct kvd_error *err)
{
    enum { STEPS = 3 }; // from 0.05, below the rounding of a double
    uint64_t n = (uint64_t)dim * dim;
    double far = deviation(r, dim);
    if (!(far <= 0.05)) // NaN too
        return kvd_fail(err, KVD_E_CORRUPT,
                        "a rotation is not orthogonal: R R^T is %.3g away from the identity, and "
                        "rounding to 16 bits explains at most 0.05",
                        far);
    double *work KVD_FREE = malloc(3 * n * sizeof(*work));
    if (!work)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
    double *x = work, *gram = work + n, *next = work + 2 * n;
    for (uint64_t i = 0; i < n; i++)
        x[i] = r[i];
    for (int step = 0; step < STEPS; step++) {
        newton_step(x, gram, next, dim);
        memcpy(x, next, n * sizeof(*x));
    }
    for (uint64_t i = 0; i < n; i++)
        r[i] = (float)x[i];
    return KVD_OK;
}

static int check_side(const struct kvd_rotset *s, const char *side, const float *m,
                      const float *clip, const float *gain, uint32_t dim, double *worst,
                      struct kvd_error *err)
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
            if (!(gain[i] >= 0.5f && gain[i] <= 1.5f))
                return kvd_fail(
                    err, KVD_E_CORRUPT,
                    "the level gain of %s, layer %u, head %u is %g; it must be in [0.5, 1.5]", side,
                    s->layers[l], h, (double)gain[i]);
            *worst = fmax(*worst, d);
        }
    return KVD_OK;
}

int kvd_rotset_check(const struct kvd_rotset *s, double *worst, struct kvd_error *err)
{
    double w = 0;
    if (kvd_marks_check(s, err))
        return err->code;
    if (s->transforms)
        return kvd_transforms_check(s, worst, err);
    int rc = check_side(s, "K", s->k, s->clip_k, s->gain_k, s->dim_k, &w, err);
    if (rc == KVD_OK)
        rc = check_side(s, "V", s->v, s->clip_v, s->gain_v, s->dim_v, &w, err);
    if (worst)
        *worst = w;
    return rc;
}

void kvd_rotation_data_deinit(struct kvd_rotation_data *d)
{
    struct kvd_term terms[KVD_TERMS];
    kvd_rotation_terms(d, terms);
    for (uint32_t i = 0; i < KVD_TERMS; i++)
        free((void *)*terms[i].at);
    *d = (struct kvd_rotation_data){0};
}

// n_layers when the set has no such layer.
static uint64_t layer_index(const struct kvd_rotset *s, uint32_t layer)
{
    uint32_t at = 0;
    while (at < s->n_layers && s->layers[at] != layer)
        at++;
    return at;
}

// Which of a layer's matrices are those of the plane's heads. Ranks hold as many heads each, or,
// where there are more ranks than heads, several neighbours the same one: how engines split K and V
// (vLLM's QKVParallelLinear).
static int select_heads(const struct kvd_rotset *s, const struct kvd_layout *l, uint32_t kv_heads,
                        uint32_t *first, uint32_t *count, struct kvd_error *err)
{
    uint32_t size = KVD_MAX(l->tp_size, 1u);
    *first = 0;
    *count = 1;
    if (s->heads == 1) // for all heads
        return KVD_OK;
    if (s->heads % size && size % s->heads)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "rotation set %s is for %u kv heads, and neither this nor tp_size, %u, "
                        "divides the other",
                        s->model, s->heads, size);
    *count = KVD_MAX(s->heads / size, 1u);
    *first = (uint32_t)((uint64_t)l->tp_rank * s->heads / size);
    if (*count == kv_heads)
        return KVD_OK;
    if (size == 1)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "rotation set %s is for %u kv heads, the layout has %u; a part of a model "
                        "names its tp_rank and tp_size",
                        s->model, s->heads, kv_heads);
    return kvd_fail(err, KVD_E_PRECONDITION,
                    "rotation set %s is for %u kv heads, of which rank %u of %u holds %u, and the "
                    "layout has %u",
                    s->model, s->heads, l->tp_rank, size, *count, kv_heads);
}

// Whether a set of transforms serves a layer in these codecs: those of its mark, or, without one, K
// in the set's.
static int check_codec(const struct kvd_rotset *s, uint32_t layer, struct kvd_codecs codec,
                       struct kvd_error *err)
{
    const struct kvd_mark *m = kvd_mark_of(s, layer);
    char has[KVD_CODECS_TEXT], wants[KVD_CODECS_TEXT];
    if (m && (m->codec.k != codec.k || m->codec.v != codec.v))
        return kvd_fail(
            err, KVD_E_PRECONDITION,
            "set %s marks layer %u for codec %s, and the layout has it in %s: name this "
            "codec, or none, for its plane",
            s->model, layer, kvd_codecs_name(m->codec, wants), kvd_codecs_name(codec, has));
    if (!m && codec.k != s->transforms->codec)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "set %s has transforms for codec %s, the layout's K is in %s", s->model,
                        kvd_codec_name(s->transforms->codec), kvd_codec_name(codec.k));
    return KVD_OK;
}

// All of a set's terms, where they are; of layers of transforms that have rotations, these.
static struct kvd_rotation_data whole(const struct kvd_rotset *s, bool rotated)
{
    struct kvd_rotation_data d = {.dim_k = s->dim_k, .dim_v = s->dim_v};
    const struct kvd_transforms *t = s->transforms;
    if (t && rotated) {
        d.k = t->k;
        d.v = t->v;
        return d;
    }
    if (t) {
        d.k = t->k;
        d.v = t->v;
        d.k_inverse = t->k_inverse;
        d.v_inverse = t->v_inverse;
        d.k_mean = t->k_mean;
        d.v_mean = t->v_mean;
        d.k_sigma = t->k_sigma;
        d.k_bits = t->k_bits;
        return d;
    }
    d.k = s->k;
    d.v = s->v;
    d.clip_k = s->clip_k;
    d.clip_v = s->clip_v;
    d.gain_k = s->gain_k;
    d.gain_v = s->gain_v;
    return d;
}

int kvd_rotset_select(const struct kvd_rotset *s, const struct kvd_layout *layout, uint32_t plane,
                      struct kvd_rotation_data *out, struct kvd_error *err)
{
    const struct kvd_plane *g = &layout->planes[plane];
    uint64_t at[KVD_MAX_LAYERS]; // in the set, of the plane's layers
    uint32_t n = 0, first, heads;
    bool rotated = false;
    if (s->dim_k != g->head_dim_k || s->dim_v != g->head_dim_v)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "rotation set %s is for head_dim %u/%u, the layout has %u/%u", s->model,
                        s->dim_k, s->dim_v, g->head_dim_k, g->head_dim_v);
    if (select_heads(s, layout, g->kv_heads, &first, &heads, err))
        return err->code;
    for (uint32_t l = 0; l < layout->n_layers; l++) {
        if (layout->plane_of[l] != plane)
            continue;
        at[n] = layer_index(s, layout->layers[l]);
        if (at[n++] == s->n_layers)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "rotation set %s has no layer %u; it has %u layers from %u to %u",
                            s->model, layout->layers[l], s->n_layers, s->layers[0],
                            s->layers[s->n_layers - 1]);
        if (s->transforms && check_codec(s, layout->layers[l], g->codec, err))
            return err->code;
        rotated = s->transforms && kvd_layer_rotated(s, at[n - 1]); // as all of the plane then are
    }
    struct kvd_rotation_data d = {.n_layers = n,
                                  .heads = heads,
                                  .dim_k = s->dim_k,
                                  .dim_v = s->dim_v,
                                  .scale_k = s->scale_k,
                                  .scale_v = rotated ? KVD_SCALE_LEAST_SQUARES : s->scale_v};
    struct kvd_rotation_data of_set = whole(s, rotated);
    struct kvd_term from[KVD_TERMS], all[KVD_TERMS];
    kvd_rotation_terms(&of_set, from);
    kvd_rotation_terms(&d, all);
    for (size_t i = 0; i < KVD_TERMS; i++) {
        uint64_t values = heads * all[i].each; // of a layer
        float *to = *from[i].at ? malloc(n * values * sizeof(float)) : NULL;
        *all[i].at = to;
        if (!*from[i].at)
            continue;
        if (!to) {
            kvd_rotation_data_deinit(&d);
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
        }
        for (uint32_t l = 0; l < n; l++)
            memcpy(to + l * values, *from[i].at + (at[l] * s->heads + first) * all[i].each,
                   values * sizeof(float));
    }
    *out = d;
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
