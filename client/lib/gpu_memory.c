// Registering the worker's GPU memory with the daemon.
#include <errno.h>
#include <fcntl.h>

#include "client/lib/client.h"

static kvd_result add(kvd_client *c, const kvd_buffer *b, kvd_buffer **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    kvd_buffer *copy = b->size ? malloc(sizeof(*copy)) : NULL;
    if (!copy) {
        kvd_fail(&e, b->size ? KVD_E_INTERNAL : KVD_E_INVALID,
                 b->size ? "out of memory" : "a buffer of 0 bytes");
        return kvd_client_fail(err, &e);
    }
    *copy = *b;
    kvd_result rc = kvd_client_add_buffer(c, copy, err);
    if (rc == KVD_SUCCESS)
        *out = copy;
    else
        free(copy);
    return rc;
}

kvd_result kvd_buffer_cuda_ipc(kvd_client *c, const void *handle, uint64_t offset, uint64_t bytes,
                               kvd_buffer **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    KVD_WANT(err, "client", c, "handle", handle, "out", out);
    if (offset > UINT64_MAX - bytes) {
        kvd_fail(&e, KVD_E_INVALID, "offset and size overflow 64 bits");
        return kvd_client_fail(err, &e);
    }
    kvd_buffer b = {.kind = KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_IPC,
                    .fd = -1,
                    .at = offset,
                    .size = bytes};
    memcpy(b.ipc, handle, sizeof(b.ipc));
    return add(c, &b, out, err);
}

kvd_result kvd_buffer_cuda_fd(kvd_client *c, int fd, uint64_t bytes, kvd_buffer **out,
                              kvd_failure *err)
{
    KVD_WANT(err, "client", c, "out", out);
    kvd_buffer b = {.kind = KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_FD,
                    .fd = fcntl(fd, F_DUPFD_CLOEXEC, 0), // kept, to register again after a restart
                    .size = bytes};
    struct kvd_error e = {0};
    if (b.fd < 0) {
        kvd_fail(&e, KVD_E_INVALID, "descriptor %d: %s", fd, strerror(errno));
        return kvd_client_fail(err, &e);
    }
    kvd_result rc = add(c, &b, out, err);
    if (rc)
        close(b.fd);
    return rc;
}

#ifdef KVD_CUDA

#include "kernels/cuda/cuda.h"

// Calls of the driver; NULL: it has none.
struct driver {
    PFN_cuMemGetAddressRange_v3020 range;
    PFN_cuPointerGetAttribute_v4000 attribute;
    PFN_cuMemRetainAllocationHandle_v11000 retain;
    PFN_cuMemRelease_v10020 release;
    PFN_cuMemGetAllocationPropertiesFromHandle_v10020 properties;
    PFN_cuMemExportToShareableHandle_v10020 export_handle;
};

static int find_driver(struct driver *d, struct kvd_error *err)
{
    const struct {
        const char *name;
        void *at;
    } wanted[] = {{"cuMemGetAddressRange", &d->range},
                  {"cuPointerGetAttribute", &d->attribute},
                  {"cuMemRetainAllocationHandle", &d->retain},
                  {"cuMemRelease", &d->release},
                  {"cuMemGetAllocationPropertiesFromHandle", &d->properties},
                  {"cuMemExportToShareableHandle", &d->export_handle}};
    *d = (struct driver){0};
    for (size_t i = 0; i < KVD_LEN(wanted); i++) {
        enum cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion(wanted[i].name, wanted[i].at, 12000, cudaEnableDefault,
                                             &found) == cudaSuccess &&
            found == cudaDriverEntryPointSuccess)
            continue;
        cudaGetLastError();
        return kvd_fail(err, KVD_E_UNSUPPORTED, "the CUDA driver has no %s", wanted[i].name);
    }
    return KVD_OK;
}

// The allocation of cudaMalloc, or the mapping of one of cuMemCreate, that an address lies in.
static int look(const struct driver *d, uintptr_t at, struct kvd_gpu_segment *out, bool *segment,
                struct kvd_error *err)
{
    CUmemGenericAllocationHandle handle;
    CUdeviceptr base = 0;
    size_t size = 0;
    int has_ipc = 0;
    if (d->range(&base, &size, (CUdeviceptr)at) != CUDA_SUCCESS || size == 0)
        return kvd_fail(err, KVD_E_INVALID, "%p is not GPU memory of this process", (void *)at);
    *out = (struct kvd_gpu_segment){(uintptr_t)base, size};
    // What has an IPC handle is taken by that, whatever the driver has made it of.
    if (d->attribute(&has_ipc, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, base) !=
        CUDA_SUCCESS)
        has_ipc = 0;
    *segment = !has_ipc && d->retain(&handle, (void *)(uintptr_t)base) == CUDA_SUCCESS;
    if (*segment)
        d->release(handle);
    return KVD_OK;
}

