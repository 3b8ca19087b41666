// Rows of bf16, for simd.inc.h. A vector of words has 2 V values: those with odd numbers are floats
// but for what lies below them, the others after a shift. So queries and sums have even and odd
// channels apart here.

// To the second level of the cache, as rows of a tile are as large as the first.
#define ASK(at) __builtin_prefetch(at, 0, 2)

enum { BF16_VECTORS = V == 16 ? 4 : 2 }; // of channels that are summed at once

// The products of some tokens, lane by lane: [row][token]. q: apart, in pairs of vectors as far as
// they go.
static KVD_BY_CASE void bf16_products(const uint32_t tokens, const uint32_t rows, const uint8_t *k,
                                      const uint8_t *ahead, uint64_t stride, uint32_t dim,
                                      const float *q, vf acc[V])
{
    uint32_t c = 0;
    for (uint32_t i = 0; i < rows * tokens; i++)
        acc[i] = v_zero();
    for (; c + 2 * V <= dim; c += 2 * V)
        for (uint32_t odd = 0; odd < 2; odd++) {
            vf y[KVD_CPU_ROWS];
            for (uint32_t r = 0; r < rows; r++) {
                y[r] = v_load(q + r * dim + c + odd * V);
                LOADED(y[r]);
            }
            for (uint32_t t = 0; t < tokens; t++) {
                const uint8_t *at = k + t * stride + c * 2;
                vf x = odd ? v_odd(v_words(at)) : v_even(v_words(at));
                if (!odd && c % 32 == 0)
                    ASK(ahead + (at - k));
                for (uint32_t r = 0; r < rows; r++)
                    acc[r * tokens + t] = v_fma(x, y[r], acc[r * tokens + t]);
            }
        }
    for (uint32_t t = 0; t < tokens && c < dim; t++)
        for (uint32_t r = 0; r < rows; r++)
            acc[r * tokens + t] =
                v_fma(v_bf16(k + t * stride + c * 2), v_load(q + r * dim + c), acc[r * tokens + t]);
}

// As many tokens at once as a vector has sums for.
static KVD_BY_CASE void bf16_scores_rows(const uint8_t *k, const uint8_t *ahead, uint64_t stride,
                                         uint32_t n, uint32_t dim, const float *q,
                                         const uint32_t rows, float *scores)
{
    const uint32_t tokens = V / rows;
    vf acc[V];
    float apart[KVD_CPU_ROWS * KVD_MAX_HEAD_DIM] __attribute__((aligned(64)));
    memcpy(apart, q, rows * dim * sizeof(*q));
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t c = 0; c + 2 * V <= dim; c += 2 * V) {
            vf even, odd;
            v_apart(q + r * dim + c, &even, &odd);
            v_store(apart + r * dim + c, even);
            v_store(apart + r * dim + c + V, odd);
        }
    uint32_t t = 0;
    for (; t + tokens <= n; t += tokens) {
        float sums[V];
        bf16_products(tokens, rows, k + t * stride, ahead + t * stride, stride, dim, apart, acc);
        v_store(sums, v_sums(acc));
        for (uint32_t r = 0; r < rows; r++)
            memcpy(scores + r * KVD_PAGE_TOKENS + t, sums + r * tokens, tokens * sizeof(*sums));
    }
    for (; t < n; t++) {
        bf16_products(1, rows, k + t * stride, ahead + t * stride, stride, dim, apart, acc);
        for (uint32_t r = 0; r < rows; r++)
            scores[r * KVD_PAGE_TOKENS + t] = v_sum(acc[r]);
    }
}

static void simd_bf16_scores(const uint8_t *k, const uint8_t *ahead, uint64_t stride, uint32_t n,
                             uint32_t dim, const float *q, uint32_t rows, float *scores)
{
    uint32_t r = 0;
    if (rows == 4)
        bf16_scores_rows(k, ahead, stride, n, dim, q, 4, scores);
    for (; rows < 4 && r + 2 <= rows; r += 2)
        bf16_scores_rows(k, ahead, stride, n, dim, q + r * dim, 2, scores + r * KVD_PAGE_TOKENS);
    if (rows % 2)
        bf16_scores_rows(k, ahead, stride, n, dim, q + r * dim, 1, scores + r * KVD_PAGE_TOKENS);
}

// Some vectors of channels from c on: sums enough that none waits for the one before it.
static KVD_BY_CASE void bf16_accumulate_columns(const uint8_t *v, const uint8_t *ahead,
                                                uint64_t stride, uint32_t n, uint32_t dim,
                                                const float *p, const uint32_t rows,
                                                const uint32_t vectors, uint32_t c, float *o)
{
    vf acc[KVD_CPU_ROWS][BF16_VECTORS];
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t j = 0; j < vectors; j += 2)
            v_apart(o + r * dim + c + j * V, &acc[r][j], &acc[r][j + 1]);
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t j = 0; j < vectors; j += 2) {
            const uint8_t *at = v + t * stride + (c + j * V) * 2;
            vi w = v_words(at);
            vf even = v_even(w), odd = v_odd(w);
            if (j * V % 32 == 0)
                ASK(ahead + (at - v));
            for (uint32_t r = 0; r < rows; r++) {
                vf by = v_set1(p[r * KVD_PAGE_TOKENS + t]);
                acc[r][j] = v_fma(even, by, acc[r][j]);
                acc[r][j + 1] = v_fma(odd, by, acc[r][j + 1]);
            }
        }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t j = 0; j < vectors; j += 2)
            v_together(acc[r][j], acc[r][j + 1], o + r * dim + c + j * V);
}

// One vector that is left over.
static KVD_BY_CASE void bf16_accumulate_last(const uint8_t *v, uint64_t stride, uint32_t n,
                                             uint32_t dim, const float *p, const uint32_t rows,
                                             uint32_t c, float *o)
{
    for (uint32_t r = 0; r < rows; r++) {
        vf acc = v_load(o + r * dim + c);
        for (uint32_t t = 0; t < n; t++)
            acc = v_fma(v_bf16(v + t * stride + c * 2), v_set1(p[r * KVD_PAGE_TOKENS + t]), acc);
        v_store(o + r * dim + c, acc);
    }
}

static KVD_BY_CASE void bf16_accumulate_rows(const uint8_t *v, const uint8_t *ahead,
                                             uint64_t stride, uint32_t n, uint32_t dim,
                                             const float *p, const uint32_t rows, float *o)
{
    uint32_t c = 0;
    for (; c + BF16_VECTORS * V <= dim; c += BF16_VECTORS * V)
        bf16_accumulate_columns(v, ahead, stride, n, dim, p, rows, BF16_VECTORS, c, o);
    for (; c + 2 * V <= dim; c += 2 * V)
        bf16_accumulate_columns(v, ahead, stride, n, dim, p, rows, 2, c, o);
    if (c < dim)
        bf16_accumulate_last(v, stride, n, dim, p, rows, c, o);
}

static void simd_bf16_accumulate(const uint8_t *v, const uint8_t *ahead, uint64_t stride,
                                 uint32_t n, uint32_t dim, const float *p, uint32_t rows, float *o)
{
    uint32_t r = 0;
    if (rows == 4)
        bf16_accumulate_rows(v, ahead, stride, n, dim, p, 4, o);
    for (; rows < 4 && r + 2 <= rows; r += 2)
        bf16_accumulate_rows(v, ahead, stride, n, dim, p + r * KVD_PAGE_TOKENS, 2, o + r * dim);
    if (rows % 2)
        bf16_accumulate_rows(v, ahead, stride, n, dim, p + r * KVD_PAGE_TOKENS, 1, o + r * dim);
}
