// Attention: plan, checks and choice of codec. What is computed and how: decode.cuh. The kernels of a
// codec are compiled in attend_<codec>.cu.
#include "kernels/cuda/launch.cuh"

#include <algorithm>

namespace kvd
{

static bool dim_ok(uint32_t dim)
{
    return dim == 64 || dim == 128 || dim == 256;
}

static uint32_t blocks_a_multiprocessor(const attend_params &p, bool small)
{
    return small ? 16 / p.warps
                 : (uint32_t)blocks_per_multiprocessor(general(p), (int)n_tiles(p), (int)p.dim_k,
                                                       (int)p.dim_v, 4);
}

// Tiles that a warp may sum up by itself: products cut off their sums' last bits (they do not round), and
// by 65,536 tokens 1e-4 of a sum is lost.
constexpr uint32_t MOST_TILES = 1024;

// Tiles of a part, so that all parts of equally long histories take the fewest tiles one after the
// other: `slots` blocks run at a time, and the beginning and end of a block cost some tiles' time. More
// than one wave of parts of less than 48 tiles does not pay. A part has `most` tiles at most.
static uint32_t even_part(uint32_t units, uint64_t slots, uint32_t tiles, uint32_t most)
{
    const uint32_t overhead = 12, least_part = 48;
    uint64_t least = UINT64_MAX;
    uint32_t best = most;
    for (uint32_t parts = (tiles + most - 1) / most; parts <= MAX_SPLITS && parts <= tiles; parts++) {
        uint64_t waves = ((uint64_t)units * parts + slots - 1) / slots;
        uint32_t part = (tiles + parts - 1) / parts;
        if (parts > 1 && waves > 1 && part < least_part)
            break;
        if (waves * (part + overhead) < least) {
            least = waves * (part + overhead);
            best = part;
        }
    }
    return best;
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
    uint64_t slots = multiprocessors * blocks_a_multiprocessor(*p, small);
    uint64_t part = (tiles + slots - 1) / slots, least = p->warps * 2;
    // Ragged lengths even out when parts are smaller, but not much smaller than what one costs.
    if ((uint64_t)history_max * p->sequences > history_sum + history_sum / 4)
        part = std::min<uint64_t>({part / 3, std::max<uint64_t>(part / 8, 96), MOST_TILES * p->warps});
    else if (tiles_max)
        part = even_part(units, slots, tiles_max, MOST_TILES * p->warps);
    p->part_tiles = (uint32_t)(part > least ? part : least);
    uint32_t splits = (tiles_max + p->part_tiles / 2) / p->part_tiles;
    p->splits = splits > MAX_SPLITS ? MAX_SPLITS : splits == 0 && tiles_max ? 1 : splits;
    uint32_t window = plain ? window_max + history_max : window_max, chunks = (window + 15) / 16;
    uint32_t want = multiprocessors * 4 / units, most = (chunks + 15) / 16;
    want = want > 1 ? want : 1;
    want = std::max(want, chunks / (4 * MOST_TILES * p->warps));
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
    switch (p->codec) {
    case KVD_CODEC_BF16:
    case KVD_CODEC_INT2:
        return launch_int2(*p, stream);
    case KVD_CODEC_INT2C:
        return launch_int2c(*p, stream);
    case KVD_CODEC_INT2_LM:
    case KVD_CODEC_TURBOQUANT_2:
        return launch_levels2(*p, stream);
    case KVD_CODEC_TURBOQUANT_3:
        return launch_levels3(*p, stream);
    case KVD_CODEC_TURBOQUANT_4:
        return launch_levels4(*p, stream);
    default:
        return -1;
    }
}
