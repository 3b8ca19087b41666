// Extents of the CUDA backend, by the driver's virtual-memory calls, and memory of other processes.
//
// An extent is a physical allocation, mapped into a range of addresses that was reserved for all.
// Its descriptor names the physical memory: that lives as long as any process maps it.
#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cuda/cuda.h"

enum {
    GRANULARITY = KVD_SEGMENT_UNIT,
    UNMAPPED_AT_ONCE = 8, // segments
};

struct arena {
    struct kvd_arena base;
    bool *mapped; // per extent
    // Of extents made or adopted here; 0: imported.
    CUmemGenericAllocationHandle *handles;
    int *fds; // of theirs, from the first time that one is asked for; -1
};

static struct kvd_cuda *cuda_of(struct kvd_backend *b)
{
    return (struct kvd_cuda *)b;
}

static struct arena *arena_of(struct kvd_arena *a)
{
    return (struct arena *)a;
}

static CUdeviceptr place(const struct kvd_arena *a, uint32_t i)
{
    return a->base + i * a->bytes;
}

static int status(const struct kvd_cuda *c, CUresult rc, const char *doing, struct kvd_error *err)
{
    const char *text = "unknown error";
    if (rc == CUDA_SUCCESS)
        return KVD_OK;
    c->driver.error(rc, &text);
    return kvd_fail(err,
                    rc == CUDA_ERROR_OUT_OF_MEMORY    ? KVD_E_FULL
                    : rc == CUDA_ERROR_INVALID_VALUE  ? KVD_E_INVALID
                    : rc == CUDA_ERROR_INVALID_DEVICE ? KVD_E_INVALID
                                                      : KVD_E_INTERNAL,
                    "%s: %s", doing, text);
}

int kvd_cuda_memory_init(struct kvd_cuda *c, struct kvd_error *err)
{
    struct kvd_cuda_driver *d = &c->driver;
    const struct {
        const char *name;
        void *at;
    } wanted[] = {
        {"cuMemAddressReserve", &d->reserve},
        {"cuMemAddressFree", &d->unreserve},
        {"cuMemCreate", &d->create},
        {"cuMemRelease", &d->release},
        {"cuMemMap", &d->map},
        {"cuMemUnmap", &d->unmap},
        {"cuMemSetAccess", &d->set_access},
        {"cuMemExportToShareableHandle", &d->export_handle},
        {"cuMemImportFromShareableHandle", &d->import_handle},
        {"cuMemGetAllocationPropertiesFromHandle", &d->properties},
        {"cuMemGetAddressRange", &d->range},
        {"cuGetErrorString", &d->error},
    };
    for (size_t i = 0; i < KVD_LEN(wanted); i++) {
        enum cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion(wanted[i].name, wanted[i].at, 12000, cudaEnableDefault,
                                             &found) != cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            return kvd_fail(err, KVD_E_UNSUPPORTED,
                            "the CUDA driver has no %s; kvd wants 525 or "
                            "later",
                            wanted[i].name);
    }
    return KVD_OK;
}

static CUmemAllocationProp property(const struct kvd_cuda *c)
{
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                 .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                 .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = c->index}};
}

// Maps a handle at reserved addresses. On failure they are as before.
static CUresult map_at(const struct kvd_cuda *c, CUdeviceptr at, uint64_t bytes,
                       CUmemGenericAllocationHandle handle, bool writable)
{
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = c->index},
                              .flags = writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                                                : CU_MEM_ACCESS_FLAGS_PROT_READ};
    CUresult rc = c->driver.map(at, bytes, 0, handle, 0);
    if (rc != CUDA_SUCCESS)
        return rc;
    rc = c->driver.set_access(at, bytes, &access, 1);
    if (rc != CUDA_SUCCESS)
        c->driver.unmap(at, bytes);
    return rc;
}

struct kvd_arena *kvd_cuda_arena_new(struct kvd_backend *b, uint32_t count, uint64_t bytes,
                                     struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    struct arena *a = calloc(1, sizeof(*a));
    bool *mapped = calloc(count, sizeof(*mapped));
    CUmemGenericAllocationHandle *handles = calloc(count, sizeof(*handles));
    int *fds = malloc(count * sizeof(*fds));
    CUdeviceptr base = 0;
    cudaSetDevice(c->index);
    for (uint32_t i = 0; fds && i < count; i++)
        fds[i] = -1;
    if (!a || !mapped || !handles || !fds)
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    else if (status(c, c->driver.reserve(&base, count * bytes, GRANULARITY, 0, 0),
                    "reserving GPU addresses for the pool", err) == KVD_OK) {
        *a = (struct arena){{base, bytes, count}, mapped, handles, fds};
        return &a->base;
    }
    free(fds);
    free(handles);
    free(mapped);
    free(a);
    return NULL;
}

