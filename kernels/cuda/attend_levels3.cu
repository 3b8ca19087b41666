// The attention kernels of turboquant-3.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_levels3(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<LEVELS3, 0>(p, stream);
}
