// Rotation files: what is read, and what is refused.
#include "tests/unit/scratch.h"
#include "tests/unit/suite.h"

#include <math.h>
#include <sys/stat.h>
#include <zip.h>

#include "calib/pickle.h"
#include "calib/rotset.h"
#include "calib/store.h"

static void parse_fails(const void *data, size_t len, const char *why)
{
    struct kvd_error err = {0};
    struct kvd_pickle *p = kvd_pickle_parse(data, len, &err);
    ck_assert_msg(!p, "accepted: %s", why);
    ck_assert_msg(strstr(err.text, why), "'%s' is not in '%s'", why, err.text);
}
#define FAILS(bytes, why) parse_fails(bytes, sizeof(bytes) - 1, why)

START_TEST(pickles_that_are_refused)
{
    FAILS("", "truncated");
    FAILS("\x80\x02", "no STOP");
    FAILS("\x80\x06.", "protocol above 5");
    FAILS("\x80\x02.", "without exactly one value");
    FAILS("cos\nsystem\n(X\x02\x00\x00\x00lstR.", "os system");
    FAILS("cbuiltins\neval\n.", "builtins eval");
    FAILS("\x80\x04\x8c\x02os\x8c\x06system\x93.", "os system");
    FAILS("\x80\x04\x8c\x02os\x93.", "without two texts");
    FAILS("\x80\x04\x95\x09\x00\x00\x00\x00\x00\x00\x00.", "a frame is longer");
    FAILS("\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "longer than the file");
    FAILS("G\x00\x00.", "truncated");
    FAILS("\x94.", "memo index");
    FAILS("a.", "APPEND");
    FAILS("K\x01K\x02\x61.", "APPEND");
    FAILS("(K\x01\x65.", "APPEND");
    FAILS("](K\x01(K\x02t\x81.", "opcode 0x81");
    FAILS("ctorch\nLongStorage\n.", "LongStorage");
    FAILS("i__builtin__\nopen\n.", "opcode 0x69");
    FAILS("(lp0\n.", "opcode 0x6c");
    FAILS("X\xff\xff\xff\x7f"
          "abc.",
          "longer than the file");
    FAILS("X\x03\x00\x00\x00"
          "a\0b.",
          "NUL");
    FAILS("t.", "there is no mark");
    FAILS("K\x01\x87.", "too short for a tuple");
    FAILS("h\x09.", "never set");
    FAILS("r\xff\xff\xff\x7f.", "out of range");
    FAILS("}(K\x01u.", "SETITEMS");
    FAILS("K\x01K\x02K\x03s.", "SETITEM");
    FAILS("}R.", "REDUCE");
    FAILS("ccollections\nOrderedDict\n(K\x01tR.", "no function");
    FAILS("ctorch\nFloatStorage\n)R.", "no function");
    FAILS("K\x01Q.", "not a storage");
    FAILS("\x8a\x09\x01\x02\x03\x04\x05\x06\x07\x08\x09.", "64 bits");
    char deep[30001];
    memset(deep, '(', sizeof(deep));
    parse_fails(deep, sizeof(deep), "the stack is full");
    memset(deep, '}', sizeof(deep));
    parse_fails(deep, sizeof(deep), "too many values");
    char *big = malloc(5 << 20);
    memset(big, 'N', 5 << 20);
    parse_fails(big, 5 << 20, "bytes");
    free(big);
}
END_TEST

START_TEST(mutated_pickles_never_crash)
{
    static const char good[] =
        "\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00]\x94("
        "K\x01G\x3f\xf0\x00\x00\x00\x00\x00\x00\x65"
        "\x8c\x05torch\x8c\x0bHalfStorage\x93"
        "\x80\x02}q\x00(X\x05\x00\x00\x00layer(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        "X\x01\x00\x00\x00"
        "0X\x03\x00\x00\x00"
        "cpuK\x04tQK\x00K\x02K\x02\x86K\x02K\x01\x86tX\x01\x00\x00\x00"
        "bK\x01u.";
    uint64_t rng = kvd_test_seed("pickle");
    for (uint32_t i = 0, rounds = kvd_test_rounds(200000); i < rounds; i++) {
        uint8_t data[sizeof(good)];
        memcpy(data, good, sizeof(good));
        for (uint32_t j = 0; j < 1 + i % 4; j++)
            data[kvd_rand(&rng) % (sizeof(good) - 1)] = (uint8_t)kvd_rand(&rng);
        struct kvd_pickle *p = kvd_pickle_parse(data, kvd_rand(&rng) % sizeof(good), NULL);
        kvd_pickle_free(&p);
    }
}
END_TEST

// A .pt file: a zip with a pickle for one layer whose rotation has the given shape, stride and
// offset.
static const char *make_pt(const char *name, int dim, int stride, int offset, int floats,
                           bool compress)
{
    const char *path = kvd_scratch(name);
    int code;
    zip_t *z = zip_open(path, ZIP_CREATE | ZIP_TRUNCATE, &code);
    char pickle[512];
    size_t n = 0;
#define PUT(text) (memcpy(pickle + n, text, sizeof(text) - 1), n += sizeof(text) - 1)
#define NUMBER(x)                                                                                  \
    (pickle[n++] = 'J', pickle[n++] = (char)(x), pickle[n++] = (char)((x) >> 8),                   \
     pickle[n++] = (char)((x) >> 16), pickle[n++] = (char)((x) >> 24))
    PUT("\x80\x02}(X\x0e\x00\x00\x00"
        "format_versionK\x01X\x06\x00\x00\x00layers}(K\x03}(X\x08\x00\x00\x00rotation"
        "ctorch._utils\n_rebuild_tensor_v2\n(("
        "X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00"
        "0"
        "X\x03\x00\x00\x00"
        "cpu");
    NUMBER(floats);
    PUT("tQ");
    NUMBER(offset);
    NUMBER(dim);
    NUMBER(dim);
    PUT("\x86");
    NUMBER(stride);
    NUMBER(1);
    PUT("\x86\x89"
        "ccollections\nOrderedDict\n)RtRuuu.");
    float *data = calloc((size_t)floats + 1, sizeof(float));
    for (int i = 0; i < dim && i * dim + i < floats; i++)
        data[i * dim + i] = 1;
    char *copy = malloc(n);
    memcpy(copy, pickle, n);
    zip_file_add(z, "x/data.pkl", zip_source_buffer(z, copy, n, 1), 0);
    zip_int64_t i =
        zip_file_add(z, "x/data/0", zip_source_buffer(z, data, (size_t)floats * 4, 1), 0);
    zip_set_file_compression(z, 0, ZIP_CM_STORE, 0);
    zip_set_file_compression(z, (zip_uint64_t)i, compress ? ZIP_CM_DEFLATE : ZIP_CM_STORE, 0);
    ck_assert_int_eq(zip_close(z), 0);
    return path;
}

static void import_fails(const char *path, const char *why)
{
    struct kvd_error err = {0};
    struct kvd_rotset *s = kvd_rotset_import(path, path, "m", &err);
    ck_assert_msg(!s, "accepted: %s", why);
    ck_assert_msg(strstr(err.text, why), "'%s' is not in '%s'", why, err.text);
}

START_TEST(pt_files)
{
    struct kvd_error err = {0};
    struct kvd_rotset *s = kvd_rotset_import(make_pt("good.pt", 64, 64, 0, 4096, false),
                                             kvd_scratch("good.pt"), "m", &err);
    ck_assert_msg(s != NULL, "%s", err.text);
    ck_assert_uint_eq(s->n_layers, 1);
    ck_assert_uint_eq(s->layers[0], 3);
    ck_assert_uint_eq(s->dim_k, 64);
    kvd_rotset_free(&s);
    import_fails(make_pt("short.pt", 64, 64, 0, 4095, false), "beyond its storage");
    import_fails(make_pt("stride.pt", 64, 2000000000, 0, 4096, false), "beyond its storage");
    import_fails(make_pt("offset.pt", 64, 64, -5, 4096, false), "beyond its storage");
    import_fails(make_pt("offset2.pt", 64, 64, 2000000000, 4096, false), "beyond its storage");
    import_fails(make_pt("dim.pt", 100, 100, 0, 10000, false), "head_dim");
    import_fails(make_pt("huge.pt", 1 << 20, 1 << 20, 0, 16, false), "shape");
    import_fails(make_pt("bomb.pt", 64, 64, 0, 1 << 22, true), "compressed");
    import_fails(make_pt("notortho.pt", 64, 0, 0, 4096, false), "not orthogonal");
    import_fails(kvd_scratch("none.pt"), "not a readable");
    FILE *f = fopen(kvd_scratch("text.pt"), "w");
    fputs("this is no zip", f);
    fclose(f);
    import_fails(kvd_scratch("text.pt"), "not a readable");
    // Truncated at every kind of place.
    const char *good = make_pt("cut.pt", 64, 64, 0, 4096, false);
    struct stat st;
    stat(good, &st);
    for (off_t n = st.st_size - 1; n > 0; n -= 1 + n / 13) {
        ck_assert_int_eq(truncate(good, n), 0);
        ck_assert_ptr_null(kvd_rotset_import(good, good, "m", &err));
    }
}
END_TEST

static struct kvd_layout test_layout(uint32_t layers, uint32_t dim)
{
    struct kvd_plane p = {.n_layers = layers,
                          .q_heads = 2,
                          .kv_heads = 2,
                          .head_dim_k = dim,
                          .head_dim_v = dim,
                          .codec = {KVD_CODEC_INT2, KVD_CODEC_INT2}};
    struct kvd_layout l = {.n_layers = layers, .n_planes = 1, .planes = {p}};
    for (uint32_t i = 0; i < layers; i++)
        l.layers[i] = (uint16_t)(3 + 4 * i);
    return l;
}

// A set that is built in, for those layers.
static struct kvd_rotset *new_set(const char *name, uint32_t layers, uint32_t dim,
                                  struct kvd_error *err)
{
    struct kvd_layout l = test_layout(layers, dim);
    return kvd_rotset_new(name, l.layers, layers, dim, dim, err);
}

START_TEST(native_files_round_trip)
{
    struct kvd_error err = {0};
    struct kvd_rotset *a = new_set("hadamard", 3, 128, &err);
    a->clip_k[1] = 0.875f;
    a->scale_k = KVD_SCALE_UNBIASED;
    a->scale_v = KVD_SCALE_LEAST_SQUARES;
    ck_assert_msg(kvd_rotset_write(a, kvd_scratch("a.safetensors"), &err) == 0, "%s", err.text);
    struct kvd_rotset *b = kvd_rotset_read(kvd_scratch("a.safetensors"), &err);
    ck_assert_msg(b != NULL, "%s", err.text);
    ck_assert_str_eq(a->digest, b->digest);
    ck_assert_mem_eq(a->k, b->k, 3 * 128 * 128 * 4);
    ck_assert_float_eq(b->clip_k[1], 0.875f);
    ck_assert_uint_eq(b->layers[2], 11);
    struct kvd_rotation_data d;
    struct kvd_layout part = test_layout(2, 128);
    part.layers[0] = 7;
    part.layers[1] = 11;
    ck_assert_int_eq(kvd_rotset_select(b, &part, 0, &d, &err), 0);
    ck_assert_float_eq(d.clip_k[0], 0.875f);
    ck_assert_int_eq(b->scale_k, KVD_SCALE_UNBIASED);
    ck_assert_int_eq(d.scale_k, KVD_SCALE_UNBIASED);
    ck_assert_int_eq(d.scale_v, KVD_SCALE_LEAST_SQUARES);
    kvd_rotation_data_deinit(&d);
    part.layers[1] = 12;
    ck_assert_int_eq(kvd_rotset_select(b, &part, 0, &d, &err), KVD_E_PRECONDITION);
    kvd_rotset_free(&a);
    kvd_rotset_free(&b);
}
END_TEST

// Of latents and their rope parts, which the same files hold.
START_TEST(sets_of_latents)
{
    struct kvd_error err = {0};
    struct kvd_layout l = test_layout(2, 64);
    l.planes[0].q_heads = 128;
    l.planes[0].kv_heads = 1;
    l.planes[0].head_dim_v = 512;
    l.planes[0].latent = 1;
    l.planes[0].codec.k = KVD_CODEC_BF16;
    for (int i = 0; i < 2; i++) {
        struct kvd_rotset *a =
            kvd_rotset_new(i ? "random" : "hadamard", l.layers, 2, 64, 512, &err);
        double worst = 0;
        ck_assert_msg(a && kvd_rotset_check(a, &worst, &err) == 0 && worst < 1e-6, "%s", err.text);
        ck_assert_msg(kvd_rotset_write(a, kvd_scratch("l.safetensors"), &err) == 0, "%s", err.text);
        struct kvd_rotset *b = kvd_rotset_read(kvd_scratch("l.safetensors"), &err);
        ck_assert_msg(b != NULL, "%s", err.text);
        ck_assert_mem_eq(a->v, b->v, 2ull * 512 * 512 * sizeof(float));
        struct kvd_rotation_data d;
        ck_assert_msg(kvd_rotset_select(b, &l, 0, &d, &err) == 0, "%s", err.text);
        ck_assert_uint_eq(d.dim_v, 512);
        kvd_rotation_data_deinit(&d);
        kvd_rotset_free(&a);
        kvd_rotset_free(&b);
    }
    ck_assert_ptr_null(kvd_rotset_new("hadamard", l.layers, 2, 512, 512, &err));
    ck_assert_ptr_nonnull(strstr(err.text, "head_dim is 512 for K"));
}
END_TEST

// Of a set with a matrix for each of 4 kv heads; the clip ratios tell which head they are of.
static int select_rank(uint32_t set_heads, uint32_t rank, uint32_t size, uint32_t kv_heads,
                       uint32_t *first, uint32_t *count, struct kvd_error *err)
{
    struct kvd_rotset s = {
        .layers = {3, 7}, .n_layers = 2, .heads = set_heads, .dim_k = 64, .dim_v = 128};
    struct kvd_layout l = test_layout(1, 64);
    struct kvd_rotation_data d;
    ck_assert_int_eq(kvd_rotset_alloc(&s, err), 0);
    for (uint32_t i = 0; i < 2 * set_heads; i++) {
        s.clip_k[i] = s.clip_v[i] = s.k[i * 64 * 64] = s.v[i * 128 * 128] = (float)(i + 1) / 64;
        s.gain_k[i] = s.gain_v[i] = 1 + s.clip_k[i];
    }
    l.layers[0] = 7;
    l.planes[0].head_dim_v = 128;
    l.planes[0].kv_heads = kv_heads;
    l.tp_rank = rank;
    l.tp_size = size;
    int rc = kvd_rotset_select(&s, &l, 0, &d, err);
    if (rc == KVD_OK) {
        *first = (uint32_t)(d.clip_k[0] * 64) - 1 - set_heads;
        *count = d.heads;
        for (uint32_t h = 0; h < d.heads; h++) {
            float want = (float)(set_heads + *first + h + 1) / 64;
            ck_assert_float_eq(d.clip_k[h], want);
            ck_assert_float_eq(d.clip_v[h], want);
            ck_assert_float_eq(d.gain_k[h], 1 + want);
            ck_assert_float_eq(d.gain_v[h], 1 + want);
            ck_assert_float_eq(d.k[h * 64 * 64], want);
            ck_assert_float_eq(d.v[h * 128 * 128], want);
        }
        kvd_rotation_data_deinit(&d);
    }
    free(s.k);
    free(s.v);
    free(s.clip_k);
    free(s.clip_v);
    free(s.gain_k);
    free(s.gain_v);
    return rc;
}

START_TEST(ranks_get_their_heads)
{
    static const struct {
        uint32_t heads, rank, size, kv_heads; // of the set, and of the layout
        uint32_t first, count;                // 0: refused
    } cases[] = {
        {4, 0, 0, 4, 0, 4}, {4, 0, 0, 2, 0, 0},       {4, 0, 2, 2, 0, 2},       {4, 1, 2, 2, 2, 2},
        {4, 1, 2, 4, 0, 0}, {4, 1, 2, 1, 0, 0},       {4, 3, 4, 1, 3, 1},       {4, 4, 8, 1, 2, 1},
        {4, 5, 8, 1, 2, 1}, {4, 7, 8, 1, 3, 1},       {4, 7, 8, 2, 0, 0},       {4, 1, 3, 1, 0, 0},
        {4, 1, 6, 1, 0, 0}, {6, 3, 4, 1, 0, 0},       {6, 2, 3, 2, 4, 2},       {1, 5, 7, 3, 0, 1},
        {1, 0, 0, 8, 0, 1}, {3, 1023, 1024, 1, 0, 0}, {8, 1023, 1024, 1, 7, 1},
    };
    for (size_t i = 0; i < KVD_LEN(cases); i++) {
        struct kvd_error err = {0};
        uint32_t first = 0, count = 0;
        int rc = select_rank(cases[i].heads, cases[i].rank, cases[i].size, cases[i].kv_heads,
                             &first, &count, &err);
        ck_assert_msg(rc == (cases[i].count ? KVD_OK : KVD_E_PRECONDITION), "case %zu: %d %s", i,
                      rc, err.text);
        ck_assert_msg(first == cases[i].first && count == cases[i].count, "case %zu: %u, %u", i,
                      first, count);
    }
}
END_TEST

static void write_native(const char *header, size_t pad)
{
    FILE *f = fopen(kvd_scratch("bad.safetensors"), "w");
    uint64_t n = strlen(header);
    fwrite(&n, 8, 1, f);
    fwrite(header, n, 1, f);
    for (size_t i = 0; i < pad; i++)
        fputc(0, f);
    fclose(f);
}

static void native_fails(const char *why)
{
    struct kvd_error err = {0};
    ck_assert_msg(!kvd_rotset_read(kvd_scratch("bad.safetensors"), &err), "accepted: %s", why);
    ck_assert_msg(strstr(err.text, why), "'%s' is not in '%s'", why, err.text);
}

START_TEST(native_files_that_are_refused)
{
    char text[8192], digest[KVD_DIGEST_TEXT];
    kvd_digest("", 0, digest);
    write_native("{}", 0);
    native_fails("format is not");
    static const struct {
        const char *metadata, *why;
    } scales[] = {
        {"\"format\": \"kvd-rotation-set/9\"", "format is not"},
        {"\"format\": \"kvd-rotation-set/3\"", "codec is not tc2"},
        {"\"format\": \"kvd-rotation-set/3\", \"codec\": \"int2\"", "codec is not tc2"},
        {"\"format\": \"kvd-rotation-set/3\", \"codec\": \"tc2\", \"k.scale\": \"unbiased\"",
         "belong to"},
        {"\"format\": \"kvd-rotation-set/3\", \"codec\": \"tc2\"", "out of range"},
        {"\"format\": \"kvd-rotation-set/2\"", "k.scale or v.scale is not"},
        {"\"format\": \"kvd-rotation-set/2\", \"k.scale\": \"unbiased\", \"v.scale\": \"\"",
         "k.scale or v.scale is not"},
        {"\"format\": \"kvd-rotation-set/1\", \"v.scale\": \"unbiased\"", "belong to"}};
    for (size_t i = 0; i < KVD_LEN(scales); i++) {
        snprintf(text, sizeof(text),
                 "{\"__metadata__\": {%s, \"layers\": \"0\", \"payload\": \"%s\"}}",
                 scales[i].metadata, digest);
        write_native(text, 0);
        native_fails(scales[i].why);
    }
    write_native("{\"a\": 1, \"a\": 2}", 0);
    native_fails("not JSON");
    memset(text, '[', 8000);
    text[8000] = 0;
    write_native(text, 0); // nesting
    native_fails("not JSON");
    snprintf(text, sizeof(text),
             "{\"__metadata__\": {\"format\": \"kvd-rotation-set/1\", \"layers\": \"0\", "
             "\"payload\": \"%s\"}}",
             digest);
    write_native(text, 0);
    native_fails("out of range");
    snprintf(text, sizeof(text),
             "{\"__metadata__\": {\"format\": \"kvd-rotation-set/1\", \"layers\": \"0,1,2\", "
             "\"payload\": \"%s\"},"
             "\"k.rotation\": {\"dtype\": \"F32\", \"shape\": [3, 256, 256, 256], "
             "\"data_offsets\": [0, 9223372036854775807]},"
             "\"v.rotation\": {\"dtype\": \"F32\", \"shape\": [3, 256, 256, 256], "
             "\"data_offsets\": [0, 1]}}",
             digest);
    write_native(text, 0);
    native_fails("lies outside the file");
    snprintf(text, sizeof(text),
             "{\"__metadata__\": {\"format\": \"kvd-rotation-set/1\", \"layers\": \"2,1\", "
             "\"payload\": \"%s\"}}",
             digest);
    write_native(text, 10);
    native_fails("digest");
    write_native(text, 0);
    native_fails("ascending");
    FILE *f = fopen(kvd_scratch("bad.safetensors"), "w");
    fwrite("\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10, 1, f);
    fclose(f);
    native_fails("longer than the file");
    char *large = malloc((1 << 20) + 2);
    memset(large, ' ', (1 << 20) + 1);
    memcpy(large, "{}", 2);
    large[(1 << 20) + 1] = 0;
    write_native(large, 0);
    native_fails("1 MiB");
    free(large);
    f = fopen(kvd_scratch("bad.safetensors"), "w");
    fclose(f);
    native_fails("truncated");
    // Every truncation and a lot of flipped bytes of a good file.
    struct kvd_error err = {0};
    struct kvd_rotset *a = new_set("identity", 1, 64, &err);
    kvd_rotset_write(a, kvd_scratch("bad.safetensors"), &err);
    kvd_rotset_free(&a);
    uint64_t rng = kvd_test_seed("native");
    struct stat st;
    stat(kvd_scratch("bad.safetensors"), &st);
    for (int i = 0; i < 2000; i++) {
        f = fopen(kvd_scratch("bad.safetensors"), "r+");
        long at = (long)(kvd_rand(&rng) % (i % 2 ? 900 : (uint64_t)st.st_size));
        fseek(f, at, SEEK_SET);
        int old = fgetc(f);
        fseek(f, at, SEEK_SET);
        fputc(old ^ (1 << (i % 8)), f);
        fclose(f);
        a = kvd_rotset_read(kvd_scratch("bad.safetensors"),
                            &err); // may be good (padding, provenance); must not crash
        kvd_rotset_free(&a);
        f = fopen(kvd_scratch("bad.safetensors"), "r+");
        fseek(f, at, SEEK_SET);
        fputc(old, f);
        fclose(f);
    }
}
END_TEST

START_TEST(sets_that_do_not_hold_up)
{
    struct kvd_error err = {0};
    struct kvd_rotset *s = new_set("hadamard", 2, 64, &err);
    double worst;
    ck_assert_int_eq(kvd_rotset_check(s, &worst, &err), 0);
    ck_assert_double_lt(worst, 1e-6);
    s->v[64 * 64 + 5] = NAN;
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), KVD_E_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "R_V of layer 7"));
    s->v[64 * 64 + 5] = 3;
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), KVD_E_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "not orthogonal"));
    s->v[64 * 64 + 5] = -0.125f;
    s->clip_k[1] = 1.5f;
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), KVD_E_CORRUPT);
    kvd_rotset_free(&s);
}
END_TEST

