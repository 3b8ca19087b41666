// The attention kernels of int2c.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_int2c(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<INT2C, 2>(p, stream);
}
