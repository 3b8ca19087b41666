// The prefix index: random operations against a model that knows what is there and what keeps it,
// with the index's own verifier all along; keys; what eviction spares. KVD_POOL_OPS sets the number
// of operations (default 100,000).
#include "tests/unit/suite.h"

#include <sys/mman.h>
#include <time.h>

#include "pool/prefix_internal.h"
#include "proto/kvd_limits.h"

enum { DOMAINS = 3, NODES = 360, ENTRIES = 70, DEPTH = 24 };

static const uint8_t layout_digest[32] = "a layout";

struct node {
    struct kvd_prefix_key key;
    uint32_t parent; // node, or KVD_PREFIX_NONE
    uint32_t domain; // 0 to DOMAINS - 1
    bool there, demoted;
    enum kvd_prefix_class class; // where it is not demoted
    uint32_t value, entry, lease, holds, children;
    enum kvd_prefix_reason went;
    uint32_t when;
};

struct model {
    struct kvd_prefix *ix;
    void *region;
    uint64_t bytes, rng;
    uint32_t domain[DOMAINS], now, n_there;
    struct node node[NODES];
    uint32_t limit; // of removals that a call may make
    enum kvd_prefix_reason reason;
};

static uint32_t below(struct model *m, uint32_t n)
{
    return (uint32_t)(kvd_rand(&m->rng) >> 33) % n;
}

static void domain_digest(uint32_t i, uint8_t out[32])
{
    char ns[8];
    snprintf(ns, sizeof(ns), "ns%u", i);
    ck_assert_int_eq(kvd_prefix_domain_digest(ns, layout_digest, NULL, 0, out, NULL), KVD_OK);
}

static void take_domains(struct model *m)
{
    struct kvd_error err = {0};
    for (uint32_t i = 0; i < DOMAINS; i++) {
        uint8_t digest[32];
        domain_digest(i, digest);
        ck_assert_msg(!kvd_prefix_domain(m->ix, digest, &m->domain[i], &err), "%s", err.text);
    }
}

static void model_new(struct model *m, uint64_t seed)
{
    *m = (struct model){.rng = seed, .now = 1000};
    struct kvd_prefix_config c = {ENTRIES, DOMAINS, {seed, ~seed}};
    struct kvd_error err = {0};
    m->bytes = kvd_prefix_region_bytes(&c);
    m->region = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ck_assert(m->region != MAP_FAILED);
    m->ix = kvd_prefix_new(&c, m->region, &err);
    ck_assert_msg(m->ix != NULL, "%s", err.text);
    take_domains(m);
    // Bushy where they begin, long behind; the same keys in every domain.
    for (uint32_t i = 0; i < NODES; i++) {
        struct node *n = &m->node[i];
        uint32_t per = NODES / DOMAINS, at = i % per, first = i - at;
        n->domain = i / per;
        n->parent = at < 3 ? KVD_PREFIX_NONE : below(m, 4) == 0 ? first + below(m, at) : i - 1;
        if (n->domain)
            n->parent = m->node[i - per].parent == KVD_PREFIX_NONE ? KVD_PREFIX_NONE
                                                                   : m->node[i - per].parent + per;
        for (int w = 0; w < 3; w++)
            n->key.w[w] = n->domain ? m->node[i - per].key.w[w] : kvd_rand(&m->rng) | 1;
    }
}

// A path to a random node, which is not longer than DEPTH. Returns its length.
static uint32_t path_to(struct model *m, uint32_t *path, struct kvd_prefix_key *keys)
{
    uint32_t n = 0, back[NODES], at = below(m, NODES);
    for (; at != KVD_PREFIX_NONE; at = m->node[at].parent)
        back[n++] = at;
    uint32_t len = KVD_MIN(n, (uint32_t)DEPTH);
    for (uint32_t i = 0; i < len; i++) {
        path[i] = back[n - 1 - i];
        keys[i] = m->node[path[i]].key;
    }
    return len;
}

static uint32_t run_of(const struct model *m, const uint32_t *path, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && m->node[path[i]].there)
        i++;
    return i;
}

static enum kvd_prefix_class class_of(const struct node *n)
{
    return n->demoted ? KVD_PREFIX_DEMOTED : n->class;
}

static bool loose(const struct node *n)
{
    return n->there && !n->children && !n->holds;
}

