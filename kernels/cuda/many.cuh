// Attention of many query rows, whose arithmetic takes longer than reading: histories are made values ahead, in fp16 and still
// rotated, and 128 rows a block attend to them by products of warpgroups (`wgmma`).
//
// A history is taken in rounds, as its values would take eight times the memory of its codes. A call is: sinks and windows; in each
// round its tiles to values, then attention over them, whose partial results lie as finish.cuh has them, for units of 16
// rows; at the end a kernel that combines them.
#ifndef KVD_KERNELS_CUDA_MANY_CUH
#define KVD_KERNELS_CUDA_MANY_CUH

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace kvd
{

constexpr int MANY_WARPS = 8, MANY_THREADS = MANY_WARPS * 32 + 128; // warps that attend, and a warpgroup that fetches
// By so much, in log2 units, scores may exceed the maximum that sums are relative to: it is seldom raised, and what comes of
// exponentials is at most 1 all the same.
constexpr float SLACK = 3;
// A quarter of values is what is stored: fp16 has it whatever scale and min are.
constexpr float STORED = 0.25f;

// A call, with the number of blocks of MANY_ROWS rows of a kv head, and the first part of a round.
struct many_call : attend_call {
    uint32_t blocks, first_part;
    uint8_t *values;
};

// Values of two tiles: K, core matrices of 8 tokens by 8 channels, then V, of 8 channels by 8 tokens, 128 bytes each: those of 8
// tokens (channels) one after another.
template <int D> struct tile_values {
    static constexpr int TOKENS = 2 * PAGE, SIDE = TOKENS * D * 2, BYTES = 2 * SIDE;
};

template <int D> __device__ inline uint8_t *values_of(const many_call &p, uint32_t s, uint32_t kv, uint32_t tile_of_round)
{
    uint64_t pairs = p.unpacked * p.part_tiles / 2;
    return p.values + (((uint64_t)s * p.kv_heads + kv) * pairs + tile_of_round / 2) * tile_values<D>::BYTES;
}

// Where the partial results of 16 rows lie, of all parts.
template <int D> __device__ inline part_layout<2, D> many_parts(const many_call &p, const row_block &b, uint32_t row0)
{
    using layout = part_layout<2, D>;
    uint64_t unit = ((uint64_t)b.s * p.kv_heads + b.kv) * p.row_blocks + row0 / layout::ROWS;
    uint32_t most = p.splits + p.window_splits;
    return {most, (uint8_t *)p.scratch + p.scratch_zeroed + unit * layout::bytes(most)};
}

__device__ inline uint32_t many_tiles(const many_call &p, const row_block &b)
{
    return (b.hist_end - p.sink + PAGE - 1) / PAGE;
}

// -- codes to values -----------------------------------------------------------------------------

// Parameters of tokens 2 t + e and 2 t + e + 8 of a chunk, those of columns of V's operands; none of what was never written.
template <int CODEC> __device__ inline void column_params(const uint8_t *params, int chunk, int left, float2 (&x)[2][2])
{
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int token = threadIdx.x % 4 * 2 + e;
        uint2 raw = *(const uint2 *)(params + chunk * 64 + token * 8);
        x[e][0] = token < left ? unpack_fp16(raw.x) : make_float2(0, 0);
        x[e][1] = token + 8 < left ? unpack_fp16(raw.y) : make_float2(0, 0);
    }
}

