// Direct mode on a GPU: kernels on the worker's stream, tables in device memory.
//
// Kernels find lengths and page tables at fixed addresses, so that a captured graph stays good; a
// step brings the new ones from pinned memory, in the stream's order. A few copies of that memory
// take turns, so that the host does not wait for the GPU. Each plane has its own tables and its own
// plan; as kernels run one after the other, all share one scratch.
#include "client/lib/direct.h"
#include "kernels/cuda/cuda.h"

enum {
    STAGES = 4,
    NEAR = 1024, // addresses, that take no longer than a copy of their own would
    SCRATCH_LEAST = 32 << 20,
    SCRATCH_LEAST_OF_LATENTS = 128 << 20, // as their partial results are longer
};

struct cuda_plane {
    uint64_t codec_at, bf16_at; // where the tables of its pages begin
    struct kvd_cuda_attend_params params;
};

struct cuda_side {
    uint8_t *device, *pinned[STAGES]; // numbers of slots, then the planes' tables
    uint64_t bytes;
    uint8_t *tail;
    float *sinks; // as the client's; NULL: none
    // Counters of any plane, zero between calls, end where its partial results begin, which is the
    // same place for all: so one's results never lie where another's counters are.
    uint8_t *scratch;
    uint64_t counters_bytes, results_bytes;
    uint32_t stage;
    cudaEvent_t staged[STAGES], marks[KVD_DIRECT_MARKS];
    struct cuda_plane planes[KVD_MAX_PLANES];
};

static struct cuda_side *side_of(struct kvd_direct *d)
{
    return d->side;
}

static const struct kvd_cuda *backend_of(const struct kvd_direct *d)
{
    return (const struct kvd_cuda *)d->backend;
}

static uint64_t numbers_bytes(const struct kvd_direct *d)
{
    return (uint64_t)kvd_direct_numbers(d) * sizeof(*d->length);
}

static uint64_t results_bytes(const struct kvd_cuda_attend_params *p)
{
    return kvd_cuda_attend_scratch(p) - p->scratch_zeroed;
}

// Plans a plane's share of the step. What a graph was captured with stays right when this changes.
static void plan(struct kvd_direct *d, uint32_t plane, uint64_t sum, uint32_t longest,
                 uint32_t window)
{
    struct cuda_side *side = d->side;
    struct kvd_cuda_attend_params *p = &side->planes[plane].params;
    kvd_cuda_attend_plan(p, sum, longest, window, backend_of(d)->multiprocessors);
    // Room for the parts was made once; fewer parts always fit.
    while (side->scratch && results_bytes(p) > side->results_bytes && p->splits > 1) {
        p->shares = 0;
        p->splits = (p->splits + 1) / 2;
        p->part_tiles = (longest / KVD_PAGE_TOKENS + p->splits) / p->splits;
    }
}

static void set_params(struct kvd_direct *d, uint32_t index)
{
    struct cuda_side *side = d->side;
    struct cuda_plane *own = &side->planes[index];
    const struct direct_plane *plane = &d->planes[index];
    const struct kvd_plane *g = &plane->shape;
    enum kvd_dtype type = d->options.dtype == KVD_F32 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16;
    const uint32_t *numbers = (uint32_t *)(void *)side->device; // where d->length is copied to
    own->params = (struct kvd_cuda_attend_params){
        .sequences = d->options.slots,
        .q_heads = g->q_heads,
        .kv_heads = g->kv_heads,
        .dim_k = g->head_dim_k,
        .dim_v = g->head_dim_v,
        .codec = g->codec.k,
        .codec_v = g->codec.v,
        .q_len = d->options.step_tokens,
        .sink = g->sink,
        .ring = kvd_plane_ring(g),
        .scale = direct_scale(d),
        .softcap = d->attention.softcap,
        .window = plane->window,
        .q_type = type,
        .o_type = type,
        .pages = {.codec = (uint64_t *)(void *)(side->device + own->codec_at),
                  .bf16 = (uint64_t *)(void *)(side->device + own->bf16_at),
                  .codec_stride = plane->codec_stride,
                  .bf16_stride = plane->bf16_stride,
                  .length = numbers,
                  .hist_end = numbers + (plane->hist_end - d->length)},
        .tail = {.tokens = numbers + (d->tail_tokens - d->length), .ring = d->ring},
        .settled = true, // a step's copies are in front of its first kernel
        .rotation = plane->rotation->device,
    };
}

