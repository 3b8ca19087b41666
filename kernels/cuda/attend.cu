// Attention: plan, checks and choice of codec. What is computed and how: decode.cuh. The kernels of a
// codec are compiled in attend_<codec>.cu.
#include "kernels/cuda/launch.cuh"
#include "kernels/format.h"

#include <algorithm>
#include <limits>

namespace kvd
{

static uint32_t blocks_a_multiprocessor(const attend_params &p)
{
    return (uint32_t)blocks_per_multiprocessor(general(p), (int)n_tiles(p), (int)p.dim_k, (int)p.dim_v, 4);
}

// Tiles that a warp may sum up by itself: products cut off their sums' last bits (they do not round), and
// by 65,536 tokens 1e-4 of a sum is lost.
constexpr uint32_t MOST_TILES = 1024;

// What the beginning and end of a block cost, in tiles. More than one wave of parts of less than LEAST_PART does not pay.
constexpr uint32_t BLOCK_COST = 12, LEAST_PART = 48;

// How many tiles parts of equally long histories take one after the other, `slots` blocks at a time.
static uint64_t even_cost(uint32_t units, uint64_t slots, uint32_t parts, uint32_t part)
{
    return ((uint64_t)units * parts + slots - 1) / slots * (part + BLOCK_COST);
}

// Tiles of a part, so that these are the fewest. A part has `most` tiles at most.
static uint32_t even_part(uint32_t units, uint64_t slots, uint32_t tiles, uint32_t most)
{
    uint64_t least = UINT64_MAX;
    uint32_t best = most;
    for (uint32_t parts = (tiles + most - 1) / most; parts <= MAX_SPLITS && parts <= tiles; parts++) {
        uint32_t part = (tiles + parts - 1) / parts;
        if (parts > 1 && (uint64_t)units * parts > slots && part < LEAST_PART)
            break;
        uint64_t cost = even_cost(units, slots, parts, part);
        if (cost < least) {
            least = cost;
            best = part;
        }
    }
    return best;
}

// Parts of a window: as few as leave four chunks a warp, so that its blocks do not take the places of the history's.
static uint32_t window_parts(uint32_t chunks, uint32_t warps)
{
    return std::min((chunks + 4 * warps - 1) / (4 * warps), MAX_WINDOW_SPLITS + 0u);
}

// How a call is cut: warps of a block, parts of each history and of each sink + window; or shares of all histories of a kv head.
struct cut {
    uint32_t warps, parts, windows, shares = 0;
};

// Where all of a call's blocks run at about the same time, windows matter as much as histories: a block of theirs that
// finds no place begins when the first others have ended.
struct few_units {
    uint32_t units, tiles, chunks, multiprocessors; // tiles of a history, chunks of bf16 tokens
    float size;                                     // of a tile, by one of int2 with head_dim 128

    // In units of the time in which a multiprocessor takes a tile, 0.125 us. The numbers fit 9,000 measured cuts of 60
    // shapes on an H100; what is chosen by them takes 2 % longer than the best, on average.
    float cost(const cut &c) const
    {
        const float bandwidth = 1.1f, next_wave = 40, no_place = 48, small_block = 1, window_chunk = 18;
        uint32_t slots = multiprocessors * 16 / c.warps, blocks = units * c.parts, windows = units * c.windows;
        uint32_t waves = (blocks + slots - 1) / slots, last = blocks - (waves - 1) * slots;
        float part = (float)((tiles + c.parts - 1) / c.parts) * size;
        float alone = blocks + windows <= multiprocessors ? 1 : 16 / (float)c.warps; // or side by side
        auto wave = [&](uint32_t n) {
            return part * std::max(alone, bandwidth * (float)n / (float)multiprocessors);
        };
        float sum = (float)(waves - 1) * (wave(slots) + next_wave) + wave(last);
        if (blocks + windows > waves * slots)
            sum += no_place * 120 / (120 + sum);
        sum += (c.parts > 16 ? 0.5f * (float)(c.parts - 16) : 0) + (c.warps < 16 ? small_block : 0);
        if (c.windows == 0)
            return sum;
        uint32_t steps = ((chunks + c.windows - 1) / c.windows + c.warps - 1) / c.warps;
        return std::max(sum, window_chunk * (float)steps);
    }

