#include "calib/pickle.h"

#include "proto/kvd_limits.h"

enum {
    MAX_BYTES = 4 << 20,
    MAX_VALUES = 200000,
    MAX_STACK = 20000,
    MAX_MEMO = 100000,
};

struct block {
    struct block *next;
    max_align_t data[];
};

struct kvd_pickle {
    struct block *blocks; // every allocation, freed together
    size_t allocated;
    const struct kvd_pickle_value *root;
};

struct parser {
    struct kvd_pickle *p;
    const uint8_t *data;
    size_t len, at;
    struct kvd_pickle_value *stack[MAX_STACK]; // NULL is a mark
    uint32_t depth, values;
    struct kvd_pickle_value *memo[MAX_MEMO];
    uint64_t memoized; // how many were put there
    struct kvd_error *err;
};

static int bad(struct parser *s, const char *why)
{
    return kvd_fail(s->err, KVD_E_CORRUPT, "pickle, byte %zu: %s", s->at, why);
}

static void *take(struct parser *s, size_t bytes)
{
    if (s->p->allocated + bytes > 16 * (size_t)MAX_BYTES)
        return NULL;
    struct block *b = calloc(1, sizeof(*b) + bytes);
    if (!b)
        return NULL;
    s->p->allocated += bytes;
    b->next = s->p->blocks;
    s->p->blocks = b;
    return b->data;
}

static struct kvd_pickle_value *push(struct parser *s, enum kvd_pickle_kind kind)
{
    if (s->depth == MAX_STACK || s->values == MAX_VALUES)
        return NULL;
    struct kvd_pickle_value *v = take(s, sizeof(*v));
    if (!v)
        return NULL;
    v->kind = kind;
    s->values++;
    s->stack[s->depth++] = v;
    return v;
}

static bool is(const struct kvd_pickle_value *v, enum kvd_pickle_kind kind)
{
    return v && v->kind == kind;
}

static int push_number(struct parser *s, enum kvd_pickle_kind kind, int64_t number)
{
    struct kvd_pickle_value *v = push(s, kind);
    if (!v)
        return bad(s, "too many values");
    v->number = number;
    return KVD_OK;
}

// The next n bytes, or NULL at the end of the data.
static const uint8_t *bytes(struct parser *s, size_t n)
{
    if (n > s->len - s->at)
        return NULL;
    const uint8_t *p = s->data + s->at;
    s->at += n;
    return p;
}

static int little(struct parser *s, size_t n, uint64_t *out)
{
    const uint8_t *p = bytes(s, n);
    if (!p)
        return bad(s, "truncated");
    *out = 0;
    for (size_t i = 0; i < n; i++)
        *out |= (uint64_t)p[i] << (8 * i);
    return KVD_OK;
}

static int push_text(struct parser *s, size_t length_bytes)
{
    uint64_t n = 0;
    if (little(s, length_bytes, &n))
        return KVD_E_CORRUPT;
    const uint8_t *p = bytes(s, n);
    if (!p)
        return bad(s, "a string is longer than the file");
    char *text = take(s, n + 1);
    struct kvd_pickle_value *v = text ? push(s, KVD_PICKLE_STR) : NULL;
    if (!v)
        return bad(s, "too many values");
    memcpy(text, p, n);
    if (memchr(text, 0, n))
        return bad(s, "a string holds a NUL byte");
    v->text = text;
    return KVD_OK;
}

// The globals that are known; only spellings are compared, nothing is looked up. Those of storages
// stand in the order of enum kvd_pickle_element.
enum { STORAGES = 4 };
static const char *const globals[] = {"torch FloatStorage",
                                      "torch HalfStorage",
                                      "torch BFloat16Storage",
                                      "torch DoubleStorage",
                                      "torch._utils _rebuild_tensor_v2",
                                      "collections OrderedDict"};

