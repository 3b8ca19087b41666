// The CUDA backend's ops table: device, rotation sets, staging.
#include "kernels/cuda/cuda.h"

static struct kvd_cuda *cuda_of(void *b)
{
    return b;
}

int kvd_cuda_status(int rc, const char *doing, struct kvd_error *err)
{
    if (rc == 0)
        return KVD_OK;
    if (rc < 0)
        return kvd_fail(err, KVD_E_UNSUPPORTED, "%s: this shape is not supported on CUDA", doing);
    cudaGetLastError(); // an error that is not sticky is reported once
    return kvd_fail(err, rc == cudaErrorMemoryAllocation ? KVD_E_FULL : KVD_E_INTERNAL, "%s: %s",
                    doing, cudaGetErrorString((cudaError_t)rc));
}

static int queue(const struct kvd_copy *copies, uint32_t n, cudaStream_t stream)
{
    int rc = 0;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        const struct kvd_copy *one = &copies[i];
        void *to = (void *)(uintptr_t)one->to;
        const void *from = (const void *)(uintptr_t)one->from;
        if (one->pieces > 1)
            rc = cudaMemcpy2DAsync(to, one->to_stride, from, one->from_stride, one->bytes,
                                   one->pieces, cudaMemcpyDefault, stream);
        else
            rc = cudaMemcpyAsync(to, from, one->bytes, cudaMemcpyDefault, stream);
    }
    return rc;
}

static int copy(struct kvd_backend *b, const struct kvd_copy *copies, uint32_t n,
                struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    int rc = queue(copies, n, c->stream);
    if (rc == 0)
        rc = cudaStreamSynchronize(c->stream);
    return kvd_cuda_status(rc, "copying pages", err);
}

static int copy_begin(struct kvd_backend *b, const struct kvd_copy *copies, uint32_t n,
                      uint32_t which, struct kvd_error *err)
{
    struct kvd_cuda_copying *c = &cuda_of(b)->copying;
    int rc = queue(copies, n, c->stream);
    int noted = cudaEventRecord(c->done[which], c->stream); // of what was queued until it failed
    return kvd_cuda_status(rc ? rc : noted, "copying pages", err);
}

static int copy_end(struct kvd_backend *b, uint32_t which, struct kvd_error *err)
{
    return kvd_cuda_status(cudaEventSynchronize(cuda_of(b)->copying.done[which]), "copying pages",
                           err);
}

static cudaError_t copying_init(struct kvd_cuda_copying *c)
{
    cudaError_t rc = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    for (size_t i = 0; i < KVD_LEN(c->done) && rc == cudaSuccess; i++)
        rc = cudaEventCreateWithFlags(&c->done[i], cudaEventDisableTiming);
    return rc;
}

static void copying_deinit(struct kvd_cuda_copying *c)
{
    for (size_t i = 0; i < KVD_LEN(c->done); i++)
        if (c->done[i])
            cudaEventDestroy(c->done[i]);
    if (c->stream)
        cudaStreamDestroy(c->stream);
}

static int host_pin(struct kvd_backend *b, void *at, uint64_t bytes, struct kvd_error *err)
{
    cudaSetDevice(cuda_of(b)->index);
    int rc = cudaHostRegister(at, bytes, cudaHostRegisterPortable);
    if (rc)
        cudaGetLastError();
    return kvd_cuda_status(rc, "pinning host memory", err);
}

static void host_unpin(void *at)
{
    if (cudaHostUnregister(at) != cudaSuccess)
        cudaGetLastError();
}

// -- rotation sets -------------------------------------------------------------------------------

static void rotation_free(struct kvd_backend *b, struct kvd_rotation **rp)
{
    struct kvd_rotation *r = KVD_TAKE(*rp);
    if (!r)
        return;
    cudaSetDevice(cuda_of(b)->index);
    cudaFree(r->memory);
    free(r);
}

// What one side has in device memory, in this order.
enum {
    QUERIES,
    FORWARD,
    INVERSE,
    FORWARD_F32,
    INVERSE_F32,
    COLUMNS,
    SCALE,
    CLIP,
    GAIN,
    TRANSFORMS, // of both sides, K's side only
    N_ARRAYS
};

