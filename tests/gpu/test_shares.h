// Part of test_cuda.c: histories that are cut together.
#ifndef KVD_TESTS_GPU_TEST_SHARES_H
#define KVD_TESTS_GPU_TEST_SHARES_H

// Some histories are empty, some have a page, a few tokens or all. Nothing lies behind them: a
// window's tokens that were overwritten would not be those of a shorter sequence.
static void shares_lengths(struct chain *c, uint32_t n)
{
    uint32_t most = c->lengths[n] - c->p.sink, sink = c->p.sink;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t some = (uint32_t)(kvd_rand(&c->s.rng) % (most / 16)) * 16;
        uint32_t history = i % 5 == 1 ? some : i % 7 == 3 ? 0 : i % 7 == 5 ? 64 : most - i % 3 * 16;
        c->lengths[i] = c->lengths[n + i] = sink + history;
    }
    upload(c->device_lengths, c->lengths, 2 * n * sizeof(*c->lengths));
}

// Attention by `shares`, or by parts; what no block writes is not a number.
static void attend_shares(struct chain *c, uint32_t shares, uint32_t windows, float *o)
{
    uint32_t n = c->p.sequences;
    c->p.warps = 8;
    c->p.shares = shares;
    c->p.splits = shares ? (shares - 1) / n + 2 : 1;
    c->p.window_splits = windows;
    cudaFree(c->p.scratch);
    c->p.scratch = copy_of(NULL, kvd_cuda_attend_scratch(&c->p));
    device_fill(c->p.scratch, 0xff, kvd_cuda_attend_scratch(&c->p));
    device_fill(c->p.scratch, 0, c->p.scratch_zeroed);
    c->p.q = c->o[0];
    c->p.o = c->o[1];
    for (int twice = 0; twice < 2; twice++) { // counters are zero again
        device_fill(c->o[1], 0xff, c->bytes);
        need(kvd_cuda_attend(&c->p, c->stream), "attention");
        need(cudaStreamSynchronize(c->stream), "attention");
    }
    need(cudaMemcpy(o, c->o[1], c->bytes, cudaMemcpyDeviceToHost), "fetch");
}

static void shares_of(uint32_t n, uint32_t length, struct kvd_codecs codec, uint64_t seed)
{
    if (!kvd_cuda_attend_tuned(codec, chain_dim(), chain_dim()))
        return; // its kernels were not compiled
    struct chain c;
    chain_init(&c, n, length, codec, seed);
    shares_lengths(&c, n);
    c.p.part_tiles = (length + 63) / 64;
    float *want = malloc(c.bytes), *got = malloc(c.bytes);
    attend_shares(&c, 0, 1, want);
    uint32_t some[] = {n, n + 1, 2 * n - 1, 2 * n, 3 * n + n / 2, 5 * n + 1, 33};
    double worst = 0;
    for (size_t k = 0; k < KVD_LEN(some); k++) {
        if (some[k] < n)
            continue;
        attend_shares(&c, some[k], 1 + k % 3, got);
        uint32_t dim = c.p.dim_v;
        for (uint64_t row = 0; row < c.rows / dim; row++) {
            double off = 0, size = 0;
            for (uint32_t d = 0; d < dim; d++) {
                double x = got[row * dim + d], y = want[row * dim + d];
                off += (x - y) * (x - y);
                size += y * y;
            }
            double e = sqrt(off / size);
            if (!(e <= worst) && !isnan(worst))
                worst = e; // which may be not a number
        }
    }
    char name[120], text[KVD_CODECS_TEXT];
    snprintf(name, sizeof(name), "histories cut together: %s, %u sequences of %u: %.1e of a row",
             kvd_codecs_name(codec, text), n, length, worst);
    result(worst < 1e-3, name);
    chain_deinit(&c);
    free(want);
    free(got);
}

static void shares(uint64_t seed, struct kvd_codecs codec, uint32_t scale)
{
    shares_of(1, 700 * scale, codec, seed);
    shares_of(3, 900 * scale, codec, seed);
    shares_of(6, 500 * scale, codec, seed);
    shares_of(17, 400 * scale, codec, seed);
}

static void all_shares(uint64_t seed, uint32_t scale)
{
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        if (codec == KVD_CODEC_INT2 || codec == KVD_CODEC_INT2C || kvd_codec_tc(codec))
            shares(seed + codec, both(codec), scale);
}

#endif
