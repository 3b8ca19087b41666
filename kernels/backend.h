// The backend: memory for the pool and the five operations on pages, behind one ops table.
//
// Every operation is synchronous for its caller and batched over many sequences and a range of
// layers; a long one can run in slices (kvd_slice). Pages are in the extents of an arena; tensors
// are in host memory, or on a GPU in its own memory too. The caller has checked all bounds. Calls
// on one backend come from one thread at a time (the executor); those on arenas and foreign memory
// from another (the loop), but for extent_make, which may run beside them for an extent that
// nothing else touches.
#ifndef KVD_KERNELS_BACKEND_H
#define KVD_KERNELS_BACKEND_H

#include "kernels/paged.h"
#include "kernels/quantize.h"
#include "proto/base.h"

struct kvd_backend;
struct kvd_rotation; // a rotation set in the backend's memory

// A set in host memory: of rotations, or of transforms A that are not orthogonal, with their
// inverses. Rows multiply from the left. A key or value x of history is coded as (x - mean) A; a
// query q meets coded keys as q A^-T, as (x A) (A^-1 q^T) = x q^T.
struct kvd_rotation_data {
    uint32_t n_layers; // 1: the same matrices for all layers
    uint32_t heads;    // 1: one matrix per layer, for all kv heads; else kv_heads
    uint32_t dim_k, dim_v;
    const float *k;         // A, [n_layers][heads][dim_k][dim_k]; NULL: identity
    const float *v;         // [n_layers][heads][dim_v][dim_v]; NULL: identity
    const float *k_inverse; // A^-1; NULL: A is orthogonal, and this its transpose
    const float *v_inverse;
    const float *k_mean; // [n_layers][heads][dim_k]; NULL: 0
    const float *v_mean; // [n_layers][heads][dim_v]
    // Of codecs tc2 and tc2.5 (tc.h): deviations of K's channels, [n_layers][heads][dim_k], NULL:
    // 1; and bits of their codes by tile, [n_layers][heads][dim_k / 16], of the codec's sum, NULL:
    // even.
    const float *k_sigma, *k_bits;
    const float *clip_k; // [n_layers][heads]; NULL: no clipping
    const float *clip_v; // [n_layers][heads]
    const float *gain_k; // [n_layers][heads] of the levels (quantize.h); NULL: 1
    const float *gain_v; // [n_layers][heads]
    enum kvd_scale scale_k, scale_v;
};

// The arrays of a set, in one order, for whoever copies them: those before KVD_TERMS_TO_ATTEND are
// what attention needs.
enum { KVD_TERMS_TO_ATTEND = 8, KVD_TERMS = 12 };
struct kvd_term {
    const float **at; // in the set
    uint64_t each;    // values a layer and head
};
static inline void kvd_rotation_terms(struct kvd_rotation_data *d, struct kvd_term out[KVD_TERMS])
{
    uint64_t k = d->dim_k, v = d->dim_v;
    const struct kvd_term all[KVD_TERMS] = {
        {&d->k, k * k},  {&d->v, v * v},  {&d->k_inverse, k * k}, {&d->v_inverse, v * v},
        {&d->k_mean, k}, {&d->v_mean, v}, {&d->k_sigma, k},       {&d->k_bits, k / 16},
        {&d->clip_k, 1}, {&d->clip_v, 1}, {&d->gain_k, 1},        {&d->gain_v, 1}};
    for (uint32_t i = 0; i < KVD_TERMS; i++)
        out[i] = all[i];
}

// A tensor [layers][tokens][heads][dim], dim contiguous; strides in bytes.
struct kvd_tensor {
    uint8_t *data;
    uint64_t layer_stride, token_stride, head_stride;
    enum kvd_dtype dtype;
    bool on_device; // in the GPU's memory
};

// The pages of one sequence, as kvd_pool_seq_pages gives them.
struct kvd_pages {
    const uint64_t *bf16;  // sink pages, then ring pages; 0 where there is none
    const uint64_t *codec; // history pages
};

// Lets an operation run in slices, so that others get their turn and it can be given up. An
// operation whose params have one returns KVD_OK with `more` set when the slice is over before it
// is done; called again with the same params it goes on there. It gets on a little in every slice,
// and its result is the same, bit for bit, as without slices. Between them the params' arrays stay
// as they are; other operations may run. Outputs of one that is given up are undefined.
struct kvd_slice {
    // Asked often, by all threads of an operation: whether it should return soon.
    bool (*over)(const struct kvd_slice *s);
    bool more;   // out
    uint64_t at; // the operation's own; zero before its first slice
    void *state; // the same; to be freed with free() when no slice follows
};

