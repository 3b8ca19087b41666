// AdoptPrefix. Each item is a step (steps.h), as it refers to thousands of pages. Nobody holds what
// is made until all of it is there: then the session does, with the reply, as one; a kvd that ends
// before that leaves nothing.
#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/service/prompts.h"
#include "daemon/service/steps.h"
#include "daemon/session/leases.h"
#include "daemon/session/replay.h"

// A call on its way.
struct adoption {
    struct kvd_stepped stepped; // first
    struct kvd_call *call;
    const Kvd__V1__AdoptPrefixRequest *req;
    uint32_t n; // made
    uint64_t ids[KVD_MAX_CALL_ADOPTIONS], lengths[KVD_MAX_CALL_ADOPTIONS];
    struct kvd_error err; // why those that are made are given back
    bool answered;        // another call under its request id has been: they are given back too
};

static int adopt_next(struct kvd_daemon *d, struct adoption *a, const struct kvd_session *s)
{
    const Kvd__V1__AdoptItem *item = a->req->items[a->n];
    const struct kvd_lease *l = kvd_lease_find(d, s, item->lease);
    if (!l)
        return kvd_fail(&a->err, KVD_E_NOT_FOUND,
                        "this session has no lease %" PRIu64 "; its time may be over", item->lease);
    uint32_t blocks = item->blocks ? item->blocks : l->at.blocks;
    int rc = kvd_blocks_adopt(d->pool, &l->at, blocks, &a->ids[a->n], &a->err);
    if (rc == KVD_OK)
        a->lengths[a->n++] = (uint64_t)blocks * KVD_PAGE_TOKENS;
    return rc;
}

// The session's from now on; on failure none is.
static int hold_all(struct adoption *a, struct kvd_session *s)
{
    bool first;
    for (uint32_t i = 0; i < a->n; i++) {
        if (kvd_session_add_held(s, a->ids[i], &first, &a->err) == KVD_OK)
            continue;
        while (i-- > 0)
            kvd_session_drop_held(s, a->ids[i]);
        return a->err.code;
    }
    return KVD_OK;
}

static void answer(struct kvd_daemon *d, struct adoption *a, struct kvd_session *s)
{
    Kvd__V1__AdoptPrefixReply r = KVD__V1__ADOPT_PREFIX_REPLY__INIT;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < a->n; i++) {
        struct kvd_lease *l = kvd_lease_find(d, s, a->req->items[i]->lease);
        if (l && !a->req->items[i]->keep)
            kvd_lease_end(d, l);
        tokens += a->lengths[i];
    }
    kvd_prompts_adopted(d, s->ns, tokens);
    r.n_sequences = r.n_lengths = a->n;
    r.sequences = a->ids;
    r.lengths = a->lengths;
    kvd_call_reply_remember(a->call, s, a->req->request_id, &r);
}

static void answer_failure(struct adoption *a, struct kvd_session *s)
{
    if (a->answered && s && kvd_call_replayed(a->call, s, a->req->request_id))
        return;
    if (!a->err.code)
        kvd_fail(&a->err, KVD_E_UNAVAILABLE, "the reply to this call is known no more");
    kvd_call_fail_error(a->call, &a->err);
}

static void step(struct kvd_daemon *d, struct kvd_stepped *stepped)
{
    struct adoption *a = (struct adoption *)stepped;
    struct kvd_session *s = kvd_session_find(d, a->req->session);
    if (!s && !a->err.code)
        kvd_fail(&a->err, KVD_E_UNAUTH, "the session ended before the call was done");
    bool good = !a->err.code && !a->answered;
    if (good && a->n < a->req->n_items) {
        if (adopt_next(d, a, s) == KVD_OK && a->n < a->req->n_items)
            return;
        good = !a->err.code;
    }
    if (good)
        a->answered = kvd_call_answered(s, a->req->request_id);
    good = good && !a->answered && hold_all(a, s) == KVD_OK;
    if (!good && a->n) {
        kvd_pool_seq_release(d->pool, a->ids[--a->n]);
        if (a->n)
            return;
    }
    a->call->on_cancelled = NULL;
    if (good)
        answer(d, a, s);
    else
        answer_failure(a, s);
    kvd_steps_drop(d, &a->stepped);
    free(a);
}

// What is made is given back, step by step.
static void on_cancelled(struct kvd_call *call)
{
    struct adoption *a = call->work;
    if (!a->err.code)
        kvd_fail(&a->err, KVD_E_UNAVAILABLE, "the call was cancelled");
}

void kvd_on_adopt_prefix(struct kvd_call *call, const void *request)
{
    const Kvd__V1__AdoptPrefixRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    if (!s || kvd_call_replayed(call, s, req->request_id))
        return;
    if (req->n_items < 1) {
        kvd_call_fail(call, KVD_E_INVALID, "no items; 1 to %d are possible",
                      KVD_MAX_CALL_ADOPTIONS);
        return;
    }
    struct adoption *a = calloc(1, sizeof(*a));
    if (!a) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    a->stepped.step = step;
    a->call = call;
    a->req = req;
    call->work = a;
    call->on_cancelled = on_cancelled;
    kvd_steps_begin(call->d, &a->stepped, s->ns, s->id);
}
