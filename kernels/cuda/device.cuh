// What the kernels share: tiles of codes, launches, rotations on tensor cores.
#ifndef KVD_KERNELS_CUDA_DEVICE_CUH
#define KVD_KERNELS_CUDA_DEVICE_CUH

#include "kernels/codebook.h"
#include "kernels/cuda/api.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/instructions.cuh"

namespace kvd
{

constexpr int PAGE = KVD_PAGE_TOKENS;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float TWO24 = 16777216.0f;
constexpr float NONE = -1e30f; // the maximum of no logits

// What kernels are compiled for: a codec, but for turboquant-2, which differs from int2-lm in its
// parameters alone and is told apart at run time. The table of codecs says which family reads a codec.
constexpr int INT2 = KVD_CODEC_INT2, INT2C = KVD_CODEC_INT2C, LEVELS2 = KVD_CODEC_INT2_LM,
              LEVELS3 = KVD_CODEC_TURBOQUANT_3, LEVELS4 = KVD_CODEC_TURBOQUANT_4, INT4 = KVD_CODEC_INT4,
              NO_FAMILY = -1;

// tc2 and tc2.5: kernels for both, and, where they are fast, for one of them (tc.cuh).
constexpr int TC = 64, TC2 = KVD_CODEC_TC2, TC2_5 = KVD_CODEC_TC2_5;

// Pairs of int4 and int2 that have kernels of their own, K's codec first.
constexpr int INT4_INT2 = 65, INT2_INT4 = 66;

__host__ __device__ constexpr int key_codec(int codec)
{
    return codec == INT4_INT2 ? INT4 : codec == INT2_INT4 ? INT2 : codec;
}

__host__ __device__ constexpr int value_codec(int codec)
{
    return codec == INT4_INT2 ? INT2 : codec == INT2_INT4 ? INT4 : codec;
}

// Codes of four bits take the room of the ring's third slot, and that of a fourth block a multiprocessor.
__host__ __device__ constexpr bool has_int4(int codec)
{
    return key_codec(codec) == INT4 || value_codec(codec) == INT4;
}

__host__ __device__ constexpr bool is_tc(int codec)
{
    return codec == TC || codec == TC2 || codec == TC2_5;
}

// The bits of a register's stream of K's codes. COMPILED: TC, where `codec` says which, or the codec.
template <int COMPILED> __host__ __device__ constexpr int stream_bits(uint32_t codec, int dim)
{
    return dim / 16 * ((COMPILED == TC ? (int)codec : COMPILED) == TC2_5 ? 5 : 4) / 2;
}

// NO_FAMILY where there is no such codec, too.
__host__ __device__ constexpr int family_of(uint32_t codec)
{
    switch (codec) {
#define KVD_CODEC(id, number, name, bits, param_bytes, levels, kernel, transform) \
    case number:                                                                  \
        return kernel;
#include "proto/codecs.def"
    }
    return NO_FAMILY;
}

// Of tc2 and tc2.5, V's.
__host__ __device__ constexpr int code_bits(int codec)
{
    switch (codec) {
    case TC:
        return 2;
#define KVD_CODEC(id, number, name, bits, ...) \
    case number:                               \
        return bits;
#include "proto/codecs.def"
    }
    return 0;
}

// Whether codes mean levels of a codebook; else they are their own values.
__host__ __device__ constexpr bool has_levels(int codec)
{
    constexpr bool EVEN = false, SIGNED = true, CENTRED = false;
    switch (codec) {
#define KVD_CODEC(id, number, name, bits, param_bytes, levels, ...) \
    case number:                                                    \
        return levels;
#include "proto/codecs.def"
    }
    return EVEN && SIGNED && CENTRED;
}

// Whether attention takes a codec's levels from zero on, as it takes codes that are their own values: that saves instructions.
__host__ __device__ constexpr bool raised(int codec)
{
    return codec == LEVELS2;
}

// Bytes of one side's parameters; CODEC as compiled, `codec` as it is.
template <int CODEC> __host__ __device__ inline int params_bytes(uint32_t codec)
{
    return CODEC == INT2 || has_int4(CODEC) || (CODEC == LEVELS2 && codec == KVD_CODEC_INT2_LM) ? 256 : 128;
}

// Layout of a tile.
template <int DK, int DV, int CODEC> struct tile {
    static constexpr int K_BITS = code_bits(key_codec(CODEC)), V_BITS = code_bits(value_codec(CODEC));
    static constexpr int MOST_BYTES = is_tc(CODEC)
                                          ? 128 * stream_bits<CODEC>(TC2_5, DK) + 16 * DV + 256
                                          : 8 * (K_BITS * DK + V_BITS * DV) + (CODEC == INT2 || has_int4(CODEC) || CODEC == LEVELS2 ? 512 : 256);

    static __host__ __device__ constexpr int v_codes(uint32_t codec)
    {
        return is_tc(CODEC) ? 128 * stream_bits<CODEC>(codec, DK) : 8 * K_BITS * DK;
    }

    static __host__ __device__ constexpr int k_params(uint32_t codec)
    {
        return v_codes(codec) + 8 * V_BITS * DV;
    }

    static __host__ __device__ inline int v_params(uint32_t codec)
    {
        return k_params(codec) + params_bytes<CODEC>(codec);
    }

    static __host__ __device__ inline int bytes(uint32_t codec)
    {
        return k_params(codec) + 2 * params_bytes<CODEC>(codec);
    }
};

__device__ inline float low_bf16(uint32_t x)
{
    return __uint_as_float(x << 16);
}

__device__ inline float high_bf16(uint32_t x)
{
    return __uint_as_float(x & 0xffff0000u);
}

__device__ inline uint32_t word_of(const uint4 &x, int i)
{
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

__device__ inline uint32_t pack_fp16(float a, float b)
{
    __half2 h = __floats2half2_rn(a, b);
    return *(uint32_t *)&h;
}

__device__ inline uint32_t pack_bf16(float a, float b)
{
    __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    return *(uint32_t *)&h;
}

__device__ inline float2 unpack_fp16(uint32_t x)
{
    return __half22float2(*(__half2 *)&x);
}

__device__ inline float load_value(const uint8_t *at, bool f32)
{
    return f32 ? *(const float *)at : low_bf16(*(const uint16_t *)at);
}

__device__ inline void store_value(uint8_t *at, bool f32, float x)
{
    if (f32)
        *(float *)at = x;
    else
        *(__nv_bfloat16 *)at = __float2bfloat16_rn(x);
}

// -- codes ---------------------------------------------------------------------------------------

// Codes that are their own values are never dequantized: masked in place, the code in slot j of a word is the
// fp16 subnormal code * 2^-24 * 4^(j % 4). slot_factor undoes the last. Levels come as they are.
template <int CODEC> __device__ inline float slot_factor(int channel_tile)
{
    if (has_levels(CODEC))
        return 1;
    return __uint_as_float((uint32_t)(127 - 2 * (channel_tile % 4)) << 23);
}

template <int I> struct constant {
    __host__ __device__ constexpr operator int() const
    {
        return I;
    }
};

// Calls f(constant<0>()) to f(constant<N - 1>()).
template <int N, int I = 0, typename F> __device__ __forceinline__ void static_for(F &&f)
{
    if constexpr (I < N) {
        f(constant<I>());
        static_for<N, I + 1>(f);
    }
}

// Two fp16 of the same bits.
__host__ __device__ constexpr uint32_t both(uint32_t fp16)
{
    return fp16 * 0x00010001u;
}

constexpr double fp16_value(uint32_t bits) // of normal numbers
{
    double x = 1024 + (bits & 1023);
    for (uint32_t e = bits >> 10 & 31; e < 25; e++)
        x /= 2;
    return bits & 0x8000 ? -x : x;
}

// Not of what is half way between two.
constexpr double rounded_to_fp16(double x)
{
    double ulp = 1.0 / 1024, size = x < 0 ? -x : x;
    while (size < 1024 * ulp)
        ulp /= 2;
    while (size >= 2048 * ulp)
        ulp *= 2;
    return (double)(int)(x / ulp + (x < 0 ? -0.5 : 0.5)) * ulp;
}

// Magnitudes of three bits are (SQUARE x + LINEAR) x + CONSTANT, exactly. x has the index in its exponent's lowest bit and its
// mantissa's highest one. With what START has below these, x is 0.5640, 0.8140, 1.1279 or 1.6279, where one parabola goes through
// all four magnitudes. Multiply-adds of fp16 come twice as fast as instructions on bits, of which this leaves few.
constexpr uint32_t START = 0x3883, SQUARE = 0xb4e9, LINEAR = 0x40ee, CONSTANT = 0xbc30;

constexpr bool parabola_is_exact()
{
    constexpr uint32_t m[] = {KVD_MAGNITUDE_BITS_3};
    for (uint32_t i = 0; i < 4; i++) {
        double x = fp16_value(START | i << 9), y = rounded_to_fp16(fp16_value(SQUARE) * x + fp16_value(LINEAR));
        if (rounded_to_fp16(y * x + fp16_value(CONSTANT)) != fp16_value(m[i]))
            return false;
    }
    return true;
}
static_assert(parabola_is_exact(), "magnitudes of kernels/codebook.h");

// Two levels as fp16, from codes at bit SHIFT and 16 + SHIFT of a word of the plane of two bits, and at
// MORE and 16 + MORE of the second plane's.
template <int BITS, int SHIFT, int MORE> __device__ inline uint32_t levels_of(uint32_t w, uint32_t more)
{
    if constexpr (BITS == 2) {
        constexpr uint32_t m[] = {KVD_MAGNITUDE_BITS_2};
        uint32_t code = w >> SHIFT;
        return ((code & 0x00010001u) * (m[1] - m[0]) + m[0] * 0x00010001u) | (code << 14 & 0x80008000u);
    } else if constexpr (BITS == 3) {
        // A product, with what it has too much in the highest bit: a power of two would be made a shift, which takes the units of masks.
        constexpr int UP = SHIFT <= 9 ? 9 - SHIFT : 17 - SHIFT;
        uint32_t x = masked_with((SHIFT <= 9 ? w : shifted_right<8>(w)) * (0x80000000u | 1u << UP), 0x06000600u, both(START));
        uint32_t y = fma_fp16(x, both(SQUARE), both(LINEAR));
        return fma_fp16(y, x, both(CONSTANT)) | (more << (15 - MORE) & 0x80008000u);
    } else {
        // Codes eight bits apart are looked up together, first and second elements, four indices in a selector's nibbles; and what is
        // computed of a whole word is the same for all of its codes: the compiler computes it once.
        constexpr uint32_t m[] = {KVD_MAGNITUDE_BITS_4};
        constexpr uint32_t low0 = (m[0] & 255) | (m[1] & 255) << 8 | (m[2] & 255) << 16 | m[3] << 24;
        constexpr uint32_t low1 = (m[4] & 255) | (m[5] & 255) << 8 | (m[6] & 255) << 16 | m[7] << 24;
        constexpr uint32_t high0 = m[0] >> 8 | m[1] >> 8 << 8 | m[2] >> 8 << 16 | m[3] >> 8 << 24;
        constexpr uint32_t high1 = m[4] >> 8 | m[5] >> 8 << 8 | m[6] >> 8 << 16 | m[7] >> 8 << 24;
        static_assert(SHIFT == MORE, "both planes lie in the same way");
        constexpr bool ODD = SHIFT / 4 % 2; // of a byte's nibbles the upper one: second elements come first
        uint32_t bit2 = more & 0x55555555u;
        uint32_t indices = SHIFT % 4 ? (w >> 2 & 0x33333333u) | (bit2 & 0xccccccccu) : (w & 0x33333333u) | (bit2 << 2 & 0xccccccccu);
        uint32_t four = ODD ? (indices & 0xf0f0f0f0u) | (indices >> 20 & 0x0f0f0f0fu) : (indices & 0x0f0f0f0fu) | (indices >> 12 & 0xf0f0f0f0u);
        uint32_t signs = __byte_perm(more, 0, ODD ? 0x1302 : 0x3120) << (6 - SHIFT % 8) & 0x80808080u;
        uint32_t lows = __byte_perm(low0, low1, four), highs = __byte_perm(high0, high1, four) | signs;
        return __byte_perm(lows, highs, SHIFT < 8 ? (ODD ? 0x4051 : 0x5140) : (ODD ? 0x6273 : 0x7362));
    }
}

// Levels of two bits, halved and from the lowest one on (raised): 0, 0.3501, 0.6499 and 1 of RAISED_UNIT. The index is put where it is the
// highest bit of an exponent, so that of x = RAISED and 65,536 times that, with their signs, RAISED_STEP x + 1 / 2 has
// the larger one far beyond 0 and 1, within which the instruction keeps it.
constexpr float MAGNITUDES_2[] = {KVD_MAGNITUDES_2}, RAISED_UNIT = 2 * MAGNITUDES_2[1];
constexpr uint32_t RAISED = 0x3400, RAISED_STEP = 0x38cc, HALF = 0x3800;

constexpr double raised_error() // of the smaller magnitude, by itself
{
    return fp16_value(RAISED) * fp16_value(RAISED_STEP) * RAISED_UNIT / MAGNITUDES_2[0] - 1;
}
static_assert(raised_error() > -1.5e-4 && raised_error() < 1.5e-4, "magnitudes of kernels/codebook.h");

// Of codes as levels_of has them; if FLIPPED, 1 less that.
template <int SHIFT, bool FLIPPED> __device__ inline uint32_t raised_levels_of(uint32_t w)
{
    uint32_t x = masked_with(w << (14 - SHIFT), 0xc000c000u, both(FLIPPED ? RAISED ^ 0x8000 : RAISED));
    return saturated_fma_fp16(x, both(RAISED_STEP), both(HALF));
}

// Where channel tiles lie in a chunk of a plane of WIDTH bits a code: kernels/format.h's kvd_piece_of and kvd_side_by_side.
struct piece {
    int first, lane, at; // channel tile, bytes a lane, place in the chunk
    int word;            // of those that a lane loads of the chunk
};

__host__ __device__ constexpr piece piece_of(int dim, int width, int channel_tile)
{
    piece p = {0, 16, 0, 0};
    for (;;) {
        int tiles = p.lane / width;
        if (p.first + tiles > dim / 16) {
            p.lane /= 2;
        } else if (channel_tile < p.first + tiles) {
            return p;
        } else {
            p.first += tiles;
            p.at += 32 * p.lane;
            p.word += (p.lane + 3) / 4;
        }
    }
}

__host__ __device__ constexpr bool side_by_side(int dim, int width)
{
    return dim == 64 || (dim == 128 && width == 1);
}

// Words that a lane loads of a chunk. Those of less than 32 bits are spread: first elements from bit 0, second ones from bit 16 on.
__host__ __device__ constexpr int words_of_chunk(int dim, int width)
{
    return side_by_side(dim, width) ? 4 : piece_of(dim, width, dim / 16 - 1).word + (piece_of(dim, width, dim / 16 - 1).lane + 3) / 4;
}

// Where register r of a channel tile of a chunk lies in them.
struct word_place {
    int word, bit;
};

__host__ __device__ constexpr word_place place_in_words(int dim, int width, int chunk, int channel_tile, int r)
{
    piece p = piece_of(dim, width, channel_tile);
    if (side_by_side(dim, width))
        return {r, chunk % (16 / p.lane) * p.lane + width * channel_tile};
    int at = r * p.lane + width * (channel_tile - p.first);
    return {p.word + at / 16, at % 16};
}

// A lane's words of a chunk of a plane.
template <int D, int WIDTH> struct plane_words {
    uint32_t word[words_of_chunk(D, WIDTH)];

    __device__ inline void load_words(int to, const uint8_t *from, constant<16>)
    {
        uint4 x = *(const uint4 *)from;
        word[to] = x.x, word[to + 1] = x.y, word[to + 2] = x.z, word[to + 3] = x.w;
    }

    __device__ inline void load_words(int to, const uint8_t *from, constant<8>)
    {
        uint2 x = *(const uint2 *)from;
        word[to] = x.x, word[to + 1] = x.y;
    }

    __device__ inline void load_words(int to, const uint8_t *from, constant<4>)
    {
        word[to] = *(const uint32_t *)from;
    }

    __device__ inline void load_words(int to, const uint8_t *from, constant<2>)
    {
        word[to] = __byte_perm(*(const uint16_t *)from, 0, 0x4140);
    }

    __device__ inline void load_words(int to, const uint8_t *from, constant<1>)
    {
        uint32_t x = *from;
        word[to] = (x & 15) | (x & 0xf0) << 12;
    }

    __device__ inline void load(const uint8_t *plane, int chunk)
    {
        int lane = threadIdx.x % 32;
        if constexpr (side_by_side(D, WIDTH)) {
            constexpr int CHUNKS = 256 / (WIDTH * D); // of a load
            load_words(0, plane + chunk / CHUNKS * 512 + lane * 16, constant<16>());
        } else {
            static_for<D / 16>([&](auto ct) {
                constexpr piece p = piece_of(D, WIDTH, ct);
                if constexpr (p.first == ct)
                    load_words(p.word, plane + chunk * (2 * WIDTH * D) + p.at + lane * p.lane, constant<p.lane>());
            });
        }
    }
};

// K's or V's codes of chunk C, and the A operand of channel tile CT in them.
template <int D, int CODEC> struct code_words {
    static constexpr int BITS = code_bits(CODEC), MORE_WIDTH = BITS == 3 ? 1 : 2;
    // Chunks whose bits lie at different places of their words: chunk c's are those of c % PLACES.
    static constexpr int PLACES = BITS == 3 && side_by_side(D, 1) ? 256 / D : side_by_side(D, 2) ? 2 : 1;
    plane_words<D, 2> low;
    plane_words<D, MORE_WIDTH> more;

    // Of chunk c; operand's C may be any chunk whose bits lie as c's do.
    __device__ inline void load(const uint8_t *codes, int c)
    {
        low.load(codes, c);
        if constexpr (BITS > 2)
            more.load(codes + 16 * D, c);
    }

    // Codes that are their own values are masked in place, those of channel tile CT at bit 2 (CT % 4) of a half, int4's two upper bits
    // two further; if FLIPPED, of the largest less the code.
    template <int C, int CT, bool FLIPPED = false> __device__ inline void operand(uint32_t a[4]) const
    {
        static_for<4>([&](auto r) {
            constexpr word_place at = place_in_words(D, 2, C, CT, r);
            uint32_t w = low.word[at.word];
            if constexpr (!has_levels(CODEC)) {
                constexpr int to = 2 * (CT % 4);
                constexpr uint32_t mask = 0x00030003u << to, flip = FLIPPED ? ~0u : 0;
                w = at.bit >= to ? w >> (at.bit >= to ? at.bit - to : 0) : w << (at.bit >= to ? 0 : to - at.bit);
                a[r] = (w ^ flip) & mask;
                if constexpr (CODEC == INT4) {
                    constexpr word_place above = place_in_words(D, MORE_WIDTH, C, CT, r);
                    constexpr int up = to + 2 - above.bit;
                    uint32_t high = more.word[above.word];
                    high = up > 0 ? high << (up > 0 ? up : 0) : high >> (up > 0 ? 0 : -up);
                    a[r] |= (high ^ flip) & mask << 2;
                }
            } else {
                constexpr word_place above = place_in_words(D, MORE_WIDTH, C, CT, r);
                a[r] = levels_of<BITS, at.bit, above.bit>(w, BITS > 2 ? more.word[above.word] : w);
            }
        });
    }

    // The same as attention's products take them.
    template <int C, int CT, bool FLIPPED> __device__ inline void summand(uint32_t a[4]) const
    {
        if constexpr (raised(CODEC))
            static_for<4>([&](auto r) {
                constexpr word_place at = place_in_words(D, 2, C, CT, r);
                a[r] = raised_levels_of<at.bit, FLIPPED>(low.word[at.word]);
            });
        else
            operand<C, CT, FLIPPED>(a);
    }
};

// int2c's bytes: kernels/quantize.c.
__device__ inline float2 unpack_bytes(uint32_t x)
{
    int n = (int)(x & 255), centre = (int8_t)(x >> 8);
    float scale = n ? fast_exp2((float)(n - 128) * 0.125f) : 0;
    return make_float2(scale, scale * ((float)centre * 0.125f - 1.5f));
}

// The parameters (scale, min) of tokens g and g + 8 of chunk c.
template <int CODEC>
__device__ inline void load_params(const uint8_t *params, uint32_t codec, int c, float2 &p0, float2 &p1,
                                   int g = threadIdx.x % 32 / 4)
{
    if (params_bytes<CODEC>(codec) == 256) {
        uint2 raw = *(const uint2 *)(params + c * 64 + g * 8);
        p0 = unpack_fp16(raw.x);
        p1 = unpack_fp16(raw.y);
        return;
    }
    uint32_t raw = *(const uint32_t *)(params + c * 32 + g * 4);
    if constexpr (CODEC == INT2C) {
        p0 = unpack_bytes(raw);
        p1 = unpack_bytes(raw >> 16);
    } else {
        float2 scales = unpack_fp16(raw);
        p0 = make_float2(scales.x, 0);
        p1 = make_float2(scales.y, 0);
    }
}

// -- lanes ---------------------------------------------------------------------------------------

// x, which is the same in all lanes of a warp. The compiler, too, knows it then: with a branch on x it need not
// expect that the warp has parted.
__device__ inline uint32_t uniform(uint32_t x)
{
    return __reduce_max_sync(~0u, x);
}

// Over four neighbouring lanes.
template <typename T> __device__ inline T quad_sum(T x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <typename T> __device__ inline T quad_max(T x)
{
    x = max(x, __shfl_xor_sync(~0u, x, 1));
    return max(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline uint32_t quad_min(uint32_t x)
{
    x = min(x, __shfl_xor_sync(~0u, x, 1));
    return min(x, __shfl_xor_sync(~0u, x, 2));
}

// -- launches ------------------------------------------------------------------------------------

// Launches a kernel behind those on the stream.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, uint32_t threads, uint32_t shared, cudaStream_t stream, A &&...arguments)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches a kernel, before the one in front on the stream has finished where the code for this device can wait for that.
template <typename P>
cudaError_t launch_behind(void (*kernel)(P), dim3 grid, uint32_t threads, uint32_t shared, cudaStream_t stream, const P &p)
{
    cudaFuncAttributes code;
    cudaError_t rc = cudaFuncGetAttributes(&code, kernel);
    if (rc == cudaSuccess && shared > 0)
        rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (rc)
        return rc;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
#ifndef KVD_CUDA_PORTABLE
    config.numAttrs = code.ptxVersion >= 90;
#endif
    return cudaLaunchKernelEx(&config, kernel, p);
}

// -- rotations on tensor cores -------------------------------------------------------------------

// A packed matrix holds B operands, [part][out tile of 8][in tile of 16 / 2][lane][4 words], or, for
// queries, A operands of its transpose, [part][out tile of 16][in tile of 16][lane][4 words].
// Channels are dealt to operands so that 16 bytes of a row of bf16 are operands as they are loaded.
// As inputs of `forward`: word i of a lane's operands, the (2 i % 4)-th and next words of step i / 2,
// is the pair at channel 8 t + forward_channel(i).
__host__ __device__ constexpr int forward_channel(int i)
{
    return i / 4 * 32 + i % 4 * 2;
}

// As outputs of `inverse`: element (0 or 2) of tile j is channel 8 t + inverse_channel(j), the next
// one its neighbour. Outputs of `forward` and inputs of `inverse` are in plain order.
__host__ __device__ constexpr int inverse_channel(int j)
{
    return j / 4 * 32 + j % 4 * 2;
}

// Channels come in groups of 32: of the last one of head_dims that are no multiples there are but the first 16, those of
// lanes t < 2. Packed matrices are filled up with zeros.
__host__ __device__ constexpr int padded(int d)
{
    return (d + 31) / 32 * 32;
}

// Whether a lane's channels 8 t + forward_channel(4 i) and on of group i are there.
template <int D> __device__ inline bool in_row(int group)
{
    return D % 32 == 0 || group < D / 32 || threadIdx.x % 4 * 8 < D % 32;
}

template <int D> struct packed {
    static constexpr int P = padded(D), WORDS = P * P / 2; // of one part
    static __device__ inline const uint4 *at(const uint32_t *part, int out8, int in32)
    {
        return (const uint4 *)part + (out8 * (P / 32) + in32) * 32 + threadIdx.x % 32;
    }
};

__device__ inline uint64_t matrix_index(const kvd_cuda_rotation &r, uint32_t layer, uint32_t head)
{
    return (uint64_t)(r.n_layers == 1 ? 0 : layer) * r.heads + (r.heads == 1 ? 0 : head);
}

template <int D>
__device__ inline const uint32_t *matrix_at(const uint16_t *operands, uint64_t index, int parts)
{
    return (const uint32_t *)operands + index * parts * packed<D>::WORDS;
}

// The power of two at or above x, as a divisor that brings |x| to at most 1; 1 for 0, NaN and Inf.
__device__ inline float magnitude(float x)
{
    uint32_t e = __float_as_uint(x) >> 23 & 0xff;
    return e == 0 || e >= 254 ? 1.0f : __uint_as_float((e + 1) << 23);
}

// 1 / x of such a divisor.
__device__ inline float inverse_power(float x)
{
    return __uint_as_float(max(0x7f000000u - __float_as_uint(x), 0x00400000u));
}

} // namespace kvd

#endif
