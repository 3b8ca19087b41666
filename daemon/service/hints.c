// HintPrefix. Goes prompt by prompt: hash its keys, 512 at a time, then do what the hint says. Each
// such step takes some hundred microseconds (steps.h). What is prefetched comes after the answer.
#include "daemon/service/hints.h"

#include <utlist.h>

#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/service/handlers.h"
#include "daemon/service/prompts.h"
#include "daemon/service/restore.h"
#include "daemon/service/steps.h"
#include "daemon/session/leases.h"
#include "daemon/session/replay.h"

enum {
    HASHED = 512, // blocks in a step
    PREFETCH_MS = 60000,
    MOST_PREFETCHES = 256,
    MOST_OF_NAMESPACE = 64,
};

struct kvd_hints_prefetch {
    struct kvd_daemon *d;
    struct kvd_restore *restore;
    struct kvd_hints_ask ask; // with memory of its own
    struct kvd_prefix_key *keys;
    uint8_t *skip;
    struct kvd_hints_prefetch *prev, *next;
};

// A call on its way.
struct hint {
    struct kvd_stepped stepped; // first
    struct kvd_call *call;
    const Kvd__V1__HintPrefixRequest *req;
    uint32_t at, hashed, blocks; // prompt, and blocks of it
    bool open;                   // it has begun with it
    int64_t uid;
    struct kvd_blocks_space space;
    struct kvd_prefix_key *keys; // room for the longest
    uint32_t *answer;
};

static void hint_free(struct hint *h)
{
    free(h->keys);
    free(h->answer);
    free(h);
}

static void end(struct hint *h)
{
    h->call->on_cancelled = NULL;
    kvd_steps_drop(h->call->d, &h->stepped);
    hint_free(h);
}

// -- prefetching --------------------------------------------------------------------------------

static void prefetch_free(struct kvd_hints_prefetch *p)
{
    struct kvd_hints *all = p->d->hints;
    DL_DELETE(all->prefetches, p);
    all->running--;
    kvd_restore_end(&p->restore);
    free(p->keys);
    free(p->skip);
    free(p);
}

static struct kvd_blocks_match match_of(struct kvd_daemon *d, const struct kvd_blocks_space *space,
                                        const struct kvd_prefix_key *keys, uint32_t n)
{
    struct kvd_blocks_match m = {.keys = keys, .n = n};
    kvd_blocks_match(d->pool, space, false, &m);
    return m;
}

static int retain(struct kvd_daemon *d, const struct kvd_blocks_match *m, uint32_t ms, bool expire,
                  int64_t uid, struct kvd_error *err)
{
    const struct kvd_prefix_key *last = m->at.blocks ? &m->keys[m->at.blocks - 1] : NULL;
    return last ? kvd_lease_put(d, KVD_LEASE_RETAINED, &m->at, last, ms, expire, uid, err) : KVD_OK;
}

// A hint: where there is no room for a lease it is none.
static void retain_pages(struct kvd_daemon *d, const struct kvd_hints_ask *a)
{
    uint32_t *entries KVD_FREE = calloc(a->n + 1, sizeof(*entries)), n = 0, last = 0;
    if (!entries)
        return;
    kvd_blocks_find_pages(d->pool, &a->space, false, a->keys, a->n, entries);
    for (uint32_t i = 0; i < a->n; i++)
        if (entries[i] != KVD_PREFIX_NONE && !a->skip[i]) {
            entries[n++] = entries[i];
            last = i;
        }
    if (n)
        kvd_lease_put_pages(d, KVD_LEASE_RETAINED, a->space.ns, entries, n, n, &a->keys[last],
                            a->retain_ms, false, a->uid, NULL);
}