static int push_known(struct parser *s, char *name, size_t n)
{
    for (size_t i = 0; i < KVD_LEN(globals); i++) {
        if (strcmp(name, globals[i]) != 0)
            continue;
        struct kvd_pickle_value *v = push(s, KVD_PICKLE_GLOBAL);
        if (!v)
            return bad(s, "too many values");
        v->text = globals[i];
        return KVD_OK;
    }
    char why[224];
    for (size_t i = 0; i < n; i++)
        if (name[i] < ' ' || name[i] > '~')
            name[i] = '?';
    snprintf(why, sizeof(why), "it names %.128s, which a rotation file has no use for; refused",
             name);
    return bad(s, why);
}

// GLOBAL: two lines of text.
static int push_global(struct parser *s)
{
    char name[128];
    size_t n = 0;
    for (int lines = 0; lines < 2;) {
        const uint8_t *c = bytes(s, 1);
        if (!c || n + 1 >= sizeof(name))
            return bad(s, "a global's name does not end");
        name[n++] = *c == '\n' ? ' ' : (char)*c;
        lines += *c == '\n';
    }
    name[n - 1] = '\0';
    return push_known(s, name, n - 1);
}

// STACK_GLOBAL: module and name are the two texts on top.
static int push_stack_global(struct parser *s)
{
    char name[256];
    if (s->depth < 2 || !is(s->stack[s->depth - 2], KVD_PICKLE_STR) ||
        !is(s->stack[s->depth - 1], KVD_PICKLE_STR))
        return bad(s, "STACK_GLOBAL without two texts");
    s->depth -= 2;
    snprintf(name, sizeof(name), "%.120s %.120s", s->stack[s->depth]->text,
             s->stack[s->depth + 1]->text);
    return push_known(s, name, strlen(name));
}

static int append_items(struct parser *s, struct kvd_pickle_value *to,
                        struct kvd_pickle_value **from, uint32_t n)
{
    if (to->n_items + n > to->cap_items) {
        uint32_t cap = KVD_MAX(2 * to->cap_items, to->n_items + n);
        const struct kvd_pickle_value **grown = take(s, cap * sizeof(*grown));
        if (!grown)
            return bad(s, "too many values");
        if (to->n_items)
            memcpy(grown, to->items, to->n_items * sizeof(*grown));
        to->items = grown;
        to->cap_items = cap;
    }
    for (uint32_t i = 0; i < n; i++)
        to->items[to->n_items++] = from[i];
    return KVD_OK;
}

// Index just above the topmost mark, or an error.
static int find_mark(struct parser *s, uint32_t *first)
{
    for (uint32_t i = s->depth; i > 0; i--) {
        if (!s->stack[i - 1]) {
            *first = i;
            return KVD_OK;
        }
    }
    return bad(s, "there is no mark");
}

// Replaces the n values on top (and the mark under them, if `mark`) by a tuple.
static int make_tuple(struct parser *s, uint32_t n, bool mark)
{
    if (n + mark > s->depth)
        return bad(s, "the stack is too short for a tuple");
    for (uint32_t i = s->depth - n; i < s->depth; i++)
        if (!s->stack[i])
            return bad(s, "a mark inside a tuple");
    struct kvd_pickle_value *items[64], **from = &s->stack[s->depth - n];
    if (n > KVD_LEN(items))
        return bad(s, "a tuple of more than 64 items");
    memcpy(items, from, n * sizeof(*items));
    s->depth -= n + mark;
    struct kvd_pickle_value *v = push(s, KVD_PICKLE_TUPLE);
    return v ? append_items(s, v, items, n) : bad(s, "too many values");
}

static int set_items(struct parser *s)
{
    uint32_t first = 0;
    if (find_mark(s, &first))
        return KVD_E_CORRUPT;
    uint32_t n = s->depth - first;
    if (first < 2 || !s->stack[first - 2] || s->stack[first - 2]->kind != KVD_PICKLE_DICT || n % 2)
        return bad(s, "SETITEMS without a dictionary and pairs");
    int rc = append_items(s, s->stack[first - 2], &s->stack[first], n);
    s->depth = first - 1;
    return rc;
}

