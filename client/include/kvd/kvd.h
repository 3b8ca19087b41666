/* libkvd: a worker's side of kvd, the shared KV-cache memory daemon. Plain C, no other headers
 * wanted.
 *
 * A kvd_client is one session with a daemon, for one model geometry. Its functions may be called
 * from several threads at once, but for kvd_close; calls on the same sequence are the caller's to
 * order.
 *
 * Functions return KVD_SUCCESS or a kvd_result; with a failure *err (may be NULL) says what was
 * wrong and how to mend it, and nothing has changed. Outputs are written on success only.
 *
 * If the daemon is restarted, the next call opens a new session, registers the buffers again, and
 * returns KVD_ERR_LOST once: sequences of the old session are gone, buffers keep their addresses
 * and go on working.
 *
 * Every function returns within the client's timeout, whatever has become of the daemon; kvd_close
 * takes 2 s at most. Nothing waits for a daemon that is not there: KVD_ERR_UNAVAILABLE comes at
 * once, and the first call after it is back finds it.
 *
 * A forked child cannot use its parent's clients: functions fail with KVD_ERR_PRECONDITION, and
 * those that close and free release the child's memory without a word to the daemon. kvd_open fails
 * too in a child of a process that has ever had a client, as gRPC does not survive a fork: open
 * clients after forking, or exec. All descriptors are close-on-exec.
 *
 * Structures that may grow begin with `size`: sizeof of the structure, as the program was compiled
 * (KVD_NEW sets it). What a library knows and an older program does not is taken as 0, and is not
 * written; a newer program's fields that a library does not know must be 0. All items of one call
 * have the same size. A size of 0 is refused.
 *
 * Tensors: [layers][tokens][heads][head_dim], head_dim contiguous, little-endian bf16 unless dtype
 * says f32. Every tensor is checked against the client's geometry and its buffer's size before
 * anything is sent: KVD_ERR_INVALID names the item, the tensor, what is expected and what was
 * given. */
#ifndef KVD_KVD_H
#define KVD_KVD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVD_API __attribute__((visibility("default")))

/* A structure with its size: kvd_info info = KVD_NEW(kvd_info); kvd_options o =
 * KVD_NEW(kvd_options, .address = a, .layers = ids). */
#define KVD_NEW(type, ...) ((type){.size = sizeof(type), __VA_ARGS__})

typedef enum kvd_result {
    KVD_SUCCESS = 0,
    KVD_ERR_INVALID,      /* malformed or out of range */
    KVD_ERR_NOT_FOUND,    /* unknown, freed or foreign id or name */
    KVD_ERR_EXISTS,       /* name taken */
    KVD_ERR_PRECONDITION, /* not in this state: wrong position, wrong geometry */
    KVD_ERR_EXHAUSTED,    /* quota, pool or a limit */
    KVD_ERR_DENIED,       /* not allowed in this namespace */
    KVD_ERR_UNAVAILABLE,  /* daemon not reachable, draining, or store down: try again */
    KVD_ERR_TIMEOUT,
    KVD_ERR_CORRUPT, /* a rotation set failed verification */
    KVD_ERR_LOST,    /* the daemon restarted: old sequences are gone, the client works again */
    KVD_ERR_INTERNAL,
} kvd_result;

typedef struct kvd_failure {
    kvd_result code;
    char text[512];
} kvd_failure;

typedef struct kvd_client kvd_client;

