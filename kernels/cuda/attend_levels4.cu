// The attention kernels of turboquant-4.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_levels4(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<LEVELS4, 0>(p, stream);
}
