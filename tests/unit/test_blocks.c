// Blocks that others can use: the rules one at a time, and random operations against a model that
// knows which keys are there, under which pages, and what keeps them. KVD_POOL_OPS sets the number
// of operations (default 60,000).
#include "tests/unit/suite.h"

#include <errno.h>

#include "tests/unit/blocks_fixture.h"

START_TEST(blocks_outlive_their_sequence)
{
    struct fixture f;
    setup(&f, 8);
    uint64_t seq = sequence_of(&f, 1000), pages[32], again[32], child;
    // 1000 tokens have a history up to 64 + 42 * 16 = 736: eleven blocks, sink included.
    ck_assert_uint_eq(publish(&f, seq, 40, false).blocks, 11);
    ck_assert_uint_eq(publish(&f, seq, 40, false).known, 11);
    uint32_t n = kvd_pool_seq_pages(f.pool, seq, 0, KVD_POOL_CODEC, pages, 32);
    verify(f.pool);
    kvd_pool_seq_release(f.pool, seq);
    verify(f.pool);
    struct kvd_blocks_match m = match(&f, 40);
    ck_assert_uint_eq(m.known, 11);
    ck_assert_uint_eq(m.at.blocks, 11);
    ck_assert_uint_eq(m.window, 0);
    ck_assert_int_eq(m.why, KVD_PREFIX_UNKNOWN);
    ck_assert_int_eq(kvd_blocks_adopt(f.pool, &m.at, 11, &child, &f.err), 0);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, child, 0, KVD_POOL_CODEC, again, 32), 10);
    ck_assert_uint_ge(n, 10);
    ck_assert(!memcmp(pages, again, 10 * sizeof(*pages)));
    verify(f.pool);
    // It goes on from there, and writes into none of the shared pages.
    ck_assert_int_eq(grow(f.pool, child, 900, &f.err), 0);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, child, 0, KVD_POOL_CODEC, again, 32), 20);
    ck_assert(!memcmp(pages, again, 10 * sizeof(*pages)));
    ck_assert_int_eq(kvd_pool_truncate(f.pool, child, 300, &f.err), 0);
    ck_assert_int_eq(grow(f.pool, child, 900, &f.err), 0);
    kvd_pool_seq_pages(f.pool, child, 0, KVD_POOL_CODEC, again, 32);
    ck_assert(!memcmp(pages, again, 3 * sizeof(*pages)));
    ck_assert_uint_ne(pages[3], again[3]);
    verify(f.pool);
    kvd_pool_free(&f.pool);
    ck_assert_uint_eq(f.mem.live, 0);
}
END_TEST

