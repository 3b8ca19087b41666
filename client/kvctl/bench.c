// kvctl bench: what kvd does on this machine, as a worker sees it, against what its memory can do.
// One sequence of random tokens, in shared host memory; it is freed at the end.
#include <pthread.h>
#include <time.h>

#include "client/kvctl/kvctl.h"
#include "kvd/kvd.h"

#ifdef KVD_CUDA
#include <cuda_runtime_api.h>
#endif

enum {
    LAYERS = 4,
    HEADS = 32,
    KV = 8,
    DIM = 128,
    TOKEN_BYTES = LAYERS * KV * DIM * 2 * 2, // K and V in bf16
    CHUNK = 512,                             // tokens of an append, and of a read
    CALLS = 64,                              // at most, in about a second
    LEAST_CALLS = 8,
    MAX_THREADS = 64,
    SLICE = 64 << 20, // memory of a thread when the limit is measured
};

struct row {
    const char *name, *what;
    double ms;
    uint64_t bytes; // of a call
    double limit;   // bytes/s that it can be compared with; 0: none
};

struct bench {
    struct kvctl *k;
    kvd_client *client;
    kvd_buffer *buffer; // K, V, then q and o of one token
    uint64_t id;
    uint32_t tokens;
    double read, copy, gpu; // bytes/s
    char chunk[40];         // what a call appends or reads
    struct row rows[8];
    unsigned n;
    kvd_failure failure;
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *t, unsigned n)
{
    qsort(t, n, sizeof(*t), by_value);
    return t[n / 2];
}

// -- what memory can do -------------------------------------------------------------------------

struct slice {
    pthread_t thread;
    uint64_t *data;
    bool copies;
    double seconds; // of the best pass
    uint64_t sum;
};

static void *pass_over(void *ctx)
{
    struct slice *s = ctx;
    size_t half = SLICE / 2 / sizeof(*s->data);
    for (int i = 0; i < 6; i++) {
        double began = now_s();
        if (s->copies)
            memcpy(s->data, s->data + half, SLICE / 2);
        uint64_t sum = 0;
        for (size_t j = 0; j < 2 * half && !s->copies; j++)
            sum += s->data[j];
        s->sum += sum;
        began = now_s() - began;
        s->seconds = i == 0 ? began : KVD_MIN(s->seconds, began);
    }
    return NULL;
}

// All cores at once, as kvd's kernels use them. A copy counts what is read and what is written.
static double memory_limit(bool copies)
{
    struct slice slices[MAX_THREADS] = {0};
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int n = (int)KVD_MAX(1L, KVD_MIN(cores, (long)MAX_THREADS)), started = 0;
    double rate = 0;
    for (int i = 0; i < n; i++) {
        slices[i].copies = copies;
        slices[i].data = malloc(SLICE);
        if (slices[i].data)
            memset(slices[i].data, i + 1, SLICE);
    }
    while (started < n && slices[started].data &&
           pthread_create(&slices[started].thread, NULL, pass_over, &slices[started]) == 0)
        started++;
    for (int i = 0; i < started; i++) {
        pthread_join(slices[i].thread, NULL);
        rate += SLICE / slices[i].seconds;
    }
    for (int i = 0; i < n; i++)
        free(slices[i].data);
    return rate;
}

#ifdef KVD_CUDA
// Bytes/s that the GPU's memory reads and writes in a copy; 0 when there is no GPU to ask.
static double gpu_limit(void)
{
    const size_t bytes = (size_t)1 << 29;
    void *from = NULL, *to = NULL;
    double best = 0;
    int rc = cudaMalloc(&from, bytes);
    if (rc == 0)
        rc = cudaMalloc(&to, bytes);
    for (int i = 0; i < 12 && rc == 0; i++) {
        double began = now_s();
        for (int j = 0; j < 8 && rc == 0; j++)
            rc = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0);
        if (rc == 0)
            rc = cudaDeviceSynchronize();
        best = KVD_MAX(best, 16.0 * (double)bytes / (now_s() - began));
    }
    cudaFree(from);
    cudaFree(to);
    cudaGetLastError();
    return rc == 0 ? best : 0;
}
#else
static double gpu_limit(void)
{
    return 0;
}
#endif

// -- what kvd does ------------------------------------------------------------------------------

static const kvd_layers all = {0, 0};

static kvd_item item_of(const struct bench *b, uint32_t tokens, uint64_t position)
{
    uint64_t v_at = (uint64_t)CHUNK * TOKEN_BYTES / 2, q_at = 2 * v_at;
    uint64_t o_at = q_at + LAYERS * HEADS * DIM * 2;
    return KVD_NEW(kvd_item, .sequence = b->id, .position = position, .tokens = tokens,
                   .k = {.buffer = b->buffer}, .v = {.buffer = b->buffer, .offset = v_at},
                   .q = {.buffer = b->buffer, .offset = q_at},
                   .o = {.buffer = b->buffer, .offset = o_at, .dtype = KVD_F32});
}

