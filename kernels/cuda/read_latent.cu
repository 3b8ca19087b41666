// Latents of a history: the kernels of other dims, whose matrix lies in the L2 cache. A launch is for one side, of which `codec`
// is.
#include "kernels/cuda/latent.cuh"
#include "kernels/cuda/read.cuh"

cudaError_t kvd::read_latents(const read_params &p, uint32_t begin, uint32_t end, cudaStream_t stream)
{
    switch (family_of(p.codec)) {
    case INT2:
        return read_side<INT2, LATENT>(p, begin, end, true, stream);
    case INT2C:
        return read_side<INT2C, LATENT>(p, begin, end, true, stream);
    case LEVELS2:
        return read_side<LEVELS2, LATENT>(p, begin, end, true, stream);
    case LEVELS3:
        return read_side<LEVELS3, LATENT>(p, begin, end, true, stream);
    case LEVELS4:
        return read_side<LEVELS4, LATENT>(p, begin, end, true, stream);
    case INT4:
        return read_side<INT4, LATENT>(p, begin, end, true, stream);
    default:
        return cudaErrorInvalidValue;
    }
}
