// A worker that does one thing after another with its sequences, as fast as they are done, until
// its standard input ends, and then looks whether each of them is as it must be. Calls that are
// refused for want of something change nothing; any other failure ends it. usage: mixed ADDRESS
// bf16|int2 SEED
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvd/kvd.h"
#include "random.h"

enum { LAYERS = 2, KV = 1, HEADS = 2, DIM = 64, MAX = 700, MOST = 40, SEQS = 12, LOOK = 50 };
enum { ROW = KV * DIM, OUT = LAYERS * HEADS * DIM };

// Tokens are known by a number, from which their keys and values follow.
struct sequence {
    uint64_t id;
    uint32_t length, token[MAX];
    bool known; // what attention over it gives, with the query that all have
    float out[OUT];
};

static struct sequence seqs[SEQS];
static uint32_t n_seqs;
static kvd_client *client;
static kvd_buffer *buffer;
static bool exact; // what is read is what was appended
static uint64_t operations, refused, wrong;
static char name[40];

enum { K_AT = 0, V_AT = LAYERS * LOOK * ROW * 4, Q_AT = 2 * V_AT, O_AT = Q_AT + OUT * 4 };

static void *at(uint64_t offset)
{
    return (char *)kvd_buffer_data(buffer) + offset;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(uniform() * n);
}

// Whether a call was done. Refused, it has changed nothing.
static bool done(kvd_result rc, const kvd_failure *err)
{
    if (rc == KVD_SUCCESS)
        return true;
    if (rc != KVD_ERR_EXHAUSTED && rc != KVD_ERR_INTERNAL) {
        fprintf(stderr, "after %llu operations: %s (%d)\n", (unsigned long long)operations,
                err->text, rc);
        exit(1);
    }
    refused++;
    return false;
}

static void check(bool as_it_must_be, const char *what, const struct sequence *s)
{
    if (as_it_must_be)
        return;
    wrong++;
    fprintf(stderr, "after %llu operations: %s of sequence %llu, which has %u tokens\n",
            (unsigned long long)operations, what, (unsigned long long)s->id, s->length);
}

// Channel c of a token's key (side 0) or value in a layer.
static float value(uint32_t token, int side, int layer, int c)
{
    uint32_t x = token * 2654435761u + (uint32_t)(side * LAYERS + layer) * 40503u +
                 (uint32_t)c * 2246822519u;
    x ^= x >> 15;
    x *= 3266489917u;
    x ^= x >> 13;
    return (float)(x % 255) / 128 - 1; // bf16 has it
}

static void append(struct sequence *s, uint32_t n)
{
    if (s->length + n > MAX)
        return;
    uint16_t *k = at(K_AT), *v = at(V_AT);
    kvd_failure err;
    for (uint32_t i = 0; i < n; i++)
        s->token[s->length + i] = (uint32_t)(uniform() * 0x1p32);
    for (int l = 0; l < LAYERS; l++)
        for (uint32_t i = 0; i < n; i++)
            for (int c = 0; c < ROW; c++) {
                k[((uint32_t)l * n + i) * ROW + (uint32_t)c] =
                    bf16(value(s->token[s->length + i], 0, l, c));
                v[((uint32_t)l * n + i) * ROW + (uint32_t)c] =
                    bf16(value(s->token[s->length + i], 1, l, c));
            }
    kvd_item item =
        KVD_NEW(kvd_item, .sequence = s->id, .position = s->length, .tokens = n,
                .k = {.buffer = buffer, .offset = K_AT}, .v = {.buffer = buffer, .offset = V_AT},
                .request = kvd_request_new(client));
    if (done(kvd_append(client, (kvd_layers){0, 0}, &item, 1, &err), &err)) {
        s->length += n;
        s->known = false;
    }
}

static void attend(struct sequence *s)
{
    kvd_failure err;
    kvd_item item = KVD_NEW(kvd_item, .sequence = s->id, .tokens = 1,
                            .q = {.buffer = buffer, .offset = Q_AT, .dtype = KVD_F32},
                            .o = {.buffer = buffer, .offset = O_AT, .dtype = KVD_F32});
    if (s->length == 0 || !done(kvd_attend(client, (kvd_layers){0, 0}, NULL, &item, 1, &err), &err))
        return;
    if (s->known)
        check(memcmp(s->out, at(O_AT), sizeof(s->out)) == 0, "another output", s);
    memcpy(s->out, at(O_AT), sizeof(s->out));
    s->known = true;
}

