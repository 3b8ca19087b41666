#include "daemon/session/leases.h"

#include "daemon/rpc/users.h"
#include "daemon/session/session.h"

enum {
    SWEEP_MS = 200,
    PIECE_NS = 1000000, // of a sweep, as what expires may be tens of thousands of blocks;
    PAUSE_MS = 1,       // then others have their turn
};

struct kvd_leases {
    uv_timer_t timer;               // runs while there are some
    struct kvd_lease *all, *places; // places: those that are nobody's, by their place
    struct kvd_lease *next_look;    // of kvd_lease_end_retained_on
    uint32_t weight, of_namespace[KVD_MAX_NAMESPACES];
    uint64_t next, expired;
};

void kvd_lease_end(struct kvd_daemon *d, struct kvd_lease *l)
{
    struct kvd_leases *all = d->leases;
    if (l->pages)
        kvd_blocks_release_pages(d->pool, l->at.ns, l->pages, l->n_pages);
    else
        kvd_blocks_release(d->pool, &l->at);
    all->weight -= l->weight;
    all->of_namespace[l->at.ns] -= l->weight;
    if (l->owner)
        l->owner->leases -= l->weight;
    if (l->user)
        kvd_user_give(l->user, KVD_SHARE_LEASES, l->weight);
    kvd_user_unref(&l->user);
    if (all->next_look == l)
        all->next_look = l->hh.next;
    HASH_DEL(all->all, l);
    if (l->kind != KVD_LEASE_SESSION)
        HASH_DELETE(hh_place, all->places, l);
    free(l->pages);
    free(l->gone);
    free(l);
    if (!all->all)
        uv_timer_stop(&all->timer);
}

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_lease *l, *next;
    const uint64_t begin = uv_hrtime(), now = kvd_now_ms(d);
    HASH_ITER(hh, d->leases->all, l, next)
    {
        if (l->until_ms > now)
            continue;
        const struct kvd_prefix_key key = l->place.key;
        const uint32_t ns = l->at.ns, n_gone = l->n_gone;
        const bool drops = l->expires;
        uint32_t *gone KVD_FREE = KVD_TAKE(l->gone);
        d->leases->expired++;
        kvd_lease_end(d, l);
        // Unless somebody else keeps it, or has put others behind it.
        if (gone)
            kvd_blocks_forget_pages(d->pool, ns, gone, n_gone, KVD_PREFIX_EXPIRED);
        else if (drops)
            kvd_blocks_forget(d->pool, ns, &key, KVD_PREFIX_EXPIRED);
        if (next && uv_hrtime() - begin >= PIECE_NS) {
            uv_timer_start(timer, on_timer, PAUSE_MS, SWEEP_MS);
            return;
        }
    }
}

// Whether there may be one more of its weight, for its owner and user, who is charged.
static int admit(struct kvd_daemon *d, struct kvd_lease *l, struct kvd_session *owner, uint32_t ns,
                 int64_t uid, struct kvd_error *err)
{
    const struct kvd_leases *all = d->leases;
    uint32_t left = KVD_MAX_LEASES - all->weight;
    if (all->of_namespace[ns] + l->weight > left)
        return kvd_fail(err, KVD_E_LIMIT,
                        "the namespace has %u leases of prefixes, and %u of %d are left: one may "
                        "have as many as are left; release some",
                        all->of_namespace[ns], left, KVD_MAX_LEASES);
    if (owner && owner->leases + l->weight > KVD_MAX_SESSION_LEASES)
        return kvd_fail(err, KVD_E_LIMIT, "the session has %u leases of prefixes; release some",
                        owner->leases);
    if (uid == KVD_LEASE_OPERATORS)
        return KVD_OK;
    l->user = kvd_user_ref(d, uid);
    if (!l->user)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    int rc = kvd_user_take(l->user, KVD_SHARE_LEASES, l->weight, err);
    if (rc)
        kvd_user_unref(&l->user);
    return rc;
}

