// Random operations against a model that only knows lengths, names, holders and quotas; the pool's
// own verifier checks pages and counters all along. KVD_POOL_OPS sets the number of operations
// (default one million).
#include "tests/unit/suite.h"

#include <errno.h>

#include "tests/unit/pool_fixture.h"

enum { MAX_LIVE = 64, NAMES = 16, SPACES = 3, SENDERS = 3, MAX_SEQUENCES = 72 };

struct model_seq {
    uint64_t id, length;
    uint32_t ns, holders;
    int name; // -1: none
    bool used;
    struct kvd_pool_append_request last;
    bool last_there; // nothing has changed the sequence since
};

struct model {
    struct kvd_pool *pool;
    struct test_mem mem;
    uint32_t ns[SPACES], layout[2];
    struct model_seq seq[MAX_LIVE];
    uint64_t rng;
    uint64_t done, refused, evicted, repeats, shared;
};

static const char *name_of(int i)
{
    static const char *const names[NAMES] = {"n0", "n1", "n2",  "n3",  "n4",  "n5",  "n6",  "n7",
                                             "n8", "n9", "n10", "n11", "n12", "n13", "n14", "n15"};
    return names[i];
}

static void on_evict(void *ctx, uint32_t ns, uint64_t id, const char *name)
{
    struct model *m = ctx;
    for (int i = 0; i < MAX_LIVE; i++) {
        struct model_seq *s = &m->seq[i];
        if (!s->used || s->id != id)
            continue;
        ck_assert_uint_eq(s->holders, 0); // live sequences are never evicted
        ck_assert_uint_eq(s->ns, ns);
        ck_assert_str_eq(name_of(s->name), name);
        s->used = false;
        m->evicted++;
        return;
    }
    ck_abort_msg("an unknown sequence was evicted");
}

static struct model_seq *pick(struct model *m, bool want_held)
{
    for (int tries = 0; tries < 8; tries++) {
        struct model_seq *s = &m->seq[kvd_rand(&m->rng) % MAX_LIVE];
        if (s->used && (!want_held || s->holders))
            return s;
    }
    return NULL;
}

static struct model_seq *free_slot(struct model *m)
{
    for (int i = 0; i < MAX_LIVE; i++)
        if (!m->seq[i].used)
            return &m->seq[i];
    return NULL;
}

// A sequence was refused: the namespace has its share, and nobody who has as much can be evicted.
static void check_share(struct model *m, struct model_seq *refused, int rc)
{
    uint64_t all = 0, of[SPACES] = {0}, mine = UINT64_MAX;
    ck_assert_int_eq(rc, KVD_E_LIMIT);
    refused->used = false;
    for (int i = 0; i < MAX_LIVE; i++) {
        const struct model_seq *s = &m->seq[i];
        all += s->used;
        for (int n = 0; n < SPACES && s->used; n++)
            of[n] += s->ns == m->ns[n];
    }
    for (int n = 0; n < SPACES; n++)
        mine = refused->ns == m->ns[n] ? of[n] : mine;
    ck_assert_uint_ge(mine, MAX_SEQUENCES - all);
    for (int i = 0; i < MAX_LIVE; i++) {
        const struct model_seq *s = &m->seq[i];
        if (!s->used || s->holders)
            continue;
        ck_assert_uint_ne(s->ns, refused->ns);
        for (int n = 0; n < SPACES; n++)
            ck_assert(s->ns != m->ns[n] || of[n] <= mine);
    }
    m->shared++;
}

static void op_new(struct model *m)
{
    struct model_seq *s = free_slot(m);
    if (!s)
        return;
    uint32_t ns = m->ns[kvd_rand(&m->rng) % SPACES];
    *s = (struct model_seq){.ns = ns, .holders = 1, .name = -1};
    int rc = kvd_pool_seq_new(m->pool, ns, m->layout[kvd_rand(&m->rng) % 2], &s->id, NULL);
    s->used = true;
    if (rc)
        check_share(m, s, rc);
}