void kvd_cuda_arena_free(struct kvd_backend *b, struct kvd_arena **ap)
{
    struct kvd_arena *a = KVD_TAKE(*ap);
    if (!a)
        return;
    for (uint32_t i = 0; i < a->count; i++)
        kvd_cuda_extent_drop(b, a, i);
    cuda_of(b)->driver.unreserve(a->base, a->count * a->bytes);
    free(arena_of(a)->fds);
    free(arena_of(a)->handles);
    free(arena_of(a)->mapped);
    free(a);
}

static void close_descriptor(struct kvd_arena *a, uint32_t i)
{
    int *fd = &arena_of(a)->fds[i];
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

int kvd_cuda_extent_make(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                         struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    CUmemAllocationProp wanted = property(c);
    CUmemGenericAllocationHandle handle;
    cudaSetDevice(c->index);
    int rc = status(c, c->driver.create(&handle, a->bytes, &wanted, 0), "making an extent", err);
    if (rc)
        return rc;
    CUmemGenericAllocationHandle old = arena_of(a)->handles[i];
    bool had = arena_of(a)->mapped[i];
    if (had)
        c->driver.unmap(place(a, i), a->bytes);
    rc = status(c, map_at(c, place(a, i), a->bytes, handle, true), "mapping an extent", err);
    if (rc) {
        c->driver.release(handle);
        arena_of(a)->mapped[i] = had && map_at(c, place(a, i), a->bytes, old, true) == CUDA_SUCCESS;
        return rc;
    }
    if (had && old)
        c->driver.release(old);
    close_descriptor(a, i);
    arena_of(a)->handles[i] = handle;
    arena_of(a)->mapped[i] = true;
    rc = kvd_cuda_extent_zero(b, a, i, err);
    if (rc)
        kvd_cuda_extent_drop(b, a, i);
    return rc;
}

void kvd_cuda_extent_drop(struct kvd_backend *b, struct kvd_arena *a, uint32_t i)
{
    struct kvd_cuda *c = cuda_of(b);
    if (!arena_of(a)->mapped[i])
        return;
    cudaSetDevice(c->index);
    c->driver.unmap(place(a, i), a->bytes);
    if (arena_of(a)->handles[i])
        c->driver.release(arena_of(a)->handles[i]);
    close_descriptor(a, i);
    arena_of(a)->handles[i] = 0;
    arena_of(a)->mapped[i] = false;
}

int kvd_cuda_extent_zero(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                         struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    cudaSetDevice(c->index);
    int rc = kvd_cuda_zero((void *)(uintptr_t)place(a, i), a->bytes, c->mem_stream);
    if (rc == 0)
        rc = cudaStreamSynchronize(c->mem_stream);
    return kvd_cuda_status(rc, "zeroing an extent", err);
}

// What was imported cannot be exported again, so the descriptor that it came by is kept.
static int descriptor(struct kvd_cuda *c, struct kvd_arena *a, uint32_t i, struct kvd_error *err)
{
    int *fd = &arena_of(a)->fds[i];
    cudaSetDevice(c->index);
    if (*fd < 0 && status(c,
                          c->driver.export_handle(fd, arena_of(a)->handles[i],
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                          "exporting an extent", err) == KVD_OK)
        fcntl(*fd, F_SETFD, FD_CLOEXEC);
    return *fd;
}

int kvd_cuda_extent_descriptor(struct kvd_backend *b, struct kvd_arena *a, uint32_t i)
{
    return descriptor(cuda_of(b), a, i, NULL);
}

int kvd_cuda_extent_export(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int *fd,
                           struct kvd_error *err)
{
    struct kvd_error e = {0};
    int own = descriptor(cuda_of(b), a, i, &e);
    if (own < 0)
        return kvd_fail(err, e.code, "%s", e.text);
    int copy = fcntl(own, F_DUPFD_CLOEXEC, 0);
    if (copy < 0)
        return kvd_fail(err, KVD_E_LIMIT, "cannot export an extent: %s", strerror(errno));
    *fd = copy;
    return KVD_OK;
}

static int elsewhere(const struct kvd_cuda *c, struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_INVALID,
                    "the memory is not on CUDA device %d, %s: tensors are to be on kvd's GPU, or "
                    "the kvd of theirs is wanted",
                    c->index, c->uuid);
}

// Imports device memory of this GPU. KVD_E_INVALID for a descriptor that names anything else.
static int import(struct kvd_cuda *c, int fd, CUmemGenericAllocationHandle *handle,
                  struct kvd_error *err)
{
    CUmemAllocationProp found;
    CUresult rc = c->driver.import_handle(handle, (void *)(intptr_t)fd,
                                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (rc != CUDA_SUCCESS)
        return kvd_fail(err, KVD_E_INVALID,
                        "the descriptor is not one of cuMemExportToShareableHandle");
    rc = c->driver.properties(&found, *handle);
    if (rc == CUDA_SUCCESS && found.location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
        found.location.id == c->index)
        return KVD_OK;
    c->driver.release(*handle);
    return elsewhere(c, err);
}

int kvd_cuda_extent_import(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                           struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    CUmemGenericAllocationHandle handle;
    cudaSetDevice(c->index);
    int rc = import(c, fd, &handle, err);
    if (rc)
        return rc;
    kvd_cuda_extent_drop(b, a, i);
    rc = status(c, map_at(c, place(a, i), a->bytes, handle, false), "mapping an extent", err);
    c->driver.release(handle); // the mapping keeps the memory
    arena_of(a)->mapped[i] = rc == KVD_OK;
    return rc;
}

int kvd_cuda_extent_adopt(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                          bool *shared, struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    CUmemGenericAllocationHandle handle;
    cudaSetDevice(c->index);
    int copy KVD_CLOSE = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0)
        return kvd_fail(err, KVD_E_LIMIT, "cannot take over extent %u: %s", i, strerror(errno));
    int rc = import(c, fd, &handle, err);
    if (rc)
        return rc;
    kvd_cuda_extent_drop(b, a, i);
    // The driver refuses to map more than there is.
    rc = status(c, map_at(c, place(a, i), a->bytes, handle, true), "mapping an extent", err);
    if (rc) {
        c->driver.release(handle);
        return rc;
    }
    arena_of(a)->handles[i] = handle;
    arena_of(a)->fds[i] = KVD_TAKE_FD(copy);
    arena_of(a)->mapped[i] = true;
    *shared = true; // nothing tells whether a worker maps it
    return KVD_OK;
}

// -- memory of other processes -------------------------------------------------------------------

static int map_ipc(struct kvd_cuda *c, const struct kvd_foreign *f, uint8_t **data,
                   struct kvd_error *err)
{
    cudaIpcMemHandle_t handle;
    void *p = NULL;
    CUdeviceptr base = 0;
    size_t size = 0;
    _Static_assert(sizeof(handle) == KVD_IPC_HANDLE_BYTES, "an IPC handle");
    memcpy(&handle, f->ipc, sizeof(handle));
    cudaError_t rc = cudaIpcOpenMemHandle(&p, handle, cudaIpcMemLazyEnablePeerAccess);
    if (rc != cudaSuccess) {
        cudaGetLastError();
        return kvd_fail(err, KVD_E_INVALID,
                        "the CUDA IPC handle cannot be opened (%s): it must come from "
                        "cudaIpcGetMemHandle of a live process on this GPU",
                        cudaGetErrorString(rc));
    }
    // What the allocation really has decides, not what the worker says.
    if (c->driver.range(&base, &size, (CUdeviceptr)(uintptr_t)p) != CUDA_SUCCESS ||
        base != (CUdeviceptr)(uintptr_t)p || f->size > size) {
        cudaIpcCloseMemHandle(p);
        return kvd_fail(err, KVD_E_INVALID, "size is %llu, the allocation has %zu bytes",
                        (unsigned long long)f->size, size);
    }
    struct cudaPointerAttributes where;
    if (cudaPointerGetAttributes(&where, p) != cudaSuccess || where.device != c->index) {
        cudaGetLastError();
        cudaIpcCloseMemHandle(p);
        return elsewhere(c, err);
    }
    *data = p;
    return KVD_OK;
}

static int map_fd(struct kvd_cuda *c, const struct kvd_foreign *f, uint8_t **data,
                  struct kvd_error *err)
{
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at = 0;
    uint64_t bytes = kvd_round_up(f->size, GRANULARITY);
    int rc = import(c, f->fd, &handle, err);
    if (rc)
        return rc;
    rc = status(c, c->driver.reserve(&at, bytes, GRANULARITY, 0, 0), "reserving addresses", err);
    if (rc == KVD_OK) {
        // The driver refuses to map more than there is.
        if (map_at(c, at, bytes, handle, true) != CUDA_SUCCESS) {
            rc = kvd_fail(err, KVD_E_INVALID,
                          "size is %llu: the allocation does not have %llu bytes",
                          (unsigned long long)f->size, (unsigned long long)bytes);
            c->driver.unreserve(at, bytes);
        } else {
            *data = (uint8_t *)(uintptr_t)at;
        }
    }
    c->driver.release(handle);
    return rc;
}

int kvd_cuda_foreign_map(struct kvd_backend *b, const struct kvd_foreign *f, uint8_t **data,
                         struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    cudaSetDevice(c->index);
    return f->kind == KVD_MEMORY_CUDA_IPC ? map_ipc(c, f, data, err) : map_fd(c, f, data, err);
}

void kvd_cuda_foreign_unmap(struct kvd_backend *b, enum kvd_memory kind, uint8_t *data,
                            uint64_t size)
{
    struct kvd_cuda *c = cuda_of(b);
    uint64_t bytes = kvd_round_up(size, GRANULARITY);
    CUdeviceptr at = (CUdeviceptr)(uintptr_t)data;
    cudaSetDevice(c->index);
    if (kind == KVD_MEMORY_CUDA_IPC) {
        cudaIpcCloseMemHandle(data);
        cudaGetLastError();
    } else {
        c->driver.unmap(at, bytes);
        c->driver.unreserve(at, bytes);
    }
}

int kvd_cuda_segments_reserve(struct kvd_backend *b, uint64_t size, uint8_t **data,
                              struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    CUdeviceptr at = 0;
    cudaSetDevice(c->index);
    int rc = status(c, c->driver.reserve(&at, size, GRANULARITY, 0, 0), "reserving addresses", err);
    if (rc == KVD_OK)
        *data = (uint8_t *)(uintptr_t)at;
    return rc;
}

static int map_segment(struct kvd_cuda *c, CUdeviceptr at, const struct kvd_segment *s,
                       struct kvd_error *err)
{
    CUmemGenericAllocationHandle handle;
    int rc = import(c, s->fd, &handle, err);
    if (rc)
        return rc;
    // The driver refuses to map more than there is, and less.
    if (map_at(c, at, s->bytes, handle, true) != CUDA_SUCCESS)
        rc = kvd_fail(err, KVD_E_INVALID, "the allocation is not one of %llu bytes",
                      (unsigned long long)s->bytes);
    c->driver.release(handle); // the mapping keeps the memory
    return rc;
}

int kvd_cuda_segments_map(struct kvd_backend *b, uint8_t *data, const struct kvd_segment *segments,
                          uint32_t n, struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    const CUdeviceptr at = (CUdeviceptr)(uintptr_t)data;
    uint64_t mapped = 0;
    int rc = KVD_OK;
    cudaSetDevice(c->index);
    for (uint32_t i = 0; i < n && rc == KVD_OK; i++) {
        rc = map_segment(c, at + mapped, &segments[i], err);
        if (rc)
            kvd_fail_in(err, "segments[%u]", i);
        else
            mapped += segments[i].bytes;
    }
    if (rc && mapped)
        c->driver.unmap(at, mapped);
    return rc;
}

// How far the next piece reaches, of at most `left` bytes: a few of the segments.
static uint64_t piece_of(const struct kvd_cuda *c, CUdeviceptr at, uint64_t left)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < UNMAPPED_AT_ONCE && bytes < left; i++) {
        CUdeviceptr base = 0;
        size_t one = 0;
        if (c->driver.range(&base, &one, at + bytes) != CUDA_SUCCESS || base != at + bytes ||
            one == 0 || one > left - bytes)
            return left; // so it was not mapped: whatever it is, it goes
        bytes += one;
    }
    return bytes;
}

