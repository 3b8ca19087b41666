#include "calib/marks.h"

#include <math.h>

#include "calib/transforms.h"
#include "kernels/format.h"

// One "LAYER=CODECS" of `n` characters.
static int parse_one(const char *text, size_t n, struct kvd_mark *out, struct kvd_error *err)
{
    char one[KVD_CODECS_TEXT + 8];
    unsigned layer = 0;
    int at = 0;
    snprintf(one, sizeof(one), "%.*s", (int)n, text);
    if (n >= sizeof(one) || strspn(one, "0123456789") > 5 ||
        sscanf(one, "%u=%n", &layer, &at) != 1 || !at || one[0] == '+' || one[0] == '-' ||
        one[0] == ' ' || layer > KVD_MAX_MODEL_LAYER || !kvd_codecs_find(one + at, &out->codec))
        return kvd_fail(err, KVD_E_INVALID,
                        "marks: '%.60s' is not LAYER=CODEC; codecs are %s, and k=NAME,v=NAME of "
                        "two of them",
                        one, kvd_codec_names());
    out->layer = (uint16_t)layer;
    return KVD_OK;
}

int kvd_marks_parse(struct kvd_rotset *s, const char *text, struct kvd_error *err)
{
    struct kvd_mark *marks KVD_FREE = calloc(KVD_MAX_LAYERS, sizeof(*marks));
    uint32_t n = 0;
    if (!marks)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory for marks");
    for (const char *at = text;; at++) {
        size_t length = strcspn(at, "+");
        if (n == KVD_MAX_LAYERS)
            return kvd_fail(err, KVD_E_INVALID, "marks: more than %d layers", KVD_MAX_LAYERS);
        if (parse_one(at, length, &marks[n], err))
            return err->code;
        if (n && marks[n].layer <= marks[n - 1].layer)
            return kvd_fail(err, KVD_E_INVALID, "marks: layers are not ascending: %u after %u",
                            marks[n].layer, marks[n - 1].layer);
        n++;
        at += length;
        if (!*at)
            break;
    }
    free(s->marks);
    s->marks = KVD_TAKE(marks);
    s->n_marks = n;
    return KVD_OK;
}

const char *kvd_marks_text(const struct kvd_rotset *s, char text[KVD_MARKS_TEXT])
{
    char codec[KVD_CODECS_TEXT];
    size_t at = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < s->n_marks; i++)
        at += (size_t)sprintf(text + at, "%s%u=%s", i ? "+" : "", s->marks[i].layer,
                              kvd_codecs_name(s->marks[i].codec, codec));
    return text;
}

const struct kvd_mark *kvd_mark_of(const struct kvd_rotset *s, uint32_t layer)
{
    for (uint32_t i = 0; i < s->n_marks; i++)
        if (s->marks[i].layer == layer)
            return &s->marks[i];
    return NULL;
}

bool kvd_mark_widens(const struct kvd_mark *m, struct kvd_codecs codec, uint32_t dim_k,
                     uint32_t dim_v)
{
    return kvd_tile_bytes(m->codec, dim_k, dim_v) > kvd_tile_bytes(codec, dim_k, dim_v);
}

double kvd_marks_bits(const struct kvd_rotset *s, struct kvd_codecs codec)
{
    double bits = 0;
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const struct kvd_mark *m = kvd_mark_of(s, s->layers[i]);
        bool wider = m && kvd_mark_widens(m, codec, s->dim_k, s->dim_v);
        bits += kvd_value_bits(wider ? m->codec : codec, s->dim_k, s->dim_v);
    }
    return bits / s->n_layers;
}

uint32_t kvd_layer_codec(const struct kvd_rotset *s, uint64_t index)
{
    const struct kvd_mark *m = kvd_mark_of(s, s->layers[index]);
    return m && kvd_codec_tc(m->codec.k) ? m->codec.k : s->transforms->codec;
}

static bool codec_rotated(struct kvd_codecs codec)
{
    return kvd_codecs_rotated(codec) && !kvd_codec_tc(codec.k);
}

bool kvd_layer_rotated(const struct kvd_rotset *s, uint64_t index)
{
    const struct kvd_mark *m = kvd_mark_of(s, s->layers[index]);
    return m && codec_rotated(m->codec);
}

// -- checks --------------------------------------------------------------------------------------

// Whether the inverse is the transpose, within what a matrix of floats that were rounded is, and
// the mean none.
static bool is_rotation(const float *a, const float *inverse, const float *mean, uint32_t dim)
{
    for (uint32_t i = 0; i < dim; i++) {
        if (!(mean[i] == 0))
            return false;
        for (uint32_t j = 0; j < dim; j++)
            if (!(fabsf(a[(uint64_t)i * dim + j] - inverse[(uint64_t)j * dim + i]) <= 1e-4f))
                return false;
    }
    return true;
}

static int check_rotated(const struct kvd_rotset *s, uint32_t index, struct kvd_error *err)
{
    for (uint32_t h = 0; h < s->heads; h++)
        for (int v = 0; v < 2; v++) {
            struct kvd_transform t = kvd_transform_at(s, (uint64_t)index * s->heads + h, v);
            bool plain = is_rotation(t.a, t.inverse, t.mean, t.coder.dim);
            for (uint32_t i = 0; t.coder.sigma && i < t.coder.dim; i++)
                plain &= t.coder.sigma[i] == 1;
            if (!plain)
                return kvd_fail(err, KVD_E_CORRUPT,
                                "marks: layer %u is for a codec that wants rotations, and %s of "
                                "head %u has a transform that is none",
                                s->layers[index], v ? "V" : "K", h);
        }
    return KVD_OK;
}

// n_layers when the set has no such layer.
static uint32_t index_of(const struct kvd_rotset *s, uint32_t layer)
{
    uint32_t index = 0;
    while (index < s->n_layers && s->layers[index] != layer)
        index++;
    return index;
}

int kvd_marks_check_layers(const struct kvd_rotset *s, struct kvd_error *err)
{
    char text[KVD_CODECS_TEXT];
    for (uint32_t i = 0; i < s->n_marks; i++) {
        const struct kvd_mark *m = &s->marks[i];
        if (index_of(s, m->layer) == s->n_layers)
            return kvd_fail(err, KVD_E_INVALID, "marks: the set has no layer %u", m->layer);
        if (s->transforms &&
            !kvd_mark_widens(m, kvd_codecs_both(s->transforms->codec), s->dim_k, s->dim_v))
            return kvd_fail(err, KVD_E_INVALID,
                            "marks: layer %u is for a codec of no more bits than %s has", m->layer,
                            kvd_codec_name(s->transforms->codec));
        if (s->transforms && kvd_codec_tc(m->codec.k) && m->codec.v != KVD_CODEC_BF16 &&
            !kvd_codec_tc(m->codec.v))
            return kvd_fail(
                err, KVD_E_INVALID,
                "marks: layer %u is for %s: beside a K that has transforms V is in tc2, "
                "tc2.5 or bf16",
                m->layer, kvd_codecs_name(m->codec, text));
    }
    return KVD_OK;
}

int kvd_marks_check(const struct kvd_rotset *s, struct kvd_error *err)
{
    if (kvd_marks_check_layers(s, err))
        return err->code = KVD_E_CORRUPT;
    for (uint32_t i = 0; i < s->n_marks && s->transforms; i++)
        if (codec_rotated(s->marks[i].codec) &&
            check_rotated(s, index_of(s, s->marks[i].layer), err))
            return err->code;
    return KVD_OK;
}
