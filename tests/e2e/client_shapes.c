// Tensors that do not fit are refused by libkvd itself, before anything is sent or stored.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"

static kvd_buffer *foreign;

// One thing wrong with a step of 7 tokens in all layers, and what the error says.
struct wrong {
    const char *words;
    void (*spoil)(kvd_item *item, kvd_attention *a, kvd_layers *l);
};

#define SPOIL(name, ...)                                                                           \
    static void name(kvd_item *i, kvd_attention *a, kvd_layers *l)                                 \
    {                                                                                              \
        (void)i;                                                                                   \
        (void)a;                                                                                   \
        (void)l;                                                                                   \
        __VA_ARGS__;                                                                               \
    }

SPOIL(no_k, i->k.buffer = NULL)
SPOIL(no_o, i->o.buffer = NULL)
SPOIL(foreign_v, i->v.buffer = foreign)
SPOIL(f32_k, i->k.dtype = KVD_F32)
SPOIL(odd_dtype, i->q.dtype = (kvd_dtype_t)7)
SPOIL(past_the_end, i->o.offset = BYTES - 64)
SPOIL(far_past_the_end, i->k.offset = BYTES + 2)
SPOIL(offset_overflows, i->k.offset = UINT64_MAX - 7)
SPOIL(stride_overflows, i->k.layer_stride = UINT64_MAX - 1)
SPOIL(dense_overflows, i->v.head_stride = 1ull << 63)
SPOIL(token_stride_long, i->q.token_stride = BYTES)
SPOIL(odd_offset, i->k.offset = 1)
SPOIL(odd_stride, i->o.token_stride = 2 * HEADS * DIM_V * 4 + 2)
SPOIL(heads_overlap, i->o.head_stride = DIM_V * 4 - 4)
SPOIL(tokens_overlap, i->o.token_stride = DIM_V * 4)
SPOIL(layers_overlap, i->o.layer_stride = HEADS * DIM_V * 4)
SPOIL(short_lse, i->lse = ((kvd_tensor_ref){buffer, .offset = BYTES - 4}))
SPOIL(odd_lse, i->lse = ((kvd_tensor_ref){buffer, .offset = O_AT + 2}))
SPOIL(no_tokens, i->tokens = 0)
SPOIL(many_tokens, i->tokens = 65537)
SPOIL(far_position, i->position = 1ull << 40)
SPOIL(layer_beyond, l->begin = LAYERS)
SPOIL(layers_beyond, l->count = LAYERS + 1)
SPOIL(layers_wrap, (l->begin = 1, l->count = UINT32_MAX))
SPOIL(window, a->window = (uint32_t)-1)
SPOIL(scale, a->scale = NAN)
SPOIL(softcap, a->softcap = -1)

static const struct wrong wrongs[] = {
    {"items[1]: k is missing", no_k},
    {"items[1]: o is missing", no_o},
    {"items[1]: v: its buffer belongs to another client", foreign_v},
    {"items[1]: k: dtype is f32", f32_k},
    {"items[1]: q: dtype is 7", odd_dtype},
    {"items[1]: o: f32 [2 layers][7 tokens][6 heads][64] takes 21504 bytes from offset",
     past_the_end},
    {"items[1]: k: bf16 [2 layers][7 tokens][2 heads][128] takes 7168 bytes", far_past_the_end},
    {"items[1]: k: offset and strides overflow", offset_overflows},
    {"items[1]: k: ", stride_overflows},
    {"items[1]: v: offset and strides overflow", dense_overflows},
    {"items[1]: q: bf16 ", token_stride_long},
    {"items[1]: k: offset and strides must be multiples of its elements' 2", odd_offset},
    {"items[1]: o: offset and strides must be multiples of its elements' 4", odd_stride},
    {"items[1]: o: strides of", heads_overlap},
    {"items[1]: o: strides of", tokens_overlap},
    {"items[1]: o: strides of", layers_overlap},
    {"items[1]: lse: f32 [2 layers][7 tokens][6 heads][1] takes 336 bytes", short_lse},
    {"items[1]: lse: offset", odd_lse},
    {"items[1]: tokens is 0", no_tokens},
    {"items[1]: tokens is 65537", many_tokens},
    {"items[1]: 7 tokens from position 1099511627776", far_position},
    {"layers 2 to 2 are not all", layer_beyond},
    {"layers 0 to 2 are not all", layers_beyond},
    {"layers 1 to 4294967295 are not all", layers_wrap},
    {"attention: window is 4294967295", window},
    {"attention: scale is nan", scale},
    {"attention: scale is 0 and softcap -1", softcap},
};