static void gone(void *ctx, const struct kvd_prefix_removed *r)
{
    struct model *m = ctx;
    uint32_t i = 0;
    while (i < NODES && !(m->node[i].there && m->node[i].value == r->value))
        i++;
    ck_assert_uint_lt(i, NODES);
    struct node *n = &m->node[i];
    ck_assert_uint_eq(m->domain[n->domain], r->domain);
    ck_assert(prefix_key_equal(&n->key, &r->key));
    ck_assert_msg(loose(n), "what is held, or has blocks behind it, went");
    ck_assert_int_eq(r->reason, m->reason);
    if (m->reason == KVD_PREFIX_EVICTED_ROOM)
        ck_assert_uint_le(n->lease, m->now);
    for (uint32_t k = 0; k < NODES && m->reason == KVD_PREFIX_EVICTED_ROOM; k++)
        ck_assert_msg(!loose(&m->node[k]) || class_of(&m->node[k]) >= class_of(n) ||
                          m->node[k].lease,
                      "another went before one that was to go first");
    ck_assert_uint_gt(m->limit, 0);
    m->limit--;
    m->n_there--;
    n->there = false;
    n->went = r->reason;
    n->when = m->now;
    n->lease = 0;
    if (n->parent != KVD_PREFIX_NONE)
        m->node[n->parent].children--;
}

static void op_insert(struct model *m)
{
    uint32_t path[DEPTH], at[DEPTH], values[DEPTH], done = 99;
    struct kvd_prefix_key keys[DEPTH];
    uint32_t n = path_to(m, path, keys), from = below(m, run_of(m, path, n) + 1);
    static uint32_t next_value = 1;
    for (uint32_t i = 0; i < n; i++)
        values[i] = next_value++;
    struct kvd_error err = {0};
    uint32_t domain = m->domain[m->node[path[0]].domain];
    int rc =
        kvd_prefix_insert(m->ix, domain, from ? m->node[path[from - 1]].entry : KVD_PREFIX_NONE,
                          keys + from, values + from, n - from, at + from, &done, &err);
    uint32_t i = from;
    for (; i < n; i++) {
        struct node *node = &m->node[path[i]];
        if (!node->there && m->n_there == ENTRIES)
            break;
        if (node->there) {
            ck_assert_uint_eq(node->entry, at[i]);
            continue;
        }
        node->there = true;
        node->demoted = false;
        node->class = KVD_PREFIX_NORMAL;
        node->value = values[i];
        node->entry = at[i];
        node->lease = node->holds = node->children = 0;
        m->n_there++;
        if (i)
            m->node[path[i - 1]].children++;
    }
    ck_assert_uint_eq(done, i - from);
    ck_assert_int_eq(rc, i == n ? KVD_OK : KVD_E_FULL);
}

static void op_match(struct model *m)
{
    enum { N = 3 };
    uint32_t path[N][DEPTH], values[N][DEPTH];
    struct kvd_prefix_key keys[N][DEPTH];
    struct kvd_prefix_query q[N];
    for (int i = 0; i < N; i++) {
        uint32_t n = path_to(m, path[i], keys[i]);
        q[i] = (struct kvd_prefix_query){
            m->domain[m->node[path[i][0]].domain], n, keys[i], values[i], 99, 99};
    }
    bool peek = below(m, 4) == 0;
    uint32_t until = below(m, 2) ? 0 : m->now + below(m, 40);
    if (peek)
        kvd_prefix_peek(m->ix, q, N);
    else
        kvd_prefix_match(m->ix, q, N, until);
    for (int i = 0; i < N; i++) {
        ck_assert_uint_eq(q[i].found, run_of(m, path[i], q[i].n));
        for (uint32_t k = 0; k < q[i].found; k++)
            ck_assert_uint_eq(values[i][k], m->node[path[i][k]].value);
        if (!q[i].found) {
            ck_assert_uint_eq(q[i].entry, KVD_PREFIX_NONE);
            continue;
        }
        struct node *last = &m->node[path[i][q[i].found - 1]];
        ck_assert_uint_eq(q[i].entry, last->entry);
        if (!peek)
            last->lease = KVD_MAX(last->lease, until);
        for (uint32_t k = 0; k < q[i].found && !peek; k++)
            m->node[path[i][k]].demoted = false;
    }
}

