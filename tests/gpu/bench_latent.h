// Part of bench_cuda.cu: attention over latents (MLA), against the larger of two limits: reading
// what must be read, and the products at what tensor cores are known to reach.
#ifndef KVD_TESTS_GPU_BENCH_LATENT_H
#define KVD_TESTS_GPU_BENCH_LATENT_H

struct latent_row {
    const char *name;
    uint32_t sequences, history, heads, sink, recent, q_len, codec;
};

static void bench_latent(const latent_row &w)
{
    if (!wanted(w.name))
        return;
    const uint32_t rope = 64, latent = 512, pages = w.history / 64;
    const double peak_tflops = 800; // of an H100's dense fp16 and bf16
    const uint64_t page = kvd_tile_bytes({KVD_CODEC_BF16, w.codec}, rope, latent),
                   bytes = w.sequences * pages * page;
    const int copies =
        (int)std::min<uint64_t>(8, std::min(pool_bytes / bytes, 400000000 / bytes + 1));
    const uint32_t ring = (w.recent + 64 + 63) / 64 * 64, stride = (w.sink + 63) / 64 + ring / 64,
                   window = w.sink + w.recent;
    const uint64_t bf16_page = 64 * 2 * (rope + latent),
                   rows = (uint64_t)w.sequences * w.q_len * w.heads;
    uint8_t *bf16 = device<uint8_t>(w.sequences * stride * bf16_page);
    CUDA(cudaMemset(bf16, 0x3c, w.sequences * stride * bf16_page));
    std::vector<uint64_t> bf16_table(w.sequences * stride);
    for (uint64_t i = 0; i < bf16_table.size(); i++)
        bf16_table[i] = (uint64_t)bf16 + i * bf16_page;
    uint16_t *q = device<uint16_t>(rows * (rope + latent));
    fill_normal<<<1024, 256>>>((uint32_t *)q, rows * (rope + latent) / 2, 5);
    kvd_cuda_attend_params p = {};
    p.sequences = w.sequences;
    p.q_heads = w.heads;
    p.kv_heads = 1;
    p.dim_k = rope;
    p.dim_v = latent;
    p.codec = KVD_CODEC_BF16;
    p.codec_v = w.codec;
    p.q_len = w.q_len;
    p.sink = w.sink;
    p.ring = ring;
    p.scale = 0.07f;
    p.q = q;
    p.o = device<uint16_t>(rows * latent);
    p.pages.bf16 = to_device(bf16_table);
    p.pages.codec_stride = pages;
    p.pages.bf16_stride = stride;
    p.pages.length = to_device(std::vector<uint32_t>(w.sequences, w.history + window));
    p.pages.hist_end = to_device(std::vector<uint32_t>(w.sequences, w.history + w.sink));
    p.rotation = rotation(latent);
    p.settled = true;
    kvd_cuda_attend_plan(&p, (uint64_t)w.sequences * w.history, w.history, window, sms);
    p.scratch = device<uint8_t>(kvd_cuda_attend_scratch(&p));
    std::vector<kvd_cuda_attend_params> ps;
    for (int i = 0; i < copies; i++) {
        std::vector<uint64_t> table((uint64_t)w.sequences * pages);
        for (uint64_t k = 0; k < table.size(); k++)
            table[k] = (uint64_t)pool + i * bytes + k * page;
        p.pages.codec = to_device(table);
        ps.push_back(p);
    }
    const double ms = graph_median(
        [&](cudaStream_t s, int i) { CUDA(kvd_cuda_attend(&ps[i % copies], s)); }, copies);
    const double mb = (bytes + (double)w.sequences * window * 2 * (rope + latent)) / 1e6;
    const double gflop = 2.0 * rows * (w.history + window) * (rope + 2 * latent) / 1e9;
    const double reading = mb / read_tbs / 1e3, products = gflop / peak_tflops,
                 limit = std::max(reading, products);
    printf("%-44s %7.1f MB %8.1f GFLOP %9.4f ms  reading %8.4f  products %8.4f  %5.1f %% of the "
           "larger  %6.1f TFLOP/s  parts %u + %u\n",
           w.name, mb, gflop, ms, reading, products, 100 * limit / ms, gflop / ms, p.splits,
           p.window_splits);
    free_all();
}