static void look(const struct sequence *s)
{
    kvd_failure err;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    if (done(kvd_sequence_describe(client, s->id, &info, &err), &err))
        check(info.length == s->length, "another length", s);
    if (!exact || s->length == 0)
        return;
    uint32_t begin = below(s->length), n = 1 + below(LOOK);
    n = n < s->length - begin ? n : s->length - begin;
    kvd_tensor_ref k = {.buffer = buffer, .offset = K_AT, .dtype = KVD_F32};
    kvd_tensor_ref v = {.buffer = buffer, .offset = V_AT, .dtype = KVD_F32};
    if (!done(kvd_read_tokens(client, (kvd_layers){0, 0}, s->id, begin, n, &k, &v, &err), &err))
        return;
    const float *got[] = {at(K_AT), at(V_AT)};
    bool same = true;
    for (int side = 0; side < 2; side++)
        for (int l = 0; l < LAYERS; l++)
            for (uint32_t i = 0; i < n; i++)
                for (int c = 0; c < ROW; c++)
                    same &= got[side][((uint32_t)l * n + i) * ROW + (uint32_t)c] ==
                            value(s->token[begin + i], side, l, c);
    check(same, "other tokens", s);
}

static void drop(struct sequence *s)
{
    kvd_failure err;
    if (done(kvd_sequences_free(client, &s->id, 1, below(2), &err), &err))
        *s = seqs[--n_seqs];
}

static void create(void)
{
    kvd_failure err;
    struct sequence *s = &seqs[n_seqs];
    if (done(kvd_sequences_create(client, 1, &s->id, &err), &err)) {
        s->length = 0;
        s->known = false;
        n_seqs++;
    }
}

static void fork_one(const struct sequence *s)
{
    kvd_failure err;
    struct sequence *child = &seqs[n_seqs];
    uint64_t id;
    if (!done(kvd_sequence_fork(client, s->id, 1, &id, &err), &err))
        return;
    *child = *s;
    child->id = id;
    n_seqs++;
}

static void truncate_one(struct sequence *s)
{
    kvd_failure err;
    uint32_t length = s->length - below(s->length < 100 ? s->length + 1 : 100);
    if (done(kvd_sequence_truncate(client, s->id, length, &err), &err)) {
        s->known &= length == s->length;
        s->length = length;
    }
}

// Under one of a few names, and found by it.
static void publish(const struct sequence *s)
{
    kvd_failure err;
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    char text[60];
    snprintf(text, sizeof(text), "%s.%u", name, below(8));
    if (!done(kvd_sequence_publish(client, s->id, text, true, &err), &err) ||
        !done(kvd_sequence_attach(client, text, &info, &err), &err))
        return;
    check(info.sequence == s->id && info.length == s->length, "another under the name", s);
    while (!done(kvd_sequences_free(client, &info.sequence, 1, false, &err), &err))
        ;
}

static void one_operation(void)
{
    struct sequence *s = &seqs[below(n_seqs ? n_seqs : 1)];
    uint32_t what = n_seqs ? below(20) : 0;
    if (what < 2 && n_seqs < SEQS)
        create();
    else if (what < 8)
        append(s, below(4) ? 1 + below(3) : 1 + below(MOST));
    else if (what < 12)
        attend(s);
    else if (what < 14)
        look(s);
    else if (what < 15 && n_seqs < SEQS)
        fork_one(s);
    else if (what < 17)
        truncate_one(s);
    else if (what < 19)
        publish(s);
    else
        drop(s);
    operations++;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return fprintf(stderr, "usage: mixed ADDRESS bf16|int2 SEED\n"), 2;
    const uint32_t layers[LAYERS] = {0, 1};
    kvd_failure err;
    exact = strcmp(argv[2], "bf16") == 0;
    rng ^= strtoull(argv[3], NULL, 0) * 0x9e3779b97f4a7c15ull;
    snprintf(name, sizeof(name), "mixed.%s", argv[3]);
    kvd_options options =
        KVD_NEW(kvd_options, .address = argv[1], .client_name = name, .layers = layers,
                .n_layers = LAYERS, .q_heads = HEADS, .kv_heads = KV, .head_dim_k = DIM,
                .head_dim_v = DIM, .codec = argv[2], .timeout_ms = 120000);
    if (kvd_open(&options, &client, &err) || kvd_buffer_new(client, O_AT + OUT * 4, &buffer, &err))
        return fprintf(stderr, "%s\n", err.text), 1;
    for (int i = 0; i < OUT; i++)
        ((float *)at(Q_AT))[i] = normal();
    printf("ready\n");
    fflush(stdout);
    struct pollfd in = {.fd = 0, .events = POLLIN};
    while (!wrong && poll(&in, 1, 0) == 0)
        one_operation();
    for (uint32_t i = 0; i < n_seqs && !wrong; i++) {
        attend(&seqs[i]);
        look(&seqs[i]);
    }
    printf("%llu %llu\n", (unsigned long long)operations, (unsigned long long)refused);
    kvd_close(&client);
    return wrong ? 1 : 0;
}
