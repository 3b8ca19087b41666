// A step or an append in one go: the same outputs and the same pages as by its phases one after the
// other, and no trace where it is refused. Part of test_cuda.c.
#ifndef KVD_TESTS_GPU_TEST_STEP_H
#define KVD_TESTS_GPU_TEST_STEP_H

enum { STEP_ITEMS = 3, STEP_CAPACITY = 700 };

// Some sequences, the tensors of a step in device memory, and the calls' parameters.
struct step {
    struct kseq s[STEP_ITEMS];
    struct kvd_rotation *rot;
    uint16_t *k[STEP_ITEMS], *v[STEP_ITEMS];
    uint8_t *q, *o, *o_host;
    uint64_t q_row, o_row, o_bytes; // of an item's layer; of all
    struct kvd_attend_item attend_items[STEP_ITEMS];
    struct kvd_append_item append_items[STEP_ITEMS];
    struct kvd_attend_params attend;
    struct kvd_append_params append;
};

static void step_init(struct step *x, uint32_t codec, const uint32_t *lengths, uint64_t seed)
{
    struct kvd_plane g = test_plane(2, 2, 2, 64, 64, codec, 48, 64);
    *x = (struct step){0};
    for (uint32_t i = 0; i < STEP_ITEMS; i++) {
        struct kseq *s = &x->s[i];
        kseq_init(s, g, STEP_CAPACITY, 1, 0.96f, 0.92f, seed); // all have the same rotations
        s->rng += i;
        kseq_fill(s);
        to_device(s);
        struct kvd_rotation *rot = grow(s, cuda, lengths[i], seed + i);
        if (i)
            cuda->ops->rotation_free(cuda, &rot);
        else
            x->rot = rot;
        uint64_t bytes = (uint64_t)g.n_layers * STEP_CAPACITY * g.kv_heads * 64 * 2;
        x->k[i] = to_gpu(s->k, bytes);
        x->v[i] = to_gpu(s->v, bytes);
    }
}

// A step of n tokens of each, with outputs that nobody has written yet.
static void step_of(struct step *x, uint32_t n, uint64_t seed)
{
    const struct kvd_plane *g = &x->s[0].g;
    cudaFree(x->q);
    cudaFree(x->o);
    free(x->o_host);
    x->q_row = x->o_row = (uint64_t)n * g->q_heads * 64;
    uint64_t values = x->q_row * g->n_layers * STEP_ITEMS;
    float *q = malloc(values * sizeof(*q));
    for (uint64_t i = 0; i < values; i++)
        q[i] = (float)kseq_normal(&seed);
    x->q = to_gpu(q, values * 4);
    free(q);
    x->o_bytes = values * 4;
    need(cudaMalloc((void **)&x->o, x->o_bytes), "o");
    device_fill(x->o, 0xee, x->o_bytes);
    x->o_host = malloc(x->o_bytes);
    for (uint32_t i = 0; i < STEP_ITEMS; i++) {
        struct kseq *s = &x->s[i];
        struct kvd_append_item *a = &x->append_items[i];
        *a = (struct kvd_append_item){
            .pages = {s->at_bf16, s->at_codec},
            .length = s->length,
            .hist_end = s->hist_end,
            .new_length = s->length + n,
            .new_hist_end = kseq_hist_end(g, s->hist_end, s->length + n),
            .k = kseq_tensor(x->k[i], KVD_DTYPE_BF16, STEP_CAPACITY, g->kv_heads, 64, s->length),
            .v = kseq_tensor(x->v[i], KVD_DTYPE_BF16, STEP_CAPACITY, g->kv_heads, 64, s->length)};
        a->k.on_device = a->v.on_device = true;
        struct kvd_tensor t = kseq_tensor(NULL, KVD_DTYPE_F32, (uint64_t)n * STEP_ITEMS, g->q_heads,
                                          64, 0); // items side by side in each layer
        struct kvd_attend_item *b = &x->attend_items[i];
        *b = (struct kvd_attend_item){.pages = a->pages,
                                      .length = s->length,
                                      .hist_end = s->hist_end,
                                      .q_len = n,
                                      .new_tokens = n,
                                      .q = t,
                                      .k = a->k,
                                      .v = a->v,
                                      .o = t};
        b->q.data = x->q + i * x->q_row * 4;
        b->o.data = x->o + i * x->o_row * 4;
        b->q.on_device = b->o.on_device = true;
    }
    x->attend = (struct kvd_attend_params){.plane = g,
                                           .rotation = x->rot,
                                           .layer_count = g->n_layers,
                                           .scale = 0.125f,
                                           .items = x->attend_items,
                                           .n_items = STEP_ITEMS};
    x->append = (struct kvd_append_params){.plane = g,
                                           .rotation = x->rot,
                                           .layer_count = g->n_layers,
                                           .items = x->append_items,
                                           .n_items = STEP_ITEMS};
}