// A tile of a round, one side and chunk a warp. Tiles that no row sees may have no page any more; V of one beside a tile that is seen
// is zeros.
template <int D, int CODEC> __global__ void __launch_bounds__(256) many_values_kernel(const __grid_constant__ many_call p)
{
    using layout = tile<D, D, CODEC>;
    static_assert(CODEC == INT2, "parameters are two fp16");
    row_block b = {blockIdx.z, blockIdx.y, 0};
    wait_for_previous();
    let_next_start();
    load_lengths(p, b);
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = p.first_part * p.part_tiles + blockIdx.x;
    history_range range = history_of<true>(p, b, p.rows);
    auto seen = [&](uint32_t tile) { return tile >= range.first && tile < range.end; };
    bool v = warp >= 4, there = seen(i);
    int chunk = (int)warp % 4;
    if (!there && (!v || !seen(i ^ 1)))
        return;
    uint32_t *to = (uint32_t *)(values_of<D>(p, b.s, b.kv, blockIdx.x) + (v ? tile_values<D>::SIDE : 0)) + lane;
    auto put = [&](int token8, int channel8, uint32_t x) {
        token8 += i % 2 * 8 + chunk * 2;
        to[(v ? channel8 * 16 + token8 : token8 * (D / 8) + channel8) * 32] = x;
    };
    if (!there) {
        for (int k = 0; k < D / 4; k++)
            put(k % 2, k / 2, 0);
        return;
    }
    const uint8_t *at = (const uint8_t *)p.pages.codec[(uint64_t)b.s * p.pages.codec_stride + i] +
                        ((uint64_t)p.layer * p.kv_heads + b.kv) * layout::bytes(p.codec);
    const uint4 words = *(const uint4 *)(at + (v ? layout::v_codes(p.codec) : 0) + (D == 64 ? chunk / 2 : chunk) * 512 + lane * 16);
    int first_bit = D == 64 ? chunk % 2 * 8 : 0, left = (int)(b.hist_end - p.sink - i * PAGE) - chunk * 16;
    float2 param[2][2]; // of a register's two elements, by its row or column half
    if (v) {
        column_params<CODEC>(at + layout::v_params(p.codec), chunk, left, param);
    } else {
        load_params<CODEC>(at + layout::k_params(p.codec), p.codec, chunk, param[0][0], param[0][1]);
        param[1][0] = param[0][0], param[1][1] = param[0][1];
    }
#pragma unroll
    for (int ct = 0; ct < D / 16; ct++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            // Of K rows are tokens, of V channels: token half and channel half change places.
            int token_half = v ? r / 2 : r % 2, channel_half = v ? r % 2 : r / 2;
            uint32_t codes = word_of(words, r) >> (first_bit + 2 * ct);
            float2 p0 = param[0][token_half], p1 = param[1][token_half];
            float x = fmaf(p0.x, (float)(codes & 3), p0.y), y = fmaf(p1.x, (float)(codes >> 16 & 3), p1.y);
            put(token_half, 2 * ct + channel_half, pack_fp16(x * STORED, y * STORED));
        }
}

// -- attention -----------------------------------------------------------------------------------

// Shared memory: queries, a ring of K's and V's values by turns.
template <int D> struct many_memory {
    static constexpr int Q_BYTES = MANY_ROWS * D * 2, SIDE = tile_values<D>::SIDE, SLOTS = 5;
    static constexpr int RING = Q_BYTES, UNITS = RING + SLOTS * SIDE, BARRIERS = UNITS + MANY_WARPS * 4, BYTES = BARRIERS + SLOTS * 16;
    uint8_t *at;

    __device__ inline uint8_t *slot(uint32_t i) const
    {
        return at + RING + i * SIDE;
    }

    __device__ inline float *units() const // what 16 rows' scores are to be multiplied by
    {
        return (float *)(at + UNITS);
    }

    __device__ inline uint64_t *full(uint32_t i) const
    {
        return (uint64_t *)(at + BARRIERS) + i;
    }

    __device__ inline uint64_t *empty(uint32_t i) const
    {
        return full(SLOTS + i);
    }
};

// A slot of the ring, and how often it has come around.
struct ring_place {
    uint32_t slot, phase;

    template <int SLOTS> __device__ inline void next()
    {
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
        phase ^= slot == 0;
    }
};

#if KVD_WARPGROUP

// Rotates a block's queries into shared memory: core matrices of 8 rows by 8 channels. By all threads; the last warps have
// nothing to multiply.
template <int D> __device__ inline void many_queries(const many_call &p, const row_block &b, const many_memory<D> &mem)
{
    using few = queries<2, D, MANY_WARPS>;
    constexpr int PLAIN = LEVELS2; // values are no codes: what undoes their places in a word is left out
    uint32_t lane = threadIdx.x % 32;
    float sign = sign_of(p.scale), nothing[2][2];
    key_terms<D, PLAIN> terms;
    typename few::run r;
    few::load(p, b.kv, 0, r);
#pragma unroll 1
    for (uint32_t i = 0; i < MANY_ROWS / 16; i++) {
        row_block rows = b;
        rows.row0 = min(b.row0 + i * 16, p.rows - 1); // another's: what comes of them is not written
        raw_queries<2, D> raw;
        raw.load(p, rows);
        auto put = [&](int n, int tile, uint32_t b0, uint32_t b1) {
            uint32_t *to = (uint32_t *)(mem.at + ((i * 2 + n) * (D / 8) + tile * 2) * 128) + lane;
            to[0] = b0, to[32] = b1;
        };
        float divisor = p.q_type == KVD_DTYPE_F32 ? few::template rotate<true, PLAIN>(p, b.kv, sign, terms, 0, raw, r, nothing, put)
                                                  : few::template rotate<false, PLAIN>(p, b.kv, sign, terms, 0, raw, r, nothing, put);
        if (threadIdx.x == 0)
            mem.units()[i] = p.scale == 0 ? 1 : fabsf(p.scale) * LOG2E * divisor / STORED;
    }
    barriers_ready(); // products may read what was written
    __syncthreads();
}

