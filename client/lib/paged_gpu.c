// An engine's blocks in the GPU's memory: copies on the engine's stream, through GPU memory that is
// shared with kvd.
#include "client/lib/client.h"
#include "client/lib/paged.h"

#ifdef KVD_CUDA

#include "kernels/cuda/cuda.h"

static int on_gpu(kvd_client *c, const char *name, uint32_t layer, const void *at,
                  struct kvd_error *err)
{
    struct cudaPointerAttributes a;
    cudaError_t rc = cudaPointerGetAttributes(&a, at);
    if (rc == cudaSuccess && a.type == cudaMemoryTypeDevice) {
        int same = c ? kvd_gpu_same(c, at, a.device, err) : KVD_OK;
        return same ? kvd_fail_in(err, "%s[%u]", name, layer) : KVD_OK;
    }
    cudaGetLastError();
    return kvd_fail(err, KVD_E_INVALID,
                    "%s[%u]: at %p is no memory of the GPU; blocks of the host's memory are said "
                    "to be such by on_gpu = false",
                    name, layer, at);
}

int kvd_paged_gpu_check(kvd_client *c, const kvd_paged *p, const struct kvd_page_shape *shape,
                        struct kvd_error *err)
{
    int rc = kvd_client_enter(c, kvd_client_deadline(c), err);
    if (rc)
        return rc;
    // Of a kvd that has gone nothing counts: the next one is asked when memory is registered.
    kvd_client *known = !c->lost && !kvd_client_hung_up(c, 0) ? c : NULL;
    for (uint32_t i = 0; i < shape->layers && rc == KVD_OK; i++) {
        rc = on_gpu(known, "k", i, p->k[i], err);
        rc = rc ? rc : on_gpu(known, "k", i, (const uint8_t *)p->k[i] + p->k_bytes - 1, err);
        rc = rc ? rc : on_gpu(known, "v", i, p->v[i], err);
        rc = rc ? rc : on_gpu(known, "v", i, (const uint8_t *)p->v[i] + p->v_bytes - 1, err);
    }
    kvd_gate_leave(&c->gate);
    return rc;
}

kvd_result kvd_gpu_staging_new(kvd_client *c, uint64_t bytes, kvd_buffer **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    void *data = NULL;
    if (kvd_cuda_status((int)cudaMalloc(&data, bytes), "memory to stage pages in", &e))
        return kvd_client_fail(err, &e);
    kvd_result rc = kvd_buffer_cuda(c, data, bytes, out, err);
    if (rc)
        cudaFree(data);
    else
        (*out)->owned = true;
    return rc;
}

void kvd_gpu_staging_free(void *data)
{
    cudaFree(data);
    cudaGetLastError();
}

// Tables of a copy: where layers begin, then the blocks. In front of it those of copies before it
// on the stream have been read.
static int bring_tables(const kvd_paged *p, const struct kvd_page_shape *shape, bool v,
                        const uint32_t *blocks, uint64_t n, uint8_t *to, struct kvd_error *err)
{
    const uint64_t bases = shape->layers * sizeof(void *);
    cudaError_t rc = cudaMemcpyAsync(to, v ? p->v : p->k, bases, cudaMemcpyHostToDevice, p->stream);
    if (rc == cudaSuccess)
        rc = cudaMemcpyAsync(to + bases, blocks, n * sizeof(*blocks), cudaMemcpyHostToDevice,
                             p->stream);
    return kvd_cuda_status((int)rc, "the tables of a copy of pages", err);
}

