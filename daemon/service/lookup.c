// LookupPages. Goes request by request: hash its keys, 256 at a time, in both spaces; bring back
// what the pool lacks, exact pages first, if that is wanted; then find them all and lease what is
// there. Each such step takes some hundred microseconds (steps.h).
#include "daemon/rpc/rpc.h"
#include "daemon/sched/op.h"
#include "daemon/sched/page_counts.h"
#include "daemon/service/handlers.h"
#include "daemon/service/restore.h"
#include "daemon/service/steps.h"
#include "daemon/session/leases.h"
#include "daemon/session/replay.h"

enum { HASHED = 256 };                           // keys in a step
enum { ENCODED, EXACT, SPACES };                 // a page's kind - 1
enum { FIRST_BEHIND = EXACT, NONE_BEHIND = -1 }; // which space tiers are looked at for

// A call on its way.
struct lookup {
    struct kvd_stepped stepped;
    struct kvd_call *call;
    const Kvd__V1__LookupPagesRequest *req;
    struct kvd_blocks_space spaces[2];
    uint32_t at, hashed; // request, and keys of it
    struct kvd_prefix_key keys[2][KVD_MAX_PROMPT_BLOCKS];
    uint32_t entries[2][KVD_MAX_PROMPT_BLOCKS];
    uint8_t *kinds; // of all requests, one after the other
    Kvd__V1__FoundPages *found, **refs;
    int behind; // the space that tiers are looked at for, of this request
    struct kvd_restore *restores[SPACES];
    bool waits;                          // for it, and is in no line
    uint64_t until_ms;                   // of the whole call; 0: none has begun
    uint8_t skip[KVD_MAX_PROMPT_BLOCKS]; // pages that are there
    uint32_t (*counts)[KVD_TIERS_MOST];  // what `found` points to
};

static void end_restores(struct lookup *l)
{
    for (int i = 0; i < SPACES; i++)
        kvd_restore_end(&l->restores[i]);
}

static void lookup_free(struct lookup *l)
{
    end_restores(l);
    free(l->counts);
    free(l->kinds);
    free(l->found);
    free(l->refs);
    free(l);
}

static void end(struct kvd_daemon *d, struct lookup *l)
{
    if (!l->waits)
        kvd_steps_drop(d, &l->stepped);
    lookup_free(l);
}

// Nobody will know of the leases that were taken for it.
static void fail(struct kvd_daemon *d, struct lookup *l, const struct kvd_error *err)
{
    const struct kvd_session *s = kvd_session_find(d, l->req->session);
    struct kvd_call *call = l->call;
    for (uint32_t i = 0; i < l->at && s; i++) {
        struct kvd_lease *lease = kvd_lease_find(d, s, l->found[i].lease);
        if (lease)
            kvd_lease_end(d, lease);
    }
    call->on_cancelled = NULL;
    end(d, l);
    kvd_call_fail_error(call, err);
}

static int lease(struct kvd_daemon *d, struct lookup *l, struct kvd_session *s,
                 Kvd__V1__FoundPages *out, struct kvd_error *err)
{
    uint32_t held[KVD_MAX_PROMPT_BLOCKS], n = 0;
    struct kvd_lease *made;
    for (int space = 0; space < 2; space++)
        for (uint32_t i = 0; i < out->kinds.len; i++)
            if (out->kinds.data[i] == space + 1)
                held[n++] = l->entries[space][i];
    if (!n || !l->req->lease_ms)
        return KVD_OK;
    int rc = kvd_lease_new_pages(d, s, held, n, l->req->lease_ms, &made, err);
    if (rc == KVD_OK)
        out->lease = made->id;
    return rc;
}

// -- what is behind the pool --------------------------------------------------------------------

static void on_restored(void *ctx, const struct kvd_restore_answer *answer)
{
    struct lookup *l = ctx;
    Kvd__V1__FoundPages *out = &l->found[l->at];
    for (uint32_t i = 0; i < KVD_TIERS_MOST; i++)
        l->counts[l->at][i] += answer->behind[i];
    out->restored += answer->restored;
    l->behind--;
    l->waits = false;
    kvd_steps_add(l->call->d, &l->stepped);
}

