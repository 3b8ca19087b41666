// The prefix index: domains, entries, runs of keys. Read prefix.h first.
#include "pool/prefix_internal.h"

#include <errno.h>
#include <sys/mman.h>

enum {
    AHEAD = 8,               // keys whose memory is asked for before it is wanted
    TICKS_OF_INSERTIONS = 8, // before time goes on, where nobody looks anything up
};

uint64_t prefix_lay_out(struct kvd_prefix *ix, const struct kvd_prefix_config *c, uint8_t *base)
{
    uint64_t at = 0;
    uint64_t ghosts = kvd_div_up((uint64_t)c->entries * GHOSTS_PER_ENTRY, GHOST_WAYS) * GHOST_WAYS;
    uint64_t gone = kvd_div_up(c->entries, ENTRIES_PER_REMOVED * REMOVED_WAYS) * REMOVED_WAYS;
#define PLACE(field, count)                                                                        \
    do {                                                                                           \
        at = kvd_round_up(at, 4096);                                                               \
        ix->field = (void *)(base + at);                                                           \
        at += (uint64_t)(count) * sizeof(*ix->field);                                              \
    } while (0)
    PLACE(head, 1);
    PLACE(domain, c->domains);
    PLACE(bucket, c->entries);
    PLACE(ghost, ghosts);
    PLACE(gone, gone);
    PLACE(entry, c->entries);
#undef PLACE
    return kvd_round_up(at, 4096);
}

uint64_t kvd_prefix_region_bytes(const struct kvd_prefix_config *c)
{
    struct kvd_prefix ix;
    if (c->entries < 1 || c->entries > KVD_PREFIX_MAX_ENTRIES || c->domains < 1 ||
        c->domains > KVD_PREFIX_MAX_DOMAINS)
        return 0;
    return prefix_lay_out(&ix, c, NULL);
}

struct kvd_prefix *kvd_prefix_new(const struct kvd_prefix_config *config, void *region,
                                  struct kvd_error *err)
{
    uint64_t bytes = kvd_prefix_region_bytes(config);
    if (!bytes) {
        kvd_fail(err, KVD_E_INVALID,
                 "a prefix index of %u entries and %u domains: 1 to %d and 1 to %d are possible",
                 config->entries, config->domains, KVD_PREFIX_MAX_ENTRIES, KVD_PREFIX_MAX_DOMAINS);
        return NULL;
    }
    struct kvd_prefix *ix KVD_FREE = calloc(1, sizeof(*ix));
    if (ix && !region) {
        ix->own = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        region = ix->own;
    }
    if (!ix || region == MAP_FAILED) {
        kvd_fail(err, -ENOMEM, "no memory for a prefix index of %u entries", config->entries);
        return NULL;
    }
    prefix_lay_out(ix, config, region);
    struct prefix_head *h = ix->head;
    h->config = *config;
    h->region_bytes = bytes;
    prefix_start(ix, true);
    h->magic = KVD_PREFIX_MAGIC; // last: an index that was never finished is none
    return KVD_TAKE(ix);
}

void kvd_prefix_free(struct kvd_prefix **ix)
{
    if (!*ix)
        return;
    if ((*ix)->own)
        munmap((*ix)->own, (*ix)->head->region_bytes);
    free(*ix);
    *ix = NULL;
}

void prefix_start(struct kvd_prefix *ix, bool zeroed)
{
    struct prefix_head *h = ix->head;
    h->entries = h->ever = 0;
    h->free = 0;
    h->buckets = h->config.entries;
    h->ghost_sets =
        (uint32_t)kvd_div_up((uint64_t)h->config.entries * GHOSTS_PER_ENTRY, GHOST_WAYS);
    h->gone_sets = (uint32_t)kvd_div_up(h->config.entries, ENTRIES_PER_REMOVED * REMOVED_WAYS);
    if (!zeroed) {
        memset(ix->bucket, 0, (size_t)h->buckets * sizeof(*ix->bucket));
        memset(ix->ghost, 0, (size_t)h->ghost_sets * GHOST_WAYS * sizeof(*ix->ghost));
        memset(ix->gone, 0, (size_t)h->gone_sets * REMOVED_WAYS * sizeof(*ix->gone));
    }
    reuse_clear(ix);
}

