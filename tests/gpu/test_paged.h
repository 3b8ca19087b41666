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
}

#endif
