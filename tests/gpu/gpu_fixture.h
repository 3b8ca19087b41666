// A sequence of tests/unit/kernel_fixture.h whose pages are on the GPU.
#ifndef KVD_TESTS_GPU_FIXTURE_H
#define KVD_TESTS_GPU_FIXTURE_H

#include <cuda_runtime_api.h>

#include "tests/unit/kernel_fixture.h"

static inline void need(int rc, const char *what)
{
    if (rc) {
        fprintf(stderr, "%s: %s\n", what, cudaGetErrorString((cudaError_t)rc));
        exit(1);
    }
}

// The backend's streams do not wait for the default one, on which these run, and CUDA returns
// before a small copy or a fill has arrived.
static inline void upload(void *to, const void *from, uint64_t bytes)
{
    need(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "upload");
    need(cudaDeviceSynchronize(), "waiting for an upload");
}

static inline void device_fill(void *at, int byte, uint64_t bytes)
{
    need(cudaMemset(at, byte, bytes), "fill");
    need(cudaDeviceSynchronize(), "waiting for a fill");
}

static inline uint64_t *device_pages(uint32_t n, uint64_t bytes)
{
    uint64_t *at = calloc(n ? n : 1, sizeof(*at));
    for (uint32_t i = 0; i < n; i++) {
        void *p;
        need(cudaMalloc(&p, bytes), "page");
        device_fill(p, 0xff, bytes);
        at[i] = (uint64_t)(uintptr_t)p;
    }
    return at;
}

static inline void to_device(struct kseq *s)
{
    s->at_bf16 = device_pages(s->n_bf16, kvd_page_bytes(&s->g, kvd_window_codec()));
    s->at_codec = device_pages(s->n_codec, kvd_page_bytes(&s->g, s->g.codec));
}

static inline void fetch_pages(struct kseq *s)
{
    uint64_t bf16 = kvd_page_bytes(&s->g, kvd_window_codec()),
             codec = kvd_page_bytes(&s->g, s->g.codec);
    for (uint32_t i = 0; i < s->n_bf16; i++)
        need(cudaMemcpy((void *)(uintptr_t)s->bf16[i], (void *)(uintptr_t)s->at_bf16[i], bf16,
                        cudaMemcpyDeviceToHost),
             "fetch");
    for (uint32_t i = 0; i < s->n_codec; i++)
        need(cudaMemcpy((void *)(uintptr_t)s->codec[i], (void *)(uintptr_t)s->at_codec[i], codec,
                        cudaMemcpyDeviceToHost),
             "fetch");
}

static inline void deinit(struct kseq *s)
{
    for (uint32_t i = 0; s->at_bf16 != s->bf16 && i < s->n_bf16; i++)
        cudaFree((void *)(uintptr_t)s->at_bf16[i]);
    for (uint32_t i = 0; s->at_codec != s->codec && i < s->n_codec; i++)
        cudaFree((void *)(uintptr_t)s->at_codec[i]);
    if (s->at_bf16 != s->bf16) {
        free(s->at_bf16);
        free(s->at_codec);
    }
    kseq_deinit(s);
}

// Appends `length` tokens in pieces of random size, and truncates now and then, also into history
// and to the middle of its chunks; the same for the same seed.
static inline struct kvd_rotation *grow(struct kseq *s, struct kvd_backend *b, uint32_t length,
                                        uint64_t seed)
{
    struct kvd_error err = {0};
    struct kvd_rotation *rot = b->ops->rotation_new(b, &s->rot, &err);
    if (!rot) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    while (s->length < length) {
        uint32_t n = (uint32_t)(kvd_rand(&seed) % 3 ? 1 + kvd_rand(&seed) % 200 : 1);
        kseq_append(s, b, rot, (uint32_t)KVD_MIN((uint64_t)n, length - s->length));
        if (kvd_rand(&seed) % 6 == 0)
            kseq_truncate(s, s->length - kvd_rand(&seed) % KVD_MIN(s->length, (uint64_t)250));
    }
    return rot;
}

#endif
