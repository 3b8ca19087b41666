// Whether a call's tensors have the session's shapes and lie inside their buffers, before anything
// is sent: an error here names the item, the tensor, what is expected and what was given.
#include <math.h>

#include "client/lib/client.h"
#include "proto/overlap.h"

enum role { INPUT, OUTPUT };

// What a call's tensors take of memory. kvd compares buffers that it has; over TCP it sees none.
struct spans {
    struct kvd_overlap *all; // NULL: they are not wanted
    uint32_t n, item;
};

// What a tensor is to be.
struct expected {
    const char *name;
    uint32_t layers, tokens, heads,
        dim; // dim 1: an lse, whose elements are f32 whatever dtype says
    enum role role;
    bool bf16; // nothing else
    struct spans *spans;
};

static int check_dtype(const kvd_tensor_ref *t, const struct expected *x, struct kvd_error *err)
{
    if (t->dtype != KVD_BF16 && t->dtype != KVD_F32)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: dtype is %d; KVD_BF16 (0) and KVD_F32 (1) are known", x->name,
                        (int)t->dtype);
    if (x->bf16 && t->dtype != KVD_BF16)
        return kvd_fail(err, KVD_E_INVALID, "%s: dtype is f32; K and V are bf16", x->name);
    return KVD_OK;
}

static int check_tensor(const kvd_client *c, const kvd_tensor_ref *t, const struct expected *x,
                        struct kvd_error *err)
{
    uint64_t size = x->dim == 1 || t->dtype == KVD_F32 ? 4 : 2, row = size * x->dim, token, layer;
    if (!t->buffer)
        return kvd_fail(err, KVD_E_INVALID, "%s is missing: it has no buffer", x->name);
    if (t->buffer->client != c)
        return kvd_fail(err, KVD_E_INVALID, "%s: its buffer belongs to another client", x->name);
    int rc = check_dtype(t, x, err);
    if (rc)
        return rc;
    uint64_t head = t->head_stride ? t->head_stride : row;
    bool over = __builtin_mul_overflow(head, x->heads, &token);
    token = t->token_stride ? t->token_stride : token;
    over |= __builtin_mul_overflow(token, x->tokens, &layer);
    layer = t->layer_stride ? t->layer_stride : layer;
    struct kvd_overlap span = {.memory = (uint64_t)(uintptr_t)t->buffer,
                               .begin = t->offset,
                               .row = row,
                               .dims = {{x->layers, layer}, {x->tokens, token}, {x->heads, head}},
                               .written = x->role == OUTPUT,
                               .name = x->name,
                               .item = x->spans->item};
    uint64_t end = row, part;
    for (int i = 0; i < 3; i++)
        over |= __builtin_mul_overflow(span.dims[i].stride, span.dims[i].count - 1, &part) ||
                __builtin_add_overflow(end, part, &end);
    if (over || end > UINT64_MAX - t->offset)
        return kvd_fail(err, KVD_E_INVALID, "%s: offset and strides overflow 64 bits", x->name);
    if ((t->offset | head | token | layer) % size)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: offset and strides must be multiples of its elements' %d bytes",
                        x->name, (int)size);
    if (t->offset > t->buffer->size || end > t->buffer->size - t->offset)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: %s [%u layers][%u tokens][%u heads][%u] takes %llu bytes from offset "
                        "%llu on; the buffer has %llu bytes",
                        x->name, size == 4 ? "f32" : "bf16", x->layers, x->tokens, x->heads, x->dim,
                        (unsigned long long)end, (unsigned long long)t->offset,
                        (unsigned long long)t->buffer->size);
    if (x->spans->all)
        x->spans->all[x->spans->n++] = span;
    rc = kvd_overlap_check(&span, 1, err);
    if (rc == KVD_E_INVALID) // with itself
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: strides of %llu (layers), %llu (tokens) and %llu (heads) bytes let "
                        "[%u][%u][%u] rows of %llu bytes overlap",
                        x->name, (unsigned long long)layer, (unsigned long long)token,
                        (unsigned long long)head, x->layers, x->tokens, x->heads,
                        (unsigned long long)row);
    return rc;
}

