// Decode attention over INT2 pages (see attend.h for what, README.md for why it is fast).
//
//   attend_windows   sink and recent window, bf16, un-rotated
//   rotate_queries   q' = q R_K, packed as the B operands of the score product
//   attend_history   the hot loop: one warp, one tile at a time, from a ring of tiles that it keeps filling
//   merge            combines the parts, un-rotates the history's share, writes o
//
// In attend_history tokens are the M = 16 side of mma.m16n8k16 and a kv head's q heads the N = 8 side (two N tiles for
// groups of 9 to 16). Codes are never dequantized: masked in place they are fp16 subnormals, code * 2^-24 * 4^j in slot
// j, and 4^-j is in q' (scores) or applied to the output rows (values).
#include "kernels/cuda/attend.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace
{

using params = kvd_cuda_decode_params;
constexpr int D = 128;
constexpr int TILE_BYTES = 4608; // of head_dim 128
constexpr int K_CODES = 0, V_CODES = 2048, K_PARAMS = 4096, V_PARAMS = 4352;
constexpr int PAGE_TOKENS = 64;
constexpr int WARPS = 4, SLOTS = 3;
constexpr int TILES = D / 16;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float TWO24 = 16777216.0f;
constexpr float NONE = -1e30f; // the maximum of no logits

// Parts of one (sequence, q head): logits' maximum (in log2 units), sum, and output.
struct part {
    float m, l;
    float o[D];
};

struct layout {
    uint32_t *q; // [S][H_kv][NT][TILES][2][32] packed half2
    float *q_sum; // [S][H_q]
    part *parts;  // [S][H_q][splits + 1]; the last is the windows', un-rotated
};

__host__ __device__ inline uint32_t n_tiles(uint32_t group)
{
    return group > 8 ? 2 : 1;
}

__host__ __device__ inline layout lay_out(const params &p)
{
    uint64_t packed = (uint64_t)p.sequences * p.kv_heads * n_tiles(p.q_heads / p.kv_heads) * TILES * 64 * 4;
    uint64_t sums = (uint64_t)p.sequences * p.q_heads * 4;
    layout l;
    uint8_t *at = (uint8_t *)p.scratch;
    l.q = (uint32_t *)at;
    l.q_sum = (float *)(at + packed);
    l.parts = (part *)(at + packed + (sums + 255) / 256 * 256);
    return l;
}

__device__ inline const float *matrix(const params &p, const float *m, uint32_t kv)
{
    return m ? m + (uint64_t)(p.rotations == 1 ? 0 : kv) * D * D : nullptr;
}

// -- overlap of the kernels of a call --------------------------------------------------------------------------------

// Each kernel but the first is launched while the one before it still runs (programmatic dependent launch). It may do
// what does not depend on that one, and then waits for it to have finished.
__device__ inline void let_next_start()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ inline void wait_for_previous()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// -- rows times a matrix ---------------------------------------------------------------------------------------------

// The small kernels around the hot loop take up to ROWS (sequence, q head) rows of one kv head at a time, so that a
// rotation is read once for all of them; SLICES threads share a channel's sum.
constexpr int ROWS = 16, SLICES = 4, ROW_THREADS = D * SLICES;

// Sequences that a block of the small kernels takes.
__host__ __device__ inline uint32_t block_sequences(const params &p)
{
    uint32_t group = p.q_heads / p.kv_heads;
    return p.sequences < 64 ? 1 : ROWS / group;
}

// y[row][c] = sum over i of x[row][i] r[i][c], for all rows; r NULL: y = x. All threads of the block take part. x and y
// are [ROWS][D]; y may not be x. `sums` is [SLICES][ROWS][D].
__device__ inline void rows_times(const float *x, const float *r, uint32_t rows, float *sums, float *y)
{
    uint32_t c = threadIdx.x % D, slice = threadIdx.x / D;
    if (!r) {
        for (uint32_t i = threadIdx.x; i < rows * D; i += ROW_THREADS)
            y[i] = x[i];
        __syncthreads();
        return;
    }
    float acc[ROWS] = {};
#pragma unroll 1
    for (uint32_t i = slice * (D / SLICES); i < (slice + 1) * (D / SLICES); i += 8) {
        float w[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            w[j] = __ldg(&r[(i + j) * D + c]);
#pragma unroll
        for (int row = 0; row < ROWS; row += 4) // rows beyond `rows` in the last four are computed and not used
            if (row < rows)
#pragma unroll
                for (int k = row; k < row + 4; k++) {
                    float4 lo = *(const float4 *)&x[k * D + i], hi = *(const float4 *)&x[k * D + i + 4];
                    acc[k] += lo.x * w[0] + lo.y * w[1] + lo.z * w[2] + lo.w * w[3];
                    acc[k] += hi.x * w[4] + hi.y * w[5] + hi.z * w[6] + hi.w * w[7];
                }
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++)
        if (row < rows)
            sums[(slice * ROWS + row) * D + c] = acc[row];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < rows * D; i += ROW_THREADS) {
        float sum = 0;
        for (int k = 0; k < SLICES; k++)
            sum += sums[k * ROWS * D + i];
        y[i] = sum;
    }
    __syncthreads();
}

constexpr int ROWS_BYTES = (2 * ROWS + SLICES * ROWS) * D * 4;

// -- queries ---------------------------------------------------------------------------------------------------------

// Block (kv head, some sequences).
__global__ void __launch_bounds__(ROW_THREADS) rotate_queries(params p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    let_next_start();
    float *q = (float *)shared, *rotated = q + ROWS * D, *sums = rotated + ROWS * D;
    uint32_t kv = blockIdx.x, group = p.q_heads / p.kv_heads, nt = n_tiles(group), step = block_sequences(p);
    uint32_t s0 = blockIdx.y * step, n = min(step, p.sequences - s0), rows = n * group;
    layout l = lay_out(p);
    for (uint32_t i = threadIdx.x; i < rows * D; i += ROW_THREADS) {
        uint32_t row = i / D, s = s0 + row / group;
        uint16_t b = p.q[((uint64_t)s * p.q_heads + kv * group + row % group) * D + i % D];
        q[i] = __uint_as_float((uint32_t)b << 16);
    }
    __syncthreads();
    rows_times(q, matrix(p, p.r_k, kv), rows, sums, rotated);
    // B operand of channel tile ct: lane 4g + t holds rows 2t, 2t + 1 (register 0) and 2t + 8, 2t + 9 of column g.
    for (uint32_t i = threadIdx.x; i < n * nt * TILES * 64; i += ROW_THREADS) {
        uint32_t lane = i % 32, reg = i / 32 % 2, ct = i / 64 % TILES, tile = i / 64 / TILES % nt;
        uint32_t s = i / 64 / TILES / nt, h = tile * 8 + lane / 4, ch = ct * 16 + lane % 4 * 2 + reg * 8;
        float f = exp2f(-2.0f * (float)(ct % 4)); // 4^-j
        const float *row = rotated + (s * group + h) * D + ch;
        __half2 v = h < group ? __floats2half2_rn(row[0] * f, row[1] * f) : __half2();
        uint64_t at = ((uint64_t)(s0 + s) * p.kv_heads + kv) * nt * TILES * 64 + i % (nt * TILES * 64);
        l.q[at] = h < group ? *(uint32_t *)&v : 0;
    }
    for (uint32_t row = threadIdx.x / 32; row < rows; row += ROW_THREADS / 32) {
        uint32_t lane = threadIdx.x % 32;
        float sum = 0;
        for (uint32_t i = lane; i < D; i += 32)
            sum += rotated[row * D + i];
        for (int x = 1; x < 32; x *= 2)
            sum += __shfl_xor_sync(~0u, sum, x);
        if (lane == 0)
            l.q_sum[(uint64_t)(s0 + row / group) * p.q_heads + kv * group + row % group] = sum;
    }
    wait_for_previous(); // so that who waits for this kernel has waited for the windows too
}

// -- history ---------------------------------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ inline void barrier_init(uint64_t *bar)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bar)));
}

