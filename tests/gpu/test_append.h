// Included by test_cuda.c: appends of planes with many kv heads, whose rows a warp takes together,
// and the look for NaN and Inf in them.

enum { CHECK_LAYERS = 2, CHECK_TOKENS = 50, CHECK_HEADS = 25, CHECK_K = 64, CHECK_V = 128 };

static uint32_t below(uint64_t *rng, uint32_t n)
{
    return (uint32_t)(kseq_uniform(rng) * n);
}

static struct kvd_nonfinite some_place(uint64_t *rng)
{
    bool in_v = below(rng, 2);
    return (struct kvd_nonfinite){.in_v = in_v,
                                  .layer = below(rng, CHECK_LAYERS),
                                  .token = below(rng, CHECK_TOKENS),
                                  .head = below(rng, CHECK_HEADS),
                                  .channel = below(rng, in_v ? CHECK_V : CHECK_K)};
}

static uint64_t row_of(const struct kvd_nonfinite *at)
{
    return ((uint64_t)at->layer * CHECK_TOKENS + at->token) * CHECK_HEADS + at->head;
}

// Where the look for them comes to.
static uint64_t order_of(const struct kvd_nonfinite *at)
{
    return row_of(at) * 2 + at->in_v;
}

static bool same_place(const struct kvd_nonfinite *a, const struct kvd_nonfinite *b)
{
    return a->item == b->item && order_of(a) == order_of(b) && a->channel == b->channel;
}

// Writes a value where it is wanted.
static void put(const struct kvd_append_item *item, const struct kvd_nonfinite *at, uint16_t value)
{
    uint8_t *data = at->in_v ? item->v.data : item->k.data;
    data += (row_of(at) * (at->in_v ? CHECK_V : CHECK_K) + at->channel) * 2;
    if (item->k.on_device)
        upload(data, &value, 2);
    else
        memcpy(data, &value, 2);
}

// They are found where they are, in host and in device memory; of two, there, the first.
static void checking(bool on_device, uint64_t seed)
{
    struct kvd_plane g =
        test_plane(CHECK_LAYERS, CHECK_HEADS, 1, CHECK_K, CHECK_V, KVD_CODEC_INT2, 64, 64);
    uint64_t rows = (uint64_t)CHECK_LAYERS * CHECK_TOKENS * CHECK_HEADS, rng = seed;
    uint64_t bytes = rows * (CHECK_K + CHECK_V) * 2, table[8] = {0};
    uint8_t *host = calloc(1, bytes), *data = host;
    if (on_device) {
        need(cudaMalloc((void **)&data, bytes), "k and v");
        upload(data, host, bytes);
    }
    struct kvd_append_item item = {
        .pages = {table, table},
        .new_length = CHECK_TOKENS,
        .hist_end = 64,
        .new_hist_end = 64,
        .k = kseq_tensor(data, KVD_DTYPE_BF16, CHECK_TOKENS, CHECK_HEADS, CHECK_K, 0),
        .v = kseq_tensor(data + rows * CHECK_K * 2, KVD_DTYPE_BF16, CHECK_TOKENS, CHECK_HEADS,
                         CHECK_V, 0)};
    item.k.on_device = item.v.on_device = on_device;
    struct kvd_append_params p = {
        .plane = &g, .layer_begin = 0, .layer_count = CHECK_LAYERS, .items = &item, .n_items = 1};
    struct kvd_nonfinite w;
    const uint16_t bad[] = {0x7f80, 0xff80, 0x7fc1, 0xffff};
    int right = 0, finite = 0;
    enum { PLACES = 40 };
    for (int i = 0; i < PLACES; i++) {
        struct kvd_nonfinite at = some_place(&rng), other = some_place(&rng);
        bool two = on_device && i % 2 && order_of(&at) < order_of(&other);
        put(&item, &at, bad[i % 4]);
        if (two)
            put(&item, &other, bad[i % 4]);
        w = (struct kvd_nonfinite){0};
        right += cuda->ops->check(cuda, &p, &w) == KVD_E_INVALID && same_place(&w, &at);
        put(&item, &at, 0x7f7f); // the largest that there is
        if (two)
            put(&item, &other, 0x7f7f);
        finite += cuda->ops->check(cuda, &p, &w) == KVD_OK;
    }
    result(right == PLACES, on_device ? "check on the device" : "check on the host");
    result(finite == PLACES, "check of finite values");
    if (on_device)
        cudaFree(data);
    free(host);
}

static void many_heads(uint64_t seed)
{
    checking(false, seed);
    checking(true, seed + 1);
    pages_of_heads(11, 0, 64, 128, 1, both(KVD_CODEC_INT2), 0.96f, false, 0, seed);
    pages_of_heads(11, 0, 64, 128, 1, both(KVD_CODEC_BF16), 1, false, 0, seed + 1);
}