static void on_restored(void *ctx, const struct kvd_restore_answer *answer)
{
    struct kvd_hints_prefetch *p = ctx;
    const struct kvd_hints_ask *a = &p->ask;
    struct kvd_daemon *d = p->d;
    struct kvd_blocks_match m;
    if (answer->end > answer->begin)
        kvd_parts_blocks_stored(d, a->space.ns, &a->keys[answer->begin],
                                answer->end - answer->begin,
                                answer->begin ? &a->keys[answer->begin - 1] : NULL);
    if (a->retain_ms && a->skip) {
        retain_pages(d, a);
    } else if (a->retain_ms) {
        m = match_of(d, &a->space, a->keys, a->n);
        retain(d, &m, a->retain_ms, false, a->uid, NULL); // as above
    }
    prefetch_free(p);
}

static uint32_t prefetches_of(const struct kvd_hints *all, uint32_t ns)
{
    const struct kvd_hints_prefetch *p;
    uint32_t n = 0;
    DL_FOREACH(all->prefetches, p)
    n += p->ask.space.ns == ns;
    return n;
}

static struct kvd_hints_prefetch *prefetch_new(struct kvd_daemon *d, const struct kvd_hints_ask *a)
{
    struct kvd_hints_prefetch *p = calloc(1, sizeof(*p));
    if (p && (p->keys = malloc(a->n * sizeof(*p->keys))) != NULL &&
        (!a->skip || (p->skip = malloc(a->n)) != NULL)) {
        memcpy(p->keys, a->keys, a->n * sizeof(*p->keys));
        if (a->skip)
            memcpy(p->skip, a->skip, a->n);
        p->d = d;
        p->ask = *a;
        p->ask.keys = p->keys;
        p->ask.skip = p->skip;
        return p;
    }
    if (p)
        free(p->keys);
    free(p);
    return NULL;
}

int kvd_hints_prefetch(struct kvd_daemon *d, const struct kvd_hints_ask *a, struct kvd_error *err)
{
    struct kvd_hints *all = d->hints;
    if (all->running >= MOST_PREFETCHES || prefetches_of(all, a->space.ns) >= MOST_OF_NAMESPACE)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%u prompts are being prefetched, which is enough; ask again later",
                        all->running);
    struct kvd_hints_prefetch *p = prefetch_new(d, a);
    if (!p)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    DL_APPEND(all->prefetches, p);
    all->running++;
    all->prefetched++;
    const struct kvd_restore_ask ask = {.space = a->space,
                                        .keys = p->keys,
                                        .n = a->n,
                                        .from = a->from,
                                        .pages = a->skip != NULL,
                                        .skip = p->skip,
                                        .ms = PREFETCH_MS};
    p->restore = kvd_restore_begin(d, &ask, on_restored, p, err);
    if (p->restore)
        return KVD_OK;
    prefetch_free(p);
    return err->code;
}

static int prefetch(struct kvd_daemon *d, const struct hint *h, const struct kvd_blocks_match *m,
                    struct kvd_error *err)
{
    if (m->at.blocks == h->blocks || !kvd_tiers_count(d))
        return h->req->ms ? retain(d, m, h->req->ms, false, h->uid, err) : KVD_OK;
    const struct kvd_hints_ask ask = {.space = h->space,
                                      .keys = h->keys,
                                      .n = h->blocks,
                                      .from = m->at.blocks,
                                      .retain_ms = h->req->ms,
                                      .uid = h->uid};
    return kvd_hints_prefetch(d, &ask, err);
}

// -- what all hints share -----------------------------------------------------------------------

bool kvd_hints_class(Kvd__V1__HintPrefixRequest__Hint hint, enum kvd_prefix_class *class)
{
    switch (hint) {
    case KVD__V1__HINT_PREFIX_REQUEST__HINT__DEMOTE:
        *class = KVD_PREFIX_DEMOTED;
        return true;
    case KVD__V1__HINT_PREFIX_REQUEST__HINT__LOW:
        *class = KVD_PREFIX_LOW;
        return true;
    case KVD__V1__HINT_PREFIX_REQUEST__HINT__NORMAL:
        *class = KVD_PREFIX_NORMAL;
        return true;
    case KVD__V1__HINT_PREFIX_REQUEST__HINT__HIGH:
        *class = KVD_PREFIX_HIGH;
        return true;
    default:
        return false;
    }
}

