// The emulated device: fibers that are the threads of a block, and CUDA's runtime and driver as far as kvd calls them.
//
// Blocks run one after another, a block's threads by turns on one CPU thread, each until it waits for others. A kernel whose
// threads wait for each other for ever ends the program with what each waits for.
#include "tests/emulator/cuda_runtime.h"

#include <fcntl.h>
#include <fenv.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "tests/emulator/cudaTypedefs.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace
{

constexpr uint32_t LANES = 32, MOST_THREADS = 1024, STACK = 256 << 10;
constexpr size_t DEVICE_BYTES = (size_t)8 << 30;
constexpr uint32_t FREE_SHARED = 48 << 10, MOST_SHARED = 227 << 10; // bytes a block has unasked, and at most

using copies = std::vector<std::pair<void *, const void *>>;

// Where threads meet.
struct meeting {
    uint32_t expected, arrived;
    uint64_t round;

    void leave()
    {
        expected--;
        complete();
    }

    void complete()
    {
        if (expected && arrived == expected) {
            arrived = 0;
            round++;
        }
    }
};

struct warp {
    meeting lanes;
    emulator_words slots[2][LANES]; // of even and odd rounds: nobody is two rounds ahead of who still reads
};

struct thread {
    void *stack, *at; // the stack and, while it does not run, where it was left
    uint32_t index;
    bool done;
    bool (*ready)(const void *, uint32_t); // what it waits for; NULL: nothing
    const void *argument;
    uint32_t phase;
    const char *what;
    copies asked;
    void *fake_stack; // AddressSanitizer's
};

thread threads[MOST_THREADS], *running;
warp warps[MOST_THREADS / LANES];
meeting block;
uint32_t n_threads, n_running;
void *main_at;
#ifdef __SANITIZE_ADDRESS__
void *main_fake_stack;
const void *main_stack;
size_t main_stack_bytes;
#endif
std::function<void()> body;
std::deque<std::function<void()>> later;
std::unique_ptr<uint8_t[]> shared_memory;
uint8_t *shared;
uint32_t shared_bytes;

extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

bool met(const void *at, uint32_t round)
{
    return (uint32_t)((const meeting *)at)->round != round;
}

bool may_run(const thread &t)
{
    return !t.done && (!t.ready || t.ready(t.argument, t.phase));
}

[[noreturn]] void stuck()
{
    std::map<std::string, uint32_t> waiting;
    for (uint32_t i = 0; i < n_threads; i++)
        if (!threads[i].done)
            waiting[threads[i].what]++;
    for (const auto &x : waiting)
        fprintf(stderr, "emulator: %u threads wait for %s\n", x.second, x.first.c_str());
    emulator_fail("block (%u, %u, %u) can never end", blockIdx.x, blockIdx.y, blockIdx.z);
}

// Who runs next; NULL: all have ended.
thread *next_thread()
{
    if (n_running == 0)
        return nullptr;
    for (;;) {
        uint32_t from = running ? running->index : 0;
        for (uint32_t i = 1; i <= n_threads; i++) {
            thread &t = threads[(from + i) % n_threads];
            if (may_run(t))
                return &t;
        }
        if (later.empty())
            stuck();
        auto action = std::move(later.front());
        later.pop_front();
        action();
    }
}

void switch_to(thread *next)
{
    thread *from = running;
    if (next == from)
        return;
    running = next;
    if (next)
        threadIdx = {next->index, 0, 0};
#ifdef __SANITIZE_ADDRESS__
    void **fake = from ? &from->fake_stack : &main_fake_stack;
    __sanitizer_start_switch_fiber(from && from->done ? nullptr : fake, next ? next->stack : main_stack, next ? STACK : main_stack_bytes);
#endif
    emulator_switch(from ? &from->at : &main_at, next ? next->at : main_at);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(running ? running->fake_stack : main_fake_stack, nullptr, nullptr);
#endif
}

void thread_main()
{
#ifdef __SANITIZE_ADDRESS__
    const void *before;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &before, &bytes);
    if (!main_stack) { // the first thread of all is begun from the main stack
        main_stack = before;
        main_stack_bytes = bytes;
    }
#endif
    {
        std::function<void()> mine = body;
        mine();
    }
    thread *t = running;
    if (!t->asked.empty())
        emulator_fail("thread %u ended before its copies had come", t->index);
    t->done = true;
    n_running--;
    warps[t->index / LANES].lanes.leave();
    block.leave();
    switch_to(next_thread());
    abort();
}