__device__ inline void fetch_tile(void *to, const void *from, uint64_t *bar)
{
    uint32_t b = shared_address(bar);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(TILE_BYTES) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(TILE_BYTES), "r"(b)
                 : "memory");
}

__device__ inline void barrier_wait(uint64_t *bar, uint32_t phase)
{
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(bar)),
                 "r"(phase)
                 : "memory");
}

__device__ inline void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t transpose(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Slot ct of the four words as an A operand.
template <int ct> __device__ inline void operand(const uint32_t w[4], const uint32_t high[4], uint32_t a[4])
{
#pragma unroll
    for (int r = 0; r < 4; r++)
        a[r] = (ct < 4 ? w[r] : high[r]) & (0x00030003u << (2 * (ct % 4)));
}

template <int NT> struct state {
    float m[NT][2], l[NT][2], min_sum[NT][2];
    float o[NT][TILES][4];
};

template <int NT, int ct>
__device__ inline void score_slots(const uint32_t w[4], const uint32_t high[4], const uint32_t (&q)[NT][TILES][2],
                                   float (&s)[NT][4])
{
    if constexpr (ct < TILES) {
        uint32_t a[4];
        operand<ct>(w, high, a);
#pragma unroll
        for (int n = 0; n < NT; n++)
            mma(s[n], a, q[n][ct][0], q[n][ct][1]);
        score_slots<NT, ct + 1>(w, high, q, s);
    }
}

template <int NT, int ct>
__device__ inline void value_slots(const uint32_t w[4], const uint32_t high[4], const uint32_t (&b)[NT][2], state<NT> &st)
{
    if constexpr (ct < TILES) {
        uint32_t a[4];
        operand<ct>(w, high, a);
#pragma unroll
        for (int n = 0; n < NT; n++)
            mma(st.o[n][ct], a, b[n][0], b[n][1]);
        value_slots<NT, ct + 1>(w, high, b, st);
    }
}

__device__ inline void load_words(const uint8_t *at, uint32_t w[4], uint32_t high[4])
{
    uint4 v = *(const uint4 *)at;
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
#pragma unroll
    for (int r = 0; r < 4; r++)
        high[r] = w[r] >> 8;
}

// One tile of 64 tokens, of which the first n count.
template <int NT>
__device__ inline void attend_tile(const uint8_t *tile, int n_tokens, const uint32_t (&q)[NT][TILES][2],
                                   const float (&q_sum)[NT][2], float scale, state<NT> &st)
{
    int lane = threadIdx.x % 32, g = lane / 4;
    float s[4][NT][4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
        uint32_t w[4], high[4];
        load_words(tile + K_CODES + c * 512 + lane * 16, w, high);
#pragma unroll
        for (int n = 0; n < NT; n++)
            s[c][n][0] = s[c][n][1] = s[c][n][2] = s[c][n][3] = 0;
        score_slots<NT, 0>(w, high, q, s[c]);
        uint2 params = *(const uint2 *)(tile + K_PARAMS + c * 64 + g * 8);
        float2 p0 = __half22float2(*(__half2 *)&params.x), p1 = __half22float2(*(__half2 *)&params.y);
        p0.x *= TWO24 * scale, p1.x *= TWO24 * scale, p0.y *= scale, p1.y *= scale;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            s[c][n][0] = p0.x * s[c][n][0] + p0.y * q_sum[n][0];
            s[c][n][1] = p0.x * s[c][n][1] + p0.y * q_sum[n][1];
            s[c][n][2] = p1.x * s[c][n][2] + p1.y * q_sum[n][0];
            s[c][n][3] = p1.x * s[c][n][3] + p1.y * q_sum[n][1];
            if (n_tokens < PAGE_TOKENS) {
                if (c * 16 + g >= n_tokens)
                    s[c][n][0] = s[c][n][1] = NONE;
                if (c * 16 + g + 8 >= n_tokens)
                    s[c][n][2] = s[c][n][3] = NONE;
            }
        }
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float top = st.m[n][e];
#pragma unroll
            for (int c = 0; c < 4; c++)
                top = fmaxf(top, fmaxf(s[c][n][e], s[c][n][2 + e]));
#pragma unroll
            for (int x = 4; x < 32; x *= 2)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
            float f = exp2f(st.m[n][e] - top);
            st.m[n][e] = top;
            st.l[n][e] *= f;
            st.min_sum[n][e] *= f;
            if (__any_sync(~0u, f != 1.0f))
#pragma unroll
                for (int ct = 0; ct < TILES; ct++) {
                    st.o[n][ct][e] *= f;
                    st.o[n][ct][2 + e] *= f;
                }
        }
#pragma unroll
    for (int c = 0; c < 4; c++) {
        uint2 params = *(const uint2 *)(tile + V_PARAMS + c * 64 + g * 8);
        float2 p0 = __half22float2(*(__half2 *)&params.x), p1 = __half22float2(*(__half2 *)&params.y);
        if (n_tokens < PAGE_TOKENS) { // what was never written may be anything
            if (c * 16 + g >= n_tokens)
                p0 = make_float2(0, 0);
            if (c * 16 + g + 8 >= n_tokens)
                p1 = make_float2(0, 0);
        }
        uint32_t b[NT][2], w[4], high[4];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float e0 = exp2f(s[c][n][0] - st.m[n][0]), e1 = exp2f(s[c][n][1] - st.m[n][1]);
            float e2 = exp2f(s[c][n][2] - st.m[n][0]), e3 = exp2f(s[c][n][3] - st.m[n][1]);
            st.l[n][0] += e0 + e2;
            st.l[n][1] += e1 + e3;
            st.min_sum[n][0] += e0 * p0.y + e2 * p1.y;
            st.min_sum[n][1] += e1 * p0.y + e3 * p1.y;
            __half2 lo = __floats2half2_rn(e0 * p0.x, e1 * p0.x), hi = __floats2half2_rn(e2 * p1.x, e3 * p1.x);
            b[n][0] = transpose(*(uint32_t *)&lo);
            b[n][1] = transpose(*(uint32_t *)&hi);
        }
        load_words(tile + V_CODES + c * 512 + lane * 16, w, high);
        value_slots<NT, 0>(w, high, b, st);
    }
}

