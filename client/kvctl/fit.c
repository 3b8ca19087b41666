// kvctl calib fit.
#include <time.h>

#include "calib/eval.h"
#include "calib/fit.h"
#include "calib/marks.h"
#include "client/kvctl/calib_tool.h"

struct arguments {
    struct kvd_fit_options o;
    struct kvd_eval_options eval;
    const char *dump, *out, *spectrum, *model, *clips, *asked;
    uint32_t sensitive; // layers to mark by what is lost on `asked`,
    const char *wider;  // and the codec that they get
    enum kvd_scale scale_k, scale_v;
    uint32_t codec; // fit transforms for it; KVD_CODEC_COUNT: rotations
    bool greedy;
    uint16_t layers[KVD_MAX_LAYERS];
};

static int parse_objective(const struct kvctl *k, const char *option, enum kvd_objective *out)
{
    const char *name = kvctl_option(k, option);
    int n = name ? kvd_objective_parse(name) : (int)*out;
    if (n < 0)
        return tool_usage(option, name, "qqt, ktk, sst, vtv or hadamard");
    *out = (enum kvd_objective)n;
    return EXIT_OK;
}

// OSCAR's published recipe.
static void publish(struct arguments *a)
{
    a->o.k = KVD_FIT_QQT;
    a->o.v = KVD_FIT_SST;
    a->o.composition = KVD_COMPOSE_R_H_PBR;
    a->o.per_kv_head = false;
    a->scale_k = a->scale_v = KVD_SCALE_PUBLISHED;
}

// --codec and --bits; an exit code.
static int parse_codec(const struct kvctl *k, struct arguments *a)
{
    static const char *const rotations[] = {"objective-k", "objective-v", "compose", "per-layer",
                                            "scales",      "published",   "clip",    "fit-clips",
                                            "state",       "spectrum"};
    const char *codec = kvctl_option(k, "codec"), *bits = kvctl_option(k, "bits");
    if (!codec)
        return bits ? kvctl_usage("--bits goes with --codec") : EXIT_OK;
    for (size_t i = 0; i < KVD_LEN(rotations); i++)
        if (kvctl_option(k, rotations[i]))
            return kvctl_usage("--%s is of rotations, and does not go with --codec", rotations[i]);
    a->codec = kvd_tc_find(codec);
    a->greedy = !bits || strcmp(bits, "greedy") == 0;
    if (a->codec == KVD_CODEC_COUNT)
        return tool_usage("codec", codec, "tc2 or tc2.5");
    return a->greedy || strcmp(bits, "quarters") == 0
               ? EXIT_OK
               : tool_usage("bits", bits, "quarters or greedy");
}

// --marks, --sensitive and --asked; an exit code.
static int parse_marks(const struct kvctl *k, struct arguments *a)
{
    const char *sensitive = kvctl_option(k, "sensitive");
    struct kvd_codecs codec;
    int at = 0;
    a->o.marks = kvctl_option(k, "marks");
    a->asked = kvctl_option(k, "asked");
    if ((sensitive && (!a->asked || a->o.marks)) ||
        (a->asked && !sensitive && a->codec == KVD_CODEC_COUNT))
        return kvctl_usage("--sensitive goes with --asked, which it ranks layers by, and not with "
                           "--marks; --asked alone with --codec, whose transforms go by it");
    if (!sensitive)
        return EXIT_OK;
    if (sscanf(sensitive, "%u=%n", &a->sensitive, &at) != 1 || !at || a->sensitive < 1 ||
        a->sensitive > KVD_MAX_LAYERS || !kvd_codecs_find(sensitive + at, &codec))
        return tool_usage("sensitive", sensitive, "a number of layers and a codec, such as 1=int4");
    a->wider = sensitive + at;
    return EXIT_OK;
}

static void on_warning(void *ctx, const char *text)
{
    (void)ctx;
    char shown[KVCTL_TEXT];
    progress_end();
    fprintf(stderr, "kvctl: warning: %s\n", kvctl_text(text, shown));
}

