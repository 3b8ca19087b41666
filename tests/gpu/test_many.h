// Attention of so many query rows that blocks of warpgroups take them (kernels/cuda/many.cuh).
// Included by test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_MANY_H
#define KVD_TESTS_GPU_TEST_MANY_H

// Row blocks that are full, one row too long and half empty; windows that are off, cut tiles or
// leave whole tiles out; queries that lie in the pages, so that they see a part of a history; heads
// with rotations of their own; one part and several.
static const struct shape many_shapes[] = {
    {1, 1, 4, 128, 128, 64, 256, 1, 4500, {.q_len = 50, .new_tokens = 50}},
    {1, 2, 4, 64, 64, 64, 64, 2, 2900, {.q_len = 64, .bf16_queries = true}},
    {1, 2, 1, 64, 64, 0, 0, 1, 2777, {.q_len = 200}},
    {1, 1, 12, 64, 64, 16, 32, 1, 3111, {.q_len = 11, .new_tokens = 11, .sinks = true}},
    {1, 1, 8, 64, 64, 64, 64, 1, 3000, {.q_len = 100, .window = 300}},
    {1, 1, 5, 64, 64, 64, 64, 1, 2300, {.q_len = 33, .new_tokens = 33, .window = 1000}},
    {2, 2, 3, 64, 64, 0, 64, 2, 2700, {.q_len = 43}},
    {2, 2, 7, 128, 128, 0, 64, 2, 5001, {.q_len = 60, .new_tokens = 60}},
    {1, 1, 16, 128, 128, 48, 16, 1, 4222, {.q_len = 333, .bf16_queries = true}},
    {1, 3, 4, 128, 128, 64, 64, 3, 9600, {.q_len = 64, .new_tokens = 64, .window = 900}},
    {1, 1, 2, 128, 128, 0, 0, 0, 70001, {.q_len = 65}},
};

// Fewer rows, whose blocks make values of codes themselves: one block or two, full or not; an odd
// first tile, an odd last one, parts of one pair and of several, queries in the pages, several
// sequences below.
static const struct shape fewer_shapes[] = {
    {1, 2, 4, 128, 128, 64, 256, 2, 4500, {.q_len = 16, .new_tokens = 16}},
    {1, 1, 4, 64, 64, 64, 64, 1, 6400, {.q_len = 9, .bf16_queries = true}},
    {1, 2, 4, 64, 64, 0, 64, 1, 2777, {.q_len = 31, .window = 700}},
    {1, 1, 8, 64, 64, 16, 32, 1, 6333, {.q_len = 12, .new_tokens = 12, .sinks = true}},
    {2, 1, 33, 128, 128, 64, 64, 2, 9600, {.q_len = 1, .new_tokens = 1, .window = 4000}},
    {1, 1, 2, 128, 128, 0, 0, 0, 70001, {.q_len = 40}},
};

// On a GPU of `multiprocessors`, of which one is given so little work only if it is small.
static void fewer_rows_on(uint32_t multiprocessors, uint64_t seed)
{
    uint32_t *of = &((struct kvd_cuda *)cuda)->multiprocessors, all = *of;
    *of = multiprocessors;
    for (size_t i = 0; i < KVD_LEN(fewer_shapes); i++)
        if (kvd_head_dims_ok(fewer_shapes[i].dk, fewer_shapes[i].dv))
            check_shape(&fewer_shapes[i], both(KVD_CODEC_INT2), 3e-3, seed + i);
    ragged_of(seed, both(KVD_CODEC_INT2), 4, 64, 12);
    *of = all;
}

static void fewer_rows(uint64_t seed)
{
    fewer_rows_on(1, seed); // one part each, then several
    fewer_rows_on(2, seed + 1);
}

// Values of both sides are made ahead whatever their codecs are. Those with transforms have what a
// fit makes of skewed keys.
static void many_codecs(uint64_t seed)
{
    static const struct kvd_codecs c[] = {
        {KVD_CODEC_INT2C, KVD_CODEC_INT2C},
        {KVD_CODEC_INT2_LM, KVD_CODEC_INT2_LM},
        {KVD_CODEC_TURBOQUANT_2, KVD_CODEC_TURBOQUANT_3},
        {KVD_CODEC_TURBOQUANT_3, KVD_CODEC_TURBOQUANT_4},
        {KVD_CODEC_TURBOQUANT_4, KVD_CODEC_INT2},
        {KVD_CODEC_INT4, KVD_CODEC_INT4},
        {KVD_CODEC_INT4, KVD_CODEC_INT2},
        {KVD_CODEC_TC2, KVD_CODEC_TC2},
        {KVD_CODEC_TC2_5, KVD_CODEC_TC2_5},
        {KVD_CODEC_TC2_5, KVD_CODEC_TC2},
    };
    for (size_t i = 0; i < KVD_LEN(c); i++)
        for (size_t j = 0; j < 2; j++) {
            const struct shape *x = &many_shapes[j ? 0 : 1 + (seed + i) % 6];
            bool transforms = kvd_codec_tc(c[i].k);
            if (!kvd_head_dims_ok(x->dk, x->dv) || !served(c[i]))
                continue;
            check_transformed(x, c[i], transforms && i % 2 == j ? 8 : 0, transforms ? 4e-3 : 3e-3,
                              seed + i);
        }
    // A row whose products are 57 in all, its score 20: what rounding takes from its
    // query, 4.9e-3, and from the key, 5.4e-3, has one sign (kernel_rounding.h).
    if (served(both(KVD_CODEC_TC2_5)))
        check_transformed(&many_shapes[4], both(KVD_CODEC_TC2_5), 8, 4e-3, 10061483119874094105u);
}

// Pages of bf16 have no codes: other kernels take them, whatever the other side's codec.
static void many_without_codes(uint64_t seed)
{
    static const struct kvd_codecs c[] = {
        {KVD_CODEC_BF16, KVD_CODEC_BF16},
        {KVD_CODEC_BF16, KVD_CODEC_INT2},
        {KVD_CODEC_INT4, KVD_CODEC_BF16},
    };
    for (size_t i = 0; i < KVD_LEN(c); i++)
        for (size_t j = 1; j < (i ? 2 : 3); j++)
            if (served(c[i]))
                check_shape(&many_shapes[j], c[i], i ? 3e-3 : 5e-4, seed + i);
}

// Where there is no memory for values of histories, the other kernels give the same.
static void many_rows(uint64_t seed)
{
    ((struct kvd_cuda *)cuda)->packed = true;
    check_shape(&many_shapes[1], both(KVD_CODEC_INT2), 2e-3, seed);
    ((struct kvd_cuda *)cuda)->packed = false;
    worst_error = worst_row = worst_lse = 0;
    for (size_t i = 0; i < KVD_LEN(many_shapes); i++)
        if (kvd_head_dims_ok(many_shapes[i].dk, many_shapes[i].dv))
            check_shape(&many_shapes[i], both(KVD_CODEC_INT2), 3e-3, seed + i);
    ragged_of(seed, both(KVD_CODEC_INT2), 4, 64, 40);
    if (kvd_head_dims_ok(128, 128))
        ragged_of(seed, both(KVD_CODEC_INT2), 2, 128, 77);
    many_codecs(seed);
    many_without_codes(seed);
    fewer_rows(seed);
    printf("many rows: worst relative L2 %.2e (of a row %.2e), worst log-sum-exp %.2e\n",
           worst_error, worst_row, worst_lse);
}

#endif