// Combines the warps' states in shared memory and writes the block's part.
template <int NT>
__device__ inline void write_part(const params &p, const layout &l, float *buffer, state<NT> &st, uint32_t kv,
                                  uint32_t s, uint32_t split)
{
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t group = p.q_heads / p.kv_heads;
    float *ml = buffer;                         // [WARPS][NT * 8][2]
    float *o = buffer + WARPS * NT * 8 * 2;     // [WARPS][NT * 8][D + 4]: rows apart by an odd number of 16 bytes
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float sum = st.l[n][e], low = st.min_sum[n][e];
#pragma unroll
            for (int x = 4; x < 32; x *= 2) {
                sum += __shfl_xor_sync(~0u, sum, x);
                low += __shfl_xor_sync(~0u, low, x);
            }
            int h = n * 8 + 2 * t + e;
            if (g == 0) {
                ml[(warp * NT * 8 + h) * 2] = st.m[n][e];
                ml[(warp * NT * 8 + h) * 2 + 1] = sum;
            }
            float *row = o + (warp * NT * 8 + h) * (D + 4);
#pragma unroll
            for (int ct = 0; ct < TILES; ct++) {
                float f = TWO24 * exp2f(-2.0f * (float)(ct % 4));
                row[ct * 16 + g] = st.o[n][ct][e] * f + low;
                row[ct * 16 + g + 8] = st.o[n][ct][2 + e] * f + low;
            }
        }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < group * D; i += WARPS * 32) {
        uint32_t h = i / D, c = i % D;
        float m = NONE, sum = 0, out = 0;
        for (int w = 0; w < WARPS; w++)
            m = fmaxf(m, ml[(w * NT * 8 + h) * 2]);
        for (int w = 0; w < WARPS; w++) {
            float f = exp2f(ml[(w * NT * 8 + h) * 2] - m);
            sum += f * ml[(w * NT * 8 + h) * 2 + 1];
            out += f * o[(w * NT * 8 + h) * (D + 4) + c];
        }
        part *to = &l.parts[((uint64_t)s * p.q_heads + kv * group + h) * (p.splits + 1) + split];
        to->o[c] = out;
        if (c == 0) {
            to->m = m;
            to->l = sum;
        }
    }
}

