// Rotation matrices as operands of mma.m16n8k16 (kernels/cuda/device.cuh says in which order).
#include "kernels/cuda/api.h"
#include "kernels/quantize.h"

#include <math.h>

// What is multiplied is exact: bf16, of which R takes two parts (16 bits), or codes, for which fp16
// is enough. R's largest element becomes 256, so that fp16's subnormals are far, and so that
// matrices whose elements are all of one size (Hadamard) are exact.
static const float LARGEST = 256;

enum part { BF16, BF16_REST, FP16 };

static uint32_t word(const float *x, enum part part)
{
    uint32_t w = 0;
    for (int e = 0; e < 2; e++) {
        uint16_t h = part == FP16 ? kvd_f32_to_fp16(x[e]) : kvd_f32_to_bf16(x[e]);
        if (part == BF16_REST)
            h = kvd_f32_to_bf16(x[e] - kvd_bf16_to_f32(h));
        w |= (uint32_t)h << 16 * e;
    }
    return w;
}

// Two elements of R, one input after the other, scaled.
static void inputs_of(const float *m, uint32_t dim, float scale, uint32_t in, uint32_t to, float *x)
{
    for (uint32_t e = 0; e < 2; e++)
        x[e] = scale * m[(uint64_t)(in + e) * dim + to];
}

// Of one matrix. 16 rows are outputs, 16 columns inputs in the order of forward_channel.
static void pack_queries(const float *m, uint32_t dim, float scale, uint32_t *out)
{
    for (int part = 0; part < 2; part++)
        for (uint32_t j = 0; j < dim / 16; j++)
            for (uint32_t i = 0; i < dim / 16; i++)
                for (uint32_t lane = 0; lane < 32; lane++)
                    for (uint32_t r = 0; r < 4; r++) {
                        uint32_t to = 16 * j + lane / 4 + 8 * (r % 2);
                        uint32_t in = 32 * (i / 2) + 8 * (lane % 4) + 4 * (i % 2) + 2 * (r / 2);
                        float x[2];
                        inputs_of(m, dim, scale, in, to, x);
                        *out++ = word(x, part ? BF16_REST : BF16);
                    }
}

// Inputs in the order of forward_channel.
static void pack_forward(const float *m, uint32_t dim, float scale, uint32_t *out)
{
    for (int part = 0; part < 2; part++)
        for (uint32_t j = 0; j < dim / 8; j++)
            for (uint32_t i = 0; i < dim / 32; i++)
                for (uint32_t lane = 0; lane < 32; lane++)
                    for (uint32_t r = 0; r < 4; r++) {
                        float x[2];
                        inputs_of(m, dim, scale, 32 * i + 8 * (lane % 4) + 2 * r, 8 * j + lane / 4,
                                  x);
                        *out++ = word(x, part ? BF16_REST : BF16);
                    }
}

// Outputs in the order of inverse_channel: column g of tile j is that of lane g / 2, element g % 2.
static void pack_inverse(const float *m, uint32_t dim, float scale, uint32_t *out)
{
    for (uint32_t j = 0; j < dim / 8; j++)
        for (uint32_t i = 0; i < dim / 32; i++)
            for (uint32_t lane = 0; lane < 32; lane++)
                for (uint32_t r = 0; r < 4; r++) {
                    uint32_t g = lane / 4, in = 32 * i + r / 2 * 16 + r % 2 * 8 + 2 * (lane % 4);
                    uint32_t to = j / 4 * 32 + 8 * (g / 2) + j % 4 * 2 + g % 2;
                    const float *row = m + (uint64_t)to * dim + in;
                    float x[2] = {scale * row[0], scale * row[1]};
                    *out++ = word(x, FP16);
                }
}

void kvd_cuda_rotation_pack(const float *r, uint64_t matrices, uint32_t dim, uint16_t *queries,
                            uint16_t *forward, uint16_t *inverse, float *scale,
                            float *inverse_columns)
{
    for (uint64_t i = 0; i < matrices; i++) {
        const float *m = r + i * dim * dim;
        float top = 0;
        for (uint32_t k = 0; k < dim * dim; k++)
            top = fmaxf(top, fabsf(m[k]));
        scale[i] = top > 0 ? LARGEST / top : 1;
        if (queries)
            pack_queries(m, dim, scale[i], (uint32_t *)(void *)queries + i * dim * dim);
        pack_forward(m, dim, scale[i], (uint32_t *)(void *)forward + i * dim * dim);
        pack_inverse(m, dim, scale[i], (uint32_t *)(void *)inverse + i * dim * dim / 2);
        for (uint32_t c = 0; c < dim; c++) { // column c of R^T is row c of R
            double sum = 0;                  // of what products see
            for (uint32_t k = 0; k < dim; k++)
                sum += kvd_fp16_to_f32(kvd_f32_to_fp16(scale[i] * m[(uint64_t)c * dim + k]));
            inverse_columns[i * dim + c] = (float)(sum / scale[i]);
        }
    }
}
