// One GPU, several processes: what direct mode and calls cost beside the bare kernels. Qwen3-8B's
// layout: 36 layers, 32 q heads, 8 kv heads, head_dim 128, sink 64, recent 256.
// usage: bench_direct ADDRESS [quick|capacity|whole [CODEC]]   (kvd runs there, with backend cuda)
#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#include "admin.pb-c.h"
#include "client/lib/direct.h"
#include "kernels/cuda/cuda.h"

enum { LAYERS = 36, HEADS = 32, KV = 8, DIM = 128, PIECE = 2048 };

static const char *address, *codec;
static kvd_client *client;
static kvd_buffer *tokens; // K, then V, of PIECE tokens of all layers
static const uint64_t KV_BYTES = (uint64_t)LAYERS * PIECE * KV * DIM * 2;
static kvd_failure failure;
static cudaStream_t stream;

static void try(int rc, int line)
{
    if (rc) {
        fprintf(stderr, "bench_direct.c:%d: %s\n", line,
                failure.text[0] ? failure.text : cudaGetErrorString((cudaError_t)rc));
        exit(1);
    }
}
#define TRY(call) try(call, __LINE__)
#define ERR       (&failure)

static double now(void) // us
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec * 1e-3;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static double median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof(*x), ascending);
    return x[n / 2];
}

static void *make(uint64_t bytes)
{
    void *p;
    TRY(cudaMalloc(&p, bytes));
    TRY(cudaMemset(p, 0, bytes));
    return p;
}

// Normal values in bf16, repeated.
static void fill(uint8_t *to, uint64_t bytes)
{
    enum { BLOCK = 1 << 20 };
    static uint16_t block[BLOCK];
    uint64_t x = 88172645463325252ull;
    for (int i = 0; i < BLOCK && !block[BLOCK - 1]; i++) {
        float sum = 0;
        for (int k = 0; k < 4; k++) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            sum += (float)(x >> 40) * 0x1p-24f - 0.5f;
        }
        block[i] = kvd_f32_to_bf16(sum * 1.7f);
    }
    for (uint64_t at = 0; at < bytes; at += sizeof(block))
        TRY(cudaMemcpy(to + at, block, KVD_MIN(sizeof(block), bytes - at), cudaMemcpyDefault));
}

static double opening; // when open_client began to

static void open_client(void)
{
    static uint32_t layers[LAYERS];
    for (uint32_t i = 0; i < LAYERS; i++)
        layers[i] = i;
    kvd_options o = {.size = sizeof(o),
                     .address = address,
                     .client_name = "bench",
                     .timeout_ms = 120000,
                     .layers = layers,
                     .n_layers = LAYERS,
                     .q_heads = HEADS,
                     .kv_heads = KV,
                     .head_dim_k = DIM,
                     .head_dim_v = DIM,
                     .codec = codec};
    uint8_t *memory = make(2 * KV_BYTES);
    fill(memory, 2 * KV_BYTES);
    opening = now();
    TRY(kvd_open(&o, &client, ERR));
    TRY(kvd_buffer_cuda(client, memory, 2 * KV_BYTES, &tokens, ERR));
}

// Appends `count` tokens to `n` sequences of length `at`.
static void append(const uint64_t *ids, uint32_t n, uint64_t at, uint32_t count)
{
    kvd_item items[64];
    for (uint32_t first = 0; first < n; first += 32) {
        uint32_t some = KVD_MIN(n - first, 32u);
        for (uint32_t t = 0; t < count; t += PIECE) {
            uint32_t piece = KVD_MIN(count - t, (uint32_t)PIECE);
            for (uint32_t i = 0; i < some; i++)
                items[i] = (kvd_item){.size = sizeof(kvd_item),
                                      .sequence = ids[first + i],
                                      .position = at + t,
                                      .tokens = piece,
                                      .k = {tokens},
                                      .v = {tokens, .offset = KV_BYTES}};
            TRY(kvd_append(client, (kvd_layers){0, 0}, items, some, ERR));
        }
    }
}