// Goes through what some bytes lie in. What is found is appended to *list, unless that is NULL.
static int walk(const void *data, uint64_t bytes, struct kvd_gpu_extent *out,
                struct kvd_gpu_segment **list, struct kvd_error *err)
{
    const uintptr_t begin = (uintptr_t)data;
    struct driver d;
    int rc = find_driver(&d, err);
    if (rc == KVD_OK && (bytes == 0 || bytes > UINTPTR_MAX - begin))
        rc = kvd_fail(err, KVD_E_INVALID, "%llu bytes at %p are no memory",
                      (unsigned long long)bytes, data);
    *out = (struct kvd_gpu_extent){.begin = begin};
    for (uintptr_t at = begin; rc == KVD_OK && at < begin + bytes;) {
        struct kvd_gpu_segment one = {0};
        bool segment = false;
        rc = look(&d, at, &one, &segment, err);
        if (rc)
            break;
        if (at == begin)
            out->begin = one.at;
        else if (!segment || one.at != at)
            return kvd_fail(err, KVD_E_INVALID,
                            "the %llu bytes at %p are not all of one kind: at %p begins another",
                            (unsigned long long)bytes, data, (void *)at);
        if (!segment && bytes > one.bytes - (begin - one.at))
            return kvd_fail(err, KVD_E_INVALID,
                            "the %llu bytes at %p lie in more than one allocation, of which the "
                            "first has %llu: one of cudaMalloc is wanted, or memory of cuMemCreate",
                            (unsigned long long)bytes, data, (unsigned long long)one.bytes);
        if (segment && list) {
            void *more = realloc(*list, (out->n_segments + 1) * sizeof(**list));
            if (!more)
                return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
            *list = more;
            (*list)[out->n_segments] = one;
        }
        out->n_segments += segment;
        out->bytes += one.bytes;
        at = one.at + one.bytes;
    }
    return rc;
}

int kvd_gpu_extent(const void *data, uint64_t bytes, struct kvd_gpu_extent *out,
                   struct kvd_error *err)
{
    return walk(data, bytes, out, NULL, err);
}

