// Whether a prefix index is sound, and an index out of what one has left.
#include "pool/prefix_internal.h"

#include <errno.h>

static int corrupt(struct kvd_error *err, const char *what, uint32_t at)
{
    return kvd_fail(err, KVD_E_CORRUPT, "prefix index: %s (%u)", what, at);
}

// -- what is written down nowhere else ----------------------------------------------------------

static int check_links(const struct kvd_prefix *ix, uint32_t ever, struct kvd_error *err)
{
    uint32_t domains = ix->head->config.domains;
    for (uint32_t i = 0; i < ever; i++) {
        const struct prefix_entry *e = &ix->entry[i];
        if (!e->used)
            continue;
        if (e->domain >= domains)
            return corrupt(err, "an entry has a domain that cannot be", i);
        if (e->parent == KVD_PREFIX_NONE)
            continue;
        if (e->parent >= ever || !ix->entry[e->parent].used)
            return corrupt(err, "an entry's parent is none", i);
        if (ix->entry[e->parent].domain != e->domain)
            return corrupt(err, "an entry's parent is of another domain", i);
    }
    return KVD_OK;
}

// Counts each entry's children, and sees that all hang from a first block: leaf by leaf, everything
// can be taken away. `children` has room for `ever`.
static int check_trees(const struct kvd_prefix *ix, uint32_t ever, uint32_t *children,
                       struct kvd_error *err)
{
    uint32_t left = 0, *rest KVD_FREE = malloc((ever + 1) * sizeof(*rest));
    if (!rest)
        return kvd_fail(err, -ENOMEM, "no memory to check the prefix index");
    for (uint32_t i = 0; i < ever; i++)
        if (ix->entry[i].used) {
            left++;
            if (ix->entry[i].parent != KVD_PREFIX_NONE)
                children[ix->entry[i].parent]++;
        }
    memcpy(rest, children, ever * sizeof(*rest));
    for (uint32_t i = 0; i < ever; i++) {
        if (!ix->entry[i].used || children[i])
            continue;
        for (uint32_t at = i; at != KVD_PREFIX_NONE;) {
            left--;
            at = ix->entry[at].parent;
            if (at != KVD_PREFIX_NONE && --rest[at])
                break;
        }
    }
    return left ? corrupt(err, "entries are each other's parents", left) : KVD_OK;
}

// -- everything ---------------------------------------------------------------------------------

struct sums {
    uint32_t *children, *domain_entries;
    uint8_t *listed;
};

static void sums_free(struct sums *s)
{
    free(s->children);
    free(s->domain_entries);
    free(s->listed);
}

static int check_buckets(const struct kvd_prefix *ix, const struct sums *s, struct kvd_error *err)
{
    const struct prefix_head *h = ix->head;
    uint32_t met = 0;
    for (uint32_t b = 0; b < h->buckets; b++)
        for (uint32_t next = ix->bucket[b], i; next; next = ix->entry[i].chain) {
            i = next - 1;
            const struct prefix_entry *e = &ix->entry[i];
            if (i >= h->ever || !e->used || ++met > h->entries)
                return corrupt(err, "a bucket has what is no entry", i);
            if (prefix_place(prefix_hash(ix, e->domain, &e->key), h->buckets) != b)
                return corrupt(err, "an entry is in another's bucket", i);
            for (uint32_t o = e->chain; o && o <= h->ever; o = ix->entry[o - 1].chain)
                if (ix->entry[o - 1].domain == e->domain &&
                    prefix_key_equal(&e->key, &ix->entry[o - 1].key))
                    return corrupt(err, "a key is there twice", i);
            s->domain_entries[e->domain]++;
        }
    if (met != h->entries)
        return corrupt(err, "entries are in no bucket", h->entries - met);
    for (uint32_t d = 0; d < h->config.domains; d++)
        if (ix->domain[d].entries != s->domain_entries[d])
            return corrupt(err, "a domain's entries are miscounted", d);
    return KVD_OK;
}

