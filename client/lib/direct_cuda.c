// Direct mode on a GPU: kernels on the worker's stream, tables in device memory.
//
// Kernels find lengths and page tables at fixed addresses, so that a captured graph stays good; a
// step brings the new ones from pinned memory, in the stream's order. A few copies of that memory
// take turns, so that the host does not wait for the GPU. There is one plane.
#include "client/lib/direct.h"
#include "kernels/cuda/cuda.h"

enum {
    STAGES = 4,
    SCRATCH_LEAST = 32 << 20,
};

struct cuda_side {
    uint8_t *device, *pinned[STAGES]; // lengths, then the tables of codec and bf16 pages
    uint64_t codec_at, bf16_at, bytes;
    uint8_t *tail, *scratch;
    uint64_t scratch_bytes;
    uint32_t stage;
    cudaEvent_t staged[STAGES], marks[KVD_DIRECT_MARKS];
    struct kvd_cuda_attend_params params;
};

static struct direct_plane *only_plane(struct kvd_direct *d)
{
    return &d->planes[0];
}

static struct cuda_side *side_of(struct kvd_direct *d)
{
    return d->side;
}

static const struct kvd_cuda *backend_of(const struct kvd_direct *d)
{
    return (const struct kvd_cuda *)d->backend;
}

// Plans the step. What a graph was captured with stays right when this changes.
static void plan(struct kvd_direct *d, uint64_t sum, uint32_t longest, uint32_t window)
{
    struct cuda_side *side = d->side;
    struct kvd_cuda_attend_params *p = &side->params;
    kvd_cuda_attend_plan(p, sum, longest, window, backend_of(d)->multiprocessors);
    // Room for the parts was made once; fewer parts always fit.
    while (side->scratch && kvd_cuda_attend_scratch(p) > side->scratch_bytes && p->splits > 1) {
        p->splits = (p->splits + 1) / 2;
        p->part_tiles = (longest / KVD_PAGE_TOKENS + p->splits) / p->splits;
    }
}

static void set_params(struct kvd_direct *d)
{
    struct cuda_side *side = d->side;
    const struct direct_plane *plane = only_plane(d);
    const struct kvd_plane *g = &plane->shape;
    enum kvd_dtype type = d->options.dtype == KVD_F32 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16;
    uint32_t *lengths = (uint32_t *)(void *)side->device, n = d->options.slots;
    side->params = (struct kvd_cuda_attend_params){
        .sequences = n,
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
        .pages = {.codec = (uint64_t *)(void *)(side->device + side->codec_at),
                  .bf16 = (uint64_t *)(void *)(side->device + side->bf16_at),
                  .codec_stride = plane->codec_stride,
                  .bf16_stride = plane->bf16_stride,
                  .length = lengths,
                  .hist_end = lengths + n},
        .tail = {.tokens = lengths + 2 * n, .ring = d->ring},
        .settled = true, // a step's copies are in front of its first kernel
        .rotation = plane->rotation->device,
    };
}

static int make_memory(struct kvd_direct *d)
{
    struct cuda_side *side = d->side;
    const struct direct_plane *plane = only_plane(d);
    uint64_t n = d->options.slots;
    uint64_t tail = direct_layer_at(d, d->n_layers, true);
    side->codec_at = kvd_round_up(3 * n * sizeof(uint32_t), 256);
    side->bf16_at = side->codec_at + n * plane->codec_stride * sizeof(uint64_t);
    side->bytes = side->bf16_at + n * plane->bf16_stride * sizeof(uint64_t);
    int rc = cudaMalloc((void **)&side->device, side->bytes);
    for (int i = 0; i < STAGES && rc == 0; i++) {
        rc = cudaMallocHost((void **)&side->pinned[i], side->bytes);
        if (rc == 0)
            rc = cudaEventCreateWithFlags(&side->staged[i], cudaEventDisableTiming);
    }
    for (int i = 0; i < KVD_DIRECT_MARKS && rc == 0; i++)
        rc = cudaEventCreateWithFlags(&side->marks[i],
                                      cudaEventDisableTiming | cudaEventBlockingSync);
    if (rc == 0)
        rc = cudaMalloc((void **)&side->tail, tail);
    if (rc == 0)
        rc = cudaMemset(side->tail, 0, tail); // what empty slots hold must be finite
    if (rc == 0)
        rc = cudaMemset(side->device, 0, side->bytes);
    if (rc)
        return rc;
    set_params(d);
    uint32_t window = plane->bf16_stride * KVD_PAGE_TOKENS + d->ring;
    plan(d, n * d->options.max_tokens, d->options.max_tokens, window);
    side->scratch_bytes = KVD_MAX(kvd_cuda_attend_scratch(&side->params), (uint64_t)SCRATCH_LEAST);
    rc = cudaMalloc((void **)&side->scratch, side->scratch_bytes);
    if (rc == 0)
        rc = cudaMemset(side->scratch, 0, side->scratch_bytes);
    side->params.scratch = side->scratch;
    return rc ? rc : (int)cudaDeviceSynchronize();
}