static void op_keep(struct model *m)
{
    struct node *n = &m->node[below(m, NODES)];
    if (!n->there)
        return;
    switch (below(m, 4)) {
    case 0:
        if (n->holds < 2) {
            ck_assert_int_eq(kvd_prefix_hold(m->ix, n->entry, NULL), KVD_OK);
            n->holds++;
        }
        break;
    case 1:
    case 2:
        if (n->holds) {
            kvd_prefix_release(m->ix, n->entry);
            n->holds--;
        }
        break;
    default:
        n->lease = below(m, 3) ? m->now + below(m, 60) : 0;
        kvd_prefix_lease(m->ix, n->entry, n->lease);
    }
}

static void op_evict(struct model *m)
{
    uint32_t most = 1 + below(m, 12);
    m->limit = most;
    m->reason = KVD_PREFIX_EVICTED_ROOM;
    uint32_t n = kvd_prefix_evict(m->ix, most, m->reason, m->now, gone, m);
    ck_assert_uint_eq(n, most - m->limit);
    for (uint32_t i = 0; n < most && i < NODES; i++)
        ck_assert_msg(!loose(&m->node[i]) || m->node[i].lease > m->now,
                      "a leaf was left though more were asked for");
}

static void op_drop(struct model *m)
{
    uint32_t path[DEPTH];
    struct kvd_prefix_key keys[DEPTH];
    uint32_t n = path_to(m, path, keys), keep = below(m, n + 1), want = 0;
    uint32_t run = run_of(m, path, n);
    m->limit = DEPTH;
    m->reason = below(m, 2) ? KVD_PREFIX_DROPPED : KVD_PREFIX_DAMAGED;
    for (uint32_t i = run; i > keep; i--, want++) {
        const struct node *node = &m->node[path[i - 1]];
        if (node->holds || node->children > (i == run ? 0u : 1u))
            break;
    }
    uint32_t domain = m->domain[m->node[path[0]].domain];
    ck_assert_uint_eq(kvd_prefix_drop(m->ix, domain, keys, n, keep, m->reason, m->now, gone, m),
                      want);
}

// By keys, or by entries, of which some are left out: blocks behind those keep what is above.
static void op_classify(struct model *m)
{
    static const enum kvd_prefix_class classes[] = {KVD_PREFIX_DEMOTED, KVD_PREFIX_LOW,
                                                    KVD_PREFIX_NORMAL, KVD_PREFIX_HIGH};
    enum kvd_prefix_class class = classes[below(m, 4)];
    uint32_t path[DEPTH], entries[DEPTH], want = 0;
    struct kvd_prefix_key keys[DEPTH];
    uint32_t n = path_to(m, path, keys), run = run_of(m, path, n);
    bool by_entries = below(m, 2), alone = false;
    for (uint32_t i = run; i-- > 0;) {
        struct node *node = &m->node[path[i]];
        bool above = i + 1 < run && entries[i + 1] != KVD_PREFIX_NONE && alone;
        entries[i] = by_entries && below(m, 5) == 0 ? KVD_PREFIX_NONE : node->entry;
        if (entries[i] == KVD_PREFIX_NONE)
            continue;
        alone = node->children == above;
        if (class < class_of(node) && !alone)
            continue;
        want++;
        node->demoted = class == KVD_PREFIX_DEMOTED;
        node->class = node->demoted ? node->class : class;
    }
    uint32_t domain = m->domain[m->node[path[0]].domain];
    ck_assert_uint_eq(by_entries ? kvd_prefix_classify_entries(m->ix, entries, run, class)
                                 : kvd_prefix_classify(m->ix, domain, keys, n, class),
                      want);
}

static void op_why(struct model *m)
{
    const struct node *n = &m->node[below(m, NODES)];
    uint32_t when;
    enum kvd_prefix_reason r = kvd_prefix_why(m->ix, m->domain[n->domain], &n->key, &when);
    if (n->there)
        ck_assert_int_eq(r, KVD_PREFIX_PRESENT);
    else if (r != KVD_PREFIX_UNKNOWN) {
        ck_assert_int_eq(r, n->went);
        ck_assert_uint_eq(when, n->when);
    }
}

static void noise(struct model *m, void *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        ((uint8_t *)at)[i] = (uint8_t)(kvd_rand(&m->rng) >> 40);
}

