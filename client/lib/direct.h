// Inside direct mode: what direct.c shares with the two sides that run kernels (direct_cpu.c,
// direct_cuda.c).
#ifndef KVD_CLIENT_DIRECT_H
#define KVD_CLIENT_DIRECT_H

#include <math.h>

#include "client/lib/client.h"
#include "kernels/backend.h"

enum {
    KVD_DIRECT_BEHIND = 64,        // tokens that kvd may be behind before a step waits, by default
    KVD_DIRECT_BEHIND_MAX = 16384, // and at most
    KVD_DIRECT_STEP = 16,          // new tokens of a slot in a step, at most
    KVD_DIRECT_JOBS = 8,           // marks of chunks that are written, at most under way
    KVD_DIRECT_ADOPTED = KVD_DIRECT_JOBS, // the mark of the latest change of views
    KVD_DIRECT_MARKS,
};

// What kvd had stored when it was asked.
struct direct_view {
    uint64_t stored;
    struct {
        uint64_t hist_end;
        uint32_t n_codec; // history pages; those that a window has freed have address 0
    } planes[KVD_MAX_PLANES];
};

// A plane of the session's layout, and the tables of its pages.
struct direct_plane {
    struct kvd_plane shape;
    uint32_t window; // the plane's or the caller's, the smaller one; 0: none
    int rotation_fd; // -1: not lent
    struct kvd_rotation *rotation;
    uint32_t codec_stride, bf16_stride;
    // What kernels read; only the caller's thread writes it. [slots], [slots][stride]
    uint32_t *hist_end;
    uint64_t *codec, *bf16;
    uint64_t *next_codec, *next_bf16; // of the slots' next views; the lock guards them
};

// Where a layer is: among the plane's.
struct direct_layer {
    uint32_t plane, at;
};

struct direct_slot {
    uint64_t sequence;        // 0: empty
    uint64_t length;          // tokens, those of a running step included
    struct direct_view now;   // what the kernels of the latest step see
    struct direct_view next;  // what those of the next will
    uint64_t older;           // `stored` of the oldest view that a kernel may still use
    uint64_t appended;        // tokens that kvd has
    uint64_t sent, request;   // an append up to there whose end is not known; 0: none
    uint64_t target, written; // tokens that kvd is to have; those that are in memory, too
    bool fresh;               // next is newer than now
    bool dirty;               // the kernels' page table has not the latest yet
};

// A mark on the stream, and how far each slot's tokens are written when it has passed.
struct direct_job {
    uint32_t mark;
    uint64_t *targets;
};

struct direct_ops {
    // Makes the tail (d->tail) and what kernels want. On failure deinit follows. forget is deinit
    // in a forked child: what is host memory goes, the rest is the parent's.
    int (*init)(struct kvd_direct *d, struct kvd_error *err);
    void (*deinit)(struct kvd_direct *d);
    void (*forget)(struct kvd_direct *d);
    // Waits until `update` has room for another step, on a GPU that is steps behind its host.
    // Without the lock, which the thread wants meanwhile. NULL: there is always room.
    int (*ready)(struct kvd_direct *d, struct kvd_error *err);
    // Brings lengths and dirty page tables to the kernels that follow on the stream.
    int (*update)(struct kvd_direct *d, void *stream, struct kvd_error *err);
    int (*store)(struct kvd_direct *d, void *stream, uint32_t layer, const void *k, const void *v,
                 struct kvd_error *err);
    int (*attend)(struct kvd_direct *d, void *stream, uint32_t layer, const void *q, void *o,
                  float *lse, struct kvd_error *err);
    // Marks what is on the stream; whether, and until, it has been done. Any thread.
    int (*mark)(struct kvd_direct *d, void *stream, uint32_t mark, struct kvd_error *err);
    bool (*passed)(struct kvd_direct *d, uint32_t mark);
    int (*wait)(struct kvd_direct *d, uint32_t mark, struct kvd_error *err);
};

struct kvd_direct {
    kvd_client *client;
    kvd_direct_options options;
    kvd_attention attention;
    struct direct_plane planes[KVD_MAX_PLANES]; // all of the same heads and head_dims
    uint32_t n_planes, n_layers;
    struct direct_layer layers[KVD_MAX_LAYERS];
    struct kvd_backend *backend;
    const struct direct_ops *ops;
    void *side; // the ops' own

