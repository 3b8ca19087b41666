// Two workers on recorded activations of a real model, as two processes:
//   kvd-demo write ADDRESS ACTIVATIONS ROTATION_SET   prefills a sequence into kvd and publishes it
//   kvd-demo read  ADDRESS ACTIVATIONS ROTATION_SET   attaches it, attends, and compares with exact
//   float64 attention
// ACTIVATIONS is a safetensors file with bf16 q, k and v [layers, tokens, heads, 64]
// (tests/data/record_smollm2.py).
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "kvd/kvd.h"

enum { DIM = 64, QUERIES = 64, CHUNK = 256, MAX_LAYERS = 64 };

struct activations {
    uint32_t layers, tokens, q_heads, kv_heads;
    uint32_t ids[MAX_LAYERS];
    const uint16_t *q, *k, *v;
    char model[128], text[128];
};

static void die(const char *what, const kvd_failure *err)
{
    fprintf(stderr, "kvd-demo: %s%s%s\n", what, err ? ": " : "", err ? err->text : "");
    exit(1);
}

static float widen(uint16_t b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static double now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e3 + (double)ts.tv_nsec / 1e6;
}

static const uint16_t *tensor(const json_t *header, const char *name, const char *data, size_t size,
                              uint32_t shape[4])
{
    const json_t *t = json_object_get(header, name), *at = json_object_get(t, "data_offsets");
    size_t bytes = 2;
    for (size_t i = 0; i < 4; i++) {
        shape[i] = (uint32_t)json_integer_value(json_array_get(json_object_get(t, "shape"), i));
        bytes *= shape[i];
    }
    size_t begin = (size_t)json_integer_value(json_array_get(at, 0));
    if (shape[3] != DIM || begin > size || bytes > size - begin)
        die("the activations have no bf16 tensors q, k and v of head_dim 64", NULL);
    return (const uint16_t *)(const void *)(data + begin);
}

static struct activations load(const char *path)
{
    struct activations a = {0};
    struct stat st;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &st) || st.st_size < 16)
        die("cannot open the activations", NULL);
    const char *file = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    uint64_t n = 0;
    if (file == MAP_FAILED || (memcpy(&n, file, 8), n > (uint64_t)st.st_size - 8))
        die("the activations are no safetensors file", NULL);
    json_t *header = json_loadb(file + 8, n, 0, NULL);
    const json_t *meta = json_object_get(header, "__metadata__");
    const char *layers = json_string_value(json_object_get(meta, "layers"));
    const char *model = json_string_value(json_object_get(meta, "model"));
    const char *text = json_string_value(json_object_get(meta, "text"));
    uint32_t q[4], k[4], v[4];
    size_t size = (size_t)st.st_size - 8 - n;
    a.q = tensor(header, "q", file + 8 + n, size, q);
    a.k = tensor(header, "k", file + 8 + n, size, k);
    a.v = tensor(header, "v", file + 8 + n, size, v);
    a.tokens = q[1];
    a.q_heads = q[2];
    a.kv_heads = k[2];
    for (const char *c = layers ? layers : ""; *c && a.layers < MAX_LAYERS;) {
        char *end;
        a.ids[a.layers++] = (uint32_t)strtoul(c, &end, 10);
        c = *end ? end + 1 : end;
    }
    if (a.layers != q[0] || a.layers != k[0] || k[1] != q[1] || v[1] != q[1] || v[2] != k[2])
        die("the activations' tensors do not fit together", NULL);
    snprintf(a.model, sizeof(a.model), "%s", model ? model : "?");
    snprintf(a.text, sizeof(a.text), "%s", text ? text : "?");
    json_decref(header);
    return a;
}

