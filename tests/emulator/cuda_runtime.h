// CUDA C++ on a CPU: a thread of a block is a fiber, and what the threads of a warp do together
// happens when all of its lanes have come. Compile with -x c++.
#ifndef KVD_EMULATOR_CUDA_RUNTIME_H
#define KVD_EMULATOR_CUDA_RUNTIME_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <utility>
#include <vector>

#include "tests/emulator/cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static // blocks run one after another
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

template <typename To, typename From> inline To emulator_bits(From x)
{
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}

// -- types ---------------------------------------------------------------------------------------

struct uint2 {
    uint32_t x, y;
};

struct uint3 {
    uint32_t x, y, z;
};

struct __align__(16) uint4
{
    uint32_t x, y, z, w;
};

struct __align__(8) float2
{
    float x, y;
};

struct __align__(16) float4
{
    float x, y, z, w;
};

struct dim3 {
    uint32_t x, y, z;
    constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

inline uint2 make_uint2(uint32_t x, uint32_t y)
{
    return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y)
{
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

// -- threads -------------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx; // of the fiber that runs
extern dim3 blockDim, gridDim;

struct emulator_words {
    uint64_t x, y, z;
};

// Leaves words of each lane of the warp where all its lanes find them, until the next call.
const emulator_words *emulator_exchange(uint64_t x, uint64_t y = 0, uint64_t z = 0);
void emulator_block_barrier();
// Lets others run until ready(argument, phase).
void emulator_wait(bool (*ready)(const void *, uint32_t), const void *argument, uint32_t phase,
                   const char *what);
// Does it later, when nobody can go on otherwise: copies that nobody has waited for have not come.
void emulator_later(std::function<void()> action);
// Copies of 16 bytes that this thread has asked for and not waited for.
std::vector<std::pair<void *, const void *>> &emulator_copies();
uint8_t *emulator_shared();
uint32_t emulator_shared_bytes();
[[noreturn]] void emulator_fail(const char *text, ...) __attribute__((format(printf, 1, 2)));

inline void __syncthreads()
{
    emulator_block_barrier();
}
inline void __syncwarp(uint32_t = ~0u)
{
    emulator_exchange(0);
}

template <typename T> inline T __shfl_sync(uint32_t, T x, int from)
{
    static_assert(sizeof(T) <= 8, "");
    uint64_t mine = 0;
    memcpy(&mine, &x, sizeof(x));
    const emulator_words *all = emulator_exchange(mine);
    memcpy(&x, &all[from & 31].x, sizeof(x));
    return x;
}

template <typename T> inline T __shfl_xor_sync(uint32_t mask, T x, int with)
{
    return __shfl_sync(mask, x, (int)(threadIdx.x % 32) ^ with);
}

inline bool __any_sync(uint32_t, bool x)
{
    const emulator_words *all = emulator_exchange(x);
    bool any = false;
    for (int i = 0; i < 32; i++)
        any |= all[i].x != 0;
    return any;
}

inline bool __all_sync(uint32_t mask, bool x)
{
    return !__any_sync(mask, !x);
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t x)
{
    const emulator_words *all = emulator_exchange(x);
    uint64_t most = 0;
    for (int i = 0; i < 32; i++)
        most = all[i].x > most ? all[i].x : most;
    return (uint32_t)most;
}

inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long x)
{
    unsigned long long before = *at;
    *at += x;
    return before;
}

inline uint32_t atomicAnd(uint32_t *at, uint32_t x)
{
    uint32_t before = *at;
    *at &= x;
    return before;
}

inline uint32_t atomicOr(uint32_t *at, uint32_t x)
{
    uint32_t before = *at;
    *at |= x;
    return before;
}

inline unsigned long long atomicMin(unsigned long long *at, unsigned long long x)
{
    unsigned long long before = *at;
    *at = x < before ? x : before;
    return before;
}

// -- functions -----------------------------------------------------------------------------------

inline float __uint_as_float(uint32_t x)
{
    return emulator_bits<float>(x);
}
inline float __int_as_float(int x)
{
    return emulator_bits<float>(x);
}
inline uint32_t __float_as_uint(float x)
{
    return emulator_bits<uint32_t>(x);
}
inline float __fdividef(float a, float b)
{
    return a / b;
}
inline float __saturatef(float x)
{
    return x > 0 ? x < 1 ? x : 1 : 0;
}
float __fmaf_rd(float a, float b, float c);
float __fmaf_ru(float a, float b, float c);
float normcdfinvf(float p);
inline int max(int a, int b)
{
    return a > b ? a : b;
}
inline uint32_t max(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}
inline uint32_t max(int a, uint32_t b)
{
    return max((uint32_t)a, b);
}
inline float max(float a, float b)
{
    return fmaxf(a, b);
}
inline int min(int a, int b)
{
    return a < b ? a : b;
}
inline uint32_t min(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}
inline uint32_t min(uint32_t a, int b)
{
    return min(a, (uint32_t)b);
}
inline uint32_t min(int a, uint32_t b)
{
    return min((uint32_t)a, b);
}
inline float min(float a, float b)
{
    return fminf(a, b);
}
inline uint32_t __vimin3_u32(uint32_t a, uint32_t b, uint32_t c)
{
    return min(min(a, b), c);
}
inline uint32_t __vimax3_u32(uint32_t a, uint32_t b, uint32_t c)
{
    return max(max(a, b), c);
}
inline int __vimax3_s32(int a, int b, int c)
{
    return max(max(a, b), c);
}

inline int __viaddmin_s32_relu(int a, int b, int c)
{
    return max(min((int)((uint32_t)a + (uint32_t)b), c), 0);
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector)
{
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t y = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t s = selector >> 4 * i & 15, byte = (uint32_t)(bytes >> 8 * (s & 7)) & 255;
        y |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return y;
}

// These are instructions for global memory: a GPU ends a kernel that gives them an address of
// shared memory.
template <typename T> inline T *emulator_global(T *at)
{
    const uint8_t *byte = (const uint8_t *)at, *first = emulator_shared();
    if (byte >= first && byte < first + emulator_shared_bytes())
        emulator_fail("an instruction for global memory has an address of shared memory");
    return at;
}

template <typename T> inline T __ldg(const T *at)
{
    return *emulator_global(at);
}
template <typename T> inline T __ldcg(const T *at)
{
    return *emulator_global(at);
}
template <typename T> inline T __ldcs(const T *at)
{
    return *emulator_global(at);
}
template <typename T> inline void __stcg(T *at, T x)
{
    *emulator_global(at) = x;
}

// -- launches ------------------------------------------------------------------------------------

struct cudaFuncAttributes {
    int ptxVersion;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

// Bytes beyond what a launch may take of itself must have been asked for, as on a device.
cudaError_t emulator_shared_limit(const void *kernel, int bytes);
cudaError_t emulator_launch(const void *kernel, const cudaLaunchConfig_t &config,
                            std::function<void()> thread);

// EMULATED_CODE=none: none of what was compiled runs on this GPU.
cudaError_t emulator_attributes(cudaFuncAttributes *code);

template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *code, F *)
{
    return emulator_attributes(code);
}

template <typename F> cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute, int bytes)
{
    return emulator_shared_limit((const void *)kernel, bytes);
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                               A &&...arguments)
{
    return emulator_launch((const void *)kernel, *config,
                           std::bind(kernel, static_cast<P>(arguments)...));
}

#endif