static int open_bench(struct bench *b)
{
    static const uint32_t layers[LAYERS] = {0, 1, 2, 3};
    const uint64_t bytes = (uint64_t)CHUNK * TOKEN_BYTES + LAYERS * HEADS * DIM * (2 + 4);
    kvd_options o = KVD_NEW(
        kvd_options, .address = b->k->address, .namespace_name = kvctl_option(b->k, "namespace"),
        .client_name = "kvctl-bench", .timeout_ms = b->k->timeout_ms, .layers = layers,
        .n_layers = LAYERS, .q_heads = HEADS, .kv_heads = KV, .head_dim_k = DIM, .head_dim_v = DIM,
        .codec = kvctl_option(b->k, "codec"));
    if (kvd_open(&o, &b->client, &b->failure) ||
        kvd_buffer_new(b->client, bytes, &b->buffer, &b->failure) ||
        kvd_sequences_create(b->client, 1, &b->id, &b->failure))
        return -1;
    uint16_t *values = kvd_buffer_data(b->buffer);
    uint64_t x = 88172645463325252ull;
    for (uint64_t i = 0; i < bytes / 2; i++) { // bf16 between 1/2 and 2, of either sign
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        values[i] = (uint16_t)(0x3f00 | (x & 0x80ff));
    }
    return 0;
}

static void add_row(struct bench *b, struct row row)
{
    b->rows[b->n++] = row;
}

static int bench_append(struct bench *b)
{
    double total = 0;
    uint32_t calls = (b->tokens + CHUNK - 1) / CHUNK;
    for (uint32_t t = 0; t < b->tokens; t += CHUNK) {
        kvd_item item = item_of(b, KVD_MIN(b->tokens - t, (uint32_t)CHUNK), t);
        double began = now_s();
        if (kvd_append(b->client, all, &item, 1, &b->failure))
            return -1;
        total += now_s() - began;
        progress("append", (uint64_t)t * TOKEN_BYTES, (uint64_t)b->tokens * TOKEN_BYTES);
    }
    add_row(b, (struct row){"append", b->chunk, total * 1e3 / KVD_MAX(calls, 1u),
                            (uint64_t)b->tokens * TOKEN_BYTES / KVD_MAX(calls, 1u), b->read});
    return 0;
}

static int call_attend(struct bench *b, uint32_t i)
{
    kvd_item item = item_of(b, 1, 0);
    (void)i;
    return kvd_attend(b->client, all, NULL, &item, 1, &b->failure) ? -1 : 0;
}

static int call_step(struct bench *b, uint32_t i)
{
    kvd_item item = item_of(b, 1, b->tokens + i);
    return kvd_step(b->client, all, NULL, &item, 1, &b->failure) ? -1 : 0;
}

static int call_read(struct bench *b, uint32_t i)
{
    uint32_t n = KVD_MIN(b->tokens, (uint32_t)CHUNK);
    uint64_t begin = (uint64_t)i * 7919 * n % (b->tokens - n + 1);
    kvd_item item = item_of(b, 1, 0);
    return kvd_read_tokens(b->client, all, b->id, begin, n, &item.k, &item.v, &b->failure) ? -1 : 0;
}

static int call_describe(struct bench *b, uint32_t i)
{
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    (void)i;
    return kvd_sequence_describe(b->client, b->id, &info, &b->failure) ? -1 : 0;
}

static int bench_calls(struct bench *b, struct row row, int (*call)(struct bench *b, uint32_t i))
{
    double t[CALLS], first = now_s();
    uint32_t n = 0;
    while (n < LEAST_CALLS || (n < CALLS && now_s() - first < 1)) {
        double began = now_s();
        if (call(b, n))
            return -1;
        t[n++] = (now_s() - began) * 1e3;
        progress(row.name, n * row.bytes, CALLS * row.bytes);
    }
    row.ms = median(t, n);
    add_row(b, row);
    return 0;
}

static int bench_all(struct bench *b)
{
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    kvd_info daemon = KVD_NEW(kvd_info);
    snprintf(b->chunk, sizeof(b->chunk), "%u tokens; bytes of bf16",
             KVD_MIN(b->tokens, (uint32_t)CHUNK));
    if (open_bench(b) || kvd_get_info(b->client, &daemon, &b->failure))
        return -1;
    bool gpu = strcmp(daemon.backend, "cpu") != 0;
    b->gpu = gpu ? gpu_limit() : 0;
    double limit = gpu ? b->gpu : b->read, other = gpu ? 0 : b->copy;
    if (bench_append(b) || kvd_sequence_describe(b->client, b->id, &info, &b->failure))
        return -1;
    uint64_t chunk = (uint64_t)KVD_MIN(b->tokens, (uint32_t)CHUNK) * TOKEN_BYTES;
    return bench_calls(b, (struct row){"attend", "1 query; bytes of pages", 0, info.bytes, limit},
                       call_attend) ||
           bench_calls(b, (struct row){"step", "1 token; bytes of pages", 0, info.bytes, limit},
                       call_step) ||
           bench_calls(b, (struct row){"read", b->chunk, 0, chunk, other}, call_read) ||
           bench_calls(b, (struct row){"call", "to the daemon and back", 0, 0, 0}, call_describe);
}