// Counts a call's layers, which have tensors of one shape.
static int check_layers(const kvd_client *c, kvd_layers l, uint32_t *count,
                        const struct kvd_layer_shape **shape, struct kvd_error *err)
{
    uint32_t n = (uint32_t)c->layout.n_layers;
    if (l.begin >= n || l.count > n - l.begin)
        return kvd_fail(err, KVD_E_INVALID, "layers %u to %llu are not all among the client's %u",
                        l.begin, (unsigned long long)l.begin + (l.count ? l.count - 1 : 0), n);
    *count = l.count ? l.count : n - l.begin;
    *shape = &c->shapes[l.begin];
    for (uint32_t i = 1; i < *count; i++)
        if (memcmp(*shape, *shape + i, sizeof(**shape)) != 0)
            return kvd_fail(err, KVD_E_INVALID,
                            "layers %u and %u of the client differ in heads or head_dim; they want "
                            "calls of their own",
                            l.begin, l.begin + i);
    return KVD_OK;
}

int kvd_check_attention(const kvd_attention *a, struct kvd_error *err)
{
    if (!isfinite(a->scale) || !isfinite(a->softcap) || a->softcap < 0)
        return kvd_fail(err, KVD_E_INVALID,
                        "attention: scale is %g and softcap %g; both must be finite, softcap not "
                        "negative",
                        (double)a->scale, (double)a->softcap);
    if (a->window > KVD_MAX_LENGTH)
        return kvd_fail(err, KVD_E_INVALID, "attention: window is %u; 0 (none) to %d are possible",
                        a->window, KVD_MAX_LENGTH);
    return KVD_OK;
}

static int check_range(const char *what, uint64_t begin, uint32_t tokens, struct kvd_error *err)
{
    if (tokens < 1 || tokens > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_INVALID, "%s is %u; 1 to %d are possible", what, tokens,
                        KVD_MAX_CALL_TOKENS);
    if (begin > KVD_MAX_LENGTH - tokens)
        return kvd_fail(err, KVD_E_INVALID,
                        "%u tokens from position %llu on; a sequence has at most %d", tokens,
                        (unsigned long long)begin, KVD_MAX_LENGTH);
    return KVD_OK;
}

static int check_kv(const kvd_client *c, uint32_t layers, const struct kvd_layer_shape *g,
                    const kvd_item *item, struct spans *spans, struct kvd_error *err)
{
    struct expected x = {.name = "k",
                         .layers = layers,
                         .tokens = item->tokens,
                         .heads = g->kv_heads,
                         .dim = g->dim_k,
                         .bf16 = true,
                         .spans = spans};
    int rc = check_tensor(c, &item->k, &x, err);
    x.name = "v";
    x.dim = g->dim_v;
    return rc ? rc : check_tensor(c, &item->v, &x, err);
}

static int check_qo(const kvd_client *c, uint32_t layers, const struct kvd_layer_shape *g,
                    const kvd_item *item, struct spans *spans, struct kvd_error *err)
{
    struct expected x = {.name = "q",
                         .layers = layers,
                         .tokens = item->tokens,
                         .heads = g->q_heads,
                         .dim = g->dim_q,
                         .spans = spans};
    int rc = check_tensor(c, &item->q, &x, err);
    x.name = "o";
    x.dim = g->dim_v;
    x.role = OUTPUT;
    if (rc == KVD_OK)
        rc = check_tensor(c, &item->o, &x, err);
    x.name = "lse";
    x.dim = 1;
    return rc || !item->lse.buffer ? rc : check_tensor(c, &item->lse, &x, err);
}

int kvd_check_compute(const kvd_client *c, kvd_call_kind kind, kvd_layers layers,
                      const kvd_attention *a, const kvd_item *items, uint32_t count,
                      struct kvd_error *err)
{
    uint32_t n = 0;
    uint64_t sum = 0;
    struct kvd_overlap *all KVD_FREE = c->remote ? calloc(count, 5 * sizeof(*all)) : NULL;
    struct spans spans = {.all = all};
    if (c->remote && count && !all)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (kind != KVD_CALL_APPEND && kind != KVD_CALL_ATTEND && kind != KVD_CALL_STEP)
        return kvd_fail(err, KVD_E_INVALID, "call %d is not known", (int)kind);
    const struct kvd_layer_shape *shape = NULL;
    int rc = check_layers(c, layers, &n, &shape, err);
    if (rc == KVD_OK)
        rc = kvd_check_attention(a, err);
    for (uint32_t i = 0; i < count && rc == KVD_OK; i++) {
        const kvd_item *item = &items[i];
        spans.item = i;
        rc = check_range("tokens", kind == KVD_CALL_ATTEND ? 0 : item->position, item->tokens, err);
        if (rc == KVD_OK && kind != KVD_CALL_ATTEND)
            rc = check_kv(c, n, shape, item, &spans, err);
        if (rc == KVD_OK && kind != KVD_CALL_APPEND)
            rc = check_qo(c, n, shape, item, &spans, err);
        if (rc)
            return kvd_fail_in(err, "items[%u]", i);
        sum += item->tokens;
    }
    if (rc == KVD_OK && sum > KVD_MAX_CALL_TOKENS)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%llu tokens in one call; at most %d are possible: split it",
                        (unsigned long long)sum, KVD_MAX_CALL_TOKENS);
    return rc ? rc : kvd_overlap_check(all, spans.n, err);
}