// What a warp has of its 16 rows, of which a lane's are g and g + 8: columns 8 j + 2 t + e of the sums are channels. The maximum is
// in log2 units.
template <int D> struct many_rows {
    float o[D / 8][4], m[2], l[2], unit;
    uint32_t seen[2], last[2];

    __device__ inline void begin(const many_call &p, const row_block &b, float of_scores)
    {
        unit = of_scores;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            last[h] = row_position(p, b, min(b.row0 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + h * 8, p.rows - 1));
            seen[h] = first_seen(p, last[h]);
            m[h] = NONE, l[h] = 0;
        }
    }

    template <bool MASKED> __device__ inline bool sees(const tile_place &place, int j, int i) const
    {
        int token = 8 * j + (int)threadIdx.x % 4 * 2 + i % 2;
        uint32_t position = place.position + token;
        return !MASKED || (token < place.count && position >= seen[i / 2] && position <= last[i / 2]);
    }

    // Raises the maxima to those of scores s.
    template <bool MASKED> __device__ inline void raise(const float (&s)[16][4], const tile_place &place)
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = NONE;
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (sees<MASKED>(place, j, 2 * h + e))
                        top = fmaxf(top, s[j][2 * h + e] * unit);
            top = fmaxf(m[h], quad_max(top));
            float f = fast_exp2(m[h] - top);
            m[h] = top;
            l[h] *= f;
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                o[j][2 * h] *= f, o[j][2 * h + 1] *= f;
        }
    }

    // Scores to probabilities: their sums, and they themselves as operands.
    template <bool MASKED> __device__ inline void powers(float (&s)[16][4], const tile_place &place, uint32_t (&a)[8][4])
    {
        float most = 0, shift[2] = {-m[0] - SLACK, -m[1] - SLACK};
#pragma unroll
        for (int j = 0; j < 16; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (sees<MASKED>(place, j, i))
                    most = fmaxf(most, fmaf(s[j][i], unit, shift[i / 2]));
        if (__any_sync(~0u, most > 0)) {
            raise<MASKED>(s, place);
            shift[0] = -m[0] - SLACK, shift[1] = -m[1] - SLACK;
        }
#pragma unroll
        for (int j = 0; j < 16; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = fast_exp2(fmaf(s[j][i], unit, shift[i / 2]));
                if (MASKED && !sees<MASKED>(place, j, i))
                    s[j][i] = 0;
            }
            l[0] += s[j][0] + s[j][1];
            l[1] += s[j][2] + s[j][3];
            a[j / 2][j % 2 * 2] = pack_fp16(s[j][0], s[j][1]);
            a[j / 2][j % 2 * 2 + 1] = pack_fp16(s[j][2], s[j][3]);
        }
    }

    // Two tiles: K's values, then V's.
    template <bool MASKED> __device__ inline void attend(const many_memory<D> &mem, const tile_place &place, ring_place &at)
    {
        float s[16][4];
        uint32_t a[8][4];
        bool first = threadIdx.x % 128 == 0;
        uint64_t q = operand_descriptor<D>(mem.at + threadIdx.x / 128 * (64 * D * 2)), x = operand_descriptor<D>(mem.slot(at.slot));
        barrier_wait(mem.full(at.slot), at.phase);
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            warpgroup_mma_fp16(s, q + k * (256 >> 4), x + k * (256 >> 4), k > 0);
        warpgroup_commit();
        warpgroup_wait();
        if (first)
            arrive(mem.empty(at.slot));
        at.template next<many_memory<D>::SLOTS>();
        powers<MASKED>(s, place, a);
        x = operand_descriptor<tile_values<D>::TOKENS>(mem.slot(at.slot));
        barrier_wait(mem.full(at.slot), at.phase);
        warpgroup_begin();
#pragma unroll
        for (int k = 0; k < 8; k++)
            warpgroup_add_fp16(o, a[k], x + k * (256 >> 4));
        warpgroup_commit();
        warpgroup_wait();
        if (first)
            arrive(mem.empty(at.slot));
        at.template next<many_memory<D>::SLOTS>();
    }

    // Writes them as part `part` of n. Sums are left in the unit of finish.cuh.
    __device__ inline void write(const many_call &p, const row_block &b, uint32_t part, uint32_t n) const
    {
        using layout = part_layout<2, D>;
        uint32_t row0 = b.row0 + threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (row0 >= p.rows)
            return;
        layout parts = many_parts<D>(p, b, row0);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t row = h * 8 + g, end = part + 1 == n ? layout::pitch(n) : part + 1;
            float sum = quad_sum(l[h]), top = m[h] > NONE * 0.99f ? m[h] + SLACK : NONE;
            for (uint32_t k = part + t; k < end; k += 4) {
                __stcg(parts.terms(TERM_M, row) + k, k == part ? top : NONE);
                __stcg(parts.terms(TERM_L, row) + k, k == part ? sum : 0);
                __stcg(parts.terms(TERM_ZERO_SUM, row) + k, 0.0f);
            }
#pragma unroll
            for (int j = 0; j < D / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float back = 1 / (STORED * TWO24 * slot_factor<INT2>(j / 2));
                    float *to = (float *)parts.values(part).vector((int)row / 4, 8 * j + 2 * (int)t + e);
                    __stcg(to + row % 4, o[j][2 * h + e] * back);
                }
        }
    }
};
#endif