static int export_handle(const struct driver *d, const struct kvd_gpu_segment *s,
                         CUmemGenericAllocationHandle handle, int *fd, struct kvd_error *err)
{
    CUmemAllocationProp is = {0};
    if (d->properties(&is, handle) == CUDA_SUCCESS &&
        !(is.requestedHandleTypes & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR))
        return kvd_fail(err, KVD_E_INVALID,
                        "the memory at %p has no descriptor: its allocator made it without "
                        "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, for handles of types 0x%x",
                        (void *)s->at, (unsigned)is.requestedHandleTypes);
    CUresult rc = d->export_handle(fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (rc != CUDA_SUCCESS)
        return kvd_fail(err, KVD_E_INVALID, "the memory at %p has no descriptor (CUDA error %d)",
                        (void *)s->at, (int)rc);
    fcntl(*fd, F_SETFD, FD_CLOEXEC);
    return KVD_OK;
}

// Another thread than the one that has made the buffer may register it again.
int kvd_gpu_export(const struct kvd_gpu_segment *s, int device, int *fd, struct kvd_error *err)
{
    CUmemGenericAllocationHandle handle;
    struct kvd_gpu_segment now = {0};
    struct driver d;
    bool segment = false;
    int before = 0, rc = find_driver(&d, err);
    if (rc)
        return rc;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    rc = look(&d, s->at, &now, &segment, err);
    if (rc == KVD_OK && (!segment || now.at != s->at || now.bytes != s->bytes ||
                         d.retain(&handle, (void *)s->at) != CUDA_SUCCESS))
        rc = kvd_fail(err, KVD_E_INVALID,
                      "the memory at %p is not mapped any more as it was when it was registered",
                      (void *)s->at);
    if (rc == KVD_OK) {
        rc = export_handle(&d, s, handle, fd, err);
        d.release(handle);
    }
    cudaGetLastError();
    cudaSetDevice(before);
    return rc;
}

static int export_ipc(const struct kvd_gpu_extent *extent, cudaIpcMemHandle_t *handle,
                      struct kvd_error *err)
{
    cudaError_t rc = cudaIpcGetMemHandle(handle, (void *)extent->begin);
    if (rc == cudaSuccess)
        return KVD_OK;
    cudaGetLastError();
    return kvd_fail(err, KVD_E_INVALID,
                    "the memory at %p has no IPC handle (%s): it must come from cudaMalloc or "
                    "cuMemCreate",
                    (void *)extent->begin, cudaGetErrorString(rc));
}

kvd_result kvd_buffer_cuda(kvd_client *c, void *data, uint64_t bytes, kvd_buffer **out,
                           kvd_failure *err)
{
    struct kvd_error e = {0};
    KVD_WANT(err, "client", c, "data", data, "out", out);
    struct kvd_gpu_segment *segments KVD_FREE = NULL;
    struct kvd_gpu_extent extent;
    cudaIpcMemHandle_t handle = {0};
    if (kvd_fork_check(c, &e) || walk(data, bytes, &extent, &segments, &e))
        return kvd_client_fail(err, &e);
    const bool many = extent.n_segments;
    if (!many && export_ipc(&extent, &handle, &e))
        return kvd_client_fail(err, &e);
    if (many && !c->takes_segments) {
        kvd_fail(&e, KVD_E_INVALID,
                 "this kvd is older than libkvd and takes no segments of cuMemCreate's memory, "
                 "which %p lies in",
                 data);
        return kvd_client_fail(err, &e);
    }
    kvd_buffer b = {.kind = many ? KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_SEGMENTS
                                 : KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_IPC,
                    .fd = -1,
                    .segments = segments,
                    .n_segments = extent.n_segments,
                    .at = (uintptr_t)data - extent.begin,
                    .size = bytes,
                    .data = data};
    struct cudaPointerAttributes a;
    b.device = cudaPointerGetAttributes(&a, data) == cudaSuccess ? a.device : 0;
    memcpy(b.ipc, &handle, sizeof(b.ipc));
    kvd_result rc = add(c, &b, out, err);
    if (rc == KVD_SUCCESS)
        (void)KVD_TAKE(segments); // the buffer's
    return rc;
}

// The name of a device, for as long as the process lives: to ask CUDA takes long.
static const char *uuid_of(int device)
{
    enum { DEVICES = 64 };
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static char names[DEVICES][KVD_CUDA_UUID];
    struct cudaDeviceProp prop;
    if (device < 0 || device >= DEVICES)
        return "";
    pthread_mutex_lock(&lock);
    if (!names[device][0] && cudaGetDeviceProperties(&prop, device) == cudaSuccess)
        kvd_cuda_write_uuid(&prop.uuid, names[device]);
    cudaGetLastError();
    pthread_mutex_unlock(&lock);
    return names[device];
}

int kvd_gpu_same(const kvd_client *c, const void *at, int device, struct kvd_error *err)
{
    const char *theirs = c->opened ? c->opened->device_uuid : "", *ours = uuid_of(device);
    // An older kvd does not say, and kvd itself refuses what it cannot map.
    if (!theirs[0] || !ours[0] || strcmp(theirs, ours) == 0)
        return KVD_OK;
    if (kvd_client_hung_up(c, 0)) // the next one may be on this GPU
        return kvd_fail(err, KVD_E_UNAVAILABLE, "kvd has gone");
    return kvd_fail(err, KVD_E_PRECONDITION,
                    "the memory at %p is on CUDA device %d, %s, and kvd runs on %s: a kvd is "
                    "wanted there (--backend cuda, --device), and its address",
                    at, device, ours, theirs);
}

// A stream of its own: to ask for the default one is an error while another thread captures a
// graph.
static cudaError_t state_of(int device)
{
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaStream_t stream;
    int before = 0;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaError_t rc = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (rc == cudaSuccess) {
        rc = cudaStreamQuery(stream);
        cudaStreamDestroy(stream);
    }
    cudaGetLastError();
    cudaSetDevice(before);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return rc;
}

bool kvd_gpu_lost(kvd_client *c, struct kvd_error *err)
{
    int device = -1;
    pthread_mutex_lock(&c->buffers_lock);
    for (const kvd_buffer *b = c->buffers; b && device < 0; b = b->next)
        if ((b->kind == KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_IPC && b->data) ||
            b->n_segments)
            device = b->device;
    pthread_mutex_unlock(&c->buffers_lock);
    cudaError_t rc = device < 0 ? cudaSuccess : state_of(device);
    if (rc == cudaSuccess || rc == cudaErrorNotReady || rc == cudaErrorMemoryAllocation)
        return false;
    kvd_fail(err, KVD_E_INTERNAL,
             "the GPU is lost to this process (%s), after a fault of its own or of another client "
             "of MPS; end it: under MPS neither kvd nor anybody else gets the GPU again before",
             cudaGetErrorString(rc));
    return true;
}

int kvd_gpu_map(void *data, uint64_t bytes, uint64_t *device, struct kvd_error *err)
{
    void *at = NULL;
    cudaError_t rc = cudaHostRegister(data, bytes, cudaHostRegisterMapped);
    if (rc == cudaSuccess)
        rc = cudaHostGetDevicePointer(&at, data, 0);
    *device = (uint64_t)(uintptr_t)at;
    return kvd_cuda_status((int)rc, "sharing counters with the GPU", err);
}

void kvd_gpu_unmap(void *data)
{
    cudaHostUnregister(data);
    cudaGetLastError();
}

int kvd_gpu_order(void *stream, uint64_t write_at, uint64_t wait_at, uint32_t value,
                  struct kvd_error *err)
{
    static PFN_cuStreamWriteValue32_v11070 write_value;
    static PFN_cuStreamWaitValue32_v11070 wait_value;
    enum cudaDriverEntryPointQueryResult found;
    if (!wait_value &&
        (cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", (void **)&write_value, 12000,
                                          cudaEnableDefault, &found) != cudaSuccess ||
         cudaGetDriverEntryPointByVersion("cuStreamWaitValue32", (void **)&wait_value, 12000,
                                          cudaEnableDefault, &found) != cudaSuccess ||
         !write_value || !wait_value)) // that there are none is no failure of asking
        return kvd_fail(err, KVD_E_UNSUPPORTED, "the CUDA driver has no stream memory operations");
    CUresult rc = write_value(stream, write_at, value, CU_STREAM_WRITE_VALUE_DEFAULT);
    if (rc == CUDA_SUCCESS)
        rc = wait_value(stream, wait_at, value, CU_STREAM_WAIT_VALUE_GEQ);
    return rc == CUDA_SUCCESS
               ? KVD_OK
               : kvd_fail(err, KVD_E_INVALID,
                          "the stream takes no memory operations (CUDA error %d)", (int)rc);
}

