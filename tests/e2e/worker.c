// A worker that uses libkvd as its users do: appends and steps random tokens through the daemon,
// layer by layer and in batches, and compares every output with attention computed here in float64.
// Exits with 0 if all agree. usage: worker [ADDRESS [codec]]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvd/kvd.h"
#include "random.h"

enum { LAYERS = 3, KV = 2, GROUP = 3, HEADS = KV * GROUP, DIM = 64, MAX = 900, SEQS = 3 };

#define TRY(call)                                                                                  \
    do {                                                                                           \
        kvd_failure err_ = {0};                                                                    \
        kvd_failure *err = &err_;                                                                  \
        if ((call) != KVD_SUCCESS) {                                                               \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, err->text);                         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct tokens { // one sequence's originals
    uint16_t k[LAYERS][MAX][KV][DIM], v[LAYERS][MAX][KV][DIM];
    uint64_t length;
};

// float64 attention over values that the daemon itself reads back, for the last `n` positions of
// `layer`.
REFERENCE static double error_of(const struct tokens *s, const float *k, const float *v,
                                 uint64_t total, int layer, int n, const float *q, const float *o)
{
    double diff = 0, norm = 0;
    for (int i = 0; i < n; i++)
        for (int h = 0; h < HEADS; h++) {
            double out[DIM] = {0}, sum = 0, top = -1e300, logit[MAX];
            uint64_t pos = total - (uint64_t)n + (uint64_t)i;
            for (uint64_t t = 0; t <= pos; t++) {
                double dot = 0;
                for (int c = 0; c < DIM; c++)
                    dot += (double)q[(i * HEADS + h) * DIM + c] *
                           (k ? k[((layer * MAX + t) * KV + h / GROUP) * DIM + c]
                              : widen(s->k[layer][t][h / GROUP][c]));
                logit[t] = dot / 8;
                top = fmax(top, logit[t]);
            }
            for (uint64_t t = 0; t <= pos; t++) {
                double p = exp(logit[t] - top);
                sum += p;
                for (int c = 0; c < DIM; c++)
                    out[c] += p * (v ? v[((layer * MAX + t) * KV + h / GROUP) * DIM + c]
                                     : widen(s->v[layer][t][h / GROUP][c]));
            }
            for (int c = 0; c < DIM; c++) {
                double d = out[c] / sum - o[(i * HEADS + h) * DIM + c];
                diff += d * d;
                norm += out[c] / sum * (out[c] / sum);
            }
        }
    return sqrt(diff / norm);
}

static struct tokens seqs[SEQS];
static kvd_client *client;
static kvd_buffer *buffer;
static uint64_t ids[SEQS];

enum { KV_BYTES = LAYERS * MAX * KV * DIM * 2, Q_BYTES = LAYERS * 64 * HEADS * DIM * 4 };

static void fill(struct tokens *s, int n, uint64_t at_buffer)
{
    uint16_t *k = (uint16_t *)((char *)kvd_buffer_data(buffer) + at_buffer), *v = k + KV_BYTES / 2;
    for (int l = 0; l < LAYERS; l++)
        for (int t = 0; t < n; t++)
            for (int h = 0; h < KV; h++)
                for (int c = 0; c < DIM; c++) {
                    int at = ((l * n + t) * KV + h) * DIM + c;
                    k[at] = s->k[l][s->length + (uint64_t)t][h][c] = bf16(normal());
                    v[at] = s->v[l][s->length + (uint64_t)t][h][c] = bf16(normal());
                }
}

// Reads the daemon's view of a sequence into k and v, [layer][MAX][kv][dim].
static void read_back(int i, float *k, float *v)
{
    uint64_t at = 4 * (uint64_t)KV_BYTES, n = seqs[i].length;
    uint64_t bytes = LAYERS * n * KV * DIM * 4;
    kvd_tensor_ref kr = {.buffer = buffer, .offset = at, .dtype = KVD_F32};
    kvd_tensor_ref vr = {.buffer = buffer, .offset = at + bytes, .dtype = KVD_F32};
    TRY(kvd_read_tokens(client, (kvd_layers){0, 0}, ids[i], 0, (uint32_t)n, &kr, &vr, err));
    const float *from = (const float *)((char *)kvd_buffer_data(buffer) + at);
    for (int l = 0; l < LAYERS; l++) {
        memcpy(k + (uint64_t)l * MAX * KV * DIM, from + l * n * KV * DIM, n * KV * DIM * 4);
        memcpy(v + (uint64_t)l * MAX * KV * DIM, from + bytes / 4 + l * n * KV * DIM,
               n * KV * DIM * 4);
    }
}

static float *queries(int n)
{
    float *q = (float *)((char *)kvd_buffer_data(buffer) + 2 * (uint64_t)KV_BYTES);
    for (int i = 0; i < LAYERS * n * HEADS * DIM; i++)
        q[i] = normal();
    return q;
}

int main(int argc, char **argv)
{
    const uint32_t layers[LAYERS] = {1, 4, 9};
    const char *codec = argc > 2 ? argv[2] : "int2";
    kvd_options options = {.size = sizeof(options),
                           .address = argv[1], // NULL, of no argument: the one kvd of this host
                           .client_name = "e2e",
                           .tls_ca = getenv("KVD_TEST_CA"),
                           .tls_cert = getenv("KVD_TEST_CERT"),
                           .tls_key = getenv("KVD_TEST_KEY"),
                           .layers = layers,
                           .n_layers = LAYERS,
                           .q_heads = HEADS,
                           .kv_heads = KV,
                           .head_dim_k = DIM,
                           .head_dim_v = DIM,
                           .codec = codec};
    TRY(kvd_open(&options, &client, err));
    TRY(kvd_buffer_new(client, 12 * (uint64_t)KV_BYTES, &buffer, err));
    TRY(kvd_sequences_create(client, SEQS, ids, err));
    double worst = 0;
    const int steps[] = {1, 40, 300, 1, 7, 64, 1, 200, 16, 1};
    float *k = calloc(2, LAYERS * MAX * KV * DIM * 4), *v = k + LAYERS * MAX * KV * DIM;
    uint64_t o_at = 2 * (uint64_t)KV_BYTES + Q_BYTES;
    const float *o = (const float *)((char *)kvd_buffer_data(buffer) + o_at);
    for (size_t s = 0; s < sizeof(steps) / sizeof(*steps); s++)
        for (int i = 0; i < SEQS; i++) {
            int n = steps[s], q_len = n < 64 ? n : 64;
            kvd_item item = {.size = sizeof(item),
                             .sequence = ids[i],
                             .position = seqs[i].length,
                             .tokens = (uint32_t)n,
                             .k = {.buffer = buffer},
                             .v = {.buffer = buffer, .offset = KV_BYTES}};
            fill(&seqs[i], n, 0);
            for (uint32_t l = 0; l < LAYERS; l++) { // layer by layer, as a model runs
                uint64_t row = (uint64_t)n * KV * DIM * 2;
                item.k.offset = l * row;
                item.v.offset = KV_BYTES + l * row;
                item.request = kvd_request_new(client);
                TRY(kvd_append(client, (kvd_layers){l, 1}, &item, 1, err));
                TRY(kvd_append(client, (kvd_layers){l, 1}, &item, 1,
                               err)); // a repeat changes nothing
            }
            seqs[i].length += (uint64_t)n;
            const float *q = queries(q_len);
            kvd_item ask = {
                .size = sizeof(ask),
                .sequence = ids[i],
                .tokens = (uint32_t)q_len,
                .q = {.buffer = buffer, .offset = 2 * (uint64_t)KV_BYTES, .dtype = KVD_F32},
                .o = {.buffer = buffer, .offset = o_at, .dtype = KVD_F32}};
            TRY(kvd_attend(client, (kvd_layers){0, 0}, NULL, &ask, 1, err));
            read_back(i, k, v);
            for (int l = 0; l < LAYERS; l++)
                worst =
                    fmax(worst, error_of(&seqs[i], k, v, seqs[i].length, l, q_len,
                                         q + l * q_len * HEADS * DIM, o + l * q_len * HEADS * DIM));
        }
    // Step on a fork: the parent must not change.
    uint64_t child;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    TRY(kvd_sequence_fork(client, ids[0], 1, &child, err));
    struct tokens *copy = malloc(sizeof(*copy));
    memcpy(copy, &seqs[0], sizeof(*copy));
    fill(copy, 5, 0);
    const float *q = queries(5);
    kvd_item step = {.size = sizeof(step),
                     .sequence = child,
                     .position = copy->length,
                     .tokens = 5,
                     .k = {.buffer = buffer},
                     .v = {.buffer = buffer, .offset = KV_BYTES},
                     .q = {.buffer = buffer, .offset = 2 * (uint64_t)KV_BYTES, .dtype = KVD_F32},
                     .o = {.buffer = buffer, .offset = o_at, .dtype = KVD_F32}};
    read_back(0, k, v);
    TRY(kvd_step(client, (kvd_layers){0, 0}, NULL, &step, 1, err));
    for (int l = 0; l < LAYERS; l++)
        for (int t = 0; t < 5; t++)
            for (int h = 0; h < KV; h++)
                for (int c = 0; c < DIM; c++) {
                    uint64_t at =
                        ((l * MAX + copy->length + (uint64_t)t) * KV + (uint64_t)h) * DIM +
                        (uint64_t)c;
                    k[at] = widen(copy->k[l][copy->length + (uint64_t)t][h][c]);
                    v[at] = widen(copy->v[l][copy->length + (uint64_t)t][h][c]);
                }
    for (int l = 0; l < LAYERS; l++)
        worst = fmax(worst, error_of(copy, k, v, copy->length + 5, l, 5, q + l * 5 * HEADS * DIM,
                                     o + l * 5 * HEADS * DIM));
    TRY(kvd_sequence_describe(client, ids[0], &info, err));
    if (info.length != seqs[0].length)
        return fprintf(stderr, "the parent changed\n"), 1;
    TRY(kvd_sequence_describe(client, child, &info, err));
    if (info.length != seqs[0].length + 5 ||
        (strcmp(codec, "int2") == 0 && info.planes[0].history == 0))
        return fprintf(stderr, "the child has %llu tokens\n", (unsigned long long)info.length), 1;
    kvd_failure bad;
    if (kvd_sequence_describe(client, child + (1u << 20), &info, &bad) != KVD_ERR_NOT_FOUND)
        return fprintf(stderr, "a foreign id was accepted\n"), 1;
    TRY(kvd_sequences_free(client, ids, SEQS, false, err));
    printf("worst relative error %.2e\n", worst);
    free(copy);
    free(k);
    kvd_close(&client);
    return worst < 2e-3 ? 0 : 1;
}
