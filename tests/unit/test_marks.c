// Sets that mark layers as sensitive: their text, files and checks, what planes they serve, and
// what planes they make of a layout.
#include "tests/unit/scratch.h"
#include "tests/unit/suite.h"

#include <fcntl.h>
#include <math.h>

#include "calib/marks.h"
#include "calib/transforms.h"
#include "daemon/service/layout.h"
#include "kernels/format.h"

enum { DIM = 64 };

// Rotations of layers 3, 7 and 9.
static struct kvd_rotset *rotations(void)
{
    struct kvd_error err = {0};
    struct kvd_rotset *s = kvd_rotset_new("hadamard", (uint16_t[]){3, 7, 9}, 3, DIM, DIM, &err);
    ck_assert_msg(s != NULL, "%s", err.text);
    return s;
}

// Transforms for tc2 of the same layers, two heads each: all of them rotations, but with a mean and
// deviations, in the layers before `rotated`.
static struct kvd_rotset *transforms(uint32_t rotated)
{
    struct kvd_error err = {0};
    struct kvd_rotset *from = rotations(), *s = calloc(1, sizeof(*s));
    *s = (struct kvd_rotset){
        .model = "m", .layers = {3, 7, 9}, .n_layers = 3, .heads = 2, .dim_k = DIM, .dim_v = DIM};
    ck_assert_int_eq(kvd_transforms_alloc(s, KVD_CODEC_TC2, &err), 0);
    struct kvd_transforms *t = s->transforms;
    for (uint32_t at = 0; at < 6; at++)
        for (uint32_t i = 0; i < DIM; i++) {
            bool plain = at / 2 >= rotated;
            t->k_sigma[at * DIM + i] = plain ? 1 : 1 + (float)i / DIM;
            t->k_mean[at * DIM + i] = t->v_mean[at * DIM + i] = plain ? 0 : 0.5f;
            t->k_bits[at * DIM / 16 + i / 16] = 2;
            for (uint32_t c = 0; c < DIM; c++) {
                uint32_t to = at * DIM * DIM + i * DIM + c;
                t->k[to] = t->v[to] = from->k[i * DIM + c];
                t->k_inverse[to] = t->v_inverse[to] = from->k[c * DIM + i];
            }
        }
    kvd_rotset_free(&from);
    return s;
}

static void marked(struct kvd_rotset *s, const char *text)
{
    struct kvd_error err = {0};
    ck_assert_msg(kvd_marks_parse(s, text, &err) == 0, "%s", err.text);
}

START_TEST(texts)
{
    static const char *const good[] = {"3=int4", "0=bf16+7=k=int4,v=bf16",
                                       "3=tc2.5+7=tc2+65535=int2", "12=k=tc2,v=int2"};
    static const char *const bad[] = {"",
                                      "3",
                                      "3=",
                                      "=int4",
                                      "3=int5",
                                      "3=int4+",
                                      "+3=int4",
                                      "3=int4++7=int4",
                                      "-3=int4",
                                      " 3=int4",
                                      "3 =int4",
                                      "3= int4",
                                      "3=int4 ",
                                      "3=int4,7=int4",
                                      "65536=int4",
                                      "4294967299=int4",
                                      "3=k=int4",
                                      "3=k=int4,k=int4",
                                      "7=int4+3=int4",
                                      "3=int4+3=int4",
                                      "3=bf16+3=int4",
                                      "0x3=int4"};
    struct kvd_rotset s = {0};
    char text[KVD_MARKS_TEXT];
    ck_assert_str_eq(kvd_marks_text(&s, text), "");
    for (size_t i = 0; i < KVD_LEN(good); i++) {
        marked(&s, good[i]);
        ck_assert_str_eq(kvd_marks_text(&s, text), good[i]);
    }
    marked(&s, "5=v=int2,k=int4"); // is written the other way round
    ck_assert_str_eq(kvd_marks_text(&s, text), "5=k=int4,v=int2");
    for (size_t i = 0; i < KVD_LEN(bad); i++) {
        struct kvd_error err = {0};
        ck_assert_msg(kvd_marks_parse(&s, bad[i], &err) == KVD_E_INVALID, "'%s'", bad[i]);
        ck_assert_ptr_nonnull(strstr(err.text, "marks"));
    }
    ck_assert_str_eq(kvd_marks_text(&s, text), "5=k=int4,v=int2"); // as before
    ck_assert_ptr_nonnull(kvd_mark_of(&s, 5));
    ck_assert_ptr_null(kvd_mark_of(&s, 4));
    free(s.marks);
}
END_TEST