// -- direct mode --------------------------------------------------------------------------------

struct tensors { // of a step of all layers
    uint8_t *q, *k, *v, *o;
    uint64_t q_layer, kv_layer;
};

static struct tensors make_tensors(uint32_t slots)
{
    struct tensors t = {.q_layer = (uint64_t)slots * HEADS * DIM * 2,
                        .kv_layer = (uint64_t)slots * KV * DIM * 2};
    t.q = make(LAYERS * t.q_layer);
    t.o = make(LAYERS * t.q_layer);
    t.k = make(LAYERS * t.kv_layer);
    t.v = make(LAYERS * t.kv_layer);
    fill(t.q, LAYERS * t.q_layer);
    fill(t.k, LAYERS * t.kv_layer);
    fill(t.v, LAYERS * t.kv_layer);
    return t;
}

static void free_tensors(struct tensors *t)
{
    cudaFree(t->q);
    cudaFree(t->o);
    cudaFree(t->k);
    cudaFree(t->v);
}

static cudaGraphExec_t capture(void (*enqueue)(void *ctx, uint32_t layer), void *ctx)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t l = 0; l < LAYERS; l++)
        enqueue(ctx, l);
    TRY(cudaStreamEndCapture(stream, &graph));
    TRY(cudaGraphInstantiate(&exec, graph, 0));
    TRY(cudaGraphDestroy(graph));
    return exec;
}

// Median time of a replay, in us.
static double replay(cudaGraphExec_t graph, int n)
{
    cudaEvent_t a, b;
    double t[64];
    TRY(cudaEventCreate(&a));
    TRY(cudaEventCreate(&b));
    for (int i = -2; i < n; i++) {
        float ms;
        TRY(cudaEventRecord(a, stream));
        TRY(cudaGraphLaunch(graph, stream));
        TRY(cudaEventRecord(b, stream));
        TRY(cudaEventSynchronize(b));
        TRY(cudaEventElapsedTime(&ms, a, b));
        if (i >= 0)
            t[i] = ms * 1e3;
    }
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    return median(t, n);
}

struct direct_step {
    kvd_direct *d;
    struct tensors t;
};

static void enqueue_direct(void *ctx, uint32_t l)
{
    struct direct_step *s = ctx;
    uint64_t kv = s->t.kv_layer, q = s->t.q_layer;
    TRY(kvd_store_enqueue(s->d, stream, l, s->t.k + l * kv, kv, s->t.v + l * kv, kv, ERR));
    TRY(kvd_attend_enqueue(s->d, stream, l, s->t.q + l * q, q, s->t.o + l * q, q, NULL, 0, ERR));
}

// The same kernels over memory of this process alone.
struct local_step {
    struct kvd_cuda_attend_params attend;
    struct kvd_cuda_store_params store;
    struct tensors t;
    uint64_t tail_layer;
    uint8_t *tail;
};

static void enqueue_local(void *ctx, uint32_t l)
{
    struct local_step *s = ctx;
    uint16_t *k = (uint16_t *)(void *)(s->tail + l * s->tail_layer);
    uint16_t *v = (uint16_t *)(void *)(s->tail + (LAYERS + l) * s->tail_layer);
    s->store.k = (void *)(s->t.k + l * s->t.kv_layer);
    s->store.v = (void *)(s->t.v + l * s->t.kv_layer);
    s->store.tail.k = s->attend.tail.k = k;
    s->store.tail.v = s->attend.tail.v = v;
    TRY(kvd_cuda_store(&s->store, stream));
    s->attend.layer = l;
    s->attend.q = s->t.q + l * s->t.q_layer;
    s->attend.o = s->t.o + l * s->t.q_layer;
    TRY(kvd_cuda_attend(&s->attend, stream));
}

