// Create, fork, truncate, publish, attach, free, describe.
#include "daemon/rpc/rpc.h"
#include "daemon/service/events.h"
#include "daemon/service/handlers.h"
#include "daemon/session/ledger.h"
#include "daemon/core/piecework.h"
#include "daemon/session/replay.h"
#include "kvd.pb-c.h"

// What the session holds, or an error that does not tell unknown, foreign and freed apart.
static int held(const struct kvd_session *s, uint64_t seq, struct kvd_error *err)
{
    if (kvd_session_holds(s, seq))
        return KVD_OK;
    return kvd_fail(err, KVD_E_NOT_FOUND, "this session holds no sequence %" PRIu64, seq);
}

// A sequence that a compute call is using cannot change under it.
static int idle(const struct kvd_daemon *d, uint64_t seq, bool for_write, struct kvd_error *err)
{
    const struct kvd_seq_use *use = &d->use[(uint32_t)seq];
    if (!use->writer && (!for_write || !use->readers))
        return KVD_OK;
    return kvd_fail(err, KVD_E_PRECONDITION,
                    "sequence %" PRIu64 " is being used by a call in flight; wait for its reply",
                    seq);
}

static int adopt(struct kvd_daemon *d, struct kvd_session *s, uint64_t *ids, size_t n,
                 struct kvd_error *err)
{
    for (size_t i = 0; i < n; i++) {
        bool first;
        int rc = kvd_session_add_held(s, ids[i], &first, err);
        if (rc == KVD_OK)
            continue;
        for (size_t j = 0; j < n; j++) {
            if (j < i)
                kvd_session_drop_held(s, ids[j]);
            kvd_pool_seq_release(d->pool, ids[j]);
        }
        return rc;
    }
    return KVD_OK;
}

// Makes `count` sequences: new ones, or forks of `parent`. All or none.
static void make_many(struct kvd_call *call, struct kvd_session *s, uint64_t request_id,
                      uint32_t count, uint64_t parent)
{
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    if (count < 1 || count > KVD_MAX_CALL_SEQUENCES) {
        kvd_call_fail(call, KVD_E_INVALID, "count is %u; 1 to %d are possible", count,
                      KVD_MAX_CALL_SEQUENCES);
        return;
    }
    uint64_t *ids KVD_FREE = calloc(count, sizeof(*ids));
    int rc = ids ? KVD_OK : kvd_fail(&err, KVD_E_INTERNAL, "out of memory");
    uint32_t n = 0;
    for (; n < count && rc == KVD_OK; n++)
        rc = parent ? kvd_pool_seq_fork(d->pool, parent, &ids[n], &err)
                    : kvd_pool_seq_new(d->pool, s->ns, s->layout, &ids[n], &err);
    if (rc == KVD_OK) {
        rc = adopt(d, s, ids, n, &err);
    } else if (n) {
        for (uint32_t i = 0; i + 1 < n; i++) // the last one failed
            kvd_pool_seq_release(d->pool, ids[i]);
    }
    if (rc) {
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__SequencesReply r = KVD__V1__SEQUENCES_REPLY__INIT;
    r.n_sequences = count;
    r.sequences = ids;
    kvd_call_reply_remember(call, s, request_id, &r);
}

void kvd_on_create_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__CreateSequencesRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    if (s && !kvd_call_replayed(call, s, req->request_id))
        make_many(call, s, req->request_id, req->count, 0);
}

void kvd_on_fork_sequence(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ForkSequenceRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s || kvd_call_replayed(call, s, req->request_id))
        return;
    if (held(s, req->sequence, &err) || idle(call->d, req->sequence, false, &err))
        kvd_call_fail_error(call, &err);
    else
        make_many(call, s, req->request_id, req->count ? req->count : 1, req->sequence);
}

