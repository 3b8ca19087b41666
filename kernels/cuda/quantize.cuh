// Rows that leave the recent window: rotated, clipped, quantized and packed.
//
// A warp takes chunks of 16 tokens of one (layer, kv head, side): tokens are the rows of
// mma.m16n8k16. The product's accumulator has a token's channels in four lanes, and these lanes are
// the ones whose words of a load hold the codes, so that packing needs no exchange for K and one
// transpose of each word for V.
#ifndef KVD_KERNELS_CUDA_QUANTIZE_CUH
#define KVD_KERNELS_CUDA_QUANTIZE_CUH

#include "kernels/cuda/row_codes.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/warpgroup.cuh"

namespace kvd
{

// A call, or a launch for some sides of it: `codec` is that of these, and `codec_v` of no use.
struct append_params : kvd_cuda_append_params {
    tile_layout tile;
};

using append_item = kvd_cuda_append_item;

// Warps of a block, and bytes of shared memory for R (with head_dim 256 it does not fit) and for all.
__host__ __device__ constexpr int quantize_warps(int dim)
{
    return dim > 128 ? 8 : 16;
}

__host__ __device__ constexpr int matrix_bytes(int dim)
{
    return dim > 192 ? 0 : padded(dim) * padded(dim) * 4;
}

__host__ __device__ constexpr int quantize_bytes(int dim)
{
    return matrix_bytes(dim) + quantize_warps(dim) * 16 * padded(dim) * 2;
}

__device__ inline uint8_t *window_row(const append_params &p, const append_item &item,
                                      uint32_t token, uint32_t layer, uint32_t head, bool v)
{
    uint32_t entry, row;
    window_place(p.sink, p.ring, token, entry, row);
    return bf16_tile_row(item.bf16[entry], p.layer_begin + layer, p.kv_heads, head, p.dim_k,
                         p.dim_v, row, v);
}

// The row that an append knows for a token: among the new ones, or in the window.
__device__ inline const uint8_t *source_row(const append_params &p, const append_item &item,
                                            uint32_t token, uint32_t layer, uint32_t head, bool v)
{
    if (token >= item.length)
        return tensor_row(v ? item.v : item.k, layer, token - item.length, head);
    return window_row(p, item, token, layer, head, v);
}

// -- demotion ------------------------------------------------------------------------------------

// 16 rows of a chunk on their way through shared memory: a lane fetches what it reads itself, 16 bytes at a time.
template <int D> struct staged_rows {
    static constexpr int GROUPS = padded(D) / 32;
    uint8_t *at; // the lane's first 16 bytes

    // Asks for rows g and g + 8.
    __device__ inline void fetch(const uint8_t *const (&rows)[2]) const
    {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                if (in_row<D>(i))
                    copy_async(at + (half * GROUPS + i) * 512, rows[half] + i * 64 + threadIdx.x % 4 * 16);
    }

    // As A operands.
    __device__ inline void load(uint32_t (&a)[2 * GROUPS][4]) const
    {
        copies_arrived();
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                uint4 x = in_row<D>(i) ? *(const uint4 *)(at + (half * GROUPS + i) * 512) : uint4{};
#pragma unroll
                for (int k = 0; k < 4; k++)
                    a[2 * i + k / 2][k % 2 * 2 + half] = word_of(x, k);
            }
    }
};

