// A worker in direct mode: decodes random tokens over mapped pages and compares every output with
// attention computed here in float64 (codec bf16), or with what kvd computes on request over a twin
// of the sequence (int2). The same program runs on the CPU and on a GPU.
// usage: direct ADDRESS CODEC STEP_TOKENS STEPS [GRAPH]   or: direct ADDRESS stall
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvd/kvd.h"
#include "random.h"

#ifdef KVD_CUDA
#include <cuda_runtime_api.h>
#endif

enum { LAYERS = 3, KV = 2, GROUP = 3, HEADS = KV * GROUP, DIM = 64, MAX = 1600, SLOTS = 5 };
enum { KV_ROW = KV * DIM, Q_ROW = HEADS * DIM, MOST = 16 };

static kvd_failure failure;
static void try(kvd_result rc, int line)
{
    if (rc != KVD_SUCCESS) {
        fprintf(stderr, "direct.c:%d: %s\n", line, failure.text);
        exit(1);
    }
}
#define TRY(call) try(call, __LINE__)
#define ERR       (&failure)

// -- memory of the kernels ----------------------------------------------------------------------

static int on_gpu;

static void *make(size_t bytes)
{
#ifdef KVD_CUDA
    void *p = NULL;
    if (on_gpu) {
        if (cudaMalloc(&p, bytes) || cudaMemset(p, 0, bytes))
            exit(fprintf(stderr, "no GPU memory\n"));
        return p;
    }
#endif
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}
static void copy(void *to, const void *from, size_t bytes)
{
#ifdef KVD_CUDA
    if (on_gpu) {
        // A copy of little host memory returns before it is there.
        if (cudaMemcpy(to, from, bytes, cudaMemcpyDefault) || cudaStreamSynchronize(0))
            exit(fprintf(stderr, "a copy failed\n"));
        return;
    }
#endif
    memcpy(to, from, bytes);
}

// -- the sequences ------------------------------------------------------------------------------

static struct tokens {
    uint16_t k[LAYERS][MAX][KV_ROW], v[LAYERS][MAX][KV_ROW];
    uint64_t length, id, twin;
} seqs[SLOTS]; // the last slot stays empty

static kvd_client *client;
static kvd_buffer *buffer; // shared with kvd: host memory, or the GPU's
static uint8_t *shared;    // its contents on the host
static kvd_direct *direct;
static void *stream;

static void push(uint64_t bytes)
{
    if (on_gpu)
        copy(kvd_buffer_data(buffer), shared, bytes);
}
static void pull(uint64_t at, uint64_t bytes)
{
    if (on_gpu)
        copy(shared + at, (uint8_t *)kvd_buffer_data(buffer) + at, bytes);
}

// One step's tensors: host copies and those that kernels see.
static uint16_t k_host[LAYERS][SLOTS][MOST][KV_ROW], v_host[LAYERS][SLOTS][MOST][KV_ROW];
static float q_host[LAYERS][SLOTS * MOST * Q_ROW], o_host[LAYERS][SLOTS * MOST * Q_ROW];
static uint16_t *k_dev[LAYERS], *v_dev[LAYERS];
static float *q_dev[LAYERS], *o_dev[LAYERS];
static uint32_t n; // new tokens of a step
static int checked;

static void draw(struct tokens *s, uint64_t at, uint32_t count)
{
    for (int l = 0; l < LAYERS; l++)
        for (uint64_t t = at; t < at + count; t++)
            for (int c = 0; c < KV_ROW; c++) {
                s->k[l][t][c] = bf16(normal());
                s->v[l][t][c] = bf16(normal());
            }
}