    cut best() const
    {
        cut best = {8, 1, 0};
        float least = std::numeric_limits<float>::infinity();
        for (uint32_t warps = units * 2 > multiprocessors ? 8 : 16; warps >= 8; warps /= 2) {
            uint32_t most = std::min({32u, tiles, 3 * multiprocessors * 16 / warps / units + 1});
            uint32_t windows = window_parts(chunks, warps), more = std::min(2 * windows, (chunks + 15) / 16);
            for (bool again = true; again; again = windows < more, windows = more)
                for (uint32_t parts = 1; parts <= most; parts++) {
                    cut c = {warps, parts, windows};
                    float x = cost(c);
                    if (x < least)
                        least = x, best = c;
                }
        }
        return best;
    }
};

// Whether a call is one for blocks of warpgroups. What a worker replays while lengths change is not for these kernels, whose
// scratch is for lengths as they are. Pages of bf16, which the kernels of int2 take as tokens of windows, have no codes to make values of.
static bool is_many_call(const attend_params &p)
{
    auto coded = [](uint32_t codec) { return family_of(codec) != NO_FAMILY && codec != KVD_CODEC_BF16; };
    return coded(p.codec) && coded(p.codec_v) && most_used_dims(p) &&
           p.softcap == 0 && !p.tail.tokens;
}

constexpr uint64_t MANY_BYTES = 128 << 20; // of values at a time

static uint64_t many_pair_bytes(const attend_params &p) // of two tiles of all sequences and heads
{
    return (uint64_t)p.sequences * p.kv_heads * 2 * PAGE * (p.dim_k + p.dim_v) * 2;
}

static uint32_t units_of(const attend_params &p, uint32_t rows) // blocks of so many rows
{
    return p.sequences * p.kv_heads * ((rows_of_head(p) + rows - 1) / rows);
}

// Histories whose values are made ahead: rounds of as many parts as there are values of at a time. False: they are too short, or
// too many.
static bool cut_values(attend_params &p, uint32_t tiles_max, uint32_t most_tiles, uint32_t multiprocessors)
{
    const uint32_t least_round = 64;
    if (most_tiles < std::min(tiles_max, least_round))
        return false;
    uint32_t rounds = (tiles_max + most_tiles - 1) / most_tiles, tiles = (tiles_max + rounds - 1) / rounds;
    p.part_tiles = std::min((even_part(units_of(p, MANY_ROWS), multiprocessors, tiles, tiles) + 1) / 2 * 2, most_tiles / 2 * 2);
    p.splits = (tiles_max + p.part_tiles - 1) / p.part_tiles;
    p.unpacked = std::min((tiles + p.part_tiles - 1) / p.part_tiles, most_tiles / p.part_tiles);
    return true;
}

// Histories whose codes a block takes as they are, two parts at a time.
static void cut_codes(attend_params &p, uint32_t tiles_max, uint32_t multiprocessors)
{
    p.part_tiles = (even_part(units_of(p, FEWER_ROWS), multiprocessors, tiles_max, std::min(tiles_max, MOST_TILES)) + 1) / 2;
    p.splits = 2 * ((tiles_max + 2 * p.part_tiles - 1) / (2 * p.part_tiles));
}

// Sinks and windows: a part has no more than there is scratch for.
static bool cut_windows(attend_params &p, uint32_t window_max, uint32_t most_pairs, uint32_t multiprocessors)
{
    uint32_t pairs = (window_max + 2 * PAGE - 1) / (2 * PAGE), units = units_of(p, MANY_ROWS);
    p.ahead_pairs = std::max(p.unpacked * p.part_tiles / 2, std::min(pairs, most_pairs));
    p.window_splits = p.window_pairs = 0;
    if (pairs == 0)
        return true;
    if (most_pairs == 0)
        return false;
    uint32_t least_parts = (pairs + most_pairs - 1) / most_pairs;
    p.window_splits = std::min(std::max({std::min(multiprocessors / units, MAX_WINDOW_SPLITS + 0u), least_parts, 1u}), pairs);
    p.window_pairs = (pairs + p.window_splits - 1) / p.window_splits;
    return p.window_splits <= MAX_WINDOW_SPLITS;
}

// Cuts a call for blocks of warpgroups, if it is one. With so many rows that it pays, values are made ahead; int2's codes are taken
// as they are with fewer.
static bool cut_for_many(attend_params &p, uint32_t history_max, uint32_t window_max, uint32_t multiprocessors)
{
    const uint32_t least = 32, least_rows = 33, least_share = 96, rows = rows_of_head(p), tiles_max = (history_max + PAGE - 1) / PAGE;
    // With fewer rows the other kernels are as fast until multiprocessors have so many tiles each.
    bool codes = rows < MANY_ROWS && p.codec == KVD_CODEC_INT2 && p.codec_v == KVD_CODEC_INT2 &&
                 (uint64_t)units_of(p, FEWER_ROWS) * tiles_max >= (uint64_t)least_share * multiprocessors;
    if (!is_many_call(p) || tiles_max < least || (rows < MANY_ROWS && !codes) || rows < least_rows || !many_runs(p))
        return false;
    uint32_t most_tiles = (uint32_t)std::min<uint64_t>(MANY_BYTES / many_pair_bytes(p) * 2, MOST_TILES);
    if (codes)
        cut_codes(p, tiles_max, multiprocessors);
    else if (!cut_values(p, tiles_max, most_tiles, multiprocessors))
        return false;
    if (!cut_windows(p, window_max, most_tiles / 2, multiprocessors) || p.splits > MAX_SPLITS)
        return false;
    p.warps = 4;
    p.block_rows = codes ? FEWER_ROWS : MANY_ROWS;
    return true;
}

// What kernels over latents have no say in otherwise.
static bool is_latent_call(const attend_params &p)
{
    return p.kv_heads == 1 && p.codec == KVD_CODEC_BF16 && family_of(p.codec_v) != NO_FAMILY && family_of(p.codec_v) != TC &&
           p.q_heads <= KVD_MAX_LATENT_GROUP && (uint64_t)p.q_len * p.q_heads <= INT32_MAX;
}

// What is not compiled is named in a branch that is discarded, and so need not be there.
static cudaError_t launch_family(const attend_params &p, int family, cudaStream_t stream)
{
    bool power = power_of_two(p.dim_k);
    if (family == INT2)
        return power ? launch_int2(p, stream) : launch_int2_other(p, stream);
    if constexpr (has_kernels(INT2C))
        if (family == INT2C)
            return power ? launch_int2c(p, stream) : launch_int2c_other(p, stream);
    if constexpr (has_kernels(INT4))
        if (has_int4(family))
            return family == INT4 ? launch_int4(p, stream) : launch_pairs(p, stream);
    if constexpr (has_kernels(LEVELS2))
        if (has_levels(family))
            return family == LEVELS2 ? launch_levels2(p, stream) : family == LEVELS3 ? launch_levels3(p, stream) : launch_levels4(p, stream);
    if constexpr (has_kernels(TC))
        if (family == TC)
            return !tuned(p) ? launch_tc(p, stream) : p.codec == TC2 ? launch_tc2(p, stream) : launch_tc2_5(p, stream);
    return cudaErrorInvalidValue;
}

static bool needs_transforms(const attend_params &p)
{
    return family_of(p.codec) == TC || family_of(p.codec_v) == TC;
}

} // namespace kvd

