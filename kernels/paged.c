// An engine's blocks: checks and copies. Read paged.h first.
#include "kernels/paged.h"

#include "proto/kvd_limits.h"

enum {
    ELEMENT = 2, // bytes: bf16
    MAX_BLOCK_TOKENS = 1024,
    TILE = 16, // elements by tokens of a transposition
};

// -- checks -------------------------------------------------------------------------------------

static int by_stride(const void *a, const void *b)
{
    const struct kvd_overlap_dim *x = a, *y = b;
    return x->stride < y->stride ? -1 : x->stride > y->stride;
}

// The dimensions that have more than one element, inner ones first, and the bytes of a row without
// gaps. Returns how many are left beside that row.
static uint32_t dims_of(const struct kvd_paged_kv *p, const struct kvd_paged_side *side,
                        struct kvd_overlap_dim dims[4], uint64_t *row)
{
    const struct kvd_overlap_dim all[4] = {{p->all_blocks, side->strides.block},
                                           {p->heads, side->strides.head},
                                           {p->block_tokens, side->strides.token},
                                           {side->dim, side->strides.dim}};
    uint32_t n = 0, whole = 0;
    for (uint32_t i = 0; i < 4; i++)
        if (all[i].count > 1)
            dims[n++] = all[i];
    qsort(dims, n, sizeof(*dims), by_stride);
    *row = ELEMENT;
    for (; whole < n && dims[whole].stride == *row; whole++)
        if (__builtin_mul_overflow(*row, dims[whole].count, row))
            break; // checked before: it fits its memory
    memmove(dims, dims + whole, (n - whole) * sizeof(*dims));
    return n - whole;
}

// Whether all of it lies in its memory, and, but for blocks that are named twice, no element is
// another.
static int check_strides(const struct kvd_paged_kv *p, const struct kvd_paged_side *side,
                         struct kvd_error *err)
{
    const struct kvd_paged_strides *s = &side->strides;
    struct kvd_overlap_dim dims[4];
    uint64_t row, part, end = 0;
    bool over = false;
    if (s->dim != ELEMENT && s->token != ELEMENT)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s_strides: neither dim nor token is %d: elements of a head, or tokens of "
                        "a block, must lie side by side",
                        side->name, ELEMENT);
    const struct kvd_overlap_dim all[4] = {{p->all_blocks, s->block},
                                           {p->heads, s->head},
                                           {p->block_tokens, s->token},
                                           {side->dim, s->dim}};
    for (uint32_t i = 0; i < 4; i++) {
        over |= __builtin_mul_overflow(all[i].stride, all[i].count - 1, &part) ||
                __builtin_add_overflow(end, part, &end);
        if (all[i].stride % ELEMENT)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s_strides must be multiples of the %d bytes of a "
                            "bf16 element",
                            side->name, ELEMENT);
    }
    over |= __builtin_add_overflow(end, ELEMENT, &end);
    if (over || end > side->bytes)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: %u blocks of these strides reach %s%llu bytes far, and the memory has "
                        "%llu",
                        side->name, p->all_blocks, over ? "beyond 2^64; " : "",
                        (unsigned long long)end, (unsigned long long)side->bytes);
    uint32_t n = dims_of(p, side, dims, &row);
    for (uint32_t i = 0; i < n; i++) {
        if (dims[i].stride < row)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s_strides: at a distance of %llu bytes lies what is within %llu "
                            "bytes: elements would share memory",
                            side->name, (unsigned long long)dims[i].stride,
                            (unsigned long long)row);
        row = dims[i].stride * (dims[i].count - 1) + row;
    }
    return KVD_OK;
}