// -- domains ------------------------------------------------------------------------------------

static bool domain_used(const struct prefix_domain *d)
{
    return d->entries || d->holders;
}

uint32_t kvd_prefix_domain_find(const struct kvd_prefix *ix,
                                const uint8_t digest[KVD_PREFIX_DOMAIN_BYTES])
{
    for (uint32_t i = 0; i < ix->head->config.domains; i++)
        if (!memcmp(ix->domain[i].digest, digest, sizeof(ix->domain[i].digest)))
            return i;
    return KVD_PREFIX_NONE;
}

const uint8_t *kvd_prefix_domain_at(const struct kvd_prefix *ix, uint32_t domain)
{
    return domain_used(&ix->domain[domain]) ? ix->domain[domain].digest : NULL;
}

int kvd_prefix_domain(struct kvd_prefix *ix, const uint8_t digest[KVD_PREFIX_DOMAIN_BYTES],
                      uint32_t *domain, struct kvd_error *err)
{
    static const uint8_t never[KVD_PREFIX_DOMAIN_BYTES];
    uint32_t n = ix->head->config.domains, at = kvd_prefix_domain_find(ix, digest), left = at;
    for (uint32_t i = 0; i < n && at == KVD_PREFIX_NONE; i++) {
        if (domain_used(&ix->domain[i]))
            continue;
        if (!memcmp(ix->domain[i].digest, never, sizeof(never)))
            at = i;
        else if (left == KVD_PREFIX_NONE)
            left = i;
    }
    at = at == KVD_PREFIX_NONE ? left : at; // one that has nothing any more, but may be asked for
    if (at == KVD_PREFIX_NONE)
        return kvd_fail(err, KVD_E_LIMIT,
                        "all %u domains of the prefix index have blocks or holders", n);
    memcpy(ix->domain[at].digest, digest, sizeof(ix->domain[at].digest));
    ix->domain[at].holders++;
    *domain = at;
    return KVD_OK;
}

void kvd_prefix_domain_release(struct kvd_prefix *ix, uint32_t domain)
{
    ix->domain[domain].holders--;
}

// -- entries ------------------------------------------------------------------------------------

static uint32_t find(const struct kvd_prefix *ix, uint32_t domain, const struct kvd_prefix_key *key,
                     uint64_t hash)
{
    uint32_t next = ix->bucket[prefix_place(hash, ix->head->buckets)];
    while (next) {
        const struct prefix_entry *e = &ix->entry[next - 1];
        if (prefix_key_equal(&e->key, key) && e->domain == domain)
            return next - 1;
        next = e->chain;
    }
    return KVD_PREFIX_NONE;
}

// An entry that may be evicted once its lease is over.
static bool is_loose_leaf(const struct prefix_entry *e)
{
    return !e->children && !e->holds;
}

// To be called around a change of what is_loose_leaf looks at, or of what leaf_file does.
static void take_down(struct kvd_prefix *ix, uint32_t entry)
{
    if (ix->entry[entry].next != KVD_PREFIX_NONE)
        leaf_unfile(ix, entry);
}
static void put_up(struct kvd_prefix *ix, uint32_t entry)
{
    if (ix->entry[entry].next == KVD_PREFIX_NONE && is_loose_leaf(&ix->entry[entry]))
        leaf_file(ix, entry);
}