// Copies the pages that a step sees into memory of this process.
static uint64_t *copy_pages(const uint64_t *table, uint64_t entries, uint64_t page, uint64_t *bytes)
{
    uint64_t *own = calloc(entries, sizeof(*own)), used = 0, at = 0;
    for (uint64_t i = 0; i < entries; i++)
        used += table[i] != 0;
    uint8_t *memory = make(used * page);
    for (uint64_t i = 0; i < entries; i++) {
        if (!table[i])
            continue;
        own[i] = (uint64_t)(uintptr_t)memory + at++ * page;
        TRY(cudaMemcpy((void *)(uintptr_t)own[i], (void *)(uintptr_t)table[i], page,
                       cudaMemcpyDeviceToDevice));
    }
    uint64_t *device = make(entries * sizeof(*own));
    TRY(cudaMemcpy(device, own, entries * sizeof(*own), cudaMemcpyDefault));
    free(own);
    *bytes += used * page;
    return device;
}

static struct local_step make_local(const kvd_direct *d, struct tensors t, uint64_t *bytes)
{
    const struct direct_plane *plane = &d->planes[0];
    const struct kvd_plane *g = &plane->shape;
    uint32_t n = d->options.slots, *lengths = make(3 * n * sizeof(*lengths));
    struct cudaDeviceProp prop;
    uint64_t sum = 0;
    TRY(cudaMemcpy(lengths, d->length, 3 * n * sizeof(*lengths), cudaMemcpyDefault));
    TRY(cudaGetDeviceProperties(&prop, 0));
    for (uint32_t i = 0; i < n; i++)
        sum += plane->hist_end[i] - g->sink;
    struct kvd_cuda_tail tail = {.tokens = lengths + (d->tail_tokens - d->length), .ring = d->ring};
    struct local_step s = {
        .t = t,
        .tail_layer = direct_layer_at(d, 1, false),
        .attend = {.sequences = n,
                   .q_heads = HEADS,
                   .kv_heads = KV,
                   .dim_k = DIM,
                   .dim_v = DIM,
                   .codec = g->codec.k,
                   .codec_v = g->codec.v,
                   .q_len = 1,
                   .sink = g->sink,
                   .ring = kvd_plane_ring(g),
                   .scale = 1 / sqrtf(DIM),
                   .pages = {.codec =
                                 copy_pages(plane->codec, (uint64_t)n * plane->codec_stride,
                                            kvd_round_up(kvd_page_bytes(g, g->codec), 4096), bytes),
                             .bf16 = copy_pages(plane->bf16, (uint64_t)n * plane->bf16_stride,
                                                kvd_page_bytes(g, kvd_window_codec()), bytes),
                             .codec_stride = plane->codec_stride,
                             .bf16_stride = plane->bf16_stride,
                             .length = lengths,
                             .hist_end = lengths + (plane->hist_end - d->length)},
                   .tail = tail,
                   .settled = true,
                   .rotation = plane->rotation->device},
        .store = {.sequences = n,
                  .kv_heads = KV,
                  .dim_k = DIM,
                  .dim_v = DIM,
                  .q_len = 1,
                  .length = lengths,
                  .tail = tail}};
    s.tail = make(2 * LAYERS * s.tail_layer);
    kvd_cuda_attend_plan(&s.attend, sum, plane->hist_end[0] - g->sink,
                         d->length[0] + d->tail_tokens[0] - (plane->hist_end[0] - g->sink),
                         (uint32_t)prop.multiProcessorCount);
    s.attend.scratch = make(kvd_cuda_attend_scratch(&s.attend));
    return s;
}

// Steps with appends under way, as a worker makes them. A card's clock drifts by more than appends
// cost, so steps are compared with those next to them: in a group, in which each slot fills a
// chunk, most steps have no append beside them. A step attends to what kvd has not taken yet in
// bf16, from the tail.
struct run_of_steps {
    double step, appends; // us: a step that has no append beside it, and what those add to each
    double tail;          // tokens on average
    uint32_t longest_tail;
};

enum { STEPS = 256, GROUP = 16 };

