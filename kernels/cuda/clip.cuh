// The clip's threshold: the n-th largest of |x| in each of 8 rows, a row in four lanes.
//
// Values are counted, not sorted: |x| in fp16, rounded towards zero, less a guess and saturated is 0 or 1,
// two at a time, and the sum is how many exceed the guess. A guess that n values exceed, or n - 1, leads to
// the n-th largest by one pass over the exact values. A normal row finds one in two guesses, eight rows
// together in four. Where none is found (ties, or values far apart) the place is halved down to one value
// by exact counts. The result is exact to the last bit.
#ifndef KVD_KERNELS_CUDA_CLIP_CUH
#define KVD_KERNELS_CUDA_CLIP_CUH

#include "kernels/cuda/device.cuh"

namespace kvd
{

template <int D> class clip_search
{
    // Guesses are fp16 values between these: above LEAST two values differ by 1 or more. A row's mean
    // |x| is scaled to something from 2048 to 4096.
    static constexpr float LEAST = 1024, MOST = 65472;
    static constexpr int PASSES = 8;

    float first, slope; // the first guess, of a row's sum; a guess's relative step for a value more

    // Of D / 8 words that are summed by halves.
    __host__ __device__ static constexpr int words_left(int level)
    {
        int n = D / 8;
        for (int i = 0; i < level; i++)
            n = (n + 1) / 2;
        return n;
    }

    __device__ static inline float bounded_guess(float x)
    {
        return fminf(fmaxf(x, LEAST), MOST);
    }

    // How many of a row's values exceed a guess.
    __device__ static inline float count(const uint32_t (&y)[D / 8], uint32_t guess)
    {
        uint32_t more[D / 8];
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            more[i] = saturated_difference(y[i], guess);
        static_for<6>([&](auto level) { // as many levels as a latent has halves
            constexpr int n = words_left(level), half = (n + 1) / 2; // of an odd number the middle one waits
#pragma unroll
            for (int i = 0; i < n / 2; i++)
                more[i] = sum_fp16(more[i], more[i + half]);
        });
        float2 sum = unpack_fp16(more[0]);
        return quad_sum(sum.x + sum.y);
    }

    // The bits of the least |x| that exceeds a guess, `one` being the size of a 1 of a guess.
    __device__ static inline uint32_t above(float guess, float one)
    {
        return __float_as_uint(__half2float(__ushort_as_half(__half_as_ushort(__float2half_rn(guess)) + 1)) * one);
    }

public:
    int n; // 0: nothing is clipped

    clip_search() = default;

    __device__ inline explicit clip_search(int clipped)
        : n(clipped)
    {
        float z = fmaxf(-normcdfinvf((n - 0.5f) / (2 * D)), 0.25f);
        first = z * (1.2533141f / D); // sqrt(pi / 2): a normal distribution's deviation by its mean |x|
        slope = 1.2533141f / (D * z) * expf(0.5f * z * z);
    }

    // The least |x| from `at` on, or the greatest below it: bits of both times two, so that the sign
    // falls out.
    template <typename X> __device__ static inline uint32_t nearest(X x, uint32_t at, bool upwards)
    {
        uint32_t factor = upwards ? 2 : 0u - 2, plus = upwards ? 0u - 2 * at : 2 * at - 1, best[2] = {~0u, ~0u};
#pragma unroll
        for (int i = 0; i < D / 4; i += 2)
            best[i / 2 % 2] = __vimin3_u32(__float_as_uint(x(i)) * factor + plus,
                                           __float_as_uint(x(i + 1)) * factor + plus, best[i / 2 % 2]);
        uint32_t y = quad_min(min(best[0], best[1]));
        return (upwards ? y - plus : plus - y) / 2;
    }

    // All lanes take part; x gives the D / 4 values of a row that a lane has.
    template <typename X> __device__ inline float operator()(X x) const
    {
        float sums[4] = {}; // a normal row's n-th largest follows from its mean |x|
#pragma unroll
        for (int i = 0; i < D / 4; i++)
            sums[i % 4] += fabsf(x(i));
        float sum = quad_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        // Of 2048 times D, or the power of two below it, and a bias.
        constexpr uint32_t exponent = 127 + 127 + 11 + (D >= 512 ? 9 : D >= 256 ? 8 : D >= 128 ? 7 : 6);
        uint32_t up = min(exponent - (__float_as_uint(sum) >> 23), 253u);
        float unit = __uint_as_float(up << 23), one = __uint_as_float(254 - up << 23);
        uint32_t y[D / 8];
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            y[i] = truncate_fp16(fabsf(x(2 * i)) * unit, fabsf(x(2 * i + 1)) * unit);
        // More than n - 1 values exceed `low`, fewer than n exceed `high`. n + excess - 1/2 exceed `guess`.
        float guess = bounded_guess(sum * unit * first), low = -INFINITY, high = INFINITY, excess;
#pragma unroll 1
        for (int pass = 0;; pass++) {
            uint32_t both = pack_fp16(guess, guess);
            guess = unpack_fp16(both).x;
            excess = count(y, both) - (n - 0.5f);
            bool found = fabsf(excess) < 1;
            if (__all_sync(~0u, found) || pass == PASSES)
                break;
            // By the density of a normal distribution from one side, by halves between two.
            low = excess > 0 ? guess : low;
            high = excess > 0 ? high : guess;
            float middle = 0.5f * (low + high), next = bounded_guess(guess * fmaxf(fmaf(slope, excess, 1), 0.25f));
            computed_here(next); // beside `middle`, not behind it
            next = fabsf(middle) < INFINITY ? middle : next;
            guess = found ? guess : next;
        }
        // The n-th largest is `from` or more, and less than `to`.
        uint32_t from = nearest(x, above(guess, one), excess > 0), to = from + 1;
        if (fabsf(excess) > 1) {
            from = low > 0 ? above(low, one) : 0;
            to = high < INFINITY ? above(high, one) : 0x80000000;
        }
#pragma unroll 1
        while (__any_sync(~0u, to - from > 1)) {
            uint32_t middle = from + (to - from) / 2, more = 0;
#pragma unroll
            for (int i = 0; i < D / 4; i++)
                more += (__float_as_uint(x(i)) & 0x7fffffff) >= middle;
            (quad_sum(more) >= (uint32_t)n ? from : to) = middle;
        }
        return __uint_as_float(from);
    }
};

} // namespace kvd

#endif