// Writes a set, and gives what is read back.
static struct kvd_rotset *again(struct kvd_rotset *s, struct kvd_error *err)
{
    ck_assert_msg(kvd_rotset_write(s, kvd_scratch("set"), err) == 0, "%s", err->text);
    return kvd_rotset_read(kvd_scratch("set"), err);
}

static bool says(const char *path, const char *text)
{
    char file[4096] = {0};
    FILE *f = fopen(path, "r");
    size_t n = fread(file, 1, sizeof(file) - 1, f);
    fclose(f);
    return memmem(file, n, text, strlen(text)) != NULL;
}

START_TEST(files)
{
    struct kvd_error err = {0};
    char plain[KVD_DIGEST_TEXT], text[KVD_MARKS_TEXT];
    for (int t = 0; t < 2; t++) {
        struct kvd_rotset *s = t ? transforms(2) : rotations(), *b = again(s, &err);
        ck_assert_ptr_nonnull(b);
        ck_assert(!b->marks && !b->n_marks);
        // A set without marks is of the format that it was of before there were any.
        ck_assert(says(kvd_scratch("set"), t ? "kvd-rotation-set/3" : "kvd-rotation-set/2"));
        strcpy(plain, b->digest);
        kvd_rotset_free(&b);
        marked(s, "9=int4");
        b = again(s, &err);
        ck_assert_msg(b != NULL, "%s", err.text);
        ck_assert(says(kvd_scratch("set"), "kvd-rotation-set/4"));
        ck_assert_str_eq(kvd_marks_text(b, text), "9=int4");
        ck_assert_str_ne(b->digest, plain);
        ck_assert_int_eq(b->scale_k, s->scale_k);
        ck_assert(!b->transforms == !t);
        if (!t) { // a copy keeps them
            struct kvd_rotset *copy = kvd_rotset_clone(b);
            ck_assert_str_eq(kvd_marks_text(copy, text), "9=int4");
            kvd_rotset_free(&copy);
        }
        kvd_rotset_free(&b);
        kvd_rotset_free(&s);
    }
}
END_TEST

// Replaces text in the header of a file that keeps its length.
static struct kvd_rotset *with(const char *from, const char *to, struct kvd_error *err)
{
    static uint8_t file[1 << 21];
    ck_assert_uint_eq(strlen(from), strlen(to));
    FILE *f = fopen(kvd_scratch("set"), "r");
    size_t n = fread(file, 1, sizeof(file), f);
    fclose(f);
    uint8_t *at = memmem(file, n, from, strlen(from));
    ck_assert_msg(at != NULL, "'%s' is not in the file", from);
    memcpy(at, to, strlen(to));
    f = fopen(kvd_scratch("changed"), "w");
    fwrite(file, 1, n, f);
    fclose(f);
    return kvd_rotset_read(kvd_scratch("changed"), err);
}

