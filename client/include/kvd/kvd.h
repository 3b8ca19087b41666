/** @file
 * libkvd: a worker's side of kvd, the shared KV-cache memory daemon. Plain C; this header, which
 * includes those of prompts and of pages.
 *
 * A kvd_client is one session with a daemon, for one model layout. Its functions may be called
 * from several threads at once, but for kvd_close; the caller orders calls on the same sequence.
 *
 * Functions return KVD_SUCCESS or a kvd_result; with a failure *err (may be NULL) says what was
 * wrong and how to mend it, and nothing has changed. Outputs are written on success only. What a
 * call is given stays the caller's, and is not looked at after the call has returned where nothing
 * else is said. A NULL where none is allowed is KVD_ERR_INVALID; functions that return no
 * kvd_result do nothing then.
 *
 * Each function tells the failures that are its own. Whatever asks the daemon may also fail with
 * KVD_ERR_UNAVAILABLE, KVD_ERR_TIMEOUT, KVD_ERR_LOST, KVD_ERR_PRECONDITION in a forked child, and
 * KVD_ERR_INTERNAL (memory, threads, or a fault of kvd's own).
 *
 * If the daemon is restarted and keeps its pool (`keep`), calls wait until it is back,
 * within the client's timeout and the daemon's resume-time, and go on in the same session:
 * sequences keep their ids and all that was acknowledged, and a call whose answer was lost is
 * applied once. Of an append by layers the calls before may be lost, where the daemon ended amid a
 * later one that overwrites: that is KVD_ERR_PRECONDITION; begin again at its first layer.
 *
 * A process that has lost its GPU to a fault, which under MPS may be another's, does not wait:
 * KVD_ERR_INTERNAL says so. Until it ends, kvd cannot have the GPU again either.
 *
 * Otherwise the next call opens a new session, registers the buffers again, and returns
 * KVD_ERR_LOST once, with the reason: sequences of the old session are gone, buffers keep their
 * addresses and go on working.
 *
 * Every function returns within the client's timeout, whatever has become of the daemon; kvd_close
 * takes 2 s at most. Nothing waits for a daemon that is not there and keeps no sessions:
 * KVD_ERR_UNAVAILABLE comes at once, and the first call after it is back finds it.
 *
 * A forked child cannot use its parent's clients: functions fail with KVD_ERR_PRECONDITION, and
 * those that close and free release the child's memory without a word to the daemon. kvd_open fails
 * too in a child of a process that has ever had a client, as gRPC does not survive a fork: open
 * clients after forking, or exec. All descriptors are close-on-exec.
 *
 * Structures that may grow begin with `size`: sizeof of the structure, as the program was compiled
 * (KVD_NEW sets it). What a library knows and an older program does not is taken as 0, and is not
 * written; a newer program's fields that a library does not know must be 0. All items of one call
 * have the same size. A size of 0 is refused. Those without one are frozen and never change.
 *
 * Tensors: [layers][tokens][heads][head_dim], head_dim contiguous, little-endian bf16 unless dtype
 * says f32. Every tensor is checked against the client's layout and its buffer's size before
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

/** What libkvd exports. */
#define KVD_API __attribute__((visibility("default")))

/** A structure with its size: kvd_info info = KVD_NEW(kvd_info); kvd_options o =
 * KVD_NEW(kvd_options, .address = a, .layers = ids). */
#define KVD_NEW(type, ...) ((type){.size = sizeof(type), __VA_ARGS__})

/** How a function ended. */
typedef enum kvd_result {
    KVD_SUCCESS = 0,      /**< done */
    KVD_ERR_INVALID,      /**< malformed or out of range */
    KVD_ERR_NOT_FOUND,    /**< unknown, freed or foreign id or name */
    KVD_ERR_EXISTS,       /**< name taken */
    KVD_ERR_PRECONDITION, /**< not in this state: wrong position, wrong layout */
    KVD_ERR_EXHAUSTED,    /**< quota, pool or a limit */
    KVD_ERR_DENIED,       /**< not allowed in this namespace */
    KVD_ERR_UNAVAILABLE,  /**< daemon not reachable, draining, or store down: try again */
    KVD_ERR_TIMEOUT,      /**< no answer in time; it is open whether the call was applied */
    KVD_ERR_CORRUPT,      /**< a rotation set failed verification */
    KVD_ERR_LOST,         /**< the session is gone, its sequences too; the client works again */
    KVD_ERR_INTERNAL,     /**< memory or threads ran out, or kvd has a fault */
} kvd_result;

/** What a function says of its failure. */
typedef struct kvd_failure {
    kvd_result code; /**< what the function returned */
    char text[512];  /**< what was wrong, where, and how to mend it; ends with a 0 */
} kvd_failure;

/** A session with a daemon. */
typedef struct kvd_client kvd_client;

/** Layers of a model that are alike, where not all of them are. A field that is 0 or NULL is as in
 * kvd_options, but for layers and window. Copied. */
