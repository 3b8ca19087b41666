// The CUDA kernels against the memory's own speed, measured in the same run.
// usage: bench_cuda [filter]. Built by tests/gpu/run.sh; needs no library but CUDA.
//
// Times are medians of CUDA graph replays; each replay goes over several copies of the pages, so
// that none is in the L2 cache when it is read. Limits count all bytes that must move.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

extern "C" {
#include "kernels/backend.h"
}
#include "kernels/cuda/api.h"
#include "kernels/format.h"

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t rc_ = (cudaError_t)(call);                                                     \
        if (rc_ != cudaSuccess) {                                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(rc_));           \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static std::vector<void *> owned;
static const char *filter;
static uint8_t *pool;
static const uint64_t pool_bytes = 6ull << 30;
static double read_tbs, copy_tbs;
static uint32_t sms;

template <typename T> static T *device(uint64_t n)
{
    T *p;
    CUDA(cudaMalloc(&p, std::max<uint64_t>(n, 1) * sizeof(T)));
    owned.push_back(p);
    return p;
}

template <typename T> static T *to_device(const std::vector<T> &from)
{
    T *p = device<T>(from.size());
    CUDA(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

static void free_all()
{
    for (void *p : owned)
        CUDA(cudaFree(p));
    owned.clear();
}

__global__ void fill(uint32_t *to, uint64_t words, uint32_t seed, uint32_t mask)
{
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < words; i += step) {
        uint32_t x = (uint32_t)i * 2654435761u ^ seed;
        x ^= x >> 16, x *= 0x85ebca6b, x ^= x >> 13;
        to[i] = x & mask;
    }
}

// Pages of random codes, whose parameters are small and positive, as fp16 or, int2c's, as bytes.
static void fill_pool(uint32_t codec)
{
    fill<<<1024, 256>>>((uint32_t *)pool, pool_bytes / 4, 99, codec == KVD_CODEC_INT2C ? 0x0f7f0f7f : 0x2fff2fff);
    CUDA(cudaDeviceSynchronize());
}

// bf16, near a normal distribution.
__global__ void fill_normal(uint32_t *to, uint64_t words, uint32_t seed)
{
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < words; i += step) {
        uint32_t out = 0;
        for (int half = 0; half < 2; half++) {
            float sum = 0;
            for (uint32_t k = 0; k < 6; k++) {
                uint32_t x = (((uint32_t)i * 2 + half) * 6 + k) * 2654435761u ^ seed;
                x ^= x >> 16, x *= 0x85ebca6b, x ^= x >> 13, x *= 0xc2b2ae35, x ^= x >> 16;
                sum += x / 4294967296.0f - 0.5f;
            }
            out |= __float_as_uint(sum * 1.4f) >> 16 << 16 * half;
        }
        to[i] = out;
    }
}

__global__ void read_all(const uint4 *from, uint64_t n, uint32_t *out)
{
    uint32_t x = 0;
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += 4 * step) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * step < n) {
                uint4 v = __ldcs(&from[i + j * step]);
                x ^= v.x ^ v.y ^ v.z ^ v.w;
            }
    }
    if (x == 0x12345678)
        *out = x;
}

static double graph_median(const std::function<void(cudaStream_t, int)> &launch, int inner)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t a, b;
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < inner; i++)
        launch(stream, i);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<double> t;
    for (int i = 0; i < 25; i++) {
        float ms;
        CUDA(cudaEventRecord(a, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(b, stream));
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaEventElapsedTime(&ms, a, b));
        if (i >= 5)
            t.push_back(ms / inner);
    }
    std::sort(t.begin(), t.end());
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    return t[t.size() / 2];
}

static bool wanted(const char *name)
{
    return !filter || strstr(name, filter);
}

static void report(const char *name, double mb, double ms, double limit_ms, const char *want)
{
    printf("%-44s %7.1f MB %9.4f ms  limit %8.4f  %5.1f %%   want %s\n", name, mb, ms, limit_ms,
           100 * limit_ms / ms, want);
    fflush(stdout);
}

