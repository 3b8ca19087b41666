// Append: what leaves the recent window is quantized, the rest stored in bf16.
#include "kernels/cuda/quantize.cuh"
#include "kernels/cuda/token_rows.cuh"

namespace kvd
{

// All kv heads' rows of a token in the window.
__device__ inline head_rows window_rows(const append_params &p, const append_item &item, uint32_t token, uint32_t layer,
                                        bool v)
{
    return {window_row(p, item, token, layer, 0, v), bf16_tile_bytes(p.dim_k, p.dim_v)};
}

// Demotion of sides in codec bf16, by history tokens.
__global__ void demote_bf16_kernel(const __grid_constant__ append_params p)
{
    side_of_warp w;
    if (w.token >= p.chunks * 16 || (w.v ? p.codec_v : p.codec) != KVD_CODEC_BF16)
        return;
    uint32_t chunk = w.token / 16;
    const append_item &item =
        p.items[find_item(p.n_items, chunk, [&](uint32_t k) { return p.items[k].first_chunk; })];
    uint32_t t = chunk_token(p, item, chunk, false) + w.token % 16, h = t - p.sink;
    if (t < item.hist_end)
        return;
    uint32_t bytes = 2 * (w.v ? p.dim_v : p.dim_k);
    uint8_t *tile = (uint8_t *)item.codec[h / PAGE] + p.tile.at(p.layer_begin + w.layer, p.kv_heads, 0);
    head_rows from = t >= item.length ? rows_of(w.v ? item.v : item.k, w.layer, t - item.length)
                                      : window_rows(p, item, t, w.layer, w.v);
    copy_rows({tile + p.tile.codes[w.v] + h % PAGE * bytes, p.tile.bytes}, from, p.kv_heads, bytes);
}

// By the new tokens that stay in bf16.
__global__ void store_window_kernel(const __grid_constant__ append_params p)
{
    side_of_warp w;
    if (w.token >= p.kept)
        return;
    uint32_t at = find_item(p.n_items, w.token, [&](uint32_t k) { return p.items[k].first_kept; });
    const append_item &item = p.items[at];
    uint32_t t = item.length + (w.token - item.first_kept);
    if (t >= p.sink) // what the history has taken is left out
        t += max(item.new_hist_end, max(item.length, p.sink)) - max(item.length, p.sink);
    copy_rows(window_rows(p, item, t, w.layer, w.v), rows_of(w.v ? item.v : item.k, w.layer, t - item.length),
              p.kv_heads, 2 * (w.v ? p.dim_v : p.dim_k));
}

// By the new tokens.
__global__ void check_kernel(const __grid_constant__ append_params p, unsigned long long *found)
{
    side_of_warp w;
    if (w.token >= p.tokens)
        return;
    uint32_t at = find_item(p.n_items, w.token, [&](uint32_t k) { return p.items[k].first_token; });
    uint32_t n = w.token - p.items[at].first_token;
    head_rows rows = rows_of(w.v ? p.items[at].v : p.items[at].k, w.layer, n);
    uint32_t head = first_bad(rows, p.kv_heads, 2 * (w.v ? p.dim_v : p.dim_k));
    if (head < p.kv_heads)
        atomicMin(found, ((((uint64_t)at * p.layer_count + w.layer << 17) + n) * p.kv_heads + head) * 2 + w.v);
}

static cudaError_t demote_sides(const append_params &p, which_sides which, cudaStream_t stream)
{
    bool published = p.rotation.k.scale_kind == KVD_SCALE_PUBLISHED && p.rotation.v.scale_kind == KVD_SCALE_PUBLISHED;
    return p.whole_chunks && published ? quantize<true>(p, which, stream) : quantize_other(p, which, stream);
}

// Sides in one codec together, others one after the other.
static cudaError_t demote(const append_params &p, cudaStream_t stream)
{
    cudaError_t rc = cudaSuccess;
    if (p.codec == KVD_CODEC_BF16 || p.codec_v == KVD_CODEC_BF16)
        rc = launch(demote_bf16_kernel, token_blocks(p.chunks * 16, p.layer_count), ROW_THREADS, 0, stream, p);
    uint32_t sides = p.codec == p.codec_v ? 2 : 1;
    for (uint32_t v = 0; v < 2 && rc == cudaSuccess; v += sides) {
        append_params some = p;
        some.codec = v ? p.codec_v : p.codec;
        if (some.codec != KVD_CODEC_BF16 && v && kvd_latent_dims_ok(p.dim_k, p.dim_v))
            rc = quantize_latents(some, stream);
        else if (some.codec != KVD_CODEC_BF16)
            rc = demote_sides(some, {v, v + sides}, stream);
    }
    return rc;
}

// A call, with where its tiles' sides lie.
static append_params call_of(const kvd_cuda_append_params &p)
{
    append_params out;
    (kvd_cuda_append_params &)out = p;
    out.tile = tile_layout({p.codec, p.codec_v}, p.dim_k, p.dim_v);
    return out;
}

} // namespace kvd

using namespace kvd;

extern "C" int kvd_cuda_append(const struct kvd_cuda_append_params *p, struct CUstream_st *stream)
{
    cudaError_t rc = cudaSuccess;
    if (p->chunks)
        rc = demote(call_of(*p), stream);
    if (rc == cudaSuccess && p->kept)
        rc = launch(store_window_kernel, token_blocks(p->kept, p->layer_count), ROW_THREADS, 0, stream, call_of(*p));
    return rc;
}

extern "C" int kvd_cuda_check(const struct kvd_cuda_append_params *p, unsigned long long *found,
                              struct CUstream_st *stream)
{
    if (p->tokens == 0)
        return cudaSuccess;
    return launch(check_kernel, token_blocks(p->tokens, p->layer_count), ROW_THREADS, 0, stream, call_of(*p), found);
}