typedef struct kvd_plane_options {
    uint32_t size;          /**< sizeof(kvd_plane_options) */
    const uint32_t *layers; /**< model layer ids, ascending, in no other plane */
    uint32_t n_layers;      /**< how many layers they are */
    uint32_t q_heads;       /**< heads of a query */
    uint32_t kv_heads;      /**< heads of K and V */
    uint32_t head_dim_k;    /**< elements of a head of q and K */
    uint32_t head_dim_v;    /**< elements of a head of V and o */
    const char *codec; /**< as kvd_options.codec; NULL: that, or what the set marks layers for */
    uint32_t window;   /**< tokens of the sliding window, as kvd_options.windows; 0: all */
    uint32_t sink;     /**< first tokens, kept in bf16; 0 with a window */
    uint32_t recent;   /**< last tokens, kept in bf16 */
    bool no_windows;   /**< really no sink and no recent window */
    bool latent;       /**< as kvd_options.latent, which holds for all planes */
} kvd_plane_options;

/** What a session is to be. Texts and lists are copied. */
typedef struct kvd_options {
    uint32_t size; /**< sizeof(kvd_options) */
    /** "unix:/path" or "host:port"; NULL: $KVD_ADDRESS, or the one kvd that listens under /run/kvd
     * (kvd@0 does on /run/kvd/0/kvd.sock) */
    const char *address;
    const char *namespace_name; /**< NULL: "default" */
    const char *client_name;    /**< shown to operators; NULL: the program's name */
    uint32_t timeout_ms;        /**< milliseconds for a call, kvd_open too; 0: 30,000 */
    const uint32_t *layers;     /**< model layer ids that hold KV, ascending */
    uint32_t n_layers;          /**< how many they are */
    uint32_t q_heads;           /**< heads of a query: a multiple of kv_heads */
    uint32_t kv_heads;          /**< heads of K and V */
    /** elements of a head of q and K, and of V and o: 64, 80, 96, 112, 128, 192 or 256, the same;
     * or both of 64, 128 and 256; or 192 and 128 */
    uint32_t head_dim_k;
    uint32_t head_dim_v; /**< see head_dim_k */
    /** "int2" (NULL), "int2c", "int2-lm", "turboquant-2", -3, -4, "int4", "tc2", "tc2.5", "bf16";
     * or as "k=int4,v=int2", of any two */
    const char *codec;
    /** "MODEL@TAG", "sha256:...", "hadamard", "random" or "identity"; NULL: hadamard, or random
     * with turboquant */
    const char *rotation_set;
    uint32_t sink;   /**< first tokens, kept in bf16; 0, like recent: 64 */
    uint32_t recent; /**< last tokens, kept in bf16; 0, like sink: 256 */
    bool no_windows; /**< really no sink and no recent window */
    /** For "host:port", where nothing is shared: tensors travel with their calls (64 MiB a call),
     * and a session that is not closed ends so many milliseconds after its worker was last heard of
     * (a thread of libkvd says so; 0: 60,000, at least 1,000). No direct mode. */
    uint32_t lease_ms;
    const char *tls_ca;   /**< PEM file: who may have signed kvd's certificate; NULL: no TLS */
    const char *tls_cert; /**< PEM file: the worker's own, which a kvd beyond loopback wants */
    const char *tls_key;  /**< PEM file: its key */
    const char *tls_server_name; /**< what kvd's must name; NULL: the address's host */
    /** sliding windows of the layers, n_layers of them: 0: a query sees all tokens; w: the last w,
     * itself included, whatever a call says. What lies behind the last w + 64 tokens is then freed,
     * and the layer has no sink. At most 8 different ones. NULL: all see all. */
    const uint32_t *windows;
    /** attention sinks, as gpt-oss has them: for each layer in order, one for each of its q heads:
     * the logit of one more token whose value is zero, which scale, softcap and windows do not
     * touch; lse has it. -INFINITY: none for that head. A model's weights: neither calls nor direct
     * mode are given them again. NULL: none. */
    const float *sinks;
    uint32_t n_sinks; /**< how many they are: layers x q_heads, at most 65,536 */
    /** where layers differ in heads, head_dim, codec or window: their planes, with `layers` and
     * `windows` NULL. A call's layers count over those of all planes in ascending order, and have
     * one shape. NULL: all layers are as this structure says. */
    const kvd_plane_options *planes;
    uint32_t n_planes; /**< how many planes they are, at most 8 planes of 512 layers together */
    /** tensor parallelism: this worker is rank tp_rank of tp_size, and q_heads and kv_heads are its
     * own. Of a rotation set with a matrix for each kv head of the model it gets those of its
     * heads: tp_size divides their number, or is a multiple of it, several ranks in a row having
     * the same head then. Ranks have different layouts: none attaches another's sequences. */
    uint32_t tp_rank;
    uint32_t tp_size; /**< how many ranks there are, at most 1,024; 0 or 1: it is not split */
    bool pages;       /**< for page calls (kvd/pages.h), which want no_windows and no windows */
    /** multi-head latent attention (MLA: DeepSeek V2 and V3, Kimi, GLM-5): kv_heads 1, K is the
     * rope part of keys, head_dim_k 64, V the latent, head_dim_v 512, and q_heads 1 to 128. A query
     * is absorbed: 512 values for the latent, then 64 for the rope part; o is of 512.
     * kvd_attention's scale must be given. The codec is the latent's, the rope part is in bf16. */
    bool latent;
} kvd_options;

