// Many processes on one GPU, against a kvd that runs there: workers of several namespaces at once,
// hostile ones, and ones that are killed. Every worker is this program again, as a child.
// usage: gpu_processes ADDRESS E2E_DIRECT [CYCLES]
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "admin.pb-c.h"
#include "client/lib/direct.h"
#include "kernels/cuda/cuda.h"

enum { LAYERS = 4, HEADS = 8, KV = 2, DIM = 128, TOKENS = 1024 };
static const uint64_t BYTES = (uint64_t)LAYERS * TOKENS * KV * DIM * 2;

static const char *address;
static int ready_fd = -1; // a child's: it has reached what it was to reach
static struct kvd_channel *channel;
static int passed, failed;

static void result(bool ok, const char *what)
{
    passed += ok;
    failed += !ok;
    printf("%s: %s\n", ok ? "ok" : "FAILED", what);
}

static double now(void) // ms
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec * 1e-6;
}

// -- in a child ---------------------------------------------------------------------------------

static kvd_client *client;
static kvd_failure failure;
#define ERR (&failure)

static void need(int rc)
{
    if (rc) {
        fprintf(stderr, "a worker: %s\n", failure.text[0] ? failure.text : "CUDA failed");
        _exit(1);
    }
}

static void ready(void)
{
    if (write(ready_fd, "x", 1) != 1)
        _exit(1);
}

static void open_client(const char *namespace_name)
{
    static const uint32_t layers[LAYERS] = {0, 1, 2, 3};
    kvd_options o = {.size = sizeof(o),
                     .address = address,
                     .namespace_name = namespace_name,
                     .client_name = "child",
                     .layers = layers,
                     .n_layers = LAYERS,
                     .q_heads = HEADS,
                     .kv_heads = KV,
                     .head_dim_k = DIM,
                     .head_dim_v = DIM};
    need(kvd_open(&o, &client, ERR));
}

static kvd_buffer *gpu_buffer(void **at)
{
    kvd_buffer *b;
    void *p;
    need(cudaMalloc(&p, 2 * BYTES));
    need(cudaMemset(p, 0x3f, 2 * BYTES));
    need(cudaDeviceSynchronize());
    need(kvd_buffer_cuda(client, p, 2 * BYTES, &b, ERR));
    if (at)
        *at = p;
    return b;
}

static kvd_result append(uint64_t id, kvd_buffer *b, uint64_t at, uint32_t tokens)
{
    kvd_item item = {.size = sizeof(item),
                     .sequence = id,
                     .position = at,
                     .tokens = tokens,
                     .k = {b},
                     .v = {b, .offset = BYTES}};
    return kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR);
}

static void child_cpu_buffer(void) // no CUDA context: quick
{
    kvd_buffer *b;
    uint64_t id;
    open_client("default");
    need(kvd_buffer_new(client, 2 * BYTES, &b, ERR));
    need(kvd_sequences_create(client, 1, &id, ERR));
    need(append(id, b, 0, 500));
    ready();
    pause();
}

static void child_opened(void)
{
    open_client("default");
    ready();
    pause();
}

static void child_buffers(void)
{
    open_client("default");
    for (int i = 0; i < 8; i++)
        gpu_buffer(NULL);
    ready();
    pause();
}

static void child_appending(void)
{
    uint64_t id;
    open_client("default");
    kvd_buffer *b = gpu_buffer(NULL);
    need(kvd_sequences_create(client, 1, &id, ERR));
    need(append(id, b, 0, TOKENS));
    ready();
    for (uint64_t at = TOKENS;; at += TOKENS)
        need(append(id, b, at, TOKENS));
}

static kvd_direct *bound_direct(void)
{
    uint64_t ids[4];
    kvd_direct *d;
    open_client("default");
    kvd_buffer *b = gpu_buffer(NULL);
    need(kvd_sequences_create(client, 4, ids, ERR));
    for (int i = 0; i < 4; i++)
        need(append(ids[i], b, 0, TOKENS));
    kvd_direct_options o = {.size = sizeof(o), .slots = 4, .max_tokens = 1 << 20};
    need(kvd_direct_open(client, &o, &d, ERR));
    for (uint32_t i = 0; i < 4; i++)
        need(kvd_direct_bind(d, i, ids[i], ERR));
    return d;
}

