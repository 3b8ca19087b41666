// TensorRefs: from what a worker says to memory that is surely inside its buffer.
#include "daemon/sched/op.h"
#include "daemon/session/buffer.h"

enum { MAX_INLINE_REPLY = 60 << 20 };

// Fills strides in and computes where the last element ends. KVD_E_INVALID on overflow or
// misalignment.
static int lay_out(const Kvd__V1__TensorRef *ref, struct kvd_shape n, const char *name,
                   uint32_t item, struct kvd_tensor *t, uint64_t *end, struct kvd_error *err)
{
    uint64_t size = ref->dtype == KVD__V1__DTYPE__DTYPE_F32 ? 4 : 2;
    uint64_t part, sum = ref->offset, row = n.dim * size;
    t->dtype = size == 4 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16;
    t->head_stride = ref->head_stride ? ref->head_stride : row;
    bool bad = __builtin_mul_overflow(t->head_stride, n.heads, &t->token_stride);
    if (ref->token_stride)
        t->token_stride = ref->token_stride;
    bad |= __builtin_mul_overflow(t->token_stride, n.tokens, &t->layer_stride);
    if (ref->layer_stride)
        t->layer_stride = ref->layer_stride;
    bad |= __builtin_mul_overflow(t->layer_stride, n.layers - 1, &part) ||
           __builtin_add_overflow(sum, part, &sum);
    bad |= __builtin_mul_overflow(t->token_stride, n.tokens - 1, &part) ||
           __builtin_add_overflow(sum, part, &sum);
    bad |= __builtin_mul_overflow(t->head_stride, n.heads - 1, &part) ||
           __builtin_add_overflow(sum, part, &sum);
    bad |= __builtin_add_overflow(sum, row, &sum);
    if (bad)
        return kvd_fail(err, KVD_E_INVALID, "items[%u].%s: offset and strides overflow 64 bits",
                        item, name);
    if ((ref->offset | t->head_stride | t->token_stride | t->layer_stride) % size)
        return kvd_fail(err, KVD_E_INVALID,
                        "items[%u].%s: offset and strides must be multiples of the %" PRIu64
                        "-byte elements",
                        item, name, size);
    *end = sum;
    return KVD_OK;
}

int kvd_work_hold_buffer(struct kvd_work *w, struct kvd_buffer *b, struct kvd_error *err)
{
    for (uint32_t i = 0; i < w->n_buffers; i++)
        if (w->buffers[i] == b)
            return KVD_OK;
    if (w->n_buffers == w->cap_buffers) {
        uint32_t cap = w->cap_buffers ? 2 * w->cap_buffers : 8;
        struct kvd_buffer **grown = realloc(w->buffers, cap * sizeof(*grown));
        if (!grown)
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        w->buffers = grown;
        w->cap_buffers = cap;
    }
    b->refs++;
    w->buffers[w->n_buffers++] = b;
    return KVD_OK;
}

int kvd_work_note_span(struct kvd_work *w, const struct kvd_buffer *b, uint64_t offset,
                       const struct kvd_overlap *span, struct kvd_error *err)
{
    if (w->n_spans == w->cap_spans) {
        uint32_t cap = w->cap_spans ? 2 * w->cap_spans : 16;
        struct kvd_overlap *grown = realloc(w->spans, cap * sizeof(*grown));
        if (!grown)
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        w->spans = grown;
        w->cap_spans = cap;
    }
    bool memfd = b->kind == KVD_MEMORY_MEMFD;
    w->spans[w->n_spans] = *span;
    w->spans[w->n_spans].memory = memfd ? 1 + b->inode : 0; // 0: the GPU's, which has one of each
    w->spans[w->n_spans++].begin = memfd ? offset : (uint64_t)(uintptr_t)b->data + offset;
    return KVD_OK;
}

static int in_buffer(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__TensorRef *ref,
                     uint64_t end, const struct kvd_overlap *span, struct kvd_tensor *out,
                     struct kvd_error *err)
{
    const char *name = span->name;
    uint32_t item = span->item;
    struct kvd_buffer *b = kvd_session_want_buffer(s, ref->buffer, err);
    if (!b)
        return kvd_fail_in(err, "items[%u].%s", item, name);
    if (end > b->size)
        return kvd_fail(err, KVD_E_INVALID,
                        "items[%u].%s reaches to byte %" PRIu64 ", but buffer %" PRIu64
                        " has %" PRIu64,
                        item, name, end, b->id, b->size);
    out->data = b->data + ref->offset;
    out->on_device = b->kind != KVD_MEMORY_MEMFD;
    int rc = kvd_work_hold_buffer(w, b, err);
    return rc ? rc : kvd_work_note_span(w, b, ref->offset, span, err);
}

