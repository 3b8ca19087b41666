// Inside the CUDA backend: its state, and staging of tensors between host and device.
#ifndef KVD_KERNELS_CUDA_CUDA_H
#define KVD_KERNELS_CUDA_CUDA_H

#include <cuda_runtime_api.h>
#include <cudaTypedefs.h>
#include <pthread.h>

#include "kernels/backend.h"
#include "kernels/cuda/api.h"

enum { KVD_CUDA_UUID = 41 }; // bytes of a device's name: "GPU-" and its UUID

struct kvd_rotation {
    uint32_t dim_k, dim_v;
    bool transform; // with inverses, means, deviations or bits of its own: for tc2 and tc2.5 alone
    struct kvd_cuda_rotation device;
    uint8_t *memory; // that `device` points into
};

// Pinned host memory and device memory of the same layout: inputs are packed on the host and
// uploaded at once, outputs the other way round.
struct kvd_stage {
    uint8_t *host, *device;
    uint64_t size, used;
};

// The driver's virtual-memory calls. Found at run time: kvd starts without a driver.
struct kvd_cuda_driver {
    PFN_cuMemAddressReserve_v10020 reserve;
    PFN_cuMemAddressFree_v10020 unreserve;
    PFN_cuMemCreate_v10020 create;
    PFN_cuMemRelease_v10020 release;
    PFN_cuMemMap_v10020 map;
    PFN_cuMemUnmap_v10020 unmap;
    PFN_cuMemSetAccess_v10020 set_access;
    PFN_cuMemExportToShareableHandle_v10020 export_handle;
    PFN_cuMemImportFromShareableHandle_v10020 import_handle;
    PFN_cuMemGetAllocationPropertiesFromHandle_v10020 properties;
    PFN_cuMemGetAddressRange_v3020 range;
    PFN_cuGetErrorString_v6000 error;
};

// What checksums take: sums.c.
struct kvd_cuda_summing {
    pthread_mutex_t lock;
    bool begun;
    cudaStream_t stream;
    uint8_t *host, *device;
};

// Copies of pages that are under way: backend.c.
struct kvd_cuda_copying {
    cudaStream_t stream; // of their own; a second one was no faster (LOG.md)
    cudaEvent_t done[KVD_COPIES_AT_ONCE];
};

struct kvd_cuda {
    struct kvd_backend base;
    struct kvd_cuda_driver driver;
    cudaStream_t stream;     // the executor's
    cudaStream_t mem_stream; // the loop's
    struct kvd_stage stage;
    uint8_t *scratch;                      // of attention
    uint64_t scratch_size, scratch_zeroed; // of the latest call
    uint8_t *dense;                        // tensors that pages of engines go through
    uint64_t dense_size;
    bool dense_scarce;         // there was no memory for more of them
    bool packed;               // there was no memory for scratch with values of histories
    unsigned long long *found; // of a check: pinned memory that kernels reach too
    uint64_t piece_ns;         // of work on a layer's tokens at once; tests change it
    struct kvd_cuda_copying copying;
    struct kvd_cuda_summing summing;
    int index; // of the device
    uint32_t multiprocessors;
    char device[128];
    char uuid[KVD_CUDA_UUID]; // "GPU-01234567-89ab-cdef-0123-456789abcdef"
};

// A device's name, as nvidia-smi -L has it.
void kvd_cuda_write_uuid(const cudaUUID_t *from, char to[KVD_CUDA_UUID]);
// KVD_OK, or KVD_E_FULL (out of memory) or KVD_E_INTERNAL with a text.
int kvd_cuda_status(int rc, const char *doing, struct kvd_error *err);
// Makes room for `bytes` and empties the stage, which never shrinks. What is on the stream must be
// done. After a failure it is as it was.
int kvd_stage_begin(struct kvd_cuda *c, uint64_t bytes, struct kvd_error *err);
// The next `bytes` of the stage, 256-byte aligned: their offset.
uint64_t kvd_stage_take(struct kvd_cuda *c, uint64_t bytes);
// Bytes that a take of `bytes` uses up.
static inline uint64_t kvd_stage_bytes(uint64_t bytes)
{
    return kvd_round_up(bytes, 256);
}
int kvd_stage_upload(struct kvd_cuda *c, uint64_t from, uint64_t to, struct kvd_error *err);
int kvd_stage_download(struct kvd_cuda *c, uint64_t from, uint64_t to, struct kvd_error *err);
// Until all that was queued has run; what was downloaded can be read then.
int kvd_stage_wait(struct kvd_cuda *c, struct kvd_error *err);

// A block of [layers][tokens][heads][dim] of a tensor, from layer l0 on, and where it is staged.
struct kvd_staged {
    const struct kvd_tensor *tensor;
    uint32_t layer0, layers, tokens, heads, dim;
    uint64_t at;           // offset in the stage
    uint64_t layer_stride; // of the staged copy, in bytes; tokens and heads are dense
    bool in_place;         // kernels can work on the tensor where it is: nothing is staged
};

static inline uint64_t kvd_dtype_size(enum kvd_dtype t)
{
    return t == KVD_DTYPE_F32 ? 4 : 2;
}

// Whether kernels can work on a tensor where it is: in device memory, aligned for them.
bool kvd_in_place(const struct kvd_tensor *t);
// Host tensors only: rows into or out of the pinned memory. Others are left alone.
void kvd_stage_pack(struct kvd_cuda *c, const struct kvd_staged *s);
void kvd_stage_unpack(struct kvd_cuda *c, const struct kvd_staged *s);
// Device tensors that are not taken in place: queues a copy to or from the stage's device memory.
int kvd_stage_gather(struct kvd_cuda *c, const struct kvd_staged *s, struct kvd_error *err);
int kvd_stage_scatter(struct kvd_cuda *c, const struct kvd_staged *s, struct kvd_error *err);