using namespace kvd;

// Into how many shares equally long histories are cut together, and how many tiles one has; 0: parts of their own take no longer, as some
// numbers of sequences fill the places of blocks with them. A place may take two pieces of shares. Multiprocessors do not read
// equally fast, so that shares end with the slowest, where of parts that come one after the other each takes what it can: 1/12.
static uint32_t cut_together(const attend_params &p, uint32_t units, uint64_t slots, uint32_t tiles, uint32_t part, uint32_t &share)
{
    uint64_t shares = slots * p.sequences / units;
    if (!takes_shares(p) || shares < p.sequences || shares / p.sequences + 2 > MAX_SPLITS)
        return 0;
    share = (uint32_t)(((uint64_t)tiles * p.sequences + shares - 1) / shares);
    bool shorter = 33 * (uint64_t)(share + share / 12 + 2 * BLOCK_COST) < 32 * even_cost(units, slots, (tiles + part - 1) / part, part);
    return share >= LEAST_PART && share <= MOST_TILES * 8 && shorter ? (uint32_t)shares : 0;
}

// Parts of many units' histories, one wave of blocks after the other.
static cut cut_many(const attend_params &p, uint32_t units, uint64_t tiles, uint32_t tiles_max, uint32_t chunks,
                    uint32_t multiprocessors, bool ragged, uint32_t &part_tiles)
{
    bool small = small_blocks(p);
    // Larger blocks leave fewer parts to merge, and rotate q less often; with many units there is
    // nothing to merge, and smaller ones hide each other's beginnings and ends.
    uint32_t warps = !small || units >= 8 * multiprocessors ? 4 : units * 2 > multiprocessors ? 8 : 16;
    uint64_t slots = multiprocessors * (small ? 16 / warps : blocks_a_multiprocessor(p));
    uint64_t part = (tiles + slots - 1) / slots;
    // Ragged lengths even out when parts are smaller, but not much smaller than what one costs.
    if (ragged)
        part = std::min<uint64_t>({part / 3, std::max<uint64_t>(part / 8, 96), MOST_TILES * warps});
    else if (tiles_max)
        part = even_part(units, slots, tiles_max, MOST_TILES * warps);
    uint32_t shares = 0, share = 0;
    if (warps == 8 && !ragged && tiles_max)
        shares = cut_together(p, units, slots, tiles_max, (uint32_t)part, share);
    part_tiles = std::max(shares ? share : (uint32_t)part, 2 * warps);
    uint32_t parts = shares ? shares / p.sequences + 2 : (tiles_max + part_tiles / 2) / part_tiles;
    uint32_t most = (chunks + 15) / 16, windows = std::max(multiprocessors * 4 / units, 1u);
    if (small)
        windows = std::min(windows, window_parts(chunks, warps));
    windows = std::max(windows, chunks / (4 * MOST_TILES * warps));
    return {warps, std::clamp(parts, tiles_max ? 1u : 0u, MAX_SPLITS + 0u),
            std::min({windows, most, MAX_WINDOW_SPLITS + 0u}), shares};
}