// Offsets of the arrays; returns how many bytes they have together.
static uint64_t side_layout(uint64_t matrices, uint32_t dim, bool v, uint64_t at[N_ARRAYS])
{
    uint64_t operands = kvd_cuda_operand_bytes(matrices, dim), floats = matrices * sizeof(float);
    const uint64_t sizes[N_ARRAYS] = {[QUERIES] = v ? 0 : 2 * operands,
                                      [FORWARD] = 2 * operands,
                                      [INVERSE] = operands,
                                      [FORWARD_F32] = floats * dim * dim,
                                      [INVERSE_F32] = floats * dim * dim,
                                      [COLUMNS] = floats * dim,
                                      [SCALE] = floats,
                                      [CLIP] = floats,
                                      [GAIN] = floats,
                                      [TRANSFORMS] =
                                          v ? 0 : matrices * sizeof(struct kvd_cuda_transform)};
    uint64_t bytes = 0;
    for (int i = 0; i < N_ARRAYS; bytes += kvd_round_up(sizes[i++], 16))
        at[i] = bytes;
    return kvd_round_up(bytes, 256);
}

static void transpose(const float *from, uint64_t matrices, uint32_t dim, float *to)
{
    for (uint64_t m = 0; m < matrices; m++)
        for (uint32_t i = 0; i < dim; i++)
            for (uint32_t j = 0; j < dim; j++)
                to[(m * dim + j) * dim + i] = from[(m * dim + i) * dim + j];
}

#define ARRAY(memory, i, type) ((type *)(void *)((memory) + at[i]))

// A side's matrices, and their inverses, in plain fp32. NULL: identity; transposes.
struct side {
    const float *a, *inverse, *clip, *gain;
    uint64_t matrices;
    uint32_t dim;
    bool v;
};

// Lays a side out in `host` as it will lie at `device`; operands as those of rotations.
static struct kvd_cuda_matrices side_new(const struct side *s, uint8_t *host, uint8_t *device)
{
    uint64_t at[N_ARRAYS], n = s->matrices * s->dim * s->dim;
    side_layout(s->matrices, s->dim, s->v, at);
    float *plain = ARRAY(host, FORWARD_F32, float);
    bool identity = !s->a && !s->inverse;
    memset(plain, 0, n * sizeof(float));
    if (s->a)
        memcpy(plain, s->a, n * sizeof(float));
    for (uint64_t i = 0; i < s->matrices * s->dim && !s->a; i++)
        plain[i * s->dim + i % s->dim] = 1;
    if (s->inverse)
        memcpy(ARRAY(host, INVERSE_F32, float), s->inverse, n * sizeof(float));
    else
        transpose(plain, s->matrices, s->dim, ARRAY(host, INVERSE_F32, float));
    kvd_cuda_rotation_pack(plain, s->matrices, s->dim, s->v ? NULL : ARRAY(host, QUERIES, uint16_t),
                           ARRAY(host, FORWARD, uint16_t), ARRAY(host, INVERSE, uint16_t),
                           ARRAY(host, SCALE, float), ARRAY(host, COLUMNS, float));
    if (s->clip)
        memcpy(ARRAY(host, CLIP, float), s->clip, s->matrices * sizeof(float));
    if (s->gain)
        memcpy(ARRAY(host, GAIN, float), s->gain, s->matrices * sizeof(float));
    return (struct kvd_cuda_matrices){
        .queries = s->v ? NULL : ARRAY(device, QUERIES, uint16_t),
        .forward = ARRAY(device, FORWARD, uint16_t),
        .inverse = ARRAY(device, INVERSE, uint16_t),
        .forward_f32 = identity ? NULL : ARRAY(device, FORWARD_F32, float),
        .inverse_f32 = identity ? NULL : ARRAY(device, INVERSE_F32, float),
        .inverse_columns = ARRAY(device, COLUMNS, float),
        .scale = ARRAY(device, SCALE, float),
        .clip = s->clip ? ARRAY(device, CLIP, float) : NULL,
        .gain = s->gain ? ARRAY(device, GAIN, float) : NULL};
}