static kvd_client *connect_to(const char *address, const struct activations *a, const char *set,
                              const char *name)
{
    kvd_failure err;
    kvd_client *c;
    kvd_options o = {.size = sizeof(o),
                     .address = address,
                     .client_name = name,
                     .layers = a->ids,
                     .n_layers = a->layers,
                     .q_heads = a->q_heads,
                     .kv_heads = a->kv_heads,
                     .head_dim_k = DIM,
                     .head_dim_v = DIM,
                     .codec = "int2",
                     .rotation_set = set};
    if (kvd_open(&o, &c, &err))
        die("cannot open a session", &err);
    return c;
}

static void copy_tokens(void *to, const uint16_t *from, const struct activations *a, uint32_t heads,
                        uint32_t first, uint32_t n)
{
    size_t row = (size_t)heads * DIM * 2;
    for (uint32_t l = 0; l < a->layers; l++)
        memcpy((char *)to + l * n * row, (const char *)from + ((size_t)l * a->tokens + first) * row,
               n * row);
}

static int write_all(const char *address, const struct activations *a, const char *set)
{
    kvd_failure err;
    kvd_buffer *b;
    uint64_t id, v_at = (uint64_t)a->layers * CHUNK * a->kv_heads * DIM * 2;
    kvd_client *c = connect_to(address, a, set, "demo-writer");
    if (kvd_buffer_new(c, 2 * v_at, &b, &err) || kvd_sequences_create(c, 1, &id, &err))
        die("cannot prepare", &err);
    double began = now_ms();
    for (uint32_t t = 0; t < a->tokens; t += CHUNK) {
        uint32_t n = a->tokens - t < CHUNK ? a->tokens - t : CHUNK;
        copy_tokens(kvd_buffer_data(b), a->k, a, a->kv_heads, t, n);
        copy_tokens((char *)kvd_buffer_data(b) + v_at, a->v, a, a->kv_heads, t, n);
        kvd_item item = {.size = sizeof(item),
                         .sequence = id,
                         .position = t,
                         .tokens = n,
                         .k = {.buffer = b},
                         .v = {.buffer = b, .offset = v_at}};
        if (kvd_append(c, (kvd_layers){0, 0}, &item, 1, &err))
            die("append", &err);
    }
    double ms = now_ms() - began;
    if (kvd_sequence_publish(c, id, "demo", true, &err))
        die("publish", &err);
    printf("writer: appended %u tokens x %u layers of %s (%s) in %.1f ms, published as 'demo'\n",
           a->tokens, a->layers, a->model, a->text, ms);
    kvd_close(&c);
    return 0;
}

// Exact attention of query position `pos` on the original values.
static void exact(const struct activations *a, uint32_t l, uint32_t pos, uint32_t h, double *o)
{
    uint32_t kv = h / (a->q_heads / a->kv_heads);
    const uint16_t *q = a->q + (((size_t)l * a->tokens + pos) * a->q_heads + h) * DIM;
    double *p = malloc(sizeof(double) * (pos + 1)), top = -1e300, sum = 0;
    for (uint32_t t = 0; t <= pos; t++) {
        const uint16_t *k = a->k + (((size_t)l * a->tokens + t) * a->kv_heads + kv) * DIM;
        p[t] = 0;
        for (int c = 0; c < DIM; c++)
            p[t] += (double)widen(q[c]) * widen(k[c]);
        p[t] /= sqrt(DIM);
        top = p[t] > top ? p[t] : top;
    }
    memset(o, 0, sizeof(double) * DIM);
    for (uint32_t t = 0; t <= pos; t++) {
        const uint16_t *v = a->v + (((size_t)l * a->tokens + t) * a->kv_heads + kv) * DIM;
        double e = exp(p[t] - top);
        sum += e;
        for (int c = 0; c < DIM; c++)
            o[c] += e * widen(v[c]);
    }
    for (int c = 0; c < DIM; c++)
        o[c] /= sum;
    free(p);
}

struct score {
    double diff, want, got, dot;
};

