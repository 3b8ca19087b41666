// The attention kernels of int4.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_int4(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<INT4, 0>(p, stream);
}