// Fills what is derived with noise, and opens the region anew.
static void op_reopen(struct model *m)
{
    struct kvd_prefix *ix = m->ix;
    struct prefix_head *h = ix->head;
    struct kvd_error err = {0};
    noise(m, ix->bucket, ENTRIES * sizeof(*ix->bucket));
    noise(m, ix->ghost, (size_t)h->ghost_sets * GHOST_WAYS * sizeof(*ix->ghost));
    noise(m, ix->gone, (size_t)h->gone_sets * REMOVED_WAYS * sizeof(*ix->gone));
    noise(m, &h->entries, sizeof(*h) - offsetof(struct prefix_head, entries));
    for (uint32_t i = 0; i < ENTRIES; i++)
        noise(m, &ix->entry[i].uses, sizeof(*ix->entry) - offsetof(struct prefix_entry, uses));
    for (uint32_t i = 0; i < DOMAINS; i++)
        noise(m, &ix->domain[i].entries, 2 * sizeof(uint32_t));
    kvd_prefix_free(&m->ix);
    m->ix = kvd_prefix_open(m->region, m->bytes, &err);
    ck_assert_msg(m->ix != NULL, "%s", err.text);
    for (uint32_t i = 0; i < NODES; i++) {
        m->node[i].holds = m->node[i].demoted = 0;
        m->node[i].class = KVD_PREFIX_NORMAL;
        m->node[i].went = KVD_PREFIX_UNKNOWN;
    }
    // Domains with blocks are where they were; the others' numbers are free.
    uint32_t before[DOMAINS];
    memcpy(before, m->domain, sizeof(before));
    take_domains(m);
    for (uint32_t i = 0; i < NODES; i++)
        if (m->node[i].there)
            ck_assert_uint_eq(before[m->node[i].domain], m->domain[m->node[i].domain]);
}

static void check(struct model *m)
{
    struct kvd_error err = {0};
    struct kvd_prefix_info info;
    ck_assert_msg(!kvd_prefix_verify(m->ix, &err), "%s", err.text);
    kvd_prefix_info(m->ix, &info);
    ck_assert_uint_eq(info.entries, m->n_there);
    ck_assert_uint_eq(info.domains, DOMAINS);
    for (uint32_t i = 0; i < NODES; i++) {
        const struct node *n = &m->node[i];
        struct kvd_prefix_entry_info e;
        if (!n->there)
            continue;
        ck_assert(kvd_prefix_get(m->ix, n->entry, &e));
        ck_assert(prefix_key_equal(&n->key, &e.key));
        ck_assert_uint_eq(e.domain, m->domain[n->domain]);
        ck_assert_uint_eq(e.value, n->value);
        ck_assert_uint_eq(e.lease, n->lease);
        ck_assert_uint_eq(e.holds, n->holds);
        ck_assert_uint_eq(e.children, n->children);
        ck_assert_int_eq(e.class, class_of(n));
        ck_assert_uint_eq(e.parent, n->parent == KVD_PREFIX_NONE ? KVD_PREFIX_NONE
                                                                 : m->node[n->parent].entry);
    }
}

START_TEST(random_operations)
{
    const char *env = getenv("KVD_POOL_OPS");
    uint64_t ops = env ? strtoull(env, NULL, 0) : 100000;
    static struct model m;
    model_new(&m, kvd_test_seed("prefix"));
    for (uint64_t i = 0; i < ops; i++) {
        uint32_t what = below(&m, 1000);
        m.now += below(&m, 8) == 0;
        if (what < 330)
            op_insert(&m);
        else if (what < 600)
            op_match(&m);
        else if (what < 750)
            op_keep(&m);
        else if (what < 900)
            op_evict(&m);
        else if (what < 950)
            op_drop(&m);
        else if (what < 970)
            op_classify(&m);
        else if (what < 997)
            op_why(&m);
        else
            op_reopen(&m);
        if (i % 16 == 0)
            check(&m);
    }
    check(&m);
    kvd_prefix_free(&m.ix);
    munmap(m.region, m.bytes);
}
END_TEST

static struct kvd_prefix *small(uint32_t entries, uint32_t domains)
{
    struct kvd_prefix_config c = {entries, domains, {0x9e3779b97f4a7c15, 0xd1b54a32d192ed03}};
    struct kvd_prefix *ix = kvd_prefix_new(&c, NULL, NULL);
    ck_assert(ix != NULL);
    return ix;
}