constexpr int RING_BYTES = WARPS * SLOTS * TILE_BYTES;
template <int NT> __host__ __device__ constexpr int shared_bytes()
{
    int merge = (WARPS * NT * 8 * 2 + WARPS * NT * 8 * (D + 4)) * 4;
    return (merge > RING_BYTES ? merge : RING_BYTES) + WARPS * SLOTS * 8;
}

// Block (split, kv head, sequence). Warp w takes every fourth tile of the split.
template <int NT> __global__ void __launch_bounds__(WARPS * 32, NT == 1 ? 4 : 2) attend_history(params p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t split = blockIdx.x, kv = blockIdx.y, s = blockIdx.z, group = p.q_heads / p.kv_heads;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    layout l = lay_out(p);
    uint64_t *bars = (uint64_t *)(shared + shared_bytes<NT>() - WARPS * SLOTS * 8) + warp * SLOTS;
    uint8_t *ring = shared + warp * SLOTS * TILE_BYTES;
    uint32_t tokens = p.hist_end[s] > p.sink ? p.hist_end[s] - p.sink : 0;
    uint32_t tiles = (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
    uint32_t first = (uint32_t)((uint64_t)tiles * split / p.splits) + (uint32_t)warp;
    uint32_t end = (uint32_t)((uint64_t)tiles * (split + 1) / p.splits);
    const uint64_t *pages = p.codec_pages + (uint64_t)s * p.codec_stride;
    uint64_t offset = ((uint64_t)p.layer * p.kv_heads + kv) * TILE_BYTES;
    if (lane == 0) {
        for (int i = 0; i < SLOTS; i++)
            barrier_init(&bars[i]);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (uint32_t i = 0; i < SLOTS && first + i * WARPS < end; i++)
            fetch_tile(ring + i * TILE_BYTES, (const uint8_t *)pages[first + i * WARPS] + offset, &bars[i]);
    }
    __syncwarp();
    let_next_start();
    wait_for_previous(); // the queries; tiles are on their way meanwhile
    uint32_t q[NT][TILES][2];
    float q_sum[NT][2];
    state<NT> st;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < TILES * 2; i++)
            q[n][i / 2][i % 2] = l.q[((((uint64_t)s * p.kv_heads + kv) * NT + n) * TILES * 2 + i) * 32 + lane];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            uint32_t h = n * 8 + 2 * t + e;
            q_sum[n][e] = h < group ? l.q_sum[(uint64_t)s * p.q_heads + kv * group + h] : 0;
            st.m[n][e] = NONE;
            st.l[n][e] = st.min_sum[n][e] = 0;
        }
