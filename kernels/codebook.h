// The levels of codecs whose codes are a sign and an index of a magnitude: centroids of Lloyd-Max
// quantizers of a standard normal variable with 4, 8 and 16 levels, rounded to fp16. Lists, for
// initializers in C and CUDA.
//
// They are the fixed points of x_i = E[X | t_i < X < t_(i+1)], t_i = (x_(i-1) + x_i) / 2; mean
// squared errors 0.11748, 0.03455 and 0.00950 (Max, Quantizing for minimum distortion, 1960). A
// coordinate of a randomly rotated vector of norm r is near normal with deviation r / sqrt(dim).
#ifndef KVD_KERNELS_CODEBOOK_H
#define KVD_KERNELS_CODEBOOK_H

// clang-format off
#define KVD_MAGNITUDES_2 0.452880859375f, 1.5107421875f
#define KVD_MAGNITUDES_3 0.2451171875f, 0.755859375f, 1.34375f, 2.15234375f
#define KVD_MAGNITUDES_4 0.12841796875f, 0.387939453125f, 0.65673828125f, 0.9423828125f, 1.255859375f, 1.6181640625f, \
                         2.068359375f, 2.732421875f
#define KVD_NEGATIVES_2 -0.452880859375f, -1.5107421875f
#define KVD_NEGATIVES_3 -0.2451171875f, -0.755859375f, -1.34375f, -2.15234375f
#define KVD_NEGATIVES_4 -0.12841796875f, -0.387939453125f, -0.65673828125f, -0.9423828125f, -1.255859375f, \
                        -1.6181640625f, -2.068359375f, -2.732421875f
// The magnitudes' fp16 bits, and where one magnitude gives way to the next.
#define KVD_MAGNITUDE_BITS_2 0x373f, 0x3e0b
#define KVD_MAGNITUDE_BITS_3 0x33d8, 0x3a0c, 0x3d60, 0x404e
#define KVD_MAGNITUDE_BITS_4 0x301c, 0x3635, 0x3941, 0x3b8a, 0x3d06, 0x3e79, 0x4023, 0x4177
#define KVD_THRESHOLDS_2 0.98159882f
#define KVD_THRESHOLDS_3 0.50054973f, 1.04995728f, 1.74792749f
#define KVD_THRESHOLDS_4 0.25822166f, 0.52240371f, 0.79954979f, 1.09928583f, 1.43713879f, 1.84353181f, 2.40080340f
// clang-format on

// From one to the next of four, and of sixteen, evenly spaced levels of least squared error for
// such a variable.
#define KVD_EVEN_STEP   0.9957f
#define KVD_EVEN_STEP_4 0.3352f

// 2^(i / 8): int2c's scales, but for powers of two.
#define KVD_EIGHTHS                                                                                \
    1, 1.0905077f, 1.1892071f, 1.2968396f, 1.41421356f, 1.5422108f, 1.6817928f, 1.8340081f

// How a row's scale is chosen: quantize.h.
enum kvd_scale {
    KVD_SCALE_PUBLISHED = 0,
    KVD_SCALE_LEAST_SQUARES = 1,
    KVD_SCALE_UNBIASED = 2,
    KVD_SCALE_COUNT
};

#endif
