// EncodePages: exact pages of a chain that has gone on are encoded.
//
// The executor reads an exact page where it is, as its tiles are rows of bf16, and writes an
// encoded one as a put would: the same kernel on the same values gives the same bits. When all of
// it is written the encoded page gets its key, and then the exact one is superseded: it goes, or
// stays for those who hold it while lookups find the other one. A kvd that is killed in between has
// left both, of which the exact one counts.
//
// Whether another chain ends near a page is asked twice, as it may have come to be there while the
// executor was busy. What has gone meanwhile stays gone.
#include "daemon/sched/op.h"
#include "daemon/sched/page_counts.h"
#include "daemon/sched/superseded.h"

enum { ENCODED, EXACT };      // the spaces: a page's kind - 1
enum { APPENDED_PAGES = 64 }; // in one call of the backend

static int check(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err)
{
    const Kvd__V1__EncodePagesRequest *req = request;
    const struct kvd_page_names named = {&req->space, &req->keys, req->key_bytes};
    return kvd_op_check_pages(w, s, &named, err);
}

static bool same_spaces(const struct kvd_work_pages *p)
{
    return p->spaces[ENCODED].layout == p->spaces[EXACT].layout;
}

static struct kvd_blocks_chain chain_of(const struct kvd_work_pages *p)
{
    return (struct kvd_blocks_chain){.space = &p->spaces[EXACT], .keys = p->keys[EXACT], .n = p->n};
}

// Which exact pages may be superseded, as their chain's next ones are there too, and which of these
// have no encoded one yet.
static void look(struct kvd_daemon *d, const struct kvd_work *w, bool passed[KVD_MAX_CALL_PAGES],
                 bool lacking[KVD_MAX_CALL_PAGES])
{
    const struct kvd_work_pages *p = w->pages;
    const struct kvd_blocks_chain chain = chain_of(p);
    uint32_t encoded[KVD_MAX_CALL_PAGES], exact[KVD_MAX_CALL_PAGES];
    memset(passed, 0, p->n * sizeof(*passed));
    memset(lacking, 0, p->n * sizeof(*lacking));
    if (same_spaces(p))
        return;
    kvd_blocks_passed(d->pool, &chain, passed);
    kvd_blocks_find_pages(d->pool, &p->spaces[ENCODED], false, p->keys[ENCODED], p->n, encoded);
    kvd_blocks_find_pages(d->pool, &p->spaces[EXACT], false, p->keys[EXACT], p->n, exact);
    uint32_t there = 0; // in a row, up to here
    for (uint32_t i = 0; i < p->n; i++) {
        uint32_t last = i - KVD_EXACT_TAIL_PAGES; // which that many are behind now
        there = exact[i] != KVD_PREFIX_NONE || encoded[i] != KVD_PREFIX_NONE ? there + 1 : 0;
        if (i >= KVD_EXACT_TAIL_PAGES)
            passed[last] &= exact[last] != KVD_PREFIX_NONE && there > KVD_EXACT_TAIL_PAGES;
        lacking[i] = encoded[i] == KVD_PREFIX_NONE;
    }
    for (uint32_t i = 0; i < p->n; i++)
        lacking[i] &= passed[i];
}

// The end of the run of pages like page i.
static uint32_t run_end(const struct kvd_work_pages *p, const bool *wanted, uint32_t i)
{
    uint32_t end = i + 1;
    while (end < p->n && wanted[end] == wanted[i])
        end++;
    return end;
}

static bool room(struct kvd_daemon *d, struct kvd_work *w)
{
    const struct kvd_work_pages *p = w->pages;
    bool passed[KVD_MAX_CALL_PAGES], lacking[KVD_MAX_CALL_PAGES];
    struct kvd_pool_need need = {0};
    uint32_t n = 0, layout = p->spaces[ENCODED].layout;
    look(d, w, passed, lacking);
    for (uint32_t i = 0; i < p->n; i++)
        n += lacking[i];
    for (uint32_t k = 0; n && k < p->shapes[ENCODED]->n_planes; k++) {
        need.pages[k][KVD_POOL_CODEC] = n;
        need.bytes += n * kvd_pool_page_bytes(d->pool, layout, k, KVD_POOL_CODEC);
    }
    return !n || kvd_room_make(d, &w->room, p->spaces[ENCODED].ns, layout, &need);
}