static void op_append(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    uint32_t n = kvd_rand(&m->rng) % 4 ? 1 + kvd_rand(&m->rng) % 20
                                       : 1 + (uint32_t)(kvd_rand(&m->rng) % 700);
    struct kvd_pool_append a;
    struct kvd_error err = {0};
    struct kvd_pool_append_request by = {.seq = s->id,
                                         .position = s->length,
                                         .tokens = n,
                                         .layer_count = 1,
                                         .appender = kvd_rand(&m->rng) % SENDERS,
                                         .request = m->done + 1};
    int rc = kvd_pool_append_begin(m->pool, &by, &a, &err);
    if (rc) {
        ck_assert_msg(rc == KVD_E_QUOTA || rc == KVD_E_FULL, "%s", err.text);
        m->refused++;
        return;
    }
    ck_assert(!a.replayed);
    if (kvd_rand(&m->rng) % 16 == 0) {
        kvd_pool_append_abort(m->pool, &a);
        return;
    }
    kvd_pool_append_commit(m->pool, &a);
    s->length += n;
    s->last = by;
    s->last_there = true;
}

// Sends the last append of a sequence again, as it was or changed a little.
static void op_repeat(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s || !s->last.request)
        return;
    struct kvd_pool_append_request by = s->last;
    uint32_t change = kvd_rand(&m->rng) % 5;
    by.appender += change == 1;
    by.request += change == 2 ? 1u << 31 : 0;
    by.tokens += change == 3;
    by.request = change == 4 ? 0 : by.request;
    struct kvd_pool_append a;
    struct kvd_error err = {0};
    int rc = kvd_pool_append_begin(m->pool, &by, &a, &err);
    bool named = change == 0 || change == 3;
    if (change == 0 && s->last_there) {
        ck_assert_msg(rc == 0 && a.replayed, "%s", err.text);
        ck_assert_uint_eq(a.new_length, s->length);
        m->repeats++;
    } else if (!named && by.position == s->length) { // to be stored like any other
        ck_assert(rc == 0 ? !a.replayed : rc == KVD_E_QUOTA || rc == KVD_E_FULL);
        if (rc == 0)
            kvd_pool_append_abort(m->pool, &a);
    } else {
        ck_assert_int_eq(rc, KVD_E_PRECONDITION);
    }
}

static void op_fork(struct model *m)
{
    struct model_seq *s = pick(m, true), *c = free_slot(m);
    if (!s || !c)
        return;
    uint64_t id;
    *c = (struct model_seq){.length = s->length, .ns = s->ns, .holders = 1, .name = -1};
    int rc = kvd_pool_seq_fork(m->pool, s->id, &id, NULL);
    c->id = id;
    c->used = true;
    if (rc)
        check_share(m, c, rc);
}

static void op_truncate(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    uint64_t to = kvd_rand(&m->rng) % (s->length + 1);
    ck_assert_int_eq(kvd_pool_truncate(m->pool, s->id, to, NULL), 0);
    s->last_there &= to == s->length;
    s->length = to;
}

static void op_publish(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    int name = (int)(kvd_rand(&m->rng) % NAMES);
    struct model_seq *owner = NULL;
    for (int i = 0; i < MAX_LIVE; i++)
        if (m->seq[i].used && m->seq[i].ns == s->ns && m->seq[i].name == name)
            owner = &m->seq[i];
    bool replace = kvd_rand(&m->rng) % 2;
    int rc = kvd_pool_publish(m->pool, s->id, name_of(name), replace, NULL);
    if (owner && owner != s && !replace) {
        ck_assert_int_eq(rc, KVD_E_EXISTS);
        return;
    }
    ck_assert_int_eq(rc, 0);
    if (owner && owner != s) {
        owner->name = -1;
        owner->used = owner->holders > 0;
    }
    s->name = name;
}

static void op_hold(struct model *m)
{
    struct model_seq *s = pick(m, false);
    if (!s || s->name < 0)
        return;
    ck_assert_uint_eq(kvd_pool_lookup(m->pool, s->ns, name_of(s->name)), s->id);
    ck_assert_int_eq(kvd_pool_seq_hold(m->pool, s->id), 0);
    s->holders++;
}

static void op_release(struct model *m)
{
    struct model_seq *s = pick(m, true);
    if (!s)
        return;
    kvd_pool_seq_release(m->pool, s->id);
    s->holders--;
    if (s->holders == 0 && s->name < 0)
        s->used = false;
}

