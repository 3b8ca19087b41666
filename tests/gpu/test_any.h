// Part of test_cuda.c: pairs of codecs, most of which have no attention kernels of their own, and
// pages of int4.
#ifndef KVD_TESTS_GPU_TEST_ANY_H
#define KVD_TESTS_GPU_TEST_ANY_H

// The i-th of all of them; those that follow each other have little in common.
static struct kvd_codecs any_codecs(uint64_t i)
{
    enum { ALL = KVD_CODEC_COUNT * KVD_CODEC_COUNT };
    for (;; i++) {
        uint32_t at = (uint32_t)(i % ALL * 37 % ALL);
        struct kvd_codecs c = {at / KVD_CODEC_COUNT, at % KVD_CODEC_COUNT};
        if (c.k != c.v)
            return c;
    }
}

static void any_pages(uint64_t seed, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t *dims = head_dims[(seed + i) % KVD_LEN(head_dims)];
        struct kvd_codecs c = i % 3 ? any_codecs(seed + i) : both(KVD_CODEC_INT4);
        same_pages(i % KVD_SCALE_COUNT, dims[0], dims[1], i % 3, c, i % 4 ? 0.96f : 1, i % 7 == 6,
                   0, seed + i);
        reading(dims[0], dims[1], i % 3, c, i & 1 ? KVD_DTYPE_F32 : KVD_DTYPE_BF16, 0, seed + i);
    }
}

// Relative error. Pairs of int4 and int2 have kernels of their own, which round queries as int2's
// do.
static double limit_of(struct kvd_codecs c)
{
    bool own = (c.k == KVD_CODEC_INT4 && c.v == KVD_CODEC_INT2) ||
               (c.k == KVD_CODEC_INT2 && c.v == KVD_CODEC_INT4);
    return own ? 2e-3 : 1e-3;
}

// At every shape some codecs, or many, and those pairs that have kernels of their own.
static void any_shapes(uint64_t seed, uint32_t longest, uint32_t each)
{
    worst_error = worst_row = worst_lse = 0;
    for (uint32_t j = 0; j < KVD_LEN(attention_shapes); j++) {
        const struct shape *c = &attention_shapes[j];
        if (c->length > longest || !kvd_head_dims_ok(c->dk, c->dv))
            continue;
        for (uint32_t i = 0; i < each; i++) {
            struct kvd_codecs codecs = any_codecs(seed + j * each + i);
            check_shape(c, codecs, limit_of(codecs), seed + j);
        }
        struct kvd_codecs own = {KVD_CODEC_INT4, KVD_CODEC_INT2};
        if (j % 2)
            own = (struct kvd_codecs){own.v, own.k};
        if (c->dk == c->dv && (c->dk == 64 || c->dk == 128))
            check_shape(c, own, limit_of(own), seed + j);
    }
    printf("any codecs: worst relative L2 %.2e (of a row %.2e), worst log-sum-exp %.2e\n",
           worst_error, worst_row, worst_lse);
}

// Transforms are for tc2 and tc2.5; beside them a side in bf16 is as it was.
static void any_transforms(uint64_t seed)
{
    const struct kvd_codecs c[] = {{KVD_CODEC_TC2, KVD_CODEC_BF16},
                                   {KVD_CODEC_BF16, KVD_CODEC_TC2_5},
                                   {KVD_CODEC_TC2_5, KVD_CODEC_TC2}};
    for (uint32_t i = 0; i < KVD_LEN(c); i++) {
        struct shape s = {1, 2, 3, 64, 64, 64, 64, 2, 320 + i, {.q_len = 1 + i}};
        same_pages(0, 64, 64, 1, c[i], 1, false, 8, seed + i);
        reading(64, 64, 2, c[i], KVD_DTYPE_F32, 8, seed + i);
        check_transformed(&s, c[i], 8, 4e-3, seed + i);
    }
}

// Values in the thousands, so that scales come near to where fp16 ends, or around a thousandth. All
// codecs.
static void values_of_size(float factor, uint64_t seed)
{
    const struct attention one = {.q_len = 3};
    for (uint32_t i = 0; i < KVD_CODEC_COUNT + 12; i++) {
        struct kvd_codecs codec = i < KVD_CODEC_COUNT ? both(i) : any_codecs(seed + i);
        struct kvd_plane g = test_plane_of(1, 1, 6, 64, 64, codec, 16, 32);
        struct kseq s;
        char name[100], text[KVD_CODECS_TEXT];
        kseq_init(&s, g, 400, 1, 1, 1, seed + i);
        kseq_fill(&s);
        for (uint64_t j = 0; j < 400 * 64; j++)
            s.v[j] = kvd_f32_to_bf16(kvd_bf16_to_f32(s.v[j]) * factor);
        to_device(&s);
        struct kvd_rotation *rot = grow(&s, cuda, 300, seed + i);
        fetch_pages(&s);
        struct attention_errors e =
            attention_error(&s, cuda, kvd_codecs_rotated(codec) ? rot : NULL, &one);
        snprintf(name, sizeof(name), "values times %g, %s: error %.2e (worst row %.2e)",
                 (double)factor, kvd_codecs_name(codec, text), e.overall, e.worst);
        result(e.overall < 2e-3 && e.worst < 4e-3, name);
        cuda->ops->rotation_free(cuda, &rot);
        deinit(&s);
    }
}

static void any_codecs_in_all(uint64_t seed, bool quick)
{
    any_pages(seed, quick ? 20 : 200);
    any_shapes(seed, quick ? 1300 : 20000, quick ? 2 : 12);
    any_transforms(seed);
    values_of_size(2048, seed);
    values_of_size(1.0f / 1024, seed);
    const struct kvd_codecs c[] = {
        {KVD_CODEC_INT4, KVD_CODEC_TC2},   {KVD_CODEC_BF16, KVD_CODEC_INT2},
        {KVD_CODEC_INT4, KVD_CODEC_INT2C}, {KVD_CODEC_TC2, KVD_CODEC_BF16},
        {KVD_CODEC_INT4, KVD_CODEC_INT2},  {KVD_CODEC_INT2, KVD_CODEC_INT4}};
    for (uint32_t i = 0; i < KVD_LEN(c); i++) {
        struct shape many = {1, 1, 64 - 10 * i, 128, 128, 16, 32, 1, 300, {.q_len = 1}};
        check_shape(&many, c[i], limit_of(c[i]), seed + i);
        ragged(seed, c[i], i % 2 ? 12 : 4, 128);
        chain(1 + 4 * i, 3000, c[i], seed);
    }
}

static void any_long(uint64_t seed)
{
    const struct attention one = {.q_len = 1};
    const struct kvd_codecs c[] = {{KVD_CODEC_INT4, KVD_CODEC_INT2},
                                   {KVD_CODEC_INT2, KVD_CODEC_INT4},
                                   {KVD_CODEC_BF16, KVD_CODEC_INT2},
                                   {KVD_CODEC_TC2, KVD_CODEC_TURBOQUANT_3},
                                   {KVD_CODEC_INT2, KVD_CODEC_BF16}};
    for (size_t i = 0; i < KVD_LEN(c); i++)
        check_long(c[i], 64, 300000, one, true, seed + i);
    for (int i = 0; i < 3; i++) // with kernels of their own, and without
        check_long(c[i], 128, 1200000, one, false, seed);
    check_long(c[0], 64, 1200000, (struct attention){.q_len = 2, .window = 1000001, .softcap = 30},
               false, seed);
}

#endif
