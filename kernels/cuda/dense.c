// Dense tensors that pages of an engine's blocks go through, and copies between both.
#include "kernels/cuda/slices.h"

int kvd_cuda_op_dense(struct kvd_backend *b, uint64_t least, uint64_t wanted, struct kvd_dense *out,
                      struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    int rc = 0;
    cudaSetDevice(c->index);
    if (c->dense_scarce && c->dense_size >= least)
        wanted = KVD_MIN(wanted, c->dense_size);
    while (c->dense_size < wanted) {
        void *data = NULL;
        cudaFree(KVD_TAKE(c->dense)); // nothing is on the stream that uses it
        c->dense_size = 0;
        rc = cudaMalloc(&data, wanted);
        c->dense = data;
        if (rc == 0)
            c->dense_size = wanted;
        if (rc != cudaErrorMemoryAllocation || wanted == least)
            break;
        cudaGetLastError();
        c->dense_scarce = true;
        wanted = KVD_MAX(wanted / 2, least);
    }
    *out = (struct kvd_dense){c->dense, c->dense_size, true};
    return kvd_cuda_status(rc, "memory to gather pages in", err);
}

// Tables of a copy of one side, in the stage: where layers begin, then the blocks.
static uint64_t stage_tables(struct kvd_cuda *c, const struct kvd_paged_kv *p,
                             const struct kvd_paged_copy *copy, bool v, const uint32_t *blocks,
                             uint64_t used)
{
    const uint64_t bases = copy->layers * sizeof(void *);
    const uint64_t at = kvd_stage_take(c, bases + used * sizeof(*blocks));
    memcpy(c->stage.host + at, p->side[v].layers + copy->layer, bases);
    memcpy(c->stage.host + at + bases, blocks, used * sizeof(*blocks));
    return at;
}

int kvd_cuda_op_paged(struct kvd_backend *b, const struct kvd_paged_kv *p,
                      const struct kvd_paged_copy *copy, struct kvd_error *err)
{
    struct kvd_cuda *c = cuda_of(b);
    const uint64_t first = p->first_token + (uint64_t)copy->page * KVD_PAGE_TOKENS;
    const uint32_t *blocks = p->blocks + first / p->block_tokens;
    struct kvd_cuda_paged_params params = {.block_tokens = p->block_tokens,
                                           .first_token = (uint32_t)(first % p->block_tokens),
                                           .n_layers = copy->layers,
                                           .tokens = copy->pages * KVD_PAGE_TOKENS,
                                           .heads = p->heads,
                                           .out = copy->out};
    const uint64_t used = kvd_div_up((uint64_t)params.first_token + params.tokens, p->block_tokens);
    const uint64_t tables = copy->layers * sizeof(void *) + used * sizeof(*blocks);
    uint64_t at[2];
    int rc = kvd_stage_begin(c, 2 * kvd_stage_bytes(tables), err);
    for (int v = 0; v < 2 && rc == KVD_OK; v++)
        at[v] = stage_tables(c, p, copy, v, blocks, used);
    if (rc == KVD_OK)
        rc = kvd_stage_upload(c, 0, c->stage.used, err);
    for (int v = 0; v < 2 && rc == KVD_OK; v++) {
        const struct kvd_paged_side *side = &p->side[v];
        uint8_t *table = c->stage.device + at[v];
        params.aligned = 0;
        for (uint32_t i = 0; i < copy->layers; i++)
            params.aligned |= (uintptr_t)side->layers[copy->layer + i];
        params.layers = (void *)table;
        params.blocks = (void *)(table + copy->layers * sizeof(void *));
        params.block_stride = side->strides.block;
        params.head_stride = side->strides.head;
        params.token_stride = side->strides.token;
        params.dim_stride = side->strides.dim;
        params.dim = side->dim;
        params.dense = copy->dense[v];
        params.dense_layer_stride = (uint64_t)copy->dense_tokens * p->heads * side->dim * 2;
        rc = kvd_cuda_status(kvd_cuda_paged(&params, c->stream), "a copy of pages", err);
    }
    return rc ? rc : kvd_stage_wait(c, err); // the tables' memory is used again
}
