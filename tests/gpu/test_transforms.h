// Sets of transforms on a GPU. Part of test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_TRANSFORMS_H
#define KVD_TESTS_GPU_TEST_TRANSFORMS_H

// Puts transforms with means in the place of a sequence's rotations, of which kseq_init has made at
// least one a layer, with deviations and bits of K's tiles in tc2 and tc2.5. 0: leaves it as it is.
static void skew(struct kseq *s, double stretch)
{
    if (stretch == 0)
        return;
    kseq_skew(s, stretch, stretch <= 100);
    if (kvd_codec_tc(s->g.codec.k))
        kseq_code(s, stretch, stretch <= 100);
}

// Where kernels look at K's codes, whatever the bits of tiles: what those of streams of 16 and of
// 20 bits take for granted of the first two tiles and the last two (tc.cuh), and that a code lies
// within a mantissa.
static void views_of_keys(uint64_t seed)
{
    enum { DIM = 128, TILES = DIM / 16 };
    uint64_t part = kvd_cuda_operand_bytes(1, DIM) / 2;
    uint16_t *operands = malloc(7 * part * sizeof(*operands));
    bool ok = true;
    for (uint32_t i = 0; i < 60; i++) {
        struct kvd_cuda_transform t;
        float scales[2], bits[TILES] = {0};
        uint32_t codec = i % 2 ? KVD_CODEC_TC2_5 : KVD_CODEC_TC2, at = 0;
        uint32_t stream = kvd_tc_stream_bits(codec, DIM);
        for (uint32_t left = stream; left;) {
            float *b = &bits[kvd_rand(&seed) % TILES];
            left -= *b < KVD_TC_MAX_BITS;
            *b += *b < KVD_TC_MAX_BITS;
        }
        struct kvd_rotation_data d = {
            .n_layers = 1, .heads = 1, .dim_k = DIM, .dim_v = DIM, .k_bits = bits};
        struct kvd_cuda_transform_operands o = {
            operands,   operands + 2 * part, operands + 4 * part, operands + 6 * part,
            &scales[0], &scales[1]};
        kvd_cuda_transform_pack(&d, 0, &o, &t);
        for (uint32_t k = 0; k < TILES; at += (uint32_t)bits[k++]) {
            const struct kvd_cuda_key_tile *x = &t.tiles[i % 2][k];
            uint32_t n = (uint32_t)bits[k], mask = ((1u << n) - 1) << (at - x->view);
            ok &= x->mask == (n ? mask * 0x00010001u : 0) && (n == 0 || at - x->view + n <= 10);
            if (n && k < 2)
                ok &= x->view == 0;
            if (n && k >= TILES - 2)
                ok &= x->view == (stream == 20 ? 10 : 6);
        }
        ok &= t.tiles[1 - i % 2][0].mask == 0; // another codec's
    }
    free(operands);
    result(ok, "where kernels look at K's codes");
}

// A set of transforms is for tc2 and tc2.5 alone: other codecs' kernels do not know of its means.
static void refused_transforms(uint64_t seed)
{
    struct kseq s;
    kseq_init(&s, test_plane(1, 1, 1, 64, 64, KVD_CODEC_INT2, 0, 0), 64, 1, 1, 1, seed);
    kseq_fill(&s);
    skew(&s, 8);
    to_device(&s);
    struct kvd_rotation *rot = cuda->ops->rotation_new(cuda, &s.rot, NULL);
    struct kvd_append_item item = {.pages = {s.at_bf16, s.at_codec},
                                   .new_length = 16,
                                   .new_hist_end = 16,
                                   .k = kseq_tensor(s.k, KVD_DTYPE_BF16, s.capacity, 1, 64, 0),
                                   .v = kseq_tensor(s.v, KVD_DTYPE_BF16, s.capacity, 1, 64, 0)};
    struct kvd_append_params append = {
        .plane = &s.g, .rotation = rot, .layer_count = 1, .items = &item, .n_items = 1};
    float out[64];
    struct kvd_read_params read = {.plane = &s.g,
                                   .rotation = rot,
                                   .layer_count = 1,
                                   .pages = item.pages,
                                   .length = 16,
                                   .hist_end = 16,
                                   .tokens = 1,
                                   .k = kseq_tensor(out, KVD_DTYPE_F32, 1, 1, 64, 0)};
    struct kvd_attend_item at = {.pages = item.pages, .length = 16, .hist_end = 16, .q_len = 1};
    struct kvd_attend_params attend = {
        .plane = &s.g, .rotation = rot, .layer_count = 1, .scale = 1, .items = &at, .n_items = 1};
    at.q = at.o = read.k;
    struct kvd_error err[3] = {{0}};
    bool refused = cuda->ops->append(cuda, &append, &err[0]) == KVD_E_UNSUPPORTED &&
                   cuda->ops->read(cuda, &read, &err[1]) == KVD_E_UNSUPPORTED &&
                   cuda->ops->attend(cuda, &attend, &err[2]) == KVD_E_UNSUPPORTED;
    result(refused && strstr(err[2].text, "int2: the set has transforms"),
           "transforms are refused with codecs that do not know them");
    cuda->ops->rotation_free(cuda, &rot);
    deinit(&s);
}

#endif
