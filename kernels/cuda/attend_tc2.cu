// The attention kernels of tc2 for the head_dims that are used most.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_tc2(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<TC2, 4>(p, stream);
}