// Counts one that holds what it is to hold.
static void add(struct kvd_daemon *d, struct kvd_lease *l, struct kvd_session *owner, uint64_t ms)
{
    struct kvd_leases *all = d->leases;
    l->id = ++all->next;
    l->owner = owner;
    l->until_ms = kvd_now_ms(d) + ms;
    if (owner)
        owner->leases += l->weight;
    all->weight += l->weight;
    all->of_namespace[l->at.ns] += l->weight;
    if (!all->all)
        uv_timer_start(&all->timer, on_timer, SWEEP_MS, SWEEP_MS);
    HASH_ADD(hh, all->all, id, sizeof(l->id), l);
}

static int make(struct kvd_daemon *d, struct kvd_session *owner, int64_t uid,
                const struct kvd_blocks_at *at, uint64_t ms, struct kvd_lease **out,
                struct kvd_error *err)
{
    struct kvd_lease *l = calloc(1, sizeof(*l));
    if (!l)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    l->at = *at;
    l->weight = 1;
    int rc = kvd_blocks_hold(d->pool, at, err);
    if (rc == KVD_OK) {
        rc = admit(d, l, owner, at->ns, uid, err);
        if (rc)
            kvd_blocks_release(d->pool, at);
    }
    if (rc) {
        free(l);
        return rc;
    }
    add(d, l, owner, ms);
    *out = l;
    return KVD_OK;
}

int kvd_lease_new(struct kvd_daemon *d, struct kvd_session *owner, const struct kvd_blocks_at *at,
                  uint64_t ms, struct kvd_lease **out, struct kvd_error *err)
{
    return make(d, owner, kvd_user_uid(owner->user), at, ms, out, err);
}

static int make_pages(struct kvd_daemon *d, struct kvd_session *owner, int64_t uid, uint32_t ns,
                      const uint32_t *entries, uint32_t n, uint32_t single, uint64_t ms,
                      struct kvd_lease **out, struct kvd_error *err)
{
    struct kvd_lease *l = calloc(1, sizeof(*l));
    uint32_t *pages = malloc(n * sizeof(*pages) + 1), *fewer;
    int rc = l && pages ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc == KVD_OK) {
        memcpy(pages, entries, n * sizeof(*pages));
        rc = kvd_blocks_hold_pages(d->pool, ns, pages, n, single, &l->n_pages, err);
    }
    if (rc == KVD_OK) {
        l->weight = 1 + l->n_pages / KVD_LEASE_HOLDS;
        rc = admit(d, l, owner, ns, uid, err);
        if (rc)
            kvd_blocks_release_pages(d->pool, ns, pages, l->n_pages);
    }
    if (rc) {
        free(pages);
        free(l);
        return rc;
    }
    fewer = realloc(pages, l->n_pages * sizeof(*pages) + 1);
    l->pages = fewer ? fewer : pages;
    l->at.ns = ns;
    add(d, l, owner, ms);
    *out = l;
    return KVD_OK;
}

int kvd_lease_new_pages(struct kvd_daemon *d, struct kvd_session *owner, const uint32_t *entries,
                        uint32_t n, uint32_t single, uint64_t ms, struct kvd_lease **out,
                        struct kvd_error *err)
{
    return make_pages(d, owner, kvd_user_uid(owner->user), owner->ns, entries, n, single, ms, out,
                      err);
}

struct kvd_lease *kvd_lease_find(struct kvd_daemon *d, const struct kvd_session *owner, uint64_t id)
{
    struct kvd_lease *l;
    HASH_FIND(hh, d->leases->all, &id, sizeof(id), l);
    return l && l->owner == owner && l->until_ms > kvd_now_ms(d) ? l : NULL;
}

struct kvd_lease *kvd_lease_on(struct kvd_daemon *d, uint32_t ns, enum kvd_lease_kind kind,
                               const struct kvd_prefix_key *key)
{
    const struct kvd_lease_place place = {.ns = ns, .kind = kind, .key = *key};
    struct kvd_lease *l;
    HASH_FIND(hh_place, d->leases->places, &place, sizeof(place), l);
    return l;
}

// Puts `made` (NULL: nothing) in the stead of what of its kind is on the block.
static void put(struct kvd_daemon *d, struct kvd_lease *made, uint32_t ns, enum kvd_lease_kind kind,
                const struct kvd_prefix_key *key)
{
    struct kvd_lease *old = kvd_lease_on(d, ns, kind, key);
    if (old)
        kvd_lease_end(d, old);
    if (!made)
        return;
    made->kind = kind;
    made->place = (struct kvd_lease_place){.ns = ns, .kind = kind, .key = *key};
    HASH_ADD(hh_place, d->leases->places, place, sizeof(made->place), made);
}