typedef struct kvd_options {
    uint32_t size;
    /* "unix:/path" or "host:port"; NULL: $KVD_ADDRESS or unix:/run/kvd/kvd.sock */
    const char *address;
    const char *namespace_name; /* NULL: "default" */
    const char *client_name;    /* shown to operators; NULL: the program's name */
    uint32_t timeout_ms;        /* per call, and for kvd_open; 0: 30,000 */
    /* Geometry of the model's KV cache. */
    const uint32_t *layers; /* model layer ids that hold KV, ascending */
    uint32_t n_layers;
    uint32_t q_heads, kv_heads;
    uint32_t head_dim_k, head_dim_v; /* 64, 80, 96, 112, 128, 192 or 256, the same; or both of 64,
                                        128 and 256; or 192 and 128 */
    const char *codec; /* "int2" (NULL), "int2c", "int2-lm", "turboquant-2", -3, -4, "bf16" */
    const char *rotation_set; /* "model@tag", "sha256:...", "hadamard", "random", "identity";
                                 NULL: hadamard, or random with turboquant */
    uint32_t sink, recent;    /* tokens kept in bf16; both 0: 64 and 256 */
    bool no_windows;          /* really no sink and no recent window */
    /* For "host:port", where nothing is shared: tensors travel with their calls (64 MiB a call),
     * and a session that is not closed ends lease_ms after its worker was last heard of (a thread
     * of libkvd says so; 0: 60,000, at least 1,000). No direct mode. */
    uint32_t lease_ms;
    /* PEM files. tls_ca: who may have signed the daemon's certificate; NULL: no TLS. cert and key:
     * the worker's own, which a daemon beyond loopback wants. */
    const char *tls_ca, *tls_cert, *tls_key;
    const char *tls_server_name; /* what the certificate must name; NULL: the address's host */
} kvd_options;

/* Connects and opens a session. Waits for the rotation set to be fetched, at most timeout_ms. *out
 * is to be closed. */
KVD_API kvd_result kvd_open(const kvd_options *options, kvd_client **out, kvd_failure *err);
/* Ends the session and frees the client and its buffers. *client may be NULL; it becomes NULL. */
KVD_API void kvd_close(kvd_client **client);

typedef struct kvd_info {
    uint32_t size;
    const char *version, *backend, *instance;   /* valid until the client reconnects or closes */
    const char *rotation_set;                   /* as resolved: a digest or a built-in's name */
    uint64_t bf16_page_bytes, codec_page_bytes; /* a page is 64 tokens of all layers */
    uint32_t sink, recent;
} kvd_info;
KVD_API kvd_result kvd_get_info(kvd_client *client, kvd_info *out, kvd_failure *err);

/* -- buffers: memory shared with the daemon -------------------------------------------------- */

typedef struct kvd_buffer kvd_buffer;
/* Makes and registers `bytes` of shared memory, zeroed. Over TCP it is the process's own memory,
 * and tensors in it are copied into calls and out of replies. */
KVD_API kvd_result kvd_buffer_new(kvd_client *client, uint64_t bytes, kvd_buffer **out,
                                  kvd_failure *err);
/* Registers memory of the GPU that kvd runs on: `bytes` from `data` on, from cudaMalloc or an
 * allocator above it, such as PyTorch's. It stays the caller's and must outlive the buffer. Work
 * that writes or reads it must have finished before a call that uses it: synchronize its stream;
 * after a cudaMemcpy from host memory too, which may return before it is done. */
KVD_API kvd_result kvd_buffer_cuda(kvd_client *client, void *data, uint64_t bytes, kvd_buffer **out,
                                   kvd_failure *err);
/* The same for who has a cudaIpcMemHandle_t (64 bytes) of the allocation already; data begins
 * `offset` bytes into it. */
KVD_API kvd_result kvd_buffer_cuda_ipc(kvd_client *client, const void *handle, uint64_t offset,
                                       uint64_t bytes, kvd_buffer **out, kvd_failure *err);
/* The same for memory of cuMemCreate, by a descriptor of cuMemExportToShareableHandle, which stays
 * the caller's. bytes: a multiple of 2 MiB. */
KVD_API kvd_result kvd_buffer_cuda_fd(kvd_client *client, int fd, uint64_t bytes, kvd_buffer **out,
                                      kvd_failure *err);
/* Frees it. Calls that use it must have returned. */
KVD_API void kvd_buffer_free(kvd_buffer **buffer);
/* Frees it, but for its memory, which stays where it is and, if kvd_buffer_new made it, is the
 * caller's to munmap (its size rounded up to pages): for languages whose arrays may outlive a
 * client. Returns that memory. */
KVD_API void *kvd_buffer_detach(kvd_buffer **buffer);
/* Where it is; NULL on a GPU, if the caller gave a handle. */
KVD_API void *kvd_buffer_data(kvd_buffer *buffer);
KVD_API uint64_t kvd_buffer_size(const kvd_buffer *buffer);