// Puts tokens into the shared buffer for an append or a step of all layers; returns V's offset.
static uint64_t put(const struct tokens *s, uint64_t at, uint32_t count)
{
    uint16_t *k = (uint16_t *)shared, *v = k + (size_t)LAYERS * count * KV_ROW;
    for (int l = 0; l < LAYERS; l++) {
        memcpy(k + (size_t)l * count * KV_ROW, s->k[l][at], count * sizeof(s->k[l][0]));
        memcpy(v + (size_t)l * count * KV_ROW, s->v[l][at], count * sizeof(s->v[l][0]));
    }
    push(2 * sizeof(uint16_t) * LAYERS * count * KV_ROW);
    return sizeof(uint16_t) * LAYERS * count * KV_ROW;
}

static void prefill(struct tokens *s, uint32_t count)
{
    TRY(kvd_sequences_create(client, 1, &s->id, ERR));
    if (count) {
        draw(s, 0, count);
        kvd_item item = {
            .size = sizeof(item), .sequence = s->id, .tokens = count, .k = {buffer}, .v = {buffer}};
        item.v.offset = put(s, 0, count);
        TRY(kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR));
    }
    s->length = count;
    TRY(kvd_sequence_fork(client, s->id, 1, &s->twin, ERR));
}

// Attention of a slot's queries over all its tokens, in float64: the relative error of o.
REFERENCE static double error_of(const struct tokens *s, int slot, int layer, double *norm_out)
{
    double diff = 0, norm = 0;
    static double logit[MAX];
    for (uint32_t i = 0; i < n; i++)
        for (int h = 0; h < HEADS; h++) {
            const float *q = &q_host[layer][((slot * n + i) * HEADS + h) * DIM];
            const float *o = &o_host[layer][((slot * n + i) * HEADS + h) * DIM];
            double out[DIM] = {0}, sum = 0, top = -1e300;
            uint64_t end = s->length + i + 1;
            for (uint64_t t = 0; t < end; t++) {
                logit[t] = 0;
                for (int c = 0; c < DIM; c++)
                    logit[t] += (double)q[c] * widen(s->k[layer][t][h / GROUP * DIM + c]) / 8;
                top = fmax(top, logit[t]);
            }
            for (uint64_t t = 0; t < end; t++) {
                double p = exp(logit[t] - top);
                sum += p;
                for (int c = 0; c < DIM; c++)
                    out[c] += p * widen(s->v[layer][t][h / GROUP * DIM + c]);
            }
            for (int c = 0; c < DIM; c++) {
                double d = out[c] / sum - o[c];
                diff += d * d;
                norm += out[c] / sum * (out[c] / sum);
            }
        }
    *norm_out += norm;
    return diff;
}

#ifdef KVD_EMULATED // streams that wait for nobody
enum { ORDERED = 0 };
#else
enum { ORDERED = 1 };
#endif

// A step of each layer in the stream's order, as a model runs, with nothing waited for in between.
static void steps_in_order(kvd_item *items, uint64_t kv, uint64_t q, uint64_t o_at)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        TRY(kvd_enqueue(client, stream, KVD_CALL_STEP, (kvd_layers){l, 1}, NULL, items, SLOTS - 1,
                        ERR));
        for (int s = 0; s < SLOTS - 1; s++) {
            items[s].k.offset += kv;
            items[s].v.offset += kv;
            items[s].q.offset += q;
            items[s].o.offset += q;
        }
    }
#ifdef KVD_CUDA
    if (cudaMemcpyAsync(shared + o_at, (uint8_t *)kvd_buffer_data(buffer) + o_at, LAYERS * q,
                        cudaMemcpyDefault, stream) ||
        cudaStreamSynchronize(stream))
        exit(fprintf(stderr, "a copy failed\n"));
#else
    (void)o_at;
#endif
}

