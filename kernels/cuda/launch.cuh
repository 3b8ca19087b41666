// Which variants of the attention kernel are compiled, and which one a call takes.
#ifndef KVD_KERNELS_CUDA_LAUNCH_CUH
#define KVD_KERNELS_CUDA_LAUNCH_CUH

#include "kernels/cuda/decode.cuh"

namespace kvd
{

// One a file: attend_<codec>.cu.
cudaError_t launch_int2(const attend_params &p, cudaStream_t stream);
cudaError_t launch_int2c(const attend_params &p, cudaStream_t stream);
cudaError_t launch_levels2(const attend_params &p, cudaStream_t stream);
cudaError_t launch_levels3(const attend_params &p, cudaStream_t stream);
cudaError_t launch_levels4(const attend_params &p, cudaStream_t stream);

inline uint32_t rows_of_head(const attend_params &p)
{
    return p.q_len * (p.q_heads / p.kv_heads);
}

inline bool same_dims(const attend_params &p)
{
    return p.dim_k == p.dim_v;
}

// Codes that are their own values have all variants; those with levels one a pair of head_dims.
inline bool tuned(const attend_params &p)
{
    return p.codec <= KVD_CODEC_INT2C;
}

inline uint32_t n_tiles(const attend_params &p)
{
    return tuned(p) && same_dims(p) && p.dim_k <= 128 && rows_of_head(p) > 8 ? 2 : 1;
}

inline bool general(const attend_params &p)
{
    return p.q_len > 1 || p.window || p.softcap > 0 || !same_dims(p) || !tuned(p);
}

// Sixteen warps a multiprocessor, in blocks of 4, 8 or 16.
inline bool small_blocks(const attend_params &p)
{
    return n_tiles(p) == 1 && p.dim_k <= 128 && !general(p);
}

template <int CODEC, int DK> cudaError_t launch_mixed(const attend_params &p, cudaStream_t stream)
{
    if (p.dim_v == 64)
        return launch_attend<true, 1, DK, 64, 4, CODEC>(p, stream);
    if (p.dim_v == 128)
        return launch_attend<true, 1, DK, 128, 4, CODEC>(p, stream);
    return launch_attend<true, 1, DK, 256, 4, CODEC>(p, stream);
}

template <int CODEC, int NT, int D>
cudaError_t launch_same(const attend_params &p, cudaStream_t stream)
{
    return general(p) ? launch_attend<true, NT, D, D, 4, CODEC>(p, stream)
                      : launch_attend<false, NT, D, D, 4, CODEC>(p, stream);
}

template <int CODEC, int D> cudaError_t launch_dim(const attend_params &p, cudaStream_t stream)
{
    if constexpr (has_levels(CODEC)) {
        return launch_mixed<CODEC, D>(p, stream);
    } else {
        if (!same_dims(p))
            return launch_mixed<CODEC, D>(p, stream);
        if constexpr (D <= 128) {
            if (p.warps == 16)
                return launch_attend<false, 1, D, D, 16, CODEC>(p, stream);
            if (p.warps == 8)
                return launch_attend<false, 1, D, D, 8, CODEC>(p, stream);
            if (n_tiles(p) == 2)
                return launch_same<CODEC, 2, D>(p, stream);
        }
        return launch_same<CODEC, 1, D>(p, stream);
    }
}

template <int CODEC> cudaError_t launch_codec(const attend_params &p, cudaStream_t stream)
{
    if (p.dim_k == 64)
        return launch_dim<CODEC, 64>(p, stream);
    return p.dim_k == 128 ? launch_dim<CODEC, 128>(p, stream) : launch_dim<CODEC, 256>(p, stream);
}

} // namespace kvd

#endif