START_TEST(keys_depend_on_all_that_they_name)
{
    uint8_t a[32], b[32];
    uint8_t other_layout[32] = "another layout";
    struct kvd_prefix_key k[4], l[4];
    struct kvd_error err = {0};
    // Where one part ends and the next begins makes a difference.
    kvd_prefix_domain_digest("ab", layout_digest, "c", 1, a, NULL);
    kvd_prefix_domain_digest("a", layout_digest, "bc", 2, b, NULL);
    ck_assert(memcmp(a, b, 32) != 0);
    kvd_prefix_domain_digest("ab", other_layout, "c", 1, b, NULL);
    ck_assert(memcmp(a, b, 32) != 0);
    uint8_t blocks[4 * KVD_MAX_BLOCK_KEY] = {0};
    for (uint32_t bytes = KVD_MIN_BLOCK_KEY; bytes <= KVD_MAX_BLOCK_KEY; bytes++) {
        ck_assert(!kvd_prefix_keys_of_blocks(a, NULL, blocks, bytes, 4, k, &err));
        ck_assert(!kvd_prefix_keys_of_blocks(b, NULL, blocks, bytes, 4, l, &err));
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) // the same block keys, in another place or domain
                ck_assert(!prefix_key_equal(&k[i], &l[j]) &&
                          (i == j || !prefix_key_equal(&k[i], &k[j])));
        ck_assert(!kvd_prefix_keys_of_blocks(a, NULL, blocks, bytes, 2, l, &err));
        ck_assert(!kvd_prefix_keys_of_blocks(a, &l[1], blocks + 2 * (size_t)bytes, bytes, 2, l + 2,
                                             &err));
        ck_assert_mem_eq(k, l, sizeof(k));
    }
    ck_assert_int_eq(kvd_prefix_keys_of_blocks(a, NULL, blocks, 15, 1, k, &err), KVD_E_INVALID);
    ck_assert_int_eq(kvd_prefix_keys_of_blocks(a, NULL, blocks, 41, 1, k, &err), KVD_E_INVALID);
    ck_assert_str_eq(err.text, "block keys of 41 bytes: 16 to 40 are possible");
    // A first block is not one behind a key of zeros.
    static const struct kvd_prefix_key zero;
    kvd_prefix_keys_of_blocks(a, NULL, blocks, 16, 1, k, NULL);
    kvd_prefix_keys_of_blocks(a, &zero, blocks, 16, 1, l, NULL);
    ck_assert(!prefix_key_equal(k, l));
}
END_TEST

START_TEST(keys_are_the_same_everywhere)
{
    uint8_t domain[32], blocks[2 * 32];
    uint32_t tokens[2 * KVD_PAGE_TOKENS];
    struct kvd_prefix_key k[2];
    char hex[2 * sizeof(k[0]) + 1];
    for (uint32_t i = 0; i < sizeof(blocks); i++)
        blocks[i] = (uint8_t)i;
    for (uint32_t i = 0; i < KVD_LEN(tokens); i++)
        tokens[i] = 1000 + i;
    kvd_prefix_domain_digest("default", layout_digest, "salt", 4, domain, NULL);
    kvd_prefix_keys_of_blocks(domain, NULL, blocks, 32, 2, k, NULL);
    kvd_hex(&k[1], sizeof(k[1]), hex);
    ck_assert_str_eq(hex, "3c01aebd29858fecf255916dae59baba31316f8040d4c920");
    kvd_prefix_keys_of_tokens(domain, NULL, tokens, 2, k, NULL);
    kvd_hex(&k[1], sizeof(k[1]), hex);
    ck_assert_str_eq(hex, "a3a87697d1218ffa6e5db70c6fda93e620a93d6a44903f26");
}
END_TEST

