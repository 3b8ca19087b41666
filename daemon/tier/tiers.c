#include "daemon/tier/tiers.h"

#include <utlist.h>

#include "daemon/core/config_tiers.h"
#include "daemon/core/log.h"
#include "daemon/tier/directory.h"
#include "daemon/tier/host.h"
#include "daemon/tier/pinned.h"
#ifdef KVD_REDIS
#include "daemon/core/secret.h"
#include "daemon/tier/redis.h"
#endif

struct getting;

struct kvd_tiers {
    struct kvd_tier *tier[KVD_TIERS_MOST];
    uint32_t n;
    struct getting *gettings;       // under way
    struct kvd_tier_secret *secret; // NULL: none
    struct kvd_tier_namer *namer;
    struct kvd_pinned *memory; // of blocks that they give
    bool left_behind;          // a thread that hangs may use secret and memory still
};

enum { KEPT_BYTES = 64 << 20 };

uint32_t kvd_tiers_count(const struct kvd_daemon *d)
{
    return d->tiers ? d->tiers->n : 0;
}

struct kvd_tier *kvd_tiers_get_tier(const struct kvd_daemon *d, uint32_t i)
{
    return d->tiers->tier[i];
}

struct kvd_tier *kvd_tiers_find(const struct kvd_daemon *d, const char *name)
{
    for (uint32_t i = 0; i < kvd_tiers_count(d); i++)
        if (strcmp(kvd_tier_name(d->tiers->tier[i]), name) == 0)
            return d->tiers->tier[i];
    return NULL;
}

int kvd_tiers_key(const struct kvd_daemon *d, const uint8_t domain[32], const uint8_t layout[32],
                  const void *key, uint32_t plane, struct kvd_tier_key *out, struct kvd_error *err)
{
    struct kvd_block_name name = {.plane = plane};
    memcpy(name.domain, domain, sizeof(name.domain));
    memcpy(name.layout, layout, sizeof(name.layout));
    memcpy(name.key, key, sizeof(name.key));
    return kvd_tier_key_of(d->tiers->namer, &name, out, err);
}

bool kvd_tiers_take(const struct kvd_daemon *d)
{
    for (uint32_t i = 0; i < kvd_tiers_count(d); i++)
        if (kvd_tier_takes(d->tiers->tier[i]))
            return true;
    return false;
}

// -- putting ------------------------------------------------------------------------------------

struct putting {
    uint32_t left, stored;
    kvd_tiers_stored *done;
    void *ctx;
    struct putting_tier {
        struct putting *all;
        uint32_t bit;
    } of[KVD_TIERS_MOST];
};

static void on_put(void *ctx, const struct kvd_tier_reply *reply)
{
    const struct putting_tier *t = ctx;
    struct putting *p = t->all;
    p->stored |= reply->result == KVD_TIER_OK ? t->bit : 0;
    if (--p->left)
        return;
    p->done(p->ctx, p->stored);
    free(p);
}

void kvd_tiers_put(struct kvd_daemon *d, const struct kvd_tier_key *key, const uint8_t layout[32],
                   struct kvd_block *block, kvd_tiers_stored *done, void *ctx)
{
    uint32_t n = kvd_tiers_count(d);
    struct putting *p = n ? malloc(sizeof(*p)) : NULL;
    if (!p) {
        done(ctx, 0);
        return;
    }
    *p = (struct putting){.left = n, .done = done, .ctx = ctx};
    for (uint32_t i = 0; i < n; i++)
        p->of[i] = (struct putting_tier){p, 1u << i};
    for (uint32_t i = 0; i < n; i++)
        kvd_tier_put(d->tiers->tier[i], key, layout, block, on_put, &p->of[i]);
}

// -- getting ------------------------------------------------------------------------------------

struct getting {
    struct kvd_daemon *d;
    struct kvd_tier_key key;
    uint8_t layout[32];
    uint64_t bytes;
    uint32_t tier; // that is being asked
    bool dropped;  // meanwhile
    kvd_tiers_got *done;
    void *ctx;
    struct getting *prev, *next;
};

static void on_got(void *ctx, const struct kvd_tier_reply *reply);