static void refused(int line, kvd_result rc, const char *words)
{
    if (rc != KVD_ERR_INVALID || !strstr(failure.text, words)) {
        fprintf(stderr, "line %d: wanted \"%s\", got %d: %s\n", line, words, (int)rc,
                rc ? failure.text : "no error");
        exit(1);
    }
}
#define REFUSED(call, words) refused(__LINE__, call, words)

static void wrong_steps(void)
{
    uint64_t other;
    NEED(kvd_sequences_create(client, 1, &other, ERR) == 0);
    for (size_t i = 0; i < sizeof(wrongs) / sizeof(*wrongs); i++) {
        kvd_item items[2] = {item_of(7), item_of(7)};
        kvd_attention a = KVD_NEW(kvd_attention, .scale = 0);
        kvd_layers l = ALL;
        items[1].sequence = other;
        wrongs[i].spoil(&items[1], &a, &l);
        REFUSED(kvd_step(client, l, &a, items, 2, ERR), wrongs[i].words);
        REFUSED(kvd_enqueue(client, NULL, KVD_CALL_STEP, l, &a, items, 2, ERR), wrongs[i].words);
    }
    kvd_item item = item_of(1);
    REFUSED(kvd_step(client, ALL, NULL, &item, 0, ERR), "0 items");
    REFUSED(kvd_append(client, ALL, NULL, 1, ERR), "no items");
    REFUSED(kvd_enqueue(client, NULL, (kvd_call_kind)9, ALL, NULL, &item, 1, ERR), "call 9");
    // An append wants no q and no o, an attend no k and no v.
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    NEED(kvd_sequence_describe(client, other, &info, ERR) == 0 && info.length == 0);
    kvd_item some = item_of(7);
    some.q.buffer = some.o.buffer = NULL;
    NEED(kvd_append(client, ALL, &some, 1, ERR) == 0);
    some = item_of(7);
    some.k.buffer = some.v.buffer = NULL;
    // Heads first: strides that nest are fine in any order.
    some.o.token_stride = DIM_V * 4;
    some.o.head_stride = 7 * DIM_V * 4;
    some.o.layer_stride = 7 * HEADS * DIM_V * 4;
    NEED(kvd_attend(client, ALL, NULL, &some, 1, ERR) == 0);
}

static void wrong_reads_and_rotations(void)
{
    kvd_tensor_ref x = {.buffer = buffer}, y = {buffer, .offset = BYTES - 8},
                   z = {buffer, .offset = V_AT};
    REFUSED(kvd_read_tokens(client, ALL, id, 0, 7, NULL, NULL, ERR), "neither k nor v");
    REFUSED(kvd_read_tokens(client, ALL, id, 0, 7, &x, &y, ERR), "v: bf16 [2 layers][7 tokens]");
    REFUSED(kvd_read_tokens(client, ALL, id, 0, 0, &x, NULL, ERR), "count is 0");
    REFUSED(kvd_read_tokens(client, ALL, id, UINT64_MAX, 7, &x, NULL, ERR), "from position");
    NEED(kvd_read_tokens(client, ALL, id, 0, 7, &x, &z, ERR) == 0);
    z.offset = 2;
    REFUSED(kvd_read_tokens(client, ALL, id, 0, 7, &x, &z, ERR), "shares memory with");
    REFUSED(kvd_rotate(client, KVD_KEYS, false, ALL, 7, 3, &x, &x, ERR), "heads is 3");
    REFUSED(kvd_rotate(client, KVD_KEYS, false, ALL, 7, KV, &x, &y, ERR), "y: bf16");
    REFUSED(kvd_rotate(client, KVD_KEYS, false, ALL, 0, KV, &x, &x, ERR), "rows is 0");
    REFUSED(kvd_rotate(client, KVD_KEYS, false, ALL, 7, KV, NULL, &x, ERR), "x is missing");
    REFUSED(kvd_rotate(client, (kvd_row_kind)3, false, ALL, 7, KV, &x, &x, ERR), "kind is 3");
    NEED(kvd_rotate(client, KVD_KEYS, false, ALL, 7, KV, &x, &x, ERR) == 0);
}