// A rotation set of a Hadamard matrix (where dim is no power of two, of something like one), packed.
static kvd_cuda_rotation rotation(uint32_t dim)
{
    std::vector<float> r(dim * dim), t(dim * dim), scale(1), columns(dim);
    for (uint32_t i = 0; i < dim; i++)
        for (uint32_t j = 0; j < dim; j++)
            r[i * dim + j] = t[j * dim + i] =
                (__builtin_popcount(i & j) & 1 ? -1.0f : 1.0f) / sqrtf((float)dim);
    uint64_t part = kvd_cuda_operand_bytes(1, dim) / 2;
    std::vector<uint16_t> queries(2 * part), forward(2 * part), inverse(part);
    kvd_cuda_rotation_pack(r.data(), 1, dim, queries.data(), forward.data(), inverse.data(),
                           scale.data(), columns.data());
    kvd_cuda_matrices m = {};
    m.queries = to_device(queries);
    m.forward = to_device(forward);
    m.inverse = to_device(inverse);
    m.scale = to_device(scale);
    m.inverse_columns = to_device(columns);
    m.forward_f32 = to_device(r);
    m.inverse_f32 = to_device(t);
    m.clip = to_device(std::vector<float>(1, 0.94f));
    kvd_cuda_rotation out = {1, 1, m, m};
    return out;
}

// A set of transforms for tc2 or tc2.5, a matrix for each kv head: a Hadamard matrix with its columns stretched, and tiles in
// quarters of 4, 2, 1 and 1 bits (4, 3, 2 and 1), in another order for each head.
static kvd_cuda_rotation transforms(uint32_t codec, uint32_t dim, uint32_t heads)
{
    std::vector<float> a, inverse, mean(heads * dim, 0.5f), sigma, bits;
    for (uint32_t m = 0; m < heads * dim * dim; m++) {
        uint32_t i = m / dim % dim, j = m % dim;
        float sign = __builtin_popcount(i & j) & 1 ? -1.0f : 1.0f;
        a.push_back(sign * powf(8, -(float)j / dim) / sqrtf((float)dim));
        inverse.push_back(sign * powf(8, (float)i / dim) / sqrtf((float)dim));
    }
    for (uint32_t i = 0; i < heads * dim; i++)
        sigma.push_back(powf(8, -(float)(i % dim) / dim));
    const float quarters[2][4] = {{4, 2, 1, 1}, {4, 3, 2, 1}};
    uint32_t tiles = dim / 16;
    for (uint32_t i = 0; i < heads * tiles; i++)
        bits.push_back(quarters[codec == KVD_CODEC_TC2_5][(i % tiles + i / tiles) % tiles * 4 / tiles]);
    kvd_rotation_data d = {};
    d.n_layers = 1;
    d.heads = heads;
    d.dim_k = d.dim_v = dim;
    d.k = d.v = a.data();
    d.k_inverse = d.v_inverse = inverse.data();
    d.k_mean = d.v_mean = mean.data();
    d.k_sigma = sigma.data();
    d.k_bits = bits.data();
    uint64_t part = kvd_cuda_operand_bytes(heads, dim) / 2;
    std::vector<uint16_t> queries(2 * part), forward_k(2 * part), forward_v(2 * part), inverse_v(part);
    std::vector<float> scale_k(heads), scale_v(heads);
    std::vector<kvd_cuda_transform> terms(heads);
    kvd_cuda_transform_operands o = {queries.data(),   forward_k.data(), forward_v.data(),
                                     inverse_v.data(), scale_k.data(),   scale_v.data()};
    for (uint32_t i = 0; i < heads; i++)
        kvd_cuda_transform_pack(&d, i, &o, &terms[i]);
    kvd_cuda_rotation out = {1, heads, {}, {}, to_device(terms)};
    out.k.queries = to_device(queries);
    out.k.forward = to_device(forward_k);
    out.k.scale = to_device(scale_k);
    out.v.forward = to_device(forward_v);
    out.v.inverse = to_device(inverse_v);
    out.v.scale = to_device(scale_v);
    out.k.inverse_f32 = out.v.inverse_f32 = to_device(inverse);
    return out;
}

struct row {
    const char *name;
    uint32_t sequences, history; // 0: ragged
    uint32_t q_heads, kv_heads, dim, sink, recent, q_len;
    double want_ms, want_fraction;
    uint32_t codec = KVD_CODEC_INT2;
    bool settled = true; // as in a step; else pages may come from the kernel in front
    uint32_t dim_v = 0;  // where it differs
    int codec_v = -1;    // the same

    kvd_codecs codecs() const
    {
        return {codec, codec_v < 0 ? codec : (uint32_t)codec_v};
    }
};

