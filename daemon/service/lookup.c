// LookupPages. Goes request by request: hash its keys, 256 at a time, in both spaces; bring back
// what the pool lacks, exact pages first, if that is wanted; then find them all and lease what is
// there. Each such step takes some hundred microseconds (steps.h).
//
// What is brought back is so in parts, of which the first are small and each goes its own way:
// pages of the first part are copied while keys of the next ones are hashed and looked for, which
// takes a millisecond for 512 pages.
#include "daemon/rpc/rpc.h"
#include "daemon/sched/op.h"
#include "daemon/sched/page_counts.h"
#include "daemon/service/handlers.h"
#include "daemon/service/restore.h"
#include "daemon/service/steps.h"
#include "daemon/service/waits.h"
#include "daemon/session/leases.h"
#include "daemon/session/replay.h"

enum { HASHED = 256 };                           // keys in a step
enum { ENCODED, EXACT, SPACES };                 // a page's kind - 1
enum { FIRST_BEHIND = EXACT, NONE_BEHIND = -1 }; // which space tiers are looked at for
enum { FIRST_PART = 64 };                        // pages; each is twice as large as the one before

struct lookup;

// Pages of a request that are looked for in tiers.
struct part {
    struct lookup *of;
    uint32_t begin, n;
    int behind; // the space that tiers are looked at for
    bool done;  // nothing is under way, nor will be
    struct kvd_restore *restores[SPACES];
};

// A call on its way.
struct lookup {
    struct kvd_stepped stepped; // first
    struct kvd_call *call;
    const Kvd__V1__LookupPagesRequest *req;
    struct kvd_blocks_space spaces[2];
    uint32_t at, hashed; // request, and keys of it
    struct kvd_prefix_key keys[2][KVD_MAX_PROMPT_BLOCKS];
    uint32_t entries[2][KVD_MAX_PROMPT_BLOCKS];
    uint8_t *kinds; // of all requests, one after the other
    Kvd__V1__FoundPages *found, **refs;
    struct part parts[KVD_RESTORE_PARTS]; // of this request
    uint32_t n_parts, running;            // running: of those
    bool waits;                           // for them, and is in no line
    struct kvd_wait wait;                 // its memory, as long as there are parts
    uint64_t until_ms;                    // of the whole call; 0: none has begun
    uint8_t skip[KVD_MAX_PROMPT_BLOCKS];  // pages that are there
    uint32_t (*counts)[KVD_TIERS_MOST];   // what `found` points to
};

static void end_restores(struct lookup *l)
{
    for (uint32_t i = 0; i < l->n_parts; i++)
        for (int space = 0; space < SPACES; space++)
            kvd_restore_end(&l->parts[i].restores[space]);
    l->n_parts = l->running = 0;
    kvd_wait_end(l->call->d, &l->wait);
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
    uint32_t held[KVD_MAX_PROMPT_BLOCKS], n = 0, encoded = 0;
    struct kvd_lease *made;
    for (int space = 0; space < 2; space++) {
        encoded = space == EXACT ? n : 0;
        for (uint32_t i = 0; i < out->kinds.len; i++)
            if (out->kinds.data[i] == space + 1)
                held[n++] = l->entries[space][i];
    }
    if (!n || !l->req->lease_ms)
        return KVD_OK;
    // Exact pages may be superseded one by one. Where both spaces are one, which is that of exact
    // pages of the namespace's other sessions, all may be: by what these encode.
    bool same = l->spaces[ENCODED].layout == l->spaces[EXACT].layout;
    int rc =
        kvd_lease_new_pages(d, s, held, n, same ? n : n - encoded, l->req->lease_ms, &made, err);
    if (rc == KVD_OK)
        out->lease = made->id;
    return rc;
}

// -- what is behind the pool --------------------------------------------------------------------

// Which of a request's pages are there, in any space.
static void look_at_pool(struct kvd_daemon *d, struct lookup *l, uint32_t begin, uint32_t n,
                         bool use)
{
    struct kvd_prefix_key *const keys[SPACES] = {l->keys[ENCODED] + begin, l->keys[EXACT] + begin};
    uint32_t *const entries[SPACES] = {l->entries[ENCODED] + begin, l->entries[EXACT] + begin};
    kvd_page_find(d, l->spaces, keys, use, n, entries, l->found[l->at].kinds.data + begin);
}

static uint32_t pages_of(const struct lookup *l)
{
    return (uint32_t)l->found[l->at].kinds.len;
}

static bool looks_behind(const struct lookup *l)
{
    return (l->req->tiers || l->req->restore_ms) && kvd_tiers_count(l->call->d);
}

// Where the part ends that begins there, or the next step of hashing.
static uint32_t end_of_part(const struct lookup *l, uint32_t number, uint32_t begin)
{
    return number + 1 == KVD_RESTORE_PARTS
               ? pages_of(l)
               : KVD_MIN(begin + ((uint32_t)FIRST_PART << number), pages_of(l));
}

static uint32_t parts_of(const struct lookup *l)
{
    uint32_t n = 0, at = 0;
    while (at < pages_of(l))
        at = end_of_part(l, n++, at);
    return KVD_MAX(n, 1u);
}

static void on_restored(void *ctx, const struct kvd_restore_answer *answer);