static int set_item(struct parser *s)
{
    if (s->depth < 3 || !s->stack[s->depth - 3] ||
        s->stack[s->depth - 3]->kind != KVD_PICKLE_DICT || !s->stack[s->depth - 2] ||
        !s->stack[s->depth - 1])
        return bad(s, "SETITEM without a dictionary, key and value");
    int rc = append_items(s, s->stack[s->depth - 3], &s->stack[s->depth - 2], 2);
    s->depth -= 2;
    return rc;
}

// APPEND and APPENDS: the list under them is a tuple that grows.
static int append_to_list(struct parser *s, bool several)
{
    uint32_t first = s->depth ? s->depth - 1 : 0, under = several ? 2 : 1;
    if (several && find_mark(s, &first))
        return KVD_E_CORRUPT;
    if (first < under || first >= s->depth + several ||
        !is(s->stack[first - under], KVD_PICKLE_TUPLE))
        return bad(s, "APPEND without a list and a value");
    for (uint32_t i = first; i < s->depth; i++)
        if (!s->stack[i])
            return bad(s, "a mark inside a list");
    int rc = append_items(s, s->stack[first - under], &s->stack[first], s->depth - first);
    s->depth = first - under + 1;
    return rc;
}

// BINPERSID: ("storage", one of the storage globals, key, location, numel) becomes a storage.
static int make_storage(struct parser *s)
{
    struct kvd_pickle_value *t = s->depth ? s->stack[s->depth - 1] : NULL;
    if (!is(t, KVD_PICKLE_TUPLE) || t->n_items != 5 || !is(t->items[0], KVD_PICKLE_STR) ||
        strcmp(t->items[0]->text, "storage") != 0 || !is(t->items[1], KVD_PICKLE_GLOBAL) ||
        !is(t->items[2], KVD_PICKLE_STR) || !is(t->items[4], KVD_PICKLE_INT))
        return bad(s, "a persistent id that is not a storage");
    uint32_t element = 0;
    while (element < STORAGES && t->items[1]->text != globals[element])
        element++;
    if (element == STORAGES)
        return bad(s, "a storage of values that are not bf16, or floats of 16, 32 or 64 bits");
    s->depth--;
    struct kvd_pickle_value *v = push(s, KVD_PICKLE_STORAGE);
    if (!v)
        return bad(s, "too many values");
    v->text = t->items[2]->text;
    v->number = t->items[4]->number;
    v->element = (enum kvd_pickle_element)element;
    return KVD_OK;
}

static int read_dims(struct parser *s, const struct kvd_pickle_value *t, int64_t *out, uint32_t *n)
{
    if (!is(t, KVD_PICKLE_TUPLE) || t->n_items > KVD_PICKLE_MAX_RANK)
        return bad(s, "a tensor's shape or stride is not a short tuple");
    for (uint32_t i = 0; i < t->n_items; i++) {
        if (!is(t->items[i], KVD_PICKLE_INT) || t->items[i]->number < 0 ||
            t->items[i]->number > INT32_MAX)
            return bad(s, "a tensor's shape or stride is out of range");
        out[i] = t->items[i]->number;
    }
    *n = t->n_items;
    return KVD_OK;
}