// Steps' times, in us.
static void time_steps(struct direct_step *s, cudaGraphExec_t graph, int ahead, double t[STEPS],
                       struct run_of_steps *r)
{
    cudaEvent_t ends[STEPS + 1];
    for (int i = 0; i <= STEPS; i++)
        TRY(cudaEventCreate(&ends[i]));
    TRY(cudaEventRecord(ends[0], stream));
    for (int i = 0; i < STEPS; i++) {
        if (i > ahead)
            TRY(cudaEventSynchronize(ends[i - ahead]));
        TRY(kvd_direct_begin(s->d, stream, ERR));
        r->tail += (double)s->d->tail_tokens[0] / STEPS;
        r->longest_tail = KVD_MAX(r->longest_tail, s->d->tail_tokens[0]);
        TRY(cudaGraphLaunch(graph, stream));
        TRY(kvd_direct_end(s->d, stream, NULL, ERR));
        TRY(cudaEventRecord(ends[i + 1], stream));
    }
    TRY(cudaStreamSynchronize(stream));
    for (int i = 0; i < STEPS; i++) {
        float ms;
        TRY(cudaEventElapsedTime(&ms, ends[i], ends[i + 1]));
        t[i] = ms * 1e3;
    }
    for (int i = 0; i <= STEPS; i++)
        TRY(cudaEventDestroy(ends[i]));
}

// The host is `ahead` steps in front of its GPU, as far as libkvd lets it.
static struct run_of_steps run_steps(struct direct_step *s, cudaGraphExec_t graph, int ahead)
{
    struct run_of_steps r = {0};
    double t[STEPS];
    time_steps(s, graph, ahead, t, &r);
    for (int g = 0; g < STEPS; g += GROUP) {
        double mean = 0;
        for (int i = g; i < g + GROUP; i++)
            mean += t[i] / GROUP;
        double alone = median(t + g, GROUP);
        r.step += alone * GROUP / STEPS;
        r.appends += (mean - alone) * GROUP / STEPS;
    }
    return r;
}

// A worker that knows a step's tokens before it makes the next but one, as engines do, and one that
// waits for nothing.
static void steps_beside_appends(struct direct_step *s, cudaGraphExec_t graph,
                                 cudaGraphExec_t local_graph)
{
    const int hosts[] = {1, STEPS};
    for (int i = 0; i < 2; i++) {
        struct run_of_steps r = run_steps(s, graph, hosts[i]);
        uint32_t tail = s->d->tail_tokens[0];
        double behind = replay(graph, 20), own = replay(local_graph, 20);
        TRY(kvd_direct_flush(s->d, ERR));
        TRY(kvd_direct_begin(s->d, stream, ERR)); // to see what is stored now
        TRY(kvd_direct_end(s->d, stream, (uint32_t[256]){0}, ERR));
        double after = replay(graph, 20), own_after = replay(local_graph, 20);
        printf("  %d steps with begin and end, the host %s: %.1f us, and %.1f for %d appends a "
               "slot beside them: %+.2f %%; tails of %.1f tokens, %u at most\n"
               "    (replays with a tail of %u %.1f us, without %.1f; own memory's meanwhile %.1f "
               "and %.1f)\n",
               STEPS, hosts[i] == 1 ? "a step ahead" : "as far ahead as it may", r.step, r.appends,
               STEPS / KVD_CHUNK_TOKENS, r.appends / r.step * 100, r.tail, r.longest_tail, tail,
               behind, after, own, own_after);
    }
}

