// What a block of many rows has in shared memory, and which pairs of tiles are its own.
#ifndef KVD_KERNELS_CUDA_MANY_MEMORY_CUH
#define KVD_KERNELS_CUDA_MANY_MEMORY_CUH

#include "kernels/cuda/many_values.cuh"

namespace kvd
{

constexpr int MANY_WARPS = 8; // that attend

// What rows attend to: values in fp16, rotated, those of keys in tc2 or tc2.5 with a mean apart; values that the block itself makes
// of int2's codes; or sinks and windows in bf16, with queries in bf16 or in f32, of which a second bf16 has what the first leaves.
enum many_source { HISTORY, HISTORY_TC, CODES, WINDOWS, WINDOWS_F32 };

// Warpgroups of a block for the same rows.
__host__ __device__ constexpr uint32_t many_groups(many_source source)
{
    return source == CODES ? 2 : 1;
}

// Two warpgroups that attend, and one that fetches, or two that make values: one of keys, one of values.
__host__ __device__ constexpr int many_threads(many_source source)
{
    return MANY_WARPS * 32 + (source == CODES ? 256 : 128);
}

// Shared memory: queries in one part or two, a ring of K's and V's values by turns, and for each warp that makes values what it makes
// them of, of STAGES pairs: codes of two chunks, and their parameters.
template <int D, many_source SOURCE> struct many_memory {
    static constexpr int ROWS = MANY_ROWS / many_groups(SOURCE), Q_PARTS = SOURCE == WINDOWS_F32 ? 2 : 1;
    static constexpr int Q_BYTES = ROWS * D * 2, SIDE = tile_values<D>::SIDE, SLOTS = SOURCE == CODES ? 6 : 5;
    static constexpr int CODED_BYTES = 2 * 512 + 128, MAKERS = 8, STAGES = SOURCE == CODES ? 2 : 0;
    static constexpr int RING = Q_PARTS * Q_BYTES, CODED = RING + SLOTS * SIDE, UNITS = CODED + STAGES * MAKERS * CODED_BYTES,
                         MEANS = UNITS + MANY_WARPS * 4, BARRIERS = MEANS + MANY_ROWS * 4, BYTES = BARRIERS + SLOTS * 16 + 16;
    uint8_t *at;

    __device__ inline uint8_t *slot(uint32_t i) const
    {
        return at + RING + i * SIDE;
    }

    __device__ inline uint8_t *coded(uint32_t maker, uint32_t stage) const
    {
        return at + CODED + (maker * STAGES + stage) * CODED_BYTES;
    }

    __device__ inline float *units() const // what 16 rows' scores are to be multiplied by
    {
        return (float *)(at + UNITS);
    }

    __device__ inline float *means() const // the rows' products with K's mean
    {
        return (float *)(at + MEANS);
    }

    __device__ inline uint64_t *full(uint32_t i) const
    {
        return (uint64_t *)(at + BARRIERS) + i;
    }

    __device__ inline uint64_t *empty(uint32_t i) const
    {
        return full(SLOTS + i);
    }

    __device__ inline uint64_t *queries() const // rotated, for those that attend
    {
        return full(2 * SLOTS);
    }

    // By all threads, before the first barrier of the block.
    __device__ inline void init() const
    {
#if KVD_BULK
        if (threadIdx.x < SLOTS) {
            barrier_init(full(threadIdx.x), SOURCE == CODES ? 4 : 1); // warps that make values, or a copy
            barrier_init(empty(threadIdx.x), MANY_WARPS / many_groups(SOURCE)); // warps that use them
        }
        if (threadIdx.x == 0)
            barrier_init(queries(), MANY_WARPS * 32);
        barriers_ready();
#endif
    }
};

// A slot of the ring, and how often it has come around.
struct ring_place {
    uint32_t slot, phase;

    template <int SLOTS> __device__ inline void next(uint32_t by)
    {
        slot += by;
        if (slot >= SLOTS)
            slot -= SLOTS, phase ^= 1;
    }
};

// Tokens of a pair of tiles, in their order. From the `jump_at`-th on, positions are `jump` further: where a sink ends.
struct pair_tokens {
    int count;
    uint32_t position, jump_at, jump;

    template <bool JUMPS> __device__ inline uint32_t position_of(uint32_t token) const
    {
        return position + token + (JUMPS && token >= jump_at ? jump : 0);
    }
};

// Pairs of tiles of PARTS parts, those that some row of a block of ROWS sees. Values of a round begin with pair `round`.
template <bool BF16, uint32_t ROWS, uint32_t PARTS> struct many_pairs {
    static constexpr uint32_t TOKENS = 2 * PAGE;
    uint32_t first, end, round, first_last, last_seen; // positions that all rows see are from last_seen to first_last
    uint32_t first_tile, end_tile;                     // of a history: of a pair there may be one
    bf16_tokens w;

    __device__ inline many_pairs(const many_call &p, const row_block &b, uint32_t part)
    {
        uint32_t last_row = min(b.row0 + ROWS, p.rows) - 1, lowest = first_seen(p, row_position(p, b, b.row0));
        uint32_t highest = row_position(p, b, last_row);
        first_last = row_position(p, b, b.row0), last_seen = first_seen(p, highest);
        if (!BF16) {
            history_range range = history_of<true>(p, b, ROWS);
            uint32_t begin = part * p.part_tiles;
            first_tile = max(range.first, begin), end_tile = max(first_tile, min(range.end, begin + PARTS * p.part_tiles));
            round = p.first_part * p.part_tiles / 2;
            first = first_tile / 2, end = first_tile < end_tile ? (end_tile + 1) / 2 : first;
            return;
        }
        w = many_tokens(p, b);
        uint32_t from = lowest >= w.base ? w.sink + (lowest - w.base) : min(lowest, w.sink);
        uint32_t to = min(highest >= w.base ? w.sink + (highest - w.base) + 1 : min(highest + 1, w.sink), w.count);
        round = p.first_part * p.window_pairs;
        first = max(from / TOKENS, part * p.window_pairs);
        end = max(first, min((to + TOKENS - 1) / TOKENS, (part + 1) * p.window_pairs));
    }

    __device__ inline pair_tokens tokens(const many_call &p, const row_block &b, uint32_t pair) const
    {
        uint32_t i = pair * TOKENS;
        if (!BF16)
            return {(int)min(b.hist_end - p.sink - i, TOKENS), p.sink + i, 0, 0};
        bool in_sink = i < w.sink;
        return {(int)min(w.count - i, TOKENS), bf16_position(w, i), in_sink ? w.sink - i : 0, in_sink ? w.base - w.sink : 0};
    }

    // Whether some row does not see some of them.
    __device__ inline bool masked(const pair_tokens &x) const
    {
        return x.count < (int)TOKENS || x.template position_of<BF16>(TOKENS - 1) > first_last || x.position < last_seen;
    }
};

} // namespace kvd

#endif