/** Connects and opens a session. Waits for the rotation set to be fetched, at most timeout_ms; and
 * as long for a kvd that keeps its pool (kvd.conf: keep) and is just being started again. Where no
 * kvd is, and nobody is there who starts it again, it fails at once.
 * @param options what it is to be
 * @param[out] out the client, to be closed by kvd_close
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID an option is out of range, a PEM file cannot be read, or several kvd
 * listen and address is NULL
 * @retval KVD_ERR_NOT_FOUND the store has no such rotation set
 * @retval KVD_ERR_CORRUPT the rotation set failed verification
 * @retval KVD_ERR_PRECONDITION the rotation set is of another shape; or the process was forked
 * @retval KVD_ERR_DENIED the namespace is not open to this user
 * @retval KVD_ERR_EXHAUSTED all sessions or namespaces are in use
 * @retval KVD_ERR_UNAVAILABLE kvd is not there, is draining, or does not reach its store; or it is
 * being started again, and timeout_ms were not enough */
KVD_API kvd_result kvd_open(const kvd_options *options, kvd_client **out, kvd_failure *err);
/** Ends the session and frees the client, its buffers and its queues, within 2 s; a queue's ticket
 * that has begun is waited for longer, if it must.
 * @param client what is freed, and becomes NULL; *client may be NULL */
KVD_API void kvd_close(kvd_client **client);

/** What the sequences of a session keep in one plane. */
typedef struct kvd_plane_info {
    uint64_t bf16_page_bytes;  /**< of a page of sink or recent window: 64 tokens */
    uint64_t codec_page_bytes; /**< of a page of history: 64 tokens */
    uint32_t sink;             /**< first tokens, in bf16 */
    uint32_t recent;           /**< last tokens, in bf16 */
} kvd_plane_info;
/** What a session is. Texts are the client's, valid until it reconnects or is closed. */
typedef struct kvd_info {
    uint32_t size;            /**< sizeof(kvd_info) */
    const char *version;      /**< kvd's */
    const char *backend;      /**< "cpu" or "cuda" */
    const char *instance;     /**< another after each start of kvd */
    const char *rotation_set; /**< as resolved: a digest or a built-in's name */
    uint32_t n_planes; /**< how many the layout has; 1, unless kvd_options.planes says otherwise */
    kvd_plane_info planes[8];  /**< in their order */
    const char *layout_digest; /**< "sha256:...": names the layout, tp_rank and tp_size included */
    const char *device_uuid;   /**< of the GPU that kvd runs on, "GPU-..."; "" on the CPU */
} kvd_info;
/** What the session is.
 * @param client whose
 * @param[in,out] out its size is read
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID out->size is none */
KVD_API kvd_result kvd_get_info(kvd_client *client, kvd_info *out, kvd_failure *err);

/* -- buffers: memory shared with the daemon -------------------------------------------------- */

/** Memory that kvd reads and writes tensors in. It belongs to its client. */
typedef struct kvd_buffer kvd_buffer;
/** Makes and registers shared memory, zeroed. Over TCP it is the process's own memory, and tensors
 * in it are copied into calls and out of replies.
 * @param client whose it is
 * @param bytes at least 1
 * @param[out] out to be freed by kvd_buffer_free or kvd_buffer_detach, or with the client
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID bytes is 0, or the daemon cannot map it
 * @retval KVD_ERR_EXHAUSTED the session has too many buffers, or the namespace too many bytes
 * @retval KVD_ERR_INTERNAL the host has no memory for it */
KVD_API kvd_result kvd_buffer_new(kvd_client *client, uint64_t bytes, kvd_buffer **out,
                                  kvd_failure *err);
/** Registers memory of the GPU that kvd runs on, from cudaMalloc or an allocator above it, such as
 * PyTorch's. It may also be memory of cuMemCreate that is mapped, in one piece or in many side by
 * side (PyTorch's expandable_segments), if its allocator asked for POSIX file descriptors: the
 * whole mappings that the bytes lie in are shared, and must stay as they are. Work that writes or
 * reads it must have finished before a call that uses it: synchronize its stream, after a
 * cudaMemcpy from host memory too, which may return earlier.
 * @param client whose it is
 * @param data where it begins; stays the caller's and must outlive the buffer
 * @param bytes at least 1
 * @param[out] out to be freed by kvd_buffer_free, or with the client
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID it is not such memory, kvd runs on the CPU or is older and takes no such
 * mappings, or libkvd has no CUDA
 * @retval KVD_ERR_PRECONDITION it is on another GPU than the one that kvd runs on
 * @retval KVD_ERR_EXHAUSTED the session has too many buffers, or the user too many mappings */
KVD_API kvd_result kvd_buffer_cuda(kvd_client *client, void *data, uint64_t bytes, kvd_buffer **out,
                                   kvd_failure *err);
/** The same for who has a handle of the allocation already.
 * @param client whose it is
 * @param handle a cudaIpcMemHandle_t, 64 bytes, copied; the memory must outlive the buffer
 * @param offset bytes into the allocation at which the buffer begins
 * @param bytes at least 1
 * @param[out] out to be freed by kvd_buffer_free, or with the client
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID kvd cannot open the handle, or offset and bytes reach beyond it
 * @retval KVD_ERR_EXHAUSTED the session has too many buffers */
