// Append: what leaves the recent window is quantized, the rest stored in bf16.
#include "kernels/cuda/quantize.cuh"

namespace kvd
{

// A warp for each (history token, layer, kv head, side): codec bf16's demotion.
__global__ void demote_bf16_kernel(const __grid_constant__ append_params p)
{
    auto [token, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    if (token >= (uint64_t)p.chunks * 16)
        return;
    uint32_t chunk = (uint32_t)(token / 16);
    const append_item &item =
        p.items[find_item(p.n_items, chunk, [&](uint32_t k) { return p.items[k].first_chunk; })];
    uint32_t t = chunk_token(p, item, chunk, false) + (uint32_t)token % 16, h = t - p.sink;
    if (t < item.hist_end)
        return;
    uint8_t *to = bf16_tile_row(item.codec[h / PAGE], p.layer_begin + layer, p.kv_heads, head,
                                p.dim_k, p.dim_v, h % PAGE, v);
    copy_row(to, source_row(p, item, t, layer, head, v), 2 * (v ? p.dim_v : p.dim_k));
}

// A warp for each (new token, layer, kv head, side) that stays in bf16.
__global__ void store_window_kernel(const __grid_constant__ append_params p)
{
    auto [token, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    if (token >= p.kept)
        return;
    uint32_t at = find_item(p.n_items, (uint32_t)token,
                            [&](uint32_t k) { return p.items[k].first_kept; });
    const append_item &item = p.items[at];
    uint32_t t = item.length + ((uint32_t)token - item.first_kept);
    if (t >= p.sink) // what the history has taken is left out
        t += max(item.new_hist_end, max(item.length, p.sink)) - max(item.length, p.sink);
    copy_row(window_row(p, item, t, layer, head, v),
             tensor_row(v ? item.v : item.k, layer, t - item.length, head),
             2 * (v ? p.dim_v : p.dim_k));
}

// A warp for each (new token, layer, kv head, side).
__global__ void check_kernel(const __grid_constant__ append_params p, unsigned long long *found)
{
    auto [token, layer, head, v] = warp_row(p.layer_count, p.kv_heads);
    if (token >= p.tokens)
        return;
    uint32_t at = find_item(p.n_items, (uint32_t)token,
                            [&](uint32_t k) { return p.items[k].first_token; });
    uint32_t n = (uint32_t)token - p.items[at].first_token;
    const uint8_t *row = tensor_row(v ? p.items[at].v : p.items[at].k, layer, n, head);
    bool bad = false;
    for (uint32_t c = threadIdx.x % 32; c < (v ? p.dim_v : p.dim_k); c += 32)
        bad |= (((const uint16_t *)row)[c] & 0x7f80) == 0x7f80;
    if (__any_sync(~0u, bad) && threadIdx.x % 32 == 0)
        atomicMin(found, ((((uint64_t)at * p.layer_count + layer << 17) + n) * p.kv_heads + head) * 2 + v);
}

static cudaError_t demote(const append_params &p, cudaStream_t stream)
{
    if (p.codec == KVD_CODEC_BF16) {
        return launch(demote_bf16_kernel, row_blocks(p.chunks * 16ull, p.layer_count, p.kv_heads), ROW_THREADS, 0, stream, p);
    }
    bool published = p.rotation.k.scale_kind == KVD_SCALE_PUBLISHED && p.rotation.v.scale_kind == KVD_SCALE_PUBLISHED;
    return p.whole_chunks && published ? quantize<true>(p, stream) : quantize_other(p, stream);
}

} // namespace kvd

using namespace kvd;

extern "C" int kvd_cuda_append(const struct kvd_cuda_append_params *p, struct CUstream_st *stream)
{
    cudaError_t rc = cudaSuccess;
    if (p->chunks)
        rc = demote(*p, stream);
    if (rc == cudaSuccess && p->kept)
        rc = launch(store_window_kernel, row_blocks(p->kept, p->layer_count, p->kv_heads), ROW_THREADS, 0, stream, *p);
    return rc;
}

extern "C" int kvd_cuda_check(const struct kvd_cuda_append_params *p, unsigned long long *found,
                              struct CUstream_st *stream)
{
    if (p->tokens == 0)
        return cudaSuccess;
    return launch(check_kernel, row_blocks(p->tokens, p->layer_count, p->kv_heads), ROW_THREADS, 0, stream, *p, found);
}