template <int D> __global__ void __launch_bounds__(MANY_THREADS, 1) many_kernel(const __grid_constant__ many_call p)
{
#if KVD_WARPGROUP
    KVD_DYNAMIC_SHARED(shared);
    const many_memory<D> mem = {shared};
    row_block b = {blockIdx.y, blockIdx.x / p.blocks, blockIdx.x % p.blocks * MANY_ROWS};
    if (threadIdx.x < mem.SLOTS) {
        barrier_init(mem.full(threadIdx.x), 1);
        barrier_init(mem.empty(threadIdx.x), 2);
    }
    barriers_ready();
    wait_for_previous();
    let_next_start();
    load_lengths(p, b);
    // Of the tiles that some row sees, those of this part; pairs from the round's beginning on.
    history_range range = history_of<true>(p, b, MANY_ROWS);
    uint32_t part = p.first_part + blockIdx.z, round = p.first_part * p.part_tiles, begin = part * p.part_tiles;
    uint32_t first = max(range.first, begin), end = min(range.end, begin + p.part_tiles);
    uint32_t pair = first < end ? (first - round) / 2 : 0, pairs = first < end ? (end - round + 1) / 2 : 0;
    many_queries(p, b, mem);
    ring_place at = {0, 0};
    if (threadIdx.x >= MANY_WARPS * 32) {
        fewer_registers<24>();
        const uint8_t *from = values_of<D>(p, b.s, b.kv, 0);
        uint64_t policy = cache_policy(false);
        if (threadIdx.x == MANY_WARPS * 32)
            for (uint32_t i = 2 * pair; i < 2 * pairs; i++) {
                barrier_wait(mem.empty(at.slot), at.phase ^ 1);
                fetch(mem.slot(at.slot), from + (uint64_t)i * mem.SIDE, mem.SIDE, mem.full(at.slot), policy);
                at.template next<many_memory<D>::SLOTS>();
            }
        return;
    }
    more_registers<240>();
    many_rows<D> rows;
    rows.begin(p, b, mem.units()[threadIdx.x / 32]);
    uint32_t first_last = row_position(p, b, b.row0), last_seen = first_seen(p, row_position(p, b, min(b.row0 + MANY_ROWS, p.rows) - 1));
    for (; pair < pairs; pair++) {
        uint32_t token = (round + 2 * pair) * PAGE, left = b.hist_end - p.sink - token;
        tile_place place = {(int)min(left, (uint32_t)tile_values<D>::TOKENS), p.sink + token};
        if (place.count < tile_values<D>::TOKENS || place.position + tile_values<D>::TOKENS - 1 > first_last || place.position < last_seen)
            rows.template attend<true>(mem, place, at);
        else
            rows.template attend<false>(mem, place, at);
    }
    rows.write(p, b, part, p.splits + p.window_splits);
#endif
}

// -- windows, and the end ------------------------------------------------------------------------

// How the usual code takes 16 rows.
template <int D, int CODEC> struct sixteen_rows {
    static constexpr int NT = 2, WARPS = 4;
    using mem = block_memory<NT, D, D, WARPS, CODEC>;
    using work = share<NT, D, WARPS>;
};

