// HintPages. Goes request by request: hash its keys, 256 at a time, in both spaces, then do what
// the hint says. Each such step takes some hundred microseconds (steps.h). What is prefetched comes
// after the answer.
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/sched/op.h"
#include "daemon/service/handlers.h"
#include "daemon/service/hints.h"
#include "daemon/service/steps.h"
#include "daemon/session/leases.h"
#include "daemon/session/replay.h"
#include "daemon/tier/tiers.h"

enum { HASHED = 256 };           // keys in a step
enum { ENCODED, EXACT, SPACES }; // a page's kind - 1

// A call on its way.
struct hint {
    struct kvd_stepped stepped; // first
    struct kvd_call *call;
    const Kvd__V1__HintPagesRequest *req;
    struct kvd_blocks_space spaces[SPACES];
    int64_t uid;
    uint32_t at, hashed; // request, and keys of it
    uint32_t *pages;     // of each request: its keys
    uint32_t *answer;
    struct kvd_prefix_key keys[SPACES][KVD_MAX_PROMPT_BLOCKS];
    uint32_t entries[SPACES][KVD_MAX_PROMPT_BLOCKS];
    uint8_t there[KVD_MAX_PROMPT_BLOCKS]; // its kind; 0: it is not
};

static void hint_free(struct hint *h)
{
    free(h->pages);
    free(h->answer);
    free(h);
}

static void end(struct hint *h)
{
    h->call->on_cancelled = NULL;
    kvd_steps_drop(h->call->d, &h->stepped);
    hint_free(h);
}

// -- a step -------------------------------------------------------------------------------------

static int hash(struct hint *h, uint32_t n, struct kvd_error *err)
{
    const uint8_t *keys = h->req->requests[h->at].data + (size_t)h->hashed * h->req->key_bytes;
    int rc = KVD_OK;
    for (int space = 0; space < SPACES && rc == KVD_OK; space++)
        rc = kvd_prefix_keys_of_pages(h->spaces[space].domain, keys, h->req->key_bytes, n,
                                      h->keys[space] + h->hashed, err);
    h->hashed += n;
    return rc;
}

// Encoded in the layout of exact ones it is one page.
static bool is_there(const struct hint *h, int space, uint32_t i)
{
    bool same = h->spaces[ENCODED].layout == h->spaces[EXACT].layout;
    return h->entries[space][i] != KVD_PREFIX_NONE && (space == ENCODED || !same);
}

// What is there of the request, told by its last page that is. What is to expire is so both ways.
static int retain(struct kvd_daemon *d, const struct hint *h, uint32_t n, struct kvd_error *err)
{
    uint32_t held[SPACES * KVD_MAX_PROMPT_BLOCKS], n_held = 0, encoded = 0;
    bool same = h->spaces[ENCODED].layout == h->spaces[EXACT].layout;
    const struct kvd_prefix_key *last = NULL;
    for (int space = 0; space < SPACES; space++) {
        encoded = space == EXACT ? n_held : 0;
        for (uint32_t i = 0; i < n; i++)
            if (h->req->expire ? is_there(h, space, i) : h->there[i] == space + 1) {
                held[n_held++] = h->entries[space][i];
                last = &h->keys[space][i];
            }
    }
    // Exact pages may be superseded one by one, and where both spaces are one, all are such. What
    // is to expire is known by its entries, so none of these may go before the lease.
    uint32_t single = same ? n_held : n_held - encoded;
    return last ? kvd_lease_put_pages(d, KVD_LEASE_RETAINED, h->spaces[0].ns, held, n_held, single,
                                      last, h->req->ms, h->req->expire, h->uid, err)
                : KVD_OK;
}

// What is not there either way, both ways: which of them a tier has is not known.
static int prefetch(struct kvd_daemon *d, const struct hint *h, uint32_t n, uint32_t there,
                    struct kvd_error *err)
{
    int rc = h->req->ms ? retain(d, h, n, err) : KVD_OK;
    bool same = h->spaces[ENCODED].layout == h->spaces[EXACT].layout;
    for (int space = EXACT; space >= (same ? EXACT : ENCODED) && rc == KVD_OK; space--) {
        const struct kvd_hints_ask ask = {.space = h->spaces[space],
                                          .keys = h->keys[space],
                                          .n = n,
                                          .skip = h->there,
                                          .retain_ms = h->req->ms,
                                          .uid = h->uid};
        if (there < n && kvd_tiers_count(d))
            rc = kvd_hints_prefetch(d, &ask, err);
    }
    return rc;
}

