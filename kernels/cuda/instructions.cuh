// The instructions that CUDA C++ has no name for, each with one. On a CPU, tests/emulator/ stands in for this file, so that all
// other code of the kernels is tested where there is no GPU.
//
// Fragments of mma.sync.m16n8k16, lane = 4 g + t:
//   A (16 x 16): register 0 (row g, cols 2t, 2t+1), 1 (row g+8), 2 (row g, cols 2t+8, +9), 3 (g+8)
//   B (16 x 8):  register 0 (rows 2t, 2t+1, col g), 1 (rows 2t+8, 2t+9, col g)
//   C (16 x 8):  element 0, 1 (row g, cols 2t, 2t+1), 2, 3 (row g+8)
#ifndef KVD_KERNELS_CUDA_INSTRUCTIONS_CUH
#define KVD_KERNELS_CUDA_INSTRUCTIONS_CUH

#include <cuda_runtime.h>
#include <stdint.h>

// Code for Hopper's bulk copies; without, tiles are read where they lie.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(KVD_CUDA_PORTABLE)
#define KVD_BULK 1
#else
#define KVD_BULK 0
#endif

// Declares a block's shared memory, as many bytes as its launch says.
#define KVD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

namespace kvd
{

// blockIdx, read again at each use rather than kept in a register.
__device__ inline uint32_t block_index_x()
{
    uint32_t x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}

__device__ inline uint32_t block_index_y()
{
    uint32_t y;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
    return y;
}

// x is computed before what follows, not where it is used.
__device__ inline void computed_here(float &x)
{
    asm("" : "+f"(x));
}

__device__ inline void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b, over 8 inputs in tf32: a and a8 are rows g and g + 8, b column g; inputs t and t + 4 of a
// lane's share come as x and y.
__device__ inline void mma_tf32(float c[4], float2 a, float2 a8, float2 b)
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a.x)), "r"(__float_as_uint(a8.x)), "r"(__float_as_uint(a.y)),
          "r"(__float_as_uint(a8.y)), "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

__device__ inline float round_tf32(float x)
{
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}

// 2^x, relative error 2^-22; results below 2^-126 are 0.
__device__ inline float fast_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The transpose of an 8 x 8 matrix of 16-bit elements: lane 4 g + t holds (g, 2t) and (g, 2t + 1).
__device__ inline uint32_t transpose(uint32_t x)
{
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, whose rows of 16 bytes the lanes have the addresses of: lane 8 i + r
// that of row r of matrix i. Lane 4 g + t gets elements (g, 2t) and (g, 2t + 1) of each; TURNED: (2t, g) and (2t + 1, g).
template <bool TURNED> __device__ inline void load_matrices(uint32_t (&a)[4], const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    if (TURNED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(at)
                     : "memory");
}

// The reverse: stores them, not turned.
__device__ inline void store_matrices(void *row, const uint32_t (&a)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"((uint32_t)__cvta_generic_to_shared(row)), "r"(a[0]),
                 "r"(a[1]), "r"(a[2]), "r"(a[3])
                 : "memory");
}

// Two values as fp16, rounded towards zero.
__device__ inline uint32_t truncate_fp16(float a, float b)
{
    uint32_t y;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}

// Both halves of a - b in fp16, kept within 0 and 1.
__device__ inline uint32_t saturated_difference(uint32_t a, uint32_t b)
{
    uint32_t y;
    asm("sub.sat.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// a * b + c of two fp16 each.
__device__ inline uint32_t fma_fp16(uint32_t a, uint32_t b, uint32_t c)
{
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
    return a;
}

// The same, kept within 0 and 1.
__device__ inline uint32_t saturated_fma_fp16(uint32_t a, uint32_t b, uint32_t c)
{
    asm("fma.rn.sat.f16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
    return a;
}

__device__ inline uint32_t sum_fp16(uint32_t a, uint32_t b)
{
    asm("add.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}

// (x & mask) ^ set as one instruction: of two constants the compiler makes two.
__device__ inline uint32_t masked_with(uint32_t x, uint32_t mask, uint32_t set)
{
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(set));
    return y;
}

// x >> BITS, once for all that is multiplied from there on.
template <int BITS> __device__ inline uint32_t shifted_right(uint32_t x)
{
    uint32_t y;
    asm("shr.u32 %0, %1, %2;" : "=r"(y) : "r"(x), "n"(BITS));
    return y;
}

// Adds 1 and returns what was there; what other blocks wrote before they counted is seen afterwards.
__device__ inline uint32_t count_acq_rel(uint32_t *counter)
{
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Brings a line into the L2 cache.
__device__ inline void prefetch(const void *at)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Copies 16 bytes from global to shared memory; this thread may read them after copies_arrived().
__device__ inline void copy_async(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ inline void copies_arrived()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// What was asked for since the last one is a group.
__device__ inline void copies_grouped()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// All groups but the last N are there, as after copies_arrived().
template <int N> __device__ inline void groups_arrived()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#if KVD_BULK
__device__ inline void barrier_init(uint64_t *bar, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}

__device__ inline void barriers_ready()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A policy of the L2 cache: what is read once should not push out what many blocks read.
__device__ inline uint64_t cache_policy(bool once)
{
    uint64_t policy;
    if (once)
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline void fetch(void *to, const void *from, uint32_t bytes, uint64_t *bar,
                             uint64_t policy)
{
    uint32_t b = shared_address(bar);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(b), "l"(policy)
                 : "memory");
}

__device__ inline void arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ inline void barrier_wait(uint64_t *bar, uint32_t phase)
{
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(bar)),
                 "r"(phase)
                 : "memory");
}
#endif

// Programmatic dependent launch: a kernel may be put in place while the one in front still runs, and waits for that one to
// have finished before it reads what that may have written. launch_behind launches kernels that call this.
__device__ inline void wait_for_previous()
{
#if KVD_BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start()
{
#if KVD_BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

} // namespace kvd

#endif