typedef enum kvd_dtype_t { KVD_BF16 = 0, KVD_F32 = 1 } kvd_dtype_t;

typedef struct kvd_tensor_ref {
    kvd_buffer *buffer;
    uint64_t offset;                                  /* bytes */
    uint64_t layer_stride, token_stride, head_stride; /* bytes; 0: dense */
    kvd_dtype_t dtype;                                /* q, o and read-outs; K and V are bf16 */
} kvd_tensor_ref;

/* -- sequences ------------------------------------------------------------------------------- */

KVD_API kvd_result kvd_sequences_create(kvd_client *client, uint32_t count, uint64_t *ids,
                                        kvd_failure *err);
/* Copy-on-write children. */
KVD_API kvd_result kvd_sequence_fork(kvd_client *client, uint64_t sequence, uint32_t count,
                                     uint64_t *ids, kvd_failure *err);
KVD_API kvd_result kvd_sequence_truncate(kvd_client *client, uint64_t sequence, uint64_t length,
                                         kvd_failure *err);
/* Names a sequence in the namespace: it outlives this session until it is unpublished or evicted.
 */
KVD_API kvd_result kvd_sequence_publish(kvd_client *client, uint64_t sequence, const char *name,
                                        bool replace, kvd_failure *err);
typedef struct kvd_sequence_info {
    uint32_t size;
    uint64_t sequence, length;
    uint64_t sink_tokens, history_tokens, recent_tokens; /* of the length; history is compressed */
    uint64_t pending_length; /* of an append that has not reached every layer */
    uint32_t pending_layers;
    uint64_t bytes;
    uint32_t holders; /* sessions */
    char name[129];
    uint32_t holds; /* of this session: how many times it is to be freed */
} kvd_sequence_info;
/* Every attach is a hold of its own: the sequence stays until it was freed as often. */
KVD_API kvd_result kvd_sequence_attach(kvd_client *client, const char *name, kvd_sequence_info *out,
                                       kvd_failure *err);
KVD_API kvd_result kvd_sequences_free(kvd_client *client, const uint64_t *ids, uint32_t count,
                                      bool unpublish, kvd_failure *err);
KVD_API kvd_result kvd_sequence_describe(kvd_client *client, uint64_t sequence,
                                         kvd_sequence_info *out, kvd_failure *err);

/* -- work ------------------------------------------------------------------------------------ */

typedef struct kvd_layers {
    uint32_t begin, count; /* positions in options.layers; count 0: all from begin */
} kvd_layers;

typedef struct kvd_item {
    uint32_t size;
    uint64_t sequence;
    uint64_t position;   /* append, step: where the new tokens go: the sequence's length */
    uint32_t tokens;     /* append, step: new tokens; attend: queries, at the sequence's end */
    kvd_tensor_ref k, v; /* append, step: [layers][tokens][kv_heads][head_dim] */
    kvd_tensor_ref q, o; /* attend, step: [layers][tokens][q_heads][head_dim] */
    kvd_tensor_ref lse;  /* attend, step: f32 [layers][tokens][q_heads]; buffer NULL: not wanted */
    /* append, step: where to write whether this item's tokens had been applied before, so that this
     * call has only been answered again; NULL: not wanted. With kvd_enqueue it must stay until
     * kvd_enqueued has returned. */
    bool *replayed;
    /* append, step: names the item, for when the call is made again after a failure that leaves
     * open whether it was applied (a lost reply): the same number is recognized and nothing is
     * stored twice. From kvd_request_new, or any other not used before; 0: a call that is made
     * again fails with KVD_ERR_PRECONDITION if it had been applied. */
    uint64_t request;
} kvd_item;

typedef struct kvd_attention {
    uint32_t size;
    float scale;     /* 0: 1/sqrt(head_dim_k) */
    float softcap;   /* 0: none */
    uint32_t window; /* sliding window in tokens, at most 16,777,216; 0: none */
} kvd_attention;