static bool shares_are_right(const attend_params &p)
{
    return p.shares == 0 || (takes_shares(p) && p.warps == 8 && p.shares >= p.sequences && p.splits > (p.shares - 1) / p.sequences + 1 &&
                             (uint64_t)p.sequences * p.shares <= INT32_MAX && p.shares + p.sequences * (1 + p.window_splits) <= 65535);
}

extern "C" void kvd_cuda_attend_plan(struct kvd_cuda_attend_params *p, uint64_t history_sum,
                                     uint32_t history_max, uint32_t window_max,
                                     uint32_t multiprocessors)
{
    p->block_rows = p->unpacked = p->shares = 0;
    if (takes_latents(*p))
        return plan_latent(*p, history_sum, history_max, window_max, multiprocessors);
    if (!p->packed && cut_for_many(*p, history_max, window_max, multiprocessors)) {
        p->scratch_zeroed = scratch_of(*p, 2).parts_at;
        return;
    }
    if (takes_any(*p))
        return plan_any(*p, history_sum, history_max, window_max, multiprocessors);
    uint32_t nt = n_tiles(*p), blocks = n_row_blocks(*p, nt);
    uint32_t units = p->sequences * p->kv_heads * blocks;
    bool bf16 = p->codec == KVD_CODEC_BF16;
    uint32_t tiles_max = bf16 ? 0 : (history_max + PAGE - 1) / PAGE;
    uint64_t tiles = bf16 ? 0 : history_sum / PAGE * p->kv_heads * blocks;
    uint32_t chunks = ((bf16 ? history_max : 0) + window_max + 15) / 16;
    bool ragged = (uint64_t)history_max * p->sequences > history_sum + history_sum / 4;
    bool few = small_blocks(*p) && !ragged && tiles_max && tiles_max <= 8 * MOST_TILES &&
               (units * 2 <= multiprocessors || (chunks && units <= multiprocessors));
    cut c;
    if (few) {
        float size = (float)kvd_tile_bytes(kvd_codecs_both(p->codec), p->dim_k, p->dim_v) / 4608;
        c = few_units{units, tiles_max, chunks, multiprocessors, size}.best();
        p->part_tiles = (tiles_max + c.parts - 1) / c.parts;
    } else {
        c = cut_many(*p, units, tiles, tiles_max, chunks, multiprocessors, ragged, p->part_tiles);
    }
    p->warps = c.warps;
    p->splits = c.parts;
    p->shares = c.shares;
    p->window_splits = c.parts + c.windows ? c.windows : 1;
    p->scratch_zeroed = scratch_of(*p, nt).parts_at;
}