static inline bool kvd_slice_over(const struct kvd_slice *s)
{
    return s && s->over(s);
}

struct kvd_append_item {
    struct kvd_pages pages;
    uint64_t length, hist_end;         // before
    uint64_t new_length, new_hist_end; // after
    struct kvd_tensor k,
        v; // [layer_count][new_length - length][kv_heads][dim]; layer 0 is layer_begin
};

// Half of an append, so that it can be given up between: the first writes only what counts for
// nothing before the append is true, and the second overwrites tokens of the windows.
enum kvd_append_part {
    KVD_APPEND_WHOLE = 0,
    KVD_APPEND_DEMOTE = 1, // history, beyond what there is
    KVD_APPEND_STORE = 2,  // sink and ring; only after the first, of all layers
};

struct kvd_append_params {
    const struct kvd_plane *plane;
    const struct kvd_rotation *rotation;
    uint32_t layer_begin, layer_count;
    enum kvd_append_part part;
    const struct kvd_append_item *items;
    uint32_t n_items;
    struct kvd_slice *slice; // NULL: runs to its end; so below
};

struct kvd_attend_item {
    struct kvd_pages pages;
    uint64_t length, hist_end; // what the pages hold
    uint32_t q_len;
    uint32_t new_tokens;    // 0, or at least q_len: K/V of the queries, and of tokens before them
                            // that no page has yet, come from k and v, after what the pages hold
    struct kvd_tensor q;    // [layer_count][q_len][q_heads][dim_k]; of a latent plane [.. dim_v +
                            // dim_k], first what meets the latent, then what meets the rope part
    struct kvd_tensor k, v; // [layer_count][new_tokens][kv_heads][dim], bf16
    struct kvd_tensor o;    // [layer_count][q_len][q_heads][dim_v]
    struct kvd_tensor lse;  // f32 [layer_count][q_len][q_heads][1]; data NULL: not wanted
};

struct kvd_attend_params {
    const struct kvd_plane *plane;
    const struct kvd_rotation *rotation;
    uint32_t layer_begin, layer_count;
    float scale;     // of the logits
    float softcap;   // 0: none
    uint32_t window; // 0: none
    // Attention sinks, [layer_count][q_heads] in host memory: to a head's logits comes one of a
    // token whose value is zero; scale, softcap and window do not touch it. lse has its term, so
    // that exp(lse) o is the sum that it was before. -inf: none for this head; NULL: none at all.
    // Not finite otherwise: o and lse of the head are NaN.
    const float *sinks;
    const struct kvd_attend_item *items;
    uint32_t n_items;
    struct kvd_slice *slice;
};

struct kvd_read_params {
    const struct kvd_plane *plane;
    const struct kvd_rotation *rotation;
    uint32_t layer_begin, layer_count;
    struct kvd_pages pages;
    uint64_t length, hist_end;
    uint64_t begin; // first token
    uint32_t tokens;
    struct kvd_tensor k, v; // outputs; data NULL: not wanted
    struct kvd_slice *slice;
};

// What rows are, and so which way they are turned.
enum kvd_rotate {
    KVD_ROTATE_KEYS = 0,    // (x - mean) A; back: y A^-1 + mean
    KVD_ROTATE_QUERIES = 1, // x A^-T, A of K; back: y A^T. Keys' products with them stay, but for
                            // q . mean. The same as keys where A is orthogonal and the mean 0
    KVD_ROTATE_VALUES = 2,  // as keys
    KVD_ROTATE_COUNT
};

struct kvd_rotate_params {
    const struct kvd_rotation *rotation;
    enum kvd_rotate which;
    bool inverse; // back
    uint32_t layer_begin, layer_count;
    uint32_t rows;     // tokens
    uint32_t heads;    // heads of x
    uint32_t kv_heads; // head h of x uses the matrix of kv head h / (heads / kv_heads)
    struct kvd_tensor x, y;
    struct kvd_slice *slice;
};

// Where a value that is not finite was found.
struct kvd_nonfinite {
    uint32_t item, layer, token, head, channel;
    bool in_v;
};