// What is told of the window is so in every plane: the shortest counts.
START_TEST(an_end_of_planes_has_the_window_of_all)
{
    struct fixture f;
    setup(&f, 8);
    struct kvd_layout l = windowed_layout();
    ck_assert_int_eq(kvd_pool_layout(f.pool, f.ns, &l, two_planes, &f.layout, &recycled, &f.err),
                     0);
    f.space = space_of(f.ns, f.layout, "");
    uint64_t seq = sequence_of(&f, 1000);
    struct kvd_pool_seq_info info;
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, seq, &info), 0);
    ck_assert_uint_eq(info.reach[0].hist_end, 864);
    ck_assert_uint_eq(info.reach[1].hist_end, 928);
    ck_assert(publish(&f, seq, 40, true).end);
    struct kvd_blocks_match m = match(&f, 40);
    ck_assert_uint_eq(m.at.blocks, 15);
    ck_assert_uint_eq(m.window, 960 - 928);
    kvd_pool_seq_release(f.pool, seq);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(an_end_keeps_its_window)
{
    struct fixture f;
    setup(&f, 8);
    uint64_t seq = sequence_of(&f, 1000), window[8], again[8], child;
    struct kvd_pool_seq_info info;
    struct kvd_blocks_published p = publish(&f, seq, 40, true);
    ck_assert_uint_eq(p.blocks, 15);
    ck_assert_uint_eq(p.sealed, 11);
    ck_assert(p.end);
    verify(f.pool);
    kvd_pool_seq_pages(f.pool, seq, 0, KVD_POOL_BF16, window, 8);
    ck_assert_int_eq(grow(f.pool, seq, 300, &f.err), 0); // into pages of its own
    kvd_pool_seq_release(f.pool, seq);
    struct kvd_blocks_match m = match(&f, 40);
    ck_assert_uint_eq(m.at.blocks, 15);
    ck_assert(m.end);
    ck_assert_uint_eq(m.window, 960 - 736);
    ck_assert_int_eq(kvd_blocks_adopt(f.pool, &m.at, 15, &child, &f.err), 0);
    ck_assert_int_eq(kvd_pool_seq_info(f.pool, child, &info), 0);
    ck_assert_uint_eq(info.length, 960);
    ck_assert_uint_eq(info.reach[0].hist_end, 736);
    ck_assert_uint_eq(kvd_pool_seq_pages(f.pool, child, 0, KVD_POOL_BF16, again, 8), 6);
    ck_assert(!memcmp(window, again, 6 * sizeof(*window)));
    // A cut within the window has what is left of it.
    m = match(&f, 13);
    ck_assert_uint_eq(m.at.blocks, 13);
    ck_assert(!m.end);
    ck_assert_uint_eq(m.window, 832 - 736);
    // One before it is made of pages.
    m = match(&f, 9);
    ck_assert_uint_eq(m.at.blocks, 9);
    ck_assert_uint_eq(m.window, 0);
    // A longer one passes the end, which is then the first to go; blocks stay.
    ck_assert_int_eq(grow(f.pool, child, 640, &f.err), 0);
    p = publish(&f, child, 40, true);
    ck_assert_uint_eq(p.blocks, 25);
    verify(f.pool);
    struct kvd_pool_evicted sum;
    ck_assert_uint_eq(kvd_pool_evict(f.pool, f.ns, 0, 1, &sum), 1);
    ck_assert_uint_eq(sum.blocks + sum.sequences, 0);
    m = match(&f, 15);
    ck_assert_uint_eq(m.at.blocks, 15);
    ck_assert_uint_eq(m.window, 0);
    verify(f.pool);
    kvd_pool_seq_release(f.pool, child);
    kvd_pool_evict(f.pool, f.ns, 0, UINT32_MAX, &sum);
    verify(f.pool);
    ck_assert_uint_eq(match(&f, 40).known, 0);
    ck_assert_int_eq(match(&f, 40).why, KVD_PREFIX_EVICTED_ASKED);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(an_append_evicts_blocks_before_it_fails)
{
    struct fixture f;
    setup(&f, 2); // one extent of windows, one of history
    uint64_t seq = sequence_of(&f, 2000), held;
    struct kvd_pool_info info;
    publish(&f, seq, 20, false);
    kvd_pool_seq_release(f.pool, seq);
    struct kvd_blocks_match m = match(&f, 5);
    ck_assert_int_eq(kvd_blocks_hold(f.pool, &m.at, &f.err), 0);
    held = sequence_of(&f, 8000); // 120 pages of history; an extent has 128
    ck_assert_uint_eq(match(&f, 20).known, 9);
    ck_assert_int_eq(match(&f, 20).why, KVD_PREFIX_EVICTED_ROOM);
    ck_assert_int_eq(grow(f.pool, held, 256, &f.err), 0);
    ck_assert_uint_eq(match(&f, 20).known, 5);
    // What is held stays.
    ck_assert_int_eq(grow(f.pool, held, 16, &f.err), KVD_E_FULL);
    ck_assert_uint_eq(match(&f, 20).known, 5);
    kvd_blocks_release(f.pool, &m.at);
    verify(f.pool);
    // A quota too is first met by eviction.
    kvd_pool_info(f.pool, &info);
    kvd_pool_set_quota(f.pool, f.ns, info.used);
    ck_assert_int_eq(grow(f.pool, held, 16, &f.err), 0);
    ck_assert_uint_eq(match(&f, 20).known, 4);
    ck_assert_int_eq(match(&f, 20).why, KVD_PREFIX_EVICTED_QUOTA);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(a_namespace_and_a_layout_go_with_their_blocks)
{
    struct fixture f;
    setup(&f, 8);
    uint64_t seq = sequence_of(&f, 1000), used;
    publish(&f, seq, 20, true);
    kvd_pool_seq_release(f.pool, seq);
    ck_assert_uint_eq(kvd_pool_layout_refs(f.pool, f.layout), 3); // holder, end, blocks
    kvd_pool_layout_unref(f.pool, f.layout);
    ck_assert(kvd_pool_layout_idle(f.pool, f.layout, &used));
    kvd_pool_namespace_release(f.pool, f.ns);
    ck_assert(kvd_pool_namespace_idle(f.pool, f.ns, &used));
    verify(f.pool);
    // Piece by piece: the end, then blocks, of which each piece takes so many at most.
    struct kvd_pool_clearing of_layout = {.layout = true, .index = f.layout};
    struct kvd_pool_clearing of_space = {.index = f.ns};
    ck_assert(!kvd_pool_clear(f.pool, &of_layout, 4));
    ck_assert(!kvd_pool_clear(f.pool, &of_space, 4));
    verify(f.pool);
    ck_assert_uint_eq(kvd_pool_layout_refs(f.pool, f.layout), 1);
    uint32_t pieces = 0;
    // Both at once: each goes up its own paths.
    for (uint32_t over = 0; over != 3; pieces++) {
        if (kvd_pool_clear(f.pool, pieces % 2 ? &of_layout : &of_space, 2))
            over |= 1U << pieces % 2;
        verify(f.pool);
    }
    ck_assert_uint_ge(pieces, 3);
    ck_assert_uint_eq(kvd_pool_layout_refs(f.pool, f.layout), 0);
    ck_assert_uint_eq(kvd_pool_namespace_find(f.pool, "n0"), KVD_POOL_NONE);
    verify(f.pool);
    kvd_pool_free(&f.pool);
}
END_TEST

START_TEST(what_is_refused)
{
    struct fixture f;
    setup(&f, 8);
    struct kvd_layout odd = test_layout(1, 16, 64);
    struct kvd_blocks_published out;
    struct kvd_pool_append a;
    uint32_t layout, ns;
    uint64_t seq;
    ck_assert_int_eq(kvd_pool_layout(f.pool, f.ns, &odd, one_plane, &layout, &recycled, &f.err), 0);
    ck_assert_int_eq(kvd_pool_seq_new(f.pool, f.ns, layout, &seq, &f.err), 0);
    struct kvd_blocks_space space = f.space;
    ck_assert_int_eq(kvd_blocks_publish(f.pool, &space, seq, f.keys, 1, false, &out, &f.err),
                     KVD_E_PRECONDITION);
    space.layout = layout;
    ck_assert_int_eq(kvd_blocks_publish(f.pool, &space, seq, f.keys, 1, false, &out, &f.err),
                     KVD_E_UNSUPPORTED);
    ck_assert_int_eq(kvd_blocks_publish(f.pool, &space, seq + 1, f.keys, 1, false, &out, &f.err),
                     KVD_E_NOT_FOUND);
    ck_assert_int_eq(kvd_pool_namespace(f.pool, "n1", &ns, &f.err), 0);
    space.ns = ns;
    ck_assert_int_eq(kvd_blocks_publish(f.pool, &space, seq, f.keys, 1, false, &out, &f.err),
                     KVD_E_PRECONDITION);
    // During an append what was there before it can be published, but no end.
    seq = sequence_of(&f, 640);
    struct kvd_pool_append_request by = {
        .seq = seq, .position = 640, .tokens = 64, .layer_count = 1};
    ck_assert_int_eq(kvd_pool_append_begin(f.pool, &by, &a, &f.err), 0);
    ck_assert_uint_eq(publish(&f, seq, 40, false).blocks, 6);
    kvd_pool_append_abort(f.pool, &a);
    verify(f.pool);
    struct kvd_blocks_match m = match(&f, 6);
    ck_assert_int_eq(kvd_blocks_adopt(f.pool, &m.at, 7, &seq, &f.err), KVD_E_PRECONDITION);
    ck_assert_int_eq(kvd_blocks_adopt(f.pool, &m.at, 0, &seq, &f.err), KVD_E_PRECONDITION);
    kvd_pool_free(&f.pool);
}
END_TEST

static int attach(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    (void)ctx;
    (void)bytes;
    *addr = (uint64_t)(index + 1) << 40;
    return 0;
}

START_TEST(blocks_end_with_the_process)
{
    struct test_mem memory = {0};
    struct kvd_pool_mem_ops mem = {.ctx = &memory,
                                   .alloc = test_mem_alloc,
                                   .free = test_mem_free,
                                   .zero = test_mem_zero,
                                   .attach = attach};
    struct kvd_pool_config config = {.bytes = 8 << 21,
                                     .extent_bytes = 2 << 20,
                                     .max_sequences = 64,
                                     .max_namespaces = 8,
                                     .max_layouts = 8,
                                     .durable = true};
    static const uint8_t labels[20];
    struct kvd_prefix_key keys[20];
    struct kvd_error err = {0};
    struct kvd_pool_info info;
    struct kvd_blocks_published out;
    struct kvd_layout l = test_layout(1, 64, 256);
    struct kvd_pool *pool = kvd_pool_new(&config, &mem, &err);
    uint32_t ns, layout;
    uint64_t named, other;
    ck_assert_int_eq(kvd_pool_namespace(pool, "n0", &ns, &err), 0);
    ck_assert_int_eq(kvd_pool_layout(pool, ns, &l, one_plane, &layout, &recycled, &err), 0);
    ck_assert_int_eq(kvd_pool_seq_new(pool, ns, layout, &named, &err), 0);
    ck_assert_int_eq(kvd_pool_seq_new(pool, ns, layout, &other, &err), 0);
    ck_assert_int_eq(grow(pool, named, 1000, &err), 0);
    kvd_pool_info(pool, &info);
    uint64_t used = info.used;
    ck_assert_int_eq(kvd_pool_publish(pool, named, "named", false, &err), 0);
    ck_assert_int_eq(grow(pool, other, 1000, &err), 0);
    struct kvd_blocks_space space = space_of(ns, layout, "");
    keys_of(&space, labels, 20, keys);
    ck_assert_int_eq(kvd_blocks_publish(pool, &space, named, keys, 5, false, &out, &err), 0);
    keys_of(&space, labels + 1, 10, keys);
    keys[0].w[0]++; // another prompt
    ck_assert_int_eq(kvd_blocks_publish(pool, &space, other, keys, 1, true, &out, &err), 0);
    kvd_pool_seq_release(pool, other);
    kvd_pool_seq_release(pool, named);
    int fd = dup(kvd_pool_fd(pool));
    kvd_pool_leave(&pool);
    pool = kvd_pool_open(fd, &config, &mem, &err);
    ck_assert_msg(pool != NULL, "%s", err.text);
    kvd_pool_info(pool, &info);
    ck_assert_uint_eq(info.sequences, 1);
    ck_assert_uint_eq(info.used, used);
    verify(pool);
    kvd_pool_free(&pool);
    close(fd);
}
END_TEST

// -- random operations --------------------------------------------------------------------------

enum { SPACES = 4, SEQS = 24, BLOCKS = 20, KNOWN = 1 << 17, HELD = 8 };

// Spaces: two namespaces with one layout, one with another salt, one with planes.
struct known {
    struct kvd_prefix_key key;
    int space; // -1: none
    uint32_t depth;
    uint64_t page[2]; // of each plane's history, or sink; 0: not known
};

struct live {
    uint64_t id, length;
    int space; // -1: none
    uint8_t labels[BLOCKS];
    struct kvd_prefix_key keys[BLOCKS];
};

struct hold {
    struct kvd_blocks_at at;
    struct kvd_prefix_key keys[BLOCKS];
    int space; // -1: none
};

struct model {
    struct kvd_pool *pool;
    struct test_mem mem;
    uint64_t rng, done, refused, adopted, at_ends, gone, waited;
    struct kvd_blocks_space space[SPACES];
    struct known known[KNOWN];
    struct live live[SEQS];
    struct hold held[HELD];
    struct kvd_pool_room room;
};

static uint32_t below(struct model *m, uint32_t n)
{
    return (uint32_t)(kvd_rand(&m->rng) >> 33) % n;
}

static struct known *known_of(struct model *m, const struct kvd_prefix_key *key)
{
    for (struct known *k = &m->known[key->w[0] % (KNOWN - 512)]; k < m->known + KNOWN; k++)
        if (k->space < 0 || !memcmp(&k->key, key, sizeof(*key)))
            return k;
    ck_abort_msg("the model is full");
}

static void on_block_gone(void *ctx, uint32_t ns, uint32_t layout,
                          const struct kvd_prefix_removed *r)
{
    struct model *m = ctx;
    struct known *k = known_of(m, &r->key);
    ck_assert_int_ge(k->space, 0);
    ck_assert_uint_eq(m->space[k->space].ns, ns);
    ck_assert_uint_eq(m->space[k->space].layout, layout);
    ck_assert(!memcmp(m->space[k->space].domain, r->digest, sizeof(m->space[0].domain)));
    for (int i = 0; i < HELD; i++)
        for (uint32_t b = 0; m->held[i].space >= 0 && b < m->held[i].at.blocks; b++)
            ck_assert(memcmp(&m->held[i].keys[b], &r->key, sizeof(r->key)));
    m->gone++;
    // What the search for others goes over stays in the way.
    k->space = SPACES;
    memset(k->page, 0, sizeof(k->page));
}

static bool there(struct model *m, const struct kvd_prefix_key *key)
{
    int space = known_of(m, key)->space;
    return space >= 0 && space < SPACES;
}

static uint32_t known_blocks(struct model *m, const struct live *s, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && there(m, &s->keys[i]))
        i++;
    return i;
}

static void draw_labels(struct model *m, struct live *s, uint32_t from)
{
    for (uint32_t i = from; i < BLOCKS; i++)
        s->labels[i] = below(m, 4) ? 0 : (uint8_t)below(m, 3);
    keys_of(&m->space[s->space], s->labels, BLOCKS, s->keys);
}

static struct live *pick(struct model *m, bool used)
{
    for (int i = 0; i < 8; i++) {
        struct live *s = &m->live[below(m, SEQS)];
        if ((s->space >= 0) == used)
            return s;
    }
    return NULL;
}

static void op_new(struct model *m)
{
    struct live *s = pick(m, false);
    if (!s)
        return;
    *s = (struct live){.space = (int)below(m, SPACES)};
    const struct kvd_blocks_space *at = &m->space[s->space];
    draw_labels(m, s, 0);
    if (kvd_pool_seq_new(m->pool, at->ns, at->layout, &s->id, NULL))
        s->space = -1;
}

static void op_append(struct model *m)
{
    struct live *s = pick(m, true);
    uint32_t n = 1 + (below(m, 3) ? below(m, 60) : below(m, 500));
    if (!s || s->length + n > BLOCKS * T)
        return;
    int rc = grow(m->pool, s->id, n, NULL);
    ck_assert(rc == 0 || rc == KVD_E_FULL || rc == KVD_E_QUOTA);
    m->refused += rc != 0;
    s->length += rc ? 0 : n;
}

static void op_truncate(struct model *m)
{
    struct live *s = pick(m, true);
    if (!s)
        return;
    uint64_t to = below(m, (uint32_t)s->length + 1);
    if (kvd_pool_truncate(m->pool, s->id, to, NULL) == 0) {
        s->length = to;
        draw_labels(m, s, (uint32_t)(to / T)); // another story from there on
    }
}

static void op_release(struct model *m)
{
    struct live *s = pick(m, true);
    if (!s)
        return;
    kvd_pool_seq_release(m->pool, s->id);
    s->space = -1;
}

// The page of a block of a sequence, 0 if there is none.
static uint64_t page_of(struct model *m, const struct live *s, uint32_t plane, uint32_t block)
{
    const struct kvd_layout *l = kvd_pool_layout_get(m->pool, m->space[s->space].layout);
    uint32_t sink = l->planes[plane].sink / T;
    uint64_t pages[64];
    enum kvd_pool_kind kind = block < sink ? KVD_POOL_BF16 : KVD_POOL_CODEC;
    uint32_t at = block < sink ? block : block - sink;
    uint32_t n = kvd_pool_seq_pages(m->pool, s->id, plane, kind, pages, 64);
    return at < n ? pages[at] : 0;
}

static void op_publish(struct model *m)
{
    struct live *s = pick(m, true);
    struct kvd_blocks_published out;
    struct kvd_error err = {0};
    if (!s)
        return;
    bool end = below(m, 2);
    uint32_t n = (uint32_t)KVD_MIN(s->length / T, (uint64_t)BLOCKS);
    n = below(m, 4) ? n : below(m, n + 1);
    int rc = kvd_blocks_publish(m->pool, &m->space[s->space], s->id, s->keys, n, end, &out, &err);
    ck_assert_msg(rc == 0 || rc == KVD_E_LIMIT, "%s", err.text);
    ck_assert_uint_le(out.blocks, n);
    ck_assert(!out.end || out.blocks == n);
    ck_assert(!end || rc || n == 0 || out.end || s->space == 3);
    for (uint32_t i = 0; i < out.blocks; i++) {
        struct known *k = known_of(m, &s->keys[i]);
        if (!there(m, &s->keys[i]))
            *k = (struct known){.key = s->keys[i], .depth = i};
        k->space = s->space;
        for (uint32_t p = 0; p < 2 && i < out.sealed; p++)
            if (!k->page[p] && (p == 0 || s->space == 3))
                k->page[p] = page_of(m, s, p, i);
    }
}

static void op_match(struct model *m)
{
    struct live *s = pick(m, true);
    if (!s)
        return;
    uint32_t n = below(m, BLOCKS + 1), known = known_blocks(m, s, n);
    struct kvd_blocks_match q = {.keys = s->keys, .n = n};
    kvd_blocks_match(m->pool, &m->space[s->space], below(m, 2), &q);
    ck_assert_uint_eq(q.known, known);
    ck_assert_uint_le(q.at.blocks, known);
    if (q.known < n)
        ck_assert_int_ne(q.why, KVD_PREFIX_PRESENT);
    // Where all pages of the only plane are known, nothing less is offered.
    uint32_t pages = 0;
    while (pages < known && known_of(m, &s->keys[pages])->page[0])
        pages++;
    if (s->space != 3)
        ck_assert_uint_ge(q.at.blocks, pages);
    struct hold *h = &m->held[below(m, HELD)];
    if (h->space < 0 && q.at.blocks) {
        ck_assert_int_eq(kvd_blocks_hold(m->pool, &q.at, NULL), 0);
        *h = (struct hold){.at = q.at, .space = s->space};
        memcpy(h->keys, s->keys, sizeof(h->keys));
    }
}

static void op_unhold(struct model *m)
{
    struct hold *h = &m->held[below(m, HELD)];
    if (h->space < 0)
        return;
    kvd_blocks_release(m->pool, &h->at);
    h->space = -1;
}

static void check_adopted(struct model *m, const struct live *s, const struct hold *h)
{
    struct kvd_pool_seq_info info;
    ck_assert_int_eq(kvd_pool_seq_info(m->pool, s->id, &info), 0);
    ck_assert_uint_eq(info.length, s->length);
    ck_assert_uint_eq(info.ns, m->space[s->space].ns);
    ck_assert_uint_eq(info.layout, m->space[s->space].layout);
    if (!h->at.end) // every page is the one that was published
        for (uint32_t i = 0; i < s->length / T; i++)
            ck_assert_uint_eq(page_of(m, s, 0, i), known_of(m, &s->keys[i])->page[0]);
    m->adopted++;
    m->at_ends += h->at.end != 0;
}

static void op_adopt(struct model *m)
{
    struct hold *h = &m->held[below(m, HELD)];
    struct live *s = pick(m, false);
    struct kvd_error err = {0};
    if (h->space < 0 || !s)
        return;
    uint32_t n = below(m, 4) ? h->at.blocks : 1 + below(m, h->at.blocks);
    int rc = kvd_blocks_adopt(m->pool, &h->at, n, &s->id, &err);
    ck_assert_msg(rc == 0 || rc == KVD_E_LIMIT ||
                      (rc == KVD_E_PRECONDITION && h->space == 3 && n < h->at.blocks),
                  "%s", err.text);
    if (rc)
        return;
    s->space = h->space;
    s->length = (uint64_t)n * T;
    for (uint32_t i = 0; i < n; i++)
        s->keys[i] = h->keys[i];
    check_adopted(m, s, h);
    // Labels of what was adopted are not known here; so no more than that is published of it.
    kvd_pool_seq_release(m->pool, s->id);
    s->space = -1;
}

static void op_drop(struct model *m)
{
    struct live *s = pick(m, true);
    if (s && below(m, 8) == 0)
        kvd_blocks_drop(m->pool, &m->space[s->space], s->keys, BLOCKS, below(m, BLOCKS),
                        KVD_PREFIX_DROPPED);
}

static void op_quota(struct model *m)
{
    if (below(m, 8) == 0)
        kvd_pool_set_quota(m->pool, m->space[below(m, 2)].ns,
                           below(m, 2) ? 0 : (uint64_t)(1 + below(m, 6)) << 20);
}

static void compare(struct model *m)
{
    verify(m->pool);
    struct kvd_pool_look look = {0};
    struct kvd_pool_info info;
    while (!kvd_pool_look_step(m->pool, &look, 7))
        continue;
    kvd_pool_info(m->pool, &info);
    ck_assert_uint_le(look.bytes, info.used);
}

static void model_new(struct model *m)
{
    struct kvd_pool_mem_ops mem = {
        .ctx = &m->mem, .alloc = test_mem_alloc, .free = test_mem_free, .zero = test_mem_zero};
    struct kvd_pool_config config = {.bytes = 8 << 21,
                                     .extent_bytes = 2 << 20,
                                     .max_sequences = 64,
                                     .max_namespaces = 4,
                                     .max_layouts = 4,
                                     .on_block_gone = on_block_gone,
                                     .on_evict_ctx = m};
    uint32_t ns[2], layout[2];
    struct kvd_layout l = test_layout(1, 64, 128), w = windowed_layout();
    m->pool = kvd_pool_new(&config, &mem, NULL);
    ck_assert_int_eq(kvd_pool_namespace(m->pool, "n0", &ns[0], NULL), 0);
    ck_assert_int_eq(kvd_pool_namespace(m->pool, "n1", &ns[1], NULL), 0);
    ck_assert_int_eq(kvd_pool_layout(m->pool, ns[0], &l, one_plane, &layout[0], &recycled, NULL),
                     0);
    ck_assert_int_eq(kvd_pool_layout(m->pool, ns[0], &w, two_planes, &layout[1], &recycled, NULL),
                     0);
    m->space[0] = space_of(ns[0], layout[0], "");
    m->space[1] = space_of(ns[1], layout[0], "");
    m->space[2] = space_of(ns[0], layout[0], "salt");
    m->space[3] = space_of(ns[0], layout[1], "");
    for (int i = 0; i < KNOWN; i++)
        m->known[i].space = -1;
    for (int i = 0; i < SEQS; i++)
        m->live[i].space = -1;
    for (int i = 0; i < HELD; i++)
        m->held[i].space = -1;
}

// Room for a page of a namespace and layout, and steps of what is emptied for it.
static void op_room(struct model *m)
{
    static const uint64_t bytes[] = {16 << 10, 8 << 10};
    const struct kvd_blocks_space *space = &m->space[below(m, 4)];
    uint32_t plane = space == &m->space[3] ? below(m, 2) : 0, kind = below(m, 2);
    uint32_t n = 1 + below(m, kind == KVD_POOL_CODEC ? 200 : 130);
    struct kvd_pool_need need = {.bytes = n * bytes[plane] * (kind == KVD_POOL_CODEC ? 1 : 8)};
    need.pages[plane][kind] = n;
    m->waited += !kvd_pool_room_make(m->pool, space->ns, space->layout, &need, &m->room);
    for (uint32_t i = below(m, 8); i > 0; i--)
        kvd_pool_vacate_step(m->pool, below(m, 40));
}

START_TEST(random_operations)
{
    static void (*const ops[])(struct model *) = {
        op_new,     op_append,   op_append, op_append, op_append, op_publish,
        op_publish, op_match,    op_match,  op_adopt,  op_adopt,  op_unhold,
        op_release, op_truncate, op_drop,   op_quota,  op_room};
    static struct model m;
    m.rng = kvd_test_seed("blocks");
    model_new(&m);
    const char *env = getenv("KVD_POOL_OPS");
    uint64_t n = env ? strtoull(env, NULL, 0) : 60000;
    for (m.done = 0; m.done < n; m.done++) {
        ops[below(&m, KVD_LEN(ops))](&m);
        if (m.done % 101 == 0)
            compare(&m);
    }
    compare(&m);
    printf("%llu operations, %llu refused for room, %llu blocks gone, %llu adopted, %llu of them "
           "in a window\n",
           (unsigned long long)m.done, (unsigned long long)m.refused, (unsigned long long)m.gone,
           (unsigned long long)m.adopted, (unsigned long long)m.at_ends);
    printf("%llu times room was waited for\n", (unsigned long long)m.waited);
    ck_assert_uint_gt(m.refused, 0);
    ck_assert_uint_gt(m.gone, 0);
    ck_assert_uint_gt(m.adopted, m.at_ends);
    ck_assert_uint_gt(m.at_ends, 0);
    kvd_pool_free(&m.pool);
    ck_assert_uint_eq(m.mem.live, 0);
}
END_TEST

KVD_MAIN("blocks", 120, blocks_outlive_their_sequence, an_end_keeps_its_window,
         an_end_of_planes_has_the_window_of_all, an_append_evicts_blocks_before_it_fails,
         a_namespace_and_a_layout_go_with_their_blocks, what_is_refused,
         blocks_end_with_the_process, random_operations)
