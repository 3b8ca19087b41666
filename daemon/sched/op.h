// An operation: what one kind of compute call does at each station of its way (work.h), and what
// several of them share. One file for each: op_append.c, op_attend.c, op_step.c, op_read.c,
// op_rotate.c, op_map.c, op_encode.c; PutPages and GetPages are in op_pages.c and op_paged.c.
#ifndef KVD_DAEMON_OP_H
#define KVD_DAEMON_OP_H

#include "daemon/sched/work.h"

// A part of the executor's run, in slices. It gets what the work noted, and nothing of the loop's.
typedef int kvd_op_phase(struct kvd_daemon *d, struct kvd_work *w);

struct kvd_op {
    enum kvd_kernel_op id; // in the metrics
    bool writes;           // its sequences change
    bool own_items;        // they are made at its turn
    bool copies_only;      // `run` is nothing but kvd_op_copy_pages: without copies, none runs
    uint32_t least_items, most_items;
    // Loop thread. Checks the request and notes sequences, tensors and parameters in the work. No
    // sequence is pinned yet, and nothing else has changed: an error is the answer.
    int (*check)(struct kvd_work *w, struct kvd_session *s, const void *request,
                 struct kvd_error *err);
    // Loop thread, at its turn: makes room for what `prepare` will take, by kvd_room_make. False:
    // it has to wait, and is asked again. NULL: it takes little.
    bool (*room)(struct kvd_daemon *d, struct kvd_work *w);
    // Loop thread, when there is room: takes pages and notes addresses and lengths. What was taken
    // before an error is given back by `conclude`. NULL: nothing is wanted.
    int (*prepare)(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err);
    // Executor thread, in this order; ends with NULL. `run` itself is NULL where no kernel runs:
    // such a work is answered right after `prepare`.
    kvd_op_phase *const *run;
    // Loop thread: takes over what `prepare` took, or gives it back. NULL: nothing was taken.
    void (*conclude)(struct kvd_daemon *d, struct kvd_work *w, bool commit);
    // Loop thread: answers the call. After an error it has not, and the caller does.
    int (*reply)(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err);
};

extern const struct kvd_op kvd_op_append, kvd_op_attend, kvd_op_step, kvd_op_rotate, kvd_op_read,
    kvd_op_map, kvd_op_put, kvd_op_get, kvd_op_encode;

// Their handlers.
KVD_HANDLER(append);
KVD_HANDLER(attend);
KVD_HANDLER(step);
KVD_HANDLER(rotate);
KVD_HANDLER(read_tokens);
KVD_HANDLER(map_sequences);
KVD_HANDLER(put_pages);
KVD_HANDLER(get_pages);
KVD_HANDLER(encode_pages);

// Handles a request of n items: checks it, and has it wait for its turn, or answers with what is
// wrong. `session` is its secret.
void kvd_op_handle(struct kvd_call *call, const struct kvd_op *op, const char *session, size_t n,
                   const void *request);

// -- request.c: what requests have in common ----------------------------------------------------
struct kvd_shape {
    uint32_t layers, tokens, heads, dim;
};

// Sequence and token count of an item; `sum` adds up over the call.
int kvd_op_check_item(const struct kvd_session *s, uint64_t seq, uint64_t tokens, uint32_t item,
                      uint64_t *sum, struct kvd_error *err);
// count 0: all from `begin` on. Divides them into runs.
int kvd_op_set_layers(struct kvd_work *w, uint32_t begin, uint32_t count, struct kvd_error *err);
// K and V of item i, and q, o and lse of it.
int kvd_op_set_kv(struct kvd_work *w, struct kvd_session *s, uint32_t i,
                  const Kvd__V1__TensorRef *k, const Kvd__V1__TensorRef *v, struct kvd_error *err);
int kvd_op_set_qo(struct kvd_work *w, struct kvd_session *s, uint32_t i,
                  const Kvd__V1__TensorRef *q, const Kvd__V1__TensorRef *o,
                  const Kvd__V1__TensorRef *lse, const Kvd__V1__AttentionParams *params,
                  struct kvd_error *err);