    // The fd socket, the arena, and the order of MapSequences calls.
    pthread_mutex_t socket_lock;
    struct kvd_arena *arena;
    // Per extent: whether it is mapped, and which memory.
    bool *mapped;
    uint64_t *memory;

    kvd_buffer *tail; // K [layers][slots][ring][kv_heads][dim_k], then V alike
    uint64_t tail_v;  // where V begins
    // Rows of a slot's tail: those that kvd may be behind, a chunk that fills, and a step. A whole
    // number of chunks.
    uint32_t ring;

    // What kernels read, as in the planes. [slots]; theirs follow, so that `length` begins one
    // piece of kvd_direct_numbers.
    uint32_t *length, *tail_tokens;
    uint64_t *tables; // the planes', in one piece

    pthread_mutex_t lock; // of what follows
    pthread_cond_t work, progress;
    pthread_t thread;
    bool started, stop, busy;
    bool owed;      // a mark that found no room among the jobs
    uint32_t *list; // the thread's own, as items
    kvd_item *items;
    bool quiet; // flushing: no kernel is under way, none will be queued
    struct direct_slot *slots;
    struct direct_job jobs[KVD_DIRECT_JOBS]; // a ring
    uint32_t first_job, n_jobs;
    void *stream; // of the latest step
    bool in_step;
    struct kvd_error failure; // of the latest append
    uint64_t sessions;        // the client's count of them, at its opening
    uint64_t close_by;        // when closing has to be over; until then far away
};

// Heads and head_dims are those of any plane.
static inline const struct kvd_plane *direct_shape(const struct kvd_direct *d)
{
    return &d->planes[0].shape;
}

static inline uint64_t direct_row_bytes(const struct kvd_direct *d, bool v)
{
    const struct kvd_plane *g = direct_shape(d);
    return (uint64_t)g->kv_heads * (v ? g->head_dim_v : g->head_dim_k) * 2;
}

// Where a layer's tail begins in d->tail.
static inline uint64_t direct_layer_at(const struct kvd_direct *d, uint32_t layer, bool v)
{
    return (v ? d->tail_v : 0) +
           (uint64_t)layer * d->options.slots * d->ring * direct_row_bytes(d, v);
}

// Attention sinks of a layer, one for each q head; NULL: none.
static inline const float *direct_sinks(const struct kvd_direct *d, uint32_t layer)
{
    const kvd_client *c = d->client;
    return c->n_sinks ? c->sinks + (uint64_t)layer * direct_shape(d)->q_heads : NULL;
}

static inline float direct_scale(const struct kvd_direct *d)
{
    float scale = d->attention.scale;
    return scale != 0 ? scale : 1 / sqrtf((float)direct_shape(d)->head_dim_k);
}

extern const struct direct_ops kvd_direct_cpu;
#ifdef KVD_CUDA
extern const struct direct_ops kvd_direct_cuda;
#endif

// direct_planes.c: takes the session's layout; then makes the tables and the slots, which are
// empty.
int kvd_direct_take_layout(struct kvd_direct *d, struct kvd_error *err);
int kvd_direct_make_tables(struct kvd_direct *d, struct kvd_error *err);
uint64_t kvd_direct_numbers(const struct kvd_direct *d);
struct direct_slot kvd_direct_empty(const struct kvd_direct *d);
// The slot's kernels are to see its next view.
void kvd_direct_adopt_slot(struct kvd_direct *d, uint32_t slot);

// mapping.c: one MapSequences call, with the descriptors that come with it. For slot i of `list`,
// fills its `next` view and tables. n 0: only the pool's layout and the rotation set.
int kvd_direct_map(struct kvd_direct *d, const uint32_t *list, uint32_t n, uint64_t deadline,
                   struct kvd_error *err);
// Takes what the fd socket has: extents to map or to unmap.
int kvd_direct_read_socket(struct kvd_direct *d, struct kvd_error *err);
// What each plane is rotated by, in the backend's memory; nothing for bf16.
int kvd_direct_load_rotations(struct kvd_direct *d, struct kvd_error *err);

#endif