static void direct_against_local(uint32_t slots, uint32_t length)
{
    uint64_t ids[256], bytes = 0;
    struct direct_step s = {.t = make_tensors(slots)};
    TRY(kvd_sequences_create(client, slots, ids, ERR));
    double t0 = now();
    append(ids, slots, 0, length);
    printf("append %u x %u from a worker's GPU buffer: %.2f s\n", slots, length,
           (now() - t0) * 1e-6);
    t0 = now();
    kvd_direct_options o = {.size = sizeof(o), .slots = slots, .max_tokens = length + 4096};
    TRY(kvd_direct_open(client, &o, &s.d, ERR));
    double opened = now();
    for (uint32_t i = 0; i < slots; i++)
        TRY(kvd_direct_bind(s.d, i, ids[i], ERR));
    double bound = now();
    uint32_t extents = 0;
    for (uint32_t i = 0; i < s.d->arena->count; i++)
        extents += s.d->mapped[i];
    TRY(kvd_direct_begin(s.d, stream, ERR));
    cudaGraphExec_t graph = capture(enqueue_direct, &s);
    TRY(cudaGraphLaunch(graph, stream));
    TRY(kvd_direct_end(s.d, stream, NULL, ERR));
    TRY(cudaStreamSynchronize(stream));
    printf("kvd_direct_open %.1f ms; binding %u sequences, %u extents of %llu MiB mapped: %.1f ms "
           "(%.2f ms an extent)\n",
           (opened - t0) * 1e-3, slots, extents, (unsigned long long)s.d->arena->bytes >> 20,
           (bound - opened) * 1e-3, (bound - opened) * 1e-3 / extents);
    struct local_step local = make_local(s.d, s.t, &bytes);
    cudaGraphExec_t local_graph = capture(enqueue_local, &local);
    double direct[5], own[5], ratio[5];
    for (int i = 0; i < 5; i++) { // in turns, and turn by turn, as clocks drift
        direct[i] = replay(graph, 20);
        own[i] = replay(local_graph, 20);
        ratio[i] = direct[i] / own[i];
    }
    printf("36 layers, decode %u x %u in a CUDA graph: direct mode %.1f us, the same kernels over "
           "this process's memory %.1f us: %+.2f %%\n",
           slots, length, median(direct, 5), median(own, 5), (median(ratio, 5) - 1) * 100);
    steps_beside_appends(&s, graph, local_graph);
    TRY(cudaGraphExecDestroy(graph));
    TRY(cudaGraphExecDestroy(local_graph));
    kvd_direct_close(&s.d);
    free_tensors(&s.t);
    TRY(kvd_sequences_free(client, ids, slots, false, ERR));
}

// -- on request ---------------------------------------------------------------------------------

// The items of a step of one token, for a layer or, with `all`, for all layers.
static void step_items(kvd_item *items, const uint64_t *ids, uint32_t n, kvd_buffer *b,
                       uint64_t position, uint32_t layer, bool all)
{
    uint64_t kv = (uint64_t)n * KV * DIM * 2, q = (uint64_t)n * HEADS * DIM * 2;
    uint64_t l = all ? 0 : layer;
    for (uint32_t i = 0; i < n; i++)
        items[i] = (kvd_item){.size = sizeof(kvd_item),
                              .sequence = ids[i],
                              .position = position,
                              .tokens = 1,
                              .k = {b, l * kv + i * kv / n, kv},
                              .v = {b, (LAYERS + l) * kv + i * kv / n, kv},
                              .q = {b, 2 * LAYERS * kv + l * q + i * q / n, q},
                              .o = {b, 2 * LAYERS * kv + (LAYERS + l) * q + i * q / n, q}};
}