struct kvd_copy {
    uint64_t to, from, bytes; // addresses
    // So many pieces of `bytes`, each as many bytes behind the one before, at least `bytes` and at
    // most KVD_COPY_STRIDE_MOST. 0: one.
    uint64_t to_stride, from_stride;
    uint32_t pieces;
};
enum { KVD_COPIES_AT_ONCE = 3, KVD_COPY_STRIDE_MOST = 1 << 30 };

// Memory of the backend's own that pages of an engine's blocks go through. It stays until it is
// asked for again.
struct kvd_dense {
    uint8_t *data;
    uint64_t bytes;
    bool on_device; // as kvd_tensor has it
};

// Memory of pages: whole ones, so that it is a multiple of KVD_PAGE_UNIT.
struct kvd_span {
    uint64_t addr, bytes;
};

// The plain form of what `sums` computes on a device: over 32-bit words, word i times 2 i + 1, mod
// 2^64. Words that change places change it, and so does any bit.
static inline uint64_t kvd_words_sum(const void *at, uint64_t bytes)
{
    const uint8_t *p = (const uint8_t *)at; // C++ wants to be told
    uint64_t sum = 0;
    for (uint64_t i = 0; i < bytes / 4; i++) {
        uint32_t word;
        memcpy(&word, p + 4 * i, 4);
        sum += (uint64_t)word * (uint32_t)(2 * i + 1);
    }
    return sum;
}

// Addresses for `count` extents of `bytes` each, side by side: extent i is at base + i * bytes. The
// owner makes extents; other processes import them into arenas of their own and can only read. As
// all lay them out alike, a page is named everywhere by its distance from the base.
struct kvd_arena {
    uint64_t base, bytes;
    uint32_t count;
};

// Memory that another process hands over.
enum kvd_memory {
    KVD_MEMORY_MEMFD = 0,    // host memory; the daemon maps it itself
    KVD_MEMORY_CUDA_IPC = 1, // a cudaIpcMemHandle_t: an allocation of cudaMalloc, from its start
    KVD_MEMORY_CUDA_FD = 2,  // a descriptor of cuMemExportToShareableHandle
    KVD_MEMORY_CUDA_SEGMENTS = 3, // many of those, side by side
};
enum { KVD_IPC_HANDLE_BYTES = 64 };
struct kvd_foreign {
    enum kvd_memory kind;
    int fd; // stays the caller's
    uint8_t ipc[KVD_IPC_HANDLE_BYTES];
    uint64_t size; // that the other process claims
};
// One of KVD_MEMORY_CUDA_SEGMENTS.
struct kvd_segment {
    int fd;         // stays the caller's, who may close it once it is mapped
    uint64_t bytes; // that the other process claims, a multiple of KVD_SEGMENT_UNIT
};

struct kvd_backend_ops {
    const char *name; // "cpu", "cuda"
    bool on_device;   // it computes in a device's memory, not the host's
    void (*free)(struct kvd_backend *b);
    const char *(*device)(const struct kvd_backend *b); // for people
    // "GPU-" and its UUID, as nvidia-smi -L has it. NULL on the CPU.
    const char *(*uuid)(const struct kvd_backend *b);

    // Whether it has kernels for the codecs of a plane that kvd_plane_check lets pass.
    // KVD_E_UNSUPPORTED names what it lacks. NULL: for all.
    int (*plane_check)(const struct kvd_backend *b, const struct kvd_plane *p,
                       struct kvd_error *err);

    // Whether attention over one has kernels of its own, or takes one for all that may be ten times
    // slower. NULL: it has.
    bool (*plane_tuned)(const struct kvd_plane *p);