static int check_bases(const struct kvd_paged_kv *p, const struct kvd_paged_side *side,
                       struct kvd_error *err)
{
    for (uint32_t i = 0; i < p->layers; i++) {
        uintptr_t at = (uintptr_t)side->layers[i], end;
        if (!at || at % ELEMENT || __builtin_add_overflow(at, side->bytes, &end))
            return kvd_fail(err, KVD_E_INVALID,
                            "%s[%u] is %p, which is no address of %llu bytes "
                            "of bf16",
                            side->name, i, side->layers[i], (unsigned long long)side->bytes);
    }
    return KVD_OK;
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static int check_distinct(const uint32_t *blocks, uint64_t n, struct kvd_error *err)
{
    uint32_t *sorted KVD_FREE = malloc(n * sizeof(*sorted));
    if (!sorted)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    memcpy(sorted, blocks, n * sizeof(*sorted));
    qsort(sorted, n, sizeof(*sorted), by_number);
    for (uint64_t i = 1; i < n; i++)
        if (sorted[i] == sorted[i - 1])
            return kvd_fail(err, KVD_E_INVALID, "block %u is to be written twice", sorted[i]);
    return KVD_OK;
}

struct kvd_overlap kvd_paged_span(const struct kvd_paged_kv *p, bool v, uint32_t layer)
{
    const struct kvd_paged_side *side = &p->side[v];
    struct kvd_overlap_dim dims[4] = {{0}};
    uint64_t row;
    uint32_t n = dims_of(p, side, dims, &row);
    struct kvd_overlap span = {.begin = (uintptr_t)side->layers[layer],
                               .row = row,
                               .written = true,
                               .name = side->name,
                               .item = layer};
    for (uint32_t d = 0; d < KVD_LEN(span.dims); d++) // one stride is an element's
        span.dims[d] = d < n ? dims[d] : (struct kvd_overlap_dim){1, row};
    return span;
}

int kvd_paged_apart(const struct kvd_paged_kv *p, struct kvd_error *err)
{
    struct kvd_overlap *spans KVD_FREE = calloc((size_t)p->layers * 2, sizeof(*spans));
    if (!spans)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < p->layers; i++)
        for (int v = 0; v < 2; v++)
            spans[2 * i + (uint32_t)v] = kvd_paged_span(p, v, i);
    return kvd_overlap_check(spans, (size_t)p->layers * 2, err);
}

int kvd_paged_check(const struct kvd_paged_kv *p, uint32_t pages, bool written,
                    struct kvd_error *err)
{
    uint64_t tokens = (uint64_t)pages * KVD_PAGE_TOKENS;
    int rc = KVD_OK;
    if (p->block_tokens < 1 || p->block_tokens > MAX_BLOCK_TOKENS || !p->all_blocks)
        return kvd_fail(err, KVD_E_INVALID,
                        "block_tokens is %u and all_blocks %u; 1 to %d are possible, and 1 or more",
                        p->block_tokens, p->all_blocks, MAX_BLOCK_TOKENS);
    uint64_t used = kvd_div_up(p->first_token + tokens, p->block_tokens);
    if (p->first_token >= p->block_tokens || used > p->n_blocks)
        return kvd_fail(err, KVD_E_INVALID,
                        "%u pages from token %u of the first block on want %llu blocks of %u "
                        "tokens, and there are %u",
                        pages, p->first_token, (unsigned long long)used, p->block_tokens,
                        p->n_blocks);
    for (uint64_t i = 0; i < used; i++)
        if (p->blocks[i] >= p->all_blocks)
            return kvd_fail(err, KVD_E_INVALID, "blocks[%llu] is %u, and there are %u",
                            (unsigned long long)i, p->blocks[i], p->all_blocks);
    for (int v = 0; v < 2 && rc == KVD_OK; v++) {
        rc = check_strides(p, &p->side[v], err);
        if (rc == KVD_OK)
            rc = check_bases(p, &p->side[v], err);
    }
    return rc || !written ? rc : check_distinct(p->blocks, used, err);
}

// -- copies -------------------------------------------------------------------------------------

// `n` tokens of a block, at `block`, and where they are in the tensor, at `dense`.
struct piece {
    uint8_t *block, *dense;
    const struct kvd_paged_side *side;
    uint32_t heads, n;
    bool out; // of the tensor, into the block
};

static void move(uint8_t *block, uint8_t *dense, size_t bytes, bool out)
{
    memcpy(out ? block : dense, out ? dense : block, bytes);
}

