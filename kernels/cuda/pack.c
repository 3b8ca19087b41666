// Rotation matrices as operands of mma.m16n8k16 (kernels/cuda/device.cuh says in which order).
#include "kernels/cuda/pack.h"
#include "kernels/quantize.h"

#include <math.h>

// What is multiplied is exact: bf16, of which R takes two parts (16 bits), or codes, for which fp16
// is enough. R's largest element becomes 256, so that fp16's subnormals are far, and so that
// matrices whose elements are all of one size (Hadamard) are exact.
static const float LARGEST = 256;

enum part { BF16, BF16_REST, FP16 };

// Pairs of inputs of R, or of R^T, in the order in which lanes want them: parts, tiles of outputs,
// tiles of inputs, lanes, 4 words. place() says which two inputs, `in` and the next, and which
// output.
struct order {
    enum part first, last; // parts
    uint32_t outputs, inputs;
    bool transposed; // R^T
    void (*place)(uint32_t j, uint32_t i, uint32_t lane, uint32_t r, uint32_t *in, uint32_t *out);
};

// 16 rows are outputs, 16 columns inputs in the order of forward_channel.
static void place_queries(uint32_t j, uint32_t i, uint32_t lane, uint32_t r, uint32_t *in,
                          uint32_t *out)
{
    *in = 32 * (i / 2) + 8 * (lane % 4) + 4 * (i % 2) + 2 * (r / 2);
    *out = 16 * j + lane / 4 + 8 * (r % 2);
}

// Inputs in the order of forward_channel.
static void place_forward(uint32_t j, uint32_t i, uint32_t lane, uint32_t r, uint32_t *in,
                          uint32_t *out)
{
    *in = 32 * i + 8 * (lane % 4) + 2 * r;
    *out = 8 * j + lane / 4;
}

// Outputs in the order of inverse_channel: column g of tile j is that of lane g / 2, element g % 2.
static void place_inverse(uint32_t j, uint32_t i, uint32_t lane, uint32_t r, uint32_t *in,
                          uint32_t *out)
{
    uint32_t g = lane / 4;
    *in = 32 * i + r / 2 * 16 + r % 2 * 8 + 2 * (lane % 4);
    *out = j / 4 * 32 + 8 * (g / 2) + j % 4 * 2 + g % 2;
}

static const struct order back_order = {FP16, FP16, 8, 32, false, place_inverse};
static const struct order queries_order = {BF16, BF16_REST, 16, 16, false, place_queries};
static const struct order forward_order = {BF16, BF16_REST, 8, 32, false, place_forward};
static const struct order inverse_order = {FP16, FP16, 8, 32, true, place_inverse};

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

// Packs R [dim][dim] times `scale`, filled up with zeros to kvd_cuda_operand_dim; `to` has the
// operands of all matrices, this one's index is given.
static void pack(const float *m, uint32_t dim, float scale, const struct order *o, uint16_t *to,
                 uint64_t index)
{
    uint64_t parts = o->last - o->first + 1, step = o->transposed ? 1 : dim;
    uint32_t padded = kvd_cuda_operand_dim(dim), in, out;
    uint32_t *at = (uint32_t *)(void *)to + index * parts * padded * padded / 2;
    for (int part = (int)o->first; part <= (int)o->last; part++)
        for (uint32_t j = 0; j < padded / o->outputs; j++)
            for (uint32_t i = 0; i < padded / o->inputs; i++)
                for (uint32_t word_index = 0; word_index < 32 * 4; word_index++) {
                    o->place(j, i, word_index / 4, word_index % 4, &in, &out);
                    if (in >= dim ||
                        out >= dim) { // `in` and the next one are both there or both not
                        *at++ = 0;
                        continue;
                    }
                    const float *x =
                        m + (o->transposed ? (uint64_t)out * dim + in : (uint64_t)in * dim + out);
                    *at++ = word((float[]){scale * x[0], scale * x[step]}, (enum part)part);
                }
}

static float scale_of(const float *m, uint32_t dim)
{
    float top = 0;
    for (uint32_t k = 0; k < dim * dim; k++)
        top = fmaxf(top, fabsf(m[k]));
    return top > 0 ? LARGEST / top : 1;
}

float kvd_cuda_operands_pack(enum kvd_cuda_operands kind, const float *m, uint32_t dim,
                             uint16_t *to, uint64_t index)
{
    const struct order *const orders[] = {[KVD_CUDA_QUERIES] = &queries_order,
                                          [KVD_CUDA_FORWARD] = &forward_order,
                                          [KVD_CUDA_BACK] = &back_order};
    float scale = scale_of(m, dim);
    pack(m, dim, scale, orders[kind], to, index);
    return scale;
}

void kvd_cuda_rotation_pack(const float *r, uint64_t matrices, uint32_t dim, uint16_t *queries,
                            uint16_t *forward, uint16_t *inverse, float *scale,
                            float *inverse_columns)
{
    for (uint64_t i = 0; i < matrices; i++) {
        const float *m = r + i * dim * dim;
        scale[i] = scale_of(m, dim);
        if (queries)
            pack(m, dim, scale[i], &queries_order, queries, i);
        pack(m, dim, scale[i], &forward_order, forward, i);
        pack(m, dim, scale[i], &inverse_order, inverse, i);
        for (uint32_t c = 0; c < dim; c++) { // column c of R^T is row c of R
            double sum = 0;                  // of what products see
            for (uint32_t k = 0; k < dim; k++)
                sum += kvd_fp16_to_f32(kvd_f32_to_fp16(scale[i] * m[(uint64_t)c * dim + k]));
            inverse_columns[i * dim + c] = (float)(sum / scale[i]);
        }
    }
}
