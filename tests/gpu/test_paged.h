// An engine's blocks on a GPU, against plain loops. Part of test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_PAGED_H
#define KVD_TESTS_GPU_TEST_PAGED_H

struct paged_case {
    uint32_t layers, heads, dim, block_tokens, first_token, tokens, blocks;
    bool columns;   // [dim][tokens] in a block
    uint32_t shift; // bytes that blocks are off 16-byte borders
};

static void *to_gpu(const void *from, size_t bytes)
{
    void *to = NULL;
    need(cudaMalloc(&to, bytes), "memory");
    upload(to, from, bytes);
    return to;
}

// Where an element lies in a layer's blocks, in elements.
static uint64_t paged_at(const struct paged_case *c, const uint32_t *blocks, uint32_t token,
                         uint32_t head, uint32_t channel)
{
    uint32_t at = c->first_token + token, in = at % c->block_tokens;
    uint64_t row =
        ((uint64_t)blocks[at / c->block_tokens] * c->heads + head) * c->block_tokens * c->dim;
    return row + (c->columns ? channel * c->block_tokens + in : in * c->dim + channel);
}

static bool paged_case(const struct paged_case *c, bool out, uint64_t *seed)
{
    const uint64_t block = (uint64_t)c->heads * c->block_tokens * c->dim, layer = block * c->blocks;
    const uint64_t dense = (uint64_t)c->tokens * c->heads * c->dim;
    uint16_t *blocks = malloc(c->layers * layer * 2), *rows = malloc(c->layers * dense * 2);
    uint32_t *numbers = malloc(c->blocks * 4);
    for (uint64_t i = 0; i < c->layers * layer; i++)
        blocks[i] = (uint16_t)kvd_rand(seed);
    for (uint64_t i = 0; i < c->layers * dense; i++)
        rows[i] = (uint16_t)kvd_rand(seed);
    for (uint32_t i = 0; i < c->blocks; i++) { // a random order
        uint32_t k = (uint32_t)(kvd_rand(seed) % (i + 1));
        numbers[i] = numbers[k];
        numbers[k] = i;
    }
    uint8_t *memory = NULL, *bases[8];
    need(cudaMalloc((void **)&memory, c->layers * layer * 2 + 16), "memory");
    upload(memory + c->shift, blocks, c->layers * layer * 2);
    struct kvd_cuda_paged_params p = {.block_stride = block * 2,
                                      .head_stride = c->block_tokens * c->dim * 2ull,
                                      .token_stride = c->columns ? 2 : c->dim * 2ull,
                                      .dim_stride = c->columns ? c->block_tokens * 2ull : 2,
                                      .blocks = to_gpu(numbers, c->blocks * 4),
                                      .block_tokens = c->block_tokens,
                                      .first_token = c->first_token,
                                      .n_layers = c->layers,
                                      .tokens = c->tokens,
                                      .heads = c->heads,
                                      .dim = c->dim,
                                      .dense = to_gpu(rows, c->layers * dense * 2),
                                      .dense_layer_stride = dense * 2,
                                      .out = out};
    for (uint32_t l = 0; l < c->layers; l++) {
        bases[l] = memory + c->shift + l * layer * 2;
        p.aligned |= (uintptr_t)bases[l];
    }
    p.layers = to_gpu(bases, sizeof(bases));
    bool good = kvd_cuda_paged(&p, NULL) == 0;
    for (uint32_t l = 0; l < c->layers; l++) // what must be there then
        for (uint32_t t = 0; t < c->tokens; t++)
            for (uint32_t h = 0; h < c->heads; h++)
                for (uint32_t d = 0; d < c->dim; d++) {
                    uint16_t *b = &blocks[l * layer + paged_at(c, numbers, t, h, d)];
                    uint16_t *r = &rows[l * dense + ((uint64_t)t * c->heads + h) * c->dim + d];
                    *(out ? b : r) = *(out ? r : b);
                }
    uint16_t *got = malloc(c->layers * KVD_MAX(layer, dense) * 2);
    cudaMemcpy(got, memory + c->shift, c->layers * layer * 2, cudaMemcpyDeviceToHost);
    good = good && memcmp(got, blocks, c->layers * layer * 2) == 0;
    cudaMemcpy(got, p.dense, c->layers * dense * 2, cudaMemcpyDeviceToHost);
    good = good && memcmp(got, rows, c->layers * dense * 2) == 0;
    void *on_gpu[] = {memory, (void *)p.blocks, p.dense, (void *)p.layers};
    for (size_t i = 0; i < KVD_LEN(on_gpu); i++)
        cudaFree(on_gpu[i]);
    free(blocks);
    free(rows);
    free(numbers);
    free(got);
    return good;
}

// What kvd does with blocks that are registered: some layers and pages of them, by the backend's
// operation, against the same in host memory.
enum { OP_LAYERS = 4, OP_HEADS = 3, OP_BLOCKS = 7, OP_TOKENS = 48, OP_PAGES = 4 };

static uint64_t op_side(uint32_t dim)
{
    return (uint64_t)OP_BLOCKS * OP_HEADS * OP_TOKENS * dim;
}

