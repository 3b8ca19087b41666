#include "activations.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

void die(const char *what, const kvd_failure *err)
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

double now_ms(void)
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

struct activations load(const char *path)
{
    struct activations a = {0};
    struct stat st;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &st)) {
        fprintf(stderr, "kvd-demo: cannot open the activations %s: %s\n", path, strerror(errno));
        exit(1);
    }
    if (st.st_size < 16)
        die("the activations are no safetensors file", NULL);
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

void copy_tokens(void *to, const uint16_t *from, const struct activations *a, uint32_t heads,
                 uint32_t first, uint32_t n)
{
    size_t row = (size_t)heads * DIM * 2;
    for (uint32_t l = 0; l < a->layers; l++)
        memcpy((char *)to + l * n * row, (const char *)from + ((size_t)l * a->tokens + first) * row,
               n * row);
}

// Several sums side by side: one would have each addition wait for the one before it.
static double dot(const uint16_t *x, const uint16_t *y)
{
    double sums[8] = {0}, all = 0;
    for (int c = 0; c < DIM; c += 8)
        for (int i = 0; i < 8; i++)
            sums[i] += (double)widen(x[c + i]) * widen(y[c + i]);
    for (int i = 0; i < 8; i++)
        all += sums[i];
    return all;
}

// Exact attention of query position `pos` on the original values.
static void exact(const struct activations *a, uint32_t l, uint32_t pos, uint32_t h, double *o)
{
    uint32_t kv = h / (a->q_heads / a->kv_heads);
    const uint16_t *q = a->q + (((size_t)l * a->tokens + pos) * a->q_heads + h) * DIM;
    double *p = malloc(sizeof(double) * (pos + 1)), top = -1e300, sum = 0;
    for (uint32_t t = 0; t <= pos; t++) {
        const uint16_t *k = a->k + (((size_t)l * a->tokens + t) * a->kv_heads + kv) * DIM;
        p[t] = dot(q, k) / sqrt(DIM);
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

// The exact outputs of the last QUERIES positions of a layer, [QUERIES][q_heads][DIM].
static const double *wanted(struct activations *a, uint32_t l)
{
    if (a->want[l])
        return a->want[l];
    a->want[l] = malloc(sizeof(double) * QUERIES * a->q_heads * DIM);
    if (!a->want[l])
        die("out of memory", NULL);
    for (uint32_t i = 0; i < QUERIES; i++)
        for (uint32_t h = 0; h < a->q_heads; h++)
            exact(a, l, a->tokens - QUERIES + i, h,
                  a->want[l] + (size_t)(i * a->q_heads + h) * DIM);
    return a->want[l];
}

void compare(struct activations *a, uint32_t l, const float *o, struct score *s)
{
    const double *all = wanted(a, l);
    for (uint32_t i = 0; i < QUERIES; i++)
        for (uint32_t h = 0; h < a->q_heads; h++) {
            const double *want = all + (size_t)(i * a->q_heads + h) * DIM;
            for (int c = 0; c < DIM; c++) {
                double got = o[(i * a->q_heads + h) * DIM + (uint32_t)c];
                s->diff += (got - want[c]) * (got - want[c]);
                s->want += want[c] * want[c];
                s->got += got * got;
                s->dot += got * want[c];
            }
        }
}
