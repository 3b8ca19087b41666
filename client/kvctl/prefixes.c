// kvctl prefix ls|show|pin|unpin|priority|drop, kvctl why.
#include "client/kvctl/kvctl.h"
#include "proto/base.h"
#include "proto/kvd_limits.h"

#include <time.h>

// A block's key, of the hex digits that ls and events have, or of the base64 that they have with
// --json.
struct key {
    uint8_t bytes[KVD_BLOCK_KEY];
};

static bool take_hex(const char *hex, struct key *key)
{
    char digit[3] = {0};
    if (strlen(hex) != sizeof(key->bytes) * 2 ||
        strspn(hex, "0123456789abcdefABCDEF") != sizeof(key->bytes) * 2)
        return false;
    for (size_t i = 0; i < sizeof(key->bytes); i++) {
        memcpy(digit, hex + 2 * i, 2);
        key->bytes[i] = (uint8_t)strtoul(digit, NULL, 16);
    }
    return true;
}

static bool take_base64(const char *text, struct key *key)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    _Static_assert(KVD_BLOCK_KEY % 3 == 0, "no padding");
    if (strlen(text) != sizeof(key->bytes) / 3 * 4 || strspn(text, digits) != strlen(text))
        return false;
    for (size_t i = 0; i < sizeof(key->bytes); i += 3, text += 4) {
        uint32_t bits = 0;
        for (int d = 0; d < 4; d++)
            bits = bits << 6 | (uint32_t)(strchr(digits, text[d]) - digits);
        key->bytes[i] = (uint8_t)(bits >> 16);
        key->bytes[i + 1] = (uint8_t)(bits >> 8);
        key->bytes[i + 2] = (uint8_t)bits;
    }
    return true;
}

static int take_key(const char *text, struct key *key, ProtobufCBinaryData *out)
{
    if (!take_hex(text, key) && !take_base64(text, key))
        return kvctl_usage("'%s' is no key of a block: %zu hex digits, as prefix ls and events "
                           "show it, or %zu of base64, as they do with --json",
                           text, sizeof(key->bytes) * 2, sizeof(key->bytes) / 3 * 4);
    *out = (ProtobufCBinaryData){sizeof(key->bytes), key->bytes};
    return EXIT_OK;
}

static const char *hex_of(const ProtobufCBinaryData *data, char *out, size_t cap)
{
    size_t n = 0;
    for (size_t i = 0; i < data->len && n + 3 <= cap; i++, n += 2)
        snprintf(out + n, cap - n, "%02x", data->data[i]);
    return out;
}

static void add_row(struct table *t, const Kvd__V1__PrefixInfo *p)
{
    char hex[2 * KVD_BLOCK_KEY + 1] = "";
    table_cell(t, "%s", hex_of(&p->key, hex, sizeof(hex)));
    table_cell(t, "%llu", (unsigned long long)p->blocks * KVD_PAGE_TOKENS);
    table_cell(t, "%llu", (unsigned long long)p->adoptable * KVD_PAGE_TOKENS);
    table_cell(t, "%u", p->window_tokens);
    table_cell(t, "%s", p->end ? "yes" : "-");
    table_cell(t, "%u", p->holds);
    table_cell(t, "%s", p->pinned ? "yes" : "-");
}

// With --json: one answer of kvd's for each call that it takes.
int cmd_prefix_ls(struct kvctl *k)
{
    Kvd__V1__ListPrefixesRequest req = KVD__V1__LIST_PREFIXES_REQUEST__INIT;
    Kvd__V1__ListPrefixesReply *r = NULL;
    json_t *all = k->json ? json_array() : NULL;
    struct table *t = table_new("KEY|>TOKENS|>ADOPTABLE|>WINDOW|END|>HOLDS|PINNED");
    char size[32], text[160] = "";
    req.namespace_name = (char *)k->arguments[0];
    do {
        int code =
            kvctl_call(k, "ListPrefixes", &req, &kvd__v1__list_prefixes_reply__descriptor, &r);
        if (code) {
            json_decref(all);
            return code;
        }
        for (size_t i = 0; i < r->n_prefixes; i++)
            add_row(t, r->prefixes[i]);
        if (all)
            json_array_append_new(all, kvctl_to_json(&r->base));
        snprintf(text, sizeof(text), "%llu of %llu blocks, %s of pages",
                 (unsigned long long)r->blocks, (unsigned long long)r->capacity,
                 kvd_format_size(r->bytes, size, sizeof(size)));
        req.from = r->next;
        kvd__v1__list_prefixes_reply__free_unpacked(r, NULL);
    } while (req.from);
    if (all)
        return kvctl_print(k, all);
    table_print(t, "no prefixes");
    printf("%s\n", text);
    return EXIT_OK;
}

