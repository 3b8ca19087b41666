// Extents of the CUDA backend: made, zeroed, exported, imported, given up. Part of test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_MEMORY_H
#define KVD_TESTS_GPU_TEST_MEMORY_H

static uint64_t sum_of(uint64_t at, uint64_t bytes)
{
    struct kvd_span page = {at, bytes};
    uint64_t sum = 0;
    result(cuda->ops->sums(cuda, &page, 1, &sum, NULL) == 0, "checksum of one page");
    return sum;
}

// More pages than a launch takes, of many sizes, beside the plain form; memory is left as it was.
static void many_sums(uint64_t at, uint64_t bytes)
{
    enum { N = 1500 };
    static struct kvd_span pages[N];
    static uint64_t sums[N];
    uint8_t *was = malloc(bytes), *now = malloc(bytes);
    cudaMemcpy(was, (void *)(uintptr_t)at, bytes, cudaMemcpyDeviceToHost);
    for (uint64_t i = 0; i < bytes; i++)
        now[i] = (uint8_t)(i * 2654435761u >> 13);
    upload((void *)(uintptr_t)at, now, bytes);
    for (uint32_t i = 0; i < N; i++) {
        uint64_t from = i % 7 * 4096, size = i % 100 ? 4096 * (1 + i % 3) : bytes - from;
        pages[i] = (struct kvd_span){at + from, size};
    }
    bool same = cuda->ops->sums(cuda, pages, N, sums, NULL) == 0;
    for (uint32_t i = 0; i < N; i++)
        same &= sums[i] == kvd_words_sum(now + (pages[i].addr - at), pages[i].bytes);
    result(same, "checksums of many pages");
    upload((void *)(uintptr_t)at, was, bytes);
    free(was);
    free(now);
}

// Rows of a part of a page, and pages that lie side by side: what lies between them stays as it is,
// and they may lie closer here than there.
static void copy_pieces(uint64_t at)
{
    enum { PIECES = 6, FROM = 2048, TO = 1536, BYTES = 512, WORDS = PIECES * FROM / 4 };
    static uint32_t from[WORDS], to[WORDS];
    struct kvd_copy copy = {.to = at + (1 << 20),
                            .from = at + (2 << 20) + BYTES,
                            .bytes = BYTES,
                            .to_stride = TO,
                            .from_stride = FROM,
                            .pieces = PIECES};
    bool right = true;
    for (uint32_t i = 0; i < WORDS; i++) {
        from[i] = i + 1;
        to[i] = ~i;
    }
    upload((void *)(uintptr_t)(copy.from - BYTES), from, sizeof(from));
    upload((void *)(uintptr_t)copy.to, to, sizeof(to));
    result(cuda->ops->copy(cuda, &copy, 1, NULL) == 0, "copy of pieces");
    cudaMemcpy(to, (void *)(uintptr_t)copy.to, sizeof(to), cudaMemcpyDeviceToHost);
    for (uint32_t i = 0; i < WORDS; i++) {
        uint32_t piece = i / (TO / 4), word = i % (TO / 4);
        bool copied = piece < PIECES && word < BYTES / 4;
        right &= to[i] == (copied ? from[piece * (FROM / 4) + word + BYTES / 4] : ~i);
    }
    result(right, "pieces, and nothing else");
}

// As many as can be, each ended before what it has written is looked at. Page 1 of the extent is
// left as it was.
static void copies_under_way(const struct kvd_backend_ops *ops, uint64_t at, uint8_t *host)
{
    bool good = true, same = true;
    uint32_t got = 0;
    for (uint32_t i = 0; i < 1024; i++)
        memcpy(host + 4 * i, &i, 4);
    for (uint32_t round = 0; round < 2; round++) {
        for (uint32_t i = 0; i < KVD_COPIES_AT_ONCE; i++) {
            const struct kvd_copy copies[2] = {
                {.to = at + 8192 + 4096 * i, .from = (uintptr_t)host, .bytes = 2048},
                {.to = at + 10240 + 4096 * i, .from = (uintptr_t)host + 2048, .bytes = 2048}};
            good &= ops->copy_begin(cuda, copies, 2, i, NULL) == 0;
        }
        for (uint32_t i = 0; i < KVD_COPIES_AT_ONCE; i++) {
            good &= ops->copy_end(cuda, i, NULL) == 0;
            cudaMemcpy(&got, (void *)(uintptr_t)(at + 8192 + 4096 * i + 4092), 4,
                       cudaMemcpyDeviceToHost);
            same &= got == 1023;
        }
    }
    result(good && same, "copies under way");
}

