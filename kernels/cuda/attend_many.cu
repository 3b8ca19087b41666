// Attention of many query rows.
#include "kernels/cuda/many.cuh"

using namespace kvd;

cudaError_t kvd::launch_many(const attend_params &p, cudaStream_t stream)
{
    return p.dim_k == 64 ? launch_many_dims<64>(p, stream) : launch_many_dims<128>(p, stream);
}

// Products of warpgroups want code of Hopper's own, which this device runs or does not.
bool kvd::many_runs(const attend_params &p)
{
#ifdef KVD_CUDA_PORTABLE
    return false;
#else
    cudaFuncAttributes code;
    cudaError_t rc = p.dim_k == 64 ? cudaFuncGetAttributes(&code, many_kernel<64, HISTORY>) : cudaFuncGetAttributes(&code, many_kernel<128, HISTORY>);
    if (rc)
        (void)cudaGetLastError();
    return rc == cudaSuccess && code.ptxVersion == 90;
#endif
}
