// MatchPrefix, PublishBlocks, ReleasePrefix.
//
// Looking up and publishing go prompt by prompt: hash its keys, 512 at a time, then look them up or
// publish them, 256 at a time. Each such step takes some hundred microseconds (steps.h).
#include "daemon/service/prompts.h"

#include "daemon/rpc/rpc.h"
#include "daemon/service/claims.h"
#include "daemon/service/events.h"
#include "daemon/service/handlers.h"
#include "daemon/service/restore.h"
#include "daemon/service/steps.h"
#include "daemon/service/waits.h"
#include "daemon/session/leases.h"
#include "daemon/session/replay.h"

enum {
    HASHED = 512, // blocks in a step
    PUBLISHED = 256,
    GONE = 512, // blocks in an event
};

// A call on its way.
struct job {
    struct kvd_stepped stepped; // first
    bool waits;                 // for a tier or for another session, and is in no line
    struct kvd_call *call;
    bool publishes;
    uint32_t n, at;                // prompts
    uint32_t blocks, hashed, done; // of the one that it is at; `open`: it is at one
    bool open;
    struct kvd_restore *restore; // of the same; NULL: none was wanted yet
    bool restored;               // and it is done, as `answer` says
    uint64_t restore_until_ms;   // of the whole call; 0: none has begun
    struct kvd_restore_answer answer;
    struct kvd_claim_waiter waiter; // for what another computes
    struct kvd_wait wait;           // its memory, as long as `waits`
    uint64_t bytes;                 // of that
    struct kvd_blocks_space space;
    struct kvd_prefix_key *keys; // room for the longest
    Kvd__V1__PrefixMatch *matches, **match_refs;
    uint32_t (*behind)[KVD_TIERS_MOST]; // what the matches point to
    Kvd__V1__PublishedBlocks *published, **published_refs;
};

// Of a namespace, by its slot, which may be another's by now.
struct counts {
    char name[KVD_MAX_NAMESPACE + 1];
    uint64_t looked_up, found, adopted, restored; // tokens
    uint64_t published;                           // blocks that were new
    struct kvd_ages ages;                         // of those that went for want of room
};

struct kvd_prompts {
    uv_idle_t idle; // runs while there is something to tell of
    struct counts counts[KVD_MAX_NAMESPACES];
    // Blocks that are gone and have not been told of.
    struct kvd_prefix_key gone[GONE];
    uint32_t n_gone, gone_ns;
    enum kvd_prefix_reason gone_reason;
};

static struct counts *counts_of(struct kvd_daemon *d, uint32_t ns)
{
    struct counts *c = &d->prompts->counts[ns];
    struct kvd_pool_namespace_info info;
    kvd_pool_namespace_info(d->pool, ns, &info);
    if (strcmp(c->name, info.name)) {
        *c = (struct counts){0};
        snprintf(c->name, sizeof(c->name), "%s", info.name);
    }
    return c;
}

// -- jobs ---------------------------------------------------------------------------------------

static const char *session_of(const struct job *j)
{
    return j->publishes ? ((const Kvd__V1__PublishBlocksRequest *)(void *)j->call->request)->session
                        : ((const Kvd__V1__MatchPrefixRequest *)(void *)j->call->request)->session;
}

static const Kvd__V1__PrefixKeys *keys_of(const struct job *j, uint32_t i)
{
    if (j->publishes)
        return ((const Kvd__V1__PublishBlocksRequest *)(void *)j->call->request)->items[i]->keys;
    return ((const Kvd__V1__MatchPrefixRequest *)(void *)j->call->request)->requests[i];
}

static void job_free(struct kvd_daemon *d, struct job *j)
{
    if (!j->waits)
        kvd_steps_drop(d, &j->stepped);
    kvd_wait_end(d, &j->wait);
    kvd_claim_forget(d, &j->waiter);
    kvd_restore_end(&j->restore);
    free(j->behind);
    free(j->keys);
    free(j->matches);
    free(j->match_refs);
    free(j->published);
    free(j->published_refs);
    free(j);
}