int kvd_lease_put(struct kvd_daemon *d, enum kvd_lease_kind kind, const struct kvd_blocks_at *at,
                  const struct kvd_prefix_key *key, uint64_t ms, bool expires, int64_t uid,
                  struct kvd_error *err)
{
    struct kvd_lease *made = NULL;
    int rc = ms ? make(d, NULL, uid, at, ms, &made, err) : KVD_OK;
    if (rc)
        return rc;
    if (made)
        made->expires = expires;
    put(d, made, at->ns, kind, key);
    return KVD_OK;
}

int kvd_lease_put_pages(struct kvd_daemon *d, enum kvd_lease_kind kind, uint32_t ns,
                        const uint32_t *entries, uint32_t n, uint32_t single,
                        const struct kvd_prefix_key *key, uint64_t ms, bool expires, int64_t uid,
                        struct kvd_error *err)
{
    struct kvd_lease *made = NULL;
    uint32_t *gone = NULL;
    if (ms && expires) {
        gone = malloc(n * sizeof(*gone));
        if (!gone)
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        memcpy(gone, entries, n * sizeof(*gone));
    }
    int rc = ms ? make_pages(d, NULL, uid, ns, entries, n, single, ms, &made, err) : KVD_OK;
    if (rc) {
        free(gone);
        return rc;
    }
    if (made) {
        made->expires = expires;
        made->gone = gone;
        made->n_gone = gone ? n : 0;
    }
    put(d, made, ns, kind, key);
    return KVD_OK;
}

bool kvd_lease_end_retained(struct kvd_daemon *d, uint32_t ns, uint32_t most)
{
    struct kvd_lease *l, *next;
    HASH_ITER(hh, d->leases->all, l, next)
    {
        if (l->kind != KVD_LEASE_RETAINED || l->at.ns != ns)
            continue;
        if (!most--)
            return false;
        kvd_lease_end(d, l);
    }
    return true;
}

// Whether it holds that entry itself. What is before one that it holds cannot go anyway.
static bool holds(const struct kvd_lease *l, uint32_t entry)
{
    if (!l->pages)
        return l->at.entry == entry;
    for (uint32_t i = 0; i < l->n_pages; i++)
        if (l->pages[i] == entry)
            return true;
    return false;
}

bool kvd_lease_end_retained_on(struct kvd_daemon *d, uint32_t ns, uint32_t entry, bool begin,
                               uint32_t most)
{
    struct kvd_leases *all = d->leases;
    if (begin)
        all->next_look = all->all;
    for (struct kvd_lease *l; (l = all->next_look);) {
        if (!most--)
            return false;
        all->next_look = l->hh.next;
        if (l->kind == KVD_LEASE_RETAINED && l->at.ns == ns && holds(l, entry))
            kvd_lease_end(d, l);
    }
    return true;
}

static void session_ends(struct kvd_daemon *d, struct kvd_session *s)
{
    struct kvd_lease *l, *next;
    if (!s->leases)
        return;
    HASH_ITER(hh, d->leases->all, l, next)
    {
        if (l->owner == s)
            kvd_lease_end(d, l);
    }
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_prefix_leases", "gauge",
               "Leases of prefixes, pins of operators and what workers retain.",
               HASH_COUNT(d->leases->all));
    kvd_metric(f, "kvd_prefix_leases_expired_total", "counter",
               "Leases of prefixes that were not released before their time was over.",
               (double)d->leases->expired);
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->leases = calloc(1, sizeof(*d->leases));
    if (!d->leases)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->leases->timer);
    d->leases->timer.data = d;
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    struct kvd_lease *l, *next;
    if (!d->leases)
        return;
    HASH_ITER(hh, d->leases->all, l, next)
    {
        kvd_lease_end(d, l);
    }
    uv_close((uv_handle_t *)&d->leases->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->leases));
}

const struct kvd_part kvd_part_leases = {
    .init = init, .end = end, .deinit = deinit, .session_ends = session_ends, .metrics = metrics};