// -- at its turn --------------------------------------------------------------------------------

// Items of the runs, to be written, and as many behind them that are read.
static int make_items(struct kvd_work *w, const bool *lacking, uint32_t *pages,
                      struct kvd_error *err)
{
    struct kvd_work_pages *p = w->pages;
    uint32_t runs = 0, planes = w->shape->n_planes;
    for (uint32_t i = 0; i < p->n; i = run_end(p, lacking, i))
        runs += lacking[i];
    free(KVD_TAKE(w->items));
    free(KVD_TAKE(w->views));
    w->items = calloc(2 * (size_t)runs + 1, sizeof(*w->items));
    w->views = calloc(2 * (size_t)runs * planes + 1, sizeof(*w->views));
    p->first = calloc(runs + 1, sizeof(*p->first));
    w->append_items = calloc(APPENDED_PAGES, sizeof(*w->append_items));
    if (!w->items || !w->views || !p->first || !w->append_items)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    w->n_items = 2 * runs;
    p->n_encoded = 0;
    *pages = 0;
    for (uint32_t i = 0; i < w->n_items; i++)
        w->items[i].views = w->views + (size_t)i * planes;
    for (uint32_t i = 0, end; i < p->n; i = end) {
        end = run_end(p, lacking, i);
        if (!lacking[i])
            continue;
        w->items[p->n_encoded].tokens = (end - i) * KVD_PAGE_TOKENS;
        p->first[p->n_encoded++] = i;
        *pages += end - i;
    }
    return KVD_OK;
}

static uint32_t pages_of(const struct kvd_work *w, uint32_t item)
{
    return w->items[item].tokens / KVD_PAGE_TOKENS;
}

// The pages that are read, which stay until the sequence goes.
static int begin_source(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    const struct kvd_work_pages *p = w->pages;
    struct kvd_work_item *source = &w->items[p->n_encoded + i];
    uint32_t entries[KVD_MAX_CALL_PAGES], n = pages_of(w, i);
    kvd_blocks_find_pages(d->pool, &p->spaces[EXACT], false, p->keys[EXACT] + p->first[i], n,
                          entries);
    for (uint32_t k = 0; k < n; k++) // what was taken for those before it may have pushed it out
        if (entries[k] == KVD_PREFIX_NONE)
            return kvd_fail(err, KVD_E_NOT_FOUND, "page %u has gone; nothing was encoded",
                            p->first[i] + k);
    int rc = kvd_blocks_adopt_pages(d->pool, &p->spaces[EXACT], entries, n, &source->seq, err);
    if (rc == KVD_OK)
        rc = kvd_op_note_sealed(d, w, source->seq, err);
    return rc ? rc : kvd_op_note_pages(d, w, source, err);
}

static int begin_target(struct kvd_daemon *d, struct kvd_work *w, uint32_t i, struct kvd_error *err)
{
    struct kvd_work_item *item = &w->items[i];
    const struct kvd_blocks_space *space = &w->pages->spaces[ENCODED];
    int rc = kvd_pool_seq_new(d->pool, space->ns, space->layout, &item->seq, err);
    const struct kvd_pool_append_request by = {.seq = item->seq,
                                               .tokens = item->tokens,
                                               .layer_count = w->layer_count,
                                               .appender = w->appender};
    if (rc == KVD_OK)
        rc = kvd_pool_append_begin(d->pool, &by, &item->append, err);
    item->begun = rc == KVD_OK;
    return rc ? rc : kvd_op_note_pages(d, w, item, err);
}

static int prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    bool passed[KVD_MAX_CALL_PAGES], lacking[KVD_MAX_CALL_PAGES];
    uint32_t pages;
    look(d, w, passed, lacking);
    int rc = make_items(w, lacking, &pages, err);
    for (uint32_t i = 0; i < w->pages->n_encoded && rc == KVD_OK; i++)
        rc = begin_source(d, w, i, err);
    for (uint32_t i = 0; i < w->pages->n_encoded && rc == KVD_OK; i++)
        rc = begin_target(d, w, i, err);
    return rc;
}