// -- what comes of it ---------------------------------------------------------------------------

static double rate_of(const struct row *r)
{
    return (double)r->bytes / (r->ms * 1e-3);
}

static int print_json(struct bench *b, const kvd_info *daemon)
{
    json_t *results = json_array();
    for (unsigned i = 0; i < b->n; i++) {
        const struct row *r = &b->rows[i];
        json_t *j = json_pack("{s:s, s:f, s:o}", "name", r->name, "ms", r->ms, "bytes",
                              kvctl_number_json(r->bytes));
        if (r->bytes)
            json_object_set_new(j, "bytes_per_second", json_real(rate_of(r)));
        if (r->limit > 0)
            json_object_set_new(j, "of_limit", json_real(rate_of(r) / r->limit));
        json_array_append_new(results, j);
    }
    json_t *memory =
        json_pack("{s:f, s:f}", "read_bytes_per_second", b->read, "copy_bytes_per_second", b->copy);
    if (b->gpu > 0)
        json_object_set_new(memory, "gpu_copy_bytes_per_second", json_real(b->gpu));
    return kvctl_print(b->k, json_pack("{s:s, s:s, s:s, s:i, s:i, s:o, s:o}", "address",
                                       b->k->address, "version", daemon->version, "backend",
                                       daemon->backend, "tokens", (int)b->tokens, "layers", LAYERS,
                                       "memory", memory, "results", results));
}

static void print_table(const struct bench *b, const kvd_info *daemon)
{
    printf("kvd %s on %s: one sequence of %u tokens, %d layers, %d q / %d kv heads of %d\n",
           daemon->version, daemon->backend, b->tokens, LAYERS, HEADS, KV, DIM);
    printf("memory, all cores: reads %.1f GB/s, copies %.1f GB/s (read and written)\n",
           b->read * 1e-9, b->copy * 1e-9);
    if (b->gpu > 0)
        printf("GPU memory: copies %.0f GB/s (read and written)\n", b->gpu * 1e-9);
    struct table *t = table_new("|>ms a call|>GB/s|>of limit|");
    for (unsigned i = 0; i < b->n; i++) {
        const struct row *r = &b->rows[i];
        table_cell(t, "%s", r->name);
        table_cell(t, "%.3f", r->ms);
        table_cell(t, r->bytes ? "%.2f" : "", rate_of(r) * 1e-9);
        table_cell(t, r->limit > 0 ? "%.0f %%" : "", 100 * rate_of(r) / r->limit);
        table_cell(t, "%s", r->what);
    }
    table_print(t, "");
}

static int failed(const struct bench *b)
{
    char text[KVCTL_TEXT];
    fprintf(stderr, "kvctl: %s\n", kvctl_text(b->failure.text, text));
    return b->failure.code == KVD_ERR_UNAVAILABLE ? EXIT_UNREACHABLE
           : b->failure.code == KVD_ERR_DENIED    ? EXIT_DENIED
                                                  : EXIT_FAILED;
}

int cmd_bench(struct kvctl *k)
{
    struct kvd_error err = {0};
    const char *tokens = kvctl_option(k, "tokens");
    struct bench b = {.k = k, .tokens = tokens ? (uint32_t)strtoul(tokens, NULL, 10) : 8192};
    kvd_info daemon = KVD_NEW(kvd_info);
    if (b.tokens < 1)
        return kvctl_usage("--tokens 0: a sequence has at least one");
    int code = kvctl_find(k, &err);
    if (code) {
        kvctl_fail(&err);
        return code;
    }
    if (strncmp(k->address, "unix:", 5) != 0)
        return kvctl_usage("bench wants the unix: address, not %s", k->address);
    progress("memory", 0, 2);
    b.read = memory_limit(false);
    progress("memory", 1, 2);
    b.copy = memory_limit(true);
    code = bench_all(&b) ? -1 : 0;
    progress_end();
    if (code || kvd_get_info(b.client, &daemon, &b.failure))
        code = failed(&b);
    else if (k->json)
        code = print_json(&b, &daemon);
    else
        print_table(&b, &daemon);
    kvd_close(&b.client);
    return code;
}
