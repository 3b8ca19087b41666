// The attention kernel for few query rows: one launch, from un-rotated q to un-rotated o.
//
// Block (kv head and row block, sequence, part): blocks side by side read tiles that lie side by side,
// and the parts of one (sequence, kv head, row block) lie far apart in the grid. A history part streams
// its tiles: each warp takes every WARPS-th tile, from a ring of tiles in shared memory that it keeps
// filling itself. A window part takes sink and recent window. What follows, finish.cuh has.
#ifndef KVD_KERNELS_CUDA_DECODE_CUH
#define KVD_KERNELS_CUDA_DECODE_CUH

#include "kernels/cuda/finish.cuh"
#include "kernels/cuda/shares.cuh"

namespace kvd
{

inline uint32_t n_row_blocks(const attend_params &p, uint32_t nt)
{
    uint32_t rows = p.q_len * (p.q_heads / p.kv_heads);
    return (rows + 8 * nt - 1) / (8 * nt);
}

// Scratch: a counter for each (sequence, kv head, row block), zero between calls; then the parts.
struct scratch_layout {
    uint64_t parts_at, total;
};

inline scratch_layout scratch_of(const attend_params &p, uint32_t nt)
{
    uint64_t units = (uint64_t)p.sequences * p.kv_heads * n_row_blocks(p, nt);
    uint32_t most = p.splits + p.window_splits;
    uint64_t unit = nt == 1 ? unit_bytes<1>(p.dim_v, most) : unit_bytes<2>(p.dim_v, most);
    uint64_t parts_at = (units * 4 + 255) / 256 * 256;
    return {parts_at, parts_at + units * unit};
}

// Long parts gain nothing: their queries would come behind the tiles. Where a part is no longer than the rings of its
// warps, computing takes longer than what is left to read, and more reading would disturb the end of the kernel in front.
inline early early_tiles(const attend_params &p, uint32_t warps)
{
    if (!p.settled || p.part_tiles > 16 * warps)
        return EARLY_NONE;
    return p.part_tiles > 2 * warps ? EARLY_SECOND : EARLY_FIRST;
}

// The tiles [first, end) of a history that some row of a block sees, and into how many parts they are
// cut. Of a share, the tiles of its piece.
struct history_range {
    uint32_t first, end, parts;
};

template <bool GENERAL>
__device__ inline history_range history_of(const attend_call &p, const row_block &b, uint32_t block_rows)
{
    history_range r = {0, (b.hist_end - p.sink + PAGE - 1) / PAGE, 0};
    if (GENERAL) {
        uint32_t first = first_seen(p, row_position(p, b, b.row0));
        uint32_t last = row_position(p, b, min(b.row0 + block_rows, p.rows) - 1);
        // Where all that is seen comes after it, nothing of it is looked at: its last page may be gone too.
        r.first = first >= b.hist_end ? r.end : min(r.end, first > p.sink ? (first - p.sink) / PAGE : 0);
        r.end = last < p.sink ? r.first : max(r.first, min(r.end, (last - p.sink) / PAGE + 1));
    }
    uint32_t tiles = r.end - r.first, parts = (uint32_t)((float)tiles * p.parts_a_tile + 0.5f);
    r.parts = min(p.splits, max(1, parts));
    if (p.splits == 0 || (tiles == 0 && p.window_splits))
        r.parts = 0;
    return r;
}

// Which part a block takes. The last parts of long histories come first, then those of short ones, whose
// only part is shorter, to fill the gaps at the end.
__device__ inline uint32_t part_of(const attend_call &p)
{
    return blockIdx.z < p.splits ? p.splits - 1 - blockIdx.z : blockIdx.z;
}

template <bool SHARES> using call_of = std::conditional_t<SHARES, share_call, attend_call>;

// Which rows of which sequence a block takes, and which piece of all histories or which part of one.
template <bool SHARES, int NT> __device__ inline row_block place_of(const call_of<SHARES> &p, share_piece &piece)
{
    if constexpr (SHARES) {
        piece = piece_of_share(p, block_index_y());
        return place_of<NT>(p, piece.s);
    } else {
        row_block b = place_of<NT>(p);
        piece.part = part_of(p);
        return b;
    }
}

__device__ inline history_range range_of(const attend_call &p, const row_block &b, const share_piece &piece)
{
    uint32_t tiles = (b.hist_end - p.sink + PAGE - 1) / PAGE;
    return {share_tile(p, tiles, piece.from), share_tile(p, tiles, piece.to), tiles || !p.window_splits ? piece.parts : 0};
}

// Where a part begins; all blocks of a unit compute the same.
__device__ inline uint32_t part_begin(const history_range &r, uint32_t part)
{
    uint32_t tiles = r.end - r.first;
    float size = __fdividef((float)tiles, (float)r.parts);
    return r.first + (part == r.parts ? tiles : min(tiles, (uint32_t)(size * (float)part + 0.5f)));
}

// Which positions a block's rows see.
template <int NT>
__device__ inline void see(const attend_call &p, const row_block &b, logit_terms<NT> &x)
{
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t row = min(b.row0 + n * 8 + threadIdx.x % 4 * 2 + e, p.rows - 1);
            x.last[n][e] = row_position(p, b, row);
            x.seen[n][e] = first_seen(p, x.last[n][e]);
        }
}

