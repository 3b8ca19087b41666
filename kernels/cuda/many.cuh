// Attention of many query rows: the end, and what is launched. What comes before: many_values.cuh, many_rows.cuh.
#ifndef KVD_KERNELS_CUDA_MANY_CUH
#define KVD_KERNELS_CUDA_MANY_CUH

#include "kernels/cuda/many_rows.cuh"

namespace kvd
{

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

// Sinks and windows: in rounds of as many parts as there is memory for.
template <int D> cudaError_t launch_many_windows(many_call &call, dim3 many, cudaStream_t stream)
{
    uint32_t most = call.ahead_pairs / std::max(call.window_pairs, 1u);
    bool f32 = call.q_type == KVD_DTYPE_F32;
    cudaError_t rc = cudaSuccess;
    for (call.first_part = 0; rc == cudaSuccess && call.first_part < call.window_splits; call.first_part += most) {
        many.z = std::min(most, call.window_splits - call.first_part);
        dim3 pairs(many.z * call.window_pairs, call.kv_heads, call.sequences);
        rc = launch_behind(many_tokens_kernel<D>, pairs, 256, 0, stream, call);
        if (rc == cudaSuccess)
            rc = f32 ? launch_behind(many_kernel<D, WINDOWS_F32>, many, MANY_THREADS, many_memory<D, 2>::BYTES, stream, call)
                     : launch_behind(many_kernel<D, WINDOWS>, many, MANY_THREADS, many_memory<D, 1>::BYTES, stream, call);
    }
    return rc;
}

// What a round's tiles become, and who attends to it.
template <int D> cudaError_t launch_many_history(const many_call &call, dim3 many, cudaStream_t stream)
{
    dim3 tiles(many.z * call.part_tiles, call.kv_heads, call.sequences);
    bool usual = family_of(call.codec) == INT2 && family_of(call.codec_v) == INT2;
    cudaError_t rc = usual ? launch_behind(many_values_kernel<D>, tiles, 256, 0, stream, call)
                           : launch_behind(many_any_values_kernel<D>, tiles, 256, 0, stream, call);
    if (rc)
        return rc;
    constexpr int BYTES = many_memory<D, 1>::BYTES;
    return family_of(call.codec) == TC ? launch_behind(many_kernel<D, HISTORY_TC>, many, MANY_THREADS, BYTES, stream, call)
                                       : launch_behind(many_kernel<D, HISTORY>, many, MANY_THREADS, BYTES, stream, call);
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
    call.blocks = (call.rows + MANY_ROWS - 1) / MANY_ROWS;
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
    dim3 many(p.kv_heads * call.blocks, p.sequences);
    cudaError_t rc = launch_many_windows<D>(call, many, stream);
    for (call.first_part = 0; rc == cudaSuccess && call.first_part < p.splits; call.first_part += p.unpacked) {
        many.z = std::min(p.unpacked, p.splits - call.first_part);
        rc = launch_many_history<D>(call, many, stream);
    }
    if (rc)
        return rc;
    return family_of(p.codec_v) == TC ? launch_many_finish<D, TC>(call, stream) : launch_many_finish<D, INT2>(call, stream);
}

} // namespace kvd

#endif