void kvd_hints_count(struct kvd_daemon *d, enum kvd_prefix_class class, uint32_t blocks)
{
    *(class == KVD_PREFIX_DEMOTED ? &d->hints->demoted : &d->hints->classified) += blocks;
}

int kvd_hints_check(Kvd__V1__HintPrefixRequest__Hint hint, uint32_t ms, bool expire,
                    struct kvd_error *err)
{
    enum kvd_prefix_class class;
    bool classifies = kvd_hints_class(hint, &class);
    if (expire && (hint != KVD__V1__HINT_PREFIX_REQUEST__HINT__RETAIN || !ms))
        return kvd_fail(err, KVD_E_INVALID, "expire goes with RETAIN and a time");
    if (ms > KVD_MAX_RETAIN_MS)
        return kvd_fail(err, KVD_E_INVALID, "ms is %u; at most %d are possible", ms,
                        KVD_MAX_RETAIN_MS);
    if (!classifies && hint != KVD__V1__HINT_PREFIX_REQUEST__HINT__RETAIN &&
        hint != KVD__V1__HINT_PREFIX_REQUEST__HINT__PREFETCH)
        return kvd_fail(err, KVD_E_INVALID, "hint %u is not known", (unsigned)hint);
    if (classifies && ms)
        return kvd_fail(err, KVD_E_INVALID, "ms is %u: what is demoted, or of a class, has no time",
                        ms);
    return KVD_OK;
}

// -- a step -------------------------------------------------------------------------------------

static int act(struct kvd_daemon *d, struct hint *h, struct kvd_error *err)
{
    struct kvd_blocks_match m = match_of(d, &h->space, h->keys, h->blocks);
    enum kvd_prefix_class class;
    int rc = KVD_OK;
    h->answer[h->at] = m.at.blocks;
    if (h->req->hint == KVD__V1__HINT_PREFIX_REQUEST__HINT__RETAIN) {
        rc = retain(d, &m, h->req->ms, h->req->expire, h->uid, err);
        d->hints->retained += rc == KVD_OK && m.at.blocks;
    } else if (kvd_hints_class(h->req->hint, &class)) {
        h->answer[h->at] = kvd_blocks_classify(d->pool, &h->space, h->keys, m.known, class);
        kvd_hints_count(d, class, h->answer[h->at]);
    } else {
        rc = prefetch(d, h, &m, err);
    }
    return rc;
}

static int begin_prompt(struct kvd_daemon *d, struct hint *h, const struct kvd_session *s,
                        struct kvd_error *err)
{
    const Kvd__V1__PrefixKeys *keys = h->req->requests[h->at];
    int rc = kvd_prompt_check(keys, &h->blocks, err);
    if (rc == KVD_OK)
        rc = kvd_prompt_space(d, s->ns, s->layout, keys, &h->space, err);
    h->hashed = 0;
    h->open = rc == KVD_OK;
    return rc;
}

static int work_on(struct kvd_daemon *d, struct hint *h, struct kvd_error *err)
{
    const struct kvd_session *s = kvd_session_find(d, h->req->session);
    if (!s)
        return kvd_fail(err, KVD_E_UNAUTH, "the session ended before the call was done");
    if (!h->open)
        return begin_prompt(d, h, s, err);
    if (h->hashed < h->blocks) {
        uint32_t from = h->hashed;
        h->hashed = KVD_MIN(from + HASHED, h->blocks);
        return kvd_prompt_keys(&h->space, h->req->requests[h->at], from, h->hashed, h->keys, err);
    }
    int rc = act(d, h, err);
    h->open = false;
    h->at++;
    return rc;
}

