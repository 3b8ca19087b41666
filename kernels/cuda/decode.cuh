// The attention kernel for few query rows: one launch, from un-rotated q to un-rotated o.
//
// Block (sequence, kv head and row block, part): the parts of one (sequence, kv head, row block) lie
// far apart in the grid. A history part streams its tiles: each warp takes every WARPS-th tile, from
// a ring of tiles in shared memory that it keeps filling itself. A window part takes sink and recent
// window. What follows, finish.cuh has.
#ifndef KVD_KERNELS_CUDA_DECODE_CUH
#define KVD_KERNELS_CUDA_DECODE_CUH

#include "kernels/cuda/finish.cuh"

namespace kvd
{

constexpr int MAX_SPLITS = 128; // of a history
constexpr int MAX_WINDOW_SPLITS = 32;

__host__ __device__ inline uint32_t n_row_blocks(const attend_params &p, uint32_t nt)
{
    uint32_t rows = p.q_len * (p.q_heads / p.kv_heads);
    return (rows + 8 * nt - 1) / (8 * nt);
}

// Scratch: a counter for each (sequence, kv head, row block), zero between calls; then the parts.
struct scratch_layout {
    uint64_t counters, parts_at, part_bytes, total;
};

__host__ __device__ inline scratch_layout scratch_of(const attend_params &p, uint32_t nt)
{
    scratch_layout l;
    uint64_t units = (uint64_t)p.sequences * p.kv_heads * n_row_blocks(p, nt);
    l.counters = units * 4;
    l.parts_at = (l.counters + 255) / 256 * 256;
    l.part_bytes = (uint64_t)nt * 8 * (p.dim_v + 4) * 4; // [rows][DV] outputs, then [rows](m, l)
    l.total = l.parts_at + units * (p.splits + p.window_splits) * l.part_bytes;
    return l;
}

// The tiles [low, end) of a history that some row of a block sees, and into how many parts they are
// cut.
struct history_range {
    uint32_t low, end, parts;
};

template <bool GENERAL>
__device__ inline history_range history_of(const attend_params &p, const row_block &b,
                                           uint32_t block_rows)
{
    history_range r = {0, (b.hist_end - p.sink + PAGE - 1) / PAGE, 0};
    if (GENERAL) {
        uint32_t first = first_seen(p, row_position(p, b, b.row0));
        uint32_t last = row_position(p, b, min(b.row0 + block_rows, b.rows) - 1);
        r.low = min(r.end, first > p.sink ? (first - p.sink) / PAGE : 0);
        r.end = last < p.sink ? r.low : max(r.low, min(r.end, (last - p.sink) / PAGE + 1));
    }
    uint32_t tiles = r.end - r.low;
    r.parts = min(p.splits, max(1, (tiles + p.part_tiles / 2) / p.part_tiles));
    if (p.splits == 0 || (tiles == 0 && p.window_splits))
        r.parts = 0;
    return r;
}

// Streams a part of the history through the warps' rings.
template <bool GENERAL, int NT, int DK, int DV, int WARPS, int CODEC>
__device__ inline void history_part(const attend_params &p, const row_block &b,
                                    const history_range &range, uint32_t part,
                                    const block_memory<NT, DK, DV, WARPS, CODEC> &memory,
                                    logit_terms<NT> &x, state<NT, DV> &st)
{
    using mem = block_memory<NT, DK, DV, WARPS, CODEC>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    uint32_t tokens = b.hist_end - p.sink, tiles = range.end - range.low;
    uint32_t pos_first = row_position(p, b, b.row0);
    uint32_t pos_last = row_position(p, b, min(b.row0 + 8 * NT, b.rows) - 1);
    uint32_t first = range.low + tiles * part / range.parts + (uint32_t)warp;
    uint32_t end = range.low + tiles * (part + 1) / range.parts;
    const uint64_t *pages = p.pages.codec + (uint64_t)b.s * p.pages.codec_stride;
    const uint32_t bytes = tile<DK, DV, CODEC>::bytes(p.codec);
    uint64_t offset = ((uint64_t)p.layer * p.kv_heads + b.kv) * bytes;
#if !KVD_BULK
    auto loads = queries<NT, DK, WARPS>::load(p, b, warp);
#else
    // Lane k fetches the warp's tiles k, k + 32, ...: it has read their addresses ahead of need.
    uint64_t *bars = memory.barriers(warp);
    auto slot_at = [&](uint32_t i) { return memory.at + (i * WARPS + warp) * mem::TILE; };
    auto page_of = [&](uint32_t k) {
        uint32_t i = first + k * WARPS;
        return (const uint8_t *)(i < end ? pages[i] + offset : 0);
    };
    const uint8_t *mine = page_of(lane);
    auto loads = queries<NT, DK, WARPS>::load(p, b, warp);
    uint64_t policy = cache_policy(b.rows <= 8 * NT);
    if (lane == 0) {
        for (int i = 0; i < mem::SLOTS; i++)
            barrier_init(&bars[i]);
        barriers_ready();
    }
    __syncwarp();
    if (lane < mem::SLOTS - 1 && mine)
        fetch(slot_at(lane), mine, bytes, &bars[lane], policy);
    __syncwarp();
#endif
    auto &qs = *(queries<NT, DK, WARPS> *)(memory.at + mem::QUERIES);
    float divisor = qs.template rotate<CODEC>(p, b, warp, x.sign, loads);
    __syncthreads();
    uint2 q[NT][DK / 16];
    x.unit = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E * divisor * TWO24;
    x.softcap = p.softcap * LOG2E;
    x.none = -1e10f; // scores are below 10
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int ct = 0; ct < DK / 16; ct++)
            q[n][ct] = *(const uint2 *)qs.op[n][ct][lane];
#pragma unroll
        for (int e = 0; e < 2; e++)
            x.sum[n][e] = qs.sum(n * 8 + 2 * t + e) / TWO24;
    }
    __syncthreads(); // the last slots are free