// Which of a request's pages are there, in any space.
static void look_at_pool(struct kvd_daemon *d, struct lookup *l, bool use)
{
    struct kvd_prefix_key *const keys[SPACES] = {l->keys[ENCODED], l->keys[EXACT]};
    uint32_t *const entries[SPACES] = {l->entries[ENCODED], l->entries[EXACT]};
    const ProtobufCBinaryData *kinds = &l->found[l->at].kinds;
    kvd_page_find(d, l->spaces, keys, use, (uint32_t)kinds->len, entries, kinds->data);
}

// Begins to look for pages of a space that are in none, if that is wanted and was not done yet.
// True: the lookup goes on when on_restored is called.
static bool look_behind(struct kvd_daemon *d, struct lookup *l)
{
    Kvd__V1__FoundPages *out = &l->found[l->at];
    const uint32_t n = (uint32_t)out->kinds.len;
    uint32_t lacking = 0;
    if (l->behind == NONE_BEHIND || !(l->req->tiers || l->req->restore_ms) || !kvd_tiers_count(d))
        return false;
    if (!l->until_ms)
        l->until_ms = kvd_now_ms(d) + l->req->restore_ms;
    // What is there counts as used before there is room made for others.
    look_at_pool(d, l, !l->req->quiet && l->behind == FIRST_BEHIND);
    for (uint32_t i = 0; i < n; i++) {
        l->skip[i] = out->kinds.data[i] != KVD_PAGE_MISSING;
        lacking += !l->skip[i];
    }
    out->n_behind = kvd_tiers_count(d);
    out->behind = l->counts[l->at];
    bool late = l->req->restore_ms && kvd_now_ms(d) >= l->until_ms;
    bool same = l->behind == ENCODED && l->spaces[ENCODED].layout == l->spaces[EXACT].layout;
    if (!lacking || late || same)
        return false;
    const struct kvd_restore_ask ask = {.space = l->spaces[l->behind],
                                        .keys = l->keys[l->behind],
                                        .n = n,
                                        .pages = true,
                                        .skip = l->skip,
                                        .ms = l->req->restore_ms ? l->until_ms - kvd_now_ms(d) : 0};
    l->restores[l->behind] = kvd_restore_begin(d, &ask, on_restored, l, NULL);
    if (!l->restores[l->behind])
        return false;
    kvd_steps_drop(d, &l->stepped);
    l->waits = true;
    return true;
}

// All keys of a request are hashed.
static int find(struct kvd_daemon *d, struct lookup *l, struct kvd_session *s,
                struct kvd_error *err)
{
    Kvd__V1__FoundPages *out = &l->found[l->at];
    struct kvd_page_count *count = kvd_page_count_of(d, s->ns);
    uint32_t n = (uint32_t)out->kinds.len, there = 0;
    look_at_pool(d, l, !l->req->quiet && !out->n_behind);
    while (out->pages < n && out->kinds.data[out->pages])
        out->pages++;
    for (uint32_t i = 0; i < n; i++)
        there += out->kinds.data[i] != KVD_PAGE_MISSING;
    if (!l->req->quiet) {
        count->looked_up += n;
        count->found += there;
    }
    count->restored += out->restored;
    return lease(d, l, s, out, err);
}

static int hash(struct lookup *l, struct kvd_error *err)
{
    const uint8_t *keys = l->req->requests[l->at].data + (size_t)l->hashed * l->req->key_bytes;
    uint32_t n = KVD_MIN((uint32_t)HASHED, (uint32_t)l->found[l->at].kinds.len - l->hashed);
    int rc = KVD_OK;
    for (int space = 0; space < 2 && rc == KVD_OK; space++)
        rc = kvd_prefix_keys_of_pages(l->spaces[space].domain, keys, l->req->key_bytes, n,
                                      l->keys[space] + l->hashed, err);
    l->hashed += n;
    return rc;
}

