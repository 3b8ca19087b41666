// The attention kernels of int4 on one side and int2 on the other, for the most used head_dims.
#include "kernels/cuda/launch.cuh"

cudaError_t kvd::launch_pairs(const attend_params &p, cudaStream_t stream)
{
    return p.codec == KVD_CODEC_INT4 ? launch_codec<INT4_INT2, 4>(p, stream) : launch_codec<INT2_INT4, 4>(p, stream);
}