#if KVD_BULK
    if (lane == mem::SLOTS - 1 && mine) {
        barriers_ready(); // what was written there is in order before the copy
        fetch(slot_at(lane), mine, bytes, &bars[lane], policy);
    }
#endif
    st.clear(x.none);
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
        auto operands = [&](int n, int ct) { return q[n][ct]; };
        constexpr int CHUNKS = DK <= 128 ? 4 : 2;
        if (masked)
            attend_tile<GENERAL, true, NT, DK, DV, CODEC, CHUNKS>(at, p.codec, place, operands, x, st);
        else
            attend_tile<false, false, NT, DK, DV, CODEC, CHUNKS>(at, p.codec, place, operands, x, st);
#if KVD_BULK
        __syncwarp();
        if (ahead % 32 == 0)
            mine = page_of(ahead + lane);
        if (lane == ahead % 32 && mine)
            fetch(slot_at(slot), mine, bytes, &bars[slot], policy);
        ahead++;
        if (++slot == mem::SLOTS) {
            slot = 0;
            phase ^= 1;
        }
#endif
    }
}

template <bool F32, int NT, int DK, int DV, int WARPS>
__device__ inline void window_part(const attend_params &p, const row_block &b, uint32_t part,
                                   logit_terms<NT> &x, state<NT, DV> &st)
{
    uint32_t q[NT][DK / 8], q_low[NT][DK / 8];
    x.unit = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E;
    x.softcap = p.softcap * LOG2E;
    x.none = NONE;
#pragma unroll
    for (int n = 0; n < NT; n++)
        load_bf16_queries<F32, DK>(p, b, n, q[n], q_low[n]);
    st.clear(x.none);
    bf16_tokens w = bf16_tokens_of(p, b);
    uint32_t chunks = (w.count + 15) / 16;
    uint32_t first = (uint32_t)((uint64_t)chunks * part / p.window_splits) + threadIdx.x / 32;
    uint32_t end = (uint32_t)((uint64_t)chunks * (part + 1) / p.window_splits);
#pragma unroll 1
    for (uint32_t i = first; i < end; i += WARPS)
        attend_bf16_chunk<F32, NT, DK, DV>(p, b, w, i * 16, q, q_low, x, st);
}

// As many as registers allow.
__host__ __device__ constexpr int blocks_per_multiprocessor(bool general, int nt, int dk, int dv,
                                                            int warps)
{
    int warps_in_all = nt == 2 || dk + dv > 256 ? 8 : general ? 12 : 16;
    return warps_in_all / warps;
}