// Nobody will know of the leases that were taken for it.
static void drop_leases(struct kvd_daemon *d, struct job *j)
{
    const struct kvd_session *s = kvd_session_find(d, session_of(j));
    for (uint32_t i = 0; i < j->at && j->matches && s; i++) {
        struct kvd_lease *l = kvd_lease_find(d, s, j->matches[i].lease);
        if (l)
            kvd_lease_end(d, l);
    }
}

static void job_fail(struct kvd_daemon *d, struct job *j, const struct kvd_error *err)
{
    drop_leases(d, j);
    j->call->on_cancelled = NULL;
    kvd_call_fail_error(j->call, err);
}

static void job_reply(struct job *j)
{
    j->call->on_cancelled = NULL;
    if (j->publishes) {
        Kvd__V1__PublishBlocksReply r = KVD__V1__PUBLISH_BLOCKS_REPLY__INIT;
        r.n_items = j->n;
        r.items = j->published_refs;
        kvd_call_reply(j->call, &r);
    } else {
        Kvd__V1__MatchPrefixReply r = KVD__V1__MATCH_PREFIX_REPLY__INIT;
        char *tiers[KVD_TIERS_MOST];
        for (uint32_t i = 0; i < kvd_tiers_count(j->call->d); i++)
            tiers[i] = (char *)(uintptr_t)kvd_tier_name(kvd_tiers_get_tier(j->call->d, i));
        r.n_tiers = kvd_tiers_count(j->call->d);
        r.tiers = tiers;
        r.n_matches = j->n;
        r.matches = j->match_refs;
        r.lease_ms = ((const Kvd__V1__MatchPrefixRequest *)(void *)j->call->request)->lease_ms;
        kvd_call_reply(j->call, &r);
    }
}

// -- a step of one ------------------------------------------------------------------------------

static int begin_prompt(struct kvd_daemon *d, struct job *j, const struct kvd_session *s,
                        struct kvd_error *err)
{
    int rc = kvd_prompt_check(keys_of(j, j->at), &j->blocks, err);
    if (rc == KVD_OK)
        rc = kvd_prompt_space(d, s->ns, s->layout, keys_of(j, j->at), &j->space, err);
    j->hashed = j->done = 0;
    j->restored = false;
    j->open = rc == KVD_OK;
    return rc;
}

// Blocks [from, to) of the prompt that it is at are known now.
static void tell_known(struct kvd_daemon *d, const struct job *j, uint32_t from, uint32_t to)
{
    for (; from < to; from += GONE) {
        const uint32_t n = KVD_MIN(to - from, (uint32_t)GONE);
        kvd_parts_blocks_stored(d, j->space.ns, &j->keys[from], n,
                                from ? &j->keys[from - 1] : NULL);
    }
}

// -- what is behind the pool --------------------------------------------------------------------

static void go_on(struct job *j)
{
    j->waits = false;
    kvd_wait_end(j->call->d, &j->wait);
    kvd_steps_add(j->call->d, &j->stepped);
}

static void on_restored(void *ctx, const struct kvd_restore_answer *answer)
{
    struct job *j = ctx;
    j->restored = true;
    j->answer = *answer;
    go_on(j);
}

// Begins to look behind the pool for what it lacks of the prompt, if that is wanted, was not done
// yet, and there is memory for who waits. True: the job goes on when on_restored is called.
static bool look_behind(struct kvd_daemon *d, struct job *j)
{
    const Kvd__V1__MatchPrefixRequest *req = (const void *)j->call->request;
    struct kvd_blocks_match m = {.keys = j->keys, .n = j->blocks};
    if (j->publishes || j->restore || !(req->tiers || req->restore_ms) || !kvd_tiers_count(d))
        return false;
    kvd_blocks_match(d->pool, &j->space, false, &m);
    if (!j->restore_until_ms)
        j->restore_until_ms = kvd_now_ms(d) + req->restore_ms;
    bool late = req->restore_ms && kvd_now_ms(d) >= j->restore_until_ms;
    if (m.at.blocks == j->blocks || late ||
        !kvd_wait_begin(d, &j->wait, j->space.ns, j->stepped.session, j->bytes))
        return false;
    const struct kvd_restore_ask ask = {.space = j->space,
                                        .keys = j->keys,
                                        .n = j->blocks,
                                        .from = m.at.blocks,
                                        .ms = req->restore_ms ? j->restore_until_ms - kvd_now_ms(d)
                                                              : 0};
    j->restore = kvd_restore_begin(d, &ask, on_restored, j, NULL);
    if (!j->restore)
        kvd_wait_end(d, &j->wait);
    return j->restore;
}