START_TEST(files_that_do_not_hold_up)
{
    static const struct {
        const char *from, *to, *why;
    } wrong[] = {{"9=int4", "8=int4", "has no layer 8"},
                 {"9=int4", "9=int5", "is not LAYER=CODEC"},
                 {"9=int4", "9=int2", NULL}, // good in rotations
                 {"\"marks\"", "\"mark_\"", "marks are what kvd-rotation-set/4 has"},
                 {"set/4", "set/5", "format is not"},
                 {"set/4", "set/2", "marks are what kvd-rotation-set/4 has"},
                 {"set/4", "set/3", "codec is not"},
                 {"k.scale", "k.scalf", "k.scale or v.scale is not"}};
    struct kvd_error err = {0};
    struct kvd_rotset *s = rotations(), *b;
    marked(s, "9=int4");
    ck_assert_int_eq(kvd_rotset_write(s, kvd_scratch("set"), &err), 0);
    for (size_t i = 0; i < KVD_LEN(wrong); i++) {
        err = (struct kvd_error){0};
        b = with(wrong[i].from, wrong[i].to, &err);
        ck_assert_msg(!b == !!wrong[i].why, "%s", wrong[i].to);
        ck_assert_msg(!wrong[i].why ||
                          (err.code == KVD_E_CORRUPT && strstr(err.text, wrong[i].why)),
                      "%s: %s", wrong[i].to, err.text);
        kvd_rotset_free(&b);
    }
    kvd_rotset_free(&s);
    s = transforms(2);
    marked(s, "9=int4");
    ck_assert_int_eq(kvd_rotset_write(s, kvd_scratch("set"), &err), 0);
    static const struct {
        const char *to, *why;
    } of_transforms[] = {{"9=int2", NULL},
                         {"9=tc2 ", "is not LAYER=CODEC"},
                         {"7=int4", "layer 7 is for a codec that wants rotations"},
                         {"3=bf16", NULL},
                         {"9=int4", NULL}};
    for (size_t i = 0; i < KVD_LEN(of_transforms); i++) {
        err = (struct kvd_error){0};
        b = with("9=int4", of_transforms[i].to, &err);
        ck_assert_msg(!b == !!of_transforms[i].why, "%s: %s", of_transforms[i].to, err.text);
        ck_assert(b || strstr(err.text, of_transforms[i].why));
        kvd_rotset_free(&b);
    }
    // What is no more than the set's own codec, and what no backend could serve.
    static const char *const refused[][2] = {{"7=tc2", "no more bits than tc2"},
                                             {"7=int2c", "no more bits than tc2"},
                                             {"7=k=tc2.5,v=int4", "V is in tc2, tc2.5 or bf16"}};
    for (size_t i = 0; i < KVD_LEN(refused); i++) {
        marked(s, refused[i][0]);
        err = (struct kvd_error){0};
        ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), KVD_E_CORRUPT);
        ck_assert_msg(strstr(err.text, refused[i][1]) != NULL, "%s", err.text);
    }
    // K for tc2.5 has that codec's bits.
    marked(s, "7=tc2.5");
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), KVD_E_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "codec tc2.5 has 10"));
    for (uint32_t at = 2; at < 4; at++)
        s->transforms->k_bits[at * DIM / 16] = 4;
    ck_assert_int_eq(kvd_rotset_check(s, NULL, &err), 0);
    kvd_rotset_free(&s);
}
END_TEST

// Cut anywhere, and with a byte flipped anywhere in its header: never a crash, and what is read
// holds up.
START_TEST(damaged_files)
{
    struct kvd_error err = {0};
    uint64_t rng = kvd_test_seed("damage");
    static uint8_t file[1 << 21];
    struct kvd_rotset *s = transforms(2);
    marked(s, "3=bf16+9=int4");
    ck_assert_int_eq(kvd_rotset_write(s, kvd_scratch("set"), &err), 0);
    kvd_rotset_free(&s);
    FILE *f = fopen(kvd_scratch("set"), "r");
    size_t n = fread(file, 1, sizeof(file), f);
    fclose(f);
    for (int i = 0; i < 300; i++) {
        size_t at = kvd_rand(&rng) % 1800, length = i % 3 ? n : kvd_rand(&rng) % n;
        file[at] ^= (uint8_t)(1 << i % 8);
        f = fopen(kvd_scratch("changed"), "w");
        fwrite(file, 1, length, f);
        fclose(f);
        file[at] ^= (uint8_t)(1 << i % 8);
        s = kvd_rotset_read(kvd_scratch("changed"), &err);
        ck_assert(!s || (length == n && kvd_rotset_check(s, NULL, &err) == 0));
        kvd_rotset_free(&s);
    }
}
END_TEST

static struct kvd_layout layout_of(struct kvd_codecs codec, uint32_t n_layers,
                                   const uint16_t *layers)
{
    struct kvd_layout l = {.n_layers = n_layers,
                           .n_planes = 1,
                           .planes = {{.n_layers = n_layers,
                                       .q_heads = 2,
                                       .kv_heads = 2,
                                       .head_dim_k = DIM,
                                       .head_dim_v = DIM,
                                       .codec = codec,
                                       .sink = 64,
                                       .recent = 256}}};
    memcpy(l.layers, layers, n_layers * sizeof(*layers));
    return l;
}