static int act(struct kvd_daemon *d, struct hint *h, uint32_t n, struct kvd_error *err)
{
    struct kvd_prefix_key *const keys[SPACES] = {h->keys[ENCODED], h->keys[EXACT]};
    uint32_t *const entries[SPACES] = {h->entries[ENCODED], h->entries[EXACT]}, there = 0;
    enum kvd_prefix_class class;
    kvd_page_find(d, h->spaces, keys, false, n, entries, h->there);
    for (uint32_t i = 0; i < n; i++)
        there += h->there[i] != 0;
    h->answer[h->at] = there;
    if (h->req->hint == KVD__V1__HINT_PREFIX_REQUEST__HINT__RETAIN) {
        d->hints->retained += there > 0;
        return retain(d, h, n, err);
    }
    if (!kvd_hints_class(h->req->hint, &class))
        return prefetch(d, h, n, there, err);
    h->answer[h->at] = 0;
    for (int space = 0; space < SPACES; space++)
        if (space == ENCODED || h->spaces[ENCODED].layout != h->spaces[EXACT].layout)
            h->answer[h->at] +=
                kvd_blocks_classify_pages(d->pool, h->spaces[0].ns, h->entries[space], n, class);
    kvd_hints_count(d, class, h->answer[h->at]);
    return KVD_OK;
}

static int work_on(struct kvd_daemon *d, struct hint *h, struct kvd_error *err)
{
    const struct kvd_session *s = kvd_session_find(d, h->req->session);
    uint32_t n = h->pages[h->at];
    if (!s || s->ns != h->spaces[0].ns)
        return kvd_fail(err, KVD_E_UNAUTH, "the session ended before the call was done");
    if (h->hashed < n)
        return hash(h, KVD_MIN((uint32_t)HASHED, n - h->hashed), err);
    int rc = act(d, h, n, err);
    h->hashed = 0;
    h->at++;
    return rc;
}

static void step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct hint *h = (struct hint *)stepped;
    struct kvd_call *call = h->call;
    struct kvd_error err = {0};
    Kvd__V1__HintPagesReply r = KVD__V1__HINT_PAGES_REPLY__INIT;
    if (work_on(d, h, &err)) {
        end(h);
        kvd_call_fail_error(call, &err);
        return;
    }
    if (h->at < h->req->n_requests)
        return;
    r.n_pages = h->req->n_requests;
    r.pages = h->answer;
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

static int prepare(struct hint *h, const struct kvd_session *s, struct kvd_error *err)
{
    const Kvd__V1__HintPagesRequest *req = h->req;
    uint64_t all = 0;
    if (req->n_requests < 1 || req->n_requests > KVD_MAX_CALL_PROMPTS)
        return kvd_fail(err, KVD_E_INVALID, "%zu requests; 1 to %d are possible", req->n_requests,
                        KVD_MAX_CALL_PROMPTS);
    int rc = kvd_hints_check(req->hint, req->ms, req->expire, err);
    if (rc == KVD_OK)
        rc = kvd_page_spaces(h->call->d, s, &req->space, h->spaces, err);
    if (rc)
        return rc;
    h->pages = calloc(req->n_requests, sizeof(*h->pages));
    h->answer = calloc(req->n_requests, sizeof(*h->answer));
    if (!h->pages || !h->answer)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < req->n_requests; i++) {
        if (kvd_page_count(req->key_bytes, &req->requests[i], KVD_MAX_PROMPT_BLOCKS, &h->pages[i],
                           err))
            return kvd_fail_in(err, "requests[%zu]", i);
        all += h->pages[i];
    }
    if (all > KVD_MAX_CALL_BLOCKS)
        return kvd_fail(err, KVD_E_INVALID, "%" PRIu64 " pages in all; at most %d are possible",
                        all, KVD_MAX_CALL_BLOCKS);
    return KVD_OK;
}

void kvd_on_hint_pages(struct kvd_call *call, const void *request)
{
    const Kvd__V1__HintPagesRequest *req = request;
    const struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s)
        return;
    struct hint *h = calloc(1, sizeof(*h));
    if (!h) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    h->stepped.step = step;
    h->call = call;
    h->req = req;
    h->uid = kvd_user_uid(s->user);
    if (prepare(h, s, &err)) {
        hint_free(h);
        kvd_call_fail_error(call, &err);
        return;
    }
    call->work = h;
    call->on_cancelled = on_cancelled;
    kvd_steps_begin(call->d, &h->stepped, s->ns, s->id);
}