static void bench_attend(const row &w)
{
    if (!wanted(w.name))
        return;
    const uint32_t dim_v = w.dim_v ? w.dim_v : w.dim;
    std::vector<uint32_t> history(w.sequences, w.history), length, end;
    uint64_t pages = 0, sum = 0;
    uint32_t longest = 0;
    for (uint32_t i = 0; i < w.sequences; i++) {
        if (w.history == 0) // log-uniform from 1K to 128K, in a fixed shuffled order
            history[i] = (uint32_t)(1024 * pow(128, (i * 37 % w.sequences) / (w.sequences - 1.0))) / 16 * 16;
        pages += (history[i] + 63) / 64;
        sum += history[i];
        longest = std::max(longest, history[i]);
        length.push_back(w.sink + history[i] + w.recent);
        end.push_back(w.sink + history[i]);
    }
    // One layer a page: a layer's tiles lie together no better than they would in any page.
    uint64_t tile = kvd_tile_bytes(w.codecs(), w.dim, dim_v), page = w.kv_heads * tile, bytes = pages * page;
    uint64_t windows = (uint64_t)w.sequences * (w.sink + w.recent) * w.kv_heads * (w.dim + dim_v) * 2;
    int copies = (int)std::min<uint64_t>(8, std::min(pool_bytes / bytes, 400000000 / bytes + 1));
    uint32_t ring = (w.recent + 64 + 63) / 64 * 64, bf16_stride = (w.sink + 63) / 64 + ring / 64;
    uint64_t bf16_page = (uint64_t)w.kv_heads * 64 * (w.dim + dim_v) * 2;
    uint8_t *bf16 = device<uint8_t>(w.sequences * bf16_stride * bf16_page);
    CUDA(cudaMemset(bf16, 0x3c, w.sequences * bf16_stride * bf16_page));
    std::vector<uint64_t> bf16_table(w.sequences * bf16_stride);
    for (uint64_t i = 0; i < bf16_table.size(); i++)
        bf16_table[i] = (uint64_t)bf16 + i * bf16_page;
    std::vector<uint16_t> q((uint64_t)w.sequences * w.q_len * w.q_heads * w.dim);
    for (size_t i = 0; i < q.size(); i++)
        q[i] = (uint16_t)(0x3c00 + (i * 40503u >> 7) % 512 + (i % 3 ? 0 : 0x8000));
    kvd_cuda_attend_params p = {};
    p.sequences = w.sequences;
    p.q_heads = w.q_heads;
    p.kv_heads = w.kv_heads;
    p.dim_k = w.dim;
    p.dim_v = dim_v;
    p.codec = w.codecs().k;
    p.codec_v = w.codecs().v;
    p.q_len = w.q_len;
    p.sink = w.sink;
    p.ring = ring;
    p.scale = 0.088f;
    p.q = to_device(q);
    p.o = device<uint16_t>(q.size());
    p.pages.bf16 = to_device(bf16_table);
    p.pages.codec_stride = (longest + 63) / 64;
    p.pages.bf16_stride = bf16_stride;
    p.pages.length = to_device(length);
    p.pages.hist_end = to_device(end);
    if (kvd_codec_tc(w.codec)) {
        p.rotation = transforms(w.codec, w.dim, w.kv_heads);
    } else {
        p.rotation = rotation(w.dim);
        p.rotation.v = rotation(dim_v).v;
    }
    p.settled = w.settled;
    kvd_cuda_attend_plan(&p, sum, longest, w.sink + w.recent, sms);
    p.scratch = device<uint8_t>(kvd_cuda_attend_scratch(&p));
    CUDA(cudaMemset(p.scratch, 0, kvd_cuda_attend_scratch(&p)));
    std::vector<kvd_cuda_attend_params> ps;
    for (int i = 0; i < copies; i++) {
        std::vector<uint64_t> table((uint64_t)w.sequences * p.pages.codec_stride);
        uint64_t at = (uint64_t)pool + i * bytes;
        for (uint32_t s = 0; s < w.sequences; s++)
            for (uint32_t k = 0; k < (history[s] + 63) / 64; k++, at += page)
                table[(uint64_t)s * p.pages.codec_stride + k] = at;
        p.pages.codec = to_device(table);
        ps.push_back(p);
    }
    int inner = bytes < 100000000 ? 2 * copies : copies;
    double ms = graph_median([&](cudaStream_t s, int i) { CUDA(kvd_cuda_attend(&ps[i % copies], s)); }, inner);
    double limit = (bytes + windows) / read_tbs / 1e9;
    char want[64] = "";
    if (w.want_ms > 0)
        snprintf(want, sizeof(want), "<= %.3f ms on an H100", w.want_ms);
    else if (w.want_fraction > 0)
        snprintf(want, sizeof(want), ">= %.0f %%", 100 * w.want_fraction);
    report(w.name, (bytes + windows) / 1e6, ms, limit, want);
    free_all();
}

