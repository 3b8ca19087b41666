#include "daemon/service/claims.h"

#include <utlist.h>

#include "daemon/session/session.h"

enum {
    MOST_CLAIMS = 1024, // a namespace has as many as are left free, and so it is with
    MOST_KEYS = 1 << 18,
    TICK_MS = 20,
};

// Keys are chained, so one that is equal at one place says that all before it are.
struct claim {
    uint64_t session, until_ms;
    struct kvd_blocks_space space;
    uint32_t first, n; // blocks
    struct claim *prev, *next;
    struct kvd_prefix_key keys[];
};

struct kvd_claims {
    uv_timer_t timer; // runs while there are some
    struct claim *all;
    struct kvd_claim_waiter *waiters;
    uint32_t n, n_keys;
    uint32_t of_namespace[KVD_MAX_NAMESPACES], keys_of_namespace[KVD_MAX_NAMESPACES];
    uint64_t waited;
};

static bool same(const struct kvd_blocks_space *a, const struct kvd_blocks_space *b)
{
    return a->ns == b->ns && !memcmp(a->domain, b->domain, sizeof(a->domain));
}

// -- waiters ------------------------------------------------------------------------------------

void kvd_claim_forget(struct kvd_daemon *d, struct kvd_claim_waiter *w)
{
    if (w->waits)
        DL_DELETE(d->claims->waiters, w);
    w->waits = false;
}

static void wake(struct kvd_daemon *d, struct kvd_claim_waiter *w)
{
    kvd_claim_forget(d, w);
    w->go_on(w);
}

static void wake_space(struct kvd_daemon *d, const struct kvd_blocks_space *space)
{
    struct kvd_claim_waiter *w, *tmp;
    DL_FOREACH_SAFE(d->claims->waiters, w, tmp)
    {
        if (same(&w->space, space))
            wake(d, w);
    }
}

static bool is_waited_for(const struct kvd_claims *c, uint64_t session)
{
    const struct kvd_claim_waiter *w;
    DL_FOREACH(c->waiters, w)
    {
        if (w->owner == session)
            return true;
    }
    return false;
}

// -- claims -------------------------------------------------------------------------------------

static void end_claim(struct kvd_daemon *d, struct claim *claim)
{
    struct kvd_claims *c = d->claims;
    const struct kvd_blocks_space space = claim->space;
    c->n--;
    c->n_keys -= claim->n;
    c->of_namespace[space.ns]--;
    c->keys_of_namespace[space.ns] -= claim->n;
    DL_DELETE(c->all, claim);
    free(claim);
    wake_space(d, &space);
}

// One that has the block of a prompt, of the waiter's own session or of another.
static struct claim *find(const struct kvd_claims *c, const struct kvd_claim_waiter *w, bool own,
                          const struct kvd_prefix_key *keys, uint32_t block)
{
    struct claim *claim;
    DL_FOREACH(c->all, claim)
    {
        if ((claim->session == w->session) == own && same(&claim->space, &w->space) &&
            block >= claim->first && block - claim->first < claim->n &&
            !memcmp(&claim->keys[block - claim->first], &keys[block], sizeof(*keys)))
            return claim;
    }
    return NULL;
}

static void on_timer(uv_timer_t *timer);

static void take(struct kvd_daemon *d, const struct kvd_claim_waiter *w,
                 const struct kvd_prefix_key *keys, uint32_t first, uint32_t n, uint64_t ms)
{
    struct kvd_claims *c = d->claims;
    uint32_t ns = w->space.ns;
    struct claim *claim = find(c, w, true, keys, first);
    if (claim) {
        claim->until_ms = KVD_MAX(claim->until_ms, kvd_now_ms(d) + ms);
        return;
    }
    if (c->of_namespace[ns] >= MOST_CLAIMS - c->n ||
        c->keys_of_namespace[ns] + n > MOST_KEYS - c->n_keys)
        return;
    claim = malloc(sizeof(*claim) + n * sizeof(*keys));
    if (!claim)
        return;
    *claim = (struct claim){.session = w->session,
                            .until_ms = kvd_now_ms(d) + ms,
                            .space = w->space,
                            .first = first,
                            .n = n};
    memcpy(claim->keys, keys + first, n * sizeof(*keys));
    c->n++;
    c->n_keys += n;
    c->of_namespace[ns]++;
    c->keys_of_namespace[ns] += n;
    DL_APPEND(c->all, claim);
    uv_timer_start(&c->timer, on_timer, TICK_MS, TICK_MS);
}

bool kvd_claim_wait(struct kvd_daemon *d, struct kvd_claim_waiter *w,
                    const struct kvd_prefix_key *keys, uint32_t n, uint32_t known, uint64_t ms)
{
    struct kvd_claims *c = d->claims;
    uint64_t now = kvd_now_ms(d);
    if (known == n)
        return false;
    if (!w->until_ms)
        w->until_ms = now + ms;
    const struct claim *claim = find(c, w, false, keys, known);
    if (claim && now < w->until_ms && !is_waited_for(c, w->session)) {
        c->waited++;
        w->waits = true;
        w->owner = claim->session;
        DL_APPEND(c->waiters, w);
        return true;
    }
    take(d, w, keys, known, n - known, ms);
    return false;
}

void kvd_claim_published(struct kvd_daemon *d, uint64_t session,
                         const struct kvd_blocks_space *space, const struct kvd_prefix_key *keys,
                         uint32_t n)
{
    struct claim *claim, *tmp;
    DL_FOREACH_SAFE(d->claims->all, claim, tmp)
    {
        uint32_t last = claim->first + claim->n - 1;
        if (claim->session == session && same(&claim->space, space) && last < n &&
            !memcmp(&claim->keys[claim->n - 1], &keys[last], sizeof(*keys)))
            end_claim(d, claim);
    }
    wake_space(d, space);
}

static void session_ends(struct kvd_daemon *d, struct kvd_session *s)
{
    struct claim *claim, *tmp;
    DL_FOREACH_SAFE(d->claims->all, claim, tmp)
    {
        if (claim->session == s->id)
            end_claim(d, claim);
    }
}

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_claims *c = d->claims;
    struct kvd_claim_waiter *w, *next;
    struct claim *claim, *tmp;
    DL_FOREACH_SAFE(c->all, claim, tmp)
    {
        if (kvd_now_ms(d) >= claim->until_ms)
            end_claim(d, claim);
    }
    DL_FOREACH_SAFE(c->waiters, w, next)
    {
        if (kvd_now_ms(d) >= w->until_ms)
            wake(d, w);
    }
    if (!c->all)
        uv_timer_stop(timer);
}

// -- the part -----------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->claims = calloc(1, sizeof(*d->claims));
    if (!d->claims)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->claims->timer);
    d->claims->timer.data = d;
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    if (d->claims)
        uv_close((uv_handle_t *)&d->claims->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    struct kvd_claims *c = KVD_TAKE(d->claims);
    struct claim *claim, *tmp;
    if (!c)
        return;
    DL_FOREACH_SAFE(c->all, claim, tmp)
    free(claim);
    free(c);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_prefix_claims", "gauge",
               "Prompts that a session was told to compute, and that others may wait for.",
               d->claims->n);
    kvd_metric(f, "kvd_prefix_waits_total", "counter",
               "Times that a call waited for what another session was computing.",
               (double)d->claims->waited);
}

const struct kvd_part kvd_part_claims = {
    .init = init, .end = end, .deinit = deinit, .session_ends = session_ends, .metrics = metrics};