static struct kvd_paged_side op_side_of(void **bases, void *memory, uint32_t dim, bool columns)
{
    const uint64_t row = dim * 2ull;
    for (int l = 0; l < OP_LAYERS; l++)
        bases[l] = (uint8_t *)memory + l * op_side(dim) * 2;
    return (struct kvd_paged_side){.layers = bases,
                                   .bytes = op_side(dim) * 2,
                                   .strides = {OP_HEADS * OP_TOKENS * row, OP_TOKENS * row,
                                               columns ? 2 : row, columns ? OP_TOKENS * 2 : 2},
                                   .dim = dim};
}

static bool paged_op(bool columns, bool out, uint64_t *seed)
{
    static const uint32_t dims[2] = {64, 128}, blocks[OP_BLOCKS] = {3, 0, 6, 1, 5, 2, 4};
    struct kvd_paged_kv kv[2] = {{.layers = OP_LAYERS, // on the GPU; in host memory
                                  .heads = OP_HEADS,
                                  .all_blocks = OP_BLOCKS,
                                  .block_tokens = OP_TOKENS,
                                  .blocks = blocks,
                                  .n_blocks = OP_BLOCKS,
                                  .first_token = 17}};
    const uint64_t dense_row = 2ull * OP_HEADS * (64 + 128), tokens = 2 * KVD_PAGE_TOKENS;
    const uint64_t dense_bytes = 2 * tokens * dense_row; // two layers of two pages
    struct kvd_paged_copy copy[2] = {{.layer = 1, .layers = 2, .page = 1, .pages = 2, .out = out}};
    void *bases[2][2][OP_LAYERS], *on_gpu[2];
    uint16_t *host[2], *dense = malloc(dense_bytes), *got = malloc(OP_LAYERS * op_side(128) * 2);
    struct kvd_error err = {0};
    struct kvd_dense room = {0};
    bool good = cuda->ops->dense(cuda, dense_bytes, dense_bytes, &room, &err) == KVD_OK;
    kv[1] = kv[0];
    copy[0].dense_tokens = (uint32_t)tokens;
    copy[1] = copy[0];
    for (uint64_t i = 0; i < dense_bytes / 2; i++)
        dense[i] = (uint16_t)kvd_rand(seed);
    for (int v = 0; v < 2; v++) {
        const uint64_t n = OP_LAYERS * op_side(dims[v]);
        host[v] = malloc(n * 2);
        for (uint64_t i = 0; i < n; i++)
            host[v][i] = (uint16_t)kvd_rand(seed);
        on_gpu[v] = to_gpu(host[v], n * 2);
        kv[0].side[v] = op_side_of(bases[0][v], on_gpu[v], dims[v], columns && !v);
        kv[1].side[v] = op_side_of(bases[1][v], host[v], dims[v], columns && !v);
        const uint64_t at = v ? 2 * tokens * OP_HEADS * 64 * 2 : 0;
        copy[0].dense[v] = room.data + at;
        copy[1].dense[v] = (uint8_t *)dense + at;
    }
    if (good) {
        upload(room.data, dense, dense_bytes);
        good = kvd_paged_check(&kv[0], OP_PAGES, out, &err) == KVD_OK &&
               cuda->ops->paged(cuda, &kv[0], &copy[0], &err) == KVD_OK;
        kvd_paged_copy(&kv[1], &copy[1]);
    }
    for (int v = 0; v < 2 && good; v++) {
        const uint64_t bytes = OP_LAYERS * op_side(dims[v]) * 2;
        cudaMemcpy(got, on_gpu[v], bytes, cudaMemcpyDeviceToHost);
        good = memcmp(got, host[v], bytes) == 0;
    }
    if (good) {
        cudaMemcpy(got, room.data, dense_bytes, cudaMemcpyDeviceToHost);
        good = memcmp(got, dense, dense_bytes) == 0;
    }
    for (int v = 0; v < 2; v++) {
        cudaFree(on_gpu[v]);
        free(host[v]);
    }
    free(dense);
    free(got);
    return good;
}

static void paged(uint64_t seed)
{
    const struct paged_case cases[] = {
        {2, 2, 64, 64, 0, 128, 4, false, 0},     {3, 1, 128, 16, 0, 64, 9, false, 0},
        {1, 3, 80, 16, 5, 64, 7, false, 0},      {2, 2, 96, 128, 64, 64, 2, false, 0},
        {2, 1, 64, 64, 0, 64, 2, false, 2},      {2, 2, 64, 64, 0, 128, 4, true, 0},
        {1, 2, 80, 16, 3, 64, 8, true, 2},       {2, 1, 192, 48, 0, 192, 6, true, 0},
        {1, 8, 128, 1024, 960, 64, 2, false, 8},
    };
    for (size_t i = 0; i < KVD_LEN(cases); i++)
        for (int out = 0; out < 2; out++)
            result(paged_case(&cases[i], out, &seed),
                   out ? "into an engine's blocks" : "out of an engine's blocks");
    for (int i = 0; i < 4; i++)
        result(paged_op(i & 1, i >> 1, &seed), "registered blocks, some layers and pages");
}

#endif
