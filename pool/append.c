// How a sequence grows and shrinks.
//
// A sequence of length T is sink [0, min(T, S)), history [S, H) and recent window [H, T), with S
// the sink size and R the recent size. T grows by appends; H follows in whole chunks: H = S + 16 *
// floor((T - S - R) / 16) once T > S + R, so the window has R to R + 15 tokens. Token t >= S of the
// window lies in ring slot (t - S) mod ring.
//
// An append fills layers in ascending order, perhaps over several calls. The first call takes all
// pages, for all layers, and makes private copies of shared pages that it will write. Layers that
// are filled are at (T', H'), the others at (T, H); when the last is filled, T and H become T' and
// H'.
//
// The last append of a sequence is remembered by who made it and its request, and nothing else is
// taken for a repeat: that the position fits says nothing about whose tokens are there, nor which.
// Forks do not inherit it. A truncation keeps it, so that a repeat that comes after it is refused
// instead of being applied once more.
#include "pool/internal.h"

struct span {
    uint64_t begin, end; // tokens
};

static uint64_t demoted_to(const struct kvd_plane *g, uint64_t hist_end, uint64_t length)
{
    uint64_t keep = (uint64_t)g->sink + g->recent;
    if (length <= keep)
        return hist_end;
    return KVD_MAX(hist_end, g->sink + (length - keep) / KVD_CHUNK_TOKENS * KVD_CHUNK_TOKENS);
}

// Whether an append names itself as the last one that was applied.
static bool is_last(const struct region_append *last, const struct kvd_pool_append_request *by)
{
    return by->request && by->request == last->request && by->appender == last->appender;
}

// The last append, sent again: it must be the same, and the sequence still as it left it.
static int check_repeat(const struct kvd_pool *pool, const struct region_seq *s,
                        const struct kvd_pool_append_request *by, struct kvd_error *err)
{
    const struct region_append *last = &s->last;
    uint64_t end = by->position + by->tokens;
    uint32_t filled = by->layer_begin + by->layer_count;
    bool same = by->position == last->position && by->tokens == last->tokens &&
                by->layer_begin == last->layer_begin && by->layer_count == last->layer_count;
    bool whole = filled == pool->layout[s->layout].l.n_layers;
    bool there = whole ? s->pending_layers == 0 && s->length == end
                       : s->pending_layers == filled && s->pending_length == end;
    if (same && there)
        return KVD_OK;
    return kvd_fail(
        err, KVD_E_PRECONDITION,
        "request %llu appended %u tokens at %llu to layers %u to %u of sequence %llu%s; "
        "another append wants another request id",
        (unsigned long long)by->request, last->tokens, (unsigned long long)last->position,
        last->layer_begin, last->layer_begin + last->layer_count - 1,
        (unsigned long long)seq_id(pool, s), same ? ", which was truncated since" : "");
}

static int check_order(const struct kvd_pool *pool, const struct region_seq *s,
                       const struct kvd_pool_append_request *by, struct kvd_error *err)
{
    uint32_t layers = pool->layout[s->layout].l.n_layers;
    unsigned long long id = seq_id(pool, s), length = s->length;
    if (s->pending_layers == 0) {
        if (by->position != s->length)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "append at position %llu, but sequence %llu has length %llu; append "
                            "there or truncate first",
                            (unsigned long long)by->position, id, length);
        if (by->layer_begin != 0)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "append to sequence %llu at %llu starts with layer %u; layers are "
                            "filled in order from 0",
                            id, length, by->layer_begin);
        if (s->length + by->tokens > KVD_MAX_LENGTH)
            return kvd_fail(err, KVD_E_LIMIT, "sequence %llu would have more than %d tokens", id,
                            KVD_MAX_LENGTH);
        return KVD_OK;
    }
    if (by->position != s->length || by->position + by->tokens != s->pending_length)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %llu is in the middle of an append of %llu tokens at %llu (%u of "
                        "%u layers); finish it "
                        "or truncate to %llu first",
                        id, (unsigned long long)(s->pending_length - s->length), length,
                        s->pending_layers, layers, length);
    if (by->layer_begin != s->pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "append to sequence %llu at %llu has filled %u layers; the next call must "
                        "start with layer %u, "
                        "not %u",
                        id, length, s->pending_layers, s->pending_layers, by->layer_begin);
    return KVD_OK;
}