static int explain(struct kvctl *k, Kvd__V1__ExplainPrefixReply **r)
{
    Kvd__V1__ExplainPrefixRequest req = KVD__V1__EXPLAIN_PREFIX_REQUEST__INIT;
    struct key key;
    req.namespace_name = (char *)k->arguments[0];
    int code = take_key(k->arguments[1], &key, &req.key);
    return code ? code
                : kvctl_call(k, "ExplainPrefix", &req, &kvd__v1__explain_prefix_reply__descriptor,
                             r);
}

int cmd_why(struct kvctl *k)
{
    Kvd__V1__ExplainPrefixReply *r = NULL;
    char when[64] = "";
    int code = explain(k, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    time_t at = r->time;
    struct tm tm;
    if (r->time && localtime_r(&at, &tm))
        strftime(when, sizeof(when), ", %F %T", &tm);
    printf("%s%s\n", r->reason, when);
    if (strcmp(r->reason, "unknown") == 0)
        printf(
            "never published in this namespace, or gone for so long that kvd has forgotten it\n");
    kvd__v1__explain_prefix_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_prefix_show(struct kvctl *k)
{
    Kvd__V1__ExplainPrefixReply *r = NULL;
    char hex[65] = "";
    int code = explain(k, &r);
    if (code)
        return code;
    code = r->there ? EXIT_OK : EXIT_FAILED;
    if (k->json) {
        kvctl_print_json(k, &r->base);
        return code;
    }
    if (r->there) {
        const Kvd__V1__PrefixInfo *p = r->prefix;
        printf("tokens     %u\nadoptable  %u, the last %u of them in the recent window%s\n"
               "pinned     %s\npriority   %s\nlayout     %s\ndomain     %s\n",
               p->blocks * KVD_PAGE_TOKENS, p->adoptable * KVD_PAGE_TOKENS, p->window_tokens,
               p->end ? ", as it was at the end" : "", p->pinned ? "yes" : "no", p->priority,
               p->layout_digest, hex_of(&p->domain, hex, sizeof(hex)));
    } else {
        fprintf(stderr, "kvctl: no such block is there: %s\n", r->reason);
    }
    kvd__v1__explain_prefix_reply__free_unpacked(r, NULL);
    return code;
}

static int pin(struct kvctl *k, uint32_t seconds)
{
    Kvd__V1__PinPrefixRequest req = KVD__V1__PIN_PREFIX_REQUEST__INIT;
    Kvd__V1__PinPrefixReply *r = NULL;
    struct key key;
    req.namespace_name = (char *)k->arguments[0];
    req.seconds = seconds;
    int code = take_key(k->arguments[1], &key, &req.key);
    if (code == EXIT_OK)
        code =
            kvctl_operator_call(k, "PinPrefix", &req, &kvd__v1__pin_prefix_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf(seconds ? "pinned for %u s\n" : "no longer pinned\n", seconds);
    kvd__v1__pin_prefix_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_prefix_pin(struct kvctl *k)
{
    return pin(k, (uint32_t)strtoul(k->arguments[2], NULL, 10));
}

int cmd_prefix_unpin(struct kvctl *k)
{
    return pin(k, 0);
}

int cmd_prefix_priority(struct kvctl *k)
{
    Kvd__V1__ClassifyPrefixRequest req = KVD__V1__CLASSIFY_PREFIX_REQUEST__INIT;
    Kvd__V1__ClassifyPrefixReply *r = NULL;
    struct key key;
    req.namespace_name = (char *)k->arguments[0];
    req.priority = (char *)k->arguments[2];
    int code = take_key(k->arguments[1], &key, &req.key);
    if (code == EXIT_OK)
        code = kvctl_operator_call(k, "ClassifyPrefix", &req,
                                   &kvd__v1__classify_prefix_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf("%u blocks are of priority %s\n", r->blocks, k->arguments[2]);
    kvd__v1__classify_prefix_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

int cmd_prefix_drop(struct kvctl *k)
{
    Kvd__V1__DropPrefixRequest req = KVD__V1__DROP_PREFIX_REQUEST__INIT;
    Kvd__V1__DropPrefixReply *r = NULL;
    struct key key;
    req.namespace_name = (char *)k->arguments[0];
    int code = k->n_arguments > 1
                   ? take_key(k->arguments[1], &key, &req.key)
                   : kvctl_confirm(k, "Drop all blocks of %s that nobody uses?", k->arguments[0]);
    if (code == EXIT_OK)
        code =
            kvctl_operator_call(k, "DropPrefix", &req, &kvd__v1__drop_prefix_reply__descriptor, &r);
    if (code)
        return code;
    if (k->json)
        return kvctl_print_json(k, &r->base);
    printf("dropped %llu blocks\n", (unsigned long long)r->blocks);
    kvd__v1__drop_prefix_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}