// What the table of commands does not know of values. An exit code.
static int parse(const struct kvctl *k, struct arguments *a)
{
    const char *compose = kvctl_option(k, "compose"), *clip = kvctl_option(k, "clip");
    const char *layers = kvctl_option(k, "layers");
    if (kvctl_option(k, "published"))
        publish(a);
    int n = 0, code = parse_codec(k, a);
    code = code ? code : parse_marks(k, a);
    code = code ? code : parse_objective(k, "objective-k", &a->o.k);
    code = code ? code : parse_objective(k, "objective-v", &a->o.v);
    if (code)
        return code;
    if (compose && (n = kvd_composition_parse(compose)) < 0)
        return tool_usage("compose", compose, "r_h_pbr, r_h, r or top_h");
    if (compose)
        a->o.composition = (enum kvd_composition)n;
    if (clip && (sscanf(clip, "%f,%f%n", &a->o.clip_k, &a->o.clip_v, &n) != 2 || clip[n]))
        return tool_usage("clip", clip, "two ratios, such as 0.96,0.92");
    if (layers) {
        a->o.n_layers = kvd_layers_parse(layers, a->layers);
        a->o.layers = a->layers;
    }
    if (kvctl_option(k, "scales"))
        kvd_scales_parse(kvctl_option(k, "scales"), &a->scale_k, &a->scale_v);
    if (a->scale_k != KVD_SCALE_PUBLISHED && a->scale_v != KVD_SCALE_PUBLISHED &&
        (clip || kvctl_option(k, "fit-clips")))
        return kvctl_usage("--%s: clip ratios belong to published scales, and neither side has "
                           "them: say which with --scales, or --published",
                           clip ? "clip" : "fit-clips");
    if (kvctl_option(k, "per-layer"))
        a->o.per_kv_head = false;
    if (a->codec == KVD_CODEC_COUNT && a->scale_k != KVD_SCALE_UNBIASED) {
        char text[256];
        snprintf(text, sizeof(text),
                 "K's scales are %s: queries see such keys more weakly than they are, and facts "
                 "from far back are lost that unbiased scales keep, though the error be less",
                 kvd_scale_name(a->scale_k));
        on_warning(NULL, text);
    }
    a->o.threads = tool_number(k, "threads", 0);
    a->eval.context = tool_number(k, "context", a->eval.context);
    a->o.state = kvctl_option(k, "state");
    a->clips = kvctl_option(k, "fit-clips");
    a->model = kvctl_option(k, "model");
    a->spectrum = kvctl_option(k, "spectrum");
    a->dump = k->arguments[0];
    a->out = k->arguments[1];
    return EXIT_OK;
}

// Eigenvalues of a matrix as the part of the whole that its largest eighth has.
static double concentration(const double *values, uint32_t dim)
{
    double all = 0, top = 0;
    for (uint32_t i = 0; i < dim; i++) {
        all += values[i];
        top += i >= dim - dim / 8 ? values[i] : 0;
    }
    return all > 0 ? top / all : 0;
}

static void print_layers(const struct kvd_fit *f)
{
    const struct kvd_rotset *s = f->set;
    struct table *t = table_new("LAYER|>K: LARGEST EIGHTH|>V: LARGEST EIGHTH");
    for (uint32_t i = 0; i < s->n_layers; i++) {
        table_cell(t, "%u", s->layers[i]);
        for (int v = 0; v < 2; v++) {
            const struct kvd_spectrum *x = v ? &f->v : &f->k;
            uint32_t dim = v ? s->dim_v : s->dim_k;
            double sum = 0;
            for (uint32_t h = 0; x->eigenvalues && h < s->heads; h++)
                sum += concentration(x->eigenvalues + ((uint64_t)i * s->heads + h) * dim, dim);
            if (x->eigenvalues)
                table_cell(t, "%.1f %%", 100 * sum / s->heads);
            else
                table_cell(t, "-");
        }
    }
    table_print(t, "");
    printf("(of the variance, in the largest eighth of the eigenvalues)\n");
}

// By activations that were not fitted to.
static int fit_clips(const struct arguments *a, const struct kvd_dump *clips,
                     struct kvd_rotset *set, struct kvd_error *err)
{
    struct kvd_eval_options o = a->eval;
    o.threads = a->o.threads;
    int rc = kvd_eval_fit_clips(clips, set, &o, err);
    if (rc == KVD_OK && !(set->clips_fitted_to = kvd_dump_digests(clips, err)))
        rc = err->code;
    progress_end();
    if (rc)
        return rc;
    size_t n = strlen(set->objective);
    snprintf(set->objective + n, sizeof(set->objective) - n, ", clips fitted");
    return KVD_OK;
}