template <bool GENERAL, int NT, int DK, int DV, int WARPS, int CODEC>
__global__ void __launch_bounds__(WARPS * 32, blocks_per_multiprocessor(GENERAL, NT, DK, DV, WARPS))
    attend_kernel(const __grid_constant__ attend_params p)
{
    using mem = block_memory<NT, DK, DV, WARPS, CODEC>;
    extern __shared__ __align__(128) uint8_t shared[];
    wait_for_previous();
    uint32_t blocks = n_row_blocks(p, NT), part = blockIdx.z;
    uint32_t kv = blockIdx.y / blocks, block = blockIdx.y % blocks;
    row_block b = rows_of(p, blockIdx.x, kv, block * 8 * NT);
    history_range range = history_of<GENERAL>(p, b, 8 * NT);
    bool plain = part >= p.splits;
    if (!plain && part >= range.parts)
        return;
    logit_terms<NT> x;
    state<NT, DV> st;
    x.sign = p.scale < 0 ? -1.0f : p.scale > 0;
    if (GENERAL || plain)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                uint32_t row = min(b.row0 + n * 8 + threadIdx.x % 4 * 2 + e, b.rows - 1);
                x.last[n][e] = row_position(p, b, row);
                x.seen[n][e] = first_seen(p, x.last[n][e]);
            }
    mem memory = {shared};
    if (plain && p.q_type == KVD_DTYPE_F32)
        window_part<true, NT, DK, DV, WARPS>(p, b, part - p.splits, x, st);
    else if (plain)
        window_part<false, NT, DK, DV, WARPS>(p, b, part - p.splits, x, st);
    else
        history_part<GENERAL, NT, DK, DV, WARPS, CODEC>(p, b, range, part, memory, x, st);
    let_next_start();
    uint32_t n = range.parts + p.window_splits;
    int rows = (int)min((uint32_t)mem::ROWS, b.rows - b.row0);
    unrotation<NT, DK, DV, WARPS, CODEC> back(p, b, memory);
    share_maxima(memory, x, st);
    if (n == 1 && !plain && threadIdx.x == 0)
        back.start();
    share_results(memory, st, plain, rows);
    if (n == 1) {
        sum_warps<DV>(memory, rows, [&](int row, int channel, float4 sum, float l) {
            memory.finish(row, channel, times(sum, l > 0 ? 1 / l : 0), plain);
            if (channel == 0)
                write_lse(p, b, row, row_maximum(memory, row), l);
        });
        finish_rows(p, b, rows, back, !plain, plain);
        return;
    }
    scratch_layout l = scratch_of(p, NT);
    uint64_t unit = ((uint64_t)b.s * p.kv_heads + kv) * blocks + block;
    uint8_t *parts = (uint8_t *)p.scratch + l.parts_at +
                     unit * (p.splits + p.window_splits) * l.part_bytes;
    uint32_t slot = plain ? range.parts + part - p.splits : part;
    part_view<DV, mem::ROWS> to = {(float *)(parts + slot * l.part_bytes)};
    sum_warps<DV>(memory, rows, [&](int row, int channel, float4 sum, float l) {
        __stcg(to.vector(row, channel), sum);
        if (channel == 0)
            __stcg(to.terms(row), make_float2(row_maximum(memory, row), l));
    });
    if (!arrive_last((uint32_t *)p.scratch + unit, n, [&] { back.start(); }))
        return;
    merge_parts(p, b, rows, range.parts, parts, l.part_bytes, back);
}

// Launches behind what is on the stream already, and in place before that has finished.
template <bool GENERAL, int NT, int DK, int DV, int WARPS, int CODEC>
cudaError_t launch_attend(const attend_params &p, cudaStream_t stream)
{
    auto kernel = attend_kernel<GENERAL, NT, DK, DV, WARPS, CODEC>;
    constexpr int bytes = block_memory<NT, DK, DV, WARPS, CODEC>::BYTES;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(p.sequences, p.kv_heads * n_row_blocks(p, NT), p.splits + p.window_splits);
    config.blockDim = dim3(WARPS * 32);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return rc == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, p) : rc;
}

} // namespace kvd

#endif