__device__ inline float sign_of(float x)
{
    return x < 0 ? -1.0f : x > 0;
}

// Waits for the kernel in front and asks for the queries. When all blocks have come so far, or ended, the next kernel may
// take their places as these become free.
template <int NT, int DK>
__device__ inline void after_previous(const attend_call &p, const row_block &b, raw_queries<NT, DK> &q)
{
    wait_for_previous();
    let_next_start();
    q.load(p, b);
}

// Streams a part of the history through the warps' rings.
template <bool GENERAL, int NT, int DK, int DV, int WARPS, int CODEC, bool SHARES>
__device__ inline void history_part(const attend_call &p, const row_block &b,
                                    const history_range &range, uint32_t part,
                                    const block_memory<NT, DK, DV, WARPS, CODEC> &memory,
                                    raw_queries<NT, DK> &raw, const key_terms<DK, CODEC> &terms,
                                    typename queries<NT, DK, WARPS>::run &r)
{
    using mem = block_memory<NT, DK, DV, WARPS, CODEC>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t tokens = b.hist_end - p.sink;
    uint32_t pos_first = row_position(p, b, b.row0);
    uint32_t pos_last = row_position(p, b, min(b.row0 + 8 * NT, p.rows) - 1);
    uint32_t first = uniform((SHARES ? range.first : part_begin(range, part)) + (uint32_t)warp);
    uint32_t end = uniform(SHARES ? range.end : part_begin(range, part + 1));
    const uint32_t bytes = tile<DK, DV, CODEC>::bytes(p.codec);
    const uint64_t *pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
    uint64_t offset = ((uint64_t)p.layer * p.kv_heads + b.kv) * bytes;
#if KVD_BULK
    // Lane k fetches the warp's tiles k, k + 32, ...: it has read their addresses ahead of need.
    uint64_t *bars = memory.barriers(warp);
    auto slot_at = [&](uint32_t i) { return memory.own(warp) + i * mem::TILE; };
    auto page_of = [&](uint32_t k) {
        uint32_t i = first + k * WARPS;
        return (const uint8_t *)(i < end ? pages[i] + offset : 0);
    };
    uint64_t policy = cache_policy(p.rows <= 8 * NT);
    auto ask = [&](uint32_t slot, const uint8_t *at) { fetch(slot_at(slot), at, bytes, &bars[slot], policy); };
    const uint8_t *mine = page_of(lane);
    // With two slots, the first tiles of all warps are on their way before the second ones are asked
    // for; with three, all at once, but for the slot where the queries will be.
    bool late = lane == mem::SLOTS - 1 && (mem::SLOTS == 2 || warp == WARPS - 1);
    if (lane < mem::SLOTS && !late && mine)
        ask(lane, mine);
    __syncwarp();
    if (mem::SLOTS == 2 && p.early == EARLY_SECOND && warp < WARPS / 2 && first < end) {
        barrier_wait(&bars[0], 0);
        if (late && mine)
            ask(lane, mine);
        late = false;
        __syncwarp();
    }
#endif
    if (p.early)
        after_previous(p, b, raw);
    auto &rotated = memory.rotated();
    float sign = sign_of(p.scale);
    logit_terms<NT> x;
    auto means = memory.means();
    float divisor = p.q_type == KVD_DTYPE_F32
                        ? rotated.template rotate<true, CODEC>(p, b.kv, sign, terms, means, raw, r, x.mean)
                        : rotated.template rotate<false, CODEC>(p, b.kv, sign, terms, means, raw, r, x.mean);
    key_views<DK, CODEC> views;
    if constexpr (is_tc(CODEC))
        views.take(terms);
    __syncthreads();
    uint2 q[NT][DK / 16];
    state<NT, DV> st;
    if (GENERAL)
        see(p, b, x);
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int ct = 0; ct < DK / 16; ct++)
            q[n][ct] = rotated.op[n][ct][lane];
        sum_queries<DK, CODEC>(q[n], views, x.sum[n]);
    }