// The driver serves nobody else meanwhile, so it is called for a few at a time; and whoever waits
// for it has it only where nobody asks for it again at once.
void kvd_cuda_segments_unmap(struct kvd_backend *b, uint8_t *data, uint64_t mapped, uint64_t size)
{
    struct kvd_cuda *c = cuda_of(b);
    const CUdeviceptr at = (CUdeviceptr)(uintptr_t)data;
    cudaSetDevice(c->index);
    for (uint64_t done = 0, now; done < mapped; done += now) {
        const struct timespec pause = {.tv_nsec = 100000};
        now = piece_of(c, at + done, mapped - done);
        c->driver.unmap(at + done, now);
        nanosleep(&pause, NULL);
    }
    c->driver.unreserve(at, size);
}

uint64_t kvd_cuda_memory_free(struct kvd_backend *b)
{
    size_t left = 0, total = 0;
    cudaSetDevice(cuda_of(b)->index);
    return cudaMemGetInfo(&left, &total) == cudaSuccess ? left : 0;
}

uint64_t kvd_cuda_memory_total(struct kvd_backend *b)
{
    size_t left = 0, total = 0;
    cudaSetDevice(cuda_of(b)->index);
    return cudaMemGetInfo(&left, &total) == cudaSuccess ? total : 0;
}
