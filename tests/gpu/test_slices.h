// Appends in slices on a GPU: given up before a window is overwritten they leave no trace, and done
// to the end the same bytes as in one go. Part of test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_SLICES_H
#define KVD_TESTS_GPU_TEST_SLICES_H

static bool always_over(const struct kvd_slice *s)
{
    (void)s;
    return true;
}

// A part of an append in as many slices as there can be, or the first `most`; -1: it failed.
static int slices_of(struct kvd_append_params *p, enum kvd_append_part part, int most)
{
    struct kvd_slice slice = {.over = always_over, .more = true};
    int n = 0;
    p->part = part;
    p->slice = &slice;
    for (; slice.more && n < most; n++)
        if (cuda->ops->append(cuda, p, NULL))
            return -1;
    return n;
}

static bool same_pages_of(struct kseq *a, struct kseq *b)
{
    bool same = true;
    fetch_pages(a);
    fetch_pages(b);
    for (uint32_t i = 0; i < a->n_bf16; i++)
        same &= memcmp((void *)(uintptr_t)a->bf16[i], (void *)(uintptr_t)b->bf16[i],
                       kvd_page_bytes(&a->g, kvd_window_codec())) == 0;
    for (uint32_t i = 0; i < a->n_codec; i++)
        same &= memcmp((void *)(uintptr_t)a->codec[i], (void *)(uintptr_t)b->codec[i],
                       kvd_page_bytes(&a->g, a->g.codec)) == 0;
    return same;
}

// What is stored, read on the CPU.
static uint8_t *contents(struct kseq *s, const struct kvd_rotation *rot, uint64_t *bytes)
{
    const struct kvd_plane *g = &s->g;
    uint64_t rows = g->n_layers * s->length * g->kv_heads * 4;
    uint8_t *x = malloc(rows * (g->head_dim_k + g->head_dim_v) + 1);
    struct kvd_read_params p = {
        .plane = g,
        .rotation = rot,
        .layer_count = g->n_layers,
        .pages = {s->bf16, s->codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .tokens = (uint32_t)s->length,
        .k = kseq_tensor(x, KVD_DTYPE_F32, s->length, g->kv_heads, g->head_dim_k, 0),
        .v = kseq_tensor(x + rows * g->head_dim_k, KVD_DTYPE_F32, s->length, g->kv_heads,
                         g->head_dim_v, 0)};
    fetch_pages(s);
    if (s->length && cpu->ops->read(cpu, &p, NULL))
        result(false, "reading what was stored");
    *bytes = rows * (g->head_dim_k + g->head_dim_v);
    return x;
}

// Begins the append of n tokens and gives it up, and then does it, in slices.
static int append_sliced(struct kseq *s, const struct kvd_rotation *cuda_rot,
                         const struct kvd_rotation *cpu_rot, uint16_t *const kv[2], uint32_t n)
{
    const struct kvd_plane *g = &s->g;
    struct kvd_append_item item = {
        .pages = {s->at_bf16, s->at_codec},
        .length = s->length,
        .hist_end = s->hist_end,
        .new_length = s->length + n,
        .new_hist_end = kseq_hist_end(g, s->hist_end, s->length + n),
        .k = kseq_tensor(kv[0], KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_k, s->length),
        .v = kseq_tensor(kv[1], KVD_DTYPE_BF16, s->capacity, g->kv_heads, g->head_dim_v, s->length),
    };
    item.k.on_device = kv[0] != s->k;
    item.v.on_device = kv[1] != s->v;
    struct kvd_append_params p = {
        .plane = g, .rotation = cuda_rot, .layer_count = g->n_layers, .items = &item, .n_items = 1};
    uint64_t bytes, after;
    uint8_t *before = contents(s, cpu_rot, &bytes);
    slices_of(&p, KVD_APPEND_DEMOTE, 1 + (int)n % 4);
    uint8_t *now = contents(s, cpu_rot, &after);
    result(bytes == after && memcmp(before, now, bytes) == 0, "an append that is given up");
    free(before);
    free(now);
    int slices = slices_of(&p, KVD_APPEND_DEMOTE, 10000);
    result(slices > 0 && slices_of(&p, KVD_APPEND_STORE, 10000) > 0, "an append in slices");
    s->length = item.new_length;
    s->hist_end = item.new_hist_end;
    return slices;
}

static void sliced(uint32_t heads, uint32_t dim, uint32_t codec, bool on_device, int least,
                   uint64_t seed)
{
    enum { TOKENS = 1400 };
    struct kvd_plane g = test_plane(2, heads, 1, dim, dim, codec, 48, 64);
    struct kseq s[2];
    struct kvd_rotation *rot[3];
    uint16_t *kv[2];
    int most = 0;
    for (int i = 0; i < 2; i++) {
        kseq_init(&s[i], g, TOKENS, 1, 0.96f, 0.92f, seed);
        kseq_fill(&s[i]);
        to_device(&s[i]);
        rot[i] = cuda->ops->rotation_new(cuda, &s[i].rot, NULL);
    }
    rot[2] = cpu->ops->rotation_new(cpu, &s[1].rot, NULL);
    uint64_t values = (uint64_t)g.n_layers * TOKENS * heads * dim * 2;
    kv[0] = on_device ? to_gpu(s[1].k, values) : s[1].k;
    kv[1] = on_device ? to_gpu(s[1].v, values) : s[1].v;
    for (uint32_t i = 0; s[0].length < TOKENS; i++) {
        uint32_t n = i == 1 ? 900 : 1 + (uint32_t)(kvd_rand(&seed) % 150);
        n = (uint32_t)KVD_MIN((uint64_t)n, TOKENS - s[0].length);
        int took = append_sliced(&s[1], rot[1], rot[2], kv, n);
        most = KVD_MAX(most, took);
        kseq_append(&s[0], cuda, rot[0], n);
        if (i % 4 == 3) // the history's end, into a chunk
            for (int k = 0; k < 2; k++)
                kseq_truncate(&s[k], s[k].length - 101);
    }
    char name[120];
    snprintf(name, sizeof(name), "appends in up to %d slices, %u heads of %u, codec %u%s", most,
             heads, dim, codec, on_device ? ", in place" : "");
    result(same_pages_of(&s[0], &s[1]) && most >= least, name);
    for (int i = 0; on_device && i < 2; i++)
        cudaFree(kv[i]);
    for (int i = 0; i < 2; i++) {
        cuda->ops->rotation_free(cuda, &rot[i]);
        deinit(&s[i]);
    }
    cpu->ops->rotation_free(cpu, &rot[2]);
}

// Of one layer's tokens in several slices, and of several layers in each.
static void slices(uint64_t seed)
{
    struct kvd_cuda *c = (struct kvd_cuda *)cuda;
    const uint64_t usual = c->piece_ns;
    c->piece_ns = 8000; // some 150 tokens of two heads
    sliced(2, 64, KVD_CODEC_INT2, false, 5, seed);
    c->piece_ns = usual;
    sliced(2, 64, KVD_CODEC_INT2_LM, true, 1, seed);
    sliced(2, 64, KVD_CODEC_BF16, false, 1, seed);
}

#endif