// Makes `entry` of a table a page that nobody else refers to, and notes the change.
static int want_page(struct kvd_pool *pool, struct region_seq *s, enum kvd_pool_kind kind,
                     uint32_t entry, struct kvd_pool_append *a, struct kvd_error *err)
{
    struct region_table *t = &s->table[kind];
    uint32_t old = table_get(pool, t, entry);
    if (old != KVD_POOL_NONE && pool->page[old].refs == 1)
        return KVD_OK;
    uint32_t page;
    int rc = kvd_pool_page_alloc(pool, s->ns, s->layout, kind, &page, err);
    if (rc)
        return rc;
    // Room for the change was made by append_begin.
    rc = table_set(pool, t, entry, page, err);
    if (rc) {
        kvd_pool_page_unref(pool, page);
        return rc;
    }
    a->changes[a->n_changes++] =
        (struct kvd_pool_change){.kind = kind, .entry = entry, .old_page = old, .new_page = page};
    return KVD_OK;
}

static int want_pages(struct kvd_pool *pool, struct region_seq *s, enum kvd_pool_kind kind,
                      struct span span, uint32_t first_entry, struct kvd_pool_append *a,
                      struct kvd_error *err)
{
    if (span.begin >= span.end)
        return KVD_OK;
    for (uint64_t p = span.begin / KVD_PAGE_TOKENS; p <= (span.end - 1) / KVD_PAGE_TOKENS; p++) {
        int rc = want_page(pool, s, kind, first_entry + (uint32_t)p, a, err);
        if (rc)
            return rc;
    }
    return KVD_OK;
}

static int want_ring(struct kvd_pool *pool, struct region_seq *s, struct span span,
                     uint32_t first_entry, struct kvd_pool_append *a, struct kvd_error *err)
{
    uint32_t ring = kvd_plane_ring(&pool->layout[s->layout].l.planes[0]);
    if (span.begin >= span.end)
        return KVD_OK;
    uint64_t begin = span.begin % ring, n = span.end - span.begin;
    uint64_t head = KVD_MIN(n, ring - begin);
    int rc =
        want_pages(pool, s, KVD_POOL_BF16, (struct span){begin, begin + head}, first_entry, a, err);
    if (rc == KVD_OK)
        rc = want_pages(pool, s, KVD_POOL_BF16, (struct span){0, n - head}, first_entry, a, err);
    return rc;
}

static int reserve(struct kvd_pool *pool, struct region_seq *s, struct kvd_pool_append *a,
                   struct kvd_error *err)
{
    const struct kvd_plane *g = &pool->layout[s->layout].l.planes[0];
    uint32_t sink_pages = (g->sink + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS;
    uint64_t hist = a->new_hist_end - a->hist_end;
    a->changes =
        calloc(sink_pages + kvd_plane_ring(g) / KVD_PAGE_TOKENS + hist / KVD_PAGE_TOKENS + 4,
               sizeof(*a->changes));
    if (!a->changes)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct span sink = {a->length, KVD_MIN(a->new_length, g->sink)};
    struct span codes = {a->hist_end - g->sink, a->new_hist_end - g->sink};
    uint64_t ring_begin = KVD_MAX(KVD_MAX(a->new_hist_end, a->length), g->sink);
    struct span ring = {ring_begin - g->sink,
                        a->new_length > g->sink ? a->new_length - g->sink : 0};
    int rc = want_pages(pool, s, KVD_POOL_BF16, sink, 0, a, err);
    if (rc == KVD_OK)
        rc = want_pages(pool, s, KVD_POOL_CODEC, codes, 0, a, err);
    if (rc == KVD_OK)
        rc = want_ring(pool, s, ring, sink_pages, a, err);
    return rc;
}

int kvd_pool_append_begin(struct kvd_pool *pool, const struct kvd_pool_append_request *by,
                          struct kvd_pool_append *out, struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, by->seq);
    *out = (struct kvd_pool_append){.by = *by};
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu",
                        (unsigned long long)by->seq);
    const struct kvd_plane *g = &pool->layout[s->layout].l.planes[0];
    bool repeat = is_last(&s->last, by);
    int rc = repeat ? check_repeat(pool, s, by, err) : check_order(pool, s, by, err);
    if (rc)
        return rc;
    out->replayed = repeat;
    out->length = by->position;
    out->hist_end = repeat ? s->last.hist_end : s->hist_end;
    out->new_length = by->position + by->tokens;
    out->new_hist_end = demoted_to(g, out->hist_end, out->new_length);
    out->window_kept = repeat && out->new_length <= out->hist_end + kvd_plane_ring(g);
    if (repeat || s->pending_layers)
        return KVD_OK;
    // Eviction must not take the very sequence that grows.
    s->pins++;
    rc = reserve(pool, s, out, err);
    s->pins--;
    if (rc)
        kvd_pool_append_abort(pool, out);
    return rc;
}