static void on_claim(struct kvd_claim_waiter *w)
{
    go_on((struct job *)((uint8_t *)w - offsetof(struct job, waiter)));
}

// Has the job wait for a session that is computing what is missing, if that is wanted and there is
// memory for who waits. True: it goes on when on_claim is called.
static bool wait_for_others(struct kvd_daemon *d, struct job *j, const struct kvd_session *s)
{
    const Kvd__V1__MatchPrefixRequest *req = (const void *)j->call->request;
    struct kvd_blocks_match m = {.keys = j->keys, .n = j->blocks};
    if (j->publishes || !req->wait_ms)
        return false;
    kvd_blocks_match(d->pool, &j->space, false, &m);
    j->waiter.session = s->id;
    j->waiter.space = j->space;
    j->waiter.go_on = on_claim;
    if (!kvd_claim_wait(d, &j->waiter, j->keys, j->blocks, m.known, req->wait_ms))
        return false;
    if (kvd_wait_begin(d, &j->wait, j->space.ns, s->id, j->bytes))
        return true;
    kvd_claim_forget(d, &j->waiter);
    return false;
}

static void tell_restored(struct kvd_daemon *d, struct job *j, Kvd__V1__PrefixMatch *out)
{
    const struct kvd_restore_answer *a = &j->answer;
    memcpy(j->behind[j->at], a->behind, sizeof(a->behind));
    out->n_behind = kvd_tiers_count(d);
    out->behind = j->behind[j->at];
    out->restored = a->restored;
    counts_of(d, j->space.ns)->restored += (uint64_t)a->restored * KVD_PAGE_TOKENS;
    tell_known(d, j, a->begin, a->end);
}

// Has the match end a window of bf16 tokens earlier, unless it ends where one was kept: who
// computes those tokens again has that window.
static void leave_window(struct kvd_daemon *d, const struct job *j, struct kvd_blocks_match *m)
{
    const struct kvd_layout *l = kvd_pool_layout_get(d->pool, j->space.layout);
    uint32_t window = 0, sink = UINT32_MAX;
    for (uint32_t p = 0; p < l->n_planes; p++) {
        const struct kvd_plane *g = &l->planes[p];
        if (!kvd_codecs_rotated(g->codec))
            continue;
        window = KVD_MAX(window, (uint32_t)kvd_div_up(g->recent, KVD_PAGE_TOKENS));
        sink = KVD_MIN(sink, g->sink / KVD_PAGE_TOKENS);
    }
    if (!window || m->end || m->at.blocks <= sink)
        return;
    struct kvd_blocks_match earlier = {.keys = m->keys};
    earlier.n = m->at.blocks > window ? m->at.blocks - window : 0;
    earlier.n = KVD_MAX(earlier.n, sink);
    kvd_blocks_match(d->pool, &j->space, false, &earlier);
    m->at = earlier.at;
    m->window = earlier.window;
    m->end = earlier.end;
}

