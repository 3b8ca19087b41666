// The tail of direct mode: a worker's newest tokens, in a ring of its own.
#include "kernels/cuda/api.h"
#include "kernels/cuda/device.cuh"

namespace kvd
{

// Block (sequence, query, side): 16 bytes a thread.
__global__ void store_kernel(const __grid_constant__ kvd_cuda_store_params p)
{
    wait_for_previous();
    let_next_start();
    uint32_t s = blockIdx.x, i = blockIdx.y;
    bool v = blockIdx.z;
    uint32_t row = p.kv_heads * (v ? p.dim_v : p.dim_k) / 8; // in units of 16 bytes
    uint32_t token = p.length[s] + p.tail.tokens[s] - p.q_len + i;
    const uint4 *from = (const uint4 *)(v ? p.v : p.k) + ((uint64_t)s * p.q_len + i) * row;
    uint4 *to = (uint4 *)(v ? p.tail.v : p.tail.k) +
                ((uint64_t)s * p.tail.ring + token % p.tail.ring) * row;
    for (uint32_t c = threadIdx.x; c < row; c += blockDim.x)
        to[c] = from[c];
}

} // namespace kvd

extern "C" int kvd_cuda_store(const struct kvd_cuda_store_params *p, struct CUstream_st *stream)
{
    if (p->sequences == 0 || p->q_len == 0 || p->q_len > p->tail.ring || !p->tail.tokens ||
        p->dim_k % 8 || p->dim_v % 8)
        return -1;
    return kvd::launch_behind(kvd::store_kernel, dim3(p->sequences, p->q_len, 2), 128, 0, stream, *p);
}