static struct kvd_overlap span_of(const struct kvd_tensor *t, struct kvd_shape n, bool written,
                                  const char *name, uint32_t item)
{
    return (struct kvd_overlap){.row = (uint64_t)n.dim * (t->dtype == KVD_DTYPE_F32 ? 4 : 2),
                                .dims = {{n.layers, t->layer_stride},
                                         {n.tokens, t->token_stride},
                                         {n.heads, t->head_stride}},
                                .written = written,
                                .name = name,
                                .item = item};
}

int kvd_work_fence(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__Fence *f, bool written,
                   struct kvd_fence *out, struct kvd_error *err)
{
    const char *name = written ? "signal" : "wait";
    if (!f)
        return KVD_OK;
    struct kvd_buffer *b = kvd_session_want_buffer(s, f->buffer, err);
    if (!b)
        return kvd_fail_in(err, "%s", name);
    if (b->kind != KVD_MEMORY_MEMFD)
        return kvd_fail(err, KVD_E_INVALID, "%s: a fence lies in a memfd, not in GPU memory", name);
    if (f->offset % sizeof(uint32_t) || b->size < sizeof(uint32_t) ||
        f->offset > b->size - sizeof(uint32_t))
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: offset %" PRIu64
                        " is not that of an aligned 32-bit word in a buffer of %" PRIu64 " "
                        "bytes",
                        name, f->offset, b->size);
    out->word = (_Atomic uint32_t *)(void *)(b->data + f->offset);
    out->value = f->value;
    struct kvd_overlap span = {
        .row = sizeof(uint32_t), .written = written, .name = name, .item = KVD_OVERLAP_NO_ITEM};
    int rc = kvd_work_hold_buffer(w, b, err);
    // One word may be waited for and then be set on: it is read no more by then.
    return rc || !written ? rc : kvd_work_note_span(w, b, f->offset, &span, err);
}

int kvd_work_tensor_in(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__TensorRef *ref,
                       struct kvd_shape shape, const char *name, uint32_t item,
                       struct kvd_tensor *out, struct kvd_error *err)
{
    uint64_t end = 0;
    if (!ref)
        return kvd_fail(err, KVD_E_INVALID, "items[%u].%s is missing", item, name);
    int rc = lay_out(ref, shape, name, item, out, &end, err);
    if (rc)
        return rc;
    struct kvd_overlap span = span_of(out, shape, false, name, item);
    if (ref->buffer)
        return in_buffer(w, s, ref, end, &span, out, err);
    if (end > ref->inline_data.len)
        return kvd_fail(
            err, KVD_E_INVALID,
            "items[%u].%s wants %" PRIu64 " bytes [%u][%u][%u][%u], inline_data has %zu", item,
            name, end, shape.layers, shape.tokens, shape.heads, shape.dim, ref->inline_data.len);
    out->data = ref->inline_data.data + ref->offset;
    return KVD_OK;
}

int kvd_work_tensor_out(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__TensorRef *ref,
                        struct kvd_shape shape, const char *name, uint32_t item,
                        struct kvd_tensor *out, uint8_t **inline_out, size_t *inline_len,
                        struct kvd_error *err)
{
    Kvd__V1__TensorRef none = KVD__V1__TENSOR_REF__INIT;
    uint64_t end = 0;
    ref = ref ? ref : &none;
    int rc = lay_out(ref, shape, name, item, out, &end, err);
    if (rc)
        return rc;
    struct kvd_overlap span = span_of(out, shape, true, name, item);
    if (ref->buffer)
        return in_buffer(w, s, ref, end, &span, out, err);
    if (ref->offset || ref->head_stride || ref->token_stride || ref->layer_stride)
        return kvd_fail(
            err, KVD_E_INVALID,
            "items[%u].%s: an output without a buffer is dense; leave offset and strides 0", item,
            name);
    w->inline_bytes += end;
    if (w->inline_bytes > MAX_INLINE_REPLY)
        return kvd_fail(
            err, KVD_E_LIMIT,
            "the reply would have more than %d bytes; register a buffer for %s, or split the call",
            MAX_INLINE_REPLY, name);
    rc = kvd_call_reserve(w->call, end, err);
    if (rc)
        return rc;
    *inline_out = malloc(end);
    if (!*inline_out)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    *inline_len = end;
    out->data = *inline_out;
    return KVD_OK;
}