// Whether a leaf of its class may be on the list; what a lease kept may be of any.
static bool is_place_of(const struct prefix_entry *e, uint32_t list)
{
    switch (prefix_class(e)) {
    case KVD_PREFIX_DEMOTED:
        return list >= LIST_LEASED;
    case KVD_PREFIX_LOW:
        return list == LIST_LEASED || list / REUSE_SHELVES == 0;
    case KVD_PREFIX_HIGH:
        return list == LIST_LEASED || list / REUSE_SHELVES == 2;
    default:
        return list == LIST_LEASED || list / REUSE_SHELVES == 1;
    }
}

static int check_list(const struct kvd_prefix *ix, uint32_t list, const struct sums *s,
                      struct kvd_error *err)
{
    const struct prefix_head *h = ix->head;
    uint32_t end = h->config.entries + list, before = end, at = h->list[list].first;
    for (; at != end; before = at, at = ix->entry[at].next) {
        if (at >= h->ever || s->listed[at])
            return corrupt(err, "a list of leaves has no entry, or one twice", at);
        const struct prefix_entry *e = &ix->entry[at];
        s->listed[at] = 1;
        if (!e->used || e->children || e->holds)
            return corrupt(err, "a list of leaves has what is none", at);
        if (!is_place_of(e, list))
            return corrupt(err, "a leaf is on a list of another class", at);
        if (e->prev != before)
            return corrupt(err, "a list of leaves is not the same from both ends", at);
    }
    if (h->list[list].last != before)
        return corrupt(err, "a list of leaves has another end", list);
    if (list < REUSE_ORDERS * REUSE_SHELVES && before != end) {
        uint32_t shelf = list % REUSE_SHELVES, rank = h->reuse.rank_of[shelf];
        if (rank >= REUSE_SHELVES || h->reuse.shelf_at[rank] != shelf ||
            !(h->reuse.filled[list / REUSE_SHELVES][rank / 64] >> rank % 64 & 1))
            return corrupt(err, "a shelf with leaves is not known to have any", list);
    }
    return KVD_OK;
}

static int check_all(const struct kvd_prefix *ix, const struct sums *s, struct kvd_error *err)
{
    const struct prefix_head *h = ix->head;
    int rc = check_links(ix, h->ever, err);
    if (rc == KVD_OK)
        rc = check_trees(ix, h->ever, s->children, err);
    if (rc == KVD_OK)
        rc = check_buckets(ix, s, err);
    for (uint32_t list = 0; list < LISTS && rc == KVD_OK; list++)
        rc = check_list(ix, list, s, err);
    uint32_t unused = 0;
    for (uint32_t i = 0; i < h->ever && rc == KVD_OK; i++) {
        const struct prefix_entry *e = &ix->entry[i];
        unused += !e->used;
        if (e->used && e->children != s->children[i])
            rc = corrupt(err, "an entry's children are miscounted", i);
        else if (e->used && !s->listed[i] && !e->children && !e->holds)
            rc = corrupt(err, "a leaf is on no list", i);
        else if (e->used && !s->listed[i] && e->next != KVD_PREFIX_NONE)
            rc = corrupt(err, "an entry says that it is on a list", i);
        else if (e->used && !(e->uses & REUSE_MAX_USES))
            rc = corrupt(err, "an entry was used as often as cannot be", i);
        else if (e->used && e->uses & REUSE_LOW && e->uses & REUSE_HIGH)
            rc = corrupt(err, "an entry is of two classes", i);
    }
    for (uint32_t i = h->free; i && rc == KVD_OK; i = ix->entry[i - 1].chain)
        if (i > h->ever || ix->entry[i - 1].used || !unused--)
            rc = corrupt(err, "the list of free entries has another", i - 1);
    if (rc == KVD_OK && unused)
        rc = corrupt(err, "free entries are lost", unused);
    return rc;
}

