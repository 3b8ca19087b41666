// How a sequence grows and shrinks.
//
// A sequence has one length T for all planes. In a plane it is sink [0, min(T, S)), history [S, H)
// and recent window [H, T), with S the sink size and R the recent size. T grows by appends; H
// follows in whole chunks: H = S + 16 * floor((T - S - R) / 16) once T > S + R, so the window has R
// to R + 15 tokens. Token t >= S of the window lies in ring slot (t - S) mod ring.
//
// A windowed plane has no sink. Of its history only [first, H) is there: when an append commits,
// blocks go that lie wholly before the last W + 64 tokens. What would be demoted and go at
// once is never taken nor written. So after an append the last 65 positions, at least, see all that
// their windows reach; beyond that, truncating and attending are refused.
//
// An append fills layers in ascending order, across planes, perhaps over several calls. The first
// call takes all pages, for all planes, and makes private copies of shared pages that it will
// write. Layers that are filled are at (T', H'), the others at (T, H); when the last is filled, T
// and H become T' and H', and blocks behind the windows go.
//
// What an append needs is computed first, which changes nothing; then room is made for all of it
// (room.c); then it is taken, which cannot fail.
//
// The last append of a sequence is remembered by who made it and its request, and nothing else is
// taken for a repeat: that the position fits says nothing about whose tokens are there, nor which.
// Forks do not inherit it. A truncation keeps it, so that a repeat that comes after it is refused
// instead of being applied once more.
//
// Where the region outlives the process, an append can be undone until it is true in every layer:
// it gets private copies also of pages in which it would overwrite what the sequence still has, and
// what it replaces stays in the tables `undo` until then. Otherwise until the first commit.
#include "pool/internal.h"

enum { WINDOW_SLACK = 64 }; // tokens behind a window that stay

// Entries of a table: base + (first + i) % modulo for i < count.
struct run {
    enum kvd_pool_kind kind;
    uint32_t base, first, count, modulo;
    uint32_t last_rows; // of the last one's page, up to the last token that is written
};

static uint64_t demoted_to(const struct kvd_plane *g, uint64_t hist_end, uint64_t length)
{
    uint64_t keep = (uint64_t)g->sink + g->recent;
    if (length <= keep)
        return hist_end;
    return KVD_MAX(hist_end, g->sink + (length - keep) / KVD_CHUNK_TOKENS * KVD_CHUNK_TOKENS);
}

// What is in the ring stays: nothing is freed beyond the history's end.
static uint64_t freed_to(const struct kvd_plane *g, uint64_t first, uint64_t length,
                         uint64_t hist_end)
{
    uint64_t keep = (uint64_t)g->window + WINDOW_SLACK;
    if (!g->window || length <= keep)
        return first;
    uint64_t to = (length - keep) / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS;
    return KVD_MAX(first, KVD_MIN(to, hist_end));
}