    // `bytes` is a multiple of 2 MiB. NULL with *err set on failure. Freeing drops all extents.
    struct kvd_arena *(*arena_new)(struct kvd_backend *b, uint32_t count, uint64_t bytes,
                                   struct kvd_error *err);
    void (*arena_free)(struct kvd_backend *b, struct kvd_arena **a);
    // Gives extent i memory that reads as zero. Memory that it has is replaced; on failure the
    // extent keeps it. Processes that imported the old keep it until they drop it too. KVD_E_FULL,
    // KVD_E_INTERNAL.
    int (*extent_make)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                       struct kvd_error *err);
    // Takes its memory away. Processes that imported it keep it until they drop it too.
    void (*extent_drop)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i);
    int (*extent_zero)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                       struct kvd_error *err);
    // A descriptor for extent_import elsewhere, to be closed by the caller. An extent that was ever
    // exported is not to be zeroed for others: make it anew.
    int (*extent_export)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int *fd,
                         struct kvd_error *err);
    // Maps another process's extent, read-only. The fd stays the caller's.
    int (*extent_import)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                         struct kvd_error *err);
    // For a process that takes over from another: the extent's own descriptor, which stays the
    // backend's (negative: there is none), and memory that an earlier process held by one. On the
    // CPU what was exported cannot be written by another process: it is copied into new memory.
    // *shared: it is the same memory, and others may map it: as if it had been exported here.
    // KVD_E_INVALID, KVD_E_FULL, KVD_E_LIMIT.
    int (*extent_descriptor)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i);
    int (*extent_adopt)(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                        bool *shared, struct kvd_error *err);
    // Maps a worker's device memory for reading and writing; never beyond what there is, whatever
    // it claims. KVD_E_INVALID says what is wrong with it; KVD_E_UNSUPPORTED on the CPU.
    int (*foreign_map)(struct kvd_backend *b, const struct kvd_foreign *f, uint8_t **data,
                       struct kvd_error *err);
    void (*foreign_unmap)(struct kvd_backend *b, enum kvd_memory kind, uint8_t *data,
                          uint64_t size);
    // The same of memory in many parts: addresses for `size` bytes of them, a multiple of
    // KVD_SEGMENT_UNIT; then segments from `at` on, one behind the other, all of them or none; in
    // the end all is let go of, of which the first `mapped` bytes have segments. KVD_E_INVALID,
    // KVD_E_FULL, KVD_E_UNSUPPORTED.
    int (*segments_reserve)(struct kvd_backend *b, uint64_t size, uint8_t **data,
                            struct kvd_error *err);
    int (*segments_map)(struct kvd_backend *b, uint8_t *at, const struct kvd_segment *segments,
                        uint32_t n, struct kvd_error *err);
    void (*segments_unmap)(struct kvd_backend *b, uint8_t *data, uint64_t mapped, uint64_t size);
    // Whether the device is lost to this process, so that nothing will work again; NULL where it
    // never is.
    bool (*lost)(struct kvd_backend *b);
    // Bytes of device memory that nobody uses; UINT64_MAX where it is not the scarce kind.
    uint64_t (*memory_free)(struct kvd_backend *b);
    // Bytes of device memory in all; NULL: it is the host's.
    uint64_t (*memory_total)(struct kvd_backend *b);

    // Copies the set into the backend's memory. NULL with *err set on failure: KVD_E_UNSUPPORTED
    // where the backend cannot serve transforms.
    struct kvd_rotation *(*rotation_new)(struct kvd_backend *b,
                                         const struct kvd_rotation_data *data,
                                         struct kvd_error *err);
    void (*rotation_free)(struct kvd_backend *b, struct kvd_rotation **r);

    // Looks for NaN and Inf in the new tokens. KVD_OK, KVD_E_INVALID with *where set, or another
    // code when the device failed.
    int (*check)(struct kvd_backend *b, const struct kvd_append_params *p,
                 struct kvd_nonfinite *where);
    // Demotes [hist_end, new_hist_end) into history pages, from the ring or, where they never were
    // in it, from the new tokens; then writes the others into sink and ring. In slices only a part
    // at a time.
    int (*append)(struct kvd_backend *b, const struct kvd_append_params *p, struct kvd_error *err);
    int (*attend)(struct kvd_backend *b, const struct kvd_attend_params *p, struct kvd_error *err);
    // Check, attend and a whole append of the same tokens behind each other, or with attend NULL
    // check and append, where waiting for each would take longer than the work does. Not *done: it
    // is not so, and nothing has happened.
    // Where the check finds something, as that does, no output has been written. It makes no
    // pauses; NULL: it is never so.
    int (*step)(struct kvd_backend *b, const struct kvd_attend_params *attend,
                const struct kvd_append_params *append, struct kvd_nonfinite *where, bool *done,
                struct kvd_error *err);
    int (*read)(struct kvd_backend *b, const struct kvd_read_params *p, struct kvd_error *err);
    int (*rotate)(struct kvd_backend *b, const struct kvd_rotate_params *p, struct kvd_error *err);
    // Copies bytes of pages to other pages, or from or to host memory. All done when it returns.
    int (*copy)(struct kvd_backend *b, const struct kvd_copy *copies, uint32_t n,
                struct kvd_error *err);
    // The same in parts, of which some are under way while others are begun; not ordered among
    // themselves, nor with other operations. `which` < KVD_COPIES_AT_ONCE names what is under way:
    // it is ended before it is begun again, also where beginning failed.
    int (*copy_begin)(struct kvd_backend *b, const struct kvd_copy *copies, uint32_t n,
                      uint32_t which, struct kvd_error *err);
    int (*copy_end)(struct kvd_backend *b, uint32_t which, struct kvd_error *err);
    // Memory of at least `least` bytes, and up to `wanted`, of which dense_most are enough, for
    // dense tensors; and copies between them and an engine's blocks, which are in the backend's
    // kind of memory. Done when it returns. KVD_E_FULL, KVD_E_INTERNAL.
    int (*dense)(struct kvd_backend *b, uint64_t least, uint64_t wanted, struct kvd_dense *out,
                 struct kvd_error *err);
    int (*paged)(struct kvd_backend *b, const struct kvd_paged_kv *p,
                 const struct kvd_paged_copy *copy, struct kvd_error *err);
    uint64_t dense_most;
    // Checksums of pages where they are, out[i] that of pages[i]: kvd_words_sum. Any thread, beside
    // the other operations, which it gives way to. NULL on the CPU, where everybody can read pages.
    int (*sums)(struct kvd_backend *b, const struct kvd_span *pages, uint32_t n, uint64_t *out,
                struct kvd_error *err);
    // Has the device copy from and to host memory, which begins at a page, as fast as the bus is;
    // and undoes it, before the memory is freed, any thread and even after the backend. NULL on the
    // CPU.
    int (*host_pin)(struct kvd_backend *b, void *at, uint64_t bytes, struct kvd_error *err);
    void (*host_unpin)(void *at);
};

