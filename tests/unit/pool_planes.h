// A model of layouts of several planes: random operations on real memory, in which a plain stand-in
// for the kernels stores a mark per token and layer. Every token that a plane says it has must bear
// the mark of the sequence's own token.
#ifndef KVD_TESTS_POOL_PLANES_H
#define KVD_TESTS_POOL_PLANES_H

#include "tests/unit/suite.h"

#include <errno.h>

#include "pool/internal.h"

enum {
    LIVE = 24,
    NAMES = 8,
    SPACES = 2,
    LAYOUTS = 4,
    LONGEST = 3000,
    EXTENT = 2 << 20,
    EXTENTS = 32,
    MAX_SEQUENCES = 40,
    ROW = 2 * 64, // bytes of a row of a window's page, as the layouts' head_dims make it
};

struct model_seq {
    uint64_t id, length;
    uint32_t ns, layout, holders;
    uint32_t pending, pending_layers; // tokens and layers of an unfinished append
    int name;                         // -1: none
    bool used, settled;
    uint64_t tokens[LONGEST]; // random marks
};

// What the operation at hand may leave of its sequence, from the one to the other.
struct doing {
    int slot, other; // -1: none; `other` may lose its name to it
    uint64_t length[2];
    uint32_t pending_layers[2], holders[2];
    bool fresh, may_go, name_changes;
};

struct model {
    struct kvd_pool *pool;
    struct doing doing;
    void (*storing)(struct model *m); // told amid what stands in for the kernels; may be NULL
    uint8_t *memory;                  // of all extents; NULL: each is allocated
    bool durable;
    uint32_t ns[SPACES], layout[LAYOUTS];
    struct kvd_layout shape[LAYOUTS];
    uint64_t page_bytes[LAYOUTS][KVD_MAX_PLANES][KVD_POOL_KINDS];
    struct model_seq seq[LIVE];
    uint64_t rng, appended, refused, evicted, behind, wrecked, parts, grown, settled;
};

static int mem_alloc(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    struct model *m = ctx;
    if (m->memory)
        memset(m->memory + index * bytes, 0, bytes);
    *addr = (uint64_t)(uintptr_t)(m->memory ? m->memory + index * bytes : calloc(1, bytes));
    return *addr ? 0 : -ENOMEM;
}
static void mem_free(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    struct model *m = ctx;
    (void)index;
    (void)bytes;
    if (!m->memory)
        free((void *)(uintptr_t)addr);
}
static int mem_zero(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    (void)ctx;
    (void)index;
    memset((void *)(uintptr_t)addr, 0, bytes);
    return 0;
}

static uint32_t below(struct model *m, uint32_t n)
{
    return (uint32_t)(kvd_rand(&m->rng) % n);
}

static const char *name_of(int i)
{
    static const char *const names[NAMES] = {"n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7"};
    return names[i];
}

static void on_evict(void *ctx, uint32_t ns, uint64_t id, const char *name)
{
    struct model *m = ctx;
    (void)ns;
    (void)name;
    for (int i = 0; i < LIVE; i++) {
        if (!m->seq[i].used || m->seq[i].id != id)
            continue;
        ck_assert_uint_eq(m->seq[i].holders, 0);
        m->seq[i].used = false;
        m->evicted++;
    }
}

static struct model_seq *pick(struct model *m, bool held)
{
    for (int tries = 0; tries < 8; tries++) {
        struct model_seq *s = &m->seq[below(m, LIVE)];
        if (s->used && (!held || s->holders))
            return s;
    }
    return NULL;
}

static struct model_seq *free_slot(struct model *m)
{
    for (int i = 0; i < LIVE; i++)
        if (!m->seq[i].used)
            return &m->seq[i];
    return NULL;
}

// -- what stands in for the kernels -------------------------------------------------------------

struct pages {
    uint64_t bf16[64], codec[LONGEST / KVD_PAGE_TOKENS + 2];
};

static void pages_of(const struct model *m, uint64_t seq, uint32_t plane, struct pages *out)
{
    memset(out, 0, sizeof(*out));
    uint32_t n = kvd_pool_seq_pages(m->pool, seq, plane, KVD_POOL_BF16, out->bf16, 64);
    uint32_t c =
        kvd_pool_seq_pages(m->pool, seq, plane, KVD_POOL_CODEC, out->codec, KVD_LEN(out->codec));
    ck_assert(n <= 64 && c <= KVD_LEN(out->codec));
}