static inline struct kvd_cuda_tensor kvd_device_tensor(const struct kvd_cuda *c,
                                                       const struct kvd_staged *s)
{
    const struct kvd_tensor *t = s->tensor;
    uint64_t size = kvd_dtype_size(t->dtype);
    if (s->in_place)
        return (struct kvd_cuda_tensor){t->data + s->layer0 * t->layer_stride, t->layer_stride,
                                        t->token_stride, t->head_stride, t->dtype};
    return (struct kvd_cuda_tensor){.data = c->stage.device + s->at,
                                    .layer_stride = s->layer_stride,
                                    .token_stride = s->heads * s->dim * size,
                                    .head_stride = s->dim * size,
                                    .dtype = s->tensor->dtype};
}

// Whether kernels of a codec can use a set. KVD_OK, KVD_E_UNSUPPORTED.
int kvd_cuda_rotation_check(const struct kvd_rotation *r, struct kvd_codecs codec,
                            struct kvd_error *err);

// Makes the scratch at least so large.
int kvd_cuda_scratch(struct kvd_cuda *c, uint64_t bytes, struct kvd_error *err);

// memory.c
int kvd_cuda_memory_init(struct kvd_cuda *c, struct kvd_error *err);
struct kvd_arena *kvd_cuda_arena_new(struct kvd_backend *b, uint32_t count, uint64_t bytes,
                                     struct kvd_error *err);
void kvd_cuda_arena_free(struct kvd_backend *b, struct kvd_arena **ap);
int kvd_cuda_extent_make(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                         struct kvd_error *err);
void kvd_cuda_extent_drop(struct kvd_backend *b, struct kvd_arena *a, uint32_t i);
int kvd_cuda_extent_zero(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                         struct kvd_error *err);
int kvd_cuda_extent_export(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int *fd,
                           struct kvd_error *err);
int kvd_cuda_extent_descriptor(struct kvd_backend *b, struct kvd_arena *a, uint32_t i);
int kvd_cuda_extent_adopt(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                          bool *shared, struct kvd_error *err);
int kvd_cuda_extent_import(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                           struct kvd_error *err);
int kvd_cuda_foreign_map(struct kvd_backend *b, const struct kvd_foreign *f, uint8_t **data,
                         struct kvd_error *err);
void kvd_cuda_foreign_unmap(struct kvd_backend *b, enum kvd_memory kind, uint8_t *data,
                            uint64_t size);
int kvd_cuda_segments_reserve(struct kvd_backend *b, uint64_t size, uint8_t **data,
                              struct kvd_error *err);
int kvd_cuda_segments_map(struct kvd_backend *b, uint8_t *at, const struct kvd_segment *segments,
                          uint32_t n, struct kvd_error *err);
void kvd_cuda_segments_unmap(struct kvd_backend *b, uint8_t *data, uint64_t mapped, uint64_t size);
uint64_t kvd_cuda_memory_free(struct kvd_backend *b);
uint64_t kvd_cuda_memory_total(struct kvd_backend *b);

// pieces.c
// Divides a part of an append into pieces of at most `most` tokens each, a multiple of a page's,
// and the caller's to free. KVD_E_INTERNAL.
int kvd_cuda_pieces(const struct kvd_append_params *p, uint64_t most,
                    struct kvd_append_item **items, uint32_t *n, struct kvd_error *err);
// How many of n pieces are taken together: those of `most` tokens, or one.
uint32_t kvd_cuda_batch(const struct kvd_append_item *pieces, uint32_t n, uint64_t most);

int kvd_cuda_op_check(struct kvd_backend *b, const struct kvd_append_params *p,
                      struct kvd_nonfinite *where);
int kvd_cuda_op_append(struct kvd_backend *b, const struct kvd_append_params *p,
                       struct kvd_error *err);
int kvd_cuda_op_attend(struct kvd_backend *b, const struct kvd_attend_params *p,
                       struct kvd_error *err);
int kvd_cuda_op_step(struct kvd_backend *b, const struct kvd_attend_params *attend,
                     const struct kvd_append_params *append, struct kvd_nonfinite *where,
                     bool *done, struct kvd_error *err);
int kvd_cuda_op_read(struct kvd_backend *b, const struct kvd_read_params *p, struct kvd_error *err);
// dense.c
enum { KVD_CUDA_DENSE_MOST = 256 << 20 };
int kvd_cuda_op_dense(struct kvd_backend *b, uint64_t least, uint64_t wanted, struct kvd_dense *out,
                      struct kvd_error *err);
int kvd_cuda_op_paged(struct kvd_backend *b, const struct kvd_paged_kv *p,
                      const struct kvd_paged_copy *copy, struct kvd_error *err);
// sums.c. What init has left after a failure is for deinit.
cudaError_t kvd_cuda_summing_init(struct kvd_cuda_summing *s);
void kvd_cuda_summing_deinit(struct kvd_cuda_summing *s);
int kvd_cuda_op_sums(struct kvd_backend *b, const struct kvd_span *pages, uint32_t n, uint64_t *out,
                     struct kvd_error *err);
int kvd_cuda_op_rotate(struct kvd_backend *b, const struct kvd_rotate_params *p,
                       struct kvd_error *err);

#endif
