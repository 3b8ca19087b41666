// Two workers on recorded activations of a real model, as two processes:
//   kvd-demo write ADDRESS ACTIVATIONS SET [CODEC]   prefills a sequence into kvd and publishes it
//   kvd-demo read  ADDRESS ACTIVATIONS SET [CODEC]   attaches it, attends, and compares with exact
//   float64 attention
// SET is a rotation set for any codec (default: int2), or one of transforms for its own.
// ACTIVATIONS is a safetensors file with bf16 q, k and v [layers, tokens, heads, 64]
// (tests/data/record_smollm2.py).
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "activations.h"

enum { CHUNK = 256 };

static kvd_client *connect_to(const char *address, const struct activations *a, const char *set,
                              const char *codec, const char *name)
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
                     .codec = codec,
                     .rotation_set = set};
    if (kvd_open(&o, &c, &err))
        die("cannot open a session", &err);
    return c;
}

static int write_all(const char *address, const struct activations *a, const char *set,
                     const char *codec)
{
    kvd_failure err;
    kvd_buffer *b;
    uint64_t id, v_at = (uint64_t)a->layers * CHUNK * a->kv_heads * DIM * 2;
    kvd_client *c = connect_to(address, a, set, codec, "demo-writer");
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

static int read_all(const char *address, struct activations *a, const char *set, const char *codec)
{
    kvd_failure err;
    kvd_buffer *b;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    kvd_info daemon = KVD_NEW(kvd_info);
    kvd_client *c = connect_to(address, a, set, codec, "demo-reader");
    uint64_t o_at = (uint64_t)a->layers * QUERIES * a->q_heads * DIM * 2;
    if (kvd_sequence_attach(c, "demo", &info, &err) || kvd_buffer_new(c, 3 * o_at, &b, &err))
        die("cannot attach 'demo'", &err);
    if (kvd_get_info(c, &daemon, &err))
        die("info", &err);
    copy_tokens(kvd_buffer_data(b), a->q, a, a->q_heads, a->tokens - QUERIES, QUERIES);
    uint64_t vector = 2ull * DIM * 2; // K and V of one token and kv head, in bf16; and in pages
    double packed = (double)vector * (double)daemon.planes[0].codec_page_bytes /
                    (double)daemon.planes[0].bf16_page_bytes;
    uint64_t bf16 = info.length * a->kv_heads * vector;
    kvd_plane_tokens in = info.planes[0]; // its layers are all alike
    uint64_t stored =
        (uint64_t)((double)a->kv_heads *
                   ((double)in.history * packed + (double)((info.length - in.history) * vector)));
    printf("reader: %llu tokens: %llu in the sink, %llu compressed (%s), %llu in the recent "
           "window; set %.20s...\n\n",
           (unsigned long long)info.length, (unsigned long long)in.sink,
           (unsigned long long)in.history, codec, (unsigned long long)in.recent,
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
    bool writes = argc > 1 && strcmp(argv[1], "write") == 0;
    if ((argc != 5 && argc != 6) || (!writes && strcmp(argv[1], "read") != 0)) {
        fprintf(stderr, "usage: kvd-demo write|read ADDRESS ACTIVATIONS SET [CODEC]\n");
        return 2;
    }
    struct activations a = load(argv[3]);
    const char *codec = argc > 5 ? argv[5] : "int2";
    return writes ? write_all(argv[2], &a, argv[4], codec) : read_all(argv[2], &a, argv[4], codec);
}