void begin(thread &t, uint32_t index)
{
    if (!t.stack) {
        t.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (t.stack == MAP_FAILED)
            emulator_fail("no memory for a thread");
    }
    t.index = index;
    t.done = false;
    t.ready = nullptr;
    void **top = (void **)((uint8_t *)t.stack + STACK) - 1; // as after a call
    *--top = (void *)thread_main;
    top -= 6;
    memset(top, 0, 6 * sizeof(*top));
    t.at = top;
}

void run_block()
{
    shared_memory.reset(new uint8_t[shared_bytes + 128]);
    shared = (uint8_t *)(((uintptr_t)shared_memory.get() + 127) / 128 * 128);
    memset(shared, 0xff, shared_bytes);
    n_running = n_threads;
    block = {n_threads, 0, 0};
    for (uint32_t i = 0; i < n_threads; i++) {
        begin(threads[i], i);
        if (i % LANES == 0)
            warps[i / LANES] = {{n_threads - i < LANES ? n_threads - i : LANES, 0, 0}, {}};
    }
    running = nullptr;
    switch_to(&threads[0]);
    if (!later.empty())
        emulator_fail("a block ended before its copies had come");
}

void run_grid(dim3 grid, dim3 threads_of_block, uint32_t bytes, const std::function<void()> &thread)
{
    body = thread;
    gridDim = grid;
    blockDim = threads_of_block;
    n_threads = threads_of_block.x;
    shared_bytes = bytes;
    for (uint32_t z = 0; z < grid.z; z++)
        for (uint32_t y = 0; y < grid.y; y++)
            for (uint32_t x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block();
            }
}

std::map<const void *, uint32_t> shared_limits;
thread_local cudaError_t last;

// Threads of the host use the device by turns, whatever their streams.
std::recursive_mutex device;

cudaError_t result(cudaError_t e)
{
    if (e)
        last = e;
    return e;
}

// A fault comes when somebody makes the file that EMULATED_FAULT names, and stays for good. What is under way when it
// comes is done and fails all the same, as is then everything.
bool fault()
{
    static const char *const file = getenv("EMULATED_FAULT");
    static std::atomic<bool> come;
    if (file && !come && unlink(file) == 0)
        come = true;
    return come;
}

} // namespace

struct CUstream_st {
    std::vector<std::function<void()>> *captured; // NULL: what comes is run at once
    std::vector<std::function<void()>> late;      // copies: run when somebody waits for them
};

struct CUevent_st {
    cudaStream_t stream; // that it was recorded on; NULL: none
};

struct CUgraph_st {
    std::vector<std::function<void()>> actions;
};

struct CUgraphExec_st {
    std::vector<std::function<void()>> actions;
};

namespace
{

cudaError_t catch_up(cudaStream_t stream)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    for (size_t i = 0; stream && i < stream->late.size(); i++)
        stream->late[i]();
    if (stream)
        stream->late.clear();
    return result(fault() ? cudaErrorIllegalAddress : cudaSuccess);
}

cudaError_t on_stream(cudaStream_t stream, std::function<void()> action)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    if (stream && stream->captured) {
        stream->captured->push_back(std::move(action));
    } else {
        catch_up(stream);
        action();
    }
    return result(fault() ? cudaErrorIllegalAddress : cudaSuccess);
}

// As late as it may be, so that whoever does not wait for it is noticed.
cudaError_t late_on_stream(cudaStream_t stream, std::function<void()> action)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    if (!stream || stream->captured)
        return on_stream(stream, std::move(action));
    stream->late.push_back(std::move(action));
    return result(fault() ? cudaErrorIllegalAddress : cudaSuccess);
}

// Memory of cudaMalloc, of this process or of another: memfds, so that others can map it.
struct allocation {
    uint8_t *at;
    size_t bytes;
    int fd;
};

