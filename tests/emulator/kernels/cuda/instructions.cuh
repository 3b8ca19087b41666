// Stands in for the kernels' file of this name: what each instruction does, in C++. KVD_CUDA_PORTABLE chooses which of the
// kernels' two ways is compiled, as on a device.
#ifndef KVD_KERNELS_CUDA_INSTRUCTIONS_CUH
#define KVD_KERNELS_CUDA_INSTRUCTIONS_CUH

#include <algorithm>

#include "tests/emulator/cuda_bf16.h"
#include "tests/emulator/cuda_fp16.h"

#ifdef KVD_CUDA_PORTABLE
#define KVD_BULK 0
#else
#define KVD_BULK 1
#endif

#define KVD_DYNAMIC_SHARED(name) uint8_t *name = emulator_shared()

namespace kvd
{

inline uint32_t block_index_x()
{
    return blockIdx.x;
}

inline uint32_t block_index_y()
{
    return blockIdx.y;
}

inline void computed_here(float &)
{
}

inline float emulated_half(uint32_t x, int i)
{
    return __half2float(__ushort_as_half((uint16_t)(x >> 16 * i)));
}

inline float emulated_bf16(uint32_t x, int i)
{
    return __uint_as_float(i ? x & 0xffff0000u : x << 16);
}

inline uint64_t both_words(uint32_t low, uint32_t high)
{
    return (uint64_t)high << 32 | low;
}

// c += A B of a warp, A 16 x 16 and B 16 x 8; `a`, `b0` and `b1` of a lane as mma.m16n8k16 has them.
template <float VALUE(uint32_t, int)> inline void emulated_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    const emulator_words *all = emulator_exchange(both_words(a[0], a[1]), both_words(a[2], a[3]), both_words(b0, b1));
    uint32_t row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < 2; i++)
        for (uint32_t pair = 0; pair < 8; pair++) { // of k
            const emulator_words &of_row = all[row * 4 + pair % 4];
            uint32_t x = (uint32_t)((pair < 4 ? of_row.x : of_row.y) >> 32 * i);
            for (uint32_t j = 0; j < 2; j++) {
                uint32_t y = (uint32_t)(all[(column + j) * 4 + pair % 4].z >> 32 * (pair / 4));
                c[2 * i + (int)j] = fmaf(VALUE(x, 0), VALUE(y, 0), fmaf(VALUE(x, 1), VALUE(y, 1), c[2 * i + (int)j]));
            }
        }
}

inline void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    emulated_mma<emulated_half>(c, a, b0, b1);
}

inline void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    emulated_mma<emulated_bf16>(c, a, b0, b1);
}

inline float round_tf32(float x)
{
    return __uint_as_float((__float_as_uint(x) + 0x1000u) & ~0x1fffu);
}

// The unit does not look at the low bits.
inline float as_tf32(uint64_t words, uint32_t i)
{
    return __uint_as_float((uint32_t)(words >> 32 * i) & ~0x1fffu);
}

inline void mma_tf32(float c[4], float2 a, float2 a8, float2 b)
{
    const emulator_words *all = emulator_exchange(emulator_bits<uint64_t>(a), emulator_bits<uint64_t>(a8), emulator_bits<uint64_t>(b));
    uint32_t row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t k = 0; k < 8; k++) {
            const emulator_words &of_row = all[row * 4 + k % 4];
            c[i] = fmaf(as_tf32(i < 2 ? of_row.x : of_row.y, k / 4), as_tf32(all[(column + i % 2) * 4 + k % 4].z, k / 4), c[i]);
        }
}

inline float fast_exp2(float x)
{
    float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}

inline uint32_t transpose(uint32_t x)
{
    const emulator_words *all = emulator_exchange(x);
    uint32_t lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2, y = 0;
    for (uint32_t i = 0; i < 2; i++) // (column + i, row) of what came
        y |= (uint32_t)(uint16_t)(all[(column + i) * 4 + row / 2].x >> 16 * (row % 2)) << 16 * i;
    return y;
}

inline uint32_t emulated_truncation(float x)
{
    uint16_t bits = __half_as_ushort(__float2half_rn(fabsf(x)));
    bits = (uint16_t)(bits - (__half2float(__ushort_as_half(bits)) > fabsf(x)));
    return bits | (signbit(x) ? 0x8000u : 0);
}

inline uint32_t truncate_fp16(float a, float b)
{
    return emulated_truncation(a) | emulated_truncation(b) << 16;
}

inline uint32_t saturated_difference(uint32_t a, uint32_t b)
{
    uint32_t y = 0;
    for (int i = 0; i < 2; i++)
        y |= (uint32_t)__half_as_ushort(__float2half_rn(__saturatef(emulated_half(a, i) - emulated_half(b, i)))) << 16 * i;
    return y;
}

inline uint32_t fma_fp16(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t y = 0;
    for (int i = 0; i < 2; i++)
        y |= (uint32_t)__half_as_ushort(__float2half_rn(fmaf(emulated_half(a, i), emulated_half(b, i), emulated_half(c, i)))) << 16 * i;
    return y;
}

inline uint32_t saturated_fma_fp16(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t y = 0;
    for (int i = 0; i < 2; i++) {
        float x = fmaf(emulated_half(a, i), emulated_half(b, i), emulated_half(c, i));
        y |= (uint32_t)__half_as_ushort(__float2half_rn(__saturatef(x))) << 16 * i;
    }
    return y;
}