#if KVD_BULK
    if (mem::QUERIES_IN_RING)
        __syncthreads(); // the last slot is free
    if (late && mine) {
        if (mem::QUERIES_IN_RING)
            barriers_ready(); // what was written there is in order before the copy
        ask(lane, mine);
    }
#endif
    x.score_unit = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E * divisor * TWO24;
    if constexpr (is_tc(CODEC)) {
        const float unit = terms.query_unit;
        x.score_unit *= p.scale == 0 ? 1 : unit;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                x.mean[n][e] *= __fdividef(sign * inverse_power(divisor), TWO24 * unit);
    }
    x.softcap = p.softcap * LOG2E;
    x.none = -1e10f; // scores are below 10, those of tc2 and tc2.5 below 1e7
    st.clear(x.none);
    auto operands = [&](int n, int ct) { return q[n][ct]; };
#if KVD_BULK
    uint32_t slot = 0, phase = 0, ahead = mem::SLOTS;
#endif
    for (uint32_t i = first; i < end; i += WARPS) {
#if KVD_BULK
        const uint8_t *at = slot_at(slot);
        barrier_wait(&bars[slot], phase);
#else
        const uint8_t *at = (const uint8_t *)pages[i] + offset;
#endif
        uint32_t left = tokens - i * PAGE;
        tile_place place = {left < PAGE ? (int)left : PAGE, p.sink + i * PAGE};
        bool masked = place.count < PAGE;
        if (GENERAL)
            masked |= place.position + PAGE - 1 > pos_first || place.position < first_seen(p, pos_last) ||
                      x.softcap > 0;
        constexpr int CHUNKS = DK <= 128 ? 4 : 2, SIDE = side_by_side(CODEC, DK, WARPS);
        if (masked)
            attend_tile<GENERAL, true, NT, DK, DV, CODEC, CHUNKS, SIDE>(at, p.codec, place, operands, views, x, st);
        else
            attend_tile<false, false, NT, DK, DV, CODEC, CHUNKS, SIDE>(at, p.codec, place, operands, views, x, st);
#if KVD_BULK
        __syncwarp();
        if (ahead % 32 == 0)
            mine = page_of(ahead + lane);
        if (lane == ahead % 32 && mine)
            ask(slot, mine);
        ahead++;
        if (++slot == mem::SLOTS) {
            slot = 0;
            phase ^= 1;
        }
#endif
    }
    share_results(memory, x, st, p.rows - place_of<NT>(p).row0);
}

template <bool GENERAL, bool F32, int NT, int DK, int DV, int WARPS, typename M>
__device__ inline void window_part(const attend_call &p, const row_block &b, uint32_t part,
                                   const M &memory, const raw_queries<NT, DK> &raw)
{
    logit_terms<NT> x;
    state<NT, padded(DV)> st;
    see(p, b, x);
    x.sign = sign_of(p.scale);
    uint32_t q[NT][padded(DK) / 8], q_low[NT][padded(DK) / 8];
    x.score_unit = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E;
    x.softcap = p.softcap * LOG2E;
    x.none = NONE;
#pragma unroll
    for (int n = 0; n < NT; n++)
        raw.template operands<F32>(n, q[n], q_low[n]);
    st.clear(x.none);
    bf16_tokens w = bf16_tokens_of<GENERAL>(p, b);
    uint32_t chunks = (w.count + 15) / 16;
    uint32_t first = uniform((uint32_t)((uint64_t)chunks * part / p.window_splits) + threadIdx.x / 32);
    uint32_t end = uniform((uint32_t)((uint64_t)chunks * (part + 1) / p.window_splits));
#pragma unroll 1
    for (uint32_t i = first; i < end; i += WARPS)
        attend_bf16_chunk<F32, NT, DK, DV>(p, b, w, i * 16, q, q_low, x, st);
    share_results(memory, x, st, p.rows - b.row0);
}

// As many as registers allow.
__host__ __device__ constexpr int blocks_per_multiprocessor(bool general, int nt, int dk, int dv,
                                                            int warps)
{
    int warps_in_all = nt == 2 || dk + dv > 256 ? 8 : general ? 12 : 16;
    return warps_in_all / warps;
}

