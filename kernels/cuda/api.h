// The CUDA kernels over pages: a plain C API over streams, used by the daemon's CUDA backend and by
// workers in direct mode.
//
// A call queues its work on a stream and returns. Nothing is allocated and nothing waits: lengths
// and page tables are read on the device, so that a call can be captured in a CUDA graph and
// replayed while they change. All pointers are device memory unless said otherwise. Returns 0, a
// cudaError_t, or -1 for a shape that is not supported.
//
// Built for sm_90 (bulk copies into shared memory) and, portably, for sm_80 and later. Pages are
// those of kernels/format.h. S sequences, H_q q heads, H_kv kv heads, group = H_q / H_kv <= 64, DK
// and DV head_dim of K and V, as proto/head_dims.def has them. Where DK and DV are those of a
// latent plane, K is the rope part and V the latent, H_kv is 1, H_q at most 128, and a query has DV
// + DK values.
#ifndef KVD_KERNELS_CUDA_API_H
#define KVD_KERNELS_CUDA_API_H

#include "proto/kvd_limits.h"

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

// Whether kernels were compiled for the current device, or its driver compiles them: asks for one,
// as all are compiled for the same.
int kvd_cuda_code_check(void);

// One side (K or V) of a rotation set in device memory, as kvd_cuda_rotation_pack lays it out.
// Matrix of (layer, kv head): index (n_layers == 1 ? 0 : layer) * heads + (heads == 1 ? 0 : head).
// Unused for bf16 pages. Identity is a matrix like any other, but its *_f32 may be NULL.
struct kvd_cuda_matrices {
    const uint16_t *queries;      // q R, K's side only: bf16 operands, high then low part
    const uint16_t *forward;      // x R: the same for rows to store
    const uint16_t *inverse;      // x R^T: fp16 operands
    const float *scale;           // [matrices] what a product must be divided by
    const float *forward_f32;     // [matrices][D][D]
    const float *inverse_f32;     // its transpose
    const float *inverse_columns; // [matrices][D] sums of the columns of R^T
    const float *clip;            // [matrices] ratios; NULL: none
    const float *gain;            // [matrices] of the levels; NULL: 1
    uint32_t scale_kind;          // of what is stored: enum kvd_scale
};

// How a channel tile of K is coded in tc2 or tc2.5. A register has a stream of bits of its first
// and one of its second elements (kernels/README.md); a code is looked at from bit `view` of them
// on, masked, and is then 2^place times itself.
struct kvd_cuda_key_tile {
    uint32_t view, mask; // the mask in both halves of a word; 0 where there are no codes
    uint32_t bits;       // of a code
    float step; // from one level to the next, in units of the channel's deviation; 0 without codes
    float factor; // step / 2^place, for queries
};

// What codecs tc2 and tc2.5 want of a matrix, beside its operands: those are of A^-T with its
// columns times the deviations
// (`queries`), of A with its columns by the deviations (`forward`), and of V's A^-1 (`inverse`).
struct kvd_cuda_transform {
    struct kvd_cuda_key_tile tiles[2][KVD_MAX_HEAD_DIM / 16]; // of tc2, of tc2.5; none of a codec
                                                              // that the set's bits are not for
    float query_unit; // rotated queries are to be multiplied by
    float
        levels_room; // and are to be made smaller by where codes are not looked at in their places
    float forward_scale[2]; // what products must be divided by: of K, V
    float inverse_scale;    // and those with V's inverse, of levels that are one apart
    float unused[3];        // means are 16-byte aligned, in all of an array
    uint16_t k_mean_parts[2]
                         [KVD_MAX_HEAD_DIM]; // two bf16 parts, zeros from dim on; 16-byte aligned
    float k_mean[KVD_MAX_HEAD_DIM], v_mean[KVD_MAX_HEAD_DIM];
    float k_offset[KVD_MAX_HEAD_DIM], v_offset[KVD_MAX_HEAD_DIM]; // mean A, by the deviations
    float k_sigma[KVD_MAX_HEAD_DIM];
};

struct kvd_cuda_rotation {
    uint32_t n_layers, heads; // 1, or as many as there are
    struct kvd_cuda_matrices k, v;
    const struct kvd_cuda_transform
        *transforms; // [matrices]; NULL: no codec that wants them is used
};