static int match(struct kvd_daemon *d, struct job *j, struct kvd_session *s, struct kvd_error *err)
{
    const Kvd__V1__MatchPrefixRequest *req = (const void *)j->call->request;
    struct kvd_blocks_match m = {.keys = j->keys, .n = j->blocks};
    struct counts *c = counts_of(d, s->ns);
    Kvd__V1__PrefixMatch *out = &j->matches[j->at];
    struct kvd_lease *l;
    kvd_blocks_match(d->pool, &j->space, !req->quiet, &m);
    if (req->recompute_window)
        leave_window(d, j, &m);
    out->blocks = m.at.blocks;
    out->known = m.known;
    out->window_tokens = m.window;
    out->end = m.end;
    out->miss = j->blocks ? kvd_prompt_miss(d, &j->space, keys_of(j, j->at), &m)
                          : KVD__V1__MISS_REASON__MISS_NONE;
    out->miss_time = m.when;
    if (!req->quiet) {
        c->looked_up += (uint64_t)j->blocks * KVD_PAGE_TOKENS;
        c->found += (uint64_t)m.at.blocks * KVD_PAGE_TOKENS;
    }
    if (j->restored)
        tell_restored(d, j, out);
    if (!req->lease_ms || !m.at.blocks)
        return KVD_OK;
    int rc = kvd_lease_new(d, s, &m.at, req->lease_ms, &l, err);
    if (rc == KVD_OK)
        out->lease = l->id;
    return rc;
}

// What may have changed since the step before.
static int check_publish(const struct kvd_daemon *d, const struct kvd_session *s,
                         const Kvd__V1__PublishItem *item, struct kvd_error *err)
{
    if (!kvd_session_holds(s, item->sequence))
        return kvd_fail(err, KVD_E_NOT_FOUND, "this session holds no sequence %" PRIu64,
                        item->sequence);
    if (item->end && d->use[(uint32_t)item->sequence].writer)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %" PRIu64 " is being written by a call in flight; wait for its "
                        "reply before its end is published",
                        item->sequence);
    return KVD_OK;
}

// Publishes the next piece of a prompt; *last: there is nothing more to publish of it.
static int publish(struct kvd_daemon *d, struct job *j, const struct kvd_session *s, bool *last,
                   struct kvd_error *err)
{
    const Kvd__V1__PublishItem *item =
        ((const Kvd__V1__PublishBlocksRequest *)(void *)j->call->request)->items[j->at];
    struct kvd_blocks_published p;
    Kvd__V1__PublishedBlocks *out = &j->published[j->at];
    uint32_t n = KVD_MIN(j->done + PUBLISHED, j->blocks);
    int rc = check_publish(d, s, item, err);
    if (rc)
        return rc;
    bool whole = n == j->blocks;
    rc = kvd_blocks_publish(d->pool, &j->space, item->sequence, j->keys, n, item->end && whole, &p,
                            err);
    counts_of(d, j->space.ns)->published += p.blocks > p.known ? p.blocks - p.known : 0;
    tell_known(d, j, p.known, p.blocks);
    out->known += p.known > j->done ? p.known - j->done : 0;
    out->blocks = KVD_MAX(out->blocks, p.blocks);
    out->end = p.end;
    if (p.blocks) {
        struct kvd_pool_seq_lengths info;
        kvd_pool_seq_lengths(d->pool, item->sequence, &info);
        kvd_claim_published(d, s->id, &j->space, j->keys,
                            KVD_MIN(n, (uint32_t)(info.length / KVD_PAGE_TOKENS)));
    }
    // Only an end is beyond what is sealed, and it is the last piece's.
    bool behind = p.blocks < n && !item->end;
    j->done = n;
    *last = whole || behind;
    return rc;
}

// Works on for a few hundred microseconds.
static void step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct job *j = (struct job *)stepped;
    struct kvd_session *s = kvd_session_find(d, session_of(j));
    struct kvd_error err = {0};
    bool last = true;
    int rc = KVD_OK;
    if (!s)
        rc = kvd_fail(&err, KVD_E_UNAUTH, "the session ended before the call was done");
    else if (!j->open)
        rc = begin_prompt(d, j, s, &err);
    if (rc) {
        job_fail(d, j, &err);
        job_free(d, j);
        return;
    }
    if (j->hashed < j->blocks) {
        uint32_t to = KVD_MIN(j->hashed + HASHED, j->blocks);
        rc = kvd_prompt_keys(&j->space, keys_of(j, j->at), j->hashed, to, j->keys, &err);
        j->hashed = to;
        last = false;
    } else if (look_behind(d, j) || wait_for_others(d, j, s)) {
        kvd_steps_drop(d, &j->stepped);
        j->waits = true;
        return;
    } else {
        rc = j->publishes ? publish(d, j, s, &last, &err) : match(d, j, s, &err);
    }
    if (rc) {
        job_fail(d, j, &err);
        job_free(d, j);
        return;
    }
    j->open = !last;
    j->at += last;
    if (last)
        kvd_restore_end(&j->restore);
    if (j->at < j->n)
        return;
    job_reply(j);
    job_free(d, j);
}