void kvd_pool_append_commit(struct kvd_pool *pool, struct kvd_pool_append *a)
{
    struct region_seq *s = &pool->seq[(uint32_t)a->by.seq];
    for (uint32_t i = 0; i < a->n_changes; i++)
        if (a->changes[i].old_page != KVD_POOL_NONE)
            kvd_pool_page_unref(pool, a->changes[i].old_page);
    free(KVD_TAKE(a->changes));
    a->n_changes = 0;
    s->pending_length = a->new_length;
    s->pending_hist_end = a->new_hist_end;
    s->pending_layers = a->by.layer_begin + a->by.layer_count;
    s->last = (struct region_append){.appender = a->by.appender,
                                     .request = a->by.request,
                                     .position = a->by.position,
                                     .hist_end = a->hist_end,
                                     .tokens = a->by.tokens,
                                     .layer_begin = a->by.layer_begin,
                                     .layer_count = a->by.layer_count};
    if (s->pending_layers == pool->layout[s->layout].l.n_layers) {
        seq_set_length(pool, s, a->new_length);
        s->hist_end = a->new_hist_end;
        s->pending_layers = 0;
    }
}

void kvd_pool_append_abort(struct kvd_pool *pool, struct kvd_pool_append *a)
{
    struct region_seq *s = &pool->seq[(uint32_t)a->by.seq];
    while (a->n_changes > 0) {
        const struct kvd_pool_change *c = &a->changes[--a->n_changes];
        table_set(pool, &s->table[c->kind], c->entry, c->old_page, NULL);
        kvd_pool_page_unref(pool, c->new_page);
    }
    free(KVD_TAKE(a->changes));
    // Entries that were added at the end are holes now.
    for (int k = 0; k < KVD_POOL_KINDS; k++) {
        uint32_t n = s->table[k].count;
        while (n && table_get(pool, &s->table[k], n - 1) == KVD_POOL_NONE)
            n--;
        table_truncate(pool, &s->table[k], n);
    }
}

// Tokens of the window that an unfinished append has already overwritten in some layer.
static bool window_damaged(const struct kvd_plane *g, const struct region_seq *s, uint64_t keep)
{
    uint32_t ring = kvd_plane_ring(g);
    return s->pending_layers && s->pending_length > ring + s->hist_end && keep > s->hist_end &&
           s->length > s->hist_end;
}

int kvd_pool_truncate(struct kvd_pool *pool, uint64_t seq, uint64_t length, struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    const struct kvd_plane *g = &pool->layout[s->layout].l.planes[0];
    if (length > s->length)
        return kvd_fail(
            err, KVD_E_INVALID, "cannot truncate sequence %llu of length %llu to %llu tokens",
            (unsigned long long)seq, (unsigned long long)s->length, (unsigned long long)length);
    if (window_damaged(g, s, length))
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "an unfinished append to sequence %llu has overwritten part of its recent "
                        "window; finish the "
                        "append or truncate to at most %llu",
                        (unsigned long long)seq, (unsigned long long)s->hist_end);
    s->pending_layers = 0;
    if (length < s->hist_end)
        s->hist_end = KVD_MAX(length, g->sink);
    seq_set_length(pool, s, length);
    uint32_t sink_pages = (g->sink + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS;
    table_truncate(pool, &s->table[KVD_POOL_CODEC],
                   (uint32_t)kvd_div_up(s->hist_end - g->sink, KVD_PAGE_TOKENS));
    if (length <= g->sink)
        table_truncate(pool, &s->table[KVD_POOL_BF16],
                       KVD_MIN(sink_pages, (uint32_t)kvd_div_up(length, KVD_PAGE_TOKENS)));
    return KVD_OK;
}