// What Append, Attend and Step have in common. `ids` fills in sequence and counts of item i, which
// are then checked, `tensors` the rest.
struct kvd_op_batch {
    uint32_t layer_begin, layer_count;
    const Kvd__V1__AttentionParams *params; // of Attend and Step
    const Kvd__V1__Fence *wait, *signal;
    void (*ids)(struct kvd_work_item *item, const void *request, uint32_t i);
    int (*tensors)(struct kvd_work *w, struct kvd_session *s, const void *request, uint32_t i,
                   struct kvd_error *err);
};
int kvd_op_check_batch(struct kvd_work *w, struct kvd_session *s, const void *request,
                       const struct kvd_op_batch *b, struct kvd_error *err);

// What a call of pages names, checked, as w->pages; the rest of that is empty. Its errors are the
// call's answer.
struct kvd_page_names {
    const ProtobufCBinaryData *space, *keys;
    uint32_t key_bytes;
};
int kvd_op_check_pages(struct kvd_work *w, struct kvd_session *s,
                       const struct kvd_page_names *named, struct kvd_error *err);

// -- tensors.c ----------------------------------------------------------------------------------
// Resolves a TensorRef to memory. For an output that goes into the reply, memory is made and handed
// to *inline_out. KVD_E_INVALID says which tensor reaches where; `name` and `item` are for that
// message.
int kvd_work_tensor_in(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__TensorRef *ref,
                       struct kvd_shape shape, const char *name, uint32_t item,
                       struct kvd_tensor *out, struct kvd_error *err);
int kvd_work_tensor_out(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__TensorRef *ref,
                        struct kvd_shape shape, const char *name, uint32_t item,
                        struct kvd_tensor *out, uint8_t **inline_out, size_t *inline_len,
                        struct kvd_error *err);
// Keeps a buffer mapped until the work is done. KVD_E_INTERNAL.
int kvd_work_hold_buffer(struct kvd_work *w, struct kvd_buffer *b, struct kvd_error *err);
// Notes what a call reads or writes of a buffer, from `offset` on, for when all of it is known.
int kvd_work_note_span(struct kvd_work *w, const struct kvd_buffer *b, uint64_t offset,
                       const struct kvd_overlap *span, struct kvd_error *err);
// Resolves a fence, which is the call's `wait` or, `written`, its `signal`. NULL: none.
int kvd_work_fence(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__Fence *f, bool written,
                   struct kvd_fence *out, struct kvd_error *err);

// -- pages.c: the executor cannot ask the pool, which the loop goes on changing -----------------
// Notes the pages of an item's sequence, of the planes that the call has layers of.
int kvd_op_note_pages(struct kvd_daemon *d, struct kvd_work *w, struct kvd_work_item *item,
                      struct kvd_error *err);
// Has the executor compare all blocks of a sequence that have a checksum with it, before anything
// is made of them.
int kvd_op_note_sealed(struct kvd_daemon *d, struct kvd_work *w, uint64_t seq,
                       struct kvd_error *err);
// Notes lengths and ends of history that the call's layers see.
int kvd_op_note_lengths(struct kvd_daemon *d, const struct kvd_work *w, struct kvd_work_item *item,
                        struct kvd_error *err);

// Whether all tokens are there, of all planes that the call has layers of: from `from` on, or those
// that a query at `from` sees. KVD_E_PRECONDITION.
int kvd_op_check_reach(const struct kvd_work *w, const struct kvd_work_item *item, uint64_t from,
                       bool seen, struct kvd_error *err);

// The window of a plane's layers in this call: the smaller of the plane's and the call's.
static inline uint32_t kvd_op_window(const struct kvd_work *w, uint32_t plane)
{
    uint32_t own = w->shape->planes[plane].window;
    return own && w->window ? KVD_MIN(own, w->window) : own + w->window;
}

// The run that the executor is at, and what of a tensor of the call belongs to it.
static inline const struct kvd_run *kvd_op_run(const struct kvd_work *w)
{
    return &w->runs[w->run];
}
static inline struct kvd_tensor kvd_op_part(const struct kvd_work *w, struct kvd_tensor t)
{
    if (t.data)
        t.data += kvd_op_run(w)->at * t.layer_stride;
    return t;
}
static inline const float *kvd_op_sinks(const struct kvd_work *w)
{
    return w->sinks ? w->sinks + (size_t)kvd_op_run(w)->at * w->plane->q_heads : NULL;
}
static inline struct kvd_pages kvd_op_pages(const struct kvd_view *v)
{
    return (struct kvd_pages){v->pages, v->pages + v->n_bf16};
}

