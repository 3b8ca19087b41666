// Pages and lengths of a work's sequences, noted when its turn comes.
#include "daemon/sched/op.h"
#include "daemon/session/scrub.h"

static int note_plane(struct kvd_daemon *d, uint64_t seq, uint32_t plane, struct kvd_view *v,
                      struct kvd_error *err)
{
    uint32_t n = kvd_pool_seq_pages(d->pool, seq, plane, KVD_POOL_BF16, NULL, 0);
    uint32_t m = kvd_pool_seq_pages(d->pool, seq, plane, KVD_POOL_CODEC, NULL, 0);
    v->pages = calloc((size_t)n + m + 1, sizeof(*v->pages));
    if (!v->pages)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    kvd_pool_seq_pages(d->pool, seq, plane, KVD_POOL_BF16, v->pages, n);
    kvd_pool_seq_pages(d->pool, seq, plane, KVD_POOL_CODEC, v->pages + n, m);
    v->n_bf16 = n;
    v->n_codec = m;
    return KVD_OK;
}

static int note_check(struct kvd_work *w, const struct kvd_pool_block *block, struct kvd_error *err)
{
    if (w->n_checks == w->cap_checks) {
        uint32_t cap = KVD_MAX(2 * w->cap_checks, 64u);
        struct kvd_work_check *grown = realloc(w->checks, cap * sizeof(*grown));
        if (!grown)
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        w->checks = grown;
        w->cap_checks = cap;
    }
    w->checks[w->n_checks++] = (struct kvd_work_check){.block = *block};
    return KVD_OK;
}

// Those that nobody has looked at since an earlier kvd has left them.
static int note_unseen(struct kvd_daemon *d, struct kvd_work *w, uint64_t seq,
                       struct kvd_error *err)
{
    struct kvd_pool_walk at = {0};
    struct kvd_pool_block block;
    int rc = KVD_OK;
    while (rc == KVD_OK && kvd_scrub_unseen(d, seq, &at, &block))
        rc = note_check(w, &block, err);
    return rc;
}

int kvd_op_note_sealed(struct kvd_daemon *d, struct kvd_work *w, uint64_t seq,
                       struct kvd_error *err)
{
    struct kvd_pool_walk at = {0};
    struct kvd_pool_block block;
    int rc = KVD_OK;
    while (rc == KVD_OK && kvd_pool_seq_sealed(d->pool, seq, &at, &block))
        rc = note_check(w, &block, err);
    return rc;
}

int kvd_op_note_pages(struct kvd_daemon *d, struct kvd_work *w, struct kvd_work_item *item,
                      struct kvd_error *err)
{
    int rc = kvd_pool_seq_whole(d->pool, item->seq, err);
    if (rc == KVD_OK)
        rc = note_unseen(d, w, item->seq, err);
    for (uint32_t p = 0; p < w->shape->n_planes && rc == KVD_OK; p++)
        if (w->planes >> p & 1)
            rc = note_plane(d, item->seq, p, &item->views[p], err);
    return rc;
}

int kvd_op_note_lengths(struct kvd_daemon *d, const struct kvd_work *w, struct kvd_work_item *item,
                        struct kvd_error *err)
{
    struct kvd_pool_seq_lengths info;
    if (kvd_pool_seq_lengths(d->pool, item->seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "sequence %" PRIu64 " was freed", item->seq);
    bool ahead = w->layer_begin + w->layer_count <= info.pending_layers;
    if (!ahead && w->layer_begin < info.pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %" PRIu64 ": an append in progress has filled layers 0 to %u; "
                        "ask for layers on one side of that",
                        item->seq, info.pending_layers - 1);
    for (uint32_t p = 0; p < w->shape->n_planes; p++) {
        item->views[p].length = ahead ? info.pending_length : info.length;
        item->views[p].reach = ahead ? info.pending[p] : info.reach[p];
    }
    return KVD_OK;
}

int kvd_op_check_reach(const struct kvd_work *w, const struct kvd_work_item *item, uint64_t from,
                       bool seen, struct kvd_error *err)
{
    for (uint32_t p = 0; p < w->shape->n_planes; p++) {
        uint32_t window = w->shape->planes[p].window;
        uint64_t first = item->views[p].reach.first;
        uint64_t wanted = seen ? kvd_pool_visible(kvd_op_window(w, p), from) : from;
        if (w->planes >> p & 1 && wanted < first)
            return kvd_fail(err, KVD_E_PRECONDITION,
                            "sequence %" PRIu64 ": tokens from %" PRIu64 " on are wanted, but "
                            "layers with a window of %u have freed those before %" PRIu64 "%s",
                            item->seq, wanted, window, first,
                            seen ? "; attend to fewer of the last positions, or use Step, which "
                                   "attends before it frees"
                                 : "");
    }
    return KVD_OK;
}
