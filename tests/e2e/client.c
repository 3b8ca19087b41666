// libkvd's promises that are not about numbers, each a subcommand that exits with 0 if it is kept.
// usage: client layout
//        client sized|replayed|holds|shapes|deadlines|reconnect|queue|queue_killed|queue_gpu
//        ADDRESS client fork ADDRESS [first|after|outlived] client remote ADDRESS UNIX_ADDRESS
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"

kvd_client *client;
kvd_buffer *buffer;
uint64_t id;
kvd_failure failure;

void need(int line, bool ok)
{
    if (!ok) {
        fprintf(stderr, "line %d: %s\n", line, failure.text);
        exit(1);
    }
}

kvd_options options_of(const char *address)
{
    static const uint32_t layers[LAYERS] = {1, 4};
    return (kvd_options){.size = sizeof(kvd_options),
                         .address = address,
                         .tls_ca = getenv("KVD_TEST_CA"),
                         .tls_cert = getenv("KVD_TEST_CERT"),
                         .tls_key = getenv("KVD_TEST_KEY"),
                         .tls_server_name = getenv("KVD_TEST_SERVER"),
                         .client_name = "client-test",
                         .timeout_ms = 10000,
                         .layers = layers,
                         .n_layers = LAYERS,
                         .q_heads = HEADS,
                         .kv_heads = KV,
                         .head_dim_k = DIM_K,
                         .head_dim_v = DIM_V};
}

void open_client(const char *address)
{
    kvd_options o = options_of(address);
    NEED(kvd_open(&o, &client, ERR) == 0);
    NEED(kvd_buffer_new(client, BYTES, &buffer, ERR) == 0);
    NEED(kvd_sequences_create(client, 1, &id, ERR) == 0);
}

kvd_item item_of(uint32_t tokens)
{
    return (kvd_item){.size = sizeof(kvd_item),
                      .sequence = id,
                      .tokens = tokens,
                      .k = {buffer},
                      .v = {buffer, .offset = V_AT},
                      .q = {buffer, .offset = Q_AT},
                      .o = {buffer, .offset = O_AT, .dtype = KVD_F32}};
}

const kvd_layers ALL = {0, 0};

// -- layout: every public structure, for other languages to compare with ------------------------