// Where everything is that a step brings.
static void lay_out(struct kvd_direct *d)
{
    struct cuda_side *side = d->side;
    uint64_t n = d->options.slots;
    side->bytes = kvd_round_up(numbers_bytes(d), 256);
    for (uint32_t p = 0; p < d->n_planes; p++) {
        side->planes[p].codec_at = side->bytes;
        side->planes[p].bf16_at = side->bytes + n * d->planes[p].codec_stride * sizeof(uint64_t);
        side->bytes = side->planes[p].bf16_at + n * d->planes[p].bf16_stride * sizeof(uint64_t);
    }
}

static int make_events(struct cuda_side *side)
{
    int rc = 0;
    for (int i = 0; i < STAGES && rc == 0; i++)
        rc = cudaEventCreateWithFlags(&side->staged[i], cudaEventDisableTiming);
    for (int i = 0; i < KVD_DIRECT_MARKS && rc == 0; i++)
        rc = cudaEventCreateWithFlags(&side->marks[i],
                                      cudaEventDisableTiming | cudaEventBlockingSync);
    return rc;
}

static int make_sinks(struct kvd_direct *d)
{
    struct cuda_side *side = d->side;
    uint64_t bytes = d->client->n_sinks * sizeof(*side->sinks);
    if (bytes == 0)
        return 0;
    int rc = cudaMalloc((void **)&side->sinks, bytes);
    return rc ? rc : (int)cudaMemcpy(side->sinks, d->client->sinks, bytes, cudaMemcpyHostToDevice);
}

// For slots that are all as long as they may be.
static int make_scratch(struct kvd_direct *d)
{
    struct cuda_side *side = d->side;
    uint64_t n = d->options.slots;
    side->results_bytes = direct_shape(d)->latent ? SCRATCH_LEAST_OF_LATENTS : SCRATCH_LEAST;
    for (uint32_t i = 0; i < d->n_planes; i++) {
        struct kvd_cuda_attend_params *p = &side->planes[i].params;
        uint32_t window = d->planes[i].bf16_stride * KVD_PAGE_TOKENS + d->ring;
        set_params(d, i);
        plan(d, i, n * d->options.max_tokens, d->options.max_tokens, window);
        side->counters_bytes = KVD_MAX(side->counters_bytes, p->scratch_zeroed);
        side->results_bytes = KVD_MAX(side->results_bytes, results_bytes(p));
    }
    uint64_t bytes = side->counters_bytes + side->results_bytes;
    int rc = cudaMalloc((void **)&side->scratch, bytes);
    if (rc == 0)
        rc = cudaMemset(side->scratch, 0, bytes);
    for (uint32_t i = 0; i < d->n_planes && rc == 0; i++) {
        struct kvd_cuda_attend_params *p = &side->planes[i].params;
        p->scratch = side->scratch + side->counters_bytes - p->scratch_zeroed;
    }
    return rc;
}

static int make_memory(struct kvd_direct *d)
{
    struct cuda_side *side = d->side;
    uint64_t tail = direct_layer_at(d, d->n_layers, true);
    lay_out(d);
    int rc = cudaMalloc((void **)&side->device, side->bytes);
    for (int i = 0; i < STAGES && rc == 0; i++)
        rc = cudaMallocHost((void **)&side->pinned[i], side->bytes);
    if (rc == 0)
        rc = make_events(side);
    if (rc == 0)
        rc = cudaMalloc((void **)&side->tail, tail);
    if (rc == 0)
        rc = cudaMemset(side->tail, 0, tail); // what empty slots hold must be finite
    if (rc == 0)
        rc = cudaMemset(side->device, 0, side->bytes);
    if (rc == 0)
        rc = make_sinks(d);
    if (rc == 0)
        rc = make_scratch(d);
    return rc ? rc : (int)cudaDeviceSynchronize();
}

// Whether there are kernels for what each plane has.
static int check_planes(const struct kvd_direct *d, struct kvd_error *err)
{
    int rc = KVD_OK;
    for (uint32_t p = 0; p < d->n_planes && rc == KVD_OK; p++) {
        const struct direct_plane *plane = &d->planes[p];
        rc = d->backend->ops->plane_check(d->backend, &plane->shape, err);
        if (rc == KVD_OK)
            rc = kvd_cuda_rotation_check(plane->rotation, plane->shape.codec, err);
    }
    return rc;
}

