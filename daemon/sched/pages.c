// Pages and lengths of a work's sequences, noted when its turn comes.
#include "daemon/sched/op.h"

int kvd_op_note_pages(struct kvd_daemon *d, struct kvd_work_item *item, struct kvd_error *err)
{
    uint32_t n = kvd_pool_seq_pages(d->pool, item->seq, 0, KVD_POOL_BF16, NULL, 0);
    uint32_t m = kvd_pool_seq_pages(d->pool, item->seq, 0, KVD_POOL_CODEC, NULL, 0);
    item->pages = calloc((size_t)n + m + 1, sizeof(*item->pages));
    if (!item->pages)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    kvd_pool_seq_pages(d->pool, item->seq, 0, KVD_POOL_BF16, item->pages, n);
    kvd_pool_seq_pages(d->pool, item->seq, 0, KVD_POOL_CODEC, item->pages + n, m);
    item->n_bf16 = n;
    item->n_codec = m;
    return KVD_OK;
}

int kvd_op_note_lengths(struct kvd_daemon *d, const struct kvd_work *w, struct kvd_work_item *item,
                        struct kvd_error *err)
{
    struct kvd_pool_seq_info info;
    if (kvd_pool_seq_info(d->pool, item->seq, &info))
        return kvd_fail(err, KVD_E_NOT_FOUND, "sequence %" PRIu64 " was freed", item->seq);
    bool ahead = w->layer_begin + w->layer_count <= info.pending_layers;
    if (!ahead && w->layer_begin < info.pending_layers)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "sequence %" PRIu64 ": an append in progress has filled layers 0 to %u; "
                        "ask for layers on one side of that",
                        item->seq, info.pending_layers - 1);
    item->length = ahead ? info.pending_length : info.length;
    item->hist_end = ahead ? info.pending[0].hist_end : info.reach[0].hist_end;
    return KVD_OK;
}