// New tokens over a compressed prefix.
static void bench_prefill(const char *name, uint32_t q_len, uint32_t history, bool packed, uint32_t codec = KVD_CODEC_INT2)
{
    if (!wanted(name))
        return;
    const uint32_t hq = 32, hkv = 8, dim = 128, pages = history / 64;
    kvd_cuda_attend_params p = {};
    if (codec == KVD_CODEC_INT2C) // fp16's values would not be finite, and each of them be looked at again for a maximum
        fill_pool(codec);
    p.sequences = 1;
    p.q_heads = hq;
    p.kv_heads = hkv;
    p.dim_k = p.dim_v = dim;
    p.codec = p.codec_v = codec;
    p.q_len = p.new_tokens = q_len;
    p.ring = 64;
    p.scale = 0.088f;
    uint16_t *x = device<uint16_t>(q_len * hq * dim);
    fill_normal<<<1024, 256>>>((uint32_t *)x, q_len * hq * dim / 2, 5);
    p.q = p.k = p.v = x;
    p.o = device<uint16_t>(q_len * hq * dim);
    std::vector<uint64_t> table(pages), bf16(1);
    for (uint32_t i = 0; i < pages; i++)
        table[i] = (uint64_t)pool + (uint64_t)i * hkv * kvd_tile_bytes(kvd_codecs_both(codec), dim, dim);
    bf16[0] = (uint64_t)device<uint8_t>(hkv * 64 * dim * 4);
    p.pages.codec = to_device(table);
    p.pages.bf16 = to_device(bf16);
    p.pages.codec_stride = pages;
    p.pages.bf16_stride = 1;
    p.pages.length = p.pages.hist_end = to_device(std::vector<uint32_t>(1, history));
    p.rotation = kvd_codec_tc(codec) ? transforms(codec, dim, hkv) : rotation(dim);
    p.packed = packed;
    kvd_cuda_attend_plan(&p, history, history, q_len, sms);
    p.scratch = device<uint8_t>(kvd_cuda_attend_scratch(&p));
    CUDA(cudaMemset(p.scratch, 0, kvd_cuda_attend_scratch(&p)));
    double ms = graph_median([&](cudaStream_t s, int) { CUDA(kvd_cuda_attend(&p, s)); }, 1);
    double flops = 4.0 * hq * dim * ((double)q_len * history + (double)q_len * (q_len + 1) / 2);
    printf("%-44s %9.4f ms  %6.1f TFLOP/s   want >= 580\n", name, ms, flops / ms / 1e9);
    if (codec == KVD_CODEC_INT2C)
        fill_pool(KVD_CODEC_INT2);
    free_all();
}