// What a side's scales are to be, and clip ratios if they are to be fitted, to `clips`; then the
// file.
static int finish(const struct arguments *a, const struct kvd_dump *d, const struct kvd_dump *clips,
                  struct kvd_rotset *set, struct kvd_error *err)
{
    if (!(set->fitted_to = kvd_dump_digests(d, err)))
        return err->code;
    for (uint32_t i = 0; i < d->n_pieces; i++)
        set->fitted_length = KVD_MAX(set->fitted_length, d->pieces[i].first + d->pieces[i].tokens);
    if (!set->transforms) {
        set->scale_k = a->scale_k;
        set->scale_v = a->scale_v;
    }
    if (clips && fit_clips(a, clips, set, err))
        return err->code;
    return kvd_rotset_write(set, a->out, err);
}

// Only answers tell which layers facts are lost in: some lose as much on any text, and no fact by
// it.
static int check_asked(const struct arguments *a, const struct kvd_dump *asked,
                       struct kvd_error *err)
{
    if (!asked->graded)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: it has no gradients of the answers' loss, which layers are ranked by: "
                        "record it with python3 -m kvd.record --asked",
                        a->asked);
    for (uint32_t i = 1; i < asked->n_pieces; i++)
        if (asked->pieces[i].tokens != asked->pieces[0].tokens)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s: files of %" PRIu64 " and %" PRIu64
                            " tokens: the end of each asks, so all must be as long",
                            a->asked, asked->pieces[0].tokens, asked->pieces[i].tokens);
    return KVD_OK;
}

// By how much each layer moves the answers' loss on `asked`, and a text of marks for those that
// move it most.
static int rank(const struct arguments *a, const struct kvd_dump *asked,
                const struct kvd_rotset *set, char marks[KVD_MARKS_TEXT], struct kvd_error *err)
{
    struct kvd_eval_options o = a->eval;
    struct kvd_eval_case of = {set, KVD_CODEC_INT2, set->scale_k, set->scale_v}; // or the set's own
    struct kvd_eval_figures *f KVD_FREE = calloc(asked->n_layers, sizeof(*f));
    uint16_t layers[KVD_MAX_LAYERS];
    bool chosen[KVD_MAX_LAYERS] = {false};
    uint32_t n = 0;
    size_t at = 0;
    if (!f)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    o.context = (uint32_t)KVD_MIN(asked->pieces[0].tokens, (uint64_t)UINT32_MAX);
    o.queries = KVD_FIT_ASKING;
    o.sink = KVD_DEFAULT_SINK;
    o.recent = KVD_DEFAULT_RECENT;
    o.threads = a->o.threads;
    o.ctx = "asked";
    if (kvd_eval_run(asked, &of, 1, &o, f, layers, &n, NULL, err))
        return err->code;
    progress_end();
    if (a->sensitive > n)
        return kvd_fail(err, KVD_E_INVALID, "--sensitive %u: %s has %u of the set's layers",
                        a->sensitive, a->asked, n);
    for (uint32_t left = a->sensitive; left; left--) {
        uint32_t worst = n;
        for (uint32_t i = 0; i < n; i++)
            if (!chosen[i] && (worst == n || f[i].moved > f[worst].moved))
                worst = i;
        chosen[worst] = true;
        fprintf(stderr, "layer %u moves the answers' loss by %.3f, and loses %.3f of its outputs\n",
                layers[worst], f[worst].moved, f[worst].output_error);
    }
    for (uint32_t i = 0; i < n; i++)
        if (chosen[i])
            at += (size_t)snprintf(marks + at, KVD_MARKS_TEXT - at, "%s%u=%s", at ? "+" : "",
                                   layers[i], a->wider);
    return KVD_OK;
}

// Marks the layers that --sensitive asks for. Those of transforms are fitted anew, as they are to
// be what the codecs of the marks want.
static int mark(const struct arguments *a, const struct kvd_dump *d, const struct kvd_dump *asked,
                struct kvd_rotset *set, struct kvd_error *err)
{
    struct kvd_fit_options o = a->o;
    uint16_t layers[KVD_MAX_LAYERS];
    char marks[KVD_MARKS_TEXT];
    if (rank(a, asked, set, marks, err) || kvd_marks_parse(set, marks, err) ||
        kvd_marks_check_layers(set, err))
        return err->code;
    if (!set->transforms)
        return KVD_OK;
    o.asked = NULL; // which rotations do not go by
    for (uint32_t i = 0; i < set->n_marks; i++) {
        layers[i] = set->marks[i].layer;
        o.asked = kvd_codec_tc(set->marks[i].codec.k) ? asked : o.asked;
    }
    o.marks = marks;
    o.layers = layers;
    o.n_layers = set->n_marks;
    struct kvd_rotset *marked KVD_AUTO(kvd_rotset_free) =
        kvd_fit_transforms(d, a->codec, a->greedy, &o, err);
    if (!marked)
        return err->code;
    kvd_transforms_replace(set, marked);
    return KVD_OK;
}