// -- the executor's part ------------------------------------------------------------------------

// A side of an exact page, layers of the run that the executor is at: rows of bf16 in tiles.
static struct kvd_tensor side_of(struct kvd_daemon *d, const struct kvd_work *w, uint64_t page,
                                 bool v)
{
    const struct kvd_run *run = kvd_op_run(w);
    const struct kvd_plane *g = &w->pages->shapes[EXACT]->planes[run->plane];
    uint64_t tile = kvd_tile_bytes(g->codec, g->head_dim_k, g->head_dim_v);
    uint64_t at = kvd_tile_offset(g, g->codec, run->layer_begin, 0) +
                  kvd_codes_offset(g->codec, g->head_dim_k, v);
    return (struct kvd_tensor){
        .data = (uint8_t *)(uintptr_t)(page + at), // NOLINT(performance-no-int-to-ptr)
        .layer_stride = g->kv_heads * tile,
        .token_stride = (v ? g->head_dim_v : g->head_dim_k) * sizeof(uint16_t),
        .head_stride = tile,
        .dtype = KVD_DTYPE_BF16,
        .on_device = d->backend->ops->sums, // pages are in the memory that kernels work on
    };
}

static struct kvd_append_item append_of(struct kvd_daemon *d, const struct kvd_work *w,
                                        uint32_t item, uint32_t page)
{
    uint32_t plane = kvd_op_run(w)->plane;
    const struct kvd_view *to = &w->items[item].views[plane];
    const struct kvd_view *from = &w->items[w->pages->n_encoded + item].views[plane];
    uint64_t source = from->pages[from->n_bf16 + page];
    return (struct kvd_append_item){.pages = {to->pages, to->pages + to->n_bf16 + page},
                                    .new_length = KVD_PAGE_TOKENS,
                                    .new_hist_end = KVD_PAGE_TOKENS,
                                    .k = side_of(d, w, source, false),
                                    .v = side_of(d, w, source, true)};
}

// The next pages, counted over all items from w->pages->at on. Returns how many.
static uint32_t fill(struct kvd_daemon *d, struct kvd_work *w)
{
    uint32_t n = 0, at = 0;
    for (uint32_t i = 0; i < w->pages->n_encoded; i++)
        for (uint32_t k = 0; k < pages_of(w, i); k++, at++)
            if (at >= w->pages->at && n < APPENDED_PAGES)
                w->append_items[n++] = append_of(d, w, i, k);
    return n;
}

static int encode(struct kvd_daemon *d, struct kvd_work *w)
{
    struct kvd_work_pages *p = w->pages;
    const struct kvd_run *run = kvd_op_run(w);
    struct kvd_slice *slice = &w->job.slice;
    for (uint32_t n; (n = fill(d, w)) > 0; p->at += n) {
        const struct kvd_append_params params = {.plane = &p->shapes[ENCODED]->planes[run->plane],
                                                 .rotation = p->rotations[ENCODED][run->plane],
                                                 .layer_begin = run->layer_begin,
                                                 .layer_count = run->layer_count,
                                                 .part = KVD_APPEND_DEMOTE, // pages have no window
                                                 .items = w->append_items,
                                                 .n_items = n,
                                                 .slice = slice};
        int rc = d->backend->ops->append(d->backend, &params, &w->err);
        if (rc || slice->more)
            return rc;
        free(KVD_TAKE(slice->state));
        slice->at = 0;
        if (kvd_slice_over(slice)) {
            p->at += n;
            slice->more = true;
            return KVD_OK;
        }
    }
    p->at = 0; // of the next run of layers
    return KVD_OK;
}

// -- when it is done ----------------------------------------------------------------------------

static bool encoded_is_there(struct kvd_daemon *d, const struct kvd_work_pages *p, uint32_t page)
{
    uint32_t entry;
    kvd_blocks_find_pages(d->pool, &p->spaces[ENCODED], false, &p->keys[ENCODED][page], 1, &entry);
    return entry != KVD_PREFIX_NONE;
}