inline uint32_t masked_with(uint32_t x, uint32_t mask, uint32_t set)
{
    return (x & mask) ^ set;
}

template <int BITS> inline uint32_t shifted_right(uint32_t x)
{
    return x >> BITS;
}

inline uint32_t sum_fp16(uint32_t a, uint32_t b)
{
    uint32_t y = 0;
    for (int i = 0; i < 2; i++)
        y |= (uint32_t)__half_as_ushort(__float2half_rn(emulated_half(a, i) + emulated_half(b, i))) << 16 * i;
    return y;
}

inline uint32_t count_acq_rel(uint32_t *counter)
{
    return (*counter)++;
}

inline void prefetch(const void *)
{
}

inline uint32_t shared_address(const void *p)
{
    uint64_t at = (uint64_t)((const uint8_t *)p - emulator_shared());
    if (at >= emulator_shared_bytes())
        emulator_fail("an address is not in shared memory");
    return (uint32_t)at;
}

template <bool TURNED> inline void load_matrices(uint32_t (&a)[4], const void *row)
{
    if ((uintptr_t)row % 16 || shared_address(row) + 16 > emulator_shared_bytes())
        emulator_fail("a row of a matrix in shared memory is not aligned or leaves it");
    const emulator_words *all = emulator_exchange((uint64_t)(uintptr_t)row);
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (uint32_t i = 0; i < 4; i++) {
        auto element = [&](uint32_t r, uint32_t c) { return ((const uint16_t *)(uintptr_t)all[8 * i + r].x)[c]; };
        a[i] = TURNED ? element(2 * t, g) | (uint32_t)element(2 * t + 1, g) << 16
                      : element(g, 2 * t) | (uint32_t)element(g, 2 * t + 1) << 16;
    }
}

inline void store_matrices(void *row, const uint32_t (&a)[4])
{
    if ((uintptr_t)row % 16 || shared_address(row) + 16 > emulator_shared_bytes())
        emulator_fail("a row of a matrix in shared memory is not aligned or leaves it");
    const emulator_words *all = emulator_exchange((uint64_t)(uintptr_t)row);
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (uint32_t i = 0; i < 4; i++)
        ((uint32_t *)(uintptr_t)all[8 * i + g].x)[t] = a[i];
    emulator_exchange(0); // all lanes have stored before one goes on
}

// Copies that are waited for by copies_arrived or on a barrier come as late as they can.
inline void copy_async(void *to, const void *from)
{
    if (((uintptr_t)to | (uintptr_t)from) % 16 || shared_address(to) + 16 > emulator_shared_bytes())
        emulator_fail("a copy of 16 bytes to shared memory is not aligned or leaves it");
    emulator_copies().push_back({to, from});
}

inline void copies_arrived()
{
    for (const auto &x : emulator_copies())
        if (x.first)
            memcpy(x.first, x.second, 16);
    emulator_copies().clear();
}

// The end of a group is a copy to nowhere.
inline void copies_grouped()
{
    emulator_copies().push_back({nullptr, nullptr});
}

template <int N> inline void groups_arrived()
{
    auto &copies = emulator_copies();
    auto ends = std::count_if(copies.begin(), copies.end(), [](const auto &x) { return !x.first; });
    auto x = copies.begin();
    for (; x != copies.end() && ends > N; ++x)
        if (x->first)
            memcpy(x->first, x->second, 16);
        else
            ends--;
    copies.erase(copies.begin(), x);
}

#if KVD_BULK
struct emulated_barrier {
    uint16_t arrivals, missing;
    uint32_t phase;
};

inline emulated_barrier *barrier_at(uint64_t *bar)
{
    shared_address(bar);
    return (emulated_barrier *)bar;
}

inline void barrier_init(uint64_t *bar, uint32_t arrivals)
{
    *barrier_at(bar) = {(uint16_t)arrivals, (uint16_t)arrivals, 0};
}

inline void barriers_ready()
{
}

inline uint64_t cache_policy(bool)
{
    return 0;
}

inline void arrive(uint64_t *bar)
{
    emulated_barrier *b = barrier_at(bar);
    if (b->missing == 0 || b->missing > b->arrivals)
        emulator_fail("a barrier was not begun, or more arrive than it waits for");
    if (--b->missing == 0) {
        b->missing = b->arrivals;
        b->phase++;
    }
}

inline void fetch(void *to, const void *from, uint32_t bytes, uint64_t *bar, uint64_t)
{
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16 || shared_address(to) + bytes > emulator_shared_bytes())
        emulator_fail("a copy of %u bytes to shared memory is not aligned or leaves it", bytes);
    memset(to, 0xff, bytes); // nobody may read it before it has come
    emulator_later([=] {
        memcpy(to, from, bytes);
        arrive(bar);
    });
}

inline bool barrier_passed(const void *bar, uint32_t parity)
{
    return (((const emulated_barrier *)bar)->phase & 1) != parity;
}

inline void barrier_wait(uint64_t *bar, uint32_t phase)
{
    emulator_wait(barrier_passed, barrier_at(bar), phase, "an mbarrier");
}
#endif

inline void wait_for_previous()
{
}

inline void let_next_start()
{
}

} // namespace kvd

#endif
