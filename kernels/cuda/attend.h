// Decode attention over INT2 pages on a CUDA device: a plain C API over streams.
//
// One call answers one query token of each sequence for one layer, over sink + history + recent
// window. Nothing is allocated and nothing waits: lengths and page tables are read on the device,
// so a call can be captured in a CUDA graph and replayed while they change, as long as no history
// outgrows `max_history`.
//
// Pages are those of kernels/format.h. Built for sm_90 (bulk copies into shared memory).
#ifndef KVD_KERNELS_CUDA_ATTEND_H
#define KVD_KERNELS_CUDA_ATTEND_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

// All pointers are device memory. S sequences, H_q q heads, H_kv kv heads, group = H_q / H_kv, D
// head_dim.
struct kvd_cuda_decode_params {
    uint32_t sequences, q_heads, kv_heads; // group 1 to 16
    uint32_t head_dim;                     // of K and V: 128
    uint32_t layer;                        // KV layer index within the pages
    uint32_t sink, ring;                   // tokens; ring as kvd_geometry_ring
    float scale;                           // logits are scale * q.k
    const uint16_t *q;                     // bf16 [S][H_q][D], not rotated
    uint16_t *o;                           // bf16 [S][H_q][D], not rotated
    float *lse;                            // [S][H_q], natural log; NULL: not wanted
    const uint64_t *codec_pages;           // [S][codec_stride] addresses
    const uint64_t *bf16_pages;            // [S][bf16_stride]: sink pages, then ring pages
    uint32_t codec_stride, bf16_stride;
    const uint32_t *length;   // [S] tokens stored
    const uint32_t *hist_end; // [S] history is [sink, hist_end)
    const float *r_k;         // [rotations][D][D], q' = q R_K; NULL: identity
    const float *r_vt;        // [rotations][D][D], R_V transposed; NULL: identity
    uint32_t rotations;       // 1, or kv_heads
    uint32_t splits;          // of each history, from kvd_cuda_decode_plan; 1 to 128
    void *scratch;            // kvd_cuda_decode_scratch bytes, 256-byte aligned
};

// How many parts to cut histories of about `history` tokens into, so that S x H_kv x parts blocks
// fill the device.
uint32_t kvd_cuda_decode_plan(uint32_t sequences, uint32_t kv_heads, uint32_t history,
                              uint32_t multiprocessors);
uint64_t kvd_cuda_decode_scratch(const struct kvd_cuda_decode_params *p);

// Queues the work. 0, or a cudaError_t; -1 for a shape that is not supported.
int kvd_cuda_decode(const struct kvd_cuda_decode_params *p, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