using places = std::map<const void *, allocation>; // by where they end
places allocations, mappings; // mappings: of handles, whose descriptors these are. `device` guards both

const allocation *place_of(const places &all, const void *p)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    auto it = all.upper_bound(p);
    return it != all.end() && it->second.at <= p ? &it->second : nullptr;
}

const allocation *allocation_of(const void *p)
{
    return place_of(allocations, p);
}

// Keeps the descriptor; NULL: it is none of memory.
void *map_allocation(int fd)
{
    struct stat st = {};
    if (fstat(fd, &st) || st.st_size == 0)
        return nullptr;
    void *p = mmap(nullptr, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return nullptr;
    std::lock_guard<std::recursive_mutex> turn(device);
    allocations[(uint8_t *)p + st.st_size] = {(uint8_t *)p, (size_t)st.st_size, fd};
    return p;
}

bool unmap_allocation(void *p)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    const allocation *a = allocation_of(p);
    if (!a || a->at != p)
        return false;
    munmap(a->at, a->bytes);
    close(a->fd);
    allocations.erase(a->at + a->bytes);
    return true;
}

} // namespace

// -- threads -------------------------------------------------------------------------------------

void emulator_fail(const char *text, ...)
{
    va_list list;
    va_start(list, text);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, text, list);
    fprintf(stderr, "\n");
    va_end(list);
    abort();
}

void emulator_wait(bool (*ready)(const void *, uint32_t), const void *argument, uint32_t phase, const char *what)
{
    if (ready(argument, phase))
        return;
    running->ready = ready;
    running->argument = argument;
    running->phase = phase;
    running->what = what;
    switch_to(next_thread());
    running->ready = nullptr;
}

static void meet(meeting &m, const char *what)
{
    uint32_t round = (uint32_t)m.round;
    m.arrived++;
    m.complete();
    emulator_wait(met, &m, round, what);
}

const emulator_words *emulator_exchange(uint64_t x, uint64_t y, uint64_t z)
{
    warp &w = warps[running->index / LANES];
    emulator_words *slots = w.slots[w.lanes.round % 2];
    if (w.lanes.arrived == 0 && w.lanes.expected < LANES) // lanes that have ended say nothing
        memset(slots, 0, sizeof(w.slots[0]));
    slots[running->index % LANES] = {x, y, z};
    meet(w.lanes, "the lanes of a warp");
    return slots;
}

void emulator_block_barrier()
{
    meet(block, "__syncthreads");
}

void emulator_later(std::function<void()> action)
{
    later.push_back(std::move(action));
}

std::vector<std::pair<void *, const void *>> &emulator_copies()
{
    return running->asked;
}

uint8_t *emulator_shared()
{
    return shared;
}

uint32_t emulator_shared_bytes()
{
    return shared_bytes;
}

cudaError_t emulator_shared_limit(const void *kernel, int bytes)
{
    if (bytes < 0 || (uint32_t)bytes > MOST_SHARED)
        return result(cudaErrorInvalidValue);
    std::lock_guard<std::recursive_mutex> turn(device);
    shared_limits[kernel] = (uint32_t)bytes;
    return cudaSuccess;
}

cudaError_t emulator_attributes(cudaFuncAttributes *code)
{
    const char *runs = getenv("EMULATED_CODE");
    if (runs && strcmp(runs, "none") == 0)
        return result(cudaErrorNoKernelImageForDevice);
    code->ptxVersion = 90;
    return cudaSuccess;
}

cudaError_t emulator_launch(const void *kernel, const cudaLaunchConfig_t &config, std::function<void()> thread)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    dim3 grid = config.gridDim, threads_of_block = config.blockDim;
    auto limit = shared_limits.find(kernel);
    uint32_t most = limit == shared_limits.end() || limit->second < FREE_SHARED ? FREE_SHARED : limit->second;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads_of_block.x == 0 ||
        threads_of_block.x > MOST_THREADS || threads_of_block.y != 1 || threads_of_block.z != 1 || config.dynamicSmemBytes > most)
        return result(cudaErrorInvalidValue);
    uint32_t bytes = (uint32_t)config.dynamicSmemBytes;
    return on_stream(config.stream, [=] { run_grid(grid, threads_of_block, bytes, thread); });
}