KVD_API kvd_result kvd_buffer_cuda_ipc(kvd_client *client, const void *handle, uint64_t offset,
                                       uint64_t bytes, kvd_buffer **out, kvd_failure *err);
/** The same for who has a descriptor of cuMemCreate's memory already.
 * @param client whose it is
 * @param fd of cuMemExportToShareableHandle; stays the caller's, who may close it
 * @param bytes a multiple of 2 MiB
 * @param[out] out to be freed by kvd_buffer_free, or with the client
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID fd or bytes are not those of such memory
 * @retval KVD_ERR_EXHAUSTED the session has too many buffers */
KVD_API kvd_result kvd_buffer_cuda_fd(kvd_client *client, int fd, uint64_t bytes, kvd_buffer **out,
                                      kvd_failure *err);
/** Frees a buffer. Calls that use it must have returned; those that put or get pages in it are
 * waited for.
 * @param buffer what is freed, and becomes NULL; *buffer may be NULL */
KVD_API void kvd_buffer_free(kvd_buffer **buffer);
/** Frees a buffer but for its memory, which stays: for languages whose arrays outlive a client.
 * @param buffer what is freed, and becomes NULL; *buffer may be NULL
 * @return that memory; if kvd_buffer_new made it, it is the caller's to munmap (its size rounded up
 * to pages) */
KVD_API void *kvd_buffer_detach(kvd_buffer **buffer);
/** Where a buffer is.
 * @param buffer it owns the memory
 * @return its address; NULL on a GPU, if the caller gave a handle or a descriptor */
KVD_API void *kvd_buffer_data(kvd_buffer *buffer);
/** How large a buffer is.
 * @param buffer which
 * @return bytes */
KVD_API uint64_t kvd_buffer_size(const kvd_buffer *buffer);

/** The type of an element. */
typedef enum kvd_dtype_t {
    KVD_BF16 = 0, /**< bfloat16 */
    KVD_F32 = 1   /**< float32 */
} kvd_dtype_t;

/** Where a tensor lies. Its shape is that of the call. What a call writes shares no memory with
 * anything else that it writes or reads (KVD_ERR_INVALID names both), but for kvd_rotate where it
 * lies; rows of several tensors may be interleaved, as views of one array are. */
typedef struct kvd_tensor_ref {
    kvd_buffer *buffer;    /**< of the same client */
    uint64_t offset;       /**< bytes into it */
    uint64_t layer_stride; /**< bytes from a layer to the next; 0: dense */
    uint64_t token_stride; /**< bytes from a token to the next; 0: dense */
    uint64_t head_stride;  /**< bytes from a head to the next; 0: dense */
    kvd_dtype_t dtype;     /**< q, o and read-outs; K and V are bf16 */
} kvd_tensor_ref;

/* -- sequences ------------------------------------------------------------------------------- */

/** Makes empty sequences, which this session holds.
 * @param client whose
 * @param count how many, 1 to 4,096
 * @param[out] ids theirs, [count]; to be freed by kvd_sequences_free, or with the session
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID count is out of range
 * @retval KVD_ERR_EXHAUSTED the session or the namespace has too many */
KVD_API kvd_result kvd_sequences_create(kvd_client *client, uint32_t count, uint64_t *ids,
                                        kvd_failure *err);
/** Makes copy-on-write children of a sequence, which this session holds.
 * @param client whose
 * @param sequence id of their parent, which it holds too
 * @param count how many, 1 to 4,096
 * @param[out] ids theirs, [count]; to be freed by kvd_sequences_free, or with the session
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID count is out of range
 * @retval KVD_ERR_NOT_FOUND the session does not hold the parent
 * @retval KVD_ERR_PRECONDITION the parent is amid an append, or used by a call in flight
 * @retval KVD_ERR_EXHAUSTED the session or the namespace has too many */
KVD_API kvd_result kvd_sequence_fork(kvd_client *client, uint64_t sequence, uint32_t count,
                                     uint64_t *ids, kvd_failure *err);
/** Forgets a sequence's last tokens.
 * @param client whose
 * @param sequence id of one that it holds
 * @param length tokens that stay, at most as many as there are
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID the sequence is shorter
 * @retval KVD_ERR_NOT_FOUND the session does not hold it
 * @retval KVD_ERR_PRECONDITION it is used by a call in flight, or an unfinished append has
 * overwritten what would stay */
KVD_API kvd_result kvd_sequence_truncate(kvd_client *client, uint64_t sequence, uint64_t length,
                                         kvd_failure *err);
/** Names a sequence in the namespace: it outlives this session until it is unpublished or evicted.
 * @param client whose
 * @param sequence id of one that it holds
 * @param name 1 to 128 printable ASCII characters, no spaces; copied
 * @param replace whether another sequence may lose the name to this
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID the name is none
 * @retval KVD_ERR_NOT_FOUND the session does not hold the sequence
 * @retval KVD_ERR_EXISTS the name is taken, and replace is false */
KVD_API kvd_result kvd_sequence_publish(kvd_client *client, uint64_t sequence, const char *name,
                                        bool replace, kvd_failure *err);
/** Where a sequence's tokens are in the layers of one plane, in the order of their positions:
 * together, its length. */