static uint32_t entry_new(struct kvd_prefix *ix, uint32_t domain, uint32_t parent,
                          const struct kvd_prefix_key *key, uint32_t value, uint64_t hash)
{
    struct prefix_head *h = ix->head;
    uint32_t at = h->free ? h->free - 1 : h->ever;
    if (h->free)
        h->free = ix->entry[at].chain;
    else
        h->ever++;
    uint32_t *bucket = &ix->bucket[prefix_place(hash, h->buckets)];
    struct prefix_entry *e = &ix->entry[at];
    *e = (struct prefix_entry){.key = *key,
                               .parent = parent,
                               .value = value,
                               .domain = (uint16_t)domain,
                               .chain = *bucket,
                               .prev = KVD_PREFIX_NONE,
                               .next = KVD_PREFIX_NONE};
    __atomic_store_n(&e->used, true,
                     __ATOMIC_RELEASE); // last: a killed process leaves no half entry
    *bucket = at + 1;
    h->entries++;
    h->inserted++;
    ix->domain[domain].entries++;
    reuse_new(ix, e, hash);
    if (parent != KVD_PREFIX_NONE) {
        take_down(ix, parent);
        ix->entry[parent].children++;
    }
    return at;
}

static void remember(struct kvd_prefix *ix, const struct prefix_entry *e, uint64_t hash,
                     enum kvd_prefix_reason reason, uint32_t now)
{
    struct prefix_gone *set =
        ix->gone + (size_t)prefix_place(hash, ix->head->gone_sets) * REMOVED_WAYS;
    memmove(set + 1, set, (REMOVED_WAYS - 1) * sizeof(*set));
    set[0] = (struct prefix_gone){e->key, now, e->domain, (uint8_t)reason};
}

// Removes a leaf that nobody holds.
static void entry_remove(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_reason reason,
                         uint32_t now, kvd_prefix_removed_fn *fn, void *ctx)
{
    struct prefix_head *h = ix->head;
    struct prefix_entry *e = &ix->entry[entry];
    uint64_t hash = prefix_hash(ix, e->domain, &e->key);
    uint32_t *link = &ix->bucket[prefix_place(hash, h->buckets)];
    while (*link != entry + 1)
        link = &ix->entry[*link - 1].chain;
    *link = e->chain;
    take_down(ix, entry);
    remember(ix, e, hash, reason, now);
    reuse_gone(ix, e, hash, reason <= KVD_PREFIX_EVICTED_INDEX);
    if (e->parent != KVD_PREFIX_NONE) {
        ix->entry[e->parent].children--;
        put_up(ix, e->parent);
    }
    ix->domain[e->domain].entries--;
    h->entries--;
    h->removed[reason]++;
    const struct kvd_prefix_removed removed = {
        .key = e->key,
        .domain = e->domain,
        .entry = entry,
        .value = e->value,
        .age = reuse_age(ix, e, now),
        .digest = ix->domain[e->domain].digest,
        .reason = reason,
    };
    __atomic_store_n(&e->used, false, __ATOMIC_SEQ_CST); // before the value is its owner's again
    e->chain = h->free;
    h->free = entry + 1;
    if (fn)
        fn(ctx, &removed);
}

// -- runs ---------------------------------------------------------------------------------------

// A walk along keys that has asked for the memory of those ahead. Keys [0, hashed) have their hash
// in hash[i % KVD_LEN(hash)].
struct walk {
    const struct kvd_prefix *ix;
    const struct kvd_prefix_key *keys;
    uint32_t domain, n, hashed;
    uint64_t hash[4 * AHEAD];
};

// The hash of key i, the next one. Buckets are fetched first, and their entries half way.
static uint64_t walk_on(struct walk *w, uint32_t i)
{
    const struct kvd_prefix *ix = w->ix;
    for (; w->hashed < w->n && w->hashed <= i + 2 * AHEAD; w->hashed++) {
        uint64_t hash = prefix_hash(ix, w->domain, &w->keys[w->hashed]);
        w->hash[w->hashed % KVD_LEN(w->hash)] = hash;
        __builtin_prefetch(&ix->bucket[prefix_place(hash, ix->head->buckets)]);
    }
    if (i + AHEAD < w->n) {
        uint64_t hash = w->hash[(i + AHEAD) % KVD_LEN(w->hash)];
        uint32_t first = ix->bucket[prefix_place(hash, ix->head->buckets)];
        if (first)
            __builtin_prefetch(&ix->entry[first - 1]);
    }
    return w->hash[i % KVD_LEN(w->hash)];
}