// Tokens of prompts, and a read of all that is there.
static void bench_latent_pages(uint32_t codec)
{
    char name[80];
    snprintf(name, sizeof(name), "latents: %s", kvd_codec_name(codec));
    const uint32_t rope = 64, latent = 512, tokens = 32768, layers = 4, pages = tokens / 64 + 1;
    const uint64_t page = layers * kvd_tile_bytes({KVD_CODEC_BF16, codec}, rope, latent);
    if (!wanted(name))
        return;
    std::vector<uint64_t> table(pages);
    for (uint64_t k = 0; k < pages; k++)
        table[k] = (uint64_t)pool + k * page;
    kvd_cuda_append_item item = {};
    item.codec = to_device(table);
    item.bf16 = to_device(
        std::vector<uint64_t>(2, (uint64_t)device<uint8_t>(layers * 64 * 2 * (rope + latent))));
    item.new_length = item.new_hist_end = tokens;
    uint16_t *k = device<uint16_t>((uint64_t)layers * tokens * rope),
             *v = device<uint16_t>((uint64_t)layers * tokens * latent);
    fill_normal<<<1024, 256>>>((uint32_t *)k, (uint64_t)layers * tokens * rope / 2, 1);
    fill_normal<<<1024, 256>>>((uint32_t *)v, (uint64_t)layers * tokens * latent / 2, 2);
    item.k = kvd_cuda_tensor{(uint8_t *)k, (uint64_t)tokens * rope * 2, rope * 2, rope * 2,
                             KVD_DTYPE_BF16};
    item.v = kvd_cuda_tensor{(uint8_t *)v, (uint64_t)tokens * latent * 2, latent * 2, latent * 2,
                             KVD_DTYPE_BF16};
    kvd_cuda_append_params p = {};
    p.kv_heads = 1;
    p.dim_k = rope;
    p.dim_v = latent;
    p.codec = KVD_CODEC_BF16;
    p.codec_v = codec;
    p.ring = 64;
    p.layer_count = layers;
    p.rotation = rotation(latent);
    p.n_items = 1;
    p.items = to_device(std::vector<kvd_cuda_append_item>(1, item));
    p.chunks = tokens / 16;
    p.tokens = tokens;
    p.whole_chunks = true;
    const double stored =
        graph_median([&](cudaStream_t s, int) { CUDA(kvd_cuda_append(&p, s)); }, 1);
    kvd_cuda_read_params r = {};
    r.kv_heads = 1;
    r.dim_k = rope;
    r.dim_v = latent;
    r.codec = KVD_CODEC_BF16;
    r.codec_v = codec;
    r.ring = 64;
    r.layer_count = layers;
    r.rotation = p.rotation;
    r.codec_pages = item.codec;
    r.bf16_pages = item.bf16;
    r.hist_end = r.tokens = tokens;
    r.k = item.k;
    r.v = item.v;
    const double read = graph_median([&](cudaStream_t s, int) { CUDA(kvd_cuda_read(&r, s)); }, 1);
    const double mb =
        (double)layers * (tokens * 2.0 * (rope + latent) + tokens / 64.0 * page / layers) / 1e6;
    const double limit = mb / copy_tbs / 1e3;
    snprintf(name, sizeof(name), "latents: %s, append of 4 x 32,768", kvd_codec_name(codec));
    report(name, mb, stored, limit, "");
    snprintf(name, sizeof(name), "latents: %s, read of 4 x 32,768", kvd_codec_name(codec));
    report(name, mb, read, limit, "");
    free_all();
}

static void bench_latents()
{
    const latent_row rows[] = {
        {"latents: int2: 32 x 32,768, 128 heads", 32, 32768, 128, 0, 0, 1, KVD_CODEC_INT2},
        {"latents: int4: 32 x 32,768, 128 heads", 32, 32768, 128, 0, 0, 1, KVD_CODEC_INT4},
        {"latents: bf16: 32 x 32,768, 128 heads", 32, 32768, 128, 0, 0, 1, KVD_CODEC_BF16},
        {"latents: int2: 1 x 32,768, 128 heads", 1, 32768, 128, 0, 0, 1, KVD_CODEC_INT2},
        {"latents: int4: 1 x 32,768, 128 heads", 1, 32768, 128, 0, 0, 1, KVD_CODEC_INT4},
        {"latents: bf16: 1 x 32,768, 128 heads", 1, 32768, 128, 0, 0, 1, KVD_CODEC_BF16},
        {"latents: int2: 32 x 32,768, 128 heads, sink 64 recent 256", 32, 32768, 128, 64, 256, 1,
         KVD_CODEC_INT2},
        {"latents: int2: 1 x 32,768, 128 heads, sink 64 recent 256", 1, 32768, 128, 64, 256, 1,
         KVD_CODEC_INT2},
        {"latents: int2: 32 x 32,768, 16 heads", 32, 32768, 16, 0, 0, 1, KVD_CODEC_INT2},
        {"latents: int2: 32 x 32,768, 128 heads, q_len 2", 32, 32768, 128, 0, 0, 2, KVD_CODEC_INT2},
        {"latents: turboquant-3: 32 x 32,768, 128 heads", 32, 32768, 128, 0, 0, 1,
         KVD_CODEC_TURBOQUANT_3},
    };
    for (const latent_row &r : rows)
        bench_latent(r);
    for (uint32_t codec : {KVD_CODEC_INT2, KVD_CODEC_INT4, KVD_CODEC_TURBOQUANT_3})
        bench_latent_pages(codec);
}

#endif