typedef struct kvd_plane_tokens {
    uint64_t sink;    /**< tokens in the sink, in bf16 */
    uint64_t freed;   /**< tokens that are gone: the plane has a window, which is past them */
    uint64_t history; /**< tokens that are compressed */
    uint64_t recent;  /**< tokens in the recent window, in bf16 */
} kvd_plane_tokens;
/** What a sequence is. */
typedef struct kvd_sequence_info {
    uint32_t size;     /**< sizeof(kvd_sequence_info) */
    uint64_t sequence; /**< its id */
    uint64_t length;   /**< tokens */
    uint32_t n_planes; /**< how many the layout has; 1, unless kvd_options.planes says otherwise */
    kvd_plane_tokens planes[8]; /**< where its tokens are in each plane, in their order */
    uint64_t pending_length;    /**< tokens, with an append that has not reached every layer */
    uint32_t pending_layers;    /**< layers that it has reached; 0: there is none */
    uint64_t bytes;             /**< of its pages */
    uint32_t holders;           /**< sessions that hold it */
    char name[129];             /**< under which it is published, or "" */
    uint32_t holds;             /**< how many times this session is to free it */
} kvd_sequence_info;
/** Takes hold of a published sequence, which stays until it was freed as often as it was attached.
 * @param client whose
 * @param name its name in the namespace
 * @param[in,out] out its size is read; out->sequence is to be freed by kvd_sequences_free, or with
 * the session
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID out->size is none
 * @retval KVD_ERR_NOT_FOUND nothing is published so; it may have been evicted
 * @retval KVD_ERR_PRECONDITION it has another layout, codec, rotation set or windows
 * @retval KVD_ERR_EXHAUSTED the session holds too many */
KVD_API kvd_result kvd_sequence_attach(kvd_client *client, const char *name, kvd_sequence_info *out,
                                       kvd_failure *err);
/** Gives up holds on sequences: all of them, or none and it fails. A sequence that nobody holds and
 * that is not published is gone.
 * @param client whose
 * @param ids of sequences; one that is held several times may stand there as often
 * @param count how many ids, 1 to 4,096
 * @param unpublish whether their names go as well
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID count is out of range
 * @retval KVD_ERR_NOT_FOUND the session does not hold one of them, or not as often */
KVD_API kvd_result kvd_sequences_free(kvd_client *client, const uint64_t *ids, uint32_t count,
                                      bool unpublish, kvd_failure *err);
/** What a sequence is.
 * @param client whose
 * @param sequence id of one that it holds
 * @param[in,out] out its size is read
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID out->size is none
 * @retval KVD_ERR_NOT_FOUND the session does not hold it */
KVD_API kvd_result kvd_sequence_describe(kvd_client *client, uint64_t sequence,
                                         kvd_sequence_info *out, kvd_failure *err);

/* -- work ------------------------------------------------------------------------------------ */

/** Which layers a call is about. */
typedef struct kvd_layers {
    uint32_t begin; /**< the first, as a position in kvd_options.layers */
    uint32_t count; /**< how many; 0: all from begin */
} kvd_layers;

/** One sequence's share of a call. */
typedef struct kvd_item {
    uint32_t size;      /**< sizeof(kvd_item); the same for all items of a call */
    uint64_t sequence;  /**< id of one that the session holds */
    uint64_t position;  /**< append, step: where the new tokens go: the sequence's length */
    uint32_t tokens;    /**< append, step: new tokens; attend: queries, at the sequence's end */
    kvd_tensor_ref k;   /**< append, step: [layers][tokens][kv_heads][head_dim_k] */
    kvd_tensor_ref v;   /**< append, step: [layers][tokens][kv_heads][head_dim_v] */
    kvd_tensor_ref q;   /**< attend, step: [layers][tokens][q_heads][head_dim_k]; over a latent
                           [..][head_dim_v + head_dim_k] */
    kvd_tensor_ref o;   /**< attend, step: [layers][tokens][q_heads][head_dim_v] */
    kvd_tensor_ref lse; /**< attend, step: f32 [layers][tokens][q_heads]; buffer NULL: unwanted */
    /** append, step: where to write whether this item's tokens had been applied before, so that
     * this call has only been answered again; NULL: not wanted. With kvd_enqueue it must stay until
     * kvd_enqueued has returned. */
    bool *replayed;
    /** append, step: names the item, for when the call is made again after a failure that leaves
     * open whether it was applied (a lost reply): the same number is recognized and nothing is
     * stored twice. From kvd_request_new, or any other not used before; 0: a call that is made
     * again fails with KVD_ERR_PRECONDITION if it had been applied. */
    uint64_t request;
} kvd_item;

/** How attention is computed. */
typedef struct kvd_attention {
    uint32_t size;   /**< sizeof(kvd_attention) */
    float scale;     /**< of logits; 0: 1/sqrt(head_dim_k), which over a latent is refused */
    float softcap;   /**< logits become softcap * tanh(logit / softcap); 0: none */
    uint32_t window; /**< sliding window in tokens, at most 16,777,216; 0: none */
} kvd_attention;

/** A number that names an item of an append or step. Any thread.
 * @param client whose
 * @return never 0, and never the same */