static void step_taken(struct step *x)
{
    for (uint32_t i = 0; i < STEP_ITEMS; i++) {
        x->s[i].length = x->append_items[i].new_length;
        x->s[i].hist_end = x->append_items[i].new_hist_end;
    }
}

static const uint8_t *outputs(struct step *x)
{
    need(cudaMemcpy(x->o_host, x->o, x->o_bytes, cudaMemcpyDeviceToHost), "o");
    return x->o_host;
}

static bool untouched(struct step *x)
{
    const uint8_t *o = outputs(x);
    bool is = true;
    for (uint64_t i = 0; i < x->o_bytes; i++)
        is &= o[i] == 0xee;
    return is;
}

static bool same_sequences(struct step *a, struct step *b)
{
    bool same = true;
    for (uint32_t i = 0; i < STEP_ITEMS; i++)
        same &= same_pages_of(&a->s[i], &b->s[i]);
    return same;
}

// `alone`: the append without the attention.
static int in_one_go(struct step *x, bool alone, struct kvd_nonfinite *where, bool *done)
{
    struct kvd_error err = {0};
    return cuda->ops->step(cuda, alone ? NULL : &x->attend, &x->append, where, done, &err);
}

// What in_one_go is to do, by phases.
static bool by_phases(struct step *x, bool alone)
{
    struct kvd_append_params p = x->append;
    if (!alone)
        return cuda->ops->attend(cuda, &x->attend, NULL) == KVD_OK &&
               cuda->ops->append(cuda, &x->append, NULL) == KVD_OK;
    p.part = KVD_APPEND_DEMOTE;
    int rc = cuda->ops->append(cuda, &p, NULL);
    p.part = KVD_APPEND_STORE;
    return rc == KVD_OK && cuda->ops->append(cuda, &p, NULL) == KVD_OK;
}

// A value of a step's new tokens that is not finite, in the last layer of item 1: a step with it
// changes nothing, of `x` or of what it is to write.
static void refused_step(struct step *x, bool alone, struct step *untouched_one, uint32_t n)
{
    struct kvd_nonfinite w = {0};
    bool done;
    uint64_t at = (((uint64_t)STEP_CAPACITY + x->s[1].length + n - 1) * 2 + 1) * 64 + 7;
    uint16_t nan = 0x7fc1;
    upload(x->v[1] + at, &nan, sizeof(nan));
    int rc = in_one_go(x, alone, &w, &done);
    result(rc == KVD_E_INVALID && w.item == 1 && w.layer == 1 && w.token == n - 1 && w.head == 1 &&
               w.channel == 7 && w.in_v,
           "a step in one go that is refused says why");
    result(untouched(x) && same_sequences(x, untouched_one), "and has changed nothing");
    upload(x->v[1] + at, x->s[1].v + at, sizeof(nan));
}

static void steps_of(uint32_t codec, uint64_t seed)
{
    const uint32_t lengths[STEP_ITEMS] = {500, 40, 333};
    const uint32_t counts[] = {1, 1, 16, 3, 70, 1, 16, 16, 1, 60, 5};
    struct step a, b;
    struct kvd_nonfinite w;
    char name[80];
    step_init(&a, codec, lengths, seed);
    step_init(&b, codec, lengths, seed);
    for (uint32_t i = 0; i < KVD_LEN(counts); i++) {
        uint32_t n = counts[i];
        bool done = false, alone = i > 5;
        step_of(&a, n, seed + i);
        step_of(&b, n, seed + i);
        refused_step(&b, alone, &a, n);
        bool *place = alone ? &b.append_items[0].v.on_device : &b.attend_items[0].o.on_device;
        *place = false; // it goes over the bus: not in one go
        result(in_one_go(&b, alone, &w, &done) == KVD_OK && !done && same_sequences(&a, &b),
               "a step with a tensor in host memory is not for one go");
        *place = true;
        bool ok = by_phases(&a, alone);
        ok &= in_one_go(&b, alone, &w, &done) == KVD_OK && done;
        step_taken(&a);
        step_taken(&b);
        snprintf(name, sizeof(name), "%s of %u in one go, codec %u", alone ? "an append" : "a step",
                 n, codec);
        result(ok && memcmp(outputs(&a), outputs(&b), a.o_bytes) == 0 && untouched(&b) == alone &&
                   same_sequences(&a, &b),
               name);
    }
    for (int k = 0; k < 2; k++) {
        struct step *x = k ? &a : &b;
        for (uint32_t i = 0; i < STEP_ITEMS; i++) {
            cudaFree(x->k[i]);
            cudaFree(x->v[i]);
            deinit(&x->s[i]);
        }
        cudaFree(x->q);
        cudaFree(x->o);
        free(x->o_host);
        cuda->ops->rotation_free(cuda, &x->rot);
    }
}

static void steps_in_one_go(uint64_t seed)
{
    steps_of(KVD_CODEC_INT2, seed);
    steps_of(KVD_CODEC_BF16, seed);
}

#endif