#pragma unroll
        for (int i = 0; i < TILES * 4; i++)
            st.o[n][i / 4][i % 4] = 0;
    }
    uint32_t slot = 0, phase = 0;
    for (uint32_t tile = first; tile < end; tile += WARPS) {
        barrier_wait(&bars[slot], phase);
        uint32_t left = tokens - tile * PAGE_TOKENS;
        attend_tile<NT>(ring + slot * TILE_BYTES, left < PAGE_TOKENS ? (int)left : PAGE_TOKENS, q, q_sum,
                        p.scale * LOG2E, st);
        __syncwarp();
        uint32_t next = tile + SLOTS * WARPS;
        if (lane == 0 && next < end)
            fetch_tile(ring + slot * TILE_BYTES, (const uint8_t *)pages[next] + offset, &bars[slot]);
        if (++slot == SLOTS) {
            slot = 0;
            phase ^= 1;
        }
    }
    write_part<NT>(p, l, (float *)shared, st, kv, s, split);
}

// -- windows ---------------------------------------------------------------------------------------------------------

constexpr int WINDOW_WARPS = 16, WINDOW_HEADS = 4, WINDOW_STEP = 4; // heads, and tokens in flight, of a warp

// The bf16 row of K or V of window token i: tokens of the sink first, then those from hist_end on.
__device__ inline const uint16_t *window_row(const params &p, uint32_t s, uint32_t kv, uint32_t token, bool v)
{
    uint32_t entry = token / PAGE_TOKENS, row = token % PAGE_TOKENS;
    if (token >= p.sink) {
        uint32_t at = (token - p.sink) % p.ring;
        entry = (p.sink + PAGE_TOKENS - 1) / PAGE_TOKENS + at / PAGE_TOKENS;
        row = at % PAGE_TOKENS;
    }
    const uint8_t *page = (const uint8_t *)p.bf16_pages[(uint64_t)s * p.bf16_stride + entry];
    uint64_t tile = ((uint64_t)p.layer * p.kv_heads + kv) * (PAGE_TOKENS * 2 * 2 * D);
    return (const uint16_t *)(page + tile + (v ? PAGE_TOKENS * 2 * D : 0) + row * 2 * D);
}