#else

int kvd_gpu_map(void *data, uint64_t bytes, uint64_t *device, struct kvd_error *err)
{
    (void)data;
    (void)bytes;
    (void)device;
    return kvd_fail(err, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
}

void kvd_gpu_unmap(void *data)
{
    (void)data;
}

int kvd_gpu_extent(const void *data, uint64_t bytes, struct kvd_gpu_extent *out,
                   struct kvd_error *err)
{
    (void)data;
    (void)bytes;
    (void)out;
    return kvd_fail(err, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
}

int kvd_gpu_export(const struct kvd_gpu_segment *segment, int device, int *fd,
                   struct kvd_error *err)
{
    (void)segment;
    (void)device;
    (void)fd;
    return kvd_fail(err, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
}

int kvd_gpu_same(const kvd_client *c, const void *at, int device, struct kvd_error *err)
{
    (void)c;
    (void)at;
    (void)device;
    (void)err;
    return KVD_OK;
}

bool kvd_gpu_lost(kvd_client *c, struct kvd_error *err)
{
    (void)c;
    (void)err;
    return false;
}

int kvd_gpu_order(void *stream, uint64_t write_at, uint64_t wait_at, uint32_t value,
                  struct kvd_error *err)
{
    (void)stream;
    (void)write_at;
    (void)wait_at;
    (void)value;
    return kvd_fail(err, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
}

kvd_result kvd_buffer_cuda(kvd_client *c, void *data, uint64_t bytes, kvd_buffer **out,
                           kvd_failure *err)
{
    struct kvd_error e = {0};
    (void)c;
    (void)data;
    (void)bytes;
    (void)out;
    kvd_fail(&e, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
    return kvd_client_fail(err, &e);
}

#endif
