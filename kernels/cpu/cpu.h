// Inside the CPU backend: the thread pool, rotations and the table of inner loops.
#ifndef KVD_KERNELS_CPU_H
#define KVD_KERNELS_CPU_H

#include "kernels/backend.h"
#include "kernels/quantize.h"
#include "kernels/tc.h"

enum {
    KVD_CPU_ROWS = 4,     // query rows that an inner loop over heads takes at once
    KVD_CPU_PARTS = 5,    // of a prepared query of head_dim 128
    KVD_LOOP_ASKS = 8,    // of a tile's loops over K and V, for what is ahead
    KVD_LATENT_ROWS = 32, // and one over latents: panels have a row of so many floats a token
};

// Of inner loops there is a copy for every case of what is known when they are compiled (widths,
// rows, tiles). Sanitizers take minutes to instrument all of them, and say as much of one copy that
// is told at run time, for it is the same source that reads the same addresses.
#ifdef KVD_SANITIZED
#define KVD_BY_CASE __attribute__((noinline))
#else
#define KVD_BY_CASE inline __attribute__((always_inline))
#endif

// Tokens by channels, of latents or of their rope parts, as floats. Channels come in pairs that lie
// side by side. Of a panel of bf16 values they are in order. One of codes is as codes are unpacked
// without shuffling, [dim / 2 pairs][64][2]: kvd_latent_token and kvd_latent_channel say what is
// where.
struct kvd_panel {
    const float *x;
    uint32_t token, pair; // floats from one to the next
};

// Of codes unpacked: the token in place t, and the channel that is number c.
static inline uint32_t kvd_latent_token(uint32_t t)
{
    return t / 16 * 16 + t % 8 / 2 * 2 + t % 2 * 8 + t % 16 / 8;
}
static inline uint32_t kvd_latent_channel(uint32_t c)
{
    return c / 16 * 16 + c % 16 / 2 + c % 2 * 8;
}

// Of a side of a tile, by token.
struct kvd_cpu_params {
    _Alignas(64) float scale[KVD_PAGE_TOKENS];
    float centre[KVD_PAGE_TOKENS];
};

// What of the next tile is asked for while loops compute, a few lines of the cache at a time, and
// to its second level: pages lie anywhere, and what is asked for at once is waited for.
struct kvd_cpu_ahead {
    const uint8_t *at;
    uint64_t lines, step; // that are left; asked for at once
};

static inline void kvd_cpu_ask(struct kvd_cpu_ahead *a, uint32_t times)
{
    for (uint64_t n = KVD_MIN(a->lines, times * a->step); n > 0; n--, a->lines--, a->at += 64)
        __builtin_prefetch(a->at, 0, 2);
}

// Floats of prepared queries.
enum { KVD_CPU_QUERIES = KVD_CPU_PARTS * KVD_CPU_ROWS * 2 * 128 };
_Static_assert(KVD_CPU_QUERIES >= KVD_CPU_ROWS * 2 * KVD_MAX_HEAD_DIM, "room at every head_dim");