// Entries of a plane's table of history that hold nothing: where there is no history, all.
static uint32_t freed_entries(const struct kvd_pool_reach *r)
{
    return (uint32_t)(r->first < r->hist_end ? r->first / KVD_PAGE_TOKENS
                                             : kvd_div_up(r->first, KVD_PAGE_TOKENS));
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
    bool whole = filled == layout_of(pool, s)->n_layers;
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
    uint32_t layers = layout_of(pool, s)->n_layers;
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

// The entries of tokens [begin, end) that lie from entry `base` on, `modulo` pages going round.
static struct run run_of(enum kvd_pool_kind kind, uint32_t base, uint64_t begin, uint64_t end,
                         uint32_t modulo)
{
    struct run r = {.kind = kind, .base = base, .modulo = modulo};
    if (begin >= end)
        return r;
    uint64_t first = begin / KVD_PAGE_TOKENS, last = (end - 1) / KVD_PAGE_TOKENS;
    r.first = (uint32_t)(first % modulo);
    r.count = (uint32_t)KVD_MIN(last - first + 1, (uint64_t)modulo);
    // A ring that goes round writes its first page at both ends.
    r.last_rows = last - first < modulo ? (uint32_t)((end - 1) % KVD_PAGE_TOKENS + 1)
                                        : (uint32_t)KVD_PAGE_TOKENS;
    return r;
}

// The entries of a plane's tables that an append writes: of the sink, the history, the ring.
static void runs_of(const struct kvd_plane *g, const struct kvd_pool_append *a, uint32_t plane,
                    struct run out[3])
{
    const struct kvd_pool_append_plane *p = &a->planes[plane];
    uint32_t sink_pages = (uint32_t)kvd_div_up(g->sink, KVD_PAGE_TOKENS);
    uint64_t ring = KVD_MAX(KVD_MAX(p->after.hist_end, a->length), (uint64_t)g->sink);
    out[0] = run_of(KVD_POOL_BF16, 0, a->length, KVD_MIN(a->new_length, (uint64_t)g->sink),
                    KVD_POOL_NONE);
    out[1] =
        run_of(KVD_POOL_CODEC, 0, p->demote - g->sink, p->after.hist_end - g->sink, KVD_POOL_NONE);
    out[2] = run_of(KVD_POOL_BF16, sink_pages, ring - g->sink,
                    KVD_MAX(a->new_length, (uint64_t)g->sink) - g->sink,
                    kvd_plane_ring(g) / KVD_PAGE_TOKENS);
}

// Entries of a table.
struct span {
    uint32_t first, end;
};

static void span_add(struct span *s, uint32_t entry)
{
    s->first = KVD_MIN(s->first, entry);
    s->end = KVD_MAX(s->end, entry + 1);
}

static uint32_t entry_of(const struct run *r, uint32_t i)
{
    return r->base + (r->first + i) % r->modulo;
}

// Whether an append overwrites tokens of a plane's recent window that the sequence still has.
static bool overwrites_window(const struct kvd_plane *g, const struct kvd_pool_append *a,
                              uint32_t plane)
{
    uint64_t hist_end = a->planes[plane].before.hist_end;
    return a->length > hist_end && a->new_length > hist_end + kvd_plane_ring(g);
}

// Whether it writes into a chunk of history that the sequence has in part.
static bool rewrites_chunk(const struct kvd_plane *g, const struct kvd_pool_append *a,
                           uint32_t plane)
{
    const struct kvd_pool_append_plane *p = &a->planes[plane];
    return p->demote < p->after.hist_end && (p->demote - g->sink) % KVD_CHUNK_TOKENS;
}

// Whether it replaces pages that are wanted until it is true in every layer.
static bool keeps_pages(const struct kvd_pool *pool, const struct kvd_layout *l,
                        const struct kvd_pool_append *a)
{
    for (uint32_t p = 0; p < l->n_planes && pool->fd >= 0; p++)
        if (overwrites_window(&l->planes[p], a, p) || rewrites_chunk(&l->planes[p], a, p))
            return true;
    return false;
}

// Of a run that an append writes, how many entries from the first hold what it must not overwrite.
static uint32_t kept_entries(const struct kvd_pool *pool, const struct kvd_plane *g,
                             const struct kvd_pool_append *a, uint32_t plane, uint32_t run)
{
    if (pool->fd < 0)
        return 0;
    if (run == 1)
        return rewrites_chunk(g, a, plane);
    return run == 2 && overwrites_window(g, a, plane) ? UINT32_MAX : 0;
}

// Rows that the page of a run's i-th entry must have.
static uint32_t rows_of(const struct run *r, uint32_t i)
{
    return i + 1 < r->count ? (uint32_t)KVD_PAGE_TOKENS : r->last_rows;
}

// Whether an append has to put another page there: there is none, or it is shared, or to be kept,
// or a part of one and too small.
static bool wants_page(const struct kvd_pool *pool, const struct region_table *t,
                       const struct run *r, uint32_t i, bool keep)
{
    uint32_t old = table_get(pool, t, entry_of(r, i));
    return old == KVD_POOL_NONE || pool->page[old].refs != 1 || keep ||
           kvd_pool_page_rows(pool, old) < rows_of(r, i);
}

// What part of a page it then puts there (0: all of it), for what is there and what is written.
static uint32_t order_wanted(const struct kvd_pool *pool, const struct region_seq *s, uint32_t p,
                             const struct run *r, uint32_t i)
{
    uint32_t old = table_get(pool, &s->table[p][r->kind], entry_of(r, i));
    uint32_t rows =
        KVD_MAX(rows_of(r, i), old == KVD_POOL_NONE ? 0 : kvd_pool_page_rows(pool, old));
    if (s->settled || !part_row_bytes(pool, s->layout, p, r->kind))
        return 0;
    return rows <= KVD_PAGE_TOKENS / 4 ? 2 : rows <= KVD_PAGE_TOKENS / 2;
}

static void need_page(const struct kvd_pool *pool, const struct region_seq *s, uint32_t p,
                      uint32_t kind, uint32_t order, struct kvd_pool_need *need)
{
    if (order)
        need->parts[p][order - 1]++;
    else
        need->pages[p][kind]++;
    need->bytes += pool->layout[s->layout].page_bytes[p][kind] >> order;
}

// What an append needs in a run of entries.
static void need_of_run(const struct kvd_pool *pool, const struct region_seq *s,
                        const struct kvd_pool_append *a, uint32_t p, const struct run *r,
                        uint32_t kept, struct kvd_pool_need *need, struct span *pages,
                        struct span *undo)
{
    for (uint32_t i = 0; i < r->count; i++) {
        uint32_t entry = entry_of(r, i);
        if (!wants_page(pool, &s->table[p][r->kind], r, i, i < kept))
            continue;
        need_page(pool, s, p, r->kind, order_wanted(pool, s, p, r, i), need);
        span_add(pages, entry);
        if (table_get(pool, &s->table[p][r->kind], entry) != KVD_POOL_NONE)
            span_add(undo, entry);
    }
}

static void need_of(const struct kvd_pool *pool, const struct region_seq *s,
                    const struct kvd_pool_append *a, struct kvd_pool_need *need)
{
    const struct kvd_layout *l = layout_of(pool, s);
    *need = (struct kvd_pool_need){0};
    for (uint32_t p = 0; p < l->n_planes; p++) {
        const struct kvd_plane *g = &l->planes[p];
        struct run runs[3];
        struct span pages[KVD_POOL_KINDS] = {{UINT32_MAX, 0}, {UINT32_MAX, 0}};
        struct span undo[KVD_POOL_KINDS] = {{UINT32_MAX, 0}, {UINT32_MAX, 0}};
        runs_of(g, a, p, runs);
        for (uint32_t r = 0; r < KVD_LEN(runs); r++)
            need_of_run(pool, s, a, p, &runs[r], kept_entries(pool, g, a, p, r), need,
                        &pages[runs[r].kind], &undo[runs[r].kind]);
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            need->blocks += table_lacks(&s->table[p][k], k == KVD_POOL_CODEC ? pages[k].first : 0,
                                        pages[k].end);
            need->blocks += table_lacks(&s->undo[p][k], undo[k].first, undo[k].end);
        }
    }
}