static int cuda_init(struct kvd_direct *d, struct kvd_error *err)
{
    kvd_failure failure;
    d->side = calloc(1, sizeof(struct cuda_side));
    if (!d->side)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    int rc = kvd_cuda_status(make_memory(d), "making room for direct mode", err);
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

// Copies what a slot's tables have in use to the kernels.
static int update_tables(struct kvd_direct *d, uint32_t slot, cudaStream_t stream)
{
    struct cuda_side *side = d->side;
    const struct direct_plane *plane = only_plane(d);
    uint64_t codec = side->codec_at + (uint64_t)slot * plane->codec_stride * sizeof(uint64_t);
    uint64_t bf16 = side->bf16_at + (uint64_t)slot * plane->bf16_stride * sizeof(uint64_t);
    uint64_t codec_bytes = d->slots[slot].now.planes[0].n_codec * sizeof(uint64_t);
    uint64_t bf16_bytes = plane->bf16_stride * sizeof(uint64_t);
    uint8_t *from = side->pinned[side->stage];
    memcpy(from + codec, plane->codec + (uint64_t)slot * plane->codec_stride, codec_bytes);
    memcpy(from + bf16, plane->bf16 + (uint64_t)slot * plane->bf16_stride, bf16_bytes);
    int rc = 0;
    if (codec_bytes)
        rc = cudaMemcpyAsync(side->device + codec, from + codec, codec_bytes,
                             cudaMemcpyHostToDevice, stream);
    return rc ? rc
              : (int)cudaMemcpyAsync(side->device + bf16, from + bf16, bf16_bytes,
                                     cudaMemcpyHostToDevice, stream);
}

static int cuda_update(struct kvd_direct *d, void *stream, struct kvd_error *err)
{
    struct cuda_side *side = d->side;
    const struct direct_plane *plane = only_plane(d);
    uint32_t n = d->options.slots, longest = 0, window = 0;
    uint64_t sum = 0;
    side->stage = (side->stage + 1) % STAGES;
    int rc = cudaEventSynchronize(side->staged[side->stage]);
    memcpy(side->pinned[side->stage], d->length, 3 * n * sizeof(*d->length));
    if (rc == 0)
        rc = cudaMemcpyAsync(side->device, side->pinned[side->stage], 3 * n * sizeof(*d->length),
                             cudaMemcpyHostToDevice, stream);
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        uint32_t history = plane->hist_end[i] - plane->shape.sink;
        sum += history;
        longest = KVD_MAX(longest, history);
        window = KVD_MAX(window, d->length[i] + d->tail_tokens[i] - KVD_MIN(history, d->length[i]));
        if (!d->slots[i].dirty)
            continue;
        rc = update_tables(d, i, stream);
        d->slots[i].dirty = false;
    }
    if (rc == 0)
        rc = cudaEventRecord(side->staged[side->stage], stream);
    plan(d, sum, longest, window);
    return kvd_cuda_status(rc, "starting a step", err);
}

// The tail of a layer.
static struct kvd_cuda_tail layer_tail(struct kvd_direct *d, uint32_t layer)
{
    struct cuda_side *side = d->side;
    struct kvd_cuda_tail tail = side->params.tail;
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
                                      .length = side_of(d)->params.pages.length,
                                      .tail = layer_tail(d, layer)};
    return kvd_cuda_status(kvd_cuda_store(&p, stream), "storing a step's tokens", err);
}

static int cuda_attend(struct kvd_direct *d, void *stream, uint32_t layer, const void *q, void *o,
                       float *lse, struct kvd_error *err)
{
    struct kvd_cuda_attend_params p = side_of(d)->params;
    p.layer = layer;
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
                                           .update = cuda_update,
                                           .store = cuda_store,
                                           .attend = cuda_attend,
                                           .mark = cuda_mark,
                                           .passed = cuda_passed,
                                           .wait = cuda_wait};
