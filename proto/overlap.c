#include "proto/overlap.h"

// A tensor on its way down: as long as its bounds overlap another's it is taken apart by its
// widest stride, and what is left is looked at modulo that stride.
struct part {
    uint64_t begin, row;
    struct kvd_overlap_dim dims[3]; // widest first, without those of one
    uint32_t n_dims;
    const struct kvd_overlap *of;
};

// A piece of memory without a gap.
struct piece {
    uint64_t begin, end;
    const struct kvd_overlap *of;
};

static int widest_first(const void *a, const void *b)
{
    const struct kvd_overlap_dim *x = a, *y = b;
    return x->stride > y->stride ? -1 : x->stride < y->stride;
}

static int by_begin(const void *a, const void *b)
{
    const struct part *x = a, *y = b;
    if (x->of->memory != y->of->memory)
        return x->of->memory < y->of->memory ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static int pieces_by_begin(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static uint64_t span(const struct part *p, uint32_t from)
{
    uint64_t bytes = p->row;
    for (uint32_t i = from; i < p->n_dims; i++)
        bytes += (p->dims[i].count - 1) * p->dims[i].stride;
    return bytes;
}

static bool nested(const struct part *p)
{
    for (uint32_t i = 0; i < p->n_dims; i++)
        if (p->dims[i].stride < span(p, i + 1))
            return false;
    return true;
}

struct label {
    char text[48];
};

static struct label label(const struct kvd_overlap *o)
{
    struct label l;
    if (o->item == KVD_OVERLAP_NO_ITEM)
        snprintf(l.text, sizeof(l.text), "%s", o->name);
    else
        snprintf(l.text, sizeof(l.text), "items[%u].%s", o->item, o->name);
    return l;
}

static int take_apart(const struct kvd_overlap *o, struct part *p, struct kvd_error *err)
{
    *p = (struct part){.begin = o->begin, .row = o->row, .of = o};
    for (uint32_t i = 0; i < KVD_LEN(o->dims); i++)
        if (o->dims[i].count > 1)
            p->dims[p->n_dims++] = o->dims[i];
    qsort(p->dims, p->n_dims, sizeof(*p->dims), widest_first);
    if (!nested(p)) {
        if (o->written)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s, which is written: its strides let its own rows overlap",
                            label(o).text);
        p->row = span(p, 0); // read only, so that nothing is lost by taking it as solid
        p->n_dims = 0;
    }
    while (p->n_dims && p->dims[p->n_dims - 1].stride == p->row) // dense from there on
        p->row *= p->dims[--p->n_dims].count;
    return KVD_OK;
}

static int refuse(const struct kvd_overlap *a, const struct kvd_overlap *b, const char *how,
                  struct kvd_error *err)
{
    bool first = a->written && (!b->written || a < b); // of two, that which the call names first
    const struct kvd_overlap *written = first ? a : b, *other = first ? b : a;
    return kvd_fail(err, KVD_E_INVALID, "%s, which is written, %s %s", label(written).text, how,
                    label(other).text);
}

static int refuse_intricate(const struct part *parts, struct kvd_error *err)
{
    size_t i = 0;
    while (!parts[i].of->written)
        i++;
    return refuse(parts[i].of, parts[i ? 0 : 1].of,
                  "is interleaved, in too many pieces to tell them apart, with", err);
}

static int compare_pieces(struct piece *pieces, size_t n, struct kvd_error *err)
{
    const struct piece *any = NULL, *written = NULL; // those that reach farthest so far
    qsort(pieces, n, sizeof(*pieces), pieces_by_begin);
    for (const struct piece *p = pieces; p < pieces + n; p++) {
        if (any && p->of->written && p->begin < any->end)
            return refuse(p->of, any->of, "shares memory with", err);
        if (written && p->begin < written->end)
            return refuse(written->of, p->of, "shares memory with", err);
        any = !any || p->end > any->end ? p : any;
        if (p->of->written)
            written = !written || p->end > written->end ? p : written;
    }
    return KVD_OK;
}

// Looks at every piece of tensors that are interleaved in no regular way.
static int compare_all(const struct part *parts, size_t n, struct kvd_error *err)
{
    size_t total = 0, at = 0;
    for (size_t i = 0; i < n; i++) {
        struct part whole;
        size_t pieces = 1;
        take_apart(parts[i].of, &whole, NULL);
        for (uint32_t d = 0; d < whole.n_dims && pieces <= KVD_OVERLAP_ROWS; d++)
            pieces *= KVD_MIN(whole.dims[d].count, (uint64_t)KVD_OVERLAP_ROWS + 1);
        total += pieces;
        if (total > KVD_OVERLAP_ROWS)
            return refuse_intricate(parts, err);
    }
    struct piece *pieces KVD_FREE = calloc(total, sizeof(*pieces));
    if (!pieces)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < n; i++) {
        struct part w;
        take_apart(parts[i].of, &w, NULL);
        for (; w.n_dims < KVD_LEN(w.dims); w.n_dims++)
            w.dims[w.n_dims] = (struct kvd_overlap_dim){.count = 1};
        for (uint64_t a = 0; a < w.dims[0].count; a++)
            for (uint64_t b = 0; b < w.dims[1].count; b++)
                for (uint64_t c = 0; c < w.dims[2].count; c++) {
                    uint64_t begin = w.begin + a * w.dims[0].stride + b * w.dims[1].stride +
                                     c * w.dims[2].stride;
                    pieces[at++] = (struct piece){begin, begin + w.row, w.of};
                }
    }
    return compare_pieces(pieces, total, err);
}