// R in shared memory, where it serves all warps of a block.
template <int D> struct shared_matrix {
    static constexpr bool USED = KVD_WARPGROUP && D <= 192;
    static constexpr int P = padded(D);
    const uint32_t *r; // in global memory
    uint8_t *at;

    __device__ inline void load() const
    {
        if constexpr (!USED)
            return;
        constexpr int PER_PART = P / 8 * (P / 32) * 32; // groups of four words
        for (int i = threadIdx.x; i < 2 * PER_PART; i += quantize_warps(D) * 32) {
            uint4 x = __ldg((const uint4 *)r + i);
            uint32_t *to = (uint32_t *)at + i / 32 * 128 + i % 32;
            to[0] = x.x, to[32] = x.y, to[64] = x.z, to[96] = x.w;
        }
#if KVD_BULK
        barriers_ready();
#endif
        __syncthreads();
    }

    // c = a R, high and low part, the small part first. c is not there before `finish`.
    __device__ inline void multiply(const uint32_t (&a)[P / 16][4], float (&c)[P / 8][4]) const
    {
        if constexpr (USED) {
#if KVD_WARPGROUP
            constexpr int N = P > 128 ? P / 2 : P;
            uint64_t operand = operand_descriptor<P>(at);
            warpgroup_begin();
#pragma unroll
            for (int part = 1; part >= 0; part--)
#pragma unroll
                for (int i = 0; i < P / 16; i++)
#pragma unroll
                    for (int n = 0; n < P; n += N) // N outputs at a time
                        warpgroup_mma<N>(reinterpret_cast<float(&)[N / 8][4]>(c[n / 8]), a[i],
                                         operand + (part * P * P * 2 + n / 8 * (P / 8 * 128) + i * 256) / 16, part == 0 || i > 0);
            warpgroup_commit();
#endif
        } else {
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0;
#pragma unroll
                for (int part = 1; part >= 0; part--)
#pragma unroll
                    for (int i = 0; i < P / 32; i++) {
                        uint4 b = __ldg(packed<D>::at(r + part * packed<D>::WORDS, j, i));
                        mma_bf16(c[j], a[2 * i], b.x, b.y);
                        mma_bf16(c[j], a[2 * i + 1], b.z, b.w);
                    }
            }
        }
    }

    __device__ inline void finish() const
    {
#if KVD_WARPGROUP
        if constexpr (USED)
            warpgroup_wait();
#endif
    }
};

// A (side, layer, kv head), counted from K's first.
struct append_unit {
    uint32_t layer, head;
    bool v;

    __device__ inline append_unit(const append_params &p, bool first_v, uint32_t u)
        : layer(u / p.kv_heads), head(u % p.kv_heads), v(of_v(p, first_v, u))
    {
        if (layer >= p.layer_count)
            layer -= p.layer_count;
    }

    static __device__ inline bool of_v(const append_params &p, bool first_v, uint32_t u)
    {
        return first_v || u >= p.layer_count * p.kv_heads;
    }
};

// The first token of chunk i of all. Before hist_end if a truncation has left the history's end in
// the middle of a chunk, which is never so where all chunks are `whole`.
__device__ inline uint32_t chunk_token(const append_params &p, const append_item &item, uint32_t i, bool whole)
{
    return item.hist_end - (whole ? 0 : (item.hist_end - p.sink) % 16) + (i - item.first_chunk) * 16;
}

// A warp's way through the chunks of a unit, in steps of any size.
template <int D, bool USUAL> struct chunk_walk {
    uint32_t chunk, of = 0; // and its item
    uint32_t until = 0;     // so far rows follow each other as in the item's tensor
    const uint8_t *row;     // the lane's, g, of the chunk

    // Asks for the rows of chunk i. `along`: of the same unit as before, and behind it.
    __device__ inline void fetch(const append_params &p, bool first_v, uint32_t u, uint32_t i, bool along,
                                 const staged_rows<D> &staged)
    {
        if (along && i <= until) {
            const append_item &item = p.items[of];
            uint64_t stride = append_unit::of_v(p, first_v, u) ? item.v.token_stride : item.k.token_stride;
            row += (i - chunk) * 16 * stride;
            chunk = i;
            staged.fetch({row, row + 8 * stride});
            return;
        }
        append_unit unit(p, first_v, u);
        chunk = i;
        if (p.items[of].first_chunk > i || (of + 1 < p.n_items && p.items[of + 1].first_chunk <= i))
            of = find_item(p.n_items, i, [&](uint32_t k) { return p.items[k].first_chunk; });
        const append_item &item = p.items[of];
        uint32_t token = chunk_token(p, item, i, USUAL), first = USUAL ? token : max(token, item.hist_end);
        const uint8_t *rows[2], *window = nullptr; // a chunk lies in one page of the ring
        if (first < item.length)
            window = window_row(p, item, first, unit.layer, unit.head, unit.v);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Of rows that are to be kept nothing else is known; another's stands in for them.
            uint32_t at = token + half * 8 + threadIdx.x % 32 / 4;
            if (!USUAL)
                at = max(at, first);
            rows[half] = at < item.length
                             ? window + (at - first) * D * 2
                             : tensor_row(unit.v ? item.v : item.k, unit.layer, at - item.length, unit.head);
        }
        until = token < item.length ? 0 : (of + 1 < p.n_items ? p.items[of + 1].first_chunk : p.chunks) - 1;
        row = rows[0];
        staged.fetch(rows);
    }
};

