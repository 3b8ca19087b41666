// MapSequences: where the pages of sequences lie, for workers that attend to them themselves.
//
// It waits in the queue of compute calls, so that no append is half done when it looks. Descriptors
// go out before the reply.
#include "daemon/sched/op.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/memory.h"

enum { MAX_PAGES = 4 << 20 }; // in one reply

// Lends the session all extents that hold the item's pages.
static int lend_pages(struct kvd_daemon *d, struct kvd_session *s, const struct kvd_work_item *item,
                      struct kvd_error *err)
{
    const struct kvd_view *v = item->views;
    int rc = KVD_OK;
    for (uint32_t i = 0; i < v->n_bf16 + v->n_codec && rc == KVD_OK; i++)
        if (v->pages[i] && (i < v->n_bf16 || i - v->n_bf16 >= item->position))
            rc = kvd_memory_lend(d, s, v->pages[i], err);
    return rc;
}

static void fill(struct kvd_daemon *d, const struct kvd_work_item *item, uint32_t *numbers,
                 Kvd__V1__SequencePages *out)
{
    const struct kvd_view *v = item->views;
    uint32_t from = (uint32_t)KVD_MIN(item->position, (uint64_t)v->n_codec);
    kvd__v1__sequence_pages__init(out);
    for (uint32_t i = 0; i < v->n_bf16 + v->n_codec; i++)
        numbers[i] = kvd_memory_page_number(d, v->pages[i]);
    out->length = v->length;
    out->hist_end = v->reach.hist_end;
    out->n_bf16_pages = v->n_bf16;
    out->bf16_pages = numbers;
    out->codec_from = from;
    out->n_codec_pages = v->n_codec - from;
    out->codec_pages = numbers + v->n_bf16 + from;
}

static int lend_and_tell(struct kvd_daemon *d, struct kvd_work *w, struct kvd_session *s,
                         bool again, struct kvd_error *err)
{
    Kvd__V1__MapSequencesReply r = KVD__V1__MAP_SEQUENCES_REPLY__INIT;
    uint64_t pages = 0, at = 0;
    for (uint32_t i = 0; i < w->n_items; i++)
        pages += w->items[i].views->n_bf16 + w->items[i].views->n_codec;
    if (pages > MAX_PAGES)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%" PRIu64 " pages in one reply, %d are possible; ask for fewer "
                        "sequences",
                        pages, MAX_PAGES);
    if (again)
        kvd_memory_forget(d, s);
    int rc = kvd_memory_lend_rotations(d, s, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++)
        rc = lend_pages(d, s, &w->items[i], err);
    if (rc && rc != KVD_E_LIMIT)
        return rc;
    Kvd__V1__SequencePages *list KVD_FREE = calloc(w->n_items + 1, sizeof(*list));
    Kvd__V1__SequencePages **refs KVD_FREE = calloc(w->n_items + 1, sizeof(*refs));
    uint32_t *numbers KVD_FREE = calloc(pages + 1, sizeof(*numbers));
    if (!list || !refs || !numbers)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < w->n_items; i++) {
        fill(d, &w->items[i], numbers + at, &list[i]);
        at += w->items[i].views->n_bf16 + w->items[i].views->n_codec;
        refs[i] = &list[i];
    }
    r.more = rc == KVD_E_LIMIT;
    r.n_sequences = r.more ? 0 : w->n_items;
    r.sequences = refs;
    r.extents = kvd_memory_extents(d);
    r.extent_bytes = d->config.extent_size;
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__MapSequencesRequest *req = request;
    if (w->shape->n_planes > 1)
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "this session's layout has %u planes; pages are mapped of layouts of one",
                        w->shape->n_planes);
    w->planes = 1;
    if (!s->connection)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "a leased session cannot map pages; connect to the fd socket and open the "
                        "session with its ticket");
    for (uint32_t i = 0; i < w->n_items; i++) {
        w->items[i].seq = req->items[i]->sequence;
        w->items[i].position = req->items[i]->codec_from;
        if (!kvd_session_holds(s, w->items[i].seq))
            return kvd_fail(err, KVD_E_NOT_FOUND,
                            "items[%u]: this session holds no sequence %" PRIu64, i,
                            w->items[i].seq);
    }
    return KVD_OK;
}

static int note_item(struct kvd_daemon *d, const struct kvd_work *w, struct kvd_work_item *item,
                     struct kvd_error *err)
{
    struct kvd_pool_seq_info info;
    if (kvd_pool_seq_info(d->pool, item->seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "sequence %" PRIu64 " was freed", item->seq);
    if (info.pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "an append has filled %u layers of sequence %" PRIu64
                        "; finish it or truncate to %" PRIu64 " first",
                        info.pending_layers, item->seq, info.length);
    item->views->length = info.length;
    item->views->reach = info.reach[0];
    return kvd_op_note_pages(d, w, item, err);
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    for (uint32_t i = 0; i < w->n_items; i++)
        if (note_item(d, w, &w->items[i], err))
            return kvd_fail_in(err, "items[%u]", i);
    return KVD_OK;
}

static int reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    // A work that waits is failed when its session ends, so this one's is there.
    const Kvd__V1__MapSequencesRequest *req = (const void *)w->call->request;
    struct kvd_session *s = kvd_session_find(d, req->session);
    return s ? lend_and_tell(d, w, s, req->again, err)
             : kvd_fail(err, KVD_E_UNAUTH, "the session ended");
}

const struct kvd_op kvd_op_map = {.id = KVD_OP_MAP,
                                  .most_items = KVD_MAX_CALL_ITEMS,
                                  .check = check,
                                  .prepare = prepare,
                                  .reply = reply};

void kvd_on_map_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__MapSequencesRequest *req = request;
    kvd_op_handle(call, &kvd_op_map, req->session, req->n_items, request);
}