// Looks for a part's pages in a space. False: there is nothing to look for, or no way to.
static bool look_behind(struct kvd_daemon *d, struct part *p)
{
    struct lookup *l = p->of;
    const uint8_t *kinds = l->found[l->at].kinds.data + p->begin;
    uint32_t lacking = 0;
    // What is there counts as used before there is room made for others.
    look_at_pool(d, l, p->begin, p->n, !l->req->quiet && p->behind == FIRST_BEHIND);
    for (uint32_t i = 0; i < p->n; i++) {
        l->skip[p->begin + i] = kinds[i] != KVD_PAGE_MISSING;
        lacking += kinds[i] == KVD_PAGE_MISSING;
    }
    bool late = l->req->restore_ms && kvd_now_ms(d) >= l->until_ms;
    bool same = p->behind == ENCODED && l->spaces[ENCODED].layout == l->spaces[EXACT].layout;
    if (!lacking || late || same)
        return false;
    // Where there is no memory for who waits, what the pool has is the answer.
    if (!kvd_wait_begin(d, &l->wait, l->spaces[0].ns, l->stepped.session,
                        sizeof(*l) + l->call->request_bytes))
        return false;
    const struct kvd_prefix_key *keys = l->keys[p->behind] + p->begin;
    const struct kvd_restore_ask ask = {.space = l->spaces[p->behind],
                                        .keys = keys,
                                        .n = p->n,
                                        .pages = true,
                                        .skip = l->skip + p->begin,
                                        .after = p->begin ? keys - 1 : NULL,
                                        .parts = parts_of(l),
                                        .holds = p > l->parts && !p[-1].done,
                                        .ms = l->req->restore_ms ? l->until_ms - kvd_now_ms(d) : 0};
    p->restores[p->behind] = kvd_restore_begin(d, &ask, on_restored, p, NULL);
    return p->restores[p->behind];
}

// Its pages are there, or will not be: the next part's, of which the first is put behind its last,
// may follow.
static void part_done(struct part *p)
{
    const struct lookup *l = p->of;
    struct part *next = p + 1;
    p->done = true;
    if (next < l->parts + l->n_parts && !next->done)
        kvd_restore_go(next->restores[next->behind]);
}

static void on_restored(void *ctx, const struct kvd_restore_answer *answer)
{
    struct part *p = ctx;
    struct lookup *l = p->of;
    for (uint32_t i = 0; i < KVD_TIERS_MOST; i++)
        l->counts[l->at][i] += answer->behind[i];
    l->found[l->at].restored += answer->restored;
    if (--p->behind != NONE_BEHIND && look_behind(l->call->d, p))
        return;
    l->running--;
    part_done(p);
    if (l->running || !l->waits)
        return;
    l->waits = false;
    kvd_steps_add(l->call->d, &l->stepped);
}

// The keys of the next part are hashed.
static void begin_part(struct kvd_daemon *d, struct lookup *l, uint32_t begin)
{
    Kvd__V1__FoundPages *out = &l->found[l->at];
    struct part *p = &l->parts[l->n_parts++];
    *p = (struct part){.of = l, .begin = begin, .n = l->hashed - begin, .behind = FIRST_BEHIND};
    if (!l->until_ms)
        l->until_ms = kvd_now_ms(d) + l->req->restore_ms;
    out->n_behind = kvd_tiers_count(d);
    out->behind = l->counts[l->at];
    p->done = !look_behind(d, p);
    l->running += !p->done;
}

// All keys of a request are hashed.
static int find(struct kvd_daemon *d, struct lookup *l, struct kvd_session *s,
                struct kvd_error *err)
{
    Kvd__V1__FoundPages *out = &l->found[l->at];
    struct kvd_page_count *count = kvd_page_count_of(d, s->ns);
    uint32_t n = (uint32_t)out->kinds.len, there = 0;
    look_at_pool(d, l, 0, n, !l->req->quiet && !out->n_behind);
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

// Hashes some keys, and begins to look for them in tiers when they make a part.
static int hash(struct kvd_daemon *d, struct lookup *l, struct kvd_error *err)
{
    const uint8_t *keys = l->req->requests[l->at].data + (size_t)l->hashed * l->req->key_bytes;
    const struct part *last = l->n_parts ? &l->parts[l->n_parts - 1] : NULL;
    uint32_t begin = last ? last->begin + last->n : 0, end = pages_of(l);
    int rc = KVD_OK;
    if (looks_behind(l))
        end = end_of_part(l, l->n_parts, begin);
    uint32_t n = KVD_MIN((uint32_t)HASHED, end - l->hashed);
    for (int space = 0; space < SPACES && rc == KVD_OK; space++)
        rc = kvd_prefix_keys_of_pages(l->spaces[space].domain, keys, l->req->key_bytes, n,
                                      l->keys[space] + l->hashed, err);
    l->hashed += n;
    if (rc == KVD_OK && looks_behind(l) && l->hashed == end)
        begin_part(d, l, begin);
    return rc;
}

static void step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct lookup *l = (struct lookup *)stepped;
    struct kvd_session *s = kvd_session_find(d, l->req->session);
    struct kvd_error err = {0};
    if (!s || s->ns != l->spaces[0].ns) {
        kvd_fail(&err, KVD_E_UNAUTH, "the session ended before the call was done");
    } else if (l->hashed < pages_of(l)) {
        hash(d, l, &err);
    } else if (l->running) {
        kvd_steps_drop(d, stepped);
        l->waits = true;
        return;
    } else if (find(d, l, s, &err) == KVD_OK) {
        end_restores(l); // what they have brought back is leased, or may go
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
    if (kvd_page_spaces(call->d, s, &req->space, l->spaces, &err) || check(l, &err)) {
        lookup_free(l);
        kvd_call_fail_error(call, &err);
        return;
    }
    call->work = l;
    call->on_cancelled = on_cancelled;
    kvd_steps_begin(call->d, &l->stepped, s->ns, s->id);
}
