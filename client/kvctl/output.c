// Tables for people, JSON for scripts.
#include <math.h>
#include <stdarg.h>

#include "client/kvctl/kvctl.h"

json_t *kvctl_text_json(const char *text)
{
    json_t *j = json_string(text);
    if (j)
        return j;
    char *copy = strdup(text);
    for (char *c = copy; c && *c; c++)
        *c = (signed char)*c < 0 ? '?' : *c;
    j = json_string(copy ? copy : "");
    free(copy);
    return j;
}

const char *kvctl_text(const char *text, char out[KVCTL_TEXT])
{
    json_t *valid = json_string(text); // NULL of what is no UTF-8
    size_t n = 0;
    for (const unsigned char *c = (const unsigned char *)text; *c && n + 9 < KVCTL_TEXT; c++) {
        bool c1 = *c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0; // U+0080 to U+009F
        if (c1 || *c < ' ' || *c == 0x7f || (!valid && *c > 0x7f))
            n += (size_t)sprintf(out + n, "\\x%02x", *c);
        else
            out[n++] = (char)*c;
        if (c1)
            n += (size_t)sprintf(out + n, "\\x%02x", *++c);
    }
    out[n] = '\0';
    json_decref(valid);
    return out;
}

json_t *kvctl_number_json(uint64_t n)
{
    return json_sprintf("%llu", (unsigned long long)n);
}

static json_t *bytes_json(const ProtobufCBinaryData *b)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *text KVD_FREE = malloc((b->len + 2) / 3 * 4 + 1), *out = text;
    for (size_t i = 0; text && i < b->len; i += 3) {
        uint32_t left = (uint32_t)(b->len - i);
        uint32_t w = (uint32_t)b->data[i] << 16 | (left > 1 ? (uint32_t)b->data[i + 1] << 8 : 0) |
                     (left > 2 ? b->data[i + 2] : 0);
        *out++ = digits[w >> 18];
        *out++ = digits[w >> 12 & 63];
        *out++ = left > 1 ? digits[w >> 6 & 63] : '=';
        *out++ = left > 2 ? digits[w & 63] : '=';
    }
    return text ? json_stringn(text, (size_t)(out - text)) : json_null();
}

static json_t *real_json(double x)
{
    return isnan(x)   ? json_string("NaN")
           : isinf(x) ? json_string(x < 0 ? "-Infinity" : "Infinity")
                      : json_real(x);
}

static json_t *enum_json(const ProtobufCEnumDescriptor *d, int number)
{
    const ProtobufCEnumValue *v = protobuf_c_enum_descriptor_get_value(d, number);
    return v ? json_string(v->name) : json_integer(number);
}

static json_t *value_json(const ProtobufCFieldDescriptor *f, const void *at)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_SINT32:
    case PROTOBUF_C_TYPE_SFIXED32:
        return json_integer(*(const int32_t *)at);
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_FIXED32:
        return json_integer(*(const uint32_t *)at);
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64: // more than a number of JSON can hold in many programs
        return json_sprintf("%lld", (long long)*(const int64_t *)at);
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
        return kvctl_number_json(*(const uint64_t *)at);
    case PROTOBUF_C_TYPE_BOOL:
        return json_boolean(*(const protobuf_c_boolean *)at);
    case PROTOBUF_C_TYPE_FLOAT:
        return real_json((double)*(const float *)at);
    case PROTOBUF_C_TYPE_DOUBLE:
        return real_json(*(const double *)at);
    case PROTOBUF_C_TYPE_ENUM:
        return enum_json(f->descriptor, *(const int *)at);
    case PROTOBUF_C_TYPE_STRING:
        return kvctl_text_json(*(char *const *)at);
    case PROTOBUF_C_TYPE_BYTES:
        return bytes_json(at);
    case PROTOBUF_C_TYPE_MESSAGE:
        return kvctl_to_json(*(ProtobufCMessage *const *)at);
    }
    return json_null();
}

static size_t element_size(const ProtobufCFieldDescriptor *f)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return 8;
    case PROTOBUF_C_TYPE_BOOL:
        return sizeof(protobuf_c_boolean);
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_MESSAGE:
        return sizeof(void *);
    case PROTOBUF_C_TYPE_BYTES:
        return sizeof(ProtobufCBinaryData);
    default:
        return 4;
    }
}

json_t *kvctl_to_json(const ProtobufCMessage *m)
{
    json_t *out = json_object();
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        const uint8_t *at = (const uint8_t *)m + f->offset;
        json_t *v;
        if (f->label == PROTOBUF_C_LABEL_REPEATED) {
            size_t n = *(const size_t *)(const void *)((const uint8_t *)m + f->quantifier_offset);
            const uint8_t *items = *(const uint8_t *const *)(const void *)at;
            v = json_array();
            for (size_t j = 0; j < n; j++)
                json_array_append_new(v, value_json(f, items + j * element_size(f)));
        } else if (f->type == PROTOBUF_C_TYPE_MESSAGE && !*(void *const *)(const void *)at) {
            continue; // there is none
        } else {
            v = value_json(f, at);
        }
        json_object_set_new(out, f->name, v);
    }
    return out;
}

