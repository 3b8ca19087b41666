// What a user gets: the same recorded activations kept in bf16, in 2 bits as they are, and in 2
// bits as kvd keeps them, by rotations and by transforms, with the error of attention, the time of
// a call and the bytes of each.
// usage: kvd-compare ADDRESS ACTIVATIONS ROTATION_SET TC2_SET
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "activations.h"

enum { STEP = 16, CALLS = 5 };

struct outcome {
    double error, ms;
    uint64_t bytes, even; // of all pages; the length from which they take less than plain bf16
    uint64_t bf16_page, codec_page;
};

static uint64_t token_bytes(const struct activations *a)
{
    return 4ull * DIM * a->layers * a->kv_heads; // K and V in bf16
}

// Appends everything, a little at a time, and notes how the pages grow.
static uint64_t append_all(kvd_client *c, const struct activations *a, struct outcome *out)
{
    kvd_failure err;
    kvd_buffer *b;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    uint64_t id = 0, v_at = (uint64_t)a->layers * STEP * a->kv_heads * DIM * 2;
    if (kvd_buffer_new(c, 2 * v_at, &b, &err) || kvd_sequences_create(c, 1, &id, &err))
        die("cannot prepare", &err);
    for (uint32_t t = 0; t < a->tokens; t += STEP) {
        uint32_t n = a->tokens - t < STEP ? a->tokens - t : STEP;
        copy_tokens(kvd_buffer_data(b), a->k, a, a->kv_heads, t, n);
        copy_tokens((char *)kvd_buffer_data(b) + v_at, a->v, a, a->kv_heads, t, n);
        kvd_item item = KVD_NEW(kvd_item, .sequence = id, .position = t, .tokens = n,
                                .k = {.buffer = b}, .v = {.buffer = b, .offset = v_at});
        if (kvd_append(c, (kvd_layers){0, 0}, &item, 1, &err) ||
            kvd_sequence_describe(c, id, &info, &err))
            die("append", &err);
        if (info.bytes >= info.length * token_bytes(a))
            out->even = info.length + STEP;
    }
    out->bytes = info.bytes;
    kvd_buffer_free(&b);
    return id;
}

static struct outcome try(const char *address, struct activations *a, const char *codec,
                          const char *set, bool windows)
{
    kvd_failure err;
    kvd_client *c;
    kvd_buffer *b;
    struct outcome out = {0};
    kvd_info info = KVD_NEW(kvd_info);
    kvd_options o = KVD_NEW(kvd_options, .address = address, .client_name = "compare",
                            .layers = a->ids, .n_layers = a->layers, .q_heads = a->q_heads,
                            .kv_heads = a->kv_heads, .head_dim_k = DIM, .head_dim_v = DIM,
                            .codec = codec, .rotation_set = set, .no_windows = !windows);
    if (kvd_open(&o, &c, &err) || kvd_get_info(c, &info, &err))
        die("cannot open a session", &err);
    out.bf16_page = info.planes[0].bf16_page_bytes;
    out.codec_page = info.planes[0].codec_page_bytes;
    uint64_t id = append_all(c, a, &out),
             o_at = (uint64_t)a->layers * QUERIES * a->q_heads * DIM * 2;
    if (kvd_buffer_new(c, 3 * o_at, &b, &err))
        die("cannot make a buffer", &err);
    copy_tokens(kvd_buffer_data(b), a->q, a, a->q_heads, a->tokens - QUERIES, QUERIES);
    const float *result = (const float *)(const void *)((char *)kvd_buffer_data(b) + o_at);
    for (uint32_t l = 0; l < a->layers; l++) {
        kvd_item item = KVD_NEW(kvd_item, .sequence = id, .tokens = QUERIES,
                                .q = {.buffer = b, .offset = l * (o_at / a->layers)},
                                .o = {.buffer = b, .offset = o_at, .dtype = KVD_F32});
        struct score s = {0};
        double best = 1e9;
        for (int i = 0; i < CALLS; i++) {
            double began = now_ms();
            if (kvd_attend(c, (kvd_layers){l, 1}, NULL, &item, 1, &err))
                die("attend", &err);
            best = fmin(best, now_ms() - began);
        }
        compare(a, l, result, &s);
        out.error += s.diff / s.want / a->layers;
        out.ms += best / a->layers;
    }
    out.error = sqrt(out.error);
    kvd_close(&c);
    return out;
}

static void print(const char *name, const struct outcome *o, uint64_t exact)
{
    printf("%-42s %10.4f %9.2f %11.2f MiB %7.2fx\n", name, o->error, o->ms,
           (double)o->bytes / (1 << 20), (double)exact / (double)o->bytes);
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: kvd-compare ADDRESS ACTIVATIONS ROTATION_SET TC2_SET\n");
        return 2;
    }
    struct activations a = load(argv[2]);
    struct outcome bf16 = try(argv[1], &a, "bf16", NULL, true);
    struct outcome naive = try(argv[1], &a, "int2", "identity", false);
    struct outcome rotated = try(argv[1], &a, "int2", argv[3], true);
    struct outcome kvd = try(argv[1], &a, "tc2", argv[4], true);
    uint64_t exact = a.tokens * token_bytes(&a);
    printf("%u tokens of %s, %u layers        rel. error   ms/call  bytes of pages   saved\n",
           a.tokens, a.model, a.layers);
    print("bf16", &bf16, exact);
    print("naive int2: no rotation, no windows", &naive, exact);
    print("int2 by fitted rotations, with windows", &rotated, exact);
    print("tc2 by fitted transforms, with windows", &kvd, exact);
    double saving = (double)kvd.bf16_page / (double)kvd.codec_page;
    printf(
        "\nkvd keeps these %u tokens in %.0f %% of the memory that bf16 takes, and long sequences "
        "in "
        "%.0f %%\n(%.1f times less), with an error of %.1f %% where 2 bits without its rotations "
        "and windows have %.0f %%.\n",
        a.tokens, 100.0 * (double)kvd.bytes / (double)exact, 100 / saving, saving, 100 * kvd.error,
        100 * naive.error);
    printf("It saves from about %llu tokens on: shorter sequences are kept in bf16, in pages of "
           "16, 32 "
           "or 64 tokens, which\ntakes up to %.1f MiB more than the tokens themselves.\n",
           (unsigned long long)kvd.even, (double)kvd.bf16_page * 31 / 64 / (1 << 20));
    return 0;
}