static void child_replaying(void)
{
    kvd_direct *d = bound_direct();
    uint8_t *memory;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    need(cudaMalloc((void **)&memory, 1 << 20));
    need(cudaMemset(memory, 0, 1 << 20));
    need(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    need(kvd_direct_begin(d, stream, ERR));
    need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 50; i++)
        for (uint32_t l = 0; l < LAYERS; l++) {
            uint64_t kv = 4 * KV * DIM * 2, q = 4 * HEADS * DIM * 2;
            need(kvd_store_enqueue(d, stream, l, memory, kv, memory, kv, ERR));
            need(kvd_attend_enqueue(d, stream, l, memory, q, memory + 65536, q, NULL, 0, ERR));
        }
    need(cudaStreamEndCapture(stream, &graph));
    need(cudaGraphInstantiate(&exec, graph, 0));
    need(cudaGraphLaunch(exec, stream));
    need(kvd_direct_end(d, stream, NULL, ERR));
    ready();
    for (;;) {
        need(kvd_direct_begin(d, stream, ERR));
        need(cudaGraphLaunch(exec, stream));
        need(kvd_direct_end(d, stream, NULL, ERR));
    }
}

// Writes into pages that are lent for reading: the fault is this process's own.
static void child_writing(void)
{
    kvd_direct *d = bound_direct();
    uint64_t page = d->planes[0].next_bf16[0];
    int rc = cudaMemset((void *)(uintptr_t)page, 0xff, 4096);
    if (rc == 0)
        rc = cudaDeviceSynchronize();
    _exit(rc == 0); // no error: it was written
}

static kvd_result lie(kvd_result rc)
{
    return rc == KVD_ERR_INVALID ? 0 : 1;
}

static void child_lying(void)
{
    kvd_buffer *b;
    void *p;
    uint8_t handle[64];
    cudaIpcMemHandle_t real;
    int fd = memfd_create("x", 0);
    open_client("default");
    need(cudaMalloc(&p, 4 << 20));
    need(cudaIpcGetMemHandle(&real, p));
    need(lie(kvd_buffer_cuda_ipc(client, &real, 0, 5 << 20, &b, ERR)));
    need(lie(kvd_buffer_cuda_ipc(client, &real, 4 << 20, 16, &b, ERR)));
    need(lie(kvd_buffer_cuda_ipc(client, &real, UINT64_MAX - 8, 16, &b, ERR)));
    for (int i = 0; i < 64; i++)
        handle[i] = (uint8_t)(i * 37 + 11);
    need(lie(kvd_buffer_cuda_ipc(client, handle, 0, 4096, &b, ERR)));
    memcpy(handle, &real, 64);
    handle[20] ^= 0x55;
    kvd_buffer_cuda_ipc(client, handle, 0, 4096, &b, ERR); // whatever comes of it
    memset(handle, 0, sizeof(handle));
    need(lie(kvd_buffer_cuda_ipc(client, handle, 0, 4096, &b, ERR)));
    need(lie(kvd_buffer_cuda_fd(client, fd, 2 << 20, &b, ERR)));
    need(lie(kvd_buffer_cuda_fd(client, 2, 2 << 20, &b, ERR)));
    // Twice the same memory; the one that stays must stay good.
    kvd_buffer *one, *two;
    uint64_t id;
    need(cudaMemset(p, 0, 4 << 20));
    need(kvd_buffer_cuda(client, p, 4 << 20, &one, ERR));
    need(kvd_buffer_cuda(client, (uint8_t *)p + 4096, 2 << 20, &two, ERR));
    kvd_buffer_free(&one);
    need(kvd_sequences_create(client, 1, &id, ERR));
    kvd_item item = {.size = sizeof(item),
                     .sequence = id,
                     .tokens = 16,
                     .k = {two},
                     .v = {two, .offset = 1 << 20}};
    need(kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR));
    // Memory that is gone while kvd knows it: whatever comes of it, but kvd lives.
    need(cudaFree(p));
    item.position = 16;
    kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR);
    _exit(0);
}