// Where the pages of S sequences are, and what they hold.
struct kvd_cuda_pages {
    const uint64_t *codec; // [S][codec_stride] addresses of history pages
    const uint64_t *bf16;  // [S][bf16_stride]: sink pages, then ring pages
    uint32_t codec_stride, bf16_stride;
    const uint32_t *length;   // [S] tokens stored
    const uint32_t *hist_end; // [S] history is [sink, hist_end)
};

// -- attention -----------------------------------------------------------------------------------

// A worker's newest tokens of a layer, which no page has yet. Token t lies in row t % ring.
struct kvd_cuda_tail {
    uint16_t *k, *v;        // bf16 [S][ring][H_kv][D]; 16-byte aligned
    const uint32_t *tokens; // [S] how many follow those in the pages, the queries' own included;
                            // NULL: there is no tail
    uint32_t ring;
};

struct kvd_cuda_attend_params {
    uint32_t sequences, q_heads, kv_heads, dim_k, dim_v;
    uint32_t codec;      // of K's history
    uint32_t layer;      // KV layer index within the pages and the rotation set
    uint32_t q_len;      // queries a sequence: the last tokens of it
    uint32_t new_tokens; // 0, or at least q_len: K/V of the last tokens are in k and v
    uint32_t sink, ring; // tokens; ring as kvd_plane_ring
    float scale;         // logits are scale * q.k,
    const float *sinks;  // [H_q] logits of tokens without a value; NULL: none (kernels/backend.h)
    float softcap;       // then softcap * tanh(logit / softcap); 0: none
    uint32_t window;     // each query sees its last `window` tokens; 0: all
    enum kvd_dtype q_type, o_type; // bf16, or f32 (q is then taken as two bf16)
    const void *q; // [S][q_len][H_q][DK], over latents [..][DV + DK], not rotated; 16-byte aligned
    void *o;       // [S][q_len][H_q][DV], not rotated; 8-byte aligned
    float *lse;    // [S][q_len][H_q], natural log; NULL: not wanted
    const uint16_t *k, *v; // bf16 [S][new_tokens][H_kv][D]; 16-byte aligned
    struct kvd_cuda_pages pages;
    struct kvd_cuda_tail tail; // instead of new_tokens
    // What `pages` has, tail.tokens, and the tokens of codec pages were written by copies, or by
    // kernels that had finished when the kernel in front of this call on the stream let it start:
    // they are read while that one still runs.
    bool settled;
    uint32_t codec_v; // of V's history
    bool packed;      // codes are not made values ahead, for want of scratch: slower with many rows
    // From kvd_cuda_attend_plan, too: 0, or into how many the histories of a kv head are cut
    // together, as if each lay behind the other; splits are enough for any of them.
    uint32_t shares;
    struct kvd_cuda_rotation rotation;
    // From kvd_cuda_attend_plan:
    uint32_t part_tiles;     // tiles of a history's part, about
    uint32_t splits;         // parts of a history, at most
    uint32_t window_splits;  // parts of a sink + window
    uint32_t warps;          // of a block: 4, 8 or 16
    uint32_t block_rows;     // of blocks of warpgroups: 128, 64, or 0: other kernels
    uint32_t unpacked;       // parts of a history whose codes are made values at a time, with 128
    uint32_t window_pairs;   // of a window's part, pairs of 64 tokens, with blocks of warpgroups
    uint32_t ahead_pairs;    // of tiles, of each sequence and kv head, that there is scratch for
    uint64_t scratch_zeroed; // so many bytes of scratch are zero before a first use; each call
                             // leaves them so
    void *scratch;           // kvd_cuda_attend_scratch bytes, 256-byte aligned
};

// Whether histories in these codecs and head_dims, latents among them, have kernels of their own,
// or go by the one for any codecs, which may take ten times as long where query rows are few.
bool kvd_cuda_attend_tuned(struct kvd_codecs codec, uint32_t dim_k, uint32_t dim_v);

// Cuts the work for a device. To be called once for all layers of a step; stays right, if not the
// best, when lengths change, but where `block_rows` is not 0: then a history longer than part_tiles
// * splits tiles, or a window longer than it was said to be, gives outputs that are not numbers.
// history_sum and history_max: tokens of the histories, all together and the longest; window_max:
// of the longest sink + window.
void kvd_cuda_attend_plan(struct kvd_cuda_attend_params *p, uint64_t history_sum,
                          uint32_t history_max, uint32_t window_max, uint32_t multiprocessors);
