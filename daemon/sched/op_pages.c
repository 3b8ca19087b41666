// PutPages and GetPages: single blocks of an engine that keeps KV of its own.
//
// A put makes a sequence of each run of pages that are not there, appends, and gives the sequence's
// blocks their keys when all of it is written; the sequence goes, the blocks stay. So a page that
// anybody sees is whole, and a put that is given up leaves nothing. A get makes sequences of the
// blocks, which keep their pages whatever is evicted meanwhile, and reads those.
#include "daemon/sched/op.h"
#include "daemon/sched/page_counts.h"

enum { ENCODED, EXACT }; // the spaces: a page's kind - 1

// -- what both have ------------------------------------------------------------------------------

static struct kvd_shape shape_of(const struct kvd_work *w, bool v)
{
    return (struct kvd_shape){w->layer_count, w->pages->n * KVD_PAGE_TOKENS, w->plane->kv_heads,
                              v ? w->plane->head_dim_v : w->plane->head_dim_k};
}

static struct kvd_tensor from_page(struct kvd_tensor t, uint32_t page)
{
    if (t.data) // else they are in an engine's blocks
        t.data += (uint64_t)page * KVD_PAGE_TOKENS * t.token_stride;
    return t;
}

// Makes an item of each run of pages of one kind, with which nothing is done where that is MISSING.
static int make_items(struct kvd_work *w, const uint8_t *kinds, struct kvd_error *err)
{
    struct kvd_work_pages *p = w->pages;
    uint32_t runs = 1;
    for (uint32_t i = 1; i < p->n; i++)
        runs += kinds[i] != kinds[i - 1];
    struct kvd_work_item *items = calloc(runs, sizeof(*items));
    struct kvd_view *views = calloc((size_t)runs * w->shape->n_planes, sizeof(*views));
    p->first = calloc(runs, sizeof(*p->first));
    w->append_items = calloc(runs, sizeof(*w->append_items));
    if (!items || !views || !p->first || !w->append_items) {
        free(items);
        free(views);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    free(w->items);
    free(w->views);
    w->items = items;
    w->views = views;
    for (uint32_t kind = KVD_PAGE_ENCODED; kind <= KVD_PAGE_EXACT; kind++) {
        for (uint32_t i = 0, end; i < p->n; i = end) {
            for (end = i + 1; end < p->n && kinds[end] == kinds[i];)
                end++;
            if (kinds[i] != kind)
                continue;
            struct kvd_work_item *item = &items[w->n_items];
            item->views = views + (size_t)w->n_items * w->shape->n_planes;
            item->tokens = (end - i) * KVD_PAGE_TOKENS;
            item->k = from_page(p->k, i);
            item->v = from_page(p->v, i);
            p->first[w->n_items++] = i;
        }
        if (kind == KVD_PAGE_ENCODED)
            p->n_encoded = w->n_items;
    }
    return KVD_OK;
}

static int space_of(const struct kvd_work *w, uint32_t item)
{
    return item < w->pages->n_encoded ? ENCODED : EXACT;
}

// The sequences were the calls' own.
static void release_items(struct kvd_daemon *d, const struct kvd_work *w)
{
    for (uint32_t i = 0; i < w->n_items; i++)
        if (w->items[i].seq)
            kvd_pool_seq_release(d->pool, w->items[i].seq);
}

static int check_paged(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__PagedRef *ref,
                       bool others, bool written, struct kvd_error *err)
{
    if (others)
        return kvd_fail(err, KVD_E_INVALID, "there are k or v, and paged: one is wanted");
    return kvd_op_paged_check(w, s, ref, written, err);
}

// -- put ----------------------------------------------------------------------------------------

static int check_put(struct kvd_work *w, struct kvd_session *s, const void *request,
                     struct kvd_error *err)
{
    const Kvd__V1__PutPagesRequest *req = request;
    const struct kvd_page_names named = {&req->space, &req->keys, req->key_bytes};
    int rc = kvd_op_check_pages(w, s, &named, err);
    struct kvd_work_pages *p = w->pages;
    if (rc)
        return rc;
    if (req->after.len && req->after.len != req->key_bytes)
        return kvd_fail(err, KVD_E_INVALID, "after has %zu bytes, and keys have %u", req->after.len,
                        req->key_bytes);
    if (req->exact.len && req->exact.len != p->n)
        return kvd_fail(err, KVD_E_INVALID, "exact has %zu bytes; one for each of the %u pages",
                        req->exact.len, p->n);
    p->has_after = req->after.len != 0;
    for (int i = 0; i < 2 && p->has_after && rc == KVD_OK; i++)
        rc = kvd_prefix_keys_of_pages(p->spaces[i].domain, req->after.data, req->key_bytes, 1,
                                      &p->after[i], err);
    for (uint32_t i = 0; i < p->n && rc == KVD_OK; i++) {
        uint8_t exact = req->exact.len ? req->exact.data[i] : 0;
        if (exact > 1)
            rc = kvd_fail(err, KVD_E_INVALID, "exact[%u] is %u; 0 and 1 are known", i, exact);
        if (p->spaces[ENCODED].layout == p->spaces[EXACT].layout)
            exact = 1;
        p->kinds[i] = exact ? KVD_PAGE_EXACT : KVD_PAGE_ENCODED;
    }
    if (rc == KVD_OK && req->paged)
        return check_paged(w, s, req->paged, req->k || req->v, false, err);
    if ((req->k && req->k->dtype != KVD__V1__DTYPE__DTYPE_BF16) ||
        (req->v && req->v->dtype != KVD__V1__DTYPE__DTYPE_BF16))
        rc = kvd_fail(err, KVD_E_INVALID, "K and V are bf16");
    if (rc == KVD_OK)
        rc = kvd_work_tensor_in(w, s, req->k, shape_of(w, false), "k", 0, &p->k, err);
    return rc ? rc : kvd_work_tensor_in(w, s, req->v, shape_of(w, true), "v", 0, &p->v, err);
}

// Which pages are there, those included that others have superseded: whoever holds them may get
// them.
static void find(struct kvd_daemon *d, const struct kvd_work *w, bool use, uint8_t *kinds,
                 uint32_t entries[2][KVD_MAX_CALL_PAGES])
{
    uint32_t *const lists[2] = {entries[ENCODED], entries[EXACT]};
    kvd_page_find_best(d, w->pages->spaces, w->pages->keys, use, w->pages->n, lists, kinds);
}

static int begin_put(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    const struct kvd_blocks_space *space = &w->pages->spaces[space_of(w, i)];
    int rc = kvd_pool_seq_new(d->pool, space->ns, space->layout, &item->seq, err);
    if (rc)
        return rc;
    const struct kvd_pool_append_request by = {.seq = item->seq,
                                               .tokens = item->tokens,
                                               .layer_count = w->layer_count,
                                               .appender = w->appender};
    rc = kvd_pool_append_begin(d->pool, &by, &item->append, err);
    item->begun = rc == KVD_OK;
    return rc ? rc : kvd_op_note_pages(d, w, item, err);
}

// What is to be done with each page: those that are there already are not wanted.
static void find_wanted(struct kvd_daemon *d, const struct kvd_work *w, bool use,
                        uint8_t wanted[KVD_MAX_CALL_PAGES])
{
    const struct kvd_work_pages *p = w->pages;
    uint32_t entries[2][KVD_MAX_CALL_PAGES];
    uint8_t there[KVD_MAX_CALL_PAGES];
    find(d, w, use, there, entries);
    for (uint32_t i = 0; i < p->n; i++) {
        wanted[i] = there[i] < p->kinds[i] ? p->kinds[i] : KVD_PAGE_MISSING;
        // A chain ends there again.
        if (use && there[i] == KVD_PAGE_EXACT && p->kinds[i] == KVD_PAGE_EXACT)
            kvd_blocks_revive(d->pool, p->spaces[EXACT].ns, entries[EXACT][i]);
    }
}

static bool room_put(struct kvd_daemon *d, struct kvd_work *w)
{
    const struct kvd_work_pages *p = w->pages;
    uint8_t wanted[KVD_MAX_CALL_PAGES];
    find_wanted(d, w, false, wanted);
    for (int space = 0; space < 2; space++) {
        uint32_t n = 0, layout = p->spaces[space].layout;
        struct kvd_pool_need need = {0};
        for (uint32_t i = 0; i < p->n; i++)
            n += wanted[i] == (space == EXACT ? KVD_PAGE_EXACT : KVD_PAGE_ENCODED);
        for (uint32_t k = 0; n && k < p->shapes[space]->n_planes; k++) {
            need.pages[k][KVD_POOL_CODEC] = n;
            need.bytes += n * kvd_pool_page_bytes(d->pool, layout, k, KVD_POOL_CODEC);
        }
        if (n && !kvd_room_make(d, &w->room, p->spaces[space].ns, layout, &need))
            return false;
    }
    return true;
}

static int prepare_put(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    struct kvd_work_pages *p = w->pages;
    uint8_t wanted[KVD_MAX_CALL_PAGES];
    find_wanted(d, w, true, wanted);
    for (uint32_t i = 0; i < p->n; i++)
        if (!wanted[i])
            kvd_page_count_of(d, w->waiter.ns)->known++;
    int rc = make_items(w, wanted, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++)
        rc = begin_put(d, w, i, err);
    return rc;
}

// The key of the page that an item comes behind: the one right before it, if that is there in its
// kind, else the last one of its kind before that, of this call or the one that it comes behind.
// Exact ones come behind the first of these then: they are a chain's last pages, and no end of
// those that are further before them. NULL: none; *room is for a key that was looked up.
static const struct kvd_prefix_key *before(struct kvd_daemon *d, const struct kvd_work *w,
                                           uint32_t i, struct kvd_prefix_key *room)
{
    const struct kvd_work_pages *p = w->pages;
    int space = space_of(w, i);
    const struct kvd_prefix_key *key = p->has_after ? &p->after[space] : NULL;
    uint32_t entry = KVD_PREFIX_NONE;
    if (!p->first[i])
        return key;
    kvd_blocks_find_pages(d->pool, &p->spaces[space], false, &p->keys[space][p->first[i] - 1], 1,
                          &entry);
    if (entry != KVD_PREFIX_NONE)
        return &p->keys[space][p->first[i] - 1];
    if (i && space_of(w, i - 1) == space)
        key = &p->keys[space][p->first[i - 1] + w->items[i - 1].tokens / KVD_PAGE_TOKENS - 1];
    if (space == EXACT && key && kvd_blocks_first_page(d->pool, &p->spaces[space], key, room))
        key = room;
    return key;
}

static void conclude_put(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    struct kvd_work_pages *p = w->pages;
    const struct kvd_plane *g = w->plane;
    struct kvd_page_count *count = kvd_page_count_of(d, w->waiter.ns);
    for (uint32_t i = 0; i < w->n_items; i++) {
        struct kvd_work_item *item = &w->items[i];
        uint32_t stored = 0, n = item->tokens / KVD_PAGE_TOKENS;
        int space = space_of(w, i);
        if (!item->begun)
            continue;
        item->begun = false;
        if (!commit) {
            kvd_pool_append_abort(d->pool, &item->append);
            continue;
        }
        if (space == ENCODED)
            kvd_op_count_stored(d, w, &item->append);
        kvd_pool_append_commit(d->pool, &item->append);
        struct kvd_prefix_key room;
        const struct kvd_prefix_key *after = before(d, w, i, &room);
        kvd_blocks_publish_pages(d->pool, &p->spaces[space], item->seq, 0,
                                 p->keys[space] + p->first[i], n, after, &stored, &p->err);
        if (stored)
            kvd_parts_blocks_stored(d, p->spaces[space].ns, p->keys[space] + p->first[i], n, after);
        p->stored += stored;
    }
    count->put += p->stored;
    count->put_registered += p->paged ? p->stored : 0;
    count->put_bytes += (uint64_t)p->stored * KVD_PAGE_TOKENS * w->layer_count * g->kv_heads *
                        (g->head_dim_k + g->head_dim_v) * 2;
    release_items(d, w);
}

// The items [first, first + n) of a space, as the executor has them.
static struct kvd_append_params put_params(struct kvd_work *w, int space, uint32_t first,
                                           uint32_t n)
{
    const struct kvd_run *run = kvd_op_run(w);
    for (uint32_t i = 0; i < n && !w->filled; i++)
        kvd_op_append_fill(w, &w->items[first + i], &w->append_items[i]);
    w->filled = true;
    return (struct kvd_append_params){.plane = &w->pages->shapes[space]->planes[run->plane],
                                      .rotation = w->pages->rotations[space][run->plane],
                                      .layer_begin = run->layer_begin,
                                      .layer_count = run->layer_count,
                                      .part = KVD_APPEND_DEMOTE, // pages have no window
                                      .items = w->append_items,
                                      .n_items = n,
                                      .slice = &w->job.slice};
}

// At all items at once, as nothing but the tensors is looked at: their shape is that of either
// space, and a GPU is waited for once.
static int look_for_nonfinite(struct kvd_daemon *d, struct kvd_work *w)
{
    if (w->pages->paged)
        return KVD_OK;
    struct kvd_append_params p = put_params(w, ENCODED, 0, w->n_items);
    int rc = p.n_items ? d->backend->ops->check(d->backend, &p, &w->nonfinite) : KVD_OK;
    return rc ? kvd_op_explain_pages(w, rc, w->pages->first) : KVD_OK;
}

static int append(struct kvd_daemon *d, struct kvd_work *w, int space)
{
    const uint32_t first = space == EXACT ? w->pages->n_encoded : 0;
    const uint32_t n = (space == EXACT ? w->n_items : w->pages->n_encoded) - first;
    if (w->pages->paged)
        return KVD_OK;
    struct kvd_append_params p = put_params(w, space, first, n);
    return p.n_items ? d->backend->ops->append(d->backend, &p, &w->err) : KVD_OK;
}

static int append_encoded(struct kvd_daemon *d, struct kvd_work *w)
{
    return append(d, w, ENCODED);
}
static int append_exact(struct kvd_daemon *d, struct kvd_work *w)
{
    return append(d, w, EXACT);
}

static int reply_put(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    Kvd__V1__PutPagesReply r = KVD__V1__PUT_PAGES_REPLY__INIT;
    if (w->pages->err.code) {
        *err = w->pages->err;
        return err->code;
    }
    kvd_op_pages_now(d, w);
    r.kinds = (ProtobufCBinaryData){w->pages->n, w->pages->kinds};
    r.stored = w->pages->stored;
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static kvd_op_phase *const run_put[] = {kvd_op_paged_put, look_for_nonfinite, append_encoded,
                                        append_exact, NULL};

const struct kvd_op kvd_op_put = {.id = KVD_OP_PUT,
                                  .writes = true,
                                  .own_items = true,
                                  .least_items = 1,
                                  .most_items = 1,
                                  .check = check_put,
                                  .room = room_put,
                                  .prepare = prepare_put,
                                  .run = run_put,
                                  .conclude = conclude_put,
                                  .reply = reply_put};

void kvd_on_put_pages(struct kvd_call *call, const void *request)
{
    const Kvd__V1__PutPagesRequest *req = request;
    kvd_op_handle(call, &kvd_op_put, req->session, 1, request);
}

// -- get ----------------------------------------------------------------------------------------

static int check_get(struct kvd_work *w, struct kvd_session *s, const void *request,
                     struct kvd_error *err)
{
    const Kvd__V1__GetPagesRequest *req = request;
    const struct kvd_page_names named = {&req->space, &req->keys, req->key_bytes};
    int rc = kvd_op_check_pages(w, s, &named, err);
    struct kvd_work_pages *p = w->pages;
    if (rc)
        return rc;
    if (req->paged)
        return check_paged(w, s, req->paged, req->k || req->v, true, err);
    rc = kvd_work_tensor_out(w, s, req->k, shape_of(w, false), "k", 0, &p->k, &p->k_inline,
                             &p->k_len, err);
    return rc ? rc
              : kvd_work_tensor_out(w, s, req->v, shape_of(w, true), "v", 0, &p->v, &p->v_inline,
                                    &p->v_len, err);
}

static int not_there(const struct kvd_work *w, uint32_t page, struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_NOT_FOUND, "page %u of %u is not there; nothing was read", page,
                    w->pages->n);
}

// Looks again: what the items before it took may have pushed out some of its own.
static int begin_get(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    const struct kvd_work_pages *p = w->pages;
    const struct kvd_blocks_space *space = &p->spaces[space_of(w, i)];
    uint32_t entries[KVD_MAX_CALL_PAGES], n = item->tokens / KVD_PAGE_TOKENS;
    kvd_blocks_find_pages(d->pool, space, false, p->keys[space_of(w, i)] + p->first[i], n, entries);
    for (uint32_t k = 0; k < n; k++)
        if (entries[k] == KVD_PREFIX_NONE)
            return not_there(w, p->first[i] + k, err);
    int rc = kvd_blocks_adopt_pages(d->pool, space, entries, n, &item->seq, err);
    return rc ? rc : kvd_op_note_pages(d, w, item, err);
}

static int prepare_get(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    struct kvd_work_pages *p = w->pages;
    uint32_t entries[2][KVD_MAX_CALL_PAGES];
    int rc = KVD_OK;
    find(d, w, true, p->kinds, entries);
    for (uint32_t i = 0; i < p->n; i++)
        if (!p->kinds[i])
            return not_there(w, i, err);
    rc = make_items(w, p->kinds, err);
    for (uint32_t i = 0; i < w->n_items && rc == KVD_OK; i++)
        rc = begin_get(d, w, i, err);
    return rc;
}

static void conclude_get(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    struct kvd_page_count *count = kvd_page_count_of(d, w->waiter.ns);
    const struct kvd_plane *g = w->plane;
    if (commit) {
        count->got += w->pages->n;
        count->got_registered += w->pages->paged ? w->pages->n : 0;
        count->got_bytes += (uint64_t)w->pages->n * KVD_PAGE_TOKENS * w->layer_count * g->kv_heads *
                            (g->head_dim_k + g->head_dim_v) * 2;
    }
    release_items(d, w);
}

static int read_item(struct kvd_daemon *d, struct kvd_work *w, uint32_t i)
{
    const struct kvd_run *run = kvd_op_run(w);
    const struct kvd_work_item *item = &w->items[i];
    int space = space_of(w, i);
    struct kvd_read_params p = {.plane = &w->pages->shapes[space]->planes[run->plane],
                                .rotation = w->pages->rotations[space][run->plane],
                                .layer_begin = run->layer_begin,
                                .layer_count = run->layer_count,
                                .pages = kvd_op_pages(&item->views[run->plane]),
                                .length = item->tokens,
                                .hist_end = item->tokens,
                                .tokens = item->tokens,
                                .k = kvd_op_part(w, item->k),
                                .v = kvd_op_part(w, item->v),
                                .slice = &w->job.slice};
    return d->backend->ops->read(d->backend, &p, &w->err);
}

static int read_pages(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_work_pages *p = w->pages;
    struct kvd_slice *slice = &w->job.slice;
    while (!p->paged && p->at < w->n_items) {
        int rc = read_item(d, w, p->at);
        if (rc || slice->more)
            return rc;
        free(KVD_TAKE(slice->state));
        slice->at = 0;
        p->at++;
        if (p->at < w->n_items && kvd_slice_over(slice)) {
            slice->more = true;
            return KVD_OK;
        }
    }
    p->at = 0; // of the next run of layers
    return KVD_OK;
}

static int reply_get(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    const struct kvd_work_pages *p = w->pages;
    Kvd__V1__GetPagesReply r = KVD__V1__GET_PAGES_REPLY__INIT;
    (void)d;
    (void)err;
    r.kinds = (ProtobufCBinaryData){p->n, p->kinds};
    r.k = (ProtobufCBinaryData){p->k_len, p->k_inline};
    r.v = (ProtobufCBinaryData){p->v_len, p->v_inline};
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static kvd_op_phase *const run_get[] = {kvd_op_paged_get, read_pages, NULL};

const struct kvd_op kvd_op_get = {.id = KVD_OP_GET,
                                  .own_items = true,
                                  .least_items = 1,
                                  .most_items = 1,
                                  .check = check_get,
                                  .prepare = prepare_get,
                                  .run = run_get,
                                  .conclude = conclude_get,
                                  .reply = reply_get};

void kvd_on_get_pages(struct kvd_call *call, const void *request)
{
    const Kvd__V1__GetPagesRequest *req = request;
    kvd_op_handle(call, &kvd_op_get, req->session, 1, request);
}