// Where the undo table of a plane and kind begins must be known before its first entry is set.
static uint32_t first_replaced(const struct kvd_pool *pool, const struct region_table *t,
                               const struct run *runs, const uint32_t *kept, uint32_t kind)
{
    uint32_t first = UINT32_MAX;
    for (uint32_t r = 0; r < 3; r++)
        for (uint32_t i = 0; i < runs[r].count && runs[r].kind == kind; i++) {
            uint32_t entry = entry_of(&runs[r], i);
            if (entry < first && table_get(pool, t, entry) != KVD_POOL_NONE &&
                wants_page(pool, t, &runs[r], i, i < kept[r]))
                first = entry;
        }
    return first;
}

// Puts a page that nobody else refers to into an entry, and notes the change.
static void take_page(struct kvd_pool *pool, struct region_seq *s, struct kvd_pool_append *a,
                      uint32_t p, uint32_t k, uint32_t entry, uint32_t order)
{
    struct region_table *t = &s->table[p][k];
    uint32_t old = table_get(pool, t, entry);
    if (old != KVD_POOL_NONE)
        table_set(pool, &s->undo[p][k], entry, old);
    if (k == KVD_POOL_CODEC)
        table_start(t, entry);
    uint32_t page = page_take(pool, slab_find(pool, s->ns, s->layout, p, k), order);
    table_set(pool, t, entry, page);
    a->changes[a->n_changes++] = (struct kvd_pool_change){
        .plane = p, .kind = k, .entry = entry, .old_page = old, .new_page = page};
}

