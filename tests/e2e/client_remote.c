// A worker over TCP gets what one over the unix socket gets, whatever the strides, and its session
// lives while it says nothing.
// usage: client remote ADDRESS UNIX_ADDRESS
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client.h"

enum { TOKENS = 9, ROW = HEADS * DIM_V * 4, LSE_AT = BYTES - LAYERS * TOKENS * HEADS * 4 };
enum { OUT = LAYERS * TOKENS * ROW, LSE = LAYERS * TOKENS * HEADS * 4 };
enum { READ_AT = Q_AT, READ = LAYERS * TOKENS * KV * DIM_V * 2 };

struct outputs {
    uint8_t o[OUT], lse[LSE], read[READ], rotated[READ];
};

static void fill(void)
{
    uint16_t *values = kvd_buffer_data(buffer);
    for (int i = 0; i < O_AT / 2; i++)
        values[i] = (uint16_t)(0x3f00 + (i * 7919 + i / 13) % 251 + (i % 3 ? 0 : 0x8000));
}

// o with heads outermost, into a dense copy.
static void gather(uint8_t *to)
{
    const uint8_t *o = (const uint8_t *)kvd_buffer_data(buffer) + O_AT;
    for (int l = 0; l < LAYERS; l++)
        for (int t = 0; t < TOKENS; t++)
            for (int h = 0; h < HEADS; h++, to += DIM_V * 4)
                memcpy(to, o + (l * HEADS * TOKENS + h * TOKENS + t) * DIM_V * 4, DIM_V * 4);
}

static void work(struct outputs *out, bool strided)
{
    bool before = true;
    const uint8_t *data = kvd_buffer_data(buffer);
    kvd_tensor_ref read = {.buffer = buffer, .offset = READ_AT}, x = {.buffer = buffer};
    fill();
    kvd_item item = item_of(TOKENS);
    item.replayed = &before;
    item.lse = (kvd_tensor_ref){.buffer = buffer, .offset = LSE_AT};
    // K's tokens lie twice as far apart as they need.
    item.k.token_stride = 2 * KV * DIM_K * 2;
    NEED(kvd_append(client, ALL, &item, 1, ERR) == 0 && !before);
    if (strided) {
        item.o.token_stride = DIM_V * 4;
        item.o.head_stride = TOKENS * DIM_V * 4;
        item.o.layer_stride = TOKENS * ROW;
    }
    item.position = TOKENS;
    NEED(kvd_step(client, ALL, NULL, &item, 1, ERR) == 0 && !before);
    if (strided)
        gather(out->o);
    else
        memcpy(out->o, data + O_AT, OUT);
    memcpy(out->lse, data + LSE_AT, LSE);
    NEED(kvd_read_tokens(client, ALL, id, TOKENS, TOKENS, NULL, &read, ERR) == 0);
    memcpy(out->read, data + READ_AT, READ);
    NEED(kvd_rotate(client, KVD_VALUES, false, ALL, TOKENS, KV, &x, &read, ERR) == 0);
    memcpy(out->rotated, data + READ_AT, READ);
}

int remotes(const char *address, const char *here)
{
    static struct outputs far, near;
    kvd_options o = options_of(address);
    kvd_direct *direct;
    kvd_direct_options d = KVD_NEW(kvd_direct_options, .slots = 1, .max_tokens = 10);
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info);
    const char *lease = getenv("KVD_TEST_LEASE_MS");
    o.lease_ms = lease ? (uint32_t)atoi(lease) : 1000;
    NEED(kvd_open(&o, &client, ERR) == 0);
    NEED(kvd_buffer_new(client, BYTES, &buffer, ERR) == 0);
    NEED(kvd_sequences_create(client, 1, &id, ERR) == 0);
    work(&far, true);
    // kvd does not see where its outputs end up, so the library looks.
    kvd_item item = item_of(1);
    item.lse = item.o;
    NEED(kvd_attend(client, ALL, NULL, &item, 1, ERR) == KVD_ERR_INVALID &&
         strstr(failure.text, "items[0].o, which is written, shares memory with items[0].lse"));
    item.lse.buffer = NULL;
    item.o = item.q;
    NEED(kvd_attend(client, ALL, NULL, &item, 1, ERR) == KVD_ERR_INVALID);
    kvd_tensor_ref both = {.buffer = buffer, .offset = READ_AT};
    NEED(kvd_read_tokens(client, ALL, id, 0, TOKENS, &both, &both, ERR) == KVD_ERR_INVALID);
    NEED(kvd_direct_open(client, &d, &direct, ERR) == KVD_ERR_INVALID);
    usleep(o.lease_ms * 1700); // nearly twice
    NEED(kvd_sequence_describe(client, id, &info, ERR) == 0 && info.length == 2 * TOKENS);
    kvd_buffer_free(&buffer);
    kvd_close(&client);
    o = options_of(here);
    o.tls_ca = o.tls_cert = o.tls_key = o.tls_server_name = NULL;
    NEED(kvd_open(&o, &client, ERR) == 0);
    NEED(kvd_buffer_new(client, BYTES, &buffer, ERR) == 0);
    NEED(kvd_sequences_create(client, 1, &id, ERR) == 0);
    work(&near, false);
    kvd_close(&client);
    NEED(memcmp(far.o, near.o, OUT) == 0);
    NEED(memcmp(far.lse, near.lse, LSE) == 0);
    NEED(memcmp(far.read, near.read, READ) == 0);
    NEED(memcmp(far.rotated, near.rotated, READ) == 0);
    return 0;
}