// Quantize and dequantize 8 sequences x 36 layers x 8 heads, all in one launch a side.
static void bench_quantize(bool ring, uint32_t codec = KVD_CODEC_INT2, uint32_t dim = 128)
{
    char name[80];
    snprintf(name, sizeof(name), "%s%s%s", ring ? "quantize from the ring" : "quantize K and V from new tokens",
             codec == KVD_CODEC_INT2 ? "" : ", ", codec == KVD_CODEC_INT2 ? "" : kvd_codec_name(codec));
    if (dim != 128)
        snprintf(name + strlen(name), sizeof(name) - strlen(name), ", head_dim %u", dim);
    if (!wanted(name))
        return;
    const uint32_t n = 8, layers = 36, heads = 8, tokens = ring ? 64 : 1024;
    uint64_t tile = kvd_tile_bytes(kvd_codecs_both(codec), dim, dim), page = layers * heads * tile, pages = tokens / 64 + 1;
    uint64_t bf16_page = (uint64_t)layers * heads * 64 * dim * 4;
    std::vector<kvd_cuda_append_item> items(n);
    kvd_cuda_append_params p = {};
    p.whole_chunks = true;
    p.kv_heads = heads;
    p.dim_k = p.dim_v = dim;
    p.codec = p.codec_v = codec;
    p.ring = 128;
    p.layer_count = layers;
    p.rotation = kvd_codec_tc(codec) ? transforms(codec, dim, heads) : rotation(dim);
    p.n_items = n;
    for (uint32_t i = 0; i < n; i++) {
        std::vector<uint64_t> codec(pages), bf16(2);
        for (uint64_t k = 0; k < pages; k++)
            codec[k] = (uint64_t)pool + (i * pages + k) * page;
        for (uint64_t &at : bf16) {
            uint8_t *b = device<uint8_t>(bf16_page);
            fill_normal<<<1024, 256>>>((uint32_t *)b, bf16_page / 4, i);
            at = (uint64_t)b;
        }
        kvd_cuda_append_item &item = items[i];
        item.codec = to_device(codec);
        item.bf16 = to_device(bf16);
        item.length = ring ? 64 : 0;
        item.new_length = item.new_hist_end = tokens;
        uint64_t bytes = (uint64_t)layers * tokens * heads * dim * 2;
        for (kvd_cuda_tensor *t : {&item.k, &item.v}) {
            if (ring)
                continue;
            uint8_t *b = device<uint8_t>(bytes);
            fill_normal<<<1024, 256>>>((uint32_t *)b, bytes / 4, 7 * i);
            *t = kvd_cuda_tensor{b, (uint64_t)tokens * heads * dim * 2, heads * dim * 2, dim * 2, KVD_DTYPE_BF16};
        }
        item.first_chunk = i * tokens / 16;
        item.first_token = ring ? 0 : i * tokens;
        p.chunks += tokens / 16;
        p.tokens += ring ? 0 : tokens;
        p.kept += kvd_cuda_kept_tokens(&item, 0);
    }
    p.items = to_device(items);
    double ms = graph_median([&](cudaStream_t s, int) { CUDA(kvd_cuda_append(&p, s)); }, 1);
    double vectors = (double)n * tokens * layers * heads;
    double mb = vectors * (4 * dim + tile / 64.0) / 1e6;
    printf("%-44s %7.1f MB %9.4f ms  limit %8.4f  %6.2f G token-heads/s   want %s\n", name, mb, ms,
           mb / copy_tbs / 1e6 * 1e3, vectors / ms / 1e6, ring || codec != KVD_CODEC_INT2 || dim != 128 ? "" : ">= 2.5");
    free_all();
}

static void bench_read(uint32_t of = KVD_CODEC_INT2)
{
    char name[60];
    snprintf(name, sizeof(name), "dequantize to bf16%s%s", of == KVD_CODEC_INT2 ? "" : ", ", of == KVD_CODEC_INT2 ? "" : kvd_codec_name(of));
    if (!wanted(name))
        return;
    const uint32_t layers = 36, heads = 8, dim = 128, tokens = 8192;
    uint64_t tile = kvd_tile_bytes(kvd_codecs_both(of), dim, dim), page = layers * heads * tile;
    std::vector<uint64_t> codec(tokens / 64), bf16(2, (uint64_t)pool);
    for (uint64_t k = 0; k < codec.size(); k++)
        codec[k] = (uint64_t)pool + k * page;
    kvd_cuda_read_params p = {};
    p.kv_heads = heads;
    p.dim_k = p.dim_v = dim;
    p.codec = p.codec_v = of;
    p.ring = 64;
    p.layer_count = layers;
    p.rotation = kvd_codec_tc(of) ? transforms(of, dim, heads) : rotation(dim);
    p.codec_pages = to_device(codec);
    p.bf16_pages = to_device(bf16);
    p.hist_end = p.tokens = tokens;
    uint64_t bytes = (uint64_t)layers * tokens * heads * dim * 2;
    p.k = p.v = kvd_cuda_tensor{device<uint8_t>(bytes), (uint64_t)tokens * heads * dim * 2, heads * dim * 2, dim * 2, KVD_DTYPE_BF16};
    p.v.data = device<uint8_t>(bytes);
    double ms = graph_median([&](cudaStream_t s, int) { CUDA(kvd_cuda_read(&p, s)); }, 1);
    double mb = (double)layers * tokens * heads * (512 + tile / 64.0) / 1e6;
    report(name, mb, ms, mb / copy_tbs / 1e3, of == KVD_CODEC_INT2 ? ">= 80 % of the copy ceiling" : "");
    free_all();
}

#include "tests/gpu/bench_latent.h"