uint64_t kvd_cuda_attend_scratch(const struct kvd_cuda_attend_params *p);
int kvd_cuda_attend(const struct kvd_cuda_attend_params *p, struct CUstream_st *stream);

// Writes K and V of a step's tokens to the tail: the last q_len of tail.tokens[s].
struct kvd_cuda_store_params {
    uint32_t sequences, kv_heads, dim_k, dim_v, q_len;
    const uint16_t *k, *v;  // bf16 [S][q_len][H_kv][D]; 16-byte aligned
    const uint32_t *length; // [S] tokens in the pages
    struct kvd_cuda_tail tail;
};
int kvd_cuda_store(const struct kvd_cuda_store_params *p, struct CUstream_st *stream);

// -- storing and reading -------------------------------------------------------------------------

// A tensor [layers][tokens][heads][dim], dim contiguous; strides in bytes.
struct kvd_cuda_tensor {
    uint8_t *data;
    uint64_t layer_stride, token_stride, head_stride;
    enum kvd_dtype dtype;
};

// One sequence of an append; an array of them lies in device memory.
struct kvd_cuda_append_item {
    const uint64_t *codec, *bf16; // page tables
    uint32_t length, hist_end, new_length, new_hist_end;
    uint32_t first_chunk;        // sum over the items before of kvd_cuda_chunks
    uint32_t first_token;        // and of new_length - length
    uint32_t first_kept;         // and of kvd_cuda_kept_tokens
    struct kvd_cuda_tensor k, v; // bf16, 16-byte aligned rows
};

struct kvd_cuda_append_params {
    uint32_t kv_heads, dim_k, dim_v;
    uint32_t codec; // of K's history
    uint32_t sink, ring;
    uint32_t layer_begin, layer_count;
    struct kvd_cuda_rotation rotation;
    const struct kvd_cuda_append_item *items;
    uint32_t n_items;
    uint32_t chunks, tokens, kept; // sums over the items
    bool whole_chunks;             // no item's history ends inside a chunk
    uint32_t codec_v;              // of V's history
};

// Chunks of 16 tokens that an item's demotion writes. The first one keeps the tokens that it has
// where a truncation has left the history's end inside it.
static inline uint32_t kvd_cuda_chunks(const struct kvd_cuda_append_item *item, uint32_t sink)
{
    return item->new_hist_end > item->hist_end
               ? (item->new_hist_end - sink + 15) / 16 - (item->hist_end - sink) / 16
               : 0;
}

// New tokens of an item that stay in bf16: those in the sink, and those beyond the new history.
static inline uint32_t kvd_cuda_kept_tokens(const struct kvd_cuda_append_item *item, uint32_t sink)
{
    uint32_t sunk = item->new_length < sink ? item->new_length : sink;
    uint32_t from = item->new_hist_end > sink ? item->new_hist_end : sink;
    from = from > item->length ? from : item->length;
    return (sunk > item->length ? sunk - item->length : 0) +
           (item->new_length > from ? item->new_length - from : 0);
}

// Demotes [hist_end, new_hist_end) into history pages, from the ring or from the new tokens, then
// writes the others into sink and ring.
int kvd_cuda_append(const struct kvd_cuda_append_params *p, struct CUstream_st *stream);
// Looks for NaN and Inf in the new tokens. *found, all ones before, becomes the least of
// ((((item * layers + layer) * 2^17 + token) * kv_heads + head) * 2 + side) of what it finds.
int kvd_cuda_check(const struct kvd_cuda_append_params *p, unsigned long long *found,
                   struct CUstream_st *stream);

struct kvd_cuda_read_params {
    uint32_t kv_heads, dim_k, dim_v;
    uint32_t codec; // of K's history
    uint32_t sink, ring;
    uint32_t layer_begin, layer_count;
    struct kvd_cuda_rotation rotation;
    const uint64_t *codec_pages, *bf16_pages; // of the sequence
    uint32_t hist_end;
    uint32_t begin, tokens;
    struct kvd_cuda_tensor k, v; // outputs; data NULL: not wanted
    uint32_t codec_v;            // of V's history
};

// Pages to rows, un-rotated.
int kvd_cuda_read(const struct kvd_cuda_read_params *p, struct CUstream_st *stream);

