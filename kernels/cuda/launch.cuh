// Which variants of the attention kernel are compiled, and which one a call takes.
#ifndef KVD_KERNELS_CUDA_LAUNCH_CUH
#define KVD_KERNELS_CUDA_LAUNCH_CUH

#include "kernels/cuda/decode.cuh"

#include <algorithm>

// Families of attention kernels beside int2's that are compiled, a sum of these: meson's option `kernels` says which.
#ifndef KVD_KERNELS
#define KVD_KERNELS kvd::ALL_KERNELS
#endif

namespace kvd
{

enum kernels : uint32_t {
    WITH_INT2C = 1,
    WITH_INT4 = 2, // its pairs with int2 too
    WITH_LEVELS = 4,
    WITH_TC = 8,
    WITH_UNEQUAL = 16, // the others' for head_dims of K that are not V's, but 192 and 128
    ALL_KERNELS = 31,
};

// What is compiled in one file, attend_<codec>.cu: head_dims that are powers of two, and the others.
cudaError_t launch_int2(const attend_params &p, cudaStream_t stream);
cudaError_t launch_int2_other(const attend_params &p, cudaStream_t stream);
cudaError_t launch_int2c(const attend_params &p, cudaStream_t stream);
cudaError_t launch_int2c_other(const attend_params &p, cudaStream_t stream);
cudaError_t launch_int4(const attend_params &p, cudaStream_t stream);
cudaError_t launch_pairs(const attend_params &p, cudaStream_t stream);
cudaError_t launch_levels2(const attend_params &p, cudaStream_t stream);
cudaError_t launch_levels3(const attend_params &p, cudaStream_t stream);
cudaError_t launch_levels4(const attend_params &p, cudaStream_t stream);
cudaError_t launch_tc(const attend_params &p, cudaStream_t stream);
cudaError_t launch_tc2(const attend_params &p, cudaStream_t stream);
cudaError_t launch_tc2_5(const attend_params &p, cudaStream_t stream);

// attend_any.cu: whatever has no kernels of its own.
cudaError_t launch_any(const attend_params &p, cudaStream_t stream);
void plan_any(attend_params &p, uint64_t history_sum, uint32_t history_max, uint32_t window_max, uint32_t multiprocessors);
uint64_t any_scratch(const attend_params &p);

// attend_many.cu: many query rows, by blocks of MANY_ROWS, or of FEWER_ROWS; whether this device can, and where in scratch values of
// histories are.
constexpr uint32_t MANY_ROWS = 128, FEWER_ROWS = 64;
cudaError_t launch_many(const attend_params &p, cudaStream_t stream);
bool many_runs(const attend_params &p);

inline uint64_t many_values_at(const attend_params &p)
{
    return (scratch_of(p, 2).total + 255) / 256 * 256;
}

// attend_latent.cu: latents and their rope parts.
cudaError_t launch_latent(const attend_params &p, cudaStream_t stream);
void plan_latent(attend_params &p, uint64_t history_sum, uint32_t history_max, uint32_t window_max, uint32_t multiprocessors);
uint64_t latent_scratch_bytes(const attend_params &p);

inline bool takes_latents(const attend_params &p)
{
    return kvd_latent_dims_ok(p.dim_k, p.dim_v);
}

inline uint32_t rows_of_head(const attend_params &p)
{
    return p.q_len * (p.q_heads / p.kv_heads);
}

inline bool same_dims(const attend_params &p)
{
    return p.dim_k == p.dim_v;
}

constexpr bool most_used(uint32_t dk, uint32_t dv)
{
    return dk == dv && (dk == 64 || dk == 128);
}

inline bool most_used_dims(const attend_params &p)
{
    return most_used(p.dim_k, p.dim_v);
}

// Head_dims that have variants that leave out what only some calls want (`general`).
constexpr bool common_dims(uint32_t dk, uint32_t dv)
{
    return dk == dv || dk == 192;
}

// Whether a family's kernels are compiled.
constexpr bool has_kernels(int family)
{
    return family == INT2 || (KVD_KERNELS & (family == INT2C     ? WITH_INT2C
                                             : has_int4(family)   ? WITH_INT4
                                             : has_levels(family) ? WITH_LEVELS
                                             : is_tc(family)      ? WITH_TC
                                                                  : 0)) != 0;
}

// And for a pair of head_dims.
constexpr bool has_kernels(int family, uint32_t dk, uint32_t dv)
{
    return has_kernels(family) && (family == INT2 || common_dims(dk, dv) || (KVD_KERNELS & WITH_UNEQUAL) != 0);
}

// The family, or the pair, for which there might be kernels.
inline int family_of_call(const attend_params &p)
{
    if (p.codec == p.codec_v)
        return family_of(p.codec);
    if (p.codec == KVD_CODEC_INT4 && p.codec_v == KVD_CODEC_INT2 && most_used_dims(p))
        return INT4_INT2;
    return p.codec == KVD_CODEC_INT2 && p.codec_v == KVD_CODEC_INT4 && most_used_dims(p) ? INT2_INT4 : NO_FAMILY;
}

// What a call's kernels are compiled for; NO_FAMILY where only the kernel for any codecs is.
inline int compiled_for(const attend_params &p)
{
    int family = family_of_call(p);
    return has_kernels(family, p.dim_k, p.dim_v) ? family : NO_FAMILY;
}

inline bool takes_any(const attend_params &p)
{
    return compiled_for(p) == NO_FAMILY;
}

inline bool power_of_two(uint32_t x)
{
    return (x & (x - 1)) == 0;
}

// Codes of two bits that are their own values have all variants; those with int4 or levels, whose tiles leave no room for more warps,
// one a pair of head_dims, those with int4 one more for the most used head_dims. Of tc2 and tc2.5 the most used head_dims have all.
inline bool tuned(const attend_params &p)
{
    int codec = compiled_for(p);
    if (codec == TC)
        return most_used_dims(p);
    return !has_levels(codec) && !has_int4(codec);
}

// Whether more than eight rows have a variant of their own.
inline bool takes_sixteen_rows(const attend_params &p)
{
    return has_int4(compiled_for(p)) ? most_used_dims(p) : tuned(p) && same_dims(p) && p.dim_k <= 128;
}

inline uint32_t n_tiles(const attend_params &p)
{
    return takes_sixteen_rows(p) && rows_of_head(p) > 8 ? 2 : 1;
}

inline bool general(const attend_params &p)
{
    return p.q_len > 1 || p.window || p.softcap > 0 || !common_dims(p.dim_k, p.dim_v) || !tuned(p);
}

// Sixteen warps a multiprocessor, in blocks of 4, 8 or 16.
inline bool small_blocks(const attend_params &p)
{
    return n_tiles(p) == 1 && p.dim_k <= 128 && !general(p);
}

// Whether histories may be cut together: by blocks of 8 warps.
inline bool takes_shares(const attend_params &p)
{
    return !takes_any(p) && small_blocks(p) && most_used_dims(p);
}

template <int CODEC, int NT, int DK, int DV>
cudaError_t launch_both(const attend_params &p, cudaStream_t stream)
{
    return general(p) ? launch_attend<true, NT, DK, DV, 4, CODEC>(p, stream)
                      : launch_attend<false, NT, DK, DV, 4, CODEC>(p, stream);
}

template <int CODEC, int DK, int DV> cudaError_t launch_dims(const attend_params &p, cudaStream_t stream)
{
    if constexpr (has_levels(CODEC) || has_int4(CODEC) || CODEC == TC || !common_dims(DK, DV)) {
        if constexpr (has_int4(CODEC) && most_used(DK, DV))
            if (n_tiles(p) == 2)
                return launch_attend<true, 2, DK, DV, 4, CODEC>(p, stream);
        return launch_attend<true, 1, DK, DV, 4, CODEC>(p, stream);
    } else {
        if constexpr (most_used(DK, DV))
            if (p.shares)
                return launch_attend<false, 1, DK, DV, 8, CODEC, true>(p, stream);
        if constexpr (DK == DV && DK <= 128) {
            if (p.warps == 16)
                return launch_attend<false, 1, DK, DV, 16, CODEC>(p, stream);
            if (p.warps == 8)
                return launch_attend<false, 1, DK, DV, 8, CODEC>(p, stream);
            if (n_tiles(p) == 2)
                return launch_both<CODEC, 2, DK, DV>(p, stream);
        }
        return launch_both<CODEC, 1, DK, DV>(p, stream);
    }
}

// Pairs of head_dims: those of the tuned kernels of tc2 and tc2.5 (4), those without (3), those whose K's is a power of two (2),
// is none (1), or all (0).
constexpr bool pair_is(int which, int dk, int dv)
{
    bool power = (dk & (dk - 1)) == 0;
    return which == 0 || (which == 1 && !power) || (which == 2 && power) || (which == 3 && !most_used(dk, dv)) ||
           (which == 4 && most_used(dk, dv));
}

template <int CODEC, int WHICH> cudaError_t launch_codec(const attend_params &p, cudaStream_t stream)
{
#define KVD_HEAD_DIMS(dk, dv)                    \
    if constexpr (pair_is(WHICH, dk, dv) && has_kernels(CODEC, dk, dv)) \
        if (p.dim_k == (dk) && p.dim_v == (dv))                           \
            return launch_dims<CODEC, dk, dv>(p, stream);
#include "proto/head_dims.def"
    return cudaErrorInvalidValue;
}

} // namespace kvd

#endif