static void on_request(uint32_t n, uint32_t length)
{
    enum { ROUNDS = 6 };
    uint64_t ids[64], bytes = (uint64_t)LAYERS * 2 * n * (KV + HEADS) * DIM * 2;
    uint64_t position = length;
    double step[ROUNDS * LAYERS], attend[ROUNDS * LAYERS], all[ROUNDS], ordered[ROUNDS];
    kvd_item items[64];
    kvd_buffer *b;
    TRY(kvd_sequences_create(client, n, ids, ERR));
    append(ids, n, 0, length);
    uint8_t *memory = make(bytes);
    fill(memory, bytes);
    TRY(cudaDeviceSynchronize());
    TRY(kvd_buffer_cuda(client, memory, bytes, &b, ERR));
    for (int r = 0; r < ROUNDS; r++) {
        for (uint32_t l = 0; l < LAYERS; l++) {
            step_items(items, ids, n, b, position, l, false);
            double t = now();
            TRY(kvd_step(client, (kvd_layers){l, 1}, NULL, items, n, ERR));
            step[r * LAYERS + (int)l] = now() - t;
            t = now();
            TRY(kvd_attend(client, (kvd_layers){l, 1}, NULL, items, n, ERR));
            attend[r * LAYERS + (int)l] = now() - t;
        }
        step_items(items, ids, n, b, ++position, 0, true);
        double t = now();
        TRY(kvd_step(client, (kvd_layers){0, 0}, NULL, items, n, ERR));
        all[r] = now() - t;
        position++;
        // In the stream's order: the calls of the next layers are with kvd before their turn.
        t = now();
        for (uint32_t l = 0; l < LAYERS; l++) {
            step_items(items, ids, n, b, position, l, false);
            TRY(kvd_enqueue(client, stream, KVD_CALL_STEP, (kvd_layers){l, 1}, NULL, items, n,
                            ERR));
        }
        TRY(cudaStreamSynchronize(stream));
        ordered[r] = (now() - t) / LAYERS;
        TRY(kvd_enqueued(client, ERR));
        position++;
    }
    printf("on request, %u x %u: Step of a layer %.0f us, enqueued in the stream's order %.0f us; "
           "Attend of a layer %.0f us, Step of 36 layers %.0f us (medians)\n",
           n, length, median(step, ROUNDS * LAYERS), median(ordered, ROUNDS),
           median(attend, ROUNDS * LAYERS), median(all, ROUNDS));
    kvd_buffer_free(&b);
    cudaFree(memory);
    TRY(kvd_sequences_free(client, ids, n, false, ERR));
}

// -- capacity, bits, death ----------------------------------------------------------------------

static void capacity(uint32_t n, uint32_t length)
{
    uint64_t ids[256];
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    struct direct_step s = {.t = make_tensors(n)};
    double t0 = now();
    TRY(kvd_sequences_create(client, n, ids, ERR));
    append(ids, n, 0, length);
    double stored = now();
    TRY(kvd_sequence_describe(client, ids[0], &info, ERR));
    kvd_direct_options o = {.size = sizeof(o), .slots = n, .max_tokens = length + 64};
    TRY(kvd_direct_open(client, &o, &s.d, ERR));
    for (uint32_t i = 0; i < n; i++)
        TRY(kvd_direct_bind(s.d, i, ids[i], ERR));
    TRY(kvd_direct_begin(s.d, stream, ERR));
    cudaGraphExec_t graph = capture(enqueue_direct, &s);
    double us = replay(graph, 8);
    TRY(kvd_direct_end(s.d, stream, NULL, ERR));
    uint64_t bf16 = (uint64_t)length * LAYERS * KV * DIM * 2 * 2;
    uint16_t *o_host = malloc(s.t.q_layer);
    uint32_t zeros = 0;
    TRY(cudaMemcpy(o_host, s.t.o + (LAYERS - 1) * s.t.q_layer, s.t.q_layer, cudaMemcpyDefault));
    for (uint64_t i = 0; i < s.t.q_layer / 2; i++)
        zeros += (o_host[i] & 0x7f80) == 0x7f80 || o_host[i] == 0;
    printf("capacity: %u sequences of %u tokens resident (stored in %.1f s), all attended to: %.0f "
           "us a step of 36 layers; %.1f MiB a sequence, bf16 would be %.1f MiB: %.2f times; %u of "
           "%llu outputs zero or not finite\n",
           n, length, (stored - t0) * 1e-6, us, (double)info.bytes / (1 << 20),
           (double)bf16 / (1 << 20), (double)bf16 / (double)info.bytes, zeros,
           (unsigned long long)s.t.q_layer / 2);
    free(o_host);
    TRY(cudaGraphExecDestroy(graph));
    kvd_direct_close(&s.d);
    free_tensors(&s.t);
    TRY(kvd_sequences_free(client, ids, n, false, ERR));
}

static void bits(uint32_t length)
{
    uint64_t id;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    TRY(kvd_sequences_create(client, 1, &id, ERR));
    append(&id, 1, 0, length);
    TRY(kvd_sequence_describe(client, id, &info, ERR));
    printf("%u tokens: %.3f bits an element, windows, padding and metadata included\n", length,
           (double)info.bytes * 8 / ((double)length * LAYERS * KV * DIM * 2));
    TRY(kvd_sequences_free(client, &id, 1, false, ERR));
}