int kvd_check_rotate(const kvd_client *c, kvd_row_kind kind, kvd_layers layers, uint32_t rows,
                     uint32_t heads, const kvd_tensor_ref *x, const kvd_tensor_ref *y,
                     struct kvd_error *err)
{
    struct spans none = {0}; // y is written when all of x has been sent
    const struct kvd_layer_shape *g = NULL;
    uint32_t n;
    if (!x || !y)
        return kvd_fail(err, KVD_E_INVALID, "%s is missing", x ? "y" : "x");
    if ((int)kind < KVD_KEYS || (int)kind > KVD_VALUES)
        return kvd_fail(err, KVD_E_INVALID,
                        "kind is %d; it must be KVD_KEYS, KVD_QUERIES or KVD_VALUES", (int)kind);
    int rc = check_layers(c, layers, &n, &g, err);
    if (rc)
        return rc;
    struct expected shape = {.name = "x",
                             .spans = &none,
                             .layers = n,
                             .tokens = rows,
                             .heads = heads,
                             .dim = kind == KVD_VALUES ? g->dim_v : g->dim_k};
    rc = check_range("rows", 0, rows, err);
    if (rc == KVD_OK && heads != g->kv_heads && heads != g->q_heads)
        rc = kvd_fail(err, KVD_E_INVALID, "heads is %u; it must be kv_heads (%u) or q_heads (%u)",
                      heads, g->kv_heads, g->q_heads);
    if (rc == KVD_OK)
        rc = check_tensor(c, x, &shape, err);
    shape.name = "y";
    shape.role = OUTPUT;
    return rc ? rc : check_tensor(c, y, &shape, err);
}

int kvd_check_read(const kvd_client *c, kvd_layers layers, uint64_t begin, uint32_t count,
                   const kvd_tensor_ref *k, const kvd_tensor_ref *v, struct kvd_error *err)
{
    struct kvd_overlap all[2];
    struct spans spans = {.all = c->remote ? all : NULL, .item = KVD_OVERLAP_NO_ITEM};
    const struct kvd_layer_shape *g = NULL;
    uint32_t n;
    if (!k && !v)
        return kvd_fail(err, KVD_E_INVALID, "neither k nor v is wanted");
    int rc = check_layers(c, layers, &n, &g, err);
    if (rc)
        return rc;
    struct expected x = {.name = "k",
                         .layers = n,
                         .tokens = count,
                         .heads = g->kv_heads,
                         .dim = g->dim_k,
                         .role = OUTPUT,
                         .spans = &spans};
    rc = check_range("count", begin, count, err);
    if (rc == KVD_OK && k)
        rc = check_tensor(c, k, &x, err);
    x.name = "v";
    x.dim = g->dim_v;
    if (rc == KVD_OK && v)
        rc = check_tensor(c, v, &x, err);
    return rc ? rc : kvd_overlap_check(all, spans.n, err);
}

int kvd_check_dense(const char *name, const void *data, uint64_t bytes, uint64_t rows,
                    uint32_t heads, uint32_t dim, uint32_t size, struct kvd_error *err)
{
    uint64_t want = rows * heads * dim * size;
    uint32_t align = dim == 1 ? size : 16;
    if (!data || (uintptr_t)data % align)
        return kvd_fail(err, KVD_E_INVALID, "%s lies at %p; an address that %u divides is wanted",
                        name, data, align);
    if (bytes != want)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s has %llu bytes; %s [%llu slots x tokens][%u heads][%u] takes %llu",
                        name, (unsigned long long)bytes, size == 4 ? "f32" : "bf16",
                        (unsigned long long)rows, heads, dim, (unsigned long long)want);
    return KVD_OK;
}