static uint64_t *cell(uint64_t page, uint32_t layer, uint64_t row)
{
    ck_assert(page != 0);
    return (uint64_t *)(uintptr_t)page + (uint64_t)layer * KVD_PAGE_TOKENS + row % KVD_PAGE_TOKENS;
}

// Where kernels have it: rows of K, and of V behind them. The mark is in either.
static uint64_t *row_cell(uint64_t page, uint32_t layer, uint64_t t)
{
    ck_assert(page != 0);
    uint64_t rows = (2 * (uint64_t)layer + (t & 1)) * KVD_PAGE_TOKENS + t % KVD_PAGE_TOKENS;
    return (uint64_t *)(uintptr_t)(page + rows * ROW);
}

static uint64_t *window_cell(const struct kvd_plane *g, const struct pages *p, uint32_t layer,
                             uint64_t t)
{
    if (t < g->sink)
        return row_cell(p->bf16[t / KVD_PAGE_TOKENS], layer, t);
    uint64_t slot = (t - g->sink) % kvd_plane_ring(g);
    uint32_t sink_pages = (uint32_t)kvd_div_up(g->sink, KVD_PAGE_TOKENS);
    return row_cell(p->bf16[sink_pages + slot / KVD_PAGE_TOKENS], layer, slot);
}

static uint64_t *codec_cell(const struct kvd_plane *g, const struct pages *p, uint32_t layer,
                            uint64_t t)
{
    return cell(p->codec[(t - g->sink) / KVD_PAGE_TOKENS], layer, t - g->sink);
}

static uint64_t mark(const struct model_seq *s, uint64_t t, uint32_t layer)
{
    return s->tokens[t] * 31 + layer;
}

// Layers [begin, end) of the layout, one by one: `layer` is the plane's own number.
static void store(struct model *m, const struct model_seq *s, const struct kvd_pool_append *a,
                  uint32_t at, uint32_t layer)
{
    uint32_t plane = m->shape[s->layout].plane_of[at];
    const struct kvd_plane *g = &m->shape[s->layout].planes[plane];
    const struct kvd_pool_append_plane *p = &a->planes[plane];
    struct pages pages;
    pages_of(m, s->id, plane, &pages);
    for (uint64_t t = p->demote; t < p->after.hist_end; t++)
        *codec_cell(g, &pages, layer, t) =
            t < a->length ? *window_cell(g, &pages, layer, t) : mark(s, t, at);
    if (m->storing)
        m->storing(m);
    for (uint64_t t = a->length; t < a->new_length; t++)
        if (t < g->sink || t >= p->after.hist_end)
            *window_cell(g, &pages, layer, t) = mark(s, t, at);
    if (m->storing)
        m->storing(m);
}

static uint32_t layer_in_plane(const struct kvd_layout *l, uint32_t at)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < at; i++)
        n += l->plane_of[i] == l->plane_of[at];
    return n;
}

// A part is copied row by row, as what lies between is another's.
static void copy_rows(struct model *m, const struct model_seq *s, const struct kvd_pool_change *c)
{
    uint8_t *to = (uint8_t *)(uintptr_t)kvd_pool_page_addr(m->pool, c->new_page);
    const uint8_t *from = (uint8_t *)(uintptr_t)kvd_pool_page_addr(m->pool, c->old_page);
    uint32_t rows = kvd_pool_page_rows(m->pool, c->old_page);
    uint32_t sides = 2 * m->shape[s->layout].planes[c->plane].n_layers;
    ck_assert_uint_le(rows, kvd_pool_page_rows(m->pool, c->new_page));
    if (rows == KVD_PAGE_TOKENS)
        memcpy(to, from, kvd_pool_page_bytes(m->pool, m->layout[s->layout], c->plane, c->kind));
    for (uint32_t i = 0; i < sides && rows < KVD_PAGE_TOKENS; i++)
        memcpy(to + (uint64_t)i * KVD_PAGE_TOKENS * ROW, from + (uint64_t)i * KVD_PAGE_TOKENS * ROW,
               (uint64_t)rows * ROW);
}