static void ask_next(struct getting *g)
{
    kvd_tier_get(g->d->tiers->tier[g->tier], &g->key, g->layout, g->bytes, on_got, g);
}

static void on_got(void *ctx, const struct kvd_tier_reply *reply)
{
    struct getting *g = ctx;
    struct kvd_tiers *tiers = g->d->tiers;
    if (!reply->block && reply->result != KVD_TIER_CLOSED && g->tier + 1 < tiers->n) {
        g->tier++;
        ask_next(g);
        return;
    }
    DL_DELETE(tiers->gettings, g);
    for (uint32_t i = 0; reply->block && !g->dropped && i < KVD_MIN(g->tier, tiers->n); i++)
        kvd_tier_put(tiers->tier[i], &g->key, g->layout, reply->block, NULL, NULL);
    g->done(g->ctx, reply->block, g->tier);
    free(g);
}

int kvd_tiers_get(struct kvd_daemon *d, const struct kvd_tier_key *key, const uint8_t layout[32],
                  uint64_t bytes, kvd_tiers_got *done, void *ctx, struct kvd_error *err)
{
    struct getting *g = kvd_tiers_count(d) ? malloc(sizeof(*g)) : NULL;
    if (!g)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "there are no tiers, or no memory");
    *g = (struct getting){.d = d, .key = *key, .bytes = bytes, .done = done, .ctx = ctx};
    memcpy(g->layout, layout, sizeof(g->layout));
    DL_APPEND(d->tiers->gettings, g);
    ask_next(g);
    return KVD_OK;
}

void kvd_tiers_drop(struct kvd_daemon *d, const struct kvd_tier_key *key, kvd_tier_done *done,
                    void *ctx)
{
    struct getting *g;
    DL_FOREACH(d->tiers->gettings, g)
    g->dropped |= !memcmp(&g->key, key, sizeof(*key));
    for (uint32_t i = 0; i < kvd_tiers_count(d); i++)
        kvd_tier_drop(d->tiers->tier[i], key, done, ctx);
}

// -- looking ------------------------------------------------------------------------------------

struct looking;

struct looking_tier {
    struct looking *all;
    uint8_t number; // 1 + index
};

struct looking {
    uint32_t n, left;
    kvd_tiers_found *done;
    void *ctx;
    struct looking_tier of[KVD_TIERS_MOST];
    uint8_t where[]; // n
};

static void on_has(void *ctx, const struct kvd_tier_reply *reply)
{
    const struct looking_tier *t = ctx;
    struct looking *all = t->all;
    for (uint32_t i = 0; reply->has && i < all->n; i++)
        if (reply->has[i] && (all->where[i] == 0 || t->number < all->where[i]))
            all->where[i] = t->number;
    if (--all->left)
        return;
    all->done(all->ctx, all->where);
    free(all);
}

int kvd_tiers_has(struct kvd_daemon *d, const struct kvd_tier_key *keys, uint32_t n,
                  kvd_tiers_found *done, void *ctx, struct kvd_error *err)
{
    uint32_t tiers = kvd_tiers_count(d);
    struct looking *all = tiers && n <= KVD_TIER_MOST_KEYS ? calloc(1, sizeof(*all) + n) : NULL;
    if (!all)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "there are no tiers, too many keys, or no memory");
    all->n = n;
    all->left = tiers;
    all->done = done;
    all->ctx = ctx;
    for (uint32_t i = 0; i < tiers; i++) {
        all->of[i] = (struct looking_tier){all, (uint8_t)(i + 1)};
        kvd_tier_has(d->tiers->tier[i], keys, n, on_has, &all->of[i]);
    }
    return KVD_OK;
}

// -- the part -----------------------------------------------------------------------------------

static int add(struct kvd_daemon *d, const struct kvd_tier_ops *ops, void *state,
               struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    struct kvd_tiers *t = d->tiers;
    const struct kvd_tier_settings settings = {.timeout_ms = c->tier_timeout_ms,
                                               .ttl_s = kvd_div_up(c->tier_ttl_ms, 1000),
                                               .rate = c->tier_rate,
                                               .secret = t->secret,
                                               .memory = t->memory};
    if (!state)
        return kvd_fail_in(err, "tier %s", ops->name);
    t->tier[t->n] = kvd_tier_new(&d->loop, ops, state, &settings, err);
    if (!t->tier[t->n])
        return err->code;
    t->n++;
    return KVD_OK;
}