KVD_API uint64_t kvd_request_new(kvd_client *client);
/** Appends tokens. Safe to repeat with the same item.request: an append that was applied is
 * skipped, and item.replayed says so. Layers must be filled in ascending order.
 * @param client whose
 * @param layers which are filled
 * @param items k and v of each, [count]; sequences must differ
 * @param count how many items, 1 to 1,024
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID an item or a tensor is malformed, or holds NaN or Inf
 * @retval KVD_ERR_NOT_FOUND the session does not hold a sequence
 * @retval KVD_ERR_PRECONDITION another holder has appended there since, or layers are not in order
 * @retval KVD_ERR_EXHAUSTED the pool or a quota is full, or the call is too large */
KVD_API kvd_result kvd_append(kvd_client *client, kvd_layers layers, const kvd_item *items,
                              uint32_t count, kvd_failure *err);
/** Attention of the last `tokens` positions, causal among them. A query that is not finite, or
 * whose logits exceed float32, gets NaN in its own o and lse, and others do not change.
 * @param client whose
 * @param layers which are attended to
 * @param attention NULL: defaults
 * @param items q and o of each, [count]
 * @param count how many items, 1 to 1,024
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID an item or a tensor is malformed, or asks for more than there is
 * @retval KVD_ERR_NOT_FOUND the session does not hold a sequence
 * @retval KVD_ERR_PRECONDITION an append has filled some of the layers, and others not
 * @retval KVD_ERR_EXHAUSTED the call is too large, or too many are waiting */
KVD_API kvd_result kvd_attend(kvd_client *client, kvd_layers layers, const kvd_attention *attention,
                              const kvd_item *items, uint32_t count, kvd_failure *err);
/** Attends over what is stored and the new tokens, then appends these.
 * @param client whose
 * @param layers which are attended to and filled
 * @param attention NULL: defaults
 * @param items k, v, q and o of each, [count]; sequences must differ
 * @param count how many items, 1 to 1,024
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID an item or a tensor is malformed, or K or V hold NaN or Inf
 * @retval KVD_ERR_NOT_FOUND the session does not hold a sequence
 * @retval KVD_ERR_PRECONDITION as for kvd_append; or it had been applied, its window compressed
 * @retval KVD_ERR_EXHAUSTED the pool or a quota is full, or the call is too large */
KVD_API kvd_result kvd_step(kvd_client *client, kvd_layers layers, const kvd_attention *attention,
                            const kvd_item *items, uint32_t count, kvd_failure *err);
/** What rows are. */
typedef enum kvd_row_kind {
    KVD_KEYS = 0, /**< K */
    KVD_QUERIES,  /**< queries, of kv_heads or q_heads */
    KVD_VALUES    /**< V */
} kvd_row_kind;
/** Turns rows as the session's set does: keys, values to (x - mean) A, queries to x A^-T; or back.
 * @param client whose
 * @param kind what the rows are
 * @param inverse whether back
 * @param layers whose matrices
 * @param rows tokens of x and y
 * @param heads heads of a row: kv_heads or q_heads
 * @param x [layers][rows][heads][head_dim]
 * @param[out] y the same shape; may be x
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a tensor is malformed, or kind, rows or heads are out of range
 * @retval KVD_ERR_PRECONDITION codec bf16 has no rotations */
KVD_API kvd_result kvd_rotate(kvd_client *client, kvd_row_kind kind, bool inverse,
                              kvd_layers layers, uint32_t rows, uint32_t heads,
                              const kvd_tensor_ref *x, const kvd_tensor_ref *y, kvd_failure *err);
/** Reads tokens back, dequantized and un-rotated.
 * @param client whose
 * @param layers which are read
 * @param sequence id of one that it holds
 * @param begin the first token
 * @param count tokens
 * @param[out] k [layers][count][kv_heads][head_dim_k]; NULL: not wanted
 * @param[out] v [layers][count][kv_heads][head_dim_v]; NULL: not wanted
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a tensor is malformed, or the sequence has not so many tokens
 * @retval KVD_ERR_NOT_FOUND the session does not hold it
 * @retval KVD_ERR_PRECONDITION an append has filled some of the layers, and others not */
KVD_API kvd_result kvd_read_tokens(kvd_client *client, kvd_layers layers, uint64_t sequence,
                                   uint64_t begin, uint32_t count, const kvd_tensor_ref *k,
                                   const kvd_tensor_ref *v, kvd_failure *err);

/* -- calls in a stream's order --------------------------------------------------------------- */

/** Which call is enqueued. */
typedef enum kvd_call_kind {
    KVD_CALL_APPEND = 0, /**< kvd_append */
    KVD_CALL_ATTEND,     /**< kvd_attend */
    KVD_CALL_STEP        /**< kvd_step */
} kvd_call_kind;

/** An append, attend or step that takes its turn on a CUDA stream of the worker: kvd starts when
 * what was on the stream before is done, and what comes after waits for kvd's outputs. It returns
 * at once; the next calls may be enqueued meanwhile and are with kvd before their turn. Not while a
 * graph is captured. At most 16 streams a client. On the CPU backend the call is made at once; a
 * GPU wants the unix: address.
 * @param client whose
 * @param stream a cudaStream_t; must stay until kvd_enqueued has returned
 * @param kind which call
 * @param layers as that call's
 * @param attention as that call's; copied
 * @param items as that call's; copied, but their buffers must stay until kvd_enqueued has returned
 * @param count how many items, 1 to 1,024
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID an item or a tensor is malformed, or kvd is not at a unix: address
 * @retval KVD_ERR_EXHAUSTED a 17th stream, or the call is too large
 * @retval KVD_ERR_TIMEOUT too many calls are under way */