/* A number that names an item of an append or step. Never 0. Any thread. */
KVD_API uint64_t kvd_request_new(kvd_client *client);
/* Appends tokens. Safe to repeat with the same item.request: an append that was applied is skipped,
 * and item.replayed says so. Whoever appends where another holder of the sequence has appended
 * since gets KVD_ERR_PRECONDITION. Layers must be filled in ascending order. */
KVD_API kvd_result kvd_append(kvd_client *client, kvd_layers layers, const kvd_item *items,
                              uint32_t count, kvd_failure *err);
/* Attention of the last `tokens` positions, causal among them. attention NULL: defaults. A query
 * that is not finite, or whose logits exceed float32, gets NaN in its own o and lse, and others do
 * not change. */
KVD_API kvd_result kvd_attend(kvd_client *client, kvd_layers layers, const kvd_attention *attention,
                              const kvd_item *items, uint32_t count, kvd_failure *err);
/* Attends over what is stored and the new tokens, then appends these. */
KVD_API kvd_result kvd_step(kvd_client *client, kvd_layers layers, const kvd_attention *attention,
                            const kvd_item *items, uint32_t count, kvd_failure *err);
/* y = x R_K (or x R_V; inverse: the transpose), heads being kv_heads or q_heads. y may be x. */
KVD_API kvd_result kvd_rotate(kvd_client *client, bool v, bool inverse, kvd_layers layers,
                              uint32_t rows, uint32_t heads, const kvd_tensor_ref *x,
                              const kvd_tensor_ref *y, kvd_failure *err);
/* Dequantizes tokens [begin, begin + count) to [layers][count][kv_heads][head_dim], un-rotated.
 * k or v may be NULL: not wanted. */
KVD_API kvd_result kvd_read_tokens(kvd_client *client, kvd_layers layers, uint64_t sequence,
                                   uint64_t begin, uint32_t count, const kvd_tensor_ref *k,
                                   const kvd_tensor_ref *v, kvd_failure *err);

/* -- calls in a stream's order ---------------------------------------------------------------
 *
 * An append, attend or step that takes its turn on a CUDA stream of the worker: kvd starts when
 * what was on the stream before is done, and what comes after waits for kvd's outputs. kvd_enqueue
 * returns at once; the next calls may be enqueued meanwhile and are with kvd before their turn.
 * items are copied; their buffers must stay. Not while a graph is captured. At most 16 streams a
 * client. On the CPU backend the call is made at once; a GPU wants the unix: address. */

typedef enum kvd_call_kind { KVD_CALL_APPEND = 0, KVD_CALL_ATTEND, KVD_CALL_STEP } kvd_call_kind;

KVD_API kvd_result kvd_enqueue(kvd_client *client, void *stream, kvd_call_kind kind,
                               kvd_layers layers, const kvd_attention *attention,
                               const kvd_item *items, uint32_t count, kvd_failure *err);
/* Waits until all calls that were enqueued have been answered (outputs may still be under way on
 * the streams), and returns the first failure since it was last called, or KVD_ERR_TIMEOUT when
 * some are still under way after the client's timeout. A call that failed has
 * written no output; what the stream did after it used old values. */
KVD_API kvd_result kvd_enqueued(kvd_client *client, kvd_failure *err);

/* -- direct mode -----------------------------------------------------------------------------
 *
 * The worker attends to pages itself: they are mapped into its address space, for reading only, and
 * libkvd's kernels run on its own stream, with no call to kvd on the way. A decode step can be
 * captured in a CUDA graph and replayed while sequences grow. On the CPU backend the same functions
 * do their work before they return; `stream` is ignored.
 *
 * New tokens live in the worker's tail at first. Every 16 of them, a thread of libkvd appends them
 * to kvd, where they outlive the worker. A step waits for that only when kvd is 64 tokens behind.
 *
 * A step: kvd_direct_begin; for each layer kvd_store_enqueue, then kvd_attend_enqueue (or a graph
 * that has captured them); kvd_direct_end. Prompts come in by kvd_append before a sequence is
 * bound. While it is bound, only this object may append to it; forking is fine after
 * kvd_direct_flush. One thread at a time, one stream; one kvd_direct a client. */

typedef struct kvd_direct kvd_direct;