START_TEST(domains_are_apart)
{
    struct kvd_prefix *ix = small(8, 2);
    struct kvd_error err = {0};
    const uint8_t digests[3][32] = {"one", "two", "three"};
    uint32_t d[3], again, done, value = 7, when;
    ck_assert(!kvd_prefix_domain(ix, digests[0], &d[0], &err));
    ck_assert(!kvd_prefix_domain(ix, digests[1], &d[1], &err));
    ck_assert_int_eq(kvd_prefix_domain(ix, digests[2], &d[2], &err), KVD_E_LIMIT);
    struct kvd_prefix_key key = {{1, 2, 3}}, near[3] = {{{0, 2, 3}}, {{1, 0, 3}}, {{1, 2, 0}}};
    ck_assert(!kvd_prefix_insert(ix, d[0], KVD_PREFIX_NONE, &key, &value, 1, NULL, &done, &err));
    ck_assert_int_eq(kvd_prefix_why(ix, d[0], &key, &when), KVD_PREFIX_PRESENT);
    ck_assert_int_eq(kvd_prefix_why(ix, d[1], &key, &when), KVD_PREFIX_UNKNOWN);
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(kvd_prefix_why(ix, d[0], &near[i], &when), KVD_PREFIX_UNKNOWN);
    // A domain stays while it has blocks, though nobody holds it.
    kvd_prefix_domain_release(ix, d[0]);
    ck_assert_int_eq(kvd_prefix_domain(ix, digests[2], &d[2], &err), KVD_E_LIMIT);
    ck_assert(!kvd_prefix_domain(ix, digests[0], &again, &err));
    ck_assert_uint_eq(again, d[0]);
    kvd_prefix_domain_release(ix, again);
    ck_assert_uint_eq(kvd_prefix_evict(ix, 9, KVD_PREFIX_EVICTED_QUOTA, 5, NULL, NULL), 1);
    ck_assert_int_eq(kvd_prefix_why(ix, d[0], &key, &when), KVD_PREFIX_EVICTED_QUOTA);
    ck_assert_uint_eq(when, 5);
    ck_assert(!kvd_prefix_domain(ix, digests[2], &d[2], &err));
    kvd_prefix_free(&ix);
}
END_TEST

START_TEST(a_key_has_one_parent)
{
    struct kvd_prefix *ix = small(8, 1);
    struct kvd_error err = {0};
    const uint8_t digest[32] = "one";
    uint32_t d, done, at[3], values[3] = {1, 2, 3};
    struct kvd_prefix_key keys[3] = {{{1}}, {{2}}, {{3}}}, other[2] = {{{1}}, {{3}}};
    ck_assert(!kvd_prefix_domain(ix, digest, &d, &err));
    ck_assert(!kvd_prefix_insert(ix, d, KVD_PREFIX_NONE, keys, values, 3, at, &done, &err));
    ck_assert_int_eq(kvd_prefix_insert(ix, d, KVD_PREFIX_NONE, other, values, 2, NULL, &done, &err),
                     KVD_E_INVALID);
    ck_assert_uint_eq(done, 1);
    ck_assert(!kvd_prefix_verify(ix, &err));
    struct kvd_prefix_query q = {.domain = d, .n = 2, .keys = other};
    kvd_prefix_match(ix, &q, 1, 0);
    ck_assert_uint_eq(q.found, 1);
    kvd_prefix_free(&ix);
}
END_TEST

START_TEST(what_contradicts_itself_is_not_opened)
{
    struct kvd_prefix_config c = {8, 2, {1, 2}};
    struct kvd_error err = {0};
    uint64_t bytes = kvd_prefix_region_bytes(&c);
    void *region = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ck_assert(!kvd_prefix_open(region, bytes, &err));
    struct kvd_prefix *ix = kvd_prefix_new(&c, region, &err);
    const uint8_t digest[32] = "one";
    uint32_t d, done, at[3], values[3] = {1, 2, 3};
    struct kvd_prefix_key keys[3] = {{{1}}, {{2}}, {{3}}};
    ck_assert(!kvd_prefix_domain(ix, digest, &d, &err));
    ck_assert(!kvd_prefix_insert(ix, d, KVD_PREFIX_NONE, keys, values, 3, at, &done, &err));
    struct prefix_entry *e = ix->entry;
    kvd_prefix_free(&ix);
    struct prefix_entry good[3];
    memcpy(good, e, sizeof(good));
    for (int i = 0; i < 6; i++) {
        static const char *const what[] = {"parent is none",
                                           "each other's parents",
                                           "domain that cannot be",
                                           "another domain",
                                           "twice",
                                           "not"};
        memcpy(e, good, sizeof(good));
        switch (i) {
        case 0:
            e[at[1]].used = false;
            break;
        case 1:
            e[at[0]].parent = at[2];
            break;
        case 2:
            e[at[2]].domain = 2;
            break;
        case 3:
            e[at[2]].domain = 1 - e[at[2]].domain;
            break;
        case 4:
            e[at[2]].key = e[at[1]].key;
            break;
        default:
            bytes -= 4096;
        }
        ck_assert(!kvd_prefix_open(region, bytes, &err));
        ck_assert_int_eq(err.code, KVD_E_CORRUPT);
        ck_assert_msg(strstr(err.text, what[i]) != NULL, "%s: %s", what[i], err.text);
    }
    bytes += 4096;
    ix = kvd_prefix_open(region, bytes, &err);
    ck_assert_msg(ix != NULL, "%s", err.text);
    kvd_prefix_free(&ix);
    munmap(region, bytes);
    c.entries = 0;
    ck_assert(!kvd_prefix_new(&c, NULL, &err));
    ck_assert_int_eq(err.code, KVD_E_INVALID);
}
END_TEST