START_TEST(what_planes_get)
{
    struct kvd_error err = {0};
    struct kvd_rotset *s = transforms(2);
    struct kvd_rotation_data data = {0};
    marked(s, "3=bf16+9=int4");
    struct kvd_layout l = layout_of(kvd_codecs_both(KVD_CODEC_INT4), 1, (uint16_t[]){9});
    ck_assert_msg(kvd_rotset_select(s, &l, 0, &data, &err) == 0, "%s", err.text);
    ck_assert_mem_eq(data.k, s->transforms->k + 4 * DIM * DIM, 2 * DIM * DIM * sizeof(float));
    ck_assert_mem_eq(data.v, s->transforms->v + 4 * DIM * DIM, 2 * DIM * DIM * sizeof(float));
    ck_assert(!data.k_inverse && !data.v_inverse && !data.k_mean && !data.v_mean && !data.k_sigma &&
              !data.k_bits && !data.clip_k);
    ck_assert(data.scale_k == KVD_SCALE_UNBIASED && data.scale_v == KVD_SCALE_LEAST_SQUARES);
    kvd_rotation_data_deinit(&data);
    l = layout_of(kvd_codecs_both(KVD_CODEC_TC2), 1, (uint16_t[]){7});
    ck_assert_msg(kvd_rotset_select(s, &l, 0, &data, &err) == 0, "%s", err.text);
    ck_assert(data.k_inverse && data.k_mean && data.k_sigma && data.k_bits && data.v_mean);
    kvd_rotation_data_deinit(&data);
    static const struct {
        uint32_t codec;
        uint16_t layers[2];
        const char *why;
    } refused[] = {
        {KVD_CODEC_TC2, {7, 9}, "marks layer 9 for codec int4, and the layout has it in tc2"},
        {KVD_CODEC_TC2, {3, 7}, "marks layer 3 for codec bf16"},
        {KVD_CODEC_INT4, {7, 9}, "transforms for codec tc2"},
        {KVD_CODEC_INT4, {3, 9}, "marks layer 3 for codec bf16"},
        {KVD_CODEC_INT2, {9, 7}, "marks layer 9 for codec int4, and the layout has it in int2"}};
    for (size_t i = 0; i < KVD_LEN(refused); i++) {
        l = layout_of(kvd_codecs_both(refused[i].codec), 2, refused[i].layers);
        ck_assert_int_eq(kvd_rotset_select(s, &l, 0, &data, &err), KVD_E_PRECONDITION);
        ck_assert_msg(strstr(err.text, refused[i].why) != NULL, "%s", err.text);
    }
    kvd_rotset_free(&s);
    // Rotations serve all codecs, whatever is marked.
    s = rotations();
    marked(s, "9=int4");
    l = layout_of(kvd_codecs_both(KVD_CODEC_INT2), 2, (uint16_t[]){7, 9});
    ck_assert_int_eq(kvd_rotset_select(s, &l, 0, &data, &err), 0);
    kvd_rotation_data_deinit(&data);
    kvd_rotset_free(&s);
}
END_TEST