struct kvd_backend {
    const struct kvd_backend_ops *ops;
};

static inline void kvd_backend_free(struct kvd_backend **b)
{
    if (*b)
        (*b)->ops->free(*b);
    *b = NULL;
}

// The CPU backend on `threads` threads (0: one per CPU). `isa`: NULL for the best that this CPU
// has, or "scalar", "avx2", "avx512". NULL with *err set on failure.
struct kvd_backend *kvd_cpu_backend_new(uint32_t threads, const char *isa, struct kvd_error *err);
// Whether that would take this `isa`. KVD_E_INVALID (no such name), KVD_E_UNSUPPORTED (not this
// CPU).
int kvd_cpu_isa_check(const char *isa, struct kvd_error *err);

// Whether this host has an NVIDIA GPU at all; KVD_E_UNAVAILABLE says what was looked for. Only in
// builds with CUDA.
int kvd_cuda_present(struct kvd_error *err);

// The CUDA backend on device `index`. NULL with *err set: KVD_E_UNAVAILABLE without a usable
// driver, KVD_E_NOT_FOUND, KVD_E_UNSUPPORTED for a device that is too old. Only in builds with
// CUDA.
struct kvd_backend *kvd_cuda_backend_new(uint32_t index, struct kvd_error *err);

// The same on the calling thread's current device.
struct kvd_backend *kvd_cuda_backend_current(struct kvd_error *err);

// The check operation for tokens in host memory.
int kvd_check_host(const struct kvd_append_params *p, struct kvd_nonfinite *where);

// Checks a plane against the limits. KVD_E_INVALID says what to mend.
int kvd_plane_check(const struct kvd_plane *g, struct kvd_error *err);

// Slot of window token t (t >= sink) in the ring's pages: page entry counted from the first sink
// page, and row.
static inline void kvd_ring_place(const struct kvd_plane *g, uint64_t t, uint32_t *entry,
                                  uint32_t *row)
{
    uint32_t sink_pages = (g->sink + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS;
    uint32_t slot = (uint32_t)((t - g->sink) % kvd_plane_ring(g));
    *entry = sink_pages + slot / KVD_PAGE_TOKENS;
    *row = slot % KVD_PAGE_TOKENS;
}

#endif