static void look_up(const struct kvd_prefix *ix, struct kvd_prefix_query *q)
{
    struct walk w = {.ix = ix, .keys = q->keys, .domain = q->domain, .n = q->n};
    q->entry = KVD_PREFIX_NONE;
    for (q->found = 0; q->found < q->n; q->found++) {
        uint32_t at = find(ix, q->domain, &q->keys[q->found], walk_on(&w, q->found));
        // Of chained keys the one before is always the parent's.
        if (at == KVD_PREFIX_NONE || ix->entry[at].parent != q->entry)
            break;
        q->entry = at;
        if (q->values)
            q->values[q->found] = ix->entry[at].value;
    }
}

void kvd_prefix_peek(const struct kvd_prefix *ix, struct kvd_prefix_query *queries, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        look_up(ix, &queries[i]);
}

void kvd_prefix_match(struct kvd_prefix *ix, struct kvd_prefix_query *queries, uint32_t count,
                      uint32_t lease_until)
{
    reuse_advance(ix, 0);
    for (uint32_t i = 0; i < count; i++) {
        struct kvd_prefix_query *q = &queries[i];
        look_up(ix, q);
        if (!q->found)
            continue;
        for (uint32_t at = q->entry; at != KVD_PREFIX_NONE; at = ix->entry[at].parent) {
            take_down(ix, at);
            reuse_again(ix, &ix->entry[at]);
        }
        // Only the last one can be a leaf, and its lease keeps all before it.
        struct prefix_entry *last = &ix->entry[q->entry];
        last->lease = KVD_MAX(last->lease, lease_until);
        put_up(ix, q->entry);
    }
}

void kvd_prefix_use(struct kvd_prefix *ix, const uint32_t *entries, uint32_t n)
{
    reuse_advance(ix, 0);
    for (uint32_t i = 0; i < n; i++) {
        if (entries[i] == KVD_PREFIX_NONE)
            continue;
        take_down(ix, entries[i]);
        reuse_again(ix, &ix->entry[entries[i]]);
        put_up(ix, entries[i]);
    }
}

int kvd_prefix_insert(struct kvd_prefix *ix, uint32_t domain, uint32_t parent,
                      const struct kvd_prefix_key *keys, const uint32_t *values, uint32_t n,
                      uint32_t *at, uint32_t *done, struct kvd_error *err)
{
    const struct prefix_head *h = ix->head;
    struct walk w = {.ix = ix, .keys = keys, .domain = domain, .n = n};
    uint32_t i, begin = parent;
    reuse_advance(ix, TICKS_OF_INSERTIONS);
    for (i = 0; i < n; i++) {
        uint64_t hash = walk_on(&w, i);
        uint32_t entry = find(ix, domain, &keys[i], hash);
        if (entry != KVD_PREFIX_NONE && ix->entry[entry].parent != parent)
            break;
        if (entry == KVD_PREFIX_NONE) {
            if (h->entries == h->config.entries)
                break;
            entry = entry_new(ix, domain, parent, &keys[i], values[i], hash);
        }
        if (at)
            at[i] = entry;
        parent = entry;
    }
    *done = i;
    if (parent != begin)
        put_up(ix, parent);
    if (i == n)
        return KVD_OK;
    if (h->entries < h->config.entries ||
        find(ix, domain, &keys[i], walk_on(&w, i)) != KVD_PREFIX_NONE)
        return kvd_fail(
            err, KVD_E_INVALID,
            "block %u is known under another block than the one before it: its key is not chained",
            i);
    for (; i < n; i++)
        reuse_passed(ix, walk_on(&w, i));
    return kvd_fail(err, KVD_E_FULL, "the prefix index has its %u entries", h->config.entries);
}

