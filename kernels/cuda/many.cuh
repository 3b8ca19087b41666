// Attention of many query rows: the end, and what is launched. What comes before: many_values.cuh, many_rows.cuh.
#ifndef KVD_KERNELS_CUDA_MANY_CUH
#define KVD_KERNELS_CUDA_MANY_CUH

#include "kernels/cuda/many_codes.cuh"
#include "kernels/cuda/many_rows.cuh"

namespace kvd
{

// A block: what attends, and what brings values.
template <int D, many_source SOURCE> __global__ void __launch_bounds__(many_threads(SOURCE), 1) many_kernel(const __grid_constant__ many_call p)
{
#if KVD_WARPGROUP
    using rows_of = many_rows<D, SOURCE>;
    KVD_DYNAMIC_SHARED(shared);
    const typename rows_of::memory mem = {shared};
    const uint32_t blocks = (p.rows + mem.ROWS - 1) / mem.ROWS;
    row_block b = {blockIdx.y, blockIdx.x / blocks, blockIdx.x % blocks * mem.ROWS};
    mem.init();
    wait_for_previous();
    let_next_start();
    load_lengths(p, b);
    uint32_t part = p.first_part + blockIdx.z * rows_of::GROUPS;
    const typename rows_of::part_pairs pairs(p, b, part);
    if constexpr (SOURCE == CODES)
        __syncthreads(); // barriers are there
    else if constexpr (rows_of::BF16)
        many_plain_queries(p, b, mem);
    else
        many_queries(p, b, mem);
    if (threadIdx.x >= MANY_WARPS * 32) {
        fewer_registers<SOURCE == CODES ? 72 : 24>();
        if constexpr (SOURCE != CODES) {
            if (threadIdx.x == MANY_WARPS * 32)
                fetch_values<D>(p, b, mem, pairs);
        } else if (threadIdx.x < MANY_WARPS * 32 + 128) {
            make_values<D, false>(p, b, mem, pairs);
        } else {
            make_values<D, true>(p, b, mem, pairs);
        }
        return;
    }
    more_registers<SOURCE == CODES ? 184 : 240>();
    if constexpr (SOURCE == CODES)
        many_queries(p, b, mem); // takes more registers than there were for all
    rows_of rows;
    rows.begin(p, b, mem);
    if constexpr (SOURCE == CODES)
        rows.attend_by_turns(p, b, mem, pairs);
    else
        rows.attend(p, b, mem, pairs);
    rows.write(p, b, mem, part + (rows_of::BF16 ? p.splits : rows_of::group()), p.splits + p.window_splits);
#endif
}

// -- the end -------------------------------------------------------------------------------------

// How the usual code takes 16 rows.
template <int D, int CODEC> struct sixteen_rows {
    static constexpr int NT = 2, WARPS = 4;
    using mem = block_memory<NT, D, D, WARPS, CODEC>;
    using work = share<NT, D, WARPS>;
};

// Combines the parts of 16 rows. CODEC is int2, or TC where V's history is of tc2 or tc2.5. What has grown beyond what was planned for
// is not a number.
template <int D, int CODEC> __global__ void __launch_bounds__(128, 2) many_finish_kernel(const __grid_constant__ many_call p)
{
    using of = sixteen_rows<D, CODEC>;
    using work = typename of::work;
    KVD_DYNAMIC_SHARED(shared);
    typename of::mem memory = {shared};
    row_block b = place_of<of::NT>(p);
    memory.init();
    if constexpr (is_tc(CODEC)) {
        memory.means().fetch(transform_of(p.rotation, p.layer, b.kv), false);
        copies_arrived();
    }
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
    if (many_tiles(p, b) > p.splits * p.part_tiles || many_token_pairs(many_tokens(p, b)) > p.window_splits * p.window_pairs)
        t.l = NAN;
    finish_rows<of::NT, D>(p, b, back, rows, mine, t, true, p.window_splits > 0, history, windows);
}

inline dim3 many_blocks(const many_call &call, uint32_t rows, uint32_t parts)
{
    return dim3(call.kv_heads * ((call.rows + rows - 1) / rows), call.sequences, parts);
}

template <int D, many_source SOURCE> cudaError_t launch_many_kernel(const many_call &call, uint32_t parts, cudaStream_t stream)
{
    using mem = many_memory<D, SOURCE>;
    return launch_behind(many_kernel<D, SOURCE>, many_blocks(call, mem::ROWS, parts), many_threads(SOURCE), mem::BYTES, stream, call);
}

// Sinks and windows: in rounds of as many parts as there is memory for.
template <int D> cudaError_t launch_many_windows(many_call call, cudaStream_t stream)
{
    uint32_t most = call.ahead_pairs / std::max(call.window_pairs, 1u);
    cudaError_t rc = cudaSuccess;
    for (call.first_part = 0; rc == cudaSuccess && call.first_part < call.window_splits; call.first_part += most) {
        uint32_t parts = std::min(most, call.window_splits - call.first_part);
        dim3 pairs(parts * call.window_pairs, call.kv_heads, call.sequences);
        rc = launch_behind(many_tokens_kernel<D>, pairs, 256, 0, stream, call);
        if (rc == cudaSuccess)
            rc = call.q_type == KVD_DTYPE_F32 ? launch_many_kernel<D, WINDOWS_F32>(call, parts, stream)
                                              : launch_many_kernel<D, WINDOWS>(call, parts, stream);
    }
    return rc;
}

// Histories whose values are made ahead, in rounds.
template <int D> cudaError_t launch_many_history(many_call call, cudaStream_t stream)
{
    bool usual = family_of(call.codec) == INT2 && family_of(call.codec_v) == INT2;
    cudaError_t rc = cudaSuccess;
    for (call.first_part = 0; rc == cudaSuccess && call.first_part < call.splits; call.first_part += call.unpacked) {
        uint32_t parts = std::min(call.unpacked, call.splits - call.first_part);
        dim3 tiles(parts * call.part_tiles, call.kv_heads, call.sequences);
        rc = usual ? launch_behind(many_values_kernel<D>, tiles, 256, 0, stream, call)
                   : launch_behind(many_any_values_kernel<D>, tiles, 256, 0, stream, call);
        if (rc == cudaSuccess)
            rc = family_of(call.codec) == TC ? launch_many_kernel<D, HISTORY_TC>(call, parts, stream)
                                             : launch_many_kernel<D, HISTORY>(call, parts, stream);
    }
    return rc;
}

template <int D, int CODEC> cudaError_t launch_many_finish(const many_call &call, cudaStream_t stream)
{
    return launch_behind(many_finish_kernel<D, CODEC>, dim3(call.kv_heads * call.row_blocks, call.sequences), 128,
                         sixteen_rows<D, CODEC>::mem::BYTES, stream, call);
}

template <int D> cudaError_t launch_many_dims(const attend_params &p, cudaStream_t stream)
{
    many_call call;
    (attend_params &)call = p;
    call.group = p.q_heads / p.kv_heads;
    call.rows = p.q_len * call.group;
    call.row_blocks = n_row_blocks(p, 2);
    call.early = EARLY_NONE;
    call.parts_a_tile = 1.0f / (float)p.part_tiles;
    call.first_part = 0;
    call.thousand = 0x64006400;
    call.values = (uint8_t *)p.scratch + many_values_at(p);
    call.tile = tile_layout({p.codec, p.codec_v}, D, D);
    call.stored = 0.25f;
    for (int v = 0; v < 2; v++) {
        any_side &side = call.side[v];
        side = any_side(v ? p.codec_v : p.codec, D, v);
        side.codes = call.tile.codes[v], side.params = call.tile.params[v];
        if (kvd_codec_tc(side.codec))
            side.unit = EVEN_UNIT; // levels that are one apart: the rest is in queries, and in V's inverse
        if (side.bits > 3)
            call.stored = 1 / 16.0f;
    }
    cudaError_t rc = launch_many_windows<D>(call, stream);
    if (rc == cudaSuccess)
        rc = p.block_rows == MANY_ROWS ? launch_many_history<D>(call, stream)
                                       : launch_many_kernel<D, CODES>(call, p.splits / many_groups(CODES), stream);
    if (rc)
        return rc;
    return family_of(p.codec_v) == TC ? launch_many_finish<D, TC>(call, stream) : launch_many_finish<D, INT2>(call, stream);
}

} // namespace kvd

#endif