KVD_API kvd_result kvd_enqueue(kvd_client *client, void *stream, kvd_call_kind kind,
                               kvd_layers layers, const kvd_attention *attention,
                               const kvd_item *items, uint32_t count, kvd_failure *err);
/** Waits until all calls that were enqueued have been answered; outputs may still be under way on
 * the streams. A call that failed has written no output; what the stream did after it used old
 * values.
 * @param client whose
 * @param[out] err says why it failed; may be NULL
 * @return the first failure of these calls since it was last called
 * @retval KVD_ERR_TIMEOUT some are still under way after the client's timeout */
KVD_API kvd_result kvd_enqueued(kvd_client *client, kvd_failure *err);

/* -- direct mode ----------------------------------------------------------------------------- */

/** Direct mode: the worker attends to pages itself. They are mapped into its address space, for
 * reading only, and libkvd's kernels run on its own stream, with no call to kvd on the way. A
 * decode step can be captured in a CUDA graph and replayed while sequences grow. On the CPU backend
 * the same functions do their work before they return; `stream` is ignored.
 * New tokens live in the worker's tail at first. Every 16 of them, a thread of libkvd appends them
 * to kvd, where they outlive the worker. Only when kvd is tail_tokens behind a step waits for it.
 *
 * A step: kvd_direct_begin; for each layer kvd_store_enqueue, then kvd_attend_enqueue (or a graph
 * that has captured them); kvd_direct_end. Prompts come in by kvd_append before a sequence is
 * bound. While it is bound, only this object may append to it; forking is fine after
 * kvd_direct_flush. One thread at a time, one stream; one kvd_direct a client. */
typedef struct kvd_direct kvd_direct;

/** What direct mode is to be. */
typedef struct kvd_direct_options {
    uint32_t size;                  /**< sizeof(kvd_direct_options) */
    uint32_t slots;                 /**< sequences of a step, 1 to 1,024; slots may be empty */
    uint32_t max_tokens;            /**< tokens of the longest sequence: sizes the page tables */
    uint32_t step_tokens;           /**< new tokens of a slot in each step, 1 (0) to 16 */
    kvd_dtype_t dtype;              /**< of q and o */
    const kvd_attention *attention; /**< NULL: defaults; copied */
    uint32_t tail_tokens;           /**< that kvd may be behind: 64 (0) to 16,384 */
} kvd_direct_options;

/** Maps kvd's pages and makes room for tails and tables.
 * @param client whose; must stay until kvd_direct_close
 * @param options what it is to be
 * @param[out] out to be closed by kvd_direct_close, before the client
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID an option is out of range, kvd is not at a unix: address, it runs on a
 * GPU and libkvd has no CUDA, or the layers differ in heads or head_dim
 * @retval KVD_ERR_PRECONDITION the client has one already, or the current CUDA device is not kvd's
 * @retval KVD_ERR_EXHAUSTED the GPU has no memory for it */
KVD_API kvd_result kvd_direct_open(kvd_client *client, const kvd_direct_options *options,
                                   kvd_direct **out, kvd_failure *err);
/** Appends what is left in the tail, as far as kvd takes it, and frees. A step that was not ended
 * is forgotten.
 * @param direct what is freed, and becomes NULL; *direct may be NULL */
KVD_API void kvd_direct_close(kvd_direct **direct);
/** Puts a sequence that the session holds into a slot. What the slot had is flushed first.
 * @param direct whose
 * @param slot its number
 * @param sequence its id; the session must go on holding it; 0 empties the slot
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID there is no such slot
 * @retval KVD_ERR_NOT_FOUND the session does not hold the sequence
 * @retval KVD_ERR_PRECONDITION a step has not been ended, or the sequence is amid an append
 * @retval KVD_ERR_EXHAUSTED kvd cannot take what the slot had, or the sequence has more than
 * max_tokens */
KVD_API kvd_result kvd_direct_bind(kvd_direct *direct, uint32_t slot, uint64_t sequence,
                                   kvd_failure *err);
/** Starts a step: every bound slot gets step_tokens more positions, and the kernels that follow see
 * them.
 * @param direct whose
 * @param stream a cudaStream_t, on which they will run
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_PRECONDITION the step before has not been ended; or as for kvd_append
 * @retval KVD_ERR_EXHAUSTED a slot has max_tokens; or kvd is behind, as it cannot take more: free
 * something and call again
 * @retval KVD_ERR_LOST the session is gone: close this, and open another on the new session */
KVD_API kvd_result kvd_direct_begin(kvd_direct *direct, void *stream, kvd_failure *err);
/** Stores the step's K and V of a layer. The sizes are the tensors' own, by which other shapes and
 * types are told.
 * @param direct whose
 * @param stream a cudaStream_t; may be captured
 * @param layer position in kvd_options.layers
 * @param k bf16 [slots][step_tokens][kv_heads][head_dim_k], dense, 16-byte aligned, in memory of
 * the GPU (of the host on the CPU); must stay until the stream has passed
 * @param k_bytes size of k in bytes
 * @param v bf16 [slots][step_tokens][kv_heads][head_dim_v], the same
 * @param v_bytes size of v in bytes
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a size is another than the shape's, an address is not aligned, or there
 * is no such layer */