// Whoever has said that it is to have whole pages keeps them where they are.
static void check_change(struct model *m, const struct model_seq *s,
                         const struct kvd_pool_change *c)
{
    bool had = c->old_page != KVD_POOL_NONE;
    uint32_t rows = kvd_pool_page_rows(m->pool, c->new_page);
    uint32_t had_rows = had ? kvd_pool_page_rows(m->pool, c->old_page) : 0;
    m->parts += rows < KVD_PAGE_TOKENS;
    m->grown += had && had_rows < rows;
    ck_assert_uint_ge(rows, had_rows);
    ck_assert(!s->settled || rows == KVD_PAGE_TOKENS);
    ck_assert(!s->settled || !had || had_rows == KVD_PAGE_TOKENS);
}

static void run(struct model *m, const struct model_seq *s, const struct kvd_pool_append *a)
{
    for (uint32_t i = 0; i < a->n_changes; i++) {
        check_change(m, s, &a->changes[i]);
        if (a->changes[i].old_page != KVD_POOL_NONE)
            copy_rows(m, s, &a->changes[i]);
    }
    for (uint32_t i = 0; i < a->by.layer_count; i++)
        store(m, s, a, a->by.layer_begin + i,
              layer_in_plane(&m->shape[s->layout], a->by.layer_begin + i));
}

// -- checks -------------------------------------------------------------------------------------

static void check_layer(const struct model *m, const struct model_seq *s,
                        const struct kvd_pool_seq_info *info, uint32_t at)
{
    const struct kvd_layout *l = &m->shape[s->layout];
    uint32_t plane = l->plane_of[at], layer = layer_in_plane(l, at);
    const struct kvd_plane *g = &l->planes[plane];
    bool filled = at < info->pending_layers;
    struct kvd_pool_reach r = filled ? info->pending[plane] : info->reach[plane];
    uint64_t length = filled ? info->pending_length : info->length;
    struct pages pages;
    pages_of(m, s->id, plane, &pages);
    uint64_t begin = r.first;
    ck_assert_uint_le(begin, kvd_pool_visible(g->window, length)); // for the next token
    ck_assert(g->window || begin == 0);
    for (uint64_t t = begin; t < length; t++) {
        bool codec = t >= g->sink && t < r.hist_end;
        uint64_t *at_page =
            codec ? codec_cell(g, &pages, layer, t) : window_cell(g, &pages, layer, t);
        ck_assert_msg(*at_page == mark(s, t, at), "token %llu of %llu, plane %u, layer %u",
                      (unsigned long long)t, (unsigned long long)length, plane, at);
    }
    if (g->window)
        ck_assert_uint_le(info->pages[plane][KVD_POOL_CODEC],
                          (info->pending[plane].hist_end + 63) / 64 -
                              info->reach[plane].first / 64);
}

// What calls note of a sequence, without counting its pages.
static void check_notes(const struct model *m, const struct kvd_pool_seq_info *info)
{
    enum { MOST = 4096 };
    static uint64_t all[MOST], some[MOST];
    static uint32_t pages[MOST];
    struct kvd_pool_seq_lengths told;
    ck_assert_int_eq(kvd_pool_seq_lengths(m->pool, info->id, &told), 0);
    ck_assert_uint_eq(told.length, info->length);
    ck_assert_uint_eq(told.pending_length, info->pending_length);
    ck_assert_uint_eq(told.pending_layers, info->pending_layers);
    const struct region_seq *s = seq_find(m->pool, info->id);
    for (uint32_t p = 0; p < info->n_planes; p++) {
        ck_assert_int_eq(memcmp(&told.reach[p], &info->reach[p], sizeof(told.reach[p])), 0);
        ck_assert_int_eq(memcmp(&told.pending[p], &info->pending[p], sizeof(told.pending[p])), 0);
        for (int k = 0; k < KVD_POOL_KINDS; k++) {
            uint32_t n = kvd_pool_seq_pages(m->pool, info->id, p, k, all, MOST), held = 0;
            ck_assert_uint_eq(n, kvd_pool_seq_pages(m->pool, info->id, p, k, NULL, 0));
            ck_assert_uint_le(n, MOST);
            table_read(m->pool, &s->table[p][k], 0, n, pages, 1);
            for (uint32_t i = 0; i < n; i++) {
                bool none = pages[i] == KVD_POOL_NONE;
                held += !none;
                ck_assert_uint_eq(all[i], none ? 0 : kvd_pool_page_addr(m->pool, pages[i]));
            }
            ck_assert_uint_eq(held, info->pages[p][k]);
            uint32_t cap = n ? (uint32_t)(info->length * 7 + p) % n : 0;
            memset(some, 0xff, (cap + 1) * sizeof(*some));
            ck_assert_uint_eq(kvd_pool_seq_pages(m->pool, info->id, p, k, some, cap), n);
            ck_assert_int_eq(memcmp(some, all, cap * sizeof(*some)), 0); // and nothing behind
            ck_assert_uint_eq(some[cap], UINT64_MAX);
        }
    }
}

