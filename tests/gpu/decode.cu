// The CUDA decode kernels on a GPU: against the CPU backend on the same pages, then against the memory's own speed.
// usage: decode test | decode bench. Built by tests/gpu/run.sh; needs no library but CUDA.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/attend.h"

// The CPU side, by a C file of its own.
extern "C" {
struct cpu_case {
    uint32_t q_heads, kv_heads, sequences, sink, recent, rotations; // rotations 0: identity
    const uint32_t *lengths;
    uint64_t seed;
};
struct cpu_result { // made by cpu_make, freed by cpu_free
    uint32_t layer, codec_stride, bf16_stride, ring;
    uint64_t codec_page_bytes, bf16_page_bytes;
    uint64_t *codec, *bf16; // host addresses, [S][stride]
    uint32_t *hist_end;
    float *r_k, *r_vt;
    uint16_t *q;     // [S][H_q][128]
    float *o, *lse;  // what the CPU says
    void *hidden;
};
void cpu_make(const struct cpu_case *c, struct cpu_result *r);
void cpu_free(struct cpu_result *r);
}

#define CUDA(call)                                                                                                     \
    do {                                                                                                               \
        cudaError_t rc_ = (call);                                                                                      \
        if (rc_ != cudaSuccess) {                                                                                      \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(rc_));                               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static std::vector<void *> owned;

template <typename T> static T *to_device(const T *from, uint64_t n)
{
    T *p;
    CUDA(cudaMalloc(&p, n * sizeof(T)));
    CUDA(cudaMemcpy(p, from, n * sizeof(T), cudaMemcpyHostToDevice));
    owned.push_back(p);
    return p;
}

static void free_all()
{
    for (void *p : owned)
        CUDA(cudaFree(p));
    owned.clear();
}

static uint64_t *copy_pages(const uint64_t *host, uint64_t n, uint64_t bytes)
{
    std::vector<uint64_t> device(n);
    for (uint64_t i = 0; i < n; i++)
        device[i] = host[i] ? (uint64_t)to_device((const uint8_t *)host[i], bytes) : 0;
    return to_device(device.data(), n);
}

static float widen(uint16_t b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static int run_case(const char *name, const cpu_case &c, uint32_t splits)
{
    cpu_result r;
    cpu_make(&c, &r);
    uint64_t rows = (uint64_t)c.sequences * c.q_heads, heads = c.rotations ? c.rotations : 1;
    kvd_cuda_decode_params p = {};
    p.sequences = c.sequences;
    p.q_heads = c.q_heads;
    p.kv_heads = c.kv_heads;
    p.head_dim = 128;
    p.layer = r.layer;
    p.sink = c.sink;
    p.ring = r.ring;
    p.scale = 1 / sqrtf(128);
    p.q = to_device(r.q, rows * 128);
    std::vector<uint16_t> poison(rows * 128, 0xffff), o(rows * 128);
    std::vector<float> bad(rows, NAN), lse(rows);
    p.o = to_device(poison.data(), rows * 128);
    p.lse = to_device(bad.data(), rows);
    p.codec_pages = copy_pages(r.codec, (uint64_t)c.sequences * r.codec_stride, r.codec_page_bytes);
    p.bf16_pages = copy_pages(r.bf16, (uint64_t)c.sequences * r.bf16_stride, r.bf16_page_bytes);
    p.codec_stride = r.codec_stride;
    p.bf16_stride = r.bf16_stride;
    p.length = to_device(c.lengths, c.sequences);
    p.hist_end = to_device(r.hist_end, c.sequences);
    p.r_k = c.rotations ? to_device(r.r_k, heads * 128 * 128) : nullptr;
    p.r_vt = c.rotations ? to_device(r.r_vt, heads * 128 * 128) : nullptr;
    p.rotations = (uint32_t)heads;
    p.splits = splits;
    std::vector<uint8_t> junk(kvd_cuda_decode_scratch(&p), 0xff);
    p.scratch = to_device(junk.data(), junk.size());
    int rc = kvd_cuda_decode(&p, nullptr);
    if (rc) {
        printf("%s: error %d\n", name, rc);
        return 1;
    }
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(o.data(), p.o, o.size() * 2, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(lse.data(), p.lse, lse.size() * 4, cudaMemcpyDeviceToHost));
    double worst = 0, worst_lse = 0, diff = 0, norm = 0;
    for (uint64_t i = 0; i < rows; i++) {
        double d = 0, n = 0;
        for (int k = 0; k < 128; k++) {
            double e = widen(o[i * 128 + k]) - r.o[i * 128 + k];
            d += e * e;
            n += (double)r.o[i * 128 + k] * r.o[i * 128 + k];
        }
        if (!(sqrt(d / n) <= worst))
            worst = sqrt(d / n);
        double e = fabs(lse[i] - r.lse[i]);
        if (!(e <= worst_lse))
            worst_lse = e;
        diff += d;
        norm += n;
    }
    // bf16 output rounds to 2^-9 at most, 1.1e-3 rms; the kernel's own error must stay below that.
    bool ok = worst < 4e-3 && sqrt(diff / norm) < 2.5e-3 && worst_lse < 2e-3;
    printf("%-44s splits %2u  relative L2 %.2e, worst row %.2e, lse %.2e  %s\n", name, splits, sqrt(diff / norm), worst,
           worst_lse, ok ? "ok" : "FAILED");
    cpu_free(&r);
    free_all();
    return !ok;
}

static int test()
{
    int failed = 0, n = 0;
    const uint32_t ragged[] = {1, 63, 64, 65, 320, 337, 400, 1000, 3000, 5555};
    const uint32_t groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16};
    for (uint32_t g : groups)
        for (uint32_t splits : {1u, 3u}) {
            char name[64];
            snprintf(name, sizeof(name), "group %u, ten ragged sequences", g);
            cpu_case c = {2 * g, 2, 10, 64, 256, 1, ragged, 77 + g};
            failed += run_case(name, c, splits);
            n++;
        }
    cpu_case per_head = {16, 4, 10, 16, 32, 4, ragged, 5}, identity = {8, 2, 10, 64, 256, 0, ragged, 6};
    cpu_case windows_off = {8, 2, 10, 0, 0, 1, ragged, 7};
    failed += run_case("a rotation per kv head, small windows", per_head, 2);
    failed += run_case("identity", identity, 2);
    failed += run_case("windows off", windows_off, 5);
    const uint32_t longer[] = {20000};
    cpu_case lone = {32, 8, 1, 64, 256, 1, longer, 8};
    failed += run_case("one long sequence", lone, 33);
    n += 4;
    printf("%d passed, %d failed\n", n - failed, failed);
    return failed != 0;
}

// -- bench -----------------------------------------------------------------------------------------------------------

__global__ void fill(uint32_t *to, uint64_t words, uint32_t seed)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < words; i += (uint64_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u ^ seed;
        x ^= x >> 16, x *= 0x85ebca6b, x ^= x >> 13;
        to[i] = x & 0x2fff2fff; // as fp16: small and positive
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

template <typename F> static double graph_median(F launch, int inner)
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

static double ceiling(uint8_t *pool, uint64_t bytes)
{
    uint32_t *out;
    CUDA(cudaMalloc(&out, 4));
    double ms = graph_median([&](cudaStream_t s, int) { read_all<<<132 * 8, 512, 0, s>>>((const uint4 *)pool, bytes / 16, out); }, 1);
    CUDA(cudaFree(out));
    return bytes / ms / 1e9; // TB/s
}

struct row {
    const char *name;
    uint32_t sequences, history, q_heads, kv_heads, sink, recent;
    double want_ms, want_fraction;
};

static void bench_row(const row &w, uint8_t *pool, uint64_t pool_bytes, double tbs, int sms)
{
    // One layer a page, so that a layer's tiles lie together as badly as they can: one tile a page and head.
    uint64_t page = (uint64_t)w.kv_heads * 4608, pages_each = (w.history + 63) / 64;
    uint64_t bytes = w.sequences * pages_each * page;
    uint64_t windows = w.sequences * (uint64_t)(w.sink + w.recent) * w.kv_heads * 512;
    int copies = (int)std::min<uint64_t>(8, std::max<uint64_t>(1, std::min(pool_bytes / (bytes + 1), 400000000 / (bytes + 1) + 1)));
    uint32_t ring = (w.recent + 64 + 63) / 64 * 64, bf16_stride = (w.sink + 63) / 64 + ring / 64;
    uint64_t bf16_page = (uint64_t)w.kv_heads * 64 * 512;
    uint8_t *bf16;
    CUDA(cudaMalloc(&bf16, w.sequences * bf16_stride * bf16_page));
    CUDA(cudaMemset(bf16, 0x3c, w.sequences * bf16_stride * bf16_page));
    std::vector<uint64_t> bf16_table(w.sequences * bf16_stride);
    for (uint64_t i = 0; i < bf16_table.size(); i++)
        bf16_table[i] = (uint64_t)bf16 + i * bf16_page;
    std::vector<uint32_t> length(w.sequences, w.sink + w.history + w.recent), end(w.sequences, w.sink + w.history);
    std::vector<uint16_t> q((uint64_t)w.sequences * w.q_heads * 128);
    std::vector<float> r(128 * 128);
    for (size_t i = 0; i < q.size(); i++)
        q[i] = (uint16_t)(0x3c00 + (i * 40503u >> 7) % 512 + (i % 3 ? 0 : 0x8000));
    for (int i = 0; i < 128; i++)
        for (int j = 0; j < 128; j++)
            r[i * 128 + j] = (__builtin_popcount(i & j) & 1 ? -1.0f : 1.0f) / sqrtf(128);
    kvd_cuda_decode_params p = {};
    p.sequences = w.sequences;
    p.q_heads = w.q_heads;
    p.kv_heads = w.kv_heads;
    p.head_dim = 128;
    p.sink = w.sink;
    p.ring = ring;
    p.scale = 0.088f;
    p.q = to_device(q.data(), q.size());
    p.o = to_device(q.data(), q.size());
    p.bf16_pages = to_device(bf16_table.data(), bf16_table.size());
    p.codec_stride = (uint32_t)pages_each;
    p.bf16_stride = bf16_stride;
    p.length = to_device(length.data(), length.size());
    p.hist_end = to_device(end.data(), end.size());
    p.r_k = p.r_vt = to_device(r.data(), r.size());
    p.rotations = 1;
    p.splits = kvd_cuda_decode_plan(w.sequences, w.kv_heads, w.history, (uint32_t)sms);
    if (const char *env = getenv("SPLITS"))
        p.splits = (uint32_t)atoi(env);
    std::vector<uint8_t> junk(kvd_cuda_decode_scratch(&p), 0);
    p.scratch = to_device(junk.data(), junk.size());
    std::vector<kvd_cuda_decode_params> ps;
    for (int i = 0; i < copies; i++) {
        std::vector<uint64_t> table(w.sequences * pages_each);
        for (uint64_t j = 0; j < table.size(); j++)
            table[j] = (uint64_t)pool + i * bytes + j * page;
        p.codec_pages = to_device(table.data(), table.size());
        ps.push_back(p);
    }
    int inner = bytes < 100000000 ? 2 * copies : copies;
    double ms = graph_median([&](cudaStream_t s, int i) { kvd_cuda_decode(&ps[i % copies], s); }, inner);
    double limit = (bytes + windows) / tbs / 1e9;
    char want[32] = "";
    if (w.want_ms > 0)
        snprintf(want, sizeof(want), "<= %.3f ms", w.want_ms);
    else if (w.want_fraction > 0)
        snprintf(want, sizeof(want), ">= %.0f %%", 100 * w.want_fraction);
    printf("%-40s %6.1f MB  splits %3u  %8.4f ms  limit %7.4f  %5.1f %%   want %s\n", w.name, (bytes + windows) / 1e6,
           p.splits, ms, limit, 100 * limit / ms, want);
    CUDA(cudaFree(bf16));
    free_all();
}

static int bench()
{
    cudaDeviceProp prop;
    CUDA(cudaGetDeviceProperties(&prop, 0));
    uint64_t bytes = 5ull << 30;
    uint8_t *pool;
    CUDA(cudaMalloc(&pool, bytes));
    fill<<<1024, 256>>>((uint32_t *)pool, bytes / 4, 99);
    CUDA(cudaDeviceSynchronize());
    double tbs = ceiling(pool, bytes);
    printf("%s, %d multiprocessors; read ceiling %.3f TB/s (same run, %llu MiB)\n", prop.name, prop.multiProcessorCount, tbs,
           (unsigned long long)(bytes >> 20));
    const row rows[] = {
        {"32 x 32,768, 32/8", 32, 32768, 32, 8, 0, 0, 0, 0.92},
        {"256 x 4,096, 32/8", 256, 4096, 32, 8, 0, 0, 0, 0.90},
        {"32 x 4,096, 32/8", 32, 4096, 32, 8, 0, 0, 0.031, 0},
        {"1 x 102,400, 32/8", 1, 102400, 32, 8, 0, 0, 0.026, 0},
        {"1 x 32,768, 32/8", 1, 32768, 32, 8, 0, 0, 0.012, 0},
        {"32 x 32,768, 64/8", 32, 32768, 64, 8, 0, 0, 0, 0.88},
        {"32 x 32,768, 8/8", 32, 32768, 8, 8, 0, 0, 0, 0.88},
        {"32 x 32,768, 96/8", 32, 32768, 96, 8, 0, 0, 0, 0.80},
        {"32 x 32,768, 32/8, sink 64 recent 256", 32, 32768, 32, 8, 64, 256, 0, 0.88},
    };
    for (const row &r : rows)
        bench_row(r, pool, bytes, tbs, prop.multiProcessorCount);
    return 0;
}

int main(int argc, char **argv)
{
    return argc > 1 && strcmp(argv[1], "bench") == 0 ? bench() : test();
}
