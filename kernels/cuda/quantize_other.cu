// The kernels that quantize where a history ends inside a chunk, or scales are not as published; and those of int4, whatever
// the call.
#include "kernels/cuda/quantize.cuh"

cudaError_t kvd::quantize_other(const append_params &p, which_sides which, cudaStream_t stream)
{
    return quantize<false>(p, which, stream);
}

cudaError_t kvd::quantize_int4(const append_params &p, which_sides which, cudaStream_t stream)
{
    return quantize_sides<INT4, false>(p, which, stream);
}