static uint64_t pool_used(struct kvd_channel *c)
{
    Kvd__V1__GetPoolRequest req = KVD__V1__GET_POOL_REQUEST__INIT;
    Kvd__V1__GetPoolReply *r;
    struct kvd_error err = {0};
    if (kvd_channel_call(c, "/kvd.v1.Admin/GetPool", &req, &kvd__v1__get_pool_reply__descriptor,
                         5000, &r, &err))
        exit(fprintf(stderr, "%s\n", err.text));
    uint64_t used = r->used_bytes;
    kvd__v1__get_pool_reply__free_unpacked(r, NULL);
    return used;
}

// A child fills memory and is killed; before CUDA is touched here, as it does not outlive a fork.
static void death(void)
{
    int ready[2];
    char byte;
    if (pipe(ready))
        exit(1);
    pid_t child = fork();
    if (child == 0) {
        uint64_t ids[16];
        double t0 = now();
        TRY(cudaStreamCreate(&stream));
        double context = now();
        open_client();
        TRY(kvd_sequences_create(client, 16, ids, ERR));
        append(ids, 1, 0, PIECE);
        kvd_item item = {.size = sizeof(item),
                         .sequence = ids[0],
                         .tokens = 1,
                         .q = {tokens},
                         .o = {tokens, .offset = KV_BYTES}};
        TRY(kvd_attend(client, (kvd_layers){0, 1}, NULL, &item, 1, ERR));
        printf(
            "from kvd_open to the first Attend's output, %d tokens of 36 layers stored meanwhile: "
            "%.1f ms\n",
            PIECE, (now() - opening) * 1e-3);
        append(ids + 1, 15, 0, PIECE);
        kvd_direct *d;
        kvd_direct_options o = {.size = sizeof(o), .slots = 16, .max_tokens = 4096};
        TRY(kvd_direct_open(client, &o, &d, ERR));
        for (uint32_t i = 0; i < 16; i++)
            TRY(kvd_direct_bind(d, i, ids[i], ERR));
        printf("a worker: CUDA context %.0f ms, then to 16 sequences bound %.0f ms\n",
               (context - t0) * 1e-3, (now() - context) * 1e-3);
        fflush(stdout);
        if (write(ready[1], "x", 1) != 1)
            exit(1);
        pause();
    }
    close(ready[1]); // so that the child's end is seen
    if (read(ready[0], &byte, 1) != 1)
        exit(1);
    struct kvd_error err = {0};
    struct kvd_channel *c =
        kvd_channel_new(&(struct kvd_channel_options){.address = address}, &err);
    uint64_t held = pool_used(c);
    double t0 = now();
    kill(child, SIGKILL);
    while (pool_used(c) && now() - t0 < 1e7)
        continue;
    double freed = now();
    waitpid(child, NULL, 0);
    printf("death of a worker that holds %.1f GiB: free after %.1f ms, the process gone after %.0f "
           "ms\n",
           (double)held / (1 << 30), (freed - t0) * 1e-3, (now() - t0) * 1e-3);
    kvd_channel_free(&c);
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[2] : "";
    struct cudaDeviceProp prop;
    if (argc < 2)
        return 2;
    address = argv[1];
    codec = argc > 3 ? argv[3] : NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    death();
    TRY(cudaGetDeviceProperties(&prop, 0));
    TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    printf("# %s; MPS: %s\n", prop.name, getenv("CUDA_MPS_PIPE_DIRECTORY") ? "yes" : "no");
    open_client();
    if (strcmp(what, "capacity") != 0) {
        bool quick = strcmp(what, "quick") == 0;
        direct_against_local(32, quick ? 1024 : 8192);
        on_request(32, quick ? 1024 : 8192);
    }
    if (strcmp(what, "quick") != 0) {
        bits(131072);
        capacity(256, 8192);
    }
    kvd_close(&client);
    return 0;
}
