// Pieces of an append: what of it is brought to the device at once, in an item of its own that has
// only the tokens which it wants.
#include "kernels/cuda/cuda.h"

static struct kvd_tensor from_token(struct kvd_tensor t, uint64_t n)
{
    t.data += n * t.token_stride;
    return t;
}

struct pieces {
    struct kvd_append_item *items; // NULL: they are only counted
    uint32_t n;
};

static void add(struct pieces *out, const struct kvd_append_item *of, struct kvd_append_item piece)
{
    piece.pages = of->pages;
    piece.k = from_token(of->k, piece.length - of->length);
    piece.v = from_token(of->v, piece.length - of->length);
    if (out->items)
        out->items[out->n] = piece;
    out->n++;
}

// Each ends where a page of history does.
static void demoted(const struct kvd_append_params *p, const struct kvd_append_item *item,
                    uint64_t most, struct pieces *out)
{
    uint64_t sink = p->plane->sink;
    for (uint64_t begin = item->hist_end, end; begin < item->new_hist_end; begin = end) {
        uint64_t page = sink + (begin - sink) / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS;
        uint64_t length = KVD_MAX(item->length, begin); // what is before comes from the ring
        end = KVD_MIN(item->new_hist_end, page + most);
        add(out, item,
            (struct kvd_append_item){.length = length,
                                     .new_length = KVD_MAX(length, end),
                                     .hist_end = begin,
                                     .new_hist_end = end});
    }
}

static void stored(const struct kvd_append_item *item, uint64_t begin, uint64_t end, uint64_t most,
                   struct pieces *out)
{
    for (; begin < end; begin += most)
        add(out, item,
            (struct kvd_append_item){.length = begin, .new_length = KVD_MIN(end, begin + most)});
}

static void divide(const struct kvd_append_params *p, uint64_t most, struct pieces *out)
{
    for (uint32_t i = 0; i < p->n_items; i++) {
        const struct kvd_append_item *item = &p->items[i];
        uint64_t sink = p->plane->sink, kept = KVD_MAX(sink, item->new_hist_end);
        if (p->part == KVD_APPEND_DEMOTE) {
            demoted(p, item, most, out);
            continue;
        }
        stored(item, item->length, KVD_MIN(sink, item->new_length), most, out);
        stored(item, KVD_MAX(kept, item->length), item->new_length, most, out);
    }
}

int kvd_cuda_pieces(const struct kvd_append_params *p, uint64_t most,
                    struct kvd_append_item **items, uint32_t *n, struct kvd_error *err)
{
    struct pieces count = {0}, out = {0};
    divide(p, most, &count);
    out.items = calloc(count.n + (size_t)1, sizeof(*out.items));
    if (!out.items)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    divide(p, most, &out);
    *items = out.items;
    *n = out.n;
    return KVD_OK;
}

uint32_t kvd_cuda_batch(const struct kvd_append_item *pieces, uint32_t n, uint64_t most)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += KVD_MAX(pieces[i].new_length - pieces[i].length,
                       pieces[i].new_hist_end - pieces[i].hist_end);
        if (i && sum > most)
            return i;
    }
    return n;
}