// The same step on request, over the twins, in one call. Returns the worst relative error.
static double twin_error(void)
{
    uint64_t kv = (uint64_t)SLOTS * n * KV_ROW * 2, q = (uint64_t)SLOTS * n * Q_ROW * 4;
    uint64_t v_at = LAYERS * kv, q_at = 2 * v_at, o_at = q_at + LAYERS * q;
    kvd_item items[SLOTS - 1];
    double worst = 0;
    for (int l = 0; l < LAYERS; l++) {
        memcpy(shared + l * kv, k_host[l], kv);
        memcpy(shared + v_at + l * kv, v_host[l], kv);
        memcpy(shared + q_at + l * q, q_host[l], q);
    }
    int in_order =
        ORDERED && on_gpu && checked % 2; // in the stream's order, or one thing after the other
#ifdef KVD_CUDA
    if (in_order &&
        cudaMemcpyAsync(kvd_buffer_data(buffer), shared, o_at, cudaMemcpyDefault, stream))
        exit(fprintf(stderr, "a copy failed\n"));
#endif
    if (!in_order)
        push(o_at);
    for (uint64_t s = 0; s < SLOTS - 1; s++) {
        uint64_t k_row = s * kv / SLOTS, q_row = s * q / SLOTS;
        items[s] =
            (kvd_item){.size = sizeof(kvd_item),
                       .sequence = seqs[s].twin,
                       .position = seqs[s].length,
                       .tokens = n,
                       .k = {buffer, .offset = k_row, .layer_stride = kv},
                       .v = {buffer, .offset = v_at + k_row, .layer_stride = kv},
                       .q = {buffer, .offset = q_at + q_row, .layer_stride = q, .dtype = KVD_F32},
                       .o = {buffer, .offset = o_at + q_row, .layer_stride = q, .dtype = KVD_F32}};
    }
    if (in_order) {
        steps_in_order(items, kv, q, o_at);
        TRY(kvd_enqueued(client, ERR));
    } else {
        TRY(kvd_step(client, (kvd_layers){0, 0}, NULL, items, SLOTS - 1, ERR));
        pull(o_at, LAYERS * q);
    }
    for (uint64_t s = 0; s < SLOTS - 1; s++) {
        double diff = 0, norm = 0;
        for (int l = 0; l < LAYERS; l++)
            for (uint32_t i = 0; i < n * Q_ROW; i++) {
                const float *want = (const float *)(shared + o_at + l * q + s * q / SLOTS);
                double d = want[i] - o_host[l][s * n * Q_ROW + i];
                diff += d * d;
                norm += (double)want[i] * want[i];
            }
        worst = fmax(worst, sqrt(diff / norm));
        TRY(kvd_sequence_truncate(client, seqs[s].twin, seqs[s].length, ERR));
    }
    return worst;
}

static void enqueue(void)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        uint64_t kv = (uint64_t)SLOTS * n * KV_ROW * 2, q = (uint64_t)SLOTS * n * Q_ROW * 4;
        TRY(kvd_store_enqueue(direct, stream, l, k_dev[l], kv, v_dev[l], kv, ERR));
        TRY(kvd_attend_enqueue(direct, stream, l, q_dev[l], q, o_dev[l], q, NULL, 0, ERR));
    }
}

#ifdef KVD_CUDA
static cudaGraphExec_t graph;
static void capture(void)
{
    cudaGraph_t g;
    if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal))
        exit(fprintf(stderr, "no capture\n"));
    enqueue();
    if (cudaStreamEndCapture(stream, &g) || cudaGraphInstantiate(&graph, g, 0))
        exit(fprintf(stderr, "the step cannot be captured\n"));
}
#endif