static void on_cancelled(struct kvd_call *call)
{
    struct kvd_daemon *d = call->d;
    struct job *j = call->work;
    const struct kvd_error err = {.code = KVD_E_UNAVAILABLE, .text = "the call was cancelled"};
    job_fail(d, j, &err);
    job_free(d, j);
}

static int job_begin(struct kvd_call *call, bool publishes, uint32_t n, struct kvd_error *err)
{
    struct job *j = calloc(1, sizeof(*j));
    uint32_t longest = 0, blocks;
    uint64_t all = 0;
    int rc = j ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc)
        return rc;
    *j = (struct job){.stepped = {.step = step},
                      .waits = true, // it is in no line yet
                      .call = call,
                      .publishes = publishes,
                      .n = n};
    for (uint32_t i = 0; i < n && rc == KVD_OK; i++) {
        rc = kvd_prompt_check(keys_of(j, i), &blocks, err);
        if (rc)
            kvd_fail_in(err, "prompt %u", i);
        longest = KVD_MAX(longest, blocks);
        all += blocks;
    }
    if (rc == KVD_OK && all > KVD_MAX_CALL_BLOCKS)
        rc = kvd_fail(err, KVD_E_INVALID, "%" PRIu64 " blocks in all; at most %d are possible", all,
                      KVD_MAX_CALL_BLOCKS);
    j->keys = calloc(longest + 1, sizeof(*j->keys));
    j->bytes =
        sizeof(*j) + call->request_bytes + longest * sizeof(*j->keys) + n * sizeof(*j->matches);
    if (publishes) {
        j->published = calloc(n, sizeof(*j->published));
        j->published_refs = calloc(n, sizeof(*j->published_refs));
    } else {
        j->matches = calloc(n, sizeof(*j->matches));
        j->match_refs = calloc(n, sizeof(*j->match_refs));
        j->behind = calloc(n, sizeof(*j->behind));
    }
    bool room =
        publishes ? j->published && j->published_refs : j->matches && j->match_refs && j->behind;
    if (rc == KVD_OK && (!j->keys || !room))
        rc = kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc) {
        job_free(call->d, j);
        return rc;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (publishes) {
            kvd__v1__published_blocks__init(&j->published[i]);
            j->published_refs[i] = &j->published[i];
        } else {
            kvd__v1__prefix_match__init(&j->matches[i]);
            j->match_refs[i] = &j->matches[i];
        }
    }
    call->work = j;
    call->on_cancelled = on_cancelled;
    j->waits = false;
    const struct kvd_session *s = kvd_session_find(call->d, session_of(j));
    kvd_steps_begin(call->d, &j->stepped, s->ns, s->id);
    return KVD_OK;
}

static void begin(struct kvd_call *call, bool publishes, size_t n)
{
    struct kvd_error err = {0};
    if (n < 1) {
        kvd_call_fail(call, KVD_E_INVALID, "no prompts; 1 to %d are possible",
                      KVD_MAX_CALL_PROMPTS);
        return;
    }
    if (job_begin(call, publishes, (uint32_t)n, &err))
        kvd_call_fail_error(call, &err);
}