// The stride by which all of them can be taken apart; 0: there is none.
static uint64_t common_stride(const struct part *parts, size_t n)
{
    uint64_t stride = 0;
    for (size_t i = 0; i < n; i++)
        stride = KVD_MAX(stride, parts[i].n_dims ? parts[i].dims[0].stride : 0);
    for (size_t i = 0; i < n; i++) {
        bool outer = parts[i].n_dims && parts[i].dims[0].stride == stride;
        if (span(&parts[i], outer) > stride)
            return 0;
    }
    return stride;
}

static int compare(struct part *parts, size_t n, uint32_t depth, struct kvd_error *err);

// Tensors whose bounds overlap, though their rows may not. Modulo a stride that they have in
// common they are as many smaller ones, which are apart if those are.
static int compare_cluster(struct part *parts, size_t n, uint32_t depth, struct kvd_error *err)
{
    uint64_t stride = depth < 3 ? common_stride(parts, n) : 0, first = parts[0].begin;
    if (!stride)
        return compare_all(parts, n, err);
    struct part *inner KVD_FREE = malloc(n * sizeof(*inner));
    if (!inner)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < n; i++) {
        struct part *p = &inner[i];
        *p = parts[i];
        p->begin = (p->begin - first) % stride;
        if (p->n_dims && p->dims[0].stride == stride)
            memmove(p->dims, p->dims + 1, --p->n_dims * sizeof(*p->dims));
        if (p->begin + span(p, 0) > stride) // it goes on at the first one's beginning
            return compare_all(parts, n, err);
    }
    return compare(inner, n, depth + 1, NULL) ? compare_all(parts, n, err) : KVD_OK;
}

static int compare(struct part *parts, size_t n, uint32_t depth, struct kvd_error *err)
{
    qsort(parts, n, sizeof(*parts), by_begin);
    for (size_t from = 0, to; from < n; from = to) {
        uint64_t end = parts[from].begin + span(&parts[from], 0);
        uint32_t written = parts[from].of->written;
        for (to = from + 1;
             to < n && parts[to].of->memory == parts[from].of->memory && parts[to].begin < end;
             to++) {
            end = KVD_MAX(end, parts[to].begin + span(&parts[to], 0));
            written += parts[to].of->written;
        }
        if (!written || to == from + 1)
            continue;
        int rc = compare_cluster(parts + from, to - from, depth, err);
        if (rc)
            return rc;
    }
    return KVD_OK;
}

int kvd_overlap_check(const struct kvd_overlap *all, size_t n, struct kvd_error *err)
{
    size_t written = 0;
    for (size_t i = 0; i < n; i++)
        written += all[i].written;
    if (written == 0)
        return KVD_OK;
    struct part *parts KVD_FREE = malloc(n * sizeof(*parts));
    int rc = parts ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < n && rc == KVD_OK; i++)
        rc = take_apart(&all[i], &parts[i], err);
    return rc ? rc : compare(parts, n, 0, err);
}