typedef struct kvd_direct_options {
    uint32_t size;
    uint32_t slots;                 /* sequences of a step, 1 to 1,024; slots may be empty */
    uint32_t max_tokens;            /* longest sequence: sizes the page tables */
    uint32_t step_tokens;           /* new tokens of a slot in each step, 1 (0) to 16 */
    kvd_dtype_t dtype;              /* of q and o */
    const kvd_attention *attention; /* NULL: defaults */
} kvd_direct_options;

KVD_API kvd_result kvd_direct_open(kvd_client *client, const kvd_direct_options *options,
                                   kvd_direct **out, kvd_failure *err);
/* Appends what is left in the tail, as far as kvd takes it, and frees. A step that was not ended is
 * forgotten. To be called before kvd_close. *direct becomes NULL. */
KVD_API void kvd_direct_close(kvd_direct **direct);
/* Puts a sequence that the session holds into a slot; 0 empties it. What the slot had is flushed
 * first. */
KVD_API kvd_result kvd_direct_bind(kvd_direct *direct, uint32_t slot, uint64_t sequence,
                                   kvd_failure *err);
/* Starts a step: every bound slot gets step_tokens more positions, and the kernels that follow on
 * `stream` see them. KVD_ERR_EXHAUSTED, and other errors of kvd_append: kvd is 64 tokens behind as
 * it cannot take more; free something and call again. KVD_ERR_LOST: the daemon is gone. */
KVD_API kvd_result kvd_direct_begin(kvd_direct *direct, void *stream, kvd_failure *err);
/* Stores the step's K and V of a layer: bf16 [slots][step_tokens][kv_heads][head_dim], dense, in
 * memory of the GPU (of the host on the CPU), 16-byte aligned. The sizes in bytes are the tensors'
 * own, by which other shapes and types are told. */
KVD_API kvd_result kvd_store_enqueue(kvd_direct *direct, void *stream, uint32_t layer,
                                     const void *k, uint64_t k_bytes, const void *v,
                                     uint64_t v_bytes, kvd_failure *err);
/* Attention of the step's queries of a layer: q [slots][step_tokens][q_heads][head_dim_k] to
 * o [slots][step_tokens][q_heads][head_dim_v]; lse f32 [slots][step_tokens][q_heads] or NULL. What
 * empty slots get means nothing. */
KVD_API kvd_result kvd_attend_enqueue(kvd_direct *direct, void *stream, uint32_t layer,
                                      const void *q, uint64_t q_bytes, void *o, uint64_t o_bytes,
                                      float *lse, uint64_t lse_bytes, kvd_failure *err);
/* Ends a step. tokens: how many of each slot's new ones stay, [slots]; NULL: all (speculative
 * decoding keeps fewer; the others are forgotten). */
KVD_API kvd_result kvd_direct_end(kvd_direct *direct, void *stream, const uint32_t *tokens,
                                  kvd_failure *err);
/* Waits until kvd has every token of every slot. */
KVD_API kvd_result kvd_direct_flush(kvd_direct *direct, kvd_failure *err);
/* Tokens of a slot (0 if it is empty), and how many of them kvd has; stored may be NULL. */
KVD_API kvd_result kvd_direct_length(kvd_direct *direct, uint32_t slot, uint64_t *length,
                                     uint64_t *stored, kvd_failure *err);

/* -- events ---------------------------------------------------------------------------------- */

typedef enum kvd_event_kind {
    KVD_EVENT_NONE = -1, /* the time was over */
    KVD_EVENT_OPENED = 0,
    KVD_EVENT_EVICTED,
    KVD_EVENT_DRAINING,
    KVD_EVENT_LOST, /* `count` events were dropped */
    KVD_EVENT_PUBLISHED,
} kvd_event_kind;
typedef struct kvd_event {
    uint32_t size;
    kvd_event_kind kind;
    uint64_t sequence, count;
    char name[129];
} kvd_event;
/* Waits for the next event; the first call subscribes. One thread at a time. */
KVD_API kvd_result kvd_next_event(kvd_client *client, uint32_t timeout_ms, kvd_event *out,
                                  kvd_failure *err);

KVD_API const char *kvd_version(void);

#ifdef __cplusplus
}
#endif
#endif