static void step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct hint *h = (struct hint *)stepped;
    struct kvd_call *call = h->call;
    struct kvd_error err = {0};
    Kvd__V1__HintPrefixReply r = KVD__V1__HINT_PREFIX_REPLY__INIT;
    if (work_on(d, h, &err)) {
        end(h);
        kvd_call_fail_error(call, &err);
        return;
    }
    if (h->at < h->req->n_requests)
        return;
    r.n_blocks = h->req->n_requests;
    r.blocks = h->answer;
    call->on_cancelled = NULL;
    kvd_call_reply(call, &r);
    end(h);
}

static void on_cancelled(struct kvd_call *call)
{
    end(call->work);
    kvd_call_fail(call, KVD_E_UNAVAILABLE, "the call was cancelled");
}

// -- the call -----------------------------------------------------------------------------------

static int check_numbers(const Kvd__V1__HintPrefixRequest *req, struct kvd_error *err)
{
    if (req->n_requests < 1 || req->n_requests > KVD_MAX_CALL_PROMPTS)
        return kvd_fail(err, KVD_E_INVALID, "%zu prompts; 1 to %d are possible", req->n_requests,
                        KVD_MAX_CALL_PROMPTS);
    return kvd_hints_check(req->hint, req->ms, req->expire, err);
}

static int prepare(struct hint *h, struct kvd_error *err)
{
    uint32_t longest = 0, blocks;
    uint64_t all = 0;
    int rc = check_numbers(h->req, err);
    for (size_t i = 0; i < h->req->n_requests && rc == KVD_OK; i++) {
        rc = kvd_prompt_check(h->req->requests[i], &blocks, err);
        if (rc)
            return kvd_fail_in(err, "prompt %zu", i);
        longest = KVD_MAX(longest, blocks);
        all += blocks;
    }
    if (rc == KVD_OK && all > KVD_MAX_CALL_BLOCKS)
        rc = kvd_fail(err, KVD_E_INVALID, "%" PRIu64 " blocks in all; at most %d are possible", all,
                      KVD_MAX_CALL_BLOCKS);
    if (rc)
        return rc;
    h->keys = calloc(longest + 1, sizeof(*h->keys));
    h->answer = calloc(h->req->n_requests, sizeof(*h->answer));
    return h->keys && h->answer ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

void kvd_on_hint_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__HintPrefixRequest *req = request;
    struct kvd_error err = {0};
    const struct kvd_session *s = kvd_call_session(call, req->session);
    if (!s)
        return;
    struct hint *h = calloc(1, sizeof(*h));
    if (!h) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    *h = (struct hint){
        .stepped = {.step = step}, .call = call, .req = req, .uid = kvd_user_uid(s->user)};
    if (prepare(h, &err)) {
        hint_free(h);
        kvd_call_fail_error(call, &err);
        return;
    }
    call->work = h;
    call->on_cancelled = on_cancelled;
    kvd_steps_begin(call->d, &h->stepped, s->ns, s->id);
}

// -- the part -----------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->hints = calloc(1, sizeof(*d->hints));
    return d->hints ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

static void stop(struct kvd_daemon *d)
{
    while (d->hints->prefetches)
        prefetch_free(d->hints->prefetches);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->hints));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_hints_retained_total", "counter",
               "Prompts that workers wanted to stay for a time.", (double)d->hints->retained);
    kvd_metric(f, "kvd_hints_demoted_blocks_total", "counter",
               "Blocks that workers said will not be used again soon.", (double)d->hints->demoted);
    kvd_metric(f, "kvd_hints_classified_blocks_total", "counter",
               "Blocks that workers said are of low, normal or high priority.",
               (double)d->hints->classified);
    kvd_metric(f, "kvd_hints_prefetched_total", "counter",
               "Prompts that were looked for in tiers before they were wanted.",
               (double)d->hints->prefetched);
}

const struct kvd_part kvd_part_hints = {
    .init = init, .stop = stop, .deinit = deinit, .metrics = metrics};
