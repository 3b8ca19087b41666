// Histories that are cut together, so that every multiprocessor has as much to do, however many sequences there are.
//
// The histories of a kv head, S of them, lie as if each began where the one before ends, and are cut into B shares, B >= S. In
// units of a B-th of a history, share j is [j S, (j + 1) S), and sequence s [s B, (s + 1) B). So a share has an end in it at
// most: its first piece is a part of sequence j S / B, and what lies behind that end, if there is one, is the first part of the next
// sequence. Each piece is a block of its own. The first pieces fill all places; as the shorter ones of them end, the pieces behind
// ends take their places, the longest first, so that all places are free at about the same time.
#ifndef KVD_KERNELS_CUDA_SHARES_CUH
#define KVD_KERNELS_CUDA_SHARES_CUH

#include "kernels/cuda/attend.cuh"

#include <numeric>

namespace kvd
{

// In which order the pieces come that lie behind the end of a sequence.
struct share_order {
    uint32_t same, cycle, step, ends;
};

// A call whose histories are cut together.
struct share_call : attend_call {
    share_order order;
};

// Which part of which sequence a block takes, and how many its history has. Of a window's part, `part` counts from p.splits on.
struct share_piece {
    uint32_t s, part, parts;
    uint32_t from, to; // of p.shares: where in the history it begins and ends
};

// The end of sequence k - 1 lies k B mod S behind the beginning of its share, which is `same` times a number below `cycle`; the k
// for number i is i * step mod cycle, or `cycle` further, `same` of them in all. Number 0: an end where a share ends, too.
inline share_order order_of_shares(uint32_t sequences, uint32_t shares)
{
    uint32_t same = std::gcd(sequences, shares), cycle = sequences / same, step = 0;
    for (uint32_t k = 1; k < cycle && step == 0; k++)
        if ((uint64_t)k * (shares / same) % cycle == 1)
            step = k;
    return {same, cycle, step, (cycle - 1) * same};
}

// Blocks of a kv head: pieces of shares, then parts of windows.
inline uint32_t share_blocks(const share_call &p)
{
    return p.shares + p.order.ends + p.sequences * p.window_splits;
}

__device__ inline share_piece piece_of_share(const share_call &p, uint32_t block)
{
    uint32_t share = block, window = block - p.shares - p.order.ends, s;
    bool bf16 = block >= p.shares + p.order.ends;
    if (bf16) {
        s = window / p.window_splits;
    } else if (block < p.shares) {
        s = share * p.sequences / p.shares;
    } else {
        uint32_t end = block - p.shares, i = end / p.order.same;
        s = (i + 1) * p.order.step % p.order.cycle + (end - i * p.order.same) * p.order.cycle;
        share = s * p.shares / p.sequences;
    }
    uint32_t begin = s * p.shares, first = begin / p.sequences, parts = (begin + p.shares - 1) / p.sequences - first + 1;
    if (bf16)
        return {s, p.splits + window - s * p.window_splits, parts, 0, 0};
    uint32_t from = share * p.sequences, to = from + p.sequences;
    return {s, share - first, parts, from > begin ? from - begin : 0, min(to - begin, p.shares)};
}

// A tile of a history: all blocks of a unit compute the same.
__device__ inline uint32_t share_tile(const attend_call &p, uint32_t tiles, uint32_t at)
{
    return at == p.shares ? tiles : min(tiles, (uint32_t)(__fdividef((float)tiles, (float)p.shares) * (float)at + 0.5f));
}

} // namespace kvd

#endif