// Puts pages where the append writes.
static void take(struct kvd_pool *pool, struct region_seq *s, struct kvd_pool_append *a)
{
    const struct kvd_layout *l = layout_of(pool, s);
    for (uint32_t p = 0; p < l->n_planes; p++) {
        struct run runs[3];
        uint32_t kept[3];
        runs_of(&l->planes[p], a, p, runs);
        for (uint32_t r = 0; r < 3; r++)
            kept[r] = kept_entries(pool, &l->planes[p], a, p, r);
        for (uint32_t k = 0; k < KVD_POOL_KINDS; k++) {
            uint32_t first = first_replaced(pool, &s->table[p][k], runs, kept, k);
            if (first != UINT32_MAX)
                table_start(&s->undo[p][k], first);
        }
        for (uint32_t r = 0; r < 3; r++)
            for (uint32_t i = 0; i < runs[r].count; i++) {
                uint32_t k = runs[r].kind, entry = entry_of(&runs[r], i);
                if (wants_page(pool, &s->table[p][k], &runs[r], i, i < kept[r]))
                    take_page(pool, s, a, p, k, entry, order_wanted(pool, s, p, &runs[r], i));
            }
    }
}

static void set_phase(struct region_seq *s, uint32_t phase)
{
    s->phase = phase;
    stored();
}

// What the append writes where it is has no checksum from now on.
static void unseal(struct kvd_pool *pool, const struct region_seq *s,
                   const struct kvd_pool_append *a)
{
    const struct kvd_layout *l = layout_of(pool, s);
    for (uint32_t p = 0; p < l->n_planes; p++) {
        struct run runs[3];
        runs_of(&l->planes[p], a, p, runs);
        for (uint32_t i = 0; i < runs[1].count; i++) {
            uint32_t page = table_get(pool, &s->table[p][KVD_POOL_CODEC], entry_of(&runs[1], i));
            if (page != KVD_POOL_NONE && pool->page[page].refs == 1 &&
                pool->sum[page] != KVD_SUM_DAMAGED)
                pool->sum[page] = KVD_SUM_NONE;
        }
    }
    stored();
}

static bool has_undo(const struct kvd_pool *pool, const struct region_seq *s)
{
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            if (!table_empty(&s->undo[p][k]))
                return true;
    return false;
}

static void drop_undo(struct kvd_pool *pool, struct region_seq *s)
{
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            table_truncate(pool, &s->undo[p][k], 0);
}

static void put_back(struct kvd_pool *pool, struct region_table *t, uint32_t entry, uint32_t page)
{
    uint32_t now = table_get(pool, t, entry);
    if (now == page)
        return;
    page_ref(pool, page);
    table_set(pool, t, entry, page);
    if (now != KVD_POOL_NONE)
        kvd_pool_page_unref(pool, now);
}

// Puts back all pages that an append has replaced.
static void restore(struct kvd_pool *pool, struct region_seq *s)
{
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++)
            for (struct table_walk w = table_walk(&s->undo[p][k]); w.block != KVD_POOL_NONE;
                 table_walk_on(pool, &w))
                for (uint32_t i = 0; i < w.n; i++) {
                    uint32_t page = pool->block[w.block].page[i];
                    if (page != KVD_POOL_NONE)
                        put_back(pool, &s->table[p][k], w.at + i, page);
                }
}

// Undoes all calls of an append that can be undone. Starts anew wherever it was left.
static void undo(struct kvd_pool *pool, struct region_seq *s)
{
    set_phase(s, PHASE_UNDOING);
    restore(pool, s);
    s->pending_layers = 0;
    stored();
    set_phase(s, PHASE_IDLE);
    drop_undo(pool, s);
}

// Drops pages beyond the history's end, and of the sink.
static void trim(struct kvd_pool *pool, struct region_seq *s)
{
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        uint32_t sink = layout_of(pool, s)->planes[p].sink;
        table_truncate(pool, &s->table[p][KVD_POOL_CODEC],
                       (uint32_t)kvd_div_up(s->reach[p].hist_end - sink, KVD_PAGE_TOKENS));
        if (s->length <= sink)
            table_truncate(pool, &s->table[p][KVD_POOL_BF16],
                           (uint32_t)kvd_div_up(s->length, KVD_PAGE_TOKENS));
    }
}

static void drop_behind_windows(struct kvd_pool *pool, struct region_seq *s)
{
    const struct kvd_layout *l = layout_of(pool, s);
    for (uint32_t p = 0; p < l->n_planes; p++)
        if (l->planes[p].window)
            table_drop_front(pool, &s->table[p][KVD_POOL_CODEC], freed_entries(&s->reach[p]));
}