// A step with fresh random tensors.
static void step(int with_graph)
{
    for (int l = 0; l < LAYERS; l++) {
        for (int s = 0; s < SLOTS; s++)
            for (uint32_t i = 0; i < n; i++) {
                memcpy(&k_host[l][0][0][0] + (s * n + i) * KV_ROW, seqs[s].k[l][seqs[s].length + i],
                       sizeof(seqs[s].k[l][0]));
                memcpy(&v_host[l][0][0][0] + (s * n + i) * KV_ROW, seqs[s].v[l][seqs[s].length + i],
                       sizeof(seqs[s].v[l][0]));
            }
        for (uint32_t i = 0; i < SLOTS * n * Q_ROW; i++)
            q_host[l][i] = normal();
        copy(k_dev[l], k_host[l], SLOTS * n * KV_ROW * 2);
        copy(v_dev[l], v_host[l], SLOTS * n * KV_ROW * 2);
        copy(q_dev[l], q_host[l], SLOTS * n * Q_ROW * 4);
    }
    TRY(kvd_direct_begin(direct, stream, ERR));
#ifdef KVD_CUDA
    if (with_graph && !graph)
        capture();
    if (with_graph && cudaGraphLaunch(graph, stream))
        exit(fprintf(stderr, "no launch\n"));
#endif
    if (!with_graph)
        enqueue();
#ifdef KVD_CUDA
    if (on_gpu && cudaStreamSynchronize(stream))
        exit(fprintf(stderr, "a kernel failed\n"));
#endif
    for (int l = 0; l < LAYERS; l++)
        copy(o_host[l], o_dev[l], SLOTS * n * Q_ROW * 4);
}

static void open_all(const char *address, const char *codec)
{
    const uint32_t layers[LAYERS] = {1, 4, 9};
    kvd_options options = {.size = sizeof(options),
                           .address = address,
                           .client_name = "direct",
                           .namespace_name = getenv("KVD_NAMESPACE"),
                           .layers = layers,
                           .n_layers = LAYERS,
                           .q_heads = HEADS,
                           .kv_heads = KV,
                           .head_dim_k = DIM,
                           .head_dim_v = DIM,
                           .codec = codec};
    kvd_info info = KVD_NEW(kvd_info);
    TRY(kvd_open(&options, &client, ERR));
    TRY(kvd_get_info(client, &info, ERR));
    on_gpu = strcmp(info.backend, "cuda") == 0;
#ifdef KVD_CUDA
    if (on_gpu && cudaStreamCreateWithFlags((cudaStream_t *)&stream, cudaStreamNonBlocking))
        exit(fprintf(stderr, "no stream\n"));
#endif
    if (on_gpu) { // not where its allocation begins
        TRY(kvd_buffer_cuda(client, (uint8_t *)make(9 << 20) + 4096, 8 << 20, &buffer, ERR));
        shared = malloc(8 << 20);
    } else {
        TRY(kvd_buffer_new(client, 8 << 20, &buffer, ERR));
        shared = kvd_buffer_data(buffer);
    }
    for (int l = 0; l < LAYERS; l++) {
        k_dev[l] = make(sizeof(k_host[l]));
        v_dev[l] = make(sizeof(v_host[l]));
        q_dev[l] = make(sizeof(q_host[l]));
        o_dev[l] = make(sizeof(o_host[l]));
    }
}

static void open_direct(void)
{
    // With longer ones, slots' page tables lie so far apart that each is brought in a copy of its
    // own.
    kvd_direct_options options = {.size = sizeof(options),
                                  .slots = SLOTS,
                                  .max_tokens = n > 1 ? 64 * MAX : MAX,
                                  .step_tokens = n,
                                  .dtype = KVD_F32};
    TRY(kvd_direct_open(client, &options, &direct, ERR));
    for (uint32_t s = 0; s < SLOTS - 1; s++)
        TRY(kvd_direct_bind(direct, s, seqs[s].id, ERR));
}

