// The attention kernels of int2, and bf16 pages.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_int2(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<INT2, 2>(p, stream);
}
