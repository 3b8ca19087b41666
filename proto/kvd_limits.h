// Limits and enums that the wire, the pool, the kernels and the client agree on. Plain C, no
// dependencies.
#ifndef KVD_PROTO_KVD_LIMITS_H
#define KVD_PROTO_KVD_LIMITS_H

#include <stdbool.h>
#include <stdint.h>

#define KVD_VERSION "0.1.0"

enum {
    KVD_PAGE_TOKENS = 64,  // tokens in a page, and in each of its tiles
    KVD_CHUNK_TOKENS = 16, // tokens that leave the recent window at once
    KVD_PAGE_UNIT = 4096,  // bytes that a page number counts; page sizes are multiples of it

    KVD_MAX_LAYERS = 512,
    KVD_MAX_PLANES = 8,
    KVD_MAX_MODEL_LAYER = 65535, // largest model layer id
    KVD_MAX_KV_HEADS = 256,
    KVD_MAX_GROUP = 64, // q heads per kv head
    KVD_MAX_HEAD_DIM = 256,
    KVD_MAX_SINK = 4096,
    KVD_MAX_RECENT = 65536,
    KVD_MAX_LENGTH = 1 << 24, // tokens in a sequence

    KVD_MAX_CALL_TOKENS = 65536, // items x tokens in one Append, Attend or Step
    KVD_MAX_CALL_ITEMS = 1024,
    KVD_MAX_CALL_SEQUENCES = 4096,
    KVD_MAX_NAME = 128,     // bytes of a sequence's or rotation set's name
    KVD_MAX_NAMESPACE = 64, // bytes of a namespace's name
    KVD_MAX_CLIENT_NAME = 64,
    KVD_MAX_MESSAGE = 64 << 20, // bytes of one RPC message

    KVD_DEFAULT_SINK = 64,
    KVD_DEFAULT_RECENT = 256,
    // How far appends may run ahead of demotion: spare ring slots beyond the recent window.
    KVD_RING_SLACK = 64,
};

enum kvd_codec {
    KVD_CODEC_BF16 = 0,
    KVD_CODEC_INT2 = 1,         // four even levels from a row's min up
    KVD_CODEC_INT2C = 2,        // the same with scale and min in a byte each
    KVD_CODEC_INT2_LM = 3,      // Lloyd-Max levels about a row's mean
    KVD_CODEC_TURBOQUANT_2 = 4, // Lloyd-Max levels of 2, 3 and 4 bits about 0
    KVD_CODEC_TURBOQUANT_3 = 5,
    KVD_CODEC_TURBOQUANT_4 = 6,
    KVD_CODEC_COUNT,
};

enum kvd_dtype {
    KVD_DTYPE_BF16 = 0,
    KVD_DTYPE_F32 = 1,
};

// A set of layers whose KV has one shape. A block is 64 tokens of all layers of one plane.
struct kvd_plane {
    uint32_t n_layers; // of the layout's that are in this plane
    uint32_t q_heads;
    uint32_t kv_heads;
    uint32_t head_dim_k;
    uint32_t head_dim_v;
    uint32_t codec; // enum kvd_codec
    uint32_t sink;
    uint32_t recent;
    uint32_t window; // 0: a query sees all tokens; W: the last W, itself included
};

// What a model's KV looks like as the pages hold it. Pages of different layouts never mix. Layouts
// are compared byte by byte: what is past n_layers and n_planes is 0.
struct kvd_layout {
    uint32_t n_layers, n_planes;
    uint16_t layers[KVD_MAX_LAYERS];  // model layer ids, strictly ascending
    uint8_t plane_of[KVD_MAX_LAYERS]; // by index into layers; a plane's layers are in that order
    struct kvd_plane planes[KVD_MAX_PLANES];
    char rotation[80]; // "sha256:<hex>", a built-in set's name or "" (bf16); zero padded
};

// Slots of the bf16 ring that holds the recent window: a multiple of KVD_PAGE_TOKENS.
static inline uint32_t kvd_plane_ring(const struct kvd_plane *p)
{
    return (p->recent + KVD_RING_SLACK + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS;
}

#endif