static void check_seq(const struct model *m, const struct model_seq *s)
{
    struct kvd_pool_seq_info info;
    ck_assert_int_eq(kvd_pool_seq_info(m->pool, s->id, &info), 0);
    check_notes(m, &info);
    ck_assert_uint_eq(info.length, s->length);
    ck_assert_uint_eq(info.pending_layers, s->pending_layers);
    for (uint32_t i = 0; i < m->shape[s->layout].n_layers; i++)
        check_layer(m, s, &info, i);
}

static void check_all(struct model *m)
{
    struct kvd_error err = {0};
    ck_assert_msg(kvd_pool_verify(m->pool, &err) == 0, "%s", err.text);
    for (int i = 0; i < LIVE; i++)
        if (m->seq[i].used)
            check_seq(m, &m->seq[i]);
}

// -- operations ---------------------------------------------------------------------------------

static void begin(struct model *m, const struct model_seq *s)
{
    m->doing = (struct doing){.slot = (int)(s - m->seq),
                              .other = -1,
                              .length = {s->length, s->length},
                              .pending_layers = {s->pending_layers, s->pending_layers},
                              .holders = {s->holders, s->holders}};
}

static void op_new(struct model *m)
{
    struct model_seq *s = free_slot(m);
    if (!s)
        return;
    begin(m, s);
    m->doing.fresh = true;
    s->layout = below(m, LAYOUTS);
    s->ns = m->ns[below(m, SPACES)];
    s->length = s->pending = s->pending_layers = 0;
    s->holders = 1;
    s->settled = false;
    s->name = -1;
    s->used = kvd_pool_seq_new(m->pool, s->ns, m->layout[s->layout], &s->id, NULL) == 0;
}

// What was said to be needed is what is taken, if nothing was evicted meanwhile.
static void check_need(struct model *m, const struct kvd_pool_append *a,
                       const struct kvd_pool_need *need, uint64_t used, uint64_t evicted)
{
    struct kvd_pool_info info;
    uint32_t pages = 0;
    kvd_pool_info(m->pool, &info);
    for (int p = 0; p < KVD_MAX_PLANES; p++)
        pages += need->pages[p][0] + need->pages[p][1] + need->parts[p][0] + need->parts[p][1];
    ck_assert_uint_le(a->n_changes, pages);
    if (evicted != m->evicted)
        return;
    ck_assert_uint_eq(a->n_changes, pages);
    ck_assert_uint_eq(info.used - used, need->bytes);
}

static void op_append(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    uint32_t layers = m->shape[s->layout].n_layers, from = s->pending_layers;
    uint32_t n = below(m, 4) ? 1 + below(m, 40) : 1 + below(m, 900);
    n = s->pending_layers ? s->pending : (uint32_t)KVD_MIN((uint64_t)n, LONGEST - s->length);
    if (n == 0)
        return;
    uint32_t count = below(m, 3) ? layers - from : 1 + below(m, layers - from);
    struct kvd_pool_append_request by = {.seq = s->id,
                                         .position = s->length,
                                         .tokens = n,
                                         .layer_begin = from,
                                         .layer_count = count};
    struct kvd_pool_need need;
    struct kvd_pool_append a;
    struct kvd_pool_info before;
    struct kvd_error err = {0};
    uint64_t evicted = m->evicted;
    begin(m, s);
    m->doing.length[1] += from + count == layers ? n : 0;
    m->doing.pending_layers[1] = from + count == layers ? 0 : from + count;
    kvd_pool_info(m->pool, &before);
    ck_assert_int_eq(kvd_pool_append_need(m->pool, &by, &need, &err), 0);
    int rc = kvd_pool_append_begin(m->pool, &by, &a, &err);
    if (rc) {
        ck_assert_msg(rc == KVD_E_QUOTA || rc == KVD_E_FULL, "%s", err.text);
        m->refused++;
        return;
    }
    check_need(m, &a, &need, before.used, evicted);
    if (below(m, 16) == 0) {
        kvd_pool_append_abort(m->pool, &a);
        return;
    }
    for (uint32_t i = 0; i < n && from == 0; i++)
        s->tokens[s->length + i] = kvd_rand(&m->rng);
    run(m, s, &a);
    kvd_pool_append_commit(m->pool, &a);
    s->pending = n;
    s->pending_layers = from + count;
    if (s->pending_layers == layers) {
        s->length += n;
        s->pending_layers = 0;
        m->appended++;
    }
}