static int add_directory(struct kvd_daemon *d, struct kvd_error *err)
{
    char path[KVD_CONFIG_TEXT];
    uint64_t bytes;
    int rc = kvd_tier_directory_parse(d->config.tier_directory, path, &bytes, err);
    if (rc)
        return rc;
    return add(d, &kvd_tier_directory_ops,
               kvd_tier_directory_new(path, bytes, kvd_div_up(d->config.tier_ttl_ms, 1000), err),
               err);
}

#ifdef KVD_REDIS
static int add_redis(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    uint8_t auth[KVD_SECRET_FILE_MAX + 1] = {0};
    size_t n = 0;
    if (c->tier_redis_auth[0]) {
        int rc = kvd_secret_file_read(c->tier_redis_auth, 1, auth, &n, err);
        if (rc)
            return rc;
    }
    while (n && strchr("\r\n", auth[n - 1])) // as editors leave it
        n--;
    auth[n] = 0;
    int rc = add(d, &kvd_tier_redis_ops, kvd_tier_redis_new(c->tier_redis, (char *)auth, err), err);
    explicit_bzero(auth, sizeof(auth));
    return rc;
}
#endif

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    int rc = KVD_OK;
    if (!c->tier_host && !c->tier_directory[0] && !c->tier_redis[0])
        return KVD_OK;
    d->tiers = calloc(1, sizeof(*d->tiers));
    if (!d->tiers)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (c->tier_secret[0]) {
        d->tiers->secret = kvd_tier_secret_load(c->tier_secret, err);
        if (!d->tiers->secret)
            return err->code;
    }
    struct kvd_backend *pins = d->backend && d->backend->ops->host_pin ? d->backend : NULL;
    d->tiers->memory = kvd_pinned_new(pins, KEPT_BYTES);
    if (!d->tiers->memory)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->tiers->namer = kvd_tier_namer_new(d->tiers->secret, err);
    if (!d->tiers->namer)
        return err->code;
    if (c->tier_host) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        rc = add(d, &kvd_tier_host_ops, kvd_tier_host_new(c->tier_host), err);
    }
    if (rc == KVD_OK && c->tier_directory[0])
        rc = add_directory(d, err);
#ifdef KVD_REDIS
    if (rc == KVD_OK && c->tier_redis[0])
        rc = add_redis(d, err);
#endif
    return rc;
}

static void close_tiers(struct kvd_daemon *d)
{
    if (d->tiers)
        d->tiers->n = 0; // nothing is asked any more by those that are answered now
    for (uint32_t i = 0; d->tiers && i < KVD_TIERS_MOST; i++)
        if (!kvd_tier_close(&d->tiers->tier[i])) {
            kvd_warning("a tier's thread hangs and is left behind");
            kvd_pinned_stop(d->tiers->memory); // as the backend goes
            d->tiers->left_behind = true;
        }
}

static void deinit(struct kvd_daemon *d)
{
    if (d->tiers)
        kvd_tier_namer_free(&d->tiers->namer);
    if (d->tiers && !d->tiers->left_behind) {
        kvd_tier_secret_free(&d->tiers->secret);
        kvd_pinned_free(&d->tiers->memory);
    }
    free(KVD_TAKE(d->tiers));
}

static void metric_results(FILE *f, const struct kvd_tier_status *s)
{
    for (int v = 0; v < KVD_TIER_VERBS; v++)
        for (int r = 0; r < KVD_TIER_RESULTS; r++)
            if (s->count[v][r])
                fprintf(f,
                        "kvd_tier_operations_total{tier=\"%s\",operation=\"%s\",result=\"%s\"} "
                        "%" PRIu64 "\n",
                        s->name, kvd_tier_verb_name(v), kvd_tier_result_name(r), s->count[v][r]);
}