#define STRUCT(type) printf("%s - 0 %zu\n", #type, sizeof(type))
#define FIELD(type, field)                                                                         \
    printf("%s %s %zu %zu\n", #type, #field, offsetof(type, field), sizeof(((type *)NULL)->field))

static void print_options(void)
{
    STRUCT(kvd_options);
    FIELD(kvd_options, size);
    FIELD(kvd_options, address);
    FIELD(kvd_options, namespace_name);
    FIELD(kvd_options, client_name);
    FIELD(kvd_options, timeout_ms);
    FIELD(kvd_options, layers);
    FIELD(kvd_options, n_layers);
    FIELD(kvd_options, q_heads);
    FIELD(kvd_options, kv_heads);
    FIELD(kvd_options, head_dim_k);
    FIELD(kvd_options, head_dim_v);
    FIELD(kvd_options, codec);
    FIELD(kvd_options, rotation_set);
    FIELD(kvd_options, sink);
    FIELD(kvd_options, recent);
    FIELD(kvd_options, no_windows);
    FIELD(kvd_options, lease_ms);
    FIELD(kvd_options, tls_ca);
    FIELD(kvd_options, tls_cert);
    FIELD(kvd_options, tls_key);
    FIELD(kvd_options, tls_server_name);
    FIELD(kvd_options, windows);
    FIELD(kvd_options, sinks);
    FIELD(kvd_options, n_sinks);
    FIELD(kvd_options, planes);
    FIELD(kvd_options, n_planes);
    FIELD(kvd_options, tp_rank);
    FIELD(kvd_options, tp_size);
    FIELD(kvd_options, pages);
    FIELD(kvd_options, latent);
    STRUCT(kvd_plane_options);
    FIELD(kvd_plane_options, size);
    FIELD(kvd_plane_options, layers);
    FIELD(kvd_plane_options, n_layers);
    FIELD(kvd_plane_options, q_heads);
    FIELD(kvd_plane_options, kv_heads);
    FIELD(kvd_plane_options, head_dim_k);
    FIELD(kvd_plane_options, head_dim_v);
    FIELD(kvd_plane_options, codec);
    FIELD(kvd_plane_options, window);
    FIELD(kvd_plane_options, sink);
    FIELD(kvd_plane_options, recent);
    FIELD(kvd_plane_options, no_windows);
    FIELD(kvd_plane_options, latent);
    STRUCT(kvd_direct_options);
    FIELD(kvd_direct_options, size);
    FIELD(kvd_direct_options, slots);
    FIELD(kvd_direct_options, max_tokens);
    FIELD(kvd_direct_options, step_tokens);
    FIELD(kvd_direct_options, dtype);
    FIELD(kvd_direct_options, attention);
    FIELD(kvd_direct_options, tail_tokens);
}

static void print_outputs(void)
{
    STRUCT(kvd_failure);
    FIELD(kvd_failure, code);
    FIELD(kvd_failure, text);
    STRUCT(kvd_info);
    FIELD(kvd_info, size);
    FIELD(kvd_info, version);
    FIELD(kvd_info, backend);
    FIELD(kvd_info, instance);
    FIELD(kvd_info, rotation_set);
    FIELD(kvd_info, n_planes);
    FIELD(kvd_info, planes);
    FIELD(kvd_info, layout_digest);
    FIELD(kvd_info, device_uuid);
    STRUCT(kvd_plane_info);
    FIELD(kvd_plane_info, bf16_page_bytes);
    FIELD(kvd_plane_info, codec_page_bytes);
    FIELD(kvd_plane_info, sink);
    FIELD(kvd_plane_info, recent);
    STRUCT(kvd_plane_tokens);
    FIELD(kvd_plane_tokens, sink);
    FIELD(kvd_plane_tokens, freed);
    FIELD(kvd_plane_tokens, history);
    FIELD(kvd_plane_tokens, recent);
    STRUCT(kvd_sequence_info);
    FIELD(kvd_sequence_info, size);
    FIELD(kvd_sequence_info, sequence);
    FIELD(kvd_sequence_info, length);
    FIELD(kvd_sequence_info, n_planes);
    FIELD(kvd_sequence_info, planes);
    FIELD(kvd_sequence_info, pending_length);
    FIELD(kvd_sequence_info, pending_layers);
    FIELD(kvd_sequence_info, bytes);
    FIELD(kvd_sequence_info, holders);
    FIELD(kvd_sequence_info, name);
    FIELD(kvd_sequence_info, holds);
    STRUCT(kvd_event);
    FIELD(kvd_event, size);
    FIELD(kvd_event, kind);
    FIELD(kvd_event, sequence);
    FIELD(kvd_event, count);
    FIELD(kvd_event, name);
    FIELD(kvd_event, keys);
    FIELD(kvd_event, n_keys);
    FIELD(kvd_event, parent);
    FIELD(kvd_event, tokens);
    FIELD(kvd_event, miss);
    FIELD(kvd_event, tier);
    FIELD(kvd_event, number);
}

static void print_prompts(void)
{
    STRUCT(kvd_bytes);
    FIELD(kvd_bytes, data);
    FIELD(kvd_bytes, bytes);
    STRUCT(kvd_prompt);
    FIELD(kvd_prompt, size);
    FIELD(kvd_prompt, block_keys);
    FIELD(kvd_prompt, key_bytes);
    FIELD(kvd_prompt, blocks);
    FIELD(kvd_prompt, tokens);
    FIELD(kvd_prompt, n_tokens);
    FIELD(kvd_prompt, extras);
    FIELD(kvd_prompt, n_extras);
    STRUCT(kvd_match);
    FIELD(kvd_match, size);
    FIELD(kvd_match, blocks);
    FIELD(kvd_match, known);
    FIELD(kvd_match, window_tokens);
    FIELD(kvd_match, end);
    FIELD(kvd_match, lease);
    FIELD(kvd_match, miss);
    FIELD(kvd_match, missed);
    FIELD(kvd_match, restored);
    FIELD(kvd_match, behind);
    STRUCT(kvd_match_options);
    FIELD(kvd_match_options, size);
    FIELD(kvd_match_options, lease_ms);
    FIELD(kvd_match_options, restore_ms);
    FIELD(kvd_match_options, wait_ms);
    FIELD(kvd_match_options, tiers);
    FIELD(kvd_match_options, quiet);
    FIELD(kvd_match_options, recompute_window);
    STRUCT(kvd_published);
    FIELD(kvd_published, size);
    FIELD(kvd_published, blocks);
    FIELD(kvd_published, known);
    FIELD(kvd_published, end);
    STRUCT(kvd_page_keys);
    FIELD(kvd_page_keys, size);
    FIELD(kvd_page_keys, keys);
    FIELD(kvd_page_keys, key_bytes);
    FIELD(kvd_page_keys, pages);
    FIELD(kvd_page_keys, after);
    FIELD(kvd_page_keys, had);
    STRUCT(kvd_found);
    FIELD(kvd_found, size);
    FIELD(kvd_found, pages);
    FIELD(kvd_found, lease);
    FIELD(kvd_found, kinds);
    FIELD(kvd_found, restored);
    FIELD(kvd_found, behind);
    STRUCT(kvd_strides);
    FIELD(kvd_strides, block);
    FIELD(kvd_strides, head);
    FIELD(kvd_strides, token);
    FIELD(kvd_strides, dim);
    STRUCT(kvd_paged);
    FIELD(kvd_paged, size);
    FIELD(kvd_paged, k);
    FIELD(kvd_paged, v);
    FIELD(kvd_paged, k_bytes);
    FIELD(kvd_paged, v_bytes);
    FIELD(kvd_paged, k_strides);
    FIELD(kvd_paged, v_strides);
    FIELD(kvd_paged, all_blocks);
    FIELD(kvd_paged, block_tokens);
    FIELD(kvd_paged, blocks);
    FIELD(kvd_paged, n_blocks);
    FIELD(kvd_paged, first_token);
    FIELD(kvd_paged, on_gpu);
    FIELD(kvd_paged, stream);
    STRUCT(kvd_ended);
    FIELD(kvd_ended, size);
    FIELD(kvd_ended, result);
    FIELD(kvd_ended, ticket);
    FIELD(kvd_ended, us);
    FIELD(kvd_ended, failure);
}

static void print_items(void)
{
    STRUCT(kvd_layers);
    FIELD(kvd_layers, begin);
    FIELD(kvd_layers, count);
    STRUCT(kvd_tensor_ref);
    FIELD(kvd_tensor_ref, buffer);
    FIELD(kvd_tensor_ref, offset);
    FIELD(kvd_tensor_ref, layer_stride);
    FIELD(kvd_tensor_ref, token_stride);
    FIELD(kvd_tensor_ref, head_stride);
    FIELD(kvd_tensor_ref, dtype);
    STRUCT(kvd_item);
    FIELD(kvd_item, size);
    FIELD(kvd_item, sequence);
    FIELD(kvd_item, position);
    FIELD(kvd_item, tokens);
    FIELD(kvd_item, k);
    FIELD(kvd_item, v);
    FIELD(kvd_item, q);
    FIELD(kvd_item, o);
    FIELD(kvd_item, lse);
    FIELD(kvd_item, replayed);
    FIELD(kvd_item, request);
    STRUCT(kvd_attention);
    FIELD(kvd_attention, size);
    FIELD(kvd_attention, scale);
    FIELD(kvd_attention, softcap);
    FIELD(kvd_attention, window);
}

// -- sized: programs of another age -------------------------------------------------------------

// kvd_item as the first release had it, and as one to come may.
struct old_item {
    uint8_t bytes[offsetof(kvd_item, replayed)];
};
struct new_item {
    kvd_item item;
    uint64_t more;
};

static void old_and_new_items(void)
{
    union {
        struct old_item items[3];
        uint64_t align;
    } old;
    for (uint64_t i = 0; i < 2; i++) { // an array of smaller structures
        kvd_item item = item_of(3);
        NEED(kvd_sequences_create(client, 1, &item.sequence, ERR) == 0);
        item.size = sizeof(struct old_item);
        memcpy(&old.items[i], &item, sizeof(struct old_item));
    }
    memset(&old.items[2], 0xff, sizeof(struct old_item)); // where `replayed` of a new one would be
    NEED(kvd_append(client, ALL, (const kvd_item *)(const void *)&old, 2, ERR) == 0);

    struct new_item new[2] = {{.item = item_of(3)}, {.item = item_of(3)}};
    NEED(kvd_sequences_create(client, 1, &new[1].item.sequence, ERR) == 0);
    new[0].item.size = new[1].item.size = sizeof(struct new_item);
    new[1].more = 1;
    NEED(kvd_append(client, ALL, &new[0].item, 2, ERR) == KVD_ERR_INVALID);
    NEED(strstr(failure.text, "items[1]: this libkvd (") && strstr(failure.text, "is older"));
    new[1].more = 0;
    NEED(kvd_append(client, ALL, &new[0].item, 2, ERR) == 0);
    new[0].item.size = new[1].item.size = 0;
    NEED(kvd_append(client, ALL, &new[0].item, 2, ERR) == KVD_ERR_INVALID);
    NEED(strstr(failure.text, "items[0]: kvd_item.size is 0: set it to sizeof(kvd_item)"));
    kvd_item uneven[2] = {item_of(1), item_of(1)};
    uneven[1].size += 8;
    NEED(kvd_append(client, ALL, uneven, 2, ERR) == KVD_ERR_INVALID);
}

// Pointers of each function that a client's own mistake may leave out.
static void nothing_to_write_to(void)
{
    kvd_options o = options_of("unix:/nowhere");
    kvd_direct_options d = KVD_NEW(kvd_direct_options, .slots = 1, .max_tokens = 100);
    NEED(kvd_open(&o, NULL, ERR) == KVD_ERR_INVALID && strstr(failure.text, "out is NULL"));
    NEED(kvd_open(NULL, &client, ERR) == KVD_ERR_INVALID);
    NEED(kvd_buffer_new(client, 64, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_buffer_new(client, 1ull << 60, &buffer, ERR) == KVD_ERR_INTERNAL &&
         strstr(failure.text, "the host has"));
    NEED(kvd_buffer_cuda_fd(client, 0, 64, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_buffer_cuda_ipc(client, NULL, 0, 64, &buffer, ERR) == KVD_ERR_INVALID &&
         strstr(failure.text, "handle is NULL"));
    NEED(kvd_sequences_create(client, 1, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_sequence_fork(client, id, 1, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_sequence_publish(client, id, NULL, false, ERR) == KVD_ERR_INVALID);
    NEED(kvd_sequence_attach(client, "p", NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_sequence_describe(client, id, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_sequences_free(client, NULL, 1, false, ERR) == KVD_ERR_INVALID);
    NEED(kvd_get_info(client, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_append(client, ALL, NULL, 1, ERR) == KVD_ERR_INVALID);
    NEED(kvd_direct_open(client, &d, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_next_event(client, 0, NULL, ERR) == KVD_ERR_INVALID);
}

static int sized(const char *address)
{
    kvd_options o = options_of(address);
    o.size = 0;
    NEED(kvd_open(&o, &client, ERR) == KVD_ERR_INVALID && strstr(failure.text, "kvd_options.size"));
    o = options_of("");
    NEED(kvd_open(&o, &client, ERR) == KVD_ERR_INVALID && strstr(failure.text, "address is empty"));
    open_client(address);
    old_and_new_items();
    struct {
        kvd_info info;
        uint32_t more;
        uint32_t beyond;
    } out = {.info.size = sizeof(kvd_info) + 4, .more = 1, .beyond = 1};
    NEED(kvd_get_info(client, &out.info, ERR) == 0);
    NEED(out.info.size == sizeof(kvd_info) + 4 && out.more == 0 && out.beyond == 1);
    NEED(out.info.version && out.info.planes[0].recent == 256);
    kvd_sequence_info info = {0};
    NEED(kvd_sequence_describe(client, id, &info, ERR) == KVD_ERR_INVALID);
    NEED(strstr(failure.text, "kvd_sequence_info.size is 0"));
    nothing_to_write_to();
    kvd_event event = {0};
    NEED(kvd_next_event(client, 0, &event, ERR) == KVD_ERR_INVALID);
    kvd_direct *direct;
    kvd_direct_options d = {.slots = 1, .max_tokens = 100};
    NEED(kvd_direct_open(client, &d, &direct, ERR) == KVD_ERR_INVALID);
    kvd_attention a = {.scale = 1};
    d = KVD_NEW(kvd_direct_options, .slots = 1, .max_tokens = 100, .attention = &a);
    NEED(kvd_direct_open(client, &d, &direct, ERR) == KVD_ERR_INVALID);
    NEED(strstr(failure.text, "kvd_attention.size"));
    kvd_item item = item_of(1);
    NEED(kvd_attend(client, ALL, &a, &item, 1, ERR) == KVD_ERR_INVALID);
    kvd_close(&client);
    return 0;
}

// -- replayed -----------------------------------------------------------------------------------

static int replayed(const char *address)
{
    bool before[2] = {true, true};
    open_client(address);
    kvd_item items[2] = {item_of(5), item_of(5)};
    NEED(kvd_sequences_create(client, 1, &items[1].sequence, ERR) == 0);
    items[1].o.offset += LAYERS * 5 * HEADS * DIM_V * 4; // of its own
    items[0].replayed = &before[0];
    items[1].replayed = &before[1];
    items[0].request = kvd_request_new(client);
    items[1].request = kvd_request_new(client);
    NEED(kvd_append(client, ALL, items, 1, ERR) == 0 && !before[0]);
    NEED(kvd_append(client, ALL, items, 1, ERR) == 0 && before[0]);
    before[0] = false;
    NEED(kvd_append(client, ALL, items, 2, ERR) == 0 && before[0] && !before[1]);
    items[0].position = items[1].position = 5;
    // The same numbers for other tokens, and other numbers for the same: neither is a repeat.
    NEED(kvd_step(client, ALL, NULL, items, 2, ERR) == KVD_ERR_PRECONDITION);
    items[0].request = kvd_request_new(client);
    items[1].request = kvd_request_new(client);
    before[0] = before[1] = true;
    NEED(kvd_step(client, ALL, NULL, items, 2, ERR) == 0 && !before[0] && !before[1]);
    NEED(kvd_enqueue(client, NULL, KVD_CALL_STEP, ALL, NULL, items, 2, ERR) == 0);
    NEED(kvd_enqueued(client, ERR) == 0 && before[0] && before[1]);
    items[0].replayed = NULL;
    NEED(kvd_step(client, ALL, NULL, items, 2, ERR) == 0 && before[1]);
    items[1].request = 0;
    NEED(kvd_append(client, ALL, &items[1], 1, ERR) == KVD_ERR_PRECONDITION);
    kvd_close(&client);
    return 0;
}

// -- holds: who attaches twice frees twice ------------------------------------------------------

static int holds(const char *address)
{
    kvd_sequence_info one = KVD_NEW(kvd_sequence_info), two = one, now = one;
    kvd_client *maker;
    kvd_options o = options_of(address);
    kvd_item item = {0};
    open_client(address);
    item = item_of(5);
    NEED(kvd_append(client, ALL, &item, 1, ERR) == 0);
    NEED(kvd_sequence_publish(client, id, "p", false, ERR) == 0);
    maker = client;
    NEED(kvd_open(&o, &client, ERR) == 0 && kvd_buffer_new(client, BYTES, &buffer, ERR) == 0);
    uint64_t request = kvd_request_new(client);
    NEED(kvd_sequence_attach(client, "p", &one, ERR) == 0 && one.holds == 1 && one.holders == 2);
    NEED(kvd_request_new(client) == request + 2); // of which one is the attach's
    NEED(kvd_sequence_attach(client, "p", &two, ERR) == 0 && two.holds == 2 && two.holders == 2);
    NEED(one.sequence == two.sequence && one.length == 5);
    NEED(kvd_sequences_free(client, &one.sequence, 1, false, ERR) == 0);
    NEED(kvd_sequence_describe(client, two.sequence, &now, ERR) == 0 && now.holds == 1);
    item = item_of(1);
    item.sequence = two.sequence;
    NEED(kvd_attend(client, ALL, NULL, &item, 1, ERR) == 0); // the other handle is good
    NEED(kvd_sequences_free(client, (uint64_t[]){two.sequence, two.sequence}, 2, false, ERR) ==
         KVD_ERR_NOT_FOUND);
    NEED(kvd_sequences_free(client, &two.sequence, 1, false, ERR) == 0);
    NEED(kvd_sequence_describe(client, two.sequence, &now, ERR) == KVD_ERR_NOT_FOUND);
    kvd_close(&client);
    kvd_close(&maker);
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "layout") == 0) {
        print_options();
        print_outputs();
        print_items();
        print_prompts();
        return 0;
    }
    if (argc < 3)
        return 2;
    if (strcmp(what, "sized") == 0)
        return sized(argv[2]);
    if (strcmp(what, "replayed") == 0)
        return replayed(argv[2]);
    if (strcmp(what, "holds") == 0)
        return holds(argv[2]);
    if (strcmp(what, "shapes") == 0)
        return shapes(argv[2]);
    if (strcmp(what, "fork") == 0)
        return forks(argv[2], argc > 3 ? argv[3] : "");
    if (strcmp(what, "deadlines") == 0)
        return deadlines(argv[2]);
    if (strcmp(what, "remote") == 0)
        return remotes(argv[2], argc > 3 ? argv[3] : argv[2]);
    if (strcmp(what, "reconnect") == 0)
        return reconnects(argv[2]);
    if (strcmp(what, "queue") == 0)
        return queues(argv[2]);
    if (strcmp(what, "queue_killed") == 0)
        return queues_killed(argv[2]);
    if (strcmp(what, "queue_gpu") == 0)
        return queues_gpu(argv[2]);
    return 2;
}