// A request for a prompt of n blocks, as a worker makes it.
static uint32_t request(struct kvd_prefix *ix, uint32_t d, const struct kvd_prefix_key *keys,
                        uint32_t n)
{
    struct kvd_prefix_query q = {.domain = d, .n = n, .keys = keys};
    struct kvd_prefix_info info;
    uint32_t done, values[64] = {0};
    kvd_prefix_match(ix, &q, 1, 0);
    if (q.entry != KVD_PREFIX_NONE)
        kvd_prefix_hold(ix, q.entry, NULL);
    kvd_prefix_info(ix, &info);
    if (info.entries + n - q.found > info.capacity)
        kvd_prefix_evict(ix, info.entries + n - q.found - info.capacity, KVD_PREFIX_EVICTED_INDEX,
                         0, NULL, NULL);
    kvd_prefix_insert(ix, d, q.entry, keys + q.found, values, n - q.found, NULL, &done, NULL);
    if (q.entry != KVD_PREFIX_NONE)
        kvd_prefix_release(ix, q.entry);
    return q.found;
}

// Prompts that come back after more one-time prompts than the index has room for are found again,
// which the order of last use would never do.
START_TEST(one_time_prompts_do_not_push_out_what_comes_back)
{
    enum { PROMPTS = 16, BLOCKS = 32, ROOM = 2 * PROMPTS * BLOCKS };
    struct kvd_prefix *ix = small(ROOM, 1);
    struct kvd_error err = {0};
    const uint8_t digest[32] = "one";
    struct kvd_prefix_key keys[BLOCKS];
    uint32_t d, found = 0, asked = 0;
    uint64_t rng = kvd_test_seed("one-time prompts");
    ck_assert(!kvd_prefix_domain(ix, digest, &d, &err));
    for (uint32_t round = 0; round < 600; round++) {
        for (uint32_t i = 0; i < BLOCKS; i++)
            keys[i] = (struct kvd_prefix_key){{round % PROMPTS + 1, i, 0}};
        uint32_t n = request(ix, d, keys, BLOCKS);
        if (round >= 400) {
            found += n;
            asked += BLOCKS;
        }
        for (int scans = 0; scans < 3; scans++) { // 1.5 times the room in a round of all prompts
            for (uint32_t i = 0; i < BLOCKS; i++)
                keys[i] = (struct kvd_prefix_key){{kvd_rand(&rng), i, 1}};
            request(ix, d, keys, BLOCKS);
        }
    }
    printf("found again: %u of %u\n", found, asked);
    ck_assert_uint_gt(found * 10, asked * 9);
    ck_assert(!kvd_prefix_verify(ix, &err));
    kvd_prefix_free(&ix);
}
END_TEST

// -- how long what goes had not been used -------------------------------------------------------

struct went {
    uint32_t n, age[64];
};

static void note_age(void *ctx, const struct kvd_prefix_removed *r)
{
    struct went *w = ctx;
    w->age[w->n++] = r->age;
}