static int cuda_init(struct kvd_direct *d, struct kvd_error *err)
{
    kvd_failure failure;
    d->side = calloc(1, sizeof(struct cuda_side));
    if (!d->side)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    int rc = check_planes(d, err);
    if (rc == KVD_OK)
        rc = kvd_cuda_status(make_memory(d), "making room for direct mode", err);
    if (rc)
        return rc;
    if (kvd_buffer_cuda(d->client, side_of(d)->tail, direct_layer_at(d, d->n_layers, true),
                        &d->tail, &failure))
        return kvd_client_failed(&failure, err);
    return KVD_OK;
}

static void cuda_deinit(struct kvd_direct *d)
{
    struct cuda_side *side = KVD_TAKE(d->side);
    cudaDeviceSynchronize();
    kvd_buffer_take(&d->tail, d->close_by, true); // before its memory goes
    cudaFree(side->device);
    cudaFree(side->tail);
    cudaFree(side->sinks);
    cudaFree(side->scratch);
    for (int i = 0; i < STAGES; i++) {
        cudaFreeHost(side->pinned[i]);
        if (side->staged[i])
            cudaEventDestroy(side->staged[i]);
    }
    for (int i = 0; i < KVD_DIRECT_MARKS; i++)
        if (side->marks[i])
            cudaEventDestroy(side->marks[i]);
    cudaGetLastError();
    free(side);
}

static void cuda_forget(struct kvd_direct *d)
{
    (void)d; // CUDA does not work in a child
}

// Of a table's addresses, as they are for all slots.
struct span {
    uint64_t begin, end; // end 0: empty
};

// Copies a span of the table at `at` on its way to the kernels, and empties it.
static int send(struct cuda_side *side, uint64_t at, const uint64_t *table, struct span *s,
                cudaStream_t stream)
{
    uint64_t bytes = (s->end - s->begin) * sizeof(*table);
    uint64_t offset = at + s->begin * sizeof(*table);
    if (bytes == 0)
        return 0;
    memcpy(side->pinned[side->stage] + offset, table + s->begin, bytes);
    *s = (struct span){0};
    return cudaMemcpyAsync(side->device + offset, side->pinned[side->stage] + offset, bytes,
                           cudaMemcpyHostToDevice, stream);
}

// What dirty slots have in use of a plane's table of codec pages, or of bf16 pages. Each copy holds
// the stream up for some us, in which NEAR addresses pass: so what is between goes with them.
static int update_table(struct kvd_direct *d, uint32_t index, bool bf16, cudaStream_t stream)
{
    struct cuda_side *side = d->side;
    const struct direct_plane *plane = &d->planes[index];
    uint64_t stride = bf16 ? plane->bf16_stride : plane->codec_stride;
    uint64_t at = bf16 ? side->planes[index].bf16_at : side->planes[index].codec_at;
    const uint64_t *table = bf16 ? plane->bf16 : plane->codec;
    struct span s = {0};
    int rc = 0;
    for (uint32_t i = 0; i < d->options.slots && rc == 0; i++) {
        uint64_t begin = i * stride, n = bf16 ? stride : d->slots[i].now.planes[index].n_codec;
        if (!d->slots[i].dirty || n == 0)
            continue;
        if (begin > s.end + NEAR)
            rc = send(side, at, table, &s, stream);
        s.begin = s.end ? s.begin : begin;
        s.end = begin + n;
    }
    return rc ? rc : send(side, at, table, &s, stream);
}

static int update_tables(struct kvd_direct *d, cudaStream_t stream)
{
    int rc = 0;
    for (uint32_t i = 0; i < d->n_planes && rc == 0; i++) {
        rc = update_table(d, i, false, stream);
        if (rc == 0)
            rc = update_table(d, i, true, stream);
    }
    for (uint32_t i = 0; i < d->options.slots; i++)
        d->slots[i].dirty &= rc != 0;
    return rc;
}

static void plan_step(struct kvd_direct *d, uint32_t index)
{
    const struct direct_plane *plane = &d->planes[index];
    uint32_t longest = 0, window = 0;
    uint64_t sum = 0;
    for (uint32_t i = 0; i < d->options.slots; i++) {
        uint32_t history = plane->hist_end[i] - plane->shape.sink;
        sum += history;
        longest = KVD_MAX(longest, history);
        window = KVD_MAX(window, d->length[i] + d->tail_tokens[i] - KVD_MIN(history, d->length[i]));
    }
    plan(d, index, sum, longest, window);
}