// Gives an item's pages their keys, as far as the exact ones may still be superseded.
static void publish(struct kvd_daemon *d, struct kvd_work *w, uint32_t item, const bool *passed)
{
    struct kvd_work_pages *p = w->pages;
    uint32_t first = p->first[item], end = first + pages_of(w, item), stored;
    for (uint32_t i = first, to; i < end; i = to) {
        const struct kvd_prefix_key *keys = p->keys[ENCODED] + i;
        const struct kvd_prefix_key *after = i && encoded_is_there(d, p, i - 1) ? keys - 1 : NULL;
        for (to = i + 1; to < end && passed[to] == passed[i];)
            to++;
        if (!passed[i])
            continue;
        kvd_blocks_publish_pages(d->pool, &p->spaces[ENCODED], w->items[item].seq, i - first, keys,
                                 to - i, after, &stored, &p->err);
        if (stored)
            kvd_parts_blocks_stored(d, p->spaces[ENCODED].ns, keys, to - i, after);
    }
}

// From the end on, so that what goes has none behind it.
static void supersede(struct kvd_daemon *d, struct kvd_work_pages *p, const bool *passed)
{
    struct kvd_page_count *count = kvd_page_count_of(d, p->spaces[EXACT].ns);
    const struct kvd_blocks_chain chain = chain_of(p);
    for (uint32_t i = p->n; i-- > 0;) {
        uint64_t freed;
        if (!passed[i] || !encoded_is_there(d, p, i))
            continue;
        const struct kvd_superseded page = {.spaces = {p->spaces[ENCODED], p->spaces[EXACT]},
                                            .keys = {p->keys[ENCODED][i], p->keys[EXACT][i]}};
        if (kvd_blocks_supersede(d->pool, &chain, i, &freed))
            kvd_superseded_note(d, &page);
        p->encoded++;
        count->freed += freed;
    }
    count->encoded += p->encoded;
}

static void conclude(struct kvd_daemon *d, struct kvd_work *w, bool commit)
{
    struct kvd_work_pages *p = w->pages;
    bool passed[KVD_MAX_CALL_PAGES], lacking[KVD_MAX_CALL_PAGES];
    if (commit)
        look(d, w, passed, lacking);
    for (uint32_t i = 0; i < p->n_encoded; i++) {
        struct kvd_work_item *item = &w->items[i];
        if (!item->begun)
            continue;
        item->begun = false;
        if (!commit) {
            kvd_pool_append_abort(d->pool, &item->append);
            continue;
        }
        kvd_op_count_stored(d, w, &item->append);
        kvd_pool_append_commit(d->pool, &item->append);
        publish(d, w, i, passed);
    }
    for (uint32_t i = 0; i < w->n_items; i++) // the calls' own
        if (w->items[i].seq)
            kvd_pool_seq_release(d->pool, w->items[i].seq);
    if (!commit || same_spaces(p))
        return;
    kvd_blocks_link_pages(d->pool, &p->spaces[ENCODED], p->keys[ENCODED], p->n);
    supersede(d, p, passed);
}

static int reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err)
{
    Kvd__V1__EncodePagesReply r = KVD__V1__ENCODE_PAGES_REPLY__INIT;
    if (w->pages->err.code) {
        *err = w->pages->err;
        return err->code;
    }
    kvd_op_pages_now(d, w);
    r.kinds = (ProtobufCBinaryData){w->pages->n, w->pages->kinds};
    r.encoded = w->pages->encoded;
    kvd_call_reply(w->call, &r);
    return KVD_OK;
}

static kvd_op_phase *const run[] = {encode, NULL};

const struct kvd_op kvd_op_encode = {.id = KVD_OP_ENCODE,
                                     .writes = true,
                                     .own_items = true,
                                     .least_items = 1,
                                     .most_items = 1,
                                     .check = check,
                                     .room = room,
                                     .prepare = prepare,
                                     .run = run,
                                     .conclude = conclude,
                                     .reply = reply};

void kvd_on_encode_pages(struct kvd_call *call, const void *request)
{
    const Kvd__V1__EncodePagesRequest *req = request;
    kvd_op_handle(call, &kvd_op_encode, req->session, 1, request);
}