// What tc2 and tc2.5 want beside that; of transforms, operands in the place of rotations'.
static void transforms_new(const struct kvd_rotation_data *d, uint8_t *k, uint8_t *v)
{
    uint64_t n = (uint64_t)d->n_layers * d->heads, at[N_ARRAYS];
    struct kvd_cuda_transform_operands o;
    side_layout(n, d->dim_v, true, at);
    o.forward_v = ARRAY(v, FORWARD, uint16_t);
    o.inverse_v = ARRAY(v, INVERSE, uint16_t);
    o.scale_v = ARRAY(v, SCALE, float);
    side_layout(n, d->dim_k, false, at);
    o.queries = ARRAY(k, QUERIES, uint16_t);
    o.forward_k = ARRAY(k, FORWARD, uint16_t);
    o.scale_k = ARRAY(k, SCALE, float);
    for (uint64_t i = 0; i < n; i++)
        kvd_cuda_transform_pack(d, i, &o, ARRAY(k, TRANSFORMS, struct kvd_cuda_transform) + i);
}

static struct kvd_rotation *rotation_new(struct kvd_backend *b, const struct kvd_rotation_data *d,
                                         struct kvd_error *err)
{
    cudaSetDevice(cuda_of(b)->index);
    uint64_t n = (uint64_t)d->n_layers * d->heads;
    if (d->dim_v > KVD_MAX_HEAD_DIM && kvd_cuda_is_transform(d)) {
        kvd_fail(err, KVD_E_UNSUPPORTED,
                 "a set of transforms of latents: the CUDA backend has kernels for rotations of "
                 "them only");
        return NULL;
    }
    uint64_t at[N_ARRAYS], v = side_layout(n, d->dim_v, true, at);
    uint64_t k = side_layout(n, d->dim_k, false, at);
    struct kvd_rotation *r = calloc(1, sizeof(*r));
    uint8_t *host KVD_FREE = malloc(k + v);
    void *memory = NULL;
    if (!r || !host || cudaMalloc(&memory, k + v) != cudaSuccess) {
        cudaGetLastError();
        free(r);
        char size[32];
        kvd_fail(err, KVD_E_FULL, "out of memory for a rotation set (%s on the GPU)",
                 kvd_format_size(k + v, size, sizeof(size)));
        return NULL;
    }
    r->memory = memory;
    r->dim_k = d->dim_k;
    r->dim_v = d->dim_v;
    r->device.n_layers = d->n_layers;
    r->device.heads = d->heads;
    const struct side sides[2] = {{d->k, d->k_inverse, d->clip_k, d->gain_k, n, d->dim_k, false},
                                  {d->v, d->v_inverse, d->clip_v, d->gain_v, n, d->dim_v, true}};
    r->transform = kvd_cuda_is_transform(d);
    r->device.k = side_new(&sides[0], host, r->memory);
    r->device.v = side_new(&sides[1], host + k, r->memory + k);
    transforms_new(d, host, host + k);
    r->device.transforms = ARRAY(r->memory, TRANSFORMS, const struct kvd_cuda_transform);
    r->device.k.scale_kind = d->scale_k;
    r->device.v.scale_kind = d->scale_v;
    int rc = cudaMemcpy(r->memory, host, k + v, cudaMemcpyHostToDevice);
    if (rc == 0) // it may return before all has arrived, and the executor's stream does not wait
        rc = cudaStreamSynchronize(NULL);
    if (kvd_cuda_status(rc, "loading a rotation set", err))
        rotation_free(b, &r);
    return r;
}

#undef ARRAY

int kvd_cuda_rotation_check(const struct kvd_rotation *r, struct kvd_codecs codec,
                            struct kvd_error *err)
{
    char text[KVD_CODECS_TEXT];
    bool known = true; // bf16 is not turned
    for (int v = 0; v < 2; v++)
        known &=
            kvd_codec_tc(kvd_codecs_side(codec, v)) || kvd_codecs_side(codec, v) == KVD_CODEC_BF16;
    if (!r || !r->transform || known)
        return KVD_OK;
    return kvd_fail(err, KVD_E_UNSUPPORTED,
                    "codec %s: the set has transforms, with inverses and means of their own, for "
                    "which the CUDA backend has kernels of tc2 and tc2.5 only",
                    kvd_codecs_name(codec, text));
}

// -- staging -------------------------------------------------------------------------------------

