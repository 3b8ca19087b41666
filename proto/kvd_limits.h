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
    KVD_MAX_GROUP = 64,         // q heads per kv head
    KVD_MAX_LATENT_GROUP = 128, // the same of a latent plane
    KVD_MAX_TP_SIZE = 1024,     // ranks of a model
    KVD_MAX_HEAD_DIM = 256,
    KVD_MAX_ROW = 512, // values of a token and head on one side: a head_dim or a latent
    KVD_MAX_SINK = 4096,
    KVD_MAX_RECENT = 65536,
    KVD_MAX_LENGTH = 1 << 24, // tokens in a sequence

    KVD_MAX_CALL_TOKENS = 65536, // items x tokens in one Append, Attend or Step
    KVD_MAX_CALL_ITEMS = 1024,
    KVD_MAX_CALL_SEQUENCES = 4096,
    KVD_MAX_CALL_PROMPTS = 256,   // in one MatchPrefix or PublishBlocks
    KVD_MAX_CALL_BLOCKS = 65536,  // of them together
    KVD_MAX_PROMPT_BLOCKS = 4096, // of one of them
    KVD_MAX_PROMPT_EXTRAS = 16,   // keys that separate prompts
    KVD_MAX_PROMPT_EXTRA_BYTES = 1024,
    KVD_MIN_BLOCK_KEY = 16, // bytes of a caller's own key of a block
    KVD_MAX_BLOCK_KEY = 40,
    KVD_BLOCK_KEY = 24,       // bytes of kvd's
    KVD_MAX_CALL_PAGES = 512, // in one PutPages, GetPages or EncodePages
    KVD_EXACT_TAIL_PAGES = 4, // of a chain's last pages, which EncodePages leaves as they are
    KVD_MAX_CALL_ADOPTIONS = 16,
    KVD_MAX_CALL_SEGMENTS = 32, // of a GPU's memory, in one RegisterBuffer
    KVD_SEGMENT_UNIT = 2 << 20, // bytes that their sizes are multiples of
    KVD_MAX_LEASE_MS = 600000,
    KVD_MAX_RETAIN_MS = 86400000,
    KVD_MAX_SINKS = 65536,  // layers x q_heads of a session's attention sinks
    KVD_MAX_NAME = 128,     // bytes of a sequence's or rotation set's name
    KVD_MAX_NAMESPACE = 64, // bytes of a namespace's name
    KVD_MAX_CLIENT_NAME = 64,
    // Bytes of a socket's path: a socket address has 108, and the fd socket adds ".fd".
    KVD_MAX_SOCKET_PATH = 95,
    KVD_MAX_MESSAGE = 64 << 20, // bytes of one RPC message

    KVD_DEFAULT_SINK = 64,
    KVD_DEFAULT_RECENT = 256,
    // How far appends may run ahead of demotion: spare ring slots beyond the recent window.
    KVD_RING_SLACK = 64,
};

enum kvd_codec {
#define KVD_CODEC(id, number, ...) KVD_CODEC_##id = (number),
#include "proto/codecs.def"
    KVD_CODEC_COUNT, // numbers are dense
};

// What there is of a page that was put.
enum kvd_page_kind {
    KVD_PAGE_MISSING = 0,
    KVD_PAGE_ENCODED = 1, // in the layout's codec
    KVD_PAGE_EXACT = 2,   // in bf16
    KVD_PAGE_KINDS,
};

enum kvd_dtype {
    KVD_DTYPE_BF16 = 0,
    KVD_DTYPE_F32 = 1,
};

// The codecs of K and of V in a plane's history.
struct kvd_codecs {
    uint32_t k, v; // enum kvd_codec
};

static inline struct kvd_codecs kvd_codecs_both(uint32_t codec)
{
    struct kvd_codecs c = {codec, codec};
    return c;
}
static inline uint32_t kvd_codecs_side(struct kvd_codecs c, bool v)
{
    return v ? c.v : c.k;
}
// Whether K or V is rotated, and so needs a rotation set: what is not bf16.
static inline bool kvd_codecs_rotated(struct kvd_codecs c)
{
    return c.k != KVD_CODEC_BF16 || c.v != KVD_CODEC_BF16;
}

// A set of layers whose KV has one shape. A block is 64 tokens of all layers of one plane.
//
// A latent plane is of multi-head latent attention (MLA): one kv head, whose K is the part of a key
// that RoPE turns, shared by all q heads, and whose V is the latent: values, and the rest of keys.
// A query then is one for the latent (absorbed, by the model's own up-projection), then one for the
// rope part: logit = q_latent . latent + q_rope . rope. The rope part is in bf16.
struct kvd_plane {
    uint32_t n_layers; // of the layout's that are in this plane
    uint32_t q_heads;
    uint32_t kv_heads;
    uint32_t head_dim_k; // of a latent plane: of the rope part
    uint32_t head_dim_v; // of a latent plane: of the latent
    uint32_t latent;     // 1: such a plane; else 0
    struct kvd_codecs codec;
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
    // Which part of a model that tensor parallelism splits by heads; 0 and 0: it is not split. The
    // heads of the planes are those of the rank.
    uint32_t tp_rank, tp_size;
};

// Whether K or V may have this head_dim, and whether a layer's K and V may have these.
static inline bool kvd_head_dim_ok(uint32_t dim)
{
    switch (dim) {
#define KVD_HEAD_DIM(d) case (d):
#include "proto/head_dims.def"
        return true;
    default:
        return false;
    }
}
static inline bool kvd_head_dims_ok(uint32_t k, uint32_t v)
{
    switch (k << 16 | v) {
#define KVD_HEAD_DIMS(dk, dv) case (dk) << 16 | (dv):
#include "proto/head_dims.def"
        return true;
    default:
        return false;
    }
}
static inline bool kvd_latent_dims_ok(uint32_t rope, uint32_t latent)
{
    switch (rope << 16 | latent) {
#define KVD_LATENT_DIMS(r, l) case (r) << 16 | (l):
#include "proto/head_dims.def"
        return true;
    default:
        return false;
    }
}
// Values of a query.
static inline uint32_t kvd_plane_dim_q(const struct kvd_plane *p)
{
    return p->head_dim_k + (p->latent ? p->head_dim_v : 0);
}
// For messages.
#define KVD_HEAD_DIM_NAMES "64, 80, 96, 112, 128, 192 and 256"
#define KVD_HEAD_DIMS_NAMES                                                                        \
    KVD_HEAD_DIM_NAMES                                                                             \
    " are possible; where K and V differ, 64, 128 and 256, and 192 for K with 128 for V"

// Slots of the bf16 ring that holds the recent window: a multiple of KVD_PAGE_TOKENS.
static inline uint32_t kvd_plane_ring(const struct kvd_plane *p)
{
    return (p->recent + KVD_RING_SLACK + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS;
}

#endif
