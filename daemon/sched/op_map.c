// MapSequences: where the pages of sequences lie, for workers that attend to them themselves.
//
// It waits in the queue of compute calls, so that no append is half done when it looks. Descriptors
// go out before the reply.
//
// A worker's kernels may go on reading pages after kvd has stored more. A part of a page would not
// stay where it is: it is given back, and may be another's, when the sequence outgrows it. So a
// sequence that is mapped has whole pages from then on, and parts that it has are copied first.
#include "daemon/sched/op.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/memory.h"

enum { MAX_PAGES = 4 << 20 }; // in one reply

// Lends the session all extents that hold a plane's pages.
static int lend_plane(struct kvd_daemon *d, struct kvd_session *s, const struct kvd_view *v,
                      struct kvd_error *err)
{
    int rc = KVD_OK;
    for (uint32_t i = 0; i < v->n_bf16 + v->n_codec && rc == KVD_OK; i++)
        if (v->pages[i] && (i < v->n_bf16 || i - v->n_bf16 >= v->codec_from))
            rc = kvd_memory_lend(d, s, v->pages[i], err);
    return rc;
}

static void tell_plane(struct kvd_daemon *d, const struct kvd_view *v, uint32_t *numbers,
                       Kvd__V1__SequencePages *out)
{
    uint32_t from = KVD_MIN(v->codec_from, v->n_codec);
    kvd__v1__sequence_pages__init(out);
    for (uint32_t i = 0; i < v->n_bf16 + v->n_codec; i++)
        numbers[i] = kvd_memory_page_number(d, v->pages[i]);
    out->hist_end = v->reach.hist_end;
    out->first = v->reach.first;
    out->n_bf16_pages = v->n_bf16;
    out->bf16_pages = numbers;
    out->codec_from = from;
    out->n_codec_pages = v->n_codec - from;
    out->codec_pages = numbers + v->n_bf16 + from;
}

// Its sequences in the reply: a message for each plane, of which the first holds the others.
static void tell_items(struct kvd_daemon *d, const struct kvd_work *w, uint32_t *numbers,
                       Kvd__V1__SequencePages *list, Kvd__V1__SequencePages **refs)
{
    uint32_t planes = w->shape->n_planes;
    for (uint32_t i = 0; i < w->n_items * planes; i++) {
        tell_plane(d, &w->views[i], numbers, &list[i]);
        numbers += w->views[i].n_bf16 + w->views[i].n_codec;
    }
    // Where the first planes' are, and behind them the others.
    for (uint32_t i = 0; i < w->n_items; i++) {
        Kvd__V1__SequencePages *first = &list[(size_t)i * planes];
        Kvd__V1__SequencePages **others = refs + w->n_items + (size_t)i * (planes - 1);
        refs[i] = first;
        first->length = w->items[i].views->length;
        first->n_others = planes - 1;
        first->others = others;
        for (uint32_t p = 1; p < planes; p++)
            others[p - 1] = &first[p];
    }
}

static int lend_and_tell(struct kvd_daemon *d, struct kvd_work *w, struct kvd_session *s,
                         bool again, struct kvd_error *err)
{
    Kvd__V1__MapSequencesReply r = KVD__V1__MAP_SEQUENCES_REPLY__INIT;
    uint64_t pages = 0;
    uint32_t n_views = w->n_items * w->shape->n_planes;
    for (uint32_t i = 0; i < n_views; i++)
        pages += w->views[i].n_bf16 + w->views[i].n_codec;
    if (pages > MAX_PAGES)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%" PRIu64 " pages in one reply, %d are possible; ask for fewer "
                        "sequences",
                        pages, MAX_PAGES);
    if (again)
        kvd_memory_forget(d, s);
    int rc = kvd_memory_lend_rotations(d, s, err);
    for (uint32_t i = 0; i < n_views && rc == KVD_OK; i++)
        rc = lend_plane(d, s, &w->views[i], err);
    if (rc && rc != KVD_E_LIMIT)
        return rc;
    Kvd__V1__SequencePages *list KVD_FREE = calloc(n_views + 1, sizeof(*list));
    Kvd__V1__SequencePages **refs KVD_FREE = calloc(n_views + 1, sizeof(*refs));
    uint32_t *numbers KVD_FREE = calloc(pages + 1, sizeof(*numbers));
    if (!list || !refs || !numbers)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    tell_items(d, w, numbers, list, refs);
    r.more = rc == KVD_E_LIMIT;
    r.n_sequences = r.more ? 0 : w->n_items;
    r.sequences = refs;
    r.extents = kvd_memory_extents(d);
    r.extent_bytes = d->config.extent_size;
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