// The inner loops, one implementation per instruction set. rows is 1 to KVD_CPU_ROWS.
struct kvd_cpu_isa {
    const char *name;
    bool (*supported)(void);
    // A thread is about to run the loops below up to `logits`, or is done with them. NULL: nothing.
    void (*enter)(void);
    void (*leave)(void);
    // q [dim] -> what k_scores or tc_scores wants of it for keys in `codec`: 2 * dim floats, or
    // such KVD_CPU_PARTS times, of KVD_CPU_ROWS rows each. tc: their coder, where that is tc2 or
    // tc2.5.
    void (*q_prepare)(uint32_t codec, const struct kvd_tc_coder *tc, const float *q, uint32_t dim,
                      float *out);
    // Loops over codes ask for what is ahead KVD_LOOP_ASKS times.
    // scores[row][64] = sum over channels of level * q, without scale and centre. q: [rows][2 *
    // dim], prepared. Levels are those of kvd_cpu_levels.
    void (*k_scores)(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                     uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead);
    // The same for K in tc2 and tc2.5: sum over channels of (code - (2^bits - 1) / 2) * q.
    void (*tc_scores)(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                      uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead);
    // acc[row] += sum over tokens of p * level. p: [rows][64] in token order. acc: [rows][8 * dim],
    // in an order of the implementation's own that v_reduce resolves.
    void (*v_accumulate)(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                         uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead);
    // acc [8 * dim] -> o [dim].
    void (*v_reduce)(uint32_t codec, const float *acc, uint32_t dim, float *o);
    // scores[row][t] = k_t . q_row for n tokens; k: bf16, `stride` bytes from token to token. q:
    // [rows][dim], not rotated. Row r's scores start at scores + r * 64. ahead: rows that will be
    // wanted next, to be asked for in passing; k where there are none.
    void (*bf16_scores)(const uint8_t *k, const uint8_t *ahead, uint64_t stride, uint32_t n,
                        uint32_t dim, const float *q, uint32_t rows, float *scores);
    // o[row] += sum over n tokens of p * v. p as scores above; o: [rows][dim].
    void (*bf16_accumulate)(const uint8_t *v, const uint8_t *ahead, uint64_t stride, uint32_t n,
                            uint32_t dim, const float *p, uint32_t rows, float *o);
    // One side's parameters of a tile: scale and centre, for the levels of kvd_cpu_levels, of its
    // 64 tokens in their order.
    void (*params)(uint32_t codec, const uint8_t *params, struct kvd_cpu_params *out);
    // Of a row's 64 values s:
    // s[t] = scale[t] * s[t] + centre[t] * q_sum + q_mean.
    void (*affine)(float *s, const struct kvd_cpu_params *p, float q_sum, float q_mean);
    // s[t] *= by; returns 0 where all are finite then, else NaN.
    float (*logits)(float *s, float by);
    // The largest of them and `top`; NaN are passed over.
    float (*top)(const float *s, float top);
    // All three at once, where all 64 tokens are seen: returns what logits does, and raises *top.
    float (*whole)(float *s, const struct kvd_cpu_params *p, float q_sum, float q_mean, float by,
                   float *top);
    // s[t] = exp(s[t] - m); returns their sum. -inf gives 0.
    float (*exp_sum)(float *s, float m);
    // s[t] *= scale[t]; returns the sum of s[t] * centre[t] before that.
    float (*weigh)(float *s, const struct kvd_cpu_params *p);
    // x [n] *= f; n is a multiple of 16.
    void (*scale)(float *x, uint32_t n, float f);
    // y[row] = x[row] R for `rows` rows (any number); r: [dim][dim]. y must not overlap x.
    void (*rotate)(const float *x, uint32_t rows, uint32_t dim, const float *r, float *y);

    // Over latents. `rows` is 1 to KVD_LATENT_ROWS; q, p, s and o have a row of KVD_LATENT_ROWS
    // floats for each channel or token of a panel, in its order. What is past `rows` may be
    // computed or not. Channels are a multiple of 64, tokens of 8 where there are scores.
    void (*bf16_row)(const uint8_t *row, uint32_t dim, float *x);
    // A tile's latents, scale * level + min (of kvd_cpu_levels): the panel of codes at x.
    void (*latent_unpack)(uint32_t codec, const uint8_t *codes, uint32_t dim,
                          const struct kvd_affine *param, float *x);
    // s[token] += sum over channels of x * q[channel].
    void (*panel_scores)(const struct kvd_panel *x, uint32_t channels, uint32_t tokens,
                         const float *q, uint32_t rows, float *s);
    // o[channel] += sum over tokens of x * p[token].
    void (*panel_sums)(const struct kvd_panel *x, uint32_t channels, uint32_t tokens,
                       const float *p, uint32_t rows, float *o);
    // s *= scale; nan[row] is 0 where all of the row's are finite then, else NaN.
    void (*panel_logits)(float *s, uint32_t tokens, float scale, float *nan);
    // top[row] = max(top[row], the row's s).
    void (*panel_top)(const float *s, uint32_t tokens, float *top);
    // s = exp(s - top[row]), -inf gives 0; sum[row] is their sum.
    void (*panel_exp)(float *s, uint32_t tokens, const float *top, float *sum);
    // x [n][KVD_LATENT_ROWS] *= f[row].
    void (*panel_scale)(float *x, uint32_t n, const float *f);
};