void append_recover(struct kvd_pool *pool, struct region_seq *s)
{
    // What a call has begun to write is beyond what the sequence has, unless there are pages for
    // undoing it.
    bool running = s->phase == PHASE_RUNNING && (s->pending_layers == 0 || has_undo(pool, s));
    if (running || s->phase == PHASE_UNDOING)
        undo(pool, s);
    set_phase(s, PHASE_IDLE);
    if (s->pending_layers)
        return;
    drop_undo(pool, s);
    drop_behind_windows(pool, s);
    trim(pool, s);
}

// Checks an append, and tells what it does to each plane.
static int plan(const struct kvd_pool *pool, const struct kvd_pool_append_request *by,
                struct region_seq **seq, struct kvd_pool_append *out, struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, by->seq);
    *out = (struct kvd_pool_append){.by = *by};
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu",
                        (unsigned long long)by->seq);
    const struct kvd_layout *l = layout_of(pool, s);
    bool repeat = is_last(&s->last, by);
    int rc = repeat ? check_repeat(pool, s, by, err) : check_order(pool, s, by, err);
    if (rc)
        return rc;
    out->replayed = repeat;
    out->length = by->position;
    out->new_length = by->position + by->tokens;
    for (uint32_t i = 0; i < l->n_planes; i++) {
        const struct kvd_plane *g = &l->planes[i];
        struct kvd_pool_append_plane *p = &out->planes[i];
        p->before = s->reach[i];
        if (repeat) // what is freed stays freed
            p->before.hist_end = s->last.hist_end[i];
        p->after.hist_end = demoted_to(g, p->before.hist_end, out->new_length);
        p->after.first = freed_to(g, p->before.first, out->new_length, p->after.hist_end);
        p->demote = KVD_MAX(p->before.hist_end, p->after.first);
        p->window_kept = repeat && out->new_length <= p->before.hist_end + kvd_plane_ring(g);
    }
    *seq = s;
    return KVD_OK;
}

int kvd_pool_append_need(const struct kvd_pool *pool, const struct kvd_pool_append_request *by,
                         struct kvd_pool_need *need, struct kvd_error *err)
{
    struct region_seq *s;
    struct kvd_pool_append a;
    int rc = plan(pool, by, &s, &a, err);
    if (rc)
        return rc;
    if (a.replayed || s->pending_layers)
        *need = (struct kvd_pool_need){0};
    else
        need_of(pool, s, &a, need);
    return KVD_OK;
}

int kvd_pool_append_begin(struct kvd_pool *pool, const struct kvd_pool_append_request *by,
                          struct kvd_pool_append *out, struct kvd_error *err)
{
    struct region_seq *s;
    struct kvd_pool_need need;
    int rc = plan(pool, by, &s, out, err);
    if (rc || out->replayed)
        return rc;
    if (s->pending_layers) {
        set_phase(s, PHASE_RUNNING);
        return KVD_OK;
    }
    need_of(pool, s, out, &need);
    uint32_t pages = need_pages(&need);
    if (pages == 0) {
        unseal(pool, s, out);
        set_phase(s, PHASE_RUNNING);
        return KVD_OK;
    }
    out->changes = calloc(pages, sizeof(*out->changes));
    if (!out->changes)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    seq_pin(pool, s); // eviction must not take the very sequence that grows
    rc = room_make(pool, s->ns, s->layout, &need, err);
    if (rc == KVD_OK) {
        unseal(pool, s, out);
        set_phase(s, PHASE_RUNNING);
        take(pool, s, out); // perhaps less than was needed: evicted sequences shared some
        room_settle(pool, s->ns, s->layout, &need);
    }
    seq_unpin(pool, s);
    if (rc)
        free(KVD_TAKE(out->changes));
    return rc;
}

void kvd_pool_append_commit(struct kvd_pool *pool, struct kvd_pool_append *a)
{
    struct region_seq *s = &pool->seq[(uint32_t)a->by.seq];
    const struct kvd_layout *l = layout_of(pool, s);
    bool whole = a->by.layer_begin + a->by.layer_count == l->n_layers;
    journal_note(pool, &s->length, STATE_BYTES);
    s->phase = PHASE_IDLE;
    s->pending_length = a->new_length;
    s->pending_layers = whole ? 0 : a->by.layer_begin + a->by.layer_count;
    s->last = (struct region_append){.appender = a->by.appender,
                                     .request = a->by.request,
                                     .position = a->by.position,
                                     .tokens = a->by.tokens,
                                     .layer_begin = a->by.layer_begin,
                                     .layer_count = a->by.layer_count};
    for (uint32_t p = 0; p < l->n_planes; p++) {
        s->pending[p] = a->planes[p].after;
        s->last.hist_end[p] = a->planes[p].before.hist_end;
        if (whole)
            s->reach[p] = a->planes[p].after;
    }
    if (whole)
        seq_set_length(pool, s, a->new_length);
    journal_end(pool); // with this it is true
    free(KVD_TAKE(a->changes));
    a->n_changes = 0;
    if (whole || !keeps_pages(pool, l, a))
        drop_undo(pool, s);
    seq_pin(pool, s);
    if (whole)
        drop_behind_windows(pool, s);
    seq_unpin(pool, s);
}

