// An engine's blocks, as programs name them: whether they are what they are said to be, and copying
// between those on a GPU and dense tensors there (those in host memory: kernels/paged.h). Any
// thread.
#ifndef KVD_CLIENT_PAGED_H
#define KVD_CLIENT_PAGED_H

#include "kernels/paged.h"
#include "kvd/kvd.h"
#include "proto/base.h"
#include "proto/kvd_limits.h"

// What the pages of a client are.
struct kvd_page_shape {
    uint32_t layers, heads, dims[2]; // of K and V
};

// What a program said, as it is checked and used: `pages` pages lie inside of the memory that it
// said there is and, where they are `written`, no two elements are one. *out refers to what *p
// does. KVD_E_INVALID says what is wrong.
int kvd_paged_take(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t pages,
                   bool written, struct kvd_paged_kv *out, struct kvd_error *err);

// A dense tensor [layers][tokens][heads][dim] that pages are copied into, or out of.
struct kvd_dense_pages {
    uint8_t *side[2]; // K and V
    uint32_t tokens;  // that it has room for: its layers are so far apart
    uint8_t *tables;  // on a GPU, room for tables: kvd_paged_tables
};

// paged_gpu.c, for blocks that are on_gpu: whether all of the memory is of the GPU that kvd runs on
// (its two ends in each layer are looked at); memory to stage pages in, which kvd_buffer_free gives
// back; a copy on the engine's stream, into the blocks if `out`; and waiting for that stream.
// KVD_E_INVALID; KVD_E_PRECONDITION: it is another GPU's; KVD_E_UNSUPPORTED: there is no CUDA here;
// KVD_E_FULL and KVD_E_INTERNAL of CUDA's.
int kvd_paged_gpu_check(kvd_client *c, const kvd_paged *p, const struct kvd_page_shape *shape,
                        struct kvd_error *err);
kvd_result kvd_gpu_staging_new(kvd_client *c, uint64_t bytes, kvd_buffer **out, kvd_failure *err);
void kvd_gpu_staging_free(void *data);
int kvd_paged_gpu_copy(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t page,
                       uint32_t n, const struct kvd_dense_pages *staged, uint32_t at, bool out,
                       struct kvd_error *err);
int kvd_paged_gpu_wait(const kvd_paged *p, struct kvd_error *err);

// paged_gpu.c, for calls that are done later, by another thread. A mark says what is on p's stream
// now; following it, a thread copies on *stream, made on first use, behind that.
struct kvd_gpu_mark {
    void *event; // NULL: none
    int device;
};
int kvd_gpu_mark(const kvd_paged *p, struct kvd_gpu_mark *out, struct kvd_error *err);
int kvd_gpu_follow(const struct kvd_gpu_mark *mark, void **stream, struct kvd_error *err);
void kvd_gpu_mark_free(struct kvd_gpu_mark *mark);
void kvd_gpu_stream_free(void **stream);

// Bytes of a GPU copy's tables, for any blocks.
static inline uint64_t kvd_paged_tables(const struct kvd_page_shape *shape, uint32_t pages)
{
    return shape->layers * sizeof(void *) +
           ((uint64_t)pages * KVD_PAGE_TOKENS + 1) * sizeof(uint32_t);
}

#endif