int kvd_paged_gpu_copy(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t page,
                       uint32_t n, const struct kvd_dense_pages *staged, uint32_t at, bool out,
                       struct kvd_error *err)
{
    const uint64_t first = p->first_token + (uint64_t)page * KVD_PAGE_TOKENS;
    const uint32_t *blocks = p->blocks + first / p->block_tokens;
    struct kvd_cuda_paged_params params = {.block_tokens = p->block_tokens,
                                           .first_token = (uint32_t)(first % p->block_tokens),
                                           .n_layers = shape->layers,
                                           .tokens = n * KVD_PAGE_TOKENS,
                                           .heads = shape->heads,
                                           .out = out};
    const uint64_t used = kvd_div_up((uint64_t)params.first_token + params.tokens, p->block_tokens);
    int rc = KVD_OK;
    for (int v = 0; v < 2 && rc == KVD_OK; v++) {
        const kvd_strides *s = v ? &p->v_strides : &p->k_strides;
        const uint64_t token = (uint64_t)shape->heads * shape->dims[v] * 2;
        params.aligned = 0;
        for (uint32_t i = 0; i < shape->layers; i++)
            params.aligned |= (uintptr_t)(v ? p->v : p->k)[i];
        params.layers = (void *)staged->tables;
        params.blocks = (void *)(staged->tables + shape->layers * sizeof(void *));
        params.block_stride = s->block;
        params.head_stride = s->head;
        params.token_stride = s->token;
        params.dim_stride = s->dim;
        params.dim = shape->dims[v];
        params.dense = staged->side[v] + (uint64_t)at * KVD_PAGE_TOKENS * token;
        params.dense_layer_stride = staged->tokens * token;
        rc = bring_tables(p, shape, v, blocks, used, staged->tables, err);
        if (rc == KVD_OK)
            rc = kvd_cuda_status(kvd_cuda_paged(&params, p->stream), "a copy of pages", err);
    }
    return rc;
}

int kvd_paged_gpu_wait(const kvd_paged *p, struct kvd_error *err)
{
    return kvd_cuda_status((int)cudaStreamSynchronize(p->stream), "copies of pages", err);
}

int kvd_gpu_mark(const kvd_paged *p, struct kvd_gpu_mark *out, struct kvd_error *err)
{
    cudaEvent_t event = NULL;
    int device = 0;
    cudaError_t rc = cudaGetDevice(&device);
    if (rc == cudaSuccess)
        rc = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (rc == cudaSuccess)
        rc = cudaEventRecord(event, p->stream);
    *out = (struct kvd_gpu_mark){event, device};
    if (rc != cudaSuccess)
        kvd_gpu_mark_free(out);
    return kvd_cuda_status((int)rc, "an event behind which pages are copied", err);
}

int kvd_gpu_follow(const struct kvd_gpu_mark *mark, void **stream, struct kvd_error *err)
{
    cudaStream_t s = *stream;
    cudaError_t rc = cudaSetDevice(mark->device);
    if (rc == cudaSuccess && !s)
        rc = cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    *stream = s;
    if (rc == cudaSuccess)
        rc = cudaStreamWaitEvent(s, mark->event, 0);
    return kvd_cuda_status((int)rc, "waiting for what is on the engine's stream", err);
}

void kvd_gpu_mark_free(struct kvd_gpu_mark *mark)
{
    if (mark->event)
        cudaEventDestroy(KVD_TAKE(mark->event));
    cudaGetLastError();
}

void kvd_gpu_stream_free(void **stream)
{
    if (*stream)
        cudaStreamDestroy(KVD_TAKE(*stream));
    cudaGetLastError();
}

#else

static int without(struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
}

int kvd_paged_gpu_check(kvd_client *c, const kvd_paged *p, const struct kvd_page_shape *shape,
                        struct kvd_error *err)
{
    (void)c;
    (void)p;
    (void)shape;
    return without(err);
}

kvd_result kvd_gpu_staging_new(kvd_client *c, uint64_t bytes, kvd_buffer **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    (void)c;
    (void)bytes;
    (void)out;
    without(&e);
    return kvd_client_fail(err, &e);
}

void kvd_gpu_staging_free(void *data)
{
    (void)data;
}

int kvd_paged_gpu_copy(const kvd_paged *p, const struct kvd_page_shape *shape, uint32_t page,
                       uint32_t n, const struct kvd_dense_pages *staged, uint32_t at, bool out,
                       struct kvd_error *err)
{
    (void)p;
    (void)shape;
    (void)page;
    (void)n;
    (void)staged;
    (void)at;
    (void)out;
    return without(err);
}

int kvd_paged_gpu_wait(const kvd_paged *p, struct kvd_error *err)
{
    (void)p;
    return without(err);
}

int kvd_gpu_mark(const kvd_paged *p, struct kvd_gpu_mark *out, struct kvd_error *err)
{
    (void)p;
    (void)out;
    return without(err);
}

int kvd_gpu_follow(const struct kvd_gpu_mark *mark, void **stream, struct kvd_error *err)
{
    (void)mark;
    (void)stream;
    return without(err);
}

void kvd_gpu_mark_free(struct kvd_gpu_mark *mark)
{
    (void)mark;
}

void kvd_gpu_stream_free(void **stream)
{
    (void)stream;
}

#endif
