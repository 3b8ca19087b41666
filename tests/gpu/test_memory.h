// Extents of the CUDA backend: made, zeroed, exported, imported, given up. Part of test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_MEMORY_H
#define KVD_TESTS_GPU_TEST_MEMORY_H

static void memory(void)
{
    uint64_t bytes = 4 << 20;
    struct kvd_error err = {0};
    const struct kvd_backend_ops *ops = cuda->ops;
    struct kvd_arena *arena = ops->arena_new(cuda, 2, bytes, &err);
    result(arena && ops->extent_make(cuda, arena, 1, &err) == 0, "extent_make");
    uint64_t at = arena->base + bytes;
    unsigned long long *sum, first = 0, second = 0;
    need(cudaMalloc((void **)&sum, 8), "sum");
    need(kvd_cuda_checksum((void *)(uintptr_t)at, bytes, sum, NULL), "checksum");
    cudaMemcpy(&first, sum, 8, cudaMemcpyDeviceToHost);
    result(first == 0, "new memory is zero");
    uint32_t words[2] = {5, 7};
    cudaMemcpy((void *)(uintptr_t)(at + 4096), words, 8, cudaMemcpyHostToDevice);
    kvd_cuda_checksum((void *)(uintptr_t)at, bytes, sum, NULL);
    cudaMemcpy(&first, sum, 8, cudaMemcpyDeviceToHost);
    uint32_t swapped[2] = {7, 5};
    cudaMemcpy((void *)(uintptr_t)(at + 4096), swapped, 8, cudaMemcpyHostToDevice);
    kvd_cuda_checksum((void *)(uintptr_t)at, bytes, sum, NULL);
    cudaMemcpy(&second, sum, 8, cudaMemcpyDeviceToHost);
    result(first == 5 * 2049 + 7 * 2051 && first != second, "checksum");
    struct kvd_copy copies[2] = {{at, at + 4096, 4096}};
    uint8_t *host = aligned_alloc(4096, 8192);
    copies[1] = (struct kvd_copy){(uintptr_t)host + 4096, at + 4096, 4096};
    result(ops->host_pin(cuda, host, 8192, &err) == 0, "host memory is pinned");
    result(ops->copy(cuda, copies, 2, NULL) == 0, "copy");
    uint32_t got = 0;
    memcpy(&got, host + 4096, 4);
    result(got == 7, "copied to the host");
    ops->host_unpin(host);
    ops->host_unpin(host); // does nothing
    free(host);
    cudaMemcpy(&got, (void *)(uintptr_t)at, 4, cudaMemcpyDeviceToHost);
    result(got == 7, "copied");
    result(ops->extent_zero(cuda, arena, 1, &err) == 0, "extent_zero");
    kvd_cuda_checksum((void *)(uintptr_t)at, bytes, sum, NULL);
    cudaMemcpy(&second, sum, 8, cudaMemcpyDeviceToHost);
    result(second == 0, "zeroed memory is zero");
    // An export keeps the memory alive beside what takes its place.
    int fd = -1;
    struct kvd_arena *other = ops->arena_new(cuda, 2, bytes, &err);
    cudaMemcpy((void *)(uintptr_t)at, words, 8, cudaMemcpyHostToDevice);
    cudaDeviceSynchronize(); // so small a copy may still be under way
    result(ops->extent_export(cuda, arena, 1, &fd, &err) == 0 &&
               ops->extent_import(cuda, other, 0, fd, &err) == 0,
           "export and import");
    ops->extent_drop(cuda, arena, 1);
    result(ops->extent_make(cuda, arena, 1, &err) == 0, "made anew");
    cudaMemcpy(&got, (void *)(uintptr_t)other->base, 4, cudaMemcpyDeviceToHost);
    result(got == 5, "the import keeps its memory");
    cudaMemcpy(&got, (void *)(uintptr_t)at, 4, cudaMemcpyDeviceToHost);
    result(got == 0, "what took its place is zero");
    uint8_t *data = NULL;
    struct kvd_foreign lie = {.kind = KVD_MEMORY_CUDA_FD, .fd = fd, .size = 2 * bytes};
    result(ops->foreign_map(cuda, &lie, &data, &err) == KVD_E_INVALID, "a lie about the size");
    lie.size = bytes;
    result(ops->foreign_map(cuda, &lie, &data, &err) == 0, "the truth about the size");
    ops->foreign_unmap(cuda, lie.kind, data, bytes);
    lie.fd = 0;
    result(ops->foreign_map(cuda, &lie, &data, &err) == KVD_E_INVALID, "not a handle");
    lie.kind = KVD_MEMORY_CUDA_IPC;
    result(ops->foreign_map(cuda, &lie, &data, &err) == KVD_E_INVALID, "not an IPC handle");
    close(fd);
    ops->arena_free(cuda, &other);
    ops->arena_free(cuda, &arena);
    struct kvd_arena *huge = ops->arena_new(cuda, 1, 1ull << 41, &err);
    result(huge && ops->extent_make(cuda, huge, 0, &err) == KVD_E_FULL, "too much memory");
    ops->arena_free(cuda, &huge);
    cudaFree(sum);
}

#endif