struct kvd_cuda_rotate_params {
    const float *matrices; // forward_f32 or inverse_f32 of a side; NULL: identity
    bool transposed;       // these, each
    // Of the keys' (values') means: what is taken from x, and what is added to y.
    bool less_mean, plus_mean, values;
    const struct kvd_cuda_transform *transforms; // where either is wanted
    uint32_t n_layers, rotation_heads;
    uint32_t dim, layer_begin, layer_count, rows, heads, kv_heads;
    struct kvd_cuda_tensor x, y;
};

// y = x R in fp32, row by row, or (x - mean) R, or x R + mean.
int kvd_cuda_rotate(const struct kvd_cuda_rotate_params *p, struct CUstream_st *stream);

// y = x, between tensors of any strides and dtypes.
int kvd_cuda_copy(const struct kvd_cuda_tensor *x, const struct kvd_cuda_tensor *y, uint32_t layers,
                  uint32_t tokens, uint32_t heads, uint32_t dim, struct CUstream_st *stream);

// -- an engine's blocks --------------------------------------------------------------------------

// One side, K or V, of an engine's KV in bf16, and a dense tensor [layers][tokens][heads][dim].
// Strides in bytes; of dim_stride and token_stride one is 2.
struct kvd_cuda_paged_params {
    uint8_t *const *layers; // [n_layers] where each begins; device memory
    uintptr_t aligned;      // all of those addresses, or'ed
    uint64_t block_stride, head_stride, token_stride, dim_stride;
    const uint32_t *blocks; // the engine's blocks in the order of the tokens; device memory
    uint32_t block_tokens;
    uint32_t first_token; // within the first block
    uint32_t n_layers, tokens, heads, dim;
    uint8_t *dense;
    uint64_t dense_layer_stride;
    bool out; // of the tensor, into the blocks
};

// Copies `tokens` tokens between both. Blocks that are written must be distinct.
int kvd_cuda_paged(const struct kvd_cuda_paged_params *p, struct CUstream_st *stream);

int kvd_cuda_zero(void *at, uint64_t bytes, struct CUstream_st *stream);

// Memory to sum: 16-byte aligned, a multiple of 16 bytes and less than 16 GiB.
struct kvd_cuda_span {
    uint64_t addr, bytes;
};
enum { KVD_CUDA_SUMS = 65535 }; // pages of a call

// sums[i]: kvd_words_sum of pages[i]. Both arrays are in the device's memory.
int kvd_cuda_sums(const struct kvd_cuda_span *pages, uint32_t n, unsigned long long *sums,
                  struct CUstream_st *stream);

// -- rotation sets -------------------------------------------------------------------------------

// Rows and columns of operands: whole groups of 32 channels.
static inline uint32_t kvd_cuda_operand_dim(uint32_t dim)
{
    return (dim + 31) / 32 * 32;
}

// Bytes of a side's operands, of one part.
static inline uint64_t kvd_cuda_operand_bytes(uint64_t matrices, uint32_t dim)
{
    return matrices * kvd_cuda_operand_dim(dim) * kvd_cuda_operand_dim(dim) * 2;
}

// Host code. r: [matrices][dim][dim]. Writes operands (`queries` where it is not NULL), scale and
// column sums.
void kvd_cuda_rotation_pack(const float *r, uint64_t matrices, uint32_t dim, uint16_t *queries,
                            uint16_t *forward, uint16_t *inverse, float *scale,
                            float *inverse_columns);

// Host code. The same for matrix `index` of a set of transforms, of which the operands are of
// different matrices, and what codecs tc2 and tc2.5 want beside them. `inverse_k` is of no use to
// these codecs, and not written. For a set of rotations only `out` is written: its operands are
// those of kvd_cuda_rotation_pack, with `scale_k` and `scale_v`.
struct kvd_rotation_data;
struct kvd_cuda_transform_operands {
    uint16_t *queries, *forward_k, *forward_v, *inverse_v; // of all matrices
    float *scale_k, *scale_v;                              // of all matrices
};
bool kvd_cuda_is_transform(const struct kvd_rotation_data *d);
void kvd_cuda_transform_pack(const struct kvd_rotation_data *d, uint64_t index,
                             const struct kvd_cuda_transform_operands *operands,
                             struct kvd_cuda_transform *out);

#ifdef __cplusplus
}
#endif
#endif