// REDUCE of _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks) or
// OrderedDict().
static int reduce(struct parser *s)
{
    if (s->depth < 2 || !is(s->stack[s->depth - 2], KVD_PICKLE_GLOBAL) ||
        !is(s->stack[s->depth - 1], KVD_PICKLE_TUPLE))
        return bad(s, "REDUCE without a function and its arguments");
    const struct kvd_pickle_value *fn = s->stack[s->depth - 2], *args = s->stack[s->depth - 1];
    s->depth -= 2;
    if (strcmp(fn->text, "collections OrderedDict") == 0 && args->n_items == 0)
        return push(s, KVD_PICKLE_DICT) ? KVD_OK : bad(s, "too many values");
    if (strcmp(fn->text, "torch._utils _rebuild_tensor_v2") != 0)
        return bad(s, "a call of something that is no function here; refused");
    if (args->n_items < 4 || !is(args->items[0], KVD_PICKLE_STORAGE) ||
        !is(args->items[1], KVD_PICKLE_INT))
        return bad(s, "malformed arguments of a tensor");
    struct kvd_pickle_value *v = push(s, KVD_PICKLE_TENSOR);
    if (!v)
        return bad(s, "too many values");
    v->storage = args->items[0];
    v->offset = args->items[1]->number;
    uint32_t strides;
    int rc = read_dims(s, args->items[2], v->shape, &v->rank);
    if (rc == KVD_OK)
        rc = read_dims(s, args->items[3], v->stride, &strides);
    if (rc == KVD_OK && strides != v->rank)
        rc = bad(s, "a tensor's stride and shape differ in length");
    return rc;
}

// Under an index of so many bytes; of none (MEMOIZE): under the next one.
static int memo_put(struct parser *s, size_t index_bytes)
{
    uint64_t i = s->memoized;
    if (index_bytes && little(s, index_bytes, &i))
        return KVD_E_CORRUPT;
    s->memoized++;
    if (i >= MAX_MEMO || s->depth == 0 || !s->stack[s->depth - 1])
        return bad(s, "a memo index out of range");
    s->memo[i] = s->stack[s->depth - 1];
    return KVD_OK;
}

static int memo_get(struct parser *s, size_t index_bytes)
{
    uint64_t i = 0;
    if (little(s, index_bytes, &i))
        return KVD_E_CORRUPT;
    if (i >= MAX_MEMO || !s->memo[i])
        return bad(s, "a memo index that was never set");
    if (s->depth == MAX_STACK)
        return bad(s, "the stack is full");
    s->stack[s->depth++] = s->memo[i];
    return KVD_OK;
}

static int number(struct parser *s, size_t n, bool is_signed)
{
    uint64_t u = 0;
    if (little(s, n, &u))
        return KVD_E_CORRUPT;
    return push_number(s, KVD_PICKLE_INT, is_signed ? (int64_t)(int32_t)u : (int64_t)u);
}

// LONG1: up to 8 bytes, two's complement.
static int long_number(struct parser *s)
{
    uint64_t n = 0, u = 0;
    if (little(s, 1, &n) || n > 8)
        return bad(s, "an integer of more than 64 bits");
    if (little(s, n, &u))
        return KVD_E_CORRUPT;
    if (n && n < 8 && u >> (8 * n - 1) & 1)
        u |= ~0ull << (8 * n);
    return push_number(s, KVD_PICKLE_INT, (int64_t)u);
}

// BINFLOAT: a double, the most significant byte first.
static int real_number(struct parser *s)
{
    const uint8_t *p = bytes(s, 8);
    struct kvd_pickle_value *v = p ? push(s, KVD_PICKLE_FLOAT) : NULL;
    if (!v)
        return bad(s, p ? "too many values" : "truncated");
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++)
        bits = bits << 8 | p[i];
    memcpy(&v->real, &bits, sizeof(bits));
    return KVD_OK;
}

// FRAME: how long the following piece is. Only its presence is checked: nothing is read ahead.
static int frame(struct parser *s)
{
    uint64_t n = 0;
    if (little(s, 8, &n))
        return KVD_E_CORRUPT;
    return n <= s->len - s->at ? KVD_OK : bad(s, "a frame is longer than the file");
}

static int mark(struct parser *s)
{
    if (s->depth == MAX_STACK)
        return bad(s, "the stack is full");
    s->stack[s->depth++] = NULL;
    return KVD_OK;
}