extern "C" bool kvd_cuda_attend_tuned(struct kvd_codecs codec, uint32_t dim_k, uint32_t dim_v)
{
    struct kvd_cuda_attend_params p = {};
    p.codec = codec.k, p.codec_v = codec.v;
    p.dim_k = dim_k, p.dim_v = dim_v;
    return takes_latents(p) || !takes_any(p);
}

extern "C" uint64_t kvd_cuda_attend_scratch(const struct kvd_cuda_attend_params *p)
{
    if (takes_latents(*p))
        return latent_scratch_bytes(*p);
    if (p->block_rows)
        return many_values_at(*p) + many_pair_bytes(*p) * p->ahead_pairs;
    return takes_any(*p) ? any_scratch(*p) : scratch_of(*p, n_tiles(*p)).total;
}

extern "C" int kvd_cuda_attend(const struct kvd_cuda_attend_params *p, struct CUstream_st *stream)
{
    bool latents = takes_latents(*p);
    if ((!latents && !kvd_head_dims_ok(p->dim_k, p->dim_v)) || p->kv_heads == 0 || p->q_heads % p->kv_heads ||
        (!latents && p->q_heads / p->kv_heads > 64) || p->q_len == 0 || p->sequences == 0 ||
        p->sequences > 65535 || p->splits + p->window_splits == 0 || p->splits > MAX_SPLITS ||
        p->window_splits > MAX_WINDOW_SPLITS || p->part_tiles == 0 ||
        (p->new_tokens && (p->new_tokens < p->q_len || p->tail.tokens)) ||
        (p->tail.tokens && p->tail.ring == 0) ||
        (p->warps != 4 && !latents && !takes_any(*p) && !(small_blocks(*p) && (p->warps == 8 || p->warps == 16))) ||
        !shares_are_right(*p) || (!latents && (uint64_t)p->kv_heads * n_row_blocks(*p, n_tiles(*p)) > 65535))
        return -1;
    if (latents)
        return is_latent_call(*p) ? (int)launch_latent(*p, stream) : -1;
    if (needs_transforms(*p) && !p->rotation.transforms)
        return -1;
    if (p->block_rows)
        return is_many_call(*p) ? (int)launch_many(*p, stream) : -1;
    if (takes_any(*p))
        return (int)launch_any(*p, stream);
    return (int)launch_family(*p, compiled_for(*p), stream);
}