int kvd_prefix_verify(const struct kvd_prefix *ix, struct kvd_error *err)
{
    const struct prefix_head *h = ix->head;
    struct sums s KVD_AUTO(sums_free) = {calloc(h->ever + 1, sizeof(*s.children)),
                                         calloc(h->config.domains, sizeof(*s.domain_entries)),
                                         calloc(h->ever + 1, 1)};
    if (!s.children || !s.domain_entries || !s.listed)
        return kvd_fail(err, -ENOMEM, "no memory to check the prefix index");
    return check_all(ix, &s, err);
}

// -- an index out of what one has left ----------------------------------------------------------

static int put_back(struct kvd_prefix *ix, uint32_t entry, uint32_t children, struct kvd_error *err)
{
    struct prefix_head *h = ix->head;
    struct prefix_entry *e = &ix->entry[entry];
    e->prev = e->next = KVD_PREFIX_NONE;
    e->holds = 0;
    e->children = children;
    if (!e->used) {
        e->chain = h->free;
        h->free = entry + 1;
        return KVD_OK;
    }
    uint64_t hash = prefix_hash(ix, e->domain, &e->key);
    uint32_t *bucket = &ix->bucket[prefix_place(hash, h->buckets)];
    for (uint32_t o = *bucket; o; o = ix->entry[o - 1].chain)
        if (ix->entry[o - 1].domain == e->domain &&
            prefix_key_equal(&e->key, &ix->entry[o - 1].key))
            return corrupt(err, "a key is there twice", entry);
    e->chain = *bucket;
    *bucket = entry + 1;
    h->entries++;
    ix->domain[e->domain].entries++;
    reuse_new(ix, e, hash);
    if (!children)
        leaf_file(ix, entry);
    return KVD_OK;
}

static int rebuild(struct kvd_prefix *ix, struct kvd_error *err)
{
    struct prefix_head *h = ix->head;
    uint32_t ever = h->config.entries;
    while (ever && !ix->entry[ever - 1].used)
        ever--;
    uint32_t *children KVD_FREE = calloc(ever + 1, sizeof(*children));
    if (!children)
        return kvd_fail(err, -ENOMEM, "no memory to open the prefix index");
    int rc = check_links(ix, ever, err);
    if (rc == KVD_OK)
        rc = check_trees(ix, ever, children, err);
    if (rc != KVD_OK)
        return rc;
    prefix_start(ix, false);
    h->ever = ever;
    for (uint32_t d = 0; d < h->config.domains; d++)
        ix->domain[d].entries = ix->domain[d].holders = 0;
    for (uint32_t i = ever; i-- > 0 && rc == KVD_OK;)
        rc = put_back(ix, i, children[i], err);
    return rc;
}

struct kvd_prefix *kvd_prefix_open(void *region, uint64_t bytes, struct kvd_error *err)
{
    const struct prefix_head *h = region;
    if (bytes < sizeof(*h) || h->magic != KVD_PREFIX_MAGIC) {
        kvd_fail(err, KVD_E_CORRUPT, "the region holds no prefix index of this version");
        return NULL;
    }
    uint64_t want = kvd_prefix_region_bytes(&h->config);
    if (!want || want != h->region_bytes || want > bytes) {
        kvd_fail(err, KVD_E_CORRUPT,
                 "a prefix index of %u entries in a region of %llu bytes, not %llu",
                 h->config.entries, (unsigned long long)bytes, (unsigned long long)want);
        return NULL;
    }
    struct kvd_prefix *ix KVD_FREE = calloc(1, sizeof(*ix));
    if (!ix) {
        kvd_fail(err, -ENOMEM, "no memory to open the prefix index");
        return NULL;
    }
    prefix_lay_out(ix, &h->config, region);
    return rebuild(ix, err) == KVD_OK ? KVD_TAKE(ix) : NULL;
}