KVD_API kvd_result kvd_store_enqueue(kvd_direct *direct, void *stream, uint32_t layer,
                                     const void *k, uint64_t k_bytes, const void *v,
                                     uint64_t v_bytes, kvd_failure *err);
/** Attention of the step's queries of a layer. What empty slots get means nothing.
 * @param direct whose
 * @param stream a cudaStream_t; may be captured
 * @param layer position in kvd_options.layers
 * @param q [slots][step_tokens][q_heads][head_dim_k], as kvd_store_enqueue's k, but of options'
 * dtype
 * @param q_bytes size of q in bytes
 * @param[out] o [slots][step_tokens][q_heads][head_dim_v], the same; written when the stream has
 * passed
 * @param o_bytes size of o in bytes
 * @param[out] lse f32 [slots][step_tokens][q_heads], or NULL
 * @param lse_bytes size of lse in bytes, or 0
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a size is another than the shape's, an address is not aligned, or there
 * is no such layer */
KVD_API kvd_result kvd_attend_enqueue(kvd_direct *direct, void *stream, uint32_t layer,
                                      const void *q, uint64_t q_bytes, void *o, uint64_t o_bytes,
                                      float *lse, uint64_t lse_bytes, kvd_failure *err);
/** Ends a step.
 * @param direct whose
 * @param stream a cudaStream_t: that of the step
 * @param tokens how many of each slot's new ones stay, [slots]; NULL: all (speculative decoding
 * keeps fewer; the others are forgotten)
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a slot would keep more tokens than it got
 * @retval KVD_ERR_PRECONDITION no step has been begun */
KVD_API kvd_result kvd_direct_end(kvd_direct *direct, void *stream, const uint32_t *tokens,
                                  kvd_failure *err);
/** Waits until kvd has every token of every slot.
 * @param direct whose
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_PRECONDITION a step has not been ended; or as for kvd_append
 * @retval KVD_ERR_EXHAUSTED kvd cannot take more: free something and call again */
KVD_API kvd_result kvd_direct_flush(kvd_direct *direct, kvd_failure *err);
/** How long a slot's sequence is.
 * @param direct whose
 * @param slot its number
 * @param[out] length its tokens; 0: it is empty
 * @param[out] stored how many of them kvd has; may be NULL
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID there is no such slot */
KVD_API kvd_result kvd_direct_length(kvd_direct *direct, uint32_t slot, uint64_t *length,
                                     uint64_t *stored, kvd_failure *err);

#include <kvd/prompts.h>

/* -- events ---------------------------------------------------------------------------------- */

/** What happened. */
typedef enum kvd_event_kind {
    KVD_EVENT_NONE = -1,     /**< nothing: the time was over */
    KVD_EVENT_OPENED = 0,    /**< the session was opened */
    KVD_EVENT_EVICTED,       /**< a published sequence was evicted */
    KVD_EVENT_DRAINING,      /**< kvd takes no new sessions, and will stop */
    KVD_EVENT_LOST,          /**< events were dropped, as nobody took them */
    KVD_EVENT_PUBLISHED,     /**< a sequence was published */
    KVD_EVENT_BLOCKS_STORED, /**< blocks of a prompt are there now, each behind the one before it */
    KVD_EVENT_BLOCKS_REMOVED, /**< blocks are gone */
    KVD_EVENT_BLOCKS_CLEARED, /**< an operator dropped all that nobody uses; or all of a tier */
    KVD_EVENT_BLOCKS_MOVED,   /**< a tier has copies of blocks now */
} kvd_event_kind;
/** An event. */
typedef struct kvd_event {
    uint32_t size;         /**< sizeof(kvd_event) */
    kvd_event_kind kind;   /**< what happened */
    uint64_t sequence;     /**< id of the sequence, where there is one */
    uint64_t count;        /**< how many events were dropped */
    char name[129];        /**< of the sequence */
    const uint8_t *keys;   /**< kvd's own of the blocks, 24 bytes each; until the next event */
    uint32_t n_keys;       /**< how many blocks */
    const uint8_t *parent; /**< that of the block before the first; NULL: none, or not known */
    uint32_t tokens;       /**< in each block */
    kvd_miss miss;         /**< why they are gone */
    char tier[16];         /**< which has copies of them, or is cleared; "": none */
    uint64_t number;       /**< of the event, ascending by one in a namespace, as long as none is
                              lost; of OPENED and LOST that of the one before the next */
} kvd_event;
/** Waits for the next event of the namespace; the first call subscribes. What happens while the
 * connection is lost comes afterwards, or a LOST event does. One thread at a time.
 * @param client whose
 * @param timeout_ms milliseconds; 0: does not wait
 * @param[in,out] out its size is read
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID out->size is none */
KVD_API kvd_result kvd_next_event(kvd_client *client, uint32_t timeout_ms, kvd_event *out,
                                  kvd_failure *err);

/** The version of libkvd.
 * @return a constant */
KVD_API const char *kvd_version(void);

#include <kvd/pages.h>

#ifdef __cplusplus
}
#endif
#endif