static void op_fork(struct model *m)
{
    struct model_seq *s = pick(m, true), *c = free_slot(m);
    if (!s || !c)
        return;
    uint64_t id;
    begin(m, c);
    m->doing.fresh = true;
    int rc = kvd_pool_seq_fork(m->pool, s->id, &id, NULL);
    ck_assert(rc == 0 || (rc == KVD_E_PRECONDITION && s->pending_layers) || rc == KVD_E_LIMIT);
    if (rc || !s->used)
        return;
    c = free_slot(m);
    m->doing.slot = (int)(c - m->seq);
    *c = *s;
    c->id = id;
    c->settled = false;
    c->holders = 1;
    c->name = -1;
}

static void op_truncate(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s || below(m, 4))
        return;
    const struct kvd_layout *l = &m->shape[s->layout];
    uint64_t to = below(m, (uint32_t)s->length + 1), back = below(m, 140);
    if (below(m, 2))
        to = s->length - KVD_MIN(s->length, back);
    to = below(m, 8) ? to : 0;
    struct kvd_pool_seq_info info;
    struct kvd_error err = {0};
    bool seen = true; // all that the next token would see is there
    kvd_pool_seq_info(m->pool, s->id, &info);
    for (uint32_t p = 0; p < l->n_planes; p++)
        seen &= kvd_pool_visible(l->planes[p].window, to) >= info.reach[p].first;
    begin(m, s);
    m->doing.length[1] = to;
    m->doing.pending_layers[1] = 0;
    int rc = kvd_pool_truncate(m->pool, s->id, to, &err);
    if (to == 0 || (seen && !s->pending_layers))
        ck_assert_msg(rc == 0, "to %llu of %llu: %s", (unsigned long long)to,
                      (unsigned long long)s->length, err.text);
    if (!seen && to)
        ck_assert_int_eq(rc, KVD_E_PRECONDITION);
    m->behind += rc == KVD_E_PRECONDITION;
    if (rc)
        return;
    s->length = to;
    s->pending_layers = 0;
}

static void op_publish(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    int name = (int)below(m, NAMES);
    begin(m, s);
    m->doing.name_changes = true;
    for (int i = 0; i < LIVE; i++) {
        struct model_seq *owner = &m->seq[i];
        if (!owner->used || owner->ns != s->ns || owner->name != name || owner == s)
            continue;
        m->doing.other = i;
    }
    ck_assert_int_eq(kvd_pool_publish(m->pool, s->id, name_of(name), true, NULL), 0);
    s->name = name;
    if (m->doing.other < 0)
        return;
    m->seq[m->doing.other].used = m->seq[m->doing.other].holders > 0;
    m->seq[m->doing.other].name = -1;
}

static void op_release(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    begin(m, s);
    m->doing.holders[1]--;
    m->doing.may_go = s->holders == 1 && s->name < 0;
    kvd_pool_seq_release(m->pool, s->id);
    if (--s->holders == 0 && s->name < 0)
        s->used = false;
}

static void op_hold(struct model *m)
{
    struct model_seq *s = pick(m, false);
    if (!s || s->name < 0)
        return;
    begin(m, s);
    m->doing.holders[1]++;
    ck_assert_uint_eq(kvd_pool_lookup(m->pool, s->ns, name_of(s->name)), s->id);
    ck_assert_int_eq(kvd_pool_seq_hold(m->pool, s->id), 0);
    s->holders++;
}