template <bool GENERAL, int NT, int DK, int DV, int WARPS, int CODEC, bool SHARES>
__global__ void __launch_bounds__(WARPS * 32, blocks_per_multiprocessor(GENERAL, NT, DK, DV, WARPS))
    attend_kernel(const __grid_constant__ call_of<SHARES> p)
{
    using mem = block_memory<NT, DK, DV, WARPS, CODEC>;
    KVD_DYNAMIC_SHARED(shared);
    mem memory = {shared};
    share_piece piece;
    row_block b = place_of<SHARES, NT>(p, piece);
    uint32_t part = piece.part;
    bool bf16 = part >= p.splits;
    // Rotations do not change while kernels run: they may be read before the last one has finished.
    typename queries<NT, DK, WARPS>::run r;
    if (!bf16) {
        queries<NT, DK, WARPS>::load(p, b.kv, 0, r);
        prefetch_place(p, b);
    }
    key_terms<DK, CODEC> terms;
    if constexpr (is_tc(CODEC)) {
        const kvd_cuda_transform &t = transform_of(p.rotation, p.layer, b.kv);
        if (!bf16)
            terms.load(t, p.codec);
        memory.means().fetch(t, !bf16);
    }
    memory.init();
    raw_queries<NT, DK> q;
    if (bf16 || !p.early) // before the first tiles are asked for, behind which q would wait long
        after_previous(p, b, q);
    load_lengths(p, b);
    history_range range = SHARES ? range_of(p, b, piece) : history_of<GENERAL>(p, b, 8 * NT);
    if (!bf16 && part >= range.parts) {
        if constexpr (is_tc(CODEC))
            copies_arrived(); // none may come when the block has ended
        return;
    }
    if (threadIdx.x == 0)
        memory.parts() = range.parts;
    if (bf16 && p.q_type == KVD_DTYPE_F32)
        window_part<GENERAL, true, NT, DK, DV, WARPS>(p, b, part - p.splits, memory, q);
    else if (bf16)
        window_part<GENERAL, false, NT, DK, DV, WARPS>(p, b, part - p.splits, memory, q);
    else
        history_part<GENERAL, NT, DK, DV, WARPS, CODEC, SHARES>(p, b, range, part, memory, q, terms, r);
    b = place_of<SHARES, NT>(p, piece); // again, so that nothing of it was kept in registers
    part = piece.part, bf16 = part >= p.splits;
    uint32_t rows = min((uint32_t)mem::ROWS, p.rows - b.row0);
    if constexpr (is_tc(CODEC))
        copies_arrived(); // V's mean
    __syncthreads();
    uint32_t of_history = uniform(memory.parts()), n = of_history + p.window_splits;
    unrotation<mem, DV> back(p, b, memory);
    if (n == 1 && !bf16)
        back.start();
    using work = share<NT, DV, WARPS>;
    work mine(rows);
    float4 history[work::MOST], windows[work::MOST];
    row_terms t = {};
    if (mine.any())
        t = combine<NT>(memory, warp_partials<mem>{memory}, rows, mine, history, windows);
    bool rotated = !bf16;
    if (!bf16)
        t.coded = t.l;
    if (n > 1) {
        using layout = part_layout<NT, DV>;
        uint64_t unit = ((uint64_t)b.s * p.kv_heads + b.kv) * p.row_blocks + b.row0 / (8 * NT);
        uint32_t most = p.splits + p.window_splits;
        layout parts = {most, (uint8_t *)p.scratch + p.scratch_zeroed + unit * layout::bytes(most)};
        write_part(parts, bf16 ? of_history + part - p.splits : part, n, rows, mine, t, history);
        if (!arrive_last((uint32_t *)p.scratch + unit, n))
            return;
        rotated = of_history > 0;
        bf16 = p.window_splits > 0;
        if (rotated)
            back.start();
        if (mine.any())
            t = combine<NT>(memory, part_partials<layout>{parts, n, of_history}, rows, mine, history, windows);
    } else if (bf16) {
#pragma unroll
        for (int i = 0; i < work::MOST; i++)
            windows[i] = history[i];
    }
    finish_rows<NT, DV>(p, b, back, rows, mine, t, rotated, bf16, history, windows);
}

template <bool GENERAL, int NT, int DK, int DV, int WARPS, int CODEC, bool SHARES = false>
cudaError_t launch_attend(const attend_params &p, cudaStream_t stream)
{
    call_of<SHARES> call;
    (attend_params &)call = p;
    call.group = p.q_heads / p.kv_heads;
    call.rows = p.q_len * call.group;
    call.row_blocks = n_row_blocks(p, NT);
    call.early = early_tiles(p, WARPS);
    call.parts_a_tile = 1.0f / (float)p.part_tiles;
    dim3 grid(p.kv_heads * call.row_blocks, p.sequences, p.splits + p.window_splits);
    if constexpr (SHARES) {
        call.order = order_of_shares(p.sequences, p.shares);
        grid = dim3(grid.x, share_blocks(call), 1);
    }
    return launch_behind(attend_kernel<GENERAL, NT, DK, DV, WARPS, CODEC, SHARES>, grid, WARPS * 32,
                         block_memory<NT, DK, DV, WARPS, CODEC>::BYTES, stream, call);
}

} // namespace kvd

#endif
