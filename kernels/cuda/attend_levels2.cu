// The attention kernels of int2-lm and turboquant-2.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_levels2(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<LEVELS2, 0>(p, stream);
}