int kvd_stage_begin(struct kvd_cuda *c, uint64_t bytes, struct kvd_error *err)
{
    struct kvd_stage *s = &c->stage;
    cudaSetDevice(c->index);
    s->used = 0;
    if (bytes <= s->size)
        return KVD_OK;
    bytes = kvd_round_up(bytes + bytes / 4, 1 << 20);
    void *host = NULL, *device = NULL;
    int rc = cudaMallocHost(&host, bytes);
    if (rc == 0)
        rc = cudaMalloc(&device, bytes);
    if (rc) {
        cudaFreeHost(host);
        return kvd_cuda_status(rc, "making room for a call's tensors", err);
    }
    cudaFreeHost(s->host);
    cudaFree(s->device);
    *s = (struct kvd_stage){.host = host, .device = device, .size = bytes};
    return KVD_OK;
}

uint64_t kvd_stage_take(struct kvd_cuda *c, uint64_t bytes)
{
    uint64_t at = c->stage.used;
    c->stage.used += kvd_stage_bytes(bytes);
    return at;
}

int kvd_stage_upload(struct kvd_cuda *c, uint64_t from, uint64_t to, struct kvd_error *err)
{
    int rc = to > from ? cudaMemcpyAsync(c->stage.device + from, c->stage.host + from, to - from,
                                         cudaMemcpyHostToDevice, c->stream)
                       : cudaSuccess;
    return kvd_cuda_status(rc, "uploading", err);
}

int kvd_stage_download(struct kvd_cuda *c, uint64_t from, uint64_t to, struct kvd_error *err)
{
    int rc = to > from ? cudaMemcpyAsync(c->stage.host + from, c->stage.device + from, to - from,
                                         cudaMemcpyDeviceToHost, c->stream)
                       : cudaSuccess;
    return kvd_cuda_status(rc, "downloading", err);
}

int kvd_stage_wait(struct kvd_cuda *c, struct kvd_error *err)
{
    return kvd_cuda_status(cudaStreamSynchronize(c->stream), "waiting for the GPU", err);
}

bool kvd_in_place(const struct kvd_tensor *t)
{
    uint64_t all =
        (uint64_t)(uintptr_t)t->data | t->layer_stride | t->token_stride | t->head_stride;
    return t->on_device && all % 16 == 0;
}

// Copies rows between a host tensor and its staged place.
static void exchange(struct kvd_cuda *c, const struct kvd_staged *s, bool in)
{
    const struct kvd_tensor *t = s->tensor;
    uint64_t row = s->dim * kvd_dtype_size(t->dtype), run = s->heads * row;
    bool dense = t->head_stride == row;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t i = 0; i < s->tokens; i++) {
            uint8_t *theirs =
                t->data + (uint64_t)(s->layer0 + l) * t->layer_stride + i * t->token_stride;
            uint8_t *ours = c->stage.host + s->at + l * s->layer_stride + i * run;
            for (uint32_t h = 0; h < (dense ? 1 : s->heads); h++) {
                uint8_t *a = theirs + h * t->head_stride, *b = ours + h * row;
                memcpy(in ? b : a, in ? a : b, dense ? run : row);
            }
        }
}

void kvd_stage_pack(struct kvd_cuda *c, const struct kvd_staged *s)
{
    if (!s->tensor->on_device)
        exchange(c, s, true);
}

void kvd_stage_unpack(struct kvd_cuda *c, const struct kvd_staged *s)
{
    if (!s->tensor->on_device)
        exchange(c, s, false);
}

static int device_copy(struct kvd_cuda *c, const struct kvd_staged *s, bool in,
                       struct kvd_error *err)
{
    const struct kvd_tensor *t = s->tensor;
    if (s->in_place || !t->on_device)
        return KVD_OK;
    struct kvd_cuda_tensor ours = kvd_device_tensor(c, s);
    struct kvd_cuda_tensor theirs = {t->data + (uint64_t)s->layer0 * t->layer_stride,
                                     t->layer_stride, t->token_stride, t->head_stride, t->dtype};
    return kvd_cuda_status(kvd_cuda_copy(in ? &theirs : &ours, in ? &ours : &theirs, s->layers,
                                         s->tokens, s->heads, s->dim, c->stream),
                           "copying a tensor", err);
}

int kvd_stage_gather(struct kvd_cuda *c, const struct kvd_staged *s, struct kvd_error *err)
{
    return device_copy(c, s, true, err);
}

int kvd_stage_scatter(struct kvd_cuda *c, const struct kvd_staged *s, struct kvd_error *err)
{
    return device_copy(c, s, false, err);
}

