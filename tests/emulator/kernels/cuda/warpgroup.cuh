// Stands in for the kernels' file of this name. Products come at once: a missing wait is not noticed.
#ifndef KVD_KERNELS_CUDA_WARPGROUP_CUH
#define KVD_KERNELS_CUDA_WARPGROUP_CUH

#include "kernels/cuda/device.cuh"

#define KVD_WARPGROUP KVD_BULK

namespace kvd
{

#if KVD_WARPGROUP
template <int D> inline uint64_t operand_descriptor(const void *at)
{
    constexpr uint64_t next_inputs = 128, next_outputs = D / 8 * 128;
    return (uint64_t)(uniform(shared_address(at)) >> 4) | next_inputs >> 4 << 16 | next_outputs >> 4 << 32;
}

inline void warpgroup_begin()
{
}

inline void warpgroup_commit()
{
}

template <int N = 0> inline void warpgroup_wait()
{
}

template <int N> inline void warpgroup_came(float (&)[N][4])
{
}

template <int N> inline void fewer_registers()
{
}

template <int N> inline void more_registers()
{
}

// As the descriptor says: core matrices of 8 outputs by 8 inputs.
template <int D, void MMA(float[4], const uint32_t[4], uint32_t, uint32_t)>
inline void emulated_warpgroup_mma(float (&c)[D / 8][4], const uint32_t (&a)[4], uint64_t b, int add)
{
    uint32_t lane = threadIdx.x % 32, at = (uint32_t)(b & 0x3fff) << 4;
    uint32_t next_inputs = (uint32_t)(b >> 16 & 0x3fff) << 4, next_outputs = (uint32_t)(b >> 32 & 0x3fff) << 4;
    for (uint32_t j = 0; j < D / 8; j++) {
        const uint8_t *row = emulator_shared() + at + j * next_outputs + lane / 4 * 16 + lane % 4 * 4;
        uint32_t b0, b1;
        shared_address(row + next_inputs + 3);
        memcpy(&b0, row, 4);
        memcpy(&b1, row + next_inputs, 4);
        if (!add)
            c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0;
        MMA(c[j], a, b0, b1);
    }
}

template <int D> inline void warpgroup_mma(float (&c)[D / 8][4], const uint32_t (&a)[4], uint64_t b, int add)
{
    emulated_warpgroup_mma<D, mma_bf16>(c, a, b, add);
}

template <void MMA(float[4], const uint32_t[4], uint32_t, uint32_t)>
inline void emulated_products_of_shared(float (&c)[16][4], uint64_t a, uint64_t b, int add)
{
    uint32_t at = (uint32_t)(a & 0x3fff) << 4, words[4];
    uint32_t next_inputs = (uint32_t)(a >> 16 & 0x3fff) << 4, next_rows = (uint32_t)(a >> 32 & 0x3fff) << 4;
    for (uint32_t r = 0; r < 4; r++) {
        const uint8_t *from = emulator_shared() + at + (threadIdx.x / 32 % 4 * 2 + r % 2) * next_rows + r / 2 * next_inputs + threadIdx.x % 32 * 4;
        shared_address(from + 3);
        memcpy(&words[r], from, 4);
    }
    emulated_warpgroup_mma<128, MMA>(c, words, b, add);
}

inline void warpgroup_mma_fp16(float (&c)[16][4], uint64_t a, uint64_t b, int add)
{
    emulated_products_of_shared<mma>(c, a, b, add);
}

inline void warpgroup_mma_bf16(float (&c)[16][4], uint64_t a, uint64_t b, int add)
{
    emulated_products_of_shared<mma_bf16>(c, a, b, add);
}

template <int N> inline void warpgroup_add_fp16(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b)
{
    emulated_warpgroup_mma<8 * N, mma>(c, a, b, 1);
}

template <int N> inline void warpgroup_add_bf16(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b)
{
    emulated_warpgroup_mma<8 * N, mma_bf16>(c, a, b, 1);
}
#endif

} // namespace kvd

#endif