// Gives an entry a class; `alone`: what is behind it alone has got it too. Returns whether it has
// it now.
static bool classify(struct kvd_prefix *ix, uint32_t entry, bool alone, enum kvd_prefix_class class)
{
    struct prefix_entry *e = &ix->entry[entry];
    if (class == prefix_class(e))
        return true;
    if (class < prefix_class(e) && !alone)
        return false;
    take_down(ix, entry);
    if (class == KVD_PREFIX_DEMOTED)
        e->uses |= REUSE_DEMOTED;
    else
        e->uses = (uint8_t)((e->uses & REUSE_MAX_USES) | (class == KVD_PREFIX_LOW    ? REUSE_LOW
                                                          : class == KVD_PREFIX_HIGH ? REUSE_HIGH
                                                                                     : 0));
    put_up(ix, entry);
    return true;
}

uint32_t kvd_prefix_classify(struct kvd_prefix *ix, uint32_t domain,
                             const struct kvd_prefix_key *keys, uint32_t n,
                             enum kvd_prefix_class class)
{
    struct kvd_prefix_query q = {.domain = domain, .n = n, .keys = keys};
    look_up(ix, &q);
    return kvd_prefix_classify_to(ix, q.entry, class);
}

uint32_t kvd_prefix_classify_to(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_class class)
{
    uint32_t done = 0, behind = 0;
    for (uint32_t at = entry; at != KVD_PREFIX_NONE; at = ix->entry[at].parent) {
        bool alone = ix->entry[at].children == behind;
        done += classify(ix, at, alone, class);
        behind = alone ? 1 : UINT32_MAX;
    }
    return done;
}

uint32_t kvd_prefix_classify_entries(struct kvd_prefix *ix, const uint32_t *entries, uint32_t n,
                                     enum kvd_prefix_class class)
{
    uint32_t done = 0, behind = KVD_PREFIX_NONE; // the last one that was alone
    for (uint32_t i = n; i-- > 0;) {
        uint32_t at = entries[i];
        if (at == KVD_PREFIX_NONE)
            continue;
        bool above = behind != KVD_PREFIX_NONE && ix->entry[behind].parent == at;
        bool alone = ix->entry[at].children == above;
        done += classify(ix, at, alone, class);
        behind = alone ? at : KVD_PREFIX_NONE;
    }
    return done;
}

void kvd_prefix_move(struct kvd_prefix *ix, uint32_t entry, uint32_t parent)
{
    uint32_t was = ix->entry[entry].parent;
    if (was == parent)
        return;
    ix->entry[entry].parent = parent; // one store: a killed process leaves it here or there
    if (was != KVD_PREFIX_NONE) {
        ix->entry[was].children--;
        put_up(ix, was);
    }
    if (parent != KVD_PREFIX_NONE) {
        take_down(ix, parent);
        ix->entry[parent].children++;
    }
}

void kvd_prefix_set(struct kvd_prefix *ix, uint32_t entry, uint32_t value)
{
    ix->entry[entry].value = value;
}

// -- what keeps entries and what ends them ------------------------------------------------------

int kvd_prefix_hold(struct kvd_prefix *ix, uint32_t entry, struct kvd_error *err)
{
    struct prefix_entry *e = &ix->entry[entry];
    if (e->holds == UINT32_MAX)
        return kvd_fail(err, KVD_E_LIMIT, "a block is held by %u already", e->holds);
    take_down(ix, entry);
    e->holds++;
    return KVD_OK;
}

void kvd_prefix_release(struct kvd_prefix *ix, uint32_t entry)
{
    ix->entry[entry].holds--;
    put_up(ix, entry);
}

void kvd_prefix_lease(struct kvd_prefix *ix, uint32_t entry, uint32_t until)
{
    ix->entry[entry].lease = until;
    take_down(ix, entry);
    put_up(ix, entry);
}

