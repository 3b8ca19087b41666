// Inside libkvd: a client, its session, and calls that survive a daemon's restart.
#ifndef KVD_CLIENT_CLIENT_H
#define KVD_CLIENT_CLIENT_H

#include <pthread.h>
#include <stdatomic.h>

#include "client/lib/channel.h"
#include "client/lib/gate.h"
#include "kvd.pb-c.h"
#include "kvd/kvd.h"
#include "proto/kvd_limits.h"

// A mapping of cuMemCreate's memory in this process.
struct kvd_gpu_segment {
    uintptr_t at;
    uint64_t bytes;
};

struct kvd_buffer {
    kvd_client *client;
    kvd_buffer *next;
    bool local; // this process's own: kvd is elsewhere
    bool idle;  // libkvd's own, for pages, and no call uses it; under buffers_lock
    bool owned; // data is GPU memory of libkvd's own
    // Under buffers_lock (registered.c):
    bool engine;   // made by kvd_pages_register
    bool closing;  // no call uses it any more but those that do
    uint64_t uses; // page calls that are under way in it
    uint64_t key;
    _Atomic uint64_t
        id; // changes when another thread reconnects; ids of an old session name nothing
    Kvd__V1__RegisterBufferRequest__Memory kind;
    int fd;                           // of a memfd or a CUDA_FD; -1
    uint8_t ipc[64];                  // of CUDA_IPC
    struct kvd_gpu_segment *segments; // of CUDA_SEGMENTS, side by side; their descriptors are made
                                      // whenever it is registered, and not kept
    uint32_t n_segments;
    void *data;    // of a memfd, mapped; on a GPU as the caller said
    int device;    // where data of a GPU is
    uint64_t at;   // where data begins in what is registered
    uint64_t size; // from there
};

// Of the tensors of one layer.
struct kvd_layer_shape {
    uint32_t q_heads, kv_heads, dim_k, dim_v, dim_q;
};

struct kvd_client {
    kvd_client *next; // fork.c
    bool forked;      // in a child of the process that opened it
    bool remote;      // over TCP: nothing is shared
    char *address, *namespace_name, *client_name, *codec, *rotation_set;
    uint32_t *layers;
    Kvd__V1__Layout layout; // refers to the copies above
    Kvd__V1__Windows windows;
    Kvd__V1__Plane planes[KVD_MAX_PLANES], *plane_refs[KVD_MAX_PLANES];
    Kvd__V1__Windows plane_windows[KVD_MAX_PLANES];
    char *plane_codecs[KVD_MAX_PLANES];
    uint32_t *plane_layers;
    struct kvd_layer_shape *shapes; // by position in layers
    float *sinks;
    uint32_t n_sinks;
    uint32_t timeout_ms, lease_ms;
    struct kvd_channel *channel;
    struct kvd_lease *lease; // over TCP
    // Guards what a reconnect replaces. Calls hold it for reading.
    struct kvd_gate gate;
    uint64_t epoch;    // counts connections: sessions opened, and resumed
    uint64_t sessions; // counts sessions: what an earlier one held is lost
    bool lost;         // the connection is gone and there is no new one yet
    bool half;         // but for buffers that are to be registered there
    char why[200];     // why the latest session was not the earlier one
    uint64_t resuming; // the request that is to resume the session; 0: none yet
    _Atomic bool on_cpu;
    _Atomic bool takes_paged;        // this kvd: references to blocks
    _Atomic uint32_t takes_segments; // this kvd, in a call; 0: it does not know them
    int sock;                        // fd socket; -1 over TCP
    char session[96];
    Kvd__V1__OpenSessionReply *opened;
    pthread_mutex_t buffers_lock;
    pthread_cond_t buffers_idle; // a page call that used some is over
    kvd_buffer *buffers;
    bool pages; // it was opened for page calls
    _Atomic uint64_t next_request, next_key;
    struct kvd_stream *events;
    Kvd__V1__Event *last_event; // whose keys the program may be reading
    uint64_t events_epoch;
    uint64_t last_number; // of the event that was seen last; 0: none
    kvd_direct *direct;
    pthread_mutex_t enqueuer_lock; // of its making
    struct kvd_enqueuer *enqueuer; // made on first use
    kvd_queue *queues;             // under buffers_lock
};

// A public structure that may grow: its size here, and that of the first release. sized.c
struct kvd_sized {
    const char *name;
    uint32_t size, least;
};
extern const struct kvd_sized kvd_sized_options, kvd_sized_info, kvd_sized_sequence_info,
    kvd_sized_item, kvd_sized_attention, kvd_sized_direct_options, kvd_sized_event,
    kvd_sized_plane_options, kvd_sized_prompt, kvd_sized_match, kvd_sized_match_options,
    kvd_sized_published, kvd_sized_page_keys, kvd_sized_found, kvd_sized_paged, kvd_sized_ended;