// The levels that attention sums: those of the codec less the centre of them all where they are not
// symmetric. Sums of values that average to nothing then stay small; about any other centre they
// would grow with the tokens, and what is left when scale * level and min cancel would be rounding.
static inline float kvd_cpu_centre(uint32_t codec)
{
    return kvd_codec_level_kind(codec) != KVD_LEVELS_EVEN
               ? 0
               : (float)((1u << kvd_codec_bits(codec)) - 1) / 2;
}

static inline const float *kvd_cpu_levels(uint32_t codec)
{
    static const float centred[] = {-1.5f, -0.5f, 0.5f, 1.5f};
    static const float centred_4[] = {-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f,
                                      0.5f,  1.5f,  2.5f,  3.5f,  4.5f,  5.5f,  6.5f,  7.5f};
    if (kvd_codec_level_kind(codec) != KVD_LEVELS_EVEN)
        return kvd_codec_levels(codec);
    return kvd_codec_bits(codec) == 4 ? centred_4 : centred;
}

extern const struct kvd_cpu_isa kvd_cpu_scalar;
extern const struct kvd_cpu_isa kvd_cpu_avx2;
extern const struct kvd_cpu_isa kvd_cpu_avx512;
extern const struct kvd_cpu_isa kvd_cpu_vnni;
extern const struct kvd_cpu_isa kvd_cpu_amx;

struct kvd_threads;
// `n` threads in all, the caller's included. NULL when out of memory.
struct kvd_threads *kvd_threads_new(uint32_t n);
void kvd_threads_free(struct kvd_threads **t);
uint32_t kvd_threads_count(const struct kvd_threads *t);
// Runs fn(ctx, i) for i in 0..n-1 on all threads and returns when all are done.
void kvd_threads_run(struct kvd_threads *t, uint64_t n, void (*fn)(void *ctx, uint64_t i),
                     void *ctx);
// The same for 0..n-1 from slice->at on, until the slice is over; all before slice->at is done
// then. Runs one at least. NULL: all.
void kvd_threads_run_slice(struct kvd_threads *t, struct kvd_slice *slice, uint64_t n,
                           void (*fn)(void *ctx, uint64_t i), void *ctx);

struct kvd_rotation {
    uint32_t n_layers, heads, dim_k, dim_v;
    // [layer][head][dim][dim]; NULL: identity. What keys, queries and values are multiplied by, and
    // what takes them back. Where K's are orthogonal, queries' are the keys' own memory.
    float *k, *k_back, *q, *q_back, *v, *v_back;
    float *q_v;              // what takes queries to coded latents: A^-T of V; v where that is
                             // orthogonal
    float *k_mean, *v_mean;  // [layer][head][dim]; NULL: 0
    float *k_sigma, *k_bits; // [layer][head][dim_k], [layer][head][dim_k / 16]; NULL: tc.h
    float *clip_k, *clip_v;  // [layer][head]
    float *gain_k, *gain_v;
    enum kvd_scale scale_k, scale_v;
};

struct kvd_cpu {
    struct kvd_backend base;
    const struct kvd_cpu_isa *isa;
    struct kvd_threads *threads;
    void *walks, *latent_walks; // attend.c: of the attention that runs, one a thread
    uint8_t *dense;             // dense.c
    uint64_t dense_bytes;
    char device[96];
};

int kvd_cpu_check(struct kvd_backend *b, const struct kvd_append_params *p,
                  struct kvd_nonfinite *where);
int kvd_cpu_append(struct kvd_backend *b, const struct kvd_append_params *p, struct kvd_error *err);
int kvd_cpu_attend(struct kvd_backend *b, const struct kvd_attend_params *p, struct kvd_error *err);
int kvd_cpu_read(struct kvd_backend *b, const struct kvd_read_params *p, struct kvd_error *err);
int kvd_cpu_rotate(struct kvd_backend *b, const struct kvd_rotate_params *p, struct kvd_error *err);

// dense.c. Pages are taken so many bytes at a time: they stay in a core's cache between the steps.
enum { KVD_CPU_DENSE_MOST = 2 << 20 };
int kvd_cpu_dense(struct kvd_backend *b, uint64_t least, uint64_t wanted, struct kvd_dense *out,
                  struct kvd_error *err);
int kvd_cpu_paged(struct kvd_backend *b, const struct kvd_paged_kv *p,
                  const struct kvd_paged_copy *copy, struct kvd_error *err);