uint32_t kvd_prefix_evict(struct kvd_prefix *ix, uint32_t most, enum kvd_prefix_reason reason,
                          uint32_t now, kvd_prefix_removed_fn *fn, void *ctx)
{
    uint32_t n;
    for (n = 0; n < most; n++) {
        uint32_t entry = leaf_choose(ix, now);
        if (entry == KVD_PREFIX_NONE)
            break;
        entry_remove(ix, entry, reason, now, fn, ctx);
    }
    return n;
}

uint32_t kvd_prefix_drop(struct kvd_prefix *ix, uint32_t domain, const struct kvd_prefix_key *keys,
                         uint32_t n, uint32_t keep, enum kvd_prefix_reason reason, uint32_t now,
                         kvd_prefix_removed_fn *fn, void *ctx)
{
    struct kvd_prefix_query q = {.domain = domain, .n = n, .keys = keys};
    uint32_t gone = 0;
    look_up(ix, &q);
    for (uint32_t at = q.entry; q.found - gone > keep && is_loose_leaf(&ix->entry[at]); gone++) {
        uint32_t parent = ix->entry[at].parent;
        entry_remove(ix, at, reason, now, fn, ctx);
        at = parent;
    }
    return gone;
}

uint32_t kvd_prefix_remove(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_reason reason,
                           uint32_t now, kvd_prefix_removed_fn *fn, void *ctx)
{
    uint32_t gone = 0;
    for (uint32_t parent; entry != KVD_PREFIX_NONE && is_loose_leaf(&ix->entry[entry]); gone++) {
        parent = ix->entry[entry].parent;
        entry_remove(ix, entry, reason, now, fn, ctx);
        entry = parent;
    }
    return gone;
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

uint32_t kvd_prefix_remove_entries(struct kvd_prefix *ix, uint32_t *entries, uint32_t n,
                                   enum kvd_prefix_reason reason, uint32_t now,
                                   kvd_prefix_removed_fn *fn, void *ctx)
{
    uint32_t gone = 0;
    qsort(entries, n, sizeof(*entries), by_number);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t at = entries[i], parent;
             at != KVD_PREFIX_NONE && bsearch(&at, entries, n, sizeof(at), by_number) &&
             ix->entry[at].used && is_loose_leaf(&ix->entry[at]);
             at = parent, gone++) {
            parent = ix->entry[at].parent;
            entry_remove(ix, at, reason, now, fn, ctx);
        }
    return gone;
}

// The next entry that a cursor is to look at.
static uint32_t cursor_on(struct kvd_prefix_cursor *at)
{
    uint32_t i = at->path ? at->path - 1 : at->next++;
    at->path = 0;
    return i;
}

bool kvd_prefix_cut(struct kvd_prefix *ix, const bool *cut, uint32_t n,
                    struct kvd_prefix_cursor *at, uint32_t *most, enum kvd_prefix_reason reason,
                    uint32_t now, kvd_prefix_removed_fn *fn, void *ctx)
{
    while (at->path || at->next < n) {
        if (*most == 0)
            return false;
        --*most;
        uint32_t i = cursor_on(at);
        const struct prefix_entry *e = &ix->entry[i];
        if (!cut[i] || !e->used || !is_loose_leaf(e) || e->lease > now)
            continue;
        if (e->parent < n)
            at->path = e->parent + 1;
        entry_remove(ix, i, reason, now, fn, ctx);
    }
    return true;
}

bool kvd_prefix_clear(struct kvd_prefix *ix, uint32_t domain, struct kvd_prefix_cursor *at,
                      uint32_t *most, enum kvd_prefix_reason reason, uint32_t now,
                      kvd_prefix_removed_fn *fn, void *ctx)
{
    while (at->path || at->next < ix->head->ever) {
        if (*most == 0)
            return false;
        --*most;
        uint32_t i = cursor_on(at);
        const struct prefix_entry *e = &ix->entry[i];
        if (!e->used || !is_loose_leaf(e) || (domain != KVD_PREFIX_NONE && e->domain != domain))
            continue;
        if (e->parent != KVD_PREFIX_NONE)
            at->path = e->parent + 1;
        entry_remove(ix, i, reason, now, fn, ctx);
    }
    return true;
}

