// The attention kernels of int2c for head_dims that are no powers of two.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_int2c_other(const attend_params &p, cudaStream_t stream)
{
    return launch_codec<INT2C, 1>(p, stream);
}