// Of blocks used in ticks that began at 1010, 1020 and so on, and go at 1100.
START_TEST(what_goes_tells_how_long_it_was_not_used)
{
    enum { BLOCKS = 4, ROOM = 64 };
    struct kvd_prefix *ix = small(ROOM, 1);
    struct kvd_error err = {0};
    struct went w = {0};
    const uint8_t digest[32] = "one";
    uint32_t d, done, entry[BLOCKS], value = 0, now = (uint32_t)time(NULL);
    ck_assert(!kvd_prefix_domain(ix, digest, &d, &err));
    for (uint32_t i = 0; i < BLOCKS; i++) {
        struct kvd_prefix_key key = {{i + 1, 0, 0}};
        ck_assert(
            !kvd_prefix_insert(ix, d, KVD_PREFIX_NONE, &key, &value, 1, &entry[i], &done, &err));
    }
    // What was never used since is as old as the index, which has just begun.
    kvd_prefix_evict(ix, 1, KVD_PREFIX_EVICTED_ROOM, now + 50, note_age, &w);
    ck_assert_uint_eq(w.n, 1);
    ck_assert_uint_ge(w.age[0] + 2, 50);
    ck_assert_uint_le(w.age[0], 50);
    for (uint32_t i = 1; i < BLOCKS; i++) {
        uint32_t tick = ix->head->reuse.tick;
        while (ix->head->reuse.tick == tick)
            kvd_prefix_use(ix, &entry[BLOCKS - 1], 1);
        ix->tick_began[ix->head->reuse.tick % REUSE_TIMES] = 1000 + 10 * i;
        kvd_prefix_use(ix, &entry[i], 1);
    }
    w.n = 0;
    ck_assert_uint_eq(kvd_prefix_evict(ix, ROOM, KVD_PREFIX_EVICTED_ROOM, 1100, note_age, &w),
                      BLOCKS - 1);
    uint32_t seen = 0;
    for (uint32_t i = 0; i < w.n; i++)
        for (uint32_t k = 1; k < BLOCKS; k++)
            seen |= w.age[i] == 100 - 10 * k ? 1u << k : 0;
    ck_assert_uint_eq(seen, 0xe);
    kvd_prefix_free(&ix);
}
END_TEST

// Whatever their use says, lower classes go before higher ones, of which one is ranked as ever;
// where only high ones are left these go too.
START_TEST(lower_classes_go_first)
{
    enum { PROMPTS = 6, BLOCKS = 4 };
    static const enum kvd_prefix_class class[PROMPTS] = {KVD_PREFIX_HIGH,   KVD_PREFIX_LOW,
                                                         KVD_PREFIX_NORMAL, KVD_PREFIX_NORMAL,
                                                         KVD_PREFIX_LOW,    KVD_PREFIX_HIGH};
    struct kvd_prefix *ix = small(64, 1);
    struct kvd_error err = {0};
    const uint8_t digest[32] = "one";
    uint32_t d, done, values[BLOCKS];
    struct kvd_prefix_key keys[PROMPTS][BLOCKS];
    struct kvd_prefix_entry_info e;
    ck_assert(!kvd_prefix_domain(ix, digest, &d, &err));
    for (uint32_t p = 0; p < PROMPTS; p++) {
        for (uint32_t i = 0; i < BLOCKS; i++) {
            keys[p][i] = (struct kvd_prefix_key){{p + 1, i, 0}};
            values[i] = p;
        }
        kvd_prefix_insert(ix, d, KVD_PREFIX_NONE, keys[p], values, BLOCKS, NULL, &done, &err);
        ck_assert_uint_eq(kvd_prefix_classify(ix, d, keys[p], BLOCKS, class[p]), BLOCKS);
    }
    // Use does not end a class.
    struct kvd_prefix_query q = {.domain = d, .n = BLOCKS, .keys = keys[1]};
    for (uint32_t i = 0; i < 300; i++)
        kvd_prefix_match(ix, &q, 1, 0);
    enum kvd_prefix_class last = KVD_PREFIX_DEMOTED;
    for (uint32_t i = 0; i < PROMPTS * BLOCKS; i++) {
        enum kvd_prefix_class lowest = KVD_PREFIX_HIGH, before[64];
        for (uint32_t k = 0; k < 64; k++) {
            before[k] = kvd_prefix_get(ix, k, &e) ? e.class : KVD_PREFIX_HIGH + 1;
            lowest = KVD_MIN(lowest, before[k]);
        }
        ck_assert_uint_eq(kvd_prefix_evict(ix, 1, KVD_PREFIX_EVICTED_ROOM, 1, NULL, NULL), 1);
        for (uint32_t k = 0; k < 64; k++)
            if (before[k] <= KVD_PREFIX_HIGH && !kvd_prefix_get(ix, k, &e))
                ck_assert_int_eq(before[k], lowest);
        ck_assert(lowest >= last);
        last = lowest;
        ck_assert(!kvd_prefix_verify(ix, &err));
    }
    kvd_prefix_free(&ix);
}
END_TEST

KVD_MAIN("prefix", 240, lower_classes_go_first, what_goes_tells_how_long_it_was_not_used,
         random_operations, keys_depend_on_all_that_they_name, keys_are_the_same_everywhere,
         domains_are_apart, a_key_has_one_parent, what_contradicts_itself_is_not_opened,
         one_time_prompts_do_not_push_out_what_comes_back)