static uint32_t next_stage(const struct cuda_side *side)
{
    return (side->stage + 1) % STAGES;
}

static int cuda_ready(struct kvd_direct *d, struct kvd_error *err)
{
    const struct cuda_side *side = d->side;
    return kvd_cuda_status(cudaEventSynchronize(side->staged[next_stage(side)]), "an earlier step",
                           err);
}

static int cuda_update(struct kvd_direct *d, void *stream, struct kvd_error *err)
{
    struct cuda_side *side = d->side;
    side->stage = next_stage(side); // which `ready` has waited for
    memcpy(side->pinned[side->stage], d->length, numbers_bytes(d));
    int rc = cudaMemcpyAsync(side->device, side->pinned[side->stage], numbers_bytes(d),
                             cudaMemcpyHostToDevice, stream);
    if (rc == 0)
        rc = update_tables(d, stream);
    if (rc == 0)
        rc = cudaEventRecord(side->staged[side->stage], stream);
    for (uint32_t p = 0; p < d->n_planes; p++)
        plan_step(d, p);
    return kvd_cuda_status(rc, "starting a step", err);
}

// The tail of a layer.
static struct kvd_cuda_tail layer_tail(struct kvd_direct *d, uint32_t layer)
{
    struct cuda_side *side = d->side;
    struct kvd_cuda_tail tail = side->planes[0].params.tail; // of slots, so of any plane
    tail.k = (uint16_t *)(void *)(side->tail + direct_layer_at(d, layer, false));
    tail.v = (uint16_t *)(void *)(side->tail + direct_layer_at(d, layer, true));
    return tail;
}

static int cuda_store(struct kvd_direct *d, void *stream, uint32_t layer, const void *k,
                      const void *v, struct kvd_error *err)
{
    const struct kvd_plane *g = direct_shape(d);
    struct kvd_cuda_store_params p = {.sequences = d->options.slots,
                                      .kv_heads = g->kv_heads,
                                      .dim_k = g->head_dim_k,
                                      .dim_v = g->head_dim_v,
                                      .q_len = d->options.step_tokens,
                                      .k = k,
                                      .v = v,
                                      .length = side_of(d)->planes[0].params.pages.length,
                                      .tail = layer_tail(d, layer)};
    return kvd_cuda_status(kvd_cuda_store(&p, stream), "storing a step's tokens", err);
}

static int cuda_attend(struct kvd_direct *d, void *stream, uint32_t layer, const void *q, void *o,
                       float *lse, struct kvd_error *err)
{
    const struct cuda_side *side = d->side;
    struct kvd_cuda_attend_params p = side->planes[d->layers[layer].plane].params;
    p.layer = d->layers[layer].at;
    p.sinks = side->sinks ? side->sinks + (uint64_t)layer * p.q_heads : NULL;
    p.q = q;
    p.o = o;
    p.lse = lse;
    p.tail = layer_tail(d, layer);
    return kvd_cuda_status(kvd_cuda_attend(&p, stream), "attention", err);
}

static int cuda_mark(struct kvd_direct *d, void *stream, uint32_t mark, struct kvd_error *err)
{
    return kvd_cuda_status(cudaEventRecord(side_of(d)->marks[mark], stream), "marking the stream",
                           err);
}

static bool cuda_passed(struct kvd_direct *d, uint32_t mark)
{
    return cudaEventQuery(side_of(d)->marks[mark]) != cudaErrorNotReady;
}

static int cuda_wait(struct kvd_direct *d, uint32_t mark, struct kvd_error *err)
{
    cudaSetDevice(backend_of(d)->index); // the thread's own
    return kvd_cuda_status(cudaEventSynchronize(side_of(d)->marks[mark]), "a step", err);
}

const struct direct_ops kvd_direct_cuda = {.init = cuda_init,
                                           .deinit = cuda_deinit,
                                           .forget = cuda_forget,
                                           .ready = cuda_ready,
                                           .update = cuda_update,
                                           .store = cuda_store,
                                           .attend = cuda_attend,
                                           .mark = cuda_mark,
                                           .passed = cuda_passed,
                                           .wait = cuda_wait};