// The four words of a lane as values' rows are tokens; for V, whose rows are channels, transposed:
// words 1 and 2 change places.
__device__ inline uint4 as_side(const uint32_t (&w)[4], bool v)
{
    return v ? make_uint4(transpose(w[0]), transpose(w[2]), transpose(w[1]), transpose(w[3]))
             : make_uint4(w[0], w[1], w[2], w[3]);
}

// Writes the half of each word's halves that is the chunk's: bytes 0 and 2, or 1 and 3.
__device__ inline void store_half(uint8_t *to, const uint4 &x)
{
#pragma unroll
    for (int r = 0; r < 4; r++) {
        uint32_t w = word_of(x, r);
        to[4 * r] = (uint8_t)w;
        to[4 * r + 2] = (uint8_t)(w >> 16);
    }
}

__device__ inline uint4 load_half(const uint8_t *from)
{
    uint32_t w[4];
#pragma unroll
    for (int r = 0; r < 4; r++)
        w[r] = from[4 * r] | from[4 * r + 2] << 16;
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// Puts what a lane's words have of the chunk's first `keep` tokens back.
__device__ inline void put_back(uint4 &x, const uint4 &old, uint32_t keep, bool v)
{
    uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, w[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        uint32_t pair = t * 2 + r / 2 * 8, bits = g + r % 2 * 8 < keep ? ~0u : 0;
        if (v)
            bits = (pair < keep ? 0xffffu : 0) | (pair + 1 < keep ? 0xffff0000u : 0);
        w[r] = (word_of(old, r) & bits) | (word_of(x, r) & ~bits);
    }
    x = make_uint4(w[0], w[1], w[2], w[3]);
}

// Chunks of head_dim 64 in a plane of single bits: they share bytes, and other warps write the others.
__device__ inline uint4 load_quarter(const uint8_t *from, uint32_t chunk)
{
    uint4 x = *(const uint4 *)from;
    return make_uint4(x.x >> 4 * chunk, x.y >> 4 * chunk, x.z >> 4 * chunk, x.w >> 4 * chunk);
}

__device__ inline void store_quarter(uint8_t *to, uint32_t chunk, const uint4 &x)
{
#pragma unroll
    for (int r = 0; r < 4; r++) {
        atomicAnd((uint32_t *)to + r, ~(0x000f000fu << (4 * chunk)));
        atomicOr((uint32_t *)to + r, (word_of(x, r) & 0x000f000fu) << (4 * chunk));
    }
}

// A lane's L bytes of a piece (kernels/format.h): L bits of each half of the words, from bit `shift` on.
template <int L> __device__ inline uint4 load_piece(const uint8_t *from, int shift)
{
    if constexpr (L == 16)
        return *(const uint4 *)from;
    constexpr uint32_t mask = ((1u << L) - 1) * 0x00010001u;
    uint2 x;
    if constexpr (L == 8)
        x = *(const uint2 *)from;
    else if constexpr (L == 4)
        x.x = x.y = *(const uint32_t *)from;
    else if constexpr (L == 2)
        x.x = x.y = __byte_perm(*(const uint16_t *)from, 0, 0x4140);
    else
        x.x = x.y = (*from & 15) | (*from & 0xf0) << 12;
    auto bits = [&](uint32_t w, int r) { return (w >> (L * r % 16) & mask) << shift; };
    return make_uint4(bits(x.x, 0), bits(x.x, 1), bits(x.y, 2), bits(x.y, 3));
}

template <int L> __device__ inline void store_piece(uint8_t *to, const uint4 &x, int shift)
{
    if constexpr (L == 16) {
        *(uint4 *)to = x;
        return;
    }
    constexpr uint32_t mask = ((1u << L) - 1) * 0x00010001u;
    auto bits = [&](int r) { return (word_of(x, r) >> shift & mask) << (L * r % 16); };
    uint32_t low = bits(0) | bits(1), high = bits(2) | bits(3), all = low | high;
    if constexpr (L == 8)
        *(uint2 *)to = make_uint2(low, high);
    else if constexpr (L == 4)
        *(uint32_t *)to = all;
    else if constexpr (L == 2)
        *(uint16_t *)to = (uint16_t)__byte_perm(all, 0, 0x4420);
    else
        *to = (uint8_t)(all | all >> 12);
}

// A chunk's codes of WIDTH bits, but for those of its first `keep` tokens, which stay. A word of `words` holds those of
// 16 / WIDTH channel tiles, from the lowest bits of its halves on.
template <int D, int WIDTH, int N>
__device__ inline void store_plane(uint8_t *plane, uint32_t chunk, const uint32_t (&words)[N][4], uint32_t keep, bool v)
{
    int lane = threadIdx.x % 32;
    uint4 x[N];
#pragma unroll
    for (int u = 0; u < N; u++)
        x[u] = as_side(words[u], v);
    if constexpr (side_by_side(D, WIDTH)) {
        constexpr uint32_t CHUNKS = 256 / (WIDTH * D);
        uint8_t *to = plane + chunk / CHUNKS * 512 + lane * 16, *half = to + chunk % 2;
        if (keep)
            put_back(x[0], CHUNKS == 2 ? load_half(half) : load_quarter(to, chunk), keep, v);
        if (CHUNKS == 2)
            store_half(half, x[0]);
        else
            store_quarter(to, chunk, x[0]);
    } else {
        uint8_t *at = plane + chunk * (2 * WIDTH * D);
        static_for<D / 16>([&](auto ct) {
            constexpr piece p = piece_of(D, WIDTH, ct);
            if constexpr (p.first == ct) {
                constexpr int shift = p.first * WIDTH % 16;
                uint8_t *to = at + p.at + lane * p.lane;
                uint4 y = x[p.first * WIDTH / 16];
                if (keep)
                    put_back(y, load_piece<p.lane>(to, shift), keep, v);
                store_piece<p.lane>(to, y, shift);
            }
        });
    }
}

// The codes of 16 rows, as words of a load: of two bits, and, for codes of more, of the bits above.
template <int CODEC, int D> struct coded_rows {
    static constexpr int BITS = code_bits(CODEC), LOADS = (D + 127) / 128;
    static constexpr int MORE_BITS = BITS - 2, MORE_LOADS = BITS == 4 ? LOADS : 1;
    uint32_t pairs[LOADS][4], more[MORE_LOADS][4], param[2];

    // Of the 8 rows in the first half of each c[j], times `unit`. To be called twice, for rows g and g + 8.
    __device__ inline void quantize(float (&c)[padded(D) / 8][4], float unit, const clip_search<D> &clip, float gain,
                                    uint32_t kind, uint32_t codec)
    {
        bool published = kind == KVD_SCALE_PUBLISHED;
        if (has_levels(CODEC) || !published)
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                c[j][0] *= unit, c[j][1] *= unit;
        auto x = [&](int i) { return c[i / 2][i % 2]; };
        quantizer q;
        if constexpr (!has_levels(CODEC))
            q = published ? quantize_evenly<CODEC, D / 4>(x, clip, gain, unit) : fit_levels<CODEC, D / 4>(x, kind);
        else if (CODEC == LEVELS2 && codec == KVD_CODEC_TURBOQUANT_2)
            q = fit_levels<KVD_CODEC_TURBOQUANT_2, D / 4>(x, kind);
        else
            q = fit_levels<CODEC, D / 4>(x, kind);
        param[0] = param[1];
        param[1] = q.param;
        auto next_row = [](uint32_t(&words)[4]) {
            words[0] = words[1], words[2] = words[3];
            words[1] = words[3] = 0;
        };
#pragma unroll
        for (int u = 0; u < LOADS; u++)
            next_row(pairs[u]);
#pragma unroll
        for (int u = 0; u < MORE_LOADS; u++)
            next_row(more[u]);
#pragma unroll
        for (int j = D / 8 - 1; j >= 0; j--) { // slots from the last to the first
            uint32_t both = codes_of<CODEC>(q, x(2 * j), x(2 * j + 1));
            uint32_t &to = pairs[j / 16][j % 2 * 2 + 1];
            to = to * 4 + (MORE_BITS ? both & 0x00030003 : both);
            if constexpr (MORE_BITS > 0) {
                uint32_t &above = more[MORE_LOADS == 2 ? j / 16 : 0][j % 2 * 2 + 1];
                above = (above << MORE_BITS) + (both >> 2 & (MORE_BITS == 2 ? 0x00030003 : 0x00010001));
            }
        }
    }

    // As chunk `chunk` of a tile's side, but for its first `keep` tokens, which stay as they are.
    __device__ inline void store(uint32_t codec, bool v, uint8_t *codes, uint8_t *params, uint32_t chunk,
                                 uint32_t keep) const
    {
        uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (t == 0 && params_bytes<CODEC>(codec) == 256) {
            uint2 *to = (uint2 *)(params + chunk * 64 + g * 8), old = keep ? *to : make_uint2(0, 0);
            *to = make_uint2(g < keep ? old.x : param[0], g + 8 < keep ? old.y : param[1]);
        } else if (t == 0) {
            uint32_t *to = (uint32_t *)(params + chunk * 32 + g * 4), old = keep ? *to : 0;
            *to = (g < keep ? old & 0xffff : param[0]) | (g + 8 < keep ? old & 0xffff0000 : param[1] << 16);
        }
        store_plane<D, 2>(codes, chunk, pairs, keep, v);
        if constexpr (BITS > 2)
            store_plane<D, MORE_BITS>(codes + 16 * D, chunk, more, keep, v);
    }
};

// What a (side, layer, kv head) has its chunks quantized with, and where in a page they go.
template <int CODEC, int D> struct quantize_unit {
    const uint32_t *matrix;
    clip_search<D> clip;
    float unit, gain;
    uint32_t kind; // of scale
    uint64_t codes, params;
    bool v;

    quantize_unit() = default;

    __device__ inline quantize_unit(const append_params &p, const append_unit &of)
        : v(of.v)
    {
        uint32_t layer = p.layer_begin + of.layer;
        const kvd_cuda_matrices &side = v ? p.rotation.v : p.rotation.k;
        uint64_t index = matrix_index(p.rotation, layer, of.head);
        matrix = matrix_at<D>(side.forward, index, 2);
        unit = 1 / side.scale[index];
        gain = side.gain ? side.gain[index] : 1;
        kind = side.scale_kind;
        uint32_t kept = side.clip ? (uint32_t)((double)side.clip[index] * D) : D;
        clip = clip_search<D>(kept < D ? (int)(D - kept) : 0);
        uint64_t tile = p.tile.at(layer, p.kv_heads, of.head);
        codes = tile + p.tile.codes[v];
        params = tile + p.tile.params[v];
    }
};

// One side, or both, K first. A unit is a (side, layer, kv head), a round as many of its chunks as a block has
// warps; a block takes `share` of all rounds. A warp takes one chunk at a time, the four warps of a warpgroup
// together. While one is multiplied and quantized, the next one's rows come.
// USUAL: every chunk begins where its item's history ends, and scales are as published. The code of the rest, there but
// never run, costs a tenth of the time.
template <int CODEC, int D, bool USUAL>
__global__ void __launch_bounds__(quantize_warps(D) * 32, 1)
    quantize_kernel(const __grid_constant__ append_params p, bool first_v, uint32_t all, uint32_t share)
{
    KVD_DYNAMIC_SHARED(shared);
    constexpr uint32_t WARPS = quantize_warps(D);
    uint32_t warp = threadIdx.x / 32, rounds = (p.chunks + WARPS - 1) / WARPS;
    uint32_t at = blockIdx.x * share, end = min(all - at, share) + at;
    uint32_t u = at / rounds, round = at % rounds;
    staged_rows<D> staged = {shared + matrix_bytes(D) + warp * (32 * padded(D)) + threadIdx.x % 32 * 16};
    chunk_walk<D, USUAL> walk;
    auto fetch = [&] { // warps without a chunk in the last round take the last one
        walk.fetch(p, first_v, u, min(round * WARPS + warp, p.chunks - 1), round > 0, staged);
    };
    quantize_unit<CODEC, D> work;
    fetch();
    for (bool load = true; at < end; at++) {
        if (load) {
            work = quantize_unit<CODEC, D>(p, append_unit(p, first_v, u));
            __syncthreads();
            shared_matrix<D>{work.matrix, shared}.load();
        }
        shared_matrix<D> r = {work.matrix, shared};
        const append_item &item = p.items[walk.of];
        bool mine = round * WARPS + warp < p.chunks;
        uint32_t token = chunk_token(p, item, walk.chunk, USUAL), h = token - p.sink;
        uint32_t keep = USUAL ? 0 : max(token, item.hist_end) - token;
        uint8_t *page = (uint8_t *)item.codec[h / PAGE];
        uint32_t a[padded(D) / 16][4];
        float c[padded(D) / 8][4];
        staged.load(a);
        r.multiply(a, c);
        load = ++round == rounds;
        if (load)
            u++, round = 0;
        if (at + 1 < end)
            fetch();
        r.finish();
        coded_rows<CODEC, D> coded = {};
        // Row g, then row g + 8 in its place: the code is long, and the cache of instructions small.
#pragma unroll 1
        for (int half = 0;; half++) {
            coded.quantize(c, work.unit, work.clip, work.gain,
                USUAL ? KVD_SCALE_PUBLISHED : work.kind, p.codec);
            if (half == 1)
                break;
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                c[j][0] = c[j][2], c[j][1] = c[j][3];
        }
        if (mine)
            coded.store(p.codec, work.v, page + work.codes, page + work.params, h % PAGE / 16, keep);
    }
}

template <int CODEC, int D, bool USUAL>
static cudaError_t quantize_side(const append_params &p, bool first_v, uint32_t sides, cudaStream_t stream)
{
    constexpr int BYTES = quantize_bytes(D), WARPS = quantize_warps(D);
    uint32_t units = sides * p.layer_count * p.kv_heads, rounds = (p.chunks + WARPS - 1) / WARPS;
    int device = 0, processors = 0;
    cudaError_t rc = cudaGetDevice(&device);
    if (rc == cudaSuccess)
        rc = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (rc == cudaSuccess)
        rc = cudaFuncSetAttribute(quantize_kernel<CODEC, D, USUAL>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (rc != cudaSuccess)
        return rc;
    uint64_t all = (uint64_t)units * rounds, share = (all + processors - 1) / processors;
    if (all > UINT32_MAX)
        return cudaErrorInvalidValue;
    return launch(quantize_kernel<CODEC, D, USUAL>, (uint32_t)((all + share - 1) / share), WARPS * 32, BYTES, stream,
        p, first_v, (uint32_t)all, (uint32_t)share);
}

// Sides that a launch is for, which are in one codec: [first, end) of K and V.
struct which_sides {
    uint32_t first, end;
};

template <int CODEC, bool USUAL>
static cudaError_t quantize_sides(const append_params &p, which_sides which, cudaStream_t stream)
{
    cudaError_t rc = cudaSuccess;
    uint32_t sides = p.dim_k == p.dim_v ? which.end - which.first : 1;
    for (uint32_t v = which.first; v < which.end && rc == cudaSuccess; v += sides) {
        uint32_t dim = v ? p.dim_v : p.dim_k;
        switch (dim) {
#define KVD_HEAD_DIM(d)                                       \
    case d:                                                   \
        rc = quantize_side<CODEC, d, USUAL>(p, v, sides, stream);    \
        break;
#include "proto/head_dims.def"
        default:
            rc = cudaErrorInvalidValue;
        }
    }
    return rc;
}

// quantize_tc.cu: tc2 and tc2.5.
cudaError_t quantize_tc(const append_params &p, which_sides which, cudaStream_t stream);

// quantize_other.cu: its only kernels are those for all calls.
cudaError_t quantize_int4(const append_params &p, which_sides which, cudaStream_t stream);

// quantize_latent.cu: latents, in any codec but bf16.
cudaError_t quantize_latents(const append_params &p, cudaStream_t stream);

// Demotes sides in any codec but bf16.
template <bool USUAL> static cudaError_t quantize(const append_params &p, which_sides which, cudaStream_t stream)
{
    switch (family_of(p.codec)) {
    case INT2:
        return quantize_sides<INT2, USUAL>(p, which, stream);
    case INT2C:
        return quantize_sides<INT2C, USUAL>(p, which, stream);
    case LEVELS2:
        return quantize_sides<LEVELS2, USUAL>(p, which, stream);
    case LEVELS3:
        return quantize_sides<LEVELS3, USUAL>(p, which, stream);
    case LEVELS4:
        return quantize_sides<LEVELS4, USUAL>(p, which, stream);
    case TC:
        return p.rotation.transforms ? quantize_tc(p, which, stream) : cudaErrorInvalidValue;
    case INT4: // of both kinds of calls
        return quantize_int4(p, which, stream);
    default:
        return cudaErrorInvalidValue;
    }
}

// quantize<false>
cudaError_t quantize_other(const append_params &p, which_sides which, cudaStream_t stream);

} // namespace kvd

#endif