static void compare(const struct activations *a, uint32_t l, const float *o, struct score *s)
{
    for (uint32_t i = 0; i < QUERIES; i++)
        for (uint32_t h = 0; h < a->q_heads; h++) {
            double want[DIM];
            exact(a, l, a->tokens - QUERIES + i, h, want);
            for (int c = 0; c < DIM; c++) {
                double got = o[(i * a->q_heads + h) * DIM + (uint32_t)c];
                s->diff += (got - want[c]) * (got - want[c]);
                s->want += want[c] * want[c];
                s->got += got * got;
                s->dot += got * want[c];
            }
        }
}

static int read_all(const char *address, const struct activations *a, const char *set)
{
    kvd_failure err;
    kvd_buffer *b;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    kvd_info daemon = KVD_NEW(kvd_info);
    kvd_client *c = connect_to(address, a, set, "demo-reader");
    uint64_t o_at = (uint64_t)a->layers * QUERIES * a->q_heads * DIM * 2;
    if (kvd_sequence_attach(c, "demo", &info, &err) || kvd_buffer_new(c, 3 * o_at, &b, &err))
        die("cannot attach 'demo'", &err);
    if (kvd_get_info(c, &daemon, &err))
        die("info", &err);
    copy_tokens(kvd_buffer_data(b), a->q, a, a->q_heads, a->tokens - QUERIES, QUERIES);
    const int packed = 2 * (DIM / 4) + 8; // and in int2 pages
    uint64_t vector = 2ull * DIM * 2;     // K and V of one token and kv head, in bf16
    uint64_t bf16 = info.length * a->kv_heads * vector;
    uint64_t stored = a->kv_heads * (info.history_tokens * (uint64_t)packed +
                                     (info.length - info.history_tokens) * vector);
    printf("reader: %llu tokens: %llu in the sink, %llu compressed, %llu in the recent window; "
           "rotation set %.20s...\n\n",
           (unsigned long long)info.length, (unsigned long long)info.sink_tokens,
           (unsigned long long)info.history_tokens, (unsigned long long)info.recent_tokens,
           daemon.rotation_set);
    printf(
        "layer  tokens  bytes bf16  bytes stored  ratio  history  rel. error   cosine  ms/call\n");
    struct score all = {0};
    for (uint32_t l = 0; l < a->layers; l++) {
        kvd_item item = {.size = sizeof(item),
                         .sequence = info.sequence,
                         .tokens = QUERIES,
                         .q = {.buffer = b, .offset = l * (o_at / a->layers)},
                         .o = {.buffer = b, .offset = o_at, .dtype = KVD_F32}};
        double best = 1e9;
        for (int i = 0; i < 5; i++) {
            double began = now_ms();
            if (kvd_attend(c, (kvd_layers){l, 1}, NULL, &item, 1, &err))
                die("attend", &err);
            best = fmin(best, now_ms() - began);
        }
        struct score s = {0};
        compare(a, l, (const float *)(const void *)((char *)kvd_buffer_data(b) + o_at), &s);
        printf("%5u  %6llu  %10llu  %12llu  %4.2fx  %6.2fx  %10.4f  %.5f  %7.2f\n", a->ids[l],
               (unsigned long long)info.length, (unsigned long long)bf16,
               (unsigned long long)stored, (double)bf16 / (double)stored, (double)vector / packed,
               sqrt(s.diff / s.want), s.dot / sqrt(s.want * s.got), best);
        all.diff += s.diff / s.want;
    }
    printf("\nerror: attention output of the last %d positions against exact float64 attention on "
           "the original values\n"
           "(mean over layers %.4f); ratio: of the whole sequence; history: of its compressed part "
           "alone.\n",
           QUERIES, sqrt(all.diff / a->layers));
    kvd_close(&c);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: kvd-demo write|read ADDRESS ACTIVATIONS ROTATION_SET\n");
        return 2;
    }
    struct activations a = load(argv[3]);
    return strcmp(argv[1], "write") == 0 ? write_all(argv[2], &a, argv[4])
                                         : read_all(argv[2], &a, argv[4]);
}