static void step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct lookup *l = (struct lookup *)stepped;
    struct kvd_session *s = kvd_session_find(d, l->req->session);
    struct kvd_error err = {0};
    if (!s || s->ns != l->spaces[0].ns) {
        kvd_fail(&err, KVD_E_UNAUTH, "the session ended before the call was done");
    } else if (l->hashed < l->found[l->at].kinds.len) {
        hash(l, &err);
    } else if (look_behind(d, l)) {
        return;
    } else if (find(d, l, s, &err) == KVD_OK) {
        end_restores(l); // what they have brought back is leased, or may go
        l->behind = FIRST_BEHIND;
        l->hashed = 0;
        l->at++;
    }
    if (err.code) {
        fail(d, l, &err);
        return;
    }
    if (l->at < l->req->n_requests)
        return;
    Kvd__V1__LookupPagesReply r = KVD__V1__LOOKUP_PAGES_REPLY__INIT;
    struct kvd_call *call = l->call;
    r.n_found = l->req->n_requests;
    r.found = l->refs;
    char *tiers[KVD_TIERS_MOST];
    for (uint32_t i = 0; i < kvd_tiers_count(d); i++)
        tiers[i] = (char *)(uintptr_t)kvd_tier_name(kvd_tiers_get_tier(d, i));
    r.n_tiers = kvd_tiers_count(d);
    r.tiers = tiers;
    call->on_cancelled = NULL;
    kvd_call_reply(call, &r);
    end(d, l);
}

static void on_cancelled(struct kvd_call *call)
{
    const struct kvd_error err = {.code = KVD_E_UNAVAILABLE, .text = "the call was cancelled"};
    fail(call->d, call->work, &err);
}

// How many keys each request has, and where its answer goes.
static int check(struct lookup *l, struct kvd_error *err)
{
    size_t n = l->req->n_requests, all = 0;
    if (n < 1 || n > KVD_MAX_CALL_PROMPTS)
        return kvd_fail(err, KVD_E_INVALID, "%zu requests; 1 to %d are possible", n,
                        KVD_MAX_CALL_PROMPTS);
    if (l->req->lease_ms > KVD_MAX_LEASE_MS)
        return kvd_fail(err, KVD_E_INVALID, "lease_ms is %u; at most %d are possible",
                        l->req->lease_ms, KVD_MAX_LEASE_MS);
    if (l->req->restore_ms > KVD_MAX_LEASE_MS)
        return kvd_fail(err, KVD_E_INVALID, "restore_ms is %u; at most %d are possible",
                        l->req->restore_ms, KVD_MAX_LEASE_MS);
    l->found = calloc(n, sizeof(*l->found));
    l->refs = calloc(n, sizeof(*l->refs));
    l->counts = calloc(n, sizeof(*l->counts));
    if (!l->found || !l->refs || !l->counts)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < n; i++) {
        uint32_t keys;
        if (kvd_page_count(l->req->key_bytes, &l->req->requests[i], KVD_MAX_PROMPT_BLOCKS, &keys,
                           err))
            return kvd_fail_in(err, "requests[%zu]", i);
        kvd__v1__found_pages__init(&l->found[i]);
        l->found[i].kinds.len = keys;
        l->refs[i] = &l->found[i];
        all += keys;
    }
    if (all > KVD_MAX_CALL_BLOCKS)
        return kvd_fail(err, KVD_E_INVALID, "%zu pages in all; at most %d are possible", all,
                        KVD_MAX_CALL_BLOCKS);
    uint8_t *at = l->kinds = malloc(all + 1);
    if (!at)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (size_t i = 0; i < n; i++) {
        l->found[i].kinds.data = at;
        at += l->found[i].kinds.len;
    }
    return KVD_OK;
}

void kvd_on_lookup_pages(struct kvd_call *call, const void *request)
{
    const Kvd__V1__LookupPagesRequest *req = request;
    const struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s)
        return;
    struct lookup *l = calloc(1, sizeof(*l));
    if (!l) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    l->stepped.step = step;
    l->call = call;
    l->req = req;
    l->behind = FIRST_BEHIND;
    if (kvd_page_spaces(call->d, s, &req->space, l->spaces, &err) || check(l, &err)) {
        lookup_free(l);
        kvd_call_fail_error(call, &err);
        return;
    }
    call->work = l;
    call->on_cancelled = on_cancelled;
    kvd_steps_begin(call->d, &l->stepped, s->ns, s->id);
}
