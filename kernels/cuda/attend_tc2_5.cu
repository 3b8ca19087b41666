// The attention kernels of tc2.5 for the head_dims that are used most.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_tc2_5(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<TC2_5, 4>(p, stream);
}