// Memory by a descriptor of cuMemCreate.
static void child_by_fd(void)
{
    struct kvd_error err = {0};
    struct kvd_backend *b = kvd_cuda_backend_new(0, &err);
    struct kvd_arena *a = b ? b->ops->arena_new(b, 1, 2 << 20, &err) : NULL;
    int fd = -1;
    uint64_t id;
    kvd_buffer *buffer;
    need(!a || b->ops->extent_make(b, a, 0, &err) || b->ops->extent_export(b, a, 0, &fd, &err));
    open_client("default");
    need(kvd_buffer_cuda_fd(client, fd, 2 << 20, &buffer, ERR));
    need(lie(kvd_buffer_cuda_fd(client, fd, 4 << 20, &buffer, ERR)));
    need(kvd_sequences_create(client, 1, &id, ERR));
    kvd_item item = {.size = sizeof(item),
                     .sequence = id,
                     .tokens = 16,
                     .k = {buffer},
                     .v = {buffer, .offset = 1 << 20}};
    need(kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR));
    _exit(0);
}

// Memory of several segments side by side, as an allocator with expandable segments has it: more
// than go in one call. The buffer begins and ends within segments, K and V lie across their
// borders.
static void child_by_segments(void)
{
    enum { N = 70, ROWS = 16, ELEMENTS = LAYERS * ROWS * KV * DIM };
    const uint64_t unit = 2 << 20, inside = 4096, part = ELEMENTS * 2;
    static uint16_t given[2][ELEMENTS];
    struct kvd_error err = {0};
    struct kvd_backend *b = kvd_cuda_backend_new(0, &err);
    struct kvd_cuda *c = (struct kvd_cuda *)b;
    CUmemAllocationProp how = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                               .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                               .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemAccessDesc access = {.location = how.location,
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr at, border[N + 1] = {0};
    need(!b || c->driver.reserve(&at, 2 * N * unit, unit, 0, 0));
    border[0] = at;
    for (int i = 0; i < N; i++) {
        CUmemGenericAllocationHandle handle;
        const uint64_t bytes = unit * (1 + (uint64_t)(i % 2));
        need(c->driver.create(&handle, bytes, &how, 0));
        need(c->driver.map(border[i], bytes, 0, handle, 0));
        need(c->driver.release(handle)); // the mapping keeps it
        border[i + 1] = border[i] + bytes;
    }
    need(c->driver.set_access(at, border[N] - at, &access, 1));
    // From the first segment to the last but one, which is not registered.
    const CUdeviceptr from = at + inside, k = border[1] - part / 2, v = border[N - 2] - part / 2;
    const uint64_t size = border[N - 1] - inside - from;
    kvd_buffer *buffer, *host;
    open_client("default");
    need(kvd_buffer_cuda(client, (void *)(uintptr_t)from, size, &buffer, ERR));
    need(lie(kvd_buffer_cuda(client, (void *)(uintptr_t)from, border[N] - from + 1, &host, ERR)));
    for (int i = 0; i < 2 * ELEMENTS; i++)
        given[i / ELEMENTS][i % ELEMENTS] = (uint16_t)(0x3f00 + i * 7 % 256);
    need(cudaMemcpy((void *)(uintptr_t)k, given[0], part, cudaMemcpyHostToDevice));
    need(cudaMemcpy((void *)(uintptr_t)v, given[1], part, cudaMemcpyHostToDevice));
    need(cudaDeviceSynchronize());
    uint64_t id;
    need(kvd_sequences_create(client, 1, &id, ERR));
    kvd_item item = {.size = sizeof(item),
                     .sequence = id,
                     .tokens = ROWS,
                     .k = {buffer, .offset = k - from},
                     .v = {buffer, .offset = v - from}};
    need(kvd_append(client, (kvd_layers){0, 0}, &item, 1, ERR));
    need(kvd_buffer_new(client, 2 * part, &host, ERR));
    kvd_tensor_ref read_k = {host, .offset = 0}, read_v = {host, .offset = part};
    need(kvd_read_tokens(client, (kvd_layers){0, 0}, id, 0, ROWS, &read_k, &read_v, ERR));
    need(memcmp(kvd_buffer_data(host), given, 2 * part)); // the first tokens are exact
    kvd_buffer_free(&buffer);
    need(kvd_buffer_cuda(client, (void *)(uintptr_t)from, size, &buffer, ERR)); // and is left so
    _exit(0);
}

static void child_leaking(void)
{
    open_client("default");
    for (int i = 0; i < 2000; i++) {
        kvd_buffer *b;
        void *p;
        need(cudaMalloc(&p, 2 << 20));
        if (kvd_buffer_cuda(client, p, 2 << 20, &b, ERR))
            break;
    }
    if (failure.code != KVD_ERR_EXHAUSTED)
        _exit(1);
    ready();
    pause();
}

static void child_free_memory(void)
{
    size_t left, total;
    need(cudaMemGetInfo(&left, &total));
    if (write(ready_fd, &left, sizeof(left)) != sizeof(left))
        _exit(1);
    _exit(0);
}

static const struct {
    const char *name;
    void (*run)(void);
} children[] = {{"cpu buffer", child_cpu_buffer},
                {"opened", child_opened},
                {"buffers", child_buffers},
                {"appending", child_appending},
                {"replaying", child_replaying},
                {"writing", child_writing},
                {"lying", child_lying},
                {"by fd", child_by_fd},
                {"by segments", child_by_segments},
                {"leaking", child_leaking},
                {"free memory", child_free_memory}};

// -- in the parent ------------------------------------------------------------------------------

static pid_t start(const char *child, int *from)
{
    int p[2];
    char fd[16];
    if (pipe(p))
        exit(1);
    fcntl(p[0], F_SETFD, FD_CLOEXEC);
    snprintf(fd, sizeof(fd), "%d", p[1]);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) { // neither gRPC nor CUDA outlive a fork
        execl("/proc/self/exe", "gpu_processes", address, "child", child, fd, (char *)NULL);
        _exit(127);
    }
    close(p[1]);
    *from = p[0];
    return pid;
}

