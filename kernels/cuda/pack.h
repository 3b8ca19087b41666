// Operands of a matrix. Host code.
#ifndef KVD_KERNELS_CUDA_PACK_H
#define KVD_KERNELS_CUDA_PACK_H

#include "kernels/cuda/api.h"

enum kvd_cuda_operands {
    KVD_CUDA_QUERIES, // two parts of bf16: kvd_cuda_matrices' `queries`,
    KVD_CUDA_FORWARD, // `forward`,
    KVD_CUDA_BACK,    // fp16, and `inverse` of what m is the inverse of
};

// Packs m [dim][dim], for products x m, as the operands of matrix `index` in `to`. Returns what
// products with them must be divided by.
float kvd_cuda_operands_pack(enum kvd_cuda_operands kind, const float *m, uint32_t dim,
                             uint16_t *to, uint64_t index);

#endif