// Drives steps by lines of standard input: a number is that many steps; each answers "done".
static int stall(void)
{
    char line[64];
    n = 1;
    prefill(&seqs[0], 100);
    open_direct();
    for (uint32_t s = 1; s < SLOTS; s++)
        TRY(kvd_direct_bind(direct, s, 0, ERR));
    printf("ready\n");
    while (fflush(stdout), fgets(line, sizeof(line), stdin)) {
        for (int i = atoi(line); i > 0; i--) {
            draw(&seqs[0], seqs[0].length, 1);
            step(0);
            TRY(kvd_direct_end(direct, stream, NULL, ERR));
            seqs[0].length++;
        }
        uint64_t length, stored;
        TRY(kvd_direct_length(direct, 0, &length, &stored, ERR));
        printf("done %llu stored %llu\n", (unsigned long long)length, (unsigned long long)stored);
    }
    TRY(kvd_direct_flush(direct, ERR));
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    TRY(kvd_sequence_describe(client, seqs[0].id, &info, ERR));
    return info.length == seqs[0].length ? 0 : 1;
}

// The worst relative error of a step's outputs. After a flush, the view has all that kvd has, as a
// step on request sees it.
static double check_step(int exact, int i)
{
    double worst = 0;
    if (!exact && i % 13 == 0) {
        worst = twin_error();
        checked++;
    }
    for (int s = 0; s < SLOTS - 1 && exact; s++) {
        double norm = 0, diff = 0;
        for (int l = 0; l < LAYERS; l++)
            diff += error_of(&seqs[s], s, l, &norm);
        worst = fmax(worst, sqrt(diff / norm));
        checked++;
    }
    return worst;
}

// Appends the step's tokens to a twin.
static void follow(const struct tokens *s)
{
    kvd_item item = {.size = sizeof(item),
                     .sequence = s->twin,
                     .position = s->length,
                     .tokens = n,
                     .k = {buffer},
                     .v = {buffer}};
    item.v.offset = put(s, s->length, n);
    TRY(kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR));
}

int main(int argc, char **argv)
{
    static const uint32_t lengths[SLOTS - 1] = {0, 5, 333, 900};
    if (argc == 3 && strcmp(argv[2], "stall") == 0) {
        open_all(argv[1], "int2");
        return stall();
    }
    if (argc < 5)
        return 2;
    const char *repeat = getenv("KVD_TEST_SEED");
    uint64_t seed = repeat ? strtoull(repeat, NULL, 10) : (uint64_t)time(NULL);
    printf("KVD_TEST_SEED=%llu\n", (unsigned long long)seed);
    rng ^= seed * 0x9e3779b97f4a7c15ull;
    n = (uint32_t)atoi(argv[3]);
    int exact = strcmp(argv[2], "bf16") == 0, steps = atoi(argv[4]), with_graph = argc > 5;
    open_all(argv[1], argv[2]);
    for (int s = 0; s < SLOTS - 1; s++)
        prefill(&seqs[s], lengths[s]);
    open_direct();
    double worst = 0;
    for (int i = 0; i < steps; i++) {
        uint32_t keep[SLOTS];
        for (int s = 0; s < SLOTS - 1; s++)
            draw(&seqs[s], seqs[s].length, n);
        step(with_graph);
        worst = fmax(worst, check_step(exact, i));
        for (int s = 0; s < SLOTS; s++)
            keep[s] = n == 1 || !exact ? n : (uint32_t)(uniform() * (n + 1));
        TRY(kvd_direct_end(direct, stream, keep, ERR));
        for (int s = 0; s < SLOTS - 1; s++) {
            if (!exact)
                follow(&seqs[s]);
            seqs[s].length += keep[s];
        }
        if (i % 13 == 12)
            TRY(kvd_direct_flush(direct, ERR));
    }
    TRY(kvd_direct_flush(direct, ERR));
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    for (int s = 0; s < SLOTS - 1; s++) {
        TRY(kvd_sequence_describe(client, seqs[s].id, &info, ERR));
        if (info.length != seqs[s].length)
            return fprintf(stderr, "kvd has %llu tokens of %llu\n", (unsigned long long)info.length,
                           (unsigned long long)seqs[s].length),
                   1;
    }
    kvd_direct_close(&direct);
    kvd_close(&client);
    printf("%d outputs, worst relative error %.2e\n", checked, worst);
    return worst < 2e-3 ? 0 : 1;
}
