// The attention kernels of int2, and bf16 pages, for head_dims that are no powers of two.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_int2_other(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<INT2, 1>(p, stream);
}