void kvd_pool_append_abort(struct kvd_pool *pool, struct kvd_pool_append *a)
{
    struct region_seq *s = &pool->seq[(uint32_t)a->by.seq];
    bool first = a->n_changes > 0;
    seq_pin(pool, s);
    while (a->n_changes > 0) {
        const struct kvd_pool_change *c = &a->changes[--a->n_changes];
        struct region_table *t = &s->table[c->plane][c->kind];
        if (c->old_page != KVD_POOL_NONE) {
            put_back(pool, t, c->entry, c->old_page);
            continue;
        }
        table_set(pool, t, c->entry, KVD_POOL_NONE);
        kvd_pool_page_unref(pool, c->new_page);
    }
    free(KVD_TAKE(a->changes));
    set_phase(s, PHASE_IDLE);
    if (first)
        drop_undo(pool, s);
    // Entries that were added at the end are holes now.
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++)
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            struct region_table *t = &s->table[p][k];
            uint32_t n = t->count;
            while (n > t->begin && table_get(pool, t, n - 1) == KVD_POOL_NONE)
                n--;
            table_truncate(pool, t, n);
        }
    seq_unpin(pool, s);
}

// -- pages that stay where they are -------------------------------------------------------------

static bool is_part(const struct kvd_pool *pool, const struct region_table *t, uint32_t entry)
{
    uint32_t page = table_get(pool, t, entry);
    return page != KVD_POOL_NONE && page_order(pool, page);
}

bool kvd_pool_seq_settle(struct kvd_pool *pool, uint64_t seq)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return true;
    s->settled = true;
    stored();
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        const struct region_table *t = &s->table[p][KVD_POOL_BF16];
        const struct region_table *undo = &s->undo[p][KVD_POOL_BF16]; // what an abort puts back
        for (uint32_t i = 0; i < KVD_MAX(t->count, undo->count); i++)
            if (is_part(pool, t, i) || is_part(pool, undo, i))
                return false;
    }
    return true;
}

static void need_to_settle(const struct kvd_pool *pool, const struct region_seq *s,
                           struct kvd_pool_need *need)
{
    *need = (struct kvd_pool_need){0};
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        const struct region_table *t = &s->table[p][KVD_POOL_BF16];
        struct span undo = {UINT32_MAX, 0};
        for (uint32_t i = 0; i < t->count; i++) {
            if (!is_part(pool, t, i))
                continue;
            need_page(pool, s, p, KVD_POOL_BF16, 0, need);
            span_add(&undo, i);
        }
        need->blocks += table_lacks(&s->undo[p][KVD_POOL_BF16], undo.first, undo.end);
    }
}

static void take_whole(struct kvd_pool *pool, struct region_seq *s, struct kvd_pool_append *a)
{
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        const struct region_table *t = &s->table[p][KVD_POOL_BF16];
        for (uint32_t i = 0; i < t->count; i++) {
            if (!is_part(pool, t, i))
                continue;
            table_start(&s->undo[p][KVD_POOL_BF16], i);
            take_page(pool, s, a, p, KVD_POOL_BF16, i, 0);
        }
    }
}

void kvd_pool_settle_need(const struct kvd_pool *pool, uint64_t seq, struct kvd_pool_need *need)
{
    const struct region_seq *s = seq_find(pool, seq);
    *need = (struct kvd_pool_need){0};
    if (s && !s->pending_layers)
        need_to_settle(pool, s, need);
}