// What a program of another age gave, as this library has it.
int kvd_sized_take(const struct kvd_sized *type, const void *from, void *to, struct kvd_error *err);
// Whether there is room to write one to; and writes as much of it as the program knows.
int kvd_sized_check(const struct kvd_sized *type, const void *out, struct kvd_error *err);
void kvd_sized_give(const struct kvd_sized *type, const void *from, void *to);
// The same for a call's items: *own is to be freed.
int kvd_items_take(const kvd_item *items, uint32_t count, kvd_item **own, struct kvd_error *err);

// Gives those a request id that have none, so that a call that is sent again is known.
void kvd_items_name(kvd_client *c, kvd_call_kind kind, kvd_item *items, uint32_t count);

// Has a public function refuse pointers that kvd.h does not allow to be NULL. Pairs of its name
// there and what was given.
#define KVD_WANT(err, ...)                                                                         \
    do {                                                                                           \
        const void *const kvd_wanted_[] = {__VA_ARGS__};                                           \
        kvd_result kvd_missing_ = kvd_client_want(kvd_wanted_, KVD_LEN(kvd_wanted_), err);         \
        if (kvd_missing_)                                                                          \
            return kvd_missing_;                                                                   \
    } while (0)
kvd_result kvd_client_want(const void *const *wanted, size_t n, kvd_failure *err);

// planes.c: the layout that the options ask for, in the client's own memory. What could not even be
// copied is refused; the rest is the daemon's to judge.
int kvd_client_set_layout(kvd_client *c, const kvd_options *o, struct kvd_error *err);

// shapes.c: calls are checked before anything is sent. KVD_E_INVALID says what is wrong.
int kvd_check_attention(const kvd_attention *a, struct kvd_error *err);
int kvd_check_compute(const kvd_client *c, kvd_call_kind kind, kvd_layers layers,
                      const kvd_attention *a, const kvd_item *items, uint32_t count,
                      struct kvd_error *err);
int kvd_check_rotate(const kvd_client *c, kvd_row_kind kind, kvd_layers layers, uint32_t rows,
                     uint32_t heads, const kvd_tensor_ref *x, const kvd_tensor_ref *y,
                     struct kvd_error *err);
int kvd_check_read(const kvd_client *c, kvd_layers layers, uint64_t begin, uint32_t count,
                   const kvd_tensor_ref *k, const kvd_tensor_ref *v, struct kvd_error *err);
// A dense tensor of direct mode, of elements of `size` bytes. dim 1: an lse, aligned as its
// elements are, others to 16 bytes.
int kvd_check_dense(const char *name, const void *data, uint64_t bytes, uint64_t rows,
                    uint32_t heads, uint32_t dim, uint32_t size, struct kvd_error *err);

// When a call that begins now has to be over, by kvd_now_ms.
static inline uint64_t kvd_client_deadline(const kvd_client *c)
{
    return kvd_now_ms() + c->timeout_ms;
}
// Around whatever uses the session. Leaving with the failure of a connection that is gone makes a
// new one, and waits for a kvd that is started again as long as the session waits for that. It
// resumes the session: *again, do the same once more. Or there is a new one: KVD_ERR_LOST.
int kvd_client_enter(kvd_client *c, uint64_t deadline, struct kvd_error *err);
kvd_result kvd_client_leave(kvd_client *c, int rc, const struct kvd_error *e, uint64_t deadline,
                            bool *again, kvd_failure *err);
// Whether kvd has closed the fd socket, or does so within the time.
bool kvd_client_hung_up(const kvd_client *c, int ms);
// Whether a session that lost its connection may still be resumed.
static inline bool kvd_client_resumes(const kvd_client *c)
{
    return c->opened && c->opened->resume_ms;
}
// A call within the session: `set_session` points to the request's session field.
kvd_result kvd_client_call(kvd_client *c, const char *method, void *request, char **set_session,
                           const ProtobufCMessageDescriptor *reply_type, void *reply,
                           kvd_failure *err);
kvd_result kvd_client_call_until(kvd_client *c, const char *method, void *request,
                                 char **set_session, const ProtobufCMessageDescriptor *reply_type,
                                 void *reply, uint64_t deadline, kvd_failure *err);

// fork.c: an open client is watched. KVD_E_PRECONDITION in a child: the first of a process whose
// parent had some open, the other with a client of the parent.
int kvd_fork_watch(kvd_client *c, struct kvd_error *err);
void kvd_fork_forget(kvd_client *c);
int kvd_fork_check(const kvd_client *c, struct kvd_error *err);

// An append, attend or step, with fences or without, of items as this library has them.
kvd_result kvd_client_compute(kvd_client *c, kvd_call_kind kind, kvd_layers layers,
                              const kvd_attention *attention, const kvd_item *items, uint32_t count,
                              Kvd__V1__Fence *wait, Kvd__V1__Fence *signal, uint64_t deadline,
                              kvd_failure *err);