// -- the backend ---------------------------------------------------------------------------------

static void cuda_free(struct kvd_backend *b)
{
    struct kvd_cuda *c = cuda_of(b);
    cudaFreeHost(c->stage.host);
    cudaFree(c->stage.device);
    cudaFree(c->scratch);
    cudaFree(c->dense);
    cudaFreeHost(c->found);
    copying_deinit(&c->copying);
    kvd_cuda_summing_deinit(&c->summing);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    if (c->mem_stream)
        cudaStreamDestroy(c->mem_stream);
    free(c);
}

static const char *device(const struct kvd_backend *b)
{
    return ((const struct kvd_cuda *)b)->device;
}

static const char *uuid(const struct kvd_backend *b)
{
    return ((const struct kvd_cuda *)b)->uuid;
}

// A fault in a kernel, or in one of another client of MPS, stays with every later call.
static bool lost(struct kvd_backend *b)
{
    cudaSetDevice(cuda_of(b)->index);
    cudaGetLastError();
    cudaError_t rc = cudaStreamQuery(cuda_of(b)->mem_stream);
    return rc != cudaSuccess && rc != cudaErrorNotReady;
}

// Whether there are kernels for a codec, which is one of the table's.
static bool served(uint32_t codec)
{
    enum { NO_FAMILY, INT2, INT2C, LEVELS2, LEVELS3, LEVELS4, INT4, TC };
    static const int families[] = {
#define KVD_CODEC(id, number, name, bits, param_bytes, levels, kernel, transform)                  \
    [KVD_CODEC_##id] = (kernel),
#include "proto/codecs.def"
    };
    return families[codec] != NO_FAMILY;
}

// Bytes of shared memory that a block over latents takes (attend_latent.cu, quantize_latent.cu), on
// any GPU.
enum { LATENT_SHARED = 160 << 10 };

static int latent_check(const struct kvd_cuda *c, struct kvd_error *err)
{
    int limit = 0;
    int rc = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, c->index);
    if (rc)
        return kvd_cuda_status(rc, "asking how much shared memory a block may have", err);
    if (limit < LATENT_SHARED)
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "latent planes (MLA): the CUDA backend's kernels for them want %d KB of "
                        "shared memory a block, and this GPU has %d; the CPU's serve them",
                        LATENT_SHARED >> 10, limit >> 10);
    return KVD_OK;
}

static int plane_check(const struct kvd_backend *b, const struct kvd_plane *p,
                       struct kvd_error *err)
{
    char text[KVD_CODECS_TEXT];
    if (p->latent)
        return latent_check((const struct kvd_cuda *)b, err);
    if (!served(p->codec.k) || !served(p->codec.v))
        return kvd_fail(err, KVD_E_UNSUPPORTED, "codec %s: the CUDA backend has no kernels for it",
                        kvd_codecs_name(p->codec, text));
    return KVD_OK;
}

static bool plane_tuned(const struct kvd_plane *p)
{
    return kvd_cuda_attend_tuned(p->codec, p->head_dim_k, p->head_dim_v);
}

static const struct kvd_backend_ops cuda_ops = {
    .name = "cuda",
    .on_device = true,
    .free = cuda_free,
    .device = device,
    .uuid = uuid,
    .plane_check = plane_check,
    .plane_tuned = plane_tuned,
    .arena_new = kvd_cuda_arena_new,
    .arena_free = kvd_cuda_arena_free,
    .extent_make = kvd_cuda_extent_make,
    .extent_drop = kvd_cuda_extent_drop,
    .extent_zero = kvd_cuda_extent_zero,
    .extent_export = kvd_cuda_extent_export,
    .extent_import = kvd_cuda_extent_import,
    .extent_descriptor = kvd_cuda_extent_descriptor,
    .extent_adopt = kvd_cuda_extent_adopt,
    .foreign_map = kvd_cuda_foreign_map,
    .foreign_unmap = kvd_cuda_foreign_unmap,
    .segments_reserve = kvd_cuda_segments_reserve,
    .segments_map = kvd_cuda_segments_map,
    .segments_unmap = kvd_cuda_segments_unmap,
    .memory_free = kvd_cuda_memory_free,
    .memory_total = kvd_cuda_memory_total,
    .lost = lost,
    .rotation_new = rotation_new,
    .rotation_free = rotation_free,
    .check = kvd_cuda_op_check,
    .append = kvd_cuda_op_append,
    .attend = kvd_cuda_op_attend,
    .step = kvd_cuda_op_step,
    .read = kvd_cuda_op_read,
    .rotate = kvd_cuda_op_rotate,
    .copy = copy,
    .copy_begin = copy_begin,
    .copy_end = copy_end,
    .dense = kvd_cuda_op_dense,
    .paged = kvd_cuda_op_paged,
    .dense_most = KVD_CUDA_DENSE_MOST,
    .sums = kvd_cuda_op_sums,
    .host_pin = host_pin,
    .host_unpin = host_unpin,
};