static int run_child(const char *name, int fd)
{
    ready_fd = fd;
    for (size_t i = 0; i < KVD_LEN(children); i++)
        if (strcmp(children[i].name, name) == 0)
            children[i].run();
    return 0;
}

static int finish(pid_t pid, int fd)
{
    int status;
    close(fd);
    waitpid(pid, &status, 0);
    return status;
}

static uint64_t free_memory(void)
{
    size_t left = 0;
    int fd;
    pid_t pid = start("free memory", &fd);
    ssize_t n = read(fd, &left, sizeof(left));
    finish(pid, fd);
    return n == sizeof(left) ? left : 0;
}

// Bytes of pages in use; *made gets those of extents that have memory.
static uint64_t pool_used(uint64_t *made)
{
    Kvd__V1__GetPoolRequest req = KVD__V1__GET_POOL_REQUEST__INIT;
    Kvd__V1__GetPoolReply *r;
    struct kvd_error err = {0};
    if (kvd_channel_call(channel, "/kvd.v1.Admin/GetPool", &req,
                         &kvd__v1__get_pool_reply__descriptor, 5000, &r, &err)) {
        printf("FAILED: kvd does not answer: %s\n", err.text);
        exit(1);
    }
    uint64_t used = r->used_bytes;
    if (made)
        *made = r->extents_made * r->extent_bytes;
    kvd__v1__get_pool_reply__free_unpacked(r, NULL);
    return used;
}

// ms until nothing is in use; 10,000 if that does not come.
static double until_free(void)
{
    double t0 = now();
    while (pool_used(NULL) && now() - t0 < 10000)
        continue;
    return now() - t0;
}