struct window_heads {
    float q[WINDOW_HEADS][4], acc[WINDOW_HEADS][4]; // four channels a lane
    float m[WINDOW_HEADS], l[WINDOW_HEADS];
};

__device__ inline float low(uint32_t x)
{
    return __uint_as_float(x << 16);
}

__device__ inline float high(uint32_t x)
{
    return __uint_as_float(x & 0xffff0000u);
}

__device__ inline void add_window_token(window_heads &w, uint2 k, uint2 v)
{
#pragma unroll
    for (int h = 0; h < WINDOW_HEADS; h++) {
        float dot = w.q[h][0] * low(k.x) + w.q[h][1] * high(k.x) + w.q[h][2] * low(k.y) + w.q[h][3] * high(k.y);
#pragma unroll
        for (int x = 1; x < 32; x *= 2)
            dot += __shfl_xor_sync(~0u, dot, x);
        float top = fmaxf(w.m[h], dot), f = exp2f(w.m[h] - top), e = exp2f(dot - top);
        w.m[h] = top;
        w.l[h] = w.l[h] * f + e;
        w.acc[h][0] = w.acc[h][0] * f + e * low(v.x);
        w.acc[h][1] = w.acc[h][1] * f + e * high(v.x);
        w.acc[h][2] = w.acc[h][2] * f + e * low(v.y);
        w.acc[h][3] = w.acc[h][3] * f + e * high(v.y);
    }
}