// What the worker knows already, by plane.
static int take_known(const struct kvd_work *w, const Kvd__V1__MapItem *from, struct kvd_view *to,
                      struct kvd_error *err)
{
    uint32_t others = w->shape->n_planes - 1;
    if (from->n_other_codec_from > others)
        return kvd_fail(
            err, KVD_E_INVALID,
            "other_codec_from has %zu numbers, the layout has %u planes after the first",
            from->n_other_codec_from, others);
    to[0].codec_from = from->codec_from;
    for (size_t p = 0; p < from->n_other_codec_from; p++)
        to[p + 1].codec_from = from->other_codec_from[p];
    return KVD_OK;
}

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__MapSequencesRequest *req = request;
    w->planes = (1u << w->shape->n_planes) - 1;
    if (!s->connection)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "a leased session cannot map pages; connect to the fd socket and open the "
                        "session with its ticket");
    for (uint32_t i = 0; i < w->n_items; i++) {
        w->items[i].seq = req->items[i]->sequence;
        if (!kvd_session_holds(s, w->items[i].seq))
            return kvd_fail(err, KVD_E_NOT_FOUND,
                            "items[%u]: this session holds no sequence %" PRIu64, i,
                            w->items[i].seq);
        if (take_known(w, req->items[i], w->items[i].views, err))
            return kvd_fail_in(err, "items[%u]", i);
        // Parts can only become fewer until its turn comes.
        w->writes |= !kvd_pool_seq_settle(w->call->d->pool, w->items[i].seq);
    }
    return KVD_OK;
}

static bool room(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_pool_need need = {0};
    for (uint32_t i = 0; w->writes && i < w->n_items; i++) {
        struct kvd_pool_need of_item;
        kvd_pool_settle_need(d->pool, w->items[i].seq, &of_item);
        kvd_pool_need_add(&need, &of_item);
    }
    return kvd_room_make(d, &w->room, w->waiter.ns, w->layout, &need);
}

static int note_item(struct kvd_daemon *d, struct kvd_work *w, struct kvd_work_item *item,
                     struct kvd_error *err)
{
    struct kvd_pool_seq_lengths info;
    if (kvd_pool_seq_lengths(d->pool, item->seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "sequence %" PRIu64 " was freed", item->seq);
    if (info.pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "an append has filled %u layers of sequence %" PRIu64
                        "; finish it or truncate to %" PRIu64 " first",
                        info.pending_layers, item->seq, info.length);
    for (uint32_t p = 0; p < w->shape->n_planes; p++) {
        item->views[p].length = info.length;
        item->views[p].reach = info.reach[p];
    }
    int rc = KVD_OK;
    if (w->writes && !kvd_pool_seq_settle(d->pool, item->seq)) {
        rc = kvd_pool_settle_begin(d->pool, item->seq, &item->append, err);
        item->begun = rc == KVD_OK;
        if (rc == KVD_OK)
            rc = kvd_op_note_copies(d, w, &item->append, err);
    }
    return rc ? rc : kvd_op_note_pages(d, w, item, err);
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    for (uint32_t i = 0; i < w->n_items; i++)
        if (note_item(d, w, &w->items[i], err))
            return kvd_fail_in(err, "items[%u]", i);
    return KVD_OK;
}

static void conclude(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_work_item *item = &w->items[i];
        if (item->begun && commit)
            kvd_pool_settle_commit(d->pool, &item->append);
        else if (item->begun)
            kvd_pool_append_abort(d->pool, &item->append);
        item->begun = false;
    }
}

static kvd_op_phase *const run[] = {kvd_op_copy_pages, NULL};

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
                                  .room = room,
                                  .prepare = prepare,
                                  .copies_only = true,
                                  .run = run,
                                  .conclude = conclude,
                                  .reply = reply};

void kvd_on_map_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__MapSequencesRequest *req = request;
    kvd_op_handle(call, &kvd_op_map, req->session, req->n_items, request);
}