// memory.c
struct kvd_arena *kvd_cpu_arena_new(struct kvd_backend *b, uint32_t count, uint64_t bytes,
                                    struct kvd_error *err);
void kvd_cpu_arena_free(struct kvd_backend *b, struct kvd_arena **ap);
int kvd_cpu_extent_make(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                        struct kvd_error *err);
void kvd_cpu_extent_drop(struct kvd_backend *b, struct kvd_arena *a, uint32_t i);
int kvd_cpu_extent_zero(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                        struct kvd_error *err);
int kvd_cpu_extent_export(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int *fd,
                          struct kvd_error *err);
int kvd_cpu_extent_descriptor(struct kvd_backend *b, struct kvd_arena *a, uint32_t i);
int kvd_cpu_extent_adopt(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                         bool *shared, struct kvd_error *err);
int kvd_cpu_extent_import(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                          struct kvd_error *err);
int kvd_cpu_foreign_map(struct kvd_backend *b, const struct kvd_foreign *f, uint8_t **data,
                        struct kvd_error *err);
int kvd_cpu_segments_reserve(struct kvd_backend *b, uint64_t size, uint8_t **data,
                             struct kvd_error *err);
uint64_t kvd_cpu_memory_free(struct kvd_backend *b);

// Index of a layer's and kv head's matrix and clip ratio: sets may be shared by all layers or all
// heads.
static inline uint64_t kvd_rotation_index(const struct kvd_rotation *r, uint32_t layer,
                                          uint32_t head)
{
    return (uint64_t)(r->n_layers == 1 ? 0 : layer) * r->heads + (r->heads == 1 ? 0 : head);
}

// The matrix of a layer and kv head, or NULL for identity.
static inline const float *kvd_rotation_of(const struct kvd_rotation *r, const float *m,
                                           uint32_t dim, uint32_t layer, uint32_t head)
{
    return m ? m + kvd_rotation_index(r, layer, head) * dim * dim : NULL;
}

// The mean of a layer's and kv head's rows, or NULL for 0.
static inline const float *kvd_mean_of(const struct kvd_rotation *r, bool v, uint32_t layer,
                                       uint32_t head)
{
    const float *m = v ? r->v_mean : r->k_mean;
    return m ? m + kvd_rotation_index(r, layer, head) * (v ? r->dim_v : r->dim_k) : NULL;
}

// How a side is coded in tc2 and tc2.5; nothing of use for other codecs.
static inline struct kvd_tc_coder kvd_tc_coder_at(const struct kvd_rotation *r, uint32_t codec,
                                                  bool v, uint32_t layer, uint32_t head)
{
    uint64_t at = kvd_rotation_index(r, layer, head);
    if (!kvd_codec_tc(codec))
        return (struct kvd_tc_coder){0};
    return kvd_tc_coder_of(codec, v ? r->dim_v : r->dim_k, v,
                           r->k_sigma ? r->k_sigma + at * r->dim_k : NULL,
                           r->k_bits ? r->k_bits + at * (r->dim_k / KVD_TC_TILE) : NULL);
}

// Adds `sign` times a mean, which may be NULL, to rows.
static inline void kvd_add_mean(const float *mean, float sign, uint32_t rows, uint32_t dim,
                                float *x)
{
    for (uint32_t r = 0; mean && r < rows; r++)
        for (uint32_t c = 0; c < dim; c++)
            x[r * dim + c] += sign * mean[c];
}

// y = x R, or a copy for identity.
static inline void kvd_apply(const struct kvd_cpu_isa *isa, const float *x, uint32_t rows,
                             uint32_t dim, const float *r, float *y)
{
    if (r)
        isa->rotate(x, rows, dim, r, y);
    else
        memcpy(y, x, (uint64_t)rows * dim * sizeof(float));
}

static inline uint8_t *kvd_at(const struct kvd_tensor *t, uint32_t layer, uint64_t token,
                              uint32_t head)
{
    return t->data + layer * t->layer_stride + token * t->token_stride + head * t->head_stride;
}

void kvd_load_row(const struct kvd_tensor *t, uint32_t layer, uint64_t token, uint32_t head,
                  uint32_t dim, float *x);
void kvd_store_row(const struct kvd_tensor *t, uint32_t layer, uint64_t token, uint32_t head,
                   uint32_t dim, const float *x);

#endif