// Block (kv head, sequence): four of its q heads at a time, tokens dealt to the warps four by four.
__global__ void __launch_bounds__(WINDOW_WARPS * 32) attend_windows(params p)
{
    __shared__ __align__(16) float o[WINDOW_WARPS][WINDOW_HEADS][D];
    __shared__ float ml[WINDOW_WARPS][WINDOW_HEADS][2];
    let_next_start();
    uint32_t kv = blockIdx.x, s = blockIdx.y, group = p.q_heads / p.kv_heads;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t length = p.length[s], sink = min(p.sink, length), hist_end = max(p.hist_end[s], p.sink);
    uint32_t count = sink + (length > hist_end ? length - hist_end : 0);
    layout lay = lay_out(p);
    if (count == 0) { // a part that weighs nothing, but is defined
        for (uint32_t i = threadIdx.x; i < group * D; i += WINDOW_WARPS * 32) {
            part *to = &lay.parts[((uint64_t)s * p.q_heads + kv * group + i / D) * (p.splits + 1) + p.splits];
            to->o[i % D] = 0;
            if (i % D == 0) {
                to->m = NONE;
                to->l = 0;
            }
        }
        return;
    }
    for (uint32_t h0 = 0; h0 < group; h0 += WINDOW_HEADS) {
        uint64_t head = (uint64_t)s * p.q_heads + kv * group + h0;
        window_heads w;
#pragma unroll
        for (int h = 0; h < WINDOW_HEADS; h++) {
            w.m[h] = NONE;
            w.l[h] = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint16_t b = h0 + h < group ? p.q[(head + h) * D + lane * 4 + i] : 0;
                w.q[h][i] = low(b) * p.scale * LOG2E;
                w.acc[h][i] = 0;
            }
        }
        for (uint32_t first = (uint32_t)warp * WINDOW_STEP; first < count; first += WINDOW_WARPS * WINDOW_STEP) {
            uint2 k[WINDOW_STEP], v[WINDOW_STEP];
#pragma unroll
            for (int i = 0; i < WINDOW_STEP; i++) {
                uint32_t at = min(first + i, count - 1), token = at < sink ? at : hist_end + (at - sink);
                k[i] = *(const uint2 *)(window_row(p, s, kv, token, false) + lane * 4);
                v[i] = *(const uint2 *)(window_row(p, s, kv, token, true) + lane * 4);
            }
#pragma unroll
            for (int i = 0; i < WINDOW_STEP; i++)
                if (first + i < count)
                    add_window_token(w, k[i], v[i]);
        }
#pragma unroll
        for (int h = 0; h < WINDOW_HEADS; h++) {
            *(float4 *)&o[warp][h][lane * 4] = make_float4(w.acc[h][0], w.acc[h][1], w.acc[h][2], w.acc[h][3]);
            if (lane == 0) {
                ml[warp][h][0] = w.m[h];
                ml[warp][h][1] = w.l[h];
            }
        }
        __syncthreads();
        uint32_t h = threadIdx.x / D, c = threadIdx.x % D; // 512 threads: four heads
        if (h0 + h < group) {
            float top = NONE, sum = 0, out = 0;
            for (int i = 0; i < WINDOW_WARPS; i++)
                top = fmaxf(top, ml[i][h][0]);
            for (int i = 0; i < WINDOW_WARPS; i++) {
                float f = exp2f(ml[i][h][0] - top);
                sum += f * ml[i][h][1];
                out += f * o[i][h][c];
            }
            part *to = &lay.parts[(head + h) * (p.splits + 1) + p.splits];
            to->o[c] = out;
            if (c == 0) {
                to->m = top;
                to->l = sum;
            }
        }
        __syncthreads();
    }
}
static_assert(WINDOW_WARPS * 32 == WINDOW_HEADS * D, "a thread for each output");

// -- merge -----------------------------------------------------------------------------------------------------------

constexpr int MAX_SPLITS = 128;
constexpr int MERGE_BYTES = ROWS_BYTES + ROWS * (MAX_SPLITS + 2) * 4;

// Block (kv head, some sequences): combines the parts of each row and un-rotates the history's share.
__global__ void __launch_bounds__(ROW_THREADS) merge(params p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    float *rotated = (float *)shared, *out = rotated + ROWS * D, *sums = out + ROWS * D;
    float *weight = sums + SLICES * ROWS * D; // [ROWS][MAX_SPLITS + 2]: of each part, normalised
    uint32_t kv = blockIdx.x, group = p.q_heads / p.kv_heads, step = block_sequences(p);
    uint32_t s0 = blockIdx.y * step, n = min(step, p.sequences - s0), rows = n * group, lane = threadIdx.x % 32;
    layout l = lay_out(p);
    wait_for_previous();
    for (uint32_t row = threadIdx.x / 32; row < rows; row += ROW_THREADS / 32) {
        uint64_t head = (uint64_t)(s0 + row / group) * p.q_heads + kv * group + row % group;
        const part *parts = &l.parts[head * (p.splits + 1)];
        float m = NONE, sum = 0;
        for (uint32_t i = lane; i <= p.splits; i += 32)
            m = fmaxf(m, parts[i].m);
        for (int x = 1; x < 32; x *= 2)
            m = fmaxf(m, __shfl_xor_sync(~0u, m, x));
        for (uint32_t i = lane; i <= p.splits; i += 32)
            sum += exp2f(parts[i].m - m) * parts[i].l;
        for (int x = 1; x < 32; x *= 2)
            sum += __shfl_xor_sync(~0u, sum, x);
        for (uint32_t i = lane; i <= p.splits; i += 32)
            weight[row * (MAX_SPLITS + 2) + i] = sum > 0 ? exp2f(parts[i].m - m) / sum : 0;
        if (lane == 0 && p.lse)
            p.lse[head] = (m + log2f(sum)) / LOG2E;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < rows * D; i += ROW_THREADS) {
        uint32_t row = i / D, c = i % D;
        uint64_t head = (uint64_t)(s0 + row / group) * p.q_heads + kv * group + row % group;
        const part *parts = &l.parts[head * (p.splits + 1)];
        const float *w = weight + row * (MAX_SPLITS + 2);
        float sum = 0;
#pragma unroll 8
        for (uint32_t k = 0; k < p.splits; k++)
            sum += w[k] * parts[k].o[c];
        rotated[i] = sum;
    }
    __syncthreads();
    rows_times(rotated, matrix(p, p.r_vt, kv), rows, sums, out);
    for (uint32_t i = threadIdx.x; i < rows * D; i += ROW_THREADS) {
        uint32_t row = i / D, c = i % D;
        uint64_t head = (uint64_t)(s0 + row / group) * p.q_heads + kv * group + row % group;
        float window = weight[row * (MAX_SPLITS + 2) + p.splits] * l.parts[head * (p.splits + 1) + p.splits].o[c];
        __nv_bfloat16 b = __float2bfloat16_rn(out[i] + window);
        p.o[head * D + c] = *(uint16_t *)&b;
    }
}