START_TEST(names_of_sets)
{
    ck_assert(kvd_store_ref_valid("Qwen/Qwen3-8B@v1.0"));
    ck_assert(kvd_store_ref_valid(
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"));
    const char *bad[] = {"",
                         "a",
                         "a@",
                         "@b",
                         "../a@b",
                         "/a@b",
                         "a/@b",
                         "a//b@c",
                         "a/.b@c",
                         "a@b/c",
                         "a@.b",
                         "a b@c",
                         "a@b@c",
                         "sha256:zz",
                         "sha256:0123456789ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef"};
    for (size_t i = 0; i < KVD_LEN(bad); i++)
        ck_assert_msg(!kvd_store_ref_valid(bad[i]), "%s", bad[i]);
}
END_TEST

// The real files, when they are there: RotationZoo's Qwen3-8B (dense layers) and Qwen3.5-4B
// (sparse, shared storage).
START_TEST(real_rotation_files)
{
    const char *zoo = getenv("KVD_ROTATIONZOO");
    if (!zoo || !*zoo) {
        printf("SKIP real_rotation_files: KVD_ROTATIONZOO is not set\n");
        return;
    }
    const struct {
        const char *k, *v;
        uint32_t layers, first, last, dim;
    } files[] = {
        {"qwen3-8b/k_rotation_qqt_r_h_pbr.pt", "qwen3-8b/v_rotation_sst_r_h_pbr.pt", 36, 0, 35,
         128},
        {"qwen3.5-4b/calibrated/k_rotation.pt", "qwen3.5-4b/calibrated/v_rotation.pt", 8, 3, 31,
         256},
        {"qwen3.5-4b/hadamard/k_rotation.pt", "qwen3.5-4b/hadamard/v_rotation.pt", 8, 3, 31, 256},
    };
    for (size_t i = 0; i < KVD_LEN(files); i++) {
        char k[512], v[512];
        struct kvd_error err = {0};
        double worst;
        snprintf(k, sizeof(k), "%s/%s", zoo, files[i].k);
        snprintf(v, sizeof(v), "%s/%s", zoo, files[i].v);
        struct kvd_rotset *s = kvd_rotset_import(k, v, "m", &err);
        ck_assert_msg(s != NULL, "%s", err.text);
        ck_assert_uint_eq(s->n_layers, files[i].layers);
        ck_assert_uint_eq(s->layers[0], files[i].first);
        ck_assert_uint_eq(s->layers[s->n_layers - 1], files[i].last);
        ck_assert_uint_eq(s->dim_k, files[i].dim);
        ck_assert_int_eq(kvd_rotset_check(s, &worst, &err), 0);
        ck_assert_double_lt(worst, 1e-5);
        kvd_rotset_free(&s);
    }
}
END_TEST

// "hadamard" has one size of entries everywhere, all ones in its first row, and is orthogonal.
START_TEST(hadamard_rotations)
{
    struct kvd_error err = {0};
    const uint32_t dims[] = {64, 80, 96, 112, 128, 192, 256};
    for (size_t d = 0; d < KVD_LEN(dims); d++) {
        uint32_t dim = dims[d];
        struct kvd_rotset *s = kvd_rotset_new("hadamard", &(uint16_t){0}, 1, dim, dim, &err);
        double worst = 0;
        ck_assert_msg(s && kvd_rotset_check(s, &worst, &err) == 0 && worst < 1e-6, "%s", err.text);
        for (uint32_t i = 0; i < dim * dim; i++)
            ck_assert_double_eq_tol(fabs((double)s->k[i]), 1 / sqrt(dim), 1e-7);
        for (uint32_t i = 0; i < dim; i++)
            ck_assert_int_eq(kvd_hadamard_entry(dim, 0, i), 1);
        for (uint32_t i = 0; i < dim; i++)
            for (uint32_t k = 0; k <= i; k++) { // exactly
                int dot = 0;
                for (uint32_t j = 0; j < dim; j++)
                    dot += kvd_hadamard_entry(dim, i, j) * kvd_hadamard_entry(dim, k, j);
                ck_assert_int_eq(dot, i == k ? (int)dim : 0);
            }
        kvd_rotset_free(&s);
    }
    ck_assert_int_eq(kvd_hadamard_entry(72, 1, 1), 0);
}
END_TEST

// "random" is orthogonal, no permutation of axes, and the same every time.
START_TEST(random_rotations)
{
    struct kvd_error err = {0};
    const uint32_t dims[] = {64, 128, 256, 80, 96, 112, 192};
    for (size_t d = 0; d < KVD_LEN(dims); d++) {
        const uint16_t layers[] = {0, 5};
        uint32_t dk = dims[d], dv = d < 3 ? dims[(d + 1) % 3] : dk;
        struct kvd_rotset *a = kvd_rotset_new("random", layers, 2, dk, dv, &err);
        struct kvd_rotset *b = kvd_rotset_new("random", layers, 2, dk, dv, &err);
        double worst = 0, most = 0;
        ck_assert_msg(a && b && kvd_rotset_check(a, &worst, &err) == 0 && worst < 1e-6, "%s",
                      err.text);
        uint64_t n = 2ull * dims[d] * dims[d];
        ck_assert_int_eq(memcmp(a->k, b->k, n * sizeof(float)), 0);
        ck_assert_int_eq(memcmp(a->k, a->k + n / 2, n / 2 * sizeof(float)), 0);
        for (uint64_t i = 0; i < n; i++)
            most = fmax(most, fabs((double)a->k[i]));
        // The largest of dim^2 values with deviation 1 / sqrt(dim).
        ck_assert(most > 2.5 / sqrt(dims[d]) && most < 6 / sqrt(dims[d]));
        kvd_rotset_free(&a);
        kvd_rotset_free(&b);
    }
    ck_assert(!kvd_rotset_built_in("Random") && kvd_rotset_built_in("random"));
    ck_assert(new_set("other", 1, 64, &err) == NULL && err.code == KVD_E_INVALID);
}
END_TEST

KVD_MAIN("calib", 120, pickles_that_are_refused, mutated_pickles_never_crash, pt_files,
         native_files_round_trip, sets_of_latents, ranks_get_their_heads,
         native_files_that_are_refused, sets_that_do_not_hold_up, names_of_sets, hadamard_rotations,
         random_rotations, real_rotation_files)
