// Compute calls: Append, Attend, Step, Rotate, ReadTokens, MapSequences, PutPages and GetPages on
// their way through the daemon. What differs between them is a struct kvd_op (op.h).
//
//   1. a request is checked and made a work: tensors resolved to memory, sequences pinned
//   2. it waits for its fence (fences.c) and in its session's line (queue.c); strictly in order,
//   it starts when no call in flight writes what it uses
//   3. starting takes the pages (all sequences or none) and notes addresses; the executor runs the
//   kernels, in slices (run.c)
//   4. done: commit (or abort, and nothing has changed), unpin, reply
// At any time until then it can be cancelled: by its caller, its deadline, or its session's end. It
// owns what it uses: references to buffers and the layout, and pins of sequences.
#ifndef KVD_DAEMON_WORK_H
#define KVD_DAEMON_WORK_H

#include "daemon/core/part.h"
#include "daemon/rpc/rpc.h"
#include "daemon/sched/exec.h"
#include "daemon/sched/fences.h"
#include "daemon/sched/queue.h"
#include "daemon/session/room.h"
#include "daemon/session/session.h"
#include "kvd.pb-c.h"
#include "pool/blocks.h"
#include "proto/overlap.h"

struct kvd_work_item {
    uint64_t seq, position;
    uint64_t request; // names the append, for when it is sent again; 0: none
    uint32_t tokens;  // to append, and queries
    struct kvd_tensor q, k, v, o, lse;
    uint8_t *o_inline, *lse_inline; // outputs that go into the reply
    size_t o_len, lse_len;
    bool begun; // `append` wants commit or abort
    struct kvd_pool_append append;
    struct kvd_view *views; // by plane
};

// What a call's layers of one plane see of a sequence.
struct kvd_view {
    uint64_t length;
    struct kvd_pool_reach reach;
    uint32_t new_tokens; // that are not stored: they come from the worker's memory
    uint64_t *pages;     // bf16 pages, then codec pages; NULL: the call has no layer of the plane
    uint32_t n_bf16, n_codec;
    uint32_t codec_from; // MapSequences: the worker knows the codec pages before this one
};

// Consecutive layers of a call that are of one plane.
struct kvd_run {
    uint32_t plane;
    uint32_t layer_begin, layer_count; // among the plane's
    uint32_t at;                       // the first of them among the call's
};

// A block that an earlier kvd has left, to be compared with its checksum before it is used.
struct kvd_work_check {
    struct kvd_pool_block block;
    uint64_t sum; // that it has
};

// What a call of pages has besides (op_pages.c). Its sequences are made at its turn, and nobody
// else knows of them: an item for each run of pages that are encoded, then for each run of exact
// ones.
struct kvd_work_pages {
    struct kvd_blocks_space spaces[2]; // of pages that are encoded, and of exact ones
    const struct kvd_layout *shapes[2];
    struct kvd_rotation *const *rotations[2];
    struct kvd_prefix_key *keys[2], after[2]; // of each page in these; of the one before the first
    bool has_after;
    uint32_t n;
    uint8_t *kinds;     // of each: what is to be done with it, then what there is
    uint32_t *first;    // page of each item
    uint32_t n_encoded; // items
    uint32_t at;        // the one that the executor is at; of EncodePages the page
    // EncodePages: pages that lookups find encoded by it. Its first n_encoded items are written,
    // from the pages of as many others.
    uint32_t encoded;
    uint32_t stored; // pages that were new
    struct kvd_tensor k, v;
    struct kvd_work_paged *paged; // op_paged.c: instead of those; NULL: none
    uint8_t *k_inline, *v_inline;
    size_t k_len, v_len;
    struct kvd_error err; // of what could not be settled
};

struct kvd_work {
    struct kvd_job job;
    struct kvd_waiter waiter;         // in the line of its session
    struct kvd_parked parked;         // at its fence, before that
    struct kvd_room room;             // at its turn, until there is some
    struct kvd_work *previous, *next; // among all
    const struct kvd_op *op;
    bool listed;
    struct kvd_call *call;
    uint64_t appender;      // its session's identity in the pool
    uint64_t fitted_length; // as the session's
    uint32_t layout;        // referenced until done, and with it the rotation set
    const struct kvd_layout *shape;
    const struct kvd_plane *plane; // whose heads and head_dim the call's tensors have
    struct kvd_rotation *const *rotations;
    uint32_t layer_begin, layer_count;
    struct kvd_run *runs;
    uint32_t n_runs, planes; // planes: those that have a run, one bit each
    struct kvd_view *views;  // [items][the layout's planes]
    struct kvd_work_item *items;
    uint32_t n_items, pinned;
    bool locked, writes;         // writes: its sequences change: nobody else may use them meanwhile
    struct kvd_buffer **buffers; // referenced until done
    uint32_t n_buffers, cap_buffers;
    struct kvd_overlap *spans; // of its tensors in buffers, until it is checked
    uint32_t n_spans, cap_spans;
    uint64_t inline_bytes;
    struct kvd_fence signal;
    float scale, softcap;
    uint32_t window;
    float *sinks; // the session's of the call's layers, a copy that outlives it; NULL: none
    // What the executor gets. Items are filled in run by run.
    uint32_t run;
    bool filled; // items are those of `run`
    struct kvd_append_item *append_items;
    uint32_t *append_index; // item of each
    uint32_t n_append;
    struct kvd_copy *copies; // pages that are copied before they are written
    uint32_t n_copies;
    struct kvd_attend_item *attend_items;
    struct kvd_rotate_params rotate; // of all runs
    struct kvd_read_params read;     // of all runs
    struct kvd_work_pages *pages;    // of PutPages and GetPages, else NULL
    struct kvd_nonfinite nonfinite;
    struct kvd_work_check *checks;
    uint32_t n_checks, cap_checks, checked;
    uint32_t phase, copied;
    struct kvd_error err;
    struct kvd_error why; // of its being cancelled
};

// A work of n items for a call; NULL when memory is short.
struct kvd_work *kvd_work_new(struct kvd_call *call, const struct kvd_session *s,
                              const struct kvd_op *op, size_t n, struct kvd_error *err);
// Frees a work that was never queued.
// Whether a session has calls that are not done.
bool kvd_work_left(const struct kvd_daemon *d, uint64_t session);
void kvd_work_free(struct kvd_daemon *d, struct kvd_work *w);
// Pins its sequences and has it wait for its turn, or its fence first; from here on it answers its
// call itself.
void kvd_work_queue(struct kvd_daemon *d, struct kvd_work *w);
// run.c: the executor's part, a kvd_job's run.
bool kvd_work_run(struct kvd_daemon *d, struct kvd_job *job);

// Calls that wait or run.
uint32_t kvd_compute_queued(const struct kvd_daemon *d);

extern const struct kvd_part kvd_part_works;

#endif