void kvd_on_truncate_sequence(struct kvd_call *call, const void *request)
{
    const Kvd__V1__TruncateSequenceRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s)
        return;
    if (held(s, req->sequence, &err) || idle(call->d, req->sequence, true, &err) ||
        kvd_pool_truncate(call->d->pool, req->sequence, req->length, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__TruncateSequenceReply r = KVD__V1__TRUNCATE_SEQUENCE_REPLY__INIT;
    r.length = req->length;
    kvd_call_reply(call, &r);
}

void kvd_on_publish_sequence(struct kvd_call *call, const void *request)
{
    const Kvd__V1__PublishSequenceRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s)
        return;
    if (held(s, req->sequence, &err) ||
        kvd_pool_publish(call->d->pool, req->sequence, req->name, req->replace, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    Kvd__V1__PublishSequenceReply r = KVD__V1__PUBLISH_SEQUENCE_REPLY__INIT;
    kvd_event_send(call->d, s->ns, KVD__V1__EVENT__KIND__PUBLISHED, req->sequence, req->name);
    kvd_call_reply(call, &r);
}

// A sequence as it is described, with where its tokens are in each plane.
struct described {
    Kvd__V1__SequenceInfo info;
    Kvd__V1__PlaneTokens planes[KVD_MAX_PLANES], *refs[KVD_MAX_PLANES];
};

static void fill_info(struct kvd_daemon *d, const struct kvd_session *s,
                      const struct kvd_pool_seq_info *in, struct described *row)
{
    const struct kvd_layout *l = kvd_pool_layout_get(d->pool, in->layout);
    Kvd__V1__SequenceInfo *out = &row->info;
    kvd__v1__sequence_info__init(out);
    out->sequence = in->id;
    out->length = in->length;
    out->pending_length = in->pending_length;
    out->pending_layers = in->pending_layers;
    out->planes = row->refs;
    out->n_planes = in->n_planes;
    for (uint32_t p = 0; p < in->n_planes; p++) {
        struct kvd_pool_tokens t = kvd_pool_tokens(&l->planes[p], in->length, &in->reach[p]);
        row->refs[p] = &row->planes[p];
        kvd__v1__plane_tokens__init(row->refs[p]);
        row->planes[p].sink = t.sink;
        row->planes[p].freed = t.freed;
        row->planes[p].history = t.history;
        row->planes[p].recent = t.recent;
        out->bf16_pages += in->pages[p][KVD_POOL_BF16];
        out->codec_pages += in->pages[p][KVD_POOL_CODEC];
    }
    out->bytes = in->bytes;
    out->holders = in->holders;
    out->holds = kvd_session_holds(s, in->id);
    out->name = (char *)in->name;
}

void kvd_on_attach_sequence(struct kvd_call *call, const void *request)
{
    const Kvd__V1__AttachSequenceRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    struct kvd_pool_seq_info info;
    bool first;
    if (!s || kvd_call_replayed(call, s, req->request_id))
        return;
    uint64_t seq = kvd_pool_lookup(d->pool, s->ns, req->name);
    if (!seq || kvd_pool_seq_info(d->pool, seq, &info)) {
        kvd_call_fail(
            call, KVD_E_NOT_FOUND,
            "nothing is published as '%.128s' in this namespace; it may have been evicted",
            req->name);
        return;
    }
    if (info.layout != s->layout) {
        kvd_call_fail(
            call, KVD_E_PRECONDITION,
            "'%s' has another layout (codec, rotation set, windows, shape or tensor-parallel rank) "
            "than this session",
            req->name);
        return;
    }
    if (kvd_pool_seq_whole(d->pool, seq, &err) || kvd_session_add_held(s, seq, &first, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    if (first)
        kvd_pool_seq_hold(d->pool, seq);
    info.holders += first;
    Kvd__V1__AttachSequenceReply r = KVD__V1__ATTACH_SEQUENCE_REPLY__INIT;
    struct described out;
    fill_info(d, s, &info, &out);
    r.sequence = &out.info;
    kvd_call_reply_remember(call, s, req->request_id, &r);
}

static int check_ids(const struct kvd_session *s, const uint64_t *ids, size_t n,
                     struct kvd_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (held(s, ids[i], err))
            return err->code;
    return KVD_OK;
}

static int compare_ids(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

// Each mention of a sequence, which are sorted, gives up one hold, so there must be as many.
static int check_holds(const struct kvd_session *s, const uint64_t *sorted, size_t n,
                       struct kvd_error *err)
{
    uint32_t times = 0;
    for (size_t i = 0; i < n; i++) {
        times = i && sorted[i] == sorted[i - 1] ? times + 1 : 1;
        if (times > 1 && times > kvd_session_holds(s, sorted[i]))
            return kvd_fail(err, KVD_E_NOT_FOUND,
                            "sequence %" PRIu64 " is named %u times or more, and held %u times",
                            sorted[i], times, kvd_session_holds(s, sorted[i]));
    }
    return check_ids(s, sorted, n, err);
}

// A FreeSequences on its way. Until it is done the session holds those that are not given up yet,
// as if the worker had freed a few at a time.
struct freeing {
    struct kvd_piecework release;
    struct kvd_call *call;
    size_t at;
    uint64_t ids[KVD_MAX_CALL_SEQUENCES]; // sorted
};

static bool free_next(struct kvd_daemon *d, struct kvd_piecework *r)
{
    struct freeing *f = (struct freeing *)r;
    const Kvd__V1__FreeSequencesRequest *req = (const void *)f->call->request;
    struct kvd_session *s = kvd_session_find(d, req->session);
    if (!s || f->at == req->n_sequences)
        return false;
    uint64_t seq = f->ids[f->at];
    uint32_t times = 0; // all at once, so that a kvd after this one knows which are done
    for (; f->at < req->n_sequences && f->ids[f->at] == seq; f->at++)
        times++;
    if (!kvd_session_holds(s, seq))
        return true; // another call of the session's has freed it meanwhile
    if (req->unpublish)
        kvd_pool_unpublish(d->pool, seq);
    if (kvd_session_drop_holds(s, seq, times, req->request_id))
        kvd_pool_seq_release(d->pool, seq);
    return true;
}

static void freed(struct kvd_daemon *d, struct kvd_piecework *r)
{
    struct freeing *f = (struct freeing *)r;
    struct kvd_call *call = f->call;
    const Kvd__V1__FreeSequencesRequest *req = (const void *)call->request;
    struct kvd_session *s = kvd_session_find(d, req->session);
    Kvd__V1__FreeSequencesReply reply = KVD__V1__FREE_SEQUENCES_REPLY__INIT;
    call->on_cancelled = NULL;
    free(f);
    if (s)
        kvd_call_reply_remember(call, s, req->request_id, &reply);
    else
        kvd_call_fail(call, KVD_E_UNAUTH, "the session ended before the call was done");
}

// Whoever asks again under the same id is to find it done.
static void on_cancelled(struct kvd_call *call)
{
    kvd_piecework_finish(call->d, call->work);
}

static struct freeing *freeing_new(struct kvd_call *call, struct kvd_session *s,
                                   struct kvd_error *err)
{
    const Kvd__V1__FreeSequencesRequest *req = (const void *)call->request;
    struct freeing *f = malloc(sizeof(*f));
    if (!f) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    f->release = (struct kvd_piecework){.next = free_next, .done = freed};
    f->call = call;
    f->at = 0;
    memcpy(f->ids, req->sequences, req->n_sequences * sizeof(*f->ids));
    qsort(f->ids, req->n_sequences, sizeof(*f->ids), compare_ids);
    // One that a kvd before this one has left half done finds some of them gone.
    int rc = KVD_OK;
    bool begun = kvd_ledger_freeing(s->ledger, s->record, req->request_id);
    if (!begun)
        rc = check_holds(s, f->ids, req->n_sequences, err);
    if (rc == KVD_OK && !kvd_ledger_freeing_fits(s->ledger, s->record, req->request_id))
        rc = kvd_fail(err, KVD_E_LIMIT,
                      "%d calls of this session are freeing sequences, or one under a request id "
                      "that is like this one's; wait",
                      KVD_LEDGER_FREEING);
    if (rc) {
        free(f);
        return NULL;
    }
    // In this order: a kvd after this one must not take the trace of an earlier call for this
    // one's.
    for (size_t i = 0; i < req->n_sequences && !begun; i++)
        kvd_session_drops_anew(s, f->ids[i], req->request_id);
    kvd_ledger_freeing_begin(s->ledger, s->record, req->request_id);
    return f;
}

void kvd_on_free_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__FreeSequencesRequest *req = request;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s || kvd_call_replayed(call, s, req->request_id))
        return;
    if (req->n_sequences < 1 || req->n_sequences > KVD_MAX_CALL_SEQUENCES) {
        kvd_call_fail(call, KVD_E_INVALID, "%zu sequences; 1 to %d are possible", req->n_sequences,
                      KVD_MAX_CALL_SEQUENCES);
        return;
    }
    struct freeing *f = freeing_new(call, s, &err);
    if (!f) {
        kvd_call_fail_error(call, &err);
        return;
    }
    call->work = f;
    call->on_cancelled = on_cancelled;
    kvd_piecework_begin(call->d, &f->release);
}

void kvd_on_describe_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__DescribeSequencesRequest *req = request;
    struct kvd_daemon *d = call->d;
    struct kvd_session *s = kvd_call_session(call, req->session);
    struct kvd_error err = {0};
    if (!s)
        return;
    if (check_ids(s, req->sequences, req->n_sequences, &err)) {
        kvd_call_fail_error(call, &err);
        return;
    }
    size_t all = HASH_COUNT(s->held), i = 0;
    size_t left = all - KVD_MIN((size_t)req->skip, all);
    size_t n = req->n_sequences ? req->n_sequences : KVD_MIN(left, (size_t)KVD_MAX_CALL_SEQUENCES);
    struct described *rows KVD_FREE = calloc(n + 1, sizeof(*rows));
    Kvd__V1__SequenceInfo **list KVD_FREE = calloc(n + 1, sizeof(*list));
    struct kvd_held *h = s->held;
    for (size_t at = 0; at < req->skip && h && !req->n_sequences; at++)
        h = h->hh.next;
    for (size_t at = 0; rows && list && at < n; at++) {
        struct kvd_pool_seq_info info;
        uint64_t seq = req->n_sequences ? req->sequences[at] : h->seq;
        h = h ? h->hh.next : NULL;
        if (kvd_pool_seq_info(d->pool, seq, &info))
            continue;
        fill_info(d, s, &info, &rows[i]);
        list[i] = &rows[i].info;
        i++;
    }
    Kvd__V1__DescribeSequencesReply r = KVD__V1__DESCRIBE_SEQUENCES_REPLY__INIT;
    r.n_sequences = i;
    r.sequences = list;
    r.more = !req->n_sequences && left > n;
    kvd_call_reply(call, &r);
}