int kvctl_print(struct kvctl *k, json_t *j)
{
    if (k->collected) {
        json_object_set_new(k->collected, "reply", j);
        return EXIT_OK;
    }
    json_dumpf(j, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(j);
    return EXIT_OK;
}

int kvctl_print_json(struct kvctl *k, ProtobufCMessage *m)
{
    kvctl_print(k, kvctl_to_json(m));
    protobuf_c_message_free_unpacked(m, NULL);
    return EXIT_OK;
}

enum { MAX_COLUMNS = 320, CELL = 132 }; // calib eval has one for each of its cases

struct table {
    char titles[MAX_COLUMNS][32];
    bool right[MAX_COLUMNS];
    int columns;
    char (*cells)[CELL];
    size_t n, cap;
};

struct table *table_new(const char *titles)
{
    struct table *t = calloc(1, sizeof(*t));
    for (const char *c = titles; t && c && t->columns < MAX_COLUMNS;) {
        const char *end = strchr(c, '|');
        int len = end ? (int)(end - c) : (int)strlen(c);
        t->right[t->columns] = *c == '>';
        snprintf(t->titles[t->columns], sizeof(t->titles[0]), "%.*s", len - (*c == '>'),
                 c + (*c == '>'));
        t->columns++;
        c = end ? end + 1 : NULL;
    }
    return t;
}

void table_cell(struct table *t, const char *fmt, ...)
{
    if (t->n == t->cap) {
        size_t cap = t->cap ? 2 * t->cap : 64;
        char(*grown)[CELL] = realloc(t->cells, cap * sizeof(*grown));
        if (!grown)
            exit(EXIT_FAILED);
        t->cells = grown;
        t->cap = cap;
    }
    va_list ap;
    char text[CELL], shown[KVCTL_TEXT];
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(t->cells[t->n++], CELL, "%s", kvctl_text(text, shown));
}

void table_size(struct table *t, uint64_t bytes)
{
    char text[32];
    table_cell(t, "%s", kvd_format_size(bytes, text, sizeof(text)));
}

const char *text_time(uint64_t ms, char *out, size_t cap)
{
    uint64_t s = ms / 1000;
    if (s < 120)
        snprintf(out, cap, "%llu.%llus", (unsigned long long)s,
                 (unsigned long long)(ms % 1000 / 100));
    else if (s < 7200)
        snprintf(out, cap, "%llum%02llus", (unsigned long long)s / 60, (unsigned long long)s % 60);
    else
        snprintf(out, cap, "%lluh%02llum", (unsigned long long)s / 3600,
                 (unsigned long long)s / 60 % 60);
    return out;
}

void table_time(struct table *t, uint64_t ms)
{
    char text[32];
    table_cell(t, "%s", text_time(ms, text, sizeof(text)));
}

static void print_row(const struct table *t, char (*cells)[CELL], const int *width)
{
    for (int c = 0; c < t->columns; c++) {
        const char *text = cells ? cells[c] : t->titles[c];
        bool last = c + 1 == t->columns;
        printf(t->right[c] ? "%*s"
               : last      ? "%.0d%s"
                           : "%-*s",
               t->right[c] || !last ? width[c] : 0, text);
        printf("%s", last ? "\n" : "  ");
    }
}

void table_print(struct table *t, const char *empty)
{
    int width[MAX_COLUMNS];
    for (int c = 0; c < t->columns; c++)
        width[c] = (int)strlen(t->titles[c]);
    for (size_t i = 0; i < t->n; i++)
        width[i % (size_t)t->columns] =
            KVD_MAX(width[i % (size_t)t->columns], (int)strlen(t->cells[i]));
    if (t->n == 0) {
        printf("%s\n", empty);
    } else {
        print_row(t, NULL, width);
        for (size_t i = 0; i + (size_t)t->columns <= t->n; i += (size_t)t->columns)
            print_row(t, &t->cells[i], width);
    }
    free(t->cells);
    free(t);
}

void progress(const char *what, uint64_t have, uint64_t total)
{
    char a[32], b[32];
    if (!isatty(STDERR_FILENO))
        return;
    kvd_format_size(have, a, sizeof(a));
    if (total == 0) {
        fprintf(stderr, "\r%s %s\033[K", what, a);
        return;
    }
    int done = (int)(have * 30 / total);
    fprintf(stderr, "\r%s [%.*s%.*s] %s of %s\033[K", what, done, "##############################",
            30 - done, "..............................", a, kvd_format_size(total, b, sizeof(b)));
}

void progress_end(void)
{
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r\033[K");
}