// -- what is known ------------------------------------------------------------------------------

const char *kvd_prefix_reason_name(enum kvd_prefix_reason reason)
{
    static const char *const names[KVD_PREFIX_REASONS] = {"unknown",
                                                          "present",
                                                          "evicted for room",
                                                          "evicted for the quota",
                                                          "evicted for the index",
                                                          "dropped",
                                                          "damaged",
                                                          "evicted by an operator",
                                                          "expired",
                                                          "superseded"};
    return reason < KVD_PREFIX_REASONS ? names[reason] : names[KVD_PREFIX_UNKNOWN];
}

uint32_t kvd_prefix_entry(const struct kvd_prefix *ix, uint32_t domain,
                          const struct kvd_prefix_key *key)
{
    return find(ix, domain, key, prefix_hash(ix, domain, key));
}

static enum kvd_prefix_reason remembered(const struct kvd_prefix *ix, uint32_t domain,
                                         const struct kvd_prefix_key *key, uint64_t hash,
                                         uint32_t *when)
{
    const struct prefix_gone *set =
        ix->gone + (size_t)prefix_place(hash, ix->head->gone_sets) * REMOVED_WAYS;
    *when = 0;
    for (uint32_t i = 0; i < REMOVED_WAYS && set[i].reason != KVD_PREFIX_UNKNOWN; i++)
        if (set[i].domain == domain && prefix_key_equal(&set[i].key, key)) {
            *when = set[i].when;
            return set[i].reason;
        }
    return KVD_PREFIX_UNKNOWN;
}

enum kvd_prefix_reason kvd_prefix_why(const struct kvd_prefix *ix, uint32_t domain,
                                      const struct kvd_prefix_key *key, uint32_t *when)
{
    uint64_t hash = prefix_hash(ix, domain, key);
    *when = 0;
    return find(ix, domain, key, hash) != KVD_PREFIX_NONE ? KVD_PREFIX_PRESENT
                                                          : remembered(ix, domain, key, hash, when);
}

void kvd_prefix_note(struct kvd_prefix *ix, uint32_t entry, enum kvd_prefix_reason reason,
                     uint32_t now)
{
    const struct prefix_entry *e = &ix->entry[entry];
    remember(ix, e, prefix_hash(ix, e->domain, &e->key), reason, now);
}

enum kvd_prefix_reason kvd_prefix_noted(const struct kvd_prefix *ix, uint32_t entry, uint32_t *when)
{
    const struct prefix_entry *e = &ix->entry[entry];
    return remembered(ix, e->domain, &e->key, prefix_hash(ix, e->domain, &e->key), when);
}

bool kvd_prefix_get(const struct kvd_prefix *ix, uint32_t entry, struct kvd_prefix_entry_info *out)
{
    if (entry >= ix->head->ever || !ix->entry[entry].used)
        return false;
    const struct prefix_entry *e = &ix->entry[entry];
    *out = (struct kvd_prefix_entry_info){e->key,   e->domain, e->parent,   e->value,
                                          e->lease, e->holds,  e->children, prefix_class(e)};
    return true;
}

void kvd_prefix_info(const struct kvd_prefix *ix, struct kvd_prefix_info *out)
{
    const struct prefix_head *h = ix->head;
    *out = (struct kvd_prefix_info){.capacity = h->config.entries,
                                    .ever = h->ever,
                                    .entries = h->entries,
                                    .inserted = h->inserted,
                                    .region_bytes = h->region_bytes};
    memcpy(out->removed, h->removed, sizeof(out->removed));
    for (uint32_t i = 0; i < h->config.domains; i++)
        out->domains += domain_used(&ix->domain[i]);
}
