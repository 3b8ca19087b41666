// The attention kernels of tc2 and tc2.5 that serve both: all head_dims but the most used.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_tc(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<TC, 3>(p, stream);
}
