// Checksums of pages. On a stream of their own, of the least priority, as a scrubber is not to
// delay calls; whoever asks waits for it, one at a time.
#include "kernels/cuda/cuda.h"

enum { AT_ONCE = 1024 }; // pages of a launch

// Where pages and sums are, in pinned memory and in the device's.
enum { SUMS = AT_ONCE * sizeof(struct kvd_span), ALL = SUMS + AT_ONCE * sizeof(uint64_t) };

_Static_assert(sizeof(struct kvd_span) == sizeof(struct kvd_cuda_span), "both are the same");
_Static_assert((int)AT_ONCE <= (int)KVD_CUDA_SUMS, "more than a launch takes");

cudaError_t kvd_cuda_summing_init(struct kvd_cuda_summing *s)
{
    int least = 0, greatest = 0;
    if (pthread_mutex_init(&s->lock, NULL))
        return cudaErrorMemoryAllocation;
    s->begun = true;
    cudaError_t rc = cudaDeviceGetStreamPriorityRange(&least, &greatest);
    if (rc == cudaSuccess)
        rc = cudaStreamCreateWithPriority(&s->stream, cudaStreamNonBlocking, least);
    if (rc == cudaSuccess)
        rc = cudaMallocHost((void **)&s->host, ALL);
    if (rc == cudaSuccess)
        rc = cudaMalloc((void **)&s->device, ALL);
    return rc;
}

void kvd_cuda_summing_deinit(struct kvd_cuda_summing *s)
{
    cudaFreeHost(s->host);
    cudaFree(s->device);
    if (s->stream)
        cudaStreamDestroy(s->stream);
    if (s->begun)
        pthread_mutex_destroy(&s->lock);
}

static int sum_some(struct kvd_cuda_summing *s, const struct kvd_span *pages, uint32_t n,
                    uint64_t *out)
{
    uint8_t *host_sums = s->host + SUMS, *sums = s->device + SUMS;
    memcpy(s->host, pages, n * sizeof(*pages));
    int rc =
        cudaMemcpyAsync(s->device, s->host, n * sizeof(*pages), cudaMemcpyHostToDevice, s->stream);
    if (rc == 0)
        rc = kvd_cuda_sums((const void *)s->device, n, (void *)sums, s->stream);
    if (rc == 0)
        rc = cudaMemcpyAsync(host_sums, sums, n * sizeof(*out), cudaMemcpyDeviceToHost, s->stream);
    if (rc == 0)
        rc = cudaStreamSynchronize(s->stream);
    if (rc == 0)
        memcpy(out, host_sums, n * sizeof(*out));
    return rc;
}

int kvd_cuda_op_sums(struct kvd_backend *b, const struct kvd_span *pages, uint32_t n, uint64_t *out,
                     struct kvd_error *err)
{
    struct kvd_cuda *c = (struct kvd_cuda *)b;
    int rc = 0;
    cudaSetDevice(c->index);
    pthread_mutex_lock(&c->summing.lock);
    for (uint32_t i = 0; i < n && rc == 0; i += AT_ONCE)
        rc = sum_some(&c->summing, pages + i, KVD_MIN(n - i, AT_ONCE), out + i);
    pthread_mutex_unlock(&c->summing.lock);
    return kvd_cuda_status(rc, "checksums of pages", err);
}