void kvd_on_match_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__MatchPrefixRequest *req = request;
    if (!kvd_call_session(call, req->session))
        return;
    if (req->lease_ms > KVD_MAX_LEASE_MS)
        kvd_call_fail(call, KVD_E_INVALID, "lease_ms is %u; at most %d are possible", req->lease_ms,
                      KVD_MAX_LEASE_MS);
    else if (req->restore_ms > KVD_MAX_LEASE_MS)
        kvd_call_fail(call, KVD_E_INVALID, "restore_ms is %u; at most %d are possible",
                      req->restore_ms, KVD_MAX_LEASE_MS);
    else if (req->wait_ms > KVD_MAX_LEASE_MS || (req->wait_ms && req->n_requests != 1))
        kvd_call_fail(call, KVD_E_INVALID,
                      "wait_ms is %u with %zu prompts; at most %d are possible, with one prompt",
                      req->wait_ms, req->n_requests, KVD_MAX_LEASE_MS);
    else
        begin(call, false, req->n_requests);
}

void kvd_on_publish_blocks(struct kvd_call *call, const void *request)
{
    const Kvd__V1__PublishBlocksRequest *req = request;
    if (kvd_call_session(call, req->session))
        begin(call, true, req->n_items);
}

// -- adopted and released -----------------------------------------------------------------------

void kvd_prompts_adopted(struct kvd_daemon *d, uint32_t ns, uint64_t tokens)
{
    counts_of(d, ns)->adopted += tokens;
}

void kvd_on_release_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ReleasePrefixRequest *req = request;
    Kvd__V1__ReleasePrefixReply r = KVD__V1__RELEASE_PREFIX_REPLY__INIT;
    const struct kvd_session *s = kvd_call_session(call, req->session);
    if (!s)
        return;
    for (size_t i = 0; i < req->n_leases; i++) {
        struct kvd_lease *l = kvd_lease_find(call->d, s, req->leases[i]);
        if (!l)
            continue;
        kvd_lease_end(call->d, l);
        r.released++;
    }
    kvd_call_reply(call, &r);
}

// -- what is gone -------------------------------------------------------------------------------

static void tell_gone(struct kvd_daemon *d)
{
    struct kvd_prompts *p = d->prompts;
    const struct kvd_event_of_blocks e = {.kind = KVD__V1__EVENT__KIND__BLOCKS_REMOVED,
                                          .keys = p->gone,
                                          .n = p->n_gone,
                                          .miss = kvd_miss_reason(p->gone_reason)};
    if (p->n_gone)
        kvd_event_blocks(d, p->gone_ns, &e);
    p->n_gone = 0;
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    tell_gone(d);
    uv_idle_stop(idle);
}

static void block_gone(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                       const struct kvd_prefix_removed *removed)
{
    struct kvd_prompts *p = d->prompts;
    (void)layout;
    if (!p)
        return; // kvd stops
    if (p->n_gone == GONE || p->gone_ns != ns || p->gone_reason != removed->reason)
        tell_gone(d);
    if (removed->reason == KVD_PREFIX_EVICTED_ROOM || removed->reason == KVD_PREFIX_EVICTED_QUOTA ||
        removed->reason == KVD_PREFIX_EVICTED_INDEX)
        kvd_ages_add(&counts_of(d, ns)->ages, removed->age);
    p->gone_ns = ns;
    p->gone_reason = removed->reason;
    p->gone[p->n_gone++] = removed->key;
    uv_idle_start(&p->idle, on_idle);
}

// -- metrics ------------------------------------------------------------------------------------

static void counter(struct kvd_daemon *d, FILE *f, const char *name, const char *type,
                    const char *help,
                    uint64_t (*value)(const struct counts *c, const struct kvd_blocks_info *b))
{
    kvd_metric_head(f, name, type, help);
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        struct kvd_pool_namespace_info ns;
        struct kvd_blocks_info blocks;
        char label[2 * KVD_MAX_NAMESPACE + 4];
        kvd_pool_namespace_info(d->pool, i, &ns);
        if (!ns.name[0])
            continue;
        kvd_blocks_info(d->pool, i, &blocks);
        kvd_metric_escape(ns.name, label, sizeof(label));
        fprintf(f, "%s{namespace=\"%s\"} %" PRIu64 "\n", name, label,
                value(counts_of(d, i), &blocks));
    }
}