START_TEST(what_is_made_of_layouts)
{
    struct kvd_error err = {0};
    struct kvd_rotset s = {.model = "m"};
    Kvd__V1__Layout asked = KVD__V1__LAYOUT__INIT;
    Kvd__V1__Plane one = KVD__V1__PLANE__INIT, two = KVD__V1__PLANE__INIT, *planes[] = {&one, &two};
    const uint16_t ids[] = {1, 3, 5, 7, 9};
    struct kvd_layout plain = layout_of(kvd_codecs_both(KVD_CODEC_TC2), 5, ids), l = plain;
    ck_assert_int_eq(kvd_layout_mark(&l, &asked, &s, &err), 0); // no marks
    ck_assert_mem_eq(&l, &plain, sizeof(l));
    marked(&s, "2=bf16+3=int4+7=bf16+9=int4");
    ck_assert_msg(kvd_layout_mark(&l, &asked, &s, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(l.n_planes, 3);
    ck_assert_mem_eq(l.plane_of, ((const uint8_t[]){0, 1, 0, 2, 1}), 5);
    ck_assert_uint_eq(l.planes[0].codec.k, KVD_CODEC_TC2);
    ck_assert_uint_eq(l.planes[1].codec.v, KVD_CODEC_INT4);
    ck_assert_uint_eq(l.planes[2].codec.v, KVD_CODEC_BF16);
    ck_assert(l.planes[0].n_layers == 2 && l.planes[1].n_layers == 2 && l.planes[2].n_layers == 1);
    ck_assert(l.planes[1].sink == 64 && l.planes[2].recent == 256 && l.planes[1].q_heads == 2);
    // A mark never takes bits away, and bf16 has no set.
    l = plain = layout_of(kvd_codecs_both(KVD_CODEC_TURBOQUANT_4), 5, ids);
    ck_assert_int_eq(kvd_layout_mark(&l, &asked, &s, &err), 0);
    ck_assert_mem_eq(l.plane_of, ((const uint8_t[]){0, 1, 0, 2, 1}), 5); // int4 has a min more
    l = plain = layout_of(kvd_codecs_both(KVD_CODEC_INT4), 5, ids);
    ck_assert_int_eq(kvd_layout_mark(&l, &asked, &s, &err), 0);
    ck_assert_mem_eq(l.plane_of, ((const uint8_t[]){0, 0, 0, 1, 0}), 5);
    l = plain = layout_of(kvd_codecs_both(KVD_CODEC_BF16), 5, ids);
    ck_assert_int_eq(kvd_layout_mark(&l, &asked, &s, &err), 0);
    ck_assert_mem_eq(&l, &plain, sizeof(l));
    // Where all layers of a plane are marked alike, it stays one.
    l = layout_of(kvd_codecs_both(KVD_CODEC_TC2), 2, (uint16_t[]){3, 9});
    ck_assert_int_eq(kvd_layout_mark(&l, &asked, &s, &err), 0);
    plain = layout_of(kvd_codecs_both(KVD_CODEC_INT4), 2, (uint16_t[]){3, 9});
    ck_assert_mem_eq(&l, &plain, sizeof(l));
    // Planes that name no codec of their own are parted, each for itself; one that does stays.
    asked.n_planes = 2;
    asked.planes = planes;
    struct kvd_layout windows = layout_of(kvd_codecs_both(KVD_CODEC_TC2), 5, ids);
    memcpy(windows.plane_of, (const uint8_t[]){0, 0, 1, 1, 1}, 5);
    windows.n_planes = 2;
    windows.planes[1] = windows.planes[0];
    windows.planes[0].n_layers = 2;
    windows.planes[1].n_layers = 3;
    windows.planes[1].window = 512;
    windows.planes[1].sink = 0;
    l = windows;
    ck_assert_msg(kvd_layout_mark(&l, &asked, &s, &err) == 0, "%s", err.text);
    ck_assert_mem_eq(l.plane_of, ((const uint8_t[]){0, 2, 1, 3, 4}), 5);
    ck_assert(l.n_planes == 5 && l.planes[2].window == 0 && l.planes[3].window == 512);
    two.codec = (char *)"tc2";
    l = windows;
    ck_assert_int_eq(kvd_layout_mark(&l, &asked, &s, &err), 0);
    ck_assert_mem_eq(l.plane_of, ((const uint8_t[]){0, 2, 1, 1, 1}), 5);
    // More planes than there can be.
    asked.n_planes = 0;
    static const char *const many[] = {"int2",          "int4",          "bf16",
                                       "k=int2,v=int4", "k=int4,v=int2", "k=bf16,v=int4",
                                       "k=int4,v=bf16", "k=bf16,v=int2", "k=int2,v=bf16"};
    char text[KVD_MARKS_TEXT] = "";
    uint16_t all[9];
    for (uint32_t i = 0; i < 9; i++) {
        all[i] = (uint16_t)i;
        snprintf(text + strlen(text), sizeof(text) - strlen(text), "%s%u=%s", i ? "+" : "", i,
                 many[i]);
    }
    marked(&s, text);
    for (uint32_t n = 8; n <= 9; n++) {
        l = plain = layout_of(kvd_codecs_both(KVD_CODEC_TC2), n, all);
        int rc = kvd_layout_mark(&l, &asked, &s, &err);
        ck_assert_int_eq(rc, n == 8 ? KVD_OK : KVD_E_PRECONDITION);
        if (rc)
            ck_assert_mem_eq(&l, &plain, sizeof(l));
    }
    ck_assert_ptr_nonnull(strstr(err.text, "more than 8 planes"));
    free(s.marks);
}
END_TEST

START_TEST(average_bits)
{
    struct kvd_rotset *s = rotations();
    double plain = kvd_value_bits(kvd_codecs_both(KVD_CODEC_TC2), DIM, DIM);
    ck_assert_double_eq(kvd_marks_bits(s, kvd_codecs_both(KVD_CODEC_TC2)), plain);
    marked(s, "9=int4");
    ck_assert_double_eq_tol(kvd_marks_bits(s, kvd_codecs_both(KVD_CODEC_TC2)), (2 * 2.25 + 4.5) / 3,
                            1e-9);
    ck_assert_double_eq_tol(kvd_marks_bits(s, kvd_codecs_both(KVD_CODEC_BF16)), 16, 1e-9);
    kvd_rotset_free(&s);
}
END_TEST

KVD_MAIN("marks", 60, texts, files, files_that_do_not_hold_up, damaged_files, what_planes_get,
         what_is_made_of_layouts, average_bits)