int main(int argc, char **argv)
{
    filter = argc > 1 ? argv[1] : nullptr;
    cudaDeviceProp prop;
    CUDA(cudaGetDeviceProperties(&prop, 0));
    sms = (uint32_t)prop.multiProcessorCount;
    CUDA(cudaMalloc(&pool, pool_bytes));
    fill_pool(KVD_CODEC_INT2);
    uint32_t *out = device<uint32_t>(1);
    double best = 1e9;
    for (int blocks : {4, 8, 16})
        best = std::min(best, graph_median([&](cudaStream_t s, int) {
            read_all<<<sms * blocks, 512, 0, s>>>((const uint4 *)pool, pool_bytes / 16, out);
        }, 1));
    read_tbs = pool_bytes / best / 1e9;
    double ms = graph_median([&](cudaStream_t s, int) {
        CUDA(cudaMemcpyAsync(pool, pool + pool_bytes / 2, pool_bytes / 2, cudaMemcpyDeviceToDevice, s));
    }, 1);
    copy_tbs = pool_bytes / ms / 1e9;
    free_all();
    printf("%s, %u multiprocessors; ceilings in this run: read %.3f TB/s, copy %.3f TB/s (read + write)\n",
           prop.name, sms, read_tbs, copy_tbs);
    const row rows[] = {
        {"32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0.92},
        {"256 x 4,096, 32/8", 256, 4096, 32, 8, 128, 0, 0, 1, 0, 0.90},
        {"32 x 4,096, 32/8", 32, 4096, 32, 8, 128, 0, 0, 1, 0.031, 0},
        {"1 x 102,400, 32/8", 1, 102400, 32, 8, 128, 0, 0, 1, 0.026, 0},
        {"1 x 32,768, 32/8", 1, 32768, 32, 8, 128, 0, 0, 1, 0.012, 0},
        {"pages just written: 32 x 4,096, 32/8", 32, 4096, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT2, false},
        {"pages just written: 1 x 102,400, 32/8", 1, 102400, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT2, false},
        {"pages just written: 1 x 32,768, 32/8", 1, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT2, false},
        {"32 x 32,768, 64/8", 32, 32768, 64, 8, 128, 0, 0, 1, 0, 0.88},
        {"32 x 32,768, 8/8", 32, 32768, 8, 8, 128, 0, 0, 1, 0, 0.88},
        {"32 x 32,768, 96/8", 32, 32768, 96, 8, 128, 0, 0, 1, 0, 0.80},
        {"32 x 32,768, 128/8", 32, 32768, 128, 8, 128, 0, 0, 1, 0, 0},
        {"32 x 32,768, 40/8", 32, 32768, 40, 8, 128, 0, 0, 1, 0, 0},
        {"64 x 32,768, 28/4", 64, 32768, 28, 4, 128, 0, 0, 1, 0, 0},
        {"1 x 1,200,000, 32/8", 1, 1200000, 32, 8, 128, 0, 0, 1, 0, 0},
        {"4 x 2,000,000, 32/8", 4, 2000000, 32, 8, 128, 0, 0, 1, 0, 0},
        {"head_dim 64: 64 x 32,768, 32/8", 64, 32768, 32, 8, 64, 0, 0, 1, 0, 0.85},
        {"head_dim 256: 16 x 32,768, 32/8", 16, 32768, 32, 8, 256, 0, 0, 1, 0, 0.85},
        {"64 ragged, 1K to 128K, 32/8", 64, 0, 32, 8, 128, 0, 0, 1, 0, 0.85},
        {"32 x 32,768, 32/8, sink 64 recent 256", 32, 32768, 32, 8, 128, 64, 256, 1, 0, 0.88},
        {"q_len 4: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 4, 0, 0.736},
        {"q_len 16: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 16, 0, 0},
        {"q_len 16: 1 x 32,768, 32/8", 1, 32768, 32, 8, 128, 0, 0, 16, 0, 0},
        {"q_len 4: 1 x 32,768, 32/8", 1, 32768, 32, 8, 128, 0, 0, 4, 0, 0},
        {"q_len 8: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 8, 0, 0},
        {"q_len 2: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 2, 0, 0},
        {"q_len 2: 8 x 8,192, 32/8, sink 64 recent 256", 8, 8192, 32, 8, 128, 64, 256, 2, 0, 0},
        {"q_len 4: 8 x 8,192, 32/8, sink 64 recent 256", 8, 8192, 32, 8, 128, 64, 256, 4, 0, 0},
        {"q_len 4: 32 x 32,768, 32/8, sink 64 recent 256", 32, 32768, 32, 8, 128, 64, 256, 4, 0, 0},
        {"q_len 4: head_dim 64: 64 x 32,768, 32/8", 64, 32768, 32, 8, 64, 0, 0, 4, 0, 0},
        {"batch of 12 x 32,768, 32/8", 12, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 17 x 32,768, 32/8", 17, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 20 x 32,768, 32/8", 20, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 24 x 32,768, 32/8", 24, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 17 x 32,768, 32/8, sink 64 recent 256", 17, 32768, 32, 8, 128, 64, 256, 1, 0, 0},
        {"batch of 17 x 8,192, 32/8", 17, 8192, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 20 x 16,384, 32/8", 20, 16384, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 28 x 32,768, 32/8", 28, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 40 x 32,768, 32/8", 40, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 48 x 32,768, 32/8", 48, 32768, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 44 x 16,384, 32/8", 44, 16384, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 72 x 16,384, 32/8", 72, 16384, 32, 8, 128, 0, 0, 1, 0, 0},
        {"batch of 150 x 8,192, 32/8", 150, 8192, 32, 8, 128, 0, 0, 1, 0, 0},
        {"1 x 2,048, 32/8, sink 64 recent 256", 1, 2048, 32, 8, 128, 64, 256, 1, 0, 0},
        {"1 x 8,192, 32/8, sink 64 recent 256", 1, 8192, 32, 8, 128, 64, 256, 1, 0, 0},
        {"1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 128, 64, 256, 1, 0, 0},
        {"1 x 102,400, 32/8, sink 64 recent 256", 1, 102400, 32, 8, 128, 64, 256, 1, 0, 0},
        {"4 x 8,192, 32/8, sink 64 recent 256", 4, 8192, 32, 8, 128, 64, 256, 1, 0, 0},
        {"4 x 32,768, 32/8, sink 64 recent 256", 4, 32768, 32, 8, 128, 64, 256, 1, 0, 0},
        {"16 x 2,048, 32/8, sink 64 recent 256", 16, 2048, 32, 8, 128, 64, 256, 1, 0, 0},
        {"16 x 8,192, 32/8, sink 64 recent 256", 16, 8192, 32, 8, 128, 64, 256, 1, 0, 0},
        {"32 x 8,192, 32/8, sink 64 recent 256", 32, 8192, 32, 8, 128, 64, 256, 1, 0, 0},
        {"8 x 8,192, 32/8, sink 64 recent 256", 8, 8192, 32, 8, 128, 64, 256, 1, 0, 0},
        {"int2-lm: 8 x 8,192, 32/8, sink 64 recent 256", 8, 8192, 32, 8, 128, 64, 256, 1, 0, 0, KVD_CODEC_INT2_LM},
        {"head_dim 80: 48 x 32,768, 32/8", 48, 32768, 32, 8, 80, 0, 0, 1, 0, 0.85, KVD_CODEC_INT2, true, 0},
        {"head_dim 80: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 80, 64, 256, 1, 0, 0, KVD_CODEC_INT2, true, 0},
        {"head_dim 96: 40 x 32,768, 32/8", 40, 32768, 32, 8, 96, 0, 0, 1, 0, 0.85, KVD_CODEC_INT2, true, 0},
        {"head_dim 96: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 96, 64, 256, 1, 0, 0, KVD_CODEC_INT2, true, 0},
        {"head_dim 112: 36 x 32,768, 32/8", 36, 32768, 32, 8, 112, 0, 0, 1, 0, 0.85, KVD_CODEC_INT2, true, 0},
        {"head_dim 112: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 112, 64, 256, 1, 0, 0, KVD_CODEC_INT2, true, 0},
        {"head_dim 192: 24 x 32,768, 32/8", 24, 32768, 32, 8, 192, 0, 0, 1, 0, 0.85, KVD_CODEC_INT2, true, 0},
        {"head_dim 192: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 192, 64, 256, 1, 0, 0, KVD_CODEC_INT2, true, 0},
        {"head_dim 192/128: 28 x 32,768, 32/8", 28, 32768, 32, 8, 192, 0, 0, 1, 0, 0.85, KVD_CODEC_INT2, true, 128},
        {"head_dim 192/128: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 192, 64, 256, 1, 0, 0, KVD_CODEC_INT2, true, 128},
        {"head_dim 80: int2c: 32 x 32,768, 32/8", 32, 32768, 32, 8, 80, 0, 0, 1, 0, 0, KVD_CODEC_INT2C},
        {"head_dim 112: int2c: 32 x 32,768, 32/8", 32, 32768, 32, 8, 112, 0, 0, 1, 0, 0, KVD_CODEC_INT2C},
        {"head_dim 192: int2c: 32 x 32,768, 32/8", 32, 32768, 32, 8, 192, 0, 0, 1, 0, 0, KVD_CODEC_INT2C},
        {"head_dim 80: 32 x 32,768, 96/8", 32, 32768, 96, 8, 80, 0, 0, 1, 0, 0},
        {"int2c: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT2C},
        {"int2-lm: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT2_LM},
        {"turboquant-2: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TURBOQUANT_2},
        {"turboquant-3: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TURBOQUANT_3},
        {"turboquant-4: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TURBOQUANT_4},
        {"int4: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT4},
        {"int4: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 128, 64, 256, 1, 0, 0, KVD_CODEC_INT4},
        {"int4: 32 x 32,768, 128/8", 32, 32768, 128, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT4},
        {"int4: q_len 4: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 4, 0, 0, KVD_CODEC_INT4},
        {"k=int4,v=int2: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT4, true, 0, KVD_CODEC_INT2},
        {"k=int2,v=int4: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_INT2, true, 0, KVD_CODEC_INT4},
        {"k=bf16,v=int2: 8 x 32,768, 32/8", 8, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_BF16, true, 0, KVD_CODEC_INT2},
        {"tc2: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0.90, KVD_CODEC_TC2},
        {"tc2: 256 x 4,096, 32/8", 256, 4096, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: 32 x 4,096, 32/8", 32, 4096, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: 1 x 102,400, 32/8", 1, 102400, 32, 8, 128, 0, 0, 1, 0.027, 0, KVD_CODEC_TC2},
        {"tc2: 1 x 32,768, 32/8, sink 64 recent 256", 1, 32768, 32, 8, 128, 64, 256, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: 32 x 32,768, 96/8", 32, 32768, 96, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: q_len 4: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 4, 0, 0, KVD_CODEC_TC2},
        {"tc2: batch of 17 x 32,768, 32/8", 17, 32768, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: head_dim 64: 64 x 32,768, 32/8", 64, 32768, 32, 8, 64, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: head_dim 256: 16 x 32,768, 32/8", 16, 32768, 32, 8, 256, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2: head_dim 96: 40 x 32,768, 32/8", 40, 32768, 32, 8, 96, 0, 0, 1, 0, 0, KVD_CODEC_TC2},
        {"tc2.5: 32 x 32,768, 32/8", 32, 32768, 32, 8, 128, 0, 0, 1, 0, 0.90, KVD_CODEC_TC2_5},
        {"tc2.5: 256 x 4,096, 32/8", 256, 4096, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2_5},
        {"tc2.5: 32 x 4,096, 32/8", 32, 4096, 32, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2_5},
        {"tc2.5: 1 x 102,400, 32/8", 1, 102400, 32, 8, 128, 0, 0, 1, 0.027, 0, KVD_CODEC_TC2_5},
        {"tc2.5: 32 x 32,768, 96/8", 32, 32768, 96, 8, 128, 0, 0, 1, 0, 0, KVD_CODEC_TC2_5},
        {"tc2.5: head_dim 64: 64 x 32,768, 32/8", 64, 32768, 32, 8, 64, 0, 0, 1, 0, 0, KVD_CODEC_TC2_5},
    };
    for (const row &r : rows)
        bench_attend(r);
    bench_prefill("prefill 2,048 over 32,768, 32/8", 2048, 32768, false);
    bench_prefill("prefill 512 over 131,072, 32/8", 512, 131072, false);
    bench_prefill("prefill 2,048 over 32,768, 32/8, packed", 2048, 32768, true);
    bench_prefill("prefill 512 over 131,072, 32/8, packed", 512, 131072, true);
    for (bool packed : {false, true})
        for (uint32_t codec : {KVD_CODEC_INT2C, KVD_CODEC_INT4, KVD_CODEC_TURBOQUANT_3, KVD_CODEC_TC2, KVD_CODEC_TC2_5}) {
            char name[80];
            snprintf(name, sizeof(name), "prefill %s 2,048 over 32,768, 32/8%s", kvd_codec_name(codec), packed ? ", packed" : "");
            bench_prefill(name, 2048, 32768, packed, codec);
        }
    bench_quantize(false);
    bench_quantize(true);
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        if (codec != KVD_CODEC_BF16 && codec != KVD_CODEC_INT2)
            bench_quantize(false, codec);
    for (uint32_t dim : {80, 96, 112, 192})
        bench_quantize(false, KVD_CODEC_INT2, dim);
    bench_read();
    bench_read(KVD_CODEC_INT4);
    bench_read(KVD_CODEC_TC2);
    bench_read(KVD_CODEC_TC2_5);
    bench_latents();
    return 0;
}
