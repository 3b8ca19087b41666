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
#include "pool/internal.h"

struct span {
    uint64_t begin, end; // tokens
};

static uint64_t demoted_to(const struct kvd_geometry *g, uint64_t hist_end, uint64_t length)
{
    uint64_t keep = (uint64_t)g->sink + g->recent;
    if (length <= keep)
        return hist_end;
    return KVD_MAX(hist_end, g->sink + (length - keep) / KVD_CHUNK_TOKENS * KVD_CHUNK_TOKENS);
}

static int check_order(const struct kvd_pool *pool, const struct region_seq *s, uint64_t position,
                       uint32_t tokens, uint32_t layer_begin, uint32_t layer_count, bool *replayed,
                       struct kvd_error *err)
{
    uint32_t layers = pool->geom[s->geom].g.n_layers;
    unsigned long long id = seq_id(pool, s), length = s->length;
    *replayed = false;
    if (s->pending_layers == 0) {
        if (position < s->length && position + tokens == s->length) {
            *replayed = true;
            return KVD_OK;
        }
        if (position != s->length)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "append at position %llu, but sequence %llu has length %llu; append "
                            "there or truncate first",
                            (unsigned long long)position, id, length);
        if (layer_begin != 0)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "append to sequence %llu at %llu starts with layer %u; layers are "
                            "filled in order from 0",
                            id, length, layer_begin);
        if (s->length + tokens > KVD_MAX_LENGTH)
            return kvd_fail(err, KVD_E_LIMIT, "sequence %llu would have more than %d tokens", id,
                            KVD_MAX_LENGTH);
        return KVD_OK;
    }
    if (position != s->length || position + tokens != s->pending_length)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %llu is in the middle of an append of %llu tokens at %llu (%u of "
                        "%u layers); finish it "
                        "or truncate to %llu first",
                        id, (unsigned long long)(s->pending_length - s->length), length,
                        s->pending_layers, layers, length);
    if (layer_begin + layer_count <= s->pending_layers) {
        *replayed = true;
        return KVD_OK;
    }
    if (layer_begin != s->pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "append to sequence %llu at %llu has filled %u layers; the next call must "
                        "start with layer %u, "
                        "not %u",
                        id, length, s->pending_layers, s->pending_layers, layer_begin);
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
    int rc = kvd_pool_page_alloc(pool, s->ns, s->geom, kind, &page, err);
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
    uint32_t ring = kvd_geometry_ring(&pool->geom[s->geom].g);
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
    const struct kvd_geometry *g = &pool->geom[s->geom].g;
    uint32_t sink_pages = (g->sink + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS;
    uint64_t hist = a->new_hist_end - a->hist_end;
    a->changes =
        calloc(sink_pages + kvd_geometry_ring(g) / KVD_PAGE_TOKENS + hist / KVD_PAGE_TOKENS + 4,
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

int kvd_pool_append_begin(struct kvd_pool *pool, uint64_t seq, uint64_t position, uint32_t tokens,
                          uint32_t layer_begin, uint32_t layer_count, struct kvd_pool_append *out,
                          struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, seq);
    *out = (struct kvd_pool_append){
        .seq = seq, .layer_begin = layer_begin, .layer_count = layer_count};
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    int rc = check_order(pool, s, position, tokens, layer_begin, layer_count, &out->replayed, err);
    if (rc || out->replayed)
        return rc;
    out->length = s->length;
    out->hist_end = s->hist_end;
    out->new_length = position + tokens;
    out->new_hist_end = demoted_to(&pool->geom[s->geom].g, s->hist_end, out->new_length);
    if (s->pending_layers)
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
    struct region_seq *s = &pool->seq[(uint32_t)a->seq];
    for (uint32_t i = 0; i < a->n_changes; i++)
        if (a->changes[i].old_page != KVD_POOL_NONE)
            kvd_pool_page_unref(pool, a->changes[i].old_page);
    free(KVD_TAKE(a->changes));
    a->n_changes = 0;
    s->pending_length = a->new_length;
    s->pending_hist_end = a->new_hist_end;
    s->pending_layers = a->layer_begin + a->layer_count;
    if (s->pending_layers == pool->geom[s->geom].g.n_layers) {
        seq_set_length(pool, s, a->new_length);
        s->hist_end = a->new_hist_end;
        s->pending_layers = 0;
    }
}

void kvd_pool_append_abort(struct kvd_pool *pool, struct kvd_pool_append *a)
{
    struct region_seq *s = &pool->seq[(uint32_t)a->seq];
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
static bool window_damaged(const struct kvd_geometry *g, const struct region_seq *s, uint64_t keep)
{
    uint32_t ring = kvd_geometry_ring(g);
    return s->pending_layers && s->pending_length > ring + s->hist_end && keep > s->hist_end &&
           s->length > s->hist_end;
}

int kvd_pool_truncate(struct kvd_pool *pool, uint64_t seq, uint64_t length, struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    const struct kvd_geometry *g = &pool->geom[s->geom].g;
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
