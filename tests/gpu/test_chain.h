// Part of test_cuda.c: kernels behind each other in a graph.
#ifndef KVD_TESTS_GPU_TEST_CHAIN_H
#define KVD_TESTS_GPU_TEST_CHAIN_H

// Layers of a step, in a graph: each one's queries are the outputs of the one in front, which still
// runs when tiles are asked for. Sequences share the pages of one.
enum { CHAIN = 6 };

// Of the head_dims that there are for this test, the most used.
static uint32_t chain_dim(void)
{
    return kvd_head_dims_ok(128, 128) ? 128 : 64;
}

struct chain {
    struct kseq s;
    struct kvd_rotation *rot;
    struct kvd_cuda_attend_params p;
    uint32_t *lengths, *device_lengths; // [2][sequences]: length, hist_end
    uint64_t *tables;                   // of codec and of bf16 pages
    uint64_t rows, bytes;               // of q and o
    float *q;
    uint8_t *o[CHAIN + 1]; // the first is q
    cudaStream_t stream;
};

static void chain_tables(struct chain *c, uint32_t n)
{
    const struct kseq *s = &c->s;
    uint64_t bytes = n * (s->n_codec + s->n_bf16) * sizeof(uint64_t);
    uint64_t *tables = malloc(bytes), *bf16 = tables + (uint64_t)n * s->n_codec;
    c->lengths = malloc(2 * n * sizeof(*c->lengths));
    for (uint32_t i = 0; i < n; i++) {
        memcpy(tables + (uint64_t)i * s->n_codec, s->at_codec, s->n_codec * sizeof(*tables));
        memcpy(bf16 + (uint64_t)i * s->n_bf16, s->at_bf16, s->n_bf16 * sizeof(*tables));
        c->lengths[i] = (uint32_t)s->length;
        c->lengths[n + i] = (uint32_t)s->hist_end;
    }
    c->tables = copy_of(tables, bytes);
    c->device_lengths = copy_of(c->lengths, 2 * n * sizeof(*c->lengths));
    free(tables);
}

static void chain_init(struct chain *c, uint32_t n, uint32_t length, struct kvd_codecs codec,
                       uint64_t seed)
{
    struct kvd_plane g = test_plane_of(1, 8, 4, chain_dim(), chain_dim(), codec, 64, 64);
    struct kseq *s = &c->s;
    kseq_init(s, g, length + 64, 1, 0.96f, 0.92f, seed);
    kseq_fill(s);
    to_device(s);
    c->rot = grow(s, cuda, length, seed);
    chain_tables(c, n);
    c->p = (struct kvd_cuda_attend_params){.sequences = n,
                                           .q_heads = g.q_heads,
                                           .kv_heads = g.kv_heads,
                                           .dim_k = g.head_dim_k,
                                           .dim_v = g.head_dim_v,
                                           .codec = codec.k,
                                           .codec_v = codec.v,
                                           .q_len = 1,
                                           .sink = g.sink,
                                           .ring = kvd_plane_ring(&g),
                                           .scale = 0.5f,
                                           .q_type = KVD_DTYPE_F32,
                                           .o_type = KVD_DTYPE_F32,
                                           .pages = {.codec = c->tables,
                                                     .bf16 = c->tables + (uint64_t)n * s->n_codec,
                                                     .codec_stride = s->n_codec,
                                                     .bf16_stride = s->n_bf16,
                                                     .length = c->device_lengths,
                                                     .hist_end = c->device_lengths + n},
                                           .rotation = c->rot->device};
    uint32_t history = (uint32_t)s->hist_end - g.sink;
    kvd_cuda_attend_plan(&c->p, (uint64_t)n * history, history, length - history,
                         ((struct kvd_cuda *)cuda)->multiprocessors);
    c->p.scratch = copy_of(NULL, kvd_cuda_attend_scratch(&c->p));
    device_fill(c->p.scratch, 0, kvd_cuda_attend_scratch(&c->p));
    c->rows = (uint64_t)n * g.q_heads * g.head_dim_k;
    c->bytes = c->rows * sizeof(float);
    c->q = malloc(c->bytes);
    for (uint64_t i = 0; i < c->rows; i++)
        c->q[i] = (float)kseq_normal(&s->rng);
    for (int i = 0; i <= CHAIN; i++)
        c->o[i] = copy_of(i ? NULL : c->q, c->bytes);
    need(cudaStreamCreate(&c->stream), "stream");
}

static void chain_deinit(struct chain *c)
{
    cudaStreamDestroy(c->stream);
    for (int i = 0; i <= CHAIN; i++)
        cudaFree(c->o[i]);
    cudaFree(c->p.scratch);
    cudaFree(c->tables);
    cudaFree(c->device_lengths);
    cuda->ops->rotation_free(cuda, &c->rot);
    deinit(&c->s);
    free(c->q);
    free(c->lengths);
}

// One after the other if not `settled`.
static void attend_chain(struct chain *c, bool settled)
{
    c->p.settled = settled;
    for (int i = 0; i < CHAIN; i++) {
        c->p.q = c->o[i];
        c->p.o = c->o[i + 1];
        need(kvd_cuda_attend(&c->p, c->stream), "attention");
        if (!settled)
            need(cudaStreamSynchronize(c->stream), "attention");
    }
}

static cudaGraphExec_t chain_graph(struct chain *c)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    need(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "capture");
    attend_chain(c, true);
    need(cudaStreamEndCapture(c->stream, &graph), "capture");
    need(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaGraphDestroy(graph);
    return exec;
}

static void chain(uint32_t n, uint32_t length, struct kvd_codecs codec, uint64_t seed)
{
    struct chain c;
    chain_init(&c, n, length, codec, seed);
    cudaGraphExec_t graph = chain_graph(&c);
    float *want = malloc(c.bytes), *got = malloc(c.bytes);
    bool ok = true;
    for (int round = 0; round < 4; round++) {
        attend_chain(&c, false);
        need(cudaMemcpy(want, c.o[CHAIN], c.bytes, cudaMemcpyDeviceToHost), "fetch");
        for (int i = 1; i <= CHAIN; i++) // what is read too early is not a number
            device_fill(c.o[i], 0xff, c.bytes);
        need(cudaGraphLaunch(graph, c.stream), "replay");
        need(cudaStreamSynchronize(c.stream), "replay");
        need(cudaMemcpy(got, c.o[CHAIN], c.bytes, cudaMemcpyDeviceToHost), "fetch");
        ok &= memcmp(want, got, c.bytes) == 0;
        for (uint64_t i = 0; i < c.rows; i++)
            ok &= isfinite(want[i]) != 0;
        for (uint32_t i = 0; i < 2 * n; i++) // the graph stays good when lengths change
            c.lengths[i] -= 16 * (1 + i % n % 3);
        upload(c.device_lengths, c.lengths, 2 * n * sizeof(*c.lengths));
    }
    char name[100], text[KVD_CODECS_TEXT];
    snprintf(name, sizeof(name), "a chain of layers in a graph: %s, %u sequences of %u",
             kvd_codecs_name(codec, text), n, length);
    result(ok, name);
    cudaGraphExecDestroy(graph);
    chain_deinit(&c);
    free(want);
    free(got);
}

#endif