// Elements of a head lie side by side in the block too.
static void copy_rows(const struct piece *p)
{
    const struct kvd_paged_strides *s = &p->side->strides;
    const size_t row = (size_t)p->side->dim * ELEMENT, token = row * p->heads;
    bool dense = s->head == row || p->heads == 1;
    if (dense && (s->token == token || p->n == 1)) {
        move(p->block, p->dense, token * p->n, p->out);
    } else if (dense) {
        for (uint32_t t = 0; t < p->n; t++)
            move(p->block + t * s->token, p->dense + t * token, token, p->out);
    } else {
        for (uint32_t h = 0; h < p->heads; h++)
            for (uint32_t t = 0; t < p->n; t++)
                move(p->block + h * s->head + t * s->token, p->dense + t * token + h * row, row,
                     p->out);
    }
}

// to[x][y] = from[y][x], of bf16 elements; strides in bytes from a y to the next, and of `to` from
// an x to the next.
static void transpose(uint8_t *restrict to, size_t to_stride, const uint8_t *restrict from,
                      size_t from_stride, uint32_t xs, uint32_t ys)
{
    uint16_t tile[TILE][TILE];
    for (uint32_t y0 = 0; y0 < ys; y0 += TILE)
        for (uint32_t x0 = 0; x0 < xs; x0 += TILE) {
            const uint32_t nx = KVD_MIN(xs - x0, (uint32_t)TILE);
            const uint32_t ny = KVD_MIN(ys - y0, (uint32_t)TILE);
            for (uint32_t y = 0; y < ny; y++)
                memcpy(tile[y], from + (y0 + y) * from_stride + x0 * ELEMENT, nx * ELEMENT);
            for (uint32_t x = 0; x < nx; x++) {
                uint16_t row[TILE];
                for (uint32_t y = 0; y < TILE; y++)
                    row[y] = tile[y][x];
                memcpy(to + (x0 + x) * to_stride + y0 * ELEMENT, row, ny * ELEMENT);
            }
        }
}

// Tokens lie side by side in the block: [dim][tokens].
static void copy_columns(const struct piece *p)
{
    const struct kvd_paged_strides *s = &p->side->strides;
    const size_t row = (size_t)p->side->dim * ELEMENT, token = row * p->heads;
    for (uint32_t h = 0; h < p->heads; h++) {
        uint8_t *block = p->block + h * s->head, *dense = p->dense + h * row;
        if (p->out)
            transpose(block, s->dim, dense, token, p->side->dim, p->n);
        else
            transpose(dense, token, block, s->dim, p->n, p->side->dim);
    }
}

static void copy_side(const struct kvd_paged_kv *p, const struct kvd_paged_copy *c, bool v,
                      uint32_t layer)
{
    const struct kvd_paged_side *side = &p->side[v];
    const uint64_t first = p->first_token + (uint64_t)c->page * KVD_PAGE_TOKENS;
    const uint32_t tokens = c->pages * KVD_PAGE_TOKENS;
    const size_t token = (size_t)side->dim * ELEMENT * p->heads;
    uint8_t *dense = c->dense[v] + (size_t)layer * c->dense_tokens * token;
    for (uint32_t t = 0, now; t < tokens; t += now) {
        const uint64_t in = (first + t) % p->block_tokens;
        const uint32_t block = p->blocks[(first + t) / p->block_tokens];
        now = (uint32_t)KVD_MIN(p->block_tokens - in, (uint64_t)(tokens - t));
        const struct piece piece = {.block = (uint8_t *)side->layers[c->layer + layer] +
                                             block * side->strides.block + in * side->strides.token,
                                    .dense = dense + t * token,
                                    .side = side,
                                    .heads = p->heads,
                                    .n = now,
                                    .out = c->out};
        if (side->strides.dim == ELEMENT)
            copy_rows(&piece);
        else
            copy_columns(&piece);
    }
}

void kvd_paged_copy(const struct kvd_paged_kv *p, const struct kvd_paged_copy *c)
{
    for (int v = 0; v < 2; v++)
        for (uint32_t layer = 0; layer < c->layers; layer++)
            copy_side(p, c, v, layer);
}