// -- copies.c: pages that are another's too, or a part that has become too small ------------------
// Notes the copies that an append has to make. KVD_E_INTERNAL.
int kvd_op_note_copies(struct kvd_daemon *d, struct kvd_work *w, const struct kvd_pool_append *a,
                       struct kvd_error *err);
kvd_op_phase kvd_op_copy_pages;

// -- op_append.c, for Step too ------------------------------------------------------------------
bool kvd_op_append_room(struct kvd_daemon *d, struct kvd_work *w);
int kvd_op_append_prepare(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err);
kvd_op_phase kvd_op_look_for_nonfinite, kvd_op_append_demote, kvd_op_append_store;
// Of the run that the executor is at, whose items are filled in; and the error for w->nonfinite.
struct kvd_append_params kvd_op_append_params(struct kvd_work *w, enum kvd_append_part part);
int kvd_op_explain_nonfinite(struct kvd_work *w);
void kvd_op_append_conclude(struct kvd_daemon *d, struct kvd_work *w, bool commit);
// An item's part of the run that the executor is at.
void kvd_op_append_fill(const struct kvd_work *w, const struct kvd_work_item *item,
                        struct kvd_append_item *out);
// Counts what an append of the work's layout has compressed.
void kvd_op_count_stored(struct kvd_daemon *d, const struct kvd_work *w,
                         const struct kvd_pool_append *a);

// -- page_keys.c: what page calls name -----------------------------------------------------------
// The spaces of a session's pages that are encoded, and of exact ones. KVD_E_PRECONDITION: it was
// opened without page calls; KVD_E_INVALID: the space has no or too many bytes.
int kvd_page_spaces(struct kvd_daemon *d, const struct kvd_session *s,
                    const ProtobufCBinaryData *space, struct kvd_blocks_space out[2],
                    struct kvd_error *err);
// How many keys of `key_bytes` there are, at most `most`. KVD_E_INVALID.
int kvd_page_count(uint32_t key_bytes, const ProtobufCBinaryData *keys, uint32_t most, uint32_t *n,
                   struct kvd_error *err);
// Which of n pages are there: entries in both spaces, and the better kind of each that is not
// superseded.
void kvd_page_find(struct kvd_daemon *d, const struct kvd_blocks_space spaces[2],
                   struct kvd_prefix_key *const keys[2], bool use, uint32_t n,
                   uint32_t *const entries[2], uint8_t *kinds);
// The same, superseded or not.
void kvd_page_find_best(struct kvd_daemon *d, const struct kvd_blocks_space spaces[2],
                        struct kvd_prefix_key *const keys[2], bool use, uint32_t n,
                        uint32_t *const entries[2], uint8_t *kinds);
// Notes in w->pages->kinds what lookups find now.
void kvd_op_pages_now(struct kvd_daemon *d, struct kvd_work *w);
void kvd_op_pages_free(struct kvd_daemon *d, struct kvd_work_pages **pages);
// The error for what a check of pages said, which was no KVD_OK. pages: the first of
// each item that was checked.
int kvd_op_explain_pages(struct kvd_work *w, int rc, const uint32_t *pages);

// -- op_paged.c: pages in an engine's own blocks --------------------------------------------------
// Resolves and checks a reference, as w->pages->paged; `written`: its blocks are, so that no two
// may be one. KVD_E_INVALID and KVD_E_NOT_FOUND say what is wrong.
int kvd_op_paged_check(struct kvd_work *w, struct kvd_session *s, const Kvd__V1__PagedRef *ref,
                       bool written, struct kvd_error *err);
kvd_op_phase kvd_op_paged_put, kvd_op_paged_get;

// -- op_attend.c, for Step too ------------------------------------------------------------------
int kvd_op_attend_alloc(struct kvd_work *w, struct kvd_error *err);
// Whether item i, whose pages and lengths are noted, can be attended to.
int kvd_op_attend_check(const struct kvd_work *w, uint32_t i, struct kvd_error *err);
kvd_op_phase kvd_op_attend_run;
// Of the run that the executor is at, whose items are filled in.
struct kvd_attend_params kvd_op_attend_params(struct kvd_work *w);
int kvd_op_attend_reply(struct kvd_daemon *d, struct kvd_work *w, struct kvd_error *err);

#endif