// enqueue.c: sends what is queued, until the deadline, and stops. *q becomes NULL.
void kvd_enqueuer_free(struct kvd_enqueuer **q, uint64_t deadline);
// queue.c: frees all of a client's.
void kvd_queues_drop(kvd_client *c);
// pages.c: whether the client is for page calls; and what a put or, `written`, a get is about, as
// this library has it: checked, and pointing to what the program gave.
int kvd_pages_check_client(const kvd_client *c, struct kvd_error *err);
int kvd_pages_take(kvd_client *c, const kvd_bytes *space, const kvd_page_keys *keys,
                   const kvd_paged *paged, bool written, kvd_page_keys *own_keys,
                   kvd_paged *own_paged, struct kvd_error *err);
// gpu_memory.c: lets the GPU reach host memory; and has a stream write `value` at one address, then
// wait until it is at the other.
int kvd_gpu_map(void *data, uint64_t bytes, uint64_t *device, struct kvd_error *err);
void kvd_gpu_unmap(void *data);
// gpu_memory.c: what all of the bytes at `data` lie in: an allocation of cudaMalloc, or segments of
// cuMemCreate that are mapped side by side. KVD_E_INVALID, KVD_E_UNSUPPORTED.
struct kvd_gpu_extent {
    uintptr_t begin;
    uint64_t bytes;
    uint32_t n_segments; // 0: of cudaMalloc
};
int kvd_gpu_extent(const void *data, uint64_t bytes, struct kvd_gpu_extent *out,
                   struct kvd_error *err);
// segments.c: registers a buffer of CUDA_SEGMENTS, a part of them at a time.
int kvd_segments_register(kvd_client *c, kvd_buffer *b, uint64_t deadline, struct kvd_error *err);
// gpu_memory.c: a descriptor of a segment's memory, to be closed. KVD_E_INVALID: it is not mapped
// as it was, or cannot be shared so.
int kvd_gpu_export(const struct kvd_gpu_segment *segment, int device, int *fd,
                   struct kvd_error *err);
// registered.c: waits until no page call uses a buffer; none does from now on.
void kvd_registered_end(kvd_buffer *b);
// gpu_memory.c: KVD_E_PRECONDITION: memory at `at`, of this device, is not on the GPU that kvd runs
// on, by what it has said of that; KVD_E_UNAVAILABLE: that kvd has gone. Within the gate.
int kvd_gpu_same(const kvd_client *c, const void *at, int device, struct kvd_error *err);
// gpu_memory.c: whether the GPU of the client's buffers is lost to this process, as after a fault
// of another client of MPS; says so in *err.
bool kvd_gpu_lost(kvd_client *c, struct kvd_error *err);
int kvd_gpu_order(void *stream, uint64_t write_at, uint64_t wait_at, uint32_t value,
                  struct kvd_error *err);

// inline.c: a tensor over TCP. Its dims are those that were checked, elements of `size` bytes.
struct kvd_dims {
    uint32_t layers, tokens, heads, dim, size;
};
// Copies it into the request; inline_data is to be freed.
int kvd_inline_send(const kvd_tensor_ref *t, struct kvd_dims d, Kvd__V1__TensorRef *ref,
                    struct kvd_error *err);
// Copies it out of a reply.
int kvd_inline_receive(const kvd_tensor_ref *t, struct kvd_dims d, const ProtobufCBinaryData *from,
                       struct kvd_error *err);
// lease.c: keeps a session over TCP alive. Stopping may be done twice.
int kvd_lease_start(kvd_client *c, struct kvd_error *err);
void kvd_lease_stop(kvd_client *c);

// prompts.c: what tiers of these names have, at their places in a kvd_match or kvd_found. Those
// that this libkvd does not know are left out.
enum { KVD_CLIENT_TIERS = 3 };
void kvd_take_behind(char *const *tiers, size_t n_tiers, const uint32_t *behind, size_t n_behind,
                     uint32_t out[KVD_CLIENT_TIERS]);

// buffers.c: registers a buffer that has its memory and links it to the client. On failure *b is
// not freed.
kvd_result kvd_client_add_buffer(kvd_client *c, kvd_buffer *b, kvd_failure *err);
// With the session that is being opened.
int kvd_buffer_register(kvd_client *c, kvd_buffer *b, uint64_t deadline, struct kvd_error *err);
// Frees a buffer, but for its memory unless `unmap`; returns where that is. *b becomes NULL.
void *kvd_buffer_take(kvd_buffer **b, uint64_t deadline, bool unmap);
// Frees all, without a word to the daemon.
void kvd_buffers_drop(kvd_client *c);

kvd_result kvd_client_result(int code);
kvd_result kvd_client_fail(kvd_failure *err, const struct kvd_error *e);
// The other way round: a failure of the public API as a status.
int kvd_client_failed(const kvd_failure *failure, struct kvd_error *err);

#endif