// A part of sinks and windows, by 16 rows.
template <int D, int CODEC> __global__ void __launch_bounds__(128, 2) many_windows_kernel(const __grid_constant__ many_call p)
{
    using of = sixteen_rows<D, CODEC>;
    using work = typename of::work;
    KVD_DYNAMIC_SHARED(shared);
    typename of::mem memory = {shared};
    row_block b = place_of<of::NT>(p);
    raw_queries<of::NT, D> q;
    after_previous(p, b, q);
    load_lengths(p, b);
    uint32_t part = blockIdx.z, rows = min((uint32_t)of::mem::ROWS, p.rows - b.row0);
    if (p.q_type == KVD_DTYPE_F32)
        window_part<true, true, of::NT, D, D, of::WARPS>(p, b, part, memory, q);
    else
        window_part<true, false, of::NT, D, D, of::WARPS>(p, b, part, memory, q);
    __syncthreads();
    work mine(rows);
    float4 sums[work::MOST], none[work::MOST];
    row_terms t = {};
    if (mine.any())
        t = combine<of::NT>(memory, warp_partials<typename of::mem>{memory}, rows, mine, sums, none);
    write_part(many_parts<D>(p, b, b.row0), p.splits + part, p.splits + p.window_splits, rows, mine, t, sums);
}

// Combines the parts of 16 rows. A history that has grown beyond what was planned for is not a number.
template <int D, int CODEC> __global__ void __launch_bounds__(128, 2) many_finish_kernel(const __grid_constant__ many_call p)
{
    using of = sixteen_rows<D, CODEC>;
    using work = typename of::work;
    KVD_DYNAMIC_SHARED(shared);
    typename of::mem memory = {shared};
    row_block b = place_of<of::NT>(p);
    memory.init();
    __syncthreads();
    unrotation<typename of::mem, D> back(p, b, memory);
    wait_for_previous();
    let_next_start();
    load_lengths(p, b);
    back.start();
    uint32_t rows = min((uint32_t)of::mem::ROWS, p.rows - b.row0);
    part_partials<part_layout<2, D>> parts = {many_parts<D>(p, b, b.row0), p.splits + p.window_splits, p.splits};
    work mine(rows);
    float4 history[work::MOST], windows[work::MOST];
    row_terms t = {};
    if (mine.any())
        t = combine<of::NT>(memory, parts, rows, mine, history, windows);
    if (many_tiles(p, b) > p.splits * p.part_tiles)
        t.l = NAN;
    finish_rows<of::NT, D>(p, b, back, rows, mine, t, true, p.window_splits > 0, history, windows);
}

template <int D, int CODEC> cudaError_t launch_many_dims(const attend_params &p, cudaStream_t stream)
{
    using mem = typename sixteen_rows<D, CODEC>::mem;
    many_call call;
    (attend_params &)call = p;
    call.group = p.q_heads / p.kv_heads;
    call.rows = p.q_len * call.group;
    call.row_blocks = n_row_blocks(p, 2);
    call.early = EARLY_NONE;
    call.parts_a_tile = 1.0f / (float)p.part_tiles;
    call.blocks = (call.rows + MANY_ROWS - 1) / MANY_ROWS;
    call.values = (uint8_t *)p.scratch + many_values_at(p);
    dim3 few(p.kv_heads * call.row_blocks, p.sequences, p.window_splits);
    dim3 many(p.kv_heads * call.blocks, p.sequences, p.unpacked), tiles(p.unpacked * p.part_tiles, p.kv_heads, p.sequences);
    cudaError_t rc = cudaSuccess;
    if (p.window_splits)
        rc = launch_behind(many_windows_kernel<D, CODEC>, few, 128, mem::BYTES, stream, call);
    for (call.first_part = 0; rc == cudaSuccess && call.first_part < p.splits; call.first_part += p.unpacked) {
        many.z = std::min(p.unpacked, p.splits - call.first_part);
        tiles.x = many.z * p.part_tiles;
        rc = launch_behind(many_values_kernel<D, CODEC>, tiles, 256, 0, stream, call);
        if (rc == cudaSuccess)
            rc = launch_behind(many_kernel<D>, many, MANY_THREADS, many_memory<D>::BYTES, stream, call);
    }
    few.z = 1;
    return rc ? rc : launch_behind(many_finish_kernel<D, CODEC>, few, 128, mem::BYTES, stream, call);
}

} // namespace kvd

#endif