// Launches a kernel behind the one before it. `overlap`: it may start while that one runs.
cudaError_t launch(void (*kernel)(params), dim3 grid, int threads, int bytes, bool overlap, const params &p,
                   cudaStream_t stream)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return rc == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, p) : rc;
}

} // namespace

extern "C" uint32_t kvd_cuda_decode_plan(uint32_t sequences, uint32_t kv_heads, uint32_t history,
                                         uint32_t multiprocessors)
{
    uint32_t tiles = (history + PAGE_TOKENS - 1) / PAGE_TOKENS, blocks = sequences * kv_heads;
    uint32_t most = tiles / (WARPS * 2); // at least two tiles a warp
    uint32_t room = multiprocessors * 4;  // blocks that run at once
    if (blocks == 0 || most < 2)
        return 1;
    // With few blocks: as many parts as fill the device once. With many, parts only even out the last wave.
    uint32_t want = blocks < room ? (room + blocks - 1) / blocks : (blocks < 4 * room ? 2 : 1);
    if (blocks < room && want * blocks > room && want > 1)
        want--;
    want = want < most ? want : most;
    return want < MAX_SPLITS ? want : MAX_SPLITS;
}

extern "C" uint64_t kvd_cuda_decode_scratch(const struct kvd_cuda_decode_params *p)
{
    params zero = *p;
    zero.scratch = nullptr;
    layout l = lay_out(zero);
    return (uint64_t)l.parts + (uint64_t)p->sequences * p->q_heads * (p->splits + 1) * sizeof(part);
}

extern "C" int kvd_cuda_decode(const struct kvd_cuda_decode_params *p, struct CUstream_st *stream)
{
    if (p->head_dim != D || p->kv_heads == 0 || p->q_heads % p->kv_heads || p->q_heads / p->kv_heads > 16 ||
        p->splits == 0 || p->splits > MAX_SPLITS || p->sequences == 0)
        return -1;
    bool two = p->q_heads / p->kv_heads > 8;
    uint32_t step = block_sequences(*p);
    dim3 rows(p->kv_heads, (p->sequences + step - 1) / step), parts(p->splits, p->kv_heads, p->sequences);
    // Overlap pays where launches are a large part of the time, and costs 2 % where they are not (README.md).
    bool overlap = p->sequences < 8;
    // The windows first, never overlapped: what the call before this one left in the scratch is then done with.
    cudaError_t rc = launch(attend_windows, dim3(p->kv_heads, p->sequences), WINDOW_WARPS * 32, 0, false, *p, stream);
    if (rc == cudaSuccess)
        rc = launch(rotate_queries, rows, ROW_THREADS, ROWS_BYTES, overlap, *p, stream);
    if (rc == cudaSuccess)
        rc = launch(two ? attend_history<2> : attend_history<1>, parts, WARPS * 32, two ? shared_bytes<2>() : shared_bytes<1>(),
                    overlap, *p, stream);
    if (rc == cudaSuccess)
        rc = launch(merge, rows, ROW_THREADS, MERGE_BYTES, overlap, *p, stream);
    return rc;
}
