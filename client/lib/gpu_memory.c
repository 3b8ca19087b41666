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

int kvd_gpu_allocation(const void *data, uintptr_t *base_at, uint64_t *bytes, struct kvd_error *err)
{
    PFN_cuMemGetAddressRange_v3020 range = NULL;
    enum cudaDriverEntryPointQueryResult found;
    CUdeviceptr base = 0;
    size_t size = 0;
    if (cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", (void **)&range, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        !range || range(&base, &size, (CUdeviceptr)(uintptr_t)data) != CUDA_SUCCESS) {
        cudaGetLastError();
        return kvd_fail(err, KVD_E_INVALID, "%p is not GPU memory of this process", data);
    }
    *base_at = (uintptr_t)base;
    *bytes = size;
    return KVD_OK;
}

// The allocation that holds `data`: its IPC handle and where it begins.
static int export_ipc(void *data, cudaIpcMemHandle_t *handle, uint64_t *offset,
                      struct kvd_error *err)
{
    uintptr_t base = 0;
    uint64_t size = 0;
    if (kvd_gpu_allocation(data, &base, &size, err))
        return err->code;
    cudaError_t rc = cudaIpcGetMemHandle(handle, (void *)base);
    if (rc != cudaSuccess) {
        cudaGetLastError();
        return kvd_fail(
            err, KVD_E_INVALID,
            "the memory at %p has no IPC handle (%s): it must come from cudaMalloc; for "
            "cuMemCreate (PyTorch's expandable_segments) use kvd_buffer_cuda_fd",
            data, cudaGetErrorString(rc));
    }
    *offset = (uintptr_t)data - base;
    return KVD_OK;
}

kvd_result kvd_buffer_cuda(kvd_client *c, void *data, uint64_t bytes, kvd_buffer **out,
                           kvd_failure *err)
{
    struct kvd_error e = {0};
    KVD_WANT(err, "client", c, "data", data, "out", out);
    cudaIpcMemHandle_t handle;
    uint64_t offset = 0;
    if (kvd_fork_check(c, &e) || export_ipc(data, &handle, &offset, &e))
        return kvd_client_fail(err, &e);
    kvd_buffer b = {.kind = KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_IPC,
                    .fd = -1,
                    .at = offset,
                    .size = bytes,
                    .data = data};
    struct cudaPointerAttributes a;
    b.device = cudaPointerGetAttributes(&a, data) == cudaSuccess ? a.device : 0;
    memcpy(b.ipc, &handle, sizeof(b.ipc));
    if (offset <= UINT64_MAX - bytes)
        return add(c, &b, out, err);
    kvd_fail(&e, KVD_E_INVALID, "offset and size overflow 64 bits");
    return kvd_client_fail(err, &e);
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
        if (b->kind == KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__CUDA_IPC && b->data)
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

int kvd_gpu_allocation(const void *data, uintptr_t *base, uint64_t *bytes, struct kvd_error *err)
{
    (void)data;
    (void)base;
    (void)bytes;
    return kvd_fail(err, KVD_E_UNSUPPORTED, "this libkvd was built without CUDA");
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