static int step(struct parser *s, uint8_t op)
{
    uint64_t version = 0;
    uint32_t first = 0;
    switch (op) {
    case 0x80: // PROTO
        return little(s, 1, &version) ? KVD_E_CORRUPT
               : version <= 5         ? KVD_OK
                                      : bad(s, "pickle protocol above 5");
    case 0x95:
        return frame(s);
    case '}':
        return push(s, KVD_PICKLE_DICT) ? KVD_OK : bad(s, "too many values");
    case ')':
    case ']': // a list
        return push(s, KVD_PICKLE_TUPLE) ? KVD_OK : bad(s, "too many values");
    case 'N':
        return push_number(s, KVD_PICKLE_NONE, 0);
    case 0x88:
    case 0x89:
        return push_number(s, KVD_PICKLE_BOOL, op == 0x88);
    case 'K':
        return number(s, 1, false);
    case 'M':
        return number(s, 2, false);
    case 'J':
        return number(s, 4, true);
    case 0x8a:
        return long_number(s);
    case 'G':
        return real_number(s);
    case 0x8c:
        return push_text(s, 1);
    case 'X':
        return push_text(s, 4);
    case 0x8d:
        return push_text(s, 8);
    case 'c':
        return push_global(s);
    case 0x93:
        return push_stack_global(s);
    case '(':
        return mark(s);
    case 't':
        return find_mark(s, &first) ? KVD_E_CORRUPT : make_tuple(s, s->depth - first, true);
    case 0x85:
    case 0x86:
    case 0x87:
        return make_tuple(s, op - 0x84u, false);
    case 0x94:
        return memo_put(s, 0);
    case 'q':
        return memo_put(s, 1);
    case 'r':
        return memo_put(s, 4);
    case 'h':
        return memo_get(s, 1);
    case 'j':
        return memo_get(s, 4);
    case 'a':
        return append_to_list(s, false);
    case 'e':
        return append_to_list(s, true);
    case 's':
        return set_item(s);
    case 'u':
        return set_items(s);
    case 'Q':
        return make_storage(s);
    case 'R':
        return reduce(s);
    default: {
        char why[96];
        snprintf(why, sizeof(why),
                 "opcode 0x%02x is not among those that a rotation file needs; refused", op);
        return bad(s, why);
    }
    }
}

struct kvd_pickle *kvd_pickle_parse(const uint8_t *data, size_t len, struct kvd_error *err)
{
    if (len > MAX_BYTES) {
        kvd_fail(err, KVD_E_LIMIT, "a pickle of %zu bytes; rotation files have a few thousand",
                 len);
        return NULL;
    }
    struct parser *s KVD_FREE = calloc(1, sizeof(*s));
    struct kvd_pickle *p KVD_AUTO(kvd_pickle_free) = calloc(1, sizeof(*p));
    if (!s || !p) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    s->p = p;
    s->data = data;
    s->len = len;
    s->err = err;
    for (;;) {
        const uint8_t *op = bytes(s, 1);
        if (!op) {
            bad(s, "truncated: there is no STOP");
            return NULL;
        }
        if (*op == '.')
            break;
        if (step(s, *op))
            return NULL;
    }
    if (s->depth != 1 || !s->stack[0]) {
        bad(s, "STOP without exactly one value");
        return NULL;
    }
    p->root = s->stack[0];
    return KVD_TAKE(p);
}

void kvd_pickle_free(struct kvd_pickle **pp)
{
    struct kvd_pickle *p = KVD_TAKE(*pp);
    if (!p)
        return;
    while (p->blocks) {
        struct block *next = p->blocks->next;
        free(p->blocks);
        p->blocks = next;
    }
    free(p);
}

const struct kvd_pickle_value *kvd_pickle_root(const struct kvd_pickle *p)
{
    return p->root;
}

const struct kvd_pickle_value *kvd_pickle_get(const struct kvd_pickle_value *dict, const char *key)
{
    const struct kvd_pickle_value *found = NULL;
    if (!is(dict, KVD_PICKLE_DICT))
        return NULL;
    for (uint32_t i = 0; i + 1 < dict->n_items; i += 2)
        if (is(dict->items[i], KVD_PICKLE_STR) && strcmp(dict->items[i]->text, key) == 0)
            found = dict->items[i + 1];
    return found;
}