// As an append of no token: whoever opens the region amid it puts the parts back.
int kvd_pool_settle_begin(struct kvd_pool *pool, uint64_t seq, struct kvd_pool_append *out,
                          struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, seq);
    struct kvd_pool_need need;
    *out = (struct kvd_pool_append){.by = {.seq = seq}};
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    if (s->pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION, "sequence %llu has an unfinished append",
                        (unsigned long long)seq);
    need_to_settle(pool, s, &need);
    out->changes = calloc(need_pages(&need) + 1, sizeof(*out->changes));
    if (!out->changes)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    seq_pin(pool, s); // eviction must not take the very sequence
    int rc = room_make(pool, s->ns, s->layout, &need, err);
    if (rc == KVD_OK) {
        set_phase(s, PHASE_RUNNING);
        take_whole(pool, s, out);
        room_settle(pool, s->ns, s->layout, &need);
    }
    seq_unpin(pool, s);
    if (rc)
        free(KVD_TAKE(out->changes));
    return rc;
}

void kvd_pool_settle_commit(struct kvd_pool *pool, struct kvd_pool_append *a)
{
    struct region_seq *s = &pool->seq[(uint32_t)a->by.seq];
    free(KVD_TAKE(a->changes));
    a->n_changes = 0;
    set_phase(s, PHASE_IDLE); // with this it is true
    drop_undo(pool, s);
}

// -- truncating ---------------------------------------------------------------------------------

// Whether an unfinished append has already overwritten tokens of a plane's window, in some layer,
// that would be kept.
static bool window_damaged(const struct kvd_plane *g, const struct region_seq *s, uint32_t plane,
                           uint64_t keep)
{
    uint64_t hist_end = s->reach[plane].hist_end;
    return s->pending_layers && s->pending_length > kvd_plane_ring(g) + hist_end &&
           keep > hist_end && s->length > hist_end;
}

static int check_truncate(const struct kvd_pool *pool, const struct region_seq *s, uint64_t length,
                          struct kvd_error *err)
{
    const struct kvd_layout *l = layout_of(pool, s);
    uint64_t least = 0, undamaged = UINT64_MAX; // lengths that are possible, besides 0
    bool undoable = s->pending_layers && has_undo(pool, s);
    if (length > s->length)
        return kvd_fail(err, KVD_E_INVALID,
                        "cannot truncate sequence %llu of length %llu to %llu tokens",
                        (unsigned long long)seq_id(pool, s), (unsigned long long)s->length,
                        (unsigned long long)length);
    for (uint32_t p = 0; p < l->n_planes && length; p++) {
        uint64_t begin = s->reach[p].first;
        if (l->planes[p].window && begin)
            least = KVD_MAX(least, begin + l->planes[p].window - 1);
        if (!undoable && window_damaged(&l->planes[p], s, p, length))
            undamaged = KVD_MIN(undamaged, s->reach[p].hist_end);
    }
    if (undamaged < length && undamaged >= least)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "an unfinished append to sequence %llu has overwritten part of its recent "
                        "window; finish the append or truncate to at most %llu",
                        (unsigned long long)seq_id(pool, s), (unsigned long long)undamaged);
    if (undamaged < length)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "an unfinished append to sequence %llu has overwritten part of its recent "
                        "window, and what lies before that is freed in a plane with a window; "
                        "finish the append or truncate to 0",
                        (unsigned long long)seq_id(pool, s));
    if (length < least)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "cannot truncate sequence %llu to %llu tokens: a plane with a window has "
                        "freed tokens that the next one would see; to %llu or more is possible, "
                        "and to 0",
                        (unsigned long long)seq_id(pool, s), (unsigned long long)length,
                        (unsigned long long)least);
    return KVD_OK;
}

int kvd_pool_truncate(struct kvd_pool *pool, uint64_t seq, uint64_t length, struct kvd_error *err)
{
    struct region_seq *s = seq_find(pool, seq);
    if (!s)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no sequence %llu", (unsigned long long)seq);
    int rc = check_truncate(pool, s, length, err);
    if (rc)
        return rc;
    seq_pin(pool, s);
    if (s->pending_layers && has_undo(pool, s))
        undo(pool, s);
    journal_note(pool, &s->length, STATE_BYTES);
    s->pending_layers = 0;
    seq_set_length(pool, s, length);
    for (uint32_t p = 0; p < layout_of(pool, s)->n_planes; p++) {
        struct kvd_pool_reach *r = &s->reach[p];
        if (length < r->hist_end)
            r->hist_end = KVD_MAX(length, (uint64_t)layout_of(pool, s)->planes[p].sink);
        if (length == 0)
            r->first = 0;
    }
    journal_end(pool);
    trim(pool, s);
    seq_unpin(pool, s);
    return KVD_OK;
}