static void print_set(struct kvctl *k, const struct arguments *a, const struct kvd_rotset *set,
                      double seconds)
{
    char marks[KVD_MARKS_TEXT];
    kvd_marks_text(set, marks);
    if (k->json)
        kvctl_print(k, json_pack("{s:o, s:s, s:o, s:s, s:i, s:s, s:f}", "file",
                                 kvctl_text_json(a->out), "digest", set->digest, "model",
                                 kvctl_text_json(set->model), "objective", set->objective, "layers",
                                 (int)set->n_layers, "marks", marks, "seconds", seconds));
    else
        printf("%s: %s, %u layers, %s, in %.1f s\n%s%s%s%s\n", a->out, set->objective,
               set->n_layers, set->provenance, seconds, *marks ? "marks " : "", marks,
               *marks ? "\n" : "", set->digest);
}

// Opens what is read, and looks at where things are to be written: what is wrong with these is said
// before the work. An exit code.
static int open_all(const struct arguments *a, struct kvd_dump **d, struct kvd_dump **clips,
                    struct kvd_dump **asked)
{
    struct kvd_error err = {0};
    if (tool_check_out(a->out, &err) || (a->spectrum && tool_check_out(a->spectrum, &err)) ||
        !(*d = kvd_dump_open(a->dump, &err)) ||
        (a->clips && !(*clips = kvd_dump_open(a->clips, &err))) ||
        (a->asked && !(*asked = kvd_dump_open(a->asked, &err)))) {
        kvd_dump_free(d);
        kvd_dump_free(clips);
        return tool_fail(&err);
    }
    return EXIT_OK;
}

static int run(struct kvctl *k, struct arguments *a)
{
    struct kvd_error err = {0};
    struct timespec from, to;
    struct kvd_fit *fit = NULL;
    clock_gettime(CLOCK_MONOTONIC, &from);
    struct kvd_dump *d = NULL, *clips = NULL, *asked = NULL;
    int code = open_all(a, &d, &clips, &asked);
    if (code)
        return code;
    if (a->model)
        snprintf(d->model, sizeof(d->model), "%s", a->model);
    struct kvd_rotset *transforms = NULL;
    a->o.asked = asked;
    int rc = asked ? check_asked(a, asked, &err) : KVD_OK;
    if (rc == KVD_OK && a->codec < KVD_CODEC_COUNT)
        transforms = kvd_fit_transforms(d, a->codec, a->greedy, &a->o, &err);
    else if (rc == KVD_OK)
        fit = kvd_fit_run(d, &a->o, &err);
    struct kvd_rotset **set = fit ? &fit->set : &transforms;
    rc = *set ? KVD_OK : err.code;
    if (rc == KVD_OK && a->sensitive)
        rc = mark(a, d, asked, *set, &err);
    if (rc == KVD_OK)
        rc = finish(a, d, clips, *set, &err);
    if (rc == KVD_OK && a->spectrum)
        rc = kvd_fit_write_spectrum(fit, a->spectrum, &err);
    clock_gettime(CLOCK_MONOTONIC, &to);
    double seconds = (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) / 1e9;
    progress_end();
    if (rc == KVD_OK && fit && !k->json)
        print_layers(fit);
    if (rc == KVD_OK)
        print_set(k, a, *set, seconds);
    kvd_rotset_free(&transforms);
    kvd_fit_free(&fit);
    kvd_dump_free(&asked);
    kvd_dump_free(&clips);
    kvd_dump_free(&d);
    return rc ? tool_fail(&err) : EXIT_OK;
}

int cmd_calib_fit(struct kvctl *k)
{
    struct arguments a = {
        .o = {.k = KVD_FIT_KTK,
              .v = KVD_FIT_VTV,
              .composition = KVD_COMPOSE_TOP_H,
              .per_kv_head = true,
              .clip_k = 0.96f,
              .clip_v = 0.92f,
              .progress = tool_progress,
              .warn = on_warning,
              .ctx = "fit"},
        .codec = KVD_CODEC_COUNT,
        .scale_k = KVD_SCALE_UNBIASED,
        .scale_v = KVD_SCALE_LEAST_SQUARES,
        .eval = {.context = 2048, .queries = 64, .progress = tool_progress_count, .ctx = "clips"}};
    int code = parse(k, &a);
    return code ? code : run(k, &a);
}
