// What operations behind the ops table share: how much is taken at once, and what is staged.
#ifndef KVD_KERNELS_CUDA_SLICES_H
#define KVD_KERNELS_CUDA_SLICES_H

#include "kernels/cuda/cuda.h"

enum {
    SLICE_BYTES = 64 << 20, // of tensors staged at once, unless one layer is more
    SLICE_NS = 2000000,     // of work at once
};

static inline struct kvd_cuda *cuda_of(struct kvd_backend *b)
{
    return (struct kvd_cuda *)b;
}

// How many of `layers` to take at once, with `bytes` a layer.
static inline uint32_t slice_layers(uint64_t bytes, uint32_t layers)
{
    uint64_t n = bytes ? SLICE_BYTES / bytes : layers;
    return (uint32_t)KVD_MIN(KVD_MAX(n, (uint64_t)1), (uint64_t)layers);
}

// Layers to take at once when others may want their turn, at about `ns` a layer on an H100.
static inline uint32_t fair_layers(const struct kvd_slice *slice, uint64_t ns, uint32_t layers)
{
    if (!slice)
        return layers;
    return (uint32_t)KVD_MIN(KVD_MAX(SLICE_NS / KVD_MAX(ns, (uint64_t)1), (uint64_t)1),
                             (uint64_t)layers);
}

// Whether to stop here, and go on at `at` in the next slice. Everything before it is done.
static inline bool pause_at(struct kvd_slice *slice, uint64_t at)
{
    if (!slice || at == slice->at || !slice->over(slice))
        return false;
    slice->at = at;
    slice->more = true;
    return true;
}

static inline uint32_t codec_pages(const struct kvd_plane *g, uint64_t hist_end)
{
    return hist_end > g->sink ? (uint32_t)kvd_div_up(hist_end - g->sink, KVD_PAGE_TOKENS) : 0;
}

static inline uint32_t bf16_pages(const struct kvd_plane *g)
{
    return (uint32_t)kvd_div_up(g->sink, KVD_PAGE_TOKENS) + kvd_plane_ring(g) / KVD_PAGE_TOKENS;
}

// A block for a tensor of `layers` slices of [tokens][heads][dim]: staged, or where it is.
static inline struct kvd_staged take(struct kvd_cuda *c, const struct kvd_tensor *t,
                                     uint32_t layer0, uint32_t layers, uint32_t tokens,
                                     uint32_t heads, uint32_t dim, bool in_place)
{
    uint64_t stride = (uint64_t)tokens * heads * dim * kvd_dtype_size(t->dtype);
    uint64_t at = in_place ? 0 : kvd_stage_take(c, layers * stride);
    return (struct kvd_staged){t, layer0, layers, tokens, heads, dim, at, stride, in_place};
}

static inline uint64_t tensor_bytes(const struct kvd_tensor *t, uint64_t tokens, uint64_t heads,
                                    uint64_t dim)
{
    return tokens * heads * dim * kvd_dtype_size(t->dtype);
}

// An append that is short, with tensors that kernels take where they are, as it goes with a step's
// attention (append.c): bytes of the stage for it, or 0: it is none such. Then its tables are put
// at the stage's beginning, brought over, and the look for NaN and Inf is queued. Last, that is
// waited for: KVD_OK, KVD_E_INVALID with *where set, or as the device failed. What was queued is
// for kvd_cuda_append.
uint64_t kvd_cuda_short_append(const struct kvd_append_params *p);
int kvd_cuda_short_append_begin(struct kvd_cuda *c, const struct kvd_append_params *p,
                                struct kvd_cuda_append_params *out, struct kvd_error *err);
int kvd_cuda_short_append_check(struct kvd_cuda *c, const struct kvd_append_params *p,
                                const struct kvd_cuda_append_params *queued,
                                struct kvd_nonfinite *where, struct kvd_error *err);

#endif