// Memory of which `fd` is, three times side by side, as segments of one buffer.
static void map_segments(const struct kvd_backend_ops *ops, int fd, uint64_t bytes)
{
    struct kvd_error err = {0};
    const struct kvd_segment good[] = {{fd, bytes}, {fd, bytes}},
                             lie[] = {{fd, bytes}, {fd, 2 * bytes}};
    const struct kvd_segment no_memory[] = {{fd, bytes}, {0, bytes}};
    const uint64_t size = 4 * bytes, part = 2 * bytes;
    uint8_t *data = NULL;
    result(ops->memory_total(cuda) > 0 && ops->segments_reserve(cuda, size, &data, &err) == 0,
           "addresses for segments");
    result(ops->segments_map(cuda, data, lie, 2, &err) == KVD_E_INVALID &&
               strstr(err.text, "segments[1]: the allocation is not one of"),
           "a lie about a segment's size");
    result(ops->segments_map(cuda, data, no_memory, 2, &err) == KVD_E_INVALID, "not a segment");
    // What was refused has left no mapping in the way.
    result(ops->segments_map(cuda, data, good, 2, &err) == 0 &&
               ops->segments_map(cuda, data + part, good, 1, &err) == 0,
           "segments are mapped, and more behind them");
    const uint32_t words[2] = {11, 13};
    upload(data + bytes - 4, words, 8); // the last of the first, and the first of the second
    uint32_t got[3] = {0};
    cudaMemcpy(&got[0], data + part + bytes - 4, 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(&got[1], data, 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(&got[2], data + part, 4, cudaMemcpyDeviceToHost);
    result(got[0] == 11 && got[1] == 13 && got[2] == 13, "segments are in their order");
    ops->segments_unmap(cuda, data, part + bytes, size);
    result(ops->segments_reserve(cuda, size, &data, &err) == 0 &&
               ops->segments_map(cuda, data, good, 2, &err) == 0,
           "what was unmapped can be mapped again");
    ops->segments_unmap(cuda, data, part, size);
    ops->segments_reserve(cuda, size, &data, &err);
    ops->segments_unmap(cuda, data, 0, size);
}

static void memory(void)
{
    uint64_t bytes = 4 << 20;
    struct kvd_error err = {0};
    const struct kvd_backend_ops *ops = cuda->ops;
    struct kvd_arena *arena = ops->arena_new(cuda, 2, bytes, &err);
    result(arena && ops->extent_make(cuda, arena, 1, &err) == 0, "extent_make");
    uint64_t at = arena->base + bytes;
    uint64_t first = sum_of(at, bytes), second;
    result(first == 0, "new memory is zero");
    uint32_t words[2] = {5, 7};
    upload((void *)(uintptr_t)(at + 4096), words, 8);
    first = sum_of(at, bytes);
    uint32_t swapped[2] = {7, 5};
    upload((void *)(uintptr_t)(at + 4096), swapped, 8);
    second = sum_of(at, bytes);
    result(first == 5 * 2049 + 7 * 2051 && first != second, "checksum");
    many_sums(at, bytes);
    struct kvd_copy copies[2] = {{.to = at, .from = at + 4096, .bytes = 4096}};
    uint8_t *host = aligned_alloc(4096, 8192);
    copies[1] = (struct kvd_copy){.to = (uintptr_t)host + 4096, .from = at + 4096, .bytes = 4096};
    result(ops->host_pin(cuda, host, 8192, &err) == 0, "host memory is pinned");
    result(ops->copy(cuda, copies, 2, NULL) == 0, "copy");
    uint32_t got = 0;
    memcpy(&got, host + 4096, 4);
    result(got == 7, "copied to the host");
    copies_under_way(ops, at, host);
    ops->host_unpin(host);
    ops->host_unpin(host); // does nothing
    free(host);
    cudaMemcpy(&got, (void *)(uintptr_t)at, 4, cudaMemcpyDeviceToHost);
    result(got == 7, "copied");
    copy_pieces(at);
    result(ops->extent_zero(cuda, arena, 1, &err) == 0, "extent_zero");
    result(sum_of(at, bytes) == 0, "zeroed memory is zero");
    // An export keeps the memory alive beside what takes its place.
    int fd = -1;
    struct kvd_arena *other = ops->arena_new(cuda, 2, bytes, &err);
    upload((void *)(uintptr_t)at, words, 8);
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
    map_segments(ops, fd, bytes);
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
}

#endif