// One metric of all tiers: a number of their status.
static void metric(FILE *f, const struct kvd_tier_status *s, uint32_t n, const char *name,
                   const char *type, const char *help, size_t offset)
{
    kvd_metric_head(f, name, type, help);
    for (uint32_t i = 0; i < n; i++)
        fprintf(f, "%s{tier=\"%s\"} %" PRIu64 "\n", name, s[i].name,
                *(const uint64_t *)((const uint8_t *)&s[i] + offset));
}

// Of tiers whose room is kvd's to make.
static void metric_lost(FILE *f, const struct kvd_tier_status *s, uint32_t n)
{
    kvd_metric_head(f, "kvd_tier_lost_blocks_total", "counter",
                    "Blocks that a tier of kvd's own lost for room, or as their time was over.");
    for (uint32_t i = 0; i < n; i++)
        for (int l = 0; s[i].limit && l < KVD_TIER_LOSSES; l++)
            fprintf(f, "kvd_tier_lost_blocks_total{tier=\"%s\",reason=\"%s\"} %" PRIu64 "\n",
                    s[i].name, kvd_tier_loss_name(l), s[i].lost.blocks[l]);
    kvd_metric_head(f, "kvd_tier_eviction_age_seconds", "histogram",
                    "Time since the last use of blocks that a tier of kvd's own lost for room.");
    for (uint32_t i = 0; i < n; i++) {
        char label[32];
        snprintf(label, sizeof(label), "tier=\"%s\"", s[i].name);
        if (s[i].limit)
            kvd_metric_ages(f, "kvd_tier_eviction_age_seconds", label, &s[i].lost.ages);
    }
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    static const enum kvd_tier_verb timed[] = {KVD_TIER_PUT, KVD_TIER_GET, KVD_TIER_HAS};
    uint32_t n = kvd_tiers_count(d);
    struct kvd_tier_status *s KVD_FREE = n ? calloc(n, sizeof(*s)) : NULL;
    if (!s)
        return;
    for (uint32_t i = 0; i < n; i++)
        kvd_tier_status(d->tiers->tier[i], &s[i]);
    metric(f, s, n, "kvd_tier_bytes", "gauge", "Bytes that a tier has; 0 where kvd cannot know.",
           offsetof(struct kvd_tier_status, bytes));
    metric(f, s, n, "kvd_tier_limit_bytes", "gauge", "Bytes that a tier may have; 0: not kvd's.",
           offsetof(struct kvd_tier_status, limit));
    metric(f, s, n, "kvd_tier_blocks", "gauge", "Blocks that a tier has.",
           offsetof(struct kvd_tier_status, blocks));
    metric(f, s, n, "kvd_tier_put_bytes_total", "counter", "Bytes of blocks that a tier took.",
           offsetof(struct kvd_tier_status, bytes_in));
    metric(f, s, n, "kvd_tier_got_bytes_total", "counter", "Bytes of blocks that a tier gave.",
           offsetof(struct kvd_tier_status, bytes_out));
    kvd_metric_head(f, "kvd_tier_up", "gauge",
                    "1 while a tier works, 0 while it is left alone after failures.");
    for (uint32_t i = 0; i < n; i++)
        fprintf(f, "kvd_tier_up{tier=\"%s\"} %d\n", s[i].name, strcmp(s[i].state, "failing") != 0);
    metric_lost(f, s, n);
    kvd_metric_head(f, "kvd_tier_operations_total", "counter",
                    "Operations on a tier, by what came of them.");
    for (uint32_t i = 0; i < n; i++)
        metric_results(f, &s[i]);
    kvd_metric_head(f, "kvd_tier_operation_seconds", "histogram",
                    "Time from asking a tier to its answer, waiting included.");
    for (uint32_t i = 0; i < n; i++)
        for (size_t v = 0; v < KVD_LEN(timed); v++) {
            char labels[64];
            snprintf(labels, sizeof(labels), "tier=\"%s\",operation=\"%s\"", s[i].name,
                     kvd_tier_verb_name(timed[v]));
            kvd_metric_histogram(f, "kvd_tier_operation_seconds", labels, &s[i].latency[timed[v]]);
        }
}

// They are closed when kvd stops, while calls can be answered still: whoever waits is told.
const struct kvd_part kvd_part_tiers = {
    .init = init,
    .stop = close_tiers,
    .end = close_tiers,
    .deinit = deinit,
    .metrics = metrics,
};