float __fmaf_rd(float a, float b, float c)
{
    volatile float x = a, y = b, z = c;
    fesetround(FE_DOWNWARD);
    volatile float r = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return r;
}

float __fmaf_ru(float a, float b, float c)
{
    return -__fmaf_rd(-a, b, -c);
}

float normcdfinvf(float p)
{
    static float last_p, last_x;
    if (p == last_p)
        return last_x;
    double low = -40, high = 40;
    for (int i = 0; i < 60; i++) {
        double middle = (low + high) / 2;
        (0.5 * erfc(-middle * M_SQRT1_2) < p ? low : high) = middle;
    }
    last_p = p;
    return last_x = (float)low;
}

// -- runtime -------------------------------------------------------------------------------------

extern "C" {

cudaError_t cudaGetLastError(void)
{
    cudaError_t e = last;
    last = cudaSuccess;
    return e;
}

const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    default:
        return "an error";
    }
}

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 1;
    return result(fault() ? cudaErrorIllegalAddress : cudaSuccess);
}

cudaError_t cudaGetDevice(int *index)
{
    *index = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int index)
{
    return result(index == 0 ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize(void)
{
    return cudaSuccess;
}

static const int multiprocessors = 132; // an H100's, so that plans are those of one

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int index)
{
    *p = {"emulated GPU", {"emulated GPU 00"}, DEVICE_BYTES, 9, 0, multiprocessors};
    const char *number = getenv("EMULATED_GPU"); // a process may have another than its neighbours
    if (number && number[0])
        p->uuid.bytes[14] = number[0];
    return result(index == 0 ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int)
{
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)MOST_SHARED : multiprocessors;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p)
{
    a->device = 0;
    a->type = allocation_of(p) || place_of(mappings, p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    int fd = memfd_create("emulated GPU", MFD_CLOEXEC);
    if (fd >= 0 && bytes <= DEVICE_BYTES && ftruncate(fd, (off_t)(bytes ? bytes : 1)) == 0 && (*p = map_allocation(fd)) != nullptr) {
        memset(*p, 0xff, bytes); // NaN, whatever it is read as
        return cudaSuccess;
    }
    if (fd >= 0)
        close(fd);
    return result(cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    if (posix_memalign(p, 256, bytes ? bytes : 1))
        return result(cudaErrorMemoryAllocation);
    memset(*p, 0xff, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned)
{
    return cudaMallocHost(p, bytes);
}

cudaError_t cudaHostGetDevicePointer(void **device_at, void *p, unsigned)
{
    *device_at = p;
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *, size_t, unsigned)
{
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *)
{
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    return result(!p || unmap_allocation(p) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *total)
{
    *left = *total = DEVICE_BYTES;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind)
{
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind, cudaStream_t stream)
{
    return late_on_stream(stream, [=] { memmove(to, from, bytes); });
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind, cudaStream_t stream)
{
    return on_stream(stream, [=] {
        for (size_t i = 0; i < height; i++)
            memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    return on_stream(stream, [=] { memset(to, value, bytes); });
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    *stream = new CUstream_st{};
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int)
{
    return cudaStreamCreate(stream);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = *greatest = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    return catch_up(stream);
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return catch_up(stream);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    *event = new CUevent_st{};
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    event->stream = stream;
    return result(fault() ? cudaErrorIllegalAddress : cudaSuccess);
}

// Waits for more than what was on the stream when it was recorded.
cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    return catch_up(event->stream);
}

// What was on the stream when it was recorded has not been done as long as a copy is late there.
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    return event->stream && !event->stream->late.empty() ? cudaErrorNotReady : cudaSuccess;
}

// Does what was late on the stream where it was recorded.
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned)
{
    return catch_up(event->stream);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode)
{
    if (!stream || stream->captured)
        return result(cudaErrorInvalidValue);
    stream->captured = new std::vector<std::function<void()>>;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *)
{
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    if (!stream || !stream->captured)
        return result(cudaErrorInvalidValue);
    *graph = new CUgraph_st{std::move(*stream->captured)};
    delete stream->captured;
    stream->captured = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    *exec = new CUgraphExec_st{graph->actions};
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    for (const auto &action : exec->actions)
        on_stream(stream, action);
    return cudaSuccess;
}

// A handle names the descriptor of an allocation in the process that has it.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p)
{
    const allocation *a = allocation_of(p);
    if (!a || a->at != p)
        return result(cudaErrorInvalidValue);
    *handle = {};
    snprintf(handle->reserved, sizeof(handle->reserved), "/proc/%d/fd/%d", (int)getpid(), a->fd);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned)
{
    bool said = handle.reserved[0] && memchr(handle.reserved, 0, sizeof(handle.reserved));
    int fd = said ? open(handle.reserved, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0 && fcntl(fd, F_GET_SEALS) >= 0 && (*p = map_allocation(fd)) != nullptr)
        return cudaSuccess;
    if (fd >= 0)
        close(fd);
    return result(cudaErrorInvalidValue);
}

cudaError_t cudaIpcCloseMemHandle(void *p)
{
    return cudaFree(p);
}

} // extern "C"

// -- virtual memory: a handle is a memfd's descriptor, and 1 -------------------------------------

static CUresult reserve(CUdeviceptr *at, size_t bytes, size_t alignment, CUdeviceptr, unsigned long long)
{
    uint8_t *p = (uint8_t *)mmap(nullptr, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    uint8_t *aligned = alignment ? (uint8_t *)(((uintptr_t)p + alignment - 1) / alignment * alignment) : p;
    if (aligned > p)
        munmap(p, (size_t)(aligned - p));
    if (p + alignment > aligned)
        munmap(aligned + bytes, (size_t)(p + alignment - aligned));
    *at = (CUdeviceptr)(uintptr_t)aligned;
    return CUDA_SUCCESS;
}

static CUresult unreserve(CUdeviceptr at, size_t bytes)
{
    return munmap((void *)(uintptr_t)at, bytes) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static constexpr size_t GRANULARITY = 2 << 20;
static const char ALONE[] = "emulated GPU alone"; // of memory that no other process can be given

static CUresult create(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *p, unsigned long long)
{
    if (bytes == 0 || bytes % GRANULARITY)
        return CUDA_ERROR_INVALID_VALUE;
    if (bytes > DEVICE_BYTES)
        return CUDA_ERROR_OUT_OF_MEMORY;
    int fd = memfd_create(p->requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE ? ALONE : "emulated GPU", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes)) {
        if (fd >= 0)
            close(fd);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = (CUmemGenericAllocationHandle)fd + 1;
    return CUDA_SUCCESS;
}

static CUresult release(CUmemGenericAllocationHandle handle)
{
    return close((int)handle - 1) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult map(CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long)
{
    off_t size = lseek((int)handle - 1, 0, SEEK_END);
    if (size < 0 || bytes != (size_t)size) // NVIDIA's maps no part of an allocation
        return CUDA_ERROR_INVALID_VALUE;
    if (bytes == 0 || bytes % GRANULARITY || offset || at % GRANULARITY)
        return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::recursive_mutex> turn(device);
    auto beside = mappings.upper_bound((void *)(uintptr_t)at);
    if (beside != mappings.end() && (uintptr_t)beside->second.at < at + bytes)
        return CUDA_ERROR_INVALID_VALUE; // something is mapped there
    int fd = fcntl((int)handle - 1, F_DUPFD_CLOEXEC, 0);
    void *p = fd < 0 ? MAP_FAILED : mmap((void *)(uintptr_t)at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (p == MAP_FAILED) {
        if (fd >= 0)
            close(fd);
        return CUDA_ERROR_INVALID_VALUE;
    }
    mappings[(uint8_t *)p + bytes] = {(uint8_t *)p, bytes, fd};
    return CUDA_SUCCESS;
}

// Of one mapping or of several, but whole ones.
static CUresult unmap(CUdeviceptr at, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    uint8_t *begin = (uint8_t *)(uintptr_t)at, *end = begin + bytes;
    auto first = mappings.upper_bound(begin), past = first;
    uint8_t *reached = begin;
    for (; past != mappings.end() && past->second.at == reached && reached < end; ++past)
        reached = past->second.at + past->second.bytes;
    if (bytes == 0 || reached != end)
        return CUDA_ERROR_INVALID_VALUE;
    for (auto it = first; it != past; ++it)
        close(it->second.fd);
    mappings.erase(first, past);
    void *p = mmap((void *)(uintptr_t)at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return p == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult set_access(CUdeviceptr at, size_t bytes, const CUmemAccessDesc *access, size_t)
{
    int prot = access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE ? PROT_READ | PROT_WRITE : PROT_READ;
    return mprotect((void *)(uintptr_t)at, bytes, prot) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult pointer_attribute(void *out, CUpointer_attribute, CUdeviceptr p)
{
    *(int *)out = allocation_of((const void *)(uintptr_t)p) != nullptr;
    return CUDA_SUCCESS;
}

static CUresult retain(CUmemGenericAllocationHandle *handle, void *p)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    const allocation *a = place_of(mappings, p);
    int fd = a ? fcntl(a->fd, F_DUPFD_CLOEXEC, 0) : -1;
    *handle = (CUmemGenericAllocationHandle)fd + 1;
    return fd < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static bool alone(CUmemGenericAllocationHandle handle)
{
    char link[32], name[64] = "";
    snprintf(link, sizeof(link), "/proc/self/fd/%d", (int)handle - 1);
    return readlink(link, name, sizeof(name) - 1) > 0 && strstr(name, ALONE);
}

static CUresult export_handle(void *to, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType, unsigned long long)
{
    int fd = alone(handle) ? -1 : dup((int)handle - 1);
    *(int *)to = fd;
    return fd < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult import_handle(CUmemGenericAllocationHandle *handle, void *from, CUmemAllocationHandleType)
{
    bool ours = fcntl((int)(intptr_t)from, F_GET_SEALS) >= 0; // a memfd
    int fd = ours ? dup((int)(intptr_t)from) : -1;
    if (fd < 0)
        return CUDA_ERROR_INVALID_VALUE;
    *handle = (CUmemGenericAllocationHandle)fd + 1;
    return CUDA_SUCCESS;
}

static CUresult properties(CUmemAllocationProp *p, CUmemGenericAllocationHandle handle)
{
    *p = {CU_MEM_ALLOCATION_TYPE_PINNED, alone(handle) ? CU_MEM_HANDLE_TYPE_NONE : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
          {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    return CUDA_SUCCESS;
}

static CUresult range(CUdeviceptr *at, size_t *bytes, CUdeviceptr p)
{
    std::lock_guard<std::recursive_mutex> turn(device);
    const allocation *a = allocation_of((const void *)(uintptr_t)p);
    a = a ? a : place_of(mappings, (const void *)(uintptr_t)p); // one mapping, whatever lies beside it
    if (!a)
        return CUDA_ERROR_INVALID_VALUE;
    *at = (CUdeviceptr)(uintptr_t)a->at;
    *bytes = a->bytes;
    return CUDA_SUCCESS;
}

static CUresult error_string(CUresult rc, const char **text)
{
    *text = rc == CUDA_SUCCESS ? "no error" : rc == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "invalid argument";
    return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned, unsigned long long,
                                                        enum cudaDriverEntryPointQueryResult *found)
{
    static const std::map<std::string, void *> calls = {
        {"cuMemAddressReserve", (void *)reserve},
        {"cuMemAddressFree", (void *)unreserve},
        {"cuMemCreate", (void *)create},
        {"cuMemRelease", (void *)release},
        {"cuMemMap", (void *)map},
        {"cuMemUnmap", (void *)unmap},
        {"cuMemSetAccess", (void *)set_access},
        {"cuMemExportToShareableHandle", (void *)export_handle},
        {"cuMemImportFromShareableHandle", (void *)import_handle},
        {"cuMemGetAllocationPropertiesFromHandle", (void *)properties},
        {"cuPointerGetAttribute", (void *)pointer_attribute},
        {"cuMemRetainAllocationHandle", (void *)retain},
        {"cuMemGetAddressRange", (void *)range},
        {"cuGetErrorString", (void *)error_string},
    };
    auto it = calls.find(name);
    *found = it == calls.end() ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    *f = it == calls.end() ? nullptr : it->second;
    return cudaSuccess;
}