#define VALUE(name, what)                                                                          \
    static uint64_t name(const struct counts *c, const struct kvd_blocks_info *b)                  \
    {                                                                                              \
        (void)c;                                                                                   \
        (void)b;                                                                                   \
        return what;                                                                               \
    }
VALUE(looked_up, c->looked_up)
VALUE(found, c->found)
VALUE(adopted, c->adopted)
VALUE(restored, c->restored)
VALUE(published, c->published)
VALUE(blocks, b->blocks)
VALUE(bytes, b->bytes)

static void age_metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric_head(f, "kvd_prefix_eviction_age_seconds", "histogram",
                    "Time since the last use of blocks that went for want of room.");
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        struct kvd_pool_namespace_info ns;
        char name[2 * KVD_MAX_NAMESPACE + 4], label[sizeof(name) + 16];
        kvd_pool_namespace_info(d->pool, i, &ns);
        if (!ns.name[0])
            continue;
        kvd_metric_escape(ns.name, name, sizeof(name));
        snprintf(label, sizeof(label), "namespace=\"%s\"", name);
        kvd_metric_ages(f, "kvd_prefix_eviction_age_seconds", label, &counts_of(d, i)->ages);
    }
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    static const char *const reasons[] = {
        [KVD_PREFIX_EVICTED_ROOM] = "room",   [KVD_PREFIX_EVICTED_QUOTA] = "quota",
        [KVD_PREFIX_EVICTED_INDEX] = "index", [KVD_PREFIX_DROPPED] = "dropped",
        [KVD_PREFIX_DAMAGED] = "damaged",     [KVD_PREFIX_EVICTED_ASKED] = "asked",
        [KVD_PREFIX_EXPIRED] = "expired",     [KVD_PREFIX_SUPERSEDED] = "superseded",
    };
    counter(d, f, "kvd_prefix_lookup_tokens_total", "counter",
            "Tokens of prompts that were looked up, in whole blocks.", looked_up);
    counter(d, f, "kvd_prefix_hit_tokens_total", "counter",
            "Of those, tokens that were there and could be adopted.", found);
    counter(d, f, "kvd_prefix_adopted_tokens_total", "counter",
            "Tokens that sequences were made of instead of being computed.", adopted);
    counter(d, f, "kvd_prefix_restored_tokens_total", "counter",
            "Of those that were there, tokens that were brought back from a tier first.", restored);
    counter(d, f, "kvd_prefix_stored_blocks_total", "counter", "Blocks that became known.",
            published);
    counter(d, f, "kvd_prefix_blocks", "gauge", "Blocks that are known.", blocks);
    counter(d, f, "kvd_prefix_bytes", "gauge",
            "Bytes of their pages, those that sequences have too included.", bytes);
    kvd_metric_head(f, "kvd_prefix_removed_blocks_total", "counter",
                    "Blocks that are known no more, by what for.");
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        struct kvd_pool_namespace_info ns;
        struct kvd_blocks_info info;
        char label[2 * KVD_MAX_NAMESPACE + 4];
        kvd_pool_namespace_info(d->pool, i, &ns);
        kvd_blocks_info(d->pool, i, &info);
        kvd_metric_escape(ns.name, label, sizeof(label));
        for (uint32_t r = 0; r < KVD_LEN(reasons) && ns.name[0]; r++)
            if (reasons[r])
                fprintf(f,
                        "kvd_prefix_removed_blocks_total{namespace=\"%s\",reason=\"%s\"} %" PRIu64
                        "\n",
                        label, reasons[r], info.removed[r]);
    }
    age_metrics(d, f);
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->prompts = calloc(1, sizeof(*d->prompts));
    if (!d->prompts)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->prompts->idle);
    d->prompts->idle.data = d;
    return KVD_OK;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(KVD_TAKE(d->prompts));
}

// No call is left by then.
static void end(struct kvd_daemon *d)
{
    if (d->prompts)
        uv_close((uv_handle_t *)&d->prompts->idle, on_closed);
}

const struct kvd_part kvd_part_prompts = {
    .init = init, .end = end, .block_gone = block_gone, .metrics = metrics};