static void op_settle(struct model *m)
{
    struct model_seq *s = pick(m, true);
    struct kvd_pool_append a;
    struct kvd_error err = {0};
    if (!s || below(m, 3))
        return;
    begin(m, s);
    bool whole = kvd_pool_seq_settle(m->pool, s->id);
    int rc = whole ? KVD_OK : kvd_pool_settle_begin(m->pool, s->id, &a, &err);
    ck_assert_msg(rc == 0 || rc == KVD_E_QUOTA || rc == KVD_E_FULL ||
                      (rc == KVD_E_PRECONDITION && s->pending_layers),
                  "%s", err.text);
    if (rc) {
        m->refused++;
        return;
    }
    for (uint32_t i = 0; i < (whole ? 0 : a.n_changes); i++) {
        copy_rows(m, s, &a.changes[i]);
        if (m->storing)
            m->storing(m);
    }
    if (!whole && below(m, 4) == 0) {
        kvd_pool_append_abort(m->pool, &a);
        ck_assert(!kvd_pool_seq_settle(m->pool, s->id));
        return;
    }
    if (!whole)
        kvd_pool_settle_commit(m->pool, &a);
    ck_assert(kvd_pool_seq_settle(m->pool, s->id));
    m->settled += !whole;
    s->settled = true;
}

static void op_quota(struct model *m)
{
    kvd_pool_set_quota(m->pool, m->ns[below(m, SPACES)],
                       below(m, 3) ? 0 : (uint64_t)(2 + below(m, 12)) << 20);
}

static void model_step(struct model *m)
{
    static void (*const ops[])(struct model *) = {op_new,      op_append,  op_append, op_append,
                                                  op_append,   op_append,  op_fork,   op_truncate,
                                                  op_publish,  op_release, op_hold,   op_quota,
                                                  op_truncate, op_append,  op_append, op_settle};
    ops[below(m, KVD_LEN(ops))](m);
}

static struct kvd_layout random_layout(struct model *m)
{
    struct kvd_layout l = {.n_planes = 1 + below(m, 4)};
    l.n_layers = l.n_planes + below(m, 4);
    for (uint32_t i = 0; i < l.n_layers; i++) {
        l.layers[i] = (uint16_t)(2 * i);
        l.plane_of[i] = (uint8_t)(i < l.n_planes ? i : below(m, l.n_planes));
        l.planes[l.plane_of[i]].n_layers++;
    }
    for (uint32_t p = 0; p < l.n_planes; p++) {
        struct kvd_plane *g = &l.planes[p];
        g->q_heads = g->kv_heads = 1;
        g->head_dim_k = g->head_dim_v = 64;
        g->codec = kvd_codecs_both(KVD_CODEC_INT2);
        g->window = below(m, 2) ? 1 + below(m, below(m, 2) ? 100 : 600) : 0;
        g->sink = g->window ? 0 : 16 * below(m, 6);
        g->recent = 16 * below(m, below(m, 2) ? 6 : 20);
    }
    return l;
}

static struct kvd_pool_config config_of(struct model *m)
{
    return (struct kvd_pool_config){.bytes = (uint64_t)EXTENTS * EXTENT,
                                    .extent_bytes = EXTENT,
                                    .max_sequences = MAX_SEQUENCES,
                                    .max_namespaces = SPACES,
                                    .max_layouts = LAYOUTS + 1,
                                    .id_seed = (uint32_t)m->rng,
                                    .durable = m->durable,
                                    .on_evict = on_evict,
                                    .on_evict_ctx = m};
}

// Finds or makes the model's namespaces and layouts.
static void hold_names(struct model *m)
{
    bool recycled;
    for (int i = 0; i < SPACES; i++)
        ck_assert_int_eq(kvd_pool_namespace(m->pool, name_of(i), &m->ns[i], NULL), 0);
    for (int i = 0; i < LAYOUTS; i++)
        ck_assert_int_eq(kvd_pool_layout(m->pool, m->ns[i % SPACES], &m->shape[i], m->page_bytes[i],
                                         &m->layout[i], &recycled, NULL),
                         0);
}

static void setup(struct model *m)
{
    struct kvd_pool_mem_ops mem = {
        .ctx = m, .alloc = mem_alloc, .free = mem_free, .zero = mem_zero};
    struct kvd_pool_config config = config_of(m);
    m->pool = kvd_pool_new(&config, &mem, NULL);
    for (int i = 0; i < LAYOUTS; i++) {
        m->shape[i] = random_layout(m);
        for (int p = 0; p < KVD_MAX_PLANES; p++)
            for (int k = 0; k < KVD_POOL_KINDS; k++)
                m->page_bytes[i][p][k] = (uint64_t)m->shape[i].planes[p].n_layers *
                                             KVD_PAGE_TOKENS * (k == KVD_POOL_BF16 ? 2 * ROW : 8) +
                                         ((uint64_t)below(m, 6) << 12);
    }
    hold_names(m);
}

#endif
