// Attention: plan, checks and choice of kernel. What is computed and how: decode.cuh.
#include "kernels/cuda/decode.cuh"

namespace kvd
{

static uint32_t rows_of_head(const attend_params &p)
{
    return p.q_len * (p.q_heads / p.kv_heads);
}

static bool same_dims(const attend_params &p)
{
    return p.dim_k == p.dim_v;
}

static uint32_t n_tiles(const attend_params &p)
{
    return same_dims(p) && p.dim_k <= 128 && rows_of_head(p) > 8 ? 2 : 1;
}

static bool general(const attend_params &p)
{
    return p.q_len > 1 || p.window || p.softcap > 0 || !same_dims(p);
}

// Sixteen warps a multiprocessor, in blocks of 4, 8 or 16.
static bool small_blocks(const attend_params &p)
{
    return n_tiles(p) == 1 && p.dim_k <= 128 && !general(p);
}

template <int NT, int D> static cudaError_t launch_same(const attend_params &p, cudaStream_t stream)
{
    return general(p) ? launch_attend<true, NT, D, D, 4>(p, stream)
                      : launch_attend<false, NT, D, D, 4>(p, stream);
}

template <int DK> static cudaError_t launch_mixed(const attend_params &p, cudaStream_t stream)
{
    if (p.dim_v == 64)
        return launch_attend<true, 1, DK, 64, 4>(p, stream);
    if (p.dim_v == 128)
        return launch_attend<true, 1, DK, 128, 4>(p, stream);
    return launch_attend<true, 1, DK, 256, 4>(p, stream);
}

template <int D> static cudaError_t launch_dim(const attend_params &p, cudaStream_t stream)
{
    if (!same_dims(p))
        return launch_mixed<D>(p, stream);
    if constexpr (D <= 128)
        if (p.warps == 16)
            return launch_attend<false, 1, D, D, 16>(p, stream);
        else if (p.warps == 8)
            return launch_attend<false, 1, D, D, 8>(p, stream);
    if constexpr (D <= 128)
        if (n_tiles(p) == 2)
            return launch_same<2, D>(p, stream);
    return launch_same<1, D>(p, stream);
}

static bool dim_ok(uint32_t dim)
{
    return dim == 64 || dim == 128 || dim == 256;
}

} // namespace kvd

using namespace kvd;

extern "C" void kvd_cuda_attend_plan(struct kvd_cuda_attend_params *p, uint64_t history_sum,
                                     uint32_t history_max, uint32_t window_max,
                                     uint32_t multiprocessors)
{
    uint32_t nt = n_tiles(*p), blocks = n_row_blocks(*p, nt);
    uint32_t units = p->sequences * p->kv_heads * blocks;
    bool plain = p->codec == KVD_CODEC_BF16;
    uint32_t tiles_max = plain ? 0 : (history_max + PAGE - 1) / PAGE;
    uint64_t tiles = plain ? 0 : history_sum / PAGE * p->kv_heads * blocks;
    bool small = small_blocks(*p);
    // Larger blocks leave fewer parts to merge, and rotate q less often; with many units there is
    // nothing to merge, and smaller ones hide each other's beginnings and ends.
    p->warps = !small || units >= 8 * multiprocessors ? 4 : units * 2 > multiprocessors ? 8 : 16;
    uint64_t slots = multiprocessors * (small ? 16 / p->warps : 2);
    // Ragged lengths even out when parts are smaller.
    if ((uint64_t)history_max * p->sequences > history_sum + history_sum / 4)
        slots *= 3;
    uint64_t part = (tiles + slots - 1) / slots, least = p->warps * 2;
    p->part_tiles = (uint32_t)(part > least ? part : least);
    uint32_t splits = (tiles_max + p->part_tiles / 2) / p->part_tiles;
    p->splits = splits > MAX_SPLITS ? MAX_SPLITS : splits == 0 && tiles_max ? 1 : splits;
    uint32_t window = plain ? window_max + history_max : window_max, chunks = (window + 15) / 16;
    uint32_t want = multiprocessors * 4 / units, most = (chunks + 15) / 16;
    want = want > 1 ? want : 1;
    p->window_splits = want < most ? want : most;
    if (p->window_splits > MAX_WINDOW_SPLITS)
        p->window_splits = MAX_WINDOW_SPLITS;
    if (p->splits + p->window_splits == 0)
        p->window_splits = 1;
    p->scratch_zeroed = scratch_of(*p, nt).parts_at;
}

extern "C" uint64_t kvd_cuda_attend_scratch(const struct kvd_cuda_attend_params *p)
{
    return scratch_of(*p, n_tiles(*p)).total;
}

extern "C" int kvd_cuda_attend(const struct kvd_cuda_attend_params *p, struct CUstream_st *stream)
{
    if (!dim_ok(p->dim_k) || !dim_ok(p->dim_v) || p->kv_heads == 0 || p->q_heads % p->kv_heads ||
        p->q_heads / p->kv_heads > 64 || p->q_len == 0 || p->sequences == 0 ||
        p->sequences > 65535 || p->splits + p->window_splits == 0 || p->splits > MAX_SPLITS ||
        p->window_splits > MAX_WINDOW_SPLITS || p->part_tiles == 0 ||
        (p->new_tokens && (p->new_tokens != p->q_len || p->tail.tokens)) ||
        (p->tail.tokens && p->tail.ring == 0) ||
        (p->warps != 4 && !(small_blocks(*p) && (p->warps == 8 || p->warps == 16))) ||
        (uint64_t)p->kv_heads * n_row_blocks(*p, n_tiles(*p)) > 65535)
        return -1;
    if (p->dim_k == 64)
        return launch_dim<64>(*p, stream);
    return p->dim_k == 128 ? launch_dim<128>(*p, stream) : launch_dim<256>(*p, stream);
}