static void op_quota(struct model *m)
{
    uint64_t quota = kvd_rand(&m->rng) % 3 ? 0 : (1 + kvd_rand(&m->rng) % 8) << 20;
    kvd_pool_set_quota(m->pool, m->ns[kvd_rand(&m->rng) % SPACES], quota);
}

static void compare(struct model *m)
{
    struct kvd_error err = {0};
    ck_assert_msg(kvd_pool_verify(m->pool, &err) == 0, "after %llu operations: %s",
                  (unsigned long long)m->done, err.text);
    uint64_t sequences = 0;
    for (int i = 0; i < MAX_LIVE; i++) {
        struct model_seq *s = &m->seq[i];
        struct kvd_pool_seq_info info;
        if (!s->used)
            continue;
        sequences++;
        ck_assert_int_eq(kvd_pool_seq_info(m->pool, s->id, &info), 0);
        ck_assert_uint_eq(info.length, s->length);
        ck_assert_uint_eq(info.holders, s->holders);
        ck_assert_str_eq(info.name, s->name < 0 ? "" : name_of(s->name));
    }
    struct kvd_pool_info info;
    kvd_pool_info(m->pool, &info);
    ck_assert_uint_eq(info.sequences, sequences);
}

START_TEST(random_operations)
{
    static void (*const ops[])(struct model *) = {
        op_new,     op_append, op_append,  op_append,  op_append, op_fork,   op_truncate,
        op_publish, op_hold,   op_release, op_release, op_append, op_repeat, op_quota};
    static struct model m;
    m.rng = kvd_test_seed("random_operations");
    struct kvd_pool_mem_ops mem = {
        .ctx = &m.mem, .alloc = test_mem_alloc, .free = test_mem_free, .zero = test_mem_zero};
    struct kvd_pool_config config = {.bytes = 12 << 21,
                                     .extent_bytes = 2 << 20,
                                     .max_sequences = MAX_SEQUENCES,
                                     .id_seed = 0xfffffff0, // generations wrap around
                                     .max_namespaces = SPACES,
                                     .max_layouts = 4,
                                     .on_evict = on_evict,
                                     .on_evict_ctx = &m};
    m.pool = kvd_pool_new(&config, &mem, NULL);
    const uint64_t big[][KVD_POOL_KINDS] = {{128 << 10, 16 << 10}};
    const uint64_t small[][KVD_POOL_KINDS] = {{40 << 10, 5000}};
    struct kvd_layout g = test_layout(1, 64, 256), h = test_layout(1, 16, 32);
    ck_assert_int_eq(kvd_pool_layout(m.pool, m.ns[0], &g, big, &m.layout[0], &recycled, NULL), 0);
    ck_assert_int_eq(kvd_pool_layout(m.pool, m.ns[0], &h, small, &m.layout[1], &recycled, NULL), 0);
    for (int i = 0; i < SPACES; i++)
        ck_assert_int_eq(kvd_pool_namespace(m.pool, name_of(i), &m.ns[i], NULL), 0);
    const char *env = getenv("KVD_POOL_OPS");
    uint64_t n = env ? strtoull(env, NULL, 0) : 1000000;
    for (m.done = 0; m.done < n; m.done++) {
        uint64_t op = kvd_rand(&m.rng) % (KVD_LEN(ops) * 8);
        if (op == 0)
            op = KVD_LEN(ops) - 1;
        else
            op %= KVD_LEN(ops) - 1;
        ops[op](&m);
        if (m.done % 997 == 0)
            compare(&m);
    }
    compare(&m);
    printf("%llu operations, %llu refused for room, %llu evictions, %llu repeats, %llu over their "
           "share\n",
           (unsigned long long)m.done, (unsigned long long)m.refused, (unsigned long long)m.evicted,
           (unsigned long long)m.repeats, (unsigned long long)m.shared);
    ck_assert_uint_gt(m.refused, 0);
    ck_assert_uint_gt(m.evicted, 0);
    ck_assert_uint_gt(m.repeats, 0);
    ck_assert_uint_gt(m.shared, 0);
    kvd_pool_free(&m.pool);
    ck_assert_uint_eq(m.mem.live, 0);
}
END_TEST

KVD_MAIN("pool_model", 600, random_operations)