static void wrong_direct(void)
{
    enum { SLOTS = 2, KB = SLOTS * KV * DIM_K * 2, VB = SLOTS * KV * DIM_V * 2 };
    enum { QB = SLOTS * HEADS * DIM_K * 4, OB = SLOTS * HEADS * DIM_V * 4, LB = SLOTS * HEADS * 4 };
    kvd_direct *d;
    kvd_attention a = KVD_NEW(kvd_attention, .window = UINT32_MAX);
    kvd_direct_options o = KVD_NEW(kvd_direct_options, .slots = SLOTS, .max_tokens = 100,
                                   .dtype = KVD_F32, .attention = &a);
    REFUSED(kvd_direct_open(client, &o, &d, ERR), "window is 4294967295");
    a.window = 0;
    o.dtype = (kvd_dtype_t)3;
    REFUSED(kvd_direct_open(client, &o, &d, ERR), "dtype is 3");
    o.dtype = KVD_F32;
    NEED(kvd_direct_open(client, &o, &d, ERR) == 0);
    float *m = aligned_alloc(64, 1 << 16), *to = m + (1 << 13);
    memset(m, 0, 1 << 16);
    REFUSED(kvd_direct_bind(d, 2, id, ERR), "slot 2");
    NEED(kvd_direct_bind(d, 0, id, ERR) == 0 && kvd_direct_begin(d, NULL, ERR) == 0);
    REFUSED(kvd_store_enqueue(d, NULL, 2, m, KB, m, VB, ERR), "layer 2 of 2");
    REFUSED(kvd_store_enqueue(d, NULL, 0, m, 2 * KB, m, VB, ERR),
            "k has 2048 bytes; bf16 [2 slots x tokens][2 heads][128] takes 1024");
    REFUSED(kvd_store_enqueue(d, NULL, 0, m, KB, m, VB - 2, ERR), "v has 510 bytes");
    REFUSED(kvd_store_enqueue(d, NULL, 0, NULL, KB, m, VB, ERR), "k lies at");
    REFUSED(kvd_store_enqueue(d, NULL, 0, m, KB, m + 1, VB, ERR), "v lies at");
    REFUSED(kvd_attend_enqueue(d, NULL, 0, m, QB / 2, to, OB, NULL, 0, ERR),
            "q has 3072 bytes; f32");
    REFUSED(kvd_attend_enqueue(d, NULL, 0, m, QB, to, OB * 2, NULL, 0, ERR), "o has");
    REFUSED(kvd_attend_enqueue(d, NULL, 0, m, QB, to, OB, to, LB + 4, ERR), "lse has");
    REFUSED(kvd_attend_enqueue(d, NULL, 0, m, QB, to, OB, NULL, LB, ERR), "lse lies at");
    REFUSED(kvd_attend_enqueue(d, NULL, 0, m, QB, to, OB, to + OB / 4 - 1, LB, ERR),
            "o, which is written, shares memory with lse");
    REFUSED(kvd_attend_enqueue(d, NULL, 0, m, QB, m, OB, NULL, 0, ERR),
            "o, which is written, shares memory with q");
    kvd_info info = KVD_NEW(kvd_info);
    NEED(kvd_get_info(client, &info, ERR) == 0);
    if (strcmp(info.backend, "cpu") == 0) { // a GPU reads no memory of the host's
        NEED(kvd_store_enqueue(d, NULL, 0, m, KB, m, VB, ERR) == 0);
        NEED(kvd_attend_enqueue(d, NULL, 0, m, QB, to, OB, to + OB / 4, LB, ERR) == 0);
    }
    NEED(kvd_direct_end(d, NULL, NULL, ERR) == 0);
    kvd_direct_close(&d);
    free(m);
}

int shapes(const char *address)
{
    kvd_client *other;
    kvd_options o = options_of(address);
    open_client(address);
    NEED(kvd_open(&o, &other, ERR) == 0 && kvd_buffer_new(other, BYTES, &foreign, ERR) == 0);
    wrong_steps();
    wrong_reads_and_rotations();
    wrong_direct();
    kvd_close(&other);
    kvd_close(&client);
    return 0;
}