static void kill_at(const char *stage, const char *child, int times)
{
    double worst = 0;
    bool reached = true;
    char text[128], byte;
    for (int i = 0; i < times; i++) {
        int fd;
        pid_t pid = start(child, &fd);
        reached &= read(fd, &byte, 1) == 1;
        usleep((useconds_t)(i * 7919 % 30000));
        kill(pid, SIGKILL);
        double t = until_free();
        worst = t > worst ? t : worst;
        finish(pid, fd);
    }
    snprintf(text, sizeof(text), "%d workers killed %s: all free after at most %.0f ms", times,
             stage, worst);
    result(reached && worst < 1000, text);
}

static void cycles(int n)
{
    enum { LANES = 8 };
    pid_t pids[LANES];
    int fds[LANES], bad = 0;
    char text[128], byte;
    for (int i = 0; i < n; i += LANES) {
        for (int l = 0; l < LANES; l++)
            pids[l] = start(i / LANES % 10 == 9 ? "appending" : "cpu buffer", &fds[l]);
        for (int l = 0; l < LANES; l++)
            bad += read(fds[l], &byte, 1) != 1;
        for (int l = 0; l < LANES; l++) {
            kill(pids[l], SIGKILL);
            finish(pids[l], fds[l]);
        }
    }
    double t = until_free();
    snprintf(text, sizeof(text), "%d cycles of open, append and kill: free %.0f ms after the last",
             n, t);
    result(bad == 0 && t < 1000, text);
}

// Six workers at once in two namespaces and a third; all their outputs are right.
static void together(const char *direct)
{
    static const char *const names[] = {"a", "b", "shared", "shared", "shared", "shared"};
    pid_t pids[KVD_LEN(names)];
    int bad = 0;
    for (size_t i = 0; i < KVD_LEN(names); i++) {
        fflush(stdout);
        pids[i] = fork();
        if (pids[i] == 0) {
            setenv("KVD_NAMESPACE", names[i], 1);
            execl(direct, direct, address, i % 2 ? "int2" : "bf16", "1", "100", "graph",
                  (char *)NULL);
            _exit(127);
        }
    }
    for (size_t i = 0; i < KVD_LEN(names); i++) {
        int status;
        waitpid(pids[i], &status, 0);
        bad += status != 0;
    }
    result(bad == 0, "two namespaces with a worker each and one with four, at once");
}

static void runs(const char *what, const char *child)
{
    int fd;
    pid_t pid = start(child, &fd);
    result(finish(pid, fd) == 0, what);
}

int main(int argc, char **argv)
{
    struct kvd_error err = {0};
    if (argc < 3)
        return 2;
    address = argv[1];
    if (argc == 5 && strcmp(argv[2], "child") == 0)
        return run_child(argv[3], atoi(argv[4]));
    int n = argc > 3 ? atoi(argv[3]) : 1000;
    channel = kvd_channel_new(&(struct kvd_channel_options){.address = address}, &err);
    // Under MPS a fault, or a death amid kernels, takes the daemon's context with it:
    // daemon/README.md.
    bool mps = getenv("CUDA_MPS_PIPE_DIRECTORY");
    uint64_t before = 0, after = 0, made;
    for (int round = 0; round < 2; round++) { // the first makes the working memory that kvd keeps
        together(argv[2]);
        kill_at("while idle", "opened", 3);
        kill_at("while they hold buffers", "buffers", 5);
        kill_at("in the middle of an append", "appending", 10);
        if (!mps)
            kill_at("with graph replays in flight", "replaying", 10);
        kill_at("after they leaked all they may", "leaking", 1);
        runs("a worker that lies about its memory", "lying");
        runs("memory by a descriptor", "by fd");
        runs("memory of many segments", "by segments");
        if (!mps)
            runs("a write to a lent page fails in the writer", "writing");
        until_free();
        cycles(round == 0 ? 32 : n);
        sleep(1);
        pool_used(&made);
        after = free_memory() + made; // the pool keeps idle extents
        before = before ? before : after;
    }
    together(argv[2]);
    char text[128];
    snprintf(text, sizeof(text),
             "free GPU memory, idle extents included: %.1f MiB before, %.1f MiB after",
             (double)before / (1 << 20), (double)after / (1 << 20));
    result(before == after, text);
    printf("%d passed, %d failed\n", passed, failed);
    kvd_channel_free(&channel);
    return failed != 0;
}