void kvd_cuda_write_uuid(const cudaUUID_t *from, char to[KVD_CUDA_UUID])
{
    uint8_t b[16];
    _Static_assert(sizeof(*from) == sizeof(b), "a UUID");
    memcpy(b, from, sizeof(b));
    snprintf(to, KVD_CUDA_UUID,
             "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
             b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14],
             b[15]);
}

static int init(struct kvd_cuda *c, uint32_t index, struct kvd_error *err)
{
    int n = 0;
    cudaError_t rc = cudaGetDeviceCount(&n);
    if (rc != cudaSuccess)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "no usable CUDA driver: %s",
                        cudaGetErrorString(rc));
    if (index >= (uint32_t)n)
        return kvd_fail(err, KVD_E_NOT_FOUND, "there is no CUDA device %u; %d are visible", index,
                        n);
    struct cudaDeviceProp prop;
    rc = cudaGetDeviceProperties(&prop, (int)index);
    if (rc == cudaSuccess && prop.major < 8)
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "%s has compute capability %d.%d; kvd wants 8.0 or later", prop.name,
                        prop.major, prop.minor);
    if (rc == cudaSuccess)
        rc = cudaSetDevice((int)index);
    int code = rc == cudaSuccess ? kvd_cuda_code_check() : cudaSuccess;
    if (code != cudaSuccess)
        return kvd_fail(
            err, KVD_E_UNSUPPORTED,
            "CUDA device %u, %s of compute capability %d.%d, cannot run the kernels that "
            "were compiled: %s. They are for another GPU, or for a later driver; build "
            "kvd with -Dgpu_capability=%d.%d, or all",
            index, prop.name, prop.major, prop.minor, cudaGetErrorString((cudaError_t)code),
            prop.major, prop.minor);
    if (rc == cudaSuccess)
        rc = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (rc == cudaSuccess)
        rc = cudaStreamCreateWithFlags(&c->mem_stream, cudaStreamNonBlocking);
    if (rc == cudaSuccess)
        rc = cudaHostAlloc((void **)&c->found, sizeof(*c->found), cudaHostAllocMapped);
    if (rc == cudaSuccess)
        rc = copying_init(&c->copying);
    if (rc == cudaSuccess)
        rc = kvd_cuda_summing_init(&c->summing);
    if (rc != cudaSuccess)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "CUDA device %u cannot be used: %s", index,
                        cudaGetErrorString(rc));
    int status = kvd_cuda_memory_init(c, err);
    if (status)
        return status;
    char size[32];
    snprintf(c->device, sizeof(c->device), "%.64s, %s", prop.name,
             kvd_format_size(prop.totalGlobalMem, size, sizeof(size)));
    kvd_cuda_write_uuid(&prop.uuid, c->uuid);
    c->multiprocessors = (uint32_t)prop.multiProcessorCount;
    c->piece_ns = 2000000;
    return KVD_OK;
}

struct kvd_backend *kvd_cuda_backend_new(uint32_t index, struct kvd_error *err)
{
    struct kvd_cuda *c = calloc(1, sizeof(*c));
    if (!c) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    c->base.ops = &cuda_ops;
    c->index = (int)index;
    if (init(c, index, err)) {
        cuda_free(&c->base);
        return NULL;
    }
    return &c->base;
}

struct kvd_backend *kvd_cuda_backend_current(struct kvd_error *err)
{
    int index = 0;
    if (cudaGetDevice(&index) != cudaSuccess) {
        cudaGetLastError();
        kvd_fail(err, KVD_E_UNAVAILABLE, "no usable CUDA device");
        return NULL;
    }
    return kvd_cuda_backend_new((uint32_t)index, err);
}
