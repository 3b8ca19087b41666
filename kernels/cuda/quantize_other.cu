// The kernels that quantize where a history ends inside a chunk, or scales are not as published.
#include "kernels/cuda/quantize.cuh"

cudaError_t kvd::quantize_other(const append_params &p, cudaStream_t stream)
{
    return quantize<false>(p, stream);
}
